"""Schedules: their values stay in their span, hold after the end, and are refused where the span leaves a bound."""

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given, reject
from hypothesis import strategies as st

from core import schedules
from core.bounds import numeric_fields
from core.errors import InvalidRecipe
from core.optimizers import KINDS, ElementWise
from core.optimizers.adam import Adam
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.second_order import Newton
from core.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseSqrt,
    InverseTime,
    Linear,
    MultiStep,
    OneCycle,
    PiecewiseConstant,
    PiecewiseLinear,
    Plateau,
    Polynomial,
    Product,
    Schedule,
    Sequence,
    Step,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.core.schedule_strategies import ANY, ANY_JSON, CLOSED, DRAWN, ONE_WAY, ONE_WAY_JSON, schedule_of

NEAREST_1 = math.nextafter(1.0, 0.0)
LAST = 2**53 - 1


@given(CLOSED, st.integers(1, 10**6) | st.integers(1, LAST))
@example(Exponential(0.0, 2.0), 10**6)
@example(Exponential(-1.0, 2.0), 10**6)
@example(Step(0.0, 1, 3.0), 10**6)
@example(Cosine(NEAREST_1, 10, 0.3), 1)
@example(Cosine(NEAREST_1, 10**9, 0.3), 2)
@example(Linear(0.3, NEAREST_1, 10**9), 10**9)
@example(Linear(-1.7e308, 1.7e308, 3), 2)
@example(InverseTime(1.0, 1e300), 10**9)
@example(InverseTime(1.0, 1e300), LAST)
@example(CosineRestarts(0.1, 1, 2, -0.1), LAST)
@example(CosineRestarts(0.1, LAST, LAST, -0.1), LAST)
@example(Cyclic(0.1, 0.3, 1, LAST, "triangular2"), LAST)
@example(Cyclic(0.1, 0.3, 1, 1, "triangular2"), LAST)
@example(Cyclic(0.1, 0.3, 1, 1, "exp_range", 0.5), LAST)
@example(OneCycle(0.1, 1), 1)
@example(OneCycle(0.1, 10, 0.1), 1)
@example(OneCycle(0.1, 10, 0.1, three_phase=True), 1)
@example(OneCycle(0.1, 10, 1.0), 10)
@example(Product((Exponential(1.0, 2.0), Exponential(1.0, 0.5))), LAST)
def test_values_are_numbers_within_the_span(schedule: Schedule, t: int) -> None:
    schedule.check()
    low, high = schedule.span()
    assert low <= schedule.at(t) <= high


@given(CLOSED, st.integers(1, 2 * 10**6), st.data())
def test_values_of_the_first_steps_stay_in_their_reach(schedule: Schedule, count: int, data: st.DataObject) -> None:
    low, high = schedule.reach(count)
    assert low <= schedule.at(data.draw(st.integers(1, count))) <= high
    least, greatest = schedule.span()
    assert least <= low <= high <= greatest


@given(ONE_WAY_JSON)
def test_the_first_step_is_taken_at_the_first_value(settings: dict[str, Any]) -> None:
    assert schedule_of(settings).at(1) == settings.get("init", settings.get("value"))


def end_of(schedule: Any) -> int | None:
    """The number of steps after which a schedule stays as it is; None if it never does."""
    match schedule:
        case Linear() | Polynomial() | Cosine() | WarmupCosine() | WarmupLinear() | WarmupStableDecay():
            return schedule.steps
        case OneCycle():
            return schedule.steps - 1
        case MultiStep():
            return max(schedule.milestones, default=0)
        case PiecewiseConstant():
            return max(schedule.boundaries, default=0)
        case PiecewiseLinear():
            return schedule.steps[-1]
        case Sequence():
            last = end_of(schedule.parts[-1])
            return None if last is None else max(schedule.boundaries, default=0) + last
        case Product():
            ends = [end_of(part) for part in schedule.parts]
            return None if None in ends else max(end for end in ends if end is not None)
    return 0 if isinstance(schedule, Constant) else None


@given(CLOSED, st.integers(0, 10**12))
def test_past_the_end_the_last_value_is_held(schedule: Any, later: int) -> None:
    end = end_of(schedule)
    if end is None:
        reject()
    else:
        assert schedule.at(end + 1 + later) == schedule.at(end + 1)
        if hasattr(schedule, "end"):
            assert schedule.at(end + 1) == schedule.end


@given(ONE_WAY, st.integers(1, 10**6))
def test_values_go_one_way(schedule: Schedule, t: int) -> None:
    """No schedule of these turns round: each value lies between the first one and the next."""
    a, b, c = schedule.at(1), schedule.at(t), schedule.at(t + 1)
    assert a <= b <= c or a >= b >= c


