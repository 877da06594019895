"""Norms that neither overflow nor vanish, and tensors seen as rows of units.

A *unit* is what one output of a layer sees: for torch's layout (output, input, …) a slice along the first axis, for the
one of Keras and JAX (…, input, output) along the last. A vector or a number is one unit.

All sums are in float64 and in one fixed order.
"""

from math import prod
from typing import Literal, TypeAlias

import numpy as np

from core.layout import Array
from core.sums import LEAST, length

Units: TypeAlias = Literal["first", "last"]


def lengths(rows: Array) -> Array:
    """The L2 norm of each row of `rows` (k, m), as float64 (k,)."""
    found: Array = np.sqrt(np.add.reduce(np.multiply(rows, rows, dtype=np.float64), axis=1))
    for index in np.flatnonzero(~((found > LEAST) & (found < np.inf))):
        found[index] = length([rows[index]])
    return found


def scaled(g: Array, factor: float | Array) -> Array:
    """g · factor, worked out in float64 (a factor may be too small for float32), in the dtype of g."""
    return np.multiply(g, factor, out=np.empty_like(g), dtype=np.float64, casting="same_kind")


def divided(g: Array, divisor: float) -> Array:
    """g / divisor, worked out in float64, in the dtype of g."""
    return np.divide(g, divisor, out=np.empty_like(g), dtype=np.float64, casting="same_kind")


def shape_here(shape: tuple[int, ...], rows: Array | None) -> tuple[int, ...]:
    """The shape of the gradient that is there: of the whole tensor, or of its `rows` alone."""
    return shape if rows is None else (len(rows), *shape[1:])


def by_unit(flat: Array, shape: tuple[int, ...], units: Units) -> Array:
    """`flat`, a tensor of this shape, as (number of units, size of one), contiguous."""
    if len(shape) < 2:
        return flat.reshape(1, -1)
    if units == "first":
        return flat.reshape(shape[0], prod(shape[1:]))
    return np.ascontiguousarray(flat.reshape(prod(shape[:-1]), shape[-1]).T)


def from_units(matrix: Array, shape: tuple[int, ...], units: Units) -> Array:
    """The inverse of `by_unit`: flat again."""
    return (matrix.T if units == "last" and len(shape) > 1 else matrix).reshape(-1)
