"""Every call by every scope, on one's own session, a sibling's, somebody else's and none: made from the table of calls,
so a call that is new is covered, and one that is not in the table is refused.
"""

import json
from collections.abc import Iterator
from typing import cast

import httpx
import pytest
from fastapi.routing import APIRoute

from service import catalogue
from service.access.rights import CALLS, GRANTED, Right, Scope
from service.control import create_control
from service.data import DataPlane
from service.engine import Engine
from service.openapi import openapi
from service.operations import OPERATIONS, PAGES, methods_of
from tests.http.callers import ALL, IDS, MISSING, Call, Houses, add_key, bearing, houses, stored
from tests.http.files import SAFETENSORS
from tests.http.refusals import refused, unchanged
from tests.wire import create


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Houses]:
    with houses(tmp_path_factory.mktemp("rights") / "data") as running:
        yield running


# -- the table ---------------------------------------------------------------------------------------------------------


def routes_of_both_planes() -> set[tuple[str, str]]:
    """What is answered, with whatever method and path; the engine is asked for nothing."""
    control = create_control(cast("Engine", None), max_body=1, version="1")
    found = {
        (method, route.path)
        for route in control.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    plane = DataPlane(cast("Engine", None), 1)
    for resource, calls in plane._calls.items():
        path = f"/v1/sessions/{{session}}/{resource}" if resource else "/v1/sessions"
        found |= {(method, path) for method in calls}
    return found


def test_the_table_has_every_route_of_both_planes_and_no_other() -> None:
    table = {(call.method, call.template) for call in ALL if call.method != "OPTIONS"}
    routes = routes_of_both_planes()
    assert routes - table == set(), "calls that nobody has decided whose they are"
    assert table - routes <= {(method, "/metrics") for method in ("GET", "HEAD")}


def test_the_table_has_every_call_of_the_document_and_every_page() -> None:
    document = {(method.upper(), path) for path, calls in openapi("1")["paths"].items() for method in calls}
    assert document == {(operation.method, operation.path) for operation in OPERATIONS}
    table = {(call.method, call.template) for call in ALL}
    assert document | {("GET", page) for page in PAGES} <= table
    assert {f"/v1/{family}" for family in catalogue.FAMILIES} <= CALLS.keys()


@pytest.mark.parametrize("path", [path for path in CALLS if path != "/metrics" or methods_of(path)])
def test_allow_says_what_the_table_says(path: str) -> None:
    assert methods_of(path) == sorted(CALLS[path])


def test_the_document_says_which_calls_need_no_key() -> None:
    for path, calls in openapi("1")["paths"].items():
        for method, operation in calls.items():
            opened = CALLS[path][method.upper()] is Right.OPEN
            assert (operation.get("security") == []) == opened
            assert ("401" in operation["responses"]) == (not opened)
            assert ("403" in operation["responses"]) == (CALLS[path][method.upper()] > Right.KEY)


# -- who may do what ---------------------------------------------------------------------------------------------------


def let_in(reply: httpx.Response) -> bool:
    """Whether the gate was passed, whatever became of it then."""
    refusals = ("unauthenticated", "forbidden", "session-not-found")
    if reply.status_code not in (401, 403, 404):
        return True
    return (
        reply.status_code == 404
        and reply.request.method != "HEAD"
        and json.loads(reply.content)["type"] not in [f"/problems/{slug}" for slug in refusals]
    )


@pytest.mark.parametrize("scope", GRANTED)
@pytest.mark.parametrize("call", ALL, ids=IDS)
def test_on_a_session_that_the_key_is_for(world: Houses, call: Call, scope: Scope) -> None:
    client = world.clients[scope]
    if call.right <= GRANTED[scope]:
        if call.template != "/metrics":
            assert let_in(call.send(client, world.own))
        return
    before = stored(world.server.store_url())
    reply = call.send(client, world.own)
    assert reply.status_code == 403
    if call.method != "HEAD":
        refused(reply, 403, "forbidden")
    assert not [name for name in reply.headers if name.startswith(("ravine-", "etag", "location"))]
    assert stored(world.server.store_url()) == before


OF_SESSION = [call for call in ALL if "{session}" in call.template and call.method != "OPTIONS"]
OF_SESSION_IDS = [f"{call.method} {call.template}" for call in OF_SESSION]


def alike(reply: httpx.Response, session: str) -> tuple[int, set[tuple[str, str]], str]:
    """All that tells one refusal from another, without the id that was asked for."""
    own = ("x-request-id", "date", "content-length")
    headers = {(name, value) for name, value in reply.headers.items() if name not in own}
    return reply.status_code, headers, reply.text.replace(session, "…")


@pytest.mark.parametrize("scope", GRANTED)
@pytest.mark.parametrize("call", OF_SESSION, ids=OF_SESSION_IDS)
def test_what_is_not_ones_own_is_not_there(world: Houses, call: Call, scope: Scope) -> None:
    """Whatever is wrong with the call beside: the answer is that for an id that there is none of."""
    client, url = world.clients[scope], world.server.store_url()
    hidden = [world.foreign, *([world.sibling] if scope == "worker" else []), "ses_", "x", "ses_" + "Z" * 25]
    expected = alike(call.send(client, MISSING), MISSING)
    assert expected[0] == 404
    before = stored(url)
    for session in hidden:
        reply = call.send(client, session)
        if call.method != "HEAD":
            refused(reply, 404, "session-not-found")
        assert alike(reply, session) == expected
        broken = client.request(
            call.method, f"{call.path(session)}?nonsense=1", content=b"{", headers={"Accept": "x/y"}
        )
        assert broken.status_code == 404
    assert stored(url) == before


def test_the_session_of_another_goes_on_undisturbed(world: Houses) -> None:
    with unchanged(world.other, world.foreign):
        for scope in GRANTED:
            for call in OF_SESSION:
                call.send(world.clients[scope], world.foreign)


def test_a_session_that_is_gone_is_not_there_for_its_worker(world: Houses) -> None:
    admin = world.clients["admin"]
    made = create(admin, optimizer="sgd", params={"w": [1.0]})["id"]
    assert admin.get(f"/v1/sessions/{made}").status_code == 200
    assert admin.delete(f"/v1/sessions/{made}").status_code == 204
    refused(admin.get(f"/v1/sessions/{made}"), 404, "session-not-found")


# -- what stays within a tenant ----------------------------------------------------------------------------------------


def ids(client: httpx.Client, **query: str) -> list[str]:
    reply = client.get("/v1/sessions", params={"limit": 100, **query})
    assert reply.status_code == 200
    return [session["id"] for session in reply.json()["data"]]


def test_lists_and_labels_are_the_tenants(world: Houses) -> None:
    admin, other = world.clients["admin"], world.other
    ours, theirs = set(ids(admin)), set(ids(other))
    assert {world.own, world.sibling} <= ours
    assert world.foreign in theirs
    assert not ours & theirs
    assert {world.own, world.sibling} <= set(ids(admin, label="team:vision")) <= ours
    assert ids(other, label="team:vision") == [world.foreign]


def test_a_page_may_begin_after_anything_and_shows_ones_own(world: Houses) -> None:
    assert set(ids(world.clients["admin"], after=world.foreign)) <= set(ids(world.clients["admin"]))
    assert world.foreign not in ids(world.clients["admin"], after="ses_z")


def test_what_is_made_of_ones_own_is_ones_own(world: Houses) -> None:
    session, other = world.clients["session"], world.other
    fork = session.post(f"/v1/sessions/{world.sibling}/fork").json()["id"]
    file = session.get(f"/v1/sessions/{world.sibling}/state").content
    restored = session.post("/v1/sessions", content=file, headers=SAFETENSORS)
    assert restored.status_code == 201
    for made in (fork, restored.json()["id"]):
        assert made in ids(session)
        assert made not in ids(other)
        refused(other.get(f"/v1/sessions/{made}"), 404, "session-not-found")
    theirs = other.post("/v1/sessions", content=file, headers=SAFETENSORS).json()["id"]
    refused(session.get(f"/v1/sessions/{theirs}"), 404, "session-not-found")
    for made in (fork, restored.json()["id"]):
        assert session.delete(f"/v1/sessions/{made}").status_code == 204


def test_a_key_of_an_idempotent_step_is_the_sessions(world: Houses) -> None:
    """What another tenant sends under the same key is a step of its own."""
    sent = {"json": {"gradients": {"w": [1.0]}}, "headers": {"Idempotency-Key": "the-same"}}
    mine = world.clients["session"].post(f"/v1/sessions/{world.sibling}/steps", **sent)  # type: ignore[arg-type]
    theirs = world.other.post(f"/v1/sessions/{world.foreign}/steps", **sent)  # type: ignore[arg-type]
    assert (mine.status_code, theirs.status_code) == (200, 200)
    assert "ravine-replayed" not in theirs.headers


def test_what_counts_for_all_tenants_is_for_admins_of_the_default_one(world: Houses) -> None:
    url = world.server.store_url()
    for tenant, scope, status in (("default", "admin", 200), ("default", "session", 403), ("acme", "admin", 403)):
        text, _ = add_key(url, tenant, cast("Scope", scope))
        with world.server.client(headers=bearing(text)) as client:
            assert client.get("/metrics").status_code == status


def test_a_worker_is_not_shown_what_the_noise_is_drawn_from(world: Houses) -> None:
    path = f"/v1/sessions/{world.own}"
    whole, shown = world.clients["session"].get(path).json(), world.clients["worker"].get(path).json()
    assert whole["aggregation"].pop("seed") == 7
    assert shown == whole
    assert "seed" not in shown["aggregation"]


def test_a_worker_works(world: Houses) -> None:
    worker, path = world.clients["worker"], f"/v1/sessions/{world.own}"
    sent = worker.post(f"{path}/steps", json={"gradients": {"w": [1.0]}, "worker": "a"})
    assert sent.status_code in (200, 202)
    assert worker.get(f"{path}/params").status_code == 200
    assert worker.get(f"{path}/rounds/current").json()["received"] == 1
    assert [entry["kind"] for entry in worker.get("/v1/schedules").json()["data"]]
