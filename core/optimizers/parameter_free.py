"""Methods that find their own step size: from the loss, or from how far the parameters have come.

A distance from the start is kept as `moved`, the sum of the updates: so the initial parameters need not be kept, and
parameters that are set anew in the middle do not count as a way that was gone.

`lr` is 1 throughout and multiplies what the method finds; a schedule in it is a shape, such as a decay to 0.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from core.errors import LossRequired
from core.hyperparameters import Decay, NonNegative, Positive, Rate, refuse_schedules
from core.layout import Array
from core.optimizers.rule import Beside, Own, State, Whole, quotient
from core.sums import dot, magnitude

# As large as to be no limit, and a number that JSON has.
UNLIMITED = 1e300


@dataclass(frozen=True)
class PolyakSgd(Whole):
    """Gradient descent with Polyak's step size: how far the loss is above `f_min`, over the squared gradient.

    `max_lr` bounds the step size, `lr` scales it. `variant`: "sps+" takes a loss below `f_min` as one at it, where
    "sps" would go uphill.
    """

    kind: ClassVar[str] = "polyak_sgd"
    formula: ClassVar[str] = (
        r"u = -\eta \min\Bigl(\gamma_{\max},\ \frac{f(\theta) - f_{\min}}{\lVert g\rVert^2 + \varepsilon}\Bigr)\, g"
    )
    source: ClassVar[str] = "Loizou et al. 2021, Stochastic Polyak Step-size for SGD; Garrigos et al. 2023 (sps+)"
    url: ClassVar[str] = "https://arxiv.org/abs/2002.10542"
    notes: ClassVar[tuple[str, ...]] = ("optax: the defaults; it calls lr `scaling`, and max_lr `max_learning_rate`.",)

    lr: Rate = 1.0
    max_lr: Rate = 1.0
    f_min: float = 0.0
    eps: NonNegative = 0.0
    variant: Literal["sps", "sps+"] = "sps"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss"})

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array:
        if beside.loss is None:
            raise LossRequired
        gap = beside.loss - self.f_min
        if self.variant == "sps+":
            gap = max(gap, 0.0)
        square = dot(g, g) + self.eps
        size = min(self.max_lr, gap / square) if square > 0.0 else 0.0
        update: Array = -(beside.lr * size) * g
        return update


@dataclass(frozen=True)
class Dog(Whole):
    """Distance over gradients: the step size is the farthest way come so far over the root of all squared gradients.

    The first distance is reps_rel · (1 + |θ₀|), or `initial_distance` where that is not 0: then no parameters are
    needed. The authors average the parameters (`averaging`), and advise reps_rel 1e-4 with batch normalization.
    """

    kind: ClassVar[str] = "dog"
    formula: ClassVar[str] = (
        r"\bar r_t = \max_{i \le t} \lVert \theta_i - \theta_0\rVert,\quad "
        r"u = -\eta\,\frac{\bar r_t}{\sqrt{\sum_{i \le t} \lVert g_i\rVert^2 + \varepsilon}}\, g"
    )
    source: ClassVar[str] = "Ivgi, Hinder & Carmon 2023, DoG is SGD's Best Friend"
    url: ClassVar[str] = "https://arxiv.org/abs/2302.12022"
    notes: ClassVar[tuple[str, ...]] = ("optax, and the authors' package with granularity 'all': the defaults.",)

    lr: Rate = 1.0
    reps_rel: Positive = 1e-6
    initial_distance: NonNegative = 0.0
    eps: NonNegative = 1e-8

    def check(self) -> None:
        refuse_schedules(self, "reps_rel", "initial_distance")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"}) if self.initial_distance == 0 else frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        return ("moved",)

    def own(self, n: int) -> dict[str, Own]:
        """`farthest`: the largest distance so far; `squares`: the sum of the squared norms of the gradients."""
        return {"farthest": Own((), exact=True, least=0.0), "squares": Own((), exact=True, least=0.0)}

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array:
        farthest, squares, moved = state["farthest"], state["squares"], state["moved"]
        if farthest == 0.0:
            farthest[...] = self.initial_distance or self.reps_rel * (
                1.0 + (0.0 if p is None else math.sqrt(dot(p, p)))
            )
        farthest[...] = max(float(farthest), math.sqrt(dot(moved, moved)))
        squares[...] += dot(g, g)
        root = math.sqrt(squares + self.eps)
        size = float(farthest) / root if root > 0.0 else 0.0
        update: Array = (-(beside.lr * size) * g).astype(g.dtype)
        moved += update
        return update


@dataclass(frozen=True)
class Adapted(Whole):
    """What D-Adaptation and Prodigy have in common: Adam, times an estimate d of the distance to the solution."""

    lr: Rate = 1.0
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    d0: Positive = 1e-6
    growth_rate: Annotated[float, Ge(1)] = UNLIMITED
    use_bias_correction: bool = False
    decay_scaling: Literal["lr", "none"] = "lr"

    def check(self) -> None:
        refuse_schedules(self, "d0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"}) if self.weight_decay != 0 else frozenset()

    def own(self, n: int) -> dict[str, Own]:
        """`d`: the estimate; `numerator`: a running sum that it is made of."""
        return {"d": Own((), self.d0, exact=True, least=0.0), "numerator": Own((), exact=True)}

    def rates(self, t: int, d: float, lr: Array) -> Array:
        """d · lr, with Adam's correction if it is asked for."""
        if not self.use_bias_correction:
            return d * lr
        return d * (math.sqrt(1.0 - math.pow(self.beta2, t)) / (1.0 - math.pow(self.beta1, t))) * lr

    def decayed(self, update: Array, rates: Array, p: Array | None) -> Array:
        """The update with the decoupled weight decay."""
        if p is None or self.weight_decay == 0:
            return update
        scaled = rates if self.decay_scaling == "lr" else 1.0
        shrunk: Array = update - scaled * self.weight_decay * p
        return shrunk


