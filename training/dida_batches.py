"""Batches of adaptation training: packed clean sequences, and noisy copies ("blocks") of the images that are learnt.

    clean   BOS prompt BOI h * w IMG c c c EOL c c c EOI ESS EOS   next sequence ...
    noisy   [IMG x x x EOL x x x] [IMG x x x EOL x x x] ...         one block an image, each at its own time t

A block has the positions of the tokens it stands for. It sees the clean tokens of its sequence before that IMG, and
itself. The output at a token predicts the clean code that comes next (the shift of the next-token model is kept).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from emu35.configuration_emu35 import Emu35TokenLayout
from emu35.pipelines.scheduling_dida import DiDAScheduler

from .batches import Batch, BatchSource
from .recipe import StageRecipe
from .sequences import IGNORED


@dataclass
class DiDABatch:
    """One step of one process.  `copies` noisy parts belong to each clean row.

    Attributes:
        input_ids, labels, position_ids (`torch.LongTensor` of shape `(rows, row_length)`): clean, see [`Batch`].
        first (`torch.LongTensor` of shape `(rows, row_length)`): where the sequence of a token begins in its row.
        noisy_ids, noisy_position_ids (`torch.LongTensor` of shape `(rows, copies, noisy_length)`): the noisy parts.
        block_ids (`torch.LongTensor` of that shape): which block of its part a token is in; -1 is padding.
        noisy_first, noisy_end (`torch.LongTensor` of that shape): a noisy token sees the clean ones between them.
        targets (`torch.LongTensor` of that shape): the code that comes next in the clean image; -100: none.
        times (`torch.Tensor` of that shape): t of the block.
        num_sequences (`int`), num_tokens (`int`): of the clean part, without padding.
        num_blocks (`int`): noisy copies.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    first: torch.Tensor
    noisy_ids: torch.Tensor
    noisy_position_ids: torch.Tensor
    block_ids: torch.Tensor
    noisy_first: torch.Tensor
    noisy_end: torch.Tensor
    targets: torch.Tensor
    times: torch.Tensor
    num_sequences: int
    num_tokens: int
    num_blocks: int

    def to(self, device: torch.device | str) -> "DiDABatch":
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), torch.Tensor):
                setattr(self, item.name, value.to(device))
        return self


