"""Pictures with their sentences on one page, to be looked at."""

import os
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_SCALE = 4
_MARGIN = 12
_LINE = 15
_RIGHT, _WRONG = (30, 120, 60), (190, 40, 40)


def contact_sheet(
    images: Sequence[Image.Image | None],
    texts: Sequence[str],
    right: Sequence[bool],
    path: str | os.PathLike,
    columns: int = 6,
) -> None:
    """Writes one PNG with every image, enlarged, above its sentence; sentences the image is not true of are red.

    Args:
        images (`Sequence`): of one size; `None` leaves the place empty.
        texts (`Sequence[str]`), right (`Sequence[bool]`): one for each image.
        path (`str` or `os.PathLike`): of the PNG.
        columns (`int`): images in a row.
    """
    if not len(images) == len(texts) == len(right) or not images:
        raise ValueError(
            f"`images`, `texts` and `right` must be of one length and not empty, got {len(images)}, {len(texts)} and "
            f"{len(right)}."
        )
    width, height = next((image.size for image in images if image is not None), (48, 48))
    width, height = width * _SCALE, height * _SCALE
    wrapped = [textwrap.wrap(text, width // 7) for text in texts]
    text_height = _LINE * max(map(len, wrapped))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = (width + _MARGIN, height + text_height + 2 * _MARGIN)
    page = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), (255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for index, (image, lines, fits) in enumerate(zip(images, wrapped, right, strict=True)):
        x, y = _MARGIN + index % columns * cell[0], _MARGIN + index // columns * cell[1]
        if image is not None:
            page.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=(200, 200, 200))
        for number, line in enumerate(lines):
            draw.text((x, y + height + 4 + number * _LINE), line, fill=_RIGHT if fits else _WRONG, font=font)
    page.save(path, format="PNG")
