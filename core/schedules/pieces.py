"""Schedules given point by point."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

from core.errors import InvalidRecipe
from core.schedules.schedule import Boundaries, Numbers, Points, Schedule, between, check_ascending, mix


@dataclass(frozen=True)
class PiecewiseConstant(Schedule):
    """The first of `values` for as many steps as the first of `boundaries` says, and so on; the last one stays.

    There is one value more than there are boundaries, which ascend and are numbers of steps from the start.
    """

    kind: ClassVar[str] = "piecewise_constant"
    formula: ClassVar[str] = r"x_t = \text{values}_{i},\quad i = \#\{b \in \text{boundaries}:\ b \le t-1\}"
    source: ClassVar[str] = "optax.piecewise_constant_schedule"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"
    notes: ClassVar[tuple[str, ...]] = (
        "optax is given scales, whose products are the values here.",
        "Keras PiecewiseConstantDecay changes one step later: its boundaries are the last step of a value.",
    )

    values: Numbers
    boundaries: Boundaries

    def check(self) -> None:
        super().check()
        check_ascending("boundaries", self.boundaries)
        if len(self.boundaries) != len(self.values) - 1:
            raise InvalidRecipe(
                "/boundaries",
                f"there must be one fewer than values: {len(self.values) - 1}, not {len(self.boundaries)}",
            )

    def at(self, t: int) -> float:
        return self.values[bisect_right(self.boundaries, t - 1)]

    def turns(self) -> tuple[int, ...]:
        return tuple(boundary + 1 for boundary in self.boundaries)

    def span(self) -> tuple[float, float]:
        return between(*self.values)


@dataclass(frozen=True)
class PiecewiseLinear(Schedule):
    """Straight lines through the points (`steps`, `values`); level before the first and after the last.

    `steps` ascend and are numbers of steps from the start: 0 is where the first step is taken.
    """

    kind: ClassVar[str] = "piecewise_linear"
    formula: ClassVar[str] = (
        r"x_t = v_i + (v_{i+1} - v_i)\,\frac{t - 1 - s_i}{s_{i+1} - s_i},\quad s_i \le t-1 < s_{i+1}"
    )
    source: ClassVar[str] = "optax.piecewise_interpolate_schedule"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"
    notes: ClassVar[tuple[str, ...]] = (
        "optax is given scales, whose products are the values here.",
        "optax.linear_onecycle_schedule is this with four points.",
    )

    steps: Points
    values: Numbers

    def check(self) -> None:
        super().check()
        check_ascending("steps", self.steps)
        if len(self.steps) != len(self.values):
            raise InvalidRecipe("/steps", f"there must be as many as values: {len(self.values)}, not {len(self.steps)}")

    def at(self, t: int) -> float:
        s = t - 1
        i = bisect_right(self.steps, s)
        if i == 0:
            return self.values[0]
        if i == len(self.steps):
            return self.values[-1]
        before, after = self.steps[i - 1 : i + 1]
        return mix(self.values[i - 1], self.values[i], (s - before) / (after - before))

    def turns(self) -> tuple[int, ...]:
        return tuple(step + 1 for step in self.steps)

    def span(self) -> tuple[float, float]:
        return between(*self.values)
