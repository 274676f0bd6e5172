"""Reading images out of a sequence of token ids: the grammar `BOI h "*" w IMG row EOL row ... EOI`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .configuration_emu35 import Emu35TokenLayout


@dataclass(frozen=True)
class ImageTokens:
    """One image in a sequence of ids.

    Attributes:
        begin, end (`int`): `ids[begin]` is BOI; `end` is one past the last id that belongs to the image.
        size_ids (`tuple[int, ...]`): ids between BOI and IMG.
        token_height, token_width (`int` or `None`): the size, where it is written out and well formed.
        codes (`tuple[int, ...]`): visual codes (not ids), row after row, as far as they go.
        state (`str`): "size" (IMG has not come), "rows" (codes may follow), "complete" (closed, every row full) or
            "damaged".
        problem (`str`): what is wrong with a damaged image, else empty.
    """

    begin: int
    end: int
    size_ids: tuple[int, ...]
    token_height: int | None
    token_width: int | None
    codes: tuple[int, ...]
    state: str
    problem: str = ""

    @property
    def complete(self) -> bool:
        return self.state == "complete"


def parse_size(size_ids: Sequence[int], layout: Emu35TokenLayout) -> tuple[int, int] | None:
    """(token_height, token_width) of the ids between BOI and IMG, or `None` if they are not `digits "*" digits`."""
    digit_of = {token_id: digit for digit, token_id in enumerate(layout.digit_token_ids)}
    sides = [[]]
    for token_id in size_ids:
        if token_id == layout.size_separator_token_id:
            sides.append([])
        elif token_id in digit_of:
            sides[-1].append(digit_of[token_id])
        else:
            return None
    # No image has a side of ten digits, and Python refuses to read thousands of them.
    if len(sides) != 2 or not all(0 < len(side) < 10 for side in sides):
        return None
    height, width = (int("".join(map(str, side))) for side in sides)
    return (height, width) if height and width else None


def parse_image(ids: Sequence[int], begin: int, layout: Emu35TokenLayout) -> ImageTokens:
    """The image whose BOI is `ids[begin]`.  Ends at its EOI, or before the first id that cannot belong to it."""
    position = begin + 1
    size_tokens = {*layout.digit_token_ids, layout.size_separator_token_id}
    while position < len(ids) and ids[position] in size_tokens:
        position += 1
    size_ids = tuple(ids[begin + 1 : position])
    size = parse_size(size_ids, layout)
    if position == len(ids):
        height, width = size or (None, None)
        return ImageTokens(begin, position, size_ids, height, width, (), "size")
    if size is None or ids[position] != layout.img_token_id:
        problem = "its size is not written as height*width"
        return ImageTokens(begin, position, size_ids, None, None, (), "damaged", problem)
    height, width = size
    position += 1
    rows: list[list[int]] = [[]]
    closed, visual_ids = False, layout.visual_token_ids
    while position < len(ids) and not closed:
        token_id = ids[position]
        if token_id in visual_ids:
            rows[-1].append(token_id - visual_ids.start)
        elif token_id == layout.eol_token_id:
            rows.append([])
        elif token_id == layout.eoi_token_id:
            closed = True
        else:
            break
        position += 1
    codes = tuple(code for row in rows for code in row)
    fits = len(rows) <= height and all(len(row) == width for row in rows[:-1]) and len(rows[-1]) <= width
    if closed and fits and len(codes) == height * width:
        state, problem = "complete", ""
    elif not closed and position == len(ids) and fits:
        state, problem = "rows", ""
    else:
        state = "damaged"
        problem = f"{len(codes)} codes in {len(rows)} rows instead of {height}*{width}"
    return ImageTokens(begin, position, size_ids, height, width, codes, state, problem)


def find_images(ids: Sequence[int], layout: Emu35TokenLayout, start: int = 0) -> Iterator[ImageTokens]:
    """All images of a sequence from index `start` on, in order."""
    position, boi_token_id = start, layout.boi_token_id
    while position < len(ids):
        if ids[position] == boi_token_id:
            image = parse_image(ids, position, layout)
            yield image
            position = image.end
        else:
            position += 1


def last_image(ids: Sequence[int], layout: Emu35TokenLayout, start: int = 0) -> ImageTokens | None:
    """The last image of a sequence, or `None`."""
    image = None
    for image in find_images(ids, layout, start):  # noqa: B007 - only the last one matters
        pass
    return image


def unfinished_image(prompt: list[int], layout: Emu35TokenLayout) -> ImageTokens | None:
    """The image that a prompt ends in, or `None`.

    Raises:
        ValueError: if it can't be continued.
    """
    image = last_image(prompt, layout)
    if image is None or image.complete:
        return None
    ends_here = image.end == len(prompt) and prompt[-1] != layout.eoi_token_id
    problem = image.problem
    if image.state == "size" and not _begins_a_size(image.size_ids, layout):
        problem = "its size is not written as height*width"
    if problem and (ends_here or prompt[-1] == layout.img_token_id):
        raise ValueError(f"the prompt ends inside an image that cannot be continued: {problem}.")
    return image if ends_here else None


def _begins_a_size(size_ids: Sequence[int], layout: Emu35TokenLayout) -> bool:
    characters = {token_id: str(digit) for digit, token_id in enumerate(layout.digit_token_ids)}
    characters[layout.size_separator_token_id] = "*"
    return re.fullmatch(r"([1-9]\d*(\*([1-9]\d*)?)?)?", "".join(characters[one] for one in size_ids)) is not None


def answer_images(prompt: list[int], layout: Emu35TokenLayout) -> list[ImageTokens]:
    """Complete images of the answer that a prompt already holds, which is what follows its last BSS."""
    if layout.bss_token_id not in prompt:
        return []
    start = len(prompt) - prompt[::-1].index(layout.bss_token_id)
    return [image for image in find_images(prompt, layout, start) if image.complete]


def missing_answer_images(prompt: list[int], negative_prompt: list[int], layout: Emu35TokenLayout) -> list[int]:
    """Ids of the assistant's images in a prompt that the negative prompt lacks.

    They belong there when an answer is continued: the unconditional stream sees the images made so far. The images a
    negative prompt has are normally the first ones of the prompt; if it has others, it lacks all of the answer's.
    """
    images = list(find_images(prompt, layout))
    known = [negative_prompt[image.begin : image.end] for image in find_images(negative_prompt, layout)]
    if known == [prompt[image.begin : image.end] for image in images[: len(known)]]:
        images = images[len(known) :]
    made = [image for image in images if image.complete and _is_said_by_assistant(prompt[: image.begin], layout)]
    return [token_id for image in made for token_id in prompt[image.begin : image.end]]


def _is_said_by_assistant(before: list[int], layout: Emu35TokenLayout) -> bool:
    """Whether BSS, and no ESS or EOS behind it, stands in the ids `before` an image."""
    for token_id in reversed(before):
        if token_id == layout.bss_token_id:
            return True
        if token_id in (layout.ess_token_id, layout.eos_token_id):
            return False
    return False


def is_finished(prompt: list[int], eos_ids: set[int], image_mode: bool, layout: Emu35TokenLayout) -> bool:
    """Whether a prompt ends where an answer ends: in an EOS behind its BSS or, in image mode, in an image."""
    if layout.bss_token_id not in prompt:
        return False
    images = answer_images(prompt, layout) if image_mode else []
    return prompt[-1] in eos_ids or any(image.end == len(prompt) for image in images)
