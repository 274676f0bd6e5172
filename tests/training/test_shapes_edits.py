"""Edits: the instruction's own words, read here, give the answer; the checker marks what was named and what stays."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from emu35.training.shapes import (
    BACKGROUNDS,
    COLORS,
    GRID_SIZE,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Frame,
    GlobalThought,
    Scene,
    SceneObject,
    parse_caption,
    position_cell,
    render,
    sample_scene,
)
from emu35.training.shapes.edits import (
    EDIT_KINDS,
    TRANSFER_DIFFICULTY,
    EditMeaning,
    apply_edit,
    check_edit,
    sample_edit,
    sample_instruction,
)

PLACE = rf"(?:in|at|on) the ({'|'.join(sorted((*POSITIONS, 'middle'), key=len, reverse=True))})"
ALL_TRUE = {"edit": True, "preservation": 1.0, "preserved": True, "whole_scene": True}
ALL_FALSE = {"edit": False, "preservation": 0.0, "preserved": False, "whole_scene": False}


def edits(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_edit(rng, **kwargs) for _ in range(number)]


def target(episode):
    return episode.answers[0].frames[0]


def mark(episode, *frames):
    return check_edit(episode.meaning, [[render(frame) for frame in frames]])


def the(scene, phrase):
    """The one object that a noun phrase fits."""
    described = parse_caption(phrase).objects[0]
    aspects = ("shape", "color", "size", "position")
    (only,) = [o for o in scene.objects if all(getattr(described, a) in (None, getattr(o, a)) for a in aspects)]
    return only


def cell(place):
    row, column = position_cell(place.replace("middle", "center"))
    return {"row": row, "column": column}


def follow(text, scene, *others):
    """The edited scene as a set of objects and a background, by the instruction's words alone."""
    if m := re.fullmatch(r"(?:change the background to|make the background) (\w+)\.", text):
        return set(scene.objects), m[1]
    if m := re.fullmatch(r"remove (the .*)\.", text):
        old, new = the(scene, m[1]), []
    elif m := re.fullmatch(r"move (the .*) to the (.*)\.", text):
        old = the(scene, m[1])
        new = [replace(old, **cell(m[2]))]
    elif m := re.fullmatch(r"replace (the .*) with (an? .*)\.", text):
        old, look = the(scene, m[1]), parse_caption(m[2]).objects[0]
        new = [SceneObject(look.shape, look.color, look.size, old.row, old.column)]
    elif " image " in text:
        old, new = None, []
        for part in re.fullmatch(r"add (.*)\.", text)[1].split(" and "):
            m = re.fullmatch(rf"(the .*) of the (second|third) image {PLACE}", part)
            new.append(replace(the(others[m[2] == "third"], m[1]), **cell(m[3])))
    elif m := re.fullmatch(r"add (.*)\.", text):
        old, look = None, parse_caption(m[1]).objects[0]
        new = [SceneObject(look.shape, look.color, look.size, *look.cell)]
    else:
        m = re.fullmatch(r"(?:make|change the (?:color|size) of) (the .*?) (?:to )?(\w+)\.", text)
        old = the(scene, m[1])
        new = [replace(old, **{"size" if m[2] in SIZES else "color": m[2]})]
        assert ("the color of" not in text or m[2] in COLORS) and ("the size of" not in text or m[2] in SIZES)
    return set(scene.objects) - {old} | set(new), scene.background


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_instruction_names_one_object_and_gives_the_right_answer(kind):
    seen = set()
    for episode in edits(250, kind=kind, held_out=None):
        *sources, text = episode.turns[0].content
        result = target(episode)
        assert follow(text, *sources) == (set(result.objects), result.background), text
        assert result != sources[0] and isinstance(result, Scene)  # a scene's objects all look different
        assert [turn.role for turn in episode.turns] == ["user", "assistant"]
        assert (episode.task, episode.kind, episode.meaning.sources) == ("x2i", kind, tuple(sources))
        seen.add(re.sub(r"\bthe .*", "", text))
    assert len(seen) >= (1 if kind in ("add", "remove", "move", "replace", "transfer") else 2)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_right_answer_marks_all_true_and_untouched_source_does_not(kind):
    for episode in edits(60, kind=kind, held_out=None, seed=1):
        assert mark(episode, target(episode)) == ALL_TRUE
        assert mark(episode, episode.meaning.sources[0]) == {**ALL_TRUE, "edit": False, "whole_scene": False}


