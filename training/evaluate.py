"""How often a model is right, by a checker that reads pixels and does not know the prompt.

    emu35 eval --task t2i --num 600 --seed 1       # prompts -> images -> checker
    emu35 eval --task vqa --num 600 --seed 1       # images + questions -> answers, compared exactly
    emu35 eval --task reconstruction --num 1000    # images -> codes -> images -> checker
    emu35 eval --task t2i --image-decoder dida --steps 8   # the same, in 8 passes an image
    emu35 eval --task story --num 300 --seed 1     # episodes: x2i, story, howto, explore, vla, multi_vqa, chat

Scenes, captions and questions are drawn afresh from the seed. Training draws from other streams of random numbers and
never shows a held-out pair of colour and shape; scenes with such a pair are reported apart.
"""

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor
from PIL import Image
from tqdm.auto import tqdm

from .contact_sheet import contact_sheet, episode_sheet
from .play import play, said
from .rewards.mix import HIGHEST, LOWEST
from .rewards.world import grade
from .shapes import (
    EPISODES,
    IMAGE_SIZE,
    Caption,
    Question,
    Scene,
    caption,
    describe,
    read_scenes,
    sample_question,
    sample_scene,
    score,
    to_image,
)
from .train_vision_tokenizer import evaluate_vision_tokenizer

logger = logging.getLogger(__name__)

TASKS = ("t2i", "vqa", "reconstruction", *EPISODES)
_TEXT_TASKS = ("vqa", "multi_vqa")
_TEMPLATES = {"multi_vqa": "vqa"}
"""Tasks of the world whose prompt has another name."""
_DECODER_SETTINGS = {
    "speculative": ("speculative_window", "coupling"),
    "dida": ("num_inference_steps", "guidance_scale_end", "guidance_cutoff", "verify_codes"),
}
_NUM_SAMPLES = 12
_NUM_EPISODES = 6
_STREAM = 90210  # keeps the scenes of an evaluation apart from those of training with the same seed


