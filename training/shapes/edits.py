"""Edits: one instruction, one to three pictures, and what must change and what must stay.

Every instruction names its object by words that fit that object alone, and its result is a [`Scene`] again. What an
instruction does not name must stay as it was in the first picture: [`check_edit`] marks both from pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .checker import ReadScene, read_scenes
from .episode import Episode, Said, Turn, up_to
from .meaning import cell_of, looks_of
from .questions import refer
from .scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Frame,
    Scene,
    SceneObject,
    position_name,
    sample_scene,
)
from .words import PLACES, choose, noun_phrase, with_article

EDIT_KINDS: tuple[str, ...] = (
    "recolor",
    "move",
    "resize",
    "add",
    "remove",
    "replace",
    "background",
    "transfer",
)
"""What an instruction may ask for. "transfer" puts objects of a second (and a third) picture into the first."""
TRANSFER_DIFFICULTY = 0.5
"""Difficulty from which [`sample_edit`] draws "transfer"."""

ORDINALS: tuple[str, ...] = ("first", "second", "third")
"""What the pictures of a prompt are called, in order."""

_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class EditMeaning:
    """What an instruction names, as changes of the first picture.

    Attributes:
        sources (`tuple[Frame, ...]`): the pictures of the prompt; the first is edited.
        removed (`tuple[tuple[int, int], ...]`): `(row, column)` of the cells that must be empty.
        placed (`tuple[SceneObject, ...]`): what must stand in its cell, changed or new.
        background (`str`, *optional*): the new background; `None` keeps the old one.
    """

    sources: tuple[Frame, ...]
    removed: tuple[tuple[int, int], ...] = ()
    placed: tuple[SceneObject, ...] = ()
    background: str | None = None

    @property
    def named(self) -> frozenset[tuple[int, int]]:
        """The cells that the instruction may change."""
        return frozenset((*self.removed, *map(cell_of, self.placed)))


def sample_edit(
    rng: np.random.Generator, held_out: bool | None = False, difficulty: float = 1.0, kind: str | None = None
) -> Episode:
    """Draw an edit: task "x2i", kind one of [`EDIT_KINDS`], one turn of the user and one picture for an answer.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): `False` shows no held-out pair in any picture, result included; `True` shows at
            least one in some picture; `None` draws from all pairs.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; bounds the number of objects of a picture (a removal
            has two at least). Below [`TRANSFER_DIFFICULTY`] no "transfer" is drawn.
        kind (`str`, *optional*): one of [`EDIT_KINDS`], at any difficulty; `None` draws it uniformly.
    Raises:
        ValueError: if the difficulty or the kind is another.
    """
    most = up_to(difficulty, 1, MAX_OBJECTS)
    if kind is None:
        kind = choose(rng, EDIT_KINDS if difficulty >= TRANSFER_DIFFICULTY else _ONE_SOURCE)
    if kind not in EDIT_KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(EDIT_KINDS)}, got {kind!r}.")
    while True:
        sources = _sample_sources(rng, kind, most, False if held_out is False else None)
        instruction, meaning = _propose(rng, kind, sources)
        result = apply_edit(meaning)
        if result is not None and held_out in (None, any(scene.held_out for scene in (*sources, result))):
            turns = Turn("user", (*sources, instruction)), Turn("assistant", (result,))
            return Episode("x2i", kind, turns, meaning)


def sample_instruction(
    rng: np.random.Generator, scene: Scene, held_out: bool | None = False, kind: str | None = None
) -> tuple[str, str, EditMeaning, Scene]:
    """Draw an edit of a given picture.

    Args:
        held_out (`bool`, *optional*): `False` brings in no held-out pair; otherwise any pair may come in.
        kind (`str`, *optional*): one of [`EDIT_KINDS`] but "transfer"; `None` draws it.
    Returns:
        The kind, the instruction, its meaning and the edited picture.
    Raises:
        ValueError: if the kind is another, or the picture does not allow it (has too many or too few objects).
    """
    allowed = [k for k in _ONE_SOURCE if k not in _impossible(scene)]
    if kind is not None and kind not in allowed:
        raise ValueError(f"`kind` must be one of {', '.join(allowed)} for this picture, got {kind!r}.")
    while True:
        drawn = choose(rng, allowed) if kind is None else kind
        instruction, meaning = _propose(rng, drawn, (scene,))
        result = apply_edit(meaning)
        if result is not None and not (held_out is False and any(o.held_out for o in meaning.placed)):
            return drawn, instruction, meaning, result


def apply_edit(meaning: EditMeaning) -> Scene | None:
    """The first picture after the changes, objects in reading order; `None` if it is no scene or nothing changes."""
    source = meaning.sources[0]
    kept = (o for o in source.objects if cell_of(o) not in meaning.named)
    objects = tuple(sorted((*kept, *meaning.placed), key=cell_of))
    if not 1 <= len(objects) <= MAX_OBJECTS or len(set(map(looks_of, objects))) < len(objects):
        return None
    background = meaning.background or source.background
    changed = background != source.background or set(objects) != set(source.objects)
    return Scene(objects, background) if changed else None


def without_preposition(place: str) -> str:
    """ "in the top left" as the end of a move: "the top left"."""
    return place.split(" ", 1)[1]


def check_edit(meaning: EditMeaning, answers: Sequence[Sequence[Said]]) -> dict[str, bool | float | None]:
    """Mark an answer from its pixels.

    The answer must hold exactly one picture; texts and thoughts beside it do not count.

    Args:
        meaning (`EditMeaning`): of the prompt.
        answers: pieces of each turn of the assistant.
    Returns:
        `dict`: as [`score_edit`]; all false and 0.0 if there is no picture, a damaged one or more than one.
    """
    pictures = [piece for said in answers for piece in said if piece is None or isinstance(piece, np.ndarray)]
    if len(pictures) != 1 or pictures[0] is None:
        return {"edit": False, "preservation": 0.0, "preserved": False, "whole_scene": False}
    return score_edit(meaning, read_scenes(pictures[0][None])[0])


def score_edit(meaning: EditMeaning, read: ReadScene) -> dict[str, bool | float | None]:
    """What came true of an edit in a picture that was read.

    An unreadable cell is neither empty nor an object. The background counts as kept only where more than half of the
    cells can be read, and a picture whose background is none of the world's keeps nothing: noise keeps nothing.

    Returns:
        `dict`: `edit` (all that the instruction names is so), `preservation` (share in `[0, 1]` of what it does not
            name: each other object, the other empty cells together, the background if it is not named), `preserved`
            (all of that) and `whole_scene` (both).
    """
    source, named = meaning.sources[0], meaning.named
    seen = {cell_of(o): looks_of(o) for o in read.objects} | dict.fromkeys(read.unreadable, _UNREADABLE)
    edit = (
        not any(cell in seen for cell in meaning.removed)
        and all(seen.get(cell_of(o)) == looks_of(o) for o in meaning.placed)
        and meaning.background in (None, read.background)
    )
    empty = set(CELLS) - named - set(map(cell_of, source.objects))
    kept = [seen.get(cell_of(o)) == looks_of(o) for o in source.objects if cell_of(o) not in named]
    kept.append(empty.isdisjoint(seen))
    if meaning.background is None:
        kept.append(read.background == source.background and 2 * len(read.unreadable) < len(CELLS))
    preservation = 0.0 if read.background is None else sum(kept) / len(kept)
    preserved = preservation == 1
    return {"edit": edit, "preservation": preservation, "preserved": preserved, "whole_scene": edit and preserved}


def _sample_sources(rng: np.random.Generator, kind: str, most: int, held_out: bool | None) -> tuple[Scene, ...]:
    """The pictures of a prompt, with as many objects as the kind can work on."""
    extra = 0 if kind != "transfer" else 1 + int(rng.random() < 1 / 3)
    fewest, room = (2 if kind == "remove" else 1), MAX_OBJECTS - (1 if kind == "add" else extra)
    number = int(rng.integers(fewest, max(fewest, min(most, room)) + 1))
    numbers = (number, *rng.integers(1, most + 1, size=extra).tolist())
    return tuple(sample_scene(rng, number, held_out) for number in numbers)


def _impossible(scene: Scene) -> set[str]:
    """The kinds that no choice of object makes possible."""
    kinds = set()
    if len(scene.objects) == 1:
        kinds.add("remove")
    if len(scene.objects) == MAX_OBJECTS:
        kinds.add("add")
    looks = {looks_of(o) for o in scene.objects}
    if all(looks_of(_resized(o)) in looks for o in scene.objects):
        kinds.add("resize")
    return kinds


def _propose(rng: np.random.Generator, kind: str, sources: tuple[Scene, ...]) -> tuple[str, EditMeaning]:
    """An instruction drawn blindly: its result may be no scene, or the source itself."""
    if kind == "transfer":
        return _transfer(sources, rng)
    return _PROPOSE[kind](sources[0], rng)


def _recolor(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    target = choose(rng, scene.objects)
    color = choose(rng, [c for c in COLORS if c != target.color])
    wording = choose(rng, ("change the color of {} to {}.", "make {} {}."))
    return wording.format(refer(scene, target, rng), color), _placed(scene, replace(target, color=color))


def _resize(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    target = choose(rng, scene.objects)
    resized = _resized(target)
    wording = choose(rng, ("change the size of {} to {}.", "make {} {}."))
    return wording.format(refer(scene, target, rng), resized.size), _placed(scene, resized)


def _move(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    target, (row, column) = choose(rng, scene.objects), choose(rng, _free(scene))
    place = without_preposition(choose(rng, PLACES[position_name(row, column)]))
    meaning = EditMeaning((scene,), removed=(cell_of(target),), placed=(replace(target, row=row, column=column),))
    return f"move {refer(scene, target, rng)} to {place}.", meaning


def _add(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    new = _any_object(rng, choose(rng, _free(scene)))
    text = f"add {with_article(noun_phrase(looks_of(new)))} {choose(rng, PLACES[new.position])}."
    return text, _placed(scene, new)


def _remove(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    target = choose(rng, scene.objects)
    return f"remove {refer(scene, target, rng)}.", EditMeaning((scene,), removed=(cell_of(target),))


def _replace(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    target = choose(rng, scene.objects)
    new = _any_object(rng, cell_of(target))
    text = f"replace {refer(scene, target, rng)} with {with_article(noun_phrase(looks_of(new)))}."
    return text, _placed(scene, new)


def _background(scene: Scene, rng: np.random.Generator) -> tuple[str, EditMeaning]:
    name = choose(rng, [b for b in BACKGROUNDS if b != scene.background])
    wording = choose(rng, ("change the background to {}.", "make the background {}."))
    return wording.format(name), EditMeaning((scene,), background=name)


def _transfer(sources: tuple[Scene, ...], rng: np.random.Generator) -> tuple[str, EditMeaning]:
    """Positions in the other pictures are left unsaid: two places in one phrase would be hard to tell apart."""
    first, *others = sources
    free = _free(first)
    phrases, placed = [], []
    for ordinal, other in zip(ORDINALS[1:], others, strict=False):
        target = choose(rng, other.objects)
        row, column = free.pop(int(rng.integers(len(free))))
        place = choose(rng, PLACES[position_name(row, column)])
        phrases.append(f"{refer(other, target, rng, 'position')} of the {ordinal} image {place}")
        placed.append(replace(target, row=row, column=column))
    return f"add {' and '.join(phrases)}.", EditMeaning(sources, placed=tuple(placed))


_PROPOSE = {
    "recolor": _recolor,
    "move": _move,
    "resize": _resize,
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "background": _background,
}
_ONE_SOURCE = tuple(_PROPOSE)


def _placed(scene: Scene, o: SceneObject) -> EditMeaning:
    return EditMeaning((scene,), placed=(o,))


def _resized(o: SceneObject) -> SceneObject:
    return replace(o, size=next(size for size in SIZES if size != o.size))


def _any_object(rng: np.random.Generator, cell: tuple[int, int]) -> SceneObject:
    return SceneObject(choose(rng, SHAPES), choose(rng, tuple(COLORS)), choose(rng, SIZES), *cell)


def _free(scene: Scene) -> list[tuple[int, int]]:
    """The empty cells, in reading order."""
    taken = set(map(cell_of, scene.objects))
    return [cell for cell in CELLS if cell not in taken]
