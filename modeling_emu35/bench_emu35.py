"""Speed and memory against the straightforward way, which is written out here: what `emu35 bench` runs.

    image   image tokens per second with guidance, by batch size, on random weights with the real vocabulary
    vision  quantisation of 64 x 64 codes against softmax + one-hot: time, memory, same codes
    loss    memory of the loss of 4,096 tokens over 282,926 logits each, forward and backward
    start   a first picture from a cold start, by the shipped tiny model

Both sides of a ratio are measured in the same run. Memory on a CPU is the peak of resident memory of a process of its own
above what it holds before (weights and inputs), so that whatever a library allocates is counted; on a GPU it is the
allocator's peak.
"""

import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from .configuration_emu35 import Emu35Config, Emu35TextConfig
from .modeling_emu35 import Emu35ForConditionalGeneration
from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizerConfig, Emu35VisionTokenizerQuantizer

PARTS = ("image", "vision", "loss", "start")
SIZES = ("tiny", "34b")

#: The decoder of `--size tiny`: small, but with the released vocabulary, which is what the straightforward way pays for.
TINY_DECODER = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
BATCH_SIZES = (1, 4, 8, 16)
#: Codes of the image, height x width: as many row ends a code as in a 64 x 64 image.
GRID = (2, 32)
GUIDANCE_SCALE = 3.0
TOP_K = 5120  # the release's
PROMPT_TOKENS, NEGATIVE_PROMPT_TOKENS = 64, 16
LOSS_TOKENS = 4096
VISION_GRID = (64, 64)
START_PROMPT = "a small red circle above a large blue square"


