"""Whether the store still stands where it was seen to stand: a store that went back is noticed, not followed.

A failover to a replica that lagged, a dump from yesterday, a log that lost its end: the store then has a past that is
not the one which clients were told of. Every service remembers where it saw each session stand, as the number of the
last entry and its commit: of a session in memory by the memory itself, of others in a list of bounded length. Wherever
it meets the store again, it compares. Entries number on without a gap, each names its parent, and commits are random,
so the place (S, C) is on the session's line just when the head at S is C, or the entry after S has C for its parent,
or, where the log was cut beyond S, the trail of what was cut has C at S. Anything else is another past. Then the head
is marked (lose.lua), so that every service meets it, at its next append too; all calls but DELETE are refused
(StateLost) until somebody accepts what is left: `ravine sessions accept`.

Why nothing but a loss looks like one:

- **A place is one that the store had.** Memory moves on only after the store has taken the entry or has given it, so
  whatever is remembered was on the line. Of a session at work the place is not read from outside: a thread may be
  replaying, and number and commit change one after the other. It compares by itself.
- **A place is taken before the store is asked**, and the store only moves on meanwhile. Answer and comparison are one
  script (load.lua), so no append, snapshot or cut falls in between.
- **Appends, batches, quiet entries** by whoever add entries behind S; the entry after S, in whatever batch, names C.
  An append whose reply was lost moved no memory; if it arrives after all, it is behind S with C for its parent.
- **Snapshots** cut the log and leave the trail; one that is cut by an older release leaves a trail that does not end at
  the base, which is not looked at. What the trail does not know is taken to be well: a place more than 10,000 entries
  before the base.
- **Eviction and reload** keep the place. A snapshot of a session that left memory is one like any other.
- **Deleted** sessions are not there: 404. Ids are random, so none comes back as another; forks and restored
  checkpoints have ids of their own. A deletion that the store lost is not noticed. Who did not delete it itself keeps
  the place for an hour: an empty store may be one whose data somebody is about to put back.
- **Accepting** raises the session's epoch, and keeps the commits of the places that were told with the mark. Who
  remembers a place off the line tells of it, unless it has an older epoch than the head and its commit was among these:
  then it reads the session anew. So nobody's place is given up that was not told, whichever line it was on, and nobody
  tells twice; but a service that was cut off while the others told comes with a mark of its own. The mark takes the
  epoch of who saw the loss, so that an epoch that was lost itself is never given twice, and what a service knows of the
  epoch never sinks. What was accepted sinks with a store that goes back behind it, and is told of once more.
- **A place has at least the epoch of the line that it was seen on**, or what was seen after a loss would be read anew
  silently at the next one. An accepted head keeps its commit, so a service that stood there goes on as if nothing had
  happened: it learns of the epoch with whatever moves it on. That is the script that appends (commit.lua), which
  answers with the epoch; where its reply was lost, the look that finds the place on the line; entries of others and
  what is read anew come with the head. So it is told of no step after the accepted head without its epoch. While it
  stays at that head the epoch is of no use: all that it saw was there when that was accepted.
- **Two stores at once**, an old primary and a new one behind one address: the mark is set only on the head that was
  compared, in one script. If it is another by then, or has another epoch, all is looked at again.

All places are looked at when the server behind the store is another, or was restarted, or did not answer for a while,
and now and then anyway: so that a loss is noticed before somebody steps on, mostly.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from itertools import islice
from time import monotonic

import structlog
from redis.exceptions import RedisError

from service.errors import Corrupt, ServiceError, SessionNotFound, StateLost, StoreFull, StoreUnavailable, UnknownFormat
from service.live import Live
from service.records import Head, Known, Looked, Tail, state_lost
from service.store import Store

log = structlog.get_logger("ravine.heads")

# Places of sessions that are not in memory, those that were longest not in use forgotten first, so many at once: each
# by itself would have to be looked for behind all that are gone already.
REMEMBERED, FORGOTTEN = 65_536, 1024
# Bytes of memory of a place with its id. As tuples in an OrderedDict it was 370.
PLACE = 200
# Seconds between two looks at which server it is, and between two looks at all places even if it is the same.
LOOK, EVERY = 0.5, 30.0
# So many places are looked at together, and the pause after them: 50,000 take some seconds, and nobody waits for it.
# The next look at all of them is not before so many times what the last one took.
BATCH, PAUSE = 200, 0.01
REST = 10
# How often a place is compared anew because the session was changed in between.
TRIES = 20
# Seconds for which the place of a session is kept that the store does not have.
MISSED = 3600.0


class Heads:
    """`live` are the sessions in memory. `start` before use, `stop` in the end."""

    def __init__(self, store: Store, live: Mapping[str, Live]) -> None:
        self._store = store
        self._live = live
        self._remembered: dict[str, str] = {}  # id -> place, the last that was used last
        self._missed: dict[str, float] = {}  # id -> since when the store has it not, of those remembered
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    # Places

    @property
    def cost(self) -> int:
        """Bytes of memory that the places of sessions take which are not in memory."""
        return PLACE * len(self._remembered)

    def known(self, id_: str) -> Known | None:
        """Where the session was last seen; None: not known, or it is at work and looks by itself."""
        live = self._live.get(id_)
        if live is None:
            return self._place(id_)
        return live.head.known if live.runner is None else None

    def _place(self, id_: str) -> Known | None:
        place = self._remembered.get(id_)
        return None if place is None else Known.read(place)

    def remember(self, live: Live) -> None:
        """It leaves memory, or was changed when it had left."""
        known, before = live.head.known, self._place(live.id)
        if before is not None and (before.epoch, before.seq) > (known.epoch, known.seq):
            known = before
        self.drop(live.id)
        self._remembered[live.id] = known.text
        if len(self._remembered) > REMEMBERED:
            for id_ in list(islice(self._remembered, FORGOTTEN)):
                self.drop(id_)

    def drop(self, id_: str) -> None:
        """It was deleted, or its place is known better."""
        self._remembered.pop(id_, None)
        self._missed.pop(id_, None)

    def _miss(self, id_: str) -> None:
        """The store does not have it."""
        if id_ in self._remembered:
            since = self._missed.setdefault(id_, monotonic())
            if monotonic() - since > MISSED:
                self.drop(id_)

    # Comparing

    async def head(self, id_: str) -> Head:
        """Where the session stands in the store. Raises SessionNotFound, StateLost, UnknownFormat, StoreUnavailable."""
        known = self.known(id_)
        head = await self._store.head(id_)
        if head is None:
            self._miss(id_)
            raise SessionNotFound(id_)
        if known is not None and head.seq <= known.seq and head.commit != known.commit:
            head = await self._compared(id_, known)
        if head.lost is not None:
            raise state_lost(id_, head)
        return head

    async def settle(self, id_: str, known: Known | None, found: Tail | Looked) -> bool:
        """Whether one may go on from what was `found`, when it was asked about the place that is `known`. False: it was
        changed just now, look again.

        Raises StateLost, with the session marked as lost; SessionNotFound, StoreUnavailable.
        """
        head = found.head
        if known is not None and not found.on_line and not head.gave_up(known):
            told = head.lost is not None and known.commit.encode() in head.lost.told and head.epoch >= known.epoch
            if not told:
                return await self._lose(id_, known, head)
        if head.lost is not None:
            raise state_lost(id_, head)
        return True

    async def _lose(self, id_: str, known: Known, found: Head) -> bool:
        try:
            outcome = await self._store.lose(id_, known, found)
        except StoreFull:
            outcome = "OK"  # it cannot be marked; this service refuses it all the same, as often as it meets it
        if outcome == "GONE":
            raise SessionNotFound(id_)
        if outcome == "STALE":
            return False
        more = found.lost is None or found.lost.seq < known.seq
        error = state_lost(id_, found, known if more else None)
        log.error("the store lost steps", session=id_, seen=error.acknowledged.step, found=error.found.step)
        raise error

    async def _compared(self, id_: str, known: Known) -> Head:
        """The head, after it was compared with the place. Raises what `settle` does, and UnknownFormat."""
        head = await self._compare(id_, known)
        if head is None:
            raise StoreUnavailable("the session changes faster than it can be looked at")
        return head

    async def _compare(self, id_: str, known: Known) -> Head | None:
        """As `_compared`; None where it changed each time before it could be marked."""
        for _ in range(TRIES):
            found = await self._store.tail(id_, -2, known)
            if found is None:
                self._miss(id_)
                raise SessionNotFound(id_)
            if await self.settle(id_, known, found):
                return found.head
        return None

    # Looking at all of them

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        server, due = "", 0.0
        while True:
            await asyncio.sleep(LOOK)
            try:
                now_at = await self._store.link.servers()
                if now_at != server or loop.time() > due:
                    began = loop.time()
                    await self._look_at_all()
                    server, due = now_at, loop.time() + max(EVERY, REST * (loop.time() - began))
            except StoreUnavailable:
                server = ""  # whatever comes back is to be looked at
            except (ServiceError, RedisError) as error:
                log.warning("the heads of sessions cannot be looked at", reason=str(error))
            except Exception:  # whatever one session has in the store: the others are still to be looked at
                log.exception("looking at the heads of sessions broke off")

    async def _look_at_all(self) -> None:
        ids = [*self._live, *self._remembered]
        for start in range(0, len(ids), BATCH):
            places = {id_: known for id_ in ids[start : start + BATCH] if (known := self.known(id_)) is not None}
            standing = await self._store.standing(list(places))
            for (id_, known), stands in zip(places.items(), standing, strict=True):
                if stands is None:
                    self._miss(id_)
                    continue
                self._missed.pop(id_, None)
                if isinstance(stands, Corrupt):
                    continue  # whoever asks for it is told
                if stands[0] != known.commit:
                    await self._look_at(id_, known)
                elif stands[1] > known.epoch:
                    self._accepted(id_, known, stands[1])
            await asyncio.sleep(PAUSE)

    async def _look_at(self, id_: str, known: Known) -> None:
        """The session was changed by others, or the store went back: which is then marked, and told of in the log."""
        with contextlib.suppress(StateLost, SessionNotFound, UnknownFormat, Corrupt):
            head = await self._compare(id_, known)
            if head is not None and self._place(id_) == known:
                self._remembered[id_] = head.known._replace(epoch=max(head.epoch, known.epoch)).text

    def _accepted(self, id_: str, known: Known, epoch: int) -> None:
        """The session stands where it was seen, and what others had seen of it is given up."""
        live = self._live.get(id_)
        if live is None and self._place(id_) == known:
            self._remembered[id_] = known._replace(epoch=epoch).text
        elif live is not None and live.runner is None and live.head.commit == known.commit:
            live.learn(epoch)
