"""`emu35 train RECIPE --dry-run`: what a run would do, and whether it would fit, without loading anything."""

import math
from pathlib import Path

from emu35.configuration_emu35 import Emu35Config

from .data import is_prepared
from .memory import count_adapter, count_parameters, estimate_memory, format_memory
from .recipe import checkpoint_path
from .sft_recipe import SFTRecipe, SourceRecipe


def plan(recipe: SFTRecipe) -> str:
    """The plan of a run, as text: data, model, steps, and the memory of one GPU, worked out.

    What is not there (data, a model) is said and not an error, so that a run can be planned anywhere.
    """
    config, where = find_config(recipe.model)
    recipe.check_context(config)
    numbers, text = count_parameters(config), config.text_config
    total, lora = numbers["layers"] + numbers["embeddings"], recipe.lora
    hardware = recipe.hardware
    trained = total if lora is None else count_adapter(text, lora.rank, lora.targets)
    kind = "all weights" if lora is None else f"a {'QLoRA' if lora.quantization else 'LoRA'} adapter"
    tokens = recipe.batch_rows * recipe.row_length
    lines = [
        f"model      {where}: {total / 1e9:.4g} B weights, {text.num_hidden_layers} layers, context "
        f"{text.max_position_embeddings:,}",
        f"trains     {kind}: {trained / 1e6:,.1f} M weights, {recipe.optimizer.name}, learning rate "
        f"{recipe.optimizer.learning_rate:g} ({recipe.optimizer.schedule})",
        *(f"data       {_describe(source, recipe)}" for source in recipe.data),
        *(f"evaluates  {_describe(source, recipe)}" for source in recipe.eval_data),
        f"steps      {recipe.steps:,}, each {recipe.batch_rows} rows of {recipe.row_length:,} = {tokens:,} tokens",
        f"in all     {recipe.steps * tokens / 1e6:,.1f} M tokens, about {_flops(recipe, total):.3g} floating point "
        "operations",
        f"processes  {hardware.gpus}, {recipe.accumulation(hardware.gpus)} passes of each a step"
        + ("" if hardware.sharding == "none" else f", weights sharded ({hardware.sharding})"),
    ]
    sources = (*recipe.data, *recipe.eval_data)
    encodes = not all(is_prepared(source.path) or not Path(source.path).exists() for source in sources)
    lines += ["", "memory of one GPU, worked out", ""]
    draws = bool(recipe.samples) and hardware.sharding == "none"  # one process cannot, with its share of the weights
    items = estimate_memory(recipe, config, encodes or draws)
    return "\n".join([*lines, format_memory(items, hardware.gpu_memory)])


def find_config(model: str) -> tuple[Emu35Config, str]:
    """The configuration of a recipe's model, or the released one's if it is not there, and what to call it."""
    path = checkpoint_path(model)
    if Path(path, "config.json").is_file():
        return Emu35Config.from_pretrained(path), model
    return Emu35Config(), f"{model} (not on this disk: sizes are the released model's)"


def _describe(recipe: SourceRecipe, whole: SFTRecipe) -> str:
    share = recipe.weight / math.fsum(source.weight for source in whole.data)
    text = f"{recipe.path}" + (f", {share:.0%} of the {whole.balance}" if recipe in whole.data else "")
    if is_prepared(recipe.path):
        return f"{text}, prepared"
    return text + (", images are encoded on the fly" if Path(recipe.path).exists() else ", NOT ON THIS DISK")


def _flops(recipe: SFTRecipe, weights: int) -> float:
    """2 a weight and token forwards, 2 for gradients of activations, 2 for those of weights, 2 more if recomputed."""
    each = 4 + 2 * (recipe.lora is None) + 2 * recipe.gradient_checkpointing
    return each * weights * recipe.steps * recipe.batch_rows * recipe.row_length
