"""Recipes: what is accepted, what is refused and how."""

from pathlib import Path

import pytest
import yaml
from emu35.training.recipe import OptimizerRecipe, Recipe, StageRecipe, load_recipe, recipe_from_dict

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))


def minimal(**changes):
    values = {
        "output_dir": "out",
        "model": {"hidden_size": 32},
        "vision_tokenizer": {},
        "stages": [{"name": "alignment", "steps": 3, "mixture": {"caption_image": 1}}],
    }
    return {**values, **changes}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    if isinstance(recipe, Recipe):
        assert recipe.num_steps > 0
        if not isinstance(recipe.vision_tokenizer, str):
            assert recipe.vision_tokenizer.num_steps > 0


def test_a_recipe_is_read_from_a_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(minimal(optimizer={"muon_learning_rate": "5e-3"}, seed=7)))
    recipe = load_recipe(path)
    assert recipe.seed == 7
    assert recipe.optimizer.muon_learning_rate == 0.005  # YAML reads 5e-3 as a string
    assert recipe.stages == [StageRecipe("alignment", 3, {"caption_image": 1.0})]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (minimal(sed=1), r"unknown key 'sed'. Did you mean 'seed'\?"),
        (minimal(optimizer={"muon_lr": 1}), r"`recipe.optimizer`: unknown key 'muon_lr'"),
        (minimal(vision_tokenizer={"batchsize": 4}), r"unknown key 'batchsize'. Did you mean 'batch_size'\?"),
        (minimal(vision_tokenizer=4), "`recipe.vision_tokenizer` must be a mapping, got 4"),
        (minimal(stages=[{"name": "a", "steps": 1, "mixture": {"t2I": 1}}]), r"Did you mean 't2i'\?"),
        (minimal(stages=[{"name": "a", "steps": 0, "mixture": {"t2i": 1}}]), "`steps` must be positive, got 0"),
        (minimal(stages=[{"name": "a", "steps": 1, "mixture": {}}]), "is empty"),
        (minimal(stages=[]), "`stages` must be a list of at least one stage"),
        (minimal(stages=[{"name": "a", "mixture": {"t2i": 1}}]), r"`recipe.stages\[0\]` lacks `steps`"),
        (minimal(processes=1.5), "`recipe.processes` must be of type int, got 1.5"),
        (minimal(bf16=1), "`recipe.bf16` must be of type bool, got 1"),
        (minimal(data={"objects": [1, 2]}), "`data.objects` must be three shares"),
        (minimal(data={"caption_dropout": 2.0}), r"`data.caption_dropout` must be in \[0, 1\], got 2.0"),
        (minimal(model={"vocab_size": 10}), "`model.vocab_size` follows from the tokenizers"),
        ([1], "`recipe` must be a mapping"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict(values)


def test_a_missing_file_names_the_shipped_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="Shipped recipes"):
        load_recipe(tmp_path / "none.yaml")


def test_broken_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [1")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(path)


def test_learning_rate_schedule():
    recipe = OptimizerRecipe(warmup_steps=10, decay=0.5)
    scales = [recipe.scale(step, 100) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:51] == [1.0] * 42
    assert scales[75] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(0.02)


def test_stage_at():
    stages = [{"name": n, "steps": s, "mixture": {"t2i": 1}} for n, s in (("a", 2), ("b", 3))]
    recipe = recipe_from_dict(minimal(stages=stages))
    assert [recipe.stage_at(step)[0].name for step in range(5)] == ["a", "a", "b", "b", "b"]
    with pytest.raises(ValueError, match="past the last stage"):
        recipe.stage_at(5)


def test_a_new_cycle_begins_with_a_warm_up():
    first = {"name": "a", "steps": 100, "mixture": {"t2i": 1}}
    second = {"name": "b", "steps": 50, "mixture": {"vqa": 1}, "new_cycle": True, "learning_rate_scale": 0.5}
    recipe = recipe_from_dict(minimal(stages=[first, second], optimizer={"warmup_steps": 10, "decay": 0.4}))
    scales = [recipe.learning_rate_scale(step) for step in range(150)]
    assert scales[:100] == [recipe.optimizer.scale(step, 100) for step in range(100)]
    assert scales[100] == pytest.approx(0.05)
    assert scales[120] == 0.5
    assert scales[149] == pytest.approx(0.025)
    with pytest.raises(ValueError, match="past the last stage"):
        recipe.learning_rate_scale(150)
