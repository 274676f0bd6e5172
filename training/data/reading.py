"""Data of users as rows, and rows as messages.

    a folder     images with metadata.jsonl or metadata.csv (column `file_name`), or with captions NAME.txt
    a file       .jsonl or .json (a list), .csv, .parquet
    a dataset    a folder of `Dataset.save_to_disk`, or the name of one on the Hub

A row has the column `messages` (as [`Emu35Processor.apply_chat_template`] takes them; images without a source come
from the column `image` or `images`, one after the other), or these, of which the first line that fits holds:

    columns                                            task    what the assistant says
    question, answer, image or images                  vqa     the answer
    instruction, input_image or input_images, image    x2i     the image
    text (or caption, or prompt), image                t2i     the image

Where the text of a user says `<image>`, an image of the row stands. A row that has images which nothing shows is bad:
learnt without them, its answer would be a guess.

Folders and files are read here and not by `datasets`, which ends at the first image that is missing.
"""

import csv
import dataclasses
import difflib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXT_COLUMNS = ("text", "caption", "prompt")
_IMAGE_COLUMNS = ("image", "images", "input_image", "input_images")
_MARKER = "<image>"
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
        ValueError: if there are no rows, or a file is not of its format or not UTF-8.
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
        rows = _rows_of(_load_dataset(str(path), split=split, streaming=streaming))
    if not streaming and not len(rows):
        raise ValueError(f"data: {path} has no rows.")
    return rows


def _read_file(path: Path, split: str, streaming: bool) -> Sequence[dict] | Iterable:
    if path.suffix == ".parquet":
        return _rows_of(_load_dataset("parquet", str(path), split="train", streaming=streaming))
    if path.suffix == ".jsonl":
        # Not `splitlines`, for which U+2028 inside a text ends a line, too.
        lines = _read_text(path).split("\n")
        rows = [_read_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".json":
        try:
            rows = json.loads(_read_text(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"data: {path} must hold a list of rows, got {type(rows).__name__}.")
        rows = [_as_row(row, f"item {number}") for number, row in enumerate(rows)]
    elif path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_read_text(path, newline=""), newline=""))  # csv finds the ends of lines
        rows = [_read_cells(row, reader.line_num) for row in reader]
    else:
        raise ValueError(f"data: {path} is none of .jsonl, .json, .csv, .parquet.")
    return [_with_absolute_paths(row, path.parent) for row in rows]


def _read_text(path: Path, newline: str | None = None) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}. Save it as UTF-8.") from error


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
        return _rows_of(_load_dataset("parquet", tables, split="train", streaming=streaming))
    rows = []
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            rows.append(BadRow(reason=f"{image} has no caption: there is neither {caption.name} nor metadata.jsonl."))
            continue
        try:
            rows.append({"image": str(image.absolute()), "text": _read_text(caption).strip()})
        except ValueError as error:
            rows.append(BadRow(reason=str(error)))
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
    return _rows_of(found)


def _rows_of(dataset) -> Sequence[dict] | Iterable:
    """Images stay bytes or paths, so that a broken one is an error of its own row."""
    if hasattr(dataset, "__len__"):
        return _Rows(dataset)
    return dataset.decode(False) if dataset.features else dataset


class _Rows(Sequence):
    """A dataset whose images are not decoded, wherever they are, and whose unreadable rows are bad ones.

    Not a `cast` of it, which writes a copy of all that has images inside of lists.
    """

    def __init__(self, dataset):
        import datasets

        self._table = dataset.with_format("arrow")
        self._features = datasets.Features(_undecoded(dataset.features))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict:
        try:
            return self._features.decode_example(self._table[index].to_pylist()[0])
        except (ValueError, OverflowError, OSError) as error:  # pyarrow's own are of these
            return BadRow(reason=f"the row cannot be read: {error}")


