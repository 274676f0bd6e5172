"""Streaming: an answer as typed events while `generate` still writes it.

    generate (its own thread) ─ ids ─► AnswerReader ─ events ─► bounded queue ─► `for event in streamer` (the caller)
                ▲                                                                     │
                └───────────────────────── `stop_requested` ◄─────────────────────────┘

[`AnswerReader`] knows the grammar (see `segments_emu35`) and no threads; [`Emu35Streamer`] knows threads and no
grammar.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import PIL.Image
import torch
from transformers.generation.streamers import BaseStreamer

from .generation_configuration_emu35 import Emu35GenerateOutput
from .image_tokens_emu35 import last_image, parse_size
from .segments_emu35 import Image, Segment, decode_images, iter_images, read_image

logger = logging.getLogger(__name__)

#: Seconds between two looks at the world while waiting. A wait without an end would not hear Ctrl-C on every system.
_NAP = 0.1
#: What decoding shows where bytes are no character, or not yet one.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TextPiece:
    """More of the answer's text.  The pieces between two images, joined, are the [`Text`] there."""

    text: str


@dataclass(frozen=True)
class ThoughtPiece:
    """More of a thought: the "global" one about the whole answer, or the one before an "image"."""

    text: str
    kind: Literal["global", "image"]


@dataclass(frozen=True)
class ImageStarted:
    """An image has begun and its size is known.  `index`: counts the answer's images from 0; sizes in codes."""

    index: int
    token_height: int
    token_width: int


@dataclass(frozen=True)
class ImageProgress:
    """What there is of an image.

    Attributes:
        index (`int`): counts the answer's images from 0.
        codes (`tuple[int, ...]`): visual codes so far, row after row; never empty.
        token_height, token_width (`int`): the size in codes.
    """

    index: int
    codes: tuple[int, ...] = field(repr=False)
    token_height: int
    token_width: int
    _vision_tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def num_codes(self) -> int:
        return len(self.codes)

    @property
    def total(self) -> int:
        """Codes of the whole image."""
        return self.token_height * self.token_width

    @property
    def num_rows(self) -> int:
        """Rows that are whole."""
        return self.num_codes // self.token_width

    def preview(self) -> PIL.Image.Image:
        """The picture so far, at its full size.  May be called at any time, in any thread.

        Each missing code repeats the one above it; in the first row, the last code there is.

        Raises:
            ValueError: if the streamer has no vision tokenizer, or one whose codebook lacks these codes.
        """
        if self._vision_tokenizer is None:
            raise ValueError("a preview needs a vision tokenizer: `Emu35Streamer(processor, vision_tokenizer=model)`.")
        codes, width = list(self.codes), self.token_width
        while len(codes) < self.total:
            codes.append(codes[-width] if len(codes) >= width else codes[-1])
        image = Image(torch.tensor(codes).view(self.token_height, width))
        decode_images([image], self._vision_tokenizer)
        if image.image is None:
            raise ValueError(f"no preview: {image.reason}.")
        return image.image


@dataclass(frozen=True, eq=False)
class ImageFinished:
    """An image has ended, whole or not.  One whose size was never readable has had no [`ImageStarted`].

    Attributes:
        index (`int`): counts the answer's images from 0.
        codes (`torch.LongTensor` of shape `(token_height, token_width)`): the rows that are whole.
        image (`PIL.Image.Image` or `None`): the pixels; `None` without a vision tokenizer, or without a whole row.
        complete (`bool`): whether it follows the grammar: closed, and of the size that it announces.
        reason (`str`): what is wrong with it otherwise.
    """

    index: int
    codes: torch.LongTensor = field(repr=False)
    image: PIL.Image.Image | None = None
    complete: bool = True
    reason: str = ""


@dataclass(frozen=True)
class End:
    """The last event.

    Attributes:
        reason (`str`):
            "eos": the answer came to its own end (EOS; with [`~Emu35Streamer.run`] in image mode the image's end);
            "length": a limit cut it; "stopped": [`~Emu35Streamer.stop`] did; "error": `generate` raised `error`.
        error (`BaseException` or `None`).
    """

    reason: Literal["eos", "length", "stopped", "error"]
    error: BaseException | None = None


Event = TextPiece | ThoughtPiece | ImageStarted | ImageProgress | ImageFinished | End


