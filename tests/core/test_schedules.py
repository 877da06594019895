"""Schedules: their values stay in their span, hold after the end, and are refused where the span leaves a bound."""

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core import schedules
from core.errors import InvalidRecipe
from core.optimizers import KINDS
from core.optimizers.adam import Adam
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.rule import numeric_fields
from core.optimizers.second_order import Newton
from core.schedules import Constant, Cosine, Exponential, InverseTime, Linear, Schedule, Step

numbers = st.floats(-1e6, 1e6)
factors = st.floats(1e-3, 3.0)
lengths = st.integers(1, 10**6)
NEAREST_1 = math.nextafter(1.0, 0.0)

ANY = st.one_of(
    st.builds(Constant, numbers),
    st.builds(Linear, numbers, numbers, lengths),
    st.builds(Exponential, numbers, factors, lengths, st.booleans()),
    st.builds(InverseTime, numbers, st.floats(0, 1e300), lengths, st.booleans()),
    st.builds(Step, numbers, lengths, factors),
    st.builds(Cosine, numbers, lengths, numbers, factors),
)


def initial(schedule: Schedule) -> float:
    values = vars(schedule)
    return float(values["value"] if isinstance(schedule, Constant) else values["init"])


@given(ANY, st.integers(1, 10**9))
@example(Exponential(0.0, 2.0), 10**6)
@example(Exponential(-1.0, 2.0), 10**6)
@example(Step(0.0, 1, 3.0), 10**6)
@example(Cosine(NEAREST_1, 10, 0.3), 1)
@example(Cosine(NEAREST_1, 10**9, 0.3), 2)
@example(Linear(0.3, NEAREST_1, 10**9), 10**9)
@example(InverseTime(1.0, 1e300), 10**9)
def test_values_stay_in_the_span(schedule: Schedule, t: int) -> None:
    low, high = schedule.span()
    assert low <= schedule.at(t) <= high


@given(ANY)
def test_the_first_step_is_taken_at_the_first_value(schedule: Schedule) -> None:
    assert schedule.at(1) == pytest.approx(initial(schedule), rel=1e-15, abs=1e-9)


LINEAR = st.builds(Linear, numbers, numbers, lengths)
COSINE = st.builds(Cosine, numbers, lengths, numbers, factors)


@given(LINEAR | COSINE, st.integers(0, 10**12))
def test_past_the_end_the_last_value_is_held(schedule: Any, later: int) -> None:
    end = schedule.end if isinstance(schedule, Linear) else schedule.floor
    assert schedule.at(schedule.steps + 1 + later) == end


@given(ANY, st.integers(1, 10**6))
def test_values_go_one_way(schedule: Schedule, t: int) -> None:
    """No schedule of these turns round: each value lies between the first one and the next."""
    a, b, c = schedule.at(1), schedule.at(t), schedule.at(t + 1)
    assert a <= b <= c or a >= b >= c


def test_spans_are_reached() -> None:
    """A span is not merely wide enough."""
    for schedule, t in [
        (Linear(0.5, 0.9, 7), 8), (Cosine(0.5, 7, 0.1), 8), (Constant(0.5), 1), (Exponential(0.5, 0.5), 5000),
        (Exponential(-0.5, 2.0), 5000), (Exponential(0.5, 1.0), 5000), (Step(0.5, 1, 2.0), 5000),
        (Step(-0.5, 1, 0.5), 5000),
        (InverseTime(0.5, 0.0), 9), (InverseTime(0.5, 1e300), 10**10),
    ]:  # fmt: skip
        assert sorted([schedule.at(1), schedule.at(t)]) == pytest.approx(schedule.span())


INF = math.inf


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


@given(st.data(), st.sampled_from(sorted(KINDS)), st.integers(1, 10**7))
def test_a_recipe_that_was_taken_can_be_resolved_at_every_step(data: st.DataObject, kind: str, t: int) -> None:
    """Whatever schedules its fields hold: coefficients are numbers, and nothing is raised in the middle of a step."""
    cls = KINDS[kind]
    options: dict[str, Any] = {name: data.draw(st.none() | ANY, name) for name in numeric_fields(cls)}
    try:
        rule = cls(**{name: value for name, value in options.items() if value is not None})
    except InvalidRecipe:
        return
    resolved = rule.at(t)
    assert all(not isinstance(value, Schedule) for value in vars(resolved).values())
    assert resolved.rate(t) >= 0
    coefficients = getattr(resolved, "coefficients", lambda _: ())
    assert all(isinstance(value, float | int) for value in coefficients(t))
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
