"""The Python of README.md, docs/ and the cards, run as it stands, block after block of a page."""

import json
import re
from pathlib import Path

import emu35
import pytest
import torch
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
            assert block.count(f'path = "{checkpoint}"') == 1
            block = block.replace(f'"{checkpoint}"', repr(emu35.TINY))
        torch.manual_seed(0)
        exec(compile(block, f"{path}, block {number}", "exec"), scope)
        if checkpoint is not None:
            # The tiny checkpoint's own settings; the released ones leave the size to `aspect_ratio` or the model.
            for name, value in (("max_new_tokens", 60), ("height", None), ("width", None)):
                setattr(scope["model"].generation_config, name, value)
    return scope


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_readme(tmp_path):
    scope = run(ROOT / "README.md")
    assert all(scope[name].size == SIZE for name in ("image", "edited", "fast"))
    assert scope["answer"] == "blue" and len(scope["story"].images) == 3
    assert (tmp_path / "story" / "index.html").is_file()


def test_generation(tmp_path, capsys):
    scope = run(ROOT / "docs" / "generation.md")
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


def write_named_blocks(path: Path):
    """Blocks that begin with the name of a file become that file, as a reader would save them."""
    text = path.read_text(encoding="utf-8")
    for name, block in re.findall(r"^```\w+\n# ([\w-]+\.\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        Path(name).write_text(block, encoding="utf-8")


def test_fine_tuning(tmp_path):
    pytest.importorskip("pyarrow", reason="comes with emu35[train]")
    page = ROOT / "docs" / "fine-tuning.md"
    write_named_blocks(page)
    scope = run(page)
    assert (scope["found"]["examples"], scope["found"]["left_out"]) == (4, 1)
    assert (scope["adapter"] / "adapter_model.safetensors").is_file()
    assert [scope[name].size for name in ("image", "before", "drawn")] == [SIZE] * 3
    prompt = scope["inputs"]["input_ids"]
    with torch.no_grad():
        merged, plain = (scope[name](prompt).logits.float() for name in ("merged", "model"))  # without its adapter
        scope["model"].enable_adapters()
        adapted = scope["model"](prompt).logits.float()
    assert (merged - adapted).abs().mean() < (plain - adapted).abs().mean()  # bfloat16 rounds what is merged


def test_rewards(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="comes with emu35[train]")
    monkeypatch.syspath_prepend(str(tmp_path))
    page = ROOT / "docs" / "rewards.md"
    write_named_blocks(page)
    scope = run(page)
    assert scope["values"] == [10.0, 4.0, 10.0]
    assert (scope["adapter"] / "adapter_model.safetensors").is_file()
    (record,) = map(json.loads, (tmp_path / "runs/my-grpo/grpo/log.jsonl").read_text().splitlines())
    names = {"reward", "reward/t2i", "rewards/world/mean", "rewards/greenness/missing", "rewards/greenness/failed"}
    assert {*names, "equal_groups/t2i", "unscored", "entropy/visual", "kl/visual"} <= record.keys()


def test_dida_card():
    assert run(CARDS / "emu35-tiny-dida" / "README.md")["image"].size == SIZE


@pytest.mark.parametrize("name", ["emu35", "emu35-image"])
def test_cards(name):
    """With the tiny model in place of the released one: not what it answers, but that every call works."""
    scope = run(CARDS / name / "README.md", checkpoint=name)
    assert scope["image"].size == scope["edited"].size == SIZE  # 1:1, and as the reference
    if name == "emu35":
        assert len(scope["messages"]) % 2 == 0 and scope["streamer"].segments


@pytest.mark.parametrize("name, base", [("emu35-nf4", "emu35"), ("emu35-image-nf4", "emu35-image")])
def test_quantised_cards(name, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    scope = run(CARDS / name / "README.md", checkpoint=base)
    assert scope["image"].size == SIZE and (tmp_path / name / "model.safetensors").is_file()
    assert scope["model"].model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


@pytest.mark.parametrize(
    "path, tasks",
    [
        (ROOT / "docs" / "generation.md", TASK_TEMPLATES),
        (CARDS / "emu35" / "README.md", TASK_TEMPLATES),
        (CARDS / "emu35-image" / "README.md", ("t2i", "x2i")),
    ],
)
def test_every_task_has_an_example(path, tasks):
    text = "\n".join(code(path))
    assert [task for task in tasks if f'task="{task}"' not in text] == []
