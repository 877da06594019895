"""Compressed tensors mean exactly what they are said to mean: in rational numbers, rounded as often as is said."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.compression import Numbers, Places, Quantized, check_places
from core.contributions import Contribution
from core.errors import CoreError, NonFinite, PositionsMismatch, RowsMismatch, ShapeMismatch, UnknownTensor
from core.layout import BF16, Layout, Rows, Slot, cast, merge_rows, spread
from core.optimizers import Optimizer
from core.optimizers.adam import Adam
from core.optimizers.descent import Sgd
from tests.core.build import assert_same_state, make

DTYPES = ["float32", "float64"]
SLOT = Slot("w", (2, 3), 5, 11)
int8s = st.lists(st.integers(-128, 127), max_size=20)
scales = st.floats(-1e30, 1e30)


def quantized(integers: Any, scale: float = 0.5) -> Quantized:
    return Quantized(np.array(integers, np.int8), scale)


def places(positions: Any, values: Any) -> Places:
    numbers: Numbers = values if isinstance(values, Quantized) else np.array(values, np.float64)
    return Places(np.array(positions, np.int64), numbers)


def rounded(number: Fraction, dtype: str) -> float:
    """To float64, which Python does exactly, and from there to `dtype`."""
    return float(np.dtype(dtype).type(float(number)))


# -- int8 with a scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(int8s, scales)
def test_a_value_is_scale_times_integer_rounded_to_float64_and_then_to_the_dtype(
    dtype: str, integers: list[int], scale: float
) -> None:
    found = cast(quantized(integers, scale), np.dtype(dtype))
    assert found.dtype == dtype
    assert found.tolist() == [rounded(Fraction(scale) * integer, dtype) for integer in integers]


def test_the_product_is_not_taken_in_float32() -> None:
    scale = 1 / 3.1
    telling = [n for n in range(-128, 128) if np.float32(scale) * np.float32(n) != np.float32(scale * n)]
    assert telling, "integers whose product is another one in float32"
    found = cast(quantized(telling, scale), np.dtype("float32"))
    assert found.tolist() == [rounded(Fraction(scale) * n, "float32") for n in telling]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3), (1,) * 8])
def test_the_shape_is_that_of_the_integers(shape: tuple[int, ...]) -> None:
    sent = Quantized(np.full(shape, -3, np.int8), 0.25)
    assert sent.shape == shape
    found = cast(sent, np.dtype("float32"))
    assert found.shape == shape
    assert found.flags.c_contiguous
    assert np.all(found == -0.75)


def test_a_transposed_array_is_read_by_its_shape() -> None:
    sent = Quantized(np.array([[1, 2, 3], [4, 5, 6]], np.int8).T, 2.0)
    assert cast(sent, np.dtype("float64")).tolist() == [[2.0, 8.0], [4.0, 10.0], [6.0, 12.0]]


def test_what_leaves_the_dtype_is_infinite_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert cast(quantized([1, -1, 0], 1e300), np.dtype("float32")).tolist() == [np.inf, -np.inf, 0.0]
    assert cast(quantized([127], 1e307), np.dtype("float64")).tolist() == [np.inf]
    assert np.isnan(cast(quantized([0, 1], np.nan), np.dtype("float32"))).all()
    assert np.isnan(cast(quantized([0], np.inf), np.dtype("float32"))).all()
    assert not recwarn.list


# -- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-1e6, 1e6)), max_size=12))
def test_places_are_cast_summed_in_order_in_float64_and_rounded_once(dtype: str, sent: list[tuple[int, float]]) -> None:
    sums: dict[int, float] = {}
    for position, value in sent:
        sums[position] = sums.get(position, 0.0) + rounded(Fraction(value), dtype)
    found = spread(SLOT, places([p for p, _ in sent], [v for _, v in sent]), np.dtype(dtype))
    assert (found.dtype, found.shape) == (np.dtype(dtype), (6,))
    assert found.tolist() == [rounded(Fraction(sums.get(position, 0.0)), dtype) for position in range(6)]


def test_a_small_value_between_two_large_ones_is_not_lost() -> None:
    """1e8 + 1 - 1e8 is 0 in float32."""
    assert spread(SLOT, places([4, 4, 4], [1e8, 1.0, -1e8]), np.dtype("float32")).tolist() == [0, 0, 0, 0, 1, 0]


def test_the_order_counts() -> None:
    big = 2.0**53
    assert spread(SLOT, places([0, 0, 0], [big, 1.0, -big]), np.dtype("float64"))[0] == 0.0
    assert spread(SLOT, places([0, 0, 0], [big, -big, 1.0]), np.dtype("float64"))[0] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_places_by_hand(dtype: str) -> None:
    found = spread(SLOT, places([5, 0, 5], quantized([127, -128, 1], 0.25)), np.dtype(dtype))
    assert found.tolist() == [-32.0, 0.0, 0.0, 0.0, 0.0, 32.0]


def test_places_in_bfloat16_and_half_precision() -> None:
    half = Places(np.array([1], np.uint8), np.array([0.5], np.float16))
    assert spread(SLOT, half, np.dtype("float32")).tolist() == [0, 0.5, 0, 0, 0, 0]
    brain = Places(np.array([2]), np.array([0x3FC0], "<u2").view(BF16))
    assert spread(SLOT, brain, np.dtype("float64")).tolist() == [0, 0, 1.5, 0, 0, 0]


def test_no_places_are_a_tensor_of_zeros() -> None:
    assert spread(SLOT, places([], []), np.dtype("float32")).tolist() == [0.0] * 6
    assert spread(Slot("e", (0, 3), 0, 0), places([], []), np.dtype("float32")).tolist() == []


def test_a_number_has_one_place() -> None:
    assert spread(Slot("s", (), 2, 3), places([0], [1.5]), np.dtype("float32")).tolist() == [1.5]


WRONG: dict[str, tuple[Places, type[CoreError]]] = {
    "one too far": (places([6], [1.0]), PositionsMismatch),
    "far away": (places([2**63 - 1], [1.0]), PositionsMismatch),
    "negative": (places([-1], [1.0]), PositionsMismatch),
    "in two dimensions": (places([[0]], [[1.0]]), PositionsMismatch),
    "a single number": (places(0, 1.0), PositionsMismatch),
    "fractional": (Places(np.array([0.0]), np.array([1.0])), PositionsMismatch),
    "fewer values": (places([0, 1], [1.0]), ShapeMismatch),
    "more values": (places([0], [1.0, 2.0]), ShapeMismatch),
    "values in two dimensions": (places([0], [[1.0]]), ShapeMismatch),
    "fewer integers": (places([0, 1], quantized([1])), ShapeMismatch),
}


@pytest.mark.parametrize("what", WRONG)
def test_places_that_do_not_fit(what: str) -> None:
    sent, error = WRONG[what]
    with pytest.raises(error) as caught:
        check_places("w", 6, sent)
    assert caught.value.tensor == "w"  # type: ignore[attr-defined]
    with pytest.raises(error):
        spread(SLOT, sent, np.dtype("float32"))


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_by_hand(dtype: str) -> None:
    sent = Rows(np.array([2, 0, 2]), quantized([[1, 2], [3, 4], [-5, 6]], 0.125))
    merged = merge_rows(sent, np.dtype(dtype))
    assert merged.indices.tolist() == [0, 2]
    assert merged.values.dtype == dtype
    assert merged.values.tolist() == [[0.375, 0.5], [-0.5, 1.0]]


# -- in a session --------------------------------------------------------------------------------------------------

START = {"w": [[1.0, -2.0], [0.5, 4.0], [8.0, 0.25]], "b": [3.0, -1.0]}
W = np.array([[7, 0], [-127, 3], [0, 1]], np.int8)
PLACES = Places(np.array([4, 1, 4]), np.array([0.5, 2.0, 0.25]))
DENSE = {
    "int8": (Quantized(W, 0.01), 0.01 * W.astype(np.float64)),
    "places": (PLACES, np.array([[0.0, 2.0], [0.0, 0.0], [0.75, 0.0]])),
    "int8 places": (places([5], quantized([-3], 0.1)), np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.1 * -3]])),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [Sgd(lr=0.1), Adam(lr=0.1)], ids=lambda rule: rule.kind)
@pytest.mark.parametrize("form", DENSE)
def test_a_session_takes_them_for_the_dense_gradient(form: str, rule: Optimizer, dtype: str) -> None:
    sent, plain = DENSE[form]
    sessions = [make(rule, START, dtype=dtype) for _ in range(2)]
    b = np.array([1.0, 2.0])
    for session, w in zip(sessions, (sent, plain), strict=True):
        for _ in range(3):
            session.apply(session.check(Contribution({"w": w, "b": b})))
    assert_same_state(*(session.state for session in sessions))
    assert sessions[0].state.step == 3


def test_rows_of_int8_stay_rows() -> None:
    integers = np.array([[7, 0], [-127, 3]], np.int8)
    indices = np.array([2, 0])
    sessions = [make(Sgd(lr=0.1), START, dtype="float64") for _ in range(2)]
    for session, values in zip(sessions, (Quantized(integers, 0.3), 0.3 * integers.astype(np.float64)), strict=True):
        session.apply(session.check(Contribution({"w": Rows(indices, values)}, partial=True)))
    assert_same_state(*(session.state for session in sessions))


REFUSED: dict[str, tuple[Any, type[CoreError]]] = {
    "another shape": (quantized([[1, 2, 3], [4, 5, 6]]), ShapeMismatch),
    "flat": (quantized([1, 2, 3, 4, 5, 6]), ShapeMismatch),
    "a scale of NaN": (Quantized(W, float("nan")), NonFinite),
    "a scale of infinity": (Quantized(W, float("inf")), NonFinite),
    "an infinite scale of zeros": (Quantized(np.zeros((3, 2), np.int8), float("inf")), NonFinite),
    "a product beyond float32": (Quantized(W, 1e38), NonFinite),
    "places out of range": (places([6], [1.0]), PositionsMismatch),
    "places with NaN": (places([0], [np.nan]), NonFinite),
    "places with a scale of NaN": (places([0], quantized([1], float("nan"))), NonFinite),
    "a sum beyond float32": (places([0, 0], [3e38, 3e38]), NonFinite),
    "rows out of range": (Rows(np.array([3]), quantized([[1, 2]])), RowsMismatch),
    "rows of another shape": (Rows(np.array([0]), quantized([[1]])), ShapeMismatch),
    "rows with a scale of NaN": (Rows(np.array([0]), quantized([[1, 2]], float("nan"))), NonFinite),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str) -> None:
    sent, error = REFUSED[what]
    session, untouched = (make(Adam(), START, dtype="float32") for _ in range(2))
    with pytest.raises(error) as caught:
        session.check(Contribution({"w": sent, "b": np.zeros(2)}))
    assert caught.value.tensor == "w"  # type: ignore[attr-defined]
    assert_same_state(session.state, untouched.state)


@pytest.mark.parametrize("sent", [quantized([1]), places([0], [1.0]), Rows(np.array([0]), quantized([[1]]))])
def test_an_unknown_tensor(sent: Any) -> None:
    with pytest.raises(UnknownTensor):
        make(Adam(), START).check(Contribution({"x": sent}, partial=True))


def test_the_layout_takes_the_shape_of_the_integers() -> None:
    assert Layout({"w": [2]}).fit("w", quantized([1, 2])).name == "w"
