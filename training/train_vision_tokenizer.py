"""Stage 1: the visual vocabulary.  Trains [`Emu35VisionTokenizer`] on the world of shapes.

    emu35 train training/recipes/tiny.yaml      # all four stages; this one takes about ten minutes on two CPU cores

The stage is a list of phases:

1. `autoencoder`: no quantisation, so that the latents settle before there is a codebook.
2. `ibq`: begins, the first time, with a k-means++ codebook of those latents; then IBQ's straight-through.
3. `decoder`: codes are fixed, the decoder learns to draw exactly what they say.

A language model has to predict these codes, so the same content should always get the same codes. Convolutions see the
neighbours, too; two terms make that not matter: latents of identical cells (pixel for pixel) are pulled to their mean,
and their codes to those that this mean had in the first codebook, which tells all cells apart.

Everything is drawn from (seed, step, rank), so a run that was killed continues on the same loss curve.
"""

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emu35.configuration_emu35 import Emu35VisionTokenizerConfig
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer, to_uint8_pixels
from torch import nn
from tqdm.auto import tqdm

from .checkpointing import LossLog, load_state, save_state
from .distributed import average_gradients_, broadcast_, launch
from .shapes.checker import read_scenes
from .shapes.render import render
from .shapes.scene import (
    BACKGROUNDS,
    CELL_SIZE,
    COLORS,
    GRID_SIZE,
    HELD_OUT,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    sample_scene,
)
from .shapes.scoring import score_scene

logger = logging.getLogger(__name__)

PHASES = ("autoencoder", "ibq", "decoder")


