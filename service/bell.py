"""Hears of commits by any replica: what long-polls and event streams wait for.

The commit script publishes on a channel of the session. A channel is subscribed to while somebody waits on it, all
over one connection, which one task owns: it alone connects, subscribes and reads, so that whoever comes or goes at a
bad moment changes nothing but what is wanted. A message may be missed (the connection broke, the store failed over), so
it only ever means "look": whoever waits looks again by itself from time to time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.exceptions import RedisClusterException, RedisError

log = structlog.get_logger("ravine.bell")

# How long a listener waits until its channel is heard, and the pause before the connection is made anew.
PATIENCE, PAUSE = 2.0, 0.2
# A connection that says nothing for so long is asked whether it lives, and is taken for dead after as long again.
SILENCE = 5.0
# uvloop raises RuntimeError for a write on a connection that the other side has closed.
_BROKEN = (RedisError, RedisClusterException, OSError, RuntimeError)


class Bell:
    """`client` is a redis.asyncio client. `start` before use, `stop` in the end."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._listeners: dict[str, set[asyncio.Queue[str]]] = {}
        self._asked: set[str] = set()  # channels that the connection was told to subscribe to
        self._heard: set[str] = set()  # those of them that the store confirmed
        self._confirmed: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        # Again and again: redis-py may lose a cancellation that meets a command of its own.
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=0.1)

    @contextlib.asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator["asyncio.Queue[str]"]:
        """A queue of the messages on `channel`; "" means that some may have been missed."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.setdefault(channel, set()).add(queue)
        try:
            if channel not in self._heard:
                self._changed.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE):
                        await self._confirmed.setdefault(channel, asyncio.Event()).wait()
            yield queue
        finally:
            listeners = self._listeners[channel]
            listeners.discard(queue)
            if not listeners:
                del self._listeners[channel]
                self._confirmed.pop(channel, None)
                self._changed.set()

    async def _run(self) -> None:
        told = False
        while True:
            pubsub = self._client.pubsub()
            try:
                await self._serve(pubsub)
            except _BROKEN as error:
                if self._heard or not told:  # once for each time that the store is away
                    log.warning("subscription lost", reason=str(error))
                    told = True
            finally:
                self._asked = set()
                self._heard.clear()
                for confirmed in self._confirmed.values():
                    confirmed.clear()
                with contextlib.suppress(*_BROKEN):
                    await pubsub.aclose()
            await asyncio.sleep(PAUSE)
            for channel in list(self._listeners):
                self._ring(channel, "")

    async def _serve(self, pubsub: Any) -> None:
        """Keeps to what is wanted and hears, until the connection breaks."""
        reading: asyncio.Task[Any] | None = None
        asked = False  # whether it lives
        try:
            while True:
                await self._keep_up(pubsub)
                if reading is None and self._asked:
                    reading = asyncio.create_task(pubsub.get_message(timeout=None))
                if not await self._something(reading):
                    if asked:
                        raise ConnectionError("the store is silent")
                    await pubsub.ping()
                asked = not self._changed.is_set() and (reading is None or not reading.done())
                if reading is not None and reading.done():
                    self._hear(reading.result())
                    reading = None
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.wait((reading,))

    async def _keep_up(self, pubsub: Any) -> None:
        self._changed.clear()
        wanted = set(self._listeners)
        gone, new = self._asked - wanted, wanted - self._asked
        self._heard -= gone
        self._asked = wanted
        if gone:
            await pubsub.unsubscribe(*gone)
        if new:
            await pubsub.subscribe(*new)

    async def _something(self, reading: "asyncio.Task[Any] | None") -> bool:
        """Waits for a message or a change of what is wanted; False for silence where there might have been some."""
        change = asyncio.create_task(self._changed.wait())
        try:
            waiting = (change,) if reading is None else (change, reading)
            limit = None if reading is None else SILENCE
            done, _ = await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        return bool(done)

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None or message["type"] not in ("subscribe", "message"):
            return
        channel = message["channel"].decode()
        if message["type"] == "message":
            self._ring(channel, message["data"].decode())
        elif channel in self._asked:
            self._heard.add(channel)
            if channel in self._confirmed:
                self._confirmed[channel].set()

    def _ring(self, channel: str, message: str) -> None:
        for queue in self._listeners.get(channel, ()):
            queue.put_nowait(message)
