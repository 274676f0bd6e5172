"""Fine-tuning runs on a random model: what they learn and leave, and that interrupted ones end as others do."""

import json
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
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from emu35 import TINY, Emu35ForConditionalGeneration, Emu35GenerationConfig, cli
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.pipelines import Emu35Pipeline
from emu35.training.checkpointing import read_log
from emu35.training.data import prepare
from emu35.training.lora import add_adapter, save_adapter
from emu35.training.recipe import recipe_from_dict
from emu35.training.sft import last_checkpoint, load_model, merge_adapter, push
from emu35.training.sft_recipe import SFTLoRARecipe
from emu35.training.sft_trainer import SFTTrainer, open_source, training_arguments
from emu35.training.train import train
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

pytest.importorskip("datasets")
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_tiny_model, tiny_processor):
    """A checkpoint, and two sources of data, of which one is prepared."""
    folder = tmp_path_factory.mktemp("base")
    dropouts = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0}
    model = make_tiny_model(hidden_size=64, **dropouts)  # nf4 has blocks of 64
    model.generation_config = Emu35GenerationConfig(height=16, width=16, max_new_tokens=60)
    model.save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    for name, number in (("pictures", 12), ("answers", 8)):
        rows = []
        (folder / name).mkdir()
        for index in range(number):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
            text = "a red fox" if index % 2 else "a blue square"
            row = {"text": text} if name == "pictures" else {"question": "what is it?", "answer": text}
            rows.append({"file_name": f"{index}.png", **row})
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "pictures", folder / "prepared", model.vision_tokenizer, tiny_processor, progress=False)
    return folder


@pytest.fixture(scope="module")
def run(base):
    def call(folder, resume=True, **changes):
        values = {
            "method": "sft",
            "model": str(base / "model"),
            "output_dir": str(folder),
            "steps": STEPS,
            "data": [{"path": str(base / "prepared")}, {"path": str(base / "answers"), "weight": 0.5}],
            "eval_data": [{"path": str(base / "prepared")}, {"path": str(base / "answers")}],
            "row_length": 160,
            "batch_rows": 4,
            "rows": 2,
            "unconditional_share": 0.2,
            "lora": {"rank": 4, "dropout": 0.2},
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
            "bf16": False,
            "dtype": "float32",
            "log_every": 1,
            "save_every": 2,
            "eval_every": STEPS,
            **changes,
        }
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        return train(folder / "recipe.yaml", resume=resume, progress=False)

    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return folder, run(folder, samples=["a red fox"])


def losses(folder):
    records = read_log(folder / "sft" / "losses.jsonl")
    return [(one["step"], one["loss"]) for one in records if "loss" in one]


def evaluations(folder):
    return [one for one in read_log(folder / "sft" / "losses.jsonl") if "eval_loss" in one]


def test_a_run_learns_and_says_so_by_modality_source_and_task(finished):
    folder, _ = finished
    first, last = evaluations(folder)
    assert last["eval_loss"] < first["eval_loss"]
    names = ("prepared", "answers", "task_t2i", "task_vqa")
    named = {f"eval_{name}_{modality}_loss" for name in names for modality in ("text", "visual")}
    assert named - set(first) == {"eval_answers_visual_loss", "eval_task_vqa_visual_loss"}  # its images are the user's
    assert first["eval_task_t2i_visual_loss"] == first["eval_prepared_visual_loss"] == first["eval_visual_loss"]
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    assert len(list((folder / "sft" / "samples").glob("*.png"))) == 2


