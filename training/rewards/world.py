"""The exact checkers of the procedural world as a reward."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..play import said
from ..shapes import EPISODES, IMAGE_SIZE, Question, Said, parse_caption, read_scenes, score
from .base import Sample, SampleReward, mean

#: Task -> the marks that partial credit is for, and the mark of an answer that is wholly right.  What an answer could
#: have by repeating one picture (`return`, `border` of "explore") is left out, and so is what follows from the rest.
PARTIAL_CREDIT: dict[str, tuple[tuple[str, ...], str]] = {
    "t2i": (("object", "count", "colour", "shape", "size", "position", "relation", "background"), "whole_scene"),
    "x2i": (("edit", "preservation"), "whole_scene"),
    "vqa": ((), "answer"),
    "story": (("narration", "character", "world", "frames"), "whole"),
    "howto": (("legal", "goal"), "plan"),
    "explore": (("view", "start", "moves_legal", "steps"), "whole"),
    "vla": (("legal", "goal"), "success"),
    "chat": (("text", "image"), "whole"),
}

_IN_ORDER = frozenset(PARTIAL_CREDIT) - {"t2i", "x2i", "vqa"}


class WorldReward(SampleReward):
    r"""How right an answer is, read from its pixels and its words.

    $$ r = w \cdot [\text{wholly right}] + (1 - w) \cdot \overline{m} $$

    with the mean of those marks m of [`PARTIAL_CREDIT`] that there is something to mark for; a "vqa" answer is right
    (1) or wrong (0). With `marks`, r is the mean of these alone, and `None` where there is none of them.

    Columns: `task` and `meaning`, which is what the prompt means: `Episode.meaning`; for "t2i" a `Meaning` or a
    caption in the world's language; for "vqa" a `Question` or its answer. The completion is `segments`, a list of
    segments or, of a conversation of several turns, a list of such lists. "t2i" and "x2i" can do with `images`, "vqa"
    with `texts` instead.

    Range: [0, 1].

    Example:
        >>> WorldReward()(["a red ring"], [""], task=["t2i"], meaning=["a red ring"], images=[[a_blue_ring]])
        [0.25]

    It is (1 + 0 + 1 + 0) / 4 for `count`, `colour`, `shape` and `object`, halved because the whole is wrong.

    Args:
        marks (`Sequence[str]`, *optional*): names of the checker's marks, e.g. `["preservation"]` of "x2i" or
            `["character"]` of "story".
        whole_weight (`float`): w, in [0, 1].
        name (`str`, *optional*): default: "world", or "world_" and the marks.
    Raises:
        ValueError: if no task has one of the marks, or the weight is another.
    """

    needs = ("task", "meaning")

    def __init__(self, marks: Sequence[str] | None = None, whole_weight: float = 0.5, name: str | None = None):
        known = {mark for aspects, whole in PARTIAL_CREDIT.values() for mark in (*aspects, whole)} | {"preserved"}
        unknown = sorted(set(marks or ()) - known)
        if unknown or isinstance(marks, str) or (marks is not None and not marks):
            raise ValueError(f"`marks` must be a list of {', '.join(sorted(known))}, or None; got {marks!r}.")
        if not 0 <= whole_weight <= 1:
            raise ValueError(f"`whole_weight` must be in [0, 1], got {whole_weight!r}.")
        self.marks, self.whole_weight = marks, whole_weight
        self.name = name or "_".join(("world", *(marks or ())))

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """As every reward.  Raises a ValueError, too, if a task is none of the world's or its answers are missing."""
        for task in sorted({task for task in columns.get("task", ()) if task is not None}):
            if task not in PARTIAL_CREDIT:
                raise ValueError(f"`task` must be one of {', '.join(PARTIAL_CREDIT)}, got {task!r}.")
            wanted = "segments" if task in _IN_ORDER else "texts" if task == "vqa" else "images"
            if "segments" not in columns and wanted not in columns:
                raise ValueError(f"The reward {self.name!r} needs the column `{wanted}` for the task {task!r}.")
        return super().__call__(prompts, completions, **columns)

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        answers = [_answers(sample) for sample in samples]
        pictures = [one for turns in answers for turn in turns for one in turn if isinstance(one, np.ndarray)]
        if pictures:
            read_scenes(np.stack(pictures))  # together, which takes less; the checkers then find it remembered
        return [self._score(sample, own) for sample, own in zip(samples, answers, strict=True)]

    def _score(self, sample: Sample, answers: list[list[Said]]) -> float | None:
        task, meaning = sample.columns["task"], sample.columns["meaning"]
        found = check_answer(task, meaning, answers)
        if self.marks is not None:
            values = [found[mark] for mark in self.marks if found.get(mark) is not None]
            return mean(values) if values else None
        return grade(task, found, self.whole_weight)


def grade(task: str, marks: dict[str, bool | float | None], whole_weight: float = 0.5) -> float:
    """The marks of an answer as one number in [0, 1], see [`WorldReward`]."""
    aspects, whole = PARTIAL_CREDIT[task]
    values = [marks[aspect] for aspect in aspects if marks[aspect] is not None]
    if not values:
        return float(marks[whole])
    return whole_weight * marks[whole] + (1 - whole_weight) * mean(values)


def check_answer(task: str, meaning: Any, answers: list[list[Said]]) -> dict[str, bool | float | None]:
    """The marks of an answer by the checker of its task.

    Args:
        meaning: see [`WorldReward`].
        answers (`list[list[Said]]`): pieces of each turn of the assistant.
    """
    if task == "t2i":
        meaning = parse_caption(meaning) if isinstance(meaning, str) else meaning
        pictures = [piece for turn in answers for piece in turn if isinstance(piece, np.ndarray)]
        if len(pictures) != 1:
            # A picture of no colour of the world: nothing that is said of it is true.
            pictures = [np.full((IMAGE_SIZE, IMAGE_SIZE, 3), (255, 0, 255), dtype=np.uint8)]
        return score(meaning, read_scenes(pictures[0][None])[0])
    if task == "vqa":
        meaning = meaning if isinstance(meaning, Question) else Question("", meaning, "")
        return EPISODES["multi_vqa"].check(meaning, answers)
    return EPISODES[task].check(meaning, answers)


def _answers(sample: Sample) -> list[list[Said]]:
    segments = sample.columns.get("segments")
    if segments is not None:
        turns = segments if segments and isinstance(segments[0], list) else [segments]
        return [[said(segment) for segment in turn] for turn in turns]
    return [[sample.columns.get("texts") or "", *map(_pixels, sample.images)]]


def _pixels(image: Image.Image) -> np.ndarray | None:
    return np.asarray(image) if image.size == (IMAGE_SIZE, IMAGE_SIZE) else None
