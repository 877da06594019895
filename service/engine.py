"""Live sessions: a queue each, loading, waiting, eviction, snapshots.

Everything that needs a session's arrays waits in the session's queue, and one task at a time empties it (what it does
with a change is in commits.py). What a listing or a session object shows is in the head of the session in the store and
needs no arrays.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import orjson

from core.errors import CoreError
from core.evaluate import Evaluator
from core.layout import Array
from core.session import Session
from service import answers, crowd
from service import live as files
from service.access.usage import UNLIMITED, Quota, bytes_of, check_size
from service.changes import Change, Look, fail, new_future
from service.commits import Committer
from service.deadlines import Deadlines
from service.documents import Applied, Document, Event, Pending, Point, Precondition, Record, Stamp, StepRequest, now
from service.errors import (
    Corrupt,
    ServiceError,
    SessionNotFound,
    StepConflict,
    StoreFull,
    StoreUnavailable,
    Superseded,
    UnknownFormat,
)
from service.ids import checked_id, new_id
from service.index import DEFAULT_TENANT
from service.live import DocumentReader, DocumentWriter, Live
from service.loading import Loader
from service.objects import record_of, session_object
from service.records import Head
from service.residents import Residents
from service.snapshots import Snapshots
from service.store import Store
from service.tenants import Tenants
from service.tracing import Tracing
from service.waiting import Waiting

T = TypeVar("T")

BATCH = 256
BATCH_BYTES = 64 * 1024 * 1024
# A session that leaves memory with fewer entries in its log is replayed as fast as a snapshot is written.
WORTH_A_SNAPSHOT = 32


class Engine:
    """`read_document` makes a Document of its JSON; `brief`, of a Document, as much JSON as that needs.

    Live sessions may take `budget` bytes of memory together, the state of one of them `max_state`; each tenant may have
    `quota`.
    """

    def __init__(
        self,
        store: Store,
        evaluator: Evaluator,
        read_document: DocumentReader,
        budget: int,
        max_state: int,
        quota: Quota = UNLIMITED,
        brief: DocumentWriter = Document.describe,
    ) -> None:
        self._store = store
        self._brief = brief
        self.evaluator = evaluator
        self._read_document = read_document
        self._max_state = max_state
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tenants = Tenants(store, quota, self._spawn)
        loader = Loader(store, self._compute, read_document, evaluator)
        self._residents = Residents(store, budget, self._spawn, loader, self._leaving, self._entered)
        self._live, self._heads = self._residents.live, self._residents.heads
        self._deadlines = Deadlines(store.index, self.close_round)
        self._committer = Committer(store, self._deadlines, read_document, self._heads, self._residents.read)
        self._snapshots = Snapshots(store, self._spawn, brief)
        self._waiting = Waiting(store, self._heads)

    async def start(self) -> None:
        self._waiting.start()
        self._deadlines.start()
        self._heads.start()

    async def stop(self) -> None:
        """Waits for what is under way, then lets go. Requests must have ended before."""
        await self._heads.stop()
        await self._deadlines.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._waiting.stop()
        self._committer.close()

    @property
    def hot(self) -> tuple[int, int]:
        """How many sessions are in memory, and the bytes that they take."""
        return len(self._live), self._residents.cost

    def trace(self, tracing: Tracing) -> None:
        self._committer.tracing = tracing

    # Making, listing and ending sessions

    async def create(
        self, document: Document, params: Mapping[str, Array] | None, tenant: str = DEFAULT_TENANT
    ) -> tuple[dict[str, Any], Stamp]:
        """A new session of `tenant`. Raises InvalidRequest, TensorError, QuotaExceeded, StoreUnavailable, StoreFull."""
        check_size(document.recipe, self._max_state, "/shapes" if params is None else "/params")
        make = self._apart(document, Session.new, document.recipe, params, self.evaluator)
        return await self._create(make, document, tenant, new=True)

    async def restore(
        self, tensors: Mapping[str, Array], metadata: Mapping[str, str], tenant: str = DEFAULT_TENANT
    ) -> tuple[dict[str, Any], Stamp]:
        """A new session from a checkpoint file. Raises InvalidState, InvalidRequest."""

        def read(described: Mapping[str, Any]) -> Document:
            document = self._read_document(described)
            check_size(document.recipe, self._max_state, "/shapes")
            return document

        told = files.told(metadata, now(), read)
        make = self._apart(told.document, told.session, tensors, self.evaluator)
        return await self._create(make, told.document, tenant)

    async def fork(self, id_: str) -> tuple[dict[str, Any], Stamp]:
        """A new session from this one's state; it remembers neither its history nor its keys."""

        while True:
            seen, tenant = await self._look(id_, lambda live: (live.document, live.head.tenant))
            recipe = files.with_new_noise(seen.recipe)
            make = partial(self._look, id_, partial(files.copied, seen=seen, recipe=recipe), threaded=True)
            with contextlib.suppress(Superseded):
                return await self._create(make, replace(seen, recipe=recipe, created_at=now()), tenant)

    def _apart(self, document: Document, make: Callable[..., T], *arguments: Any) -> Callable[[], Awaitable[T]]:
        """`make`, in a thread where a session of this `document` is large."""
        large = bytes_of(document.recipe) >= files.THREADED
        return partial(self._committer.compute, large, make, *arguments)

    async def _create(
        self, make: Callable[[], Awaitable[Session]], document: Document, tenant: str, *, new: bool = False
    ) -> tuple[dict[str, Any], Stamp]:
        """`make` gives the session's arrays. It is asked only once the tenant may have them, by the document alone: an
        array that is refused costs as much as one that is not.
        """
        id_, snap = new_id(), secrets.token_hex(4)
        await self._tenants.enter(tenant, id_, document.labels, bytes_of(document.recipe))
        first = partial(files.first, new=new)
        try:
            session = await make()
            fields, pieces = await self._apart(document, first, session, document, self._brief)()
            if tenant != DEFAULT_TENANT:
                fields["tenant"] = tenant
            deadline = session.state.ledger.deadline(document.recipe.aggregation)
            if deadline is not None:
                await self._deadlines.announce(id_, session.state.step + 1, deadline)
            await self._store.create(id_, snap, pieces, fields)
        except StoreUnavailable:  # it may have been made, or yet be
            raise
        except (CoreError, ServiceError, MemoryError):
            await self._tenants.leave(tenant, id_, document.labels)
            raise
        await self._tenants.made(tenant, id_, document.labels)
        if deadline is not None:  # once more: whoever looked before there was a session has taken it away
            await self._deadlines.announce(id_, session.state.step + 1, deadline)
        return await self.session(id_)

    async def session(self, id_: str) -> tuple[dict[str, Any], Stamp]:
        """The session object."""
        head = await self._head(id_)
        return await self._described(id_, head), Stamp(head.step, head.mark)

    async def _described(self, id_: str, head: Head) -> dict[str, Any]:
        found = session_object(id_, head)
        aggregation = found["aggregation"]
        if "noise_multiplier" in aggregation:
            found["privacy"] = await self._committer.compute(True, crowd.privacy_of, aggregation, head.step)
        return found

    async def tenant(self, id_: str) -> str:
        """Whose the session is. Raises SessionNotFound.

        By the store even where the session lives here: the time must not tell whether there is one.
        """
        tenant = await self._store.tenant_of(checked_id(id_))
        if tenant is None:
            raise SessionNotFound(id_)
        return tenant

    async def stamp(self, id_: str, *, last: bool = False) -> Stamp:
        """Where the session stands; by the `last` commit, even if nothing that a client sees but a checkpoint changed.

        Cheaper than the session object: each waiter asks every now and then.
        """
        head = await self._head(id_)
        return Stamp(head.step, head.commit if last else head.mark)

    async def _head(self, id_: str) -> Head:
        return await self._heads.head(checked_id(id_))

    async def sessions(
        self, limit: int, after: str | None, label: tuple[str, str] | None, tenant: str = DEFAULT_TENANT
    ) -> tuple[list[dict[str, Any]], bool]:
        """At most `limit` session objects of `tenant`, newest first, and whether there are more."""
        found: list[dict[str, Any]] = []
        while True:
            wanted = limit + 1 - len(found)
            page = await self._tenants.page(tenant, label, after, wanted)
            for id_, head in page:
                try:
                    described = await self._listed(id_, head)
                except (UnknownFormat, Corrupt):  # it is there, and another release's, or the operator's to look at
                    continue
                if described is None or (label and described["labels"].get(label[0]) != label[1]):
                    await self._tenants.forget(tenant, id_, label, gone=described is None)
                else:
                    found.append(described)
            if len(page) < wanted or len(found) > limit:
                return found[:limit], len(found) > limit
            after = page[-1][0]

    async def _listed(self, id_: str, head: Head | UnknownFormat | Corrupt | None) -> dict[str, Any] | None:
        """None: it is not there. Raises what stands in the way of reading it."""
        if isinstance(head, UnknownFormat | Corrupt):
            raise head
        return None if head is None else await self._described(id_, head)

    async def delete(self, id_: str, if_match: Precondition | None, tenant: str = DEFAULT_TENANT) -> None:
        """Even of a session that is lost. Raises SessionNotFound, StepConflict, UnknownFormat.

        `tenant` is whose it would be where there is none.
        """
        while True:
            head = await self._store.head(checked_id(id_))
            if head is None:
                await self.tidy(id_, tenant)
                raise SessionNotFound(id_)
            if if_match is not None and not if_match.holds(Stamp(head.step, head.mark)):
                raise StepConflict(head.step, head.mark)
            outcome = await self._store.delete(id_, head, None if if_match is None else head.commit)
            if outcome == "OK":  # GONE wrote nothing that a barrier could have vouched for: it is told as not found
                break
        self._deadlines.seen_to(id_, head.step + 1)
        await self._tenants.leave(head.tenant, id_, orjson.loads(head.document)["labels"])
        if (live := self._live.get(id_)) is not None:
            self._residents.forget(live)
        self._heads.drop(id_)

    async def tidy(self, id_: str, tenant: str) -> None:
        """Takes out of the tenant's list and usage a session that it does not have: its deletion was broken off."""
        await self._tenants.leave(tenant, checked_id(id_), {})

    # Changing

    async def step(self, id_: str, request: StepRequest, encode: Callable[[Applied], T]) -> T | Pending:
        """Appends and applies a contribution; `encode` is called right after, on the event loop. Pending: it went into
        a round that is open yet.

        Raises CoreError, StepConflict, KeyReused, SessionNotFound, StoreUnavailable, StoreFull.
        """
        change = Change(new_future(), request.if_match, request.size, step=request, encode=encode)
        result: T | Pending = await self._enqueue(id_, change)
        if isinstance(result, Pending) and result.over:
            try:
                return await self.round(id_, request, result, encode)  # the closing is in the same queue, before this
            except (StoreUnavailable, StoreFull):
                return result  # it is in the log, whatever became of the closing
        return result

    def begin(self, id_: str, request: StepRequest, encode: Callable[[Applied], Any]) -> "asyncio.Future[Any] | None":
        """As `step`, for a session that is in memory and has no rounds: what it will give. None for any other."""
        live = self._live.get(id_)
        if live is None or live.session.recipe.aggregation.rounds:
            return None
        change = Change(new_future(), request.if_match, request.size, step=request, encode=encode)
        self._queue(live, change)
        return change.future

    async def round(
        self, id_: str, request: StepRequest, pending: Pending, encode: Callable[[Applied], T]
    ) -> T | Pending:
        """What became of the round that a contribution went into: its step if it is closed, else Pending as before."""

        def read(live: Live) -> Applied | Pending:
            round_, position = pending.round, pending.received
            return answers.of_round(live, request, round_, position, pending.commit, replayed=pending.replayed)

        told: Applied | Pending = await self._enqueue(id_, Look(new_future(), read, threaded=True, acknowledges=True))
        return told if isinstance(told, Pending) else encode(told)  # neither points nor kept updates ever change

    async def close_round(self, id_: str, round_: int) -> None:
        """Closes the open round if it is this one; one that is closed stays so. Raises RoundOpen if it is not over."""
        await self._enqueue(id_, Change(new_future(), None, closing=round_))

    async def pull(self, id_: str, worker: str) -> Point:
        """The parameters, remembered as what `worker` has where delays are compensated. Raises ParamsNotHeld."""

        remembered = await self._look(id_, lambda live: live.session.recipe.aggregation.delay_compensation is not None)
        if not remembered:
            return await self.params(id_, "next")
        point: Point = await self._enqueue(id_, Change(new_future(), None, puller=worker))
        return point

    async def workers(self, id_: str, after: str, limit: int) -> list[dict[str, Any]]:
        """What is known of at most `limit` workers whose names come after `after`, by name."""
        found: list[dict[str, Any]] = await self._look(id_, lambda live: crowd.workers(live, time.time(), after, limit))
        return found

    async def open_round(self, id_: str) -> tuple[dict[str, Any], Stamp]:
        """Who has contributed to the open round, and who is awaited. Raises NoRounds."""
        found: tuple[dict[str, Any], Stamp] = await self._look(
            id_, lambda live: (crowd.open_round(live, time.time()), live.stamp)
        )
        return found

    async def put_params(self, id_: str, params: Mapping[str, Array], if_match: Precondition | None) -> Stamp:
        size = sum(array.nbytes for array in params.values())
        stamp: Stamp = await self._enqueue(id_, Change(new_future(), if_match, size, params=params))
        return stamp

    async def patch(
        self, id_: str, change: Callable[[Document], Document], if_match: Precondition | None
    ) -> tuple[dict[str, Any], Stamp]:
        def bounded(document: Document, seen: Document | None = None) -> Document:
            changed = change(document)
            check_size(changed.recipe, self._max_state, "/optimizer")
            if seen is not None and seen is not document and bytes_of(changed.recipe) != bytes_of(document.recipe):
                raise Superseded
            return changed

        def look(live: Live) -> tuple[Document, str, int, int, int]:
            if if_match is not None and not if_match.holds(live.stamp):
                raise StepConflict(live.stamp.step, live.stamp.commit)
            now_, then = bytes_of(live.document.recipe), bytes_of(bounded(live.document).recipe)
            return live.document, live.head.tenant, live.head.seq, now_, then

        while True:
            seen, tenant, *sizes = await self._look(id_, look)
            within = partial(bounded, seen=seen)
            try:
                async with self._tenants.room(tenant, id_, *sizes):
                    before, after = await self._enqueue(id_, Change(new_future(), if_match, change=within))
                break
            except Superseded:
                continue
        await self._tenants.relabel(tenant, id_, before.labels, after.labels)
        try:
            return await self.session(id_)
        except SessionNotFound:  # it was deleted meanwhile, and must not be entered again
            await self._tenants.leave(tenant, id_, after.labels)
            raise

    # Reading

    def begin_params(self, id_: str, at: Literal["next", "final"]) -> "asyncio.Future[Any] | None":
        """As `params`, for a session that is in memory: what it will give. None for any other."""
        live = self._live.get(id_)
        if live is None:
            return None
        look = Look(new_future(), partial(Live.point, at=at), threaded=True)
        self._queue(live, look)
        return look.future

    async def params(self, id_: str, at: Literal["next", "final"]) -> Point:
        """Raises ParamsNotHeld."""
        point: Point = await self._look(id_, lambda live: live.point(at), threaded=True)
        return point

    async def checkpoint(self, id_: str) -> tuple[dict[str, Array], dict[str, str], Stamp]:
        """The checkpoint's tensors and text, in arrays of its own."""

        def copy(live: Live) -> tuple[dict[str, Array], dict[str, str], Stamp]:
            return *files.checkpoint(live.frozen(), live.document), Stamp(live.session.state.step, live.head.commit)

        result: tuple[dict[str, Array], dict[str, str], Stamp] = await self._look(id_, copy, threaded=True)
        return result

    async def history(self, id_: str, after: int, limit: int) -> list[Record]:
        await self._head(id_)
        return [record_of(orjson.loads(line)) for line in await self._store.history(id_, after, limit)]

    async def schedule(self, id_: str, steps: int) -> tuple[dict[str, Any], Stamp]:
        """The values that the hyperparameters will have over the next `steps` moves; the number of the first one."""
        session, stamp = await self._look(id_, lambda live: (live.schedules(), live.stamp))
        return await self._committer.compute(True, files.preview, session, steps), stamp

    async def wait(self, id_: str, after: int, seconds: float) -> bool:
        """True as soon as the session's step is greater than `after`; False when `seconds` are over."""
        return await self._waiting.wait(checked_id(id_), after, seconds)

    def events(self, id_: str, after: int | None) -> AsyncIterator[Event]:
        """What happens from now on, or from step `after` on; ends with the session."""
        return self._waiting.events(checked_id(id_), after)

    async def ready(self) -> bool:
        """Whether the store answers."""
        try:
            await self._store.ping()
        except (StoreUnavailable, TimeoutError):
            return False
        return True

    # Queues

    async def _look(self, id_: str, read: Callable[[Live], Any], *, threaded: bool = False) -> Any:
        return await self._enqueue(id_, Look(new_future(), read, threaded))

    async def _enqueue(self, id_: str, item: Change | Look) -> Any:
        if self._committer.tracing is not None:
            self._committer.tracing.asked(item.future)
        self._queue(self._live.get(id_) or await self._residents.load(checked_id(id_)), item)
        return await item.future

    def _queue(self, live: Live, item: Change | Look) -> None:
        if live.id in self._live:
            self._live.move_to_end(live.id)
        live.queue.append(item)
        if live.runner is None:
            live.runner = self._spawn(self._run(live))

    def _spawn(self, coroutine: Any) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, live: Live) -> None:
        """Empties the queue of `live`; the only task that touches its arrays."""
        try:
            while live.queue:
                if isinstance(live.queue[0], Look):
                    await self._committer.answer(live, self._take(live, Look))
                else:
                    await self._committer.commit(live, self._take(live, Change))
                live.taken.clear()
                await self._snapshots.write_if_due(live)
        except (CoreError, ServiceError) as error:
            self._abandon(live, error)
        except BaseException:
            # The arrays may be half changed: they are never looked at again, the store has the truth.
            self._abandon(live, Corrupt("a step was broken off; the session is read anew from the store"))
            raise
        finally:
            live.runner = None
        self._residents.account(live)

    def _take(self, live: Live, kind: type[T]) -> list[T]:
        """What can be dealt with at once: things of one kind, a change of recipe by itself."""
        taken: list[T] = []
        size = 0
        while live.queue and isinstance(live.queue[0], kind) and len(taken) < BATCH and size < BATCH_BYTES:
            alone = isinstance(live.queue[0], Change) and live.queue[0].step is None
            if alone and taken:
                break
            item = live.queue.popleft()
            size += getattr(item, "size", 0)
            taken.append(item)
            live.taken.append(item)
            if alone:
                break
        return taken

    def _abandon(self, live: Live, error: Exception) -> None:
        """Answers who waits, and lets a session go whose memory cannot be trusted.

        Where the store is away it can: memory is never ahead of the log, and catches up once the store is back.
        """
        if not isinstance(error, StoreUnavailable | StoreFull):
            self._residents.forget(live)
        for item in [*live.taken, *live.queue]:
            fail(item.future, error)
        live.queue.clear()
        live.taken.clear()

    async def _compute(self, threaded: bool, function: Callable[..., T], *arguments: Any) -> T:
        return await self._committer.compute(threaded, function, *arguments)

    def _leaving(self, live: Live) -> None:
        if len(live.log) >= WORTH_A_SNAPSHOT:
            self._snapshots.begin(live)

    def _entered(self, live: Live) -> None:
        self._spawn(self._tenants.count(live.id, replace(live.head)))
