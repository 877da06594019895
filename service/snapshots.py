"""Snapshots: when the log of a session outweighs its state threefold, the state is written anew and the log is cut.

Two bounds are for who reads it again. All that a log weighs is read by whoever loads the session, and lies in the store
beside the state, so it may weigh no more than SPARE beyond the state. And each entry is replayed, however few bytes it
has: three times a state of 51 MB are 380,000 row-sparse entries, or 25 minutes at 4 ms each. So there are ENTRIES at
most.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from core.layout import Array
from service import live as files
from service.errors import ServiceError
from service.live import Live
from service.records import Head, chunks_of
from service.store import Store
from service.wire import safetensors

log = structlog.get_logger("ravine.snapshots")

SNAPSHOT_FLOOR = 64 * 1024
# A state of so many bytes is not copied for its snapshot.
COPIED = 4 * 1024 * 1024
# So many times as much as the state may the log weigh. A snapshot of Adam's state is three gradients:
# with one in three steps as much went into snapshots as into the log, and a third of a step's time; with one in nine it
# is a third as much. The price is memory in the store, and a longer log to replay.
OUTWEIGHS = 3
SPARE = 1 << 30  # bytes
ENTRIES = 10_000


class Snapshots:
    """`spawn` starts a task that the engine waits for when it stops; `brief` makes JSON of a document."""

    def __init__(
        self,
        store: Store,
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
        brief: files.DocumentWriter,
    ) -> None:
        self._store = store
        self._spawn = spawn
        self._brief = brief

    async def write_if_due(self, live: Live) -> None:
        """A small session's snapshot is written from a copy while it goes on; a large one waits for it.

        A copy of Adam's slots weighs twice the gradient, and beside a step that would more than double what the step
        takes. The bytes go through the same event loop either way, so waiting costs one step in a few some latency.
        """
        if live.snapshot is not None or not _is_due(live):
            return
        if live.session.state.nbytes < COPIED:
            self.begin(live)
        else:
            await self._write(live, *_basis(live), *files.snapshot(live, self._brief, copy=False))

    def begin(self, live: Live) -> None:
        """Writes a snapshot in the background."""
        live.snapshot = self._spawn(self._write(live, *_basis(live), *files.snapshot(live, self._brief, copy=True)))

    async def _write(
        self,
        live: Live,
        old: Head,
        log_: Sequence[files.Logged],
        tensors: Mapping[str, Array],
        text: Mapping[str, str],
    ) -> None:
        """Writes the state as it was at `old`; `log_` are the entries up to there that no snapshot holds yet."""
        snap, pieces = secrets.token_hex(4), safetensors.write(tensors, text)
        gone = [(entry.commit, entry.chunks) for entry in log_]
        try:
            outcome = await self._store.snapshot(live.id, old, gone, old.seq, snap, pieces)
            if outcome == "OK":
                live.rebase(snap, sum(1 for _ in chunks_of(pieces)), old.seq)
            elif (head := await self._store.head(live.id)) is not None:  # another replica was first
                live.rebase(head.snap, head.chunks, head.base)
        except ServiceError as error:
            # Or a store that is full would be sent one after every step.
            live.unwritten, live.unwritten_entries = live.log_bytes, len(live.log)
            log.warning("snapshot not written", session=live.id, reason=str(error))
        finally:
            live.snapshot = None


def _is_due(live: Live) -> bool:
    """Whether the log has become too heavy for the state, or too long."""
    if len(live.log) - live.unwritten_entries >= ENTRIES:
        return True
    new = live.log_bytes - live.unwritten
    if new <= SNAPSHOT_FLOOR:  # of most sessions, after most steps
        return False
    weight = live.session.state.nbytes
    return new > min(OUTWEIGHS * weight, weight + SPARE)


def _basis(live: Live) -> tuple[Head, list[files.Logged]]:
    """What a snapshot of `live` as it is now goes by, while `live` itself may go on."""
    return replace(live.head), list(live.log)
