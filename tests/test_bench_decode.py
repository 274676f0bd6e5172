"""The benchmark of the image decoders: what it counts adds up, theory and measurement agree, plots are drawn."""

import json
import math

import pytest
import torch
from emu35 import bench_decode_emu35, bench_emu35, cli
from emu35.bench_decode_emu35 import (
    Decoder,
    Subject,
    acceptance_statistics,
    decode_targets,
    exact_decoders,
    measure_decoders,
    predicted_passes,
)
from emu35.bench_plots_emu35 import plot_decoders
from emu35.decoding_emu35 import ImageStatistics
from PIL import Image

GRID = (4, 5)
NUM_CODES = 20
REPEATS = 3


@pytest.fixture(scope="module")
def subject(shared_tiny_model):
    draws = torch.Generator().manual_seed(0)
    prompts, negatives = (torch.randint(0, 256, (3, length), generator=draws) for length in (9, 5))
    settings = {
        "generation_mode": "image",
        "height": 4 * GRID[0],
        "width": 4 * GRID[1],
        "guidance_scale": 2.0,
        "image_top_p": 0.9,
        "do_sample": True,
    }
    inputs = {"input_ids": prompts, "negative_prompt_ids": negatives}
    return Subject(shared_tiny_model, inputs, settings, GRID, num_single=3)


@pytest.fixture(scope="module")
def measured(subject):
    decoders = exact_decoders(subject, windows=(2, 16, 64))
    return measure_decoders(subject, decoders, REPEATS, "cpu", seed=5, traced=REPEATS)


@pytest.fixture(scope="module")
def results(measured):
    random = {**measured, "note": "a note"}
    return {"repeats": REPEATS, "tiny": measured, "random": json.loads(json.dumps(random))}


def test_every_coupling_and_every_window_that_fits(measured):
    names = ["ar", *(f"{coupling} {window}" for coupling in ("none", "maximal", "gumbel") for window in (2, 16))]
    assert [row["name"] for row in measured["decoders"]] == names


def test_passes(measured):
    ar, *speculative = measured["decoders"]
    assert ar["passes"] == NUM_CODES and ar["codes_per_pass"] == 1 and "acceptance" not in ar
    assert all(row["passes"] < NUM_CODES for row in speculative)
    # In a batch, a call goes on until its slowest row is done.
    for row in speculative:
        single, batch = row["batches"]
        assert single["passes_per_call"] == row["passes"] < batch["passes_per_call"] <= NUM_CODES


def test_theory_predicts_the_passes(measured):
    for row in measured["decoders"][1:]:
        assert row["predicted_passes"] == pytest.approx(row["passes"], rel=0.1)
        # The last pass settles less than it could: there is an end.
        assert row["codes_per_pass"] <= row["expected_codes_per_pass"] + 0.1


def test_guesses_are_counted_where_the_decoder_has_them(subject, measured):
    for row in measured["decoders"][1::5]:
        drafted = accepted = 0
        for repeat in range(REPEATS):
            for image in range(subject.num_single):
                decoder = Decoder(row["name"], 0, {key: row[key] for key in ("coupling", "speculative_window")})
                output = subject.generate(image, 1, 5 + 1000 * repeat, decoder, image_decoder="speculative")
                drafted += output.image_statistics[0][0].num_drafted
                accepted += output.image_statistics[0][0].num_accepted
        assert sum(row["guesses_by_position"]) == drafted
        assert row["acceptance"] == pytest.approx(accepted / drafted)
        assert len(row["acceptance_by_position"]) == row["speculative_window"]


