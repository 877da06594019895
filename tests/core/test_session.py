"""Sessions: what is refused changes nothing, what is asked for does not change what is computed."""

from typing import Any

import numpy as np
import pytest

from core.averaging import Ema, Polyak
from core.contributions import Contribution, NewParams
from core.errors import (
    CoreError,
    HessianRequired,
    MissingGradient,
    NonFinite,
    ParamsHeld,
    ParamsNotHeld,
    ParamsRequired,
    RowsMismatch,
    ShapeMismatch,
    TensorError,
    UnknownTensor,
)
from core.layout import Array, Rows
from core.optimizers import Optimizer
from core.optimizers.adam import Adam, AdamW
from core.optimizers.adaptive import Adagrad
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.second_order import Newton
from core.recipe import Group
from core.state import tensors_of
from tests.core.build import assert_same_bits, assert_same_state, go, held, make, picture, step, trajectory
from tests.core.sessions import CLIENTS, GRADIENTS, PARTIAL, PROMPT, RANDOM, RULES, START, as_arrays, rows, whole

# Refused: nothing changes

REFUSED: dict[str, tuple[Contribution, type[CoreError]]] = {
    "unknown tensor": (Contribution(whole(x=np.zeros(2))), UnknownTensor),
    "unknown tensor, partial": (Contribution({"x": np.zeros(2)}, partial=True), UnknownTensor),
    "unknown tensor by rows": (Contribution(whole(x=rows([0], [[1, 2]]))), UnknownTensor),
    "missing tensor": (Contribution({"w": np.zeros((3, 2)), "b": np.zeros(2)}), MissingGradient),
    "nothing": (Contribution({}), MissingGradient),
    "wrong shape": (Contribution(whole(w=np.zeros((2, 3)))), ShapeMismatch),
    "flat": (Contribution(whole(w=np.zeros(6))), ShapeMismatch),
    "a list of one for a number": (Contribution(whole(s=np.zeros(1))), ShapeMismatch),
    "NaN": (Contribution(whole(b=np.array([0.0, np.nan]))), NonFinite),
    "infinity": (Contribution(whole(b=np.array([0.0, -np.inf]))), NonFinite),
    "float32 overflow": (Contribution(whole(b=np.array([1e300, 0.0]))), NonFinite),
    "NaN by rows": (Contribution(whole(w=rows([1], [[1, np.nan]]))), NonFinite),
    "overflow by the sum of rows": (Contribution(whole(w=rows([1, 1], [[3e38, 0], [3e38, 0]]))), NonFinite),
    "row below": (Contribution(whole(w=rows([-1], [[1, 2]]))), RowsMismatch),
    "row above": (Contribution(whole(w=rows([3], [[1, 2]]))), RowsMismatch),
    "rows of a number": (Contribution(whole(s=rows([0], [1]))), RowsMismatch),
    "rows in a table": (Contribution(whole(w=Rows(np.zeros((1, 1), int), np.zeros((1, 2))))), RowsMismatch),
    "rows by fractions": (Contribution(whole(w=Rows(np.array([0.0]), np.zeros((1, 2))))), RowsMismatch),
    "rows by truth": (Contribution(whole(w=Rows(np.array([True]), np.zeros((1, 2))))), RowsMismatch),
    "rows of a wrong width": (Contribution(whole(w=rows([0], [[1, 2, 3]]))), ShapeMismatch),
    "fewer values than rows": (Contribution(whole(w=rows([0, 1], [[1, 2]]))), ShapeMismatch),
    "params where they are held": (Contribution(whole(), params=START), ParamsHeld),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("rule", [Sgd(), AdamW(), Adagrad(matrix="full")], ids=lambda rule: rule.kind)
def test_refused_contribution_changes_nothing(rule: Optimizer, what: str) -> None:
    entry, error = REFUSED[what]
    session = make(rule, START, dtype="float32", averaging=Ema())
    step(session, GRADIENTS[1])
    before = picture(session)
    with pytest.raises(error) as refused:
        session.check(entry)
    assert type(refused.value) is error
    assert picture(session) == before
    step(session, GRADIENTS[2])
    assert session.state.step == 2


def test_refusals_name_the_tensor() -> None:
    session = make(Sgd(), START, dtype="float32")
    for what, name in [("unknown tensor", "x"), ("missing tensor", "s"), ("float32 overflow", "b"), ("row above", "w")]:
        with pytest.raises(TensorError) as refused:
            session.check(REFUSED[what][0])
        assert refused.value.tensor == name
    with pytest.raises(ShapeMismatch) as mismatch:
        session.check(REFUSED["flat"][0])
    assert (mismatch.value.expected, mismatch.value.received) == ([3, 2], [6])


def test_float64_takes_what_float32_cannot() -> None:
    session = make(Sgd(lr=1.0), {"w": [0.0]})
    step(session, {"w": np.array([1e300])})
    assert held(session).tolist() == [-1e300]


@pytest.mark.parametrize(
    ("hessian", "error"),
    [
        (None, HessianRequired),
        (np.eye(8), ShapeMismatch),
        (np.ones(81), ShapeMismatch),
        (np.full((9, 9), np.nan), NonFinite),
        (np.diag([1.0] * 8 + [np.inf]), NonFinite),
    ],
)
def test_refused_hessian_changes_nothing(hessian: Array | None, error: type[CoreError]) -> None:
    session = make(Newton(), START)
    before = picture(session)
    with pytest.raises(error):
        session.check(Contribution(GRADIENTS[0], hessian=hessian))
    assert picture(session) == before


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (None, ParamsRequired),
        ({"w": START["w"], "b": START["b"]}, MissingGradient),
        (START | {"x": [1.0]}, UnknownTensor),
        (START | {"b": [1.0]}, ShapeMismatch),
        (START | {"b": [1.0, np.inf]}, NonFinite),
    ],
)
def test_refused_params_change_nothing(params: Any, error: type[CoreError]) -> None:
    session = make(AdamW(), START, held=False)
    before = picture(session)
    arrays = None if params is None else {name: np.asarray(value) for name, value in params.items()}
    with pytest.raises(error):
        session.check(Contribution(GRADIENTS[0], params=arrays))
    assert picture(session) == before