class _TextRun:
    """Ids of one run of text, turned into pieces that no later id can change.

    A character may be spread over several tokens, so what ends in replacement characters waits.

    Args:
        decode: ids to text, such that `decode(a) + decode(b) == decode(a + b)` where `decode(a)` ends in a character.
        kind (`str`, *optional*): of a thought.
    """

    def __init__(self, decode: Callable[[list[int]], str], kind: str | None):
        self.decode, self.kind = decode, kind
        self.ids: list[int] = []
        self.num_sent = 0  # characters of the text of `ids`
        # Text of nothing but white space is no segment.
        self.is_visible = kind == "image"

    def put(self, token_id: int) -> Iterator[TextPiece | ThoughtPiece]:
        self.ids.append(token_id)
        text = self.decode(self.ids)
        stable = text.rstrip(_REPLACEMENT)
        yield from self._send(stable)
        if self.is_visible and stable == text:
            self.ids, self.num_sent = [], 0

    def end(self) -> Iterator[TextPiece | ThoughtPiece]:
        yield from self._send(self.decode(self.ids))

    def _send(self, text: str) -> Iterator[TextPiece | ThoughtPiece]:
        self.is_visible = self.is_visible or bool(text.strip())
        if self.is_visible and len(text) > self.num_sent:
            piece, self.num_sent = text[self.num_sent :], len(text)
            yield TextPiece(piece) if self.kind is None else ThoughtPiece(piece, self.kind)


class AnswerReader:
    """Turns the ids of an answer, one after the other, into events; agrees with `parse_segments`.

    The one difference: an id that decides what an earlier one was comes too late here. A global thought that never
    ends is told as a thought to its end, while the segments end it at the first image.

    Args:
        processor ([`Emu35Processor`]).
        vision_tokenizer (*optional*): see [`~Emu35Processor.decode_multimodal`].
        progress_every ("row" or `int`): an [`ImageProgress`] after every row, or every so many codes.
    """

    def __init__(self, processor, vision_tokenizer: Any = None, progress_every: Literal["row"] | int = "row"):
        self.processor, self.layout = processor, processor.token_layout
        self.vision_tokenizer = vision_tokenizer
        self.progress_every = progress_every
        self.ids: list[int] = []
        self.images: list[Image] = []
        self._size_ids = {*self.layout.digit_token_ids, self.layout.size_separator_token_id}
        self._run: _TextRun | None = None
        self._in_global = self._in_thought = False
        self._begin: int | None = None  # where the open image is
        self._in_size = False
        self._size: tuple[int, int] | None = None
        self._codes: list[int] = []

    def read(self, token_id: int) -> Iterator[Event]:
        """The events that the next id brings."""
        self.ids.append(token_id)
        yield from self._read(len(self.ids) - 1)

    def finish(self) -> Iterator[Event]:
        """The events that the end of the ids brings."""
        if self._begin is not None:
            yield self._end_image()
        yield from self._end_run()

    def segments(self) -> list[Segment]:
        """All so far, as the processor reads it, with the pixels of the images that have ended."""
        images = list(self.images)  # before the ids: another thread may be adding to both
        segments = self.processor.decode_multimodal(list(self.ids))
        for parsed, image in zip(iter_images(segments), images, strict=False):
            parsed.image, parsed.complete, parsed.reason = image.image, image.complete, image.reason
        return segments

    def _read(self, index: int) -> Iterator[Event]:
        token_id, layout = self.ids[index], self.layout
        if self._begin is not None and (yield from self._belongs_to_image(index)):
            return
        is_visual = token_id in layout.visual_token_ids
        if token_id == layout.boi_token_id or is_visual:
            yield from self._end_run()
            self._in_thought = False
            self._begin, self._in_size, self._size, self._codes = index, not is_visual, None, []
        elif token_id in (layout.ess_token_id, layout.eos_token_id):
            # They vanish from text, but end thoughts.
            if self._in_global or self._in_thought:
                yield from self._change(in_global=False)
        elif token_id == layout.bog_token_id:
            yield from self._change(in_global=True)
        elif token_id == layout.eog_token_id and self._in_global:
            yield from self._change(in_global=False)
        elif token_id == layout.boc_token_id:
            yield from self._change(self._in_global, in_thought=True)
        elif token_id == layout.eoc_token_id and self._in_thought:
            yield from self._change(self._in_global)
        else:
            if self._run is None:
                kind = "image" if self._in_thought else "global" if self._in_global else None
                self._run = _TextRun(lambda run: self.processor.decode(run, skip_special_tokens=True), kind)
            yield from self._run.put(token_id)

    def _change(self, in_global: bool, in_thought: bool = False) -> Iterator[Event]:
        yield from self._end_run()
        self._in_global, self._in_thought = in_global, in_thought

    def _end_run(self) -> Iterator[Event]:
        if self._run is not None:
            yield from self._run.end()
            self._run = None

    def _belongs_to_image(self, index: int) -> Iterator[Event]:
        """Events of an id after the begin of an image.  Returns whether the id is part of the image."""
        token_id, layout = self.ids[index], self.layout
        if self._in_global and token_id == layout.eog_token_id:
            yield self._end_image(index)  # to the image, the thought is all there is
            return False
        if self._in_size:
            if token_id in self._size_ids:
                return True
            if token_id == layout.img_token_id:
                self._in_size = False
                self._size = parse_size(self.ids[self._begin + 1 : index], layout)
                if self._size is not None:
                    yield ImageStarted(len(self.images), *self._size)
                return True
            first = self._begin + 1
            if first < index:  # these digits are no size but text
                yield self._end_image()
                for earlier in range(first, index):
                    yield from self._read(earlier)
                return False
            self._in_size = False
        if token_id in layout.visual_token_ids:
            self._codes.append(token_id - layout.visual_token_offset)
            yield from self._progress()
            return True
        if token_id in (layout.eol_token_id, layout.image_placeholder_token_id):
            return True
        yield self._end_image()
        return token_id == layout.eoi_token_id

    def _progress(self) -> Iterator[ImageProgress]:
        if self._size is None:
            return
        every = self._size[1] if self.progress_every == "row" else self.progress_every
        total, number = self._size[0] * self._size[1], len(self._codes)
        if number == total or (number < total and number % every == 0):
            yield ImageProgress(len(self.images), tuple(self._codes), *self._size, self.vision_tokenizer)

    def _end_image(self, end: int | None = None) -> ImageFinished:
        image, _ = read_image(self.ids[self._begin : end], 0, self.layout)
        self._begin = None
        if self.vision_tokenizer is not None:
            decode_images([image], self.vision_tokenizer)
        self.images.append(image)
        return ImageFinished(len(self.images) - 1, image.codes, image.image, image.complete, image.reason)


