"""Methods whose result is an average of their path.

Both keep the average relative to the path, as a difference of two points that is 0 before the first step. So it needs
no copy of the parameters to start from, a tensor that has not moved yet has its parameters for an average, and new
parameters from outside move both points.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from core.errors import InvalidRecipe
from core.hyperparameters import Decay, NonNegative, Rate
from core.layout import Array
from core.optimizers.adam import AdamW, corrected_epsilons
from core.optimizers.descent import Sgd
from core.optimizers.rule import ElementWise, Formula, Optimizer, Scalars, State


@dataclass(frozen=True)
class Asgd(ElementWise):
    """Averaged stochastic gradient descent: the mean of the parameters since step `t0` is the result.

    `lambd` is an L2 decay and, with `alpha`, what the rate falls by. The slot d is the average minus the parameters;
    up to `t0` the average is the parameters. It is handed out as `at=final`.
    """

    kind: ClassVar[str] = "asgd"
    formula: ClassVar[str] = (
        r"\eta_t = \frac{\eta}{(1 + \lambda\eta (t-1))^{\alpha}},\quad u = -\eta_t (g + \lambda\theta),\quad "
        r"\bar\theta \leftarrow \bar\theta + \mu_t(\theta - \bar\theta),\quad \mu_t = \frac{1}{\max(1, t - 1 - t_0)}"
    )
    source: ClassVar[str] = "Polyak & Juditsky 1992, Acceleration of Stochastic Approximation by Averaging"
    url: ClassVar[str] = "https://doi.org/10.1137/0330046"
    notes: ClassVar[tuple[str, ...]] = ("torch: the defaults; its ax is θ + d. It keeps its rate in float32.",)
    compact: ClassVar[bool] = False  # a position

    lr: Rate = 1e-2
    lambd: NonNegative = 1e-4
    alpha: NonNegative = 0.75
    t0: NonNegative = 1e6

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"})

    @property
    def slots(self) -> tuple[str, ...]:
        return ("d",)

    @property
    def update(self) -> Formula:
        return averaged

    def rate(self, t: int) -> float:
        return self.lr / power(1.0 + self.lambd * self.lr * (t - 1), self.alpha)

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.rate(t), self.lambd, 1.0 - 1.0 / max(1.0, t - 1 - self.t0)

    @property
    def has_final(self) -> bool:
        return True

    def final(self, t: int, p: Array, state: State) -> Array:
        average: Array = p + state["d"]
        return average


def averaged(g: Array, p: Array, d: Array, lr: Array, lambd: Array, keep: Array) -> tuple[Array, ...]:
    u = -lr * (g + lambd * p)
    return u, keep * (d - u)


ADAMW = AdamW()


@dataclass(frozen=True)
class ScheduleFree(ElementWise):
    """Averages and interpolates in place of a schedule and a momentum, around a `base` of sgd or adamw.

    The parameters are the average x, and what to use as the result. The next gradient is to be taken at
    y = (1 - beta) z + beta x, which `at=next` hands out; z is where the base goes. The slot d is z - x. A step counts
    in the average by t^r · (its greatest rate so far)^weight_lr_power; for a warm-up make the base's lr a schedule.
    `beta` takes the place of the base's beta1, which is not used. Weights decay at y: by the base's `weight_decay` for
    adamw, by `weight_decay` here for sgd.
    """

    kind: ClassVar[str] = "schedule_free"
    formula: ClassVar[str] = (
        r"y = (1-\beta) z + \beta x,\quad z \leftarrow z + u_{\text{base}}(\nabla J(y)),\quad "
        r"x \leftarrow (1-c) x + c z,\quad c = \frac{w_t}{\sum_{i \le t} w_i},\quad "
        r"w_t = t^r \left(\max_{i \le t}\eta_i\right)^p"
    )
    source: ClassVar[str] = "Defazio et al. 2024, The Road Less Scheduled"
    url: ClassVar[str] = "https://arxiv.org/abs/2405.15682"
    notes: ClassVar[tuple[str, ...]] = (
        "schedulefree: lr 0.0025 for adamw and 1 for sgd, weight_decay 0. It has y in training and x in evaluation.",
        "optax: without r. Keras: weight_lr_power 0.",
    )
    wraps: ClassVar[tuple[str, ...] | None] = ("sgd", "adamw")
    compact: ClassVar[bool] = False  # a position

    base: Optimizer = ADAMW
    beta: Decay = 0.9
    weight_lr_power: NonNegative = 2.0
    r: NonNegative = 0.0
    weight_decay: NonNegative = 0.0

    def check(self) -> None:
        if not isinstance(self.base, Sgd | AdamW):
            raise InvalidRecipe("/base/kind", f"schedule_free wraps sgd or adamw, not {self.base.kind}")
        if isinstance(self.base, Sgd):
            return
        if self.weight_decay != 0:
            raise InvalidRecipe("/weight_decay", "for adamw it is the base that has it")
        if self.base.beta1 not in (0.0, 0.9, self.beta):
            raise InvalidRecipe("/base/beta1", "there is no first moment: beta of schedule_free takes its place")
        for field in fields(self.base):
            if field.name not in USED and field.default is not MISSING and vars(self.base)[field.name] != field.default:
                raise InvalidRecipe(f"/base/{field.name}", "schedule_free has no use for it: leave it as it is")

    def rate(self, t: int) -> float:
        return self.base.rate(t)

    def changed(self, settings: Mapping[str, Any]) -> Self:
        inner = {name: value for name, value in settings.items() if name in vars(self.base)}
        outer = {name: value for name, value in settings.items() if name not in inner}
        return replace(self, base=self.base.changed(inner), **outer)

    @property
    def decay(self) -> Any:
        """The weight decay, which may be a schedule."""
        return self.base.weight_decay if isinstance(self.base, AdamW) else self.weight_decay

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"}) if self.decay != 0 else frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        return ("d", "v") if isinstance(self.base, AdamW) else ("d",)

    @property
    def scalars(self) -> Scalars:
        return {"weight_sum": 0.0, "lr_max": 0.0}

    @property
    def update(self) -> Formula:
        adaptive, decayed = isinstance(self.base, AdamW), "params" in self.needs
        return FORMS[adaptive, decayed]

    def tracked(self, t: int, scalars: Scalars) -> tuple[float, ...]:
        scalars["lr_max"] = max(scalars["lr_max"], self.base.rate(t))
        weight = power(float(t), self.r) * power(scalars["lr_max"], self.weight_lr_power)
        scalars["weight_sum"] += weight
        share = weight / scalars["weight_sum"] if scalars["weight_sum"] != 0.0 else 0.0
        return share, 1.0 - share, *self._step(t)

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.tracked(t, dict(self.scalars))

    def _step(self, t: int) -> tuple[float, ...]:
        base, lr = self.base, self.base.rate(t)
        if not isinstance(base, AdamW):
            return lr, lr * self.decay, 1.0 - self.beta
        second = 1.0 - math.pow(base.beta2, t) if base.bias_correction else 1.0
        shrink = self.decay * (lr if base.decay_scaling == "lr" else 1.0)
        eps = corrected_epsilons(base.eps, base.eps_inside, base.eps_hat, second)
        return lr, shrink, 1.0 - self.beta, base.beta2, 1.0 - base.beta2, 1.0 / second, *eps

    @property
    def hands_out(self) -> bool:
        return True

    def point(self, t: int, p: Array, state: State) -> Array:
        y: Array = p + (1.0 - self.beta) * state["d"]
        return y


# What schedule_free takes of its base; beta1 is looked at on its own.
USED = {"lr", "beta1", "beta2", "eps", "weight_decay", "eps_inside", "eps_hat", "bias_correction", "decay_scaling"}


# z goes to x + e, and x, a `share` of the way, follows: e is what z - x would be if x stayed.


def free_sgd(
    g: Array, d: Array, share: Array, keep: Array, lr: Array, shrink: Array, ahead: Array
) -> tuple[Array, ...]:  # fmt: skip
    e = d - lr * g
    return share * e, keep * e


def free_sgd_decayed(
    g: Array, p: Array, d: Array, share: Array, keep: Array, lr: Array, shrink: Array, ahead: Array
) -> tuple[Array, ...]:  # fmt: skip
    e = d - lr * g - shrink * (p + ahead * d)
    return share * e, keep * e


def free_adam(
    g: Array, d: Array, v: Array, share: Array, keep: Array, lr: Array, shrink: Array, ahead: Array,
    beta2: Array, rest2: Array, scale: Array, inside: Array, outside: Array,
) -> tuple[Array, ...]:  # fmt: skip
    v = beta2 * v + rest2 * g * g
    e = d - lr * g / (np.sqrt(scale * v + inside) + outside)
    return share * e, keep * e, v


def free_adam_decayed(
    g: Array, p: Array, d: Array, v: Array, share: Array, keep: Array, lr: Array, shrink: Array, ahead: Array,
    beta2: Array, rest2: Array, scale: Array, inside: Array, outside: Array,
) -> tuple[Array, ...]:  # fmt: skip
    v = beta2 * v + rest2 * g * g
    e = d - lr * g / (np.sqrt(scale * v + inside) + outside) - shrink * (p + ahead * d)
    return share * e, keep * e, v


# (whether the base is adamw, whether weights decay) -> the formula
FORMS: dict[tuple[bool, bool], Formula] = {
    (False, False): free_sgd,
    (False, True): free_sgd_decayed,
    (True, False): free_adam,
    (True, True): free_adam_decayed,
}


def power(base: float, exponent: float) -> float:
    """base ** exponent for numbers that are not negative; infinite where a float would overflow."""
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
