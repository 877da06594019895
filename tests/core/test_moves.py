"""A gradient's way into a state: what holds it back, what is counted, whose schedule it is, and where it ends.

Single transforms are tested in transforms/, wrappers in test_wrappers.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.averaging import Ema, Polyak
from core.contributions import Contribution, NewRecipe
from core.errors import InvalidRecipe, LossRequired
from core.evaluate import Evaluator, Spec
from core.layout import Array, Rows
from core.optimizers import KINDS, Optimizer
from core.optimizers.adam import Adam, AdamW, SparseAdam
from core.optimizers.averaged import ScheduleFree
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.parameter_free import Prodigy
from core.optimizers.quasi_newton import Lbfgs
from core.optimizers.wrappers import Lookahead, Sam
from core.recipe import Group, Recipe
from core.schedules import Linear, Plateau
from core.session import Session
from core.transforms.accumulating import Accumulate, GradientEma
from tests.core.build import assert_same_bits, assert_same_state, go, held, make, picture, step, transform_of

START = {"w": [[1.0, -2.0], [0.5, 4.0], [-0.0, 0.0]], "b": [0.25, -0.5]}
RANDOM = np.random.default_rng(5)
GRADIENTS = [{"w": RANDOM.normal(size=(3, 2)), "b": RANDOM.normal(size=2)} for _ in range(12)]
ONE = {"a": np.ones(1)}
ACCUMULATE = {"kind": "accumulate", "steps": 3}
UNSCALE = {"kind": "unscale", "scale": 1.0, "dynamic": True}


def alone(rule: Optimizer, **options: Any) -> Session:
    """A session of one parameter, 0."""
    return make(rule, {"a": [0.0]}, **options)


def way(session: Session, steps: int, **beside: Any) -> list[float]:
    """What each of some gradients of 1 takes from the first parameter."""
    found = []
    gradients = {slot.name: np.ones(slot.shape) for slot in session.layout}
    for _ in range(steps):
        before = float(held(session)[0])
        step(session, gradients, **beside)
        found.append(before - float(held(session)[0]))
    return found


# Held back


def test_each_hold_back_counts_its_own_gradients() -> None:
    """Scaled, three of them made one, and one of two of those climbs: a move for each six that are finite."""
    session = alone(Sam(Sgd(lr=1.0), 0.5), transforms=[UNSCALE, ACCUMULATE])
    seen, points = [], []
    for count in range(1, 15):
        value = np.inf if count in (2, 9) else 1.0
        step(session, {"a": np.array([value])})
        seen.append(session.state.moves)
        points.append(session.next_point().item())
    assert session.state.step == 14
    assert seen == [0] * 6 + [1] * 7 + [2]
    # The scale is halved twice: the gradients are 1, from the third one on 2, and from the tenth on 4.
    assert points == [0.0] * 3 + [0.5] * 3 + [-2.0] * 4 + [-1.5] * 3 + [-6.0]


@pytest.mark.parametrize("held_here", [True, False])
@pytest.mark.parametrize("want_updates", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_step_that_is_held_back_moves_nothing(fresh: bool, want_updates: bool, held_here: bool) -> None:
    session = make(Adam(), START, transforms=[ACCUMULATE], held=held_here)
    before = picture(session)
    outcome = step(session, GRADIENTS[0], want_updates=want_updates, fresh=fresh)
    after = picture(session)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"step", "w:accumulate.mean", "b:accumulate.mean", ":accumulate.count"}
    assert session.state.moves == 0
    assert (outcome.updates is not None) == (want_updates or not held_here)
    if outcome.updates is not None:  # added to any parameters they change no bit of them
        assert_same_bits(np.array([-0.0] * 8), np.array([-0.0] * 8) + outcome.updates)


@pytest.mark.parametrize("rule", [Adam(lr=0.1), Momentum(lr=Linear(0.1, 0.5, 2)), AdamW(lr=0.1), Prodigy(), Lbfgs()],
                         ids=lambda rule: rule.kind)  # fmt: skip
def test_moves_are_what_schedules_and_bias_corrections_count(rule: Optimizer) -> None:
    """Three gradients that are the same and accumulated are one."""
    many, one = make(rule, START, transforms=[ACCUMULATE]), make(rule, START)
    for gradients in GRADIENTS[:4]:
        for _ in range(3):
            step(many, gradients)
        step(one, gradients)
        assert_same_bits(held(many), held(one))
    assert (many.state.step, many.state.moves, one.state.moves) == (12, 4, 4)


def test_the_debiased_mean_of_gradients_counts_those_that_reach_it() -> None:
    ema = {"kind": "ema", "decay": 0.5}
    session = alone(Sgd(lr=1.0), transforms=[{"kind": "accumulate", "steps": 2}, ema])
    assert way(session, 6) == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert session.state.own[":ema.rest"] == 0.5**3


@pytest.mark.parametrize(("averaging", "expected"), [(Polyak(), -2.0), (Ema(decay=0.5), -17 / 8 / (1 - 1 / 8))])
def test_averages_count_moves(averaging: Any, expected: float) -> None:
    session = alone(Sgd(lr=1.0), transforms=[ACCUMULATE], averaging=averaging)
    way(session, 2)
    assert session.final_point().tolist() == [0.0]
    way(session, 7)
    assert session.final_point().item() == pytest.approx(expected, rel=1e-15)


def test_transforms_are_in_the_order_given_on_both_sides_of_a_hold() -> None:
    """Clipped before they are added up, or after."""
    clip, total = {"kind": "clip", "max_value": 1.0}, {"kind": "accumulate", "steps": 2, "reduce": "sum"}
    for transforms, expected in (([clip, total], 2.0), ([total, clip], 1.0)):
        session = alone(Sgd(lr=1.0), transforms=transforms)
        step(session, {"a": np.array([3.0])})
        step(session, {"a": np.array([3.0])})
        assert held(session).tolist() == [-expected]


def test_transforms_of_a_kind_have_a_state_each() -> None:
    slow, fast = {"kind": "ema", "decay": 0.75, "debias": False}, {"kind": "ema", "decay": 0.5, "debias": False}
    session = alone(Sgd(lr=1.0), transforms=[slow, fast])
    assert way(session, 2) == [0.125, 0.125 / 2 + 0.4375 / 2]
    assert session.state.slots["ema.mean"].tolist() == [0.4375]
    assert session.state.slots["ema.2.mean"].tolist() == [0.28125]


# Schedules and plateaus


def test_a_plateau_follows_the_losses() -> None:
    plateau = Plateau(1.0, factor=0.5, patience=1)
    for rule in (Sgd(lr=plateau), Lookahead(Sgd(lr=plateau), 1000), ScheduleFree(base=Sgd(lr=plateau), beta=0.0)):
        session = alone(rule)
        rates = []
        for loss in (3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0):
            rates.append(session.rate())
            step(session, ONE, loss=loss)
        assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
        with pytest.raises(LossRequired):
            session.check(Contribution(ONE))


def test_each_plateau_is_that_of_its_own_hyperparameter() -> None:
    """Of the method, of two groups and of a transform: each with a value that only it can have."""
    session = make(
        Momentum(lr=Plateau(1.0, factor=0.5, patience=0), momentum=0.0),
        {"a": [0.0], "b": [0.0], "c": [0.0], "d": [0.0]},
        groups=[Group("b", {"lr": Plateau(3.0, factor=0.5, patience=0)}), Group("c", {"momentum": 0.5}),
                Group("d", {"lr": Plateau(7.0, factor=0.1, patience=0)})],
        transforms=[{"kind": "sign"}, {"kind": "clip", "max_value": {"kind": "plateau", "init": 0.5, "patience": 0}}],
    )  # fmt: skip
    assert set(session.recipe.plateaus) == {"lr", "groups.0.lr", "groups.2.lr", "transforms.1.max_value"}
    gradients = {name: np.ones(1) for name in "abcd"}
    for _ in range(2):
        before = held(session).copy()
        step(session, gradients, loss=1.0)
        np.testing.assert_array_equal(before - held(session), [0.5, 1.5, 0.5 if before[0] == 0 else 0.75, 3.5])
    before = held(session).copy()
    step(session, gradients, loss=1.0)
    clipped = 0.05
    expected = [0.5 * clipped, 1.5 * clipped, 0.5 * (0.375 + clipped), 0.7 * clipped]
    np.testing.assert_allclose(before - held(session), expected, rtol=1e-13)


def test_losses_count_although_the_step_is_held_back() -> None:
    session = alone(Sgd(lr=Plateau(1.0, factor=0.5, patience=1)), transforms=[ACCUMULATE])
    assert way(session, 6, loss=1.0) == [0.0, 0.0, 1.0, 0.0, 0.0, 0.25]


CLIP = {"kind": "clip", "max_value": {"kind": "linear", "init": 0.5, "end": 0.1, "steps": 4}}


@pytest.mark.parametrize("start", [0, 3])
def test_what_is_foreseen_is_what_is_used(start: int) -> None:
    """The rates of the method, of a group, and of a transform, from wherever the session stands."""
    rates, others = Linear(1.0, 0.0, 8), Linear(0.0, 2.0, 5)
    session = make(
        Lookahead(Sgd(lr=rates), 1000), {"a": [0.0], "b": [0.0]}, groups=[Group("b", {"lr": others})],
        transforms=[{"kind": "accumulate", "steps": 2}, CLIP],
    )  # fmt: skip
    gradients = {"a": np.ones(1), "b": np.ones(1)}
    for _ in range(2 * start + 1):
        step(session, gradients)
    foreseen = session.preview(5)
    assert foreseen["lr"] == foreseen["/optimizer/base/lr"]
    assert set(foreseen) == {"lr", "/optimizer/base/lr", "/groups/0/lr", "/transforms/1/max_value"}
    for i in range(5):
        before = held(session).copy()
        assert session.rate() == foreseen["lr"][i]
        step(session, gradients)
        clipped = foreseen["/transforms/1/max_value"][i]
        moved = np.array([foreseen["lr"][i] * clipped, foreseen["/groups/0/lr"][i] * clipped])
        np.testing.assert_allclose(before - held(session), moved, rtol=1e-13, atol=1e-15)
        step(session, gradients)


# Cautious


def cautious(u: Array, g: Array) -> Array:
    """Liang et al. 2024: what points along the gradient stays, the rest makes up for it."""
    kept = [float(x * y < 0) for x, y in zip(u, g, strict=True)]
    share = max(sum(kept) / len(kept), 1e-3)
    return np.array([x * k / share for x, k in zip(u, kept, strict=True)])


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("held_here", [True, False])
def test_cautious_masks_each_tensor_by_itself_and_not_the_decay(held_here: bool, decay: float) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": decay, "cautious": True}
    session = make(AdamW(**options), START, held=held_here)
    p = {name: np.array(value).reshape(-1) for name, value in START.items()}
    m, v = ({name: np.zeros(len(value)) for name, value in p.items()} for _ in range(2))
    masked = 0
    for t, gradients in enumerate([*GRADIENTS[:6], {"w": np.eye(3, 2), "b": np.zeros(2)}], 1):
        beside = {} if held_here else {"params": {n: x.reshape(np.shape(START[n])) for n, x in p.items()}}
        outcome = step(session, gradients, want_updates=True, **({} if not decay else beside))
        found = []
        for name in p:
            g = gradients[name].reshape(-1)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            u = -0.1 * (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            masked += int((u * g >= 0).sum())
            found.append(cautious(u, g) - 0.1 * decay * p[name])
            p[name] = p[name] + found[-1]
        np.testing.assert_allclose(outcome.updates, np.concatenate(found), rtol=1e-12, atol=1e-16)
    assert masked > 5


def test_cautious_never_grows_without_end() -> None:
    """One of ten thousand elements points down: it moves a thousand times as far, no more."""
    session = make(AdamW(lr=1.0, beta1=0.5, weight_decay=0.0, cautious=True, eps=0.0), {"a": np.zeros(10_000)})
    step(session, {"a": np.ones(10_000)})
    before = held(session).copy()
    g = np.full(10_000, -0.25)
    g[0] = 0.25
    step(session, {"a": g})
    moved = before - held(session)
    assert np.count_nonzero(moved) == 1
    assert 500 < moved[0] < 1000


@pytest.mark.parametrize("rule", [AdamW(lr=0.1, cautious=True), AdamW(lr=0.1, cautious=True, weight_decay=0.0)])
def test_cautious_rows_are_those_of_the_whole_tensor_with_zeros(rule: Optimizer) -> None:
    sparse, dense = make(rule, START), make(rule, START)
    for t, gradients in enumerate(GRADIENTS[:4]):
        w = np.zeros((3, 2))
        w[t % 3] = gradients["w"][0]
        step(sparse, gradients | {"w": Rows(np.array([t % 3]), w[[t % 3]])}, want_updates=t % 2 == 0)
        step(dense, gradients | {"w": w})
        assert_same_state(sparse.state, dense.state)


# Rows


def test_rows_of_a_lazy_method_stay_rows_behind_transforms_that_keep_them() -> None:
    for transform, lazy in (
        ({"kind": "clip_by_global_norm", "max_norm": 0.1}, True),
        ({"kind": "l1", "l1": 0.1}, False),
    ):
        session = make(SparseAdam(lr=0.1), START, transforms=[transform])
        step(session, GRADIENTS[0])
        before = session.state.slots["m"][:6].reshape(3, 2).copy()
        step(session, {"w": Rows(np.array([1]), np.ones((1, 2)))}, partial=True)
        touched = (session.state.slots["m"][:6].reshape(3, 2) != before).all(axis=1).tolist()
        assert touched == ([False, True, False] if lazy else [True, True, True])


@pytest.mark.parametrize("make_rule", [lambda: Lookahead(Adam(), 2), lambda: Sam(Adam()), lambda: KINDS["lamb"](),
                                       lambda: KINDS["dog"](), lambda: Lookahead(KINDS["muon"](), 3)])  # fmt: skip
@pytest.mark.parametrize("transforms", [[], [ACCUMULATE], [{"kind": "normalize"}, {"kind": "ema", "decay": 0.9}],
                                        [{"kind": "adaptive_clip"}, {"kind": "centralize"}]])  # fmt: skip
def test_rows_are_the_tensor_with_zeros_whatever_they_pass(make_rule: Any, transforms: list[Any]) -> None:
    sparse, dense = (make(make_rule(), START, transforms=transforms) for _ in range(2))
    for t, gradients in enumerate(GRADIENTS[:7]):
        picked = np.array([[2, 0], [1, 1], [], [0, 1]][t % 4], np.int64)
        w = np.zeros((3, 2))
        np.add.at(w, picked, gradients["w"][: len(picked)])
        step(sparse, gradients | {"w": Rows(picked, gradients["w"][: len(picked)])})
        step(dense, gradients | {"w": w})
        for ours, theirs in ((sparse.next_point(), dense.next_point()), (held(sparse), held(dense))):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-16)


# Projections

BOX = {"kind": "project", "onto": "box", "low": -0.3, "high": 0.7}


@pytest.mark.parametrize("want_updates", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", [Adam(lr=0.5), Lookahead(Sgd(lr=0.9), 2, 0.3), Sam(Momentum(lr=0.7)), KINDS["lamb"]()],
                         ids=lambda rule: rule.kind)  # fmt: skip
def test_held_parameters_are_in_the_set(rule: Optimizer, dtype: str, fresh: bool, want_updates: bool) -> None:
    """To the bit: p + (projected - p) may be just outside. Frozen tensors stay where they are."""
    groups = [Group("b", {}, frozen=True)]
    session, other = (make(rule, START, dtype=dtype, transforms=[BOX], groups=groups) for _ in range(2))
    low, high = np.array([-0.3, 0.7], dtype)
    at_the_ends = 0
    for gradients in GRADIENTS:
        old = held(session)
        before = old.copy()
        outcome = step(session, gradients, fresh=fresh, want_updates=want_updates)
        step(other, gradients)
        assert_same_state(session.state, other.state)
        assert not fresh or (old == before).all()
        w, b = held(session)[:6], held(session)[6:]
        assert session.state.moves == 0 or (low <= w.min() and w.max() <= high)
        at_the_ends += int(((w == low) | (w == high)).sum())
        assert b.tolist() == [0.25, -0.5]
        if outcome.updates is not None:
            np.testing.assert_allclose(before + outcome.updates, held(session), atol=1e-6)
    assert at_the_ends > 10


def test_a_client_is_given_what_brings_its_parameters_into_the_set() -> None:
    session, here = make(Sgd(lr=1.0), START, held=False, transforms=[BOX]), make(Sgd(lr=1.0), START, transforms=[BOX])
    params = {name: np.asarray(value) for name, value in START.items()}
    outcome = step(session, GRADIENTS[0], params=params)
    step(here, GRADIENTS[0])
    start = np.concatenate([value.reshape(-1) for value in params.values()])
    np.testing.assert_allclose(start + outcome.updates, held(here), rtol=1e-15)


@pytest.mark.parametrize("kind", ["lbfgs", "bfgs", "schedule_free", "asgd", "dog", "prodigy"])
def test_methods_that_remember_their_own_way_cannot_be_projected(kind: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        make(KINDS[kind](), START, transforms=[{"kind": "sign"}, BOX])
    assert refused.value.pointer == "/transforms/1"
    assert kind in refused.value.reason


# What a change of recipe carries on


def changed(session: Session, change: Callable[[Recipe], Recipe]) -> None:
    session.apply(session.check(NewRecipe(change(session.recipe))))


def test_a_plateau_goes_on_only_from_the_value_that_it_began_with() -> None:
    plateau = Plateau(1.0, factor=0.5, patience=0)
    for new, expected in [(replace(plateau, patience=9), 0.25), (replace(plateau, init=0.75), 0.75), (0.5, 0.5),
                          (replace(plateau, mode="max"), 1.0)]:  # fmt: skip
        session = alone(Sgd(lr=plateau))
        way(session, 3, loss=1.0)
        assert session.rate() == 0.25
        changed(session, lambda recipe, new=new: replace(recipe, optimizer=Sgd(lr=new)))
        assert session.rate() == session.preview(1)["lr"][0] == expected
        assert way(session, 1, loss=1.0) == [expected]


def test_a_plateau_of_a_group_goes_by_what_the_group_matches() -> None:
    first = Group("a", {"lr": Plateau(1.0, factor=0.5, patience=0)})
    second = Group("b", {"lr": Plateau(1.0, factor=0.1, patience=0)})
    session = make(Sgd(), {"a": [0.0], "b": [0.0]}, groups=[first, second])
    way(session, 3, loss=1.0)

    def rates() -> list[float]:
        return [values[0] for pointer, values in session.preview(1).items() if pointer.startswith("/groups")]

    assert rates() == [0.25, 0.1 * 0.1]
    changed(session, lambda recipe: replace(recipe, groups=(second,)))
    assert rates() == [0.1 * 0.1]
    changed(session, lambda recipe: replace(recipe, groups=(first, second, second)))
    assert rates() == [1.0, 0.1 * 0.1, 0.1 * 0.1]
    way(session, 1, loss=1.0)
    np.testing.assert_allclose(rates(), [1.0, 1e-3, 1e-3])  # one loss for each of the two, which share nothing


def test_a_plateau_of_a_transform_goes_by_the_transform() -> None:
    clip = transform_of({"kind": "clip", "max_value": Plateau(1.0, factor=0.5, patience=0)})
    session = alone(Sgd(lr=1.0), transforms=[clip])
    way(session, 3, loss=1.0)
    changed(session, lambda recipe: replace(recipe, transforms=(transform_of({"kind": "sign"}), clip)))
    assert session.preview(1)["/transforms/1/max_value"] == [0.25]
    assert way(session, 1, loss=1.0) == [0.25]


def test_what_a_transform_keeps_stays_together_or_begins_anew() -> None:
    """A correction that began with a mean that is full already would multiply the gradient."""
    session = alone(Sgd(lr=1.0), transforms=[GradientEma(0.5, debias=False)])
    way(session, 10)
    changed(session, lambda recipe: replace(recipe, transforms=(GradientEma(0.75, debias=False),)))
    assert session.state.slots["ema.mean"].item() > 0.99  # the same arrays, which stay
    changed(session, lambda recipe: replace(recipe, transforms=(GradientEma(0.5),)))
    assert way(session, 2) == [1.0, 1.0]
    total = alone(Sgd(lr=1.0), transforms=[{"kind": "accumulate", "steps": 3}])
    way(total, 2)
    changed(total, lambda recipe: replace(recipe, transforms=(Accumulate(3, "sum"),)))
    assert way(total, 3) == [0.0, 0.0, 3.0]


def test_what_needs_the_parameters_held_cannot_come_to_a_client_that_holds_them() -> None:
    session = make(Lbfgs(line_search="none"), START, held=False)
    searching = replace(session.recipe, optimizer=Lbfgs(line_search="strong_wolfe"))
    session.check(NewRecipe(searching))  # at step 0 they can still be given
    step(session, GRADIENTS[0])
    before = picture(session)
    with pytest.raises(InvalidRecipe, match="hold the parameters"):
        session.check(NewRecipe(searching))
    assert picture(session) == before


def test_what_schedule_free_wraps_cannot_change() -> None:
    session = make(ScheduleFree(base=Sgd()), START)
    with pytest.raises(InvalidRecipe, match="kind"):
        session.check(NewRecipe(replace(session.recipe, optimizer=ScheduleFree(base=AdamW()))))


# How


def test_parameters_that_are_overwritten_have_a_loop_of_their_own() -> None:
    """The one for arrays that do not overlap would be slower by the check for it."""
    for state_dtype in (None, "bfloat16"):
        asked: list[Spec] = []
        session = make(Adam(), {"w": np.zeros(20_000)}, evaluator=Evaluator(asked.append), state_dtype=state_dtype)
        step(session, {"w": np.ones(20_000)}, fresh=False)
        step(session, {"w": np.ones(20_000)}, fresh=True)
        assert [(spec.add, spec.in_place) for spec in asked] == [(True, True), (True, False)]


def test_an_enormous_point_is_no_warning() -> None:
    session = alone(Momentum(lr=1.5e308, nesterov="lookahead"))
    step(session, ONE)
    with np.errstate(all="raise"):
        assert session.next_point().item() == -math.inf


@pytest.mark.parametrize("rule", [Prodigy(), KINDS["polyak_sgd"](), KINDS["dadapt_adam"](weight_decay=0.1)],
                         ids=lambda rule: rule.kind)  # fmt: skip
def test_a_whole_method_sees_the_live_tensors_that_are_there(rule: Optimizer) -> None:
    """The same as a session of those alone; the slots of the others stay."""
    groups = [Group("f", {}, frozen=True)]
    start = {"f": [9.0], "a": [1.0, -2.0], "x": [5.0, 5.0], "b": [0.5]}
    session, small = make(rule, start, groups=groups), make(rule, {name: start[name] for name in "ab"})
    for gradients in GRADIENTS[:4]:
        sent = {"a": gradients["w"][0], "b": gradients["b"][:1]}
        go(session, sent | {"f": np.ones(1)}, partial=True)
        go(small, sent)
    assert_same_bits(held(session)[[1, 2, 5]], held(small))
    assert held(session)[[0, 3, 4]].tolist() == [9.0, 5.0, 5.0]
