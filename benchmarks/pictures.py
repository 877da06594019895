"""The results as pictures, one for each group of rows: how far each ratio is from its goal, and latencies."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.bars import Bar, Missing, Panel, chart
from benchmarks.measure import Comparison, Grid, Held, NotRun, Result, Row

SHORTEST = 28  # letters of a reason that a line has room for


class Group(NamedTuple):
    """The rows of one picture, and the file that it is in."""

    file: str
    title: str
    codes: Sequence[str]


GROUPS = (
    Group("core.svg", "The core: a step in one thread", ("C1", "C2", "C3")),
    Group("steps.svg", "Small and large steps over HTTP", ("S1", "S2", "L1", "L2")),
    Group("workers.svg", "Many workers, many readers, many replicas", ("P1", "P2", "F1", "R1")),
    Group("memory.svg", "Memory", ("M1", "M1R", "M2", "M2P")),
    Group("latency.svg", "Latency under load", ("LS", "LL", "H1", "O1")),
)


def draw(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """File -> title and SVG, of the groups that have any of the `results`."""
    found = {}
    for group in GROUPS:
        if panels := list(_panels([result for result in results if result.row.code in group.codes])):
            found[group.file] = (group.title, chart(group.title, panels))
    return found


def write(results: Sequence[Result], directory: Path) -> dict[str, str]:
    """Place, as RESULTS.md links to it, -> title."""
    directory.mkdir(exist_ok=True)
    drawn = draw(results)
    for file, (_, picture) in drawn.items():
        (directory / file).write_text(picture)
    return {f"{directory.name}/{file}": title for file, (title, _) in drawn.items()}


def _panels(results: Sequence[Result]) -> Iterator[Panel]:
    for head, smaller in (
        ("Ratio to the goal; greater is better", False),
        ("Ratio to the goal; smaller is better", True),
    ):
        lines = [line for result in results if (result.row.at_most is not None) == smaller for line in _lines(result)]
        if lines:
            yield Panel(head, lines)
    for result in results:
        if isinstance(result, Grid):
            yield from _further(result)
        if isinstance(result, Held) and not result.row.holds:
            yield Panel(f"{result.row.code}: {_shortened(result.row.case, 100)}", list(_amounts(result)), False, "ms")


def _further(result: Grid) -> Iterator[Panel]:
    """What else the cells are held against. There is no goal for it."""
    row = result.row
    for what in dict.fromkeys(what for cell in result.cells for what in cell.also):
        bars = []
        for cell in result.cells:
            if what in cell.also:
                ratios = cell._replace(against=cell.also[what]).compared(row, result.unit).ratios
                low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
                told = f"{middle:.2f} ({low:.2f}–{high:.2f}), {cell.also[what]}"
                bars.append(Bar(f"{row.code}, {cell.name}", middle, low, high, told))
        yield Panel(f"{row.code}: ratio to {what} (no goal)", bars, False, "×")


def _lines(result: Result) -> Iterator[Bar | Missing]:
    """What is held against a goal."""
    row = result.row
    if isinstance(result, NotRun):
        yield Missing(row.code, _shortened(result.reason, SHORTEST))
    elif isinstance(result, Grid):
        for cell in result.cells:
            yield _bar(cell.compared(row, result.unit), f"{row.code}, {cell.name}")
    elif isinstance(result, Comparison):
        yield _bar(result, f"{row.code} ({row.theirs}: 1)")


def _bar(result: Comparison, label: str) -> Bar:
    row, ratios = result.row, result.ratios
    goal = _goal(row)
    met = row.met(result.ratio)
    told = f"{result.ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f}), {row.goal} {'met' if met else 'missed'}"
    return Bar(label, result.ratio / goal, min(ratios) / goal, max(ratios) / goal, told, met)


def _goal(row: Row) -> float:
    found = row.at_most if row.at_most is not None else row.at_least
    if not found:
        raise ValueError(f"{row.code} has no goal")
    return found


def _amounts(result: Held) -> Iterator[Bar]:
    """Each percentile of each case."""
    for case, samples in result.figures.items():
        columns: Mapping[str, list[float]] = {result.unit: [sample.value for sample in samples]} | {
            name: [sample.beside[name] for sample in samples] for name in samples[0].beside if name in _PERCENTILES
        }
        for name, values in columns.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            yield Bar(
                f"{case}, {name.removesuffix(' ms')}", middle, low, high, f"{middle:.3g} ms ({low:.3g}–{high:.3g})"
            )


_PERCENTILES = ("p99 ms", "p99.9 ms")


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
