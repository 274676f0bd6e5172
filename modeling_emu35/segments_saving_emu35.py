"""Answers as files to look at: a web page, Markdown, PNGs and, with imageio, a video."""

import base64
import html
import io
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .image_processing_emu35 import flatten_images, to_rgb
from .saving_emu35 import _make_durable, _replace, _staging_directory, _sync, check_output_directory
from .segments_emu35 import Segment, Segments

logger = logging.getLogger(__name__)

#: By this line a page is known as one of ours, whose folder may be written again.
_GENERATOR = '<meta name="generator" content="emu35">'
_OUR_FILES = re.compile(r"index\.html|story\.(md|mp4)|(image|reference)-\d{2,}(-incomplete)?\.png")
#: Pictures whose longer side is below this many pixels are shown enlarged, by a whole factor and with sharp edges.
_SMALL = 256
#: The page holds larger pictures as JPEG: a story of 1024 x 1024 pixels as PNG is too much for a phone.
_LARGE = 512
_READING_SPEED = 15  # characters a second
_VIDEO_RATE = 10  # frames a second: players stumble over less
_MAX_CAPTION_LINES = 6


def save_segments(
    segments: Segments,
    directory: str | os.PathLike,
    title: str | None = None,
    prompt: str | None = None,
    fps: float = 1,
    reference_images: Sequence[Any] = (),
) -> Path:
    """Writes an answer as something to look at.

    The folder then holds `index.html`, which needs no other file, `story.md`, the images as `image-01.png`, ... (those
    of the prompt as `reference-01.png`, ...) and, where imageio and imageio-ffmpeg are installed, `story.mp4`: every
    complete image that is not part of a thought, with the text before it as a caption.

    The files appear when all of them are complete. Those of an earlier save are replaced; others are left alone.

    Args:
        segments (`Segments`): with decoded images. Incomplete ones are shown as far as they go, with the reason.
        directory: is made if it does not exist.
        title (`str`, *optional*): heading of the page.
        prompt (`str`, *optional*): what was asked; stands before the answer.
        fps (`float`, defaults to 1):
            images a second in the video. One with a long caption stays until it can be read.
        reference_images: images of the prompt, of any kind the processor reads.
    Returns:
        `Path`: `directory`.
    Raises:
        ValueError: if a complete image is not decoded, or `fps` is not positive.
        FileExistsError: if `directory` holds files of these names that are not from an earlier save.
        NotADirectoryError: if `directory` is a file.
    """
    for name, value in (("title", title), ("prompt", prompt)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"`{name}` must be a string, got {type(value).__name__}.")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= 60:
        raise ValueError(f"`fps` must be a number above 0 and at most 60, got {fps!r}.")
    segments = Segments(segments)
    segments.check_decoded()
    references = [
        to_rgb(image, f"reference_images[{index}]") for index, image in enumerate(flatten_images(reference_images))
    ]
    target = check_output_directory(directory, overwrite=True, name="directory")
    existed = target.exists()
    earlier = [entry.name for entry in target.iterdir() if _OUR_FILES.fullmatch(entry.name)] if existed else []
    pages = _pictures_of_prompt(references), _pictures(segments, prompt)

    if earlier and not _is_ours(target):
        raise FileExistsError(
            f"`directory`={str(directory)!r} holds {', '.join(sorted(earlier))}, but not from an earlier save. "
            "Nothing was touched; choose another folder."
        )
    staging = _staging_directory(target, "save")
    try:
        for picture in [*pages[0], *pages[1].values()]:
            picture.image.save(staging / picture.name)
        for name, write in (("index.html", _html_page), ("story.md", _markdown_page)):
            text = write(segments, title, prompt, *pages)
            (staging / name).write_text(text, encoding="utf-8", newline="\n", errors="replace")
        _write_video(staging / "story.mp4", segments, fps)
        new = {entry.name for entry in staging.iterdir()}
        _make_durable(staging)
        _replace(staging, target, remove=[name for name in earlier if name not in new])
        _sync(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()
    return Path(directory)


def _is_ours(target: Path) -> bool:
    page = target / "index.html"
    if not page.is_file():
        return False
    with page.open("rb") as stream:
        return _GENERATOR.encode() in stream.read(1024)


# ----------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Picture:
    name: str
    alt: str
    image: PIL.Image.Image


def _walk(segments: Sequence[Segment]) -> Iterator[Segment]:
    for segment in segments:
        yield segment
        if segment.kind == "global_thought":
            yield from _walk(segment.segments)


def _pictures(segments: Segments, prompt: str | None) -> dict[int, _Picture]:
    """File names and descriptions of the images that have pixels, by `id` of the segment."""
    pictures = {}
    number, last_text = 0, prompt or ""
    for segment in _walk(segments):
        if segment.kind == "text":
            last_text = segment.text
        elif segment.kind == "image":
            number += 1
            if segment.image is not None:
                name = f"image-{number:02d}{'' if segment.complete else '-incomplete'}.png"
                alt = _shorten(last_text, 250) or f"Image {number}"
                pictures[id(segment)] = _Picture(name, alt, to_rgb(segment.image, f"image {number}"))
    return pictures


def _pictures_of_prompt(references: list[PIL.Image.Image]) -> list[_Picture]:
    return [
        _Picture(f"reference-{number:02d}.png", f"Image {number} of the prompt", image)
        for number, image in enumerate(references, start=1)
    ]


def _shorten(text: str, length: int) -> str:
    """On one line, of at most `length` signs.  `textwrap.shorten` needs words, which not every script has."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def _enlargement(image: PIL.Image.Image) -> int:
    return max(1, 2 * _SMALL // max(image.size)) if max(image.size) < _SMALL else 1


# ------------------------------------------------------------------------------------------------- page and Markdown


def _render(segments: Sequence[Segment], pictures: dict[int, _Picture], page: type) -> Iterator[str]:
    """The blocks of a page.  `page`: how they are written, [`_Html`] or [`_Markdown`]."""
    for segment in segments:
        if segment.kind == "text":
            yield page.text(segment.text)
        elif segment.kind == "image":
            if id(segment) in pictures:
                yield page.picture(pictures[id(segment)])
            if not segment.complete:
                yield page.note(f"This image is incomplete: {segment.reason}.")
        else:
            whole = segment.kind == "global_thought"
            summary = "Thoughts on the whole answer" if whole else "Thoughts on the next image"
            inner = _render(segment.segments, pictures, page) if whole else [page.text(segment.text)]
            yield page.thought(summary if segment.complete else f"{summary} (unfinished)", list(inner))


class _Html:
    @staticmethod
    def text(text: str) -> str:
        return f'<p dir="auto">{html.escape(text.strip())}</p>'

    @staticmethod
    def picture(picture: _Picture) -> str:
        image, scale = picture.image, _enlargement(picture.image)
        encoded = io.BytesIO()
        kind = "JPEG" if max(image.size) >= _LARGE else "PNG"
        image.save(encoded, kind, **({"quality": 92} if kind == "JPEG" else {}))
        data = base64.b64encode(encoded.getvalue()).decode("ascii")
        return (
            f'<figure><img class="{"small" if scale > 1 else "large"}" width="{scale * image.width}" '
            f'height="{scale * image.height}" alt="{html.escape(picture.alt)}" '
            f'src="data:image/{kind.lower()};base64,{data}"></figure>'
        )

    @staticmethod
    def note(text: str) -> str:
        return f'<p class="note" role="note">{html.escape(text)}</p>'

    @staticmethod
    def thought(summary: str, inner: list[str]) -> str:
        return "\n".join([f"<details><summary>{html.escape(summary)}</summary>", *inner, "</details>"])


class _Markdown:
    @staticmethod
    def text(text: str) -> str:
        lines = [_escape_markdown(line.strip()) for line in text.strip().splitlines()]
        # A line break inside a paragraph needs a mark.
        pairs = itertools.zip_longest(lines, lines[1:], fillvalue="")
        return "\n".join(f"{line}\\" if line and following else line for line, following in pairs)

    @staticmethod
    def picture(picture: _Picture) -> str:
        return f"![{_escape_markdown(picture.alt)}]({picture.name})"

    @staticmethod
    def note(text: str) -> str:
        return f"*{_escape_markdown(text)}*"

    @staticmethod
    def thought(summary: str, inner: list[str]) -> str:
        return "\n\n".join([f"<details><summary>{html.escape(summary)}</summary>", *inner, "</details>"])


def _escape_markdown(line: str) -> str:
    """One line that reads as it stands, whatever signs of Markdown or HTML it holds."""
    line = re.sub(r"([\\`*_\[\]~|$]|^[#+=-])", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])", r"\1\\\2", line)
    return html.escape(line, quote=False)


def _html_page(
    segments: Segments,
    title: str | None,
    prompt: str | None,
    references: list[_Picture],
    pictures: dict[int, _Picture],
) -> str:
    name = title or _shorten(prompt or "", 80) or "Emu3.5"
    asked = ([_Html.text(prompt)] if prompt else []) + [_Html.picture(picture) for picture in references]
    blocks = [
        *([f'<h1 dir="auto">{html.escape(title)}</h1>'] if title else []),
        *(['<section class="prompt" aria-label="Prompt">', *asked, "</section>"] if asked else []),
        *(_render(segments, pictures, _Html) if segments else [_Html.note("The answer is empty.")]),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="">\n<head>\n<meta charset="utf-8">',
            _GENERATOR,
            # Nothing is fetched and nothing runs, whatever the texts hold.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            *blocks,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _markdown_page(
    segments: Segments,
    title: str | None,
    prompt: str | None,
    references: list[_Picture],
    pictures: dict[int, _Picture],
) -> str:
    blocks = [f"# {_escape_markdown(' '.join(title.split()))}"] if title else []
    if prompt:
        blocks.append("\n".join(f"> {line}".rstrip() for line in _Markdown.text(prompt).splitlines()))
    blocks += [_Markdown.picture(picture) for picture in references]
    blocks += _render(segments, pictures, _Markdown) if segments else [_Markdown.note("The answer is empty.")]
    return "\n\n".join(blocks) + "\n"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1a; --paper: #fdfdfc; --shade: #f1f1ee; --line: #d4d4cf; --dim: #5e5e59 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e7e3; --paper: #171716; --shade: #232321; --line: #40403c; --dim: #a5a59e }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 1.0625rem/1.6 system-ui, sans-serif }
main { max-width: 42rem; margin: 0 auto; padding: 1rem 1rem 3rem }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
p { margin: 1rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1rem 0 2rem }
img { display: block; max-width: 100%; height: auto; border-radius: .25rem }
img.small { image-rendering: pixelated; border-radius: 0 }
.prompt { margin: 1rem 0 2rem; padding: .1rem 1rem; border-left: .25rem solid var(--line); color: var(--dim) }
details { margin: 1rem 0; padding: .5rem 1rem; background: var(--shade); border-radius: .5rem }
summary { cursor: pointer; color: var(--dim) }
.note { padding: .5rem 1rem; border: 1px dashed var(--line); border-radius: .5rem; color: var(--dim) }
"""


# -------------------------------------------------------------------------------------------------------------- video


def _write_video(path: Path, segments: Segments, fps: float) -> None:
    """Writes a video of the images, if there are any and imageio can; a failure costs only the video."""
    frames = _frames(segments)
    if not frames:
        return
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401 - what imageio writes videos with
    except ImportError:
        logger.info("no story.mp4 is written: that needs `pip install imageio imageio-ffmpeg`.")
        return
    rate = max(_VIDEO_RATE, fps)
    try:
        with imageio.get_writer(
            path, format="FFMPEG", fps=rate, codec="libx264", pixelformat="yuv420p", macro_block_size=2
        ) as writer:
            for (_, caption), drawn in zip(frames, _draw_frames(frames), strict=True):
                seconds = max(1 / fps, len(caption) / _READING_SPEED)
                for _ in range(max(1, round(rate * seconds))):
                    writer.append_data(drawn)
    except (OSError, RuntimeError) as error:  # ffmpeg is missing, has no H.264, or died
        path.unlink(missing_ok=True)
        logger.warning("story.mp4 could not be written: %s", error)


def _frames(segments: Segments) -> list[tuple[PIL.Image.Image, str]]:
    """Images and their captions; text after the last image comes with that image once more."""
    frames, caption = [], ""
    for segment in segments:
        if segment.kind == "text":
            caption = f"{caption} {segment.text}"
        elif segment.kind == "image" and segment.complete:
            frames.append((segment.image, " ".join(caption.split())))
            caption = ""
    if caption.strip() and frames:
        frames.append((frames[-1][0], " ".join(caption.split())))
    return frames


def _draw_frames(frames: list[tuple[PIL.Image.Image, str]]) -> Iterator[np.ndarray]:
    """Frames `(H, W, 3)` of one size with even sides, which H.264 asks for: captions below the images."""
    images = []
    for image, _ in frames:
        scale = _enlargement(image)
        images.append(image.convert("RGB").resize((scale * image.width, scale * image.height), PIL.Image.NEAREST))
    width, height = (max(sides) + max(sides) % 2 for sides in zip(*(image.size for image in images), strict=True))
    font = _font(max(16, width // 30), "".join(caption for _, caption in frames))
    line_height = 1.4 * font.size
    margin = font.size
    captions = [_wrap(caption, font, width - 2 * margin) for _, caption in frames]
    lines = max(map(len, captions))
    foot = 2 * round((lines * line_height + 2 * margin) / 2) if lines else 0
    for image, caption in zip(images, captions, strict=True):
        frame = PIL.Image.new("RGB", (width, height + foot), "#2b2b2b")
        frame.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        draw = PIL.ImageDraw.Draw(frame)
        for number, line in enumerate(caption):
            draw.text((margin, height + margin + number * line_height), line, fill="white", font=font)
        yield np.asarray(frame)


def _font(size: int, text: str) -> PIL.ImageFont.FreeTypeFont:
    """A font for `text`.  The one in PIL has Latin letters only."""
    names = ("NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "wqy-microhei.ttc", "DejaVuSans.ttf")
    for name in names if not text.isascii() else ():
        try:
            return PIL.ImageFont.truetype(name, size)
        except OSError:
            continue
    return PIL.ImageFont.load_default(size)


def _wrap(text: str, font: PIL.ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words or, where there are none, between signs; the first few."""
    lines = [""]
    for piece in re.findall(r"\s+|[!-\u2e7f]+|.", text):
        parts = [piece] if font.getlength(piece) <= width else piece  # a word longer than a line
        for part in parts:
            if font.getlength(lines[-1] + part) > width and lines[-1]:
                lines.append("")
            lines[-1] += part if lines[-1] else part.lstrip()
    lines = [line.rstrip() for line in lines if line.strip()]
    if len(lines) > _MAX_CAPTION_LINES:
        lines[_MAX_CAPTION_LINES - 1 :] = [f"{lines[_MAX_CAPTION_LINES - 1]} …"]
    return lines


__all__ = ["save_segments"]
