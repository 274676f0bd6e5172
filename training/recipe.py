"""Recipes: the YAML files that say how a model is trained, checked before anything runs."""

import dataclasses
import difflib
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import yaml

from .train_vision_tokenizer import VisionTokenizerRecipe

if TYPE_CHECKING:
    from .dida_recipe import DiDARecipe
    from .grpo_recipe import GRPORecipe
    from .sft_recipe import SFTRecipe


@dataclass
class StageRecipe:
    """One stage of the language model.

    Args:
        name (`str`): for logs and curves.
        steps (`int`): optimiser steps.
        mixture (`dict[str, float]`): kind of sequence (see `sequences.KINDS`, `shapes.EPISODES`) -> its share.
        balance (`str`):
            what `mixture` shares out: "sequences", of which long ones weigh more, or "tokens": of each kind as many
            tokens as its share says, however long its sequences are.
        rows (`int`), row_length (`int`):
            rows of a batch (there are `processes` of them a step), and their tokens. Short sequences share a row; a
            length in which the stage's sequences leave few gaps saves time.
        full_captions (`float`, *optional*): instead of the one in `data`.
        new_cycle (`bool`): the learning rates begin anew here: warm-up, plateau, decay.
        learning_rate_scale (`float`): of this cycle's peak learning rates, given where the cycle begins.
        difficulty (`list[float]`):
            of episodes, at the stage's beginning and end, in (0, 1]; between them it grows in proportion. Easier ones
            have fewer objects, frames, moves.
        visual_loss_weight (`float`, *optional*): instead of the recipe's.
        typical_layouts (`bool`): objects whose position a caption leaves open stand as [`typical_layout`] puts them.
        canonical_scenes (`bool`): all that a caption leaves open is filled in as [`canonical_scene`] does: one picture
            for each sentence.
    """

    name: str
    steps: int
    mixture: dict[str, float]
    rows: int = 14
    row_length: int = 224
    full_captions: float | None = None
    typical_layouts: bool = False
    canonical_scenes: bool = False
    new_cycle: bool = False
    learning_rate_scale: float = 1.0
    balance: str = "sequences"
    difficulty: list[float] = field(default_factory=lambda: [1.0, 1.0])
    visual_loss_weight: float | None = None

    def __post_init__(self):
        from .sequences import KINDS
        from .shapes import EPISODES

        _require(self.steps > 0, "steps", self.steps, "positive")
        _require(self.rows > 0, "rows", self.rows, "positive")
        _require(self.row_length >= 144, "row_length", self.row_length, "at least 144, or sequences don't fit")
        for kind, share in self.mixture.items():
            if kind not in KINDS and kind not in EPISODES:
                raise ValueError(f"`mixture` of stage {self.name!r}: {_unknown(kind, [*KINDS, *EPISODES])}")
            _require(share > 0, f"mixture.{kind}", share, "positive (leave the kind out instead)")
        if self.typical_layouts and self.canonical_scenes:
            raise ValueError(f"`canonical_scenes` of stage {self.name!r} leaves `typical_layouts` nothing. Drop one.")
        if not self.mixture:
            raise ValueError(f"`mixture` of stage {self.name!r} is empty. Give at least one of {', '.join(KINDS)}.")
        _require(self.balance in ("sequences", "tokens"), "balance", self.balance, '"sequences" or "tokens"')
        _require(
            len(self.difficulty) == 2 and all(0 < value <= 1 for value in self.difficulty),
            "difficulty",
            self.difficulty,
            "two values in (0, 1], at the stage's beginning and end",
        )
        weight = self.visual_loss_weight
        _require(weight is None or weight > 0, "visual_loss_weight", weight, "positive")

    def difficulty_at(self, progress: float) -> float:
        """Of episodes, when the share `progress` of the stage is done."""
        first, last = self.difficulty
        return first + (last - first) * progress


@dataclass
class DataRecipe:
    """How scenes and sentences are drawn.

    Args:
        objects (`list[float]`): share of scenes with 1, 2 and 3 objects, in proportion.
        full_captions (`float`): share of captions that fix the whole scene.
        caption_dropout (`float`): share of `t2i` sequences with the unconditional prompt, for guidance.
    """

    objects: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.4])
    full_captions: float = 0.5
    caption_dropout: float = 0.1

    def __post_init__(self):
        _require(
            len(self.objects) == 3 and min(self.objects) >= 0 and sum(self.objects) > 0,
            "data.objects",
            self.objects,
            "three shares, not all 0",
        )
        for name in ("full_captions", "caption_dropout"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "in [0, 1]")


