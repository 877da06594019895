"""What each tenant may have, over all replicas: exactly that much, and no trace of the rest."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.ids import ALPHABET
from tests.http.callers import service
from tests.http.refusals import refused, unchanged
from tests.http.sockets import connected, reply_on
from tests.http.tenants import ADAM, client_of, exceeded, key_of, store_of, tenants
from tests.running import Server
from tests.wire import SAFETENSORS, create

SESSIONS = 4
STATE = 4096
IN_FLIGHT = 2


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("bounded"), max_sessions=SESSIONS, max_tenant_state=STATE) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("narrow"), max_tenant_requests=IN_FLIGHT) as server:
        yield server


# -- sessions and bytes ----------------------------------------------------------------------------------------


def usage(server: Server, tenant: str) -> dict[str, int]:
    """What the store has counted: bytes by session, and their sum as `total`."""
    with store_of(server) as store:
        found = store.hgetall(f"ravine:tenant:{tenant}:usage")
    return {name: int(value.split(" ")[0]) for name, value in found.items()}


def taken(client: httpx.Client) -> dict[str, int]:
    """The same, as the sessions themselves say: here they all hold their parameters."""
    listed = client.get("/v1/sessions", params={"limit": 100}).json()["data"]
    sizes = {each["id"]: each["state_bytes"] + each["round_bytes"] for each in listed}
    return sizes | {"total": sum(sizes.values())} if sizes else {}


def counted(server: Server, tenant: str, client: httpx.Client) -> None:
    assert usage(server, tenant) == taken(client)


def lists(server: Server, tenant: str) -> tuple[set[str], list[str]]:
    """The names of all there is in the store, and the list of the tenant's sessions as it lies there."""
    with store_of(server) as store:
        return set(store.keys("*")), store.zrange(f"ravine:tenant:{tenant}:sessions", 0, -1)


def test_a_tenant_has_so_many_sessions_and_no_more(bounded: Server) -> None:
    tenant = next(tenants)
    with client_of(bounded, tenant) as client, client_of(bounded) as other:
        made = [create(client, **ADAM)["id"] for _ in range(SESSIONS - 2)]
        made.append(client.post(f"/v1/sessions/{made[0]}/fork").json()["id"])
        checkpoint = client.get(f"/v1/sessions/{made[0]}/state").content
        made.append(client.post("/v1/sessions", content=checkpoint, headers=SAFETENSORS).json()["id"])
        before = lists(bounded, tenant)
        for _ in range(3):
            labelled = ADAM | {"labels": {"team": "vision"}}
            headers = exceeded(client.post("/v1/sessions", json=labelled), "sessions", SESSIONS)
            assert headers["ratelimit-policy"] == f'"sessions";q={SESSIONS};qu="sessions"'
            exceeded(client.post(f"/v1/sessions/{made[0]}/fork"), "sessions", SESSIONS)
            exceeded(client.post("/v1/sessions", content=checkpoint, headers=SAFETENSORS), "sessions", SESSIONS)
        assert lists(bounded, tenant) == before
        assert sorted(each["id"] for each in client.get("/v1/sessions").json()["data"]) == sorted(made)
        counted(bounded, tenant, client)
        create(other, **ADAM)
        client.delete(f"/v1/sessions/{made.pop()}")
        create(client, **ADAM)
        exceeded(client.post("/v1/sessions", json=ADAM), "sessions", SESSIONS)
        counted(bounded, tenant, client)


def test_those_that_are_made_at_once_do_not_pass_together(bounded: Server) -> None:
    tenant = next(tenants)
    with client_of(bounded, tenant) as client:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/sessions", json=ADAM).status_code, range(24)))
        assert sorted(answers) == [201] * SESSIONS + [429] * (24 - SESSIONS)
        assert len(taken(client)) == SESSIONS + 1
        counted(bounded, tenant, client)


def sized(parameters: int) -> dict[str, Any]:
    """A session of plain SGD that takes 8 bytes for each parameter."""
    return {"optimizer": "sgd", "params": {"w": [0.0] * parameters}, "dtype": "float64"}


