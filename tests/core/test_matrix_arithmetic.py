"""muon, shampoo and soap against their papers' arithmetic, worked out in plain loops over floats.

Matrices are lists of rows here, and eigenvectors come of Jacobi's rotations, so that nothing of LAPACK is taken for
granted. What some library does the same way is in golden/matrix_cases.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.layout import Array
from core.optimizers import Optimizer
from core.optimizers.adam import AdamW
from core.optimizers.adaptive import Adagrad
from core.optimizers.muon import Muon
from core.optimizers.preconditioned import Shampoo, Soap, completed
from core.recipe import Group
from tests.core.build import assert_same_bits, go, held, make, trajectory

Vector: TypeAlias = list[float]
Matrix: TypeAlias = list[list[float]]
Update: TypeAlias = Callable[[Matrix, Matrix, int], Matrix]

START = [[1.0, -2.0, 0.25], [0.5, 4.0, -1.0]]
GRADIENTS = [
    [[0.5, -2.0, 0.25], [1.0, 0.75, -3.0]],
    [[0.25, 4.0, 0.0], [0.0, -0.5, 0.0]],
    [[-1.0, 1.5, 8.0], [0.001, 3.0, -2.0]],
    [[0.75, -0.125, 0.015625], [1.0, 1.0, 1.0]],
    [[0.1, 0.2, -0.3], [-2.0, 1.0, 0.5]],
    [[1.0, -1.0, 2.0], [0.5, 0.25, 4.0]],
]
FLAT = [*START[0], *START[1]]
SHAPES = [(), (0,), (1,), (5,), (2, 3), (3, 0), (0, 4), (2, 1, 3), (2,) * 8]


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def times(a: Matrix, b: Matrix) -> Matrix:
    return [[math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in transposed(b)] for row in a]


def plus(a: Matrix, b: Matrix, scale: float = 1.0) -> Matrix:
    return [[x + scale * y for x, y in zip(row, other, strict=True)] for row, other in zip(a, b, strict=True)]


def by(scale: float, a: Matrix) -> Matrix:
    return [[scale * x for x in row] for row in a]


def zeros(rows: int, columns: int) -> Matrix:
    return [[0.0] * columns for _ in range(rows)]


def identity(n: int) -> Matrix:
    return [[float(i == j) for j in range(n)] for i in range(n)]


def frobenius(a: Matrix) -> float:
    return math.sqrt(math.fsum(x * x for row in a for x in row))


def eigen(a: Matrix) -> tuple[Vector, Matrix]:
    """Eigenvalues, the largest first, and eigenvectors as columns, of a symmetric matrix; Jacobi's rotations."""
    n, a, vectors = len(a), [row[:] for row in a], identity(len(a))
    for _ in range(60):
        for i in range(n):
            for j in range(i + 1, n):
                if a[i][j] == 0.0:
                    continue
                angle = 0.5 * math.atan2(2 * a[i][j], a[j][j] - a[i][i])
                turn = identity(n)
                turn[i][i] = turn[j][j] = math.cos(angle)
                turn[i][j], turn[j][i] = math.sin(angle), -math.sin(angle)
                a, vectors = times(transposed(turn), times(a, turn)), times(vectors, turn)
    order = sorted(range(n), key=lambda k: -a[k][k])
    return [a[k][k] for k in order], [[row[k] for k in order] for row in vectors]


def orthonormal(a: Matrix) -> Matrix:
    """Gram and Schmidt on the columns, twice over."""
    found: Matrix = []
    for column in transposed(a):
        for _ in range(2):
            for other in found:
                along = math.fsum(x * y for x, y in zip(column, other, strict=True))
                column = [x - along * y for x, y in zip(column, other, strict=True)]
        size = math.sqrt(math.fsum(x * x for x in column))
        found.append([x / size for x in column])
    return transposed(found)


def inverse_root(a: Matrix, root: int) -> Matrix:
    values, vectors = eigen(a)
    return times([[x * value ** (-1 / root) for x, value in zip(row, values, strict=True)] for row in vectors],
                 transposed(vectors))  # fmt: skip


def of_tensor(rule: Optimizer, start: Any, gradients: Sequence[Any], **options: Any) -> Array:
    session = make(rule, {"w": start}, **options)
    seen = []
    for g in gradients:
        go(session, {"w": np.array(g)})
        seen.append(held(session).reshape(np.shape(start)).copy())
    return np.stack(seen)


def agree(rule: Optimizer, update: Update, tolerance: float = 1e-14) -> None:
    p, seen = START, []
    for t, g in enumerate(GRADIENTS, 1):
        p = plus(p, update(p, g, t))
        seen.append(p)
    truth = np.array(seen)
    for dtype, allowed in (("float64", tolerance), ("float32", 1e-6)):
        found = of_tensor(rule, START, GRADIENTS, dtype=dtype)
        assert np.abs(found - truth).max() <= allowed * np.abs(truth).max()


