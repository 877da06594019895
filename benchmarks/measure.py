"""Contestants take turns, round by round, and a comparison is the median over rounds of the ratio of two of them.

The ratio is taken within a round, where the machine was nearly the same for both, and not between two medians. The
order of turns is reversed every other round, so that nobody always follows the same neighbour. Before each turn the
machine is watched for a moment: how idle it was says how far to trust the figures.
"""

import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

WATCHED_SECONDS = 0.25


class Unmeasured(Exception):
    """A row has no result; the sentence says why."""


class Plan(NamedTuple):
    """How long to measure. `seconds` is the length of a turn of the server rows; `directory` is for data and logs."""

    rounds: int
    seconds: int
    directory: Path


class Row(NamedTuple):
    """A line of the table. `ours` and `theirs` name contestants; `at_most` or `at_least` is the goal of the ratio.

    A row that compares nothing has `holds` for its goal: what must be so, or it fails. One without any goal is measured
    for its figures.
    """

    code: str
    case: str
    against: str
    ours: str
    theirs: str
    at_most: float | None = None
    at_least: float | None = None
    holds: str = ""

    @property
    def goal(self) -> str:
        if self.holds:
            return self.holds
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return "–" if self.at_least is None else f"≥ {self.at_least:g}"

    def met(self, ratio: float) -> bool:
        above = self.at_least is None or ratio >= self.at_least
        return above and (self.at_most is None or ratio <= self.at_most)


class Sample(NamedTuple):
    """One turn. `value` is what is compared, in the contestant's unit; `beside` are further figures by name."""

    value: float
    beside: Mapping[str, float]


class Contestant(Protocol):
    """`turn` raises Unmeasured where what was measured is not what was meant."""

    @property
    def name(self) -> str: ...

    def turn(self) -> Sample: ...


class Idle(NamedTuple):
    """Shares of all cores' time, in percent: doing nothing, and taken by the host for other machines."""

    idle: float
    stolen: float


@dataclass(slots=True)
class Round:
    samples: dict[str, Sample] = field(default_factory=dict)
    before: dict[str, Idle] = field(default_factory=dict)


@dataclass(slots=True)
class Comparison:
    """A row that was measured. `unit` is that of the samples' values; `remarks` are sentences for the report."""

    row: Row
    unit: str
    rounds: Sequence[Round]
    remarks: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        row = self.row
        return [turn.samples[row.ours].value / turn.samples[row.theirs].value for turn in self.rounds]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


class Cell(NamedTuple):
    """One case of several. `against` is the contestant to beat here; `apart` are those that took their turns alone.

    `also` has further ratios, which are not the row's: what the contestant is the best of, and its name.
    """

    name: str
    against: str
    rounds: Sequence[Round]
    apart: Mapping[str, Sequence[Sample]] = {}
    also: Mapping[str, str] = {}

    def compared(self, row: Row, unit: str) -> Comparison:
        return Comparison(row._replace(theirs=self.against), unit, self.rounds)


@dataclass(slots=True)
class Grid(Comparison):
    """The worst of several cells, with all of them. The greater value is the better one."""

    cells: Sequence[Cell] = ()


def grid(row: Row, unit: str, cells: Sequence[Cell], remarks: Sequence[str]) -> Grid:
    worst = min(cells, key=lambda cell: cell.compared(row, unit).ratio)
    return Grid(row._replace(theirs=worst.against), unit, worst.rounds, list(remarks), cells)


def best(rounds: Sequence[Round], among: Sequence[str]) -> str:
    """The contestant with the greatest median."""
    return max(among, key=lambda name: statistics.median(turn.samples[name].value for turn in rounds))


class Held(NamedTuple):
    """A row that compares nothing: what had to hold, if anything, did. `figures` are samples by the case's name."""

    row: Row
    unit: str
    figures: Mapping[str, Sequence[Sample]]
    before: Sequence[Idle]
    remarks: Sequence[str]


class NotRun(NamedTuple):
    """A row that was not measured, and why."""

    row: Row
    reason: str


Result = Comparison | Held | NotRun


def one_by_one(rows: Sequence[Row], wanted: Collection[str], measure: Callable[[Row], Result]) -> Iterator[Result]:
    """What `measure` gives for each of the `rows` whose code is `wanted`, or why there is nothing."""
    for row in rows:
        if row.code in wanted:
            say(f"{row.code}: {row.case}, against {row.against}")
            try:
                yield measure(row)
            except Unmeasured as reason:
                yield NotRun(row, str(reason))


@dataclass(frozen=True, slots=True)
class Bound:
    """A contestant that is no program: what the others are held against."""

    name: str
    value: float

    def turn(self) -> Sample:
        return Sample(self.value, {})


def alternate(contestants: Sequence[Contestant], rounds: int) -> list[Round]:
    """Every contestant takes a turn in every round."""
    done = []
    for number in range(rounds):
        current = Round()
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            current.before[contestant.name] = watch()
            current.samples[contestant.name] = contestant.turn()
        done.append(current)
        figures = ", ".join(f"{name} {sample.value:.4g}" for name, sample in sorted(current.samples.items()))
        idle = min(state.idle for state in current.before.values())
        say(f"  round {number + 1} of {rounds}: {figures} (idle before: {idle:.0f} %)")
    return done


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def watch(seconds: float = WATCHED_SECONDS) -> Idle:
    """How idle the machine is now, while this process sleeps."""
    before = _ticks()
    time.sleep(seconds)
    spent = [after - earlier for earlier, after in zip(before, _ticks(), strict=True)]
    total = sum(spent) or 1
    return Idle(100 * (spent[3] + spent[4]) / total, 100 * spent[7] / total)


def _ticks() -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal of all cores together (proc(5))."""
    return [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
