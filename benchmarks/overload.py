"""O1: steps sent at twice the rate that the service can carry, at its default settings, by an open loop.

What can be carried is measured in each round, for it changes with the machine: the steps a second of CARRIED clients
in a closed loop, enough to keep the service busy, on the same sessions; the median of TRIES. Then steps are sent at
multiples of that, the same for both turns of the round, however late the replies are (`open_loop.py`). What is compared
is the 99th percentile of the latency of those that are accepted: at twice the rate, and at SHARE of it. At the rate
itself there is nothing to compare with: where requests come at random moments, a queue that is served as fast as they
come grows without end. Four fifths is about what one would plan a service for. A turn is TIMES as long as those of
other rows: a hundredth of a short one is so little time that a single pause (a snapshot, something else that the
machine does) would be its p99.

A row fails where anything but 200 and 503 is told, a request gets no reply, or what was accepted is not in the store.
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks import processes
from benchmarks.measure import Comparison, Plan, Result, Row, Sample, Unmeasured, alternate, one_by_one
from benchmarks.open_loop import WARM_SECONDS
from benchmarks.processes import Server, call
from benchmarks.small_steps import SESSIONS, SIZE, body

CARRIED, CARRIED_SECONDS, TRIES = 32, 2, 3
TIMES = 2
# Of twice what can be carried half cannot be. Where next to nothing was refused, it was not that much.
REFUSED, LEAST_REFUSED = "refused, %", 20.0
OVER, SHARE = 2.0, 0.8
TWICE, WITHIN = "at twice the rate", f"at {SHARE:g} of it"

ROWS = (
    Row(
        "O1",
        f"p99 of the steps that are accepted, sent at {OVER:g} times the rate that can be carried (open loop)",
        f"the same at {SHARE:g} of that rate",
        TWICE,
        WITHIN,
        at_most=3.0,
    ),
)

_CARRIED = re.compile(r"figures seconds=(\S+) accepted=(\d+) refused=(\d+) broken=(\d+) cpu=(\S+) ")
_FIGURES = re.compile(
    r"figures seconds=(\S+) accepted=(\d+) refused=(\d+) failed=(\d+) p50=(\S+) p99=(\S+) refusal=(\S+) "
    r"late=(\S+) cpu=(\S+) sent=(\d+) stepped=(\d+) p999=(\S+)"
)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Comparison:
    directory = plan.directory / row.code
    directory.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(processes.service(directory))
        target = Target(server, TIMES * plan.seconds)
        crowds = [Crowd(TWICE, target, OVER), Crowd(WITHIN, target, SHARE)]
        for crowd in crowds:
            crowd.turn()
        before = processes.peak_memory(server.pid)
        rounds = alternate(crowds, plan.rounds)
        after = processes.peak_memory(server.pid)
        over = [turn.samples[TWICE].beside[REFUSED] for turn in rounds]
        if statistics.median(over) < LEAST_REFUSED:
            raise Unmeasured(
                f"{statistics.median(over):.0f} % were refused at what was taken for twice the rate: it was not"
            )
        remarks = [
            f"Memory of the service at its peak: {before / 2**20:.0f} MiB after one turn of each, "
            f"{after / 2**20:.0f} MiB at the end."
        ]
    return Comparison(row, "p99 ms", rounds, remarks)


@dataclass
class Target:
    """The service, and the sessions on it."""

    server: Server
    seconds: int
    paths: list[str] = field(init=False)
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
        ids = [json.loads(call(self.server.url, "POST", "/v1/sessions", given))["id"] for _ in range(SESSIONS)]
        self.paths = [f"/v1/sessions/{id_}/steps" for id_ in ids]

    def steps(self) -> int:
        return sum(json.loads(call(self.server.url, "GET", path.removesuffix("/steps")))["step"] for path in self.paths)

    def carried(self, clients: int = CARRIED) -> tuple[float, float]:
        """Steps a second of so many clients in a closed loop, and what these take of a core, in percent."""
        found = self._run("closed_loop", _CARRIED, str(clients), str(CARRIED_SECONDS))
        if int(found[3]) or int(found[4]) or not int(found[2]):
            raise Unmeasured(f"a closed loop of {clients} clients was refused, or broke off: {found[0]}")
        return int(found[2]) / float(found[1]), 100 * float(found[5]) / float(found[1])

    def rate(self, number: int) -> float:
        """What can be carried, as it was found for turns of that number; one after the other."""
        if number == len(self.rates):
            self.rates.append(statistics.median(self.carried()[0] for _ in range(TRIES)))
        return self.rates[number]

    def send(self, rate: float) -> "re.Match[str]":
        return self._run("open_loop", _FIGURES, f"{rate:.1f}", str(self.seconds))

    def _run(self, module: str, figures: "re.Pattern[str]", *arguments: str) -> "re.Match[str]":
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", self.server.url, *arguments, body().decode(), *self.paths],
            cwd=processes.ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = figures.search(done.stdout)
        if found is None:
            raise Unmeasured(f"{module} said nothing: {done.stdout.strip()} {done.stderr[-300:]}")
        return found


@dataclass
class Crowd:
    """A contestant: so many times what can be carried."""

    name: str
    target: Target
    times: float
    turns: int = 0

    def turn(self) -> Sample:
        target = self.target
        carried = target.rate(self.turns)
        self.turns += 1
        target.server.settle()
        steps, before = target.steps(), target.server.usage()
        found = target.send(self.times * carried)
        after = target.server.settle()
        seconds, accepted, refused, failed = float(found[1]), int(found[2]), int(found[3]), int(found[4])
        stepped = target.steps() - steps
        if failed or not accepted:
            raise Unmeasured(f"{self.name}: {found[0]}")
        if stepped != int(found[11]):
            raise Unmeasured(f"{self.name}: {found[11]} steps were answered, {stepped} were taken")
        beside = {"p50 ms": float(found[5]), "carried/s": carried, "sent/s": (accepted + refused) / seconds}
        beside |= {"accepted/s": accepted / seconds, REFUSED: 100 * refused / (accepted + refused)}
        beside |= {"refused after, ms": float(found[7]), "sent late, p99 ms": float(found[8])}
        beside["server CPU, µs each"] = 1e6 * (after.server - before.server) / int(found[10])
        beside["client busy, %"] = 100 * float(found[9]) / (WARM_SECONDS + seconds)
        return Sample(float(found[6]), beside)
