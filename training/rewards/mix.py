"""Several rewards as one number: each brought to [1, 10], then the weighted mean."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from numbers import Real
from typing import Any

from .base import Reward, SampleReward, attempt, check_lengths, log_failure

LOWEST, HIGHEST = 1.0, 10.0
_ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL's trainers pass to every reward."""
_TOLERANCE = 1e-6
"""By which part of its range a reward may overshoot: rounding in float32."""


@dataclass(frozen=True)
class Component:
    """One reward of a mix.

    Args:
        reward ([`Reward`]): a callable with `name` and `range`.
        weight (`float`): of it among the rewards that a sample gets; positive.
        tasks (`Sequence[str]`, *optional*): for which tasks it counts; `None`: for all.
    Raises:
        TypeError, ValueError: if the reward has no name or range or takes no columns, the range is empty or the weight
            not positive.
    """

    reward: Reward
    weight: float = 1.0
    tasks: Sequence[str] | None = None

    def __post_init__(self):
        if not isinstance(self.reward, Reward):
            raise TypeError(
                f"`reward` must be a callable with `name` and `range`, got {self.reward!r}. Of a function, set "
                "`function.name` and `function.range = (lowest, highest)`."
            )
        if not any(one.kind == Parameter.VAR_KEYWORD for one in signature(self.reward).parameters.values()):
            raise TypeError(
                f"The reward {self.name!r} must take all columns, as `reward(prompts, completions, **columns)`; its "
                f"arguments are {signature(self.reward)}."
            )
        low, high = self.reward.range
        if not float("-inf") < low < high < float("inf"):
            raise ValueError(f"`range` of the reward {self.name!r} must be two rising numbers, got {(low, high)}.")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"`weight` of the reward {self.name!r} must be positive, got {self.weight!r}.")
        if isinstance(self.tasks, str) or (self.tasks is not None and not self.tasks):
            raise ValueError(
                f"`tasks` of the reward {self.name!r} must be a list of tasks or None, got {self.tasks!r}."
            )

    @property
    def name(self) -> str:
        return self.reward.name

    def counts_for(self, task: str | None) -> bool:
        return self.tasks is None or task in self.tasks

    def normalise(self, value: float) -> float:
        """`1 + 9 (value - lowest) / (highest - lowest)`."""
        low, high = self.reward.range
        return LOWEST + (HIGHEST - LOWEST) * min(max((value - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True)
class ComponentReport:
    """What one component gave in a call.

    Attributes:
        mean (`float` or `None`): of the normalised values, in [1, 10]; `None` if there are none.
        raw_mean (`float` or `None`): of the values as the reward gave them.
        num_samples (`int`): that it was asked about.
        num_missing (`int`): for which it gave `None`.
        num_failures (`int`): of these, those on which it failed.
        values (`tuple[float | None, ...]`): normalised, for every sample of the call.
    """

    mean: float | None
    raw_mean: float | None
    num_samples: int
    num_missing: int
    num_failures: int
    values: tuple[float | None, ...]


class RewardMix:
    r"""The weighted mean of rewards, each brought to [1, 10] before.  Source: Emu3.5 report (arXiv 2510.26583), RL.

    $$ n_k = 1 + 9 \frac{r_k - l_k}{h_k - l_k}, \qquad R = \frac{\sum_k w_k n_k}{\sum_k w_k} $$

    over the rewards k with range [l_k, h_k] that count for the sample's task and did not give `None`; a sample without
    any gets `None` itself (TRL leaves it out). So two samples of one prompt are compared by different rewards where
    one of them failed: look at `missing` and `failed` in the logs. A function that raises is tried on each sample by
    itself, as [`SampleReward`] does; what it cannot score is `None` and counted, and the run goes on.

    Example:
        >>> mix = RewardMix([Component(WorldReward()), Component(ClipSimilarity(), 0.5, tasks=["t2i", "x2i"])])
        >>> mix(prompts=["a red ring"], completions=[""], task=["t2i"], images=[[image]], meaning=["a red ring"])
        [8.5]

    Args:
        components (`Iterable[Component | Reward]`): a bare reward has weight 1 and counts for all tasks.
    Raises:
        ValueError: if there are none, or two have one name.
    """

    name = "mix"
    __name__ = "mix"
    range = (LOWEST, HIGHEST)

    def __init__(self, components: Iterable[Component | Reward]):
        self.components = [one if isinstance(one, Component) else Component(one) for one in components]
        names = [component.name for component in self.components]
        if not names:
            raise ValueError("`components` is empty. Give at least one reward.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"`components` must have different names, got {', '.join(twice)} more than once. Set `reward.name`."
            )
        self.report: dict[str, ComponentReport] = {}
        self._failures: Counter[str] = Counter()
        self._last_failures: dict[str, Exception] = {}

    def load(self) -> None:
        """Loads the weights of all rewards, so that a missing one is found before training starts."""
        for component in self.components:
            if hasattr(component.reward, "load"):
                component.reward.load()

    def check_tasks(self, tasks: Iterable[str]) -> None:
        """Raises a ValueError if a task has no reward, or a component names a task that is not among them."""
        tasks = sorted(set(tasks))
        for task in tasks:
            if not any(component.counts_for(task) for component in self.components):
                raise ValueError(
                    f"No reward counts for the task {task!r}. Add one, or leave the task out of the data."
                )
        for component in self.components:
            unknown = sorted(set(component.tasks or ()).difference(tasks))
            if unknown:
                raise ValueError(
                    f"The reward {component.name!r} is for the tasks {', '.join(unknown)}, which are none of the "
                    f"data's: {', '.join(tasks)}."
                )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises a ValueError if a reward needs a column that is not among them."""
        columns = set(columns)
        for component in self.components:
            missing = [name for name in _needs(component.reward) if name not in columns]
            if missing:
                raise ValueError(
                    f"The reward {component.name!r} needs the column `{missing[0]}`; there are: "
                    f"{', '.join(sorted(columns))}. Add it to the prompts, or take the reward out."
                )

    def rehearse(self, prompts: list, completions: list, loaded: bool = False, **columns: Any) -> None:
        """A first call, for what it may raise, see [`__call__`]; of the rewards that have something to load, or not.

        Raises:
            ValueError: if a reward uses a name or a package that is not there, which no other sample would mend.
        """
        chosen = [one for one in self.components if _loads(one.reward) == loaded]
        if not chosen:
            return
        mix = RewardMix(chosen)
        mix(prompts, completions, **columns)
        for component in chosen:
            failure = mix._last_failures.get(component.name, getattr(component.reward, "last_failure", None))
            if isinstance(failure, (NameError, ImportError)):
                raise ValueError(f"The reward {component.name!r} cannot work: {failure!r}.") from failure

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """
        Args:
            prompts (`list`), completions (`list`): as TRL gives them.
            columns: lists of one value for each prompt. `task` (`list[str]`) routes; without it, only rewards for all
                tasks count. TRL's `log_metric` is given `rewards/NAME/mean`, `rewards/NAME/missing` (the share of
                `None`) and `rewards/NAME/failed` (that of failures), its `log_extra` the normalised values.
        Returns:
            `list[float | None]` in [1, 10]. `report` then holds a [`ComponentReport`] for each component.
        Raises:
            TypeError, ValueError: if a reward returns another number of values than samples, something that is no
                number, or a number out of its range.
        """
        check_lengths(columns, len(prompts))
        tasks = columns.get("task", [None] * len(prompts))
        self.report = {
            component.name: self._ask(component, prompts, completions, columns, tasks) for component in self.components
        }
        self._log(columns)
        mixed = []
        for row in zip(*(report.values for report in self.report.values()), strict=True):
            given = [(c.weight, value) for c, value in zip(self.components, row, strict=True) if value is not None]
            total = sum(weight for weight, _ in given)
            mixed.append(sum(weight * value for weight, value in given) / total if given else None)
        return mixed

    def _ask(self, component: Component, prompts, completions, columns: dict, tasks) -> ComponentReport:
        chosen = [index for index, task in enumerate(tasks) if component.counts_for(task)]
        values: list[float | None] = [None] * len(prompts)
        before = self._num_failures(component)

        def score(indices: Sequence[int]) -> Any:
            own = {
                name: [column[index] for index in indices] if isinstance(column, (list, tuple)) else column
                for name, column in columns.items()
            }
            picked = ([items[index] for index in indices] for items in (prompts, completions))
            return component.reward(*picked, **own)

        def failed(error: Exception):
            self._failures[component.name] += 1
            self._last_failures[component.name] = error
            log_failure(component.name, self._failures[component.name], error)

        if isinstance(component.reward, SampleReward):  # what it raises is wrong with the set-up
            attempts = [(chosen, score(chosen))] if chosen else []
        else:
            attempts = attempt(score, chosen, failed) if chosen else []
        raw = [value for indices, found in attempts for value in _checked(component, found, len(indices), failed)]
        for index, value in zip(chosen, raw, strict=True):
            values[index] = None if value is None else component.normalise(value)
        known = [value for value in raw if value is not None]
        return ComponentReport(
            mean=sum(value for value in values if value is not None) / len(known) if known else None,
            raw_mean=sum(known) / len(known) if known else None,
            num_samples=len(chosen),
            num_missing=len(raw) - len(known),
            num_failures=self._num_failures(component) - before,
            values=tuple(values),
        )

    def _num_failures(self, component: Component) -> int:
        return getattr(component.reward, "num_failures", 0) + self._failures[component.name]

    def _log(self, columns: dict) -> None:
        log_metric, log_extra = columns.get("log_metric"), columns.get("log_extra")
        for name, report in self.report.items():
            if log_metric is not None:  # one by one: TRL takes the mean over all processes, which have unlike numbers
                for number in range(report.num_samples):
                    log_metric(f"rewards/{name}/missing", float(number < report.num_missing))
                    log_metric(f"rewards/{name}/failed", float(number < report.num_failures))
                for value in report.values:
                    if value is not None:
                        log_metric(f"rewards/{name}/mean", value)
            if log_extra is not None:
                log_extra(name, list(report.values))


def _needs(reward: Reward) -> Sequence[str]:
    """The columns without which a reward cannot be called."""
    if isinstance(reward, SampleReward):
        return reward.needs
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    named = [one for one in signature(reward).parameters.values() if one.kind in by_name]
    return [one.name for one in named if one.default is Parameter.empty and one.name not in _ALWAYS]


def _loads(reward: Reward) -> bool:
    return isinstance(reward, SampleReward) and type(reward).load is not SampleReward.load


def _checked(
    component: Component, values: Any, length: int, failed: Callable[[Exception], None]
) -> list[float | None]:
    """What a reward returned, as floats; `failed` is told of what is not a number (NaN)."""
    name, (low, high) = component.name, component.reward.range
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"The reward {name!r} must return a list, got {type(values).__name__}.")
    if len(values) != length:
        raise ValueError(
            f"The reward {name!r} returned {len(values)} values for {length} completions. Return one for each, and "
            "None for what cannot be measured."
        )
    slack = _TOLERANCE * (high - low)
    checked = []
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, Real):
            raise TypeError(
                f"The reward {name!r} returned {value!r} (value {index}), which is no number. Return floats or None."
            )
        if value is not None and value != value:
            failed(ArithmeticError(f"the reward {name!r} returned {value!r} (value {index})"))
            value = None
        if value is not None and not low - slack <= value <= high + slack:
            raise ValueError(
                f"The reward {name!r} returned {value!r} (value {index}), out of its range [{low}, {high}]. Correct "
                "`range`, clamp the value, or return None for what cannot be measured."
            )
        checked.append(None if value is None else float(value))
    return checked
