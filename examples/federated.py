"""Eight clients that keep their images to themselves, and one that is killed in every third round.

Their shares are unequal, in size and in what they show: some have hardly seen a 3. In each round a client trains on its
own images for a while, and sends how far it came (`deltas`) with the number of its images (`weight`). The service takes
the weighted mean for a step of its optimizer: SGD with rate 1 makes this FedAvg, `fedadam` FedAdam.

A client that is killed in the middle of its work does not stop the others: the round is closed without it, a second
after its first contribution came (`timeout`), if six are there (`quorum`). Started again, it pulls the parameters and
goes on. One that comes too late for its round is told so (`max_staleness` 0), and goes on with the next one.

    python examples/federated.py
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import perceptron
from client import Point, Ravine, Refused, Session
from digits import CLASSES, Digits
from perceptron import descend, minus
from workers import Curve, Team, curve_of, follow, main, opened

CLIENTS, QUORUM = 8, 6
ROUNDS = 21
TIMEOUT_SECONDS = 1.0
EPOCHS, BATCH, RATE = 2, 16, 0.05
SECONDS = 2e-4  # what an image takes at least: who has more of them comes later
CONCENTRATION = 0.5  # of the Dirichlet distribution that deals the images out: the lower, the more unequal
SEED = 4
RULES: dict[str, dict[str, Any]] = {
    "FedAvg": {"kind": "sgd", "lr": 1},
    "FedAdam": {"kind": "fedadam", "lr": 0.05, "beta1": 0.9, "beta2": 0.99, "tau": 0.001},
}


def work(url: str, path: str, name: str, x: np.ndarray, y: np.ndarray, rounds: int, killed_in: set[int]) -> None:
    """One client, in a process of its own."""
    session = Session(Ravine(url), path, name)
    random = np.random.default_rng(len(y))
    point = session.pull()
    while point.step < rounds:
        loss, params = descend(point.params, x, y, EPOCHS // 2, BATCH, RATE, random)
        if point.step + 1 in killed_in:
            os.kill(os.getpid(), signal.SIGKILL)  # as if the plug were pulled: no goodbye, half of the work done
        _, params = descend(params, x, y, EPOCHS - EPOCHS // 2, BATCH, RATE, random)
        time.sleep(SECONDS * len(y))
        deltas = minus(params, point.params)
        try:
            point = session.contribute("deltas", deltas, base_step=point.step, weight=len(y), loss=loss)
        except Refused as refused:
            if refused.status != 409:
                raise
            point = session.pull(after=point.step)  # the round went on without this, or has it from before the kill


@dataclass
class Run:
    curve: Curve = field(default_factory=list)
    killed: list[tuple[int, str]] = field(default_factory=list)
    """The round, and who."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The service's own record of each round."""
    workers: list[dict[str, Any]] = field(default_factory=list)
    """What it knows of each client."""


def run(url: str, digits: Digits, rule: dict[str, Any], rounds: int = ROUNDS, timeout: float = TIMEOUT_SECONDS) -> Run:
    ravine, made = Ravine(url), Run()
    waiting = {"mode": "sync", "workers": CLIENTS, "quorum": QUORUM, "timeout": timeout, "max_staleness": 0}
    with opened(ravine, rule, waiting) as path:
        doomed = {number: f"client-{number // 3 % CLIENTS}" for number in range(3, rounds + 1, 3)}
        members = {
            name: (url, path, name, x, y, rounds, {number for number, victim in doomed.items() if victim == name})
            for name, (x, y) in shares(digits).items()
        }
        with Team(work, members) as team:
            made.curve = curve_of(revive(follow(ravine, path, rounds, team), team, doomed, made), digits)
            team.join()
        made.history = ravine.get(f"{path}/history")["data"]
        made.workers = ravine.get(f"{path}/workers")["data"]
    return made


def revive(points: Iterator[Point], team: Team, doomed: dict[int, str], made: Run) -> Iterator[Point]:
    """Passes the rounds on, and starts those again that were killed in one that is over."""
    for point in points:
        for number, name in list(doomed.items()):
            if number <= point.step and team.is_killed(name):
                del doomed[number]
                made.killed.append((number, name))
                team.start(name)
        yield point


def shares(digits: Digits) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The training images, dealt out class by class in proportions drawn from a Dirichlet distribution."""
    random = np.random.default_rng(SEED)
    owners = np.empty(len(digits.train_y), int)
    for digit in range(CLASSES):
        images = np.flatnonzero(digits.train_y == digit)
        owners[images] = random.choice(CLIENTS, len(images), p=random.dirichlet([CONCENTRATION] * CLIENTS))
    return {
        f"client-{number}": (digits.train_x[owners == number].astype(np.float32), digits.train_y[owners == number])
        for number in range(CLIENTS)
    }


def alone(digits: Digits, rounds: int) -> dict[str, float]:
    """How far each client comes in as many epochs with its own images."""
    reached = {}
    for name, (x, y) in shares(digits).items():
        _, params = descend(perceptron.start(), x, y, EPOCHS * rounds, BATCH, RATE, np.random.default_rng(0))
        reached[name] = perceptron.accuracy(params, digits.test_x, digits.test_y)
    return reached


def demo(url: str, digits: Digits, output: Path) -> None:
    import pictures  # here, so that all but the picture goes without matplotlib

    print("\nEight clients with unequal shares, one killed in every third round")
    by_themselves = alone(digits, ROUNDS)
    print("client     images of each digit                          together   alone")
    for name, (_, y) in shares(digits).items():
        counts = " ".join(f"{count:>3}" for count in np.bincount(y, minlength=CLASSES))
        print(f"{name:<10} {counts:<46} {len(y):>6} {by_themselves[name]:>8.1%}")
    runs = {kind: run(url, digits, rule) for kind, rule in RULES.items()}
    table(runs)
    curves = {kind: made.curve for kind, made in runs.items()}
    best = max(by_themselves.values())
    curves["the best client, alone"] = [(0, best), (ROUNDS, best)]
    path = output / "federated.png"
    print(f"wrote {pictures.accuracies(curves, 'Eight unequal clients, kills and all', 'round', path)}")


def table(runs: dict[str, Run]) -> None:
    print("round   " + "".join(f"{kind:<26}" for kind in runs))
    reached = [dict(made.curve) for made in runs.values()]
    killed = [dict(made.killed) for made in runs.values()]
    for number in range(ROUNDS + 1):
        cells = [
            f"{f'{curve[number]:.1%}' if number in curve else '':<7}"
            f"{f'without {victims[number]}' if number in victims else '':<19}"
            for curve, victims in zip(reached, killed, strict=True)
        ]
        print(f"{number:>5}   {''.join(cells)}".rstrip())
    for kind, made in runs.items():
        contributions = sum(worker["contributions"] for worker in made.workers)
        print(f"{kind}: {contributions} contributions to {len(made.history)} rounds of {CLIENTS}")


if __name__ == "__main__":
    sys.exit(main(demo, "Eight federated clients, one of which is killed in every third round."))
