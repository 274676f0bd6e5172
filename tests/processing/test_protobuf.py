"""The release's story files.  Field numbers are those of its `src/proto/emu_pb.py`; bytes are written out by hand."""

import io
import logging
import random
import re
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from emu35.protobuf_emu35 import load_story, save_story
from emu35.segments_emu35 import GlobalThought, Image, ImageThought, Segments, Text


def png(colour, size=(1, 1), kind="PNG", mode="RGB"):
    stream = io.BytesIO()
    PIL.Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def of(number, content):
    """A field of bytes, by hand: numbers below 16 have a key of one byte, 101 is `aa 06`, 17 is `8a 01`."""
    key = {17: b"\x8a\x01", 101: b"\xaa\x06"}.get(number) or bytes([number * 8 + 2])
    length = len(content)
    return key + (bytes([length]) if length < 128 else bytes([length % 128 + 128, length // 128])) + content


def image_message(data, width=1, height=1, kind=2):
    return bytes([0x08, width, 0x10, height, 0x18, kind]) + of(4, data)


def image(colour="red", size=(2, 3)):
    return Image(torch.zeros(1, 1, dtype=torch.long), PIL.Image.new("RGB", size, colour))


def summary(segment):
    if segment.kind == "image":
        return segment.image.getpixel((0, 0)) if segment.complete else segment.reason
    return segment.kind, segment.text


#: A question, a global thought, a clip of a text, an image thought and its image, and a reference image, in the order
#: of the field numbers, as protobuf writes them.
RED_PNG = png("red")
STORY = (
    of(2, of(1, b"clip_0000") + of(101, of(2, b"Once") + of(101, of(7, b"red?") + of(11, image_message(RED_PNG)))))
    + of(11, b"a plan")
    + of(12, b"Tell")
    + of(17, of(11, image_message(png("blue"))))
)


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "story.pb"
        path.write_bytes(data)
        return path

    return write


class TestKnownBytes:
    def test_without_images(self, file):
        """Every byte by hand."""
        data = bytes.fromhex(
            "12 12"  # Story.clips, 18 bytes
            "0a 09 636c69705f30303030"  # Clip.clip_id "clip_0000"
            "aa06 04"  # Clip.segments, 4 bytes
            "12 02 6869"  # Segment.asr "hi"
            "5a 02 6f6b"  # Story.summary "ok"
            "62 01 3f"  # Story.question "?"
        )
        story = load_story(file(data))
        assert story.prompt == "?" and story.reference_images == []
        assert type(story.segments) is Segments
        assert [summary(s) for s in story.segments] == [("global_thought", "ok"), ("text", "hi")]
        path = Segments([GlobalThought([Text("ok")]), Text("hi")]).save_protobuf(file(b"old"), prompt="?")
        assert path.read_bytes() == data

    def test_read(self, file):
        story = load_story(file(STORY))
        assert [summary(s) for s in story.segments] == [
            ("global_thought", "a plan"),
            ("text", "Once"),
            ("image_thought", "red?"),
            (255, 0, 0),
        ]
        assert story.segments[3].codes.shape == (0, 0)
        assert story.prompt == "Tell" and [i.getpixel((0, 0)) for i in story.reference_images] == [(0, 0, 255)]

    def test_write(self, file):
        """The same bytes as the release's writer gives for the same contents."""
        segments = Segments([GlobalThought([Text("a plan")]), Text("Once"), ImageThought("red?"), image(size=(1, 1))])
        path = segments.save_protobuf(file(b""), prompt="Tell", reference_images=PIL.Image.new("RGB", (1, 1), "blue"))
        assert path.read_bytes() == STORY

    def test_fields_that_are_not_used(self, file):
        """Of the data set (times, scores, flags), of other types, and of later versions."""
        double = bytes(8)
        time = of(2, b"\x09" + double + b"\x11" + double)  # TimeStamp: two doubles
        meta = (
            of(1, b"id")
            + time
            + of(6, of(1, b"clip") + b"\x11" + double)
            + of(11, image_message(RED_PNG))
            + b"\x60\x03"
        )
        clip = of(1, b"c") + time + of(11, b"story") + b"\xaa\x01\x01c" + of(101, of(3, b"caption") + of(101, meta))
        data = of(1, b"id") + b"\x18\x01" + of(4, b"why") + of(2, clip) + of(13, b"refined")
        data += b"\xfd\xff\xff\xff\x0f" + bytes(4)  # field 2**29 - 1, four bytes
        data += b"\x60\x05"  # the question's number, but an integer
        story = load_story(file(data + of(12, b"first") + of(12, b"last")))
        assert [summary(s) for s in story.segments] == [(255, 0, 0)] and story.prompt == "last"

    def test_parts_of_a_message_are_merged(self, file):
        inner = of(11, b"\x08\x01") + of(11, of(4, RED_PNG))
        story = load_story(file(of(2, of(101, of(101, inner)))))
        assert [summary(s) for s in story.segments] == [(255, 0, 0)]

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
    def test_other_image_formats(self, file, kind):
        story = load_story(file(of(17, of(11, image_message(png("white", kind=kind))))))
        assert story.reference_images[0].getpixel((0, 0)) == (255, 255, 255)

    def test_image_in_another_file(self, file, caplog):
        """Its path is told, not followed."""
        meta = of(11, of(5, b"/etc/passwd"))
        story = load_story(file(of(2, of(101, of(2, b"t") + of(101, meta))) + of(17, meta)))
        assert [summary(s) for s in story.segments] == [("text", "t"), "the file has only its path, '/etc/passwd'"]
        assert story.reference_images == []
        assert "reference image 0 is left out: the file has only its path" in caplog.text


class TestRoundTrip:
    def test_everything(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
        noise = Image(torch.zeros(1, 1, dtype=torch.long), PIL.Image.fromarray(pixels))
        segments = Segments(
            [
                GlobalThought([Text("plan "), ImageThought("and more")]),
                image("green"),
                Text("Żółw 一只\n\n"),
                ImageThought("look"),
                noise,
                image("blue"),
                Text("a"),
                Text("b"),
            ]
        )
        path = segments.save_protobuf(tmp_path / "new" / "s.pb", "draw", [image("red").image, image("blue").image])
        story = load_story(str(path))
        assert [summary(s) for s in story.segments] == [
            ("global_thought", "plan and more"),
            *[summary(s) for s in segments[1:]],
        ]
        assert np.array_equal(np.asarray(story.segments[4].image), pixels)
        assert story.prompt == "draw" and len(story.reference_images) == 2
        again = save_story(story, tmp_path / "again.pb")
        assert again.read_bytes() == path.read_bytes()
        folder = story.save(tmp_path / "out")
        assert len(list(folder.glob("image-*.png"))) == 3 and len(list(folder.glob("reference-*.png"))) == 2

    def test_what_the_format_cannot_hold(self, tmp_path, caplog):
        cut = image()
        cut.complete, cut.reason = False, "not closed"
        segments = Segments(
            [
                GlobalThought([image()]),
                GlobalThought([Text("b")]),
                ImageThought("lost"),
                Text("t"),
                cut,
                ImageThought("x"),
            ]
        )
        with caplog.at_level(logging.WARNING, logger="emu35"):
            story = load_story(segments.save_protobuf(tmp_path / "s.pb"))
        assert [summary(s) for s in story.segments] == [("global_thought", "\n\nb"), ("text", "t")]
        (record,) = caplog.records
        assert record.getMessage().endswith(
            "left out: the images of the global thought, a thought about an image that does not follow, an incomplete "
            "image (not closed), a thought about an image that does not follow."
        )

    def test_bad_input(self, tmp_path):
        undecoded = Segments([Image(torch.zeros(1, 1, dtype=torch.long))])
        for segments, arguments, error, message in (
            (undecoded, {}, ValueError, "image 1 is not decoded.*vision_tokenizer=model"),
            (Segments(), {}, ValueError, "there is nothing to write"),
            (Segments(), {"prompt": 3}, TypeError, "`prompt` must be a string, got int"),
            (Segments(), {"reference_images": [3]}, TypeError, "int"),
        ):
            with pytest.raises(error, match=message):
                segments.save_protobuf(tmp_path / "s.pb", **arguments)
        assert not list(tmp_path.iterdir())

    def test_failure_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = Segments([Text("old")]).save_protobuf(tmp_path / "s.pb")

        def full(descriptor):
            raise OSError("No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            Segments([Text("new")]).save_protobuf(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["s.pb"]
        assert load_story(path).segments.text == "old"


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"", "at byte 0: nothing of a story is in it; the file is empty or of another kind"),
            (b"\x08\x01", "at byte 0: nothing of a story"),  # no field of a story
            (of(12, b"ok") + b"\x62\x05ab", "at byte 4: field 12 has 5 bytes, but 2 are left"),
            (b"\x62\xff\xff\xff\xff\xff\xff\xff\xff\x7f", r"at byte 0: field 12 has \d+ bytes, but 0 are left"),
            (b"\x62" + b"\xff" * 11, "at byte 1: a number does not end"),
            (b"\x62\x80", "at byte 1: a number does not end"),
            (b"\xff" * 9 + b"\x01", r"at byte 0: \d+ is no field number"),
            (b"\x02\x00", "at byte 0: 0 is no field number"),
            (b"\x0b\x0c", "at byte 0: field 1 is of the unknown wire type 3"),
            (b"\x09" + bytes(7), "at byte 0: field 1 has 8 bytes, but 7 are left"),
            (of(2, of(101, b"\x12\x7fab")), "at byte 5: field 2 has 127 bytes, but 2 are left"),  # of the message
            (of(12, b"ab\xff"), "at byte 4: `question` is no UTF-8 text"),
        ],
    )
    def test_wire_format(self, file, data, problem):
        path = file(data)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a story of Emu3.5, or damaged, {problem}"):
            load_story(path)

    def test_cut_at_every_byte(self, file):
        """An error, or the fields before the cut."""
        whole = 0
        ends = {STORY.index(of(11, b"a plan")), STORY.index(of(12, b"Tell")), STORY.index(of(12, b"Tell")) + 6}
        for length in range(len(STORY)):
            path = file(STORY[:length])
            if length in ends:
                assert load_story(path).segments.text == "Once"
                whole += 1
            else:
                with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .* at byte \\d+: "):
                    load_story(path)
        assert whole == 3

    def test_random_damage(self, file):
        """Whatever the bytes are, a story or a ValueError."""
        rng = random.Random(0)
        failures = 0
        for _ in range(400):
            data = bytearray(STORY)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                load_story(file(data))
            except ValueError:
                failures += 1
        assert 100 < failures < 400

    @pytest.mark.parametrize("data", [b"GIF89a", RED_PNG[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
    def test_images(self, file, data):
        """Damaged, or of a format that the release has not, though PIL reads it."""
        content = of(17, of(11, image_message(data)))
        path = file(content)
        offset = content.index(data)
        with pytest.raises(ValueError, match=f"the image at byte {offset} of {re.escape(str(path))}"):
            load_story(path)

    def test_bombs(self, file):
        """Pixels are counted over all images, before they are unpacked."""
        white = of(17, of(11, image_message(png(0, (100, 50), mode="1"), 100, 50)))
        assert len(load_story(file(white * 2), max_pixels=10_000).reference_images) == 2
        with pytest.raises(ValueError, match=r"has 50 x 100 pixels .* more than `max_pixels`=10000"):
            load_story(file(white * 3), max_pixels=10_000)
        data = bytearray(png(0, mode="1"))
        data[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        with pytest.raises(ValueError, match="decompression bomb"):
            load_story(file(of(17, of(11, image_message(bytes(data))))))

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_story(tmp_path / "nothing.pb")