@dataclass
class VisionTokenizerRecipe:
    """The `vision_tokenizer` part of a recipe.

    Args:
        model (`dict`): fields of [`Emu35VisionTokenizerConfig`].
        phases (`list[dict]`): `name` (one of `PHASES`), `steps` and peak `learning_rate` of each phase in turn.
        batch_size (`int`): images a step and process.
        num_processes (`int`): processes whose gradients are averaged, one thread each.
        seed (`int`): of weights and data.
        crowded (`float`): share of images with an object in every cell with probability 0.7 (the rest are scenes).
        latent_noise (`float`): standard deviation of the noise on latents in the phase `autoencoder`.
        latent_consistency, code_consistency (`float`): weights of the two terms above.
        codebook_samples (`int`): images whose latents make the first codebook.
        warmup_steps (`int`), final_learning_rate (`float`): of each phase; the latter as a share of the peak.
        weight_decay, gradient_clip (`float`): of AdamW.
        bf16 (`bool`): autocast.
        log_every, save_every (`int`): in steps.
    """

    model: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    batch_size: int = 16
    num_processes: int = 2
    seed: int = 0
    crowded: float = 0.75
    latent_noise: float = 0.05
    latent_consistency: float = 0.3
    code_consistency: float = 0.1
    codebook_samples: int = 512
    warmup_steps: int = 30
    final_learning_rate: float = 0.02
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    bf16: bool = True
    log_every: int = 10
    save_every: int = 250

    def __post_init__(self):
        for phase in self.phases:
            if phase.get("name") not in PHASES or set(phase) != {"name", "steps", "learning_rate"}:
                raise ValueError(
                    f"`phases` must hold `name` ({', '.join(PHASES)}), `steps` and `learning_rate`, got {phase}."
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VisionTokenizerRecipe":
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"`vision_tokenizer` has no {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**values)

    @property
    def num_steps(self) -> int:
        return sum(phase["steps"] for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """Index of the phase of a step, and the step within it."""
        for index, phase in enumerate(self.phases):
            if step < phase["steps"]:
                return index, step
            step -= phase["steps"]
        raise ValueError(f"`step` is past the last phase by {step}.")

    def learning_rate(self, phase: int, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_learning_rate` of the peak."""
        peak, steps = self.phases[phase]["learning_rate"], self.phases[phase]["steps"]
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return peak * (
            self.final_learning_rate + (1 - self.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
        )


class CellWorld:
    """Images put together from the world's cells: many times faster than rendering, and any cell can meet any other.

    Cells are numbered `background * (kinds + 1) + kind`; the last kind is the empty cell.

    A vision tokenizer is for all images, so held-out pairs of colour and shape are drawn, too: it is the language
    model that must not see them.
    """

    def __init__(self):
        self.kinds = [(shape, color, size) for shape in SHAPES for color in COLORS for size in SIZES]
        self.empty = len(self.kinds)
        cells = []
        for background in BACKGROUNDS:
            for shape, color, size in self.kinds:
                scene = Scene((SceneObject(shape, color, size, 0, 0),), background)
                cells.append(render(scene)[:CELL_SIZE, :CELL_SIZE])
            cells.append(render(scene)[-CELL_SIZE:, -CELL_SIZE:])
        self.cells = np.stack(cells)  # (num_cells, CELL_SIZE, CELL_SIZE, 3)

    def draw(self, rng: np.random.Generator, number: int, crowded: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and what their cells hold.

        Returns:
            pixels `(number, 3, height, width)` in [-1, 1]; cell numbers `(number, GRID_SIZE, GRID_SIZE)`.
        """
        count = GRID_SIZE**2
        objects = np.where(rng.random(number) < crowded, rng.binomial(count, 0.7, number), rng.integers(1, 4, number))
        filled = rng.random((number, count)).argsort(1) < objects[:, None]
        kinds = np.where(filled, rng.integers(self.empty, size=(number, count)), self.empty)
        numbers = rng.integers(len(BACKGROUNDS), size=(number, 1)) * (self.empty + 1) + kinds
        grid = self.cells[numbers.reshape(number, GRID_SIZE, GRID_SIZE)]  # (number, rows, columns, y, x, 3)
        pixels = grid.transpose(0, 5, 1, 3, 2, 4).reshape(number, 3, GRID_SIZE * CELL_SIZE, GRID_SIZE * CELL_SIZE)
        return torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(numbers).view(-1, GRID_SIZE, GRID_SIZE)

    def is_held_out(self, numbers: np.ndarray) -> np.ndarray:
        """Which cell numbers show a pair of colour and shape that language models must not see in training."""
        held_out = np.array([(color, shape) in HELD_OUT for shape, color, _ in self.kinds] + [False])
        return held_out[numbers % (self.empty + 1)]

    def number_of(self, scene: Scene) -> np.ndarray:
        """Cell numbers `(GRID_SIZE, GRID_SIZE)` of a scene."""
        numbers = np.full((GRID_SIZE, GRID_SIZE), self.empty)
        for o in scene.objects:
            numbers[o.row, o.column] = self.kinds.index((o.shape, o.color, o.size))
        return numbers + tuple(BACKGROUNDS).index(scene.background) * (self.empty + 1)


def content_of_codes(cells: torch.Tensor, side: int) -> torch.Tensor:
    """A number for what each code of a grid shows: cell and place within it.

    Args:
        cells (`torch.Tensor` of shape `(batch, rows, columns)`): cell numbers.
        side (`int`): codes a cell side.
    Returns:
        `torch.LongTensor` of shape `(batch, rows * side, columns * side)`.
    """
    place = torch.arange(side * side).view(side, side).repeat(cells.shape[1], cells.shape[2])
    spread = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return spread * side * side + place.to(cells.device)


def _mean_of_groups(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of rows with equal `groups`: `(num_groups, D)`, and the row of it for each row of `values`."""
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts), values.shape[-1]).index_add_(0, index, values)
    return sums / counts[:, None], index


def _rows(latents: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) -> (B*h*w, D)"""
    return latents.permute(0, 2, 3, 1).flatten(0, 2).float()


def _difference(drawn: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The square finds rare objects early, where an absolute difference settles for the background; the absolute
    difference makes sharp edges later."""
    return F.mse_loss(drawn.float(), pixels) + 0.3 * F.l1_loss(drawn.float(), pixels)


@torch.no_grad()
def kmeans_codebook(points: torch.Tensor, size: int, generator: torch.Generator, iterations: int = 30) -> torch.Tensor:
    """k-means++ start and Lloyd's iterations.  Source: Arthur and Vassilvitskii, 2007.

    Args:
        points (`torch.Tensor` of shape `(num_points, dim)`): at least one. With fewer points than codes, the rest are
            points moved a little.
        size (`int`): number of centres.
        generator (`torch.Generator`): on the CPU.
    Returns:
        `torch.Tensor` of shape `(size, dim)`.
    """
    points = points.float().cpu()
    first = torch.randint(len(points), (1,), generator=generator)
    centres = [points[first[0]]]
    distance = (points - centres[0]).square().sum(1)
    while len(centres) < size:
        weights = distance if distance.max() > 1e-8 else torch.ones_like(distance)
        chosen = points[torch.multinomial(weights, 1, generator=generator)[0]]
        if distance.max() <= 1e-8:
            chosen = chosen + 1e-2 * torch.randn(chosen.shape, generator=generator)
        centres.append(chosen)
        distance = torch.minimum(distance, (points - chosen).square().sum(1))
    centres = torch.stack(centres)
    for _ in range(iterations):
        means, index = torch.zeros_like(centres), torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(index, minlength=size)
        means.index_add_(0, index, points)
        centres = torch.where(counts[:, None] > 0, means / counts.clamp_min(1)[:, None], centres)
    return centres


def tell_apart(codebook: torch.Tensor, cells: torch.Tensor, known: torch.Tensor, size: int) -> torch.Tensor:
    """Add codes, one by one, where two cells have all their codes in common; after that, where the error is worst.

    Args:
        codebook (`torch.Tensor` of shape `(num_codes, dim)`): rows of unit length.
        cells (`torch.Tensor` of shape `(num_cells, codes_a_cell, dim)`): latents of unit length.
        known (`torch.BoolTensor` of shape `(num_cells,)`): cells whose latents may become codes; others if need be.
        size (`int`): number of codes wanted.
    Returns:
        `torch.Tensor` of shape `(size, dim)`: `codebook` and the new rows, each the latent of some cell.
    """
    apart = torch.cdist(cells.transpose(0, 1), cells.transpose(0, 1))  # (codes_a_cell, num_cells, num_cells)
    while len(codebook) < size:
        similarity, words = (cells @ codebook.T).max(dim=-1)  # (num_cells, codes_a_cell)
        same = (words[:, None] == words[None]).all(-1) & ~torch.eye(len(cells), dtype=torch.bool)
        if same.any():
            place, pair = divmod(int((apart * same).argmax()), len(cells) ** 2)
            # Of the two, a known one whose latent is not a code yet, and the one that its code fits worse.
            cell = min(
                divmod(pair, len(cells)),
                key=lambda i: (float(similarity[i, place]) > 0.999, not known[i], float(similarity[i, place])),
            )
        else:
            cell, place = divmod(int((similarity + 2.0 * ~known[:, None]).argmin()), cells.shape[1])
        codebook = torch.cat([codebook, cells[cell, place][None]])
    return codebook


class _Trainer:
    """One process of the stage."""

    def __init__(self, rank: int, recipe: VisionTokenizerRecipe, device: str):
        self.rank, self.recipe, self.device = rank, recipe, torch.device(device)
        torch.manual_seed(recipe.seed)
        config = Emu35VisionTokenizerConfig(**recipe.model)
        self.model = Emu35VisionTokenizer(config).to(self.device, memory_format=torch.channels_last).train()
        self.world = CellWorld()
        self.side = CELL_SIZE // config.downsampling_factor
        # Content number -> code, set by `start_codebook`. Negative: seen in none of its images, so not a target.
        num_contents = len(self.world.cells) * self.side**2
        self.given_codes = torch.full((num_contents,), -100, device=self.device)
        self.optimizer: torch.optim.Optimizer | None = None

    def parameters(self, phase: str) -> list[nn.Parameter]:
        """What a phase trains."""
        model = self.model
        if phase == "decoder":
            return [*model.post_quant_conv.parameters(), *model.decoder.parameters()]
        return [p for name, p in model.named_parameters() if phase == "ibq" or not name.startswith("quantize.")]

    def make_optimizer(self, phase: str):
        matrices = [p for p in self.parameters(phase) if p.ndim > 1]
        vectors = [p for p in self.parameters(phase) if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))

    def batch(self, step: int, number: int | None = None, stream: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh images of a step, and the content number of each code."""
        rng = np.random.default_rng((self.recipe.seed, stream, step, self.rank))
        pixels, cells = self.world.draw(rng, number or self.recipe.batch_size, self.recipe.crowded)
        content = content_of_codes(cells, self.side).to(self.device)
        return pixels.to(self.device, memory_format=torch.channels_last), content

    @torch.no_grad()
    def start_codebook(self):
        """The first codebook: most of it by k-means, the rest spent on cells that k-means cannot tell apart.

        k-means sees the mean latent of each content, so that the empty cell does not get most of the codes, and only
        of contents that a language model is trained on, so that held-out ones are made of codes it knows.
        """
        model = self.model.eval()
        rows, contents = [], []
        for start in range(0, self.recipe.codebook_samples, 64):
            pixels, content = self.batch(start, 64, stream=1)
            rows.append(F.normalize(_rows(model.latents(pixels)), dim=-1))
            contents.append(content.flatten())
        contents = torch.cat(contents)
        means = F.normalize(_mean_of_groups(torch.cat(rows), contents)[0], dim=-1).cpu()
        cells = means.unflatten(0, (-1, self.side**2))  # sorted by content, so the places of a cell stand together
        known = torch.from_numpy(
            ~self.world.is_held_out(contents.unique().cpu().numpy()[:: self.side**2] // self.side**2)
        )
        size = model.config.codebook_size
        generator = torch.Generator().manual_seed(self.recipe.seed)
        codebook = kmeans_codebook(cells[known].flatten(0, 1), size - size // 4, generator)
        codebook = tell_apart(F.normalize(codebook, dim=-1), cells, known, size).to(self.device)
        broadcast_(codebook)
        model.quantize.embedding.weight.copy_(codebook)
        self.given_codes[contents.unique()] = (means.to(self.device) @ codebook.T).argmax(-1)
        broadcast_(self.given_codes)
        model.train()

    def losses(self, phase: str, step: int) -> dict[str, torch.Tensor]:
        recipe, model, config = self.recipe, self.model, self.model.config
        pixels, content = self.batch(step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            if phase == "decoder":
                with torch.no_grad():
                    codes = model.encode(pixels)
                return {"reconstruction": _difference(model.decode_latents(model.quantize.decode(codes)), pixels)}
            if phase == "autoencoder":
                latents = model.latents(pixels)
                unit = F.normalize(latents.float(), dim=1)
                noise = torch.Generator().manual_seed(hash((recipe.seed, step, self.rank)) % 2**62)
                noise = torch.randn(unit.shape, generator=noise).to(self.device) * recipe.latent_noise
                drawn = model.decode_latents(F.normalize(unit + noise, dim=1))
                losses = {"reconstruction": _difference(drawn, pixels)}
            else:
                output = model(pixels, return_loss=True)
                latents = output.latents
                losses = {
                    "reconstruction": _difference(output.reconstruction, pixels),
                    "quantization": config.quantization_loss_weight * output.quantization_loss,
                    "commitment": config.commitment_loss_weight * output.commitment_loss,
                    "entropy": config.entropy_loss_weight * output.entropy_loss,
                }
        rows, groups = F.normalize(_rows(latents), dim=-1), content.flatten()
        means, index = _mean_of_groups(rows, groups)
        # From the first step on, the easiest way to equal latents would be one latent for everything.
        index_of_phase, within = recipe.phase_at(step)
        ramp = min(1.0, within / recipe.phases[index_of_phase]["steps"] * 2) if phase == "autoencoder" else 1.0
        losses["latent_consistency"] = ramp * recipe.latent_consistency * F.mse_loss(rows, means.detach()[index])
        if phase == "ibq":
            logits = config.logit_scale * rows @ F.normalize(model.quantize.embedding.weight, dim=-1).T
            losses["code_consistency"] = recipe.code_consistency * F.cross_entropy(logits, self.given_codes[groups])
        return losses

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its losses."""
        index, within = self.recipe.phase_at(step)
        phase = self.recipe.phases[index]["name"]
        if within == 0:
            names = [earlier["name"] for earlier in self.recipe.phases[:index]]
            if phase == "ibq" and "ibq" not in names:
                self.start_codebook()
            self.make_optimizer(phase)
        elif self.optimizer is None:
            raise RuntimeError("no optimiser: the state of a phase begun earlier was not loaded")
        losses = self.losses(phase, step)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        parameters = self.parameters(phase)
        average_gradients_(parameters)
        nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
        rate = self.recipe.learning_rate(index, within)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()} | {"learning_rate": rate}

    def state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "recipe": json.dumps(asdict(self.recipe), sort_keys=True),
            "model": self.model.state_dict(),
            "given_codes": self.given_codes,
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
        }

    def load(self, state: dict[str, Any], path: Path):
        if state["recipe"] != json.dumps(asdict(self.recipe), sort_keys=True):
            raise ValueError(
                f"{path} is of a run with another recipe. Use another output folder, or delete it to start again."
            )
        self.model.load_state_dict(state["model"])
        self.given_codes.copy_(state["given_codes"])
        step = state["step"]
        if step < self.recipe.num_steps and self.recipe.phase_at(step)[1] > 0:
            self.make_optimizer(self.recipe.phases[self.recipe.phase_at(step)[0]]["name"])
            self.optimizer.load_state_dict(state["optimizer"])


def _work(rank: int, recipe: VisionTokenizerRecipe, output_dir: str, device: str, progress: bool):
    state_path = Path(output_dir, "training_state.pt")
    trainer = _Trainer(rank, recipe, device)
    first = 0
    if (state := load_state(state_path)) is not None:
        trainer.load(state, state_path)
        first = state["step"]
    log = LossLog(Path(output_dir, "losses.jsonl"), first) if rank == 0 else None
    bar = tqdm(
        total=recipe.num_steps, initial=first, disable=rank > 0 or not progress, desc="vision tokenizer", unit="step"
    )
    started = time.monotonic()
    for step in range(first, recipe.num_steps):
        losses = trainer.step(step)
        if rank > 0:
            continue
        phase = recipe.phases[recipe.phase_at(step)[0]]["name"]
        if step % recipe.log_every == 0 or step == recipe.num_steps - 1:
            log.write(step, phase=phase, **losses, seconds=round(time.monotonic() - started, 1))
            bar.set_postfix(phase=phase, reconstruction=f"{losses['reconstruction']:.4f}")
        bar.update()
        if (step + 1) % recipe.save_every == 0 or step == recipe.num_steps - 1:
            save_state(state_path, trainer.state(step + 1))
    bar.close()
    if rank == 0:
        trainer.model.eval().to(memory_format=torch.contiguous_format).save_pretrained(output_dir)


def train_vision_tokenizer(
    recipe: dict[str, Any] | VisionTokenizerRecipe,
    output_dir: str | os.PathLike,
    device: str = "cpu",
    progress: bool = True,
) -> Emu35VisionTokenizer:
    """Stage 1: train the vision tokenizer, or continue a run that was interrupted.

    Args:
        recipe (`dict` or `VisionTokenizerRecipe`): the `vision_tokenizer` part of a recipe.
        output_dir (`str` or `os.PathLike`): gets the checkpoint (`config.json`, `model.safetensors`), the log
            (`losses.jsonl`) and what is needed to resume (`training_state.pt`).
        device (`str`): processes on a GPU share it.
        progress (`bool`): show a progress bar.
    Returns:
        the trained model, in evaluation mode on the CPU.
    Raises:
        ValueError: if the recipe is wrong, or `output_dir` holds a run of another recipe.
    """
    recipe = recipe if isinstance(recipe, VisionTokenizerRecipe) else VisionTokenizerRecipe.from_dict(recipe)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    launch(_work, recipe.num_processes, recipe, str(output_dir), device, progress)
    return Emu35VisionTokenizer.from_pretrained(output_dir).eval()


@torch.no_grad()
def evaluate_vision_tokenizer(
    model: Emu35VisionTokenizer, num_scenes: int = 1000, seed: int = 1, held_out: bool | None = None
) -> dict[str, float]:
    """Reconstruction by the checker, and how well the content of a cell determines its codes.

    Args:
        num_scenes (`int`): fresh scenes of 1 to 3 objects.
        seed (`int`): of the scenes.
        held_out (`bool`, *optional*): as in [`sample_scene`].
    Returns:
        `whole_scene`, `objects` (shares read back right), `psnr` (dB); `object_code_entropy`, `empty_code_entropy`
        (bits of a cell's codes together, given its content), `object_same_codes` (share of cells with the
        most frequent codes of their content); `codes_used`.
    """
    rng, world = np.random.default_rng(seed), CellWorld()
    side = CELL_SIZE // model.config.downsampling_factor
    right = objects = total = 0
    errors, contents, words, used = [], [], [], set()
    for start in range(0, num_scenes, 100):
        scenes = [sample_scene(rng, held_out=held_out) for _ in range(min(100, num_scenes - start))]
        pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
        codes = model.encode(pixels.float() / 127.5 - 1)
        drawn = to_uint8_pixels(model.decode(codes))
        errors.append((drawn.float() - pixels.float()).square().mean((1, 2, 3)))
        for scene, read in zip(scenes, read_scenes(drawn.permute(0, 2, 3, 1).numpy()), strict=True):
            marks = score_scene(scene, read)
            right += marks["whole_scene"]
            objects += marks["object"] * len(scene.objects)
            total += len(scene.objects)
        contents.append(np.stack([world.number_of(scene) for scene in scenes]).reshape(-1))
        cells = codes.unflatten(1, (GRID_SIZE, side)).unflatten(3, (GRID_SIZE, side)).transpose(2, 3)
        words.append(cells.reshape(-1, side * side).numpy())
        used |= set(codes.flatten().tolist())
    content, word = np.concatenate(contents), np.concatenate(words)
    empty = content % (world.empty + 1) == world.empty
    entropy = {name: _conditional_entropy(content[mask], word[mask]) for name, mask in (("o", ~empty), ("e", empty))}
    return {
        "whole_scene": right / num_scenes,
        "objects": objects / total,
        "psnr": float((10 * torch.log10(255.0**2 / torch.cat(errors).clamp_min(1e-3))).mean()),
        "object_code_entropy": entropy["o"][0],
        "empty_code_entropy": entropy["e"][0],
        "object_same_codes": entropy["o"][1],
        "empty_same_codes": entropy["e"][1],
        "codes_used": len(used),
    }


def _conditional_entropy(content: np.ndarray, words: np.ndarray) -> tuple[float, float]:
    """Bits of a row of `words` given its `content`, and the share of rows equal to the commonest of their content."""
    bits = same = 0.0
    for number in np.unique(content):
        _, counts = np.unique(words[content == number], axis=0, return_counts=True)
        bits += counts.sum() * math.log2(counts.sum()) - (counts * np.log2(counts)).sum()
        same += counts.max()
    return float(bits / len(content)), float(same / len(content))
