"""The line search by itself, on functions of one number."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from core.optimizers import line_search
from core.optimizers.line_search import C1, C2, MOST_TRIALS, Search, Trial, advance, begin, lowest
from core.sums import dot, magnitude

Line = Callable[[float], tuple[float, float]]


def searched(line: Line, first: float = 1.0, narrow: float = 0.0) -> tuple[Search, list[float]]:
    """The search as it ended, and its trials. It goes through its array between them, as in a session."""
    kept = np.full(line_search.SIZE, math.nan)
    line_search.to_array(begin(*line(0.0), first), kept)
    steps = []
    while not (search := line_search.from_array(kept)).over:
        steps.append(search.step)
        line_search.to_array(advance(search, *line(search.step), narrow), kept)
    return search, steps


def quadratic(minimum: float) -> Line:
    return lambda a: ((a - minimum) ** 2, 2 * (a - minimum))


def rational(a: float) -> tuple[float, float]:
    """Moré & Thuente 1994, (5.1) with β = 2: concave far out, its minimum at √2."""
    return -a / (a * a + 2), (a * a - 2) / (a * a + 2) ** 2


def hidden(a: float) -> tuple[float, float]:
    """Moré & Thuente 1994, (5.2) with β = 0.004: nearly straight, then a sharp turn at 1.596."""
    b = a + 0.004
    return b**5 - 2 * b**4, 5 * b**4 - 8 * b**3


def barrier(a: float) -> tuple[float, float]:
    """Nothing is defined from 2e-6 on: what a client sends of there."""
    return (a * 1e3 - math.log(2e-6 - a) / 1e3 - a * 2e3, -1e3 + 1e-3 / (2e-6 - a)) if a < 2e-6 else (1e300, 0.0)


LINES: dict[str, Line] = {
    "near": quadratic(0.3), "far": quadratic(1e5), "tiny": quadratic(1e-7), "rational": rational, "hidden": hidden,
    "barrier": barrier,
}  # fmt: skip


@pytest.mark.parametrize("first", [1e-3, 1e-1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("name", LINES)
def test_what_is_accepted_satisfies_both_conditions(name: str, first: float) -> None:
    line = LINES[name]
    search, steps = searched(line, first)
    (loss, slope), (there, flat) = line(0.0), line(search.step)
    assert search.phase == line_search.ACCEPTED
    assert search.step == steps[-1] > 0
    assert there <= loss + C1 * search.step * slope
    assert abs(flat) <= C2 * abs(slope)
    assert len(steps) <= (20 if name == "hidden" else 14)


def test_the_first_trial_is_taken_if_it_will_do() -> None:
    assert searched(quadratic(0.9))[1] == [1.0]


@pytest.mark.parametrize("value", [1e300, math.inf, math.nan])
def test_a_loss_that_is_none_makes_the_step_ten_times_smaller(value: float) -> None:
    steps = searched(lambda a: quadratic(1e-4)(a) if a < 1e-3 else (value, 0.0))[1]
    assert steps[:4] == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert len(steps) < 7


def test_a_slope_that_is_none_is_not_accepted() -> None:
    search, steps = searched(lambda a: (-a, math.nan if a > 0.5 else -1.0 + 1.9 * a))
    assert search.phase == line_search.ACCEPTED
    assert search.step <= 0.5
    assert steps[0] == 1.0


def test_where_nothing_falls_it_fails_and_does_not_go_on_for_ever() -> None:
    search, steps = searched(lambda a: (a, -1.0))
    assert search.phase == line_search.FAILED
    assert len(steps) == MOST_TRIALS
    assert all(later < earlier for earlier, later in pairwise(steps))


def test_an_interval_too_narrow_ends_it() -> None:
    search, steps = searched(lambda a: (a, -1.0), narrow=1e-3)
    assert search.phase == line_search.FAILED
    assert len(steps) < 10


def test_a_loss_that_falls_for_ever_is_followed_for_as_long_as_there_are_trials() -> None:
    search, steps = searched(lambda a: (-a, -1.0))
    assert search.phase == line_search.ACCEPTED
    assert len(steps) == MOST_TRIALS
    assert math.isfinite(search.step)


def cliff(a: float) -> tuple[float, float]:
    """Falls steeply up to 0.31 and is high beyond: no point is flat."""
    return (-a, -1.0) if a <= 0.31 else (5.0, 1.0)


def test_the_best_point_is_handed_out_again_and_taken() -> None:
    search, steps = searched(cliff)
    assert search.phase == line_search.ACCEPTED
    assert search.step == steps[-1] == pytest.approx(0.31, rel=1e-3)
    assert search.step in steps[:-1]
    assert len(steps) == MOST_TRIALS + 1


def test_a_best_point_that_is_no_longer_good_is_not_taken() -> None:
    returning = Search(line_search.RETURNING, 25.0, 0.3, Trial(0.0, 1.0, -1.0))
    assert advance(returning, 1.5, 0.0, 0.0).phase == line_search.FAILED
    assert advance(returning, math.nan, 0.0, 0.0).phase == line_search.FAILED
    assert advance(returning, 0.5, 0.0, 0.0).phase == line_search.ACCEPTED


def test_the_cubic_of_two_points_has_its_minimum_where_it_should() -> None:
    # a³ - 3a has it at 1, wherever the two points are.
    points = [Trial(a, a**3 - 3 * a, 3 * a * a - 3) for a in (-0.5, 0.0, 0.7, 2.0, 3.5)]
    for one in points:
        for other in points:
            if one != other:
                assert lowest(one, other) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Trial(0.0, 0.0, -1.0), Trial(0.0, 1.0, -1.0)),  # the same step
        (Trial(0.0, 0.0, -1.0), Trial(1.0, -1.0, -1.0)),  # straight down
        (Trial(0.0, 0.0, -1.0), Trial(1.0, -0.7, -1.0)),  # no minimum
        (Trial(0.0, 0.0, -1.0), Trial(1.0, 1e300, 0.0)),  # too large to square
        (Trial(0.0, 0.0, -1.0), Trial(1.0, math.inf, math.nan)),
    ],
)
def test_where_the_cubic_has_no_minimum_it_says_so(one: Trial, other: Trial) -> None:
    assert math.isnan(lowest(one, other))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 16_384, 40_000])
def test_sums_are_those_of_float64(n: int, dtype: type) -> None:
    random = np.random.default_rng(n)
    a, b = random.normal(size=n).astype(dtype), random.normal(size=n).astype(dtype)
    exact = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)), Fraction(0))
    assert dot(a, b) == pytest.approx(float(exact), rel=1e-12, abs=1e-12)
    assert magnitude(a) == pytest.approx(math.fsum(abs(float(x)) for x in a), rel=1e-14)
    shifted = np.concatenate([[7], a]).astype(dtype)[1:]  # elsewhere in memory, aligned otherwise
    assert dot(shifted, b) == dot(a, b)
