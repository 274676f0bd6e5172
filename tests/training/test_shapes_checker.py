"""The checker: exact on rendered scenes, robust to mild noise and blur, and strict about everything else."""

import itertools

import numpy as np
import pytest
from emu35.training.shapes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Described,
    Meaning,
    ReadObject,
    ReadScene,
    Relation,
    Scene,
    SceneObject,
    checker,
    meaning_of,
    parse_caption,
    read_scene,
    read_scenes,
    render,
    sample_scene,
    score,
    score_scene,
    to_image,
)
from PIL import Image, ImageFilter

LOOKS = list(itertools.product(SHAPES, SIZES, COLORS, BACKGROUNDS))


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(2000)]


@pytest.fixture(scope="module")
def pixels(scenes):
    return np.stack([render(s) for s in scenes])


@pytest.fixture(scope="module")
def singles():
    """One object in the middle, in all 400 looks: scenes, pixels, and the background's colour to paint with."""
    scenes = [Scene((SceneObject(shape, color, size, 1, 1),), ground) for shape, size, color, ground in LOOKS]
    grounds = np.array([BACKGROUNDS[s.background] for s in scenes], dtype=np.uint8)[:, None, None]
    return scenes, np.stack([render(s) for s in scenes]), grounds


def whole(scenes, pixels):
    return [score_scene(s, r)["whole_scene"] for s, r in zip(scenes, read_scenes(pixels), strict=True)]


def noisy(pixels, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def blurred(pixels, radius):
    return np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius))) for p in pixels])


def assert_all_rejected(scenes, pixels):
    """Neither taken for the scene nor for any other: something is unreadable."""
    reads = read_scenes(pixels)
    assert not any(score_scene(s, r)["whole_scene"] for s, r in zip(scenes, reads, strict=True))
    assert all(r.unreadable for r in reads)


def test_exact_on_2000_scenes(scenes, pixels):
    for scene, read in zip(scenes, read_scenes(pixels), strict=True):
        found = [(o.shape, o.color, o.size, o.row, o.column) for o in read.objects]
        assert found == [(o.shape, o.color, o.size, o.row, o.column) for o in scene.objects]
        assert read.background == scene.background and read.unreadable == ()
        assert all(o.residual < 1 and o.confidence > 0.99 for o in read.objects)
        assert [o.position for o in read.objects] == [o.position for o in scene.objects]


@pytest.mark.parametrize("sigma", [8])
def test_noise(scenes, pixels, sigma):
    assert all(whole(scenes, noisy(pixels, sigma)))


@pytest.mark.parametrize("radius", [0.5, 0.8, 1.0])
def test_blur(scenes, pixels, radius):
    assert all(whole(scenes[:700], blurred(pixels[:700], radius)))


def test_blur_and_noise_on_every_look(singles):
    scenes, pixels, _ = singles
    assert all(whole(scenes, noisy(blurred(pixels, 0.7), 8)))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(slice(16, 24), slice(16, 32)), (slice(24, 32), slice(16, 32)), (slice(16, 32), slice(16, 24))]
    + [(slice(a, a + 8), slice(b, b + 8)) for a in (16, 24) for b in (16, 24)],
)
def test_half_or_a_quarter_missing(singles, rows, columns):
    scenes, pixels, grounds = singles
    pixels = pixels.copy()
    pixels[:, rows, columns] = grounds
    assert not any(whole(scenes, pixels))


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_quarter_in_another_colour(singles, step):
    scenes, pixels, _ = singles
    names = list(COLORS)
    other = [
        Scene((SceneObject(o.shape, names[(names.index(o.color) + step) % len(names)], o.size, 1, 1),), s.background)
        for s in scenes
        for o in s.objects
    ]
    for row, column in itertools.product((16, 24), (16, 24)):
        mixed = pixels.copy()
        for mixed_one, s in zip(mixed, other, strict=True):
            mixed_one[row : row + 8, column : column + 8] = render(s)[row : row + 8, column : column + 8]
        assert_all_rejected(scenes, mixed)


