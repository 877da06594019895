"""Names, shapes, casts and rows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from core.errors import InvalidRecipe, ShapeMismatch, UnknownTensor
from core.layout import BF16, MAX_SIZE, Layout, Rows, cast, escape, merge_rows

shapes = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"], exclude_characters=":"), min_size=1, max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    st.lists(st.integers(0, 4), max_size=8),
    min_size=1,
    max_size=6,
)


@given(shapes)
def test_tensors_tile_the_flat_vector(tensors: dict[str, list[int]]) -> None:
    layout = Layout(tensors)
    assert layout.names == list(tensors)
    assert layout.shapes == tensors
    flat = np.arange(layout.size)
    views = layout.views(flat)
    assert np.concatenate([view.reshape(-1) for view in views.values()]).tolist() == flat.tolist()
    for name, view in views.items():
        assert list(view.shape) == tensors[name]
        assert view.size == 0 or view.base is not None
        slot = layout.find(name)
        assert slot.stop - slot.start == math.prod(tensors[name])
        assert layout.fit(name, view) is slot


@pytest.mark.parametrize("name", ["w", "a.b[0]/c", "größe", "層", "a b", "~", "x" * 255])
def test_names(name: str) -> None:
    assert Layout({name: [2]}).names == [name]


@pytest.mark.parametrize(
    "name", ["", "x" * 256, "a:b", ":", "__metadata__", "a\nb", "a\x00", "\ud800", "a\u2028b", "\x7f"]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        Layout({"fine": [1], name: [2]})
    assert refused.value.pointer == "/shapes/" + name


def test_pointers_are_escaped() -> None:
    assert escape("a/b~c") == "a~1b~0c"
    with pytest.raises(InvalidRecipe) as refused:
        Layout({"a/b": [-1]})
    assert refused.value.pointer == "/shapes/a~1b"


@pytest.mark.parametrize(
    "shape",
    [[1] * 9, [-1], [MAX_SIZE + 1], [2**32, 2**32], [2**24, 2**24, 2], [2**64], [2**20, 2**20, 2**20]],
)
def test_shapes_that_are_refused(shape: list[int]) -> None:
    with pytest.raises(InvalidRecipe):
        Layout({"w": shape})


def test_shapes_at_the_edge() -> None:
    assert Layout({"w": [1] * 8}).size == 1
    assert Layout({"w": [2**24, 2**24]}).size == MAX_SIZE
    assert Layout({"w": [MAX_SIZE, 0]}).size == 0
    with pytest.raises(InvalidRecipe):
        Layout({"w": [2**24, 2**24], "b": [1]})
    with pytest.raises(InvalidRecipe):
        Layout({})


def test_equality_is_of_names_shapes_and_order() -> None:
    assert Layout({"a": [2], "b": [3]}) == Layout({"a": [2], "b": [3]})
    assert hash(Layout({"a": [2]})) == hash(Layout({"a": [2]}))
    for other in ({"b": [3], "a": [2]}, {"a": [2]}, {"a": [2], "b": [3, 1]}, {"a": [2], "c": [3]}):
        assert Layout({"a": [2], "b": [3]}) != Layout(other)


def test_unknown_and_unfit() -> None:
    layout = Layout({f"w{i}": [2, 3] for i in range(20)})
    with pytest.raises(UnknownTensor) as unknown:
        layout.find("x")
    assert unknown.value.tensor == "x"
    assert len(str(unknown.value)) < 200
    with pytest.raises(ShapeMismatch):
        layout.fit("w3", np.zeros((3, 2)))


# Casts


@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=0, max_side=4)))
def test_bf16_is_the_upper_half_of_a_float32(words: np.ndarray) -> None:
    found = cast(words.astype("<u2").view(BF16), np.dtype(np.float32))
    expected = (words.astype(np.uint32) << 16).view(np.float32)
    assert found.shape == words.shape
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cast_copies_only_where_it_must(dtype: str) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    assert cast(array, np.dtype(dtype)) is array
    raw = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(dtype)
    for other in (array.T, array[:, ::2], array.astype(">f8"), raw, np.asfortranarray(array)):
        found = cast(other, np.dtype(dtype))
        assert found.flags.c_contiguous
        assert found.flags.aligned
        assert found.dtype == dtype
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, other)


def test_cast_overflows_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert cast(np.array([1e300, -1e300]), np.dtype(np.float32)).tolist() == [np.inf, -np.inf]
    assert not recwarn.list


# Rows


@given(
    st.lists(st.integers(0, 5), max_size=12).flatmap(
        lambda indices: st.tuples(
            st.just(indices), hnp.arrays(np.float64, (len(indices), 3), elements=st.integers(-1000, 1000))
        )
    )
)
def test_merge_rows(pair: tuple[list[int], np.ndarray]) -> None:
    indices, values = pair
    merged = merge_rows(Rows(np.array(indices, np.int64), values), np.dtype(np.float32))
    assert merged.indices.tolist() == sorted(set(indices))
    assert merged.values.dtype == np.float32
    expected = np.zeros((6, 3))
    for index, value in zip(indices, values, strict=True):
        expected[index] += value
    found = np.zeros((6, 3))
    found[merged.indices] = merged.values
    np.testing.assert_array_equal(found, expected)


def test_rows_are_summed_in_float64() -> None:
    """1e8 + 1 - 1e8 is 0 in float32."""
    values = np.array([[1e8], [1.0], [-1e8]], np.float32)
    merged = merge_rows(Rows(np.zeros(3, np.int64), values), np.dtype(np.float32))
    assert merged.values.tolist() == [[1.0]]
