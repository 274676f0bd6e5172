"""Answers drawn from a model, and the log-probabilities they were drawn with: the two halves of a policy gradient.

    prompts ──► generate, one call a task ──► ids ─┬─► kind of each token ──► log-probabilities (forward, backward)
                                                   └─► images (PIL), texts, segments ──► rewards

What is trained is what is sampled: the conditional model, without guidance, top-k or top-p, at the temperatures of
[`RolloutSettings`]. Guided rollouts would be drawn from another distribution than the one whose log-probabilities the
gradient takes, and cut-off tokens have none. A visual token is one of the visual rows of the output matrix, any other
one of the text rows, as in decoding. What the grammar or the settings force (BOI in image mode, sizes, IMG, EOL, EOI)
was not drawn and is not trained; neither are sizes that the model chooses itself.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from emu35.configuration_emu35 import Emu35TokenLayout
from emu35.generation_configuration_emu35 import Emu35GenerationConfig
from emu35.modeling_emu35 import LOSS_CHUNK_BYTES, Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor
from emu35.prompts_emu35 import get_template
from emu35.segments_emu35 import Segments
from torch.utils.checkpoint import checkpoint

from .shared_prompts import SharedPrompts

#: Settings of `generate` that would change the distribution; [`RolloutSettings`] fixes them.
FIXED_SETTINGS = {
    "do_sample": True,
    "guidance_scale": 1.0,
    "image_guidance_scale": None,
    "top_k": None,
    "top_p": None,
    "image_top_k": None,
    "image_top_p": None,
    "num_return_sequences": None,
}


class TokenKind(IntEnum):
    """What a token of an answer was drawn from."""

    FORCED = 0
    """Nothing: it had no alternative, or is not trained."""
    TEXT = 1
    """The text rows."""
    TEXT_WITHOUT_IMAGES = 2
    """The text rows but BOI: no (further) image may come."""
    VISUAL = 3
    """The visual rows."""


@dataclass
class RolloutSettings:
    """How answers are drawn.

    Args:
        temperature (`float`), image_temperature (`float`): of text and of visual tokens.
        image_decoder (`str`): "ar" or "speculative", which draw from the same distribution.
        batch_size (`int`): most answers that are drawn together.
        generate (`dict[str, dict]`): task -> further settings of `generate`, such as `height` or `max_new_tokens`.
    """

    temperature: float = 1.0
    image_temperature: float = 1.0
    image_decoder: str = "ar"
    batch_size: int = 64
    generate: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("temperature", "image_temperature", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`rollout.{name}` must be positive, got {getattr(self, name)!r}.")
        if self.image_decoder not in ("ar", "speculative"):
            raise ValueError(
                '`rollout.image_decoder` must be "ar" or "speculative", whose answers have log-probabilities, got '
                f"{self.image_decoder!r}."
            )
        own = {*FIXED_SETTINGS, "temperature", "image_temperature", "image_decoder"}
        for task, settings in self.generate.items():
            for name in own.intersection(settings):
                raise ValueError(
                    f"`rollout.generate.{task}.{name}` would change the distribution that is trained. Leave it out"
                    f"{'' if name in FIXED_SETTINGS else f', and set `rollout.{name}`'}."
                )
            try:
                get_template(task)
                Emu35GenerationConfig().with_settings(**settings)
            except ValueError as error:
                raise ValueError(f"`rollout.generate.{task}`: {error}") from error

    def config(self, stored: Emu35GenerationConfig, task: str) -> Emu35GenerationConfig:
        """The generation configuration of a task: the checkpoint's, these settings, and no filter or guidance."""
        own = {name: getattr(self, name) for name in ("temperature", "image_temperature", "image_decoder")}
        settings = {"return_dict_in_generate": True, **FIXED_SETTINGS, **own, **self.generate.get(task, {})}
        return stored.with_settings(task, **settings)


@dataclass
class Answer:
    """One answer.

    Attributes:
        prompt_ids (`list[int]`): with visual tokens in place of images.
        ids (`list[int]`): the answer.
        kinds (`list[int]`): a [`TokenKind`] for each of its ids.
        segments (`Segments`): the answer as text, thoughts and images.
    """

    prompt_ids: list[int]
    ids: list[int]
    kinds: list[int]
    segments: Segments


