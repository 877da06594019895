"""Loading a session: its snapshot, then the entries since, each replayed while the next ones are read.

A log may weigh three times the state, or 1 GiB more than it. Its payloads are never in memory all together: what is
read ahead is one batch of entries, of at most AHEAD bytes or a single one. What lies in the log itself comes with the
head at once: of each entry at most records.INLINE bytes of tensors, and there are no more than snapshots.ENTRIES.

The session is nobody's before its last entry is replayed and its head is the one that was looked at, so whatever goes
wrong on the way leaves nothing behind.

Whoever writes a snapshot meanwhile cuts the log that is being read. Then all begins anew, once: the second time the
whole log is read before any of it is replayed, or a session that is slow to replay and stepped on elsewhere would be
cut each time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog

from core.evaluate import Evaluator
from service import live as files
from service.errors import Corrupt
from service.live import THREADED, DocumentReader, Live
from service.records import CutMeanwhile, LogEntry, Looked, again, weight_of
from service.store import Store

log = structlog.get_logger("ravine.engine")

LARGE = 64 * 1024 * 1024
AHEAD = 16 * 1024 * 1024
# Entries that have no bytes to speak of are read and replayed so many at a time.
ENTRIES = 256


class Loader:
    """`compute(threaded, function, *arguments)` works something out, in a thread if it is much."""

    def __init__(
        self,
        store: Store,
        compute: Callable[..., Awaitable[Any]],
        read_document: DocumentReader,
        evaluator: Evaluator,
    ) -> None:
        self._store = store
        self._compute = compute
        self._read_document = read_document
        self._evaluator = evaluator

    async def load(self, id_: str, look: Callable[[], Awaitable[Looked]]) -> Live:
        """The session as the store has it; `look` says where that is, as often as it is begun anew.

        Raises UnknownFormat, Corrupt, StoreUnavailable and what `look` does.
        """
        missed, whole = "", False
        started = time.monotonic()
        while True:
            looked = await look()
            try:
                live = await self._loaded(id_, looked, whole=whole)
            except CutMeanwhile as missing:
                missed, whole = again(missing, looked.head, missed), True
            else:
                break
        self._store.meters.loads += 1
        if looked.head.length > LARGE:
            log.info(
                "session loaded",
                session=id_,
                megabytes=round(looked.head.length / 1e6),
                entries=len(live.log),
                log_megabytes=round(live.log_bytes / 1e6),
                seconds=round(time.monotonic() - started, 2),
            )
        return live

    async def _loaded(self, id_: str, looked: Looked, *, whole: bool) -> Live:
        """Raises CutMeanwhile."""
        head, elements = looked.head, looked.elements or []
        batches = [elements] if whole else _batches(elements)
        large = head.length >= THREADED
        if head.length > LARGE:
            log.info("loading session", session=id_, megabytes=round(head.length / 1e6), entries=len(elements))
        tensors, text = await self._store.reader.snapshot(id_, head)
        coming = self._read(id_, batches[0]) if batches else None
        try:
            live: Live = await self._compute(
                large, files.revive, id_, head, text, tensors, self._read_document, self._evaluator
            )
            for following in [*batches[1:], None] if batches else []:
                assert coming is not None
                entries = await coming
                coming = None if following is None else self._read(id_, following)
                await self._compute(large, self._replay, live, entries)
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        if live.head.commit != head.commit:
            raise Corrupt(f"the log of {id_} ends at {live.head.commit!r}, the head is {head.commit!r}")
        return live

    def _read(self, id_: str, elements: Sequence[bytes]) -> asyncio.Task[list[LogEntry]]:
        return asyncio.create_task(self._store.reader.entries(id_, elements))

    def _replay(self, live: Live, entries: list[LogEntry]) -> None:
        """Takes each out of the list, so that its arrays go as soon as they are of no use."""
        entries.reverse()
        while entries:
            files.replay(live, entries.pop(), self._read_document)


def _batches(elements: Sequence[bytes]) -> list[list[bytes]]:
    """The elements of a log, as many together as are read at once."""
    batches: list[list[bytes]] = []
    left = 0
    for element in elements:
        weight = weight_of(element)
        if not batches or weight > left or len(batches[-1]) == ENTRIES:
            batches.append([])
            left = AHEAD
        batches[-1].append(element)
        left -= weight
    return batches
