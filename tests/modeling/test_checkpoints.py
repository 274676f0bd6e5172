"""Loading and saving: strict, from safetensors only, all or nothing."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from emu35 import (
    Emu35Config,
    Emu35ForConditionalGeneration,
    Emu35GenerationConfig,
    Emu35Model,
    Emu35VisionTokenizer,
)
from emu35.checkpoint_emu35 import SafetensorsFolder, expected_tensors
from emu35.saving_emu35 import atomic_directory
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, BitsAndBytesConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASED = FIXTURES / "release_lm" / "lm_medium"
RELEASED_VOCABULARY = FIXTURES / "release_lm" / "lm_tiny"
RELEASED_VISION = FIXTURES / "ibq_e16"
#: sha256 of `json.dumps(sorted(names and shapes))`, of tables that the release's own code gave.
LM_34B_SHA256 = "9bc9a9b98a6c268c3c06a7a5441efd72154596e1ae91256a2b047f0cd3e3923b"
IBQ_455M_SHA256 = "f08d241ccc7f5eccfea102fceccc19a873b6fff62d9bb9790f4a28c2492cb76c"


def logits_of(model, seed=0):
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


def rewrite(directory, change):
    """Applies `change` to the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def files_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A saved tiny model with a vision tokenizer."""
    tiny_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def released(tmp_path):
    """A copy of a checkpoint of the release to spoil."""
    return shutil.copytree(RELEASED, tmp_path / "released")


# ---------------------------------------------------------------------------------------------- the real configuration


def sha256_of(shapes):
    return hashlib.sha256(
        json.dumps(sorted((name, list(shape)) for name, shape in shapes.items())).encode()
    ).hexdigest()


def test_default_configuration_is_the_released_model():
    shapes = expected_tensors(Emu35ForConditionalGeneration, Emu35Config())
    vision = {name: shapes.pop(name) for name in list(shapes) if name.startswith("vision_tokenizer.")}
    assert len(shapes) == 707
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 34_103_460_864
    assert sha256_of(shapes) == LM_34B_SHA256
    assert len(vision) == 543
    assert sum(torch.Size(shape).numel() for shape in vision.values()) == 455_336_963
    assert sha256_of({name.removeprefix("vision_tokenizer."): vision[name] for name in vision}) == IBQ_455M_SHA256


@pytest.mark.parametrize(
    "change, message",
    [
        ({"visual_token_offset": 2**40}, "do not fit into `vocab_size`"),
        ({"num_visual_tokens": 40}, "`codebook_size`=48 is larger than `num_visual_tokens`=40"),
        ({"boi_token_id": 300, "eoi_token_id": 300}, "must be distinct.*`eoi_token_id` and `boi_token_id`"),
        ({"eol_token_id": 2**40}, "`eol_token_id`=.* does not fit"),
        ({"digit_token_ids": [1] * 10}, "ten distinct ids"),
    ],
)
def test_fields_of_the_configuration_must_agree(make_tiny_config, change, message):
    vocab_size = make_tiny_config().text_config.vocab_size
    with pytest.raises(StrictDataclassError, match=message):
        make_tiny_config(token_layout=change, vocab_size=vocab_size)


def test_special_ids_lie_outside_the_visual_range(make_tiny_config, tiny_layout):
    with pytest.raises(StrictDataclassError, match=r"`boi_token_id`=.* lies inside the visual range"):
        make_tiny_config(token_layout={"boi_token_id": tiny_layout.visual_token_offset})


# ------------------------------------------------------------------------------------------------ released checkpoints


def test_released_checkpoint_loads_directly():
    model = Emu35ForConditionalGeneration.from_pretrained(RELEASED)
    assert model.dtype == torch.bfloat16
    assert model.vision_tokenizer is None
    assert model.generation_config.to_dict() == Emu35GenerationConfig.released().to_dict()
    stored = load_file(RELEASED / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_images_need_a_vision_tokenizer():
    model = Emu35ForConditionalGeneration.from_pretrained(RELEASED_VOCABULARY)
    with pytest.raises(ValueError, match=r"no vision tokenizer.*vision_tokenizer=DIRECTORY"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no vision tokenizer"):
        model.decode_image([torch.zeros(2, 2, dtype=torch.long)])
    model.attach_vision_tokenizer(RELEASED_VISION)
    assert model.encode_image(torch.zeros(1, 3, 32, 48))[0].shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_released_vision_tokenizer_is_added_in_float32(dtype):
    alone = Emu35VisionTokenizer.from_pretrained(RELEASED_VISION)
    model = Emu35ForConditionalGeneration.from_pretrained(
        RELEASED_VOCABULARY, vision_tokenizer=RELEASED_VISION, dtype=dtype
    )
    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.vision_tokenizer.parameters()} == {torch.float32}
    assert not model.vision_tokenizer.training
    assert model.config.vision_tokenizer_config.codebook_size == 512
    pixels = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(model.encode_image(pixels)[0], alone.encode(pixels)[0])


def test_a_codebook_that_does_not_fit_is_refused(tiny_model):
    with pytest.raises(ValueError, match="512 codes, but the vocabulary has only 48 visual tokens"):
        tiny_model.attach_vision_tokenizer(RELEASED_VISION)
    with pytest.raises(ValueError, match="512 codes, but the vocabulary has only 0"):
        Emu35ForConditionalGeneration.from_pretrained(RELEASED, vision_tokenizer=RELEASED_VISION)


def test_generation_settings_that_are_given_win():
    model = Emu35ForConditionalGeneration.from_pretrained(
        RELEASED, generation_config=Emu35GenerationConfig(guidance_scale=7.0)
    )
    assert model.generation_config.guidance_scale == 7.0


# ----------------------------------------------------------------------------------------------------- Auto classes


def test_auto_classes(saved, tiny_model):
    assert isinstance(AutoConfig.from_pretrained(saved), Emu35Config)
    model = AutoModelForMultimodalLM.from_pretrained(saved)
    assert isinstance(model, Emu35ForConditionalGeneration)
    assert torch.equal(logits_of(model), logits_of(tiny_model))
    assert isinstance(model.generation_config, Emu35GenerationConfig)
    decoder = AutoModel.from_pretrained(saved)
    assert isinstance(decoder, Emu35Model)
    assert torch.equal(decoder.embed_tokens.weight, tiny_model.model.embed_tokens.weight)


def test_the_decoder_alone(saved, tmp_path):
    decoder = Emu35Model.from_pretrained(saved)
    decoder.save_pretrained(tmp_path / "decoder")
    again = Emu35Model.from_pretrained(tmp_path / "decoder")
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        Emu35ForConditionalGeneration.from_pretrained(tmp_path / "decoder")


def test_the_vision_tokenizer_of_a_whole_checkpoint(saved, tiny_model):
    alone = Emu35VisionTokenizer.from_pretrained(saved)
    expected = tiny_model.vision_tokenizer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_in_half_precision_keeps_the_vision_tokenizer(saved, tmp_path, tiny_model, dtype):
    model = Emu35ForConditionalGeneration.from_pretrained(saved, dtype=dtype)
    assert model.dtype == model.lm_head.weight.dtype == dtype
    model.save_pretrained(tmp_path / "half")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert torch.equal(logits_of(again), logits_of(model))
    for name, tensor in again.vision_tokenizer.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tiny_model.vision_tokenizer.state_dict()[name])


@pytest.mark.parametrize("offloaded", ["vision_tokenizer", "model"])
def test_offloaded_parts_compute_the_same(saved, tmp_path, offloaded):
    device_map = {"model": "cpu", "lm_head": "cpu", "vision_tokenizer": "cpu", offloaded: "disk"}
    plain = Emu35ForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    model = Emu35ForConditionalGeneration.from_pretrained(
        saved, dtype=torch.bfloat16, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert next(getattr(model, offloaded).parameters()).device.type == "meta"
    assert torch.equal(logits_of(model), logits_of(plain))
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = plain.encode_image(pixels)
    assert torch.equal(model.encode_image(pixels)[0], codes[0])
    assert torch.equal(model.decode_image(codes)[0], plain.decode_image(codes)[0])
    # Another vision tokenizer goes to where the model computes, not to the meta device.
    model.attach_vision_tokenizer(saved)
    assert torch.equal(model.encode_image(pixels)[0], codes[0])


def test_device_map_auto(saved, tiny_model):
    model = AutoModelForMultimodalLM.from_pretrained(saved, dtype="auto", device_map="auto")
    assert torch.allclose(logits_of(model).cpu(), logits_of(tiny_model), atol=1e-4)


# ------------------------------------------------------------------------------------------ checkpoints that are wrong

SPOILED = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"1 missing: model\.norm\.weight"),
    "unknown": (lambda t: t.update(strange=torch.zeros(3)), r"1 unknown: strange \(3,\)"),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(5)}),
        r"1 misshapen: model\.norm\.weight \(5,\) instead of \(64,\)",
    ),
}


WHOLE, DECODER = (Emu35ForConditionalGeneration, AutoModelForMultimodalLM), (Emu35Model, AutoModel)


@pytest.mark.parametrize(
    "load, kind",
    # The decoder takes its part of a checkpoint and leaves the rest.
    [(load, kind) for kind in SPOILED for load in (WHOLE if kind == "unknown" else WHOLE + DECODER)],
)
def test_spoiled_checkpoints_are_refused(saved, load, kind):
    change, message = SPOILED[kind]
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message.replace("64", "32")):
        load.from_pretrained(saved)


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_released_checkpoints_are_refused(released, kind):
    change, message = SPOILED[kind]
    rewrite(released, change)
    with pytest.raises(ValueError, match=message):
        Emu35ForConditionalGeneration.from_pretrained(released)


def test_a_spoiled_vision_tokenizer_is_refused(tiny_model, tmp_path):
    tiny_model.vision_tokenizer.save_pretrained(tmp_path)
    assert Emu35VisionTokenizer.from_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("quant_conv.weight"))
    with pytest.raises(ValueError, match=r"1 missing: quant_conv\.weight"):
        Emu35VisionTokenizer.from_pretrained(tmp_path)


def test_what_is_only_found_while_loading_is_refused(saved):
    """A state dict has no files whose headers could be looked at first."""
    tensors = load_file(saved / "model.safetensors")
    config = Emu35Config.from_pretrained(saved)
    assert Emu35ForConditionalGeneration.from_pretrained(None, config=config, state_dict=dict(tensors))
    for change, message in SPOILED.values():
        spoiled = dict(tensors)
        change(spoiled)
        with pytest.raises(ValueError, match=message.split(r" \(")[0].replace("1 misshapen: ", "1 misshapen: .*")):
            Emu35ForConditionalGeneration.from_pretrained(None, config=config, state_dict=spoiled)


def test_misshapen_tensors_may_be_asked_for(saved):
    rewrite(saved, SPOILED["misshapen"][0])
    model, info = Emu35ForConditionalGeneration.from_pretrained(
        saved, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(model.model.norm.weight) == 32
    assert len(info["mismatched_keys"]) == 1


def test_truncated_file(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a complete safetensors file.*download it again"):
        Emu35ForConditionalGeneration.from_pretrained(saved)


def test_missing_shard(saved, tiny_model):
    tiny_model.save_pretrained(saved, max_shard_size="50KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of {len(shards)} shards: {shards[1].name}"):
        Emu35ForConditionalGeneration.from_pretrained(saved)


@pytest.mark.parametrize(
    "index, message", [("{", "damaged"), ("{}", "damaged"), ('{"weight_map": {"a": "../b"}}', "outside its folder")]
)
def test_damaged_index(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(tmp_path)


def test_folders_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        SafetensorsFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither"):
        SafetensorsFolder(tmp_path)


class Touch:
    """Unpickling one of these makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kwargs", [{}, {"use_safetensors": False}, {"use_safetensors": None}])
