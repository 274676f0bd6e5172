"""A trained model as the folder that users load: bfloat16 decoder, float32 vision tokenizer, processor, settings."""

import os
from pathlib import Path
from typing import Any

import torch
from emu35.generation_configuration_emu35 import RELEASED_TASK_DEFAULTS, Emu35GenerationConfig
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor

from .shapes import IMAGE_SIZE


def export(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    directory: str | os.PathLike,
    generation: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
):
    """Write `config.json`, `model.safetensors`, `generation_config.json` and the processor's files.

    Args:
        model ([`Emu35ForConditionalGeneration`]): with its vision tokenizer. Its decoder is converted in place.
        processor ([`Emu35Processor`]): that belongs to it.
        directory (`str` or `os.PathLike`): other files in it (a model card) stay.
        generation (`dict`, *optional*):
            fields of [`Emu35GenerationConfig`]; by default images have the world's size, and each task has the mode
            that it has in the release.
        dtype (`torch.dtype`): of the decoder and the output head. The vision tokenizer stays in float32.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.model.to(dtype)
    model.lm_head.to(dtype)
    model.config.dtype = model.config.text_config.dtype = dtype
    layout = processor.token_layout
    settings = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "image_area": IMAGE_SIZE**2} | (generation or {})
    own = settings.get("task_defaults") or {}
    settings["task_defaults"] = {
        task: {"generation_mode": released["generation_mode"], **own.get(task, {})}
        for task, released in RELEASED_TASK_DEFAULTS.items()
    }
    model.generation_config = Emu35GenerationConfig(
        pad_token_id=layout.pad_token_id,
        bos_token_id=layout.bos_token_id,
        eos_token_id=layout.eos_token_id,
        **settings,
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
