"""Recipes with `method: sft`: how a trained model learns from data of users (see `sft`)."""

import difflib
from dataclasses import dataclass, field

from emu35.configuration_emu35 import Emu35Config

from .dida_recipe import DECODER_MATRICES
from .recipe import _require, _require_one_of

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
SCHEDULES = ("cosine", "linear", "constant")
SHARDINGS = ("none", "fsdp2", "zero3")


@dataclass
class SourceRecipe:
    """One source of examples.

    Args:
        path (`str`): what `emu35 prepare` has written, or data itself, see [`read_rows`]; then images are encoded anew
            each time they come up.
        name (`str`, *optional*): for logs; default: the end of the path.
        weight (`float`): its share is `weight` over the sum of all.
        task (`str`, *optional*), image_area (`int`, *optional*), split (`str`), streaming (`bool`):
            of data that is not prepared, see [`ExampleWriter`] and [`read_rows`].
    """

    path: str
    name: str | None = None
    weight: float = 1.0
    task: str | None = None
    image_area: int | None = None
    split: str = "train"
    streaming: bool = False

    def __post_init__(self):
        _require(self.weight > 0, "data.weight", self.weight, "positive")
        self.name = self.name or self.path.rstrip("/").rpartition("/")[2]


@dataclass
class SFTLoRARecipe:
    """A PEFT adapter on the decoder's linear layers.

    Args:
        rank (`int`), alpha (`float`): the adapter adds `alpha / rank * B A x`.
        dropout (`float`): of its input, in training.
        targets (`list[str]`): names of linear layers.
        quantization (`str`, *optional*): of the frozen weights: "nf4" (QLoRA, needs bitsandbytes).
        export_alpha (`float`, *optional*):
            of the finished adapter, below `alpha`: a little less of what was learnt, and less of what was forgotten
            (weights between the old and the new ones, arXiv 2109.01903). Default: `alpha`.
    """

    rank: int = 32
    alpha: float = 32.0
    export_alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(DECODER_MATRICES))
    quantization: str | None = None

    def __post_init__(self):
        _require(self.rank > 0, "lora.rank", self.rank, "positive")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "positive")
        if self.export_alpha is not None:
            allowed = f"between 0 and `lora.alpha`, {self.alpha}"
            _require(0 < self.export_alpha <= self.alpha, "lora.export_alpha", self.export_alpha, allowed)
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        _require(bool(self.targets), "lora.targets", self.targets, "a list of at least one name")
        for name in self.targets:
            if name not in DECODER_MATRICES:
                nearest = difflib.get_close_matches(name, DECODER_MATRICES, n=1, cutoff=0.4)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                known = ", ".join(DECODER_MATRICES)
                raise ValueError(f"`lora.targets`: the decoder has no {name!r}.{hint} It has {known}.")
        _require(self.quantization in (None, "nf4"), "lora.quantization", self.quantization, '"nf4", or left out')


