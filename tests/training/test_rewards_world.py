"""The world's checkers as a reward: right answers are worth 1 at every task, wrong ones what their marks say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from emu35.segments_emu35 import GlobalThought, Image, ImageThought, Text
from emu35.training import shapes
from emu35.training.play import said
from emu35.training.rewards import PARTIAL_CREDIT, Component, RewardMix, WorldReward, check_answer
from emu35.training.shapes import EPISODES, Frame, Question, Scene, SceneObject, caption, sample_scene, to_image

RING = SceneObject("ring", "red", "small", 0, 0)


def image_of(frame):
    return Image(torch.zeros(0, 0, dtype=torch.long), to_image(frame))


def segments_of(turn):
    """The right answer as segments, as a rollout hands them over."""
    kinds = {Frame: image_of, Scene: image_of, str: Text}
    kinds[shapes.GlobalThought] = lambda thought: GlobalThought([Text(thought.text)])
    kinds[shapes.ImageThought] = lambda thought: ImageThought(thought.text)
    return [kinds[type(piece)](piece) for piece in turn.content]


def ask(reward, task, meanings, **columns):
    number = len(meanings)
    return reward(["p"] * number, [""] * number, task=[task] * number, meaning=meanings, **columns)


def draw(kind, number=4, seed=0, **settings):
    rng = np.random.default_rng(seed)
    return [EPISODES[kind].sample(rng, **settings) for _ in range(number)]


@pytest.mark.parametrize("kind", sorted(EPISODES))
def test_right_answers_are_worth_one_and_no_answer_next_to_nothing(kind):
    episodes = draw(kind)
    task = "vqa" if kind == "multi_vqa" else kind
    reward = WorldReward()
    right = [[segments_of(turn) for turn in episode.answers] for episode in episodes]
    meanings = [episode.meaning for episode in episodes]
    assert ask(reward, task, meanings, segments=right) == [1.0] * 4
    assert max(ask(reward, task, meanings, segments=[[]] * 4)) == 0.0
    assert reward.num_failures == 0
    aspects, whole = PARTIAL_CREDIT[task]
    marks = check_answer(task, meanings[0], [[]])
    assert {*aspects, whole} <= set(marks)


def test_a_single_turn_needs_no_list_of_turns():
    episodes = draw("story")
    turns = [segments_of(episode.answers[0]) for episode in episodes]
    assert ask(WorldReward(), "story", [episode.meaning for episode in episodes], segments=turns) == [1.0] * 4


def test_drawings():
    scene = Scene((RING, SceneObject("square", "blue", "large", 2, 2)), "black")
    wrong_color = replace(scene, objects=(replace(RING, color="green"), scene.objects[1]))
    prompt = "a small red ring and a large blue square"
    pictures = [
        [to_image(scene)],
        [to_image(wrong_color)],
        [],
        [to_image(scene)] * 2,
        [to_image(scene).resize((32, 32))],
    ]
    values = ask(WorldReward(), "t2i", [prompt] * 5, images=pictures)
    # object 1/2, count 1, colour 1/2, shape 1, size 1; nothing is said of places, relations and the background
    assert values == pytest.approx([1.0, (0.5 + 1 + 0.5 + 1 + 1) / 5 / 2, 0.0, 0.0, 0.0])
    assert ask(WorldReward(whole_weight=0.0), "t2i", [prompt], images=pictures[1:2]) == [pytest.approx(0.8)]
    assert ask(WorldReward(whole_weight=1.0), "t2i", [prompt] * 2, images=pictures[:2]) == [1.0, 0.0]


def test_the_example_of_the_docstring():
    blue_ring = Frame((replace(RING, color="blue"),), "white")
    assert ask(WorldReward(), "t2i", ["a red ring"], images=[[to_image(blue_ring)]]) == [0.25]


def test_a_meaning_is_as_good_as_its_caption():
    rng = np.random.default_rng(3)
    scene = sample_scene(rng, 3)
    said = caption(scene, rng, full=True)
    other = [[to_image(sample_scene(rng, 2))]]
    assert ask(WorldReward(), "t2i", [said.meaning], images=other) == ask(
        WorldReward(), "t2i", [said.text], images=other
    )


def test_edits():
    source = Scene((RING, SceneObject("square", "blue", "large", 2, 2)), "black")
    meaning = shapes.edits.EditMeaning((source,), placed=(replace(RING, color="green"),))
    done = replace(source, objects=(replace(RING, color="green"), source.objects[1]))
    careless = replace(done, background="white")  # edited, but one of three other things has changed
    images = [[to_image(one)] for one in (done, source, careless)]
    columns = {"images": [*images, []]}
    assert ask(WorldReward(), "x2i", [meaning] * 4, **columns) == pytest.approx([1.0, 0.25, 5 / 12, 0.0])
    kept = WorldReward(["preservation"])
    assert kept.name == "world_preservation"
    assert ask(kept, "x2i", [meaning] * 4, **columns) == pytest.approx([1.0, 1.0, 2 / 3, 0.0])


@pytest.mark.parametrize(
    ("text", "value"), [("red", 1.0), (" Red ", 1.0), ("red.", 0.0), ("red ring", 0.0), ("", 0.0), (None, 0.0)]
)
def test_answers(text, value):
    questions = [Question("what color is the ring?", "red", "colour"), "red"]
    assert ask(WorldReward(), "vqa", questions, texts=[text] * 2) == [value] * 2


def test_stories_by_their_marks():
    (episode,) = draw("story", 1, seed=2)
    right = segments_of(episode.answers[0])
    images = [index for index, segment in enumerate(right) if segment.kind == "image"]
    copies = [right[images[0]] if segment.kind == "image" else segment for segment in right]
    lost = [replace(segment, image=None) if index == images[-1] else segment for index, segment in enumerate(right)]
    reward, character = WorldReward(), WorldReward(["character", "world"], name="narrative")
    number = len(images)
    marks = check_answer("story", episode.meaning, [[said(segment) for segment in lost]])
    assert marks["character"] == (number - 1) / number and marks["frames"]
    partial = (marks["narration"] + marks["character"] + marks["world"] + 1) / 4 / 2
    values = ask(reward, "story", [episode.meaning] * 2, segments=[lost, copies])
    assert values[0] == pytest.approx(partial) and values[1] < 0.5
    assert ask(character, "story", [episode.meaning] * 2, segments=[lost, copies]) == pytest.approx(
        [(marks["character"] + marks["world"]) / 2, 1.0]
    )


def test_plans_get_credit_for_legal_steps():
    episode = next(episode for episode in draw("vla", 20) if episode.kind == "4_subtasks")
    right = segments_of(episode.answers[0])
    half = right[:5]  # the thought, and two of four sub-tasks
    assert ask(WorldReward(), "vla", [episode.meaning], segments=[half]) == [pytest.approx((0.5 + 0) / 2 / 2)]


def test_marks_that_do_not_apply_give_none():
    reward = WorldReward(["background"])
    images = [[to_image(Frame((RING,), "white"))]] * 2
    assert ask(reward, "t2i", ["a red ring", "a red ring on a black background"], images=images) == [None, 0.0]


def test_unreadable_prompts_fail_alone():
    reward = WorldReward()
    images = [[to_image(Frame((RING,), "white"))]] * 3
    assert ask(reward, "t2i", ["a red ring", "a red unicorn", None], images=images) == [1.0, None, None]
    assert reward.num_failures == 1


def test_all_tasks_in_one_batch_through_the_mix():
    """Routed, on one scale, and a component for what edits keep."""
    edit, story = draw("x2i", 1)[0], draw("story", 1)[0]
    copy = edit.meaning.sources[0]
    mix = RewardMix([WorldReward(), Component(WorldReward(["preservation"]), 0.5, tasks=["x2i"])])
    values = mix(
        ["p"] * 4,
        [""] * 4,
        task=["t2i", "x2i", "vqa", "story"],
        meaning=["a red ring", edit.meaning, "red", story.meaning],
        segments=[
            [image_of(Frame((RING,), "white"))],
            [image_of(copy)],
            [Text("blue")],
            segments_of(story.answers[0]),
        ],
    )
    # the copy: (0 + 1) / 2 / 2 of the world's, all of what is kept
    assert values == pytest.approx([10.0, (3.25 + 0.5 * 10) / 1.5, 1.0, 10.0])
    assert mix.report["world_preservation"].num_samples == 1


def test_bad_input_is_refused():
    for marks in (["colors"], [], "colour"):
        with pytest.raises(ValueError, match="`marks` must be a list of"):
            WorldReward(marks)
    with pytest.raises(ValueError, match=r"`whole_weight` must be in \[0, 1\], got 2"):
        WorldReward(whole_weight=2)
    with pytest.raises(ValueError, match=r"`task` must be one of t2i, .*, got 'drawing'"):
        ask(WorldReward(), "drawing", ["a red ring"], images=[[]])
    with pytest.raises(ValueError, match="needs the column `segments` for the task 'story'"):
        ask(WorldReward(), "story", [draw("story", 1)[0].meaning], images=[[]])
    with pytest.raises(ValueError, match="needs the column `texts` for the task 'vqa'"):
        ask(WorldReward(), "vqa", ["red"], images=[[]])
    with pytest.raises(ValueError, match="needs the column `meaning`"):
        WorldReward()(["p"], [""], task=["t2i"], images=[[]])
