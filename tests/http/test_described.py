"""What the service answers where several workers share a session is what its OpenAPI document says."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from service import privacy
from service.operations import OPERATIONS
from service.step_operations import STEPS
from tests.described import Invalid, check_reply, validate
from tests.wire import create

Json = dict[str, Any]
ONE = "/v1/sessions/{session}"
ALL = {"w": [1.0, -2.0], "b": 0.5}
SYNC = {"mode": "sync", "workers": 3, "quorum": 2, "timeout": 600}


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Json:
    found: Json = client.get("/openapi.json").json()
    return found


class Shared:
    """A session; each call's reply is held against the document."""

    def __init__(self, client: httpx.Client, document: Json, aggregation: Mapping[str, Any], **members: Any) -> None:
        members = {"optimizer": {"kind": "sgd", "lr": 0.5}, "params": ALL} | members
        self.client, self.document = client, document
        self.path = f"/v1/sessions/{create(client, aggregation=aggregation, **members)['id']}"

    def call(self, method: str, path: str = "", query: str = "", **options: Any) -> httpx.Response:
        reply = self.client.request(method, self.path + path + query, **options)
        check_reply(self.document, f"{method} {ONE}{path}", reply)
        return reply

    def send(self, headers: Mapping[str, str] | None = None, **members: Any) -> httpx.Response:
        return self.call("POST", "/steps", json={"gradients": ALL} | members, headers=headers)

    def refused(self, status: int, slug: str, **members: Any) -> Json:
        reply = self.send(**members)
        assert (reply.status_code, reply.json()["type"]) == (status, f"/problems/{slug}"), reply.text
        found: Json = reply.json()
        return found


@pytest.fixture
def shared(client: httpx.Client, document: Json) -> Callable[..., Shared]:
    return lambda aggregation, **members: Shared(client, document, aggregation, **members)


def test_a_round_from_its_first_contribution_to_its_step(shared: Callable[..., Shared]) -> None:
    session = shared(SYNC)
    empty = session.call("GET", "/rounds/current").json()
    assert (empty["round"], empty["received"], empty["opened_at"], empty["deadline"]) == (1, 0, None, None)
    first = session.send({"Prefer": "return=minimal, wait=0", "Idempotency-Key": "k"}, worker="ann", weight=3)
    assert first.status_code == 202
    assert first.headers["location"] == f"{session.path}/params?after=0&wait=30"
    assert first.headers["preference-applied"] == "return=minimal"
    again = session.send({"Idempotency-Key": "k"}, worker="ann", weight=3)
    assert (again.status_code, again.json(), again.headers["ravine-replayed"]) == (202, first.json(), "true")
    assert session.refused(409, "already-contributed", worker="ann")["round"] == 1
    assert session.send(base_step=0).json() == {"round": 1, "received": 2, "needed": 3}
    opened = session.call("GET", "/rounds/current").json()
    assert (opened["received"], opened["quorum"], opened["contributed"], opened["anonymous"]) == (2, 2, ["ann"], 1)
    assert opened["opened_at"] < opened["deadline"]
    last = session.send(worker="bob")
    assert (last.status_code, last.json()["step"]) == (200, 1)
    late = session.send({"Idempotency-Key": "k"}, worker="ann", weight=3)
    assert (late.status_code, late.headers["ravine-replayed"]) == (200, "true")
    assert late.json()["params"] == last.json()["params"]
    assert session.call("GET", "/history").json()["data"][0]["worker"] is None
    assert session.call("GET", "/rounds/current").json()["awaited"] == ["ann", "bob"]


def test_workers_come_in_pages(shared: Callable[..., Shared]) -> None:
    session = shared({"mode": "async"})
    assert session.call("GET", "/workers").json() == {"data": [], "has_more": False}
    for name in ("cid", "ann", "bob"):
        session.send(worker=name, base_step=0)
    page = session.call("GET", "/workers", "?limit=2").json()
    assert [worker["worker"] for worker in page["data"]] == ["ann", "bob"]
    assert [(worker["last_step"], worker["staleness"]) for worker in page["data"]] == [(2, 1), (3, 2)]
    assert page["has_more"]
    rest = session.call("GET", "/workers", "?limit=2&after=bob").json()
    assert [worker["worker"] for worker in rest["data"]] == ["cid"]
    assert not rest["has_more"]
    assert session.call("GET", "/workers", "?limit=0").json()["errors"][0]["pointer"] == "/query/limit"


def test_each_refusal_is_as_it_is_shown(shared: Callable[..., Shared]) -> None:
    aged = shared({"mode": "async", "max_staleness": 0})
    aged.refused(422, "base-step-required")
    assert aged.refused(409, "base-step-ahead", base_step=1)["step"] == 0
    aged.send(base_step=0)
    assert aged.refused(409, "stale-gradient", base_step=0)["staleness"] == 1
    lockstep = shared({"mode": "ssp", "bound": 0, "workers": 2})
    lockstep.refused(422, "worker-required")
    lockstep.send(worker="ann")
    assert lockstep.refused(409, "too-far-ahead", worker="ann")["clock"] == 1
    assert lockstep.call("GET", "/rounds/current").json()["type"] == "/problems/no-rounds"
    late = shared({"mode": "async", "delay_compensation": {"lambda": 0.1}})
    late.call("GET", "/params", "?worker=ann")
    late.send(worker="bob")
    assert late.refused(409, "not-pulled", worker="ann", base_step=1)["step"] == 0
    robust = shared({"mode": "sync", "workers": 3, "reduce": "median"})
    robust.refused(422, "not-reducible", gradients={"b": 1.0}, partial=True)


