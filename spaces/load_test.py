"""A load test: many clients at once against a server in a process of its own.

    python spaces/load_test.py --users 32 --requests 200 --output load.json

Each user is a `gradio_client` with a session of its own and sends its requests one after the other. The result says
how many were lost (anything but a picture; the command then fails), how long they waited for the model, whether they
were served in the order in which they came, and how much memory the server took before and after. It imports nothing
of ours, so that clients start at once.
"""

import argparse
import io
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
from gradio_client import Client

logger = logging.getLogger(__name__)

PROMPT = "a small red circle above a large blue square"
#: Stages in which a request has the model.
_RUNNING = ("prompt", "drawing", "writing", "done")


@dataclass
class Sent:
    """One request.

    Attributes:
        joined, began, ended (`float`): seconds since the test began: sent, first seen to have the model, answered.
        problem (`str`): why there is no picture; empty if there is.
    """

    user: int
    joined: float
    began: float = float("nan")
    ended: float = float("nan")
    problem: str = ""


class Server:
    """The Space in a process of its own."""

    def __init__(self, timeout: float = 900, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emu35.spaces.app"],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = ""
        self.problems: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        end = time.monotonic() + timeout
        while self.health().get("status") != "ready":
            if time.monotonic() > end or self.process.poll() is not None:
                self.close()
                raise RuntimeError("the server did not start:\n" + "\n".join(self.problems[-60:]))
            time.sleep(0.2)

    def _read(self):
        for line in self.process.stderr:
            found = re.search(r"Open (http\S+)", line)
            if found:
                self.url = found[1]
            self.problems.append(line.rstrip())

    def health(self) -> dict[str, Any]:
        """What `/health` says; empty while there is no server."""
        try:
            return httpx.get(f"{self.url}health", timeout=10).json() if self.url else {}
        except httpx.HTTPError:
            return {}

    def memory(self) -> float:
        """Resident memory in MiB (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def close(self):
        """Ends it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def run_load_test(
    server: Server, num_users: int = 32, num_requests: int = 200, image_decoder: str = "dida", timeout: float = 600
) -> dict[str, Any]:
    """Sends `num_requests` requests of `num_users` users, each as soon as its last one has been answered.

    Returns:
        `dict`: see [`summarise`]; `memory_mib` at the start, after the first requests (`users` of them), at the end.
    """
    options = {"verbose": False, "download_files": False, "httpx_kwargs": {"timeout": timeout}}
    with ThreadPoolExecutor(num_users) as pool:
        clients = list(pool.map(lambda _: Client(server.url, **options), range(num_users)))
    memory = {"start": server.memory()}
    began, lock = time.monotonic(), threading.Lock()
    sent: list[Sent] = []
    left = iter(range(num_requests))

    def use(user: int):
        while True:
            with lock:
                if next(left, None) is None:
                    return
                one = Sent(user, time.monotonic() - began)
                sent.append(one)
            _send(clients[user], one, began, image_decoder, timeout)
            with lock:
                if sum(other.ended == other.ended for other in sent) == num_users:
                    memory["warm"] = server.memory()

    with ThreadPoolExecutor(num_users) as pool:
        list(pool.map(use, range(num_users)))
    memory["end"] = server.memory()
    for client in clients:
        client.close()
    return {
        **summarise(sent),
        "users": num_users,
        "image_decoder": image_decoder,
        "memory_mib": {name: round(value, 1) for name, value in memory.items()},
        "health": server.health(),
        "requests_sent": [asdict(one) for one in sent],
    }


def _send(client: Client, one: Sent, began: float, image_decoder: str, timeout: float):
    job = client.submit(PROMPT, image_decoder=image_decoder, seed=one.user, api_name="/create")
    try:
        # Every state it yields, as it comes.
        for *_, status in job:
            if one.began != one.began and status["stage"] in _RUNNING:
                one.began = time.monotonic() - began
        pictures, *_, status = job.result(timeout=timeout)
        if status["stage"] != "done":
            one.problem = f"{status['stage']}: {status['message']}"
        else:
            picture = httpx.get(pictures[0]["image"]["url"], timeout=60).raise_for_status()
            PIL.Image.open(io.BytesIO(picture.content)).load()
    except Exception as error:
        one.problem = f"{type(error).__name__}: {error}"
    one.ended = time.monotonic() - began


def summarise(sent: list[Sent]) -> dict[str, Any]:
    """Figures of requests.

    Returns:
        `dict`: `requests`, `lost` and `problems`; `seconds`; `waiting_seconds` (from sent to having the model) and
        `answer_seconds` as min, median, p95 and max; `overtaken`: by how many later ones a request was passed at most;
        `per_user_median_waiting`: the least and the most favoured user's.
    """
    whole = [one for one in sent if not one.problem]
    ordered = sorted(whole, key=lambda one: one.joined)
    overtaken = [sum(later.began < one.began for later in ordered[index + 1 :]) for index, one in enumerate(ordered)]
    users = {one.user: [other.began - other.joined for other in whole if other.user == one.user] for one in whole}
    medians = [statistics.median(waits) for waits in users.values()]
    return {
        "requests": len(sent),
        "lost": len(sent) - len(whole),
        "problems": sorted({one.problem for one in sent if one.problem}),
        "seconds": round(max((one.ended for one in sent), default=0.0), 2),
        "waiting_seconds": _spread([one.began - one.joined for one in whole]),
        "answer_seconds": _spread([one.ended - one.joined for one in whole]),
        "overtaken": max(overtaken, default=0),
        "per_user_median_waiting": [round(min(medians), 2), round(max(medians), 2)] if medians else [],
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    values = sorted(values)
    p95 = values[min(len(values) - 1, int(0.95 * len(values)))]
    found = {"min": values[0], "median": statistics.median(values), "p95": p95, "max": values[-1]}
    return {name: round(value, 3) for name, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    """The command; returns 1 if requests were lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--image-decoder", default="dida")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # All users of this test have one address, which gets half of the queue.
    server = Server(EMU35_QUEUE_SIZE=str(2 * args.users + 2))
    try:
        result = run_load_test(server, args.users, args.requests, args.image_decoder)
    finally:
        server.close()
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    logger.warning("%s", json.dumps({name: result[name] for name in result if name != "requests_sent"}, indent=2))
    return 1 if result["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
