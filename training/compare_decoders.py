"""The image decoders compared: accuracy and time of text to image on the same held-out prompts.

    emu35 eval --compare-decoders metric=runs/dida-metric mixture=runs/dida-mixture --num 500 --seed 1 \\
        --output decoders.json --plot decoders.png

Accuracy is that of [`evaluate`]; every entry is written as soon as it is measured, so that a run that was stopped goes
on where it was. Times come last, all in one go and by turns, so that whatever else the machine does meets all alike.
"""

import copy
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from emu35.devices_emu35 import device_name
from emu35.dida_emu35 import ADAPTER_FILES
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor
from tqdm.auto import tqdm

from .evaluate import evaluate
from .shapes import caption, sample_scene

logger = logging.getLogger(__name__)

STEPS = (2, 3, 4, 8, 16, 32)
#: Decoders that draw from the model's own distribution (or from its most probable codes).
EXACT = {
    "ar": {"image_decoder": "ar"},
    "ar, likeliest codes": {"image_decoder": "ar", "image_top_k": 1},
    "ar, unfiltered": {"image_decoder": "ar", "image_top_k": None, "image_top_p": 1.0, "image_temperature": 1.0},
    "speculative": {"image_decoder": "speculative"},
}
NUM_TIMED = 12
_KINDS = ("all", "1_objects", "2_objects", "3_objects", "full", "partial")
_STREAM = 5150  # of the captions that are timed


