"""Everything that knows Redis: key names, log, snapshots, scripts.

A session is a head (hash), a snapshot, and the log of the entries since. All stored values are safetensors files:
tensors by name, the rest as text in `__metadata__`. What comes back is checked (length, checksum, form)
before it is used.

    ravine:{ses_…}:head          commit, step, seq, base, snap, document, …
    ravine:{ses_…}:log           list of the entries base+1 … seq, each a file, or a file that names its payload
    ravine:{ses_…}:history       list of one JSON array per step, the last 10,000
    ravine:{ses_…}:s:SNAP:I      the snapshot, in chunks
    ravine:{ses_…}:p:COMMIT:I    the payload of a large entry, in chunks
    ravine:{ses_…}:t:TOKEN:I     chunks on their way; they expire
    ravine:{ses_…}:blobs         set of the names of all payload chunks, and of the trail
    ravine:{ses_…}:trail         list of the commits of the last 10,000 entries that were cut off the log

What is not of one session (the lists of sessions, the deadlines of rounds) is in index.py.

The braces are the hash tag: a session lies on one node of a cluster, so a script may touch all of it.
Staging: 12 MB in chunks renamed into place take 5.7 ms, as arguments of the script 35.7 ms; 40 bytes as arguments
0.15 ms, staged 0.93 ms. So small entries go inline, large ones staged.
"""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import redis.asyncio as aioredis
import xxhash
from redis.exceptions import NoScriptError, RedisError

from service.access.keys import Keyring
from service.acks import Asked, barrier_of
from service.cluster import ClusterLink
from service.errors import Corrupt, StoreFull, StoreUnavailable, Unconfirmed, UnknownFormat
from service.failpoints import Failpoints
from service.index import DEADLINES, DEFAULT_TENANT, Index
from service.link import Argument, Link, SingleLink, tried
from service.meters import StoreMeters
from service.reading import Reader, Values
from service.records import (
    INLINE,
    Head,
    Known,
    LogItem,
    Pieces,
    Staged,
    Stored,
    Tail,
    chunks_of,
    commit_mark,
    count_of,
    element_of,
    flatten,
    head_of,
    lost_text,
    message_of,
    readable,
    state_lost,
)
from service.wire import safetensors

STAGED_SECONDS = 120
# So many commits of entries that were cut off the log are remembered.
TRAIL = 10_000
NO_FAILPOINTS = Failpoints()
MEMORY = Asked()
# What keeps two replicas from appending to one commit.
_HEAD_CHECK = "if head ~= ARGV[1] then return {'STALE'} end"
_SCRIPTS = ("commit", "snapshot", "delete", "load", "history", "skip", "lose", "accept", "confirm")

Outcome = Literal["OK", "STALE", "GONE"]
_OUTCOMES: dict[bytes, Outcome] = {b"OK": "OK", b"GONE": "GONE"}


def key(session: str, *parts: str | int) -> str:
    return ":".join((f"ravine:{{{session}}}", *map(str, parts)))


