"""Stories in the file format of the public release (`.pb`), read and written without the protobuf package.

The schema is that of `src/proto/emu_pb.py` in baaivision/Emu3.5 (package `emu3p5.story`, syntax proto3), the fields
that its writer (`src/utils/painting_utils.py`) fills in. Others, which its data set has, are skipped.

    Story      2 clips*   11 summary: the global thought   12 question: the prompt   17 reference_images*
    Clip       1 clip_id  101 segments*: exactly one
    Segment    2 asr: a text, may be empty                 101 images*: those that follow the text
    ImageMeta  7 chain_of_thought: the thought before it   11 image
    Image      1 width    2 height   3 format: JPEG 1, PNG 2, WEBP 3, BMP 4   4 image_data: the file   5 image_path
"""

import contextlib
import io
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from .image_processing_emu35 import _decoding, flatten_images, to_rgb
from .segments_emu35 import GlobalThought, Image, ImageThought, Segments, Text

logger = logging.getLogger(__name__)

#: For each message: number, name and type of its fields; "*": repeated.
_SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "Story": {
        2: ("clips", "Clip*"),
        11: ("summary", "string"),
        12: ("question", "string"),
        17: ("reference_images", "ImageMeta*"),
    },
    "Clip": {1: ("clip_id", "string"), 101: ("segments", "Segment*")},
    "Segment": {2: ("asr", "string"), 101: ("images", "ImageMeta*")},
    "ImageMeta": {7: ("chain_of_thought", "string"), 11: ("image", "Image")},
    "Image": {
        1: ("width", "int32"),
        2: ("height", "int32"),
        3: ("format", "int32"),
        4: ("image_data", "bytes"),
        5: ("image_path", "string"),
    },
}
_PNG = 2
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: The largest message that protobuf knows.
_MAX_BYTES = 2**31 - 1


@dataclass
class Story:
    """A prompt and its answer, as a file holds them.

    Attributes:
        prompt (`str`): what was asked.
        reference_images (`list[PIL.Image.Image]`): images of the prompt; to save, of any kind the processor reads.
        segments (`Segments`): the answer. Its images have pixels and no codes.
    """

    prompt: str = ""
    reference_images: Sequence[Any] = field(default_factory=list)
    segments: Segments = field(default_factory=Segments)

    def save(self, directory: str | os.PathLike, title: str | None = None, fps: float = 1) -> Path:
        """Writes a web page and more into a folder; see [`Segments.save`]."""
        return self.segments.save(directory, title, self.prompt or None, fps, self.reference_images)


# ------------------------------------------------------------------------------------------------------------ reading


