"""Orthogonal gradients, against singular values and loops over Python's floats."""

import numpy as np
import pytest

from core.layout import Array
from core.transforms.matrices import Orthogonalize
from tests.core.build import assert_same_bits
from tests.core.transforms.pieces import changed, close, tensors

SHAPES = [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1), (1, 1)]


def random_matrix(shape: tuple[int, ...], seed: int = 3) -> Array:
    return tensors(seed, shapes={"w": shape})["w"]


def product(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def iterated(matrix: Array, steps: int) -> list[list[float]]:
    """Muon's quintic, x as it is: the result does not depend on which side the products are taken on."""
    size = float(np.sqrt(sum(float(value) ** 2 for value in matrix.reshape(-1))))
    x = [[float(value) / size for value in row] for row in matrix]
    for _ in range(steps):
        gram = product(x, [list(column) for column in zip(*x, strict=True)])
        third, fifth = product(gram, x), product(gram, product(gram, x))
        x = [
            [3.4445 * p - 4.7750 * q + 2.0315 * r for p, q, r in zip(*rows, strict=True)]
            for rows in zip(x, third, fifth, strict=True)
        ]
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_iteration_by_hand(shape: tuple[int, ...], steps: int) -> None:
    g = random_matrix(shape)
    close(changed(Orthogonalize(steps), {"w": g})["w"], np.array(iterated(g, steps)), 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    left, _, right = np.linalg.svd(random_matrix(shape), full_matrices=False)
    g = (left * np.geomspace(1.0, 0.005, min(shape))) @ right
    values = np.linalg.svd(changed(Orthogonalize(), {"w": g})["w"], compute_uv=False)
    assert values.min() > 0.68
    assert values.max() < 1.21


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_nearest_orthogonal_matrix(shape: tuple[int, ...]) -> None:
    g = random_matrix(shape)
    found: Array = changed(Orthogonalize(exact=True), {"w": g})["w"]
    tall, matrix = (found, g) if shape[0] >= shape[1] else (found.T, g.T)
    np.testing.assert_allclose(tall.T @ tall, np.eye(tall.shape[1]), atol=1e-14)
    # G = Q P with P symmetric and not negative: no other orthogonal Q has that.
    stretch = tall.T @ matrix
    np.testing.assert_allclose(stretch, stretch.T, atol=1e-12 * np.abs(stretch).max())
    assert np.linalg.eigvalsh(stretch).min() > 0


def test_a_direction_without_a_gradient_gets_none() -> None:
    g = np.outer([3.0, 0.0, 4.0], [0.0, 2.0])
    close(changed(Orthogonalize(exact=True), {"w": g})["w"], np.outer([0.6, 0.0, 0.8], [0.0, 1.0]), 1e-15)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_what_is_no_matrix_or_zero_stays(exact: bool, eps: float) -> None:
    g = tensors() | {"z": np.zeros((2, 3)), "e": np.zeros((0, 3))}
    found = changed(Orthogonalize(exact=exact, eps=eps), g)
    for name in ("b", "k", "s", "z", "e"):
        assert_same_bits(found[name], g[name])
    assert not np.array_equal(found["w"], g["w"])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_neither_large_nor_small_numbers_matter(exact: bool, size: float) -> None:
    g, transform = random_matrix((3, 4)), Orthogonalize(exact=exact, eps=0.0)
    close(changed(transform, {"w": g * size})["w"], changed(transform, {"w": g})["w"], 1e-12)


def test_what_is_not_finite_does_not_raise() -> None:
    g = np.array([[1.0, np.inf], [0.0, 1.0]])
    for exact in (True, False):
        assert np.isnan(changed(Orthogonalize(exact=exact), {"w": g})["w"]).any()
