"""FedOpt's three methods against the paper's Algorithm 2, worked out in plain floats.

The paper adds Δ, the mean of what the clients changed; the gradient here is -Δ.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.optimizers.federated import FedAdagrad, FedAdam, FedYogi
from core.schedules import Linear
from tests.core.build import trajectory

START = [1.0, -2.0, 0.25, 0.0]
DELTAS = [
    [0.5, -2.0, 0.001, 0.0],
    [0.25, 4.0, -0.002, 0.0],
    [-1.0, 0.001, 0.05, 0.0],
    [0.001, -0.125, 0.003, 3e-4],
    [2.0, 3.0, -0.0005, -1.0],
]
GRADIENTS = [[-delta for delta in deltas] for deltas in DELTAS]
LR, TAU, BETA2 = 0.05, 0.01, 0.9


def sign(x: float) -> float:
    return float((x > 0) - (x < 0))


VARIANCES: dict[type, Callable[[float, float], float]] = {
    FedAdagrad: lambda v, d: v + d**2,
    FedYogi: lambda v, d: v - (1 - BETA2) * d**2 * sign(v - d**2),
    FedAdam: lambda v, d: BETA2 * v + (1 - BETA2) * d**2,
}


def by_hand(variance: Callable[[float, float], float], beta1: float, v0: float) -> list[list[float]]:
    """The parameters after each round."""
    x, m, v = list(START), [0.0] * 4, [v0] * 4
    seen = []
    for deltas in DELTAS:
        for i, delta in enumerate(deltas):
            m[i] = beta1 * m[i] + (1 - beta1) * delta
            v[i] = variance(v[i], delta)
            x[i] = x[i] + LR * m[i] / (v[i] ** 0.5 + TAU)
        seen.append(list(x))
    return seen


@pytest.mark.parametrize("start", ["tau", "zero"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", VARIANCES)
def test_the_papers_algorithm(kind: Any, beta1: float, start: str) -> None:
    beta2 = {} if kind is FedAdagrad else {"beta2": BETA2}
    rule = kind(lr=LR, tau=TAU, beta1=beta1, start=start, **beta2)
    expected = by_hand(VARIANCES[kind], beta1, TAU**2 if start == "tau" else 0.0)
    np.testing.assert_allclose(trajectory(rule, START, GRADIENTS), expected, rtol=1e-14, atol=1e-15)


def test_the_papers_constants() -> None:
    assert (FedAdagrad().beta1, FedAdam().beta1, FedYogi().beta1) == (0.0, 0.9, 0.9)
    assert FedAdam().beta2 == FedYogi().beta2 == 0.99
    assert FedAdam().initial("v") == 1e-3 * 1e-3
    assert FedAdam().initial("m") == 0.0


def test_tau_may_be_a_schedule_where_nothing_starts_from_it() -> None:
    tau = Linear(init=0.1, end=0.01, steps=3)
    with pytest.raises(InvalidRecipe) as refused:
        FedAdam(tau=tau)  # type: ignore[arg-type]
    assert refused.value.pointer == "/tau"
    found = trajectory(FedAdam(lr=1.0, tau=tau, beta1=0.0, start="zero"), [0.0], [[1.0]])  # type: ignore[arg-type]
    assert found[0, 0] == pytest.approx(-1.0 / (0.01**0.5 + tau.at(1)), rel=1e-14)
