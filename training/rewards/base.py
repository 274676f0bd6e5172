"""What a reward is: a callable with TRL's signature, a name and a range.

A completion that is bad gets the lowest value of the range; `None` is for what cannot be measured: the data set has no
value in a column that the reward needs, or measuring failed. Otherwise a model could escape a reward by making nothing
that can be measured.
"""

import importlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from PIL import Image

logger = logging.getLogger(__name__)

EXTRA = "rewards"
"""The extra of the package that brings what rewards need beside the package's own dependencies."""


@runtime_checkable
class Reward(Protocol):
    """What [`RewardMix`] and TRL's trainers take: any callable with these two attributes.

    Attributes:
        name (`str`): in logs.
        range (`tuple[float, float]`): lowest and highest value.
    """

    name: str
    range: tuple[float, float]

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]: ...


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt (`str`): what the user says, see [`prompt_text`].
        images (`tuple[Image.Image, ...]`): the complete images of the completion, in RGB.
        columns (`Mapping[str, Any]`): its value of every other column, of the data set or of the rollout.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    columns: Mapping[str, Any]


class SampleReward(ABC):
    """A reward that looks at each completion by itself.

    A subclass sets `name`, `range` and `needs`, and writes [`scores`] and, if it has weights, [`load`]. If `scores`
    raises, its samples are tried one by one; a sample that fails alone gets `None` and is counted in `num_failures`.
    Missing columns, weights and packages are errors of the set-up, and are raised.

    Attributes:
        needs (`tuple[str, ...]`): columns without which there is no reward. A sample with `None` in one gets `None`.
        num_failures (`int`): samples that failed so far.
        last_failure (`Exception`, *optional*): of the last of them.
    """

    name: str
    range: tuple[float, float] = (0.0, 1.0)
    needs: tuple[str, ...] = ("images",)
    num_failures: int = 0
    last_failure: Exception | None = None

    @property
    def __name__(self) -> str:  # TRL's name of a reward
        return self.name

    def load(self) -> None:  # noqa: B027 (most rewards have nothing to load)
        """Loads weights and packages. The first call of the reward does it; call it before a long run.

        Raises:
            ImportError: if a package is missing; says which extra brings it.
        """

    @abstractmethod
    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """A finite number, or `None`, for each sample."""

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """
        Args:
            prompts (`list`): texts or messages.
            completions (`list`): one for each prompt; not looked at, only columns are.
            columns: lists of one value for each prompt, such as `images` (`list[list[PIL.Image.Image]]`); what is no
                list (TRL's `trainer_state`, ...) is left aside.
        Raises:
            ValueError: if a column that is needed is missing, or has another length, or [`scores`] returns too few or
                too many numbers.
        """
        samples = self._samples(prompts, columns)
        wanted = [sample for sample in samples if all(sample.columns[name] is not None for name in self.needs)]
        if not wanted:
            return [None] * len(samples)
        self.load()
        values = {}
        for tried, found in attempt(self._scores, wanted, self._count):
            if len(found) != len(tried):
                raise ValueError(f"The reward {self.name!r} gave {len(found)} scores for {len(tried)} samples.")
            values.update(zip(map(id, tried), found, strict=True))
        return [values.get(id(sample)) for sample in samples]

    def _samples(self, prompts: list, columns: dict[str, Any]) -> list[Sample]:
        columns = {name: values for name, values in columns.items() if isinstance(values, (list, tuple))}
        for name in self.needs:
            if name not in columns:
                raise ValueError(
                    f"The reward {self.name!r} needs the column `{name}`; there are: {', '.join(columns) or 'none'}. "
                    "Add it to the data set, or take the reward out of the mix for this task."
                )
        check_lengths(columns, len(prompts))
        samples = []
        for index, prompt in enumerate(prompts):
            own = {name: values[index] for name, values in columns.items()}
            samples.append(Sample(prompt_text(prompt), tuple(own.get("images") or ()), own))
        return samples

    def _scores(self, samples: Sequence[Sample]) -> list[float | None]:
        opened = [replace(sample, images=tuple(map(open_image, sample.images))) for sample in samples]
        values = [None if value is None else float(value) for value in self.scores(opened)]
        if not all(value is None or math.isfinite(value) for value in values):
            raise ArithmeticError(f"the reward {self.name!r} is not finite: {values}")
        return values

    def _count(self, error: Exception):
        self.num_failures += 1
        self.last_failure = error
        log_failure(self.name, self.num_failures, error)


def attempt(
    score: Callable[[Sequence], Any], samples: Sequence, failed: Callable[[Exception], None]
) -> list[tuple[Sequence, Any]]:
    """Scores samples together; if that raises, one by one, so that a failure stays with its sample.

    Args:
        score (`Callable`): of some samples.
        failed (`Callable`): is told of each error of a single sample, which gets `[None]`.
    Returns:
        pairs of samples and what `score` returned for them.
    """
    try:
        return [(samples, score(samples))]
    except Exception as error:  # cv2, onnxruntime, PIL and users' rewards have errors of their own, with no other base
        if len(samples) > 1:
            return [pair for sample in samples for pair in attempt(score, [sample], failed)]
        failed(error)
        return [(samples, [None])]


def log_failure(name: str, number: int, error: Exception):
    """Warns of the 1st, 2nd, 4th, 8th, ... failure of a reward."""
    if number & (number - 1) == 0:
        logger.warning("The reward %r failed, %d times so far.", name, number, exc_info=error)


def prompt_text(prompt: str | list[dict]) -> str:
    """What a prompt says: the text itself, or the texts of the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    content = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    if isinstance(content, str):
        return content
    texts = (part if isinstance(part, str) else part.get("text") for part in content)
    return " ".join(text for text in texts if text is not None)


def text_column(sample: Sample, column: str | None) -> str:
    """The text that a sample has in a column; the prompt if `column` is `None`."""
    return sample.prompt if column is None else sample.columns[column]


def reference_images(sample: Sample, column: str | None) -> list[Any]:
    """The images that a prompt shows, for [`open_image`].

    Args:
        column (`str`, *optional*): that holds a list of them; `None`: those of the user's last message in `messages`.
    """
    if column is not None:
        return list(sample.columns[column])
    content = next(m["content"] for m in reversed(sample.columns["messages"]) if m["role"] == "user")
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "image"]
    return [next(part[name] for name in ("image", "path") if part.get(name) is not None) for part in parts]


def open_image(image: Image.Image | str | os.PathLike) -> Image.Image:
    """A picture or the path of one, in RGB."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_lengths(columns: dict[str, Any], number: int) -> None:
    """Raises a ValueError if a column, a list or a tuple, has another length than `number`."""
    for name, values in columns.items():
        if isinstance(values, (list, tuple)) and len(values) != number:
            raise ValueError(f"`{name}` must have one value for each of the {number} prompts, got {len(values)}.")


def import_extra(module: str, user: str) -> Any:
    """A module that comes with the extra `rewards`.

    Args:
        user (`str`): what needs it.
    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs `{module}`: `pip install 'emu35[{EXTRA}]'`.") from error


def mean(values: Sequence[float]) -> float:
    """The mean of numbers; there must be one."""
    return sum(values) / len(values)


def clamp(value: float, low: float, high: float) -> float:
    """The nearest number to `value` between `low` and `high`; NaN stays NaN."""
    return value if value != value else min(max(value, low), high)
