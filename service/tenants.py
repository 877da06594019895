"""The sessions of each tenant: listed, counted, and no more of them than its quota allows.

Lists and usage are kept up beside the sessions. Both are entered before a session exists and left after it is gone, so
what a crash leaves behind is an entry too many, in the list at any rate, which drops it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from core.errors import CoreError
from service.access.usage import Quota, Usage
from service.errors import QuotaExceeded, ServiceError, StoreFull, StoreUnavailable, UnknownFormat
from service.ids import age_of
from service.records import Head
from service.store import Store

# Seconds after which a session that was entered and is not there will not be made any more.
MAKING = 60


class Tenants:
    """Each may have `quota`. All methods raise StoreUnavailable, those that enter StoreFull too."""

    def __init__(self, store: Store, quota: Quota) -> None:
        self._store = store
        self._usage = Usage(lambda *command: store.link.call(*command), quota)

    async def enter(self, tenant: str, session: str, labels: Mapping[str, str], size: int) -> None:
        """A session that is to be made, of `size` bytes. Raises QuotaExceeded, with nothing entered."""
        await self._store.index.enter(tenant, session, labels.items())
        try:
            await self._usage.take(tenant, session, size)
        except (QuotaExceeded, StoreFull):
            await self._store.index.leave(tenant, session, labels.items())
            raise

    async def leave(self, tenant: str, session: str, labels: Mapping[str, str]) -> None:
        await self._usage.leave(tenant, session)
        await self._store.index.leave(tenant, session, labels.items())

    async def relabel(self, tenant: str, session: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        await self._store.index.enter(tenant, session, after.items())
        if gone := before.items() - after.items():
            await self._store.index.leave(tenant, session, gone, index=False)

    async def page(
        self, tenant: str, label: tuple[str, str] | None, after: str | None, limit: int
    ) -> list[tuple[str, Head | UnknownFormat | None]]:
        """At most `limit` ids, newest first, with their heads; None: not there, not yet or not any more."""
        ids = await self._store.index.ids(tenant, label, after, limit)
        heads, unsettled = await asyncio.gather(self._store.heads(ids), self._usage.unsettled(tenant, ids))
        for session, head in zip(ids, heads, strict=True):
            if isinstance(head, Head) and session in unsettled:
                await self.count(session, head)
        return list(zip(ids, heads, strict=True))

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
        if needed > size:
            token = await self._usage.reserve(tenant, session, size, seq, needed - size)
        try:
            yield
        except (StoreUnavailable, asyncio.CancelledError):
            raise
        except (CoreError, ServiceError):
            await self._settle(tenant, session, token)
            raise
        if needed != size:
            await self._settle(tenant, session, token)

    async def _settle(self, tenant: str, session: str, token: str) -> None:
        with contextlib.suppress(ServiceError):
            head = await self._store.head(session)
            await (self._usage.settle(session, head, token) if head else self._usage.leave(tenant, session))
