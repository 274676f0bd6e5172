"""Stories: a character travels through some pictures, each with a sentence that says what happens in it.

    narration = subject deed "."
    subject   = "it" | "the" thing
    deed      = "starts" PLACE | "moves" DIRECTION | "stays" | "jumps to the" POSITION | "meets the" thing
    thing     = [SIZE] [COLOUR] SHAPE

Many stories fit a prompt. [`check_story`] marks whichever was told by these definitions, from pixels alone:

- "starts" opens a story that has no picture before it, and says where the character stands;
- "moves" is one step to the next cell, "stays" none, "jumps" is to a named cell that one step does not reach;
- "meets" is one step after which the character and the thing share an edge;
- a thing must fit exactly one object of the picture ("meets": one besides the character).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .checker import ReadObject, ReadScene
from .episode import Episode, ImageThought, Said, Turn, read_told, up_to
from .language import brief_text
from .meaning import Described, cell_of, fits, looks_of
from .scene import (
    CELLS,
    COLORS,
    MAX_OBJECTS,
    POSITIONS,
    SHAPES,
    SIZES,
    Frame,
    SceneObject,
    position_name,
    sample_scene,
)
from .words import PLACES, choose, noun_phrase, with_article

DIRECTIONS: dict[str, tuple[int, int]] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Name of a step to its (rows, columns)."""
NUMBERS_OF_PICTURES: dict[int, str] = {2: "two", 3: "three", 4: "four", 5: "five"}
"""How many pictures a story may have, and the words for them."""

_FIRST_PICTURE = 1 / 3
"""Share of the stories that go on from a picture."""
_STAYS, _JUMPS, _MEETS = 0.12, 0.2, 0.6
"""Probability of a stay, of a jump, and of saying "meets" where a step brings the character next to a thing."""


@dataclass(frozen=True)
class StoryMeaning:
    """What a prompt says: who travels, what stands still on which background, and how many pictures to make.

    `first` is the picture that the story goes on from, if there is one.
    """

    character: Described
    still: Frame
    num_frames: int
    first: Frame | None = None


@dataclass(frozen=True)
class Narration:
    """One sentence of a story.

    Attributes:
        verb (`str`): "starts", "moves", "stays", "jumps" or "meets".
        target: a position ("starts", "jumps"), a direction ("moves"), a thing ("meets") or `None` ("stays").
        subject (`Described`, *optional*): who does it; `None` is "it".
    """

    verb: str
    target: str | Described | None = None
    subject: Described | None = None


def sample_story(rng: np.random.Generator, held_out: bool | None = False, difficulty: float = 1.0) -> Episode:
    """Draw a story: task "story", kind "2_frames" to "5_frames".

    A third of the prompts go on from a picture, which then shows what stands still and the background. There are at
    most five pictures, the prompt's included, and one thing at most stands still in five: a story is to stay short.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): as in [`sample_scene`]; if `True` the character is a held-out pair.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; bounds the numbers of pictures and of things.
    Raises:
        ValueError: if the difficulty is another.
    """
    num_frames = int(rng.integers(2, up_to(difficulty, 2, max(NUMBERS_OF_PICTURES)) + 1))
    goes_on = rng.random() < _FIRST_PICTURE and num_frames < max(NUMBERS_OF_PICTURES)
    most_objects = min(up_to(difficulty, 1, MAX_OBJECTS), 2 + max(NUMBERS_OF_PICTURES) - num_frames - goes_on)
    scene = sample_scene(rng, int(rng.integers(1, most_objects + 1)), held_out)
    character = choose(rng, [o for o in scene.objects if o.held_out or not held_out])
    still = Frame(tuple(o for o in scene.objects if o != character), scene.background)
    meaning = StoryMeaning(looks_of(character), still, num_frames, _frame(character, still) if goes_on else None)

    subject, content = short_name(character, scene.objects), []
    for number in range(num_frames):
        if number == 0 and not goes_on:
            narration = Narration("starts", character.position, subject)
        else:
            character, verb, target = _go_on(character, still, rng)
            narration = Narration(verb, target, subject if number == 0 else None)
        thought = ImageThought(f"{brief_text((character, *still.objects))}, {still.background}")
        content += [narrate(narration), thought, _frame(character, still)]
    turns = Turn("user", _prompt(meaning)), Turn("assistant", tuple(content))
    return Episode("story", f"{num_frames}_frames", turns, meaning)


