"""The `emu35` command.

Nothing heavy is imported before a command is known to be well written: the package and torch come in the commands
themselves. So this module imports nothing of ours at the top (and is started by `emu35_launcher`, which knows why).
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()

# Those of `training.evaluate`, which is too heavy to import before it is wanted; a test holds them together.
_EVAL_TASKS = (
    "t2i", "vqa", "reconstruction", "x2i", "story", "howto", "explore", "vla", "multi_vqa", "chat",
)  # fmt: skip
_EVAL_WITHOUT_IMAGES = ("vqa", "multi_vqa", "reconstruction")
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
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 0
    if args.command == "convert":  # has a parser of its own
        args.arguments = rest
    elif rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("emu35").setLevel(logging.INFO)
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
            allow_abbrev=False,
            **kwargs,
        )
        command.set_defaults(run=run, parser=command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    _add_generate(add)
    _add_describe(add)
    _add_story(add)
    add(
        "convert",
        _convert,
        "turn the release's weights and tokenizer into one safetensors checkpoint",
        "emu35 convert --model Emu3.5 --vision-tokenizer Emu3.5-VisionTokenizer --tokenizer Emu3.5 --output emu35-34b",
        add_help=False,
    )
    _add_prepare(add)
    _add_train(add)
    _add_distill(add)
    _add_eval(add)
    _add_bench(add)
    _add_demo(add)
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
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="reference image; repeat it for several (task x2i)",
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
        "--num-images",
        type=_positive,
        default=1,
        metavar="N",
        help="as FILE-1, FILE-2, ...; image i has the seed + i - 1",
    )
    command.add_argument("--grid", action="store_true", help="put several images side by side into one file")
    _add_image_decoder(command)
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


def _add_story(add):
    command = add(
        "story",
        _story,
        "make an answer of text and images, shown while it comes and saved as a page",
        'emu35 story "a small red circle travels on a white background. tell the story in three pictures." -o story',
    )
    command.add_argument("prompt", help="what to tell, to explain, to explore or to do")
    command.add_argument(
        "-o", "--output", default="story", metavar="DIR", help="folder for the page and its images (default: story)"
    )
    command.add_argument(
        "--task", choices=("story", "howto", "explore", "vla", "chat"), default="story", help="default: %(default)s"
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="what the answer starts from; repeat it for several",
    )
    command.add_argument("--max-images", type=_positive, metavar="N", help="default: the checkpoint's")
    command.add_argument("--max-new-tokens", type=_positive, metavar="N", help="default: the checkpoint's")
    command.add_argument("--guidance-scale", type=float, metavar="X", help="1: off; default: the checkpoint's")
    command.add_argument(
        "--interactive",
        action="store_true",
        help="go on after each answer with the next line of standard input; an empty one ends",
    )
    _add_image_decoder(command)
    _add_model_options(command)


def _add_prepare(add):
    command = add(
        "prepare",
        _prepare,
        "turn pictures with captions, edits, questions or stories into token sequences for training",
        "emu35 prepare photos/ --out prepared/photos",
    )
    command.add_argument("data", help="folder of images with captions, .jsonl, .parquet, or dataset on the Hub")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the files; a recipe names it")
    command.add_argument("--model", metavar="PATH", help="that will be trained (default: the tiny one shipped)")
    command.add_argument("--vision-tokenizer", metavar="DIR", help="for a checkpoint that has none")
    command.add_argument("--task", help="of rows that do not name one (default: what fits the row)")
    command.add_argument("--image-area", type=_positive, metavar="PIXELS", help="about; default: the task's own")
    command.add_argument("--max-length", type=_positive, metavar="N", help="tokens; longer rows are left out")
    command.add_argument("--split", default="train", help="of a dataset (default: %(default)s)")
    command.add_argument("--streaming", action="store_true", help="do not download a dataset first")
    command.add_argument("--rows-per-file", type=_positive, default=1000, metavar="N", help="default: %(default)s")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def _add_train(add):
    command = add(
        "train",
        _train,
        "train a model from nothing or adapt one, or go on with a run that was stopped",
        "emu35 train training/recipes/tiny.yaml",
    )
    command.add_argument("recipe", help="YAML file; those of this project are in training/recipes/")
    command.add_argument("--output", metavar="DIR", help="logs and checkpoints, instead of where the recipe says")
    command.add_argument("--export", metavar="DIR", help="the finished model, instead of where the recipe says")
    command.add_argument("--restart", action="store_true", help="start from nothing, whatever the output folder holds")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, auto")
    command.add_argument("--dry-run", action="store_true", help="fine-tuning, GRPO: print the plan and its memory")


def _add_distill(add):
    command = add(
        "distill",
        _distill,
        "make a model's own answers into training sequences, or go on with a run that was stopped",
        "emu35 distill --task t2i --num 20000 --image-top-k 1 --out runs/distilled",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the files; a recipe names it")
    command.add_argument("--task", default="t2i", help="one whose answers have images (default: %(default)s)")
    command.add_argument("--num", type=_positive, default=20000, metavar="N", help="prompts (default: %(default)s)")
    command.add_argument("--prompts", metavar="FILE", help="t2i: one a line, instead of captions of the tiny world")
    command.add_argument(
        "--full-captions",
        type=float,
        default=0.25,
        metavar="X",
        help="t2i: share of captions that fix the whole scene (default: %(default)s)",
    )
    command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: %(default)s")
    command.add_argument("--guidance-scale", type=float, metavar="X", help="default: the checkpoint's")
    command.add_argument("--image-top-k", type=int, metavar="K", help="default: the checkpoint's")
    command.add_argument("--image-top-p", type=float, metavar="P", help="default: the checkpoint's")
    command.add_argument("--image-temperature", type=float, metavar="T", help="default: the checkpoint's")
    _add_model_options(command)


def _add_eval(add):
    command = add(
        "eval",
        _eval,
        "measure a model on scenes that training never showed",
        "emu35 eval --task t2i --num 500 --seed 0 --output results.json",
    )
    command.add_argument("--task", choices=_EVAL_TASKS, default="t2i", help="default: %(default)s")
    command.add_argument(
        "--num", type=_positive, default=600, metavar="N", help="scenes or episodes (default: %(default)s)"
    )
    command.add_argument(
        "--num-held-out",
        type=_positive,
        metavar="N",
        help="scenes with unseen pairs of colour and shape (default: N/4)",
    )
    command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: %(default)s")
    command.add_argument("--guidance-scale", type=float, metavar="X", help="default: the checkpoint's")
    command.add_argument("--image-top-k", type=int, metavar="K", help="default: the checkpoint's")
    command.add_argument("--image-top-p", type=float, metavar="P", help="default: the checkpoint's")
    command.add_argument(
        "--sweep", type=_sweep, metavar="NAME=V,V,...", help="t2i at several values, like guidance_scale=1,1.5,2,3"
    )
    command.add_argument(
        "--compare-decoders",
        nargs="*",
        metavar="NAME=DIR",
        help="t2i with every image decoder, by accuracy and time; dida with these adapters (for the tiny model: the "
        "one shipped with it). What --output holds already is not measured again",
    )
    command.add_argument(
        "--plot", metavar="FILE", help="draw what --sweep or --compare-decoders measures (needs matplotlib)"
    )
    command.add_argument("--samples", metavar="FILE", help="write a PNG of the first images or episodes")
    command.add_argument("--output", metavar="FILE", help="write the results as JSON")
    _add_image_decoder(command)
    _add_model_options(command)


def _add_bench(add):
    command = add(
        "bench",
        _bench,
        "measure speed and memory against the straightforward way",
        "emu35 bench image vision --output bench.json",
    )
    command.add_argument(
        "parts", nargs="*", metavar="PART", help="image, vision, loss, start, decode, dida, train, grpo"
    )
    command.add_argument("--size", choices=("tiny", "34b"), default="tiny", help="34b: the released size, on a GPU")
    command.add_argument("--quick", action="store_true", help="smaller inputs, once; targets are not judged")
    command.add_argument("--output", metavar="FILE", help="write the results as JSON")
    command.add_argument("--plots", metavar="DIR", help="draw what decode and dida measure (needs matplotlib)")
    _add_seed(command)
    _add_device(command)


def _add_demo(add):
    command = add(
        "demo",
        _demo,
        "serve the model as a page in the browser",
        "emu35 demo --open",
    )
    command.add_argument("--model", metavar="PATH", help="checkpoint (default: the tiny one shipped)")
    command.add_argument("--load-in", choices=("4bit", "8bit"), help="quantise the layers, which needs less memory")
    command.add_argument("--vision-tokenizer", metavar="DIR", help="for a checkpoint that has none")
    command.add_argument("--dida-adapter", metavar="DIR", help="default for the tiny model: the one shipped with it")
    command.add_argument("--host", metavar="NAME", help="0.0.0.0: other machines, too (default: this one only)")
    command.add_argument("--port", type=_positive, metavar="N", help="default: the first free one from 7860 on")
    command.add_argument("--open", action="store_true", help="open the page in the browser")


def _add_image_decoder(command: argparse.ArgumentParser):
    group = command.add_argument_group("image decoder")
    group.add_argument(
        "--image-decoder",
        choices=("ar", "speculative", "dida"),
        help="ar: one code a pass; speculative: several, from the same distribution; dida: all of them, in --steps "
        "passes (default: the checkpoint's)",
    )
    group.add_argument("--window", type=_positive, metavar="N", help="speculative: codes guessed before every pass")
    group.add_argument(
        "--coupling", choices=("none", "maximal", "gumbel"), help="speculative: what becomes of unsettled guesses"
    )
    group.add_argument("--steps", type=_positive, metavar="N", help="dida: denoising steps")
    group.add_argument("--adapter", metavar="DIR", help="dida: adapter (for the tiny model: the one shipped with it)")
    group.add_argument(
        "--guidance-cutoff", type=float, metavar="T", help="dida: no guidance from time T on (0: noise, 1: image)"
    )
    group.add_argument(
        "--verify-codes",
        action=argparse.BooleanOptionalAction,
        help="dida: no code remains that the model's own filters exclude; wrong ones are made anew, in more passes",
    )
    group.add_argument(
        "--guidance-scale-end", type=float, metavar="X", help="dida: guidance goes from --guidance-scale to X"
    )


def _add_model_options(command: argparse.ArgumentParser):
    group = command.add_argument_group("model")
    group.add_argument(
        "--model", metavar="PATH", help="checkpoint, ours or the release's (default: the tiny one shipped)"
    )
    group.add_argument("--vision-tokenizer", metavar="DIR", help="for a checkpoint that has none (the release's)")
    group.add_argument("--tokenizer", metavar="DIR", help="likewise: the release's, or a Qwen2 or Qwen3 one")
    group.add_argument("--lora", metavar="DIR", help="PEFT adapter, as `emu35 train` writes it with `method: sft`")
    group.add_argument("--load-in", choices=("4bit", "8bit"), help="quantise the weights (needs bitsandbytes)")
    _add_device(group)
    _add_seed(group)


def _add_device(group):
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto (default): as stored; float32 for a small model on a CPU that is slow at bfloat16",
    )


def _add_seed(group):
    group.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help='default 0: the same command, the same result. "random": a new one each time',
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _sweep(text: str) -> tuple[str, list[float | int]]:
    name, _, values = text.partition("=")
    try:
        return name.replace("-", "_"), [float(value) if "." in value else int(value) for value in values.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be like guidance_scale=1,1.5,2, got {text!r}") from error


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
    decoder = _image_decoder_settings(args)
    import torch
    from emu35.cli_tools_emu35 import progress, side_by_side

    imported = time.perf_counter()
    model, processor = _load(args)
    loaded = time.perf_counter()

    images = args.image or None
    inputs = processor(text=args.prompt, images=images, task=task)
    if args.negative_prompt is not None:
        negative = processor(text=args.negative_prompt, images=images, task=task)
        inputs["negative_prompt_ids"] = negative["input_ids"]
        inputs["negative_prompt_attention_mask"] = negative["attention_mask"]
    settings = _settings(
        args,
        "guidance_scale",
        "image_guidance_scale",
        "image_top_k",
        "image_top_p",
        "image_temperature",
    )
    settings |= decoder
    sizes = _settings(args, "height", "width", "aspect_ratio")
    if sizes:  # instead of the checkpoint's, in whatever way that is given
        settings |= {"height": None, "width": None, "aspect_ratio": None, **sizes}
    # One generator an image, so that none depends on how many are made.
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(args.num_images)]
    with progress(model, "image", args.num_images) as streamer:
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
            raise ValueError(
                f"no complete image was made ({reason}). Is `max_new_tokens` of the checkpoint too small?"
            )
        pictures.append(made[-1].image)
    if args.grid and len(pictures) > 1:
        pictures = [side_by_side(pictures)]
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
    import torch
    from emu35.cli_tools_emu35 import progress

    model, processor = _load(args)
    inputs = processor(text=args.question, images=[args.image], task="vqa")
    settings: dict[str, Any] = {"do_sample": False}
    if args.temperature is not None:
        settings = {"do_sample": True, "temperature": args.temperature}
    with progress(model, "answer") as streamer:
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


def _story(args: argparse.Namespace):
    folder = _folder_path(args.output)
    settings = _settings(args, "max_images", "max_new_tokens", "guidance_scale") | _image_decoder_settings(args)
    import torch
    from emu35.cli_tools_emu35 import StoryDisplay
    from emu35.segments_emu35 import Segments, Text, iter_images
    from emu35.streaming_emu35 import Emu35Streamer, End

    model, processor = _load(args)
    if model.vision_tokenizer is None:
        raise ValueError("the checkpoint cannot show images. Name a vision tokenizer with --vision-tokenizer.")
    messages = [{"role": "user", "content": [*({"type": "image", "path": path} for path in args.image), args.prompt]}]
    generator = torch.Generator().manual_seed(args.seed)
    story = Segments()

    def save(segments: Segments) -> Path:
        return segments.save(folder, prompt=args.prompt, reference_images=args.image)

    def save_image(number: int, picture: Any) -> Path:
        path = folder / f"image-{number:02d}.png"
        _write(path, lambda temporary: picture.save(temporary))
        return path

    def answer(cache: Any) -> Emu35Streamer:
        """Shows the next answer while it comes, and keeps what there is of it even if that ends early."""
        inputs = processor.apply_chat_template(messages, task=args.task, return_tensors="pt").to(model.device)
        streamer = Emu35Streamer(processor)
        display = StoryDisplay(save_image, num_images=len(list(iter_images(story))))
        options = {"task": args.task, "generation_mode": "interleaved", "generator": generator, **settings}
        caches = {"past_key_values": cache, "return_past_key_values": args.interactive}
        try:
            with display, streamer.run(model, **inputs, **options, **caches) as events:
                for number, event in enumerate(events):
                    if number == 0 and not story and not isinstance(event, End):
                        save(story)  # clears the folder, or refuses it while little is lost
                    display.show(event)
            if event.reason == "length":
                print("the answer has reached its limit: see --max-new-tokens", file=sys.stderr)
        finally:
            story.extend(streamer.segments)
        return streamer

    cache = None
    try:
        while True:
            streamer = answer(cache)
            instruction = _read_instruction() if args.interactive else ""
            if not instruction:
                break
            segments, output = streamer.segments, streamer.output
            said, cache = output.sequences[0, output.answer_start[0] :], output.past_key_values
            if not all(image.complete for image in iter_images(segments)):
                said, cache = [one for one in segments if one.kind != "image" or one.complete], None
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": instruction}]
            story.append(Text(f"\n\n> {instruction}\n\n"))
    finally:
        if story:
            now = time.perf_counter()
            print(f"{save(story) / 'index.html'}: seed {args.seed}; {now - _STARTED:.1f} s in all")


def _read_instruction() -> str:
    """The next line of standard input, empty at its end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()


