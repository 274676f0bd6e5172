"""`emu35 prepare`: images through the vision tokenizer once, and rows as token sequences in parquet files.

    DIR/settings.json         model and settings
    DIR/shard-00000.parquet   input_ids (list of int32), spoken (list of bool), task
    DIR/report.jsonl          rows that were left out, and why; it comes once all shards are there
    DIR/prepared.json         what there is; it comes last

A shard holds a fixed span of rows and appears at once, whole, with a digest of those rows; a run makes the shards that
are missing and those whose rows, or the files they name, have changed since. Of several processes (started by torchrun
or `accelerate launch`) each makes its share of the shards.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from tqdm.auto import tqdm

from .examples import ROW_ERRORS, Example, ExampleWriter, encode_images
from .reading import read_rows

logger = logging.getLogger(__name__)

SETTINGS, DESCRIPTION = "settings.json", "prepared.json"
ROWS_AT_A_TIME = 32
"""Rows whose images wait in memory together."""


def prepare(
    data: str | os.PathLike,
    directory: str | os.PathLike,
    vision_tokenizer: Emu35VisionTokenizer,
    processor: Emu35Processor,
    task: str | None = None,
    image_area: int | None = None,
    max_length: int | None = None,
    split: str = "train",
    streaming: bool = False,
    rows_per_shard: int = 1000,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepares data, or what is left of it and what has changed in it.

    Args:
        data (`str` or `os.PathLike`): see [`read_rows`].
        directory (`str` or `os.PathLike`): is made; gets what the table above says.
        vision_tokenizer ([`Emu35VisionTokenizer`]), processor ([`Emu35Processor`]): of the model to be trained.
        task, image_area, max_length: see [`ExampleWriter`].
        split, streaming: see [`read_rows`].
        rows_per_shard (`int`): rows of the data a file.
        progress (`bool`): show a progress bar.
    Returns:
        `dict`: `settings`, `examples`, `tokens`, `longest`, `tasks`, `left_out`, of all shards that are there by now.
            Once all are, `prepared.json` says the same.
    Raises:
        FileNotFoundError, ValueError: if there is no data, or `directory` was prepared with other settings.
    """
    directory = Path(directory)
    rows = read_rows(data, split, streaming)
    settings = {
        "data": str(data),
        "split": split,
        "task": task,
        "image_area": image_area,
        "max_length": max_length or processor.tokenizer.model_max_length,
        "rows_per_shard": rows_per_shard,
        **model_description(processor, vision_tokenizer),
    }
    _check_settings(directory, settings)
    directory.mkdir(parents=True, exist_ok=True)
    write = ExampleWriter(processor, max_length, task, image_area)
    rank, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    total = len(rows) if hasattr(rows, "__len__") else None
    bar = tqdm(total=total, desc="prepare", unit=" rows", disable=not progress or rank > 0)
    for number_of_shard in itertools.count():
        span = range(number_of_shard * rows_per_shard, (number_of_shard + 1) * rows_per_shard)
        path = directory / f"shard-{number_of_shard:05d}.parquet"
        if total is not None and span.start >= total:
            break
        if total is not None:
            span = range(span.start, min(span.stop, total))
            shard: Sequence = _Span(rows, span)
        else:
            if number_of_shard == 0:
                stream = iter(rows)
            shard = list(itertools.islice(stream, rows_per_shard))
            if not shard:
                break
            span = range(span.start, span.start + len(shard))
        if number_of_shard % num_processes == rank and not _is_current(path, shard):
            for outdated in (directory / DESCRIPTION, path):
                outdated.unlink(missing_ok=True)
            _write_shard(path, span, shard, write, vision_tokenizer, processor)
        bar.update(len(span))
    bar.close()
    for path in directory.glob("shard-*.parquet"):  # of rows that the data has no more
        if int(path.stem.rpartition("-")[2]) >= number_of_shard:
            path.unlink(missing_ok=True)
    return _describe(directory, settings, number_of_shard)


def model_description(
    processor: Emu35Processor | None, vision_tokenizer: Emu35VisionTokenizer | None
) -> dict[str, Any]:
    """What must agree between the model that data was prepared for and the one that is trained on it."""
    found: dict[str, Any] = {}
    if processor is not None:
        layout = processor.token_layout
        found |= {"visual_token_offset": layout.visual_token_offset, "num_visual_tokens": layout.num_visual_tokens}
    if vision_tokenizer is not None:
        # Rounded, so that a tokenizer has one digest in all dtypes it may be loaded in.
        codebook = vision_tokenizer.quantize.embedding.weight.detach().to("cpu", torch.bfloat16).contiguous()
        found["codebook"] = _digest([codebook.view(torch.uint8).numpy().tobytes()])
    return found


class _Span(Sequence):
    """A part of a sequence, read when it is asked for."""

    def __init__(self, rows: Sequence, span: range):
        self.rows, self.span = rows, span

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int):
        return self.rows[self.span[index]]


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _digest_of_rows(rows: Iterable) -> str:
    return _digest(json.dumps(_identity(row), default=str).encode() for row in rows)


def _identity(value: Any) -> Any:
    """What tells a value of a row from another: of a file that it names, when it was written, too."""
    if isinstance(value, dict):
        return {name: _identity(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(one) for one in value]
    if isinstance(value, bytes):
        return _digest([value])
    if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value):
        state = os.stat(value)
        return [value, state.st_size, state.st_mtime_ns]
    return value


def _is_current(path: Path, rows: Sequence) -> bool:
    """Whether a shard is there and of these very rows."""
    import pyarrow.parquet as pq

    if not path.is_file():
        return False
    counts = json.loads(pq.read_schema(path).metadata[b"emu35"])
    return counts.get("rows") == _digest_of_rows(rows)


