r"""What `dida` costs beside `ar`: passes and seconds an image on the tiny checkpoint, and the cost by grid size.

By grid size the weights are random: only seconds are measured. Times of large images come from parts of them. The
steps of `dida` but the last one all cost the same, so that N steps take $T(n) + (N - n) s$ with the seconds T(n) of
n whole steps and s of one. The passes of `ar` cost more the longer the cache is, by an amount that is linear in its
length: a few codes are timed at the beginning, in the middle and at the end of the image. Images that are small
enough are made as a whole, too, which shows how good that is.

The limits are of the network alone: for `dida` the arithmetic of its passes at the rate of a large matrix product,
for `ar` the bytes of its passes (weights, visual rows of the output matrix, cache) at the rate at which memory is
read.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tqdm.auto import tqdm

from .bench_decode_emu35 import (
    PROMPTS,
    RANDOM_SAMPLING,
    Decoder,
    Subject,
    measure_decoders,
    speed_table,
    tiny_subject,
)
from .bench_memory_emu35 import timed
from .configuration_emu35 import Emu35Config, Emu35TextConfig, Emu35TokenLayout
from .modeling_emu35 import Emu35ForConditionalGeneration
from .speculative_emu35 import DEFAULT_WINDOW

AR = Decoder("ar", 1, {"image_decoder": "ar"})
STEPS = (2, 4, 8, 16, 32)
#: By size of the model: its decoder (empty: the released one), sizes of codebooks, grids, steps of `dida`.
MID_DECODER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
RELEASED_CODES, FEWER_CODES = Emu35TokenLayout().num_visual_tokens, 16384
GRIDS, QUICK_GRIDS = ((8, 8), (16, 16), (32, 32), (64, 64)), ((4, 4), (8, 8))
GRID_STEPS, GRID_STEPS_34B = (8, 16), (16, 25)
CODEBOOK_DIM = 256  # the release's
#: Images of no more codes than that are also made as a whole.
WHOLE_CODES = 256
#: Steps that are timed, and codes of `ar` at each place.
TIMED_STEPS, TIMED_CODES = 4, 17
#: Ways of a step that are compared, and the codes they are timed on.
SCHEDULERS = (
    ("metric", "kinetic"),
    ("metric", "maximal"),
    ("metric", "confidence"),
    ("mixture", "kinetic"),
    ("absorbing", "kinetic"),
    ("absorbing", "confidence"),
)
SCHEDULER_CODES = 64
#: Path and jump by grid size: those of the shipped adapter.
GRID_PATH = ("absorbing", "confidence")
PARTS_OF_STEP = ("network", "output_matrix", "scheduler", "rest")


def bench_dida(
    size: str, quick: bool, device: str, dtype: torch.dtype, seed: int, bandwidth: float | None = None
) -> dict[str, Any]:
    """`dida` beside `ar`: the tiny checkpoint (not with `size="34b"`), and random weights by size of the grid.

    Args:
        bandwidth (`float`, *optional*): bytes a second at which memory is read, for the limit of `ar`.
    Returns:
        `dict`: "repeats"; "tiny", see [`measure_decoders`], with the "adapter" or a "note" that there was none;
        "random", for each size of codebook see [`measure_grids`], with "schedulers", see [`measure_schedulers`].
    """
    decoder, codebooks, grids, steps = MID_DECODER, (RELEASED_CODES, FEWER_CODES), GRIDS, GRID_STEPS
    if size == "34b":
        decoder, codebooks, grids, steps = {}, (RELEASED_CODES,), GRIDS[-1:], GRID_STEPS_34B
    elif quick:
        codebooks, grids = (FEWER_CODES,), QUICK_GRIDS
    repeats = 3 if quick else 5
    results: dict[str, Any] = {"repeats": repeats}
    if size != "34b":
        results["tiny"] = bench_tiny(quick, repeats, device, dtype, seed)
    results["random"] = []
    for num_codes in codebooks:
        model = random_model(decoder, num_codes, device, dtype, seed)
        measured = measure_grids(model, grids, steps, device, seed, bandwidth, repeats=1 if quick else 3)
        measured["schedulers"] = measure_schedulers(num_codes, device, seed)
        results["random"].append(measured)
        del model  # before the next one is made
    return results


@dataclass(frozen=True)
class _AdaptedSubject(Subject):
    """`dida` has a model of its own: an adapter costs a little even where it is not active."""

    adapted: Emu35ForConditionalGeneration | None = None

    def generate(self, first: int, batch: int, seed: int, decoder: Decoder, **arguments):
        model = self.adapted if decoder.settings["image_decoder"] == "dida" else self.model
        subject = Subject(model, self.inputs, self.settings, self.grid)
        return subject.generate(first, batch, seed, decoder, **arguments)


def bench_tiny(quick: bool, repeats: int, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """`ar`, `speculative` and `dida` on the tiny checkpoint; without an adapter only for the time it takes.

    The seconds of the network alone are those without the adapter.
    """
    from . import TINY_DIDA

    subject = tiny_subject(device, dtype, num_prompts=2 if quick else len(PROMPTS))
    if subject is None:
        return {"skipped": "the tiny checkpoint is not in this installation"}
    missing = [name for name in ("peft", "diffusers") if find_spec(name) is None]
    adapter = TINY_DIDA if Path(TINY_DIDA).is_dir() and not missing else None
    if adapter is not None:
        adapted = copy.deepcopy(subject.model)
        adapted.load_dida_adapter(adapter)
        subject = _AdaptedSubject(**vars(subject), adapted=adapted)
    decoders = dida_decoders(subject, STEPS[1:4] if quick else STEPS, unadapted=adapter is None)
    measured = {"adapter": adapter, **measure_decoders(subject, decoders, repeats, device, seed, traced=1)}
    if adapter is None:
        why = f"{' and '.join(missing)} not installed" if missing else f"no {TINY_DIDA}"
        measured["note"] = f"without an adapter ({why}): a trained one costs a little more, and the images are noise"
    return measured


def dida_decoders(subject: Subject, steps: Sequence[int] = STEPS, unadapted: bool = False) -> list[Decoder]:
    """`ar`, `speculative` as it is by default, and `dida` with every number of steps."""
    window = min(DEFAULT_WINDOW, subject.num_codes)
    decoders = [AR, Decoder("speculative", window + 1, {"image_decoder": "speculative"})]
    for number in steps:
        settings = {"image_decoder": "dida", "num_inference_steps": number}
        settings |= {"allow_unadapted": True} if unadapted else {}
        decoders.append(Decoder(f"dida {number}", subject.num_codes, settings))
    return decoders


# -------------------------------------------------------------------------------------------------------- by grid size


def random_model(
    decoder: dict[str, Any], num_codes: int, device: str, dtype: torch.dtype, seed: int
) -> Emu35ForConditionalGeneration:
    """Random weights, made where they run; the released token layout with as many visual tokens."""
    torch.manual_seed(seed)
    layout = Emu35TokenLayout(num_visual_tokens=num_codes)
    text = Emu35TextConfig(**decoder, vocab_size=layout.visual_token_end)
    config = Emu35Config(text_config=text, token_layout=layout, vision_tokenizer_config=None)
    with torch.device(device):
        return Emu35ForConditionalGeneration._from_config(config, dtype=dtype).eval()


def measure_grids(
    model: Emu35ForConditionalGeneration,
    grids: Sequence[tuple[int, int]],
    steps: Sequence[int],
    device: str,
    seed: int = 0,
    bandwidth: float | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Seconds an image at batch 1, with guidance, by `ar` and by `dida` on `GRID_PATH`.

    Args:
        grids (`Sequence[tuple[int, int]]`): heights and widths in codes.
        steps (`Sequence[int]`): of `dida`.
        repeats (`int`): of images that are made as a whole, by turns. The median counts.
    Returns:
        `dict`: "parameters_of_layers", "num_codes" (of the codebook), "flops_per_second", "grids". Each of those has
        "grid", "ar" and "dida" with "steps", "passes", "seconds", "whole" (measured, not composed),
        "composed_seconds", "limit_seconds", and for dida "ratio" (seconds of ar by these) and "limit_ratio" (the same
        of the limits); and "step": seconds of a step, by part.
    """
    rate = matmul_rate(device, model.dtype)
    scheduler = random_scheduler(model.config.token_layout.num_visual_tokens, device, seed, *GRID_PATH)
    prompts = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1000, 100_000, (1, length), generator=prompts).to(device) for length in (64, 16)]
    inputs = dict(zip(("input_ids", "negative_prompt_ids"), ids, strict=True))

    def subject_of(grid: tuple[int, int]) -> Subject:
        factor = model.image_factor
        sizes = {"generation_mode": "image", "height": factor * grid[0], "width": factor * grid[1]}
        return Subject(model, inputs, {**sizes, **RANDOM_SAMPLING}, grid)

    small = subject_of((4, 4))  # libraries set themselves up
    _compose_ar(small, device, seed), _compose_dida(small, scheduler, TIMED_STEPS, device, seed)
    rows = []
    for grid in tqdm(grids, desc="grids", disable=None, leave=False):
        subject = subject_of(grid)
        ar = {"passes": subject.num_codes, "composed_seconds": _compose_ar(subject, device, seed)}
        total, step = _compose_dida(subject, scheduler, TIMED_STEPS, device, seed)
        dida = [
            {
                "steps": number,
                "passes": number + 1,
                "composed_seconds": total + (number - TIMED_STEPS) * step["seconds"],
                "limit_seconds": number * pass_flops(model, subject) / rate,
            }
            for number in steps
        ]
        ar["limit_seconds"] = (
            None if bandwidth is None else subject.num_codes * _pass_bytes(model, subject) / bandwidth
        )
        whole = _time_whole(subject, scheduler, steps, repeats, device, seed) if _is_small(subject) else None
        for index, row in enumerate((ar, *dida)):
            row["whole"] = whole is not None
            row["seconds"] = row["composed_seconds"] if whole is None else whole[index]
        for row in dida:
            row["ratio"] = ar["seconds"] / row["seconds"]
            row["limit_ratio"] = None if bandwidth is None else ar["limit_seconds"] / row["limit_seconds"]
        rows.append({"grid": list(grid), "ar": ar, "dida": dida, "step": step})
    return {
        "parameters_of_layers": _layer_parameters(model),
        "num_codes": model.config.token_layout.num_visual_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "guidance_scale": RANDOM_SAMPLING["guidance_scale"],
        "flops_per_second": rate,
        "memory_bandwidth_bytes_per_second": bandwidth,
        "grids": rows,
    }


