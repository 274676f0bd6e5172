"""Answers as lists, and as folders to look at."""

import base64
import copy
import io
import logging
import pickle
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from emu35 import segments_saving_emu35 as saving
from emu35.segments_emu35 import GlobalThought, Image, ImageThought, Segments, Text

HOSTILE = "</title></p><script>alert('x')</script><img src=x onerror=\"y\"> & 'quoted'"


def picture(colour="red", size=(48, 48)):
    return PIL.Image.new("RGB", size, colour)


def image(colour="red", size=(48, 48), complete=True, reason=""):
    return Image(torch.zeros(3, 3, dtype=torch.long), picture(colour, size), complete, reason)


@pytest.fixture
def story():
    return Segments(
        [
            GlobalThought([Text("first red,"), image("green"), Text(" then blue")]),
            Text("A red\nsquare."),
            ImageThought("it is red", complete=False),
            image("red"),
            image("blue"),
            Text(" The end."),
        ]
    )


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if text.strip() and self.open[-1] != "style":
            self.texts.append((self.open[-1], text))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


class TestSegments:
    def test_is_a_list(self, story):
        assert isinstance(story, list) and story == list(story) and len(story) == 6
        assert type(story[2:]) is Segments and story[2:].images == [story[3].image, story[4].image]
        longer = story + list(story)
        assert type(longer) is Segments and longer.text == 2 * story.text
        assert type(copy.deepcopy(story)) is Segments and len(pickle.loads(pickle.dumps(story)).images) == 3
        with pytest.raises(TypeError):
            story + (1,)  # noqa: RUF005

    def test_text_and_images(self, story):
        assert story.text == "A red\nsquare. The end."
        assert [image.getpixel((0, 0)) for image in story.images] == [(0, 128, 0), (255, 0, 0), (0, 0, 255)]
        story[3].complete = False
        assert len(story.images) == 2
        assert Segments().text == "" and Segments().images == []

    def test_what_the_processor_returns(self, small):
        layout = small.token_layout
        visual = layout.visual_token_offset
        ids = small._encode_text("yes") + layout.image_token_ids([[visual, visual + 1]])

        def decode(codes):
            return torch.zeros(1, 3, 16 * codes.shape[1], 16 * codes.shape[2])

        segments = small.decode_multimodal(ids)
        assert type(segments) is Segments and segments.text == "yes"
        with pytest.raises(ValueError, match=r"image 1 is not decoded.*Pass `vision_tokenizer=model`"):
            _ = segments.images
        (row,) = small.post_process_multimodal_output([ids], vision_tokenizer=decode)
        assert type(row) is Segments and row.images[0].size == (32, 16)

    def test_incomplete_image_beside_pictures_that_come_with_the_output(self, small):
        """`generate` returns pictures of complete images; rows of the others are decoded all the same."""
        layout = small.token_layout
        visual = layout.visual_token_offset
        cut = layout.image_token_ids([[visual, visual], [visual, visual]])[:-2]
        output = SimpleNamespace(
            sequences=[[*layout.image_token_ids([[visual]]), *cut]], images=[torch.zeros(3, 16, 16)]
        )

        def decode(codes):
            assert codes.shape == (1, 1, 2)
            return torch.ones(1, 3, 16, 32)

        ((whole, rest),) = small.post_process_multimodal_output(output, vision_tokenizer=decode)
        assert whole.image.getpixel((0, 0)) == (127, 127, 127)
        assert not rest.complete and rest.image.size == (32, 16)