def narrate(narration: Narration) -> str:
    """The sentence: `parse_narration(narrate(narration)) == narration`."""
    subject = "it" if narration.subject is None else f"the {noun_phrase(narration.subject)}"
    target = {
        "starts": lambda position: f" {PLACES[position][0]}",
        "moves": lambda direction: f" {direction}",
        "stays": lambda _: "",
        "jumps": lambda position: f" to the {position}",
        "meets": lambda thing: f" the {noun_phrase(thing)}",
    }[narration.verb](narration.target)
    return f"{subject} {narration.verb}{target}."


def parse_narration(text: str) -> Narration:
    """Reads one sentence of the grammar above, nothing else.

    Raises:
        ValueError: if the text is another.
    """
    match = _NARRATION.fullmatch(text)
    if match is None:
        raise ValueError(f'Cannot read {text!r}. Write like "the red circle starts in the center." or "it moves up."')
    verb = match.lastgroup  # each verb's group holds its target, and stands after the subject's
    target = {"starts": POSITION_OF.get, "meets": read_thing, "stays": lambda _: None}.get(verb, str)(match[verb])
    return Narration(verb, target, match["subject"] and read_thing(match["subject"]))


def check_story(meaning: StoryMeaning, answers: Sequence[Sequence[Said]]) -> dict[str, float | bool]:
    """Mark a story from its sentences and pixels. A picture that is missing or damaged is wrong in all that it shows.

    A sentence about a step needs the character in the picture before as well: where it is lost, two sentences fail.

    Args:
        meaning (`StoryMeaning`): of the prompt.
        answers: pieces of each turn of the assistant.
    Returns:
        `dict`: shares of the pictures asked for: `narration` (its sentence is true, given the picture before),
            `character` (the character is there exactly once), `world` (what stands still and the background are as
            they should be, and nothing else is there but one damaged thing where the character is missing); booleans:
            `character_consistent` (in every picture), `frames` (as many pictures as asked for), `whole` (all of it).
    """
    told, _ = read_told(answers)
    opening = meaning.first is None
    before = None if opening else _cell_of(meaning.character, meaning.first.objects)
    narration = character = world = 0
    for text, seen in told[: meaning.num_frames]:
        cell = _cell_of(meaning.character, seen.objects)
        narration += _is_true(text, meaning.character, seen.objects, before, opening)
        character += cell is not None
        world += _world_stands(meaning, seen)
        before, opening = cell, False
    frames = len(told) == meaning.num_frames
    consistent = character == meaning.num_frames
    shares = {"narration": narration, "character": character, "world": world}
    return {
        **{name: count / meaning.num_frames for name, count in shares.items()},
        "character_consistent": consistent,
        "frames": frames,
        "whole": frames and all(count == meaning.num_frames for count in shares.values()),
    }


# ------------------------------------------------------------------------------------------- shared with `howto`

THING: str = rf"(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)})"
"""Pattern of `[SIZE] [COLOUR] SHAPE`, without groups."""
POSITION_OF: dict[str, str] = {phrase: position for position, phrases in PLACES.items() for phrase in phrases}
"""Phrase of a place to its position."""


def read_thing(phrase: str) -> Described:
    """What a phrase that matches [`THING`] says."""
    words = phrase.split()
    named = [next((word for word in words if word in names), None) for names in (SHAPES, COLORS, SIZES)]
    return Described(*named)


# ------------------------------------------------------------------------------------------------------- sampling


def _prompt(meaning: StoryMeaning) -> tuple[str | Frame, ...]:
    look, still = noun_phrase(meaning.character), meaning.still
    request = f"tell the story in {NUMBERS_OF_PICTURES[meaning.num_frames]} pictures."
    if meaning.first is not None:
        return f"the {look} travels. {request}", meaning.first
    things = [f"{with_article(noun_phrase(looks_of(o)))} is {PLACES[o.position][0]}." for o in still.objects]
    return (" ".join([f"{with_article(look)} travels on a {still.background} background.", *things, request]),)


