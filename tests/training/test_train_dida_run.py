"""Adaptation runs: what they leave, and that an interrupted one ends like one that was not; recipes; distillation."""

import json
from pathlib import Path

import emu35
import numpy as np
import pytest
import torch
import yaml
from emu35.image_tokens_emu35 import find_images
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.pipelines.scheduling_dida import DiDAScheduler
from emu35.processing_emu35 import Emu35Processor
from emu35.training.checkpointing import read_log
from emu35.training.dida import DiDATrainer
from emu35.training.distill import DistilledWriter, distill
from emu35.training.recipe import DataRecipe, load_recipe, recipe_from_dict
from emu35.training.sequences import IGNORED
from emu35.training.train import train
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
STAGE = {"name": "pictures", "mixture": {"t2i": 0.7, "x2i": 0.3}, "rows": 1, "row_length": 192}
VALUES = {
    "method": "dida",
    "output_dir": "unused",
    "processes": 1,
    "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
    "copies": 1,
    "stages": [{**STAGE, "steps": 4}],
    "optimizer": {"muon_learning_rate": 0.01, "warmup_steps": 1},
    "compile": False,
    "bf16": False,
    "log_every": 1,
    "save_every": 2,
}


def run(folder, values=VALUES):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return train(path, output_dir=folder / "out", progress=False)


def losses(folder):
    records = read_log(folder / "out" / "dida" / "losses.jsonl")
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


def test_a_run_leaves_an_adapter_that_peft_loads(finished):
    folder, exported = finished
    assert {path.name for path in exported.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "scheduler_config.json",
    }
    state = load_file(exported / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert len(state) == 6 * 2 * 2
    assert any(tensor.abs().sum() > 0 for name, tensor in state.items() if "lora_B" in name)
    assert DiDAScheduler.from_pretrained(exported).config.num_codes == 512

    from peft import PeftModel

    model = Emu35ForConditionalGeneration.from_pretrained(emu35.TINY, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, exported, adapter_name="dida")
    loaded = {name.replace(".dida", ""): p for name, p in adapted.named_parameters() if "lora" in name}
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor.float())
    log = losses(folder)
    assert [record["step"] for record in log] == [0, 1, 2, 3]
    assert all({"loss", "visual", "sequences"} <= set(record) for record in log)
    assert all(value == value for record in log for value in record.values())


def test_a_run_goes_on_from_an_adapter(finished):
    exported = finished[1]
    lora = {**VALUES["lora"], "start_from": str(exported)}
    trainer = DiDATrainer(recipe_from_dict({**VALUES, "lora": lora}))
    stored = load_file(exported / "adapter_model.safetensors")
    state = {f"base_model.model.{name}".replace(".dida", ""): p for name, p in trainer.decoder_state().items()}
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(state[name], tensor.float(), rtol=0, atol=0)


def test_an_adapter_to_go_on_from_must_fit(finished, tmp_path):
    for lora in ({"rank": 4}, {"targets": ["q_proj"]}):
        lora = {**VALUES["lora"], "start_from": str(finished[1]), **lora}
        with pytest.raises(ValueError, match="does not have this rank, these targets, or fit this model"):
            DiDATrainer(recipe_from_dict({**VALUES, "lora": lora}))
    lora = {**VALUES["lora"], "start_from": str(finished[1]), "alpha": 8}
    with pytest.raises(ValueError, match=r"`lora.alpha` is 8\.0, but 64\.0 in `lora.start_from`"):
        DiDATrainer(recipe_from_dict({**VALUES, "lora": lora}))
    with pytest.raises(FileNotFoundError, match=r"`lora.start_from`: .* lacks adapter_config.json, adapter_model"):
        DiDATrainer(recipe_from_dict({**VALUES, "lora": {**VALUES["lora"], "start_from": str(tmp_path)}}))


