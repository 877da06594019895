"""Sessions: what is refused changes nothing, what is asked for does not change what is computed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.averaging import Ema, Polyak
from core.contributions import Contribution, NewParams, NewRecipe
from core.errors import (
    CoreError,
    HessianRequired,
    InvalidRecipe,
    InvalidState,
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
from core.evaluate import Evaluator
from core.layout import BF16, Array, Rows
from core.optimizers import KINDS, Optimizer
from core.optimizers.adam import Adam, AdamW
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.quasi_newton import Lbfgs
from core.optimizers.second_order import Newton
from core.recipe import Group, Recipe
from core.schedules import Exponential, InverseTime, Linear, Plateau
from core.session import Session
from core.state import state_of, tensors_of
from tests.core.build import assert_same_bits, assert_same_state, go, held, make, picture, step, trajectory

START = {"w": [[1.0, -2.0], [0.5, 4.0], [-0.0, 0.0]], "b": [0.25, -0.5], "s": 3.0}
RANDOM = np.random.default_rng(11)
GRADIENTS = [
    {"w": RANDOM.normal(size=(3, 2)), "b": RANDOM.normal(size=2), "s": np.asarray(RANDOM.normal())} for _ in range(5)
]
# One form of each kind, and those that keep other things than their kind does by default.
RULES: dict[str, Optimizer] = {kind: cls() for kind, cls in KINDS.items()} | {
    "momentum lookahead": Momentum(nesterov="lookahead"),
    "rmsprop with everything": RmsProp(momentum=0.5, centered=True),
    "adagrad full": Adagrad(matrix="full", initial_accumulator=0.1),
    "adam scheduled": Adam(lr=Linear(0.1, 0.01, 3), beta1=Linear(0.5, 0.9, 3)),
    "adam cautious": Adam(cautious=True),
    "lbfgs without a search": Lbfgs(line_search="none"),
}
# Those whose parameters a client may hold.
CLIENTS = [name for name, rule in RULES.items() if not make(rule, START).recipe.held_only]
PARTIAL = [name for name, rule in RULES.items() if not make(rule, START).recipe.whole_only]
# Those that move at every gradient.
PROMPT = [name for name, rule in RULES.items() if not make(rule, START).recipe.sequential or rule.kind == "sophia"]


def whole(**tensors: Any) -> dict[str, Any]:
    """A full gradient, but for `tensors`."""
    return GRADIENTS[0] | tensors


def rows(indices: list[int], values: Any) -> Rows:
    return Rows(np.array(indices, np.int64), np.asarray(values, np.float64))


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


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(value, np.float64) for name, value in tensors.items()}


@pytest.mark.parametrize("want_updates", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_frozen_tensors_keep_still(name: str, want_updates: bool) -> None:
    session = make(RULES[name], START, groups=[Group("w", {}, frozen=True)])
    before = picture(session)
    for gradients in GRADIENTS:
        go(session, gradients, want_updates=want_updates)
    after = picture(session)
    changed = {name for name in after if after[name] != before[name]}
    assert not {name for name in changed if name.split(":")[0] == "w"}
    assert {"b", "s", "step"} <= changed


def test_groups_override_and_the_last_match_decides_alone() -> None:
    start = {"a.weight": [0.0], "a.bias": [0.0], "b.bias": [0.0], "c": [0.0]}
    groups = [Group("a.*", {"lr": 2.0, "momentum": 0.5}), Group("*.bias", {"lr": 3.0}), Group("b.*", {}, frozen=True)]
    session = make(Momentum(lr=1.0, momentum=0.0), start, groups=groups)
    for _ in range(2):
        step(session, {name: np.ones(1) for name in start})
    # a.weight: -2·1 - 2·1.5; a.bias: the last match is *.bias alone, so its momentum is 0 again.
    assert held(session).tolist() == [-5.0, -6.0, 0.0, -2.0]


def test_groups_in_matrix_form_have_a_rate_alone() -> None:
    start = {"a": [0.0, 0.0], "b": [0.0]}
    session = make(Newton(lr=0.5), start, groups=[Group("b", {"lr": 2.0})])
    step(session, {"a": np.ones(2), "b": np.ones(1)}, hessian=-np.eye(3))
    np.testing.assert_allclose(held(session), [-0.5, -0.5, -2.0], rtol=1e-15)
    with pytest.raises(InvalidRecipe) as refused:
        make(Newton(), start, groups=[Group("b", {"damping": 2.0})])
    assert refused.value.pointer == "/groups/0/damping"


def test_groups_have_their_own_initial_slots() -> None:
    groups = [Group("b", {"initial_accumulator": 4.0})]
    session = make(Adagrad(lr=1.0, eps=0.0, initial_accumulator=1.0), {"a": [0.0], "b": [0.0]}, groups=groups)
    step(session, {"a": np.sqrt([3.0]), "b": np.sqrt([5.0])})
    np.testing.assert_allclose(held(session), [-np.sqrt(3) / 2, -np.sqrt(5) / 3], rtol=1e-15)


@pytest.mark.parametrize(
    ("overrides", "pointer"),
    [
        ({"lr": -1.0}, "/groups/1/lr"),
        ({"rate": 1.0}, "/groups/1/rate"),
        ({"lr": Linear(0.1, -0.1, 3)}, "/groups/1/lr"),
        ({"lr": Linear(0.1, 0.2, 0)}, "/groups/1/lr/steps"),
    ],
)
def test_groups_are_checked(overrides: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        make(Sgd(), START, groups=[Group("w", {}), Group("b", overrides)])
    assert refused.value.pointer == pointer


def test_groups_may_keep_more_than_the_others() -> None:
    """A velocity for one tensor alone; to the others it is as if it were not there."""
    session = make(RmsProp(), START, groups=[Group("b", {"momentum": 0.9})])
    alone = make(RmsProp(momentum=0.9), {"b": START["b"]})
    plain = make(RmsProp(), START)
    for gradients in GRADIENTS:
        step(session, gradients)
        step(alone, {"b": gradients["b"]})
        step(plain, gradients)
    assert set(session.state.slots) == {"s", "v"}
    assert_same_bits(held(session)[6:8], held(alone))
    assert_same_bits(held(session)[:6], held(plain)[:6])
    assert not session.state.slots["v"][:6].any()


# Schedules of anything

SCHEDULED: list[tuple[Optimizer, Callable[[int], dict[str, float]]]] = [
    (Momentum(momentum=Linear(0.5, 0.9, 4)), lambda t: {"momentum": [0.5, 0.6, 0.7, 0.8, 0.9][t - 1]}),
    (RmsProp(momentum=Linear(0.0, 0.5, 1)), lambda t: {"momentum": [0.0, 0.5, 0.5, 0.5, 0.5][t - 1]}),
    (Adam(beta1=Linear(0.5, 0.9, 4), beta2=Linear(0.9, 0.5, 4)),
     lambda t: {"beta1": [0.5, 0.6, 0.7, 0.8, 0.9][t - 1], "beta2": [0.9, 0.8, 0.7, 0.6, 0.5][t - 1]}),
    (Adam(eps=Exponential(0.1, 0.1)), lambda t: {"eps": 10.0**-t}),
    (AdamW(weight_decay=InverseTime(0.5, 1.0)), lambda t: {"weight_decay": 0.5 / t}),
    (Adagrad(lr_decay=Linear(0.0, 1.0, 4)), lambda t: {"lr_decay": (t - 1) / 4}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "values"), SCHEDULED, ids=lambda value: getattr(value, "kind", ""))
def test_any_number_may_be_a_schedule(rule: Optimizer, values: Callable[[int], dict[str, float]]) -> None:
    """The same as changing the numbers by hand before each step."""
    scheduled = make(rule, START)
    by_hand = make(replace(rule, momentum=0.5) if isinstance(rule, RmsProp) else replace(rule, **values(1)), START)
    for t, gradients in enumerate(GRADIENTS, 1):
        step(scheduled, gradients)
        if not isinstance(rule, RmsProp):  # whose velocity would come and go with its number
            new = replace(by_hand.recipe, optimizer=replace(by_hand.recipe.optimizer, **values(t)))
            by_hand.apply(by_hand.check(NewRecipe(new)))
        elif t == 1:
            by_hand.apply(by_hand.check(NewRecipe(by_hand.recipe)))
        step(by_hand, gradients)
        np.testing.assert_allclose(held(scheduled), held(by_hand), rtol=1e-13)


def test_a_schedule_that_outgrows_every_number_cannot_stop_a_step() -> None:
    session = make(Sgd(lr=Exponential(1.0, 1e300)), {"w": [0.0]})
    for _ in range(5):
        step(session, {"w": np.array([1e-3])})
    assert session.state.step == 5
    assert held(session).tolist() == [-np.inf]


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


# The state as named tensors


@pytest.mark.parametrize("held_here", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RULES)
def test_state_round_trip(name: str, dtype: str, held_here: bool) -> None:
    rule = RULES[name]
    if name not in CLIENTS and not held_here:
        pytest.skip("the session must hold the parameters")
    averaging = Ema(decay=0.9) if held_here else None
    session = make(rule, START, dtype=dtype, held=held_here, averaging=averaging)
    beside = {} if held_here or "params" not in rule.needs else {"params": as_arrays(START)}
    for gradients in GRADIENTS[:3]:
        go(session, gradients, **beside)
    tensors = tensors_of(session.recipe, session.state)
    exact = {name for name, own in session.recipe.own.items() if own.exact}
    assert all(array.dtype == ("float64" if name in exact else dtype) for name, array in tensors.items())
    restored = Session(session.recipe, state_of(session.recipe, 3, tensors, session.state.moves), Evaluator())
    assert_same_state(restored.state, session.state)
    mine = {id(array) for array in [session.state.params, *session.state.slots.values()]}
    assert not mine & {id(array) for array in [*restored.state.slots.values()]}
    for gradients in GRADIENTS[3:]:
        ours = go(session, gradients, want_updates=True, **beside)
        theirs = go(restored, gradients, want_updates=True, **beside)
        assert_same_bits(ours.updates, theirs.updates)
        assert_same_state(restored.state, session.state)


def test_state_names() -> None:
    session = make(Adam(), {"w": np.zeros((2, 3)), "b": np.zeros(())}, averaging=Ema())
    tensors = tensors_of(session.recipe, session.state)
    assert {name: array.shape for name, array in tensors.items()} == {
        "w": (2, 3), "w:m": (2, 3), "w:v": (2, 3), "w:average": (2, 3),
        "b": (), "b:m": (), "b:v": (), "b:average": (),
    }  # fmt: skip
    full = make(Adagrad(matrix="full"), {"w": np.zeros((2, 3))})
    assert tensors_of(full.recipe, full.state)[":G"].shape == (6, 6)
    assert session.recipe.state_bytes() == 7 * 3 * 8
    assert full.recipe.state_bytes() == 36 * 8
    assert session.state.nbytes == 7 * 4 * 8


@pytest.mark.parametrize(
    ("change", "step_number"),
    [
        ({"w:m": None}, 1),
        ({"b": None}, 0),
        ({"w:x": np.zeros(2)}, 1),
        ({"other": np.zeros(2)}, 1),
        ({"w:m": np.zeros(3)}, 1),
        ({"w:m": np.zeros((2, 1))}, 1),
        ({"w:m": np.zeros(2, np.float32)}, 1),
        ({"w": np.zeros(2, np.float32)}, 1),
    ],
)
def test_state_that_is_not_one(change: dict[str, Array | None], step_number: int) -> None:
    session = make(Adam(), {"w": [1.0, 2.0], "b": [3.0]})
    tensors = tensors_of(session.recipe, session.state) | change
    found = {name: array for name, array in tensors.items() if array is not None}
    with pytest.raises(InvalidState):
        state_of(session.recipe, step_number, found)


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (Lbfgs(), ":place", [np.nan, np.inf, -1.0, 0.5, 10.0]),
        (KINDS["adopt"](), "w:taken", [np.nan, np.inf, -1.0, 0.5]),
        (KINDS["adan"](), "b:taken", [np.nan, -1.0]),
        (KINDS["soap"](), "w:count", [np.nan, np.inf, -1.0]),
        (KINDS["novograd"](), "w:v", [np.nan, -1.0, -np.inf]),
        (KINDS["dog"](), ":squares", [np.nan, -np.inf]),
        (Adagrad(matrix="full"), ":G", [np.nan, np.inf]),
        (KINDS["sam"](), ":climbing", [2.0, np.nan]),
        (KINDS["nadam"](), "s:product", [-1.0, np.nan]),
        (Adam(beta1=Plateau(0.9)), ":plateau.beta1", [-1.0, 1.0, 1e300, np.nan]),
    ],
)
def test_numbers_that_a_rule_could_not_go_on_from_are_no_state(rule: Optimizer, name: str, values: list[float]) -> None:
    session = make(rule, START)
    for gradients in GRADIENTS[:3]:
        go(session, gradients)
    tensors, moves = tensors_of(session.recipe, session.state), session.state.moves
    assert state_of(session.recipe, 3, tensors, moves).step == 3
    for value in values:
        forged = tensors[name].copy()
        forged.flat[0] = value
        with pytest.raises(InvalidState, match=name):
            state_of(session.recipe, 3, tensors | {name: forged}, moves)


def test_state_at_step_0_may_leave_slots_out() -> None:
    session = make(Adagrad(initial_accumulator=0.5), START)
    tensors = tensors_of(session.recipe, session.state)
    bare = {name: array for name, array in tensors.items() if ":" not in name}
    assert_same_state(state_of(session.recipe, 0, bare), session.state)


def test_copy_of_a_state_is_its_own() -> None:
    for rule in (Adam(), Adagrad(matrix="full")):
        session = make(rule, START)
        step(session, GRADIENTS[0])
        before, copied = picture(session), session.state.copy()
        step(session, GRADIENTS[1])
        assert picture(Session(session.recipe, copied, Evaluator())) == before


# Other recipes


def test_new_recipe_keeps_the_moments() -> None:
    session = make(Adam(lr=0.1), START)
    step(session, GRADIENTS[0])
    before = picture(session)
    slower = replace(session.recipe, optimizer=Adam(lr=0.01), groups=(Group("b", {"lr": 1.0}),))
    session.apply(session.check(NewRecipe(slower)))
    assert picture(session) == before
    assert session.recipe is slower
    step(session, GRADIENTS[1])
    reference = make(Adam(lr=0.1), START)
    step(reference, GRADIENTS[0])
    same = Session(slower, reference.state, Evaluator())
    step(same, GRADIENTS[1])
    assert_same_state(session.state, same.state)


def test_new_recipe_adds_and_drops_slots() -> None:
    session = make(RmsProp(momentum=0.9), START, averaging=Ema())
    step(session, GRADIENTS[0])
    kept = {name: session.state.slots[name].copy() for name in ("s", "average")}
    session.apply(session.check(NewRecipe(replace(session.recipe, optimizer=RmsProp(centered=True)))))
    assert set(session.state.slots) == {"s", "mean", "average"}
    for name, array in kept.items():
        assert_same_bits(session.state.slots[name], array)
    assert not session.state.slots["mean"].any()
    step(session, GRADIENTS[1])
    assert set(tensors_of(session.recipe, session.state)) == {
        f"{tensor}{slot}" for tensor in START for slot in ("", ":s", ":mean", ":average")
    }


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": Sgd()},
        {"optimizer": Adagrad(matrix="full")},
        {"dtype": "float32"},
        {"averaging": Ema()},
        {"layout": make(Sgd(), {"w": [0.0]}).layout},
    ],
)
def test_new_recipe_cannot_change_what_the_state_is_made_of(change: dict[str, Any]) -> None:
    session = make(Adagrad(), START)
    before = picture(session)
    with pytest.raises(InvalidRecipe):
        session.check(NewRecipe(replace(session.recipe, **change)))
    assert picture(session) == before


def test_describe_has_every_default_filled_in() -> None:
    rule = Momentum(lr=Linear(0.1, 0.0, 5))
    recipe: Recipe = make(rule, START, groups=[Group("b", {"lr": 0.5}), Group("s", {}, frozen=True)]).recipe
    assert recipe.describe() == {
        "optimizer": {
            "kind": "momentum",
            "lr": {"kind": "linear", "init": 0.1, "end": 0.0, "steps": 5},
            "momentum": 0.9,
            "dampening": 0.0,
            "nesterov": False,
            "lr_in_velocity": False,
            "first_step": "damped",
        },
        "shapes": {"w": [3, 2], "b": [2], "s": []},
        "dtype": "float64",
        "groups": [{"match": "b", "lr": 0.5}, {"match": "s", "frozen": True}],
        "averaging": None,
        "non_finite": "reject",
        "state_dtype": None,
        "state_seed": None,
        "transforms": [],
        "aggregation": {"mode": "async", "reduce": {"kind": "mean"}, "worker_timeout": 60.0},
    }


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


MEANINGS: list[tuple[Optimizer, Optimizer, str | None]] = [
    (Momentum(), Momentum(nesterov="lookahead"), "/optimizer/lr_in_velocity"),
    (Momentum(), Momentum(lr_in_velocity=True), "/optimizer/lr_in_velocity"),
    (Momentum(), Momentum(nesterov=True), None),
    (Momentum(lr_in_velocity=True), Momentum(nesterov="lookahead"), None),
    (RmsProp(momentum=0.5), RmsProp(momentum=0.5, lr_in_velocity=True), "/optimizer/lr_in_velocity"),
    (RmsProp(), RmsProp(momentum=0.5, lr_in_velocity=True), None),
    (KINDS["laprop"](), KINDS["laprop"](lr_in_velocity=True), "/optimizer/lr_in_velocity"),
    (KINDS["lars"](), KINDS["lars"](lr_in_velocity=False), "/optimizer/lr_in_velocity"),
    (KINDS["muon"](), KINDS["muon"](momentum_form="heavy_ball"), "/optimizer/momentum_form"),
    (Adam(amsgrad="raw"), Adam(amsgrad="corrected"), "/optimizer/amsgrad"),
    (Adam(), Adam(amsgrad="corrected"), None),
    (Adagrad(), Adagrad(matrix="full"), "/optimizer/matrix"),
    (Lbfgs(), Lbfgs(history=5), "/optimizer/history"),
    (KINDS["sam"](base=Momentum()), KINDS["sam"](base=Momentum(lr_in_velocity=True)), "/optimizer/base/lr_in_velocity"),
]


@pytest.mark.parametrize(("old", "new", "pointer"), MEANINGS, ids=lambda value: getattr(value, "kind", ""))
def test_what_the_state_means_cannot_change(old: Optimizer, new: Optimizer, pointer: str | None) -> None:
    """A velocity with the rate in it, read as one without it, would be a step a thousand times too long."""
    session = make(old, START)
    for gradients in GRADIENTS[:2]:
        go(session, gradients)
    before = picture(session)
    entry = NewRecipe(replace(session.recipe, optimizer=new))
    if pointer is None:
        session.apply(session.check(entry))
        return
    with pytest.raises(InvalidRecipe) as refused:
        session.check(entry)
    assert refused.value.pointer == pointer
    assert picture(session) == before


def test_a_group_cannot_change_what_the_state_of_its_tensors_means() -> None:
    session = make(Momentum(), START)
    changed = replace(session.recipe, groups=(Group("b", {"lr_in_velocity": True}),))
    with pytest.raises(InvalidRecipe):
        session.check(NewRecipe(changed))