def test_a_finished_adapter_may_have_a_smaller_alpha(finished, tmp_path):
    model = Emu35ForConditionalGeneration.from_pretrained(TINY)
    lora = SFTLoRARecipe(rank=4, alpha=8.0, export_alpha=6.0)
    adapted = add_adapter(model, lora)
    save_adapter(adapted, lora, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 6
    assert adapted.peft_config["default"].lora_alpha == 8
    assert json.loads((finished[1] / "adapter_config.json").read_text())["lora_alpha"] == 32


def test_tensorboard_has_the_losses_and_the_samples(finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (finished[0] / "sft").glob("runs/*")
    events = EventAccumulator(str(log)).Reload()
    assert [event.step for event in events.Images("a red fox")] == [0, STEPS]
    assert [event.step for event in events.Scalars("eval/task_t2i_visual_loss")] == [0, STEPS]


def test_an_adapter_comes_with_a_card(finished):
    _, exported = finished
    card = (exported / "README.md").read_text()
    assert "LoRA adapter" in card and "| `eval_loss` |" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft" and head["tags"] == ["emu35", "lora"]
    assert "base_model" not in head  # a folder: the Hub would refuse the card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe_from_dict(recipe).lora.rank == 4


@torch.no_grad()
def test_adapters_load_in_model_and_pipeline_and_merge(finished, base, tmp_path, monkeypatch):
    _, exported = finished
    ids = torch.arange(20, 60)[None]
    plain = Emu35ForConditionalGeneration.from_pretrained(base / "model").eval()
    wanted = (
        PeftModel.from_pretrained(Emu35ForConditionalGeneration.from_pretrained(base / "model"), str(exported))
        .eval()(input_ids=ids)
        .logits
    )
    assert (wanted - plain(input_ids=ids).logits).abs().max() > 0.01
    plain.load_adapter(str(exported))
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted)
    pipe = Emu35Pipeline.from_pretrained(base / "model")
    pipe.load_lora_weights(exported)
    torch.testing.assert_close(pipe.model(input_ids=ids).logits, wanted)
    monkeypatch.setattr("emu35.TINY", base / "model")
    for name in (None, "tiny"):
        merge_adapter(exported, tmp_path / "merged", name)
        merged = Emu35ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_the_command_line_uses_an_adapter(finished, base, tmp_path, monkeypatch):
    """`emu35 eval --lora` once measured the model without it."""
    _, exported = finished
    loaded = []
    monkeypatch.setattr(cli, "_describe", lambda args: loaded.append(cli._load(args)[0]))
    for adapter in ([], ["--lora", str(exported)]):
        assert not cli.main(["describe", "a.png", "--model", str(base / "model"), "--device", "cpu", *adapter])
    ids = torch.arange(20, 60)[None]
    plain, adapted = (model.eval()(input_ids=ids).logits for model in loaded)
    assert (adapted - plain).abs().max() > 0.01
    assert cli.main(["describe", "a.png", "--model", str(base / "model"), "--lora", str(tmp_path)])


def test_an_export_is_pushed_whole(finished, monkeypatch):
    from huggingface_hub import HfApi

    _, exported = finished
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options))
    push(exported, "someone/emu35-lora")
    assert calls[0] == ("someone/emu35-lora", {"private": True, "exist_ok": True})
    assert calls[1] == {"repo_id": "someone/emu35-lora", "folder_path": str(exported)}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {
        one.name for one in exported.iterdir()
    }


def test_a_killed_run_goes_on_to_the_same_end(finished, run, tmp_path):
    """As after `kill -9` while the last checkpoint was written: it is there, but not whole."""
    folder, _ = finished
    shutil.copytree(folder / "sft", tmp_path / "sft")
    (tmp_path / "sft" / f"checkpoint-{STEPS}" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path / "sft").name == "checkpoint-2"
    exported = run(tmp_path, samples=["a red fox"])
    assert losses(tmp_path) == losses(folder)
    again, before = (load_file(path / "adapter_model.safetensors") for path in (exported, folder / "export"))
    assert all(torch.equal(again[name], before[name]) for name in before) and again.keys() == before.keys()


@pytest.mark.parametrize("lora", [{"rank": 4, "dropout": 0.2}, None])
def test_a_finished_run_makes_no_step_more(run, tmp_path, lora):
    exported = run(tmp_path, lora=lora)
    file = exported / ("model.safetensors" if lora is None else "adapter_model.safetensors")
    before, steps = load_file(file), losses(tmp_path)
    shutil.rmtree(exported)  # as if it had been killed between the last checkpoint and the export
    run(tmp_path, lora=lora)
    after = load_file(file)
    assert losses(tmp_path) == steps
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {path.name for path in (tmp_path / "sft").glob("checkpoint-*")} == {"checkpoint-2", f"checkpoint-{STEPS}"}


def test_a_checkpoint_of_a_full_run_loads_and_draws(run, base, tmp_path):
    run(tmp_path, lora=None)
    checkpoint = tmp_path / "sft" / "checkpoint-2"
    assert Emu35ForConditionalGeneration.from_pretrained(checkpoint).vision_tokenizer is None
    eyes = Emu35VisionTokenizer.from_pretrained(base / "model")
    model = Emu35ForConditionalGeneration.from_pretrained(checkpoint, vision_tokenizer=eyes)
    exported = Emu35ForConditionalGeneration.from_pretrained(tmp_path / "export")
    for name, tensor in exported.vision_tokenizer.state_dict().items():
        assert torch.equal(model.vision_tokenizer.state_dict()[name], tensor)