def test_pickles_are_not_opened(released, tmp_path, kwargs):
    (released / "model.safetensors").unlink()
    (released / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "proof")))
    with pytest.raises(ValueError, match=r"run any code.*safetensors"):
        Emu35ForConditionalGeneration.from_pretrained(released, **kwargs)
    assert not (tmp_path / "proof").exists()


def test_malicious_vision_tokenizer_runs_nothing(tmp_path):
    directory = tmp_path / "vision"
    directory.mkdir()
    shutil.copy(RELEASED_VISION / "config.yaml", directory)
    torch.save({"state_dict": Touch(tmp_path / "proof")}, directory / "model.ckpt")
    with pytest.raises(ValueError, match="nothing in it was run"):
        Emu35ForConditionalGeneration.from_pretrained(RELEASED_VOCABULARY, vision_tokenizer=directory)
    assert not (tmp_path / "proof").exists()


# ------------------------------------------------------------------------------------------------------ quantisation

QUANTISED = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture
def quantisable(make_tiny_model, tmp_path):
    """bitsandbytes wants widths that are multiples of 64 on a CPU."""
    pytest.importorskip("bitsandbytes")
    model = make_tiny_model(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    model.vision_tokenizer.float()
    model.save_pretrained(tmp_path / "quantisable")
    return tmp_path / "quantisable"


@pytest.mark.parametrize("bits", QUANTISED)
def test_quantised_loading(quantisable, tmp_path, bits):
    plain = Emu35ForConditionalGeneration.from_pretrained(quantisable)
    quantization = BitsAndBytesConfig(**QUANTISED[bits])
    model = AutoModelForMultimodalLM.from_pretrained(quantisable, quantization_config=quantization, device_map="cpu")
    layer = model.model.layers[0]
    for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
        assert linear.weight.dtype in (torch.uint8, torch.int8)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == layer.input_layernorm.weight.dtype == torch.bfloat16
    for name, tensor in model.vision_tokenizer.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, plain.vision_tokenizer.state_dict()[name])

    model.save_pretrained(tmp_path / bits)  # before it runs: see the next test
    logits = logits_of(model)
    both = torch.stack([logits.float().flatten(), logits_of(plain).float().flatten()])
    assert torch.corrcoef(both)[0, 1] > (0.9 if bits == "4bit" else 0.99)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / bits)
    assert torch.equal(logits_of(again), logits)
    assert {parameter.dtype for parameter in again.vision_tokenizer.parameters()} == {torch.float32}


