"""The load test: its figures, and a small one."""

import json
import math

import pytest

pytest.importorskip("gradio_client")

from emu35.spaces import load_test
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


@pytest.mark.parametrize(("lost", "code"), [(0, 0), (1, 1)])
def test_the_command_fails_where_requests_are_lost(monkeypatch, tmp_path, lost, code):
    class Server:
        def __init__(self, **environment):
            assert environment == {"EMU35_QUEUE_SIZE": "6"}

        def close(self):
            pass

    found = {"lost": lost, "requests_sent": []}
    monkeypatch.setattr(load_test, "Server", Server)
    monkeypatch.setattr(load_test, "run_load_test", lambda server, users, requests, image_decoder: found)
    assert load_test.main(["--users", "2", "--output", str(tmp_path / "load.json")]) == code
    assert json.loads((tmp_path / "load.json").read_text())["lost"] == lost


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
