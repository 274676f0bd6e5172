"""What `emu35 eval` measured, as the Hub's model index has it."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

#: Task of the Hub, key of the results, of its rates, and what it measures.
TASKS = (
    ("text-to-image", "t2i", None, "whole scene right"),
    ("visual-question-answering", "vqa", None, "answer right"),
    ("image-to-image", "x2i", "whole_scene", "edit right and all else preserved"),
    ("any-to-any", "story", "whole", "story: every sentence and frame right"),
    ("any-to-any", "howto", "plan", "step-by-step guidance: whole plan right"),
    ("any-to-any", "explore", "view", "exploration: view right after a move"),
    ("robotics", "vla", "success", "manipulation: legal and goal reached"),
    ("visual-question-answering", "multi_vqa", "answer", "answer about two or three images right"),
    ("any-to-any", "chat", "whole", "conversation: every turn right"),
)


def accuracy(task: str, name: str, value: float, what: str, held_out: bool = False) -> EvalResult:
    """One number, `value` in [0, 1], of the world of shapes."""
    return EvalResult(
        task_type=task,
        dataset_type="emu35-shapes",
        dataset_name="emu35's world of shapes, drawn from a seed",
        dataset_config=f"{name}, unseen pairs" if held_out else name,
        dataset_split="test",
        metric_type="accuracy",
        metric_name=what,
        metric_value=round(100 * value, 1),
    )


def evaluated(results: Mapping[str, dict[str, Any]], held_out: bool = False) -> list[EvalResult]:
    """The headline number of each task.

    Args:
        results (`Mapping[str, dict]`): task -> what `emu35 eval --output` wrote; others than `TASKS` are left out.
        held_out (`bool`): with those over unseen pairs, too.
    """
    index = []
    for task, name, key, what in TASKS:
        if name in results:
            index.append(accuracy(task, name, _rate(results[name], key), what))
            if held_out:
                index.append(accuracy(task, name, _rate(results[name]["held_out"], key), what, held_out=True))
    return index


def _rate(measured: dict[str, Any], key: str | None) -> float:
    if "whole_scene" in measured:
        return measured["whole_scene"]["all"]
    return measured["accuracy"] if key is None else measured["rates"][key]