def test_four_bit_model_that_ran_on_a_cpu_is_not_saved(quantisable, tmp_path):
    quantization = BitsAndBytesConfig(**QUANTISED["4bit"])
    model = Emu35ForConditionalGeneration.from_pretrained(
        quantisable, quantization_config=quantization, device_map="cpu"
    )
    logits_of(model)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("this processor has no AVX512 in bfloat16")
    with pytest.raises(ValueError, match="cannot be saved after it has run on a CPU"):
        model.save_pretrained(tmp_path / "late")


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_checkpoints_are_refused_when_quantising(quantisable, kind):
    rewrite(quantisable, SPOILED[kind][0])
    quantization = BitsAndBytesConfig(**QUANTISED["4bit"])
    with pytest.raises(ValueError, match=SPOILED[kind][1]):
        Emu35ForConditionalGeneration.from_pretrained(quantisable, quantization_config=quantization)


# ------------------------------------------------------------------------------------------------------------- saving


def fail_after(number, error):
    """A stand-in for `save_file` that writes `number` files, then half of one, then raises."""
    calls = []

    def save(tensors, filename, metadata=None):
        calls.append(filename)
        save_file(tensors, filename, metadata=metadata)
        if len(calls) > number:
            Path(filename).write_bytes(Path(filename).read_bytes()[:100])
            raise error

    return save


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize("part", ["model", "vision_tokenizer"])
def test_a_failed_save_leaves_the_old_checkpoint(tiny_model, tmp_path, monkeypatch, error, part):
    module = tiny_model if part == "model" else tiny_model.vision_tokenizer
    module.save_pretrained(tmp_path / "model")
    before = files_of(tmp_path / "model")
    with torch.no_grad():
        next(module.parameters()).zero_()
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail_after(1, error))
    with pytest.raises(type(error)):
        module.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert files_of(tmp_path / "model") == before
    with pytest.raises(type(error)):
        module.save_pretrained(tmp_path / "new" / "deep", max_shard_size="20KB")
    assert not (tmp_path / "new" / "deep").exists()