@dataclass
class SFTOptimizerRecipe:
    """AdamW.

    Args:
        name (`str`): "adamw", "adamw_8bit" or "paged_adamw_8bit" (bitsandbytes: 2 bytes of state a weight, not 8).
        learning_rate (`float`): the peak, after `warmup_steps` (`int`).
        schedule (`str`): "cosine", "linear" or "constant".
        betas (`list[float]`), weight_decay (`float`), gradient_clip (`float`): as usual.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    schedule: str = "cosine"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    gradient_clip: float = 1.0

    def __post_init__(self):
        _require_one_of("optimizer.name", self.name, ("adamw", "adamw_8bit", "paged_adamw_8bit"))
        _require_one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "gradient_clip"):
            _require(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "positive")
        for name in ("warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "not negative")
        _require(len(self.betas) == 2, "optimizer.betas", self.betas, "two numbers")


@dataclass
class HardwareRecipe:
    """What the memory estimate is for; training itself goes by how it is started.

    Args:
        gpus (`int`), gpu_memory (`int`): how many, and GiB of each.
        sharding (`str`): "none", "fsdp2" (accelerate/fsdp2.yaml) or "zero3" (accelerate/deepspeed.yaml, whose
            optimiser lies in main memory).
    """

    gpus: int = 1
    gpu_memory: int = 80
    sharding: str = "none"

    def __post_init__(self):
        for name in ("gpus", "gpu_memory"):
            _require(getattr(self, name) > 0, f"hardware.{name}", getattr(self, name), "positive")
        _require_one_of("hardware.sharding", self.sharding, SHARDINGS)


@dataclass
class SFTRecipe:
    """Supervised fine-tuning.  Fields are the keys of the YAML file.

    Args:
        method (`str`): "sft".
        output_dir (`str`): gets logs, checkpoints and samples.
        export_dir (`str`): gets the finished adapter or model; `None`: `output_dir`/export.
        model (`str`): checkpoint to start from; "tiny": `emu35.TINY`.
        data (`list[SourceRecipe]`), eval_data (`list[SourceRecipe]`): to learn from, and to measure losses on.
        steps (`int`), seed (`int`): optimiser steps; of data, adapter and dropout.
        row_length (`int`): tokens of a packed row; no example may be longer.
        batch_rows (`int`): rows of a step, all processes together.
        rows (`int`): rows of one pass of one process; gradients are accumulated until `batch_rows` are done.
        packing (`bool`): `False`: one example a row.
        balance (`str`): what the weights of sources share out: "tokens" or "examples".
        loss_on (`str`): "answers", or "everything" (prompts and images of users, too).
        visual_loss_weight (`float`, *optional*): of visual tokens in the loss; default: the model's own.
        unconditional_share (`float`): of examples with images in an answer that lose their text, so that guidance
            keeps working.
        lora ([`SFTLoRARecipe`], *optional*): train an adapter; without it all weights of the decoder.
        optimizer ([`SFTOptimizerRecipe`]), hardware ([`HardwareRecipe`]): what they say.
        gradient_checkpointing (`bool`): compute layers again in the backward pass.
        attn_implementation (`str`): "auto": flash attention where it is installed, else flex attention on a GPU, else
            sdpa.
        dtype (`str`): of the frozen weights under an adapter; what is trained is float32.
        bf16 (`bool`): autocast.
        samples (`list[str]`): prompts that are drawn at each evaluation.
        eval_examples (`int`): of each source of `eval_data`, the first ones.
        log_every (`int`), eval_every (`int`), save_every (`int`): in steps. Two checkpoints are kept.
        push_to_hub (`str`, *optional*): name of the repository that gets the export.
    """

    output_dir: str
    data: list[SourceRecipe]
    steps: int
    method: str = "sft"
    export_dir: str | None = None
    model: str = "tiny"
    eval_data: list[SourceRecipe] = field(default_factory=list)
    seed: int = 0
    row_length: int = 1024
    batch_rows: int = 8
    rows: int = 1
    packing: bool = True
    balance: str = "tokens"
    loss_on: str = "answers"
    visual_loss_weight: float | None = None
    unconditional_share: float = 0.1
    lora: SFTLoRARecipe | None = None
    optimizer: SFTOptimizerRecipe = field(default_factory=SFTOptimizerRecipe)
    hardware: HardwareRecipe = field(default_factory=HardwareRecipe)
    gradient_checkpointing: bool = False
    attn_implementation: str = "auto"
    dtype: str = "bfloat16"
    bf16: bool = True
    samples: list[str] = field(default_factory=list)
    eval_examples: int = 64
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    push_to_hub: str | None = None

    def __post_init__(self):
        _require(bool(self.data), "data", self.data, "a list of at least one source")
        for sources in (self.data, self.eval_data):
            names = [source.name for source in sources]
            double = [name for name in names if names.count(name) > 1]
            _require(not double, "data.name", double[:1], "different for each source; give one a `name`")
        for name in ("steps", "row_length", "batch_rows", "rows", "eval_examples", "log_every", "eval_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        _require(self.save_every > 0, "save_every", self.save_every, "positive")
        _require(self.batch_rows % self.rows == 0, "batch_rows", self.batch_rows, f"a multiple of `rows`={self.rows}")
        _require(0 <= self.unconditional_share < 1, "unconditional_share", self.unconditional_share, "in [0, 1)")
        _require(all(one.strip() for one in self.samples), "samples", self.samples, "prompts with words in them")
        sharding, bits = self.hardware.sharding, self.lora.quantization if self.lora else None
        if sharding != "none" and bits:
            raise ValueError(
                f"`lora.quantization`={bits!r} cannot be sharded with {sharding}: each GPU keeps the whole model, in "
                "a quarter of the memory. Start without an accelerate configuration, or leave the quantisation out."
            )
        if sharding == "zero3" and self.optimizer.name != "adamw":
            raise ValueError(
                f"`optimizer.name`={self.optimizer.name!r} would become DeepSpeed's own with zero3, which has the "
                'optimiser in main memory. Set "adamw", or shard with fsdp2.'
            )
        weight = self.visual_loss_weight
        _require(weight is None or weight >= 0, "visual_loss_weight", weight, "not negative")
        for name, known in (
            ("balance", ("tokens", "examples")),
            ("loss_on", ("answers", "everything")),
            ("dtype", ("bfloat16", "float32")),
            ("attn_implementation", ("auto", *ATTENTIONS)),
        ):
            _require_one_of(name, getattr(self, name), known)

    def check_context(self, config: Emu35Config):
        """Raises a ValueError if a row is longer than the context of a model."""
        context = config.text_config.max_position_embeddings
        if self.row_length > context:
            raise ValueError(f"`row_length`={self.row_length} is more than the model's context, {context}.")

    def accumulation(self, num_processes: int) -> int:
        """Passes of one process a step.

        Raises:
            ValueError: if `batch_rows` cannot be shared out.
        """
        passes, left = divmod(self.batch_rows, self.rows * num_processes)
        if left or not passes:
            raise ValueError(
                f"`batch_rows`={self.batch_rows} must be a multiple of `rows` x processes = {self.rows} x "
                f"{num_processes}."
            )
        return passes
