"""Decoding steps over a static cache, compiled: on a GPU, whole steps as CUDA graphs."""

import torch
from transformers import CompileConfig
from transformers.cache_utils import StaticCache

from .cache_emu35 import GrowingCache

#: Capacities are multiples of this, so that images of about the same size share compiled code.
CAPACITY_STEP = 128
#: Columns of the longest step: a code, with the EOL that follows a row.
MAX_COLUMNS = 2


class StaticDecoder:
    """A decoder's passes of one or two columns, of which nothing changes shape or place in memory.

    One is kept with each model (`model.static_decoder`), since compiled code belongs to its tensors; as long as it is,
    they stay allocated. Set it to `None` to free them.

    Args:
        model ([`Emu35ForConditionalGeneration`]).
        rows (`int`), capacity (`int`): rows and columns of the cache.
        compile_config ([`~transformers.CompileConfig`], *optional*): `None`: the steps run as they are.
    """

    def __init__(self, model, rows: int, capacity: int, compile_config: CompileConfig | None):
        self.model, self.rows, self.capacity, self.compile_config = model, rows, capacity, compile_config
        self.cache = StaticCache(config=model.model.config, max_cache_len=capacity)
        self.mask: torch.BoolTensor | None = None
        self.filled = 0
        decoder = model.model
        self._decode = decoder if compile_config is None else torch.compile(decoder, **compile_config.to_dict())

    @classmethod
    def for_cache(
        cls, model, cache: GrowingCache, mask: torch.BoolTensor, room: int, compile_config: CompileConfig | None
    ) -> "StaticDecoder":
        """The model's own, with what a cache holds and `room` for more columns; a new one where that does not fit.

        Args:
            mask (`torch.BoolTensor` of shape `(rows, columns)`): of the columns of `cache`.
        Raises:
            ValueError: if the model's attention can't work on masked columns.
        """
        implementation = model.model.config._attn_implementation
        if implementation != "sdpa":
            raise ValueError(
                f'`cache_implementation`="static" needs the attention implementation "sdpa", this model has '
                f'{implementation!r}. Call `model.set_attn_implementation("sdpa")`, or use "dynamic".'
            )
        needed, own = mask.shape[1] + room, getattr(model, "static_decoder", None)
        if own is None or (own.rows, own.compile_config) != (len(mask), compile_config) or own.capacity < needed:
            capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
            own = model.static_decoder = cls(model, len(mask), capacity, compile_config)
        own._fill(cache, mask)
        return own

    def _fill(self, cache: GrowingCache, mask: torch.BoolTensor):
        self.filled = mask.shape[1]
        for own, layer in zip(self.cache.layers, cache.layers, strict=True):
            if not own.is_initialized:
                own.lazy_initialization(layer.keys, layer.values)
            own.keys[:, :, : self.filled] = layer.keys
            own.values[:, :, : self.filled] = layer.values
            own.cumulative_length.fill_(self.filled)
        if self.mask is None:
            self.mask = mask.new_zeros(self.rows, 1, MAX_COLUMNS, self.capacity)
        self.mask.zero_()
        self.mask[..., : self.filled] = mask[:, None, None]

    def __call__(self, ids: torch.LongTensor, position_ids: torch.LongTensor) -> torch.Tensor:
        """One pass: hidden states `(rows, columns, hidden_size)` of ids `(rows, columns)`, which no row lacks."""
        columns = ids.shape[1]
        for column in range(columns):
            self.mask[:, :, column:columns, self.filled + column] = True
        hidden_states = self._decode(
            input_ids=ids,
            attention_mask=self.mask[:, :, :columns],
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        # What the second column alone may not see, both may from now on.
        self.mask[..., self.filled : self.filled + columns] = True
        self.filled += columns
        # The next replay of a CUDA graph writes over its output.
        return hidden_states.clone() if hidden_states.is_cuda else hidden_states

    def to_growing_cache(self) -> GrowingCache:
        """What was filled, as a cache of its own."""
        cache = GrowingCache(self.model.model.config)
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[:, :, : self.filled], layer.values[:, :, : self.filled], number)
        return cache
