"""Methods that solve a small regularized problem at every step instead of taking a step against the gradient."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from core.hyperparameters import NonNegative, Positive, refuse_schedules
from core.layout import Array
from core.optimizers.rule import ElementWise, Formula

# Less than any quadratic that is not 0 but for ones of denormal gradients; a float32 too.
TINY = 2.0**-126


@dataclass(frozen=True)
class Ftrl(ElementWise):
    """Follow the regularized leader, with a rate per coordinate: L1 gives parameters that are exactly 0.

    The parameters are the minimum of all gradients so far, taken as a linear function, plus the penalties. They
    follow from z and n alone, so the method is meant to start from 0: from elsewhere it moves towards 0 first.
    `l2_shrinkage` is a penalty on the loss, entering by the gradient, where `l2` only steadies the step. Where nothing
    is known of a coordinate yet (n, beta and l2 are 0) it keeps still.
    """

    kind: ClassVar[str] = "ftrl"
    formula: ClassVar[str] = (
        r"\sigma = \frac{\sqrt{n + g^2} - \sqrt{n}}{\eta},\quad "
        r"z \leftarrow z + g + 2\,\text{l2\_shrinkage}\,\theta - \sigma\theta,\quad "
        r"n \leftarrow n + g^2,\quad "
        r"\theta \leftarrow -\frac{z - \mathrm{clip}(z, \pm\lambda_1)}{(\beta + \sqrt{n})/\eta + \lambda_2}"
    )
    source: ClassVar[str] = "McMahan et al. 2013, Ad Click Prediction: a View from the Trenches"
    url: ClassVar[str] = "https://doi.org/10.1145/2487575.2488200"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper: alpha is lr; beta 1 and no accumulator at the start, as in the defaults.",
        "TensorFlow, Keras: initial_accumulator 0.1, beta 0; l2 here is twice their l2_regularization_strength, "
        "l2_shrinkage is theirs. Another power than -1/2 for the rate is not offered.",
        "pytorch_optimizer: beta 0.",
    )
    compact: ClassVar[bool] = False  # both slots are sums over all steps

    lr: Positive = 1e-3
    beta: NonNegative = 1.0
    l1: NonNegative = 0.0
    l2: NonNegative = 0.0
    l2_shrinkage: NonNegative = 0.0
    initial_accumulator: NonNegative = 0.0

    def check(self) -> None:
        refuse_schedules(self, "initial_accumulator")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"})

    @property
    def slots(self) -> tuple[str, ...]:
        return ("z", "n")

    def initial(self, slot: str) -> float:
        return self.initial_accumulator if slot == "n" else 0.0

    @property
    def update(self) -> Formula:
        return follow

    def coefficients(self, t: int) -> tuple[float, ...]:
        return self.lr, self.beta, self.l1, self.l2, 2.0 * self.l2_shrinkage, TINY, 0.0


def follow(
    g: Array, p: Array, z: Array, n: Array,
    lr: Array, beta: Array, l1: Array, l2: Array, pull: Array, tiny: Array, zero: Array,
) -> tuple[Array, ...]:  # fmt: skip
    root = np.sqrt(n + g * g)
    z = z + (g + pull * p) - (root - np.sqrt(n)) / lr * p
    quadratic = (beta + root) / lr + l2
    known = np.sign(quadratic)  # 1, or 0 where there has been no gradient and nothing else steadies the step
    # Adding 0 makes 0.0 of -0.0: which of them is the larger is a matter of the machine.
    leader = (known * (np.minimum(np.maximum(z, -l1), l1) - z) + zero) / np.maximum(quadratic, tiny)
    return leader - known * p, z, n + g * g
