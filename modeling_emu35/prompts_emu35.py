"""The prompts of Emu3.5: one table of task templates, and conversations as sequences of pieces.

A prompt is `{BOS}{system} USER: {content} ASSISTANT: {BSS}`, an answer ends with `{ESS}{EOS}`. The pieces of a prompt
are control ids, plain text and images; turning them into ids is the processor's work.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .configuration_emu35 import Emu35TokenLayout
from .image_tokens_emu35 import find_images
from .output_processing_emu35 import to_list
from .segments_emu35 import GlobalThought, Image, ImageThought, Text


@dataclass(frozen=True)
class TaskTemplate:
    """The prompt of one task.

    Attributes:
        system (`str`): the opening sentence.
        content (`str`): where text and images stand in the user's turn.
        makes_images (`bool`): whether the answer may hold images, so that guidance needs an unconditional prompt.
        image_area (`int`): pixels, about, to which images of the prompt are resized.
        min_images (`int`): images that a conversation must have.
        takes_images (`bool`): whether the user may show images.
    """

    system: str
    content: str = "{text}{images}"
    makes_images: bool = True
    image_area: int = 720 * 720
    min_images: int = 0
    takes_images: bool = True


#: The opening sentence of unconditional prompts.
NO_TASK = "You are a helpful assistant."
_FOR_TASK = "You are a helpful assistant for {} task."
_USER, _ASSISTANT = " USER: ", " ASSISTANT: "

#: Sources: the release's configs. "vqa" has no official template: this is what the community uses with the base model.
#: "chat" is ours: a vqa that may answer with images, so that questions and wishes can follow one another.
TASK_TEMPLATES: dict[str, TaskTemplate] = {
    "t2i": TaskTemplate(_FOR_TASK.format("t2i"), image_area=1024 * 1024, takes_images=False),
    "x2i": TaskTemplate(_FOR_TASK.format("x2i"), "{images}{text}", image_area=1024 * 1024, min_images=1),
    "howto": TaskTemplate(_FOR_TASK.format("howto") + " Please generate a response with interleaved text and images."),
    "story": TaskTemplate(_FOR_TASK.format("story")),
    "explore": TaskTemplate(_FOR_TASK.format("explore")),
    "vla": TaskTemplate(_FOR_TASK.format("vla")),
    "vqa": TaskTemplate(NO_TASK, "{images} {text}", makes_images=False, min_images=1),
    "chat": TaskTemplate(NO_TASK, "{images} {text}"),
}


def get_template(task: str) -> TaskTemplate:
    """The template of a task.  Raises a ValueError that lists the tasks if there is none of that name."""
    if task not in TASK_TEMPLATES:
        close = difflib.get_close_matches(str(task), TASK_TEMPLATES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"`task` must be one of {', '.join(TASK_TEMPLATES)}; got {task!r}.{hint}")
    return TASK_TEMPLATES[task]


@dataclass(eq=False)
class ImagePiece:
    """An image in a prompt.

    Attributes:
        image: what the caller gave; the image processor reads it.
        codes (`list[list[int]]` or `None`): rows of visual codes, for an image that exists as codes already.
        size (`tuple[int, int]` or `None`): height and width in codes, once they are known.
    """

    image: Any = None
    codes: list[list[int]] | None = None
    size: tuple[int, int] | None = None


#: Plain text, the id of a control token, or an image.
Piece = str | int | ImagePiece


@dataclass
class Turn:
    """What the user or the assistant says."""

    role: str
    content: list[Piece]

    @property
    def images(self) -> list[ImagePiece]:
        return [piece for piece in self.content if isinstance(piece, ImagePiece)]


@dataclass
class Conversation:
    """A prompt before it becomes pieces.  `system`: takes the place of the task's opening sentence."""

    turns: list[Turn]
    system: str | None = None

    @property
    def images(self) -> list[ImagePiece]:
        return [image for turn in self.turns for image in turn.images]

    def beginnings(self) -> list["Conversation"]:
        """The conversation up to the end of each turn."""
        return [Conversation(self.turns[: end + 1], self.system) for end in range(len(self.turns))]

    def pieces(
        self, template: TaskTemplate, layout: Emu35TokenLayout, assistant_next: bool, open_end: bool = False
    ) -> tuple[list[Piece], list[bool]]:
        """The whole prompt, and for every piece whether the assistant says it.

        Args:
            assistant_next (`bool`): end with the begin of the assistant's turn.
            open_end (`bool`): leave the last turn, the assistant's, unfinished.
        """
        pieces: list[Piece] = [layout.bos_token_id, template.system if self.system is None else self.system]
        spoken = [False] * len(pieces)
        for index, turn in enumerate(self.turns):
            if turn.role == "user":
                said = [_USER, *_arrange(turn.content, template)]
                pieces += said
                spoken += [False] * len(said)
            else:
                said, end = list(turn.content), []
                while said and said[-1] in (layout.ess_token_id, layout.eos_token_id):
                    end.insert(0, said.pop())
                if not (open_end and index == len(self.turns) - 1):
                    said += end if layout.eos_token_id in end else [layout.ess_token_id, layout.eos_token_id]
                pieces += [_ASSISTANT, layout.bss_token_id, *said]
                spoken += [False, False] + [True] * len(said)
        if assistant_next:
            pieces += [_ASSISTANT, layout.bss_token_id]
            spoken += [False, False]
        return pieces, spoken

    def unconditional_pieces(self, layout: Emu35TokenLayout, open_end: bool = False) -> list[Piece]:
        """What guidance starts from: all images so far, of both sides, and no text.

        Those of an unfinished answer stand in the answer, where the stream that made them has them.
        """
        finished = self.turns[:-1] if open_end else self.turns
        asked = unconditional_pieces(layout, [image for turn in finished for image in turn.images])
        return asked + (self.turns[-1].images if open_end else [])


