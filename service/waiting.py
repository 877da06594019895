"""Waiting for a session: long polls, rounds and event streams. They hear of commits by any replica, and look again by
themselves from time to time, since a message may be missed.
"""

import asyncio
from collections.abc import AsyncIterator

import orjson

from service.bell import Bell
from service.documents import Event, Stamp
from service.errors import SessionNotFound, StoreUnavailable
from service.heads import Heads
from service.store import Store, key

# A waiter looks by itself every so often, since a message may be missed.
LOOK = 2.0


class Waiting:
    """`start` before use, `stop` in the end."""

    def __init__(self, store: Store, heads: Heads) -> None:
        self._store = store
        self._heads = heads
        self._bell: Bell | None = None

    def start(self) -> None:
        self._bell = Bell(self._store.pubsub_client)
        self._bell.start()

    async def stop(self) -> None:
        if self._bell is not None:
            await self._bell.stop()

    @property
    def _bells(self) -> Bell:
        if self._bell is None:
            raise StoreUnavailable("the engine has not been started")
        return self._bell

    async def _stamp(self, id_: str) -> Stamp:
        head = await self._heads.head(id_)
        return Stamp(head.step, head.mark)

    async def wait(self, id_: str, after: int, seconds: float) -> bool:
        """True as soon as the session's step is greater than `after`; False when `seconds` are over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        async with self._bells.listen(key(id_)) as queue:
            while True:
                if (await self._stamp(id_)).step > after:
                    return True
                look = loop.time() + LOOK
                while (limit := min(deadline, look)) > loop.time():
                    try:
                        async with asyncio.timeout_at(limit):
                            message = (await queue.get()).split(" ")
                    except TimeoutError:
                        break
                    if message[0] == "step" and int(message[1]) > after:
                        return True  # whoever is told so looks at the session anyway
                    if message[0] not in ("step", "round"):
                        break
                if loop.time() >= deadline:
                    return (await self._stamp(id_)).step > after

    async def events(self, id_: str, after: int | None) -> AsyncIterator[Event]:
        """What happens from now on, or from step `after` on; ends with the session."""
        async with self._bells.listen(key(id_)) as queue:
            seen = (await self._stamp(id_)).step if after is None else after
            while True:
                try:
                    now_at = await self._stamp(id_)
                except SessionNotFound:
                    yield Event("deleted", seen, "-")
                    return
                while seen < now_at.step and (lines := await self._store.history(id_, seen, 1000)):
                    for line in lines:
                        step, *_, commit = orjson.loads(line)
                        yield Event("step", step, commit)
                        seen = step
                seen = max(seen, now_at.step)
                for received in await _rounds(queue):
                    if received[0] == seen + 1:  # of one that is closed by now the step says more
                        yield Event("round", seen, now_at.commit, received)


async def _rounds(queue: "asyncio.Queue[str]") -> list[tuple[int, int, int]]:
    """Waits for messages; gives those of contributions to a round: which, how many, of how many."""
    messages = []
    try:
        async with asyncio.timeout(LOOK):
            messages.append(await queue.get())
    except TimeoutError:
        return []
    while not queue.empty():
        messages.append(queue.get_nowait())
    parts = [message.split(" ") for message in messages]
    return [(int(p[1]), int(p[2]), int(p[3])) for p in parts if p[0] == "round"]
