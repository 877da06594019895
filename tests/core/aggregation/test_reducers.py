"""Reducers element by element and the geometric median, against exact fractions, 50 digits, and drawings."""

import tracemalloc
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise, permutations
from statistics import median as middle_of
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.aggregation.reducers import (
    KINDS,
    Bulyan,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Reducer,
    Sum,
    TrimmedMean,
)
from core.errors import InvalidRecipe
from core.layout import Array
from core.sums import BLOCK
from tests.core.build import assert_same_bits

ALL: list[Reducer] = [cls() for cls in KINDS.values()]
# What is worked out for each element by itself.
BY_ELEMENT: list[Reducer] = [Mean(), Sum(), Median(), TrimmedMean(0.3)]
GREATEST = float(np.finfo(np.float64).max)


def by_kind(reducer: Reducer) -> str:
    return reducer.kind


def stack_of(rows: Sequence[Sequence[float]], dtype: str = "float64") -> list[Array]:
    return [np.array(row, dtype) for row in rows]


def reduced(reducer: Reducer, rows: Sequence[Sequence[float]], weights: Sequence[float] = ()) -> list[float]:
    found = reducer.reduce(stack_of(rows), weights or [1.0] * len(rows))
    return [float(value) for value in found]


def drawn(n: int, d: int, dtype: str = "float64", seed: int = 0) -> list[Array]:
    return list(np.random.default_rng(seed).normal(size=(n, d)).astype(dtype))


# Whole numbers: float64 has their sums exactly.
WHOLE = st.integers(-1000, 1000).map(float)


def matrices(least: int = 1, most: int = 9) -> st.SearchStrategy[list[list[float]]]:
    shape = st.tuples(st.integers(least, most), st.integers(1, 4))
    return shape.flatmap(
        lambda s: st.lists(st.lists(WHOLE, min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0])
    )


# -- mean and sum ------------------------------------------------------------------------------------------------------


def test_the_mean_is_that_of_the_paper() -> None:
    """FedAvg's Σ (n_k / n) w_k: 10, 30 and 60 examples."""
    assert reduced(Mean(), [[1.0, 10.0], [2.0, -10.0], [4.0, 0.0]], [10, 30, 60]) == [3.1, -2.0]
    assert reduced(Sum(), [[1.0, 10.0], [2.0, -10.0], [4.0, 0.0]], [10, 30, 60]) == [310.0, -200.0]


@given(matrices(), st.data())
def test_mean_and_sum_by_fractions(rows: list[list[float]], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 500).map(float), min_size=len(rows), max_size=len(rows)))
    total = sum(map(Fraction, weights))
    for j in range(len(rows[0])):
        exact = sum(Fraction(w) * Fraction(row[j]) for w, row in zip(weights, rows, strict=True))
        assert reduced(Sum(), rows, weights)[j] == float(exact)
        assert reduced(Mean(), rows, weights)[j] == float(exact / total)


def test_the_mean_knows_only_the_proportion_of_the_weights() -> None:
    rows = [[1.0, -3.0], [5.0, 8.0], [-2.0, 0.5]]
    usual = reduced(Mean(), rows, [1.0, 2.0, 5.0])
    for power in (-1000, -30, 30, 1020):
        assert reduced(Mean(), rows, [2.0**power, 2.0 ** (power + 1), 5 * 2.0**power]) == usual


# -- in the middle -----------------------------------------------------------------------------------------------------


@given(matrices())
def test_the_median_is_that_of_the_standard_library(rows: list[list[float]]) -> None:
    assert reduced(Median(), rows) == [middle_of(column) for column in zip(*rows, strict=True)]


def test_the_median_of_an_even_number_is_the_mean_of_two() -> None:
    assert reduced(Median(), [[9.0], [1.0], [-50.0], [2.0]]) == [1.5]


@given(matrices(), st.integers(0, 49))
def test_the_trimmed_mean_by_sorting(rows: list[list[float]], percent: int) -> None:
    n = len(rows)
    cut = percent * n // 100
    expected = []
    for column in zip(*rows, strict=True):
        kept = sorted(map(Fraction, column))[cut : n - cut]
        expected.append(float(sum(kept) / len(kept)))
    assert reduced(TrimmedMean(percent / 100), rows) == expected


