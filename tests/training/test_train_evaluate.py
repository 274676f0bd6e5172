"""The evaluator: an oracle gets everything right, a random model nearly nothing, and results are plain numbers."""

import json

import pytest
import torch
from emu35.configuration_emu35 import Emu35VisionTokenizerConfig
from emu35.generation_configuration_emu35 import Emu35GenerationConfig
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from emu35.training.evaluate import _Evaluation, evaluate, sweep
from emu35.training.export import export
from emu35.training.recipe import recipe_from_dict
from emu35.training.shapes import to_image
from emu35.training.train import build_processor
from emu35.training.train_language_model import build_model
from PIL import Image

VISION = {
    "codebook_size": 32,
    "embed_dim": 4,
    "latent_channels": 8,
    "base_channels": 8,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_num_groups": 1,
}
VALUES = {
    "output_dir": "-",
    "vision_tokenizer": {},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    },
    "stages": [{"name": "all", "steps": 1, "mixture": {"t2i": 1}}],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model, exported."""
    torch.manual_seed(0)
    recipe = recipe_from_dict(VALUES)
    vision_tokenizer = Emu35VisionTokenizer(Emu35VisionTokenizerConfig(**VISION))
    processor = build_processor(recipe, vision_tokenizer)
    directory = tmp_path_factory.mktemp("model")
    settings = {"guidance_scale": 1.5, "image_temperature": 0.7, "max_new_tokens": 64}
    export(build_model(recipe, processor, vision_tokenizer), processor, directory, settings)
    return directory


def test_export_writes_what_users_load(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    config = Emu35GenerationConfig.from_pretrained(checkpoint)
    assert config.guidance_scale == 1.5 and config.image_temperature == 0.7


def test_an_oracle_gets_everything_right(checkpoint, monkeypatch):
    known = []
    scenes = _Evaluation._scenes

    def remember(self, num, held_out):
        drawn, rng = scenes(self, num, held_out)
        known.extend(drawn)
        return drawn, rng

    monkeypatch.setattr(_Evaluation, "_scenes", remember)
    monkeypatch.setattr(_Evaluation, "draw", lambda self, texts, generator: [to_image(known.pop(0)) for _ in texts])
    result = evaluate(checkpoint, "t2i", num=60, batch_size=16, progress=False)
    assert result["whole_scene"]["all"] == 1.0 and result["world_reward"] == 10.0
    assert {"1_objects", "2_objects", "3_objects", "full", "partial", "3_objects_partial"} <= set(
        result["whole_scene"]
    )
    assert set(result["aspects"]) == {
        "object", "count", "colour", "shape", "size", "position", "relation", "background",
    }  # fmt: skip
    assert set(result["aspects"].values()) == {1.0}
    assert result["held_out"]["num"] == 15 and result["held_out"]["whole_scene"]["all"] == 1.0
    assert result["settings"]["guidance_scale"] == 1.5
    assert json.loads(json.dumps(result)) == result


def test_an_untrained_model_is_wrong(checkpoint):
    result = evaluate(checkpoint, "t2i", num=6, num_held_out=0, batch_size=4, progress=False)
    assert result["whole_scene"]["all"] == 0.0
    assert "held_out" not in result
    answers = evaluate(checkpoint, "vqa", num=8, num_held_out=3, batch_size=4, progress=False, max_new_tokens=4)
    assert answers["accuracy"] < 0.5 and answers["describe"] == 0.0
    assert 1 <= result["world_reward"] < 5.5 and answers["world_reward"] == 1 + 9 * answers["accuracy"]
    assert answers["held_out"]["num"] == 3
    assert json.loads(json.dumps(answers)) == answers


def test_the_same_seed_gives_the_same_result(checkpoint):
    options = {"num": 4, "num_held_out": 0, "batch_size": 4, "progress": False, "guidance_scale": 1.0}
    first, second, other = (evaluate(checkpoint, "t2i", seed=seed, **options) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_episodes_have_rates_by_kind_and_a_page_of_samples(checkpoint, tmp_path):
    options = {"batch_size": 4, "progress": False, "max_new_tokens": 60}
    path = tmp_path / "samples.png"
    result = evaluate(checkpoint, "x2i", num=6, num_held_out=2, samples_path=path, **options)
    assert result["rates"]["whole_scene"] == 0.0 and result["held_out"]["num"] == 2
    assert result["marked"]["whole_scene"] == 6
    assert {rates["whole_scene"] for rates in result["by_kind"].values()} == {0.0}
    assert Image.open(path).width > 48 * 4 * 2
    assert json.loads(json.dumps(result)) == result
    assert evaluate(checkpoint, "x2i", num=6, num_held_out=2, **options) == result


def test_reconstruction(checkpoint):
    result = evaluate(checkpoint, "reconstruction", num=4, num_held_out=2, progress=False)
    assert 0 <= result["whole_scene"] <= 1 and result["held_out"]["num"] == 2


def test_a_sweep_has_a_point_for_each_value(checkpoint):

    model = Emu35ForConditionalGeneration.from_pretrained(checkpoint)
    processor = Emu35Processor.from_pretrained(checkpoint)
    points = sweep(model, processor, "guidance_scale", [1.0, 2.0], num=3, progress=False)
    assert [point["guidance_scale"] for point in points] == [1.0, 2.0]
    assert all("all" in point["whole_scene"] for point in points)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "t2v"}, "`task` must be one of t2i, vqa, reconstruction, x2i, .*, got 't2v'"),
        ({"num": 0}, "must be positive, got 0"),
        ({"batch_size": 0}, "must be positive"),
        ({"guidence_scale": 1}, "Did you mean `guidance_scale`"),
    ],
)
def test_wrong_arguments(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, **{"progress": False, **options})


def test_a_model_needs_its_processor(checkpoint):

    with pytest.raises(ValueError, match="`processor` is needed"):
        evaluate(Emu35ForConditionalGeneration.from_pretrained(checkpoint))
