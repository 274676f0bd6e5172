"""What is asked in a GRPO run: prompts of the world, drawn from a seed, or a file of the user's."""

from pathlib import Path
from typing import Any

import numpy as np
from emu35.prompts_emu35 import get_template
from PIL import Image, UnidentifiedImageError

try:
    from datasets import Dataset, load_dataset, load_from_disk
except ImportError as error:
    raise ImportError("GRPO needs `datasets`: `pip install 'emu35[train]'`.") from error

from .evaluate import _TEMPLATES
from .grpo_recipe import GRPORecipe
from .play import user_message
from .shapes import EPISODES, Turn, caption, sample_question, sample_scene

_STREAM = 61803  # keeps these prompts apart from those of training and evaluation with the same seed


def load_prompts(recipe: GRPORecipe) -> Dataset:
    """The prompts of a run, as many as it needs or the file holds; rows are as [`PromptsRecipe`] says.

    Raises:
        FileNotFoundError, ValueError: if the file or an image is missing, or the file lacks a column, has an unknown
            task, an empty prompt, a broken image, or fewer rows than a step needs.
    """
    if recipe.prompts.world is not None:
        return world_prompts(recipe)
    path = Path(recipe.prompts.path)
    if not path.exists():
        raise FileNotFoundError(f"`prompts.path`: there is no {path}.")
    if path.is_dir():
        dataset = load_from_disk(str(path))
    else:
        kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
        if kind is None:
            raise ValueError(f"`prompts.path` must end in .jsonl or .parquet, or be a folder; got {path}.")
        dataset = load_dataset(kind, data_files=str(path), split="train")
    missing = [name for name in ("prompt", "task") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it has {dataset.column_names}.")
    for name in {"image", "images", "texts", "segments", "messages"}.intersection(dataset.column_names):
        raise ValueError(
            f"{path} has a column {name!r}, which is the name of what answers hold. Rename it; images that a prompt "
            "shows belong into its messages."
        )
    for task in set(dataset["task"]):
        get_template(task)  # raises for an unknown one
    for number, prompt in enumerate(dataset["prompt"]):
        _check_prompt(prompt, f"{path}, row {number}")
    if len(dataset) < recipe.prompts_per_step:
        raise ValueError(
            f"{path} has {len(dataset)} prompts, but a step takes {recipe.prompts_per_step} (`rollouts_per_step` / "
            "`group_size`). Lower `rollouts_per_step` or give more prompts."
        )
    return dataset.with_transform(lambda rows: {**rows, "prompt": [_without_nones(one) for one in rows["prompt"]]})


def _check_prompt(prompt: str | list[dict[str, Any]] | None, where: str):
    """Raises for what would end a run when its turn comes."""
    if not prompt:
        raise ValueError(f"{where}: `prompt` is empty. Write one, or leave the row out.")
    if isinstance(prompt, str):
        return
    if prompt[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message must be the user's, is of {prompt[-1]['role']!r}.")
    for message in prompt:
        for part in [] if isinstance(message["content"], str) else message["content"]:
            file = part.get("path") or part.get("image")
            if part["type"] != "image" or not isinstance(file, str) or "://" in file:
                continue
            try:
                Image.open(file).close()
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where}: there is no image {file}.") from error
            except UnidentifiedImageError as error:
                raise ValueError(f"{where}: {file} is no image, or a broken one.") from error


def prompt_tasks(prompts: Dataset) -> set[str]:
    """The tasks that the rewards must know."""
    if "task" in prompts.column_names:
        return set(prompts.with_format(None)["task"])
    return {_TEMPLATES.get(task, task) for task in prompts.with_format(None)["world_task"]}


def _without_nones(value: Any) -> Any:
    """Arrow gives every message and every piece the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nones(one) for key, one in value.items() if one is not None}
    return [_without_nones(one) for one in value] if isinstance(value, list) else value


def world_prompts(recipe: GRPORecipe) -> Dataset:
    """Prompts about fresh scenes without held-out combinations, each a function of the recipe's seed and its number.

    Columns: `prompt`, `task`, `meaning` (what the checker of the task is given), and `answer` of questions.
    """
    tasks = interleave(recipe.prompts.world, recipe.steps * recipe.prompts_per_step)

    def draw(rows: dict[str, list]) -> dict[str, list]:
        unique = {}
        for index, task in zip(rows["index"], rows["world_task"], strict=True):
            if index not in unique:
                rng = np.random.default_rng((recipe.seed, _STREAM, index))
                unique[index] = _ask(task, rng, recipe.prompts.full_captions)
        # The rows of a group share one prompt object, whose images are then encoded once.
        drawn = [unique[index] for index in rows["index"]]
        return {name: [row[name] for row in drawn] for name in ("prompt", "task", "meaning", "answer")}

    return Dataset.from_dict({"index": list(range(len(tasks))), "world_task": tasks}).with_transform(draw)


def interleave(shares: dict[str, float], number: int) -> list[str]:
    """`number` names in an order in which every stretch of them has the given shares, as nearly as it can."""
    total = sum(shares.values())
    counts = dict.fromkeys(shares, 0)
    names = []
    for index in range(number):
        name = max(shares, key=lambda one: shares[one] / total * (index + 1) - counts[one])
        counts[name] += 1
        names.append(name)
    return names


def _ask(task: str, rng: np.random.Generator, full_captions: float) -> dict[str, Any]:
    if task == "t2i":
        drawn = caption(sample_scene(rng, held_out=False), rng, full=bool(rng.random() < full_captions))
        return _row(Turn("user", (drawn.text,)), task, drawn.meaning)
    if task == "vqa":
        scene = sample_scene(rng, held_out=False)
        question = sample_question(scene, rng)
        return _row(Turn("user", (scene, question.text)), task, question, question.answer)
    episode = EPISODES[task].sample(rng, held_out=False)
    return _row(episode.turns[0], episode.task, episode.meaning, getattr(episode.meaning, "answer", None))


def _row(turn: Turn, task: str, meaning: Any, answer: str | None = None) -> dict[str, Any]:
    return {"prompt": [user_message(turn)], "task": task, "meaning": meaning, "answer": answer}