@pytest.mark.parametrize(
    ("fraction", "n", "cut"),
    [(0.1, 10, 1), (0.1, 9, 0), (0.1, 20, 2), (0.29, 100, 29), (0.07, 100, 7), (0.4, 5, 2), (0.49, 100, 49),
     (0.0, 7, 0), (0.4999999999999, 4, 1), (0.4999999999999, 1, 0), (0.3, 3, 0)],
)  # fmt: skip
def test_a_fraction_counts_as_it_is_written(fraction: float, n: int, cut: int) -> None:
    """0.29 · 100 in binary is 28.999999999999996."""
    assert TrimmedMean(fraction).cut(n) == cut


@given(matrices(least=3), st.data())
def test_some_that_are_arbitrary_leave_the_rest_in_charge(rows: list[list[float]], data: st.DataObject) -> None:
    """Fewer than half for the median, no more than are cut off for the trimmed mean: within what the honest reach."""
    wild = st.sampled_from([1e300, -1e300, GREATEST, np.inf, -np.inf, np.nan, 0.0, 1e-300])
    bad = data.draw(st.integers(1, (len(rows) - 1) // 2))
    honest = rows[bad:]
    sent = [data.draw(st.lists(wild, min_size=len(rows[0]), max_size=len(rows[0]))) for _ in range(bad)]
    mixed = data.draw(st.permutations(honest + sent))
    trimmed = TrimmedMean(min((bad + 0.25) / len(rows), 0.499999))
    assert trimmed.cut(len(rows)) == bad
    for reducer in (Median(), trimmed):
        for found, column in zip(reduced(reducer, mixed), zip(*honest, strict=True), strict=True):
            assert min(column) <= found <= max(column)


def test_zeros_have_one_sign_whatever_the_order() -> None:
    """-0 equals 0: which of them a sort puts in the middle is its own affair, and differs between processors."""
    for order in permutations([0.0, -0.0, -0.0, 0.0, 1.0]):
        for reducer in ALL:
            if reducer.least <= 5 and not isinstance(reducer, Krum):  # Krum hands out one as it came
                found = reducer.reduce(stack_of([[v] for v in order]), [1.0] * 5)
                assert not np.signbit(found).any(), reducer


# -- the geometric median ----------------------------------------------------------------------------------------------

SHARP = GeometricMedian(smoothing=1e-12, iterations=2000, tolerance=1e-13)


def sum_of_distances(point: Sequence[float], rows: Sequence[Sequence[float]], weights: Sequence[float]) -> Decimal:
    found = Decimal(0)
    for row, weight in zip(rows, weights, strict=True):
        squares = [(Decimal(a) - Decimal(b)) ** 2 for a, b in zip(point, row, strict=True)]
        found += Decimal(weight) * sum(squares, Decimal(0)).sqrt()
    return found


def test_of_an_equilateral_triangle_it_is_the_centre() -> None:
    rows = [[0.0, 0.0], [2.0, 0.0], [1.0, 3.0**0.5]]
    assert reduced(SHARP, rows) == pytest.approx([1.0, 3.0**-0.5], abs=1e-11)


def test_of_a_convex_quadrilateral_it_is_where_the_diagonals_cross() -> None:
    """(0,0)-(4,4) is y = x; (5,0)-(0,3) is y = 3 - 3x/5: they cross at 15/8."""
    assert reduced(SHARP, [[0.0, 0.0], [5.0, 0.0], [4.0, 4.0], [0.0, 3.0]]) == pytest.approx([1.875, 1.875], abs=1e-10)


def test_of_a_triangle_with_a_very_blunt_angle_it_is_that_corner() -> None:
    """Over 120°: (0,0) sees (10,1) and (-10,1) at 168.6°. The mean is at (0, 2/3)."""
    assert reduced(SHARP, [[10.0, 1.0], [0.0, 0.0], [-10.0, 1.0]]) == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_right_triangle_has_its_fermat_point() -> None:
    """Legs of 1 at (0,0): by symmetry x = y, and each angle at it is 120°: x = (3 - √3) / 6."""
    expected = (3.0 - 3.0**0.5) / 6.0
    assert reduced(SHARP, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]) == pytest.approx([expected, expected], abs=1e-11)


def test_on_a_line_it_is_the_weighted_median() -> None:
    """Weights of 5 in all: 2.5 is reached at the third of them."""
    assert reduced(SHARP, [[1.0], [2.0], [7.0], [100.0]], [1.0, 1.0, 2.0, 1.0]) == pytest.approx([7.0], abs=1e-9)


def test_who_has_more_than_half_of_the_weight_decides() -> None:
    rows = [[1.0, 2.0], [30.0, -4.0], [-8.0, 90.0]]
    assert reduced(SHARP, rows, [1.01, 0.5, 0.5]) == pytest.approx([1.0, 2.0], abs=1e-9)


def test_a_weight_counts_like_as_many_contributions() -> None:
    rows = [[1.0, 2.0], [3.0, -4.0], [-8.0, 9.0], [2.0, 2.5]]
    many = [rows[0], rows[1], rows[1], rows[2], rows[2], rows[2], rows[3]]
    assert reduced(SHARP, rows, [1.0, 2.0, 3.0, 1.0]) == pytest.approx(reduced(SHARP, many), abs=1e-10)


def test_each_iteration_is_that_of_the_paper() -> None:
    """β_i = α_i / max(ν, ‖z - w_i‖), z = Σ β_i w_i / Σ β_i, in 50 digits; it begins at the median of each element."""
    rows, weights, nu = [[0.0, 0.0], [6.0, 2.0], [1.0, 8.0], [7.0, 7.0], [2.0, 9.0]], [1.0, 2.0, 1.0, 3.0, 1.0], "1.5"
    with localcontext() as context:
        context.prec = 50
        z = [Decimal(2), Decimal(7)]
        for iterations in range(1, 6):
            betas = [
                Decimal(w) / max(Decimal(nu), sum_of_distances(z, [row], [1.0]))  # type: ignore[arg-type]
                for row, w in zip(rows, weights, strict=True)
            ]
            z = [
                sum((b * Decimal(row[j]) for b, row in zip(betas, rows, strict=True)), Decimal(0)) / sum(betas)
                for j in range(2)
            ]
            reducer = GeometricMedian(smoothing=float(nu), iterations=iterations, tolerance=0.0)
            assert reduced(reducer, rows, weights) == pytest.approx([float(v) for v in z], rel=1e-15)


@pytest.mark.parametrize("seed", range(12))
def test_no_point_nearby_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4 + seed % 6, 2 + seed % 3)).tolist()
    weights = rng.integers(1, 4, size=len(rows)).astype(float).tolist()
    found = reduced(GeometricMedian(), rows, weights)
    with localcontext() as context:
        context.prec = 50
        least = sum_of_distances(found, rows, weights)
        for j in range(len(found)):
            for way in (-1.0, -1e-3, 1e-3, 1.0):
                other = found.copy()
                other[j] += way
                assert least < sum_of_distances(other, rows, weights)