def shares(meaning):
    """What an instruction leaves unnamed: objects, the empty cells together, the background."""
    objects = [o for o in meaning.sources[0].objects if (o.row, o.column) not in meaning.named]
    return objects, len(objects) + 1 + (meaning.background is None)


def test_unnamed_objects_cells_and_background_must_stay():
    tried = Counter()
    for episode in edits(100, seed=2, held_out=None):
        meaning, result = episode.meaning, target(episode)
        objects, number = shares(meaning)
        wrong = {**ALL_TRUE, "preservation": (number - 1) / number, "preserved": False, "whole_scene": False}
        taken = {(o.row, o.column) for o in result.objects}
        free = [divmod(i, GRID_SIZE) for i in range(GRID_SIZE**2)]
        free = [c for c in free if c not in taken and c not in meaning.named]
        ghost = SceneObject("ring", "red", "small", *free[0])
        assert mark(episode, Frame((*result.objects, ghost), result.background)) == wrong
        if meaning.background is None:
            ground = next(b for b in BACKGROUNDS if b != result.background)
            assert mark(episode, Frame(result.objects, ground)) == wrong
        if objects:
            color = next(c for c in COLORS if c != objects[0].color)
            size = next(s for s in SIZES if s != objects[0].size)
            shape = next(s for s in SHAPES if s != objects[0].shape)
            others = tuple(o for o in result.objects if o != objects[0])
            for change in ({"color": color}, {"size": size}, {"shape": shape}):
                changed = replace(objects[0], **change)
                assert mark(episode, Frame((*others, changed), result.background)) == wrong
            assert mark(episode, Frame(others, result.background)) == wrong
        tried[bool(objects), meaning.background is None] += 1
    assert len(tried) >= 3 and min(tried.values()) >= 5, tried


def test_named_changes_must_all_come_true():
    for episode in edits(100, seed=3, held_out=None):
        meaning, result = episode.meaning, target(episode)
        wrong = {**ALL_TRUE, "edit": False, "whole_scene": False}
        for placed in meaning.placed:
            others = tuple(o for o in result.objects if o != placed)
            color = next(c for c in COLORS if c != placed.color)
            size = next(s for s in SIZES if s != placed.size)
            for instead in ([replace(placed, color=color)], [replace(placed, size=size)], []):
                assert mark(episode, Frame((*others, *instead), result.background)) == wrong
        for row, column in meaning.removed:
            left = SceneObject("cross", "blue", "large", row, column)
            assert mark(episode, Frame((*result.objects, left), result.background)) == wrong
        if meaning.background is not None:
            ground = next(b for b in BACKGROUNDS if b not in (meaning.background, meaning.sources[0].background))
            assert mark(episode, Frame(result.objects, ground)) == wrong


def test_unreadable_pictures_keep_nothing():
    rng = np.random.default_rng(0)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    noise = rng.integers(0, 256, shape).astype(np.uint8)  # its border's median is near gray
    strange = np.full(shape, (60, 250, 90), np.uint8)  # no background of the world
    for episode in edits(60, held_out=None):
        marks = [check_edit(episode.meaning, [[picture]]) for picture in (noise, strange)]
        assert [m["preservation"] for m in marks] == [0.0, 0.0] and not any(m["whole_scene"] for m in marks)


def test_an_unreadable_cell_is_neither_empty_nor_an_object():
    rng = np.random.default_rng(1)
    for episode in edits(60, kind="remove"):
        pixels = render(target(episode))
        ((row, column),) = episode.meaning.removed
        pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = rng.integers(0, 256, (16, 16, 3))
        assert check_edit(episode.meaning, [[pixels]]) == {**ALL_TRUE, "edit": False, "whole_scene": False}


