"""Projections, by what makes a point the nearest one: no direction that stays in the set comes nearer.

For a convex set C, x in C is the nearest point to v if and only if max over y in C of (v - x)·y is (v - x)·x. The
greatest value of a linear function over each of the sets is known in closed form.
"""

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
from core.transforms.projecting import Project
from tests.core.build import assert_same_bits
from tests.core.transforms.pieces import close, numbers, tensors

SETS = ["simplex", "l1_ball", "l2_ball", "box", "non_negative"]
VECTORS = nst.arrays(np.float64, st.integers(1, 12), elements=st.floats(-50, 50, width=32))
RADII = st.floats(0.01, 20)


def after(transform: Project, p: Array) -> Array:
    flat = p.reshape(-1).copy()
    flat.flags.writeable = False
    with np.errstate(all="ignore"):
        return transform.after(p.shape, flat).reshape(p.shape)


def made(onto: Any, radius: float) -> Project:
    return Project(onto, radius, -radius / 2, radius)


def outside(x: list[float], onto: str, radius: float) -> float:
    """How far x is from being in the set."""
    norms = {"l1_ball": math.fsum(map(abs, x)), "l2_ball": math.sqrt(math.fsum(value * value for value in x))}
    if onto in norms:
        return max(0.0, norms[onto] - radius)
    if onto == "box":
        return max(0.0, *[value - radius for value in x], *[-radius / 2 - value for value in x])
    below = max(0.0, *[-value for value in x])
    return max(below, abs(math.fsum(x) - radius)) if onto == "simplex" else below


def greatest(d: list[float], onto: str, radius: float) -> float:
    """The greatest d·y over y in the set."""
    match onto:
        case "simplex":
            return radius * max(d)
        case "l1_ball":
            return radius * max(map(abs, d))
        case "l2_ball":
            return radius * math.sqrt(math.fsum(value * value for value in d))
        case "box":
            return math.fsum(max(radius * value, -radius / 2 * value) for value in d)
    return 0.0 if max(d) <= 0 else math.inf


@pytest.mark.parametrize("onto", SETS)
@given(v=VECTORS, radius=RADII)
def test_it_is_the_nearest_point_of_the_set(onto: str, v: Array, radius: float) -> None:
    x = numbers(after(made(onto, radius), v))
    d = [a - b for a, b in zip(numbers(v), x, strict=True)]
    scale = (1 + float(np.abs(v).max()) + radius) * len(x)
    assert outside(x, onto, radius) <= 1e-14 * scale
    along = math.fsum(a * b for a, b in zip(d, x, strict=True))
    assert greatest(d, onto, radius) <= along + 1e-14 * scale**2


@pytest.mark.parametrize("onto", SETS)
@given(v=VECTORS, radius=RADII)
def test_twice_is_once(onto: str, v: Array, radius: float) -> None:
    once = after(made(onto, radius), v)
    close(after(made(onto, radius), once), once)


@pytest.mark.parametrize("onto", SETS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_inside_keeps_its_bits(onto: str, dtype: str) -> None:
    p = np.array([0.25, 0.5, 0.25], dtype)
    assert_same_bits(after(Project(onto), p), p)  # type: ignore[arg-type]


@pytest.mark.parametrize("onto", SETS)
def test_each_row_by_itself(onto: Any) -> None:
    tensor = tensors(shapes={"k": (4, 2, 3)})["k"]
    found = after(Project(onto, 2.0, over="rows"), tensor)
    for row, expected in zip(found, tensor, strict=True):
        close(row, after(Project(onto, 2.0), expected), 1e-15)
    vector = tensors()["b"]
    assert_same_bits(after(Project(onto, 2.0, over="rows"), vector), after(Project(onto, 2.0), vector))


def test_points_worked_out_by_hand() -> None:
    def nearest(onto: Any, v: list[float], radius: float = 1.0) -> list[float]:
        return numbers(after(Project(onto, radius), np.array(v)))

    assert nearest("simplex", [0.0, 0.0, 0.0, 0.0]) == [0.25, 0.25, 0.25, 0.25]
    assert nearest("simplex", [2.0, 1.5, -7.0]) == [0.75, 0.25, 0.0]
    assert nearest("simplex", [-5.0], 3.0) == [3.0]
    assert nearest("l1_ball", [-2.0, 1.5, 0.0]) == [-0.75, 0.25, 0.0]
    assert nearest("l2_ball", [3.0, -4.0], 2.5) == [1.5, -2.0]
    assert nearest("box", [-3.0, 0.5, 3.0]) == [0.0, 0.5, 1.0]
    assert nearest("non_negative", [-3.0, 0.5]) == [0.0, 0.5]


@pytest.mark.parametrize("size", [1e20, 1e200, 1e-200])
def test_large_and_small_numbers(size: float) -> None:
    v = np.array([3.0, -4.0]) * size
    inside = size < 1
    assert numbers(after(Project("l2_ball"), v)) == (numbers(v) if inside else pytest.approx([0.6, -0.8], rel=1e-15))
    assert numbers(after(Project("simplex"), v)) == ([0.5, 0.5] if inside else [1.0, 0.0])
    assert numbers(after(Project("l1_ball"), v)) == (numbers(v) if inside else [0.0, -1.0])


@pytest.mark.parametrize("onto", SETS)
@pytest.mark.parametrize("over", ["tensor", "rows"])
def test_nothing_raises(onto: Any, over: Any) -> None:
    for shape in [(), (0,), (0, 3), (3, 0), (1, 1)]:
        assert after(Project(onto, over=over), np.ones(shape)).shape == shape
    for value in (np.nan, np.inf, -np.inf):
        assert after(Project(onto, over=over), np.array([[1.0, value], [0.5, 0.5]])).shape == (2, 2)


def test_the_gradient_passes_unchanged() -> None:
    transform = Project("box")
    assert transform.change(1, [], {})
    assert transform.follows
    assert transform.keeps_rows
    assert transform.needs == {"params"}


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"low": 2.0}, "/low"),
        ({"low": Linear(0.0, 0.5, 3), "high": Linear(1.0, 0.25, 3)}, "/low"),
        ({"radius": 0.0}, "/radius"),
        ({"radius": Linear(1.0, 0.0, 3)}, "/radius"),
    ],
)
def test_sets_that_cannot_be_are_refused(fields: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        Project("box", **fields)
    assert caught.value.pointer == pointer
