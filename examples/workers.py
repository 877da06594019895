"""What the four examples of many workers share: their processes, and the frame around them. Nothing to copy from here.

A worker is a process of its own, and all that it shares with the others is the address of a session. What it is given
besides, such as its part of the data, it would have on its own machine.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from client import Point, Ravine, Refused, Session, Unreachable
from digits import LEAVE, ROOT, START_SECONDS, Digits, leave, own_service, read_digits
from perceptron import accuracy, start

Curve = list[tuple[float, float]]
"""x, such as the round or the number of images, and the accuracy on the test images."""

PROCESSES = multiprocessing.get_context("spawn")  # not fork: each starts from nothing, as on a machine of its own
LOOK_SECONDS = 1


class WorkerFailed(Exception):
    """A worker ended in a way that nobody wanted; it has said why on stderr."""


class Team:
    """Worker processes by name. `work` is a function of a module, called in each with its own arguments.

    They begin together, when all are up: the first must not train by itself while others are still starting.
    """

    def __init__(self, work: Callable[..., None], members: dict[str, tuple[Any, ...]]) -> None:
        self._work = work
        self._members = members
        self.processes: dict[str, SpawnProcess] = {}

    def __enter__(self) -> "Team":
        begin = PROCESSES.Barrier(len(self._members) + 1)
        try:
            for name in self._members:
                self.start(name, begin)
            begin.wait(START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def start(self, name: str, begin: Barrier | None = None) -> None:
        process = PROCESSES.Process(target=work_alone, args=(begin, self._work, *self._members[name]), name=name)
        process.start()
        self.processes[name] = process

    def is_killed(self, name: str) -> bool:
        """Whether it was ended by SIGKILL, and not started again."""
        return self.processes[name].exitcode == -signal.SIGKILL

    def check(self) -> None:
        for name, process in self.processes.items():
            if process.exitcode not in (None, 0, -signal.SIGKILL):
                raise WorkerFailed(f"{name} ended with {process.exitcode}")

    def join(self) -> None:
        for process in self.processes.values():
            process.join()
        self.check()


def work_alone(begin: Barrier | None, work: Callable[..., None], *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the example, and that its workers
    if begin is not None:
        begin.wait(START_SECONDS)
    work(*arguments)


@contextlib.contextmanager
def opened(ravine: Ravine, optimizer: dict[str, Any], aggregation: dict[str, Any]) -> Iterator[str]:
    """The path of a new session with the untrained model. It is deleted in the end."""
    params = {name: tensor.tolist() for name, tensor in start().items()}
    request = {"name": "example", "optimizer": optimizer, "aggregation": aggregation, "params": params}
    path = f"/v1/sessions/{ravine.once('POST', '/v1/sessions', request)['id']}"
    try:
        yield path
    finally:
        # Refused: it was deleted after all, though the first answer was lost.
        with contextlib.suppress(Refused, Unreachable):
            Ravine(ravine.url, patience=5).call("DELETE", path)


def follow(ravine: Ravine, path: str, steps: int, team: Team) -> Iterator[Point]:
    """The session as it moves, up to step `steps`. If steps come faster than they are looked at, some are left out."""
    watched = Session(ravine, path, "")
    step = 0
    while step < steps:
        team.check()
        newer = watched.poll(step, LOOK_SECONDS)
        if newer is not None:
            step = newer.step
            yield newer


def curve_of(points: Iterator[Point], digits: Digits, scale: float = 1) -> Curve:
    """The accuracy of each of the points, behind that of the start."""
    points = itertools.chain([Point(0, start())], points)
    return [(step * scale, accuracy(params, digits.test_x, digits.test_y)) for step, params in points]


def shards(digits: Digits, count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """The training images dealt out at random, in equal parts."""
    parts = np.array_split(np.random.default_rng(seed).permutation(len(digits.train_y)), count)
    return [(digits.train_x[part].astype(np.float32), digits.train_y[part]) for part in parts]


def show(label: str, curve: Curve) -> None:
    print(f"{label:<44} {curve[-1][1]:>6.1%}", flush=True)


def main(demo: Callable[[str, Digits, Path], None], description: str, arguments: Sequence[str] | None = None) -> int:
    """Runs an example, on a service of its own unless it is given one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", help="a service that runs; left out, the example starts one of its own")
    parser.add_argument("--data", type=Path, help="an .npz with images and labels; left out, scikit-learn's digits")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="directory of the picture")
    asked = parser.parse_args(arguments)
    for number in LEAVE:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, leave)
    try:
        digits = read_digits(asked.data)
        asked.output.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext(asked.url) if asked.url else own_service() as url:
            demo(url, digits, asked.output)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"\n{error}; `make demo-workers` installs what is needed and runs this", file=sys.stderr)
        return 1
    except (OSError, Refused, RuntimeError, Unreachable, ValueError, WorkerFailed) as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
