"""Token streams with a cache, and the image decoders that run on them.

An *image decoder* turns cached prefixes, a grid and guidance into codes; `IMAGE_DECODERS` is the seam where decoders plug in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache

from .sampling_emu35 import Generators, Sampler, guide


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
        self.cache: DynamicCache | None = None
        self.cached_mask = mask[:, :0]
        self.num_passes = 0
        # Known without asking the device at every step.
        self.has_holes = not bool(mask.all())

    @classmethod
    def empty(cls, model, rows: int, device) -> "TokenStream":
        return cls(model, *pad_left([[]] * rows, device))

    @property
    def num_cached(self) -> int:
        """Columns in the cache."""
        return self.cached_mask.shape[1]

    def append(self, ids: torch.LongTensor, mask: torch.BoolTensor | None = None):
        """Adds `(rows, n)` ids; `mask` is `False` where a row gets nothing."""
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        else:
            self.has_holes |= not bool(mask.all())
        self.pending.append((ids, mask))

    def append_lists(self, rows: Sequence[Sequence[int]]):
        """Adds different numbers of ids to the rows."""
        self.append(*pad_left(rows, self.cached_mask.device))

    def advance(self) -> torch.Tensor:
        """Computes everything pending in one pass.

        Returns:
            `torch.Tensor` of shape `(rows, hidden_size)`: final hidden state at the last column. Meaningless for rows whose
            last column is masked.
        """
        ids = torch.cat([ids for ids, _ in self.pending], dim=1)
        new_mask = torch.cat([mask for _, mask in self.pending], dim=1)
        mask = torch.cat([self.cached_mask, new_mask], dim=1)
        # Masked columns share the position of the next real token; nothing attends to them.
        positions = (mask.cumsum(-1) - mask.long())[:, self.cached_mask.shape[1] :]
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.model.config)
        hidden_states = self.model.model(
            input_ids=ids,
            # Without holes the plain causal mask is both right and faster.
            attention_mask=mask.long() if self.has_holes else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.pending, self.cached_mask = [], mask
        self.num_passes += 1
        return hidden_states

    @classmethod
    def stack(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """One stream with the rows of all; caches and pending tokens are padded on the left to a common length."""
        pending = [_join(stream.pending, stream.cached_mask) for stream in streams]
        length = max(ids.shape[1] for ids, _ in pending)
        ids = torch.cat([_pad_columns(ids, length) for ids, _ in pending])
        mask = torch.cat([_pad_columns(mask, length) for _, mask in pending])
        stacked = cls(streams[0].model, ids, mask)
        cached = max(stream.cached_mask.shape[1] for stream in streams)
        stacked.cached_mask = torch.cat([_pad_columns(stream.cached_mask, cached) for stream in streams])
        stacked.has_holes |= not bool(stacked.cached_mask.all())
        if cached:
            stacked.cache = _stack_caches(stacked.model.model.config, streams, cached)
        return stacked

    def rows(self, indices: Sequence[int]) -> "TokenStream":
        """A stream of these rows alone, without the columns that none of them uses."""
        index = torch.tensor(indices, device=self.cached_mask.device)
        ids, mask = _join(self.pending, self.cached_mask)
        ids, mask = ids[index], mask[index]
        used = mask.any(0)
        picked = TokenStream(self.model, ids[:, used], mask[:, used])
        cached_mask = self.cached_mask[index]
        used = cached_mask.any(0)
        picked.cached_mask = cached_mask[:, used]
        picked.has_holes |= not bool(picked.cached_mask.all())
        if self.cache is not None:
            picked.cache = DynamicCache(config=self.model.model.config)
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


def _join(pending, cached_mask) -> tuple[torch.LongTensor, torch.BoolTensor]:
    if not pending:
        return cached_mask.new_zeros(len(cached_mask), 0, dtype=torch.long), cached_mask[:, :0]
    return torch.cat([ids for ids, _ in pending], dim=1), torch.cat([mask for _, mask in pending], dim=1)


def _pad_columns(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(len(tensor), length - tensor.shape[1]), tensor], dim=1)


def _stack_caches(config, streams: Sequence[TokenStream], length: int) -> DynamicCache:
    stacked = DynamicCache(config=config)
    filled = next(stream.cache for stream in streams if stream.cache is not None)
    for number, example in enumerate(filled.layers):
        parts = []
        for stream in streams:
            rows, cached = stream.cached_mask.shape
            empty = example.keys.new_zeros(rows, example.keys.shape[1], length - cached, example.keys.shape[3])
            own = (empty[:, :, :0],) * 2
            if stream.cache is not None:
                own = (stream.cache.layers[number].keys, stream.cache.layers[number].values)
            parts.append([torch.cat([empty, tensor], dim=2) for tensor in own])
        stacked.update(torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts]), number)
    return stacked


@dataclass
class ImageRequest:
    """One grid to fill for each row of a batch.

    Args:
        token_height, token_width (`int`): the grid.
        given (`list[list[int]]`): codes each row already has (row after row). The first `num_cached` of them are in the stream.
        num_cached (`int`): how many codes every row's stream already holds.
        sampler (`Sampler`), guidance_scale, image_guidance_scale: how a visual token is chosen.
        generator: one for the batch or one a row.
        max_codes (`int`, *optional*): stop after that many codes of the grid.
        on_codes (`Callable`, *optional*): called with `(batch,)` codes as they come.
    """

    token_height: int
    token_width: int
    given: list[list[int]]
    num_cached: int
    sampler: Sampler
    guidance_scale: float = 1.0
    image_guidance_scale: float | None = None
    generator: Generators = None
    max_codes: int | None = None
    on_codes: Callable[[torch.LongTensor], None] | None = field(default=None, repr=False)


@torch.no_grad()
def decode_autoregressive(stream: TokenStream, request: ImageRequest) -> torch.LongTensor:
    """The `ar` decoder: one pass a code; an EOL rides along with the code before it, so it costs no pass of its own.

    Args:
        stream (`TokenStream`):
            rows of the conditional stream, then those of the unconditional ones. Holds (or has pending) everything up to
            IMG and the first `num_cached` codes. Afterwards the last code is pending, without what closes the image.
    Returns:
        `torch.LongTensor` of shape `(batch, codes)`: all codes of the grid, given ones included.
    """
    model, layout = stream.model, stream.model.config.token_layout
    batch = len(request.given)
    num_streams = len(stream.cached_mask) // batch
    total = request.token_height * request.token_width
    stop = total if request.max_codes is None else min(total, request.max_codes)
    device = stream.cached_mask.device
    first = request.num_cached
    given, is_given = _pad_right([codes[first:] for codes in request.given], device)
    columns = [torch.tensor([codes[:first] for codes in request.given], dtype=torch.long, device=device)]
    end_of_line = torch.full((batch * num_streams, 1), layout.eol_token_id, dtype=torch.long, device=device)
    for index in range(first, stop):
        logits = model.compute_logits(stream.advance(), vocabulary="visual").chunk(num_streams)
        codes = request.sampler(guide(logits, request.guidance_scale, request.image_guidance_scale), request.generator)
        codes = codes.to(device)
        if index - first < given.shape[1]:
            codes = torch.where(is_given[:, index - first], given[:, index - first], codes)
        columns.append(codes[:, None])
        stream.append((codes + layout.visual_token_offset).repeat(num_streams)[:, None])
        if (index + 1) % request.token_width == 0 and index + 1 < total:
            stream.append(end_of_line)
        if request.on_codes is not None:
            request.on_codes(codes)
    return torch.cat(columns, dim=1)


def _pad_right(rows: Sequence[Sequence[int]], device) -> tuple[torch.LongTensor, torch.BoolTensor]:
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids.view(len(rows), length), torch.arange(length, device=device) < lengths[:, None]


#: Name -> decoder.
IMAGE_DECODERS: dict[str, Callable[[TokenStream, ImageRequest], torch.LongTensor]] = {"ar": decode_autoregressive}
