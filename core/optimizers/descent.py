"""Gradient descent, and gradient descent with a velocity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from core.errors import InvalidRecipe
from core.hyperparameters import Decay, Rate
from core.layout import Array
from core.optimizers.rule import ElementWise, Formula, State


@dataclass(frozen=True)
class Sgd(ElementWise):
    """Gradient descent: a step against the gradient."""

    kind: ClassVar[str] = "sgd"
    formula: ClassVar[str] = r"u = -\eta\, g"
    source: ClassVar[str] = "Robbins & Monro 1951, A Stochastic Approximation Method"
    url: ClassVar[str] = "https://doi.org/10.1214/aoms/1177729586"
    lazy_rows: ClassVar[bool] = True

    lr: Rate = 1e-3

    @property
    def update(self) -> Formula:
        return descend

    def coefficients(self, t: int) -> tuple[float, ...]:
        return (self.lr,)


def descend(g: Array, lr: Array) -> tuple[Array]:
    return (-lr * g,)


@dataclass(frozen=True)
class Momentum(ElementWise):
    """Gradient descent with a velocity: heavy ball, exponential average, and both Nesterov forms.

    `dampening` equal to `momentum` makes the velocity an exponential average. `lr_in_velocity` puts the
    rate inside it. `nesterov`: true is the rearranged form of torch; "lookahead" is the published one, with
    the rate inside the velocity, where the gradient is taken at the point that `at=next` hands out.
    `first_step`: "gradient" starts the velocity with the whole first gradient, as torch does.
    """

    kind: ClassVar[str] = "momentum"
    formula: ClassVar[str] = (
        r"v \leftarrow \mu v + (1-\tau)\, g,\quad u = -\eta v;\qquad "
        r"\text{nesterov: } u = -\eta (g + \mu v);\qquad "
        r"\text{lookahead: } v \leftarrow \mu v + \eta \nabla J(\theta - \mu v),\ u = -v"
    )
    source: ClassVar[str] = "Polyak 1964; Nesterov 1983; Sutskever et al. 2013"
    url: ClassVar[str] = "https://proceedings.mlr.press/v28/sutskever13.html"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: dampening 0 and first_step 'gradient'; Keras: lr_in_velocity true; optax: dampening 0.",
        "With a rate that changes, the rate inside and outside the velocity are different methods.",
    )

    lr: Rate = 1e-3
    momentum: Decay = 0.9
    dampening: Decay = 0.0
    nesterov: bool | Literal["lookahead"] = False
    lr_in_velocity: bool = False
    first_step: Literal["damped", "gradient"] = "damped"

    def check(self) -> None:
        if self.nesterov is True and self.dampening != 0:
            raise InvalidRecipe("/dampening", "nesterov true is defined for dampening 0 alone")

    @property
    def meaning(self) -> Mapping[str, object]:
        return {"lr_in_velocity": self.lr_in_velocity or self.nesterov == "lookahead"}

    @property
    def slots(self) -> tuple[str, ...]:
        return ("v",)

    @property
    def update(self) -> Formula:
        return nesterov if self.nesterov is True else heavy_ball

    @property
    def hands_out(self) -> bool:
        return self.nesterov == "lookahead"

    @property
    def held_only(self) -> bool:
        return False  # a client that holds the parameters knows v too: it is the last update, turned round

    def point(self, t: int, p: Array, state: State) -> Array:
        ahead: Array = p - self.momentum * state["v"] if self.hands_out else p
        return ahead

    def coefficients(self, t: int) -> tuple[float, ...]:
        inside = self.lr_in_velocity or self.nesterov == "lookahead"
        undamped = t == 1 and self.first_step == "gradient"
        share = 1.0 if undamped else 1.0 - self.dampening
        if inside:
            return self.momentum, share * self.lr, 1.0
        return self.momentum, share, self.lr


def heavy_ball(g: Array, v: Array, momentum: Array, share: Array, lr: Array) -> tuple[Array, Array]:
    v = momentum * v + share * g
    return -lr * v, v


def nesterov(g: Array, v: Array, momentum: Array, share: Array, lr: Array) -> tuple[Array, Array]:
    v = momentum * v + share * g
    return -lr * (share * g + momentum * v), v
