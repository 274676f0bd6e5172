"""Uploads: files that claim to be pictures, and pictures made of nothing but their pixels.

What a file is called says nothing: only its bytes decide. Its size in pixels stands in the header, and is checked
before anything is unpacked. What comes out is a fresh picture without the file's metadata (place, camera, comments).
"""

import os
import threading
import warnings
from math import sqrt
from pathlib import Path

import PIL.Image
from emu35.image_processing_emu35 import to_rgb

from .errors import UserError
from .settings import SpaceSettings

#: Formats that are read; PIL knows many more, some of them by programs that it starts.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_MAX_RATIO = 20
#: Requests are checked when they come, by as many threads as there are requests. Only so many unpack at a time.
_DECODING = threading.BoundedSemaphore(2)
#: An upload is kept as large as the model may read it, and at least so large, to be looked at.
_SHOWN_PIXELS = 512 * 512


def read_image(path: str | os.PathLike, settings: SpaceSettings) -> PIL.Image.Image:
    """An uploaded file as a picture (mode "RGB", upright; of an animation, the first frame).

    Args:
        path: of the upload.
    Raises:
        UserError: if it is too large, damaged, or no picture.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > settings.max_upload_bytes:
            raise UserError(
                f"The file has {size / 2**20:.1f} MB, and at most {settings.max_upload_bytes / 2**20:g} are allowed. "
                "Choose a smaller one."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is below
            with PIL.Image.open(path, formats=FORMATS) as image:
                return check_image(image, settings)
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"This file is no picture that can be read. Use {_NAMES}.") from error
    except PIL.Image.DecompressionBombError as error:
        raise UserError(_too_large(settings)) from error
    except OSError as error:
        raise UserError("This file cannot be read. Please upload it again.") from error


def check_image(image: PIL.Image.Image, settings: SpaceSettings) -> PIL.Image.Image:
    """A picture, decoded and copied into a fresh one of mode "RGB", no larger than what can be used of it.

    Raises:
        UserError: if it has too many pixels, or extreme proportions, or cannot be decoded.
    """
    if not isinstance(image, PIL.Image.Image):
        raise UserError("Please upload a picture.")
    if image.width * image.height > settings.max_upload_pixels:
        raise UserError(_too_large(settings))
    if max(image.size) > _MAX_RATIO * max(1, min(image.size)):
        raise UserError(f"The picture is more than {_MAX_RATIO} times as long as wide. Crop it.")
    with _DECODING:
        try:
            decoded = to_rgb(image, "picture", settings.max_upload_pixels)
        except ValueError as error:
            raise UserError(
                "This picture is damaged and cannot be decoded. Save it anew, or use another one."
            ) from error
        scale = sqrt(max(settings.max_pixels, _SHOWN_PIXELS) / (decoded.width * decoded.height))
        if scale < 1:
            size = (max(1, int(decoded.width * scale)), max(1, int(decoded.height * scale)))
            decoded = decoded.resize(size, PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)
        clean = PIL.Image.new("RGB", decoded.size)
        clean.paste(decoded)
        return clean


def _too_large(settings: SpaceSettings) -> str:
    return (
        f"The picture has more than {settings.max_upload_pixels / 1e6:g} million pixels, which is the limit. "
        "Make it smaller."
    )


__all__ = ["FORMATS", "check_image", "read_image"]
