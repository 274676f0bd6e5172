"""Fine-tuning recipes: what is refused, and the memory that is worked out."""

import dataclasses
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from emu35 import Emu35ForConditionalGeneration
from emu35.configuration_emu35 import Emu35Config
from emu35.training.memory import NF4_BYTES, count_adapter, count_parameters, estimate_memory, format_memory
from emu35.training.recipe import load_recipe, recipe_from_dict
from emu35.training.sft_plan import plan
from emu35.training.sft_recipe import SFTRecipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
VALUES = {"method": "sft", "output_dir": "unused", "data": [{"path": "here"}], "steps": 2, "batch_rows": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stpes": 3}, "unknown key 'stpes'. Did you mean 'steps'"),
        ({"lora": {"rnk": 3}}, "`recipe.lora`: unknown key 'rnk'. Did you mean 'rank'"),
        ({"lora": {"alpha": 8, "export_alpha": 9}}, r"`lora.export_alpha` must be between 0 and `lora.alpha`, 8"),
        ({"lora": {"targets": ["q_prj"]}}, "no 'q_prj'. Did you mean 'q_proj'"),
        ({"lora": {"quantization": "int3"}}, '`lora.quantization` must be "nf4"'),
        ({"data": []}, "`data` must be a list of at least one source"),
        ({"data": [{"path": "a/x"}, {"path": "b/x"}]}, "`data.name` must be different"),
        ({"data": [{"path": "x", "weight": 0}]}, "`data.weight` must be positive"),
        ({"loss_on": "answer"}, "`loss_on` must be one of answers, everything"),
        ({"batch_rows": 3, "rows": 2}, "`batch_rows` must be a multiple of `rows`=2"),
        ({"optimizer": {"schedule": "cosin"}}, "`optimizer.schedule` must be one of cosine"),
        ({"hardware": {"sharding": "fsdp"}}, "`hardware.sharding` must be one of none, fsdp2, zero3"),
        ({"steps": "many"}, "`recipe.steps` must be of type int"),
        ({"method": "stf"}, "`recipe.method` must be one of .*Did you mean 'sft'"),
        ({"optimizer": {"schedule": "linaer"}}, "`optimizer.schedule` must be one of .* Did you mean 'linear'"),
        ({"attn_implementation": "spda"}, "`attn_implementation` must be one of .* Did you mean 'sdpa'"),
    ],
)
def test_a_wrong_recipe_names_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({**VALUES, **changes})


def test_a_slip_in_method_makes_no_recipe_of_another_kind():
    values = {("methd" if name == "method" else name): value for name, value in VALUES.items()}
    with pytest.raises(ValueError, match=r"unknown key 'methd'\. Did you mean 'method'"):
        recipe_from_dict(values)


def test_a_step_is_shared_out_over_processes():
    recipe = recipe_from_dict({**VALUES, "batch_rows": 8, "rows": 2})
    assert [recipe.accumulation(number) for number in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ValueError, match=r"`batch_rows`=8 must be a multiple of `rows` x processes = 2 x 3"):
        recipe.accumulation(3)


