"""`emu35 train RECIPE.yaml`: all stages of a recipe, from nothing to a checkpoint.

    visual vocabulary ──► single-modality pre-training ──► alignment ──► instruction tuning ──► export
    (vision_tokenizer)    └────────────── language_model, one run ──────────────────────┘

    emu35 train training/recipes/tiny.yaml      # about four hours on 2 CPU cores
    emu35 train training/recipes/tiny-dida.yaml # parallel image decoding for a trained model, see `dida`
    emu35 train training/recipes/tiny-lora.yaml # fine-tuning of a trained model on data of yours, see `sft`
    emu35 train training/recipes/tiny-grpo.yaml # a trained model improves against rewards, see `grpo`

Interrupt it whenever you like, even with `kill -9`; the same command goes on where it was.
"""

import dataclasses
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from emu35.devices_emu35 import multiplies_bfloat16
from emu35.image_processing_emu35 import Emu35ImageProcessor
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from emu35.saving_emu35 import check_output_directory
from emu35.tokenization_emu35 import token_layout_from_tokenizer, train_small_tokenizer

from .dida_recipe import DiDARecipe
from .export import export
from .grpo_recipe import GRPORecipe
from .recipe import Recipe, checkpoint_path, load_recipe
from .sequences import sample_texts
from .sft_recipe import SFTRecipe
from .shapes import IMAGE_SIZE
from .train_language_model import train_language_model
from .train_vision_tokenizer import train_vision_tokenizer

logger = logging.getLogger(__name__)


def train(
    recipe_path: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    export_dir: str | os.PathLike | None = None,
    resume: bool = True,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Run a recipe, or what is left of it.

    Args:
        recipe_path (`str` or `os.PathLike`): a YAML file, see [`Recipe`].
        output_dir, export_dir (`str` or `os.PathLike`, *optional*): instead of the recipe's.
        resume (`bool`): `False`: start from nothing, whatever `output_dir` holds.
        device (`str`): "cpu" or "cuda".
        progress (`bool`): show progress bars.
    Returns:
        `Path`: the folder of the finished model.
    Raises:
        FileNotFoundError, ValueError: if the recipe is missing or wrong, or `output_dir` holds a run of another one.
    """
    recipe = _for_this_machine(load_recipe(recipe_path), device)
    output_dir = Path(output_dir or recipe.output_dir)
    export_dir = Path(export_dir or recipe.export_dir or output_dir / "export")
    vision_tokenizer_dir, processor_dir = output_dir / "vision_tokenizer", output_dir / "processor"
    language_model_dir, dida_dir = output_dir / "language_model", output_dir / "dida"
    sft_dir, grpo_dir = output_dir / "sft", output_dir / "grpo"
    if not resume and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "several processes cannot start anew together: each would delete what another has begun. Delete "
            f"{output_dir} yourself, and leave --restart out."
        )
    if not resume:
        for directory in (vision_tokenizer_dir, processor_dir, language_model_dir, dida_dir, sft_dir, grpo_dir):
            shutil.rmtree(directory, ignore_errors=True)
    check_output_directory(export_dir, overwrite=True, name="export_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(recipe, DiDARecipe):
        from .dida import train_dida  # needs PEFT

        train_dida(recipe, dida_dir, export_dir, device, progress)
        logger.info("the adapter or the adapted model is in %s", export_dir)
        return export_dir
    if isinstance(recipe, SFTRecipe):
        from .sft import train_sft

        train_sft(recipe, sft_dir, export_dir, device, progress)
        return export_dir
    if isinstance(recipe, GRPORecipe):
        if find_spec("trl") is None:
            raise ValueError("`method: grpo` needs TRL, which is not installed: pip install 'emu35[train]'")
        from .grpo import train_grpo

        train_grpo(recipe, grpo_dir, export_dir, device=device, progress=progress)
        logger.info("the adapter or the improved model is in %s", export_dir)
        return export_dir
    logger.info("stage 1: visual vocabulary")
    if isinstance(recipe.vision_tokenizer, str):
        vision_tokenizer = Emu35VisionTokenizer.from_pretrained(checkpoint_path(recipe.vision_tokenizer))
        vision_tokenizer.save_pretrained(vision_tokenizer_dir)
    else:
        vision_tokenizer = train_vision_tokenizer(recipe.vision_tokenizer, vision_tokenizer_dir, device, progress)
    processor = build_processor(recipe, vision_tokenizer)
    processor.save_pretrained(processor_dir)
    logger.info("stages 2 to 4: language model")
    model = train_language_model(
        recipe, language_model_dir, vision_tokenizer_dir, processor_dir, device=device, progress=progress
    )
    export(model, processor, export_dir, recipe.generation)
    logger.info("the model is in %s", export_dir)
    return export_dir


def _for_this_machine(recipe, device: str):
    """The recipe without autocast to bfloat16 where that is slower than float32."""
    if not recipe.bf16 or multiplies_bfloat16(device):
        return recipe
    logger.warning("`bf16`: this CPU has no arithmetic for bfloat16, which would be slower. Training is in float32.")
    recipe = dataclasses.replace(recipe, bf16=False)
    vision_tokenizer = getattr(recipe, "vision_tokenizer", None)
    if dataclasses.is_dataclass(vision_tokenizer):
        recipe.vision_tokenizer = dataclasses.replace(vision_tokenizer, bf16=False)
    return recipe


def plan(recipe_path: str | os.PathLike) -> str:
    """What [`train`] would do, and the memory it would take, as text.  Nothing is loaded.

    Raises:
        ValueError: if the recipe is wrong, or of a method that has no such plan.
    """
    recipe = load_recipe(recipe_path)
    if isinstance(recipe, GRPORecipe):
        from . import grpo_plan

        return grpo_plan.plan(recipe)
    if not isinstance(recipe, SFTRecipe):
        raise ValueError("--dry-run is for recipes with `method: sft` or `method: grpo`.")
    from . import sft_plan

    return sft_plan.plan(recipe)


def build_processor(recipe: Recipe, vision_tokenizer: Emu35VisionTokenizer) -> Emu35Processor:
    """The processor of a recipe: a text vocabulary for the world of shapes, and images of its size."""
    tokenizer = train_small_tokenizer(
        sample_texts(4000, recipe.seed),
        recipe.text_vocabulary,
        model_max_length=recipe.model["max_position_embeddings"],
    )
    layout = token_layout_from_tokenizer(tokenizer, vision_tokenizer.config.codebook_size, size_digits=(1, 1))
    factor = vision_tokenizer.config.downsampling_factor
    image_processor = Emu35ImageProcessor(factor=factor, image_area=IMAGE_SIZE**2)
    return Emu35Processor(image_processor, tokenizer, layout, image_area=IMAGE_SIZE**2)
