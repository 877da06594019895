"""What the kinds are to minimize: a quadratic, Rosenbrock's and Beale's functions, and a softmax regression on digits.

The first three are exact: gradient, Hessian and loss are those of the function itself. The regression is noisy: each
step sees a batch of 64 images, and its loss is judged on the whole training set.
"""

from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from core.layout import Array
from core.session import Session

DIGITS = Path(__file__).parents[1] / "tests" / "core" / "data" / "digits.npz"
SEED = 0
# A point -> the loss and its gradient there.
Slope = Callable[[Array], tuple[float, Array]]


class Problem(Protocol):
    """A function of the flat parameters (n,).

    It is minimized once its loss is at most `target` at `looks` looks in succession, with `every` steps from one to
    the next; a method has `limit` steps.
    """

    name: str
    start: dict[str, Array]
    target: float
    limit: int
    every: int
    looks: int

    def loss(self, point: Array) -> float:
        """What is judged."""
        ...

    def contribution(self, session: Session) -> dict[str, Any]:
        """The members of a Contribution: the gradient where the session wants it, and what its method needs beside."""
        ...


def is_due(session: Session) -> bool:
    """Whether the next step has to bring the diagonal of the Hessian."""
    t = session.state.moves + 1
    return "hessian_diagonal" in session.recipe.needs and any(v.at(t).due(t) for v in session.recipe.variants)


class Exact:
    """A function of one matrix w that can be differentiated twice; its minimum is 0."""

    target, limit, every, looks = 1e-6, 20_000, 1, 10

    def __init__(self, name: str, start: Array, slope: Slope, curvature: Callable[[Array], Array]) -> None:
        self.name = name
        self.start = {"w": start}
        self._slope = slope
        self._curvature = curvature

    def loss(self, point: Array) -> float:
        return self._slope(point)[0]

    def contribution(self, session: Session) -> dict[str, Any]:
        point, shape = session.next_point(), self.start["w"].shape
        loss, gradient = self._slope(point)
        found: dict[str, Any] = {"gradients": {"w": gradient.reshape(shape)}, "loss": loss}
        if "hessian" in session.recipe.needs:
            found["hessian"] = self._curvature(point)
        if is_due(session):
            found["hessian_diagonal"] = {"w": np.diagonal(self._curvature(point)).reshape(shape)}
        return found


def quadratic() -> Exact:
    """In 20 dimensions; the curvatures go from 1 to 10⁴ in equal ratios, along axes that are none of the parameters'.

    It starts at 0.01 in each parameter, where its value is 1; the minimum is equally far along each axis.
    """
    axes = np.linalg.qr(np.random.default_rng(SEED).normal(size=(20, 20)))[0]
    curvatures = np.logspace(0.0, 4.0, 20)
    start = np.full((4, 5), 0.01)
    minimum = start.reshape(-1) - axes @ np.full(20, np.sqrt(2.0 / curvatures.sum()))
    hessian = (axes * curvatures) @ axes.T

    def slope(point: Array) -> tuple[float, Array]:
        way = point - minimum
        gradient = hessian @ way
        return 0.5 * float(way @ gradient), gradient

    return Exact("quadratic", start, slope, lambda _: hessian)


def rosenbrock() -> Exact:
    def slope(point: Array) -> tuple[float, Array]:
        x, y = point.tolist()
        bend, rest = y - x * x, 1.0 - x
        return 100.0 * bend * bend + rest * rest, np.array([-400.0 * bend * x - 2.0 * rest, 200.0 * bend])

    def curvature(point: Array) -> Array:
        x, y = point.tolist()
        return np.array([[1200.0 * x * x - 400.0 * y + 2.0, -400.0 * x], [-400.0 * x, 200.0]])

    return Exact("rosenbrock", np.array([[-1.2], [1.0]]), slope, curvature)


def beale() -> Exact:
    sums = (1.5, 2.25, 2.625)

    def slope(point: Array) -> tuple[float, Array]:
        x, y = point.tolist()
        loss, along_x, along_y = 0.0, 0.0, 0.0
        for power, value in enumerate(sums, 1):
            residual = value - x + x * y**power
            loss += residual * residual
            along_x += 2.0 * residual * (y**power - 1.0)
            along_y += 2.0 * residual * x * power * y ** (power - 1)
        return loss, np.array([along_x, along_y])

    def curvature(point: Array) -> Array:
        x, y = point.tolist()
        found = np.zeros((2, 2))
        for power, value in enumerate(sums, 1):
            residual = value - x + x * y**power
            first = np.array([y**power - 1.0, x * power * y ** (power - 1)])
            mixed = power * y ** (power - 1)
            bent = x * power * (power - 1) * y ** (power - 2) if power > 1 else 0.0
            found += 2.0 * (np.outer(first, first) + residual * np.array([[0.0, mixed], [mixed, bent]]))
        return found

    return Exact("beale", np.array([[1.0], [1.0]]), slope, curvature)