def test_times_add_up(measured):
    reference = measured["decoders"][0]["batches"]
    for row in measured["decoders"]:
        assert [own["batch_size"] for own in row["batches"]] == [1, 8]
        for own, ar in zip(row["batches"], reference, strict=True):
            assert len(own["seconds"]) == REPEATS and own["seconds_per_image"] == sorted(own["seconds"])[1]
            assert own["images_per_second"] * own["seconds_per_image"] == pytest.approx(1)
            ratios = sorted(theirs / ours for theirs, ours in zip(ar["seconds"], own["seconds"], strict=True))
            assert own["speedup"] == ratios[1]
            a_call = own["batch_size"] * own["seconds_per_image"]
            assert own["seconds_per_pass"] * own["passes_per_call"] == pytest.approx(a_call)
            assert own["network_seconds_per_pass"] > 0


def test_images_do_not_depend_on_the_batch(subject):
    decoder = exact_decoders(subject, (4,), ("gumbel",))[1]
    together = subject.generate(0, 4, 7, decoder).sequences
    alone = [subject.generate(image, 1, 7, decoder).sequences[0] for image in range(4)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], together[3])  # the same prompt, another seed


def test_passes_predicted_in_closed_form():
    assert predicted_passes([], 7) == 7
    assert predicted_passes([0.0, 0.0], 7) == 7
    for window, num_codes in ((1, 8), (3, 8), (3, 9), (8, 8), (20, 8)):
        assert predicted_passes([1.0] * window, num_codes) == math.ceil(num_codes / (window + 1))
    assert predicted_passes([0.5], 1) == 1
    assert predicted_passes([0.5], 2) == pytest.approx(1.5)
    # 3 codes: E_3 = 1 + .5 E_2 + .25 E_1 + .25 E_0
    assert predicted_passes([0.5, 0.25], 3) == pytest.approx(1 + 0.75 + 0.25)
    assert predicted_passes([0.5, 0.6], 3) == predicted_passes([0.5, 0.5], 3)


def test_acceptance_by_position():
    # 4 codes, window 2: passes of 3 and 1 codes; the second one had 1 guess, which was accepted.
    first = (ImageStatistics(2, 3, (2, 1)), [3, 1])
    # Passes of 1, 1 and 2 codes; the last one accepted the first guess and drew the second one's code again.
    second = (ImageStatistics(3, 6, (1, 0)), [1, 1, 2])
    found = acceptance_statistics([first, second], 4)
    assert found["guesses_by_position"] == [5, 4]
    assert found["acceptance_by_position"] == [3 / 5, 1 / 4]
    assert found["acceptance"] == 4 / 9
    assert found["expected_codes_per_pass"] == 1 + 3 / 5 + 1 / 4
    assert found["predicted_passes"] == predicted_passes([3 / 5, 1 / 4], 4)
    # A first pass without guesses, then one of 2 guesses and a code more.
    found = acceptance_statistics([(ImageStatistics(2, 2, (1, 1)), [1, 3])], 4)
    assert (found["guesses_by_position"], found["acceptance"], found["predicted_passes"]) == ([1, 1], 1.0, 2.0)
    assert acceptance_statistics([(ImageStatistics(4), [1, 1, 1, 1])], 4) == {}


def test_tables(results):
    bench_decode_emu35._project(results["random"], results["tiny"])
    whole = {"environment": bench_emu35.environment("cpu", torch.float32), "decode": results, "targets": []}
    table = bench_emu35.format_results(whole)
    assert "emu35-tiny: images of 4 x 5 codes, median of 3" in table and "(a note)" in table
    assert table.count("\ngumbel 16") == 4 and table.count("\nar ") == 2
    single = results["random"]["decoders"][1]["batches"][0]
    ar = results["random"]["decoders"][0]["batches"][0]
    assert single["break_even_codes_per_pass"] == single["seconds_per_pass"] / ar["seconds_per_pass"]
    # Projected onto itself, by the passes that theory gives.
    predicted = results["tiny"]["decoders"][1]["predicted_passes"]
    expected = NUM_CODES / predicted / single["break_even_codes_per_pass"]
    assert single["projected_speedup"] == pytest.approx(expected)


