"""Forms in which a gradient takes few bytes: integers with a scale, and its largest elements alone.

Both lose something, which is the sender's to make up for (error feedback: Karimireddy et al. 2019, Error feedback fixes
SignSGD and other gradient compression schemes). What they stand for is exact: `Quantized` is scale · integer, computed
in float64 and rounded once, to the session's dtype; `Places` is zero everywhere else (Lin et al. 2018, Deep gradient
compression). They are logged as they came, so every replica computes this anew, with the same bits.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.errors import PositionsMismatch, ShapeMismatch


class Quantized(NamedTuple):
    """An int8 array of any shape, and the one scale that belongs to all of it."""

    integers: NDArray[Any]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.integers.shape


Numbers: TypeAlias = NDArray[Any] | Quantized


class Places(NamedTuple):
    """`values[i]` (k,) stands at `positions[i]` (k,) of the flat, row-major tensor; places named twice are summed."""

    positions: NDArray[Any]
    values: Numbers


def dequantize(quantized: Quantized, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A C-contiguous array of `dtype`, of the integers' shape. A scale that is not finite shows in it."""
    made = np.empty(quantized.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        # In float64 by blocks: there is never a second array of that width.
        np.multiply(quantized.integers, quantized.scale, out=made, dtype=np.float64, casting="unsafe")
    return made


def check_places(tensor: str, size: int, places: Places) -> None:
    """Raises PositionsMismatch, ShapeMismatch for places that are none of a `tensor` of `size` elements."""
    positions = places.positions
    if positions.ndim != 1:
        raise PositionsMismatch(tensor, f"the positions in {tensor!r} must be one flat list of integers")
    if positions.dtype.kind not in "iu":
        raise PositionsMismatch(tensor, f"the positions in {tensor!r} must be integers, not {positions.dtype}")
    if places.values.shape != positions.shape:
        raise ShapeMismatch(tensor, positions.shape, places.values.shape)
    if len(positions) and (positions.min() < 0 or positions.max() >= size):
        raise PositionsMismatch(
            tensor, f"a position in {tensor!r} is at least 0 and less than {size}, the number of its elements"
        )
