"""Every form of the textbook methods, against the equation worked out in decimals of 50 digits.

Each rule is written down here once more, for one number, as `update(state, g, t)`; the constants are the decimals
that people write. float64 must agree to 1e-12, float32 to 1e-6, of the largest parameter. The gradients are exact in
both.
Newton's steps and AdaGrad's full matrix are small enough to be worked out by hand.
"""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest

from core.averaging import Ema, Polyak
from core.errors import HessianRequired, InvalidRecipe
from core.layout import Array
from core.optimizers import Optimizer
from core.optimizers.adam import Adam, AdamW
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.second_order import Newton
from core.schedules import Constant, Cosine, Exponential, InverseTime, Linear, Schedule, Step
from tests.core.build import held, make, step, trajectory

START = [1.0, -2.0, 0.25]
GRADIENTS = [
    [0.5, -2.0, 0.001953125],
    [0.25, 4.0, -0.00390625],
    [-1.0, 1.5, 0.0078125],
    [0.75, -0.125, 0.015625],
    [2.0, 3.0, -0.0009765625],
    [0.0, -1.0, 0.0625],
]
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}

D: TypeAlias = Decimal
Memory: TypeAlias = dict[str, D]
Update: TypeAlias = Callable[[Memory, D, int], D]
EPSILONS = ["1e-10", "1e-8", "1e-5"]


def by_hand(update: Update) -> Array:
    """The parameters after each step, (steps, 3); `update` gets the state of one number, which starts empty."""
    with localcontext() as context:
        context.prec = 50
        columns = []
        for index, start in enumerate(START):
            p, memory, column = D(start), Memory(), []
            for t, g in enumerate(GRADIENTS, 1):
                memory["p"] = p
                p += update(memory, D(g[index]), t)
                column.append(float(p))
            columns.append(column)
    return np.array(columns).T


def agree(rule: Optimizer, update: Update, dtypes: Sequence[str] = ("float64", "float32")) -> None:
    truth = by_hand(update)
    for dtype in dtypes:
        found = trajectory(rule, START, GRADIENTS, dtype=dtype)
        assert found.dtype == dtype
        assert np.abs(found - truth).max() <= TOLERANCE[dtype] * np.abs(truth).max()


def differ(rule: Optimizer, update: Update) -> None:
    """`update` is a slip: it must lead visibly elsewhere after the second step already."""
    assert np.abs(trajectory(rule, START, GRADIENTS) - by_hand(update))[1].max() > 1e-4


def descent(*rates: str) -> Update:
    """Gradient descent at these rates; the last one stays."""

    def update(s: Memory, g: D, t: int) -> D:
        return -D(rates[min(t, len(rates)) - 1]) * g

    return update


def test_gradient_descent() -> None:
    agree(Sgd(lr=0.1), descent("0.1"))


def test_momentum_heavy_ball() -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) + g
        return -D("0.01") * s["v"]

    agree(Momentum(lr=0.01, momentum=0.9), update)


def test_momentum_exponential_average() -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) + D("0.1") * g
        return -D("0.5") * s["v"]

    agree(Momentum(lr=0.5, momentum=0.9, dampening=0.9), update)


def test_momentum_first_step_takes_the_whole_gradient() -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["v"] = g if t == 1 else D("0.9") * s["v"] + D("0.3") * g
        return -D("0.1") * s["v"]

    agree(Momentum(lr=0.1, momentum=0.9, dampening=0.7, first_step="gradient"), update)


def test_momentum_rate_inside_the_velocity() -> None:
    """With a rate that changes it is another method than the rate outside."""

    def rate(t: int) -> D:
        return max(D("0.1") - D("0.02") * (t - 1), D("0.02"))

    def inside(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) + rate(t) * g
        return -s["v"]

    def outside(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) + g
        return -rate(t) * s["v"]

    lr = Linear(0.1, 0.02, 4)
    agree(Momentum(lr=lr, momentum=0.9, lr_in_velocity=True), inside)
    agree(Momentum(lr=lr, momentum=0.9), outside)
    differ(Momentum(lr=lr, momentum=0.9, lr_in_velocity=True), outside)


