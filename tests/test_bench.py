"""The benchmark measures what it says: same results on both sides, and memory that is really used."""

import json
import mmap

import pytest
import torch
from emu35 import bench_emu35, bench_memory_emu35
from emu35.bench_emu35 import format_results, generate_like_the_release, run_benchmark
from emu35.bench_memory_emu35 import Memory, bench_loss, bench_vision, quantize_like_the_release
from emu35.modeling_emu35_vision_tokenizer import nearest_codes

GRID = (3, 4)


def prompts(layout):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator) for length in (9, 5)]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_straightforward_way_makes_the_same_image(shared_tiny_model, tiny_layout, guidance_scale):
    prompt, negative = prompts(tiny_layout)
    expected = generate_like_the_release(shared_tiny_model, prompt, negative, GRID, guidance_scale, top_k=1)
    output = shared_tiny_model.generate(
        prompt[None],
        negative_prompt_ids=negative[None],
        generation_mode="image",
        height=4 * GRID[0],
        width=4 * GRID[1],
        guidance_scale=guidance_scale,
        image_top_k=1,
        do_sample=True,
    )
    ids = output.sequences[0].tolist()
    assert ids[-1] == tiny_layout.eoi_token_id
    assert ids[-1 - len(expected) : -1] == expected
    assert expected[GRID[1] :: GRID[1] + 1] == [tiny_layout.eol_token_id] * (GRID[0] - 1)


def test_the_straightforward_way_draws_from_the_top_k(shared_tiny_model, tiny_layout):
    prompt, negative = prompts(tiny_layout)
    drawn = {
        generate_like_the_release(
            shared_tiny_model, prompt, negative, (1, 1), 2.0, 3, torch.Generator().manual_seed(seed)
        )[0]
        for seed in range(40)
    }
    assert len(drawn) == 3
    assert all(tiny_layout.visual_token_offset <= token_id < tiny_layout.visual_token_end for token_id in drawn)


def test_the_plain_quantisation_chooses_the_same_codes():
    torch.manual_seed(0)
    latents, codebook = torch.randn(50, 8), torch.randn(64, 8)
    codes, quantized = quantize_like_the_release(latents, codebook)
    assert torch.equal(codes, nearest_codes(latents, codebook))
    assert torch.allclose(quantized, codebook[codes])


def test_memory_counts_what_was_freed_again():
    memory = Memory("cpu")
    # Not by torch: what malloc has kept of earlier tests would be used again and count as nothing.
    with mmap.mmap(-1, 64 * 2**20) as block:
        block.write(b"1" * len(block))
    if bench_memory_emu35._status_bytes("VmHWM") is None:
        pytest.skip("no /proc/self/status here")
    # The process may have had a higher peak before the test, which would hide this one but never shrink the number.
    assert memory.extra_bytes() >= 60 * 2**20


@pytest.mark.slow
def test_vision_quick():
    result = bench_vision(quick=True, device="cpu", seed=0)
    assert result["different_codes"] == 0
    # 256 positions: logits, softmax and one-hot of 128 MiB each.
    assert result["plain_extra_bytes"] > 350 * 2**20
    assert result["extra_bytes"] < 100 * 2**20


@pytest.mark.slow
def test_loss_quick():
    result = bench_loss(quick=True, device="cpu", seed=0)
    assert result["loss"] == pytest.approx(result["plain_loss"], rel=1e-4)
    assert result["plain_extra_bytes"] > 3 * 256 * 282926 * 4  # logits, log-softmax and gradient


@pytest.mark.slow
def test_image_quick():
    results = run_benchmark(["image"], quick=True)
    image = results["image"]
    assert image["same_tokens_without_chance"]
    assert [row["batch_size"] for row in image["batches"]] == [1, 4, 8]
    assert all(row["tokens_per_second"] > 0 and 0 < row["share_of_bound"] < 2 for row in image["batches"])
    assert results["targets"] == []
    json.dumps(results)


