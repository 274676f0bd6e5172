"""What a sequence of Emu3.5 tokens says: text, thoughts and images, read off the ids.

The grammar of an answer: `[BOG global thought EOG] {text | [BOC image thought EOC] image}* ESS EOS`, an image being
`BOI h "*" w IMG row EOL row ... row EOI`. Whatever does not follow it is reported where it stands and costs nothing of
what surrounds it. Ids are integers here from beginning to end.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch

from .configuration_emu35 import Emu35TokenLayout
from .image_tokens_emu35 import parse_size


@dataclass
class Text:
    """Ordinary text."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass
class ImageThought:
    """The chain of thought that comes before an image.  `complete`: whether its end token came."""

    kind: ClassVar[str] = "image_thought"
    text: str
    complete: bool = True


@dataclass(eq=False)
class Image:
    """One image.

    Attributes:
        codes (`torch.LongTensor` of shape `(token_height, token_width)`):
            the rows that are whole, as visual codes; `(0, 0)` for an image out of a file, which has only pixels.
        image (`PIL.Image.Image` or `None`): the pixels, if they were asked for and `codes` has any.
        complete (`bool`): whether it follows the grammar: closed, and of the size that it announces.
        reason (`str`): what is wrong with it otherwise.
        rows (`tuple[tuple[int, ...], ...]`): all codes as they stand, unfinished and misshapen rows included.
        size (`tuple[int, int]` or `None`): the height and width, in codes, that it announces.
    """

    kind: ClassVar[str] = "image"
    codes: torch.LongTensor
    image: PIL.Image.Image | None = None
    complete: bool = True
    reason: str = ""
    rows: tuple[tuple[int, ...], ...] = ()
    size: tuple[int, int] | None = None


@dataclass
class GlobalThought:
    """The chain of thought about the whole answer.  `complete`: whether its end token came."""

    kind: ClassVar[str] = "global_thought"
    segments: list = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """Its text, without the images."""
        return "".join(segment.text for segment in self.segments if segment.kind != "image")


Segment = Text | GlobalThought | ImageThought | Image


class Segments(list):
    """One answer: a list of [`Text`], [`GlobalThought`], [`ImageThought`] and [`Image`].

    Example:
        >>> segments = processor.post_process_multimodal_output(output, vision_tokenizer=model)[0]
        >>> segments.save("out", prompt="a fox crosses the river")
        PosixPath('out')

    Attributes:
        ids (`list[int]` or `None`):
            what it was read from. Text has more than one tokenisation, so only these say it again exactly.
    """

    ids: list[int] | None = None

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return Segments(item) if isinstance(index, slice) else item

    def __add__(self, other):
        return Segments([*self, *other]) if isinstance(other, list) else NotImplemented

    @property
    def text(self) -> str:
        """Its text, without thoughts and images."""
        return "".join(segment.text for segment in self if segment.kind == "text")

    @property
    def images(self) -> list[PIL.Image.Image]:
        """Its complete images, those inside a global thought included.  Raises a ValueError if one has no pixels."""
        self.check_decoded()
        return [image.image for image in iter_images(self) if image.complete]

    def check_decoded(self) -> None:
        """Raises a ValueError if a complete image has codes only, and a TypeError if an element is no segment."""
        for index, segment in enumerate(self):
            if not isinstance(segment, Segment):
                raise TypeError(
                    f"`segments[{index}]` must be a Text, GlobalThought, ImageThought or Image, got "
                    f"{type(segment).__name__}."
                )
        for number, image in enumerate(iter_images(self), start=1):
            if image.complete and image.image is None:
                raise ValueError(
                    f"image {number} is not decoded: it has codes but no pixels. Pass `vision_tokenizer=model` to "
                    "`post_process_multimodal_output` or `decode_multimodal`."
                )

    def save(
        self,
        directory: str | os.PathLike,
        title: str | None = None,
        prompt: str | None = None,
        fps: float = 1,
        reference_images: Sequence[Any] = (),
    ) -> Path:
        """Writes the answer as something to look at; see [`save_segments`].

        Returns:
            `Path`: the folder. It holds `index.html`, `story.md`, `image-01.png`, ... and perhaps `story.mp4`.
        """
        from .segments_saving_emu35 import save_segments  # which knows the segments

        return save_segments(self, directory, title, prompt, fps, reference_images)

    def save_protobuf(
        self, path: str | os.PathLike, prompt: str | None = None, reference_images: Sequence[Any] = ()
    ) -> Path:
        """Writes the answer in the format of the public release; see [`save_story`]."""
        from .protobuf_emu35 import Story, save_story

        return save_story(Story(prompt or "", reference_images, self), path)


