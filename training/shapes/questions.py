"""Questions about a scene that have exactly one right, short answer."""

import itertools
from dataclasses import dataclass

import numpy as np

from .language import describe_text
from .meaning import ASPECTS, RELATIONS, Described, cell_of, fits, looks_of, relation_holds
from .scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject
from .words import NUMBERS, PLACES, RELATION_PHRASES, choose, noun_phrase, with_article

QUESTION_KINDS: tuple[str, ...] = ("colour", "shape", "count", "size", "position", "relation", "background", "yes_no")
"""What [`sample_question`] may ask. [`describe`] is apart: its answer is long."""

_DESCRIBE_PROMPTS = ("describe the image.", "describe this image.", "describe the picture.", "describe this picture.")


@dataclass(frozen=True)
class Question:
    """A question, its one accepted answer (compare exactly, in lower case), and its kind."""

    text: str
    answer: str
    kind: str


def sample_question(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
    """One question about a scene.

    Args:
        kind (`str`, *optional*): one of [`QUESTION_KINDS`]; `None` draws one of those that the scene allows,
            uniformly.
    Raises:
        ValueError: if the kind is unknown, or is "relation" and the scene holds a single object.
    """
    kinds = [k for k in QUESTION_KINDS if k != "relation" or len(scene.objects) > 1]
    if kind is None:
        kind = choose(rng, kinds)
    if kind not in QUESTION_KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(QUESTION_KINDS)}, got {kind!r}.")
    if kind not in kinds:
        raise ValueError("`kind` 'relation' needs a scene of two or more objects, got one.")
    text, answer = _ASK[kind](scene, rng)
    return Question(text, answer, kind)


def describe(scene: Scene, rng: np.random.Generator) -> Question:
    """A request to describe the whole image, answered by the canonical full caption ([`describe_text`])."""
    return Question(choose(rng, _DESCRIBE_PROMPTS), describe_text(scene), "describe")


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    o = choose(rng, scene.objects)
    return f"what color is {refer(scene, o, rng, 'color')}?", o.color


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    o = choose(rng, scene.objects)
    return f"what shape is {refer(scene, o, rng, 'shape')}?", o.shape


