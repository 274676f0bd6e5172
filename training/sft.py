"""Supervised fine-tuning on data of users: full, LoRA or QLoRA, over transformers' Trainer.

    emu35 train training/recipes/tiny-lora.yaml
    emu35 train training/recipes/lora-34b.yaml --dry-run
    accelerate launch --config_file training/recipes/accelerate/fsdp2.yaml -m emu35.cli train \
        training/recipes/full-34b.yaml --device cuda

The Trainer and not TRL's `SFTTrainer`, which brings a loss of its own in place of the model's, does not know
`visual_loss_weight`, and whose packing and data preparation ours would only have to switch off.
"""

import dataclasses
import json
import os
from pathlib import Path

import torch
import transformers
from emu35.configuration_emu35 import Emu35Config
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from peft import PeftConfig, PeftModel
from transformers import PrinterCallback

from .data import PreparedRows
from .lora import add_adapter, load_base
from .recipe import checkpoint_path
from .sft_recipe import SFTRecipe
from .sft_trainer import SFTTrainer, Watcher, find_attention, open_source, training_arguments


def load_model(recipe: SFTRecipe, device: str = "cpu") -> Emu35ForConditionalGeneration:
    """The model to be trained, quantised if the recipe says so; with an adapter: [`add_adapter`]."""
    dtype = torch.float32 if recipe.lora is None else getattr(torch, recipe.dtype)
    compute_dtype = torch.bfloat16 if recipe.bf16 else dtype
    model = load_base(checkpoint_path(recipe.model), recipe.lora, dtype, device, compute_dtype)
    model.set_attn_implementation(find_attention(recipe.attn_implementation, device))
    if recipe.visual_loss_weight is not None:
        model.config.visual_loss_weight = recipe.visual_loss_weight
    return model


def load_vision_tokenizer(path: str | os.PathLike) -> Emu35VisionTokenizer | None:
    """That of a checkpoint, frozen; `None` if it has none."""
    if Emu35Config.from_pretrained(path).vision_tokenizer_config is None:
        return None
    return Emu35VisionTokenizer.from_pretrained(path).requires_grad_(False).eval()


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
    _check_launch(recipe)
    path = checkpoint_path(recipe.model)
    config = Emu35Config.from_pretrained(path)
    recipe.check_context(config)
    if recipe.samples and config.vision_tokenizer_config is None:
        raise ValueError(f"`samples`: {path} has no vision tokenizer to draw them with. Leave them out.")
    if recipe.push_to_hub:
        make_repository(recipe.push_to_hub)  # says now if the name or the token is wrong
    processor = Emu35Processor.from_pretrained(path)
    # Apart from the model, it is neither trained nor sharded nor saved with each checkpoint. Loaded before anything is
    # known of other processes, it is whole in each of them.
    vision_tokenizer = load_vision_tokenizer(path)
    arguments = training_arguments(recipe, directory, device, progress)
    # What is wrong with the data is told before minutes go into loading the model.
    sources, eval_sources = (
        [open_source(source, processor, vision_tokenizer, recipe.row_length) for source in some]
        for some in (recipe.data, recipe.eval_data)
    )
    transformers.set_seed(recipe.seed)
    model = load_model(recipe, device)
    model.detach_vision_tokenizer()
    encodes = not all(isinstance(source.rows, PreparedRows) for source in (*sources, *eval_sources))
    if vision_tokenizer is not None and (encodes or recipe.samples):
        vision_tokenizer.to(arguments.device)
    if recipe.lora is not None:
        model = add_adapter(model, recipe.lora)
    first = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    trainer = SFTTrainer(recipe, arguments, model, vision_tokenizer, processor, sources, eval_sources, first)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watcher(trainer, directory, first))
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
    elif int(os.environ.get("RANK", 0)) == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _check_launch(recipe: SFTRecipe):
    """Raises a ValueError if `accelerate launch` was told what does not go with the recipe."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" or (precision == "bf16" and not recipe.bf16):
        raise ValueError(
            f"accelerate was started with mixed precision {precision}, and the recipe says `bf16: "
            f"{str(recipe.bf16).lower()}`. Start it with --mixed_precision {'bf16' if recipe.bf16 else 'no'}."
        )
    for name, sharding in (("ACCELERATE_USE_FSDP", "fsdp2"), ("ACCELERATE_USE_DEEPSPEED", "zero3")):
        if os.environ.get(name) == "true":  # the recipe itself refuses what does not go with that sharding
            dataclasses.replace(recipe, hardware=dataclasses.replace(recipe.hardware, sharding=sharding))


def merge_adapter(adapter: str | os.PathLike, directory: str | os.PathLike, model: str | os.PathLike | None = None):
    """Writes a checkpoint with an adapter merged into the weights.

    Args:
        adapter (`str` or `os.PathLike`): folder of the adapter.
        directory (`str` or `os.PathLike`): gets model and processor.
        model (`str` or `os.PathLike`, *optional*): a checkpoint, or "tiny"; default: the one that the adapter names.
    """
    model = checkpoint_path(str(model or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path))
    base = Emu35ForConditionalGeneration.from_pretrained(model, dtype="auto")
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(directory)
    Emu35Processor.from_pretrained(model).save_pretrained(directory)


def make_repository(name: str):
    """Makes a private repository on the Hub, if there is none of that name.

    Raises:
        ValueError: if that cannot be: the name is bad, there is no token or it may not write, or the Hub is not there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ValueError(f"`push_to_hub`: {name!r} cannot be written: {error} Log in with `hf auth login`.") from error


def push(directory: str | os.PathLike, repository: str):
    """Uploads an export to the Hub, as a private repository if it is new."""
    from huggingface_hub import HfApi

    make_repository(repository)
    HfApi().upload_folder(repo_id=repository, folder_path=str(directory))