@dataclass(frozen=True)
class DAdaptAdam(Adapted):
    """Adam by D-Adaptation: its rate is a lower bound on the distance to the solution, which only grows.

    `d0` is the first bound. `growth_rate` bounds how much it may grow in a step (1.02 acts as a warm-up).
    `use_bias_correction` has Adam's correction in the rate. The weight decay is decoupled.
    """

    kind: ClassVar[str] = "dadapt_adam"
    formula: ClassVar[str] = (
        r"\lambda = d\,\eta,\quad "
        r"r \leftarrow \sqrt{\beta_2}\, r + (1-\sqrt{\beta_2})\lambda \langle g, s\rangle_{v_{t-1}^{-1/2}},\quad "
        r"m \leftarrow \beta_1 m + (1-\beta_1)\lambda g,\quad "
        r"v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad u = -\frac{m}{\sqrt v + \varepsilon};\qquad "
        r"s \leftarrow \sqrt{\beta_2}\, s + (1-\sqrt{\beta_2})\lambda g,\quad "
        r"d \leftarrow \max\Bigl(d, \frac{r}{(1-\sqrt{\beta_2})\lVert s\rVert_1}\Bigr)"
    )
    source: ClassVar[str] = "Defazio & Mishchenko 2023, Learning-Rate-Free Learning by D-Adaptation"
    url: ClassVar[str] = "https://arxiv.org/abs/2301.07733"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' package, pytorch_optimizer: the defaults; their decay is coupled unless asked otherwise.",
        "optax: use_bias_correction true.",
    )

    @property
    def slots(self) -> tuple[str, ...]:
        return "m", "v", "s"

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array:
        m, v, s = state["m"], state["v"], state["s"]
        root, rates = math.sqrt(self.beta2), self.rates(t, float(state["d"]), beside.lr)
        exact = g.astype(np.float64)
        scaled = rates * exact
        gained = dot(scaled, quotient(s, np.sqrt(v.astype(np.float64)) + self.eps))
        m[...] = self.beta1 * m + (1.0 - self.beta1) * scaled
        v[...] = self.beta2 * v + (1.0 - self.beta2) * (exact * exact)
        s[...] = root * s + (1.0 - root) * scaled
        state["numerator"][...] = root * state["numerator"] + (1.0 - root) * gained
        self._estimate(float(state["numerator"]), (1.0 - root) * magnitude(s), state["d"], beside.lr)
        return self.decayed(-quotient(m, np.sqrt(v.astype(np.float64)) + self.eps), rates, p)

    def _estimate(self, numerator: float, divisor: float, d: Array, lr: Array) -> None:
        if divisor > 0.0 and np.any(lr > 0.0):
            d[...] = max(float(d), min(numerator / divisor, float(d) * self.growth_rate))


