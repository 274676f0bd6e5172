"""The IBQ vision tokenizer against the release's numbers, and everything that must be refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emu35.configuration_emu35 import Emu35VisionTokenizerConfig
from emu35.modeling_emu35_vision_tokenizer import (
    Emu35VisionTokenizer,
    is_released_vision_tokenizer,
    load_released_vision_tokenizer,
    nearest_codes,
    to_uint8_pixels,
)
from PIL import Image
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "ibq_e16"
IMAGES = ("a_128x96", "b_64x160")


@pytest.fixture(scope="module")
def reference():
    return load_file(FIXTURES / "ibq_forward.safetensors")


@pytest.fixture(scope="module")
def released():
    return Emu35VisionTokenizer.from_pretrained(FIXTURES)


def tiny_config(**changes):
    fields = {
        "codebook_size": 32,
        "embed_dim": 8,
        "latent_channels": 8,
        "base_channels": 8,
        "channel_multiplier": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "resolution": 16,
        "norm_num_groups": 4,
    }
    return Emu35VisionTokenizerConfig(**(fields | changes))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Emu35VisionTokenizer(tiny_config()).eval()


# --- the release ---


def test_default_is_the_released_network():
    with torch.device("meta"):
        model = Emu35VisionTokenizer(Emu35VisionTokenizerConfig())
    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = json.loads((FIXTURES.parent / "ibq_455m_params.json").read_text())["params"]
    assert tensors == expected
    assert len(tensors) == 543
    assert sum(parameter.numel() for parameter in model.parameters()) == 455_336_963


@pytest.mark.parametrize("image", IMAGES)
def test_encode_equals_the_release(released, reference, image):
    pixel_values = reference[f"{image}.pixel_values"]
    with torch.no_grad():
        encoded = released.encoder(pixel_values)
        latents = released.latents(pixel_values)
    torch.testing.assert_close(encoded, reference[f"ibq_e16.{image}.encoder_out"], atol=1e-4, rtol=0)
    torch.testing.assert_close(latents, reference[f"ibq_e16.{image}.quant_conv_out"], atol=1e-4, rtol=0)
    codes = released.encode(pixel_values)
    assert codes.dtype == torch.long
    assert codes.tolist() == reference[f"ibq_e16.{image}.indices"].tolist()


@pytest.mark.parametrize("image", IMAGES)
def test_decode_equals_the_release(released, reference, image):
    codes = reference[f"ibq_e16.{image}.indices"]  # int32: any integer type will do
    quantized = released.quantize.decode(codes.long())
    torch.testing.assert_close(quantized, reference[f"ibq_e16.{image}.quant"], atol=1e-6, rtol=0)
    decoded = released.decode(codes)
    torch.testing.assert_close(decoded, reference[f"ibq_e16.{image}.decoded"], atol=1e-3, rtol=0)


def test_bytes_equal_the_release(released, reference):
    image = "a_128x96"
    ours = to_uint8_pixels(released.decode(reference[f"ibq_e16.{image}.indices"]))[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.open(FIXTURES / f"decoded_{image}.png").convert("RGB"))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_batch_equals_the_release(released, reference):
    pixel_values = reference["a_128x96.pixel_values"]
    codes = released.encode(torch.cat([pixel_values, pixel_values.flip(-1)]))
    assert codes.flatten().tolist() == reference["ibq_e16.batch2.indices_flat"].tolist()


@pytest.mark.skipif("EMU35_REFERENCE_DIR" not in os.environ, reason="set EMU35_REFERENCE_DIR to the reference data")
def test_second_released_checkpoint():
    directory = Path(os.environ["EMU35_REFERENCE_DIR"])
    reference, model = load_file(directory / "ibq_forward.safetensors"), None
    model = Emu35VisionTokenizer.from_pretrained(directory / "ibq_main")
    for image in (*IMAGES, "c_112x112"):
        codes = model.encode(reference[f"{image}.pixel_values"])
        assert codes.tolist() == reference[f"ibq_main.{image}.indices"].tolist()
        decoded = reference[f"ibq_main.{image}.decoded"]
        torch.testing.assert_close(model.decode(codes), decoded, atol=1e-3, rtol=0)


# --- images of any size and number ---


def test_list_of_sizes_equals_one_by_one(released, reference):
    first, second = (reference[f"{image}.pixel_values"][0] for image in IMAGES)
    images = [first, second, first.flip(-1), second.flip(-2)]
    codes = released.encode(images)
    assert [tuple(grid.shape) for grid in codes] == [(6, 8), (10, 4), (6, 8), (10, 4)]
    for image, grid in zip(images, codes, strict=True):
        assert torch.equal(grid, released.encode(image[None])[0])
    for grid, pixels in zip(codes, released.decode(codes), strict=True):
        torch.testing.assert_close(pixels, released.decode(grid[None])[0], atol=1e-5, rtol=0)


def test_empty_lists(tiny):
    assert tiny.encode([]) == [] and tiny.decode([]) == []


def test_bytes_are_clamped_and_truncated():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 2 * 9.9 / 255 - 1])
    assert to_uint8_pixels(values).tolist() == [0, 0, 127, 255, 255, 9]


# --- quantisation ---


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (1500, 2500)])
def test_nearest_codes_is_argmax(shape):
    generator = torch.Generator().manual_seed(0)
    rows, codebook = (torch.randn(size, 16, generator=generator) for size in shape)
    assert torch.equal(nearest_codes(rows, codebook), (rows @ codebook.T).argmax(-1))
    unit = torch.nn.functional.normalize(codebook, dim=-1)
    assert torch.equal(nearest_codes(rows, codebook, normalize_codebook=True), (rows @ unit.T).argmax(-1))


def test_ties_go_to_the_lower_code():
    codebook = torch.ones(3000, 4)
    assert nearest_codes(torch.ones(2, 4), codebook).tolist() == [0, 0]


_MEASURE = """
import re, time, torch
from pathlib import Path
from emu35.modeling_emu35_vision_tokenizer import nearest_codes
torch.manual_seed(0)
rows, codebook = torch.randn({positions}, 256), torch.randn({codes}, 256)
# Not getrusage's: that one begins at what the parent process had when it made this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
nearest_codes(rows[:8], codebook[:4096])
before, started = peak(), time.perf_counter()
ours = nearest_codes(rows, codebook)
ours_gib, ours_s, started = peak() - before, time.perf_counter() - started, time.perf_counter()
# As IBQ's public code does it: every code is a channel of (1, codes, positions).
soft = torch.einsum("pd,cd->cp", rows, codebook)[None].softmax(1)
codes = soft.max(1, keepdim=True)[1]
hard = torch.zeros_like(soft).scatter_(1, codes, 1.0)
quantized = torch.einsum("bcp,cd->bdp", hard - soft.detach() + soft, codebook)
plain_s = time.perf_counter() - started
print(ours_gib, ours_s, peak() - before, plain_s, float((ours == codes.flatten()).float().mean()))
"""


def _measure(positions, codes):
    script = _MEASURE.format(positions=positions, codes=codes)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [float(value) for value in result.stdout.split()]


def test_quantisation_needs_little_memory():
    ours_gib, _, plain_gib, _, agreement = _measure(512, 16384)
    assert agreement == 1.0
    assert ours_gib < 0.05 < plain_gib


@pytest.mark.slow
def test_quantisation_at_full_size():
    ours_gib, ours_s, _, plain_s, agreement = _measure(4096, 131072)
    assert agreement == 1.0
    assert ours_gib <= 0.3
    assert plain_s >= 4 * ours_s


def test_cosine_ignores_length(tiny):
    model = Emu35VisionTokenizer(tiny_config(normalize_latents=True)).eval()
    latents = torch.randn(1, 8, 3, 3)
    codes = model.quantize.encode(latents)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(torch.rand(32, 1) + 0.5)
    assert torch.equal(model.quantize.encode(latents * 3), codes)
    lengths = model.quantize.decode(codes).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


# --- training ---


def test_straight_through_has_the_values_of_the_hard_codes(tiny):
    latents = torch.randn(2, 8, 4, 4, requires_grad=True)
    quantized, codes, losses = tiny.quantize(latents)
    assert torch.equal(codes, tiny.quantize.encode(latents))
    torch.testing.assert_close(quantized, tiny.quantize.decode(codes), atol=1e-5, rtol=0)
    assert set(losses) == {"quantization_loss", "commitment_loss", "entropy_loss"}


def test_gradient_of_straight_through_is_that_of_the_softmax(tiny):
    latents = torch.randn(1, 8, 2, 2)
    direction = torch.randn(1, 8, 2, 2)
    codebook = tiny.quantize.embedding.weight

    def gradients(quantize):
        leaf = latents.clone().requires_grad_()
        return torch.autograd.grad((quantize(leaf) * direction).sum(), [leaf, codebook])

    def soft(leaf):
        # Values from the hard one-hot; the codebook has a gradient by them *and* through the softmax.
        rows = leaf.permute(0, 2, 3, 1).reshape(-1, 8)
        weights = (rows @ codebook.T).softmax(-1)
        hard = torch.nn.functional.one_hot(weights.argmax(-1), 32) - weights.detach()
        return ((hard + weights) @ codebook).view(1, 2, 2, 8).permute(0, 3, 1, 2)

    for ours, expected in zip(gradients(lambda x: tiny.quantize(x)[0]), gradients(soft), strict=True):
        torch.testing.assert_close(ours, expected)
    assert (gradients(lambda x: tiny.quantize(x)[0])[1].abs().sum(1) > 0).all()  # every row of the codebook learns


def test_loss_is_the_weighted_sum(tiny):
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    output = tiny(pixel_values, return_loss=True)
    config = tiny.config
    expected = (
        output.reconstruction_loss
        + config.quantization_loss_weight * output.quantization_loss
        + config.commitment_loss_weight * output.commitment_loss
        + config.entropy_loss_weight * output.entropy_loss
    )
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.reconstruction_loss, (output.reconstruction - pixel_values).abs().mean())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in tiny.parameters())


def test_entropy_loss_of_uniform_and_of_confident_codes(tiny):
    with torch.no_grad():
        tiny.quantize.embedding.weight.copy_(torch.eye(8).repeat(4, 1)[:32])
        tiny.quantize.embedding.weight[8:].zero_()
        tiny.quantize.embedding.weight[:8] *= 1000
    latents = torch.eye(8).view(8, 8, 1, 1)  # eight positions, eight codes, each certain
    losses = tiny.quantize(latents)[2]
    assert losses["entropy_loss"].item() == pytest.approx(-np.log(8), abs=1e-4)
    losses = tiny.quantize(torch.zeros(8, 8, 1, 1))[2]  # all codes alike everywhere: the two entropies cancel
    assert losses["entropy_loss"].item() == pytest.approx(0, abs=1e-4)


def test_l2_reconstruction():
    model = Emu35VisionTokenizer(tiny_config(reconstruction_loss="l2"))
    pixel_values = torch.rand(1, 3, 8, 8)
    output = model.train()(pixel_values)
    torch.testing.assert_close(output.reconstruction_loss, (output.reconstruction - pixel_values).square().mean())


def test_without_loss_forward_is_encode_and_decode(tiny):
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        output = tiny(pixel_values)
    assert output.loss is None
    assert torch.equal(output.codes, tiny.encode(pixel_values))
    assert torch.equal(output.reconstruction, tiny.decode(output.codes))


def test_gradient_checkpointing_changes_nothing(tiny):
    pixel_values = torch.rand(1, 3, 16, 16)
    tiny.train()
    tiny(pixel_values).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in tiny.named_parameters()}
    tiny.zero_grad()
    tiny.gradient_checkpointing_enable()
    tiny(pixel_values).loss.backward()
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


# --- configuration, saving, loading ---


def test_attention_where_listed(tiny):
    assert [len(level.attn) for level in tiny.encoder.down] == [0, 0, 1]
    assert [len(level.attn) for level in tiny.decoder.up] == [0, 0, 2]
    assert not any(
        "attn" in name
        for name, _ in Emu35VisionTokenizer(tiny_config(attn_resolutions=[], mid_attention=False)).named_parameters()
    )


def test_save_and_load(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = Emu35VisionTokenizer.from_pretrained(tmp_path)
    pixel_values = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.encode(pixel_values), tiny.encode(pixel_values))
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stays_in_float32(tiny, tmp_path, dtype):
    tiny.save_pretrained(tmp_path)
    model = Emu35VisionTokenizer.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.to(torch.bfloat16)  # on demand it works in half precision, too
    codes = model.encode(torch.rand(1, 3, 16, 16))
    assert model.decode(codes).dtype == torch.bfloat16


def test_released_folder_is_recognised(released, tiny, tmp_path):
    assert is_released_vision_tokenizer(FIXTURES)
    assert released.config.norm_num_groups == 32 and released.config.downsampling_factor == 16
    assert {parameter.dtype for parameter in released.parameters()} == {torch.float32}
    config, state_dict = load_released_vision_tokenizer(FIXTURES)
    assert config.codebook_size == 512 and state_dict["quantize.embedding.weight"].dtype == torch.float16
    released.save_pretrained(tmp_path)
    assert not is_released_vision_tokenizer(tmp_path)
    codes = torch.randint(512, (1, 2, 2))
    assert torch.equal(Emu35VisionTokenizer.from_pretrained(tmp_path).decode(codes), released.decode(codes))


def test_offload_hooks_fire(tiny):
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append("in")
            return args, kwargs

    add_hook_to_module(tiny, Hook())
    tiny.decode(tiny.encode(torch.rand(1, 3, 8, 8)))
    assert calls == ["in", "in"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("pixel_values", "error", "message"),
    [
        (torch.zeros(1, 3, 18, 16), ValueError, "height must be a multiple of 4, got 18. Nearest: 16 or 20"),
        (torch.zeros(1, 3, 16, 3), ValueError, "width must be a multiple of 4, got 3. Nearest: 4"),
        (torch.zeros(3, 16, 16), ValueError, "must have the shape .batch, channels, height, width."),
        (torch.zeros(1, 4, 16, 16), ValueError, "must have 3 channels"),
        (torch.zeros(1, 3, 0, 16), ValueError, "no empty dimension"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "floating-point tensor .*127.5 - 1.*uint8"),
        (torch.full((1, 3, 16, 16), float("nan")), ValueError, "NaN"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 16, 18)], ValueError, r"`pixel_values\[1\]`: the width"),
        (
            [torch.zeros(1, 3, 16, 16)],
            ValueError,
            r"`pixel_values\[0\]` must have the shape .channels, height, width.",
        ),
        ([np.zeros((3, 16, 16))], TypeError, r"`pixel_values\[0\]`.*ndarray"),
        ("image.png", TypeError, "list of tensors, got str"),
    ],
)
def test_bad_pixels(tiny, pixel_values, error, message):
    with pytest.raises(error, match=message):
        tiny.encode(pixel_values)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), ValueError, "must have the shape .batch, token_height, token_width."),
        (torch.zeros(1, 2, 2), TypeError, "integer tensor, got torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), TypeError, "integer tensor, got torch.bool"),
        (torch.zeros(1, 0, 2, dtype=torch.long), ValueError, "at least one code"),
        (torch.full((1, 2, 2), 32), ValueError, r"must lie in \[0, 32\), got 32.*visual_token_offset"),
        (torch.full((1, 2, 2), -1), ValueError, r"must lie in \[0, 32\), got -1"),
        ([torch.zeros(2, 2, dtype=torch.long), torch.full((1, 1), 99)], ValueError, r"`codes\[1\]` must lie in"),
        ([[0, 1]], TypeError, r"`codes\[0\]` must be an integer tensor, got list"),
        (7, TypeError, "list of tensors, got int"),
    ],
)
def test_bad_codes(tiny, codes, error, message):
    with pytest.raises(error, match=message):
        tiny.decode(codes)


@pytest.fixture
def released_copy(tmp_path):
    return Path(shutil.copytree(FIXTURES, tmp_path / "released"))


def _change_config(directory, old, new):
    path = directory / "config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_double_z_is_refused(released_copy):
    _change_config(released_copy, "double_z: false", "double_z: true")
    with pytest.raises(ValueError, match="double_z"):
        Emu35VisionTokenizer.from_pretrained(released_copy)


@pytest.mark.parametrize("text", ["a: [", "just text", "n_embed: 512"])
def test_bad_config_file(released_copy, text):
    (released_copy / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml (is not a YAML file|lacks)"):
        Emu35VisionTokenizer.from_pretrained(released_copy)


def test_missing_weights_file(released_copy):
    (released_copy / "model.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no `model\.ckpt`"):
        Emu35VisionTokenizer.from_pretrained(released_copy)


def test_wrong_tensors_are_listed(released_copy):
    state_dict = load_released_vision_tokenizer(released_copy)[1]
    state_dict = {name: tensor.clone() for name, tensor in state_dict.items()}
    del state_dict["quant_conv.bias"]
    state_dict["discriminator.weight"] = torch.zeros(2, 2)
    state_dict["encoder.conv_in.bias"] = torch.zeros(3)
    torch.save(state_dict, released_copy / "model.ckpt")
    with pytest.raises(ValueError) as caught:
        Emu35VisionTokenizer.from_pretrained(released_copy)
    message = str(caught.value)
    assert "1 missing: quant_conv.bias (16,)" in message
    assert "1 unknown: discriminator.weight (2, 2)" in message
    assert "1 misshapen: encoder.conv_in.bias (3,) instead of (32,)" in message


def test_own_checkpoint_with_wrong_tensors(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    del state_dict["quant_conv.bias"]
    save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: quant_conv\.bias"):
        Emu35VisionTokenizer.from_pretrained(tmp_path)


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", ["zip", "plain pickle"])
def test_malicious_pickle_runs_nothing(released_copy, tmp_path, protocol):
    proof = tmp_path / "proof"
    content = {"state_dict": {"encoder.conv_in.bias": _Malicious(str(proof))}}
    if protocol == "zip":
        torch.save(content, released_copy / "model.ckpt")
    else:
        (released_copy / "model.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="nothing in it was run"):
        Emu35VisionTokenizer.from_pretrained(released_copy)
    assert not proof.exists()


def test_truncated_checkpoint(released_copy):
    path = released_copy / "model.ckpt"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"model\.ckpt"):
        Emu35VisionTokenizer.from_pretrained(released_copy)


def test_checkpoint_that_is_no_state_dict(released_copy):
    torch.save([torch.zeros(1)], released_copy / "model.ckpt")
    with pytest.raises(ValueError, match="holds a list that is not a state dict"):
        Emu35VisionTokenizer.from_pretrained(released_copy)
