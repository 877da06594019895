"""Krum, Multi-Krum and Bulyan, against their papers' definitions: every subset tried, in exact fractions."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.aggregation.columns import squared_distances
from core.aggregation.reducers import Bulyan, Krum, MultiKrum, Reducer
from core.layout import Array
from core.sums import BLOCK
from tests.core.build import assert_same_bits

Points = Sequence[Sequence[float]]


def apart(a: Sequence[float], b: Sequence[float]) -> Fraction:
    return sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in zip(a, b, strict=True)), Fraction(0))


def score(points: Points, i: int, near: int) -> Fraction:
    """The nearest `near` others are those with the least sum: of all subsets of that size."""
    others = [apart(points[i], points[j]) for j in range(len(points)) if j != i]
    return min((sum(subset, Fraction(0)) for subset in combinations(others, near)), default=Fraction(0))


def scores(points: Points, f: int) -> list[Fraction]:
    return [score(points, i, max(1, len(points) - f - 2)) for i in range(len(points))]


def mean_of(points: Points) -> list[float]:
    return [float(sum(map(Fraction, column)) / len(points)) for column in zip(*points, strict=True)]


def bulyan(points: Points, f: int) -> list[float]:
    """Section 4 of the paper."""
    received, selected = list(range(len(points))), []
    while len(selected) < len(points) - 2 * f:
        found = scores([points[i] for i in received], f)
        selected.append(received.pop(found.index(min(found))))
    near = len(selected) - 2 * f
    result = []
    for column in zip(*(points[i] for i in sorted(selected)), strict=True):
        ordered = sorted(map(Fraction, column))
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        # Of the subsets that are equally near, the one with the first contributions.
        subsets = combinations([Fraction(value) for value in column], near)
        best = min(subsets, key=lambda subset: sum(abs(value - middle) for value in subset))
        result.append(float(sum(best) / near))
    return result


def reduced(reducer: Reducer, points: Points) -> list[float]:
    found = reducer.reduce([np.array(point, np.float64) for point in points], [1.0] * len(points))
    return [float(value) for value in found]


def points_of(least: int, most: int) -> st.SearchStrategy[list[list[float]]]:
    """Small whole numbers: many of them equal, many distances equal."""
    size = st.tuples(st.integers(least, most), st.integers(1, 3))
    value = st.integers(-20, 20).map(float)
    return size.flatmap(lambda s: st.lists(st.lists(value, min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0]))


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_krum_by_hand() -> None:
    """n = 6, f = 1, so 3 nearest. 0: 1+9+16; 1: 1+4+9; 3: 1+4+9; 4: 1+9+16; 10: 36+49+81; 50: far. 1 before 3."""
    assert reduced(Krum(1), [[0.0], [1.0], [3.0], [4.0], [10.0], [50.0]]) == [1.0]
    assert reduced(Krum(1), [[0.0], [3.0], [1.0], [4.0], [10.0], [50.0]]) == [3.0]


def test_multi_krum_by_hand() -> None:
    """The same scores: 26, 14, 14, 26, 166 and 40² + 46² + 47²."""
    points = [[0.0], [1.0], [3.0], [4.0], [10.0], [50.0]]
    assert reduced(MultiKrum(1, 1), points) == [1.0]
    assert reduced(MultiKrum(1, 2), points) == [2.0]
    assert reduced(MultiKrum(1, 3), points) == [pytest.approx(4 / 3, rel=1e-15)]
    assert reduced(MultiKrum(1), points) == [18 / 5]


def test_bulyan_selects_again_after_each_choice() -> None:
    """6, 18, 22, 26, 30, 31, 36 with f = 1: five are chosen, three of them averaged.

    One scoring, by the 4 nearest: 1376, 368, 177, 121, 117, 132, 357. Its five best are 22, 26, 30, 31, 36, with the
    median 30 and the three nearest to it 26, 30, 31: 29.

    Krum takes 30 (117). Left are six, 3 nearest: 800, 224, 113, 105 (26), 131, 321. Five, 2 nearest: 400, 160, 97 (22),
    106, 221. Four, the nearest: 144, 144, 25 (31), 25. Three: 144 (6), 144, 324. So 6, 22, 26, 30, 31, with the median
    26 and the three nearest to it 22, 26, 30: 26.
    """
    points = [[6.0], [18.0], [22.0], [26.0], [30.0], [31.0], [36.0]]
    assert scores(points, 1) == [1376, 368, 177, 121, 117, 132, 357]
    assert Bulyan(1).chosen([np.array(point) for point in points]) == [0, 2, 3, 4, 5]
    assert reduced(Bulyan(1), points) == [26.0]


def test_bulyan_leaves_out_the_one_element_that_is_far_off() -> None:
    """Krum takes a whole vector. One that is as near as the others are, all in one element, gets past it."""
    rng = np.random.default_rng(3)
    honest = [row.tolist() for row in rng.normal(size=(6, 400))]
    sly = np.mean(honest, axis=0)
    sly[0] += 15.0
    points = [sly.tolist(), *honest]
    assert reduced(Krum(1), points)[0] > 10.0
    assert abs(reduced(Bulyan(1), points)[0]) < 2.0


# -- by the definition -------------------------------------------------------------------------------------------------


@given(points_of(3, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_krum_by_every_subset(points: list[list[float]], data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (len(points) - 3) // 2))
    found = scores(points, f)
    assert reduced(Krum(f), points) == points[found.index(min(found))]


@given(points_of(3, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_multi_krum_by_every_subset(points: list[list[float]], data: st.DataObject) -> None:
    n = len(points)
    f = data.draw(st.integers(0, (n - 3) // 2))
    select = data.draw(st.none() | st.integers(1, n - f))
    found = scores(points, f)
    best = sorted(range(n), key=lambda i: (found[i], i))[: select or n - f]
    assert reduced(MultiKrum(f, select), points) == mean_of([points[i] for i in best])


@given(points_of(7, 9))
@settings(max_examples=40, deadline=None)
def test_bulyan_by_every_subset(points: list[list[float]]) -> None:
    assert reduced(Bulyan(1), points) == bulyan(points, 1)


@pytest.mark.parametrize(("n", "f"), [(11, 2), (12, 2), (15, 3)])
def test_bulyan_of_more(n: int, f: int) -> None:
    points = np.random.default_rng(n).normal(size=(n, 2)).tolist()
    assert reduced(Bulyan(f), points) == pytest.approx(bulyan(points, f), rel=1e-14)


@given(points_of(3, 8))
@settings(max_examples=30, deadline=None)
def test_bulyan_without_any_byzantine_is_the_mean(points: list[list[float]]) -> None:
    assert reduced(Bulyan(0), points) == pytest.approx(mean_of(points), rel=1e-15, abs=1e-15)


@pytest.mark.parametrize(
    ("reducer", "least"),
    [(Krum(0), 3), (Krum(1), 5), (Krum(4), 11), (MultiKrum(1), 5), (MultiKrum(1, 4), 5), (MultiKrum(1, 7), 8),
     (MultiKrum(3, 2), 9), (Bulyan(0), 3), (Bulyan(1), 7), (Bulyan(5), 23)],
)  # fmt: skip
def test_how_many_are_needed(reducer: Reducer, least: int) -> None:
    assert reducer.least == least


# -- distances ---------------------------------------------------------------------------------------------------------


def test_krum_does_not_cancel_in_float32() -> None:
    """All have 4096 in common, and differ by 256ths. ‖a‖² + ‖b‖² - 2 a·b in float32 has nothing left of that."""
    rng = np.random.default_rng(7)
    small = rng.integers(-8, 9, size=(7, 1000)) / 256.0
    small[:3] *= 4.0  # three that are farther out; the best is one of the others
    stack = [(4096.0 + row).astype(np.float32) for row in small]
    for row, array in zip(small, stack, strict=True):
        assert (array.astype(np.float64) - 4096.0 == row).all()  # float32 has them exactly
    found = scores(small.tolist(), 1)
    best = found.index(min(found))
    assert best >= 3
    assert_same_bits(Krum(1).reduce(stack, [1.0] * 7), stack[best])

    squares = [np.add.reduce(array * array) for array in stack]
    cancelled = [squares[i] + squares[j] - 2 * np.add.reduce(stack[i] * stack[j]) for i in range(7) for j in range(i)]
    exact = [float(apart(small[i].tolist(), small[j].tolist())) for i in range(7) for j in range(i)]
    assert max(exact) < 20
    assert max(abs(float(a) - b) for a, b in zip(cancelled, exact, strict=True)) > 100


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distances_over_many_blocks(dtype: str) -> None:
    stack = list(np.random.default_rng(1).integers(-50, 50, size=(5, 3 * BLOCK + 11)).astype(dtype))
    found, unit = squared_distances(stack), 64.0 if dtype == "float64" else 1.0  # the power of two from 50 on
    for i in range(5):
        for j in range(5):
            exact = int(np.sum((stack[i].astype(np.int64) - stack[j].astype(np.int64)) ** 2))
            assert found[i, j] * unit**2 == exact


@given(points_of(7, 9), st.sampled_from([-900, -500, 500, 1000]))
@settings(max_examples=40, deadline=None)
def test_the_choice_does_not_depend_on_the_size_of_the_numbers(points: list[list[float]], power: int) -> None:
    """Their squares leave float64. (One third of all zero would be another matter: they are what it measures by.)"""
    points = [[*point, 40.0] for point in points]
    large = [[value * 2.0**power for value in point] for point in points]
    for reducer in (Krum(1), Krum(2), MultiKrum(1), Bulyan(1)):
        expected = [value * 2.0**power for value in reduced(reducer, points)]
        assert reduced(reducer, large) == expected


def test_one_far_out_does_not_cover_for_another() -> None:
    """Measured by the greatest, 1e300, all squares would vanish, 1e100's too; and the first would be taken."""
    honest = [[1.0, 2.0], [1.5, 2.0], [1.0, 2.5], [1.25, 2.25], [0.5, 2.0]]
    assert reduced(Krum(2), [[1e100, 0.0], [1e300, 0.0], *honest]) in honest
    assert reduced(Krum(1), [[1e5, 0.0], *honest]) in honest


