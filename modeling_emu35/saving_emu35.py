"""Writing folders and checkpoints so that a failure leaves what was there before.

A file is written beside its final place, flushed to the disk, and then renamed. Whatever interrupts that (an error,
Ctrl-C, a full disk) leaves the old files as they were. A killed process also leaves a hidden folder `.*.incomplete-*`.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .adapters_emu35 import adapter_layers, without_adapters

_WEIGHTS_FILE = re.compile(
    r"model(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<index_variant>[^.]+))?\.json)?"
)


def check_output_directory(path: str | os.PathLike, overwrite: bool = False, name: str = "path") -> Path:
    """The absolute path of a folder that may be written.

    Args:
        overwrite (`bool`): whether it may hold something already.
        name (`str`): what the caller calls `path`, for the message.
    Raises:
        NotADirectoryError: if it, or the place it would be in, is a file.
        FileExistsError: if it holds something and `overwrite` is false.
    """
    target = Path(path).resolve()
    file = next((part for part in (target, *target.parents) if part.exists() and not part.is_dir()), None)
    if file is not None:
        raise NotADirectoryError(
            f"`{name}`={str(path)!r} must be a folder, but {file} is a file. Choose another name."
        )
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(
            f"`{name}`={str(path)!r} exists and is not empty. Nothing in it was touched; choose another folder, or "
            "empty this one."
        )
    return target


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike, overwrite: bool = False, name: str = "path") -> Iterator[Path]:
    """A folder that appears as a whole, or not at all.

    Args:
        path: where it shall be in the end.
        overwrite (`bool`): whether to replace a folder of that name, and all that is in it.
        name (`str`): what the caller calls `path`, for messages.
    Yields:
        `Path`: an empty folder to write into. After the `with` block it is renamed to `path`; if the block raises, it
        is removed and `path` stays as it was.
    Raises:
        NotADirectoryError, FileExistsError: see [`check_output_directory`].

    Example:
        >>> with atomic_directory("out") as folder:
        ...     (folder / "a.txt").write_text("a")
    """
    target = check_output_directory(path, overwrite, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A mount point cannot be replaced, nor a folder in a place that is not ours: those are filled instead.
    fill = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
    staging = _staging_directory(target if fill else target.parent, target.name)
    try:
        yield staging
        _make_durable(staging)
        if fill:
            old = [entry for entry in target.iterdir() if entry != staging]
            _replace(staging, target, remove=[entry.name for entry in old])
        else:
            _swap(staging, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class AtomicSaveMixin:
    """`save_pretrained` that leaves an older checkpoint in the same folder intact when it fails.

    Stands before `PreTrainedModel` among the bases.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """[`~transformers.PreTrainedModel.save_pretrained`], with these differences.

        Files appear in `save_directory` when all of them are complete; until then what was there stays. Weights of an
        earlier save that are no part of the new one are removed: an old `model.safetensors` wins over new shards.
        Other files of the folder are left alone.
        """
        if kwargs.get("distributed_checkpoint"):  # all processes write into one folder
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        states = (getattr(parameter, "quant_state", None) for parameter in self.parameters())
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not adapter and any(getattr(state, "packing_format_for_cpu", False) for state in states):
            # bitsandbytes 0.50 undoes the rearrangement of the codes when saving, not that of the scales.
            raise ValueError(
                "a 4-bit model cannot be saved after it has run on a CPU: bitsandbytes has rearranged its weights for "
                "that. Load it again and save it first."
            )
        target = check_output_directory(save_directory, overwrite=True, name="save_directory")
        existed = target.exists()
        if push_to_hub:
            kwargs.setdefault("repo_id", target.name)
        staging = _staging_directory(target, "save")
        # One that is loaded but not active, like DiDA's, is no part of the model.
        layers = adapter_layers(self)
        inactive = layers and not any(layer.active_adapters for layer in layers)
        try:
            with without_adapters(self) if inactive else contextlib.nullcontext():
                super().save_pretrained(
                    staging, is_main_process=is_main_process, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs
                )
            _make_durable(staging)
            _replace(staging, target, remove=_stale_weights(staging, target))
            _sync(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):  # not empty: all went well
                    target.rmdir()
        # The base class lets the other processes go on once files are in `staging`; they will look in `target`.
        barrier = getattr(self, "barrier_after_gathered_checkpoint_save", None)
        if barrier is not None:
            barrier(getattr(self.config, "distributed_config", None))


def _staging_directory(parent: Path, name: str) -> Path:
    # Not tempfile.mkdtemp, whose folders only their owner may read.
    staging = parent / f".{name}.incomplete-{secrets.token_hex(4)}"
    staging.mkdir(parents=True)
    return staging


def _make_durable(directory: Path) -> None:
    """Flushes all files to the disk, and gives them the permissions that new files of this process have."""
    # safetensors writes files that only their owner may read.
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for folder, _, files in os.walk(directory):
        for file in files:
            path = Path(folder, file)
            if path.is_symlink():
                continue
            with contextlib.suppress(OSError):  # not every file system knows permissions
                path.chmod(mode)
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())  # network file systems say only here that the disk is full
        _sync(Path(folder))


def _sync(directory: Path) -> None:
    """Makes renames in `directory` survive a power failure, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`, in place of what is there."""
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(staging, target)
        return
    old = staging.with_name(f"{staging.name}-old")
    os.replace(target, old)
    try:
        os.replace(staging, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replace(staging: Path, target: Path, remove: list[str]) -> None:
    """Moves what is in `staging` into `target` and removes `remove` there; undoes all of it if a step fails."""
    old = staging / ".old"
    new = sorted(staging.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name))
    old.mkdir()
    names = [entry.name for entry in new]
    put_aside: list[str] = []
    moved: list[str] = []
    try:
        for name in [*remove, *(name for name in names if name not in remove)]:
            if (target / name).exists():
                put_aside.append(name)
                os.replace(target / name, old / name)
            if name in names:
                moved.append(name)
                os.replace(staging / name, target / name)
    except BaseException:
        for name in moved:
            if (target / name).exists():
                os.replace(target / name, staging / name)
        for name in put_aside:
            if (old / name).exists():
                os.replace(old / name, target / name)
        raise


def _stale_weights(staging: Path, target: Path) -> list[str]:
    """Weight files in `target` that would be mistaken for part of the checkpoint in `staging`."""
    new = {entry.name for entry in staging.iterdir()}
    variants = {_variant(name) for name in new} - {None}
    return [entry.name for entry in target.iterdir() if entry.name not in new and _variant(entry.name) in variants]


def _variant(name: str) -> str | None:
    """The variant a weight file belongs to, "" for the usual one; `None`: no weight file."""
    match = _WEIGHTS_FILE.fullmatch(name)
    return None if match is None else match["variant"] or match["index_variant"] or ""


__all__ = ["AtomicSaveMixin", "atomic_directory", "check_output_directory"]
