"""A store put back to what it had of a session, and what is then to be seen."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from service.engine import Engine
from service.errors import Place
from service.store import Store, key
from tests.service.world import World, step

SGD: dict[str, Any] = {"params": {"w": [0.0] * 3}}
# An engine that keeps no session in memory longer than it has to.
SMALL = 1


async def saved(world: World, session: str) -> dict[bytes, bytes]:
    return {name: await world.raw.dump(name) for name in await world.keys(session)}


async def put_back(world: World, session: str, before: dict[bytes, bytes]) -> None:
    async with world.raw.pipeline() as together:
        for name in await world.keys(session):
            together.delete(name)
        for name, value in before.items():
            together.restore(name, 0, value)
        await together.execute()


async def stepped(engine: Engine, session: str, count: int) -> Place:
    """Where it stands after so many steps."""
    for _ in range(count):
        stamp = (await step(engine, session)).stamp
    return Place(stamp.step, stamp.etag)


async def head_of(world: World, session: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = await world.raw.hgetall(key(session, "head"))
    return found


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


async def is_marked(world: World, session: str) -> bool:
    return b"lost" in await head_of(world, session)


async def accepted(world: World, session: str) -> None:
    store = Store(world.embedded.url)
    await store.open()
    head = await store.head(session)
    assert head is not None
    assert await store.accept(session, head) == "OK"
    await store.close()
