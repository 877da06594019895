"""A rate of its own for each parameter, from the squares of its gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.errors import InvalidRecipe
from core.hyperparameters import Decay, NonNegative, Rate, refuse_schedules
from core.layout import Array
from core.optimizers.rule import Beside, ElementWise, Family, Formula, Own, State, Whole, epsilons


@dataclass(frozen=True)
class Adagrad(ElementWise, Whole):
    """The sum of squared gradients, diagonal or as a full matrix.

    `eps_inside` puts epsilon under the root. `matrix`: "full" keeps the sum of g gᵀ over all n ≤ 4096
    parameters and divides by its matrix square root; `eps` is then added to its diagonal.
    `lr_decay` divides the rate by 1 + lr_decay · (t - 1).
    """

    kind: ClassVar[str] = "adagrad"
    formula: ClassVar[str] = (
        r"G \leftarrow G + g^2,\quad u = -\frac{\eta\, g}{\sqrt{G} + \varepsilon};\qquad "
        r"\text{full: } G \leftarrow G + g g^{\top},\ u = -\eta\,(G + \varepsilon I)^{-1/2} g"
    )
    source: ClassVar[str] = "Duchi, Hazan & Singer 2011, Adaptive Subgradient Methods"
    url: ClassVar[str] = "https://jmlr.org/papers/v12/duchi11a.html"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. optax, Keras: eps_inside true, eps 1e-7, initial_accumulator 0.1.",
    )
    lazy_rows: ClassVar[bool] = True
    limit: ClassVar[int | None] = 4096

    lr: Rate = 1e-2
    eps: NonNegative = 1e-10
    initial_accumulator: NonNegative = 0.0
    lr_decay: NonNegative = 0.0
    eps_inside: bool = False
    matrix: Literal["diagonal", "full"] = "diagonal"

    def check(self) -> None:
        refuse_schedules(self, "initial_accumulator")
        if self.matrix == "full" and self.eps_inside:
            raise InvalidRecipe("/eps_inside", "as a full matrix eps is always inside: leave it false")

    @property
    def family(self) -> Family:
        return "whole" if self.matrix == "full" else "elements"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("G",) if self.matrix == "diagonal" else ()

    def own(self, n: int) -> dict[str, Own]:
        end = np.finfo(np.float64).max  # it is finite: an infinity has no eigenvectors
        full = Own((n, n), self.initial_accumulator, square=True, least=-end, most=end)
        return {"G": full} if self.matrix == "full" else {}

    def initial(self, slot: str) -> float:
        return self.initial_accumulator

    @property
    def update(self) -> Formula:
        return adagrad

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.rate(t), *epsilons(self.eps, self.eps_inside)

    def rate(self, t: int) -> float:
        return self.lr / (1.0 + (t - 1) * self.lr_decay)

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array:
        # Where the sum is beyond the dtype it stops at its end.
        matrix, g = state["G"], g.astype(np.float64)
        end = np.finfo(matrix.dtype).max
        matrix[...] = np.clip(matrix.astype(np.float64) + np.outer(g, g), -end, end)
        values, vectors = np.linalg.eigh(matrix.astype(np.float64))
        # Directions that no gradient has had yet have the eigenvalue 0, or a rounding error beside it. What g has
        # along them is rounding error too, and must not be divided by the root of one.
        error = len(g) * np.finfo(matrix.dtype).eps * values.max(initial=0.0)
        squares = np.maximum(values, 0.0) + self.eps
        along = vectors.T @ g
        scaled = np.divide(along, np.sqrt(squares), out=np.zeros_like(along), where=squares > error)
        update: Array = -beside.lr * (vectors @ scaled)
        return update


def adagrad(g: Array, total: Array, lr: Array, eps_inside: Array, eps_outside: Array) -> tuple[Array, Array]:
    total = total + g * g
    return -lr * g / (np.sqrt(total + eps_inside) + eps_outside), total


@dataclass(frozen=True)
class Adadelta(ElementWise):
    """Steps in proportion to the root mean square of the steps before, over that of the gradients.

    Epsilon is under both roots; without it no step would ever be the first.
    """

    kind: ClassVar[str] = "adadelta"
    formula: ClassVar[str] = (
        r"s \leftarrow \rho s + (1-\rho)\, g^2,\quad "
        r"\delta = \frac{\sqrt{d + \varepsilon}}{\sqrt{s + \varepsilon}}\, g,\quad "
        r"d \leftarrow \rho d + (1-\rho)\, \delta^2,\quad u = -\eta\, \delta"
    )
    source: ClassVar[str] = "Zeiler 2012, ADADELTA: An Adaptive Learning Rate Method"
    url: ClassVar[str] = "https://arxiv.org/abs/1212.5701"
    notes: ClassVar[tuple[str, ...]] = (
        "torch, optax: the defaults. Keras: lr 1e-3, rho 0.95, eps 1e-7. The paper has no rate: lr 1.",
    )

    lr: Rate = 1.0
    rho: Decay = 0.9
    eps: NonNegative = 1e-6

    @property
    def slots(self) -> tuple[str, ...]:
        return ("s", "d")

    @property
    def update(self) -> Formula:
        return adadelta

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.rho, 1.0 - self.rho, self.eps, self.lr


def adadelta(g: Array, s: Array, d: Array, rho: Array, rest: Array, eps: Array, lr: Array) -> tuple[Array, ...]:
    s = rho * s + rest * g * g
    delta = np.sqrt(d + eps) / np.sqrt(s + eps) * g
    return -lr * delta, s, rho * d + rest * delta * delta


@dataclass(frozen=True)
class RmsProp(ElementWise):
    """A running mean of squared gradients; `centered` takes the variance instead; with a velocity if asked.

    `eps_inside` puts epsilon under the root; `lr_in_velocity` the rate inside the velocity. Rounding may make
    the variance negative (a steady gradient has none); its magnitude is taken, since a root of it would be NaN.
    """

    kind: ClassVar[str] = "rmsprop"
    formula: ClassVar[str] = (
        r"s \leftarrow \alpha s + (1-\alpha)\, g^2,\quad u = -\frac{\eta\, g}{\sqrt{s} + \varepsilon};\qquad "
        r"\text{centered: } \sqrt{s - \bar g^2};\qquad "
        r"\text{momentum: } v \leftarrow \mu v + \frac{g}{\sqrt{s} + \varepsilon},\ u = -\eta v"
    )
    source: ClassVar[str] = "Tieleman & Hinton 2012, Lecture 6.5; Graves 2013 (centered)"
    url: ClassVar[str] = "https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. optax: alpha 0.9, eps_inside true, lr_in_velocity true. Keras: as optax, eps 1e-7.",
        "Some pages average g instead of g², or write the velocity where the mean square belongs. Neither is RMSProp.",
    )

    lr: Rate = 1e-2
    alpha: Decay = 0.99
    eps: NonNegative = 1e-8
    momentum: Decay = 0.0
    centered: bool = False
    eps_inside: bool = False
    lr_in_velocity: bool = False

    @property
    def meaning(self) -> Mapping[str, object]:
        return {"lr_in_velocity": self.lr_in_velocity} if self.momentum != 0 else {}

    @property
    def slots(self) -> tuple[str, ...]:
        mean = ("mean",) if self.centered else ()
        velocity = ("v",) if self.momentum != 0 else ()
        return "s", *mean, *velocity

    @property
    def update(self) -> Formula:
        forms = {1: rmsprop, 2: rmsprop_centered if self.centered else rmsprop_velocity}
        return forms.get(len(self.slots), rmsprop_centered_velocity)

    def coefficients(self, t: int) -> tuple[float, ...]:
        rates = (self.lr, 1.0) if self.lr_in_velocity else (1.0, self.lr)
        eps = epsilons(self.eps, self.eps_inside)
        return self.alpha, 1.0 - self.alpha, *eps, self.momentum, *rates


def rmsprop(
    g: Array, s: Array, alpha: Array, rest: Array, inside: Array, outside: Array, mu: Array, to_v: Array, lr: Array
) -> tuple[Array, ...]:  # fmt: skip
    s = alpha * s + rest * g * g
    return -lr * (to_v * g / (np.sqrt(s + inside) + outside)), s


def rmsprop_centered(
    g: Array, s: Array, mean: Array,
    alpha: Array, rest: Array, inside: Array, outside: Array, mu: Array, to_v: Array, lr: Array,
) -> tuple[Array, ...]:  # fmt: skip
    s = alpha * s + rest * g * g
    mean = alpha * mean + rest * g
    return -lr * (to_v * g / (np.sqrt(np.abs(s - mean * mean) + inside) + outside)), s, mean


def rmsprop_velocity(
    g: Array, s: Array, v: Array,
    alpha: Array, rest: Array, inside: Array, outside: Array, mu: Array, to_v: Array, lr: Array,
) -> tuple[Array, ...]:  # fmt: skip
    s = alpha * s + rest * g * g
    v = mu * v + to_v * g / (np.sqrt(s + inside) + outside)
    return -lr * v, s, v


def rmsprop_centered_velocity(
    g: Array, s: Array, mean: Array, v: Array,
    alpha: Array, rest: Array, inside: Array, outside: Array, mu: Array, to_v: Array, lr: Array,
) -> tuple[Array, ...]:  # fmt: skip
    s = alpha * s + rest * g * g
    mean = alpha * mean + rest * g
    v = mu * v + to_v * g / (np.sqrt(np.abs(s - mean * mean) + inside) + outside)
    return -lr * v, s, mean, v