def test_momentum_annealed() -> None:
    """From 0.5 to 0.9 in four steps; there it stays."""

    def update(s: Memory, g: D, t: int) -> D:
        s["v"] = [D("0.5"), D("0.6"), D("0.7"), D("0.8"), D("0.9"), D("0.9")][t - 1] * s.get("v", D(0)) + g
        return -D("0.1") * s["v"]

    agree(Momentum(lr=0.1, momentum=Linear(0.5, 0.9, 4)), update)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nesterov_look_ahead_form(dtype: str) -> None:
    """On J = θ²/2 · (1, 4): the gradient is taken where `next_point` says, which must be θ - β v."""
    curvatures, beta, lr = [1.0, 4.0], 0.5, 0.25  # exact in binary, so every number here is, too
    session = make(Momentum(lr=lr, momentum=beta, nesterov="lookahead"), {"w": [1.0, -2.0]}, dtype=dtype)
    theta, v = [1.0, -2.0], [0.0, 0.0]
    for _ in range(5):
        ahead = [theta[i] - beta * v[i] for i in range(2)]
        assert session.next_point().tolist() == ahead
        gradient = [curvatures[i] * ahead[i] for i in range(2)]
        step(session, {"w": np.array(gradient)})
        v = [beta * v[i] + lr * gradient[i] for i in range(2)]
        theta = [theta[i] - v[i] for i in range(2)]
        assert held(session).tolist() == theta


def test_nesterov_rearranged() -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) + g
        return -D("0.01") * (g + D("0.9") * s["v"])

    agree(Momentum(lr=0.01, momentum=0.9, nesterov=True), update)
    with pytest.raises(InvalidRecipe) as refused:
        Momentum(nesterov=True, dampening=0.1)
    assert refused.value.pointer == "/dampening"


def test_nesterov_rearranged_with_the_rate_inside() -> None:
    """As Keras writes it."""

    def update(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) - D("0.01") * g
        return D("0.9") * s["v"] - D("0.01") * g

    agree(Momentum(lr=0.01, momentum=0.9, nesterov=True, lr_in_velocity=True), update)


@pytest.mark.parametrize("initial", ["0", "0.1"])
@pytest.mark.parametrize("eps", EPSILONS)
def test_adagrad_diagonal(eps: str, initial: str) -> None:
    def outside(s: Memory, g: D, t: int) -> D:
        s["G"] = s.get("G", D(initial)) + g * g
        return -D("0.1") * g / (s["G"].sqrt() + D(eps))

    def inside(s: Memory, g: D, t: int) -> D:
        s["G"] = s.get("G", D(initial)) + g * g
        return -D("0.1") * g / (s["G"] + D(eps)).sqrt()

    agree(Adagrad(lr=0.1, eps=float(eps), initial_accumulator=float(initial)), outside)
    agree(Adagrad(lr=0.1, eps=float(eps), initial_accumulator=float(initial), eps_inside=True), inside)


def test_adagrad_rate_decay() -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["G"] = s.get("G", D(0)) + g * g
        return -D("0.1") / (1 + D("0.5") * (t - 1)) * g / (s["G"].sqrt() + D("1e-10"))

    agree(Adagrad(lr=0.1, lr_decay=0.5), update)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_adagrad_full_matrix(dtype: str, tolerance: float) -> None:
    """By hand, in two dimensions: G = [[a, b], [b, d]] has the root (G + s I)/r, s = √det G, r = √(tr G + 2 s)."""

    def inverse_root(a: float, b: float, d: float) -> list[list[float]]:
        s = math.sqrt(a * d - b * b)
        r = math.sqrt(a + d + 2 * s)
        top, off, low = (a + s) / r, b / r, (d + s) / r
        det = top * low - off * off
        return [[low / det, -off / det], [-off / det, top / det]]

    lr, eps, initial = 0.5, 0.125, 0.25
    a, b, d, w = initial, 0.0, initial, [1.0, -1.0]
    expected = []
    for x, y in [(1.0, 2.0), (-0.5, 1.0), (3.0, 0.25)]:
        a, b, d = a + x * x, b + x * y, d + y * y
        root = inverse_root(a + eps, b, d + eps)
        w = [w[0] - lr * (root[0][0] * x + root[0][1] * y), w[1] - lr * (root[1][0] * x + root[1][1] * y)]
        expected.append(w)
    rule = Adagrad(lr=lr, eps=eps, initial_accumulator=initial, matrix="full")
    found = trajectory(rule, [1.0, -1.0], [(1.0, 2.0), (-0.5, 1.0), (3.0, 0.25)], dtype=dtype)
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-6)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_adagrad_full_matrix_first_step_is_the_unit_gradient(dtype: str, tolerance: float, scale: float) -> None:
    """G = g gᵀ has rank one and (g gᵀ)^(-1/2) g = g/|g|: rounding errors in its null space must not be blown up."""
    g = np.random.default_rng(3).normal(size=40) * scale
    found = trajectory(Adagrad(lr=1.0, matrix="full"), [0.0] * 40, [g], dtype=dtype)
    np.testing.assert_allclose(found[0], -g / np.sqrt(math.fsum(g * g)), atol=tolerance)


