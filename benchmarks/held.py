"""H1: steps by 32 clients while thousands of others hold connections that they do not use, or hardly.

The same load as S1, alone and beside the others (`others.py`), in turns on one server. What is compared is the 99th
percentile of the latency: whoever is slow or silent may cost memory, but must not cost those who work their time.

What is measured is what it costs to hold them, so the load begins when the service has answered the idle ones, holds
them all, and has nothing left to do. (When the others have connected, it has yet to take half of them out of the
kernel's queue, which takes a second and is another thing.) The others must not take the processors that the service
needs: what they use is told, and how idle the machine was meanwhile.
"""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes
from benchmarks.measure import Comparison, Plan, Result, Row, Sample, Unmeasured, alternate, one_by_one
from benchmarks.processes import Server, call, child_seconds
from benchmarks.small_steps import SESSIONS, SIZE, WARM_SECONDS, Load

IDLE, SLOW = 5_000, 500
HELD_SECONDS = 90.0
# A hundredth of a short turn is so little time that a single pause would be its p99.
TIMES = 2
# Of the others, some are just being made anew when they are counted.
LEAST_HELD = 0.95

BESIDE, ALONE = "beside the others", "alone"

ROWS = (
    Row(
        "H1",
        f"p99 of JSON steps by 32 clients beside {IDLE:,} idle connections and {SLOW} that send a byte a second",
        "the same steps with nobody beside them",
        BESIDE,
        ALONE,
        at_most=2.0,
    ),
)

_FIGURES = re.compile(r"figures held=(\d+) made=(\d+) anew=(\d+) cpu=(\S+)")


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Comparison:
    if shutil.which("wrk") is None:
        raise Unmeasured("wrk is not installed")
    directory = plan.directory / row.code
    directory.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(processes.service(directory))
        load = _load(server, plan.seconds)
        load.send(WARM_SECONDS)
        rounds = alternate([Stepping(BESIDE, load, IDLE, SLOW), Stepping(ALONE, load)], plan.rounds)
        remarks = [load.verify()]
        remarks.append(f"Memory of the service at its peak: {processes.peak_memory(server.pid) / 2**20:.0f} MiB.")
    return Comparison(row, "p99 ms", rounds, remarks)


def _load(server: Server, seconds: int) -> Load:
    given = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
    ids = [json.loads(call(server.url, "POST", "/v1/sessions", given))["id"] for _ in range(SESSIONS)]

    def count() -> int:
        return sum(json.loads(call(server.url, "GET", f"/v1/sessions/{id_}"))["step"] for id_ in ids)

    return Load("Ravine", server, [f"/v1/sessions/{id_}/steps" for id_ in ids], TIMES * seconds, count)


@dataclass
class Stepping:
    """A contestant: the load, with so many others beside it."""

    name: str
    load: Load
    idle: int = 0
    slow: int = 0

    def turn(self) -> Sample:
        server = self.load.server
        with _others(server, self.load.paths[0], self.idle, self.slow) as told:
            server.settle()
            before, idle_before, client = server.usage(), _idle_seconds(), child_seconds()
            requests, seconds, p50, p99 = self.load.send(self.load.seconds)
            busy = server.usage().server - before.server
            idle, client = _idle_seconds() - idle_before, child_seconds() - client
            if (held := _connections(server)) < LEAST_HELD * (self.idle + self.slow):
                raise Unmeasured(f"the service holds {held:g} connections, and not {self.idle + self.slow}")
        server.settle()
        beside = {"p50 ms": p50, "requests/s": requests / seconds, "server busy, %": 100 * busy / seconds}
        beside["wrk busy, %"] = 100 * client / seconds
        beside["idle, % of all cores"] = 100 * idle / seconds / (os.cpu_count() or 1)
        return Sample(p99, beside | told)


@contextlib.contextmanager
def _others(server: Server, path: str, idle: int, slow: int) -> Iterator[dict[str, float]]:
    """Gives what has, afterwards, the figures that the others tell of themselves."""
    told: dict[str, float] = {}
    if not idle and not slow:
        yield told
        return
    command = [sys.executable, "-m", "benchmarks.others", server.url, path, str(idle), str(slow)]
    process = subprocess.Popen(command, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        _await_held(process)
        since = time.monotonic()
        yield told
        seconds = time.monotonic() - since
        process.terminate()
        said = process.communicate(timeout=HELD_SECONDS)[0]
    finally:
        process.kill()
        process.wait()
    found = _FIGURES.search(said)
    if found is None or int(found[1]) < LEAST_HELD * (idle + slow):
        raise Unmeasured(f"of {idle + slow} others not all were held: {said.strip()}")
    told["others held"] = float(found[1])
    told["others made anew a second"] = float(found[3]) / seconds
    told["others' CPU, % of a core"] = 100 * float(found[4]) / seconds


def _connections(server: Server) -> float:
    """As the service counts them."""
    found = re.search(rb"^ravine_http_connections (\S+)$", call(server.url, "GET", "/metrics"), re.MULTILINE)
    return float(found[1]) if found else 0.0


def _idle_seconds() -> float:
    """Of all cores together, since the machine started (proc(5))."""
    fields = Path("/proc/stat").read_text().split(maxsplit=6)
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def _await_held(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    deadline = time.monotonic() + HELD_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if select.select([process.stdout], [], [], 0.1)[0]:
            if process.stdout.readline().strip() == "held":
                return
            break
    raise Unmeasured(f"the others were not there within {HELD_SECONDS:g} s")
