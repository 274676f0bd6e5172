"""`emu35 bench grpo`: both ways compute the same log-probabilities, one of them of fewer tokens."""

import json

import pytest
from emu35 import bench_emu35
from emu35.training import bench_grpo as bench


@pytest.fixture(scope="module")
def results():
    """In this process, of small groups."""
    small = [bench.Asked(one.name, one.prompt // 4, one.answer // 3, 1, one.kind) for one in bench.ASKED["emu35-tiny"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ASKED", {"emu35-tiny": small})
        patch.setattr(bench, "in_own_process", lambda *arguments, module: bench.measure_scores(*arguments))
        patch.setattr(bench_emu35, "_PARTS_OF_OTHERS", {})
        bench_emu35.register_part("grpo", bench.PART)
        found = bench_emu35.run_benchmark(["grpo"], quick=True)
        return found, bench_emu35.format_results(found)


def test_both_ways_have_the_same_numbers(results):
    found, table = results
    json.dumps(found)
    (model,) = found["grpo"]["models"]
    assert [one["task"] for one in model["tasks"]] == ["t2i", "x2i", "vqa"]
    for one in model["tasks"]:
        ours, plain = one["ways"].values()
        assert ours["mean_log_prob"] == pytest.approx(plain["mean_log_prob"], rel=1e-4)
        assert plain["tokens"] == 8 * (one["prompt"] + one["answer"])
        assert ours["tokens"] == one["prompt"] + 8 * (one["answer"] - 1)
        assert one["speedup"] == plain["seconds"] / ours["seconds"]
    assert "vqa: prompt 21, answer 2" in table and "fewer tokens" in table


def test_targets_are_for_prompts_longer_than_their_answers():
    tasks = [
        {"task": "a", "prompt": 90, "answer": 6, "speedup": 3.1, "fewer_tokens": 6.0},
        {"task": "b", "prompt": 90, "answer": 40, "speedup": 0.9, "fewer_tokens": 1.5},
        {"task": "c", "prompt": 10, "answer": 40, "speedup": 0.8, "fewer_tokens": 1.1},
    ]
    targets = bench.grpo_targets({"models": [{"name": "tiny", "tasks": tasks}]})
    assert [(target, reached) for _, target, _, reached in targets] == [(">= 3", True), (">= 1", False)]
