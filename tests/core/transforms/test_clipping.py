"""Clipping, against loops over Python's floats."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

from core.errors import InvalidRecipe
from core.layout import Array
from core.schedules import Linear
from core.transforms import Piece
from core.transforms.clipping import AdaptiveClip, Clip, ClipByGlobalNorm, ClipByNorm
from tests.core.build import assert_same_bits
from tests.core.transforms.pieces import Running, changed, close, frozen, numbers, tensors

GRADIENTS = tensors()
ROWS = np.array([0, 2])


def norm_of(values: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


ALL = [value for g in GRADIENTS.values() for value in numbers(g)]


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_global_norm_is_brought_down_to_the_greatest_allowed(eps: float, dtype: str) -> None:
    total = norm_of(ALL)
    found = changed(ClipByGlobalNorm(3.0, eps), tensors(dtype=dtype))
    for name, g in GRADIENTS.items():
        close(found[name], [value * 3.0 / (total + eps) for value in numbers(g)], 1e-15 if dtype == "float64" else 1e-7)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_each_tensor_by_its_own_norm(eps: float) -> None:
    found = changed(ClipByNorm(3.0, eps), GRADIENTS)
    factors = {name: 3.0 / (norm_of(numbers(g)) + eps) for name, g in GRADIENTS.items()}
    assert min(factors.values()) < 1 < max(factors.values())
    for name, g in GRADIENTS.items():
        close(found[name], [value * min(1.0, factors[name]) for value in numbers(g)])


@pytest.mark.parametrize("transform", [ClipByGlobalNorm(1e3), ClipByNorm(1e3), Clip(1e3)], ids=lambda t: t.kind)
def test_what_is_small_enough_keeps_its_bits(transform: Any) -> None:
    found = changed(transform, GRADIENTS)
    for name, g in GRADIENTS.items():
        assert_same_bits(found[name], g)


def test_a_norm_of_just_the_greatest_allowed_is_not_clipped() -> None:
    assert_same_bits(changed(ClipByGlobalNorm(5.0), {"w": np.array([3.0, -4.0])})["w"], np.array([3.0, -4.0]))


@pytest.mark.parametrize("kind", [ClipByGlobalNorm, ClipByNorm])
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_that_float64_cannot_hold_do_not_matter(kind: Any, size: float) -> None:
    g = {"w": np.array([3.0, -4.0]) * size}
    close(changed(kind(size), g)["w"], [0.6 * size, -0.8 * size], 1e-15)


@pytest.mark.parametrize("transform", [ClipByGlobalNorm(0.0), ClipByNorm(0.0), ClipByGlobalNorm(1.0, eps=1.0)])
def test_a_zero_gradient_stays_zero(transform: Any) -> None:
    assert changed(transform, {"w": np.zeros(3), "e": np.zeros((0, 2))})["w"].tolist() == [0.0, 0.0, 0.0]


@given(
    g=nst.arrays(np.float64, st.integers(0, 20), elements=st.floats(-1e300, 1e300)),
    max_norm=st.floats(1e-3, 1e3),
)
def test_a_clipped_norm_is_at_most_the_greatest_allowed(g: Array, max_norm: float) -> None:
    for transform in (ClipByGlobalNorm(max_norm), ClipByNorm(max_norm)):
        found = changed(transform, {"w": g})["w"]
        assert norm_of(numbers(found)) <= max_norm * (1 + 1e-14)
        assert (np.sign(found) * np.sign(g) >= 0).all()


def test_the_greatest_norm_may_be_a_schedule() -> None:
    running = Running(ClipByGlobalNorm(Linear(2.0, 1.0, 2)), {"w": (2,)})  # type: ignore[arg-type]
    norms = [norm_of(numbers(running.take({"w": [3.0, 4.0]})["w"])) for _ in range(4)]  # type: ignore[index]
    assert norms == pytest.approx([2.0, 1.5, 1.0, 1.0], rel=1e-15)


@pytest.mark.parametrize("transform", [ClipByGlobalNorm(3.0), ClipByNorm(3.0), Clip(0.5)], ids=lambda t: t.kind)
def test_rows_alone_give_what_the_whole_tensor_gives(transform: Any) -> None:
    whole = np.zeros((4, 3))
    whole[ROWS] = GRADIENTS["w"][ROWS]
    dense = changed(transform, {"w": whole, "b": GRADIENTS["b"]})
    piece = Piece("w", (4, 3), frozen(whole[ROWS]), ROWS)
    sparse = Running(transform).take_pieces([piece, Piece("b", (3,), frozen(GRADIENTS["b"]))])
    assert sparse is not None
    assert transform.keeps_rows
    close(sparse["w"], dense["w"][ROWS], 1e-15)
    close(sparse["b"], dense["b"], 1e-15)


# By value


def test_values_are_cut_on_both_sides_or_on_one() -> None:
    def cut(transform: Clip) -> list[float]:
        return numbers(changed(transform, {"w": np.array([-3.0, -0.5, 0.0, 0.5, 3.0])})["w"])

    assert cut(Clip(max_value=1.0)) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert cut(Clip(low=-2.0, high=0.25)) == [-2.0, -0.5, 0.0, 0.25, 0.25]
    assert cut(Clip(low=-2.0)) == [-2.0, -0.5, 0.0, 0.5, 3.0]
    assert cut(Clip(high=0.0)) == [-3.0, -0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({}, ""),
        ({"max_value": 1.0, "low": -1.0}, "/max_value"),
        ({"max_value": -1.0}, "/max_value"),
        ({"low": 0.5}, "/low"),
        ({"high": -0.5}, "/high"),
        ({"high": math.nan}, "/high"),
        ({"high": Linear(1.0, -1.0, 5)}, "/high"),
    ],
)
def test_bounds_that_cannot_be_are_refused(fields: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        Clip(**fields)
    assert caught.value.pointer == pointer


def test_a_bound_may_be_a_schedule() -> None:
    running = Running(Clip(max_value=Linear(3.0, 1.0, 2)), {"w": (2,)})  # type: ignore[arg-type]
    assert [numbers(running.take({"w": [-5.0, 1.5]})["w"]) for _ in range(3)] == [  # type: ignore[index]
        [-3.0, 1.5],
        [-2.0, 1.5],
        [-1.0, 1.0],
    ]


# In proportion to the parameters

PARAMS = tensors(seed=8)


def units_of(array: Array, units: str) -> list[list[int]]:
    """The flat indices of each unit."""
    places = np.arange(array.size).reshape(array.shape)
    if array.ndim < 2:
        return [places.reshape(-1).tolist()]
    return [
        numbers_of.reshape(-1).tolist() for numbers_of in (places if units == "first" else np.moveaxis(places, -1, 0))
    ]


@pytest.mark.parametrize("units", ["first", "last"])
@pytest.mark.parametrize("eps", [1e-3, 5.0])
def test_each_unit_in_proportion_to_its_parameters(units: Any, eps: float) -> None:
    found = changed(AdaptiveClip(0.4, eps, units), GRADIENTS, PARAMS)
    some = set()
    for name, g in GRADIENTS.items():
        values, parameters, expected = numbers(g), numbers(PARAMS[name]), numbers(g)
        for unit in units_of(g, units):
            allowed = 0.4 * max(norm_of([parameters[i] for i in unit]), eps)
            norm = norm_of([values[i] for i in unit])
            some.add(norm > allowed)
            for i in unit:
                expected[i] = values[i] * min(1.0, allowed / norm)
        close(found[name], expected)
    assert some == {True, False}


def test_a_unit_that_begins_at_zero_can_move() -> None:
    found = changed(AdaptiveClip(0.01, 1e-3), {"w": np.ones((2, 4))}, {"w": np.zeros((2, 4))})["w"]
    close(found, [0.01 * 1e-3 / 2.0] * 8)
    zero = changed(AdaptiveClip(0.0), {"w": np.zeros((2, 4))}, {"w": np.zeros((2, 4))})["w"]
    assert not zero.any()


@pytest.mark.parametrize("units", ["first", "last"])
@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 3, 2)])
def test_rows_are_clipped_as_in_the_whole_tensor(units: Any, shape: tuple[int, ...]) -> None:
    g, p = tensors(1, shapes={"w": shape})["w"], tensors(2, shapes={"w": shape})["w"]
    whole = np.zeros(shape)
    whole[ROWS] = g[ROWS]
    transform = AdaptiveClip(0.1, units=units)
    sparse = Running(transform, {"w": shape}).take_pieces([Piece("w", shape, frozen(g[ROWS]), ROWS, frozen(p))])
    assert sparse is not None
    assert transform.keeps_rows
    close(sparse["w"], changed(transform, {"w": whole}, {"w": p})["w"][ROWS], 1e-15)


def test_no_rows_and_empty_tensors_pass() -> None:
    none = np.array([], np.int64)
    piece = Piece("w", (4, 3), frozen(np.zeros(0)), none, frozen(np.ones(12)))
    assert Running(AdaptiveClip()).take_pieces([piece]) is not None
    for shape in [(0,), (0, 3), (3, 0)]:
        assert changed(AdaptiveClip(), {"w": np.zeros(shape)}, {"w": np.zeros(shape)})["w"].shape == shape
