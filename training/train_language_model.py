"""Stages 2 to 4: the language model, from random weights to instructions, in one run under one learning-rate schedule.

    emu35 train training/recipes/tiny.yaml

    each process:  draw and encode its own fresh batch -> forward, backward -> average gradients -> step -> ...

Everything is a function of the recipe and (seed, step, rank). A checkpoint holds weights, optimiser state and the
step, so a run that was killed continues on the same loss curve.
"""

import ctypes
import dataclasses
import itertools
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emu35.configuration_emu35 import Emu35Config
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .batches import Batch, BatchSource
from .checkpointing import LossLog, load_state, read_log, save_state
from .distributed import average_gradients_, launch, world_size
from .optimizers import MuonAdamW
from .recipe import Recipe
from .sequences import IGNORED, SequenceWriter

logger = logging.getLogger(__name__)

#: Fields of a recipe that may change between a run and its continuation: they do not move the loss curve.
_FREE_FIELDS = ("output_dir", "export_dir", "generation", "log_every", "save_every", "vision_tokenizer")


def build_model(
    recipe: Recipe, processor: Emu35Processor, vision_tokenizer: Emu35VisionTokenizer
) -> Emu35ForConditionalGeneration:
    """The model of a recipe: a fresh decoder around the trained vision tokenizer, which stays as it is."""
    layout = processor.token_layout
    end = layout.visual_token_offset + layout.num_visual_tokens
    text_config = {**recipe.model, "vocab_size": -(-end // 32) * 32}  # round sizes make faster matrices
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        text_config[name] = getattr(layout, name)
    config = Emu35Config(
        text_config=text_config,
        vision_tokenizer_config=vision_tokenizer.config.to_dict(),
        token_layout=layout.to_dict(),
        visual_loss_weight=recipe.visual_loss_weight,
    )
    torch.manual_seed(recipe.seed)
    model = Emu35ForConditionalGeneration(config)
    model.vision_tokenizer.load_state_dict(vision_tokenizer.state_dict())
    model.vision_tokenizer.requires_grad_(False)
    return model


class LanguageModelTrainer:
    """One process of a run."""

    def __init__(
        self,
        recipe: Recipe,
        processor: Emu35Processor,
        vision_tokenizer: Emu35VisionTokenizer,
        rank: int = 0,
        device: str = "cpu",
    ):
        self.recipe, self.rank, self.device = recipe, rank, torch.device(device)
        self.model = build_model(recipe, processor, vision_tokenizer).to(self.device).train()
        self.model.vision_tokenizer.eval()
        self.model.set_attn_implementation(recipe.attn_implementation)
        self.decoder = torch.compile(self.model.model) if recipe.compile else self.model.model
        factor = vision_tokenizer.config.downsampling_factor
        writer = SequenceWriter(processor.tokenizer, processor.token_layout, recipe.data, factor)
        self.source = BatchSource(writer, self.model.vision_tokenizer, recipe.seed)
        self.optimizer = MuonAdamW(self.model, recipe.optimizer, rank)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def losses(self, batch: Batch, visual_loss_weight: float | None = None) -> dict[str, torch.Tensor]:
        """`loss`: the weighted mean over all targets; `visual`, `text`: the plain means of either kind.

        Args:
            visual_loss_weight (`float`, *optional*): of a visual token in `loss`, instead of the model's.
        """
        layout, of_model = self.model.config.token_layout, self.model.config.visual_loss_weight
        weight = of_model if visual_loss_weight is None else visual_loss_weight
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            hidden_states = self.decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            visual = (batch.labels >= layout.visual_token_offset) & (batch.labels < layout.visual_token_end)
            visual_labels = batch.labels.masked_fill(~visual, IGNORED)
            text_labels = batch.labels.masked_fill(visual, IGNORED)
            visual_sum = self.model.compute_loss(hidden_states, visual_labels, num_items_in_batch=1) / of_model
            text_sum = self.model.compute_loss(hidden_states, text_labels, num_items_in_batch=1)
        num_visual, num_text = visual.sum(), (text_labels != IGNORED).sum()
        return {
            "loss": (weight * visual_sum + text_sum) / (weight * num_visual + num_text).clamp(min=1e-8),
            "visual": visual_sum.detach() / num_visual.clamp(min=1),
            "text": text_sum.detach() / num_text.clamp(min=1),
        }

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step on fresh batches; returns losses and counts of the first of them.

        A step has `recipe.processes` batches however many processes there really are (on a GPU one does them all).
        """
        dtype = torch.bfloat16 if self.recipe.bf16 else torch.float32
        streams = range(self.rank, self.recipe.processes, world_size())
        values = {}
        for stream in streams:
            torch.manual_seed(self.recipe.seed * 1_000_003 + step * 1009 + stream)  # of dropout
            stage, progress = self.recipe.stage_at(step)
            batch = self.source.batch(step, stage, stream, dtype, progress).to(self.device)
            losses = self.losses(batch, stage.visual_loss_weight)
            (losses["loss"] / len(streams)).backward()
            if not values:
                values = {name: float(value.detach()) for name, value in losses.items()}
                values |= {"tokens": batch.num_tokens, "sequences": batch.num_sequences}
        average_gradients_(self.trainable)
        self.optimizer.step(self.recipe.learning_rate_scale(step))
        return values

    def decoder_state(self) -> dict[str, torch.Tensor]:
        """The trained weights, without the vision tokenizer's."""
        state = self.model.state_dict()
        return {name: t.contiguous() for name, t in state.items() if not name.startswith("vision_tokenizer.")}

    def save(self, directory: Path, step: int):
        """A checkpoint that is either complete or not there. To be called by all processes together."""
        temporary = directory / "checkpoint.tmp"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(self.decoder_state(), temporary / "model.safetensors")
            state = {"step": step, "processes": world_size(), "recipe": dataclasses.asdict(self.recipe)}
            (temporary / "state.json").write_text(json.dumps(state))
        _barrier()
        save_state(temporary / f"optimizer-{self.rank}.pt", self.optimizer.state_dict())
        _barrier()
        if self.rank == 0:
            os.replace(temporary, directory / f"checkpoint-{step:08d}")
            for old in checkpoints(directory)[:-2]:
                shutil.rmtree(old)
        _barrier()

    def load(self, checkpoint: Path) -> int:
        """Continue where a checkpoint ends; returns the next step."""
        state = json.loads((checkpoint / "state.json").read_text())
        _check_same_run(self.recipe, state, checkpoint)
        self.model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        self.optimizer.load_state_dict(load_state(checkpoint / f"optimizer-{self.rank}.pt"))
        return state["step"]


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(Path(directory).glob("checkpoint-" + "[0-9]" * 8))


def _check_same_run(recipe: Recipe, state: dict[str, Any], checkpoint: Path):
    current = json.loads(json.dumps(dataclasses.asdict(recipe)))
    changed = [k for k in current if k not in _FREE_FIELDS and current[k] != state["recipe"].get(k)]
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run with another recipe (different: {', '.join(changed)}). Set the old values, "
            "choose another `output_dir`, or pass `resume=False`."
        )
    if state["processes"] != world_size():
        raise ValueError(
            f"{checkpoint} was written by {state['processes']} processes; now there are {world_size()}. Continue on "
            "the kind of device it was begun on, or pass `resume=False`."
        )


def _keep_freed_memory():
    """Stop glibc from handing the memory of every large tensor back to the kernel: page faults are 5 % of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _barrier():
    if world_size() > 1:
        dist.barrier()


def _work(
    rank: int, recipe: Recipe, directory: str, vision_tokenizer: str, processor: str, device: str, progress: bool
):
    directory = Path(directory)
    _keep_freed_memory()
    trainer = LanguageModelTrainer(
        recipe,
        Emu35Processor.from_pretrained(processor),
        Emu35VisionTokenizer.from_pretrained(vision_tokenizer),
        rank,
        device,
    )
    run_steps(trainer, directory, "language model", progress)


def run_steps(trainer: "LanguageModelTrainer", directory: Path, what: str, progress: bool):
    """All steps of a run, or those after its last checkpoint; the first process logs them.

    Args:
        trainer: with `recipe`, `rank`, `load`, `step` and `save`.
        directory (`Path`): gets checkpoints and `losses.jsonl`.
        what (`str`): before the progress bar.
        progress (`bool`): show a progress bar.
    """
    recipe, rank = trainer.recipe, trainer.rank
    found = checkpoints(directory)
    first = trainer.load(found[-1]) if found else 0
    _barrier()
    log = LossLog(directory / "losses.jsonl", first) if rank == 0 else None
    last = recipe.num_steps - 1
    bar = tqdm(total=last + 1, initial=first, disable=rank > 0 or not progress, desc=what, unit="step")
    started, tokens = time.monotonic(), 0
    for step in range(first, last + 1):
        values = trainer.step(step)
        if rank == 0:
            tokens += values.pop("tokens") * recipe.processes
            if step % recipe.log_every == 0 or step == last:
                stage, seconds = recipe.stage_at(step)[0].name, time.monotonic() - started
                values = {name: value for name, value in values.items() if value == value}  # no NaN in JSON
                log.write(
                    step, stage=stage, **values, tokens_per_second=round(tokens / seconds), seconds=round(seconds, 1)
                )
                bar.set_postfix(stage=stage, **{k: f"{values[k]:.4f}" for k in ("visual", "text") if k in values})
            bar.update()
        if (step + 1) % recipe.save_every == 0 or step == last:
            trainer.save(directory, step + 1)
    bar.close()


def train_language_model(
    recipe: Recipe,
    directory: str | os.PathLike,
    vision_tokenizer: str | os.PathLike,
    processor: str | os.PathLike,
    resume: bool = True,
    device: str = "cpu",
    progress: bool = True,
) -> Emu35ForConditionalGeneration:
    """Stages 2 to 4, or what is left of them.

    Args:
        recipe ([`Recipe`]): what to do.
        directory (`str` or `os.PathLike`): gets checkpoints, `losses.jsonl` and `losses.png`.
        vision_tokenizer, processor (`str` or `os.PathLike`): where they are saved.
        resume (`bool`): `False`: drop the checkpoints that are there.
        device (`str`): "cpu": `recipe.processes` processes share a step; otherwise one process does it all, on a GPU.
        progress (`bool`): show a progress bar.
    Returns:
        the model with its vision tokenizer, in evaluation mode on the CPU.
    Raises:
        ValueError: if `directory` holds a run of another recipe.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in checkpoints(directory):
            shutil.rmtree(old)
    finished = checkpoints(directory)
    if not finished or json.loads((finished[-1] / "state.json").read_text())["step"] < recipe.num_steps:
        processes = recipe.processes if device == "cpu" else 1
        launch(_work, processes, recipe, str(directory), str(vision_tokenizer), str(processor), device, progress)
    model = build_model(
        recipe, Emu35Processor.from_pretrained(processor), Emu35VisionTokenizer.from_pretrained(vision_tokenizer)
    )
    model.load_state_dict(load_file(checkpoints(directory)[-1] / "model.safetensors"), strict=False)
    plot_losses(directory / "losses.jsonl", directory / "losses.png")
    return model.eval()


def plot_losses(log_path: str | os.PathLike, image_path: str | os.PathLike):
    """The loss curves of a log, one line for visual tokens and one for text; skipped without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        logger.warning("matplotlib is not installed, so %s is not drawn.", image_path)
        return
    records = read_log(log_path)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("visual", "text"):
        axes.plot([r["step"] for r in records], [r[name] for r in records], label=f"{name} tokens", linewidth=0.8)
    for previous, record in itertools.pairwise(records):
        if record["stage"] != previous["stage"]:
            axes.axvline(record["step"], color="gray", linestyle=":", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", title="Language model, stages 2 to 4")
    axes.legend()
    figure.savefig(image_path, dpi=120)
    plt.close(figure)
