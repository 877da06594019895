"""O1: as many clients as there may be requests in flight, and twice as many.

Whoever comes beyond the limit is refused at once, so that those who were let in should wait no longer than they would
have anyway: the 99th percentile of their latency is compared. What they are refused with is counted beside.
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks import processes
from benchmarks.measure import Comparison, Plan, Result, Row, Sample, Unmeasured, alternate, one_by_one
from benchmarks.processes import Server, call
from benchmarks.small_steps import SESSIONS, SIZE, body

# Requests in flight. The default would take more clients than one process can be: what is left in the kernel's buffers
# while the service is busy is not in flight yet.
LIMIT = 128
TWICE, ONCE = "twice as many", "at the limit"

ROWS = (
    Row(
        "O1",
        f"p99 of the steps that are accepted, {2 * LIMIT} clients in a closed loop",
        f"the same with {LIMIT}, as many as there may be requests in flight (RAVINE_MAX_REQUESTS)",
        TWICE,
        ONCE,
        at_most=3.0,
    ),
)

_FIGURES = re.compile(
    r"figures seconds=(\S+) accepted=(\d+) refused=(\d+) broken=(\d+) p50=(\S+) p99=(\S+) refusal=(\S+)"
)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Comparison:
    directory = plan.directory / row.code
    directory.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(processes.service(directory, {"RAVINE_MAX_REQUESTS": str(LIMIT)}))
        given = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
        ids = [json.loads(call(server.url, "POST", "/v1/sessions", given))["id"] for _ in range(SESSIONS)]
        paths = [f"/v1/sessions/{id_}/steps" for id_ in ids]
        crowds = [Crowd(TWICE, server, paths, 2 * LIMIT, plan.seconds), Crowd(ONCE, server, paths, LIMIT, plan.seconds)]
        crowds[1].turn()
        rounds = alternate(crowds, plan.rounds)
        remarks = [f"Memory of the service at its peak: {processes.peak_memory(server.pid) / 2**20:.0f} MiB."]
    return Comparison(row, "p99 ms", rounds, remarks)


@dataclass
class Crowd:
    """A contestant: so many clients, each with one request under way."""

    name: str
    server: Server
    paths: list[str]
    clients: int
    seconds: int

    def turn(self) -> Sample:
        before = self.server.usage()
        command = [sys.executable, "-m", "benchmarks.closed_loop", self.server.url, str(self.clients)]
        done = subprocess.run(
            [*command, str(self.seconds), body().decode(), *self.paths],
            cwd=processes.ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = _FIGURES.search(done.stdout)
        if found is None or int(found[4]) or not int(found[2]):
            raise Unmeasured(f"{self.name}: {done.stdout.strip()} {done.stderr[-300:]}")
        seconds, accepted, refused = float(found[1]), int(found[2]), int(found[3])
        after = self.server.settle()
        beside = {"p50 ms": float(found[5]), "accepted/s": accepted / seconds}
        beside["refused, %"] = 100 * refused / (accepted + refused)
        beside["refused after, ms"] = float(found[7])
        beside["server CPU, µs each"] = 1e6 * (after.server - before.server) / (accepted + refused)
        return Sample(float(found[6]), beside)
