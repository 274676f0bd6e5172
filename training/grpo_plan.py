"""`emu35 train RECIPE --dry-run` for `method: grpo`: what a run would do, and whether it would fit."""

import math
from pathlib import Path

from emu35.configuration_emu35 import Emu35Config, Emu35VisionTokenizerConfig
from emu35.generation_configuration_emu35 import Emu35GenerationConfig
from emu35.processing_emu35 import Emu35Processor
from emu35.prompts_emu35 import get_template

from .evaluate import _TEMPLATES
from .grpo_recipe import GRPORecipe
from .memory import MemoryItem, count_adapter, count_parameters, estimate_memory, format_memory
from .recipe import checkpoint_path
from .sft_plan import find_config
from .sft_recipe import SFTRecipe, SourceRecipe

PROMPT_TEXT = 100
"""Tokens of a prompt's text, with the sentence before it: some dozens, as a rule."""


def plan(recipe: GRPORecipe) -> str:
    """The plan of a run, as text: prompts, rewards, model, steps, and the memory of one GPU, worked out.

    What is not there (prompts, a model) is said and not an error, so that a run can be planned anywhere.

    Raises:
        TypeError, ValueError: if a reward does not exist, or numbers do not come out even.
    """
    config, where = find_config(recipe.model)
    numbers, text, hardware = count_parameters(config), config.text_config, recipe.hardware
    total, lora = numbers["layers"] + numbers["embeddings"], recipe.lora
    trained = total if lora is None else count_adapter(text, lora.rank, lora.targets)
    kind = "all weights" if lora is None else f"a {'QLoRA' if lora.quantization else 'LoRA'} adapter"
    names = [
        f"{component.name} (weight {component.weight:g}{_of(component.tasks)})"
        for component in (one.build() for one in recipe.rewards)
    ]
    lines = [
        f"model      {where}: {total / 1e9:.4g} B weights, {text.num_hidden_layers} layers, context "
        f"{text.max_position_embeddings:,}",
        f"trains     {kind}: {trained / 1e6:,.1f} M weights, learning rate {recipe.learning_rate:g} "
        f"({recipe.schedule})",
        f"prompts    {_prompts(recipe)}",
        f"rewards    {', '.join(names)}",
        f"steps      {recipe.steps:,}, each {recipe.rollouts_per_step} answers: {recipe.group_size} to each of "
        f"{recipe.prompts_per_step} prompts",
        f"processes  {hardware.gpus}, {recipe.accumulation(hardware.gpus)} passes of each a step",
        *(
            f"tokens     {task}: about {prompt:,} of a prompt, {answer:,} of an answer at most"
            for task, (prompt, answer) in lengths(recipe, config).items()
        ),
        "",
        "memory of one GPU, worked out; rewards with models of their own come on top",
        "",
    ]
    return "\n".join([*lines, format_memory(estimate_grpo_memory(recipe, config), hardware.gpu_memory)])


def _of(tasks: list[str] | None) -> str:
    return "" if tasks is None else f", of {', '.join(tasks)}"


def _prompts(recipe: GRPORecipe) -> str:
    if recipe.prompts.path is not None:
        return recipe.prompts.path + ("" if Path(recipe.prompts.path).exists() else ", NOT ON THIS DISK")
    total = sum(recipe.prompts.world.values())
    return "world of shapes: " + ", ".join(
        f"{task} {share / total:.0%}" for task, share in recipe.prompts.world.items()
    )


def lengths(recipe: GRPORecipe, config: Emu35Config) -> dict[str, tuple[int, int]]:
    """Task -> tokens of a prompt, about, and of an answer, at most.

    Tasks are those of the world's prompts or, of a file, which is not read, those that a reward or `rollout` names.
    """
    named = [task for one in recipe.rewards for task in one.tasks or ()]
    tasks = recipe.prompts.world or dict.fromkeys([*recipe.rollout.generate, *named]) or ("t2i",)
    path, areas = checkpoint_path(recipe.model), None
    stored = Emu35GenerationConfig.released()
    if Path(path, "processor_config.json").is_file():
        areas = Emu35Processor.from_pretrained(path).image_area
    if Path(path, "generation_config.json").is_file():
        stored = Emu35GenerationConfig.from_pretrained(path)
    factor = (config.vision_tokenizer_config or Emu35VisionTokenizerConfig()).downsampling_factor

    def image(area: int) -> int:
        side = max(1, round(math.sqrt(area) / factor))
        return config.token_layout.num_image_tokens(side, side)

    found = {}
    for task in dict.fromkeys(_TEMPLATES.get(task, task) for task in tasks):
        settings, template = recipe.rollout.config(stored, task), get_template(task)
        own = areas.get(task) if isinstance(areas, dict) else areas
        prompt = PROMPT_TEXT + (image(own or template.image_area) if template.min_images else 0)
        room = max(1, config.text_config.max_position_embeddings - prompt)
        if settings.generation_mode == "image":
            sized = settings.height and settings.width
            answer = image(settings.height * settings.width if sized else own or settings.image_area)
        else:
            answer = settings.max_new_tokens or room
        found[task] = prompt, min(answer, room)
    return found


def estimate_grpo_memory(recipe: GRPORecipe, config: Emu35Config) -> list[MemoryItem]:
    """The items of one GPU: those of a training on rows of the longest answers, and what answers are drawn with."""
    pairs, rows, group = lengths(recipe, config).values(), recipe.micro_batch, recipe.group_size
    longest = max(map(sum, pairs))
    # A pass computes a prompt once for those of its answers that it has.
    prompts = max(1, rows // group) if rows % group == 0 or group % rows == 0 else min(rows, (rows - 1) // group + 2)
    training = SFTRecipe(
        output_dir=recipe.output_dir,
        data=[SourceRecipe("prompts")],
        steps=recipe.steps,
        row_length=max(prompts * prompt + rows * answer for prompt, answer in pairs),
        batch_rows=1,
        rows=1,
        lora=recipe.lora,
        hardware=recipe.hardware,
        gradient_checkpointing=recipe.gradient_checkpointing,
        dtype=recipe.dtype,
        bf16=recipe.bf16,
    )
    items = estimate_memory(training, config, uses_vision=True)
    text, numbers = config.text_config, count_parameters(config)
    if recipe.reference is not None:
        weights = numbers["layers"] + numbers["embeddings"]
        items.append(MemoryItem("reference", 4 * weights, f"{weights:.4g} x 4 bytes"))
    answers = min(recipe.rollout.batch_size, recipe.rollouts_per_step // recipe.hardware.gpus)
    size = 2 if recipe.bf16 or recipe.dtype == "bfloat16" else 4
    values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    formula = f"{answers} answers x {longest} tokens x {values} x {size} bytes (while they are drawn)"
    items.append(MemoryItem("cache", size * values * longest * answers, formula))
    seen = 2 * text.num_attention_heads * text.head_dim  # of all heads, those that share keys too
    formula = f"{rows} answers x {longest} tokens x {seen} x {size} bytes (keys and values of one layer)"
    items.append(MemoryItem("what answers see", size * seen * longest * rows, formula))
    return items
