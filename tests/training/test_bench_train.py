"""`emu35 bench train`: both sides of a ratio do the same work, and its tables say what was measured."""

import dataclasses
import json

import pytest
import torch
from emu35 import bench_emu35
from emu35.training import bench_train as bench


@pytest.fixture(scope="module")
def results():
    """In this process, of one small model."""
    small = dataclasses.replace(bench.MODELS["emu35-tiny"], rows=4, row_length=128, gradient_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "MODELS", {"emu35-tiny": small})
        patch.setattr(bench, "in_own_process", lambda *arguments, module: bench.measure_training(*arguments))
        patch.setattr(bench_emu35, "_PARTS_OF_OTHERS", {})
        bench_emu35.register_part("train", bench.PART)
        found = bench_emu35.run_benchmark(["train"], quick=True)
        return found, bench_emu35.format_results(found)


def test_packed_rows_have_less_padding_and_both_losses_are_one(results):
    found, _ = results
    json.dumps(found)
    assert found["targets"] == []  # quick
    for model in found["train"]["models"]:
        ways = {way["name"]: way for way in model["ways"]}
        assert list(ways) == list(bench.WAYS)
        packed, unpacked = ways["emu35"], ways["unpacked"]
        share = [way["padding"] / (way["padding"] + way["tokens"]) for way in (packed, unpacked)]
        assert share[0] < share[1] and packed["batches"] < unpacked["batches"]
        assert packed["first_loss"] == pytest.approx(ways["plain loss"]["first_loss"], rel=1e-4)
        assert unpacked["first_loss"] == pytest.approx(ways["plain"]["first_loss"], rel=1e-4)
        assert model["packing_speedup"] == packed["tokens_per_second"] / unpacked["tokens_per_second"]


def test_tables_and_targets(results):
    _, table = results
    assert all(text in table for text in ("emu35-tiny", "packed rows:", "plain loss", "extra GiB"))
    measured = {"models": [{"name": "a", "packing_speedup": 1.6}, {"name": "b", "packing_speedup": 1.4}]}
    assert [reached for *_, reached in bench.train_targets(measured)] == [True, False]


def test_whole_logits_are_left_out_where_memory_is_short(monkeypatch):
    way = {"tokens": 10, "padding": 0, "tokens_per_second": 5.0, "extra_bytes": 8, "peak_bytes": 9}
    monkeypatch.setattr(bench, "in_own_process", lambda *_, module: {**way, "parameters": 1, "vocabulary": 2})
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10**9)
    found = bench.bench_train(False, "cpu", torch.float32, 0)
    assert "loss_memory_ratio" not in found["models"][-1]
    (*_, table) = bench.train_tables(found)
    assert "GiB of free memory" in table[2][1][1] and table[2][0][1] == "5"
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10**12)
    assert bench.bench_train(False, "cpu", torch.float32, 0)["models"][-1]["loss_memory_ratio"] == 1.0
