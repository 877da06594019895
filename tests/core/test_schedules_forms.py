"""Schedules worked out by other means: fractions, lists of steps, the papers' own formulas."""

import math
from fractions import Fraction
from itertools import count, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseSqrt,
    Linear,
    MultiStep,
    OneCycle,
    PiecewiseConstant,
    PiecewiseLinear,
    Polynomial,
    Product,
    Schedule,
    Sequence,
    Step,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.core.schedule_strategies import CLOSED


def values(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.at(t) for t in range(1, steps + 1)]


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-14, abs=1e-300)


def test_inverse_sqrt_is_the_papers_formula() -> None:
    """Vaswani et al. 2017, equation 3, for a model of width 512 with 4000 steps of warm-up."""
    width, warmup = 512, 4000
    schedule = InverseSqrt((width * warmup) ** -0.5, warmup)
    for step in (1, 2, 3999, 4000, 4001, 100_000):
        assert schedule.at(step) == near(width**-0.5 * min(step**-0.5, step * warmup**-1.5))


def test_inverse_sqrt_may_stand_until_it_falls() -> None:
    schedule = InverseSqrt(0.01, 10_000, "constant")
    assert values(schedule, 10_000) == [0.01] * 10_000
    assert schedule.at(40_000) == 0.005


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 10**6))
def test_a_cycle_by_fractions(up: int, down: int, t: int) -> None:
    cycle, place = divmod(t - 1, up + down)
    share = Fraction(place, up) if place <= up else Fraction(up + down - place, down)
    low, high = Fraction(1, 8), Fraction(3, 4)
    assert Cyclic(0.125, 0.75, up, down).at(t) == near(float(low + (high - low) * share))
    if cycle < 900:  # then 2^-cycle is beyond the floats
        halved = float(low + (high - low) * share / 2**cycle)
        assert Cyclic(0.125, 0.75, up, down, "triangular2").at(t) == near(halved)
    assert Cyclic(0.0, 0.75, up, down, "exp_range", 0.5).at(t) == near(float(high * share) * 0.5 ** (t - 1))


