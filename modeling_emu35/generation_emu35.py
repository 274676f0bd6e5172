"""`generate`: text, images, or both in one answer.

    ┌──────────────► text phase: all rows that write text or an image's size, one batch
    │                   │ EOS, limit ──► row is done
    │                   ▼ BOI h * w IMG
    │                image phase: rows with the same grid, all guidance streams in one batch ──► image decoder ──► codes
    └───────────────────┘ EOI (image mode: done)

Every row keeps streams of its own between the phases (prompt and answer; for guidance a prompt without text, and one without
text and images), so rows may be in different phases and streams may differ in length.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from .configuration_emu35 import Emu35TokenLayout
from .decoding_emu35 import IMAGE_DECODERS, ImageRequest, TokenStream
from .generation_configuration_emu35 import (
    Emu35GenerateOutput,
    Emu35GenerationConfig,
    grid_for_aspect_ratio,
)
from .image_tokens_emu35 import ImageTokens, find_images, last_image, parse_size
from .sampling_emu35 import Generators, Sampler
from .segments_emu35 import pixels_to_pil


@dataclass
class _Row:
    """One row of the batch while it is being generated.

    Attributes:
        prompt (`list[int]`): ids of the prompt, without padding.
        budget (`int`): tokens that may follow it.
        prompts (`list[list[int]]`): what each stream begins with; the conditional one first.
        grid (`tuple[int, int]` or `None`): codes an image must have; `None`: the model writes the size.
        image (`ImageTokens` or `None`): the unfinished image that the prompt ends in.
        streams (`list[TokenStream]`), queues (`list[list[int]]`): what is cached, and the ids that come next.
        answer (`list[int]`): ids made so far, forced ones included.
        size_ids (`list[int]` or `None`): what stands between BOI and now, while the size is written; else `None`.
        num_images (`int`): images begun in the answer.
        done (`bool`).
    """

    prompt: list[int]
    budget: int
    prompts: list[list[int]]
    grid: tuple[int, int] | None
    image: ImageTokens | None
    streams: list[TokenStream] = field(default_factory=list)
    queues: list[list[int]] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    size_ids: list[int] | None = None
    num_images: int = 0
    done: bool = False

    @property
    def left(self) -> int:
        return self.budget - len(self.answer)

    @property
    def given_ids(self) -> list[int]:
        """What the prompt holds of its unfinished image, after IMG."""
        image = self.image
        return [] if image is None or image.state == "size" else self.prompt[image.begin + len(image.size_ids) + 2 :]


def allowed_size_tokens(size_ids: Sequence[int], layout: Emu35TokenLayout) -> list[int]:
    """Ids that may follow `size_ids` between BOI and IMG (IMG included), when the model chooses the size.

    Each side has `layout.size_digits` digits and no leading zero.
    """
    fewest, most = layout.size_digits
    separator = layout.size_separator_token_id
    sides = sum(token_id == separator for token_id in size_ids) + 1
    digits = 0
    for token_id in reversed(size_ids):
        if token_id == separator:
            break
        digits += 1
    allowed = list(layout.digit_token_ids[0 if digits else 1 :]) if digits < most else []
    if digits >= fewest:
        allowed.append(separator if sides == 1 else layout.img_token_id)
    return allowed


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
        if generation_config is not None:
            self.generation_config = Emu35GenerationConfig.from_dict(generation_config.to_dict())
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
            except OSError:  # no such file: the class's defaults, set by __init__
                self.generation_config = Emu35GenerationConfig()

    def _prepare_generation_config(self, generation_config=None, **kwargs):
        """What `transformers.pipeline` asks for: settings it changes, and arguments that are not settings."""
        config = self.generation_config if generation_config is None else generation_config
        known = {name: value for name, value in kwargs.items() if hasattr(config, name)}
        merged = Emu35GenerationConfig.from_dict({**self.generation_config.to_dict(), **known})
        if merged.max_new_tokens is None and generation_config is not None:
            merged.max_new_tokens = generation_config.max_new_tokens
        return merged, {name: value for name, value in kwargs.items() if name not in known}

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
        generation_config: Emu35GenerationConfig | None = None,
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
            streamer (`BaseStreamer`, *optional*): `put` gets the prompt, then every token as it comes. Batch size 1 only.
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
        if config.image_decoder not in IMAGE_DECODERS:
            raise ValueError(
                f"`image_decoder` must be one of {', '.join(map(repr, IMAGE_DECODERS))}, got {config.image_decoder!r}."
            )
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"`input_ids` must have the shape (batch, length) with a length of at least 1, got {shape}.")

        resolved = self.resolve_image_tokens(
            input_ids=input_ids,
            negative_prompt_ids=negative_prompt_ids,
            negative_image_prompt_ids=negative_image_prompt_ids,
            pixel_values=pixel_values,
        )
        copies = config.num_return_sequences or 1
        input_ids = resolved["input_ids"].repeat_interleave(copies, dim=0)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(copies, dim=0)
        prompts = _unpad(input_ids, attention_mask, "input_ids")
        negatives = [
            (resolved["negative_prompt_ids"], negative_prompt_attention_mask, "negative_prompt_ids"),
            (resolved["negative_image_prompt_ids"], negative_image_prompt_attention_mask, "negative_image_prompt_ids"),
        ]
        negatives = self._negative_prompts(negatives, config, len(prompts), copies)
        if isinstance(generator, Sequence) and len(generator) != len(prompts):
            raise ValueError(f"`generator` has {len(generator)} generators for {len(prompts)} answers. Give one for each.")
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"`streamer` works with one answer at a time, got a batch of {len(prompts)}.")

        rows = [
            self._start_row(prompt, [stream[row] for stream in negatives], config) for row, prompt in enumerate(prompts)
        ]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        run = _Run(self, config, rows, generator, streamer)
        run()
        if streamer is not None:
            streamer.end()

        answers = [row.answer for row in rows]
        pad = config.pad_token_id if config.pad_token_id is not None else self.config.token_layout.pad_token_id or 0
        longest = max(map(len, answers))
        padded = torch.tensor([[*answer, *[pad] * (longest - len(answer))] for answer in answers], dtype=torch.long)
        sequences = torch.cat([input_ids, padded.view(len(rows), longest).to(input_ids.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        opened = [0 if row.image is None else len(row.prompt) - row.image.begin for row in rows]
        starts = [input_ids.shape[1] - length for length in opened]
        return Emu35GenerateOutput(
            sequences=sequences,
            answer_start=torch.tensor(starts, device=input_ids.device),
            images=self._decode_answers(sequences, starts),
            num_forward_passes=run.num_passes,
        )

    def _negative_prompts(self, candidates, config, batch: int, copies: int) -> list[list[list[int]]]:
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
                raise ValueError(
                    f"`{scale}`={getattr(config, scale)} needs `{name}`, which the processor makes for tasks with images. "
                    f"Pass them on (`generate(**inputs)`), or set `{scale}={'None' if scale.startswith('image') else '1'}`."
                )
            rows = _unpad(ids, mask, name)
            if len(rows) * copies != batch:
                raise ValueError(f"`{name}` has {len(rows)} rows for {batch // copies} prompts. Give one for each prompt.")
            negatives.append([row for row in rows for _ in range(copies)])
        return negatives

    def _start_row(self, prompt: list[int], negative_prompts: list[list[int]], config: Emu35GenerationConfig) -> _Row:
        """A row at the end of its prompt: checks it, and finds out where in the grammar it stands."""
        layout = self.config.token_layout
        context = self.config.text_config.max_position_embeddings
        if len(prompt) >= context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and the context {context}, so nothing can follow. Shorten the text, "
                "or give fewer or smaller images."
            )
        budget = context - len(prompt)
        if config.max_new_tokens is not None:
            budget = min(budget, config.max_new_tokens)
        grid = self._grid(prompt, config)
        image = last_image(prompt, layout)
        if image is not None and (image.end < len(prompt) or image.state not in ("size", "rows")):
            image = None
        if image is not None and grid is not None:
            written = list(image.size_ids) + ([layout.img_token_id] if image.state == "rows" else [])
            if written != [*layout.size_token_ids(*grid), layout.img_token_id][: len(written)]:
                if _explicit_size(config):
                    raise ValueError(
                        f"the prompt ends inside an image whose size does not begin like {grid[0]}*{grid[1]} codes, which was "
                        "asked for. Leave out `height`, `width` and `aspect_ratio`."
                    )
                grid = None
        if image is not None and image.state == "rows":
            grid = (image.token_height, image.token_width)
        open_length = 0 if image is None else len(prompt) - image.begin
        if config.generation_mode == "image" and grid is not None and config.max_new_tokens is None:
            needed = layout.num_image_tokens(*grid) - open_length
            if needed > budget:
                raise ValueError(
                    f"an image of {grid[0]}*{grid[1]} codes takes {needed} more tokens, but after the prompt's {len(prompt)} "
                    f"only {budget} are left in the context. Choose a smaller `height` and `width`, or a shorter prompt."
                )
        closed = prompt[: len(prompt) - open_length]
        prompts = [closed, *negative_prompts]
        if negative_prompts:
            prompts[1] = prompts[1] + _missing_answer_images(closed, prompts[1], layout)
        return _Row(prompt, budget, prompts, grid, image)

    def _grid(self, prompt: list[int], config: Emu35GenerationConfig) -> tuple[int, int] | None:
        """The codes an image must have, or `None` where the model chooses."""
        vision = self.config.vision_tokenizer_config
        factor = 16 if vision is None else vision.downsampling_factor
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
        if config.aspect_ratio == "auto":
            return None
        if config.aspect_ratio not in (None, "reference"):
            return grid_for_aspect_ratio(config.aspect_ratio, config.image_area, factor)
        images = [image for image in find_images(prompt, self.config.token_layout) if image.complete]
        if config.aspect_ratio == "reference" and not images:
            raise ValueError('`aspect_ratio`="reference" needs an image in every prompt.')
        if images and (config.aspect_ratio == "reference" or len(images) == 1):
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
        grids = [
            torch.tensor(image.codes).view(image.token_height, image.token_width) for images in found for image in images
        ]
        if any(int(grid.max()) >= self.config.vision_tokenizer_config.codebook_size for grid in grids):
            return None
        pixels = iter(self.decode_image(grids) if grids else [])
        return [
            [pixels_to_pil(next(pixels)) for _ in images] for images in found
        ]


def _explicit_size(config: Emu35GenerationConfig) -> bool:
    return config.height is not None or config.aspect_ratio not in (None, "auto")


def _missing_answer_images(prompt: list[int], negative_prompt: list[int], layout: Emu35TokenLayout) -> list[int]:
    """Ids of the images that a prompt holds of its answer (after the last BSS) and the negative prompt does not.

    They belong there when an answer is continued: the unconditional stream sees the images made so far.
    """
    if layout.bss_token_id not in prompt:
        return []
    start = len(prompt) - prompt[::-1].index(layout.bss_token_id)
    known = len(list(find_images(negative_prompt, layout)))
    images = [image for image in list(find_images(prompt, layout))[known:] if image.begin >= start]
    return [token_id for image in images for token_id in prompt[image.begin : image.end]]


def _unpad(ids: torch.LongTensor, mask: torch.Tensor | None, name: str) -> list[list[int]]:
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"the attention mask of `{name}` has the shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}.")
    rows = ids.tolist()
    if mask is not None:
        rows = [
            [token_id for token_id, keep in zip(row, kept, strict=True) if keep]
            for row, kept in zip(rows, mask.bool().tolist(), strict=True)
        ]
    if not all(rows):
        raise ValueError(f"`{name}` has a row without any token that the attention mask keeps.")
    return rows


class _Run:
    """One call of `generate`: the alternation of text and image phases."""

    def __init__(self, model, config: Emu35GenerationConfig, rows: list[_Row], generator: Generators, streamer):
        self.model = model
        self.layout: Emu35TokenLayout = model.config.token_layout
        self.config = config
        self.rows = rows
        self.generator = generator
        self.streamer = streamer
        self.device = model.get_input_embeddings().weight.device
        self.num_passes = 0
        self.text_sampler = Sampler(bool(config.do_sample), config.temperature, config.top_k, config.top_p)
        self.image_sampler = Sampler(
            bool(config.do_sample), config.image_temperature, config.image_top_k, config.image_top_p
        )
        eos = config.eos_token_id if config.eos_token_id is not None else self.layout.eos_token_id
        self.eos_ids = set() if eos is None else set(eos) if isinstance(eos, (list, tuple)) else {eos}

    def __call__(self):
        for row in self.rows:
            self._start(row)
        while waiting := [index for index, row in enumerate(self.rows) if not row.done]:
            writing = [index for index in waiting if not self._size_is_complete(self.rows[index])]
            if writing:
                self._text_phase(writing)
            groups = defaultdict(list)
            for index in waiting:
                row = self.rows[index]
                if not row.done:
                    groups[parse_size(row.size_ids[:-1], self.layout)].append(index)
            for grid, indices in groups.items():
                self._image_phase(grid, indices)

    def _size_is_complete(self, row: _Row) -> bool:
        return bool(row.size_ids) and row.size_ids[-1] == self.layout.img_token_id

    def _start(self, row: _Row):
        """Fills the queues with the prompts and with what a row's place in the grammar forces."""
        row.streams = [TokenStream.empty(self.model, 1, self.device) for _ in row.prompts]
        row.queues = [list(prompt) for prompt in row.prompts]
        if row.image is None:
            if self.config.generation_mode == "image":
                self._begin_image(row)
            return
        row.num_images += 1
        row.size_ids = list(row.image.size_ids)
        if row.image.state == "rows":
            row.size_ids.append(self.layout.img_token_id)
        for queue in row.queues:
            # The codes after IMG follow in the image phase, which knows how many its rows have in common.
            queue += [self.layout.boi_token_id, *row.size_ids]
        self._write_settled_size(row)

    def _put(self, row: _Row, ids: Sequence[int]) -> None:
        """Ids into the answer, as far as the budget goes."""
        ids = list(ids[: row.left])
        row.answer += ids
        row.done = row.left <= 0
        if self.streamer is not None:
            for token_id in ids:
                self.streamer.put(torch.tensor([token_id]))

    def _put_forced(self, row: _Row, ids: Sequence[int]) -> None:
        """Ids of an image: into the answer and into all streams."""
        for queue in row.queues:
            queue += ids
        self._put(row, ids)

    def _begin_image(self, row: _Row):
        if row.num_images and not self.config.keep_image_size and not _explicit_size(self.config):
            row.grid = None
        row.num_images += 1
        row.size_ids = []
        self._put_forced(row, [self.layout.boi_token_id])
        self._write_settled_size(row)

    def _write_settled_size(self, row: _Row):
        """Writes what is settled of the size: all of it for a known grid, else ids that have no alternative."""
        layout = self.layout
        if row.grid is not None:
            rest = [*layout.size_token_ids(*row.grid), layout.img_token_id][len(row.size_ids) :]
            row.size_ids += rest
            self._put_forced(row, rest)
        while not row.done and not self._size_is_complete(row):
            allowed = allowed_size_tokens(row.size_ids, layout)
            if len(allowed) > 1:
                return
            row.size_ids += allowed
            self._put_forced(row, allowed)
        if row.grid is None and self._size_is_complete(row):
            row.grid = parse_size(row.size_ids[:-1], layout)

    def _text_phase(self, indices: list[int]):
        """Samples text (or sizes) until every row is done or stands before an image."""
        layout = self.layout
        stream = TokenStream.stack([self.rows[index].streams[0] for index in indices])
        while indices:
            rows = [self.rows[index] for index in indices]
            stream.append_lists([row.queues[0] for row in rows])
            logits = self.model.compute_logits(stream.advance(), vocabulary="text").float()
            self.num_passes += 1
            for row, scores in zip(rows, logits, strict=True):
                row.queues[0] = []
                self._block(row, scores)
            columns = self.text_sampler(logits, self._generators(indices))
            # Text columns are ids, except that ids after the visual range have moved down by its length.
            ids = torch.where(columns < layout.visual_token_offset, columns, columns + layout.num_visual_tokens)
            for row, token_id in zip(rows, ids.tolist(), strict=True):
                self._take_text_token(row, token_id)
            staying = [place for place, row in enumerate(rows) if not row.done and not self._size_is_complete(row)]
            if len(staying) < len(rows):
                for place, row in enumerate(rows):
                    if not row.done and place not in staying:
                        row.streams[0] = stream.rows([place])
                stream = stream.rows(staying) if staying else None
                indices = [indices[place] for place in staying]

    def _block(self, row: _Row, scores: torch.Tensor):
        """Sets the logits of what may not come next to -inf, in place."""
        if row.size_ids is not None:
            allowed = torch.tensor(allowed_size_tokens(row.size_ids, self.layout), device=scores.device)
            kept = scores[allowed]
            scores.fill_(float("-inf"))
            scores[allowed] = kept
            return
        most = 0 if self.config.generation_mode == "text" else self.config.max_images
        if most is not None and row.num_images >= most and self.layout.boi_token_id is not None:
            scores[self.layout.boi_token_id] = float("-inf")

    def _take_text_token(self, row: _Row, token_id: int):
        if row.size_ids is not None:
            row.size_ids.append(token_id)
            self._put_forced(row, [token_id])
            self._write_settled_size(row)
        elif token_id == self.layout.boi_token_id:
            self._begin_image(row)
        else:
            row.queues[0].append(token_id)
            self._put(row, [token_id])
            row.done = row.done or token_id in self.eos_ids

    def _image_phase(self, grid: tuple[int, int], indices: list[int]):
        """Makes one image of `grid` codes for each of these rows."""
        layout, config = self.layout, self.config
        rows = [self.rows[index] for index in indices]
        height, width = grid
        given = [[] if row.image is None else list(row.image.codes) for row in rows]
        num_cached = min(map(len, given))
        for row, codes in zip(rows, given, strict=True):
            for queue in row.queues:
                queue += self._grid_ids(codes[:num_cached], grid)
        num_streams = len(rows[0].streams)
        members = [(row, number) for number in range(num_streams) for row in rows]
        self._catch_up(members)
        stream = TokenStream.stack([row.streams[number] for row, number in members])
        stream.append_lists([row.queues[number] for row, number in members])
        # Tokens of the image that are in the prompt, and how many codes fit into what is left of the budget.
        given_lengths = [len(row.given_ids) for row in rows]
        budgets = [
            min(height * width, tokens // (width + 1) * width + min(tokens % (width + 1), width))
            for tokens in (length + row.left for length, row in zip(given_lengths, rows, strict=True))
        ]
        progress = _ImageProgress(self.streamer, self._grid_ids, grid, rows[0].given_ids, given[0][:num_cached])
        request = ImageRequest(
            token_height=height,
            token_width=width,
            given=given,
            num_cached=num_cached,
            sampler=self.image_sampler,
            guidance_scale=1.0 if config.guidance_scale is None else config.guidance_scale,
            image_guidance_scale=config.image_guidance_scale,
            generator=self._generators(indices),
            max_codes=max(budgets),
            on_codes=None if self.streamer is None else progress,
        )
        codes = IMAGE_DECODERS[config.image_decoder](stream, request).tolist()
        self.num_passes += stream.num_passes
        for place, row in enumerate(rows):
            own = codes[place][: budgets[place]]
            ids = self._grid_ids(own, grid)[given_lengths[place] :]
            row.answer += ids[: row.left]  # the streamer has them already
            row.image, row.size_ids = None, None
            row.done = row.left <= 0 or len(own) < height * width
            if row.done:
                continue
            self._put(row, [layout.eoi_token_id])
            if config.generation_mode == "image":
                row.done = True
            if not row.done:
                row.streams = [stream.rows([number * len(rows) + place]) for number in range(num_streams)]
                row.queues = [[layout.eoi_token_id] for _ in row.queues]
                if num_streams == 3:
                    # The stream without text and images never sees earlier images.
                    row.streams[2] = TokenStream.empty(self.model, 1, self.device)
                    row.queues[2] = list(row.prompts[2])

    def _catch_up(self, members: list[tuple[_Row, int]]):
        """Computes long beginnings on their own where other streams of the batch are further.

        Left to the common pass, they would become as many masked columns in the caches of all the others.
        """
        behind = [(row, number) for row, number in members if not row.streams[number].num_cached]
        if len(behind) in (0, len(members)):
            return
        stream = TokenStream.stack([row.streams[number] for row, number in behind])
        stream.append_lists([row.prompts[number] for row, number in behind])
        stream.advance()
        self.num_passes += 1
        for place, (row, number) in enumerate(behind):
            row.streams[number] = stream.rows([place])
            row.queues[number] = row.queues[number][len(row.prompts[number]) :]

    def _grid_ids(self, codes: Sequence[int], grid: tuple[int, int], first: int = 0) -> list[int]:
        """Ids of codes `first`, `first + 1`, ... of a grid, with the EOLs that follow them."""
        height, width = grid
        ids = []
        for index, code in enumerate(codes, start=first):
            ids.append(self.layout.visual_token_offset + code)
            if (index + 1) % width == 0 and index + 1 < height * width:
                ids.append(self.layout.eol_token_id)
        return ids

    def _generators(self, indices: list[int]) -> Generators:
        if isinstance(self.generator, Sequence):
            return [self.generator[index] for index in indices]
        return self.generator


class _ImageProgress:
    """Passes an image's ids on to a streamer as its codes come, except those the prompt already holds."""

    def __init__(self, streamer, grid_ids, grid: tuple[int, int], given_ids: list[int], cached_codes: list[int]):
        self.streamer, self.grid_ids, self.grid = streamer, grid_ids, grid
        self.index = len(cached_codes)
        self.skip = len(given_ids)
        self._pass_on(grid_ids(cached_codes, grid))

    def _pass_on(self, ids: list[int]):
        for token_id in ids:
            if self.skip:
                self.skip -= 1
            elif self.streamer is not None:
                self.streamer.put(torch.tensor([token_id]))

    def __call__(self, codes: torch.LongTensor):
        self._pass_on(self.grid_ids([int(codes[0])], self.grid, first=self.index))
        self.index += 1
