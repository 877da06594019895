"""Adam and what follows from it: a mean of the gradients over the root of a mean of their squares."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from core.hyperparameters import Decay, NonNegative, Rate
from core.layout import Array
from core.optimizers.rule import ElementWise, Formula, Scalars, epsilons, shrinkage


@dataclass(frozen=True)
class Moments(ElementWise):
    """The constants that all of these have."""

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def averages(self) -> tuple[float, float, float, float]:
        return self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2


@dataclass(frozen=True)
class Decoupled(ElementWise):
    """A method that can shrink the parameters beside its step, and be cautious.

    `decay_scaling`: "lr" takes eta · weight_decay as torch does, "none" weight_decay alone. `cautious` keeps
    those elements still whose step would go along the gradient, and lengthens the others by as much as
    that takes away; the decay is not masked.
    """

    lr: Rate = 1e-3
    cautious: bool = False
    weight_decay: NonNegative = 0.0
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def masked(self) -> bool:
        return self.cautious

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"}) if self.weight_decay != 0 else frozenset()

    @property
    def shrink(self) -> float:
        """The last coefficient, also of the form without parameters: a schedule may pass through 0."""
        return shrinkage(self)


@dataclass(frozen=True)
class Adam(Moments):
    """Adaptive moment estimation.

    `eps_inside` puts epsilon under the root, `eps_hat` adds it before v is corrected. `bias_correction` false uses
    m and v as they are. `amsgrad` divides by the largest v so far: "raw" takes the largest and then corrects it,
    "corrected" takes the largest of the corrected ones. `nesterov` takes the mean that the next step would begin
    with. `cautious` keeps those elements still whose step would go along the gradient, and lengthens the others.
    """

    kind: ClassVar[str] = "adam"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad "
        r"u = -\eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \varepsilon};\qquad "
        r"\text{nesterov: } \hat m = \frac{\beta_1 m}{1-\beta_1^{t+1}} + \frac{(1-\beta_1) g}{1-\beta_1^t}"
    )
    source: ClassVar[str] = "Kingma & Ba 2014, Adam: A Method for Stochastic Optimization"
    url: ClassVar[str] = "https://arxiv.org/abs/1412.6980"
    notes: ClassVar[tuple[str, ...]] = (
        "torch, optax: the defaults. Keras: eps_hat true, eps 1e-7.",
        "amsgrad (Reddi, Kale & Kumar 2018): torch, Keras 'raw'; optax 'corrected'; the paper corrects nothing.",
        "optax's nadam is nesterov true; torch's is another method, here nadam.",
        "Some pages leave the power t out of the correction, or compute m̂ and v̂ and then use m and v. Neither is Adam.",
    )

    eps_inside: bool = False
    eps_hat: bool = False
    bias_correction: bool = True
    amsgrad: Literal[False, "raw", "corrected"] = False
    nesterov: bool = False
    cautious: bool = False

    @property
    def masked(self) -> bool:
        return self.cautious

    @property
    def meaning(self) -> Mapping[str, object]:
        return {"amsgrad": self.amsgrad} if self.amsgrad else {}

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v", "v_max") if self.amsgrad else ("m", "v")

    @property
    def update(self) -> Formula:
        if self.amsgrad:
            return adam_amsgrad
        return adam_nesterov if self.nesterov else adam

    def coefficients(self, t: int) -> tuple[float, ...]:
        first, second = self.corrections(t)
        to_m, to_g = self.lr / first, 0.0
        if self.nesterov:
            to_m, to_g = self.lr * self.beta1 / self.corrections(t + 1)[0], self.lr * (1.0 - self.beta1) / first
        rates = (to_m, to_g) if self.nesterov or self.amsgrad else (to_m,)
        scale = 1.0 / second
        scales = {False: (scale,), "raw": (1.0, scale), "corrected": (scale, 1.0)}[self.amsgrad]
        eps = corrected_epsilons(self.eps, self.eps_inside, self.eps_hat, second)
        return *self.averages, *rates, *scales, *eps, self.shrink

    @property
    def shrink(self) -> float:
        return 0.0

    def corrections(self, t: int) -> tuple[float, float]:
        """What m and v of step t are divided by."""
        return (1.0 - math.pow(self.beta1, t), 1.0 - math.pow(self.beta2, t)) if self.bias_correction else (1.0, 1.0)


def corrected_epsilons(eps: float, inside: bool, hat: bool, correction: float) -> tuple[float, float]:
    """(under the root, beside the root) of the corrected v, for an epsilon that with `hat` is added before that."""
    under, beside = epsilons(eps, inside)
    return (under / correction, beside / math.sqrt(correction)) if hat else (under, beside)


def adam(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -lr * m / (np.sqrt(scale * v + inside) + outside), m, v


def adam_nesterov(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, to_m: Array, to_g: Array,
    scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -(to_m * m + to_g * g) / (np.sqrt(scale * v + inside) + outside), m, v


def adam_amsgrad(
    g: Array, m: Array, v: Array, v_max: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, to_m: Array, to_g: Array,
    before: Array, after: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    v_max = np.maximum(v_max, before * v)
    return -(to_m * m + to_g * g) / (np.sqrt(after * v_max + inside) + outside), m, v, v_max


@dataclass(frozen=True)
class AdamW(Decoupled, Adam):
    """Adam with decoupled weight decay: the parameters shrink beside the step, not through the moments.

    `decay_scaling`: "lr" takes eta · weight_decay as torch does, "none" weight_decay alone. The other options are
    those of adam.
    """

    kind: ClassVar[str] = "adamw"
    formula: ClassVar[str] = r"u = u_{\text{adam}} - \eta \lambda \theta"
    source: ClassVar[str] = "Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization"
    url: ClassVar[str] = "https://arxiv.org/abs/1711.05101"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. optax: weight_decay 1e-4. Keras: eps_hat true, eps 1e-7, weight_decay 4e-3.",
        "optax's nadamw is nesterov true. The paper's decay does not scale with lr: decay_scaling 'none'.",
    )

    weight_decay: NonNegative = 1e-2

    @property
    def update(self) -> Formula:
        if "params" not in self.needs:
            return super().update
        if self.amsgrad:
            return adamw_amsgrad
        return adamw_nesterov if self.nesterov else adamw


def adamw(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -lr * m / (np.sqrt(scale * v + inside) + outside) - shrink * p, m, v


def adamw_nesterov(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, to_m: Array, to_g: Array,
    scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -(to_m * m + to_g * g) / (np.sqrt(scale * v + inside) + outside) - shrink * p, m, v


def adamw_amsgrad(
    g: Array, p: Array, m: Array, v: Array, v_max: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, to_m: Array, to_g: Array,
    before: Array, after: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    v_max = np.maximum(v_max, before * v)
    return -(to_m * m + to_g * g) / (np.sqrt(after * v_max + inside) + outside) - shrink * p, m, v, v_max


@dataclass(frozen=True)
class SparseAdam(Moments):
    """Adam that touches only the rows which have a gradient; all rows correct by the number of all steps.

    `eps_hat` adds epsilon before v is corrected, as torch does.
    """

    kind: ClassVar[str] = "sparse_adam"
    formula: ClassVar[str] = (
        r"\text{rows with a gradient: } u = -\eta\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}"
        r"\cdot\frac{m}{\sqrt{v} + \varepsilon};\quad\text{the others: } u = 0,\ m, v \text{ as they are}"
    )
    source: ClassVar[str] = "Kingma & Ba 2014; the lazy rows are torch's and TensorFlow's"
    url: ClassVar[str] = "https://arxiv.org/abs/1412.6980"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. A gradient that is not row-sparse touches every row, and eps_hat false is then adam.",
    )
    lazy_rows: ClassVar[bool] = True

    eps_hat: bool = True

    @property
    def update(self) -> Formula:
        return adam

    def coefficients(self, t: int) -> tuple[float, ...]:
        second = 1.0 - math.pow(self.beta2, t)
        eps = corrected_epsilons(self.eps, False, self.eps_hat, second)
        return *self.averages, self.lr / (1.0 - math.pow(self.beta1, t)), 1.0 / second, *eps, 0.0


@dataclass(frozen=True)
class Adamax(Decoupled, Moments):
    """Adam with the largest gradient, decaying, in the place of the root of the mean square.

    `eps_inside` adds epsilon to the gradient's magnitude before the larger is taken; otherwise it is added to the
    result.
    """

    kind: ClassVar[str] = "adamax"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad n \leftarrow \max(\beta_2 n, |g| + \varepsilon),\quad "
        r"u = -\frac{\eta}{1-\beta_1^t}\cdot\frac{m}{n}"
    )
    source: ClassVar[str] = "Kingma & Ba 2014, Adam: A Method for Stochastic Optimization, section 7.1"
    url: ClassVar[str] = "https://arxiv.org/abs/1412.6980"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults; optax the same, and with decay its adamaxw. Keras: eps_inside false, eps 1e-7.",
        "The paper has no epsilon, and divides 0 by 0 where no gradient has been yet.",
    )

    lr: Rate = 2e-3
    eps_inside: bool = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "norm")

    @property
    def update(self) -> Formula:
        return adamax_decayed if "params" in self.needs else adamax

    def coefficients(self, t: int) -> tuple[float, ...]:
        lr = self.lr / (1.0 - math.pow(self.beta1, t))
        eps = epsilons(self.eps, self.eps_inside)
        return self.beta1, 1.0 - self.beta1, self.beta2, lr, *eps, self.shrink


def adamax(
    g: Array, m: Array, norm: Array,
    beta1: Array, rest1: Array, beta2: Array, lr: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    norm = np.maximum(beta2 * norm, np.abs(g) + inside)
    return -lr * m / (norm + outside), m, norm


def adamax_decayed(
    g: Array, p: Array, m: Array, norm: Array,
    beta1: Array, rest1: Array, beta2: Array, lr: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    norm = np.maximum(beta2 * norm, np.abs(g) + inside)
    return -lr * m / (norm + outside) - shrink * p, m, norm


@dataclass(frozen=True)
class Nadam(Decoupled, Moments):
    """Adam with Nesterov's momentum, which warms up from half of beta1 to all of it.

    The momentum of step t is mu = beta1 · (1 - 0.96^(t · momentum_decay) / 2), and the corrections are products of
    those. `momentum_decay` 0 leaves it at half of beta1; from 10,000 on it is beta1 at every step.
    """

    kind: ClassVar[str] = "nadam"
    formula: ClassVar[str] = (
        r"\mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t\psi}),\quad "
        r"\hat m = \frac{\mu_{t+1}\, m}{1-\prod_{i=1}^{t+1}\mu_i} + \frac{(1-\mu_t)\, g}{1-\prod_{i=1}^{t}\mu_i},\quad "
        r"u = -\eta\,\frac{\hat m}{\sqrt{v/(1-\beta_2^t)} + \varepsilon}"
    )
    source: ClassVar[str] = "Dozat 2016, Incorporating Nesterov Momentum into Adam"
    url: ClassVar[str] = "https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. Keras: momentum_decay 1, eps 1e-7. optax: momentum_decay 10000, or adam's nesterov.",
        "Dozat's Algorithm 2 prints one more factor beta2 on v̂; no library has it.",
    )

    lr: Rate = 2e-3
    momentum_decay: NonNegative = 4e-3

    @property
    def update(self) -> Formula:
        return adamw_nesterov if "params" in self.needs else adam_nesterov

    @property
    def scalars(self) -> Scalars:
        return {"product": 1.0}

    def tracked(self, t: int, scalars: Scalars) -> tuple[float, ...]:
        now, following = self.momentum(t), self.momentum(t + 1)
        scalars["product"] *= now
        product = scalars["product"]
        to_m, to_g = self.lr * following / (1.0 - product * following), self.lr * (1.0 - now) / (1.0 - product)
        return *self.averages, to_m, to_g, 1.0 / (1.0 - math.pow(self.beta2, t)), 0.0, self.eps, self.shrink

    def momentum(self, t: int) -> float:
        return self.beta1 * (1.0 - 0.5 * math.pow(0.96, t * self.momentum_decay))


@dataclass(frozen=True)
class RAdam(Decoupled, Moments):
    """Rectified Adam: plain momentum until the mean of the squares is worth dividing by, then Adam by degrees.

    The mean of the squares is used where it stands for more than `threshold` gradients. `eps_hat` adds epsilon
    before v is corrected, `eps_inside` under the root.
    """

    kind: ClassVar[str] = "radam"
    formula: ClassVar[str] = (
        r"\rho_\infty = \tfrac{2}{1-\beta_2} - 1,\quad \rho_t = \rho_\infty - \tfrac{2t\beta_2^t}{1-\beta_2^t},\quad "
        r"r_t = \sqrt{\tfrac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}};\qquad "
        r"u = -\eta\, r_t\,\frac{\hat m \sqrt{1-\beta_2^t}}{\sqrt{v} + \varepsilon}"
        r"\ \text{ where } \rho_t > \text{threshold},\ \text{ else } -\eta\,\hat m"
    )
    source: ClassVar[str] = "Liu et al. 2019, On the Variance of the Adaptive Learning Rate and Beyond"
    url: ClassVar[str] = "https://arxiv.org/abs/1908.03265"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. optax: eps_hat false. The paper: threshold 4, and no epsilon.",
    )

    threshold: Annotated[float, Ge(4)] = 5.0
    eps_inside: bool = False
    eps_hat: bool = True

    @property
    def update(self) -> Formula:
        return radam_decayed if "params" in self.needs else radam

    def coefficients(self, t: int) -> tuple[float, ...]:
        rectification = self.rectification(t)
        first, second = 1.0 - math.pow(self.beta1, t), 1.0 - math.pow(self.beta2, t)
        eps = corrected_epsilons(self.eps, self.eps_inside, self.eps_hat, second)
        if rectification is None:
            return *self.averages, self.lr / first, 1.0 / second, *eps, 1.0, 1.0, self.shrink
        return *self.averages, self.lr * rectification / first, 1.0 / second, *eps, 0.0, math.inf, self.shrink

    def rectification(self, t: int) -> float | None:
        """r_t; None where the mean of the squares is not to be used yet."""
        longest, power = 2.0 / (1.0 - self.beta2) - 1.0, math.pow(self.beta2, t)
        length = longest - 2.0 * t * power / (1.0 - power)
        if length <= self.threshold:
            return None
        square = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        return math.sqrt(square)


def radam(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array,
    least: Array, most: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    # Between 1 and 1 while the mean of the squares is not to be used; a choice by `where` is slow when compiled.
    divisor = np.minimum(np.maximum(np.sqrt(scale * v + inside) + outside, least), most)
    return -lr * m / divisor, m, v


def radam_decayed(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array,
    least: Array, most: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    divisor = np.minimum(np.maximum(np.sqrt(scale * v + inside) + outside, least), most)
    return -lr * m / divisor - shrink * p, m, v
