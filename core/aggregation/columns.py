"""Several flat arrays side by side, block by block of their columns.

All sums are in float64 and in one fixed order, so that they have the same bits everywhere. Of n arrays of d elements
there is never a copy in float64, only one of a block: `blocks` makes them narrower the more arrays there are.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from core.layout import Array
from core.sums import BLOCK

# Elements of all arrays together in one block: 2 MiB in float64, so that the passes over it stay in the cache.
MOST = 2**18
FAR = 1000  # of the exponents of a unit, so that its inverse is a normal number, too


def blocks(count: int, size: int) -> Iterator[slice]:
    """The columns 0 … size - 1 of `count` arrays, block by block."""
    width = min(BLOCK, max(1, MOST // count))
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def gathered(stack: Sequence[Array], columns: slice) -> Array:
    """A copy of some columns of n arrays, (n, width), in their dtype."""
    rows = np.stack([array[columns] for array in stack])
    # -0 becomes 0: the two are equal, so which of them is in the middle depends on how a machine sorts.
    rows += rows.dtype.type(0)
    return rows


def combination(rows: Array, weights: Sequence[float], divisor: float) -> Array:
    """Σ wᵢ rowsᵢ / divisor for rows (n, width), as float64 (width,).

    Infinite only where that, or a row, is: not where a product or a part of the sum leaves float64.
    """
    found: Array = _sum(rows, weights) / divisor
    beyond = ~np.isfinite(found)
    if beyond.any():
        exponent = math.frexp(math.fsum(map(abs, weights)))[1] + 1
        smaller = [math.ldexp(weight, -exponent) for weight in weights]
        found[beyond] = np.ldexp(_sum(rows[:, beyond], smaller) / divisor, exponent)
    return found


def mean(rows: Array, weights: Sequence[float] | None = None) -> Array:
    """The mean of rows (n, width) by `weights` (all 1 if left out), as float64; within what the rows reach."""
    parts = [1.0] * len(rows) if weights is None else near_one(weights)
    found = combination(rows, parts, math.fsum(parts))
    beyond = ~np.isfinite(found)
    if beyond.any():  # rounded beyond the greatest number
        within = rows[:, beyond].astype(np.float64)
        found[beyond] = np.clip(found[beyond], within.min(axis=0), within.max(axis=0))
    return found


def middle(ordered: Array) -> Array:
    """The median of rows (n, width) that are sorted along the first axis, float64; of an even n the mean of two."""
    half, odd = divmod(len(ordered), 2)
    return ordered[half].astype(np.float64) if odd else mean(ordered[half - 1 : half + 1])


def median(stack: Sequence[Array]) -> Array:
    """The median of n arrays (d,), element by element, in their dtype."""
    found = np.empty_like(stack[0])
    for columns in blocks(len(stack), found.size):
        found[columns] = middle(np.sort(gathered(stack, columns), axis=0))
    return found


def means(stack: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    """The `mean` of n arrays (d,), element by element, in their dtype."""
    found = np.empty_like(stack[0])
    for columns in blocks(len(stack), found.size):
        found[columns] = mean(gathered(stack, columns), weights)
    return found


def near_one(weights: Sequence[float]) -> list[float]:
    """Positive weights times a power of two, the greatest of them from 1 to 2: their sum is no infinity."""
    exponent = math.frexp(max(weights))[1] - 1
    return [math.ldexp(weight, -exponent) for weight in weights]


def unit(stack: Sequence[Array]) -> float:
    """A power of two to measure n arrays by, so that the squares of what most of them are do not leave float64.

    It is that of the median of their greatest elements, which fewer than half of them cannot shift. Squares of
    float32 stay in float64 anyhow, and their unit is 1.
    """
    if stack[0].dtype != np.float64:
        return 1.0
    greatest = sorted(_greatest(array) for array in stack)[(len(stack) - 1) // 2]
    if not 0.0 < greatest < math.inf:
        return 1.0
    return math.ldexp(1.0, max(-FAR, min(FAR, math.frexp(greatest)[1])))


def squared_distances(stack: Sequence[Array]) -> Array:
    """‖aᵢ - aⱼ‖², (n, n), in units of `unit` squared; infinite where it leaves float64 or is not a number.

    From the differences: ‖a‖² + ‖b‖² - 2 a·b is faster and cancels, down to negative numbers.
    """
    n = len(stack)
    inverse = 1.0 / unit(stack)
    found = np.zeros((n, n))
    for columns in blocks(n, stack[0].size):
        rows = np.multiply(gathered(stack, columns), inverse, dtype=np.float64)
        for index in range(n - 1):
            apart = rows[index + 1 :] - rows[index]
            apart *= apart
            found[index, index + 1 :] += np.add.reduce(apart, axis=1)
    found += found.T
    found[np.isnan(found)] = np.inf
    return found


def moved(stack: Sequence[Array], inverse: float, point: Array, shares: Array) -> tuple[Array, float]:
    """Moves `point` (d,) by Σ shareᵢ (aᵢ - point) in place, for arrays aᵢ times `inverse`, in one pass over them.

    Gives its distances (n,) to all from where it is then, and how far it went. From the differences: the sum of
    shareᵢ · aᵢ would round away what is small beside what the arrays have in common.
    """
    squares = np.zeros(len(stack))
    way = 0.0
    for columns in blocks(len(stack), point.size):
        here = point[columns]
        rows = np.multiply(gathered(stack, columns), inverse, dtype=np.float64)
        move = np.zeros(here.size)
        for row, share in zip(rows, shares, strict=True):
            if share:  # one that is infinitely far has none
                move += share * (row - here)
        here += move
        way += float(np.add.reduce(move * move))
        rows -= here
        rows *= rows
        squares += np.add.reduce(rows, axis=1)
    squares[np.isnan(squares)] = np.inf
    return np.sqrt(squares), math.sqrt(way)


def _sum(rows: Array, weights: Sequence[float]) -> Array:
    found = np.zeros(rows.shape[1])
    for row, weight in zip(rows, weights, strict=True):
        found += np.multiply(row, weight, dtype=np.float64)
    return found


def _greatest(array: Array) -> float:
    """The greatest absolute value; infinite if there is a NaN."""
    if not array.size:
        return 0.0
    found = max(abs(float(array.min())), abs(float(array.max())))
    return math.inf if math.isnan(found) else found
