r"""What the image decoders cost: passes and seconds an image, accepted guesses, and what these predict.

Two models: the tiny checkpoint, with sentences of its own world and its own sampling; and one with random weights and
the released vocabulary. What the second one accepts says nothing about trained models, at whatever temperature: it
measures the seconds of a pass. From these, `projected_speedup` tells what the tiny checkpoint's acceptance would give.

How many passes acceptance predicts: let $S_i$ be the share of the passes that accepted guesses 1 to i, of those that
had so many. A pass settles $1 + \sum_i S_i$ codes if the image never ends. Where it does, and if every pass is a new
trial, $E_r = 1 + \sum_k (S_k - S_{k+1}) E_{r - \min(k + 1, r)}$ passes make r codes. A first pass
without guesses comes on top of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from .bench_memory_emu35 import TINY_DECODER, build_model, timed
from .decoding_emu35 import ImageStatistics
from .generation_configuration_emu35 import COUPLINGS, Emu35GenerationConfig
from .modeling_emu35 import Emu35ForConditionalGeneration
from .processing_emu35 import Emu35Processor
from .speculative_emu35 import DEFAULT_WINDOW

WINDOWS = tuple(sorted({4, 8, 16, 32, 64, DEFAULT_WINDOW}))
QUICK_WINDOWS = (4, DEFAULT_WINDOW)
#: What users get who only say `image_decoder="speculative"`.
DEFAULT_COUPLING = Emu35GenerationConfig().coupling
PROMPTS = (
    "a small yellow triangle in the top left on a navy background",
    "there are two objects on a black background",
    "there is a tiny cyan ring above a small yellow triangle and to the right of a big yellow square",
    "a picture of a yellow ring on a brown background",
    "a picture of a large blue cross in the bottom right, a big cyan ring in the top left on a navy background",
    "a black background with a red cross",
    "a purple ring and a green circle",
    "a small red square on the left, a tiny green triangle in the top right and a small pink cross in the top left",
)
#: The random model's image, height x width in codes, and its sampling: the release's.
RANDOM_GRID = (4, 16)
RANDOM_SAMPLING = {"guidance_scale": 3.0, "image_top_k": 5120, "image_temperature": 1.0, "do_sample": True}
RANDOM_NOTE = (
    "random weights: how many guesses it accepts, and so its passes and speed-up, say nothing about trained models; "
    "the cost of a pass does"
)
#: Positions x batch of one pass with the whole released vocabulary, of which several tensors are held.
_MOST_RANDOM_POSITIONS = 160


@dataclass(frozen=True)
class Decoder:
    """One row of the table.

    Args:
        name (`str`): what the row is called.
        width (`int`): codes that a pass computes.
        settings (`dict`): of `generate`, `image_decoder` among them.
        batch_sizes (`tuple[int, ...]`): at which it is timed.
    """

    name: str
    width: int
    settings: dict[str, Any] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = (1, 8)


@dataclass(frozen=True)
class Subject:
    """A model, and the images it is to make.

    Args:
        inputs (`dict[str, torch.Tensor]`): of `generate`, one row a prompt.
        settings (`dict`): of `generate`, the same for all decoders.
        grid (`tuple[int, int]`): height and width in codes.
        num_single (`int`): images of one repetition at batch 1.
    """

    model: Emu35ForConditionalGeneration
    inputs: dict[str, torch.Tensor]
    settings: dict[str, Any]
    grid: tuple[int, int]
    num_single: int = 1

    @property
    def num_codes(self) -> int:
        return self.grid[0] * self.grid[1]

    def generate(self, first: int, batch: int, seed: int, decoder: Decoder, **arguments):
        """Images `first` to `first + batch` of a repetition; each has a seed of its own."""
        rows = torch.arange(first, first + batch) % len(self.inputs["input_ids"])
        generators = [torch.Generator().manual_seed(seed + row) for row in range(first, first + batch)]
        inputs = {name: tensor[rows.to(tensor.device)] for name, tensor in self.inputs.items()}
        return self.model.generate(**inputs, generator=generators, **self.settings, **decoder.settings, **arguments)


def bench_decode(quick: bool, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """`ar` and `speculative` on the tiny checkpoint and on random weights; see [`measure_decoders`]."""
    windows, repeats = (QUICK_WINDOWS, 3) if quick else (WINDOWS, 5)
    random = random_subject((2, 8) if quick else RANDOM_GRID, device, dtype, seed)
    couplings = (DEFAULT_COUPLING,) if quick else COUPLINGS
    measured = measure_decoders(random, _random_decoders(random, windows, couplings), repeats, device, seed, traced=1)
    results: dict[str, Any] = {"repeats": repeats, "random": {**measured, "note": RANDOM_NOTE}}
    tiny = tiny_subject(device, dtype, num_prompts=2 if quick else len(PROMPTS))
    if tiny is None:
        return results | {"tiny": {"skipped": "the tiny checkpoint is not in this installation"}}
    results["tiny"] = measure_decoders(tiny, exact_decoders(tiny, windows), repeats, device, seed, traced=repeats)
    _project(results["random"], results["tiny"])
    return results


def tiny_subject(device: str, dtype: torch.dtype, num_prompts: int) -> Subject | None:
    """The tiny checkpoint with its own settings; `None` where it is not installed."""
    from . import TINY

    if not Path(TINY, "config.json").is_file():
        return None
    model = Emu35ForConditionalGeneration.from_pretrained(TINY, dtype=dtype).eval().to(device)
    inputs = Emu35Processor.from_pretrained(TINY)(text=list(PROMPTS[:num_prompts]), task="t2i").to(device)
    factor = model.config.vision_tokenizer_config.downsampling_factor
    grid = (model.generation_config.height // factor, model.generation_config.width // factor)
    return Subject(model, dict(inputs), {"task": "t2i"}, grid, num_single=num_prompts)


def random_subject(grid: tuple[int, int], device: str, dtype: torch.dtype, seed: int) -> Subject:
    """The small decoder of `bench image`: random weights, the released vocabulary and sampling."""
    model = build_model(TINY_DECODER, device, dtype, seed)
    draws = torch.Generator().manual_seed(seed)
    prompts, negatives = (torch.randint(1000, 100_000, (8, length), generator=draws).to(device) for length in (64, 16))
    sizes = {"generation_mode": "image", "height": 16 * grid[0], "width": 16 * grid[1]}
    inputs = {"input_ids": prompts, "negative_prompt_ids": negatives}
    return Subject(model, inputs, {**sizes, **RANDOM_SAMPLING}, grid)


def exact_decoders(
    subject: Subject, windows: Sequence[int] = WINDOWS, couplings: Sequence[str] = COUPLINGS
) -> list[Decoder]:
    """`ar`, and `speculative` with every coupling and every window that is no wider than the image."""
    decoders = [Decoder("ar", 1, {"image_decoder": "ar"})]
    for coupling in couplings:
        for window in windows:
            if window <= subject.num_codes:
                settings = {"image_decoder": "speculative", "coupling": coupling, "speculative_window": window}
                decoders.append(Decoder(f"{coupling} {window}", window + 1, settings))
    return decoders


def _random_decoders(subject: Subject, windows: Sequence[int], couplings: Sequence[str]) -> list[Decoder]:
    """Batches only with the default coupling, and where a pass is not too large: couplings cost about the same."""
    decoders = []
    for decoder in exact_decoders(subject, windows, couplings):
        fits = 8 * decoder.width <= _MOST_RANDOM_POSITIONS
        batched = fits and decoder.settings.get("coupling", DEFAULT_COUPLING) == DEFAULT_COUPLING
        decoders.append(decoder if batched else Decoder(decoder.name, decoder.width, decoder.settings, (1,)))
    return decoders


def measure_decoders(
    subject: Subject, decoders: Sequence[Decoder], repeats: int, device: str, seed: int = 0, traced: int = 1
) -> dict[str, Any]:
    """Makes the same images with every decoder, by turns.

    Args:
        decoders (`Sequence[Decoder]`): the first one is what the others are compared with.
        repeats (`int`): of the timed runs, whose median counts.
        seed (`int`): of the images, which are the same for all decoders.
        traced (`int`): repetitions that are run once more without a clock, and before: they warm everything up, and
            tell how many guesses each pass had.
    Returns:
        `dict`: "grid", "images", "decoders". Each of those has the decoder's name and settings, passes an image, codes
        a pass, what [`acceptance_statistics`] gives, and "batches": for each batch size the seconds an image (those
        of every repetition, and their median), the speed-up (median of the ratios within a repetition), and the cost
        model: passes x seconds of the network alone in a pass of this width.
    """
    counts: dict[str, list[tuple[ImageStatistics, list[int]]]] = {decoder.name: [] for decoder in decoders}
    for repeat in range(traced):
        for decoder in tqdm(decoders, desc="trace", disable=None, leave=False):
            for image in range(subject.num_single):
                counts[decoder.name].append(_trace(subject, image, _seed(seed, repeat), decoder))
    runs = [(decoder, batch) for batch in (1, 8) for decoder in decoders if batch in decoder.batch_sizes]
    seconds: dict[tuple[str, int], list[float]] = {(decoder.name, batch): [] for decoder, batch in runs}
    passes: dict[tuple[str, int], list[int]] = {key: [] for key in seconds}
    networks = {batch: _Network(subject, batch) for _, batch in runs}
    alone: dict[tuple[int, int], list[float]] = {(decoder.width, batch): [] for decoder, batch in runs}
    for width, batch in alone:
        networks[batch](width)
    for repeat in range(repeats):
        for (width, batch), own in alone.items():
            own += [timed(lambda width=width, batch=batch: networks[batch](width), device) for _ in range(3)]
        for decoder, batch in tqdm(runs, desc=f"repetition {repeat + 1}", disable=None, leave=False):
            key, outputs = (decoder.name, batch), []
            num_images = batch if batch > 1 else subject.num_single

            def make(decoder=decoder, batch=batch, num_images=num_images, repeat=repeat, outputs=outputs):
                for first in range(0, num_images, batch):
                    outputs.append(subject.generate(first, batch, _seed(seed, repeat), decoder))

            seconds[key].append(timed(make, device) / num_images)
            passes[key] += [output.num_forward_passes for output in outputs]
    rows = []
    for decoder in decoders:
        row: dict[str, Any] = {"name": decoder.name, **decoder.settings, "passes": mean(passes[decoder.name, 1])}
        row["codes_per_pass"] = subject.num_codes / row["passes"]
        row |= acceptance_statistics(counts[decoder.name], subject.num_codes)
        row["batches"] = []
        for batch in decoder.batch_sizes:
            key = (decoder.name, batch)
            own, reference = seconds[key], seconds[decoders[0].name, batch]
            network = median(alone[decoder.width, batch])
            row["batches"].append(
                {
                    "batch_size": batch,
                    "passes_per_call": mean(passes[key]),
                    "seconds_per_image": median(own),
                    "images_per_second": 1 / median(own),
                    "speedup": median(theirs / ours for theirs, ours in zip(reference, own, strict=True)),
                    "seconds_per_pass": median(own) * batch / mean(passes[key]),
                    "network_seconds_per_pass": network,
                    "network_seconds_per_image": network * mean(passes[key]) / batch,
                    "seconds": own,
                }
            )
        rows.append(row)
    return {"grid": list(subject.grid), "traced_images": traced * subject.num_single, "decoders": rows}


def _seed(seed: int, repeat: int) -> int:
    return seed + 1000 * repeat


def _trace(subject: Subject, image: int, seed: int, decoder: Decoder) -> tuple[ImageStatistics, list[int]]:
    """One image: its statistics, and how many codes each pass settled."""
    layout = subject.model.config.token_layout
    advances: list[int] = []
    hook = subject.model.model.register_forward_hook(lambda *_: advances.append(0))

    def count(ids: torch.LongTensor, _scores) -> bool:
        made = ids[0, subject.inputs["input_ids"].shape[1] :]  # the last one may be an EOL
        visual = (made >= layout.visual_token_offset) & (made < layout.visual_token_end)
        if advances:
            advances[-1] += int(visual.sum()) - sum(advances)
        return False

    try:
        output = subject.generate(image, 1, seed, decoder, stopping_criteria=[count])
    finally:
        hook.remove()
    return output.image_statistics[0][0], [codes for codes in advances if codes]


def acceptance_statistics(images: Sequence[tuple[ImageStatistics, list[int]]], num_codes: int) -> dict[str, Any]:
    """What became of the guesses, and how many passes that predicts.

    Args:
        images: for each one its statistics, and how many codes each pass settled.
        num_codes (`int`): of an image.
    Returns:
        `dict`: "acceptance" (share of all guesses), "acceptance_by_position" (the S_i of this file's head),
        "guesses_by_position", "first_pass_guesses" (whether there were any before the first pass),
        "expected_codes_per_pass" of an endless image, "predicted_passes" of this one. Empty for a decoder that does
        not guess.
    """
    window = len(images[0][0].accepted_at)
    if not window:
        return {}
    guesses, accepted, first = [0] * window, [0] * window, 0
    for statistics, advances in images:
        left = [num_codes - sum(advances[:done]) for done in range(len(advances))]
        counts = [min(window, codes) for codes in left]
        counts[0] -= sum(counts) - statistics.num_drafted  # a first pass has perhaps nothing to guess from
        first = counts[0]
        for position in range(window):
            guesses[position] += sum(count > position for count in counts)
            accepted[position] += statistics.accepted_at[position]
    shares = [own / total if total else 0.0 for own, total in zip(accepted, guesses, strict=True)]
    return {
        "acceptance": sum(accepted) / sum(guesses),
        "acceptance_by_position": shares,
        "guesses_by_position": guesses,
        "expected_codes_per_pass": 1 + sum(shares),
        "first_pass_guesses": first > 0,
        "predicted_passes": predicted_passes(shares, num_codes, first > 0),
    }


def predicted_passes(
    acceptance_by_position: Sequence[float], num_codes: int, first_pass_guesses: bool = True
) -> float:
    """Expected passes for an image of `num_codes` if each pass is a new trial: E_r of this file's head."""
    if not first_pass_guesses:
        return 1 + predicted_passes(acceptance_by_position, num_codes - 1)
    shares = [1.0]
    for share in acceptance_by_position:
        shares.append(min(share, shares[-1]))  # estimates of different samples need not fall
    expected = [0.0]
    for left in range(1, num_codes + 1):
        reach = shares[: left + 1]
        ends = [here - after for here, after in zip(reach, [*reach[1:], 0.0], strict=True)]
        expected.append(1 + sum(end * expected[max(left - k - 1, 0)] for k, end in enumerate(ends)))
    return expected[-1]


class _Network:
    """The network alone in a pass in the middle of an image: the layers and the visual rows of the output matrix.

    A pass has conditional and unconditional rows, and EOLs as the grid has them.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject, batch: int):
        self.model, (height, self.width) = subject.model, subject.grid
        layout = self.model.config.token_layout
        rows = batch * (2 if "negative_prompt_ids" in subject.inputs else 1)
        prompt = subject.inputs["input_ids"]
        before = prompt.shape[1] + height * (self.width + 1) // 2
        self.ids = torch.full((rows, before), layout.visual_token_offset, device=prompt.device)
        self.cache = DynamicCache(config=self.model.model.config)
        self.model.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def __call__(self, codes: int):
        tokens = codes + (codes - 1) // self.width
        new = self.ids[:, :1].expand(-1, tokens)
        hidden_states = self.model.model(input_ids=new, past_key_values=self.cache, use_cache=True).last_hidden_state
        self.model.compute_logits(hidden_states[:, -codes:].flatten(0, 1), vocabulary="visual")
        self.cache.crop(-tokens)


def _project(random: dict[str, Any], tiny: dict[str, Any]):
    """Adds to the random model's rows: codes a pass that pay for its width, and what tiny's acceptance would give."""
    trained = {row["name"]: row for row in tiny["decoders"]}
    by_batch = {own["batch_size"]: own for own in random["decoders"][0]["batches"]}
    for row in random["decoders"]:
        like = trained.get(row["name"], {})
        for own in row["batches"]:
            cost = own["seconds_per_pass"] / by_batch[own["batch_size"]]["seconds_per_pass"]
            own["break_even_codes_per_pass"] = cost
            if "acceptance" in like and own["batch_size"] == 1:
                num_codes = random["grid"][0] * random["grid"][1]
                passes = predicted_passes(like["acceptance_by_position"], num_codes, like["first_pass_guesses"])
                own["projected_speedup"] = num_codes / passes / cost


def decode_targets(results: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """Name, target, measured value, whether it is reached: of the tiny checkpoint with the default window."""
    rows = {row["name"]: row for row in results["tiny"].get("decoders", [])}
    row = rows.get(f"{DEFAULT_COUPLING} {DEFAULT_WINDOW}")
    if row is None:
        return []
    fewer, faster = rows["ar"]["passes"] / row["passes"], row["batches"][0]["speedup"]
    return [
        ("decode: passes of ar by those of speculative", ">= 2.5", fewer, fewer >= 2.5),
        ("decode: speed-up over ar at batch 1", ">= 1.6", faster, faster >= 1.6),
    ]


_THEORY = (
    "guesses accepted; all of the first n; codes a pass, by theory if the image had no end; passes, by theory; what a "
    "pass costs;\nbreak-even: codes a pass that pay for it; projected: speed-up with the acceptance of emu35-tiny"
)


def decode_tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    tables = []
    for name, title in (("tiny", "emu35-tiny"), ("random", "random weights, released vocabulary")):
        measured = results[name]
        if "skipped" in measured:
            tables.append((f"{title}: skipped: {measured['skipped']}", [], []))
            continue
        height, width = measured["grid"]
        title = f"{title}: images of {height} x {width} codes, median of {results['repeats']}"
        if "note" in measured:
            title += f"\n({measured['note']})"
        tables += [
            (f"{title}\n", *speed_table(measured["decoders"])),
            (f"{_THEORY}\n", *_theory_table(measured["decoders"])),
        ]
    return tables


def speed_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the "decoders" that [`measure_decoders`] gives."""
    head = ["decoder", "passes", "batch 1: ms/image", "images/s", "speed-up", "of it network, ms"]
    head += ["batch 8: ms/image", "images/s", "speed-up", "of it network, ms"]
    lines = []
    for row in rows:
        line = [row["name"], f"{row['passes']:.1f}"]
        by_batch = {own["batch_size"]: own for own in row["batches"]}
        for batch in (1, 8):
            own = by_batch.get(batch)
            line += (
                ["", "", "", ""]
                if own is None
                else [
                    f"{1000 * own['seconds_per_image']:.0f}",
                    f"{own['images_per_second']:.2f}",
                    f"{own['speedup']:.2f}",
                    f"{1000 * own['network_seconds_per_image']:.0f}",
                ]
            )
        lines.append(line)
    return head, lines


def _theory_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    shown = (1, 2, 4, 8, 16, 32)
    head = ["guesses", "accepted", *(f"1..{place}" for place in shown), "codes/pass", "no end", "passes", "theory"]
    head += ["ms/pass", "network", "break-even", "projected"]
    lines = []
    for row in rows:
        if "acceptance" not in row:
            continue
        shares, single = row["acceptance_by_position"], row["batches"][0]
        lines.append(
            [
                row["name"],
                f"{row['acceptance']:.1%}",
                *(f"{shares[place - 1]:.0%}" if place <= len(shares) else "" for place in shown),
                f"{row['codes_per_pass']:.2f}",
                f"{row['expected_codes_per_pass']:.2f}",
                f"{row['passes']:.1f}",
                f"{row['predicted_passes']:.1f}",
                f"{1000 * single['seconds_per_pass']:.1f}",
                f"{1000 * single['network_seconds_per_pass']:.1f}",
                *(
                    f"{single[name]:.2f}" if name in single else ""
                    for name in ("break_even_codes_per_pass", "projected_speedup")
                ),
            ]
        )
    return head, lines
