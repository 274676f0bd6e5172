"""Image preprocessing of Emu3.5: any image to RGB, "smart resize" to whole codes, pixels to [-1, 1]."""

import base64
import io
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import httpx
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import Unpack

#: What PIL raises on files that are damaged, in one decoder or another.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


def smart_resize(height: int, width: int, area: int = 1024 * 1024, factor: int = 16) -> tuple[int, int]:
    """Size with about `area` pixels, the proportions of the input, and sides that are multiples of `factor`.

    The arithmetic of the release, to the last rounding (`src/utils/input_utils.py`): it truncates twice, and the area
    may end up slightly above `area`.

    Args:
        height, width (`int`): of the image, in pixels.
        area (`int`): wanted number of pixels.
        factor (`int`): pixels a side of one visual code.
    Returns:
        `tuple[int, int]`: new height and width.
    Raises:
        ValueError: if an argument is not positive, or the image is so long that a side would be rounded to 0.

    Example:
        >>> smart_resize(1080, 1920, area=1024 * 1024)
        (768, 1360)
    """
    for name, value in (("height", height), ("width", width), ("area", area), ("factor", factor)):
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    ratio = width / height
    new_height = int((area / ratio) ** 0.5)
    new_width = int(new_height * ratio)
    new_height, new_width = (((side + factor // 2) // factor) * factor for side in (new_height, new_width))
    if not new_height or not new_width:
        raise ValueError(
            f"an image of `height`={height} and `width`={width} cannot be resized to `area`={area}: one side would be "
            f"0 (multiples of {factor}). Crop or pad it to less extreme proportions."
        )
    return new_height, new_width


def is_single_image(image: Any) -> bool:
    """Whether `image` is one image (or its path, address or bytes) and not a collection of them."""
    return isinstance(image, (Image.Image, str, os.PathLike, bytes, bytearray)) or (
        isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim < 4
    )


def flatten_images(images: Any) -> list:
    """One image, a batch `(n, ...)` or (nested) lists of them as one flat list."""
    if is_single_image(images):
        return [images]
    if isinstance(images, (Sequence, np.ndarray, torch.Tensor)):
        return [image for item in images for image in flatten_images(item)]
    raise TypeError(
        "`images` must be PIL images, arrays, tensors, paths, addresses, bytes of image files, or lists of them; got "
        f"{type(images).__name__}."
    )


class Emu35ImageProcessorKwargs(TypedDict, total=False):
    r"""
    Everything there is to set; transformers' other `ImagesKwargs` (`do_normalize`, `size`, ...) are refused.

    do_resize (`bool`), resample (`int`): whether and with which of PIL's filters to resize.
    input_data_format (`str`): "channels_first" or "channels_last" of arrays; `None`: by their shape.
    image_area (`int`): number of pixels, about, after resizing.
    factor (`int`): pixels a side of one visual code.
    max_image_area (`int`): largest `image_area` allowed.
    max_aspect_ratio (`float`): longest side by shortest side of an image that is still accepted.
    max_input_pixels (`int`): largest image file accepted, in pixels.
    do_exif_transpose (`bool`): whether to turn photos upright as their EXIF tag says.
    """

    do_resize: bool | None
    resample: int | None
    input_data_format: str | None
    return_tensors: str | None
    image_area: int | None
    factor: int | None
    max_image_area: int | None
    max_aspect_ratio: float | int | None
    max_input_pixels: int | None
    do_exif_transpose: bool | None


class Emu35ImageProcessor(PilBackend):
    r"""
    Images to the pixels the vision tokenizer encodes.  Pixel for pixel the release's preprocessing: `convert("RGB")`,
    [`smart_resize`], PIL's bicubic filter, `x / 127.5 - 1`.

    The release says nothing about two kinds of images, which here come out as they look: 16-bit images are scaled to 8
    bits (PIL would saturate them), and photos are turned upright (`do_exif_transpose=False` leaves them as the release
    does).

    Args:
        image_area (`int`, defaults to 1,048,576): number of pixels, about, after resizing.
        factor (`int`, defaults to 16): pixels a side of one visual code.
        do_resize (`bool`, defaults to `True`):
            `False`: images keep their size, which must be a multiple of `factor`.
        max_image_area (`int`, defaults to 8,388,608): largest `image_area` allowed (32,768 codes of 16 x 16 pixels).
        max_aspect_ratio (`float`, defaults to 50): longest side by shortest side of an image that is still accepted.
        max_input_pixels (`int`, defaults to 89,478,485): larger files are refused before they are decoded.
        do_exif_transpose (`bool`, defaults to `True`): whether to turn photos upright as their EXIF tag says.

    Example:
        >>> Emu35ImageProcessor()(images=["cat.jpg"], image_area=512 * 512)["image_sizes"]
        tensor([[448, 592]])
    """

    valid_kwargs = Emu35ImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    do_resize = True
    resample = PILImageResampling.BICUBIC
    image_area = 1024 * 1024
    factor = 16
    max_image_area = 8 * 1024 * 1024
    max_aspect_ratio = 50
    max_input_pixels = 89_478_485  # PIL's own threshold for a decompression bomb
    do_exif_transpose = True
    rescale_factor = None

    def __init__(self, **kwargs: Unpack[Emu35ImageProcessorKwargs]):
        super().__init__(**kwargs)
        self._check_sizes(self.image_area, self.factor, self.max_image_area)

    def preprocess(self, images: Any, **kwargs: Unpack[Emu35ImageProcessorKwargs]) -> BatchFeature:
        """Prepares images of any sizes.

        Args:
            images:
                an image or (nested) lists of images: PIL, path, `http(s)` address, bytes of a file, array or tensor
                `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels; bytes 0..255, 16-bit, or floats 0..1.
            kwargs: any argument of the class, for this call.
        Returns:
            [`BatchFeature`]: `pixel_values`, a flat list of `(3, H, W)` float32 tensors in [-1, 1], and `image_sizes`
            (`(num_images, 2)`), their heights and widths in pixels.
        Raises:
            TypeError: if something is not an image.
            ValueError: if one cannot be read, or is out of the limits; says which one and why.
        """
        return super().preprocess(images, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        image_area: int,
        factor: int,
        max_image_area: int,
        max_aspect_ratio: float,
        max_input_pixels: int,
        do_exif_transpose: bool,
        do_resize: bool = True,
        resample: int = PILImageResampling.BICUBIC,
        input_data_format: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        self._check_sizes(image_area, factor, max_image_area)
        pixel_values, sizes = [], []
        for index, image in enumerate(flatten_images(images)):
            name = f"images[{index}]"
            image = to_rgb(image, name, max_input_pixels, do_exif_transpose, input_data_format)
            width, height = image.size
            if max(height, width) > max_aspect_ratio * min(height, width):
                raise ValueError(
                    f"`{name}` has {height} x {width} pixels (height x width), more than `max_aspect_ratio`="
                    f"{max_aspect_ratio} to 1. Crop or pad it."
                )
            if do_resize:
                height, width = smart_resize(height, width, area=image_area, factor=factor)
                image = image.resize((width, height), resample)
            elif height % factor or width % factor:
                raise ValueError(
                    f"`{name}` has {height} x {width} pixels, and with `do_resize=False` both must be multiples of "
                    f"{factor}."
                )
            pixels = _PIXEL_VALUES[np.asarray(image)]  # (H, W, 3)
            pixel_values.append(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
            sizes.append([height, width])
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes).view(-1, 2)})

    def _validate_preprocess_kwargs(self, **kwargs):
        pass  # there is no `size` here; the checks are in `_check_sizes`

    @staticmethod
    def _check_sizes(image_area: int, factor: int, max_image_area: int):
        if factor < 1:
            raise ValueError(f"`factor` must be positive, got {factor}.")
        if not factor * factor <= image_area <= max_image_area:
            raise ValueError(
                f"`image_area` must lie between {factor * factor} (one code) and `max_image_area`={max_image_area}, "
                f"got {image_area}. It is a number of pixels: 1024 * 1024, for example."
            )


#: Byte -> pixel value, computed in float64 as the release does.
_PIXEL_VALUES = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


def to_rgb(
    image: Any,
    name: str = "image",
    max_input_pixels: int = Emu35ImageProcessor.max_input_pixels,
    do_exif_transpose: bool = True,
    input_data_format: str | None = None,
) -> Image.Image:
    """One image of any kind as a decoded PIL image of mode "RGB".  Alpha is dropped, as `convert("RGB")` does.

    Args:
        image: see [`Emu35ImageProcessor.preprocess`].
        name (`str`): what to call it in errors.
        input_data_format (`str`, *optional*):
            "channels_first" or "channels_last" of an array; `None`: by its shape, channels last where both fit.
    Raises:
        TypeError, ValueError: if it is no image, cannot be decoded, or has more than `max_input_pixels` pixels.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(image, name, input_data_format)
    if not is_single_image(image):
        raise TypeError(
            f"`{name}` must be a PIL image, array, tensor, path, address or the bytes of an image file, got "
            f"{type(image).__name__}."
        )
    what = f"`{name}`"
    if isinstance(image, (str, os.PathLike)):
        what += f" ({str(image)[:200]})"
    with _decoding(what):
        image = _open(image)
    # The size is in the header: a decompression bomb is refused before it is unpacked.
    if image.width * image.height > max_input_pixels:
        raise ValueError(
            f"{what} has {image.height} x {image.width} pixels (height x width), more than `max_input_pixels`="
            f"{max_input_pixels}. Make it smaller, or raise `max_input_pixels` if you trust it."
        )
    if not image.width or not image.height:
        raise ValueError(f"{what} is empty: {image.height} x {image.width} pixels (height x width).")
    with _decoding(what):
        image.load()
        if do_exif_transpose:
            image = ImageOps.exif_transpose(image)
    return _mode_to_rgb(image, name)


def _open(image: Image.Image | str | os.PathLike | bytes | bytearray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray)):
        return Image.open(io.BytesIO(image))
    address = str(image)
    if address.startswith(("http://", "https://")):
        response = httpx.get(address, timeout=60, follow_redirects=True).raise_for_status()
        return Image.open(io.BytesIO(response.content))
    if address.startswith("data:image/"):
        return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2], validate=True)))
    return Image.open(image)


@contextmanager
def _decoding(what: str):
    """Turns whatever PIL raises into a ValueError that says which image it was."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{what}: there is no such file. Check the path.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{what} cannot be fetched: {error}.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{what} is not an image file that PIL knows, or its header is damaged.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{what} is refused as a decompression bomb: {error} Make it smaller; if you trust it, raise "
            "`max_input_pixels` and PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except _DECODER_ERRORS as error:
        raise ValueError(
            f"{what} is corrupt or truncated and cannot be decoded ({type(error).__name__}: {error})."
        ) from error


def _mode_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _array_to_rgb(np.asarray(image), name, deep=True)
    if image.mode == "F":
        raise ValueError(
            f"`{name}` has floating-point pixels (mode F), whose range is unknown. Convert it to 8 bits first."
        )
    if image.mode in ("RGBa", "La"):  # premultiplied alpha converts only to its plain form
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return image.convert("RGB")


def _array_to_rgb(
    array: np.ndarray | torch.Tensor, name: str, input_data_format: str | None = None, deep: bool = False
) -> Image.Image:
    """`deep`: integers wider than a byte hold 16 bits."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in shape:
        raise ValueError(f"`{name}` must have the shape (H, W), (H, W, C) or (C, H, W), got {shape}.")
    last = array.shape[-1] in (1, 3, 4) if input_data_format is None else input_data_format == "channels_last"
    if not last and len(shape) == 3:
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"`{name}` must have 1, 3 or 4 channels, first or last; got the shape {shape}.")
    array = _to_bytes(array, name, deep)
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return Image.fromarray(np.ascontiguousarray(array[..., :3]))


def _to_bytes(array: np.ndarray, name: str, deep: bool) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"`{name}` must hold bytes, 16-bit numbers, or floats in [0, 1]; got {array.dtype}.")
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(
                f"`{name}` holds floats from {low:g} to {high:g}; floats must lie in [0, 1]. "
                "Divide by 255, or pass bytes (uint8)."
            )
        return np.rint(array * 255).astype(np.uint8)
    deep = deep or array.dtype == np.uint16
    limit = 65535 if deep else 255
    if low < 0 or high > limit:
        raise ValueError(
            f"`{name}` holds {array.dtype} values from {low} to {high}; they must lie in [0, {limit}]. "
            "Convert it to bytes (uint8) first."
        )
    return ((array.astype(np.int64) + 128) // 257 if deep else array).astype(np.uint8)


__all__ = ["Emu35ImageProcessor", "smart_resize"]