def test_what_accelerate_was_told_must_go_with_the_recipe(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"mixed precision bf16, and the recipe says `bf16: false`.*_precision no"):
        run(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"`lora\.quantization`='nf4' cannot be sharded with fsdp2"):
        run(tmp_path, lora={"rank": 4, "quantization": "nf4"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes cannot start anew together"):
        run(tmp_path, resume=False)


def test_what_would_end_a_run_late_ends_it_early(run, base, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, name, **options):
        raise OSError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="`push_to_hub`: 'me/mine' cannot be written: no token"):
        run(tmp_path, push_to_hub="me/mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"`export_dir`=.* must be a folder"):
        run(tmp_path, export_dir=str(tmp_path / "file"))
    shutil.copytree(base / "model", tmp_path / "blind")
    config = json.loads((tmp_path / "blind" / "config.json").read_text())
    (tmp_path / "blind" / "config.json").write_text(json.dumps({**config, "vision_tokenizer_config": None}))
    with pytest.raises(ValueError, match=r"`samples`: .* has no vision tokenizer to draw them with"):
        run(tmp_path, model=str(tmp_path / "blind"), samples=["a red fox"])
    assert not list((tmp_path / "sft").glob("checkpoint-*"))


def test_a_folder_belongs_to_one_recipe(finished, run):
    folder, _ = finished
    with pytest.raises(ValueError, match="run of another recipe: `row_length` was 160, now 150"):
        run(folder, row_length=150)


def test_the_batch_may_come_in_any_number_of_passes(run, tmp_path):
    """Gradients of a step are those of all its tokens, whatever pass they came in."""
    for rows in (1, 2):
        run(tmp_path / str(rows), rows=rows, lora={"rank": 4}, steps=2, eval_data=[])
    for (_, one), (_, other) in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_all_weights(run, base, tmp_path):
    exported = run(tmp_path, lora=None, gradient_checkpointing=True, optimizer={"learning_rate": 0.001})
    first, last = evaluations(tmp_path)
    assert last["eval_loss"] < first["eval_loss"]
    model = Emu35ForConditionalGeneration.from_pretrained(exported)
    before = Emu35ForConditionalGeneration.from_pretrained(base / "model")
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert "lm_head.weight" in changed and not any(name.startswith("vision_tokenizer") for name in changed)
    assert "LoRA" not in (exported / "README.md").read_text()


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_qlora(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    exported = run(tmp_path, lora={"rank": 4, "quantization": "nf4"})
    first, last = evaluations(tmp_path)
    assert last["eval_loss"] < first["eval_loss"] and "QLoRA" in (exported / "README.md").read_text()


def test_the_loss_is_divided_by_weights_of_tokens(base, tiny_processor, tmp_path):
    values = {"method": "sft", "output_dir": "", "steps": 1, "row_length": 160, "batch_rows": 4, "rows": 2}
    values |= {"model": str(base / "model"), "data": [{"path": str(base / "prepared")}], "bf16": False}
    recipe = recipe_from_dict({**values, "visual_loss_weight": 0.25})
    model = load_model(recipe)
    model.vision_tokenizer = None
    sources = [open_source(source, tiny_processor, None, recipe.row_length) for source in recipe.data]
    arguments = training_arguments(recipe, tmp_path, progress=False)
    trainer = SFTTrainer(recipe, arguments, model, None, tiny_processor, sources, [])
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    total = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    with torch.no_grad():
        losses = [trainer.compute_loss(model, batch, num_items_in_batch=total) for batch in batches]
        length = max(batch["labels"].shape[1] for batch in batches)
        whole = {
            name: torch.cat([F.pad(batch[name], (0, length - batch[name].shape[1]), value=value) for batch in batches])
            for name, value in (("input_ids", 0), ("labels", -100), ("position_ids", 0))
        }
        wanted = model(**whole, use_cache=False).loss
    assert float(sum(losses)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_length": 40}, r"longest example of .*prepared has \d+ tokens, more than `row_length`=40"),
        ({"row_length": 1000}, "`row_length`=1000 is more than the model's context, 512"),
        ({"data": [{"path": "./nowhere"}]}, "no file or folder"),
        (
            {"batch_rows": 3, "rows": 3, "data": [{"path": "bad"}]},
            r"none of the first rows of .*bad is good. row 0: the row has no",
        ),
        ({"eval_data": [{"path": "./nowhere"}]}, "no file or folder"),
    ],
)
def test_bad_data_is_told_before_training(run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Emu35ForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.jsonl").write_text('{"text": "a fox"}\n')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "run", **changes)


@pytest.mark.slow
def test_a_run_goes_on_after_kill_9(run, tmp_path):
    folder = tmp_path / "whole"
    run(folder, steps=8)
    values = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output_dir": str(tmp_path / "killed")}
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "emu35.cli", "train", str(tmp_path / "killed.yaml"), "--debug"]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 600
        while last_checkpoint(tmp_path / "killed" / "sft") is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, timeout=600)
    assert losses(tmp_path / "killed") == losses(folder)
    assert evaluations(tmp_path / "killed")[-1] == evaluations(folder)[-1]


@pytest.mark.slow
def test_two_processes_do_what_one_does(run, tmp_path):
    folder = tmp_path / "one"
    run(folder, lora={"rank": 4})
    values = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"rows": 1, "output_dir": str(tmp_path / "two")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, "-m", "emu35.cli", "train", str(tmp_path / "two.yaml"), "--debug"]
    subprocess.run(command, check=True, timeout=900)
    for (_, one), (_, other) in zip(losses(folder), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    first, other = evaluations(folder)[-1], evaluations(tmp_path / "two")[-1]
    assert first["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-3)


#: `emu35 train` with FSDP on a CPU, where accelerate does not shard of its own accord; loss in several chunks.
SHARDED = """\
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from emu35 import modeling_emu35
from emu35.cli import main

plain = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = init
modeling_emu35.LOSS_CHUNK_BYTES = 4 * 400 * 16
main(["train", sys.argv[1], "--debug"])
"""


@pytest.mark.slow
def test_weights_sharded_by_fsdp2_learn_and_are_saved_as_whole_ones(run, tmp_path):
    """With the configuration that is shipped."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    exported = run(whole, lora=None, gradient_checkpointing=True)
    values = yaml.safe_load((whole / "recipe.yaml").read_text()) | {"rows": 1, "output_dir": str(sharded)}
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "sharded.py").write_text(SHARDED)
    config = Path(__file__).parents[2] / "training" / "recipes" / "accelerate" / "fsdp2.yaml"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "unused"]))
    env = {**prepare_multi_gpu_env(args), "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "sharded.py"), str(tmp_path / "sharded.yaml")]
    subprocess.run(command, check=True, timeout=900, env=env)
    assert_same_training(whole, sharded, exported)


#: `emu35 train` with DeepSpeed on a CPU, which transformers has for other devices only; loss in several chunks.
SHARDED_BY_DEEPSPEED = """\
import sys

from emu35 import modeling_emu35
from emu35.cli import main
from emu35.training import sft_trainer

plain = sft_trainer.TrainingArguments
sft_trainer.TrainingArguments = lambda **values: plain(**{**values, "use_cpu": False, "ddp_backend": "gloo"})
modeling_emu35.LOSS_CHUNK_BYTES = 4 * 400 * 16
is_zero3, seen = modeling_emu35.is_deepspeed_zero3_enabled, []
modeling_emu35.is_deepspeed_zero3_enabled = lambda: seen.append(is_zero3()) or seen[-1]
main(["train", sys.argv[1], "--debug"])
if not seen or not all(seen):
    sys.exit("weights were not sharded")
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed, and a compiler: it builds its optimiser")
def test_weights_sharded_by_zero3_learn_and_are_saved_as_whole_ones(run, tmp_path):
    """With the configuration that is shipped."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    exported = run(whole, lora=None, gradient_checkpointing=True)
    values = yaml.safe_load((whole / "recipe.yaml").read_text()) | {"rows": 1, "output_dir": str(sharded)}
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "sharded.py").write_text(SHARDED_BY_DEEPSPEED)
    config = Path(__file__).parents[2] / "training" / "recipes" / "accelerate" / "deepspeed.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", "--mixed_precision", "no"]
    command += [str(tmp_path / "sharded.py"), str(tmp_path / "sharded.yaml")]
    subprocess.run(command, check=True, timeout=900, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert_same_training(whole, sharded, exported)


def assert_same_training(folder, other_folder, exported):
    for (_, one), (_, other) in zip(losses(folder), losses(other_folder), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert evaluations(folder)[-1]["eval_loss"] == pytest.approx(evaluations(other_folder)[-1]["eval_loss"], rel=1e-3)
    models = [Emu35ForConditionalGeneration.from_pretrained(path) for path in (exported, other_folder / "export")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)
