"""The sessions of each tenant: listed, counted, and no more of them than its quota allows.

Lists and usage are kept up beside the sessions. Both are entered before a session exists and left after it is gone, so
what a crash leaves behind is an entry too many, in the list at any rate, which drops it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from core.errors import CoreError
from service.access.usage import Quota, Usage
from service.errors import Corrupt, QuotaExceeded, ServiceError, StoreFull, StoreUnavailable, UnknownFormat
from service.ids import age_of
from service.records import Head
from service.store import Store

T = TypeVar("T")
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]

# Seconds after which a session that was entered and is not there will not be made any more. One that takes longer is
# entered once more when it is there.
MAKING = 60
# A tenant's usage is swept at most so often: seconds, and times what it took. Whoever is refused waits for it no longer
# than SWEEP_SECONDS; so many sessions are looked at at once.
SWEEP_SECONDS, SWEEP_SHARE, SWEPT_AT_ONCE = 5.0, 20, 500
_MAX_SWEPT = 4096


class Tenants:
    """Each may have `quota`. All methods raise StoreUnavailable, those that enter StoreFull too."""

    def __init__(self, store: Store, quota: Quota, spawn: Spawn) -> None:
        self._store = store
        self._spawn = spawn
        self._sweeps: dict[str, asyncio.Task[None]] = {}
        self._rests: dict[str, float] = {}  # until when a tenant's usage is not swept again
        self._usage = Usage(lambda *command: store.link.call(*command), quota)

    async def enter(self, tenant: str, session: str, labels: Mapping[str, str], size: int) -> None:
        """A session that is to be made, of `size` bytes. Raises QuotaExceeded, with nothing entered."""
        await self._store.index.enter(tenant, session, labels.items())
        try:
            await self._tried(tenant, lambda: self._usage.take(tenant, session, size))
        except (QuotaExceeded, StoreFull):
            await self._store.index.leave(tenant, session, labels.items())
            raise

    async def made(self, tenant: str, session: str, labels: Mapping[str, str]) -> None:
        """It is there now. Where that took long, whoever listed meanwhile may have dropped it."""
        if age_of(session) > MAKING / 2:
            await self._store.index.enter(tenant, session, labels.items())
            head = await self._store.head(session)
            if head is not None:
                await self.count(session, head)

    async def leave(self, tenant: str, session: str, labels: Mapping[str, str]) -> None:
        await self._usage.leave(tenant, session)
        await self._store.index.leave(tenant, session, labels.items())

    async def relabel(self, tenant: str, session: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        await self._store.index.enter(tenant, session, after.items())
        if gone := before.items() - after.items():
            await self._store.index.leave(tenant, session, gone, index=False)

    async def page(
        self, tenant: str, label: tuple[str, str] | None, after: str | None, limit: int
    ) -> list[tuple[str, Head | UnknownFormat | Corrupt | None]]:
        """At most `limit` ids, newest first, with their heads, or what stands in the way of reading one; None: not
        there, not yet or not any more.
        """
        ids = await self._store.index.ids(tenant, label, after, limit)
        heads, unsettled = await asyncio.gather(self._store.heads(ids), self._usage.unsettled(tenant, ids))
        found = list(zip(ids, heads, strict=True))
        await asyncio.gather(
            *[self.count(session, head) for session, head in found if isinstance(head, Head) and session in unsettled]
        )
        return found

    async def forget(self, tenant: str, session: str, label: tuple[str, str] | None, *, gone: bool) -> None:
        """Drops an id from the list that does not have it, unless it is only just being made."""
        if age_of(session) > MAKING:
            if gone:
                await self._usage.leave(tenant, session)
            await self._store.index.leave(tenant, session, [label] if label else [], index=gone)

    async def count(self, session: str, head: Head) -> None:
        """Enters into the usage what an older release did not, and what a change left that was broken off."""
        with contextlib.suppress(ServiceError):  # there will be another time
            if await self._usage.settle(session, head, make=True) and await self._store.commit_of(session) is None:
                await self._usage.leave(head.tenant, session)  # it was deleted meanwhile

    @contextlib.asynccontextmanager
    async def room(self, tenant: str, session: str, seq: int, size: int, needed: int) -> AsyncIterator[None]:
        """Room for a change of a session that stood at entry `seq` and took `size` bytes. Raises QuotaExceeded.

        Of a change that nobody knows the end of it is not given back: it may still come to be.
        """
        token = ""
        if needed != size:
            more = max(needed - size, 0)
            token = await self._tried(tenant, lambda: self._usage.reserve(tenant, session, size, seq, more))
        try:
            yield
        except (StoreUnavailable, asyncio.CancelledError):
            raise
        except (CoreError, ServiceError):
            if token:
                await self._settle(tenant, session, token)
            raise
        if token:
            await self._settle(tenant, session, token)

    async def _settle(self, tenant: str, session: str, token: str) -> None:
        with contextlib.suppress(ServiceError):
            head = await self._store.head(session)
            await (self._usage.settle(session, head, token) if head else self._usage.leave(tenant, session))

    # What is counted and not there

    async def _tried(self, tenant: str, take: Callable[[], Awaitable[T]]) -> T:
        """`take`, once more if the quota refuses it and the usage was swept meanwhile."""
        try:
            return await take()
        except QuotaExceeded:
            sweep = self._sweeps.get(tenant) or self._begin_sweep(tenant)
            if sweep is None:
                raise
            await asyncio.wait((sweep,), timeout=SWEEP_SECONDS)
        return await take()

    def _begin_sweep(self, tenant: str) -> "asyncio.Task[None] | None":
        """None if that was done only just now."""
        if time.monotonic() < self._rests.get(tenant, 0.0):
            return None
        sweep = self._sweeps[tenant] = self._spawn(self._sweep(tenant))
        return sweep

    async def _sweep(self, tenant: str) -> None:
        """Drops what a crash between the end of a session, or its making, and its entry has left."""
        began = time.monotonic()
        try:
            with contextlib.suppress(ServiceError):  # there will be another time
                old = [session for session in await self._usage.sessions(tenant) if age_of(session) > MAKING]
                for start in range(0, len(old), SWEPT_AT_ONCE):
                    await self._sweep_some(tenant, old[start : start + SWEPT_AT_ONCE])
        finally:
            del self._sweeps[tenant]
            if len(self._rests) >= _MAX_SWEPT:
                self._rests.clear()
            now = time.monotonic()
            self._rests[tenant] = now + max(SWEEP_SECONDS, SWEEP_SHARE * (now - began))

    async def _sweep_some(self, tenant: str, sessions: list[str]) -> None:
        standing = await self._store.standing(sessions)
        gone = [session for session, stands in zip(sessions, standing, strict=True) if stands is None]
        await asyncio.gather(*[self.leave(tenant, session, {}) for session in gone])
