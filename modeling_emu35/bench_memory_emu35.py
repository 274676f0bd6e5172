"""The memory benchmarks of `emu35 bench`: quantisation of an image, and the loss over the whole vocabulary.

Each side of a comparison runs in a process of its own. On a CPU its memory is the peak of its resident memory above
what it held before (weights and inputs), so that whatever a library allocates is counted; on a GPU it is the
allocator's peak.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .configuration_emu35 import Emu35Config, Emu35TextConfig, Emu35VisionTokenizerConfig
from .modeling_emu35 import Emu35ForConditionalGeneration
from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizerQuantizer

#: The decoder of `--size tiny`: small, but with the released vocabulary, which the straightforward way pays for.
TINY_DECODER = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LOSS_TOKENS = 4096
VISION_GRID = (64, 64)


def build_model(decoder: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> Emu35ForConditionalGeneration:
    """A model with random weights and the released token layout, made where it runs."""
    torch.manual_seed(seed)
    config = Emu35Config(text_config=Emu35TextConfig(**decoder), vision_tokenizer_config=None)
    with torch.device(device):
        return Emu35ForConditionalGeneration._from_config(config, dtype=dtype).eval()


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quantize_like_the_release(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The straightforward way: logits, softmax and one-hot of every position over the whole codebook.

    Args:
        latents (`torch.Tensor` of shape `(positions, embed_dim)`), codebook `(codebook_size, embed_dim)`.
    Returns:
        codes `(positions,)` and quantised latents `(positions, embed_dim)`.
    """
    logits = latents @ codebook.T
    soft = logits.softmax(dim=-1)
    codes = soft.argmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(1, codes[:, None], 1.0)
    return codes, hard @ codebook


def bench_vision(quick: bool, device: str, seed: int) -> dict[str, Any]:
    """Quantisation (codes and quantised latents) of one image, by the vision tokenizer's code and the plain way."""
    height, width = VISION_GRID if not quick else (16, 16)
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = (
            in_own_process("vision", way, device, seed, height, width, str(Path(folder, f"{way}.npy")))
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
    codes: list[torch.Tensor] = []
    seconds = min(timed(lambda: codes.append(quantize(latents)), device) for _ in range(2))
    extra = memory.extra_bytes()
    np.save(path, codes[-1].flatten().cpu().numpy())
    return {"seconds": seconds, "extra_bytes": extra}


def bench_loss(quick: bool, device: str, seed: int) -> dict[str, Any]:
    """Forward and backward of the loss, by the model's own code and by whole logits and cross-entropy."""
    tokens = LOSS_TOKENS if not quick else LOSS_TOKENS // 16
    needed = 3.2 * tokens * Emu35TextConfig.vocab_size * 4 + 2e9
    free = free_bytes(device)
    result: dict[str, Any] = {"tokens": tokens, "vocabulary": Emu35TextConfig.vocab_size}
    ours = in_own_process("loss", "ours", device, seed, tokens)
    result |= {"seconds": ours["seconds"], "extra_bytes": ours["extra_bytes"], "loss": ours["loss"]}
    if free is not None and free < needed:
        return result | {
            "skipped": f"the plain way needs {needed / 2**30:.1f} GiB of free memory, and there are {free / 2**30:.1f}"
        }
    plain = in_own_process("loss", "plain", device, seed, tokens)
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
        values.append(float(loss.detach()))

    seconds = timed(step, device)
    return {"seconds": seconds, "extra_bytes": memory.extra_bytes(), "loss": values[0]}


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

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _peak_bytes()

    def extra_bytes(self) -> int:
        return self.peak_bytes() - self.before


def _peak_bytes() -> int:
    # Not `ru_maxrss` where it can be avoided: on Linux a process inherits its parent's.
    peak = _status_bytes("VmHWM")
    if peak is None:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _status_bytes(name: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def free_bytes(device: str) -> int | None:
    """Memory that is left, or `None` where nobody tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


_MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {"vision": measure_vision, "loss": measure_loss}


def in_own_process(*measurement: Any, module: str = "emu35.bench_memory_emu35") -> dict[str, Any]:
    """What a measurement of a module prints as JSON on its last line.

    Args:
        measurement: what the module reads, as JSON, from its only argument.
    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, "-m", module, json.dumps(measurement)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"the measurement {measurement} failed with status {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    _part, *_arguments = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(_MEASUREMENTS[_part](*_arguments)) + "\n")
