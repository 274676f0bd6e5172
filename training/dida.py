"""Adaptation training: a next-token model learns to predict all codes of a noisy image at once.

    emu35 train training/recipes/tiny-dida.yaml

    adapter:  clean part, frozen ──► keys and values ──► noisy parts with the LoRA adapter ──► loss on their codes
    full:     clean part and noisy parts in one pass                                       ──► the same, (and AR loss)

Sources: Emu3.5 (arXiv 2510.26583, section 4.3), URSA (arXiv 2510.24717).  The adapter sees noisy copies only, in
training as in decoding, so what the model says and what it draws code by code stays as it was, bit by bit.
"""

import copy
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emu35
import torch
from emu35.adapters_emu35 import DIDA_ADAPTER
from emu35.dida_emu35 import ADAPTER_FILES
from emu35.modeling_emu35 import LOSS_CHUNK_BYTES, Emu35ForConditionalGeneration
from emu35.pipelines.scheduling_dida import DiDAScheduler
from emu35.processing_emu35 import Emu35Processor
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .dida_attention import PrefixCache, clean_mask, dida_mask
from .dida_batches import DiDABatch, DiDABatchSource
from .dida_recipe import DiDARecipe, LoRARecipe
from .distill import DistilledWriter
from .distributed import launch
from .optimizers import MuonAdamW
from .recipe import checkpoint_path
from .sequences import IGNORED, SequenceWriter
from .train_language_model import LanguageModelTrainer, _keep_freed_memory, checkpoints, run_steps

logger = logging.getLogger(__name__)

NUM_TIME_BUCKETS = 4


def build_scheduler(model: Emu35ForConditionalGeneration, settings: dict[str, Any]) -> DiDAScheduler:
    """A scheduler over a model's codes.

    Args:
        settings (`dict`): fields of [`DiDAScheduler`] but `num_codes`.
    Raises:
        ValueError: if the path needs a codebook and the model has no vision tokenizer.
    """
    scheduler = DiDAScheduler(num_codes=model.config.token_layout.num_visual_tokens, **settings)
    if scheduler.config.path == "metric":
        scheduler.set_codebook(model.vision_tokenizer.quantize.embedding.weight)
    return scheduler


def add_adapter(model: Emu35ForConditionalGeneration, recipe: LoRARecipe) -> PeftModel:
    """Puts an adapter into a model's decoder, which is frozen. The adapter's weights are float32.

    Raises:
        FileNotFoundError: if there is no adapter in `recipe.start_from`.
        ValueError: if that one has other matrices, or other shapes.
    """
    names = "|".join(recipe.targets)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=rf"model\.layers\.\d+\.(self_attn|mlp)\.({names})",
        lora_dropout=0.0,
        bias="none",
    )
    adapted = get_peft_model(model, config, adapter_name=DIDA_ADAPTER)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if recipe.start_from is not None:
        _load_adapter(adapted, emu35.TINY_DIDA if recipe.start_from == "tiny" else recipe.start_from)
    return adapted


def _load_adapter(adapted: PeftModel, folder: str | os.PathLike):
    """Fills a fresh adapter with the weights of one that [`save_adapter`] has written."""
    missing = [name for name in ADAPTER_FILES if not Path(folder, name).is_file()]
    if missing:
        raise FileNotFoundError(f"`lora.start_from`: {folder} is no DiDA adapter: it lacks {', '.join(missing)}.")
    config, stored = LoraConfig.from_pretrained(folder), load_file(Path(folder, ADAPTER_FILES[1]))
    alpha = adapted.peft_config[DIDA_ADAPTER].lora_alpha
    if config.lora_alpha != alpha:
        raise ValueError(f"`lora.alpha` is {alpha}, but {config.lora_alpha} in `lora.start_from` {folder}.")
    fresh = get_peft_model_state_dict(adapted, adapter_name=DIDA_ADAPTER)
    if {name: tensor.shape for name, tensor in fresh.items()} != {name: t.shape for name, t in stored.items()}:
        raise ValueError(
            f"`lora.start_from`: the adapter in {folder} does not have this rank, these targets, or fit this model. "
            f"`lora` must be that of its {ADAPTER_FILES[0]}."
        )
    set_peft_model_state_dict(adapted, stored, adapter_name=DIDA_ADAPTER)


