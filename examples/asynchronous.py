"""Four workers on one session, none of which waits for another.

Each has a quarter of the images, takes a gradient at the parameters that it has, sends it, and goes on from the answer.
By then the others have moved the session on: the gradient is τ steps old. The worker says at which step it was taken
(`base_step`), and the service multiplies it by a factor of τ (`staleness`). The fourth worker is four times slower than
the others, so what it sends is older. Beside it the same optimizer with a single worker, whose gradients are all fresh.

    python examples/asynchronous.py
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import perceptron
from client import Ravine, Session
from digits import Digits
from workers import Curve, Team, curve_of, follow, main, opened, shards, show

BATCH = 32
SLOWER = (1, 1, 1, 4)
SECONDS = 0.004  # what a batch takes at least: the model is too small for the machines to differ by themselves
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.3},
    "adam": {"kind": "adam", "lr": 0.005},
}
STALENESS = {"kind": "polynomial", "a": 0.5}  # (1 + τ)^-½


def work(url: str, path: str, number: int, x: np.ndarray, y: np.ndarray, steps: int, seconds: float) -> None:
    """One worker, in a process of its own."""
    session = Session(Ravine(url), path, f"worker-{number}")
    batches = perceptron.batches(len(y), BATCH, np.random.default_rng(number))
    point = session.pull()
    for _, batch in zip(range(steps), batches, strict=False):
        loss, gradients = perceptron.gradient(point.params, x[batch], y[batch])
        time.sleep(seconds)
        point = session.contribute("gradients", gradients, base_step=point.step, loss=loss)


@dataclass(frozen=True)
class Run:
    curve: Curve
    senders: list[str]
    """Who sent the gradient of each step, in order."""


def run(url: str, digits: Digits, rule: dict[str, Any], slower: tuple[int, ...], steps: int) -> Run:
    """`steps` steps of the fastest workers, and of the others as many as they manage in that time."""
    ravine = Ravine(url)
    with opened(ravine, rule, {"mode": "async", "staleness": STALENESS}) as path:
        members = {
            f"worker-{number}": (url, path, number, x, y, steps // times, times * SECONDS)
            for number, ((x, y), times) in enumerate(zip(shards(digits, len(slower)), slower, strict=True), start=1)
        }
        total = sum(steps // times for times in slower)
        with Team(work, members) as team:
            curve = curve_of(follow(ravine, path, total, team), digits, scale=BATCH)
            team.join()
        history = ravine.get(f"{path}/history?limit=10000")["data"]
    return Run(curve, [record["worker"] for record in history])


def ages(senders: list[str]) -> dict[str, list[int]]:
    """τ of each worker's gradients. Each goes on from the answer to its last, so τ is the steps of others between."""
    last: dict[str, int] = {}
    found: dict[str, list[int]] = {}
    for step, name in enumerate(senders):
        if name in last:
            found.setdefault(name, []).append(step - last[name] - 1)
        last[name] = step
    return found


def demo(url: str, digits: Digits, output: Path) -> None:
    import pictures  # here, so that all but the picture goes without matplotlib

    print("\nFour workers, none waits for another         test accuracy")
    curves = {}
    for kind, rule in RULES.items():
        for slower, steps in ((SLOWER, 120), ((1,), 390)):  # 3 · 120 + 30 = 390
            made = run(url, digits, rule, slower, steps)
            label = f"{kind}, {len(slower)} worker" + "s" * (len(slower) > 1)
            show(f"{label}, {len(made.senders)} gradients", made.curve)
            curves[label] = made.curve
            if len(slower) > 1:
                old = [f"{np.mean(taus):.1f}" for _, taus in sorted(ages(made.senders).items())]
                print(f"  mean age of their gradients: {', '.join(old)} steps")
    path = output / "asynchronous.png"
    print(f"wrote {pictures.accuracies(curves, 'Four workers without waiting, and one', 'images', path)}")


if __name__ == "__main__":
    sys.exit(main(demo, "Four workers on one session, none of which waits for another."))
