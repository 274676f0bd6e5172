"""Read a scene back from pixels, without knowing the prompt.

Background: the per-channel median of the outermost pixels of all cells, which no object covers. Then, for each cell
and each of the 10 templates (shape x size, coverage `a`), the colour by least squares, `s = <a, d> / <a, a>` where `d`
is the cell minus the background, and what is left, `|d|^2 - <a, d>^2 / <a, a>`. The template that leaves least wins,
and the cell is an object if all of it bears that out:

- its colour is near the line from the background to one of the 8 colours (a blur dilutes a small object);
- what is left is small in each quarter of the cell;
- in each quarter no other template fits better, and the nearest colour is the same.

A quarter is one 8-pixel patch, the unit in which a token model goes wrong: three patches of a circle and one of a
square, or one in another colour, are no object. A cell that is neither empty nor an object is *unreadable*.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .render import template
from .scene import BACKGROUNDS, CELL_SIZE, COLORS, GRID_SIZE, IMAGE_SIZE, SHAPES, SIZES, position_name
from .scoring import score, score_scene

__all__ = ["ReadObject", "ReadScene", "read_scene", "read_scenes", "score", "score_scene"]

_NOISE_ENERGY = 340.0
"""Squared error a pixel (3 channels summed) that is taken for noise: white noise of 10.6 levels (of 255) a channel."""
_SHAPE_ERROR = 0.05
"""Share of the squared contrast between object and background that is taken for blur, averaged over a quarter."""
_GHOST = 25.0
"""An empty cell in which some template fits with a colour shift above this many levels holds a ghost of an object."""
_DILUTION = (0.7, 1.1)
"""Measured over true contrast that is accepted: a blur of 1 pixel leaves 0.76 of a small ring."""
_COLOR_TOLERANCE = 27.0
"""Furthest a measured colour may be from the diluted named one, in levels. On every background the diluted colours
stay 54 levels apart, so one name at most is that near."""
_BACKGROUND_TOLERANCE = 35.0
"""Furthest a measured background may be from a named one, in levels; the nearest two are 95 apart."""

_CHUNK = 128
"""Images read at once: 55 KB each in float64, a few copies of which should stay in the processor's cache."""

_REMEMBERED = 4096
"""What was read of so many images is kept: several rewards ask for the same ones, and groups repeat them."""
_remembered: dict[bytes, "ReadScene"] = {}

_COLOR_NAMES = tuple(COLORS)
_TEMPLATES = tuple((shape, size) for shape in SHAPES for size in SIZES)


@dataclass(frozen=True)
class ReadObject:
    """One object found in an image.

    `residual`: root mean square error a channel between the cell and the best drawing of the object, in levels of 255.
    `confidence`: 1 less the ratio of what the best and the second best template leave, in `[0, 1]`.
    """

    shape: str
    color: str
    size: str
    row: int
    column: int
    residual: float
    confidence: float

    @property
    def position(self) -> str:
        """The name of the object's cell."""
        return position_name(self.row, self.column)


@dataclass(frozen=True)
class ReadScene:
    """What an image shows: objects in reading order, background (`None`: none of the five), unreadable cells."""

    objects: tuple[ReadObject, ...]
    background: str | None
    unreadable: tuple[tuple[int, int], ...] = ()


def read_scene(pixels: np.ndarray | Image.Image) -> ReadScene:
    """Read one image: PIL, or an array of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)` as [`read_scenes`] takes."""
    if isinstance(pixels, Image.Image):
        pixels = np.asarray(pixels.convert("RGB"))
    pixels = np.asarray(pixels)
    if pixels.ndim != 3:
        raise ValueError(f"`pixels` must have shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {pixels.shape}.")
    return read_scenes(pixels[None])[0]