def load_story(path: str | os.PathLike, max_pixels: int = 2**28) -> Story:
    """Reads a story that the release, or [`Segments.save_protobuf`], has written.

    Args:
        path: a `.pb` file.
        max_pixels (`int`, defaults to 2**28): of all images together (those of 1024 x 1024 pixels: 256).
    Returns:
        `Story`: the global thought first, then texts, image thoughts and images in the order of the file. An image
        that is in another file, of which only the path is here, is incomplete.
    Raises:
        ValueError: if the file is no story or damaged, with the place where that shows; if an image cannot be decoded,
            or the images have more than `max_pixels` pixels.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than a protobuf file can have ({_MAX_BYTES}).")
    reader = _Reader(path, path.read_bytes(), max_pixels)
    story = reader.message("Story", 0, len(reader.data))
    if not story:
        raise reader.error(0, "nothing of a story is in it; the file is empty or of another kind")
    segments = Segments()
    if story.get("summary"):
        segments.append(GlobalThought([Text(story["summary"])]))
    for clip in story.get("clips", ()):
        for segment in clip.get("segments", ()):
            if segment.get("asr"):
                segments.append(Text(segment["asr"]))
            for meta in segment.get("images", ()):
                if meta.get("chain_of_thought"):
                    segments.append(ImageThought(meta["chain_of_thought"]))
                if meta.get("image"):
                    segments.append(reader.image(meta["image"]))
    references = []
    for index, meta in enumerate(story.get("reference_images", ())):
        image = reader.image(meta.get("image", {}))
        if image.complete:
            references.append(image.image)
        else:
            logger.warning("%s: reference image %d is left out: %s.", path, index, image.reason)
    return Story(story.get("question", ""), references, segments)


class _Reader:
    """The wire format: fields of `varint(number << 3 | wire type)` and a value, one after another."""

    def __init__(self, path: Path, data: bytes, max_pixels: int):
        self.path = path
        self.data = data
        self.max_pixels = self.pixels_left = max_pixels

    def error(self, offset: int, problem: str) -> ValueError:
        return ValueError(f"{self.path}: not a story of Emu3.5, or damaged, at byte {offset}: {problem}.")

    def message(self, name: str, begin: int, end: int) -> dict[str, Any]:
        """The known fields of a message.  Of a field that is no list the last value counts; messages are merged."""
        message: dict[str, Any] = {}
        for number, wire_type, value in self.fields(begin, end):
            field_name, kind = _SCHEMA[name].get(number, ("", ""))
            if wire_type != (_VARINT if kind == "int32" else _BYTES):
                continue  # unknown, or of another type: as protobuf does
            if kind.rstrip("*") in _SCHEMA:
                inner = self.message(kind.rstrip("*"), value.start, value.stop)
                if kind.endswith("*"):
                    message.setdefault(field_name, []).append(inner)
                else:
                    message.setdefault(field_name, {}).update(inner)
            elif kind == "string":
                try:
                    message[field_name] = self.data[value].decode("utf-8")
                except UnicodeDecodeError as error:
                    raise self.error(value.start + error.start, f"`{field_name}` is no UTF-8 text") from error
            elif kind:
                message[field_name] = value
        return message

    def fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int | slice]]:
        """Number, wire type and value of the fields in `data[begin:end]`; a value of bytes as its place in `data`."""
        position = begin
        while position < end:
            start = position
            key, position = self.varint(position, end)
            number, wire_type = key >> 3, key & 7
            if not 0 < number < 2**29:
                raise self.error(start, f"{number} is no field number")
            if wire_type == _VARINT:
                value, position = self.varint(position, end)
            elif wire_type in (_BYTES, _FIXED64, _FIXED32):
                length = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
                if length is None:
                    length, position = self.varint(position, end)
                if length > end - position:
                    raise self.error(start, f"field {number} has {length} bytes, but {end - position} are left")
                value = slice(position, position + length)
                position += length
            else:
                raise self.error(start, f"field {number} is of the unknown wire type {wire_type}")
            yield number, wire_type, value

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """An integer, seven bits a byte, lowest first, and the position after it."""
        value = 0
        for index, byte in enumerate(self.data[position : min(end, position + 10)]):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, position + index + 1
        raise self.error(position, "a number does not end")

    def image(self, message: dict[str, Any]) -> Image:
        """An `Image` message, decoded."""
        nothing = torch.empty(0, 0, dtype=torch.long)
        span = message.get("image_data", slice(0, 0))
        if span.start == span.stop:
            where = f"only its path, {message['image_path']!r}" if message.get("image_path") else "no image data"
            return Image(nothing, complete=False, reason=f"the file has {where}")
        name = f"the image at byte {span.start} of {self.path}"
        # Only these formats: others make PIL start programs (EPS) or are rarely tested.
        with _decoding(name):
            image = PIL.Image.open(io.BytesIO(self.data[span]), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels > self.pixels_left:
            raise ValueError(
                f"{name} has {image.height} x {image.width} pixels (height x width); with those before it that is "
                f"more than `max_pixels`={self.max_pixels}. Raise it if you trust the file."
            )
        self.pixels_left -= pixels
        return Image(nothing, to_rgb(image, name, max_input_pixels=pixels))


# ------------------------------------------------------------------------------------------------------------ writing


def save_story(story: Story, path: str | os.PathLike) -> Path:
    """Writes a story as the release does, byte for byte the same for the same contents.

    The format has one global thought, before everything else and without images, and no place for an incomplete image
    or for the thought about an image that does not follow. What does not fit is left out, with a warning; several
    global thoughts become one.

    Args:
        path: a `.pb` file, replaced as a whole. Its folder is made if it does not exist.
    Returns:
        `Path`: `path`.
    Raises:
        TypeError: if the prompt is no string.
        ValueError: if a complete image is not decoded, or there is nothing to write.
    """
    if not isinstance(story.prompt, str):
        raise TypeError(f"`prompt` must be a string, got {type(story.prompt).__name__}.")
    segments = Segments(story.segments)
    segments.check_decoded()
    references = flatten_images(story.reference_images)
    message: dict[str, Any] = {
        "clips": _clips(segments),
        "summary": "\n\n".join(segment.text for segment in segments if segment.kind == "global_thought"),
        "question": story.prompt,
        "reference_images": [
            {"image": _image_message(to_rgb(image, f"reference_images[{index}]"))}
            for index, image in enumerate(references)
        ],
    }
    data = _encode("Story", message)
    if not data:
        raise ValueError("there is nothing to write: no prompt, no reference images and no complete segment.")
    if len(data) > _MAX_BYTES:
        raise ValueError(f"the story has {len(data)} bytes, more than a protobuf file can have ({_MAX_BYTES}).")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as stream:
        stream.write(data)
    return path


def _clips(segments: Segments) -> list[dict[str, Any]]:
    """A clip for every text, with the images up to the next one; images before any text get a clip without text."""
    clips: list[dict[str, Any]] = []
    left_out: list[str] = []
    images = None

    def add_clip(text: str) -> list[dict[str, Any]]:
        segment = {"asr": text, "images": []}
        clips.append({"clip_id": f"clip_{len(clips):04d}", "segments": [segment]})
        return segment["images"]

    for before, segment in zip([None, *segments], [*segments, None], strict=True):
        follows = segment is not None and segment.kind == "image" and segment.complete
        thought = before.text if before is not None and before.kind == "image_thought" else ""
        if follows:
            images = add_clip("") if images is None else images
            images.append({"chain_of_thought": thought, "image": _image_message(segment.image)})
        elif thought:
            left_out.append("a thought about an image that does not follow")
        if segment is None or follows:
            continue
        if segment.kind == "text":
            images = add_clip(segment.text)
        elif segment.kind == "image":
            left_out.append(f"an incomplete image ({segment.reason})")
        elif segment.kind == "global_thought" and any(inner.kind == "image" for inner in segment.segments):
            left_out.append("the images of the global thought")
    if left_out:
        logger.warning("the release's format has no place for all of this answer; left out: %s.", ", ".join(left_out))
    return clips


def _image_message(image: PIL.Image.Image) -> dict[str, Any]:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return {"width": image.width, "height": image.height, "format": _PNG, "image_data": encoded.getvalue()}


def _encode(name: str, message: dict[str, Any]) -> bytes:
    """A message by its schema; fields of no content are left out, as proto3 does."""
    parts: list[bytes] = []
    for number, (field_name, kind) in _SCHEMA[name].items():
        value = message.get(field_name)
        for item in value if kind.endswith("*") else [value] if value else []:
            if kind == "int32":
                parts += [_varint(number << 3 | _VARINT), _varint(item)]
                continue
            data = item.encode() if kind == "string" else item if kind == "bytes" else _encode(kind.rstrip("*"), item)
            parts += [_varint(number << 3 | _BYTES), _varint(len(data)), data]
    return b"".join(parts)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file that takes the place of `path` when it is complete."""
    temporary = path.with_name(f".{path.name}.incomplete-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["Story", "load_story", "save_story"]