def compare_decoders(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    adapters: Mapping[str, str | os.PathLike],
    num: int = 500,
    seed: int = 1,
    steps: Sequence[int] = STEPS,
    num_timed: int = NUM_TIMED,
    batch_size: int = 64,
    path: str | os.PathLike | None = None,
    progress: bool = True,
    dida_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Accuracy, passes and seconds an image of `ar`, `speculative` and `dida`.

    The adapter of the model is another one afterwards.

    Args:
        adapters (`Mapping`):
            DiDA adapters by the name of their line. Empty: the model is fully adapted, or has its adapter already.
        num (`int`), seed (`int`), batch_size (`int`): of [`evaluate`].
        steps (`Sequence[int]`): of `dida`.
        num_timed (`int`): images that are timed, one at a time.
        path (`str` or `os.PathLike`, *optional*):
            JSON file of the results. Accuracies that it has of the same model, adapters and settings are kept.
        dida_settings (`Mapping`, *optional*): settings of `dida` alone, like `guidance_cutoff`.
        settings: further settings of `generate`, the same for all. The checkpoint's hold where nothing else is said.
    Returns:
        `dict`: what was asked for, and "entries": for each one its "name", "line" (of the plot), "settings",
        "whole_scene" as [`evaluate`] gives it, "passes" (mean), "seconds_per_image" (median), "seconds" and "speedup"
        over the first entry (median of the ratios of the same image).
    Raises:
        ValueError: without an adapter, for names that are not free, numbers below 1, and a file of another kind.
        FileNotFoundError: for a folder without an adapter.
    """
    if num_timed < 1 or not steps:
        raise ValueError(f"`num_timed` must be positive and `steps` not empty, got {num_timed} and {steps}.")
    taken = [name for name in adapters if name in EXACT]
    if taken:
        raise ValueError(f"`adapters` has the name {taken[0]!r}, which is another decoder's. Choose another one.")
    entries = _entries(adapters, steps, settings, dict(dida_settings or {}))
    if not adapters:
        model.find_dida_scheduler(None, allow_unadapted=False)
    head: dict[str, Any] = {"num": num, "seed": seed, "batch_size": batch_size, "num_timed": num_timed}
    head |= {"dtype": str(model.dtype).removeprefix("torch."), "device": device_name(model.device)}
    head["model"] = _fingerprint(model, with_adapter=not adapters)
    results: dict[str, Any] = {**head, "threads": torch.get_num_threads(), "entries": []}
    kept = {} if path is None else _kept(Path(path), head)
    models = _Models(model, adapters)
    for entry in tqdm(entries, desc="decoders", unit="entry", disable=not progress):
        known = kept.get(json.dumps(entry, sort_keys=True))
        if known is None:
            options = {"num_held_out": 0, "batch_size": batch_size, "processor": processor, "progress": False}
            measured = evaluate(models.of(entry), "t2i", num, seed, **options, **entry["settings"])
            known = {**entry, "whole_scene": measured["whole_scene"]}
            logger.info("%s: %s", entry["name"], measured["whole_scene"])
        results["entries"].append(known)
        if path is not None:
            # With those that are still to come: stopped now, a second run must not lose them.
            names = {one["name"] for one in results["entries"]}
            later = [one for one in kept.values() if one["name"] not in names]
            _write({**results, "entries": [*results["entries"], *later]}, Path(path))
    if any("seconds" not in entry for entry in results["entries"]):
        _time(models, processor, results["entries"], num_timed, seed, progress)
    if path is not None:
        _write(results, Path(path))
    return results


def _entries(
    adapters: Mapping[str, Any], steps: Sequence[int], settings: dict[str, Any], dida_settings: dict[str, Any]
) -> list[dict[str, Any]]:
    entries = [
        {"name": name, "line": name, "settings": {**settings, **own}, "adapter": None} for name, own in EXACT.items()
    ]
    for line, folder in (adapters or {"dida": None}).items():
        adapter = None if folder is None else _digest(Path(folder))
        for number in steps:
            own = {**settings, **dida_settings, "image_decoder": "dida", "num_inference_steps": number}
            entries.append({"name": f"{line} {number}", "line": line, "settings": own, "adapter": adapter})
    return entries


def _digest(folder: Path) -> str:
    """Of an adapter: one that was trained again is another one."""
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no DiDA adapter: it lacks {', '.join(missing)}.")
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _fingerprint(model: Emu35ForConditionalGeneration, with_adapter: bool) -> str:
    """Of the sums of all weights, `with_adapter` or without those of one that is loaded."""
    parameters = [one for name, one in model.named_parameters() if with_adapter or "lora_" not in name]
    sums = [float(one.sum(dtype=torch.float64)) for one in parameters if one.is_floating_point()]
    return hashlib.sha256(np.array(sums).tobytes()).hexdigest()[:16]


def _kept(path: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of an earlier run that asked for the same, by what they measure."""
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(earlier, dict) or "entries" not in earlier:
        raise ValueError(f"`path` {path} holds no comparison of decoders. Name another file.")
    if any(earlier.get(name) != value for name, value in head.items()):
        return {}
    asked = ("name", "line", "settings", "adapter")
    return {json.dumps({name: entry[name] for name in asked}, sort_keys=True): entry for entry in earlier["entries"]}


def _write(results: dict[str, Any], path: Path):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class _Models:
    """The model with one of the adapters, and without: adapters cost a little even where they are not active."""

    def __init__(self, model: Emu35ForConditionalGeneration, adapters: Mapping[str, str | os.PathLike]):
        self.model, self.adapters, self.line = model, adapters, None
        tensors = (*model.parameters(), *model.buffers())
        self.bare = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # the same weights

    def of(self, entry: dict[str, Any]) -> Emu35ForConditionalGeneration:
        line = entry["line"]
        if line in EXACT:
            return self.bare
        if line in self.adapters and line != self.line:
            self.model.load_dida_adapter(self.adapters[line])
            self.line = line
        return self.model


def _time(models: _Models, processor, entries: list[dict[str, Any]], num_timed: int, seed: int, progress: bool):
    """Adds passes and seconds to the entries, image by image and by turns."""
    rng = np.random.default_rng((seed, _STREAM))
    texts = [caption(sample_scene(rng, 1 + index % 3), rng, full=index % 2 == 0).text for index in range(num_timed)]
    seconds: dict[str, list[float]] = {entry["name"]: [] for entry in entries}
    passes: dict[str, list[int]] = {entry["name"]: [] for entry in entries}
    for index, text in enumerate(tqdm([texts[0], *texts], desc="times", unit="image", disable=not progress)):
        inputs = processor(text=[text], task="t2i", return_tensors="pt").to(models.model.device)
        for entry in entries:
            model = models.of(entry)
            generator = torch.Generator(model.device).manual_seed(seed + index)
            _wait(model.device)
            start = time.perf_counter()
            output = model.generate(
                **inputs, task="t2i", generation_mode="image", generator=generator, **entry["settings"]
            )
            _wait(model.device)
            if index:  # the first one warms up
                seconds[entry["name"]].append(time.perf_counter() - start)
                passes[entry["name"]].append(output.num_forward_passes)
    first = seconds[entries[0]["name"]]
    for entry in entries:
        own = seconds[entry["name"]]
        entry["passes"], entry["seconds"] = mean(passes[entry["name"]]), own
        entry["seconds_per_image"] = median(own)
        entry["speedup"] = median(theirs / ours for theirs, ours in zip(first, own, strict=True))


def _wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------- report


def format_comparison(results: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = [
        "| decoder | passes | seconds an image | speed-up | " + " | ".join(map(_title, _KINDS)) + " |",
        "|---|" + "---:|" * (3 + len(_KINDS)),
    ]
    for entry in results["entries"]:
        rates = (f"{100 * entry['whole_scene'][kind]:.1f}" if kind in entry["whole_scene"] else "" for kind in _KINDS)
        cells = (
            entry["name"],
            f"{entry['passes']:.1f}",
            f"{entry['seconds_per_image']:.3f}",
            f"{entry['speedup']:.2f}",
        )
        lines.append(f"| {' | '.join((*cells, *rates))} |")
    return "\n".join(lines)


def _title(kind: str) -> str:
    return "whole scene right, %" if kind == "all" else kind.replace("_", " ").replace("1 objects", "1 object")


def plot_comparison(results: dict[str, Any], path: str | os.PathLike, kind: str = "all"):
    """Accuracy against seconds an image at batch 1: one line an adapter, with its steps at the points.

    Args:
        kind (`str`): of the scenes, a key of "whole_scene".
    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in results["entries"]:
        lines.setdefault(entry["line"], []).append(entry)
    markers = iter("sDv*XP")
    for line, entries in lines.items():
        seconds = [entry["seconds_per_image"] for entry in entries]
        rates = np.array([entry["whole_scene"][kind] for entry in entries])
        errors = 100 * np.sqrt(rates * (1 - rates) / results["num"])
        if line in EXACT:
            style = {"marker": next(markers), "markersize": 9, "color": "0.25" if line.startswith("ar") else "tab:red"}
            style |= {"linestyle": "none"}
        else:
            style = {"marker": "o"}
        bars = axes.errorbar(seconds, 100 * rates, errors, elinewidth=1, label=line, **style)
        for bar in bars.lines[2]:
            bar.set_alpha(0.35)
        for entry, x, rate in zip(entries, seconds, rates, strict=True) if line not in EXACT else ():
            number = str(entry["settings"]["num_inference_steps"])
            style = {"textcoords": "offset points", "fontsize": "small", "color": bars.lines[0].get_color()}
            axes.annotate(number, (x, 100 * rate), (4, -11), **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set(xlabel=f"seconds an image (batch 1, {results['threads']} threads)", ylabel="whole scene right (%)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
