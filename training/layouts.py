"""Where the objects of a training scene stand when its caption leaves that open.

Any arrangement that fits a sentence is right. A model that draws cell after cell must know what is still to come, and
it learns that sooner from typical layouts than from arbitrary ones: things above or below one another share a column,
things left or right of one another a row, and others stand in rows of their own, from top to bottom as mentioned.
"""

import dataclasses
import itertools
from functools import cache, lru_cache

import numpy as np

from .shapes import (
    BACKGROUNDS,
    COLORS,
    GRID_SIZE,
    HELD_OUT,
    SHAPES,
    SIZES,
    Meaning,
    Relation,
    Scene,
    SceneObject,
    relation_holds,
)

Cell = tuple[int, int]


def typical_layout(scene: Scene, meaning: Meaning, rng: np.random.Generator) -> Scene:
    """The same objects; those whose position the sentence leaves open are moved to where one would expect them.

    Args:
        scene ([`Scene`]): one that the sentence is true of.
        meaning ([`Meaning`]): what the sentence says.
        rng (`np.random.Generator`): chooses among the best layouts.
    """
    mentioned = next(p for p in itertools.permutations(scene.objects) if _is_true(meaning, p))
    options = _layouts(tuple(described.cell for described in meaning.objects), meaning.relations)
    cells = options[int(rng.integers(len(options)))]
    placed = [
        dataclasses.replace(o, row=row, column=column) for o, (row, column) in zip(mentioned, cells, strict=True)
    ]
    return Scene(tuple(sorted(placed, key=lambda o: (o.row, o.column))), scene.background)


@lru_cache(maxsize=4096)
def canonical_scene(meaning: Meaning) -> Scene:
    """The one picture of a sentence: what it leaves open is always the same.

    Cells are the first of the best layouts; looks the first that fit, differ, and may be shown in training, in the
    order of the world's lists; the background is the first one.
    """
    cells = _layouts(tuple(described.cell for described in meaning.objects), meaning.relations)[0]
    fitting = [
        [
            (shape, color, size)
            for color, shape, size in itertools.product(COLORS, SHAPES, SIZES)
            if (color, shape) not in HELD_OUT
            and described.color in (None, color)
            and described.shape in (None, shape)
            and described.size in (None, size)
        ]
        for described in meaning.objects
    ]
    looks = next(looks for looks in itertools.product(*fitting) if len(set(looks)) == len(looks))
    objects = [SceneObject(*look, *cell) for look, cell in zip(looks, cells, strict=True)]
    background = meaning.background or next(iter(BACKGROUNDS))
    return Scene(tuple(sorted(objects, key=lambda o: (o.row, o.column))), background)


def _is_true(meaning: Meaning, objects: tuple[SceneObject, ...]) -> bool:
    """Whether all that is said of the first described object is true of the first object, and so on."""
    said = all(
        getattr(described, aspect) in (None, getattr(o, aspect))
        for described, o in zip(meaning.objects, objects, strict=True)
        for aspect in ("shape", "color", "size", "position")
    )
    return said and _relations_hold(meaning.relations, [(o.row, o.column) for o in objects])


def _relations_hold(relations: tuple[Relation, ...], cells: list[Cell] | tuple[Cell, ...]) -> bool:
    return all(relation_holds(r.name, cells[r.subject], cells[r.object]) for r in relations)


@cache
def _layouts(said: tuple[Cell | None, ...], relations: tuple[Relation, ...]) -> tuple[tuple[Cell, ...], ...]:
    """The best layouts: a cell for each object, in order of mention. `said`: the cells that are given."""
    grid = tuple(itertools.product(range(GRID_SIZE), repeat=2))
    best: list[tuple[Cell, ...]] = []
    least = None
    for cells in itertools.product(*[grid if cell is None else (cell,) for cell in said]):
        if len(set(cells)) < len(cells) or not _relations_hold(relations, cells):
            continue
        cost = _cost(said, relations, cells)
        if least is None or cost < least:
            best, least = [], cost
        if cost == least:
            best.append(cells)
    return tuple(best)


def _cost(said: tuple[Cell | None, ...], relations: tuple[Relation, ...], cells: tuple[Cell, ...]) -> int:
    """How far a layout is from what the top of this file calls typical."""
    cost = 0
    for r in relations:
        axis = 1 if r.name in ("above", "below") else 0
        cost += cells[r.subject][axis] != cells[r.object][axis]
    related = {frozenset((r.subject, r.object)) for r in relations}
    for i, j in itertools.combinations(range(len(cells)), 2):
        if frozenset((i, j)) in related or (said[i] is not None and said[j] is not None):
            continue
        cost += cells[i][0] == cells[j][0]
        cost += said[i] is None and said[j] is None and cells[i][0] > cells[j][0]
    return cost
