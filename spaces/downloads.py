"""Files to take along: pictures that say how they were made, stories as a page or a video.

Each session has a temporary folder of its own. It goes with the session, with the server, or when it is old.
"""

import atexit
import hashlib
import re
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
from emu35 import Segments
from PIL.PngImagePlugin import PngInfo

from .turns import Visitor
from .updates import UNFINISHED

_MAX_NAME = 40
#: How the names of files of unfinished pictures end.
UNFINISHED_NAME = "-unfinished"


@cache
def _root() -> Path:
    """The server's own folder, readable by nobody else; removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="emu35-downloads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _folder(user: Visitor) -> Path:
    """The folder of a session.  The name is hashed, since a client chooses it."""
    folder = _root() / hashlib.sha256(user.session.encode("utf-8", "replace")).hexdigest()[:32]
    folder.mkdir(exist_ok=True)
    return folder


def remove_downloads(user: Visitor):
    """Removes what was written for a session."""
    shutil.rmtree(_folder(user), ignore_errors=True)


def remove_older_than(seconds: float, root: Path | None = None):
    """Removes the folders of `root` (default: that of the downloads) that nothing was written to for so long."""
    late = time.time() - seconds
    for folder in (root or _root()).iterdir():
        if all(path.stat().st_mtime < late for path in (folder, *folder.rglob("*"))):
            shutil.rmtree(folder, ignore_errors=True)


def save_png(
    image: PIL.Image.Image,
    user: Visitor,
    *,
    prompt: str = "",
    seed: int | None = None,
    kind: str = "",
    **made_with: Any,
) -> Path:
    """Writes a picture as PNG.

    Args:
        prompt (`str`), seed (`int`), made_with:
            stand in it as texts (`Image.open(path).text`); `None` is left out. So does that it is unfinished.
        kind (`str`): ends its name, where one prompt and seed make several.
    Returns:
        `Path`: the file, named after prompt and seed.
    """
    metadata = PngInfo()
    unfinished = UNFINISHED in image.info
    made_with["unfinished"] = "stopped before its end" if unfinished else None
    for name, value in {"Software": "emu35", "prompt": prompt or None, "seed": seed, **made_with}.items():
        if value is not None:
            metadata.add_itxt(name, str(value))
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_MAX_NAME].strip("-") or "picture"
    name = "-".join([words, *([] if seed is None else [str(seed)]), *([kind] if kind else [])])
    path = _folder(user) / f"{name}{UNFINISHED_NAME if unfinished else ''}.png"
    image.save(path, pnginfo=metadata)
    return path


def save_story(segments: Segments, user: Visitor, *, prompt: str, title: str | None = None) -> list[Path]:
    """Writes an answer as a page that needs no other file and, where it can be made, as a video.

    Returns:
        `list[Path]`: `index.html`, and perhaps `story.mp4`: that needs imageio and a finished picture.
    """
    folder = segments.save(_folder(user) / "story", title=title, prompt=prompt)
    return [path for path in (folder / "index.html", folder / "story.mp4") if path.is_file()]


__all__ = ["UNFINISHED_NAME", "remove_downloads", "remove_older_than", "save_png", "save_story"]