def parse_segments(ids: Sequence[int], layout: Emu35TokenLayout, decode_text: Callable[[list[int]], str]) -> Segments:
    """Splits a sequence into its segments.

    As in the release, end-of-segment and end-of-sequence tokens vanish, and text of nothing but white space is left
    out. A thought without an end token stops where an image or another thought begins, or at the end of the segment.

    Args:
        ids (`Sequence[int]`): one sequence, without batch dimension.
        decode_text: renders the ids of a run of text, misplaced control tokens included.
    """
    segments = Segments()
    run: list[int] = []

    def end_of_text():
        text = decode_text(run) if run else ""
        if text.strip():
            segments.append(Text(text))
        run.clear()

    visual_ids, ends = layout.visual_token_ids, _ends(layout)
    thought_ends = {layout.boc_token_id, layout.boi_token_id, layout.bog_token_id, *ends}

    def ends_thought(token_id: int) -> bool:
        return token_id in thought_ends or token_id in visual_ids

    position = 0
    while position < len(ids):
        token_id = ids[position]
        if token_id in ends:
            position += 1
        elif token_id == layout.boi_token_id or token_id in visual_ids:
            end_of_text()
            image, position = read_image(ids, position, layout)
            segments.append(image)
        elif token_id == layout.bog_token_id:
            end_of_text()
            end = _find(ids, position + 1, {layout.eog_token_id, layout.bog_token_id, *ends}.__contains__)
            complete = end < len(ids) and ids[end] == layout.eog_token_id
            if not complete:
                end = _find(ids, position + 1, ends_thought)
            inner = parse_segments(ids[position + 1 : end], layout, decode_text)
            segments.append(GlobalThought(inner, complete))
            position = end + complete
        elif token_id == layout.boc_token_id:
            end_of_text()
            end = _find(ids, position + 1, lambda token: token == layout.eoc_token_id or ends_thought(token))
            complete = end < len(ids) and ids[end] == layout.eoc_token_id
            segments.append(ImageThought(decode_text(list(ids[position + 1 : end])), complete))
            position = end + complete
        else:
            run.append(token_id)
            position += 1
    end_of_text()
    return segments


def read_image(ids: Sequence[int], begin: int, layout: Emu35TokenLayout) -> tuple[Image, int]:
    """The image at `ids[begin]` (BOI, or visual tokens whose BOI is missing) and the index after it.

    It ends with EOI, or before the first token that cannot belong to it. Placeholders count as codes of value -1.
    """
    position, size, problem = begin, None, "visual tokens without the begin of an image"
    if ids[begin] == layout.boi_token_id:
        size_ids = {*layout.digit_token_ids, layout.size_separator_token_id}
        position = _find(ids, begin + 1, lambda token_id: token_id not in size_ids)
        size = parse_size(ids[begin + 1 : position], layout)
        problem = "" if size else "no size, or none that can be read"
        if position < len(ids) and ids[position] == layout.img_token_id:
            position += 1
        elif position < len(ids):
            size, problem = None, "its size is not followed by visual tokens"
            position = begin + 1  # these digits are no size: leave them to the text
    rows: list[list[int]] = [[]]
    closed, visual_ids = False, layout.visual_token_ids
    while position < len(ids) and not closed:
        token_id = ids[position]
        if token_id in visual_ids:
            rows[-1].append(token_id - visual_ids.start)
        elif token_id == layout.image_placeholder_token_id:
            rows[-1].append(-1)
        elif token_id == layout.eol_token_id:
            rows.append([])
        elif token_id == layout.eoi_token_id:
            closed = True
        else:
            break
        position += 1
    extra_row = len(rows) > 1 and not rows[-1] and closed
    if not rows[-1]:
        rows.pop()

    width = size[1] if size and size[1] in map(len, rows) else len(rows[0]) if rows else 0
    whole = next((index for index, row in enumerate(rows) if len(row) != width), len(rows))
    codes = torch.tensor(rows[:whole], dtype=torch.long).view(whole, width)
    if size and (whole < len(rows) or codes.shape != size):
        problem = f"{whole} whole rows of {width} codes instead of {size[0]} rows of {size[1]}"
    elif size and extra_row:
        problem = "an end of row after the last row"
    if not problem and any(-1 in row for row in rows):
        problem = "placeholders instead of codes; see `model.resolve_image_tokens`"
    if not closed:
        problem = f"not closed; {problem}" if problem else "not closed"
    return Image(codes, None, not problem, problem, tuple(map(tuple, rows)), size), position


