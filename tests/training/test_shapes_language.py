"""Captions say what is true and nothing more; the parser reads back exactly that."""

import itertools
from collections import Counter

import numpy as np
import pytest
from emu35.training.shapes import (
    POSITIONS,
    RELATIONS,
    VOCABULARY,
    Described,
    Meaning,
    Relation,
    Scene,
    SceneObject,
    caption,
    describe_text,
    meaning_of,
    parse_caption,
    position_cell,
    read_scene,
    relation_holds,
    render,
    sample_scene,
    score,
)

RED_ABOVE_BLUE = Meaning(
    (Described("circle", "red", "small"), Described("square", "blue", "large")), (Relation(0, "above", 1),)
)


def captions(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        scene = sample_scene(rng)
        yield scene, caption(scene, rng, **kwargs)


def words_of(text):
    return text.replace(",", " ").replace("?", " ").replace(".", " ").split()


def true_of(meaning, scene):
    """Whether some assignment of mentioned to real objects makes the meaning true; written apart from `score`."""

    def extend(taken):
        i = len(taken)
        if i == len(meaning.objects):
            return all(
                relation_holds(r.name, *((taken[k].row, taken[k].column) for k in (r.subject, r.object)))
                for r in meaning.relations
            )
        return any(
            all(
                getattr(meaning.objects[i], name) in (None, getattr(o, name))
                for name in ("shape", "color", "size", "position")
            )
            and extend([*taken, o])
            for o in scene.objects
            if o not in taken
        )

    return len(meaning.objects) == len(scene.objects) and meaning.background in (None, scene.background) and extend([])


def test_captions_are_true_and_read_back_exactly():
    for scene, c in captions(6000):
        assert parse_caption(c.text) == c.meaning, c.text
        assert true_of(c.meaning, scene), (c.text, scene)


def test_captions_are_false_of_other_scenes():
    """The oracle itself can say no: a full caption fits no scene but its own."""
    rng = np.random.default_rng(5)
    full = [(scene, caption(scene, rng, full=True)) for scene in (sample_scene(rng) for _ in range(60))]
    assert all(true_of(c.meaning, other) == (scene == other) for scene, c in full for other, _ in full)


def test_full_captions_fix_the_scene_and_partial_ones_do_not():
    for scene, c in captions(1500, full=True):
        assert set(c.meaning.objects) == set(meaning_of(scene).objects) and c.meaning.background == scene.background
        assert not c.meaning.relations
    for _, c in captions(1500, full=False):
        said = [v for o in c.meaning.objects for v in (o.shape, o.color, o.size, o.position)] + [c.meaning.background]
        assert None in said, c.text


def test_half_of_the_captions_are_full():
    full = [
        None
        not in [v for o in c.meaning.objects for v in (o.shape, o.color, o.size, o.position, c.meaning.background)]
        for _, c in captions(4000)
    ]
    assert 0.46 < np.mean(full) < 0.54


def test_partial_captions_leave_out_everything_sometimes_and_use_every_relation():
    seen = Counter()
    for _, c in captions(4000, full=False):
        seen.update(r.name for r in c.meaning.relations)
        seen["no background"] += c.meaning.background is None
        for name in ("shape", "color", "size", "position"):
            seen[f"no {name}"] += any(getattr(o, name) is None for o in c.meaning.objects)
        seen["two relations"] += len(c.meaning.relations) == 2
        seen["plural"] += any(word in ("two", "three") for word in c.text.split())
    assert all(seen[name] > 150 for name in RELATIONS)
    assert abs(seen["above"] - seen["below"]) < 200 and abs(seen["left of"] - seen["right of"]) < 200
    assert all(seen[f"no {name}"] > 400 for name in ("shape", "color", "size", "position", "background"))
    assert seen["two relations"] > 100 and seen["plural"] > 150


def test_same_seed_same_captions_and_many_wordings():
    assert list(captions(300, seed=9)) == list(captions(300, seed=9))
    scene, rng = sample_scene(np.random.default_rng(1), num_objects=2), np.random.default_rng(2)
    assert len({caption(scene, rng, full=True).text for _ in range(300)}) > 40


def test_vocabulary_is_closed_lower_case_and_small():
    assert len(VOCABULARY) == 71 and list(VOCABULARY) == sorted(set(VOCABULARY))
    for _, c in captions(3000):
        assert set(words_of(c.text)) <= set(VOCABULARY) and c.text == c.text.lower()


def test_articles_fit():
    for _, c in captions(3000):
        words = words_of(c.text)
        for article, word in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), c.text


