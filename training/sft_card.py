"""The card (README.md) that is written beside a fine-tuned adapter or model."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from .sft_recipe import SFTRecipe

_USE_ADAPTER = """\
```python
import emu35
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained({base!r}, dtype="auto")
model.load_adapter("PATH_OF_THIS_FOLDER")
processor = AutoProcessor.from_pretrained({base!r})
```

Or in a pipeline: `Emu35Pipeline.from_pretrained({base!r}).load_lora_weights("PATH_OF_THIS_FOLDER")`.
Or merged into the weights: `emu35.training.sft.merge_adapter("PATH_OF_THIS_FOLDER", "MERGED")`.
"""
_USE_MODEL = """\
```python
import emu35
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("PATH_OF_THIS_FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


def write_card(directory: str | os.PathLike, recipe: SFTRecipe, log: list[dict[str, Any]]):
    """Writes `directory`/README.md.

    Args:
        recipe ([`SFTRecipe`]): how it was trained.
        log (`list[dict]`): what the Trainer has logged (`state.log_history`).
    """
    base = "emu35.TINY" if recipe.model == "tiny" else recipe.model
    kind = "model" if recipe.lora is None else "QLoRA adapter" if recipe.lora.quantization else "LoRA adapter"
    tags = {"base_model": recipe.model, "library_name": "transformers" if recipe.lora is None else "peft"}
    use = (_USE_MODEL if recipe.lora is None else _USE_ADAPTER).format(base=base).replace(f"{base!r}", _quoted(base))
    values = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    text = f"""---
{yaml.safe_dump({**tags, "pipeline_tag": "any-to-any", "tags": ["emu35", "lora"][: 1 + (recipe.lora is not None)]})}---

# {kind[0].upper()}{kind[1:]} of {base}

{use}
## Measured losses

{_losses(log)}
## Recipe

```yaml
{yaml.safe_dump(values, sort_keys=False)}```
"""
    Path(directory, "README.md").write_text(text, encoding="utf-8")


def _quoted(base: str) -> str:
    return base if base == "emu35.TINY" else f'"{base}"'


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
