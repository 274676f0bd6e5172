"""The app as a server: health, bounds, and cleaning up.

    python -m emu35.spaces.app          # or `emu35 demo`

What waits for the model waits in the engine's own fair queue (`turns`); gradio's lets everything through to it and is
bounded only against floods. Behind a proxy, FORWARDED_ALLOW_IPS (uvicorn's) says whose word about visitors' addresses
counts; README.md beside this file says what to beware of.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .downloads import remove_older_than
from .engine import Engine, SpaceSettings
from .guard import UploadQuota
from .zero_gpu import IS_ZERO_GPU

logger = logging.getLogger(__name__)

#: Threads, and requests at gradio, beyond those that wait for the model: page loads, stops, downloads.
_SPARE = 24
#: Of requests gradio keeps statistics, 10,000 by default, and goes through all of them each time.
_NUM_STATISTICS = "200"
_SESSIONS = 1000


def start(
    engine: Engine, host: str | None = None, port: int | None = None, *, open_browser: bool = False, **launch: Any
) -> gr.Blocks:
    """Starts the server in a thread.

    Args:
        host (`str`, *optional*): default: GRADIO_SERVER_NAME, else this machine only.
        port (`int`, *optional*): default: GRADIO_SERVER_PORT, else the first free one from 7860 on.
        launch: further arguments of `gr.Blocks.launch`.
    Returns:
        `gr.Blocks`: with `local_url`, `block_thread()` and `close()`.
    """
    from .app import LOOK, build_app  # which may be the script that imports this module

    settings = engine.settings
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", _NUM_STATISTICS)
    own = None if "GRADIO_TEMP_DIR" in os.environ else _own_folder()
    if own is not None:
        os.environ["GRADIO_TEMP_DIR"] = own
    app = build_app(engine)
    app.queue(max_size=settings.queue_size + _SPARE, default_concurrency_limit=None)
    loading = threading.Thread(target=engine.load, name="loading", daemon=True)
    loading.start()
    if IS_ZERO_GPU:
        loading.join()  # what is on the GPU when the server starts is what its other processes get

    def health(request: Request) -> JSONResponse:
        """For those who watch over the server."""
        state = "ready" if engine.is_loaded else "loading" if loading.is_alive() else "failed"
        values = {"status": state, "waiting": engine.num_waiting, "busy": engine.is_busy}
        return JSONResponse(values, status_code=503 if state == "failed" else 200)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any):
        cleaning = asyncio.create_task(_clean(settings.delete_after, own))
        yield
        cleaning.cancel()

    quota = Middleware(
        UploadQuota,
        max_bytes=settings.max_upload_bytes,
        max_kept_bytes=settings.max_kept_bytes,
        seconds=2 * settings.delete_after,  # gradio looks for old files as often as they may be old
    )
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        show_error=False,  # only what is meant for people reaches them
        max_threads=settings.queue_size + _SPARE,
        max_file_size=settings.max_upload_bytes,
        state_session_capacity=_SESSIONS,
        run_history=False,
        footer_links=["api", "settings"],
        app_kwargs={"routes": [Route("/health", health)], "lifespan": lifespan, "middleware": [quota]},
        quiet=True,
        **LOOK,
        **launch,
    )
    return app


def _own_folder() -> str:
    """For uploads and what gradio shows. Its default is one for all of its servers on a machine."""
    folder = tempfile.mkdtemp(prefix="emu35-gradio-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


async def _clean(age: float, folder: str | None):
    """Removes old downloads, and what gradio (`Blocks(delete_cache=...)`) forgets of its own `folder`.

    It forgets the files of components that were changed for a session, such as those of download buttons.
    """
    while True:
        await asyncio.sleep(age / 2)
        await asyncio.to_thread(remove_older_than, age)
        if folder is not None:
            await asyncio.to_thread(remove_older_than, 2 * age, Path(folder))


def serve(host: str | None = None, port: int | None = None, *, open_browser: bool = False):
    """Serves what the environment names (see `settings`) until it is interrupted."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    engine = Engine(SpaceSettings.from_environment())
    app = start(engine, host, port, open_browser=open_browser)
    logger.warning("%s Open %s", engine.about, app.local_url)
    app.block_thread()


__all__ = ["serve", "start"]
