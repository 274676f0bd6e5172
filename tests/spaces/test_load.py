"""The load test: its figures, and a small one."""

import math

import pytest

pytest.importorskip("gradio_client")

from emu35.spaces.load_test import Sent, Server, run_load_test, summarise


def test_figures():
    sent = [
        Sent(0, joined=0.0, began=0.0, ended=1.0),
        Sent(1, joined=0.1, began=2.0, ended=3.0),
        Sent(2, joined=0.2, began=1.0, ended=2.0),  # passed one
        Sent(0, joined=1.0, began=4.0, ended=5.0),
        Sent(1, joined=3.0, problem="AppError: no"),
    ]
    found = summarise(sent)
    assert (found["requests"], found["lost"], found["problems"]) == (5, 1, ["AppError: no"])
    assert found["overtaken"] == 1
    assert found["waiting_seconds"] == {"min": 0.0, "median": 1.35, "p95": 3.0, "max": 3.0}
    assert found["per_user_median_waiting"] == [0.8, 1.9]
    assert not math.isnan(found["seconds"])


def test_figures_of_nothing():
    assert summarise([])["requests"] == 0
    assert summarise([Sent(0, 0.0, problem="x")])["lost"] == 1


@pytest.mark.slow
def test_nothing_is_lost_and_memory_is_flat():
    server = Server()
    try:
        found = run_load_test(server, num_users=4, num_requests=24)
    finally:
        server.close()
    assert found["lost"] == 0, found["problems"]
    assert found["health"] == {"status": "ready", "waiting": 0, "busy": False}
    assert found["overtaken"] <= 2
    assert found["memory_mib"]["end"] - found["memory_mib"]["warm"] < 50
