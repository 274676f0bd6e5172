"""Speed and memory against the straightforward way, which is written out here: what `emu35 bench` runs.

    image   image tokens per second with guidance, by batch size, on random weights with the real vocabulary
    vision  quantisation of 64 x 64 codes against softmax + one-hot: time, memory, same codes
    loss    memory of the loss of 4,096 tokens over 282,926 logits each, forward and backward
    start   a first picture from a cold start, by the shipped tiny model
    decode  the image decoders: passes and seconds an image, accepted guesses (`bench_decode_emu35`)
    dida    parallel decoding beside `ar`: passes and seconds an image, by size of the image (`bench_dida_emu35`)
    train   steps of fine-tuning: tokens per second and memory (`training.bench_train`; see [`register_part`])
    grpo    log-probabilities of groups of answers, forward and backward (`training.bench_grpo`)

Both sides of a ratio are measured in the same run; see `bench_memory_emu35` for how memory is.
"""

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from .bench_decode_emu35 import bench_decode, decode_tables, decode_targets
from .bench_dida_emu35 import bench_dida, dida_tables, dida_targets
from .bench_memory_emu35 import TINY_DECODER, bench_loss, bench_vision, build_model, timed
from .configuration_emu35 import Emu35TextConfig
from .devices_emu35 import device_name
from .modeling_emu35 import Emu35ForConditionalGeneration

PARTS = ("image", "vision", "loss", "start", "decode", "dida")
#: Parts by size.
SIZES = {"tiny": PARTS, "34b": ("image", "dida")}


@dataclass(frozen=True)
class Part:
    """A part that another package brings.

    Args:
        measure (`Callable`): `(quick, device, dtype, seed)` -> results, fit for JSON.
        tables (`Callable`): results -> (title, head, rows) of each table.
        targets (`Callable`): results -> (name, target, measured value, whether it is reached) of each target.
    """

    measure: Callable[[bool, str, torch.dtype, int], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[tuple[str, list[str], list[list[str]]]]]
    targets: Callable[[dict[str, Any]], list[tuple[str, str, float, bool]]]


_PARTS_OF_OTHERS: dict[str, Part] = {}


def register_part(name: str, part: Part):
    """Adds a part of `size` "tiny" to [`run_benchmark`]: this package imports none of those that build on it."""
    _PARTS_OF_OTHERS[name] = part


BATCH_SIZES = (1, 4, 8, 16)
#: Codes of the image, height x width: as many row ends a code as in a 64 x 64 image.
GRID = (2, 32)
GUIDANCE_SCALE = 3.0
TOP_K = 5120  # the release's
PROMPT_TOKENS, NEGATIVE_PROMPT_TOKENS = 64, 16
START_PROMPT = "a small red circle above a large blue square"


