"""Schedules that go up and down: warm restarts, cycles, and a single one."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from core.errors import InvalidRecipe
from core.schedules.schedule import Factor, Schedule, Share, Steps, between, half_cosine, mix


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """From `init` down towards `floor` along half a cosine, again and again (SGDR).

    The first descent takes `steps` steps, each next one `mult` times as many; `factor` makes each next one smaller.
    """

    kind: ClassVar[str] = "cosine_restarts"
    formula: ClassVar[str] = (
        r"x_t = \text{floor} + (\text{init} - \text{floor})\,\text{factor}^{i}"
        r"\left(\tfrac12 + \tfrac12\cos\frac{\pi\,T_{\text{cur}}}{\text{steps}\cdot\text{mult}^{i}}\right),\quad "
        r"T_{\text{cur}} = t - 1 - \sum_{j<i} \text{steps}\cdot\text{mult}^{j}"
    )
    source: ClassVar[str] = "Loshchilov & Hutter 2016, SGDR"
    url: ClassVar[str] = "https://arxiv.org/abs/1608.03983"
    notes: ClassVar[tuple[str, ...]] = (
        "torch CosineAnnealingWarmRestarts: the defaults; steps, mult, floor are T_0, T_mult, eta_min.",
        "Keras CosineDecayRestarts: t_mul is mult (2 unless said), m_mul is factor, alpha is floor / init.",
    )

    init: float
    steps: Steps
    mult: Steps = 1
    floor: float = 0.0
    factor: Share = 1.0

    def at(self, t: int) -> float:
        restarts, since, steps = 0, t - 1, self.steps
        if self.mult == 1:
            restarts, since = divmod(since, steps)
        while since >= steps:
            restarts, since, steps = restarts + 1, since - steps, steps * self.mult
        return mix(self.floor, self.init, half_cosine(since, steps) * self.factor**restarts)

    def reach(self, count: int) -> tuple[float, float]:
        return super().reach(min(count, self.steps)) if count <= self.steps or self._same_again else self.span()

    @property
    def _same_again(self) -> bool:
        return self.mult == 1 and self.factor == 1.0

    def span(self) -> tuple[float, float]:
        # Where all descents are alike none of them gets to the floor.
        return between(self.init, self.at(self.steps) if self._same_again else self.floor)


@dataclass(frozen=True)
class Cyclic(Schedule):
    """From `init` to `peak` in `steps_up` steps, back in `steps_down` (as many unless said), again and again.

    `mode`: "triangular" repeats the same; "triangular2" halves the height after each cycle; "exp_range" has it
    times `gamma` at every step.
    """

    kind: ClassVar[str] = "cyclic"
    formula: ClassVar[str] = (
        r"x_t = \text{init} + (\text{peak} - \text{init})\,h\,"
        r"\min\left(\tfrac{r}{\text{up}}, \tfrac{\text{up} + \text{down} - r}{\text{down}}\right),\quad "
        r"t - 1 = c\,(\text{up} + \text{down}) + r,\quad h = 1,\ 2^{-c}\text{ or }\gamma^{t-1}"
    )
    source: ClassVar[str] = "Smith 2015, Cyclical Learning Rates for Training Neural Networks"
    url: ClassVar[str] = "https://arxiv.org/abs/1506.01186"
    notes: ClassVar[tuple[str, ...]] = (
        "torch CyclicLR also cycles the momentum, the other way round: give `momentum` a cyclic schedule from its "
        "greatest value (init) to its least (peak).",
    )

    init: float
    peak: float
    steps_up: Steps = 2000
    steps_down: Steps | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Share = 1.0

    def check(self) -> None:
        super().check()
        if self.gamma != 1.0 and self.mode != "exp_range":
            raise InvalidRecipe("/gamma", f"only the mode exp_range has it, not {self.mode}")

    def at(self, t: int) -> float:
        s, up = t - 1, self.steps_up
        down = up if self.steps_down is None else self.steps_down
        cycle, r = divmod(s, up + down)
        height = 1.0
        if self.mode == "triangular2":
            height = math.pow(0.5, cycle)
        elif self.mode == "exp_range":
            height = math.pow(self.gamma, s)
        return mix(self.init, self.peak, height * (r / up if r <= up else (up + down - r) / down))

    def reach(self, count: int) -> tuple[float, float]:
        one_way = count <= self.steps_up + 1 and self.gamma == 1.0
        return super().reach(count) if one_way else self.span()

    def span(self) -> tuple[float, float]:
        return between(self.init, self.peak)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """One cycle over `steps` steps: from `peak` / `div_factor` up to `peak`, then down far below (super-convergence).

    The way up takes the share `pct_start` of the steps. Then it goes down to the first value over `final_div_factor`
    in one phase; or (`three_phase`) to the first value in as many steps as it went up, and on in a third phase.
    `anneal`: "cos" or "linear".
    """

    kind: ClassVar[str] = "one_cycle"
    formula: ClassVar[str] = (
        r"x_t = a + (b - a)\,f\left(\frac{t - 1 - s_a}{s_b - s_a}\right),\quad "
        r"f(z) = \tfrac12 - \tfrac12\cos \pi z \text{ or } z;\qquad "
        r"s = 0,\ \text{pct}\cdot\text{steps} - 1,\ [2\,\text{pct}\cdot\text{steps} - 2,]\ \text{steps} - 1"
    )
    source: ClassVar[str] = "Smith & Topin 2017, Super-Convergence"
    url: ClassVar[str] = "https://arxiv.org/abs/1708.07120"
    notes: ClassVar[tuple[str, ...]] = (
        "torch OneCycleLR: the defaults. It goes on beyond its last value for one step, and raises after that.",
        "torch also cycles the momentum, the other way round: give `momentum` a schedule of its own.",
        "optax's ends a step later and has whole steps between the phases: that is piecewise_linear (linear), or a "
        "sequence of two cosines (cosine). Its final_div_factor divides the peak in the cosine form.",
    )

    peak: float
    steps: Steps
    pct_start: Annotated[float, Ge(0), Le(1)] = 0.3
    anneal: Literal["cos", "linear"] = "cos"
    div_factor: Factor = 25.0
    final_div_factor: Factor = 1e4
    three_phase: bool = False

    def check(self) -> None:
        super().check()
        if self.three_phase and self.pct_start > 0.5:
            raise InvalidRecipe("/pct_start", "with three phases the way up takes at most half of the steps")
        if not math.isfinite(self.peak / self.div_factor):
            raise InvalidRecipe("/div_factor", "the first value, peak / div_factor, is not a finite number")
        if not math.isfinite(self.peak / self.div_factor / self.final_div_factor):
            raise InvalidRecipe("/final_div_factor", "the last value is not a finite number")

    def _corners(self) -> list[tuple[float, float]]:
        """Where the phases begin and end, and the values there; the steps need not be whole."""
        first, top = self.peak / self.div_factor, self.pct_start * self.steps - 1
        corners = [(0.0, first), (top, self.peak)]
        if self.three_phase:
            corners.append((2 * self.pct_start * self.steps - 2, first))
        return [*corners, (float(self.steps - 1), first / self.final_div_factor)]

    def at(self, t: int) -> float:
        s = min(t, self.steps) - 1
        corners = self._corners()
        for (begin, a), (end, b) in pairwise(corners):
            if s <= end:
                share = (s - begin) / (end - begin) if end > begin else 1.0
                return mix(a, b, share) if self.anneal == "linear" else mix(b, a, half_cosine(share, 1.0))
        return corners[-1][1]

    def turns(self) -> tuple[int, ...]:
        found = [step for end, _ in self._corners() for step in (math.floor(end) + 1, math.ceil(end) + 1)]
        return tuple(step for step in found if step >= 1)

    def span(self) -> tuple[float, float]:
        return between(*[value for _, value in self._corners()])