# -- what some that are arbitrary can do -------------------------------------------------------------------------------

WILD = [0.0, 1.0, -30.0, 1e6, -1e6, 1e200, -1e300, float("inf"), float("nan")]


@st.composite
def attacked(draw: st.DrawFn, per: int) -> tuple[list[list[float]], list[list[float]], int]:
    """(all, the honest among them, f) for n >= per · f + 3."""
    f = draw(st.integers(1, 2))
    honest = draw(points_of(per * f + 3 - f, per * f + 5 - f))
    sent = st.lists(st.sampled_from(WILD), min_size=len(honest[0]), max_size=len(honest[0]))
    return draw(st.permutations([*honest, *[draw(sent) for _ in range(f)]])), honest, f


@given(attacked(per=2))
@settings(max_examples=80, deadline=None)
def test_krum_stays_with_the_honest(case: tuple[list[list[float]], list[list[float]], int]) -> None:
    """At least n - 2f - 2 of its neighbours are honest, and its score is no worse than that of an honest one.

    So (n - 2f - 2) · d² <= (n - f - 2) · D², where d is how far it is from the nearest that is honest, D how far they
    are from one another.
    """
    points, honest, f = case
    n = len(points)
    found = reduced(Krum(f), points)
    widest = max(apart(a, b) for a in honest for b in honest)
    nearest = min(apart(found, point) for point in honest)
    assert (n - 2 * f - 2) * nearest <= (n - f - 2) * widest


