"""Means and sums over several gradients, against loops over Python's floats."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.schedules import Linear
from core.transforms.accumulating import Accumulate, GradientEma
from tests.core.transforms.pieces import Running, close, numbers, tensors

MANY = [tensors(seed) for seed in range(12)]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_one_step_of_several_gradients(steps: int, reduce: Any) -> None:
    running = Running(Accumulate(steps, reduce))
    for count, gradients in enumerate(MANY, 1):
        found = running.take(gradients)
        assert (found is None) == (count % steps != 0)
        if found is None:
            continue
        for name, array in found.items():
            columns = zip(*[numbers(g[name]) for g in MANY[count - steps : count]], strict=True)
            sums = [math.fsum(column) for column in columns]
            close(array, [total / steps if reduce == "mean" else total for total in sums])


def test_the_gradient_that_was_made_does_not_change_with_the_next() -> None:
    running = Running(Accumulate(1), {"w": (1,)})
    first = running.take({"w": [3.0]})
    running.take({"w": [5.0]})
    assert first is not None
    assert numbers(first["w"]) == [3.0]


def test_a_mean_of_numbers_whose_sum_overflows() -> None:
    running = Running(Accumulate(3), {"w": (1,)}, "float32")
    found = [running.take({"w": np.array([3e38], np.float32)}) for _ in range(3)]
    assert found[2] is not None
    assert numbers(found[2]["w"]) == [float(np.float32(3e38))]


def test_fewer_steps_than_have_come_already_end_the_wait() -> None:
    running = Running(Accumulate(5), {"w": (1,)})
    for value in (1.0, 2.0, 3.0):
        assert running.take({"w": [value]}) is None
    running.transform = Accumulate(2)
    found = running.take({"w": [6.0]})
    assert found is not None
    assert numbers(found["w"]) == [3.0]


def test_what_it_keeps() -> None:
    assert (Accumulate(2).slots, Accumulate(2, "sum").slots) == (("mean",), ("sum",))
    assert Accumulate(2).holds_back
    assert not Accumulate(1).holds_back
    assert not Accumulate(2).partial
    assert not Accumulate(2).keeps_rows


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("debias", [True, False])
def test_a_running_mean(decay: float, debias: bool) -> None:
    running = Running(GradientEma(decay, debias))
    means = {name: [0.0] * g.size for name, g in MANY[0].items()}
    for t, gradients in enumerate(MANY, 1):
        found = running.take(gradients)
        assert found is not None
        for name, g in gradients.items():
            means[name] = [decay * m + (1 - decay) * x for m, x in zip(means[name], numbers(g), strict=True)]
            weight = 1 - decay**t if debias else 1.0
            # 1 - 0.99 loses two digits, here and there in different places.
            close(found[name], [m / weight for m in means[name]], 2e-13)


@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=8), st.floats(-1e6, 1e6))
def test_the_debiased_mean_of_a_steady_gradient_is_that_gradient(decays: list[float], g: float) -> None:
    running = Running(GradientEma(0.5), {"w": (1,)})
    for decay in decays:
        running.transform = GradientEma(decay)
        found = running.take({"w": [g]})
        assert found is not None
        assert numbers(found["w"])[0] == pytest.approx(g, rel=1e-9)


def test_the_decay_may_be_a_schedule() -> None:
    running = Running(GradientEma(Linear(0.5, 0.9, 1)), {"w": (1,)})  # type: ignore[arg-type]
    first, second = running.take({"w": [2.0]}), running.take({"w": [4.0]})
    assert first is not None
    assert second is not None
    assert numbers(first["w"]) == [2.0]
    assert numbers(second["w"])[0] == pytest.approx((0.9 * 1.0 + 0.1 * 4.0) / (1 - 0.5 * 0.9), rel=1e-15)


def test_the_correction_needs_all_tensors() -> None:
    assert not GradientEma(0.9).partial
    assert GradientEma(0.9, debias=False).partial
    assert GradientEma(0.9).own().keys() == {"rest"}
    assert not GradientEma(0.9, debias=False).own()
