"""Each kind minimizes: the settings that `make convergence` found reach the target again, in as many steps.

Runs that were long, or whose steps are, are repeated in part: to a step by which the loss had fallen far.
"""

import json
import math
from typing import Any

import pytest

from benchmarks.convergence import BEGIN, END, FOUND, METHODS, PAGE, REASONS, SHOWN, Run, page
from benchmarks.convergence_problems import PROBLEMS
from core.optimizers import KINDS

KEPT: dict[str, dict[str, Any]] = json.loads(FOUND.read_text())
PAIRS = [(problem, name) for problem, rows in KEPT.items() for name in rows]
# Rounding is another one on another processor. Steps that bounce make much of it: starts nearby took other numbers.
MORE_STEPS, MORE_BOUNCES, MORE_LOSS = 1.1, 2.0, 2.0
FALLEN = 0.25


@pytest.mark.parametrize(("problem", "name"), PAIRS, ids=[f"{problem}-{name}" for problem, name in PAIRS])
def test_the_loss_falls_as_it_did(problem: str, name: str) -> None:
    kept = KEPT[problem][name]
    run = Run(problem, kept["optimizer"])
    if kept["again"] is not None:
        run.advance(kept["again"]["steps"])
        assert run.lowest() <= MORE_LOSS * kept["again"]["loss"] <= FALLEN * run.first
        return
    more = MORE_BOUNCES if kept["most"] > SHOWN * kept["steps"] else MORE_STEPS
    most = math.ceil(more * kept["most"] / run.problem.every) * run.problem.every
    run.advance(most + (run.problem.looks - 1) * run.problem.every)
    assert run.reached
    assert run.losses[-1] <= run.problem.target < FALLEN * run.first


def test_every_kind_is_there_on_every_problem() -> None:
    for problem in PROBLEMS:
        searched = {row["optimizer"]["kind"] for row in KEPT[problem].values()}
        assert searched == set(KINDS), f"make convergence ARGS='{' '.join(sorted(KINDS.keys() - searched))}'"
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert {problem: list(rows) for problem, rows in KEPT.items()} == dict.fromkeys(PROBLEMS, names)


def test_what_was_kept_is_what_the_methods_are() -> None:
    methods = {method.name: method for method in METHODS}
    for problem, name in PAIRS:
        method = methods[name]
        candidates = [optimizer for span in method.spans for optimizer in method.candidates(problem, span)]
        assert KEPT[problem][name]["optimizer"] in candidates


def test_there_is_a_reason_wherever_a_target_was_not_reached() -> None:
    short = {name for rows in KEPT.values() for name, row in rows.items() if row["steps"] is None}
    assert short == set(REASONS)


def test_the_page_shows_what_was_kept() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == page(KEPT).strip()
