"""Log, then apply: how changes that wait in a session's queue become commits.

Changes are dealt with in batches: each is checked against the state that it will meet, all are appended to the log in
one round trip, and only then applied and answered. So memory is never ahead of the log. The append holds only if nobody
else, on any replica, has written since; if somebody has, the tail is fetched, applied, and the batch checked anew.

What is not appended (a refusal, a repeat, a read) is answered from memory only after the head in the store was seen
to be the one that memory stands at, so that a replica that fell behind never answers from the past.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from core.contributions import Checked, Closing, Gradient, NewParams, NewRecipe, Pull, Reduced
from core.errors import CoreError, NonFinite, ParamsNotHeld, RoundOpen
from core.layout import Array
from core.session import Outcome
from service import answers, entries, privacy
from service import live as files
from service.changes import Change, Cursor, Look, Planned, fail, new_future, resolve
from service.deadlines import Deadlines
from service.documents import Applied, Pending, StepRequest
from service.errors import (
    KeyReused,
    ServiceError,
    SessionNotFound,
    StepConflict,
    StoreFull,
    StoreUnavailable,
    Unconfirmed,
)
from service.heads import TRIES, Heads
from service.live import THREADED, DocumentReader, Live
from service.records import Known, LogItem, Tail
from service.store import Outcome as Appended
from service.store import Store
from service.tracing import Tracing

T = TypeVar("T")

# So often in a row others may be first before whoever waits is told to come again.
RACES = 1000


class Committer:
    """`reread(id, known)` reads a session anew from the store, of which it is known where it stood."""

    def __init__(
        self,
        store: Store,
        deadlines: Deadlines,
        read_document: DocumentReader,
        heads: Heads,
        reread: Callable[[str, Known], Awaitable[Live]],
    ) -> None:
        self._store = store
        self._deadlines = deadlines
        self._read_document = read_document
        self._heads = heads
        self._reread = reread
        self.tracing: Tracing | None = None
        self._threads = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="compute")

    def close(self) -> None:
        self._threads.shutdown()

    async def answer(self, live: Live, looks: Sequence[Look]) -> None:
        await self.catch_up(live)
        if live.closable(time.time()):
            await self.commit(live, ())
        large = live.session.layout.size >= THREADED
        for look in looks:
            if look.future.done():
                continue
            try:
                result = await self._read(live, look, threaded=large and look.threaded)
            except (CoreError, ServiceError) as error:
                fail(look.future, error)
            else:
                resolve(look.future, result)

    async def _read(self, live: Live, look: Look, *, threaded: bool) -> Any:
        for _ in range(TRIES):
            result = await self.compute(threaded, look.read, live)
            if not (look.acknowledges and isinstance(result, Applied)) or await self._safe(live):
                return result
            await self.catch_up(live)
        raise StoreUnavailable("the session changes faster than it can be followed")

    async def compute(self, threaded: bool, function: Callable[..., T], *arguments: Any) -> T:
        if threaded:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        return function(*arguments)

    # Log, then apply

    async def commit(self, live: Live, changes: Sequence[Change]) -> None:
        """All of them, in as many batches as it takes; and rounds that are over, as soon as they are."""
        waiting: Sequence[Change] | None = changes
        races = 0
        rounds = live.session.recipe.aggregation.rounds
        while waiting is not None:
            if rounds and live.closable(time.time()) and not (waiting and waiting[0].closing):
                closing = Change(new_future(), None, closing=live.session.state.step + 1)
                closing.future.add_done_callback(_heard)
                waiting = [closing, *waiting]
            if not waiting:
                return
            before, waiting = waiting, await self._commit(live, waiting)
            races = races + 1 if waiting is before else 0
            if races == RACES:
                raise StoreUnavailable("others change the session faster than it can be followed")

    async def _commit(self, live: Live, changes: Sequence[Change]) -> Sequence[Change] | None:
        """Those of the changes that are still to come, all of them if somebody else has written since; None if the
        store takes no more.
        """
        planned, rest = await self._plan(live, changes)
        items = [plan.item for plan in planned if plan.item is not None]
        if items:
            try:
                await self._announce(live, planned)
                outcome = await self._traced("append", live, planned, self._append(live, items))
            except StoreFull as error:  # nothing was appended
                await self._answer_alone(live, changes, error)
                return None
            if outcome == "GONE":
                raise SessionNotFound(live.id)
            if outcome == "STALE":
                await self.catch_up(live)
                return changes
        elif not await self._answerable(live, planned):
            return changes
        for plan in planned:
            await self._settle(live, plan)
        return rest

    async def _answerable(self, live: Live, planned: Sequence[Planned]) -> bool:
        """Whether memory is where the store is and, where that is to answer a repeat, safe; else it has moved on."""
        if await self.catch_up(live):
            return False
        repeats = [plan.change for plan in planned if plan.item is None and plan.done is not None]
        try:
            return not repeats or await self._safe(live)
        except Unconfirmed as error:  # refusals need no word of the disk or the replicas
            for change in repeats:
                fail(change.future, error)
            return True

    async def _answer_alone(self, live: Live, changes: Sequence[Change], full: StoreFull) -> None:
        """Answers those that need no entry, repeats and refusals, and refuses the others, in a store that is full.

        Each is planned by itself, as none of those before it comes to be; and where the store is: it may have been too
        full even for the look that an append begins with.
        """
        for _ in range(TRIES):
            planned = [plan for change in changes for plan in (await self._plan(live, [change]))[0]]
            if await self._answerable(live, planned):
                break
        else:
            raise StoreUnavailable("the session changes faster than it can be followed")
        for plan in planned:
            if plan.item is None:
                await self._settle(live, plan)
            else:
                fail(plan.change.future, full)

    async def _announce(self, live: Live, planned: Sequence[Planned]) -> None:
        """Enters when the round is to be closed before it is opened, so that any replica will see to it."""
        for plan in planned:
            if plan.announce is not None:
                await self._deadlines.announce(live.id, live.session.state.step + 1, plan.announce)

    async def _plan(self, live: Live, changes: Sequence[Change]) -> tuple[list[Planned], Sequence[Change]]:
        cursor = Cursor(live.stamp, live.head.commit)
        rounds, planned = live.session.recipe.aggregation.rounds, list[Planned]()
        for position, change in enumerate(changes, 1):
            if change.future.cancelled():  # its sender is gone
                continue
            if change.alone(rounds=rounds) and any(plan.item is not None for plan in planned):
                return planned, changes[position - 1 :]
            planned.append(await self._plan_one(live, change, cursor))
            if planned[-1].item is not None and self._is_last(live, planned[-1]):
                return planned, changes[position:]
        return planned, ()

    def _is_last(self, live: Live, plan: Planned) -> bool:
        """Whether what comes after it depends on what becomes of it, which is known once it was applied."""
        if plan.position:
            return plan.closes
        return plan.change.alone(rounds=False) or live.session.recipe.sequential

    async def _plan_one(self, live: Live, change: Change, cursor: Cursor) -> Planned:
        request = change.step
        plan = Planned(change)
        try:
            if request is not None and request.key is not None:
                plan.done = live.done.get(request.key) or cursor.keys.get(request.key)
                if plan.done is not None:
                    if plan.done.digest != request.digest:
                        raise KeyReused(request.key)
                    return plan
            if change.if_match is not None and not change.if_match.holds(cursor.stamp):
                raise StepConflict(cursor.stamp.step, cursor.stamp.commit)
            await self._check(live, plan, cursor)
        except NonFinite as error:
            plan.skipped = request is not None and live.session.recipe.non_finite == "skip"
            plan.error = None if plan.skipped else error
        except (CoreError, ServiceError) as error:
            plan.error = error
        if plan.checked is not None:
            entries.write(live, plan, cursor)
        return plan

    async def _check(self, live: Live, plan: Planned, cursor: Cursor) -> None:
        change, session = plan.change, live.session
        if change.step is not None:
            await self._check_step(live, plan, change.step, cursor)
        elif change.params is not None:
            plan.checked = session.check(NewParams(change.params))
        elif change.change is not None:
            plan.document = change.change(live.document)
            plan.checked = session.check(NewRecipe(plan.document.recipe))
        elif change.closing is not None and change.closing > session.state.step:
            at = time.time()
            if not live.closable(at):
                due = live.due(change.closing, at)
                if due is not None:
                    await self._deadlines.put_off(live.id, change.closing, due)
                raise RoundOpen(f"round {change.closing} is not over")
            large = session.layout.size >= THREADED
            plan.checked = await self.compute(large, session.check, Closing(change.closing))
            await self._account(live, plan)
        elif change.puller is not None:
            plan.checked = session.check(Pull(change.puller, time.time()))

    async def _check_step(self, live: Live, plan: Planned, request: StepRequest, cursor: Cursor) -> None:
        session, aggregation = live.session, live.session.recipe.aggregation
        wanted = answers.returns(live, request)
        if wanted == "params" and session.state.params is None:
            raise ParamsNotHeld("this session's client holds the parameters: it cannot be given them")
        contribution, ahead = request.contribution, None
        if contribution.worker is not None or contribution.base_step is not None or not aggregation.plain:
            pulls = wanted == "params" and aggregation.delay_compensation is not None
            contribution = replace(contribution, at=time.time(), pulls=pulls)
            ahead = cursor.ahead(live)
        large = max(plan.change.size, session.layout.size) >= THREADED  # a few places may be of a large tensor
        plan.checked = await self.compute(large, session.check, contribution, ahead)
        if not aggregation.rounds:
            await self._account(live, plan)

    async def _account(self, live: Live, plan: Planned) -> None:
        """What the step costs of privacy, by all steps so far."""
        aggregation = live.session.recipe.aggregation
        if aggregation.noise_multiplier is not None:
            spent = (aggregation.noise_multiplier, live.session.state.step + 1, aggregation.delta)
            plan.epsilon = await self.compute(True, privacy.epsilon, *spent, aggregation.sampling_rate)

    async def _append(self, live: Live, items: Sequence[LogItem]) -> Appended:
        """Appends; where the reply was lost, finds out what became of it. Raises StoreUnavailable if it cannot.

        OK is as safe as was asked for: `append` says so of its own, and of what it finds it has appended before.
        """
        unknown = False
        for _ in range(5):
            try:
                outcome: Appended | None = await self._store.append(live.id, live.head.commit, items)
            except Unconfirmed:  # whoever asks once more has waited long enough
                raise
            except StoreUnavailable:
                outcome, unknown = None, True
            except StoreFull:
                if not unknown:
                    raise
                outcome = None
            if outcome in ("OK", "GONE") or (outcome == "STALE" and not unknown):
                if outcome == "OK":
                    live.learn(items[-1].epoch)
                    live.safe = items[-1].commit if self._store.durable else ""
                return outcome
            # STALE after a lost reply may mean that the first attempt arrived late, and somebody else's after it.
            outcome = await self._landed(live, items)
            if outcome is not None:
                return outcome
            # It did not go through, or not yet: the same once more is harmless, its commits being the same.
        raise StoreUnavailable("the store breaks off every write")

    async def _landed(self, live: Live, items: Sequence[LogItem]) -> Appended | None:
        """The outcome of an append whose reply was lost; None: it is not there so far."""
        commit, known = items[-1].commit, live.head.known
        outcome = await self._store.landed(live.id, known.commit, commit, known.seq)
        if outcome == "OK" and self._store.durable:
            outcome = await self._landed_safely(live, commit)
        if outcome != "OK":
            return outcome
        # Memory is about to stand there, and must know what was accepted before: in one look with whether it is there.
        found = await self._store.tail(live.id, -2, known._replace(seq=known.seq + len(items), commit=commit))
        if found is None:
            return "GONE"
        if not found.on_line:
            return None
        live.learn(found.head.epoch)
        return "OK"

    async def _landed_safely(self, live: Live, commit: str) -> Appended | None:
        """The outcome of an append that landed; of that alone nobody knows whether it is safe."""
        if await self._store.confirm(live.id, None) == "GONE":
            return "GONE"
        # Once more: the store that was made sure of might be one that went back in between.
        outcome = await self._store.landed(live.id, live.head.commit, commit, live.head.seq)
        if outcome == "OK":
            live.safe = commit
        return outcome

    async def _safe(self, live: Live) -> bool:
        """Whether where memory stands is as safe as was asked for; False: somebody has written since.

        What memory appended itself is. What it caught up with need not be: its writer may still wait, or have given up.
        """
        if not self._store.durable or live.safe == live.head.commit:
            return True
        outcome = await self._store.confirm(live.id, live.head.commit)
        if outcome == "GONE":
            raise SessionNotFound(live.id)
        if outcome == "OK":
            live.safe = live.head.commit
        return outcome == "OK"

    async def _settle(self, live: Live, plan: Planned) -> None:
        """Applies what was appended, and answers."""
        change = plan.change
        if plan.error is not None:
            fail(change.future, plan.error)
        elif plan.skipped:
            await self._settle_skipped(live, change)
        elif plan.item is not None and plan.checked is not None:
            await self._traced("apply", live, [plan], self._apply(live, plan, plan.item, plan.checked))
        elif change.step is not None and plan.done is not None:
            self._reply(change, answers.replayed(live, change.step, plan.done))
        else:
            resolve(change.future, live.stamp)

    async def _settle_skipped(self, live: Live, change: Change) -> None:
        """What goes wrong here concerns this change alone: others of the batch were appended and are yet to apply."""
        assert change.step is not None
        try:
            await self._store.count_skipped(live.id)
        except (StoreUnavailable, StoreFull) as error:
            fail(change.future, error)
        else:
            self._reply(change, answers.skipped(live, change.step))

    async def _apply(self, live: Live, plan: Planned, item: LogItem, checked: Checked) -> None:
        change, request = plan.change, plan.change.step
        wanted = "none" if request is None else answers.returns(live, request)
        updating = live.wants_updates if isinstance(checked, Reduced) else wanted == "updates"
        large = live.session.layout.size >= THREADED

        def apply() -> tuple[Outcome, Array | None]:
            fresh = large or bool(live.points)
            outcome = live.session.apply(checked, want_updates=updating, fresh=fresh)
            return outcome, live.session.next_point() if wanted == "params" and not plan.position else None

        outcome, params = await self.compute(large, apply)
        before, live.document = live.document, plan.document or live.document
        chunks, visible = 0 if item.staged is None else item.staged.chunks, not plan.position and change.puller is None
        live.advance(item.commit, chunks, item.size, item.metadata["time"], visible=visible)
        if request is None or not isinstance(checked, Gradient):
            if isinstance(checked, Reduced):
                live.close_round(outcome, plan.rate, checked.norm)
                self._deadlines.seen_to(live.id, outcome.step)
            told: Any = (before, live.document) if plan.document else live.stamp
            resolve(change.future, told if change.puller is None else await self.compute(large, live.point, "next"))
            return
        updates = outcome.updates if wanted == "updates" and not plan.position else None
        if request.key is not None and plan.done is not None:
            live.remember(request.key, plan.done, updates)
        if plan.position:
            live.asked |= wanted == "updates"
            request.release()  # it is in the round: its body must not be there when that is closed
            told = answers.of_round(live, request, outcome.step + 1, plan.position, item.commit)
            self._reply(change, replace(told, over=plan.closes) if isinstance(told, Pending) else told)
            return
        applied = Applied(live.stamp, live.session.layout, params, updates, plan.rate, checked.norm, outcome.metrics)
        self._reply(change, applied)

    def _reply(self, change: Change, told: Applied | Pending) -> None:
        """Encodes at once: a small session's arrays are changed in place by the next step."""
        if change.future.done():
            return
        try:
            assert change.encode is not None
            resolve(change.future, told if isinstance(told, Pending) else self._encoded(change.encode, change, told))
        except (CoreError, ServiceError) as error:
            fail(change.future, error)

    def _encoded(self, encode: Callable[[Applied], Any], change: Change, told: Applied) -> Any:
        if self.tracing is None:
            return encode(told)
        return self.tracing.call("encode", change.future, encode, told)

    def _traced(self, name: str, live: Live, plans: Sequence[Planned], work: Coroutine[Any, Any, T]) -> Awaitable[T]:
        """`work`, in a span of that name where requests are traced."""
        if self.tracing is None:
            return work
        return self.tracing.during(name, live.id, [plan.change.future for plan in plans], work)

    # Keeping up with the store

    async def catch_up(self, live: Live) -> bool:
        """Brings memory to where the store is; True if it was behind.

        Raises SessionNotFound, StateLost, UnknownFormat, Corrupt.
        """
        for _ in range(TRIES):
            stands = await self._store.stands(live.id)
            if stands is None:
                raise SessionNotFound(live.id)
            if stands[0] == live.head.commit:
                live.learn(stands[1])
                return False
            known = live.head.known
            tail = await self._store.tail(live.id, live.head.seq, known)
            if tail is None:
                raise SessionNotFound(live.id)
            if await self._heads.settle(live.id, known, tail):
                await self._follow(live, tail)
                return True
        raise StoreUnavailable("the session changes faster than it can be followed")

    async def _follow(self, live: Live, tail: Tail) -> None:
        if tail.on_line and tail.entries is not None and _leads(tail, live.head.commit):
            large = live.session.layout.size >= THREADED
            for entry in tail.entries:
                await self.compute(large, files.replay, live, entry, self._read_document)
            live.rebase(tail.head.snap, tail.head.chunks, tail.head.base)
            live.learn(tail.head.epoch)
            return
        # The log was cut since, or is not there any more, or somebody accepted that the store went back: everything is
        # read anew, which raises Corrupt where nothing leads to the head.
        fresh = await self._reread(live.id, live.head.known)
        live.session, live.document, live.head = fresh.session, fresh.document, fresh.head
        live.done, live.kept, live.log = fresh.done, fresh.kept, fresh.log
        live.closed, live.asked = fresh.closed, fresh.asked
        live.log_bytes, live.unwritten, live.unwritten_entries = fresh.log_bytes, 0, 0
        live.points.clear()


def _leads(tail: Tail, commit: str) -> bool:
    """Whether the entries lead from `commit` to the head."""
    return (tail.entries[-1].metadata.get("commit") if tail.entries else commit) == tail.head.commit


def _heard(future: "asyncio.Future[Any]") -> None:
    """Nobody waits for it: whoever contributed looks at the round."""
    if not future.cancelled():
        future.exception()
