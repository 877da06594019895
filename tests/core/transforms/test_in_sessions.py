"""Transforms in sessions: in their order, with the optimizer behind them, through refusals, rows and restores."""

import math
from typing import Any

import numpy as np
import pytest

from core.contributions import NewRecipe
from core.errors import MissingGradient, NonFinite, ParamsRequired
from core.layout import Array, Rows
from core.recipe import Group
from core.session import Session
from core.state import state_of, tensors_of
from core.transforms import KINDS
from tests.core.build import assert_same_bits, assert_same_state, held, make, optimizer_of, picture, step
from tests.core.transforms.pieces import SHAPES, close, tensors

PARAMS = tensors(seed=20)
GRADIENTS = [tensors(seed) for seed in range(30, 42)]
SGD = {"kind": "sgd", "lr": 0.5}
ADAM = {"kind": "adam", "lr": 0.1}

# Each kind once at least, with what has to be given.
EACH: list[dict[str, Any]] = [
    {"kind": "clip_by_global_norm", "max_norm": 2.0},
    {"kind": "clip_by_norm", "max_norm": 2.0},
    {"kind": "clip", "max_value": 0.5},
    {"kind": "adaptive_clip"},
    {"kind": "normalize"},
    {"kind": "centralize"},
    {"kind": "sign"},
    {"kind": "zero_nans"},
    {"kind": "unscale", "scale": 8.0},
    {"kind": "unscale", "dynamic": True, "growth_interval": 3},
    {"kind": "weight_decay", "weight_decay": 0.1},
    {"kind": "l1", "l1": 0.1},
    {"kind": "add_noise", "eta": 0.1},
    {"kind": "accumulate", "steps": 3},
    {"kind": "ema", "decay": 0.9},
    {"kind": "orthogonalize"},
    {"kind": "project", "onto": "simplex"},
]
LAST = {"kind": "clip", "max_value": 1.5}


def session_of(*transforms: dict[str, Any], optimizer: dict[str, Any] = SGD, **options: Any) -> Session:
    params = {name: array.astype(options.get("dtype", "float64")) for name, array in PARAMS.items()}
    return make(optimizer_of(optimizer), params, transforms=list(transforms), **options)


def named(session: Session) -> dict[str, Array]:
    return session.layout.views(held(session))


def test_every_kind_is_here() -> None:
    assert {settings["kind"] for settings in EACH} == set(KINDS)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("transform", EACH, ids=str)
def test_a_copy_of_the_state_goes_on_with_the_same_bits(transform: dict[str, Any], dtype: str) -> None:
    session = session_of(transform, LAST, optimizer=ADAM, dtype=dtype)
    for gradients in GRADIENTS[:5]:
        step(session, gradients)
    tensors_now = {name: array.copy() for name, array in tensors_of(session.recipe, session.state).items()}
    state = state_of(session.recipe, session.state.step, tensors_now, session.state.moves)
    copy = Session(session.recipe, state, session.evaluator)
    for gradients in GRADIENTS[5:]:
        step(session, gradients)
        step(copy, gradients)
    assert_same_state(session.state, copy.state)
    assert np.isfinite(held(session)).all()


@pytest.mark.parametrize("transform", EACH, ids=str)
def test_the_gradients_that_were_sent_are_not_written_to(transform: dict[str, Any]) -> None:
    session, sent = session_of(transform, LAST), {name: array.copy() for name, array in GRADIENTS[0].items()}
    for array in sent.values():
        array.flags.writeable = False
    for _ in range(4):
        step(session, sent)
    for name, array in sent.items():
        assert_same_bits(array, GRADIENTS[0][name])


def test_transforms_run_in_the_order_given() -> None:
    decay, clip = {"kind": "weight_decay", "weight_decay": 0.5}, {"kind": "clip", "max_value": 0.25}
    first, last = session_of(clip, decay), session_of(decay, clip)
    for session in (first, last):
        step(session, GRADIENTS[0])
    for name, p in PARAMS.items():
        g = GRADIENTS[0][name]
        close(named(first)[name], p - 0.5 * (np.clip(g, -0.25, 0.25) + 0.5 * p), 1e-15)
        close(named(last)[name], p - 0.5 * np.clip(g + 0.5 * p, -0.25, 0.25), 1e-15)


def test_accumulated_gradients_make_the_step_of_their_mean() -> None:
    session, plain = session_of({"kind": "accumulate", "steps": 3}, optimizer=ADAM), session_of(optimizer=ADAM)
    for count, gradients in enumerate(GRADIENTS, 1):
        before = held(session).copy()
        step(session, gradients)
        if count % 3:
            assert_same_bits(held(session), before)
            continue
        three = GRADIENTS[count - 3 : count]
        step(plain, {name: sum(g[name] for g in three) / 3 for name in PARAMS})
        close(held(session), held(plain), 1e-13)
    assert (session.state.step, session.state.moves) == (12, 4)


def test_schedules_count_the_steps_of_the_optimizer() -> None:
    rate = {"kind": "linear", "init": 1.0, "end": 0.0, "steps": 2}
    session = session_of({"kind": "accumulate", "steps": 2}, optimizer={"kind": "sgd", "lr": rate})
    gone = []
    for _ in range(6):
        before = held(session).copy()
        step(session, {name: np.ones(shape) for name, shape in SHAPES.items()})
        gone.append(float(np.mean(before - held(session))))
    assert gone == pytest.approx([0.0, 1.0, 0.0, 0.5, 0.0, 0.0], abs=1e-15)


