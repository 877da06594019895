"""H1: steps by 32 clients while thousands of others hold connections that they do not use, or hardly.

The same load as S1, alone and beside the others (`others.py`), in turns on one server. What is compared is the 99th
percentile of the latency: whoever is slow or silent may cost memory, but must not cost those who work their time.
"""

import contextlib
import json
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks import processes
from benchmarks.measure import Comparison, Plan, Result, Row, Sample, Unmeasured, alternate, one_by_one
from benchmarks.processes import Server, call
from benchmarks.small_steps import SESSIONS, SIZE, WARM_SECONDS, Load

IDLE, SLOW = 5_000, 500
HELD_SECONDS = 60.0
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

_FIGURES = re.compile(r"figures held=(\d+) made=(\d+)")


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

    return Load("Ravine", server, [f"/v1/sessions/{id_}/steps" for id_ in ids], seconds, count)


@dataclass
class Stepping:
    """A contestant: the load, with so many others beside it."""

    name: str
    load: Load
    idle: int = 0
    slow: int = 0

    def turn(self) -> Sample:
        with _others(self.load.server, self.load.paths[0], self.idle, self.slow) as held:
            requests, seconds, p50, p99 = self.load.send(self.load.seconds)
        self.load.server.settle()
        beside = {"p50 ms": p50, "requests/s": requests / seconds}
        if held:
            beside |= {"others held": held[0], "of them made anew": held[1] - held[0]}
        return Sample(p99, beside)


@contextlib.contextmanager
def _others(server: Server, path: str, idle: int, slow: int) -> Iterator[list[int]]:
    """Gives a list that has, afterwards, how many others there were, and how many connections they made."""
    told: list[int] = []
    if not idle and not slow:
        yield told
        return
    command = [sys.executable, "-m", "benchmarks.others", server.url, path, str(idle), str(slow)]
    process = subprocess.Popen(command, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        _await_held(process)
        yield told
        process.terminate()
        said = process.communicate(timeout=HELD_SECONDS)[0]
    finally:
        process.kill()
        process.wait()
    found = _FIGURES.search(said)
    if found is None or int(found[1]) < LEAST_HELD * (idle + slow):
        raise Unmeasured(f"of {idle + slow} others not all were held: {said.strip()}")
    told += map(int, found.groups())


def _await_held(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    deadline = time.monotonic() + HELD_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if select.select([process.stdout], [], [], 0.1)[0]:
            if process.stdout.readline().strip() == "held":
                return
            break
    raise Unmeasured(f"the others were not there within {HELD_SECONDS:g} s")
