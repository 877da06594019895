"""The results as a page of Markdown, and the ratios of the page before, so that what was lost shows."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from benchmarks.core_rows import Worst
from benchmarks.measure import Cell, Comparison, Grid, Held, Idle, NotRun, Result, Round, Sample

# A ratio that got worse by more than this is pointed out.
LOSS = 0.10
_LINE = re.compile(r"^\| (\w+) \|.*\| \*\*([0-9.]+)\*\* ", re.MULTILINE)


def earlier(page: str) -> dict[str, float]:
    """Row -> its ratio on a page that `render` made."""
    return {code: float(ratio) for code, ratio in _LINE.findall(page)}


def render(
    machine: dict[str, str],
    results: Sequence[Result],
    before: Mapping[str, float],
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The whole page. `before` are the ratios of the last run, by row; `pictures` are titles by the file's place."""
    compared = [result for result in results if isinstance(result, Comparison)]
    parts = [
        "# Results",
        "Made by `make bench`; how to read it is in [README.md](README.md). Figures are of one run on one machine: "
        "compare the ratios, not the figures beside them.",
        "\n".join(f"- {name}: {text}" for name, text in (machine | _idleness(compared)).items()),
        _table(results, before),
        *_losses(compared, before),
        *[f"![{title}]({place})" for place, title in pictures.items()],
        *[_part(result) for result in results if not isinstance(result, NotRun)],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _part(result: Comparison | Held) -> str:
    if isinstance(result, Held):
        return _held(result)
    if isinstance(result, Worst):
        return _worst(result)
    return _grid(result) if isinstance(result, Grid) else _details(result)


def _idleness(results: Iterable[Comparison]) -> dict[str, str]:
    states = [state for result in results for turn in _rounds(result) for state in turn.before.values()]
    return {"Idle CPU before the turns": _idle(states)} if states else {}


def _rounds(result: Comparison) -> list[Round]:
    if isinstance(result, Worst):
        return [turn for case in result.cases for turn in case.rounds]
    if isinstance(result, Grid):
        return [turn for cell in result.cells for turn in cell.rounds]
    return list(result.rounds)


def _idle(states: Sequence[Idle]) -> str:
    idle = [state.idle for state in states]
    text = f"median {statistics.median(idle):.0f} %, lowest {min(idle):.0f} %"
    stolen = max(state.stolen for state in states)
    return text + (f"; up to {stolen:.0f} % stolen by the host" if stolen >= 1 else "")


def _table(results: Sequence[Result], before: Mapping[str, float]) -> str:
    lines = ["| | case | against | ratio (lowest–highest) | goal | met | last run |", "|---|---|---|---|---|---|---|"]
    for result in results:
        row = result.row
        last = f"{before[row.code]:.2f}" if row.code in before else "–"
        if isinstance(result, NotRun):
            lines.append(
                f"| {row.code} | {row.case} | {row.against} | not run: {result.reason} | {row.goal} | – | {last} |"
            )
            continue
        if isinstance(result, Held):
            told = ("held", "yes") if row.holds else (f"[figures](#{row.code.lower()})", "–")
            lines.append(f"| {row.code} | {row.case} | {row.against} | {told[0]} | {row.goal} | {told[1]} | – |")
            continue
        ratios = result.ratios
        shown = f"**{result.ratio:.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"
        met = "yes" if row.met(result.ratio) else "no"
        lines.append(f"| {row.code} | {row.case} | {row.against} | {shown} | {row.goal} | {met} | {last} |")
    return "\n".join(lines)


def _losses(results: Iterable[Comparison], before: Mapping[str, float]) -> Iterable[str]:
    for result in results:
        code, ratio = result.row.code, result.ratio
        if code not in before or not before[code]:
            continue
        worse = ratio / before[code] - 1 if result.row.at_most is not None else before[code] / ratio - 1
        if worse > LOSS:
            yield f"**{code} lost {100 * worse:.0f} % since the last run**, from {before[code]:.2f} to {ratio:.2f}."


def _details(result: Comparison) -> str:
    row = result.row
    names = (row.ours, row.theirs)
    beside: dict[str, None] = {}  # keeps the order
    for turn in result.rounds:
        for name in names:
            beside.update(dict.fromkeys(turn.samples[name].beside))
    lines = [f"| {row.code}, median (lowest–highest) | {row.ours} | {row.theirs} |", "|---|---|---|"]
    values = [_spread([turn.samples[name].value for turn in result.rounds]) for name in names]
    lines.append(f"| {result.unit} | {values[0]} | {values[1]} |")
    for figure in beside:
        found = [[turn.samples[name].beside.get(figure) for turn in result.rounds] for name in names]
        shown = [_spread([value for value in column if value is not None]) for column in found]
        lines.append(f"| {figure} | {shown[0]} | {shown[1]} |")
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result.ratios)
    states = [turn.before[name] for turn in result.rounds for name in names]
    remarks = [f"Ratio round by round: {ratios}.", f"Idle CPU before the turns: {_idle(states)}.", *result.remarks]
    return "\n".join([f"## {row.code}", "", *lines, "", *[f"- {remark}" for remark in remarks]])


