"""A store that went back is noticed by whoever saw more of it, whatever it is asked for.

The store is put back by writing the keys of a session as they were, or the whole of its data, as after a failover to a
replica that lagged.
"""

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable

import numpy as np
import orjson
import pytest

from service.documents import Precondition
from service.engine import Engine
from service.errors import SessionNotFound, StateLost
from service.heads import PLACE
from service.ids import new_commit, new_id
from service.records import Known
from service.store import Store, key
from tests.service.losses import SGD, SMALL, head_of, is_marked, put_back, saved, stepped, until
from tests.service.test_store import chain, made
from tests.service.world import Run, World, copied, created, params, request, step


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of themselves services look soon after their start, which may be anywhere in a scenario."""
    monkeypatch.setattr("service.heads.LOOK", 3600.0)


async def next_event(engine: Engine, session: str) -> object:
    return await anext(engine.events(session, None))


CALLS: dict[str, Callable[[Engine, str], Awaitable[object]]] = {
    "a step": step,
    "the parameters": params,
    "the session object": lambda engine, session: engine.session(session),
    "its stamp": lambda engine, session: engine.stamp(session),
    "a long poll": lambda engine, session: engine.wait(session, 100, 5.0),
    "events": next_event,
    "the history": lambda engine, session: engine.history(session, 0, 10),
    "a checkpoint": lambda engine, session: engine.checkpoint(session),
    "new parameters": lambda engine, session: engine.put_params(session, {"w": np.zeros(3, np.float32)}, None),
    "a change": lambda engine, session: engine.patch(session, lambda document: document, None),
    "a fork": lambda engine, session: engine.fork(session),
    "schedules": lambda engine, session: engine.schedule(session, 3),
}


@pytest.mark.parametrize("call", CALLS)
def test_it_is_noticed_whatever_is_asked_for(run: Run, call: str) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        found = await stepped(engine, session, 2)
        before = await saved(world, session)
        seen = await stepped(engine, session, 3)
        await put_back(world, session, before)
        for _ in range(2):
            with pytest.raises(StateLost) as lost:
                await CALLS[call](engine, session)
            assert (lost.value.acknowledged, lost.value.found) == (seen, found)
        assert orjson.loads((await head_of(world, session))[b"lost"])["step"] == 5

    run(scenario)


def test_one_that_noticed_stops_all(run: Run) -> None:
    """Services that know nothing of it, that were started later, and one that stands just where the store does."""

    async def scenario(world: World) -> None:
        engine, behind = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        await stepped(engine, session, 2)
        assert await params(behind, session) == [2.0] * 3
        before = await saved(world, session)
        seen = await stepped(engine, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await engine.session(session)
        for other in (behind, await world.replica()):
            for call in CALLS.values():
                with pytest.raises(StateLost) as lost:
                    await call(other, session)
                assert lost.value.acknowledged == seen
            listed, _ = await other.sessions(10, None, None)
            assert [shown["id"] for shown in listed] == [session]
            assert listed[0]["step"] == 2
            assert await other.tenant(session) == "default"

    run(scenario)


def test_who_waits_is_told(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine, other = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        await stepped(engine, session, 1)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        waiting = asyncio.create_task(other.wait(session, 5, 30.0))
        await asyncio.sleep(0.2)
        with pytest.raises(StateLost):
            await step(engine, session)
        with pytest.raises(StateLost):
            await asyncio.wait_for(waiting, 10)

    run(scenario)


def test_a_lost_session_can_be_deleted(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await step(engine, session)
        await engine.delete(session, None)
        assert await world.keys(session) == set()
        with pytest.raises(SessionNotFound):
            await step(engine, session)

    run(scenario)


@pytest.mark.parametrize("beyond", [0, 1, 30], ids=["as far", "further", "cut beyond"])
def test_another_past_is_noticed_however_far_it_leads(run: Run, monkeypatch: pytest.MonkeyPatch, beyond: int) -> None:
    """A service without memory of it takes the session on from where it was found."""
    monkeypatch.setattr("service.snapshots.SNAPSHOT_FLOOR", 1000)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        await stepped(engine, session, 12)
        before = await saved(world, session)
        seen = await stepped(engine, session, 8)
        await put_back(world, session, before)
        other = await world.replica()
        found = await stepped(other, session, 8 + beyond)
        base = int((await head_of(world, session))[b"base"])
        assert (base > 20) == (beyond == 30)
        with pytest.raises(StateLost) as lost:
            await params(engine, session)
        assert (lost.value.acknowledged, lost.value.found) == (seen, found)
        with pytest.raises(StateLost):
            await step(other, session)

    run(scenario)


@pytest.mark.parametrize("asked", [0, 1, 3])
@pytest.mark.parametrize("budget", [SMALL, 1 << 30], ids=["out of memory", "in memory"])
def test_an_empty_store_in_between_makes_nobody_forget(run: Run, budget: int, asked: int) -> None:
    """As where a server was started on the wrong directory, and then an old dump was loaded."""

    async def scenario(world: World) -> None:
        engine = await world.replica(budget=budget)
        session = await created(engine, **SGD)
        await stepped(engine, session, 2)
        before = await saved(world, session)
        seen = await stepped(engine, session, 3)
        for name in await world.keys(session):
            await world.raw.delete(name)
        for _ in range(asked):
            with pytest.raises(SessionNotFound):
                await params(engine, session)
            with pytest.raises(SessionNotFound):
                await engine.stamp(session)
        await put_back(world, session, before)
        with pytest.raises(StateLost) as told:
            await params(engine, session)
        assert told.value.acknowledged == seen

    run(scenario)


def test_the_place_of_a_session_that_stays_away_is_forgotten(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.heads.MISSED", 0.3)
    monkeypatch.setattr("service.heads.EVERY", 0.0)
    monkeypatch.setattr("service.heads.REST", 0)
    monkeypatch.setattr("service.heads.LOOK", 0.05)

    async def scenario(world: World) -> None:
        engine = await world.replica(budget=SMALL)
        session = await created(engine, **SGD)
        other = await created(engine, **SGD)
        await stepped(engine, session, 1)
        await stepped(engine, other, 1)
        assert engine._heads.known(session) is not None
        await (await world.replica()).delete(session, None)

        async def forgotten() -> bool:
            return engine._heads.known(session) is None

        await until(forgotten)
        assert engine._heads.known(other) is not None

    run(scenario)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("commit", b"\xff\xfe"),
        ("lost", b'{"seq":"x","step":1,"commit":"c","at":"t"}'),
        ("epoch", b"1_0"),
        ("seq", b"x"),
    ],
)
def test_others_are_looked_at_beside_a_damaged_head(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: bytes
) -> None:
    monkeypatch.setattr("service.heads.EVERY", 0.0)
    monkeypatch.setattr("service.heads.REST", 0)
    monkeypatch.setattr("service.heads.LOOK", 0.05)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        damaged, session = await created(engine, **SGD), await created(engine, **SGD)
        await stepped(engine, damaged, 1)
        await world.raw.hset(key(damaged, "head"), mapping={"commit": "0" * 16, name: value})
        await asyncio.sleep(0.3)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        await until(lambda: is_marked(world, session))

    run(scenario)


def test_a_session_out_of_memory_is_remembered(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(budget=SMALL)
        sessions = [await created(engine, **SGD) for _ in range(5)]
        before = [await saved(world, session) for session in sessions]
        for _ in range(40):  # so that a snapshot is written as it leaves
            await asyncio.gather(*[step(engine, session) for session in sessions])
        assert len(engine._live) <= 1
        for session, keys in zip(sessions, before, strict=True):
            await put_back(world, session, keys)
        for session in sessions:
            with pytest.raises(StateLost) as lost:
                await params(engine, session)
            assert (lost.value.acknowledged.step, lost.value.found.step) == (40, 0)

    run(scenario)


def test_what_is_remembered_counts_as_memory(run: Run) -> None:
    async def scenario(world: World) -> None:
        budget, count = 200_000, 400
        engine = await world.replica(budget=budget)
        for session in [await created(engine, **SGD) for _ in range(count)]:
            await step(engine, session)
        held, taken = engine.hot
        assert 0 < held < count
        assert taken + PLACE * (count - held) <= budget

    run(scenario)


def place_text(seq: int) -> str:
    commit = new_commit()
    return Known(1000 + seq, commit, 0, 1000 + seq, commit).text


@pytest.mark.parametrize("count", [10_000, 65_536])
def test_a_place_takes_as_much_as_is_counted(count: int) -> None:
    tracemalloc.start()
    try:
        places = {new_id(): place_text(seq) for seq in range(count)}
        taken = tracemalloc.get_traced_memory()[0] / len(places)
    finally:
        tracemalloc.stop()
    assert 0.7 * PLACE < taken <= PLACE


@pytest.mark.parametrize("mark", ["0a", "0b"])
def test_a_place_is_read_as_it_was(mark: str) -> None:
    known = Known(12, "0a", 3, 7, mark)
    assert Known.read(known.text) == known


def test_places_that_were_longest_not_in_use_are_forgotten(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.heads.REMEMBERED", 20)
    monkeypatch.setattr("service.heads.FORGOTTEN", 5)

    async def scenario(world: World) -> None:
        engine = await world.replica(budget=SMALL)
        sessions = [await created(engine, **SGD) for _ in range(50)]
        for session in [*sessions[:10], *sessions]:
            await step(engine, session)
        remembered = [session for session in sessions if engine._heads.known(session) is not None]
        assert 15 <= len(remembered) <= 21  # with the one in memory
        assert remembered == sessions[-len(remembered) :]

    run(scenario)


def test_quiet_entries_are_a_part_of_the_past(run: Run) -> None:
    """A contribution to an open round that was acknowledged, and that no client sees but by its answer."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD, aggregation={"mode": "sync", "workers": 3})
        before = await saved(world, session)
        await engine.step(session, request(1.0, worker="a"), copied)
        await put_back(world, session, before)
        with pytest.raises(StateLost) as lost:
            await engine.step(session, request(1.0, worker="b"), copied)
        assert lost.value.acknowledged == lost.value.found  # nothing that it shows had changed

    run(scenario)