def _undecoded(feature: Any) -> Any:
    import datasets

    if isinstance(feature, dict):
        return {name: _undecoded(one) for name, one in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if hasattr(feature, "decode") else feature


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
    columns, empty = row.keys(), {name for name, value in row.items() if value is None}
    row = {name: value for name, value in row.items() if not isinstance(value, (list, type(None))) or value}
    if "messages" in row:
        images = _listed(row, "images", "image") if {"image", "images"} & columns else None
        messages = _fill_images(row["messages"], images)
        if not any(map(_images_of, messages)):
            _require_all_read(row, "image", "images")
    else:
        messages = _from_columns(row, empty)
    for number, message in enumerate(messages, 1):
        if message.get("role") == "assistant" and not _says_something(message.get("content")):
            raise ValueError(f"the row has no answer: message {number} of {len(messages)}, the assistant's, is empty.")
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("the row has no answer: its last message must be the assistant's.")
    return messages, row.get("task") or task or _guess_task(messages)


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    if not isinstance(content, (list, tuple)):
        return content is not None  # of a wrong type: the chat template says so
    return any(_says_something(item.get("text", item) if isinstance(item, dict) else item) for item in content)


def _from_columns(row: dict, empty: set[str]) -> list[dict]:
    if "question" in row or "answer" in row:
        answer = {"role": "assistant", "content": _text(row, "answer")}
        _require_image(row, empty, "images", "image")
        _require_all_read(row, "image", "images")
        return _asked(_text(row, "question"), _listed(row, "images", "image"), answer)
    if "instruction" in row:
        _require_image(row, empty, "input_images", "input_image")
        _require_all_read(row, "input_image", "input_images", "image")
        images = _listed(row, "input_images", "input_image")
        if not images:
            raise ValueError("the row's image is missing: `instruction` needs the column `input_image`.")
        return _asked(_text(row, "instruction"), images, _picture(row))
    name = next((name for name in TEXT_COLUMNS if name in row), None)
    if name is not None:
        _require_all_read(row, "image")
        return [{"role": "user", "content": [_text(row, name)]}, _picture(row)]
    raise ValueError(
        f"the columns {', '.join(row) or '(none)'} make no conversation. Give `messages`, or `text` and `image`, or "
        f"`instruction`, `input_image` and `image`, or `question`, `image` and `answer`.{_hint(row, _KNOWN_COLUMNS)}"
    )


def _text(row: dict, name: str) -> str:
    """Numbers, too: JSON and tables have them where an answer is one."""
    if name not in row:
        raise ValueError(f"the row has no {name}: there is no column `{name}`, or it is empty.{_hint(row, (name,))}")
    value = row[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text or a number, got {value!r:.80}.")
    return value


def _slips(row: dict, names: Sequence[str]) -> str:
    """Columns of unknown names that are nearly one of `names`: "'imgae' for 'image'"."""
    found = []
    for column in row.keys() - set(_KNOWN_COLUMNS):
        plain = re.sub("img|picture|photo", "image", re.sub("_(path|file|name|url)$", "", column.lower()))
        found += [f"{column!r} for {near!r}" for near in difflib.get_close_matches(plain, names, n=1, cutoff=0.75)]
    return ", ".join(sorted(found))


def _hint(row: dict, names: Sequence[str]) -> str:
    slips = _slips(row, names)
    return f" A slip, perhaps: {slips}." if slips else ""


def _require_all_read(row: dict, *read: str):
    """No column of images may be left over, under its right name or a wrong one."""
    unread = [name for name in _IMAGE_COLUMNS if name in row and name not in read]
    if unread:
        raise ValueError(
            f"nothing shows the images of `{unread[0]}`: a row of this form has them in `{'` or `'.join(read)}`. "
            "Rename the column, or remove it."
        )
    filled = {name.removesuffix("s") for name in row}  # an `image_id` beside an image is no slip
    missing = [name for name in _IMAGE_COLUMNS if name.removesuffix("s") not in filled]
    slips = _slips({name: value for name, value in row.items() if not isinstance(value, (int, float))}, missing)
    if slips:
        raise ValueError(f"the row's image is missing. A slip, perhaps: {slips}. Rename the column, or remove it.")


def _require_image(row: dict, empty: set[str], plural: str, singular: str):
    """A column that is there says that the row shows an image: learnt without, its answer would be a guess."""
    name = next((one for one in (singular, plural) if one in empty), None)
    if name is not None and not _listed(row, plural, singular):
        raise ValueError(f"the row's image is missing: `{name}` is empty. Give a row without images as `messages`.")
    if None in _listed(row, plural, singular):
        raise ValueError(f"the row's image is missing: one of `{plural}` is empty.")


def _asked(text: str, images: list, answer: dict) -> list[dict]:
    places = [] if _MARKER in text else [{"type": "image"}] * len(images)
    return _fill_images([{"role": "user", "content": [*places, text]}, answer], images or None)


def _picture(row: dict) -> dict:
    if "image" not in row:
        raise ValueError("the row has no answer: there is no column `image`.")
    return {"role": "assistant", "content": [_image(row["image"])]}


def _image(source: Any) -> dict:
    if isinstance(source, dict):  # as `datasets` stores them
        source = source.get("bytes") or source.get("path")
    return {"type": "image", "image": source}


def _listed(row: dict, plural: str, singular: str) -> list:
    if plural in row and singular in row:
        raise ValueError(f"the row has `{singular}` and `{plural}`. Give one of them, with all images.")
    found = row.get(plural, row.get(singular, []))
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _fill_images(messages: Any, images: list | None) -> list[dict]:
    """Images of messages that have no source of their own are those of the row, in order.

    Args:
        images (`list`, *optional*): `None`: the row has no such column; then `<image>` is text like any other.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"`messages` must be a list of dicts, got {messages!r:.200}.")
    messages = [{**message, "content": _items(message.get("content"))} for message in messages]
    asked = [message for message in messages if message.get("role") == "user"]
    if images is not None and not any(map(_images_of, asked)):
        for message in asked:
            message["content"] = _at_markers(message["content"])
    shown = [image for message in messages for image in _images_of(message)]
    places = [image for image in shown if len(image) == 1]
    given = len(images or [])
    if len(places) > given or (len(places) < given and (places or not shown)):
        raise ValueError(
            f"the row has {given} images, but places for {len(places)}. Say where each one stands, by an item "
            '{"type": "image"} of a content or <image> in the text of a user.'
        )
    waiting = iter(images or [])
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [_sourced(item, waiting) for item in message["content"]]
    return messages


def _items(content: Any) -> Any:
    return [_without_nones(item) for item in content] if isinstance(content, list) else content


def _sourced(item: Any, waiting: Iterator) -> Any:
    if not _is_image(item):
        return item
    if len(item) == 1:
        return _image(next(waiting))
    return _image(item["image"]) if isinstance(item.get("image"), dict) else item


def _at_markers(content: Any) -> Any:
    """Places for images instead of the markers in a text and the line breaks around them, which LLaVA's data has."""
    if not isinstance(content, (str, list)):
        return content  # of a wrong type: the chat template says so
    items: list = []
    for item in [content] if isinstance(content, str) else content:
        text = item.get("text") if isinstance(item, dict) else item
        if isinstance(text, str) and _MARKER in text:
            pieces = re.split(rf"\n*({_MARKER})\n*", text)
            items += [{"type": "image"} if piece == _MARKER else piece for piece in pieces if piece]
        else:
            items.append(item)
    return items


def _without_nones(item: Any) -> Any:
    """Arrow gives every item of a list all keys."""
    return {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item


def _guess_task(messages: list[dict]) -> str:
    def shows(role: str) -> int:
        return sum(len(_images_of(message)) for message in messages if message.get("role") == role)

    def says(message: dict) -> bool:
        content = message["content"]
        return isinstance(content, str) or any(not _is_image(item) for item in content)

    drawn, shown = shows("assistant"), shows("user")
    if sum(message.get("role") == "user" for message in messages) > 1:
        return "chat"
    if not drawn:
        return "vqa" if shown else "chat"
    if drawn > 1 or says(messages[-1]):
        return "story"
    return "x2i" if shown else "t2i"


def _images_of(message: dict) -> list[dict]:
    content = message.get("content")
    return [item for item in content if _is_image(item)] if isinstance(content, list) else []


def _is_image(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "image"
