"""Memory of one GPU in fine-tuning, worked out from sizes alone: nothing is loaded.

Bytes are those of a weight, a gradient and so on times their number; activations are counted matrix by matrix for one
decoder layer. What an allocator wastes between blocks is not in it, nor is CUDA's own memory: keep 7 % free.
"""

from dataclasses import dataclass

import torch
from emu35.configuration_emu35 import Emu35Config, Emu35TextConfig
from emu35.modeling_emu35 import LOSS_CHUNK_BYTES
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

from .sft_recipe import SFTRecipe

_BYTES = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, and a scale for 64 of them in 8 bits, whose own scales are shared by 256 of those."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0}
"""Of a weight that is trained; a paged one lies in main memory when there is no room for it."""
VISION_BYTES_PER_VALUE = 20
"""While images are encoded or decoded, of a pixel's channel at full size: 5 GiB for 2**20 pixels of 256 channels
(measured for the released vision tokenizer)."""


@dataclass(frozen=True)
class MemoryItem:
    """One line of an estimate: `bytes` of one GPU, and how they come about."""

    name: str
    bytes: float
    formula: str


def count_parameters(config: Emu35Config) -> dict[str, int]:
    """Weights by part: `layers`, `linear` (the matrices among them), `embeddings` (in and out), `vision`."""
    text, vision = config.text_config, 0
    linear = text.num_hidden_layers * sum(inputs * outputs for inputs, outputs in _matrices(text).values())
    norms = text.num_hidden_layers * 2 * (text.hidden_size + text.head_dim) + text.hidden_size
    if config.vision_tokenizer_config is not None:
        with torch.device("meta"):
            tokenizer = Emu35VisionTokenizer(config.vision_tokenizer_config)
        vision = sum(parameter.numel() for parameter in tokenizer.parameters())
    embeddings = 2 * text.vocab_size * text.hidden_size
    return {"layers": linear + norms, "linear": linear, "embeddings": embeddings, "vision": vision}


def count_adapter(config: Emu35TextConfig, rank: int, targets: list[str]) -> int:
    """Weights of a LoRA adapter: `rank * (inputs + outputs)` a matrix."""
    shapes = _matrices(config)
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in targets)


