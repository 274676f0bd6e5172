"""Pictures with their sentences, or whole episodes, on one page, to be looked at."""

import os
import textwrap
from collections.abc import Sequence

from emu35.segments_emu35 import Segment
from PIL import Image, ImageDraw, ImageFont

from .shapes import IMAGE_SIZE, Episode, to_image

_SCALE = 4
_MARGIN = 12
_LINE = 15
_RIGHT, _WRONG, _USER = (30, 120, 60), (190, 40, 40), (60, 60, 60)

Cell = tuple[Image.Image | None, str, tuple[int, int, int]]
"""A picture (or none), the text below it, and the text's colour."""


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
    cells = [(image, text, _RIGHT if fits else _WRONG) for image, text, fits in zip(images, texts, right, strict=True)]
    columns = min(columns, len(cells))
    _draw([cells[start : start + columns] for start in range(0, len(cells), columns)], path)


def episode_sheet(
    played: Sequence[tuple[Episode, Sequence[Sequence[Segment]], dict]], path: str | os.PathLike
) -> None:
    """Writes one PNG with an episode in each line: what the user says (gray), and what was answered.

    An answer is green if all of the episode is right, else red; text stands below the picture that follows it.

    Args:
        played (`Sequence`): episode, answers (segments for each turn of the user), and what the checker marked.
        path (`str` or `os.PathLike`): of the PNG.
    """
    if not played:
        raise ValueError("`played` is empty. Give at least one episode.")
    _draw([_cells(*one) for one in played], path)


def _cells(episode: Episode, answers: Sequence[Sequence[Segment]], marks: dict) -> list[Cell]:
    color = _RIGHT if all(value in (None, True, 1.0) for value in marks.values()) else _WRONG
    cells: list[Cell] = []
    for turn, answer in zip(episode.turns[::2], answers, strict=True):
        text = " ".join(piece for piece in turn.content if isinstance(piece, str))
        frames = turn.frames or (None,)
        cells += [(frame and to_image(frame), "" if number else text, _USER) for number, frame in enumerate(frames)]
        text = ""
        for segment in answer:
            if segment.kind == "image":
                cells.append((segment.image, text, color))
                text = ""
            else:
                text = f"{text} ({segment.text})" if segment.kind.endswith("thought") else f"{text} {segment.text}"
        if text:
            cells.append((None, text, color))
    return cells


def _draw(lines: Sequence[Sequence[Cell]], path: str | os.PathLike):
    """The page: lines of cells, in each line as high as its longest text needs."""
    side = IMAGE_SIZE * _SCALE
    wrapped = [[textwrap.wrap(text, side // 7) for _, text, _ in line] for line in lines]
    heights = [side + _LINE * max(map(len, texts)) + 2 * _MARGIN for texts in wrapped]
    page = Image.new("RGB", (max(map(len, lines)) * (side + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    top = _MARGIN
    for line, texts, height in zip(lines, wrapped, heights, strict=True):
        for number, ((image, _, color), text) in enumerate(zip(line, texts, strict=True)):
            left = _MARGIN + number * (side + _MARGIN)
            if image is not None:
                size = (side, max(1, round(side * image.height / image.width)))
                page.paste(image.resize(size, Image.Resampling.NEAREST).crop((0, 0, side, side)), (left, top))
            draw.rectangle((left - 1, top - 1, left + side, top + side), outline=(200, 200, 200))
            for index, words in enumerate(text):
                draw.text((left, top + side + 4 + index * _LINE), words, fill=color, font=font)
        top += height
    page.save(path, format="PNG")