def iter_images(segments: Sequence[Segment]) -> Iterator[Image]:
    """All images in order, those inside a global thought included."""
    for segment in segments:
        if segment.kind == "image":
            yield segment
        elif segment.kind == "global_thought":
            yield from iter_images(segment.segments)


def decode_images(segments: Sequence[Segment], vision_tokenizer: Any) -> None:
    """Fills in the pixels, in place, of all images that have whole rows and no pixels yet.

    A code outside the codebook makes an image incomplete, with a reason.

    Args:
        vision_tokenizer:
            the model, its vision tokenizer, or a function from codes `(1, h, w)` to pixels `(1, 3, H, W)` in [-1, 1].
    """
    config = getattr(vision_tokenizer, "config", None)
    config = getattr(config, "vision_tokenizer_config", config)
    codebook_size = getattr(config, "codebook_size", None)
    for image in iter_images(segments):
        if image.image is not None or not image.codes.numel() or (image.codes < 0).any():
            continue
        if codebook_size is not None and int(image.codes.max()) >= codebook_size:
            image.complete = False
            image.reason = f"code {int(image.codes.max())} is outside the codebook of {codebook_size}"
            continue
        image.image = pixels_to_pil(_decode(vision_tokenizer, image.codes))


def _decode(vision_tokenizer: Any, codes: torch.LongTensor) -> torch.Tensor:
    if hasattr(vision_tokenizer, "decode_image"):
        return vision_tokenizer.decode_image([codes])[0]
    if hasattr(vision_tokenizer, "decode"):
        if isinstance(vision_tokenizer, torch.nn.Module):
            codes = codes.to(next(vision_tokenizer.parameters()).device)
        return vision_tokenizer.decode(codes[None])[0]
    if callable(vision_tokenizer):
        return vision_tokenizer(codes[None])[0]
    raise TypeError(
        "`vision_tokenizer` must be a model, a vision tokenizer, or a function from codes (1, h, w) to pixels, got "
        f"{type(vision_tokenizer).__name__}."
    )


def pixels_to_pil(pixels: torch.Tensor | np.ndarray | PIL.Image.Image) -> PIL.Image.Image:
    """Pixels as an image, as the release does it: `(y + 1) * 127.5`, clamped, truncated.

    Args:
        pixels: `(3, H, W)` or `(1, 3, H, W)`, nominally in [-1, 1]; or bytes `(H, W, 3)`; or a PIL image.
    """
    if isinstance(pixels, PIL.Image.Image):
        return pixels
    pixels = torch.as_tensor(pixels).detach().cpu()
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3:
        return PIL.Image.fromarray(pixels.contiguous().numpy())
    if not pixels.is_floating_point() or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"pixels must be floats of the shape (3, H, W) or bytes (H, W, 3), got {pixels.dtype} of the shape "
            f"{tuple(pixels.shape)}."
        )
    pixels = ((pixels.float() + 1.0) * 127.5).clamp(0.0, 255.0).to(torch.uint8)
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _ends(layout: Emu35TokenLayout) -> tuple[int | None, int | None]:
    return layout.ess_token_id, layout.eos_token_id


def _find(ids: Sequence[int], begin: int, wanted: Callable[[int], bool]) -> int:
    return next((index for index in range(begin, len(ids)) if wanted(ids[index])), len(ids))


__all__ = ["GlobalThought", "Image", "ImageThought", "Segments", "Text"]
