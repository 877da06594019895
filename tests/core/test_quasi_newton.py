"""L-BFGS and BFGS: against SciPy and torch by golden.npz, and what they do where things go wrong."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.contributions import Contribution, NewParams
from core.errors import LossRequired
from core.layout import Array
from core.optimizers.quasi_newton import Bfgs, Lbfgs, QuasiNewton
from core.recipe import Group
from core.schedules import Schedule
from core.session import Session
from core.state import state_of, tensors_of
from tests.core.build import assert_same_bits, bits, held, make, picture, schedule_of, step
from tests.core.golden.agreement import Golden, apart
from tests.core.golden.objectives import PROBLEMS, Objective, logistic, rosenbrock

KINDS: dict[str, Callable[..., QuasiNewton]] = {"lbfgs": Lbfgs, "bfgs": Bfgs}
METHODS = {"lbfgs": Lbfgs(line_search="strong_wolfe"), "bfgs": Bfgs()}


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    return {name.removeprefix("scipy/"): array for name, array in Golden.load().arrays.items()}


def objective_of(name: str, golden: dict[str, Array]) -> Objective:
    return logistic(golden["logistic/features"], golden["logistic/labels"]) if name == "logistic" else PROBLEMS[name][0]


def evaluate(session: Session, objective: Objective) -> bool:
    """One gradient and loss where the session wants them; whether that ended in a step."""
    loss, gradient = objective(session.next_point().astype(np.float64))
    before = session.state.moves
    if not (math.isfinite(loss) and np.isfinite(gradient).all()):
        loss, gradient = 1e300, np.zeros_like(gradient)
    step(session, {"x": gradient}, loss=loss)
    return session.state.moves > before


def solve(session: Session, objective: Objective, enough: float, most: int = 200) -> int:
    """The number of evaluations until the loss at the parameters is `enough`."""
    for count in range(1, most + 1):
        if evaluate(session, objective) and objective(held(session).astype(np.float64))[0] <= enough:
            return count
    return most + 1


# Against the libraries


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", METHODS)
def test_scipys_minimum_within_a_fifth_more_evaluations(kind: str, problem: str, golden: dict[str, Array]) -> None:
    evaluations, loss, *x = golden[f"{kind}/{problem}"]
    objective = objective_of(problem, golden)
    session = make(METHODS[kind], {"x": PROBLEMS[problem][1]})
    assert solve(session, objective, loss + 1e-12) <= 1.2 * evaluations
    assert session.state.step <= 1.2 * evaluations
    np.testing.assert_allclose(held(session), x, atol=2e-3)


def test_torchs_path_with_a_gradient_a_step(golden: dict[str, Array]) -> None:
    objective = objective_of("logistic", golden)
    session = make(Lbfgs(lr=0.5, history=3), {"x": PROBLEMS["logistic"][1]})
    seen = []
    for _ in range(len(golden["logistic/torch-lbfgs"])):
        step(session, {"x": objective(held(session))[1]})
        seen.append(held(session))
    assert apart(np.stack(seen), golden["logistic/torch-lbfgs"]) <= 1e-13


# What is learned


def test_the_inverse_hessian_is_that_of_the_book() -> None:
    """Nocedal & Wright 2006, (6.17), (6.20), written out over floats."""
    hessian = [[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]]

    def slope(x: list[float]) -> list[float]:
        return [sum(h * v for h, v in zip(row, x, strict=True)) for row in hessian]

    session = make(Bfgs(line_search="none", lr=0.5), {"x": [1.0, -2.0, 3.0]})
    inverse = [[float(i == j) for j in range(3)] for i in range(3)]
    points = []
    for count in range(5):
        points.append(held(session).tolist())
        step(session, {"x": np.array(slope(points[-1]))})
        if count:
            s = [b - a for a, b in zip(points[-2], points[-1], strict=True)]
            y = [b - a for a, b in zip(slope(points[-2]), slope(points[-1]), strict=True)]
            ys = sum(a * b for a, b in zip(s, y, strict=True))
            if count == 1:
                scale = ys / sum(b * b for b in y)
                inverse = [[scale * (i == j) for j in range(3)] for i in range(3)]
            left = [[(i == j) - s[i] * y[j] / ys for j in range(3)] for i in range(3)]
            half = [[sum(left[i][k] * inverse[k][j] for k in range(3)) for j in range(3)] for i in range(3)]
            inverse = [
                [sum(half[i][k] * left[j][k] for k in range(3)) + s[i] * s[j] / ys for j in range(3)] for i in range(3)
            ]
        np.testing.assert_allclose(session.state.own[":H"], inverse, rtol=1e-12, atol=1e-14)
        assert_same_bits(session.state.own[":H"], session.state.own[":H"].T.copy())
    update = held(session) - points[-1]
    wanted = [-0.5 * sum(h * g for h, g in zip(row, slope(points[-1]), strict=True)) for row in inverse]
    np.testing.assert_allclose(update, wanted, rtol=1e-12)


def test_with_room_for_all_steps_lbfgs_is_bfgs() -> None:
    """As long as its first matrix is the same: so with a first pair whose scale all later ones have."""
    gradients = np.random.default_rng(3).normal(size=(2, 4)) + np.array([[3.0], [0.0]])
    ends = []
    for kind in KINDS.values():
        session = make(kind(line_search="none", lr=0.1), {"x": [0.0] * 4})
        for g in gradients * np.array([[1.0], [-1.0]]):
            step(session, {"x": g})
        ends.append(held(session))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)


def test_a_pair_of_negative_curvature_is_not_learned() -> None:
    session = make(Lbfgs(lr=0.1), {"x": [1.0, 1.0]})
    step(session, {"x": np.array([1.0, 0.0])})
    step(session, {"x": np.array([2.0, 0.0])})  # steeper, after a step down
    assert not session.state.own[":rho"].any()
    step(session, {"x": np.array([1.0, 0.0])})
    assert np.count_nonzero(session.state.own[":rho"]) == 1


# How it asks


@pytest.mark.parametrize("kind", METHODS)
def test_the_first_gradient_is_taken_at_the_parameters_and_starts_a_search(kind: str) -> None:
    session = make(METHODS[kind], {"x": [-1.2, 1.0]})
    assert_same_bits(session.next_point(), held(session))
    assert not evaluate(session, rosenbrock)
    assert held(session).tolist() == [-1.2, 1.0]
    ahead = session.next_point() - held(session)
    assert ahead @ rosenbrock(held(session))[1] < 0
    assert math.sqrt(ahead @ ahead) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", METHODS)
def test_what_is_accepted_is_the_point_that_was_handed_out(kind: str, dtype: str) -> None:
    session = make(METHODS[kind], {"x": [-1.2, 1.0, 0.7]}, dtype=dtype)
    moves = 0
    for _ in range(30):
        ahead = session.next_point()
        if evaluate(session, rosenbrock):
            moves += 1
            assert_same_bits(held(session), ahead)
    assert moves > 10


@pytest.mark.parametrize("kind", METHODS)
def test_a_search_goes_on_in_a_state_that_was_stored(kind: str) -> None:
    session = make(METHODS[kind], {"x": [-1.2, 1.0] * 3})
    for count in range(40):
        stored = {name: array.copy() for name, array in tensors_of(session.recipe, session.state).items()}
        state = state_of(session.recipe, session.state.step, stored, session.state.moves)
        other = Session(session.recipe, state, session.evaluator)
        evaluate(session, rosenbrock)
        evaluate(other, rosenbrock)
        assert picture(other) == picture(session), count


@pytest.mark.parametrize("method", [*METHODS.values()])
def test_the_loss_is_asked_for(method: QuasiNewton) -> None:
    session = make(method, {"x": [1.0]})
    with pytest.raises(LossRequired):
        session.check(Contribution({"x": np.ones(1)}))
    plain = make(method.changed({"line_search": "none"}), {"x": [1.0]})
    step(plain, {"x": np.ones(1)})


# Where things go wrong


def barrier(x: Array) -> tuple[float, Array]:
    return (float(np.sum(x - np.log(x))), 1 - 1 / x) if (x > 0).all() else (math.nan, x)


@pytest.mark.parametrize("kind", METHODS)
def test_points_where_the_loss_is_not_finite_are_stepped_back_from(kind: str) -> None:
    session = make(METHODS[kind], {"x": [10.0, 100.0, 0.01]})
    assert solve(session, barrier, 3.0 + 1e-9) <= 90


@pytest.mark.parametrize("when", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", METHODS)
def test_parameters_that_are_set_anew_in_the_middle(kind: str, when: int) -> None:
    session = make(METHODS[kind], {"x": [-1.2, 1.0]})
    for _ in range(when):
        evaluate(session, rosenbrock)
    session.apply(session.check(NewParams({"x": np.array([3.0, -2.0])})))
    assert solve(session, rosenbrock, 1e-10, most=150) <= 120


@pytest.mark.parametrize("kind", METHODS)
def test_an_objective_that_changes_with_each_gradient(kind: str) -> None:
    random = np.random.default_rng(5)

    def noisy(x: Array) -> tuple[float, Array]:
        loss, gradient = rosenbrock(x)
        return loss + random.normal(), gradient + random.normal(size=len(x))

    session = make(METHODS[kind], {"x": [-1.2, 1.0] * 2})
    start = rosenbrock(held(session))[0]
    for _ in range(300):
        evaluate(session, noisy)
        assert np.isfinite(held(session)).all()
        assert np.isfinite(session.next_point()).all()
    assert rosenbrock(held(session))[0] < start / 50


@pytest.mark.parametrize("kind", METHODS)
def test_a_gradient_that_lies_moves_nothing_and_is_not_believed(kind: str) -> None:
    session = make(METHODS[kind], {"x": [1.0, -0.0]})
    for _ in range(80):
        evaluate(session, lambda x: (float(x.sum()), -np.ones(2)))
        assert_same_bits(held(session), np.array([1.0, -0.0]))
    assert session.state.moves >= 3  # steps that do not move


def downhill(x: Array) -> tuple[float, Array]:
    return -float(x @ x), -2 * x


SCENES: dict[str, tuple[Objective, list[float]]] = {
    "flat": (lambda x: (0.0, np.zeros_like(x)), [1.0, 2.0]),
    "no minimum": (downhill, [1.0, 2.0]),
    "steep": (lambda x: (1e12 * float(x @ x), 2e12 * x), [1e5, -1e3]),
    "tiny": (lambda x: (1e-290 * float(x @ x), 2e-290 * x), [1.0, 1.0]),
    "kinks": (lambda x: (float(np.abs(x).sum()), np.sign(x)), [1.3, -0.4]),
    "overflow": (lambda x: (1e300, np.full_like(x, 1e200)), [1.0, 2.0]),
}


@pytest.mark.parametrize("line_search", ["none", "strong_wolfe"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_gradients_never_make_nan(kind: str, scene: str, dtype: str, line_search: str) -> None:
    objective, start = SCENES[scene]
    settings: dict[str, Any] = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search": line_search}
    session = make(KINDS[kind](**settings), {"x": start}, dtype=dtype)
    with np.errstate(all="ignore"):
        for _ in range(60):
            point = session.next_point().astype(np.float64)
            loss, gradient = objective(point)
            end = 1e30 if dtype == "float32" else 1e300
            step(session, {"x": np.clip(gradient, -end, end)}, loss=loss)
            assert np.isfinite(held(session)).all()


@pytest.mark.parametrize("kind", METHODS)
def test_float32_gets_as_far_as_float32_can(kind: str) -> None:
    session = make(METHODS[kind], {"x": [-1.2, 1.0]}, dtype="float32")
    assert solve(session, rosenbrock, 1e-9, most=100) <= 60


@pytest.mark.parametrize("kind", METHODS)
def test_at_the_minimum_a_step_does_not_move(kind: str) -> None:
    session = make(METHODS[kind], {"x": [1.0, 1.0]})
    for count in range(1, 4):
        assert evaluate(session, rosenbrock)
        assert session.state.moves == count
        assert bits(held(session)).tolist() == bits(np.ones(2)).tolist()


# Rates


@pytest.mark.parametrize("kind", METHODS)
def test_a_rate_that_is_a_schedule(kind: str) -> None:
    falling: Schedule = schedule_of({"kind": "linear", "init": 1.0, "end": 0.3, "steps": 20})
    session = make(METHODS[kind].changed({"lr": falling}), {"x": [-1.2, 1.0]})
    assert solve(session, rosenbrock, 1e-10) <= 150


@pytest.mark.parametrize("kind", METHODS)
def test_without_a_rate_nothing_moves_until_there_is_one(kind: str) -> None:
    waiting = schedule_of({"kind": "piecewise_constant", "values": (0.0, 1.0), "boundaries": (5,)})
    session = make(METHODS[kind].changed({"lr": waiting}), {"x": [-1.2, 1.0]})
    for _ in range(5):
        evaluate(session, rosenbrock)
    assert held(session).tolist() == [-1.2, 1.0]
    assert solve(session, rosenbrock, 1e-10) <= 60


@pytest.mark.parametrize("kind", METHODS)
def test_tensors_with_rates_of_their_own(kind: str) -> None:
    """They bend the direction, which costs evaluations; where they turn it uphill, the least is taken for all."""
    session = make(METHODS[kind], {"a": [-1.2], "b": [1.0]}, groups=[Group("a", {"lr": 0.5})])
    for _ in range(150):
        loss, g = rosenbrock(session.next_point())
        step(session, {"a": g[:1], "b": g[1:]}, loss=loss)
    assert rosenbrock(held(session))[0] < 1e-6
