"""Blocks: plans are legal and shortest, right answers are marked right, each kind of damage flips the right mark."""

import itertools
import re

import numpy as np
import pytest
from emu35.training.shapes import HELD_OUT, Frame, GlobalThought, SceneObject, read_scene, render
from emu35.training.shapes.vla import (
    BLOCK_COLORS,
    BlocksState,
    Pick,
    Place,
    Stands,
    VlaMeaning,
    apply_subtask,
    check_vla,
    goal_holds,
    goal_text,
    instruct_subtask,
    parse_subtask,
    read_state,
    sample_vla,
    shortest_plan,
    state_frame,
)

KINDS = ("2_subtasks", "4_subtasks", "6_subtasks", "start_held")
SENTENCES = {
    **{f"pick up the {color} block.": Pick(color) for color in BLOCK_COLORS},
    **{f"place it on the {color} block.": Place(color) for color in BLOCK_COLORS},
    "place it on the floor on the left.": Place(0),
    "place it on the floor in the center.": Place(1),
    "place it on the floor on the right.": Place(2),
}


def tasks(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_vla(rng, **kwargs) for _ in range(number)]


def said(episode):
    return [[render(p) if isinstance(p, Frame) else p for p in turn.content] for turn in episode.answers]


def grid(frame):
    """Rows of letters: O and X the open and the closed gripper, a block's first letter, "." nothing."""
    rows = [["."] * 3 for _ in range(3)]
    for o in frame.objects:
        assert o.size == "large"
        if o.color == "pink":
            rows[o.row][o.column] = {"ring": "O", "circle": "X"}[o.shape]
        else:
            assert o.shape == "square"
            rows[o.row][o.column] = o.color[0]
    return ["".join(row) for row in rows]


LETTERS = {"r": "red", "g": "green", "b": "blue", "y": "yellow"}


def frame(drawing, background="gray"):
    """The inverse of `grid`, for the colours of `LETTERS`."""
    objects = []
    for row, line in enumerate(drawing.split()):
        for column, letter in enumerate(line):
            if letter in "OX":
                objects.append(SceneObject("ring" if letter == "O" else "circle", "pink", "large", row, column))
            elif letter != ".":
                objects.append(SceneObject("square", LETTERS[letter], "large", row, column))
    return Frame(tuple(objects), background)


def state(drawing):
    return read_state(read_scene(render(frame(drawing))))


