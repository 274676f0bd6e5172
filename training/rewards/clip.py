"""Rewards from the features of a dual encoder: likeness to a text, aesthetics, likeness between pictures."""

import itertools
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPModel

from .base import Sample, SampleReward, clamp, mean, text_column

#: MIT; 428 M parameters. The published aesthetic heads are for its features.
DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class ClipEncoder:
    """Features of a CLIP model, which is loaded at first use.

    Args:
        model (`str`, `os.PathLike` or `CLIPModel`): where it is saved (safetensors), or the model itself.
        processor (*optional*): of the model; needed when `model` is a model.
        device (`str`, *optional*): default: the current GPU if there is one.
        batch_size (`int`): images or texts at a time.
    Raises:
        ValueError: if a model comes without its processor.
    """

    def __init__(
        self,
        model: str | os.PathLike | CLIPModel = DEFAULT_CLIP,
        processor: Any = None,
        device: str | None = None,
        batch_size: int = 64,
    ):
        if isinstance(model, CLIPModel) and processor is None:
            raise ValueError("`processor` is needed when `model` is a model. Or give the path of a checkpoint.")
        self.model, self.processor, self.device, self.batch_size = model, processor, device, batch_size

    def load(self) -> CLIPModel:
        """The model, on its device."""
        if not isinstance(self.model, CLIPModel):
            path = self.model
            self.processor = self.processor or AutoProcessor.from_pretrained(path)
            self.model = CLIPModel.from_pretrained(path, use_safetensors=True).to(self.device or default_device())
        elif self.device is not None:
            self.model.to(self.device)
        return self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors of shape `(num_images, projection_dim)`, float32, on the CPU."""
        model = self.load()
        parts = []
        for batch in _batches(images, self.batch_size):
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            parts.append(_unit(model.get_image_features(pixels.to(model.device, model.dtype)).pooler_output))
        return torch.cat(parts)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of shape `(num_texts, projection_dim)`, float32, on the CPU. Texts are cut to CLIP's length."""
        model = self.load()
        length = model.config.text_config.max_position_embeddings
        parts = []
        for batch in _batches(texts, self.batch_size):
            inputs = self.processor(text=batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            parts.append(_unit(model.get_text_features(**inputs).pooler_output))
        return torch.cat(parts)

    @torch.no_grad()
    def patch_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors of the patches, of shape `(num_images, rows, columns, hidden_size)`, float32, on the CPU.

        Pictures are stretched to the model's square, not cropped, so that patches keep their places.
        """
        model = self.load()
        size = model.config.vision_config.image_size
        side = size // model.config.vision_config.patch_size
        parts = []
        for batch in _batches(images, self.batch_size):
            squares = [image.resize((size, size), Image.Resampling.BICUBIC) for image in batch]
            pixels = self.processor(images=squares, return_tensors="pt")["pixel_values"]
            states = model.vision_model(pixels.to(model.device, model.dtype)).last_hidden_state[:, 1:]
            parts.append(_unit(states).unflatten(1, (side, side)))
        return torch.cat(parts)


class ClipSimilarity(SampleReward):
    r"""Likeness of images and text.  Source: CLIPScore (arXiv 2104.08718).

    $$ r = \min(1, s \max(0, \cos(v, t))) $$

    for the features v of an image and t of the text; the mean over the images of a completion, 0 without one. CLIP
    reads about 77 tokens of the text and places objects badly: mix it with [`VLMAlignment`].

    Range: [0, 1].

    Example:
        >>> ClipSimilarity()(["a red fox"], [""], images=[[fox]])  # cosine 0.28
        [0.7]

    Args:
        encoder ([`ClipEncoder`] or `str`): rewards that are given the same path share one model.
        column (`str`, *optional*): where the text stands; default: the prompt.
        scale (`float`): s; the paper's 2.5 spreads the usual cosines over the range.
    """

    name = "clip"

    def __init__(self, encoder: ClipEncoder | str = DEFAULT_CLIP, column: str | None = None, scale: float = 2.5):
        self.encoder, self.column, self.scale = as_encoder(encoder), column, scale
        self.needs = ("images",) if column is None else ("images", column)

    def load(self) -> None:
        self.encoder.load()

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        texts = self.encoder.text_features([text_column(sample, self.column) for sample in samples])
        return [
            mean([clamp(self.scale * cosine, 0, 1) for cosine in (features @ text).tolist()]) if len(features) else 0.0
            for features, text in zip(features_by_sample(self.encoder, samples), texts, strict=True)
        ]


class AestheticScore(SampleReward):
    r"""How people would rate a picture.  Source: LAION's aesthetic predictors (MIT).

    $$ r = \mathrm{clamp}(w \cdot v + b, 1, 10) $$

    for the unit features v of an image; the mean over the images of a completion, 1 without one. The head is the
    user's: a safetensors file with `weight` (of as many numbers as features) and `bias`. LAION's
    `sa_0_4_vit_l_14_linear.pth` becomes one by `save_file(torch.load(path, weights_only=True), "head.safetensors")`.

    Range: [1, 10].

    Example:
        >>> AestheticScore("head.safetensors")([""], [""], images=[[photograph]])
        [6.1]

    Args:
        head (`str` or `os.PathLike`): the file.
        encoder ([`ClipEncoder`] or `str`): whose features the head was trained on.
    """

    name = "aesthetic"
    range = (1.0, 10.0)

    def __init__(self, head: str | os.PathLike, encoder: ClipEncoder | str = DEFAULT_CLIP):
        self.head, self.encoder = head, as_encoder(encoder)
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def load(self) -> None:
        """Raises a ValueError if the file does not hold a head for the encoder's features."""
        if self.weight is not None:
            return
        tensors = load_file(self.head)
        dim = self.encoder.load().config.projection_dim
        sizes = {name: tensors[name].numel() for name in sorted(tensors)}
        if sizes != {"weight": dim, "bias": 1}:
            raise ValueError(
                f"`head` {str(self.head)!r} must hold `weight` of {dim} numbers, one for each feature of the encoder, "
                f"and `bias` of one; it holds {sizes}."
            )
        self.weight, self.bias = tensors["weight"].float().flatten(), tensors["bias"].float().flatten()

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        low, high = self.range
        return [
            mean([clamp(one, low, high) for one in (features @ self.weight + self.bias).tolist()])
            if len(features)
            else low
            for features in features_by_sample(self.encoder, samples)
        ]


class NarrativeConsistency(SampleReward):
    r"""Whether the images of a story show one world.

    $$ r = \frac{2}{n (n-1)} \sum_{i<j} s_{ij}, \qquad
       s_{ij} = \begin{cases} 0 & \cos(v_i, v_j) \ge c \\ \max(0, \cos(v_i, v_j)) & \text{else} \end{cases} $$

    for the features v of n images. Copies (c) are no story and count as nothing; fewer than two images are 0. It does
    not know the text: mix it with [`ClipSimilarity`] or [`VLMAlignment`]. In the procedural world use
    [`WorldReward`] with `marks=["character", "world"]` instead.

    Range: [0, 1].

    Example:
        >>> NarrativeConsistency()(["tell a story"], [""], images=[[first, second]])  # cosine 0.8
        [0.8]

    Args:
        encoder ([`ClipEncoder`] or `str`): rewards that are given the same path share one model.
        copy (`float`): c, the cosine from which two images are copies.
    """

    name = "narrative"

    def __init__(self, encoder: ClipEncoder | str = DEFAULT_CLIP, copy: float = 0.99):
        self.encoder, self.copy = as_encoder(encoder), copy

    def load(self) -> None:
        self.encoder.load()

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        return [
            mean([self._likeness(float(a @ b)) for a, b in itertools.combinations(features, 2)])
            if len(features) > 1
            else 0.0
            for features in features_by_sample(self.encoder, samples)
        ]

    def _likeness(self, cosine: float) -> float:
        return 0.0 if cosine >= self.copy else max(0.0, cosine)


def features_by_sample(encoder: ClipEncoder, samples: Sequence[Sample]) -> Sequence[torch.Tensor]:
    """The features of each sample's images, `(num_images, dim)`, all images in one go."""
    images = [image for sample in samples for image in sample.images]
    if not images:
        return [torch.empty(0)] * len(samples)
    return encoder.image_features(images).split([len(sample.images) for sample in samples])


@cache
def _shared_encoder(path: str) -> ClipEncoder:
    return ClipEncoder(path)


def as_encoder(encoder: ClipEncoder | str) -> ClipEncoder:
    """The encoder itself, or the one that everybody shares who names this path."""
    return encoder if isinstance(encoder, ClipEncoder) else _shared_encoder(str(encoder))


def default_device() -> str:
    """The current GPU, which `accelerate` sets in each process, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _batches(items: Sequence, size: int):
    return (list(items[start : start + size]) for start in range(0, len(items), size))
