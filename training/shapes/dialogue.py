"""Questions about several pictures, and conversations that mix questions, drawing and editing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .checker import read_scenes
from .edits import ORDINALS, EditMeaning, sample_instruction, score_edit, without_preposition
from .episode import Episode, GlobalThought, ImageThought, Said, Turn, up_to
from .language import caption
from .meaning import Described, Meaning, cell_of, fits, looks_of
from .questions import Question, describe, sample_question
from .scene import MAX_OBJECTS, Scene, SceneObject, sample_scene
from .scoring import score
from .words import PLACES, choose, noun_phrase, with_article

MULTI_IMAGE_KINDS: tuple[str, ...] = ("which_image", "in_image", "difference", "more")
"""What a question about several pictures may be of."""
THREE_IMAGES_DIFFICULTY = 0.5
"""Difficulty from which a question may show three pictures."""


def sample_multi_image_question(
    rng: np.random.Generator, held_out: bool | None = False, difficulty: float = 1.0, kind: str | None = None
) -> Episode:
    """Draw a question about two or three pictures: task "vqa", kind one of [`MULTI_IMAGE_KINDS`].

    The meaning is a [`Question`].

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): of every picture, as in [`sample_scene`]; an edit between two pictures may take
            away or bring in held-out pairs unless it is `False`.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; see [`up_to`] and [`THREE_IMAGES_DIFFICULTY`].
        kind (`str`, *optional*): one of [`MULTI_IMAGE_KINDS`]; `None` draws it uniformly.
    Raises:
        ValueError: if the difficulty or the kind is another.
    """
    most = up_to(difficulty, 1, MAX_OBJECTS)
    if kind is None:
        kind = choose(rng, MULTI_IMAGE_KINDS)
    if kind not in MULTI_IMAGE_KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(MULTI_IMAGE_KINDS)}, got {kind!r}.")
    number = 3 if difficulty >= THREE_IMAGES_DIFFICULTY and rng.random() < 0.5 else 2
    scenes, text, answer = _ASK[kind](rng, held_out, most, number)
    turns = Turn("user", (*scenes, text)), Turn("assistant", (answer,))
    return Episode("vqa", kind, turns, Question(text, answer, kind))


def sample_questions_about_images(
    rng: np.random.Generator, number: int, held_out: bool | None = False
) -> tuple[tuple[Scene, ...], list[tuple[str, str]]]:
    """Two or three pictures (a third of the time one and its edit), and several questions with their answers.

    For training, which learns as much from pictures as it is asked about them.
    """
    if rng.random() < 1 / 3:
        before = sample_scene(rng, held_out=held_out)
        *_, after = sample_instruction(rng, before, held_out)
        scenes, asked = (before, after), [_ask_change(before, after, rng)]
    else:
        scenes, asked = tuple(sample_scene(rng, held_out=held_out) for _ in range(int(rng.integers(2, 4)))), []
    while len(asked) < number:
        kind = choose(rng, ("which", "in", "more"))
        if kind == "more" and len(scenes) == 2:
            asked.append(_ask_more(*scenes, rng))
        elif kind == "which" and (one := _ask_which(scenes, int(rng.integers(len(scenes))), rng)) is not None:
            asked.append(one)
        elif kind == "in":
            asked.append(_ask_in(scenes, rng))
    return scenes, [asked[index] for index in rng.permutation(number)]


def check_multi_image_question(meaning: Question, answers: Sequence[Sequence[Said]]) -> dict[str, bool | float | None]:
    """Mark an answer: `answer` is whether it is the right text and nothing else (thoughts, capitals and white space
    around it do not count)."""
    return {"answer": len(answers) == 1 and _is_text(meaning.answer, answers[0])}


def describe_change(before: Scene, after: Scene) -> str:
    """What one edit of a scene did, in the one canonical wording, e.g. "the small red circle is now blue.".

    Raises:
        ValueError: if the scenes are equal, or differ by more than one object or the background.
    """
    old = [o for o in before.objects if o not in after.objects]
    new = [o for o in after.objects if o not in before.objects]
    if before.background != after.background and not old and not new:
        return f"the background is now {after.background}."
    if before.background == after.background and max(len(old), len(new)) == 1:
        if not new:
            return f"{_the(old[0])} is gone."
        if not old:
            return f"there is now {_a(new[0])} {PLACES[new[0].position][0]}."
        if looks_of(old[0]) == looks_of(new[0]):
            return f"{_the(old[0])} moved to {without_preposition(PLACES[new[0].position][0])}."
        if cell_of(old[0]) == cell_of(new[0]):
            return f"{_the(old[0])} is now {_news(old[0], new[0])}."
    raise ValueError("`before` and `after` must differ by one edit: one object, or the background.")


@dataclass(frozen=True)
class DialogueMeaning:
    """What is right in each turn: a text, the changes of the last picture, or what a drawing must show.

    The last picture is that of the right conversation, whatever was answered before.
    """

    turns: tuple[str | EditMeaning | Meaning, ...]


def sample_dialogue(rng: np.random.Generator, held_out: bool | None = False, difficulty: float = 1.0) -> Episode:
    """Draw a conversation of 2 to 4 turns of the user: task "chat", kind "2 turns", "3 turns" or "4 turns".

    The user shows a picture or has one drawn; then asks about the last picture, has it edited, has another drawn or
    shows another. At least one answer is a text and at least one a picture.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): of every picture shown or drawn, as in [`sample_scene`]; an edit may take away
            or bring in held-out pairs unless it is `False`.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; turns of the user are at most one more than
            [`up_to`].
    Raises:
        ValueError: if the difficulty is another.
    """
    most = up_to(difficulty, 1, MAX_OBJECTS)
    turns, right, scene = [], [], None
    for action, fresh in _plan(rng, int(rng.integers(2, most + 2))):
        if fresh:
            scene = _scene(rng, held_out, most)
        shown = (scene,) if fresh and action != "draw" else ()
        if action == "ask":
            question = describe(scene, rng) if rng.random() < 1 / 8 else sample_question(scene, rng)
            text, answer, meaning = question.text, question.answer, question.answer
        elif action == "edit":
            _, text, meaning, scene = sample_instruction(rng, scene, held_out)
            text, answer = text if fresh else f"now {text}", scene
        else:
            drawn = _drawable_caption(scene, rng)
            text, answer, meaning = f"draw {drawn.text}.", scene, drawn.meaning
        turns += [Turn("user", (*shown, text)), Turn("assistant", (answer,))]
        right.append(meaning)
    return Episode("chat", f"{len(right)} turns", tuple(turns), DialogueMeaning(tuple(right)))


def check_dialogue(meaning: DialogueMeaning, answers: Sequence[Sequence[Said]]) -> dict[str, bool | float | None]:
    """Mark the answers of a conversation, each by itself.

    Args:
        meaning (`DialogueMeaning`): of the conversation.
        answers: pieces of each turn of the assistant; a turn that is missing is wrong. A turn must be one text or one
            picture; thoughts beside it do not count.
    Returns:
        `dict`: `text` (share of the text turns that are exactly right, capitals and white space around them aside),
            `image` (share of the picture turns that are wholly right), each `None` without such turns, and `whole`
            (every turn is right, and none is too many).
    """
    marks = {"text": [], "image": []}
    for right, said in itertools.zip_longest(meaning.turns, answers[: len(meaning.turns)], fillvalue=()):
        if isinstance(right, str):
            marks["text"].append(_is_text(right, said))
        else:
            marks["image"].append(_is_picture(right, said))
    shares = {name: sum(values) / len(values) if values else None for name, values in marks.items()}
    whole = len(answers) == len(meaning.turns) and all(itertools.chain(*marks.values()))
    return {**shares, "whole": whole}


# ------------------------------------------------------------------------------------------------- several pictures


def _which_image(rng: np.random.Generator, held_out: bool | None, most: int, number: int):
    """Something that exactly one of the pictures shows; each is as likely to be the answer."""
    index = int(rng.integers(number))
    while True:
        scenes = [_scene(rng, held_out, most) for _ in range(number)]
        if (asked := _ask_which(scenes, index, rng)) is not None:
            return scenes, *asked


def _ask_which(scenes: Sequence[Scene], index: int, rng: np.random.Generator) -> tuple[str, str] | None:
    """Question and answer about something that only one picture shows; `None` if it shows nothing of its own."""
    others = [scene for number, scene in enumerate(scenes) if number != index]
    background = scenes[index].background
    if rng.random() < 0.15 and all(scene.background != background for scene in others):
        return f"which image has a {background} background?", ORDINALS[index]
    looks = looks_of(choose(rng, scenes[index].objects))
    options = [
        described
        for count in (1, 2, 3)
        for aspects in itertools.combinations(("size", "color", "shape"), count)
        for described in [Described(**{aspect: getattr(looks, aspect) for aspect in aspects})]
        if not any(fits(o, described) for scene in others for o in scene.objects)
    ]
    if not options:
        return None
    return f"which image has {with_article(noun_phrase(choose(rng, options)))}?", ORDINALS[index]


def _in_image(rng: np.random.Generator, held_out: bool | None, most: int, number: int):
    """Any question about one picture, asked of one of several."""
    scenes = [_scene(rng, held_out, most) for _ in range(number)]
    return scenes, *_ask_in(scenes, rng)


def _ask_in(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    index = int(rng.integers(len(scenes)))
    question = sample_question(scenes[index], rng)
    return f"{question.text.removesuffix('?')} in the {ORDINALS[index]} image?", question.answer


def _difference(rng: np.random.Generator, held_out: bool | None, most: int, number: int):
    """Two pictures, the second an edit of the first."""
    before = _scene(rng, held_out, most)
    *_, after = sample_instruction(rng, before, held_out)
    return (before, after), *_ask_change(before, after, rng)


def _ask_change(before: Scene, after: Scene, rng: np.random.Generator) -> tuple[str, str]:
    text = choose(rng, ("what changed?", "what changed in the second image?"))
    return text, describe_change(before, after)


def _more(rng: np.random.Generator, held_out: bool | None, most: int, number: int):
    """Two pictures; the three answers are equally likely."""
    most = max(2, most)
    fewer, more = sorted((rng.permutation(most) + 1)[:2].tolist())
    word = choose(rng, ("more", "fewer"))
    answer = choose(rng, (*ORDINALS[:2], "the same"))
    if answer == "the same":
        numbers = [choose(rng, (fewer, more))] * 2
    else:
        numbers = [fewer, more] if (answer == "second") == (word == "more") else [more, fewer]
    return [sample_scene(rng, n, held_out) for n in numbers], f"which image has {word} objects?", answer


def _ask_more(first: Scene, second: Scene, rng: np.random.Generator) -> tuple[str, str]:
    word, numbers = choose(rng, ("more", "fewer")), (len(first.objects), len(second.objects))
    if numbers[0] == numbers[1]:
        return f"which image has {word} objects?", "the same"
    return f"which image has {word} objects?", ORDINALS[(numbers[0] < numbers[1]) == (word == "more")]


_ASK = {"which_image": _which_image, "in_image": _in_image, "difference": _difference, "more": _more}


def _the(o: SceneObject) -> str:
    return f"the {noun_phrase(looks_of(o))}"


def _a(o: SceneObject) -> str:
    return with_article(noun_phrase(looks_of(o)))


def _news(old: SceneObject, new: SceneObject) -> str:
    """The one word that is new, or all of the new object where more than a colour or a size changed."""
    changed = [aspect for aspect in ("shape", "color", "size") if getattr(old, aspect) != getattr(new, aspect)]
    return _a(new) if len(changed) > 1 or changed == ["shape"] else getattr(new, changed[0])


# ---------------------------------------------------------------------------------------------------- conversations


def _plan(rng: np.random.Generator, number: int) -> list[tuple[str, bool]]:
    """What each turn of the user asks for, and whether about a fresh scene."""
    while True:
        plan = [(_draw_action(rng, (0.45, 0.2, 0.35)), True)]
        while len(plan) < number:
            action = _draw_action(rng, (0.45, 0.45, 0.1))
            plan.append((action, action == "draw" or bool(rng.random() < 0.1)))
        if 0 < sum(action == "ask" for action, _ in plan) < number:
            return plan


def _draw_action(rng: np.random.Generator, rates: tuple[float, float, float]) -> str:
    """ "ask", "edit" or "draw", at these rates."""
    draw = rng.random()
    return "ask" if draw < rates[0] else "edit" if draw < rates[0] + rates[1] else "draw"


def _scene(rng: np.random.Generator, held_out: bool | None, most: int) -> Scene:
    return sample_scene(rng, int(rng.integers(1, most + 1)), held_out)


def _drawable_caption(scene: Scene, rng: np.random.Generator):
    """A full caption that can follow "draw": one that does not say "there is"."""
    while True:
        drawn = caption(scene, rng, full=True)
        if "there " not in drawn.text:
            return drawn


def _only(said: Sequence[Said]) -> Said:
    """The one piece of an answer beside thoughts and blank text; `None` if there is none or more than one."""
    thoughts = (GlobalThought, ImageThought)
    pieces = [p for p in said if not isinstance(p, thoughts) and not (isinstance(p, str) and not p.strip())]
    return pieces[0] if len(pieces) == 1 else None


def _is_text(right: str, said: Sequence[Said]) -> bool:
    piece = _only(said)
    return isinstance(piece, str) and piece.strip().lower() == right


def _is_picture(right: EditMeaning | Meaning, said: Sequence[Said]) -> bool:
    piece = _only(said)
    if not isinstance(piece, np.ndarray):
        return False
    read = read_scenes(piece[None])[0]
    marks = score_edit(right, read) if isinstance(right, EditMeaning) else score(right, read)
    return marks["whole_scene"]
