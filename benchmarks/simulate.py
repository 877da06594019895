"""Larger systems than there are here, reckoned from what one process was measured to cost: a discrete-event simulation.

    python -m benchmarks.simulate            held against what was measured, and a table for more processes and nodes

Steps of S1's kind arrive at random moments (Poisson, whatever becomes of them), each on one of many sessions. What is
simulated is what the service is built of (docs/architecture.md, "Commands to the store"):

- **W processes.** A session is at home in one, by a hash of its id. Each is one thread that works in turns. A turn
  takes what came since the last one: requests, which it reads and checks, and replies of the store, which it applies
  and answers. It costs `turn` once, `request` for each request and `reply` for each reply of the store. At its end all
  commits that it asked for go out together, as one pipeline for each node; no more than AT_ONCE pipelines of a process
  are under way at a node, and what comes meanwhile goes with the next.
- **A session** has one commit under way. What arrives for it meanwhile is one commit together, when that one is back.
- **N store nodes.** A session lies on one. Each is one thread that serves pipelines as they come: `pipeline` once, and
  `command` for each commit.
- Nothing else takes time, but `wire` seconds each way between client and process.

Every process and every node has a core for itself. Costs are those of `scale.json`; with a cluster a step costs the
service what it was measured to cost more there, where its turns have a pipeline for each node. What is not in it is
whatever else a machine does: other processes on the same cores, the collector, the disk, the log rewritten. So p99
comes out lower than it is measured; by how much, for one process, is printed first.

The same seed gives the same figures. What can be worked out by hand is held against it in tests/test_simulate.py.
"""

import argparse
import heapq
import json
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "scale.json"
# As service/link.py has it.
AT_ONCE = 2
# Of a step's cost in the service, the part before the store; docs/performance.md has HTTP, parsing and checking there.
BEFORE = 0.6
SEED = 7
ARRIVALS = 40_000
SESSIONS = 4_096
WORKERS, NODES = (1, 2, 4, 8, 16, 32), (1, 2, 4)
PLANNED = 0.8
_SETTLING = 0.1


class Costs(NamedTuple):
    """Seconds. `together`: commits of one turn share a pipeline, as the service sends them; else each has its own."""

    turn: float
    request: float
    reply: float
    pipeline: float
    command: float
    wire: float = 0.0
    together: bool = True

    @property
    def step(self) -> float:
        """Of a process, however many share a turn."""
        return self.request + self.reply


@dataclass(frozen=True)
class System:
    """`sessions` are spread over `workers` and `nodes` at random, by `seed`."""

    costs: Costs
    workers: int = 1
    nodes: int = 1
    sessions: int = SESSIONS


class Found(NamedTuple):
    """Latencies in seconds, as shares of the time the busiest process and the busiest node were at work, and the steps
    that shared a turn and a pipeline, in the mean.
    """

    rate: float
    mean: float
    p50: float
    p99: float
    process: float
    node: float
    a_turn: float
    a_pipeline: float


@dataclass
class _Session:
    """Steps by the moments at which they were sent."""

    process: "_Process"
    node: "_Node"
    busy: bool = False
    waiting: list[float] = field(default_factory=list)


class _Commit(NamedTuple):
    session: _Session
    steps: Sequence[float]


@dataclass
class _Process:
    requests: list[tuple[_Session, float]] = field(default_factory=list)
    replies: list[_Commit] = field(default_factory=list)
    at_work: bool = False
    worked: float = 0.0
    turns: int = 0
    # By node: what waits to be sent, and pipelines under way.
    unsent: "dict[_Node, list[_Commit]]" = field(default_factory=lambda: defaultdict(list))
    out: "dict[_Node, int]" = field(default_factory=lambda: defaultdict(int))


@dataclass(eq=False)
class _Node:
    queue: "deque[tuple[_Process, list[_Commit]]]" = field(default_factory=deque)
    at_work: bool = False
    worked: float = 0.0
    pipelines: int = 0


