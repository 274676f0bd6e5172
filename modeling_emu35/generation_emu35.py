"""`generate`: text, images, or both in one answer.

Here is what goes in and what comes out; the loop itself is in `generation_loop_emu35`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from PIL.Image import Image
from transformers.generation import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from .configuration_emu35 import Emu35VisionTokenizerConfig
from .decoding_emu35 import IMAGE_DECODERS, CachedPrefix, GenerationCache
from .dida_emu35 import DidaMixin, decode_dida
from .generation_configuration_emu35 import (
    SETTINGS,
    Emu35GenerateOutput,
    Emu35GenerationConfig,
    grid_for_aspect_ratio,
)
from .generation_loop_emu35 import GenerationLoop, GenerationRow
from .image_completion_emu35 import GivenImage, given_canvases
from .image_tokens_emu35 import (
    ImageTokens,
    answer_images,
    find_images,
    is_finished,
    missing_answer_images,
    unfinished_image,
)
from .sampling_emu35 import Generators
from .segments_emu35 import pixels_to_pil
from .speculative_emu35 import decode_speculative

logger = logging.getLogger(__name__)

IMAGE_DECODERS["speculative"] = decode_speculative
IMAGE_DECODERS["dida"] = decode_dida


class Emu35GenerationMixin(DidaMixin, GenerationMixin):
    """`generate` of [`Emu35ForConditionalGeneration`]."""

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        # The base class would read the file into a plain GenerationConfig, which does not check our settings.
        defaults = Emu35GenerationConfig()
        if generation_config is not None:
            self.generation_config = defaults.overridden_by(generation_config)
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = Emu35GenerationConfig.from_pretrained(
                    pretrained_model_name_or_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    proxies=proxies,
                    local_files_only=local_files_only,
                    token=token,
                    revision=revision,
                    subfolder=subfolder,
                )
            except OSError:
                if os.path.exists(os.path.join(pretrained_model_name_or_path, subfolder, GENERATION_CONFIG_NAME)):
                    raise  # it is there, but cannot be read
                self.generation_config = defaults

    def _prepare_generation_config(self, generation_config: GenerationConfig | None = None, **kwargs):
        """What pipelines of older transformers versions ask for: settings, and the arguments that are none.

        Our settings come before those of `generation_config`, which are the pipeline's own defaults.
        """
        settings = {name: value for name, value in kwargs.items() if name in SETTINGS}
        config = Emu35GenerationConfig().overridden_by(self.generation_config).with_settings(**settings)
        for name in SETTINGS:
            if getattr(config, name) is None:
                setattr(config, name, getattr(generation_config, name, None))
        return config, {name: value for name, value in kwargs.items() if name not in settings}

    @apply_forward_hook  # offloading moves the model when `forward` is called, which is not called here
    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        negative_image_prompt_ids: torch.LongTensor | None = None,
        negative_image_prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: torch.LongTensor | None = None,
        image: GivenImage | Sequence[GivenImage] | None = None,
        mask: torch.BoolTensor | Sequence[torch.BoolTensor] | None = None,
        image_offset: tuple[int, int] = (0, 0),
        past_key_values: GenerationCache | None = None,
        return_past_key_values: bool = False,
        generation_config: GenerationConfig | None = None,
        task: str | None = None,
        generator: Generators = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | Sequence[StoppingCriteria] | None = None,
        scheduler: Any = None,
        on_step: Callable[[int, torch.LongTensor], None] | None = None,
        allow_unadapted: bool = False,
        **settings: Any,
    ) -> Emu35GenerateOutput | torch.LongTensor:
        """Continues prompts with text, images, or both.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask:
                prompts, padded on the left. A prompt may hold a part of the answer, and is continued wherever it ends:
                in text, or inside an image (after BOI, in the size, in a row). To one that ends with the answer's end
                (EOS; in image mode, the image's end) nothing is added.
            negative_prompt_ids, negative_prompt_attention_mask:
                the unconditional prompts of `guidance_scale`; the processor makes them.
            negative_image_prompt_ids, negative_image_prompt_attention_mask:
                prompts without text and images, for `image_guidance_scale`.
            pixel_values: images behind the placeholders in the prompts.
            image_sizes: their heights and widths, which the processor adds; not needed here.
            image (*optional*):
                an image to complete, in image mode: one for all prompts, or a list with one for each. Given as codes,
                as pixels, or as a PIL image whose sides are multiples of the pixels a code has. With `height` and
                `width` in the same call it lies on a canvas of that size, and the rest is made too.
            mask (`torch.BoolTensor` of shape `(h, w)`, or a list of them, *optional*):
                a value for each code of `image`: `True` where a new one is to be made.
            image_offset (`tuple[int, int]`): row and column of the canvas, in codes, where `image` begins.
            past_key_values (`GenerationCache`, *optional*):
                the `past_key_values` of an earlier output, whose tokens `input_ids` goes on from: they are not
                computed again. It stays as it is.
            return_past_key_values (`bool`): whether the output has `past_key_values`.
            generation_config (`Emu35GenerationConfig`, *optional*): instead of `model.generation_config`.
            task (`str`, *optional*): apply the checkpoint's defaults for this task ("t2i", "x2i", "story", ...).
            generator (`torch.Generator`, or one a row): the same seed gives the same answer.
            streamer (`BaseStreamer`, *optional*):
                `put` gets the prompt, then every token at once. One answer only. If its attribute `stop_requested`
                becomes true, generation ends at the next token, even inside an image.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                called for each answer alone after every token, every code and every denoising step, with the ids
                `(1, length)` of prompt and answer and with `None` for the scores.
            scheduler (`DiDAScheduler`, *optional*): for `image_decoder="dida"`, instead of `model.dida_scheduler`.
            on_step (`Callable`, *optional*):
                for `image_decoder="dida"`: called after every denoising step with its number, from 0 on, and the
                codes `(rows, h, w)` as they are then, of the rows that make an image of this size together. Where
                there is no code yet (masked), it is the one predicted.
            allow_unadapted (`bool`): let "dida" run on a model that was not adapted to it.
            settings: fields of [`Emu35GenerationConfig`].
        Returns:
            [`Emu35GenerateOutput`], or only its `sequences` with `return_dict_in_generate=False`.
        Raises:
            ValueError: for settings that don't exist, contradict each other or don't fit the prompts; for a cache of
                other ids.

        The `ar` decoder makes the codes of an image row by row, left to right. It sees given codes above and to the
        left of the one it makes, but not those below: `image` is continued well downwards; a hole is filled without
        knowing what stands below it. So does `speculative`. In `dida` every code sees all given ones, those below and
        to the right of a hole too; the codes of an image come all at once, after its last step.
        """
        config = Emu35GenerationConfig().overridden_by(self.generation_config)
        if generation_config is not None:
            config = config.overridden_by(generation_config)
        config = config.with_settings(task, **settings)
        self._check_config(config)
        if config.image_decoder == "dida" and config.generation_mode != "text":
            scheduler = self.find_dida_scheduler(scheduler, allow_unadapted)
        elif scheduler is not None or on_step is not None:
            name = "on_step" if scheduler is None else "scheduler"
            raise ValueError(f'`{name}` is for making images with `image_decoder`="dida", which this call does not.')
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or 0 in input_ids.shape:
            given = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(
                f"`input_ids` must be a tensor of the shape (batch, length), neither of them 0, got {given}."
            )

        resolved = self.resolve_image_tokens(
            input_ids=input_ids,
            negative_prompt_ids=negative_prompt_ids,
            negative_image_prompt_ids=negative_image_prompt_ids,
            pixel_values=pixel_values,
        )
        copies = config.num_return_sequences or 1
        prompts = _repeat(self._unpad(resolved["input_ids"], attention_mask, "input_ids"), copies)
        negatives = [
            (resolved["negative_prompt_ids"], negative_prompt_attention_mask, "negative_prompt_ids"),
            (resolved["negative_image_prompt_ids"], negative_image_prompt_attention_mask, "negative_image_prompt_ids"),
        ]
        negatives = self._negative_prompts(negatives, config, len(prompts), copies)
        if isinstance(generator, Sequence):
            if len(generator) != len(prompts):
                raise ValueError(
                    f"`generator` has {len(generator)} generators for {len(prompts)} answers. Give one for each."
                )
            if not all(isinstance(one, torch.Generator) for one in generator):
                raise ValueError("`generator` must hold a `torch.Generator` for each answer.")
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"`streamer` works with one answer at a time, got a batch of {len(prompts)}.")
        # A size among the checkpoint's defaults is no wish to enlarge an image.
        sized = any(settings.get(name) is not None for name in ("height", "width", "aspect_ratio"))
        canvas = self._grid([], config) if image is not None and sized else None
        given = given_canvases(self, image, mask, image_offset, canvas, config, len(resolved["input_ids"]))
        given = _repeat(given, copies)
        cached = self._cached(past_key_values, prompts, copies)
        eos_ids = self._eos_ids(config)
        rows = [
            self._start_row(prompt, [stream[row] for stream in negatives], config, eos_ids, given[row], cached[row])
            for row, prompt in enumerate(prompts)
        ]
        criteria = () if stopping_criteria is None else stopping_criteria
        if not isinstance(criteria, (list, tuple)) or not all(callable(one) for one in criteria):
            raise ValueError(f"`stopping_criteria` must be a `StoppingCriteriaList`, got {criteria!r}.")

        input_ids = resolved["input_ids"].repeat_interleave(copies, dim=0)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        loop = GenerationLoop(
            self,
            config,
            rows,
            generator,
            streamer,
            stopping_criteria=StoppingCriteriaList(criteria),
            keep_cache=return_past_key_values,
            eos_ids=eos_ids,
            scheduler=scheduler,
            on_step=on_step,
        )
        loop()
        if streamer is not None:
            streamer.end()

        pad = config.pad_token_id if config.pad_token_id is not None else self.config.token_layout.pad_token_id or 0
        longest = max(len(row.answer) for row in rows)
        answers = torch.tensor([row.answer + [pad] * (longest - len(row.answer)) for row in rows], dtype=torch.long)
        sequences = torch.cat([input_ids, answers.to(input_ids.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        starts = [input_ids.shape[1] - row.num_open for row in rows]
        kept = torch.ones_like(sequences)
        if attention_mask is not None:
            kept[:, : input_ids.shape[1]] = attention_mask.repeat_interleave(copies, dim=0)
        for own, row in zip(kept, rows, strict=True):
            own[input_ids.shape[1] + len(row.answer) :] = 0
        negative_arguments = {
            "negative_prompt_ids": resolved["negative_prompt_ids"],
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "negative_image_prompt_ids": resolved["negative_image_prompt_ids"],
            "negative_image_prompt_attention_mask": negative_image_prompt_attention_mask,
        }
        return Emu35GenerateOutput(
            sequences=sequences,
            answer_start=torch.tensor(starts, device=input_ids.device),
            images=self._decode_answers(sequences, starts),
            num_forward_passes=loop.num_passes,
            image_statistics=[row.statistics for row in rows],
            attention_mask=kept,
            finished=torch.tensor([row.finished for row in rows], device=input_ids.device),
            past_key_values=loop.cache() if return_past_key_values else None,
            negative_prompts={
                name: tensor.repeat_interleave(copies, dim=0)
                for name, tensor in negative_arguments.items()
                if tensor is not None
            },
        )

    def _check_config(self, config: Emu35GenerationConfig):
        """Raises a ValueError for settings that this model cannot follow."""
        layout = self.config.token_layout
        if config.image_decoder not in IMAGE_DECODERS:
            raise ValueError(
                f"`image_decoder` must be one of {', '.join(map(repr, IMAGE_DECODERS))}, got {config.image_decoder!r}."
            )
        needed = (layout.boi_token_id, layout.img_token_id, layout.eol_token_id, layout.eoi_token_id)
        if config.generation_mode != "text" and (None in needed or not layout.num_visual_tokens):
            raise ValueError(
                f"`generation_mode`={config.generation_mode!r} needs image tokens, but this model's token layout does "
                "not name them all. Load it with a `config` that has a complete `token_layout`, or use 'text'."
            )
        if self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.model.layers):
            raise ValueError(
                "gradient checkpointing switches off the cache in training mode. Call `model.eval()` first."
            )

    def _unpad(self, ids: torch.LongTensor, mask: torch.Tensor | None, name: str) -> list[list[int]]:
        """Rows of ids without their padding."""
        vocab_size, pad = self.config.text_config.vocab_size, self.config.token_layout.pad_token_id
        lowest, highest = (int(value) for value in ids.aminmax())
        if lowest < 0 or highest >= vocab_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"`{name}` holds {bad}, but the model's ids lie in [0, {vocab_size}).")
        mask_name = "attention_mask" if name == "input_ids" else f"{name.removesuffix('_ids')}_attention_mask"
        rows = ids.tolist()
        if mask is None:
            if pad is not None and any(row[0] == pad for row in rows):
                raise ValueError(
                    f"`{name}` begins with padding. Pass `{mask_name}`, which says where the prompts begin."
                )
            return rows
        if mask.shape != ids.shape:
            raise ValueError(f"`{mask_name}` has the shape {tuple(mask.shape)}, `{name}` {tuple(ids.shape)}.")
        kept = mask.bool().tolist()
        if not all(row[-1] for row in kept):
            raise ValueError(
                f"`{name}` is padded on the right, or has a row without any token. Pad on the left "
                "(`padding_side='left'`)."
            )
        return [
            [one for one, keep in zip(row, keeps, strict=True) if keep] for row, keeps in zip(rows, kept, strict=True)
        ]

    def _negative_prompts(
        self, candidates: list[tuple], config: Emu35GenerationConfig, batch: int, copies: int
    ) -> list[list[list[int]]]:
        """Prompts of the unconditional streams that the guidance settings ask for: `[stream][row]`."""
        wanted = []
        scales = [config.guidance_scale, config.guidance_scale_end if config.image_decoder == "dida" else None]
        if config.generation_mode != "text":
            if config.image_guidance_scale is not None:
                wanted = candidates
            elif any(scale not in (None, 1) for scale in scales):
                wanted = candidates[:1]
        negatives = []
        for ids, mask, name in wanted:
            if ids is None:
                scale = "image_guidance_scale" if name == "negative_image_prompt_ids" else "guidance_scale"
                where = "tasks with images in the prompt" if scale.startswith("image") else "tasks that make images"
                raise ValueError(
                    f"`{scale}`={getattr(config, scale)} needs `{name}`, which the processor makes for {where}. Pass "
                    f"them on (`generate(**inputs)`), or set `{scale}={None if scale.startswith('image') else 1}`."
                )
            rows = self._unpad(ids, mask, name)
            if len(rows) * copies != batch:
                raise ValueError(f"`{name}` has {len(rows)} rows for {batch // copies} prompts. Give one for each.")
            negatives.append(_repeat(rows, copies))
        return negatives

    def _eos_ids(self, config: Emu35GenerationConfig) -> set[int]:
        eos = config.eos_token_id if config.eos_token_id is not None else self.config.token_layout.eos_token_id
        return set(eos) if isinstance(eos, (list, tuple)) else {eos}

    def _cached(
        self, cache: GenerationCache | None, prompts: list[list[int]], copies: int
    ) -> list[list[CachedPrefix]]:
        """What is cached of each answer's streams."""
        if cache is None:
            return [[]] * len(prompts)
        if not isinstance(cache, GenerationCache):
            raise ValueError(
                "`past_key_values` must be the one of an earlier output (`return_past_key_values=True`), got "
                f"{type(cache).__name__}."
            )
        cache.check(self, prompts[::copies])
        return _repeat(cache.rows, copies)

    @property
    def image_factor(self) -> int:
        """Pixels a side of one code."""
        vision = self.config.vision_tokenizer_config
        # Without one, the release's: a language model alone does not know how many pixels its codes have.
        return Emu35VisionTokenizerConfig().downsampling_factor if vision is None else vision.downsampling_factor

    def _start_row(
        self,
        prompt: list[int],
        negative_prompts: list[list[int]],
        config: Emu35GenerationConfig,
        eos_ids: set[int],
        given: torch.LongTensor | None,
        cached: list[CachedPrefix],
    ) -> GenerationRow:
        """A row at the end of its prompt: checks it, and finds out where in the grammar it stands."""
        layout = self.config.token_layout
        context = self.config.text_config.max_position_embeddings
        room = context - len(prompt)
        finished = is_finished(prompt, eos_ids, config.generation_mode == "image", layout)
        if room < 1 and not finished:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and the context {context}, so nothing can follow. Shorten the "
                "text, or give fewer or smaller images."
            )
        may_choose = given is None and not _explicit_size(config)
        grid = self._grid(prompt, config) if given is None else tuple(given.shape)
        image = unfinished_image(prompt, layout)
        num_images = len(answer_images(prompt, layout))
        if image is not None and num_images and may_choose and not config.keep_image_size:
            grid = None
        if image is not None:
            if config.generation_mode == "text":
                raise ValueError(
                    "the prompt ends inside an image, which `generation_mode='text'` cannot finish. Use 'image' or "
                    "'interleaved', or end the prompt before its last BOI."
                )
            written = [*image.size_ids, *([layout.img_token_id] if image.state == "rows" else [])]
            if grid is not None and written != [*layout.size_token_ids(*grid), layout.img_token_id][: len(written)]:
                if not may_choose:
                    raise ValueError(
                        f"the prompt ends inside an image whose size does not begin like {grid[0]}*{grid[1]} codes, "
                        "as asked for. Leave out `height`, `width`, `aspect_ratio` and `image`."
                    )
                grid = None
            if image.state == "rows":
                grid = (image.token_height, image.token_width)
        num_open = 0 if image is None else len(prompt) - image.begin
        known_codes = [] if image is None else list(image.codes)
        if given is not None:
            wanted = given.flatten().tolist()
            for place, (code, own) in enumerate(zip(known_codes, wanted, strict=False)):
                if own not in (-1, code):
                    raise ValueError(
                        f"the prompt ends inside an image whose code {place} is {code}, but `image` keeps {own} there."
                    )
            known_codes += wanted[len(known_codes) :]
        if config.generation_mode == "image" and grid is not None and not finished:
            needed = layout.num_image_tokens(*grid) - num_open
            if needed > room:
                raise ValueError(
                    f"an image of {grid[0]}*{grid[1]} codes takes {needed} more tokens, but after the prompt's "
                    f"{len(prompt)} only {room} are left in the context. Choose a smaller `height` and `width`, or a "
                    "shorter prompt."
                )
        closed = prompt[: len(prompt) - num_open]
        prompts = [closed, *negative_prompts]
        if negative_prompts:
            prompts[1] = prompts[1] + missing_answer_images(closed, prompts[1], layout)
        return GenerationRow(
            prompt=prompt,
            budget=room if config.max_new_tokens is None else min(room, config.max_new_tokens),
            prompts=prompts,
            grid=grid,
            may_choose=may_choose,
            image=image,
            known_codes=known_codes,
            cached=cached,
            num_images=num_images,
            finished=finished,
        )

    def _grid(self, prompt: list[int], config: Emu35GenerationConfig) -> tuple[int, int] | None:
        """The codes an image must have, or `None` where the model chooses."""
        if config.generation_mode == "text":
            return None
        factor = self.image_factor
        if (config.height is None) != (config.width is None):
            raise ValueError(f"give `height` and `width` together, got {config.height} and {config.width}.")
        if config.height is not None:
            if config.aspect_ratio is not None:
                raise ValueError("give either `height` and `width`, or `aspect_ratio`, not both.")
            for name in ("height", "width"):
                value = getattr(config, name)
                if not isinstance(value, int) or value <= 0 or value % factor:
                    near = ""
                    if isinstance(value, int) and value > factor:
                        near = f" Nearest: {value // factor * factor} or {(value // factor + 1) * factor}."
                    raise ValueError(f"`{name}` must be a positive multiple of {factor} pixels, got {value!r}.{near}")
            grid = (config.height // factor, config.width // factor)
            context = self.config.text_config.max_position_embeddings
            if self.config.token_layout.num_image_tokens(*grid) > context:
                raise ValueError(
                    f"`height`={config.height} and `width`={config.width} make an image of {grid[0] * grid[1]} codes, "
                    f"which does not fit into the context of {context} tokens."
                )
            return grid
        if config.aspect_ratio not in (None, "auto", "reference"):
            return grid_for_aspect_ratio(config.aspect_ratio, config.image_area, factor)
        layout = self.config.token_layout
        if config.keep_image_size and config.aspect_ratio != "reference":
            for image in answer_images(prompt, layout):
                return image.token_height, image.token_width
        images = [image for image in find_images(prompt, layout) if image.complete]
        if config.aspect_ratio == "reference" and not images:
            raise ValueError('`aspect_ratio`="reference" needs an image in every prompt.')
        if config.aspect_ratio == "reference" or (config.aspect_ratio is None and len(images) == 1):
            return images[-1].token_height, images[-1].token_width
        return None

    def _decode_answers(self, sequences: torch.LongTensor, starts: list[int]) -> list[list[Image]] | None:
        if self.vision_tokenizer is None:
            return None
        layout = self.config.token_layout
        found: list[list[ImageTokens]] = [
            [image for image in find_images(ids, layout, start) if image.complete]
            for ids, start in zip(sequences.tolist(), starts, strict=True)
        ]
        codebook_size = self.config.vision_tokenizer_config.codebook_size
        if any(max(image.codes) >= codebook_size for images in found for image in images):
            logger.warning(
                "no images are decoded: the model made codes outside the vision tokenizer's codebook of %d. The two "
                "don't belong together.",
                codebook_size,
            )
            return None
        keys = [[(image.token_height, tuple(image.codes)) for image in images] for images in found]
        distinct = list(dict.fromkeys(key for row in keys for key in row))  # a sure model repeats itself
        grids = [torch.tensor(codes).view(height, -1) for height, codes in distinct]
        pixels = dict(zip(distinct, self.decode_image(grids) if grids else (), strict=True))
        return [[pixels_to_pil(pixels[key]) for key in row] for row in keys]


def _repeat(rows: list, copies: int) -> list:
    return [row for row in rows for _ in range(copies)]


def _explicit_size(config: Emu35GenerationConfig) -> bool:
    return config.height is not None or config.aspect_ratio not in (None, "auto")
