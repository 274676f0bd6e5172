"""Stage 1 at toy size: it learns, resumes on the same curve, and its parts do what they say."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.training.checkpointing import LossLog, load_state, read_log, save_state
from emu35.training.shapes import CELL_SIZE, render, sample_scene
from emu35.training.train_vision_tokenizer import (
    CellWorld,
    VisionTokenizerRecipe,
    content_of_codes,
    evaluate_vision_tokenizer,
    kmeans_codebook,
    tell_apart,
    train_vision_tokenizer,
)

MODEL = {
    "codebook_size": 16,
    "embed_dim": 4,
    "latent_channels": 8,
    "base_channels": 4,
    "channel_multiplier": [1, 1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "mid_attention": False,
    "resolution": 48,
    "norm_num_groups": 1,
    "normalize_latents": True,
    "logit_scale": 16.0,
    "entropy_loss_weight": 0.0,
}


def recipe(**changes):
    values = {
        "model": MODEL,
        "phases": [
            {"name": "autoencoder", "steps": 6, "learning_rate": 2e-3},
            {"name": "ibq", "steps": 6, "learning_rate": 2e-3},
            {"name": "decoder", "steps": 6, "learning_rate": 1e-3},
        ],
        "batch_size": 4,
        "num_processes": 1,
        "codebook_samples": 64,
        "log_every": 1,
        "save_every": 4,
        "warmup_steps": 2,
    }
    return values | changes


def losses(directory):
    drop = {"seconds"}
    return [{k: v for k, v in record.items() if k not in drop} for record in read_log(directory / "losses.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vision_tokenizer")
    train_vision_tokenizer(recipe(), directory, progress=False)
    return directory


def test_trains_and_saves(finished):
    records = losses(finished)
    assert [record["phase"] for record in records] == ["autoencoder"] * 6 + ["ibq"] * 6 + ["decoder"] * 6
    assert {"quantization", "commitment", "entropy", "latent_consistency", "code_consistency"} <= set(records[8])
    assert records[5]["reconstruction"] < records[0]["reconstruction"]
    model = Emu35VisionTokenizer.from_pretrained(finished)
    assert model.encode(torch.zeros(1, 3, 48, 48)).shape == (1, 6, 6)
    report = evaluate_vision_tokenizer(model, num_scenes=4)
    assert 0 <= report["whole_scene"] <= report["objects"] <= 1 and report["psnr"] > 0


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_resumes_on_the_same_curve(finished, tmp_path, stop, monkeypatch):
    from emu35.training import train_vision_tokenizer as stage

    original = stage._Trainer.step

    def interrupted(self, step):
        if step == stop:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(stage._Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_vision_tokenizer(recipe(), tmp_path, progress=False)
    monkeypatch.undo()
    train_vision_tokenizer(recipe(), tmp_path, progress=False)
    assert losses(tmp_path) == losses(finished)


def test_a_finished_run_is_not_run_again(finished):
    before = (finished / "losses.jsonl").read_text()
    train_vision_tokenizer(recipe(), finished, progress=False)
    assert (finished / "losses.jsonl").read_text() == before


def test_another_recipe_needs_another_folder(finished):
    with pytest.raises(ValueError, match="another recipe"):
        train_vision_tokenizer(recipe(seed=1), finished, progress=False)


@pytest.mark.slow
def test_kill_ends_all_processes_and_resumes(tmp_path):
    """`kill -9` in the middle, with two processes: no process stays behind, and the curve is that of one run."""
    two = recipe(num_processes=2, phases=[{"name": "autoencoder", "steps": 30, "learning_rate": 2e-3}])
    train_vision_tokenizer(two, tmp_path / "whole", progress=False)
    script = tmp_path / "run.py"
    script.write_text(
        "from emu35.training.train_vision_tokenizer import train_vision_tokenizer\n"
        "if __name__ == '__main__':\n"
        f"    train_vision_tokenizer({two!r}, {str(tmp_path / 'killed')!r}, progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    while len(read_log(tmp_path / "killed" / "losses.jsonl")) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    lines = len(read_log(tmp_path / "killed" / "losses.jsonl"))
    time.sleep(1)
    assert lines == len(read_log(tmp_path / "killed" / "losses.jsonl"))
    train_vision_tokenizer(two, tmp_path / "killed", progress=False)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_cell_world_draws_what_render_draws():
    world, rng = CellWorld(), np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng)
        cells = world.cells[world.number_of(scene)]  # (3, 3, 16, 16, 3)
        assert np.array_equal(cells.transpose(0, 2, 1, 3, 4).reshape(48, 48, 3), render(scene))
        assert world.is_held_out(world.number_of(scene)).any() == scene.held_out
    pixels, cells = world.draw(rng, 5, 0.5)
    grid = world.cells[cells.numpy()].transpose(0, 5, 1, 3, 2, 4).reshape(5, 3, 48, 48)
    torch.testing.assert_close((pixels + 1) * 127.5, torch.from_numpy(grid).float())


def test_content_of_codes():
    content = content_of_codes(torch.tensor([[[0, 1], [2, 0]]]), side=2)[0]
    assert content.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 0, 1], [10, 11, 2, 3]]
    assert CELL_SIZE == 16


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6) * 10
    points = (centres[:, None] + 0.01 * torch.randn(6, 20, 6, generator=generator)).flatten(0, 1)
    found = kmeans_codebook(points, 6, generator)
    assert torch.cdist(found, centres).min(0).values.max() < 0.1
    assert kmeans_codebook(points[:2], 5, generator).shape == (5, 6)


def test_tell_apart_splits_cells_with_equal_codes():
    first, second, third = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0.3, 0], [0, 0, 1]]), dim=-1)
    cells = torch.stack([torch.stack([first, third]), torch.stack([second, third])])  # equal at the second place
    codebook = tell_apart(torch.stack([first, third]), cells, torch.tensor([True, True]), 3)
    words = (cells @ codebook.T).argmax(-1)
    assert words[0, 0] != words[1, 0] and words[0, 1] == words[1, 1]


def test_learning_rate():
    schedule = VisionTokenizerRecipe(**recipe(final_learning_rate=0.1))
    rates = [schedule.learning_rate(0, step) for step in range(6)]
    assert rates[0] == pytest.approx(1e-3) and rates[1] == pytest.approx(2e-3) == rates[2]
    assert rates[2] > rates[3] > rates[5] > 2e-4
    assert schedule.phase_at(5) == (0, 5) and schedule.phase_at(6) == (1, 0) and schedule.num_steps == 18
    with pytest.raises(ValueError, match="past the last phase"):
        schedule.phase_at(18)


def test_bad_recipes():
    with pytest.raises(ValueError, match="has no batchsize"):
        VisionTokenizerRecipe.from_dict(recipe(batchsize=3))
    with pytest.raises(ValueError, match=r"`phases` must hold `name`.*warmup"):
        VisionTokenizerRecipe.from_dict(recipe(phases=[{"name": "warmup", "steps": 1, "learning_rate": 1}]))


def test_checkpoint_survives_a_failed_save(tmp_path):
    path = tmp_path / "state.pt"
    assert load_state(path) is None
    save_state(path, {"step": 1, "x": torch.ones(2)})

    class Unpicklable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        save_state(path, {"step": 2, "x": Unpicklable()})
    assert load_state(path)["step"] == 1
    assert os.listdir(tmp_path) == ["state.pt"]


def test_log_forgets_what_comes_after(tmp_path):
    log = LossLog(tmp_path / "log.jsonl")
    for step in range(5):
        log.write(step, loss=step / 2)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    assert len(read_log(tmp_path / "log.jsonl")) == 5
    LossLog(tmp_path / "log.jsonl", next_step=3).write(3, loss=9)
    assert [record["loss"] for record in read_log(tmp_path / "log.jsonl")] == [0.0, 0.5, 1.0, 9]