@pytest.mark.parametrize(
    "half", [np.s_[:, :, 24:], np.s_[:, 24:], np.s_[:, 24:, 24:]], ids=["right", "bottom", "quarter"]
)
def test_a_chimera_of_two_shapes_or_sizes(singles, half):
    _, pixels, _ = singles
    by_look = pixels.reshape(len(SHAPES) * len(SIZES), -1, *pixels.shape[1:])
    for a, b in itertools.permutations(range(len(by_look)), 2):
        mixed = by_look[a].copy()
        mixed[half] = by_look[b][half]
        assert all(r.unreadable for r in read_scenes(mixed)), (LOOKS[a * 40][:2], LOOKS[b * 40][:2])


@pytest.mark.parametrize("shift", [2, 5, 8])
def test_out_of_place(singles, shift):
    scenes, pixels, _ = singles
    for axis in (1, 2):
        assert_all_rejected(scenes, np.roll(pixels, shift, axis=axis))


@pytest.mark.parametrize("opacity", [0.25, 0.4, 0.55, 0.65])
def test_a_ghost_is_neither_an_object_nor_nothing(singles, opacity):
    scenes, pixels, grounds = singles
    reads = read_scenes(np.rint(grounds + opacity * (pixels - grounds.astype(float))).astype(np.uint8))
    assert not any(score_scene(s, r)["whole_scene"] for s, r in zip(scenes, reads, strict=True))
    assert all(not r.objects and r.unreadable == ((1, 1),) for r in reads)


def test_garbage_cells_are_unreadable(singles):
    scenes, pixels, _ = singles
    rng = np.random.default_rng(0)
    garbage = pixels.copy()
    garbage[:, :16, :16] = rng.integers(0, 256, (len(pixels), 16, 16, 3))
    reads = read_scenes(garbage)
    assert all(r.unreadable == ((0, 0),) and len(r.objects) == 1 for r in reads)
    assert not any(score(meaning_of(s), r)["whole_scene"] for s, r in zip(scenes, reads, strict=True))
    assert all(score(meaning_of(s), r)["object"] == 1.0 for s, r in zip(scenes, reads, strict=True))


def test_diluted_colours_stay_apart():
    """The checker's claim that at most one name lies within its tolerance of 27 levels of a measured colour."""
    ratio = np.linspace(0.7, 1.1, 41)[:, None]
    for ground, color in itertools.product(BACKGROUNDS, COLORS):
        mine = ratio * np.subtract(COLORS[color], BACKGROUNDS[ground])
        for rgb in [v for k, v in {**COLORS, **BACKGROUNDS}.items() if k not in (ground, color)]:
            other = ratio * np.subtract(rgb, BACKGROUNDS[ground])
            assert np.linalg.norm(mine[:, None] - other, axis=-1).min() > 54


def test_pure_noise_and_gradients_are_no_scene():
    rng = np.random.default_rng(0)
    for image in rng.integers(0, 256, (20, 48, 48, 3)).astype(np.uint8):
        read = read_scene(image)
        assert not read.objects and read.unreadable
    ramp = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8)[:, None, None], (48, 48, 3))
    assert not read_scene(ramp).objects and read_scene(ramp).unreadable


def test_an_unknown_background_is_none_and_never_whole():
    image = np.full((48, 48, 3), (200, 80, 80), dtype=np.uint8)
    read = read_scene(image)
    assert read == ReadScene((), None, ())
    scene = Scene((SceneObject("square", "blue", "large", 1, 1),), "white")
    odd = np.where(render(scene) == 250, np.uint8([205, 205, 255]), render(scene))
    result = score(parse_caption("a large blue square"), read_scene(odd))
    assert result["object"] == 1.0 and result["background"] is None and not result["whole_scene"]