@dataclass
class OptimizerRecipe:
    """Muon for matrices, AdamW for embeddings, head and norms; learning rates warm up, stay, and decay linearly to 0.

    Args:
        muon_learning_rate (`float`): on the scale of AdamW's ("match_rms_adamw").
        adamw_learning_rate (`float`): peak of the others.
        muon_momentum (`float`), weight_decay (`float`): of Muon.
        warmup_steps (`int`): linear, from 0.
        decay (`float`): share of all steps, at the end, over which the rates fall to 0.
        gradient_clip (`float`): largest norm of the gradient of AdamW's parameters. Muon's steps have a fixed size.
    """

    muon_learning_rate: float = 5e-3
    adamw_learning_rate: float = 5e-3
    muon_momentum: float = 0.95
    weight_decay: float = 0.05
    warmup_steps: int = 100
    decay: float = 0.4
    gradient_clip: float = 1.0

    def __post_init__(self):
        for name in ("muon_learning_rate", "adamw_learning_rate", "gradient_clip"):
            _require(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "positive")
        _require(0 <= self.decay <= 1, "optimizer.decay", self.decay, "in [0, 1]")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "not negative")

    def scale(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rates at a step of one cycle: a trapezoid."""
        decay_steps = max(1, round(self.decay * num_steps))
        return min(1.0, (step + 1) / max(1, self.warmup_steps), (num_steps - step) / decay_steps)


class StagedRecipe:
    """What follows from a recipe's `stages` and `optimizer`."""

    stages: list[StageRecipe]
    optimizer: OptimizerRecipe

    @property
    def num_steps(self) -> int:
        """Steps of all language model stages together."""
        return sum(stage.steps for stage in self.stages)

    def learning_rate_scale(self, step: int) -> float:
        """Factor of the peak learning rates at a step of the whole run."""
        cycles: list[list[StageRecipe]] = []
        for stage in self.stages:
            if stage.new_cycle or not cycles:
                cycles.append([])
            cycles[-1].append(stage)
        for cycle in cycles:
            steps = sum(stage.steps for stage in cycle)
            if step < steps:
                return cycle[0].learning_rate_scale * self.optimizer.scale(step, steps)
            step -= steps
        raise ValueError(f"`step` is past the last stage by {step}.")

    def stage_at(self, step: int) -> tuple[StageRecipe, float]:
        """The stage that a step of the whole run belongs to, and the share of it that is done by then."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        raise ValueError(f"`step` is past the last stage by {step}.")


@dataclass
class Recipe(StagedRecipe):
    """A whole run, from nothing to a checkpoint.  Fields are the keys of the YAML file.

    Args:
        output_dir (`str`): gets logs, checkpoints and the trained parts.
        export_dir (`str`): gets the finished model; `None`: `output_dir`/export.
        seed (`int`): of weights and data.
        processes (`int`):
            batches a step whose gradients are averaged; on a CPU each has a process of its own, of one thread.
        vision_tokenizer (`dict` or `str`):
            stage 1, see [`VisionTokenizerRecipe`]; or the checkpoint to take it from ("tiny": `emu35.TINY`).
        text_vocabulary (`int`): text and control tokens (at least 272).
        model (`dict`): fields of [`Emu35TextConfig`]; the vocabulary size follows from the two vocabularies.
        visual_loss_weight (`float`): of visual tokens in the loss.
        data ([`DataRecipe`]), optimizer ([`OptimizerRecipe`]): what they say.
        stages (`list[StageRecipe]`): stages 2 to 4, one after the other under one learning-rate schedule.
        generation (`dict`): fields of the generation configuration that is saved with the model.
        compile (`bool`): compile the decoder (a minute at the start, a fifth faster).
        attn_implementation (`str`): while training. "eager" is fastest for short rows on a CPU.
        bf16 (`bool`): autocast.
        log_every (`int`), save_every (`int`): in steps.
    """

    output_dir: str
    stages: list[StageRecipe]
    model: dict[str, Any]
    vision_tokenizer: VisionTokenizerRecipe | str
    export_dir: str | None = None
    seed: int = 0
    processes: int = 2
    text_vocabulary: int = 512
    visual_loss_weight: float = 1.0
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    generation: dict[str, Any] = field(default_factory=dict)
    compile: bool = True
    attn_implementation: str = "eager"
    bf16: bool = True
    log_every: int = 20
    save_every: int = 250

    def __post_init__(self):
        _require(bool(self.stages), "stages", self.stages, "a list of at least one stage")
        for name in ("processes", "log_every", "save_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("vocab_size", "pad_token_id"):
            if name in self.model:
                raise ValueError(f"`model.{name}` follows from the tokenizers; leave it out.")


def checkpoint_path(name: str) -> str:
    """The folder or repository that a recipe means; "tiny" is `emu35.TINY`."""
    import emu35

    return str(emu35.TINY) if name == "tiny" else name


def load_recipe(path: str | os.PathLike) -> "Recipe | DiDARecipe | SFTRecipe | GRPORecipe":
    """Read and check a recipe.

    Returns:
        [`Recipe`]; [`DiDARecipe`] or [`SFTRecipe`] where the file says `method: dida` or `method: sft`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the key: unknown (with the nearest known one), missing, of a wrong type, or out of range.
    """
    path = Path(path)
    if not path.is_file():
        shipped = sorted(p.name for p in (Path(__file__).parent / "recipes").glob("*.yaml"))
        raise FileNotFoundError(
            f"`recipe_path`: no file {path}. Shipped recipes: training/recipes/{{{', '.join(shipped)}}}."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return recipe_from_dict(values)


def recipe_from_dict(values: dict[str, Any]) -> "Recipe | DiDARecipe | SFTRecipe | GRPORecipe":
    """A recipe from plain values, with the checks of [`load_recipe`]."""
    from .dida_recipe import DiDARecipe
    from .grpo_recipe import GRPORecipe
    from .sft_recipe import SFTRecipe

    kinds = {None: Recipe, "dida": DiDARecipe, "sft": SFTRecipe, "grpo": GRPORecipe}
    method = values.get("method") if isinstance(values, dict) else None
    if method is None and isinstance(values, dict):  # a slip would make it a recipe of another kind
        unknown = set(map(str, values)) - {item.name for item in dataclasses.fields(Recipe)}
        for key in difflib.get_close_matches("method", unknown, n=1, cutoff=0.7):
            raise ValueError(f"`recipe`: unknown key {key!r}. Did you mean 'method'?")
    if method not in kinds:
        named = ", ".join(repr(one) for one in kinds if one)
        nearest = difflib.get_close_matches(str(method), filter(None, kinds), n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"`recipe.method` must be one of {named}, or left out to train from nothing; got {method!r}.{hint}"
        )
    return _build(kinds[method], values, "recipe")


def _build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping; nested dataclasses, and lists of them, too."""
    if not isinstance(values, dict):
        raise ValueError(f"`{where}` must be a mapping, got {values!r}.")
    known = {item.name: item for item in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"`{where}`: {_unknown(key, known)}")
    arguments = {key: _convert(known[key].type, value, f"{where}.{key}") for key, value in values.items()}
    missing = [
        name
        for name, item in known.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"`{where}` lacks {', '.join(f'`{name}`' for name in missing)}.")
    return cls(**arguments)


def _convert(expected: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(expected):
        return _build(expected, value, where)
    if get_origin(expected) in (Union, types.UnionType):
        for plain in (type(None), str):
            if plain in get_args(expected) and isinstance(value, plain):
                return value
        return _convert(next(arg for arg in get_args(expected) if arg is not type(None)), value, where)
    if get_origin(expected) is list:
        if not isinstance(value, list):
            raise ValueError(f"`{where}` must be a list, got {value!r}.")
        return [_convert(get_args(expected)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(expected) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"`{where}` must be a mapping, got {value!r}.")
        return {key: _convert(get_args(expected)[1], item, f"{where}.{key}") for key, item in value.items()}
    if expected is Any:
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):
        try:  # YAML 1.1 reads "5e-3" as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"`{where}` must be of type {expected.__name__}, got {value!r}.")
    return value


def _unknown(key: Any, known: Any) -> str:
    nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown key {key!r}.{hint} Known: {', '.join(sorted(known))}."


def _require_one_of(name: str, value: Any, known: Sequence[str]):
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.{hint}")


def _require(condition: bool, name: str, value: Any, wanted: str):
    if not condition:
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")