def random_scheduler(num_codes: int, device: str, seed: int, path: str, jump: str):
    """A `DiDAScheduler` with a random codebook of the released width."""
    from emu35.pipelines.scheduling_dida import DiDAScheduler  # of another room, like the decoder's own

    scheduler = DiDAScheduler(num_codes, path=path, jump=jump)
    if path == "metric":
        draws = torch.Generator().manual_seed(seed)
        scheduler.set_codebook(torch.randn(num_codes, CODEBOOK_DIM, generator=draws).to(device))
    return scheduler


def _dida(steps: int) -> Decoder:
    return Decoder(f"dida {steps}", 0, {"image_decoder": "dida", "num_inference_steps": steps})


def _is_small(subject: Subject) -> bool:
    return subject.num_codes <= WHOLE_CODES


def _time_whole(subject: Subject, scheduler, steps, repeats: int, device: str, seed: int) -> list[float]:
    """Seconds of an image by `ar`, then by `dida` with each number of steps."""
    ways: list[tuple[Decoder, dict[str, Any]]] = [(AR, {})]
    ways += [(_dida(number), {"scheduler": scheduler, "allow_unadapted": True}) for number in steps]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for own, (decoder, arguments) in zip(seconds, ways, strict=True):
            own.append(timed(lambda d=decoder, a=arguments: subject.generate(0, 1, seed, d, **a), device))
    return [median(own) for own in seconds]