def test_the_states_take_so_many_bytes_and_no_more(bounded: Server) -> None:
    tenant = next(tenants)
    with client_of(bounded, tenant) as client:
        first = create(client, **sized(STATE // 16))["id"]
        create(client, **sized(STATE // 16 - 1))
        headers = exceeded(client.post("/v1/sessions", json=sized(2)), "state", STATE)
        assert headers["ratelimit"] == '"state";r=8'
        create(client, **sized(1))
        assert usage(bounded, tenant)["total"] == STATE
        exceeded(client.post(f"/v1/sessions/{first}/fork"), "state", STATE)
        counted(bounded, tenant, client)
        assert client.delete(f"/v1/sessions/{first}").status_code == 204
        counted(bounded, tenant, client)
        create(client, **sized(STATE // 16))


def test_a_change_that_needs_more_counts(bounded: Server) -> None:
    """The transform `ema` keeps a mean of each gradient."""
    tenant = next(tenants)
    with client_of(bounded, tenant) as client:
        whole = create(client, **sized(STATE // 16 - 8))["id"]
        other = create(client, **sized(STATE // 16))["id"]
        grown = {"transforms": [{"kind": "ema", "decay": 0.5}]}
        with unchanged(client, whole):
            exceeded(client.patch(f"/v1/sessions/{whole}", json=grown), "state", STATE)
        counted(bounded, tenant, client)
        # What takes no more is not refused, and nor is what is wrong for other reasons told otherwise.
        assert client.patch(f"/v1/sessions/{whole}", json={"name": "n"}).status_code == 200
        stale = {"If-Match": '"17"'}
        refused(client.patch(f"/v1/sessions/{whole}", json=grown, headers=stale), 412, "step-conflict")
        wrong = {"transforms": [{"kind": "ema", "decay": 7}]}
        refused(client.patch(f"/v1/sessions/{whole}", json=wrong), 422, "invalid-request")
        counted(bounded, tenant, client)
        client.delete(f"/v1/sessions/{other}")
        assert client.patch(f"/v1/sessions/{whole}", json=grown).status_code == 200
        assert usage(bounded, tenant)["total"] > STATE - 128
        counted(bounded, tenant, client)
        exceeded(client.post("/v1/sessions", json=sized(16)), "state", STATE)
        assert client.patch(f"/v1/sessions/{whole}", json={"transforms": []}).status_code == 200
        counted(bounded, tenant, client)
        create(client, **sized(STATE // 16))


def test_what_an_older_release_has_not_counted_is_counted_where_it_is_met(bounded: Server) -> None:
    tenant = next(tenants)
    with client_of(bounded, tenant) as client, store_of(bounded) as store:
        for _ in range(SESSIONS):
            create(client, **ADAM)
        before = usage(bounded, tenant)
        store.delete(f"ravine:tenant:{tenant}:usage")
        assert len(client.get("/v1/sessions").json()["data"]) == SESSIONS
        assert usage(bounded, tenant) == before
        exceeded(client.post("/v1/sessions", json=ADAM), "sessions", SESSIONS)


def test_whoever_lists_drops_what_is_counted_and_not_there(bounded: Server) -> None:
    tenant = next(tenants)
    gone = "ses_" + ALPHABET[0] * 9 + "gonegonegonegone"
    with client_of(bounded, tenant) as client, store_of(bounded) as store:
        create(client, **ADAM)
        before = usage(bounded, tenant)
        store.zadd(f"ravine:tenant:{tenant}:sessions", {gone: 0})
        store.hset(f"ravine:tenant:{tenant}:usage", gone, "1000 0")
        store.hincrby(f"ravine:tenant:{tenant}:usage", "total", 1000)
        assert len(client.get("/v1/sessions").json()["data"]) == 1
        assert usage(bounded, tenant) == before
        assert store.zscore(f"ravine:tenant:{tenant}:sessions", gone) is None


OLD = "ses_" + ALPHABET[0] * 9 + "{:0>16}"  # made in 1970


def leave_behind(server: Server, tenant: str, *sessions: str) -> None:
    """As a crash between the end of a session and its leaving: entered, and not there."""
    with store_of(server) as store:
        for session in sessions:
            store.zadd(f"ravine:tenant:{tenant}:sessions", {session: 0})
            store.hset(f"ravine:tenant:{tenant}:usage", session, "1000 0")
            store.hincrby(f"ravine:tenant:{tenant}:usage", "total", 1000)


@pytest.mark.parametrize("quota", ["sessions", "state"])
def test_what_is_counted_and_not_there_takes_no_room(bounded: Server, quota: str) -> None:
    tenant = next(tenants)
    with client_of(bounded, tenant) as client:
        kept = create(client, **ADAM)["id"]
        leave_behind(bounded, tenant, *[OLD.format(i) for i in range(3)])
        made = create(client, **(ADAM if quota == "sessions" else sized(STATE // 16)))["id"]
        assert usage(bounded, tenant).keys() == {kept, made, "total"}
        assert set(lists(bounded, tenant)[1]) == {kept, made}
        counted(bounded, tenant, client)


def test_deleting_once_more_ends_what_a_deletion_left(bounded: Server) -> None:
    tenant, gone = next(tenants), OLD.format("gone")
    with client_of(bounded, tenant) as client, client_of(bounded) as other:
        kept = create(client, **ADAM)["id"]
        before = usage(bounded, tenant), lists(bounded, tenant)[1]
        leave_behind(bounded, tenant, gone)
        with_entry = usage(bounded, tenant)
        refused(other.delete(f"/v1/sessions/{gone}"), 404, "session-not-found")
        refused(other.delete(f"/v1/sessions/{kept}"), 404, "session-not-found")
        with client_of(bounded, tenant, scope="worker") as worker:
            assert worker.delete(f"/v1/sessions/{gone}").status_code == 404
        assert usage(bounded, tenant) == with_entry
        refused(client.delete(f"/v1/sessions/{gone}"), 404, "session-not-found")
        assert (usage(bounded, tenant), lists(bounded, tenant)[1]) == before


def test_what_is_refused_makes_no_arrays(bounded: Server) -> None:
    def peak() -> int:
        """The most memory that the service had, in KiB."""
        return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{bounded.pid}/status").read_text())[0])

    with client_of(bounded) as client:
        large = {"optimizer": "adam", "shapes": {"w": [80_000_000]}}  # 960 MB
        exceeded(client.post("/v1/sessions", json={**large, "shapes": {"w": [4096]}}), "state", STATE)
        before = peak()
        exceeded(client.post("/v1/sessions", json=large), "state", STATE)
        assert peak() - before < 100_000


# -- requests in flight ----------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
    raise AssertionError("it does not come to that")


@contextlib.contextmanager
def unfinished(server: Server, headers: Mapping[str, str], count: int) -> Iterator[Callable[[], list[int]]]:
    """So many requests whose bodies are still to come; what is given ends them, and tells how they were answered."""
    body = json.dumps(ADAM).encode()
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/sessions HTTP/1.1\r\nHost: {server.url[7:]}\r\nContent-Type: application/json\r\n{lines}"
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(count)]
        for connection in connections:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])

        def finish() -> list[int]:
            for connection in connections:
                connection.sendall(body[5:])
            return [reply_on(connection)[0] for connection in connections]

        yield finish


def test_a_tenant_has_so_many_requests_in_flight_and_others_theirs(narrow: Server) -> None:
    tenant = next(tenants)
    header = {"Authorization": key_of(narrow, tenant)}
    with narrow.client(headers=header) as client, client_of(narrow) as other:
        with unfinished(narrow, header, IN_FLIGHT) as finish:
            until(lambda: client.get("/v1/optimizers").status_code == 429)
            headers = exceeded(client.get("/v1/optimizers"), "requests", IN_FLIGHT)
            assert headers["ratelimit-policy"] == f'"requests";q={IN_FLIGHT};qu="concurrent-requests"'
            assert client.get("/readyz").status_code == 200
            assert other.get("/v1/optimizers").status_code == 200
            assert finish() == [201] * IN_FLIGHT
        assert client.get("/v1/optimizers").status_code == 200
        with unfinished(narrow, header, IN_FLIGHT):
            until(lambda: client.get("/v1/optimizers").status_code == 429)
        # Gone without their bodies, they are no longer under way.
        until(lambda: client.get("/v1/optimizers").status_code == 200)


def test_those_that_only_wait_leave_room_for_what_they_wait_for(narrow: Server) -> None:
    aggregation = {"mode": "sync", "workers": 6}
    with client_of(narrow) as client:
        session = create(client, **ADAM, aggregation=aggregation)["id"]

        def contribute(number: int) -> int:
            body = {"gradients": {"w": [1.0, 1.0]}, "worker": f"w{number}"}
            prefer = {"Prefer": "wait=20"}
            # Two may be on their way at once, so one may have to come again; as waiters all six are there at once.
            for _ in range(1000):
                reply = client.post(f"/v1/sessions/{session}/steps", json=body, headers=prefer)
                if reply.status_code != 429:
                    break
            return reply.status_code

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(contribute, range(6))) == [200] * 6
