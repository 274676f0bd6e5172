"""Uploads: only the bytes decide, nothing is unpacked before its size is known, nothing but pixels comes out."""

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from emu35.spaces.errors import UserError
from emu35.spaces.settings import SpaceSettings
from emu35.spaces.uploads import check_image, read_image

SETTINGS = SpaceSettings(max_upload_pixels=1_000_000, max_upload_bytes=300_000)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A small file whose header promises, and whose data holds, very many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000_000), 9)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


RED = PIL.Image.new("RGB", (40, 30), (255, 0, 0))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("bomb.png", bomb(50_000, 50_000), "million pixels"),
        ("wide.png", bomb(1_000_001, 1), "million pixels"),
        ("large.png", bomb(1001, 1000), "million pixels"),
        ("long.png", encoded(PIL.Image.new("RGB", (2100, 100)), "PNG"), "20 times"),
        ("noise.bmp", encoded(PIL.Image.new("RGB", (400, 400)), "BMP"), "MB"),
        ("page.png", b"<html><script>alert(1)</script></html>", "no picture"),
        ("drawing.svg", SVG, "no picture"),
        ("drawing.png", SVG, "no picture"),
        ("ghost.eps", POSTSCRIPT, "no picture"),
        ("cut.png", encoded(RED, "PNG")[:60], "damaged"),
        ("cut.jpg", encoded(PIL.Image.effect_noise((200, 200), 90).convert("RGB"), "JPEG")[:3000], "damaged"),
        ("nothing.png", b"", "no picture"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_refused(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as refused:
        read_image(tmp_path / name, SETTINGS)
    assert str(tmp_path) not in str(refused.value)


def test_missing_file_names_no_path(tmp_path):
    with pytest.raises(UserError, match="upload it again") as refused:
        read_image(tmp_path / "gone.png", SETTINGS)
    assert "gone" not in str(refused.value)


def test_the_ending_says_nothing(tmp_path):
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(RED, "WEBP", lossless=True))
    assert read_image(path, SETTINGS).getpixel((0, 0)) == (255, 0, 0)


def test_photos_are_turned_upright_and_lose_their_metadata(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010F] = "a camera"
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(RED, "JPEG", exif=exif, comment=b"at home"))
    image = read_image(path, SETTINGS)
    assert image.size == (30, 40)
    assert image.info == {}
    assert not image.getexif()
    assert type(image) is PIL.Image.Image


def test_sixteen_bits_are_scaled(tmp_path):
    path = tmp_path / "deep.png"
    PIL.Image.fromarray(np.full((30, 40), 0x8080, dtype=np.uint16)).save(path)
    assert read_image(path, SETTINGS).getpixel((5, 5)) == (128, 128, 128)


def test_palettes_and_transparency(tmp_path):
    path = tmp_path / "palette.gif"
    RED.convert("P", palette=PIL.Image.Palette.ADAPTIVE).save(path)
    assert read_image(path, SETTINGS).getpixel((5, 5)) == (255, 0, 0)
    RED.convert("RGBA").save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png", SETTINGS).mode == "RGB"


def test_of_an_animation_the_first_frame(tmp_path):
    path = tmp_path / "animation.gif"
    RED.save(path, save_all=True, append_images=[PIL.Image.new("RGB", (40, 30), (0, 0, 255))] * 5)
    image = read_image(path, SETTINGS)
    assert image.getpixel((5, 5)) == (255, 0, 0)
    assert getattr(image, "n_frames", 1) == 1


def test_no_more_is_kept_than_can_be_used():
    wide = check_image(PIL.Image.new("RGB", (1200, 600), "blue"), SETTINGS)
    assert 0.98 * 512 * 512 < wide.width * wide.height <= 512 * 512 and wide.width == pytest.approx(
        2 * wide.height, abs=2
    )
    assert wide.getpixel((5, 5)) == (0, 0, 255)
    small = check_image(RED, SETTINGS)
    assert small.tobytes() == RED.tobytes()
    larger = SpaceSettings(max_upload_pixels=1_000_000, max_pixels=900_000)
    assert check_image(PIL.Image.new("RGB", (1200, 600)), larger).size == (1200, 600)


def test_few_are_unpacked_at_a_time(monkeypatch):
    running, most = [], []

    def slow(image, *_):
        running.append(image)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(image)
        return image

    monkeypatch.setattr("emu35.spaces.uploads.to_rgb", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda color: check_image(PIL.Image.new("RGB", (4, 4), color), SETTINGS), range(8)))
    assert max(most) == 2


def test_pictures_in_memory_are_checked_too():
    with pytest.raises(UserError, match="million pixels"):
        check_image(PIL.Image.new("1", (1001, 1000)), SETTINGS)
    with pytest.raises(UserError, match="upload a picture"):
        check_image("/etc/passwd", SETTINGS)
    with pytest.raises(UserError, match="damaged"):
        check_image(PIL.Image.new("F", (10, 10)), SETTINGS)
