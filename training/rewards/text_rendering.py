"""Text in pictures: whether it is the text that was asked for, and whether it stands where it should."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .base import Sample, SampleReward, import_extra

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as parts of the width and the height of the picture: in [0, 1]."""


@dataclass(frozen=True)
class TextLine:
    """A line of text in a picture."""

    text: str
    box: Box


Reader = Callable[[Image.Image], list[TextLine]]
"""Finds the lines of a picture, in reading order."""


class RapidOCRReader:
    """Reads by `rapidocr` (Apache 2.0); its PP-OCR models (Apache 2.0) come inside the wheel and need no internet.

    Those read Chinese, English and other languages in Latin letters. For others, name a model that rapidocr knows in
    `params`; it is downloaded at first use.

    Args:
        params (`dict`, *optional*): of `rapidocr.RapidOCR`, such as `{"Rec.lang_type": LangRec.CYRILLIC}`.
    """

    def __init__(self, params: dict[str, Any] | None = None):
        self.params = params
        self._engine: Any = None

    def load(self) -> None:
        """Raises an ImportError if `rapidocr` or `onnxruntime` is not installed."""
        if self._engine is None:
            import_extra("onnxruntime", "Reading text in images")
            rapidocr = import_extra("rapidocr", "Reading text in images")
            self._engine = rapidocr.RapidOCR(params={"Global.log_level": "error", **(self.params or {})})

    def __call__(self, image: Image.Image) -> list[TextLine]:
        self.load()
        found = self._engine(np.asarray(image.convert("RGB"))[..., ::-1])  # it expects OpenCV's BGR
        if found.txts is None:
            return []
        corners = np.asarray(found.boxes, dtype=np.float64) / (image.width, image.height)  # (lines, 4, 2)
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1).clip(0, 1).tolist()
        return [TextLine(text, tuple(box)) for text, box in zip(found.txts, boxes, strict=True)]


class TextFidelity(SampleReward):
    r"""Whether a picture shows a text, letter by letter.  Source: 1 - NED, the measure of ICDAR's reading challenges.

    $$ r = 1 - \frac{\mathrm{lev}(a, b)}{\max(|a|, |b|)} $$

    for the wanted text a and all text b that is read in the images, both without white space and in NFKC and, unless
    `case` is true, in small letters; lev is the number of letters to insert, delete or change. Text that was not asked
    for counts against a picture.

    Range: [0, 1].

    Example:
        >>> TextFidelity()(["a sign"], [""], images=[[sign]], ocr_text=["open"])  # the sign says "opan"
        [0.75]

    Args:
        column (`str`, *optional*): the wanted text, or the list of its lines. `None`: what stands in double quotes in
            the prompt; a prompt without any has no reward.
        reader (`Reader`, *optional*): default: [`RapidOCRReader`].
        case (`bool`): whether capitals matter.
    """

    name = "ocr"

    def __init__(self, column: str | None = "ocr_text", reader: Reader | None = None, case: bool = False):
        self.column, self.reader, self.case = column, reader or RapidOCRReader(), case
        self.needs = ("images",) if column is None else ("images", column)

    def load(self) -> None:
        _load(self.reader)

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float | None:
        if self.column is None:
            wanted = [text for pair in re.findall(r'"([^"]+)"|“([^”]+)”', sample.prompt) for text in pair]
            if not wanted:
                return None
        else:
            wanted = sample.columns[self.column]
        wanted = self._letters(wanted if isinstance(wanted, str) else "".join(wanted))
        found = self._letters("".join(line.text for image in sample.images for line in self.reader(image)))
        longest = max(len(wanted), len(found))
        return 1 - edit_distance(wanted, found) / longest if longest else 1.0

    def _letters(self, text: str) -> str:
        text = "".join(unicodedata.normalize("NFKC", text).split())
        return text if self.case else text.casefold()


class TextLayout(SampleReward):
    r"""Whether lines of text stand where they should.

    $$ r = \frac{\sum_{(i, j)} \mathrm{IoU}(a_i, b_j)}{\max(|a|, |b|)} $$

    for the wanted lines a and the lines b found in the first image, over pairs that are formed greedily, the largest
    overlap first, as in detection benchmarks. Only lines whose texts are alike (1 - NED above one half) form pairs;
    a wanted line without text goes with any. Lines too many lower the mean. 0 without an image. Readers draw boxes
    wider than the letters, so that 1 is rare.

    Range: [0, 1].

    Example:
        >>> wanted = [{"text": "open", "box": [0.1, 0.1, 0.5, 0.3]}]
        >>> TextLayout()(["a sign"], [""], images=[[sign]], text_boxes=[wanted])  # found at [0.1, 0.1, 0.5, 0.4]
        [0.667]

    Args:
        column (`str`): the wanted lines, each a `dict` with `box` (see [`Box`]) and perhaps `text`.
        reader (`Reader`, *optional*): default: [`RapidOCRReader`].
    """

    name = "text_layout"

    def __init__(self, column: str = "text_boxes", reader: Reader | None = None):
        self.column, self.reader = column, reader or RapidOCRReader()
        self.needs = ("images", column)

    def load(self) -> None:
        _load(self.reader)

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float | None:
        wanted = [TextLine(line.get("text") or "", _checked_box(line["box"])) for line in sample.columns[self.column]]
        if not sample.images:
            return 0.0
        found = self.reader(sample.images[0])
        pairs = [
            (intersection_over_union(one.box, other.box), i, j)
            for i, one in enumerate(wanted)
            for j, other in enumerate(found)
            if _alike(one.text, other.text)
        ]
        total, used_wanted, used_found = 0.0, set(), set()
        for overlap, i, j in sorted(pairs, key=lambda pair: -pair[0]):
            if i not in used_wanted and j not in used_found:
                total += overlap
                used_wanted.add(i)
                used_found.add(j)
        most = max(len(wanted), len(found))
        return total / most if most else 1.0


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Levenshtein's distance: how many items must be inserted, deleted or changed to make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, item in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
    return row[-1]


def intersection_over_union(a: Box, b: Box) -> float:
    """Area that two boxes share, as a part of the area that they cover together."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _checked_box(box: Sequence[float]) -> Box:
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"`box` must be left, top, right, bottom as parts of the picture, in [0, 1], got {list(box)}. Divide "
            "pixels by its width and height."
        )
    return left, top, right, bottom


def _alike(wanted: str, found: str) -> bool:
    if not wanted:
        return True
    wanted, found = ("".join(text.split()).casefold() for text in (wanted, found))
    return 2 * edit_distance(wanted, found) < max(len(wanted), len(found))


def _load(reader: Reader) -> None:
    if hasattr(reader, "load"):
        reader.load()