# muon


def newton_schulz(x: Matrix, steps: int = 5) -> Matrix:
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(steps):
        gram = times(x, transposed(x))
        x = plus(by(a, x), times(plus(by(b, gram), times(gram, gram), c), x))
    return x


def test_muon_as_jordan_first_wrote_it() -> None:
    m = zeros(2, 3)

    def update(p: Matrix, g: Matrix, t: int) -> Matrix:
        m[:] = plus(g, m, 0.9)
        d = plus(g, m, 0.9)
        return plus(by(-0.1, newton_schulz(by(1 / (frobenius(d) + 0.01), d))), p, -0.1 * 0.5)

    agree(Muon(lr=0.1, momentum=0.9, momentum_form="heavy_ball", eps=0.01, eps_added=True, weight_decay=0.5), update)


def test_muon_of_a_tall_matrix_is_that_of_the_wide_one() -> None:
    """But for the scale by its shape, √(3/2)."""
    rule = Muon(lr=0.1, weight_decay=0.0)
    wide = of_tensor(rule, zeros(2, 3), GRADIENTS[:1])[0]
    tall = of_tensor(rule, zeros(3, 2), [transposed(GRADIENTS[0])])[0]
    np.testing.assert_allclose(tall, math.sqrt(1.5) * wide.T, rtol=1e-14)
    other = of_tensor(rule.changed({"adjust_lr_fn": "transposed"}), zeros(2, 3), GRADIENTS[:1])[0]
    np.testing.assert_allclose(other, math.sqrt(1.5) * wide, rtol=1e-14)


def test_muon_makes_all_directions_about_as_long() -> None:
    random = np.random.default_rng(0)
    g = random.normal(size=(8, 5)) * [1e3, 1.0, 1.0, 1.0, 30.0]
    u = of_tensor(Muon(lr=1.0, weight_decay=0.0, adjust_lr_fn="none", ns_steps=10), zeros(8, 5), [g])[0]
    sizes = np.linalg.svd(u, compute_uv=False)
    assert 0.5 < sizes.min() <= sizes.max() < 1.5
    assert np.sum(u * g) < 0


def test_muon_flattens_the_trailing_axes() -> None:
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(4, 2, 3)), random.normal(size=(5, 4, 2, 3))
    flat = of_tensor(Muon(), start.reshape(4, 6), list(gradients.reshape(5, 4, 6)))
    assert_same_bits(of_tensor(Muon(flatten=True), start, list(gradients)).reshape(5, 4, 6), flat)


def test_muon_gives_adamw_to_what_is_no_matrix() -> None:
    """Vectors, tensors of three axes, and matrices that are told so, at a rate of their own."""
    random = np.random.default_rng(0)
    start = {name: random.normal(size=shape) for name, shape in (("b", (3,)), ("k", (2, 2, 2)), ("e", (4, 2)))}
    rule = Muon(lr=0.1, adam_lr=0.01, adam_beta2=0.95, adam_eps=1e-10, weight_decay=0.2)
    session = make(rule, start, groups=[Group("e", {"orthogonalize": False})])
    adamw = make(AdamW(lr=0.01, beta2=0.95, eps=1e-10, weight_decay=0.2), start)
    for _ in range(5):
        g = {name: random.normal(size=value.shape) for name, value in start.items()}
        go(session, g)
        go(adamw, g)
    np.testing.assert_allclose(held(session), held(adamw), rtol=1e-14)
    assert set(session.state.own) == {f"{name}:{slot}" for name in start for slot in ("m", "v")}


# shampoo


def test_shampoo_of_a_matrix() -> None:
    left, right, v = by(0.1, identity(2)), by(0.1, identity(3)), zeros(2, 3)

    def update(p: Matrix, g: Matrix, t: int) -> Matrix:
        left[:] = plus(left, times(g, transposed(g)))
        right[:] = plus(right, times(transposed(g), g))
        d = times(inverse_root(left, 4), times(g, inverse_root(right, 4)))
        v[:] = plus(d, v, 0.9)
        return plus(by(-0.2, v), p, -0.01)

    rule = Shampoo(lr=0.2, eps=0.1, momentum=0.9, weight_decay=0.01, decay_scaling="none")
    agree(rule, update, 1e-13)


def test_shampoo_of_a_vector_is_the_full_matrix() -> None:
    gradients = [[*g[0], *g[1]] for g in GRADIENTS]
    full = trajectory(Adagrad(lr=0.1, matrix="full", eps=1e-3), FLAT, gradients)
    found = trajectory(Shampoo(lr=0.1, eps=1e-3), FLAT, gradients)
    np.testing.assert_allclose(found, full, rtol=1e-11, atol=1e-12)


