"""The page without a browser: what it offers to clients, what it reads from an address, what it makes of answers."""

import configparser
import re
from pathlib import Path

import emu35
import pytest
import torch
import yaml
from emu35 import GlobalThought, Image, ImageThought, Segments, Text, cli

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'emu35[demo]'")

from emu35.spaces.app import TABS, build_app  # noqa: E402 - after what may skip this file
from emu35.spaces.dialogue import shown_messages, user_message  # noqa: E402
from emu35.spaces.engine import Engine, SpaceSettings, Update, UserError  # noqa: E402
from emu35.spaces.examples import RELEASED, TINY  # noqa: E402
from emu35.spaces.parts import Link, figures, read_value, status, upload  # noqa: E402
from emu35.spaces.shown import shown_file  # noqa: E402
from emu35.spaces.tabs.race import compare, overall  # noqa: E402
from emu35.spaces.tabs.robot import read_plan  # noqa: E402
from PIL import Image as PILImage  # noqa: E402

ROOT = Path(__file__).parents[2]
SETTINGS = SpaceSettings.for_model()


@pytest.fixture(scope="module")
def app():
    return build_app(Engine(SETTINGS))


def picture(color: str = "red") -> PILImage.Image:
    return PILImage.new("RGB", (8, 8), color)


def drawn(color: str = "red") -> Image:
    return Image(torch.zeros(1, 1, dtype=torch.long), image=picture(color))


def test_clients_get_these_endpoints(app):
    endpoints = {
        name: [parameter["parameter_name"] for parameter in endpoint["parameters"]]
        for name, endpoint in app.get_api_info()["named_endpoints"].items()
    }
    decoding = ["image_decoder", "num_inference_steps"]
    assert endpoints == {
        "/create": ["prompt", "aspect_ratio", "num_images", "seed", "guidance_scale", *decoding],
        "/edit": ["prompt", "image", "image_2", "image_3", "seed", "guidance_scale", *decoding],
        "/ask": ["question", "image", "image_2", "image_3"],
        "/forget": [],
        "/forget_story": [],
        "/tell": ["prompt", "task", "seed", *decoding, "image"],
        "/explore": ["prompt", "image"],
        "/move": ["direction"],
        "/robot": ["prompt", "image"],
        "/race": ["prompt", "seed"],
        "/stop": [],
    }


def test_one_argument_is_enough_for_clients(app):
    for name, endpoint in app.get_api_info()["named_endpoints"].items():
        assert all(parameter["parameter_has_default"] for parameter in endpoint["parameters"][1:]), name


def test_every_control_has_a_label_and_every_tab_one_primary_action(app):
    blocks = app.blocks.values()
    controls = (gr.Textbox, gr.Number, gr.Slider, gr.Radio, gr.Image, gr.Gallery, gr.Chatbot, gr.ImageSlider)
    for block in blocks:
        if isinstance(block, controls):
            assert block.label, block
    primary = [block for block in blocks if isinstance(block, gr.Button) and block.variant == "primary"]
    assert len(primary) == len(TABS)


def test_an_address_sets_what_fits_and_nothing_else():
    slider, radio = gr.Slider(1, 8), gr.Radio([("All", "dida"), ("One", "ar")])
    number, text = gr.Number(minimum=0), gr.Textbox(max_length=5)
    assert read_value(slider, "3") == 3 and read_value(radio, "dida") == "dida"
    assert read_value(number, "7") == 7 and read_value(text, "a red cross") == "a red"
    wrong = [(slider, "9"), (slider, "nan"), (slider, "x"), (radio, "other"), (number, "-1"), (text, None)]
    for control, value in wrong:
        assert read_value(control, value) == gr.skip()


def test_a_link_is_read_by_its_own_tab_only():
    link = Link("race", {"prompt": gr.Textbox(max_length=100)})
    assert link.read({"tab": "race", "prompt": "a ring"}) == ["a ring"]
    assert link.read({"tab": "create", "prompt": "a ring"}) == [gr.skip()]
    others = [gr.Image(), gr.Slider()]
    assert 'emu35Share("race", ["prompt"], [1].map(' in link.js([others[0], link.controls["prompt"], others[1]])
    with pytest.raises(ValueError):
        link.js(others)


@pytest.mark.parametrize("tab", ["create", "edit", "tell"])
def test_a_link_carries_the_settings(app, tab):
    (listener,) = (one for one in app.fns.values() if one.api_name == tab)
    assert {"prompt", "seed", "decoder", "steps"} <= set(re.findall(r'"(\w+)"', listener.js.split("]")[0]))


def test_uploads_reach_listeners_unopened(tmp_path):
    """Gradio's own component would open the file."""
    file = tmp_path / "picture.png"
    file.write_text("no picture")
    payload = upload("Picture").data_model(path=str(file), orig_name="picture.png")
    assert upload("Picture").preprocess(payload) == str(file)
    with pytest.raises(UserError, match="no picture"):
        user_message("what is this?", [str(file)], SETTINGS)
    with pytest.raises(gr.Error, match="as a file"):
        upload("Picture").preprocess(upload("Picture").data_model(url="data:image/png;base64,AAAA"))


