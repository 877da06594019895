"""Sums have one order, whichever way NumPy is asked for them: the norms in logs and histories were summed in it."""

import math

import numpy as np
import pytest

from core.layout import Array
from core.sums import AT_ONCE, BLOCK, magnitude, norm


def in_order(terms: Array) -> float:
    """Block by block, each by NumPy's own sum of it."""
    found = 0.0
    for start in range(0, terms.size, BLOCK):
        found += float(np.add.reduce(terms[start : start + BLOCK]))
    return found


SIZES = (0, 1, 7, 1000, BLOCK - 1, BLOCK, BLOCK + 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * BLOCK + 5, 1_000_000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_order_is_the_same_at_every_size(size: int, dtype: str) -> None:
    array = np.random.default_rng(size).standard_normal(size).astype(dtype)
    array[::7] *= 1e6
    wide = array.astype(np.float64)
    before = array.copy()
    assert norm([array]) == math.sqrt(in_order(wide * wide))
    assert magnitude(array) == in_order(np.abs(wide))
    assert array.tobytes() == before.tobytes()


@pytest.mark.parametrize("place", [0, BLOCK, AT_ONCE - 1, AT_ONCE, 5 * BLOCK + 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_wherever_it_is(place: int, value: float) -> None:
    array = np.ones(5 * BLOCK + 3, np.float32)
    array[place] = value
    assert not math.isfinite(norm([array]))
