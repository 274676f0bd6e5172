"""The Trainer of fine-tuning: rows of users' data, weights of tokens, losses by modality, source and task."""

import itertools
import logging
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from .checkpointing import LossLog, ResumedAtTheEnd
from .data import Collator, ExampleWriter, PackedRows, PreparedRows, Source, best_fit, is_prepared, read_example
from .data.examples import IGNORED, ROW_ERRORS, Example, encode_images
from .data.reading import read_rows
from .lora import save_adapter
from .sft_card import write_card
from .sft_recipe import SFTRecipe, SourceRecipe

logger = logging.getLogger(__name__)

CHECKED_ROWS = 64
"""Rows of each source that are read, images and all, before a run begins."""
_MODALITIES = ("text", "visual")


def find_attention(name: str, device: str | torch.device) -> str:
    """The attention that a recipe's `attn_implementation` means; "auto" goes by the device."""
    if name != "auto":
        return name
    if torch.device(device).type != "cuda":
        return "sdpa"
    return "flash_attention_2" if find_spec("flash_attn") else "flex_attention"


def open_source(
    recipe: SourceRecipe, processor: Emu35Processor, vision_tokenizer: Emu35VisionTokenizer | None, row_length: int
) -> Source:
    """A source, looked at: whether it is there, of this model, and its examples fit.

    Args:
        vision_tokenizer ([`Emu35VisionTokenizer`], *optional*): of the model; encodes what is not prepared.
    Raises:
        FileNotFoundError, ValueError: if it is not there, was prepared for another model, has examples longer than a
            row, or none of its first rows is good.
    """
    if is_prepared(recipe.path):
        rows = PreparedRows(recipe.path, processor, vision_tokenizer)
        longest = rows.summary["longest"]
        if longest > row_length:
            raise ValueError(
                f"data: the longest example of {recipe.path} has {longest} tokens, more than `row_length`="
                f"{row_length}. Raise it, or prepare the data with --max-length {row_length}."
            )
        return Source(recipe.name, rows, read_example, recipe.weight)
    rows = read_rows(recipe.path, recipe.split, recipe.streaming)
    write = ExampleWriter(processor, row_length, recipe.task, recipe.image_area)
    reasons, looked_at = [], list(itertools.islice(rows, CHECKED_ROWS))
    for number, row in enumerate(looked_at):
        try:
            example = write(row)
        except ROW_ERRORS as error:
            reasons.append(f"row {number}: {error}")
            continue
        if example.pixel_values and vision_tokenizer is None:
            raise ValueError(
                f"data: {recipe.path} has images, and the checkpoint no vision tokenizer. `emu35 prepare` the data "
                "with one that has."
            )
    if len(reasons) == len(looked_at):
        reason = reasons[0] if reasons else "There are no rows."
        raise ValueError(f"data: none of the first rows of {recipe.path} is good. {reason}")
    if reasons:
        logger.warning("%s: %d of the first rows are bad, like %s", recipe.path, len(reasons), reasons[0])
    return Source(recipe.name, rows, write, recipe.weight)


