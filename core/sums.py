"""Sums over whole arrays: in float64, block by block, in one fixed order.

So they have the same bits everywhere, whatever the machine; a dot product by BLAS has not.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from core.layout import Array

BLOCK = 16_384
# So many blocks go through NumPy at once: a thread lets go of the interpreter, and waits for it, with each call.
AT_ONCE = 2 * BLOCK
# A norm below it has lost digits, since squares as small have.
LEAST = 1e-140


def norm(arrays: Sequence[Array]) -> float:
    """The L2 norm over all `arrays`, flat; NaN or infinite where an element, or the sum of the squares, is."""
    found = 0.0
    with np.errstate(all="ignore"):
        for array in arrays:  # not by `sum`, which from Python 3.12 on rounds otherwise
            found += _sum(array, _square)
        return math.sqrt(found)


def length(arrays: Sequence[Array]) -> float:
    """The same, also where the squares of finite elements overflow or vanish in float64."""
    found = norm(arrays)
    if LEAST < found < np.inf:
        return found
    largest = float(np.max([np.max(np.abs(array), initial=0.0) for array in arrays], initial=0.0))
    if not 0.0 < largest < np.inf:
        return largest
    return largest * norm([array.astype(np.float64) / largest for array in arrays])


def magnitude(array: Array) -> float:
    """The sum of the absolute values of a flat array."""
    return _sum(array, _absolute)


def dot(a: Array, b: Array) -> float:
    """The sum of a · b, both flat."""
    found = 0.0
    for start in range(0, a.size, BLOCK):
        first = a[start : start + BLOCK].astype(np.float64, copy=False)
        found += float(np.add.reduce(first * b[start : start + BLOCK]))
    return found


def _square(block: Array, out: Array | None) -> Array:
    squares: Array = np.multiply(block, block, out=out)
    return squares


def _absolute(block: Array, out: Array | None) -> Array:
    found: Array = np.abs(block, out=out)
    return found


def _sum(array: Array, of: Callable[[Array, Array | None], Array]) -> float:
    found = 0.0
    for start in range(0, array.size, AT_ONCE):
        part = array[start : start + AT_ONCE]
        wide = part.astype(np.float64, copy=False)
        terms = of(wide, None if wide is part else wide)
        whole = terms.size - terms.size % BLOCK
        if whole:
            for each in np.add.reduce(terms[:whole].reshape(-1, BLOCK), axis=1).tolist():
                found += each
        if whole < terms.size:
            found += float(np.add.reduce(terms[whole:]))
    return found
