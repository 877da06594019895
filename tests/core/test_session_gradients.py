"""Gradients as they are sent: by rows, and in other types than the session computes in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.contributions import Contribution
from core.errors import (
    NonFinite,
)
from core.layout import BF16, Array, Rows
from core.optimizers import Optimizer
from core.optimizers.adam import Adam, AdamW
from core.optimizers.adaptive import Adagrad
from core.optimizers.descent import Momentum, Sgd
from core.state import tensors_of
from tests.core.build import assert_same_state, held, make, picture, step
from tests.core.sessions import RANDOM, START, as_arrays, rows, whole

# Row-sparse gradients

SPARSE = [Sgd(lr=0.1), Adagrad(lr=0.1, initial_accumulator=0.1), Adam(lr=0.1), AdamW(lr=0.1), Momentum(lr=0.1)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("held_here", [True, False])
@pytest.mark.parametrize("rule", SPARSE, ids=lambda rule: rule.kind)
def test_rows_are_zeros_elsewhere(rule: Optimizer, held_here: bool, dtype: str) -> None:
    sparse, dense = (make(rule, START, dtype=dtype, held=held_here) for _ in range(2))
    beside = {} if held_here or "params" not in rule.needs else {"params": as_arrays(START)}
    for picked in ([1], [0, 2], [2, 0], [], [0, 1, 2]):
        values = RANDOM.normal(size=(len(picked), 2))
        full = np.zeros((3, 2))
        full[picked] = values
        sent = Rows(np.array(picked, np.int64), values)
        ours = step(sparse, whole(w=sent), want_updates=True, **beside)
        theirs = step(dense, whole(w=full), want_updates=True, **beside)
        np.testing.assert_array_equal(ours.updates, theirs.updates)
        for name, array in tensors_of(sparse.recipe, sparse.state).items():
            np.testing.assert_array_equal(array, tensors_of(dense.recipe, dense.state)[name])


def test_rows_of_adagrad_leave_the_other_rows_alone() -> None:
    """With eps 0 a dense zero would be 0/0 where no gradient has been yet."""
    session = make(Adagrad(lr=0.5, eps=0.0), START)
    before = picture(session)
    step(session, {"w": rows([1], [[2.0, -4.0]])}, partial=True)
    assert held(session)[:6].tolist() == [1.0, -2.0, 0.0, 4.5, -0.0, 0.0]
    after = picture(session)
    assert {name for name in after if after[name] != before[name]} == {"step", "w", "w:G"}
    assert np.signbit(held(session)[:6]).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("rule", [Sgd(lr=1.0), Adam()], ids=lambda rule: rule.kind)
def test_rows_named_twice_are_summed(rule: Optimizer) -> None:
    twice, once = make(rule, START, dtype="float32"), make(rule, START, dtype="float32")
    step(twice, whole(w=rows([2, 0, 2, 2], [[1, 2], [3, 4], [5, 6], [1e-8, 0]])))
    step(once, whole(w=rows([0, 2], [[3, 4], [6 + 1e-8, 8]])))
    assert_same_state(twice.state, once.state)


def test_rows_of_other_shapes() -> None:
    start = {"vector": np.zeros(4), "cube": np.zeros((3, 2, 2)), "none": np.zeros((0, 3)), "thin": np.zeros((3, 0, 2))}
    session = make(Sgd(lr=1.0), start)
    session.apply(
        session.check(
            Contribution(
                {
                    "vector": rows([3, 1], [5, 6]),
                    "cube": rows([1], [[[1, 2], [3, 4]]]),
                    "none": Rows(np.zeros(0, int), np.zeros((0, 3))),
                    "thin": Rows(np.array([2, 1], np.uint64), np.zeros((2, 0, 2))),
                }
            )
        )
    )
    assert held(session).tolist() == [0, -6, 0, -5, 0, 0, 0, 0, -1, -2, -3, -4, 0, 0, 0, 0]


def test_rows_in_matrix_form() -> None:
    sparse, dense = make(Adagrad(matrix="full"), START), make(Adagrad(matrix="full"), START)
    step(sparse, whole(w=rows([1], [[2, 3]])))
    step(dense, whole(w=np.array([[0, 0], [2, 3], [0, 0.0]])))
    assert_same_state(sparse.state, dense.state)


# Dtypes


def bf16(values: Any) -> Array:
    """Values that bfloat16 has, as it travels: the upper halves of float32."""
    words = np.ascontiguousarray(np.asarray(values, np.float32)).view(np.uint32) >> 16
    return words.astype("<u2").view(BF16).reshape(np.shape(values))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_cast_first(dtype: str) -> None:
    gradients = {
        "w": np.array([[1.5, -0.25], [256.0, 0.0], [2.0, -3.0]]),
        "b": np.array([0.5, 1.0]),
        "s": np.array(-2.0),
    }
    expected = make(Adam(), START, dtype=dtype)
    step(expected, gradients)
    casts: list[Callable[[Array], Array]] = [
        lambda a: a.astype(np.float16), lambda a: a.astype(np.float32), lambda a: a.astype(">f4"),
        lambda a: np.array(a, order="F"), lambda a: np.repeat(a, 2, axis=0)[::2] if a.ndim else a, bf16,
    ]  # fmt: skip
    for cast in casts:
        session = make(Adam(), START, dtype=dtype)
        step(session, {name: cast(array) for name, array in gradients.items()})
        assert_same_state(session.state, expected.state)
    sparse = make(Adam(), START, dtype=dtype)
    step(sparse, gradients | {"w": Rows(np.arange(3), bf16(gradients["w"]))})
    assert_same_state(sparse.state, expected.state)


def test_bf16_keeps_all_that_it_can_hold() -> None:
    session = make(Sgd(lr=1.0), {"w": np.zeros(3)}, dtype="float32")
    step(session, {"w": np.array([0x3F81, 0x0001, 0x7F7F], "<u2").view(BF16)})
    assert held(session).tolist() == [-(1 + 2**-7), -(2.0**-133), -(2.0**127) * (2 - 2**-7)]
    for word in (0x7F80, 0x7FC0):
        with pytest.raises(NonFinite):
            session.check(Contribution({"w": np.array([word, 0, 0], "<u2").view(BF16)}))
