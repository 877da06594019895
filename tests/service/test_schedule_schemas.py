"""Schedules in JSON, those made of others too: the way there and back, and what is refused where."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import schedules
from service.errors import InvalidRequest
from service.schemas import document_of, parse_create
from service.wire.json import dumps, loads
from tests.core.schedule_strategies import closed, plateau, schedule_of

LINE = {"kind": "linear", "init": 0.0, "end": 1.0, "steps": 10}


def scheduled(lr: Any) -> dict[str, Any]:
    return {"optimizer": {"kind": "sgd", "lr": lr}, "shapes": {"w": [2]}}


def test_schedules_have_schedules_as_parts() -> None:
    product = {"kind": "product", "parts": [{"kind": "cosine", "init": 0.1, "steps": 90}, LINE]}
    asked = {"kind": "sequence", "parts": [LINE, product], "boundaries": [10]}
    document = parse_create(scheduled(asked))[0]
    cosine = schedules.Cosine(0.1, 90)
    line = schedules.Linear(0.0, 1.0, 10)
    assert vars(document.recipe.optimizer)["lr"] == schedules.Sequence((line, schedules.Product((cosine, line))), (10,))
    described = document.describe()["optimizer"]["lr"]
    assert described["parts"][0] == LINE
    assert described["boundaries"] == [10]
    assert type(described["parts"][1]["parts"]) is list


POSITIVE = st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(closed(POSITIVE) | plateau(POSITIVE))
def test_what_is_described_reads_back_as_the_same(asked: dict[str, Any]) -> None:
    document = parse_create(scheduled(asked))[0]
    schedule = vars(document.recipe.optimizer)["lr"]
    assert schedule == schedule_of(asked)
    described = document.describe()
    assert loads(dumps(described)) == described
    assert document_of(loads(dumps(described))) == document
    lr = described["optimizer"]["lr"]
    assert lr | asked == lr or "parts" in asked


def in_products(depth: int) -> dict[str, Any]:
    return {"kind": "product", "parts": [in_products(depth - 1)]} if depth else LINE


def sequence(*parts: Any, boundaries: Any = (3,)) -> dict[str, Any]:
    return scheduled({"kind": "sequence", "parts": list(parts), "boundaries": list(boundaries)})


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (sequence(LINE, LINE | {"steps": 0}), "/parts/1/steps", "at least 1"),
    (sequence(LINE, LINE | {"steps": 2.5}), "/parts/1/steps", "an integer"),
    (sequence(LINE, LINE | {"kind": "line"}), "/parts/1/kind", "the kinds are"),
    (sequence(LINE, {}), "/parts/1/kind", "required"),
    (sequence(LINE, {"kind": "product", "parts": [LINE, LINE | {"x": 1}]}), "/parts/1/parts/1/x", "linear has no"),
    (sequence(LINE, {"kind": "product", "parts": [LINE, 0.5]}), "/parts/1/parts/1", "an object, not a number"),
    (sequence(LINE, "linear"), "/parts/1", "an object, not a string"),
    (sequence(LINE, {"kind": "product", "parts": LINE}), "/parts/1/parts", "a list, not an object"),
    (sequence(LINE, {"kind": "product", "parts": []}), "/parts/1/parts", "at least 1"),
    (sequence(LINE, {"kind": "product"}), "/parts/1/parts", "required"),
    (sequence(*[LINE] * 65, boundaries=[3]), "/parts", "at most 64"),
    (sequence(LINE, {"kind": "product", "parts": [LINE] * 64}), "/parts", "at most 64"),
    (sequence(LINE, LINE, boundaries=[0]), "/boundaries/0", "at least 1"),
    (sequence(LINE, LINE, boundaries=["3"]), "/boundaries/0", "an integer, not a string"),
    (sequence(LINE, LINE, boundaries=[True]), "/boundaries/0", "an integer, not a boolean"),
    (sequence(LINE, LINE, boundaries=[3, 4]), "/boundaries", "one fewer"),
    (sequence(LINE, LINE, LINE, boundaries=[4, 4]), "/boundaries", "ascend"),
    (sequence(LINE, {"kind": "plateau", "init": 0.1}), "/parts/1/kind", "by itself"),
    (sequence(LINE, {"kind": "multi_step", "init": 1, "milestones": [2, 1]}), "/parts/1/milestones", "ascend"),
    (sequence(LINE, LINE | {"end": -1}), "", "at least 0, but it reaches -1"),
    (scheduled(in_products(9)), "/parts/0" * 8, "8 deep"),
    (
        scheduled({"kind": "multi_step", "init": 1, "milestones": list(range(1, 10_002))}),
        "/milestones",
        "at most 10000",
    ),
    (scheduled({"kind": "multi_step", "init": 1, "milestones": 3}), "/milestones", "a list, not a number"),
    (scheduled({"kind": "piecewise_constant", "values": [], "boundaries": []}), "/values", "at least 1"),
    (
        scheduled({"kind": "piecewise_constant", "values": [1, float("inf")], "boundaries": [3]}),
        "/values/1",
        "finite",
    ),
    (scheduled({"kind": "piecewise_linear", "values": [1, LINE], "steps": [0, 3]}), "/values/1", "a number"),
    (scheduled({"kind": "piecewise_linear", "values": [1, 2], "steps": [0]}), "/steps", "as many"),
    (scheduled({"kind": "cyclic", "init": 0, "peak": 1, "mode": "square"}), "/mode", "'triangular'"),
    (scheduled({"kind": "cyclic", "init": 0, "peak": 1, "gamma": 0.5}), "/gamma", "exp_range"),
    (scheduled({"kind": "cyclic", "init": 0, "peak": 1, "steps_down": 0}), "/steps_down", "at least 1"),
    (
        scheduled({"kind": "one_cycle", "peak": 1, "steps": 9, "three_phase": True, "pct_start": 0.6}),
        "/pct_start",
        "half",
    ),
    (scheduled({"kind": "warmup_cosine", "peak": 1, "warmup_steps": 9, "steps": 9}), "/steps", "more"),
    (scheduled({"kind": "plateau", "init": 1, "factor": 1}), "/factor", "less than 1"),
    (scheduled({"kind": "plateau", "init": 1, "threshold_mode": "relative"}), "/threshold_mode", "'rel' or 'abs'"),
]


@pytest.mark.parametrize(
    ("body", "pointer", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_schedule_is_refused_with_a_pointer_into_it(body: dict[str, Any], pointer: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_create(body)
    (fault,) = caught.value.faults
    assert fault.pointer == "/optimizer/lr" + pointer
    assert words in fault.detail
