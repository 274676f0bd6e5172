"""Released weights and tokenizer -> one safetensors checkpoint that the Auto classes load.

    python -m emu35.convert_emu35_to_hf --model Emu3.5-Image --vision-tokenizer Emu3.5-VisionTokenizer \\
        --tokenizer emu3.tiktoken --output emu35-image

With `--as qwen3` the language model alone becomes a plain `Qwen3ForCausalLM`, for engines that serve Qwen3.

Configuration, tokenizer, and names and shapes of all tensors are checked before a byte is written. Tensors then go
from file to file one shard at a time. The output folder appears when it is complete, or not at all.
"""

import argparse
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME

from .checkpoint_emu35 import (
    FLOAT_DTYPES,
    SafetensorsFolder,
    expected_tensors,
    require_codebook_fits,
    require_tensors,
    shorten,
)
from .configuration_emu35 import SPECIAL_TOKENS, Emu35Config, Emu35TokenLayout, Emu35VisionTokenizerConfig
from .generation_configuration_emu35 import Emu35GenerationConfig
from .image_processing_emu35 import Emu35ImageProcessor
from .modeling_emu35 import Emu35ForConditionalGeneration
from .modeling_emu35_vision_tokenizer import (
    Emu35VisionTokenizer,
    is_released_vision_tokenizer,
    load_released_vision_tokenizer,
)
from .processing_emu35 import Emu35Processor
from .saving_emu35 import atomic_directory, check_output_directory
from .serving_emu35 import qwen3_config, qwen3_config_json, qwen3_generation_config, serving_chat_template
from .tokenization_emu35 import (
    TIKTOKEN_FILE,
    token_layout_from_tokenizer,
    tokenizer_from_qwen,
    tokenizer_from_tiktoken,
)

logger = logging.getLogger("emu35.convert_emu35_to_hf")

