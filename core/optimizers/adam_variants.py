"""What grew out of Adam: another order of its parts, or another second moment.

All of them may have decoupled weight decay, so each is written twice: without the parameters, and with them. The last
coefficient is the decay; the form without it leaves it alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from core.hyperparameters import Decay, NonNegative, Rate, refuse_schedules
from core.layout import Array
from core.optimizers.adam import Decoupled
from core.optimizers.rule import Formula, Scalars

Steps = Annotated[int, Ge(0)]


# LaProp


def laprop(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, scale: Array, inside: Array, outside: Array,
    centre: Array, lr: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    v = beta2 * v + rest2 * g * g
    m = beta1 * m + rest1 * g / (np.sqrt(scale * v + inside) + outside)
    return -lr * m, m, v


def laprop_decayed(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, scale: Array, inside: Array, outside: Array,
    centre: Array, lr: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    v = beta2 * v + rest2 * g * g
    m = beta1 * m + rest1 * g / (np.sqrt(scale * v + inside) + outside)
    return -lr * m - shrink * p, m, v


def laprop_centered(
    g: Array, m: Array, v: Array, mean: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, scale: Array, inside: Array, outside: Array,
    centre: Array, lr: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    v = beta2 * v + rest2 * g * g
    mean = beta2 * mean + rest2 * g
    m = beta1 * m + rest1 * g / (np.sqrt(scale * np.abs(v - centre * mean * mean) + inside) + outside)
    return -lr * m, m, v, mean


def laprop_centered_decayed(
    g: Array, p: Array, m: Array, v: Array, mean: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, scale: Array, inside: Array, outside: Array,
    centre: Array, lr: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    v = beta2 * v + rest2 * g * g
    mean = beta2 * mean + rest2 * g
    m = beta1 * m + rest1 * g / (np.sqrt(scale * np.abs(v - centre * mean * mean) + inside) + outside)
    return -lr * m - shrink * p, m, v, mean


@dataclass(frozen=True)
class LaProp(Decoupled):
    """Adam the other way round: the gradient is normalized first, and the normalized ones are averaged.

    `eps_hat` adds epsilon (and `eps_root`, which is under the root) to v before its correction. `centered` takes
    the variance once `centered_after` steps are done. `lr_in_velocity` puts the rate inside the average, which is
    then corrected by the average of the rates. The decay comes after the step: θ ← (1 - η λ)(θ + u).
    """

    kind: ClassVar[str] = "laprop"
    formula: ClassVar[str] = (
        r"v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad "
        r"m \leftarrow \beta_1 m + (1-\beta_1)\frac{g}{\sqrt{v/(1-\beta_2^t)} + \varepsilon},\quad "
        r"u = -\eta\,\frac{m}{1-\beta_1^t}"
    )
    source: ClassVar[str] = "Ziyin, Wang & Ueda 2020, LaProp: Separating Momentum and Adaptivity in Adam"
    url: ClassVar[str] = "https://arxiv.org/abs/2002.04839"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' code: lr_in_velocity true, and decay_scaling 'none'.",
        "pytorch_optimizer: lr_in_velocity true, eps_hat true, eps_root 1e-15.",
        "While the rate stays the same, lr_in_velocity changes nothing.",
    )

    lr: Rate = 4e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-15
    eps_root: NonNegative = 0.0
    eps_hat: bool = False
    centered: bool = False
    centered_after: Steps = 10
    lr_in_velocity: bool = False

    @property
    def meaning(self) -> Mapping[str, object]:
        return {"lr_in_velocity": self.lr_in_velocity}

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v", "mean") if self.centered else ("m", "v")

    @property
    def update(self) -> Formula:
        plain, decayed = (laprop_centered, laprop_centered_decayed) if self.centered else (laprop, laprop_decayed)
        return decayed if "params" in self.needs else plain

    @property
    def scalars(self) -> Scalars:
        return {"lr_mean": 0.0} if self.lr_in_velocity else {}

    def tracked(self, t: int, scalars: Scalars) -> tuple[float, ...]:
        if not self.lr_in_velocity:
            return self.coefficients(t)
        scalars["lr_mean"] = self.beta1 * scalars["lr_mean"] + (1.0 - self.beta1) * self.lr
        return self._coefficients(t, self.lr, self.lr / scalars["lr_mean"] if scalars["lr_mean"] > 0.0 else 1.0)

    def coefficients(self, t: int) -> tuple[float, ...]:
        inside, outside = (self.lr, 1.0) if self.lr_in_velocity else (1.0, self.lr)
        return self._coefficients(t, inside, outside / (1.0 - math.pow(self.beta1, t)))

    def _coefficients(self, t: int, inside: float, outside: float) -> tuple[float, ...]:
        second = 1.0 - math.pow(self.beta2, t)
        eps = (self.eps_root / second, self.eps / math.sqrt(second)) if self.eps_hat else (self.eps_root, self.eps)
        first = self.beta1, (1.0 - self.beta1) * inside
        centre = 1.0 if t > self.centered_after else 0.0
        lr = outside * (1.0 - self.shrink)
        return *first, self.beta2, 1.0 - self.beta2, 1.0 / second, *eps, centre, lr, self.shrink


# AdaBelief


def adabelief(
    g: Array, m: Array, s: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, by_m: Array, by_g: Array,
    scale: Array, kept: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    s = beta2 * s + rest2 * (g - m) * (g - m) + kept
    return (-by_m * m - by_g * g) / (np.sqrt(scale * s + inside) + outside), m, s


def adabelief_decayed(
    g: Array, p: Array, m: Array, s: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, by_m: Array, by_g: Array,
    scale: Array, kept: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    s = beta2 * s + rest2 * (g - m) * (g - m) + kept
    return (-by_m * m - by_g * g) / (np.sqrt(scale * s + inside) + outside) - shrink * p, m, s


@dataclass(frozen=True)
class AdaBelief(Decoupled):
    """Adam with the variance of the gradient around its own mean in place of the second moment.

    `eps_root` goes into s at every step and stays in it, as in the paper; with `eps_in_s` false it is added under
    the root alone. `eps` is beside the root. `nesterov` steps along the mean that the next step would have.
    """

    kind: ClassVar[str] = "adabelief"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad s \leftarrow \beta_2 s + (1-\beta_2)(g-m)^2 + \varepsilon,\quad "
        r"u = -\eta\,\frac{m/(1-\beta_1^t)}{\sqrt{s/(1-\beta_2^t)} + \varepsilon}"
    )
    source: ClassVar[str] = "Zhuang et al. 2020, AdaBelief Optimizer"
    url: ClassVar[str] = "https://arxiv.org/abs/2010.07468"
    notes: ClassVar[tuple[str, ...]] = (
        "optax, pytorch_optimizer: the defaults; eps of pytorch_optimizer is both eps and eps_root here.",
        "The first versions of the authors' code have 1e-8 for both.",
    )

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-16
    eps_root: NonNegative = 1e-16
    eps_in_s: bool = True
    nesterov: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "s")

    @property
    def update(self) -> Formula:
        return adabelief_decayed if "params" in self.needs else adabelief

    def coefficients(self, t: int) -> tuple[float, ...]:
        first, second = 1.0 - math.pow(self.beta1, t), 1.0 - math.pow(self.beta2, t)
        along = self.lr / first, 0.0
        if self.nesterov:
            along = self.lr * self.beta1 / (1.0 - math.pow(self.beta1, t + 1)), self.lr * (1.0 - self.beta1) / first
        kept, inside = (self.eps_root, 0.0) if self.eps_in_s else (0.0, self.eps_root)
        betas = self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2
        return *betas, *along, 1.0 / second, kept, inside, self.eps, self.shrink


# Yogi


def yogi(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = v - rest2 * np.sign(v - g * g) * (g * g)
    return -lr * m / (np.sqrt(scale * v + inside) + outside), m, v


def yogi_decayed(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, rest2: Array, lr: Array, scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = v - rest2 * np.sign(v - g * g) * (g * g)
    return -lr * m / (np.sqrt(scale * v + inside) + outside) - shrink * p, m, v


@dataclass(frozen=True)
class Yogi(Decoupled):
    """Adam with a second moment that moves by the size of the squared gradient, whichever way it has to go.

    `initial_accumulator` is v before the first step, `initial_momentum` is m. `eps_root` is added under the root,
    `eps` beside it. `bias_correction` false uses m and v as they are.
    """

    kind: ClassVar[str] = "yogi"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad "
        r"v \leftarrow v - (1-\beta_2)\,\mathrm{sign}(v - g^2)\, g^2,\quad "
        r"u = -\eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \varepsilon}"
    )
    source: ClassVar[str] = "Zaheer et al. 2018, Adaptive Methods for Nonconvex Optimization"
    url: ClassVar[str] = "https://papers.nips.cc/paper/2018/hash/90365351ccc7437a1309dc64e4db32a3-Abstract.html"
    notes: ClassVar[tuple[str, ...]] = (
        "optax, pytorch_optimizer: the defaults, where m starts from 1e-6 too.",
        "The paper's algorithm: bias_correction false, initial_momentum 0.",
    )

    lr: Rate = 1e-2
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-3
    eps_root: NonNegative = 0.0
    initial_accumulator: NonNegative = 1e-6
    initial_momentum: NonNegative = 1e-6
    bias_correction: bool = True

    def check(self) -> None:
        refuse_schedules(self, "initial_accumulator", "initial_momentum")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v")

    def initial(self, slot: str) -> float:
        return self.initial_momentum if slot == "m" else self.initial_accumulator

    @property
    def update(self) -> Formula:
        return yogi_decayed if "params" in self.needs else yogi

    def coefficients(self, t: int) -> tuple[float, ...]:
        first = 1.0 - math.pow(self.beta1, t) if self.bias_correction else 1.0
        second = 1.0 - math.pow(self.beta2, t) if self.bias_correction else 1.0
        eps = self.eps_root, self.eps
        return self.beta1, 1.0 - self.beta1, 1.0 - self.beta2, self.lr / first, 1.0 / second, *eps, self.shrink


# ADOPT


def adopt(
    g: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, floor: Array, limit: Array, by_m: Array, by_n: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    n = np.minimum(np.maximum(g / np.maximum(np.sqrt(v), floor), -limit), limit)
    m = beta1 * m + rest1 * n
    v = beta2 * v + rest2 * g * g
    return -by_m * m - by_n * n, m, v


def adopt_decayed(
    g: Array, p: Array, m: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, floor: Array, limit: Array, by_m: Array, by_n: Array,
    shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    n = np.minimum(np.maximum(g / np.maximum(np.sqrt(v), floor), -limit), limit)
    m = beta1 * m + rest1 * n
    v = beta2 * v + rest2 * g * g
    return -by_m * m - by_n * n - shrink * p, m, v


@dataclass(frozen=True)
class Adopt(Decoupled):
    """Adam that divides a gradient by the second moment of those before it, and averages the quotients.

    A tensor's first gradient only starts v, and nothing moves; `first_step`: "decay" lets the weights decay even
    then. The quotients are clipped to the fourth root of a number of steps: `clipping` "updates" counts those that
    moved, "gradients" the first one too, "none" leaves them as they are. `nesterov` looks a step ahead.
    """

    kind: ClassVar[str] = "adopt"
    formula: ClassVar[str] = (
        r"n = \mathrm{clip}\left(\frac{g}{\max(\sqrt{v}, \varepsilon)},\ \pm (t-1)^{1/4}\right),\quad "
        r"m \leftarrow \beta_1 m + (1-\beta_1)\, n,\quad u = -\eta m,\quad v \leftarrow \beta_2 v + (1-\beta_2) g^2"
    )
    counts: ClassVar[tuple[str, ...]] = ("taken",)
    source: ClassVar[str] = "Taniguchi et al. 2024, ADOPT: Modified Adam Can Converge with Any β2"
    url: ClassVar[str] = "https://arxiv.org/abs/2411.02853"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' code, optax: the defaults. The paper counts from the second gradient on, so its t is t - 1 here.",
        "pytorch_optimizer: clipping 'gradients', first_step 'decay'.",
    )

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.9999
    eps: NonNegative = 1e-6
    clipping: Literal["updates", "gradients", "none"] = "updates"
    nesterov: bool = False
    first_step: Literal["still", "decay"] = "still"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def update(self) -> Formula:
        return adopt_decayed if "params" in self.needs else adopt

    @property
    def scalars(self) -> Scalars:
        return {"taken": 0.0}

    def tracked(self, t: int, scalars: Scalars) -> tuple[float, ...]:
        # By the tensor's own count: one that joins later would have its first gradient divided by eps.
        scalars["taken"] += 1.0
        return self.coefficients(int(scalars["taken"]))

    def coefficients(self, t: int) -> tuple[float, ...]:
        along = (self.lr * self.beta1, self.lr * (1.0 - self.beta1)) if self.nesterov else (self.lr, 0.0)
        if t == 1:
            # Divided by infinity the gradient is 0, whatever it is.
            shrink = self.shrink if self.first_step == "decay" else 0.0
            return self.beta1, 1.0 - self.beta1, 0.0, 1.0, math.inf, math.inf, *along, shrink
        counts = {"updates": t - 1, "gradients": t, "none": math.inf}
        betas = self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2
        return *betas, self.eps, math.pow(counts[self.clipping], 0.25), *along, self.shrink
