"""Settings and result of `generate`."""

import copy
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import PIL.Image
import torch
from transformers.generation import GenerationConfig

from .decoding_emu35 import GenerationCache, ImageStatistics
from .prompts_emu35 import get_template

GENERATION_MODES = ("text", "image", "interleaved")
COUPLINGS = ("none", "maximal", "gumbel")
CACHES = ("dynamic", "static")

_INTERLEAVED = {"generation_mode": "interleaved", "image_top_k": 10240, "image_area": 720 * 720}
#: What the release uses for each task where it differs from the values of `RELEASED_DEFAULTS` (its example
#: configurations).
RELEASED_TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "t2i": {"generation_mode": "image", "guidance_scale": 5.0},
    "x2i": {"generation_mode": "image", "guidance_scale": 3.0},
    "story": dict(_INTERLEAVED),
    "howto": {**_INTERLEAVED, "top_k": 200, "top_p": 0.8, "temperature": 0.7},
    "explore": dict(_INTERLEAVED),
    "vla": dict(_INTERLEAVED),
    "chat": dict(_INTERLEAVED),
    "vqa": {"generation_mode": "text"},
}
RELEASED_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "guidance_scale": 3.0,
    "image_top_k": 5120,
    "image_top_p": 1.0,
    "image_temperature": 1.0,
    "top_k": 1024,
    "top_p": 0.9,
    "temperature": 1.0,
    "max_new_tokens": 32768,
    "image_area": 1024 * 1024,
    "task_defaults": RELEASED_TASK_DEFAULTS,
}

#: Our own settings and their defaults; the inherited ones we honour are named in `HONOURED`.
_OWN: dict[str, Any] = {
    "generation_mode": "text",
    "guidance_scale": None,
    "image_guidance_scale": None,
    "image_top_k": None,
    "image_top_p": None,
    "image_temperature": None,
    "image_decoder": "ar",
    "speculative_window": None,
    "coupling": "gumbel",
    "num_inference_steps": 16,
    "guidance_scale_end": None,
    "guidance_cutoff": None,
    "verify_codes": False,
    "height": None,
    "width": None,
    "aspect_ratio": None,
    "image_area": 1024 * 1024,
    "keep_image_size": True,
    "max_images": None,
    "task_defaults": None,
}
HONOURED = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_return_sequences",
    "return_dict_in_generate",
    "pad_token_id",
    "eos_token_id",
    "cache_implementation",
    "compile_config",
    "disable_compile",
)
SETTINGS = (*_OWN, *HONOURED)
_SIZES = ("height", "width", "aspect_ratio")

_INHERITED = frozenset(vars(GenerationConfig()))
#: Inherited settings that change nothing about an answer; callers such as trainers set them as a matter of course.
_WITHOUT_EFFECT = frozenset({"bos_token_id", "use_cache", "transformers_version"})


