"""Server-sent events: every step once, in order, resumed where a client was."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from tests.http.refusals import refused
from tests.wire import create


class Event(NamedTuple):
    id: str
    event: str
    data: dict[str, Any]


def events(reply: httpx.Response) -> Iterator[Event]:
    """The events of a stream (HTML, 9.2.6), without its comments."""
    fields: dict[str, str] = {}
    for line in reply.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and fields:
            yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


@pytest.fixture
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [0.0]})["id"]
    return made


def move(client: httpx.Client, session: str) -> str:
    """One step; its ETag."""
    reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1.0]}})
    return str(reply.headers["etag"])


def resume(step: str) -> dict[str, str]:
    return {"Last-Event-ID": step}


def test_steps_as_they_are_taken(client: httpx.Client, session: str) -> None:
    move(client, session)
    # With the id of the last step seen, what was taken before the stream began is in it.
    with client.stream("GET", f"/v1/sessions/{session}/events", headers=resume("1")) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        stream = events(reply)
        for t in range(2, 6):
            etag = move(client, session)
            assert next(stream) == Event(str(t), "step", {"step": t, "etag": etag})


def test_a_stream_resumes_after_the_last_event_seen(client: httpx.Client, session: str) -> None:
    etags = [move(client, session) for _ in range(5)]
    for seen in (0, 2, 4):
        with client.stream("GET", f"/v1/sessions/{session}/events", headers=resume(str(seen))) as reply:
            stream = events(reply)
            found = [next(stream) for _ in range(5 - seen)]
        assert found == [Event(str(t), "step", {"step": t, "etag": etags[t - 1]}) for t in range(seen + 1, 6)]


def test_a_stream_ends_with_its_session(client: httpx.Client, session: str) -> None:
    move(client, session)
    with client.stream("GET", f"/v1/sessions/{session}/events", headers=resume("0")) as reply:
        stream = events(reply)
        assert next(stream).event == "step"
        assert client.delete(f"/v1/sessions/{session}").status_code == 204
        assert [(event.event, event.id) for event in stream] == [("deleted", "1")]
    refused(client.get(f"/v1/sessions/{session}/events"), 404, "session-not-found")


def test_without_an_id_the_stream_begins_now(client: httpx.Client, session: str) -> None:
    move(client, session)
    with client.stream("GET", f"/v1/sessions/{session}/events") as reply:
        taken = [move(client, session) for _ in range(3)]
        stream = events(reply)
        assert [next(stream).data["etag"] for _ in range(3)] == taken


def test_an_id_from_a_lost_future_misses_nothing(client: httpx.Client, session: str) -> None:
    move(client, session)
    with client.stream("GET", f"/v1/sessions/{session}/events", headers=resume("100")) as reply:
        taken = [move(client, session) for _ in range(3)]
        stream = events(reply)
        assert [next(stream).data["etag"] for _ in range(3)] == taken


@pytest.mark.parametrize("given", ["x", "-1", "1.0", "1e3", '"1"', "1" * 17])
def test_other_ids_are_refused(client: httpx.Client, session: str, given: str) -> None:
    document = refused(client.get(f"/v1/sessions/{session}/events", headers=resume(given)), 422, "invalid-request")
    assert document["errors"][0]["pointer"] == "/headers/Last-Event-ID"
