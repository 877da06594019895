"""Adam with a second first moment: of the gradients' differences, or of older gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.hyperparameters import Decay, NonNegative, Rate
from core.layout import Array
from core.optimizers.adam import Decoupled
from core.optimizers.adam_variants import Steps
from core.optimizers.rule import Formula, Scalars


def adan(
    g: Array, m: Array, d: Array, n: Array, previous: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, beta3: Array, rest3: Array, later: Array, weight: Array,
    by_m: Array, by_d: Array, scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    change = later * (g - previous)
    m = beta1 * m + rest1 * g
    d = beta2 * d + rest2 * change
    n = beta3 * n + rest3 * (g + weight * change) * (g + weight * change)
    return (-by_m * m - by_d * d) / (np.sqrt(scale * n + inside) + outside), m, d, n, g


def adan_decayed(
    g: Array, p: Array, m: Array, d: Array, n: Array, previous: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, beta3: Array, rest3: Array, later: Array, weight: Array,
    by_m: Array, by_d: Array, scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    change = later * (g - previous)
    m = beta1 * m + rest1 * g
    d = beta2 * d + rest2 * change
    n = beta3 * n + rest3 * (g + weight * change) * (g + weight * change)
    return (-by_m * m - by_d * d) / (np.sqrt(scale * n + inside) + outside) - shrink * p, m, d, n, g


@dataclass(frozen=True)
class Adan(Decoupled):
    """Adam with Nesterov momentum, estimated from the differences of successive gradients.

    `difference_weight`: the differences count by "decay", which is beta2, as in the paper, or by "rest", 1 - beta2.
    `decay_form`: "proximal" divides the parameters by 1 + η λ after the step, "decoupled" is AdamW's.
    `eps_root` is added under the root, `eps` beside it.
    """

    kind: ClassVar[str] = "adan"
    formula: ClassVar[str] = (
        r"\Delta = g - g_{\text{prev}},\quad m \leftarrow \beta_1 m + (1-\beta_1) g,\quad "
        r"d \leftarrow \beta_2 d + (1-\beta_2)\Delta,\quad n \leftarrow \beta_3 n + (1-\beta_3)(g + \beta_2\Delta)^2,"
        r"\quad u = -\eta\,\frac{m/(1-\beta_1^t) + \beta_2\, d/(1-\beta_2^t)}{\sqrt{n/(1-\beta_3^t)} + \varepsilon}"
    )
    counts: ClassVar[tuple[str, ...]] = ("taken",)
    source: ClassVar[str] = "Xie et al. 2022, Adan: Adaptive Nesterov Momentum Algorithm"
    url: ClassVar[str] = "https://arxiv.org/abs/2208.06677"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' code, pytorch_optimizer: the defaults. The paper writes 1 - β where β stands here.",
        "optax: difference_weight 'rest', which is the paper's factor read with the other meaning of β; "
        "eps_root 1e-8, decay_form 'decoupled'.",
    )
    compact: ClassVar[bool] = False  # what is rounded off the previous gradient would come back as a difference

    lr: Rate = 1e-3
    beta1: Decay = 0.98
    beta2: Decay = 0.92
    beta3: Decay = 0.99
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    difference_weight: Literal["decay", "rest"] = "decay"
    decay_form: Literal["proximal", "decoupled"] = "proximal"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "d", "n", "previous")

    @property
    def update(self) -> Formula:
        return adan_decayed if "params" in self.needs else adan

    @property
    def scalars(self) -> Scalars:
        return {"taken": 0.0}

    def tracked(self, t: int, scalars: Scalars) -> tuple[float, ...]:
        # By the tensor's own count: only its first gradient has none before it.
        scalars["taken"] += 1.0
        return self.coefficients(int(scalars["taken"]))

    def coefficients(self, t: int) -> tuple[float, ...]:
        betas = self.beta1, self.beta2, self.beta3
        first, second, third = (1.0 - math.pow(beta, t) for beta in betas)
        weight = self.beta2 if self.difference_weight == "decay" else 1.0 - self.beta2
        divisor = 1.0 + self.shrink if self.decay_form == "proximal" else 1.0
        along = self.lr / first / divisor, self.lr * weight / second / divisor
        means = [value for beta in betas for value in (beta, 1.0 - beta)]
        later = 0.0 if t == 1 else 1.0
        return *means, later, weight, *along, 1.0 / third, self.eps_root, self.eps, self.shrink / divisor


def ademamix(
    g: Array, m: Array, slow: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, beta3: Array, rest3: Array,
    by_m: Array, by_slow: Array, scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    slow = beta3 * slow + rest3 * g
    v = beta2 * v + rest2 * g * g
    return (-by_m * m - by_slow * slow) / (np.sqrt(scale * v + inside) + outside), m, slow, v


def ademamix_decayed(
    g: Array, p: Array, m: Array, slow: Array, v: Array,
    beta1: Array, rest1: Array, beta2: Array, rest2: Array, beta3: Array, rest3: Array,
    by_m: Array, by_slow: Array, scale: Array, inside: Array, outside: Array, shrink: Array,
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    slow = beta3 * slow + rest3 * g
    v = beta2 * v + rest2 * g * g
    return (-by_m * m - by_slow * slow) / (np.sqrt(scale * v + inside) + outside) - shrink * p, m, slow, v


@dataclass(frozen=True)
class AdEMAMix(Decoupled):
    """Adam with a second, much slower mean of the gradients beside the first.

    `alpha` grows linearly over its first `alpha_warmup` steps, and beta3 from beta1 over its first `beta3_warmup`
    steps, so that its half-life does; 0 is no warm-up. `eps_root` is added under the root, `eps` beside it.
    """

    kind: ClassVar[str] = "ademamix"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad m' \leftarrow \beta_3^{(t)} m' + (1-\beta_3^{(t)}) g,\quad "
        r"v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad "
        r"u = -\eta\,\frac{m/(1-\beta_1^t) + \alpha^{(t)} m'}{\sqrt{v/(1-\beta_2^t)} + \varepsilon};\qquad "
        r"\alpha^{(t)} = \alpha\min(t/T, 1),\quad 1/\ln\beta_3^{(t)} = (1-t/T)/\ln\beta_1 + (t/T)/\ln\beta_3"
    )
    source: ClassVar[str] = "Pagliardini, Ablin & Grangier 2024, The AdEMAMix Optimizer"
    url: ClassVar[str] = "https://arxiv.org/abs/2409.03137"
    notes: ClassVar[tuple[str, ...]] = (
        "optax, pytorch_optimizer: alpha 5; t_alpha_beta3 of the latter is both warm-ups.",
        "The authors' torch code: alpha 2, and 1e-8 added to the betas in the warm-up of beta3.",
    )

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    beta3: Decay = 0.9999
    alpha: NonNegative = 5.0
    alpha_warmup: Steps = 0
    beta3_warmup: Steps = 0
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "slow", "v")

    @property
    def update(self) -> Formula:
        return ademamix_decayed if "params" in self.needs else ademamix

    def coefficients(self, t: int) -> tuple[float, ...]:
        alpha = self.alpha * t / self.alpha_warmup if t < self.alpha_warmup else self.alpha
        beta3 = between(self.beta1, self.beta3, t / self.beta3_warmup) if t < self.beta3_warmup else self.beta3
        first, second = 1.0 - math.pow(self.beta1, t), 1.0 - math.pow(self.beta2, t)
        means = [value for beta in (self.beta1, self.beta2, beta3) for value in (beta, 1.0 - beta)]
        return *means, self.lr / first, self.lr * alpha, 1.0 / second, self.eps_root, self.eps, self.shrink


def between(start: float, end: float, share: float) -> float:
    """The decay whose half-life is `share` of the way from that of `start` to that of `end`, and at most `end`."""
    # The half-life is ln(1/2)/ln(decay): 0 for a decay of 0.
    inverse = sum(part / math.log(decay) for part, decay in ((1.0 - share, start), (share, end)) if decay > 0.0)
    return min(math.exp(1.0 / inverse), end) if inverse < 0.0 else 0.0
