"""Questions about several pictures and conversations: the words of every turn, read here, give its answer."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from emu35.training.shapes import (
    Frame,
    GlobalThought,
    Meaning,
    Question,
    Scene,
    SceneObject,
    describe_text,
    parse_caption,
    read_scene,
    render,
    score,
)
from emu35.training.shapes.dialogue import (
    MULTI_IMAGE_KINDS,
    DialogueMeaning,
    check_dialogue,
    check_multi_image_question,
    describe_change,
    sample_dialogue,
    sample_multi_image_question,
    sample_questions_about_images,
)
from emu35.training.shapes.edits import EditMeaning
from test_shapes_edits import follow
from test_shapes_questions import answer as answer_one
from test_shapes_questions import matches, the

ORDINALS = ("first", "second", "third")


def questions(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_multi_image_question(rng, **kwargs) for _ in range(number)]


def dialogues(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_dialogue(rng, **kwargs) for _ in range(number)]


def parts(episode):
    """The pictures of the one prompt, its question, and the right answer."""
    *scenes, text = episode.turns[0].content
    return scenes, text, episode.turns[1].content[0]


def as_said(turn):
    return [render(piece) if isinstance(piece, Frame) else piece for piece in turn.content]


def answer(scenes, text):
    """The answer by the question's own words."""
    if m := re.fullmatch(r"which image has (more|fewer) objects\?", text):
        numbers = [len(scene.objects) * (1 if m[1] == "more" else -1) for scene in scenes]
        best = [name for name, number in zip(ORDINALS, numbers, strict=False) if number == max(numbers)]
        return best[0] if len(best) == 1 else "the same"
    if m := re.fullmatch(r"which image has a (\w+) background\?", text):
        (only,) = [name for name, s in zip(ORDINALS, scenes, strict=False) if s.background == m[1]]
        return only
    if m := re.fullmatch(r"which image has (an? .*)\?", text):
        (only,) = [name for name, s in zip(ORDINALS, scenes, strict=False) if matches(s, m[1])]
        return only
    m = re.fullmatch(r"(.*) in the (first|second|third) image\?", text)
    return answer_one(scenes[ORDINALS.index(m[2])], f"{m[1]}?")


def undo(text, before):
    """What a scene is after the change that a sentence tells: a set of objects and a background."""
    if m := re.fullmatch(r"the background is now (\w+)\.", text):
        return set(before.objects), m[1]
    if m := re.fullmatch(r"there is now (an? .*)\.", text):
        look = parse_caption(m[1]).objects[0]
        return {*before.objects, SceneObject(look.shape, look.color, look.size, *look.cell)}, before.background
    m = re.fullmatch(r"(the \w+ \w+ \w+) (is gone|moved to the .*|is now (.*))\.", text)
    old = the(before, m[1])
    if m[2] == "is gone":
        new = set()
    elif m[3] is None:
        row, column = parse_caption(f"a circle in {m[2].removeprefix('moved to ')}").objects[0].cell
        new = {replace(old, row=row, column=column)}
    elif " " in m[3]:
        look = parse_caption(m[3]).objects[0]
        new = {SceneObject(look.shape, look.color, look.size, old.row, old.column)}
    else:
        new = {replace(old, **{"size" if m[3] in ("small", "large") else "color": m[3]})}
    return set(before.objects) - {old} | new, before.background


@pytest.mark.parametrize("kind", MULTI_IMAGE_KINDS)
def test_answers_about_several_pictures_are_right_and_unique(kind):
    for episode in questions(300, kind=kind, held_out=None):
        scenes, text, right = parts(episode)
        if kind == "difference":
            before, after = scenes
            assert re.fullmatch(r"what changed( in the second image)?\?", text)
            assert undo(right, before) == (set(after.objects), after.background)
        else:
            assert answer(scenes, text) == right, (text, scenes)
        assert (episode.task, episode.kind) == ("vqa", kind) and episode.meaning == Question(text, right, kind)
        assert check_multi_image_question(episode.meaning, [[right]]) == {"answer": True}


def test_answers_are_balanced():
    def counts(kind, **kwargs):
        return Counter(parts(e)[2] for e in questions(1200, kind=kind, **kwargs))

    for kind, kwargs, names in (
        ("which_image", {"difficulty": 0.4}, ORDINALS[:2]),
        ("more", {}, (*ORDINALS[:2], "the same")),
    ):
        seen = counts(kind, **kwargs)
        assert set(seen) == set(names) and max(seen.values()) < 1.25 * min(seen.values())
    third = counts("which_image")
    assert third["third"] > 0.7 * 1200 / 6  # half of the questions show three pictures
    assert len({text.split()[-1] for text in counts("difference")}) > 15
    kinds = Counter(e.kind for e in questions(2000))
    assert set(kinds) == set(MULTI_IMAGE_KINDS) and max(kinds.values()) < 1.25 * min(kinds.values())