def _convert(args: argparse.Namespace):
    from emu35.convert_emu35_to_hf import add_arguments
    from emu35.convert_emu35_to_hf import main as convert

    parser = _Parser(
        prog=args.parser.prog,
        description=args.parser.description,
        epilog=args.parser.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    # Being asked to end is an interrupt like Ctrl-C, so that an unfinished folder is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    convert(parser.parse_args(args.arguments))


def _prepare(args: argparse.Namespace):
    folder = _folder_path(args.out, "--out")
    if find_spec("pyarrow") is None:
        raise ValueError("emu35 prepare needs pyarrow, which is not installed: pip install 'emu35[train]'")
    from emu35 import TINY, Emu35Processor, Emu35VisionTokenizer
    from emu35.cli_tools_emu35 import find_device
    from emu35.training.data import prepare

    device = find_device(args.device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    model = args.model or TINY
    processor = Emu35Processor.from_pretrained(model)
    vision_tokenizer = Emu35VisionTokenizer.from_pretrained(args.vision_tokenizer or model).to(device).eval()
    options = _settings(args, "task", "image_area", "max_length", "split", "streaming")
    found = prepare(args.data, folder, vision_tokenizer, processor, rows_per_shard=args.rows_per_file, **options)
    print(f"{folder}: {_count(found['examples'], 'example')}, {_count(found['tokens'], 'token')}, {found['tasks']}")
    if found["left_out"]:
        report = folder / "report.jsonl"
        when = "" if report.is_file() else ", once all processes have ended"
        print(f"{_count(found['left_out'], 'row')} left out: {report} tells why{when}", file=sys.stderr)


def _train(args: argparse.Namespace):
    from emu35.cli_tools_emu35 import find_device
    from emu35.training.train import train

    device = find_device(args.device)
    if args.dry_run:
        from emu35.training.train import plan

        print(plan(args.recipe))
        return
    folder = train(args.recipe, args.output, args.export, resume=not args.restart, device=device)
    print(f"{folder}: the finished model")


def _distill(args: argparse.Namespace):
    folder = _folder_path(args.out, "--out")
    prompts = None
    if args.prompts is not None:
        prompts = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    settings = _settings(args, "guidance_scale", "image_top_k", "image_top_p", "image_temperature")
    model, processor = _load(args)
    from emu35.training.distill import distill

    numbers = {"num": args.num, "seed": args.seed, "batch_size": args.batch_size, "full_captions": args.full_captions}
    files = distill(model, processor, folder, args.task, prompts=prompts, **numbers, **settings)
    print(f"{folder}: {_count(len(files), 'file')}")


def _eval(args: argparse.Namespace):
    output = None if args.output is None else _file_path(args.output)
    plot = None if args.plot is None else _image_path(args.plot, "--plot")
    samples = None if args.samples is None else _image_path(args.samples, "--samples")
    if args.compare_decoders is not None:
        return _compare_decoders(args, output, plot)
    if plot is not None and args.sweep is None:
        raise ValueError("--plot draws what --sweep or --compare-decoders measures. Give one of them.")
    if args.sweep is not None and args.task != "t2i":
        raise ValueError("--sweep is for --task t2i.")
    if samples is not None and args.sweep is not None:
        raise ValueError("--samples shows the images of one setting: leave out --sweep.")
    about_images = _settings(args, "guidance_scale", "image_top_k", "image_top_p", "samples", "image_decoder")
    if about_images and args.task in _EVAL_WITHOUT_IMAGES:
        name = next(iter(about_images)).replace("_", "-")
        raise ValueError(f"--{name} is about making images, which --task {args.task} does not.")
    settings = _settings(args, "guidance_scale", "image_top_k", "image_top_p") | _image_decoder_settings(args)
    model, processor = _load(args)
    from emu35.training.evaluate import evaluate, sweep

    if args.sweep is None:
        options = {"num_held_out": args.num_held_out, "batch_size": args.batch_size, "processor": processor}
        result = evaluate(model, args.task, args.num, args.seed, samples_path=samples, **options, **settings)
    else:
        setting, values = args.sweep
        options = {"image_path": plot, "batch_size": args.batch_size}
        result = sweep(model, processor, setting, values, args.num, args.seed, **options, **settings)
    if output is None:
        print(json.dumps(result, indent=2))
    else:
        _write_json(output, result)


def _compare_decoders(args: argparse.Namespace, output: Path | None, plot: Path | None):
    others = {"task": "t2i", "sweep": None, "samples": None, "image_decoder": None, "num_held_out": None}
    others |= dict.fromkeys(("image_top_k", "image_top_p", "window", "coupling", "steps", "adapter"))
    for name, default in others.items():
        if getattr(args, name) != default:
            raise ValueError(f"--compare-decoders chooses what it measures: leave out --{name.replace('_', '-')}.")
    adapters = dict(_named_folder(text) for text in args.compare_decoders)
    model, processor = _load(args)
    from emu35.training.compare_decoders import compare_decoders, format_comparison, plot_comparison

    if not adapters and _is_tiny(args):
        from emu35 import TINY_DIDA

        adapters = {"dida": TINY_DIDA}
    options = {"seed": args.seed, "batch_size": args.batch_size, "path": output}
    options |= _settings(args, "guidance_scale") | {"dida_settings": _settings(args, *_OF_DIDA)}
    results = compare_decoders(model, processor, adapters, args.num, **options)
    print(format_comparison(results))
    if output is not None:
        print(f"{output}: written")
    if plot is not None:
        plot_comparison(results, plot)
        print(f"{plot}: written")


def _named_folder(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise ValueError(f"--compare-decoders names adapters like metric=runs/dida, got {text!r}.")
    return name, folder


def _bench(args: argparse.Namespace):
    output = None if args.output is None else _file_path(args.output)
    plots = None if args.plots is None else _plots_path(args)
    from emu35.bench_emu35 import format_results, register_part, run_benchmark
    from emu35.cli_tools_emu35 import find_device, find_dtype
    from emu35.training import bench_grpo, bench_train

    register_part("train", bench_train.PART)
    register_part("grpo", bench_grpo.PART)

    device, dtype = find_device(args.device), find_dtype(args.dtype)
    keep = None if output is None else lambda results: _write_json(output, results)
    results = run_benchmark(args.parts, args.size, args.quick, device, dtype, args.seed, on_part=keep)
    print(format_results(results))
    if plots is not None:
        from emu35.bench_plots_emu35 import plot_decoders, plot_dida

        for part, plot in (("decode", plot_decoders), ("dida", plot_dida)):
            for path in plot(results[part], plots) if part in results else ():
                print(f"{path}: written")


def _plots_path(args: argparse.Namespace) -> Path:
    if (args.parts or args.size != "tiny") and not {"decode", "dida"} & set(args.parts):
        raise ValueError("--plots draws what decode or dida measure. Add it: emu35 bench decode --plots DIR")
    if find_spec("matplotlib") is None:
        raise ValueError("--plots needs matplotlib, which is not installed: pip install matplotlib")
    return _folder_path(args.plots, "--plots")


# --------------------------------------------------------------------------------------------------------- their parts


def _settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, by name."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


_OF_DIDA = ("guidance_cutoff", "guidance_scale_end", "verify_codes")


def _image_decoder_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of `generate` from the options of the image decoder."""
    decoders = {"window": "speculative", "coupling": "speculative"}
    decoders |= dict.fromkeys(("steps", "adapter", *_OF_DIDA), "dida")
    for name in _settings(args, *decoders):
        if args.image_decoder != decoders[name]:
            raise ValueError(f"--{name.replace('_', '-')} is for --image-decoder {decoders[name]}.")
    names = {"steps": "num_inference_steps", "window": "speculative_window"}
    given = _settings(args, "image_decoder", "window", "coupling", "steps", *_OF_DIDA)
    return {names.get(name, name): value for name, value in given.items()}


def _load(args: argparse.Namespace):
    """The model, ready to generate, and its processor."""
    from emu35.adapters_emu35 import load_lora
    from emu35.cli_tools_emu35 import load
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model, processor = load(args.model, args.device, args.dtype, args.load_in, args.vision_tokenizer, args.tokenizer)
    if args.lora is not None:
        load_lora(model, args.lora)
    if getattr(args, "image_decoder", None) == "dida":
        from emu35 import TINY_DIDA

        adapter = args.adapter or (TINY_DIDA if _is_tiny(args) else None)
        if adapter is not None:
            model.load_dida_adapter(adapter)
    return model, processor


def _is_tiny(args: argparse.Namespace) -> bool:
    """Whether the model is the tiny one that is shipped."""
    from emu35 import TINY

    return args.model is None or Path(args.model).resolve() == Path(TINY).resolve()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _demo(args: argparse.Namespace):
    if find_spec("gradio") is None:
        raise ValueError("emu35 demo needs gradio, which is not installed: pip install 'emu35[demo]'")
    given = {"model": args.model, "load_in": args.load_in, "dida_adapter": args.dida_adapter}
    given["vision_tokenizer"] = args.vision_tokenizer
    # A Space reads the same from its environment, with all of its limits.
    os.environ.update({f"EMU35_{name.upper()}": value for name, value in given.items() if value is not None})
    from emu35.spaces.server import serve

    serve(args.host, args.port, open_browser=args.open)


def _file_path(name: str, option: str = "--output") -> Path:
    """Where a file will be written, checked before the work that makes it."""
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(f"{option} {name} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {name}: there is no folder {path.parent}. Make it first.")
    return path


def _folder_path(name: str, option: str = "--output") -> Path:
    """Where a folder will be, checked before the work that fills it."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{option} {name} is a file. Name a folder.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {name}: there is no folder {path.parent}. Make it first.")
    return path


def _image_path(name: str, option: str = "--output") -> Path:
    from PIL import Image

    path = _file_path(name, option)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(
            f"{option} {name}: {path.suffix or 'no ending'} is no kind of image. Use .png, .jpg or .webp."
        )
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
