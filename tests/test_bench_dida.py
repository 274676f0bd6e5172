"""The benchmark of `dida`: times composed of parts are those of the whole, and what it reports adds up."""

import json
import time
from pathlib import Path

import emu35
import pytest
import torch
from emu35 import bench_dida_emu35, bench_emu35, cli
from emu35.bench_decode_emu35 import Subject, measure_decoders
from emu35.bench_dida_emu35 import (
    MID_DECODER,
    PARTS_OF_STEP,
    SCHEDULERS,
    bench_tiny,
    dida_decoders,
    dida_tables,
    dida_targets,
    measure_grids,
    measure_schedulers,
    pass_flops,
    random_model,
    random_scheduler,
)
from emu35.bench_plots_emu35 import plot_dida
from PIL import Image

DECODER = {
    **MID_DECODER,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
NUM_CODES = 64
GRIDS = ((4, 5), (8, 8))
STEPS = (2, 6)
REPEATS = 3


@pytest.fixture(scope="module")
def model():
    return random_model(DECODER, NUM_CODES, "cpu", torch.float32, seed=0)


@pytest.fixture
def clock(model, monkeypatch):
    """Time in which only passes through the decoder take long: 1 second, and 1 ms a token in sight."""
    now = [0.0]

    def advance(module, args, kwargs):
        now[0] += 1 + 0.001 * (kwargs["past_key_values"].get_seq_length() + args[0].shape[1])

    def read():
        now[0] += 1e-9
        return now[0]

    monkeypatch.setattr(time, "perf_counter", read)
    handle = model.model.layers[0].register_forward_pre_hook(advance, with_kwargs=True)
    yield
    handle.remove()


@pytest.fixture(scope="module")
def grids(model):
    return measure_grids(model, GRIDS, STEPS, "cpu", bandwidth=1e10, repeats=1)


@pytest.fixture(scope="module")
def tiny(shared_tiny_model):
    """`ar`, `speculative` and `dida` on the untrained model of the tests."""
    draws = torch.Generator().manual_seed(0)
    prompts, negatives = (torch.randint(0, 256, (2, length), generator=draws) for length in (9, 5))
    sizes = {"generation_mode": "image", "height": 16, "width": 20, "guidance_scale": 2.0, "do_sample": True}
    subject = Subject(shared_tiny_model, {"input_ids": prompts, "negative_prompt_ids": negatives}, sizes, (4, 5), 2)
    return measure_decoders(subject, dida_decoders(subject, (2, 8), unadapted=True), REPEATS, "cpu", seed=3)


@pytest.fixture
def results(grids, tiny):
    schedulers = [{"path": path, "jump": jump, "seconds": 0.001} for path, jump in SCHEDULERS]
    tiny = {**tiny, "adapter": None, "note": "a note"}
    return {"repeats": REPEATS, "tiny": tiny, "random": [{**grids, "schedulers": schedulers}]}


def test_composed_times_are_those_of_the_whole(clock, model):
    measured = measure_grids(model, ((4, 6), (8, 8)), (1, 3, 8), "cpu", repeats=1)
    for row in measured["grids"]:
        ar = row["ar"]
        assert ar["whole"] and ar["composed_seconds"] == pytest.approx(ar["seconds"], rel=0.02)
        height, width = row["grid"]
        for own in row["dida"]:
            assert own["composed_seconds"] == pytest.approx(own["seconds"], rel=1e-6)
            # The prefix, BOI and size included but not IMG; and the block against it.
            assert own["seconds"] == pytest.approx(
                (own["steps"] + 1) * 1.068 + 0.001 * own["steps"] * height * (width + 1), rel=0.01
            )
        assert row["step"]["network"] == pytest.approx(row["step"]["seconds"], rel=1e-5)


def test_large_images_are_composed(clock, model, monkeypatch):
    monkeypatch.setattr(bench_dida_emu35, "WHOLE_CODES", 20)
    small, large = measure_grids(model, GRIDS, STEPS, "cpu", repeats=1)["grids"]
    assert all(own["whole"] for own in (small["ar"], *small["dida"]))
    for own in (large["ar"], *large["dida"]):
        assert not own["whole"] and own["seconds"] == own["composed_seconds"]
        assert own["limit_seconds"] is None or own["limit_seconds"] > 0


def test_passes_ratios_and_parts(grids):
    assert grids["num_codes"] == NUM_CODES
    for row, (height, width) in zip(grids["grids"], GRIDS, strict=True):
        assert row["grid"] == [height, width] and row["ar"]["passes"] == height * width
        assert [own["passes"] for own in row["dida"]] == [3, 7]
        few, many = row["dida"]
        assert many["limit_seconds"] == pytest.approx(3 * few["limit_seconds"])
        assert many["composed_seconds"] - few["composed_seconds"] == pytest.approx(4 * row["step"]["seconds"])
        for own in row["dida"]:
            assert own["ratio"] == row["ar"]["seconds"] / own["seconds"]
            assert own["limit_ratio"] == row["ar"]["limit_seconds"] / own["limit_seconds"]
        parts = [row["step"][name] for name in PARTS_OF_STEP]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row["step"]["seconds"], rel=0.25)


def test_operations_of_a_pass(model):
    inputs = {"input_ids": torch.zeros(1, 10), "negative_prompt_ids": torch.zeros(1, 4)}
    layers = sum(weight.numel() for weight in model.model.layers.parameters())
    # 4 x 5 codes and 4 row ends (IMG, too), in two streams; 2 layers of 2 heads of 8.
    expected = 2 * 20 * NUM_CODES * 16 + 2 * 2 * 24 * layers + 4 * 24 * (34 + 28) * 2 * 2 * 8
    assert pass_flops(model, Subject(model, inputs, {}, (4, 5))) == expected


