"""The server's step of federated learning: adaptive methods on what a round of clients comes back with.

The gradient here is the mean of what the clients started from minus what they came back with, -Δ in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.errors import InvalidRecipe
from core.hyperparameters import Decay, Positive, Rate, schedules_of
from core.layout import Array
from core.optimizers.rule import ElementWise, Formula


@dataclass(frozen=True)
class Server(ElementWise):
    """What the three have in common: no bias correction, and v starts from tau².

    `start`: "zero" starts v from 0.
    """

    source: ClassVar[str] = "Reddi et al. 2020, Adaptive Federated Optimization, Algorithm 2"
    url: ClassVar[str] = "https://arxiv.org/abs/2003.00295"
    notes: ClassVar[tuple[str, ...]] = (
        "Flower: start 'zero'. Its newer FedAdam corrects the bias, by the powers t + 1; the paper's does not.",
    )

    lr: Rate = 1e-2
    tau: Positive = 1e-3
    beta1: Decay = 0.9
    start: Literal["tau", "zero"] = "tau"

    def check(self) -> None:
        if self.start == "tau" and "tau" in schedules_of(self):
            raise InvalidRecipe("/tau", "v starts from its square: no schedule, unless start is 'zero'")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v")

    def initial(self, slot: str) -> float:
        return self.tau * self.tau if slot == "v" and self.start == "tau" else 0.0


@dataclass(frozen=True)
class FedAdagrad(Server):
    """Adagrad as a server's step, without momentum unless `beta1` says so.

    v starts from tau², or with `start` "zero" from 0.
    """

    kind: ClassVar[str] = "fedadagrad"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad v \leftarrow v + g^2,\quad "
        r"u = -\eta\,\frac{m}{\sqrt{v} + \tau},\quad v_0 = \tau^2"
    )
    compact: ClassVar[bool] = False  # v is a sum

    beta1: Decay = 0.0

    @property
    def update(self) -> Formula:
        return fedadagrad

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.beta1, 1.0 - self.beta1, self.lr, self.tau


def fedadagrad(
    g: Array, m: Array, v: Array, beta1: Array, rest1: Array, lr: Array, tau: Array
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = v + g * g
    return -lr * m / (np.sqrt(v) + tau), m, v


@dataclass(frozen=True)
class FedAdam(Server):
    """Adam as a server's step, without bias correction.

    v starts from tau², or with `start` "zero" from 0.
    """

    kind: ClassVar[str] = "fedadam"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad "
        r"u = -\eta\,\frac{m}{\sqrt{v} + \tau},\quad v_0 = \tau^2"
    )

    beta2: Decay = 0.99

    @property
    def update(self) -> Formula:
        return fedadam

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.lr, self.tau


def fedadam(
    g: Array, m: Array, v: Array, beta1: Array, rest1: Array, beta2: Array, rest2: Array, lr: Array, tau: Array
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return -lr * m / (np.sqrt(v) + tau), m, v


@dataclass(frozen=True)
class FedYogi(Server):
    """Yogi as a server's step, without bias correction: v moves by the same share of g² whichever way it goes.

    v starts from tau², or with `start` "zero" from 0.
    """

    kind: ClassVar[str] = "fedyogi"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta_1 m + (1-\beta_1) g,\quad "
        r"v \leftarrow v - (1-\beta_2)\, g^2 \operatorname{sign}(v - g^2),\quad "
        r"u = -\eta\,\frac{m}{\sqrt{v} + \tau},\quad v_0 = \tau^2"
    )
    compact: ClassVar[bool] = False  # where g² is small beside v, what is taken from v is lost in bfloat16

    beta2: Decay = 0.99

    @property
    def update(self) -> Formula:
        return fedyogi

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.beta1, 1.0 - self.beta1, 1.0 - self.beta2, self.lr, self.tau


def fedyogi(
    g: Array, m: Array, v: Array, beta1: Array, rest1: Array, rest2: Array, lr: Array, tau: Array
) -> tuple[Array, ...]:  # fmt: skip
    m = beta1 * m + rest1 * g
    square = g * g
    v = v - rest2 * square * np.sign(v - square)
    return -lr * m / (np.sqrt(v) + tau), m, v
