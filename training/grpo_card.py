"""What a GRPO run leaves for its readers: curves of its log, and the card (README.md) beside the model.

    python -m emu35.training.grpo_card runs/tiny-grpo --results runs/tiny-grpo/results

`train_grpo` writes both at its end; this command writes them again with what `emu35 eval --output` measured before and
after, in `results`/before-TASK.json and `results`/after-TASK.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from emu35.model_cards.cards import base_name, finetuned_card
from emu35.model_cards.index import evaluated

from .checkpointing import read_log
from .grpo_recipe import GRPORecipe
from .recipe import load_recipe
from .rollout import RolloutSettings

LOG, CURVES = "log.jsonl", "curves.png"
_WINDOW = 10
"""Steps of which a curve shows the mean; a step alone is some dozens of prompts."""
_PANELS = (
    ("reward by component", "rewards/", "/mean"),
    ("reward by task", "reward/", ""),
    ("entropy (nats), answers learnt from", "entropy/", ""),
    ("KL divergence (nats)", "kl/", ""),
    ("groups with equal rewards", "equal_groups/", ""),
)


def draw_curves(log: Sequence[dict[str, Any]], path: str | os.PathLike):
    """Rewards by component and by task, entropy and KL by modality, and the share of groups that taught nothing.

    Lines are means over the last 10 steps, pale ones the steps themselves. A panel without values is left out.

    Args:
        log (`Sequence[dict]`): records of `log.jsonl`, see [`read_log`].
        path (`str` or `os.PathLike`): of the PNG.
    Raises:
        ImportError: without matplotlib.
        ValueError: if the log has nothing to draw.
    """
    from matplotlib.figure import Figure

    panels = {title: curves for title, *pattern in _PANELS if (curves := _curves(log, *pattern))}
    if not panels:
        raise ValueError(f"`log` has {len(log)} records, and none of a reward. Is it the log of a GRPO run?")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for title, own in zip([*panels, *[None] * (len(axes) - len(panels))], axes, strict=True):
        if title is None:
            own.remove()
            continue
        for name, (steps, values) in panels[title].items():
            pale = own.plot(steps, values, linewidth=0.8, alpha=0.25)[0]
            own.plot(steps, running_mean(values, _WINDOW), color=pale.get_color(), label=name)
        own.set(title=title, xlabel="step")
        own.grid(alpha=0.3)
        own.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _curves(log: Iterable[dict[str, Any]], prefix: str, suffix: str) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in log:
        for name, value in record.items():
            if name.startswith(prefix) and name.endswith(suffix):
                steps, values = curves.setdefault(name.removeprefix(prefix).removesuffix(suffix), ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


# --------------------------------------------------------------------------------------------------------------- card


def write_card(
    directory: str | os.PathLike,
    recipe: GRPORecipe,
    log: Sequence[dict[str, Any]],
    results: str | os.PathLike | None = None,
):
    """Writes `directory`/README.md and, where matplotlib is installed, the curves it shows.

    Args:
        recipe ([`GRPORecipe`]): how it was trained.
        log (`Sequence[dict]`): records of the run's `log.jsonl`.
        results (`str` or `os.PathLike`, *optional*):
            folder with before-TASK.json and after-TASK.json, as `emu35 eval --output` writes them.
    Raises:
        ValueError: if `results` holds no such pair, or a pair was measured in two ways.
    """
    directory = Path(directory)
    picture = ""
    if find_spec("matplotlib") is not None and log:
        draw_curves(log, directory / CURVES)
        picture = f"![rewards, entropy and KL divergence over the steps]({CURVES})\n"
    values = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    pairs = [] if results is None else _read_pairs(Path(results))
    card = finetuned_card(
        recipe.model,
        title=f"{'Model' if recipe.lora is None else 'Adapter'} improved by GRPO, from {base_name(recipe.model)}",
        description=f"Groups of {recipe.group_size} answers to one prompt, compared by {_names(recipe)}.",
        is_adapter=recipe.lora is not None,
        data="Prompts without answers: `prompts` of the recipe. What is right is for the rewards to say.",
        results=f"{_measured(pairs)}### In training\n\n{_progress(log, recipe.rollout)}\n{picture}",
        recipe=yaml.safe_dump(values, sort_keys=False),
        tags=["grpo"],
        eval_results=evaluated({after["task"]: after for _, after in pairs}),
    )
    card.save(directory / "README.md")


def _names(recipe: GRPORecipe) -> str:
    rewards = [f"`{one.reward}`" + (f" {one.arguments}" if one.arguments else "") for one in recipe.rewards]
    return ", ".join(rewards)


def _read_pairs(folder: Path) -> list[list[dict[str, Any]]]:
    """What was measured before and after, by task."""
    names = [
        (path, folder / path.name.replace("before-", "after-", 1)) for path in sorted(folder.glob("before-*.json"))
    ]
    pairs = [[json.loads(path.read_text()) for path in pair] for pair in names if pair[1].is_file()]
    if not pairs:
        raise ValueError(f"`results`: {folder} holds no pair of before-TASK.json and after-TASK.json.")
    for before, after in pairs:
        for name in ("task", "num", "seed", "settings"):
            if before[name] != after[name]:
                raise ValueError(
                    f"`results`: {before['task']} was measured with `{name}`={before[name]!r} before and "
                    f"{after[name]!r} after. Measure both alike."
                )
    return pairs


def _measured(pairs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """A table of what was measured before and after."""
    if not pairs:
        return ""
    lines = ["### Measured before and after", "", "| task | measure | before | after | |", "|---|---|---|---|---|"]
    for before, after in pairs:
        how = f"N = {before['num']}, seed {before['seed']}"
        old, new = headline_rates(before), headline_rates(after)
        for name in old:
            unit = "" if name == "world reward" else " %"
            scale = 1 if name == "world reward" else 100
            row = f"{scale * old[name]:.1f}{unit} | {scale * new[name]:.1f}{unit}"
            lines.append(f"| {before['task']} ({how}) | {name} | {row} | {scale * (new[name] - old[name]):+.1f} |")
    return "\n".join(lines) + "\n\n`emu35 eval --task TASK --num N --seed SEED`; the world reward is in [1, 10].\n\n"


def headline_rates(result: dict[str, Any]) -> dict[str, float]:
    """What of an evaluation is a summary, by name; all in [0, 1] but the "world reward"."""
    if "whole_scene" in result:
        rates = {"whole scene": result["whole_scene"]["all"], **result["aspects"]}
    elif "accuracy" in result:
        rates = {"answer": result["accuracy"], "whole description": result["describe"]}
    else:
        rates = result["rates"]
    return {"world reward": result["world_reward"], **{name.replace("_", " "): value for name, value in rates.items()}}


def _progress(log: Sequence[dict[str, Any]], rollout: RolloutSettings) -> str:
    """A table of the first and the last steps."""
    curves = {f"reward, {name}": curve for name, curve in _curves(log, "rewards/", "/mean").items()}
    curves |= {f"reward, task {name}": curve for name, curve in _curves(log, "reward/", "").items()}
    curves |= {f"entropy, {name} tokens": curve for name, curve in _curves(log, "entropy/", "").items()}
    curves |= {f"KL divergence, {name} tokens": curve for name, curve in _curves(log, "kl/", "").items()}
    if not curves:
        return "No step was logged.\n"
    few = max(1, min(_WINDOW, len(log) // 2))
    lines = [f"| | first {few} steps | last {few} steps |", "|---|---|---|"]
    for name, (_, values) in curves.items():
        first, last = values[:few], values[-few:]
        lines.append(f"| {name} | {sum(first) / len(first):.3f} | {sum(last) / len(last):.3f} |")
    how = (
        f"temperature {rollout.temperature:g} (images: {rollout.image_temperature:g}) without guidance, top-k or top-p"
    )
    return "\n".join(lines) + f"\n\nAnswers of training are drawn at {how}.\n"


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run (`output_dir`)")
    parser.add_argument("--recipe", type=Path, default=Path("training/recipes/tiny-grpo.yaml"))
    parser.add_argument("--results", type=Path, help="folder with before-TASK.json and after-TASK.json")
    parser.add_argument("--out", type=Path, help="folder of the card; default: RUN/export")
    args = parser.parse_args(arguments)
    out = args.out or args.run / "export"
    out.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(args.recipe)
    if not isinstance(recipe, GRPORecipe):
        parser.error(f"{args.recipe} is no recipe with `method: grpo`.")
    write_card(out, recipe, read_log(args.run / "grpo" / LOG), args.results)
    if args.results is not None and args.results.resolve() != (out / "results").resolve():
        shutil.copytree(args.results, out / "results", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
