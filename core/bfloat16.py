"""bfloat16, which NumPy does not have: the upper half of a float32. Kept as 16-bit words under the dtype `BF16`.

Rounding to the nearest would lose a running mean whose changes are below half a unit of the last place: the mean of a
second moment with a decay of 0.999 stands still. Stochastic rounding is right in the mean. Its random words are a
function of (seed, step, slot, place), by Philox, a counter-based generator whose raw stream NumPy keeps from version
to version; so a replay draws the same.
"""

from typing import Any

import numpy as np

from core.layout import BF16, Array

_MASK = 2**64 - 1


def widen(array: Array, dtype: np.dtype[Any]) -> Array:
    """A BF16 array as one of `dtype`, exactly."""
    words = np.ascontiguousarray(array).view("<u2").astype(np.uint32)
    wide: Array = (words << np.uint32(16)).view(np.float32).reshape(array.shape).astype(dtype, copy=False)
    return wide


def random_words(seed: int, place: tuple[int, int, int], count: int) -> Array:
    """`count` random 16-bit words for the place (step, slot, element), as uint32."""
    step, slot, element = place
    stream = np.random.Philox(counter=[0, element, slot, step], key=[seed & _MASK, 0])
    raw = stream.random_raw(-(-count // 4)).astype("<u8")
    return raw.view("<u2")[:count].astype(np.uint32)


def round_randomly(array: Array, words: Array) -> Array:
    """A float array (n,) as BF16: up with the probability of the part that is cut off."""
    with np.errstate(all="ignore"):
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    rounded: Array = ((bits + words * finite) >> np.uint32(16)).astype("<u2").view(BF16)
    return rounded
