"""plateau: torch's own rates on the same losses, and its rule written out step by step."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.schedules import Plateau
from tests.core.schedule_strategies import PLATEAU_JSON, schedule_of

# Falls, and stops for longer and longer; and the same upside down.
FALLING = [
    round(2.0 * 0.9 ** (s - s % (1 + s // 12)) + 0.01 * math.sin(7.0 * s) + (0.5 if s % 41 == 40 else 0.0), 6)
    for s in range(200)
]
RISING = [3.0 - loss for loss in FALLING]


def rates(schedule: Plateau, losses: list[float]) -> list[float]:
    """The value at each step, each of which is taken before its loss is known."""
    memory, found = np.array(schedule.start()), []
    for loss in losses:
        found.append(schedule.value(memory))
        schedule.observe(memory, loss)
    return found


def changes(values: list[float]) -> list[int]:
    return [s for s in range(1, len(values)) if values[s] != values[s - 1]]


@pytest.mark.parametrize(
    ("schedule", "losses", "at", "last"),
    [
        (Plateau(0.1, patience=6), FALLING, [58, 76, 85, 92, 102, 111, 118], 1.0000000000000005e-08),
        (
            Plateau(0.1, 0.5, patience=3, threshold=0.05, threshold_mode="abs", cooldown=4, minimum=0.003), FALLING,
            [27, 38, 46, 55, 63, 71], 0.003,
        ),
        (
            Plateau(0.1, 0.7, patience=0, threshold=0.001, mode="max", cooldown=9), RISING,
            [18, 29, 39, 49, 59, 70, *range(80, 200, 10)], 0.00016284135979104466,
        ),
        (
            Plateau(0.1, 0.9, patience=2, threshold=0.02, mode="max", threshold_mode="abs", eps=0.003), RISING,
            [37, 40, 45, 48, 51, 54, 57, 62, 65, 68, 71, 74], 0.028242953648100012,
        ),
    ],
)  # fmt: skip
def test_the_rates_are_those_of_torch(schedule: Plateau, losses: list[float], at: list[int], last: float) -> None:
    """What torch 2.13's ReduceLROnPlateau gives: the steps at which it reduces, and where it ends, to the bit."""
    values = rates(schedule, losses)
    assert changes(values) == at
    assert (values[0], values[-1]) == (0.1, last)


def by_hand(p: Plateau, losses: list[float]) -> list[float]:
    """The documentation of ReduceLROnPlateau, sentence by sentence."""
    rate, best, bad, cooling, found = p.init, None, 0, 0, []
    for loss in losses:
        found.append(rate)
        if best is None:
            # Against infinity anything is better, except where the threshold makes the bar infinite or NaN.
            start = math.inf if p.mode == "min" else -math.inf
            better = p.threshold_mode == "abs" or p.mode == "max" or p.threshold < 1
            best = start if not better else None
        if best is not None:
            bar = {
                ("min", "rel"): best * (1 - p.threshold), ("max", "rel"): best * (1 + p.threshold),
                ("min", "abs"): best - p.threshold, ("max", "abs"): best + p.threshold,
            }[p.mode, p.threshold_mode]  # fmt: skip
            better = loss < bar if p.mode == "min" else loss > bar
        if better:
            best, bad = loss, 0
        else:
            bad += 1
        if cooling > 0:
            cooling, bad = cooling - 1, 0
        if bad > p.patience:
            reduced = max(rate * p.factor, p.minimum)
            if rate - reduced > p.eps:
                rate = reduced
            cooling, bad = p.cooldown, 0
    return found


@given(PLATEAU_JSON, st.lists(st.floats(-1e6, 1e6), max_size=60))
@example({"kind": "plateau", "init": 0.5, "threshold": 1.0, "patience": 0}, [1.0, 0.5])
@example({"kind": "plateau", "init": 0.5, "threshold": 2.0, "patience": 0}, [1.0, -0.5])
def test_the_rule_is_the_documented_one(settings: dict[str, Any], losses: list[float]) -> None:
    schedule = schedule_of(settings)
    assert isinstance(schedule, Plateau)
    values = rates(schedule, losses)
    assert values == by_hand(schedule, losses)
    low, high = schedule.span()
    assert all(low <= value <= high for value in values)
    assert values == sorted(values, reverse=True)


def test_the_memory_is_all_there_is() -> None:
    """A copy of it goes on as the original does."""
    schedule = Plateau(0.1, patience=2, cooldown=3)
    memory = np.array(schedule.start())
    assert memory.shape == (schedule.width,)
    for loss in FALLING[:70]:
        schedule.observe(memory, loss)
    copy = memory.copy()
    for loss in FALLING[70:]:
        schedule.observe(memory, loss)
        schedule.observe(copy, loss)
        np.testing.assert_array_equal(memory, copy)


def test_a_loss_that_is_no_number_is_no_better() -> None:
    schedule = Plateau(0.5, 0.5, patience=1)
    assert rates(schedule, [1.0, math.nan, math.nan, math.inf, 0.5]) == [0.5, 0.5, 0.5, 0.25, 0.25]


def test_without_a_loss_it_stays() -> None:
    schedule = Plateau(0.5)
    assert [schedule.at(t) for t in (1, 2, 10**6)] == [0.5] * 3
