"""`generate`: text, images, or both in one answer.

Here is what goes in and what comes out; the loop itself is in `generation_loop_emu35`.
"""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from PIL.Image import Image
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from .configuration_emu35 import Emu35TokenLayout, Emu35VisionTokenizerConfig
from .decoding_emu35 import IMAGE_DECODERS
from .generation_configuration_emu35 import (
    SETTINGS,
    Emu35GenerateOutput,
    Emu35GenerationConfig,
    grid_for_aspect_ratio,
)
from .generation_loop_emu35 import GenerationLoop, GenerationRow
from .image_tokens_emu35 import ImageTokens, find_images, last_image
from .sampling_emu35 import Generators
from .segments_emu35 import pixels_to_pil

logger = logging.getLogger(__name__)


class Emu35GenerationMixin(GenerationMixin):
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
        generation_config: GenerationConfig | None = None,
        task: str | None = None,
        generator: Generators = None,
        streamer: BaseStreamer | None = None,
        **settings: Any,
    ) -> Emu35GenerateOutput | torch.LongTensor:
        """Continues prompts with text, images, or both.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask:
                prompts, padded on the left. A prompt that ends inside an image (after BOI, in the size, in a row) is
                continued there.
            negative_prompt_ids, negative_prompt_attention_mask:
                the unconditional prompts of `guidance_scale`; the processor makes them.
            negative_image_prompt_ids, negative_image_prompt_attention_mask:
                prompts without text and images, for `image_guidance_scale`.
            pixel_values: images behind the placeholders in the prompts.
            image_sizes: their heights and widths, which the processor adds; not needed here.
            generation_config (`Emu35GenerationConfig`, *optional*): instead of `model.generation_config`.
            task (`str`, *optional*): apply the checkpoint's defaults for this task ("t2i", "x2i", "story", ...).
            generator (`torch.Generator`, or one a row): the same seed gives the same answer.
            streamer (`BaseStreamer`, *optional*): `put` gets the prompt, then every token at once. One answer only.
            settings: fields of [`Emu35GenerationConfig`].
        Returns:
            [`Emu35GenerateOutput`], or only its `sequences` with `return_dict_in_generate=False`.
        Raises:
            ValueError: for settings that don't exist, contradict each other or don't fit the prompts.
        """
        config = Emu35GenerationConfig().overridden_by(self.generation_config)
        if generation_config is not None:
            config = config.overridden_by(generation_config)
        config = config.with_settings(task, **settings)
        self._check_config(config)
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
        rows = [
            self._start_row(prompt, [stream[row] for stream in negatives], config)
            for row, prompt in enumerate(prompts)
        ]

        input_ids = resolved["input_ids"].repeat_interleave(copies, dim=0)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        loop = GenerationLoop(self, config, rows, generator, streamer)
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
        return Emu35GenerateOutput(
            sequences=sequences,
            answer_start=torch.tensor(starts, device=input_ids.device),
            images=self._decode_answers(sequences, starts),
            num_forward_passes=loop.num_passes,
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
        if config.generation_mode != "text":
            if config.image_guidance_scale is not None:
                wanted = candidates
            elif config.guidance_scale is not None and config.guidance_scale != 1:
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

    def _start_row(
        self, prompt: list[int], negative_prompts: list[list[int]], config: Emu35GenerationConfig
    ) -> GenerationRow:
        """A row at the end of its prompt: checks it, and finds out where in the grammar it stands."""
        layout = self.config.token_layout
        context = self.config.text_config.max_position_embeddings
        room = context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and the context {context}, so nothing can follow. Shorten the "
                "text, or give fewer or smaller images."
            )
        grid = self._grid(prompt, config)
        image = _unfinished_image(prompt, layout)
        if image is not None:
            if config.generation_mode == "text":
                raise ValueError(
                    "the prompt ends inside an image, which `generation_mode='text'` cannot finish. Use 'image' or "
                    "'interleaved', or end the prompt before its last BOI."
                )
            written = [*image.size_ids, *([layout.img_token_id] if image.state == "rows" else [])]
            if grid is not None and written != [*layout.size_token_ids(*grid), layout.img_token_id][: len(written)]:
                if _explicit_size(config):
                    raise ValueError(
                        f"the prompt ends inside an image whose size does not begin like {grid[0]}*{grid[1]} codes, "
                        "as asked for. Leave out `height`, `width` and `aspect_ratio`."
                    )
                grid = None
            if image.state == "rows":
                grid = (image.token_height, image.token_width)
        num_open = 0 if image is None else len(prompt) - image.begin
        if config.generation_mode == "image" and grid is not None:
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
            prompts[1] = prompts[1] + _missing_answer_images(closed, prompts[1], layout)
        return GenerationRow(
            prompt=prompt,
            budget=room if config.max_new_tokens is None else min(room, config.max_new_tokens),
            prompts=prompts,
            grid=grid,
            may_choose=not _explicit_size(config),
            image=image,
            num_images=len(_answer_images(prompt, layout)),
        )

    def _grid(self, prompt: list[int], config: Emu35GenerationConfig) -> tuple[int, int] | None:
        """The codes an image must have, or `None` where the model chooses."""
        if config.generation_mode == "text":
            return None
        vision = self.config.vision_tokenizer_config
        # Without one, the release's: a language model alone does not know how many pixels its codes have.
        factor = Emu35VisionTokenizerConfig().downsampling_factor if vision is None else vision.downsampling_factor
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
            for image in _answer_images(prompt, layout):
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
        grids = [
            torch.tensor(image.codes).view(image.token_height, image.token_width)
            for images in found
            for image in images
        ]
        pixels = iter(self.decode_image(grids) if grids else [])
        return [[pixels_to_pil(next(pixels)) for _ in images] for images in found]


def _repeat(rows: list[list[int]], copies: int) -> list[list[int]]:
    return [row for row in rows for _ in range(copies)]


def _explicit_size(config: Emu35GenerationConfig) -> bool:
    return config.height is not None or config.aspect_ratio not in (None, "auto")


def _unfinished_image(prompt: list[int], layout: Emu35TokenLayout) -> ImageTokens | None:
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


def _answer_images(prompt: list[int], layout: Emu35TokenLayout) -> list[ImageTokens]:
    """Complete images of the answer that a prompt already holds, which is what follows its last BSS."""
    if layout.bss_token_id not in prompt:
        return []
    start = len(prompt) - prompt[::-1].index(layout.bss_token_id)
    return [image for image in find_images(prompt, layout, start) if image.complete]


def _missing_answer_images(prompt: list[int], negative_prompt: list[int], layout: Emu35TokenLayout) -> list[int]:
    """Ids of the answer's images in a prompt that the negative prompt lacks.

    They belong there when an answer is continued: the unconditional stream sees the images made so far.
    """
    known = len(list(find_images(negative_prompt, layout)))
    begins = [image.begin for image in find_images(prompt, layout)][known:]
    images = [image for image in _answer_images(prompt, layout) if image.begin in begins]
    return [token_id for image in images for token_id in prompt[image.begin : image.end]]
