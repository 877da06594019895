"""All faults, as often as a run is to have them, and one table of what came of it.

    python -m tests.faults --minutes 40 --seed 7
    python -m tests.faults --minutes 2 --only Valkey --only cut

A scenario (injections.py, outages.py) brings its fault about some dozens of times and checks all that was acknowledged.
Whichever is furthest behind its goal is run next, with a seed of its own, until all are there or the time is over. At
the end comes the negative control: a service that does not look at the head before it writes, which must be found out.

The exit code is 1 if anything was lost, doubled, broken, differed or hung, or if the control was not found out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

import httpx
import redis

from tests.faults import injections, outages
from tests.faults.injections import Scenario
from tests.faults.outcome import Outcome

SCENARIOS: Mapping[str, Scenario] = injections.SCENARIOS | outages.SCENARIOS
FEW = 10  # of what has no goal of its own
GOALS: Mapping[str, int] = {
    **dict.fromkeys(SCENARIOS, FEW),
    **injections.GOALS,
    "failover, stale replica": 25,
    "failover, acknowledged by both": 25,
    "store full": 20,
}
HEADINGS = ("injected", "how often", "lost", "doubled", "chain breaks", "differ", "hangs", "minutes")


class Run:
    """The rows so far, and how long each took. `goals` are how often each is to be brought about."""

    def __init__(self, goals: Mapping[str, int], seed: int) -> None:
        self.goals = goals
        self.rows = {name: Outcome(name, 0) for name in goals}
        self.seconds = dict.fromkeys(goals, 0.0)
        self._seeds = count(seed * 1_000_003)
        self._fruitless = dict.fromkeys(goals, 0)

    def next(self) -> str | None:
        """Who is furthest behind; nobody, if all are there. Who brings nothing about is not asked for ever."""
        behind = {name: self.rows[name].injected / goal for name, goal in self.goals.items()}
        left = [name for name, share in behind.items() if share < 1 and self._fruitless[name] < 2]
        return min(left, key=behind.__getitem__, default=None)

    def bring_about(self, name: str, scenario: Scenario) -> Outcome:
        """One more run of it; its row has what it added."""
        seed, begun = next(self._seeds), time.monotonic()
        made = attempted(name, scenario, seed)
        self.seconds[name] += time.monotonic() - begun
        self._fruitless[name] = 0 if made.injected else self._fruitless[name] + 1
        self.rows[name] = added(self.rows[name], made)
        say(f"{time.monotonic() - begun:6.1f} s  {made}  (seed {seed})")
        return made


def attempted(name: str, scenario: Scenario, seed: int) -> Outcome:
    """What it came to. A scenario that breaks off has shown nothing, and that counts as a hang."""
    with tempfile.TemporaryDirectory(prefix="ravine-faults-", ignore_cleanup_errors=True) as directory:
        try:
            return scenario(Path(directory), seed)._replace(name=name)
        except (
            AssertionError,
            AttributeError,
            LookupError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
            httpx.HTTPError,
            redis.RedisError,
            injections.Stuck,
            subprocess.SubprocessError,
        ):
            traceback.print_exc()
            return Outcome(name, 0, hangs=1)


def added(row: Outcome, made: Outcome) -> Outcome:
    return Outcome(row.name, *(a + b for a, b in zip(row[1:], made[1:], strict=True)))


def faulty(rows: Iterable[Outcome]) -> bool:
    return any(any(row[2:]) for row in rows)


def found_out(row: Outcome) -> bool:
    """Whether the control shows what it must."""
    return row.lost + row.doubled > 0


def table(rows: Iterable[Outcome], seconds: Mapping[str, float]) -> str:
    """The rows under their headings, as wide as they need to be."""
    cells = [HEADINGS, *((*map(str, row), f"{seconds.get(row.name, 0.0) / 60:.1f}") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen(only: Iterable[str]) -> dict[str, Scenario]:
    """The scenarios whose names have one of `only` in them; all of them if it is empty. Raises SystemExit."""
    wanted = [part.lower() for part in only] or [""]
    found = {name: run for name, run in SCENARIOS.items() if any(part in name.lower() for part in wanted)}
    if not found:
        raise SystemExit("no such scenario; there are\n  " + "\n  ".join(SCENARIOS))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description="Faults under load, and what they cost."
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="no scenario is begun after so many (default: 40)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)), help="where the seeds begin")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="scenarios with this in their name")
    given = parser.parse_args()
    scenarios = chosen(given.only)
    say(f"faults for {given.minutes:g} minutes, seed {given.seed}")
    run, deadline = Run({name: GOALS[name] for name in scenarios}, given.seed), time.monotonic() + 60 * given.minutes
    while time.monotonic() < deadline and (name := run.next()) is not None:
        run.bring_about(name, scenarios[name])
    control = attempted(injections.BLIND, injections.blind, given.seed)
    print(table([*run.rows.values(), control], run.seconds))
    if missing := [name for name, row in run.rows.items() if not row.injected]:
        print(f"not brought about: {'; '.join(missing)}")
    if not found_out(control):
        print("the negative control was not found out: this check would not see a lost step either")
    return int(faulty(run.rows.values()) or not found_out(control))


if __name__ == "__main__":
    sys.exit(main())
