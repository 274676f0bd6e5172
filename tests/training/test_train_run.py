"""Whole runs: losses fall, an interrupted run ends like one that was not, `kill -9` does no harm."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.processing_emu35 import Emu35Processor
from emu35.training import train as train_module
from emu35.training import train_language_model as train_language_model_module
from emu35.training.checkpointing import read_log
from emu35.training.optimizers import MuonAdamW, _share_out
from emu35.training.recipe import OptimizerRecipe, recipe_from_dict
from emu35.training.train import train
from emu35.training.train_language_model import LanguageModelTrainer, checkpoints, train_language_model

VALUES = {
    "output_dir": "unused",
    "processes": 1,
    "compile": False,
    "bf16": False,
    "log_every": 1,
    "save_every": 2,
    "vision_tokenizer": {
        "model": {
            "codebook_size": 32,
            "embed_dim": 4,
            "latent_channels": 8,
            "base_channels": 8,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "norm_num_groups": 1,
            "normalize_latents": True,
        },
        "phases": [
            {"name": "autoencoder", "steps": 2, "learning_rate": 0.001},
            {"name": "ibq", "steps": 2, "learning_rate": 0.001},
        ],
        "num_processes": 1,
        "batch_size": 4,
        "codebook_samples": 16,
    },
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    },
    "stages": [
        {"name": "alignment", "steps": 3, "mixture": {"caption_image": 0.7, "image_caption": 0.3}, "rows": 2},
        {"name": "instruction", "steps": 3, "mixture": {"t2i": 0.7, "vqa": 0.3}, "rows": 2, "row_length": 168},
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run in one go: its folder and its recipe's path."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    train(path, output_dir=folder / "out", progress=False)
    return folder


def losses(folder):
    return [(r["step"], r["stage"], r["loss"], r["visual"]) for r in read_log(folder / "losses.jsonl")]


def continue_language_model(finished, folder, values=None):
    out = finished / "out"
    recipe = recipe_from_dict(values or VALUES)
    return train_language_model(recipe, folder, out / "vision_tokenizer", out / "processor", progress=False)


def test_a_run_leaves_a_model_that_loads(finished):
    directory = finished / "out" / "export"
    model = Emu35ForConditionalGeneration.from_pretrained(directory, dtype="auto")
    processor = Emu35Processor.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert next(model.vision_tokenizer.parameters()).dtype == torch.float32
    inputs = processor(text="a red circle", task="t2i", return_tensors="pt")
    output = model.generate(**inputs, task="t2i", generation_mode="image", height=48, width=48)
    assert output.images[0][0].size == (48, 48)


def test_a_vision_tokenizer_can_be_that_of_a_checkpoint(finished, tmp_path):
    """No stage 1; the rest of the run is the same to the bit."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "vision_tokenizer": str(finished / "out" / "export")}))
    train(path, output_dir=tmp_path / "out", progress=False)
    assert losses(tmp_path / "out" / "language_model") == losses(finished / "out" / "language_model")
    ours, given = (
        Emu35VisionTokenizer.from_pretrained(folder / "out" / "export").state_dict() for folder in (tmp_path, finished)
    )
    assert all(torch.equal(ours[name], given[name]) for name in given)


def test_autocast_only_where_it_is_faster(monkeypatch, caplog):
    stage = {"name": "one", "steps": 1, "mixture": {"t2i": 1.0}}
    values = {"output_dir": "unused", "model": {}, "vision_tokenizer": {"bf16": True}, "stages": [stage]}
    recipe = recipe_from_dict(values)
    monkeypatch.setattr(train_module, "multiplies_bfloat16", lambda device: device == "cuda")
    assert train_module._for_this_machine(recipe, "cuda") is recipe
    slow = train_module._for_this_machine(recipe, "cpu")
    assert not slow.bf16 and not slow.vision_tokenizer.bf16 and recipe.bf16 and recipe.vision_tokenizer.bf16
    assert "Training is in float32" in caplog.text


def test_a_finished_run_is_not_repeated(finished):
    before = {p: p.read_text() for p in (finished / "out").rglob("*.jsonl")}
    train(finished / "recipe.yaml", output_dir=finished / "out", progress=False)
    assert before == {p: p.read_text() for p in (finished / "out").rglob("*.jsonl")}


