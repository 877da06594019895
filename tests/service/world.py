"""A store with as many replicas of the engine as are asked for, in this process, and steps by the engine itself."""

import contextlib
import hashlib
import os
import select
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio

from core.contributions import Contribution
from core.evaluate import Evaluator
from service import schemas
from service.access.usage import UNLIMITED, Quota
from service.documents import Applied, StepRequest
from service.embedded import Embedded
from service.engine import Engine
from service.store import Store


class World:
    """A store, and as many replicas of the service on it as are asked for."""

    def __init__(self, data: Path) -> None:
        # With `everysec` a server that is killed while an fsync is under way loses what it has acknowledged since.
        self.embedded = Embedded(data, "always")
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "World":
        await self.embedded.start()
        self._stack.push_async_callback(self.embedded.stop)
        self.raw: Any = await self._stack.enter_async_context(self._client())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _client(self) -> Any:
        return redis.asyncio.Redis.from_url(self.embedded.url, client_name=self.embedded.client_name)

    async def replica(self, url: str | None = None, budget: int = 1 << 30, quota: Quota = UNLIMITED) -> Engine:
        opened = Store(url or self.embedded.url)
        await opened.open()
        self._stack.push_async_callback(opened.close)
        engine = Engine(opened, Evaluator(), schemas.document_of, budget, 1 << 32, quota, schemas.brief_of)
        await engine.start()
        self._stack.push_async_callback(engine.stop)
        return engine

    def kill_store(self) -> None:
        pid = int((self.embedded.data / "valkey.pid").read_text())
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        # A dying process closes its files one after another: its locks may be free while it is still connected to.
        select.select([ended], [], [])
        os.close(ended)

    async def keys(self, session: str) -> set[bytes]:
        return {name async for name in self.raw.scan_iter(match=f"*{session}*", count=1000)}

    @contextlib.asynccontextmanager
    async def full(self) -> AsyncIterator[None]:
        await self.raw.config_set("maxmemory", 1)
        try:
            yield
        finally:
            await self.raw.config_set("maxmemory", 0)


Run = Callable[[Callable[[World], Awaitable[None]]], None]


async def created(engine: Engine, **body: Any) -> str:
    document, params = schemas.parse_create({"optimizer": {"kind": "sgd", "lr": 1.0}, **body})
    session, _ = await engine.create(document, params)
    return str(session["id"])


def request(value: float, size: int = 3, **members: Any) -> StepRequest:
    gradient = np.full(size, -value, np.float32)
    digest = hashlib.sha1(gradient).hexdigest()
    said = {name: members.pop(name) for name in ("worker", "base_step") if name in members}
    contribution = Contribution({"w": gradient}, **said)
    return StepRequest(contribution, members.pop("returns", None), 4 * size, digest=digest, **members)


def copied(applied: Applied) -> Applied:
    """What a reply does: takes the arrays as they are at this moment."""
    applied.params = None if applied.params is None else applied.params.copy()
    return applied


async def step(engine: Engine, session: str, value: float = 1.0, **members: Any) -> Applied:
    told = await engine.step(session, request(value, **members), copied)
    assert isinstance(told, Applied)  # of a session without rounds
    return told


async def params(engine: Engine, session: str) -> list[float]:
    return [float(value) for value in (await engine.params(session, "next")).flat]
