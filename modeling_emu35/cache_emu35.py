"""A key-value cache with room to grow: new tokens are written in place, not by copying all that came before."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer. `keys` and `values` are the filled columns of larger tensors.

    Whoever puts other tensors in their place (as `reorder_cache` does) only makes the next update copy them.
    """

    def __init__(self):
        super().__init__()
        #: Columns that the next tensors shall have beyond those needed at once.
        self.spare = 0
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(batch, heads, new, head_dim)` keys and values; returns those of all columns."""
        filled = self.get_seq_length()
        needed = filled + key_states.shape[2]
        if not self._has_room(needed):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            columns = needed + max(self.spare, 64, needed // 8)
            rooms = []
            for new, old in ((key_states, self.keys), (value_states, self.values)):
                room = new.new_empty(*new.shape[:2], columns, new.shape[3])
                if filled:
                    room[:, :, :filled] = old
                rooms.append(room)
            self._room = tuple(rooms)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, filled:needed] = new
        self._show(needed)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` columns, whose room stays."""
        has_room = self._has_room(0)
        super().crop(tokens_to_remove)
        if has_room:
            self._show(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self._room = self._views = None

    def _has_room(self, columns: int) -> bool:
        if self._views is None or self.keys is not self._views[0] or self.values is not self._views[1]:
            return False
        return columns <= self._room[0].shape[2]

    def _show(self, columns: int):
        self._views = tuple(room[:, :, :columns] for room in self._room)
        self.keys, self.values = self._views


class GrowingCache(DynamicCache):
    """transformers' `DynamicCache`, whose full-attention layers are [`GrowingLayer`].

    Args:
        config: of the decoder.
    """

    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    def reserve(self, columns: int):
        """Makes the next allocation leave room for so many more columns."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.spare = columns