def unconditional_pieces(layout: Emu35TokenLayout, images: Sequence[ImagePiece] = ()) -> list[Piece]:
    """The prompt without text, and with or without images, that guidance starts from."""
    return [layout.bos_token_id, NO_TASK, _USER, *images, _ASSISTANT, layout.bss_token_id]


def _arrange(content: list[Piece], template: TaskTemplate) -> list[Piece]:
    """Puts a user's images where the task has them, before or after the text; images between texts stay there."""
    is_text = [isinstance(piece, str) for piece in content]
    runs = sum(now and not before for now, before in zip(is_text, [False, *is_text], strict=False))
    if runs > 1 or all(is_text):
        return content
    parts = {
        "{text}": [piece for piece in content if isinstance(piece, str)],
        "{images}": [piece for piece in content if isinstance(piece, ImagePiece)],
    }
    return [piece for part in re.split(r"(\{\w+\})", template.content) for piece in parts.get(part, [part])]


def read_conversation(
    messages: Sequence[dict], layout: Emu35TokenLayout, name: str = "messages", open_end: bool = False
) -> Conversation:
    """A conversation from chat messages; see [`Emu35Processor.apply_chat_template`].

    Args:
        open_end (`bool`): the last message is unfinished, so that its ids may end inside an image.
    Raises:
        TypeError, ValueError: if a message is no message, speaks out of turn, or has content of an unknown kind.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"`{name}` must be a list of messages and not empty, got {messages!r}.")
    conversation = Conversation([])
    for index, message in enumerate(messages):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise TypeError(f"`{where}` must be a dict with `role` and `content`, got {message!r}.")
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f'`{where}`: `role` must be "system", "user" or "assistant", got {role!r}.')
        if role == "assistant" and _is_ids(message["content"]):
            unfinished = open_end and index == len(messages) - 1
            content = _read_ids(to_list(message["content"]), layout, where, unfinished)
        else:
            content = _read_content(message["content"], role, layout, where)
        if role == "system":
            if index > 0:
                raise ValueError(f"`{where}`: a system message must be the first one.")
            conversation.system = "".join(content)
            continue
        expected = "assistant" if conversation.turns and conversation.turns[-1].role == "user" else "user"
        if role != expected:
            raise ValueError(
                f"`{where}`: user and assistant take turns, the user first; expected {expected}, got {role}."
            )
        conversation.turns.append(Turn(role, content))
    if not conversation.turns:
        raise ValueError(f"`{name}` has a system message only. Add a user message.")
    return conversation


def _read_content(content: Any, role: str, layout: Emu35TokenLayout, where: str) -> list[Piece]:
    if not isinstance(content, (str, list, tuple)):
        raise TypeError(f"`{where}`: `content` must be a string or a list, got {type(content).__name__}.")
    pieces: list[Piece] = []
    for number, item in enumerate([content] if isinstance(content, str) else content):
        kind = item.get("type") if isinstance(item, dict) else getattr(item, "kind", None)
        if isinstance(item, str):
            pieces.append(item)
        elif isinstance(item, Text):
            pieces.append(item.text)
        elif kind == "text" and isinstance(item, dict) and isinstance(item.get("text"), str):
            pieces.append(item["text"])
        elif kind == "image" and role != "system":
            pieces.append(_read_image_item(item, f"{where} content[{number}]"))
        elif kind in ("global_thought", "image_thought") and role == "assistant":
            pieces += _read_thought(item, kind, layout, f"{where} content[{number}]")
        else:
            allowed = {
                "system": "text",
                "user": "text and images",
                "assistant": "text, images, thoughts, and segments of decode_multimodal",
            }
            raise ValueError(
                f"`{where}` content[{number}]: a {role} message may hold {allowed[role]}; got {item!r:.200}."
            )
    return pieces


def _is_ids(content: Any) -> bool:
    if isinstance(content, (list, tuple)):
        return len(content) > 0 and all(isinstance(item, int) for item in content)
    return isinstance(content, (torch.Tensor, np.ndarray))


def _read_ids(ids: list[int], layout: Emu35TokenLayout, where: str, unfinished: bool) -> list[Piece]:
    """An answer as `generate` wrote it, id for id; an unfinished one may end inside an image."""
    end = layout.visual_token_end
    if not isinstance(ids, list) or any(not isinstance(one, int) or not 0 <= one < end for one in ids):
        raise ValueError(
            f"`{where}`: ids must be one sequence of ints in [0, {end}): one row of "
            "`output.sequences` from `output.answer_start` on."
        )
    if layout.bos_token_id in ids:
        raise ValueError(f"`{where}`: these ids hold a prompt. Give those from `output.answer_start` on.")
    while ids and ids[-1] == layout.pad_token_id:
        ids = ids[:-1]
    pieces, position = [], 0
    for image in find_images(ids, layout):
        if image.complete:
            size = (image.token_height, image.token_width)
            codes = torch.tensor(image.codes).view(size).tolist()
            pieces += [*ids[position : image.begin], ImagePiece(codes=codes, size=size)]
            position = image.end
        elif not (unfinished and image.state in ("size", "rows")):
            raise ValueError(
                f"`{where}` holds an incomplete image ({image.problem or 'not closed'}). Leave it out, or finish it "
                "first with `continue_final_message=True`."
            )
    return [*pieces, *ids[position:]]


def _read_image_item(item: dict | Image, where: str) -> ImagePiece:
    if isinstance(item, Image):
        if not item.complete:
            raise ValueError(f"`{where}` is an incomplete image ({item.reason}). Leave it out.")
        if not item.codes.numel():  # out of a file: pixels only
            return ImagePiece(image=item.image)
        return ImagePiece(codes=item.codes.tolist(), size=tuple(item.codes.shape))
    sources = [item[key] for key in ("image", "path", "url", "base64") if item.get(key) is not None]
    if len(sources) != 1:
        raise ValueError(
            f"`{where}`: an image needs exactly one of `image`, `path`, `url`, `base64`; got {sorted(item)}."
        )
    source = sources[0]
    if "base64" in item and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:image/png;base64,{source}"
    return ImagePiece(image=source)


def _read_thought(item: dict | GlobalThought | ImageThought, kind: str, layout: Emu35TokenLayout, where: str) -> list:
    if isinstance(item, GlobalThought):
        inner = _read_content(item.segments, "assistant", layout, where)
    else:
        text = item.get("text") if isinstance(item, dict) else item.text
        if not isinstance(text, str):
            raise TypeError(f"`{where}`: `text` of a thought must be a string, got {type(text).__name__}.")
        inner = [text]
    if kind == "global_thought":
        return [layout.bog_token_id, *inner, layout.eog_token_id]
    return [layout.boc_token_id, *inner, layout.eoc_token_id]


__all__ = ["TASK_TEMPLATES", "TaskTemplate", "get_template"]
