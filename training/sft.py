"""Supervised fine-tuning on data of users: full, LoRA or QLoRA, over transformers' Trainer.

    emu35 train training/recipes/tiny-lora.yaml
    emu35 train training/recipes/lora-34b.yaml --dry-run
    accelerate launch --config_file training/recipes/fsdp2.yaml -m emu35.cli train training/recipes/full-34b.yaml \
        --device cuda

The Trainer and not TRL's `SFTTrainer`, which brings a loss of its own in place of the model's, does not know
`visual_loss_weight`, and whose packing and data preparation ours would only have to switch off.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from emu35.configuration_emu35 import Emu35Config
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .checkpointing import LossLog
from .data import Collator, ExampleWriter, PackedRows, PreparedRows, Source, best_fit, is_prepared, read_example
from .data.examples import IGNORED, ROW_ERRORS, encode_images
from .data.reading import read_rows
from .sft_card import write_card
from .sft_recipe import SFTLoRARecipe, SFTRecipe, SourceRecipe

logger = logging.getLogger(__name__)

CHECKED_ROWS = 64
"""Rows of each source that are read, images and all, before a run begins."""
_MODALITIES = ("text", "visual")


def model_path(recipe: SFTRecipe) -> str:
    """The checkpoint that a recipe starts from."""
    import emu35

    return str(emu35.TINY) if recipe.model == "tiny" else recipe.model


def find_attention(recipe: SFTRecipe, device: str | torch.device) -> str:
    """The attention that "auto" means."""
    if recipe.attn_implementation != "auto":
        return recipe.attn_implementation
    if torch.device(device).type != "cuda":
        return "sdpa"
    return "flash_attention_2" if find_spec("flash_attn") else "flex_attention"


def load_model(recipe: SFTRecipe, device: str = "cpu") -> Emu35ForConditionalGeneration:
    """The model to be trained, quantised if the recipe says so; with an adapter: [`add_adapter`]."""
    lora = recipe.lora
    options: dict[str, Any] = {"dtype": torch.float32 if lora is None else getattr(torch, recipe.dtype)}
    if lora is not None and lora.quantization:
        if find_spec("bitsandbytes") is None:
            raise ValueError("`lora.quantization` needs bitsandbytes: pip install 'emu35[train]'")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "vision_tokenizer"],
        )
        local = int(os.environ.get("LOCAL_RANK", 0))
        options["device_map"] = {"": f"cuda:{local}" if torch.device(device).type == "cuda" else device}
    model = Emu35ForConditionalGeneration.from_pretrained(model_path(recipe), **options)
    for module in model.modules():
        # On a CPU, bitsandbytes packs weights for inference in a forward pass of `eval` and leaves them so; training
        # would then go on through an operation that has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.set_attn_implementation(find_attention(recipe, device))
    if recipe.visual_loss_weight is not None:
        model.config.visual_loss_weight = recipe.visual_loss_weight
    if recipe.row_length > model.config.text_config.max_position_embeddings:
        raise ValueError(
            f"`row_length`={recipe.row_length} is more than the model's context, "
            f"{model.config.text_config.max_position_embeddings}."
        )
    return model


def load_vision_tokenizer(path: str | os.PathLike) -> Emu35VisionTokenizer | None:
    """That of a checkpoint, frozen; `None` if it has none."""
    if Emu35Config.from_pretrained(path).vision_tokenizer_config is None:
        return None
    return Emu35VisionTokenizer.from_pretrained(path).requires_grad_(False).eval()


def add_adapter(model: Emu35ForConditionalGeneration, recipe: SFTLoRARecipe) -> PeftModel:
    """Puts a fresh adapter, in float32, into a model's decoder, which is frozen."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(recipe.targets)})",
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


# --------------------------------------------------------------------------------------------------------------- data


def open_source(recipe: SourceRecipe, processor: Emu35Processor, row_length: int) -> Source:
    """A source, looked at: whether it is there, of this model, and its examples fit.

    Raises:
        FileNotFoundError, ValueError: if it is not there, was prepared for another model, has examples longer than a
            row, or none of its first rows is good.
    """
    if is_prepared(recipe.path):
        rows = PreparedRows(recipe.path, processor)
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
            write(row)
        except ROW_ERRORS as error:
            reasons.append(f"row {number}: {error}")
    if len(reasons) == len(looked_at):
        reason = reasons[0] if reasons else "There are no rows."
        raise ValueError(f"data: none of the first rows of {recipe.path} is good. {reason}")
    if reasons:
        logger.warning("%s: %d of the first rows are bad, like %s", recipe.path, len(reasons), reasons[0])
    return Source(recipe.name, rows, write, recipe.weight)


# ------------------------------------------------------------------------------------------------------------ trainer


