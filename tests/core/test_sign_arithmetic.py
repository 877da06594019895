"""Rprop, and the cautious lion, against the papers' arithmetic in plain floats."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.optimizers.sign import Lion, Rprop, SignSgd, Signum
from core.schedules import Linear
from tests.core.build import trajectory

START = [1.0, -2.0, 0.25, 0.0]
GRADIENTS = [
    [0.5, -2.0, 0.001, 0.0],
    [0.25, 4.0, -0.002, 0.0],
    [-1.0, 1.5, -0.008, 2.0],
    [-0.75, -0.125, 0.0, 3.0],
    [-2.0, -3.0, 0.001, -1.0],
    [-1.0, -1.0, 0.062, 1.0],
    [3.0, -1.0, 0.5, 1.0],
]


def sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def each_alone(one: Callable[[float, list[float]], list[float]]) -> list[list[float]]:
    """The parameters after each step, of a method that sees one parameter at a time."""
    columns = [one(p, [g[i] for g in GRADIENTS]) for i, p in enumerate(START)]
    return [list(row) for row in zip(*columns, strict=True)]


def rprop(lr: float, low: float, high: float) -> list[list[float]]:
    def one(p: float, gradients: list[float]) -> list[float]:
        size, before, seen = lr, 0.0, []
        for g in gradients:
            if g * before > 0:
                size *= 1.2
            elif g * before < 0:
                size *= 0.5
            size = min(max(size, low), high)
            if g * before < 0:
                g = 0.0
            p -= size * sign(g)
            before = g
            seen.append(p)
        return seen

    return each_alone(one)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 50.0), (0.06, 0.13), (0.2, 0.3), (0.001, 0.05)])
def test_rprop(low: float, high: float) -> None:
    found = trajectory(Rprop(lr=0.1, min_step=low, max_step=high), START, GRADIENTS)
    np.testing.assert_allclose(found, rprop(0.1, low, high), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rprop_sees_the_sign_of_gradients_whose_product_vanishes(dtype: str) -> None:
    tiny = 1e-30 if dtype == "float32" else 1e-200
    found = trajectory(Rprop(lr=1.0, eta_plus=2.0), [0.0], [[tiny], [tiny], [-tiny], [-tiny]], dtype=dtype)
    assert found[:, 0].tolist() == [-1.0, -3.0, -3.0, -2.0]


def test_rprop_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(InvalidRecipe) as refused:
        Rprop(lr=Linear(init=0.1, end=0.2, steps=3))  # type: ignore[arg-type]
    assert refused.value.pointer == "/lr"
    with pytest.raises(InvalidRecipe) as refused:
        Rprop(min_step=2.0, max_step=1.0)
    assert refused.value.pointer == "/min_step"


def lion(*, shrink: float, cautious: bool) -> list[list[float]]:
    p, m, seen = list(START), [0.0] * 4, []
    for gradients in GRADIENTS:
        updates = [-0.1 * sign(0.6 * m[i] + 0.4 * g) for i, g in enumerate(gradients)]
        m = [0.8 * m[i] + 0.2 * g for i, g in enumerate(gradients)]
        if cautious:
            kept = [1.0 if u * g < 0 else 0.0 for u, g in zip(updates, gradients, strict=True)]
            share = max(sum(kept) / len(kept), 1e-3)
            updates = [u * keep / share for u, keep in zip(updates, kept, strict=True)]
        p = [q + u - shrink * q for q, u in zip(p, updates, strict=True)]
        seen.append(list(p))
    return seen


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(
    ("decay", "shrink"),
    [
        ({}, 0.0),
        ({"weight_decay": 0.3}, 0.1 * 0.3),
        ({"weight_decay": 0.3, "decay_scaling": "none"}, 0.3),
        # A schedule may pass through 0: the parameters are needed all the same.
        ({"weight_decay": Linear(init=0.0, end=0.0, steps=3)}, 0.0),
    ],
)
def test_lion(decay: dict[str, Any], shrink: float, cautious: bool) -> None:
    rule = Lion(lr=0.1, beta1=0.6, beta2=0.8, cautious=cautious, **decay)
    assert rule.needs == (frozenset({"params"}) if decay else frozenset())
    found = trajectory(rule, START, GRADIENTS)
    np.testing.assert_allclose(found, lion(shrink=shrink, cautious=cautious), rtol=1e-14, atol=1e-15)
    assert lion(shrink=shrink, cautious=True) != lion(shrink=shrink, cautious=False)


def test_a_cautious_step_that_would_be_wrong_everywhere_is_none() -> None:
    found = trajectory(Lion(lr=0.1, cautious=True), [1.0, 2.0], [[5.0, -5.0], [-0.1, 0.1]])
    assert found[1].tolist() == found[0].tolist()


@pytest.mark.parametrize("rule", [SignSgd(), Signum(), Lion(), Rprop()], ids=lambda rule: rule.kind)
def test_no_gradient_no_step(rule: Any) -> None:
    assert trajectory(rule, START, [[0.0] * 4, [-0.0] * 4]).tolist() == [START, START]
