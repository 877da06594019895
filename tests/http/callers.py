"""Callers, with keys and without: services for them, keys put into a store, and every call of the service once."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import redis

from service.access.keys import Key, new_key
from service.access.rights import CALLS, Right, Scope
from service.index import DEFAULT_TENANT
from service.store import Store
from tests.running import Server, serving
from tests.wire import create

MISSING = f"ses_{'0' * 25}"
KEYS_ASKED_FOR = {"RAVINE_KEYS": "required", "RAVINE_JIT": "false"}


@contextlib.contextmanager
def service(directory: Path, **settings: object) -> Iterator[Server]:
    """On an embedded store in `directory`, with these settings."""
    environment = {"RAVINE_JIT": "false"} | {f"RAVINE_{name.upper()}": str(value) for name, value in settings.items()}
    with serving(directory / "data", environment=environment) as server:
        yield server


def add_key(
    url: str,
    tenant: str = DEFAULT_TENANT,
    scope: Scope = "admin",
    *,
    session: str | None = None,
    seconds: float | None = None,
) -> tuple[str, Key]:
    """A key in the store at `url`, valid for so many `seconds`: its text, and what is kept of it."""
    expires = None if seconds is None else int(time.time() + seconds)
    text, key = new_key(tenant, scope, session=session, expires_at=expires)

    async def add() -> None:
        store = Store(url)
        await store.open()
        await store.keyring.add(key)
        await store.close()

    asyncio.run(add())
    return text, key


def revoke(url: str, key: Key) -> None:
    async def end() -> None:
        store = Store(url)
        await store.open()
        assert await store.keyring.revoke(key.id)
        await store.close()

    asyncio.run(end())


def bearing(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def stored(url: str) -> dict[bytes, bytes]:
    """Every bit of what is in the store."""
    with contextlib.closing(redis.Redis.from_url(url, protocol=2)) as client:
        names = sorted(client.scan_iter(match="*", count=10_000))
        return {name: client.dump(name) for name in names}  # type: ignore[misc]


class Houses(NamedTuple):
    """Two tenants on one service, a session of each and a second one of the first, and a client of each scope."""

    server: Server
    own: str
    sibling: str
    foreign: str
    clients: dict[Scope, httpx.Client]
    other: httpx.Client
    keys: dict[Scope, tuple[str, Key]]


OPTIMIZER = {"kind": "sgd", "lr": 0.5}
SHARED = {"mode": "sync", "workers": 2, "clip_norm": 1.0, "noise_multiplier": 1.1, "seed": 7}


@contextlib.contextmanager
def houses(data: Path) -> Iterator[Houses]:
    with serving(data, environment=KEYS_ASKED_FOR) as server, contextlib.ExitStack() as stack:
        url = server.store_url()

        def client(text: str) -> httpx.Client:
            return stack.enter_context(server.client(headers=bearing(text)))

        keys: dict[Scope, tuple[str, Key]] = {
            "admin": add_key(url, "acme"),
            "session": add_key(url, "acme", "session"),
        }
        clients: dict[Scope, httpx.Client] = {scope: client(text) for scope, (text, _) in keys.items()}
        body: dict[str, Any] = {"optimizer": OPTIMIZER, "params": {"w": [1.0]}, "labels": {"team": "vision"}}
        own = create(clients["admin"], **body, aggregation=SHARED)["id"]
        sibling = create(clients["session"], **body)["id"]
        keys["worker"] = add_key(url, "acme", "worker", session=own)
        clients["worker"] = client(keys["worker"][0])
        other = client(add_key(url, "globex")[0])
        foreign = create(other, **body)["id"]
        yield Houses(server, own, sibling, foreign, clients, other, keys)


# -- every call --------------------------------------------------------------------------------------------------------


KINDS = {"optimizers": "adam", "schedules": "cosine", "transforms": "clip", "reducers": "mean"}


class Call(NamedTuple):
    method: str
    template: str
    right: Right

    def path(self, session: str = MISSING) -> str:
        family = self.template.split("/")[2] if "{kind}" in self.template else ""
        return self.template.format(session=session, kind=KINDS.get(family, ""), slug="forbidden")

    def send(self, client: httpx.Client, session: str = MISSING, **headers: str) -> httpx.Response:
        """As it would be meant; what would change a session that is there asks for a step that it has not reached."""
        given: dict[str, Any] = {"headers": {"If-Match": '"999"', **headers}}
        body = BODIES.get((self.method, self.template))
        if body is not None:
            given["json"] = body
        with client.stream(self.method, self.path(session), **given) as reply:
            if not reply.headers.get("content-type", "").startswith("text/event-stream"):
                reply.read()
            return reply


BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/sessions"): {"optimizer": "sgd", "shapes": {"w": [1]}},
    ("PATCH", "/v1/sessions/{session}"): {"name": "mine now"},
    ("POST", "/v1/sessions/{session}/steps"): {"gradients": {"w": [1.0]}},
    ("PUT", "/v1/sessions/{session}/params"): {"params": {"w": [9.0]}},
    ("POST", "/v1/sessions/{session}/fork"): {},
}

ALL = [Call(method, path, right) for path, methods in CALLS.items() for method, right in methods.items()]
IDS = [f"{call.method} {call.template}" for call in ALL]
