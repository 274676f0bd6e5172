"""Recipes with `method: grpo`: how a trained model is improved against rewards (see `grpo`)."""

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import rewards
from .recipe import _require, _require_one_of, _unknown
from .rewards import Component, RewardMix, SampleReward
from .rollout import RolloutSettings
from .sft_recipe import ATTENTIONS, SCHEDULES, HardwareRecipe, SFTLoRARecipe
from .shapes import EPISODES

LOSS_TYPES = ("grpo", "dapo", "bnpo")
#: Tasks of the world that end with the first answer.
WORLD_TASKS = ("t2i", "vqa", *(name for name in EPISODES if name not in ("chat", "explore")))


@dataclass
class PromptsRecipe:
    """What is asked; exactly one of `world` and `path`.

    Args:
        world (`dict[str, float]`): task of the world of shapes -> share of the prompts.
        full_captions (`float`): of `world`: share of the captions that fix the whole scene.
        path (`str`):
            a `.jsonl` or `.parquet` file, or a folder that `datasets` saved. Columns: `prompt` (text, or messages of
            which the last is the user's; paths of their images are relative to the file), `task` ("t2i", "x2i", "vqa",
            "story", ...), and what the rewards read, which they get as it is.
    """

    world: dict[str, float] | None = None
    full_captions: float = 0.5
    path: str | None = None

    def __post_init__(self):
        if (self.world is None) == (self.path is None):
            raise ValueError("`prompts` must have exactly one of `world` and `path`.")
        for task, share in (self.world or {}).items():
            if task not in WORLD_TASKS:
                raise ValueError(f"`prompts.world`: {_unknown(task, WORLD_TASKS)}")
            _require(share > 0, f"prompts.world.{task}", share, "positive (leave the task out instead)")
        _require(self.world != {}, "prompts.world", self.world, "a task or more")
        _require(0 <= self.full_captions <= 1, "prompts.full_captions", self.full_captions, "in [0, 1]")


@dataclass
class RewardRecipe:
    """One component of the [`RewardMix`].

    Args:
        reward (`str`):
            a class of `emu35.training.rewards`, such as "WorldReward", or one of yours: "module:name" of a function
            with `name` and `range`, of an object, or of a class.
        weight (`float`): among the rewards that an answer gets.
        tasks (`list[str]`, *optional*): for which it counts; default: all.
        arguments (`dict`): of the class.
    """

    reward: str
    weight: float = 1.0
    tasks: list[str] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Component:
        """Raises a ValueError if there is no such reward, or it does not take the arguments."""
        module_name, separator, name = self.reward.partition(":")
        if not separator:
            known = [one for one in rewards.__all__ if _is_reward(getattr(rewards, one))]
            if self.reward not in known:
                raise ValueError(f"`rewards`: {_unknown(self.reward, known)} Or give one of yours as 'module:name'.")
            found = getattr(rewards, self.reward)
        else:
            try:
                found = getattr(importlib.import_module(module_name), name)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"`rewards`: cannot import {self.reward!r}: {error}.") from error
        if isinstance(found, type) or self.arguments:
            if isinstance(found, type):
                known = [one for one in inspect.signature(found).parameters.values() if one.kind != one.VAR_KEYWORD]
                takes_all = len(known) < len(inspect.signature(found).parameters)
                for name in self.arguments:
                    if not takes_all and name not in [one.name for one in known]:
                        raise ValueError(f"`rewards`: {self.reward}: {_unknown(name, [one.name for one in known])}")
            try:
                found = found(**self.arguments)
            except TypeError as error:
                raise ValueError(f"`rewards`: {self.reward} does not take {self.arguments}: {error}.") from error
        return Component(found, self.weight, self.tasks)


def _is_reward(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, SampleReward)


