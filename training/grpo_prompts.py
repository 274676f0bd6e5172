"""What is asked in a GRPO run: prompts of the world, drawn from a seed, or a file of the user's."""

from pathlib import Path
from typing import Any

import numpy as np
from emu35.configuration_emu35 import Emu35Config, Emu35VisionTokenizerConfig
from emu35.generation_configuration_emu35 import Emu35GenerationConfig
from emu35.processing_emu35 import Emu35Processor
from emu35.prompts_emu35 import get_template

try:
    from datasets import Dataset, load_dataset, load_from_disk
except ImportError as error:
    raise ImportError("GRPO needs `datasets`: `pip install 'emu35[train]'`.") from error

from .data.examples import ROW_ERRORS
from .data.reading import absolute_message
from .evaluate import _TEMPLATES
from .grpo_recipe import GRPORecipe
from .play import user_message
from .recipe import checkpoint_path
from .rollout import as_messages
from .shapes import EPISODES, Turn, caption, sample_question, sample_scene

_STREAM = 61803  # keeps these prompts apart from those of training and evaluation with the same seed


def load_prompts(recipe: GRPORecipe) -> Dataset:
    """The prompts of a run, as many as it needs or the file holds; rows are as [`PromptsRecipe`] says.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it lacks a column, has an unknown task, or fewer
            rows than a step needs. For the rows themselves: [`check_prompts`].
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
    if len(dataset) < recipe.prompts_per_step:
        raise ValueError(
            f"{path} has {len(dataset)} prompts, but a step takes {recipe.prompts_per_step} (`rollouts_per_step` / "
            "`group_size`). Lower `rollouts_per_step` or give more prompts."
        )

    def read(rows: dict[str, list]) -> dict[str, list]:
        prompts = []
        for number, one in enumerate(rows["prompt"]):
            if number and one == rows["prompt"][number - 1]:  # of one group: one object, encoded once
                prompts.append(prompts[-1])
            else:
                prompts.append(_read_prompt(one, None if path.is_dir() else path.parent))
        return {**rows, "prompt": prompts}

    return dataset.with_transform(read)


def _read_prompt(prompt: Any, folder: Path | None) -> Any:
    """A prompt of a file, whose images' paths are relative to it."""
    prompt = _without_nones(prompt)
    if folder is None or not isinstance(prompt, list):
        return prompt
    return [absolute_message(message, folder) for message in prompt]


def check_prompts(recipe: GRPORecipe, prompts: Dataset):
    """Reads all prompts of a file as the run will, with their images: what would end it at their turn is told now.

    Raises:
        OSError: if there is no such model.
        ValueError: if a prompt is empty or malformed, has an image that is missing or broken, or leaves no room for
            an answer in the context; or if the model draws pictures and has no vision tokenizer to see them by.
    """
    path = checkpoint_path(recipe.model)
    config, stored = Emu35Config.from_pretrained(path), Emu35GenerationConfig.from_pretrained(path)
    if config.vision_tokenizer_config is None:
        for task in sorted(prompt_tasks(prompts)):
            if recipe.rollout.config(stored, task).generation_mode != "text":
                raise ValueError(
                    f"answers to {task!r} have images, and {path} has no vision tokenizer to show them to rewards. "
                    "Merge the two with `python -m emu35.convert_emu35_to_hf`, or leave the task out."
                )
    if recipe.prompts.world is not None:
        return
    processor = Emu35Processor.from_pretrained(path)
    rooms = {task: _room(config, recipe.rollout.config(stored, task)) for task in prompt_tasks(prompts)}
    for number in range(len(prompts)):
        where = f"{recipe.prompts.path}, row {number}"
        row = prompts[number]
        prompt = as_messages(row["prompt"])
        if not prompt:
            raise ValueError(f"{where}: `prompt` is empty. Write one, or leave the row out.")
        if prompt[-1].get("role") != "user":
            raise ValueError(f"{where}: the last message must be the user's, is of {prompt[-1].get('role')!r}.")
        try:
            ids = processor.apply_chat_template([prompt], task=row["task"])["input_ids"][0]
        except ROW_ERRORS as error:
            raise ValueError(f"{where}: {error}") from error
        if len(ids) > rooms[row["task"]]:
            context = config.text_config.max_position_embeddings
            raise ValueError(
                f"{where}: the prompt has {len(ids)} tokens. An answer needs {context - rooms[row['task']]} of the "
                f"context's {context}. Shorten it, or make images smaller."
            )


def _room(config: Emu35Config, settings: Emu35GenerationConfig) -> int:
    """Tokens that a prompt may have."""
    needed = 1
    if settings.generation_mode == "image" and settings.height and settings.width:
        factor = (config.vision_tokenizer_config or Emu35VisionTokenizerConfig()).downsampling_factor
        needed = config.token_layout.num_image_tokens(settings.height // factor, settings.width // factor)
    return config.text_config.max_position_embeddings - needed


def one_of_each_task(prompts: Dataset) -> list[dict[str, Any]]:
    """The first prompt of each task."""
    tasks = prompts.with_format(None)["task" if "task" in prompts.column_names else "world_task"][:]
    return prompts.__getitems__(sorted(tasks.index(task) for task in set(tasks)))


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