class Store:
    """`patience` is how many seconds a read goes on trying while the store is away, `asked` what is waited for before
    a change counts as done.
    """

    def __init__(
        self, url: str, patience: float = 2.0, failpoints: Failpoints = NO_FAILPOINTS, asked: Asked = MEMORY
    ) -> None:
        self._url = url
        self._asked = asked
        self.durable = asked.ack != "memory"
        self._patience = patience
        self._failpoints = failpoints
        self._link: Link | None = None
        self._scripts: dict[str, tuple[str, str]] = {}  # name -> (sha, text)
        self.pubsub_client: Any = None
        self.meters = StoreMeters()
        values = Values(self._read, lambda name: self.link.dial(name), self._retimed)
        self.reader = Reader(key, self._load, values)
        self.index = Index(lambda *command, durable: self.link.call(*command, durable=durable), self._read)
        self.keyring = Keyring(lambda *command: self.link.call(*command, durable=True), self._read)

    # Connecting

    async def open(self) -> None:
        """Raises StoreUnavailable, and AckImpossible where the store cannot give what is to be waited for."""
        name = f"ravine:{os.getpid()}"
        single = aioredis.Redis.from_url(self._url, protocol=2, client_name=name, single_connection_client=True)
        try:
            mode = (await single.info("cluster")).get("cluster_enabled", 0)
            barrier = await barrier_of(self._asked, single.execute_command)
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"the store does not answer: {error}") from None
        finally:
            await single.aclose()
        opened = ClusterLink.opened if mode else SingleLink.opened
        self._link = await opened(self._url, name, barrier)
        self.index.scattered = bool(mode)
        self.pubsub_client = (
            self._link.client
            if isinstance(self._link, ClusterLink)
            else aioredis.Redis.from_url(self._url, protocol=2, client_name=name, health_check_interval=5)
        )
        for script in _SCRIPTS:
            text = (Path(__file__).parent / f"{script}.lua").read_text()
            if script == "commit" and self._failpoints.armed("blind"):
                text = text.replace(_HEAD_CHECK, "")
            self._scripts[script] = (hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), text)
        if self.durable:
            await tried(self._link, self._asked.ack)

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()
        if self.pubsub_client is not None:
            await self.pubsub_client.aclose()

    @property
    def link(self) -> Link:
        if self._link is None:
            raise StoreUnavailable("the store is not open yet")
        return self._link

    async def ping(self) -> None:
        """Raises StoreUnavailable."""
        async with asyncio.timeout(2):
            await self.link.call("EXISTS", DEADLINES)

    async def _script(
        self,
        name: str,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        alone: bool = False,
        durable: bool = False,
    ) -> Any:
        sha, text = self._scripts[name]
        rest = (len(keys), *keys, *arguments)
        try:
            return await self._timed(name, self.link.call("EVALSHA", sha, *rest, alone=alone, durable=durable))
        except NoScriptError:
            return await self._timed(name, self.link.call("EVAL", text, *rest, alone=alone, durable=durable))

    async def _read(self, *command: Argument, alone: bool = False) -> Any:
        return await self._patiently(lambda: self._timed("read", self.link.call(*command, alone=alone)))

    async def _load(self, keys: Sequence[str], arguments: Sequence[Argument], *, alone: bool) -> Any:
        return await self._patiently(lambda: self._script("load", keys, arguments, alone=alone))

    async def _retimed(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        return await self._patiently(lambda: self._timed("read", attempt()))

    async def _timed(self, call: str, reply: Awaitable[Any]) -> Any:
        started = perf_counter()
        try:
            return await reply
        except (StoreUnavailable, StoreFull):
            self.meters.failed(call)
            raise
        finally:
            self.meters.answered(call, started)

    async def _patiently(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """A read may be repeated, so a store that comes back soon is waited for."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while True:
            try:
                return await attempt()
            except StoreUnavailable:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(0.05)

    # Writing

    async def append(self, session: str, parent: str, items: Sequence[LogItem]) -> Outcome:
        """Appends `items` if the head still is `parent`.

        Raises StoreUnavailable where it is unknown whether it did (see `landed`), Unconfirmed where it did and may yet
        be lost, StoreFull where it did not.
        """
        await self._failpoints.reach("before-append")
        elements: list[Argument] = []
        temporary: list[str] = []
        final: list[str] = []
        for item in items:
            await self._prepare(session, item)
            elements.append(element_of(item))
            if item.staged is not None:
                temporary += [key(session, "t", item.staged.token, i) for i in range(item.staged.chunks)]
                final += [key(session, "p", item.commit, i) for i in range(item.staged.chunks)]
        records: list[Argument] = [item.record for item in items if item.record is not None]
        fields: dict[str, Argument] = {}
        for item in items:
            fields.update(item.head)
        last = items[-1].commit
        keys = [key(session, part) for part in ("head", "log", "history", "blobs")] + temporary + final
        step = fields["step"]
        assert isinstance(step, int)
        arguments: list[Argument] = [parent, last, len(elements), len(records), len(temporary)]
        arguments += [key(session), message_of(items, step, last), *elements, *records, *flatten(fields)]
        if temporary:
            await self._failpoints.reach("after-staging")
        reply = await self._script("commit", keys, arguments, durable=True)
        await self._failpoints.reach("after-append")
        if reply[0] == b"LOST":  # the chunks expired on the way; they are put there again
            for item in items:
                item.staged = None
            return await self.append(session, parent, items)
        outcome = _outcome(reply[0])
        if outcome == "OK":
            items[-1].epoch = count_of(reply[1] or b"0")
            self.meters.appended([item.size for item in items])
        else:
            self._drop(temporary)
        return outcome

    async def _prepare(self, session: str, item: LogItem) -> None:
        """Large tensors are put into the store before the script runs; once, however often it has to run."""
        size = sum(array.nbytes for array in item.tensors.values())
        if size <= INLINE or item.staged is not None:
            return
        pieces = safetensors.write(item.tensors)
        item.staged = await self._stage(session, pieces)
        item.size = item.staged.length

    async def _stage(self, session: str, pieces: Pieces) -> Staged:
        token = os.urandom(8).hex()
        digest = xxhash.xxh3_64()
        chunks = list(chunks_of(pieces))
        sent: list[Awaitable[Any]] = []
        for i, chunk in enumerate(chunks):
            digest.update(chunk)
            put = self.link.call("SET", key(session, "t", token, i), chunk, "EX", STAGED_SECONDS)
            sent.append(self._timed("stage", put))
        results = await asyncio.gather(*sent, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return Staged(token, len(chunks), safetensors.nbytes(pieces), digest.hexdigest())

    def _drop(self, temporary: Sequence[str]) -> None:
        """Takes back chunks that nothing will be made of. Nobody waits for it: they expire anyway, but much later."""
        if temporary:
            self.link.call("UNLINK", *temporary).add_done_callback(_seen)

    async def landed(self, session: str, parent: str, commit: str, after: int) -> Outcome | None:
        """What became of an append to `parent` whose reply was lost; `after` is the sequence number before it.

        None: it did not go through so far, and may still do so, since the session stands at `parent`. Once it stands
        anywhere else, what this says is final.
        """
        now_at = await self.commit_of(session)
        if now_at in (parent, commit, None):
            return {parent: None, commit: "OK", None: "GONE"}[now_at]
        tail = await self.tail(session, after)
        if tail is None:
            return "GONE"
        if tail.head.lost is not None:
            raise state_lost(session, tail.head)
        if tail.entries is not None:
            found = any(entry.metadata.get("commit") == commit for entry in tail.entries)
            return "OK" if found else "STALE"
        return await self._landed_before(session, commit, after)

    async def _landed_before(self, session: str, commit: str, after: int) -> Outcome:
        """Whether `commit` is among the entries behind `after`, of which the log has not all any more: the trail names
        the commits of those that were cut, the history those of the steps.
        """
        tail = await self.tail(session, -1)
        if tail is None:
            return "GONE"
        ends = ("HMGET", key(session, "head"), "base", "trail")
        before = await self._read(*ends)
        trail = await self._read("LRANGE", key(session, "trail"), 0, -1)
        lines = await self._read("LRANGE", key(session, "history"), 0, -1)
        texts = [entry.metadata.get("commit", "").encode() for entry in tail.entries or ()]
        if commit.encode() in (*texts, *trail) or any(commit.encode() in line for line in lines):
            return "OK"
        # It was cut no further while it was read, so that it reaches from there to what the log had before.
        base, ended = await self._read(*ends)
        if [base, ended] == before and base == ended and int(base) - len(trail) <= after:
            return "STALE"
        raise StoreUnavailable("whether the last write took effect cannot be told any more; read the session anew")

    async def create(self, session: str, snap: str, pieces: Pieces, fields: Mapping[str, Argument]) -> None:
        """The first snapshot of a new session, at sequence number 0."""
        created = {"seq": 0, "skipped": 0, **fields}
        await self._put_snapshot(session, None, [], 0, snap, pieces, created)

    async def snapshot(
        self, session: str, old: Head, gone: Sequence[tuple[str, int]], seq: int, snap: str, pieces: Pieces
    ) -> Outcome:
        """Puts a snapshot of the state after entry `seq`, which is `old.commit`, in place of `old`'s, and cuts the log.

        `gone` are the (commit, chunks) of the entries that the snapshot makes superfluous.
        """
        names = [key(session, "s", old.snap, i) for i in range(old.chunks)]
        names += [key(session, "p", commit, i) for commit, count in gone for i in range(count)]
        return await self._put_snapshot(session, old, names, seq, snap, pieces, {}, [commit for commit, _ in gone])

    async def _put_snapshot(
        self,
        session: str,
        old: Head | None,
        gone: Sequence[str],
        seq: int,
        snap: str,
        pieces: Pieces,
        fields: Mapping[str, Argument],
        trail: Sequence[str] = (),
    ) -> Outcome:
        length = safetensors.nbytes(pieces)
        inline, staged = b"", None
        if length <= INLINE:
            inline = b"".join(pieces)
            checksum, count = xxhash.xxh3_64_hexdigest(inline), 1
        else:
            staged = await self._stage(session, pieces)
            checksum, count = staged.checksum, staged.chunks
        keys = [key(session, part) for part in ("head", "log", "blobs", "trail")]
        if staged is not None:
            keys += [key(session, "t", staged.token, i) for i in range(staged.chunks)]
            keys += [key(session, "s", snap, i) for i in range(staged.chunks)]
        described = {"snap": snap, "chunks": count, "length": length, "checksum": checksum, **fields}
        arguments: list[Argument] = ["" if old is None else old.snap, seq, 0 if staged is None else staged.chunks]
        arguments += [inline, key(session, "s", snap, 0), "" if old is None else commit_mark(old.commit)]
        arguments += [len(trail), len(trail[-TRAIL:]), *trail[-TRAIL:]]
        arguments += flatten(described)
        reply = (await self._script("snapshot", [*keys, *gone], arguments, durable=old is None))[0]
        if reply == b"LOST":
            return await self._put_snapshot(session, old, gone, seq, snap, pieces, fields, trail)
        outcome = _outcome(reply)
        if outcome == "OK":
            self.meters.snapshot(length)
        elif staged is not None:
            self._drop([key(session, "t", staged.token, i) for i in range(staged.chunks)])
        return outcome

    async def delete(self, session: str, head: Head, commit: str | None) -> Outcome:
        """Removes all keys of a session if it still stands at `commit` (None: wherever it stands)."""
        keys = [key(session, part) for part in ("head", "log", "history", "blobs")]
        keys += [key(session, "s", head.snap, i) for i in range(head.chunks)]
        arguments: list[Argument] = [head.snap, commit or "", key(session), f"deleted {head.step} -"]
        return _outcome((await self._script("delete", keys, arguments, durable=True))[0])

    async def confirm(self, session: str, commit: str | None) -> Outcome:
        """Makes sure that `commit`, if the session still stands there (None: wherever it stands), and all before it are
        as safe as was asked for. Raises Unconfirmed where they are not, or where there is no room to ask.
        """
        try:
            reply = await self._script("confirm", [key(session, "head")], [commit or ""], durable=True)
        except StoreFull as error:  # what is to be confirmed is there all the same
            raise Unconfirmed(str(error)) from None
        return _outcome(reply[0])

    async def lose(self, session: str, known: Known, found: Head) -> Outcome:
        """Marks the session as lost, if it still is as `found`: it was `known` to stand elsewhere."""
        arguments: list[Argument] = [found.commit, found.seq, found.epoch, lost_text(known, found)]
        arguments += [known.seq, known.epoch, known.commit, key(session), f"lost {found.step} {found.mark}"]
        return _outcome((await self._script("lose", [key(session, "head")], arguments))[0])

    async def accept(self, session: str, found: Head) -> Outcome:
        """Lets a lost session go on from where it was `found`, if it is still there and has lost no more than that."""
        lost = (b"", b"") if found.lost is None else (found.lost.text, found.lost.told)
        arguments: list[Argument] = [found.commit, *lost, key(session), f"accepted {found.step} {found.mark}"]
        return _outcome((await self._script("accept", [key(session, "head")], arguments))[0])

    async def count_skipped(self, session: str) -> None:
        """Counts a gradient that was skipped; the session stays where it is, and what is not there is not made."""
        await self._script("skip", [key(session, "head")], [])

    # Reading

    async def commit_of(self, session: str) -> str | None:
        """The commit at which the session stands now; None if there is no such session."""
        reply = await self._read("HGET", key(session, "head"), "commit")
        return None if reply is None else reply.decode()

    async def head(self, session: str) -> Head | None:
        reply = await self._read("HGETALL", key(session, "head"))
        return head_of(reply)

    async def heads(self, sessions: Sequence[str]) -> list[Head | UnknownFormat | Corrupt | None]:
        """The head of each, or why it cannot be read."""
        return await asyncio.gather(*[readable(self._read("HGETALL", key(session, "head"))) for session in sessions])

    async def stands(self, session: str) -> tuple[str, int] | None:
        """Commit and epoch at which it stands now; None: no such session. Raises Corrupt."""
        commit, epoch = await self._read("HMGET", key(session, "head"), "commit", "epoch")
        return None if commit is None else (commit.decode(errors="replace"), count_of(epoch or b"0"))

    async def standing(self, sessions: Sequence[str]) -> list[tuple[str, int] | Corrupt | None]:
        """What `stands` says of each, or raises because it cannot be read."""
        return await asyncio.gather(*[self._stands(session) for session in sessions])

    async def _stands(self, session: str) -> tuple[str, int] | Corrupt | None:
        try:
            return await self.stands(session)
        except Corrupt as fault:
            return fault

    async def tenant_of(self, session: str) -> str | None:
        """Whose the session is, of whatever format it is; None: no such session."""
        commit, tenant = await self._read("HMGET", key(session, "head"), "commit", "tenant")
        return None if commit is None else (DEFAULT_TENANT if tenant is None else tenant.decode())

    async def tail(self, session: str, after: int, known: Known | None = None) -> Tail | None:
        """The head and the entries after sequence number `after` (-1: all, -2: none); None: no such session.

        Of a place that is `known` it says whether it is on the session's line: not if the store went back.
        """
        return await self.reader.tail(session, after, known)

    async def load(self, session: str) -> Stored | None:
        """All of a session as of one moment, however much that is; None: no such session. Raises Corrupt."""
        return await self.reader.load(session)

    async def history(self, session: str, after: int, limit: int) -> list[bytes]:
        """At most `limit` lines of the steps after `after`, oldest first."""
        keys = [key(session, "head"), key(session, "history")]
        lines: list[bytes] = await self._patiently(lambda: self._script("history", keys, [after, limit]))
        return lines


def _seen(reply: "asyncio.Future[Any]") -> None:
    """Whatever became of it, nobody asks."""
    if not reply.cancelled():
        reply.exception()


def _outcome(reply: bytes) -> Outcome:
    return _OUTCOMES.get(reply, "STALE")
