"""What the process takes for a round of large contributions: it must not grow with the number of workers."""

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.running import Server, serving
from tests.service.test_memory import memory
from tests.wire import SAFETENSORS, create

SIZE = 1_000_000
GRADIENT = 4 * SIZE  # bytes
WORKERS = 8

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # NumPy throughout: the compiler's own memory would count otherwise.
    with serving(tmp_path_factory.mktemp("rounds") / "data", environment={"RAVINE_JIT": "false"}) as running:
        yield running


BODIES = [
    safetensors.numpy.save({"w": np.random.default_rng(i).standard_normal(SIZE).astype(np.float32)})
    for i in range(WORKERS)
]


class Rounds:
    """A session of a million parameters, and its workers; replies bring nothing but the step."""

    def __init__(self, server: Server, kind: str) -> None:
        self.server = server
        with server.client() as client:
            aggregation = {"mode": "sync", "workers": WORKERS}
            made = create(client, optimizer=kind, shapes={"w": [SIZE]}, aggregation=aggregation)
            zeros = safetensors.numpy.save({"w": np.zeros(SIZE, np.float32)})
            self.path = f"/v1/sessions/{made['id']}"
            assert client.put(f"{self.path}/params", content=zeros, headers=SAFETENSORS).status_code == 200
        self.idle = 0
        self.in_turn()  # what the process takes for the first time it keeps
        self.idle = memory(server.pid, "VmRSS")

    def send(self, worker: int, wait: int = 0, start: threading.Barrier | None = None) -> int:
        """One contribution; the status."""
        connection = HTTPConnection(self.server.url.removeprefix("http://"), timeout=60)
        connection.connect()
        if start is not None:
            start.wait()
        headers = SAFETENSORS | ({"Prefer": f"wait={wait}"} if wait else {})
        connection.request("POST", f"{self.path}/steps?worker=w{worker}&return=none", BODIES[worker], headers)
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status

    def in_turn(self) -> list[float]:
        """One contribution after the other; the peak of each above the idle level, in gradients."""
        peaks = []
        for worker in range(WORKERS):
            self.forget_peak()
            assert self.send(worker) == (202 if worker < WORKERS - 1 else 200)
            peaks.append(self.peak())
        return peaks

    def at_once(self) -> float:
        """All together, each waiting for the round; the peak."""
        self.forget_peak()
        start = threading.Barrier(WORKERS)
        with ThreadPoolExecutor(WORKERS) as pool:
            assert set(pool.map(lambda worker: self.send(worker, 60, start), range(WORKERS))) == {200}
        return self.peak()

    def wait_for(self, received: int) -> None:
        """Until the open round has so many contributions."""
        deadline = time.monotonic() + 30
        with self.server.client() as client:
            while client.get(f"{self.path}/rounds/current").json()["received"] < received:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def forget_peak(self) -> None:
        Path(f"/proc/{self.server.pid}/clear_refs").write_text("5")

    def peak(self) -> float:
        return (memory(self.server.pid, "VmHWM") - self.idle) / GRADIENT


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_contributions_in_turn_take_little_more_than_two_gradients(server: Server, kind: str) -> None:
    rounds = Rounds(server, kind)
    peaks = [peak for _ in range(2) for peak in rounds.in_turn()]
    print(f"{kind}: peaks above the idle level, in gradients: {[round(peak, 2) for peak in peaks]}")
    assert max(peaks) < 2.6  # 3 with a body that is still there when the round is closed


def test_contributions_at_once_take_their_bodies_and_the_sum(server: Server) -> None:
    """Bodies that are under way all at once are there all at once; beside them there is the round, and no copy."""
    rounds = Rounds(server, "sgd")
    peaks = [rounds.at_once() for _ in range(2)]
    print(f"{WORKERS} at once: peaks above the idle level, in gradients: {[round(peak, 2) for peak in peaks]}")
    assert max(peaks) < WORKERS + 2


def test_workers_that_wait_for_their_round_take_nothing(server: Server) -> None:
    rounds = Rounds(server, "sgd")
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting = [pool.submit(rounds.send, worker, 60) for worker in range(WORKERS - 1)]
        rounds.wait_for(WORKERS - 1)
        held = (memory(server.pid, "VmRSS") - rounds.idle) / GRADIENT
        assert rounds.send(WORKERS - 1) == 200
        assert {future.result() for future in waiting} == {200}
    after = (memory(server.pid, "VmRSS") - rounds.idle) / GRADIENT
    print(f"while {WORKERS - 1} of {WORKERS} wait: {held:.2f} gradients above the idle level; afterwards {after:.2f}")
    assert held < 2  # one is the round's sum
    assert after < 0.5
