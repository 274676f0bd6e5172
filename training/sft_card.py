"""The card (README.md) that is written beside a fine-tuned adapter or model."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml
from emu35.model_cards.cards import base_name, finetuned_card

from .sft_recipe import SFTRecipe


def write_card(directory: str | os.PathLike, recipe: SFTRecipe, log: list[dict[str, Any]]):
    """Writes `directory`/README.md.

    Args:
        recipe ([`SFTRecipe`]): how it was trained.
        log (`list[dict]`): what the Trainer has logged (`state.log_history`).
    """
    kind = "Model" if recipe.lora is None else "QLoRA adapter" if recipe.lora.quantization else "LoRA adapter"
    base = base_name(recipe.model)
    values = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    card = finetuned_card(
        recipe.model,
        title=f"{kind} of {base}",
        description=f"`{base}`, fine-tuned by `emu35 train` on the data below.",
        is_adapter=recipe.lora is not None,
        data="\n".join(f"- `{source.path}`, weight {source.weight:g}" for source in recipe.data),
        results=_losses(log),
        recipe=yaml.safe_dump(values, sort_keys=False),
    )
    card.save(Path(directory, "README.md"))


def _losses(log: list[dict[str, Any]]) -> str:
    """A table of the first and the last evaluation; or of the training loss, where there was none."""
    records = [record for record in log if "eval_loss" in record]
    if not records:
        records = [record for record in log if "loss" in record]
    if not records:
        return "None: no step was logged.\n"
    first, last = records[0], records[-1]
    names = [name for name in first if name.endswith("loss") and name in last]
    lines = [f"| | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    lines += [f"| `{name}` | {first[name]:.4f} | {last[name]:.4f} |" for name in names]
    return "\n".join(lines) + "\n"