TARGETS = ("emu35", "qwen3")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_VISION = "vision_tokenizer."


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the output: its shape and type, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return self.meta().nbytes

    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def convert(
    model: str | os.PathLike,
    output: str | os.PathLike,
    vision_tokenizer: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    target: str = "emu35",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Writes one safetensors checkpoint.

    Args:
        model: directory of a language model: the release's, or one of our checkpoints.
        output: directory to make. It must not exist, or be empty.
        vision_tokenizer (*optional*):
            directory of a vision tokenizer: the release's (`config.yaml` and `model.ckpt`), or ours. Default: the one
            in `model`, if there is one. Without any, the result handles text and codes, not pixels.
        tokenizer (*optional*):
            `emu3.tiktoken`, the directory that holds it, a Qwen2 or Qwen3 tokenizer's directory, or one of ours.
            Default: the one in `model`, if there is one. Without any, the result has no processor.
        target (`str`): "emu35", or "qwen3" for the language model alone as a plain `Qwen3ForCausalLM`.
        dtype (`str` or `torch.dtype`, *optional*):
            "bfloat16", "float16" or "float32"; default: as stored. The vision tokenizer is float32 in any case, since
            rounding would change codes.
        max_shard_size (`int` or `str`):
            of one file, and so, about, of the memory this takes. A larger tensor has a file of its own.
        progress (`bool`): whether to show a progress bar.
    Returns:
        `Path`: the output directory.
    Raises:
        FileExistsError, NotADirectoryError: if `output` is not free.
        FileNotFoundError: if an input is not there.
        ValueError: if configuration, tensors and tokenizer don't fit together, an input is damaged or a pickle that is
            more than tensors, or `dtype` cannot hold the values.
        OSError: if the disk is full. Whatever is raised, nothing is left behind.
    """
    if target not in TARGETS:
        raise ValueError(f"`target` (`--as`) must be one of {', '.join(TARGETS)}; got {target!r}.")
    if target == "qwen3" and vision_tokenizer is not None:
        raise ValueError("`vision_tokenizer` has no place in a Qwen3 checkpoint. Leave it out, or use target 'emu35'.")
    check_output_directory(output, name="output")
    dtype = _read_dtype(dtype)
    model = Path(model)
    weights = SafetensorsFolder(model)
    config = _read_config(model)

    own = {name: shape for name, shape in weights.shapes.items() if not name.startswith(_VISION)}
    in_model = {name: shape for name, shape in weights.shapes.items() if name.startswith(_VISION)}
    text_only = Emu35Config(
        text_config=config.text_config, token_layout=config.token_layout, vision_tokenizer_config=None
    )
    expected = expected_tensors(Emu35ForConditionalGeneration, text_only)
    require_tensors(expected, own, model)
    tensors = {name: _from_folder(weights, name, dtype) for name in expected}
    stored = tensors["model.embed_tokens.weight"].dtype
    processor = _read_processor(model, tokenizer, config)

    if target == "qwen3":
        files = partial(_write_qwen3_files, config=config, dtype=stored, processor=processor)
    else:
        source = vision_tokenizer
        if source is None and (in_model or config.vision_tokenizer_config is not None):
            source = model
        config.vision_tokenizer_config = None
        if source is not None:
            vision_config, vision_tensors = _read_vision_tokenizer(Path(source))
            require_codebook_fits(vision_config, config.token_layout)
            config.vision_tokenizer_config = vision_config
            tensors |= vision_tensors
            if processor is not None:
                processor.image_processor.factor = vision_config.downsampling_factor
        config.architectures = ["Emu35ForConditionalGeneration"]
        config.dtype = stored
        files = partial(_write_emu35_files, config=config, model=model, processor=processor)

    shards = _plan_shards(tensors, max_shard_size)
    with atomic_directory(output, name="output") as folder:
        _require_space(folder, sum(tensor.num_bytes for tensor in tensors.values()), output)
        files(folder)
        _write_shards(folder, shards, tensors, progress)
    parameters = sum(tensor.meta().numel() for tensor in tensors.values())
    logger.info("%s: %d tensors, %d parameters, %d files of weights", output, len(tensors), parameters, len(shards))
    if target == "emu35" and config.vision_tokenizer_config is None:
        logger.warning(
            "no vision tokenizer: text and codes work, encoding and decoding images does not. Convert again with "
            "`--vision-tokenizer`, or load with `from_pretrained(..., vision_tokenizer=DIRECTORY)`."
        )
    if processor is None:
        logger.warning(
            "no tokenizer: the model takes token ids only, and AutoProcessor will find nothing. Convert again with "
            "`--tokenizer`."
        )
    return Path(output)


# ------------------------------------------------------------------------------------------------------ what is read


def _read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = dtype is None or dtype in DTYPES or dtype in DTYPES.values()
    if not known:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, or None to keep what is stored; got {dtype!r}.")
    return DTYPES.get(dtype, dtype)


def _read_config(model: Path) -> Emu35Config:
    if not (model / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{model} has no {CONFIG_NAME}. Download it from where the weights came from.")
    config = Emu35Config.from_pretrained(model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantised, and cannot be converted. Use the checkpoint it was made from.")
    return config


def _from_folder(folder: SafetensorsFolder, name: str, dtype: torch.dtype | None, prefix: str = "") -> _Tensor:
    stored = FLOAT_DTYPES.get(folder.dtypes[prefix + name])
    if stored is None:
        raise ValueError(
            f"{folder.directory}: {prefix + name} is {folder.dtypes[prefix + name]}, not floating point. A quantised "
            "checkpoint cannot be converted; use the one it was made from."
        )
    dtype = stored if dtype is None else dtype
    return _Tensor(
        folder.shapes[prefix + name], dtype, lambda: _cast(prefix + name, folder.read(prefix + name), dtype)
    )


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if (
        torch.isinf(torch.stack(torch.aminmax(cast))).any()
        and not torch.isinf(torch.stack(torch.aminmax(tensor))).any()
    ):
        raise ValueError(
            f"`dtype`={str(dtype).removeprefix('torch.')} cannot hold the values of {name}, which go up to "
            f"{max(map(abs, map(float, torch.aminmax(tensor)))):.3g}. Use bfloat16 or float32."
        )
    return cast


def _read_vision_tokenizer(directory: Path) -> tuple[Emu35VisionTokenizerConfig, dict[str, _Tensor]]:
    """Configuration and tensors (named as in the output) of a vision tokenizer: the release's, ours, or a model's."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"`vision_tokenizer`: there is no folder {directory}. Download it first: "
            "`hf download BAAI/Emu3.5-VisionTokenizer --local-dir DIRECTORY`."
        )
    if is_released_vision_tokenizer(directory):
        config, state_dict = load_released_vision_tokenizer(directory)
        return config, {
            _VISION + name: _Tensor(tuple(tensor.shape), torch.float32, partial(torch.Tensor.float, tensor))
            for name, tensor in state_dict.items()
        }
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"`vision_tokenizer`: {directory} has neither the release's config.yaml and model.ckpt nor {CONFIG_NAME}."
        )
    folder = SafetensorsFolder(directory)
    values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    alone = values.get("model_type") == Emu35VisionTokenizerConfig.model_type
    if not alone and not values.get(Emu35VisionTokenizerConfig.base_config_key):
        raise ValueError(f"`vision_tokenizer`: the model in {directory} has none. Give the directory of one that has.")
    config = Emu35VisionTokenizerConfig.from_pretrained(directory)
    prefix = "" if alone else _VISION
    expected = expected_tensors(Emu35VisionTokenizer, config)
    found = {name.removeprefix(prefix): shape for name, shape in folder.shapes.items() if name.startswith(prefix)}
    require_tensors(expected, found, directory)
    return config, {_VISION + name: _from_folder(folder, name, torch.float32, prefix) for name in expected}