@pytest.mark.parametrize("name", ["tiny-sft", "tiny-lora", "tiny-qlora", "lora-34b", "qlora-34b", "full-34b"])
def test_shipped_recipes_are_planned_and_fit(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert isinstance(recipe, SFTRecipe)
    text = plan(recipe)
    assert f"fits into {recipe.hardware.gpu_memory} GiB" in text
    assert ("34.1 B weights" in text) == name.endswith("34b")


def test_the_tiny_qlora_is_the_tiny_lora_in_4_bits():
    lora, qlora = (load_recipe(RECIPES / f"tiny-{name}.yaml") for name in ("lora", "qlora"))
    assert qlora.lora == dataclasses.replace(lora.lora, quantization="nf4")
    assert qlora == dataclasses.replace(lora, lora=qlora.lora, output_dir=qlora.output_dir)


@pytest.mark.parametrize("name", ["tiny-sft", "tiny-lora", "tiny-qlora"])
def test_the_tiny_ones_can_be_shared_by_two_processes(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.accumulation(1) == 2 * recipe.accumulation(2)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_of_accelerate_are_read(path):
    config = load_config_from_file(str(path))
    recipe = load_recipe(RECIPES / "full-34b.yaml")
    assert config.num_processes == recipe.hardware.gpus and config.mixed_precision == "bf16" and recipe.bf16
    if config.distributed_type == "FSDP":
        layers = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert layers in Emu35ForConditionalGeneration._no_split_modules


def test_numbers_of_the_released_model():
    config = Emu35Config()
    numbers = count_parameters(config)
    assert numbers["embeddings"] == 2 * 282926 * 5120
    assert numbers["linear"] == 64 * (5120 * 64 * 128 * 2 + 5120 * 8 * 128 * 2 + 3 * 5120 * 25600)
    assert numbers["vision"] == pytest.approx(455e6, rel=0.01)
    assert count_adapter(config.text_config, 64, ["q_proj", "down_proj"]) == 64 * 64 * (5120 + 8192 + 25600 + 5120)


def bytes_of(items):
    return {item.name: item.bytes for item in items}


def test_memory_is_that_of_each_part(shared_tiny_model):
    config = shared_tiny_model.config
    weights = sum(p.numel() for name, p in shared_tiny_model.named_parameters() if "vision" not in name)
    linear = sum(p.numel() for p in shared_tiny_model.model.layers.parameters() if p.ndim == 2)
    full = bytes_of(estimate_memory(recipe_from_dict(VALUES), config))
    assert (full["weights"], full["gradients"], full["optimiser"]) == (4 * weights, 4 * weights, 8 * weights)
    sharded = {**VALUES, "hardware": {"gpus": 2, "sharding": "fsdp2"}}
    assert bytes_of(estimate_memory(recipe_from_dict(sharded), config))["weights"] == 2 * weights
    qlora = {**VALUES, "lora": {"rank": 4, "quantization": "nf4"}, "optimizer": {"name": "adamw_8bit"}}
    small = bytes_of(estimate_memory(recipe_from_dict(qlora), config))
    assert small["frozen weights, nf4"] == pytest.approx(NF4_BYTES * linear)
    assert small["frozen weights"] == 2 * (weights - linear)
    adapter = count_adapter(config.text_config, 4, recipe_from_dict(qlora).lora.targets)
    assert small["adapter"] == small["gradients"] == 4 * adapter and small["optimiser"] < 2.1 * adapter
    repeated = bytes_of(estimate_memory(recipe_from_dict({**VALUES, "gradient_checkpointing": True}), config))
    assert repeated["inputs of layers"] + repeated["one layer again"] < full["activations"]
    assert "vision tokenizer" in bytes_of(estimate_memory(recipe_from_dict(VALUES), config, uses_vision=True))


def test_the_vision_tokenizer_is_counted_where_it_works(tmp_path):
    def counted(**changes):
        return "vision tokenizer" in plan(recipe_from_dict({**VALUES, "data": [{"path": str(tmp_path)}], **changes}))

    assert counted()
    (tmp_path / "prepared.json").write_text("{}")
    assert not counted()
    assert counted(samples=["a fox"])
    assert not counted(samples=["a fox"], hardware={"gpus": 2, "sharding": "fsdp2"})
    (tmp_path / "plain").mkdir()
    assert counted(eval_data=[{"path": str(tmp_path / "plain")}])


def test_what_does_not_fit_is_said():
    items = estimate_memory(load_recipe(RECIPES / "lora-34b.yaml"), Emu35Config())
    assert "DOES NOT FIT into 40 GiB" in format_memory(items, 40)


def test_a_row_must_fit_the_context():
    with pytest.raises(ValueError, match="`row_length`=2048 is more than the model's context, 1024"):
        plan(recipe_from_dict({**VALUES, "row_length": 2048}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": ["a red fox", " "]}, "`samples` must be prompts with words in them"),
        (
            {"lora": {"quantization": "nf4"}, "hardware": {"sharding": "zero3"}},
            "`lora.quantization`='nf4' cannot be sharded with zero3",
        ),
        (
            {"optimizer": {"name": "paged_adamw_8bit"}, "hardware": {"sharding": "zero3"}},
            "`optimizer.name`='paged_adamw_8bit' would become DeepSpeed's own with zero3",
        ),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_from_dict({**VALUES, **changes})