def test_an_interrupted_run_ends_like_one_that_was_not(finished, tmp_path, monkeypatch):
    step = LanguageModelTrainer.step

    def interrupted(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(LanguageModelTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        continue_language_model(finished, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000002", "checkpoint-00000004"]
    monkeypatch.setattr(LanguageModelTrainer, "step", step)
    resumed = continue_language_model(finished, tmp_path)
    whole = continue_language_model(finished, finished / "out" / "language_model")
    assert losses(tmp_path) == losses(finished / "out" / "language_model")
    assert len(losses(tmp_path)) == 6
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_half_a_checkpoint_is_ignored(finished, tmp_path):
    (tmp_path / "checkpoint.tmp").mkdir()
    (tmp_path / "checkpoint.tmp" / "model.safetensors").write_bytes(b"cut short")
    continue_language_model(finished, tmp_path)
    assert losses(tmp_path) == losses(finished / "out" / "language_model")


def test_another_recipe_is_refused(finished):
    changed = {**VALUES, "optimizer": {"muon_learning_rate": 0.1}}
    changed["stages"] = [*VALUES["stages"], {"name": "more", "steps": 1, "mixture": {"t2i": 1}}]
    with pytest.raises(ValueError, match=r"another recipe \(different: stages, optimizer\)"):
        continue_language_model(finished, finished / "out" / "language_model", changed)


def test_another_number_of_processes_is_refused(finished, tmp_path):
    continue_language_model(finished, tmp_path)
    newest = checkpoints(tmp_path)[-1] / "state.json"
    newest.write_text(json.dumps({**json.loads(newest.read_text()), "step": 4, "processes": 2}))
    with pytest.raises(ValueError, match="written by 2 processes; now there are 1"):
        continue_language_model(finished, tmp_path)


def test_losses_fall(finished):
    values = {**VALUES, "stages": [{"name": "a", "steps": 40, "mixture": {"image": 1.0}, "rows": 4}]}
    values["optimizer"] = {"warmup_steps": 1, "muon_learning_rate": 0.01, "adamw_learning_rate": 0.01}
    out = finished / "out"
    trainer = LanguageModelTrainer(
        recipe_from_dict(values),
        Emu35Processor.from_pretrained(out / "processor"),
        Emu35VisionTokenizer.from_pretrained(out / "vision_tokenizer"),
    )
    tokenizer_before = [p.clone() for p in trainer.model.vision_tokenizer.parameters()]
    curve = [trainer.step(step)["loss"] for step in range(40)]
    assert curve[-1] < 0.6 * curve[0]
    tokenizer_after = trainer.model.vision_tokenizer.parameters()
    assert all(torch.equal(a, b) for a, b in zip(tokenizer_before, tokenizer_after, strict=True))


def test_matrices_go_to_muon_and_the_rest_to_adamw(finished):
    model = Emu35ForConditionalGeneration.from_pretrained(finished / "out" / "export")
    model.vision_tokenizer.requires_grad_(False)
    optimizer = MuonAdamW(model, OptimizerRecipe())
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for share in optimizer.shares for p in share}
    assert all("_proj" in name for name in matrices) and len(matrices) == 2 * 7
    rest = {names[id(p)] for p in optimizer.rest}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= rest
    assert not any(name.startswith("vision_tokenizer") for name in matrices | rest)


def test_shares_are_even():
    matrices = [torch.nn.Parameter(torch.zeros(4, n)) for n in (4, 4, 8, 8, 4, 4)]
    shares = _share_out(matrices, 2)
    assert sorted(sum(p.numel() for p in share) for share in shares) == [64, 64]
    assert _share_out(matrices, 2) == shares


@pytest.mark.slow
def test_kill_9_and_two_processes(tmp_path):
    """Two processes, killed the hard way as soon as there is a checkpoint, then continued: the same curve."""
    values = {**VALUES, "processes": 2}
    values["stages"] = [{**stage, "steps": 20} for stage in VALUES["stages"]]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    script = (
        "import sys\nfrom emu35.training.train import train\n"
        "if __name__ == '__main__':\n    train(sys.argv[1], output_dir=sys.argv[2], progress=False)\n"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), str(path)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], start_new_session=True)
    while not checkpoints(tmp_path / "killed" / "language_model"):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert losses(tmp_path / "killed" / "language_model") == losses(tmp_path / "whole" / "language_model")
    assert len(losses(tmp_path / "whole" / "language_model")) == 40


@pytest.mark.slow
def test_one_process_can_do_the_work_of_two(finished, tmp_path, monkeypatch):
    """As on a GPU: one process, the same batches, the same curve."""
    values = {**VALUES, "processes": 2}
    two = continue_language_model(finished, tmp_path / "two", values)
    monkeypatch.setattr(train_language_model_module, "launch", lambda worker, processes, *args: worker(0, *args))
    one = continue_language_model(finished, tmp_path / "one", values)
    curves = [[loss for _, _, loss, _ in losses(tmp_path / name)] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    torch.testing.assert_close(one.lm_head.weight, two.lm_head.weight, atol=1e-3, rtol=1e-2)
