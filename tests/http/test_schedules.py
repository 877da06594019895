"""Schedules over HTTP: what is to come, what each step was taken with, and the one that looks at the loss."""

import csv
import io
from typing import Any

import httpx
import numpy as np
import pytest

from tests.http.files import saved
from tests.http.refusals import pointers, refused, unchanged
from tests.wire import SAFETENSORS, create

Json = dict[str, Any]

LINEAR: Json = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 9}
COSINE: Json = {"kind": "cosine", "init": 0.9, "steps": 8}
HALVED: Json = {"kind": "step", "init": 1.0, "steps": 3, "factor": 0.5}


def session_with(client: httpx.Client, optimizer: Any, **members: Any) -> str:
    made = {"params": {"w": [1.0, -2.0], "b": [0.5]}, "dtype": "float64", **members}
    return str(create(client, optimizer=optimizer, **made)["id"])


def post(client: httpx.Client, session: str, **members: Any) -> httpx.Response:
    body = {"gradients": {"w": [0.5, -1.0], "b": [2.0]}} | members
    return client.post(f"/v1/sessions/{session}/steps", json=body)


def taken(client: httpx.Client, session: str, **members: Any) -> Json:
    reply = post(client, session, **members)
    assert reply.status_code == 200, reply.text
    found: Json = reply.json()
    return found


def preview(client: httpx.Client, session: str, **query: Any) -> Json:
    reply = client.get(f"/v1/sessions/{session}/schedule", params=query)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json"), reply.text
    shown: Json = reply.json()
    assert reply.headers["ravine-step"] == str(shown["step"])
    assert reply.headers["etag"] == client.get(f"/v1/sessions/{session}").headers["etag"]
    return shown


def linear(t: int) -> float:
    return 0.1 + (0.01 - 0.1) * min(t - 1, 9) / 9


def cosine(t: int) -> float:
    return float(0.45 + 0.45 * np.cos(np.pi * min(t - 1, 8) / 8))


