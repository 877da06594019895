"""The core against the libraries, by what golden/make_golden.py wrote down of them; docs/agreement.md shows the table.

float64: the same to 1e-14 of the largest parameter. float32: 1e-6 of it, both from the library's own float32 run and
from its float64 one, which is the truth. A case with wider tolerances says why.
"""

import numpy as np
import pytest

from core.optimizers.adaptive import Adagrad
from core.optimizers.second_order import Newton
from tests.core.build import held, make, step, trajectory
from tests.core.golden.agreement import AVERAGE_TOLERANCE, SCHEDULE_TOLERANCE, Golden, apart, from_bits, to_bits

GOLDEN = Golden.load()
DENSE = {name: GOLDEN.arrays[f"scipy/dense-{name}"] for name in ("gradients", "hessian", "adagrad")}


def test_the_data_name_the_versions_of_their_oracles() -> None:
    assert {"torch", "optax", "jax", "keras", "pytorch_optimizer", "schedulefree", "scipy"} < set(
        GOLDEN.about["versions"]
    )
    assert GOLDEN.about["versions"]["torch"] == "2.13.0"


@pytest.mark.parametrize("name", GOLDEN.about["cases"])
def test_case(name: str) -> None:
    for what, distance, tolerance in GOLDEN.distances(name):
        assert distance <= tolerance, what


@pytest.mark.parametrize("name", GOLDEN.about["schedules"])
def test_schedule(name: str) -> None:
    assert GOLDEN.schedule_distance(name) <= SCHEDULE_TOLERANCE


@pytest.mark.parametrize("name", GOLDEN.about["plateaus"])
def test_plateau(name: str) -> None:
    assert GOLDEN.plateau_distance(name) <= SCHEDULE_TOLERANCE


@pytest.mark.parametrize("name", GOLDEN.about["averages"])
def test_average(name: str) -> None:
    assert GOLDEN.average_distance(name) <= AVERAGE_TOLERANCE


def test_float32_is_kept_to_the_bit() -> None:
    double = np.array([1.0, -0.0, 1e-50, 1.0, np.nan, 3.0])
    single = np.array([1.0 + 2**-23, 0.0, -1e-45, -1e30, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(from_bits(to_bits(single, double), double).view(np.int32), single.view(np.int32))


def test_the_distance_from_what_is_not_finite_is_infinite() -> None:
    assert apart(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert apart(np.array([1.0]), np.array([np.inf])) == float("inf")
    assert apart(np.array([1.0, 4.5]), np.array([1.0, 5.0])) == 0.1


def test_adagrad_full_matrix() -> None:
    rule = Adagrad(lr=0.1, eps=1e-3, initial_accumulator=0.2, matrix="full")
    found = trajectory(rule, [0.0] * 8, DENSE["gradients"].tolist())
    assert apart(found, DENSE["adagrad"]) <= 1e-13


@pytest.mark.parametrize(("name", "damping"), [("newton", 0.0), ("newton-damped", 0.7)])
def test_newton(name: str, damping: float) -> None:
    session = make(Newton(damping=damping), {"w": [0.0] * 8})
    step(session, {"w": DENSE["gradients"][0]}, hessian=DENSE["hessian"])
    assert apart(held(session), GOLDEN.arrays[f"scipy/dense-{name}"]) <= 1e-13
