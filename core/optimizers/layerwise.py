"""One rate for each tensor, from norms of the whole of it.

A norm is summed in float64 (core.sums); what is done element by element is done in the session's dtype.
Where a norm is zero there is no rate to be had of it, and the tensor moves as if it were not adapted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core import sums
from core.hyperparameters import Decay, NonNegative, Rate
from core.layout import Array
from core.optimizers.rule import Own, State, TensorWise, epsilons, quotient, shrinkage


def length(tensor: Array) -> float:
    """The L2 norm of a tensor of any shape."""
    return sums.length([np.ascontiguousarray(tensor).reshape(-1)])


@dataclass(frozen=True)
class Lars(TensorWise):
    """Momentum in which each tensor's rate is proportional to the tensor's norm over its gradient's.

    `adapt` false leaves a tensor its plain momentum: for a group of biases and normalisation weights.
    `denominator`: "sum" is ‖g‖ + λ‖θ‖ as in the paper, "whole" ‖g + λθ‖ as in optax. `clip` takes no more than `lr`
    itself (LARC). `lr_in_velocity` false puts the rate outside the velocity.
    """

    kind: ClassVar[str] = "lars"
    formula: ClassVar[str] = (
        r"r = \frac{c\,\lVert\theta\rVert}{\lVert g\rVert + \lambda\lVert\theta\rVert + \varepsilon},\quad "
        r"v \leftarrow \mu v + \eta\, r\,(g + \lambda\theta),\quad u = -v"
    )
    source: ClassVar[str] = "You, Gitman & Ginsburg 2017, Large Batch Training of Convolutional Networks"
    url: ClassVar[str] = "https://arxiv.org/abs/1708.03888"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper: the defaults. optax: denominator 'whole'.",
        "pytorch_optimizer: lr_in_velocity false, and tensors of fewer than two axes have adapt false and no decay.",
        "Apex LARC: eps 1e-8, lr_in_velocity false, and clip true unless switched off; where a norm is 0 it leaves the "
        "decay out, too.",
        "A tensor that is zero, or whose gradient is, has the ratio 1, not the trust coefficient.",
    )

    lr: Rate = 1e-3
    momentum: Decay = 0.9
    weight_decay: NonNegative = 0.0
    trust_coefficient: NonNegative = 1e-3
    eps: NonNegative = 0.0
    nesterov: bool = False
    adapt: bool = True
    denominator: Literal["sum", "whole"] = "sum"
    clip: bool = False
    lr_in_velocity: bool = True

    @property
    def meaning(self) -> Mapping[str, object]:
        return {"lr_in_velocity": self.lr_in_velocity}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.adapt or self.weight_decay != 0 else ())

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        return {"v": Own(shape)} if self.momentum != 0 else {}

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        decayed = g if p is None or self.weight_decay == 0 else g + self.weight_decay * p
        ratio = 1.0 if p is None or not self.adapt else self._ratio(g, p, decayed)
        inside, outside = (self.lr, 1.0) if self.lr_in_velocity else (1.0, self.lr)
        d = (inside * ratio) * decayed
        if "v" not in state:
            return np.asarray(-outside * d)
        v = state["v"]
        v[...] = self.momentum * v + d
        return np.asarray(-outside * (d + self.momentum * v if self.nesterov else v))

    def _ratio(self, g: Array, p: Array, decayed: Array) -> float:
        size = length(p)
        whole = self.denominator == "whole"
        divisor = length(decayed) if whole else length(g) + self.weight_decay * size
        if size == 0 or divisor == 0:
            return 1.0
        ratio = self.trust_coefficient * size / (divisor + self.eps)
        # `lr` times the ratio is the tensor's rate, which is not to be beyond `lr`.
        return min(ratio / self.lr, 1.0) if self.clip and self.lr > 0 else ratio


@dataclass(frozen=True)
class Lamb(TensorWise):
    """Adam in which each tensor's step, decay included, gets the length of the tensor itself times the rate.

    `adapt` false leaves out the trust ratio. `min_norm` and `max_norm` bound the tensor's norm in it; `max_norm` 0 is
    no bound. `bias_correction` false uses m and v as they are; `eps_inside` puts epsilon under the root.
    """

    kind: ClassVar[str] = "lamb"
    formula: ClassVar[str] = (
        r"r = \frac{\hat m}{\sqrt{\hat v} + \varepsilon} + \lambda\theta,\quad "
        r"u = -\eta\,\frac{\phi(\lVert\theta\rVert)}{\lVert r\rVert}\, r,\quad "
        r"\phi(z) = \min(\max(z, \gamma_l), \gamma_u)"
    )
    source: ClassVar[str] = "You et al. 2019, Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
    url: ClassVar[str] = "https://arxiv.org/abs/1904.00962"
    notes: ClassVar[tuple[str, ...]] = (
        "Published version: the defaults. optax: weight_decay 0. Keras: as optax, and its decay is beside the step, "
        "not in it.",
        "The preprint's third version, NVIDIA's code: bias_correction false, max_norm 10.",
    )

    lr: Rate = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-6
    weight_decay: NonNegative = 1e-2
    min_norm: NonNegative = 0.0
    max_norm: NonNegative = 0.0
    adapt: bool = True
    bias_correction: bool = True
    eps_inside: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.adapt or self.weight_decay != 0 else ())

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        return {"m": Own(shape), "v": Own(shape)}

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        m, v = state["m"], state["v"]
        m[...] = self.beta1 * m + (1.0 - self.beta1) * g
        v[...] = self.beta2 * v + (1.0 - self.beta2) * g * g
        first = 1.0 - math.pow(self.beta1, t) if self.bias_correction else 1.0
        second = 1.0 - math.pow(self.beta2, t) if self.bias_correction else 1.0
        inside, outside = epsilons(self.eps, self.eps_inside)
        root = np.sqrt(v / second + inside) + outside
        r = quotient(m / first, root)
        if p is not None and self.weight_decay != 0:
            r = r + self.weight_decay * p
        ratio = 1.0 if p is None or not self.adapt else self._ratio(p, r)
        return np.asarray((-self.lr * ratio) * r)

    def _ratio(self, p: Array, r: Array) -> float:
        size, divisor = length(p), length(r)
        if self.max_norm > 0:
            size = min(size, self.max_norm)
        size = max(size, self.min_norm)
        return size / divisor if size > 0 and divisor > 0 else 1.0


@dataclass(frozen=True)
class NovoGrad(TensorWise):
    """Momentum of gradients, each tensor's divided by a running mean of its norm: one second moment per tensor.

    The first gradient of a tensor starts the mean, and the momentum, with the whole of itself. `grad_averaging`
    gives each later gradient the share 1 - beta1. The decay goes through the momentum as in the paper, unless
    `decoupled`, where it is beside it. `eps_inside` puts epsilon under the root.
    """

    kind: ClassVar[str] = "novograd"
    formula: ClassVar[str] = (
        r"v \leftarrow \beta_2 v + (1-\beta_2)\lVert g\rVert^2\ (v_1 = \lVert g\rVert^2),\quad "
        r"m \leftarrow \beta_1 m + \frac{g}{\sqrt{v} + \varepsilon} + \lambda\theta,\quad u = -\eta\, m"
    )
    source: ClassVar[str] = "Ginsburg et al. 2019, Stochastic Gradient Methods with Layer-wise Adaptive Moments"
    url: ClassVar[str] = "https://arxiv.org/abs/1905.11286"
    notes: ClassVar[tuple[str, ...]] = (
        "pytorch_optimizer: the defaults. optax: beta1 0.9, beta2 0.25, eps 1e-6.",
        "Gradients that are all zero do not count as a tensor's first one.",
    )

    lr: Rate = 1e-3
    beta1: Decay = 0.95
    beta2: Decay = 0.98
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    grad_averaging: bool = False
    decoupled: bool = False
    eps_inside: bool = False
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.weight_decay != 0 else ())

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        return {"m": Own(shape), "v": Own((), exact=True, least=0.0)}

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        m, v = state["m"], state["v"]
        size = length(g)
        square = size * size
        first = float(v) == 0.0
        v[...] = square if first else self.beta2 * v + (1.0 - self.beta2) * square
        inside, outside = epsilons(self.eps, self.eps_inside)
        root = math.sqrt(float(v) + inside) + outside
        d = g / root if root > 0 else g
        if p is not None and self.weight_decay != 0 and not self.decoupled:
            d = d + self.weight_decay * p
        share = 1.0 - self.beta1 if self.grad_averaging and not first else 1.0
        m[...] = self.beta1 * m + share * d
        u = -self.lr * m
        if p is not None and self.weight_decay != 0 and self.decoupled:
            u = u - shrinkage(self) * p
        return np.asarray(u)
