"""LS and LL: how long the steps of S1 and L1 take at half and at four fifths of the highest rate that is found.

The rate is found first, by clients in a closed loop: the highest of several tries. Then requests are sent at moments
that were drawn beforehand (Poisson), however late the replies are, and the latency counts from these moments, so that
waiting counts: in the service as well as before it. There is nothing to compare with and no goal; the table is for
whoever plans a service.
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from benchmarks import large_open_loop, large_steps, open_loop, processes
from benchmarks.measure import Held, Plan, Result, Row, Sample, Unmeasured, alternate, one_by_one, say
from benchmarks.overload import CARRIED_SECONDS, REFUSED, Target
from benchmarks.processes import Server, call

SHARES = (0.5, 0.8)
TRIES = 3
SMALL_CLIENTS = (32, 64)
# Percentiles are of what was accepted. Where more than this was not, they would be those of a lesser rate.
MOST_REFUSED = 1.0
LARGE_SIZE, LARGE_SESSIONS = 1_000_000, 4
# At L1's rates a turn of a few seconds has too few requests for a 99.9th percentile.
LARGE_TIMES = 3
LARGE_CLIENTS, LARGE_CONNECTIONS = (1, 2, 4), 8

ROWS = (
    Row(
        "LS",
        "latency of S1's steps, sent in an open loop at shares of the highest rate that was found",
        "itself",
        "at 50 %",
        "at 80 %",
    ),
    Row("LL", f"the same of L1's steps, on {LARGE_SESSIONS} sessions", "itself", "at 50 %", "at 80 %"),
)

_FIGURES = re.compile(
    r"figures seconds=(\S+) answered=(\d+) p50=(\S+) p99=(\S+) p999=(\S+) late=(\S+) cpu=(\S+) stepped=(\d+) (\{.*\})"
)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _hold(row, plan))


def _hold(row: Row, plan: Plan) -> Held:
    directory = plan.directory / row.code
    directory.mkdir()
    with processes.service(directory) as server:
        sending: Small | Large = Small(server, plan.seconds) if row.code == "LS" else Large(server, plan.seconds)
        highest, busy = max(sending.highest() for _ in range(TRIES))
        say(f"  the highest rate: {highest:.4g} requests/s")
        contestants = [Sharing(f"at {100 * share:g} %", share * highest, sending.send) for share in SHARES]
        rounds = alternate(contestants, plan.rounds)
    figures = {each.name: [turn.samples[each.name] for turn in rounds] for each in contestants}
    refused = {name: [sample.beside.get(REFUSED, 0.0) for sample in samples] for name, samples in figures.items()}
    for name, shares in refused.items():
        if statistics.median(shares) > MOST_REFUSED:
            raise Unmeasured(
                f"{name} of {highest:,.4g} requests/s {statistics.median(shares):.2g} % were refused: that is not a "
                "rate that can be carried, and the latency of the rest would say nothing"
            )
    least = min(int(sample.beside["requests"]) for samples in figures.values() for sample in samples)
    remarks = [
        f"The highest rate that was found, in a closed loop, was {highest:,.4g} requests/s; the clients took "
        f"{busy:.0f} % of a core.",
        f"Of what was sent in a turn, at most {max(map(max, refused.values())):.2g} % were refused.",
        f"A turn has {least:,} requests or more: "
        + (f"of these {least // 1000:,} are slower than its p99.9." if least >= 1000 else "its p99.9 is its slowest."),
    ]
    return Held(row, "p50 ms", figures, [state for turn in rounds for state in turn.before.values()], remarks)


@dataclass
class Sharing:
    """A contestant: requests at one rate. `send` gives their figures."""

    name: str
    rate: float
    send: Callable[[float], tuple[float, Mapping[str, float]]]

    def turn(self) -> Sample:
        middle, beside = self.send(self.rate)
        return Sample(middle, beside)


class Small:
    """S1's steps, by the clients of O1."""

    def __init__(self, server: Server, seconds: int) -> None:
        self._target = Target(server, seconds)

    def highest(self) -> tuple[float, float]:
        """Steps a second, and what the clients take of a core, in percent: of as many clients as do best."""
        return max(self._target.carried(clients) for clients in SMALL_CLIENTS)

    def send(self, rate: float) -> tuple[float, Mapping[str, float]]:
        target = self._target
        target.server.settle()
        steps = target.steps()
        found = target.send(rate)
        target.server.settle()
        accepted, refused, failed = int(found[2]), int(found[3]), int(found[4])
        if failed or not accepted:
            raise Unmeasured(found[0])
        if target.steps() - steps != int(found[11]):
            raise Unmeasured(f"{found[11]} steps were answered, {target.steps() - steps} were taken")
        beside = {"p99 ms": float(found[6]), "p99.9 ms": float(found[12]), "requests": float(accepted + refused)}
        beside |= {"sent/s": (accepted + refused) / float(found[1]), REFUSED: 100 * refused / (accepted + refused)}
        beside["client busy, %"] = 100 * float(found[9]) / (open_loop.WARM_SECONDS + float(found[1]))
        return float(found[5]), beside | {"sent late, p99 ms": float(found[8])}


class Large:
    """L1's steps. Several sessions, so that one that waits for its turn does not hold all."""

    def __init__(self, server: Server, seconds: int) -> None:
        self._server, self._seconds = server, seconds
        self._stepped = 0
        self._sessions = [large_steps.session(server, LARGE_SIZE) for _ in range(LARGE_SESSIONS)]
        self._closed(LARGE_CLIENTS[-1], 1)
        server.wait_for(r"(compiled) ", large_steps.COMPILE_SECONDS)

    def highest(self) -> tuple[float, float]:
        """The same."""
        return max(self._closed(clients, CARRIED_SECONDS) for clients in LARGE_CLIENTS)

    def send(self, rate: float) -> tuple[float, Mapping[str, float]]:
        found = self._run(rate, LARGE_TIMES * self._seconds, LARGE_CONNECTIONS)
        seconds, count = float(found[1]), int(found[2])
        beside = {"p99 ms": float(found[4]), "p99.9 ms": float(found[5]), "requests": float(count)}
        beside |= {"sent/s": count / seconds, "waited for a connection, p99 ms": float(found[6])}
        return float(found[3]), beside | {"client busy, %": _busy(found)}

    def _closed(self, clients: int, seconds: int) -> tuple[float, float]:
        found = self._run(0.0, seconds, clients)
        return int(found[2]) / float(found[1]), _busy(found)

    def _run(self, rate: float, seconds: int, connections: int) -> "re.Match[str]":
        self._server.settle()
        numbers = [f"{rate:.3f}", str(seconds), str(LARGE_SIZE), str(connections)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.large_open_loop", self._server.url, *numbers, *self._sessions],
            cwd=processes.ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = _FIGURES.search(done.stdout)
        if found is None or found[9] != "{}" or not int(found[2]):
            raise Unmeasured(f"large_open_loop: {done.stdout.strip()} {done.stderr[-300:]}")
        self._stepped += int(found[8])
        taken = sum(json.loads(call(self._server.url, "GET", path))["step"] for path in self._sessions)
        if taken != self._stepped:
            raise Unmeasured(f"{self._stepped} steps were answered, {taken} were taken")
        return found


def _busy(found: "re.Match[str]") -> float:
    """What the clients of large steps take of a core, in percent."""
    return 100 * float(found[7]) / (large_open_loop.WARM_SECONDS + float(found[1]))
