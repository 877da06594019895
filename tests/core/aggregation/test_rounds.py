"""Rounds: what several contributions come to, worked out by hand.

Sessions descend with a rate of 1 from 0, so that the parameters are minus the gradients of their steps. What the
methods make of such a gradient is shown elsewhere; here it is that they get the one that they ought to get.
"""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from core.aggregation.aggregation import Aggregation
from core.aggregation.reducers import KINDS as REDUCERS
from core.aggregation.reducers import Reducer, Sum
from core.aggregation.staleness import Inverse
from core.compression import Places, Quantized
from core.contributions import Closing, NewParams, NewRecipe, Reduced
from core.errors import InvalidRecipe, NonFinite, NotReducible, ParamsNotHeld, RoundOpen
from core.layout import Array, Rows
from core.optimizers import KINDS
from core.optimizers.descent import Sgd
from core.session import Session
from tests.core.aggregation.rounds import MAX32, MAX64, SGD, flat, one, opened, round_of, rows, sync
from tests.core.build import (
    assert_same_bits,
    assert_same_state,
    close,
    go,
    held,
    make,
    optimizer_of,
    step,
    transform_of,
)

RNG = np.random.default_rng

# -- mean and sum ----------------------------------------------------------------------------------------------------


def dyadic(seed: int, *shape: int) -> Array:
    """Numbers whose sums of a few are exact, so that the only rounding is that of the division."""
    return RNG(seed).integers(-1024, 1024, shape) / 64.0


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["sync", "buffered"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_by_weight(kind: str, mode: str, workers: int) -> None:
    counts = {"workers": workers} if mode == "sync" else {"size": workers}
    aggregation = Aggregation(mode=mode, reduce=REDUCERS[kind](), **counts)  # type: ignore[arg-type]
    sent, weights = dyadic(workers, workers, 5), RNG(1).integers(1, 100, workers).astype(float).tolist()
    expected = [
        sum((Fraction(w) * Fraction(g) for w, g in zip(weights, column, strict=True)), Fraction())
        / (sum(map(Fraction, weights)) if kind == "mean" else 1)
        for column in sent.T.tolist()
    ]
    found = round_of(aggregation, sent.tolist(), weights=weights)
    np.testing.assert_array_equal(found, [float(value) for value in expected])


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_tensor_counts_by_those_who_sent_it(kind: str) -> None:
    session = opened(sync(3, reduce=REDUCERS[kind]()))
    step(session, {"w": np.full((3, 2), 6.0), "b": np.full(2, 5.0)}, weight=1.0, partial=True)
    step(session, {"b": np.full(2, 1.0)}, weight=3.0, partial=True)
    step(session, {"w": np.full((3, 2), 3.0)}, weight=2.0, partial=True)
    assert session.state.round.weights == {"w": 3.0, "b": 4.0}
    close(session)
    expected = {"mean": (12 / 3, 8 / 4), "sum": (12.0, 8.0)}[kind]
    views = session.layout.views(flat(session))
    assert (views["w"] == expected[0]).all()
    assert (views["b"] == expected[1]).all()
    assert views["s"] == 0


def test_what_nobody_sent_keeps_still_with_its_slots() -> None:
    session = opened(sync(2), {"w": [1.0], "b": [1.0]}, optimizer=optimizer_of({"kind": "adam", "lr": 0.1}))
    for _ in range(2):
        step(session, one([1.0]), partial=True)
    close(session)
    m = session.layout.views(session.state.slots["m"])
    assert (m["w"][0] != 0, m["b"][0], session.layout.views(held(session))["b"][0]) == (True, 0.0, 1.0)


@pytest.mark.parametrize("whole", [False, True])
def test_rows_stay_rows_if_all_are(whole: bool) -> None:
    """Else the lazy kind would move, or not move, rows that nobody named."""
    lazy = optimizer_of({"kind": "sparse_adam", "lr": 0.1})
    session, plain = opened(sync(3), {"w": np.ones((5, 2))}, optimizer=lazy), make(lazy, {"w": np.ones((5, 2))})
    for _ in range(3):  # so that every row has moments, and moves if it is not left alone
        step(session, {"w": np.ones((5, 2))})
    close(session)
    step(plain, {"w": np.ones((5, 2))})
    step(session, {"w": rows([3, 1], 3.0, 6.0)})
    step(session, {"w": rows([1, 4, 4], 9.0, 1.0, 2.0)})
    dense = np.zeros((5, 2))
    dense[[0, 1]] = 3.0
    step(session, {"w": dense if whole else rows([1], 3.0)})
    close(session)
    expected = np.zeros((5, 2))
    expected[[1, 3, 4]] = [[6.0], [1.0], [1.0]]
    if whole:
        expected[0] = 1.0
        go(plain, {"w": expected})
    else:
        go(plain, {"w": Rows(np.array([1, 3, 4]), expected[[1, 3, 4]])})
    assert_same_state(session.state, plain.state)


def test_every_form_in_one_round() -> None:
    """Row-sparse, top-k and int8 contributions beside a whole one, in gradients and deltas."""
    session = opened(sync(4))
    b, s = np.zeros(2), np.zeros(())
    step(session, {"w": rows([2, 2], 1.0, 3.0), "b": b, "s": s})
    step(session, {"w": Places(np.array([5, 0, 0]), np.array([8.0, 1.0, 1.0])), "b": b, "s": np.float64(4.0)})
    step(
        session,
        {"w": Quantized(np.full((3, 2), -8, np.int8), 0.5), "b": Places(np.array([1]), np.array([4.0])), "s": s},
        payload="deltas",
    )
    step(session, {"w": np.full((3, 2), 4.0), "b": b, "s": s})
    close(session)
    views = session.layout.views(flat(session))
    np.testing.assert_array_equal(views["w"], np.array([[10, 8], [8, 8], [12, 20]]) / 4)
    np.testing.assert_array_equal(views["b"], [0.0, -1.0])
    assert views["s"] == 1.0


def test_gradients_deltas_and_models_are_the_same_round() -> None:
    start, sent = np.array([1.0, -2.0, 0.5]), dyadic(3, 2, 3)
    found = []
    for payload in ("gradients", "deltas", "params"):
        session = opened(sync(2), {"w": start})
        for g in sent:
            tensors = {"gradients": g, "deltas": -g, "params": start - g}[payload]
            step(session, {"w": tensors}, payload=payload)
        close(session)
        found.append(held(session))
    np.testing.assert_array_equal(found, [start - sent.mean(axis=0)] * 3)


@pytest.mark.parametrize("sparse", [False, True])
def test_deltas_are_clipped_and_turned_for_reducers_that_keep_them(sparse: bool) -> None:
    session = opened(sync(3, reduce=REDUCERS["median"](), clip_norm=5.0), {"w": [[0.0, 0.0]]})
    for delta in ([6.0, 8.0], [2.0, 2.0], [-1.0, 5.0]):
        w = Rows(np.array([0]), np.array([delta])) if sparse else np.array([delta])
        step(session, {"w": w}, payload="deltas")
    close(session)
    np.testing.assert_allclose(held(session), [2.0, 4.0], rtol=1e-15)


def test_models_are_compared_with_the_point_that_is_handed_out() -> None:
    """Which for Nesterov's look-ahead form is not the parameters."""
    rule = optimizer_of({"kind": "momentum", "lr": 0.25, "momentum": 0.5, "nesterov": "lookahead"})
    session, plain = opened(sync(1), {"w": [1.0]}, optimizer=rule), make(rule, {"w": [1.0]})
    for g in (2.0, 4.0, -1.0):
        step(session, {"w": session.next_point() - g}, payload="params")
        close(session)
        step(plain, one([g]))
        np.testing.assert_array_equal(held(session), held(plain))


def test_a_model_for_a_session_that_holds_none_is_refused() -> None:
    with pytest.raises(ParamsNotHeld):
        step(opened(sync(2), {"w": [0.0]}, held=False), one([1.0]), payload="params")


# -- what comes beside a gradient ------------------------------------------------------------------------------------


def test_losses_are_averaged_by_weight_over_those_who_told() -> None:
    session = opened(sync(3), {"w": [0.0]})
    for loss, weight in ((4.0, 1.0), (None, 100.0), (1.0, 3.0)):
        step(session, one([0.0]), loss=loss, weight=weight)
    checked = session.check(Closing(1))
    assert checked.loss == (4 + 3) / 4  # type: ignore[union-attr]
    assert session.check(Closing(1)).norm == 0  # type: ignore[union-attr]


ROBUST: dict[str, dict[str, Any]] = {
    "trimmed_mean": {"fraction": 0.2},
    **{kind: {"byzantine": 1} for kind in ("krum", "multi_krum", "bulyan")},
}


# What each of seven tells, and what the round's loss is: the last one has a great weight.
LOSSES: list[tuple[list[float | None], float | None]] = [
    ([3, 1, 4, 2, 6, 5, 1e300], 4),
    ([3, 1, 4, 2, 6, 5, -MAX64], 3),
    ([1, None, 2, 4, None, None, 1e300], 3),
    ([1, None, 2, 4, None, None, -MAX64], 1.5),
    ([None, None, None, None, None, MAX64, MAX64], MAX64),
    ([None, None, None, None, None, None, 7], 7),
    ([None] * 7, None),
]


@pytest.mark.parametrize("kind", [kind for kind, reducer in REDUCERS.items() if not reducer.running])
def test_no_single_loss_or_weight_moves_that_of_a_robust_round(kind: str) -> None:
    for losses, expected in LOSSES:
        session = opened(sync(7, reduce=REDUCERS[kind](**ROBUST.get(kind, {}))), {"w": [0.0]})
        for i, loss in enumerate(losses):
            step(session, one([float(i)]), loss=loss, weight=1e12 if i == 6 else 1.0)
        found = session.check(Closing(1))
        assert isinstance(found, Reduced)
        assert found.loss == expected


def test_hessians_are_averaged_by_weight() -> None:
    newton = optimizer_of({"kind": "newton"})
    session = opened(sync(2), {"w": [0.0, 0.0]}, optimizer=newton)
    sent = [([2.0, 8.0], [[1.0, 0.0], [0.0, 2.0]], 1.0), ([4.0, 4.0], [[3.0, 1.0], [1.0, 4.0]], 3.0)]
    for g, hessian, weight in sent:
        step(session, one(g), hessian=np.array(hessian), weight=weight)
    close(session)
    plain = make(newton, {"w": [0.0, 0.0]})
    step(plain, one([3.5, 5.0]), hessian=np.array([[2.5, 0.75], [0.75, 3.5]]))
    assert_same_state(session.state, plain.state)


def test_the_diagonals_of_hessians_too() -> None:
    sophia = optimizer_of({"kind": "sophia", "lr": 0.1, "interval": 2})
    session, plain = opened(sync(2), {"w": [1.0, -1.0]}, optimizer=sophia), make(sophia, {"w": [1.0, -1.0]})
    for t in range(4):
        given = [{"hessian_diagonal": one(d)} if t % 2 == 0 else {} for d in ([1.0, 4.0], [5.0, 8.0])]
        step(session, one([2.0, 1.0]), weight=1.0, **given[0])
        step(session, one([6.0, 5.0]), weight=3.0, **given[1])
        close(session)
        step(plain, one([5.0, 4.0]), **({"hessian_diagonal": one([4.0, 7.0])} if given[0] else {}))
        assert_same_state(session.state, plain.state)


def test_parameters_that_clients_hold() -> None:
    """Each tensor's, from whoever sent its gradient."""
    decay = optimizer_of({"kind": "adamw", "lr": 0.1, "weight_decay": 0.5})
    params = {"w": np.array([1.0, -2.0]), "b": np.array([4.0])}
    session, plain = (
        make(decay, params, held=False, aggregation=aggregation) for aggregation in (sync(2), Aggregation())
    )
    gradients = {"w": np.array([0.5, 0.25]), "b": np.array([-1.0])}
    for names in ("w", "b"):
        part = {names: gradients[names]}
        step(session, part, params={names: params[names]}, partial=True)
    found = close(session, want_updates=True).updates
    expected = step(plain, gradients, params=params, want_updates=True).updates
    assert found is not None
    assert expected is not None
    assert_same_bits(found, expected)


# -- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_one_rounding_per_contribution_in_float32(kind: str) -> None:
    size, rng = 40_000, RNG(5)  # more than a block
    sent = [rng.standard_normal(size).astype(np.float32) * np.float32(10.0**i) for i in (0, 5, -3, 2)]
    weights = [0.1, 3.0, 7.5, 1e-3]
    total = np.zeros(size, np.float32)
    for g, weight in zip(sent, weights, strict=True):
        total = (total.astype(np.float64) + np.float64(weight) * g.astype(np.float64)).astype(np.float32)
    if kind == "mean":
        total = (total.astype(np.float64) / np.float64(0.1 + 3.0 + 7.5 + 1e-3)).astype(np.float32)
    session = opened(sync(4, reduce=REDUCERS[kind]()), {"w": np.zeros(size)}, dtype="float32")
    for g, weight in zip(sent, weights, strict=True):
        step(session, {"w": g}, weight=weight)
    close(session)
    assert_same_bits(flat(session), total)


def test_what_it_is_multiplied_by_costs_no_rounding_of_its_own() -> None:
    """clip_norm, age and weight are one factor: the norms here are 5 and 10."""
    session = opened(
        sync(2, clip_norm=1.0, staleness=Inverse()), {"w": np.zeros(2)}, dtype="float32", optimizer=Sgd(lr=0.0)
    )
    session.state.step = 3
    step(session, {"w": np.float32([3, 4])}, weight=0.3, base_step=1)
    step(session, {"w": np.float32([6, -8])}, weight=0.7, base_step=3)
    total = np.zeros(2, np.float32)
    for g, factor in ((np.array([3.0, 4.0]), 0.3 * (1 / 5 * (1 / 3))), (np.array([6.0, -8.0]), 0.7 * (1 / 10))):
        total = (total.astype(np.float64) + factor * g).astype(np.float32)
    assert session.state.round.total is not None
    assert_same_bits(session.state.round.total, total)


HUGE: list[tuple[str, float, list[float], list[float]]] = [
    ("float64", MAX64, [MAX64, MAX64, -MAX64], [1.0, 1.0, 1.0]),
    ("float64", MAX64, [1e300, -1e300], [1e12, 1e12]),
    ("float64", MAX64, [-MAX64, MAX64], [1e12, 1e12]),
    ("float32", MAX32, [3e38, 3e38, 3e38], [1.0, 1e12, 1.0]),
    ("float32", MAX32, [3e38, -3e38], [1e12, 1e12]),
]


@pytest.mark.parametrize("transforms", [[], [{"kind": "zero_nans"}]], ids=["plain", "zero_nans"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["mean", "sum", "median", "geometric_median"])
@pytest.mark.parametrize(("dtype", "most", "sent", "weights"), HUGE)
def test_what_is_finite_makes_no_step_that_is_not(
    dtype: str, most: float, sent: list[float], weights: list[float], kind: str, sparse: bool, transforms: Any
) -> None:
    session = opened(sync(len(sent), reduce=REDUCERS[kind]()), {"w": [[0.0]]}, dtype=dtype, transforms=transforms)
    for g, weight in zip(sent, weights, strict=True):
        w = Rows(np.array([0]), np.array([[g]])) if sparse else np.array([[g]])
        step(session, {"w": w}, weight=weight, loss=1e308)
    checked = session.check(Closing(1))
    assert 0 < checked.loss < math.inf  # type: ignore[union-attr,operator]
    session.apply(checked)
    assert np.isfinite(held(session)).all()
    assert abs(float(held(session)[0])) <= most


@pytest.mark.parametrize("kind", ["newton", "sophia"])
def test_nor_do_hessians(kind: str) -> None:
    session = opened(sync(2), {"w": [1.0]}, optimizer=optimizer_of({"kind": kind}))
    for sign in (1.0, -1.0):
        beside: Any = {"hessian": np.array([[sign * 1e300]])}
        beside = beside if kind == "newton" else {"hessian_diagonal": one([sign * 1e300])}
        step(session, one([1.0]), weight=1e12, **beside)
    close(session)
    assert np.isfinite(held(session)).all()


@pytest.mark.parametrize("transforms", [[], [{"kind": "zero_nans"}]], ids=["plain", "zero_nans"])
def test_nor_a_weight_in_a_sum_without_rounds(transforms: Any) -> None:
    session = opened(Aggregation(reduce=Sum()), {"w": [0.0, 0.0]}, dtype="float32", transforms=transforms)
    step(session, one([1e30, 2.0]), weight=1e12)
    np.testing.assert_array_equal(flat(session), np.float32([MAX32, 2e12]))


# -- what transforms mend --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_nan_in_a_round_is_seen_by_zero_nans(kind: str) -> None:
    sent = [[np.nan, 1.0], [2.0, 3.0]]
    found = round_of(sync(2, reduce=REDUCERS[kind]()), sent, transforms=[{"kind": "zero_nans"}])
    np.testing.assert_array_equal(found, [0.0, 2.0 if kind == "mean" else 4.0])
    with pytest.raises(NonFinite):
        round_of(sync(2), sent)


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_what_overflowed_in_a_round_is_seen_by_dynamic_unscale(worst: float) -> None:
    scaling = {"kind": "unscale", "scale": 4.0, "dynamic": True}
    session = opened(sync(2), {"w": [1.0, 1.0]}, transforms=[scaling])
    step(session, one([worst, 4.0]))
    step(session, one([4.0, 4.0]))
    assert close(session).metrics == {"loss_scale": 2.0}
    np.testing.assert_array_equal(held(session), [1.0, 1.0])
    for _ in range(2):
        step(session, one([2.0, 4.0]))
    close(session)
    np.testing.assert_array_equal(held(session), [0.0, -1.0])


def test_a_sum_that_overflows_is_what_dynamic_unscale_is_for() -> None:
    session = opened(sync(2), {"w": [1.0]}, transforms=[{"kind": "unscale", "scale": 4.0, "dynamic": True}])
    for _ in range(2):
        step(session, one([MAX64]))
    assert close(session).metrics == {"loss_scale": 2.0}
    assert held(session)[0] == 1.0


@pytest.mark.parametrize(
    ("members", "contribution"),
    [
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "seed": 1}, {"weight": 2.0}),
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "seed": 1}, {"partial": True}),
        ({"reduce": REDUCERS["median"]()}, {"partial": True}),
    ],
)
def test_what_has_no_meaning_is_refused(members: dict[str, Any], contribution: dict[str, Any]) -> None:
    session = opened(sync(2, **members), {"w": [0.0], "b": [0.0]})
    gradients = one([1.0]) if "partial" in contribution else one([1.0]) | {"b": np.ones(1)}
    with pytest.raises(NotReducible):
        step(session, gradients, **contribution)
    assert session.state.ledger.received == 0