def _check_settings(directory: Path, settings: dict[str, Any]):
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"--out {directory} is a file. Name a folder.")
    path = directory / SETTINGS
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        if changed:
            raise ValueError(
                f"{directory} was prepared with other settings: {changed[0]} was {earlier.get(changed[0])!r}, now "
                f"{settings[changed[0]]!r}. Name another folder, or delete this one."
            )
        return
    if directory.is_dir() and any(directory.glob("*.parquet")):
        raise ValueError(f"{directory} holds .parquet files of something else. Name another folder.")
    directory.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(settings, indent=2) + "\n")


def _write_shard(path: Path, span: range, rows: Sequence, write: ExampleWriter, vision_tokenizer, processor):
    import pyarrow as pa
    import pyarrow.parquet as pq

    device = next(vision_tokenizer.parameters()).device
    examples: list[Example] = []
    left_out: list[dict[str, Any]] = []

    def encode(images: list[torch.Tensor]) -> list[torch.Tensor]:
        return vision_tokenizer.encode([image.to(device) for image in images])

    digest = _digest_of_rows(rows)  # before they are read: what changes meanwhile is then made again
    numbered = iter(zip(span, rows, strict=True))
    while batch := list(itertools.islice(numbered, ROWS_AT_A_TIME)):
        fresh = []
        for index, row in batch:
            try:
                fresh.append(write(row))
            except ROW_ERRORS as error:
                left_out.append({"row": index, "reason": " ".join(str(error).split())})
        encode_images(fresh, encode, processor.token_layout)
        examples += fresh
    table = pa.table(
        {
            "input_ids": pa.array([one.input_ids for one in examples], pa.list_(pa.int32())),
            "spoken": pa.array([one.spoken for one in examples], pa.list_(pa.bool_())),
            "task": pa.array([one.task for one in examples], pa.string()),
        }
    )
    counts = {"span": [span.start, span.stop], "rows": digest, "left_out": left_out}
    counts["longest"] = max(map(len, examples), default=0)
    counts["tokens"] = sum(map(len, examples))
    table = table.replace_schema_metadata({"emu35": json.dumps(counts)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(directory: Path, settings: dict[str, Any], number_of_shards: int) -> dict[str, Any]:
    """Sums up the shards that are there.  Of several processes, the last one to end finds them all, and says so.

    The others write nothing: a slow one would put its part in the place of the whole.
    """
    import pyarrow.parquet as pq

    summary: dict[str, Any] = {"settings": settings, "examples": 0, "tokens": 0, "longest": 0, "tasks": {}}
    left_out, found = [], 0
    for path in sorted(directory.glob("shard-*.parquet")):
        try:
            table = pq.read_table(path, columns=["task"])
        except FileNotFoundError:  # outdated: the process that makes it anew has deleted it since
            continue
        found += 1
        counts = json.loads(table.schema.metadata[b"emu35"])
        summary["examples"] += len(table)
        summary["tokens"] += counts["tokens"]
        summary["longest"] = max(summary["longest"], counts["longest"])
        for task in table.column("task").to_pylist():
            summary["tasks"][task] = summary["tasks"].get(task, 0) + 1
        left_out += counts["left_out"]
    summary["left_out"] = len(left_out)
    if found == number_of_shards:
        _write_text(directory / "report.jsonl", "".join(json.dumps(one) + "\n" for one in left_out))
        _write_text(directory / DESCRIPTION, json.dumps(summary, indent=2) + "\n")
    return summary


def _write_text(path: Path, text: str):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------- reading


def is_prepared(path: str | os.PathLike) -> bool:
    """Whether a folder is one of [`prepare`], and not data itself.

    Raises:
        ValueError: if it is one that is not finished.
    """
    folder = Path(path)
    if (folder / DESCRIPTION).is_file():
        return True
    if (folder / SETTINGS).is_file() and "rows_per_shard" in (folder / SETTINGS).read_text(encoding="utf-8"):
        raise ValueError(f"data: {folder} is not finished. Run `emu35 prepare` again: it goes on where it was.")
    return False


class PreparedRows(Sequence):
    """What [`prepare`] wrote, by index.  It stays on the disk (memory-mapped, with a copy in `datasets`' cache).

    Args:
        directory (`str` or `os.PathLike`): of [`prepare`].
        processor ([`Emu35Processor`], *optional*), vision_tokenizer ([`Emu35VisionTokenizer`], *optional*):
            of the model to be trained, to see that they are the same.
    Attributes:
        summary (`dict`): what `prepared.json` says.
    Raises:
        ValueError: if it was prepared for another vocabulary or codebook, or holds nothing.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        processor: Emu35Processor | None = None,
        vision_tokenizer: Emu35VisionTokenizer | None = None,
    ):
        import datasets

        directory = Path(directory)
        self.summary = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        if not self.summary["examples"]:
            raise ValueError(f"data: {directory} has no examples; {directory / 'report.jsonl'} tells why.")
        for name, value in model_description(processor, vision_tokenizer).items():
            if self.summary["settings"].get(name) != value:
                what = "vision tokenizer, whose codes mean other images" if name == "codebook" else "vocabulary"
                raise ValueError(
                    f"data: {directory} was prepared for a model with another {what}. `emu35 prepare` it for this "
                    "one, into another folder."
                )
        files = sorted(str(path) for path in directory.glob("shard-*.parquet"))
        self._table = datasets.Dataset.from_parquet(files).with_format("numpy")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table[index]


def read_example(row: dict[str, Any]) -> Example:
    """A row of [`PreparedRows`]."""
    return Example(np.array(row["input_ids"], np.int32), np.array(row["spoken"], bool), str(row["task"]))
