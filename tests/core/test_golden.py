"""The core against torch, optax and scipy, by what golden/make_golden.py wrote down of them.

float64: the same to 1e-14 of the largest parameter; measured, at most 1.5e-15. float32: 1e-6 of it, both from the
library's own float32 run (measured: 1.8e-7) and from its float64 one, which is the truth (measured: 5.2e-7).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.layout import Array
from core.optimizers.adaptive import Adagrad
from core.optimizers.second_order import Newton
from tests.core.build import averaging_of, held, make, optimizer_of, schedule_of, step, trajectory

with np.load(Path(__file__).parent / "golden" / "golden.npz") as archive:
    GOLDEN: dict[str, Array] = dict(archive)
ABOUT: dict[str, Any] = json.loads(str(GOLDEN["about"]))

TOLERANCE = {"float64": 1e-14, "float32": 1e-6}
# torch shrinks parameters by float32(1 - lr · weight_decay), whose rounding adds up: its float32 run is 1.07e-6 away
# from its float64 one after 60 steps, ours 4.7e-7.
WIDER = {("torch-adamw", "float32"): 2e-6}


def apart(found: Array, golden: Array) -> float:
    """The largest difference, relative to the largest golden value."""
    return float(np.abs(found.astype(np.float64) - golden).max() / np.abs(golden).max())


def test_the_data_name_the_versions_of_their_oracles() -> None:
    assert set(ABOUT["versions"]) == {"torch", "optax", "jax", "scipy", "numpy"}
    assert ABOUT["versions"]["torch"] == "2.13.0"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ABOUT["cases"])
def test_trajectory(name: str, dtype: str) -> None:
    golden = GOLDEN[f"{name}/{dtype}"]
    split = [GOLDEN["start"][:48].reshape(8, 6), GOLDEN["start"][48:]]
    session = make(optimizer_of(ABOUT["cases"][name]), dict(zip("wb", split, strict=True)), dtype=dtype)
    assert session.recipe.layout.shapes == ABOUT["shapes"]
    seen = []
    for g in GOLDEN["gradients"]:
        step(session, {"b": g[48:], "w": g[:48].reshape(8, 6)})
        seen.append(held(session).copy())
    found = np.stack([seen[count - 1] for count in ABOUT["kept"]])
    assert golden.dtype == found.dtype == dtype
    assert apart(found, golden) <= WIDER.get((name, dtype), TOLERANCE[dtype])
    assert apart(found, GOLDEN[f"{name}/float64"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ABOUT["schedules"])
def test_schedule(name: str) -> None:
    golden = GOLDEN["schedules"][list(ABOUT["schedules"]).index(name)]
    schedule = schedule_of(ABOUT["schedules"][name])
    np.testing.assert_allclose([schedule.at(t) for t in range(1, 51)], golden, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ABOUT["averages"])
def test_average(name: str) -> None:
    points = GOLDEN["gradients"].astype(np.float64)
    averaging = averaging_of(ABOUT["averages"][name])
    average = np.zeros(points.shape[1])
    for t, point in enumerate(points, 1):
        averaging.include(average, point, t)
    assert apart(averaging.result(average, points[-1], len(points)), GOLDEN[f"average/{name}"]) <= 1e-14


def test_adagrad_full_matrix() -> None:
    rule = Adagrad(lr=0.1, eps=1e-3, initial_accumulator=0.2, matrix="full")
    found = trajectory(rule, [0.0] * 8, GOLDEN["dense/gradients"])
    assert apart(found, GOLDEN["dense/adagrad"]) <= 1e-13


@pytest.mark.parametrize(("name", "damping"), [("newton", 0.0), ("newton-damped", 0.7)])
def test_newton(name: str, damping: float) -> None:
    session = make(Newton(damping=damping), {"w": [0.0] * 8})
    step(session, {"w": GOLDEN["dense/gradients"][0]}, hessian=GOLDEN["dense/hessian"])
    assert apart(held(session), GOLDEN[f"dense/{name}"]) <= 1e-13
