"""What a sentence about a scene says, and nothing more."""

from dataclasses import dataclass

from .scene import Scene, SceneObject, position_cell

RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")
ASPECTS: tuple[str, ...] = ("size", "color", "shape", "position")
"""What a sentence may say of an object."""
INVERSE: dict[str, str] = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def relation_holds(name: str, subject: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether `subject` stands in a relation to `other`; both are `(row, column)`.

    One definition everywhere: "above" is a strictly smaller row, "below" a strictly larger row, "left of" a strictly
    smaller column, "right of" a strictly larger column. The other axis does not matter: the top left is above *and*
    left of the center.

    Raises:
        ValueError: if the relation is unknown.
    """
    if name not in RELATIONS:
        raise ValueError(f"`name` must be one of {', '.join(RELATIONS)}, got {name!r}.")
    axis = 0 if name in ("above", "below") else 1
    difference = subject[axis] - other[axis]
    return difference < 0 if name in ("above", "left of") else difference > 0


@dataclass(frozen=True)
class Described:
    """One object as a sentence describes it; `None` is what the sentence leaves open.

    `position` is a cell's name, one of [`~emu35.training.shapes.POSITIONS`].
    """

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    position: str | None = None

    @property
    def cell(self) -> tuple[int, int] | None:
        """`(row, column)`, or `None` if the sentence gives no position."""
        return None if self.position is None else position_cell(self.position)


@dataclass(frozen=True)
class Relation:
    """ "`subject` is `name` `object`"; both are indices into [`Meaning.objects`], `name` is one of [`RELATIONS`]."""

    subject: int
    name: str
    object: int


@dataclass(frozen=True)
class Meaning:
    """Everything a sentence says: objects in the order of mention, relations between them, the background or `None`.

    A sentence mentions every object, so `count` is exact: "a red circle" is a picture with one object.
    """

    objects: tuple[Described, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None

    @property
    def count(self) -> int:
        """The exact number of objects the sentence asks for."""
        return len(self.objects)


def meaning_of(scene: Scene) -> Meaning:
    """The meaning that fixes everything about a scene but names no relation."""
    return Meaning(tuple(Described(o.shape, o.color, o.size, o.position) for o in scene.objects), (), scene.background)


def fits(o: SceneObject, described: Described) -> bool:
    """Whether everything the description says is true of the object."""
    return all(getattr(described, a) in (None, getattr(o, a)) for a in ASPECTS)


def looks_of(o: SceneObject) -> Described:
    """All about an object but its position."""
    return Described(o.shape, o.color, o.size)


def cell_of(o: SceneObject) -> tuple[int, int]:
    """`(row, column)`."""
    return o.row, o.column
