"""Functions to minimise, with their gradients; NumPy alone, since both the oracles' script and the tests use them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# A point -> the loss and its gradient there.
Objective = Callable[[Array], tuple[float, Array]]


def rosenbrock(x: Array) -> tuple[float, Array]:
    bend, rest = x[1:] - x[:-1] ** 2, 1.0 - x[:-1]
    gradient = np.zeros_like(x)
    gradient[:-1] = -400.0 * bend * x[:-1] - 2.0 * rest
    gradient[1:] += 200.0 * bend
    return float((100.0 * bend**2 + rest**2).sum()), gradient


def beale(x: Array) -> tuple[float, Array]:
    a, b = x
    powers = b ** np.arange(1, 4)
    residuals = np.array([1.5, 2.25, 2.625]) - a * (1.0 - powers)
    along_b = a * np.arange(1, 4) * b ** np.arange(3)
    return float(residuals @ residuals), 2.0 * np.array([residuals @ (powers - 1.0), residuals @ along_b])


def logistic(features: Array, labels: Array) -> Objective:
    """The mean logistic loss of labels -1, 1, and 0.005 |x|²."""

    def objective(x: Array) -> tuple[float, Array]:
        margins = labels * (features @ x)
        slopes = labels / (1.0 + np.exp(margins))
        return float(np.logaddexp(0.0, -margins).mean() + 0.005 * x @ x), 0.01 * x - features.T @ slopes / len(labels)

    return objective


def make_features() -> Array:
    random = np.random.default_rng(7)
    return random.normal(size=(200, 20)) * np.exp(random.uniform(-1.5, 1.5, 20))


def make_labels() -> Array:
    random = np.random.default_rng(8)
    chances = 1.0 / (1.0 + np.exp(-make_features() @ random.normal(size=20)))
    return np.where(random.uniform(size=200) < chances, 1.0, -1.0)


PROBLEMS: dict[str, tuple[Objective, list[float]]] = {
    "rosenbrock-2": (rosenbrock, [-1.2, 1.0]),
    "rosenbrock-10": (rosenbrock, [1.3, 0.7, 0.8, 1.9, 1.2] * 2),
    "beale": (beale, [1.0, 1.0]),
    "logistic": (logistic(make_features(), make_labels()), [0.0] * 20),
}
