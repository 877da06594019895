"""Groups of tensors with hyperparameters of their own, frozen ones, and schedules of any number."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.contributions import NewRecipe
from core.errors import (
    InvalidRecipe,
)
from core.optimizers import Optimizer
from core.optimizers.adam import Adam, AdamW
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.second_order import Newton
from core.recipe import Group
from core.schedules import Exponential, InverseTime, Linear
from tests.core.build import assert_same_bits, go, held, make, picture, step
from tests.core.sessions import GRADIENTS, RULES, START


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
