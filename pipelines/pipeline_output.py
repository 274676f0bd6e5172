"""Result of [`Emu35Pipeline`]."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL.Image import Image


@dataclass
class Emu35PipelineOutput(BaseOutput):
    """
    Args:
        images:
            in the order of the prompts, all images of the first one first. By `output_type`:
            "pil": `list[PIL.Image.Image]`.
            "pt": `torch.FloatTensor` of shape `(n, 3, height, width)` in [0, 1].
            "np": `np.ndarray` of shape `(n, height, width, 3)` in [0, 1].
            "codes": `torch.LongTensor` of shape `(n, h, w)`.
            Images of different sizes come as a list of single ones. After an interruption there may be images of fewer
            rows, and `None` for those that have no whole row of codes.
        codes (`list[torch.LongTensor]`): the visual codes `(h, w)` of each image; `(0, 0)` where there are none.
        num_forward_passes (`int`): passes through the decoder, over all batches of the call.
        seconds (`float`): wall-clock time of the call.
    """

    images: list[Image | None] | np.ndarray | torch.Tensor | list[np.ndarray | None] | list[torch.Tensor | None]
    codes: list[torch.LongTensor]
    num_forward_passes: int
    seconds: float


__all__ = ["Emu35PipelineOutput"]
