"""Penalties, against the derivative worked out by hand."""

import numpy as np
import pytest

from core.layout import Array
from core.schedules import Linear
from core.transforms.penalties import L1, WeightDecay
from tests.core.transforms.pieces import Running, changed, numbers, tensors

GRADIENTS, PARAMS = tensors(), tensors(seed=8)


def test_the_parameters_are_added_to_the_gradient() -> None:
    found = changed(WeightDecay(0.1), GRADIENTS, PARAMS)
    for name, g in GRADIENTS.items():
        expected = [value + 0.1 * p for value, p in zip(numbers(g), numbers(PARAMS[name]), strict=True)]
        assert numbers(found[name]) == expected


def test_the_signs_of_the_parameters_are_added_to_the_gradient() -> None:
    found = changed(L1(0.25), {"w": np.zeros(4)}, {"w": np.array([-3.0, 0.0, 1e-9, 5.0])})["w"]
    assert found.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_float32_stays_float32() -> None:
    g, p = tensors(dtype="float32"), tensors(seed=8, dtype="float32")
    for transform in (WeightDecay(0.1), L1(0.1)):
        found: dict[str, Array] = changed(transform, g, p)
        assert {array.dtype.name for array in found.values()} == {"float32"}


@pytest.mark.parametrize("transform", [WeightDecay(0.1), L1(0.1)])
def test_parameters_are_needed_and_rows_do_not_stay_alone(transform: WeightDecay | L1) -> None:
    assert transform.needs == {"params"}
    assert not transform.keeps_rows  # the other rows' parameters decay too


def test_the_strength_may_be_a_schedule() -> None:
    running = Running(WeightDecay(Linear(0.5, 0.25, 1)), {"w": (1,)})  # type: ignore[arg-type]
    found = [running.take({"w": [0.0]}, {"w": [2.0]}) for _ in range(3)]
    assert [float(each["w"][0]) for each in found if each is not None] == [1.0, 0.5, 0.5]
