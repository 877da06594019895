"""Averages over the parameters, where they could go wrong: in float32, over many steps, and before they begin."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.averaging import KINDS, Averaging, Ema, Polyak
from core.errors import InvalidRecipe
from core.evaluate import BLOCK
from core.optimizers.descent import Sgd
from core.schedules import Constant
from tests.core.build import bits, held, make, step


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("start", ["zero", "first"])
def test_average_of_float32_has_no_bias(decay: float, start: str) -> None:
    """float32(decay) and float32(1 - decay) do not add up to 1: at 0.9999 they are 1.7e-4 apart from it together.

    The values wander a little, as parameters do; a sum of them is rounded without a preference then.
    """
    random = np.random.default_rng(2)
    steps, level = int(6 / (1 - decay)), random.uniform(0.5, 2.0, 500)
    rule = Ema(decay=decay, start=start)  # type: ignore[arg-type]
    average, truth = np.zeros(500, np.float32), np.zeros(500)
    for t in range(1, steps + 1):
        p = (level * (1 + 0.01 * random.normal(size=500))).astype(np.float32)
        rule.include(average, p, t)
        weight = 1.0 if start == "first" and t == 1 else 1 - decay
        truth += weight * (p - truth)
    if start == "zero":
        truth /= 1 - decay**steps
    relative = rule.result(average, p, steps) / truth - 1
    assert abs(relative.mean()) < 1e-6
    assert abs(relative).max() < 2e-5


@pytest.mark.parametrize("rule", [Ema(start="first"), Ema(decay=0.0), Polyak()])
def test_average_of_one_value_is_that_value(rule: Averaging) -> None:
    p = np.random.default_rng(0).normal(size=2 * BLOCK + 1).astype(np.float32)
    average = np.zeros_like(p)
    rule.include(average, p, 1)
    np.testing.assert_array_equal(rule.result(average, p, 1), p)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10**6))
def test_the_correction_is_never_a_division_by_zero(decay: float, t: int) -> None:
    p = np.ones(1)
    assert np.isfinite(Ema(decay=decay).result(p, p, t)).all()


@given(st.sampled_from([0, 1, 5]), st.integers(1, 12))
def test_polyak_is_a_mean(start: int, steps: int) -> None:
    points = np.random.default_rng(steps).normal(size=(steps, 3))
    average = np.zeros(3)
    for t, point in enumerate(points, 1):
        Polyak(start=start).include(average, point, t)
    counted = points[max(start, 1) - 1 :] if steps >= max(start, 1) else points[-1:]
    expected = [math.fsum(column) / len(counted) for column in counted.T]
    np.testing.assert_allclose(Polyak(start=start).result(average, points[-1], steps), expected, rtol=0, atol=1e-14)


def test_parameters_that_were_infinite_before_it_began_do_not_matter() -> None:
    average = np.zeros(1)
    Polyak(start=3).include(average, np.array([np.inf]), 2)
    Polyak(start=3).include(average, np.array([2.0]), 3)
    assert average.tolist() == [2.0]


@pytest.mark.parametrize("rule", [Ema(decay=0.9), Ema(decay=0.9, start="first"), Polyak(start=2)])
def test_frozen_tensors_average_to_themselves(rule: Averaging) -> None:
    session = make(Sgd(lr=0.0), {"w": [0.1, -3.0]}, averaging=rule)
    np.testing.assert_array_equal(bits(session.final_point()), bits(held(session)))
    for _ in range(7):
        step(session, {"w": np.ones(2)})
        np.testing.assert_allclose(session.final_point(), [0.1, -3.0], rtol=1e-15)


def test_refused() -> None:
    for make_it, pointer in [
        (lambda: Ema(decay=1.0), "/decay"),
        (lambda: Ema(decay=-0.1), "/decay"),
        (lambda: Ema(decay=math.nan), "/decay"),
        (lambda: Ema(decay=Constant(0.5)), "/decay"),  # type: ignore[arg-type]
        (lambda: Polyak(start=-1), "/start"),
    ]:
        with pytest.raises(InvalidRecipe) as refused:
            make_it()
        assert refused.value.pointer == pointer


def test_every_kind_is_described() -> None:
    assert set(KINDS) == {"ema", "polyak"}
    for kind, cls in KINDS.items():
        assert (cls.kind, bool(cls.formula), cls.url[:8]) == (kind, True, "https://")