def add_noisy_copies(
    batch: Batch,
    layout: Emu35TokenLayout,
    scheduler: DiDAScheduler,
    copies: int,
    noisy_length: int,
    initial_share: float = 0.0,
    seed: int = 0,
) -> DiDABatch:
    """Noisy copies of a batch's learnt images.

    The images of a row take turns, in random order, until every noisy part is full: with room for more blocks than
    there are images some get more of them, with room for fewer some get none.

    Args:
        batch ([`Batch`]): clean; images that are learnt have labels.
        layout ([`Emu35TokenLayout`]): which id means what.
        scheduler ([`DiDAScheduler`]): draws times and noise.
        copies (`int`), noisy_length (`int`): noisy parts of a row, and their tokens.
        initial_share (`float`): share of blocks at t = 0 exactly.
        seed (`int`): of order, times and noise.
    Raises:
        ValueError: if an image does not fit into a noisy part.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows, row_length = batch.input_ids.shape
    first = torch.arange(row_length).expand(rows, -1).masked_fill(batch.position_ids != 0, 0).cummax(dim=1).values
    shape = (rows, copies, noisy_length)
    ids, source = torch.full(shape, layout.pad_token_id), torch.zeros(shape, dtype=torch.long)
    block_ids, number = torch.full(shape, -1), torch.full(shape, -1)
    noisy_end = torch.ones(shape, dtype=torch.long)  # padding sees one token, so that its scores stay numbers
    num_blocks = 0
    for row, images in enumerate(_learnt_images(batch, layout)):
        turns = _turns(len(images), rng)
        image = next(turns, None)
        for copy in range(copies):
            begin = count = 0
            while image is not None:
                start, length = images[image]
                if length > noisy_length:
                    raise ValueError(
                        f"an image takes {length} tokens, but a noisy part has {noisy_length}. Raise `noisy_share`."
                    )
                if begin + length > noisy_length:
                    break
                span = (row, copy, slice(begin, begin + length))
                source[span] = torch.arange(start, start + length)
                block_ids[span], number[span], noisy_end[span] = count, num_blocks, start
                begin, count, num_blocks = begin + length, count + 1, num_blocks + 1
                image = next(turns)

    def at_source(values: torch.Tensor, shift: int = 0) -> torch.Tensor:
        return values.gather(1, (source + shift).flatten(1)).view(shape)

    real = block_ids >= 0
    ids = torch.where(real, at_source(batch.input_ids), ids)
    following = at_source(batch.input_ids, 1)
    begin, end = layout.visual_token_offset, layout.visual_token_end
    targets = torch.where(real & (following >= begin) & (following < end), following - begin, IGNORED)
    drawn = scheduler.sample_times(max(1, num_blocks), generator)
    drawn[torch.rand(len(drawn), generator=generator) < initial_share] = 0.0
    times = torch.where(real, drawn[number.clamp(min=0)], 0.0)
    visual = real & (ids >= begin) & (ids < end)
    if visual.any():
        codes = scheduler.add_noise((ids[visual] - begin)[:, None], times[visual], generator)[:, 0]
        if scheduler.mask_code is None:
            ids[visual] = codes + begin
        else:
            ids[visual] = torch.where(codes == scheduler.mask_code, layout.image_placeholder_token_id, codes + begin)
    return DiDABatch(
        batch.input_ids,
        batch.labels,
        batch.position_ids,
        first,
        ids,
        at_source(batch.position_ids),
        block_ids,
        torch.where(real, at_source(first), 0),
        noisy_end,
        targets,
        times,
        batch.num_sequences,
        batch.num_tokens,
        num_blocks,
    )


def _learnt_images(batch: Batch, layout: Emu35TokenLayout) -> list[list[tuple[int, int]]]:
    """For each row, the index of IMG and the block's length, of the images whose codes are learnt."""
    images = []
    for ids, labels in zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
        starts, ends = np.flatnonzero(ids == layout.img_token_id), np.flatnonzero(ids == layout.eoi_token_id)
        ends = ends[np.searchsorted(ends, starts)]
        images.append([(s, e - s) for s, e in zip(starts, ends, strict=True) if labels[s + 1] != IGNORED])
    return images


def _turns(number: int, rng: np.random.Generator):
    """0 to `number` - 1 in random order, again and again; nothing for 0."""
    while number:
        yield from rng.permutation(number)


class DiDABatchSource(BatchSource):
    """The batches of a run, each a function of (seed, step, stream) alone.

    Args:
        writer, vision_tokenizer, seed: as in [`BatchSource`].
        scheduler ([`DiDAScheduler`]): draws times and noise.
        copies (`int`), noisy_share (`float`), initial_share (`float`): see [`DiDARecipe`].
    """

    def __init__(
        self, writer, vision_tokenizer, seed, scheduler: DiDAScheduler, copies: int, noisy_share: float, initial_share
    ):
        super().__init__(writer, vision_tokenizer, seed)
        self.scheduler, self.copies = scheduler, copies
        self.noisy_share, self.initial_share = noisy_share, initial_share

    def batch(
        self,
        step: int,
        stage: StageRecipe,
        stream: int = 0,
        dtype: torch.dtype = torch.float32,
        progress: float = 1.0,
    ) -> DiDABatch:
        clean = super().batch(step, stage, stream, dtype, progress)
        seed = int(np.random.default_rng((self.seed, 3, step, stream)).integers(2**63))
        length = round(self.noisy_share * stage.row_length)
        return add_noisy_copies(
            clean, self.writer.layout, self.scheduler, self.copies, length, self.initial_share, seed
        )