def test_which_image_and_more_do_not_give_the_answer_away():
    """Without the pictures, words and number of pictures leave the answer open."""
    seen = {}
    for episode in questions(1500, kind="more"):
        scenes, text, right = parts(episode)
        seen.setdefault((text, len(scenes)), set()).add(right)
    assert set(seen) == {(f"which image has {word} objects?", 2) for word in ("more", "fewer")}
    assert all(len(answers) == 3 for answers in seen.values())


def test_difficulty_limits_objects_and_pictures():
    for episode in questions(200, difficulty=0.2):
        scenes = parts(episode)[0]
        assert len(scenes) == 2
        if episode.kind in ("which_image", "in_image"):
            assert {len(scene.objects) for scene in scenes} == {1}
    assert {len(parts(e)[0]) for e in questions(50, kind="in_image", difficulty=0.5)} == {2, 3}
    assert {e.kind for e in dialogues(50, difficulty=0.2)} == {"2 turns"}
    assert {e.kind for e in dialogues(100)} == {"2 turns", "3 turns", "4 turns"}


def test_change_is_told_in_one_wording():
    ring, square = SceneObject("ring", "red", "small", 0, 0), SceneObject("square", "blue", "large", 1, 1)
    scene = Scene((ring, square), "white")
    for objects, background, told in (
        ((replace(ring, color="blue"), square), "white", "the small red ring is now blue."),
        ((replace(ring, size="large"), square), "white", "the small red ring is now large."),
        ((replace(ring, shape="cross"), square), "white", "the small red ring is now a small red cross."),
        ((replace(ring, color="pink", size="large"), square), "white", "the small red ring is now a large pink ring."),
        ((ring,), "white", "the large blue square is gone."),
        ((replace(ring, row=1), square), "white", "the small red ring moved to the left."),
        ((ring, replace(square, row=2)), "white", "the large blue square moved to the bottom."),
        ((*scene.objects, SceneObject("cross", "pink", "large", 2, 2)), "white",
         "there is now a large pink cross in the bottom right."),
        ((ring, square), "navy", "the background is now navy."),
    ):  # fmt: skip
        assert describe_change(scene, Scene(objects, background)) == told
    for other in (scene, Scene((ring,), "navy"), Scene((replace(ring, row=2, color="pink"), square), "white")):
        with pytest.raises(ValueError, match="must differ by one edit"):
            describe_change(scene, other)


def test_text_answers_are_compared_exactly_but_for_case_and_space():
    meaning = Question("which image has more objects?", "the same", "more")
    for said, right in (
        (["the same"], True),
        ([" The same "], True),
        ([GlobalThought("two and two"), "the same", ""], True),
        (["the same."], False),
        (["the", "same"], False),
        (["the same", np.zeros((48, 48, 3), np.uint8)], False),
        ([None], False),
        ([], False),
    ):
        assert check_multi_image_question(meaning, [said]) == {"answer": right}
    assert check_multi_image_question(meaning, []) == {"answer": False}


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_pairs(held_out):
    for episode in (*questions(400, held_out=held_out), *dialogues(400, held_out=held_out)):
        shown = [frame for turn in episode.turns for frame in turn.frames]
        if held_out:
            assert any(frame.held_out for frame in shown)
        else:
            assert not any(frame.held_out for frame in shown)


def test_every_turn_of_a_dialogue_is_right():
    forms = Counter()
    for episode in dialogues(400, held_out=None):
        assert episode.task == "chat" and len(episode.turns) % 2 == 0
        assert [turn.role for turn in episode.turns] == ["user", "assistant"] * len(episode.answers)
        last = None
        for user, assistant, meaning in zip(episode.turns[::2], episode.answers, episode.meaning.turns, strict=True):
            *shown, text = user.content
            (right,) = assistant.content
            last = shown[0] if shown else last
            if text.startswith("draw "):
                described = parse_caption(text.removeprefix("draw "))
                assert meaning == described and score(described, read_scene(render(right)))["whole_scene"]
                assert len(described.objects) == len(right.objects) and described.background == right.background
                form, last = "draw", right
            elif isinstance(right, Scene):
                assert text.startswith("now ") == (not shown)
                assert follow(text.removeprefix("now "), last) == (set(right.objects), right.background)
                assert meaning.sources == (last,)
                form, last = "edit", right
            elif text.startswith("describe "):
                assert right == meaning == describe_text(last)
                form = "describe"
            else:
                assert right == meaning == answer_one(last, text)
                form = "ask"
            forms[form, bool(shown)] += 1
        assert {isinstance(turn.content[0], str) for turn in episode.answers} == {False, True}
    assert set(forms) == {*((form, shown) for form in ("edit", "describe", "ask") for shown in (False, True)),
                          ("draw", False)}  # fmt: skip
    assert min(forms.values()) >= 10, forms
    texts = sum(number for (form, _), number in forms.items() if form in ("describe", "ask"))
    assert 0.4 < texts / sum(forms.values()) < 0.6


