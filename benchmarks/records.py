"""results.json: of every row what was measured last, when, at which commit and on what machine.

RESULTS.md and the pictures are made of this file alone. So a row can be measured by itself, and the page made anew
with it; each row tells of which commit it is. A run writes a row as soon as it has it: one that is broken off
loses what it has not measured yet, and no more. A line is a row, so that a change shows as one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core_rows import Case, Worst, worst
from benchmarks.machine import moment
from benchmarks.measure import Cell, Comparison, Grid, Held, Idle, NotRun, Result, Round, Row, Sample, grid

Plain = dict[str, Any]


class Record(NamedTuple):
    """A row's `result`. `last` is the ratio that it had before, where it had one."""

    result: Result
    when: str
    commit: str
    machine: dict[str, str]
    last: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.result.ratio if isinstance(self.result, Comparison) else None


def record(result: Result, machine: Mapping[str, str], commit: str, before: Record | None) -> Record:
    """What `result` is, as of now; `before` is what was measured of the row until then."""
    when = moment()
    last = None if before is None else before.last if before.ratio is None else before.ratio
    return Record(result, when, commit, dict(machine), last)


def load(path: Path) -> dict[str, Record]:
    """By the row's code; nothing where there is no such file."""
    if not path.exists():
        return {}
    return {code: _record(plain) for code, plain in json.loads(path.read_text()).items()}


def save(path: Path, records: Mapping[str, Record]) -> None:
    lines = [f"{json.dumps(code)}: {json.dumps(_plain(each), ensure_ascii=False)}" for code, each in records.items()]
    temporary = path.with_suffix(".new")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(path)


def _plain(found: Record) -> Plain:
    last = None if found.last is None else _short(found.last)
    return found._asdict() | {"last": last, "result": _plain_result(found.result)}


def _record(plain: Plain) -> Record:
    return Record(**plain | {"result": _result(plain["result"])})


def _plain_result(result: Result) -> Plain:
    found: Plain = {"row": result.row._asdict()}
    if isinstance(result, NotRun):
        return found | {"reason": result.reason}
    found |= {"unit": result.unit, "remarks": list(result.remarks)}
    if isinstance(result, Held):
        figures = {name: [_plain_sample(each) for each in samples] for name, samples in result.figures.items()}
        return found | {"figures": figures, "before": [_plain_idle(state) for state in result.before]}
    if isinstance(result, Grid):
        return found | {"cells": [_plain_cell(cell) for cell in result.cells]}
    if isinstance(result, Worst):
        return found | {"cases": [each._asdict() | {"rounds": _plain_rounds(each.rounds)} for each in result.cases]}
    return found | {"rounds": _plain_rounds(result.rounds)}


def _result(plain: Plain) -> Result:
    row = Row(**plain["row"])
    if "reason" in plain:
        return NotRun(row, plain["reason"])
    unit, remarks = plain["unit"], plain["remarks"]
    if "figures" in plain:
        figures = {name: [_sample(each) for each in samples] for name, samples in plain["figures"].items()}
        return Held(row, unit, figures, [Idle(*state) for state in plain["before"]], remarks)
    if "cells" in plain:
        return grid(row, unit, [_cell(cell) for cell in plain["cells"]], remarks)
    if "cases" in plain:
        return worst(
            row, unit, [Case(**each | {"rounds": _rounds(each["rounds"])}) for each in plain["cases"]], remarks
        )
    return Comparison(row, unit, _rounds(plain["rounds"]), remarks)


def _plain_cell(cell: Cell) -> Plain:
    apart = {name: [_plain_sample(each) for each in samples] for name, samples in cell.apart.items()}
    return cell._asdict() | {"rounds": _plain_rounds(cell.rounds), "apart": apart, "also": dict(cell.also)}


def _cell(plain: Plain) -> Cell:
    apart = {name: [_sample(each) for each in samples] for name, samples in plain["apart"].items()}
    return Cell(**plain | {"rounds": _rounds(plain["rounds"]), "apart": apart})


def _plain_rounds(rounds: Sequence[Round]) -> list[Plain]:
    return [
        {
            "samples": {name: _plain_sample(each) for name, each in turn.samples.items()},
            "before": {name: _plain_idle(state) for name, state in turn.before.items()},
        }
        for turn in rounds
    ]


def _rounds(plain: Sequence[Plain]) -> list[Round]:
    return [
        Round(
            {name: _sample(each) for name, each in turn["samples"].items()},
            {name: Idle(*state) for name, state in turn["before"].items()},
        )
        for turn in plain
    ]


def _plain_sample(sample: Sample) -> list[Any]:
    return [_short(sample.value), {name: _short(value) for name, value in sample.beside.items()}]


def _sample(plain: Sequence[Any]) -> Sample:
    return Sample(plain[0], plain[1])


def _plain_idle(state: Idle) -> list[float]:
    return [_short(state.idle), _short(state.stolen)]


def _short(value: float) -> float:
    """Six digits that count: more than any figure here has to say."""
    return float(f"{value:.6g}")