# -- every method and every reducer ----------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 2), "b": (3,), "s": ()}


def gradients(seed: int) -> dict[str, Array]:
    return {name: np.array(dyadic(seed + 7 * i, *shape)) for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("transforms", [[], [{"kind": "accumulate", "steps": 2}]], ids=["plain", "accumulated"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_steps_with_the_mean(kind: str, transforms: list[Any]) -> None:
    """Of two equal contributions, whose mean is exact: the bits are those of the same method by itself."""
    start = {name: np.array(RNG(9).standard_normal(shape)) for name, shape in SHAPES.items()}
    together = opened(sync(2), start, optimizer=optimizer_of({"kind": kind}), transforms=transforms)
    alone = make(optimizer_of({"kind": kind}), start, transforms=transforms)
    for t in range(4):
        for worker in "ab":
            go(together, gradients(t), worker=worker, weight=2.0)
        close(together)
        go(alone, gradients(t))
        assert_same_state(together.state, alone.state)


def reducer(kind: str) -> Reducer:
    given = {"trimmed_mean": {"fraction": 0.2}, "multi_krum": {"byzantine": 1, "select": 3}}
    return REDUCERS[kind](**given.get(kind, {"byzantine": 1} if kind in ("krum", "bulyan") else {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb", "muon", "lbfgs", "lookahead"])
@pytest.mark.parametrize("kind", REDUCERS)
def test_every_reducer_goes_with_every_method(kind: str, optimizer: str) -> None:
    start, transforms = {name: np.ones(shape) for name, shape in SHAPES.items()}, [{"kind": "clip", "max_value": 2.0}]
    rule, count = optimizer_of({"kind": optimizer}), 7
    together = opened(sync(count, reduce=reducer(kind)), start, optimizer=rule, transforms=transforms)
    alone = make(rule, start, transforms=transforms)
    for t in range(3):
        sent = [gradients(100 * t + i) for i in range(count)]
        weights = [1.0, 2.0, 0.5, 4.0, 1.0, 1.0, 2.0]
        for gradient, weight in zip(sent, weights, strict=True):
            go(together, gradient, weight=weight)
        close(together)
        stack = [np.concatenate([g.reshape(-1) for g in gradient.values()]) for gradient in sent]
        go(alone, alone.layout.views(reducer(kind).reduce(stack, weights)))
        np.testing.assert_allclose(held(together), held(alone), rtol=1e-13)
        assert together.state.step == alone.state.step == t + 1


# -- closing, and what changes in between ----------------------------------------------------------------------------


def test_a_round_is_closed_once_and_when_it_is_over() -> None:
    session = opened(sync(3, timeout=1.0, quorum=2), {"w": [0.0]})
    for received in range(2):
        for wrong in (0, 2, 1):
            with pytest.raises(RoundOpen):
                session.check(Closing(wrong))
        assert session.state.ledger.received == received
        step(session, one([2.0]))
    assert close(session).step == 1
    assert (session.state.round.arrays, session.state.ledger.received) == ({}, 0)
    with pytest.raises(RoundOpen):
        session.check(Closing(1))
    with pytest.raises(RoundOpen):
        make(SGD, {"w": [0.0]}).check(Closing(1))


def test_checking_a_closing_changes_nothing() -> None:
    session = opened(sync(2, clip_norm=1.0, noise_multiplier=1.0, seed=1), {"w": [0.0] * 3})
    for _ in range(2):
        step(session, one([1.0, 2.0, 3.0]))
    total = session.state.round.arrays[":round.total"].copy()
    first, second = session.check(Closing(1)), session.check(Closing(1))
    assert first.norm == second.norm  # type: ignore[union-attr]
    assert_same_bits(session.state.round.arrays[":round.total"], total)


def changed(session: Session, **members: Any) -> NewRecipe:
    return NewRecipe(replace(session.recipe, **members))


def test_the_contributions_stay_where_the_rate_or_the_parameters_change() -> None:
    session = opened(sync(2), {"w": [0.0]})
    step(session, one([2.0]))
    session.apply(session.check(changed(session, optimizer=Sgd(lr=10.0))))
    session.apply(session.check(NewParams({"w": np.array([100.0])})))
    step(session, one([4.0]))
    close(session)
    assert held(session)[0] == 70.0


def test_a_recipe_that_could_not_close_the_open_round_is_refused() -> None:
    spoilt = opened(sync(2), {"w": [0.0]}, transforms=[{"kind": "zero_nans"}])
    away = opened(sync(2), {"w": [0.0]}, held=False)
    sophia = opened(sync(2), {"w": [0.0]}, optimizer=optimizer_of({"kind": "sophia", "interval": 2}))
    sophia.state.step = sophia.state.moves = 1  # which is not due, and would be
    cases: list[tuple[Session, float, dict[str, Any], str]]
    cases = [
        (spoilt, np.nan, {"transforms": ()}, "/transforms"),
        (away, 1.0, {"transforms": (transform_of({"kind": "weight_decay", "weight_decay": 0.1}),)}, "/transforms"),
        (sophia, 1.0, {"optimizer": replace(sophia.recipe.optimizer, interval=1)}, "/optimizer"),  # type: ignore[call-arg]
    ]
    for session, g, members, pointer in cases:
        new = changed(session, **members)
        session.check(new)
        step(session, one([g]))
        with pytest.raises(InvalidRecipe) as refusal:
            session.check(new)
        assert refusal.value.pointer == pointer