def test_the_model_is_left_as_it_was(model, grids):
    assert "forward" not in vars(model.model) and "compute_logits" not in vars(model)


def test_schedulers():
    rows = measure_schedulers(NUM_CODES, "cpu", 0, positions=3)
    assert [(row["path"], row["jump"]) for row in rows] == list(SCHEDULERS)
    assert all(row["seconds"] > 0 for row in rows)
    assert random_scheduler(NUM_CODES, "cpu", 0, "absorbing", "kinetic").mask_code == NUM_CODES


def test_grids_are_timed_on_the_path_of_the_shipped_adapter():
    config = json.loads(Path(emu35.TINY_DIDA, "scheduler_config.json").read_text())
    assert (config["path"], config["jump"]) == bench_dida_emu35.GRID_PATH


def test_passes_of_the_decoders(tiny):
    passes = {row["name"]: row["passes"] for row in tiny["decoders"]}
    assert (passes["ar"], passes["dida 2"], passes["dida 8"]) == (20, 3, 9)
    assert passes["speculative"] < 20
    for row in tiny["decoders"][2:]:
        assert [own["passes_per_call"] for own in row["batches"]] == [row["passes"]] * 2
        assert row["allow_unadapted"]


def test_without_the_tiny_checkpoint(monkeypatch):
    monkeypatch.setattr("emu35.TINY", "/no/such/folder")
    tiny = bench_tiny(True, 1, "cpu", torch.float32, 0)
    assert "not in this installation" in tiny["skipped"]
    tables = dida_tables({"repeats": 1, "tiny": tiny, "random": []})
    assert "skipped" in tables[0][0] and dida_targets({"tiny": tiny, "random": []}) == []


def test_without_an_adapter(monkeypatch):
    asked = {}
    monkeypatch.setattr("emu35.TINY_DIDA", "/no/such/folder")
    monkeypatch.setattr(bench_dida_emu35, "tiny_subject", lambda *args, **options: Subject(None, {}, {}, (6, 6)))
    monkeypatch.setattr(
        bench_dida_emu35,
        "measure_decoders",
        lambda subject, decoders, *args, **options: asked.update(all=decoders) or {},
    )
    tiny = bench_tiny(False, 1, "cpu", torch.float32, 0)
    assert tiny["adapter"] is None and "without an adapter (no /no/such/folder)" in tiny["note"]
    assert [decoder.name for decoder in asked["all"]] == [
        "ar",
        "speculative",
        *(f"dida {number}" for number in (2, 4, 8, 16, 32)),
    ]
    assert all(decoder.settings["allow_unadapted"] for decoder in asked["all"][2:])


def test_tables(results):
    whole = {"environment": bench_emu35.environment("cpu", torch.float32), "dida": results, "targets": []}
    table = bench_emu35.format_results(whole)
    assert "(a note)" in table and "metric, kinetic" in table and "64 codes, float32, batch 1, guidance" in table
    (row,) = (line for line in table.splitlines() if line.startswith("dida 8"))
    assert row.split()[2:4] == ["9.0", "2.2"]  # passes, and those of ar by them
    assert json.loads(json.dumps(results)) == results


def test_composed_times_are_marked(results):
    results["random"][0]["grids"][1]["ar"]["whole"] = False
    table = dict(enumerate(dida_tables(results)))[1]
    marked = [line[3].startswith("~") for line in table[2]]
    assert marked == [False, False, False, True, False, False]


def test_targets():
    tiny = {"decoders": [{"name": "ar"}, {"name": "dida 8", "batches": [{"speedup": 2.6}]}]}
    dida = [{"steps": 8, "ratio": 9.0}, {"steps": 16, "ratio": 4.0}]
    grids = [{"grid": [16, 16], "dida": dida}, {"grid": [32, 32], "dida": dida}]
    targets = dida_targets({"tiny": tiny, "random": [{"num_codes": 64, "grids": grids}]})
    assert [target[2:] for target in targets] == [(2.6, True), (4.0, False)]
    assert len(bench_emu35._targets({"dida": {"tiny": tiny, "random": [{"num_codes": 64, "grids": grids}]}})) == 2


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot_dida(results, tmp_path / "plots")
    assert [path.name for path in paths] == ["dida_grids.png", "dida_steps.png", "dida_seconds.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20)) > 10
    del results["tiny"]
    results["random"][0]["grids"][0]["dida"][0]["limit_ratio"] = None
    assert len(plot_dida(results, tmp_path)) == 2


def test_command_line_draws(results, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_emu35, "run_benchmark", lambda *args, **options: {"dida": results})
    monkeypatch.setattr(bench_emu35, "format_results", lambda results: "a table")
    assert cli.main(["bench", "dida", "--plots", str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count(": written") == 3


def test_the_released_size_measures_its_grid_only(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_dida_emu35, "random_model", lambda *args: asked.append(args))
    monkeypatch.setattr(bench_dida_emu35, "measure_grids", lambda *args, **options: asked.append(args) or {})
    monkeypatch.setattr(bench_dida_emu35, "measure_schedulers", lambda *args: [])
    results = bench_dida_emu35.bench_dida("34b", False, "cuda", torch.bfloat16, 0)
    assert "tiny" not in results and len(results["random"]) == 1
    assert asked[0][:2] == ({}, 131072) and asked[1][1:3] == (((64, 64),), (16, 25))


@pytest.mark.slow
def test_quick():
    results = bench_emu35.run_benchmark(["dida"], quick=True)
    assert results["targets"] == []
    decoders = {row["name"]: row["passes"] for row in results["dida"]["tiny"]["decoders"]}
    assert (decoders["ar"], decoders["dida 8"]) == (36, 9)
    bench_emu35.format_results(results)
    json.dumps(results)