class Emu35Streamer(BaseStreamer):
    """The events of one answer, for `generate(streamer=...)`.

    [`run`] generates in a background thread, and iterating gives the events as they come. When they are not read,
    generation waits as soon as `max_queue` of them do; only [`ImageProgress`] is left out then. Leave the `with`, or
    call [`close`], to stop early.

    Example:

        >>> streamer = Emu35Streamer(processor)
        >>> inputs = processor(text="a red fox", task="story")
        >>> with streamer.run(model, **inputs, task="story", generation_mode="interleaved") as events:
        ...     for event in events:
        ...         if isinstance(event, TextPiece):
        ...             print(event.text, end="")
        ...         elif isinstance(event, ImageProgress):
        ...             event.preview().show()
        >>> streamer.segments, streamer.output.sequences

    With a thread of your own, pass it to `generate(streamer=streamer)` and iterate elsewhere; errors of `generate` are
    yours to handle then.

    Args:
        processor ([`Emu35Processor`]).
        vision_tokenizer (*optional*):
            makes pixels of codes; see [`~Emu35Processor.decode_multimodal`]. Default with [`run`]: the model's.
        progress_every ("row" or `int`): an [`ImageProgress`] after every row, or every so many codes.
        max_queue (`int`): events that may wait to be read.
        timeout (`float`, *optional*): seconds to wait, at most, for an event, for a reader and for the thread's end.

    Attributes:
        stop_requested (`bool`): `generate` looks at it between tokens.
        output ([`Emu35GenerateOutput`] or `None`): what `generate` returned to [`run`]; there once [`End`] is.
    """

    def __init__(
        self,
        processor,
        vision_tokenizer: Any = None,
        progress_every: Literal["row"] | int = "row",
        max_queue: int = 64,
        timeout: float | None = None,
    ):
        for name, value in (("progress_every", progress_every), ("max_queue", max_queue)):
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_count and (name, value) != ("progress_every", "row"):
                also = '"row" or ' if name == "progress_every" else ""
                raise ValueError(f"`{name}` must be {also}a whole number of at least 1, got {value!r}.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` must be a positive number of seconds, or None to wait, got {timeout!r}.")
        self._reader = AnswerReader(processor, vision_tokenizer, progress_every)
        self.max_queue = max_queue
        self.timeout = timeout
        self.stop_requested = False
        self.output: Emu35GenerateOutput | torch.LongTensor | None = None
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._has_prompt = self._has_ended = self._is_closed = False

    @property
    def segments(self) -> list[Segment]:
        """The answer so far, as the processor would read it; may be asked at any time, in any thread."""
        return self._reader.segments()

    # --- generate's side ---

    def put(self, value: torch.Tensor):
        """The prompt `(1, length)`, then ids of the answer `(number,)`.

        An image that the prompt leaves unfinished belongs to the answer.
        """
        ids = value.reshape(-1).tolist()
        if value.ndim > 1:
            if self._has_prompt or len(value) != 1:
                given = "another prompt" if self._has_prompt else f"a batch of {len(value)}"
                raise ValueError(f"an Emu35Streamer serves one answer, got {given}. Make one for each.")
            self._has_prompt = True
            image = last_image(ids, self._reader.layout)
            is_open = image is not None and image.state in ("size", "rows") and image.end == len(ids)
            ids = ids[image.begin :] if is_open else []
        for token_id in ids:
            for event in self._reader.read(token_id):
                self._emit(event)

    def end(self):
        """No more ids.  [`run`] adds the [`End`] itself, when `generate` has returned."""
        for event in self._reader.finish():
            self._emit(event)
        if self._thread is None:
            self._emit(End(self._reason()))

    def _emit(self, event: Event):
        with self._changed:
            while len(self._events) >= self.max_queue and not (self.stop_requested or isinstance(event, End)):
                # Progress will be told again; nothing else will.
                waiting = next((one for one in self._events if isinstance(one, ImageProgress)), None)
                if waiting is not None:
                    self._events.remove(waiting)
                elif isinstance(event, ImageProgress):
                    return
                elif not self._changed.wait(self.timeout):
                    raise TimeoutError(
                        f"nobody has read the streamer's {self.max_queue} waiting events for `timeout`="
                        f"{self.timeout} s. Iterate over it, or `close` it."
                    )
            self._has_ended = self._has_ended or isinstance(event, End)
            if not self._is_closed:
                self._events.append(event)
            self._changed.notify_all()

    def _reason(self) -> str:
        ids, finished = self._reader.ids, getattr(self.output, "finished", None)
        at_eos = bool(ids) and ids[-1] == self._reader.layout.eos_token_id
        if at_eos if finished is None else bool(finished[0]):
            return "eos"
        return "stopped" if self.stop_requested else "length"

    def _generate(self, model, inputs: dict[str, Any]):
        try:
            self.output = model.generate(**inputs, streamer=self)
        except BaseException as error:
            if self._is_closed:  # nobody is left to read it
                raise
            self._emit(End("error", error))
        else:
            self._emit(End(self._reason()))

    # --- the reader's side ---

    def run(self, model, **inputs: Any) -> "Emu35Streamer":
        """Starts `model.generate(**inputs, streamer=self)` in a background thread and returns this streamer.

        Whatever `generate` raises is raised where the events are read, after all of them.

        Raises:
            ValueError: if this streamer has been used already.
        """
        if self._thread is not None or self._has_prompt:
            raise ValueError("an Emu35Streamer serves one answer, and this one has been used. Make another.")
        if self._reader.vision_tokenizer is None and getattr(model, "vision_tokenizer", None) is not None:
            self._reader.vision_tokenizer = model
        # A daemon: a reader that vanishes without closing must not keep the process alive.
        self._thread = threading.Thread(
            target=self._generate, args=(model, inputs), name="Emu35Streamer.run", daemon=True
        )
        self._thread.start()
        return self

    def stop(self):
        """Asks `generate` to end after the token it is at; the events up to [`End`] can still be read."""
        with self._changed:
            self.stop_requested = True
            self._changed.notify_all()

    def close(self):
        """Stops, drops the events that wait, and waits until the thread has ended."""
        with self._changed:
            self._is_closed = True
            self._events.clear()
            self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self.timeout)
            if self._thread.is_alive():
                logger.warning(
                    "`generate` was asked to stop, but is still running after `timeout`=%s s.", self.timeout
                )

    def __enter__(self) -> "Emu35Streamer":
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self) -> Iterator[Event]:
        """The events up to [`End`].  An iterator that is given up (by `break`, or an error) closes the streamer.

        Raises:
            TimeoutError: if nothing comes for `timeout` seconds.
        """
        event = None
        try:
            while not isinstance(event, End) and (event := self._next()) is not None:
                yield event
        finally:
            self.close()
        if isinstance(event, End) and event.error is not None:
            raise event.error

    def _next(self) -> Event | None:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        with self._changed:
            while not (self._events or self._has_ended or self._is_closed):
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"`generate` has made nothing to read for `timeout`={self.timeout} s.")
                self._changed.wait(_NAP if deadline is None else min(_NAP, max(0.0, deadline - time.monotonic())))
            event = self._events.popleft() if self._events else None
            self._changed.notify_all()
            return event


__all__ = [
    "Emu35Streamer",
    "End",
    "ImageFinished",
    "ImageProgress",
    "ImageStarted",
    "TextPiece",
    "ThoughtPiece",
]
