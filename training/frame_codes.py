"""Pictures of the world as visual codes, without the vision tokenizer where it can be done without.

A vision tokenizer that has learnt the world well gives a cell the same codes wherever it stands. Then a table of all
cells replaces the encoder, which takes 30 ms for the 60 pictures of a batch (one core; a step takes 700). Whether it
may is measured.
"""

import itertools

import numpy as np
import torch
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

from .shapes import BACKGROUNDS, COLORS, GRID_SIZE, SHAPES, SIZES, Frame, SceneObject, render

_NUM_PROBES = 256
_CHUNK = 128


class FrameEncoder:
    """Codes of frames.

    Args:
        vision_tokenizer ([`Emu35VisionTokenizer`]): in evaluation mode.
    Attributes:
        exact_table (`bool`): whether the table gave the encoder's codes on all of 256 random frames, 0 to 9 objects
            each, and is used instead of it.
    """

    def __init__(self, vision_tokenizer: Emu35VisionTokenizer):
        self.vision_tokenizer = vision_tokenizer
        self._table = self._build_table()
        probes = _random_frames(np.random.default_rng(0), _NUM_PROBES)
        self.exact_table = self._table is not None and np.array_equal(self._look_up(probes), self._encode(probes))

    def __call__(self, frames: list[Frame]) -> np.ndarray:
        """int64 `(frames, token_height, token_width)`."""
        return self._look_up(frames) if self.exact_table else self._encode(frames)

    @torch.no_grad()
    def _encode(self, frames: list[Frame]) -> np.ndarray:
        parameter = next(self.vision_tokenizer.parameters())
        codes = []
        for start in range(0, len(frames), _CHUNK):
            pixels = np.stack([render(frame) for frame in frames[start : start + _CHUNK]])
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(parameter.device, torch.float32) / 127.5 - 1
            codes.append(self.vision_tokenizer.encode(pixels).cpu().numpy())
        return np.concatenate(codes)

    def _build_table(self) -> dict[tuple, np.ndarray] | None:
        """(background, looks or `None`) -> codes of a cell; `None` if codes lie across cells."""
        looks = [None, *itertools.product(SHAPES, COLORS, SIZES)]
        middle = GRID_SIZE // 2
        keys, frames = [], []
        for background, look in itertools.product(BACKGROUNDS, looks):
            objects = () if look is None else (SceneObject(*look, middle, middle),)
            keys.append((background, look))
            frames.append(Frame(objects, background))
        codes = self._encode(frames)
        if codes.shape[1] % GRID_SIZE or codes.shape[2] % GRID_SIZE:
            return None
        height, width = codes.shape[1] // GRID_SIZE, codes.shape[2] // GRID_SIZE
        cells = codes[:, middle * height : (middle + 1) * height, middle * width : (middle + 1) * width]
        return dict(zip(keys, cells, strict=True))

    def _look_up(self, frames: list[Frame]) -> np.ndarray:
        cells = []
        for frame in frames:
            grid = [[self._table[frame.background, None]] * GRID_SIZE for _ in range(GRID_SIZE)]
            for o in frame.objects:
                grid[o.row][o.column] = self._table[frame.background, (o.shape, o.color, o.size)]
            cells.append(grid)
        grids = np.asarray(cells)  # (frames, rows, columns, height, width)
        count, rows, columns, height, width = grids.shape
        return grids.transpose(0, 1, 3, 2, 4).reshape(count, rows * height, columns * width)


def _random_frames(rng: np.random.Generator, number: int) -> list[Frame]:
    colors, backgrounds = tuple(COLORS), tuple(BACKGROUNDS)
    frames = []
    for index in range(number):
        cells = rng.choice(GRID_SIZE**2, size=index % (GRID_SIZE**2 + 1), replace=False)
        objects = tuple(
            SceneObject(
                SHAPES[rng.integers(len(SHAPES))],
                colors[rng.integers(len(colors))],
                SIZES[rng.integers(len(SIZES))],
                *divmod(int(cell), GRID_SIZE),
            )
            for cell in cells
        )
        frames.append(Frame(objects, backgrounds[rng.integers(len(backgrounds))]))
    return frames
