"""Processor of Emu3.5: text and images to the model's inputs (and back: `output_processing_emu35`).

Plain text that stands together in a prompt, the template's and the user's, is joined and then encoded by a tokenizer
that has no control tokens at all. So BPE sees the same string as in the release, and what a user types can never
become a control token.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration_emu35 import SPECIAL_TOKENS, Emu35TokenLayout
from .image_processing_emu35 import flatten_images, is_single_image
from .output_processing_emu35 import Emu35OutputMixin, to_list
from .prompts_emu35 import (
    Conversation,
    ImagePiece,
    Piece,
    TaskTemplate,
    Turn,
    get_template,
    read_conversation,
    unconditional_pieces,
)
from .segments_emu35 import Segment

_VISUAL_TOKEN_PATTERN = re.compile(r"<\|visual token (\d{6})\|>")


class Emu35Inputs(BatchFeature):
    """What the processor returns.  `to(dtype=...)` moves `pixel_values` but leaves them in float32.

    The vision tokenizer computes in float32 whatever the model's dtype is, and pixels rounded to half precision would
    change codes.
    """

    def to(self, *args, **kwargs) -> "Emu35Inputs":
        pixel_values = self.data.get("pixel_values")
        super().to(*args, **kwargs)
        if pixel_values is not None:
            moved = self.data["pixel_values"]
            self.data["pixel_values"] = [
                image.to(target.device) for image, target in zip(pixel_values, moved, strict=True)
            ]
        return self


class Emu35Processor(Emu35OutputMixin, ProcessorMixin):
    r"""
    Text and images to the model's inputs, and its output to typed segments.

    Args:
        image_processor ([`Emu35ImageProcessor`]): prepares images; its `factor` is the vision tokenizer's.
        tokenizer (`PreTrainedTokenizerFast`): see `tokenization_emu35`.
        token_layout ([`Emu35TokenLayout`] or `dict`, *optional*): which id means what; default: the released one.
        image_area (`int` or `dict[str, int]`, *optional*):
            pixels, about, of an image of the prompt, for all tasks or by task; default: the task's own.
        max_images (`int`, defaults to 3):
            images of one user turn that the model was trained for (3 is the release's limit); more give a warning.

    Example:
        >>> inputs = processor(text="a red fox", task="t2i")
        >>> segments = processor.post_process_multimodal_output(model.generate(**inputs))[0]
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        token_layout: Emu35TokenLayout | dict | None = None,
        image_area: int | dict[str, int] | None = None,
        max_images: int = 3,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"`tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}. Make one with "
                "tokenizer_from_tiktoken, tokenizer_from_qwen or train_small_tokenizer."
            )
        if not isinstance(token_layout, Emu35TokenLayout):
            token_layout = Emu35TokenLayout(**(token_layout or {}))
        _check_layout(tokenizer, token_layout)
        for task in image_area if isinstance(image_area, dict) else ():
            get_template(task)
        self.token_layout = token_layout
        self.image_area = image_area
        self.max_images = max_images

    @property
    def model_input_names(self) -> list[str]:
        prompts = ("negative_prompt", "negative_image_prompt")
        negative = [f"{prompt}_{name}" for prompt in prompts for name in ("ids", "attention_mask")]
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes", *negative]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        layout = self.token_layout.to_dict()
        output["token_layout"] = {key: layout[key] for key in Emu35TokenLayout.__annotations__}
        return output

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: Any = None,
        task: str = "t2i",
        image_area: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        max_length: int | None = None,
        allow_control_tokens: bool = False,
        videos: None = None,
        audio: None = None,
    ) -> Emu35Inputs:
        """The inputs of [`generate`] for one prompt or a batch of prompts of the same task.

        Args:
            text (`str` or `list[str]`): what the user says.
            images:
                for one text: an image or a list of images; for a list of texts: a list of the same length whose items
                are an image, a list of images, or `None`.  What counts as an image: see [`Emu35ImageProcessor`].
            task (`str`): "t2i", "x2i", "howto", "story", "explore", "vla", "vqa" or "chat".
            image_area (`int`, *optional*): pixels, about, of each image after resizing.
            return_tensors (`str`, *optional*): "pt", "np", or `None` for lists (of ids; pixels are always tensors).
            padding (`bool` or `str`): to the longest, on the left; "max_length": to `max_length`; `False`: not at all.
            max_length (`int`, *optional*): longest prompt; default: the tokenizer's `model_max_length`.
            allow_control_tokens (`bool`):
                whether control tokens and visual tokens written in `text` count as such. Only for text you trust.

        Returns:
            [`Emu35Inputs`]: `input_ids` and `attention_mask` `(batch, length)`.
            With images: `pixel_values`, a flat list of `(3, H, W)` in the order of their placeholders, row after row,
            and `image_sizes` `(num_images, 2)`, their heights and widths in pixels.
            For tasks that make images: the unconditional prompts, with the same images, as `negative_prompt_ids` and
            `negative_prompt_attention_mask`; and, with images, those without images too (for two-scale guidance) as
            `negative_image_prompt_ids` and `negative_image_prompt_attention_mask`.
        Raises:
            TypeError, ValueError: on empty or too long text, images that cannot be read, none where the task needs
                one or any where it takes none, an unknown task, or a batch whose texts and images don't match.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"`{name}` must be None: Emu3.5 takes text and images.")
        batched = isinstance(text, (list, tuple))
        texts = list(text) if batched else [text]
        if not texts:
            raise ValueError("`text` is an empty list. Give at least one prompt.")
        conversations, names = [], []
        for row, row_images in enumerate(_images_per_text(images, len(texts), batched)):
            names.append(f"text[{row}]" if batched else "text")
            if not isinstance(texts[row], str):
                raise TypeError(f"`{names[-1]}` must be a string, got {type(texts[row]).__name__}.")
            pieces = [ImagePiece(image=image) for image in row_images]
            conversations.append(Conversation([Turn("user", [*pieces, texts[row]])]))
        return self._build_inputs(
            conversations, names, task, image_area, return_tensors, padding, max_length, allow_control_tokens
        )

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: None = None,
        task: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        image_area: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        allow_control_tokens: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> Emu35Inputs | torch.Tensor | list | str:
        """A conversation, or a batch of conversations, as the inputs of [`generate`].

        One user message gives exactly what [`__call__`] gives. The release knows only that one turn; further turns are
        written like the first, and an assistant's turn ends as its answers end:
        `{BOS}{system} USER: {content} ASSISTANT: {BSS}{answer}{ESS}{EOS} USER: {content} ASSISTANT: {BSS}`.
        A system message takes the place of the task's opening sentence. The unconditional prompts hold all images so
        far, of both sides, and none of the text.

        Args:
            conversation:
                messages `{"role": "system" | "user" | "assistant", "content": ...}`. Content is a string or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or "path", "url", "base64").
                An assistant's may also hold `{"type": "global_thought" | "image_thought", "text": ...}`, or the
                segments that [`decode_multimodal`] returned, whose images go back in as the codes they are; or it is
                the ids of the answer, `output.sequences[row, output.answer_start[row]:]`. With its ids the next prompt
                begins, token for token, with what the model has read and written so far, so that a cache of it fits;
                read off text alone, it may be split into other tokens. In a user's turn the task decides whether
                images stand before or after the text, as in training; only images *between* texts stay where they
                are.
            task (`str`, *optional*):
                see [`__call__`]. Default: "chat" where the user speaks more than once, else "t2i". For a dialogue say
                "chat" from its first turn on: the opening sentence depends on it.
            add_generation_prompt (`bool`): whether the assistant speaks next. `False` for training.
            continue_final_message (`bool`):
                the last message is the assistant's and unfinished (`add_generation_prompt` is without effect then);
                for example the frames so far of a `vla`. Given as ids, it may end anywhere, even inside an image.
            tokenize (`bool`): `False`: the prompt as a string, for reading. Do not encode it again: in a string, text
                that looks like a control token cannot be told from a control token.
            return_dict (`bool`): `False`: only the ids.
            return_assistant_tokens_mask (`bool`): adds `assistant_masks`, 1 on the assistant's words, ESS and EOS.
            return_tensors, image_area, padding, max_length, allow_control_tokens: see [`__call__`].
            processor_kwargs (`dict`, *optional*): any of these, as transformers' pipelines pass them.
        Raises:
            TypeError, ValueError: as [`__call__`], and on messages that are malformed or out of turn.
        """
        unknown = [key for key, value in kwargs.items() if value is not None]
        if chat_template is not None or unknown:
            given = unknown or ["chat_template"]
            raise TypeError(f"apply_chat_template takes no {given}: the templates are built in, chosen by `task`.")
        options = {
            "task": task,
            "image_area": image_area,
            "return_tensors": return_tensors,
            "padding": padding,
            "max_length": max_length,
            "allow_control_tokens": allow_control_tokens,
        }
        unknown = sorted(set(processor_kwargs or {}) - set(options))
        if unknown:
            raise TypeError(f"`processor_kwargs` may hold {list(options)}; got {unknown}.")
        options |= processor_kwargs or {}

        is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
        batched = is_list and isinstance(conversation[0], (list, tuple))
        names = [f"messages[{row}]" for row in range(len(conversation))] if batched else ["messages"]
        conversations = [
            read_conversation(self._with_ids(messages), self.token_layout, name, continue_final_message)
            for messages, name in zip(conversation if batched else [conversation], names, strict=True)
        ]
        for parsed, name in zip(conversations, names, strict=True):
            last = parsed.turns[-1].role
            if continue_final_message and last != "assistant":
                raise ValueError(f"`continue_final_message=True`, but the last of `{name}` is the user's.")
            if add_generation_prompt and not continue_final_message and last == "assistant":
                raise ValueError(
                    f"the last of `{name}` is the assistant's. To go on with it: `continue_final_message=True`; for a "
                    "finished conversation: `add_generation_prompt=False`."
                )
        if options["task"] is None:
            dialogue = any(sum(turn.role == "user" for turn in item.turns) > 1 for item in conversations)
            options["task"] = "chat" if dialogue else "t2i"
        inputs = self._build_inputs(
            conversations,
            names,
            **options,
            assistant_next=add_generation_prompt and not continue_final_message,
            open_end=continue_final_message,
            return_assistant_masks=return_assistant_tokens_mask,
        )
        if not tokenize:
            ids = [
                [token_id for token_id, kept in zip(row, mask, strict=True) if kept]
                for row, mask in zip(to_list(inputs["input_ids"]), to_list(inputs["attention_mask"]), strict=True)
            ]
            return [self.decode(row) for row in ids] if batched else self.decode(ids[0])
        return inputs if return_dict else inputs["input_ids"]

    def _with_ids(self, messages: Any) -> Any:
        """The messages, with the ids an answer's segments were read from in place of the segments.

        Only where the ids still say the same: segments are lists, which callers may change.
        """
        if not isinstance(messages, (list, tuple)):
            return messages
        found = []
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            ids = getattr(content, "ids", None)
            if ids and self.token_layout.bos_token_id not in ids and _same(self.decode_multimodal(ids), content):
                message = {**message, "content": ids}
            found.append(message)
        return found

    def _build_inputs(
        self,
        conversations: list[Conversation],
        names: list[str],
        task: str,
        image_area: int | None,
        return_tensors: str | None,
        padding: bool | str,
        max_length: int | None,
        allow_control_tokens: bool,
        assistant_next: bool = True,
        open_end: bool = False,
        return_assistant_masks: bool = False,
    ) -> Emu35Inputs:
        template, layout = get_template(task), self.token_layout
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f'`return_tensors` must be "pt", "np" or None, got {return_tensors!r}.')
        if padding not in (True, False, "longest", "max_length"):
            raise ValueError(f'`padding` must be True, False, "longest" or "max_length", got {padding!r}.')
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        if padding == "max_length" and max_length is None:
            raise ValueError('`padding="max_length"` needs `max_length`.')
        for conversation, name in zip(conversations, names, strict=True):
            self._check_conversation(conversation, name, task)

        data = self._encode_images(conversations, template, task, image_area)
        prompts, masks = [], []
        for conversation, name in zip(conversations, names, strict=True):
            pieces, spoken = conversation.pieces(template, layout, assistant_next, open_end)
            ids, mask = self._encode(pieces, spoken, allow_control_tokens)
            if len(ids) > limit:
                parts = [
                    part.pieces(template, layout, part.turns[-1].role == "user")[0]
                    for part in conversation.beginnings()[:-1]
                ]
                ends = [len(self._encode(part, None, allow_control_tokens)[0]) for part in parts]
                raise ValueError(self._too_long(conversation, name, [*ends, len(ids)], limit))
            prompts.append(ids)
            masks.append(mask)
        width = max_length if padding == "max_length" else None
        pad_id = layout.pad_token_id

        def add(name: str, mask_name: str, rows: list[list[int]]):
            data[name] = _pad(rows, pad_id, padding, return_tensors, width)
            data[mask_name] = _pad([[1] * len(row) for row in rows], 0, padding, return_tensors, width)

        add("input_ids", "attention_mask", prompts)
        if return_assistant_masks:
            data["assistant_masks"] = _pad(masks, 0, padding, return_tensors, width)
        if template.makes_images and (assistant_next or open_end):
            unconditional = [item.unconditional_pieces(layout, open_end) for item in conversations]
            add(
                "negative_prompt_ids",
                "negative_prompt_attention_mask",
                [self._encode(pieces)[0] for pieces in unconditional],
            )
            if any(conversation.images for conversation in conversations):
                empty = self._encode(unconditional_pieces(layout))[0]
                rows = [list(empty) for _ in conversations]
                add("negative_image_prompt_ids", "negative_image_prompt_attention_mask", rows)
        return Emu35Inputs(data)

    def _check_conversation(self, conversation: Conversation, name: str, task: str):
        template = get_template(task)
        for turn in conversation.turns:
            if turn.role != "user":
                continue
            if not "".join(piece for piece in turn.content if isinstance(piece, str)).strip():
                raise ValueError(
                    f"`{name}`: the prompt is empty. Say what you want; guidance makes its own empty prompts."
                )
            if turn.images and not template.takes_images:
                raise ValueError(
                    f"`task={task!r}` takes no images, but `{name}` has {len(turn.images)}. Use task='x2i' to make a "
                    "new image of them, 'vqa' to ask about them."
                )
            if len(turn.images) > self.max_images:
                warnings.warn(
                    f"`{name}` has {len(turn.images)} images in one turn. The model was trained with at most "
                    f"{self.max_images} (`processor.max_images`): expect less of it.",
                    stacklevel=4,
                )
        if len(conversation.images) < template.min_images:
            raise ValueError(
                f"`task={task!r}` needs an image, but `{name}` has none. Pass `images=`, or use another task "
                "('t2i' makes images from text alone)."
            )

    def _too_long(self, conversation: Conversation, name: str, ends: list[int], limit: int) -> str:
        """What to say of a prompt that does not fit.  `ends`: its tokens up to the end of each turn."""
        place = next(index for index, end in enumerate(ends) if end > limit)
        turn, before = conversation.turns[place], ends[place - 1] if place else 0
        length = f"{ends[place] - before} tokens"
        if turn.images:
            num_image_tokens = sum(self.token_layout.num_image_tokens(*image.size) for image in turn.images)
            length += f" ({len(turn.images)} image{'s' * (len(turn.images) > 1)}: {num_image_tokens})"
        way_out = "shorten the text, pass fewer images, or a smaller `image_area`."
        if len(ends) == 1:
            return f"`{name}` gives a prompt of {length}, more than `max_length`={limit}. S{way_out[1:]}"
        message = place + (conversation.system is not None)
        return (
            f"`{name}[{message}]`, the {turn.role}'s, does not fit: it takes {length}, but the turns before it leave "
            f"{limit - before} of `max_length`={limit}. Drop earlier turns, {way_out}"
        )

    def _encode_images(
        self, conversations: list[Conversation], template: TaskTemplate, task: str, image_area: int | None
    ) -> dict[str, Any]:
        """Prepares all images and writes their sizes, in codes, into the pieces."""
        pieces = [image for conversation in conversations for image in conversation.images if image.codes is None]
        if not pieces:
            return {}
        if image_area is None:
            own = self.image_area.get(task) if isinstance(self.image_area, dict) else self.image_area
            image_area = template.image_area if own is None else own
        features = self.image_processor(images=[piece.image for piece in pieces], image_area=image_area)
        for piece, size in zip(pieces, features["image_sizes"] // self.image_processor.factor, strict=True):
            piece.size = tuple(size.tolist())
        return {"pixel_values": features["pixel_values"], "image_sizes": features["image_sizes"]}

    def _encode(
        self, pieces: Sequence[Piece], spoken: Sequence[bool] | None = None, allow_control_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and a mask that is 1 where `spoken` is true."""
        ids: list[int] = []
        mask: list[int] = []
        text = ""
        spoken = [False] * len(pieces) if spoken is None else spoken
        for index, piece in enumerate(pieces):
            if isinstance(piece, str):
                text += piece
                if index + 1 < len(pieces) and isinstance(pieces[index + 1], str):
                    continue
                new, text = self._encode_text(text, allow_control_tokens), ""
            elif isinstance(piece, ImagePiece):
                new = self._image_ids(piece)
            else:
                new = [piece]
            ids += new
            mask += [int(spoken[index])] * len(new)
        return ids, mask

    def _image_ids(self, piece: ImagePiece) -> list[int]:
        layout = self.token_layout
        if piece.codes is None:
            height, width = piece.size
            return layout.image_token_ids([[layout.image_placeholder_token_id] * width] * height)
        highest = max(max(row) for row in piece.codes)
        if highest >= layout.num_visual_tokens:
            raise ValueError(
                f"an image of the conversation has code {highest}; codes end at {layout.num_visual_tokens}."
            )
        return layout.image_token_ids([[layout.visual_token_offset + code for code in row] for row in piece.codes])

    def _encode_text(self, text: str, allow_control_tokens: bool = False) -> list[int]:
        # Lone surrogates are no Unicode text; like tiktoken, write them as replacement characters.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        backend = self.tokenizer.backend_tokenizer
        if not allow_control_tokens:
            # Shares the vocabulary, but knows no added tokens: nothing that is typed can become one.
            plain = Tokenizer(backend.model)
            plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
            return plain.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        begin = 0
        for match in [*_VISUAL_TOKEN_PATTERN.finditer(text), None]:
            code = int(match[1]) if match else -1
            if code >= self.token_layout.num_visual_tokens:
                continue  # no token of this vocabulary: ordinary text, as in the release
            part = text[begin : match.start() if match else None]
            ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=False)["input_ids"]
            if match:
                ids.append(self.token_layout.visual_token_offset + code)
                begin = match.end()
        return ids


