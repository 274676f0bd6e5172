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
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation.streamers import BaseStreamer

from .configuration_emu35 import Emu35TokenLayout
from .decoding_emu35 import IMAGE_DECODERS, ImageRequest, TokenStream, execution_device
from .generation_configuration_emu35 import Emu35GenerationConfig
from .image_tokens_emu35 import ImageTokens, parse_size
from .sampling_emu35 import Generators, Sampler, check_scores, is_damaged


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
        streams (`list[TokenStream]`), queues (`list[list[int]]`): what is cached, and the ids that come next.
        answer (`list[int]`): ids made so far, forced ones included.
        size_ids (`list[int]` or `None`): what stands between BOI and now, while the size is written; else `None`.
        given_ids (`list[int]`): what the prompt holds of its unfinished image, after IMG.
        given_codes (`list[int]`): the codes among them.
        num_images (`int`): images begun in the answer.
        done (`bool`).
    """

    prompt: list[int]
    budget: int
    prompts: list[list[int]]
    grid: tuple[int, int] | None
    may_choose: bool
    image: ImageTokens | None
    streams: list[TokenStream] = field(default_factory=list)
    queues: list[list[int]] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    size_ids: list[int] | None = None
    given_ids: list[int] = field(default_factory=list)
    given_codes: list[int] = field(default_factory=list)
    num_images: int = 0
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
        streamer (`BaseStreamer`, *optional*): gets the ids of the answer; for a single row only.
    """

    def __init__(
        self,
        model,
        config: Emu35GenerationConfig,
        rows: list[GenerationRow],
        generator: Generators = None,
        streamer: BaseStreamer | None = None,
    ):
        self.model = model
        self.layout: Emu35TokenLayout = model.config.token_layout
        self.config = config
        self.rows = rows
        self.generator = generator
        self.streamer = streamer
        self.device = execution_device(model.get_input_embeddings())
        self.num_passes = 0
        do_sample = bool(config.do_sample)
        self.text_sampler = Sampler(do_sample, config.temperature, config.top_k, config.top_p)
        self.image_sampler = Sampler(do_sample, config.image_temperature, config.image_top_k, config.image_top_p)
        eos = config.eos_token_id if config.eos_token_id is not None else self.layout.eos_token_id
        self.eos_ids = set(eos) if isinstance(eos, (list, tuple)) else {eos}

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
                    groups[row.grid].append(index)
            for grid, indices in groups.items():
                self._image_phase(grid, indices)

    def _start(self, row: GenerationRow):
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
            row.given_codes = list(row.image.codes)
            row.given_ids = row.prompt[row.image.begin + 1 + len(row.size_ids) :]
        for queue in row.queues:
            # The codes after IMG follow in the image phase, which knows how many its rows have in common.
            queue += [self.layout.boi_token_id, *row.size_ids]
        self._write_settled_size(row)

    def _put(self, row: GenerationRow, ids: Sequence[int]) -> None:
        """Ids into the answer, as far as the budget goes."""
        ids = ids[: row.left]
        row.answer += ids
        row.done = row.left <= 0
        self._stream(ids)

    def _put_forced(self, row: GenerationRow, ids: Sequence[int]) -> None:
        """Ids of an image: into the answer and into all streams."""
        for queue in row.queues:
            queue += ids
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
        stream = TokenStream.stack([self.rows[index].streams[0] for index in indices])
        while indices:
            rows = [self.rows[index] for index in indices]
            stream.append_lists([row.queues[0] for row in rows])
            logits = self.model.compute_logits(stream.advance(), vocabulary="text").float()
            self.num_passes += 1
            for row, token_id in zip(rows, self._sample_text(indices, logits), strict=True):
                row.queues[0] = []
                self._take_text_token(row, token_id)
            staying = [place for place, row in enumerate(rows) if not row.done and not self._size_is_complete(row)]
            if len(staying) < len(rows):
                for place, row in enumerate(rows):
                    if not row.done and place not in staying:
                        row.streams[0] = stream.rows([place])
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
            row.queues[0].append(token_id)
            self._put(row, [token_id])
            row.done = row.done or token_id in self.eos_ids

    # --- images ---

    def _image_phase(self, grid: tuple[int, int], indices: list[int]):
        """Makes one image of `grid` codes for each of these rows."""
        config, (height, width) = self.config, grid
        rows = [self.rows[index] for index in indices]
        num_cached = min(len(row.given_codes) for row in rows)
        for row in rows:
            for queue in row.queues:
                queue += self._grid_ids(row.given_codes[:num_cached], grid)
        num_streams = len(rows[0].streams)
        members = [(row, number) for number in range(num_streams) for row in rows]
        self._catch_up(members)
        stream = TokenStream.stack([row.streams[number] for row, number in members])
        stream.append_lists([row.queues[number] for row, number in members])
        # How many codes fit into what is left of the budget: after each row of them comes an EOL.
        room = [divmod(len(row.given_ids) + row.left, width + 1) for row in rows]
        budgets = [min(height * width, lines * width + rest) for lines, rest in room]
        request = ImageRequest(
            token_height=height,
            token_width=width,
            given=[row.given_codes for row in rows],
            num_cached=num_cached,
            sampler=self.image_sampler,
            guidance_scale=1.0 if config.guidance_scale is None else config.guidance_scale,
            image_guidance_scale=config.image_guidance_scale,
            generator=self._generators(indices),
            max_codes=max(budgets),
            on_codes=None if self.streamer is None else self._code_streamer(rows[0], grid),
        )
        codes = IMAGE_DECODERS[config.image_decoder](stream, request).tolist()
        self.num_passes += stream.num_passes
        for place, row in enumerate(rows):
            own = codes[place][: budgets[place]]
            ids = self._grid_ids(own, grid)[len(row.given_ids) :]
            row.answer += ids[: row.left]  # the streamer has them already
            row.size_ids, row.given_ids, row.given_codes = None, [], []
            row.done = row.left <= 0 or len(own) < height * width
            if row.done:
                continue
            self._put(row, [self.layout.eoi_token_id])
            if config.generation_mode == "image":
                row.done = True
            if not row.done:
                row.streams = [stream.rows([number * len(rows) + place]) for number in range(num_streams)]
                row.queues = [[self.layout.eoi_token_id] for _ in row.queues]
                if num_streams == 3:
                    # The stream without text and images never sees earlier images.
                    row.streams[2] = TokenStream.empty(self.model, 1, self.device)
                    row.queues[2] = list(row.prompts[2])

    def _catch_up(self, members: list[tuple[GenerationRow, int]]):
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

    def _code_streamer(self, row: GenerationRow, grid: tuple[int, int]):
        """A callback that passes new codes, and the EOLs between them, on to the streamer."""
        # A prompt that ends right after a full row lacks the EOL.
        pending = self._grid_ids(row.given_codes, grid)[len(row.given_ids) :][: row.left]
        self._stream(pending)
        index, left = len(row.given_codes), row.left - len(pending)

        def pass_on(codes: torch.LongTensor):
            nonlocal index, left
            ids = self._grid_ids([int(codes[0])], grid, first=index)[:left]
            self._stream(ids)
            index, left = index + 1, left - len(ids)

        return pass_on

    def _generators(self, indices: list[int]) -> Generators:
        if isinstance(self.generator, Sequence):
            return [self.generator[index] for index in indices]
        return self.generator
