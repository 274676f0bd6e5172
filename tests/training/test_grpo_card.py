"""Curves and card of a GRPO run, from logs and evaluations made by hand."""

import json

import pytest
import yaml
from emu35.training.grpo_card import CURVES, draw_curves, headline_rates, main, running_mean, write_card
from emu35.training.grpo_recipe import GRPORecipe
from emu35.training.recipe import _build
from PIL import Image

RECIPE = {
    "method": "grpo",
    "output_dir": "unused",
    "prompts": {"world": {"t2i": 1, "vqa": 1}},
    "rewards": [{"reward": "WorldReward"}],
    "steps": 4,
}
LOG = [
    {
        "step": step,
        "reward": 4.0 + step,
        "rewards/world/mean": 3.0 + step,
        "rewards/world/missing": 0.0,
        "reward/t2i": 2.0 + step,
        "reward/vqa": 5.0,
        "entropy": 0.3,
        "entropy/visual": 0.5 / step,
        "entropy/text": 0.1,
    }
    for step in range(1, 5)
]
T2I = {"whole_scene": {"all": 0.2}, "aspects": {"colour": 0.5}, "world_reward": 4.0}
VQA = {"accuracy": 0.5, "describe": 0.1, "world_reward": 5.5}
HOW = {"num": 60, "seed": 1, "settings": {"guidance_scale": 1.5}}


@pytest.fixture
def recipe():
    return _build(GRPORecipe, RECIPE, "recipe")


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for task, before in (("t2i", T2I), ("vqa", VQA)):
        after = {**before, "world_reward": before["world_reward"] + 2.5}
        for when, result in (("before", before), ("after", after)):
            (folder / f"{when}-{task}.json").write_text(json.dumps({"task": task, **HOW, **result}))
    return folder


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_curves_have_a_panel_for_each_kind_of_value_in_the_log(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves(LOG, tmp_path / "three.png")
    more = [{**record, "kl/visual": 0.1, "equal_groups/t2i": 0.5} for record in LOG]
    draw_curves(more, tmp_path / "five.png")
    three, five = (Image.open(tmp_path / name) for name in ("three.png", "five.png"))
    assert three.width == five.width and five.height == 2 * three.height
    assert len(three.convert("RGB").getcolors(1 << 20)) > 10


def test_a_log_of_something_else_has_no_curves(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="has 1 records, and none of a reward"):
        draw_curves([{"step": 1, "loss": 2.0}], tmp_path / "none.png")


def test_a_card_of_measured_numbers(recipe, results, tmp_path):
    write_card(tmp_path, recipe, LOG, results)
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    (index,) = front.pop("model-index")
    measured = {one["dataset"]["config"]: one["metrics"][0]["value"] for one in index["results"]}
    assert measured == {"t2i": 20.0, "vqa": 50.0} and index["name"] in text
    assert front == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "any-to-any",
        "tags": ["emu35", "grpo"],
    }
    assert "| t2i (N = 60, seed 1) | world reward | 4.0 | 6.5 | +2.5 |" in text
    assert "| t2i (N = 60, seed 1) | whole scene | 20.0 % | 20.0 % | +0.0 |" in text
    assert "| vqa (N = 60, seed 1) | whole description | 10.0 % | 10.0 % | +0.0 |" in text
    assert "| reward, world | 4.500 | 6.500 |" in text  # the first and the last two steps
    assert "| entropy, visual tokens | 0.375 | 0.146 |" in text
    assert (CURVES in text) == (tmp_path / CURVES).is_file()
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["steps"] == 4


def test_a_card_at_the_end_of_a_run_has_no_evaluations_yet(recipe, tmp_path):
    write_card(tmp_path, recipe, [])
    text = (tmp_path / "README.md").read_text()
    assert "before" not in text and CURVES not in text and "No step was logged" in text


def test_rates_of_episodes():
    rates = headline_rates({"rates": {"edit": 0.4, "whole_scene": 0.1}, "world_reward": 3.0})
    assert rates == {"world reward": 3.0, "edit": 0.4, "whole scene": 0.1}


def test_results_that_cannot_be_compared(recipe, results, tmp_path):
    (results / "after-vqa.json").write_text(json.dumps({"task": "vqa", **HOW, "num": 50, **VQA}))
    with pytest.raises(ValueError, match="vqa was measured with `num`=60 before and 50 after"):
        write_card(tmp_path, recipe, LOG, results)
    with pytest.raises(ValueError, match="holds no pair"):
        write_card(tmp_path, recipe, LOG, tmp_path / "none")


def test_the_command(results, tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    (run / "grpo").mkdir(parents=True)
    (run / "grpo" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LOG))
    recipe.write_text(yaml.safe_dump(RECIPE))
    main([str(run), "--recipe", str(recipe), "--results", str(results), "--out", str(tmp_path / "card")])
    assert {path.name for path in (tmp_path / "card").iterdir()} >= {"README.md", "results"}
    assert len(list((tmp_path / "card" / "results").iterdir())) == 4
