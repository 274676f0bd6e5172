"""Checkpoints: this project's and the release's.  Reading their tensors, and `from_pretrained` for both.

Tensors come from safetensors files only, and a checkpoint whose tensors are not exactly those of its configuration is
refused: nothing is unpickled, nothing is left at random values.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_emu35 import Emu35TokenLayout, Emu35VisionTokenizerConfig, is_released_config
from .generation_configuration_emu35 import Emu35GenerationConfig
from .saving_emu35 import AtomicSaveMixin, atomic_directory

if TYPE_CHECKING:
    from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

#: safetensors' names of the floating-point types a checkpoint may have.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Arguments of `from_pretrained` that say where a checkpoint is.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
#: Arguments of `from_pretrained` that change which files are read, or what their tensors are called.
_REDIRECTING_ARGUMENTS = ("gguf_file", "key_mapping", "state_dict", "variant")


class SafetensorsFolder:
    """The tensors of a checkpoint folder: `model.safetensors`, or shards with an index.

    Only headers are read at first, so this is cheap for a checkpoint of any size.

    Args:
        directory: the folder.
    Attributes:
        shapes (`dict[str, tuple[int, ...]]`), dtypes (`dict[str, str]`):
            of all tensors; types as safetensors calls them.
    Raises:
        FileNotFoundError: if the folder, or one of its shards, is missing.
        ValueError: if a file is damaged, or if there are only pickles.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in self._find_files():
            try:
                with safe_open(file, framework="pt") as stream:
                    for name in stream.keys():  # noqa: SIM118 (not a dict)
                        part = stream.get_slice(name)
                        self.shapes[name] = tuple(part.get_shape())
                        self.dtypes[name] = part.get_dtype()
                        self._files[name] = file
            except SafetensorError as error:
                raise ValueError(
                    f"{file} is not a complete safetensors file ({error}). The download is incomplete, or the file is "
                    "a Git LFS pointer; download it again."
                ) from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored, mapped from the file.  The file is closed when the tensor is dropped."""
        with safe_open(self._files[name], framework="pt") as stream:
            return stream.get_tensor(name)

    def _find_files(self) -> list[Path]:
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"there is no folder {self.directory}. Download the checkpoint first: "
                "`hf download BAAI/Emu3.5-Image --local-dir DIRECTORY`."
            )
        single, index = self.directory / SAFE_WEIGHTS_NAME, self.directory / SAFE_WEIGHTS_INDEX_NAME
        if single.is_file():
            return [single]
        if index.is_file():
            return self._shards(index)
        pickles = sorted(
            path.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for path in self.directory.glob(pattern)
        )
        if pickles:
            raise ValueError(
                f"{self.directory} has its weights only as {pickles[0]}, a pickle. Opening one can run any code, so "
                f"only safetensors are read. Download the files {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} and "
                "model-*.safetensors of the same checkpoint, or, if there are none, write them yourself: "
                "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)`."
            )
        raise FileNotFoundError(f"{self.directory} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")

    def _shards(self, index: Path) -> list[Path]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: it has no `weight_map` from tensors to files.") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names a file outside its folder: {outside[0]!r}.")
        missing = [name for name in names if not (self.directory / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.directory} lacks {len(missing)} of {len(names)} shards: {shorten(missing)}. The download is "
                "incomplete; run it again."
            )
        return [self.directory / name for name in names]


def expected_tensors(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model, without making it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def require_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str | os.PathLike
) -> None:
    """Raises a ValueError that lists what is missing, unknown or misshapen in `found`."""
    problems = {
        "missing": [f"{name} {tuple(shape)}" for name, shape in expected.items() if name not in found],
        "unknown": [f"{name} {tuple(shape)}" for name, shape in found.items() if name not in expected],
        "misshapen": [
            f"{name} {tuple(found[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    _raise_if_any(problems, where)


def _raise_if_any(problems: Mapping[str, list[str]], where: str | os.PathLike | None) -> None:
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"the tensors in {where} are not those of its configuration. {listed}. The configuration and the weights "
            "don't belong together, or the download is incomplete."
        )


def require_codebook_fits(config: Emu35VisionTokenizerConfig, token_layout: Emu35TokenLayout) -> None:
    """Raises a ValueError if the vision tokenizer has codes that have no token."""
    if config.codebook_size > token_layout.num_visual_tokens:
        raise ValueError(
            f"`vision_tokenizer` has {config.codebook_size} codes, but the vocabulary has only "
            f"{token_layout.num_visual_tokens} visual tokens. They don't belong together."
        )


def shorten(names: list[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


class StrictCheckpointMixin(AtomicSaveMixin):
    """Loads exactly the tensors of the configuration, from safetensors only.  Saves all or nothing.

    Stands before `PreTrainedModel` among the bases.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """[`~transformers.PreTrainedModel.from_pretrained`], with these differences.

        Args:
            ignore_mismatched_sizes (`bool`):
                whether to initialise misshapen tensors at random instead of refusing the checkpoint.
        Raises:
            ValueError: if the checkpoint lacks tensors of the model, has others, or is a pickle.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors=False` would unpickle the checkpoint, which can run any code in it. Leave it out; "
                "only safetensors are read."
            )
        kwargs["use_safetensors"] = True
        if pretrained_model_name_or_path is not None and not any(kwargs.get(name) for name in _REDIRECTING_ARGUMENTS):
            directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if (directory / CONFIG_NAME).is_file():  # otherwise an adapter, or not on this machine
                cls._require_tensors_of(directory, kwargs.get("config"), ignore_mismatched_sizes)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # with False, what is wrong would be said in the log only
            **kwargs,
        )
        problems = {"missing": info["missing_keys"], "unknown": info["unexpected_keys"]}
        if not ignore_mismatched_sizes:
            problems["misshapen"] = info["mismatched_keys"]
        _raise_if_any(
            {kind: sorted(map(str, names)) for kind, names in problems.items()}, pretrained_model_name_or_path
        )
        return (model, info) if output_loading_info else model

    @classmethod
    def _require_tensors_of(
        cls, directory: Path, config: PreTrainedConfig | str | None, ignore_mismatched_sizes: bool
    ) -> None:
        """Compares headers with the configuration, before any time is spent on loading."""
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(directory if config is None else config)
        if getattr(config, "quantization_config", None) is not None:
            return  # quantised tensors have other names and shapes
        found = SafetensorsFolder(directory).shapes
        expected = expected_tensors(cls, config)
        # A part, such as the decoder, loads from a checkpoint of the whole, where its tensors have a prefix.
        prefix = f"{cls.base_model_prefix}."
        part = {name: shape for name, shape in found.items() if name.startswith(prefix)}
        if part and not any(name.startswith(prefix) for name in expected):
            expected, found = {prefix + name: shape for name, shape in expected.items()}, part
        elif not part:  # and the whole from a part, if nothing else is needed
            found = {prefix + name if prefix + name in expected else name: shape for name, shape in found.items()}
        if ignore_mismatched_sizes:
            found = {name: expected.get(name, shape) for name, shape in found.items()}
        require_tensors(expected, found, directory)


class ReleasedCheckpointMixin(StrictCheckpointMixin):
    """Knows the release's checkpoints: no vision tokenizer in them, and its sampling settings elsewhere."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        vision_tokenizer: "str | os.PathLike | Emu35VisionTokenizer | None" = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """[`~transformers.PreTrainedModel.from_pretrained`], with these differences.

        Args:
            pretrained_model_name_or_path:
                a checkpoint of this project, or of the release (`model_type` "Emu3").
            vision_tokenizer (`str`, `Path` or `Emu35VisionTokenizer`, *optional*):
                a vision tokenizer, or its directory (ours or the release's), for a checkpoint that has none. If it has
                one, this one takes its place.
        Raises:
            ValueError: if the checkpoint lacks tensors of the model, has others, or is a pickle.
        """
        if vision_tokenizer is not None:
            vision_tokenizer = _load_vision_tokenizer(vision_tokenizer)  # first, as it may fail sooner
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if pretrained_model_name_or_path is not None and kwargs.get("generation_config") is None:
            location = {name: kwargs[name] for name in _LOCATION_ARGUMENTS if name in kwargs}
            config_dict, _ = PreTrainedConfig.get_config_dict(model.name_or_path, **location)
            if is_released_config(config_dict):
                model.generation_config = Emu35GenerationConfig.released()
        if vision_tokenizer is not None:
            model.attach_vision_tokenizer(vision_tokenizer)
        return (model, info) if output_loading_info else model

    def attach_vision_tokenizer(self, vision_tokenizer: "str | os.PathLike | Emu35VisionTokenizer") -> None:
        """Gives the model a vision tokenizer, or another one.

        Args:
            vision_tokenizer (`str`, `Path` or `Emu35VisionTokenizer`):
                a directory (ours or the release's), or the module itself, which is moved to the model's device and
                converted to float32.
        Raises:
            ValueError: if it has more codes than the vocabulary has visual tokens.
        """
        vision_tokenizer = _load_vision_tokenizer(vision_tokenizer)
        require_codebook_fits(vision_tokenizer.config, self.config.token_layout)
        # Weights of an offloaded model are on the meta device between two calls.
        devices = (parameter.device for parameter in self.parameters() if parameter.device.type != "meta")
        device = next(devices, torch.device("cpu"))
        self.vision_tokenizer = vision_tokenizer.float().train(self.training).to(device)
        self.config.vision_tokenizer_config = vision_tokenizer.config

    def detach_vision_tokenizer(self) -> None:
        """Leaves a model of text and codes, whose checkpoints have no vision tokenizer."""
        self.vision_tokenizer = self.config.vision_tokenizer_config = None


def _load_vision_tokenizer(vision_tokenizer: "str | os.PathLike | Emu35VisionTokenizer") -> "Emu35VisionTokenizer":
    # Not at the top of the file: the vision tokenizer itself loads through this module.
    from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

    if isinstance(vision_tokenizer, Emu35VisionTokenizer):
        return vision_tokenizer
    return Emu35VisionTokenizer.from_pretrained(vision_tokenizer)


__all__ = [
    "ReleasedCheckpointMixin",
    "SafetensorsFolder",
    "StrictCheckpointMixin",
    "atomic_directory",
    "expected_tensors",
    "require_codebook_fits",
    "require_tensors",
]
