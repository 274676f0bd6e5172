"""Explore: a fixed map larger than the view, walked move by move.

A map has 5x5 cells on one background; the view is a window of 3x3 cells, so that there are 3x3 places to look from,
named as the cells of a picture are. A move shifts the window by one cell; a move against the border of the map stays.

The start is told in words or shown:

- text: the first prompt lists the objects of the whole map with their row and column, one to five from the top left;
  the first answer opens with the view of the start. Every view is determined.
- image: the first prompt holds the view of the start and names its place. A cell never seen before may show anything
  on the same background, but what was seen stays: a checker follows the map that the answers themselves draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .checker import ReadScene
from .episode import Episode, ImageThought, Said, Turn, read_told, up_to
from .language import brief_text
from .scene import (
    _KINDS,
    _TRAINING_KINDS,
    BACKGROUNDS,
    GRID_SIZE,
    Frame,
    SceneObject,
    _draw,
    position_name,
)
from .words import NUMBER_WORDS, PLACES, choose

MAP_SIZE = 5
"""Rows and columns of the map."""
MOVES: dict[str, tuple[int, int]] = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}
"""Name of a move to what it adds to `(row, column)`."""
EXPLORE_KINDS: tuple[str, ...] = ("interactive", "free")
"""One move a turn of the user, or one prompt and moves of the assistant's own."""
EXPLORE_STARTS: tuple[str, ...] = ("text", "image")
"""The map told in words, or the first view shown."""

Cell = tuple[int, int]
Look = tuple[str, str, str]
"""Shape, colour and size."""
View = tuple[str | None, dict[Cell, Look | None]]
"""Background, and what each readable cell shows, by its place in the map."""

# An episode keeps below 483 tokens of the tiny model: a picture costs 47, a user's turn 15 more, an object told 10,
# and 4 in each thought.
_MOST_MOVES = {("interactive", "text"): 5, ("interactive", "image"): 6, ("free", "text"): 5, ("free", "image"): 7}
_MOST_TOLD, _MOST_TOLD_LONG = 4, 2  # objects of a map in words; with the most moves
_MOST_SHOWN = 8  # objects of a map of which the first view is shown
_MOST_IN_VIEW = 4  # of those in any view
_BUMP_RATE = 0.2
_BACK_RATE = 0.4
_HOME_RATE = 2 / 3

_MAX_MOVES = 7
_NOTHING = ("", ReadScene((), None))
_SENTENCES = {f"go {move}.": move for move in MOVES}
_MAP = tuple((row, column) for row in range(MAP_SIZE) for column in range(MAP_SIZE))
_PLACES = tuple(cell for cell in _MAP if max(cell) <= MAP_SIZE - GRID_SIZE)


@dataclass(frozen=True)
class ExploreMeaning:
    """What the prompts say and show.

    Attributes:
        background (`str`): of the whole map.
        start (`tuple[int, int]`): the place of the first view: `(row, column)` in the map of its top left cell.
        known (`dict`): map cell to [`Look`], or `None` for an empty one: the whole map if it is told, else the cells
            of the first view.
        steps (`int`): the number of moves.
        moves (`tuple[str, ...]`, *optional*): keys of [`MOVES`]; `None` if the assistant chooses them.
    """

    background: str
    start: Cell
    known: dict[Cell, Look | None]
    steps: int
    moves: tuple[str, ...] | None

    @property
    def told(self) -> bool:
        """Whether the whole map is told in words; otherwise the first view is shown."""
        return len(self.known) == MAP_SIZE**2


