"""Normalizing, centring, signs, NaN and the scale of a loss, against loops over Python's floats."""

import math
from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.layout import Array
from core.schedules import Linear
from core.transforms import Piece
from core.transforms.scaling import Centralize, Normalize, Sign, Unscale, ZeroNans
from tests.core.build import assert_same_bits
from tests.core.transforms.pieces import Running, changed, close, frozen, numbers, tensors

GRADIENTS = tensors()
ALL = [value for g in GRADIENTS.values() for value in numbers(g)]
INFINITE = math.inf


def norm_of(values: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_all_tensors_together_get_the_norm_one(eps: float) -> None:
    found, total = changed(Normalize(eps=eps), GRADIENTS), norm_of(ALL)
    for name, g in GRADIENTS.items():
        close(found[name], [value / (total + eps) for value in numbers(g)])


def test_each_tensor_gets_the_norm_one() -> None:
    found = changed(Normalize("tensor"), GRADIENTS)
    for name, g in GRADIENTS.items():
        close(found[name], [value / norm_of(numbers(g)) for value in numbers(g)])


@pytest.mark.parametrize("per", ["global", "tensor"])
@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_a_norm_that_float64_cannot_square_is_one_too(per: Any, size: float) -> None:
    close(changed(Normalize(per), {"w": np.array([3.0, 4.0]) * size})["w"], [0.6, 0.8], 1e-15)


@pytest.mark.parametrize("per", ["global", "tensor"])
def test_a_zero_gradient_stays_zero(per: Any) -> None:
    found = changed(Normalize(per), {"w": np.zeros(3), "e": np.zeros(0)})
    assert found["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("units", ["first", "last"])
def test_the_mean_of_each_unit_is_taken_away(units: Any) -> None:
    found = changed(Centralize(units), GRADIENTS)
    for name, g in GRADIENTS.items():
        if g.ndim < 2:
            assert_same_bits(found[name], g)
            continue
        expected = np.empty(g.shape)
        for unit in range(g.shape[0 if units == "first" else -1]):
            place: Any = (unit, ...) if units == "first" else (..., unit)
            values = numbers(g[place])
            expected[place] = (np.array(values) - math.fsum(values) / len(values)).reshape(g[place].shape)
        close(found[name], expected)


def test_rows_have_the_means_that_they_have_in_the_whole_tensor() -> None:
    rows = np.array([1, 3])
    found = Running(Centralize()).take_pieces([Piece("w", (4, 3), frozen(GRADIENTS["w"][rows]), rows)])
    assert found is not None
    assert Centralize().keeps_rows
    assert not Centralize("last").keeps_rows  # a row that is not there would get minus the mean of its column
    assert_same_bits(found["w"], changed(Centralize(), GRADIENTS)["w"][rows])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_tensors_pass(shape: tuple[int, ...]) -> None:
    assert changed(Centralize(), {"w": np.zeros(shape)})["w"].shape == shape


def test_signs() -> None:
    found = changed(Sign(), {"w": np.array([-1e-300, -7.0, 0.0, 2.0], np.float64)})["w"]
    assert found.tolist() == [-1.0, -1.0, 0.0, 1.0]


def test_not_a_number_becomes_zero_and_an_infinity_stays() -> None:
    found = changed(ZeroNans(), {"w": np.array([1.0, math.nan, -INFINITE]), "b": np.array([2.0])})
    assert found["w"].tolist() == [1.0, 0.0, -INFINITE]
    assert found["b"].tolist() == [2.0]
    assert (ZeroNans().mends_nan, ZeroNans().mends_infinity) == (True, False)


# The scale of a loss


def test_a_steady_scale_is_divided_by() -> None:
    transform = Unscale(1000.0)
    found = changed(transform, {"w": np.array([1.0, -3.0])})["w"]
    assert found.tolist() == [1.0 / 1000.0, -3.0 / 1000.0]
    assert transform.metrics({}) == {"loss_scale": 1000.0}
    assert (transform.mends_nan, transform.mends_infinity, transform.holds_back) == (False, False, False)


# (gradient, the scale after it, SGD's second parameter after it at a rate of 1): torch.amp.GradScaler("cpu") with
# init_scale 4 and growth_interval 2 gave this.
TORCH = [
    ([1.0, 2.0], 4.0, -0.5),
    ([INFINITE, 1.0], 2.0, -0.5),
    ([math.nan, 1.0], 1.0, -0.5),
    ([1.0, 1.0], 1.0, -1.5),
    ([4.0, 4.0], 2.0, -5.5),
    ([8.0, 8.0], 2.0, -9.5),
    ([INFINITE, 0.0], 1.0, -9.5),
    ([2.0, 2.0], 1.0, -11.5),
]


def test_a_dynamic_scale_goes_as_torchs() -> None:
    transform = Unscale(4.0, dynamic=True, growth_interval=2)
    running, parameter = Running(transform, {"w": (2,)}, "float32"), 0.0
    assert (transform.mends_nan, transform.mends_infinity, transform.holds_back) == (True, True, True)
    for g, scale, expected in TORCH:
        found = running.take({"w": np.array(g, np.float32)})
        assert (found is None) == (not np.isfinite(g).all())
        if found is not None:
            parameter -= float(found["w"][1])
        assert parameter == expected
        assert transform.metrics(running.own) == {"loss_scale": scale}


def test_one_tensor_that_is_not_finite_holds_all_back() -> None:
    running = Running(Unscale(dynamic=True), {"w": (1,), "b": (1,)})
    assert running.take({"w": [1.0], "b": [math.nan]}) is None
    assert running.transform.metrics(running.own) == {"loss_scale": 32768.0}


def scales(transform: Unscale, gradient: float, steps: int) -> list[float]:
    running = Running(transform, {"w": (1,)})
    for _ in range(steps):
        running.take({"w": [gradient]})
    return [transform.metrics(running.own)["loss_scale"]]


def test_a_dynamic_scale_stays_a_normal_float32() -> None:
    least, most = float(np.finfo(np.float32).tiny), 2.0**127
    assert scales(Unscale(dynamic=True), math.nan, 200) == [least]
    assert scales(Unscale(dynamic=True, growth_interval=1), 0.0, 200) == [most]
    uneven = Unscale(3.0, dynamic=True, growth_interval=1, growth_factor=1.1)
    assert scales(uneven, 0.0, 1) == [float(np.float32(3.0 * 1.1))]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"scale": 0.0}, "/scale"),
        ({"scale": 1e39}, "/scale"),
        ({"scale": Linear(1.0, 2.0, 3)}, "/scale"),
        ({"growth_factor": 1.0}, "/growth_factor"),
        ({"backoff_factor": 1.0}, "/backoff_factor"),
        ({"growth_interval": 0}, "/growth_interval"),
    ],
)
def test_scales_that_cannot_be_are_refused(fields: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        Unscale(**fields)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("transform", [Normalize(), Normalize("tensor"), Sign(), ZeroNans(), Unscale(8.0)])
def test_rows_alone_give_what_the_whole_tensor_gives(transform: Any) -> None:
    rows, whole = np.array([0, 3]), np.zeros((4, 3))
    whole[rows] = GRADIENTS["w"][rows]
    found = Running(transform).take_pieces([Piece("w", (4, 3), frozen(whole[rows]), rows)])
    dense: Array = changed(transform, {"w": whole})["w"]
    assert found is not None
    assert transform.keeps_rows
    close(found["w"], dense[rows], 1e-15)
    assert not dense[[1, 2]].any()