def token_kinds(
    ids: Iterable[int], layout: Emu35TokenLayout, image_mode: bool = False, max_images: int | None = None
) -> list[int]:
    """The [`TokenKind`] of each id of an answer.

    Args:
        image_mode (`bool`): whether the answer is one image, so that its BOI was forced.
        max_images (`int`, *optional*): images the answer may have; `None`: any number.
    """
    kinds, num_images, inside, visual_ids = [], 0, False, layout.visual_token_ids
    for token_id in ids:
        if token_id in visual_ids:
            kinds.append(TokenKind.VISUAL)
            continue
        begins = not inside and token_id == layout.boi_token_id
        if inside or (begins and image_mode):
            kinds.append(TokenKind.FORCED)
        else:
            may_draw = max_images is None or num_images < max_images
            kinds.append(TokenKind.TEXT if may_draw else TokenKind.TEXT_WITHOUT_IMAGES)
        num_images += begins
        inside = begins or (inside and token_id != layout.eoi_token_id)
    return [int(kind) for kind in kinds]


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


@torch.no_grad()
def draw_answers(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    prompts: Sequence[str | list[dict]],
    tasks: Sequence[str],
    seeds: Sequence[int],
    settings: RolloutSettings,
) -> list[Answer]:
    """An answer to each prompt; prompts of one task are answered together.

    An answer depends on its own seed, not on what else is in the batch. Images of prompts that are one and the same
    object, as in a group of rollouts, are encoded once.

    Args:
        prompts (`Sequence`): texts, or messages as [`Emu35Processor.apply_chat_template`] takes them.
        tasks (`Sequence[str]`): whose template and settings each prompt has.
        seeds (`Sequence[int]`): one for each answer.
    """
    places = defaultdict(list)
    for place, task in enumerate(tasks):
        places[task].append(place)
    answers: list[Answer | None] = [None] * len(prompts)
    with _evaluating(model):
        for task, own in places.items():
            config = settings.config(model.generation_config, task)
            for start in range(0, len(own), settings.batch_size):
                some = own[start : start + settings.batch_size]
                drawn = _draw(model, processor, [prompts[i] for i in some], task, [seeds[i] for i in some], config)
                for place, answer in zip(some, drawn, strict=True):
                    answers[place] = answer
    return answers


def _draw(model, processor, prompts: list, task: str, seeds: list[int], config) -> list[Answer]:
    unique = {id(prompt): prompt for prompt in prompts}
    number = {key: index for index, key in enumerate(unique)}
    rows = torch.tensor([number[id(prompt)] for prompt in prompts])
    inputs = processor.apply_chat_template([as_messages(prompt) for prompt in unique.values()], task=task)
    with torch.autocast(model.device.type, enabled=False):  # in bfloat16, a neighbour would often be the nearest code
        inputs = model.resolve_image_tokens(**inputs.to(model.device))
    input_ids, mask = (inputs[name][rows.to(model.device)] for name in ("input_ids", "attention_mask"))
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=config,
        generator=[torch.Generator(model.device).manual_seed(seed) for seed in seeds],
    )
    length = input_ids.shape[1]
    most = 0 if config.generation_mode == "text" else config.max_images
    answers = []
    for ids, kept, segments in zip(
        output.sequences.tolist(),
        output.attention_mask.bool().tolist(),
        processor.post_process_multimodal_output(output),
        strict=True,
    ):
        prompt_ids = [one for one, keep in zip(ids[:length], kept[:length], strict=True) if keep]
        answer = [one for one, keep in zip(ids[length:], kept[length:], strict=True) if keep]
        kinds = token_kinds(answer, model.config.token_layout, config.generation_mode == "image", most)
        answers.append(Answer(prompt_ids, answer, kinds, segments))
    return answers


@contextmanager
def _evaluating(model):
    """Evaluation mode: no dropout, and a cache although layers are computed again in training."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def answer_seed(*numbers: int) -> int:
    """A seed of its own for each combination of numbers (of the run, the step, the answer)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ------------------------------------------------------------------------------------------- log-probabilities


