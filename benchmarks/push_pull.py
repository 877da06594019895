"""P1: workers push gradients and pull parameters, through Ravine and through what else there is for it.

Every contestant is a process that starts its own server and workers and speaks the lines of `peers/contestant`; all of
a size are up at once, and take turns. Each is first asked for the parameters after the same few gradients, which are
held against Adam's arithmetic in float64: what is compared computes the same. At the end the steps that its server
took are held against what its workers sent.

The ratio is to the best peer of each cell, and the row's the worst of the cells. Some peers are as fast as they are
because all is on one machine; beside it stands the ratio to the best of those whose server and workers talk as they
would from machine to machine, as Ravine's do. What is far from the best of a size, and would need all of the memory
beside the others, takes a single turn alone.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import processes
from benchmarks.core_rows import Answering
from benchmarks.large_steps import COMPILE_SECONDS, MEDIA, new_session, safetensors
from benchmarks.measure import (
    Cell,
    Plan,
    Result,
    Round,
    Row,
    Sample,
    Unmeasured,
    alternate,
    best,
    grid,
    one_by_one,
    say,
)
from benchmarks.peers.contestant import SCALES, gradient
from benchmarks.processes import ROOT, Server, call
from core.evaluate import WORTH_COMPILING

WORKERS = (1, 2, 4, 8)
ROUNDS = 5
ANSWER_SECONDS = 180
END_SECONDS = 10
# What is below this share of the best need not take its turns with the others.
FAR = 0.7
# How much longer than the others' a window may get, on a machine that is not idle, until something ends within it.
LONGEST = 10

RAVINE, RAY, FLOWER, HIVEMIND = "Ravine", "Ray actor", "Flower FedAdam", "hivemind"
RPC, RPC_TCP = "torch RPC", "torch RPC over TCP"
# What those are the best of whose server could be on another machine; and what Ray sends in the call, by TCP.
ELSEWHERE = "the best that could be elsewhere"
RAY_SENDS_BYTES = 100 * 1024


class Size(NamedTuple):
    """`warm` and `share` are seconds before the window, and its length as a share of a turn's; `apart`: see above."""

    name: str
    count: int
    warm: float
    share: float
    apart: Sequence[str]


SIZES = (
    Size("10 K", 10_000, 0.2, 0.25, (HIVEMIND,)),
    Size("1 M", 1_000_000, 0.3, 0.25, (HIVEMIND,)),
    Size("10 M", 10_000_000, 0.8, 0.625, (HIVEMIND, FLOWER)),
)

ROWS = (
    Row(
        "P1",
        "1, 2, 4, 8 workers push gradients and pull parameters, 10 K, 1 M, 10 M float32, server-side Adam, durably; "
        "the worst of the cells",
        "the best of Ray actor, torch RPC, Flower's FedAdam and hivemind in it, in memory",
        RAVINE,
        RAY,
        at_least=2.0,
    ),
)

# Not among those that the goal names, and so not in the ratio.
_NOT_IN_GOAL = (RPC_TCP,)
_PEERS = Path(__file__).parent / "peers"
_PYTHON = _PEERS / ".venv" / "bin" / "python"
_MODULES = {
    RAY: ("ray_actor",),
    RPC: ("torch_rpc",),
    RPC_TCP: ("torch_rpc", "tcp"),
    FLOWER: ("flower_fedadam",),
    HIVEMIND: ("hivemind_averaging",),
}


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Result:
    if not _PYTHON.exists():
        raise Unmeasured("the peers are not installed: `make bench-peers` makes an environment for them (gigabytes)")
    remarks: dict[str, None] = {}
    cells: list[Cell] = []
    for size in SIZES:
        directory = plan.directory / f"P1-{size.count}"
        directory.mkdir()
        cells += _cells(size, plan._replace(directory=directory), remarks)
    return grid(row, "round trips/s", cells, list(remarks))


def _cells(size: Size, plan: Plan, remarks: dict[str, None]) -> list[Cell]:
    """All cells of one size. A peer that fails is left out, with a remark; a failure of ours is raised."""
    apart: dict[str, dict[int, list[Sample]]] = {}
    for name in size.apart:
        try:
            apart[name] = _alone(name, size, plan, remarks)
        except Unmeasured as reason:
            remarks[f"{name}, {size.name}: not run: {reason}."] = None
    with ExitStack() as stack:
        contestants = [_ravine(stack, size, plan)]
        for name in _MODULES:
            if name not in size.apart:
                try:
                    contestants.append(_peer(stack, name, size, plan))
                except Unmeasured as reason:
                    remarks[f"{name}, {size.name}: not run: {reason}."] = None
        if not _named(contestants):
            raise Unmeasured("no peer runs")
        cells = [_cell(size, workers, contestants, apart, remarks) for workers in WORKERS]
        for contestant in contestants:
            remarks[contestant.end()] = None
    return cells