def run_benchmark(
    parts: Sequence[str] = (),
    size: str = "tiny",
    quick: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        parts (`Sequence[str]`): of `PARTS`; default: all that `size` has.
        size (`str`): "tiny", or "34b": the released size with random weights, on a GPU ("image" only).
        quick (`bool`): fewer repetitions, smaller inputs. The targets are not judged then.
        device (`str`), dtype (`torch.dtype`, *optional*): default float32 on a CPU, else bfloat16.
        seed (`int`): of weights and inputs.
    Returns:
        `dict`: "environment", one entry a part, and "targets" (name, target, measured value, reached).
    Raises:
        ValueError: for unknown parts or sizes, and where the machine is too small for the size.
    """
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {size!r}.")
    parts = tuple(parts) or (PARTS if size == "tiny" else ("image",))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"`parts` must be of {', '.join(PARTS)}, got {unknown[0]!r}.")
    if size != "tiny" and parts != ("image",):
        raise ValueError(f"`size`={size!r} has the part image only, got {', '.join(parts)}.")
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if size == "34b":
        _require_gpu_memory(device, dtype)
    results: dict[str, Any] = {"environment": environment(device, dtype), "size": size, "quick": quick}
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "image": lambda: bench_image(size, quick, device, dtype, seed),
        "vision": lambda: bench_vision(quick, device, seed),
        "loss": lambda: bench_loss(quick, device, seed),
        "start": bench_start,
    }
    with tqdm(parts, disable=None, unit="part") as bar:
        for part in bar:
            bar.set_description(part)
            results[part] = steps[part]()
    results["targets"] = [] if quick or size != "tiny" else _targets(results)
    return results


def environment(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "device": device,
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ------------------------------------------------------------------------------------------------------- image tokens


def build_model(decoder: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> Emu35ForConditionalGeneration:
    """A model with random weights and the released token layout, made where it runs."""
    torch.manual_seed(seed)
    config = Emu35Config(text_config=Emu35TextConfig(**decoder), vision_tokenizer_config=None)
    with torch.device(device):
        return Emu35ForConditionalGeneration._from_config(config, dtype=dtype).eval()


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

    One prompt at a time; conditional and unconditional pass one after the other with a key-value cache each; logits and
    log-softmax over all ids for both; guidance, the mask to what is allowed, top-k and the draw over all ids, too. Row
    ends are forced by the mask, at the price of a step like any other. The decoder is ours.

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
            seconds[batch].append(_time(lambda batch=batch: ours(batch) if batch else reference(), device))
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
    del model
    gc.collect()
    return {
        "parameters_of_layers": decoder_bytes // row_bytes * decoder.get("hidden_size", Emu35TextConfig.hidden_size),
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
    seconds = min(_time(lambda: matrix @ vector, device) for _ in range(5))
    return matrix.numel() * matrix.element_size() / seconds


def _time(function: Callable[[], Any], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _require_gpu_memory(device: str, dtype: torch.dtype):
    needed = 34.2e9 * dtype.itemsize + 4e9
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"`size`='34b' needs a GPU with {needed / 2**30:.0f} GiB of memory (bfloat16: 68 GiB), got device {device!r}. "
            "Without one, `emu35 bench image` measures a small decoder with the same vocabulary."
        )
    total = torch.cuda.get_device_properties(device).total_memory
    if total < needed:
        raise ValueError(
            f"`size`='34b' in {dtype} needs {needed / 2**30:.0f} GiB of GPU memory, and {device} has {total / 2**30:.0f}."
        )


# ------------------------------------------------------------------------------------- memory: each in its own process


def quantize_like_the_release(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The straightforward way: logits, softmax and one-hot of every position over the whole codebook.

    Args:
        latents (`torch.Tensor` of shape `(positions, embed_dim)`), codebook `(codebook_size, embed_dim)`.
    Returns:
        codes `(positions,)` and quantised latents `(positions, embed_dim)`.
    """
    soft = (latents @ codebook.T).softmax(dim=-1)
    codes = soft.argmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(1, codes[:, None], 1.0)
    return codes, hard @ codebook


def bench_vision(quick: bool, device: str, seed: int) -> dict[str, Any]:
    """Quantisation (codes and quantised latents) of one image by the vision tokenizer's own code, and by the plain one."""
    height, width = VISION_GRID if not quick else (16, 16)
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = (
            _in_own_process("vision", way, device, seed, height, width, str(Path(folder, f"{way}.npy")))
            for way in ("ours", "plain")
        )
        codes = [np.load(Path(folder, f"{way}.npy")) for way in ("ours", "plain")]
    config = Emu35VisionTokenizerConfig()
    return {
        "codes": [height, width],
        "codebook": [config.codebook_size, config.embed_dim],
        "seconds": ours["seconds"],
        "plain_seconds": plain["seconds"],
        "speedup": plain["seconds"] / ours["seconds"],
        "extra_bytes": ours["extra_bytes"],
        "plain_extra_bytes": plain["extra_bytes"],
        "different_codes": int((codes[0] != codes[1]).sum()),
    }


@torch.no_grad()
def measure_vision(way: str, device: str, seed: int, height: int, width: int, path: str) -> dict[str, Any]:
    """One side of [`bench_vision`], in a process of its own; writes its codes to `path`."""
    torch.manual_seed(seed)
    config = Emu35VisionTokenizerConfig()
    with torch.device(device):
        quantizer = Emu35VisionTokenizerQuantizer(config)
        quantizer.embedding.weight.normal_()
        latents = torch.randn(1, config.embed_dim, height, width)

    def quantize(latents: torch.Tensor) -> torch.Tensor:
        if way == "ours":
            codes = quantizer.encode(latents)
            quantizer.decode(codes)
            return codes
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        return quantize_like_the_release(rows, quantizer.embedding.weight)[0]

    quantize(latents[:, :, :1, :4])  # libraries set themselves up
    memory = Memory(device)
    seconds = min(_time(lambda: quantize(latents), device) for _ in range(2))
    extra = memory.extra_bytes()
    np.save(path, quantize(latents).flatten().cpu().numpy())
    return {"seconds": seconds, "extra_bytes": extra}


def bench_loss(quick: bool, device: str, seed: int) -> dict[str, Any]:
    """Forward and backward of the loss, by the model's own code and by whole logits and cross-entropy."""
    tokens = LOSS_TOKENS if not quick else LOSS_TOKENS // 16
    needed = 3.2 * tokens * Emu35TextConfig.vocab_size * 4 + 2e9
    free = _free_bytes(device)
    result: dict[str, Any] = {"tokens": tokens, "vocabulary": Emu35TextConfig.vocab_size}
    ours = _in_own_process("loss", "ours", device, seed, tokens)
    result |= {"seconds": ours["seconds"], "extra_bytes": ours["extra_bytes"], "loss": ours["loss"]}
    if free is not None and free < needed:
        return result | {
            "skipped": f"the plain way needs {needed / 2**30:.1f} GiB of free memory, and there are {free / 2**30:.1f}"
        }
    plain = _in_own_process("loss", "plain", device, seed, tokens)
    return result | {
        "plain_seconds": plain["seconds"],
        "plain_extra_bytes": plain["extra_bytes"],
        "plain_loss": plain["loss"],
        "memory_ratio": ours["extra_bytes"] / plain["extra_bytes"],
    }


def measure_loss(way: str, device: str, seed: int, tokens: int) -> dict[str, Any]:
    """One side of [`bench_loss`], in a process of its own."""
    model = build_model({**TINY_DECODER, "num_hidden_layers": 1}, device, torch.float32, seed).train()
    layout = model.config.token_layout
    hidden = torch.randn(1, tokens, TINY_DECODER["hidden_size"], device=device, requires_grad=True)
    labels = torch.randint(0, layout.visual_token_end, (1, tokens), device=device)

    def loss_of(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if way == "ours":
            return model.compute_loss(hidden, labels)
        targets = labels[0, 1:]
        losses = F.cross_entropy(model.lm_head(hidden[0, :-1]).float(), targets, reduction="none")
        weights = torch.where(targets < layout.visual_token_offset, 1.0, model.config.visual_loss_weight)
        return (losses * weights).sum() / weights.sum()

    loss_of(hidden[:, :4], labels[:, :4])  # libraries set themselves up
    memory = Memory(device)
    values = []

    def step():
        loss = loss_of(hidden, labels)
        loss.backward()
        values.append(float(loss))

    seconds = _time(step, device)
    return {"seconds": seconds, "extra_bytes": memory.extra_bytes(), "loss": values[0]}


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


class Memory:
    """Peak memory since it was made, beyond what was in use then."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = _status_bytes("VmRSS") or _peak_bytes()

    def extra_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _peak_bytes() - self.before


def _peak_bytes() -> int:
    # Not `ru_maxrss` where it can be avoided: on Linux a process inherits its parent's.
    peak = _status_bytes("VmHWM")
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _status_bytes(name: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _free_bytes(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


_MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {"vision": measure_vision, "loss": measure_loss}


def _in_own_process(*measurement: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "emu35.bench_emu35", json.dumps(measurement)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"the measurement {measurement} failed with status {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- report


def _targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[tuple[str, str, float, bool]] = []
    by_batch = {row["batch_size"]: row["speedup"] for row in results.get("image", {}).get("batches", [])}
    for batch, least in ((1, 3), (8, 10)):
        if batch in by_batch:
            rows.append((f"image: speed-up at batch {batch}", f">= {least}", by_batch[batch], by_batch[batch] >= least))
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
    return [
        {"name": name, "target": target, "value": value, "reached": reached} for name, target, value, reached in rows
    ]


def format_results(results: dict[str, Any]) -> str:
    """The results as plain-text tables."""
    where = results["environment"]
    lines = [f"{where['name']}, {where['device']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']}"]
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


if __name__ == "__main__":
    _part, *_arguments = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(_MEASUREMENTS[_part](*_arguments)) + "\n")