def test_the_example_sentence_is_one_of_the_captions():
    scene = Scene((SceneObject("circle", "red", "small", 0, 1), SceneObject("square", "blue", "large", 2, 1)), "white")
    rng = np.random.default_rng(0)
    text = "a small red circle above a large blue square"
    assert text in {caption(scene, rng).text for _ in range(3000)}
    assert parse_caption(text) == RED_ABOVE_BLUE


def test_describe_text_is_canonical():
    scene = Scene(
        (
            SceneObject("circle", "red", "small", 0, 0),
            SceneObject("ring", "orange", "large", 1, 1),
            SceneObject("cross", "blue", "small", 2, 1),
        ),
        "gray",
    )
    text = (
        "a small red circle in the top left, a large orange ring in the center "
        "and a small blue cross at the bottom on a gray background"
    )
    assert describe_text(scene) == text
    assert parse_caption(text) == meaning_of(scene)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("A small red circle above a large blue square.", RED_ABOVE_BLUE),
        ("  a tiny red circle above  the big blue square ", RED_ABOVE_BLUE),
        ("an object", Meaning((Described(),))),
        ("two red circles", Meaning((Described("circle", "red"),) * 2)),
        ("three objects on a grey background", Meaning((Described(),) * 3, (), "gray")),
        ("a ring in the centre", Meaning((Described("ring", position="center"),))),
        (
            "a picture of a green ring with a red cross to the left of it",
            Meaning((Described("ring", "green"), Described("cross", "red")), (Relation(1, "left of", 0),)),
        ),
        (
            "a ring above a cross and right of a square",
            Meaning(
                (Described("ring"), Described("cross"), Described("square")),
                (Relation(0, "above", 1), Relation(0, "right of", 2)),
            ),
        ),
        (
            "on a black background, there are two rings below a square",
            Meaning(
                (Described("ring"), Described("ring"), Described("square")),
                (Relation(0, "below", 2), Relation(1, "below", 2)),
                "black",
            ),
        ),
        (
            "a white background with a ring above a cross, and a square on the left",
            Meaning(
                (Described("ring"), Described("cross"), Described("square", position="left")),
                (Relation(0, "above", 1),),
                "white",
            ),
        ),
    ],
)
def test_parse_hand_written(text, meaning):
    assert parse_caption(text) == meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`text` is empty"),
        (" . ", "`text` is empty"),
        ("a red elephant", "Cannot read the word 'elephant'"),
        ("a red circle!", "Cannot read the word 'circle!'"),
        ("red circle", r"Cannot read the word 'red' \(word 1\)"),
        ("a circle red", "Cannot read the word 'red'"),
        ("a small large circle", "Cannot read the word 'large'"),
        ("a red", "the text ends too early"),
        ("a circle and", "the text ends too early"),
        ("a circle a square", r"Cannot read the word 'a' \(word 3\)"),
        ("two circle", "Cannot read the word 'circle'"),
        ("zero circles", "Cannot read the word 'zero'"),
        ("two circles in the center", "Cannot read the word 'center'"),
        ("a circle in the white", "Cannot read the word 'white'"),
        ("a circle on the left of a square", "Cannot read the word 'of'"),
        ("a circle left a square", "Cannot read the word 'left'"),
        ("a circle to the above a square", "Cannot read the word 'above'"),
        ("a circle to a square", "Cannot read the word 'a'"),
        ("a circle above a square below a ring", "Cannot read the word 'below'"),
        ("a circle with a square above a ring", "Cannot read the word 'a'"),
        ("a circle on a red background", "Cannot read the word 'red'"),
        ("a circle on a white background and a square", "Cannot read the word 'and'"),
        ("a white background with a circle on a black background", "Cannot read the word 'on'"),
        ("on a white background a circle", "Cannot read the word 'a'"),
        ("a white background", "the text ends too early"),
        ("two circles and two squares", "asks for 4 objects; a scene holds at most 3"),
    ],
)
def test_parse_says_which_word_it_cannot_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_relations_compare_one_axis_strictly():
    cells = [position_cell(name) for name in POSITIONS]
    for a in cells:
        for b in cells:
            assert relation_holds("above", a, b) == (a[0] < b[0]) == relation_holds("below", b, a)
            assert relation_holds("left of", a, b) == (a[1] < b[1]) == relation_holds("right of", b, a)
    with pytest.raises(ValueError, match="`name` must be one of above, below, left of, right of, got 'under'"):
        relation_holds("under", (0, 0), (1, 1))


def test_captions_score_as_whole_on_their_own_pictures():
    for scene, c in captions(800):
        result = score(c.meaning, read_scene(render(scene)))
        assert result["whole_scene"] and all(value in (None, True, 1.0) for value in result.values())