@dataclass(frozen=True)
class Prodigy(Adapted):
    """D-Adaptation's Adam that weighs its evidence by the estimate, and so adapts faster.

    `beta3` is the memory of the estimate, 0 standing for the root of beta2. `d_coef` multiplies the estimate.
    `safeguard_warmup` leaves the rate out of its divisor, for warm-ups. The other options are D-Adaptation's.
    """

    kind: ClassVar[str] = "prodigy"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) d g,\quad v \leftarrow \beta_2 v + (1-\beta_2) d^2 g^2,\quad "
        r"r \leftarrow \beta_3 r + \tfrac{d}{d_0} d\,\eta \langle g, \theta_0 - \theta\rangle,\quad "
        r"s \leftarrow \beta_3 s + \tfrac{d}{d_0} d\,\eta\, g,\quad "
        r"d' = \max\Bigl(d, \frac{c\, r}{\lVert s\rVert_1}\Bigr),\quad u = -d\,\eta\,\frac{m}{\sqrt v + d' \varepsilon}"
    )
    source: ClassVar[str] = "Mishchenko & Defazio 2023, Prodigy: An Expeditiously Adaptive Parameter-Free Learner"
    url: ClassVar[str] = "https://arxiv.org/abs/2306.06101"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' package, pytorch_optimizer: the defaults. optax: use_bias_correction true.",
    )

    beta3: Decay = 0.0
    d_coef: Positive = 1.0
    safeguard_warmup: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        return "m", "v", "s", "moved"

    def own(self, n: int) -> dict[str, Own]:
        """As D-Adaptation's; `largest` is the largest estimate so far, which d reaches as growth_rate allows."""
        return super().own(n) | {"largest": Own((), self.d0, exact=True, least=0.0)}

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array:
        m, v, s, moved = state["m"], state["v"], state["s"], state["moved"]
        d, memory = float(state["d"]), self.beta3 or math.sqrt(self.beta2)
        rates, exact = self.rates(t, d, beside.lr), g.astype(np.float64)
        weight, scaled = d / self.d0, d * exact
        m[...] = self.beta1 * m + (1.0 - self.beta1) * scaled
        v[...] = self.beta2 * v + (1.0 - self.beta2) * (scaled * scaled)
        s[...] = memory * s + weight * (d if self.safeguard_warmup else rates) * exact
        state["numerator"][...] = memory * state["numerator"] - weight * dot(rates * exact, moved)
        self._estimate(float(state["numerator"]), magnitude(s), state, beside.lr)
        shape = quotient(m, np.sqrt(v.astype(np.float64)) + float(state["d"]) * self.eps)
        update = self.decayed(-rates * shape, rates, p).astype(g.dtype)
        moved += update
        return update

    def _estimate(self, numerator: float, divisor: float, state: State, lr: Array) -> None:
        d, largest = state["d"], state["largest"]
        if not (divisor > 0.0 and np.any(lr > 0.0)):
            return
        found = self.d_coef * numerator / divisor
        if d == self.d0:
            d[...] = max(float(d), found)
        largest[...] = max(float(largest), found)
        d[...] = min(float(largest), float(d) * self.growth_rate)
