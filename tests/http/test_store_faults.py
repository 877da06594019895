"""The store is away, or full: told as such, nothing changes, and all goes on once it is back."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from tests.http.refusals import refused, standing, unchanged
from tests.running import Server, redis_binary, redis_server, serving
from tests.wire import create

STEP = {"gradients": {"w": [1.0, 2.0]}}


@contextlib.contextmanager
def service(directory: Path, url: str) -> Iterator[tuple[Server, httpx.Client]]:
    options = {"RAVINE_JIT": "false"}
    with serving(directory / "data", "--redis-url", url, environment=options) as server, server.client() as client:
        yield server, client


def calls(session: str) -> list[tuple[str, str, object]]:
    """Every call that needs the store."""
    path = f"/v1/sessions/{session}"
    return [
        ("POST", "/v1/sessions", {"optimizer": "sgd", "shapes": {"w": [1]}}),
        ("GET", "/v1/sessions", None),
        ("GET", path, None),
        ("PATCH", path, {"name": "n"}),
        ("DELETE", path, None),
        ("POST", f"{path}/fork", None),
        ("GET", f"{path}/history", None),
        ("GET", f"{path}/state", None),
        ("GET", f"{path}/params", None),
        ("GET", f"{path}/params?after=1&wait=30", None),
        ("PUT", f"{path}/params", {"params": {"w": [9.0, 9.0]}}),
        ("POST", f"{path}/steps", STEP),
        ("GET", f"{path}/events", None),
        ("GET", "/readyz", None),
    ]


def test_while_the_store_is_away(tmp_path: Path) -> None:
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with contextlib.ExitStack() as store:
        url = store.enter_context(redis_server(tmp_path / "store", *durable))
        with service(tmp_path, url) as (server, client):
            session = create(client, optimizer="adam", params={"w": [1.0, 2.0]})["id"]
            assert client.post(f"/v1/sessions/{session}/steps", json=STEP).status_code == 200
            before = standing(client, session)

            def send(call: tuple[str, str, object]) -> httpx.Response:
                method, url_, body = call
                with server.client() as own:
                    return own.request(method, url_, json=body)

            with ThreadPoolExecutor(len(calls(session)) + 1) as pool:
                waiting = pool.submit(send, ("GET", f"/v1/sessions/{session}/params?after=1&wait=30", None))
                time.sleep(0.2)  # it waits by now, or is one more of those that come too late
                store.close()
                replies = [waiting.result(), *pool.map(send, calls(session))]
            for reply in replies:
                refused(reply, 503, "store-unavailable")
                assert int(reply.headers["retry-after"]) >= 1
                assert "redis" not in reply.json()["detail"].lower()
                assert str(tmp_path) not in reply.text
            assert client.get("/livez").status_code == 200
            assert client.get("/v1/optimizers").status_code == 200
            store.enter_context(redis_server(tmp_path / "store", *durable))
            assert client.get("/readyz").status_code == 200
            assert standing(client, session) == before
            assert client.post(f"/v1/sessions/{session}/steps", json=STEP).json()["step"] == 2


def test_who_waits_for_a_round_is_told_that_its_contribution_counts(tmp_path: Path) -> None:
    """It is in the log: 503 would ask for it again, and without a key it would be refused then."""
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    waits = {"Prefer": "wait=25"}
    with contextlib.ExitStack() as store:
        url = store.enter_context(redis_server(tmp_path / "store", *durable))
        with service(tmp_path, url) as (server, client), ThreadPoolExecutor(2) as pool, server.client() as other:
            body = {"optimizer": {"kind": "sgd", "lr": 1.0}, "aggregation": {"mode": "sync", "workers": 3}}
            session = create(client, params={"w": [0.0, 0.0]}, **body)["id"]
            path = f"/v1/sessions/{session}"
            sent = [pool.submit(other.post, f"{path}/steps", json=STEP | {"worker": w}, headers=waits) for w in "ab"]
            while client.get(f"{path}/rounds/current").json()["received"] < 2:
                time.sleep(0.01)
            time.sleep(0.2)  # they wait by now
            store.close()
            replies = [future.result() for future in sent]
            assert [reply.status_code for reply in replies] == [202, 202], [reply.text for reply in replies]
            assert sorted(reply.json()["received"] for reply in replies) == [1, 2]
            assert {(reply.json()["round"], reply.headers["ravine-step"]) for reply in replies} == {(1, "0")}
            store.enter_context(redis_server(tmp_path / "store", *durable))
            assert client.get("/readyz").status_code == 200
            refused(client.post(f"{path}/steps", json=STEP | {"worker": "a"}), 409, "already-contributed")
            last = client.post(f"{path}/steps", json=STEP | {"worker": "c"})
            assert (last.status_code, last.json()["params"]) == (200, {"w": [-1.0, -2.0]})


def test_a_store_that_hangs_is_not_ready(tmp_path: Path) -> None:
    with redis_server(tmp_path / "store") as url, service(tmp_path, url) as (_, client):
        with contextlib.closing(redis.Redis.from_url(url)) as direct:
            direct.execute_command("CLIENT", "PAUSE", "3000", "ALL")
        refused(client.get("/readyz"), 503, "store-unavailable")


@pytest.fixture(scope="module", params=["valkey", "redis"])
def full(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, redis.Redis]]:
    """A service on a store with 3 MB."""
    binary = None if request.param == "valkey" else redis_binary()
    if request.param == "redis" and binary is None:
        pytest.skip("there is no redis-server here")
    directory = tmp_path_factory.mktemp("full")
    limit = ("--maxmemory", "3mb", "--maxmemory-policy", "noeviction", "--save", "")
    with (
        redis_server(directory / "store", *limit, binary=binary) as url,
        service(directory, url) as (_, client),
        contextlib.closing(redis.Redis.from_url(url)) as direct,
    ):
        yield client, direct


def test_a_store_that_fills_up(full: tuple[httpx.Client, redis.Redis]) -> None:
    client, _ = full
    body = {"optimizer": "sgd", "params": {"w": [0.5] * 20_000}}  # 80 kB each
    made: list[str] = []
    for _ in range(100):
        reply = client.post("/v1/sessions", json=body)
        if reply.status_code != 201:
            break
        made.append(reply.json()["id"])
    refused(reply, 507, "store-full")
    assert made
    listed = client.get("/v1/sessions?limit=100").json()["data"]
    assert [session["id"] for session in listed] == made[::-1]
    # What is there can be read, and deleted, and then there is room again.
    assert client.get(f"/v1/sessions/{made[0]}/params").status_code == 200
    for session in made[:4]:
        assert client.delete(f"/v1/sessions/{session}").status_code == 204
    # What its connections have in their buffers counts as well, and is given back some seconds after it was used.
    deadline = time.monotonic() + 30
    while (again := client.post("/v1/sessions", json=body)).status_code == 507 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert again.status_code == 201, again.text


def test_while_the_store_is_full(full: tuple[httpx.Client, redis.Redis]) -> None:
    client, direct = full
    direct.config_set("maxmemory", "0")
    session = create(client, optimizer="adam", params={"w": [1.0, 2.0]})["id"]
    path = f"/v1/sessions/{session}"
    keyed = {"Idempotency-Key": "k"}
    assert client.post(f"{path}/steps", json=STEP).status_code == 200
    direct.config_set("maxmemory", "1mb")  # less than it has
    with unchanged(client, session):
        for method, url, body in [
            ("POST", f"{path}/steps", STEP),
            ("PUT", f"{path}/params", {"params": {"w": [9.0, 9.0]}}),
            ("PATCH", path, {"name": "n"}),
            ("POST", f"{path}/fork", None),
            ("POST", "/v1/sessions", {"optimizer": "sgd", "shapes": {"w": [1]}, "labels": {"never": "made"}}),
        ]:
            refused(client.request(method, url, json=body, headers=keyed), 507, "store-full")
        assert client.get("/v1/sessions?label=never:made").json()["data"] == []
        assert client.get("/readyz").status_code == 200
    direct.config_set("maxmemory", "0")
    # The key was not used up by what was refused.
    reply = client.post(f"{path}/steps", json=STEP, headers=keyed)
    assert (reply.status_code, reply.json()["step"], "ravine-replayed" in reply.headers) == (200, 2, False)
