"""The results as a page of Markdown, and the ratios of the page before, so that what was lost shows."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.core_rows import Worst
from benchmarks.measure import Comparison, Idle, NotRun, Result, Round

# A ratio that got worse by more than this is pointed out.
LOSS = 0.10
_LINE = re.compile(r"^\| (\w+) \|.*\| \*\*([0-9.]+)\*\* ", re.MULTILINE)


def earlier(page: str) -> dict[str, float]:
    """Row -> its ratio on a page that `render` made."""
    return {code: float(ratio) for code, ratio in _LINE.findall(page)}


def render(machine: dict[str, str], results: Sequence[Result], before: Mapping[str, float]) -> str:
    """The whole page. `before` are the ratios of the last run, by row."""
    compared = [result for result in results if isinstance(result, Comparison)]
    parts = [
        "# Results",
        "Made by `make bench`; how to read it is in [README.md](README.md). Figures are of one run on one machine: "
        "compare the ratios, not the figures beside them.",
        "\n".join(f"- {name}: {text}" for name, text in (machine | _idleness(compared)).items()),
        _table(results, before),
        *_losses(compared, before),
        *[_worst(result) if isinstance(result, Worst) else _details(result) for result in compared],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _idleness(results: Iterable[Comparison]) -> dict[str, str]:
    states = [state for result in results for turn in _rounds(result) for state in turn.before.values()]
    return {"Idle CPU before the turns": _idle(states)} if states else {}


def _rounds(result: Comparison) -> list[Round]:
    if isinstance(result, Worst):
        return [turn for case in result.cases for turn in case.rounds]
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


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{_number(statistics.median(values))} ({_number(min(values))}–{_number(max(values))})"


def _number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