def _named(contestants: "Sequence[Pushing]") -> bool:
    """Whether there is any of those that the goal names."""
    return any(each.name not in (RAVINE, *_NOT_IN_GOAL) for each in contestants)


def _alone(name: str, size: Size, plan: Plan, remarks: dict[str, None]) -> dict[int, list[Sample]]:
    """The sample of a contestant that runs by itself, by the number of workers."""
    say(f"  {size.name}, {name} alone")
    with ExitStack() as stack:
        contestant = _peer(stack, name, size, plan)
        found = {}
        for workers in WORKERS:
            if workers == 1 and name == HIVEMIND:  # which is for several
                continue
            contestant.workers = workers
            found[workers] = [contestant.turn()]
        remarks[contestant.end()] = None
    return found


def _cell(
    size: Size,
    workers: int,
    contestants: "list[Pushing]",
    apart: Mapping[str, Mapping[int, Sequence[Sample]]],
    remarks: dict[str, None],
) -> Cell:
    name = f"{size.name}, {workers} worker{'s' if workers > 1 else ''}"
    say(f"  {name}")
    while True:
        for contestant in contestants:
            contestant.workers = workers
        try:
            rounds = alternate(contestants, ROUNDS)
        except Failed as failure:
            contestants.remove(failure.contestant)
            if failure.contestant.name == RAVINE or not _named(contestants):
                raise
            remarks[f"{failure.contestant.name}, from {name} on: not run: {failure}."] = None
        else:
            break
    peers = [contestant.name for contestant in contestants if contestant.name != RAVINE]
    beside = {other: samples[workers] for other, samples in apart.items() if workers in samples}
    remote = [peer for peer in peers if could_be_elsewhere(peer, size)]
    also = {ELSEWHERE: best(rounds, remote)} if remote else {}
    against = best(rounds, [peer for peer in peers if peer not in _NOT_IN_GOAL])
    if near := _near(against, rounds, beside):
        raise Unmeasured(f"{name}: {near} is near the best, and has to take its turns with the others")
    if near := _near(also.get(ELSEWHERE, against), rounds, beside):
        remarks[f"{name}: {near}, which took its turn alone, is near {ELSEWHERE}."] = None
    return Cell(name, against, rounds, beside, also)


def _near(best_one: str, rounds: Sequence[Round], apart: Mapping[str, Sequence[Sample]]) -> str:
    """One of those that took their turns alone, and is not far from this one; or nothing."""
    least = min(turn.samples[best_one].value for turn in rounds)
    return next((name for name, samples in apart.items() if samples[0].value > FAR * least), "")


def could_be_elsewhere(peer: str, size: Size) -> bool:
    """Whether what it sends would go the same way if its server were on another machine."""
    return peer not in (RPC, RAY) or (peer == RAY and 4 * size.count < RAY_SENDS_BYTES)


class Failed(Unmeasured):
    """A contestant gave up."""

    def __init__(self, contestant: "Pushing", reason: str) -> None:
        super().__init__(reason)
        self.contestant = contestant


