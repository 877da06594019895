"""Parameters that are kept in a convex set: after each update they are put at the nearest point of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from core.errors import InvalidRecipe
from core.hyperparameters import Positive
from core.layout import Array
from core.schedules import Schedule
from core.transforms.norms import by_unit, lengths
from core.transforms.transform import Piece, Transform


@dataclass(frozen=True)
class Project(Transform):
    """Puts the parameters at the nearest point of a set after each update: projected gradient descent.

    `onto`: the "simplex" (no element below 0, their sum `radius`); the "l1_ball" or "l2_ball" of `radius` around 0; the
    "box" from `low` to `high`; or "non_negative". `over` says of what: each "tensor" as a whole, or its "rows" (slices
    along the first axis; a vector is one row). Frozen tensors, and those that a step leaves out, stay as they are.
    """

    kind: ClassVar[str] = "project"
    formula: ClassVar[str] = r"\theta \leftarrow \arg\min_{x \in C} \lVert x - (\theta + u) \rVert"
    source: ClassVar[str] = "Goldstein 1964; Levitin & Polyak 1966; Duchi et al. 2008 (simplex and L1 ball)"
    url: ClassVar[str] = "https://doi.org/10.1145/1390156.1390191"
    notes: ClassVar[tuple[str, ...]] = (
        "optax.projections are over all tensors as one. torch's max_norm of an embedding is the l2_ball over rows; "
        "Keras's MaxNorm is over columns.",
    )
    keeps_rows: ClassVar[bool] = True

    onto: Literal["simplex", "l1_ball", "l2_ball", "box", "non_negative"]
    radius: Positive = 1.0
    low: float = 0.0
    high: float = 1.0
    over: Literal["tensor", "rows"] = "tensor"

    def check(self) -> None:
        if _span(self.low)[1] > _span(self.high)[0]:
            raise InvalidRecipe("/low", "it must not be above high")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"})

    @property
    def follows(self) -> bool:
        return True

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        return True

    def after(self, shape: tuple[int, ...], p: Array) -> Array:
        number = p.dtype.type
        if not p.size:
            return p
        if self.onto == "box":
            return np.clip(p, number(self.low), number(self.high))
        if self.onto == "non_negative":
            return np.clip(p, number(0), None)
        rows = (by_unit(p, shape, "first") if self.over == "rows" else p.reshape(1, -1)).astype(np.float64)
        nearest = {"simplex": onto_simplex, "l1_ball": onto_l1_ball, "l2_ball": onto_l2_ball}[self.onto]
        return nearest(rows, self.radius).astype(p.dtype).reshape(-1)


def _span(bound: float | Schedule) -> tuple[float, float]:
    return bound.span() if isinstance(bound, Schedule) else (bound, bound)


def onto_simplex(rows: Array, radius: float) -> Array:
    """The nearest point of the simplex to each row of (k, m), m > 0: max(x - θ, 0), with θ from the sorted row."""
    # All elements moved by the same amount have the same projection; so sums of large ones need not cancel.
    rows = rows - rows.max(axis=1, keepdims=True)
    # The largest element, now 0, ends at `radius` at most, so that what lies lower by that much ends at 0. Sorting the
    # others alone takes 0.4 s in the place of 3 for 10 M parameters.
    most = max(int(np.count_nonzero(rows > -radius, axis=1).max()), 1)
    first = rows.shape[1] - most
    falling = np.sort(np.partition(rows, first, axis=1)[:, first:], axis=1)[:, ::-1]
    excess = np.cumsum(falling, axis=1) - radius
    counts = np.arange(1.0, most + 1.0)
    # The elements that stay above 0 are the largest ones, as far as this holds. It does for the first.
    support = np.maximum(np.count_nonzero(falling * counts > excess, axis=1), 1)
    threshold = np.take_along_axis(excess, support[:, None] - 1, axis=1) / support[:, None]
    nearest: Array = np.maximum(rows - threshold, 0.0)
    return nearest


def onto_l1_ball(rows: Array, radius: float) -> Array:
    """The nearest point of the L1 ball to each row of (k, m): itself if inside, else by way of the simplex."""
    sizes = np.abs(rows)
    outside = ~(np.add.reduce(sizes, axis=1) <= radius)
    nearest = rows.copy()
    if outside.any():
        nearest[outside] = np.sign(rows[outside]) * onto_simplex(sizes[outside], radius)
    return nearest


def onto_l2_ball(rows: Array, radius: float) -> Array:
    """The nearest point of the L2 ball to each row of (k, m): scaled down where it is outside."""
    found = lengths(rows)
    factors = np.divide(radius, found, out=np.ones_like(found), where=found > radius)
    nearest: Array = rows * factors[:, None]
    return nearest
