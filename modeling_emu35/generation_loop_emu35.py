"""The loop of `generate`: text and image phases by turns, over rows that may be in different ones.

    ┌──────────────► text phase: all rows that write text or an image's size, one batch
    │                   │ EOS, limit ──► row is done
    │                   ▼ BOI h * w IMG
    │                image phase: rows with the same grid, all guidance streams in one batch ─► image decoder ─► codes
    └───────────────────┘ EOI (image mode: done)

Every row keeps streams of its own between the phases (prompt and answer; for guidance a prompt without text, and one
without text and images), so rows may be in different phases and streams may differ in length.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation import CompileConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .configuration_emu35 import Emu35TokenLayout
from .decoding_emu35 import (
    IMAGE_DECODERS,
    CachedPrefix,
    GenerationCache,
    ImageRequest,
    ImageStatistics,
    TokenStream,
    execution_device,
)
from .generation_configuration_emu35 import Emu35GenerationConfig
from .image_tokens_emu35 import ImageTokens, parse_size
from .sampling_emu35 import Generators, Sampler, check_scores, is_damaged

#: Tokens of shared prompts that are worth a pass of their own: fewer take less time than reading the weights.
LEAST_SHARED = 256


@dataclass
class RowStream:
    """One guidance stream of one row.

    Attributes:
        ids (`list[int]`): all ids the stream must see, in order.
        stream (`TokenStream`): one row, which has been given the first `num_taken` of them.
    """

    ids: list[int]
    stream: TokenStream
    num_taken: int = 0

    def take(self) -> list[int]:
        """The ids that `stream` has not been given yet; counts them as given."""
        new, self.num_taken = self.ids[self.num_taken :], len(self.ids)
        return new


@dataclass
class GenerationRow:
    """One row of the batch while it is being generated.

    Attributes:
        prompt (`list[int]`): ids of the prompt, without padding.
        budget (`int`): tokens that may follow it.
        prompts (`list[list[int]]`): what each stream begins with; the conditional one first.
        grid (`tuple[int, int]` or `None`): codes an image must have; `None`: the model writes the size.
        may_choose (`bool`): whether the size was left to the model, so that later images may differ.
        image (`ImageTokens` or `None`): the unfinished image that the prompt ends in.
        known_codes (`list[int]`):
            codes of the first image to make that are given, row after row: those the prompt ends with, and those of a
            partly given image (-1 where one is to be made).
        cached (`list[CachedPrefix]`): what an earlier call computed, stream by stream.
        streams (`list[RowStream]`).
        answer (`list[int]`): ids made so far, forced ones included.
        size_ids (`list[int]` or `None`): what stands between BOI and now, while the size is written; else `None`.
        prompt_body (`list[int]`): what the prompt holds of its unfinished image, after IMG.
        num_images (`int`): images begun in the answer.
        statistics (`list[ImageStatistics]`): of the images that were made.
        finished (`bool`): whether the answer came to its own end.
        done (`bool`): whether nothing more follows, for whatever reason.
    """

    prompt: list[int]
    budget: int
    prompts: list[list[int]]
    grid: tuple[int, int] | None
    may_choose: bool
    image: ImageTokens | None
    known_codes: list[int] = field(default_factory=list)
    cached: list[CachedPrefix] = field(default_factory=list)
    streams: list[RowStream] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    size_ids: list[int] | None = None
    prompt_body: list[int] = field(default_factory=list)
    num_images: int = 0
    statistics: list[ImageStatistics] = field(default_factory=list)
    finished: bool = False
    done: bool = False

    @property
    def left(self) -> int:
        return self.budget - len(self.answer)

    @property
    def num_open(self) -> int:
        """Tokens of the prompt that belong to its unfinished image."""
        return 0 if self.image is None else len(self.prompt) - self.image.begin


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


class GenerationLoop:
    """One call of `generate`.

    Args:
        model ([`Emu35ForConditionalGeneration`]).
        config ([`Emu35GenerationConfig`]): complete and checked.
        rows (`list[GenerationRow]`): checked prompts; their `answer` is filled.
        generator: see [`Sampler`].
        streamer (`BaseStreamer`, *optional*):
            gets the ids of the answer; for a single row only. Its `stop_requested` ends the loop at the next token.
        stopping_criteria (`StoppingCriteriaList`, *optional*): asked after every token, row by row.
        keep_cache (`bool`): whether [`cache`] will be asked for.
        eos_ids (`set[int]`): tokens that end an answer.
        scheduler (`DiDAScheduler`, *optional*), on_step (`Callable`, *optional*): see [`ImageRequest`].
    """

    def __init__(
        self,
        model,
        config: Emu35GenerationConfig,
        rows: list[GenerationRow],
        generator: Generators = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        keep_cache: bool = False,
        eos_ids: set[int] = frozenset(),
        scheduler: Any = None,
        on_step: Callable[[int, torch.LongTensor], None] | None = None,
    ):
        self.model = model
        self.layout: Emu35TokenLayout = model.config.token_layout
        self.config = config
        self.rows = rows
        self.generator = generator
        self.streamer = streamer
        self.stopping_criteria = stopping_criteria
        self.keep_cache = keep_cache
        self.eos_ids = eos_ids
        self.scheduler = scheduler
        self.on_step = on_step
        self.device = execution_device(model.get_input_embeddings())
        self.num_passes = 0
        do_sample = bool(config.do_sample)
        self.text_sampler = Sampler(do_sample, config.temperature, config.top_k, config.top_p)
        self.image_sampler = Sampler(do_sample, config.image_temperature, config.image_top_k, config.image_top_p)

    def __call__(self):
        for row in self.rows:
            self._start(row)
        self._share_prompts()
        while waiting := [index for index, row in enumerate(self.rows) if not row.done]:
            if self._stop_requested:
                break
            writing = [index for index in waiting if not self._size_is_complete(self.rows[index])]
            if writing:
                self._text_phase(writing)
            groups = defaultdict(list)
            for index in waiting:
                row = self.rows[index]
                if not row.done:
                    groups[row.grid].append(index)
            for grid, indices in groups.items():
                self._image_phase(grid, indices)

    def _share_prompts(self):
        """Computes what several rows begin with once for all of them, but for the last id, whose output is needed."""
        members = defaultdict(list)
        for row in self.rows:
            for number, own in enumerate(row.streams if not row.done else ()):
                if number >= len(row.cached):
                    members[tuple(row.prompts[number][:-1])].append(own)
        shared = {ids: streams for ids, streams in members.items() if len(streams) > 1 and ids}
        if sum(len(ids) * (len(streams) - 1) for ids, streams in shared.items()) < LEAST_SHARED:
            return
        common = TokenStream.empty(self.model, len(shared), self.device)
        common.append_lists(list(shared))
        common.advance()
        self.num_passes += 1
        for place, (ids, streams) in enumerate(shared.items()):
            prefix = common.rows([place])  # which no stream changes: phases stack copies
            for own in streams:
                own.stream, own.num_taken = prefix, len(ids)

    def cache(self) -> GenerationCache:
        """What was computed of prompts and answers."""
        return GenerationCache([self._prefixes(row) for row in self.rows])

    def _prefixes(self, row: GenerationRow) -> list[CachedPrefix]:
        prefixes = []
        # Codes that were computed for other rows of the batch, after this row's end.
        surplus = max(0, len(row.streams[0].ids) - len(row.prompt) - len(row.answer)) if row.streams else 0
        for number, own in enumerate(row.streams):
            self._restore(row, number)
            length = max(0, min(own.stream.num_cached, len(own.ids) - surplus))
            if not length:
                break
            cropped = TokenStream.of_cache(self.model, own.stream.cache, length, self.device)
            prefixes.append(CachedPrefix(own.ids[:length], cropped.cache))
        return prefixes

    def _restore(self, row: GenerationRow, number: int):
        """Begins a stream with what an earlier call computed of it, but for the last id, whose output is needed."""
        own = row.streams[number]
        if own.num_taken or number >= len(row.cached):
            return
        length = min(row.cached[number].num_shared(own.ids), len(own.ids) - 1)
        if length > 0:
            own.stream = TokenStream.of_cache(self.model, row.cached[number].cache, length, self.device)
            own.num_taken = length

    def _new_stream(self, prompt: list[int]) -> RowStream:
        return RowStream(list(prompt), TokenStream.empty(self.model, 1, self.device))

    def _start(self, row: GenerationRow):
        """Gives the streams their prompts, and what a row's place in the grammar forces."""
        row.streams = [self._new_stream(prompt) for prompt in row.prompts]
        row.done = row.finished
        if row.done:
            return
        if row.image is None:
            if self.config.generation_mode == "image":
                self._begin_image(row)
            return
        row.num_images += 1
        row.size_ids = list(row.image.size_ids)
        if row.image.state == "rows":
            row.size_ids.append(self.layout.img_token_id)
            row.prompt_body = row.prompt[row.image.begin + 1 + len(row.size_ids) :]
        for own in row.streams:
            # The codes after IMG follow in the image phase, which knows how many its rows have in common.
            own.ids += [self.layout.boi_token_id, *row.size_ids]
        self._write_settled_size(row)

    # --- stops ---

    @property
    def _stop_requested(self) -> bool:
        return bool(getattr(self.streamer, "stop_requested", False))

    @property
    def _is_watched(self) -> bool:
        """Whether anybody wants to see every token at once."""
        return self.streamer is not None or bool(self.stopping_criteria)

    def _check_stops(self, rows: Sequence[GenerationRow]):
        """Ends rows for which a stop is asked."""
        requested = self._stop_requested
        for row in rows:
            if not row.done and not requested and self.stopping_criteria:
                ids = torch.tensor([row.prompt + row.answer], device=self.device)
                row.done = bool(torch.as_tensor(self.stopping_criteria(ids, None)).all())
            row.done = row.done or requested

    def _put(self, row: GenerationRow, ids: Sequence[int]) -> None:
        """Ids into the answer, as far as the budget goes."""
        ids = ids[: row.left]
        row.answer += ids
        row.done = row.left <= 0
        self._stream(ids)

    def _put_forced(self, row: GenerationRow, ids: Sequence[int]) -> None:
        """Ids of an image: into the answer and into all streams."""
        for own in row.streams:
            own.ids += ids
        self._put(row, ids)

    def _stream(self, ids: Sequence[int]):
        if self.streamer is not None:
            for token_id in ids:
                self.streamer.put(torch.tensor([token_id]))

    # --- sizes ---

    def _size_is_complete(self, row: GenerationRow) -> bool:
        return bool(row.size_ids) and row.size_ids[-1] == self.layout.img_token_id

    def _begin_image(self, row: GenerationRow):
        if row.num_images and row.may_choose and not self.config.keep_image_size:
            row.grid = None
        row.num_images += 1
        row.size_ids = []
        self._put_forced(row, [self.layout.boi_token_id])
        self._write_settled_size(row)

    def _write_settled_size(self, row: GenerationRow):
        """Writes what is settled of the size: all of it for a known grid, else ids that have no alternative."""
        if row.grid is not None:
            rest = [*self.layout.size_token_ids(*row.grid), self.layout.img_token_id][len(row.size_ids) :]
            row.size_ids += rest
            self._put_forced(row, rest)
        while not row.done and not self._size_is_complete(row):
            allowed = allowed_size_tokens(row.size_ids, self.layout)
            if len(allowed) > 1:
                return
            row.size_ids += allowed
            self._put_forced(row, allowed)
        if row.grid is None and self._size_is_complete(row):
            row.grid = parse_size(row.size_ids[:-1], self.layout)

    # --- text ---

    def _text_phase(self, indices: list[int]):
        """Samples text (or sizes) until every row is done or stands before an image."""
        for index in indices:
            self._restore(self.rows[index], 0)
        stream = TokenStream.stack([self.rows[index].streams[0].stream for index in indices])
        while indices:
            rows = [self.rows[index] for index in indices]
            stream.append_lists([row.streams[0].take() for row in rows])
            logits = self.model.compute_logits(stream.advance(), vocabulary="text").float()
            self.num_passes += 1
            for row, token_id in zip(rows, self._sample_text(indices, logits), strict=True):
                self._take_text_token(row, token_id)
            self._check_stops(rows)
            staying = [place for place, row in enumerate(rows) if not row.done and not self._size_is_complete(row)]
            if len(staying) < len(rows):
                for place, row in enumerate(rows):
                    if place not in staying and (self.keep_cache or not row.done):
                        row.streams[0].stream = stream.rows([place])
                stream = stream.rows(staying) if staying else None
                indices = [indices[place] for place in staying]

    def _sample_text(self, indices: list[int], logits: torch.Tensor) -> list[int]:
        """One id a row.  Sizes are drawn with the settings of visual tokens, as in the release."""
        rows = [self.rows[index] for index in indices]
        for row, scores in zip(rows, logits, strict=True):
            self._block(row, scores)
        check_scores(is_damaged(logits))
        columns = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
        for sampler, in_size in ((self.text_sampler, False), (self.image_sampler, True)):
            places = [place for place, row in enumerate(rows) if (row.size_ids is not None) == in_size]
            if places:
                columns[places] = sampler(logits[places], self._generators([indices[place] for place in places]))
        # Text columns are ids, except that ids after the visual range have moved down by its length.
        moved = columns >= self.layout.visual_token_offset
        return torch.where(moved, columns + self.layout.num_visual_tokens, columns).tolist()

    def _block(self, row: GenerationRow, scores: torch.Tensor):
        """Sets the logits of what may not come next to -inf, in place."""
        if row.size_ids is not None:
            allowed = torch.tensor(allowed_size_tokens(row.size_ids, self.layout), device=scores.device)
            kept = scores[allowed]
            scores.fill_(float("-inf"))
            scores[allowed] = kept
            return
        if self.layout.image_placeholder_token_id is not None:
            # Stands for a code that is not known yet; in an answer it could not be continued.
            scores[self.layout.image_placeholder_token_id] = float("-inf")
        most = 0 if self.config.generation_mode == "text" else self.config.max_images
        if most is not None and row.num_images >= most and self.layout.boi_token_id is not None:
            scores[self.layout.boi_token_id] = float("-inf")

    def _take_text_token(self, row: GenerationRow, token_id: int):
        if row.size_ids is not None:
            row.size_ids.append(token_id)
            self._put_forced(row, [token_id])
            self._write_settled_size(row)
        elif token_id == self.layout.boi_token_id:
            self._begin_image(row)
        else:
            row.streams[0].ids.append(token_id)
            self._put(row, [token_id])
            row.finished = token_id in self.eos_ids
            row.done = row.done or row.finished

    # --- images ---

    def _image_phase(self, grid: tuple[int, int], indices: list[int]):
        """Makes one image of `grid` codes for each of these rows."""
        config, (height, width) = self.config, grid
        rows = [self.rows[index] for index in indices]
        given = torch.full((len(rows), height * width), -1)
        for place, row in enumerate(rows):
            given[place, : len(row.known_codes)] = torch.tensor(row.known_codes, dtype=torch.long)
        # In `dida` every code sees all others, so that none is computed before them.
        num_cached = 0 if self.scheduler is not None else int((given >= 0).all(0).long().cumprod(0).sum())
        beginnings = [self._grid_ids(codes, grid) for codes in given[:, :num_cached].tolist()]
        num_streams = len(rows[0].streams)
        members = [(row, number) for number in range(num_streams) for row in rows]
        lengths = [len(row.streams[number].ids) for row, number in members]
        for place, (row, number) in enumerate(members):
            row.streams[number].ids += beginnings[place % len(rows)]
            self._restore(row, number)
        self._catch_up(members)
        stream = TokenStream.stack([row.streams[number].stream for row, number in members])
        stream.append_lists([row.streams[number].take() for row, number in members])
        # How many codes fit into what is left of the budget: after each row of them comes an EOL.
        room = [divmod(len(row.prompt_body) + row.left, width + 1) for row in rows]
        follow = self._follower(rows, grid, beginnings, num_cached) if self._is_watched else None
        request = ImageRequest(
            token_height=height,
            token_width=width,
            given=given,
            num_cached=num_cached,
            sampler=self.image_sampler,
            guidance_scale=1.0 if config.guidance_scale is None else config.guidance_scale,
            image_guidance_scale=config.image_guidance_scale,
            generator=self._generators(indices),
            max_codes=min(height * width, max(lines * width + rest for lines, rest in room)),
            cache_implementation=config.cache_implementation,
            compile_config=self._compile_config(),
            speculative_window=config.speculative_window,
            coupling=config.coupling,
            scheduler=self.scheduler,
            num_inference_steps=config.num_inference_steps,
            guidance_scale_end=config.guidance_scale_end,
            guidance_cutoff=config.guidance_cutoff,
            verify_codes=config.verify_codes,
            on_codes=follow,
            on_step=self._step_follower(rows),
            should_stop=None if follow is None else lambda: all(row.done for row in rows),
        )
        bodies = [
            self._grid_ids(codes, grid) for codes in IMAGE_DECODERS[config.image_decoder](stream, request).tolist()
        ]
        self.num_passes += stream.num_passes
        for place, (row, number) in enumerate(members):
            own = row.streams[number]
            own.ids[lengths[place] :] = bodies[place % len(rows)]
            own.num_taken = len(own.ids)
        for place, row in enumerate(rows):
            row.statistics += request.statistics[place : place + 1]
            if follow is None:
                self._put(row, bodies[place][len(row.prompt_body) :])
            row.size_ids, row.prompt_body, row.known_codes = None, [], []
            if self.keep_cache or not row.done:
                for number, own in enumerate(row.streams):
                    own.stream = stream.rows([number * len(rows) + place])
            if not row.done:
                self._put_forced(row, [self.layout.eoi_token_id])
                row.finished = config.generation_mode == "image"
                row.done = row.done or row.finished
            if not row.done and num_streams == 3:
                # The stream without text and images never sees earlier images.
                row.streams[2] = self._new_stream(row.prompts[2])

    def _compile_config(self) -> CompileConfig | None:
        if self.config.disable_compile:
            return None
        # CUDA graphs need one place for everything; elsewhere the mode means nothing.
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        return self.config.compile_config or CompileConfig(mode=mode)

    def _catch_up(self, members: list[tuple[GenerationRow, int]]):
        """Computes long beginnings on their own where other streams of the batch are further.

        Left to the common pass, they would become as many masked columns in the caches of all the others.
        """
        behind = [(row, number) for row, number in members if not row.streams[number].stream.num_cached]
        if len(behind) in (0, len(members)):
            return
        stream = TokenStream.stack([row.streams[number].stream for row, number in behind])
        stream.append_lists([row.prompts[number] for row, number in behind])
        stream.advance()
        self.num_passes += 1
        for place, (row, number) in enumerate(behind):
            row.streams[number].stream = stream.rows([place])
            row.streams[number].num_taken = len(row.prompts[number])

    def _grid_ids(self, codes: Sequence[int], grid: tuple[int, int], first: int = 0) -> list[int]:
        """Ids of codes `first`, `first + 1`, ... of a grid, with the EOLs that follow them."""
        height, width = grid
        ids = []
        for index, code in enumerate(codes, start=first):
            ids.append(self.layout.visual_token_offset + code)
            if (index + 1) % width == 0 and index + 1 < height * width:
                ids.append(self.layout.eol_token_id)
        return ids

    def _follower(
        self, rows: list[GenerationRow], grid: tuple[int, int], beginnings: list[list[int]], num_cached: int
    ):
        """A callback that writes codes, and the EOLs between them, into the answers as they come."""

        def put(row: GenerationRow, ids: list[int], place: int):
            # What the prompt holds already is left out.  A prompt that ends right after a full row lacks the EOL.
            if not row.done:
                self._put(row, ids[max(0, len(row.prompt_body) - place) :])

        for row, ids in zip(rows, beginnings, strict=True):
            put(row, ids, 0)
        index = num_cached

        def follow(codes: torch.LongTensor):
            nonlocal index
            for row, code in zip(rows, codes.tolist(), strict=True):
                put(row, self._grid_ids([code], grid, first=index), index + index // grid[1])
            index += 1
            self._check_stops(rows)

        return follow

    def _step_follower(self, rows: list[GenerationRow]):
        """A callback after every denoising step. No token has come, but a stop may have been asked for."""

        def follow(step: int, codes: torch.LongTensor):
            if self.on_step is not None:
                self.on_step(step, codes)
            self._check_stops(rows)

        return follow

    def _generators(self, indices: list[int]) -> Generators:
        if isinstance(self.generator, Sequence):
            return [self.generator[index] for index in indices]
        return self.generator
