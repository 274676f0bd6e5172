"""Draw a scene: one cached sprite a cell, anti-aliased by averaging 8x8 points a pixel."""

from functools import cache

import numpy as np
from PIL import Image

from .scene import BACKGROUNDS, CELL_SIZE, COLORS, IMAGE_SIZE, SHAPES, SIZES, Frame

_SUPERSAMPLING = 8

# Half extents in sixteenths of a cell. Large shapes leave at least half a pixel of background around them in a
# 16-pixel cell: neighbours never touch, and the outermost pixels of the cells tell the checker the background.
_CIRCLE = {"small": 4.0, "large": 7.0}
_SQUARE = {"small": 4.0, "large": 7.0}
_TRIANGLE = {"small": (-4.5, 4.0, 5.0), "large": (-7.0, 6.0, 7.5)}  # top, bottom, half of the base
_CROSS = {"small": (5.0, 1.5), "large": (7.0, 2.0)}  # half length, half width of an arm
_RING = {"small": (5.0, 2.5), "large": (7.0, 4.0)}  # outer and inner radius: the hole must survive a blur


@cache
def template(shape: str, size: str) -> np.ndarray:
    """Coverage of each pixel of a cell by a shape: float64 `(CELL_SIZE, CELL_SIZE)` in `[0, 1]`, read-only.

    Raises:
        ValueError: if the shape or the size is unknown.
    """
    if shape not in SHAPES or size not in SIZES:
        raise ValueError(f"`shape` and `size` must be of {SHAPES} and {SIZES}, got {shape!r} and {size!r}.")
    points = CELL_SIZE * _SUPERSAMPLING
    axis = ((np.arange(points) + 0.5) / points - 0.5) * 16
    x, y = np.meshgrid(axis, axis)
    if shape == "circle":
        inside = np.hypot(x, y) <= _CIRCLE[size]
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= _SQUARE[size]
    elif shape == "triangle":
        top, bottom, half_base = _TRIANGLE[size]
        inside = (y >= top) & (y <= bottom) & (abs(x) <= half_base * (y - top) / (bottom - top))
    elif shape == "cross":
        length, width = _CROSS[size]
        inside = (np.maximum(abs(x), abs(y)) <= length) & (np.minimum(abs(x), abs(y)) <= width)
    else:
        outer, inner = _RING[size]
        inside = (np.hypot(x, y) <= outer) & (np.hypot(x, y) >= inner)
    coverage = inside.reshape(CELL_SIZE, _SUPERSAMPLING, CELL_SIZE, _SUPERSAMPLING).mean((1, 3))
    coverage.flags.writeable = False
    return coverage


@cache
def _sprite(shape: str, size: str, color: str, background: str) -> np.ndarray:
    """One cell's pixels: uint8 `(CELL_SIZE, CELL_SIZE, 3)`."""
    behind, front = (np.asarray(rgb, dtype=np.float64) for rgb in (BACKGROUNDS[background], COLORS[color]))
    return np.rint(behind + template(shape, size)[..., None] * (front - behind)).astype(np.uint8)


@cache
def _canvas(background: str) -> np.ndarray:
    """An empty image: uint8 `(IMAGE_SIZE, IMAGE_SIZE, 3)`."""
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUNDS[background], dtype=np.uint8)


def render(scene: Frame) -> np.ndarray:
    """Draw a scene or any frame; the same one always gives the same bytes.

    Returns:
        `np.ndarray` of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)`: RGB, uint8, writable and not shared.
    """
    pixels = _canvas(scene.background).copy()
    for o in scene.objects:
        top, left = o.row * CELL_SIZE, o.column * CELL_SIZE
        pixels[top : top + CELL_SIZE, left : left + CELL_SIZE] = _sprite(o.shape, o.size, o.color, scene.background)
    return pixels


def to_image(scene: Frame) -> Image.Image:
    """[`render`] as a PIL image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels."""
    return Image.fromarray(render(scene))
