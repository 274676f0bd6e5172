"""The converter: right results, clear refusals, bounded memory, and nothing half-written."""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from emu35 import (
    Emu35Config,
    Emu35ForConditionalGeneration,
    Emu35GenerationConfig,
    Emu35Processor,
    Emu35TokenLayout,
    Emu35VisionTokenizer,
)
from emu35 import convert_emu35_to_hf as converter
from emu35.convert_emu35_to_hf import convert
from emu35.prompts_emu35 import NO_TASK
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen3ForCausalLM,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
LM_MEDIUM = FIXTURES / "release_lm" / "lm_medium"
LM_TINY = FIXTURES / "release_lm" / "lm_tiny"  # has the released vocabulary
VISION = FIXTURES / "ibq_e16"


def logits_of(model, seed=0):
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


def ids_of(layout):
    values = {name: getattr(layout, name) for name in Emu35TokenLayout.__annotations__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@pytest.fixture
def ours(tiny_model, tiny_processor, tmp_path):
    """One of our checkpoints: model with a vision tokenizer, and processor."""
    tiny_model.generation_config = Emu35GenerationConfig(guidance_scale=2.5)
    tiny_model.save_pretrained(tmp_path / "ours")
    tiny_processor.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def released(tmp_path):
    """A copy of a checkpoint of the release to spoil."""
    return shutil.copytree(LM_MEDIUM, tmp_path / "released")


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_nothing_left(directory, *allowed):
    assert {path.name for path in directory.iterdir()} <= set(allowed)


# ---------------------------------------------------------------------------------------------------------- results


def test_released_checkpoint_with_vision_tokenizer(tmp_path):
    output = convert(LM_TINY, tmp_path / "out", vision_tokenizer=VISION, progress=False)
    assert isinstance(AutoConfig.from_pretrained(output), Emu35Config)
    model = AutoModelForMultimodalLM.from_pretrained(output)
    direct = Emu35ForConditionalGeneration.from_pretrained(LM_TINY, vision_tokenizer=VISION)
    assert isinstance(model, Emu35ForConditionalGeneration)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits_of(model), logits_of(direct))
    for name, tensor in direct.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        assert torch.equal(tensor, model.state_dict()[name])
    assert ids_of(model.config.token_layout) == ids_of(direct.config.token_layout)
    assert model.config.vision_tokenizer_config.codebook_size == 512
    assert model.generation_config.to_dict() == Emu35GenerationConfig.released().to_dict()
    with safe_open(output / "model.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}
        assert stream.get_slice("vision_tokenizer.quant_conv.weight").get_dtype() == "F32"
        assert stream.get_slice("model.layers.0.self_attn.q_norm.weight").get_dtype() == "BF16"


def test_without_vision_tokenizer_and_tokenizer(tmp_path, caplog):
    output = convert(LM_MEDIUM, tmp_path / "out", progress=False)
    assert "encoding and decoding images does not" in caplog.text
    assert "AutoProcessor will find nothing" in caplog.text
    model = AutoModelForMultimodalLM.from_pretrained(output)
    assert model.vision_tokenizer is None
    assert torch.equal(logits_of(model), logits_of(Emu35ForConditionalGeneration.from_pretrained(LM_MEDIUM)))
    assert {path.name for path in output.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Emu35ForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    assert str(LM_MEDIUM) not in json.dumps(config)


@pytest.mark.parametrize("dtype", ["float32", torch.float16])
def test_dtype(ours, tmp_path, dtype):
    output = convert(ours, tmp_path / "out", dtype=dtype, progress=False)
    model = AutoModelForMultimodalLM.from_pretrained(output)
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in model.vision_tokenizer.parameters()} == {torch.float32}


def test_a_type_that_cannot_hold_the_values(released, tmp_path):
    rewrite(released, lambda t: t["model.norm.weight"].fill_(2.0**20))
    with pytest.raises(ValueError, match=r"`dtype`=float16 cannot hold .*model\.norm\.weight.*1\.05e\+06"):
        convert(released, tmp_path / "out", dtype="float16", progress=False)
    assert_nothing_left(tmp_path, "released")


def test_our_checkpoint_in_shards_keeps_everything(ours, tmp_path, tiny_model, tiny_processor):
    output = convert(ours, tmp_path / "out", max_shard_size="40KB", progress=False)
    shards = sorted(output.glob("model-*.safetensors"))
    largest = max(tensor.nbytes for tensor in tiny_model.state_dict().values())
    assert len(shards) > 3
    assert all(shard.stat().st_size < max(largest, 40_000) + 20_000 for shard in shards)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny_model.state_dict().values())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in tiny_model.parameters())
    assert set(index["weight_map"]) == set(tiny_model.state_dict())

    model = AutoModelForMultimodalLM.from_pretrained(output)
    assert all(torch.equal(tensor, tiny_model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.guidance_scale == 2.5
    processor = AutoProcessor.from_pretrained(output)
    assert isinstance(processor, Emu35Processor)
    assert processor.image_processor.factor == tiny_processor.image_processor.factor == 4
    assert torch.equal(processor(text="a red fox")["input_ids"], tiny_processor(text="a red fox")["input_ids"])


@pytest.mark.parametrize("form", ["alone", "whole", "released"])
def test_sources_of_a_vision_tokenizer(make_tiny_model, tiny_model, tiny_layout, tmp_path, form):
    make_tiny_model(vision_tokenizer_config=None).save_pretrained(tmp_path / "text")
    source = {"alone": tmp_path / "vision", "whole": tmp_path / "whole", "released": VISION}[form]
    tiny_model.vision_tokenizer.save_pretrained(tmp_path / "vision")
    tiny_model.save_pretrained(tmp_path / "whole")
    if form == "released":
        with pytest.raises(ValueError, match="512 codes, but the vocabulary has only 48"):
            convert(tmp_path / "text", tmp_path / "out", vision_tokenizer=source, progress=False)
        assert not (tmp_path / "out").exists()
        return
    output = convert(tmp_path / "text", tmp_path / "out", vision_tokenizer=source, progress=False)
    model = AutoModelForMultimodalLM.from_pretrained(output)
    expected = tiny_model.vision_tokenizer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vision_tokenizer.state_dict().items())


def test_another_vision_tokenizer_takes_the_place_of_the_models_own(ours, tmp_path, tiny_model):
    with torch.no_grad():
        tiny_model.vision_tokenizer.quant_conv.weight.fill_(7.0)
    tiny_model.vision_tokenizer.save_pretrained(tmp_path / "vision")
    output = convert(ours, tmp_path / "out", vision_tokenizer=tmp_path / "vision", progress=False)
    model = AutoModelForMultimodalLM.from_pretrained(output)
    assert (model.vision_tokenizer.quant_conv.weight == 7).all()


def test_tokenizer_of_ours_from_a_directory(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = convert(tmp_path / "model", tmp_path / "out", tokenizer=tmp_path / "tokenizer", progress=False)
    processor = AutoProcessor.from_pretrained(output)
    assert ids_of(processor.token_layout) == ids_of(tiny_model.config.token_layout)
    assert processor.image_processor.factor == tiny_model.vision_tokenizer.downsampling_factor
    assert processor.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


released_tokenizer = pytest.mark.skipif(
    "EMU35_TOKENIZER_DIR" not in os.environ, reason="needs EMU35_TOKENIZER_DIR, the directory of emu3.tiktoken"
)


@released_tokenizer
def test_released_tokenizer(tmp_path):
    source = Path(os.environ["EMU35_TOKENIZER_DIR"]) / "emu3.tiktoken"
    output = convert(LM_TINY, tmp_path / "out", VISION, source, progress=False)
    processor = AutoProcessor.from_pretrained(output)
    config = AutoConfig.from_pretrained(output)
    assert len(processor.tokenizer) == config.token_layout.visual_token_offset == 151854
    assert processor.tokenizer.model_max_length == 1024
    ids = processor(text="a red fox", task="t2i")["input_ids"][0].tolist()
    assert ids[0] == config.token_layout.bos_token_id
    assert ids[-1] == config.token_layout.bss_token_id


@released_tokenizer
def test_released_tokenizer_for_a_model_of_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"`tokenizer`: the ids of .* are not those of the model: pad is 151643"):
        convert(LM_MEDIUM, tmp_path / "out", tokenizer=os.environ["EMU35_TOKENIZER_DIR"], progress=False)
    assert_nothing_left(tmp_path)


# ------------------------------------------------------------------------------------------------------- --as qwen3


@pytest.mark.parametrize("source", [LM_MEDIUM, LM_TINY], ids=["medium", "tiny"])
def test_qwen3_logits_agree(tmp_path, source):
    output = convert(source, tmp_path / "out", target="qwen3", progress=False)
    config = json.loads((output / "config.json").read_text())
    released = json.loads((source / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    same = ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_theta", "rope_scaling")
    assert {name: config[name] for name in same} == {name: released[name] for name in same}
    assert not config["attention_bias"]
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
        assert isinstance(model, Qwen3ForCausalLM)
        theirs, ours = logits_of(model), logits_of(Emu35ForConditionalGeneration.from_pretrained(source, dtype=dtype))
        if exact is None:
            exact = theirs
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
        else:  # the order of roundings differs, but not how far they lead astray
            distances = [(logits.float() - exact).pow(2).mean().sqrt() for logits in (ours, theirs)]
            assert distances[0] < 2 * distances[1]
    assert model.generation_config.eos_token_id == released["eos_token_id"]


def test_qwen3_keeps_scaled_positions(released, tmp_path):
    config = json.loads((released / "config.json").read_text())
    config |= {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (released / "config.json").write_text(json.dumps(config))
    output = convert(released, tmp_path / "out", target="qwen3", progress=False)
    written = json.loads((output / "config.json").read_text())
    assert written["rope_theta"] == 5000.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    expected = Emu35ForConditionalGeneration.from_pretrained(released, dtype=torch.float32)
    logits = logits_of(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32))
    torch.testing.assert_close(logits, logits_of(expected), atol=2e-5, rtol=2e-5)


def test_qwen3_from_our_checkpoint(ours, tmp_path, tiny_model, tiny_processor):
    output = convert(ours, tmp_path / "out", target="qwen3", progress=False)
    assert not any(name.startswith("vision_tokenizer.") for name in load_file(output / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model), atol=2e-5, rtol=2e-5)
    assert model.config.token_layout["boi_token_id"] == tiny_model.config.token_layout.boi_token_id

    tokenizer = AutoTokenizer.from_pretrained(output)
    assert json.loads((output / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.eos_token_id == tiny_model.config.token_layout.eos_token_id
    assert not (output / "processor_config.json").exists()
    user = {"role": "user", "content": "a red fox"}
    answer = {"role": "assistant", "content": "here"}
    system = {"role": "system", "content": NO_TASK}
    for messages, task in (
        ([user], "t2i"),
        ([user], "howto"),
        ([user, answer, user], "story"),
        ([system, user], "t2i"),
        ([{"role": "user", "content": [{"type": "text", "text": "a red fox"}]}], "t2i"),
    ):
        ids = tokenizer.apply_chat_template(
            messages, task=task, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == tiny_processor.apply_chat_template(messages, task=task)["input_ids"][0].tolist()
    plain = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert plain == "<|extra_203|>You are a helpful assistant. USER: a red fox ASSISTANT: <|extra_100|>"


def test_qwen3_loads_without_this_package(released, tmp_path):
    """In a process of its own, where nothing of ours was imported."""
    output = convert(released, tmp_path / "out", target="qwen3", progress=False)
    code = (
        "import sys, torch, transformers;"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='float32');"
        "assert not any(n.split('.')[0] == 'emu35' for n in sys.modules);"
        "torch.save(m(torch.arange(6)[None]).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, output, tmp_path / "logits.pt"], check=True, timeout=300)
    model = Emu35ForConditionalGeneration.from_pretrained(released, dtype=torch.float32)
    expected = model(torch.arange(6)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=2e-5, rtol=2e-5)


# ---------------------------------------------------------------------------------------------------------- refusals

SPOILED = {
    "missing": (lambda t: t.pop("lm_head.weight"), r"1 missing: lm_head\.weight \(4096, 64\)"),
    "unknown": (lambda t: t.update(strange=torch.zeros(3)), r"1 unknown: strange \(3,\)"),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(5)}),
        r"1 misshapen: model\.norm\.weight \(5,\) instead of \(64,\)",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        r"model\.norm\.weight is I8, not floating point",
    ),
}


@pytest.mark.parametrize("target", converter.TARGETS)
@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_tensors_are_refused_before_writing(released, tmp_path, kind, target):
    change, message = SPOILED[kind]
    rewrite(released, change)
    with pytest.raises(ValueError, match=message):
        convert(released, tmp_path / "out", target=target, progress=False)
    assert_nothing_left(tmp_path, "released")


def test_spoiled_vision_tokenizers(ours, tmp_path, tiny_model):
    tiny_model.vision_tokenizer.save_pretrained(tmp_path / "vision")
    rewrite(tmp_path / "vision", lambda t: t.pop("quant_conv.bias"))
    with pytest.raises(ValueError, match=r"1 missing: quant_conv\.bias"):
        convert(ours, tmp_path / "out", vision_tokenizer=tmp_path / "vision", progress=False)
    rewrite(ours, lambda t: t.pop("vision_tokenizer.quant_conv.bias"))
    with pytest.raises(ValueError, match=r"1 missing: quant_conv\.bias"):
        convert(ours, tmp_path / "out", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither the release's config\.yaml"):
        convert(ours, tmp_path / "out", vision_tokenizer=tmp_path / "empty", progress=False)
    with pytest.raises(FileNotFoundError, match=r"`vision_tokenizer`: there is no folder"):
        convert(ours, tmp_path / "out", vision_tokenizer=tmp_path / "nowhere", progress=False)
    text_only = convert(LM_MEDIUM, tmp_path / "text", progress=False)
    with pytest.raises(ValueError, match="has none"):
        convert(ours, tmp_path / "out", vision_tokenizer=text_only, progress=False)
    assert_nothing_left(tmp_path, "ours", "vision", "empty", "text")


class Touch:
    """Unpickling one of these makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_malicious_pickles_run_nothing(released, tmp_path):
    vision = tmp_path / "vision"
    vision.mkdir()
    shutil.copy(VISION / "config.yaml", vision)
    torch.save({"state_dict": Touch(tmp_path / "proof")}, vision / "model.ckpt")
    with pytest.raises(ValueError, match="nothing in it was run"):
        convert(LM_TINY, tmp_path / "out", vision_tokenizer=vision, progress=False)
    (released / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(tmp_path / "proof")}, released / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*run any code.*save_file"):
        convert(released, tmp_path / "out", progress=False)
    assert_nothing_left(tmp_path, "vision", "released")


def test_quantised_checkpoints_are_refused(released, tmp_path):
    config = json.loads((released / "config.json").read_text())
    config = Emu35Config.from_pretrained(released).to_dict() | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    (released / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised"):
        convert(released, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": "nowhere"}, FileNotFoundError, "there is no folder nowhere"),
        ({"target": "llama"}, ValueError, "must be one of emu35, qwen3; got 'llama'"),
        ({"target": "qwen3", "vision_tokenizer": VISION}, ValueError, "`vision_tokenizer` has no place"),
        ({"dtype": "int8"}, ValueError, "`dtype` must be one of bfloat16, float16, float32"),
        ({"max_shard_size": "5 apples"}, ValueError, "`max_shard_size` must be"),
        ({"max_shard_size": 0}, ValueError, "`max_shard_size` must be"),
        ({"tokenizer": "nowhere"}, FileNotFoundError, "`tokenizer`: there is no nowhere"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        convert(**{"model": LM_MEDIUM, "output": tmp_path / "out", "progress": False, **arguments})
    assert_nothing_left(tmp_path)


def test_configuration_is_missing_or_of_another_model(released, tmp_path):
    (released / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a `llama` model"):
        convert(released, tmp_path / "out", progress=False)
    (released / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(released, tmp_path / "out", progress=False)


# ------------------------------------------------------------------------------------------ nothing is half-written


def test_output_that_exists_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("text")
    with pytest.raises(FileExistsError, match=r"`output`=.*exists and is not empty"):
        convert(LM_MEDIUM, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "precious").read_text() == "text"
    with pytest.raises(NotADirectoryError, match=r"`output`=.*must be a folder"):
        convert(LM_MEDIUM, tmp_path / "out" / "precious", progress=False)
    (tmp_path / "empty").mkdir()
    assert convert(LM_MEDIUM, tmp_path / "empty", progress=False) == tmp_path / "empty"
    assert_nothing_left(tmp_path, "out", "empty")


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SafetensorError("No space left on device")])
def test_interrupted_in_the_middle(ours, tmp_path, monkeypatch, raised):
    calls = []

    def save(tensors, filename, metadata=None):
        calls.append(filename)
        save_file(tensors, filename, metadata=metadata)
        if len(calls) == 3:
            raise raised

    monkeypatch.setattr(converter, "save_file", save)
    expected = KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else OSError
    with pytest.raises(expected):
        convert(ours, tmp_path / "out", max_shard_size="40KB", progress=False)
    assert_nothing_left(tmp_path, "ours")


def test_disk_full(ours, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(converter.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(OSError, match=r"needs 0\.0 GB, but only 0\.0 GB are free"):
            convert(ours, tmp_path / "out", progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may grow beyond this
    try:
        with pytest.raises(OSError, match=r"could not write model\.safetensors.*too large.*Nothing was left behind"):
            convert(ours, tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_nothing_left(tmp_path, "ours")


def peak_memory(function):
    """Bytes by which resident memory rises above what it is before."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        clear.write_text("5")  # sets the peak back to the present
    except OSError:
        pytest.skip("this system does not let a process reset its peak memory")

    def field(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) * 1024

    before = field("VmRSS")
    function()
    return field("VmHWM") - before


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_memory_is_bounded_by_a_shard(make_tiny_model, tmp_path, dtype):
    model = make_tiny_model(
        vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vision_tokenizer_config=None
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    total = sum(parameter.nbytes for parameter in model.parameters())
    del model
    shard = 10_000_000
    assert total > 8 * shard

    def run():
        convert(tmp_path / "model", tmp_path / "out", dtype=dtype, max_shard_size=shard, progress=False)

    peak = peak_memory(run)
    # One shard, one tensor in the making (at most 4 MB, and its copy), and what Python itself takes.
    assert peak < 2.5 * shard, f"{peak / 1e6:.0f} MB for shards of {shard / 1e6:.0f} MB of {total / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------ command line


def test_arguments_reach_the_converter(ours, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    converter.add_arguments(parser)
    output = tmp_path / "out"
    command = ["--model", str(ours), "--output", str(output), "--as", "qwen3", "--dtype", "bfloat16"]
    converter.main(parser.parse_args([*command, "--max-shard-size", "30KB"]))
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert "converting" in capsys.readouterr().err  # the progress bar


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        converter._command_line(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert error.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is no folder")


def test_stopped_process_leaves_nothing(make_tiny_model, tmp_path):
    model = make_tiny_model(vocab_size=4096, hidden_size=256, num_hidden_layers=12, vision_tokenizer_config=None)
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "emu35.convert_emu35_to_hf", "--model", "model", "--output", "out"]
    process = subprocess.Popen([*command, "--max-shard-size", "10KB"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".out.*/model-00010-*")):
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    process.terminate()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    assert "interrupted; out was not made" in errors
    assert_nothing_left(tmp_path, "model")


def test_vision_tokenizer_alone_from_a_converted_checkpoint(tmp_path):
    output = convert(LM_TINY, tmp_path / "out", vision_tokenizer=VISION, progress=False)
    alone, direct = (Emu35VisionTokenizer.from_pretrained(directory) for directory in (output, VISION))
    assert all(torch.equal(tensor, direct.state_dict()[name]) for name, tensor in alone.state_dict().items())
