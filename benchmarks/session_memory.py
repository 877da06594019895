"""M2: what a large session takes in the service's memory while nobody uses it. M2P: at the peak of its steps.

In each round a session is made, stepped and deleted again. Memory is that of the process, less what it had before the
session was there, and is held against the session's own `state_bytes`: parameters and slots. Before the first round a
session that does not count has had the optimizer compiled, and whatever else a process takes for its first one.

Arrays are given back to the system when nobody has used them for two seconds (service/recycling.py), so at rest is
three seconds after the last step. The peak is that of STEPS steps in a row, what is written behind them included; the
client is another process.
"""

import json
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass

from benchmarks import processes
from benchmarks.large_steps import COMPILE_SECONDS, Client, Request, gradient, safetensors, session
from benchmarks.measure import Comparison, NotRun, Plan, Result, Round, Row, Sample, Unmeasured, say, watch
from benchmarks.processes import Server, call

SIZE, STEPS = 10_000_000, 8
REST_SECONDS = 3

REST, PEAK, STATE = "at rest", "peak of a step", "parameters and slots"

ROWS = (
    Row(
        "M2",
        f"memory of the service for a session of {SIZE // 10**6} M float32, Adam, {REST_SECONDS} s after its last step",
        STATE,
        REST,
        STATE,
        at_most=1.3,
    ),
    Row("M2P", "the same at the peak of its steps, parameters back", STATE, PEAK, STATE, at_most=2.0),
)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    wanted = [row for row in ROWS if row.code in rows]
    for row in wanted:
        say(f"{row.code}: {row.case}, against {row.against}")
    try:
        rounds, remarks = _measure(plan)
    except Unmeasured as reason:
        yield from (NotRun(row, str(reason)) for row in wanted)
        return
    yield from (Comparison(row, "MB", rounds, list(remarks)) for row in wanted)


def _measure(plan: Plan) -> tuple[list[Round], list[str]]:
    directory = plan.directory / "M2"
    directory.mkdir()
    rounds = []
    with processes.service(directory) as server:
        use = Use(server, safetensors(gradient(SIZE)))
        use.once()
        server.wait_for(r"(compiled) ", COMPILE_SECONDS)
        use.once()
        empty = processes.resident_memory(server.pid)
        for number in range(plan.rounds):
            idle = watch()
            samples = use.once()
            rounds.append(Round(samples, dict.fromkeys(samples, idle)))
            figures = ", ".join(f"{name} {sample.value:.4g}" for name, sample in samples.items())
            say(f"  round {number + 1} of {plan.rounds}: {figures} (idle before: {idle.idle:.0f} %)")
        after = processes.resident_memory(server.pid)
    remarks = [
        f"Memory of the service without a session: {empty / 2**20:.0f} MiB before the rounds, {after / 2**20:.0f} MiB "
        "after them."
    ]
    return rounds, remarks


@dataclass
class Use:
    """The life of a session: made, given parameters, stepped, left alone, deleted."""

    server: Server
    file: bytes
    left: int = 0  # bytes of the process after the last session

    def once(self) -> dict[str, Sample]:
        """MB, by what it is."""
        server = self.server
        before = self.left or self._rest()
        processes.forget_peak(server.pid)
        path = session(server, SIZE)
        made = processes.peak_memory(server.pid) - before
        self._steps(path, STEPS)
        self._rest()
        processes.forget_peak(server.pid)
        self._steps(path, STEPS)
        server.settle()
        peak = processes.peak_memory(server.pid) - before
        rest = self._rest() - before
        found = json.loads(call(server.url, "GET", path))
        if found["step"] != 2 * STEPS:
            raise Unmeasured(f"{2 * STEPS} steps were answered, the store has {found['step']}")
        call(server.url, "DELETE", path)
        self.left = self._rest()
        left = {"left after it was deleted": (self.left - before) / 1e6}
        return {
            REST: Sample(rest / 1e6, left),
            PEAK: Sample(peak / 1e6, {"peak while it was made, and its parameters sent": made / 1e6}),
            STATE: Sample(found["state_bytes"] / 1e6, {}),
        }

    def _steps(self, path: str, count: int) -> None:
        with closing(Client(self.server.url, Request(f"{path}/steps", self.file))) as client:
            for _ in range(count):
                if (reply := client.exchange()).status != 200:
                    raise Unmeasured(f"a step was answered {reply.status}")

    def _rest(self) -> int:
        """Bytes of the process once it has given back what it does not need."""
        self.server.settle()
        time.sleep(REST_SECONDS)
        return processes.resident_memory(self.server.pid)
