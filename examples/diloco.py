"""DiLoCo: four workers that speak to each other once in fifty steps.

Each takes 50 steps of AdamW on its own quarter of the images, and sends how far it came (`deltas`). The service takes
the mean for a step of Nesterov's momentum, rate 0.7 (Douillard et al. 2023, arXiv:2311.08105). Beside it the plain way,
with as many images: after each batch all four send their gradients, and the service takes the AdamW step.

    python examples/diloco.py
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import perceptron
from client import Ravine, Session
from digits import Digits
from perceptron import Tensors, minus
from workers import Curve, Team, curve_of, follow, main, opened, shards, show

WORKERS = 4
INNER = 50
OUTER = 6
BATCH = 16
RATE, BETA1, BETA2, EPSILON, DECAY = 0.003, 0.9, 0.999, 1e-8, 0.01
NESTEROV: dict[str, Any] = {"kind": "momentum", "lr": 0.7, "momentum": 0.9, "nesterov": True}
ADAMW: dict[str, Any] = {
    "kind": "adamw", "lr": RATE, "beta1": BETA1, "beta2": BETA2, "eps": EPSILON, "weight_decay": DECAY
}  # fmt: skip


class AdamW:
    """The inner optimizer, which stays with its worker: what it remembers is never sent."""

    def __init__(self, params: Tensors) -> None:
        self._t = 0
        self._m = {name: np.zeros_like(value) for name, value in params.items()}
        self._v = {name: np.zeros_like(value) for name, value in params.items()}

    def step(self, params: Tensors, gradients: Tensors) -> Tensors:
        self._t += 1
        moved = {}
        for name, g in gradients.items():
            m = self._m[name] = BETA1 * self._m[name] + (1 - BETA1) * g
            v = self._v[name] = BETA2 * self._v[name] + (1 - BETA2) * g * g
            direction = m / (1 - BETA1**self._t) / (np.sqrt(v / (1 - BETA2**self._t)) + EPSILON)
            moved[name] = params[name] - RATE * (direction + DECAY * params[name])
        return moved


def work_apart(url: str, path: str, number: int, x: np.ndarray, y: np.ndarray, outer: int) -> None:
    """One worker of DiLoCo, in a process of its own."""
    session = Session(Ravine(url), path, f"island-{number}")
    batches = perceptron.batches(len(y), BATCH, np.random.default_rng(number))
    point = session.pull()
    optimizer = AdamW(point.params)
    while point.step < outer:
        params = point.params
        for _, batch in zip(range(INNER), batches, strict=False):
            loss, gradients = perceptron.gradient(params, x[batch], y[batch])
            params = optimizer.step(params, gradients)
        point = session.contribute("deltas", minus(params, point.params), loss=loss)


def work_in_step(url: str, path: str, number: int, x: np.ndarray, y: np.ndarray, steps: int) -> None:
    """One worker of the plain way, in a process of its own."""
    session = Session(Ravine(url), path, f"worker-{number}")
    batches = perceptron.batches(len(y), BATCH, np.random.default_rng(number))
    point = session.pull()
    while point.step < steps:
        batch = next(batches)
        loss, gradients = perceptron.gradient(point.params, x[batch], y[batch])
        point = session.contribute("gradients", gradients, loss=loss)


def run(url: str, digits: Digits, way: str, rounds: int) -> Curve:
    """`rounds` rounds of "diloco" or "plain"; the accuracy by the number of images that were trained on."""
    work, rule, steps = (work_apart, NESTEROV, INNER) if way == "diloco" else (work_in_step, ADAMW, 1)
    ravine = Ravine(url)
    with opened(ravine, rule, {"mode": "sync", "workers": WORKERS}) as path:
        members = {
            f"{way}-{number}": (url, path, number, x, y, rounds)
            for number, (x, y) in enumerate(shards(digits, WORKERS))
        }
        with Team(work, members) as team:
            curve = curve_of(follow(ravine, path, rounds, team), digits, scale=WORKERS * BATCH * steps)
            team.join()
    return curve


def demo(url: str, digits: Digits, output: Path) -> None:
    import pictures  # here, so that all but the picture goes without matplotlib

    print(f"\nFour workers, {OUTER * INNER * WORKERS * BATCH} images                              test accuracy")
    apart = run(url, digits, "diloco", OUTER)
    for images, reached in apart[1:]:
        print(f"  after {images:>6.0f} images: {reached:.1%}")
    show(f"DiLoCo, {OUTER * WORKERS} contributions", apart)
    plain = run(url, digits, "plain", OUTER * INNER)
    show(f"plain, {OUTER * INNER * WORKERS} contributions", plain)
    show(f"plain, as few contributions as DiLoCo: {OUTER * WORKERS}", run(url, digits, "plain", OUTER))
    curves = {f"DiLoCo, {INNER} steps apart": apart, "plain, in step": plain}
    path = output / "diloco.png"
    print(f"wrote {pictures.accuracies(curves, 'Four workers that speak once in 50 steps', 'images', path)}")


if __name__ == "__main__":
    sys.exit(main(demo, "DiLoCo with four workers, beside plain synchronous training."))
