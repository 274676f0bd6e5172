"""Walks: prompts say what views show, right answers are marked right, each kind of damage flips the mark it should."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from emu35.training.shapes import COLORS, HELD_OUT, POSITIONS, SHAPES, SIZES, Frame, ImageThought, SceneObject, render
from emu35.training.shapes.explore import (
    EXPLORE_KINDS,
    EXPLORE_STARTS,
    MOVES,
    ExploreMeaning,
    check_explore,
    parse_move,
    sample_explore,
)

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
RED = ("circle", "red", "small")
BLUE = ("square", "blue", "large")


def walks(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_explore(rng, **kwargs) for _ in range(number)]


def said(episode):
    return [[render(p) if isinstance(p, Frame) else p for p in turn.content] for turn in episode.answers]


def words(episode):
    return [" ".join(p for p in turn.content if isinstance(p, str)) for turn in episode.turns]


def places_of(episode):
    """The place after each move, and the start, worked out from the texts alone."""
    text = " ".join(words(episode))
    row, column = divmod(POSITIONS.index(re.search(r"start (?:in|at|on) the ([a-z ]+)\.", text)[1]), 3)
    places = [(row, column)]
    for move in re.findall(r"go (\w+)\.", text):
        north, west = (move == "south") - (move == "north"), (move == "east") - (move == "west")
        row, column = min(max(row + north, 0), 2), min(max(column + west, 0), 2)
        places.append((row, column))
    return places


def told_map(text):
    """Map cell to looks, from the words of a prompt."""
    objects = re.findall(r"(small|large) (\w+) (\w+) (\w+) (\w+)(?=[,.])", text)
    return {
        (NUMBERS.index(row) - 1, NUMBERS.index(column) - 1): (shape, color, size)
        for size, color, shape, row, column in objects
    }


def looks(frame, place):
    return {(place[0] + o.row, place[1] + o.column): (o.shape, o.color, o.size) for o in frame.objects}


def window(place):
    return [(place[0] + row, place[1] + column) for row in range(3) for column in range(3)]


def picture(world, place, background="navy"):
    return render(
        Frame(
            tuple(SceneObject(*world[c], c[0] - place[0], c[1] - place[1]) for c in window(place) if c in world),
            background,
        )
    )


WORLD = {(1, 1): RED, (2, 3): BLUE, (4, 0): ("ring", "green", "large")}


def told(moves, start=(1, 1), world=WORLD):
    known = {(row, column): world.get((row, column)) for row in range(5) for column in range(5)}
    return ExploreMeaning("navy", start, known, len(moves), tuple(moves))


def shown(moves, start=(1, 1), world=WORLD):
    return ExploreMeaning("navy", start, {c: world.get(c) for c in window(start)}, len(moves), tuple(moves))


def one_each(*pictures):
    return [[p] for p in pictures]


@pytest.mark.parametrize("kind", EXPLORE_KINDS)
@pytest.mark.parametrize("start", EXPLORE_STARTS)
def test_right_walks_are_marked_right(kind, start):
    marked = [(e, check_explore(e.meaning, said(e))) for e in walks(60, kind=kind, start=start)]
    for episode, marks in marked:
        assert (episode.task, episode.kind) == ("explore", kind)
        assert marks["whole"] and marks["steps"] and marks["view"] == 1.0
        assert marks["start"] is (True if start == "text" else None)
        assert marks["moves_legal"] == (1.0 if kind == "free" else None)
        places = places_of(episode)
        bumps = sum(a == b for a, b in itertools.pairwise(places))
        returns = [i for i in range(1, len(places)) if places[i] in places[:i] and places[i] != places[i - 1]]
        assert marks["border"] == (1.0 if bumps else None)
        assert marks["return"] == (1.0 if returns else None)
        late = [i for i in returns if i - places.index(places[i]) >= 6]
        assert marks["return_after_6"] == (1.0 if late else None)
    assert sum(marks["return"] is not None for _, marks in marked) > 30
    bumped = sum(marks["border"] is not None for _, marks in marked)
    assert bumped > 15 if kind == "interactive" else bumped == 0


@pytest.mark.parametrize("kind", EXPLORE_KINDS)
@pytest.mark.parametrize("start", EXPLORE_STARTS)
def test_views_are_windows_of_one_map(kind, start):
    counts = []
    for episode in walks(100, seed=1, kind=kind, start=start):
        places = places_of(episode)
        frames = [frame for turn in episode.turns for frame in turn.frames]
        assert len(frames) == len(places) == episode.meaning.steps + 1
        assert {frame.background for frame in frames} == {episode.meaning.background}
        world = told_map(words(episode)[0]) if start == "text" else {}
        for frame, place in zip(frames, places, strict=True):
            counts.append(len(frame.objects))
            if start == "text":
                assert looks(frame, place) == {c: world[c] for c in window(place) if world.get(c)}
            for cell in window(place):  # what a view of an image start shows first holds for all later ones
                assert world.setdefault(cell, looks(frame, place).get(cell)) == looks(frame, place).get(cell)
        objects = [look for look in world.values() if look]
        assert len(set(objects)) == len(objects)
    assert max(counts) == 4 or start == "text"
    assert np.mean(np.array(counts) > 0) > 0.6


@pytest.mark.parametrize("kind", EXPLORE_KINDS)
@pytest.mark.parametrize("start", EXPLORE_STARTS)
def test_conversations_have_the_form_of_their_kind(kind, start):
    thing = rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) \w+ \w+"
    tell = rf"a map on \w+: {thing}(, {thing}){{0,4}}\. " if start == "text" else ""
    go = rf"go ({'|'.join(MOVES)})\."
    for episode in walks(50, kind=kind, start=start):
        prompts, answers = words(episode)[::2], episode.answers
        opening = rf"{tell}start (in|at|on) the ({'|'.join(POSITIONS)})\."
        number = episode.meaning.steps
        assert len(episode.turns[0].frames) == (start == "image")
        if kind == "free":
            assert re.fullmatch(rf"{opening} explore in {NUMBERS[number]} steps\.", prompts[0])
            content = list(answers[0].content)
            view = [ImageThought, Frame] if start == "text" else [Frame]
            opening_view = view if start == "text" else []
            assert [type(piece) for piece in content] == [*opening_view, *[str, *view] * number]
            assert all(re.fullmatch(go, piece) for piece in content if isinstance(piece, str))
            assert episode.meaning.moves is None
        else:
            first = opening if start == "text" else f"{opening} {go}"
            assert re.fullmatch(first, prompts[0]) and all(re.fullmatch(go, prompt) for prompt in prompts[1:])
            assert len(prompts) == number + (start == "text")
            form = [ImageThought, Frame] if start == "text" else [Frame]
            assert all([type(piece) for piece in a.content] == form for a in answers)
        for answer in answers:
            for thought, frame in itertools.pairwise(answer.content):
                if isinstance(thought, ImageThought):
                    assert thought.text == (", ".join(map(said_of, frame.objects)) or "nothing")


def test_moves_and_difficulty_bound_a_walk():
    def steps(**kwargs):
        return {episode.meaning.steps for episode in walks(150, **kwargs)}

    assert steps() == {2, 3, 4, 5, 6, 7}
    assert steps(kind="interactive") == {2, 3, 4, 5, 6}
    assert steps(difficulty=0.05) == {2}
    assert steps(moves=1) == {1} and steps(moves=7) == {7}
    easy = walks(50, difficulty=0.05, start="text")
    assert {len(told_map(words(episode)[0])) for episode in easy} == {1}
    assert re.search(r"explore in one step\.", words(walks(1, moves=1, kind="free")[0])[0])


def said_of(o):
    return f"{o.size} {o.color} {o.shape} {o.position}"


@pytest.mark.parametrize(("kind", "moves"), [("interactive", 6), ("interactive", 7), ("free", 6), ("free", 7)])
def test_long_walks_often_come_back_to_the_start(kind, moves):
    late = 0
    for episode in walks(60, kind=kind, moves=moves):
        late += check_explore(episode.meaning, said(episode))["return_after_6"] is not None
        places = places_of(episode)
        if kind == "free":
            assert all(a != b for a, b in itertools.pairwise(places))
    assert late > 30


def test_held_out_pairs():
    def pairs(frames):
        return {(o.color, o.shape) for frame in frames for o in frame.objects}

    for episode in walks(100, held_out=False):
        everything = pairs([frame for turn in episode.turns for frame in turn.frames])
        said_looks = told_map(words(episode)[0]).values()
        assert not HELD_OUT & (everything | {(color, shape) for shape, color, _ in said_looks})
    for episode in walks(40, held_out=True, start="image"):
        assert HELD_OUT & pairs(episode.turns[0].frames)
    for episode in walks(40, held_out=True, start="text"):
        assert HELD_OUT & pairs([frame for turn in episode.turns for frame in turn.frames])
    assert any(
        HELD_OUT & pairs([f for t in e.turns for f in t.frames]) for e in walks(40, held_out=None, start="text")
    )


def test_same_seed_same_walk():
    assert walks(20, seed=3) == walks(20, seed=3)
    assert walks(20, seed=3) != walks(20, seed=4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"difficulty": 0}, "difficulty"),
        ({"difficulty": 1.5}, "difficulty"),
        ({"moves": 0}, "moves"),
        ({"moves": 8}, "moves"),
        ({"kind": "guided"}, "kind"),
        ({"start": "sound"}, "start"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=rf"`{named}` must be .*{next(iter(arguments.values()))}"):
        sample_explore(np.random.default_rng(0), **{"moves": None, **arguments})


def test_parse_move_reads_its_four_sentences_only():
    assert [parse_move(f"go {move}.") for move in MOVES] == list(MOVES)
    for text in ("", "go north", "go  north.", "Go north.", "go up.", " go north.", "go north. go south.", "north."):
        with pytest.raises(ValueError, match="Cannot read"):
            parse_move(text)


# ------------------------------------------------------------------------------------------------------------- damage

HOME = picture(WORLD, (1, 1))
EAST = picture(WORLD, (1, 2))
BROKEN = HOME.copy()
BROKEN[:24, :8] = 128


def test_a_wrong_view_counts_once():
    marks = check_explore(told(["east", "west"]), one_each(HOME, picture(WORLD, (1, 0)), HOME))
    assert marks["view"] == 0.5 and marks["return"] == 1.0 and marks["start"] and not marks["whole"]


@pytest.mark.parametrize(
    "wrong",
    [
        picture({}, (1, 2)),
        picture(WORLD, (1, 2), "black"),
        picture(WORLD | {(3, 4): RED}, (1, 2)),
        picture(WORLD | {(2, 3): ("square", "blue", "small")}, (1, 2)),
        BROKEN,
        None,
    ],
    ids=["missing", "background", "extra", "size", "unreadable", "damaged"],
)
def test_every_wrong_picture_is_seen(wrong):
    assert check_explore(told(["east"]), one_each(HOME, wrong))["view"] == 0.0
    marks = check_explore(told(["east"]), one_each(wrong, EAST))
    assert marks["start"] is False and marks["view"] == 1.0 and not marks["whole"]


def test_another_object_on_return():
    other = picture(WORLD | {(2, 3): RED}, (1, 1))
    marks = check_explore(told(["east", "west"]), one_each(HOME, EAST, other))
    assert marks["return"] == 0.0 and marks["view"] == 0.5 and not marks["whole"]
    # consistent with itself but not with what was told
    marks = check_explore(told(["east", "west"]), one_each(other, EAST, other))
    assert marks["return"] == 1.0 and marks["view"] == 0.5 and marks["start"] is False


def test_return_after_six_moves_starts_with_the_sixth():
    around = ["north", "east", "south", "south", "west", "north"]  # ends where it began
    places = [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (1, 1)]
    right = [picture(WORLD, place) for place in places]
    marks = check_explore(shown(around), one_each(*right))
    assert marks["return_after_6"] == marks["return"] == 1.0 and marks["whole"] and marks["start"] is None
    marks = check_explore(shown(around), one_each(*right[:-1], picture({}, (1, 1))))
    assert marks["return_after_6"] == marks["return"] == 0.0 and marks["view"] == 5 / 6
    square = ["east", "south", "west", "north"]
    marks = check_explore(told(square), one_each(HOME, *(picture(WORLD, p) for p in ((1, 2), (2, 2), (2, 1), (1, 1)))))
    assert marks["return_after_6"] is None and marks["return"] == 1.0


def test_a_move_against_the_border_stays():
    corner, beside = picture(WORLD, (0, 0)), picture(WORLD, (1, 0))
    marks = check_explore(told(["north"], (0, 0)), one_each(corner, corner))
    assert marks["border"] == 1.0 and marks["return"] is None and marks["whole"]
    marks = check_explore(told(["north"], (0, 0)), one_each(corner, beside))
    assert marks["border"] == 0.0 and marks["view"] == 0.0
    marks = check_explore(shown(["north", "south"], (0, 0)), one_each(beside, beside))
    assert marks["border"] == 0.0 and marks["view"] == 0.5


def test_what_was_never_seen_is_free_and_then_fixed():
    invented = WORLD | {(1, 4): BLUE, (3, 4): RED}
    meaning = shown(["east", "west", "east"])
    marks = check_explore(meaning, one_each(picture(invented, (1, 2)), HOME, picture(invented, (1, 2))))
    assert marks["whole"]
    marks = check_explore(meaning, one_each(picture(invented, (1, 2)), HOME, EAST))
    assert marks["view"] == 2 / 3 and marks["return"] == 0.5
    # a cell first seen from one place holds for another
    marks = check_explore(shown(["east", "north"]), one_each(picture(invented, (1, 2)), picture(WORLD, (0, 2))))
    assert marks["view"] == 0.5 and marks["return"] is None
    # what the prompt showed holds
    assert check_explore(shown(["east"]), one_each(picture({}, (1, 2))))["view"] == 0.0


def test_the_number_of_pictures_is_kept():
    meaning = told(["east", "west"])
    assert check_explore(meaning, one_each(HOME, EAST, HOME))["whole"]
    for answers in (
        one_each(HOME, EAST),
        [[HOME], [EAST], []],
        [[HOME], [EAST, EAST], [HOME]],
        [[HOME], [EAST], [HOME], [HOME]],
        [[HOME], ["go east.", EAST], [HOME]],
        [[HOME], [EAST, "go west."], [HOME]],
        [],
    ):
        marks = check_explore(meaning, answers)
        assert not marks["steps"] and not marks["whole"]
    assert check_explore(meaning, one_each(HOME, EAST))["view"] == 0.5
    assert check_explore(meaning, [])["view"] == 0.0
    assert check_explore(meaning, [[HOME], [ImageThought("back"), EAST], [HOME]])["whole"]


def test_free_walks_are_read_from_their_sentences():
    meaning = replace(told(["east", "west"]), moves=None)
    assert check_explore(meaning, [[HOME, "go east.", EAST, "go west.", HOME]])["whole"]
    cases = {
        "unread": ([HOME, "walk east.", EAST, "go south.", picture(WORLD, (2, 1))], 0.5, 0.5, True),
        "silent": ([HOME, EAST, "go south.", picture(WORLD, (2, 1))], 0.5, 0.5, True),
        "short": ([HOME, "go east.", EAST], 0.5, 0.5, False),
        "unshown": ([HOME, "go east.", EAST, "go west."], 0.5, 0.5, False),
        "long": ([HOME, "go east.", EAST, "go west.", HOME, "go east.", EAST], 1.0, 1.0, False),
        "elsewhere": ([HOME, "go east.", EAST, "go west.", EAST], 1.0, 0.5, True),
        "no start": (["go east.", EAST, "go west.", HOME], 1.0, 1.0, False),
    }
    for name, (pieces, legal, view, steps) in cases.items():
        marks = check_explore(meaning, [pieces])
        assert (marks["moves_legal"], marks["view"], marks["steps"]) == (legal, view, steps), name
        assert not marks["whole"], name


def test_a_free_walk_against_the_border_is_not_legal():
    corner = picture(WORLD, (0, 0))
    meaning = replace(told(["north"], (0, 0)), moves=None)
    marks = check_explore(meaning, [[corner, "go north.", corner]])
    assert marks["moves_legal"] == 0.0 and marks["border"] == marks["view"] == 1.0 and not marks["whole"]
