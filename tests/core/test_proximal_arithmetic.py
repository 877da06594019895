"""Follow the regularized leader against McMahan's per-coordinate algorithm, in plain floats."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.optimizers.proximal import Ftrl
from core.schedules import Linear
from tests.core.arithmetic import GRADIENTS
from tests.core.build import trajectory


def by_hand(start: list[float], alpha: float, options: dict[str, Any]) -> list[list[float]]:
    """Algorithm 1 of the paper, with the sum of squares from `initial_accumulator` on."""
    w, z, n, seen = list(start), [0.0] * 4, [options["initial_accumulator"]] * 4, []
    for gradients in GRADIENTS:
        for i, g in enumerate(gradients):
            sigma = (math.sqrt(n[i] + g * g) - math.sqrt(n[i])) / alpha
            z[i] += g + 2 * options["l2_shrinkage"] * w[i] - sigma * w[i]
            n[i] += g * g
            quadratic = (options["beta"] + math.sqrt(n[i])) / alpha + options["l2"]
            if quadratic == 0:
                continue  # the algorithm divides by 0
            if abs(z[i]) <= options["l1"]:
                w[i] = 0.0
            else:
                w[i] = -(z[i] - math.copysign(options["l1"], z[i])) / quadratic
        seen.append(list(w))
    return seen


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.25, -0.5]])
def test_ftrl(start: list[float]) -> None:
    choices = {
        "beta": [0.0, 1.0],
        "l1": [0.0, 0.3],
        "l2": [0.0, 0.5],
        "l2_shrinkage": [0.0, 0.1],
        "initial_accumulator": [0.0, 0.1],
    }
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        seen = trajectory(Ftrl(lr=0.2, **options), start, GRADIENTS)
        np.testing.assert_allclose(seen, by_hand(start, 0.2, options), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_l1_makes_zeros_that_are_exact(dtype: str) -> None:
    random = np.random.default_rng(4)
    start, gradients = random.normal(size=200), random.normal(size=(40, 200))
    seen = trajectory(Ftrl(lr=0.1, l1=2.0), start.tolist(), gradients.tolist(), dtype=dtype)
    zeros = np.count_nonzero(seen[-1] == 0.0)
    assert 20 < zeros < 180
    assert np.count_nonzero(np.abs(seen[-1]) < 1e-5) == zeros


def test_a_coordinate_of_which_nothing_is_known_keeps_still() -> None:
    seen = trajectory(Ftrl(lr=0.1, beta=0.0), [1.0, -3.0], [[0.0, 0.0], [0.0, 1.0]])
    assert seen[0].tolist() == [1.0, -3.0]
    assert seen[1, 0] == 1.0
    assert seen[1, 1] == pytest.approx(-3.1)


def test_what_is_refused() -> None:
    with pytest.raises(InvalidRecipe) as refused:
        Ftrl(lr=0.0)
    assert refused.value.pointer == "/lr"
    with pytest.raises(InvalidRecipe) as refused:
        Ftrl(initial_accumulator=Linear(0.1, 0.2, 3))  # type: ignore[arg-type]
    assert refused.value.pointer == "/initial_accumulator"