def test_targets(results):
    row = {"passes": 10.0, "batches": [{"speedup": 1.5}]}
    tiny = {"decoders": [{"name": "ar", "passes": 26.0}, {"name": "gumbel 16", **row}]}
    assert [target[2:] for target in decode_targets({"tiny": tiny})] == [(2.6, True), (1.5, False)]
    assert decode_targets({"tiny": {"skipped": "none"}}) == []
    assert len(bench_emu35._targets({"decode": results})) == 2


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot_decoders(results, tmp_path / "plots")
    sizes = {
        "decode_passes.png": (1104, 432),
        "decode_seconds.png": (1104, None),
        "decode_acceptance.png": (1296, 408),
    }
    assert {path.name for path in paths} == set(sizes)
    for path in paths:
        with Image.open(path) as image:
            width, height = sizes[path.name]
            assert image.format == "PNG" and image.width == width and image.height == (height or image.height)
            blue = (31, 119, 180)  # of the coupling "gumbel", or of the first window
            assert blue in {color[:3] for _, color in image.convert("RGB").getcolors(1 << 20)}


def test_plots_of_random_weights_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot_decoders({**results, "tiny": {"skipped": "none"}}, tmp_path)
    assert {path.name for path in paths} == {"decode_passes.png", "decode_seconds.png"}


def test_without_the_tiny_checkpoint(monkeypatch, measured):
    monkeypatch.setattr("emu35.TINY", "/no/such/folder")
    monkeypatch.setattr(bench_decode_emu35, "random_subject", lambda *args: None)
    monkeypatch.setattr(bench_decode_emu35, "_random_decoders", lambda *args: [])
    monkeypatch.setattr(bench_decode_emu35, "measure_decoders", lambda *args, **options: measured)
    results = bench_decode_emu35.bench_decode(True, "cpu", torch.float32, 0)
    tables = bench_decode_emu35.decode_tables(results)
    assert "not in this installation" in tables[0][0] and tables[0][1:] == ([], [])
    assert len(tables) == 3


def test_the_random_model_is_batched_where_a_pass_is_small():
    subject = Subject(None, {}, {}, (4, 16))
    decoders = bench_decode_emu35._random_decoders(subject, (4, 8, 16, 32, 64), ("none", "maximal", "gumbel"))
    assert len(decoders) == 16
    assert [decoder.name for decoder in decoders if 8 in decoder.batch_sizes] == [
        "ar",
        "gumbel 4",
        "gumbel 8",
        "gumbel 16",
    ]


def test_command_line_draws(results, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_emu35, "run_benchmark", lambda *args, **options: {"decode": results})
    monkeypatch.setattr(bench_emu35, "format_results", lambda results: "a table")
    folder = tmp_path / "plots"
    assert cli.main(["bench", "decode", "--plots", str(folder), "--device", "cpu"]) == 0
    written = [line.partition(": written")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(written) == sorted(str(path) for path in folder.iterdir()) and len(written) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vision", "--plots", "."], "Add it: emu35 bench decode"),
        (["--size", "34b", "--plots", "."], "Add it: emu35 bench decode"),
        (["decode", "--plots", "no/such/folder"], "Make it first"),
    ],
)
def test_plots_that_cannot_be_drawn_are_refused_at_once(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(bench_emu35, "run_benchmark", lambda *args, **options: pytest.fail("measured"))
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quick():
    results = bench_emu35.run_benchmark(["decode"], quick=True)
    assert results["targets"] == []
    tiny, random = results["decode"]["tiny"]["decoders"], results["decode"]["random"]["decoders"]
    assert tiny[0]["passes"] == 36 and random[0]["passes"] == 16
    assert all(row["passes"] < 36 / 2 for row in tiny[1:])
    assert all("break_even_codes_per_pass" in row["batches"][0] for row in random)
    assert "skipped" not in bench_emu35.format_results(results)
    json.dumps(results)
