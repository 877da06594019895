"""The state as named tensors, and what a new recipe may make of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.averaging import Ema
from core.contributions import NewRecipe
from core.errors import (
    InvalidRecipe,
    InvalidState,
)
from core.evaluate import Evaluator
from core.layout import Array
from core.optimizers import KINDS, Optimizer
from core.optimizers.adam import Adam
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.quasi_newton import Lbfgs
from core.recipe import Group, Recipe
from core.schedules import Linear, Plateau
from core.session import Session
from core.state import State, state_of, tensors_of
from tests.core.build import assert_same_bits, assert_same_state, go, make, picture, step
from tests.core.sessions import CLIENTS, GRADIENTS, RULES, START, as_arrays

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


# -- arrays that are taken as they are ---------------------------------------------------------------------------------


def lain(session: Session, *, gap: int = 0, reverse: bool = False, frozen: bool = False) -> dict[str, Array]:
    """The tensors of the state, those of a slot in one array one after the other, with `gap` bytes behind them."""
    found: dict[str, Array] = {}
    slots: dict[str, dict[str, Array]] = {}
    for name, array in tensors_of(session.recipe, session.state).items():
        slots.setdefault(name.partition(":")[2], {})[name] = array
    for tensors in slots.values():
        whole = np.zeros(sum(array.nbytes for array in tensors.values()) + gap, np.uint8)
        at = 0
        for name, array in sorted(tensors.items(), reverse=reverse):
            found[name] = np.ndarray(array.shape, array.dtype, whole, at)
            found[name][...] = array
            at += array.nbytes
        if frozen:
            whole.flags.writeable = False
    return found


def adopted(ways: dict[str, Any], **options: Any) -> tuple[Session, State, dict[str, Array]]:
    start = {"b": [1.0, 2.0], "w": [[3.0, 4.0], [5.0, 6.0]]}
    session = make(Adam(), start, dtype="float32", **options)
    for value in (1.0, -0.5):
        step(session, {name: np.full(np.shape(array), value) for name, array in start.items()})
    tensors = lain(session, **ways)
    state = state_of(session.recipe, 2, tensors, adopt=True)
    return session, state, tensors


def test_arrays_that_hold_a_slot_and_nothing_else_are_taken() -> None:
    session, state, tensors = adopted({})
    assert_same_state(state, session.state)
    assert state.params is not None
    for name, flat in (("b", state.params), ("b:m", state.slots["m"]), ("w:v", state.slots["v"])):
        assert np.shares_memory(tensors[name], flat)
    other = Session(session.recipe, state, Evaluator())
    for each in (session, other):
        step(each, {"b": np.ones(2), "w": np.ones((2, 2))})
    assert picture(session) == picture(other)


@pytest.mark.parametrize("ways", [{"gap": 4}, {"reverse": True}])
def test_others_are_copied(ways: dict[str, Any]) -> None:
    session, state, tensors = adopted(ways)
    assert_same_state(state, session.state)
    assert not any(np.shares_memory(array, flat) for array in tensors.values() for flat in state.slots.values())


def test_what_cannot_be_written_is_copied() -> None:
    session, state, _ = adopted({"frozen": True})
    assert_same_state(state, session.state)
    assert all(flat.flags.writeable for flat in state.slots.values())


def test_nothing_is_taken_of_who_does_not_say_so() -> None:
    session, _, tensors = adopted({})
    state = state_of(session.recipe, 2, tensors)
    assert not any(np.shares_memory(array, flat) for array in tensors.values() for flat in state.slots.values())


@pytest.mark.parametrize(("name", "shape"), [("b:m", (1, 2)), ("w:m", (4,))])
def test_what_is_taken_must_fit_all_the_same(name: str, shape: tuple[int, ...]) -> None:
    session, _, tensors = adopted({})
    tensors[name] = np.ndarray(
        shape, np.float32, tensors[name].base, tensors[name].ctypes.data - tensors["b:m"].ctypes.data
    )
    with pytest.raises(InvalidState, match=name):
        state_of(session.recipe, 2, tensors, adopt=True)


def test_slots_in_bfloat16_are_taken_as_well() -> None:
    session, state, tensors = adopted({}, state_dtype="bfloat16")
    assert np.shares_memory(tensors["b:m"], state.slots["m"])
    assert {name: array.tobytes() for name, array in tensors_of(session.recipe, state).items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
