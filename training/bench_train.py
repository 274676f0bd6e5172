"""`emu35 bench train`: steps of fine-tuning beside plain ones, in tokens per second and memory.

    way            rows                          loss
    emu35          packed                        in chunks (`compute_loss`)
    plain loss     packed                        cross-entropy over whole logits
    unpacked       one example each, padded      in chunks
    plain          one example each, padded      cross-entropy over whole logits

Each way trains a LoRA adapter on the same kind of data, examples of mixed lengths, in a process of its own. Tokens are
those of examples, not padding.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from emu35 import TINY
from emu35.bench_emu35 import Part
from emu35.bench_memory_emu35 import Memory, build_model, free_bytes, in_own_process, timed
from emu35.configuration_emu35 import Emu35Config, Emu35TextConfig, Emu35TokenLayout
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from torch import nn
from torch.nn import functional as F

from .data import Collator, Example, PackedRows, Source
from .data.examples import IGNORED
from .lora import add_adapter
from .sft_recipe import SFTLoRARecipe

#: name: whether rows are packed, whether the loss is the model's own.
WAYS = {"emu35": (True, True), "plain loss": (True, False), "unpacked": (False, True), "plain": (False, False)}
PROMPT_TOKENS = 16
SHORTEST = 32
"""Lengths of examples are log-uniform between this and a row's."""
_RANK = 32


@dataclass(frozen=True)
class BenchModel:
    """A model and its batches.

    Args:
        decoder (`dict`, *optional*): of random weights with the released vocabulary; `None`: the tiny model.
        rows (`int`), row_length (`int`): of a batch.
        batches (`int`): packed ones that are timed; unpacked ones follow until they have as many tokens.
        gradient_checkpointing (`bool`): as the recipes of such a model.
    """

    decoder: dict[str, int] | None
    rows: int
    row_length: int
    batches: int
    gradient_checkpointing: bool

    def load(self, device: str, dtype: torch.dtype, seed: int) -> Emu35ForConditionalGeneration:
        if self.decoder is not None:
            return build_model(self.decoder, device, dtype, seed)
        model = Emu35ForConditionalGeneration.from_pretrained(TINY, dtype=dtype).to(device)
        model.detach_vision_tokenizer()
        return model


MODELS = {
    "emu35-tiny": BenchModel(None, rows=8, row_length=512, batches=6, gradient_checkpointing=False),
    # The released model's depth, and its proportions at a twentieth of the width.
    "random": BenchModel(
        {
            "hidden_size": 256,
            "intermediate_size": 1280,
            "num_hidden_layers": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
        },
        rows=8,
        row_length=256,
        batches=2,
        gradient_checkpointing=True,
    ),
}