def test_no_kind_is_left_out_here() -> None:
    assert set(schedules.KINDS) == DRAWN


@given(ANY_JSON)
def test_schedules_are_values(settings: dict[str, Any]) -> None:
    """Two that were asked for alike are equal, and can stand in sets."""
    assert len({schedule_of(settings), schedule_of(settings)}) == 1


def test_spans_are_reached() -> None:
    """A span is not merely wide enough."""
    for schedule, t in [
        (Linear(0.5, 0.9, 7), 8), (Cosine(0.5, 7, 0.1), 8), (Constant(0.5), 1), (Exponential(0.5, 0.5), 5000),
        (Exponential(-0.5, 2.0), 5000), (Exponential(0.5, 1.0), 5000), (Step(0.5, 1, 2.0), 5000),
        (Step(-0.5, 1, 0.5), 5000),
        (InverseTime(0.5, 0.0), 9), (InverseTime(0.5, 1e300), 10**10), (Polynomial(0.5, 0.9, 7, 2.0), 8),
        (MultiStep(0.5, (3, 9)), 10), (CosineRestarts(0.5, 7), 7), (Cyclic(0.5, 0.9, 7), 8),
        (PiecewiseConstant((0.5, 0.9), (3,)), 4), (PiecewiseLinear((0, 3), (0.5, 0.9)), 4),
        (WarmupLinear(0.9, 3, 9, init=0.1, end=0.2), 4), (OneCycle(0.5, 10, 0.1), 10),
        (Sequence((Exponential(0.5, 1.5), Constant(0.6)), (4,)), 4),
        (Product((Linear(0.0, 1.0, 4), Cosine(0.5, 4, 0.5))), 5),
    ]:  # fmt: skip
        assert sorted([schedule.at(1), schedule.at(t)]) == pytest.approx(schedule.span())


INF = math.inf
LINEAR = Linear(0.1, 0.2, 3)


def nested(depth: int) -> Schedule:
    return Product((nested(depth - 1),)) if depth else LINEAR