def test_shampoo_of_a_number_is_adagrad() -> None:
    found = of_tensor(Shampoo(lr=0.5, eps=0.0), 1.0, [3.0, -4.0])
    np.testing.assert_allclose(found, [0.5, 0.9], rtol=1e-15)


def test_shampoo_cuts_long_axes_into_tensors_of_their_own() -> None:
    """(5, 3) by blocks of 2: pieces of 2, 2, 1 by 2, 1, each as if it were alone."""
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(5, 3)), list(random.normal(size=(4, 5, 3)))
    rule = Shampoo(lr=0.1, block_size=2, momentum=0.5, nesterov=True)
    whole = of_tensor(rule, start, gradients)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        for columns in (slice(0, 2), slice(2, 3)):
            piece = of_tensor(rule, start[rows, columns], [g[rows, columns] for g in gradients])
            assert_same_bits(np.ascontiguousarray(whole[:, rows, columns]), piece)
    assert {name: own.shape for name, own in rule.own((5, 3)).items()} == {
        "H0": (6, 2, 2),
        "H1": (6, 2, 2),
        "v": (5, 3),
    }


def test_shampoo_keeps_its_roots_between_intervals() -> None:
    """Computed for gradients 1, 4, …; gradients 2 and 3 meet those of gradient 1."""
    left, right = by(0.5, identity(2)), by(0.5, identity(3))
    roots: dict[str, Matrix] = {}

    def update(p: Matrix, g: Matrix, t: int) -> Matrix:
        left[:] = plus(left, times(g, transposed(g)))
        right[:] = plus(right, times(transposed(g), g))
        if t % 3 == 1:
            roots.update(left=inverse_root(left, 4), right=inverse_root(right, 4))
        return by(-0.1, times(roots["left"], times(g, roots["right"])))

    agree(Shampoo(lr=0.1, eps=0.5, interval=3), update, 1e-13)


def test_shampoo_counts_a_tensors_own_gradients() -> None:
    """The roots of one that joins late are computed at once, and not at the session's next interval."""
    rule = Shampoo(interval=5)
    session = make(rule, {"w": START, "b": [1.0]})
    go(session, {"b": np.array([1.0])}, partial=True)
    for g in GRADIENTS:
        go(session, {"w": np.array(g)}, partial=True)
    assert_same_bits(held(session)[:6].reshape(2, 3), of_tensor(rule, START, GRADIENTS)[-1])


def test_shampoo_bounds_its_memory() -> None:
    with pytest.raises(InvalidRecipe, match="at most 1024"):
        Shampoo(block_size=1025)
    numbers = sum(math.prod(own.shape) for own in Shampoo(block_size=128).own((10_000, 512)).values())
    assert numbers < 2.1 * 10_000 * 512


# soap


def test_soap_of_a_matrix() -> None:
    """Its first gradient fills two of the three columns' directions, so that all three are known but for signs."""
    left, right, m, v = zeros(2, 2), zeros(3, 3), zeros(2, 3), zeros(2, 3)
    bases: dict[str, Matrix] = {}

    def gather(g: Matrix) -> None:
        left[:] = plus(by(0.9, left), times(g, transposed(g)), 0.1)
        right[:] = plus(by(0.9, right), times(transposed(g), g), 0.1)

    def refreshed(matrix: Matrix, basis: Matrix) -> tuple[Matrix, list[int]]:
        product = times(matrix, basis)
        along = [sum(basis[i][k] * product[i][k] for i in range(len(matrix))) for k in range(len(matrix))]
        order = sorted(range(len(matrix)), key=lambda k: -along[k])
        return orthonormal([[row[k] for k in order] for row in product]), order

    def update(p: Matrix, g: Matrix, t: int) -> Matrix:
        if t == 1:
            gather(g)
            bases.update(left=eigen(left)[1], right=eigen(right)[1])
            return zeros(2, 3)
        to = transposed(bases["left"]), bases["right"]
        turned = times(to[0], times(g, to[1]))
        m[:] = plus(by(0.8, m), g, 0.2)
        v[:] = [[0.95 * a + 0.05 * b * b for a, b in zip(x, y, strict=True)] for x, y in zip(v, turned, strict=True)]
        mean = times(to[0], times(m, to[1]))
        d = [[a / (math.sqrt(b) + 1e-8) for a, b in zip(x, y, strict=True)] for x, y in zip(mean, v, strict=True)]
        rate = 0.1 * math.sqrt(1 - 0.95 ** (t - 1)) / (1 - 0.8 ** (t - 1))
        u = by(-rate, times(bases["left"], times(d, transposed(bases["right"]))))
        gather(g)
        if (t - 1) % 2 == 0:
            bases["left"], rows = refreshed(left, bases["left"])
            bases["right"], columns = refreshed(right, bases["right"])
            v[:] = [[v[i][j] for j in columns] for i in rows]
        return plus(u, plus(p, u), -0.1 * 0.1)

    agree(Soap(lr=0.1, beta1=0.8, shampoo_beta=0.9, interval=2, weight_decay=0.1), update, 1e-13)