def add_answer_scores(model: Emu35ForConditionalGeneration, settings: RolloutSettings):
    """Lets `model(input_ids, attention_mask, token_kinds=kinds)` return what [`score_answers`] does.

    It goes through `forward`, so that what wraps a model (PEFT, DDP, FSDP) does its part. Other calls are as before.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args, token_kinds: torch.Tensor | None = None, **kwargs):
        if token_kinds is None:
            return original(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes all arguments on
        return score_answers(model, *args, token_kinds=token_kinds, settings=settings, **given)

    model.forward = forward


def score_answers(
    model: Emu35ForConditionalGeneration,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    token_kinds: torch.Tensor,
    settings: RolloutSettings,
) -> dict[str, torch.Tensor]:
    """Log-probabilities of answers, as they were drawn.  A prompt that several of them answer is computed once.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask:
            prompts, padded on the left, and answers, padded on the right.
        token_kinds (`torch.Tensor` of shape `(batch, answer_length)`): [`TokenKind`]s of the last ids.
    Returns:
        `dict`: `log_probs` and `entropies` (without a gradient), float32 `(batch, answer_length)`; 0 where a token was
        forced.
    """
    shared = SharedPrompts(input_ids, attention_mask, token_kinds.shape[1])
    hidden_states = model.model(
        input_ids=shared.input_ids,
        attention_mask=dict.fromkeys(model.config.text_config.layer_types),  # no masks: `attend` knows who sees whom
        position_ids=shared.position_ids,
        use_cache=False,
        attention_function=shared.attend,
    ).last_hidden_state[0]
    targets = input_ids[:, -token_kinds.shape[1] :]
    log_probs = torch.zeros(token_kinds.shape, dtype=torch.float32, device=input_ids.device)
    entropies = torch.zeros_like(log_probs)
    for kind in (TokenKind.TEXT, TokenKind.TEXT_WITHOUT_IMAGES, TokenKind.VISUAL):
        where = (token_kinds == kind).nonzero(as_tuple=True)
        values, spread = drawn_log_probs(model, hidden_states[shared.before[where]], targets[where], kind, settings)
        log_probs = log_probs.index_put(where, values)
        entropies[where] = spread
    return {"log_probs": log_probs, "entropies": entropies}


def drawn_log_probs(
    model: Emu35ForConditionalGeneration,
    hidden_states: torch.Tensor,
    targets: torch.LongTensor,
    kind: TokenKind,
    settings: RolloutSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens after `hidden_states`, and entropies of what they were drawn from.

    The head goes over chunks of `LOSS_CHUNK_BYTES` of logits, which are computed again in the backward pass: a
    thousand positions over 131,072 codes are half a GiB in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(n, hidden_size)`), targets (`torch.LongTensor` of shape `(n,)`): ids.
    Returns:
        two `torch.Tensor` of shape `(n,)`, float32; the entropies have no gradient.
    """
    layout = model.config.token_layout
    visual = kind == TokenKind.VISUAL
    rows = layout.num_visual_tokens if visual else model.config.text_config.vocab_size - layout.num_visual_tokens
    temperature = settings.image_temperature if visual else settings.temperature
    blocked = []
    if not visual:
        blocked = [layout.image_placeholder_token_id]
        if kind == TokenKind.TEXT_WITHOUT_IMAGES:
            blocked.append(layout.boi_token_id)
        blocked = [one for one in blocked if one is not None]
    # Columns of text are ids, but those after the visual range have moved down by its length.
    moved = visual | (targets >= layout.visual_token_end)
    offset = layout.visual_token_offset if visual else layout.num_visual_tokens
    columns = torch.where(torch.as_tensor(moved, device=targets.device), targets - offset, targets)

    def score(hidden_states: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.compute_logits(hidden_states, vocabulary="visual" if visual else "text").float() / temperature
        if blocked:
            logits = logits.index_fill(-1, torch.tensor(blocked, device=logits.device), float("-inf"))
        log_probs = logits.log_softmax(-1)
        with torch.no_grad():
            entropies = torch.special.entr(log_probs.exp()).sum(-1)
        return log_probs.gather(-1, columns.to(logits.device)[:, None])[:, 0], entropies

    size = max(1, LOSS_CHUNK_BYTES // (4 * rows))
    parts = []
    for chunk in zip(hidden_states.split(size), columns.split(size), strict=True):
        recompute = len(hidden_states) > size and torch.is_grad_enabled()
        parts.append(checkpoint(score, *chunk, use_reentrant=False) if recompute else score(*chunk))
    return torch.cat([values for values, _ in parts]), torch.cat([spread for _, spread in parts])
