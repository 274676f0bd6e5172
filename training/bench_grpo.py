"""`emu35 bench grpo`: what an update learns from, log-probabilities of groups of answers, forward and backward.

    way      what is computed
    emu35    each prompt once (`shared_prompts`)
    rows     each answer after its prompt, as rows of a batch

Both have the same head over the same tokens. Answers are random; prompts are as long as those of the tasks.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from emu35.bench_emu35 import Part
from emu35.bench_memory_emu35 import Memory, in_own_process, timed
from emu35.configuration_emu35 import Emu35TokenLayout

from .bench_train import MODELS
from .rollout import RolloutSettings, TokenKind, drawn_log_probs, score_answers

GROUP_SIZE = 8
WAYS = ("emu35", "rows")


@dataclass(frozen=True)
class Asked:
    """Groups of answers.

    Args:
        name (`str`): of the task.
        prompt (`int`), answer (`int`): tokens.
        groups (`int`): of one pass.
        kind (`TokenKind`): of the answers' tokens.
    """

    name: str
    prompt: int
    answer: int
    groups: int
    kind: TokenKind

    def batch(self, layout: Emu35TokenLayout, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, mask and kinds, as [`score_answers`] takes them; nothing is padded."""
        draws = torch.Generator().manual_seed(seed)
        prompts = torch.randint(0, 256, (self.groups, self.prompt), generator=draws)
        span = layout.visual_token_ids if self.kind == TokenKind.VISUAL else range(256)
        shape = (self.groups * GROUP_SIZE, self.answer)
        answers = torch.randint(span.start, span.stop, shape, generator=draws)
        ids = torch.cat([prompts.repeat_interleave(GROUP_SIZE, dim=0), answers], dim=1)
        return ids, torch.ones_like(ids), torch.full(shape, int(self.kind))


#: Model of `bench_train` -> what is asked: as long as in tiny-grpo.yaml, and in proportion to released sizes.
ASKED = {
    "emu35-tiny": (
        Asked("t2i", 40, 48, 4, TokenKind.VISUAL),
        Asked("x2i", 110, 48, 4, TokenKind.VISUAL),
        Asked("vqa", 87, 6, 4, TokenKind.TEXT),
    ),
    "random": (Asked("x2i", 256, 64, 1, TokenKind.VISUAL), Asked("vqa", 256, 16, 1, TokenKind.TEXT)),
}


def score_rows(model, input_ids, attention_mask, token_kinds, settings: RolloutSettings) -> dict[str, torch.Tensor]:
    """The log-probabilities of [`score_answers`] of tokens of one kind, the straightforward way."""
    hidden_states = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    before = hidden_states[:, -token_kinds.shape[1] - 1 : -1].flatten(0, 1)
    targets = input_ids[:, -token_kinds.shape[1] :].flatten()
    kind = TokenKind(int(token_kinds[0, 0]))
    values, _ = drawn_log_probs(model, before, targets, kind, settings)
    return {"log_probs": values.view(token_kinds.shape)}


def bench_grpo(quick: bool, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """All tasks with all models.  `quick`: the tiny model alone, once."""
    models = []
    for name in list(ASKED)[: 1 if quick else None]:
        tasks = []
        for number, asked in enumerate(ASKED[name]):
            arguments = (name, number, device, str(dtype).removeprefix("torch."), seed, 1 if quick else 3)
            ways = {way: in_own_process(way, *arguments, module=__name__) for way in WAYS}
            ours, plain = ways.values()
            tasks.append(
                {
                    "task": asked.name,
                    "prompt": asked.prompt,
                    "answer": asked.answer,
                    "groups": asked.groups,
                    "ways": ways,
                    "speedup": plain["seconds"] / ours["seconds"],
                    "fewer_tokens": plain["tokens"] / ours["tokens"],
                    "memory_ratio": ours["extra_bytes"] / plain["extra_bytes"],
                }
            )
        models.append({"name": name, "tasks": tasks})
    return {"group_size": GROUP_SIZE, "models": models}


def measure_scores(way: str, name: str, number: int, device: str, dtype: str, seed: int, times: int) -> dict[str, Any]:
    """One way with one model and task, in a process of its own."""
    bench, asked, settings = MODELS[name], ASKED[name][number], RolloutSettings()
    model = bench.load(device, getattr(torch, dtype), seed).train()
    for layer in model.model.layers:  # as in GRPO, where dropout is off
        layer.residual_dropout = layer.self_attn.attention_dropout = 0.0
    model.config.text_config.embedding_dropout = 0.0
    if bench.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = [tensor.to(device) for tensor in asked.batch(model.config.token_layout, seed)]
    score = score_answers if way == "emu35" else score_rows
    computed: list[int] = []

    def count(module, args, kwargs):
        computed.append(kwargs["input_ids"].numel())

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    sums: list[float] = []

    def step():
        log_probs = score(model, *batch, settings)["log_probs"]
        log_probs.mean().backward()
        sums.append(float(log_probs.detach().mean()))

    step()  # libraries set themselves up, gradients get their memory
    memory = Memory(device)
    seconds = min(timed(step, device) for _ in range(times))
    return {
        "seconds": seconds,
        "tokens": computed[-1],
        "extra_bytes": memory.extra_bytes(),
        "mean_log_prob": sums[-1],
    }


def grpo_tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    tables = []
    for model in results["models"]:
        rows = [
            [
                f"{one['task']}: prompt {one['prompt']}, answer {one['answer']}",
                *(f"{one['ways'][way]['seconds']:.2f}" for way in WAYS),
                f"{one['speedup']:.2f}x",
                f"{one['fewer_tokens']:.2f}x",
                f"{one['memory_ratio']:.2f}",
            ]
            for one in model["tasks"]
        ]
        title = (
            f"{model['name']}: log-probabilities of {results['group_size']} answers a prompt, forward and backward\n"
        )
        head = ["task", "emu35 s", "rows s", "faster", "fewer tokens", "extra memory"]
        tables.append((title, head, rows))
    return tables


def grpo_targets(results: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """Where prompts are longer than answers, half of what fewer tokens could bring."""
    return [
        (f"grpo: faster, {model['name']}, {one['task']}", f">= {wanted:.2g}", one["speedup"], one["speedup"] >= wanted)
        for model in results["models"]
        for one in model["tasks"]
        if one["prompt"] > one["answer"] and (wanted := max(1.0, one["fewer_tokens"] / 2))
    ]


PART = Part(bench_grpo, grpo_tables, grpo_targets)

if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_scores(*json.loads(sys.argv[1]))) + "\n")