def halved(t: int) -> float:
    return 0.5 ** float((t - 1) // 3)


# -- what is to come -------------------------------------------------------------------------------------------------

EVERYWHERE = {
    "optimizer": {"kind": "lookahead", "base": {"kind": "adam", "lr": LINEAR, "beta1": COSINE}, "slow_step": HALVED},
    "groups": [{"match": "w", "lr": 0.5}, {"match": "b", "lr": HALVED, "beta1": 0.5}],
    "transforms": [{"kind": "sign"}, {"kind": "clip_by_global_norm", "max_norm": HALVED}],
}
PLACES = {
    "lr": linear,
    "/optimizer/base/lr": linear,
    "/optimizer/base/beta1": cosine,
    "/optimizer/slow_step": halved,
    "/groups/1/lr": halved,
    "/transforms/1/max_norm": halved,
}


def test_every_scheduled_member_is_shown_under_its_pointer(client: httpx.Client) -> None:
    session = session_with(client, **EVERYWHERE)
    shown = client.get(f"/v1/sessions/{session}").json()
    for taken_already in (0, 2):
        found = preview(client, session, steps=12)
        assert (found["step"], found["first"]) == (taken_already, taken_already + 1)
        assert found.keys() == {"step", "first", "values"}
        assert found["values"].keys() == PLACES.keys()
        for place, values in found["values"].items():
            expected = [PLACES[place](t) for t in range(found["first"], found["first"] + 12)]
            np.testing.assert_allclose(values, expected, rtol=1e-14, atol=1e-16)
        for place in PLACES.keys() - {"lr"}:
            assert member(shown, place)["kind"] in ("linear", "cosine", "step")
        for _ in range(2):
            taken(client, session)


def member(value: Any, pointer: str) -> Any:
    """RFC 6901."""
    for part in pointer.split("/")[1:]:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def test_what_is_shown_is_what_each_step_is_taken_with(client: httpx.Client) -> None:
    optimizer = {"kind": "sgd", "lr": {"kind": "one_cycle", "peak": 0.3, "steps": 10}}
    session = session_with(client, optimizer, params={"w": [0.0, 0.0], "b": [0.0]})
    expected = preview(client, session, steps=12)["values"]["lr"]
    position, rates = 0.0, []
    for t in range(1, 13):
        left = preview(client, session, steps=2)
        assert (left["first"], left["values"]["lr"][0]) == (t, expected[t - 1])
        reply = taken(client, session)
        rates.append(reply["metrics"]["lr"])
        position -= rates[-1] * 2.0
        assert reply["params"]["b"] == [pytest.approx(position, abs=1e-15)]
    assert rates == expected
    history = client.get(f"/v1/sessions/{session}/history").json()["data"]
    assert [record["lr"] for record in history] == rates


def test_a_table(client: httpx.Client) -> None:
    session = session_with(client, **EVERYWHERE)
    taken(client, session)
    path = f"/v1/sessions/{session}/schedule"
    reply = client.get(path, params={"steps": 5}, headers={"Accept": "text/csv"})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/csv; charset=utf-8; header=present")
    assert "accept" in reply.headers["vary"].lower()
    header, *lines = csv.reader(io.StringIO(reply.text))
    values = preview(client, session, steps=5)["values"]
    assert header == ["step", *values]
    assert [line[0] for line in lines] == ["2", "3", "4", "5", "6"]
    for column, name in enumerate(values, 1):
        assert [float(line[column]) for line in lines] == values[name]
    refused(client.get(path, headers={"Accept": "text/html"}), 406, "not-acceptable")


@pytest.mark.parametrize("optimizer", ["adam", "newton", "schedule_free", "sam", "prodigy"])
def test_without_a_schedule_the_rate_alone_is_shown(client: httpx.Client, optimizer: str) -> None:
    session = session_with(client, optimizer)
    values = preview(client, session)["values"]
    assert values.keys() == {"lr"}
    assert len(values["lr"]) == 1000
    assert len(set(values["lr"])) == 1


@pytest.mark.parametrize("steps", ["0", "-1", "10001", "1.5", "x", ""])
def test_so_many_steps_are_not_shown(client: httpx.Client, steps: str) -> None:
    session = session_with(client, {"kind": "sgd", "lr": LINEAR})
    found = refused(client.get(f"/v1/sessions/{session}/schedule", params={"steps": steps}), 422, "invalid-request")
    assert pointers(found) == {"/query/steps"}


def test_as_many_as_there_may_be(client: httpx.Client) -> None:
    session = session_with(client, {"kind": "sgd", "lr": LINEAR})
    for steps in (1, 10_000):
        assert len(preview(client, session, steps=steps)["values"]["lr"]) == steps
    head = client.head(f"/v1/sessions/{session}/schedule")
    assert (head.status_code, head.content) == (200, b"")
    unknown = client.get(f"/v1/sessions/ses_{'0' * 25}/schedule")
    refused(unknown, 404, "session-not-found")
    found = refused(client.get(f"/v1/sessions/{session}/schedule", params={"n": 1}), 422, "invalid-request")
    assert pointers(found) == {"/query/n"}


def test_of_many_schedules_fewer_steps_are_shown_at_once(client: httpx.Client) -> None:
    groups = [{"match": str(i), "lr": LINEAR} for i in range(49)]
    session = session_with(client, "sgd", groups=groups)
    values = preview(client, session, steps=5000)["values"]
    assert len(values) == 50
    assert {len(column) for column in values.values()} == {5000}
    reply = client.get(f"/v1/sessions/{session}/schedule", params={"steps": 5001})
    document = refused(reply, 422, "invalid-request")
    assert pointers(document) == {"/query/steps"}
    assert "5000" in document["errors"][0]["detail"]


def test_a_change_is_shown_from_where_the_session_stands(client: httpx.Client) -> None:
    session = session_with(client, {"kind": "sgd", "lr": LINEAR})
    for _ in range(4):
        taken(client, session)
    path = f"/v1/sessions/{session}"
    assert client.patch(path, json={"optimizer": {"lr": HALVED}}).status_code == 200
    shown = preview(client, session, steps=4)
    assert shown["values"] == {"lr": [0.5, 0.5, 0.25, 0.25], "/optimizer/lr": [0.5, 0.5, 0.25, 0.25]}
    assert taken(client, session)["metrics"]["lr"] == 0.5
    change = {"optimizer": {"lr": 0.125}, "groups": [{"match": "b", "lr": HALVED}]}
    assert client.patch(path, json=change).status_code == 200
    assert preview(client, session, steps=2)["values"] == {"lr": [0.125, 0.125], "/groups/0/lr": [0.5, 0.25]}
    with unchanged(client, session):
        preview(client, session, steps=10_000)


def test_moves_are_counted_where_several_gradients_make_one(client: httpx.Client) -> None:
    accumulate = [{"kind": "accumulate", "steps": 2}]
    session = session_with(client, {"kind": "sgd", "lr": LINEAR}, transforms=accumulate)
    for t in range(1, 7):
        shown = preview(client, session, steps=1)
        assert (shown["step"], shown["first"]) == (t - 1, (t + 1) // 2)
        rate = taken(client, session)["metrics"]["lr"]
        assert rate == shown["values"]["lr"][0] == pytest.approx(linear((t + 1) // 2), rel=1e-14)


# -- the loss --------------------------------------------------------------------------------------------------------

PLATEAU: Json = {"kind": "plateau", "init": 0.4, "factor": 0.5, "patience": 1, "threshold": 0.0}
LOOKS_AT_THE_LOSS: dict[str, Json] = {
    "lr": {"optimizer": {"kind": "adam", "lr": PLATEAU}},
    "momentum": {"optimizer": {"kind": "momentum", "momentum": PLATEAU}},
    "base": {"optimizer": {"kind": "lookahead", "base": {"kind": "sgd", "lr": PLATEAU}}},
    "group": {"optimizer": "sgd", "groups": [{"match": "b", "lr": PLATEAU}]},
    "transform": {"optimizer": "sgd", "transforms": [{"kind": "clip_by_norm", "max_norm": PLATEAU}]},
    "polyak_sgd": {"optimizer": "polyak_sgd"},
    "lbfgs": {"optimizer": {"kind": "lbfgs", "line_search": "strong_wolfe"}},
    "bfgs": {"optimizer": "bfgs"},
}


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("name", LOOKS_AT_THE_LOSS)
def test_the_loss_is_required_where_something_looks_at_it(client: httpx.Client, name: str, form: str) -> None:
    session = session_with(client, **LOOKS_AT_THE_LOSS[name])
    with unchanged(client, session):
        if form == "json":
            reply = post(client, session)
        else:
            body = saved({"w": np.array([0.5, -1.0]), "b": np.array([2.0])})
            reply = client.post(f"/v1/sessions/{session}/steps", content=body, headers=SAFETENSORS)
        document = refused(reply, 422, "loss-required")
        assert "`loss`" in document["detail"]
    assert taken(client, session, loss=3.0)["step"] == 1


def test_the_loss_of_a_session_that_need_not_know_it_is_only_kept(client: httpx.Client) -> None:
    first, second = (session_with(client, "adam") for _ in range(2))
    assert taken(client, first, loss=1.0)["params"] == taken(client, second)["params"]
    assert client.get(f"/v1/sessions/{first}/history").json()["data"][0]["loss"] == 1.0


def test_a_plateau_lowers_the_rate_of_the_steps_behind_it(client: httpx.Client) -> None:
    session = session_with(client, {"kind": "sgd", "lr": PLATEAU})
    rates = []
    # The best is 5, then 4; two bad ones in a row are one more than its patience.
    for loss in (5.0, 5.0, 4.0, 4.0, 4.5, 4.0, 6.0, 1.0, 2.0):
        before = preview(client, session, steps=3)["values"]
        assert before["lr"] == before["/optimizer/lr"] == [before["lr"][0]] * 3
        rates.append(taken(client, session, loss=loss)["metrics"]["lr"])
        assert rates[-1] == before["lr"][0]
    assert rates == [0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]


def test_a_plateau_that_is_put_into_a_running_session_begins_there(client: httpx.Client) -> None:
    session = session_with(client, {"kind": "sgd", "lr": 1.0})
    taken(client, session, loss=1.0)
    path = f"/v1/sessions/{session}"
    assert client.patch(path, json={"optimizer": {"lr": PLATEAU}}).status_code == 200
    refused(post(client, session), 422, "loss-required")
    assert [taken(client, session, loss=9.0)["metrics"]["lr"] for _ in range(4)] == [0.4, 0.4, 0.4, 0.2]
    assert client.patch(path, json={"optimizer": {"lr": 0.5}}).status_code == 200
    assert taken(client, session)["metrics"]["lr"] == 0.5


def test_a_plateau_goes_on_where_it_stands_unless_it_begins_elsewhere(client: httpx.Client) -> None:
    session = session_with(client, {"kind": "sgd", "lr": PLATEAU})
    path = f"/v1/sessions/{session}"
    for _ in range(3):
        taken(client, session, loss=1.0)
    for change, rate in (({"patience": 5}, 0.2), ({"factor": 0.9}, 0.2), ({"init": 0.8}, 0.8)):
        assert client.patch(path, json={"optimizer": {"lr": PLATEAU | change}}).status_code == 200
        assert preview(client, session, steps=1)["values"]["lr"] == [rate]
