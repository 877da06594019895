"""Methods that find their step size: the papers' equations over Python's floats, and what no library says.

That they agree with optax and pytorch_optimizer is held by test_golden.py.
"""

import math
from typing import Any

import numpy as np
import pytest

from core.contributions import Contribution, NewParams
from core.errors import InvalidRecipe, LossRequired, ParamsRequired
from core.layout import Array
from core.optimizers import KINDS, Optimizer
from core.optimizers.parameter_free import DAdaptAdam, Dog, PolyakSgd, Prodigy
from core.recipe import Group
from tests.core.build import bits, held, make, schedule_of, step, trajectory

Vector = list[float]

START = [0.3, -1.2, 2.5, 0.0]
# The gradients of a quadratic along a path: so that the estimates grow.
CURVATURES = [1.0, 0.1, 5.0, 0.02]


def slope(x: Vector) -> Vector:
    return [c * (v - 3.0) for c, v in zip(CURVATURES, x, strict=True)]


def ours(optimizer: Optimizer, steps: int) -> Array:
    session = make(optimizer, {"x": START})
    seen = []
    for _ in range(steps):
        step(session, {"x": np.array(slope(held(session).tolist()))}, loss=1.0)
        seen.append(held(session))
    return np.stack(seen)


def norm(x: Vector) -> float:
    return math.sqrt(math.fsum(v * v for v in x))


@pytest.mark.parametrize("variant", ["sps", "sps+"])
def test_polyak_at_other_rates(variant: str) -> None:
    """optax takes the norm of the scaled gradient at these, against its own formula."""
    rule = PolyakSgd(lr=0.3, max_lr=0.2, f_min=0.5, eps=0.1, variant=variant)
    session, x = make(rule, {"x": START}), list(START)
    for loss in (9.0, 2.0, 0.8, 0.4, -1.0):
        g = slope(x)
        gap = loss - 0.5 if variant == "sps" else max(loss - 0.5, 0.0)
        size = 0.3 * min(0.2, gap / (norm(g) ** 2 + 0.1))
        x = [v - size * d for v, d in zip(x, g, strict=True)]
        step(session, {"x": np.array(g)}, loss=loss)
        np.testing.assert_allclose(held(session), x, rtol=1e-14)


def test_dog_goes_as_far_as_it_has_come() -> None:
    x, farthest, squares, seen = list(START), 1e-2 * (1 + norm(START)), 0.0, []
    for _ in range(25):
        g = slope(x)
        farthest = max(farthest, norm([a - b for a, b in zip(x, START, strict=True)]))
        squares += norm(g) ** 2
        x = [v - 0.7 * farthest / math.sqrt(squares + 1e-3) * d for v, d in zip(x, g, strict=True)]
        seen.append(x)
    np.testing.assert_allclose(ours(Dog(lr=0.7, reps_rel=1e-2, eps=1e-3), 25), seen, rtol=1e-12)
    assert farthest > 1.0


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("growth", [1e300, 1.3])
def test_dadapt_adam_is_algorithm_5(growth: float, *, corrected: bool) -> None:
    b1, b2, eps, decay, lr = 0.9, 0.99, 1e-8, 0.05, 0.8
    root, d, r = math.sqrt(b2), 1e-3, 0.0
    x, seen = list(START), []
    m, v, s = [0.0] * 4, [0.0] * 4, [0.0] * 4
    for t in range(1, 31):
        g = slope(x)
        rate = d * lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if corrected else 1.0)
        r = root * r + (1 - root) * rate * math.fsum(g[i] * s[i] / (math.sqrt(v[i]) + eps) for i in range(4))
        m = [b1 * m[i] + (1 - b1) * rate * g[i] for i in range(4)]
        v = [b2 * v[i] + (1 - b2) * g[i] ** 2 for i in range(4)]
        s = [root * s[i] + (1 - root) * rate * g[i] for i in range(4)]
        d = max(d, min(r / ((1 - root) * math.fsum(abs(e) for e in s)), d * growth))
        x = [x[i] - m[i] / (math.sqrt(v[i]) + eps) - rate * decay * x[i] for i in range(4)]
        seen.append(x)
    rule = DAdaptAdam(lr=lr, beta2=b2, weight_decay=decay, d0=1e-3, growth_rate=growth, use_bias_correction=corrected)
    np.testing.assert_allclose(ours(rule, 30), seen, rtol=1e-11)
    assert d > 0.005


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("growth", [1e300, 1.3])
def test_prodigy_is_algorithm_4(growth: float, *, safeguard: bool) -> None:
    b1, b2, b3, eps, decay, lr, coefficient, d0 = 0.8, 0.99, 0.97, 1e-8, 0.05, 0.5, 1.5, 1e-3
    d, largest, r = d0, d0, 0.0
    x, seen = list(START), []
    m, v, s = [0.0] * 4, [0.0] * 4, [0.0] * 4
    for _ in range(30):
        g, rate = slope(x), d * lr
        r = b3 * r + d / d0 * rate * math.fsum(g[i] * (START[i] - x[i]) for i in range(4))
        m = [b1 * m[i] + (1 - b1) * d * g[i] for i in range(4)]
        v = [b2 * v[i] + (1 - b2) * d * d * g[i] ** 2 for i in range(4)]
        s = [b3 * s[i] + d / d0 * (d if safeguard else rate) * g[i] for i in range(4)]
        found = coefficient * r / math.fsum(abs(e) for e in s)
        if d == d0:
            d = max(d, found)
        largest = max(largest, found)
        d = min(largest, d * growth)
        x = [x[i] - rate * m[i] / (math.sqrt(v[i]) + d * eps) - rate * decay * x[i] for i in range(4)]
        seen.append(x)
    rule = Prodigy(
        lr=lr, beta1=b1, beta2=b2, beta3=b3, weight_decay=decay, d0=d0, d_coef=coefficient, growth_rate=growth,
        safeguard_warmup=safeguard,
    )  # fmt: skip
    np.testing.assert_allclose(ours(rule, 30), seen, rtol=1e-11)
    assert d > 0.005