@pytest.mark.parametrize(
    ("make", "pointer"),
    [
        (lambda: Adam(beta1=Exponential(0.5, 1.1)), "/beta1"),
        (lambda: Adam(beta1=Step(0.5, 10, 2.0)), "/beta1"),
        (lambda: Adam(beta2=Linear(0.9, 1.0, 10)), "/beta2"),
        (lambda: Adam(beta2=Constant(1.0)), "/beta2"),
        (lambda: Momentum(momentum=Linear(0.5, 1.5, 10)), "/momentum"),
        (lambda: Sgd(lr=Linear(0.1, -0.1, 10)), "/lr"),
        (lambda: Sgd(lr=Cosine(0.1, 10, -1e-9)), "/lr"),
        (lambda: Sgd(lr=Exponential(-0.1, 0.5)), "/lr"),
        (lambda: Sgd(lr=InverseTime(-0.1, 0.5)), "/lr"),
        (lambda: Sgd(lr=Linear(0.1, 0.2, 0)), "/lr/steps"),
        (lambda: Sgd(lr=Exponential(0.1, 0.0)), "/lr/rate"),
        (lambda: Sgd(lr=Exponential(0.1, INF)), "/lr/rate"),
        (lambda: Sgd(lr=Step(0.1, 10, -0.5)), "/lr/factor"),
        (lambda: Sgd(lr=InverseTime(0.1, -0.5)), "/lr/rate"),
        (lambda: Sgd(lr=Cosine(0.1, 10, exponent=0.0)), "/lr/exponent"),
        (lambda: Sgd(lr=Constant(math.nan)), "/lr/value"),
        (lambda: Sgd(lr=Linear(Constant(0.1), 0.2, 3)), "/lr/init"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=Linear(0.1, 0.2, Constant(3))), "/lr/steps"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=Linear(0.1, 0.2, 2.5)), "/lr/steps"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=Linear(0.1, 0.2, LAST + 1)), "/lr/steps"),
        (lambda: Sgd(lr=Polynomial(0.1, 0.2, 3, 0.0)), "/lr/power"),
        (lambda: Sgd(lr=Polynomial(0.1, -0.2, 3)), "/lr"),
        (lambda: Sgd(lr=InverseSqrt(0.1, 0)), "/lr/warmup_steps"),
        (lambda: Sgd(lr=MultiStep(0.1, (3, 2))), "/lr/milestones"),
        (lambda: Sgd(lr=MultiStep(0.1, (0, 2))), "/lr/milestones/0"),
        (lambda: Sgd(lr=MultiStep(0.1, (1, True))), "/lr/milestones/1"),
        (lambda: Sgd(lr=MultiStep(0.1, [1, 2])), "/lr/milestones"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=MultiStep(0.1, tuple(range(1, 10_002)))), "/lr/milestones"),
        (lambda: Adam(beta1=MultiStep(0.5, (3, 9), 1.5)), "/beta1"),
        (lambda: Sgd(lr=PiecewiseConstant((0.1, 0.2), (3, 4))), "/lr/boundaries"),
        (lambda: Sgd(lr=PiecewiseConstant((0.1, 0.2, 0.3), (3, 3))), "/lr/boundaries"),
        (lambda: Sgd(lr=PiecewiseConstant((), ())), "/lr/values"),
        (lambda: Sgd(lr=PiecewiseConstant((0.1, INF), (3,))), "/lr/values/1"),
        (lambda: Sgd(lr=PiecewiseConstant((0.1, -0.1), (3,))), "/lr"),
        (lambda: Sgd(lr=PiecewiseLinear((0, 3), (0.1,))), "/lr/steps"),
        (lambda: Sgd(lr=PiecewiseLinear((3, 3), (0.1, 0.2))), "/lr/steps"),
        (lambda: Sgd(lr=PiecewiseLinear((-1, 3), (0.1, 0.2))), "/lr/steps/0"),
        (lambda: Sgd(lr=CosineRestarts(0.1, 10, 0)), "/lr/mult"),
        (lambda: Sgd(lr=CosineRestarts(0.1, 10, factor=1.5)), "/lr/factor"),
        (lambda: Sgd(lr=CosineRestarts(0.1, 10, 2, -0.1)), "/lr"),
        (lambda: Sgd(lr=Cyclic(0.1, 0.2, steps_down=0)), "/lr/steps_down"),
        (lambda: Sgd(lr=Cyclic(0.1, 0.2, gamma=0.9)), "/lr/gamma"),
        (lambda: Sgd(lr=Cyclic(0.1, 0.2, mode="exp_range", gamma=1.1)), "/lr/gamma"),
        (lambda: Adam(beta1=Cyclic(0.9, 1.0)), "/beta1"),
        (lambda: Sgd(lr=OneCycle(0.1, 10, 1.5)), "/lr/pct_start"),
        (lambda: Sgd(lr=OneCycle(0.1, 10, 0.6, three_phase=True)), "/lr/pct_start"),
        (lambda: Sgd(lr=OneCycle(0.1, 10, div_factor=0.0)), "/lr/div_factor"),
        (lambda: Sgd(lr=OneCycle(1e300, 10, div_factor=1e-300)), "/lr/div_factor"),
        (lambda: Sgd(lr=OneCycle(1e300, 10, final_div_factor=1e-300)), "/lr/final_div_factor"),
        (lambda: Adam(beta1=OneCycle(0.9, 10, div_factor=0.5)), "/beta1"),
        (lambda: Sgd(lr=WarmupCosine(0.1, 10, 10)), "/lr/steps"),
        (lambda: Sgd(lr=WarmupLinear(0.1, 10, 20, init=-0.1)), "/lr"),
        (lambda: Sgd(lr=WarmupStableDecay(0.1, 10, 20, decay_steps=11)), "/lr/decay_steps"),
        (lambda: Adam(beta1=WarmupLinear(1.0, 10, 20)), "/beta1"),
        (lambda: Sgd(lr=Sequence((LINEAR,), (3,))), "/lr/boundaries"),
        (lambda: Sgd(lr=Sequence((LINEAR,) * 3, (3, 3))), "/lr/boundaries"),
        (lambda: Sgd(lr=Sequence((), ())), "/lr/parts"),
        (lambda: Sgd(lr=Sequence((0.1,), ())), "/lr/parts/0"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=Sequence((LINEAR, Linear(0.1, 0.2, 0)), (3,))), "/lr/parts/1/steps"),
        (
            lambda: Sgd(lr=Sequence((LINEAR, Product((LINEAR, MultiStep(0.1, (2, 1))))), (3,))),
            "/lr/parts/1/parts/1/milestones",
        ),
        (lambda: Sgd(lr=Sequence((LINEAR, Plateau(0.1)), (3,))), "/lr/parts/1/kind"),
        (lambda: Sgd(lr=Product((Product((Plateau(0.1),)),))), "/lr/parts/0/parts/0/kind"),
        (lambda: Sgd(lr=Product(())), "/lr/parts"),
        (lambda: Sgd(lr=Product((LINEAR,) * 65)), "/lr/parts"),
        (lambda: Sgd(lr=Product((LINEAR, Product((LINEAR,) * 63)))), "/lr/parts"),
        (lambda: Sgd(lr=nested(9)), "/lr" + "/parts/0" * 8),
        (lambda: Sgd(lr=nested(400)), "/lr" + "/parts/0" * 8),
        (lambda: Sgd(lr=Product((LINEAR, Constant(-1.0)))), "/lr"),
        (lambda: Adam(beta1=Sequence((Constant(0.5), Exponential(0.5, 1.1)), (5,))), "/beta1"),
        (lambda: Adam(beta1=Sequence((Exponential(0.5, 1.1), Constant(0.5)), (9,))), "/beta1"),
        (lambda: Sgd(lr=Plateau(0.1, factor=1.0)), "/lr/factor"),
        (lambda: Sgd(lr=Plateau(0.1, patience=-1)), "/lr/patience"),
        (lambda: Sgd(lr=Plateau(-0.1)), "/lr"),
        (lambda: Adam(beta1=Plateau(1.0)), "/beta1"),
        (lambda: Adagrad(initial_accumulator=Linear(0.0, 1.0, 3)), "/initial_accumulator"),
        (lambda: Newton(negative_curvature="damp", damping=Linear(1.0, 0.0, 3)), "/damping"),
        (lambda: RmsProp(alpha=-0.1), "/alpha"),
        (lambda: Adam(beta1=1.0), "/beta1"),
        (lambda: Adam(eps=-1e-8), "/eps"),
        (lambda: Sgd(lr=math.nan), "/lr"),
        (lambda: Sgd(lr=INF), "/lr"),
        (lambda: Sgd(lr=True), "/lr"),
        (lambda: Sgd(lr="0.1"), "/lr"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=None), "/lr"),  # type: ignore[arg-type]
        (lambda: Sgd(lr=10**400), "/lr"),
        (lambda: Sgd(lr=-(10**5000)), "/lr"),
    ],
)
def test_refused(make: Any, pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        make()
    assert refused.value.pointer == pointer


def test_allowed_at_the_edge() -> None:
    Adam(beta1=Linear(0.0, NEAREST_1, 10), beta2=Cosine(NEAREST_1, 10, 0.3), lr=Linear(0.1, 0.0, 3), eps=0.0)
    Momentum(momentum=Step(0.9, 10, 0.5), lr=Exponential(1e-6, 1.2))
    Newton(negative_curvature="damp", damping=Linear(1.0, 1e-9, 3))
    Sgd(lr=1)
    Adam(beta1=Sequence((Exponential(0.5, 1.1), Constant(0.5)), (8,)))
    Adam(beta1=Sequence((Linear(0.5, 1.0, 8), Cyclic(0.5, 1.0, 4), Constant(0.5)), (8, 12)))
    Sgd(lr=Product((LINEAR, Product((LINEAR,) * 62))))
    Sgd(lr=nested(8))
    Sgd(lr=Plateau(0.1, minimum=0.2))
    Sgd(lr=MultiStep(0.1, (3, 3, 7)))
    Sgd(lr=OneCycle(0.1, 1))


@given(st.data(), st.sampled_from(sorted(KINDS)), st.integers(1, 10**7))
def test_a_recipe_that_was_taken_can_be_resolved_at_every_step(data: st.DataObject, kind: str, t: int) -> None:
    """Whatever schedules its fields hold: coefficients are numbers, and nothing is raised in the middle of a step."""
    cls = KINDS[kind]
    options: dict[str, Any] = {
        name: data.draw(st.none() | ANY, name) for name, (base, _) in numeric_fields(cls).items() if base is float
    }
    try:
        rule = cls(**{name: value for name, value in options.items() if value is not None})
    except InvalidRecipe:
        return
    resolved = rule.at(t)
    assert all(not isinstance(value, Schedule) for value in vars(resolved).values())
    assert resolved.rate(t) >= 0
    if isinstance(resolved, ElementWise) and resolved.family == "elements":
        assert all(isinstance(value, float | int) for value in resolved.tracked(t, dict(resolved.scalars)))
    assert vars(rule) == vars(cls(**{name: value for name, value in options.items() if value is not None}))


def test_every_kind_is_described() -> None:
    for kinds in (schedules.KINDS, KINDS):
        for kind, cls in kinds.items():
            assert cls.kind == kind
            assert cls.formula
            assert cls.source
            assert cls.url.startswith("https://")
            assert cls.__doc__
            assert fields(cls)
