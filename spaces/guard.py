"""What gradio would let in: files by their addresses, and more uploads than there is room for."""

import functools
import threading
import time
from collections import deque
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, traverse
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Bytes that an upload counts at least, so that many small ones are bounded, too; and what surrounds a file in it.
_LEAST = 2**16


def refuse_addresses(app: gr.Blocks):
    """Lets clients send files only, no addresses.

    Gradio would download what an address names, whole and from wherever the server can reach, before any component
    or check sees it.
    """
    preprocess_data = app.preprocess_data

    @functools.wraps(preprocess_data)
    async def guarded(block_fn: Any, inputs: list[Any], *others: Any, **named: Any) -> list[Any]:
        traverse(inputs, _refuse_address, is_file_obj_with_meta)
        return await preprocess_data(block_fn, inputs, *others, **named)

    app.preprocess_data = guarded


def _refuse_address(file: dict[str, Any]) -> dict[str, Any]:
    if "://" in file["path"]:
        raise gr.Error("Send the picture as a file, not as an address: download it first.", print_exception=False)
    return file


class UploadQuota:
    """Bounds what uploads take of the disk: a layer (ASGI) around the app, which answers in its place.

    Args:
        max_bytes (`int`): of one upload.
        max_kept_bytes (`int`): of all within `seconds`. An address may have half of it, as of the queue.
        seconds (`float`): that an upload is kept at most.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_kept_bytes: int, seconds: float):
        self.app, self.max_bytes, self.max_kept_bytes, self.seconds = app, max_bytes, max_kept_bytes, seconds
        self._lock = threading.Lock()
        self._kept: deque[tuple[float, str, int]] = deque()  # when, from where, bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        is_upload = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload")
        refusal = self._refusal(scope) if is_upload else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return PlainTextResponse("Say how long the upload is (Content-Length).", 411)
        size = max(int(length), _LEAST)
        if size > self.max_bytes + _LEAST:
            return PlainTextResponse(f"A file may have {self.max_bytes / 2**20:g} MB. Choose a smaller one.", 413)
        address = (scope.get("client") or ("",))[0]
        now = time.monotonic()
        with self._lock:
            while self._kept and self._kept[0][0] < now - self.seconds:
                self._kept.popleft()
            everybody = size + sum(one for _, _, one in self._kept)
            own = size + sum(one for _, sender, one in self._kept if sender == address)
            if everybody > self.max_kept_bytes or own > self.max_kept_bytes / 2:
                minutes = max(1, round((self._kept[0][0] + self.seconds - now) / 60)) if self._kept else 1
                return PlainTextResponse(
                    f"There is no room for more uploads now. Try again in {minutes} minutes.",
                    429,
                    headers={"Retry-After": str(60 * minutes)},
                )
            self._kept.append((now, address, size))
        return None


__all__ = ["UploadQuota", "refuse_addresses"]