class Simulation:
    """Steps at `rate` a second, whatever becomes of them; or of so many `clients`, each of which sends its next with
    the reply to the one before.

    Events are (moment, number, what, argument) on a heap; the number keeps those of one moment in order.
    """

    def __init__(
        self, system: System, *, rate: float = 0.0, clients: int = 0, arrivals: int = ARRIVALS, seed: int = SEED
    ) -> None:
        self._random = random_ = random.Random(seed)
        self._costs = system.costs
        self._processes = [_Process() for _ in range(system.workers)]
        self._nodes = [_Node() for _ in range(system.nodes)]
        self._sessions = [
            _Session(random_.choice(self._processes), random_.choice(self._nodes)) for _ in range(system.sessions)
        ]
        self._numbers = count()
        self._events: list[tuple[float, int, Any, Any]] = []
        self._latencies: list[float] = []
        self._now = moment = 0.0
        self._left = arrivals - clients if clients else 0
        for _ in range(clients or arrivals):
            moment += random_.expovariate(rate) if rate else 0.0
            self._sent(moment)

    def run(self) -> Found:
        """What is found of all but the first tenth of the steps."""
        while self._events:
            self._now, _, what, argument = heapq.heappop(self._events)
            what(argument)
        counted = self._latencies[int(_SETTLING * len(self._latencies)) :]
        ordered, steps = sorted(counted), len(self._latencies)
        return Found(
            rate=steps / self._now,
            mean=sum(counted) / len(counted),
            p50=ordered[int(0.5 * (len(ordered) - 1))],
            p99=ordered[int(0.99 * (len(ordered) - 1))],
            process=max(process.worked for process in self._processes) / self._now,
            node=max(node.worked for node in self._nodes) / self._now,
            a_turn=steps / sum(process.turns for process in self._processes),
            a_pipeline=steps / sum(node.pipelines for node in self._nodes),
        )

    def _at(self, moment: float, what: Any, argument: Any) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), what, argument))

    def _sent(self, moment: float) -> None:
        self._at(moment + self._costs.wire, self._arrives, (self._random.choice(self._sessions), moment))

    def _answer(self, commit: _Commit) -> None:
        commit.session.busy = False
        answered = self._now + self._costs.wire
        for sent in commit.steps:
            self._latencies.append(answered - sent)
            if self._left:
                self._left -= 1
                self._sent(answered)

    def _arrives(self, step: tuple[_Session, float]) -> None:
        process = step[0].process
        process.requests.append(step)
        self._turn(process)

    def _turn(self, process: _Process) -> None:
        """Begins one, if there is something to do and none is under way."""
        if process.at_work or not (process.requests or process.replies):
            return
        requests, process.requests = process.requests, []
        replies, process.replies = process.replies, []
        costs = self._costs
        answered = sum(len(commit.steps) for commit in replies)
        lasts = costs.turn + costs.request * len(requests) + costs.reply * answered
        process.at_work = True
        process.worked += lasts
        process.turns += 1
        self._at(self._now + lasts, self._turned, (process, requests, replies))

    def _turned(self, done: tuple[_Process, list[tuple[_Session, float]], list[_Commit]]) -> None:
        process, requests, replies = done
        process.at_work = False
        touched: list[_Session] = []
        for commit in replies:
            self._answer(commit)
            touched.append(commit.session)
        for session, sent in requests:
            session.waiting.append(sent)
            touched.append(session)
        for session in touched:
            if session.waiting and not session.busy:
                process.unsent[session.node].append(_Commit(session, session.waiting))
                session.busy, session.waiting = True, []
        for node in list(process.unsent):
            self._send(process, node)
        self._turn(process)

    def _send(self, process: _Process, node: _Node) -> None:
        commits = process.unsent[node]
        if not self._costs.together:
            for commit in commits:
                self._enqueue(process, node, [commit])
            del process.unsent[node]
        elif commits and process.out[node] < AT_ONCE:
            process.out[node] += 1
            del process.unsent[node]
            self._enqueue(process, node, commits)

    def _enqueue(self, process: _Process, node: _Node, commits: list[_Commit]) -> None:
        node.queue.append((process, commits))
        self._serve(node)

    def _serve(self, node: _Node) -> None:
        if node.at_work or not node.queue:
            return
        process, commits = node.queue.popleft()
        lasts = self._costs.pipeline + self._costs.command * len(commits)
        node.at_work = True
        node.worked += lasts
        node.pipelines += 1
        self._at(self._now + lasts, self._served, (node, process, commits))

    def _served(self, done: tuple[_Node, _Process, list[_Commit]]) -> None:
        node, process, commits = done
        node.at_work = False
        process.replies += commits
        if self._costs.together:
            process.out[node] -= 1
            self._send(process, node)
        self._serve(node)
        self._turn(process)


# -- from what was measured --------------------------------------------------------------------------------------------


