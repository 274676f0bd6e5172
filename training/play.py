"""Episodes played with a model: the user's turns are given, what the assistant says is the model's own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.processing_emu35 import Emu35Processor
from emu35.segments_emu35 import Segment

from .shapes import IMAGE_SIZE, Episode, Frame, GlobalThought, ImageThought, Said, Turn, to_image


def user_message(turn: Turn) -> dict[str, Any]:
    """A turn of the user as a chat message."""
    content = [
        {"type": "image", "image": to_image(piece)} if isinstance(piece, Frame) else {"type": "text", "text": piece}
        for piece in turn.content
    ]
    return {"role": "user", "content": content}


def said(segment: Segment) -> Said:
    """A segment of an answer as checkers read it."""
    if segment.kind == "image":
        fits = segment.complete and segment.image is not None and segment.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        return np.asarray(segment.image.convert("RGB")) if fits else None
    thought = {"global_thought": GlobalThought, "image_thought": ImageThought}.get(segment.kind)
    return segment.text.strip() if thought is None else thought(segment.text.strip())


@torch.no_grad()
def play(
    model: Emu35ForConditionalGeneration,
    processor: Emu35Processor,
    episodes: Sequence[Episode],
    generator: torch.Generator | None = None,
    **settings: Any,
) -> list[list[list[Segment]]]:
    """All episodes at once, turn by turn; later turns see the model's own earlier answers.

    Args:
        episodes (`Sequence[Episode]`): of one task; their right answers are not looked at.
        settings: of `generate`, besides the checkpoint's own for the task, which say what may come out.
    Returns:
        for each episode and turn of the user, the segments of the answer.
    """
    task = episodes[0].task
    messages: list[list[dict]] = [[] for _ in episodes]
    answers: list[list[list[Segment]]] = [[] for _ in episodes]
    config = model.generation_config.with_settings(task, **settings)
    for number in range(max(len(episode.turns) for episode in episodes) // 2):
        playing = [index for index, episode in enumerate(episodes) if len(episode.turns) > 2 * number]
        for index in playing:
            messages[index].append(user_message(episodes[index].turns[2 * number]))
        inputs = processor.apply_chat_template([messages[index] for index in playing], task=task)
        output = model.generate(**inputs.to(model.device), generation_config=config, generator=generator)
        for index, segments in zip(playing, processor.post_process_multimodal_output(output), strict=True):
            answers[index].append(segments)
            # An incomplete image can't be said again; the conversation goes on without it.
            kept = [segment for segment in segments if segment.kind != "image" or segment.complete]
            messages[index].append({"role": "assistant", "content": kept})
    return answers