def test_a_session_tells_how_it_aggregates(shared: Callable[..., Shared]) -> None:
    for aggregation in (
        SYNC,
        {"mode": "buffered", "size": 7, "reduce": {"kind": "trimmed_mean", "fraction": 0.2}},
        {"mode": "async", "staleness": "polynomial", "max_staleness": 3, "clip_norm": 1},
        {"mode": "ssp", "bound": 2, "delay_compensation": {"lambda": 0.04, "adaptive": True}},
    ):
        told = shared(aggregation).call("GET").json()
        assert told["aggregation"]["mode"] == aggregation["mode"]
        assert "privacy" not in told


@pytest.mark.skipif(not privacy.available(), reason="needs the extra `privacy`")
def test_privacy_is_told_with_the_session_and_its_history(shared: Callable[..., Shared]) -> None:
    session = shared({"mode": "sync", "workers": 2, "clip_norm": 1, "noise_multiplier": 1.1})
    assert session.call("GET").json()["privacy"]["epsilon"] == 0
    session.refused(422, "not-reducible", weight=2)
    session.send(worker="ann")
    session.send(worker="bob")
    told = session.call("GET").json()["privacy"]
    record = session.call("GET", "/history").json()["data"][0]
    assert 0 < record["epsilon"] == told["epsilon"]
    assert told["steps"] == 1


def test_an_event_tells_of_each_contribution(client: httpx.Client, shared: Callable[..., Shared]) -> None:
    session = shared({"mode": "buffered", "size": 2})
    # Which of an event's members there are is held against the example, the stream having no schema.
    answer = session.document["paths"][f"{ONE}/events"]["get"]["responses"]["200"]
    (example,) = answer["content"]["text/event-stream"]["examples"].values()
    shown = {event["event"]: event["data"].keys() for event in events_of(example["value"])}
    with client.stream("GET", f"{session.path}/events") as stream:
        lines = stream.iter_lines()
        session.send()
        session.send()
        # A step is never missed. Once one was told, neither is a contribution, for the stream listens by then.
        while (step := next_event(lines))["event"] == "round":
            pass
        session.send()
        came = next_event(lines)
    assert (step["event"], step["data"]["step"]) == ("step", 1)
    assert (came["event"], came["id"]) == ("round", "1")
    assert came["data"] == {"step": 1, "round": 2, "received": 1, "needed": 2}
    assert {event["event"]: event["data"].keys() for event in (came, step)} == shown


def events_of(text: str) -> list[Json]:
    lines = iter(text.splitlines())
    return [next_event(lines) for _ in range(text.count("\n\n"))]


def next_event(lines: Any) -> Json:
    """The next event that is none of the comments."""
    event: Json = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if not line and event:
            break
        if name:
            event[name] = json.loads(value) if name == "data" else value
    return event


# -- the examples, and what holds them to it ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_examples_are_what_their_schemas_say(document: Json, operation: Any) -> None:
    described = document["paths"][operation.path][operation.method.lower()]
    bodies = [described.get("requestBody", {}), *described["responses"].values()]
    for media, content in (pair for body in bodies for pair in body.get("content", {}).items()):
        if media.endswith("json"):
            for example in content["examples"].values():
                validate(example["value"], content["schema"], document)


def test_the_table_of_steps_has_the_calls_of_workers_and_rounds() -> None:
    assert {"listWorkers", "getRound"} <= {operation.id for operation in STEPS}


WRONG: list[tuple[Any, Json]] = [
    ({"round": 0, "received": 1, "needed": 2}, {"$ref": "#/components/schemas/Pending"}),
    ({"round": 1, "received": 1}, {"$ref": "#/components/schemas/Pending"}),
    ({"round": 1, "received": 1, "needed": 2, "more": 1}, {"$ref": "#/components/schemas/Pending"}),
    ({"round": 1, "received": 1.5, "needed": 2}, {"$ref": "#/components/schemas/Pending"}),
    ({"data": [{"worker": "ann"}], "has_more": False}, {"$ref": "#/components/schemas/WorkerList"}),
    (True, {"type": "integer"}),
    ("2030-01-02", {"type": "string", "format": "date-time"}),
    (1, {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    (None, {"anyOf": [{"type": "string"}, {"type": "number"}]}),
    ({"a": 1}, {"not": {"required": ["a"]}}),
    (1, {"const": True}),
    (1, {"multipleOf": 1}),
]


@pytest.mark.parametrize(("value", "schema"), WRONG)
def test_what_is_wrong_is_not_passed_over(document: Json, value: Any, schema: Json) -> None:
    with pytest.raises(Invalid):
        validate(value, schema, document)
