"""Model cards from the templates beside this file: the front matter and the sections that cards of a kind share."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent / "templates"
#: What a result depends on, besides data and recipe.
_MADE_BY = ("emu35", "torch", "transformers", "peft", "trl", "bitsandbytes")
_USE_ADAPTER = """\
```python
import emu35
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained({base}, dtype="auto")
model.load_adapter("PATH_OF_THIS_FOLDER")
processor = AutoProcessor.from_pretrained({base})
```

Or in a pipeline:

```python
from emu35.pipelines import Emu35Pipeline

pipe = Emu35Pipeline.from_pretrained({base})
pipe.load_lora_weights("PATH_OF_THIS_FOLDER")
```

Or merged into the weights, as a checkpoint: `emu35.training.sft.merge_adapter("PATH_OF_THIS_FOLDER", "MERGED")`.
"""
_USE_MODEL = """\
```python
import emu35
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("PATH_OF_THIS_FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


def render(template: str, front_matter: ModelCardData, **values: Any) -> ModelCard:
    """A card from `templates/TEMPLATE.md` (Jinja; `card_data` is the front matter in YAML).

    Raises:
        FileNotFoundError: if there is no such template.
    """
    return ModelCard.from_template(front_matter, template_path=str(TEMPLATES / f"{template}.md"), **values)


def base_name(model: str) -> str:
    """A recipe's `model` as code and cards name it."""
    return "emu35.TINY" if model == "tiny" else model


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def base_license(model: str) -> str:
    """The licence of a base model as the Hub names it; "other" where neither we nor a card beside it say."""
    if model == "tiny" or model.startswith("BAAI/Emu3.5"):
        return "apache-2.0"
    card = Path(model, "README.md")
    return (ModelCard.load(card).data.license or "other") if card.is_file() else "other"


def finetuned_card(
    model: str,
    *,
    title: str,
    description: str,
    is_adapter: bool,
    data: str,
    results: str,
    recipe: str,
    tags: Sequence[str] = (),
    eval_results: Sequence[EvalResult] = (),
) -> ModelCard:
    """The card of what fine-tuning has made: an adapter, or a whole model.

    Args:
        model (`str`): checkpoint that it started from; "tiny": the one shipped.
        title (`str`), description (`str`): what it is, in words and in sentences.
        is_adapter (`bool`): whether it needs the weights of `model`.
        data (`str`), results (`str`): Markdown of what it was trained on, and of what was measured.
        recipe (`str`): the YAML.
        tags (`Sequence[str]`): further ones.
        eval_results (`Sequence[EvalResult]`): what was measured, for the Hub's model index; `results` tells it people.
    """
    names_repository = model != "tiny" and not Path(model).exists()  # the Hub refuses what is no name of one
    licence = base_license(model)
    front_matter = ModelCardData(
        model_name=title if eval_results else None,
        eval_results=list(eval_results) or None,
        license=licence,
        license_name="that-of-the-base-model" if licence == "other" else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="any-to-any",
        tags=["emu35", *(["lora"] if is_adapter else []), *tags],
        base_model=model if names_repository else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if names_repository else None,
    )
    base = base_name(model)
    quoted = base if model == "tiny" else f'"{base}"'
    return render(
        "finetuned",
        front_matter,
        title=title,
        description=description,
        base=base,
        use=(_USE_ADAPTER if is_adapter else _USE_MODEL).replace("{base}", quoted),
        is_adapter=is_adapter,
        data=data,
        results=results.rstrip("\n"),
        recipe=recipe.rstrip("\n"),
        versions=", ".join(f"{name} {found}" for name in _MADE_BY if (found := _version(name)) is not None),
    )