def test_a_cycle_is_as_long_down_as_up_unless_said() -> None:
    assert values(Cyclic(0.0, 0.5, 2), 9) == [0.0, 0.25, 0.5, 0.25, 0.0, 0.25, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("mult", [1, 2, 3])
def test_restarts_are_cosines_one_after_the_other(mult: int) -> None:
    lengths = [5 * mult**i for i in range(5)]
    expected = [
        value for i, length in enumerate(lengths) for value in values(Cosine(0.25 + 0.5 * 0.5**i, length, 0.25), length)
    ]
    assert values(CosineRestarts(0.75, 5, mult, 0.25, 0.5), len(expected)) == near(expected)


def test_one_cycle_in_round_numbers() -> None:
    """Ten steps, four of them up: the peak at the fourth step, the last value at the tenth and after."""
    straight = OneCycle(1.0, 10, 0.4, "linear", 4.0, 8.0)
    up = [0.25, 0.5, 0.75, 1.0]
    assert values(straight, 12) == near([*up, *(1.0 - i * (1.0 - 0.03125) / 6 for i in range(1, 7)), 0.03125, 0.03125])
    three = OneCycle(1.0, 10, 0.4, "linear", 4.0, 8.0, three_phase=True)
    assert values(three, 11) == near([*up, 0.75, 0.5, 0.25, *(0.25 - i * 0.21875 / 3 for i in range(1, 4)), 0.03125])
    curved = values(OneCycle(1.0, 10, 0.4, div_factor=4.0, final_div_factor=8.0), 4)
    assert curved == near([0.25, 0.25 + 0.75 * 0.25, 0.25 + 0.75 * 0.75, 1.0])


def test_points() -> None:
    line = PiecewiseLinear((2, 4, 8), (1.0, 3.0, 1.0))
    assert values(line, 11) == [1.0, 1.0, 1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]
    assert values(PiecewiseLinear((5,), (0.5,)), 9) == [0.5] * 9
    assert values(PiecewiseConstant((3.0, 1.0, 2.0), (1, 3)), 5) == [3.0, 1.0, 1.0, 2.0, 2.0]
    assert values(PiecewiseConstant((3.0,), ()), 3) == [3.0] * 3


def test_milestones() -> None:
    assert values(MultiStep(8.0, (1, 3, 3), 0.5), 5) == [8.0, 4.0, 4.0, 1.0, 1.0]
    assert values(MultiStep(8.0, ()), 5) == [8.0] * 5
    assert values(MultiStep(1.0, (3, 6, 9)), 12) == values(Step(1.0, 3), 12)


def test_warm_ups() -> None:
    assert values(WarmupLinear(1.0, 4, 8, end=0.5), 10) == [0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert values(WarmupLinear(1.0, 0, 4, init=9.0), 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert values(WarmupCosine(1.0, 2, 6), 7) == near(
        [0, 0.5, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    )


@pytest.mark.parametrize(
    ("decay", "down"),
    [
        ("linear", [0.75, 0.5, 0.25]),
        ("cosine", [0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
)
def test_warm_up_stable_decay(decay: Any, down: list[float]) -> None:
    schedule = WarmupStableDecay(3.0, 2, 10, end=1.0, decay_steps=4, decay=decay)
    assert values(schedule, 12) == near(
        [0.0, 1.5, 3.0, 3.0, 3.0, 3.0, 3.0, *(1 + 2 * share for share in down), 1.0, 1.0]
    )


def test_special_cases_are_the_general_ones() -> None:
    assert values(Polynomial(0.7, 0.1, 9), 12) == near(values(Linear(0.7, 0.1, 9), 12))
    assert values(CosineRestarts(0.7, 9, floor=0.1), 9) == values(Cosine(0.7, 9, 0.1), 9)
    joined = Sequence((Linear(0.1, 0.7, 3), Cosine(0.7, 6, 0.2, 2.0)), (3,))
    assert values(WarmupCosine(0.7, 3, 9, 0.1, 0.2, 2.0), 12) == values(joined, 12)


@given(st.lists(st.tuples(CLOSED, st.integers(1, 30)), min_size=1, max_size=4))
def test_a_sequence_is_its_parts_one_after_the_other(pieces: list[tuple[Schedule, int]]) -> None:
    ends = [sum(steps for _, steps in pieces[: i + 1]) for i in range(len(pieces) - 1)]
    schedule = Sequence(tuple(part for part, _ in pieces), tuple(ends))
    expected = [part.at(t) for part, steps in pieces[:-1] for t in range(1, steps + 1)]
    expected += islice(map(pieces[-1][0].at, count(1)), 30)
    assert values(schedule, len(expected)) == expected


@given(st.lists(CLOSED, min_size=1, max_size=4), st.integers(1, 1000))
def test_a_product_is_its_parts_multiplied(parts: list[Schedule], t: int) -> None:
    expected = math.prod(part.at(t) for part in parts)
    assert Product(tuple(parts)).at(t) == (0.0 if math.isnan(expected) else expected)


def test_a_factor_that_is_0_keeps_a_product_there() -> None:
    beyond = Exponential(1.0, 3.0)
    assert beyond.at(10**6) == math.inf
    assert Product((beyond, Exponential(1.0, 0.5))).at(10**6) == 0.0
    assert Product((Constant(0.0), beyond)).span() == (0.0, 0.0)


def test_spans_of_parts_end_with_them() -> None:
    """Only what a part runs through before the next one begins counts."""
    growing, falling = Exponential(1.0, 2.0), Linear(5.0, -5.0, 10)
    assert Sequence((growing, Constant(3.0)), (4,)).span() == (1.0, 8.0)
    assert Sequence((falling, Constant(3.0)), (6,)).span() == (0.0, 5.0)
    assert Sequence((Constant(3.0), growing), (6,)).span() == (1.0, math.inf)
    assert Sequence((Sequence((growing, falling), (3,)), Constant(3.0)), (5,)).span() == (1.0, 5.0)
    assert Sequence((CosineRestarts(1.0, 4, 2, -1.0), Constant(0.5)), (3,)).span() == near((0.0, 1.0))
    assert Sequence((Cyclic(1.0, 9.0, 4), Constant(2.0)), (3,)).span() == (1.0, 5.0)
    assert Sequence((PiecewiseConstant((1.0, 7.0, -7.0), (2, 4)), Constant(2.0)), (4,)).span() == (1.0, 7.0)
    assert Product((Sequence((growing, Constant(3.0)), (4,)), Linear(-1.0, 2.0, 3))).span() == (-8.0, 16.0)