@given(attacked(per=4))
@settings(max_examples=60, deadline=None)
def test_bulyan_stays_with_the_honest_in_each_element(case: tuple[list[list[float]], list[list[float]], int]) -> None:
    """The median of the chosen is among the honest, and no fewer of them are chosen than are averaged."""
    points, honest, f = case
    for found, column in zip(reduced(Bulyan(f), points), zip(*honest, strict=True), strict=True):
        reach = max(column) - min(column)
        assert min(column) - reach <= found <= max(column) + reach


@given(attacked(per=4), st.sampled_from([1e6, -1e9, 1e300, float("nan"), float("-inf")]))
@settings(max_examples=60, deadline=None)
def test_those_far_off_have_no_part_at_all(case: tuple[list[list[float]], list[list[float]], int], far: float) -> None:
    _, honest, f = case
    points = [[far] * len(honest[0])] * f + honest
    assert reduced(Krum(f), points) in honest
    for reducer in (MultiKrum(f), Bulyan(f)):
        for found, column in zip(reduced(reducer, points), zip(*honest, strict=True), strict=True):
            assert min(column) <= found <= max(column)


def test_of_those_equally_good_the_first_is_taken() -> None:
    stack: list[Array] = [np.array([float(v)]) for v in (5, 1, 1, 5, 1, 5, 3)]
    found = scores([array.tolist() for array in stack], 2)
    assert found.count(min(found)) > 1
    assert Krum(2).reduce(stack, [1.0] * 7) == stack[found.index(min(found))]
