"""Captions: a scene as a sentence, with the meaning of the sentence beside it.

A full caption fixes the whole scene. A partial one leaves things out (sizes, colours, shapes, positions, the
background) or says a relation in place of a position. Every caption mentions every object, so the number of objects is
always exact.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .meaning import INVERSE, RELATIONS, Described, Meaning, Relation, meaning_of, relation_holds
from .parsing import parse_caption
from .scene import Scene, SceneObject
from .words import NUMBERS, PLACES, RELATION_PHRASES, choose, noun_phrase, with_article

__all__ = ["Caption", "brief_text", "caption", "describe_text", "parse_caption"]

_OPENERS = ("", "", "", "an image of ", "a picture of ", "there is ")
_SYNONYMS = {"small": "tiny", "large": "big"}


def brief_text(objects: Iterable[SceneObject]) -> str:
    """What stands where, for thoughts: "small red circle top left, large blue square center", or "nothing"."""
    return ", ".join(f"{o.size} {o.color} {o.shape} {o.position}" for o in objects) or "nothing"


@dataclass(frozen=True)
class Caption:
    """A sentence and what it says: `parse_caption(text) == meaning`."""

    text: str
    meaning: Meaning


def caption(scene: Scene, rng: np.random.Generator, full: bool | None = None) -> Caption:
    """One of the many sentences that are true of a scene.

    Args:
        scene (`Scene`): what to describe.
        rng (`np.random.Generator`): draws the order, the wording and what is left out.
        full (`bool`, *optional*): `True` fixes the whole scene, `False` leaves something open, `None` draws either
            with probability 1/2.
    """
    if full is None:
        full = rng.random() < 0.5
    order = rng.permutation(len(scene.objects))
    objects = [meaning_of(scene).objects[i] for i in order]
    if full:
        return _sentence(_Items().add_all(objects, rng), scene.background, rng)
    background = scene.background if rng.random() < 0.5 else None
    if rng.random() < 0.15 and (alike := _alike(objects, rng)) is not None:
        return _sentence(_Items().add_all(alike, rng), background, rng)
    objects = _leave_out(objects, rng)
    cells = [(scene.objects[i].row, scene.objects[i].column) for i in order]
    if len(objects) > 1 and rng.random() < 0.6:
        return _sentence(_related(objects, cells, rng), background, rng)
    if all(None not in (o.shape, o.color, o.size, o.position) for o in objects) and background is not None:
        background = None
    return _sentence(_Items().add_all(objects, rng), background, rng)


def describe_text(scene: Scene) -> str:
    """The canonical full caption: reading order, first wording, no opener."""
    objects = sorted(meaning_of(scene).objects, key=lambda o: o.cell)
    things = [f"{with_article(noun_phrase(o))} {PLACES[o.position][0]}" for o in objects]
    return f"{_join(things, final='and')} on a {scene.background} background"


class _Items:
    """Phrases for the items of a sentence, and the objects and relations in their order of mention."""

    def __init__(self):
        self.phrases: list[str] = []
        self.objects: list[Described] = []
        self.relations: list[Relation] = []

    def add_all(self, objects: list[Described], rng: np.random.Generator) -> "_Items":
        """One item an object; objects that are described alike and have no position become one plural."""
        left = list(objects)
        while left:
            o = left.pop(0)
            number = 1 if o.position is not None else 1 + left.count(o)
            left = [other for other in left if number == 1 or other != o]
            if number == 1:
                self.phrases.append(self.mention(o, rng))
            else:
                self.objects += [o] * number
                self.phrases.append(f"{NUMBERS[number]} {noun_phrase(o, _size_word(o, rng), number)}")
        return self

    def mention(self, described: Described, rng: np.random.Generator) -> str:
        """One object's phrase with its article and place; counts it as mentioned."""
        self.objects.append(described)
        phrase = with_article(noun_phrase(described, _size_word(described, rng)))
        return phrase if described.position is None else f"{phrase} {choose(rng, PLACES[described.position])}"


