"""How-tos: a goal is built step by step, one instruction and one picture a step, each step touching one object.

    instruction = "step" NUMBER ":" deed "."
    deed        = "put a" SIZE COLOUR SHAPE PLACE | "remove" thing | "move" thing "to the" POSITION
                | "paint" thing COLOUR
    thing       = "the" [SIZE] [COLOUR] SHAPE [PLACE]

A step is legal in a picture if its thing fits exactly one object there, it puts or moves into an empty cell, and it
paints in another colour. Sizes and shapes are never changed: such an object is removed and another one is put.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from .checker import ReadScene
from .episode import Episode, GlobalThought, Said, Turn, read_told, up_to
from .language import brief_text, describe_text
from .meaning import Described, cell_of, fits, looks_of
from .scene import (
    CELLS,
    COLORS,
    HELD_OUT,
    MAX_OBJECTS,
    POSITIONS,
    SHAPES,
    SIZES,
    Frame,
    Scene,
    SceneObject,
    position_cell,
    position_name,
    sample_scene,
)
from .story import POSITION_OF, THING, read_thing
from .words import NUMBER_WORDS, PLACES, choose, noun_phrase

MAX_STEPS = 4
"""Most steps of a sampled how-to, least necessary."""
SPARE_STEPS = 2
"""Steps that a plan may take beyond the least necessary."""

_NUMBERS = NUMBER_WORDS[1:]


@dataclass(frozen=True)
class HowtoMeaning:
    """What a prompt says: the goal, and where to begin (an empty canvas, or the picture of the prompt)."""

    start: Frame
    goal: Frame


@dataclass(frozen=True)
class Step:
    """One deed.

    Attributes:
        verb (`str`): "put", "remove", "move" or "paint".
        thing (`Described`): what is put, with its position, or which object it is done to.
        target (`str`, *optional*): the position it is moved to, or the colour it is painted in.
    """

    verb: str
    thing: Described
    target: str | None = None


def sample_howto(rng: np.random.Generator, held_out: bool | None = False, difficulty: float = 1.0) -> Episode:
    """Draw a how-to: task "howto", kind "from_nothing_1" to "from_nothing_3" or "from_image_1" to "from_image_4".

    The number in the kind is that of the least necessary steps. The right answer opens with a thought: what
    the picture of the prompt shows, and the plan.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): as in [`sample_scene`], of the goal; `False` shows no held-out pair on the way.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; bounds the number of steps.
    Raises:
        ValueError: if the difficulty is another.
    """
    most = up_to(difficulty, 1, MAX_STEPS)
    if rng.random() < 0.5:
        kind, goal = "from_nothing", sample_scene(rng, int(rng.integers(1, min(most, MAX_OBJECTS) + 1)), held_out)
        start = Frame((), goal.background)
    else:
        kind, (start, goal) = "from_image", _sample_repair(rng, held_out, most)
    meaning = HowtoMeaning(start, Frame(goal.objects, goal.background))
    steps = shortest_plan(start, meaning.goal)
    seen = "" if kind == "from_nothing" else f"{brief_text(start.objects)}. "
    content: list = [GlobalThought(seen + _summary(steps))]
    frame = start
    for number, step in enumerate(steps, 1):
        frame = apply_step(step, frame)
        content += [instruct(number, step), frame]
    request = f"how do i build: {describe_text(goal)}?"
    asked = (request,) if kind == "from_nothing" else (request, start)
    return Episode("howto", f"{kind}_{len(steps)}", (Turn("user", asked), Turn("assistant", tuple(content))), meaning)


def instruct(number: int, step: Step) -> str:
    """The instruction: `parse_step(instruct(number, step)) == (number, step)`. `number` is 1 to 9."""
    thing = noun_phrase(step.thing)
    if step.thing.position is not None:
        thing += f" {PLACES[step.thing.position][0]}"
    target = {"move": f" to the {step.target}", "paint": f" {step.target}"}.get(step.verb, "")
    article = "a" if step.verb == "put" else "the"
    return f"step {_NUMBERS[number - 1]}: {step.verb} {article} {thing}{target}."


def parse_step(text: str) -> tuple[int, Step]:
    """The number and the deed of one instruction of the grammar above, nothing else.

    Raises:
        ValueError: if the text is another.
    """
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise ValueError(f'Cannot read {text!r}. Write like "step one: put a small red circle in the center."')
    verb = next(verb for verb in ("put", "remove", "move", "paint") if match[verb])
    place = match["cell"] or match["place"]
    thing = replace(read_thing(match["new"] or match["thing"]), position=place and POSITION_OF[place])
    return _NUMBERS.index(match["number"]) + 1, Step(verb, thing, match["position"] or match["color"])


def apply_step(step: Step, frame: Frame) -> Frame | None:
    """The frame after a step, objects in reading order; `None` if the step is not legal in the frame."""
    free = set(CELLS) - set(map(cell_of, frame.objects))
    if step.verb == "put":
        o = SceneObject(step.thing.shape, step.thing.color, step.thing.size, *step.thing.cell)
        return _sorted((*frame.objects, o), frame) if cell_of(o) in free else None
    found = [o for o in frame.objects if fits(o, step.thing)]
    if len(found) != 1:
        return None
    kept = [o for o in frame.objects if o is not found[0]]
    if step.verb == "remove":
        return _sorted(kept, frame)
    if step.verb == "move":
        row, column = position_cell(step.target)
        return _sorted((*kept, replace(found[0], row=row, column=column)), frame) if (row, column) in free else None
    return _sorted((*kept, replace(found[0], color=step.target)), frame) if step.target != found[0].color else None


def check_howto(meaning: HowtoMeaning, answers: Sequence[Sequence[Said]]) -> dict[str, float | bool]:
    """Mark a plan from its instructions and pixels; any legal plan will do.

    A step is an instruction and the picture after it; text after the last picture is a step without a picture.

    Args:
        meaning (`HowtoMeaning`): of the prompt.
        answers: pieces of each turn of the assistant.
    Returns:
        `dict`: `legal`, the steps that can be read, have their right number, are legal in the picture before as its
            pixels show it and whose own picture shows their result exactly, as a share of the steps found or of the
            least necessary ones if those are more; `goal` (the last picture is the goal); `plan` (all steps legal,
            goal reached, at most [`SPARE_STEPS`] more than necessary).
    """
    told, rest = read_told(answers)
    steps = [(text, _whole_frame(seen)) for text, seen in told]
    goal = bool(steps) and steps[-1][1] == meaning.goal
    if rest:
        steps.append((rest, None))
    legal, before = 0, meaning.start
    for number, (text, seen) in enumerate(steps, 1):
        legal += seen is not None and before is not None and _result(number, text, before) == seen
        before = seen
    least = len(shortest_plan(meaning.start, meaning.goal))
    plan = goal and legal == len(steps) <= least + SPARE_STEPS
    return {"legal": legal / max(len(steps), least), "goal": goal, "plan": plan}


def shortest_plan(start: Frame, goal: Frame) -> list[Step]:
    """The canonical plan with the least necessary steps.

    Each object of the goal is one of the start (where it stands, painted or moved there) or a new one; of all such
    assignments the one with the fewest steps, then the fewest paints, then the first is taken. What has no place in
    the goal is removed, then objects are painted, moved and put, each in reading order as far as cells are free.
    Painting *and* moving one object takes as many steps as a new one, which can never be in the way.

    Raises:
        ValueError: if the backgrounds differ, which no step can change.
    """
    if start.background != goal.background:
        raise ValueError(f"`start` and `goal` must share a background, got {start.background} and {goal.background}.")
    sources = min(_assignments(goal.objects, start.objects), key=lambda sources: _cost(start, goal, sources))
    pairs = [(o, to) for o, to in zip(sources, goal.objects, strict=True) if o is not None]
    steps, frame = [], start

    def take(verb: str, thing: Described, target: str | None = None):
        nonlocal frame
        steps.append(Step(verb, thing, target))
        frame = apply_step(steps[-1], frame)

    for o in start.objects:
        if o not in sources:
            take("remove", _name(o, frame))
    for o, to in pairs:
        if o.color != to.color:
            take("paint", _name(o, frame), to.color)
    moves = [(o, to) for o, to in pairs if cell_of(o) != cell_of(to)]
    while moves:
        taken = set(map(cell_of, frame.objects))
        index = next((i for i, (_, to) in enumerate(moves) if cell_of(to) not in taken), None)
        if index is None:  # a ring of objects that stand in each other's way: one of them steps aside
            o, to = moves[0]
            aside = next(cell for cell in CELLS if cell not in taken)
            take("move", _name(o, frame), position_name(*aside))
            moves[0] = replace(o, row=aside[0], column=aside[1]), to
        else:
            o, to = moves.pop(index)
            take("move", _name(o, frame), to.position)
    for o, to in zip(sources, goal.objects, strict=True):
        if o is None:
            take("put", replace(looks_of(to), position=to.position))
    return steps


# ------------------------------------------------------------------------------------------------------- sampling


def _sample_repair(rng: np.random.Generator, held_out: bool | None, most: int) -> tuple[Frame, Scene]:
    """A wrong picture and the scene that at most `most` steps make of it; they share at least one object."""
    while True:
        kept, changed, missing, strays = choose(rng, _repairs(int(rng.integers(1, most + 1))))
        goal = sample_scene(rng, kept + missing, held_out)
        objects = [goal.objects[i] for i in rng.permutation(kept + missing)[:kept]]
        moved = int(rng.integers(changed + 1))
        elsewhere, objects = objects[:moved], objects[moved:]
        for i, o in enumerate(objects[: changed - moved]):
            objects[i] = replace(o, color=choose(rng, [c for c in _colors(o.shape, held_out) if c != o.color]))
        elsewhere += [sample_scene(rng, 1, held_out=False).objects[0] for _ in range(strays)]
        for o in elsewhere:  # perhaps where another object belongs
            taken = set(map(cell_of, (o, *objects)))
            row, column = choose(rng, [cell for cell in CELLS if cell not in taken])
            objects.append(replace(o, row=row, column=column))
        if len({looks_of(o) for o in objects}) == len(objects):
            start = _sorted(objects, goal)
            if 0 < len(shortest_plan(start, goal)) <= most:
                return start, goal


@cache
def _repairs(steps: int) -> tuple[tuple[int, int, int, int], ...]:
    """The ways to need so many steps: objects kept, changed ones of these, missing ones and strays."""
    return tuple(
        (kept, changed, missing, strays)
        for kept in range(1, MAX_OBJECTS + 1)
        for changed in range(kept + 1)
        for missing in range(MAX_OBJECTS - kept + 1)
        for strays in range(MAX_OBJECTS - kept + 1)
        if changed + missing + strays == steps
    )


def _colors(shape: str, held_out: bool | None) -> list[str]:
    return [color for color in COLORS if held_out is not False or (color, shape) not in HELD_OUT]


def _summary(steps: list[Step]) -> str:
    return ", ".join(f"{step.verb} the {noun_phrase(replace(step.thing, size=None))}" for step in steps) + "."


# ------------------------------------------------------------------------------------------------------- planning


def _assignments(
    goals: tuple[SceneObject, ...], objects: tuple[SceneObject, ...]
) -> Iterator[tuple[SceneObject | None, ...]]:
    """For each object of the goal the object that becomes it in at most one step, or `None`: all combinations."""
    if not goals:
        yield ()
        return
    for o in (*objects, None):
        if o is None or _becomes(o, goals[0]):
            for others in _assignments(goals[1:], tuple(other for other in objects if other is not o)):
                yield (o, *others)


def _becomes(o: SceneObject, to: SceneObject) -> bool:
    same = o.color == to.color or cell_of(o) == cell_of(to)
    return (o.shape, o.size) == (to.shape, to.size) and same


def _cost(start: Frame, goal: Frame, sources: tuple[SceneObject | None, ...]) -> tuple[int, int]:
    """Steps of an assignment, and how many of them paint. Each ring of moves takes one step more."""
    pairs = list(zip(sources, goal.objects, strict=True))
    changes = sum(o != to for o, to in pairs)  # puts, moves and paints
    removed = len(start.objects) - sum(o is not None for o in sources)
    moves = {cell_of(o): cell_of(to) for o, to in pairs if o is not None and cell_of(o) != cell_of(to)}
    paints = sum(o is not None and o.color != to.color for o, to in pairs)
    return changes + removed + _rings(moves), paints


def _rings(moves: dict[tuple[int, int], tuple[int, int]]) -> int:
    """How many closed rings the moves (from cell to cell, no two to one cell) hold."""
    number, left = 0, dict(moves)
    while left:
        first, cell = left.popitem()
        while cell in left:
            cell = left.pop(cell)
        number += cell == first
    return number


def _name(o: SceneObject, frame: Frame) -> Described:
    """The whole look, with the position where another object looks the same."""
    look = looks_of(o)
    return look if sum(fits(other, look) for other in frame.objects) == 1 else replace(look, position=o.position)


# ------------------------------------------------------------------------------------------------------- checking

_PLACE = "|".join(POSITION_OF)
_INSTRUCTION = re.compile(
    rf"step (?P<number>{'|'.join(_NUMBERS)}): (?:"
    rf"(?P<put>put) a (?P<new>(?:{'|'.join(SIZES)}) (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})) (?P<cell>{_PLACE})"
    rf"|(?:(?P<remove>remove)|(?P<move>move)|(?P<paint>paint)) the (?P<thing>{THING})(?: (?P<place>{_PLACE}))?"
    rf"(?(move) to the (?P<position>{'|'.join(POSITIONS)}))(?(paint) (?P<color>{'|'.join(COLORS)}))"
    r")\."
)


def _result(number: int, text: str, before: Frame) -> Frame | None:
    """What a picture should show after an instruction; `None` if that can't be read or is not legal."""
    try:
        said, step = parse_step(text)
    except ValueError:
        return None
    return apply_step(step, before) if said == number else None


def _whole_frame(seen: ReadScene) -> Frame | None:
    """What a picture shows, if all of it can be read; objects in reading order."""
    if seen.background is None or seen.unreadable:
        return None
    return Frame(tuple(SceneObject(o.shape, o.color, o.size, o.row, o.column) for o in seen.objects), seen.background)


def _sorted(objects: Sequence[SceneObject], frame: Frame) -> Frame:
    return Frame(tuple(sorted(objects, key=cell_of)), frame.background)
