"""The records of all rows as a page of Markdown: each with its commit, and what was lost since the one before it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from benchmarks.core_rows import Worst
from benchmarks.measure import Cell, Comparison, Grid, Held, Idle, NotRun, Result, Round, Row, Sample
from benchmarks.records import Record

# A ratio that got worse by more than this is pointed out.
LOSS = 0.10
# Where it is told what the time, or the memory, of a row goes into: a page, and its headings by row.
PROFILES = "../docs/performance.md"
HEADINGS = {
    **dict.fromkeys(("C1", "C2", "C3"), "the-core"),
    **dict.fromkeys(("S1", "S2", "R1", "H1", "O1"), "small-steps"),
    **dict.fromkeys(("L1", "L2", "P1"), "large-steps"),
    "F1": "readers",
    **dict.fromkeys(("M1", "M1R", "M2", "M2P"), "memory"),
}


def render(
    records: Mapping[str, Record], rows: Sequence[Row], pictures: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The whole page. `records` are by the code of `rows`, where there is one; `pictures` are titles by place."""
    found = [records[row.code] for row in rows if row.code in records]
    machine = max(found, key=lambda each: each.when).machine if found else {}
    parts = [
        "# Results",
        "Made by `make bench` from `results.json`; how to read it is in [README.md](README.md). Figures are of one "
        "machine: compare the ratios, not the figures beside them. Rows are measured by themselves, too: when and of "
        "which commit is said in each.",
        "\n".join(f"- {name}: {text}" for name, text in (machine | _idleness(found)).items()),
        _table(records, rows),
        *_losses(found),
        *[f"![{title}]({place})" for place, title in pictures.items()],
        *[_section(each, machine) for each in found],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(record: Record, machine: Mapping[str, str]) -> str:
    """A row's part. What differs from the `machine` at the head of the page is told."""
    result, row = record.result, record.result.row
    said = [f"Measured {record.when}, commit {record.commit}."]
    if other := [f"{name}: {text}" for name, text in record.machine.items() if machine.get(name) != text]:
        said.append(f"Not as above: {'; '.join(other)}.")
    if isinstance(result, Comparison) and not row.met(result.ratio):
        said.append(f"It misses its goal: [what it is spent on]({_profile(row)}).")
    return "\n\n".join([f"## {row.code}", " ".join(said), _figures(result)])


def _profile(row: Row) -> str:
    return f"{PROFILES}#{HEADINGS[row.code]}" if row.code in HEADINGS else PROFILES


def _figures(result: Result) -> str:
    if isinstance(result, NotRun):
        return f"Not run: {result.reason}."
    if isinstance(result, Held):
        return _held(result)
    if isinstance(result, Worst):
        return _worst(result)
    return _grid(result) if isinstance(result, Grid) else _details(result)


def _idleness(records: Iterable[Record]) -> dict[str, str]:
    results = [record.result for record in records]
    states = [state for result in results for state in _states(result)]
    return {"Idle CPU before the turns": _idle(states)} if states else {}


def _states(result: Result) -> list[Idle]:
    if isinstance(result, NotRun):
        return []
    if isinstance(result, Held):
        return list(result.before)
    return [state for turn in _rounds(result) for state in turn.before.values()]


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


def _table(records: Mapping[str, Record], rows: Sequence[Row]) -> str:
    lines = ["| | case | against | ratio (lowest–highest) | goal | met | before |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        shown, met, last = "not measured", "–", "–"
        if row.code in records:
            record = records[row.code]
            row = record.result.row  # as it was when it was measured
            shown, met = _outcome(record.result)
            last = "–" if record.last is None else f"{record.last:.2f}"
        lines.append(f"| {row.code} | {row.case} | {row.against} | {shown} | {row.goal} | {met} | {last} |")
    return "\n".join(lines)


def _outcome(result: Result) -> tuple[str, str]:
    """The ratio, or what there is in its place, and whether the goal is met."""
    row = result.row
    if isinstance(result, NotRun):
        return f"not run: {result.reason}".replace("|", "\\|"), "–"
    if isinstance(result, Held):
        return ("held", "yes") if row.holds else (f"[figures](#{row.code.lower()})", "–")
    ratios = result.ratios
    shown = f"**{result.ratio:.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"
    if isinstance(result, Grid):
        shown += "".join(f"; {ratio:.2f} to {what}" for what, ratio in _also(result).items())
    return shown, "yes" if row.met(result.ratio) else f"[no]({_profile(row)})"


def _also(result: Grid) -> dict[str, float]:
    """What further ratios are to -> the worst of the cells."""
    found: dict[str, float] = {}
    for cell in result.cells:
        for what, name in cell.also.items():
            ratio = cell._replace(against=name).compared(result.row, result.unit).ratio
            found[what] = min(ratio, found.get(what, ratio))
    return found


def _losses(records: Iterable[Record]) -> Iterable[str]:
    for record in records:
        row, ratio, last = record.result.row, record.ratio, record.last
        if not last or not ratio:
            continue
        worse = ratio / last - 1 if row.at_most is not None else last / ratio - 1
        if worse > LOSS:
            yield f"**{row.code} lost {100 * worse:.0f} % since it was measured last**, from {last:.2f} to {ratio:.2f}."


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
    return "\n".join([*lines, "", *[f"- {remark}" for remark in remarks]])


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
    return "\n".join(["Medians (lowest–highest).", "", *lines, "", *[f"- {remark}" for remark in remarks]])


def _grid(result: Grid) -> str:
    """A line for every cell with the rates, then the figures beside them, a line for every contestant of a cell."""
    row = result.row
    names = list(dict.fromkeys(name for cell in result.cells for name in _samples(cell)))
    heads = [f"{row.code}, {result.unit}", "ratio to the best", "the best"]
    further = list(dict.fromkeys(what for cell in result.cells for what in cell.also))
    heads += [head for what in further for head in (f"ratio to {what}", "which")]
    lines = [f"| {' | '.join([*heads, *names])} |", "|---" * (len(heads) + len(names)) + "|"]
    every = [samples[0] for cell in result.cells for samples in _samples(cell).values()]
    figures = list(dict.fromkeys(figure for sample in every for figure in sample.beside))
    beside = [f"| {row.code}, beside | contestant | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
    for cell in result.cells:
        samples = _samples(cell)
        rates = [_spread([each.value for each in samples.get(name, ())]) for name in names]
        against = [cell.against, *[cell.also.get(what, "") for what in further]]
        compared = [head for name in against for head in (_ratio(result, cell, name), name or "–")]
        lines.append(f"| {' | '.join([cell.name, *compared, *rates])} |")
        for name, found in samples.items():
            cells = [_spread([each.beside[f] for each in found if f in each.beside]) for f in figures]
            beside.append(f"| {cell.name} | {name} | {' | '.join(cells)} |")
    states = [state for turn in _rounds(result) for state in turn.before.values()]
    remarks = [f"Idle CPU before the turns: {_idle(states)}.", *result.remarks]
    return "\n".join(["Medians (lowest–highest).", "", *lines, "", *beside, "", *[f"- {remark}" for remark in remarks]])


def _ratio(result: Grid, cell: Cell, against: str) -> str:
    if not against:
        return "–"
    return _spread(cell._replace(against=against).compared(result.row, result.unit).ratios)


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
    return "\n".join([*lines, "", *[f"- {remark}" for remark in remarks]])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{_number(statistics.median(values))} ({_number(min(values))}–{_number(max(values))})"


def _number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