def _alike(objects: list[Described], rng: np.random.Generator) -> list[Described] | None:
    """Says the same few aspects of every object, such that two at least agree: "two red objects and a blue object".

    `None` for a single object. Chance alone would make plurals too rare to be learnt.
    """
    options = []
    for number in range(3):
        for aspects in itertools.combinations(("shape", "color", "size"), number):
            described = [Described(**{aspect: getattr(o, aspect) for aspect in aspects}) for o in objects]
            if len(set(described)) < len(described):
                options.append(described)
    return choose(rng, options) if options else None


def _leave_out(objects: list[Described], rng: np.random.Generator) -> list[Described]:
    """Drops aspects: each has a rate of its own for the caption, so that captions differ in what they are about."""
    keep = {
        "size": choose(rng, (0.0, 0.5, 1.0)),
        "position": choose(rng, (0.0, 0.0, 0.5, 1.0)),
        "color": choose(rng, (0.6, 1.0, 1.0, 1.0)),
        "shape": choose(rng, (0.6, 1.0, 1.0, 1.0)),
    }
    return [replace(o, **{aspect: None for aspect, rate in keep.items() if rng.random() >= rate}) for o in objects]


def _related(objects: list[Described], cells: list[tuple[int, int]], rng: np.random.Generator) -> _Items:
    """Two or three objects; the first two (perhaps the first and the third) tied by relations, not positions."""
    items = _Items()
    first, second = (replace(o, position=None) for o in objects[:2])
    name = _true_relation(cells[0], cells[1], rng)
    if len(objects) == 3 and rng.random() < 0.5:
        third = replace(objects[2], position=None)
        other_name = _true_relation(cells[0], cells[2], rng)
        phrase = items.mention(first, rng)
        phrase += f" {choose(rng, RELATION_PHRASES[name])} {items.mention(second, rng)}"
        phrase += f" and {choose(rng, RELATION_PHRASES[other_name])} {items.mention(third, rng)}"
        items.phrases.append(phrase)
        items.relations += [Relation(0, name, 1), Relation(0, other_name, 2)]
        return items
    if rng.random() < 0.25:
        phrase = f"{items.mention(first, rng)} with {items.mention(second, rng)}"
        items.phrases.append(f"{phrase} {choose(rng, RELATION_PHRASES[INVERSE[name]])} it")
        items.relations.append(Relation(1, INVERSE[name], 0))
    else:
        phrase = f"{items.mention(first, rng)} {choose(rng, RELATION_PHRASES[name])}"
        items.phrases.append(f"{phrase} {items.mention(second, rng)}")
        items.relations.append(Relation(0, name, 1))
    return items.add_all(objects[2:], rng)


def _true_relation(subject: tuple[int, int], other: tuple[int, int], rng: np.random.Generator) -> str:
    """A relation that holds; two cells always differ in row or column."""
    return choose(rng, [name for name in RELATIONS if relation_holds(name, subject, other)])


def _sentence(items: _Items, background: str | None, rng: np.random.Generator) -> Caption:
    """Joins the items and says the background before or after them."""
    # "a above b and c on the left" would leave open what c belongs to; a comma ends the relation.
    body = ", and ".join(items.phrases) if items.relations else _join(items.phrases, choose(rng, ("and", "and", ",")))
    opener = choose(rng, _OPENERS)
    if opener == "there is " and (len(items.phrases) > 1 or body.startswith(NUMBERS)):
        opener = "there are "
    if background is None:
        text = opener + body
    else:
        form = rng.random()
        if form < 0.6:
            text = f"{opener}{body} on a {background} background"
        elif form < 0.8:
            text = f"a {background} background with {body}"
        else:
            text = f"on a {background} background, {opener if opener.startswith('there') else ''}{body}"
    return Caption(text, Meaning(tuple(items.objects), tuple(items.relations), background))


def _join(phrases: list[str], final: str) -> str:
    """ "a", "a and b", "a, b and c"; with `final=","`: "a, b, c"."""
    if final == "," or len(phrases) == 1:
        return ", ".join(phrases)
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _size_word(described: Described, rng: np.random.Generator) -> str | None:
    """The size's name, or one time in eight its synonym."""
    if described.size is None or rng.random() >= 0.125:
        return described.size
    return _SYNONYMS[described.size]
