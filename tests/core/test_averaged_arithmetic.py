"""The averaged methods against their papers, in plain floats."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRecipe, ParamsNotHeld
from core.optimizers.adam import Adam, AdamW
from core.optimizers.averaged import Asgd, ScheduleFree
from core.optimizers.descent import Sgd
from core.recipe import Group
from core.schedules import Linear
from core.session import NewParams, Session
from tests.core.arithmetic import GRADIENTS, START
from tests.core.build import held, make, step, trajectory

RATES = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1]
RISING = Linear(0.0, 0.1, 5)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


# asgd


@pytest.mark.parametrize("t0", [0.0, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("scheduled", [False, True])
def test_asgd(t0: float, scheduled: bool) -> None:
    method = Asgd(lr=RISING if scheduled else 0.1, lambd=0.2, alpha=0.6, t0=t0)  # type: ignore[arg-type]
    session = make(method, {"w": START})
    p, average = list(START), list(START)
    for t, g in enumerate(GRADIENTS, 1):
        lr = RATES[t - 1] if scheduled else 0.1
        eta = lr / (1 + 0.2 * lr * (t - 1)) ** 0.6
        mu = 1 / max(1.0, t - 1 - t0)
        p = [(1 - eta * 0.2) * q - eta * one for q, one in zip(p, g, strict=True)]
        average = [a + mu * (q - a) for a, q in zip(average, p, strict=True)]
        step(session, {"w": np.array(g)})
        close(held(session), p)
        close(session.final_point(), average)


def test_the_average_of_asgd_is_the_mean_of_what_came_after_t0() -> None:
    session, seen = make(Asgd(lr=0.1, t0=2.0), {"w": START}), []
    for g in GRADIENTS:
        step(session, {"w": np.array(g)})
        seen.append(held(session).copy())
    # mu is 1 up to step t0 + 2, 1/2 at the next, and so on.
    close(session.final_point(), np.mean(seen[3:], axis=0))


def test_a_tensor_that_never_moved_is_its_own_average() -> None:
    session = make(Asgd(lr=0.1, t0=0.0), {"w": START, "still": [3.0, 4.0]})
    for g in GRADIENTS:
        step(session, {"w": np.array(g)}, partial=True)
    assert session.final_point().reshape(-1)[len(START) :].tolist() == [3.0, 4.0]


# schedule_free


def free_by_hand(
    g: list[list[float]], rates: list[float], beta: float, r: float, weight_power: float, options: dict[str, Any]
) -> tuple[list[list[float]], list[list[float]]]:
    """x after each step, and y for the gradient after it, by the three sequences of the paper."""
    z, x, v = list(START), list(START), [0.0] * 4
    xs, ys, total, greatest = [], [], 0.0, 0.0
    for t, (gradients, lr) in enumerate(zip(g, rates, strict=True), 1):
        greatest = max(greatest, lr)
        weight = t**r * greatest**weight_power
        total += weight
        c = weight / total if total else 0.0
        shrink = options["weight_decay"] * (lr if options.get("decay_scaling", "lr") == "lr" else 1.0)
        for i, one in enumerate(gradients):
            y = (1 - beta) * z[i] + beta * x[i]
            direction = one
            if options["adaptive"]:
                v[i] = 0.7 * v[i] + 0.3 * one * one
                second = 1 - 0.7**t if options["bias_correction"] else 1.0
                inside, beside = (0.01, 0.0) if options["eps_inside"] else (0.0, 0.01)
                direction = one / (math.sqrt(v[i] / second + inside) + beside)
            z[i] += -lr * direction - shrink * y
            x[i] = (1 - c) * x[i] + c * z[i]
        xs.append(list(x))
        ys.append([(1 - beta) * a + beta * b for a, b in zip(z, x, strict=True)])
    return xs, ys


def walked(method: ScheduleFree) -> tuple[list[Any], list[Any]]:
    session, xs, ys = make(method, {"w": START}), [], []
    assert session.next_point().tolist() == START
    for g in GRADIENTS:
        step(session, {"w": np.array(g)})
        xs.append(held(session).copy())
        ys.append(session.next_point().copy())
        assert session.final_point().tolist() == held(session).tolist()
    return xs, ys


POWERS = list(itertools.product([0.0, 0.9], [0.0, 1.5], [0.0, 2.0]))


@pytest.mark.parametrize(("beta", "r", "weight_power"), POWERS)
def test_schedule_free_around_sgd(beta: float, r: float, weight_power: float) -> None:
    for decay, scheduled in itertools.product([0.0, 0.2], [False, True]):
        base = Sgd(RISING) if scheduled else Sgd(0.1)  # type: ignore[arg-type]
        xs, ys = walked(ScheduleFree(base, beta, weight_power, r, weight_decay=decay))
        options = {"adaptive": False, "weight_decay": decay}
        by_hand = free_by_hand(GRADIENTS, RATES if scheduled else [0.1] * 7, beta, r, weight_power, options)
        close(xs, by_hand[0])
        close(ys, by_hand[1])


@pytest.mark.parametrize(("beta", "r", "weight_power"), POWERS)
def test_schedule_free_around_adamw(beta: float, r: float, weight_power: float) -> None:
    choices = {
        "weight_decay": [0.0, 0.2],
        "decay_scaling": ["lr", "none"],
        "bias_correction": [False, True],
        "eps_inside": [False, True],
    }
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        base = AdamW(lr=RISING, beta2=0.7, eps=0.01, **options)  # type: ignore[arg-type]
        xs, ys = walked(ScheduleFree(base, beta, weight_power, r))
        by_hand = free_by_hand(GRADIENTS, RATES, beta, r, weight_power, options | {"adaptive": True})
        close(xs, by_hand[0])
        close(ys, by_hand[1])


def test_with_one_rate_the_result_is_the_mean_of_where_the_base_went() -> None:
    xs, _ = walked(ScheduleFree(Sgd(0.1)))
    zs = trajectory(Sgd(0.1), START, GRADIENTS)
    close(xs, [np.mean(zs[: t + 1], axis=0) for t in range(len(GRADIENTS))])


def test_new_parameters_move_all_three_points() -> None:
    def after(start: list[float]) -> Session:
        session = make(ScheduleFree(Sgd(0.1)), {"w": start})
        for g in GRADIENTS:
            step(session, {"w": np.array(g)})
        return session

    moved, other = after(START), np.array([10.0, 20.0, 30.0, 40.0])
    ahead = moved.next_point() - held(moved)
    moved.apply(moved.check(NewParams({"w": other})))
    close(held(moved), other)
    close(moved.next_point(), other + ahead)


def test_a_group_sets_what_the_base_has() -> None:
    group = Group("b", {"lr": 0.0, "beta": 0.5})
    session = make(ScheduleFree(AdamW(lr=0.1)), {"w": START, "b": START}, groups=[group])
    for g in GRADIENTS:
        step(session, {"w": np.array(g), "b": np.array(g)})
    assert held(session)[:4].tolist() != START
    assert held(session)[4:].tolist() == START
    method = ScheduleFree(AdamW(lr=0.1)).changed({"lr": 0.2, "beta": 0.5, "weight_decay": 0.3})
    assert method == ScheduleFree(AdamW(lr=0.2, weight_decay=0.3), beta=0.5)
    assert ScheduleFree(Sgd()).changed({"lr": 0.2, "weight_decay": 0.3}) == ScheduleFree(Sgd(0.2), weight_decay=0.3)
    with pytest.raises(TypeError):
        ScheduleFree().changed({"momentum": 0.5})


@pytest.mark.parametrize(
    ("settings", "pointer"),
    [
        ({"base": Adam()}, "/base/kind"),
        ({"base": ScheduleFree()}, "/base/kind"),
        ({"base": AdamW(beta1=0.5)}, "/base/beta1"),
        ({"base": AdamW(amsgrad="raw")}, "/base/amsgrad"),
        ({"base": AdamW(nesterov=True)}, "/base/nesterov"),
        ({"base": AdamW(cautious=True)}, "/base/cautious"),
        ({"base": AdamW(), "weight_decay": 0.1}, "/weight_decay"),
    ],
)
def test_what_cannot_be_wrapped(settings: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        ScheduleFree(**settings)
    assert refused.value.pointer == pointer


def test_beta1_of_the_base_may_be_left_out_or_said_again() -> None:
    for base, beta in ((AdamW(), 0.95), (AdamW(beta1=0.0), 0.95), (AdamW(beta1=0.95), 0.95)):
        assert ScheduleFree(base, beta).beta == 0.95


def test_the_session_has_to_hold_the_parameters() -> None:
    assert ScheduleFree().held_only
    with pytest.raises(ParamsNotHeld):
        make(ScheduleFree(), {"w": START}, held=False).next_point()
