"""Steps of the same length in every direction: the sign of the gradient is used, not its size.

The sign of -0.0 is 0.0 in NumPy and -0.0 in the compiled loop. So the steps are taken from a zero, not negated:
0 - (±0) is 0 in both.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Gt, Lt

from core.errors import InvalidRecipe
from core.hyperparameters import Decay, NonNegative, Positive, Rate, refuse_schedules, schedules_of
from core.layout import Array
from core.optimizers.adam import Decoupled
from core.optimizers.rule import ElementWise, Formula


@dataclass(frozen=True)
class SignSgd(ElementWise):
    """A step of length lr against the sign of the gradient; none where it is 0."""

    kind: ClassVar[str] = "signsgd"
    formula: ClassVar[str] = r"u = -\eta\, \operatorname{sign}(g)"
    source: ClassVar[str] = "Bernstein et al. 2018, signSGD: Compressed Optimisation for Non-Convex Problems"
    url: ClassVar[str] = "https://arxiv.org/abs/1802.04434"
    lazy_rows: ClassVar[bool] = True

    lr: Rate = 1e-3

    @property
    def update(self) -> Formula:
        return signsgd

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.lr, 0.0


def signsgd(g: Array, lr: Array, zero: Array) -> tuple[Array]:
    return (zero - lr * np.sign(g),)


@dataclass(frozen=True)
class Signum(ElementWise):
    """The sign of a running mean of the gradients."""

    kind: ClassVar[str] = "signum"
    formula: ClassVar[str] = r"m \leftarrow \beta m + (1-\beta)\, g,\quad u = -\eta\, \operatorname{sign}(m)"
    source: ClassVar[str] = "Bernstein et al. 2018, signSGD: Compressed Optimisation for Non-Convex Problems"
    url: ClassVar[str] = "https://arxiv.org/abs/1802.04434"
    notes: ClassVar[tuple[str, ...]] = (
        "optax, pytorch_optimizer: the same. A sum (dampening 0) has the mean's sign while beta stays the same.",
        "With decoupled weight decay it is lion with beta1 equal to beta2.",
    )

    lr: Rate = 1e-3
    beta: Decay = 0.9

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m",)

    @property
    def update(self) -> Formula:
        return signum

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.beta, 1.0 - self.beta, self.lr, 0.0


def signum(g: Array, m: Array, beta: Array, rest: Array, lr: Array, zero: Array) -> tuple[Array, Array]:
    m = beta * m + rest * g
    return zero - lr * np.sign(m), m


@dataclass(frozen=True)
class Lion(Decoupled):
    """The sign of a mean that leans on the newest gradient, beside a slower mean that is remembered.

    `decay_scaling`: "lr" takes eta · weight_decay, "none" weight_decay alone. `cautious` keeps those elements still
    whose step would go along the gradient, and lengthens the others by as much as that takes away.
    """

    kind: ClassVar[str] = "lion"
    formula: ClassVar[str] = (
        r"u = -\eta\,(\operatorname{sign}(\beta_1 m + (1-\beta_1)\, g) + \lambda\theta),\quad "
        r"m \leftarrow \beta_2 m + (1-\beta_2)\, g"
    )
    source: ClassVar[str] = "Chen et al. 2023, Symbolic Discovery of Optimization Algorithms"
    url: ClassVar[str] = "https://arxiv.org/abs/2302.06675"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' code: the defaults. optax: weight_decay 1e-3. Keras: lr 1e-3.",
        "Wants a rate 3 to 10 times smaller, and a decay as many times larger, than adamw.",
    )

    lr: Rate = 1e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.99

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m",)

    @property
    def update(self) -> Formula:
        return lion_decayed if "params" in self.needs else lion

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.lr, 0.0, self.shrink


def lion(
    g: Array, m: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, zero: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    return zero - lr * np.sign(beta1 * m + rest1 * g), beta2 * m + rest2 * g


def lion_decayed(
    g: Array, p: Array, m: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, zero: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    return zero - lr * np.sign(beta1 * m + rest1 * g) - shrink * p, beta2 * m + rest2 * g


@dataclass(frozen=True)
class Rprop(ElementWise):
    """A step size for each parameter, which grows while its gradient keeps its sign and shrinks where that changes.

    `lr` is the size of the first step, within `min_step` and `max_step`, and nothing more. Where the sign changes
    the parameter rests for one step, and the step after that leaves the size as it is. For whole gradients: the
    signs of those of small batches change by chance.
    """

    kind: ClassVar[str] = "rprop"
    formula: ClassVar[str] = (
        r"\Delta \leftarrow \begin{cases}\min(\eta_+ \Delta, \Delta_{\max}) & g\, g' > 0\\"
        r"\max(\eta_- \Delta, \Delta_{\min}),\ g \leftarrow 0 & g\, g' < 0\\ \Delta & \text{else}\end{cases},\quad "
        r"u = -\Delta \operatorname{sign}(g),\quad g' \leftarrow g"
    )
    source: ClassVar[str] = "Riedmiller & Braun 1993; the form is iRprop- of Igel & Hüsken 2000"
    url: ClassVar[str] = "https://doi.org/10.1109/ICNN.1993.298623"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. The paper of 1993 takes the last step back where the sign changes; torch rests.",
        "optax applies the step that was worked out one gradient before; that is not a form of the method.",
    )
    compact: ClassVar[bool] = False

    lr: Rate = 1e-2
    eta_minus: Annotated[float, Gt(0), Lt(1)] = 0.5
    eta_plus: Annotated[float, Gt(1)] = 1.2
    min_step: NonNegative = 1e-6
    max_step: Positive = 50.0

    def check(self) -> None:
        refuse_schedules(self, "lr")
        if not schedules_of(self).keys() & {"min_step", "max_step"} and self.min_step > self.max_step:
            raise InvalidRecipe("/min_step", f"it must be at most max_step, which is {self.max_step:g}")

    @property
    def slots(self) -> tuple[str, ...]:
        return "previous", "step"

    def initial(self, slot: str) -> float:
        return self.lr if slot == "step" else 0.0

    @property
    def update(self) -> Formula:
        return rprop

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.eta_minus, self.eta_plus, self.min_step, self.max_step, 0.0, 1.0


def rprop(
    g: Array, previous: Array, step: Array,
    eta_minus: Array, eta_plus: Array, smallest: Array, largest: Array, zero: Array, one: Array,
) -> tuple[Array, ...]:  # fmt: skip
    # Not the sign of their product, which may vanish.
    agreement = np.sign(g) * np.sign(previous)
    # One of these is 1, the others are 0; a choice by `where` is slow when compiled.
    same, changed = np.maximum(agreement, zero), np.maximum(-agreement, zero)
    neither = one - same - changed
    factor = same * eta_plus + changed * eta_minus + neither
    step = np.minimum(np.maximum(factor * step, smallest), largest)
    g = (same + neither) * g
    return zero - step * np.sign(g), g, step
