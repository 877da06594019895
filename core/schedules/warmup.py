"""From a first value up to the peak in a straight line, and down again: the schedules of large models."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from core.errors import InvalidRecipe
from core.schedules.schedule import Factor, Schedule, Steps, StepsOrNone, between, half_cosine, mix


@dataclass(frozen=True)
class _Warmup(Schedule):
    peak: float
    warmup_steps: StepsOrNone
    steps: Steps
    init: float = 0.0
    end: float = 0.0

    def check(self) -> None:
        super().check()
        if self.steps <= self.warmup_steps:
            raise InvalidRecipe(
                "/steps", f"they count the warm-up too, which takes {self.warmup_steps}: there must be more"
            )

    def at(self, t: int) -> float:
        s = t - 1
        if s < self.warmup_steps:
            return mix(self.init, self.peak, s / self.warmup_steps)
        if s >= self.steps:
            return self.end
        return mix(self.end, self.peak, self._left(s))

    def _left(self, s: int) -> float:
        """What share of the way from `end` to `peak` is left after s updates, the warm-up being over."""
        raise NotImplementedError

    def turns(self) -> tuple[int, ...]:
        return (self.warmup_steps + 1,)

    def span(self) -> tuple[float, float]:
        return between(self.peak, self.end, self.init if self.warmup_steps else self.peak)


@dataclass(frozen=True)
class WarmupCosine(_Warmup):
    """From `init` to `peak` in a straight line in `warmup_steps` steps, then down to `end` along half a cosine.

    `steps` is the length of the whole, warm-up included.
    """

    kind: ClassVar[str] = "warmup_cosine"
    formula: ClassVar[str] = (
        r"x_t = \text{init} + (\text{peak} - \text{init})\,\tfrac{t-1}{\text{warmup}};\quad\text{then}\quad "
        r"x_t = \text{end} + (\text{peak} - \text{end})"
        r"\left(\tfrac12 + \tfrac12\cos\frac{\pi\,(t-1-\text{warmup})}{\text{steps} - \text{warmup}}\right)"
        r"^{\text{exponent}}"
    )
    source: ClassVar[str] = "Goyal et al. 2017 (warm-up); Loshchilov & Hutter 2016 (cosine)"
    url: ClassVar[str] = "https://arxiv.org/abs/1706.02677"
    notes: ClassVar[tuple[str, ...]] = ("optax.warmup_cosine_decay_schedule: its decay_steps are `steps`.",)

    exponent: Factor = 1.0

    def _left(self, s: int) -> float:
        return math.pow(half_cosine(s - self.warmup_steps, self.steps - self.warmup_steps), self.exponent)


@dataclass(frozen=True)
class WarmupLinear(_Warmup):
    """From `init` to `peak` in `warmup_steps` steps, then down to `end`, both in straight lines.

    `steps` is the length of the whole, warm-up included.
    """

    kind: ClassVar[str] = "warmup_linear"
    formula: ClassVar[str] = (
        r"x_t = \text{init} + (\text{peak} - \text{init})\,\tfrac{t-1}{\text{warmup}};\quad\text{then}\quad "
        r"x_t = \text{end} + (\text{peak} - \text{end})\,\frac{\text{steps} - (t-1)}{\text{steps} - \text{warmup}}"
    )
    source: ClassVar[str] = "Devlin et al. 2018, BERT"
    url: ClassVar[str] = "https://arxiv.org/abs/1810.04805"

    def _left(self, s: int) -> float:
        return (self.steps - s) / (self.steps - self.warmup_steps)


@dataclass(frozen=True)
class WarmupStableDecay(_Warmup):
    """From `init` to `peak` in `warmup_steps` steps, level, and down to `end` in the last `decay_steps` (WSD).

    `steps` is the length of the whole. `decay`: "linear", "cosine", or "sqrt", which is 1 - √ of the share gone by.
    """

    kind: ClassVar[str] = "warmup_stable_decay"
    formula: ClassVar[str] = (
        r"x_t = \text{end} + (\text{peak} - \text{end})\,f(z),\quad "
        r"z = \max\left(0, 1 - \frac{\text{steps} - (t-1)}{\text{decay}}\right),\quad "
        r"f(z) = 1 - z,\ \tfrac12 + \tfrac12\cos \pi z\text{ or }1 - \sqrt z"
    )
    source: ClassVar[str] = "Hu et al. 2024, MiniCPM; Hägele et al. 2024 (1 - sqrt)"
    url: ClassVar[str] = "https://arxiv.org/abs/2404.06395"

    decay_steps: Steps = field(kw_only=True)
    decay: Literal["linear", "cosine", "sqrt"] = "linear"

    def check(self) -> None:
        super().check()
        if self.warmup_steps + self.decay_steps > self.steps:
            raise InvalidRecipe(
                "/decay_steps",
                f"at most {self.steps - self.warmup_steps}: those of the {self.steps} that the warm-up leaves",
            )

    def _left(self, s: int) -> float:
        gone = s - (self.steps - self.decay_steps)
        if gone <= 0:
            return 1.0
        if self.decay == "cosine":
            return half_cosine(gone, self.decay_steps)
        return 1.0 - math.sqrt(gone / self.decay_steps) if self.decay == "sqrt" else (self.steps - s) / self.decay_steps

    def turns(self) -> tuple[int, ...]:
        return self.warmup_steps + 1, self.steps - self.decay_steps + 1