def read_scenes(pixels: np.ndarray) -> list[ReadScene]:
    """Read a batch of images.

    Args:
        pixels (`np.ndarray` of shape `(num_images, IMAGE_SIZE, IMAGE_SIZE, 3)`): RGB, uint8 in 0..255 or float in 0..1
            (a decoder may overshoot a little).
    Raises:
        ValueError: if the shape, the type or the range is another.
    """
    pixels = np.asarray(pixels)
    cells = _to_cells(pixels)  # (N, 9, 256, 3)
    keys = [hashlib.sha256(one.tobytes() + one.dtype.str.encode()).digest() for one in pixels]
    found = {key: _remembered.get(key) for key in keys}
    rows = {key: row for row, key in enumerate(keys) if found[key] is None}
    chosen = list(rows.values())
    for i in range(0, len(chosen), _CHUNK):
        read = _read(cells[chosen[i : i + _CHUNK]].astype(np.float64))
        found.update(zip(list(rows)[i : i + _CHUNK], read, strict=True))
    if len(_remembered) + len(rows) > _REMEMBERED:
        _remembered.clear()
    if len(rows) <= _REMEMBERED:
        _remembered.update((key, found[key]) for key in rows)
    return [found[key] for key in keys]


def _read(cells: np.ndarray) -> list[ReadScene]:
    """Reads levels in 0..255 of shape `(N, 9, CELL_SIZE ** 2, 3)`; the shapes below are for 16-pixel cells."""
    measured = np.median(cells[:, :, _border()].reshape(len(cells), -1, 3), axis=1)  # (N, 3)
    distance = np.sqrt(((measured[:, None] - _palette(BACKGROUNDS)) ** 2).sum(2))  # (N, 5)
    grounds = [
        name if near <= _BACKGROUND_TOLERANCE else None
        for name, near in zip(np.array(list(BACKGROUNDS))[distance.argmin(1)].tolist(), distance.min(1), strict=True)
    ]
    difference = cells - measured[:, None, None]  # (N, 9, 256, 3)
    energy = (difference**2).sum(3)  # (N, 9, 256)
    basis = _basis()  # (10, 256)
    norms = (basis**2).sum(1)  # (10,)
    shifts = np.einsum("ncpk,tp->nctk", difference, basis, optimize=True) / norms[:, None]  # (N, 9, 10, 3)
    left = np.maximum(energy.sum(2)[..., None] - (shifts**2).sum(3) * norms, 0)  # (N, 9, 10)
    best = left.argmin(2)  # (N, 9)
    shift = np.take_along_axis(shifts, best[..., None, None], axis=2)[:, :, 0]  # (N, 9, 3)
    color, color_distance, dilution = _nearest_color(shift, measured[:, None])

    empty = (_quarters(energy).sum(3).max(2) <= _NOISE_ENERGY * (CELL_SIZE // 2) ** 2) & (
        (shifts**2).sum(3).max(2) <= _GHOST**2
    )
    drawn = ~empty & (color < len(COLORS)) & (color_distance <= _COLOR_TOLERANCE)
    drawn &= (dilution >= _DILUTION[0]) & (dilution <= _DILUTION[1])
    drawn &= _quarters_agree(difference, energy, best, shift, color, measured)

    two = np.sort(left, axis=2)[..., :2]
    confidence = 1 - two[..., 0] / np.maximum(two[..., 1], 1e-9)
    residual = np.sqrt(two[..., 0] / (3 * CELL_SIZE**2))
    scenes = []
    for n, ground in enumerate(grounds):
        objects = tuple(
            ReadObject(
                shape=_TEMPLATES[best[n, c]][0],
                color=_COLOR_NAMES[color[n, c]],
                size=_TEMPLATES[best[n, c]][1],
                row=int(c) // GRID_SIZE,
                column=int(c) % GRID_SIZE,
                residual=float(residual[n, c]),
                confidence=float(confidence[n, c]),
            )
            for c in np.flatnonzero(drawn[n])
        )
        unreadable = tuple(divmod(int(c), GRID_SIZE) for c in np.flatnonzero(~drawn[n] & ~empty[n]))
        scenes.append(ReadScene(objects, ground, unreadable))
    return scenes


def _quarters_agree(difference, energy, best, shift, color, measured) -> np.ndarray:
    """Whether each quarter of a cell shows the cell's template in the cell's colour: bool `(N, 9)`."""
    basis = _quarters(_basis()[None])[0]  # (10, 4, 64)
    norms = (basis**2).sum(2).T  # (4, 10)
    contrast = (shift**2).sum(2)  # (N, 9)
    # |d - a s|^2 = |d|^2 - 2 <a, d.s> + |a|^2 |s|^2 in each quarter, for every template `a` in the cell's own colour.
    along = _quarters((difference * shift[:, :, None]).sum(3))  # (N, 9, 4, 64)
    error = (
        _quarters(energy).sum(3)[..., None]
        - 2 * np.einsum("ncqp,tqp->ncqt", along, basis, optimize=True)
        + norms * contrast[..., None, None]
    )  # (N, 9, 4, 10)
    chosen = np.take_along_axis(error, best[..., None, None], axis=3)[..., 0]  # (N, 9, 4)
    allowed = (_NOISE_ENERGY + _SHAPE_ERROR * contrast) * (CELL_SIZE // 2) ** 2
    agree = (chosen <= allowed[..., None]) & (chosen <= error.min(3) + 1e-6 * allowed[..., None])

    own = basis[best]  # (N, 9, 4, 64)
    parts = np.stack([(own * _quarters(difference[..., k])).sum(3) for k in range(3)], axis=3)
    parts /= (own**2).sum(3)[..., None]  # (N, 9, 4, 3): every template covers some of every quarter
    agree &= _nearest_color(parts, measured[:, None, None])[0] == color[..., None]
    return agree.all(2)


def _nearest_color(shift: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The named colour whose diluted contrast with the background is nearest to a measured shift.

    Args:
        shift (`np.ndarray` of shape `(..., 3)`): measured colour minus background.
        background (`np.ndarray` of shape broadcastable to `(..., 3)`): measured background.
    Returns:
        Index into the object colours followed by the backgrounds, distance in levels, and measured over true contrast
        with that colour (not held to the range of `_DILUTION`): arrays of shape `(...)`.
    """
    contrast = _palette(COLORS | BACKGROUNDS) - background[..., None, :]  # (..., 13, 3)
    norms = np.maximum((contrast**2).sum(-1), 1e-9)
    ratio = (shift[..., None, :] * contrast).sum(-1) / norms
    nearest_point = np.clip(ratio, *_DILUTION)[..., None] * contrast
    distance = np.sqrt(((shift[..., None, :] - nearest_point) ** 2).sum(-1))
    index = distance.argmin(-1)
    return index, distance.min(-1), np.take_along_axis(ratio, index[..., None], axis=-1)[..., 0]


def _to_cells(pixels: np.ndarray) -> np.ndarray:
    """Levels in 0..255 of shape `(N, cells, pixels of a cell, 3)`; see [`read_scenes`] for what is refused."""
    if pixels.ndim != 4 or pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"`pixels` must have shape (num_images, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {pixels.shape}.")
    if pixels.dtype == np.uint8:
        levels = pixels
    elif np.issubdtype(pixels.dtype, np.floating):
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 1.0)
        if not (low >= -0.5 and high <= 1.5):
            raise ValueError(
                f"`pixels` of a float type must lie in 0..1, got {low:.3g}..{high:.3g}. "
                "Divide 0..255 by 255; map -1..1 by (x + 1) / 2."
            )
        levels = np.clip(pixels, 0, 1) * 255
    else:
        raise ValueError(f"`pixels` must be uint8 or a float type, got {pixels.dtype}.")
    cells = levels.reshape(-1, GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(-1, GRID_SIZE**2, CELL_SIZE**2, 3)


@cache
def _basis() -> np.ndarray:
    """All templates, float64 `(10, CELL_SIZE ** 2)`."""
    return np.stack([template(shape, size).ravel() for shape, size in _TEMPLATES])


@cache
def _border() -> np.ndarray:
    """Indices of a cell's outermost pixels."""
    inside = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
    inside[1:-1, 1:-1] = True
    return np.flatnonzero(~inside.ravel())


def _palette(colors: dict[str, tuple[int, int, int]]) -> np.ndarray:
    return np.asarray(list(colors.values()), dtype=np.float64)


def _quarters(values: np.ndarray) -> np.ndarray:
    """Splits a cell's pixels into its quarters: `(N, M, CELL_SIZE ** 2)` to `(N, M, 4, CELL_SIZE ** 2 / 4)`."""
    half = CELL_SIZE // 2
    split = values.reshape(*values.shape[:2], 2, half, 2, half).swapaxes(3, 4)
    return split.reshape(*values.shape[:2], 4, half * half)