def mixed_batches(
    bench: BenchModel, layout: Emu35TokenLayout, seed: int, num_batches: int, is_packed: bool
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(tokens, batch), until there are about as many tokens as `num_batches` have room for.

    Examples are a prompt and visual tokens as its answer, at random.
    """
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(bench.row_length + 1), size=1000)).astype(int)

    def write(length: int) -> Example:
        draw = np.random.default_rng((seed, length))
        prompt = draw.integers(0, 256, PROMPT_TOKENS)
        answer = draw.integers(layout.visual_token_offset, layout.visual_token_end, length - PROMPT_TOKENS)
        return Example(np.concatenate([prompt, answer]).astype(np.int32), np.arange(length) >= PROMPT_TOKENS, "t2i")

    source = Source("mixed", lengths.tolist(), write)
    rows = iter(PackedRows([source], None, bench.row_length, bench.rows, seed, packing=is_packed))
    collate, room = Collator(pad_id=0), bench.rows * bench.row_length
    missing = num_batches * room
    while missing > room / 8:  # packed rows are not quite full
        batch = list(itertools.islice(rows, bench.rows))
        tokens = sum(len(row["input_ids"]) for row in batch)
        missing -= tokens
        yield tokens, collate(batch)


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor], is_lean: bool) -> torch.Tensor:
    """The loss by the model's own code, or the plain way: whole logits and their cross-entropy."""
    if is_lean:
        return model(**inputs, use_cache=False).loss
    labels = inputs["labels"][:, 1:].flatten()
    given = {name: inputs[name] for name in ("input_ids", "position_ids")}
    logits = model(**given, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    layout = model.config.token_layout
    visual = (labels >= layout.visual_token_offset) & (labels < layout.visual_token_end)
    weights = torch.where(visual, float(model.config.visual_loss_weight), 1.0) * (labels != IGNORED)
    return (losses * weights).sum() / weights.sum()


def bench_train(quick: bool, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """All ways with all models.  `quick`: one packed batch of each."""
    models = []
    for name, bench in MODELS.items():
        arguments = (device, str(dtype).removeprefix("torch."), seed, 1 if quick else bench.batches)
        ways = []
        for way, (_, is_lean) in WAYS.items():
            reason = None if is_lean else _too_little_memory(bench, device)
            if reason is None:
                ways.append({"name": way, **in_own_process(name, way, *arguments, module=__name__)})
            else:
                ways.append({"name": way, "skipped": reason})
        ours, plain_loss, unpacked, plain = ways
        model = {"name": name, "rows": bench.rows, "row_length": bench.row_length, "ways": ways}
        model["packing_speedup"] = ours["tokens_per_second"] / unpacked["tokens_per_second"]
        if "skipped" not in plain_loss:
            model["speedup_over_plain"] = ours["tokens_per_second"] / plain["tokens_per_second"]
            model["loss_memory_ratio"] = ours["extra_bytes"] / plain_loss["extra_bytes"]
        models.append(model)
    return {"shortest": SHORTEST, "rank": _RANK, "models": models}


def _too_little_memory(bench: BenchModel, device: str) -> str | None:
    """Why whole logits cannot be measured: they, their float32 copy or log-softmax, and their gradient."""
    free = free_bytes(device)
    vocab_size = (Emu35TextConfig if bench.decoder else Emu35Config.from_pretrained(TINY).text_config).vocab_size
    needed = 3.2 * bench.rows * bench.row_length * vocab_size * 4 + 2e9
    if free is None or free >= needed:
        return None
    return f"it needs {needed / 2**30:.1f} GiB of free memory, and there are {free / 2**30:.1f}"


def measure_training(name: str, way: str, device: str, dtype: str, seed: int, num_batches: int) -> dict[str, Any]:
    """One way with one model, in a process of its own.  Steps have AdamW, but no clipping and no schedule."""
    bench, (is_packed, is_lean) = MODELS[name], WAYS[way]
    model = bench.load(device, getattr(torch, dtype), seed)
    layout = model.config.token_layout
    torch.manual_seed(seed)  # of the adapter and of dropout
    # Not flash attention: its rows are joined without padding, so that nothing would be unpacked.
    model.set_attn_implementation("sdpa" if torch.device(device).type == "cpu" else "flex_attention")
    adapted = add_adapter(model, SFTLoRARecipe(rank=_RANK)).train()
    if bench.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-4)
    numbers, batches = zip(*mixed_batches(bench, layout, seed, num_batches, is_packed), strict=True)
    losses: list[float] = []

    def step(batch: dict[str, torch.Tensor]):
        inputs = {key: values.to(device) for key, values in batch.items()}
        loss = loss_of(adapted, inputs, is_lean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    step({key: values[:1, : 2 * SHORTEST] for key, values in batches[0].items()})  # libraries set themselves up
    memory = Memory(device)
    seconds = min(timed(lambda: [step(batch) for batch in batches], device) for _ in range(2))
    tokens = sum(numbers)
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "vocabulary": model.config.text_config.vocab_size,
        "batches": len(batches),
        "tokens": tokens,
        "padding": sum(batch["input_ids"].numel() for batch in batches) - tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "extra_bytes": memory.extra_bytes(),
        "peak_bytes": memory.peak_bytes(),
        "first_loss": losses[1],
    }


def train_tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    tables = []
    for model in results["models"]:
        first, rows = model["ways"][0], []
        for way in model["ways"]:
            if "skipped" in way:
                numbers = [way["skipped"], "", "", ""]
            else:
                memory = (f"{way[name] / 2**30:.2f}" for name in ("extra_bytes", "peak_bytes"))
                padding = f"{way['padding'] / (way['padding'] + way['tokens']):.0%}"
                numbers = [f"{way['tokens_per_second']:.0f}", padding, *memory]
            rows.append([way["name"], *numbers])
        title = (
            f"{model['name']}, {first['parameters'] / 1e6:,.0f} M weights, {first['vocabulary']:,} ids: LoRA, "
            f"{model['rows']} rows of {model['row_length']}, examples of {results['shortest']} to "
            f"{model['row_length']} tokens\npacked rows: {model['packing_speedup']:.2f} times the tokens per second"
        )
        if "loss_memory_ratio" in model:
            title += (
                f"; loss in chunks: {model['loss_memory_ratio']:.2f} times the extra memory; both: "
                f"{model['speedup_over_plain']:.2f} times the tokens per second"
            )
        tables.append((f"{title}\n", ["way", "tokens/s", "padding", "extra GiB", "peak GiB"], rows))
    return tables


def train_targets(results: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """Name, target, measured value, whether it is reached."""
    speedups = {model["name"]: model["packing_speedup"] for model in results["models"]}
    return [(f"train: speed-up by packing, {name}", ">= 1.5", by, by >= 1.5) for name, by in speedups.items()]


PART = Part(bench_train, train_tables, train_targets)

if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_training(*json.loads(sys.argv[1]))) + "\n")
