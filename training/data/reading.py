"""Data of users as rows, and rows as messages.

    a folder     images with metadata.jsonl or metadata.csv (column `file_name`), or with captions NAME.txt
    a file       .jsonl or .json (a list), .csv, .parquet
    a dataset    a folder of `Dataset.save_to_disk`, or the name of one on the Hub

A row has the column `messages` (as [`Emu35Processor.apply_chat_template`] takes them; images without a source come
from the column `images`, one after the other), or these, of which the first line that fits holds:

    columns                                            task    what the assistant says
    question, answer, image or images                  vqa     the answer
    instruction, input_image or input_images, image    x2i     the image
    text (or caption, or prompt), image                t2i     the image

Folders and files are read here and not by `datasets`, which ends at the first image that is missing.
"""

import csv
import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXT_COLUMNS = ("text", "caption", "prompt")
_IMAGE_COLUMNS = ("image", "images", "input_image", "input_images")
_KNOWN_COLUMNS = ("messages", "question", "answer", "instruction", *_IMAGE_COLUMNS, *TEXT_COLUMNS)


class BadRow(dict):
    """Stands for a row that cannot even be read.  `BadRow(reason=...)`."""


def read_rows(path: str | os.PathLike, split: str = "train", streaming: bool = False) -> Sequence[dict] | Iterable:
    """The rows of a folder, a file or a dataset.  Images are not opened.

    Args:
        path (`str` or `os.PathLike`): see the table above.
        split (`str`): of a dataset.
        streaming (`bool`): do not download or convert a dataset first; then its rows come in one order.
    Returns:
        A sequence of `dict`; with `streaming` an iterable that can be read again. Paths of images are absolute.
    Raises:
        FileNotFoundError: if there is nothing there.
        ValueError: if there are no rows.
    """
    local = Path(path)
    if local.is_file():
        rows = _read_file(local, split, streaming)
    elif local.is_dir() and any((local / name).is_file() for name in ("state.json", "dataset_dict.json")):
        rows = _read_saved(local, split)
    elif local.is_dir():
        rows = _read_folder(local, split, streaming)
    elif local.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise FileNotFoundError(f"data: there is no file or folder {path}.")
    else:
        rows = _undecoded(_load_dataset(str(path), split=split, streaming=streaming), streaming)
    if not streaming and not len(rows):
        raise ValueError(f"data: {path} has no rows.")
    return rows


def _read_file(path: Path, split: str, streaming: bool) -> Sequence[dict] | Iterable:
    if path.suffix == ".parquet":
        return _undecoded(_load_dataset("parquet", str(path), split="train", streaming=streaming), streaming)
    if path.suffix == ".jsonl":
        # Not `splitlines`, for which U+2028 inside a text ends a line, too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        rows = [_read_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"data: {path} must hold a list of rows, got {type(rows).__name__}.")
        rows = [_as_row(row, f"item {number}") for number, row in enumerate(rows)]
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:  # line breaks inside a cell are csv's to find
            reader = csv.DictReader(file)
            rows = [_read_cells(row, reader.line_num) for row in reader]
    else:
        raise ValueError(f"data: {path} is none of .jsonl, .json, .csv, .parquet.")
    return [_with_absolute_paths(row, path.parent) for row in rows]


