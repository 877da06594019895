"""lars, lamb and novograd against their papers' arithmetic, worked out for one tensor in plain loops over floats.

What some library does the same way is in golden/layerwise_cases.py; here is what none does, and the corners.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import pytest

from core.optimizers import Optimizer
from core.optimizers.descent import Momentum
from core.optimizers.layerwise import Lamb, Lars, NovoGrad, length
from core.recipe import Group
from core.schedules import Linear
from tests.core.build import assert_same_bits, go, held, make, trajectory

START = [1.0, -2.0, 0.25]
GRADIENTS = [[0.5, -2.0, 0.001953125], [0.25, 4.0, -0.5], [0.0, 0.0, 0.0], [-1.0, 1.5, 8.0], [0.75, -0.125, 0.015625]]

Vector: TypeAlias = list[float]
Update: TypeAlias = Callable[[Vector, Vector, int], Vector]

SHAPES = [(), (0,), (1,), (2, 3), (3, 0), (0, 4), (2, 1, 3), (2,) * 8]
EVERY = [
    Lars(weight_decay=0.1),
    Lars(denominator="whole", clip=True),
    Lamb(),
    Lamb(eps=0.0),
    NovoGrad(),
    NovoGrad(eps=0),
]


def size_of(vector: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in vector))


def by_hand(update: Update, start: Vector = START, gradients: Sequence[Vector] = GRADIENTS) -> list[Vector]:
    p, seen = list(start), []
    for t, g in enumerate(gradients, 1):
        u = update(p, g, t)
        p = [a + b for a, b in zip(p, u, strict=True)]
        seen.append(p)
    return seen


def agree(rule: Optimizer, update: Update) -> None:
    truth = np.array(by_hand(update))
    for dtype, tolerance in (("float64", 1e-14), ("float32", 1e-6)):
        found = trajectory(rule, START, GRADIENTS, dtype=dtype)
        assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


def test_lars_of_the_paper_has_the_rate_in_the_velocity() -> None:
    v = [0.0] * 3

    def update(p: Vector, g: Vector, t: int) -> Vector:
        rate = max(2.0 - 0.5 * (t - 1), 0.5)
        ratio = 0.01 * size_of(p) / (size_of(g) + 0.1 * size_of(p) + 0.001)
        v[:] = [0.9 * a + rate * ratio * (b + 0.1 * c) for a, b, c in zip(v, g, p, strict=True)]
        return [-a for a in v]

    agree(Lars(lr=Linear(2.0, 0.5, 3), trust_coefficient=0.01, weight_decay=0.1, eps=0.001), update)


def test_lars_clipped_takes_no_more_than_the_rate() -> None:
    """LARC: the second gradient's ratio is below the rate, the last one's above."""
    v, clipped = [0.0] * 3, []

    def update(p: Vector, g: Vector, t: int) -> Vector:
        ratio = 0.1 * size_of(p) / size_of(g) if any(g) else 1.0
        clipped.append(ratio > 0.1)
        d = [min(ratio / 0.1, 1.0) * x for x in g]
        v[:] = [0.5 * a + b for a, b in zip(v, d, strict=True)]
        return [-0.1 * (b + 0.5 * a) for a, b in zip(v, d, strict=True)]

    agree(
        Lars(lr=0.1, momentum=0.5, trust_coefficient=0.1, clip=True, nesterov=True, lr_in_velocity=False),
        update,
    )
    assert set(clipped) == {True, False}


def test_lars_moves_a_tensor_that_is_zero_by_its_rate() -> None:
    assert trajectory(Lars(lr=0.5), [0.0, 0.0], [[3.0, 4.0]]).tolist() == [[-1.5, -2.0]]


def test_lars_of_a_gradient_that_is_zero_goes_on_with_its_velocity() -> None:
    found = trajectory(Lars(lr=1.0, trust_coefficient=1.0, momentum=0.5), [3.0, 4.0], [[0.0, 5.0], [0.0, 0.0]])
    assert found.tolist() == [[3.0, -1.0], [3.0, -3.5]]


def test_a_group_that_is_not_adapted_has_plain_momentum() -> None:
    session = make(Lars(lr=0.5), {"w": START, "b": START}, groups=[Group("b", {"adapt": False})])
    for g in GRADIENTS:
        go(session, {"w": np.array(g), "b": np.array(g)})
    alone = trajectory(Momentum(lr=0.5, lr_in_velocity=True), START, GRADIENTS)
    adapted = trajectory(Lars(lr=0.5), START, GRADIENTS)
    assert_same_bits(held(session)[3:], alone[-1])
    assert_same_bits(held(session)[:3], adapted[-1])


@pytest.mark.parametrize("bounds", [{}, {"min_norm": 100.0}, {"max_norm": 0.5}])
def test_lamb_steps_are_as_long_as_the_tensor_times_the_rate(bounds: dict[str, float]) -> None:
    p, scale = np.array(START), None
    for after in trajectory(Lamb(lr=0.1, **bounds), START, GRADIENTS):
        scale = min(max(length(p), bounds.get("min_norm", 0.0)), bounds.get("max_norm", math.inf))
        assert length(after - p) == pytest.approx(0.1 * scale, rel=1e-13)
        p = after


def test_lamb_with_bounded_norm() -> None:
    m, v = [0.0] * 3, [0.0] * 3

    def update(p: Vector, g: Vector, t: int) -> Vector:
        m[:] = [0.9 * a + (1 - 0.9) * b for a, b in zip(m, g, strict=True)]
        v[:] = [0.99 * a + (1 - 0.99) * b * b for a, b in zip(v, g, strict=True)]
        r = [
            a / (1 - 0.9**t) / (math.sqrt(b / (1 - 0.99**t)) + 1e-6) + 0.1 * c for a, b, c in zip(m, v, p, strict=True)
        ]
        ratio = min(max(size_of(p), 0.5), 2.0) / size_of(r)
        return [-0.05 * ratio * x for x in r]

    agree(Lamb(lr=0.05, beta2=0.99, weight_decay=0.1, min_norm=0.5, max_norm=2.0), update)


def test_novograd_starts_with_the_first_gradient_that_is_not_zero() -> None:
    rule = NovoGrad(lr=0.1, weight_decay=0.1, grad_averaging=True, decoupled=True)
    without = trajectory(rule.changed({"weight_decay": 0.0}), START, GRADIENTS)
    late = trajectory(rule.changed({"weight_decay": 0.0}), START, [[0.0] * 3, *GRADIENTS])
    assert_same_bits(late[1:], without)
    # Its direction has the length 1, whatever the gradient's.
    assert length(without[0] - np.array(START)) == pytest.approx(0.1, rel=1e-7)


def test_novograd_of_the_paper() -> None:
    state = {"v": 0.0}
    m = [0.0] * 3

    def update(p: Vector, g: Vector, t: int) -> Vector:
        square = sum(x * x for x in g)
        state["v"] = square if t == 1 else 0.98 * state["v"] + (1 - 0.98) * square
        d = [x / (math.sqrt(state["v"]) + 1e-8) + 0.1 * y for x, y in zip(g, p, strict=True)]
        m[:] = d if t == 1 else [0.95 * a + b for a, b in zip(m, d, strict=True)]
        return [-0.1 * x for x in m]

    agree(NovoGrad(lr=0.1, weight_decay=0.1), update)


def test_length_where_squares_are_out_of_range() -> None:
    assert length(np.array([3e300, -4e300])) == pytest.approx(5e300, rel=1e-15)
    assert length(np.array([[3e-300], [4e-300]])) == pytest.approx(5e-300, rel=1e-15)
    assert length(np.array([3e-40, 4e-40], np.float32)) == pytest.approx(5e-40, rel=1e-4)  # subnormal
    assert length(np.zeros((2, 0))) == 0.0
    assert length(np.array([1.0, math.inf])) == math.inf


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.kind)
def test_every_shape_and_magnitude_stays_finite(rule: Optimizer, dtype: str) -> None:
    random = np.random.default_rng(0)
    session = make(rule, {str(shape): np.ones(shape) for shape in SHAPES}, dtype=dtype)
    for scale in (0.0, 1.0, 1e-40, 1e37, 0.0, 1e-3):
        go(session, {str(shape): scale * random.normal(size=shape) for shape in SHAPES})
        assert np.isfinite(held(session)).all()


@pytest.mark.parametrize("rule", [Lars(adapt=False), Lamb(adapt=False, weight_decay=0.0), NovoGrad()])
def test_a_client_may_hold_the_parameters_where_the_form_does_not_use_them(rule: Optimizer) -> None:
    session = make(rule, {"w": START}, held=False)
    u = go(session, {"w": np.array(GRADIENTS[0])}, want_updates=True).updates
    assert u is not None
    np.testing.assert_allclose(START + u, trajectory(rule, START, GRADIENTS[:1])[0], rtol=1e-14)