# What a client gives


def test_polyak_asks_for_the_loss() -> None:
    with pytest.raises(LossRequired):
        make(PolyakSgd(), {"x": START}).check(Contribution({"x": np.ones(4)}))


def test_dog_asks_for_the_parameters_unless_the_first_distance_is_given() -> None:
    with pytest.raises(ParamsRequired):
        make(Dog(), {"x": START}, held=False).check(Contribution({"x": np.ones(4)}))
    session = make(Dog(initial_distance=0.5, eps=0.0), {"x": START}, held=False)
    updates = step(session, {"x": np.ones(4)}).updates
    assert updates is not None
    np.testing.assert_allclose(updates, -0.25 * np.ones(4), rtol=1e-14)


@pytest.mark.parametrize("kind", ["dadapt_adam", "prodigy"])
def test_the_parameters_are_needed_for_weight_decay_alone(kind: str) -> None:
    assert KINDS[kind]().needs == frozenset()
    assert KINDS[kind](weight_decay=0.1).needs == {"params"}


@pytest.mark.parametrize(
    ("kind", "field"), [("dog", "reps_rel"), ("dog", "initial_distance"), ("prodigy", "d0"), ("dadapt_adam", "d0")]
)
def test_what_is_used_before_the_first_step_is_no_schedule(kind: str, field: str) -> None:
    falling = schedule_of({"kind": "linear", "init": 1.0, "end": 0.5, "steps": 3})
    with pytest.raises(InvalidRecipe, match="no schedule"):
        KINDS[kind](**{field: falling})


# Where there is nothing to go by

METHODS: dict[str, Optimizer] = {
    "polyak_sgd": PolyakSgd(), "dog": Dog(eps=0.0), "dadapt_adam": DAdaptAdam(eps=0.0), "prodigy": Prodigy(eps=0.0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_gradient_of_zero_moves_nothing(kind: str, dtype: str) -> None:
    session = make(METHODS[kind], {"x": START}, dtype=dtype)
    for _ in range(3):
        step(session, {"x": np.zeros(4)}, loss=0.0)
        assert held(session).tolist() == np.array(START, dtype).tolist()
    step(session, {"x": np.array([1.0, 0.0, -1.0, 0.0])}, loss=1.0)
    moved = held(session) != np.array(START, dtype)
    assert moved.tolist() == [True, False, True, False]
    assert np.isfinite(held(session)).all()


@pytest.mark.parametrize("kind", METHODS)
def test_a_rate_of_zero_moves_nothing(kind: str) -> None:
    session = make(METHODS[kind].changed({"lr": 0.0}), {"x": START})
    for g in np.random.default_rng(1).normal(size=(5, 4)):
        step(session, {"x": g}, loss=1.0)
        assert held(session).tolist() == START


@pytest.mark.parametrize("kind", ["dog", "prodigy"])
def test_parameters_that_are_set_anew_have_not_moved(kind: str) -> None:
    """The update after that is the one that would have come without."""
    sessions = [make(METHODS[kind], {"x": START}) for _ in range(2)]
    gradients = np.random.default_rng(2).normal(size=(6, 4))
    for g in gradients[:3]:
        for session in sessions:
            step(session, {"x": g})
    far = sessions[0].check(NewParams({"x": np.full(4, 1e6)}))
    sessions[0].apply(far)
    for g in gradients[3:]:
        updates = [step(session, {"x": g}, want_updates=True).updates for session in sessions]
        assert updates[0] is not None
        assert updates[1] is not None
        assert bits(updates[0]).tolist() == bits(updates[1]).tolist()


@pytest.mark.parametrize("settings", [{"kind": "prodigy"}, {"kind": "dadapt_adam"}, {"kind": "dog"}])
def test_one_rate_for_all_is_the_same_as_one_for_each(settings: dict[str, Any]) -> None:
    rule = KINDS[settings["kind"]]
    single = make(rule(lr=0.5), {"a": START[:2], "b": START[2:]})
    grouped = make(rule(lr=0.1), {"a": START[:2], "b": START[2:]}, groups=[Group("*", {"lr": 0.5})])
    mixed = make(rule(lr=0.5), {"a": START[:2], "b": START[2:]}, groups=[Group("b", {"lr": 0.0})])
    for g in np.random.default_rng(4).normal(size=(20, 4)):
        for session in (single, grouped, mixed):
            step(session, {"a": g[:2], "b": g[2:]})
    np.testing.assert_allclose(held(single), held(grouped), rtol=1e-13)
    assert held(mixed)[2:].tolist() == START[2:]
    assert (held(mixed)[:2] != START[:2]).all()


@pytest.mark.parametrize("kind", ["dadapt_adam", "prodigy"])
def test_the_estimate_finds_the_scale_of_the_problem(kind: str) -> None:
    """From one that is a million times too small, and in the end the minimum."""
    session = make(KINDS[kind](), {"x": START})
    for _ in range(400):
        step(session, {"x": np.array(slope(held(session).tolist()))})
    distance = max(abs(v - 3.0) for v in START)
    assert 0.02 * distance < float(session.state.own[":d"]) < 3 * distance


def test_a_trajectory_has_the_same_bits_each_time() -> None:
    gradients = np.random.default_rng(9).normal(size=(20, 4)).tolist()
    for kind, rule in METHODS.items():
        first, second = (trajectory(rule, START, gradients) for _ in range(2))
        assert bits(first).tolist() == bits(second).tolist(), kind
