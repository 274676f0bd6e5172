"""Token streams with a cache, and the image decoders that run on them.

An *image decoder* turns cached prefixes, a grid and guidance into codes; `IMAGE_DECODERS` is the seam where decoders
plug in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig

from .cache_emu35 import GrowingCache
from .sampling_emu35 import Generators, Sampler, check_scores, guide, is_damaged
from .static_decoding_emu35 import StaticDecoder


class TokenStream:
    """Rows of token ids, part of them already in a key-value cache.

    Tokens are appended first and computed by the next [`advance`], all together. Rows may have different lengths: the
    shorter ones have masked columns, which no token sees and which take no position.

    Args:
        model: gives `model.model` (the decoder).
        ids (`torch.LongTensor` of shape `(rows, length)`), mask (`torch.BoolTensor`, same shape): first tokens.
    """

    def __init__(self, model, ids: torch.LongTensor, mask: torch.BoolTensor):
        self.model = model
        self.pending = [(ids, mask)]
        self.cache: GrowingCache | None = None
        self.static: StaticDecoder | None = None
        self.num_passes = 0
        # What depends on the masks is kept up to date, so that no step has to ask the device for it.
        self.has_holes = not bool(mask.all())
        self._set_cached_mask(mask[:, :0])

    @classmethod
    def empty(cls, model, rows: int, device) -> "TokenStream":
        return cls(model, *pad_left([[]] * rows, device))

    @classmethod
    def of_cache(cls, model, cache: GrowingCache, length: int, device) -> "TokenStream":
        """One row that holds the first `length` columns of a cache without holes, which stays as it is."""
        stream = cls.empty(model, 1, device)
        stream._set_cached_mask(torch.ones(1, length, dtype=torch.bool, device=device))
        stream.cache = GrowingCache(model.model.config)
        for number, (layer, module) in enumerate(zip(cache.layers, model.model.layers, strict=True)):
            where = execution_device(module)
            stream.cache.update(layer.keys[:, :, :length].to(where), layer.values[:, :, :length].to(where), number)
        return stream

    @property
    def num_cached(self) -> int:
        """Columns in the cache."""
        return self.cached_mask.shape[1]

    @property
    def num_rows(self) -> int:
        return len(self.cached_mask)

    @property
    def num_pending(self) -> int:
        """Columns that the next pass computes."""
        return sum(ids.shape[1] for ids, _ in self.pending)

    @property
    def device(self) -> torch.device:
        return self.cached_mask.device

    def append(self, ids: torch.LongTensor, mask: torch.BoolTensor | None = None):
        """Adds `(rows, n)` ids; `mask` is `False` where a row gets nothing."""
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        else:
            self.has_holes |= not bool(mask.all())
        self.pending.append((ids, mask))

    def append_lists(self, rows: Sequence[Sequence[int]]):
        """Adds different numbers of ids to the rows."""
        self.append(*pad_left(rows, self.device))

    def advance(self) -> torch.Tensor:
        """Computes everything pending in one pass.

        Returns:
            `torch.Tensor` of shape `(rows, hidden_size)`: final hidden state at the last column. Meaningless for rows
            whose last column is masked.
        """
        return self.compute()[:, -1]

    def compute(self) -> torch.Tensor:
        """The same, but returns all of the new columns `(rows, columns, hidden_size)`, masked ones included."""
        ids, new_mask = self._pending()
        mask = torch.cat([self.cached_mask, new_mask], dim=1)
        counts = self.lengths[:, None] + new_mask.cumsum(-1)
        # Masked columns share the position of the next real token; nothing attends to them.
        position_ids = counts - new_mask.long()
        if self.static is not None and not self.static.fits(ids.shape[1]):
            self.leave_static()
        if self.static is not None:
            hidden_states = self.static(ids, mask, position_ids)
        else:
            if self.cache is None:
                self.cache = GrowingCache(self.model.model.config)
            hidden_states = self.model.model(
                input_ids=ids,
                attention_mask=self._attention_mask(mask, columns=ids.shape[1]),
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        self.pending, self.cached_mask, self.lengths = [], mask, counts[:, -1]
        self.num_passes += 1
        return hidden_states

    def enter_static(self, room: int, widths: Sequence[int], compile_config: CompileConfig | None):
        """Moves what is cached to the model's static cache, where `room` more columns find place.

        From now on passes are compiled, as long as they are no wider than the largest of `widths`.
        """
        self.static = StaticDecoder.for_cache(self.model, self.cache, room, widths, compile_config)
        self.cache = None

    def leave_static(self):
        """Takes the cache back."""
        if self.static is not None:
            self.cache, self.static = self.static.to_growing_cache(), None

    def _attention_mask(self, mask: torch.BoolTensor, columns: int) -> torch.Tensor | None:
        if not self.has_holes:
            return None  # the plain causal mask, which is faster
        if columns == 1 and self.model.model.config._attn_implementation == "sdpa":
            # What transformers would make of the line below at every step, asking the device whether it is needed.
            return mask[:, None, None]
        return mask.long()

    def _pending(self) -> tuple[torch.LongTensor, torch.BoolTensor]:
        if not self.pending:
            return self.cached_mask.new_zeros(self.num_rows, 0, dtype=torch.long), self.cached_mask[:, :0]
        if len(self.pending) == 1:
            return self.pending[0]
        return torch.cat([ids for ids, _ in self.pending], dim=1), torch.cat([mask for _, mask in self.pending], dim=1)

    def _set_cached_mask(self, mask: torch.BoolTensor):
        self.cached_mask = mask
        self.lengths = mask.sum(-1)
        self.has_holes |= not bool(mask.all())

    def truncate(self, lengths: torch.LongTensor):
        """Keeps the first `lengths` `(rows,)` cached tokens of each row.

        The others' columns are masked. Those at the end that no row keeps are dropped, and when too many masked ones
        have come together, the tokens of every row move to the right end.
        """
        mask = self.cached_mask & (self.cached_mask.cumsum(-1) <= lengths[:, None])
        columns = torch.arange(1, self.num_cached + 1, device=self.device)
        last, longest = torch.stack([(mask * columns).amax(), mask.sum(-1).amax()]).tolist()
        if last < self.num_cached:
            (self.cache if self.static is None else self.static).crop(last - self.num_cached)
            mask = mask[:, :last]
        if last - longest > max(32, longest // 4):
            self.leave_static()
            order = mask.long().argsort(dim=-1, stable=True)[:, last - longest :]
            for layer in self.cache.layers:
                at = order.to(layer.keys.device)[:, None, :, None].expand(-1, *layer.keys.shape[1:2], -1, 1)
                layer.keys = layer.keys.gather(2, at.expand(-1, -1, -1, layer.keys.shape[-1]))
                layer.values = layer.values.gather(2, at.expand(-1, -1, -1, layer.values.shape[-1]))
            mask = mask.gather(1, order)
        self._set_cached_mask(mask)

    @classmethod
    def stack(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """One stream with the rows of all; caches and pending tokens are padded on the left to a common length."""
        pending = [stream._pending() for stream in streams]
        length = max(ids.shape[1] for ids, _ in pending)
        ids = torch.cat([_pad_columns(ids, length) for ids, _ in pending])
        mask = torch.cat([_pad_columns(mask, length) for _, mask in pending])
        stacked = cls(streams[0].model, ids, mask)
        cached = max(stream.num_cached for stream in streams)
        stacked._set_cached_mask(torch.cat([_pad_columns(stream.cached_mask, cached) for stream in streams]))
        if cached:
            stacked.cache = _stack_caches(stacked.model.model.config, streams, cached)
        return stacked

    def rows(self, indices: Sequence[int]) -> "TokenStream":
        """A stream of these rows alone, without the columns that none of them uses."""
        index = torch.tensor(indices, device=self.device)
        ids, mask = (tensor[index] for tensor in self._pending())
        used = mask.any(0)
        picked = TokenStream(self.model, ids[:, used], mask[:, used])
        cached_mask = self.cached_mask[index]
        used = cached_mask.any(0)
        picked._set_cached_mask(cached_mask[:, used])
        if self.cache is not None:
            picked.cache = GrowingCache(self.model.model.config)
            for number, layer in enumerate(self.cache.layers):
                at = index.to(layer.keys.device)
                keep = used.to(layer.keys.device)
                picked.cache.update(layer.keys[at][:, :, keep], layer.values[at][:, :, keep], number)
        return picked


def pad_left(rows: Sequence[Sequence[int]], device) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Ids `(rows, longest)` and where they are real."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids.view(len(rows), length), torch.arange(length, device=device) >= length - lengths[:, None]


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes.  Offloaded weights are on the meta device between two calls."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return torch.device("cpu")


def _pad_columns(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(len(tensor), length - tensor.shape[1]), tensor], dim=1)


def _stack_caches(config, streams: Sequence[TokenStream], length: int) -> GrowingCache:
    stacked = GrowingCache(config)
    filled = next(stream.cache for stream in streams if stream.cache is not None)
    for number, example in enumerate(filled.layers):
        parts = []
        for stream in streams:
            empty = example.keys.new_zeros(
                stream.num_rows, example.keys.shape[1], length - stream.num_cached, example.keys.shape[3]
            )
            own = (empty[:, :, :0],) * 2
            if stream.cache is not None:
                own = (stream.cache.layers[number].keys, stream.cache.layers[number].values)
            parts.append([torch.cat([empty, tensor], dim=2) for tensor in own])
        stacked.update(torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts]), number)
    return stacked


@dataclass
class CachedPrefix:
    """Token ids, and a cache of one row with their keys and values (one column an id)."""

    ids: list[int]
    cache: GrowingCache = field(repr=False)

    def num_shared(self, ids: Sequence[int]) -> int:
        """How many ids at the beginning are the same."""
        both = zip(self.ids, ids, strict=False)
        return next((index for index, (own, other) in enumerate(both) if own != other), min(len(self.ids), len(ids)))


@dataclass
class GenerationCache:
    """What `generate` computed, for another call that goes on from there.

    A transformers cache holds one sequence a row; here every row has one a guidance stream, of different lengths.

    Attributes:
        rows (`list[list[CachedPrefix]]`): `rows[row][stream]`, the conditional stream first.
    """

    rows: list[list[CachedPrefix]]

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, model, prompts: Sequence[Sequence[int]]):
        """Raises a ValueError unless this cache is of this model, and row for row of the beginning of these prompts.

        A prompt may also end before its cache does; the rest is then dropped.
        """
        if len(self) != len(prompts):
            raise ValueError(f"`past_key_values` has {len(self)} rows for {len(prompts)} prompts.")
        config = model.config.text_config
        expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        for row, (streams, prompt) in enumerate(zip(self.rows, prompts, strict=True)):
            for layers in (prefix.cache.layers for prefix in streams):
                found = (len(layers), layers[0].keys.shape[1], layers[0].keys.shape[3])
                if found != expected:
                    raise ValueError(
                        "`past_key_values` is of another model: (layers, key-value heads, head size) are "
                        f"{found}, here {expected}."
                    )
            ids = streams[0].ids if streams else []
            place = streams[0].num_shared(prompt) if streams else 0
            if place < min(len(ids), len(prompt)):
                raise ValueError(
                    f"`past_key_values` does not belong to `input_ids`: row {row} differs at position {place} "
                    f"(padding not counted), where the cache has the id {ids[place]} and the prompt {prompt[place]}. "
                    "Pass the ids it was returned with, or leave the cache out."
                )


@dataclass
class ImageStatistics:
    """What one image took.

    Attributes:
        num_passes (`int`): passes through the decoder until its last code was settled.
        num_drafted (`int`): codes that were guessed before such a pass, all passes together.
        accepted_at (`tuple[int, ...]`): how often the first, the second, ... guess of a pass was accepted.
    """

    num_passes: int
    num_drafted: int = 0
    accepted_at: tuple[int, ...] = ()

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> float | None:
        """Share of the guesses that was accepted; `None` without any."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None


