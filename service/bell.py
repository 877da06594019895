"""Hears of commits by any replica: what long-polls and event streams wait for.

The commit script publishes on a channel of the session. A channel is subscribed to while somebody waits on it, all
over one connection. A message may be missed (the connection broke, the store failed over), so it only ever means
"look": whoever waits looks again by itself from time to time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.exceptions import RedisError

log = structlog.get_logger("ravine.bell")


class Bell:
    """`client` is a redis.asyncio client. `start` before use, `stop` in the end."""

    def __init__(self, client: Any) -> None:
        self._pubsub = client.pubsub(ignore_subscribe_messages=False)
        self._listeners: dict[str, set[asyncio.Queue[str]]] = {}
        self._subscribed: dict[str, asyncio.Event] = {}
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(RedisError, OSError):
            await self._pubsub.aclose()

    @contextlib.asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator["asyncio.Queue[str]"]:
        """A queue of the messages on `channel`; "" means that some may have been missed."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.setdefault(channel, set()).add(queue)
        try:
            await self._subscribe(channel)
            yield queue
        finally:
            listeners = self._listeners[channel]
            listeners.discard(queue)
            if not listeners:
                del self._listeners[channel]
                self._subscribed.pop(channel, None)
                with contextlib.suppress(RedisError, OSError):
                    await self._pubsub.unsubscribe(channel)
                    if channel in self._listeners:  # somebody came meanwhile
                        await self._subscribe(channel)

    async def _subscribe(self, channel: str) -> None:
        confirmed = self._subscribed.get(channel)
        if confirmed is None:
            confirmed = self._subscribed[channel] = asyncio.Event()
            with contextlib.suppress(RedisError, OSError):
                await self._pubsub.subscribe(channel)
            self._wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await confirmed.wait()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                async for message in self._pubsub.listen():
                    self._hear(message)
                # Nothing is subscribed to any more.
                if not self._listeners:
                    self._wanted.clear()
            except (RedisError, OSError) as error:
                log.warning("subscription lost", reason=str(error))
                await asyncio.sleep(0.1)
                await self._again()

    async def _again(self) -> None:
        """Subscribes anew after the connection broke, and wakes everybody: they may have missed something."""
        for channel in list(self._listeners):
            with contextlib.suppress(RedisError, OSError):
                await self._pubsub.subscribe(channel)
            self._ring(channel, "")

    def _hear(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        if message["type"] == "subscribe" and channel in self._subscribed:
            self._subscribed[channel].set()
        elif message["type"] == "message":
            self._ring(channel, message["data"].decode())

    def _ring(self, channel: str, message: str) -> None:
        for queue in self._listeners.get(channel, ()):
            queue.put_nowait(message)
