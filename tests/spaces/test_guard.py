"""What gradio would let in."""

import asyncio

import pytest

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'emu35[demo]'")

from emu35.spaces.app import build_app  # noqa: E402 - after what may skip this file
from emu35.spaces.engine import Engine, SpaceSettings  # noqa: E402
from emu35.spaces.examples import TINY  # noqa: E402
from emu35.spaces.guard import UploadQuota  # noqa: E402
from emu35.spaces.parts import _path_of  # noqa: E402
from gradio.state_holder import SessionState  # noqa: E402

KILO = 2**10


@pytest.fixture(scope="module")
def app():
    return build_app(Engine(SpaceSettings.for_model()))


def listeners(app, block):
    """Functions that a click on a block calls."""
    return [one for one in app.fns.values() if any(target == (block._id, "click") for target in one.targets)]


def test_an_example_leaves_the_guard_of_uploads_in_place(app):
    """`gr.Examples` would put gradio's own component, which opens files, in its place."""
    uploads = [one for one in app.blocks.values() if isinstance(one, gr.Image) and one.interactive is not False]
    assert len(uploads) == 9
    boxes = [one for one in app.blocks.values() if isinstance(one, gr.Dataset)]
    assert len(boxes) == 7
    state = SessionState(app)
    for box in boxes:
        for listener in listeners(app, box):
            values = listener.fn(0) if listener.inputs else listener.fn()
            asyncio.run(app.postprocess_data(listener, values, state))
    for upload in uploads:
        assert state[upload._id].preprocess is _path_of


def test_an_example_fills_its_inputs(app):
    box = next(
        one for one in app.blocks.values() if isinstance(one, gr.Dataset) and one.samples[2][0] == TINY.edit[2][0]
    )
    (listener,) = listeners(app, box)
    prompt, first, second = listener.fn(2)
    assert prompt == TINY.edit[2][0] and first != second
    assert first.endswith(".png") and "pictures" not in first  # a copy that gradio may serve


@pytest.mark.parametrize("address", ["https://example.com/cat.png", "http://127.0.0.1:1/", "file:///etc/passwd"])
@pytest.mark.parametrize("endpoint", ["edit", "ask", "tell", "explore", "robot"])
def test_addresses_are_refused_before_anything_is_fetched(app, monkeypatch, endpoint, address):
    async def fetch(*_, **__):
        pytest.fail("it was fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    listener = next(one for one in app.fns.values() if one.api_name == endpoint)
    file = {"path": address, "meta": {"_type": "gradio.FileData"}}
    inputs = [file if isinstance(one, gr.Image) else None for one in listener.inputs]
    with pytest.raises(gr.Error, match="not as an address"):
        asyncio.run(app.preprocess_data(listener, inputs, SessionState(app)))


def send(quota, size, address="1.1.1.1", path="/gradio_api/upload", method="POST"):
    """The status that a request gets, 200 from the app itself, and what it says."""
    headers = [] if size is None else [(b"content-length", str(size).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": (address, 1)}
    sent = []

    async def collect(message):
        sent.append(message)

    asyncio.run(quota(scope, None, collect))
    return sent[0]["status"], sent[1]["body"].decode()


async def app_itself(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_uploads_have_a_quota(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("emu35.spaces.guard.time.monotonic", lambda: now[0])
    quota = UploadQuota(app_itself, max_bytes=200 * KILO, max_kept_bytes=400 * KILO, seconds=600)
    assert send(quota, 300 * KILO)[0] == 413
    assert send(quota, None)[0] == send(quota, "1e9")[0] == 411
    assert send(quota, 100 * KILO)[0] == 200
    status, says = send(quota, 150 * KILO)  # half of the room for an address
    assert status == 429 and says == "There is no room for more uploads now. Try again in 10 minutes."
    assert send(quota, 200 * KILO, "2.2.2.2")[0] == 200
    assert send(quota, 1, "3.3.3.3")[0] == 200  # counts 64 KiB
    assert send(quota, 1, "4.4.4.4")[0] == 429  # for everybody
    assert send(quota, 10**9, path="/gradio_api/queue/join")[0] == send(quota, None, method="GET")[0] == 200
    now[0] += 601
    assert send(quota, 150 * KILO)[0] == 200