@dataclass
class ImageRequest:
    """One grid to fill for each row of a batch.

    Args:
        token_height, token_width (`int`): the grid.
        given (`torch.LongTensor` of shape `(batch, token_height * token_width)`):
            codes that are settled, row after row; -1 where one is to be made. On the CPU.
        num_cached (`int`): how many of the first ones, all of them settled, every row's stream already holds.
        sampler (`Sampler`), guidance_scale, image_guidance_scale: how a visual token is chosen.
        generator: one for the batch or one a row.
        max_codes (`int`, *optional*): stop after that many codes of the grid.
        speculative_window, coupling: see [`decode_speculative`].
        scheduler, num_inference_steps, guidance_scale_end, guidance_cutoff, verify_codes: see [`decode_dida`].
        on_codes (`Callable`, *optional*):
            called with the `(batch,)` codes of one position, in order, from position `num_cached` on, as they come.
        should_stop (`Callable`, *optional*):
            asked after every pass and after every call of `on_codes`; `True`: return with the codes there are.
        on_step (`Callable`, *optional*):
            called after every denoising step with its number and the codes `(batch, token_height, token_width)`; again
            with the last number for steps that `verify_codes` adds.

    Attributes:
        statistics (`list[ImageStatistics]`): one for each row, which the decoder fills in.
    """

    token_height: int
    token_width: int
    given: torch.LongTensor
    num_cached: int
    sampler: Sampler
    guidance_scale: float = 1.0
    image_guidance_scale: float | None = None
    generator: Generators = None
    max_codes: int | None = None
    cache_implementation: str | None = None
    compile_config: CompileConfig | None = None
    speculative_window: int | None = None
    coupling: str = "gumbel"
    scheduler: Any = None
    num_inference_steps: int = 16
    guidance_scale_end: float | None = None
    guidance_cutoff: float | None = None
    verify_codes: bool = False
    on_codes: Callable[[torch.LongTensor], None] | None = field(default=None, repr=False)
    should_stop: Callable[[], bool] | None = field(default=None, repr=False)
    on_step: Callable[[int, torch.LongTensor], None] | None = field(default=None, repr=False)
    statistics: list[ImageStatistics] = field(default_factory=list, init=False)

    def generators_at(self, index: int) -> Generators:
        """Generators for the draw of code `index`: none for rows that have this code, in whatever batch."""
        if not isinstance(self.generator, Sequence):
            return self.generator
        settled = (self.given[:, index] >= 0).tolist()
        return [None if skip else one for skip, one in zip(settled, self.generator, strict=True)]


