"""LoRA and QLoRA, for all trainings: weights that stay as they are, quantised or not, and the adapter above them."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from .sft_recipe import SFTLoRARecipe


def load_base(
    path: str | os.PathLike,
    lora: SFTLoRARecipe | None,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> Emu35ForConditionalGeneration:
    """A model to be trained, whose matrices are quantised if `lora` says so.

    Args:
        path (`str` or `os.PathLike`): checkpoint.
        lora ([`SFTLoRARecipe`], *optional*): of the adapter to come, see [`add_adapter`].
        dtype (`torch.dtype`): of what is not quantised.
        device (`str` or `torch.device`): where quantised weights go: each process has its GPU.
        compute_dtype (`torch.dtype`, *optional*): of products with quantised weights; default: `dtype`.
    Raises:
        ValueError: if it is to be quantised and bitsandbytes is missing.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if lora is not None and lora.quantization is not None:
        if find_spec("bitsandbytes") is None:
            raise ValueError("`lora.quantization` needs bitsandbytes: pip install 'emu35[train]'")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=lora.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype or dtype,
            llm_int8_skip_modules=["lm_head", "vision_tokenizer"],
        )
        on_gpu = torch.device(device).type == "cuda"
        options["device_map"] = {"": f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else str(device)}
    model = Emu35ForConditionalGeneration.from_pretrained(path, **options)
    for module in model.modules():
        # On a CPU, bitsandbytes packs weights for inference in a forward pass of `eval` and leaves them so; training
        # would then go on through an operation that has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def lora_config(lora: SFTLoRARecipe) -> LoraConfig:
    """What PEFT is told."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(lora.targets)})",
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(model: Emu35ForConditionalGeneration, lora: SFTLoRARecipe) -> PeftModel:
    """Puts a fresh adapter, in float32, into a model's decoder, which is frozen."""
    adapted = get_peft_model(model, lora_config(lora))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def save_adapter(
    adapted: PeftModel, lora: SFTLoRARecipe, directory: str | os.PathLike, state: dict[str, torch.Tensor] | None = None
):
    """Writes the finished adapter, with the recipe's `export_alpha`.

    Args:
        state (`dict`, *optional*): of the model; default: its own.
    """
    config = adapted.peft_config[adapted.active_adapter]
    trained, config.lora_alpha = config.lora_alpha, lora.export_alpha or lora.alpha
    try:
        adapted.save_pretrained(directory, state_dict=state)
    finally:
        config.lora_alpha = trained
