"""The running server: health, what it refuses to serve, shares, and that what is left is cleaned up."""

import io
import os
import re
import shutil
import time
from pathlib import Path

import httpx
import PIL.Image
import pytest
from emu35.spaces.engine import Engine, SpaceSettings
from emu35.spaces.examples import PICTURES, TINY

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

PROMPT = "a small red circle above a large blue square"
README = Path(__file__).parents[2] / "spaces" / "README.md"
STORY = "a small red circle travels on a black background. tell the story in two pictures."
LONG = {"num_images": 8, "image_decoder": "ar"}


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server in this process."""
    from emu35.spaces.server import start

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        engine = Engine(SpaceSettings.for_model(requests_per_user=2, max_upload_bytes=50_000))
        app = start(engine)
        wait_until(lambda: engine.is_loaded)
        yield app.local_url
        app.close(verbose=False)


@pytest.fixture
def client(server):
    client = gradio_client.Client(server, verbose=False)
    yield client
    client.close()


def file_of(download):
    """The path behind a download button, which comes with the change of its visibility."""
    value = download["value"] if isinstance(download, dict) and "value" in download else download
    return value["path"] if isinstance(value, dict) else value


def server_of(client):
    return client.src


def said(chat):
    """What the messages of a conversation say."""
    contents = [message["content"] for message in chat]
    return [part["text"] for content in contents for part in content if part.get("type") == "text"]


def health(server):
    return httpx.get(f"{server}health").json()


def is_idle(server):
    return health(server) == {"status": "ready", "waiting": 0, "busy": False}


def test_health(server):
    response = httpx.get(f"{server}health")
    assert response.status_code == 200
    assert response.json()["status"] == "ready"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/proc/self/environ",
        "../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "spaces/app.py",
        "setup.cfg",
        "file:///etc/passwd",
        "http://127.0.0.1:1/secret",
        "//etc/passwd",
        os.path.abspath("spaces/engine.py"),
        os.path.abspath("model_cards/emu35-tiny/model.safetensors"),
    ],
)
def test_no_other_file_is_served(server, path):
    response = httpx.get(f"{server}gradio_api/file={path}")
    assert response.status_code in (400, 403, 404)
    assert b"root:" not in response.content


def test_uploads_are_bounded(server):
    data = os.urandom(60_000)
    response = httpx.post(f"{server}gradio_api/upload", files={"files": ("noise.png", data, "image/png")})
    assert response.status_code == 413


def test_an_uploaded_page_is_never_shown_as_one(server):
    page = b"<html><script>alert(1)</script></html>"
    files = {"files": ("page.html", page, "text/html")}
    (path,) = httpx.post(f"{server}gradio_api/upload", files=files).json()
    response = httpx.get(f"{server}gradio_api/file={path}")
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["content-type"] != "text/html"


def test_a_client_gets_a_picture_that_says_how_it_was_made(server, client):
    pictures, download, status = client.predict(PROMPT, image_decoder="dida", seed=3, api_name="/create")
    assert (status["stage"], status["seed"]) == ("done", 3)
    assert len(pictures) == 1
    with PIL.Image.open(file_of(download)) as image:
        assert image.size == (48, 48)
        assert (image.text["prompt"], image.text["seed"]) == (PROMPT, "3")


def test_the_client_of_the_readme(server, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert example.count('Client("OWNER/emu35")') == 1
    scope = {}
    exec(example.replace('"OWNER/emu35"', repr(server)), scope)
    assert scope["status"]["stage"] == "done"
    assert capsys.readouterr().out.startswith("Loaded as API") and scope["pictures"][0]["image"].endswith(".png")
    with PIL.Image.open(file_of(scope["png"])) as image:
        assert image.text["seed"] == "7"
    scope["client"].close()


def test_addresses_are_refused(client):
    for address in ("https://example.com/cat.png", server_of(client) + "gradio_api/info"):
        stranger = {"path": address, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(gradio_client.exceptions.AppError, match="not as an address"):
            client.predict("make it green.", image=stranger, api_name="/edit")


def test_pictures_say_how_they_were_made(client):
    blocks = gradio_client.handle_file(str(PICTURES / "blocks.png"))
    *_, download, status = client.predict("put the red block on the blue block.", blocks, api_name="/robot")
    with PIL.Image.open(file_of(download)) as image:
        assert image.text["goal"] == "put the red block on the blue block." and image.text["prompt"]
        assert (image.text["model"], image.text["seed"]) == ("emu35-tiny", str(status["seed"]))
    place = gradio_client.handle_file(str(PICTURES / "place.png"))
    *_, download, status = client.predict("start in the center.", place, api_name="/explore")
    assert status["message"] == "Choose a move." and "value" not in download  # nothing was made yet
    *_, download, status = client.predict("south", api_name="/move")
    with PIL.Image.open(file_of(download)) as image:
        assert image.text["prompt"] == "start in the center. go south." and image.text["task"] == "explore"
    _, _, _, *downloads, _, status = client.predict(PROMPT, seed=3, api_name="/race")
    with PIL.Image.open(file_of(downloads[2])) as image:
        made = [image.text[name] for name in ("prompt", "seed", "image_decoder", "num_inference_steps")]
        assert made == [PROMPT, "3", "dida", "8"]


def test_a_walk_outlives_its_files(client):
    """Gradio removes what was shown when it is old; a page may stay open longer."""
    opening = TINY.explore[0][0]
    client.predict(opening, None, api_name="/explore")
    for folder in Path(os.environ["GRADIO_TEMP_DIR"]).iterdir():
        shutil.rmtree(folder)
    _, trail, *_, status = client.predict("south", api_name="/move")
    assert status["stage"] == "done" and len(trail) == 2


def test_a_story_goes_on(client):
    *_, status = client.predict(STORY, seed=0, api_name="/tell")
    assert status["stage"] == "done"
    chat, page, *_ = client.predict("what color is the circle?", api_name="/tell")
    assert said(chat)[-1] == "red" and STORY in said(chat)
    assert Path(file_of(page)).read_text(encoding="utf-8").count("<img") == 2  # the whole of it
    client.predict(api_name="/forget_story")
    chat, *_ = client.predict("what color is the circle?", api_name="/tell")
    assert STORY not in said(chat)


def test_a_client_is_told_what_is_wrong(client, tmp_path):
    with pytest.raises(gradio_client.exceptions.AppError, match="Please write"):
        client.predict("   ", api_name="/create")
    path = tmp_path / "page.png"
    path.write_bytes(b"<html></html>")
    with pytest.raises(gradio_client.exceptions.AppError, match="no picture") as refused:
        client.predict("make it green.", image=gradio_client.handle_file(str(path)), api_name="/edit")
    assert "/" not in str(refused.value)


def test_clients_cannot_name_files_of_the_server(client):
    stranger = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(gradio_client.exceptions.AppError) as refused:
        client.predict("make it green.", image=stranger, api_name="/edit")
    assert "root:" not in str(refused.value)


def test_shares_and_cancelled_requests(server, client):
    jobs = [client.submit(PROMPT, api_name="/create", **LONG) for _ in range(2)]
    wait_until(lambda: health(server)["busy"] and health(server)["waiting"] == 1)
    with pytest.raises(gradio_client.exceptions.AppError, match="You have 2 requests"):
        client.predict(PROMPT, api_name="/create")
    began = time.monotonic()
    for job in jobs:
        job.cancel()
    wait_until(lambda: is_idle(server))
    assert time.monotonic() - began < 20


def test_a_client_that_goes_away_frees_the_model(server):
    client = gradio_client.Client(server, verbose=False)
    client.submit(PROMPT, api_name="/create", **LONG)
    wait_until(lambda: health(server)["busy"])
    client.close()
    wait_until(lambda: is_idle(server))


def test_stop(server, client):
    job = client.submit(PROMPT, api_name="/create", **LONG)
    wait_until(lambda: health(server)["busy"])
    client.predict(api_name="/stop")
    *_, status = job.result(timeout=60)
    assert status["stage"] == "stopped"
    wait_until(lambda: is_idle(server))


def test_pictures_of_visitors_are_decoded_before_use(server, client, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x010E] = "at home"
    stream = io.BytesIO()
    PIL.Image.new("RGB", (64, 48), (200, 0, 0)).save(stream, "JPEG", exif=exif)
    (tmp_path / "photo.jpg").write_bytes(stream.getvalue())
    photo = gradio_client.handle_file(str(tmp_path / "photo.jpg"))
    _, download, status = client.predict("make it green.", image=photo, image_decoder="dida", api_name="/edit")
    assert status["stage"] == "done"
    with PIL.Image.open(file_of(download)) as image:
        assert image.size == (48, 48)
