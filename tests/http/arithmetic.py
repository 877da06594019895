"""The methods as their papers have them, written by hand in float64: what the service's numbers are held against.

A rule takes the gradient g, the parameters p, its slots s (a dict that starts out empty) and the step t = 1, 2, …; it
returns the updates and leaves its slots in s.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
Slots: TypeAlias = dict[str, Any]
Rule: TypeAlias = Callable[[Array, Array, Slots, int], Array]


def sgd(lr: float) -> Rule:
    def rule(g: Array, p: Array, s: Slots, t: int) -> Array:
        return -lr * g

    return rule


def momentum(lr: float, mu: float) -> Rule:
    def rule(g: Array, p: Array, s: Slots, t: int) -> Array:
        s["v"] = mu * s.get("v", 0.0) + g
        return -lr * s["v"]

    return rule


def adagrad(lr: float, eps: float = 1e-10) -> Rule:
    def rule(g: Array, p: Array, s: Slots, t: int) -> Array:
        s["G"] = s.get("G", 0.0) + g**2
        return -lr * g / (np.sqrt(s["G"]) + eps)

    return rule


def rmsprop(lr: float, alpha: float, eps: float = 1e-8) -> Rule:
    def rule(g: Array, p: Array, s: Slots, t: int) -> Array:
        s["s"] = alpha * s.get("s", 0.0) + (1 - alpha) * g**2
        return -lr * g / (np.sqrt(s["s"]) + eps)

    return rule


def adam(lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Rule:
    return adamw(lr, 0.0, beta1, beta2, eps)


def adamw(lr: float, decay: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Rule:
    def rule(g: Array, p: Array, s: Slots, t: int) -> Array:
        s["m"] = beta1 * s.get("m", 0.0) + (1 - beta1) * g
        s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * g**2
        corrected = s["m"] / (1 - beta1**t), s["v"] / (1 - beta2**t)
        return -lr * corrected[0] / (np.sqrt(corrected[1]) + eps) - lr * decay * p

    return rule


def trajectory(rule: Rule, start: Any, gradients: Iterable[Any], slots: Slots | None = None, t: int = 0) -> list[Array]:
    """The parameters after each of `gradients`, from `start` at step `t` on."""
    p, s = np.asarray(start, np.float64), {} if slots is None else slots
    points = []
    for g in gradients:
        t += 1
        p = p + rule(np.asarray(g, np.float64), p, s, t)
        points.append(p)
    return points