@dataclass
class GRPORecipe:
    """Reinforcement learning from groups of answers.  Fields are the keys of the YAML file.

    Args:
        method (`str`): "grpo".
        output_dir (`str`): gets logs, samples and checkpoints.
        export_dir (`str`): gets the finished adapter or model; `None`: `output_dir`/export.
        model (`str`): checkpoint to start from; "tiny": `emu35.TINY`.
        seed (`int`): of prompts, answers and adapter.
        processes (`int`): on a CPU, of one thread each. On GPUs `accelerate launch` says how many there are.
        prompts ([`PromptsRecipe`]): what is asked.
        rewards (`list[RewardRecipe]`): what answers are worth: their weighted mean, each brought to [1, 10] before.
        steps (`int`): optimiser steps.
        rollouts_per_step (`int`): answers that a step learns from, all processes together.
        group_size (`int`): answers to each prompt, which are compared with one another.
        micro_batch (`int`): answers of one forward and backward pass of one process.
        updates_per_rollout (`int`): steps on the same answers; from the second on, ratios are clipped at `epsilon`.
        rollout ([`RolloutSettings`]): how answers are drawn.
        beta (`float`): weight of the KL divergence from the reference.
        reference (`str`, *optional*):
            with `lora` it is the model without the adapter. Without: a checkpoint that is kept in memory beside the
            model; "start": what training starts from.
        loss_type (`str`):
            of TRL's [`GRPOConfig`]. "grpo" weighs all answers alike; "dapo" all tokens, so that an image counts as
            much as a hundred short answers.
        scale_rewards (`str`): "group": advantages are divided by the group's standard deviation; "batch"; "none".
        epsilon (`float`): of the clipped ratio.
        learning_rate (`float`), warmup_steps (`int`), schedule (`str`), gradient_clip (`float`):
            of AdamW; `schedule` is "constant", "linear" or "cosine".
        lora ([`SFTLoRARecipe`], *optional*): train an adapter; without it all weights of the decoder.
        dtype (`str`): of the frozen weights under an adapter; what is trained is float32.
        bf16 (`bool`): autocast.
        gradient_checkpointing (`bool`), attn_implementation (`str`): see [`SFTRecipe`].
        hardware ([`HardwareRecipe`]): what `--dry-run` works the memory out for.
        log_every (`int`), save_every (`int`), samples_every (`int`): in steps.
    """

    output_dir: str
    prompts: PromptsRecipe
    rewards: list[RewardRecipe]
    steps: int
    method: str = "grpo"
    export_dir: str | None = None
    model: str = "tiny"
    seed: int = 0
    processes: int = 2
    rollouts_per_step: int = 64
    group_size: int = 8
    micro_batch: int = 8
    updates_per_rollout: int = 1
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    beta: float = 0.0
    reference: str | None = None
    loss_type: str = "grpo"
    scale_rewards: str = "group"
    epsilon: float = 0.2
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "constant"
    gradient_clip: float = 1.0
    lora: SFTLoRARecipe | None = None
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    hardware: HardwareRecipe = field(default_factory=HardwareRecipe)
    log_every: int = 1
    save_every: int = 20
    samples_every: int = 20

    def __post_init__(self):
        positive = "steps processes rollouts_per_step micro_batch updates_per_rollout epsilon learning_rate"
        for name in (*positive.split(), "gradient_clip", "log_every", "save_every", "samples_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("beta", "warmup_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        _require(self.group_size > 1, "group_size", self.group_size, "at least 2: answers are compared in groups")
        _require(bool(self.rewards), "rewards", self.rewards, "at least one reward")
        for name, known in (
            ("loss_type", LOSS_TYPES),
            ("scale_rewards", ("group", "batch", "none")),
            ("schedule", SCHEDULES),
            ("dtype", ("float32", "bfloat16")),
            ("attn_implementation", ATTENTIONS),
        ):
            _require_one_of(name, getattr(self, name), known)
        if self.rollouts_per_step % self.group_size:
            least = self.rollouts_per_step // self.group_size * self.group_size
            near = f"{least} or {least + self.group_size}" if least else str(self.group_size)
            raise ValueError(
                f"`group_size`={self.group_size} must divide `rollouts_per_step`={self.rollouts_per_step}: a group is "
                f"complete or there is nothing to compare. Nearest: {near}."
            )
        if self.beta and self.lora is None and self.reference is None:
            raise ValueError(
                f"`beta`={self.beta} needs a reference, and without `lora` there is none. Set `reference: start` (a "
                "second copy of the model in memory) or a checkpoint, train an adapter, or set `beta: 0`."
            )
        if self.reference is not None and (self.lora is not None or not self.beta):
            why = "with `lora` it is the model without the adapter" if self.lora else "`beta` is 0"
            raise ValueError(f"`reference`={self.reference!r} has no effect: {why}. Leave it out.")
        whole = '"none": answers are drawn by a whole model on each GPU'
        _require(self.hardware.sharding == "none", "hardware.sharding", self.hardware.sharding, whole)
        if self.lora is None:
            _require(self.dtype == "float32", "dtype", self.dtype, '"float32" without `lora`: all weights are trained')
        else:
            dropout = "0: log-probabilities must be those the answers were drawn with"
            _require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, dropout)
        for name in ("save_every", "steps"):
            if getattr(self, name) % self.updates_per_rollout:
                raise ValueError(
                    f"`{name}`={getattr(self, name)} must be a multiple of `updates_per_rollout`="
                    f"{self.updates_per_rollout}: answers are not saved, so a resumed run begins with new ones."
                )

    def reward_mix(self, tasks: Iterable[str]) -> RewardMix:
        """The rewards, with nothing loaded yet.

        Args:
            tasks (`Iterable[str]`): all that the prompts have.
        Raises:
            TypeError, ValueError: if a reward does not exist or does not fit in, or a task has none.
        """
        mix = RewardMix([one.build() for one in self.rewards])
        mix.check_tasks(tasks)
        return mix

    @property
    def prompts_per_step(self) -> int:
        return self.rollouts_per_step // self.group_size

    def accumulation(self, processes: int) -> int:
        """Micro-batches a step and process.

        Raises:
            ValueError: if they do not come out even.
        """
        if self.rollouts_per_step % (processes * self.micro_batch):
            raise ValueError(
                f"`rollouts_per_step`={self.rollouts_per_step} must be a multiple of `micro_batch`={self.micro_batch} "
                f"times the number of processes, {processes}."
            )
        return self.rollouts_per_step // (processes * self.micro_batch)