@dataclass(eq=False)
class Pushing:
    """A contestant. `service` is Ravine's server, which is not a child of the process that answers."""

    name: str
    answering: Answering
    process: "subprocess.Popen[str]"
    size: Size
    seconds: float
    service: Server | None = None
    workers: int = 1
    members: list[processes.Child] = field(default_factory=list)

    def turn(self) -> Sample:
        self._signal(signal.SIGCONT)
        try:
            return self._turn()
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, what: signal.Signals) -> None:
        """Peers stand still in the turns of others: some of them spin while they wait. Ravine does not."""
        if self.service is None:
            for member in processes.family(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, what)

    def _turn(self) -> Sample:
        before, length, everything, started = self._spent(), self.seconds, 0, time.monotonic()
        while True:
            said = self._ask(f"turn {self.workers} {self.size.warm} {length:g}")
            everything += said["all"]
            if said["count"]:
                break
            if length > LONGEST * self.seconds:
                raise Failed(self, f"no round trip ended within {length:g} s")
            length *= 4
        seconds, worked = time.monotonic() - started, self._spent()["workers"] - before["workers"]
        if self.service is not None:
            self.service.settle()
        after = self._spent()
        beside = {
            f"{who} CPU, ms a round trip": 1e3 * (after[who] - before[who]) / everything
            for who in ("server", "store", "workers")
            if who in after
        }
        return Sample(said["count"] / said["seconds"], beside | {"workers busy, % of a core": 100 * worked / seconds})

    def _spent(self) -> dict[str, float]:
        """CPU seconds. Of the peers, all that is not the server counts as workers: Ray's daemons do."""
        if not self.members:
            self.members = processes.family(self.process.pid)
        every = processes.cpu_seconds(self.members)
        if self.service is not None:
            used = self.service.usage()
            return {"server": used.server, "store": used.store, "workers": every}
        server = self.answering.said["server"]
        if server is None:
            return {"workers": every}
        own = processes.cpu_seconds(member for member in self.members if member.pid == server)
        return {"server": own, "workers": every - own}

    def check(self, path: Path) -> None:
        """Raises Unmeasured unless the parameters are those of Adam's arithmetic."""
        self._ask(f"check {path}")
        found = np.fromfile(path, "<f4")
        path.unlink()
        wanted = expected(self.size.count, flower=self.name == FLOWER)
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-5, atol=1e-8):
            raise Failed(self, "it does not compute Adam's steps")

    def end(self) -> str:
        """A remark. Raises Unmeasured where the server took another number of steps than the workers sent."""
        self._signal(signal.SIGCONT)
        said = self._ask("end")
        if said["pushed"] != said["steps"]:
            raise Failed(self, f"{said['pushed']} gradients were sent, and {said['steps']} taken")
        return f"{self.name}: {self.answering.version}."

    def _ask(self, line: str) -> dict[str, Any]:
        timer = threading.Timer(ANSWER_SECONDS, self.process.kill)
        timer.start()
        try:
            return self.answering.ask(line)
        except Unmeasured as reason:
            raise Failed(self, str(reason)) from None
        finally:
            timer.cancel()


def expected(size: int, *, flower: bool) -> np.ndarray:
    """(size,) float64: the parameters, from zeros, after `SCALES` times the gradient by Adam with its defaults.

    Flower's correction of bias is one step ahead, and its epsilon stands beside the uncorrected root of v.
    """
    g = gradient(size).astype(np.float64)
    x, m, v = np.zeros(size), np.zeros(size), np.zeros(size)
    for step, scale in enumerate(SCALES, 1):
        m = 0.9 * m + 0.1 * scale * g
        v = 0.999 * v + 0.001 * (scale * g) ** 2
        t = step + 1 if flower else step
        root = math.sqrt(1 - 0.999**t)
        eps = 1e-8 if flower else 1e-8 * root
        x -= 1e-3 * root / (1 - 0.9**t) * m / (np.sqrt(v) + eps)
    return x


def _peer(stack: ExitStack, name: str, size: Size, plan: Plan) -> Pushing:
    # Paths of Unix sockets are short, and Ray puts a good deal behind this one.
    directory = plan.directory / str(list(_MODULES).index(name))
    directory.mkdir()
    module, *options = _MODULES[name]
    command = [str(_PYTHON), "-W", "ignore", "-m", f"benchmarks.peers.{module}", str(size.count), str(max(WORKERS))]
    command += [str(directory), *options]
    return _started(stack, name, command, size, plan)


def _ravine(stack: ExitStack, size: Size, plan: Plan) -> Pushing:
    server = stack.enter_context(processes.service(plan.directory))
    session = new_session(server, size.count)
    call(server.url, "PUT", session + "/params", safetensors(np.zeros(size.count)), MEDIA)
    command = [sys.executable, "-m", "benchmarks.http_workers", str(size.count), str(max(WORKERS)), server.url, session]
    found = _started(stack, RAVINE, command, size, plan, server)
    if size.count >= WORTH_COMPILING:
        server.wait_for(r"(compiled) ", COMPILE_SECONDS)
    return found


def _started(
    stack: ExitStack, name: str, command: Sequence[str], size: Size, plan: Plan, service: Server | None = None
) -> Pushing:
    process = stack.enter_context(_process(command))
    timer = threading.Timer(ANSWER_SECONDS, process.kill)
    timer.start()
    try:
        answering = Answering(name, process)
    finally:
        timer.cancel()
    found = Pushing(name, answering, process, size, plan.seconds * size.share, service)
    found.check(plan.directory / "check")
    found._signal(signal.SIGSTOP)
    return found


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """What it started ends with it: by itself where it can, by force where it does not."""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            members = processes.family(process.pid)
            for member in members:  # what stands still cannot end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                process.communicate(timeout=END_SECONDS)
            processes.end_all(members)
