"""C1 and C2: a step of Adam over 10 M float32 on one core, the core's against torch's. C3: a step of every element-wise
kind, against a copy of as many bytes.

The sides of C1 and C2 are processes that wait for their turn, each in an environment of its own, so that neither has
the other's threads and libraries beside it. They are pinned to the same core, and allowed one thread. So is the one
process of C3 (`every_kind`), which does the copies too. Its ratio is that of the kind that does worst.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import (
    Comparison,
    Plan,
    Result,
    Round,
    Row,
    Sample,
    Unmeasured,
    alternate,
    one_by_one,
    say,
    watch,
)
from benchmarks.processes import ROOT

SIZE = 10_000_000
# Gradient, m, v and parameters are read, the last three written.
BYTES = SIZE * 4 * 7
TURN_SECONDS = 0.8
# C3 has some fifty forms: a turn of each is short, and the machine is watched once a round.
SHORT_TURN_SECONDS = 0.05
SHORT_WATCH_SECONDS = 0.1
WARM_STEPS = 3

OURS, COPY, PASS = "Ravine", "copy", "pass in place"

ROWS = (
    Row(
        "C1",
        "core: Adam, 10 M float32, one thread, compiled",
        "torch fused Adam, one thread",
        "Ravine, compiled",
        "torch, fused",
        at_most=1.0,
    ),
    Row(
        "C2",
        "core: the same in plain NumPy",
        "torch.optim.Adam default, one thread",
        "Ravine, NumPy",
        "torch, default",
        at_most=0.7,
    ),
    Row(
        "C3",
        "core: every element-wise kind, 10 M float32, one thread, compiled; the worst of them",
        "memory traffic at the bandwidth of NumPy's copy",
        OURS,
        COPY,
        at_most=1.5,
    ),
)

_FORMS = {"C1": ("compiled", "fused"), "C2": ("numpy", "default")}
_PEERS = Path(__file__).parent / "peers"
_PYTHON = _PEERS / ".venv" / "bin" / "python"


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: (_compare_kinds if row.code == "C3" else _compare)(row, plan))


def _compare(row: Row, plan: Plan) -> Comparison:
    ours, theirs = _FORMS[row.code]
    if not _PYTHON.exists():
        raise Unmeasured("torch is not installed: `make bench-peers` makes an environment for it (gigabytes)")
    with (
        answering(row.ours, [sys.executable, "-m", "benchmarks.adam", ours, str(SIZE)]) as mine,
        answering(row.theirs, [str(_PYTHON), str(_PEERS / "adam_torch.py"), theirs, str(SIZE)]) as other,
    ):
        first, second = Worker(mine), Worker(other)
        rounds = alternate([first, second], plan.rounds)
        steps = max(first.taken, second.taken)
        for contestant in (first, second):  # the same number for both, so that the parameters can be compared
            contestant.take(steps - contestant.taken)
        left, right = mine.ask("end"), other.ask("end")
    _check(left["probe"], right["probe"])
    remarks = [f"{first.name}: {mine.version}; {second.name}: {other.version}."]
    remarks += [f"{name}: {value:.1f} (not in the ratio)." for name, value in left["extra"].items()]
    remarks.append(f"After {steps} steps both had the same parameters, to 1e-4.")
    return Comparison(row, "ms a step", rounds, remarks)


def _check(ours: list[float], theirs: list[float]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if not math.isclose(mine, other, rel_tol=1e-4, abs_tol=1e-6):
            raise Unmeasured(f"the two do not compute the same: {mine} and {other}")


class Case(NamedTuple):
    """One of the cases of a row. `size` is what a step moves, in bytes an element; `counts`: the goal is for it too."""

    name: str
    rounds: Sequence[Round]
    size: float
    counts: bool

    def compared(self, row: Row) -> Comparison:
        return Comparison(row, "ms a step", self.rounds)


@dataclass(slots=True)
class Worst(Comparison):
    """The worst of several cases, with all of them."""

    cases: Sequence[Case] = field(default_factory=list)


def slowest(row: Row, cases: Sequence[Case]) -> Case:
    """Of those that count."""
    return max((case for case in cases if case.counts), key=lambda case: case.compared(row).ratio)


def worst(row: Row, unit: str, cases: Sequence[Case], remarks: Sequence[str]) -> Worst:
    return Worst(row, unit, slowest(row, cases).rounds, list(remarks), cases)


def _compare_kinds(row: Row, plan: Plan) -> Worst:
    with answering(OURS, [sys.executable, "-m", "benchmarks.every_kind", str(SIZE)]) as process:
        names = process.said["forms"]
        cases = [_case(row, process, name, plan, name in names) for name in names + process.said["beside"]]
    remarks = [
        f"{slowest(row, cases).name} is the worst of {len(names)} forms. {OURS}: {process.version}.",
        f"The {COPY} is between the halves of an array as large as all that a step touches, its time scaled to the "
        "bytes that the step has to move. It writes memory that it has not read, which the processor may read first; "
        f"that is not counted. The {PASS}, a negation, writes what it has read, as a step does: it is faster, and the "
        "sharper measure.",
        "What is not in the goal is more than one compiled loop: in plain NumPy, slots in bfloat16 are widened and "
        "rounded at random, cautious counts what it keeps, and sophia takes in a diagonal (at every tenth step).",
    ]
    return worst(row, "ms a step", cases, remarks)


def _case(row: Row, process: "Answering", name: str, plan: Plan, counts: bool) -> Case:
    """The contestants take their turns one right after the other, in an order that changes."""
    size = process.ask(f"take {name}")["bytes"]
    contestants = [
        Turns(process, OURS, "apply", size),
        Turns(process, COPY, "copy", size),
        Turns(process, PASS, "pass", size),
    ]
    rounds = []
    for number in range(plan.rounds):
        current = Round()
        state = watch(SHORT_WATCH_SECONDS)
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            current.before[contestant.name] = state
            current.samples[contestant.name] = contestant.turn()
        rounds.append(current)
    case = Case(name, rounds, size / SIZE, counts)
    found = case.compared(row)
    say(f"  {name}: {found.ratio:.2f} ({min(found.ratios):.2f}–{max(found.ratios):.2f})")
    return case


class Answering:
    """A process that answers a line with a line of JSON; `said` is what it said of itself at first."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self._process = process
        self.said = self._answer()
        self.version: str = self.said["version"]

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unmeasured(f"{self.name} has ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unmeasured(f"{self.name} ended with {self._process.wait()}; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Worker:
    """A process that takes steps when asked."""

    def __init__(self, process: Answering) -> None:
        self.name = process.name
        self.taken = 0
        self._process = process
        self.take(WARM_STEPS)
        self._steps = max(1, round(TURN_SECONDS * WARM_STEPS / self.take(WARM_STEPS)))

    def turn(self) -> Sample:
        seconds = self.take(self._steps) / self._steps
        return Sample(1e3 * seconds, {"GB/s moved": BYTES / seconds / 1e9})

    def take(self, steps: int) -> float:
        """Seconds that so many steps took."""
        self.taken += steps
        seconds: float = self._process.ask(str(steps))["seconds"]
        return seconds


class Turns:
    """One of the things that the process of C3 does: steps, copies, passes; `size` is what a step moves, in bytes."""

    def __init__(self, process: Answering, name: str, word: str, size: int) -> None:
        self.name = name
        self._process, self._word, self._size = process, word, size
        self.take(1)
        self._steps = max(1, round(SHORT_TURN_SECONDS / self.take(1)))

    def turn(self) -> Sample:
        seconds = self.take(self._steps) / self._steps
        return Sample(1e3 * seconds, {"GB/s moved": self._size / seconds / 1e9})

    def take(self, steps: int) -> float:
        seconds: float = self._process.ask(f"{self._word} {steps}")["seconds"]
        return seconds


@contextlib.contextmanager
def answering(name: str, command: list[str]) -> Iterator[Answering]:
    core = max(os.sched_getaffinity(0))
    single = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    quiet = {"PYTHONWARNINGS": "ignore:Failed to initialize NumPy"}  # torch misses it, and needs it for nothing here
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | single | quiet, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        os.sched_setaffinity(process.pid, {core})
        try:
            yield Answering(name, process)
        finally:
            process.kill()