def test_an_interrupted_run_ends_like_one_that_was_not(finished, tmp_path, monkeypatch):
    step = DiDATrainer.step

    def interrupted(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(DiDATrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.setattr(DiDATrainer, "step", step)
    exported = run(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished[0])
    ours, whole = (load_file(path / "adapter_model.safetensors") for path in (exported, finished[1]))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_another_recipe_is_refused(finished):
    changed = {**VALUES, "copies": 2, "stages": [{**STAGE, "steps": 5}]}
    with pytest.raises(ValueError, match=r"another recipe \(different: stages, copies\)"):
        run(finished[0], changed)


def test_all_weights(tmp_path):
    """Without `lora`; one noisy part, the next-token loss beside it, layers computed again."""
    values = {**VALUES, "ar_loss_weight": 0.5, "gradient_checkpointing": True, "stages": [{**STAGE, "steps": 2}]}
    del values["lora"]
    exported = run(tmp_path / "run", values)
    before = Emu35ForConditionalGeneration.from_pretrained(emu35.TINY, dtype="auto")
    after = Emu35ForConditionalGeneration.from_pretrained(exported, dtype="auto")
    assert after.config.dida_adapted and not getattr(before.config, "dida_adapted", False)
    assert after.dtype == before.dtype == torch.bfloat16
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert torch.equal(after.vision_tokenizer.quant_conv.weight, before.vision_tokenizer.quant_conv.weight)
    record = losses(tmp_path / "run")[0]
    assert record["loss"] > record["visual"]
    assert Emu35Processor.from_pretrained(exported).token_layout.num_visual_tokens == 512


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Nor does it bring the base's dropout back, as layers compute again in training mode only."""
    for file in Path(emu35.TINY).iterdir():
        if file.is_file() and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((Path(emu35.TINY) / "config.json").read_text())
    config["text_config"] |= {"residual_dropout": 0.5, "attention_dropout": 0.5, "embedding_dropout": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = {**VALUES, "model": str(tmp_path)}
    plain, again = (
        DiDATrainer(recipe_from_dict({**values, "gradient_checkpointing": value})) for value in (False, True)
    )
    first = [trainer.step(0)["visual"] for trainer in (plain, again)]
    second = [trainer.step(1)["visual"] for trainer in (plain, again)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert second[0] == pytest.approx(second[1], rel=1e-4)
    assert second[0] != first[0]


def test_losses_fall():
    values = {**VALUES, "lora": {"rank": 16}, "copies": 2, "stages": [{**STAGE, "steps": 6}]}
    trainer = DiDATrainer(recipe_from_dict(values))
    batch = trainer.source.batch(0, trainer.recipe.stages[0])
    trainer.source.batch = lambda *args: batch
    curve = [trainer.step(step)["visual"] for step in range(6)]
    assert curve[-1] < 0.7 * curve[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"copes": 2}, r"unknown key 'copes'. Did you mean 'copies'\?"),
        ({"lora": {"ranc": 2}}, r"`recipe.lora`: unknown key 'ranc'. Did you mean 'rank'\?"),
        ({"lora": {"rank": 0}}, "`lora.rank` must be positive, got 0"),
        ({"lora": {"targets": ["lm_head"]}}, "`lora.targets` must be some of q_proj"),
        ({"scheduler": {"pth": "metric"}}, r"unknown key 'pth'. Did you mean 'path'\?"),
        ({"scheduler": {"path": "metrik"}}, r"Did you mean 'metric'\?"),
        ({"scheduler": {"num_codes": 4}}, "`scheduler.num_codes` follows from the model"),
        ({"ar_loss_weight": 1.0}, "`ar_loss_weight` must be 0 with `lora`, got 1.0"),
        ({"initial_share": 2.0}, r"`initial_share` must be in \[0, 1\], got 2.0"),
        ({"copies": 0}, "`copies` must be positive, got 0"),
        ({"dtype": "int4"}, '`dtype` must be "float32" or "bfloat16"'),
        ({"distilled": {"path": "x", "share": 0.0}}, r"`distilled.share` must be in \(0, 1\], got 0.0"),
        ({"method": "dita"}, "`recipe.method` must be .*'dida'"),
        ({"stages": []}, "`stages` must be a list of at least one stage"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({**VALUES, **values})


def test_shipped_recipes():
    small, large = (load_recipe(RECIPES / name) for name in ("tiny-dida.yaml", "dida-34b.yaml"))
    more = load_recipe(RECIPES / "tiny-dida-tasks.yaml")  # goes on from the first one's adapter
    assert more.lora.start_from == f"{small.output_dir}/export" and more.scheduler == small.scheduler
    assert (more.lora.rank, more.lora.alpha, more.lora.targets) == (
        small.lora.rank,
        small.lora.alpha,
        small.lora.targets,
    )
    assert small.lora is not None and large.lora is not None
    # One picture of 64 x 64 codes fits into a noisy part: IMG, 4096 codes, 63 EOL.
    assert round(large.noisy_share * large.stages[0].row_length) >= 1 + 64 * 64 + 63


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    model = Emu35ForConditionalGeneration.from_pretrained(emu35.TINY, dtype=torch.float32)
    processor = Emu35Processor.from_pretrained(emu35.TINY)
    options = {"num": 5, "batch_size": 2, "shard_size": 3, "progress": False, "image_top_k": 1}
    return model, processor, folder, options, distill(model, processor, folder, **options)


def test_distilled_sequences(distilled):
    model, processor, folder, _, paths = distilled
    assert [path.name for path in paths] == ["t2i-00000.safetensors", "t2i-00001.safetensors"]
    writing = (processor.tokenizer, processor.token_layout)
    writer = DistilledWriter(*writing, DataRecipe(caption_dropout=0.0), 8, folder, share=1.0)
    drawn = {tuple(writer.draw("t2i", np.random.default_rng(seed)).input_ids) for seed in range(40)}
    assert len(drawn) == 5
    sequence = writer.draw("t2i", np.random.default_rng(0))
    ids, layout = sequence.input_ids, processor.token_layout
    (image,) = find_images(ids, layout)
    assert image.complete and (image.token_height, image.token_width) == (6, 6)
    prompt = processor.tokenizer.decode(ids[: image.begin])
    assert "t2i" in prompt and prompt.count("ASSISTANT") == 1
    learnt = [label != IGNORED for label in sequence.labels]
    assert learnt == [index >= image.begin for index in range(len(ids))]
    # the model's likeliest codes are its own: nothing was shifted or lost
    logits = model(torch.tensor([ids]), vocabulary="visual").logits[0]
    at = [index for index, token in enumerate(ids) if token >= layout.visual_token_offset]
    own = logits[torch.tensor(at) - 1].argmax(-1) + layout.visual_token_offset
    assert (own == torch.tensor(ids)[at]).float().mean() > 0.8  # not all: guidance
    unconditional = DistilledWriter(*writing, DataRecipe(caption_dropout=1.0), 8, folder, share=1.0)
    alone = unconditional.draw("t2i", np.random.default_rng(0))
    assert "t2i" not in processor.tokenizer.decode(alone.input_ids)
    assert [label for label in alone.labels if label != IGNORED] == alone.input_ids[-47:]
    mixed = DistilledWriter(*writing, DataRecipe(caption_dropout=0.0), 8, folder, share=0.5)
    fresh = sum(bool(mixed.draw("t2i", np.random.default_rng(seed)).frames) for seed in range(200))
    assert 70 < fresh < 130
    assert mixed.draw("x2i", np.random.default_rng(0)).frames  # a kind without files


def test_a_shard_that_is_missing_is_made_again(distilled, tmp_path):
    model, processor, folder, options, paths = distilled
    before = [load_file(path) for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    distill(model, processor, folder, **options)
    for path, tensors in zip(paths, before, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert paths[0].stat().st_mtime_ns == times[0]
    with pytest.raises(
        ValueError, match=r"was made with another seed, settings \(seed: 0, settings: .*Choose another"
    ):
        distill(model, processor, folder, **{**options, "seed": 1, "image_top_k": 2})


def test_training_reads_what_was_distilled(distilled):
    values = {**VALUES, "distilled": {"path": str(distilled[2]), "share": 1.0}, "copies": 2}
    values["stages"] = [{**STAGE, "steps": 1, "mixture": {"t2i": 1.0}}]
    trainer = DiDATrainer(recipe_from_dict(values))
    batch = trainer.source.batch(0, trainer.recipe.stages[0])
    assert batch.num_blocks > 0
    made = {tuple(load_file(path)["ids"].tolist()) for path in distilled[4]}
    codes = batch.targets[0, 0][batch.block_ids[0, 0] == 0]
    wanted = [int(code) + 512 for code in codes if code != IGNORED][:6]
    assert any(str(wanted)[1:-1] in str(list(ids)) for ids in made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "vqa"}, "`task` must be one of t2i, x2i"),
        ({"num": 0}, "`num` must be positive, got 0"),
        ({"full_captions": 2}, r"`full_captions` must be in \[0, 1\], got 2"),
        ({"prompts": []}, "`prompts` must hold at least one text"),
    ],
)
def test_bad_distillation(distilled, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(distilled[0], distilled[1], tmp_path, progress=False, **arguments)


def test_a_folder_without_shards(tmp_path, distilled):
    processor = distilled[1]
    with pytest.raises(ValueError, match=r"there are no shards in .* emu35 distill --out"):
        DistilledWriter(processor.tokenizer, processor.token_layout, DataRecipe(), 8, tmp_path, 0.5)


@pytest.mark.slow
def test_one_process_can_do_the_work_of_two(tmp_path, monkeypatch):
    values = {**VALUES, "processes": 2}
    run(tmp_path / "two", values)
    monkeypatch.setattr("emu35.training.dida.launch", lambda worker, processes, *args: worker(0, *args))
    run(tmp_path / "one", values)
    curves = [[record["loss"] for record in losses(tmp_path / name)] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    state = json.loads((tmp_path / "two" / "out" / "dida" / "checkpoint-00000004" / "state.json").read_text())
    assert state["processes"] == 2
