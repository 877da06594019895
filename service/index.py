"""What the store knows beside the sessions themselves: which there are, and which rounds are due.

    ravine:sessions, ravine:label:KEY:VALUE    sorted sets of the ids of the tenant `default` (ids sort by age)
    ravine:tenant:NAME:sessions, …:label:…     the same of any other tenant
    ravine:tenants      set of the names of these
    ravine:deadlines    sorted set of "id round" by the time (Unix seconds) at which the round may be closed

All of it lies outside of the sessions' hash tags, so it is kept up beside the scripts. An id is entered before its
session exists and leaves after it is gone, and whoever lists drops what is not there. A deadline is entered before its
round is open, and may be of a round that was never opened, or is closed: whoever acts on one looks at the session.

With ack=disk or replicated an id is entered as safely as the session is made, or a label given, which is acknowledged
behind it: nobody would enter it again. What leaves, or is there once too often, is dropped by whoever lists.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

# Whose the sessions are that were made without a key.
DEFAULT_TENANT = "default"
DEADLINES = "ravine:deadlines"
TENANTS = "ravine:tenants"


# What was there already is entered anew: a barrier vouches for what its connection wrote, and for nothing if that was
# nothing. An entry that was not confirmed would be taken for safe when it is sent again.
_ENTER = """
if redis.call('ZADD', KEYS[1], 0, ARGV[1]) == 0 then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('ZADD', KEYS[1], 0, ARGV[1])
end
"""
_ADD = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 0 then
  redis.call('SREM', KEYS[1], ARGV[1])
  redis.call('SADD', KEYS[1], ARGV[1])
end
"""


def tenant_key(tenant: str, *parts: str) -> str:
    """The name of something that a tenant has."""
    prefix = ("ravine",) if tenant == DEFAULT_TENANT else ("ravine", "tenant", tenant)
    return ":".join((*prefix, *parts))


def sessions_key(tenant: str) -> str:
    return tenant_key(tenant, "sessions")


def label_key(tenant: str, label: tuple[str, str]) -> str:
    return tenant_key(tenant, "label", *label)


class Index:
    """`call` sends a command once, `read` one that may be repeated. All methods raise StoreUnavailable, StoreFull.

    `scattered`: this may lie on other servers than the sessions, so that their barrier vouches for none of it.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]], read: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._read = read
        self.scattered = False

    # Sessions

    async def enter(self, tenant: str, session: str, labels: Iterable[tuple[str, str]]) -> None:
        names = [sessions_key(tenant), *(label_key(tenant, label) for label in labels)]
        commands = [("EVAL", _ENTER, 1, name, session) for name in names]
        if tenant != DEFAULT_TENANT:
            commands.append(("EVAL", _ADD, 1, TENANTS, tenant))
        await asyncio.gather(*[self._call(*command, durable=True) for command in commands])

    async def leave(self, tenant: str, session: str, labels: Iterable[tuple[str, str]], *, index: bool = True) -> None:
        names = [*([sessions_key(tenant)] if index else []), *(label_key(tenant, label) for label in labels)]
        await asyncio.gather(*[self._call("ZREM", name, session, durable=self.scattered) for name in names])

    async def ids(self, tenant: str, label: tuple[str, str] | None, after: str | None, limit: int) -> list[str]:
        """Ids, newest first, that come after `after` in that order."""
        name = sessions_key(tenant) if label is None else label_key(tenant, label)
        start = "+" if after is None else f"({after}"
        reply = await self._read("ZRANGE", name, start, "-", "BYLEX", "REV", "LIMIT", 0, limit)
        return [member.decode() for member in reply]

    async def count(self) -> int:
        """The sessions of all tenants; those that are only just being made or ended may be among them."""
        names = [sessions_key(tenant) for tenant in await self.tenants()]
        return sum(await asyncio.gather(*[self._read("ZCARD", name) for name in names]))

    async def tenants(self) -> list[str]:
        """Their names, in order, that of `default` first; some may have no sessions any more."""
        return [DEFAULT_TENANT, *sorted(member.decode() for member in await self._read("SMEMBERS", TENANTS))]

    # Rounds

    async def announce(self, session: str, round_: int, due: float) -> None:
        """`round_` of the session is to be looked at when it is `due`, in Unix seconds."""
        await self._call("ZADD", DEADLINES, repr(due), f"{session} {round_}", durable=self.scattered)

    async def postpone(self, session: str, round_: int, due: float) -> None:
        """`round_` is to be looked at when it is `due`, unless somebody has seen to it meanwhile."""
        await self._call("ZADD", DEADLINES, "XX", repr(due), f"{session} {round_}", durable=self.scattered)

    async def deadlines(self, until: float, limit: int) -> list[tuple[str, int, float]]:
        """Session, round and time of at most `limit` rounds that are due before `until`, soonest first."""
        command = ("ZRANGE", DEADLINES, "-inf", f"({until!r}", "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
        reply = await self._read(*command)
        found = []
        for member, score in zip(reply[::2], reply[1::2], strict=True):
            session, _, round_ = member.decode().partition(" ")
            found.append((session, int(round_), float(score)))
        return found

    async def is_due(self, session: str, round_: int) -> bool:
        """Whether nobody has seen to the round yet."""
        return await self._read("ZSCORE", DEADLINES, f"{session} {round_}") is not None

    async def seen_to(self, session: str, round_: int) -> None:
        await self._call("ZREM", DEADLINES, f"{session} {round_}", durable=self.scattered)