def test_soap_does_not_move_by_a_tensors_first_gradient() -> None:
    session = make(Soap(), {"w": START, "b": [1.0, 2.0]})
    go(session, {"b": np.array([1.0, 1.0])}, partial=True)
    go(session, {"b": np.array([1.0, 1.0])}, partial=True)
    go(session, {"w": np.array(GRADIENTS[0])}, partial=True)
    assert held(session)[:6].tolist() == FLAT
    assert (held(session)[6:] != [1.0, 2.0]).all()
    go(session, {"w": np.array(GRADIENTS[1])}, partial=True)
    assert (held(session)[:6] != FLAT).all()


@pytest.mark.parametrize("shape", [(9, 2), (30,)])
def test_soap_does_not_depend_on_what_no_gradient_has_reached(shape: tuple[int, ...]) -> None:
    """A last bit of the first gradient is a last bit of the result, although most of an axis is empty at first."""
    random = np.random.default_rng(0)
    start, gradients = np.zeros(shape), list(random.normal(size=(30, *shape)))
    rule = Soap(precondition_1d=True, interval=3)
    first = of_tensor(rule, start, gradients)
    gradients[0] = np.nextafter(gradients[0], np.inf)
    second = of_tensor(rule, start, gradients)
    assert not np.array_equal(first, second)
    assert np.abs(first - second).max() < 1e-9 * np.abs(first).max()


def test_a_completed_basis_has_the_known_vectors_whatever_their_signs() -> None:
    random = np.random.default_rng(0)
    vectors = np.linalg.qr(random.normal(size=(6, 6)))[0]
    known = np.array([True, True, False, False, True, False])
    basis = completed(vectors, known)
    other = completed(vectors * [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0], known)
    assert basis is not None
    assert other is not None
    np.testing.assert_allclose(np.abs(np.sum(basis * vectors, axis=0))[known], 1.0, rtol=1e-14)
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-14)
    np.testing.assert_allclose(basis[:, ~known], other[:, ~known], atol=1e-14)


def test_soap_leaves_axes_that_are_too_long_as_they_are() -> None:
    assert {name: own.shape for name, own in Soap(max_precond_dim=3).own((4, 3, 1)).items()} == {
        "m": (4, 3, 1),
        "v": (4, 3, 1),
        "count": (),
        "GG1": (3, 3),
        "Q1": (3, 3),
    }
    with pytest.raises(InvalidRecipe, match="at most 4096"):
        Soap(max_precond_dim=5000)


EVERY = [
    Muon(),
    Muon(flatten=True, bias_correction=True),
    Muon(orthogonalize=False, adam_eps=0.0),
    Shampoo(),
    Shampoo(eps=0.0, block_size=2, interval=2, momentum=0.9),
    Soap(),
    Soap(eps=0.0, interval=1, precondition_1d=True, normalize=True),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.kind)
def test_every_shape_and_magnitude_stays_finite(rule: Optimizer, dtype: str) -> None:
    random = np.random.default_rng(0)
    session = make(rule, {str(shape): np.ones(shape) for shape in SHAPES}, dtype=dtype)
    for scale in (0.0, 1.0, 1e-40, 1e37, 0.0, 1e-3):
        go(session, {str(shape): scale * random.normal(size=shape) for shape in SHAPES})
        assert np.isfinite(held(session)).all()


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.kind)
def test_squares_beyond_float64_stay_finite(rule: Optimizer) -> None:
    """An infinity has no eigenvectors: the statistics stop at the end of float64."""
    random = np.random.default_rng(0)
    session = make(rule, {"w": np.ones((4, 3))})
    for scale in (1e300, 1e300, 1e-300, 1.0):
        go(session, {"w": scale * random.normal(size=(4, 3))})
        assert np.isfinite(held(session)).all()
    assert all(np.isfinite(own).all() for name, own in session.state.own.items() if name.startswith(("w:GG", "w:H")))


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.kind)
def test_the_same_gradients_give_the_same_bits(rule: Optimizer) -> None:
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(40, 30)), list(random.normal(size=(4, 40, 30)))
    assert_same_bits(of_tensor(rule, start, gradients), of_tensor(rule, start, gradients))