class SFTTrainer(Trainer):
    """transformers' Trainer with our rows, our weights of tokens, and losses by modality and source.

    Args:
        recipe ([`SFTRecipe`]): what to do.
        arguments (`TrainingArguments`): see [`training_arguments`].
        model: the model, or a [`PeftModel`] around it, without vision tokenizer.
        vision_tokenizer ([`Emu35VisionTokenizer`], *optional*): of the model; encodes what is not prepared.
        processor ([`Emu35Processor`]): of the model.
        start (`int`): step at which the data begins.
    """

    def __init__(
        self,
        recipe: SFTRecipe,
        arguments: TrainingArguments,
        model: Emu35ForConditionalGeneration | PeftModel,
        vision_tokenizer: Emu35VisionTokenizer | None,
        processor: Emu35Processor,
        start: int = 0,
    ):
        self.recipe, self.vision_tokenizer, self.processor = recipe, vision_tokenizer, processor
        self.sources = [open_source(source, processor, recipe.row_length) for source in recipe.data]
        self.eval_sources = [open_source(source, processor, recipe.row_length) for source in recipe.eval_data]
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
        flat = find_attention(recipe, arguments.device).startswith("flash")
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self._rows,
            data_collator=Collator(processor.token_layout.pad_token_id, flat),
        )
        self._eval_batches: list[tuple[str, dict[str, torch.Tensor]]] | None = None

    def _encode(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.vision_tokenizer is None:
            raise ValueError("the checkpoint has no vision tokenizer: `emu35 prepare` the data with one that has.")
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
        """Mean losses of `eval_data`: `eval_loss` (weighted as in training), `eval_text_loss`, `eval_visual_loss`,

        and the last two by source, `eval_NAME_text_loss`. What has no tokens is left out.
        """
        if self._eval_batches is None:
            self._eval_batches = [
                (source.name, self.data_collator(rows))
                for source in self.eval_sources
                for rows in self._eval_rows(source)
            ]
        batches, (rank, world) = self._eval_batches, (self.args.process_index, self.args.world_size)
        names = [source.name for source in self.eval_sources]
        sums = torch.zeros(len(names), len(_MODALITIES), 2, dtype=torch.float64)
        self.model_wrapped.eval()
        for first in range(0, len(batches), world):
            # All processes make the same number of passes, as sharded weights demand.
            name, batch = batches[min(first + rank, len(batches) - 1)]
            visual = self._is_visual(batch["labels"])
            for number, chosen in enumerate((~visual, visual)):
                labels = batch["labels"].masked_fill(~chosen, IGNORED)
                inputs = self._prepare_inputs({**batch, "labels": labels})
                with self.accelerator.autocast():
                    loss = self.model_wrapped(**inputs, use_cache=False).loss
                count = int((labels[:, 1:] != IGNORED).sum())
                if first + rank < len(batches) and count:
                    sums[names.index(name), number] += torch.tensor([float(loss) * count, count])
        self.model_wrapped.train()
        sums = self.accelerator.reduce(sums.float().to(self.args.device), "sum").cpu()
        metrics = self._metrics(names, sums, metric_key_prefix)
        if metrics:
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_rows(self, source: Source) -> Iterator[list[dict]]:
        examples = sorted(source.first(self.recipe.eval_examples), key=len, reverse=True)
        encode_images(examples, self._encode, self.processor.token_layout)
        while examples:
            rows, examples = best_fit(examples, self.recipe.row_length, self.recipe.rows)
            yield [self._rows.join(row) for row in rows if row]

    def _metrics(self, names: list[str], sums: torch.Tensor, prefix: str) -> dict[str, float]:
        metrics = {}

        def add(key: str, total: torch.Tensor):
            if total[1]:
                metrics[f"{prefix}_{key}loss"] = float(total[0] / total[1])

        weights = torch.tensor([1.0, float(self.model.config.visual_loss_weight)])
        add("", (sums.sum(0) * weights[:, None]).sum(0))
        for number, modality in enumerate(_MODALITIES):
            add(f"{modality}_", sums[:, number].sum(0))
            if len(names) > 1:
                for index, name in enumerate(names):
                    add(f"{name}_{modality}_", sums[index, number])
        return metrics

    def export(self, directory: str | os.PathLike):
        """Writes the adapter, or the model and its processor, and a card.  All processes must call it."""
        state = self.accelerator.get_state_dict(self.model)
        if not self.args.should_save:
            return
        model, directory = self.accelerator.unwrap_model(self.model), Path(directory)
        if isinstance(model, PeftModel):
            model.save_pretrained(directory, state_dict=state)
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
        eval_strategy="no",  # `_Watcher` says when
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


class _Watcher(TrainerCallback):
    """Keeps `losses.jsonl`, says when to evaluate, draws samples."""

    def __init__(self, trainer: SFTTrainer, directory: Path, first_step: int):
        self.trainer, self.directory = trainer, directory
        self.looks = bool(trainer.eval_sources or trainer.recipe.samples)
        next_step = first_step + 1 if first_step else 0
        self.log = LossLog(directory / "losses.jsonl", next_step) if trainer.args.should_save else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log is not None:
            values = {name: value for name, value in logs.items() if math.isfinite(value)}
            self.log.write(state.global_step, **values)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and self.looks:
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **kwargs):
        is_due = state.global_step % self.trainer.recipe.eval_every == 0 or state.global_step == state.max_steps
        control.should_evaluate = is_due and self.looks
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        is_sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled  # then one process cannot draw
        if self.trainer.recipe.samples and not is_sharded:
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
    model.vision_tokenizer = trainer.vision_tokenizer
    was_training = model.training
    model.eval()
    try:
        inputs = trainer.processor(text=prompts, task="t2i").to(model.device)
        generator = torch.Generator(model.device).manual_seed(trainer.recipe.seed)
        with trainer.accelerator.autocast():
            output = model.generate(**inputs, task="t2i", generation_mode="image", generator=generator)
        return [images[0] for images in output.images]
    finally:
        model.vision_tokenizer = None
        model.train(was_training)


