"""Steps whose matrices are made nearly orthogonal: every direction of the momentum counts the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Lt

from core.hyperparameters import Decay, NonNegative, Positive, Rate
from core.layout import Array
from core.optimizers.layerwise import length
from core.optimizers.rule import Own, State, TensorWise, quotient


class NewtonSchulz(NamedTuple):
    """a x + b (x xᵀ) x + c (x xᵀ)² x, `steps` times, of an x whose singular values are at most 1."""

    a: float
    b: float
    c: float
    steps: int


@dataclass(frozen=True)
class Muon(TensorWise):
    """Momentum whose matrices are orthogonalized by a Newton-Schulz iteration; what is not a matrix takes AdamW's step.

    Matrices are the tensors of two axes; with `flatten` those of more are, too, all but the first axis taken as one.
    `orthogonalize` false gives a matrix AdamW's step: for a group of embeddings. The adam_* fields are of that
    step; `adam_lr` does not follow a schedule of `lr`. `momentum_form` "ema" is a mean of the gradients, "heavy_ball" a
    sum; `bias_correction` corrects the mean. `adjust_lr_fn` scales a matrix's step by its shape (A, B): "original"
    √max(1, A/B), "transposed" √max(1, B/A), "match_rms_adamw" 0.2 √max(A, B). `eps` is the least norm that is
    divided by, or with `eps_added` added to it.
    """

    kind: ClassVar[str] = "muon"
    formula: ClassVar[str] = (
        r"m \leftarrow \mu m + (1-\mu) g,\quad X_0 = \frac{(1-\mu) g + \mu m}{\lVert\cdot\rVert_F},\quad "
        r"X \leftarrow a X + b (X X^{\top}) X + c (X X^{\top})^2 X,\quad u = -\eta\, s X_k - \eta\lambda\theta"
    )
    source: ClassVar[str] = "Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks"
    url: ClassVar[str] = "https://kellerjordan.github.io/posts/muon/"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults; it iterates in bfloat16, here the session's dtype does. It takes matrices alone.",
        "Jordan's code: eps_added, flatten, weight_decay 0, lr 0.02, adam_lr 3e-4, adam_beta2 0.95, adam_eps 1e-10; "
        "its first version: momentum_form 'heavy_ball', which under the norm is the same but for eps.",
        "optax: bias_correction, eps_added with eps 1e-8, adjust_lr_fn 'transposed', weight_decay 0; its Adam has "
        "Nesterov's step where nesterov is true. Keras: heavy_ball, eps_added, match_rms_adamw.",
    )

    lr: Rate = 1e-3
    weight_decay: NonNegative = 0.1
    momentum: Decay = 0.95
    nesterov: bool = True
    ns_a: float = 3.4445
    ns_b: float = -4.775
    ns_c: float = 2.0315
    ns_steps: Annotated[int, Ge(1), Lt(100)] = 5
    eps: Positive = 1e-7
    adjust_lr_fn: Literal["original", "transposed", "match_rms_adamw", "none"] = "original"
    momentum_form: Literal["ema", "heavy_ball"] = "ema"
    bias_correction: bool = False
    eps_added: bool = False
    flatten: bool = False
    orthogonalize: bool = True
    adam_lr: Rate = 1e-3
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_eps: NonNegative = 1e-8
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def meaning(self) -> Mapping[str, object]:
        return {"momentum_form": self.momentum_form, "orthogonalize": self.orthogonalize, "flatten": self.flatten}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.weight_decay != 0 else ())

    def is_matrix(self, shape: tuple[int, ...]) -> bool:
        return self.orthogonalize and (len(shape) == 2 or (self.flatten and len(shape) > 2))

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        return {"m": Own(shape)} if self.is_matrix(shape) else {"m": Own(shape), "v": Own(shape)}

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        matrix = self.is_matrix(g.shape)
        rate = self.lr if matrix else self.adam_lr
        u = -rate * (self._orthogonal(t, g, state) if matrix else self._adam(t, g, state))
        if p is not None and self.weight_decay != 0:
            u = u - self.weight_decay * (rate if self.decay_scaling == "lr" else 1.0) * p
        return np.asarray(u)

    def _orthogonal(self, t: int, g: Array, state: State) -> Array:
        m, mu = state["m"], self.momentum
        share = 1.0 - mu if self.momentum_form == "ema" else 1.0
        m[...] = mu * m + share * g
        now = 1.0 - math.pow(mu, t) if self.bias_correction else 1.0
        ahead = 1.0 - math.pow(mu, t + 1) if self.bias_correction else 1.0
        d = (share / now) * g + (mu / ahead) * m if self.nesterov else m / now
        d = d.reshape(len(d), math.prod(d.shape[1:]))
        size = length(d)
        # In float64: the least norm may be less than the dtype has.
        x = (d.astype(np.float64) / (size + self.eps if self.eps_added else max(size, self.eps))).astype(g.dtype)
        x = orthogonalized(x, NewtonSchulz(self.ns_a, self.ns_b, self.ns_c, self.ns_steps))
        return np.asarray(self._scale(*d.shape) * x.reshape(g.shape))

    def _scale(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "none" or rows == 0 or columns == 0:
            return 1.0
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns if self.adjust_lr_fn == "original" else columns / rows))

    def _adam(self, t: int, g: Array, state: State) -> Array:
        m, v = state["m"], state["v"]
        m[...] = self.adam_beta1 * m + (1.0 - self.adam_beta1) * g
        v[...] = self.adam_beta2 * v + (1.0 - self.adam_beta2) * g * g
        first, second = 1.0 - math.pow(self.adam_beta1, t), 1.0 - math.pow(self.adam_beta2, t)
        return quotient(m / first, np.sqrt(v / second) + self.adam_eps)


def orthogonalized(x: Array, iteration: NewtonSchulz) -> Array:
    """What the iteration makes of the matrix x (rows, columns), in its dtype."""
    a, b, c, steps = iteration
    rows, columns = x.shape
    wide = x.T if rows > columns else x
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide.T if rows > columns else wide