def _read_line(line: str, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(reason=f"line {number} is not JSON: {error}")
    return _as_row(row, f"line {number}")


def _as_row(row: Any, where: str) -> dict:
    return row if isinstance(row, dict) else BadRow(reason=f"{where} is no JSON object: {row!r:.80}")


def _read_cells(row: dict, line: int) -> dict:
    """An empty cell is a missing value."""
    if None in row:  # where `csv` puts what is left over
        return BadRow(reason=f"line {line} has more cells than the header. Put a text with commas in double quotes.")
    return {name: value or None for name, value in row.items()}


def _read_folder(folder: Path, split: str, streaming: bool) -> Sequence[dict] | Iterable:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return _read_file(folder / name, split, streaming)
    tables = sorted(str(path) for path in folder.rglob("*.parquet"))
    if tables:
        return _undecoded(_load_dataset("parquet", tables, split="train", streaming=streaming), streaming)
    rows = []
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        caption = image.with_suffix(".txt")
        if caption.is_file():
            rows.append({"image": str(image.absolute()), "text": caption.read_text(encoding="utf-8").strip()})
        else:
            rows.append(BadRow(reason=f"{image} has no caption: there is neither {caption.name} nor metadata.jsonl."))
    if not rows:
        raise ValueError(f"data: the folder {folder} has no metadata.jsonl, no .parquet files and no images.")
    return rows


def _with_absolute_paths(row: dict, folder: Path) -> dict:
    """Paths of images are relative to the file they stand in; `file_name` columns become image columns."""
    if isinstance(row, BadRow):
        return row
    named = {}
    for column, value in row.items():  # as `datasets` names them: file_name, input_image_file_name, images_file_names
        for ending, plural in (("file_names", "s"), ("file_name", "")):
            if column == ending or column.endswith(f"_{ending}"):
                column = column[: -len(ending)].rstrip("_") or f"image{plural}"
        named[column] = value

    row = {name: _absolute(value, folder) if name in _IMAGE_COLUMNS else value for name, value in named.items()}
    if isinstance(row.get("messages"), list):
        row["messages"] = [absolute_message(message, folder) for message in row["messages"]]
    return row


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    is_path = isinstance(value, str) and not value.startswith(("http://", "https://", "data:"))
    return str((folder / value).absolute()) if is_path else value


def absolute_message(message: Any, folder: Path) -> Any:
    """A message whose images' paths were relative to a folder."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = [
        {key: _absolute(value, folder) if key in ("image", "path") else value for key, value in item.items()}
        if isinstance(item, dict) and item.get("type") == "image"
        else item
        for item in message["content"]
    ]
    return {**message, "content": content}


def _load_dataset(*args, **kwargs):
    try:
        import datasets
    except ImportError as error:
        raise ValueError("this data needs the package `datasets`: pip install 'emu35[train]'") from error
    return datasets.load_dataset(*args[:1], **({"data_files": args[1]} if len(args) > 1 else {}), **kwargs)


def _read_saved(folder: Path, split: str):
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"data: {folder} has the splits {', '.join(found)}, but not {split!r}.")
        found = found[split]
    return _undecoded(found, False)


def _undecoded(dataset, streaming: bool):
    """Images stay bytes or paths, so that a broken one is an error of its own row."""
    import datasets

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset


# ------------------------------------------------------------------------------------------------------- to messages


def to_messages(row: dict, task: str | None = None) -> tuple[list[dict], str]:
    """A row as a finished conversation, and its task.

    Args:
        row (`dict`): see the table above.
        task (`str`, *optional*): of all rows that do not name one in a column `task`; default: what fits the row.
    Raises:
        ValueError: if the row is of no known form, or has no answer.
    """
    if isinstance(row, BadRow):
        raise ValueError(row["reason"])
    empty = {name for name, value in row.items() if value is None}
    row = {name: value for name, value in row.items() if value is not None}
    has_messages = "messages" in row
    messages = _fill_images(row["messages"], row.get("images", [])) if has_messages else _from_columns(row, empty)
    last = messages[-1] if messages else None
    if last is None or last.get("role") != "assistant" or not _says_something(last.get("content")):
        raise ValueError("the row has no answer: its last message must be the assistant's, and not empty.")
    return messages, row.get("task") or task or _guess_task(messages)


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    if not isinstance(content, (list, tuple)):
        return content is not None  # of a wrong type: the chat template says so
    return any(_says_something(item.get("text", item) if isinstance(item, dict) else item) for item in content)


def _from_columns(row: dict, empty: set[str]) -> list[dict]:
    if "answer" in row and "question" in row:
        _require_image(row, empty, "images", "image")
        images = [_image(image) for image in _listed(row, "images", "image")]
        return [_user(*images, row["question"]), {"role": "assistant", "content": row["answer"]}]
    if "instruction" in row:
        _require_image(row, empty, "input_images", "input_image")
    if "instruction" in row and _listed(row, "input_images", "input_image"):
        images = [_image(image) for image in _listed(row, "input_images", "input_image")]
        return [_user(*images, row["instruction"]), _picture(row)]
    text = next((row[name] for name in TEXT_COLUMNS if name in row), None)
    if text is not None:
        return [_user(text), _picture(row)]
    hints = [
        f"{name!r} for {near[0]!r}"
        for name in row
        if name not in _KNOWN_COLUMNS and (near := difflib.get_close_matches(name, _KNOWN_COLUMNS, n=1, cutoff=0.75))
    ]
    raise ValueError(
        f"the columns {', '.join(row) or '(none)'} make no conversation. Give `messages`, or `text` and `image`, or "
        "`instruction`, `input_image` and `image`, or `question`, `image` and `answer`."
        + (f" A slip, perhaps: {', '.join(hints)}." if hints else "")
    )


def _require_image(row: dict, empty: set[str], plural: str, singular: str):
    """A column that is there says that the row shows an image: learnt without, its answer would be a guess."""
    name = next((one for one in (singular, plural) if one in empty), None)
    if name is not None and not _listed(row, plural, singular):
        raise ValueError(f"the row's image is missing: `{name}` is empty. Give a row without images as `messages`.")
    if None in _listed(row, plural, singular):
        raise ValueError(f"the row's image is missing: one of `{plural}` is empty.")


def _user(*content: Any) -> dict:
    return {"role": "user", "content": list(content)}


def _picture(row: dict) -> dict:
    if "image" not in row:
        raise ValueError("the row has no answer: there is no column `image`.")
    return {"role": "assistant", "content": [_image(row["image"])]}


def _image(source: Any) -> dict:
    if isinstance(source, dict):  # as `datasets` stores them
        source = source.get("bytes") or source.get("path")
    return {"type": "image", "image": source}


def _listed(row: dict, plural: str, singular: str) -> list:
    found = row.get(plural, row.get(singular, []))
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _fill_images(messages: Any, images: Any) -> list[dict]:
    """Images of messages that have no source of their own are those of the row, in order."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"`messages` must be a list of dicts, got {messages!r:.200}.")
    waiting = list(images) if isinstance(images, (list, tuple)) else [images]
    given = len(waiting)
    filled = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = [_without_nones(item) for item in content]
            for index, item in enumerate(content):
                if isinstance(item, dict) and item.get("type") == "image" and len(item) == 1:
                    if not waiting:
                        raise ValueError(f"`messages` have more images without a source than `images` has: {given}.")
                    content[index] = _image(waiting.pop(0))
                elif isinstance(item, dict) and isinstance(item.get("image"), dict):
                    content[index] = _image(item["image"])
        filled.append({**message, "content": content})
    if waiting and given != len(waiting):
        raise ValueError(f"`images` has {given} images, but `messages` have a place for {given - len(waiting)}.")
    return filled


def _without_nones(item: Any) -> Any:
    """Arrow gives every item of a list all keys."""
    return {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item


def _guess_task(messages: list[dict]) -> str:
    def shows(role: str) -> list[int]:
        return [
            sum(_is_image(item) for item in message["content"])
            for message in messages
            if message.get("role") == role and isinstance(message["content"], list)
        ]

    def says(message: dict) -> bool:
        content = message["content"]
        return isinstance(content, str) or any(not _is_image(item) for item in content)

    drawn, shown = sum(shows("assistant")), sum(shows("user"))
    if sum(message.get("role") == "user" for message in messages) > 1:
        return "chat"
    if not drawn:
        return "vqa" if shown else "chat"
    if drawn > 1 or says(messages[-1]):
        return "story"
    return "x2i" if shown else "t2i"


def _is_image(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "image"