def save_adapter(adapted: PeftModel, scheduler: DiDAScheduler, directory: str | os.PathLike):
    """Writes what `load_dida_adapter` reads: the adapter in bfloat16, its configuration, and the scheduler's."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(adapted, adapter_name=DIDA_ADAPTER)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    (directory / "adapter_model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config = copy.copy(adapted.peft_config[DIDA_ADAPTER])
    if Path(config.base_model_name_or_path or "").is_dir():  # where it lies here says nothing elsewhere
        config.base_model_name_or_path = Path(config.base_model_name_or_path).name
    config.inference_mode = True
    config.save_pretrained(directory)
    scheduler.save_config(directory)


def code_losses(
    model: Emu35ForConditionalGeneration, hidden_states: torch.Tensor, targets: torch.LongTensor
) -> torch.Tensor:
    """Cross-entropy of each position over the visual vocabulary.

    The head goes over chunks of `LOSS_CHUNK_BYTES` of logits, which are computed again in the backward pass.

    Args:
        hidden_states (`torch.Tensor` of shape `(n, hidden_size)`), targets (`torch.LongTensor` of shape `(n,)`).
    Returns:
        `torch.Tensor` of shape `(n,)`, float32.
    """

    def losses(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.compute_logits(hidden_states, vocabulary="visual").float()
        return F.cross_entropy(logits, targets.to(logits.device), reduction="none")

    size = max(1, LOSS_CHUNK_BYTES // (4 * model.config.token_layout.num_visual_tokens))
    chunks = list(zip(hidden_states.split(size), targets.split(size), strict=True))
    if len(chunks) <= 1 or not torch.is_grad_enabled():
        return torch.cat([losses(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])


def noisy_hidden_states(
    decoder: Callable, batch: DiDABatch, config, adapted: PeftModel | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The decoder's outputs at the noisy tokens.

    Args:
        decoder (`Callable`): the model's `model`, compiled or not.
        batch ([`DiDABatch`]): clean and noisy parts.
        config: of the decoder.
        adapted (`PeftModel`, *optional*):
            around the same decoder: two passes, of which the clean one has neither adapter nor gradient. Without it
            there is one pass over all.
    Returns:
        `torch.Tensor` of shape `(rows, copies, noisy_length, hidden_size)`, and, after one pass, the clean tokens'
        `(rows, row_length, hidden_size)`.
    """
    rows, copies, noisy_length = batch.noisy_ids.shape
    width = torch.empty(0, dtype=decoder.dtype, device=batch.input_ids.device)
    if adapted is None:
        ids = torch.cat([batch.input_ids, batch.noisy_ids.flatten(1)], dim=1)
        like = width.expand(*ids.shape, 0)
        hidden_states = decoder(
            input_ids=ids,
            attention_mask=dida_mask(config, batch, like),
            position_ids=torch.cat([batch.position_ids, batch.noisy_position_ids.flatten(1)], dim=1),
            use_cache=False,
        ).last_hidden_state
        clean, noisy = hidden_states.split([batch.input_ids.shape[1], copies * noisy_length], dim=1)
        return noisy.unflatten(1, (copies, noisy_length)), clean
    cache = PrefixCache()
    with torch.no_grad(), adapted.disable_adapter():
        decoder(
            input_ids=batch.input_ids,
            attention_mask=clean_mask(config, batch, width.expand(*batch.input_ids.shape, 0)),
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=False,
        )
    cache = cache.repeat_rows(copies)
    ids = batch.noisy_ids.flatten(0, 1)
    hidden_states = decoder(
        input_ids=ids,
        attention_mask=dida_mask(config, batch, width.expand(*ids.shape, 0), cache),
        position_ids=batch.noisy_position_ids.flatten(0, 1),
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state
    return hidden_states.unflatten(0, (rows, copies)), None


class DiDATrainer(LanguageModelTrainer):
    """One process of an adaptation run."""

    def __init__(self, recipe: DiDARecipe, rank: int = 0, device: str = "cpu"):
        self.recipe, self.rank, self.device = recipe, rank, torch.device(device)
        path = checkpoint_path(recipe.model)
        processor = Emu35Processor.from_pretrained(path)
        dtype = torch.float32 if recipe.lora is None else getattr(torch, recipe.dtype)
        self.model = Emu35ForConditionalGeneration.from_pretrained(path, dtype=dtype).to(self.device).eval()
        self.model.set_attn_implementation(recipe.attn_implementation)
        self.model._require_vision_tokenizer().requires_grad_(False)
        torch.manual_seed(recipe.seed)
        self.adapted = None if recipe.lora is None else add_adapter(self.model, recipe.lora)
        if recipe.lora is None:
            self.model.model.train()  # an adapter's base has no dropout: its keys and values are those of decoding
        if recipe.gradient_checkpointing:
            self._checkpoint_layers()
        self.decoder = torch.compile(self.model.model, dynamic=False) if recipe.compile else self.model.model
        self.scheduler = build_scheduler(self.model, recipe.scheduler)
        factor = self.model.vision_tokenizer.config.downsampling_factor
        writing = (processor.tokenizer, processor.token_layout, recipe.data, factor)
        if recipe.distilled is None:
            writer = SequenceWriter(*writing)
        else:
            writer = DistilledWriter(*writing, recipe.distilled.path, recipe.distilled.share)
        self.source = DiDABatchSource(
            writer,
            self.model.vision_tokenizer,
            recipe.seed,
            self.scheduler,
            recipe.copies,
            recipe.noisy_share,
            recipe.initial_share,
        )
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = MuonAdamW(self.model, recipe.optimizer, rank)

    def _checkpoint_layers(self):
        """Compute layers again in the backward pass.  They do so in training mode only."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.model.model.layers:
            layer._can_checkpoint_with_cache = True  # the cache is only read when a layer is repeated
            if self.adapted is not None:
                layer.training, layer.residual_dropout = True, 0.0

    def losses(self, batch: DiDABatch, visual_loss_weight: float | None = None) -> dict[str, torch.Tensor]:
        """`loss`: the mean over codes of noisy images, and the weighted next-token loss; `visual`: the mean alone.

        `t0` to `t3`: the mean in quarters of [0, 1] of t; NaN where there is none.
        """
        config = self.model.config.text_config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            noisy, clean = noisy_hidden_states(self.decoder, batch, config, self.adapted)
            learnt = batch.targets != IGNORED
            losses = code_losses(self.model, noisy[learnt], batch.targets[learnt])
            loss = visual = losses.sum() / max(1, len(losses))
            if self.recipe.ar_loss_weight:
                loss = loss + self.recipe.ar_loss_weight * self.model.compute_loss(clean, batch.labels)
        bucket = (batch.times[learnt] * NUM_TIME_BUCKETS).long().clamp(max=NUM_TIME_BUCKETS - 1)
        means = {f"t{index}": losses.detach()[bucket == index].mean() for index in range(NUM_TIME_BUCKETS)}
        return {"loss": loss, "visual": visual.detach(), **means}

    def decoder_state(self) -> dict[str, torch.Tensor]:
        """What is trained."""
        return {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}

    def export(self, directory: str | os.PathLike):
        """The finished adapter; or the adapted model with its processor."""
        directory = Path(directory)
        if self.adapted is not None:
            save_adapter(self.adapted, self.scheduler, directory)
            return
        path = checkpoint_path(self.recipe.model)
        stored = Emu35ForConditionalGeneration.config_class.from_pretrained(path).dtype or torch.bfloat16
        self.model.model.to(stored)
        self.model.lm_head.to(stored)
        self.model.config.dtype = self.model.config.text_config.dtype = stored
        self.model.config.dida_adapted = True
        self.model.save_pretrained(directory)
        Emu35Processor.from_pretrained(path).save_pretrained(directory)
        self.scheduler.save_config(directory)


def _work(rank: int, recipe: DiDARecipe, directory: str, device: str, progress: bool):
    _keep_freed_memory()
    run_steps(DiDATrainer(recipe, rank, device), Path(directory), "DiDA", progress)


def train_dida(
    recipe: DiDARecipe,
    directory: str | os.PathLike,
    export_dir: str | os.PathLike,
    device: str = "cpu",
    progress: bool = True,
):
    """Adaptation training, or what is left of it, and the export.

    Args:
        recipe ([`DiDARecipe`]): what to do.
        directory (`str` or `os.PathLike`): gets checkpoints and `losses.jsonl`.
        export_dir (`str` or `os.PathLike`): gets the adapter (see [`save_adapter`]) or the adapted model.
        device (`str`): "cpu": `recipe.processes` processes share a step; otherwise one process does it all.
        progress (`bool`): show a progress bar.
    Raises:
        ValueError: if `directory` holds a run of another recipe.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    finished = checkpoints(directory)
    if not finished or json.loads((finished[-1] / "state.json").read_text())["step"] < recipe.num_steps:
        launch(_work, recipe.processes if device == "cpu" else 1, recipe, str(directory), device, progress)
    trainer = DiDATrainer(recipe)
    trainer.model.load_state_dict(load_file(checkpoints(directory)[-1] / "model.safetensors"), strict=False)
    trainer.export(export_dir)