def test_adagrad_full_matrix_is_for_few_parameters() -> None:
    with pytest.raises(InvalidRecipe):
        make(Adagrad(matrix="full"), {"w": np.zeros(4097)})


@pytest.mark.parametrize("alpha", ["0.9", "0.99"])
@pytest.mark.parametrize("eps", EPSILONS)
def test_rmsprop(eps: str, alpha: str) -> None:
    def outside(s: Memory, g: D, t: int) -> D:
        s["s"] = D(alpha) * s.get("s", D(0)) + (1 - D(alpha)) * g * g
        return -D("0.01") * g / (s["s"].sqrt() + D(eps))

    def inside(s: Memory, g: D, t: int) -> D:
        s["s"] = D(alpha) * s.get("s", D(0)) + (1 - D(alpha)) * g * g
        return -D("0.01") * g / (s["s"] + D(eps)).sqrt()

    agree(RmsProp(lr=0.01, alpha=float(alpha), eps=float(eps)), outside)
    agree(RmsProp(lr=0.01, alpha=float(alpha), eps=float(eps), eps_inside=True), inside)


@pytest.mark.parametrize("eps_inside", [False, True])
def test_rmsprop_centered(eps_inside: bool) -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["s"] = D("0.9") * s.get("s", D(0)) + D("0.1") * g * g
        s["m"] = D("0.9") * s.get("m", D(0)) + D("0.1") * g
        variance = s["s"] - s["m"] * s["m"]
        return -D("0.01") * g / ((variance + D("1e-5")).sqrt() if eps_inside else variance.sqrt() + D("1e-5"))

    agree(RmsProp(lr=0.01, alpha=0.9, eps=1e-5, centered=True, eps_inside=eps_inside), update)


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_momentum(centered: bool) -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["s"] = D("0.9") * s.get("s", D(0)) + D("0.1") * g * g
        s["m"] = (D("0.9") * s.get("m", D(0)) + D("0.1") * g) if centered else D(0)
        s["v"] = D("0.8") * s.get("v", D(0)) + g / ((s["s"] - s["m"] ** 2).sqrt() + D("1e-8"))
        return -D("0.01") * s["v"]

    agree(RmsProp(lr=0.01, alpha=0.9, momentum=0.8, centered=centered), update)