def _read_processor(model: Path, source: str | os.PathLike | None, config: Emu35Config) -> Emu35Processor | None:
    """The processor of `model`, or one around another tokenizer."""
    if source is None and (model / PROCESSOR_NAME).is_file():
        processor = Emu35Processor.from_pretrained(model)
        _require_same_layout(processor.tokenizer, config.token_layout, model)
        processor.token_layout = config.token_layout
        return processor
    if source is None and not any((model / name).is_file() for name in (TIKTOKEN_FILE, "tokenizer.json")):
        return None
    source = model if source is None else Path(source)
    tokenizer = _read_tokenizer(source, config.text_config.max_position_embeddings)
    _require_same_layout(tokenizer, config.token_layout, source)
    return Emu35Processor(Emu35ImageProcessor(), tokenizer, config.token_layout)


def _read_tokenizer(source: Path, max_length: int) -> PreTrainedTokenizerFast:
    if not source.exists():
        raise FileNotFoundError(
            f"`tokenizer`: there is no {source}. Give the release's {TIKTOKEN_FILE}, or the directory of a Qwen2 or "
            "Qwen3 tokenizer."
        )
    if source.is_dir() and not (source / TIKTOKEN_FILE).is_file():
        whole = source / "tokenizer.json"
        if whole.is_file() and json.dumps(SPECIAL_TOKENS["boi"]) in whole.read_text(encoding="utf-8"):
            return PreTrainedTokenizerFast.from_pretrained(source)
        return tokenizer_from_qwen(source, max_length)
    return tokenizer_from_tiktoken(source, max_length)


def _require_same_layout(tokenizer: PreTrainedTokenizerFast, layout: Emu35TokenLayout, source: Path) -> None:
    theirs = token_layout_from_tokenizer(tokenizer, layout.num_visual_tokens, layout.size_digits)
    wrong = [
        f"{role} is {theirs.special_token_ids.get(role)} instead of {token_id}"
        for role, token_id in layout.special_token_ids.items()
        if theirs.special_token_ids.get(role) != token_id
    ]
    if list(theirs.digit_token_ids) != list(layout.digit_token_ids):
        wrong.append(f"digits are {list(theirs.digit_token_ids)} instead of {list(layout.digit_token_ids)}")
    if wrong or theirs.visual_token_offset > layout.visual_token_offset:
        wrong = wrong or [f"{theirs.visual_token_offset} ids instead of at most {layout.visual_token_offset}"]
        raise ValueError(f"`tokenizer`: the ids of {source} are not those of the model: {shorten(wrong)}.")