def _matrices(config: Emu35TextConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def layer_activation_bytes(config: Emu35TextConfig, recipe: SFTRecipe) -> int:
    """What one layer keeps of one token for its backward pass.

    The inputs of all matrices, norms and products, in the dtype of autocast; norms and residuals that are float32
    (a trained model's), and the float32 copy that an adapter takes of each input.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    values = config.num_key_value_heads * config.head_dim
    low = 2 if recipe.bf16 else _BYTES[recipe.dtype if recipe.lora else "float32"]
    residual = low if recipe.lora is not None and recipe.dtype == "bfloat16" else 4
    attention = hidden + 3 * heads + values + 2 * config.num_attention_heads * config.head_dim
    kept = low * (attention + hidden + 4 * inner) + residual * 4 * hidden
    if recipe.lora is not None:
        kept += sum((4 + low) * _matrices(config)[name][0] + low * recipe.lora.rank for name in recipe.lora.targets)
    return kept


def estimate_memory(recipe: SFTRecipe, config: Emu35Config, uses_vision: bool = False) -> list[MemoryItem]:
    """The items of one GPU at the worst moment of a step.

    Args:
        config ([`Emu35Config`]): of the model.
        uses_vision (`bool`): whether data is not prepared or samples are drawn, so that the vision tokenizer is there.
    """
    text, numbers, lora = config.text_config, count_parameters(config), recipe.lora
    layers, embeddings, num_layers = numbers["layers"], numbers["embeddings"], text.num_hidden_layers
    gpus, sharding = recipe.hardware.gpus, recipe.hardware.sharding
    parts = 1 if sharding == "none" else gpus
    share = "" if parts == 1 else f" / {gpus} GPUs"
    tokens = recipe.rows * recipe.row_length
    items: list[MemoryItem] = []

    def add(name: str, number_of_bytes: float, formula: str):
        items.append(MemoryItem(name, number_of_bytes, formula))

    def add_trained(number: int):
        add("gradients", 4 * number / parts, f"{number:.4g} x 4 bytes{share}")
        size = OPTIMIZER_BYTES[recipe.optimizer.name]
        if sharding == "zero3":
            add("optimiser", 0, f"{number:.4g} x {size:.3g} bytes{share}, in main memory")
        else:
            add(
                "optimiser", size * number / parts, f"{number:.4g} x {size:.3g} bytes ({recipe.optimizer.name}){share}"
            )

    if lora is None:
        number = layers + embeddings
        in_main_memory = sharding == "zero3"
        size = 2 if in_main_memory else 4  # ZeRO's float32 weights lie beside the optimiser's state
        add("weights", size * number / parts, f"{number:.4g} x {size} bytes{share}")
        if not in_main_memory and recipe.bf16 and sharding == "none":
            add("bfloat16 copies", 2 * number, f"{number:.4g} x 2 bytes (autocast keeps them for the backward pass)")
        if sharding == "zero3":
            add("gradients", 2 * number / parts, f"{number:.4g} x 2 bytes{share}")
            add("optimiser", 0, f"{number:.4g} x 12 bytes{share}, in main memory")
        else:
            add_trained(number)
    else:
        size = _BYTES[recipe.dtype]
        linear = numbers["linear"] if lora.quantization else 0
        if linear:
            add("frozen weights, nf4", NF4_BYTES * linear / parts, f"{linear:.4g} x {NF4_BYTES:.3f} bytes{share}")
        rest = layers + embeddings - linear
        add("frozen weights", size * rest / parts, f"{rest:.4g} x {size} bytes ({recipe.dtype}){share}")
        if linear:
            largest = max(a * b for a, b in _matrices(text).values())
            add("one matrix unpacked", 2 * largest, f"{largest:.4g} x 2 bytes")
        number = count_adapter(text, lora.rank, lora.targets)
        add("adapter", 4 * number / parts, f"{number:.4g} x 4 bytes{share}")
        add_trained(number)
    if parts > 1:
        gathered = 2 * layers // num_layers
        gradient = 1 if lora is not None else 2
        add("gathered", 2 * gathered + 2 * gradient * embeddings, "2 layers and the embeddings x 2 bytes, whole")
    one_layer = layer_activation_bytes(text, recipe) * tokens
    if recipe.gradient_checkpointing:
        residual = 2 if lora is not None and recipe.dtype == "bfloat16" else 4
        kept = num_layers * text.hidden_size * residual * tokens
        formula = f"{num_layers} x {text.hidden_size} x {residual} bytes x {tokens} tokens"
        add("inputs of layers", kept, formula)
        add("one layer again", one_layer, f"{one_layer // tokens} bytes x {tokens} tokens")
    else:
        add("activations", num_layers * one_layer, f"{num_layers} x {one_layer // tokens} bytes x {tokens} tokens")
    chunk = min(LOSS_CHUNK_BYTES, 4 * text.vocab_size * tokens)
    add("logits", 4 * chunk, f"4 x {chunk / 2**20:.0f} MiB (a chunk, twice in float32, its gradients)")
    if uses_vision and config.vision_tokenizer_config is not None:
        area = max([source.image_area or 2**20 for source in (*recipe.data, *recipe.eval_data)])
        working = VISION_BYTES_PER_VALUE * config.vision_tokenizer_config.base_channels * area
        formula = f"{numbers['vision']:.3g} x 4 bytes, and while it works on {area} pixels"
        add("vision tokenizer", 4 * numbers["vision"] + working, formula)
    return items


def format_memory(items: list[MemoryItem], gpu_memory: int) -> str:
    """A table, its sum, and whether that fits with 7 % to spare.

    Args:
        gpu_memory (`int`): GiB of one GPU.
    """
    width = max(len(item.name) for item in items)
    lines = [f"  {item.name:<{width}}  {item.bytes / 2**30:7.2f} GiB  {item.formula}" for item in items]
    total = sum(item.bytes for item in items) / 2**30
    verdict = "fits" if total < 0.93 * gpu_memory else "DOES NOT FIT"
    lines.append(f"  {'sum':<{width}}  {total:7.2f} GiB  {verdict} into {gpu_memory} GiB")
    return "\n".join(lines)
