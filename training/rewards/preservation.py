"""Whether an edit left alone what it did not name."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .base import Sample, SampleReward, mean, open_image, reference_images
from .clip import ClipEncoder, as_encoder


class Preservation(SampleReward):
    r"""Likeness of an edited picture and its source outside a mask.

    By pixels, $r = 1 - \min(1, d / d_0)$ with the mean absolute difference d of levels (0 to 255) outside the mask; by
    features (if an `encoder` is given), $r = \max(0, \overline{\cos(v_p, u_p)})$, the mean over the patches p that lie
    wholly outside it. Pixels see every shift of colour that a vision tokenizer brings with it; features forgive it.
    The mean over the images of a completion, 0 without one. An image of another size is resized to its source's.
    A copy of the source is worth everything here: mix it with a reward for the edit. In the procedural world use
    [`WorldReward`] with `marks=["preservation"]`.

    Range: [0, 1].

    Example:
        >>> Preservation()(["make the hat red"], [""], images=[[edited]], reference_images=[[photo]], edit_mask=[mask])
        [0.93]

    Args:
        encoder ([`ClipEncoder`] or `str`, *optional*): compares features of its patches; default: pixels.
        column (`str`, *optional*): the reference images (or their paths), the first of which is edited; `None`: the
            images of the prompt, which a GRPO run has in `messages`.
        mask_column (`str`): what may change: an image (or its path) whose bright pixels are it, or an array that is
            true there.
        tolerance (`float`): d_0, in levels.
    """

    name = "preservation"

    def __init__(
        self,
        encoder: ClipEncoder | str | None = None,
        column: str | None = "reference_images",
        mask_column: str = "edit_mask",
        tolerance: float = 64.0,
    ):
        if not tolerance > 0:
            raise ValueError(f"`tolerance` must be positive, got {tolerance!r}.")
        self.encoder = None if encoder is None else as_encoder(encoder)
        self.column, self.mask_column, self.tolerance = column, mask_column, tolerance
        self.needs = ("images", column or "messages", mask_column)

    def load(self) -> None:
        if self.encoder is not None:
            self.encoder.load()

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float | None:
        source = open_image(reference_images(sample, self.column)[0])
        kept = ~_as_mask(sample.columns[self.mask_column], source.size)
        if not kept.any():
            return None
        if not sample.images:
            return 0.0
        images = [image.resize(source.size, Image.Resampling.BICUBIC) for image in sample.images]
        if self.encoder is not None:
            return self._by_features(source, images, kept)
        levels = np.asarray(source, dtype=np.float64)[kept]
        distances = [np.abs(np.asarray(image, dtype=np.float64)[kept] - levels).mean() for image in images]
        return mean([1 - min(1.0, float(distance) / self.tolerance) for distance in distances])

    def _by_features(self, source: Image.Image, images: list[Image.Image], kept: np.ndarray) -> float | None:
        before, *after = self.encoder.patch_features([source, *images])  # (rows, columns, dim)
        open_pixels = torch.from_numpy(~kept)[None, None].float()
        whole = torch.nn.functional.adaptive_max_pool2d(open_pixels, before.shape[:2])[0, 0] == 0
        if not whole.any():
            return None
        cosines = [(one * before).sum(-1)[whole].mean().item() for one in after]
        return mean([min(max(cosine, 0.0), 1.0) for cosine in cosines])


def _as_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """bool `(height, width)`: true where a picture may change."""
    if isinstance(mask, Image.Image | str | os.PathLike):
        mask = np.asarray(open_image(mask).convert("L").resize(size, Image.Resampling.NEAREST)) > 127
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != size[::-1]:
        raise ValueError(f"The mask must have the source's height and width, {size[::-1]}, got {mask.shape}.")
    return mask