def test_the_smoothing_makes_a_mean_of_what_is_near() -> None:
    rows = [[1.0, 1.0], [2.0, 1.0], [9.0, 4.0]]
    assert reduced(GeometricMedian(smoothing=100.0), rows) == pytest.approx([4.0, 2.0], rel=1e-15)


def test_it_leaves_a_contribution_where_the_elements_medians_meet() -> None:
    """There β is 1/ν, and moves are of a length about ν: neither the end, nor a way to get on."""
    rows = [[0.0, 0.0], [4.0, -1.0], [4.5, -1.5], [-1.0, 5.0], [-1.5, 5.5]]
    assert reduced(Median(), rows) == [0.0, 0.0]
    found = reduced(GeometricMedian(smoothing=1e-9), rows)
    with localcontext() as context:
        context.prec = 50
        ones = [1.0] * 5
        grid = [[x / 8, y / 8] for x in range(-16, 40) for y in range(-16, 48)]
        best = min(sum_of_distances(point, rows, ones) for point in grid)
        assert sum_of_distances(found, rows, ones) <= best + Decimal("1e-6")


def test_one_that_is_arbitrarily_far_moves_it_a_little_only() -> None:
    """Four in a square and one at 1e300, or no number at all: it stays with the four."""
    square = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
    for wild in ([1e300, 1e300], [np.inf, 0.0], [np.nan, np.nan], [1e9, 0.0]):
        found = reduced(GeometricMedian(iterations=1000), [wild, *square])
        assert sum(value * value for value in found) < 1.0


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_result_has_the_dtype_and_is_new(reducer: Reducer, dtype: str) -> None:
    stack = drawn(7, 33, dtype)
    before = [array.copy() for array in stack]
    found = reducer.reduce(stack, [1.0] * 7)
    assert (found.dtype, found.shape) == (np.dtype(dtype), (33,))
    found[:] = 0.0
    for array, old in zip(stack, before, strict=True):
        assert_same_bits(array, old)


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
def test_in_float32_it_is_that_of_float64_rounded_once(reducer: Reducer) -> None:
    stack = drawn(9, 500, "float32")
    wide = reducer.reduce([array.astype(np.float64) for array in stack], [1.0] * 9)
    found = reducer.reduce(stack, [1.0] * 9)
    if isinstance(reducer, GeometricMedian):
        np.testing.assert_allclose(found, wide, rtol=1e-6, atol=1e-7)
    else:
        assert_same_bits(found, wide.astype(np.float32))


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
def test_where_the_arrays_lie_does_not_matter(reducer: Reducer) -> None:
    stack = drawn(8, 3000)
    apart = [np.repeat(array, 3)[::3] for array in stack]
    odd = [np.frombuffer(b"\0\0\0" + array.tobytes(), np.float64, offset=3) for array in stack]
    expected = reducer.reduce(stack, [1.0] * 8)
    assert_same_bits(reducer.reduce(apart, [1.0] * 8), expected)
    assert_same_bits(reducer.reduce(odd, [1.0] * 8), expected)


