"""P2: 1,000 workers on one session of 10,000 parameters, through two replicas, async and sync in turns.

There is nobody to compare with: what must hold is that nothing was lost, nothing counted twice, and that the parameters
are those of a serial replay (`many_workers`). Measured beside: contributions a second, how many of them go into one
commit, and the memory of the replicas and of the store at their peak.

A commit tells the other replicas of itself once, so that the store's count of PUBLISH is that of the commits.
"""

import asyncio
import time
from collections.abc import Awaitable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import redis
import uvloop

from benchmarks import processes
from benchmarks.many_workers import Answers, Broken, Mode, Taken, Workload, contribute, new_session, verify
from benchmarks.measure import Held, Idle, NotRun, Plan, Result, Row, Sample, Unmeasured, alternate, say
from benchmarks.processes import Server, Usage
from service.embedded import Embedded

T = TypeVar("T")

REPLICAS = 2
WORKERS, SIZE = 1_000, 10_000
# Of each worker, over all rounds.
CONTRIBUTIONS, ROUNDS = 20, 5
MODES: tuple[Mode, ...] = ("async", "sync")

ROWS = (
    Row(
        "P2",
        "1,000 workers on one session of 10,000 parameters, 20 contributions each under keys, through two replicas",
        "serial replay",
        "async",
        "sync",
        holds="nothing lost, nothing doubled, the same bits",
    ),
)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    for row in ROWS:
        if row.code in rows:
            say(f"{row.code}: {row.case}, against {row.against}")
            try:
                yield _hold(row, plan)
            except (Unmeasured, Broken) as reason:
                yield NotRun(row, str(reason))


def _hold(row: Row, plan: Plan) -> Held:
    directory = plan.directory / row.code
    directory.mkdir()
    with ExitStack() as stack:
        replicas = [stack.enter_context(processes.replica(directory, number)) for number in range(REPLICAS)]
        store = stack.enter_context(redis.Redis.from_url(Embedded(directory / "service").url, protocol=2))
        crowds = [_crowd(mode, replicas, store) for mode in MODES]
        rounds = alternate(crowds, ROUNDS)
        remarks = [crowd.verify() for crowd in crowds]
        remarks += [crowd.told for crowd in crowds]
        remarks.append(_memory(replicas, int(store.info("server")["process_id"])))
    figures = {crowd.name: [turn.samples[crowd.name] for turn in rounds] for crowd in crowds}
    before: list[Idle] = [state for turn in rounds for state in turn.before.values()]
    return Held(row, "contributions/s", figures, before, remarks)


def _crowd(mode: Mode, replicas: Sequence[Server], store: "redis.Redis") -> "Crowd":
    workload = Workload(mode, WORKERS, SIZE)
    session = _run(new_session(workload, replicas[0].url))
    return Crowd(mode, workload, replicas, store, session, CONTRIBUTIONS // ROUNDS)


@dataclass
class Crowd:
    """A contestant: a session in one mode. Each turn all workers send the same number of contributions."""

    name: str
    workload: Workload
    replicas: Sequence[Server]
    store: "redis.Redis"
    session: str
    each: int
    taken: list[Taken] = field(default_factory=list)
    sent: int = 0
    repeats: int = 0

    def turn(self) -> Sample:
        before, commits, own = self._usage(), self._commits(), time.process_time()
        started = time.perf_counter()
        answers = self._send()
        seconds = time.perf_counter() - started
        client, commits = time.process_time() - own, self._commits() - commits
        for replica in self.replicas:
            replica.settle()
        after, count = self._usage(), len(answers.taken)
        spent = {"replicas": after.server - before.server, "store": after.store - before.store, "client": client}
        latency = sorted(answers.seconds)
        beside = {"contributions per commit": count / commits, "p50 ms": 1e3 * latency[count // 2]}
        beside |= {"p99 ms": 1e3 * latency[99 * count // 100], "client busy, %": 100 * client / seconds}
        return Sample(
            count / seconds, beside | {f"{who} CPU, µs each": 1e6 * cpu / count for who, cpu in spent.items()}
        )

    def _send(self) -> Answers:
        numbers = range(self.sent, self.sent + self.each)
        answers = _run(contribute(self.workload, [replica.url for replica in self.replicas], self.session, numbers))
        self.sent += self.each
        self.taken += answers.taken
        self.repeats += answers.repeats
        return answers

    def _usage(self) -> Usage:
        used = [replica.usage() for replica in self.replicas]
        return Usage(sum(each.server for each in used), sum(each.store for each in used))

    def _commits(self) -> int:
        found = self.store.info("commandstats").get("cmdstat_publish", {"calls": 0})
        return int(found["calls"])

    def verify(self) -> str:
        urls = [replica.url for replica in self.replicas]
        return _run(verify(self.workload, urls, self.session, self.taken))

    @property
    def told(self) -> str:
        return f"{self.name}: each worker sent {self.sent}; {self.repeats} were sent once more, to the other replica."


def _memory(replicas: Sequence[Server], store: int) -> str:
    own = ", ".join(f"{processes.peak_memory(replica.pid) / 2**20:.0f}" for replica in replicas)
    return f"Memory at the peak: replicas {own} MiB, store {processes.peak_memory(store) / 2**20:.0f} MiB."


def _run(awaited: Awaitable[T]) -> T:
    async def main() -> T:
        return await awaited

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
