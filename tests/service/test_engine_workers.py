"""Several workers over the engine itself: pulls amid steps, and rounds that nobody is left to close."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from core.errors import RoundOpen
from service import deadlines
from service.deadlines import Deadlines
from service.errors import SessionNotFound, StoreFull, StoreUnavailable
from service.ids import new_commit, new_id
from service.index import DEADLINES
from service.records import LogEntry, LogItem, Received
from service.store import Store
from tests.service.world import Run, World, copied, created, request, step

PATIENCE = 20.0  # seconds in which what is to happen has happened, on any machine


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.01)


# -- pulls -------------------------------------------------------------------------------------------------------------


def test_a_pull_is_answered_while_others_step(run: Run) -> None:
    """There is always a step in the queue: parameters that must be the last ones would never be given out."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(
            engine, params={"w": [0.0] * 3}, aggregation={"mode": "async", "delay_compensation": {}}
        )
        over = False

        async def work(worker: str) -> int:
            steps = 0
            while not over:
                await step(engine, session, 0.5, worker=worker, returns="none")
                steps += 1
            return steps

        others = [asyncio.create_task(work(f"w{i}")) for i in range(8)]
        await asyncio.sleep(0.05)
        try:
            for _ in range(3):
                async with asyncio.timeout(PATIENCE):
                    point = await engine.pull(session, "puller")
                flat = point.flat.copy()
                await asyncio.sleep(0.02)  # others go on
                checkpoint, _, _ = await engine.checkpoint(session)
                assert checkpoint[":delay.backup.puller"].tobytes() == point.flat.tobytes() == flat.tobytes()
                sent = {"worker": "puller", "base_step": point.stamp.step, "returns": "none"}
                assert (await step(engine, session, 1.0, **sent)).stamp.step > point.stamp.step + 1
        finally:
            over = True
            assert min(await asyncio.gather(*others)) > 0

    run(scenario)


# -- rounds that nobody closes -----------------------------------------------------------------------------------------


async def announced(world: World) -> list[str]:
    """What is entered, as "session round"."""
    return [member.decode() for member in await world.raw.zrange(DEADLINES, 0, -1)]


async def nothing_announced(world: World) -> bool:
    return not await announced(world)


def second(first: LogEntry, worker: str) -> LogItem:
    """The contribution that makes the round of `first` full, as a replica would append it that is gone by then."""
    commit = new_commit()
    text = first.metadata | {"commit": commit, "parent": first.metadata["commit"], "worker": worker}
    return LogItem(commit, text, first.tensors, {"step": 0, "held": 1}, round=Received(1, 2, 2))


def test_a_full_round_is_closed_though_its_deadline_was_looked_at_too_early(run: Run) -> None:
    """It is entered before the contribution is in the log, and a replica that looks in between finds the round open."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3}, aggregation={"mode": "sync", "workers": 2})
        await engine.step(session, request(1.0, worker="a"), copied)
        store = engine._store
        await store.index.announce(session, 1, time.time())
        await asyncio.sleep(1.0)  # it was looked at
        assert await announced(world) == [f"{session} 1"]
        tail = await store.tail(session, 0)
        assert tail is not None
        assert tail.entries is not None
        (first,) = tail.entries
        assert await store.append(session, first.metadata["commit"], [second(first, "b")]) == "OK"

        await until(lambda: store.history(session, 0, 1))
        point = await engine.params(session, "next")
        assert (point.stamp.step, point.flat.tolist()) == (1, [1.0] * 3)

        await until(lambda: nothing_announced(world))

    run(scenario)


def test_what_is_entered_of_rounds_that_are_over_is_removed(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3}, aggregation={"mode": "sync", "workers": 1})
        for _ in range(2):
            await engine.step(session, request(1.0), copied)
        for id_, round_ in ((session, 1), (session, 2), (new_id(), 1)):
            await engine._store.index.announce(id_, round_, time.time())
        assert len(await announced(world)) >= 1

        await until(lambda: nothing_announced(world))
        assert (await engine.stamp(session)).step == 2

    run(scenario)


OPEN, AWAY, FULL = RoundOpen("round 1 is not over"), StoreUnavailable("it is away"), StoreFull("it is full")
# What closing a round raises, one time after the other; the last for good. None: it is closed.
ALARMS: dict[str, list[Exception | None]] = {
    "closed": [None],
    "open-at-first": [OPEN, OPEN, None],
    "store-away-at-first": [AWAY, FULL, OPEN, None],
    "session-gone": [SessionNotFound("x")],
    "session-gone-while-open": [OPEN, SessionNotFound("x")],
    "open-for-ever": [OPEN],
}


def test_an_alarm_rings_until_its_round_is_closed_or_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "AGAIN", 0.05)
    monkeypatch.setattr(deadlines, "LOST", 0.5)
    rang: Counter[str] = Counter()

    async def close(session: str, _: int) -> None:
        rang[session] += 1
        outcomes = ALARMS[session]
        if (error := outcomes[min(rang[session], len(outcomes)) - 1]) is not None:
            raise error

    async def scenario(world: World) -> None:
        store = Store(world.embedded.url)
        await store.open()
        watch = Deadlines(store.index, close)
        for session in ALARMS:
            await store.index.announce(session, 1, time.time())
        watch.start()
        await until(lambda: nothing_announced(world))
        often = rang.copy()
        assert often.pop("open-for-ever") > 3
        assert often == {session: len(outcomes) for session, outcomes in ALARMS.items() if session in often}
        assert len(often) == len(ALARMS) - 1
        often = rang.copy()
        await asyncio.sleep(2 * deadlines.LOOK)
        assert rang == often, "what is forgotten is not looked at any more"
        await watch.stop()
        await store.close()

    run(scenario)


@pytest.mark.parametrize("how", ["restore", "fork"])
def test_a_round_that_is_over_before_its_session_is_there_is_closed(
    run: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its deadline is entered before the session, and whoever looks in between finds none."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        await world.replica()  # looks at deadlines too
        sync = {"mode": "sync", "workers": 3, "quorum": 1, "timeout": 0.4}
        session = await created(engine, params={"w": [0.0] * 3}, aggregation=sync)
        await engine.step(session, request(1.0), copied)
        tensors, text, _ = await engine.checkpoint(session)
        create = engine._store.create

        async def late(*arguments: Any) -> None:
            await asyncio.sleep(1.0)
            await create(*arguments)

        monkeypatch.setattr(engine._store, "create", late)
        made, _ = await (engine.fork(session) if how == "fork" else engine.restore(tensors, text))
        await until(lambda: engine._store.history(made["id"], 0, 1))
        point = await engine.params(made["id"], "next")
        assert (point.stamp.step, point.flat.tolist()) == (1, [1.0] * 3)
        await until(lambda: nothing_announced(world))

    run(scenario)


def test_a_session_that_is_deleted_leaves_no_deadline(run: Run) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        aggregation = {"mode": "sync", "workers": 2, "timeout": 3600.0}
        sessions = [await created(first, params={"w": [0.0] * 3}, aggregation=aggregation) for _ in range(2)]
        for session in sessions:
            for _ in range(3):
                await first.step(session, request(1.0), copied)
        sessions.append((await first.fork(sessions[0]))[0]["id"])
        assert set(await announced(world)) >= {f"{session} 2" for session in sessions}
        for engine, session in zip((first, second, second), sessions, strict=True):
            await engine.delete(session, None)
        await until(lambda: nothing_announced(world))

    run(scenario)
