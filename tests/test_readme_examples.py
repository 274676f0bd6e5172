"""The Python of README.md and of the released models' cards, run as it stands, block after block."""

import re
from pathlib import Path

import emu35
import pytest
import torch
import yaml
from emu35.prompts_emu35 import TASK_TEMPLATES
from emu35.segments_emu35 import Segments
from PIL.Image import Image

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
SIZE = (48, 48)  # pixels of the tiny model's pictures


def code(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run(path: Path, checkpoint: str | None = None) -> dict:
    """All blocks in one namespace, seeded; in a card the tiny model stands in for its `checkpoint`."""
    scope = {}
    for number, block in enumerate(code(path)):
        if checkpoint is not None and number == 0:
            assert block.count(f'"{checkpoint}"') == 1
            block = block.replace(f'"{checkpoint}"', repr(emu35.TINY))
        torch.manual_seed(0)
        exec(compile(block, f"{path}, block {number}", "exec"), scope)
        if number == 0 and checkpoint is not None:
            # The tiny checkpoint's own settings; the released ones leave the size to `aspect_ratio` or the model.
            for name, value in (("max_new_tokens", 60), ("height", None), ("width", None)):
                setattr(scope["model"].generation_config, name, value)
    return scope


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_readme(tmp_path, capsys):
    scope = run(ROOT / "README.md")
    for name in ("image", "edited", "completed", "combined", "start", "fast", "blue"):
        assert isinstance(scope[name], Image) and scope[name].size == SIZE, name
    assert [picture.size for picture in scope["four"]] == [SIZE] * 4
    assert scope["answer"].text == "blue"
    assert capsys.readouterr().out.startswith("blue\n")
    for name in ("story", "steps", "walk", "plan"):
        assert scope[name] and isinstance(scope[name], Segments), name
    assert [len(scope[name].images) for name in ("story", "steps", "walk", "plan", "rest")] == [3, 2, 4, 2, 1]
    assert scope["part"].past_key_values is not None and not scope["part"].finished[0]
    assert scope["whole"].sequences.tolist() == scope["output"].sequences.tolist()
    assert [view.size for view in scope["views"]] == [SIZE] * 4
    assert (tmp_path / "story" / "index.html").is_file()
    assert scope["streamer"].segments


@pytest.mark.parametrize("name", ["emu35", "emu35-image"])
def test_cards(name):
    """With the tiny model in place of the released one: not what it answers, but that every call works."""
    scope = run(CARDS / name / "README.md", checkpoint=name)
    assert scope["image"].size == scope["edited"].size == SIZE  # 1:1, and as the reference
    if name == "emu35":
        assert len(scope["messages"]) % 2 == 0 and scope["streamer"].segments


@pytest.mark.parametrize(
    "path, tasks",
    [
        (ROOT / "README.md", TASK_TEMPLATES),
        (CARDS / "emu35" / "README.md", TASK_TEMPLATES),
        (CARDS / "emu35-image" / "README.md", ("t2i", "x2i")),
    ],
)
def test_every_task_has_an_example(path, tasks):
    text = "\n".join(code(path))
    assert [task for task in tasks if f'task="{task}"' not in text] == []


@pytest.mark.parametrize("name, base", [("emu35", "BAAI/Emu3.5"), ("emu35-image", "BAAI/Emu3.5-Image")])
def test_metadata_of_cards(name, base):
    text = (CARDS / name / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["base_model"] == base and metadata["pipeline_tag"] == "any-to-any"
    assert (metadata["license"], metadata["library_name"]) == ("apache-2.0", "transformers")
    assert "have not been run" in text
    assert f"emu35 convert --model {base.split('/')[1]} " in text and f"--output {name}\n" in text