def _size(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    o = choose(rng, scene.objects)
    return f"what size is {refer(scene, o, rng, 'size')}?", o.size


def _position(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    o = choose(rng, scene.objects)
    return f"where is {refer(scene, o, rng, 'position')}?", o.position


def _background(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return choose(rng, ("what color is the background?", "which color is the background?")), scene.background


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """All objects, or those of a colour, a shape or a size; a third of the time the value is drawn blindly."""
    aspect = choose(rng, (None, "color", "shape", "size"))
    if aspect is None:
        described = Described()
    elif rng.random() < 2 / 3:
        described = Described(**{aspect: getattr(choose(rng, scene.objects), aspect)})
    else:
        described = Described(**{aspect: choose(rng, _VALUES[aspect])})
    number = sum(fits(o, described) for o in scene.objects)
    return f"how many {noun_phrase(described, number=2)} are there?", NUMBERS[number]


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """ "is A above or below B?", or "what is above B?" where exactly one object is."""
    subject, other = _pair(scene, rng)
    name = choose(rng, [r for r in RELATIONS if relation_holds(r, cell_of(subject), cell_of(other))])
    if rng.random() < 0.5 and sum(relation_holds(name, cell_of(o), cell_of(other)) for o in scene.objects) == 1:
        answer = with_article(noun_phrase(looks_of(subject)))
        return f"what is {choose(rng, RELATION_PHRASES[name])} {refer(scene, other, rng)}?", answer
    a, b = (refer(scene, o, rng, "position") for o in (subject, other))
    # The true relation is drawn uniformly, so either answer of a pair is as likely.
    choice = "above or below" if name in ("above", "below") else "left of or right of"
    return f"is {a} {choice} {b}?", name


def _yes_no(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Yes and no with probability 1/2 each; a "no" is a near miss: one aspect of something true is changed."""
    truth = bool(rng.random() < 0.5)
    form = choose(rng, ("exists", "aspect", "background") + ("relation",) * (len(scene.objects) > 1))
    ask = {"exists": _is_there, "aspect": _is_it, "background": _is_background, "relation": _is_related}[form]
    return ask(scene, rng, truth), "yes" if truth else "no"


def _is_there(scene: Scene, rng: np.random.Generator, truth: bool) -> str:
    looks = looks_of(choose(rng, scene.objects))
    aspects = choose(rng, [a for n in (1, 2, 3) for a in itertools.combinations(("size", "color", "shape"), n)])
    described = Described(**{aspect: getattr(looks, aspect) for aspect in aspects})
    if not truth:
        misses = [m for m in _near_misses(described) if not any(fits(o, m) for o in scene.objects)]
        # Both sizes may be there: then nothing near is missing and the question asks for a colour that is.
        absent = [c for c in COLORS if all(o.color != c for o in scene.objects)]
        described = choose(rng, misses) if misses else Described(color=choose(rng, absent))
    return f"is there {with_article(noun_phrase(described))}?"


def _is_it(scene: Scene, rng: np.random.Generator, truth: bool) -> str:
    o = choose(rng, scene.objects)
    aspect = choose(rng, ASPECTS)
    value = getattr(o, aspect)
    if not truth:
        value = choose(rng, [v for v in _VALUES[aspect] if v != value])
    thing = refer(scene, o, rng, aspect)
    said = {"position": choose(rng, PLACES[value])} if aspect == "position" else {}
    return f"is {thing} {said.get(aspect, with_article(value) if aspect == 'shape' else value)}?"


def _is_background(scene: Scene, rng: np.random.Generator, truth: bool) -> str:
    name = scene.background if truth else choose(rng, [b for b in BACKGROUNDS if b != scene.background])
    return f"is the background {name}?"


def _is_related(scene: Scene, rng: np.random.Generator, truth: bool) -> str:
    subject, other = _pair(scene, rng)
    name = choose(rng, [r for r in RELATIONS if relation_holds(r, cell_of(subject), cell_of(other)) == truth])
    a, b = (refer(scene, o, rng, "position") for o in (subject, other))
    return f"is {a} {choose(rng, RELATION_PHRASES[name])} {b}?"


_ASK = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "size": _size,
    "position": _position,
    "relation": _relation,
    "background": _background,
    "yes_no": _yes_no,
}
_VALUES = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES, "position": tuple(PLACES)}


def refer(scene: Scene, target: SceneObject, rng: np.random.Generator, hidden: str | None = None) -> str:
    """ "the red circle": a description without the aspect `hidden` that fits the target alone.

    Drawn uniformly among the sets of aspects that single the target out. Without its position looks always do; without
    one of its looks the position does.
    """
    usable = [aspect for aspect in ASPECTS if aspect != hidden]
    options = []
    for number in range(len(usable) + 1):
        for aspects in itertools.combinations(usable, number):
            described = Described(**{aspect: getattr(target, aspect) for aspect in aspects})
            if sum(fits(o, described) for o in scene.objects) == 1:
                options.append(described)
    described = choose(rng, options)
    phrase = f"the {noun_phrase(described)}"
    return phrase if described.position is None else f"{phrase} {choose(rng, PLACES[described.position])}"


def _near_misses(described: Described) -> list[Described]:
    """The descriptions that differ in exactly one aspect that is said."""
    said = {aspect: getattr(described, aspect) for aspect in ASPECTS if getattr(described, aspect) is not None}
    return [Described(**{**said, a: v}) for a, old in said.items() for v in _VALUES[a] if v != old]


def _pair(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, SceneObject]:
    first, second = rng.permutation(len(scene.objects))[:2]
    return scene.objects[first], scene.objects[second]