def evaluate(
    model: Emu35ForConditionalGeneration | str | os.PathLike,
    task: str = "t2i",
    num: int = 600,
    seed: int = 1,
    guidance_scale: float | None = None,
    num_held_out: int | None = None,
    batch_size: int = 64,
    processor: Emu35Processor | None = None,
    device: str = "cpu",
    progress: bool = True,
    samples_path: str | os.PathLike | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Accuracy of a model at a task.

    Args:
        model ([`Emu35ForConditionalGeneration`], `str` or `os.PathLike`): a model, or where one is saved.
        task (`str`): "t2i", "vqa", "reconstruction" or a key of `shapes.EPISODES`.
        num (`int`): prompts or images; a third each with 1, 2 and 3 objects, captions half full and half partial.
        seed (`int`): of scenes, sentences and sampling.
        guidance_scale (`float`, *optional*): instead of the checkpoint's own.
        num_held_out (`int`, *optional*):
            further scenes with held-out pairs of colour and shape; default: a quarter of `num`.
        batch_size (`int`): prompts at a time.
        processor ([`Emu35Processor`], *optional*): needed when `model` is not a path.
        device (`str`): where a model given by path is put.
        progress (`bool`): show a progress bar.
        samples_path (`str` or `os.PathLike`, *optional*):
            a PNG with the first images and their sentences, or with the first episodes.
        settings: further settings of `generate`, for example `image_top_k`.
    Returns:
        `dict` of plain values, rates in [0, 1], and but for "reconstruction" `world_reward`, the mean of
        [`WorldReward`] brought to [1, 10]. "t2i": `whole_scene` (`all`, by number of objects, by caption), `aspects`
        (of what the captions say), `held_out`. "vqa": `accuracy`, `by_kind`, `describe` (whole description
        exact), `held_out`. "reconstruction": see [`evaluate_vision_tokenizer`]. Episodes: `rates`, the mean of all
        that the task's checker marks, `marked`, in how many episodes it did, and `by_kind`.
    Raises:
        ValueError: if the task is unknown, `num` is not positive, or `processor` is missing.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    if samples_path is not None and task in (*_TEXT_TASKS, "reconstruction"):
        raise ValueError(f"`samples_path` shows images that were made, which `task`={task!r} does not. Leave it out.")
    if num < 1 or batch_size < 1:
        raise ValueError(f"`num` and `batch_size` must be positive, got {num} and {batch_size}.")
    if isinstance(model, str | os.PathLike):
        processor = processor or Emu35Processor.from_pretrained(model)
        model = Emu35ForConditionalGeneration.from_pretrained(model).to(device)
    elif processor is None and task != "reconstruction":
        raise ValueError("`processor` is needed when `model` is a model. Or give the path of a checkpoint.")
    model.eval()
    num_held_out = num // 4 if num_held_out is None else num_held_out
    result = {"task": task, "num": num, "seed": seed}
    if task == "reconstruction":
        result |= evaluate_vision_tokenizer(model.vision_tokenizer, num, seed, held_out=False)
        if num_held_out:
            apart = evaluate_vision_tokenizer(model.vision_tokenizer, num_held_out, seed, held_out=True)
            result["held_out"] = {"num": num_held_out, **apart}
        return result
    if guidance_scale is not None:
        settings["guidance_scale"] = guidance_scale
    config = model.generation_config.with_settings(_TEMPLATES.get(task, task), **settings)
    names = ()
    if task not in _TEXT_TASKS:
        names = ("guidance_scale", "image_top_k", "image_top_p", "image_temperature", "image_decoder")
        names += _DECODER_SETTINGS.get(config.image_decoder, ())
    names += ("top_k", "top_p", "temperature") if task != "t2i" else ()
    result["settings"] = {name: getattr(config, name) for name in (*names, "do_sample")}
    run = _Evaluation(model, processor, seed, batch_size, settings, progress, samples_path)
    measures = {"t2i": run.text_to_image, "vqa": run.question_answering}
    measure = measures.get(task, functools.partial(run.episodes, task))
    result |= measure(num, held_out=False)
    if num_held_out:
        result["held_out"] = {"num": num_held_out, **measure(num_held_out, held_out=True)}
    return result


class _Evaluation:
    """One call of [`evaluate`]."""

    def __init__(
        self, model, processor, seed: int, batch_size: int, settings: dict[str, Any], progress: bool, samples_path
    ):
        self.model, self.processor, self.samples_path = model, processor, samples_path
        self.seed, self.batch_size, self.settings, self.progress = seed, batch_size, settings, progress

    def _scenes(self, num: int, held_out: bool) -> tuple[list[Scene], np.random.Generator]:
        rng = np.random.default_rng((self.seed, _STREAM, held_out))
        return [sample_scene(rng, 1 + index % 3, held_out=held_out) for index in range(num)], rng

    def _batches(self, items: Sequence, name: str) -> Iterable[tuple[Sequence, torch.Generator]]:
        starts = range(0, len(items), self.batch_size)
        for start in tqdm(starts, desc=name, unit="batch", disable=not self.progress):
            generator = torch.Generator(self.model.device).manual_seed(self.seed * 1_000_003 + start)
            yield items[start : start + self.batch_size], generator

    def _generate(self, inputs, task: str, mode: str, generator: torch.Generator):
        config = self.model.generation_config.with_settings(task, **self.settings)
        return self.model.generate(
            **inputs.to(self.model.device), generation_config=config, generation_mode=mode, generator=generator
        )

    def text_to_image(self, num: int, held_out: bool) -> dict[str, Any]:
        scenes, rng = self._scenes(num, held_out)
        captions = [caption(scene, rng, full=bool(index // 3 % 2 == 0)) for index, scene in enumerate(scenes)]
        images: list[Image.Image | None] = []
        for batch, generator in self._batches(captions, "t2i"):
            images += self.draw([item.text for item in batch], generator)
        marked = [_mark(item, image) for item, image in zip(captions, images, strict=True)]
        if self.samples_path is not None and not held_out:
            right = [marks["whole_scene"] for marks in marked]
            shown = [part[:_NUM_SAMPLES] for part in (images, [item.text for item in captions], right)]
            contact_sheet(*shown, self.samples_path)
        whole, aspects = defaultdict(list), defaultdict(list)
        for index, marks in enumerate(marked):
            kind = "full" if index // 3 % 2 == 0 else "partial"
            for key in ("all", f"{1 + index % 3}_objects", kind, f"{1 + index % 3}_objects_{kind}"):
                whole[key].append(marks["whole_scene"])
            for aspect, value in marks.items():
                if aspect != "whole_scene" and value is not None:
                    aspects[aspect].append(value)
        return {**_world_reward("t2i", marked), "whole_scene": _means(whole), "aspects": _means(aspects)}

    def draw(self, texts: list[str], generator: torch.Generator) -> list[Image.Image | None]:
        """An image for each text; `None` where the answer holds none of the world's size."""
        inputs = self.processor(text=texts, task="t2i", return_tensors="pt")
        output = self._generate(inputs, "t2i", "image", generator)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return [images[0] if images and images[0].size == size else None for images in output.images]

    def episodes(self, task: str, num: int, held_out: bool) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, _STREAM, held_out))
        episodes = [EPISODES[task].sample(rng, held_out=held_out) for _ in range(num)]
        rates, kinds, played = defaultdict(list), defaultdict(lambda: defaultdict(list)), []
        for batch, generator in self._batches(episodes, task):
            for episode, answers in zip(
                batch, play(self.model, self.processor, batch, generator, **self.settings), strict=True
            ):
                marks = EPISODES[task].check(episode.meaning, [[said(one) for one in answer] for answer in answers])
                played.append((episode, answers, marks))
                for name, value in marks.items():
                    if value is not None:
                        rates[name].append(value)
                        kinds[episode.kind][name].append(value)
        if self.samples_path is not None and not held_out:
            episode_sheet(played[:_NUM_EPISODES], self.samples_path)
        return {
            **_world_reward(_TEMPLATES.get(task, task), [marks for _, _, marks in played]),
            "rates": _means(rates),
            "marked": {name: len(values) for name, values in sorted(rates.items())},
            "by_kind": {kind: _means(own) for kind, own in sorted(kinds.items())},
        }

    def question_answering(self, num: int, held_out: bool) -> dict[str, Any]:
        scenes, rng = self._scenes(num, held_out)
        questions = [sample_question(scene, rng) for scene in scenes]
        described = scenes[: max(1, num // 4)]
        kinds, objects = defaultdict(list), defaultdict(list)
        for scene, question, answer in self._ask(scenes, questions):
            kinds[question.kind].append(answer == question.answer)
            objects[f"{len(scene.objects)}_objects"].append(answer == question.answer)
        exact = [
            answer == question.answer
            for _, question, answer in self._ask(described, [describe(scene, rng) for scene in described])
        ]
        marked = [{"answer": right} for values in kinds.values() for right in values]
        return {
            **_world_reward("vqa", marked),
            "accuracy": float(np.mean([marks["answer"] for marks in marked])),
            "by_kind": _means(kinds),
            "by_objects": _means(objects),
            "describe": float(np.mean(exact)),
        }

    def _ask(self, scenes: list[Scene], questions: list[Question]) -> Iterable[tuple[Scene, Question, str]]:
        """(scene, question, the model's answer in lower case) for each."""
        for batch, generator in self._batches(list(zip(scenes, questions, strict=True)), "vqa"):
            inputs = self.processor(
                text=[question.text for _, question in batch],
                images=[to_image(scene) for scene, _ in batch],
                task="vqa",
                return_tensors="pt",
            )
            length = inputs["input_ids"].shape[1]
            output = self._generate(inputs, "vqa", "text", generator)
            for (scene, question), ids in zip(batch, output.sequences[:, length:].tolist(), strict=True):
                answer = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
                yield scene, question, answer.strip().lower()


def _mark(item: Caption, image: Image.Image | None) -> dict[str, Any]:
    if image is None:
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 0, 255))  # no colour of the world: nothing is right
    return score(item.meaning, read_scenes(np.asarray(image)[None])[0])


def _world_reward(task: str, marked: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of [`WorldReward`], where a [`RewardMix`] has brought it."""
    return {"world_reward": LOWEST + (HIGHEST - LOWEST) * float(np.mean([grade(task, marks) for marks in marked]))}


def _means(groups: dict[str, list]) -> dict[str, float]:
    return {key: float(np.mean(values)) for key, values in sorted(groups.items())}


def sweep(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    setting: str,
    values: Sequence[float | int],
    num: int = 300,
    seed: int = 1,
    image_path: str | os.PathLike | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Accuracy of text to image against one setting of `generate`, on the same prompts.

    Args:
        setting (`str`): for example "guidance_scale" or "image_top_k".
        values (`Sequence`): what to try.
        image_path (`str` or `os.PathLike`, *optional*): also draws the curves there (needs matplotlib).
        settings: further settings, the same for all.
    Returns:
        `list[dict]`: the value under the setting's name, and `whole_scene` as [`evaluate`] gives it.
    """
    points = []
    for value in values:
        options = {"num_held_out": 0, "processor": processor, "progress": progress, **settings, setting: value}
        result = evaluate(model, "t2i", num, seed, **options)
        points.append({setting: value, "whole_scene": result["whole_scene"]})
        logger.info("%s %s: %s", setting, value, result["whole_scene"])
    if image_path is not None:
        _plot_sweep(points, setting, Path(image_path))
    return points


def _plot_sweep(points: list[dict[str, Any]], setting: str, path: Path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for key in ("1_objects", "2_objects", "3_objects"):
        rates = [100 * point["whole_scene"][key] for point in points]
        axes.plot(range(len(points)), rates, marker="o", label=key.replace("_", " "))
    axes.set_xticks(range(len(points)), [str(point[setting]) for point in points])
    axes.set(xlabel=setting.replace("_", " "), ylabel="whole scene right (%)", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
