"""Following images while a pipeline makes them: progress, callbacks, interruption."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from emu35.image_tokens_emu35 import parse_size

if TYPE_CHECKING:
    from .pipeline_emu35 import Emu35Pipeline

StepCallback = Callable[["Emu35Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]


class ImageWatcher:
    """Follows images while they are made: moves the bar, calls back, and passes on the wish to stop.

    Args:
        pipe ([`Emu35Pipeline`]).
        bar: of the whole call.
        num_images (`int`): of the whole call.
        callback, tensor_inputs: see [`Emu35Pipeline.__call__`].
    """

    def __init__(
        self,
        pipe: "Emu35Pipeline",
        bar: Any,
        num_images: int,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ):
        self.pipe, self.bar, self.num_images = pipe, bar, num_images
        self.callback, self.tensor_inputs = callback, tensor_inputs
        self.layout = pipe.processor.token_layout
        self.num_batches, self.batch = 1, 0
        #: Images of the batch that have come to the same row; that row, and their size.
        self.level: list[list[int]] = []
        self.level_of: tuple[int, int, int] | None = None
        #: What the last denoising step left, by size.
        self.denoised: dict[tuple[int, int], list[torch.LongTensor]] = {}

    def begin(self, batch: int):
        """The next batch begins."""
        self._flush()
        self.num_batches = -(-self.num_images // batch) if not self.batch else self.num_batches
        self.batch, self.denoised = batch, {}

    def arguments(self, is_dida: bool) -> dict[str, Any]:
        """What `generate` is to call."""
        if is_dida:
            return {"on_step": self._step, "stopping_criteria": [lambda ids, scores: self.pipe.interrupt]}
        return {"stopping_criteria": [self._code]}

    def end(self):
        """The call has ended."""
        self._flush()
        # `total` may have been too high: codes that were given first did not count.
        if not self.pipe.interrupt:
            self.bar.total = self.bar.n
            self.bar.refresh()

    def codes_of(self, size: tuple[int, int] | None, codes: torch.LongTensor) -> torch.LongTensor:
        """Codes of an image that was interrupted: its whole rows, or what the last denoising step left."""
        waiting = self.denoised.get(size)
        return waiting.pop(0) if waiting else codes

    def _step(self, step: int, codes: torch.LongTensor):
        total = self.pipe.num_timesteps
        self.denoised[tuple(codes.shape[1:])] = list(codes.cpu())
        # Images of several sizes are made one size after the other; how many sizes there are is seen as they come.
        self.bar.total = max(self.bar.total, total * self.num_batches, self.bar.n + total - step)
        self.bar.update()
        self._call(step, float(self.pipe.scheduler.timesteps[step]), codes)

    def _code(self, ids: torch.LongTensor, scores: None) -> bool:
        """A stopping criterion: image after image, after each of its codes."""
        if self.bar.disable and self.callback is None:
            return self.pipe.interrupt
        layout, tokens = self.layout, ids[0].tolist()
        begin = len(tokens) - tokens[::-1].index(layout.boi_token_id)
        if layout.img_token_id not in tokens[begin:]:  # the model is still writing the size
            return self.pipe.interrupt
        first = tokens.index(layout.img_token_id, begin) + 1
        height, width = parse_size(tokens[begin : first - 1], layout)
        number = len(tokens) - first
        self.bar.total = max(self.bar.total, height * width * self.num_images)
        self.bar.update()
        # After a row of codes comes its EOL, but none after the last row.
        if number % (width + 1) == 0 or number == height * (width + 1) - 1:
            row = -(-number // (width + 1))
            if self.callback is not None:
                codes = [one for one in tokens[first:] if one != layout.eol_token_id]
                self._collect((height, width, row), codes)
        return self.pipe.interrupt

    def _collect(self, level: tuple[int, int, int], codes: list[int]):
        if level != self.level_of:
            self._flush()
        self.level_of = level
        self.level.append(codes)
        if len(self.level) == self.batch:
            self._flush()

    def _flush(self):
        """Calls back for a row, when all images of its size have it."""
        if not self.level:
            return
        height, width, row = self.level_of
        codes = torch.full((len(self.level), height * width), -1)
        codes[:, : row * width] = torch.tensor(self.level) - self.layout.visual_token_offset
        self.level = []
        self._call(row - 1, (row - 1) / height, codes.view(-1, height, width))

    def _call(self, step: int, t: float, codes: torch.LongTensor):
        if self.callback is None:
            return
        tensors = {name: codes.clone() for name in self.tensor_inputs}
        shown = dict(tensors)
        returned = self.callback(self.pipe, step, t, shown)
        changed = [name for name in tensors if (returned or shown).get(name) is not tensors[name]]
        if changed:
            raise ValueError(f"`callback_on_step_end` returned another `{changed[0]}`, but it cannot be replaced.")


__all__ = ["ImageWatcher", "StepCallback"]
