"""Batches: fresh sequences, packed into rows, with the images' codes filled in."""

from dataclasses import dataclass

import numpy as np
import torch
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

from .frame_codes import FrameEncoder
from .recipe import StageRecipe
from .sequences import IGNORED, SequenceWriter, TokenSequence

MASKED = -1e4
"""Added to attention scores that must vanish; finite, so that rows of padding stay numbers."""


SURPLUS = 1.08
"""Tokens drawn for a batch, as a multiple of its size; what does not fit is dropped."""


@dataclass
class Batch:
    """One step of one process.

    Attributes:
        input_ids, labels, position_ids (`torch.LongTensor` of shape `(rows, row_length)`):
            positions count from 0 in each sequence; labels are not shifted.
        attention_mask (`torch.Tensor` of shape `(rows, 1, row_length, row_length)`):
            added to the scores; causal, and each sequence sees only itself.
        num_sequences (`int`), num_tokens (`int`): without padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    num_sequences: int
    num_tokens: int

    def to(self, device: torch.device | str) -> "Batch":
        for name in ("input_ids", "labels", "position_ids", "attention_mask"):
            setattr(self, name, getattr(self, name).to(device))
        return self


class BatchSource:
    """The batches of a run: each a function of (seed, step, stream) alone, so a resumed run sees what it would have.

    Args:
        writer ([`SequenceWriter`]): writes sequences.
        vision_tokenizer ([`Emu35VisionTokenizer`]): turns their images into codes.
        seed (`int`): where fresh scenes come from.
    """

    def __init__(self, writer: SequenceWriter, vision_tokenizer: Emu35VisionTokenizer, seed: int):
        self.writer, self.encode = writer, FrameEncoder(vision_tokenizer.eval())
        self.seed = seed

    def batch(
        self,
        step: int,
        stage: StageRecipe,
        stream: int = 0,
        dtype: torch.dtype = torch.float32,
        progress: float = 1.0,
    ) -> Batch:
        """One of the batches of a step, one a stream.

        Args:
            dtype (`torch.dtype`): of the attention mask.
            progress (`float`): how far the stage has come, in [0, 1], for its difficulty.
        """
        rng = np.random.default_rng((self.seed, 2, step, stream))
        rows = self._draw_rows(rng, stage, progress)
        shape = (stage.rows, stage.row_length)
        layout = self.writer.layout
        input_ids = np.full(shape, layout.pad_token_id)
        labels, positions = np.full(shape, IGNORED), np.zeros(shape, dtype=np.int64)
        segments = np.full(shape, -1)
        for index, row in enumerate(rows):
            begin = 0
            for number, sequence in enumerate(row):
                span = slice(begin, begin + len(sequence))
                input_ids[index, span], labels[index, span] = sequence.input_ids, sequence.labels
                positions[index, span], segments[index, span] = range(len(sequence)), number
                begin = span.stop
        input_ids, labels = torch.from_numpy(input_ids), torch.from_numpy(labels)
        holes = input_ids == layout.image_placeholder_token_id
        learnt = labels == layout.image_placeholder_token_id
        frames = [frame for row in rows for sequence in row for frame in sequence.frames]
        if frames:
            input_ids[holes] = torch.from_numpy(self.encode(frames)).flatten() + layout.visual_token_offset
        labels[learnt] = input_ids[learnt]
        segments = torch.from_numpy(segments)
        visible = (segments[:, :, None] == segments[:, None, :]).tril()
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, MASKED)
        return Batch(
            input_ids,
            labels,
            torch.from_numpy(positions),
            mask[:, None],
            sum(map(len, rows)),
            int((segments >= 0).sum()),
        )

    def _draw_rows(self, rng: np.random.Generator, stage: StageRecipe, progress: float) -> list[list[TokenSequence]]:
        """A little more than fits is drawn; the longest go first, each to the fullest row that has room (best fit)."""
        writer, kinds = self.writer.for_stage(stage), list(stage.mixture)
        shares = np.array(list(stage.mixture.values()))
        if stage.balance == "tokens":
            shares = shares / [writer.mean_length(kind) for kind in kinds]
        edges = np.cumsum(shares)
        difficulty = stage.difficulty_at(progress)
        drawn, wanted = [], SURPLUS * stage.rows * stage.row_length
        while wanted > 0:
            kind = kinds[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
            drawn.append(writer.draw(kind, rng, difficulty))
            if len(drawn[-1]) > stage.row_length:
                raise ValueError(
                    f"`row_length` of stage {stage.name!r} is {stage.row_length}, but a sequence of the kind {kind!r} "
                    f"has {len(drawn[-1])} tokens. Raise it."
                )
            wanted -= len(drawn[-1])
        rows: list[list[TokenSequence]] = [[] for _ in range(stage.rows)]
        room = [stage.row_length] * stage.rows
        for sequence in sorted(drawn, key=len, reverse=True):
            fitting = [index for index, left in enumerate(room) if left >= len(sequence)]
            if fitting:
                index = min(fitting, key=room.__getitem__)
                rows[index].append(sequence)
                room[index] -= len(sequence)
        return rows
