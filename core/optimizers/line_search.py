"""A line search that is asked: each trial point is handed out, and its loss and slope come back later.

Along p + a d the search looks for a step a > 0 that satisfies the strong Wolfe conditions (Nocedal & Wright 2006,
algorithms 3.5 and 3.6, with their cubic interpolation (3.59) and safeguards):

    loss(a) <= loss(0) + C1 a slope(0)        it falls enough
    |slope(a)| <= C2 |slope(0)|               it is flat enough

Whoever searches keeps a Search between the trials, which is twelve numbers: `to_array` and `from_array`.

    search = begin(loss, slope, 1.0)
    while not search.over:
        search = advance(search, *evaluate(search.step), narrow)

A trial whose loss is not a number, or is enormous, is one that does not fall: the search shrinks towards the last
point that did. After MOST_TRIALS, or once the interval is no wider than `narrow`, the best point that fell enough is
taken; where it was not the last one tried it is handed out once more, since its gradient is wanted. If there is none
the search has FAILED.
"""

import math
from typing import NamedTuple

from core.layout import Array

C1 = 1e-4
C2 = 0.9
MOST_TRIALS = 25
# How far beyond the last trial the next one may be while the loss still falls steeply, in units of the stretch
# between the last two.
NEAREST, FARTHEST = 1.0, 9.0
# An interpolated trial keeps this share of the interval's width away from its ends.
MARGIN = 0.1
# From this trial on every second one halves the interval, however the interpolation would like to creep.
PATIENCE = 6

IDLE, BRACKETING, ZOOMING, RETURNING, ACCEPTED, FAILED = (float(phase) for phase in range(6))


class Trial(NamedTuple):
    """A point along the line: the step to it, its loss, and the derivative of the loss along the line."""

    step: float = 0.0
    loss: float = 0.0
    slope: float = 0.0


class Search(NamedTuple):
    """Where a search stands. `step` is the trial that is handed out.

    While bracketing, `low` is the trial before. While zooming, `low` is the best trial that fell enough (or the
    start), and `high` the other end of the interval that holds an acceptable one.
    """

    phase: float = IDLE
    trials: float = 0.0
    step: float = 0.0
    start: Trial = Trial()
    low: Trial = Trial()
    high: Trial = Trial()

    @property
    def over(self) -> bool:
        return self.phase in (IDLE, ACCEPTED, FAILED)


SIZE = 3 + 3 * len(Trial())


def to_array(search: Search, array: Array) -> None:
    """Writes the search into `array`, float64 (SIZE,)."""
    array[...] = (search.phase, search.trials, search.step, *search.start, *search.low, *search.high)


def from_array(array: Array) -> Search:
    phase, trials, step, *rest = (float(value) for value in array)
    return Search(phase, trials, step, Trial(*rest[:3]), Trial(*rest[3:6]), Trial(*rest[6:9]))


def begin(loss: float, slope: float, step: float) -> Search:
    """A search from a point with this loss and slope < 0, whose first trial is at `step` > 0."""
    start = Trial(0.0, loss, slope)
    return Search(BRACKETING, 0.0, step, start, start, start)


def advance(search: Search, loss: float, slope: float, narrow: float) -> Search:
    """What becomes of the search by the loss and the slope at its trial point."""
    trial = Trial(search.step, loss, slope)
    search = search._replace(trials=search.trials + 1.0)
    if search.phase == RETURNING:
        return search._replace(phase=ACCEPTED if loss <= search.start.loss else FAILED)
    falls = falls_enough(search, trial)
    if falls and abs(slope) <= -C2 * search.start.slope:
        return search._replace(phase=ACCEPTED)
    if search.phase == ZOOMING:
        return _narrowed(_zoomed(search, trial, falls=falls), narrow)
    if not falls:
        return _narrowed(search._replace(phase=ZOOMING, high=trial), narrow)
    if slope >= 0:
        return _narrowed(search._replace(phase=ZOOMING, low=trial, high=search.low), narrow)
    if search.trials >= MOST_TRIALS:
        return search._replace(phase=ACCEPTED)
    return search._replace(low=trial, step=_beyond(search.low, trial))


def falls_enough(search: Search, trial: Trial) -> bool:
    bound = search.start.loss + C1 * trial.step * search.start.slope
    return trial.loss <= bound and trial.loss < search.low.loss and math.isfinite(trial.slope)


def _zoomed(search: Search, trial: Trial, *, falls: bool) -> Search:
    if not falls:
        return search._replace(high=trial)
    turned = trial.slope * (search.high.step - search.low.step) >= 0
    return search._replace(low=trial, high=search.low if turned else search.high)


def _narrowed(search: Search, narrow: float) -> Search:
    """The next trial between `low` and `high`, unless it is time to stop."""
    width = abs(search.high.step - search.low.step)
    if search.trials < MOST_TRIALS and width > narrow:
        halve = search.trials >= PATIENCE and search.trials % 2 == 0
        return search._replace(step=_between(search.low, search.high, halve=halve))
    if search.low.step == 0.0:
        return search._replace(phase=FAILED)
    if search.low.step == search.step:
        return search._replace(phase=ACCEPTED)
    return search._replace(phase=RETURNING, step=search.low.step)


def _beyond(before: Trial, last: Trial) -> float:
    stretch = last.step - before.step
    nearest, farthest = last.step + NEAREST * stretch, last.step + FARTHEST * stretch
    wanted = lowest(before, last)
    # A cubic that falls for ever, or has its minimum behind, says nothing but that it is far.
    return min(max(wanted, nearest), farthest) if wanted > last.step else farthest


def _between(low: Trial, high: Trial, *, halve: bool) -> float:
    width = high.step - low.step
    if halve:
        return low.step + 0.5 * width
    share = (lowest(low, high) - low.step) / width
    if not math.isfinite(share):
        # Nothing is known of the far end but that it is bad.
        share = MARGIN
    return low.step + min(max(share, MARGIN), 1.0 - MARGIN) * width


def lowest(a: Trial, b: Trial) -> float:
    """Where the cubic through both losses and slopes has its minimum; NaN where there is none to be worked out."""
    if a.step == b.step:
        return math.nan
    chord = a.slope + b.slope - 3.0 * (a.loss - b.loss) / (a.step - b.step)
    square = chord * chord - a.slope * b.slope
    if not 0.0 <= square < math.inf:
        return math.nan
    root = math.copysign(math.sqrt(square), b.step - a.step)
    divisor = b.slope - a.slope + 2.0 * root
    if divisor == 0.0:
        return math.nan
    return b.step - (b.step - a.step) * ((b.slope + root - chord) / divisor)