def costs_of(found: Mapping[str, Any]) -> Costs:
    """Of one process on one store. Raises KeyError where scale.json lacks what it goes by.

    A step that is alone takes two turns, its request's and its reply's, and makes one pipeline: `turn` is half of what
    a pipeline's turns were measured to cost. What its latency has beyond all costs is `wire`, twice.
    """
    service, store = found["requests"]["service"], found["requests"]["store"]
    alone = found["requests"]["points"][0]
    spent = alone["service µs"] + alone["store µs"]
    return Costs(
        turn=service["a turn µs"] / 2e6,
        request=BEFORE * service["a step µs"] / 1e6,
        reply=(1 - BEFORE) * service["a step µs"] / 1e6,
        pipeline=store["a turn µs"] / 1e6,
        command=store["a step µs"] / 1e6,
        wire=max(0.0, 1e3 * alone["p50 ms"] - spent) / 2e6,
    )


def cluster_costs_of(found: Mapping[str, Any]) -> Costs:
    """The same where the store is a cluster, of as many nodes as were measured or more: what a step costs the service
    beyond one on a store of its own, at as many clients. A node is what a store by itself is.
    """
    single = found["requests"]["points"][-1]
    most = max((name for name in found["cluster"] if name.isdigit()), key=int)
    more = max(0.0, found["cluster"][most]["service µs"] - single["service µs"]) / 1e6
    costs = costs_of(found)
    return costs._replace(request=costs.request + more)


class Compared(NamedTuple):
    what: str
    unit: str
    measured: float
    simulated: float

    @property
    def off(self) -> float:
        return self.simulated / self.measured - 1


def compared(found: Mapping[str, Any]) -> list[Compared]:
    """One process, as it was measured and as it is simulated: the same clients, sessions and rates."""
    system = System(costs_of(found), sessions=64)
    rows = []
    for point in found["requests"]["points"]:
        simulated = Simulation(system, clients=point["connections"]).run()
        what = f"closed loop, {point['connections']} clients"
        rows.append(Compared(what, "steps/s", point["steps/s"], simulated.rate))
        rows.append(Compared(what, "CPU µs a step", point["service µs"], 1e6 * simulated.process / simulated.rate))
        rows.append(Compared(what, "p50 ms", point["p50 ms"], 1e3 * simulated.p50))
        rows.append(Compared(what, "p99 ms", point["p99 ms"], 1e3 * simulated.p99))
    for share, point in found["delays"]["shares"].items():
        simulated = Simulation(system, rate=point["steps/s"]).run()
        what = f"open loop, {100 * float(share):g} % of the top rate"
        rows.append(Compared(what, "p50 ms", point["p50 ms"], 1e3 * simulated.p50))
        rows.append(Compared(what, "p99 ms", point["p99 ms"], 1e3 * simulated.p99))
    return rows


class Reckoned(NamedTuple):
    """`top` in steps a second, of 32 clients for each process; `p99` in seconds at PLANNED of it."""

    workers: int
    nodes: int
    top: float
    p99: float
    process: float
    node: float

    @property
    def bound(self) -> str:
        return "the processes" if self.process >= self.node else "the store"


def reckoned(found: Mapping[str, Any], clients: int = 32, arrivals: int = ARRIVALS) -> list[Reckoned]:
    """More processes and nodes, each with a core."""
    rows = []
    for nodes in NODES:
        costs = costs_of(found) if nodes == 1 else cluster_costs_of(found)
        for workers in WORKERS:
            system = System(costs, workers, nodes)
            top = Simulation(system, clients=clients * workers, arrivals=arrivals).run()
            planned = Simulation(system, rate=PLANNED * top.rate, arrivals=arrivals).run()
            rows.append(Reckoned(workers, nodes, top.rate, planned.p99, top.process, top.node))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.simulate", description="Systems larger than this machine.")
    parser.add_argument("--figures", type=Path, default=FILE, help="what `make scale` measured")
    found = json.loads(parser.parse_args().figures.read_text())
    print(costs_of(found), cluster_costs_of(found), sep="\n")
    for row in compared(found):
        print(f"{row.what}: measured {row.measured:,.4g} {row.unit}, simulated {row.simulated:,.4g}, {row.off:+.0%}")
    for each in reckoned(found):
        print(
            f"{each.workers} processes, {each.nodes} nodes: {each.top:,.0f} steps/s, p99 at {PLANNED:.0%}: "
            f"{1e3 * each.p99:.2f} ms; {each.bound} first ({each.process:.0%}, {each.node:.0%})"
        )


if __name__ == "__main__":
    main()
