"""GRPO: a model improves by comparing its own answers to one prompt with one another.

    emu35 train training/recipes/tiny-grpo.yaml
    accelerate launch -m emu35.cli train training/recipes/grpo-34b.yaml --device cuda

    prompts (any tasks) ──► groups of answers ──► rewards ──► advantages ──► policy gradient on what was drawn

Over TRL's [`GRPOTrainer`], which compares, clips and steps. What is ours: answers come from our own `generate`
(`rollout`), several tasks share a batch, and log-probabilities are those the answers were drawn with. Source of the
method: arXiv 2402.03300; of its use here: Emu3.5 (arXiv 2510.26583), 8 answers a prompt, all tasks in one batch.
"""

import dataclasses
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor
from emu35.segments_emu35 import Image as ImageSegment
from emu35.segments_emu35 import Segments
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict
except ImportError as error:
    raise ImportError("GRPO needs `trl`: `pip install 'emu35[train]'`.") from error

from .checkpointing import LossLog, ResumedAtTheEnd, read_log
from .contact_sheet import contact_sheet
from .distributed import launch, world_size
from .grpo_card import LOG, write_card
from .grpo_prompts import check_prompts, load_prompts, one_of_each_task, prompt_tasks
from .grpo_recipe import GRPORecipe
from .lora import load_base, lora_config, save_adapter
from .recipe import checkpoint_path
from .rewards import RewardMix
from .rewards.base import prompt_text
from .rollout import TokenKind, add_answer_scores, answer_seed, as_messages, draw_answers

logger = logging.getLogger(__name__)

#: Fields of a recipe that may change between a run and its continuation: they do not move the curves.
_FREE_FIELDS = ("output_dir", "export_dir", "hardware", "log_every", "save_every", "samples_every")
#: Columns that answers add to those of the prompts.
_ANSWER_COLUMNS = ("images", "texts", "segments", "messages")
#: Written last: a checkpoint without it was cut short.
_COMPLETE = "recipe.json"
_NUM_SAMPLES = 24
_MODALITIES = {"visual": (TokenKind.VISUAL,), "text": (TokenKind.TEXT, TokenKind.TEXT_WITHOUT_IMAGES)}