# ---------------------------------------------------------------------------------------------------------- the whole


def last_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The newest one that is whole: the Trainer writes `trainer_state.json` last."""
    whole = []
    for path in Path(directory).glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(path.read_text(encoding="utf-8"))["global_step"], path.parent))
        except json.JSONDecodeError:
            continue
    return max(whole, default=(0, None))[1]


def train_sft(
    recipe: SFTRecipe,
    directory: str | os.PathLike,
    export_dir: str | os.PathLike,
    device: str = "cpu",
    progress: bool = True,
):
    """Fine-tuning, or what is left of it, and the export.

    Args:
        recipe ([`SFTRecipe`]): what to do.
        directory (`str` or `os.PathLike`): gets checkpoints, `losses.jsonl` and `samples`.
        export_dir (`str` or `os.PathLike`): gets the adapter or the model.
        device (`str`): "cpu" or "cuda"; of several processes (started by `accelerate launch`) each has its own.
        progress (`bool`): show a progress bar.
    Raises:
        FileNotFoundError, ValueError: if data is missing or bad, or `directory` holds a run of another recipe.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(directory)
    _check_recipe(recipe, directory, checkpoint)
    path = model_path(recipe)
    processor = Emu35Processor.from_pretrained(path)
    # Apart from the model, it is neither trained nor sharded nor saved with each checkpoint. Loaded before anything is
    # known of other processes, it is whole in each of them.
    vision_tokenizer = load_vision_tokenizer(path)
    arguments = training_arguments(recipe, directory, device, progress)
    transformers.set_seed(recipe.seed)
    model = load_model(recipe, device)
    model.vision_tokenizer = None
    if vision_tokenizer is not None and arguments.device.type == "cuda":
        vision_tokenizer.to(arguments.device)
    if recipe.lora is not None:
        model = add_adapter(model, recipe.lora)
    first = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    trainer = SFTTrainer(recipe, arguments, model, vision_tokenizer, processor, first)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watcher(trainer, directory, first))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.export(export_dir)
    if recipe.push_to_hub and trainer.args.should_save:
        push(export_dir, recipe.push_to_hub)


def _check_recipe(recipe: SFTRecipe, directory: Path, checkpoint: Path | None):
    """A run goes on under the recipe it began with; what only tells it when to stop or to speak may change."""
    may_change = ("output_dir", "export_dir", "log_every", "save_every", "eval_every", "hardware", "push_to_hub")
    may_change += ("rows", "samples", "eval_data", "eval_examples")
    now = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in may_change}
    path = directory / "recipe.json"
    if checkpoint is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            raise ValueError(
                f"{directory} holds a run of another recipe: `{changed[0]}` was {before.get(changed[0])!r}, now "
                f"{now[changed[0]]!r}. Use another `output_dir`, or start anew with --restart."
            )
    if int(os.environ.get("RANK", 0)) == 0:
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _save_model(model, state: dict[str, torch.Tensor], vision_tokenizer, processor: Emu35Processor, directory: Path):
    """A whole checkpoint: the decoder in the dtype it came in, the vision tokenizer in float32."""
    stored = type(model.config).from_pretrained(model.config._name_or_path).dtype or torch.bfloat16
    state = {name: tensor.to(stored) for name, tensor in state.items()}
    if vision_tokenizer is not None:
        model.vision_tokenizer = vision_tokenizer
        state |= {f"vision_tokenizer.{name}": tensor.cpu() for name, tensor in vision_tokenizer.state_dict().items()}
    model.config.dtype = model.config.text_config.dtype = stored
    model.save_pretrained(directory, state_dict=state)
    processor.save_pretrained(directory)


def merge_adapter(adapter: str | os.PathLike, directory: str | os.PathLike, model: str | os.PathLike | None = None):
    """Writes a checkpoint with an adapter merged into the weights.

    Args:
        adapter (`str` or `os.PathLike`): folder of the adapter.
        directory (`str` or `os.PathLike`): gets model and processor.
        model (`str` or `os.PathLike`, *optional*): default: the one that the adapter names.
    """
    from peft import PeftConfig

    model = str(model or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    base = Emu35ForConditionalGeneration.from_pretrained(model, dtype="auto")
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(directory)
    Emu35Processor.from_pretrained(model).save_pretrained(directory)


def push(directory: str | os.PathLike, repository: str):
    """Uploads an export to the Hub, as a private repository if it is new."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(directory))
