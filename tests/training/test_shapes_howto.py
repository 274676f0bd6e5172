"""How-tos: plans are the shortest, right ones are marked right, and each kind of damage shows where it should."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from emu35.training.shapes import (
    COLORS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    Described,
    Frame,
    GlobalThought,
    ImageThought,
    SceneObject,
    meaning_of,
    parse_caption,
    position_cell,
    render,
    sample_scene,
)
from emu35.training.shapes.howto import (
    HowtoMeaning,
    Step,
    apply_step,
    check_howto,
    instruct,
    parse_step,
    sample_howto,
    shortest_plan,
)

RIGHT = {"legal": 1.0, "goal": True, "plan": True}


def howtos(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_howto(rng, **kwargs) for _ in range(number)]


def said(pieces):
    return [[render(piece) if isinstance(piece, Frame) else piece for piece in pieces]]


def frame(**things):
    """`frame(small_red_circle="top left")`: objects by look and position, on navy, in reading order."""
    objects = [
        SceneObject(shape, color, size, *position_cell(position))
        for (size, color, shape), position in ((look.split("_"), at) for look, at in things.items())
    ]
    return Frame(tuple(sorted(objects, key=lambda o: (o.row, o.column))), "navy")


def follow(start, texts):
    """The frames that instructions lead to."""
    frames = []
    for text in texts:
        start = apply_step(parse_step(text)[1], start)
        frames.append(start)
    return frames


def marks(meaning, texts, frames):
    return check_howto(meaning, said([piece for pair in zip(texts, frames, strict=True) for piece in pair]))


def build():
    """A prompt and a right answer from nothing."""
    goal = frame(small_red_circle="top left", large_blue_square="center", small_green_ring="right")
    texts = [
        "step one: put a small red circle in the top left.",
        "step two: put a large blue square in the center.",
        "step three: put a small green ring on the right.",
    ]
    meaning = HowtoMeaning(frame(), goal)
    return meaning, texts, follow(meaning.start, texts)


def repair():
    """A prompt and a right answer that uses each verb."""
    start = frame(small_red_circle="top left", large_pink_square="center", small_green_ring="right")
    goal = frame(small_red_circle="top", large_blue_square="center", large_green_ring="right")
    texts = [
        "step one: remove the small green ring.",
        "step two: paint the large pink square blue.",
        "step three: move the small red circle to the top.",
        "step four: put a large green ring on the right.",
    ]
    return HowtoMeaning(start, goal), texts, follow(start, texts)


@pytest.mark.parametrize("held_out", [False, True, None])
def test_sampled_howtos_are_right(held_out):
    for episode in howtos(150, held_out=held_out):
        assert check_howto(episode.meaning, said(episode.answers[0].content)) == RIGHT


def test_what_a_howto_is_made_of():
    kinds = set()
    for episode in howtos(300):
        (user, answer), meaning = episode.turns, episode.meaning
        source, steps = episode.kind.rsplit("_", 1)
        kinds.add(episode.kind)
        assert episode.task == "howto" and len(answer.frames) == int(steps)
        assert [type(piece) for piece in answer.content] == [GlobalThought, *[str, Frame] * int(steps)]
        assert answer.frames[-1] == meaning.goal
        caption = user.content[0].removeprefix("how do i build: ").removesuffix("?")
        assert parse_caption(caption) == meaning_of(meaning.goal)
        assert user.content[1:] == ((meaning.start,) if source == "from_image" else ())
        assert bool(meaning.start.objects) == (source == "from_image")
        seen = ", ".join(f"{o.size} {o.color} {o.shape} {o.position}" for o in meaning.start.objects)
        assert answer.content[0].text.startswith(f"{seen}. " if seen else "put ")
        plan, instructions = answer.content[0].text.removeprefix(f"{seen}. "), answer.content[1::2]
        deeds = plan.removesuffix(".").split(", ")
        assert len(deeds) == int(steps)
        for deed, text in zip(deeds, instructions, strict=True):
            verb, thing = deed.split(" the ")
            step = parse_step(text)[1]
            assert (verb, *thing.split()) == (step.verb, step.thing.color, step.thing.shape)
    assert kinds == {*(f"from_nothing_{n}" for n in (1, 2, 3)), *(f"from_image_{n}" for n in (1, 2, 3, 4))}


def test_held_out_pairs():
    def pairs(episode):
        return {(o.color, o.shape) for turn in episode.turns for frame in turn.frames for o in frame.objects}

    assert all(pairs(episode).isdisjoint(HELD_OUT) for episode in howtos(400))
    assert not any(pairs(episode).isdisjoint(HELD_OUT) for episode in howtos(100, held_out=True))


def test_the_generator_alone_decides():
    assert howtos(20, seed=5) == howtos(20, seed=5) != howtos(20, seed=6)


def test_difficulty_bounds_the_steps():
    assert {episode.kind for episode in howtos(60, difficulty=0.1)} == {"from_nothing_1", "from_image_1"}
    assert max(len(episode.answers[0].frames) for episode in howtos(150, difficulty=0.5)) == 3
    for difficulty in (0, -1, 1.1):
        with pytest.raises(ValueError, match="difficulty"):
            sample_howto(np.random.default_rng(0), difficulty=difficulty)


# -------------------------------------------------------------------------------------------------------- the plan


def neighbours(start, looks):
    """All frames one legal step away, with what the looks in question allow; written without `apply_step`."""
    cells = {(o.row, o.column) for o in start.objects}
    free = [cell for cell in itertools.product(range(3), repeat=2) if cell not in cells]
    found = {frozenset({*start.objects, SceneObject(*look, *cell)}) for look in looks for cell in free}
    for o in start.objects:
        kept = frozenset(start.objects) - {o}
        found.add(kept)
        found |= {kept | {replace(o, row=row, column=column)} for row, column in free}
        found |= {kept | {replace(o, color=color)} for _, color, _ in looks if color != o.color}
    return {Frame(tuple(sorted(objects, key=lambda o: (o.row, o.column))), start.background) for objects in found}


def reached(start, looks, steps):
    frames = {start}
    for _ in range(steps):
        frames |= {near for one in frames for near in neighbours(one, looks)}
    return frames


def assert_shortest(start, goal):
    plan, shown = shortest_plan(start, goal), start
    for step in plan:
        shown = apply_step(step, shown)
    assert shown == goal
    looks = {(o.shape, o.color, o.size) for o in (*start.objects, *goal.objects)}
    # one step fewer must not do: the frames near the start and the frames near the goal do not meet
    fewer = len(plan) - 1
    ahead = fewer // 2
    assert fewer < 0 or reached(start, looks, ahead).isdisjoint(reached(goal, looks, fewer - ahead))


def test_sampled_plans_are_the_shortest():
    for episode in howtos(50, seed=1):
        assert_shortest(episode.meaning.start, episode.meaning.goal)


@pytest.mark.parametrize(
    "start, goal, steps",
    [
        (frame(small_red_ring="top"), frame(small_red_ring="top"), 0),
        (frame(small_red_ring="top"), frame(large_red_ring="top"), 2),
        (frame(small_red_ring="top"), frame(small_blue_ring="left"), 2),
        (frame(small_red_ring="top", small_blue_ring="left"), frame(small_blue_ring="top", small_red_ring="left"), 2),
        (
            frame(small_red_ring="top", small_blue_cross="left"),
            frame(small_blue_cross="top", small_red_ring="left"),
            3,
        ),
        (frame(small_red_ring="top", small_blue_cross="left"), frame(small_red_ring="left"), 2),
        (
            frame(small_red_ring="top", small_blue_cross="left"),
            frame(small_red_ring="left", small_blue_cross="right"),
            2,
        ),
        (
            frame(small_red_ring="top", small_blue_cross="left", large_red_ring="right"),
            frame(small_red_ring="left", small_blue_cross="right", large_red_ring="top"),
            4,
        ),
    ],
    ids=["nothing", "resize", "paint-and-move", "paint-both", "swap", "remove-first", "free-first", "ring-of-three"],
)
def test_shortest_plans(start, goal, steps):
    assert len(shortest_plan(start, goal)) == steps
    assert_shortest(start, goal)


def test_plans_between_any_two_scenes_reach_the_goal():
    rng = np.random.default_rng(3)
    for _ in range(300):
        start, goal = (Frame(sample_scene(rng).objects, "navy") for _ in range(2))
        shown = start
        for step in shortest_plan(start, goal):
            assert parse_step(instruct(1, step)) == (1, step)
            shown = apply_step(step, shown)
        assert shown == goal


def test_no_step_changes_the_background():
    with pytest.raises(ValueError, match="background"):
        shortest_plan(frame(), Frame((), "white"))


# ----------------------------------------------------------------------------------------------------- the checker


@pytest.mark.parametrize("prompt", [build, repair])
def test_answers_by_hand(prompt):
    meaning, texts, frames = prompt()
    assert marks(meaning, texts, frames) == RIGHT
    pieces = [piece for pair in zip(texts, frames, strict=True) for piece in pair]
    thought = [GlobalThought("put it."), pieces[0], ImageThought("a ring"), *pieces[1:]]
    assert check_howto(meaning, said(thought)) == RIGHT


def test_another_plan_is_as_good():
    meaning, texts, _ = build()
    texts = [
        "step one: put a small red circle in the top left.",
        "step two: put a small green ring on the right.",
        "step three: put a large pink square in the middle.",
        "step four: paint the square blue.",
    ]
    assert marks(meaning, texts, follow(meaning.start, texts)) == RIGHT
    texts[3:] = ["step four: remove the square.", "step five: put a large blue square in the center."]
    assert marks(meaning, texts, follow(meaning.start, texts)) == RIGHT  # two more than necessary
    texts[4:] = [
        "step five: put a large blue square at the top.",
        "step six: move the blue square to the center.",
    ]
    assert marks(meaning, texts, follow(meaning.start, texts)) == RIGHT | {"plan": False}  # three more


def test_a_wrong_color_in_one_frame():
    meaning, texts, frames = repair()
    frames[1] = Frame(tuple(replace(o, color="cyan") if o.shape == "square" else o for o in frames[1].objects), "navy")
    # step two did not show its result, and step three repaints what it does not name
    assert marks(meaning, texts, frames) == {"legal": 0.5, "goal": True, "plan": False}
    _, _, frames = repair()
    frames[3] = Frame(tuple(replace(o, color="cyan") if o.shape == "ring" else o for o in frames[3].objects), "navy")
    assert marks(meaning, texts, frames) == {"legal": 0.75, "goal": False, "plan": False}


def test_the_frames_are_the_world():
    """What a picture shows counts, not what an instruction wanted: a plan may go on from its own mistake."""
    meaning, texts, frames = build()
    frames[1] = frame(small_red_circle="top left", large_pink_square="center")
    texts[2:] = ["step three: paint the large pink square blue.", "step four: put a small green ring on the right."]
    frames[2:] = follow(frames[1], texts[2:])
    assert marks(meaning, texts, frames) == {"legal": 0.75, "goal": True, "plan": False}


@pytest.mark.parametrize("index", range(4))
def test_another_background_in_one_frame(index):
    meaning, texts, frames = repair()
    frames[index] = Frame(frames[index].objects, "black")
    last = index == 3
    assert marks(meaning, texts, frames) == {"legal": 0.75 if last else 0.5, "goal": not last, "plan": False}


def test_steps_out_of_order():
    meaning, texts, frames = build()
    swapped = [texts[1], texts[0], texts[2]]
    frames = follow(meaning.start, swapped)
    # the deeds are legal in this order, but their numbers are not
    assert marks(meaning, swapped, frames) == {"legal": 1 / 3, "goal": True, "plan": False}
    numbered = [
        text.replace(old, new) for text, old, new in zip(swapped, ("two", "one"), ("one", "two"), strict=False)
    ]
    assert marks(meaning, [*numbered, texts[2]], frames) == RIGHT


def test_an_instruction_that_belongs_to_another_frame():
    meaning, texts, frames = build()
    exchanged = [texts[0], texts[2].replace("three", "two"), texts[1].replace("two", "three")]
    assert marks(meaning, exchanged, frames) == {"legal": 1 / 3, "goal": True, "plan": False}


def test_a_missing_last_step():
    for prompt, legal in ((build, 2 / 3), (repair, 3 / 4)):
        meaning, texts, frames = prompt()
        assert marks(meaning, texts[:-1], frames[:-1]) == {"legal": legal, "goal": False, "plan": False}
        # the instruction alone is a step that was not made
        pieces = [piece for pair in zip(texts, frames, strict=True) for piece in pair]
        assert check_howto(meaning, said(pieces[:-1])) == {"legal": legal, "goal": False, "plan": False}
        assert check_howto(meaning, [*said(pieces[:-1]), [None]]) == {"legal": legal, "goal": False, "plan": False}


def test_a_damaged_picture_costs_the_steps_on_both_sides():
    meaning, texts, frames = repair()
    answer = said([piece for pair in zip(texts, frames, strict=True) for piece in pair])
    answer[0][3] = None
    assert check_howto(meaning, answer) == {"legal": 0.5, "goal": True, "plan": False}
    answer[0][3] = render(frames[1])
    answer[0][3][32:40, :8] = 255  # one patch that is nothing
    assert check_howto(meaning, answer) == {"legal": 0.5, "goal": True, "plan": False}


def test_an_extra_frame():
    meaning, texts, frames = build()
    pieces = [piece for pair in zip(texts, frames, strict=True) for piece in pair]
    assert check_howto(meaning, said([*pieces, frames[-1]])) == {"legal": 0.75, "goal": True, "plan": False}
    assert check_howto(meaning, said([*pieces, "done."])) == {"legal": 0.75, "goal": True, "plan": False}


@pytest.mark.parametrize("answers", [[], [[]], [["step one: put a small red circle in the top left."]]])
def test_no_picture_at_all(answers):
    assert check_howto(build()[0], answers) == {"legal": 0.0, "goal": False, "plan": False}


START = frame(small_red_circle="top left", large_red_circle="center", small_blue_ring="right")


@pytest.mark.parametrize(
    "text, result",
    [
        ("put a small pink cross at the top", START.objects + frame(small_pink_cross="top").objects),
        ("put a small pink cross in the center", None),  # occupied
        ("remove the ring", START.objects[:2]),
        ("remove the circle", None),  # fits two
        ("remove the square", None),  # fits none
        ("remove the red circle in the center", (START.objects[0], START.objects[2])),
        ("remove the red circle at the top", None),
        (
            "move the large circle to the bottom",
            (START.objects[0], *START.objects[2:], *frame(large_red_circle="bottom").objects),
        ),
        ("move the large circle to the right", None),  # occupied
        ("move the large circle to the center", None),  # by itself
        ("paint the blue ring pink", START.objects[:2] + frame(small_pink_ring="right").objects),
        ("paint the blue ring blue", None),  # changes nothing
    ],
)
def test_what_is_legal(text, result):
    after = apply_step(parse_step(f"step one: {text}.")[1], START)
    assert after == (result and Frame(tuple(sorted(result, key=lambda o: (o.row, o.column))), "navy"))
    # the same, seen through pixels
    shown = after or START
    legal = marks(HowtoMeaning(START, shown), [f"step one: {text}."], [shown])["legal"]
    assert legal == (after is not None)


# ------------------------------------------------------------------------------------------------ the instructions


def test_instructions_round_trip():
    things = [
        Described(shape, color, size, position)
        for shape in SHAPES
        for color in (None, "red")
        for size in (None, "large")
        for position in (None, *POSITIONS)
    ]
    steps = [Step("remove", thing) for thing in things]
    steps += [Step("move", thing, position) for thing in things[::3] for position in POSITIONS]
    steps += [Step("paint", thing, color) for thing in things[::3] for color in COLORS]
    steps += [Step("put", Described("ring", c, s, p)) for c, s, p in itertools.product(COLORS, SIZES, POSITIONS)]
    for index, step in enumerate(steps):
        number = 1 + index % 9
        assert parse_step(instruct(number, step)) == (number, step)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "put a small red circle at the top.",
        "step one: put a small red circle at the top",
        "Step one: put a small red circle at the top.",
        "step 1: put a small red circle at the top.",
        "step zero: put a small red circle at the top.",
        "step ten: put a small red circle at the top.",
        "step one put a small red circle at the top.",
        "step one: put a small red circle.",
        "step one: put a red circle at the top.",
        "step one: put a small circle at the top.",
        "step one: put the small red circle at the top.",
        "step one: put a red small circle at the top.",
        "step one: put a tiny red circle at the top.",
        "step one: put a small red circle in the top.",
        "step one: put a small red circle to the top.",
        "step one: put a small red circle at the top. ",
        "step one: put a small red circle at the top. step two: remove the ring.",
        "step one: put a small navy circle at the top.",
        "step one: remove a small red circle.",
        "step one: remove the object.",
        "step one: remove the red.",
        "step one: remove the circles.",
        "step one: remove the circle to the top.",
        "step one: remove the circle red.",
        "step one: move the circle.",
        "step one: move the circle at the top.",
        "step one: move the circle up.",
        "step one: move the circle to the middle.",
        "step one: move the circle to the top red.",
        "step one: paint the circle.",
        "step one: paint the circle navy.",
        "step one: paint the circle to the top.",
        "step one: paint the circle small.",
        "step one: resize the circle.",
    ],
)
def test_other_instructions_are_refused(text):
    with pytest.raises(ValueError, match="Cannot read"):
        parse_step(text)
