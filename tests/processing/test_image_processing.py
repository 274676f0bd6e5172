import io
import struct
import zlib

import numpy as np
import pytest
import torch
from emu35.image_processing_emu35 import Emu35ImageProcessor, smart_resize, to_rgb
from PIL import Image, ImageOps


@pytest.fixture
def processor():
    return Emu35ImageProcessor(image_area=64 * 64)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestSmartResize:
    def test_all_rows_of_the_release(self, fixture_json):
        reference = fixture_json("smart_resize.json")
        crashed = 0
        for in_width, in_height, area, factor, out_width, out_height in reference["rows"]:
            if not out_width or not out_height:
                crashed += 1
                with pytest.raises(ValueError, match="one side would be 0"):
                    smart_resize(in_height, in_width, area=area, factor=factor)
            else:
                assert smart_resize(in_height, in_width, area=area, factor=factor) == (out_height, out_width)
        assert crashed == reference["n_zero"]

    @pytest.mark.parametrize("name", ["height", "width", "area", "factor"])
    def test_not_positive(self, name):
        arguments = {"height": 10, "width": 10, "area": 256, "factor": 16} | {name: 0}
        with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0"):
            smart_resize(**arguments)


class TestParity:
    @pytest.mark.parametrize("name", ["ref_1_crop", "synth_97x41"])
    def test_pixels_of_the_release(self, fixture_json, fixtures_dir, name):
        facts = fixture_json("smart_resize.json")["images"][name]
        path = fixtures_dir / "resize_images" / f"{name}.in.png"
        out = Emu35ImageProcessor()(images=path, image_area=facts["area"], factor=facts["ds_factor"])
        image = out["pixel_values"][0]
        width, height = facts["out_size_wh"]
        assert out["image_sizes"].tolist() == [[height, width]]
        assert image.shape == (3, height, width) and image.dtype == torch.float32
        expected = np.asarray(Image.open(fixtures_dir / "resize_images" / f"{name}.out.png"))
        expected = (expected / 127.5 - 1.0).astype(np.float32).transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), expected)
        first = np.array(facts["first_row_first_4_px_float32"], dtype=np.float32)
        assert np.array_equal(image[:, 0, :4].T.numpy(), first)

    def test_rgba_and_gray_as_convert(self, fixtures_dir):
        for name in ("rgba", "gray"):
            image = Image.open(fixtures_dir / "prompt_images" / f"{name}.png")
            assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


