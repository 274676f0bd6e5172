"""Decoding passes over a static cache, compiled: on a GPU, whole passes as CUDA graphs."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import CompileConfig
from transformers.cache_utils import StaticCache

from .cache_emu35 import GrowingCache

#: Capacities are multiples of this, so that images of about the same size share compiled code.
CAPACITY_STEP = 128


class StaticDecoder:
    """A decoder's passes over a few columns, of which nothing changes shape or place in memory.

    One is kept with each model (`model.static_decoder`), since compiled code belongs to its tensors; as long as it is,
    they stay allocated. Set it to `None` to free them.

    Args:
        model ([`Emu35ForConditionalGeneration`]).
        rows (`int`), capacity (`int`): rows and columns of the cache.
        compile_config ([`~transformers.CompileConfig`], *optional*): `None`: the passes run as they are.
    """

    def __init__(self, model, rows: int, capacity: int, compile_config: CompileConfig | None):
        self.model, self.rows, self.capacity, self.compile_config = model, rows, capacity, compile_config
        self.cache = StaticCache(config=model.model.config, max_cache_len=capacity)
        self.widths: tuple[int, ...] = ()
        self.filled = 0
        decoder = model.model
        self._decode = decoder if compile_config is None else torch.compile(decoder, **compile_config.to_dict())

    @classmethod
    def for_cache(
        cls, model, cache: GrowingCache, room: int, widths: Sequence[int], compile_config: CompileConfig | None
    ) -> "StaticDecoder":
        """The model's own, with what a cache holds and `room` for more columns; a new one where that does not fit.

        Args:
            widths (`Sequence[int]`): how wide passes are; each is filled up to the next of these.
        Raises:
            ValueError: if the model's attention can't work on masked columns.
        """
        implementation = model.model.config._attn_implementation
        if implementation != "sdpa":
            raise ValueError(
                f'`cache_implementation`="static" needs the attention implementation "sdpa", this model has '
                f'{implementation!r}. Call `model.set_attn_implementation("sdpa")`, or use "dynamic".'
            )
        rows, filled = len(cache.layers[0].keys), cache.get_seq_length()
        needed, own = filled + room + max(widths), getattr(model, "static_decoder", None)
        if own is None or (own.rows, own.compile_config) != (rows, compile_config) or own.capacity < needed:
            capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
            own = model.static_decoder = cls(model, rows, capacity, compile_config)
        own.widths = tuple(sorted(widths))
        for layer, source in zip(own.cache.layers, cache.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[:, :, :filled] = source.keys
            layer.values[:, :, :filled] = source.values
        own._set_filled(filled)
        return own

    def _set_filled(self, columns: int):
        self.filled = columns
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(columns)

    def fits(self, columns: int) -> bool:
        """Whether a pass may be so wide now."""
        return columns <= self.widths[-1] and self.filled + self.widths[-1] <= self.capacity

    def __call__(self, ids: torch.LongTensor, mask: torch.BoolTensor, position_ids: torch.LongTensor) -> torch.Tensor:
        """One pass.

        Args:
            ids, position_ids (`torch.LongTensor` of shape `(rows, columns)`).
            mask (`torch.BoolTensor` of shape `(rows, filled + columns)`): `False` for columns that no token sees.
        Returns:
            `torch.Tensor` of shape `(rows, columns, hidden_size)`.
        """
        columns = ids.shape[1]
        width = next(width for width in self.widths if width >= columns)
        places = torch.arange(self.capacity, device=mask.device)
        causal = places <= self.filled + torch.arange(width, device=mask.device)[:, None]
        hidden_states = self._decode(
            input_ids=F.pad(ids, (0, width - columns)),
            attention_mask=(F.pad(mask, (0, self.capacity - mask.shape[1]))[:, None] & causal)[:, None],
            position_ids=F.pad(position_ids, (0, width - columns)),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, :columns]
        if width > columns:
            self._set_filled(self.filled + columns)
        else:
            self.filled += columns
        # The next replay of a CUDA graph writes over its output.
        return hidden_states.clone() if hidden_states.is_cuda else hidden_states

    def crop(self, tokens_to_remove: int):
        """Drops the last `-tokens_to_remove` columns."""
        self._set_filled(self.filled + tokens_to_remove)

    def to_growing_cache(self) -> GrowingCache:
        """What was filled, as a cache of its own."""
        cache = GrowingCache(self.model.model.config)
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[:, :, : self.filled], layer.values[:, :, : self.filled], number)
        return cache
