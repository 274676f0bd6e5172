"""The release's vision tokenizer: a folder with `config.yaml` and `model.ckpt`.

`model.ckpt` is a pickle, so it is read with `weights_only=True`: one that wants to run code is refused, and runs none.
"""

import os
import pickle
import zipfile
from pathlib import Path

import torch
import yaml
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_emu35 import expected_tensors, require_tensors
from .configuration_emu35 import Emu35VisionTokenizerConfig

RELEASED_CONFIG_NAME = "config.yaml"
RELEASED_WEIGHTS_NAME = "model.ckpt"


def is_released_vision_tokenizer(directory: str | os.PathLike) -> bool:
    """Whether `directory` has the release's layout (`config.yaml` + `model.ckpt`) and no checkpoint of ours."""
    directory = Path(directory)
    ours = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return (directory / RELEASED_CONFIG_NAME).is_file() and not any((directory / name).is_file() for name in ours)


def load_released_vision_tokenizer(
    directory: str | os.PathLike,
) -> tuple[Emu35VisionTokenizerConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of the released vision tokenizer, checked against each other.

    The pickle is read with `weights_only=True`: a file that wants to run code is refused and runs nothing.

    Args:
        directory (`str` or `os.PathLike`):
            holds `config.yaml` and `model.ckpt` (a state dict, plain or under the key "state_dict").
    Returns:
        the configuration, and the state dict as stored (float16 in the release), memory-mapped if the format allows.
    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if the configuration cannot be read or is not supported, the file is no state dict, or its tensors
            are not exactly those the configuration asks for.
    """
    directory = Path(directory)
    for name in (RELEASED_CONFIG_NAME, RELEASED_WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no `{name}`. A released vision tokenizer is a folder with `{RELEASED_CONFIG_NAME}` "
                f"and `{RELEASED_WEIGHTS_NAME}`."
            )
    config = read_released_config(directory / RELEASED_CONFIG_NAME)
    state_dict = _read_state_dict(directory / RELEASED_WEIGHTS_NAME)

    from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer  # which itself loads through this module

    require_tensors(
        expected_tensors(Emu35VisionTokenizer, config),
        {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        directory / RELEASED_WEIGHTS_NAME,
    )
    return config, state_dict


def read_released_config(path: str | os.PathLike) -> Emu35VisionTokenizerConfig:
    """The release's `config.yaml` (`n_embed`, `embed_dim`, `ddconfig`) as our configuration.

    Raises:
        ValueError: if a value is missing or not supported (`double_z: true`).
    """
    try:
        released = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    released = released if isinstance(released, dict) else {}
    network = released.get("ddconfig")
    needed = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
    absent = [name for name in ("n_embed", "embed_dim") if name not in released]
    absent += [f"ddconfig.{name}" for name in needed if not isinstance(network, dict) or name not in network]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: it is not the configuration of a released IBQ tokenizer.")
    if network.get("double_z"):
        raise ValueError(f"{path}: `double_z: true` means a variational encoder, which IBQ has not. Only false works.")
    return Emu35VisionTokenizerConfig(
        codebook_size=released["n_embed"],
        embed_dim=released["embed_dim"],
        latent_channels=network["z_channels"],
        base_channels=network["ch"],
        channel_multiplier=list(network["ch_mult"]),
        num_res_blocks=network["num_res_blocks"],
        attn_resolutions=list(network["attn_resolutions"]),
        resolution=network["resolution"],
        in_channels=network.get("in_channels", 3),
        out_channels=network.get("out_ch", 3),
        dropout=network.get("dropout", 0.0),
    )


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        # Only the zip format can be memory-mapped; the old one is read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain state dict: reading it would need more than tensors, and nothing in it was run. "
            f"Only load checkpoints that hold tensors ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated or no torch file at all: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{path} holds a {type(content).__name__} that is not a state dict (name -> tensor).")
    return dict(content)


__all__ = ["is_released_vision_tokenizer", "load_released_vision_tokenizer", "read_released_config"]