def test_one_patch_of_another_background_is_unreadable(singles):
    scenes, pixels, _ = singles
    for name, rgb in BACKGROUNDS.items():
        chosen = [i for i, s in enumerate(scenes) if s.background != name]
        patched = pixels[chosen].copy()
        patched[:, 40:48, 0:8] = rgb
        assert all((2, 0) in r.unreadable for r in read_scenes(patched))


# What the text says against what the picture shows ------------------------------------------------------------------

RED, BLUE = SceneObject("circle", "red", "small", 0, 1), SceneObject("square", "blue", "large", 2, 1)
TEXT = "a small red circle above a large blue square on a white background"


def scored(text, *objects, background="white"):
    return score(parse_caption(text), read_scene(render(Scene(tuple(objects), background))))


def failing(result):
    return {name for name, value in result.items() if value is not None and value != 1.0}


def test_a_right_picture_scores_one_everywhere_it_is_asked():
    result = scored(TEXT, RED, BLUE)
    assert result == {
        "object": 1.0,
        "count": True,
        "colour": 1.0,
        "shape": 1.0,
        "size": 1.0,
        "position": None,
        "relation": 1.0,
        "background": True,
        "whole_scene": True,
    }
    assert list(result) == [
        "object", "count", "colour", "shape", "size", "position", "relation", "background", "whole_scene"
    ]  # fmt: skip


def change(o, **fields):
    return SceneObject(
        **{**{name: getattr(o, name) for name in ("shape", "color", "size", "row", "column")}, **fields}
    )


@pytest.mark.parametrize(
    ("objects", "background", "wrong"),
    [
        ((change(RED, color="green"), BLUE), "white", {"object", "colour"}),
        ((change(RED, shape="ring"), BLUE), "white", {"object", "shape"}),
        ((change(RED, size="large"), BLUE), "white", {"object", "size"}),
        ((change(RED, size="large"), change(BLUE, size="small")), "white", {"object", "size"}),
        ((change(RED, color="blue"), change(BLUE, color="red")), "white", {"object", "colour"}),
        ((change(RED, row=2, column=0), change(BLUE, row=0)), "white", {"relation"}),
        ((change(RED, row=2, column=0), BLUE), "white", {"relation"}),
        ((RED,), "white", {"object", "count", "colour", "shape", "size", "relation"}),
        ((RED, SceneObject("cross", "green", "small", 1, 1), BLUE), "white", {"count"}),
        ((RED, BLUE), "gray", {"background"}),
    ],
)
def test_negative_controls(objects, background, wrong):
    result = scored(TEXT, *objects, background=background)
    assert failing(result) == wrong | {"whole_scene"}


def test_what_the_text_leaves_open_does_not_matter():
    result = scored("a red object and a square", change(RED, shape="cross", size="large"), BLUE, background="navy")
    assert result["whole_scene"] and result["size"] is None and result["background"] is None
    assert result["colour"] == 1.0 and result["shape"] == 1.0


def test_positions_and_shares():
    both = "a red circle at the top and a blue square at the bottom"
    assert scored(both, RED, BLUE)["position"] == 1.0
    result = scored(both, change(RED, column=0), BLUE)
    assert result["position"] == 0.5 and result["object"] == 0.5 and not result["whole_scene"]


def test_the_best_assignment_is_found():
    # The first mention fits both circles; only the second choice makes the sentence true.
    big = change(RED, size="large", column=0)
    assert scored("a red circle and a large red circle", RED, big)["whole_scene"]
    assert scored("a red circle below a red circle", RED, change(big, row=2))["whole_scene"]
    assert not scored("two red circles", RED, BLUE)["whole_scene"]


def test_an_unreadable_cell_spoils_the_whole_but_not_the_rest():
    image = render(Scene((RED, BLUE), "white"))
    image[16:32, 0:8] = 128
    result = score(parse_caption(TEXT), read_scene(image))
    assert failing(result) == {"count", "whole_scene"}


