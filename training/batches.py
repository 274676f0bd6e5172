"""Batches: fresh sequences, packed into rows, with the images' codes filled in."""

from dataclasses import dataclass

import numpy as np
import torch
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

from .recipe import StageRecipe
from .sequences import IGNORED, SequenceWriter, TokenSequence
from .shapes import Scene, render

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
        self.writer, self.vision_tokenizer = writer, vision_tokenizer.eval()
        self.seed = seed

    def batch(self, step: int, stage: StageRecipe, stream: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """One of the batches of a step, one a stream. `dtype`: of the attention mask."""
        rng = np.random.default_rng((self.seed, 2, step, stream))
        rows = self._draw_rows(rng, stage)
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
        visual = torch.from_numpy(
            self._encode([scene for row in rows for sequence in row for scene in sequence.scenes])
        )
        visual += layout.visual_token_offset
        input_ids, labels = torch.from_numpy(input_ids), torch.from_numpy(labels)
        holes = input_ids == layout.image_placeholder_token_id
        learnt = labels == layout.image_placeholder_token_id
        input_ids[holes] = visual
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

    def _draw_rows(self, rng: np.random.Generator, stage: StageRecipe) -> list[list[TokenSequence]]:
        """A little more than fits is drawn; the longest go first, each to the fullest row that has room (best fit)."""
        writer, kinds = self.writer.for_stage(stage), list(stage.mixture)
        edges = np.cumsum(list(stage.mixture.values()))
        drawn, wanted = [], SURPLUS * stage.rows * stage.row_length
        while wanted > 0:
            kind = kinds[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
            drawn.append(writer.draw(kind, rng))
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

    @torch.no_grad()
    def _encode(self, scenes: list[Scene]) -> np.ndarray:
        """Codes of the scenes' images, one after the other."""
        if not scenes:
            return np.zeros(0, dtype=np.int64)
        parameter = next(self.vision_tokenizer.parameters())
        pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
        pixels = pixels.to(parameter.device, torch.float32) / 127.5 - 1
        return self.vision_tokenizer.encode(pixels).flatten().cpu().numpy()
