"""How many sessions each tenant has and how many bytes they take, counted in the store, for all replicas together.

    ravine:usage, ravine:tenant:NAME:usage    hash of id -> "bytes seq", and `total`, the sum of all bytes

A session takes what its state takes at most: parameters, slots and open round, the number that `max_state` bounds. It
is entered before the session exists, by a script that looks at the quota and enters in one, so two that are made at
once cannot pass it together; it leaves after the session is gone. The hash lies outside of the sessions' hash tags, so
it is kept up beside their scripts, like the lists: whoever lists drops what is not there, and enters what an older
release did not.

A change of the recipe that needs more takes that before it is committed: " token:bytes:time" behind its session's
entry, so that two changes do not live on the room of one. It is given back when the entry is settled by what the head
says; `seq` is the sequence number of the head, for replicas that settle late. Of a change that nobody knows the end of
the room stays taken until it is old. One that needs less is written there too, with no bytes: so the entry is settled
by whoever meets the session next, if whoever made the change broke off.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from core.recipe import Recipe
from service.access.script import Call, Script
from service.errors import Fault, InvalidRequest, QuotaExceeded, Standing
from service.index import tenant_key
from service.link import Argument
from service.records import Head
from service.wire import safetensors

# Nothing becomes free by itself: somebody has to delete a session first.
RETRY_AFTER = 60
# Seconds after which a change that was not settled will come to nothing any more.
FORGOTTEN = 600


class Quota(NamedTuple):
    """What each tenant may have: sessions, and bytes of state in all. None: as much as there is."""

    sessions: int | None = None
    state: int | None = None


UNLIMITED = Quota()


def bytes_of(recipe: Recipe) -> int:
    """What the state takes at most: the parameters, held or not, the slots, and a round before it is closed."""
    return recipe.state_bytes() + recipe.layout.size * recipe.numpy_dtype.itemsize + recipe.round_bytes()


def bytes_in(head: Head) -> int:
    """The same, of what is stored."""
    document: Mapping[str, Any] = orjson.loads(head.document)
    width = 8 if document["dtype"] == "float64" else 4
    sizes: list[int] = [document.get(name, 0) for name in ("size", "slot_bytes", "round_bytes")]
    return sizes[0] * width + sizes[1] + sizes[2]


def check_size(recipe: Recipe, most: int, where: str) -> None:
    """Raises InvalidRequest, before any array is made, for a state with more bytes or tensors than one may have."""
    needed = bytes_of(recipe)
    if needed > most:
        sentence = f"parameters, slots and rounds would take {needed} bytes; a session may have {most}"
        raise InvalidRequest([Fault(where, sentence)])
    named = len(recipe.layout.slots) * (1 + len(recipe.slots)) + len(recipe.own) + recipe.aggregation.kept
    if named > safetensors.MAX_TENSORS:
        sentence = f"the checkpoint would have {named} tensors; {safetensors.MAX_TENSORS} are read back"
        raise InvalidRequest([Fault(where, sentence)])


class Usage:
    """`call` sends one command to the store. All methods raise StoreUnavailable; those that enter, StoreFull."""

    def __init__(self, call: Call, quota: Quota) -> None:
        self._call = call
        self._quota = quota
        here = Path(__file__).parent
        self._take, self._settle, self._leave = (
            Script(call, (here / f"{name}.lua").read_text()) for name in ("take", "settle", "leave")
        )

    async def take(self, tenant: str, session: str, size: int) -> None:
        """Enters a session of `size` bytes that is to be made. Raises QuotaExceeded, with nothing entered."""
        await self._enter(tenant, session, size, 0, 0, "")

    async def reserve(self, tenant: str, session: str, size: int, seq: int, more: int) -> str:
        """Takes `more` bytes, or none, for a change of a session of `size` bytes; the token to settle it with.

        Raises QuotaExceeded, with nothing taken.
        """
        token = secrets.token_hex(4)
        await self._enter(tenant, session, size, seq, more, token)
        return token

    async def _enter(self, tenant: str, session: str, size: int, seq: int, more: int, token: str) -> None:
        most: list[int | str] = ["" if limit is None else limit for limit in self._quota]
        arguments = [session, size, seq, more, token, int(time.time()), *most]
        outcome, *found = await self._take([tenant_key(tenant, "usage")], arguments)
        if outcome == b"OK":
            return
        here, quota = int(found[0]), self._quota
        if outcome == b"sessions" and quota.sessions is not None:
            sentence = f"there are {here} sessions, and may be {quota.sessions}: delete some that are done"
            standing = Standing("sessions", quota.sessions, 0, RETRY_AFTER, unit="sessions")
            raise QuotaExceeded("sessions", sentence, standing)
        if quota.state is not None:
            sentence = f"{here} bytes of {quota.state} are taken, and this would take {more or size} more"
            standing = Standing("state", quota.state, max(quota.state - here, 0), RETRY_AFTER, unit="bytes")
            raise QuotaExceeded("state", sentence, standing)

    async def settle(self, session: str, head: Head, token: str = "", *, make: bool = False) -> bool:
        """Corrects the entry to what `head` says, unless it is of a newer one, and ends the change of this `token`.

        `make`: an entry that is missing is made, whatever the quota. True if one was: the session may be gone since.
        """
        oldest = int(time.time()) - FORGOTTEN
        arguments: list[Argument] = [session, bytes_in(head), head.seq, token, oldest, int(make)]
        made: int = await self._settle([tenant_key(head.tenant, "usage")], arguments)
        return made == 1

    async def leave(self, tenant: str, session: str) -> None:
        await self._leave([tenant_key(tenant, "usage")], [session])

    async def sessions(self, tenant: str) -> list[str]:
        """All that are entered."""
        return [name.decode() for name in await self._call("HKEYS", tenant_key(tenant, "usage")) if name != b"total"]

    async def unsettled(self, tenant: str, sessions: Sequence[str]) -> set[str]:
        """Those of `sessions` that have no entry, or one with changes that were not settled, or not yet."""
        if not sessions:
            return set()
        found = await self._call("HMGET", tenant_key(tenant, "usage"), *sessions)
        return {id_ for id_, entry in zip(sessions, found, strict=True) if entry is None or entry.count(b" ") > 1}
