"""What is refused: told as RFC 9457 has it, and without a trace in the session."""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import httpx

from service.problem_table import PROBLEMS


def refused(reply: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem document of a reply that must be the problem `slug`."""
    assert reply.status_code == status, (reply.status_code, reply.text[:500])
    assert reply.headers["content-type"] == "application/problem+json", reply.headers
    assert reply.headers["x-request-id"]
    document: dict[str, Any] = reply.json()
    assert document["type"] == f"/problems/{slug}", document
    assert document["title"] == PROBLEMS[slug].title
    assert document["status"] == status
    assert document["detail"]
    assert unquote(document["instance"]) == unquote(reply.request.url.raw_path.decode().partition("?")[0])
    return document


def pointers(document: dict[str, Any]) -> set[str]:
    """Where the faults of an `invalid-request` are."""
    assert all(fault["detail"] for fault in document["errors"])
    return {fault["pointer"] for fault in document["errors"]}


def standing(client: httpx.Client, session: str) -> dict[str, Any]:
    """All that can be seen of a session: its object, its stamp, its parameters, every bit of its state, its history."""
    path = f"/v1/sessions/{session}"
    shown, state = client.get(path), client.get(f"{path}/state")
    params, history = client.get(f"{path}/params"), client.get(f"{path}/history", params={"limit": 10_000})
    assert (shown.status_code, state.status_code, history.status_code) == (200, 200, 200)
    assert params.status_code in (200, 409)  # 409: the client holds them
    return {
        "object": shown.json(),
        "stamps": [shown.headers["etag"], state.headers["etag"], shown.headers["ravine-step"]],
        "state": state.content,
        "params": params.json() if params.status_code == 200 else None,
        "history": history.json(),
    }


@contextlib.contextmanager
def unchanged(client: httpx.Client, session: str) -> Iterator[None]:
    """What happens inside must leave the session as it was."""
    before = standing(client, session)
    yield
    assert standing(client, session) == before
