"""Partly given images: what `generate` is told to keep, as a canvas of codes with holes."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image

from .generation_configuration_emu35 import Emu35GenerationConfig

#: An image to complete: pixels `(3, H, W)` in [-1, 1], codes `(h, w)`, or a PIL image.
GivenImage = torch.Tensor | Image


def given_canvases(
    model,
    image: GivenImage | Sequence[GivenImage] | None,
    mask: torch.BoolTensor | Sequence[torch.BoolTensor] | None,
    offset: tuple[int, int],
    grid: tuple[int, int] | None,
    config: Emu35GenerationConfig,
    batch: int,
) -> list[torch.LongTensor | None]:
    """What `generate(image=, mask=, image_offset=)` asks for.

    Args:
        model: encodes pixels.
        grid (`tuple[int, int]`, *optional*): height and width of the canvas, in codes; default: each image's own.
        batch (`int`): number of prompts.
    Returns:
        for each prompt a `torch.LongTensor` `(h, w)` on the CPU, -1 where codes are to be made; `None` if there is no
        `image`.
    Raises:
        ValueError: for anything that is no image, no mask, or does not fit.
    """
    offset = tuple(offset)
    if image is None:
        if mask is not None or offset != (0, 0):
            name = "`image_offset`" if mask is None else "`mask`"
            raise ValueError(f"{name} needs the `image` that it is about.")
        return [None] * batch
    if config.generation_mode != "image":
        raise ValueError(
            f"`image` is completed with `generation_mode`='image' only, got {config.generation_mode!r}. Images to "
            "talk about belong into the prompt: `processor(images=...)`."
        )
    if len(offset) != 2 or not all(isinstance(one, int) for one in offset):
        raise ValueError(f"`image_offset` must be a row and a column, in codes, got {offset!r}.")
    images = list(image) if isinstance(image, (list, tuple)) else [image] * batch
    masks = list(mask) if isinstance(mask, (list, tuple)) else [mask] * batch
    for name, given in (("image", images), ("mask", masks)):
        if len(given) != batch:
            raise ValueError(f"`{name}` has {len(given)} items for {batch} prompts. Give one for all, or one each.")
    for one in masks:
        if one is not None and not (isinstance(one, torch.Tensor) and one.dtype == torch.bool and one.ndim == 2):
            got = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, torch.Tensor) else type(one).__name__
            raise ValueError(f"`mask` must be a bool tensor (height, width), one value a code, got {got}.")
    same = not isinstance(image, (list, tuple))
    codes = [_codes_of(model, one) for one in (images[:1] if same else images)]
    return [
        place_codes(one, None if own is None else own.cpu(), grid or tuple(one.shape), offset)
        for one, own in zip(codes * batch if same else codes, masks, strict=True)
    ]


def _codes_of(model, image: GivenImage) -> torch.LongTensor:
    """Codes `(h, w)`, on the CPU, of an image to complete."""
    if isinstance(image, Image):
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        image = pixels / 127.5 - 1
    if isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 3 and image.is_floating_point():
        factor = model.image_factor
        if 0 in image.shape or any(side % factor for side in image.shape[1:]):
            height, width = image.shape[1:]
            raise ValueError(
                f"`image` has {height}*{width} pixels; both must be multiples of {factor}, the pixels a side of "
                "one code. Resize or crop it."
            )
        return model.encode_image([image])[0].cpu()
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
    if not isinstance(image, torch.Tensor) or image.ndim != 2 or image.dtype not in integers or 0 in image.shape:
        got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(
            f"`image` must be codes (h, w) of an integer type, pixels (3, H, W) in [-1, 1], or a PIL image, got {got}."
        )
    lowest, highest = (int(value) for value in image.aminmax())
    if lowest < 0 or highest >= model.config.token_layout.num_visual_tokens:
        bad = lowest if lowest < 0 else highest
        raise ValueError(
            f"`image` has the code {bad}, but codes lie in [0, {model.config.token_layout.num_visual_tokens})."
        )
    return image.long().cpu()


def place_codes(
    codes: torch.LongTensor, mask: torch.BoolTensor | None, grid: tuple[int, int], offset: tuple[int, int]
) -> torch.LongTensor:
    """A partly given image: its codes on a canvas, -1 where codes are to be made.

    Args:
        codes (`torch.LongTensor` of shape `(h, w)`).
        mask (`torch.BoolTensor` of shape `(h, w)`, *optional*): `True` where codes are to be made.
        grid (`tuple[int, int]`): height and width of the canvas.
        offset (`tuple[int, int]`): row and column of the canvas where the image begins.
    Returns:
        `torch.LongTensor` of shape `grid`.
    Raises:
        ValueError: if the mask is not the image's size, the image does not fit, or nothing is left to make.
    """
    height, width = codes.shape
    if mask is not None and mask.shape != codes.shape:
        raise ValueError(
            f"`mask` has {'*'.join(map(str, mask.shape))} codes, but `image` {height}*{width}. Give one value a code "
            "of the image."
        )
    top, left = offset
    if top < 0 or left < 0 or top + height > grid[0] or left + width > grid[1]:
        raise ValueError(
            f"an image of {height}*{width} codes at `image_offset`={(top, left)} does not fit into the {grid[0]}*"
            f"{grid[1]} codes asked for. Choose a larger `height` and `width`, or another offset."
        )
    canvas = torch.full(grid, -1)
    canvas[top : top + height, left : left + width] = codes if mask is None else codes.masked_fill(mask, -1)
    if not (canvas < 0).any():
        raise ValueError(
            f"all {grid[0]}*{grid[1]} codes of the image are kept, so nothing is left to make. Give a `mask` that is "
            "True where codes are to be made, or a `height` and `width` larger than the image's."
        )
    return canvas
