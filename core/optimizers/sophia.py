"""Sophia: the diagonal of the Hessian, now and then, as the divisor of a mean of the gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.hyperparameters import Count, Decay, NonNegative, Positive, Rate
from core.layout import Array
from core.optimizers.rule import ElementWise, Formula, State, shrinkage


@dataclass(frozen=True)
class Sophia(ElementWise):
    """Second-order clipped optimization: a mean of the gradients over one of the Hessian's diagonal, at most ±1.

    The client gives an estimate of the diagonal every `interval` steps, the first of them included: Hutchinson's
    z ⊙ H z, or B · ĝ² of Gauss-Newton-Bartlett. `gamma` decides how much is clipped. Where the curvature is not
    positive the update is the sign of m; `eps_form` "added" puts epsilon beside max(gamma h, 0) instead of below it.
    `bias_correction` corrects m.
    """

    kind: ClassVar[str] = "sophia"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad "
        r"h \leftarrow \beta_2 h + (1-\beta_2)\hat h \text{ every } k \text{ steps},\quad "
        r"u = -\eta\,\mathrm{clip}\left(\frac{m}{\max(\gamma h, \varepsilon)},\ \pm 1\right) - \eta\lambda\theta"
    )
    source: ClassVar[str] = "Liu et al. 2023, Sophia: A Scalable Stochastic Second-order Optimizer"
    url: ClassVar[str] = "https://arxiv.org/abs/2305.14342"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper: gamma 0.01 with Hutchinson's estimate, 0.05 with Gauss-Newton-Bartlett's; weight_decay 0.2.",
        "The authors' SophiaG: beta1 0.965, eps 1e-15, eps_form 'added', gamma their rho times the batch size.",
        "optax, Levanter: bias_correction true, and a diagonal that counts from the step after the one it came with.",
        "pytorch_optimizer clips m/h to ±p with lr: gamma p, eps p times theirs and lr p times theirs are the same.",
    )

    lr: Rate = 1e-4
    beta1: Decay = 0.96
    beta2: Decay = 0.99
    gamma: Positive = 0.01
    eps: Positive = 1e-12
    interval: Count = 10
    weight_decay: NonNegative = 0.1
    eps_form: Literal["max", "added"] = "max"
    bias_correction: bool = False
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def needs(self) -> frozenset[str]:
        decay = frozenset({"params"}) if self.weight_decay != 0 else frozenset[str]()
        return decay | {"hessian_diagonal"}

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "h")

    def due(self, t: int) -> bool:
        """Whether step t has to bring the diagonal of the Hessian."""
        return (t - 1) % self.interval == 0

    def observe(self, t: int, diagonal: Array, state: State) -> None:
        h = state["h"]
        h *= h.dtype.type(self.beta2)
        h += h.dtype.type(1.0 - self.beta2) * diagonal

    @property
    def update(self) -> Formula:
        return sophia_decayed if "params" in self.needs else sophia

    def coefficients(self, t: int) -> tuple[float, ...]:
        first = 1.0 - math.pow(self.beta1, t) if self.bias_correction else 1.0
        floor, added = (self.eps, 0.0) if self.eps_form == "max" else (0.0, self.eps)
        shrink = shrinkage(self)
        return self.beta1, 1.0 - self.beta1, 1.0 / first, self.gamma, floor, added, 1.0, self.lr, shrink


def sophia(
    g: Array, m: Array, h: Array,
    beta1: Array, rest1: Array, scale: Array, gamma: Array, floor: Array, added: Array, one: Array, lr: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    ratio = scale * m / (np.maximum(gamma * h, floor) + added)
    return -lr * np.minimum(np.maximum(ratio, -one), one), m, h


def sophia_decayed(
    g: Array, p: Array, m: Array, h: Array,
    beta1: Array, rest1: Array, scale: Array, gamma: Array, floor: Array, added: Array, one: Array, lr: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    ratio = scale * m / (np.maximum(gamma * h, floor) + added)
    return -lr * np.minimum(np.maximum(ratio, -one), one) - shrink * p, m, h
