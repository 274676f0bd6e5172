"""What a request may hold.  Each check returns what to go on with, or raises a [`UserError`]."""

from collections.abc import Sequence
from math import isfinite, isqrt
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from emu35 import Emu35ForConditionalGeneration, Segments

from .errors import UserError
from .settings import SpaceSettings
from .uploads import check_image, read_image

#: A `max_length` for the processor, with which it takes everything.
UNLIMITED = 2**31


def check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> Any:
    """A number from `least` to `most`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not is_number or (whole and value != int(value)) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"The {name} must be {kind} from {least} to {most}.")
    return int(value) if whole else float(value)


def check_prompt(prompt: Any, settings: SpaceSettings) -> str:
    """Text that the model can read.  The tiny model's language has no capitals, which phones like to write."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("Please write what you would like to have.")
    if len(prompt) > settings.max_prompt_length:
        raise UserError(
            f"The text has {len(prompt)} characters, and at most {settings.max_prompt_length} are allowed. Shorten it."
        )
    # Lone surrogates, which JSON can hold, are no text.
    prompt = prompt.strip().encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    return prompt.lower() if settings.is_tiny else prompt


def check_images(images: Any, settings: SpaceSettings, at_least: int = 0) -> list[PIL.Image.Image]:
    """Pictures, or uploads by their paths, as decoded pictures."""
    images = [image for image in images or () if image is not None]
    if not at_least <= len(images) <= settings.max_uploads:
        raise UserError(
            f"Show {at_least} to {settings.max_uploads} pictures; this request has {len(images)}."
            if images
            else "Please add a picture."
        )
    return [
        read_image(image, settings) if isinstance(image, (str, Path)) else check_image(image, settings)
        for image in images
    ]


def check_messages(messages: Any, settings: SpaceSettings) -> list[dict]:
    """A conversation, in the form that the processor reads.

    The processor would also take paths and addresses, which a visitor must not name: only pictures come through.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("The conversation is empty. Please write something.")
    checked = []
    for number, message in enumerate(messages):
        role = "user" if number % 2 == 0 else "assistant"
        if not isinstance(message, dict) or message.get("role") != role:
            raise UserError("The conversation is out of order. Please start a new one.")
        content = message.get("content")
        if role == "assistant":
            if not isinstance(content, list) or not all(hasattr(part, "kind") for part in content):
                raise UserError("The conversation holds something that is no answer. Please start a new one.")
            checked.append({"role": role, "content": _complete(content)})
        else:
            checked.append({"role": role, "content": _check_turn(content, settings)})
    if checked[-1]["role"] != "user":
        raise UserError("Please write something.")
    return checked


def check_length(input_ids: torch.LongTensor, model: Emu35ForConditionalGeneration, settings: SpaceSettings):
    """Whether the context has room for a prompt `(1, length)` and a picture after it."""
    codes = settings.max_pixels // model.image_factor**2
    longest = model.config.text_config.max_position_embeddings - codes - isqrt(codes)
    if input_ids.shape[1] > longest:
        raise UserError(
            "This is too long for the model to read and answer. Write less, show fewer pictures, or start a new "
            "conversation."
        )


def _check_turn(content: Any, settings: SpaceSettings) -> list:
    parts = [content] if isinstance(content, str) else content if isinstance(content, (list, tuple)) else []
    texts = [part for part in parts if isinstance(part, str)]
    images = [part.get("image") for part in parts if isinstance(part, dict) and part.get("type") == "image"]
    if len(texts) + len(images) != len(parts) or not all(isinstance(image, PIL.Image.Image) for image in images):
        raise UserError("A message may hold text and pictures only.")
    shown = check_images(images, settings)
    return [check_prompt(" ".join(texts), settings), *({"type": "image", "image": image} for image in shown)]


def _complete(segments: list) -> list:
    """An answer as the model can read it again: without what was left unfinished."""
    if all(getattr(segment, "complete", True) for segment in segments):
        return segments  # with its ids, if it has them
    return Segments(segment for segment in segments if getattr(segment, "complete", True))


__all__ = ["UNLIMITED", "check_images", "check_length", "check_messages", "check_number", "check_prompt"]
