"""Self-distillation: a model's own answers as training sequences.  Source: Emu3.5 (arXiv 2510.26583, section 4.3).

    emu35 distill --task t2i --num 20000 --image-top-k 1 --out runs/distilled

What a model draws at a low temperature has fewer modes than what it was trained on, and codes that are drawn side by
side do not mix modes where there is one. A shard is a function of (seed, its number), so a run that was stopped goes
on with the first one that is missing.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emu35.configuration_emu35 import Emu35TokenLayout
from emu35.image_tokens_emu35 import find_images
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor
from emu35.prompts_emu35 import ImagePiece, unconditional_pieces
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .play import user_message
from .sequences import SequenceWriter, TokenSequence
from .shapes import EPISODES, Turn, caption, sample_scene

logger = logging.getLogger(__name__)

DRAWING_TASKS = ("t2i", *(task for task in EPISODES if task != "multi_vqa"))
"""Tasks whose answers have images."""
_STREAM = 4  # keeps these prompts apart from those of training steps (2, 3) and of evaluations


@torch.no_grad()
def distill(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    directory: str | os.PathLike,
    task: str = "t2i",
    num: int = 20000,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 1024,
    full_captions: float = 0.25,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Path]:
    """Writes a model's own answers to prompts of the training world, or to given ones, or what is missing of them.

    Args:
        model ([`Emu35ForConditionalGeneration`]), processor ([`Emu35Processor`]): what makes the answers.
        directory (`str` or `os.PathLike`): gets `TASK-00000.safetensors`, ...: `ids` (int32, all sequences one after
            the other), `offsets` (int64, where each begins, and the end), `prompt_lengths` (int64).
        task (`str`): one whose answers have images. Of a conversation, the first answer.
        num (`int`): prompts. An answer without a complete image is left out.
        seed (`int`): of prompts and sampling.
        batch_size (`int`), shard_size (`int`): answers made together, and in one file.
        full_captions (`float`): for t2i: share of captions that fix the whole scene.
        prompts (`Sequence[str]`, *optional*): for t2i: what the images show, instead of the world's captions.
        progress (`bool`): show a progress bar.
        settings: of `generate`, for example `image_top_p`, instead of the checkpoint's for the task.
    Returns:
        `list[Path]`: all shards of the task.
    Raises:
        ValueError: if the task makes no images, a number is not positive, or `directory` holds answers that were made
            in another way.
    """
    if task not in DRAWING_TASKS:
        raise ValueError(f"`task` must be one of {', '.join(DRAWING_TASKS)}, got {task!r}.")
    for name, value in {"num": num, "batch_size": batch_size, "shard_size": shard_size}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if not 0 <= full_captions <= 1:
        raise ValueError(f"`full_captions` must be in [0, 1], got {full_captions}.")
    if prompts is not None:
        if task != "t2i" or not prompts:
            raise ValueError("`prompts` must hold at least one text, and `task` be 't2i'. Or leave them out.")
        num = min(num, len(prompts))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.generation_config.with_settings(task, return_dict_in_generate=True, **settings)
    made_by = {"task": task, "seed": str(seed), "full_captions": str(full_captions), "shard_size": str(shard_size)}
    made_by["settings"] = json.dumps(settings, sort_keys=True)
    if prompts is not None:
        made_by["texts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    paths = [directory / f"{task}-{index:05d}.safetensors" for index in range(-(-num // shard_size))]
    with tqdm(total=num, desc=f"distill {task}", unit="answer", disable=not progress) as bar:
        for index, path in enumerate(paths):
            count = min(shard_size, num - index * shard_size)
            if _is_made(path, made_by, count):
                bar.update(count)
                continue
            rng = np.random.default_rng((seed, _STREAM, DRAWING_TASKS.index(task), index))
            if prompts is None:
                turns = [_first_turn(task, full_captions, rng) for _ in range(count)]
            else:
                turns = [Turn("user", (text,)) for text in prompts[index * shard_size :][:count]]
            generator = torch.Generator(model.device).manual_seed(int(rng.integers(2**63)))
            sequences = []
            for start in range(0, count, batch_size):
                batch = turns[start : start + batch_size]
                inputs = processor.apply_chat_template([[user_message(turn)] for turn in batch], task=task)
                output = model.generate(**inputs.to(model.device), generation_config=config, generator=generator)
                sequences += _complete_answers(output, inputs["input_ids"].shape[1], model.config.token_layout)
                bar.update(len(batch))
            _save(path, sequences, {**made_by, "prompts": str(count)})
    return paths


def _first_turn(task: str, full_captions: float, rng: np.random.Generator) -> Turn:
    if task != "t2i":
        return EPISODES[task].sample(rng, held_out=False).turns[0]
    scene = sample_scene(rng, int(rng.integers(1, 4)), held_out=False)
    return Turn("user", (caption(scene, rng, full=bool(rng.random() < full_captions)).text,))


def _complete_answers(output, prompt_width: int, layout: Emu35TokenLayout) -> Iterable[tuple[list[int], int]]:
    """(ids without padding, length of the prompt) of the answers that hold images, all of them complete."""
    for ids, kept in zip(output.sequences, output.attention_mask.bool(), strict=True):
        prompt_length = int(kept[:prompt_width].sum())
        row = ids[kept].tolist()
        images = list(find_images(row, layout, prompt_length))
        if images and all(image.complete for image in images):
            yield row, prompt_length


def _save(path: Path, sequences: list[tuple[list[int], int]], metadata: dict[str, str]):
    lengths = [len(ids) for ids, _ in sequences]
    tensors = {
        "ids": torch.tensor([token for ids, _ in sequences for token in ids], dtype=torch.int32),
        "offsets": torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0),
        "prompt_lengths": torch.tensor([length for _, length in sequences], dtype=torch.int64),
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def _is_made(path: Path, made_by: dict[str, str], count: int) -> bool:
    """Whether a shard is there, of at least so many prompts."""
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    different = [key for key, value in made_by.items() if metadata.get(key) != value]
    if different:
        raise ValueError(
            f"`directory`: {path} was made with another {', '.join(different)} ("
            + ", ".join(f"{key}: {metadata.get(key)}" for key in different)
            + "). Choose another folder."
        )
    return int(metadata.get("prompts", 0)) >= count


class DistilledWriter(SequenceWriter):
    """Writes sequences like [`SequenceWriter`], but takes a share of them from files.

    Kinds without files are drawn afresh.  With `caption_dropout` an answer has the unconditional prompt, with the
    prompt's images, and of the answer only the images.

    Args:
        tokenizer, layout, recipe, factor: as in [`SequenceWriter`].
        directory (`str` or `os.PathLike`): what [`distill`] has filled, or anyone with files of the same form.
        share (`float`): of the sequences of a kind that has files.
    Raises:
        ValueError: if there are no files.
    """

    def __init__(self, tokenizer, layout, recipe, factor, directory: str | os.PathLike, share: float):
        super().__init__(tokenizer, layout, recipe, factor)
        self.share, self._shards = share, {}
        for path in sorted(Path(directory).glob("*-*.safetensors")):
            with safe_open(path, "pt") as file:
                shard = (path, file.get_tensor("offsets").tolist(), file.get_tensor("prompt_lengths").tolist())
            if shard[2]:
                self._shards.setdefault(path.stem.rpartition("-")[0], []).append(shard)
        if not self._shards:
            raise ValueError(
                f"`distilled.path`: there are no shards in {directory}. Make some: emu35 distill --out {directory}"
            )
        self._sizes = {kind: np.cumsum([len(one[2]) for one in shards]) for kind, shards in self._shards.items()}

    def draw(self, kind: str, rng: np.random.Generator, difficulty: float = 1.0) -> TokenSequence:
        if kind not in self._shards or rng.random() >= self.share:
            return super().draw(kind, rng, difficulty)
        sizes = self._sizes[kind]
        number = int(rng.integers(sizes[-1]))
        index = int(np.searchsorted(sizes, number, side="right"))
        path, offsets, prompt_lengths = self._shards[kind][index]
        number -= int(sizes[index - 1]) if index else 0
        with safe_open(path, "pt") as file:
            ids = file.get_slice("ids")[offsets[number] : offsets[number + 1]].tolist()
        prompt, answer = ids[: prompt_lengths[number]], ids[prompt_lengths[number] :]
        sequence = TokenSequence()
        if rng.random() < self.caption_dropout:
            given = self._images_of(prompt)
            for piece in unconditional_pieces(self.layout, [ImagePiece(image) for image in given]):
                if isinstance(piece, str):
                    self._add_text(sequence, piece, False)
                else:
                    sequence.add(piece.image if isinstance(piece, ImagePiece) else [piece], False)
            for image in self._images_of(answer):
                sequence.add(image, True)
        else:
            sequence.add(prompt, False)
            sequence.add(answer, True)
        return sequence

    def _images_of(self, ids: list[int]) -> list[list[int]]:
        return [ids[image.begin : image.end] for image in find_images(ids, self.layout)]
