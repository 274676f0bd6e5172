"""The world: what a scene may hold, and how one is drawn at random.

A scene is 1 to 3 objects on a 3x3 grid over a flat background. There is no jitter: an object sits at the centre of its
cell, so that a vision tokenizer with 8-pixel patches sees few distinct patches and learns the world in minutes.
"""

import itertools
from dataclasses import dataclass

import numpy as np

GRID_SIZE = 3
"""Rows and columns of cells."""
CELL_SIZE = 16
"""Side of a cell, in pixels."""
IMAGE_SIZE = GRID_SIZE * CELL_SIZE
"""Side of an image, in pixels."""
MAX_OBJECTS = 3
"""Most objects of one scene; the least is 1."""

# The nearest two of these 13 colours are 95 levels apart in RGB (an object and a background: 108), so that a colour
# read back through noise and blur has one nearest name.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 165, 60),
    "blue": (40, 80, 235),
    "yellow": (250, 220, 30),
    "orange": (250, 125, 10),
    "purple": (130, 20, 185),
    "cyan": (30, 205, 220),
    "pink": (250, 140, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (135, 135, 135),
    "brown": (105, 65, 25),
    "navy": (15, 20, 110),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
SIZES: tuple[str, ...] = ("small", "large")

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {("yellow", "circle"), ("purple", "square"), ("cyan", "triangle"), ("orange", "cross")}
)
"""The (colour, shape) pairs that training never shows: 4 of 40, no two of a colour or of a shape."""

POSITIONS: tuple[str, ...] = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""The name of each cell, in reading order."""
CELLS: tuple[tuple[int, int], ...] = tuple(itertools.product(range(GRID_SIZE), repeat=2))
"""`(row, column)` of each cell, in reading order."""

_KINDS = tuple(itertools.product(COLORS, SHAPES, SIZES))
_HELD_OUT_KINDS = tuple(kind for kind in _KINDS if kind[:2] in HELD_OUT)
_TRAINING_KINDS = tuple(kind for kind in _KINDS if kind[:2] not in HELD_OUT)


def position_name(row: int, column: int) -> str:
    """The name of a cell, e.g. `(0, 0)` is "top left" and `(1, 1)` is "center"."""
    return POSITIONS[row * GRID_SIZE + column]


def position_cell(name: str) -> tuple[int, int]:
    """`(row, column)` of a cell's name: the inverse of [`position_name`]."""
    return divmod(POSITIONS.index(name), GRID_SIZE)


@dataclass(frozen=True)
class SceneObject:
    """One object: `shape`, `color` and `size` by name, and its cell (`row` 0 is the top, `column` 0 the left).

    Raises:
        ValueError: if a name or a cell is not one of the world's.
    """

    shape: str
    color: str
    size: str
    row: int
    column: int

    def __post_init__(self):
        for name, allowed in (("shape", SHAPES), ("color", tuple(COLORS)), ("size", SIZES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("row", "column"):
            if getattr(self, name) not in range(GRID_SIZE):
                raise ValueError(f"`{name}` must be in 0..{GRID_SIZE - 1}, got {getattr(self, name)!r}.")

    @property
    def position(self) -> str:
        """The name of the object's cell."""
        return position_name(self.row, self.column)

    @property
    def held_out(self) -> bool:
        """Whether the colour and shape together are kept out of training."""
        return (self.color, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Frame:
    """Any picture of the world: objects in cells of their own over a flat `background`, perhaps none at all.

    Raises:
        TypeError: if `objects` is no tuple.
        ValueError: if the background is unknown or two objects share a cell.
    """

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self):
        if not isinstance(self.objects, tuple):
            raise TypeError(f"`objects` must be a tuple of SceneObject, got {type(self.objects).__name__}.")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"`background` must be one of {', '.join(BACKGROUNDS)}, got {self.background!r}.")
        if len({(o.row, o.column) for o in self.objects}) < len(self.objects):
            raise ValueError(f"`objects` must stand in cells of their own, got {[o.position for o in self.objects]}.")


@dataclass(frozen=True)
class Scene(Frame):
    """1 to 3 objects that language alone can tell apart: no two share colour, shape and size.

    [`sample_scene`] puts objects in reading order; two scenes compare equal only if their objects stand in the same
    order.

    Raises:
        TypeError, ValueError: as [`Frame`], and if the number of objects or their looks break the rules above.
    """

    def __post_init__(self):
        if isinstance(self.objects, tuple) and not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"`objects` must hold 1 to {MAX_OBJECTS} objects, got {len(self.objects)}.")
        super().__post_init__()
        if len({(o.color, o.shape, o.size) for o in self.objects}) < len(self.objects):
            raise ValueError("`objects` must differ in color, shape or size; two of them look the same.")

    @property
    def held_out(self) -> bool:
        """Whether any object's colour and shape together are kept out of training."""
        return any(o.held_out for o in self.objects)


def sample_scene(rng: np.random.Generator, num_objects: int | None = None, held_out: bool | None = None) -> Scene:
    """Draw a scene: looks and cells uniform without replacement, background uniform.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        num_objects (`int`, *optional*): 1 to 3; `None` draws it uniformly.
        held_out (`bool`, *optional*): `False` never shows a [`HELD_OUT`] pair (training), `True` shows at least one
            (generalisation), `None` draws from all 40 pairs.
    Raises:
        ValueError: if `num_objects` is not 1 to 3.
    """
    if num_objects is None:
        num_objects = int(rng.integers(1, MAX_OBJECTS + 1))
    if num_objects not in range(1, MAX_OBJECTS + 1):
        raise ValueError(f"`num_objects` must be 1 to {MAX_OBJECTS}, got {num_objects!r}.")
    kinds = _draw(rng, _KINDS if held_out is None or held_out else _TRAINING_KINDS, num_objects)
    if held_out and not any(kind[:2] in HELD_OUT for kind in kinds):
        # The others are not held out, so the one put in their place cannot be their double.
        kinds[int(rng.integers(num_objects))] = _draw(rng, _HELD_OUT_KINDS, 1)[0]
    cells = sorted(_draw(rng, range(GRID_SIZE**2), num_objects))
    objects = tuple(
        SceneObject(shape, color, size, *divmod(cell, GRID_SIZE))
        for (color, shape, size), cell in zip(kinds, cells, strict=True)
    )
    return Scene(objects, tuple(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))])


def _draw(rng: np.random.Generator, items, number: int) -> list:
    """`number` items without replacement, in random order."""
    return [items[i] for i in rng.choice(len(items), size=number, replace=False)]
