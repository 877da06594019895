"""What the contestants of P1 have in common, in whatever environment: the gradient, the window, the lines they speak.

A contestant is one process that starts its server and its workers, each a process again. It says `{"version": …,
"server": process id or null}` once all are ready, and then takes lines:

    check PATH              one worker pushes `SCALES` times the gradient; the parameters that it has then go to PATH
    turn WORKERS WARM SECONDS   so many workers push and pull, over and over; `{"count": …, "seconds": …, "all": …}`
    end                     `{"pushed": …, "steps": …}`: what the workers sent, and what the server took

A round trip counts if it ends within the window of SECONDS that opens WARM seconds after the workers began. They are
at work before it opens and after it closes, so that what is counted is the steady state, and what is cut off at the
one end was cut off at the other. All clocks are `time.monotonic`, which is one for all processes.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np

SCALES = (1.0, -0.5, 2.0, 0.25, 1.5)
START_SECONDS, ANSWER_SECONDS = 60, 120

Push = Callable[[np.ndarray], np.ndarray]


class Counts(NamedTuple):
    """Round trips that ended within the window, and all."""

    within: int
    all: int


class Contestant(Protocol):
    version: str
    server: int | None

    def check(self) -> np.ndarray:
        """The parameters after `SCALES`, (size,) float32."""
        ...

    def turn(self, workers: int, warm: float, seconds: float) -> dict[str, float]: ...

    def end(self) -> dict[str, int]: ...


def gradient(size: int) -> np.ndarray:
    """(size,) float32: (7919 i mod 1001 - 500) / 500, and nowhere 0, where Adam's step is all rounding."""
    return ((np.arange(size) * 7919 % 1001 - 500.5) / 500).astype(np.float32)


def window(push: Callable[[], object], opens: float, closes: float) -> Counts:
    within = total = 0
    while time.monotonic() < closes:
        push()
        total += 1
        within += opens <= time.monotonic() < closes
    return Counts(within, total)


def serve(contestant: Contestant) -> None:
    """Answers the lines on standard input."""
    say({"version": contestant.version, "server": contestant.server})
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "check":
            contestant.check().astype("<f4").tofile(arguments[0])
            say({})
        elif word == "turn":
            say(contestant.turn(int(arguments[0]), float(arguments[1]), float(arguments[2])))
        else:
            say(contestant.end())
            return


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def tally(found: Sequence[Counts], seconds: float) -> dict[str, float]:
    """The answer to `turn`: round trips within the window, its length, and all round trips."""
    return {
        "count": sum(counts.within for counts in found),
        "seconds": seconds,
        "all": sum(counts.all for counts in found),
    }


class Crew:
    """Workers as processes of their own: each runs `main(orders, number, *arguments)`, says so, and obeys."""

    def __init__(self, main: Callable[..., None], count: int, *arguments: Any) -> None:
        self.pushed = 0
        context = multiprocessing.get_context("spawn")
        self._orders: list[Connection] = []
        self._processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=main, args=(theirs, number, *arguments))
            process.start()
            theirs.close()
            self._orders.append(ours)
            self._processes.append(process)

    def ready(self) -> list[Any]:
        """What each said of itself."""
        return [self._answer(orders, START_SECONDS) for orders in self._orders]

    def ask(self, workers: int, order: Any) -> list[Any]:
        """So many of them, all at once."""
        self.send(workers, order)
        return self.answers(workers)

    def send(self, workers: int, order: Any) -> None:
        for orders in self._orders[:workers]:
            orders.send(order)

    def answers(self, workers: int) -> list[Any]:
        return [self._answer(orders, ANSWER_SECONDS) for orders in self._orders[:workers]]

    def check(self) -> np.ndarray:
        self.pushed += len(SCALES)
        found: np.ndarray = self.ask(1, "check")[0]
        return found

    def turn(self, workers: int, warm: float, seconds: float) -> dict[str, float]:
        opens = time.monotonic() + warm
        found = self.ask(workers, (opens, opens + seconds))
        self.pushed += sum(counts.all for counts in found)
        return tally(found, seconds)

    def dismiss(self) -> None:
        for orders in self._orders:
            orders.send(None)

    def join(self) -> None:
        for process in self._processes:
            process.join(START_SECONDS)

    def _answer(self, orders: Connection, seconds: float) -> Any:
        if not orders.poll(seconds):
            sys.exit("a worker does not answer")
        return orders.recv()


def given(orders: Connection) -> Iterator[Any]:
    """Orders, until there are no more, or nobody to give them."""
    with contextlib.suppress(EOFError):
        while (order := orders.recv()) is not None:
            yield order


def work(orders: Connection, size: int, push: Push, pause: Callable[[], None] = lambda: None) -> None:
    """A worker's life. `push` sends a gradient and returns the parameters, `pause` is called after each turn."""
    own = gradient(size)
    orders.send(os.getpid())
    for order in given(orders):
        found = checked(own, push) if order == "check" else window(lambda: push(own), *order)
        pause()
        orders.send(found)


def in_rounds(one: Callable[[], None], workers: int, warm: float, seconds: float) -> dict[str, float]:
    """The turn of a contestant whose workers go on together: whole rounds, as many as begin in time.

    The rate is that of the rounds that began after the warm ones, since a window could hold none.
    """
    began, rounds = time.monotonic(), 1
    one()
    while time.monotonic() < began + warm:
        one()
        rounds += 1
    opened, within = time.monotonic(), 0
    while (elapsed := time.monotonic() - opened) < seconds:
        one()
        within += 1
    return {"count": within * workers, "seconds": elapsed, "all": (rounds + within) * workers}


def checked(own: np.ndarray, push: Push) -> np.ndarray:
    return [push(np.float32(scale) * own) for scale in SCALES][-1]