class TestKinds:
    def test_every_way_to_pass_one_image(self, processor, pixels, tmp_path):
        image = Image.fromarray(pixels)
        image.save(tmp_path / "a.png")
        expected = processor(images=image)["pixel_values"][0]
        tensor = torch.from_numpy(pixels)
        data = encoded(image)
        ways = [str(tmp_path / "a.png"), tmp_path / "a.png", data, bytearray(data), pixels, pixels.transpose(2, 0, 1)]
        ways += [tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1) / 255, pixels / 255.0, [image], [[image]]]
        ways += [pixels[None], tensor[None], pixels.astype(np.int64), np.dstack([pixels, pixels[..., :1]])]
        for way in ways:
            got = processor(images=way)["pixel_values"]
            assert len(got) == 1 and torch.equal(got[0], expected)

    def test_sizes_may_differ(self, processor, pixels):
        out = processor(images=[Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))])
        assert [tuple(image.shape[1:]) for image in out["pixel_values"]] == [(48, 80), (80, 48)]
        assert out["image_sizes"].tolist() == [[48, 80], [80, 48]]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
    def test_modes_as_convert(self, pixels, mode):
        image = Image.fromarray(pixels)
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
        assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))

    def test_palette_with_transparency(self, pixels):
        data = encoded(Image.fromarray(pixels).convert("P"), transparency=b"\x00" * 20)
        assert np.array_equal(np.asarray(to_rgb(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

    def test_premultiplied_alpha(self, pixels):
        image = Image.fromarray(pixels).convert("RGBA").convert("RGBa")
        assert np.array_equal(np.asarray(to_rgb(image)), pixels)

    def test_16_bit_is_scaled_not_saturated(self):
        deep = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
        expected = np.rint(deep / 257).astype(np.uint8)
        for image in (
            Image.fromarray(deep),
            encoded(Image.fromarray(deep)),
            deep,
            Image.fromarray(deep.astype(np.int32)),
        ):
            assert np.array_equal(np.asarray(to_rgb(image))[..., 1], expected)

    def test_photos_are_turned_upright(self, pixels):
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
        as_stored = Image.open(io.BytesIO(data))
        assert to_rgb(data).size == (48, 80)
        assert np.array_equal(np.asarray(to_rgb(data)), np.asarray(ImageOps.exif_transpose(as_stored)))
        assert np.array_equal(np.asarray(to_rgb(data, do_exif_transpose=False)), np.asarray(as_stored))

    def test_first_frame_of_an_animation(self, pixels):
        frames = [Image.fromarray(pixels).convert("P"), Image.new("P", (80, 48))]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert np.array_equal(np.asarray(to_rgb(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

    def test_data_address(self, pixels):
        import base64

        data = encoded(Image.fromarray(pixels))
        assert np.array_equal(np.asarray(to_rgb(f"data:image/png;base64,{base64.b64encode(data).decode()}")), pixels)

    def test_web_address(self, pixels, monkeypatch):
        import httpx

        def get(address, **options):
            return httpx.Response(200, content=encoded(Image.fromarray(pixels)), request=httpx.Request("GET", address))

        monkeypatch.setattr(httpx, "get", get)
        assert np.array_equal(np.asarray(to_rgb("https://example.org/a.png")), pixels)

    def test_channels_that_fit_twice(self):
        """3 x 5 x 3 could be both; `input_data_format` decides."""
        array = np.arange(45, dtype=np.uint8).reshape(3, 5, 3)
        assert to_rgb(array).size == (5, 3)
        assert to_rgb(array, input_data_format="channels_first").size == (3, 5)

    def test_no_resize(self, processor, pixels):
        out = processor(images=pixels, do_resize=False)
        assert np.array_equal(
            out["pixel_values"][0].numpy(), (pixels / 127.5 - 1).astype(np.float32).transpose(2, 0, 1)
        )
        with pytest.raises(ValueError, match=r"`images\[0\]` has 47 x 80 pixels.*multiples of 16"):
            processor(images=pixels[:47], do_resize=False)


class TestRefused:
    """Everything is a ValueError or TypeError that names the image and says what to do."""

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (10, 3000)])
    def test_extreme_proportions(self, processor, size):
        with pytest.raises(
            ValueError, match=r"`images\[0\]` has \d+ x \d+ pixels .*`max_aspect_ratio`=50.*Crop or pad"
        ):
            processor(images=Image.new("RGB", size), image_area=1024 * 1024)

    def test_the_second_image_is_named(self, processor, pixels):
        with pytest.raises(ValueError, match=r"`images\[1\]`"):
            processor(images=[pixels, b"nonsense"])

    def test_no_image_file(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"this is text")
        with pytest.raises(ValueError, match=r"a\.png\) is not an image file"):
            to_rgb(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"b\.png\): there is no such file"):
            to_rgb(tmp_path / "b.png")
        with pytest.raises(ValueError, match="cannot be decoded"):
            to_rgb(tmp_path)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
    def test_truncated(self, pixels, kind):
        data = encoded(Image.fromarray(pixels), kind)
        for length in (0, 10, len(data) // 3, len(data) * 2 // 3):
            with pytest.raises(ValueError, match="`image`"):
                to_rgb(data[:length])

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
    def test_corrupt_files_never_raise_anything_else(self, pixels, kind):
        data = encoded(Image.fromarray(pixels[:16, :16]), kind)
        rng = np.random.default_rng(0)
        for _ in range(100):
            broken = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                broken[position] = rng.integers(256)
            try:
                image = to_rgb(bytes(broken))
            except ValueError as error:
                assert str(error).startswith("`image`")
            else:
                assert image.mode == "RGB"

    def test_decompression_bombs(self):
        def png(side: int) -> bytes:
            """A file of a few bytes that claims to be huge."""

            def chunk(kind: bytes, data: bytes) -> bytes:
                return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

            header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
            return (
                b"\x89PNG\r\n\x1a\n"
                + chunk(b"IHDR", header)
                + chunk(b"IDAT", zlib.compress(b""))
                + chunk(b"IEND", b"")
            )

        with (
            pytest.warns(Image.DecompressionBombWarning),
            pytest.raises(ValueError, match="`max_input_pixels`=89478485"),
        ):
            to_rgb(png(10_000))
        with pytest.raises(ValueError, match="decompression bomb"):
            to_rgb(png(60_000))
        with pytest.raises(ValueError, match="`max_input_pixels`=100"):
            to_rgb(Image.new("RGB", (11, 10)), max_input_pixels=100)

    @pytest.mark.parametrize(
        "array, message",
        [
            (np.zeros((5, 5, 2), np.uint8), "1, 3 or 4 channels"),
            (np.zeros((4,), np.uint8), "must have the shape"),
            (np.zeros((0, 4, 3), np.uint8), "must have the shape"),
            (np.full((4, 4, 3), 255.0), r"floats from 255 to 255.*Divide by 255"),
            (np.full((4, 4, 3), -0.5), "must lie in"),
            (np.full((4, 4, 3), np.nan), "must lie in"),
            (np.full((4, 4, 3), 256), "int64 values from 256 to 256"),
            (np.full((4, 4, 3), -1), "int64 values from -1 to -1"),
            (np.zeros((4, 4, 3), np.complex64), "complex64"),
        ],
    )
    def test_arrays(self, array, message):
        with pytest.raises(ValueError, match=message):
            to_rgb(array)

    def test_floating_point_image(self):
        with pytest.raises(ValueError, match="mode F"):
            to_rgb(Image.new("F", (4, 4)))

    @pytest.mark.parametrize("image", [None, 3, {"a": 1}, [None], object()])
    def test_no_image_at_all(self, processor, image):
        with pytest.raises(TypeError, match="must be"):
            processor(images=image)

    def test_web_address_fails(self, monkeypatch):
        import httpx

        def get(address, **options):
            raise httpx.ConnectError("no network")

        monkeypatch.setattr(httpx, "get", get)
        with pytest.raises(ValueError, match="cannot be fetched: no network"):
            to_rgb("https://example.org/a.png")

    def test_areas(self, processor, pixels):
        for area in (0, -1, 255, 10**9):
            with pytest.raises(ValueError, match=rf"`image_area` must lie between 256 .*got {area}"):
                processor(images=pixels, image_area=area)
        with pytest.raises(ValueError, match="`factor` must be positive, got 0"):
            Emu35ImageProcessor(factor=0)

    def test_settings_of_other_processors(self, processor, pixels):
        with pytest.raises((TypeError, ValueError), match="do_normalize"):
            processor(images=pixels, do_normalize=False)


def test_save_and_reload(tmp_path):
    processor = Emu35ImageProcessor(factor=8, image_area=48 * 48, max_aspect_ratio=10)
    processor.save_pretrained(tmp_path)
    assert Emu35ImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
