"""Names and shapes <-> slices of one flat vector.

A session's parameters, and each of its slots, are one flat array; a tensor is a slice of it. So an
element-wise rule runs over long contiguous stretches whatever the model looks like, and a tensor is
found by its name, never by its position in somebody's list.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.compression import Numbers, Places, Quantized, check_places, dequantize
from core.errors import InvalidRecipe, RowsMismatch, ShapeMismatch, UnknownTensor

Array: TypeAlias = NDArray[Any]

# NumPy has no bfloat16. Arrays of it travel and are logged as they came, marked by this dtype.
BF16 = np.dtype([("bf16", "<u2")])

MAX_DIMENSIONS = 8
MAX_NAME = 255
# Sizes and byte counts must stay exact in every JSON reader.
MAX_SIZE = 2**48


class Rows(NamedTuple):
    """A row-sparse tensor: `values[i]` belongs to row `indices[i]`; rows named twice are summed.

    `values` is an array, or as it is sent Quantized.
    """

    indices: Array
    values: Any


# A tensor as it is sent.
Sent: TypeAlias = Numbers | Rows | Places


class Slot(NamedTuple):
    """Where a tensor lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Layout:
    """The tensors of a session, in the order in which they were named.

    Raises InvalidRecipe for no tensors, a bad name, over 8 dimensions, or a size that cannot be.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if not shapes:
            raise InvalidRecipe("/shapes", "a session needs at least one tensor")
        self.slots: dict[str, Slot] = {}
        offset = 0
        for name, shape in shapes.items():
            _check_tensor(name, shape)
            size = math.prod(shape)  # Python integers: np.prod would wrap around
            self.slots[name] = Slot(name, tuple(shape), offset, offset + size)
            offset += size
        if offset > MAX_SIZE:
            raise InvalidRecipe("/shapes", f"{offset} parameters in all; at most {MAX_SIZE} are possible")
        self.size = offset

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self.slots.values()))

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots.values())

    @property
    def names(self) -> list[str]:
        return list(self.slots)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {slot.name: list(slot.shape) for slot in self}

    def find(self, name: str) -> Slot:
        """Raises UnknownTensor."""
        slot = self.slots.get(name)
        if slot is None:
            raise UnknownTensor(name, self.names)
        return slot

    def views(self, flat: Array) -> dict[str, Array]:
        """Each tensor of `flat`, in its shape, without a copy."""
        return {slot.name: flat[slot.start : slot.stop].reshape(slot.shape) for slot in self}

    def fit(self, name: str, array: Numbers) -> Slot:
        """The slot that `array` fills. Raises UnknownTensor, ShapeMismatch."""
        slot = self.find(name)
        if array.shape != slot.shape:
            raise ShapeMismatch(name, slot.shape, array.shape)
        return slot


def _check_tensor(name: str, shape: Sequence[int]) -> None:
    pointer = "/shapes/" + escape(name)
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRecipe(pointer, f"a tensor's name is 1 to {MAX_NAME} printable characters")
    if ":" in name or name == "__metadata__":
        raise InvalidRecipe(pointer, "':' in a tensor's name is reserved for its slots, such as 'w:m'")
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRecipe(pointer, f"{len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    if any(extent < 0 or extent > MAX_SIZE for extent in shape):
        raise InvalidRecipe(pointer, f"an extent lies between 0 and {MAX_SIZE}")


def escape(member: str) -> str:
    """`member` as one part of a JSON pointer (RFC 6901)."""
    return member.replace("~", "~0").replace("/", "~1")


def cast(array: Numbers, dtype: np.dtype[Any]) -> Array:
    """`array` as an aligned, contiguous array of `dtype`; itself where it is one already."""
    if isinstance(array, Quantized):
        return dequantize(array, dtype)
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return array
    if array.dtype == BF16:
        # bfloat16 is the upper half of a float32, so this is exact.
        words = np.ascontiguousarray(array).view("<u2").astype(np.uint32)
        array = (words << np.uint32(16)).view(np.float32).reshape(array.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype, order="C", copy=not array.flags.aligned)


def check_rows(slot: Slot, rows: Rows) -> None:
    """Raises ShapeMismatch, RowsMismatch for rows that are not rows of `slot`."""
    if not slot.shape:
        raise RowsMismatch(slot.name, f"tensor {slot.name!r} is a number and has no rows")
    if rows.indices.ndim != 1:
        raise RowsMismatch(slot.name, f"the indices of {slot.name!r} must be one flat list of row numbers")
    if rows.indices.dtype.kind not in "iu":
        raise RowsMismatch(slot.name, f"the indices of {slot.name!r} must be integers, not {rows.indices.dtype}")
    expected = (len(rows.indices), *slot.shape[1:])
    if rows.values.shape != expected:
        raise ShapeMismatch(slot.name, expected, rows.values.shape)
    if len(rows.indices) and (rows.indices.min() < 0 or rows.indices.max() >= slot.shape[0]):
        raise RowsMismatch(slot.name, f"tensor {slot.name!r} has rows 0 to {slot.shape[0] - 1}")


def merge_rows(rows: Rows, dtype: np.dtype[Any]) -> Rows:
    """The same rows, sorted, each once, their values summed in float64 in the order they came."""
    indices, positions = np.unique(rows.indices, return_inverse=True)
    values = cast(rows.values, dtype)
    if len(indices) == len(rows.indices) and np.array_equal(indices, rows.indices):
        return Rows(indices, values)
    summed = np.zeros((len(indices), *values.shape[1:]), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        np.add.at(summed, positions, values)
        return Rows(indices, summed.astype(dtype))


def unfolded(shape: tuple[int, ...], rows: Rows) -> Array:
    """The tensor of `shape`, flat, that is zero but in `rows`, each of which is named once."""
    full = np.zeros(shape, rows.values.dtype)
    full[rows.indices] = rows.values
    return full.reshape(-1)


def spread(slot: Slot, places: Places, dtype: np.dtype[Any]) -> Array:
    """The flat tensor that is zero but in `places`. Raises PositionsMismatch, ShapeMismatch.

    Each value is cast before it is added to others of the same place, as in `merge_rows`.
    """
    size = slot.stop - slot.start
    check_places(slot.name, size, places)
    merged = merge_rows(Rows(places.positions, places.values), dtype)
    flat = np.zeros(size, dtype)
    flat[merged.indices] = merged.values
    return flat
