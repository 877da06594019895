"""Hyperparameters as closed-form functions of the step.

The first step, t = 1, is taken at `init`: s = t - 1 updates lie behind it. Past its end a schedule holds
its last value. There is no state, so a restored or forked session is exactly where it was.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from core.kind import Kind

Steps = Annotated[int, Ge(1)]
Factor = Annotated[float, Gt(0)]

KINDS: dict[str, type["Schedule"]] = {}


class Schedule(Kind, registry=KINDS):
    """A function of the step t = 1, 2, …, and the closed interval that its values stay in."""

    def at(self, t: int) -> float:
        """The value that step t, counted from 1, is taken with."""
        raise NotImplementedError

    def span(self) -> tuple[float, float]:
        """The least and the greatest value over all steps; infinite where it grows without end."""
        raise NotImplementedError


def _geometric(init: float, factor: float, exponent: float) -> float:
    """init · factor ** exponent, infinite where a float would overflow."""
    try:
        return init * float(factor**exponent)
    except OverflowError:
        return math.copysign(math.inf, init) if init else init


def _between(a: float, value: float, b: float) -> float:
    """`value`, which rounding may have put outside of a and b: a bound such as beta < 1 is then broken."""
    return min(max(value, min(a, b)), max(a, b))


def _geometric_span(init: float, factor: float) -> tuple[float, float]:
    """The least and the greatest of init · factor^k over k = 0, 1, …"""
    far = init
    if factor < 1:
        far = 0.0
    elif factor > 1 and init:
        far = math.copysign(math.inf, init)
    return min(init, far), max(init, far)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step."""

    kind: ClassVar[str] = "constant"
    formula: ClassVar[str] = r"x_t = \text{value}"
    source: ClassVar[str] = "optax.constant_schedule"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"

    value: float

    def at(self, t: int) -> float:  # noqa: ARG002 - a schedule is a function of the step, this one too
        return self.value

    def span(self) -> tuple[float, float]:
        return self.value, self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From `init` to `end` in `steps` equal parts."""

    kind: ClassVar[str] = "linear"
    formula: ClassVar[str] = (
        r"x_t = \text{init} + (\text{end} - \text{init})\,\min\left(\tfrac{t-1}{\text{steps}}, 1\right)"
    )
    source: ClassVar[str] = "optax.linear_schedule"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"

    init: float
    end: float
    steps: Steps

    def at(self, t: int) -> float:
        share = min((t - 1) / self.steps, 1.0)
        value = self.init + (self.end - self.init) * share
        return self.end if share == 1.0 else _between(self.init, value, self.end)

    def span(self) -> tuple[float, float]:
        return min(self.init, self.end), max(self.init, self.end)


@dataclass(frozen=True)
class Exponential(Schedule):
    """Times `rate` every `steps` steps: smoothly, or at once (`staircase`)."""

    kind: ClassVar[str] = "exponential"
    formula: ClassVar[str] = r"x_t = \text{init}\cdot\text{rate}^{(t-1)/\text{steps}}"
    source: ClassVar[str] = "optax.exponential_decay"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"

    init: float
    rate: Factor
    steps: Steps = 1
    staircase: bool = False

    def at(self, t: int) -> float:
        s = t - 1
        return _geometric(self.init, self.rate, s // self.steps if self.staircase else s / self.steps)

    def span(self) -> tuple[float, float]:
        return _geometric_span(self.init, self.rate)


@dataclass(frozen=True)
class InverseTime(Schedule):
    """Annealing by 1/t: divided by 1 + `rate` for every `steps` steps, or by whole ones (`staircase`)."""

    kind: ClassVar[str] = "inverse_time"
    formula: ClassVar[str] = r"x_t = \frac{\text{init}}{1 + \text{rate}\,(t-1)/\text{steps}}"
    source: ClassVar[str] = "Robbins & Monro 1951, A Stochastic Approximation Method"
    url: ClassVar[str] = "https://doi.org/10.1214/aoms/1177729586"

    init: float
    rate: Annotated[float, Ge(0)]
    steps: Steps = 1
    staircase: bool = False

    def at(self, t: int) -> float:
        s = t - 1
        return self.init / (1.0 + self.rate * (s // self.steps if self.staircase else s / self.steps))

    def span(self) -> tuple[float, float]:
        far = 0.0 if self.rate else self.init
        return min(self.init, far), max(self.init, far)


@dataclass(frozen=True)
class Step(Schedule):
    """Times `factor` after every `steps` steps."""

    kind: ClassVar[str] = "step"
    formula: ClassVar[str] = r"x_t = \text{init}\cdot\text{factor}^{\lfloor (t-1)/\text{steps}\rfloor}"
    source: ClassVar[str] = "torch.optim.lr_scheduler.StepLR"
    url: ClassVar[str] = "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.StepLR.html"

    init: float
    steps: Steps
    factor: Factor = 0.1

    def at(self, t: int) -> float:
        return _geometric(self.init, self.factor, (t - 1) // self.steps)

    def span(self) -> tuple[float, float]:
        return _geometric_span(self.init, self.factor)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `init` down to `floor` along half a cosine; there it stays."""

    kind: ClassVar[str] = "cosine"
    formula: ClassVar[str] = (
        r"x_t = \text{floor} + (\text{init} - \text{floor})"
        r"\left(\tfrac12 + \tfrac12\cos\frac{\pi \min(t-1, \text{steps})}{\text{steps}}\right)"
        r"^{\text{exponent}}"
    )
    source: ClassVar[str] = "Loshchilov & Hutter 2016, SGDR"
    url: ClassVar[str] = "https://arxiv.org/abs/1608.03983"

    init: float
    steps: Steps
    floor: float = 0.0
    exponent: Factor = 1.0

    def at(self, t: int) -> float:
        s = t - 1
        if s >= self.steps:
            return self.floor
        half = 0.5 + 0.5 * math.cos(math.pi * s / self.steps)
        value = self.floor + (self.init - self.floor) * math.pow(half, self.exponent)
        return _between(self.init, value, self.floor)

    def span(self) -> tuple[float, float]:
        return min(self.init, self.floor), max(self.init, self.floor)
