"""A store behind TLS, and one that lets the service do only what it needs.

The rules of the store's user are those of docs/security.md, taken from there.
"""

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import safetensors.numpy
import uvloop

from service.errors import StoreUnavailable
from service.reading import BULK, Values
from service.store import Store
from tests.certificates import Authority
from tests.running import ROOT, ravine, redis_binary, redis_server, serving, valkey_binary
from tests.service.test_store import made
from tests.wire import SAFETENSORS, create

PASSWORD = "a-password-of-the-tests"
RULES = re.search(r"^ACL SETUSER ravine (.*)$", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
BINARIES = [
    pytest.param(valkey_binary, id="valkey"),
    pytest.param(redis_binary, id="redis", marks=pytest.mark.skipif(redis_binary() is None, reason="no redis-server")),
]
LARGE = 40_000


@pytest.fixture(params=BINARIES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[redis.Redis]:
    """A store whose user `ravine` has the documented rights, as its administrator sees it."""
    assert RULES is not None, "docs/security.md has no line that makes the user"
    with redis_server(tmp_path / "store", "--appendonly", "yes", binary=request.param()) as url:
        raw = redis.Redis.from_url(url, protocol=2)
        rules = RULES[1].replace(">PASSWORD", f">{PASSWORD}").split()
        raw.execute_command("ACL", "SETUSER", "ravine", *rules)
        yield raw
        raw.close()


def url_of(raw: redis.Redis, user: str = "ravine", password: str = PASSWORD) -> str:
    path = raw.connection_pool.connection_kwargs["path"]
    return f"unix://{user}:{password}@{path}"


def test_the_service_needs_no_more_than_the_rights_that_are_documented(store: redis.Redis, tmp_path: Path) -> None:
    secret = tmp_path / "redis-url"
    secret.write_text(url_of(store) + "\n")
    with (
        serving(tmp_path / "data", environment={"RAVINE_REDIS_URL_FILE": str(secret)}) as server,
        server.client() as client,
    ):
        live_through_everything(client)
        shown = server.log.read_text()
    assert PASSWORD not in shown
    refused = [line for line in store.acl_log() if line["username"] == "ravine"]
    assert refused == []


def test_waiting_for_the_disk_takes_one_right_more(store: redis.Redis, tmp_path: Path) -> None:
    store.config_set("appendfsync", "always")
    store.execute_command("ACL", "SETUSER", "ravine", "+config|get")
    environment = {"RAVINE_REDIS_URL": url_of(store), "RAVINE_ACK": "disk"}
    with serving(tmp_path / "data", environment=environment) as server, server.client() as client:
        live_through_everything(client)
    assert [line for line in store.acl_log() if line["username"] == "ravine"] == []


def live_through_everything(client: httpx.Client) -> None:
    """Every kind of command to the store: small and large steps, rounds, lists, streams, checkpoints, ends."""
    session = create(client, optimizer="adam", params={"w": [0.0] * LARGE}, labels={"team": "a"})["id"]
    path = f"/v1/sessions/{session}"
    body = safetensors.numpy.save({"w": np.ones(LARGE, np.float32)})
    for number in range(5):  # the log outweighs the state: snapshots are written
        headers = SAFETENSORS | {"Idempotency-Key": str(number)}
        assert client.post(f"{path}/steps", content=body, headers=headers).status_code == 200
    assert len(client.get("/v1/sessions", params={"label": "team:a"}).json()["data"]) == 1
    assert client.patch(path, json={"labels": {"team": "b"}}).status_code == 200
    assert len(client.get(f"{path}/history").json()["data"]) == 5
    assert client.get(f"{path}/params", params={"after": 5, "wait": 0.2}).status_code == 304
    with client.stream("GET", f"{path}/events", headers={"Last-Event-ID": "3"}) as stream:
        assert next(stream.iter_lines()).startswith(("id:", "event:"))
    checkpoint = client.get(f"{path}/state").content
    restored = client.post("/v1/sessions", content=checkpoint, headers=SAFETENSORS)
    assert restored.status_code == 201
    assert client.post(f"{path}/fork").status_code == 201
    aggregation = {"mode": "sync", "workers": 2, "quorum": 1, "timeout": 0.2}
    rounds = create(client, optimizer="sgd", params={"w": [1.0]}, aggregation=aggregation)["id"]
    reply = client.post(
        f"/v1/sessions/{rounds}/steps", json={"gradients": {"w": [1.0]}, "worker": "a"}, headers={"Prefer": "wait=20"}
    )
    assert reply.status_code == 200
    skipping = create(client, optimizer="sgd", params={"w": [1.0]}, non_finite="skip")["id"]
    nan = safetensors.numpy.save({"w": np.array([np.nan], np.float32)})
    assert client.post(f"/v1/sessions/{skipping}/steps", content=nan, headers=SAFETENSORS).status_code == 200
    assert client.delete(path).status_code == 204


FORBIDDEN: list[tuple[str, ...]] = [
    ("GET", "another:key"),
    ("SET", "another:key", "1"),
    ("PUBLISH", "another", "1"),
    ("EVAL", "return redis.call('GET', 'another:key')", "0"),
    ("KEYS", "*"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "SET", "dir", "/"),
    ("CONFIG", "GET", "requirepass"),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "NO", "ONE"),
    ("ACL", "LIST"),
    ("MODULE", "LIST"),
    ("MONITOR",),
    ("CLIENT", "LIST"),
    ("SWAPDB", "0", "1"),
    ("MIGRATE", "127.0.0.1", "1", "ravine:x", "0", "1"),
]


def test_whoever_has_the_services_password_has_the_sessions_and_nothing_else(store: redis.Redis) -> None:
    store.set("another:key", "1")
    with redis.Redis.from_url(url_of(store), protocol=2) as ravine:
        assert ravine.set("ravine:x", "1")
        assert ravine.publish("ravine:x", "1") == 0
        for command in FORBIDDEN:
            with pytest.raises(
                (redis.exceptions.NoPermissionError, redis.exceptions.ResponseError), match=r"permission|can't access"
            ):
                ravine.execute_command(*command)
    assert store.get("another:key") == b"1"


def test_a_wrong_password_is_told_as_such(store: redis.Redis) -> None:
    async def open_() -> None:
        made = Store(url_of(store, password="wrong"))
        try:
            await made.open()
        finally:
            await made.close()

    with pytest.raises(StoreUnavailable, match=r"WRONGPASS|invalid username-password"):
        asyncio.run(open_())


@pytest.mark.skipif(redis_binary() is None, reason="no redis-server, and the Valkey at hand is made without TLS")
async def large_values_come_back(url: str) -> None:
    """By a connection of their own, which is as secure as the others."""
    store = Store(url)
    await store.open()
    session, _ = await made(store, 1.5, BULK // 4)
    stored = await store.load(session)
    assert stored is not None
    assert set(stored.tensors["w"].tolist()) == {1.5}
    await store.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_large_values_of_a_store_with_passwords(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch, run: Callable[[Any], None]
) -> None:
    monkeypatch.delattr(Values, "_usual")
    run(large_values_come_back(url_of(store)))
    assert [line for line in store.acl_log() if line["username"] == "ravine"] == []


def test_a_store_behind_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("store")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = ("--tls-port", str(port), "--bind", "127.0.0.1", "--tls-auth-clients", "no")
    files = ("--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(authority.cert))
    address = f"rediss://127.0.0.1:{port}"
    with redis_server(tmp_path / "store", *tls, *files, "--appendonly", "yes", binary=redis_binary()):
        trusting = f"{address}?ssl_ca_certs={authority.cert}"
        with serving(tmp_path / "data", "--redis-url", trusting) as server, server.client() as client:
            live_through_everything(client)
        with monkeypatch.context() as patched:
            patched.delattr(Values, "_usual")
            for run in (asyncio.run, uvloop.run):
                run(large_values_come_back(trusting))

        async def open_(url: str) -> None:
            made = Store(url)
            try:
                await made.open()
            finally:
                await made.close()

        with pytest.raises(StoreUnavailable, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            asyncio.run(open_(address))
        with pytest.raises(StoreUnavailable):
            asyncio.run(open_(f"redis://127.0.0.1:{port}"))


def test_a_secret_file_that_cannot_be_is_told_at_the_start(tmp_path: Path) -> None:
    def refused(environment: dict[str, str]) -> str:
        done = ravine("serve", "--port", "0", **environment)
        assert done.returncode == 2, done.stderr
        return done.stderr

    (tmp_path / "empty").write_text("\n")
    (tmp_path / "there").write_text("redis://127.0.0.1:1")
    assert "cannot be read" in refused({"RAVINE_REDIS_URL_FILE": str(tmp_path / "none")})
    assert "is empty" in refused({"RAVINE_REDIS_URL_FILE": str(tmp_path / "empty")})
    both = {"RAVINE_REDIS_URL_FILE": str(tmp_path / "there"), "RAVINE_REDIS_URL": "redis://127.0.0.1:2"}
    assert "both given" in refused(both)
