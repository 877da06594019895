"""What the store has of a session, for an operator to look at: nothing is changed, and what is damaged is shown."""

from typing import Any, NamedTuple

import orjson

from service.documents import Stamp
from service.errors import Corrupt
from service.records import Head, LogEntry
from service.store import Store


class Inspection(NamedTuple):
    """`entries` is None, or `snapshot` (its text), where `fault` says why they cannot be read."""

    head: Head
    entries: list[LogEntry] | None
    snapshot: dict[str, str] | None
    fault: str | None


async def inspect(store: Store, session: str) -> Inspection | None:
    """None: no such session. Raises UnknownFormat, Corrupt (where not even the head can be read), StoreUnavailable."""
    try:
        stored = await store.load(session)
    except Corrupt as fault:
        return await _damaged(store, session, str(fault))
    return None if stored is None else Inspection(stored.head, stored.entries, stored.metadata, None)


async def _damaged(store: Store, session: str, fault: str) -> Inspection | None:
    """The log, where it can be read, though not the whole can."""
    head = await store.head(session)
    if head is None:
        return None
    try:
        tail = await store.tail(session, -1)
    except Corrupt:
        return Inspection(head, None, None, fault)
    return None if tail is None else Inspection(tail.head, tail.entries, None, fault)


def described(session: str, found: Inspection) -> dict[str, Any]:
    """As JSON values. Raises Corrupt."""
    head = found.head
    lost = head.lost
    return {
        "id": session,
        "tenant": head.tenant,
        "stands": {"step": head.step, "etag": Stamp(head.step, head.mark).etag, "seq": head.seq},
        "lost": None
        if lost is None
        else {"step": lost.step, "etag": Stamp(lost.step, lost.mark).etag, "seq": lost.seq, "at": lost.at},
        "epoch": head.epoch,
        "updated_at": head.updated_at,
        "snapshot": {"name": head.snap, "bytes": head.length, "seq": head.base, "ok": found.snapshot is not None},
        "log": None if found.entries is None else _log(found),
        "fault": found.fault,
    }


def _log(found: Inspection) -> list[dict[str, Any]]:
    """The entries, each with the step at which the session stands after it; None where the snapshot cannot be read."""
    try:
        rounds = orjson.loads(found.head.document)["aggregation"]["mode"] in ("sync", "buffered")
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"its document is not what was put there: {error}") from None
    step = None if found.snapshot is None else int(found.snapshot["step"])
    lines = []
    for seq, entry in enumerate(found.entries or (), found.head.base + 1):
        kind = entry.metadata.get("kind", "?")
        if step is not None:
            step += kind == ("close" if rounds else "step")
        commit, time = entry.metadata.get("commit"), entry.metadata.get("time")
        lines.append({"seq": seq, "commit": commit, "kind": kind, "step": step, "bytes": entry.size, "time": time})
    return lines