def test_a_real_full_disk_leaves_the_old_checkpoint(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may grow beyond this
    try:
        with pytest.raises(Exception, match="too large"):
            tiny_model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == before


def test_an_error_while_files_are_moved_is_undone(tiny_model, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path, max_shard_size="50KB")
    before = files_of(tmp_path)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return replace(source, target)

    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert files_of(tmp_path) == before


def test_saving_over_shards_and_back(tiny_model, tmp_path):
    """An old `model.safetensors` would win over new shards."""
    (tmp_path / "notes.txt").write_text("mine")
    for value, size in ((0.0, "1GB"), (1.0, "50KB"), (2.0, "100KB"), (3.0, "1GB")):
        with torch.no_grad():
            tiny_model.model.norm.weight.fill_(value)
        tiny_model.save_pretrained(tmp_path, max_shard_size=size)
        again = Emu35ForConditionalGeneration.from_pretrained(tmp_path)
        assert again.model.norm.weight[0] == value
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}


def test_variants_do_not_touch_each_other(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_model.save_pretrained(tmp_path, variant="fp32", max_shard_size="50KB")
    tiny_model.save_pretrained(tmp_path, variant="fp32")
    weights = {path.name for path in tmp_path.iterdir() if "safetensors" in path.name}
    assert weights == {"model.safetensors", "model.fp32.safetensors"}


def test_saved_files_have_usual_permissions(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "usual").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_other_processes_write_nothing(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_is_no_folder(tiny_model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"`save_directory`.*must be a folder"):
        tiny_model.save_pretrained(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        tiny_model.save_pretrained(tmp_path / "file" / "below")


# -------------------------------------------------------------------------------------------------- atomic directories


def test_atomic_directory_appears_as_a_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_directory(target) as folder:
        (folder / "file").write_text("text")
        assert not target.exists()
    assert files_of(target) == {"file": b"text"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_directory_disappears_on_error(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        raise error
    assert not list(tmp_path.iterdir())


def test_atomic_directory_refuses_what_exists(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:  # empty: fine
        (folder / "old").write_text("old")
    with pytest.raises(FileExistsError, match="exists and is not empty"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(ValueError), atomic_directory(tmp_path / "out", overwrite=True):
        raise ValueError
    assert files_of(tmp_path / "out") == {"old": b"old"}
    with atomic_directory(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert files_of(tmp_path / "out") == {"new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_atomic_directory_fills_a_mount_point(tmp_path, monkeypatch, overwrite):
    target = tmp_path / "mounted"
    target.mkdir()
    if overwrite:
        (target / "old").write_text("old")
    inode = target.stat().st_ino
    monkeypatch.setattr(Path, "is_mount", lambda self: self == target)
    with atomic_directory(target, overwrite=overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
    assert target.stat().st_ino == inode
    assert [path.name for path in target.iterdir()] == ["sub"]