# --------------------------------------------------------------------------------------------------- what is written


def _write_emu35_files(folder: Path, config: Emu35Config, model: Path, processor: Emu35Processor | None) -> None:
    config.save_pretrained(folder)
    ours = _is_ours(model) and (model / GENERATION_CONFIG_NAME).is_file()
    settings = Emu35GenerationConfig.from_pretrained(model) if ours else Emu35GenerationConfig.released()
    settings.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _write_qwen3_files(
    folder: Path, config: Emu35Config, dtype: torch.dtype, processor: Emu35Processor | None
) -> None:
    values = qwen3_config_json(qwen3_config(config, dtype))
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    qwen3_generation_config(config).save_pretrained(folder)
    if processor is not None:
        processor.tokenizer.chat_template = serving_chat_template()
        processor.tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        # The name that transformers 4 has for this class, too; engines lag behind.
        values = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        values.pop("processor_class", None)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _is_ours(model: Path) -> bool:
    return json.loads((model / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type") == Emu35Config.model_type


def _plan_shards(tensors: dict[str, _Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """File names, and the names of the tensors in each."""
    meta = {name: tensor.meta() for name, tensor in tensors.items()}
    try:
        if not isinstance(max_shard_size, str) and max_shard_size < 1:
            raise ValueError("it is not positive")
        return split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size).filename_to_tensors
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'`max_shard_size` must be a number of bytes or like "5GB", got {max_shard_size!r}: {error}'
        ) from error


def _require_space(folder: Path, needed: int, output: str | os.PathLike) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"`output`={str(output)!r} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there. Make "
            "room, or choose another disk."
        )


def _write_shards(folder: Path, shards: dict[str, list[str]], tensors: dict[str, _Tensor], progress: bool) -> None:
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=not progress) as bar:
        for file, names in shards.items():
            shard = {}
            for name in names:
                shard[name] = tensors[name].read().contiguous()
            try:
                save_file(shard, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(
                    f"could not write {file} ({error}). Nothing was left behind; the whole checkpoint needs "
                    f"{total / 1e9:.1f} GB."
                ) from error
            bar.update(sum(tensors[name].num_bytes for name in names))
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(tensor.meta().numel() for tensor in tensors.values()),
                "total_size": total,
            },
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that [`main`] reads."""
    parser.add_argument("--model", required=True, metavar="DIR", help="language model: the release's, or ours")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; must not exist, or be empty")
    parser.add_argument(
        "--vision-tokenizer",
        metavar="DIR",
        help="vision tokenizer: the release's (config.yaml, model.ckpt), or ours; without it images don't work",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR_OR_FILE",
        help="emu3.tiktoken, or the directory of it or of a Qwen2 or Qwen3 tokenizer; without it text does not work",
    )
    parser.add_argument(
        "--as",
        dest="target",
        choices=TARGETS,
        default="emu35",
        help="qwen3: the language model alone, for engines that serve Qwen3 (default: emu35)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the language model (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")


def main(args: argparse.Namespace) -> None:
    """Runs [`convert`] with parsed arguments; a `quiet` among them turns the progress bar off."""
    convert(
        model=args.model,
        output=args.output,
        vision_tokenizer=args.vision_tokenizer,
        tokenizer=args.tokenizer,
        target=args.target,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        progress=not getattr(args, "quiet", False),
    )


def _command_line(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m emu35.convert_emu35_to_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    package = logging.getLogger("emu35")
    package.addHandler(logging.StreamHandler())
    package.setLevel(logging.INFO)
    stopped = False

    def stop(number, frame):
        nonlocal stopped
        stopped = True
        signal.default_int_handler(number, frame)

    # Being asked to end is an interrupt like Ctrl-C, so that the unfinished folder is removed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main(args)
    except (ValueError, OSError, StrictDataclassError, KeyboardInterrupt) as error:
        # Where the interrupt meets a library that is busy, it may come out as that library's error.
        if stopped:
            parser.exit(130, f"interrupted; {args.output} was not made\n")
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    _command_line()


__all__ = ["add_arguments", "convert", "main"]
