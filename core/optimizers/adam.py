"""Adam and what follows from it: a mean of the gradients over the root of a mean of their squares."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.layout import Array
from core.optimizers.adaptive import epsilons
from core.optimizers.rule import Decay, ElementWise, Formula, NonNegative, Rate


@dataclass(frozen=True)
class Adam(ElementWise):
    """Adaptive moment estimation.

    `eps_inside` puts epsilon under the root; `bias_correction` false uses m and v as they are.
    """

    kind: ClassVar[str] = "adam"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad"
        r"u = -\eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \varepsilon}"
    )
    source: ClassVar[str] = "Kingma & Ba 2014, Adam: A Method for Stochastic Optimization"
    url: ClassVar[str] = "https://arxiv.org/abs/1412.6980"
    notes: ClassVar[tuple[str, ...]] = (
        "torch, optax: the defaults.",
        "Some pages leave the power t out of the correction, or compute m̂ and v̂ and then use m and v. Neither is Adam.",
    )

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    eps_inside: bool = False
    bias_correction: bool = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def update(self) -> Formula:
        return adam

    def coefficients(self, t: int) -> tuple[float, ...]:
        return moments(self, t)


def moments(method: "Adam | AdamW", t: int) -> tuple[float, ...]:
    """beta1, 1 - beta1, beta2, 1 - beta2, the corrected rate, the correction of v, and both epsilons."""
    beta1, beta2 = method.beta1, method.beta2
    first = 1.0 - math.pow(beta1, t) if method.bias_correction else 1.0
    second = 1.0 - math.pow(beta2, t) if method.bias_correction else 1.0
    eps = epsilons(method.eps, method.eps_inside)
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, method.lr / first, 1.0 / second, *eps


def adam(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -lr * m / (np.sqrt(scale * v + inside) + outside), m, v


@dataclass(frozen=True)
class AdamW(ElementWise):
    """Adam with decoupled weight decay: the parameters shrink beside the step, not through the moments.

    `decay_scaling`: "lr" takes eta · weight_decay as torch does, "none" weight_decay alone.
    """

    kind: ClassVar[str] = "adamw"
    formula: ClassVar[str] = r"u = u_{\text{adam}} - \eta \lambda \theta"
    source: ClassVar[str] = "Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization"
    url: ClassVar[str] = "https://arxiv.org/abs/1711.05101"
    notes: ClassVar[tuple[str, ...]] = ("torch: the defaults. optax: weight_decay 1e-4.",)

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 1e-2
    eps_inside: bool = False
    bias_correction: bool = True
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"})

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def update(self) -> Formula:
        return adamw

    def coefficients(self, t: int) -> tuple[float, ...]:
        shrink = self.weight_decay * (self.lr if self.decay_scaling == "lr" else 1.0)
        return *moments(self, t), shrink


def adamw(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -lr * m / (np.sqrt(scale * v + inside) + outside) - shrink * p, m, v
