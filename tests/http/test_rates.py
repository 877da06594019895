"""How often each tenant may ask: exactly that often, over all replicas, and no trace of the rest.

Rates here are by the day, so that nothing is let through again while a test runs.
"""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from tests.http.callers import service
from tests.http.refusals import refused
from tests.http.tenants import ADAM, client_of, exceeded, key_of, standing, store_of, tenants
from tests.running import Server, redis_server, serving
from tests.wire import create

RATE = 12


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("rated"), rate=f"{RATE}/day") as server:
        yield server


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


def test_a_key_may_have_a_rate_where_tenants_have_none(tmp_path: Path) -> None:
    with service(tmp_path) as server, client_of(server, rate="1/day") as client, client_of(server) as other:
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


@pytest.mark.parametrize("rate", ["", "fast", "0/second", "10", "1/second;5/minute", "-3/second", "1.5/second"])
def test_a_rate_that_is_none_ends_the_start(tmp_path: Path, rate: str) -> None:
    server = Server(tmp_path / "data", environment={"RAVINE_RATE": rate})
    with pytest.raises(AssertionError, match="rate: a rate is a number of requests in a time"):
        server.start()
    assert server.process is not None
    assert server.process.wait() == 2