def test_averaging_needs_the_parameters() -> None:
    session = make(Sgd(), START, held=False, averaging=Ema())
    with pytest.raises(ParamsRequired):
        session.check(Contribution(GRADIENTS[0]))


def test_new_params() -> None:
    session = make(Momentum(lr=0.5), START, averaging=Polyak())
    go(session, GRADIENTS[0])
    before, old = picture(session), held(session)
    for bad, error in [({"w": START["w"]}, MissingGradient), (START | {"b": [0, np.nan]}, NonFinite)]:
        with pytest.raises(error):
            session.check(NewParams({name: np.asarray(value, float) for name, value in bad.items()}))
    assert picture(session) == before
    session.apply(session.check(NewParams({name: np.zeros(np.shape(value)) for name, value in START.items()})))
    assert held(session).tolist() == [0.0] * 9
    assert held(session) is not old
    after = picture(session)
    assert {name for name in after if after[name] != before[name]} == set(START)


def test_params_may_come_at_step_0_alone() -> None:
    arrays = {name: np.asarray(value, np.float64) for name, value in START.items()}
    session = make(Sgd(), START, held=False)
    for look in (session.next_point, session.final_point):
        with pytest.raises(ParamsNotHeld):
            look()
    late = make(Sgd(), START, held=False)
    step(late, GRADIENTS[0])
    with pytest.raises(ParamsNotHeld):
        late.check(NewParams(arrays))
    session.apply(session.check(NewParams(arrays)))
    assert_same_state(session.state, make(Sgd(), START).state)


# Parts of the model