def test_the_answer_holds_exactly_one_picture():
    (episode,) = edits(1)
    pixels = render(target(episode))
    for said in ([], ["red"], [None], [pixels, pixels], [pixels, None]):
        assert check_edit(episode.meaning, [said]) == ALL_FALSE
    assert check_edit(episode.meaning, []) == ALL_FALSE
    assert check_edit(episode.meaning, [[GlobalThought("a plan"), pixels, "done."]]) == ALL_TRUE


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_pairs(held_out):
    for episode in edits(1500 if not held_out else 400, held_out=held_out):
        pictures = (*episode.turns[0].frames, target(episode))
        assert any(picture.held_out for picture in pictures) == held_out


def test_kinds_are_balanced_and_difficulty_limits_objects_and_kinds():
    counts = Counter(episode.kind for episode in edits(4000))
    assert set(counts) == set(EDIT_KINDS) and max(counts.values()) - min(counts.values()) < 150
    for episode in edits(400, difficulty=0.2):
        assert episode.kind != "transfer"
        assert len(episode.meaning.sources[0].objects) == (2 if episode.kind == "remove" else 1)
    assert "transfer" in {episode.kind for episode in edits(100, difficulty=TRANSFER_DIFFICULTY)}
    assert {len(episode.meaning.sources) for episode in edits(100, kind="transfer")} == {2, 3}
    assert {len(episode.meaning.sources[0].objects) for episode in edits(200)} == {1, 2, 3}


def test_every_cell_is_edited():
    placed = Counter(o.position for episode in edits(2000) for o in episode.meaning.placed)
    assert set(placed) == set(POSITIONS) and max(placed.values()) < 1.5 * min(placed.values())


def test_instructions_for_a_given_scene():
    rng = np.random.default_rng(0)
    kinds = {number: set() for number in (1, 2, 3)}
    for _ in range(600):
        scene = sample_scene(rng, held_out=False)
        kind, text, meaning, result = sample_instruction(rng, scene)
        assert follow(text, scene) == (set(result.objects), result.background)
        assert meaning.sources == (scene,) and not result.held_out
        kinds[len(scene.objects)].add(kind)
    one = set(EDIT_KINDS) - {"transfer"}
    assert kinds == {1: one - {"remove"}, 2: one, 3: one - {"add"}}


def test_pairs_that_cannot_change_size_are_not_asked_to():
    scene = Scene((SceneObject("ring", "red", "small", 0, 0), SceneObject("ring", "red", "large", 2, 2)), "white")
    rng = np.random.default_rng(0)
    assert "resize" not in {sample_instruction(rng, scene)[0] for _ in range(100)}
    with pytest.raises(ValueError, match=r"for this picture, got 'resize'"):
        sample_instruction(rng, scene, kind="resize")


def test_changes_that_make_no_scene_are_refused():
    ring, circle = SceneObject("ring", "red", "small", 0, 0), SceneObject("circle", "red", "small", 1, 1)
    scene = Scene((ring, circle), "white")
    assert apply_edit(EditMeaning((scene,), removed=((0, 0), (1, 1)))) is None  # nothing is left
    assert apply_edit(EditMeaning((scene,), placed=(replace(ring, row=1, column=1),))) is None  # two alike
    assert apply_edit(EditMeaning((scene,), placed=(ring,))) is None  # nothing changes
    assert apply_edit(EditMeaning((scene,), background="navy")) == Scene((ring, circle), "navy")


def test_same_seed_same_edits():
    assert edits(100, seed=4) == edits(100, seed=4) != edits(100, seed=5)


def test_wrong_arguments_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"`kind` must be one of recolor, .*, got 'blur'"):
        sample_edit(rng, kind="blur")
    for difficulty in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"`difficulty` must be in \(0, 1\], got"):
            sample_edit(rng, difficulty=difficulty)