def test_a_step_must_bring_all_tensors_to_those_that_count_for_all() -> None:
    for transform in ({"kind": "accumulate", "steps": 2}, {"kind": "ema", "decay": 0.9}):
        with pytest.raises(MissingGradient):
            step(session_of(transform), {"w": GRADIENTS[0]["w"]}, partial=True)
    step(session_of({"kind": "ema", "decay": 0.9, "debias": False}), {"w": GRADIENTS[0]["w"]}, partial=True)


# What is not finite


def spoiled(value: float) -> dict[str, Array]:
    w = GRADIENTS[0]["w"].copy()
    w[1, 1] = value
    return GRADIENTS[0] | {"w": w}


def test_an_infinite_gradient_holds_the_step_back_and_halves_the_scale() -> None:
    session = session_of({"kind": "unscale", "scale": 16.0, "dynamic": True, "growth_interval": 2}, optimizer=ADAM)
    scales = []
    for value in (1.0, math.inf, 1.0, math.nan, 1.0, 1.0):
        before = held(session).copy()
        outcome = step(session, spoiled(value))
        scales.append(outcome.metrics["loss_scale"])
        assert np.array_equal(held(session), before) == (not math.isfinite(value))
    assert scales == [16.0, 8.0, 8.0, 4.0, 4.0, 8.0]
    assert (session.state.step, session.state.moves) == (6, 4)


def test_infinity_is_refused_where_only_nan_is_mended() -> None:
    session = session_of({"kind": "zero_nans"})
    with pytest.raises(NonFinite):
        step(session, spoiled(math.inf))
    step(session, spoiled(math.nan))
    expected = PARAMS["w"] - 0.5 * np.nan_to_num(spoiled(math.nan)["w"])
    assert_same_bits(named(session)["w"], expected)
    with pytest.raises(NonFinite):
        step(session_of({"kind": "unscale"}), spoiled(math.nan))


# Rows


@pytest.mark.parametrize("transform", EACH, ids=str)
def test_rows_make_the_step_of_the_whole_tensor(transform: dict[str, Any]) -> None:
    indices = np.array([2, 0])
    sparse, dense = session_of(transform), session_of(transform)
    for gradients in GRADIENTS[:6]:
        w = np.zeros(SHAPES["w"])
        w[indices] = gradients["w"][indices]
        step(sparse, gradients | {"w": Rows(indices, gradients["w"][indices])})
        step(dense, gradients | {"w": w})
    close(held(sparse), held(dense), 1e-13)


# Projections


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_parameters_are_in_the_set_after_every_step(dtype: str) -> None:
    simplex = {"kind": "project", "onto": "simplex", "over": "rows"}
    session = session_of(simplex, optimizer=ADAM, dtype=dtype)
    for gradients in GRADIENTS:
        step(session, gradients)
        w = named(session)["w"]
        assert w.min() >= 0
        np.testing.assert_allclose(w.sum(axis=1), 1.0, atol=4 * float(np.finfo(dtype).eps))


def test_projected_descent_by_hand() -> None:
    session = session_of({"kind": "project", "onto": "box", "low": -0.25, "high": 0.75})
    expected = PARAMS
    for gradients in GRADIENTS:
        step(session, gradients)
        expected = {name: np.clip(p - 0.5 * gradients[name], -0.25, 0.75) for name, p in expected.items()}
        for name, p in expected.items():
            close(named(session)[name], p, 1e-15)


def test_a_client_that_holds_the_parameters_is_led_into_the_set() -> None:
    session, params = session_of({"kind": "project", "onto": "l2_ball"}, held=False), PARAMS
    with pytest.raises(ParamsRequired):
        step(session, GRADIENTS[0])
    for gradients in GRADIENTS:
        outcome = step(session, gradients, params=params)
        assert outcome.updates is not None
        updates = session.layout.views(outcome.updates)
        params = {name: p + updates[name] for name, p in params.items()}
        assert max(float(np.linalg.norm(p)) for p in params.values()) < 1 + 1e-15 * 8


def test_frozen_tensors_are_left_out_of_everything() -> None:
    frozen = [Group("w", {}, frozen=True)]
    clip, project = {"kind": "clip_by_global_norm", "max_norm": 1.0}, {"kind": "project", "onto": "simplex"}
    session, without = session_of(clip, project, groups=frozen), session_of(clip, project, groups=frozen)
    step(session, GRADIENTS[0])
    step(without, GRADIENTS[0] | {"w": 1e6 * GRADIENTS[0]["w"]})
    assert_same_bits(held(session), held(without))
    assert_same_bits(named(session)["w"], PARAMS["w"])


def test_other_transforms_keep_what_the_ones_before_remember() -> None:
    ema, clip = {"kind": "ema", "decay": 0.9}, {"kind": "clip", "max_value": 0.5}
    session, other = session_of(ema), session_of(ema, clip)
    for gradients in GRADIENTS[:3]:
        step(session, gradients)
    remembered = session.state.slots["ema.mean"].copy()
    session.apply(session.check(NewRecipe(other.recipe)))
    assert_same_bits(session.state.slots["ema.mean"], remembered)
    before = held(session).copy()
    step(session, GRADIENTS[3])
    assert np.abs(held(session) - before).max() <= 0.25 * (1 + 1e-12)


def test_no_transforms_leave_no_trace() -> None:
    session = session_of()
    step(session, GRADIENTS[0])
    assert picture(session).keys() == {"step", *PARAMS}
