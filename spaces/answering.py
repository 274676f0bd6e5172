"""Answers of text and images, by streaming `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from emu35 import ImageFinished, ImageProgress, ImageStarted, Segments, ThoughtPiece
from emu35.pipelines import Emu35Pipeline
from emu35.segments_emu35 import decode_images, iter_images, pixels_to_pil
from emu35.streaming_emu35 import AnswerReader, Event
from transformers.generation.streamers import BaseStreamer

from .background import Run
from .checks import UNLIMITED, check_length
from .settings import SpaceSettings
from .updates import UNFINISHED


@torch.no_grad()
def answer(
    pipe: Emu35Pipeline, run: Run, settings: SpaceSettings, messages: Sequence[dict], task: str, **arguments: Any
):
    """Continues a conversation, and shows the answer while it comes.

    Args:
        arguments: settings of `generate`.
    """
    model, processor = pipe.model, pipe.processor
    # However long it is, so that it is `check_length` that refuses it.
    inputs = processor.apply_chat_template(messages, task=task, return_tensors="pt", max_length=UNLIMITED)
    inputs = inputs.to(model.device)
    check_length(inputs["input_ids"], model, settings)
    limits = {"max_new_tokens": min(settings.max_new_tokens, model.generation_config.max_new_tokens or 2**31)}
    if task != "vqa":
        limits["max_images"] = settings.max_images
    watcher = _Watcher(pipe, run, settings, arguments.get("num_inference_steps"))
    if arguments.get("image_decoder") == "dida":
        arguments["on_step"] = watcher.denoised
    handle = model.model.register_forward_hook(run.count_pass)
    try:
        output = model.generate(
            **inputs,
            task=task,
            generator=torch.Generator().manual_seed(run.seed),
            streamer=watcher,
            **limits,
            **arguments,
        )
    finally:
        handle.remove()
    if not bool(output.finished[0]):
        run.stop(f"Stopped: the limit of an answer, {limits['max_new_tokens']} tokens.")
    segments = watcher.segments()
    unfinished = [one.image for one in iter_images(segments) if one.image is not None and not one.complete]
    for image in unfinished:
        image.info[UNFINISHED] = True
    if run.reason and unfinished:
        run.reason += " The last picture is unfinished."
    run.show(segments=segments, images=watcher.pictures, passes=output.num_forward_passes)


class _Watcher(BaseStreamer):
    """Shows an answer while `generate` writes it, in its thread.

    [`~emu35.Emu35Streamer`] does the same over a queue of events; here only the newest state is wanted.

    Args:
        num_steps (`int`, *optional*): of `dida`, which tells of its steps by [`denoised`].
    """

    def __init__(self, pipe: Emu35Pipeline, run: Run, settings: SpaceSettings, num_steps: int | None = None):
        self.num_steps = num_steps
        self.first: tuple[float, float] | None = None  # seconds and fraction, where the picture was looked at first
        self.model, self.run, self.settings = pipe.model, run, settings
        self.reader = AnswerReader(pipe.processor, pipe.model)
        self.forming: Any = None

    @property
    def stop_requested(self) -> bool:
        """What `generate` looks at between tokens."""
        return self.run.should_stop()

    @property
    def pictures(self) -> list:
        return [image.image for image in self.reader.images if image.image is not None]

    def put(self, value: torch.Tensor):
        if value.ndim > 1:  # the prompt
            return
        for token_id in value.tolist():
            for event in self.reader.read(token_id):
                self.show(event)

    def end(self):
        for event in self.reader.finish():
            self.show(event)

    def show(self, event: Event):
        number = len(self.reader.images) + 1
        if isinstance(event, ImageStarted):
            pixels = event.token_height * event.token_width * self.model.image_factor**2
            if pixels > self.settings.max_pixels:
                self.run.stop(f"Stopped: the model began a picture of more than {self.settings.max_pixels} pixels.")
            self.first = None
            self.run.show(
                stage="drawing",
                message=f"Drawing picture {number}.",
                fraction=0.0,
                remaining=None,
                segments=self.segments(),
            )
        elif isinstance(event, ImageProgress):
            if self.num_steps is None:
                self.progress(event.num_codes / event.total)
            self.run.show_sometimes(lambda: self._with_preview(event.preview()))
        elif isinstance(event, ImageFinished):
            self.run.show(segments=self.segments(), images=self.pictures, fraction=1.0, remaining=None)
        else:
            message = "Thinking." if isinstance(event, ThoughtPiece) else "Writing."
            self.run.show(stage="writing", message=message, fraction=None, remaining=None)
            self.run.show_sometimes(lambda: {"segments": self.segments()})

    def denoised(self, step: int, codes: torch.LongTensor):
        """After a step of `dida`, whose codes come as tokens only at its end."""
        self.progress((step + 1) / self.num_steps)
        if int(codes.max()) < self.model.config.vision_tokenizer_config.codebook_size:
            self.run.show_sometimes(lambda: self._with_preview(pixels_to_pil(self.model.decode_image(list(codes))[0])))

    def progress(self, fraction: float):
        """Shows how much there is of the picture.  How long the rest takes follows from its own pace."""
        seconds = self.run.seconds
        then, there = self.first = self.first or (seconds, fraction)
        remaining = (seconds - then) * (1 - fraction) / (fraction - there) if fraction > there else None
        self.run.show(fraction=fraction, remaining=remaining)

    def segments(self) -> Segments:
        """The answer so far.  Unfinished images are decoded as far as they go."""
        segments = self.reader.segments()
        decode_images(segments, self.model)
        return segments

    def _with_preview(self, picture) -> dict[str, Any]:
        segments = self.reader.segments()
        images = list(iter_images(segments))
        if images:
            images[-1].image = picture
        return {"segments": segments, "images": [*self.pictures, picture]}


__all__ = ["answer"]
