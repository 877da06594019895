"""Several contributions as one gradient.

A reducer that is `running` needs no more than a sum, to which contributions are added as they come; every other one
keeps all n of them until the round is over. Those that are `weighted` count a contribution by its weight, the others
count heads: the robust ones are for when a worker may send anything, its weight included.

What is not a number counts as infinitely far from everything, and as greater than every value. Of equals, the first
contribution is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from core.aggregation.columns import (
    blocks,
    combination,
    gathered,
    mean,
    means,
    median,
    middle,
    moved,
    near_one,
    squared_distances,
    unit,
)
from core.bounds import check_fields
from core.kind import Kind
from core.layout import Array

KINDS: dict[str, type["Reducer"]] = {}

Byzantine = Annotated[int, Ge(0)]
# Between them α / ν stays a number that can be added up.
SMALLEST, LARGEST = 1e-290, 1e290


@dataclass(frozen=True)
class Reducer(Kind, registry=KINDS):
    """n flat arrays to one."""

    running: ClassVar[bool] = False  # True: the memory of one gradient; False: of as many as there are contributions
    weighted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def least(self) -> int:
        """The fewest contributions that can be reduced."""
        return 1

    def reduce(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:
        """n arrays (d,) of one dtype, float32 or float64, to a new one in that dtype; n weights > 0.

        Finite where they are (a sum: unless it is itself beyond the dtype). ValueError where n is under `least`.
        """
        if len(stack) < self.least:
            raise ValueError(f"{self.kind} needs at least {self.least} contributions, not {len(stack)}")
        with np.errstate(all="ignore"):
            return self.reduced(stack, weights)

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:
        """The same, for as many as it takes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mean(Reducer):
    """The mean by weight: federated averaging, and plain data parallelism where all weights are 1."""

    kind: ClassVar[str] = "mean"
    formula: ClassVar[str] = r"\bar g = \frac{\sum_i w_i\, g_i}{\sum_i w_i}"
    source: ClassVar[str] = "McMahan et al. 2016, Communication-Efficient Learning of Deep Networks (FedAvg)"
    url: ClassVar[str] = "https://arxiv.org/abs/1602.05629"
    notes: ClassVar[tuple[str, ...]] = (
        "FedAvg: deltas, their number of examples as weight, this, and the optimizer sgd with lr 1.",
        "One contribution that is arbitrary makes the mean arbitrary.",
    )
    running: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:
        return means(stack, weights)


@dataclass(frozen=True)
class Sum(Reducer):
    """The sum by weight: the rate then grows with the number of contributions."""

    kind: ClassVar[str] = "sum"
    formula: ClassVar[str] = r"\bar g = \sum_i w_i\, g_i"
    source: ClassVar[str] = "Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server"
    url: ClassVar[str] = "https://www.usenix.org/conference/osdi14/technical-sessions/presentation/li_mu"
    running: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:
        found = np.empty_like(stack[0])
        for columns in blocks(len(stack), found.size):
            found[columns] = combination(gathered(stack, columns), weights, 1.0)
        return found


@dataclass(frozen=True)
class Median(Reducer):
    """The median, element by element: right while more than half of the contributions are."""

    kind: ClassVar[str] = "median"
    formula: ClassVar[str] = r"\bar g_j = \operatorname{med}_i\; g_{ij}"
    source: ClassVar[str] = "Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"
    url: ClassVar[str] = "https://arxiv.org/abs/1803.01498"
    notes: ClassVar[tuple[str, ...]] = (
        "Of an even number it is the mean of the two in the middle, as NumPy has it; torch.median takes the lower.",
    )

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:  # noqa: ARG002 - it counts heads
        return median(stack)


