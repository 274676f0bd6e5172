"""Pictures as files that the page may fetch.

Gradio writes a picture anew each time it is shown, even while a browser reads the file, which breaks off then. Here
one picture is one file, written once.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path

import PIL.Image
from gradio.utils import get_upload_folder

#: Where a picture remembers its file, so that it is not encoded again with each update.
_KEY = "emu35_shown_as"


def shown_file(image: PIL.Image.Image) -> str:
    """The path of a PNG of a picture, in the folder that gradio serves and cleans."""
    path = image.info.get(_KEY)
    if path is None or not os.path.exists(path):
        data = io.BytesIO()
        image.save(data, "PNG")
        folder = Path(get_upload_folder()) / hashlib.sha256(data.getvalue()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / "picture.png")
        if not os.path.exists(path):
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(data.getvalue())
            os.replace(file.name, path)
        image.info[_KEY] = path
    return path


__all__ = ["shown_file"]
