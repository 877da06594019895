"""sm3 and adafactor against their papers' arithmetic, worked out in plain loops over floats.

What some library does the same way is in golden/factored_cases.py; here is what none does, and the corners.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.layout import Array
from core.optimizers import Optimizer
from core.optimizers.adaptive import Adagrad
from core.optimizers.factored import Adafactor, Sm3
from tests.core.build import go, held, make, trajectory

Matrix: TypeAlias = list[list[float]]
Update: TypeAlias = Callable[[Matrix, Matrix, int], Matrix]

START = [[1.0, -2.0, 0.25], [0.5, 4.0, -1.0]]
GRADIENTS = [
    [[0.5, -2.0, 0.0], [0.0, 0.0, 0.0]],
    [[0.25, 4.0, 0.0], [0.0, -0.5, 0.0]],
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    [[-1.0, 1.5, 8.0], [0.001, 3.0, -2.0]],
    [[0.75, -0.125, 0.015625], [1.0, 1.0, 1.0]],
]
SHAPES = [(), (0,), (1,), (2, 3), (3, 0), (0, 4), (2, 1, 3), (2,) * 8]
ADDED = {"regularize": "add", "eps1": 1e-30}


def of_matrix(rule: Optimizer, start: Matrix, gradients: Sequence[Matrix], dtype: str = "float64") -> Array:
    session = make(rule, {"w": start}, dtype=dtype)
    seen = []
    for g in gradients:
        go(session, {"w": np.array(g)})
        seen.append(held(session).reshape(np.shape(start)).copy())
    return np.stack(seen)


def agree(rule: Optimizer, update: Update) -> None:
    p, seen = [row[:] for row in START], []
    for t, g in enumerate(GRADIENTS, 1):
        u = update(p, g, t)
        p = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(p, u, strict=True)]
        seen.append(p)
    truth = np.array(seen)
    for dtype, tolerance in (("float64", 1e-14), ("float32", 1e-6)):
        found = of_matrix(rule, START, GRADIENTS, dtype)
        assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


def test_sm3_of_the_paper_takes_nothing_over_nothing_as_nothing() -> None:
    rows, columns = [0.0] * 2, [0.0] * 3
    m = [[0.0] * 3 for _ in range(2)]

    def update(p: Matrix, g: Matrix, t: int) -> Matrix:
        nu = [[min(rows[i], columns[j]) + g[i][j] ** 2 for j in range(3)] for i in range(2)]
        for i in range(2):
            rows[i] = max(nu[i])
        for j in range(3):
            columns[j] = max(nu[0][j], nu[1][j])
        for i in range(2):
            for j in range(3):
                d = g[i][j] / math.sqrt(nu[i][j]) if nu[i][j] > 0 else 0.0
                m[i][j] = 0.9 * m[i][j] + (1 - 0.9) * d
        return [[-0.1 * x for x in row] for row in m]

    agree(Sm3(), update)


def test_sm3_of_a_vector_is_adagrad() -> None:
    start, gradients = [1.0, 2.0], [[3.0, 0.0], [4.0, 0.5], [0.0, -1.0]]
    found = trajectory(Sm3(lr=0.5, momentum=0.0), start, gradients)
    adagrad = trajectory(Adagrad(lr=0.5, eps=1e-300), start, gradients)
    np.testing.assert_allclose(found, adagrad, rtol=1e-15)
    assert found[0].tolist() == [0.5, 2.0]


def test_sm3_covers_the_sums_of_squares() -> None:
    """An accumulator along any axis is at least the largest AdaGrad sum in its slice, and never shrinks."""
    random = np.random.default_rng(0)
    session = make(Sm3(), {"w": np.zeros((4, 2, 3))})
    total, before = np.zeros((4, 2, 3)), [np.zeros(n) for n in (4, 2, 3)]
    for _ in range(10):
        g = random.normal(size=(4, 2, 3))
        go(session, {"w": g})
        total += g * g
        for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
            kept = session.state.own[f"w:mu{axis}"]
            assert (kept >= total.max(axis=others) * (1 - 1e-14)).all()
            assert (kept >= before[axis]).all()
            before[axis] = kept.copy()


def test_sm3_and_adafactor_keep_no_matrix() -> None:
    assert {name: own.shape for name, own in Sm3(momentum=0.0).own((1000, 20, 3)).items()} == {
        "mu0": (1000,),
        "mu1": (20,),
        "mu2": (3,),
    }
    assert {name: own.shape for name, own in Adafactor().own((7, 1000, 20)).items()} == {
        "row": (7, 1000),
        "col": (7, 20),
    }
    longest = Adafactor(axes="longest").own((1000, 7, 20))
    assert {name: own.shape for name, own in longest.items()} == {"row": (7, 20), "col": (1000, 7)}
    assert set(Adafactor(min_dim_size_to_factor=8, beta1=0.9).own((7, 20))) == {"v", "m"}


def root_mean_square(matrix: Matrix) -> float:
    values = [x * x for row in matrix for x in row]
    return math.sqrt(sum(values) / len(values))


@pytest.mark.parametrize("regularize", ["clamp", "add"])
def test_adafactor_with_rows_and_columns_that_are_zero(regularize: str) -> None:
    """torch's form and the paper's, with what neither library of the golden cases meets: zeros that stay."""
    clamp = regularize == "clamp"
    eps1 = 1e-3 if clamp else 1e-30
    rows, columns = [0.0] * 2, [0.0] * 3

    def update(p: Matrix, g: Matrix, t: int) -> Matrix:
        share = t**-0.8
        square = [[x * x + (0.0 if clamp else eps1) for x in row] for row in g]
        rows[:] = [(1 - share) * rows[i] + share * sum(square[i]) / 3 for i in range(2)]
        columns[:] = [(1 - share) * columns[j] + share * (square[0][j] + square[1][j]) / 2 for j in range(3)]
        mean = max(sum(rows) / 2, eps1) if clamp else sum(rows) / 2
        d = [
            [
                g[i][j] / math.sqrt(max(rows[i] * columns[j] / mean, eps1**2 if clamp else 0.0)) if g[i][j] else 0.0
                for j in range(3)
            ]
            for i in range(2)
        ]
        rate = max(1e-3, root_mean_square(p)) * min(0.5, 1 / math.sqrt(t)) / max(1.0, root_mean_square(d))
        return [[-rate * d[i][j] - 0.5 * 0.1 * p[i][j] for j in range(3)] for i in range(2)]

    agree(Adafactor(lr=0.5, weight_decay=0.1, eps1=eps1, regularize=regularize), update)  # type: ignore[arg-type]


def test_adafactor_of_zero_has_the_epsilon_of_the_dtype() -> None:
    """A gradient below it is divided by it: by 2^-52 in float64, by 2^-23 in float32."""
    plain = {"lr": 1.0, "relative_step": False, "scale_parameter": False, "eps1": 0.0}
    for dtype, epsilon in (("float64", 2.0**-52), ("float32", 2.0**-23)):
        found = trajectory(Adafactor(**plain), [0.0], [[epsilon / 4]], dtype=dtype)
        assert found.tolist() == [[-0.25]]


def test_adafactor_of_a_rank_one_gradient_is_its_sign() -> None:
    """There the product of rows and columns is the square itself."""
    g = np.outer([1.0, -2.0, 4.0], [0.5, 8.0])
    plain = Adafactor(lr=1.0, scale_parameter=False, **ADDED)
    np.testing.assert_allclose(of_matrix(plain, np.zeros((3, 2)).tolist(), [g.tolist()])[0], -np.sign(g), rtol=1e-14)


def test_adafactor_refuses_a_decay_that_grows() -> None:
    with pytest.raises(InvalidRecipe, match="at most 0"):
        Adafactor(beta2_decay=0.8)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "rule", [Sm3(), Sm3(beta2=0.0, momentum=0.0), Adafactor(), Adafactor(beta1=0.5, axes="longest", **ADDED)]
)
def test_every_shape_and_magnitude_stays_finite(rule: Optimizer, dtype: str) -> None:
    random = np.random.default_rng(0)
    session = make(rule, {str(shape): np.ones(shape) for shape in SHAPES}, dtype=dtype)
    for scale in (0.0, 1.0, 1e-40, 1e37, 0.0, 1e-3):
        go(session, {str(shape): scale * random.normal(size=shape) for shape in SHAPES})
        assert np.isfinite(held(session)).all()


def test_adafactor_of_squares_beyond_float64() -> None:
    """A step has a root mean square of 1 at most, times the rate, whatever the gradient."""
    random = np.random.default_rng(0)
    g = 1e300 * random.normal(size=(4, 3))
    plain = Adafactor(lr=1.0, scale_parameter=False)
    u = of_matrix(plain, np.zeros((4, 3)).tolist(), [g.tolist()])[0]
    assert math.sqrt(float((u * u).mean())) == pytest.approx(1.0, rel=1e-12)