@dataclass(frozen=True)
class TrimmedMean(Reducer):
    """The mean, element by element, without the `fraction` of the values that is greatest and the one that is least."""

    kind: ClassVar[str] = "trimmed_mean"
    formula: ClassVar[str] = (
        r"\bar g_j = \frac{1}{n - 2k} \sum_{i=k+1}^{n-k} g_{(i)j},\qquad"
        r" g_{(1)j} \le \dots \le g_{(n)j},\quad k = \lfloor \text{fraction} \cdot n \rfloor"
    )
    source: ClassVar[str] = "Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"
    url: ClassVar[str] = "https://arxiv.org/abs/1803.01498"
    notes: ClassVar[tuple[str, ...]] = (
        "`fraction` is that of one side: 0.1 of 20 contributions leaves 16. With fewer than 1/fraction of them nothing "
        "is cut off.",
        "The fraction counts as it is written: 0.29 of 100 are 29, though 0.29 · 100 in binary is a little less.",
    )

    fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.1

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:  # noqa: ARG002 - it counts heads
        cut = self.cut(len(stack))
        found = np.empty_like(stack[0])
        for columns in blocks(len(stack), found.size):
            found[columns] = mean(np.sort(gathered(stack, columns), axis=0)[cut : len(stack) - cut])
        return found

    def cut(self, n: int) -> int:
        """How many of n values are left out on each side."""
        return min(math.floor(round(self.fraction * n, 9)), (n - 1) // 2)


@dataclass(frozen=True)
class Krum(Reducer):
    """The one contribution that is nearest to its n - f - 2 neighbours; `byzantine` (f) of all n may be arbitrary."""

    kind: ClassVar[str] = "krum"
    formula: ClassVar[str] = (
        r"\bar g = g_{i^*},\quad i^* = \arg\min_i s_i,\quad"
        r" s_i = \sum_{j \in N_i} \lVert g_i - g_j \rVert^2,\quad N_i: \text{the } n - f - 2 \text{ nearest to } i"
    )
    source: ClassVar[str] = (
        "Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
    )
    url: ClassVar[str] = "https://arxiv.org/abs/1703.02757"
    notes: ClassVar[tuple[str, ...]] = (
        "It needs 2f + 3 contributions.",
        "Distances come from differences, in float64. Flower's, from ‖a‖² + ‖b‖² - 2 a·b in float32, cancel where the "
        "gradients have much in common.",
    )

    byzantine: Byzantine = 1

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 3

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:  # noqa: ARG002 - it counts heads
        scores = _scores(_neighbours(stack), self.byzantine)
        return stack[int(np.argmin(scores))].copy()


@dataclass(frozen=True)
class MultiKrum(Reducer):
    """The mean of the `select` contributions that Krum scores best; left out, n - f of them."""

    kind: ClassVar[str] = "multi_krum"
    formula: ClassVar[str] = (
        r"\bar g = \frac{1}{m} \sum_{i \in S} g_i,\quad S: \text{the } m \text{ with the least } s_i"
    )
    source: ClassVar[str] = (
        "Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
    )
    url: ClassVar[str] = "https://arxiv.org/abs/1703.02757"
    notes: ClassVar[tuple[str, ...]] = (
        "It needs 2f + 3 contributions, and select + f: more than n - f would take in an arbitrary one for certain.",
        "All are scored once; a `select` of 1 is `krum`.",
    )

    byzantine: Byzantine = 1
    select: Annotated[int, Ge(1)] | None = None

    @property
    def least(self) -> int:
        return max(2 * self.byzantine + 3, (self.select or 0) + self.byzantine)

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:  # noqa: ARG002 - it counts heads
        scores = _scores(_neighbours(stack), self.byzantine)
        best = np.argsort(scores, kind="stable")[: self.select or len(stack) - self.byzantine]
        return means([stack[index] for index in sorted(best)])


@dataclass(frozen=True)
class Bulyan(Reducer):
    """Krum again and again for n - 2f contributions, then of their elements the mean of those near the median.

    `byzantine` (f) of all n may be arbitrary. An arbitrary contribution that is near the others as a whole can still
    have one element that is far off: Krum may take it, here the second part leaves it out.
    """

    kind: ClassVar[str] = "bulyan"
    formula: ClassVar[str] = (
        r"\theta = n - 2f:\quad S \leftarrow S \cup \{\text{Krum of the rest}\} \text{ until } |S| = \theta;\qquad"
        r" \bar g_j = \frac{1}{\theta - 2f} \sum_{i \in M_j} g_{ij},\quad"
        r" M_j: \text{the } \theta - 2f \text{ of } S \text{ nearest to } \operatorname{med}_{i \in S}\, g_{ij}"
    )
    source: ClassVar[str] = "El Mhamdi et al. 2018, The Hidden Vulnerability of Distributed Learning in Byzantium"
    url: ClassVar[str] = "https://arxiv.org/abs/1802.07927"
    notes: ClassVar[tuple[str, ...]] = (
        "It needs 4f + 3 contributions.",
        "Each choice scores what is left anew, by its n' - f - 2 nearest (by one, where that is none). Flower takes "
        "the n - 2f best of one scoring.",
        "Of an even number in S both values in the middle are a median by the paper; here it is their mean.",
    )

    byzantine: Byzantine = 1

    @property
    def least(self) -> int:
        return 4 * self.byzantine + 3

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:  # noqa: ARG002 - it counts heads
        chosen = [stack[index] for index in self.chosen(stack)]
        near = len(chosen) - 2 * self.byzantine
        found = np.empty_like(stack[0])
        for columns in blocks(len(chosen), found.size):
            rows = gathered(chosen, columns)
            # By halves: the difference of two finite numbers may be none.
            away = np.abs(rows * 0.5 - middle(np.sort(rows, axis=0)) * 0.5)
            nearest = np.argsort(away, axis=0, kind="stable")[:near]
            found[columns] = mean(np.take_along_axis(rows, nearest, axis=0))
        return found

    def chosen(self, stack: Sequence[Array]) -> list[int]:
        """The indices of the n - 2f that are chosen, in the order of the contributions."""
        apart = _neighbours(stack)
        left = list(range(len(stack)))
        taken = []
        for _ in range(len(stack) - 2 * self.byzantine):
            scores = _scores(apart[np.ix_(left, left)], self.byzantine)
            taken.append(left.pop(int(np.argmin(scores))))
        return sorted(taken)


@dataclass(frozen=True)
class GeometricMedian(Reducer):
    """The point with the least sum of distances to all, by weight: right while more than half of the weight is.

    By the smoothed Weiszfeld algorithm, which begins at the median of each element (beside it, if a contribution lies
    there) and ends once the slope of the sum (per unit of weight, so from 0 to 1) is at most `tolerance`, or after so
    many `iterations`. Within `smoothing` (ν, in the unit of the gradients) distances count by their squares.
    """

    kind: ClassVar[str] = "geometric_median"
    formula: ClassVar[str] = (
        r"\bar g = \arg\min_z \sum_i w_i \lVert z - g_i \rVert:\qquad z \leftarrow \frac{\sum_i \beta_i\, g_i}"
        r"{\sum_i \beta_i},\quad \beta_i = \frac{w_i}{\max(\nu, \lVert z - g_i \rVert)}"
    )
    source: ClassVar[str] = "Pillutla, Kakade & Harchaoui 2019, Robust Aggregation for Federated Learning (RFA)"
    url: ClassVar[str] = "https://arxiv.org/abs/1912.13445"
    notes: ClassVar[tuple[str, ...]] = (
        "The weights are what the senders say: who may lie about a gradient may lie about its weight.",
        "RFA begins at the mean and ends after a few iterations; the point it goes to is the same.",
        "Gradients that are nearer to each other than `smoothing` have their mean as the median.",
        "Each iteration reads all contributions once. They come near slowly where one contribution is almost the "
        "median itself.",
    )
    weighted: ClassVar[bool] = True

    smoothing: Annotated[float, Gt(0)] = 1e-6
    iterations: Annotated[int, Ge(1), Le(10_000)] = 100
    tolerance: Annotated[float, Ge(0)] = 1e-6

    def reduced(self, stack: Sequence[Array], weights: Sequence[float]) -> Array:
        scale = unit(stack)
        within = min(max(self.smoothing / scale, SMALLEST), LARGEST)
        parts = np.array(near_one(weights))
        parts /= math.fsum(parts)
        point, distances = self._start(stack, 1.0 / scale, parts)
        for _ in range(self.iterations):
            betas = parts / np.maximum(within, distances)
            total = math.fsum(betas)
            if not total:
                break
            distances, way = moved(stack, 1.0 / scale, point, betas / total)
            if total * way <= self.tolerance:  # the slope of the sum, where the point was
                break
        # It lies between the contributions, but by a rounding it may be beyond the greatest number.
        greatest = float(np.finfo(stack[0].dtype).max)
        point *= scale
        return np.clip(point, -greatest, greatest, out=point).astype(stack[0].dtype)

    def _start(self, stack: Sequence[Array], inverse: float, parts: Array) -> tuple[Array, Array]:
        """The median of each element, and its distances (n,).

        Where a contribution lies there, Weiszfeld's first moves are as short as ν, and it could take a hundred of them
        to get away. So the first is by what the others pull, less what is held there (Vardi & Zhang 2000).
        """
        point = np.multiply(median(stack), inverse, dtype=np.float64)
        nowhere = np.zeros(len(stack))
        distances, _ = moved(stack, inverse, point, nowhere)
        here = distances == 0.0
        betas = np.where(here, 0.0, parts / distances)
        total = math.fsum(betas)
        if not here.any() or not total:
            return point, distances
        median_of_each = point.copy()
        _, way = moved(stack, inverse, point, betas / total)
        held, pull = math.fsum(parts[here]), total * way
        point -= median_of_each
        point *= 1.0 - held / pull if held < pull else 0.0
        point += median_of_each
        return point, moved(stack, inverse, point, nowhere)[0]


def _neighbours(stack: Sequence[Array]) -> Array:
    """Squared distances (n, n); none is a neighbour of itself."""
    found = squared_distances(stack)
    np.fill_diagonal(found, np.inf)
    return found


def _scores(apart: Array, byzantine: int) -> Array:
    """Krum's score of each of n, (n,): the sum of the squared distances `apart` (n, n) to its n - f - 2 nearest.

    At least to one: else the last that Bulyan chooses, of 3 if f is 1, would be the first of them, wherever it lies.
    """
    near = max(1, len(apart) - byzantine - 2)
    scores: Array = np.add.reduce(np.sort(apart, axis=1)[:, :near], axis=1)
    return scores