@pytest.mark.parametrize("held_here", [True, False])
@pytest.mark.parametrize("want_updates", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", PARTIAL)
def test_partial_step_keeps_the_others_still(name: str, fresh: bool, want_updates: bool, held_here: bool) -> None:
    rule = RULES[name]
    if name not in CLIENTS and not held_here:
        pytest.skip("the session must hold the parameters")
    session = make(rule, START, held=held_here)
    beside = {} if held_here or "params" not in rule.needs else {"params": as_arrays(START)}
    go(session, GRADIENTS[0], **beside)
    before = picture(session)
    outcome = go(session, {"b": GRADIENTS[1]["b"]}, partial=True, want_updates=want_updates, fresh=fresh, **beside)
    after = picture(session)
    changed = {name for name in after if after[name] != before[name]} - {"step"}
    assert changed <= {name for name in after if name.split(":")[0] in ("b", "")}
    assert not held_here or "b" in changed
    if outcome.updates is not None:
        moved = np.flatnonzero(outcome.updates).tolist()
        assert moved == [6, 7] or (rule.kind == "rprop" and set(moved) <= {6, 7})  # which waits where a sign changed


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_step_of_nothing(name: str) -> None:
    session = make(RULES[name], START)
    before = picture(session)
    go(session, {}, partial=True)
    assert picture(session) == before | {"step": 1}


@pytest.mark.parametrize("name", sorted(RULES.keys() - set(PARTIAL)))
def test_a_method_that_needs_all_tensors_says_so(name: str) -> None:
    session = make(RULES[name], START, groups=[Group("s", {}, frozen=True)])
    before = picture(session)
    with pytest.raises(MissingGradient):
        go(session, {"b": GRADIENTS[0]["b"]}, partial=True)
    assert picture(session) == before
    go(session, {name: GRADIENTS[0][name] for name in ("b", "w")}, partial=True)
    assert session.state.step == 1


@pytest.mark.parametrize("name", sorted(RULES.keys() - set(CLIENTS)))
def test_a_method_that_must_hold_the_parameters_says_so(name: str) -> None:
    session = make(RULES[name], START, held=False)
    before = picture(session)
    with pytest.raises(ParamsRequired, match=RULES[name].kind):
        go(session, GRADIENTS[0])
    assert picture(session) == before


# What is asked for, who holds the parameters, and where they are written: the same bits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CLIENTS)
def test_held_by_the_client_or_here(name: str, dtype: str) -> None:
    rule = RULES[name]
    here, there = make(rule, START, dtype=dtype), make(rule, START, dtype=dtype, held=False)
    params = held(here).copy()
    for gradients in GRADIENTS:
        beside = {"params": there.layout.views(params)} if "params" in rule.needs else {}
        mine, theirs = go(here, gradients, want_updates=True), go(there, gradients, **beside)
        assert_same_bits(mine.updates, theirs.updates)
        params = params + theirs.updates
        assert_same_bits(held(here), params)
        for slot, array in here.state.slots.items():
            assert_same_bits(array, there.state.slots[slot])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("groups", [[], [Group("b", {"lr": 0.5})], [Group("w", {}, frozen=True)]])
@pytest.mark.parametrize("name", RULES)
def test_what_is_asked_for_does_not_change_what_is_computed(name: str, groups: list[Group], dtype: str) -> None:
    ways = [(want_updates, fresh) for want_updates in (False, True) for fresh in (True, False)]
    sessions = [make(RULES[name], START, dtype=dtype, groups=groups, averaging=Ema(decay=0.9)) for _ in ways]
    for t, gradients in enumerate(GRADIENTS, 1):
        some = {"b": gradients["b"]} if t == 3 and name in PARTIAL else gradients
        for session, (want_updates, fresh) in zip(sessions, ways, strict=True):
            old = held(session)
            before = old.tobytes()
            outcome = go(session, some, want_updates=want_updates, fresh=fresh, partial=t == 3)
            assert outcome.step == session.state.step == t
            assert (outcome.updates is not None) == want_updates
            if fresh:
                assert held(session) is not old or name not in PROMPT
                assert old.tobytes() == before
            else:
                assert held(session) is old
        for other in sessions[1:]:
            assert_same_state(sessions[0].state, other.state)


def test_a_checked_contribution_is_not_changed_by_applying_it() -> None:
    session = make(Adam(), START)
    sent = {name: array.copy() for name, array in GRADIENTS[0].items()}
    for array in sent.values():
        array.flags.writeable = False
    step(session, sent)
    for name, array in sent.items():
        np.testing.assert_array_equal(array, GRADIENTS[0][name])


def test_order_of_tensors_in_a_request_does_not_matter() -> None:
    first, second = make(Adam(), START), make(Adam(), START)
    step(first, GRADIENTS[0])
    step(second, dict(reversed(GRADIENTS[0].items())))
    assert_same_state(first.state, second.state)


def test_grad_norm() -> None:
    session = make(Sgd(), START)
    table = rows([2, 0, 2], [[1, 2], [3, 4], [5, 6]])
    checked = session.check(Contribution({"w": table, "b": np.zeros(2), "s": np.zeros(())}))
    assert checked.norm == pytest.approx(np.sqrt(9 + 16 + 36 + 64), rel=1e-15)


# Odd shapes and sizes


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,) * 8], ids=str)
def test_odd_shapes(shape: tuple[int, ...], name: str) -> None:
    start = {"odd": np.full(shape, 2.0), "plain": np.ones(2)}
    session = make(RULES[name], start)
    for _ in range(4):
        go(session, {"odd": np.full(shape, 0.5), "plain": np.ones(2)})
    assert session.layout.views(held(session))["odd"].shape == shape
    assert (held(session)[-2:] < 1).all() or name == "bfgs"  # whose search has not ended yet
    assert tensors_of(session.recipe, session.state)["odd"].shape == shape