def test_score_of_more_found_objects_than_a_scene_holds():
    found = tuple(ReadObject("ring", "red", "small", *divmod(i, 3), 0.0, 1.0) for i in range(9))
    meaning = Meaning(
        (Described("ring", "red", position="bottom right"), Described("ring")), (Relation(0, "below", 1),)
    )
    result = score(meaning, ReadScene(found, "white"))
    assert result["object"] == 1.0 and result["relation"] == 1.0 and result["count"] is False


def test_score_scene_compares_everything(scenes, pixels):
    reads = read_scenes(pixels[:60])
    for i, j in itertools.product(range(60), repeat=2):
        assert score_scene(scenes[i], reads[j])["whole_scene"] == (scenes[i] == scenes[j])


# Input ---------------------------------------------------------------------------------------------------------------


def test_batched_is_single_and_every_type_reads_alike(scenes, pixels):
    batch = read_scenes(pixels[:300])
    assert batch == [read_scene(p) for p in pixels[:300]]
    assert batch[:5] == [read_scene(to_image(s)) for s in scenes[:5]]
    assert read_scene(to_image(scenes[0]).convert("RGBA")) == batch[0]
    for dtype in (np.float16, np.float32, np.float64):
        reads = read_scenes((pixels[:300] / 255).astype(dtype))
        assert all(score_scene(s, r)["whole_scene"] for s, r in zip(scenes, reads, strict=False))
    assert read_scenes(pixels[:0]) == []
    assert read_scenes(pixels[:0].astype(np.float32)) == []


def test_the_input_is_left_alone(pixels):
    before = (pixels[:4] / 255).astype(np.float32)
    after = before.copy()
    read_scenes(after)
    assert (before == after).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p[:, :40], r"must have shape \(num_images, 48, 48, 3\), got \(4, 40, 48, 3\)"),
        (lambda p: p[..., :1], r"must have shape .* got \(4, 48, 48, 1\)"),
        (lambda p: p.transpose(0, 3, 1, 2), "must have shape"),
        (lambda p: p.astype(np.int64), "must be uint8 or a float type, got int64"),
        (lambda p: p.astype(np.float32), r"must lie in 0\.\.1, got .* Divide 0\.\.255 by 255"),
        (lambda p: p.astype(np.float32) / 127.5 - 1, r"must lie in 0\.\.1, got .* map -1\.\.1"),
        (lambda p: p * np.float32("nan"), r"must lie in 0\.\.1, got nan"),
    ],
)
def test_bad_pixels_are_refused(pixels, make, message):
    with pytest.raises(ValueError, match=message):
        read_scenes(make(pixels[:4]))


def test_read_scene_takes_one_image(pixels):
    with pytest.raises(ValueError, match=r"`pixels` must have shape \(48, 48, 3\), got \(4, 48, 48, 3\)"):
        read_scene(pixels[:4])
    with pytest.raises(ValueError, match="must have shape"):
        read_scene(Image.new("RGB", (64, 48)))


def test_images_that_were_read_before_are_remembered(monkeypatch):
    scenes = [Scene((SceneObject(shape, "red", "large", 1, 1),), "white") for shape in ("circle", "square")]
    first, second = (render(scene) for scene in scenes)
    expected = read_scenes(np.stack([first, second]))
    counted = []
    original = checker._read
    monkeypatch.setattr(checker, "_read", lambda cells: counted.append(len(cells)) or original(cells))
    assert read_scenes(np.stack([second, first, second])) == [expected[1], expected[0], expected[1]]
    assert counted == []
    third = render(Scene((SceneObject("ring", "blue", "small", 0, 2),), "black"))
    assert read_scenes(np.stack([third, first, third]))[2].objects[0].shape == "ring"
    assert counted == [1]
    monkeypatch.setattr(checker, "_REMEMBERED", 1)
    assert read_scenes(np.stack([first, second])) == expected
    assert read_scenes(first[None] / np.float32(255))[0].objects[0].shape == "circle"
    assert len(checker._remembered) <= 1