def test_rmsprop_rate_in_velocity() -> None:
    def update(s: Memory, g: D, t: int) -> D:
        s["s"] = D("0.9") * s.get("s", D(0)) + D("0.1") * g * g
        s["v"] = D("0.8") * s.get("v", D(0)) + D("0.01") / 2 ** (t - 1) * g / (s["s"] + D("1e-8")).sqrt()
        return -s["v"]

    lr = Exponential(0.01, 0.5)
    agree(RmsProp(lr=lr, alpha=0.9, momentum=0.8, lr_in_velocity=True, eps_inside=True), update)
    # Without a momentum there is no velocity, and the flag changes nothing.
    plain, flagged = RmsProp(lr=lr), RmsProp(lr=lr, lr_in_velocity=True)
    np.testing.assert_allclose(trajectory(plain, START, GRADIENTS), trajectory(flagged, START, GRADIENTS), rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_centered_of_a_steady_gradient_stays_a_number(dtype: str, momentum: float) -> None:
    """Its variance is 0, and rounding makes it negative sooner or later."""
    g = np.random.default_rng(0).normal(size=1000)
    session = make(RmsProp(centered=True, alpha=0.9, momentum=momentum), {"w": np.zeros(1000)}, dtype=dtype)
    for _ in range(500):
        step(session, {"w": g})
    assert np.isfinite(held(session)).all()


def moments(s: Memory, g: D, beta1: str = "0.9", beta2: str = "0.999") -> None:
    s["m"] = D(beta1) * s.get("m", D(0)) + (1 - D(beta1)) * g
    s["v"] = D(beta2) * s.get("v", D(0)) + (1 - D(beta2)) * g * g


@pytest.mark.parametrize("eps_inside", [False, True])
def test_adam_without_bias_correction(eps_inside: bool) -> None:
    def update(s: Memory, g: D, t: int) -> D:
        moments(s, g)
        root = (s["v"] + D("1e-8")).sqrt() if eps_inside else s["v"].sqrt() + D("1e-8")
        return -D("0.01") * s["m"] / root

    agree(Adam(lr=0.01, bias_correction=False, eps_inside=eps_inside), update)


@pytest.mark.parametrize("beta2", ["0.99", "0.999"])
@pytest.mark.parametrize("eps", EPSILONS)
def test_adam(eps: str, beta2: str) -> None:
    def corrected(s: Memory, g: D, t: int) -> tuple[D, D]:
        moments(s, g, beta2=beta2)
        return s["m"] / (1 - D("0.9") ** t), s["v"] / (1 - D(beta2) ** t)

    def outside(s: Memory, g: D, t: int) -> D:
        m, v = corrected(s, g, t)
        return -D("0.01") * m / (v.sqrt() + D(eps))

    def inside(s: Memory, g: D, t: int) -> D:
        m, v = corrected(s, g, t)
        return -D("0.01") * m / (v + D(eps)).sqrt()

    agree(Adam(lr=0.01, beta2=float(beta2), eps=float(eps)), outside)
    agree(Adam(lr=0.01, beta2=float(beta2), eps=float(eps), eps_inside=True), inside)


@pytest.mark.parametrize("decay_scaling", ["lr", "none"])
def test_adamw(decay_scaling: Literal["lr", "none"]) -> None:
    def update(s: Memory, g: D, t: int) -> D:
        moments(s, g)
        m, v = s["m"] / (1 - D("0.9") ** t), s["v"] / (1 - D("0.999") ** t)
        shrink = D("0.1") * (D("0.01") if decay_scaling == "lr" else 1)
        return -D("0.01") * m / (v.sqrt() + D("1e-8")) - shrink * s["p"]

    agree(AdamW(lr=0.01, weight_decay=0.1, decay_scaling=decay_scaling), update)


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("eps", [1e-10, 1e-8, 1e-5, 1e-3])
def test_the_constants_in_use_are_legal(rho: float, eps: float) -> None:
    Momentum(momentum=rho)
    RmsProp(alpha=rho, eps=eps, momentum=rho)
    Adam(beta1=rho, beta2=rho, eps=eps)
    AdamW(beta1=rho, beta2=rho, eps=eps)
    Adagrad(eps=eps)
    Ema(decay=rho)


# Newton


def newton(rule: Newton, g: Sequence[float], hessian: Any, dtype: str = "float64") -> Array:
    """The update of one step from 0."""
    session = make(rule, {"w": np.zeros(len(g))}, dtype=dtype)
    step(session, {"w": np.asarray(g)}, hessian=np.asarray(hessian))
    return held(session)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("negative_curvature", ["gradient", "absolute"])
def test_newton(negative_curvature: Literal["gradient", "absolute"], dtype: str, tolerance: float) -> None:
    """J = θᵀHθ/2 - bᵀθ with H = [[4, 1], [1, 3]], b = (1, 2) is least at H⁻¹b = (1, 7)/11: one step from anywhere."""
    hessian, b = np.array([[4.0, 1.0], [1.0, 3.0]]), np.array([1.0, 2.0])
    session = make(Newton(negative_curvature=negative_curvature), {"w": [5.0, -3.0]}, dtype=dtype)
    step(session, {"w": hessian @ np.array([5.0, -3.0]) - b}, hessian=hessian)
    np.testing.assert_allclose(held(session), [1 / 11, 7 / 11], rtol=20 * tolerance)


def test_newton_damping() -> None:
    """(H + 2 I)⁻¹ = [[6, 1], [1, 5]]⁻¹ = [[5, -1], [-1, 6]]/29."""
    for damped in (Newton(damping=2.0), Newton(damping=2.0, negative_curvature="damp")):
        found = newton(damped, [1.0, 2.0], [[4.0, 1.0], [1.0, 3.0]])
        np.testing.assert_allclose(found, [-(5 - 2) / 29, -(-1 + 12) / 29], rtol=1e-12)


# [[1, 2], [2, 1]] has the curvature 3 along (1, 1)/√2 and -1 along (1, -1)/√2; g = (3, 1) is 2·(1, 1) + 1·(1, -1).
SADDLE = [[1.0, 2.0], [2.0, 1.0]]


def test_newton_negative_curvature_gradient() -> None:
    found = newton(Newton(lr=0.1), [3.0, 1.0], SADDLE)
    np.testing.assert_allclose(found, [-2 / 3 - 0.1, -2 / 3 + 0.1], rtol=1e-12)


def test_newton_negative_curvature_absolute() -> None:
    found = newton(Newton(lr=0.1, negative_curvature="absolute"), [3.0, 1.0], SADDLE)
    np.testing.assert_allclose(found, [-2 / 3 - 1, -2 / 3 + 1], rtol=1e-12)
    found = newton(Newton(damping=1.0, negative_curvature="absolute"), [3.0, 1.0], SADDLE)
    np.testing.assert_allclose(found, [-2 / 4 - 1 / 2, -2 / 4 + 1 / 2], atol=1e-15)


def test_newton_negative_curvature_damp() -> None:
    """Lifted by 1 + 0.5: curvatures 4.5 and 0.5."""
    found = newton(Newton(damping=0.5, negative_curvature="damp"), [3.0, 1.0], SADDLE)
    np.testing.assert_allclose(found, [-2 / 4.5 - 1 / 0.5, -2 / 4.5 + 1 / 0.5], rtol=1e-12)


@pytest.mark.parametrize("negative_curvature", ["gradient", "absolute"])
def test_newton_flat_direction_takes_the_gradient_step(negative_curvature: Literal["gradient", "absolute"]) -> None:
    found = newton(Newton(lr=0.1, negative_curvature=negative_curvature), [4.0, 7.0], [[2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(found, [-2.0, -0.7], rtol=1e-12)
    nowhere = newton(Newton(lr=0.1, negative_curvature=negative_curvature), [4.0, 7.0], np.zeros((2, 2)))
    np.testing.assert_allclose(nowhere, [-0.4, -0.7], rtol=1e-12)


def test_newton_takes_the_symmetric_part() -> None:
    skewed = newton(Newton(), [1.0, 2.0], [[4.0, 2.0], [0.0, 3.0]])
    np.testing.assert_array_equal(skewed, newton(Newton(), [1.0, 2.0], [[4.0, 1.0], [1.0, 3.0]]))


def test_newton_huge_hessian_stays_a_number() -> None:
    assert np.isfinite(newton(Newton(), [1.0, 2.0], np.full((2, 2), 1.5e308))).all()


def test_newton_needs_a_hessian() -> None:
    with pytest.raises(HessianRequired):
        step(make(Newton(), {"w": [0.0]}), {"w": np.ones(1)})


# Annealing, averages

RATES: dict[str, tuple[Schedule, list[str]]] = {
    "constant": (Constant(0.5), ["0.5"] * 6),
    "linear": (Linear(0.5, 0.1, 4), ["0.5", "0.4", "0.3", "0.2", "0.1", "0.1"]),
    "exponential": (Exponential(0.5, 0.1), ["0.5", "0.05", "0.005", "0.0005", "0.00005", "0.000005"]),
    "exponential, by steps": (
        Exponential(0.5, 0.1, steps=2, staircase=True),
        ["0.5", "0.5", "0.05", "0.05", "0.005", "0.005"],
    ),
    "exponential, smoothly": (
        Exponential(0.5, 0.25, steps=2),
        ["0.5", "0.25", "0.125", "0.0625", "0.03125", "0.015625"],
    ),
    "inverse_time": (InverseTime(0.6, 1.0), ["0.6", "0.3", "0.2", "0.15", "0.12", "0.1"]),
    "inverse_time, by steps": (
        InverseTime(0.6, 1.0, steps=2, staircase=True),
        ["0.6", "0.6", "0.3", "0.3", "0.2", "0.2"],
    ),
    "step": (Step(0.5, 2, 0.1), ["0.5", "0.5", "0.05", "0.05", "0.005", "0.005"]),
    # cos(60°) = 1/2, cos(120°) = -1/2
    "cosine": (Cosine(0.5, 3, 0.1), ["0.5", "0.4", "0.2", "0.1", "0.1", "0.1"]),
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rate_decay_as_annealing(name: str) -> None:
    lr, values = RATES[name]
    assert lr.kind == name.split(",")[0]
    agree(Sgd(lr=lr), descent(*values))
    session = make(Sgd(lr=lr), {"w": START})
    assert [session.rate(t) for t in range(1, 7)] == pytest.approx([float(value) for value in values], rel=1e-15)
    assert session.rate() == session.rate(1)


def averages(averaging: Any, dtype: str) -> Array:
    """What `final_point` says after each step, (steps, 3)."""
    session = make(Sgd(lr=0.5), {"w": START}, dtype=dtype, averaging=averaging)
    np.testing.assert_array_equal(session.final_point(), np.asarray(START, dtype))
    seen = []
    for g in GRADIENTS:
        step(session, {"w": np.array(g)})
        seen.append(session.final_point().copy())
    return np.stack(seen)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize(
    ("start", "debias"), [("zero", True), ("zero", False), ("first", True), ("first", False)]
)  # fmt: skip
def test_exponentially_weighted_average(
    start: Literal["zero", "first"], debias: bool, dtype: str, tolerance: float
) -> None:
    points = by_hand(descent("0.5"))
    expected, v = [], [0.0, 0.0, 0.0]
    for t, point in enumerate(points, 1):
        v = [0.75 * v[i] + 0.25 * point[i] for i in range(3)]
        if start == "first" and t == 1:
            v = list(point)
        corrected = debias and start == "zero"
        expected.append([value / (1 - 0.75**t) if corrected else value for value in v])
    found = averages(Ema(decay=0.75, start=start, debias=debias), dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("start", [0, 1, 3, 10])
def test_polyak_averaging(start: int, dtype: str, tolerance: float) -> None:
    """The mean of the parameters after step `start` and later ones; until then, the parameters."""
    points = by_hand(descent("0.5"))
    expected = []
    for t in range(1, 7):
        counted = points[max(start, 1) - 1 : t]
        expected.append([math.fsum(column) / len(counted) for column in counted.T] if len(counted) else points[t - 1])
    found = averages(Polyak(start=start), dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# What some pages print, and is not computed here


def test_slip_mean_of_gradients_for_the_mean_of_squares() -> None:
    def slip(s: Memory, g: D, t: int) -> D:
        s["s"] = D("0.9") * s.get("s", D(0)) + D("0.1") * g
        return -D("0.01") * g / (abs(s["s"]).sqrt() + D("1e-8"))

    differ(RmsProp(lr=0.01, alpha=0.9), slip)


def test_slip_second_moment_from_the_velocity() -> None:
    """s ← β v + (1 - β) g², v being the other average."""

    def rmsprop(s: Memory, g: D, t: int) -> D:
        s["v"] = D("0.9") * s.get("v", D(0)) + D("0.1") * g * g
        s["s"] = D("0.9") * s["v"] + D("0.1") * g * g
        return -D("0.01") * g / (s["s"].sqrt() + D("1e-8"))

    def adam(s: Memory, g: D, t: int) -> D:
        s["m"] = D("0.9") * s.get("m", D(0)) + D("0.1") * g
        s["v"] = D("0.999") * abs(s["m"]) + D("0.001") * g * g
        return -D("0.01") * s["m"] / (1 - D("0.9") ** t) / ((s["v"] / (1 - D("0.999") ** t)).sqrt() + D("1e-8"))

    differ(RmsProp(lr=0.01, alpha=0.9), rmsprop)
    differ(Adam(lr=0.01), adam)


def test_slip_correction_without_the_power() -> None:
    def slip(s: Memory, g: D, t: int) -> D:
        moments(s, g)
        return -D("0.01") * s["m"] / (1 - D("0.9")) / ((s["v"] / (1 - D("0.999"))).sqrt() + D("1e-8"))

    differ(Adam(lr=0.01), slip)


def test_slip_correction_that_is_not_used() -> None:
    def slip(s: Memory, g: D, t: int) -> D:
        moments(s, g)
        return -D("0.01") * s["m"] / (s["v"].sqrt() + D("1e-8"))

    differ(Adam(lr=0.01), slip)
    agree(Adam(lr=0.01, bias_correction=False), slip)