def _same(segments: Sequence[Segment], others: Sequence[Segment]) -> bool:
    """Whether two answers have the same texts, thoughts and codes."""
    return [_said(segment) for segment in segments] == [_said(segment) for segment in others]


def _said(segment: Segment) -> Any:
    kind = getattr(segment, "kind", None)
    if kind == "image":
        return [segment.complete, segment.codes.tolist()]
    if kind == "global_thought":
        return [segment.complete, *map(_said, segment.segments)]
    return segment


def _check_layout(tokenizer: PreTrainedTokenizerBase, layout: Emu35TokenLayout):
    """Raises a ValueError where the tokenizer has other ids for our tokens than the layout."""
    way_out = "Use token_layout_from_tokenizer(tokenizer, ...)."
    if len(tokenizer) > layout.visual_token_offset:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens, but in `token_layout` the visual ids begin at "
            f"{layout.visual_token_offset}. {way_out}"
        )
    expected = {SPECIAL_TOKENS[role]: token_id for role, token_id in layout.special_token_ids.items()}
    expected |= dict(zip("0123456789", layout.digit_token_ids, strict=False))
    for token, token_id in expected.items():
        if tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ValueError(
                f"`token_layout` has the id {token_id} for {token}, which in `tokenizer` is "
                f"{tokenizer.convert_ids_to_tokens(token_id)!r}. {way_out}"
            )


def _images_per_text(images: Any, num_texts: int, batched: bool) -> list[list]:
    if images is None:
        return [[] for _ in range(num_texts)]
    if not batched:
        return [flatten_images(images)]
    if is_single_image(images) or len(images) != num_texts:
        got = "one image" if is_single_image(images) else f"{len(images)} items"
        raise ValueError(
            f"`text` is a list of {num_texts}, so `images` must be a list of {num_texts} (each an image, a list of "
            f"images or None), got {got}. For several images in one prompt, nest them: [[image, image]]."
        )
    return [[] if item is None else flatten_images(item) for item in images]


def _pad(rows: list[list[int]], value: int, padding: bool | str, return_tensors: str | None, width: int | None) -> Any:
    if padding:
        width = max(map(len, rows)) if width is None else width
        rows = [[value] * (width - len(row)) + row for row in rows]
    if return_tensors is None:
        return rows
    if len({len(row) for row in rows}) > 1:
        lengths = [len(row) for row in rows]
        raise ValueError(f"prompts of {lengths} tokens make no tensor. Use `padding=True`, or `return_tensors=None`.")
    return torch.tensor(rows) if return_tensors == "pt" else np.array(rows)


__all__ = ["Emu35Inputs", "Emu35Processor"]