class SFTTrainer(ResumedAtTheEnd, Trainer):
    """transformers' Trainer with our rows, our weights of tokens, and losses by modality and source.

    Args:
        recipe ([`SFTRecipe`]): what to do.
        arguments (`TrainingArguments`): see [`training_arguments`].
        model: the model, or a [`PeftModel`] around it, without vision tokenizer.
        vision_tokenizer ([`Emu35VisionTokenizer`], *optional*): of the model; encodes what is not prepared.
        processor ([`Emu35Processor`]): of the model.
        sources (`list[Source]`), eval_sources (`list[Source]`): to learn from, and to measure losses on.
        start (`int`): step at which the data begins.
    """

    def __init__(
        self,
        recipe: SFTRecipe,
        arguments: TrainingArguments,
        model: Emu35ForConditionalGeneration | PeftModel,
        vision_tokenizer: Emu35VisionTokenizer | None,
        processor: Emu35Processor,
        sources: list[Source],
        eval_sources: list[Source],
        start: int = 0,
    ):
        self.recipe, self.vision_tokenizer, self.processor = recipe, vision_tokenizer, processor
        self.sources, self.eval_sources = sources, eval_sources
        self._rows = PackedRows(
            self.sources,
            processor,
            recipe.row_length,
            recipe.rows,
            recipe.seed,
            self._encode,
            recipe.loss_on == "everything",
            recipe.unconditional_share,
            recipe.balance,
            recipe.packing,
            arguments.process_index,
            arguments.world_size,
            start * recipe.batch_rows,
        )
        flat = find_attention(recipe.attn_implementation, arguments.device).startswith("flash")
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self._rows,
            data_collator=Collator(processor.token_layout.pad_token_id, flat),
        )
        self._eval_batches: list[tuple[str, dict[str, torch.Tensor]]] | None = None

    def _encode(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        device = next(self.vision_tokenizer.parameters()).device
        return self.vision_tokenizer.encode([image.to(device) for image in images])

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate: it would share out rows once more, or send all of them through one process.
        # Its own generator: each iterator draws a number, which would shift dropout in a run that is resumed.
        options = {"batch_size": self.recipe.rows, "collate_fn": self.data_collator, "generator": torch.Generator()}
        return DataLoader(self._rows, **options)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """The sum of the weights of all tokens of a step that are learnt: what the model's loss is divided by."""
        total = sum(self._weights(batch["labels"][:, 1:]).sum() for batch in batch_samples).to(device)
        return self.accelerator.reduce(total, "sum").clamp(min=1e-8)

    def _weights(self, labels: torch.Tensor) -> torch.Tensor:
        weights = torch.where(self._is_visual(labels), float(self.model.config.visual_loss_weight), 1.0)
        return weights * (labels != IGNORED)

    def _is_visual(self, labels: torch.Tensor) -> torch.Tensor:
        layout = self.processor.token_layout
        return (labels >= layout.visual_token_offset) & (labels < layout.visual_token_end)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # A cache would hide from transformers' masks where sequences begin.
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean losses of `eval_data`: `eval_loss` (weighted as in training), `eval_text_loss`, `eval_visual_loss`.

        The last two by source, too, as `eval_NAME_text_loss`, and by task, as `eval_task_NAME_text_loss`. What has no
        tokens is left out.
        """
        if self._eval_batches is None:
            self._eval_batches = list(self._read_eval_batches())
        batches, (rank, world) = self._eval_batches, (self.args.process_index, self.args.world_size)
        kinds = sorted({kind for kind, _ in batches})
        sums = torch.zeros(len(kinds), len(_MODALITIES), 2, dtype=torch.float64)
        self.model_wrapped.eval()
        for first in range(0, len(batches), world):
            # All processes make the same number of passes, as sharded weights demand.
            kind, batch = batches[min(first + rank, len(batches) - 1)]
            visual = self._is_visual(batch["labels"])
            for number, chosen in enumerate((~visual, visual)):
                labels = batch["labels"].masked_fill(~chosen, IGNORED)
                inputs = self._prepare_inputs({**batch, "labels": labels})
                with self.accelerator.autocast():
                    loss = self.model_wrapped(**inputs, use_cache=False).loss
                count = int((labels[:, 1:] != IGNORED).sum())
                if first + rank < len(batches) and count:
                    sums[kinds.index(kind), number] += torch.tensor([float(loss) * count, count])
        self.model_wrapped.train()
        sums = self.accelerator.reduce(sums.float().to(self.args.device), "sum").cpu()
        metrics = self._metrics(kinds, sums, metric_key_prefix)
        if metrics:
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _read_eval_batches(self) -> Iterator[tuple[tuple[str, str], dict[str, torch.Tensor]]]:
        """((source, task), batch): each batch is of one kind."""
        for source in self.eval_sources:
            examples = source.first(self.recipe.eval_examples)
            encode_images(examples, self._encode, self.processor.token_layout)
            for task in sorted({example.task for example in examples}):
                left: list[Example] = sorted((one for one in examples if one.task == task), key=len, reverse=True)
                while left:
                    rows, left = best_fit(left, self.recipe.row_length, self.recipe.rows)
                    yield (source.name, task), self.data_collator([self._rows.join(row) for row in rows if row])

    def _metrics(self, kinds: list[tuple[str, str]], sums: torch.Tensor, prefix: str) -> dict[str, float]:
        metrics = {}

        def add(key: str, total: torch.Tensor):
            if total[1]:
                metrics[f"{prefix}_{key}loss"] = float(total[0] / total[1])

        weights = torch.tensor([1.0, float(self.model.config.visual_loss_weight)])
        add("", (sums.sum(0) * weights[:, None]).sum(0))
        for number, modality in enumerate(_MODALITIES):
            add(f"{modality}_", sums[:, number].sum(0))
            for part, label in enumerate(("", "task_")):
                names = [kind[part] for kind in kinds]
                if len(set(names)) > 1:
                    for name in sorted(set(names)):
                        add(f"{label}{name}_{modality}_", sums[[n == name for n in names], number].sum(0))
        return metrics

    def export(self, directory: str | os.PathLike):
        """Writes the adapter, or the model and its processor, and a card.  All processes must call it."""
        # As in `Trainer.save_model`: only DeepSpeed's wrapper can gather what it has shared out.
        state = self.accelerator.get_state_dict(self.model_wrapped if self.is_deepspeed_enabled else self.model)
        if not self.args.should_save:
            return
        model, directory = self.accelerator.unwrap_model(self.model), Path(directory)
        if isinstance(model, PeftModel):
            save_adapter(model, self.recipe.lora, directory, state)
        else:
            _save_model(model, state, self.vision_tokenizer, self.processor, directory)
        write_card(directory, self.recipe, self.state.log_history)


def training_arguments(
    recipe: SFTRecipe, directory: str | os.PathLike, device: str = "cpu", progress: bool = True
) -> TrainingArguments:
    """What the Trainer is told."""
    names = {"adamw": "adamw_torch"}
    optimizer = recipe.optimizer
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rows,
        learning_rate=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(optimizer.schedule, optimizer.schedule),
        optim=names.get(optimizer.name, optimizer.name),
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clip,
        bf16=recipe.bf16,
        use_cpu=torch.device(device).type == "cpu",
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        save_steps=recipe.save_every,
        save_total_limit=2,
        eval_strategy="no",  # `Watcher` says when
        remove_unused_columns=False,
        ignore_data_skip=True,  # the rows do it themselves
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
        disable_tqdm=not progress,
        dataloader_pin_memory=False,
    )
    arguments.gradient_accumulation_steps = recipe.accumulation(arguments.world_size)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process is one GPU: no `nn.DataParallel`
    return arguments


class Watcher(TrainerCallback):
    """Keeps `losses.jsonl`, says when to evaluate, draws samples."""

    def __init__(self, trainer: SFTTrainer, directory: Path, first_step: int):
        self.trainer, self.directory = trainer, directory
        # One process cannot draw with its share of the weights.
        self.draws = bool(trainer.recipe.samples) and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if trainer.recipe.samples and not self.draws:
            logger.warning(
                "`samples` are not drawn while weights are sharded. Draw them of the checkpoints, loaded with "
                "`from_pretrained(checkpoint, vision_tokenizer=MODEL)`."
            )
        self.looks = bool(trainer.eval_sources or self.draws)
        next_step = first_step + 1 if first_step else 0
        self.log = LossLog(directory / "losses.jsonl", next_step) if trainer.args.should_save else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log is not None:
            # The stream has no epochs: the Trainer counts some of its own, anew from where it is resumed.
            values = {name: value for name, value in logs.items() if math.isfinite(value) and name != "epoch"}
            self.log.write(state.global_step, **values)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and self.looks:
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **kwargs):
        is_due = state.global_step % self.trainer.recipe.eval_every == 0 or state.global_step == state.max_steps
        control.should_evaluate = is_due and self.looks
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        if self.draws:
            if args.should_save:
                self._draw(state.global_step)
            self.trainer.accelerator.wait_for_everyone()

    def _draw(self, step: int):
        """The recipe's samples, as `samples/STEP-NUMBER.png` and in TensorBoard."""
        prompts, folder = self.trainer.recipe.samples, self.directory / "samples"
        folder.mkdir(exist_ok=True)
        callbacks = self.trainer.callback_handler.callbacks
        writers = [one.tb_writer for one in callbacks if getattr(one, "tb_writer", None) is not None]
        for number, (prompt, image) in enumerate(zip(prompts, draw(self.trainer, prompts), strict=True)):
            image.save(folder / f"{step:06d}-{number}.png")
            for writer in writers:
                writer.add_image(prompt, np.asarray(image.convert("RGB")), step, dataformats="HWC")


@torch.no_grad()
def draw(trainer: SFTTrainer, prompts: list[str]) -> list:
    """A picture for each prompt, of the model as it is now."""
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    model = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    was_training = model.training
    model.eval()
    model.attach_vision_tokenizer(trainer.vision_tokenizer)
    try:
        inputs = trainer.processor(text=prompts, task="t2i").to(model.device)
        generator = torch.Generator(model.device).manual_seed(trainer.recipe.seed)
        with trainer.accelerator.autocast():
            output = model.generate(**inputs, task="t2i", generation_mode="image", generator=generator)
        return [images[0] for images in output.images]
    finally:
        model.detach_vision_tokenizer()
        model.train(was_training)


def _save_model(model, state: dict[str, torch.Tensor], vision_tokenizer, processor: Emu35Processor, directory: Path):
    """A whole checkpoint: the decoder in the dtype it came in, the vision tokenizer in float32."""
    stored = type(model.config).from_pretrained(model.config._name_or_path).dtype or torch.bfloat16
    state = {name: tensor.to(stored) for name, tensor in state.items()}
    if vision_tokenizer is not None:
        model.attach_vision_tokenizer(vision_tokenizer)
        state |= {f"vision_tokenizer.{name}": tensor.cpu() for name, tensor in vision_tokenizer.state_dict().items()}
    model.config.dtype = model.config.text_config.dtype = stored
    model.save_pretrained(directory, state_dict=state)
    processor.save_pretrained(directory)