@pytest.mark.parametrize("name", RULES)
def test_nothing_but_an_empty_tensor(name: str) -> None:
    session = make(RULES[name], {"w": np.zeros((0, 4))})
    go(session, {"w": np.zeros((0, 4))})
    assert session.state.step == 1
    assert session.next_point().shape == session.final_point().shape == (0,)


def test_matrix_form_survives_gradients_whose_squares_overflow() -> None:
    for dtype, huge in (("float32", 1e30), ("float64", 1e200)):
        session = make(Adagrad(matrix="full"), {"w": np.zeros(6)}, dtype=dtype)
        for _ in range(2):
            step(session, {"w": np.full(6, huge)})
        assert session.state.step == 2
        assert not np.isnan(held(session)).any()
        assert np.isfinite(session.state.own[":G"]).all()


def test_points_where_nothing_is_special_are_the_parameters() -> None:
    session = make(Adam(), START)
    assert session.next_point() is session.final_point() is session.state.params


def test_next_point_looks_ahead_only_where_the_group_does() -> None:
    rule = Momentum(lr=1.0, momentum=0.5)
    session = make(rule, {"a": [0.0], "b": [0.0], "c": [0.0]},
                   groups=[Group("b", {"nesterov": "lookahead"}), Group("c", {}, frozen=True)])  # fmt: skip
    step(session, {name: np.ones(1) for name in "abc"})
    assert held(session).tolist() == [-1.0, -1.0, 0.0]
    assert session.next_point().tolist() == [-1.0, -1.5, 0.0]
    assert held(session).tolist() == [-1.0, -1.0, 0.0]


def test_final_point_is_not_the_state_itself() -> None:
    session = make(Sgd(), START, averaging=Polyak())
    step(session, GRADIENTS[0])
    point = session.final_point()
    point.fill(7)
    assert not (session.state.slots["average"] == 7).any()


def test_a_trajectory_is_the_same_every_time() -> None:
    gradients = RANDOM.normal(size=(20, 50))
    first = trajectory(Adam(), [0.0] * 50, gradients, dtype="float32")
    assert_same_bits(first, trajectory(Adam(), [0.0] * 50, gradients, dtype="float32"))
