"""What the commands of `cli.py` share: choosing a device, loading a checkpoint, showing progress."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from tqdm import tqdm
from transformers import BitsAndBytesConfig
from transformers.generation.streamers import BaseStreamer

from . import TINY
from .devices_emu35 import multiplies_bfloat16
from .image_processing_emu35 import Emu35ImageProcessor
from .image_tokens_emu35 import parse_size
from .modeling_emu35 import Emu35ForConditionalGeneration
from .processing_emu35 import Emu35Processor
from .streaming_emu35 import Event, ImageFinished, ImageProgress, ImageStarted, TextPiece, ThoughtPiece
from .tokenization_emu35 import TIKTOKEN_FILE, tokenizer_from_qwen, tokenizer_from_tiktoken

#: Stored weights that are taken to float32 without being asked for.
SMALL_BYTES = 2**30


def find_device(name: str) -> str:
    """The device that `--device` names; "auto": the fastest there is.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such kind of device. Use auto, cpu, cuda, cuda:1 or mps.") from error
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    number = 1 if device.type == "cpu" else module.device_count() if hasattr(module, "device_count") else 0
    if (device.index or 0) >= number:
        raise ValueError(f"--device {name}: torch sees {number} {device.type} devices here. Use --device auto or cpu.")
    return name


def find_dtype(name: str) -> torch.dtype | None:
    """The type that `--dtype` names; `None`: the command's own choice ("auto")."""
    return None if name == "auto" else getattr(torch, name)


def load(
    path: str | None,
    device: str = "auto",
    dtype: str = "auto",
    load_in: str | None = None,
    vision_tokenizer: str | None = None,
    tokenizer: str | None = None,
) -> tuple[Emu35ForConditionalGeneration, Emu35Processor]:
    """A model, ready to generate, and its processor.

    Args:
        path (`str` or `None`): checkpoint, ours or the release's; `None`: the tiny one that is shipped.
        device (`str`): "auto" spreads a model over all GPUs, and main memory, if it has to.
        dtype (`str`):
            "auto": as stored; float32 where products of bfloat16 are slow (see [`multiplies_bfloat16`]) and the file
            is no larger than `SMALL_BYTES`.
        load_in (`str`, *optional*): "4bit" or "8bit".
        vision_tokenizer, tokenizer (`str`, *optional*): for a checkpoint that has none.
    """
    if path is None:
        path = TINY
        if not Path(path, "config.json").is_file():
            raise FileNotFoundError(
                f"the tiny checkpoint is not in this installation ({path}). Train it with `emu35 train "
                "training/recipes/tiny.yaml`, or name another one with --model."
            )
    elif Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise FileNotFoundError(f"--model {path} has no config.json, so it is no checkpoint.")
    found = find_device(device)
    options: dict[str, Any] = {"device_map": "auto" if device == "auto" and found == "cuda" else found}
    if vision_tokenizer is not None:
        options["vision_tokenizer"] = vision_tokenizer
    if load_in is not None:
        options["quantization_config"] = _quantization(load_in, found)
    dtype = find_dtype(dtype) or ("auto" if multiplies_bfloat16(found) or not _is_small(path) else torch.float32)
    model = Emu35ForConditionalGeneration.from_pretrained(path, dtype=dtype, **options).eval()
    return model, _load_processor(path, tokenizer, model)


def _is_small(path: str) -> bool:
    """Whether a checkpoint in a folder has no more than `SMALL_BYTES`; one on the Hub counts as large."""
    return Path(path).is_dir() and sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) <= SMALL_BYTES


def _load_processor(path: str, tokenizer: str | None, model: Emu35ForConditionalGeneration) -> Emu35Processor:
    if tokenizer is None and Path(path, TIKTOKEN_FILE).is_file() and not Path(path, "tokenizer.json").is_file():
        tokenizer = path  # the release's own folder
    if tokenizer is None:
        if Path(path).is_dir() and not Path(path, "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"--model {path} has no tokenizer. Name one with --tokenizer: the folder of the release's "
                f"{TIKTOKEN_FILE}, or of a Qwen2 or Qwen3 tokenizer."
            )
        return Emu35Processor.from_pretrained(path)
    has_ranks = Path(tokenizer).is_file() or Path(tokenizer, TIKTOKEN_FILE).is_file()
    read = tokenizer_from_tiktoken if has_ranks else tokenizer_from_qwen
    vision = model.config.vision_tokenizer_config
    images = Emu35ImageProcessor() if vision is None else Emu35ImageProcessor(factor=vision.downsampling_factor)
    return Emu35Processor(images, read(tokenizer), model.config.token_layout)