def _compose_ar(subject: Subject, device: str, seed: int) -> float:
    """Seconds of an image by `ar`, from those of a few codes in its first, middle and last row."""
    height, width = subject.grid
    layout = subject.model.config.token_layout
    draws = torch.Generator().manual_seed(seed)
    codes = torch.randint(layout.visual_token_offset, layout.visual_token_end, subject.grid, generator=draws)
    image = layout.image_token_ids(codes.tolist())
    first_code = image.index(layout.img_token_id) + 1
    prompt = subject.inputs["input_ids"]
    first, costs = 0.0, []
    for row in (0, height // 2, height - 1):
        begun = torch.tensor([image[: first_code + row * (width + 1)]], device=prompt.device)
        inputs = {**subject.inputs, "input_ids": torch.cat([prompt, begun], dim=1)}
        stamps: list[float] = []
        part = Subject(subject.model, inputs, subject.settings, subject.grid)
        with _stamped(device, stamps) as stamp:
            limits = {"max_new_tokens": min(width, TIMED_CODES), "stopping_criteria": [lambda *_: stamp() or False]}
            part.generate(0, 1, seed, AR, **limits)
        first = first or stamps[1] - stamps[0]
        costs.append(median(after - before for before, after in pairwise(stamps[1:])))
    begin, middle, end = costs
    return first + (subject.num_codes - 1) * (begin + 2 * middle + end) / 4


def _compose_dida(subject: Subject, scheduler, steps: int, device: str, seed: int) -> tuple[float, dict[str, float]]:
    """Seconds of `steps` steps, and of one that is not the last: all of it, and its parts."""
    parts: dict[str, list[float]] = {name: [] for name in PARTS_OF_STEP[:-1]}
    stamps: list[float] = []
    model = subject.model
    clocks = (
        _clocked(model.model, "forward", parts["network"], device),
        _clocked(model, "compute_logits", parts["output_matrix"], device),
        _clocked(scheduler, "step", parts["scheduler"], device),
    )
    with clocks[0], clocks[1], clocks[2], _stamped(device, stamps) as stamp:
        arguments = {"scheduler": scheduler, "allow_unadapted": True, "on_step": lambda *_: stamp()}
        total = timed(lambda: subject.generate(0, 1, seed, _dida(steps), **arguments), device)
    # One pass before the steps, of the prefix; logits come in as many chunks as memory asks for.
    each = [after - before for before, after in pairwise(stamps[1:-1])]
    chunks = len(parts["output_matrix"]) // steps
    step = {
        "seconds": median(each),
        "network": median(parts["network"][-steps:-1]),
        "output_matrix": chunks * mean(parts["output_matrix"]),
        "scheduler": median(parts["scheduler"][:-1]),
    }
    step["rest"] = max(0.0, step["seconds"] - sum(step[name] for name in PARTS_OF_STEP[:-1]))
    return total, step


@contextmanager
def _stamped(device: str, stamps: list[float]) -> Iterator[Callable[[], None]]:
    """Yields what notes the time; the first one is noted at once."""

    def stamp():
        timed(lambda: None, device)  # waits for what is under way
        stamps.append(time.perf_counter())

    stamp()
    yield stamp


@contextmanager
def _clocked(owner: Any, name: str, seconds: list[float], device: str) -> Iterator[None]:
    """Notes the seconds of every call of a method."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        results: list[Any] = []
        seconds.append(timed(lambda: results.append(method(*args, **kwargs)), device))
        return results[0]

    owner.__dict__[name] = call
    try:
        yield
    finally:
        del owner.__dict__[name]


def measure_schedulers(num_codes: int, device: str, seed: int, positions: int = SCHEDULER_CODES) -> list[dict]:
    """Seconds of a step of the scheduler for one code of the image, by path and jump: "path", "jump", "seconds"."""
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, positions, num_codes, generator=draws).to(device)
    rows = []
    for path, jump in SCHEDULERS:
        scheduler = random_scheduler(num_codes, device, seed, path, jump)
        scheduler.set_timesteps(GRID_STEPS[0], device=device)
        codes = scheduler.initial_codes((1, positions), draws, device)
        t = scheduler.timesteps[GRID_STEPS[0] // 2]

        def step(scheduler=scheduler, t=t, codes=codes):
            scheduler.step(logits, t, codes)

        step()
        seconds = min(timed(step, device) for _ in range(3)) / positions
        rows.append({"path": path, "jump": jump, "seconds": seconds})
    return rows


# -------------------------------------------------------------------------------------------------------------- limits


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 1024 if torch.device(device).type == "cpu" else 8192
    matrix = torch.ones(n, n, device=device, dtype=dtype)
    matrix @ matrix
    return 2 * n**3 / min(timed(lambda: matrix @ matrix, device) for _ in range(5))


def pass_flops(model: Emu35ForConditionalGeneration, subject: Subject) -> float:
    """Operations of a denoising pass of one image: layers, attention, and the visual rows of the output matrix."""
    text, (height, width) = model.config.text_config, subject.grid
    tokens = height * (width + 1)
    flops = 2.0 * subject.num_codes * model.config.token_layout.num_visual_tokens * text.hidden_size
    for prompt in ("input_ids", "negative_prompt_ids"):
        seen = tokens + subject.inputs[prompt].shape[1]
        flops += 2 * tokens * _layer_parameters(model)
        flops += 4 * tokens * seen * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return flops


def _pass_bytes(model: Emu35ForConditionalGeneration, subject: Subject) -> float:
    """Bytes that a pass of `ar` reads in the middle of an image."""
    text, (height, width) = model.config.text_config, subject.grid
    weights = _layer_parameters(model) + model.config.token_layout.num_visual_tokens * text.hidden_size
    cached = sum(subject.inputs[name].shape[1] for name in ("input_ids", "negative_prompt_ids"))
    cached += height * (width + 1)  # half of them, in two streams
    values = weights + 2 * cached * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return values * model.dtype.itemsize


def _layer_parameters(model: Emu35ForConditionalGeneration) -> int:
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


# -------------------------------------------------------------------------------------------------------------- report


def dida_targets(results: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """Name, target, measured value, whether it is reached."""
    targets = []
    for row in results.get("tiny", {}).get("decoders", []):
        if row["name"] == "dida 8":
            faster = row["batches"][0]["speedup"]
            targets.append(("dida: speed-up over ar, tiny, 8 steps, batch 1", ">= 2.5", faster, faster >= 2.5))
    for measured in results["random"]:
        for row in measured["grids"]:
            if row["grid"] == [32, 32]:
                name = f"dida: speed-up over ar, 32 x 32 of {measured['num_codes']:,} codes, {GRID_STEPS[-1]} steps"
                targets += [
                    (name, ">= 5", own["ratio"], own["ratio"] >= 5)
                    for own in row["dida"]
                    if own["steps"] == GRID_STEPS[-1]
                ]
    return targets


def dida_tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    tables = []
    tiny = results.get("tiny")
    if tiny is not None and "skipped" in tiny:
        tables.append((f"emu35-tiny: skipped: {tiny['skipped']}", [], []))
    elif tiny is not None:
        height, width = tiny["grid"]
        title = f"emu35-tiny with dida: images of {height} x {width} codes, median of {results['repeats']}"
        if "note" in tiny:
            title += f"\n({tiny['note']})"
        head, lines = speed_table(tiny["decoders"])
        head.insert(2, "ar by that")
        for line, row in zip(lines, tiny["decoders"], strict=True):
            line.insert(2, f"{tiny['decoders'][0]['passes'] / row['passes']:.1f}")
        tables.append((f"{title}\n", head, lines))
    for measured in results["random"]:
        tables += [_grid_table(measured), _step_table(measured), _scheduler_table(measured)]
    return tables


def _grid_table(measured: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    title = (
        f"random weights, {measured['parameters_of_layers'] / 1e6:,.0f} M in layers, {measured['num_codes']:,} codes, "
        f"{measured['dtype']}, batch 1, guidance: seconds an image by grid\n"
        f"(~: composed from the times of parts; limit: {measured['flops_per_second'] / 1e9:,.0f} GFLOP/s for dida, "
    )
    bandwidth = measured["memory_bandwidth_bytes_per_second"]
    title += "none for ar)\n" if bandwidth is None else f"{bandwidth / 1e9:,.1f} GB/s for ar)\n"
    head = ["grid", "decoder", "passes", "seconds", "ar by that", "limit, s", "ar by that"]
    lines = []
    for row in measured["grids"]:
        for own in (row["ar"], *row["dida"]):
            limit, limit_ratio = own["limit_seconds"], own.get("limit_ratio")
            lines.append(
                [
                    " x ".join(map(str, row["grid"])),
                    f"dida {own['steps']}" if "steps" in own else "ar",
                    str(own["passes"]),
                    f"{'' if own['whole'] else '~'}{own['seconds']:.3g}",
                    f"{own['ratio']:.2f}" if "ratio" in own else "",
                    "" if limit is None else f"{limit:.3g}",
                    "" if limit_ratio is None else f"{limit_ratio:.2f}",
                ]
            )
    return title, head, lines


def _step_table(measured: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    lines = []
    for row in measured["grids"]:
        step = row["step"]
        shares = (f"{step[name] / step['seconds']:.0%}" for name in PARTS_OF_STEP)
        lines.append([" x ".join(map(str, row["grid"])), f"{step['seconds']:.3g}", *shares])
    head = ["grid", "s/step", "layers", "output matrix", "scheduler", "filters, rest"]
    return f"a step of dida, {measured['num_codes']:,} codes, {' path, '.join(GRID_PATH)}\n", head, lines


def _scheduler_table(measured: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    lines = [[f"{row['path']}, {row['jump']}", f"{1000 * row['seconds']:.3g}"] for row in measured["schedulers"]]
    return f"the scheduler's step, {measured['num_codes']:,} codes\n", ["path, jump", "ms a code of the image"], lines
