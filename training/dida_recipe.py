"""Recipes with `method: dida`: how a trained model is adapted to parallel image decoding (see `dida`)."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from emu35.pipelines.scheduling_dida import DiDAScheduler

from .recipe import DataRecipe, OptimizerRecipe, StagedRecipe, StageRecipe, _require, _unknown

DECODER_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class LoRARecipe:
    """A PEFT adapter that is active for noisy copies only.

    Args:
        rank (`int`), alpha (`float`): the adapter adds `alpha / rank * B A x`.
        targets (`list[str]`): names of the decoder's linear layers.
        start_from (`str`, *optional*):
            folder of an adapter of this rank and these targets to go on from ("tiny": `emu35.TINY_DIDA`). Default: a
            fresh one, which changes nothing yet.
    """

    rank: int = 64
    alpha: float = 64.0
    targets: list[str] = field(default_factory=lambda: list(DECODER_MATRICES))
    start_from: str | None = None

    def __post_init__(self):
        _require(self.rank > 0, "lora.rank", self.rank, "positive")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "positive")
        unknown = [name for name in self.targets if name not in DECODER_MATRICES]
        _require(self.targets and not unknown, "lora.targets", self.targets, f"some of {', '.join(DECODER_MATRICES)}")


@dataclass
class DistilledRecipe:
    """Images that the model made itself, see `distill`.

    Args:
        path (`str`): folder that `emu35 distill` has filled.
        share (`float`):
            in (0, 1], of the sequences of each kind of the mixture that has files there. The rest is drawn afresh.
    """

    path: str
    share: float = 0.5

    def __post_init__(self):
        _require(0 < self.share <= 1, "distilled.share", self.share, "in (0, 1]")


@dataclass
class DiDARecipe(StagedRecipe):
    """Adaptation training.  Fields are the keys of the YAML file.

    Args:
        method (`str`): "dida"; tells this kind of recipe from one that trains a model from nothing.
        output_dir (`str`): gets logs and checkpoints.
        export_dir (`str`): gets the finished adapter, or the adapted model; `None`: `output_dir`/export.
        model (`str`): checkpoint to start from; "tiny": `emu35.TINY`.
        seed (`int`), processes (`int`), data, stages, compile, attn_implementation, bf16, log_every, save_every:
            as in [`Recipe`]. A row of a stage holds `row_length` clean tokens.
        lora ([`LoRARecipe`], *optional*): train an adapter; without it all weights of the decoder.
        scheduler (`dict`): fields of [`DiDAScheduler`]; `num_codes` follows from the model.
        copies (`int`):
            noisy parts of a row, which share its clean one. Each holds noisy copies of the row's images, every one at
            a time of its own.
        noisy_share (`float`): length of a noisy part, in clean row lengths. It must have room for one image.
        initial_share (`float`):
            share of noisy copies at t = 0 exactly, besides those that the scheduler draws: the first step decides
            what the image shows.
        ar_loss_weight (`float`): of the next-token loss on the clean part; 0 with `lora`, which cannot change it.
        distilled ([`DistilledRecipe`], *optional*): mix in images that the model made itself.
        optimizer ([`OptimizerRecipe`]): of adapters, too.
        dtype (`str`): of the frozen weights under an adapter; what is trained is float32.
        gradient_checkpointing (`bool`): compute layers again in the backward pass.
    """

    output_dir: str
    stages: list[StageRecipe]
    method: str = "dida"
    export_dir: str | None = None
    model: str = "tiny"
    seed: int = 0
    processes: int = 2
    lora: LoRARecipe | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    copies: int = 4
    noisy_share: float = 0.5
    initial_share: float = 0.1
    ar_loss_weight: float = 0.0
    data: DataRecipe = field(default_factory=DataRecipe)
    distilled: DistilledRecipe | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    compile: bool = True
    attn_implementation: str = "eager"
    bf16: bool = True
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    log_every: int = 20
    save_every: int = 250

    def __post_init__(self):
        _require(bool(self.stages), "stages", self.stages, "a list of at least one stage")
        for name in ("processes", "copies", "noisy_share", "log_every", "save_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        _require(0 <= self.initial_share <= 1, "initial_share", self.initial_share, "in [0, 1]")
        _require(self.ar_loss_weight >= 0, "ar_loss_weight", self.ar_loss_weight, "not negative")
        _require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, '"float32" or "bfloat16"')
        if self.lora is not None and self.ar_loss_weight:
            raise ValueError(
                f"`ar_loss_weight` must be 0 with `lora`, got {self.ar_loss_weight}: clean tokens do not see the "
                "adapter. Leave out one of them."
            )
        known = [name for name in inspect.signature(DiDAScheduler.__init__).parameters if name != "self"]
        for name in self.scheduler:
            if name not in known:
                raise ValueError(f"`recipe.scheduler`: {_unknown(name, known)}")
        if "num_codes" in self.scheduler:
            raise ValueError("`scheduler.num_codes` follows from the model; leave it out.")
        DiDAScheduler(**self.scheduler)  # checks the values
