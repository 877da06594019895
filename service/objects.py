"""What a client is shown of what the store has: the session object, a line of the history."""

from typing import Any

import orjson

from service.documents import Record
from service.errors import Corrupt
from service.records import Head


def record_of(line: list[Any]) -> Record:
    """A line of the history: with what a step costs of privacy before its commit, where that is counted."""
    return Record(*line[:6])._replace(epsilon=line[6] if len(line) > 7 else None)


def session_object(id_: str, head: Head) -> dict[str, Any]:
    """What a client is shown of a session. Raises Corrupt."""
    try:
        return _shown(id_, head)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"the document of {id_} is not what was put there: {error}") from None


def _shown(id_: str, head: Head) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(head.document)
    size, slot_bytes, round_bytes = (document.pop(name, 0) for name in ("size", "slot_bytes", "round_bytes"))
    held = size * (8 if document["dtype"] == "float64" else 4) if head.held else 0
    first = {"id": id_, "name": document.pop("name"), "labels": document.pop("labels"), "step": head.step}
    last = {"size": size, "state_bytes": slot_bytes + held, "round_bytes": round_bytes}
    last |= {"holds_params": head.held, "skipped": head.skipped}
    created = document.pop("created_at")
    return first | document | last | {"created_at": created, "updated_at": head.updated_at}