@pytest.mark.parametrize("reducer", BY_ELEMENT, ids=by_kind)
def test_blocks_leave_no_trace(reducer: Reducer) -> None:
    stack = drawn(20, 2 * BLOCK + 17)
    weights = [float(index + 1) for index in range(20)]
    whole = reducer.reduce(stack, weights)
    cuts = [0, 5, 13_106, 13_108, BLOCK, 2 * BLOCK + 17]
    parts = [reducer.reduce([array[a:b] for array in stack], weights) for a, b in pairwise(cuts)]
    assert_same_bits(whole, np.concatenate(parts))


@pytest.mark.parametrize("reducer", [Median(), TrimmedMean(0.3), Krum(), MultiKrum(), Bulyan()], ids=by_kind)
def test_heads_are_counted(reducer: Reducer) -> None:
    assert not reducer.weighted
    stack = drawn(9, 40)
    assert_same_bits(reducer.reduce(stack, [1.0] * 9), reducer.reduce(stack, [1e6, *[1.0] * 7, 1e-6]))


@pytest.mark.parametrize("reducer", [Mean(), Sum(), GeometricMedian()], ids=by_kind)
def test_weights_are_counted(reducer: Reducer) -> None:
    assert reducer.weighted
    stack = drawn(9, 40)
    assert np.any(reducer.reduce(stack, [1.0] * 9) != reducer.reduce(stack, [5.0, *[1.0] * 8]))


def test_what_keeps_one_gradient() -> None:
    assert {kind for kind, cls in KINDS.items() if cls.running} == {"mean", "sum"}


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_contributions_does_not_matter(reducer: Reducer, data: st.DataObject) -> None:
    """But for rounding, where no two are equally good."""
    order = data.draw(st.permutations(range(9)))
    stack, weights = drawn(9, 6, seed=data.draw(st.integers(0, 5))), [float(1 + index % 3) for index in range(9)]
    found = reducer.reduce([stack[i] for i in order], [weights[i] for i in order])
    expected = reducer.reduce(stack, weights)
    if isinstance(reducer, Median | TrimmedMean | Krum):
        assert_same_bits(found, expected)
    elif not isinstance(reducer, Bulyan):  # whose last choices are of two that are each other's nearest
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reducer", [r for r in ALL if not isinstance(r, Sum)], ids=by_kind)
@given(rows=matrices(least=7), shift=st.integers(-(2**20), 2**20))
@settings(max_examples=40, deadline=None)
def test_what_is_added_to_all_is_added_to_the_result(reducer: Reducer, rows: list[list[float]], shift: int) -> None:
    if isinstance(reducer, GeometricMedian):  # which could end an iteration sooner or later
        reducer = GeometricMedian(iterations=20, tolerance=0.0)
    moved = [[value + shift for value in row] for row in rows]
    expected = [value + shift for value in reduced(reducer, rows)]
    assert reduced(reducer, moved) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("reducer", [r for r in ALL if not isinstance(r, Sum)], ids=by_kind)
