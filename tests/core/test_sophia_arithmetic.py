"""Sophia against its paper, in plain floats."""

import itertools
from typing import Any

import numpy as np
import pytest

from core.errors import HessianRequired
from core.optimizers.sophia import Sophia
from tests.core.arithmetic import GRADIENTS, START
from tests.core.build import held, make, step

# Of the steps 1, 4 and 7, with curvatures of both signs and 0.
DIAGONALS = [[2.0, 5.0, -1.0, 0.0], [3.0, -40.0, 2.0, 0.5], [0.1, 9.0, 0.0, 1.0]]
LR, BETA1, BETA2, GAMMA, EPS = 0.05, 0.8, 0.7, 0.4, 0.01


def by_hand(options: dict[str, Any]) -> list[list[float]]:
    p, m, h, seen = list(START), [0.0] * 4, [0.0] * 4, []
    shrink = options["weight_decay"] * (LR if options["decay_scaling"] == "lr" else 1.0)
    for t, g in enumerate(GRADIENTS, 1):
        if t in (1, 4, 7):
            h = [BETA2 * a + (1 - BETA2) * b for a, b in zip(h, DIAGONALS[(t - 1) // 3], strict=True)]
        for i in range(4):
            m[i] = BETA1 * m[i] + (1 - BETA1) * g[i]
            along = m[i] / (1 - BETA1**t) if options["bias_correction"] else m[i]
            if options["eps_form"] == "max":
                ratio = along / max(GAMMA * h[i], EPS)
            else:
                ratio = along / (max(GAMMA * h[i], 0.0) + EPS)
            p[i] += -LR * max(-1.0, min(1.0, ratio)) - shrink * p[i]
        seen.append(list(p))
    return seen


def test_sophia() -> None:
    choices = {
        "weight_decay": [0.0, 0.2],
        "decay_scaling": ["lr", "none"],
        "eps_form": ["max", "added"],
        "bias_correction": [False, True],
    }
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        method = Sophia(lr=LR, beta1=BETA1, beta2=BETA2, gamma=GAMMA, eps=EPS, interval=3, **options)
        session, seen = make(method, {"w": START}), []
        for t, g in enumerate(GRADIENTS, 1):
            beside = {"hessian_diagonal": {"w": np.array(DIAGONALS[(t - 1) // 3])}} if method.due(t) else {}
            step(session, {"w": np.array(g)}, **beside)
            seen.append(held(session).copy())
        np.testing.assert_allclose(seen, by_hand(options), rtol=1e-12, atol=1e-15)


def test_a_diagonal_is_due_at_the_first_step_and_every_interval_after() -> None:
    assert [t for t in range(1, 32) if Sophia().due(t)] == [1, 11, 21, 31]
    session = make(Sophia(interval=2), {"w": START})
    diagonal = {"w": np.array(DIAGONALS[0])}
    with pytest.raises(HessianRequired):
        step(session, {"w": np.array(GRADIENTS[0])})
    step(session, {"w": np.array(GRADIENTS[0])}, hessian_diagonal=diagonal)
    step(session, {"w": np.array(GRADIENTS[1])})
    with pytest.raises(HessianRequired):
        step(session, {"w": np.array(GRADIENTS[2])})


def test_one_that_was_not_due_counts_too() -> None:
    sessions = [make(Sophia(interval=interval), {"w": START}) for interval in (1, 5)]
    for t, g in enumerate(GRADIENTS):
        for session in sessions:
            step(session, {"w": np.array(g)}, hessian_diagonal={"w": np.array(DIAGONALS[t % 3])})
    assert held(sessions[0]).tolist() == held(sessions[1]).tolist()


def test_without_positive_curvature_it_goes_by_the_sign() -> None:
    session = make(Sophia(lr=0.125, weight_decay=0.0), {"w": [1.0, 1.0, 1.0]})
    step(session, {"w": np.array([3.0, -0.001, 0.0])}, hessian_diagonal={"w": np.array([-1.0, 0.0, -2.0])})
    assert held(session).tolist() == [0.875, 1.125, 1.0]
