"""Files of a training run that survive `kill -9`: a checkpoint is the old one or the new one, never half of one."""

import json
import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: str | os.PathLike, state: dict[str, Any]):
    """Write tensors and plain values so that a crash at any moment leaves the previous file intact.

    Args:
        path (`str` or `os.PathLike`): the file; its folder is made.
        state (`dict`): tensors, numbers, strings, and dicts and lists of them (what `weights_only=True` reads back).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # without it a power cut can leave a renamed but empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | os.PathLike) -> dict[str, Any] | None:
    """What [`save_state`] wrote, on the CPU, or `None` if there is no such file."""
    return torch.load(path, map_location="cpu", weights_only=True) if Path(path).is_file() else None


class LossLog:
    """One JSON line a record.  Reopened at a step, it forgets what followed, so a resumed run reads as one.

    Args:
        path (`str` or `os.PathLike`): the file, made on the first record.
        next_step (`int`): records of this step and later are dropped.
    """

    def __init__(self, path: str | os.PathLike, next_step: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(self.path) if record["step"] < next_step]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)

    def write(self, step: int, **values: Any):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class ResumedAtTheEnd:
    """Mixed into a [`Trainer`], which would otherwise make one more step when it is resumed after its last."""

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a [`LossLog`]; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