class Emu35GRPOTrainer(ResumedAtTheEnd, GRPOTrainer):
    """[`GRPOTrainer`] for answers of text and images.

    Args:
        recipe ([`GRPORecipe`]): what to do.
        model ([`Emu35ForConditionalGeneration`]): in training without dropout, see [`load_policy`].
        processor ([`Emu35Processor`]): of the model.
        rewards (`Callable` or a list of them, *optional*): with TRL's signature, instead of the recipe's.
        directory (`str` or `os.PathLike`): gets checkpoints, `log.jsonl` and `samples`.
        reference (`Emu35ForConditionalGeneration`, *optional*): of a full training with `beta`.
        device (`str`), progress (`bool`): as in `train`.
    """

    _tag_names = ["trl", "grpo", "emu3.5"]

    def __init__(
        self,
        recipe: GRPORecipe,
        model: Emu35ForConditionalGeneration,
        processor: Emu35Processor,
        rewards: Callable | list[Callable] | None,
        directory: str | os.PathLike,
        reference: Emu35ForConditionalGeneration | None = None,
        device: str = "cpu",
        progress: bool = True,
    ):
        self.recipe, self.processor, self.directory = recipe, processor, Path(directory)
        self._rows: list[dict[str, Any]] = []
        self._token_kinds: torch.Tensor | None = None
        self._scores: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # and kinds, of computed answers
        self._equal: torch.Tensor | None = None  # (all answers,): whether all of its group have one reward
        self._learnt: torch.Tensor | None = None  # rows of the pass that have a gradient; `None`: all
        self._sums: dict[str, tuple[float, float]] = {}  # since the last record of the log: value, tokens
        args = trainer_arguments(recipe, directory, device)
        if recipe.lora is None:
            args.beta = 0.0  # or TRL would build a reference by itself, of classes that transformers has
        prompts = load_prompts(recipe)
        if rewards is None:
            rewards = recipe.reward_mix(prompt_tasks(prompts))
        for reward in _listed(rewards):
            if hasattr(reward, "load"):
                reward.load()
            if isinstance(reward, RewardMix):
                check_rewards(reward, prompts, loaded=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            super().__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=prompts,
                processing_class=processor.tokenizer,
                peft_config=None if recipe.lora is None else lora_config(recipe.lora),
                rollout_func=self._answer,
                callbacks=[_Log(self)],
            )
        self.remove_callback(PrinterCallback)
        if not progress or not self.is_world_process_zero():
            self.remove_callback(ProgressCallback)
        if self.is_fsdp_enabled or self._dist.is_zero3:
            raise ValueError(
                "answers are drawn by a whole model on each device, which FSDP and ZeRO-3 do not keep. Use several "
                "processes without sharding; `lora` with `quantization: nf4` makes a large model small enough."
            )
        add_answer_scores(model, recipe.rollout)
        if reference is not None:
            add_answer_scores(reference, recipe.rollout)
            self.beta = args.beta = recipe.beta
            self.ref_model = reference.requires_grad_(False).eval().to(self.accelerator.device)
        # An answer of image mode ends with its image.
        self.eos_token_ids = [*self.eos_token_ids, processor.token_layout.eoi_token_id]

    # --- answers ---

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL shuffles answers. In order, those of a group share a micro-batch, where their prompt is computed once.
        steps = self.args.steps_per_generation
        if self._buffered_inputs is None or self._step % (steps * self.num_iterations) == 0:
            answers = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(answers, steps)
        return self._buffered_inputs[self._step % steps]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        # TRL copies prompts and sends them to all processes: those it gets are text, without the pictures.
        texts = [
            {**row, "prompt": prompt_text(row["prompt"]), "messages": as_messages(row["prompt"])} for row in inputs
        ]
        output = super()._generate_and_score_completions(texts)
        output["token_kinds"] = self._token_kinds  # split together with the ids
        first = self.accelerator.process_index * len(inputs)
        # Rounding of the mean of equal rewards, divided by next to nothing, would be an advantage.
        output["advantages"][self._equal[first : first + len(inputs)]] = 0.0
        return output

    def _answer(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's `rollout_func`. It passes prompts alone; the rows have the tasks, too."""
        first = self.accelerator.process_index * len(prompts)
        with self.accelerator.autocast():  # as log-probabilities are computed
            answers = draw_answers(
                self.base_model,
                self.processor,
                [row["prompt"] for row in self._rows],
                [row["task"] for row in self._rows],
                [answer_seed(self.recipe.seed, self.state.global_step, first + i) for i in range(len(prompts))],
                self.recipe.rollout,
            )
        kinds = [torch.tensor(answer.kinds) for answer in answers]
        self._token_kinds = pad_sequence(kinds, batch_first=True).to(self.accelerator.device)
        return {
            "prompt_ids": [answer.prompt_ids for answer in answers],
            "completion_ids": [answer.ids for answer in answers],
            "logprobs": None,
            "env_mask": [[int(kind != TokenKind.FORCED) for kind in answer.kinds] for answer in answers],
            "images": [answer.segments.images for answer in answers],
            "texts": [answer.segments.text.strip() for answer in answers],
            "segments": [answer.segments for answer in answers],
        }

    @property
    def base_model(self) -> Emu35ForConditionalGeneration:
        """The model inside what wraps it; an adapter is active in it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)  # (all answers,)
        total[rewards.isnan().all(dim=1)] = torch.nan
        metrics = self._metrics["train"]
        tasks = gather_object([row["task"] for row in inputs])
        groups = total.view(-1, self.num_generations)
        highest, lowest = (groups.nan_to_num(nan=-torch.inf).amax(dim=1), groups.nan_to_num(nan=torch.inf).amin(dim=1))
        equal = self._equal = (highest <= lowest).repeat_interleave(self.num_generations)  # or nothing is scored
        for task in sorted(set(tasks)):
            own = torch.tensor([one == task for one in tasks], device=total.device)
            metrics[f"reward/{task}"].append(total[own].nanmean().item())
            metrics[f"equal_groups/{task}"].append(equal[own].float().mean().item())
        metrics["unscored"].append(total.isnan().float().mean().item())
        if self.is_world_process_zero() and self.state.global_step % self.recipe.samples_every == 0:
            means = groups.nanmean(dim=1).repeat_interleave(self.num_generations)
            self._show(inputs, total.tolist(), (total >= means).tolist())
        return rewards

    def _show(self, rows: list[dict[str, Any]], rewards: list[float], is_better: list[bool]):
        """A page of this process's images, each with its reward and prompt; green: not below its group's mean."""
        images, texts, better = [], [], []
        for place, row in enumerate(rows):
            if row["images"] and len(images) < _NUM_SAMPLES:
                images.append(row["images"][-1])
                texts.append(f"{rewards[place]:.1f} {row['prompt']}")
                better.append(is_better[place])
        if not images:
            return
        path = self.directory / "samples" / f"{self.state.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, texts, better, path, columns=self.num_generations)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                page = np.asarray(Image.open(path).convert("RGB"))
                callback.tb_writer.add_image("samples", page, self.state.global_step, dataformats="HWC")

    # --- log-probabilities ---

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **unused
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        rows = torch.arange(len(input_ids), device=input_ids.device) if self._learnt is None else self._learnt
        parts = []
        for some in rows.split(batch_size or len(rows)):
            with self.accelerator.autocast():
                kinds = self._token_kinds[some]
                parts.append(model(input_ids=input_ids[some], attention_mask=attention_mask[some], token_kinds=kinds))
        computed = [torch.cat([part[name] for part in parts]) for name in ("log_probs", "entropies")]
        self._scores = computed[0].detach(), computed[1], self._token_kinds[rows]
        others = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        log_probs, entropies = (others.index_copy(0, rows, values) for values in computed)
        return log_probs, entropies if compute_entropy else None, None

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        self._token_kinds = inputs["token_kinds"]
        if not self.beta:  # an answer without an advantage has no gradient
            self._learnt = inputs["advantages"].nonzero()[:, 0]
            if not len(self._learnt):
                # A stand-in, for each process must pass through the model: gradients are summed over all.
                self._learnt = torch.zeros(1, dtype=torch.long, device=inputs["advantages"].device)
            if inputs.get("old_per_token_logps") is not None:  # of answers left out: as their own, a ratio of 1
                old = torch.zeros_like(inputs["old_per_token_logps"])
                old[self._learnt] = inputs["old_per_token_logps"][self._learnt]
                inputs = {**inputs, "old_per_token_logps": old}
        loss = super()._compute_loss(model, inputs)
        if not self.beta and not inputs["advantages"].any():
            self._scores = tuple(values[:0] for values in self._scores)  # nothing is learnt from the stand-in
        self._learnt = None
        self._log_modalities(inputs)
        return loss

    def _log_modalities(self, inputs: dict[str, Any]):
        """Entropy and KL divergence by modality, of answers that are learnt from.  TRL's own are over all alike."""
        log_probs, entropies, token_kinds = self._scores
        values = {"entropy": entropies}
        if "ref_per_token_logps" in inputs:
            above = inputs["ref_per_token_logps"] - log_probs
            values["kl"] = above.exp() - above - 1
        sums, names = [], []
        for modality, kinds in _MODALITIES.items():
            where = torch.isin(token_kinds, torch.tensor(kinds, device=log_probs.device))
            for name, value in values.items():
                names.append(f"{name}/{modality}")
                sums.append(torch.stack([value[where].sum(), where.sum().float()]))
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        for name, (total, count) in zip(names, totals, strict=True):
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before[0] + total, before[1] + count

    def log(self, logs: dict[str, float], *args, **kwargs):
        # TRL takes the mean over passes, which have different numbers of tokens of a kind.
        for name in sorted({name.split("/")[0] for name in self._sums}):
            parts = [self._sums[f"{name}/{modality}"] for modality in _MODALITIES]
            self._sums[name] = sum(total for total, _ in parts), sum(count for _, count in parts)
        means = {name: [total / count] for name, (total, count) in self._sums.items() if count}
        self._metrics["train"].update(means)
        self._sums.clear()
        super().log(logs, *args, **kwargs)

    # --- checkpoints ---

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            state = {"recipe": dataclasses.asdict(self.recipe)}
            temporary = self.directory / f"{_COMPLETE}.tmp"
            temporary.write_text(json.dumps(state))
            os.replace(temporary, self.directory / f"checkpoint-{self.state.global_step}" / _COMPLETE)

    def create_model_card(self, *args, **kwargs):
        """None in checkpoints: they are for going on, not for users."""


class _Log(TrainerCallback):
    """All that is logged as JSON lines; a resumed run's log reads as one."""

    def __init__(self, trainer: Emu35GRPOTrainer):
        self.trainer = trainer
        self.log: LossLog | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.log = LossLog(self.trainer.directory / LOG, state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log is None or "train_runtime" in (logs or {}):
            return  # of another process, or the summary at the end
        values = {
            name: value for name, value in (logs or {}).items() if isinstance(value, int | float) and value == value
        }
        self.log.write(state.global_step, **values)


def trainer_arguments(recipe: GRPORecipe, directory: str | os.PathLike, device: str = "cpu") -> GRPOConfig:
    """A recipe as TRL's configuration."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return GRPOConfig(
        output_dir=str(directory),
        seed=recipe.seed,
        use_cpu=device == "cpu",
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.accumulation(processes),
        num_generations=recipe.group_size,
        num_iterations=recipe.updates_per_rollout,
        shuffle_dataset=recipe.prompts.world is None,
        temperature=recipe.rollout.temperature,
        beta=recipe.beta,
        # The plain estimator's gradient on the model's own samples; at a ratio of 1 it has the value that is logged.
        use_bias_correction_kl=True,
        loss_type=recipe.loss_type,
        scale_rewards=recipe.scale_rewards,
        epsilon=recipe.epsilon,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
        max_grad_norm=recipe.gradient_clip,
        bf16=recipe.bf16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=2,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        dataloader_num_workers=0,
    )


def load_policy(
    recipe: GRPORecipe, path: str | None = None, device: str = "cpu"
) -> tuple[Emu35ForConditionalGeneration, dict[str, float]]:
    """The model that training starts from, or a reference, without dropout; and the dropout rates it had.

    Dropout of this model is no module, so that TRL's `disable_dropout` does not find it; with it, log-probabilities
    would not be those the answers were drawn with.
    """
    dtype = getattr(torch, recipe.dtype)
    compute_dtype = torch.bfloat16 if recipe.bf16 else dtype
    model = load_base(path or checkpoint_path(recipe.model), recipe.lora, dtype, device, compute_dtype)
    model.set_attn_implementation(recipe.attn_implementation)
    if model.vision_tokenizer is not None:
        model.vision_tokenizer.requires_grad_(False)
    return model, set_dropout(model)


def stored_dtype(recipe: GRPORecipe) -> torch.dtype:
    """Of the checkpoint that a recipe starts from."""
    return (
        Emu35ForConditionalGeneration.config_class.from_pretrained(checkpoint_path(recipe.model)).dtype
        or torch.bfloat16
    )


def set_dropout(model: Emu35ForConditionalGeneration, rates: dict[str, float] | None = None) -> dict[str, float]:
    """Sets dropout rates (default: all 0) and returns the old ones."""
    config = model.config.text_config
    names = ("attention_dropout", "residual_dropout", "embedding_dropout")
    old = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, 0.0 if rates is None else rates[name])
    for layer in model.model.layers:
        layer.residual_dropout = config.residual_dropout
        layer.self_attn.attention_dropout = config.attention_dropout
    return old


def last_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [path for path in Path(directory).glob("checkpoint-*") if (path / _COMPLETE).is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _check_same_run(recipe: GRPORecipe, checkpoint: Path):
    state = json.loads((checkpoint / _COMPLETE).read_text())
    current = json.loads(json.dumps(dataclasses.asdict(recipe)))
    free = {*_FREE_FIELDS, "steps"} if recipe.schedule == "constant" else _FREE_FIELDS
    changed = [k for k in current if k not in free and current[k] != state["recipe"].get(k)]
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run with another recipe (different: {', '.join(changed)}). Set the old values, "
            "choose another `output_dir`, or pass `resume=False`."
        )


def _work(rank: int, recipe: GRPORecipe, rewards, directory: str, export_dir: str, device: str, progress: bool):
    if dist.is_initialized():  # accelerate finds out by these
        own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        own |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world_size())
        os.environ.update({name: str(value) for name, value in own.items()})
    checkpoint = last_checkpoint(directory)
    if checkpoint is not None:
        _check_same_run(recipe, checkpoint)
    model, dropout = load_policy(recipe, device=device)
    processor = Emu35Processor.from_pretrained(checkpoint_path(recipe.model))
    reference = None
    if recipe.reference is not None:
        reference, _ = load_policy(recipe, None if recipe.reference == "start" else recipe.reference, device)
    trainer = Emu35GRPOTrainer(recipe, model, processor, rewards, directory, reference, device, progress)
    if rank == 0:
        for path in Path(directory).glob("checkpoint-*"):
            if not (path / _COMPLETE).is_file():
                shutil.rmtree(path)  # cut short; transformers would count it among those to keep
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if rank == 0 and recipe.lora is not None:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), recipe.lora, export_dir)
    elif rank == 0:
        save_model(trainer.base_model, processor, export_dir, stored_dtype(recipe), dropout)
    if rank == 0:
        write_card(export_dir, recipe, read_log(Path(directory) / LOG))
    trainer.accelerator.wait_for_everyone()


def save_model(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    directory: str | os.PathLike,
    dtype: torch.dtype,
    dropout: dict[str, float],
):
    """A checkpoint for users; the model is in `dtype` and has its dropout again."""
    set_dropout(model, dropout)
    model.model.to(dtype)
    model.lm_head.to(dtype)
    model.config.dtype = model.config.text_config.dtype = dtype
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _listed(rewards: Callable | list[Callable]) -> list[Callable]:
    return rewards if isinstance(rewards, list) else [rewards]


def check_rewards(mix: RewardMix, prompts: Dataset, loaded: bool = False):
    """Whether rewards find their columns, and what they give for a blank picture as the answer to each task.

    Args:
        loaded (`bool`): ask those that have weights, which are loaded; else those that have none.
    Raises:
        TypeError, ValueError: see [`RewardMix`].
    """
    rows = one_of_each_task(prompts)
    mix.check_columns({*rows[0], *_ANSWER_COLUMNS} - {"prompt"})
    blank = Image.new("RGB", (64, 64), "white")
    mix.rehearse(
        prompts=[prompt_text(row["prompt"]) for row in rows],
        completions=[""] * len(rows),
        loaded=loaded,
        messages=[as_messages(row["prompt"]) for row in rows],
        images=[[blank] for _ in rows],
        texts=[""] * len(rows),
        segments=[Segments([ImageSegment(torch.zeros(0, 0, dtype=torch.long), blank)]) for _ in rows],
        **{name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
    )


def train_grpo(
    recipe: GRPORecipe,
    directory: str | os.PathLike,
    export_dir: str | os.PathLike,
    rewards: Callable | list[Callable] | None = None,
    device: str = "cpu",
    progress: bool = True,
):
    """A GRPO run, or what is left of it, and the export.

    Args:
        recipe ([`GRPORecipe`]): what to do.
        directory (`str` or `os.PathLike`): gets checkpoints, `log.jsonl` and pages of `samples`.
        export_dir (`str` or `os.PathLike`): gets the adapter (a PEFT folder) or the model, and a card with curves.
        rewards (`Callable` or a list of them, *optional*):
            instead of the recipe's: `reward(prompts, completions, **columns) -> list[float | None]`. `prompts` are
            texts; columns are those of the prompts, `messages` (the prompts with their images), and `images`, `texts`
            and `segments` of the answers. For several processes it must pickle. A [`RewardMix`] is checked as the
            recipe's is.
        device (`str`): "cpu": `recipe.processes` processes share a step; "cuda": those that `accelerate launch` made.
        progress (`bool`): show a progress bar.
    Raises:
        OSError: if there is no such model.
        ValueError: if the recipe's numbers don't come out even, `directory` holds a run of another recipe, a prompt
            cannot be asked (see [`check_prompts`]), or a reward lacks a column or returns what it may not. All before
            anything is loaded, but for rewards that have weights: those are asked when theirs are.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    processes = int(os.environ["WORLD_SIZE"]) if launched else recipe.processes if device == "cpu" else 1
    recipe.accumulation(processes)
    stored_dtype(recipe)
    prompts = load_prompts(recipe)
    mix = recipe.reward_mix(prompt_tasks(prompts)) if rewards is None else rewards  # each process then has its own
    for reward in _listed(mix):
        if isinstance(reward, RewardMix):
            reward.check_tasks(prompt_tasks(prompts))
            check_rewards(reward, prompts)
    check_prompts(recipe, prompts)
    Path(directory).mkdir(parents=True, exist_ok=True)
    arguments = (recipe, rewards, str(directory), str(export_dir), device, progress)
    if launched:
        _work(int(os.environ["RANK"]), *arguments)
    else:
        launch(_work, processes, *arguments)