def test_questions_follow_pictures_of_both_sides():
    """Some questions are about a picture of the user two turns ago, some about one that the assistant made."""
    sides = Counter()
    for episode in dialogues(300):
        last = None
        for turn in episode.turns:
            if turn.role == "user" and not turn.frames and last == "assistant" and turn.content[-1].endswith("?"):
                sides["assistant"] += 1
            if turn.role == "user" and not turn.frames and last == "user" and turn.content[-1].endswith("?"):
                sides["user"] += 1
            last = turn.role if turn.frames else last
    assert min(sides["assistant"], sides["user"]) > 20


def test_right_dialogues_mark_all_true():
    for episode in dialogues(120, seed=1, held_out=None):
        marks = check_dialogue(episode.meaning, [as_said(turn) for turn in episode.answers])
        assert marks == {"text": 1.0, "image": 1.0, "whole": True}


def test_each_wrong_turn_counts_once():
    for episode in dialogues(60, seed=2):
        right = [as_said(turn) for turn in episode.answers]
        pictures = sum(isinstance(said[0], np.ndarray) for said in right)
        texts = len(right) - pictures
        for i, said in enumerate(right):
            is_text = isinstance(said[0], str)
            wrong = [["nothing"]] if is_text else [[render(Frame((), "white"))], [None], [*said, *said], [*said, "a"]]
            for instead in (*wrong, []):
                marks = check_dialogue(episode.meaning, [*right[:i], instead, *right[i + 1 :]])
                assert marks["text"] == pytest.approx(1 - is_text / texts)
                assert marks["image"] == pytest.approx(1 - (not is_text) / pictures)
                assert marks["whole"] is False


def test_missing_and_extra_turns():
    ring = SceneObject("ring", "red", "small", 0, 0)
    scene = Scene((ring,), "white")
    meaning = DialogueMeaning(("red", EditMeaning((scene,), background="navy")))
    navy = render(Scene((ring,), "navy"))
    assert check_dialogue(meaning, [["Red"], [navy]]) == {"text": 1.0, "image": 1.0, "whole": True}
    assert check_dialogue(meaning, [["red"]]) == {"text": 1.0, "image": 0.0, "whole": False}
    assert check_dialogue(meaning, []) == {"text": 0.0, "image": 0.0, "whole": False}
    assert check_dialogue(meaning, [["red"], [navy], ["more"]])["whole"] is False
    drawn = DialogueMeaning((Meaning(parse_caption("a red ring").objects),))
    assert check_dialogue(drawn, [[navy]]) == {"text": None, "image": 1.0, "whole": True}


def test_same_seed_same_episodes():
    assert questions(60, seed=4) == questions(60, seed=4) != questions(60, seed=5)
    assert dialogues(60, seed=4) == dialogues(60, seed=4) != dialogues(60, seed=5)


def test_wrong_arguments_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"`kind` must be one of which_image, .*, got 'most'"):
        sample_multi_image_question(rng, kind="most")
    for sample in (sample_multi_image_question, sample_dialogue):
        with pytest.raises(ValueError, match=r"`difficulty` must be in \(0, 1\], got 0"):
            sample(rng, difficulty=0)


def test_questions_about_the_same_images_have_the_answers_of_single_ones():
    """Asked again of the same pictures, one at a time, by the rules of the sampler of single questions."""
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(150):
        scenes, asked = sample_questions_about_images(rng, 6)
        assert len(asked) == 6 and len(scenes) in (2, 3)
        for text, answer in asked:
            if text.startswith("what changed"):
                assert answer == describe_change(*scenes)
                kinds.add("difference")
            elif text in ("which image has more objects?", "which image has fewer objects?"):
                first, second = (len(scene.objects) for scene in scenes)
                sign = (first > second) - (first < second) if "more" in text else (first < second) - (first > second)
                assert answer == {1: "first", -1: "second", 0: "the same"}[sign]
                kinds.add("more")
            elif text.startswith("which image has") and "background" not in text:
                phrase = text.removeprefix("which image has ").removesuffix("?")
                assert [number for number, scene in enumerate(scenes) if matches(scene, phrase)] == [
                    ORDINALS.index(answer)
                ]
                kinds.add("which")
    assert kinds == {"difference", "more", "which"}
