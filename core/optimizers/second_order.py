"""Methods that use the curvature."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.errors import HessianRequired, InvalidRecipe
from core.hyperparameters import NonNegative, Rate, schedules_of
from core.layout import Array
from core.optimizers.rule import Beside, State, Whole


@dataclass(frozen=True)
class Newton(Whole):
    """Newton's method: the step size comes from the curvature, where it is positive.

    The Hessian H of the step is taken apart into eigenvectors. Along one of positive curvature the step
    is -c/(curvature + damping), c being the gradient along it. Where the curvature is negative or vanishes,
    `negative_curvature` decides: "gradient" takes -lr · c, "absolute" takes -c/(|curvature| + damping),
    and "damp" lifts all curvatures until the lowest is `damping`.
    """

    kind: ClassVar[str] = "newton"
    formula: ClassVar[str] = r"u = -(H + \delta I)^{-1} g"
    source: ClassVar[str] = "Nocedal & Wright 2006, Numerical Optimization, section 3.4"
    url: ClassVar[str] = "https://doi.org/10.1007/978-0-387-40065-5"
    notes: ClassVar[tuple[str, ...]] = (
        "A flat direction (curvature below the rounding error of the largest) is treated as a negative one; "
        "'absolute' then takes the gradient step, since there is nothing to divide by.",
    )

    limit: ClassVar[int | None] = 4096

    lr: Rate = 1e-3
    damping: NonNegative = 0.0
    negative_curvature: Literal["gradient", "absolute", "damp"] = "gradient"

    def check(self) -> None:
        damping = schedules_of(self).get("damping")
        lowest = self.damping if damping is None else min(damping.span())
        if self.negative_curvature == "damp" and lowest == 0:
            raise InvalidRecipe("/damping", "negative_curvature 'damp' needs a damping greater than 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array:
        hessian, g = beside.hessian, g.astype(np.float64)
        if hessian is None:
            raise HessianRequired
        curvatures, vectors = np.linalg.eigh(hessian / 2 + hessian.T / 2)
        along = vectors.T @ g
        flat = len(g) * np.finfo(np.float64).eps * np.abs(curvatures).max(initial=0.0)
        if self.negative_curvature == "damp":
            lift = max(0.0, -curvatures.min(initial=0.0)) + self.damping
            damped: Array = -(vectors @ (along / (curvatures + lift)))
            return damped
        size = np.abs(curvatures) if self.negative_curvature == "absolute" else curvatures
        curved = size > flat
        divisor = np.where(curved, size + self.damping, 1.0)
        newton: Array = -(vectors @ np.where(curved, along / divisor, 0.0))
        newton -= beside.lr * (vectors @ np.where(curved, 0.0, along))
        return newton
