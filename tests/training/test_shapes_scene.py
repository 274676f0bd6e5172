"""The procedural world: sampling, its balance, what is held out, and rendering."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from emu35.training.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    position_cell,
    position_name,
    render,
    sample_scene,
    template,
    to_image,
)


def draw(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **kwargs) for _ in range(number)]


def assert_uniform(values, options):
    """Pearson's chi-square at about 1 in 10,000: mean k - 1, standard deviation sqrt(2 (k - 1))."""
    counts, expected = Counter(values), len(values) / len(options)
    assert set(counts) <= set(options)
    statistic = sum((counts[option] - expected) ** 2 / expected for option in options)
    freedom = len(options) - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_same_seed_same_scenes():
    assert draw(200, seed=3) == draw(200, seed=3)
    assert draw(200, seed=3) != draw(200, seed=4)


def test_every_choice_is_uniform():
    scenes = draw(12_000)
    assert_uniform([len(s.objects) for s in scenes], [1, 2, 3])
    assert_uniform([s.background for s in scenes], list(BACKGROUNDS))
    objects = [s.objects[-1] for s in draw(12_000, seed=1, num_objects=1)]
    assert_uniform([(o.color, o.shape, o.size) for o in objects], list(itertools.product(COLORS, SHAPES, SIZES)))
    assert_uniform([o.position for o in objects], POSITIONS)
    pairs = [tuple(o.position for o in s.objects) for s in draw(12_000, seed=2, num_objects=2)]
    assert_uniform(pairs, list(itertools.combinations(POSITIONS, 2)))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_objects_stand_in_reading_order_and_differ(number):
    for scene in draw(1000, num_objects=number):
        cells = [(o.row, o.column) for o in scene.objects]
        assert len(cells) == number and cells == sorted(set(cells))
        assert len({(o.color, o.shape, o.size) for o in scene.objects}) == number


def test_held_out_pairs_never_leak_and_are_shown_on_demand():
    assert len(HELD_OUT) == 4 and all(color in COLORS and shape in SHAPES for color, shape in HELD_OUT)
    assert not any(s.held_out for s in draw(20_000, held_out=False))
    shown = draw(4000, held_out=True)
    assert all(s.held_out for s in shown)
    assert {(o.color, o.shape) for s in shown for o in s.objects if o.held_out} == HELD_OUT
    assert 0 < sum(s.held_out for s in draw(2000)) < 2000
    # All looks but the held-out ones are seen in training.
    seen = {(o.color, o.shape, o.size) for s in draw(5000, held_out=False) for o in s.objects}
    assert len(seen) == (len(COLORS) * len(SHAPES) - len(HELD_OUT)) * len(SIZES)


def test_positions_have_one_name_each():
    assert len(set(POSITIONS)) == 9
    assert position_name(0, 0) == "top left" and position_name(1, 1) == "center" and position_name(2, 1) == "bottom"
    assert [position_name(*position_cell(name)) for name in POSITIONS] == list(POSITIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "blob"}, "`shape` must be one of circle"),
        ({"color": "white"}, "`color` must be one of red"),
        ({"size": "huge"}, "`size` must be one of small"),
        ({"row": 3}, r"`row` must be in 0\.\.2, got 3"),
        ({"column": -1}, r"`column` must be in 0\.\.2, got -1"),
    ],
)
def test_an_unknown_object_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SceneObject(**{"shape": "circle", "color": "red", "size": "small", "row": 0, "column": 0, **change})


def test_an_impossible_scene_is_refused():
    a, b = SceneObject("circle", "red", "small", 0, 0), SceneObject("ring", "blue", "large", 0, 0)
    with pytest.raises(ValueError, match="`background` must be one of white"):
        Scene((a,), "red")
    with pytest.raises(ValueError, match="1 to 3 objects, got 0"):
        Scene((), "white")
    with pytest.raises(ValueError, match="1 to 3 objects, got 4"):
        Scene((a, a, a, a), "white")
    with pytest.raises(ValueError, match="cells of their own"):
        Scene((a, b), "white")
    with pytest.raises(ValueError, match="look the same"):
        Scene((a, SceneObject("circle", "red", "small", 1, 0)), "white")
    with pytest.raises(TypeError, match="must be a tuple of SceneObject, got list"):
        Scene([a], "white")
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"`num_objects` must be 1 to 3, got {number}"):
            sample_scene(np.random.default_rng(0), num_objects=number)


def test_colours_are_far_apart():
    rgb = {**COLORS, **BACKGROUNDS}
    distance = {
        (a, b): np.linalg.norm(np.subtract(rgb[a], rgb[b], dtype=float)) for a, b in itertools.combinations(rgb, 2)
    }
    assert len(rgb) == 13 and min(distance.values()) > 95
    assert min(d for (a, b), d in distance.items() if a in COLORS and b in BACKGROUNDS) > 108


def test_render_draws_the_object_in_its_cell_and_nothing_else():
    scene = Scene((SceneObject("square", "red", "large", 0, 2),), "navy")
    pixels = render(scene)
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and pixels.dtype == np.uint8
    assert (pixels[8, 40] == COLORS["red"]).all()
    outside = np.ones(pixels.shape[:2], dtype=bool)
    outside[1:15, 33:47] = False
    assert (pixels[outside] == BACKGROUNDS["navy"]).all() and (pixels[~outside] == COLORS["red"]).all()


def test_render_is_deterministic_and_never_shares_memory():
    scenes = draw(50)
    first = [render(s) for s in scenes]
    for pixels in first:
        pixels[:] = 0
    again = np.stack([render(s) for s in scenes])
    assert (again == np.stack([render(s) for s in scenes])).all() and again.any()


def test_sprites_stay_what_the_shipped_model_was_trained_on():
    """All 400 looks at once: a change here means that the tiny model's visual vocabulary must be trained again."""
    digest = hashlib.sha256()
    for shape, size, color, background in itertools.product(SHAPES, SIZES, COLORS, BACKGROUNDS):
        digest.update(render(Scene((SceneObject(shape, color, size, 1, 1),), background)).tobytes())
    assert digest.hexdigest()[:16] == "b10e98d4ce39e15b"


def test_templates_are_mirror_images_clear_of_the_border_and_unlike_each_other():
    masks = {(shape, size): template(shape, size) for shape in SHAPES for size in SIZES}
    for mask in masks.values():
        assert (mask == mask[:, ::-1]).all() and mask.min() == 0 and mask.max() == 1
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert border.max() <= 0.5 and np.median(border) == 0
        with pytest.raises(ValueError, match="read-only"):
            mask[0, 0] = 1
    for a, b in itertools.combinations(masks.values(), 2):
        assert (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()) < 0.93
    with pytest.raises(ValueError, match="`shape` and `size` must be of"):
        template("blob", "small")
    with pytest.raises(ValueError, match="`shape` and `size` must be of"):
        template("ring", "huge")


def test_few_distinct_patches():
    """4 quarters x 10 templates x 8 colours x 5 backgrounds, and the 5 empty ones."""
    scenes = [
        Scene((SceneObject(*look, 1, 1),), background)
        for *look, background in itertools.product(SHAPES, COLORS, SIZES, BACKGROUNDS)
    ]
    pixels = np.stack([render(s) for s in scenes]).reshape(-1, 6, 8, 6, 8, 3).swapaxes(2, 3).reshape(-1, 192)
    assert len(np.unique(pixels, axis=0)) == 1605


def test_to_image_holds_the_same_pixels():
    scene = draw(1)[0]
    image = to_image(scene)
    assert image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert (np.asarray(image) == render(scene)).all()
