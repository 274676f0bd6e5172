"""Conversations as token sequences: what a row of data becomes before training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from emu35.configuration_emu35 import Emu35TokenLayout
from emu35.modeling_emu35 import PIXELS_PER_PASS
from emu35.processing_emu35 import Emu35Processor
from emu35.prompts_emu35 import unconditional_pieces

from .reading import to_messages

IGNORED = -100
"""Label of a token that is not learnt."""

#: Errors by which a row, and not the program, is at fault.
ROW_ERRORS = (ValueError, TypeError, OSError)


@dataclass
class Example:
    """One conversation.

    Attributes:
        input_ids (`np.ndarray` of shape `(length,)`, int32): images that wait in `pixel_values` are placeholders.
        spoken (`np.ndarray` of shape `(length,)`, bool): what the assistant says, ESS and EOS included.
        task (`str`): names the prompt.
        pixel_values (`list[torch.Tensor]`): `(3, H, W)` each; empty once [`encode_images`] has been there.
    """

    input_ids: np.ndarray
    spoken: np.ndarray
    task: str
    pixel_values: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


class ExampleWriter:
    """Writes rows as examples.

    Args:
        processor ([`Emu35Processor`]): its chat template and image processor.
        max_length (`int`, *optional*): tokens; default: the tokenizer's limit.
        task (`str`, *optional*): of rows that name none, see [`to_messages`].
        image_area (`int`, *optional*): pixels, about, of each image; default: the task's own.
    """

    def __init__(
        self,
        processor: Emu35Processor,
        max_length: int | None = None,
        task: str | None = None,
        image_area: int | None = None,
    ):
        self.processor, self.task, self.image_area = processor, task, image_area
        self.max_length = processor.tokenizer.model_max_length if max_length is None else max_length

    def __call__(self, row: dict) -> Example:
        """Raises one of `ROW_ERRORS` if the row is malformed, has no answer, is too long or has a broken image."""
        messages, task = to_messages(row, self.task)
        inputs = self.processor.apply_chat_template(
            messages,
            task=task,
            add_generation_prompt=False,
            return_assistant_tokens_mask=True,
            return_tensors=None,
            padding=False,
            max_length=self.max_length,
            image_area=self.image_area,
        )
        ids, spoken = np.array(inputs["input_ids"][0], np.int32), np.array(inputs["assistant_masks"][0], bool)
        return Example(ids, spoken, task, list(inputs.get("pixel_values", [])))


def encode_images(examples: Sequence[Example], encode: Callable, layout: Emu35TokenLayout):
    """Puts the codes of waiting images where their placeholders are, in place.

    Args:
        encode (`Callable`): `list` of `(3, H, W)` -> `list` of codes `(h, w)`, see [`Emu35VisionTokenizer.encode`].
    """
    images = [image for example in examples for image in example.pixel_values]
    codes: list[np.ndarray | None] = [None] * len(images)
    order = sorted(range(len(images)), key=lambda index: tuple(images[index].shape))
    while order:  # equal sizes together, as many as fit
        size = images[order[0]].shape
        most = max(1, PIXELS_PER_PASS // (size[-2] * size[-1]))
        batch = [index for index in order[:most] if images[index].shape == size]
        order = order[len(batch) :]
        for index, grid in zip(batch, encode([images[index] for index in batch]), strict=True):
            codes[index] = grid.flatten().cpu().numpy()
    waiting = iter(codes)
    for example in examples:
        if example.pixel_values:
            grids = [next(waiting) for _ in example.pixel_values]
            holes = example.input_ids == layout.image_placeholder_token_id
            example.input_ids[holes] = np.concatenate(grids) + layout.visual_token_offset
            example.pixel_values = []


def labels_of(example: Example, everything: bool = False) -> np.ndarray:
    """int64 `(length,)`, not shifted.  The first token, which nothing predicts, is never learnt.

    Args:
        everything (`bool`): learn the prompt, too, and not the answers alone.
    """
    learnt = np.ones(len(example), bool) if everything else example.spoken.copy()
    learnt[0] = False
    return np.where(learnt, example.input_ids, IGNORED).astype(np.int64)


def without_text(example: Example, processor: Emu35Processor, rng: np.random.Generator) -> Example:
    """What the unconditional stream of guidance sees: the prompt without text, and one answer's images.

    Images before that answer stand in the prompt. An example without images in an answer stays as it is.
    """
    layout, ids = processor.token_layout, example.input_ids
    begins = np.flatnonzero(ids == layout.boi_token_id)
    ends = np.flatnonzero(ids == layout.eoi_token_id) + 1
    turns = np.cumsum(np.diff(example.spoken, prepend=False))  # odd while the assistant speaks
    drawing = [turn for turn in np.unique(turns[begins]) if turn % 2]
    if not drawing:
        return example
    turn = drawing[int(rng.integers(len(drawing)))]
    given = [token for b, e in zip(begins, ends, strict=True) if turns[b] < turn for token in ids[b:e].tolist()]
    made = [token for b, e in zip(begins, ends, strict=True) if turns[b] == turn for token in ids[b:e].tolist()]
    prompt = processor._encode(unconditional_pieces(layout, given))[0]
    kept = int((turns[begins] <= turn).sum())
    spoken = np.arange(len(prompt) + len(made)) >= len(prompt)
    return Example(np.array(prompt + made, np.int32), spoken, example.task, example.pixel_values[:kept])