def sample_explore(
    rng: np.random.Generator,
    held_out: bool | None = False,
    difficulty: float = 1.0,
    moves: int | None = None,
    kind: str | None = None,
    start: str | None = None,
) -> Episode:
    """Draw a walk: task "explore", kind "interactive" or "free".

    A free walk shows moves within the map only; an interactive one may run against the border.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): `False` shows no held-out pair; `True` shows at least one, in the first view
            (image) or in any view of the walk (text); `None` draws from all pairs.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; scales the most moves and the most objects of the map.
        moves (`int`, *optional*): 1 to 7; `None` draws 2 to 5, from a picture to 6 (interactive) or 7 (free). Two of
            three walks of six moves or more see the start again after them for the first time (free: after six of
            seven). More moves than those make an episode longer than 482 tokens of the tiny model.
        kind (`str`, *optional*): one of [`EXPLORE_KINDS`]; `None` draws it.
        start (`str`, *optional*): one of [`EXPLORE_STARTS`]; `None` draws it.
    Raises:
        ValueError: if an argument is another.
    """
    for name, value, allowed in (("kind", kind, EXPLORE_KINDS), ("start", start, EXPLORE_STARTS)):
        if value is not None and value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    if moves is not None and moves not in range(1, _MAX_MOVES + 1):
        raise ValueError(f"`moves` must be 1 to {_MAX_MOVES}, got {moves!r}.")
    kind, start = kind or choose(rng, EXPLORE_KINDS), start or choose(rng, EXPLORE_STARTS)
    most_moves = _MOST_MOVES[kind, start]
    if moves is None:
        moves = int(rng.integers(2, up_to(difficulty, 2, most_moves) + 1))
    most_told = _MOST_TOLD if moves < most_moves else _MOST_TOLD_LONG
    most_objects = up_to(difficulty, 1, most_told if start == "text" else _MOST_SHOWN)
    background = choose(rng, tuple(BACKGROUNDS))
    while True:
        world = _sample_map(rng, held_out, int(rng.integers((most_objects + 1) // 2, most_objects + 1)))
        if start == "image" and any(len(_objects(world, place)) > _MOST_IN_VIEW for place in _PLACES):
            continue
        # The tiny tokenizer spells "four" and "five".
        if start == "text" and moves >= most_moves and sum(at >= 3 for cell in world for at in cell) > 2:
            continue
        home = choose(rng, _PLACES)
        walk = _sample_walk(rng, home, moves, bumps=kind == "interactive")
        views = [_objects(world, place) for place in _places(home, walk)]
        if not held_out or any(o.held_out for view in (views if start == "text" else views[:1]) for o in view):
            break
    known = {cell: world.get(cell) for cell in (_MAP if start == "text" else _window(home))}
    meaning = ExploreMeaning(background, home, known, moves, tuple(walk) if kind == "interactive" else None)
    return Episode("explore", kind, _turns(meaning, walk, [Frame(view, background) for view in views]), meaning)


def parse_move(text: str) -> str:
    """The move of a sentence like "go north."

    Raises:
        ValueError: if the text is another.
    """
    if text not in _SENTENCES:
        raise ValueError(f"Cannot read {text!r}. Write one of: {' '.join(_SENTENCES)}")
    return _SENTENCES[text]


def check_explore(meaning: ExploreMeaning, answers: Sequence[Sequence[Said]]) -> dict[str, bool | float | None]:
    """Mark a walk from its pixels and, if it is free, from its sentences.

    A cell is known from the prompt, or from the first picture of the answer that shows it readably.
    `return` and `border` compare an answer with itself: one picture shown for ever has all of both, but a quarter of
    `view`. Read them together.

    Args:
        meaning ([`ExploreMeaning`]): what the prompts say and show.
        answers: what the assistant said, a list for each turn of the user.
    Returns:
        `dict`: shares in `[0, 1]`, or `None` where there is nothing to mark, for
            `view` (moves after which the picture is right: background as given, every cell readable, known cells the
            same), `return` (arrivals at a place seen before whose picture equals the first one of that place),
            `return_after_6` (the same, six or more moves after the first one), `border` (moves against the border
            whose picture equals the one before) and `moves_legal` (free: sentences that are moves within the map);
            booleans for `start` (told in words: its view is right), `steps` (as many pictures as asked for and nothing
            else, but for thoughts and the sentences of a free walk) and `whole`: all of it is right.
    """
    steps, opening, walk = _said(meaning, answers)
    known, place = dict(meaning.known), meaning.start
    start, shown = None, (meaning.background, {cell: known[cell] for cell in _window(place)})
    if meaning.told:
        shown = _view(opening, place)
        start = _agrees(known, shown, meaning.background)
    marks = {"view": [], "return": [], "return_after_6": [], "border": [], "moves_legal": []}
    first = {place: (0, shown)}
    for index, (move, seen) in enumerate(walk, 1):
        target = None if move is None else _target(place, move)
        marks["moves_legal"].append(target not in (None, place))
        if target is None:
            marks["view"].append(False)
            continue
        before, shown = shown, _view(seen, target)
        marks["view"].append(_agrees(known, shown, meaning.background))
        if target == place:
            marks["border"].append(_is_whole(shown) and shown == before)
        elif target in first:
            index_then, shown_then = first[target]
            marks["return"].append(_is_whole(shown) and shown == shown_then)
            if index - index_then >= 6:
                marks["return_after_6"].append(marks["return"][-1])
        first.setdefault(target, (index, shown))
        place = target
    if meaning.moves is not None:
        marks["moves_legal"] = []
    result = {name: sum(values) / len(values) if values else None for name, values in marks.items()}
    right = result["view"] == 1.0 and result["moves_legal"] in (None, 1.0)
    return result | {"start": start, "steps": steps, "whole": steps and start is not False and right}


def _window(place: Cell) -> list[Cell]:
    """The map cells of a view, in reading order."""
    return [(place[0] + row, place[1] + column) for row in range(GRID_SIZE) for column in range(GRID_SIZE)]


def _target(place: Cell, move: str) -> Cell:
    """Where a move leads: at the border to the same place."""
    target = place[0] + MOVES[move][0], place[1] + MOVES[move][1]
    return target if target in _PLACES else place


def _places(start: Cell, walk: Sequence[str]) -> list[Cell]:
    """The start and the place after each move."""
    places = [start]
    for move in walk:
        places.append(_target(places[-1], move))
    return places


def _sample_map(rng: np.random.Generator, held_out: bool | None, number: int) -> dict[Cell, Look]:
    """`number` objects of different looks in any cells; the other cells are empty."""
    kinds = _draw(rng, _TRAINING_KINDS if held_out is False else _KINDS, number)
    cells = _draw(rng, _MAP, number)
    return {cell: (shape, color, size) for cell, (color, shape, size) in zip(cells, kinds, strict=True)}


def _objects(world: dict[Cell, Look], place: Cell) -> tuple[SceneObject, ...]:
    """What the view from a place holds, in reading order."""
    return tuple(
        SceneObject(*world[cell], cell[0] - place[0], cell[1] - place[1]) for cell in _window(place) if cell in world
    )


def _sample_walk(rng: np.random.Generator, home: Cell, number: int, bumps: bool) -> list[str]:
    """A walk that often goes back where it was, and, if it may, against the border."""
    walk = []
    if number >= 6 and rng.random() < _HOME_RATE:
        walk = _sample_loop(rng, home, number if bumps else number - number % 2, bumps)
    places = _places(home, walk)
    while len(walk) < number:
        targets = {move: _target(places[-1], move) for move in MOVES}
        against = [move for move, target in targets.items() if target == places[-1]]
        back = [move for move, target in targets.items() if target in places[:-1] and move not in against]
        new = [move for move in MOVES if move not in against and move not in back]
        if bumps and against and rng.random() < _BUMP_RATE:
            options = against
        elif back and (not new or rng.random() < _BACK_RATE):
            options = back
        else:
            options = new
        walk.append(choose(rng, options))
        places.append(targets[walk[-1]])
    return walk


def _sample_loop(rng: np.random.Generator, home: Cell, number: int, bumps: bool) -> list[str]:
    """A walk that comes home with its last move and not before; bumps on the way are as rare as in other walks."""
    walk, place = [], home
    while len(walk) < number:
        weights = np.array(
            [_move_weight(place, move, home, number - len(walk), bumps) for move in MOVES], dtype=np.float64
        )
        walk.append(tuple(MOVES)[int(rng.choice(len(MOVES), p=weights / weights.sum()))])
        place = _target(place, walk[-1])
    return walk


@cache
def _move_weight(place: Cell, move: str, home: Cell, left: int, bumps: bool) -> float:
    """Weight of all ways to come home with the last of `left` moves and not before, if `move` is the first."""
    target = _target(place, move)
    weight = _BUMP_RATE * bumps if target == place else 1.0
    if left == 1 or target == home:
        return weight * (left == 1 and target == home != place)
    return weight * sum(_move_weight(target, following, home, left - 1, bumps) for following in MOVES)


def _turns(meaning: ExploreMeaning, walk: list[str], frames: list[Frame]) -> tuple[Turn, ...]:
    """The conversation; `frames` are the view of the start and the one after each move."""
    name = PLACES[position_name(*meaning.start)][0]
    # What is told must be looked up for every view; doing so in words first makes drawing it easy.
    views = [[ImageThought(brief_text(frame.objects)), frame] if meaning.told else [frame] for frame in frames]
    opening = [f"{_tell(meaning)} start {name}." if meaning.told else f"start {name}."]
    sentences = [f"go {move}." for move in walk]
    if meaning.moves is None:
        opening.append(f"explore in {NUMBER_WORDS[meaning.steps]} {'step' if meaning.steps == 1 else 'steps'}.")
        answer = [piece for sentence, view in zip(sentences, views[1:], strict=True) for piece in (sentence, *view)]
        exchanges = [(opening, [*views[0]] * meaning.told + answer)]
    else:
        exchanges = [([sentence], view) for sentence, view in zip(sentences, views[1:], strict=True)]
        if meaning.told:
            exchanges.insert(0, (opening, views[0]))
        else:
            exchanges[0][0][:0] = opening
    turns = []
    for index, (prompt, answer) in enumerate(exchanges):
        shown = frames[:1] if index == 0 and not meaning.told else []
        turns += [Turn("user", (" ".join(prompt), *shown)), Turn("assistant", tuple(answer))]
    return tuple(turns)


def _tell(meaning: ExploreMeaning) -> str:
    """The map in words: "a map on navy: small red circle two one, large blue square four five."."""
    objects = [
        f"{size} {color} {shape} {NUMBER_WORDS[cell[0] + 1]} {NUMBER_WORDS[cell[1] + 1]}"
        for cell, look in meaning.known.items()
        if look is not None
        for shape, color, size in [look]
    ]
    return f"a map on {meaning.background}: {', '.join(objects)}."


def _said(
    meaning: ExploreMeaning, answers: Sequence[Sequence[Said]]
) -> tuple[bool, ReadScene | None, list[tuple[str | None, ReadScene]]]:
    """Whether all was said that was asked for and no more, what the start shows, and each move with what it shows."""
    turns = [read_told([answer]) for answer in answers]
    number = meaning.steps + meaning.told
    if meaning.moves is None:
        pairs, rest = turns[0] if turns else ([], "")
        steps = len(turns) == 1 and not rest and len(pairs) == number
        if meaning.told and pairs and pairs[0][0]:  # a move before anything is shown
            pairs, steps = [_NOTHING, *pairs], False
    else:
        pairs = [told[0] if told else _NOTHING for told, _ in turns]
        steps = len(turns) == number and all(len(told) == 1 and not told[0][0] and not rest for told, rest in turns)
    pairs = [*pairs, *[_NOTHING] * number][:number]
    opening = pairs.pop(0)[1] if meaning.told else None
    moves = meaning.moves or [_SENTENCES.get(text) for text, _ in pairs]
    return steps, opening, [(move, seen) for move, (_, seen) in zip(moves, pairs, strict=True)]


def _view(seen: ReadScene, place: Cell) -> View:
    """What is shown, if the picture is taken from a place."""
    if seen.background is None:
        return None, {}
    looks = {(o.row, o.column): (o.shape, o.color, o.size) for o in seen.objects}
    cells = zip(_window(place), _window((0, 0)), strict=True)
    return seen.background, {at: looks.get(cell) for at, cell in cells if cell not in seen.unreadable}


def _is_whole(view: View) -> bool:
    """Whether the background and every cell can be read."""
    return view[0] is not None and len(view[1]) == GRID_SIZE**2


def _agrees(known: dict[Cell, Look | None], view: View, background: str) -> bool:
    """Whether a view is right; what it shows of the map for the first time is known from now on."""
    fits = _is_whole(view) and view[0] == background and all(known.get(c, look) == look for c, look in view[1].items())
    for cell, look in view[1].items():
        known.setdefault(cell, look)
    return fits