def pieces(*answer, background="gray"):
    """Sentences and drawings, by turns, as one answer."""
    return [[p if i % 2 == 0 else render(frame(p, background)) for i, p in enumerate(answer)]]


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_are_marked_right(kind):
    lengths = set()
    for episode in tasks(60, kind=kind):
        assert (episode.task, episode.kind, len(episode.turns)) == ("vla", kind, 2)
        assert check_vla(episode.meaning, said(episode)) == {"legal": 1.0, "goal": True, "success": True}
        lengths.add(len(episode.answers[0].content) // 2)
        text, first = episode.turns[0].content
        assert read_state(read_scene(render(first))) == episode.meaning.state
        assert text == goal_text(episode.meaning.goal) and re.fullmatch(r"put the [a-z ]+\.", text)
    assert lengths == ({1, 3, 5} if kind == "start_held" else {int(kind[0])})


def test_key_frames_follow_physics():
    for episode in tasks(150, seed=1):
        frames = [f for turn in episode.turns for f in turn.frames]
        blocks = sorted(set("".join(grid(frames[0]))) - set(".OX"))
        assert len({f.background for f in frames}) == 1
        for f in frames:
            rows = grid(f)
            assert len(rows[0].strip(".")) == 1 and rows[0].strip(".") in "OX"
            assert sorted(set("".join(rows[1:])) - {"."}) == blocks
            floating = [c for c in range(3) if rows[1][c] != "." and rows[2][c] == "."]
            gripper = rows[0].index(rows[0].strip("."))
            assert floating in ([], [gripper]) and (not floating or rows[0][gripper] == "X")
            assert rows[0][gripper] == "O" or rows[1][gripper] != "."
        # open and closed by turns, and the goal's letters where it says they are
        grips = ["".join(grid(f)[0]).strip(".") for f in frames]
        assert all(a != b for a, b in itertools.pairwise(grips)) and grips[-1] == "O"
        rows = grid(frames[-1])
        text = episode.turns[0].content[0]
        for block, below in re.findall(r"the (\w)\w+ block on the (\w)\w+ block", text):
            assert any(rows[1][c] == block and rows[2][c] == below for c in range(3))
        for block, place in re.findall(r"the (\w)\w+ block on the floor \w+ the (\w+)", text):
            assert rows[2][["left", "center", "right"].index(place)] == block


def test_plans_are_the_shortest():
    for episode in tasks(60, seed=2):
        meaning, least = episode.meaning, len(episode.answers[0].content) // 2
        reached = {meaning.state}
        for _ in range(least):
            assert not any(goal_holds(meaning.goal, s) for s in reached)
            after = (apply_subtask(subtask, s) for s in reached for subtask in SENTENCES.values())
            reached = {s for s in after if s is not None}
        assert any(goal_holds(meaning.goal, s) for s in reached)


def test_of_several_shortest_plans_the_leftmost_is_chosen():
    start = state("O.. r.. b..")  # red may stand aside in the center or on the right
    assert shortest_plan(start, [Stands("blue", "red")]) == [Pick("red"), Place(1), Pick("blue"), Place("red")]
    with pytest.raises(ValueError, match="`goal`"):
        shortest_plan(start, [Stands("red", "blue"), Stands("blue", "red")])


def test_difficulty_bounds_blocks_and_subtasks():
    def sizes(difficulty):
        episodes = tasks(100, difficulty=difficulty)
        blocks = {len(e.turns[0].frames[0].objects) - 1 for e in episodes}
        return max(blocks), max(len(e.answers[0].content) // 2 for e in episodes), {e.kind for e in episodes}

    assert sizes(0.1) == (1, 2, {"2_subtasks", "start_held"})
    assert sizes(0.5) == (2, 4, {"2_subtasks", "4_subtasks", "start_held"})
    assert sizes(1.0) == (3, 6, set(KINDS))
    assert tasks(1, difficulty=0.1, kind="6_subtasks")[0].kind == "6_subtasks"


def test_purple_blocks_are_held_out():
    def purple(episode):
        return any(o.color == "purple" for o in episode.turns[0].frames[0].objects)

    assert ("purple", "square") in HELD_OUT and "purple" in BLOCK_COLORS and "pink" not in BLOCK_COLORS
    assert not any(purple(e) for e in tasks(100, held_out=False))
    assert all(purple(e) for e in tasks(50, held_out=True))
    assert 0 < sum(purple(e) for e in tasks(50, held_out=None)) < 50


def test_same_seed_same_task():
    assert tasks(20, seed=3) == tasks(20, seed=3)
    assert tasks(20, seed=3) != tasks(20, seed=4)


@pytest.mark.parametrize("arguments", [{"difficulty": 0}, {"difficulty": 2}, {"kind": "5_subtasks"}])
def test_bad_arguments_are_named(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"`{name}` must be .*{value}"):
        sample_vla(np.random.default_rng(0), **arguments)


def test_parse_subtask_reads_its_sentences_only():
    for text, subtask in SENTENCES.items():
        assert parse_subtask(text) == subtask and instruct_subtask(subtask) == text
    for text in (
        "",
        "pick up the pink block.",
        "pick up the red block",
        "pick up the red square.",
        "Pick up the red block.",
        "place it on the floor.",
        "place it on the floor at the top.",
        "place the red block on the blue block.",
        "place it on the red block. ",
        "pick up the red block. place it on the blue block.",
    ):
        with pytest.raises(ValueError, match="Cannot read"):
            parse_subtask(text)


@pytest.mark.parametrize(
    ("drawing", "columns", "gripper", "held"),
    [
        ("O.. ... r..", (("red",), (), ()), 0, None),
        (".O. .r. .b.", ((), ("blue", "red"), ()), 1, None),
        (".X. .r. .b.", ((), ("blue",), ()), 1, "red"),
        ("..X b.r g..", (("green", "blue"), (), ()), 2, "red"),
    ],
)
def test_states_are_read(drawing, columns, gripper, held):
    assert state(drawing) == BlocksState(columns, gripper, held)
    assert grid(state_frame(state(drawing), "gray")) == drawing.split()


@pytest.mark.parametrize(
    "drawing",
    [
        "O.. .r. ...",  # floats
        "X.. ... r..",  # closed on nothing
        "O.. r.. ...",  # an open gripper holds nothing
        "X.. .r. .b.",  # closed beside a tower
        "X.. rb. ...",  # two blocks in the air
        "OO. ... r..",  # two grippers
        "... ... r..",  # none
        "... O.. .r.",  # off its rail
        "O.. ... rr.",  # the same block twice
        "Or. ... .b.",  # a block on the rail
        "X.. r.. r..",
    ],
)
def test_what_is_not_physical_is_no_state(drawing):
    assert state(drawing) is None


@pytest.mark.parametrize(
    "look", [("square", "red", "small"), ("circle", "red", "large"), ("square", "pink", "large"), ("ring",) * 0]
)
def test_other_objects_are_no_state(look):
    pixels = render(frame("O.. ... .r."))
    if look:
        extra = SceneObject(*look, 2, 2)
        pixels = render(Frame((*frame("O.. ... .b.").objects, extra), "gray"))
    else:
        pixels[32:40, 32:40] = 0  # a quarter of a cell is painted over
    assert read_state(read_scene(pixels)) is None


@pytest.mark.parametrize(
    ("drawing", "text", "result"),
    [
        ("O.. r.. bg.", "pick up the red block.", "X.. r.. bg."),
        ("O.. r.. bg.", "pick up the green block.", ".X. rg. b.."),
        ("O.. r.. bg.", "pick up the blue block.", None),  # from under another
        ("O.. r.. bg.", "pick up the yellow block.", None),  # not there
        ("X.. r.. bg.", "pick up the green block.", None),  # two blocks held
        ("O.. r.. bg.", "place it on the green block.", None),  # nothing held
        ("X.. r.. bg.", "place it on the green block.", ".O. .r. bg."),
        ("X.. r.. bg.", "place it on the blue block.", "O.. r.. bg."),
        ("X.. r.. bg.", "place it on the floor on the right.", "..O ... bgr"),
        ("X.. r.. bg.", "place it on the floor in the center.", None),  # taken
        ("X.. r.. bg.", "place it on the red block.", None),  # on itself
        ("X.. rg. .b.", "place it on the floor on the right.", None),  # through a tower
        ("X.. rg. .b.", "place it on the blue block.", None),  # under another
        ("X.. r.g ..b", "place it on the green block.", None),  # on a full column
        ("X.. rg. .b.", "place it on the floor on the left.", "O.. .g. rb."),
        ("..X b.r g..", "place it on the floor in the center.", ".O. b.. gr."),
    ],
)
def test_subtasks_follow_physics(drawing, text, result):
    after = apply_subtask(parse_subtask(text), state(drawing))
    assert after == (None if result is None else state(result))


# ------------------------------------------------------------------------------------------------------------- damage

START = "O.. r.. bg."
MEANING = VlaMeaning((Stands("red", "green"),), state(START), "gray")
PICK, PICKED = "pick up the red block.", "X.. r.. bg."
PLACE, PLACED = "place it on the green block.", ".O. .r. bg."


def test_a_right_plan_and_one_with_a_detour():
    assert check_vla(MEANING, pieces(PICK, PICKED, PLACE, PLACED)) == {"legal": 1.0, "goal": True, "success": True}
    floor = "place it on the floor on the right.", "..O ... bgr"
    detour = (PICK, PICKED, *floor, PICK, "..X ..r bg.", PLACE, PLACED)
    assert check_vla(MEANING, pieces(*detour))["success"]
    back = "place it on the blue block.", START
    marks = check_vla(MEANING, pieces(PICK, PICKED, *back, *detour))
    assert marks == {"legal": 1.0, "goal": True, "success": False}
    thought = [[GlobalThought("uncover"), *pieces(PICK, PICKED, PLACE, PLACED)[0]]]
    assert check_vla(MEANING, thought)["success"]


@pytest.mark.parametrize(
    ("answer", "legal", "goal"),
    [
        ((PICK, PICKED), 0.5, False),  # stops early
        ((PICK, PICKED, "place it on the floor on the right.", "..O ... bgr"), 1.0, False),  # goal missed
        ((PICK, PICKED, PLACE), 0.5, False),  # last frame missing
        ((PICK, PICKED, PLACE, PLACED, PICK), 2 / 3, True),
        ((PICK, "X.. r.. .g.", PLACE, PLACED), 0.0, True),  # a block vanishes and comes back
        ((PICK, ".X. .r. bg.", PLACE, PLACED), 0.5, True),  # lifted elsewhere
        ((PICK, "O.. r.. bg.", PLACE, PLACED), 0.0, True),  # not closed
        ((PICK, ".X. r.. bg.", PLACE, PLACED), 0.0, True),  # not physical: the next can't be legal either
        ((PICK, "X.. r.. b.g", PLACE, PLACED), 0.0, True),  # another block moves with it
        (("pick up the green block.", ".X. rg. b..", PLACE, PLACED), 0.5, True),
        (("lift the red block.", PICKED, PLACE, PLACED), 0.5, True),
        ((PICK, PICKED, "place it on the blue block.", PLACED), 0.5, True),  # the sentence is another
        ((PICK, PICKED, PLACE, ".X. .r. bg."), 0.5, False),  # not let go
        ((PLACE, PLACED), 0.0, True),  # a step is left out
        (("pick up the blue block.", "X.. b.. rg.", PLACE, ".O. .r. bg."), 0.0, True),  # from under another
        ((), 0.0, False),
    ],
)
def test_damage(answer, legal, goal):
    assert check_vla(MEANING, pieces(*answer)) == {"legal": legal, "goal": goal, "success": False}


def test_damaged_pictures_and_other_backgrounds_are_no_state():
    right = pieces(PICK, PICKED, PLACE, PLACED)[0]
    assert check_vla(MEANING, [[*right[:3], None]]) == {"legal": 0.5, "goal": False, "success": False}
    assert check_vla(MEANING, [[right[0], None, *right[2:]]])["legal"] == 0.0
    black = render(frame(PLACED, "black"))
    assert check_vla(MEANING, [[*right[:3], black]]) == {"legal": 0.5, "goal": False, "success": False}
    assert check_vla(MEANING, [])["goal"] is False


def test_no_passing_through_a_tower():
    meaning = VlaMeaning((Stands("red", 2),), state("X.. rg. .b."), "gray")
    marks = check_vla(meaning, pieces("place it on the floor on the right.", "..O .g. .br"))
    assert marks["goal"] and not marks["success"] and marks["legal"] == 0.0
    assert len(shortest_plan(meaning.state, meaning.goal)) > 1


def test_the_thought_says_what_is_there_and_where_each_block_goes():
    for episode in tasks(60, seed=6):
        thought, *content = episode.answers[0].content
        there, goes = thought.text.removesuffix(".").split(". ")
        final = read_state(read_scene(render(content[-1])))
        places = dict(part.split(" ", 1) for part in goes.split(", "))  # of a block moved twice, the last
        for block, place in places.items():
            column = next(column for column in final.columns if block in column)
            below = column[: column.index(block)]
            expected = f"on {below[-1]}" if below else ("left", "center", "right")[final.columns.index(column)]
            assert place == expected
        blocks = {o.color for o in episode.turns[0].frames[0].objects if o.shape == "square"}
        assert {word for word in re.findall(r"\w+", there) if word in BLOCK_COLORS} == blocks


def test_any_state_of_a_plan_is_a_start():
    for episode in tasks(30, seed=5, kind="6_subtasks"):
        answer = said(episode)[0][1:]  # without the thought
        for done in range(1, 6):
            middle = read_state(read_scene(answer[2 * done - 1]))
            meaning = VlaMeaning(episode.meaning.goal, middle, episode.meaning.background)
            assert check_vla(meaning, [answer[2 * done :]])["success"]
            assert len(shortest_plan(middle, meaning.goal)) == 6 - done
