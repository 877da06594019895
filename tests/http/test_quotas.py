"""What each tenant may have, and how often it may ask: exactly that much, over all replicas, and no trace of the rest.

Rates here are by the day, so that nothing is let through again while a test runs.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.access.keys import new_key
from service.access.rights import Scope
from service.ids import ALPHABET
from tests.http.refusals import refused, unchanged
from tests.http.sockets import connected, reply_on
from tests.running import Server, redis_server, serving
from tests.wire import SAFETENSORS, create

RATE = 12
SESSIONS = 4
STATE = 4096
IN_FLIGHT = 2
ADAM = {"optimizer": "adam", "params": {"w": [1.0, 2.0]}}

tenants = map("tenant-{}".format, itertools.count())


@contextlib.contextmanager
def service(directory: Path, **settings: object) -> Iterator[Server]:
    environment = {"RAVINE_JIT": "false"} | {f"RAVINE_{name.upper()}": str(value) for name, value in settings.items()}
    with serving(directory / "data", environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("rated"), rate=f"{RATE}/day") as server:
        yield server


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("bounded"), max_sessions=SESSIONS, max_tenant_state=STATE) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("narrow"), max_tenant_requests=IN_FLIGHT) as server:
        yield server


@contextlib.contextmanager
def store_of(server: Server) -> Iterator[Any]:
    with contextlib.closing(redis.Redis.from_url(server.store_url(), decode_responses=True, protocol=2)) as opened:
        yield opened


def key_of(server: Server, tenant: str, scope: Scope = "admin", rate: str | None = None) -> str:
    """A key as `ravine keys create` makes one, as the header that brings it."""
    text, key = new_key(tenant, scope, rate=rate)
    fields = {name: "" if value is None else str(value) for name, value in key._asdict().items() if name != "id"}
    with store_of(server) as store:
        store.hset(f"ravine:key:{key.id}", mapping=fields)
    return f"Bearer {text}"


@contextlib.contextmanager
def client_of(server: Server, tenant: str | None = None, **key: Any) -> Iterator[httpx.Client]:
    """A client of a tenant that nobody else uses."""
    header = key_of(server, tenant or next(tenants), **key)
    with server.client(headers={"Authorization": header}) as client:
        yield client


def exceeded(reply: httpx.Response, quota: str, limit: int) -> httpx.Headers:
    document = refused(reply, 429, "quota-exceeded")
    assert (document["quota"], document["limit"]) == (quota, limit)
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["ratelimit-policy"]
    return reply.headers


def standing(reply: httpx.Response) -> dict[str, tuple[int, int]]:
    """By policy: what is left, and of how many."""
    left = dict(re.findall(r'"(\w+)";r=(\d+)(?:;t=\d+)?(?:, |$)', reply.headers["ratelimit"]))
    limits = dict(re.findall(r'"(\w+)";q=(\d+);w=\d+(?:, |$)', reply.headers["ratelimit-policy"]))
    assert left.keys() == limits.keys()
    return {name: (int(left[name]), int(limits[name])) for name in limits}


# -- rates -----------------------------------------------------------------------------------------------------


def test_a_rate_is_counted_down_to_nothing(rated: Server) -> None:
    with client_of(rated) as client:
        for left in range(RATE - 1, -1, -1):
            reply = client.get("/v1/optimizers")
            assert reply.status_code == 200
            assert standing(reply) == {"tenant": (left, RATE)}
            assert re.fullmatch(rf'"tenant";q={RATE};w=86400', reply.headers["ratelimit-policy"])
        for _ in range(3):
            headers = exceeded(client.get("/v1/optimizers"), "rate", RATE)
            assert re.fullmatch(r'"tenant";r=0;t=\d+', headers["ratelimit"])
            assert headers["ratelimit"].endswith(f"t={headers['retry-after']}")
            assert 0 < int(headers["retry-after"]) <= 2 * 86400
        # What watches the service, and what anybody may see, is not counted.
        for path in ("/livez", "/readyz", "/docs"):
            reply = client.get(path)
            assert reply.status_code == 200
            assert "ratelimit" not in reply.headers
        exceeded(client.get("/metrics"), "rate", RATE)  # which is for the operator
    with rated.client() as operator:
        for _ in range(RATE + 1):
            reply = operator.get("/metrics")
            assert reply.status_code == 200
            assert "ratelimit" not in reply.headers
    with client_of(rated) as other:
        assert standing(other.get("/v1/optimizers")) == {"tenant": (RATE - 1, RATE)}


def test_what_a_rate_refuses_is_not_done(rated: Server) -> None:
    tenant = next(tenants)
    with client_of(rated, tenant) as client:
        session = create(client, **ADAM)["id"]
        path = f"/v1/sessions/{session}"
        before = client.get(path)
        while client.get("/v1/optimizers").status_code == 200:
            pass
        gradients = {"gradients": {"w": [1.0, 1.0]}}
        for method, at, body in (
            ("POST", f"{path}/steps", gradients),
            ("PUT", f"{path}/params", {"params": {"w": [0.0, 0.0]}}),
            ("PATCH", path, {"name": "other"}),
            ("POST", f"{path}/fork", {}),
            ("POST", "/v1/sessions", ADAM),
        ):
            exceeded(client.request(method, at, json=body), "rate", RATE)
        exceeded(client.delete(path), "rate", RATE)
        with store_of(rated) as store:
            for name in store.scan_iter("ravine:limits:*"):  # the next day, as it were
                if f"/{tenant}/" in name:
                    store.delete(name)
        after, listed = client.get(path), client.get("/v1/sessions").json()["data"]
        assert (after.json(), after.headers["etag"]) == (before.json(), before.headers["etag"])
        assert [each["id"] for each in listed] == [session]


def test_many_at_once_and_by_two_replicas_pass_no_more_than_one(rated: Server) -> None:
    with serving(rated.data, environment={"RAVINE_JIT": "false", "RAVINE_RATE": f"{RATE}/day"}) as second:
        header = key_of(rated, next(tenants))

        def ask(server: Server) -> int:
            with server.client(headers={"Authorization": header}) as client:
                return client.get("/v1/optimizers").status_code

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, [rated, second] * 20))
    assert sorted(answers) == [200] * RATE + [429] * (40 - RATE)


def test_a_key_has_a_rate_of_its_own_within_the_tenants(rated: Server) -> None:
    tenant = next(tenants)
    with client_of(rated, tenant, rate="3/day") as slow, client_of(rated, tenant) as other:
        for left in (2, 1, 0):
            reply = slow.get("/v1/optimizers")
            assert standing(reply) == {"key": (left, 3), "tenant": (RATE - 3 + left, RATE)}
        for _ in range(5):  # what the key may not is nothing that the tenant did
            assert standing(slow.get("/v1/optimizers")) == {"key": (0, 3)}
        exceeded(slow.get("/v1/optimizers"), "rate", 3)
        assert standing(other.get("/v1/optimizers")) == {"tenant": (RATE - 4, RATE)}


def test_what_may_not_be_done_counts_as_well(rated: Server) -> None:
    with client_of(rated, scope="session") as client:
        left = RATE
        for method, path, status in (
            ("GET", f"/v1/sessions/ses_{'0' * 25}", 404),
            ("GET", "/nothing", 404),
            ("PUT", "/v1/sessions", 405),
        ):
            for _ in range(2):
                left -= 1
                reply = client.request(method, path)
                assert reply.status_code == status
                assert standing(reply) == {"tenant": (left, RATE)}
        for _ in range(left):
            client.get("/nothing")
        exceeded(client.get("/nothing"), "rate", RATE)
    with rated.client(headers={"Authorization": "Bearer rvn_wrong"}) as client:
        assert client.get("/v1/optimizers").status_code == 401


def test_a_key_may_have_a_rate_where_tenants_have_none(bounded: Server) -> None:
    with client_of(bounded, rate="1/day") as client, client_of(bounded) as other:
        assert standing(client.get("/v1/optimizers")) == {"key": (0, 1)}
        exceeded(client.get("/v1/optimizers"), "rate", 1)
        assert "ratelimit" not in other.get("/v1/optimizers").headers


def test_without_a_key_it_is_the_default_tenant_that_asks(tmp_path: Path) -> None:
    with service(tmp_path, rate="2/day") as server, server.client() as client:
        assert standing(client.get("/v1/optimizers")) == {"tenant": (1, 2)}
        with client_of(server, "default") as keyed:
            assert standing(keyed.get("/v1/optimizers")) == {"tenant": (0, 2)}
        exceeded(client.get("/v1/optimizers"), "rate", 2)


def test_what_is_counted_in_the_store_expires_and_tells_no_secrets(rated: Server) -> None:
    header = key_of(rated, next(tenants), rate="3/day")
    with rated.client(headers={"Authorization": header}) as client:
        assert client.get("/v1/optimizers").status_code == 200
    secret = header.rpartition("_")[2]
    with store_of(rated) as store:
        names = list(store.scan_iter("ravine:limits:*"))
        assert names
        assert all(0 < store.ttl(name) <= 2 * 86400 for name in names)
        assert not [name for name in names if secret in name]


def test_a_rate_cannot_be_told_where_the_store_is_away(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(redis_server(tmp_path / "store"))
        environment = {"RAVINE_JIT": "false", "RAVINE_RATE": "100/second", "RAVINE_REDIS_URL": url}
        server = stack.enter_context(serving(tmp_path / "data", environment=environment))
        client = stack.enter_context(server.client())
        assert client.get("/v1/optimizers").status_code == 200
        with contextlib.closing(redis.Redis.from_url(url)) as store:
            store.shutdown(nosave=True)
        reply = client.get("/v1/optimizers")  # which asks the store for nothing else
        refused(reply, 503, "store-unavailable")
        assert reply.headers["retry-after"] == "1"
        assert client.get("/livez").status_code == 200


def test_in_a_full_store_there_is_room_to_delete(tmp_path: Path) -> None:
    with service(tmp_path, rate="1000000/day") as server, server.client() as client, store_of(server) as store:
        session = create(client, **ADAM)["id"]
        store.config_set("maxmemory", 1)
        store.config_set("maxmemory-policy", "noeviction")
        refused(client.post("/v1/sessions", json=ADAM), 507, "store-full")
        assert client.get(f"/v1/sessions/{session}").status_code == 200
        assert client.delete(f"/v1/sessions/{session}").status_code == 204
        store.config_set("maxmemory", 0)
        assert client.get("/v1/sessions").json()["data"] == []
        assert not store.exists("ravine:usage")
        create(client, **ADAM)


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


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["", "fast", "0/second", "10", "1/second;5/minute", "-3/second", "1.5/second"])
def test_a_rate_that_is_none_ends_the_start(tmp_path: Path, rate: str) -> None:
    server = Server(tmp_path / "data", environment={"RAVINE_RATE": rate})
    with pytest.raises(AssertionError, match="rate: a rate is a number of requests in a time"):
        server.start()
    assert server.process is not None
    assert server.process.wait() == 2
