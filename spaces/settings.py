"""What a Space runs and what it allows, read from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from emu35 import TINY, TINY_DIDA

_PREFIX = "EMU35_"


@dataclass(frozen=True)
class SpaceSettings:
    """Model and limits of a Space.  The defaults are those of the tiny model on a CPU.

    Args:
        model (`str`): checkpoint.
        vision_tokenizer (`str`, *optional*): for a checkpoint that has none.
        load_in (`str`, *optional*): "4bit" or "8bit".
        dida_adapter (`str`, *optional*): folder of the adapter for `image_decoder="dida"`.
        max_pixels (`int`): of an image to make.
        max_upload_pixels (`int`), max_upload_bytes (`int`): of an image that is shown to the model.
        max_kept_bytes (`int`): of all uploads that are kept at a time; half of it for one network address.
        max_uploads (`int`): images that are shown to it at once.
        num_inference_steps (`int`), max_steps (`int`): denoising steps of `dida`: where nothing is said, and at most.
        max_new_tokens (`int`): of an answer of text and images.
        max_images (`int`): made by one request.
        max_prompt_length (`int`): characters of all that is said in one request.
        max_seconds (`float`): a request may take on the model; then it ends with what there is.
        gpu_seconds (`float`): for which a request asks ZeroGPU at most, and for which a visitor must have quota left.
        queue_size (`int`): requests that may wait.
        requests_per_user (`int`): requests of one user that may wait or run.
        patience (`float`): seconds after which a request that nobody reads gives its place back.
        delete_after (`int`): seconds that uploads and downloads are kept.
    """

    model: str = TINY
    vision_tokenizer: str | None = None
    load_in: str | None = None
    dida_adapter: str | None = None
    max_pixels: int = 64 * 64
    max_upload_pixels: int = 16_000_000
    max_upload_bytes: int = 20 * 2**20
    max_kept_bytes: int = 2**30
    max_uploads: int = 3
    num_inference_steps: int = 8
    max_steps: int = 64
    max_new_tokens: int = 768
    max_images: int = 8
    max_prompt_length: int = 2000
    max_seconds: float = 60.0
    gpu_seconds: float = 120.0
    queue_size: int = 64
    requests_per_user: int = 3
    patience: float = 30.0
    delete_after: int = 3600

    def __post_init__(self):
        if self.load_in not in (None, "4bit", "8bit"):
            raise ValueError(f"`load_in` must be '4bit', '8bit' or None, got {self.load_in!r}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"`{field.name}` must be positive, got {value!r}.")

    @property
    def is_tiny(self) -> bool:
        """Whether the model is the tiny one that is shipped."""
        return Path(self.model).resolve() == Path(TINY).resolve()

    @classmethod
    def for_model(cls, model: str = TINY, **settings: Any) -> "SpaceSettings":
        """The defaults for a model (those of the released size for all but the tiny one), with `settings` applied."""
        own = cls(model=model)
        own = replace(own, dida_adapter=TINY_DIDA) if own.is_tiny else replace(own, **_RELEASED)
        return replace(own, **settings)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "SpaceSettings":
        """Reads EMU35_MODEL, EMU35_LOAD_IN, EMU35_MAX_SECONDS, ...: one variable a field, empty ones left out.

        Raises:
            ValueError: for a value that is no number where one is needed, or that is not allowed.
        """
        environment = os.environ if environment is None else environment
        given: dict[str, Any] = {}
        for field in fields(cls):
            name = _PREFIX + field.name.upper()
            text = environment.get(name, "").strip()
            if not text:
                continue
            try:
                given[field.name] = field.type(text) if field.type in (int, float) else text
            except ValueError as error:
                kind = "a whole number" if field.type is int else "a number"
                raise ValueError(f"{name} must be {kind}, got {text!r}.") from error
        return cls.for_model(given.pop("model", TINY), **given)


#: Limits for the released size, which takes about a million pixels and minutes where the tiny one takes seconds.
_RELEASED = {
    "max_pixels": 1024 * 1024,
    "max_upload_pixels": 40_000_000,
    "num_inference_steps": 16,
    "max_new_tokens": 16384,
    "max_prompt_length": 8000,
    "max_seconds": 900.0,
    "queue_size": 32,
    "requests_per_user": 2,
}

__all__ = ["SpaceSettings"]
