"""The `emu35` command.

Nothing heavy is imported before a command is known to be well written: the package and torch come in the commands
themselves. So this module imports nothing of ours at the top (and is started by `emu35_launcher`, which knows why).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()

EPILOG = "Set EMU35_DEBUG=1, or pass --debug, to see where an error comes from."


class _Parser(argparse.ArgumentParser):
    """Answers mistakes with one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        `int`: exit status: 0; 2 for a user's mistake, which is told in one line; 130 when interrupted.
    """
    parser = _build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "convert":  # has a parser of its own
        args.arguments = rest
    elif rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug or os.environ.get("EMU35_DEBUG") or not _is_users_mistake(error):
            raise
        print(f"emu35 {args.command}: error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def _is_users_mistake(error: Exception) -> bool:
    """The errors by which the library refuses what it is given."""
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, (ValueError, OSError, StrictDataclassError)) or type(error).__name__ == "OutOfMemoryError"


def _in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        message += " Try --load-in 4bit, a smaller --height and --width, or fewer --num-images."
    return message or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ options


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="emu35", description="Emu3.5: text and images in one next-token model.", epilog=EPILOG)
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def add(name: str, run, summary: str, example: str, **kwargs) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}\n\n{EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        command.set_defaults(run=run, parser=command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    _add_generate(add)
    _add_describe(add)
    add(
        "convert",
        _convert,
        "turn the release's weights and tokenizer into one safetensors checkpoint",
        "emu35 convert --model Emu3.5 --vision-tokenizer Emu3.5-VisionTokenizer --tokenizer Emu3.5 --output emu35-34b",
        add_help=False,
    )
    _add_train(add)
    _add_eval(add)
    _add_bench(add)
    return parser


def _add_generate(add):
    command = add(
        "generate",
        _generate,
        "make images from a sentence, or from images and an instruction",
        'emu35 generate "a small red circle above a large blue square" -o out.png',
    )
    command.add_argument("prompt", help="what the image shows, or what to do with the reference images")
    command.add_argument("-o", "--output", default="out.png", metavar="FILE", help="image file (default: out.png)")
    command.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="reference image; repeat it for several (task x2i)"
    )
    command.add_argument("--task", choices=("t2i", "x2i"), help="default: x2i with reference images, else t2i")
    command.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    command.add_argument("--height", type=int, metavar="PIXELS", help="default: the checkpoint's")
    command.add_argument("--width", type=int, metavar="PIXELS")
    command.add_argument("--aspect-ratio", metavar="W:H", help='like 16:9; "auto": the model chooses; "reference"')
    command.add_argument("--guidance-scale", type=float, metavar="X", help="1: off; default: the checkpoint's")
    command.add_argument("--image-guidance-scale", type=float, metavar="X", help="second scale, for reference images")
    command.add_argument("--image-top-k", type=int, metavar="K", help="0: off")
    command.add_argument("--image-top-p", type=float, metavar="P")
    command.add_argument("--image-temperature", type=float, metavar="T")
    command.add_argument(
        "--num-images", type=_positive, default=1, metavar="N", help="as FILE-1, FILE-2, ...; image i has the seed + i - 1"
    )
    command.add_argument("--grid", action="store_true", help="put several images side by side into one file")
    _add_model_options(command)


def _add_describe(add):
    command = add(
        "describe",
        _describe,
        "describe an image, or answer a question about it",
        'emu35 describe out.png --question "what color is the circle?"',
    )
    command.add_argument("image", help="image file")
    command.add_argument("--question", default="describe the image.", metavar="TEXT", help="default: %(default)s")
    command.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--temperature", type=float, metavar="T", help="sample the answer; default: always the likeliest token"
    )
    _add_model_options(command)


def _add_train(add):
    command = add(
        "train",
        _train,
        "train a model from nothing, or go on with a run that was stopped",
        "emu35 train training/recipes/tiny.yaml",
    )
    command.add_argument("recipe", help="YAML file; those of this project are in training/recipes/")


def _add_eval(add):
    command = add(
        "eval",
        _eval,
        "measure a model on scenes that training never showed",
        "emu35 eval --task t2i --num 500 --seed 0 --output results.json",
    )
    command.add_argument("--task", choices=("t2i", "vqa", "reconstruction"), default="t2i", help="default: %(default)s")
    command.add_argument("--num", type=_positive, default=500, metavar="N", help="scenes (default: %(default)s)")
    command.add_argument("--guidance-scale", type=float, metavar="X", help="default: the checkpoint's")
    command.add_argument("--image-top-k", type=int, metavar="K", help="default: the checkpoint's")
    command.add_argument("--output", metavar="FILE", help="write the results as JSON")
    _add_model_options(command)


def _add_bench(add):
    command = add(
        "bench",
        _bench,
        "measure speed and memory against the straightforward way",
        "emu35 bench image vision --output bench.json",
    )
    command.add_argument("parts", nargs="*", metavar="PART", help="image, vision, loss, start (default: all)")
    command.add_argument("--size", choices=("tiny", "34b"), default="tiny", help="34b: the released size, on a GPU")
    command.add_argument("--quick", action="store_true", help="smaller inputs, once; targets are not judged")
    command.add_argument("--output", metavar="FILE", help="write the results as JSON")
    _add_seed(command)
    _add_device(command)


def _add_model_options(command: argparse.ArgumentParser):
    group = command.add_argument_group("model")
    group.add_argument("--model", metavar="PATH", help="checkpoint, ours or the release's (default: the tiny one shipped)")
    group.add_argument("--vision-tokenizer", metavar="DIR", help="for a checkpoint that has none (the release's)")
    group.add_argument("--load-in", choices=("4bit", "8bit"), help="quantise the weights (needs bitsandbytes)")
    _add_device(group)
    _add_seed(group)


def _add_device(group):
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")


def _add_seed(group):
    group.add_argument(
        "--seed", type=_seed, default=0, help='default 0: the same command, the same result. "random": a new one each time'
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if text == "random":
        return int.from_bytes(os.urandom(4), "big")
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f'must be a whole number from 0 on, or "random", got {text!r}')
    return int(text)


# ----------------------------------------------------------------------------------------------------------- commands


def _generate(args: argparse.Namespace):
    output = _image_path(args.output)
    task = args.task or ("x2i" if args.image else "t2i")
    imported = time.perf_counter()
    model, processor = _load(args)
    loaded = time.perf_counter()
    import torch

    images = args.image or None
    inputs = processor(text=args.prompt, images=images, task=task)
    if args.negative_prompt is not None:
        negative = processor(text=args.negative_prompt, images=images, task=task)
        inputs["negative_prompt_ids"] = negative["input_ids"]
        inputs["negative_prompt_attention_mask"] = negative["attention_mask"]
    settings = {
        name: getattr(args, name)
        for name in (
            "height",
            "width",
            "aspect_ratio",
            "guidance_scale",
            "image_guidance_scale",
            "image_top_k",
            "image_top_p",
            "image_temperature",
        )
        if getattr(args, name) is not None
    }
    if args.aspect_ratio is not None:
        settings = {"height": None, "width": None, **settings}  # instead of the checkpoint's size
    # One generator an image, so that none depends on how many are made.
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(args.num_images)]
    with _progress(model, args.num_images) as streamer:
        result = model.generate(
            **inputs.to(model.device),
            task=task,
            generation_mode="image",
            num_return_sequences=args.num_images,
            generator=generators,
            streamer=streamer,
            **settings,
        )
    pictures = []
    for segments in processor.post_process_multimodal_output(result, vision_tokenizer=model):
        made = [segment for segment in segments if segment.kind == "image"]
        if not made or not made[-1].complete or made[-1].image is None:
            reason = made[-1].reason if made else "the answer holds none"
            raise ValueError(f"no complete image was made ({reason}). Is `max_new_tokens` of the checkpoint too small?")
        pictures.append(made[-1].image)
    if args.grid and len(pictures) > 1:
        pictures = [_side_by_side(pictures)]
    paths = [output]
    if len(pictures) > 1:
        paths = [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(1, len(pictures) + 1)]
    for path, picture in zip(paths, pictures, strict=True):
        _write(path, lambda temporary, picture=picture: picture.save(temporary))
        print(f"{path}: {picture.width} x {picture.height} pixels")
    now = time.perf_counter()
    print(
        f"seed {args.seed}; {now - _STARTED:.1f} s in all: {loaded - imported:.1f} s to load, "
        f"{now - loaded:.1f} s to make {_count(args.num_images, 'image')}"
    )


def _describe(args: argparse.Namespace):
    model, processor = _load(args)
    import torch

    inputs = processor(text=args.question, images=[args.image], task="vqa")
    settings: dict[str, Any] = {"do_sample": False}
    if args.temperature is not None:
        settings = {"do_sample": True, "temperature": args.temperature}
    with _progress(model, 1, "answer") as streamer:
        result = model.generate(
            **inputs.to(model.device),
            task="vqa",
            generation_mode="text",
            max_new_tokens=args.max_new_tokens,
            generator=torch.Generator().manual_seed(args.seed),
            streamer=streamer,
            **settings,
        )
    segments = processor.post_process_multimodal_output(result)[0]
    print("".join(segment.text for segment in segments if segment.kind == "text").strip())


def _convert(args: argparse.Namespace):
    from emu35.convert_emu35_to_hf import add_arguments, convert

    raise NotImplementedError((add_arguments, convert))


def _train(args: argparse.Namespace):
    from emu35.training.train import train

    train(args.recipe)


def _eval(args: argparse.Namespace):
    from emu35.training.evaluate import evaluate

    raise NotImplementedError(evaluate)


def _bench(args: argparse.Namespace):
    output = None if args.output is None else _file_path(args.output)
    import torch
    from emu35.bench_emu35 import format_results, run_benchmark

    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    device = _device(args.device)
    results = run_benchmark(args.parts, args.size, args.quick, device, dtype, args.seed)
    print(format_results(results))
    if output is not None:
        _write_json(output, results)


# --------------------------------------------------------------------------------------------------------- their parts


def _load(args: argparse.Namespace):
    """The model, ready to generate, and its processor."""
    import emu35
    import torch
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    path = emu35.TINY if args.model is None else args.model
    if args.model is None and not Path(path, "config.json").is_file():
        raise FileNotFoundError(
            f"the tiny checkpoint is not in this installation ({path}). Train it with `emu35 train "
            "training/recipes/tiny.yaml`, or name another one with --model."
        )
    options: dict[str, Any] = {"dtype": "auto" if args.dtype == "auto" else getattr(torch, args.dtype)}
    device = _device(args.device)
    options["device_map"] = "auto" if args.device == "auto" and device.startswith("cuda") else device
    if args.vision_tokenizer is not None:
        options["vision_tokenizer"] = args.vision_tokenizer
    if args.load_in is not None:
        options["quantization_config"] = _quantization(args.load_in)
    model = emu35.Emu35ForConditionalGeneration.from_pretrained(path, **options).eval()
    return model, _load_processor(path)


def _load_processor(path: str):
    import emu35
    from emu35.tokenization_emu35 import TIKTOKEN_FILE, tokenizer_from_tiktoken

    if Path(path, TIKTOKEN_FILE).is_file() and not Path(path, "tokenizer.json").is_file():  # the release's own folder
        return emu35.Emu35Processor(emu35.Emu35ImageProcessor(), tokenizer_from_tiktoken(path))
    return emu35.Emu35Processor.from_pretrained(path)


def _quantization(load_in: str):
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ValueError(f"--load-in {load_in} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such kind of device. Use auto, cpu, cuda, cuda:1 or mps.") from error
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise ValueError(f"--device {name}: there is none on this machine, as far as torch can see. Use auto or cpu.")
    return name


@contextmanager
def _progress(model, num_answers: int, what: str = "image"):
    """A progress bar over tokens on a terminal's stderr; yields the streamer that feeds it.

    transformers' streamers see one answer only; a batch feeds the bar by its passes through the decoder instead.
    """
    from emu35.image_tokens_emu35 import parse_size
    from tqdm import tqdm
    from transformers.generation.streamers import BaseStreamer

    layout = model.config.token_layout

    class Progress(BaseStreamer):
        def __init__(self, bar):
            self.bar, self.size_ids = bar, None

        def put(self, value):
            if value.ndim > 1:
                return  # the prompt
            token_id = int(value)
            if token_id == layout.boi_token_id:
                self.size_ids = []
            elif token_id == layout.img_token_id and self.size_ids is not None:
                height, width = parse_size(self.size_ids, layout) or (0, 0)
                self.bar.total = self.bar.n + 1 + height * (width + 1)
                self.size_ids = None
            elif self.size_ids is not None:
                self.size_ids.append(token_id)
            self.bar.update()

        def end(self):
            pass

    with tqdm(desc=what, unit=" tokens", disable=None, leave=False) as bar:
        if num_answers == 1:
            yield Progress(bar)
            return
        hook = model.model.register_forward_hook(lambda *_: bar.update(num_answers))
        try:
            yield None
        finally:
            hook.remove()


def _side_by_side(pictures: list):
    from PIL import Image

    columns = next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (max(getattr(picture, side) for picture in pictures) for side in ("width", "height"))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _file_path(name: str) -> Path:
    """Where a file will be written, checked before the work that makes it."""
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(f"--output {name} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {name}: there is no folder {path.parent}. Make it first.")
    return path


def _image_path(name: str) -> Path:
    from PIL import Image

    path = _file_path(name)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--output {name}: {path.suffix or 'no ending'} is no kind of image. Use .png, .jpg or .webp.")
    return path


def _write(path: Path, write):
    """A file that is whole or, if that fails (a full disk), the old one."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, values: Any):
    _write(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))
    print(f"{path}: written")


if __name__ == "__main__":
    sys.exit(main())