def test_what_is_measured_is_there_when_a_later_part_is_interrupted(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_emu35, "bench_vision", lambda *args: {"seconds": 1.0})
    monkeypatch.setattr(bench_emu35, "bench_start", interrupted)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(["vision", "start"], quick=True, on_part=lambda results: kept.append(json.dumps(results)))
    (only,) = map(json.loads, kept)
    assert only["vision"] == {"seconds": 1.0} and "start" not in only and only["environment"]["device"] == "cpu"


def test_the_large_size_is_the_released_one():
    model = bench_memory_emu35.build_model({}, "meta", torch.bfloat16, seed=0)
    assert model.num_parameters() == 34_103_460_864
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_failing_measurement_is_told():
    with pytest.raises(RuntimeError, match="no-way"):
        bench_memory_emu35.in_own_process("no-way")


def test_too_little_memory_skips_the_plain_loss(monkeypatch):
    ours = {"seconds": 1.0, "extra_bytes": 10, "loss": 2.0}
    monkeypatch.setattr(bench_memory_emu35, "in_own_process", lambda *args: ours)
    monkeypatch.setattr(bench_memory_emu35, "free_bytes", lambda device: 10**9)
    result = bench_loss(quick=False, device="cpu", seed=0)
    assert "needs" in result["skipped"] and "memory_ratio" not in result
    monkeypatch.setattr(bench_memory_emu35, "free_bytes", lambda device: 10**12)
    assert bench_loss(quick=False, device="cpu", seed=0)["memory_ratio"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"parts": ["imagge"]}, "imagge"),
        ({"size": "7b"}, "7b"),
        ({"size": "34b"}, "needs a GPU with 67 GiB"),
        ({"size": "34b", "parts": ["loss"]}, "parts image, dida only"),
    ],
)
def test_impossible_benchmarks_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        run_benchmark(**arguments)


def results(speedups=(4.0, 12.0), ratio=0.05):
    rows = [
        {
            "batch_size": batch,
            "tokens_per_second": 10.0 * speedup,
            "speedup": speedup,
            "bandwidth_bound_tokens_per_second": 400.0,
            "share_of_bound": speedup / 40,
        }
        for batch, speedup in zip((1, 8), speedups, strict=True)
    ]
    vision = {"codes": [64, 64], "seconds": 3.0, "plain_seconds": 15.0, "speedup": 5.0, "different_codes": 0}
    loss = {"tokens": 4096, "seconds": 30.0, "extra_bytes": 2**29, "loss": 12.5}
    plain = {"plain_seconds": 20.0, "plain_extra_bytes": 2**34, "plain_loss": 12.5, "memory_ratio": ratio}
    measured = {
        "environment": bench_emu35.environment("cpu", torch.float32),
        "image": {"reference_tokens_per_second": 10.0, "same_tokens_without_chance": True, "batches": rows},
        "vision": {**vision, "extra_bytes": 2**27, "plain_extra_bytes": 6 * 2**30},
        "loss": {**loss, **plain},
        "start": {"seconds": 5.0},
    }
    return measured | {"targets": bench_emu35._targets(measured)}


def test_targets_and_table():
    good = results()
    assert len(good["targets"]) == 7 and all(row["reached"] for row in good["targets"])
    table = format_results(good)
    assert "12.0" in table and "NO" not in table and "16.00" in table
    bad = results(speedups=(2.9, 12.0), ratio=0.11)
    assert [row["reached"] for row in bad["targets"]] == [False, True, True, True, True, False, True]
    assert format_results(bad).count("NO") == 2


def test_table_of_what_was_skipped():
    measured = results()
    measured["loss"] = {"tokens": 4096, "seconds": 1.0, "extra_bytes": 1, "loss": 1.0, "skipped": "too little memory"}
    measured["start"] = {"skipped": "no checkpoint"}
    measured["image"]["same_tokens_without_chance"] = False
    table = format_results(measured)
    assert "skipped: too little memory" in table and "skipped: no checkpoint" in table and "WARNING" in table