def _quantization(load_in: str, device: str) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"--load-in {load_in} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class TokenProgress(BaseStreamer):
    """Moves a progress bar by the tokens of an answer; knows how many an image takes once its size is written."""

    def __init__(self, bar: tqdm, layout):
        self.bar, self.layout = bar, layout
        self.size_ids: list[int] | None = None

    def put(self, value: torch.Tensor):
        if value.ndim > 1:  # the prompt
            return
        token_id = int(value)
        if token_id == self.layout.boi_token_id:
            self.size_ids = []
        elif token_id == self.layout.img_token_id:
            height, width = parse_size(self.size_ids or [], self.layout) or (0, 0)
            self.bar.total = self.bar.n + 1 + height * (width + 1)
            self.size_ids = None
        elif self.size_ids is not None:
            self.size_ids.append(token_id)
        self.bar.update()

    def end(self):
        pass


@contextlib.contextmanager
def progress(model: Emu35ForConditionalGeneration, what: str, num_answers: int = 1) -> Iterator[TokenProgress | None]:
    """A progress bar on a terminal's stderr while `generate` runs; yields the streamer to give it.

    A streamer sees one answer only, so there is none for several: then the passes through the decoder move the bar.
    """
    with tqdm(desc=what, unit=" tokens", disable=None, leave=False) as bar:
        if num_answers == 1:
            yield TokenProgress(bar, model.config.token_layout)
            return
        hook = model.model.register_forward_hook(lambda *_: bar.update(num_answers) and None)
        try:
            yield None
        finally:
            hook.remove()


#: What a model writes must not steer the terminal: no control characters but tab and new line.
_STEERING = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_DIM, _RESET = "\033[2m", "\033[0m"


class StoryDisplay:
    """Shows the events of a streamer on the terminal: thoughts dimmed, the rows of an image as they come.

    Without a terminal there is no dimming and no progress.

    Args:
        save_image: writes an image, given its number from 1 on, and returns where it is.
        num_images (`int`): images of earlier answers.
        out (`TextIO`, *optional*): default: standard output.
    """

    def __init__(self, save_image: Callable[[int, Image.Image], Path], num_images: int = 0, out: TextIO | None = None):
        self.save_image, self.num_images = save_image, num_images
        self.out = sys.stdout if out is None else out
        self.can_dim = self.out.isatty() and not os.environ.get("NO_COLOR")
        self.bar: tqdm | None = None
        self.speaking: type[Event] | None = None
        self.line_is_open = False

    def __enter__(self) -> "StoryDisplay":
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self._end_line()

    def show(self, event: Event):
        """Shows one event; writes the image that it brings."""
        if isinstance(event, (TextPiece, ThoughtPiece)):
            self._speak(event)
        elif isinstance(event, ImageStarted):
            self._end_line()
            self.bar = tqdm(
                desc=f"image {self._number(event)}",
                total=event.token_height,
                bar_format="{desc}: {n_fmt}/{total_fmt} rows",
                disable=None,
                leave=False,
            )
        elif isinstance(event, ImageProgress):
            if self.bar is not None:
                self.bar.update(event.num_rows - self.bar.n)
        else:
            self.__exit__()
            if isinstance(event, ImageFinished):
                self._write(self._outcome(event) + "\n")

    def _number(self, event: ImageStarted | ImageFinished) -> int:
        return self.num_images + event.index + 1

    def _outcome(self, event: ImageFinished) -> str:
        if not event.complete:
            return f"image {self._number(event)} is incomplete: {event.reason}"
        path = self.save_image(self._number(event), event.image)
        return f"{path}: {event.image.width} x {event.image.height} pixels"

    def _speak(self, piece: TextPiece | ThoughtPiece):
        text = piece.text.translate(_STEERING)
        if type(piece) is not self.speaking:
            self._end_line()
            text = text.lstrip()
        if text:
            self.speaking, self.line_is_open = type(piece), not text.endswith("\n")
            dim = self.can_dim and isinstance(piece, ThoughtPiece)
            self._write(f"{_DIM}{text}{_RESET}" if dim else text)

    def _end_line(self):
        if self.line_is_open:
            self._write("\n")
        self.speaking, self.line_is_open = None, False

    def _write(self, text: str):
        encoding = self.out.encoding or "utf-8"  # which may lack characters
        self.out.write(text.encode(encoding, "replace").decode(encoding))
        self.out.flush()


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures as one sheet, about as many columns as rows."""
    columns = next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (max(getattr(picture, side) for picture in pictures) for side in ("width", "height"))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
