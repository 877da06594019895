"""C1 and C2: a step of Adam over 10 M float32 on one core, the core's against torch's.

Both sides are processes that wait for their turn, each in an environment of its own, so that neither has the other's
threads and libraries beside it. They are pinned to the same core, and allowed one thread.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Comparison, NotRun, Plan, Result, Row, Sample, Unmeasured, alternate, say
from benchmarks.processes import ROOT

SIZE = 10_000_000
# Gradient, m, v and parameters are read, the last three written.
BYTES = SIZE * 4 * 7
TURN_SECONDS = 0.8
WARM_STEPS = 3

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
)

_FORMS = {"C1": ("compiled", "fused"), "C2": ("numpy", "default")}
_PEERS = Path(__file__).parent / "peers"
_PYTHON = _PEERS / ".venv" / "bin" / "python"


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    for row in ROWS:
        if row.code in rows:
            say(f"{row.code}: {row.case}, against {row.against}")
            try:
                yield _compare(row, plan)
            except Unmeasured as reason:
                yield NotRun(row, str(reason))


def _compare(row: Row, plan: Plan) -> Comparison:
    ours, theirs = _FORMS[row.code]
    if not _PYTHON.exists():
        raise Unmeasured("torch is not installed: `make bench-peers` makes an environment for it (gigabytes)")
    with (
        worker(row.ours, [sys.executable, "-m", "benchmarks.adam", ours, str(SIZE)]) as first,
        worker(row.theirs, [str(_PYTHON), str(_PEERS / "adam_torch.py"), theirs, str(SIZE)]) as second,
    ):
        rounds = alternate([first, second], plan.rounds)
        steps = max(first.taken, second.taken)
        for contestant in (first, second):  # the same number for both, so that the parameters can be compared
            contestant.take(steps - contestant.taken)
        left, right = first.end(), second.end()
    _check(left["probe"], right["probe"])
    remarks = [f"{first.name}: {first.version}; {second.name}: {second.version}."]
    remarks += [f"{name}: {value:.1f} (not in the ratio)." for name, value in left["extra"].items()]
    remarks.append(f"After {steps} steps both had the same parameters, to 1e-4.")
    return Comparison(row, "ms a step", rounds, remarks)


def _check(ours: list[float], theirs: list[float]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if not math.isclose(mine, other, rel_tol=1e-4, abs_tol=1e-6):
            raise Unmeasured(f"the two do not compute the same: {mine} and {other}")


class Worker:
    """A process that takes steps when asked."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self.taken = 0
        self._process = process
        self.version: str = self._answer()["version"]
        self.take(WARM_STEPS)
        self._steps = max(1, round(TURN_SECONDS * WARM_STEPS / self.take(WARM_STEPS)))

    def turn(self) -> Sample:
        seconds = self.take(self._steps) / self._steps
        return Sample(1e3 * seconds, {"GB/s moved": BYTES / seconds / 1e9})

    def take(self, steps: int) -> float:
        """Seconds that so many steps took."""
        self.taken += steps
        seconds: float = self._ask(str(steps))["seconds"]
        return seconds

    def end(self) -> dict[str, Any]:
        return self._ask("end")

    def _ask(self, line: str) -> dict[str, Any]:
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


@contextlib.contextmanager
def worker(name: str, command: list[str]) -> Iterator[Worker]:
    core = max(os.sched_getaffinity(0))
    single = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    quiet = {"PYTHONWARNINGS": "ignore:Failed to initialize NumPy"}  # torch misses it, and needs it for nothing here
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | single | quiet, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        os.sched_setaffinity(process.pid, {core})
        try:
            yield Worker(name, process)
        finally:
            process.kill()