def _worst(result: Worst) -> str:
    """A line for every case. The columns of ratios have all contestants but ours."""
    row, ours = result.row, result.row.ours
    others = [name for name in result.rounds[0].samples if name != ours]
    others.sort(key=lambda name: name != row.theirs)
    heads = [row.code, *[f"ratio to {name}" for name in others], result.unit]
    heads += [*result.rounds[0].samples[ours].beside, "bytes an element"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in result.cases:
        samples = [turn.samples for turn in case.rounds]
        cells = [case.name if case.counts else f"{case.name} (not in the goal)"]
        cells += [_spread([each[ours].value / each[name].value for each in samples]) for name in others]
        cells.append(_spread([each[ours].value for each in samples]))
        cells += [_spread([each[ours].beside[figure] for each in samples]) for figure in samples[0][ours].beside]
        lines.append(f"| {' | '.join([*cells, _number(case.size)])} |")
    states = [state for turn in _rounds(result) for state in turn.before.values()]
    remarks = [f"Idle CPU before the rounds: {_idle(states)}.", *result.remarks]
    return "\n".join(
        [f"## {row.code}", "", "Medians (lowest–highest).", "", *lines, "", *[f"- {remark}" for remark in remarks]]
    )


def _grid(result: Grid) -> str:
    """A line for every cell with the rates, then the figures beside them, a line for every contestant of a cell."""
    row = result.row
    names = list(dict.fromkeys(name for cell in result.cells for name in _samples(cell)))
    lines = [
        f"| {row.code}, {result.unit} | ratio to the best | the best | {' | '.join(names)} |",
        "|---" * (len(names) + 3) + "|",
    ]
    every = [samples[0] for cell in result.cells for samples in _samples(cell).values()]
    figures = list(dict.fromkeys(figure for sample in every for figure in sample.beside))
    beside = [f"| {row.code}, beside | contestant | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
    for cell in result.cells:
        samples = _samples(cell)
        rates = [_spread([each.value for each in samples.get(name, ())]) for name in names]
        ratio = _spread(cell.compared(row, result.unit).ratios)
        lines.append(f"| {cell.name} | {ratio} | {cell.against} | {' | '.join(rates)} |")
        for name, found in samples.items():
            cells = [_spread([each.beside[f] for each in found if f in each.beside]) for f in figures]
            beside.append(f"| {cell.name} | {name} | {' | '.join(cells)} |")
    states = [state for turn in _rounds(result) for state in turn.before.values()]
    remarks = [f"Idle CPU before the turns: {_idle(states)}.", *result.remarks]
    head = [f"## {row.code}", "", "Medians (lowest–highest).", ""]
    return "\n".join([*head, *lines, "", *beside, "", *[f"- {remark}" for remark in remarks]])


def _samples(cell: Cell) -> dict[str, list[Sample]]:
    alternated = {name: [turn.samples[name] for turn in cell.rounds] for name in sorted(cell.rounds[0].samples)}
    return alternated | {name: list(samples) for name, samples in cell.apart.items()}


def _held(result: Held) -> str:
    names = list(result.figures)
    figures = list(dict.fromkeys(f for samples in result.figures.values() for f in samples[0].beside))
    lines = [f"| {result.row.code}, median (lowest–highest) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    values = [_spread([sample.value for sample in result.figures[name]]) for name in names]
    lines.append(f"| {result.unit} | {' | '.join(values)} |")
    for figure in figures:
        cells = [_spread([s.beside[figure] for s in result.figures[name] if figure in s.beside]) for name in names]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    remarks = [f"Idle CPU before the turns: {_idle(result.before)}.", *result.remarks]
    return "\n".join([f"## {result.row.code}", "", *lines, "", *[f"- {remark}" for remark in remarks]])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{_number(statistics.median(values))} ({_number(min(values))}–{_number(max(values))})"


def _number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
