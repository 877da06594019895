"""What the process takes: while one large step is under way, and with more sessions than it may hold."""

import contextlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.running import Server, serving
from tests.wire import SAFETENSORS, create, step

MIB = 1024 * 1024

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def memory(pid: int, field: str) -> int:
    """`VmRSS` or `VmHWM` of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")


@pytest.mark.parametrize(("kind", "slots"), [("sgd", 0), ("adam", 2)])
def test_a_large_step_takes_less_than_three_times_its_body(data: Path, kind: str, slots: int) -> None:
    size = 1_000_000
    body = 4 * size
    g = {"w": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    # NumPy throughout: the compiler's own memory would count otherwise.
    with serving(data, environment={"RAVINE_JIT": "false"}) as server, server.client() as client:
        small = create(client, optimizer=kind, params={"w": [1.0]})["id"]
        assert step(client, small, {"w": np.ones(1, np.float32)}).status_code == 200
        before = memory(server.pid, "VmRSS")
        session = create(client, optimizer=kind, shapes={"w": [size]})["id"]
        zeros = safetensors.numpy.save({"w": np.zeros(size, np.float32)})
        path = f"/v1/sessions/{session}/params"
        assert client.put(path, content=zeros, headers=SAFETENSORS).status_code == 200
        peaks = []
        for _ in range(12):
            Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak starts anew
            assert step(client, session, g).status_code == 200
            # What the session itself takes, parameters and slots, is no part of the step.
            peaks.append((memory(server.pid, "VmHWM") - before - (1 + slots) * body) / body)
    print(f"{kind}: beyond the session, in bodies: {[round(peak, 2) for peak in peaks]}")
    assert sorted(peaks)[len(peaks) // 2] < 3
    # Every few steps a snapshot is written beside the step, from a copy of the slots.
    assert max(peaks) < 3 + slots


BUDGET = 16 * MIB


def in_parallel(server: Server, calls: Sequence[tuple[str, str]], width: int = 4) -> list[tuple[int, Any]]:
    """Status and JSON of the replies to all `calls`, each a path and a body, on `width` connections."""
    todo = list(enumerate(calls))
    replies: dict[int, tuple[int, Any]] = {}

    def work() -> None:
        connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        while todo:
            with contextlib.suppress(IndexError):
                i, (path, body) = todo.pop()
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                replies[i] = reply.status, json.loads(reply.read())
        connection.close()

    with ThreadPoolExecutor(width) as pool:
        list(pool.map(lambda _: work(), range(width)))
    return [replies[i] for i in range(len(calls))]


@pytest.mark.parametrize("sessions", [3_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_thousands_of_sessions_within_the_budget(data: Path, sessions: int) -> None:
    """Of which it holds fifteen hundred."""
    body = json.dumps({"optimizer": "adam", "params": {"w": [0.5] * 10}})
    gradients = json.dumps({"gradients": {"w": [1.0] * 10}, "return": "none"})
    with serving(data, "--memory", "16MiB", environment={"RAVINE_JIT": "false"}) as server:
        warm = [reply["id"] for _, reply in in_parallel(server, [("/v1/sessions", body)] * 50)]
        in_parallel(server, [(f"/v1/sessions/{id_}/steps", gradients) for id_ in warm])
        base = memory(server.pid, "VmRSS")  # what the process has, whatever it holds
        made = in_parallel(server, [("/v1/sessions", body)] * sessions)
        assert {status for status, _ in made} == {201}
        paths = [f"/v1/sessions/{reply['id']}/steps" for _, reply in made]
        assert len(set(paths)) == sessions
        first = in_parallel(server, [(path, gradients) for path in paths])
        assert {(status, reply["step"]) for status, reply in first} == {(200, 1)}
        again = in_parallel(server, [(path, gradients) for path in paths[::10]])
        assert {(status, reply["step"]) for status, reply in again} == {(200, 2)}
        held = memory(server.pid, "VmRSS")
    print(f"base {base / MIB:.1f} MiB, with {sessions} sessions {held / MIB:.1f} MiB")
    assert held <= base + BUDGET
