"""Who sees whom in adaptation training, and the cache that noisy copies read."""

import torch
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask

from .dida_batches import DiDABatch


class PrefixCache:
    """Keys and values of the clean part.  The first pass of each layer is kept; later ones see it and leave it.

    Not a `DynamicCache`: that would grow with every pass, and again when gradient checkpointing repeats a layer.
    """

    is_compileable = False

    def __init__(self):
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx == len(self.layers):
            self.layers.append((keys, values))
            return keys, values
        clean_keys, clean_values = self.layers[layer_idx]
        return torch.cat([clean_keys, keys], dim=-2), torch.cat([clean_values, values], dim=-2)

    def repeat_rows(self, times: int) -> "PrefixCache":
        """A cache in which each row stands `times` times in succession."""
        repeated = PrefixCache()
        repeated.layers = [tuple(t.repeat_interleave(times, dim=0) for t in layer) for layer in self.layers]
        return repeated

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[0][0].shape[-2] if self.layers else 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def clean_mask(config: PretrainedConfig, batch: DiDABatch, like: torch.Tensor):
    """Mask of the clean part alone.  Arguments and result as in [`dida_mask`]."""
    blocks = torch.full_like(batch.first, -1)
    return _mask(config, like, batch.first, torch.full_like(batch.first, batch.first.shape[1]), blocks, None)


def dida_mask(config: PretrainedConfig, batch: DiDABatch, like: torch.Tensor, cache: PrefixCache | None = None):
    """Mask of a clean part followed by noisy ones.  One construction for eager, SDPA and flex attention.

        query \\ key      clean, before the IMG    clean, other    own block    other blocks
        clean            causal                   causal          -            -
        noisy            yes                      -               yes          -

    all of it within one sequence.

    Args:
        config (`PretrainedConfig`): of the decoder; says which attention there is.
        batch ([`DiDABatch`]): the parts.
        like (`torch.Tensor` of shape `(rows, length, width)`): gives the mask's type and device, and its queries.
        cache ([`PrefixCache`], *optional*):
            holds the clean part, row by row for each noisy part: queries are `(rows * copies, noisy_length)`. Without
            one they are the clean part and all noisy ones, `(rows, row_length + copies * noisy_length)`.
    Returns:
        a 4D mask, or a `BlockMask`: what the decoder takes as `attention_mask`.
    """
    copies = batch.noisy_ids.shape[1]
    first, blocks, end = batch.noisy_first, batch.block_ids, batch.noisy_end
    row_length = batch.first.shape[1]
    if cache is None:
        # Blocks count from 0 in every part.
        part = torch.arange(copies, device=blocks.device)[:, None] * (blocks.max() + 1)
        blocks = torch.where(blocks >= 0, blocks + part, -1).flatten(1)
        first, end, clean_first = first.flatten(1), end.flatten(1), batch.first
    else:
        first, blocks, end = (values.flatten(0, 1) for values in (first, blocks, end))
        clean_first = batch.first.repeat_interleave(copies, dim=0)
    return _mask(
        config,
        like,
        torch.cat([clean_first, first], dim=1),
        torch.cat([torch.full_like(clean_first, row_length), end], dim=1),
        torch.cat([torch.full_like(clean_first, -1), blocks], dim=1),
        cache,
    )


def _mask(config, like, first: torch.Tensor, end: torch.Tensor, blocks: torch.Tensor, cache: PrefixCache | None):
    def sees_clean(batch, head, query, key):
        return (key >= first[batch, query]) & (key < end[batch, query])

    return create_causal_mask(config, like, None, cache, and_mask_function=sees_clean, block_sequence_ids=blocks)
