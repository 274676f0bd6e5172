"""Every question has exactly one right answer, worked out here from the question's text alone."""

import re
from collections import Counter

import numpy as np
import pytest
from emu35.training.shapes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    QUESTION_KINDS,
    SHAPES,
    SIZES,
    VOCABULARY,
    caption,
    describe,
    describe_text,
    parse_caption,
    relation_holds,
    sample_question,
    sample_scene,
)

RELATION = r"(above|below|(?:to the )?left of|(?:to the )?right of)"


def ask(number, seed=0, kind=None, **kwargs):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        scene = sample_scene(rng, **kwargs)
        yield scene, sample_question(scene, rng, kind)


def matches(scene, phrase):
    """The scene's objects that a noun phrase fits, read by the caption parser."""
    described = parse_caption(phrase).objects[0]
    return [
        o
        for o in scene.objects
        if all(getattr(described, a) in (None, getattr(o, a)) for a in ("shape", "color", "size", "position"))
    ]


def the(scene, phrase):
    (only,) = matches(scene, phrase)
    return only


def related(name, a, b):
    return relation_holds(name.removeprefix("to the "), (a.row, a.column), (b.row, b.column))


def answer(scene, text):
    """The answer by the question's own words."""
    if re.fullmatch(r"(what|which) color is the background\?", text):
        return scene.background
    if m := re.fullmatch(r"what (color|shape|size) is (the .*)\?", text):
        return getattr(the(scene, m[2]), m[1])
    if m := re.fullmatch(r"where is (the .*)\?", text):
        return the(scene, m[1]).position
    if m := re.fullmatch(r"how many (.*) are there\?", text):
        number = len(matches(scene, f"two {m[1]}"))
        return ("zero", "one", "two", "three")[number]
    if m := re.fullmatch(rf"what is {RELATION} (the .*)\?", text):
        (only,) = [o for o in scene.objects if related(m[1], o, the(scene, m[2]))]
        article = "an" if only.size[0] in "aeiou" else "a"
        return f"{article} {only.size} {only.color} {only.shape}"
    if m := re.fullmatch(r"is (the .*) (above|left of) or (below|right of) (the .*)\?", text):
        (name,) = [name for name in (m[2], m[3]) if related(name, the(scene, m[1]), the(scene, m[4]))]
        return name
    if m := re.fullmatch(r"is there (an? .*)\?", text):
        return "yes" if matches(scene, m[1]) else "no"
    if m := re.fullmatch(r"is the background (\w+)\?", text):
        return "yes" if m[1] == scene.background else "no"
    if m := re.fullmatch(rf"is (the .*?) {RELATION} (the .*)\?", text):
        return "yes" if related(m[2], the(scene, m[1]), the(scene, m[3])) else "no"
    if m := re.fullmatch(rf"is (the .*) (?:in|at|on) the ({'|'.join(POSITIONS)}|middle)\?", text):
        return "yes" if the(scene, m[1]).position == m[2].replace("middle", "center") else "no"
    if m := re.fullmatch(r"is (the .*) an? (\w+)\?", text):
        return "yes" if the(scene, m[1]).shape == m[2] else "no"
    if m := re.fullmatch(r"is (the .*) (\w+)\?", text):
        return "yes" if m[2] in (the(scene, m[1]).color, the(scene, m[1]).size) else "no"
    raise AssertionError(f"unknown form: {text}")


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_are_right_and_unique(kind):
    for scene, q in ask(1500, kind=kind, num_objects=None if kind != "relation" else 3):
        assert q.kind == kind
        assert answer(scene, q.text) == q.answer, (q, scene)


def test_referring_expressions_single_out_one_object():
    # `the` unpacks exactly one match, so `answer` above would raise; here the forms are counted as well.
    forms = Counter(q.text.split()[0] for scene, q in ask(3000) if answer(scene, q.text) == q.answer)
    assert set(forms) == {"what", "which", "where", "how", "is"} and sum(forms.values()) == 3000


def test_kinds_are_drawn_uniformly():
    counts = Counter(q.kind for _, q in ask(8000, num_objects=2))
    assert set(counts) == set(QUESTION_KINDS)
    assert max(counts.values()) - min(counts.values()) < 200
    assert "relation" not in {q.kind for _, q in ask(500, num_objects=1)}


def test_yes_and_no_are_balanced_in_every_form():
    counts = Counter()
    for _, q in ask(8000, kind="yes_no"):
        form = "there" if q.text.startswith("is there") else "ground" if "background" in q.text else "other"
        form = "relation" if re.search(RELATION + " the", q.text) else form
        counts[form, q.answer] += 1
    for form in ("there", "ground", "other", "relation"):
        yes, no = counts[form, "yes"], counts[form, "no"]
        assert abs(yes - no) < 5 * np.sqrt(yes + no), counts


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("colour", set(COLORS)),
        ("shape", set(SHAPES)),
        ("size", set(SIZES)),
        ("position", set(POSITIONS)),
        ("background", set(BACKGROUNDS)),
        ("count", {"zero", "one", "two", "three"}),
        ("yes_no", {"yes", "no"}),
    ],
)
def test_every_answer_occurs_and_no_other(kind, answers):
    counts = Counter(q.answer for _, q in ask(3000, kind=kind))
    assert set(counts) == answers
    if kind != "count":
        assert min(counts.values()) > 0.6 * 3000 / len(answers)


def test_above_or_below_is_balanced():
    counts = Counter(q.answer for _, q in ask(6000, kind="relation", num_objects=2) if " or " in q.text)
    assert set(counts) == {"above", "below", "left of", "right of"}
    assert min(counts.values()) > 0.85 * max(counts.values())


def test_words_stay_in_the_vocabulary_and_use_all_of_it():
    rng, seen = np.random.default_rng(0), set()
    for scene, q in ask(6000):
        d, c = describe(scene, rng), caption(scene, rng)
        for text in (q.text, q.answer, d.text, d.answer, c.text):
            seen.update(re.findall(r"[a-z]+", text))
            assert re.fullmatch(r"[a-z ,.?]+", text)
    assert seen == set(VOCABULARY)


def test_describe_is_the_canonical_caption():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(200)]
    questions = [describe(s, rng) for s in scenes]
    assert all(q.kind == "describe" and q.answer == describe_text(s) for q, s in zip(questions, scenes, strict=True))
    assert {q.text for q in questions} >= {"describe the image.", "describe this picture."}


def test_same_seed_same_questions():
    assert list(ask(300, seed=4)) == list(ask(300, seed=4))


def test_wrong_kinds_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"`kind` must be one of colour, .*, got 'smell'"):
        sample_question(sample_scene(rng), rng, kind="smell")
    with pytest.raises(ValueError, match="needs a scene of two or more objects, got one"):
        sample_question(sample_scene(rng, num_objects=1), rng, kind="relation")