def test_figures_say_what_is_known():
    assert figures(Update(stage="drawing", passes=1, seconds=0.84, remaining=1.6)) == "1 pass · 0.8 s · about 2 s left"
    assert figures(Update(stage="done", passes=36, seconds=2, seed=7)) == "36 passes · 2.0 s · seed 7"
    assert figures(Update(stage="queued")) == ""
    told = status(Update(stage="drawing", fraction=0.5))
    assert told["running"] and told["percent"] == 50 and told["message"] == "Drawing"


def test_a_conversation_shows_text_pictures_and_folded_thoughts():
    answer = Segments([GlobalThought([Text(" a plan ")]), Text("step one."), ImageThought("red"), drawn(), Text(" ")])
    messages = [
        {"role": "user", "content": ["how?", {"type": "image", "image": picture("blue")}]},
        {"role": "assistant", "content": answer},
    ]
    shown = shown_messages(messages)
    assert [one["role"] for one in shown] == ["user"] * 2 + ["assistant"] * 4
    assert [one["content"] for one in shown[2:5]] == ["a plan", "step one.", "red"]
    assert [one["metadata"]["status"] for one in shown if "metadata" in one] == ["done", "done"]
    assert shown[1]["content"]["path"] != shown[5]["content"]["path"]
    unfinished = shown_messages([{"role": "assistant", "content": answer[:1]}], running=True)
    assert unfinished[-1]["metadata"]["status"] == "pending"
    assert gr.Chatbot().postprocess(shown) is not None


def test_a_picture_is_written_once():
    image = picture("green")
    path = Path(shown_file(image))
    written = path.stat().st_mtime_ns
    assert shown_file(image) == shown_file(picture("green")) == str(path)
    assert path.stat().st_mtime_ns == written and [one.name for one in path.parent.iterdir()] == ["picture.png"]
    path.unlink()  # as gradio does after a while
    assert Path(shown_file(image)).is_file()


def test_a_plan_is_read_as_frames_with_their_subtasks():
    words = [Text("pick up "), Text("it."), drawn(), Text("place it."), drawn("blue")]
    frames, thought = read_plan([GlobalThought([Text("red left")]), *words])
    assert [said for _, said in frames] == ["pick up it.", "place it."] and thought == "red left"


def test_a_race_names_the_first_when_all_are_done():
    done = {"ar": Update(stage="done", seconds=4, passes=36), "dida": Update(stage="done", seconds=1, passes=9)}
    assert [(row["percent"], row["first"]) for row in compare(done)] == [(100, False), (25, True)]
    running = done | {"dida": Update(stage="drawing", seconds=1)}
    assert not any(row["first"] for row in compare(running))
    assert overall(done) is done["dida"] and overall(running) is running["dida"]
    stopped = {"ar": Update(stage="stopped"), "dida": Update(stage="queued")}
    assert overall(stopped) is stopped["ar"]


@pytest.mark.parametrize("examples", [TINY, RELEASED], ids=["tiny", "released"])
def test_examples_fit_their_inputs(examples):
    files = [cell for row in (*examples.edit, *examples.ask, *examples.robot) for cell in row[1:] if cell]
    assert files and all(Path(file).is_file() for file in files)
    assert {row[0] for row in examples.tell} == {"story", "howto"} and len(examples.moves) == 4
    assert "tiny model" in TINY.note


def test_the_space_asks_for_what_the_package_needs():
    """A Space installs its requirements, and gets the package as files."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    wanted = [config["options"]["install_requires"], extras["demo"], extras["video"]]
    wanted = {line for lines in wanted for line in lines.split() if not line.startswith("emu35")}
    asked = set((ROOT / "spaces" / "requirements.txt").read_text().split())
    # The guards in front of gradio were tested with this version only; the Hub installs the one of the front matter.
    version = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert {line for line in asked if not line.startswith("gradio>")} == {
        line for line in wanted if not line.startswith("gradio>")
    }
    assert f"gradio>={version.rpartition('.')[0]}" in asked
    front = yaml.safe_load((ROOT / "spaces" / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"], front["sdk_version"]) == ("gradio", "app.py", version)


def test_demo_gives_its_options_to_the_space(monkeypatch):
    served = []
    monkeypatch.setattr("emu35.spaces.server.serve", lambda *args, **kwargs: served.append((args, kwargs)))
    for name in ("MODEL", "LOAD_IN"):
        monkeypatch.setenv(f"EMU35_{name}", "")  # so that it is put back
    assert cli.main(["demo", "--model", emu35.TINY, "--load-in", "8bit", "--port", "7999", "--open"]) == 0
    assert served == [((None, 7999), {"open_browser": True})]
    settings = SpaceSettings.from_environment()
    assert settings.model == emu35.TINY and settings.load_in == "8bit"


def test_demo_without_gradio_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'emu35[demo]'" in capsys.readouterr().err
