"""GRPO runs on a tiny model: what they log and leave, that they go on where they were, and bad input."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.training import grpo, rollout
from emu35.training.checkpointing import read_log
from emu35.training.grpo import Emu35GRPOTrainer, last_checkpoint, load_policy, train_grpo
from emu35.training.grpo_plan import estimate_grpo_memory, lengths, plan
from emu35.training.grpo_prompts import interleave, load_prompts, world_prompts
from emu35.training.grpo_recipe import GRPORecipe
from emu35.training.recipe import _build, load_recipe
from emu35.training.rewards import Component, RewardMix, SampleReward
from emu35.training.shapes import Meaning, Question
from emu35.training.shapes.edits import EditMeaning
from emu35.training.train import train
from PIL import Image
from safetensors.torch import load_file

SMALL = {"height": 8, "width": 8}
GENERATE = {
    "t2i": {"generation_mode": "image", **SMALL},
    "x2i": {"generation_mode": "image", **SMALL},
    "vqa": {"generation_mode": "text", "max_new_tokens": 4},
}
STORY = {"generation_mode": "interleaved", "max_new_tokens": 40, "max_images": 2, **SMALL}


def red(prompts, completions, images, texts, **columns):
    """How red the image is; how short the text."""
    pairs = zip(images, texts, strict=True)
    return [float(np.asarray(own[-1])[..., 0].mean() / 255) if own else 1 / (1 + len(text)) for own, text in pairs]


red.name, red.range = "red", (0.0, 1.0)


def red_images(prompts, completions, images, texts, **columns):
    """Answers without images are all worth the same."""
    return red(prompts, completions, images, [""] * len(texts), **columns)


red_images.name, red_images.range = "red_images", (0.0, 1.0)


def too_few(prompts, completions, **columns):
    return [0.5] * (len(prompts) - 1)


too_few.name, too_few.range = "too_few", (0.0, 1.0)


def too_much(prompts, completions, **columns):
    return [1.5] * len(prompts)


too_much.name, too_much.range = "too_much", (0.0, 1.0)


def colourful(prompts, completions, images, colour, **columns):
    return [0.5] * len(prompts)


colourful.name, colourful.range = "colourful", (0.0, 1.0)


class Brightest(SampleReward):
    name = "brightest"

    def scores(self, samples):
        return [float(np.asarray(sample.images[0]).max()) for sample in samples]


LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def checkpoint(make_tiny_model, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_tiny_model()
    model.generation_config.task_defaults = {task: {} for task in GENERATE}
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_recipe(checkpoint):
    def make(**changes):
        values = {
            "method": "grpo",
            "output_dir": "unused",
            "model": str(checkpoint),
            "prompts": {"world": {"t2i": 1, "x2i": 1, "vqa": 1}},
            "rewards": [{"reward": f"{__name__}:red"}],
            "steps": 4,
            "processes": 1,
            "rollouts_per_step": 12,
            "group_size": 4,
            "micro_batch": 6,
            "rollout": {"generate": GENERATE},
            "learning_rate": 3e-3,
            "save_every": 2,
            "samples_every": 2,
        }
        return _build(GRPORecipe, {**values, **changes}, "recipe")

    return make


def run(recipe, folder, rewards=None):
    train_grpo(recipe, folder, folder / "export", rewards, progress=False)
    return [
        {name: value for name, value in record.items() if name not in ("step_time", "epoch")}
        for record in read_log(folder / "log.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(make_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(make_recipe(), folder)


def test_a_run_logs_rewards_and_entropies_by_task_and_modality(finished):
    folder, log = finished
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    tasks = [f"{name}/{task}" for name in ("reward", "equal_groups") for task in GENERATE]
    names = {"reward", "rewards/red/mean", "rewards/red/missing", "entropy/visual", "entropy/text", "unscored", *tasks}
    assert names <= set(log[0])
    # The rewards' mean is the mean over the tasks, which have as many answers each.
    assert log[0]["reward"] == pytest.approx(sum(log[0][f"reward/{task}"] for task in GENERATE) / 3, abs=1e-4)
    assert 1 <= log[0]["reward"] <= 10
    assert not any("kl" in record for record in log)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["000000.png", "000002.png"]


def test_a_step_s_entropies_are_of_all_its_tokens(make_recipe, finished, tmp_path):
    _, log = finished
    (whole,) = run(make_recipe(steps=1, micro_batch=12), tmp_path)
    for name in ("entropy/visual", "entropy/text", "grad_norm"):
        assert whole[name] == pytest.approx(log[0][name], rel=1e-5), name


def test_a_run_leaves_a_model_that_has_changed(finished, checkpoint):
    folder, _ = finished
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, folder / "export"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith("vision_tokenizer.")} == changed
    model = Emu35ForConditionalGeneration.from_pretrained(folder / "export")
    assert model.dtype == torch.float32


def test_a_run_leaves_a_card_with_curves_and_pages_on_tensorboard(finished):
    folder, log = finished
    text = (folder / "export" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers") and "| reward, task x2i |" in text
    if find_spec("matplotlib"):
        assert (folder / "export" / "curves.png").stat().st_size > 1000
    if find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((folder / "runs").iterdir())))
        events.Reload()
        assert [event.step for event in events.Images("samples")] == [0, 2]
        rewards = [event.value for event in events.Scalars("train/reward/x2i")]
        assert rewards == pytest.approx([record["reward/x2i"] for record in log])


def test_answers_are_drawn_in_the_arithmetic_of_their_log_probabilities(make_recipe, tmp_path, monkeypatch):
    seen = []
    for module, name in ((grpo, "draw_answers"), (rollout, "score_answers")):
        original = getattr(module, name)

        def spy(*args, original=original, name=name, **options):
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return original(*args, **options)

        monkeypatch.setattr(module, name, spy)
    few = {"rollouts_per_step": 4, "micro_batch": 4, "prompts": {"world": {"t2i": 1}}}
    run(make_recipe(bf16=True, steps=1, **few), tmp_path)
    assert set(seen) == {("draw_answers", True), ("score_answers", True)}


def test_stories_and_pictures_in_one_batch(make_recipe, tmp_path):
    prompts = {"world": {"story": 1, "t2i": 1, "vqa": 1}}
    log = run(make_recipe(steps=1, prompts=prompts, rollout={"generate": {**GENERATE, "story": STORY}}), tmp_path)
    assert 1 <= log[0]["reward/story"] <= 10
    assert log[0]["completions/max_length"] > 20 and log[0]["grad_norm"] > 0


def test_rewards_rise(make_recipe, tmp_path):
    prompts = {"world": {"t2i": 1, "vqa": 1}}
    recipe = make_recipe(
        steps=20, rollouts_per_step=16, group_size=8, micro_batch=16, prompts=prompts, learning_rate=0.01
    )
    log = run(recipe, tmp_path)
    rewards = [record["reward/t2i"] for record in log]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3


def test_an_interrupted_run_gives_the_same_curve(make_recipe, finished, tmp_path):
    _, expected = finished
    run(make_recipe(steps=3, save_every=2), tmp_path)  # ends after a step that no checkpoint holds
    (tmp_path / "checkpoint-3" / "recipe.json").unlink()  # as if it had been killed while it was saved
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    log = run(make_recipe(), tmp_path)
    assert log == expected


def test_another_recipe_is_not_continued(make_recipe, finished):
    folder, _ = finished
    with pytest.raises(ValueError, match=r"another recipe \(different: learning_rate\)"):
        run(make_recipe(learning_rate=1e-3), folder)


def test_a_falling_learning_rate_ties_a_run_to_its_steps(make_recipe, tmp_path):
    run(make_recipe(steps=2, schedule="linear"), tmp_path)
    with pytest.raises(ValueError, match=r"another recipe \(different: steps\)"):
        run(make_recipe(steps=4, schedule="linear"), tmp_path)


def _run_quietly(recipe, folder):
    torch.set_num_threads(1)
    train_grpo(recipe, folder, folder / "export", progress=False)


@pytest.mark.slow
def test_a_killed_run_gives_the_same_curve(make_recipe, finished, tmp_path):
    _, expected = finished
    process = multiprocessing.get_context("spawn").Process(target=_run_quietly, args=(make_recipe(), tmp_path))
    process.start()
    while last_checkpoint(tmp_path) is None and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run(make_recipe(), tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reward"),
    [
        ({}, "red"),
        ({"loss_type": "dapo"}, "red_images"),  # one process has less to learn from than the other
        ({"lora": LORA, "beta": 0.1, "gradient_checkpointing": True}, "red"),
    ],
)
def test_two_processes_do_what_one_does(make_recipe, tmp_path, changes, reward):
    changes = {"rollouts_per_step": 24, "learning_rate": 1e-3, "steps": 3, **changes}
    one = run(make_recipe(**changes), tmp_path / "one", globals()[reward])
    two = run(make_recipe(**changes, processes=2), tmp_path / "two", globals()[reward])
    names = {"reward", "entropy/visual", "entropy/text", "grad_norm", "reward/x2i", "equal_groups/vqa", "num_tokens"}
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for name in names & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    file = "adapter_model.safetensors" if "lora" in changes else "model.safetensors"
    weights = [load_file(tmp_path / name / "export" / file) for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-3, rtol=0)


def test_an_adapter_stays_near_the_model_without_it(make_recipe, checkpoint, tiny_processor, tmp_path, monkeypatch):
    recipe = make_recipe(lora=LORA, beta=0.5, steps=2, learning_rate=0.05, updates_per_rollout=1)
    original, batches = Emu35GRPOTrainer._compute_loss, []

    def spy(self, model, inputs):
        batches.append(inputs)
        return original(self, model, inputs)

    monkeypatch.setattr(Emu35GRPOTrainer, "_compute_loss", spy)
    log = run(recipe, tmp_path)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)  # the fresh adapter does nothing
    assert log[1]["kl/visual"] > 0 and log[1]["kl/text"] > 0
    assert {path.name for path in (tmp_path / "export").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    state = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert all(".q_proj." in name or ".v_proj." in name for name in state)
    assert any(tensor.any() for name, tensor in state.items() if "lora_B" in name)
    last, base = batches[-1], Emu35ForConditionalGeneration.from_pretrained(checkpoint).eval()
    ids, mask = (torch.cat([last[f"prompt_{name}"], last[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with torch.no_grad():
        scores = rollout.score_answers(base, ids, mask, last["token_kinds"], recipe.rollout)
        inputs = tiny_processor(text="a red fox", task="t2i")
        larger = {"task": "t2i", "generation_mode": "image", "height": 32, "width": 32}
        plain = base.generate(**inputs, **larger, do_sample=False)
        base.load_adapter(str(tmp_path / "export"))
        adapted = base.generate(**inputs, **larger, do_sample=False)
    torch.testing.assert_close(last["ref_per_token_logps"], scores["log_probs"], atol=1e-5, rtol=0)
    assert plain.sequences.tolist() != adapted.sequences.tolist()


def test_an_adapter_on_quantised_weights(make_recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(lora={**LORA, "quantization": "nf4"}, beta=0.1, steps=2, learning_rate=0.05)
    log = run(recipe, tmp_path)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[0]["grad_norm"] > 0 and log[1]["kl"] > 0
    state = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in state.items() if "lora_B" in name)


def test_full_training_with_a_reference_in_memory(make_recipe, tmp_path):
    log = run(make_recipe(beta=0.1, reference="start", steps=2, updates_per_rollout=2), tmp_path)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] > 0  # the second step on the same answers
    assert "reward" in log[0] and "reward" not in log[1]


def test_dropout_is_off_in_training_and_kept_in_the_export(make_recipe, make_tiny_model, tiny_processor, tmp_path):
    model = make_tiny_model(residual_dropout=0.2, embedding_dropout=0.1, attention_dropout=0.1)
    model.generation_config.task_defaults = {task: {} for task in GENERATE}
    for part in (model, tiny_processor):
        part.save_pretrained(tmp_path / "model")
    recipe = make_recipe(model=str(tmp_path / "model"), steps=1)
    policy, rates = load_policy(recipe)
    ids = torch.randint(0, 300, (1, 20))
    policy.train()
    torch.testing.assert_close(policy(ids).logits, policy(ids).logits, atol=0, rtol=0)
    assert rates == {"attention_dropout": 0.1, "residual_dropout": 0.2, "embedding_dropout": 0.1}
    run(recipe, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["text_config"]
    assert {name: config[name] for name in rates} == rates


# ------------------------------------------------------------------------------------------------------- prompts


def test_tasks_are_interleaved():
    assert interleave({"a": 1, "b": 1, "c": 1}, 7) == ["a", "b", "c", "a", "b", "c", "a"]
    names = interleave({"a": 0.5, "b": 1.5}, 40)
    assert [names[start : start + 4].count("a") for start in range(0, 40, 4)] == [1] * 10


def test_prompts_of_the_world(make_recipe):
    recipe = make_recipe()
    prompts = world_prompts(recipe)
    assert len(prompts) == 4 * 3
    rows = prompts.__getitems__([0, 0, 1, 2, 4])
    assert [row["task"] for row in rows] == ["t2i", "t2i", "x2i", "vqa", "x2i"]
    assert rows[0]["prompt"] is rows[1]["prompt"]
    assert [type(row["meaning"]) for row in rows[1:4]] == [Meaning, EditMeaning, Question]
    assert rows[3]["answer"] == rows[3]["meaning"].answer and rows[0]["answer"] is None
    again = world_prompts(recipe).__getitems__([2, 4])
    assert [row["meaning"] for row in again] == [row["meaning"] for row in rows[3:]]
    other = world_prompts(make_recipe(seed=1)).__getitems__([2])
    assert other[0]["prompt"] != rows[3]["prompt"]


def asked(piece):
    return {"role": "user", "content": [piece]}


def write_rows(path, number=3, **more):
    message = {"role": "user", "content": [{"type": "text", "text": "a red fox"}]}
    rows = [{"prompt": [message], "task": "t2i", "wanted": index, **more} for index in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def test_prompts_of_a_file(make_recipe, tmp_path):
    rows = load_prompts(make_recipe(prompts=write_rows(tmp_path / "prompts.jsonl"))).__getitems__([0, 2])
    assert [row["wanted"] for row in rows] == [0, 2]
    assert rows[0]["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "a red fox"}]}]


def test_rows_of_a_group_share_one_prompt_of_a_file(make_recipe, tmp_path):
    """`draw_answers` encodes the images of one object once."""
    rows = [{"prompt": [{"role": "user", "content": f"number {number}"}], "task": "t2i"} for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(make_recipe(prompts={"path": str(tmp_path / "prompts.jsonl")}))
    first, again, other, more = (row["prompt"] for row in prompts.__getitems__([0, 0, 1, 1]))
    assert first is again and other is more
    assert [first, other] == [rows[0]["prompt"], rows[1]["prompt"]]


@pytest.mark.parametrize(
    ("number", "more", "message"),
    [
        (2, {}, r"has 2 prompts, but a step takes 3"),
        (3, {"images": 1}, "has a column 'images'"),
        (3, {"task": "t2j"}, "t2j"),
    ],
)
def test_bad_files(make_recipe, tmp_path, number, more, message):
    prompts = write_rows(tmp_path / "prompts.jsonl", number, **more)
    with pytest.raises(ValueError, match=message):
        load_prompts(make_recipe(prompts=prompts))


def shown(name):
    return [{"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "make it blue"}]}]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(Emu35ForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (shown("none.png"), "row 2: .*none.png"),
        (shown("text.png"), "row 2: .*text.png"),
        (shown("cut.png"), "row 2: .*cut.png"),  # its head is in order
        ([{"content": "a fox"}], "row 2: the last message must be the user's, is of None"),
        (
            [{**asked({"type": "text", "text": "a fox"}), "role": "assistant"}],
            "the last message must be the user",
        ),
        ([], "row 2: `prompt` is empty"),
        ([asked({"type": "text", "text": "make it blue"})], "row 2: `task='x2i'` needs an image"),
        (
            [{"role": "user", "content": [*shown("fox.png")[0]["content"], {"type": "text", "text": "a " * 450}]}],
            r"row 2: the prompt has \d+ tokens. An answer needs 11 of the context's 512",
        ),
    ],
)
def test_rows_that_would_end_a_run(make_recipe, tmp_path, prompt, error):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "fox.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "fox.png").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    rows = [{"prompt": one, "task": "x2i"} for one in (shown("fox.png"), shown(str(tmp_path / "fox.png")), prompt)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=error):
        run(make_recipe(prompts={"path": str(tmp_path / "prompts.jsonl")}), tmp_path / "run")


def test_images_of_prompts_lie_beside_the_file(make_recipe, tmp_path):
    rows = [{"prompt": shown(name), "task": "x2i"} for name in ("fox.png", str(tmp_path / "fox.png"), "a/b.png")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(make_recipe(prompts={"path": str(tmp_path / "prompts.jsonl")}))
    found = [row["prompt"][0]["content"][0]["image"] for row in prompts]
    assert found == [str(tmp_path / name) for name in ("fox.png", "fox.png", "a/b.png")]


def test_missing_files_and_columns(make_recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`prompts.path`: there is no .*none.jsonl"):
        load_prompts(make_recipe(prompts={"path": str(tmp_path / "none.jsonl")}))
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(ValueError, match=r"lacks the columns \['prompt', 'task'\]"):
        load_prompts(make_recipe(prompts={"path": str(tmp_path / "some.jsonl")}))
    (tmp_path / "some.csv").write_text("")
    with pytest.raises(ValueError, match=r"must end in .jsonl or .parquet"):
        load_prompts(make_recipe(prompts={"path": str(tmp_path / "some.csv")}))


# ---------------------------------------------------------------------------------------------------------- plan


def bytes_of(recipe, config):
    return {item.name: item.bytes for item in estimate_grpo_memory(recipe, config)}


def test_a_plan_says_what_is_asked_scored_and_needed(make_recipe):
    text = plan(make_recipe())
    assert "world of shapes: t2i 33%, x2i 33%, vqa 33%" in text and "red (weight 1)" in text
    assert "4 to each of 3 prompts" in text and "fits into 80 GiB" in text
    missing = make_recipe(prompts={"path": "none.jsonl"}, model="none")
    assert "none.jsonl, NOT ON THIS DISK" in plan(missing) and "none (not on this disk" in plan(missing)


def test_memory_of_answers_and_of_a_reference(make_recipe, shared_tiny_model):
    config = shared_tiny_model.config
    weights = sum(p.numel() for name, p in shared_tiny_model.named_parameters() if "vision" not in name)
    recipe = make_recipe(rollout={"generate": GENERATE, "batch_size": 5})
    found = lengths(recipe, config)
    assert {task: answer for task, (_, answer) in found.items()} == {"t2i": 11, "x2i": 11, "vqa": 4}
    assert found["x2i"][0] > found["t2i"][0]  # its prompt shows an image
    plain, referred = (bytes_of(make_recipe(**more), config) for more in ({}, {"beta": 0.1, "reference": "start"}))
    assert plain["weights"] == 4 * weights and referred["reference"] == 4 * weights and "reference" not in plain
    text, longest = config.text_config, max(map(sum, found.values()))
    each = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4 * longest
    assert (bytes_of(recipe, config)["cache"], plain["cache"]) == (5 * each, 12 * each)


def test_a_pass_needs_memory_for_each_prompt_once(make_recipe, shared_tiny_model):
    config = shared_tiny_model.config
    (prompt, answer) = max(lengths(make_recipe(), config).values(), key=sum)
    activations = {
        rows: bytes_of(make_recipe(micro_batch=rows, rollouts_per_step=96, group_size=8), config)["activations"]
        for rows in (1, 4, 8, 12, 16)
    }
    tokens = {rows: number / activations[1] * (prompt + answer) for rows, number in activations.items()}
    prompts = {rows: (number - rows * answer) / prompt for rows, number in tokens.items()}
    assert {rows: round(number) for rows, number in prompts.items()} == {1: 1, 4: 1, 8: 1, 12: 3, 16: 2}


def test_the_released_size_fits_where_its_recipe_says():
    text = plan(load_recipe(Path(__file__).parents[2] / "training" / "recipes" / "grpo-34b.yaml"))
    assert "34.1 B weights" in text and "fits into 80 GiB" in text and "DOES NOT" not in text


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["tiny-grpo", "grpo-34b"])
def test_shipped_recipes(name):
    path = Path(__file__).parents[2] / "training" / "recipes" / f"{name}.yaml"
    recipe = _build(GRPORecipe, yaml.safe_load(path.read_text()), "recipe")
    assert recipe.group_size == 8  # the report's
    recipe.accumulation(recipe.processes if name.startswith("tiny") else 8)
    mix = recipe.reward_mix(recipe.prompts.world or ("t2i", "x2i"))
    assert len(mix.components) == len(recipe.rewards) >= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 5}, r"`group_size`=5 must divide `rollouts_per_step`=12.*Nearest: 10 or 15"),
        ({"group_size": 1}, "`group_size` must be at least 2"),
        ({"beta": 0.1}, r"`beta`=0.1 needs a reference, and without `lora` there is none"),
        ({"reference": "start"}, "`reference`='start' has no effect: `beta` is 0"),
        ({"reference": "start", "beta": 0.1, "lora": LORA}, "with `lora` it is the model without the adapter"),
        ({"learning_rat": 1}, "unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ({"lora": {"rank": 4, "dropout": 0.1}}, "`lora.dropout` must be 0"),
        ({"dtype": "bfloat16"}, '`dtype` must be "float32" without `lora`'),
        ({"loss_type": "ppo"}, "`loss_type` must be one of grpo, dapo"),
        ({"save_every": 3, "updates_per_rollout": 2}, "`save_every`=3 must be a multiple of `updates_per_rollout`=2"),
        ({"rewards": []}, "`rewards` must be at least one reward"),
        ({"prompts": {}}, "exactly one of `world` and `path`"),
        ({"prompts": {"world": {"t2j": 1}}}, "unknown key 't2j'. Did you mean 't2i'"),
        ({"prompts": {"world": {"chat": 1}}}, "unknown key 'chat'"),
        ({"hardware": {"sharding": "zero3"}}, '`hardware.sharding` must be "none"'),
    ],
)
def test_recipes_that_cannot_work(make_recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 5}, "`rollouts_per_step`=12 must be a multiple of `micro_batch`=5 times the number of"),
        ({"micro_batch": 12, "processes": 2}, "`micro_batch`=12 times the number of processes, 2"),
        ({"rewards": [{"reward": "WorldRewards"}]}, "Did you mean 'WorldReward'"),
        ({"rewards": [{"reward": f"{__name__}:blue"}]}, "cannot import"),
        (
            {"rewards": [{"reward": "WorldReward", "arguments": {"mark": 1}}]},
            "unknown key 'mark'. Did you mean 'marks'",
        ),
        ({"rewards": [{"reward": "WorldReward", "tasks": ["t2i"]}]}, "No reward counts for the task 'vqa'"),
        ({"rewards": [{"reward": "Preservation"}]}, "'preservation' needs the column `reference_images`; there are: "),
        ({"rewards": [{"reward": f"{__name__}:colourful"}]}, "'colourful' needs the column `colour`"),
        ({"rewards": [{"reward": f"{__name__}:too_much"}]}, r"'too_much' returned 1.5 \(value 0\), out of its range"),
        ({"rewards": [{"reward": f"{__name__}:too_few"}]}, r"'too_few' returned 2 values for 3 completions"),
        ({"rewards": [{"reward": f"{__name__}:Brightest"}]}, r"'brightest' returned 255.0 \(value 0\), out of its"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_errors_before_anything_is_loaded(make_recipe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(make_recipe(**changes), tmp_path)


def test_there_must_be_a_model(make_recipe, tmp_path):
    with pytest.raises(OSError, match="none"):
        run(make_recipe(model=str(tmp_path / "none")), tmp_path)


def test_without_trl_the_extra_is_named(make_recipe, monkeypatch, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(make_recipe())))
    monkeypatch.setattr("emu35.training.train.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs TRL.*pip install 'emu35\[train\]'"):
        train(path, tmp_path / "run")


def test_neither_the_command_line_nor_recipes_need_the_extra():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import emu35, emu35.cli, emu35.training.train, emu35.training.rollout, emu35.training.rewards\n"
        "from emu35.training.recipe import load_recipe\n"
        "load_recipe(sys.argv[1])\n"
        "import emu35.training.grpo"
    )
    recipe = Path(__file__).parents[2] / "training" / "recipes" / "tiny-grpo.yaml"
    found = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True)
    assert found.stderr.strip().splitlines()[-1] == "ImportError: GRPO needs `trl`: `pip install 'emu35[train]'`."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": "linaer"},
            "`schedule` must be one of cosine, linear, constant, got 'linaer'. Did you mean 'lin",
        ),
        ({"attn_implementation": "sdpaa"}, "`attn_implementation` must be one of .* Did you mean 'sdpa'"),
    ],
)
def test_slips_name_the_nearest(make_recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**changes)


def test_rewards_of_a_wrong_length(make_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"'too_few' returned 11 rewards, but 12"):
        run(make_recipe(), tmp_path, rewards=too_few)


def test_rewards_of_the_recipe(make_recipe):
    values = [{"reward": "WorldReward", "arguments": {"marks": ["edit"]}, "weight": 0.5, "tasks": ["x2i"]}]
    mix = make_recipe(rewards=[*values, {"reward": f"{__name__}:red"}]).reward_mix(GENERATE)
    assert isinstance(mix, RewardMix)
    assert [(one.name, one.weight, one.tasks) for one in mix.components] == [
        ("world_edit", 0.5, ["x2i"]),
        ("red", 1.0, None),
    ]


def test_a_mix_of_one_s_own_is_checked_as_the_recipe_s(make_recipe, tmp_path):
    only_edits = RewardMix([Component(red, tasks=["x2i"])])
    with pytest.raises(ValueError, match="No reward counts for the task 't2i'"):
        run(make_recipe(), tmp_path, rewards=only_edits)
    with pytest.raises(ValueError, match=r"'too_much' returned 1\.5"):
        run(make_recipe(), tmp_path, rewards=[red, RewardMix([too_much])])


class Heavy(SampleReward):
    """Has weights, and a range that its values are not in."""

    name, needs = "heavy", ()

    def load(self):
        self.weights = 2.0

    def scores(self, samples):
        return [self.weights] * len(samples)


def test_rewards_with_weights_are_asked_before_anything_is_drawn(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "draw_answers", lambda *args: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"'heavy' returned 2\.0"):
        run(make_recipe(rewards=[{"reward": f"{__name__}:Heavy"}]), tmp_path)


def test_a_model_without_eyes_cannot_be_trained_on_pictures(make_recipe, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "blind")
    config = json.loads((tmp_path / "blind" / "config.json").read_text())
    (tmp_path / "blind" / "config.json").write_text(json.dumps({**config, "vision_tokenizer_config": None}))
    with pytest.raises(ValueError, match=r"answers to 't2i' have images, and .* has no vision tokenizer"):
        run(make_recipe(model=str(tmp_path / "blind")), tmp_path / "run")


def test_groups_with_equal_rewards_do_not_move_the_model(make_recipe, checkpoint, tmp_path):
    # The mean of 8 such numbers is another one in float32, which less next to no deviation is an advantage of 0.01.
    recipe = make_recipe(steps=1, group_size=8, rollouts_per_step=24, micro_batch=8)
    log = run(recipe, tmp_path, rewards=lambda prompts, completions, **columns: [8.5333] * len(prompts))
    assert log[0]["equal_groups/t2i"] == log[0]["equal_groups/vqa"] == 1
    assert log[0]["grad_norm"] == 0 and "entropy/visual" not in log[0]
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "export"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("changes", [{}, {"updates_per_rollout": 2, "steps": 2}, {"loss_type": "dapo"}])
def test_answers_without_an_advantage_are_not_computed_and_that_changes_nothing(
    make_recipe, tmp_path, monkeypatch, changes
):
    recipe = make_recipe(**{"steps": 1, **changes})
    computed = []
    original = rollout.score_answers

    def spy(model, input_ids, *args, **options):
        computed.append(len(input_ids))
        return original(model, input_ids, *args, **options)

    monkeypatch.setattr(rollout, "score_answers", spy)
    skipped = run(recipe, tmp_path / "skipped", red_images)
    assert skipped[0]["equal_groups/vqa"] == 1 > skipped[0]["equal_groups/t2i"]
    assert skipped[0]["grad_norm"] > 0
    passes = 2 * recipe.steps  # micro-batches of 6 of 12 answers
    assert sum(computed[-passes:]) <= 8 * recipe.steps  # 4 of the 12 answer a vqa prompt
    assert all(computed)

    def everything(self, model, inputs):
        self._token_kinds = inputs["token_kinds"]
        return super(Emu35GRPOTrainer, self)._compute_loss(model, inputs)

    monkeypatch.setattr(Emu35GRPOTrainer, "_compute_loss", everything)
    computed.clear()
    whole = run(recipe, tmp_path / "whole", red_images)
    assert sum(computed[-passes:]) == 12 * recipe.steps
    for mine, theirs in zip(skipped, whole, strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)  # other shapes of matrix products
        assert mine["clip_ratio/region_mean"] == pytest.approx(theirs["clip_ratio/region_mean"])


def test_a_finished_run_makes_no_step_more(make_recipe, tmp_path):
    rows = [{"prompt": f"number {number}", "task": "t2i"} for number in range(9)]  # more than the steps need
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = make_recipe(steps=2, prompts={"path": str(tmp_path / "prompts.jsonl")})
    log = run(recipe, tmp_path / "run")
    before = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert run(recipe, tmp_path / "run") == log
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_trainer_is_trl_s(make_recipe, tmp_path):
    recipe = make_recipe(steps=1)
    model, _ = load_policy(recipe)
    from emu35.processing_emu35 import Emu35Processor

    trainer = Emu35GRPOTrainer(recipe, model, Emu35Processor.from_pretrained(recipe.model), red, tmp_path)
    assert trainer.num_generations == 4
    assert trainer.args.generation_batch_size == 12
    assert trainer.base_model is model
