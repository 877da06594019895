"""The model that the workers train: 64 pixels, a hidden layer of tanh, ten classes. NumPy, nothing of Ravine."""

from collections.abc import Iterator

import numpy as np

Tensors = dict[str, np.ndarray]

PIXELS, HIDDEN, CLASSES = 64, 32, 10


def start(seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        "w1": (random.normal(size=(PIXELS, HIDDEN)) / PIXELS**0.5).astype(np.float32),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": (random.normal(size=(HIDDEN, CLASSES)) / HIDDEN**0.5).astype(np.float32),
        "b2": np.zeros(CLASSES, np.float32),
    }


def forward(params: Tensors, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden layer (n, 32), and the logarithms of the probabilities (n, 10)."""
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    scores = hidden @ params["w2"] + params["b2"]
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def gradient(params: Tensors, x: np.ndarray, y: np.ndarray) -> tuple[float, Tensors]:
    """The mean cross-entropy of images (n, 64) with labels (n,), and its gradient."""
    hidden, logs = forward(params, x)
    error = (np.exp(logs) - np.eye(CLASSES, dtype=logs.dtype)[y]) / len(y)
    below = (error @ params["w2"].T) * (1 - hidden**2)
    gradients = {"w1": x.T @ below, "b1": below.sum(axis=0), "w2": hidden.T @ error, "b2": error.sum(axis=0)}
    return -float(logs[np.arange(len(y)), y].mean()), gradients


def accuracy(params: Tensors, x: np.ndarray, y: np.ndarray) -> float:
    return float((forward(params, x)[1].argmax(axis=1) == y).mean())


def batches(count: int, size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of minibatches without end: each image once, then all again in another order."""
    while True:
        order = random.permutation(count)
        yield from (order[first : first + size] for first in range(0, count, size))


def descend(
    params: Tensors, x: np.ndarray, y: np.ndarray, epochs: int, size: int, lr: float, random: np.random.Generator
) -> tuple[float, Tensors]:
    """What a worker does by itself: plain SGD over its images. Returns the mean loss, and the new parameters."""
    losses = []
    per_epoch = -(-len(y) // size)
    for _, batch in zip(range(epochs * per_epoch), batches(len(y), size, random), strict=False):
        loss, gradients = gradient(params, x[batch], y[batch])
        params = {name: value - lr * gradients[name] for name, value in params.items()}
        losses.append(loss)
    return float(np.mean(losses)), params


def minus(left: Tensors, right: Tensors) -> Tensors:
    return {name: value - right[name] for name, value in left.items()}
