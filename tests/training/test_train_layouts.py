"""Typical layouts: the sentence stays true, what it fixes stays where it is, and the rest stands as promised."""

import itertools

import emu35
import numpy as np
import pytest
from emu35.processing_emu35 import Emu35Processor
from emu35.training.layouts import canonical_scene, typical_layout
from emu35.training.recipe import DataRecipe, StageRecipe
from emu35.training.sequences import SequenceWriter
from emu35.training.shapes import Scene, SceneObject, caption, parse_caption, read_scenes, render, sample_scene, score


def layouts_of(text, number=300):
    """All cells, in order of mention, that a caption's objects are given; they must differ in colour."""
    meaning = parse_caption(text)
    grid = list(itertools.product(range(3), repeat=2))
    for cells in itertools.permutations(grid, meaning.count):
        objects = [SceneObject(d.shape, d.color, "small", *c) for d, c in zip(meaning.objects, cells, strict=True)]
        scene = Scene(tuple(objects), "white")
        if score(meaning, read_scenes(render(scene)[None])[0])["whole_scene"]:
            break
    found, rng = set(), np.random.default_rng(0)
    for _ in range(number):
        by_color = {o.color: (o.row, o.column) for o in typical_layout(scene, meaning, rng).objects}
        found.add(tuple(by_color[d.color] for d in meaning.objects))
    return found


def test_the_sentence_stays_true():
    rng = np.random.default_rng(1)
    captions, moved = [], []
    for _ in range(200):
        scene = sample_scene(rng)
        captions.append(caption(scene, rng, full=False))
        moved.append(typical_layout(scene, captions[-1].meaning, rng))
        looks = [sorted((o.shape, o.color, o.size) for o in s.objects) for s in (scene, moved[-1])]
        assert looks[0] == looks[1] and scene.background == moved[-1].background
    reads = read_scenes(np.stack([render(scene) for scene in moved]))
    for drawn, read in zip(captions, reads, strict=True):
        assert score(drawn.meaning, read)["whole_scene"], drawn.text


def test_a_full_caption_leaves_nothing_to_move():
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = sample_scene(rng)
        assert typical_layout(scene, caption(scene, rng, full=True).meaning, rng) == scene


def test_one_object_may_be_anywhere():
    assert len(layouts_of("a red circle")) == 9


@pytest.mark.parametrize(("relation", "upper"), [("above", 0), ("below", 1)])
def test_above_and_below_share_a_column(relation, upper):
    layouts = layouts_of(f"a red circle {relation} a blue square")
    assert len(layouts) == 9
    for cells in layouts:
        assert cells[0][1] == cells[1][1]
        assert cells[upper][0] < cells[1 - upper][0]


def test_left_and_right_share_a_row():
    layouts = layouts_of("a red circle right of a blue square")
    assert len(layouts) == 9
    assert all(red[0] == blue[0] and red[1] > blue[1] for red, blue in layouts)


def test_others_stand_in_rows_of_their_own_as_mentioned():
    layouts = layouts_of("a red circle, a blue square and a green ring", 1000)
    assert len(layouts) == 27
    assert all([row for row, _ in cells] == [0, 1, 2] for cells in layouts)


def test_given_positions_stay():
    layouts = layouts_of("a red circle in the center and a blue square")
    assert all(red == (1, 1) and blue[0] != 1 for red, blue in layouts)
    assert len(layouts) == 6


# --- one picture a sentence ---


def test_the_canonical_scene_is_what_the_sentence_says():
    rng = np.random.default_rng(3)
    captions = [caption(sample_scene(rng, held_out=False), rng, full=False) for _ in range(300)]
    reads = read_scenes(np.stack([render(canonical_scene(drawn.meaning)) for drawn in captions]))
    for drawn, read in zip(captions, reads, strict=True):
        assert score(drawn.meaning, read)["whole_scene"], drawn.text
        assert not any(o.held_out for o in canonical_scene(drawn.meaning).objects)


def test_a_full_caption_has_its_own_scene():
    rng = np.random.default_rng(4)
    for _ in range(50):
        scene = sample_scene(rng, held_out=False)
        assert canonical_scene(caption(scene, rng, full=True).meaning) == scene


def test_what_is_left_open_is_always_the_same():
    one = canonical_scene(parse_caption("a red circle"))
    assert one == Scene((SceneObject("circle", "red", "small", 0, 0),), "white")
    # Both sentences leave open what the other says; looks differ where they can.
    two = canonical_scene(parse_caption("an object above a small red circle"))
    assert {(o.shape, o.color, o.size) for o in two.objects} > {("circle", "red", "small")}
    assert len(two.objects) == 2


def test_sequences_show_canonical_scenes():
    """Of a stage with `canonical_scenes`, and only there."""
    with pytest.raises(ValueError, match=r"`canonical_scenes` of stage 'a' leaves `typical_layouts` nothing"):
        StageRecipe("a", 1, {"t2i": 1.0}, canonical_scenes=True, typical_layouts=True)
    processor = Emu35Processor.from_pretrained(emu35.TINY)
    writer = SequenceWriter(processor.tokenizer, processor.token_layout, DataRecipe(full_captions=0.0), factor=8)

    def frames(**stage):
        rng = np.random.default_rng(5)
        drawn = writer.for_stage(StageRecipe("a", 1, {"caption_image": 1.0}, **stage))
        return [drawn.draw("caption_image", rng).frames[0] for _ in range(60)]

    def in_the_corner(**stage):
        return sum((o.row, o.column) == (0, 0) for scene in frames(**stage) for o in scene.objects)

    assert in_the_corner(canonical_scenes=True) > 2 * in_the_corner()
