"""The core's Adam in a process that is asked, line by line, to take so many steps: one side of C1 and C2.

    python -m benchmarks.adam compiled|numpy SIZE

Says `{"version": …}` once it is ready; answers a number of steps with `{"seconds": …}`, and `end` with
`{"probe": […], …}`: some parameters, by which the two sides are held against each other, and what a step costs
in the service beyond what is compared. `peers/adam_torch` speaks the same and gets the same gradient.

What is timed is `Session.apply` of a gradient that was checked, written over the old parameters: what `step()`
of torch's optimizer does. The check, which sums the norm and refuses NaN, is given beside.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from core.contributions import Contribution
from core.evaluate import Evaluator, Spec
from core.layout import Layout
from core.optimizers.adam import Adam
from core.recipe import Recipe
from core.session import Session

PROBED = 8
EXTRA_ROUNDS = 3


def gradient(size: int) -> Any:
    """(size,) float32: (7919 i mod 1001 - 500) / 500, as `peers/adam_torch` has it."""
    return ((np.arange(size) * 7919 % 1001 - 500) / 500).astype(np.float32)


def main() -> None:
    form, size = sys.argv[1], int(sys.argv[2])
    wanted: list[Spec] = []
    evaluator = Evaluator(wanted.append)
    session = Session.new(Recipe(Adam(), Layout({"w": [size]})), {"w": np.zeros(size, np.float32)}, Evaluator())
    contribution = Contribution({"w": gradient(size)})
    checked = session.check(contribution)
    if form == "compiled":
        # Steps on arrays that are thrown away tell which kernels the session needs, in place and into a new array.
        other = Session.new(session.recipe, {"w": np.zeros(size, np.float32)}, evaluator)
        for fresh in (False, True):
            other.apply(checked, fresh=fresh)
        del other
        if not wanted:
            sys.exit("the core asked for no compiled kernel: is Numba installed?")
        for spec in wanted:
            evaluator.compile(spec)
        session.evaluator = evaluator
    compiled = len(wanted)
    say({"version": f"numpy {np.__version__}" + (f", numba {version('numba')}" if form == "compiled" else "")})
    for steps in asked():
        say({"seconds": timed(lambda: session.apply(checked, fresh=False), steps)})
    if len(wanted) > compiled:
        sys.exit("steps were taken in plain NumPy, for want of a kernel")
    params = session.state.params
    assert params is not None
    probe = [float(params[i * (size - 1) // PROBED]) for i in range(PROBED + 1)]
    extra = {
        "check (norm, finite) ms": 1e3 * timed(lambda: session.check(contribution), EXTRA_ROUNDS) / EXTRA_ROUNDS,
        "apply into a new array ms": 1e3 * timed(lambda: session.apply(checked), EXTRA_ROUNDS) / EXTRA_ROUNDS,
    }
    say({"probe": probe, "extra": extra})


def asked() -> Iterator[int]:
    """Numbers of steps, until `end` or the end of the input."""
    for line in sys.stdin:
        if line.strip() == "end":
            return
        yield int(line)


def timed(step: Callable[[], object], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - started


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
