"""Averages over the parameters of the steps so far: what `at=final` hands out.

Both are closed forms of their array `average` and the step, so that nothing else needs to be kept.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from core.hyperparameters import Decay, check_bounds
from core.kind import Kind
from core.layout import Array
from core.sums import BLOCK

KINDS: dict[str, type["Averaging"]] = {}


class Averaging(Kind, registry=KINDS):
    """`average` is (n,) in the session's dtype; p the parameters after step t."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def include(self, average: Array, p: Array, t: int) -> None:
        """Takes the parameters after step t = 1, 2, … into `average`, in place."""
        weight = self.weight(t)
        if not weight:
            return
        share = p.dtype.type(weight)
        with np.errstate(all="ignore"):
            for start in range(0, len(p), BLOCK):
                block = slice(start, start + BLOCK)
                # Not decay · average + share · p: in float32 the two do not add up to 1, and with a decay of
                # 0.9999 the average of a constant would end 1.7e-4 beside it.
                average[block] += share * (p[block] - average[block])

    def weight(self, t: int) -> float:
        """The share of the parameters of step t in the average; the average before it has the rest."""
        raise NotImplementedError

    def result(self, average: Array, p: Array, t: int) -> Array:
        """The averaged parameters after t steps; p itself before anything has been averaged."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ema(Averaging):
    """Exponentially weighted average.

    `start`: "zero" begins at 0 and, with `debias`, divides by 1 - decayᵗ; "first" begins at the first value
    and has nothing to correct.
    """

    kind: ClassVar[str] = "ema"
    formula: ClassVar[str] = r"v \leftarrow \beta v + (1-\beta)\,\theta_t;\qquad \hat v = v / (1-\beta^t)"
    source: ClassVar[str] = "Polyak & Juditsky 1992; Kingma & Ba 2014 (the correction)"
    url: ClassVar[str] = "https://doi.org/10.1137/0330046"

    decay: Decay = 0.999
    debias: bool = True
    start: Literal["zero", "first"] = "zero"

    def weight(self, t: int) -> float:
        return 1.0 if self.start == "first" and t == 1 else 1.0 - self.decay

    def result(self, average: Array, p: Array, t: int) -> Array:
        if t == 0:
            return p
        if self.debias and self.start == "zero":
            corrected: Array = average / p.dtype.type(1.0 - self.decay**t)
            return corrected
        return average


@dataclass(frozen=True)
class Polyak(Averaging):
    """The plain mean of the parameters after step `start` and all later ones."""

    kind: ClassVar[str] = "polyak"
    formula: ClassVar[str] = r"\bar\theta_t = \frac{1}{t-t_0+1}\sum_{i=t_0}^{t}\theta_i"
    source: ClassVar[str] = "Polyak & Juditsky 1992, Acceleration of Stochastic Approximation by Averaging"
    url: ClassVar[str] = "https://doi.org/10.1137/0330046"

    start: Annotated[int, Ge(0)] = 0

    def weight(self, t: int) -> float:
        count = t - max(self.start, 1) + 1
        return 0.0 if count < 1 else 1.0 / count

    def result(self, average: Array, p: Array, t: int) -> Array:
        return p if t < max(self.start, 1) else average
