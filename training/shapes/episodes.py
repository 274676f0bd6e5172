"""The tasks whose answers are more than one picture or one word: a sampler and a checker each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .dialogue import check_dialogue, check_multi_image_question, sample_dialogue, sample_multi_image_question
from .edits import check_edit, sample_edit
from .episode import Episode
from .explore import check_explore, sample_explore
from .howto import check_howto, sample_howto
from .story import check_story, sample_story
from .vla import check_vla, sample_vla


@dataclass(frozen=True)
class EpisodeTask:
    """A task of the world.

    Attributes:
        sample: `(rng, held_out=False, difficulty=1.0)` -> [`Episode`].
        check: `(meaning, answers)` -> rates in `[0, 1]`, booleans, or `None` where there was nothing to mark.
            `answers` has for each turn of the user a list of what the assistant said.
    """

    sample: Callable[..., Episode]
    check: Callable[[Any, list[list]], dict[str, float | bool | None]]


EPISODES: dict[str, EpisodeTask] = {
    "x2i": EpisodeTask(sample_edit, check_edit),
    "story": EpisodeTask(sample_story, check_story),
    "howto": EpisodeTask(sample_howto, check_howto),
    "explore": EpisodeTask(sample_explore, check_explore),
    "vla": EpisodeTask(sample_vla, check_vla),
    "multi_vqa": EpisodeTask(sample_multi_image_question, check_multi_image_question),
    "chat": EpisodeTask(sample_dialogue, check_dialogue),
}
"""Kind of sequence in training, and name of the task in an evaluation."""