def test_of_equals_it_is_what_they_are(reducer: Reducer) -> None:
    row = [0.1, -3.7e-5, 123456.789, 0.0, 1e-310]
    found = reduced(reducer, [row] * 7, [1.0, 3.0, 7.0, 1.0, 1.0, 1.0, 1.0])
    assert found == pytest.approx(row, rel=1e-15)


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_numbers_have_a_finite_result(reducer: Reducer, dtype: str) -> None:
    """To the greatest there are, of both signs. A sum may itself be beyond them, so its signs balance here."""
    top = float(np.finfo(dtype).max)
    rows = [[top, top, -top, top / 3], [-top, top, -top, 1.0], [top, top, -top, -top], [-top, top, -top, top / 7],
            [top, top, -top, 1e-30], [-top, top, -top, top], [0.0, top, -top, -5.0]]  # fmt: skip
    if isinstance(reducer, Sum):
        rows = [[row[0]] for row in rows]
    weights = [3.0, 3.0, 1e300, 1e300, 0.1, 0.1, 1 / 3]
    found = reducer.reduce(stack_of(rows, dtype), weights)
    assert np.isfinite(found).all()
    if not isinstance(reducer, Sum):
        assert found[1:3].tolist() == [top, -top]


def test_huge_numbers_by_fractions() -> None:
    rows = [[GREATEST, GREATEST], [GREATEST, -GREATEST], [GREATEST / 2, 0.0], [-GREATEST, 1.0]]
    for weights in ([1.0] * 4, [3.0, 1.0, 4.0, 1.0], [1e300, 2e307, 1e308, 1e308]):
        total = sum(map(Fraction, weights))
        exact = [sum(Fraction(w) * Fraction(r[j]) for w, r in zip(weights, rows, strict=True)) / total for j in (0, 1)]
        assert reduced(Mean(), rows, weights) == pytest.approx([float(value) for value in exact], rel=1e-15)
    assert reduced(Sum(), [[GREATEST], [GREATEST], [-GREATEST], [-GREATEST / 2]]) == [GREATEST / 2]
    assert reduced(Median(), [[GREATEST], [GREATEST / 2]]) == [GREATEST * 0.75]


def test_a_sum_beyond_the_dtype_is_infinite() -> None:
    assert reduced(Sum(), [[GREATEST], [GREATEST]]) == [np.inf]
    assert Sum().reduce(stack_of([[3e38], [3e38]], "float32"), [1.0, 1.0]).tolist() == [np.inf]


def test_the_smallest_numbers_are_not_lost() -> None:
    tiny = 5e-324
    for reducer in (Mean(), Median(), TrimmedMean()):
        assert reduced(reducer, [[tiny], [tiny]]) == [tiny]


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
def test_no_copy_of_all_in_float64(reducer: Reducer) -> None:
    """16 MB in float32: a copy in float64 is 32."""
    stack = drawn(20, 200_000, "float32")
    tracemalloc.start()
    reducer.reduce(stack, [1.0] * 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6


@pytest.mark.parametrize("reducer", ALL, ids=by_kind)
def test_fewer_than_it_needs_are_refused(reducer: Reducer) -> None:
    with pytest.raises(ValueError, match=f"at least {reducer.least}"):
        reducer.reduce(drawn(7, 3)[: reducer.least - 1], [1.0] * (reducer.least - 1))
    assert reducer.reduce(drawn(7, 3)[: reducer.least], [1.0] * reducer.least).shape == (3,)
    assert reducer.reduce(drawn(reducer.least, 0), [1.0] * reducer.least).shape == (0,)


@pytest.mark.parametrize(
    ("cls", "members", "pointer"),
    [
        (TrimmedMean, {"fraction": 0.5}, "/fraction"),
        (TrimmedMean, {"fraction": -0.1}, "/fraction"),
        (TrimmedMean, {"fraction": float("nan")}, "/fraction"),
        (Krum, {"byzantine": -1}, "/byzantine"),
        (Krum, {"byzantine": 1.0}, "/byzantine"),
        (MultiKrum, {"select": 0}, "/select"),
        (Bulyan, {"byzantine": True}, "/byzantine"),
        (GeometricMedian, {"smoothing": 0.0}, "/smoothing"),
        (GeometricMedian, {"iterations": 0}, "/iterations"),
        (GeometricMedian, {"tolerance": -1.0}, "/tolerance"),
    ],
)
def test_options_out_of_bounds(cls: Any, members: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        cls(**members)
    assert refused.value.pointer == pointer