@torch.no_grad()
def decode_autoregressive(stream: TokenStream, request: ImageRequest) -> torch.LongTensor:
    """The `ar` decoder: one pass a code; an EOL rides along with the code before it, so it costs no pass of its own.

    Neither does a code that is given in all rows. Given codes are put in their places as these come: what stands
    before them was made without knowing them.

    Args:
        stream (`TokenStream`):
            rows of the conditional stream, then those of the unconditional ones. Holds (or has pending) everything up
            to IMG and the first `num_cached` codes. Afterwards the last code is pending, but no EOI.
    Returns:
        `torch.LongTensor` of shape `(batch, codes)`: all codes of the grid, given ones included.
    """
    model, layout = stream.model, stream.model.config.token_layout
    batch, device = len(request.given), stream.device
    num_streams = stream.num_rows // batch
    total = request.token_height * request.token_width
    stop = total if request.max_codes is None else min(total, request.max_codes)
    given = request.given.to(device)
    settled_in_all = (request.given >= 0).all(0).tolist()
    settled_in_none = (request.given < 0).all(0).tolist()
    columns = [given[:, : request.num_cached]]
    end_of_line = torch.full((stream.num_rows, 1), layout.eol_token_id, dtype=torch.long, device=device)
    damaged = torch.zeros(batch, dtype=torch.bool, device=device)
    for index in range(request.num_cached, stop):
        codes = given[:, index]
        if not settled_in_all[index]:
            hidden_states = stream.advance()
            if request.cache_implementation == "static" and stream.static is None:
                room = total - index + request.token_height
                # A code alone, or with the EOL after it.
                stream.enter_static(room, (1, 2), request.compile_config)
            scores = guided_logits(model, hidden_states, num_streams, request).to(device)
            drawn = request.sampler(scores, request.generators_at(index))
            damaged |= is_damaged(scores)
            codes = drawn if settled_in_none[index] else torch.where(codes < 0, drawn, codes)
        columns.append(codes[:, None])
        stream.append((codes + layout.visual_token_offset).repeat(num_streams)[:, None])
        if (index + 1) % request.token_width == 0 and index + 1 < total:
            stream.append(end_of_line)
        if request.on_codes is not None:
            request.on_codes(codes)
        if request.should_stop is not None and request.should_stop():
            break
    stream.leave_static()
    request.statistics = [ImageStatistics(stream.num_passes)] * batch
    check_scores(damaged)  # once: asking at every step would keep the device waiting
    return torch.cat(columns, dim=1)


def guided_logits(model, hidden_states: torch.Tensor, num_streams: int, request: ImageRequest) -> torch.Tensor:
    """Guided logits over the visual codes, float32 `(batch, ..., n)`.

    The output matrix is linear, so guidance comes before it: one product for all streams, and one rounding.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_streams * batch, ..., hidden_size)`): the conditional rows first.
    """
    guided = guide(hidden_states.chunk(num_streams), request.guidance_scale, request.image_guidance_scale)
    return model.compute_logits(guided.to(hidden_states.dtype), vocabulary="visual").float()


#: Name -> decoder.
IMAGE_DECODERS: dict[str, Callable[[TokenStream, ImageRequest], torch.LongTensor]] = {"ar": decode_autoregressive}
