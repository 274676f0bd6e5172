"""Compare what a sentence says with what an image shows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .meaning import Meaning, meaning_of, relation_holds
from .scene import Scene

if TYPE_CHECKING:
    from .checker import ReadScene

_ASPECTS = {"colour": "color", "shape": "shape", "size": "size", "position": "position"}


def score(meaning: Meaning, read: ReadScene) -> dict[str, bool | float | None]:
    """How much of a meaning an image shows, under the best assignment of described objects to found ones.

    The assignment makes most described objects wholly right, then most aspects and relations.

    Returns:
        `dict`: shares in `[0, 1]`, or `None` where the text says nothing of the kind, for
            `object` (described objects found with all that is said of them), `colour`, `shape`, `size`, `position` and
            `relation`; booleans for `count` (as many objects as described and no unreadable cell), `background` (or
            `None`) and `whole_scene`: everything the text says holds, the count is exact and no cell is unreadable.
    """
    found = list(read.objects)
    # A described object may stay unfound: as many empty places as it takes.
    places = [*range(len(found)), *[None] * max(0, meaning.count - len(found))]
    best, best_key = None, (-1, -1)
    for assignment in itertools.permutations(places, meaning.count):
        result = _counts(meaning, [None if i is None else found[i] for i in assignment])
        key = (result["object"], sum(result.values()))
        if key > best_key:
            best, best_key = result, key
    totals = {name: sum(getattr(o, field) is not None for o in meaning.objects) for name, field in _ASPECTS.items()}
    totals |= {"object": meaning.count, "relation": len(meaning.relations)}
    shares = {name: best[name] / total if total else None for name, total in totals.items()}
    count = len(found) == meaning.count and not read.unreadable
    background = None if meaning.background is None else read.background == meaning.background
    whole = (
        count
        and read.background is not None
        and background is not False
        and all(share is None or share == 1.0 for share in shares.values())
    )
    keys = ("object", "count", "colour", "shape", "size", "position", "relation", "background", "whole_scene")
    values = {**shares, "count": count, "background": background, "whole_scene": whole}
    return {key: values[key] for key in keys}


def score_scene(scene: Scene, read: ReadScene) -> dict[str, bool | float | None]:
    """[`score`] against everything about a scene, for reconstructions: `whole_scene` means the scenes are equal."""
    return score(meaning_of(scene), read)


def _counts(meaning: Meaning, found: list) -> dict[str, int]:
    """How many statements of each kind hold when described object `i` is `found[i]` (`None`: not found)."""
    counts = dict.fromkeys((*_ASPECTS, "object", "relation"), 0)
    for described, o in zip(meaning.objects, found, strict=True):
        if o is None:
            continue
        right = True
        for name, field in _ASPECTS.items():
            said = getattr(described, field)
            if said is not None:
                counts[name] += said == getattr(o, field)
                right &= said == getattr(o, field)
        counts["object"] += right
    for relation in meaning.relations:
        subject, other = found[relation.subject], found[relation.object]
        if subject is not None and other is not None:
            holds = relation_holds(relation.name, (subject.row, subject.column), (other.row, other.column))
            counts["relation"] += holds
    return counts