class TestFolder:
    def test_files(self, story, tmp_path):
        folder = story.save(tmp_path / "new" / "out", title="T", prompt="P", reference_images=picture("black"))
        assert folder == tmp_path / "new" / "out"
        images = ["image-01.png", "image-02.png", "image-03.png"]
        assert names(folder) == [*images, "index.html", "reference-01.png", "story.md"]
        pixels = [PIL.Image.open(folder / name).getpixel((0, 0)) for name in images]
        assert pixels == [(0, 128, 0), (255, 0, 0), (0, 0, 255)]

    def test_page(self, story, tmp_path):
        page = page_of(
            story.save(tmp_path, title="Squares", prompt="two squares", reference_images=[picture("black")])
        )
        shown = page.all("img")
        pixels = []
        for attributes in shown:
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/png;base64"
            pixels.append(PIL.Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)))
        assert pixels == [(0, 0, 0), (0, 128, 0), (255, 0, 0), (0, 0, 255)]
        described = ["Image 1 of the prompt", "first red,", "A red square.", "A red square."]
        assert [attributes["alt"] for attributes in shown] == described
        assert {(a["class"], a["width"], a["height"]) for a in shown} == {("small", "480", "480")}
        assert not {"script", "link", "iframe"} & {name for name, _ in page.elements}
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
        assert page.texts == [
            ("title", "Squares"),
            ("h1", "Squares"),
            ("p", "two squares"),
            ("summary", "Thoughts on the whole answer"),
            ("p", "first red,"),
            ("p", "then blue"),
            ("p", "A red\nsquare."),
            ("summary", "Thoughts on the next image (unfinished)"),
            ("p", "it is red"),
            ("p", "The end."),
        ]
        style = (tmp_path / "index.html").read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in style and "image-rendering: pixelated" in style

    def test_hostile_texts(self, tmp_path):
        """Nothing a model or a user writes becomes markup, in attributes neither."""
        segments = Segments([Text(HOSTILE), image(complete=False, reason=HOSTILE), ImageThought(HOSTILE)])
        page = page_of(segments.save(tmp_path, title=HOSTILE, prompt=HOSTILE))
        assert [text for _, text in page.texts if text == HOSTILE] == [HOSTILE] * 5
        assert [attributes["alt"] for attributes in page.all("img")] == [HOSTILE]
        assert not page.all("script") and len(page.all("img")) == 1
        markdown = (tmp_path / "story.md").read_text(encoding="utf-8")
        assert re.findall(r"<[^>]*>", markdown) == ["<details>", "<summary>", "</summary>", "</details>"]

    def test_large_pictures(self, tmp_path):
        """As JPEG in the page, not enlarged; as they are in the files."""
        page = page_of(Segments([image(size=(512, 320)), image(size=(300, 20))]).save(tmp_path))
        large, medium = page.all("img")
        assert large["src"].startswith("data:image/jpeg") and medium["src"].startswith("data:image/png")
        assert (large["class"], large["width"], large["height"]) == ("large", "512", "320")
        assert large["alt"] == "Image 1" and medium["alt"] == "Image 2"
        assert PIL.Image.open(tmp_path / "image-01.png").format == "PNG"

    def test_markdown(self, story, tmp_path):
        story += [Text("1. *not* a list\n- nor this\n# nor a heading [x](y)\n\nnew paragraph")]
        story.save(tmp_path, title="T", prompt="a\nb")
        text = (tmp_path / "story.md").read_text(encoding="utf-8")
        assert text.startswith(
            "# T\n\n> a\\\n> b\n\n<details><summary>Thoughts on the whole answer</summary>\n\nfirst"
        )
        assert "A red\\\nsquare.\n\n<details>" in text
        assert "\n\n![A red square.](image-02.png)\n\n![A red square.](image-03.png)\n\nThe end.\n\n" in text
        assert text.endswith(
            "1\\. \\*not\\* a list\\\n\\- nor this\\\n\\# nor a heading \\[x\\](y)\n\nnew paragraph\n"
        )

    def test_incomplete_images(self, tmp_path):
        empty = Image(torch.empty(0, 0, dtype=torch.long), None, False, "no size")
        page = page_of(Segments([image(complete=False, reason="not closed"), empty]).save(tmp_path))
        assert len(page.all("img")) == 1
        notes = [text for _, text in page.texts if text.startswith("This image is incomplete")]
        assert notes == ["This image is incomplete: not closed.", "This image is incomplete: no size."]
        assert "image-01-incomplete.png" in names(tmp_path)
        assert "![Image 1](image-01-incomplete.png)\n\n*This image is incomplete: not closed.*" in (
            tmp_path / "story.md"
        ).read_text(encoding="utf-8")

    def test_empty_answer(self, tmp_path):
        assert ("p", "The answer is empty.") in page_of(Segments().save(tmp_path)).texts

    def test_long_descriptions(self, tmp_path):
        (shown,) = page_of(Segments([Text("长" * 1000), image()]).save(tmp_path)).all("img")
        assert shown["alt"] == "长" * 249 + "…"

    def test_again_into_the_same_folder(self, story, tmp_path):
        """What the earlier save wrote goes; nothing else does."""
        story.save(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "image-1.png").write_text("mine")
        story[3:4].save(tmp_path)
        assert names(tmp_path) == ["image-01.png", "image-1.png", "index.html", "notes.txt", "story.md"]
        assert PIL.Image.open(tmp_path / "image-01.png").getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("name", ["index.html", "image-07.png"])
    def test_files_of_others(self, story, tmp_path, name):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds {name}, but not from an earlier save"):
            story.save(tmp_path)
        assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"

    def test_interrupted(self, story, tmp_path, monkeypatch):
        """The earlier save stays as it was, or nothing at all."""
        story[3:4].save(tmp_path / "old")
        before = {entry.name: entry.read_bytes() for entry in (tmp_path / "old").iterdir()}

        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(saving, "_markdown_page", stop)
        for folder in ("old", "new"):
            with pytest.raises(KeyboardInterrupt):
                story.save(tmp_path / folder)
        assert {entry.name: entry.read_bytes() for entry in (tmp_path / "old").iterdir()} == before
        assert names(tmp_path) == ["old"]

    def test_bad_input(self, story, tmp_path):
        undecoded = Segments([Image(torch.zeros(1, 1, dtype=torch.long))])
        for bad, arguments, error, message in (
            (undecoded, {}, ValueError, "image 1 is not decoded.*vision_tokenizer=model"),
            (Segments([GlobalThought(undecoded)]), {}, ValueError, "image 1 is not decoded"),
            (Segments(["text"]), {}, TypeError, r"`segments\[0\]` must be a Text, .* got str"),
            (story, {"fps": 0}, ValueError, "`fps` must be a number above 0 and at most 60, got 0"),
            (story, {"fps": float("nan")}, ValueError, "`fps` must be"),
            (story, {"title": 3}, TypeError, "`title` must be a string, got int"),
            (story, {"prompt": ["a"]}, TypeError, "`prompt` must be a string, got list"),
            (story, {"reference_images": [{}]}, TypeError, "dict"),
        ):
            with pytest.raises(error, match=message):
                bad.save(tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
        (tmp_path / "file").write_text("x")
        with pytest.raises(NotADirectoryError, match="`directory`="):
            story.save(tmp_path / "file")


class FakeWriter:
    def __init__(self, path, fail, **settings):
        self.path, self.fail, self.settings, self.frames = path, fail, settings, []

    def __enter__(self):
        self.path.write_bytes(b"half")
        return self

    def __exit__(self, *error):
        pass

    def append_data(self, frame):
        if self.fail:
            raise OSError("broken pipe")
        self.frames.append(frame)


@pytest.fixture(autouse=True)
def without_imageio(request, monkeypatch):
    """Whether it is installed or not, only tests about videos write any."""
    if request.cls is not TestVideo:
        monkeypatch.setitem(sys.modules, "imageio", None)


@pytest.fixture
def imageio(monkeypatch):
    """A stand-in for imageio: `fail`, and the `writers` that were asked for."""
    fake = SimpleNamespace(writers=[], fail=False)

    def get_writer(path, **settings):
        fake.writers.append(FakeWriter(path, fake.fail, **settings))
        return fake.writers[-1]

    module = SimpleNamespace(get_writer=get_writer)
    for name, value in (("imageio", SimpleNamespace(v2=module)), ("imageio.v2", module), ("imageio_ffmpeg", fake)):
        monkeypatch.setitem(sys.modules, name, value)
    return fake


class TestVideo:
    def test_without_imageio(self, story, tmp_path, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "imageio", None)
        with caplog.at_level(logging.INFO, logger="emu35"):
            story.save(tmp_path)
        assert "no story.mp4 is written: that needs `pip install imageio imageio-ffmpeg`." in caplog.text
        assert "story.mp4" not in names(tmp_path)

    def test_frames(self, tmp_path, imageio):
        """Images of different sizes on frames of one even size; a caption stays for a second per 15 signs."""
        segments = Segments(
            [Text("x" * 45), image("red", (47, 31)), image("blue", (301, 401)), Text("end"), image(complete=False)]
        )
        folder = segments.save(tmp_path, fps=2)
        assert "story.mp4" in names(folder)
        (writer,) = imageio.writers
        assert writer.settings["format"] == "FFMPEG" and writer.settings["fps"] == 10
        assert len(writer.frames) == 30 + 5 + 5
        height, width, channels = writer.frames[0].shape
        assert width % 2 == height % 2 == 0 and channels == 3
        assert {frame.shape for frame in writer.frames} == {writer.frames[0].shape}
        assert width == 470 and height > 402  # 47 pixels ten times enlarged; 401 made even, and the caption
        red, blue, end = writer.frames[0], writer.frames[30], writer.frames[35]
        assert red[201, 235].tolist() == [255, 0, 0] and blue[201, 235].tolist() == [0, 0, 255]
        assert (red[402:] == 255).any() and not (blue[402:] == 255).any() and (end[402:] == 255).any()
        assert np.array_equal(end[:402], blue[:402])

    def test_a_real_video(self, tmp_path):
        reader = pytest.importorskip("imageio.v2", reason="needs pip install imageio imageio-ffmpeg")
        pytest.importorskip("imageio_ffmpeg")
        pictures = [PIL.Image.new("RGB", (48, 48), color) for color in ("red", "blue")]
        codes = torch.zeros(6, 6, dtype=torch.long)
        story = Segments([part for one in pictures for part in (Text("a fox"), Image(codes, one))])
        path = story.save(tmp_path / "story") / "story.mp4"
        with reader.get_reader(path) as video:
            frames = [np.asarray(frame) for frame in video]
        assert frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
        first, last = (frame[: frame.shape[1]].mean((0, 1)) for frame in (frames[0], frames[-1]))
        assert first.argmax() == 0 and last.argmax() == 2  # red, then blue, through a lossy codec

    def test_no_images(self, tmp_path, imageio, caplog):
        with caplog.at_level(logging.INFO, logger="emu35"):
            Segments([Text("only text")]).save(tmp_path)
        assert not imageio.writers and not caplog.records

    def test_failure_costs_only_the_video(self, story, tmp_path, imageio, caplog):
        imageio.fail = True
        story.save(tmp_path)
        assert "story.mp4 could not be written: broken pipe" in caplog.text
        assert "index.html" in names(tmp_path) and "story.mp4" not in names(tmp_path)

    def test_captions_fit(self):
        font = saving._font(16, "")
        for text in ("a few words " * 60, "w" * 500, "长" * 500, "mixed 长" * 100):
            lines = saving._wrap(text, font, 200)
            assert len(lines) == 6 and lines[-1].endswith(" …")
            assert all(font.getlength(line.removesuffix(" …")) <= 200 for line in lines)
        assert saving._wrap("one line", font, 200) == ["one line"] and saving._wrap("", font, 200) == []
        assert saving._wrap("a word " * 3, font, font.getlength("a word a")) == ["a word a", "word a", "word"]


def test_an_empty_thought_is_saved_too(tmp_path):
    story = Segments([ImageThought(""), Text("a fox"), GlobalThought([])])
    page = story.save(tmp_path / "story")
    assert "a fox" in (page / "story.md").read_text() and "a fox" in (page / "index.html").read_text()