def _frame(character: SceneObject, still: Frame) -> Frame:
    return Frame(tuple(sorted((character, *still.objects), key=cell_of)), still.background)


def _go_on(
    character: SceneObject, still: Frame, rng: np.random.Generator
) -> tuple[SceneObject, str, str | Described | None]:
    """The character in the next picture, and the verb and the target of its sentence."""
    here, taken = cell_of(character), set(map(cell_of, still.objects))
    deed = rng.random()
    if deed < _STAYS:
        return character, "stays", None
    free = [cell for cell in CELLS if cell not in taken]
    near = [cell for cell in free if _distance(here, cell) == 1]
    jumps = deed < _STAYS + _JUMPS or not near  # between things that stand still there may be no step
    cell = choose(rng, [cell for cell in free if _distance(here, cell) > 1] if jumps else near)
    moved = replace(character, row=cell[0], column=cell[1])
    if jumps:
        return moved, "jumps", position_name(*cell)
    met = [o for o in still.objects if _distance(cell, cell_of(o)) == 1]
    if met and rng.random() < _MEETS:
        return moved, "meets", short_name(choose(rng, met), (moved, *still.objects))
    return moved, "moves", next(name for name, step in DIRECTIONS.items() if _moved(here, step) == cell)


def short_name(target: SceneObject, objects: Sequence[SceneObject]) -> Described:
    """The shortest description without a position that fits the target alone; looks must differ."""
    look = looks_of(target)
    names = (Described(look.shape), Described(look.shape, look.color), Described(look.shape, None, look.size), look)
    return next(name for name in names if sum(fits(o, name) for o in objects) == 1)


# ------------------------------------------------------------------------------------------------------- checking

_NARRATION = re.compile(
    rf"(?:it|the (?P<subject>{THING})) "
    rf"(?:starts (?P<starts>{'|'.join(POSITION_OF)})|moves (?P<moves>{'|'.join(DIRECTIONS)})|(?P<stays>stays)"
    rf"|jumps to the (?P<jumps>{'|'.join(POSITIONS)})|meets the (?P<meets>{THING}))\."
)


def _is_true(
    text: str, look: Described, objects: Sequence[ReadObject], before: tuple[int, int] | None, opening: bool
) -> bool:
    """Whether a sentence can be read and holds; `before` is the character's last cell, `None` if it is not known."""
    try:
        said = parse_narration(text)
    except ValueError:
        return False
    cell = _cell_of(look, objects)
    if cell is None or (said.subject is not None and _cell_of(said.subject, objects) != cell):
        return False
    if said.verb == "starts":
        return opening and position_name(*cell) == said.target
    if before is None:
        return False
    if said.verb == "moves":
        return cell == _moved(before, DIRECTIONS[said.target])
    if said.verb == "stays":
        return cell == before
    if said.verb == "jumps":
        return position_name(*cell) == said.target and _distance(before, cell) > 1
    met = _cell_of(said.target, [o for o in objects if cell_of(o) != cell])
    return met is not None and _distance(before, cell) == 1 and _distance(cell, met) == 1


def _world_stands(meaning: StoryMeaning, seen: ReadScene) -> bool:
    """See `world` of [`check_story`]. One strange thing may be the character gone wrong: `character` counts that."""
    characters = sum(fits(o, meaning.character) for o in seen.objects)
    others = {(looks_of(o), cell_of(o)) for o in seen.objects if not fits(o, meaning.character)}
    still = {(looks_of(o), cell_of(o)) for o in meaning.still.objects}
    strangers = len(others - still) + len(seen.unreadable)
    return seen.background == meaning.still.background and still <= others and strangers <= (characters == 0)


def _cell_of(thing: Described, objects: Sequence[SceneObject | ReadObject]) -> tuple[int, int] | None:
    """Where the only object stands that a description fits; `None` if there is none or more than one."""
    cells = [cell_of(o) for o in objects if fits(o, thing)]
    return cells[0] if len(cells) == 1 else None


def _moved(cell: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    return cell[0] + step[0], cell[1] + step[1]


def _distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    """Steps from cell to cell."""
    return abs(a[0] - b[0]) + abs(a[1] - b[1])
