"""Ten workers, of which two send garbage.

All ten train on their part of the images and send how far they came; two of them send noise in its place, far longer
than anything honest. How the service makes one step of the ten is the session's `reduce`: a mean has no defence, a
trimmed mean leaves out the ends of each coordinate, Krum picks what has the nearest neighbours.

    python examples/byzantine.py
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from client import Ravine, Session
from digits import Digits
from perceptron import descend, minus
from workers import Curve, Team, curve_of, follow, main, opened, shards, show

WORKERS, LIARS = 10, 2
ROUNDS = 15
EPOCHS, BATCH, RATE = 1, 16, 0.1
SGD: dict[str, Any] = {"kind": "sgd", "lr": 1}
NOISE = 10.0  # the deviation of each number that a liar sends; honest ones are some hundredths
REDUCERS: dict[str, dict[str, Any]] = {
    "mean": {"kind": "mean"},
    "trimmed mean": {"kind": "trimmed_mean", "fraction": LIARS / WORKERS},
    "Krum": {"kind": "krum", "byzantine": LIARS},
    "Multi-Krum": {"kind": "multi_krum", "byzantine": LIARS},
}


def work(url: str, paths: list[str], number: int, x: np.ndarray, y: np.ndarray, rounds: int, honest: bool) -> None:
    """One worker, in a process of its own: in one session after the other."""
    ravine = Ravine(url)
    for path in paths:
        session = Session(ravine, path, f"worker-{number}")
        random = np.random.default_rng(number)
        point = session.pull()
        while point.step < rounds:
            loss, params = descend(point.params, x, y, EPOCHS, BATCH, RATE, random)
            deltas = minus(params, point.params)
            if not honest:
                deltas = {name: random.normal(scale=NOISE, size=delta.shape) for name, delta in deltas.items()}
            point = session.contribute("deltas", deltas, loss=loss)


def run(url: str, digits: Digits, reducers: list[str], liars: int = LIARS, rounds: int = ROUNDS) -> dict[str, Curve]:
    """By reducer, what the ten come to; the first `liars` of them are no honest workers."""
    ravine = Ravine(url)
    with contextlib.ExitStack() as stack:
        paths = {
            name: stack.enter_context(
                opened(ravine, SGD, {"mode": "sync", "workers": WORKERS, "reduce": REDUCERS[name]})
            )
            for name in reducers
        }
        members = {
            f"worker-{number}": (url, list(paths.values()), number, x, y, rounds, number >= liars)
            for number, (x, y) in enumerate(shards(digits, WORKERS))
        }
        team = stack.enter_context(Team(work, members))
        curves = {name: curve_of(follow(ravine, path, rounds, team), digits) for name, path in paths.items()}
        team.join()
    return curves


def demo(url: str, digits: Digits, output: Path) -> None:
    import pictures  # here, so that all but the picture goes without matplotlib

    print("\nTen workers, two of which send garbage       test accuracy")
    curves = {"mean, all ten honest": run(url, digits, ["mean"], liars=0)["mean"]}
    curves |= run(url, digits, list(REDUCERS))
    for name, curve in curves.items():
        show(name, curve)
    path = output / "byzantine.png"
    print(f"wrote {pictures.accuracies(curves, 'Two of ten workers send garbage', 'round', path)}")


if __name__ == "__main__":
    sys.exit(main(demo, "Ten workers, of which two send garbage."))