class Emu35GenerationConfig(GenerationConfig):
    r"""
    Settings of [`Emu35ForConditionalGeneration.generate`].

    Text and visual tokens are sampled with settings of their own: `temperature`, `top_k`, `top_p` are the text's.

    Args:
        generation_mode (`str`): "text", "image" (starts an image at once, stops at its end) or "interleaved".
        guidance_scale (`float`, *optional*): s = u + scale * (c - u) at visual positions. 1 or `None`: no guidance.
        image_guidance_scale (`float`, *optional*):
            second scale for prompts with images: s = n + image_scale * (u - n) + scale * (c - u), n from a prompt
            without text and images.
        image_top_k (`int`), image_top_p (`float`), image_temperature (`float`):
            sampling of visual tokens. `None`: off.
        image_decoder (`str`): which decoder turns a prefix into codes, see `IMAGE_DECODERS`: "ar" makes one code a
            pass; "speculative" several, from the same distribution; "dida" all of them, in `num_inference_steps`
            passes of a model that was adapted to it.
        speculative_window (`int`, *optional*): codes that "speculative" guesses before every pass. Default: 16, or
            all of a smaller image.
        coupling (`str`): what "speculative" makes of a guess that is not settled yet: "none" draws another, "maximal"
            and "gumbel" keep it where they can.
        num_inference_steps (`int`): denoising steps of "dida".
        guidance_scale_end (`float`, *optional*):
            for "dida": the guidance scale goes from `guidance_scale` at time 0 to this at time 1, linearly. Default:
            it stays.
        guidance_cutoff (`float`, *optional*):
            for "dida": time in (0, 1] from which on there is no guidance, and nothing unconditional is computed.
            Default: never.
        verify_codes (`bool`):
            for "dida": the model checks the codes as they would come one by one, in one more pass that what follows
            the image needs anyway. The first one that its own filters exclude is drawn anew, and what comes after it
            denoised again. With greedy settings the image is that of "ar".
        height, width (`int`): pixels of the images to make.
        aspect_ratio (`str`): "16:9" and the like (width to height, of about `image_area` pixels), "auto" (the model
            writes the size itself), or "reference" (the size of the prompt's last image). Default: "reference" where
            the prompt has exactly one image, else "auto".
        image_area (`int`): pixels that `aspect_ratio` aims at.
        keep_image_size (`bool`): further images of an answer have the size of its first one.
        max_images (`int`): images of one interleaved answer; after that only text follows.
        cache_implementation (`str`): "dynamic", or "static": the passes of "ar" and "speculative" are compiled, on a
            GPU into CUDA graphs. The first image takes as long as compiling does. `compile_config`
            ([`CompileConfig`]) says how; `disable_compile=True` leaves the static cache alone.
        max_new_tokens (`int`): tokens after the prompt, those of images included. `None`: up to the context's end.
        task_defaults (`dict`): task -> settings that replace the ones above when `generate(task=...)` names the task.
    """

    def __init__(self, **kwargs):
        own = {name: copy.deepcopy(kwargs.pop(name, default)) for name, default in _OWN.items()}
        if not kwargs.get("_from_model_config"):
            _check_names((name for name in kwargs if not name.startswith("_")), {*SETTINGS, *_INHERITED}, "no setting")
        kwargs.setdefault("return_dict_in_generate", True)
        for name, value in own.items():
            setattr(self, name, value)
        # Validates at its end. It has a `guidance_scale` too and would reset ours.
        super().__init__(guidance_scale=own["guidance_scale"], **kwargs)

    @classmethod
    def from_model_config(cls, model_config) -> "Emu35GenerationConfig":
        """The class's defaults: `config.json` holds no settings of `generate`."""
        return cls()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        # Sampling settings of a checkpoint stay in place under `do_sample=False`, which is no reason to warn about
        # them.
        super().validate(strict=strict, user_set_attributes={"do_sample", "num_beams"})
        if self.generation_mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` must be one of {GENERATION_MODES}, got {self.generation_mode!r}.")
        for name in ("guidance_scale", "image_guidance_scale", "guidance_scale_end"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must be at least 0 (1 means no guidance), got {value}.")
        if self.guidance_cutoff is not None and not 0 < self.guidance_cutoff <= 1:
            raise ValueError(f"`guidance_cutoff` must lie in (0, 1], got {self.guidance_cutoff}.")
        if self.coupling not in COUPLINGS:
            raise ValueError(f"`coupling` must be one of {COUPLINGS}, got {self.coupling!r}.")
        if self.cache_implementation not in (None, *CACHES):
            raise ValueError(f"`cache_implementation` must be one of {CACHES}, got {self.cache_implementation!r}.")
        if self.cache_implementation == "static" and self.image_decoder == "dida":
            raise ValueError(
                '`cache_implementation`="static" is for decoders that add to the cache in every pass, not for '
                '`image_decoder`="dida". Use "dynamic".'
            )
        for name in ("temperature", "image_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"`{name}` must be positive, got {value}. For greedy decoding pass `do_sample=False`."
                )
        for name in ("top_k", "image_top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"`{name}` must be a whole number, 0 or None to keep all tokens, got {value!r}.")
        for name in ("top_p", "image_top_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")
        for name in ("max_images", "image_area", "num_return_sequences", "max_new_tokens", "speculative_window"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if not isinstance(self.num_inference_steps, int) or self.num_inference_steps < 1:
            raise ValueError(
                f"`num_inference_steps` must be a whole number of at least 1, got {self.num_inference_steps!r}."
            )
        for task, defaults in (self.task_defaults or {}).items():
            _check_names(defaults, set(SETTINGS), f"`task_defaults[{task!r}]` has an unknown setting")

    @classmethod
    def released(cls, **kwargs) -> "Emu35GenerationConfig":
        """The defaults of the release (its example configurations)."""
        return cls(**{**RELEASED_DEFAULTS, **kwargs})

    def overridden_by(self, other: GenerationConfig) -> "Emu35GenerationConfig":
        """`other` where it is a configuration of ours, else a copy of this one with all that `other` sets.

        A plain [`~transformers.GenerationConfig`], as trainers pass it, means a plain result: token ids only, unless
        it says otherwise.
        """
        if isinstance(other, Emu35GenerationConfig):
            return other
        settings = {name: value for name, value in other.to_dict().items() if value is not None}
        settings["return_dict_in_generate"] = bool(other.return_dict_in_generate)
        return self.from_dict({**self.to_dict(), **settings})

    def with_settings(self, task: str | None = None, **settings) -> "Emu35GenerationConfig":
        """A validated copy with the task's defaults and then `settings` applied.

        Raises:
            ValueError: for a setting that does not exist (names the nearest one) or that `generate` cannot follow.
        """
        _check_names(settings, {*SETTINGS, *_WITHOUT_EFFECT}, "`generate` does not know")
        defaults = (self.task_defaults or {}).get(task)
        if task is not None and defaults is None:
            get_template(task)  # raises for an unknown task; others simply have no defaults of their own
        config = copy.deepcopy(self)
        for given in (defaults or {}, settings):
            if any(given.get(name) is not None for name in _SIZES):  # takes the place of any other size
                given = {**dict.fromkeys(_SIZES), **given}
            for name, value in given.items():
                setattr(config, name, value)
        config.validate()
        neutral = self._get_default_generation_params()
        for name in sorted(_INHERITED.difference(SETTINGS, _WITHOUT_EFFECT)):
            value = getattr(config, name)
            if not name.startswith("_") and value is not None and value != neutral.get(name, False):
                raise ValueError(f"`{name}`={value!r} is not supported. Settings: {', '.join(SETTINGS)}.")
        return config


def _check_names(names: Iterable[str], known: set[str], complaint: str):
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Settings: {', '.join(SETTINGS)}."
            raise ValueError(f"{complaint} `{name}`. {hint}")


@dataclass
class Emu35GenerateOutput:
    """What `generate` returns.

    Not a `ModelOutput`: `transformers.pipeline` rebuilds those as plain dictionaries, in which it then misses the
    attributes.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`): prompt and answer, padded on the right.
        answer_start (`torch.LongTensor` of shape `(batch,)`):
            where each answer begins in `sequences`; where the prompt ended inside an image, that image's BOI.
        images (`list[list[PIL.Image.Image]]`): complete images of each answer; `None` without a vision tokenizer.
        num_forward_passes (`int`): passes through the decoder (each serves all rows and guidance streams of a batch).
        image_statistics (`list[list[ImageStatistics]]`):
            what each image begun in an answer took; `num_passes`, and the `acceptance` of guessed codes.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`): 1 on the tokens of prompts and answers.
        finished (`torch.BoolTensor` of shape `(batch,)`):
            whether an answer came to its own end (EOS; in image mode the image's end), not to a limit or a stop.
        past_key_values (`GenerationCache`): what was computed, if `return_past_key_values=True`.
        negative_prompts (`dict[str, torch.Tensor]`): the arguments `negative_...` of the call, a row for each answer.
    """

    sequences: torch.LongTensor | None = None
    answer_start: torch.LongTensor | None = None
    images: list[list[PIL.Image.Image]] | None = None
    num_forward_passes: int | None = None
    image_statistics: list[list[ImageStatistics]] | None = None
    attention_mask: torch.LongTensor | None = None
    finished: torch.BoolTensor | None = None
    past_key_values: GenerationCache | None = field(default=None, repr=False)
    negative_prompts: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> torch.LongTensor:
        """Ids of one row, as pipelines with `return_tensors=True` and trainers read them."""
        return self.sequences[row]

    def to(self, device) -> "Emu35GenerateOutput":
        """A copy with its token ids on `device` (images stay where they are)."""
        moved = {
            name: None if getattr(self, name) is None else getattr(self, name).to(device)
            for name in ("sequences", "answer_start", "attention_mask", "finished")
        }
        negatives = self.negative_prompts
        if negatives is not None:
            negatives = {name: tensor.to(device) for name, tensor in negatives.items()}
        return replace(self, **moved, negative_prompts=negatives)

    def next_inputs(self, new_ids: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        """Arguments of a `generate` call that goes on from here: `model.generate(**output.next_inputs(), ...)`.

        With the same settings and generators it gives what one longer run would have given; rows whose answer has
        come to its end stay as they are. Sampled batches need one generator a row for that, since rows that share
        one get their numbers in the order of the batch's steps.

        Args:
            new_ids (`Sequence[Sequence[int]]`, *optional*):
                ids that follow each row first, such as the user's next turn up to BSS.
        Returns:
            `dict`: `input_ids` and `attention_mask` (padded on the left), the negative prompts, and `past_key_values`
            if there are any. The unconditional streams find the images made so far in `input_ids`.
        Raises:
            ValueError: if `new_ids` has another number of rows.
        """
        rows = [ids[mask.bool()] for ids, mask in zip(self.sequences, self.attention_mask, strict=True)]
        if new_ids is not None:
            if len(new_ids) != len(rows):
                raise ValueError(f"`new_ids` has {len(new_ids)} rows for {len(rows)} answers.")
            rows = [torch.cat([ids, ids.new_tensor(list(new))]) for ids, new in zip(rows, new_ids, strict=True)]
        length = max(map(len, rows))
        padding = self.sequences[self.attention_mask == 0]
        input_ids = self.sequences.new_full((len(rows), length), int(padding[0]) if len(padding) else 0)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, length - len(ids) :] = ids
            attention_mask[row, length - len(ids) :] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **(self.negative_prompts or {})}
        if self.past_key_values is not None:
            inputs["past_key_values"] = self.past_key_values
        return inputs


def grid_for_aspect_ratio(aspect_ratio: str, area: int, factor: int) -> tuple[int, int]:
    """(token_height, token_width) for "width:height".  Gives the release's table: 4:3 -> 55 x 73, 16:9 -> 47 x 85, ...

    Args:
        area (`int`): pixels aimed at.
        factor (`int`): pixels a side of one code.
    """
    width, separator, height = aspect_ratio.partition(":")
    if not separator or not (width.isdecimal() and height.isdecimal()) or not (int(width) and int(height)):
        raise ValueError(
            f'`aspect_ratio` must be like "16:9" (width to height), "auto" or "reference", got {aspect_ratio!r}.'
        )
    ratio = max(int(width), int(height)) / min(int(width), int(height))
    long_side = int((area * ratio) ** 0.5)
    long_side, short_side = long_side // factor, int(long_side / ratio) // factor
    if short_side < 1:
        raise ValueError(
            f"`aspect_ratio`={aspect_ratio!r} at `image_area`={area} leaves less than one code ({factor} pixels) for "
            "the shorter side. Choose a squarer ratio or a larger area."
        )
    return (short_side, long_side) if int(width) >= int(height) else (long_side, short_side)


__all__ = ["Emu35GenerateOutput", "Emu35GenerationConfig"]
