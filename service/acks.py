"""What is waited for before a change is acknowledged: nothing more than the store's reply, its disk, or its replicas.

A barrier is a few commands that follow a change on the connection that brought it, and their replies say whether the
change is safe by now. It must be the same connection, because that is the same server: one that was failed over to in
between would swear to what it never had. And the change must have written something, because what the server waits for
is the last write of the connection. Whatever was written on that server before is safe with it: the log on the disk and
the stream to the replicas are each one line.

`replicated` is WAIT. `disk` is `appendfsync always`, under which the server syncs before it replies, seen to be set at
each barrier; and WAITAOF, where the server has it. **WAITAOF alone would not do**: under `appendfsync everysec` Valkey
answers it within 0.2 s, and without a sync 56 times in 60 (9.1, seen with strace; redis/redis#13793 tells of the same
in Redis 7.4). So `everysec` is refused, whoever the server is. Nobody gains by it: each change would wait for up to a
second, where `always` costs one sync (0.1 ms and more, by the disk), shared by all that come meanwhile.

A log that is only being begun is none yet: after `CONFIG SET appendonly yes` the settings are as they must be at once,
but until its first rewrite is done a restart finds no log, or an old one. WAITAOF waits for that. A server without it
(Redis before 7.2) is asked for `INFO persistence`, which tells that a rewrite is under way, and not which one it is. An
ordinary one, beside a whole log, takes nothing away. So each server is remembered, by its run_id, with how it was last
seen. Where it was not seen before its rewrite began, a first one is told by a base of no size (`aof_base_size`); one
that begins the log anew where there had been one looks like an ordinary one, and is taken for it.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

from redis.exceptions import ResponseError

Ack = Literal["memory", "disk", "replicated"]

# How long replicas, or the disk, may take. Longer, and a client's own patience ends before it is told.
SECONDS: Final = 3.0
# Each must be so, or the reply of a server is not worth its sync. Asked for one by one: Redis 6.2 knows no other way.
_DISK: Final = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
# What a server without WAITAOF is asked for, too; one by one for the same reason.
_INFO: Final = ("server", "persistence")
_LINE: Final = re.compile(rb"^(\w+):([^\r\n]*)", re.MULTILINE)


class AckImpossible(RuntimeError):
    """The store cannot give what was asked for; the sentence says why, and what would help."""


class Asked(NamedTuple):
    """What is to be waited for; `replicas` of them where that is `replicated`, for at most `seconds`."""

    ack: Ack = "memory"
    replicas: int = 1
    seconds: float = SECONDS


class Barrier:
    """`commands` to send behind a change, and what their replies mean.

    `waitaof`: whether the server has that command. It catches what the settings do not show: a server that cannot
    sync just now, or has only begun its log.
    """

    def __init__(self, asked: Asked, *, waitaof: bool) -> None:
        self.seconds = asked.seconds
        self._asked = asked
        self._waitaof = waitaof
        self._whole: dict[str, bool] = {}  # run_id -> whether the server had a whole log when that could last be told
        milliseconds = round(asked.seconds * 1000)
        self.commands: list[tuple[str | int, ...]]
        if asked.ack == "replicated":
            self.commands = [("WAIT", asked.replicas, milliseconds)]
        else:
            # First, so that the settings are those after the sync.
            self.commands = [("WAITAOF", 1, 0, milliseconds)] if waitaof else [("INFO", part) for part in _INFO]
            self.commands += [("CONFIG", "GET", name) for name in _DISK]

    def missing(self, replies: Sequence[Any]) -> str | None:
        """What stands in the way, by the replies to `commands` (exceptions among them); None: the change is safe."""
        if self._asked.ack == "replicated":
            return self._replicas(replies[0])
        first, settings = replies[: -len(_DISK)], replies[-len(_DISK) :]
        log = self._synced(first[0]) if self._waitaof else self._begun(first)
        return _settings(settings) or log

    def _synced(self, reply: Any) -> str | None:
        if isinstance(reply, Exception):
            return f"the store refuses WAITAOF: {reply}"
        return None if reply[0] >= 1 else f"the store has not synced its log within {self.seconds:g} s"

    def _begun(self, replies: Sequence[Any]) -> str | None:
        """By INFO: what stands in the way of a log that may not be whole yet. Remembers how the server was seen."""
        for part, reply in zip(_INFO, replies, strict=True):
            if isinstance(reply, Exception):
                return f"the store does not tell its INFO {part}: {reply}"
        told = dict(_LINE.findall(b"\n".join(replies)))
        server = told.get(b"run_id", b"").decode()
        if told.get(b"aof_enabled") != b"1":
            self._whole[server] = False
        elif told.get(b"aof_rewrite_in_progress") == told.get(b"aof_rewrite_scheduled") == b"0":
            self._whole[server] = True
        elif not self._whole.get(server, told.get(b"aof_base_size", b"0") != b"0"):
            return "the store is only beginning its log, and has none to load before its first rewrite is done"
        return None

    def _replicas(self, reply: Any) -> str | None:
        wanted = self._asked.replicas
        if isinstance(reply, Exception):
            return f"the store refuses WAIT: {reply}"
        return None if reply >= wanted else f"{reply} of {wanted} replicas have it after {self.seconds:g} s"


def _settings(replies: Sequence[Any]) -> str | None:
    for name, reply in zip(_DISK, replies, strict=True):
        if isinstance(reply, Exception):
            return f"the store does not tell its {name}: {reply}"
        found = reply[1].decode() if len(reply) == 2 else "unknown"
        if found != _DISK[name]:
            return f"the store's {name} is {found}, and must be {_DISK[name]} for ack=disk"
    return None


async def barrier_of(asked: Asked, ask: Callable[..., Awaitable[Any]]) -> Barrier | None:
    """The barrier for what was asked, None where the store's reply is enough. `ask` sends a command to the store.

    Raises RedisError, OSError.
    """
    if asked.ack == "memory":
        return None
    return Barrier(asked, waitaof=asked.ack == "disk" and await _has_waitaof(ask))


async def _has_waitaof(ask: Callable[..., Awaitable[Any]]) -> bool:
    try:
        await ask("WAITAOF", 0, 0, 1)  # waits for nothing
    except ResponseError as error:  # any other refusal will be seen when it is tried
        return "unknown command" not in str(error).lower()
    return True