class Batch(NamedTuple):
    """Images (n, 65), the last column of which is 1, and their labels (n,)."""

    x: Array
    labels: Array


CLASSES, BATCH = 10, 64


class Digits:
    """Softmax regression of 64 pixels and a constant on 10 digits: w (64, 10) and b (10,), from 0.

    Four fifths of the images are for training, the pixels standardized by them. The batch changes when the parameters
    have moved: a method that takes two gradients for a move, or searches a line, sees one batch meanwhile.
    """

    name = "digits"
    target, limit, every, looks = 0.05, 2_000, 5, 2

    def __init__(self) -> None:
        with np.load(DIGITS) as data:
            images, labels = data["images"].astype(np.float64), data["labels"].astype(np.int64)
        order = np.random.default_rng(SEED).permutation(len(labels))
        training, testing = np.split(order, [len(order) * 4 // 5])
        mean, deviation = images[training].mean(axis=0), images[training].std(axis=0)
        pixels = (images - mean) / np.where(deviation > 0.0, deviation, 1.0)
        x = np.hstack([pixels, np.ones((len(pixels), 1))])
        self.training, self.testing = Batch(x[training], labels[training]), Batch(x[testing], labels[testing])
        self.start = {"w": np.zeros((64, CLASSES)), "b": np.zeros(CLASSES)}

    @cached_property
    def batches(self) -> list[Batch]:
        random, count = np.random.default_rng(SEED), len(self.training.labels)
        found: list[Batch] = []
        while len(found) < self.limit:
            order = random.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)
            found += [Batch(self.training.x[rows], self.training.labels[rows]) for rows in order]
        return found

    def loss(self, point: Array) -> float:
        return cross_entropy(point, self.training)[0]

    def accuracy(self, point: Array) -> float:
        """The share of the images that were kept for testing of which the digit is found."""
        guesses = (self.testing.x @ point.reshape(-1, CLASSES)).argmax(axis=1)
        return float((guesses == self.testing.labels).mean())

    def contribution(self, session: Session) -> dict[str, Any]:
        point, batch = session.next_point(), self.batches[session.state.moves]
        loss, chances = cross_entropy(point, batch)
        found: dict[str, Any] = {"gradients": self._tensors(gradient(batch, chances)), "loss": loss}
        if "hessian" in session.recipe.needs:
            found["hessian"] = hessian(batch, chances)
        if is_due(session):
            found["hessian_diagonal"] = self._tensors(guessed_diagonal(batch, chances, session.state.moves))
        return found

    @staticmethod
    def _tensors(matrix: Array) -> dict[str, Array]:
        return {"w": matrix[:-1], "b": matrix[-1]}


def cross_entropy(point: Array, batch: Batch) -> tuple[float, Array]:
    """The mean over a batch, and the chances (n, 10) that the model gives to the digits."""
    with np.errstate(all="ignore"):  # a method whose rate is too large
        scores = batch.x @ point.reshape(-1, CLASSES)
        scores -= scores.max(axis=1, keepdims=True)
        raised = np.exp(scores)
        total = raised.sum(axis=1, keepdims=True)
        at_label = scores[np.arange(len(scores)), batch.labels]
        return float((np.log(total[:, 0]) - at_label).mean()), raised / total


def gradient(batch: Batch, chances: Array) -> Array:
    """(65, 10): of the mean cross-entropy."""
    error = chances.copy()
    error[np.arange(len(error)), batch.labels] -= 1.0
    found: Array = batch.x.T @ (error / len(error))
    return found


def hessian(batch: Batch, chances: Array) -> Array:
    """(650, 650): of the mean cross-entropy."""
    count, features = batch.x.shape
    same = np.zeros((features, CLASSES, features, CLASSES))
    for digit in range(CLASSES):
        same[:, digit, :, digit] = (batch.x * chances[:, digit : digit + 1]).T @ batch.x
    both = (batch.x[:, :, None] * chances[:, None, :]).reshape(count, -1)
    found: Array = (same.reshape(features * CLASSES, -1) - both.T @ both) / count
    return found


def guessed_diagonal(batch: Batch, chances: Array, seed: int) -> Array:
    """(65, 10): Gauss, Newton and Bartlett's estimate, by labels that are drawn as the model believes."""
    draws = np.random.default_rng([SEED, seed]).random((len(chances), 1))
    drawn = (chances.cumsum(axis=1) < draws).sum(axis=1).clip(max=CLASSES - 1)
    return len(chances) * gradient(Batch(batch.x, drawn), chances) ** 2


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic": quadratic,
    "rosenbrock": rosenbrock,
    "beale": beale,
    "digits": Digits,
}


@cache
def problem_of(name: str) -> Problem:
    return PROBLEMS[name]()
