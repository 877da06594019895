"""Log, then apply: how changes that wait in a session's queue become commits.

Changes are dealt with in batches: each is checked against the state that it will meet, all are appended to the log in
one round trip, and only then applied and answered. So memory is never ahead of the log. The append holds only if nobody
else, on any replica, has written since; if somebody has, the tail is fetched, applied, and the batch checked anew.

What is not appended (a refusal, a repeat, a read) is answered from memory only after the head in the store was seen
to be the one that memory stands at, so that a replica that fell behind never answers from the past.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import orjson

from core.contributions import Checked, FlatParams, Gradient, NewParams, NewRecipe
from core.errors import CoreError, NonFinite, ParamsNotHeld
from core.layout import Array
from core.session import Outcome
from service import live as files
from service import tensors as forms
from service.documents import Applied, Document, Precondition, Stamp, StepRequest, now
from service.errors import KeyReused, ServiceError, SessionNotFound, StepConflict, StoreFull, StoreUnavailable
from service.ids import new_commit
from service.live import THREADED, DocumentReader, Done, Live
from service.records import LogItem
from service.store import Outcome as Appended
from service.store import Store

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Change:
    """Something that waits to be appended and applied."""

    future: "asyncio.Future[Any]"
    if_match: Precondition | None
    size: int = 0
    step: StepRequest | None = None
    encode: Callable[[Applied], Any] | None = None
    params: Mapping[str, Array] | None = None
    change: Callable[[Document], Document] | None = None


@dataclass(slots=True, eq=False)
class Look:
    """Something that reads the session at one commit."""

    future: "asyncio.Future[Any]"
    read: Callable[[Live], Any]
    threaded: bool = False


@dataclass(slots=True)
class Planned:
    """What is to become of a change: an entry to append, or an answer that needs none."""

    change: Change
    item: LogItem | None = None
    checked: Checked | None = None
    document: Document | None = None
    error: CoreError | ServiceError | None = None
    done: Done | None = None  # what is remembered of the key: of this step, or without an item of an earlier one
    rate: float = 0.0
    skipped: bool = False


@dataclass(slots=True)
class Cursor:
    """Where the session will stand when the next change of a batch is applied."""

    stamp: Stamp
    keys: dict[str, Done] = field(default_factory=dict)


class Committer:
    """`reread(id)` reads a session anew from the store."""

    def __init__(self, store: Store, read_document: DocumentReader, reread: Callable[[str], Awaitable[Live]]) -> None:
        self._store = store
        self._read_document = read_document
        self._reread = reread
        self._threads = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="compute")

    def close(self) -> None:
        self._threads.shutdown()

    async def answer(self, live: Live, looks: Sequence[Look]) -> None:
        await self.catch_up(live)
        large = live.session.layout.size >= THREADED
        for look in looks:
            if look.future.done():
                continue
            try:
                result = await self.compute(large and look.threaded, look.read, live)
            except CoreError as error:
                fail(look.future, error)
            else:
                resolve(look.future, result)

    async def compute(self, threaded: bool, function: Callable[..., T], *arguments: Any) -> T:
        if threaded:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        return function(*arguments)

    # Log, then apply

    async def commit(self, live: Live, changes: Sequence[Change]) -> None:
        """All of them, in as many batches as it takes."""
        while changes:
            changes = await self._commit(live, changes)

    async def _commit(self, live: Live, changes: Sequence[Change]) -> Sequence[Change]:
        """Those of the changes that are still to come."""
        while True:
            planned, rest = await self._plan(live, changes)
            items = [plan.item for plan in planned if plan.item is not None]
            if not items:
                if await self.catch_up(live):
                    continue
                break
            try:
                outcome = await self._append(live, items)
            except StoreFull as error:  # nothing was appended, and what only reads need not suffer
                for change in changes:
                    fail(change.future, error)
                return ()
            if outcome == "OK":
                break
            if outcome == "GONE":
                raise SessionNotFound(live.id)
            await self.catch_up(live)
        for plan in planned:
            await self._settle(live, plan)
        return rest

    async def _plan(self, live: Live, changes: Sequence[Change]) -> tuple[list[Planned], Sequence[Change]]:
        cursor = Cursor(live.stamp)
        planned = []
        for position, change in enumerate(changes, 1):
            if change.future.cancelled():  # its sender is gone
                continue
            planned.append(await self._plan_one(live, change, cursor))
            if planned[-1].item is not None and live.session.recipe.sequential:
                # What the next one may be, and its rate, is known once this one was applied, and not before.
                return planned, changes[position:]
        return planned, ()

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
            await self._check(live, plan)
        except NonFinite as error:
            plan.skipped = request is not None and live.session.recipe.non_finite == "skip"
            plan.error = None if plan.skipped else error
        except (CoreError, ServiceError) as error:
            plan.error = error
        if plan.checked is not None:
            self._write(live, plan, cursor)
        return plan

    async def _check(self, live: Live, plan: Planned) -> None:
        change, session = plan.change, live.session
        if change.step is not None:
            if change.step.returns == "params" and session.state.params is None:
                raise ParamsNotHeld("this session's client holds the parameters: it cannot be given them")
            large = change.size >= THREADED
            plan.checked = await self.compute(large, session.check, change.step.contribution)
        elif change.params is not None:
            plan.checked = session.check(NewParams(change.params))
        elif change.change is not None:
            plan.document = change.change(live.document)
            plan.checked = session.check(NewRecipe(plan.document.recipe))

    def _write(self, live: Live, plan: Planned, cursor: Cursor) -> None:
        """The log entry of a change that was checked; moves `cursor` behind it."""
        commit, moment = new_commit(), now()
        step, held = cursor.stamp.step, live.session.state.params is not None
        text = {"commit": commit, "parent": cursor.stamp.commit, "time": moment}
        item = LogItem(commit, text, {}, {"time": moment})
        request = plan.change.step
        if request is not None and isinstance(plan.checked, Gradient):
            step += 1
            item.tensors = forms.tensors_of(request.contribution, plan.checked)
            # Of the steps before it in this batch each is a move: a session in which it may not be goes one by one.
            state = live.session.state
            plan.rate = live.session.rate(state.moves + step - state.step)
            self._write_step(live, request, plan.checked, text)
            if request.key is not None:
                worker, norm = request.worker or "", plan.checked.norm
                plan.done = Done(request.digest, step, commit, worker, plan.rate, norm)
                cursor.keys[request.key] = plan.done
            loss = request.contribution.loss
            record = [step, moment, loss, plan.checked.norm, plan.rate, request.worker, commit]
            item.record = orjson.dumps(record)
        elif isinstance(plan.checked, FlatParams):
            text["kind"], held = "params", True
            item.tensors = live.session.layout.views(plan.checked.params)
        elif plan.document is not None:
            text |= {"kind": "document", "document": orjson.dumps(plan.document.describe()).decode()}
            item.head["document"] = orjson.dumps(files.describe(plan.document))
        item.head |= {"step": step, "held": int(held)}
        plan.item = item
        cursor.stamp = Stamp(step, commit)

    def _write_step(self, live: Live, request: StepRequest, gradient: Gradient, text: dict[str, str]) -> None:
        """A step's own text: what came beside its tensors, who sent it, and under which key."""
        text["kind"] = "step"
        if request.contribution.loss is not None:
            text["loss"] = repr(request.contribution.loss)
        if request.contribution.partial:
            text["partial"] = "true"
        if request.worker is not None:
            text["worker"] = request.worker
        if request.base_step is not None:
            text["base_step"] = str(request.base_step)
        if request.weight != 1.0:
            text["weight"] = repr(request.weight)
        if request.key is None:
            return
        text |= {"key": request.key, "digest": request.digest, "norm": repr(gradient.norm)}
        if self._returns(live, request) == "updates":
            text["updates"] = "kept"

    def _returns(self, live: Live, request: StepRequest) -> Literal["params", "updates", "none"]:
        if request.returns is not None:
            return request.returns
        return "updates" if live.session.state.params is None else "params"

    async def _append(self, live: Live, items: Sequence[LogItem]) -> Appended:
        """Appends; where the reply was lost, finds out what became of it. Raises StoreUnavailable if it cannot."""
        unknown = False
        for _ in range(5):
            try:
                outcome: Appended | None = await self._store.append(live.id, live.head.commit, items)
            except StoreUnavailable:
                outcome, unknown = None, True
            except StoreFull:
                if not unknown:
                    raise
                outcome = None
            if outcome in ("OK", "GONE") or (outcome == "STALE" and not unknown):
                return outcome
            # STALE after a lost reply may mean that the first attempt arrived late, and somebody else's after it.
            outcome = await self._store.landed(live.id, live.head.commit, items[-1].commit, live.head.seq)
            if outcome is not None:
                return outcome
            # It did not go through, or not yet: the same once more is harmless, its commits being the same.
        raise StoreUnavailable("the store breaks off every write")

    async def _settle(self, live: Live, plan: Planned) -> None:
        """Applies what was appended, and answers."""
        change = plan.change
        if plan.error is not None:
            fail(change.future, plan.error)
        elif plan.skipped:
            await self._settle_skipped(live, change)
        elif plan.item is None and plan.done is not None:
            self._reply(change, self._replayed(live, change, plan.done))
        elif plan.item is not None and plan.checked is not None:
            await self._apply(live, plan, plan.item, plan.checked)

    async def _settle_skipped(self, live: Live, change: Change) -> None:
        """What goes wrong here concerns this change alone: others of the batch were appended and are yet to apply."""
        try:
            await self._store.count_skipped(live.id)
        except (StoreUnavailable, StoreFull) as error:
            fail(change.future, error)
        else:
            self._reply(change, self._skip(live, change))

    def _skip(self, live: Live, change: Change) -> Applied:
        """The answer to a gradient that changed nothing: things as they are, and updates of zero."""
        assert change.step is not None
        returns, layout = self._returns(live, change.step), live.session.layout
        params = live.session.next_point() if returns == "params" else None
        updates = np.full(layout.size, -0.0, live.session.recipe.numpy_dtype) if returns == "updates" else None
        metrics = live.session.metrics()
        return Applied(live.stamp, layout, params, updates, live.session.rate(), None, metrics, skipped=True)

    async def _apply(self, live: Live, plan: Planned, item: LogItem, checked: Checked) -> None:
        change, request = plan.change, plan.change.step
        returns = "none" if request is None else self._returns(live, request)
        large = live.session.layout.size >= THREADED

        def apply() -> tuple[Outcome, Array | None]:
            fresh = large or bool(live.points)
            outcome = live.session.apply(checked, want_updates=returns == "updates", fresh=fresh)
            return outcome, live.session.next_point() if returns == "params" else None

        outcome, params = await self.compute(large, apply)
        before, live.document = live.document, plan.document or live.document
        live.advance(item.commit, 0 if item.staged is None else item.staged.chunks, item.size, item.metadata["time"])
        if request is None or not isinstance(checked, Gradient):
            resolve(change.future, (before, live.document) if plan.document else live.stamp)
            return
        updates = outcome.updates if returns == "updates" else None
        if request.key is not None and plan.done is not None:
            live.remember(request.key, plan.done, updates)
        applied = Applied(live.stamp, live.session.layout, params, updates, plan.rate, checked.norm, outcome.metrics)
        self._reply(change, applied)

    def _replayed(self, live: Live, change: Change, done: Done) -> Applied:
        """The answer to a repeat: the same tensors where they are still at hand, else where things stand now."""
        assert change.step is not None
        returns = self._returns(live, change.step)
        kept = live.kept.get(done.worker)
        # Current parameters go with the current stamp; whatever else is told is told of the step that the key took.
        stamp = live.stamp if returns == "params" else Stamp(done.step, done.commit)
        params = updates = None
        if returns == "updates":
            updates = kept.updates if kept is not None and kept.step == done.step else None
        elif returns == "params":
            params = live.session.next_point()
        metrics = live.session.metrics()
        return Applied(stamp, live.session.layout, params, updates, done.lr, done.grad_norm, metrics, replayed=True)

    def _reply(self, change: Change, applied: Applied) -> None:
        """Encodes at once: a small session's arrays are changed in place by the next step."""
        if change.future.done():
            return
        try:
            assert change.encode is not None
            resolve(change.future, change.encode(applied))
        except (CoreError, ServiceError) as error:
            fail(change.future, error)

    # Keeping up with the store

    async def catch_up(self, live: Live) -> bool:
        """Brings memory to where the store is; True if it was behind. Raises SessionNotFound, Corrupt."""
        commit = await self._store.commit_of(live.id)
        if commit == live.head.commit:
            return False
        tail = None if commit is None else await self._store.tail(live.id, live.head.seq)
        if tail is None:
            raise SessionNotFound(live.id)
        if tail.entries and tail.entries[0].metadata.get("parent") == live.head.commit:
            large = live.session.layout.size >= THREADED
            for entry in tail.entries:
                await self.compute(large, files.replay, live, entry, self._read_document)
            live.rebase(tail.head.snap, tail.head.chunks, tail.head.base)
            return True
        # The log was cut since, or the store went back: everything is read anew.
        fresh = await self._reread(live.id)
        live.session, live.document, live.head = fresh.session, fresh.document, fresh.head
        live.done, live.kept, live.log = fresh.done, fresh.kept, fresh.log
        live.log_bytes, live.unwritten = fresh.log_bytes, 0
        live.points.clear()
        return True


def new_future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


def resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


def fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