def run_benchmark(
    parts: Sequence[str] = (),
    size: str = "tiny",
    quick: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    on_part: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        parts (`Sequence[str]`): of `PARTS`, or registered; default: all that `size` has.
        size (`str`): "tiny", or "34b": the released size with random weights, on a GPU ("image" and "dida").
        quick (`bool`): fewer repetitions, smaller inputs. The targets are not judged then.
        device (`str`), dtype (`torch.dtype`, *optional*): default float32 for "tiny" on a CPU, else bfloat16.
        seed (`int`): of weights and inputs.
        on_part (`Callable`, *optional*): gets the results so far after each part, which may have taken an hour.
    Returns:
        `dict`: "environment", one entry a part, and "targets" (name, target, measured value, reached).
    Raises:
        ValueError: for unknown parts or sizes, and where the machine is too small for the size.
    """
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {size!r}.")
    others = {} if size != "tiny" else _PARTS_OF_OTHERS
    known = (*SIZES[size], *others)
    parts = tuple(parts) or known
    unknown = [part for part in parts if part not in (*PARTS, *_PARTS_OF_OTHERS)]
    if unknown:
        raise ValueError(f"`parts` must be of {', '.join((*PARTS, *_PARTS_OF_OTHERS))}, got {unknown[0]!r}.")
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise ValueError(f"`size`={size!r} has the parts {', '.join(known)} only, got {unknown[0]!r}.")
    if dtype is None:
        dtype = torch.float32 if size == "tiny" and torch.device(device).type == "cpu" else torch.bfloat16
    if size == "34b":
        _require_gpu_memory(device, dtype)
    results: dict[str, Any] = {"environment": environment(device, dtype), "size": size, "quick": quick}
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "image": lambda: bench_image(size, quick, device, dtype, seed),
        "vision": lambda: bench_vision(quick, device, seed),
        "loss": lambda: bench_loss(quick, device, seed),
        "start": bench_start,
        "decode": lambda: bench_decode(quick, device, dtype, seed),
        "dida": lambda: bench_dida(size, quick, device, dtype, seed, memory_bandwidth(device)),
    }
    for name, other in others.items():
        steps[name] = lambda measure=other.measure: measure(quick, device, dtype, seed)
    with tqdm(parts, disable=None, unit="part") as bar:
        for part in bar:
            bar.set_description(part)
            results[part] = steps[part]()
            results["targets"] = [] if quick or size != "tiny" else _targets(results)
            if on_part is not None:
                on_part(results)
    return results


def environment(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": device,
        "name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ------------------------------------------------------------------------------------------------------- image tokens


@torch.no_grad()
def generate_like_the_release(
    model: Emu35ForConditionalGeneration,
    prompt: torch.LongTensor,
    negative_prompt: torch.LongTensor,
    grid: tuple[int, int],
    guidance_scale: float,
    top_k: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The straightforward way to make one image: two passes a token, everything over the whole vocabulary.

    One prompt at a time; conditional and unconditional pass one after the other with a key-value cache each; logits
    and log-softmax over all ids for both; guidance, the mask to what is allowed, top-k and the draw over all ids, too.
    Row ends are forced by the mask, at the price of a step like any other. The decoder is ours.

    Args:
        prompt, negative_prompt (`torch.LongTensor` of shape `(length,)`).
        grid (`tuple[int, int]`): height and width in codes.
    Returns:
        `list[int]`: the ids from the first code to the last.
    """
    layout = model.config.token_layout
    head = [layout.boi_token_id, *layout.size_token_ids(*grid), layout.img_token_id]
    head = torch.tensor(head, device=prompt.device)
    pending = [torch.cat([tokens, head])[None] for tokens in (prompt, negative_prompt)]
    caches = [DynamicCache(config=model.model.config) for _ in pending]
    height, width = grid
    ids: list[int] = []
    while len(ids) < height * (width + 1) - 1:
        scores = []
        for tokens, cache in zip(pending, caches, strict=True):
            hidden = model.model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
            scores.append(model.lm_head(hidden[:, -1]).float().log_softmax(-1))
        conditional, unconditional = scores
        guided = unconditional + guidance_scale * (conditional - unconditional)
        masked = torch.full_like(guided, float("-inf"))
        if len(ids) % (width + 1) == width:
            masked[:, layout.eol_token_id] = guided[:, layout.eol_token_id]
        else:
            visual = slice(layout.visual_token_offset, layout.visual_token_end)
            masked[:, visual] = guided[:, visual]
        smallest = masked.topk(top_k).values[:, -1:]
        masked = masked.masked_fill(masked < smallest, float("-inf"))
        token = torch.multinomial(masked.softmax(-1), 1, generator=generator)
        ids.append(int(token))
        pending = [token, token]
    return ids


def bench_image(size: str, quick: bool, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Image tokens per second by batch size, the straightforward way's, and what memory bandwidth allows."""
    decoder = TINY_DECODER if size == "tiny" else {}
    grid, batch_sizes, repeats = (GRID, BATCH_SIZES, 3) if not quick else ((2, 8), BATCH_SIZES[:3], 1)
    model = build_model(decoder, device, dtype, seed)
    layout = model.config.token_layout
    draws = torch.Generator().manual_seed(seed)
    prompts, negatives = (
        torch.randint(1000, 100_000, (max(batch_sizes), length), generator=draws).to(device)
        for length in (PROMPT_TOKENS, NEGATIVE_PROMPT_TOKENS)
    )
    generator = torch.Generator(device).manual_seed(seed)
    num_codes = grid[0] * grid[1]

    def ours(batch: int, top_k: int = TOP_K, shape: tuple[int, int] = grid) -> torch.LongTensor:
        output = model.generate(
            prompts[:batch],
            negative_prompt_ids=negatives[:batch],
            generation_mode="image",
            height=16 * shape[0],
            width=16 * shape[1],
            guidance_scale=GUIDANCE_SCALE,
            image_top_k=top_k,
            do_sample=True,
            generator=generator,
        )
        return output.sequences[:, PROMPT_TOKENS:]

    def reference(top_k: int = TOP_K, shape: tuple[int, int] = grid) -> list[int]:
        return generate_like_the_release(model, prompts[0], negatives[0], shape, GUIDANCE_SCALE, top_k, generator)

    # Both ways choose the same tokens where nothing is left to chance. This also warms everything up.
    greedy = ours(1, top_k=1, shape=(2, 4))[0].tolist()
    expected = reference(top_k=1, shape=(2, 4))
    same = greedy[-1 - len(expected) : -1] == expected

    seconds: dict[int, list[float]] = {batch: [] for batch in (0, *batch_sizes)}
    for _ in range(repeats):
        for batch in seconds:
            seconds[batch].append(timed(lambda batch=batch: ours(batch) if batch else reference(), device))
    reference_rate = num_codes / min(seconds.pop(0))
    bandwidth = memory_bandwidth(device)
    decoder_bytes = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    row_bytes = model.lm_head.weight[0].numel() * model.lm_head.weight.element_size()
    pass_bytes = decoder_bytes + layout.num_visual_tokens * row_bytes
    batches = []
    for batch, times in seconds.items():
        rate = batch * num_codes / min(times)
        bound = batch * bandwidth / pass_bytes
        batches.append(
            {
                "batch_size": batch,
                "tokens_per_second": rate,
                "speedup": rate / reference_rate,
                "bandwidth_bound_tokens_per_second": bound,
                "share_of_bound": rate / bound,
            }
        )
    return {
        "parameters_of_layers": sum(p.numel() for p in model.model.layers.parameters()),
        "vocabulary": Emu35TextConfig.vocab_size,
        "grid": list(grid),
        "guidance_scale": GUIDANCE_SCALE,
        "image_top_k": TOP_K,
        "same_tokens_without_chance": same,
        "reference_tokens_per_second": reference_rate,
        "reference_bytes_per_token": 2 * (decoder_bytes + Emu35TextConfig.vocab_size * row_bytes),
        "bytes_per_pass": pass_bytes,
        "memory_bandwidth_bytes_per_second": bandwidth,
        "batches": batches,
    }


def memory_bandwidth(device: str) -> float:
    """Bytes per second at which a matrix that fits into no cache is read, by a matrix-vector product."""
    matrix = torch.ones(16384 if torch.device(device).type == "cpu" else 65536, 16384, device=device)
    vector = torch.ones(16384, device=device)
    seconds = min(timed(lambda: matrix @ vector, device) for _ in range(5))
    return matrix.numel() * matrix.element_size() / seconds


def _require_gpu_memory(device: str, dtype: torch.dtype):
    needed = 34.2e9 * dtype.itemsize + 4e9
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"`size`='34b' needs a GPU with {needed / 2**30:.0f} GiB of memory in {dtype}, got the device {device!r}. "
            "Without one, `emu35 bench image` measures a small decoder with the same vocabulary."
        )
    total = torch.cuda.get_device_properties(device).total_memory
    if total < needed:
        raise ValueError(
            f"`size`='34b' in {dtype} needs {needed / 2**30:.0f} GiB of GPU memory, {device} has {total / 2**30:.0f}."
        )


def bench_start() -> dict[str, Any]:
    """Seconds from starting a process to a picture on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "out.png"))
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "emu35.cli", "generate", START_PROMPT, "-o", output], capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    if run.returncode:
        return {"skipped": (run.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"seconds": seconds, "prompt": START_PROMPT}


# ------------------------------------------------------------------------------------------------------------- report


def _targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[tuple[str, str, float, bool]] = []
    by_batch = {row["batch_size"]: row["speedup"] for row in results.get("image", {}).get("batches", [])}
    for batch, least in ((1, 3), (8, 10)):
        if batch in by_batch:
            rows.append(
                (f"image: speed-up at batch {batch}", f">= {least}", by_batch[batch], by_batch[batch] >= least)
            )
    if "vision" in results:
        vision = results["vision"]
        gib = vision["extra_bytes"] / 2**30
        rows.append(("vision: extra memory, GiB", "<= 0.3", gib, gib <= 0.3))
        rows.append(("vision: speed-up", ">= 4", vision["speedup"], vision["speedup"] >= 4))
        rows.append(("vision: different codes", "= 0", vision["different_codes"], not vision["different_codes"]))
    if "memory_ratio" in results.get("loss", {}):
        ratio = results["loss"]["memory_ratio"]
        rows.append(("loss: memory by the plain way's", "<= 0.1", ratio, ratio <= 0.1))
    if "seconds" in results.get("start", {}):
        seconds = results["start"]["seconds"]
        rows.append(("start: seconds to a first picture", "<= 15", seconds, seconds <= 15))
    if "decode" in results:
        rows += decode_targets(results["decode"])
    if "dida" in results:
        rows += dida_targets(results["dida"])
    for name, other in _PARTS_OF_OTHERS.items():
        rows += other.targets(results[name]) if name in results else ()
    return [
        {"name": name, "target": target, "value": value, "reached": reached} for name, target, value, reached in rows
    ]


def format_results(results: dict[str, Any]) -> str:
    """The results as plain-text tables."""
    where = results["environment"]
    lines = [
        f"{where['name']}, {where['device']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']}"
    ]
    if "image" in results:
        image = results["image"]
        rows = [["straightforward", f"{image['reference_tokens_per_second']:.1f}", "1.0", "", ""]]
        rows += [
            [
                f"batch {row['batch_size']}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.1f}",
                f"{row['bandwidth_bound_tokens_per_second']:.0f}",
                f"{row['share_of_bound']:.0%}",
            ]
            for row in image["batches"]
        ]
        lines += ["", *_table(["image tokens", "per second", "speed-up", "bandwidth allows", "of that"], rows)]
        if not image["same_tokens_without_chance"]:
            lines.append("WARNING: the two ways chose different tokens where nothing was left to chance.")
    if "vision" in results:
        vision = results["vision"]
        rows = [
            ["softmax + one-hot", f"{vision['plain_seconds']:.2f}", f"{vision['plain_extra_bytes'] / 2**30:.2f}"],
            ["emu35", f"{vision['seconds']:.2f}", f"{vision['extra_bytes'] / 2**30:.2f}"],
        ]
        lines += ["", *_table(["quantisation", "seconds", "extra GiB"], rows)]
        lines.append(f"different codes: {vision['different_codes']} of {vision['codes'][0] * vision['codes'][1]}")
    if "loss" in results:
        loss = results["loss"]
        rows = [["emu35", f"{loss['seconds']:.1f}", f"{loss['extra_bytes'] / 2**30:.2f}", f"{loss['loss']:.5f}"]]
        if "plain_seconds" in loss:
            plain = [loss[f"plain_{name}"] for name in ("seconds", "extra_bytes", "loss")]
            rows.insert(0, ["whole logits", f"{plain[0]:.1f}", f"{plain[1] / 2**30:.2f}", f"{plain[2]:.5f}"])
        lines += ["", *_table([f"loss of {loss['tokens']} tokens", "seconds", "extra GiB", "value"], rows)]
        if "skipped" in loss:
            lines.append(f"skipped: {loss['skipped']}")
    if "start" in results:
        start = results["start"]
        seconds = f"{start['seconds']:.1f} s" if "seconds" in start else f"skipped: {start['skipped']}"
        lines += ["", f"first picture from a cold start: {seconds}"]
    others = [(name, other.tables) for name, other in _PARTS_OF_OTHERS.items()]
    for part, tables in (("decode", decode_tables), ("dida", dida_tables), *others):
        for title, head, rows in tables(results[part]) if part in results else ():
            lines += ["", title, *(_table(head, rows) if head else ())]
    if results["targets"]:
        rows = [
            [row["name"], row["target"], f"{row['value']:.3g}", "yes" if row["reached"] else "NO"]
            for row in results["targets"]
        ]
        lines += ["", *_table(["target", "wanted", "measured", "reached"], rows)]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
