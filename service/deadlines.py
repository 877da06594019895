"""When rounds are over: kept in the store, so that whichever replica is alive sees to it.

The replica that takes in the first contribution of a round enters its deadline before the round is open, and sets an
alarm. Every replica looks at the coming deadlines now and then, and sets alarms for those of others as well, a little
later: by then the replica at which the round is hot has closed it, unless it is not there any more. So a round is
closed within milliseconds of its deadline, and within some tens of them if its replica died. Closing one twice cannot
happen: it is a commit like any other.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

import structlog
from redis.exceptions import RedisError

from core.errors import CoreError
from service.errors import ServiceError, SessionNotFound, StateLost, StoreUnavailable, UnknownFormat
from service.index import Index
from service.store import STAGED_SECONDS

log = structlog.get_logger("ravine.deadlines")

# Seconds between two looks, and by how much an alarm for somebody else's round is later than its deadline.
LOOK, GRACE = 0.25, 0.03
# The loop's timers are a millisecond off the clock at times.
EARLY = 0.001
# A round that cannot be closed when it is due is tried again after so many seconds, for so long: a contribution may
# be in the log later than it was announced, as long as its chunks are kept for it.
AGAIN, LOST = 2.0, 1.5 * STAGED_SECONDS
# So many deadlines are looked at at once. None may stay among the soonest for long, or it would hide others: one that
# cannot be seen to is entered anew, later; of a session that is lost, or of another release, by so many seconds, or up
# to twice as many, which is also how late the round may be closed once the session was accepted.
MANY, POSTPONED = 1000, 10.0

Alarm = tuple[str, int]


class Deadlines:
    """`close(session, round)` closes a round, or raises what stands in its way. `start` before, `stop` in the end."""

    def __init__(self, index: Index, close: Callable[[str, int], Awaitable[object]]) -> None:
        self._index = index
        self._close = close
        self._alarms: dict[Alarm, asyncio.Task[None]] = {}
        self._due: dict[Alarm, float] = {}  # when each of them rings
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """What is not closed by now is another replica's, or the next process's."""
        self._stopped = True
        tasks = [task for task in (self._watcher, *self._alarms.values(), *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def announce(self, session: str, round_: int, due: float) -> None:
        """`round_` may be closed when it is `due`, in Unix seconds. Raises StoreUnavailable, StoreFull."""
        await self._index.announce(session, round_, due)
        if due > time.time():
            self._set(session, round_, due, foreign=False)

    async def put_off(self, session: str, round_: int, due: float) -> None:
        """An alarm rang, and the round is open until `due`: what was entered was of a contribution that somebody else's
        came before, or that never made it into the log. Raises StoreUnavailable, StoreFull.
        """
        await self._index.announce(session, round_, due)
        self._set(session, round_, due, foreign=False)

    def seen_to(self, session: str, round_: int) -> None:
        """It is closed. Nobody waits for the store to know: an alarm too many does nothing."""
        alarm = self._alarms.get((session, round_))
        if alarm is not None and alarm is not asyncio.current_task():
            alarm.cancel()
        if not self._stopped:
            task = asyncio.create_task(self._forget(session, round_))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forget(self, session: str, round_: int) -> None:
        with contextlib.suppress(ServiceError):
            await self._index.seen_to(session, round_)

    async def _watch(self) -> None:
        while True:
            try:
                for session, round_, due in await self._index.deadlines(time.time() + 2 * LOOK, MANY):
                    if (session, round_) not in self._alarms:
                        self._set(session, round_, due + GRACE, foreign=True)
            except StoreUnavailable:
                pass  # who asks for something is told so
            except (ServiceError, RedisError) as error:
                log.warning("deadlines cannot be read", reason=str(error))
            await asyncio.sleep(LOOK)

    def _set(self, session: str, round_: int, at: float, *, foreign: bool) -> None:
        alarm = (session, round_)
        if self._stopped:
            return
        self._due[alarm] = at
        if alarm not in self._alarms:
            task = self._alarms[alarm] = asyncio.create_task(self._watch_over(alarm, foreign=foreign))
            task.add_done_callback(lambda _: self._drop(alarm))

    def _drop(self, alarm: Alarm) -> None:
        del self._alarms[alarm], self._due[alarm]

    async def _watch_over(self, alarm: Alarm, *, foreign: bool) -> None:
        """Rings when it is due; again where it was put off meanwhile, or where the round may yet come to its end."""
        first = at = self._due[alarm]
        while True:
            # A clock that is set back meanwhile makes it early: nothing can be closed then, and the entry must stay.
            await asyncio.sleep(max(0.0, at - time.time() + EARLY))
            settled = await self._ring(*alarm, foreign=foreign)
            if self._due[alarm] > at:
                first = at = self._due[alarm]
            elif settled:
                return
            elif time.time() > first + LOST:
                await self._forget(*alarm)
                return
            else:
                at = self._due[alarm] = time.time() + AGAIN
                with contextlib.suppress(ServiceError):
                    await self._index.postpone(*alarm, at)

    async def _ring(self, session: str, round_: int, *, foreign: bool) -> bool:
        """Whether nothing more is to be done about the round, or not for a while."""
        try:
            if foreign and not await self._index.is_due(session, round_):
                return True
            await self._close(session, round_)
        except SessionNotFound:
            pass
        except (StateLost, UnknownFormat):  # it may be accepted at any time, or be another release's: it goes on then
            return await self._postpone(session, round_)
        except (CoreError, ServiceError) as error:
            # It waits for its quorum, its contribution is on the way to the log, or the store is away.
            log.debug("round not closed yet", session=session, round=round_, reason=str(error))
            return False
        await self._forget(session, round_)
        return True

    async def _postpone(self, session: str, round_: int) -> bool:
        """Whether the store has a later time for it, by which every replica will find it; else this one rings again."""
        at = time.time() + random.uniform(1, 2) * POSTPONED  # not all at once
        try:
            await self._index.postpone(session, round_, at)
        except ServiceError:
            self._due[session, round_] = time.time() + AGAIN
            return False
        return True
