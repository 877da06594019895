"""Schedules that go one way, from their first value towards their last; and inverse_sqrt, which warms up first."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from core.schedules.schedule import (
    Boundaries,
    Factor,
    Schedule,
    Steps,
    between,
    check_ascending,
    geometric,
    geometric_span,
    half_cosine,
    mix,
)


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
    notes: ClassVar[tuple[str, ...]] = ("torch LinearLR: init and end are lr times start_factor and end_factor.",)

    init: float
    end: float
    steps: Steps

    def at(self, t: int) -> float:
        return mix(self.init, self.end, min((t - 1) / self.steps, 1.0))

    def span(self) -> tuple[float, float]:
        return between(self.init, self.end)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From `init` to `end` in `steps` steps, as a power of the share that is left."""

    kind: ClassVar[str] = "polynomial"
    formula: ClassVar[str] = (
        r"x_t = \text{end} + (\text{init} - \text{end})"
        r"\left(1 - \min\left(\tfrac{t-1}{\text{steps}}, 1\right)\right)^{\text{power}}"
    )
    source: ClassVar[str] = "optax.polynomial_schedule"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"
    notes: ClassVar[tuple[str, ...]] = ("torch PolynomialLR: end 0. Keras PolynomialDecay: end 1e-4, cycle false.",)

    init: float
    end: float
    steps: Steps
    power: Factor = 1.0

    def at(self, t: int) -> float:
        left = 1.0 - min((t - 1) / self.steps, 1.0)
        return mix(self.end, self.init, math.pow(left, self.power))

    def span(self) -> tuple[float, float]:
        return between(self.init, self.end)


@dataclass(frozen=True)
class Exponential(Schedule):
    """Times `rate` every `steps` steps: smoothly, or at once (`staircase`)."""

    kind: ClassVar[str] = "exponential"
    formula: ClassVar[str] = r"x_t = \text{init}\cdot\text{rate}^{(t-1)/\text{steps}}"
    source: ClassVar[str] = "optax.exponential_decay"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html"
    notes: ClassVar[tuple[str, ...]] = ("torch ExponentialLR: steps 1.",)

    init: float
    rate: Factor
    steps: Steps = 1
    staircase: bool = False

    def at(self, t: int) -> float:
        s = t - 1
        return geometric(self.init, self.rate, s // self.steps if self.staircase else s / self.steps)

    def span(self) -> tuple[float, float]:
        return geometric_span(self.init, self.rate)


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
        return between(self.init, 0.0 if self.rate else self.init)


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """Up to `peak` at step `warmup_steps`, and from there down by the inverse square root of the step (Noam).

    `warmup`: "linear" climbs from `peak` / `warmup_steps` at the first step; "constant" stands at `peak` until then.
    """

    kind: ClassVar[str] = "inverse_sqrt"
    formula: ClassVar[str] = (
        r"x_t = \text{peak}\cdot\min\left(\frac{t}{\text{warmup}}, \sqrt{\frac{\text{warmup}}{t}}\right)"
    )
    source: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need"
    url: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper's rate d^(-1/2) min(t^(-1/2), t w^(-3/2)) has peak (d w)^(-1/2).",
        "The paper counts steps from 1, as here. Implementations that count from 0 take their first step at 0.",
        'Adafactor and T5: warmup "constant".',
    )

    peak: float
    warmup_steps: Steps
    warmup: Literal["linear", "constant"] = "linear"

    def at(self, t: int) -> float:
        if t <= self.warmup_steps:
            return self.peak * (t / self.warmup_steps) if self.warmup == "linear" else self.peak
        return self.peak * math.sqrt(self.warmup_steps / t)

    def turns(self) -> tuple[int, ...]:
        return (self.warmup_steps,)

    def span(self) -> tuple[float, float]:
        return between(self.peak, 0.0)


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
        return geometric(self.init, self.factor, (t - 1) // self.steps)

    def span(self) -> tuple[float, float]:
        return geometric_span(self.init, self.factor)


@dataclass(frozen=True)
class MultiStep(Schedule):
    """Times `factor` after each of the `milestones`, which ascend; one that is there twice counts twice."""

    kind: ClassVar[str] = "multi_step"
    formula: ClassVar[str] = r"x_t = \text{init}\cdot\text{factor}^{\#\{m \in \text{milestones}:\ m \le t-1\}}"
    source: ClassVar[str] = "torch.optim.lr_scheduler.MultiStepLR"
    url: ClassVar[str] = "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.MultiStepLR.html"

    init: float
    milestones: Boundaries
    factor: Factor = 0.1

    def check(self) -> None:
        super().check()
        check_ascending("milestones", self.milestones, twice=True)

    def at(self, t: int) -> float:
        return geometric(self.init, self.factor, bisect_right(self.milestones, t - 1))

    def span(self) -> tuple[float, float]:
        return between(self.init, geometric(self.init, self.factor, len(self.milestones)))


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
    notes: ClassVar[tuple[str, ...]] = (
        "torch CosineAnnealingLR climbs again past its end. optax, Keras: alpha is floor / init.",
    )

    init: float
    steps: Steps
    floor: float = 0.0
    exponent: Factor = 1.0

    def at(self, t: int) -> float:
        s = t - 1
        if s >= self.steps:
            return self.floor
        return mix(self.floor, self.init, math.pow(half_cosine(s, self.steps), self.exponent))

    def span(self) -> tuple[float, float]:
        return between(self.init, self.floor)
