"""What a schedule is: a function of the step, the interval that its values stay in, and how far it goes one way.

The first step, t = 1, is taken at the first value: s = t - 1 updates lie behind it. Past its end a schedule holds its
last value. There is no state, so a restored or forked session is exactly where it was; `plateau` is the one exception.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le, Len

from core.bounds import check_fields
from core.errors import InvalidRecipe
from core.kind import Kind

# A step beyond it cannot be told from its neighbour in a float, nor be read by every JSON reader.
LAST_STEP = 2**53 - 1
MOST_POINTS = 10_000

Steps = Annotated[int, Ge(1), Le(LAST_STEP)]
StepsOrNone = Annotated[int, Ge(0), Le(LAST_STEP)]
Factor = Annotated[float, Gt(0)]
Share = Annotated[float, Gt(0), Le(1)]
Boundaries = Annotated[tuple[Steps, ...], Len(0, MOST_POINTS)]
Points = Annotated[tuple[StepsOrNone, ...], Len(1, MOST_POINTS)]
Numbers = Annotated[tuple[float, ...], Len(1, MOST_POINTS)]

KINDS: dict[str, type["Schedule"]] = {}


class Schedule(Kind, registry=KINDS):
    """A function of the step t = 1, 2, …, and the closed interval that its values stay in."""

    width: ClassVar[int] = 0  # how many float64 numbers it remembers

    def at(self, t: int) -> float:
        """The value that step t, counted from 1, is taken with."""
        raise NotImplementedError

    def span(self) -> tuple[float, float]:
        """The least and the greatest value over all steps; infinite where it grows without end."""
        raise NotImplementedError

    def turns(self) -> Iterable[int]:
        """The steps at which it may turn round or jump; between two of them its values go one way."""
        return ()

    def reach(self, count: int) -> tuple[float, float]:
        """The least and the greatest value over the steps 1 to `count` alone."""
        seen = [self.at(t) for t in (1, count, *(turn for turn in self.turns() if turn < count))]
        return min(seen), max(seen)

    def check(self) -> None:
        """Raises InvalidRecipe for numbers out of their bounds, options that exclude each other, and wrong parts."""
        check_fields(self)


def mix(a: float, b: float, share: float) -> float:
    """From a (share 0) to b (share 1): exactly a and b there, and never outside of the two.

    Rounding may put the sum outside; a bound such as beta < 1 would then be broken.
    """
    if share in (0.0, 1.0):
        return b if share else a
    far = b - a
    value = a + far * share if math.isfinite(far) else a * (1.0 - share) + b * share
    return min(max(value, min(a, b)), max(a, b))


def half_cosine(s: float, steps: float) -> float:
    """1 at s = 0, 0 at s = steps, along half a cosine."""
    return 0.5 + 0.5 * math.cos(math.pi * s / steps)


def geometric(init: float, factor: float, exponent: float) -> float:
    """init · factor ** exponent, infinite where a float would overflow."""
    try:
        return init * float(factor**exponent)
    except OverflowError:
        return math.copysign(math.inf, init) if init else init


def geometric_span(init: float, factor: float) -> tuple[float, float]:
    """The least and the greatest of init · factor^k over k = 0, 1, …"""
    far = init
    if factor < 1:
        far = 0.0
    elif factor > 1 and init:
        far = math.copysign(math.inf, init)
    return between(init, far)


def between(*values: float) -> tuple[float, float]:
    """The least and the greatest of some values."""
    return min(values), max(values)


def check_ascending(name: str, steps: tuple[int, ...], *, twice: bool = False) -> None:
    """Raises InvalidRecipe unless each of `steps` is beyond the one before it, or (`twice`) at least not before it."""
    for earlier, later in pairwise(steps):
        if later < earlier or (later == earlier and not twice):
            how = "ascend" if twice else "ascend, each only once"
            raise InvalidRecipe(f"/{name}", f"they must {how}; {later} stands after {earlier}")