def test_a_restarted_store_is_looked_at_before_anybody_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.heads.LOOK", 0.5)

    async def scenario(world: World) -> None:
        engine, small = await world.replica(), await world.replica(budget=SMALL)
        sessions = [await created(engine, **SGD) for _ in range(4)]
        before = [await saved(world, session) for session in sessions]
        for i, session in enumerate(sessions):
            await stepped(small if i < 2 else engine, session, 1)
        for session, keys in zip(sessions[:3], before, strict=False):
            await put_back(world, session, keys)
        world.kill_store()
        await world.embedded.ensure()
        for session in sessions[:3]:
            await until(lambda session=session: is_marked(world, session))  # type: ignore[misc]
        assert (await step(engine, sessions[3])).stamp.step == 2

    run(scenario)


def test_all_are_looked_at_every_now_and_then(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the same server has other data all of a sudden; many sessions, in several batches."""
    monkeypatch.setattr("service.heads.LOOK", 0.1)
    monkeypatch.setattr("service.heads.EVERY", 0.2)
    monkeypatch.setattr("service.heads.BATCH", 7)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        sessions = [await created(engine, **SGD) for _ in range(20)]
        before = [await saved(world, session) for session in sessions]
        await asyncio.gather(*[step(engine, session) for session in sessions])
        for session, keys in list(zip(sessions, before, strict=True))[::2]:
            await put_back(world, session, keys)
        for session in sessions[::2]:
            await until(lambda session=session: is_marked(world, session))  # type: ignore[misc]
        assert not any([await is_marked(world, session) for session in sessions[1::2]])

    run(scenario)


def test_of_two_that_saw_it_the_one_that_saw_more_counts(run: Run) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, **SGD)
        before = await saved(world, session)
        await stepped(first, session, 1)
        seen = await stepped(second, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost) as less:
            await params(first, session)
        assert less.value.acknowledged.step == 1
        with pytest.raises(StateLost):
            await params(second, session)
        with pytest.raises(StateLost) as more:
            await params(first, session)
        assert more.value.acknowledged == seen

    run(scenario)


def test_a_full_store_cannot_be_marked_and_is_refused_all_the_same(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        async with world.full():
            for _ in range(2):
                with pytest.raises(StateLost):
                    await params(engine, session)
            assert not await is_marked(world, session)
        with pytest.raises(StateLost):
            await step(engine, session)
        assert await is_marked(world, session)

    run(scenario)


def test_an_append_that_nobody_knows_the_outcome_of_is_never_told_to_be_well(run: Run) -> None:
    async def scenario(world: World) -> None:
        store = Store(world.embedded.url)
        await store.open()
        session, commit = await made(store)
        first, second = chain(commit, [1, 2])
        assert await store.append(session, commit, [first]) == "OK"
        before = await saved(world, session)
        assert await store.append(session, first.commit, [second]) == "OK"
        seen = await store.head(session)
        assert seen is not None
        await put_back(world, session, before)
        assert await store.landed(session, first.commit, second.commit, 1) is None
        found = await store.head(session)
        assert found is not None
        assert await store.lose(session, seen.known, found) == "OK"
        for parent, one, after in ((commit, first, 0), (first.commit, second, 1)):
            assert await store.append(session, parent, [one]) == "STALE"
            with pytest.raises(StateLost):
                await store.landed(session, parent, one.commit, after)
        await store.close()

    run(scenario)


@pytest.mark.parametrize("step_", [1, 7])
def test_a_precondition_is_not_the_question(run: Run, step_: int) -> None:
    """Whether it holds in memory or not: a client that is told of a conflict would go on from what is left."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await step(engine, session, if_match=Precondition(False, ((step_, None),)))

    run(scenario)
