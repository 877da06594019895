"""A store that went back is noticed by whoever saw more of it, whatever it is asked for; and nobody else is alarmed.

The store is put back by writing the keys of a session as they were, or the whole of its data, as after a failover to a
replica that lagged.
"""

import asyncio
import contextlib
import random
import re
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import orjson
import pytest

from core.errors import CoreError
from service import deadlines
from service.documents import Precondition
from service.embedded import Embedded
from service.engine import Engine
from service.errors import Place, ServiceError, SessionNotFound, StateLost
from service.heads import PLACE
from service.ids import new_commit, new_id
from service.records import Head, Known
from service.store import Store, key
from tests.service.test_store import chain, made, pieces
from tests.service.world import Run, World, copied, created, params, request, step

SGD: dict[str, Any] = {"params": {"w": [0.0] * 3}}
# An engine that keeps no session in memory longer than it has to.
SMALL = 1


async def saved(world: World, session: str) -> dict[bytes, bytes]:
    return {name: await world.raw.dump(name) for name in await world.keys(session)}


async def put_back(world: World, session: str, before: dict[bytes, bytes]) -> None:
    async with world.raw.pipeline() as together:
        for name in await world.keys(session):
            together.delete(name)
        for name, value in before.items():
            together.restore(name, 0, value)
        await together.execute()


async def stepped(engine: Engine, session: str, count: int) -> Place:
    """Where it stands after so many steps."""
    for _ in range(count):
        stamp = (await step(engine, session)).stamp
    return Place(stamp.step, stamp.etag)


async def head_of(world: World, session: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = await world.raw.hgetall(key(session, "head"))
    return found


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


async def is_marked(world: World, session: str) -> bool:
    return b"lost" in await head_of(world, session)


async def accepted(world: World, session: str) -> None:
    store = Store(world.embedded.url)
    await store.open()
    head = await store.head(session)
    assert head is not None
    assert await store.accept(session, head) == "OK"
    await store.close()


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


# -- noticed -----------------------------------------------------------------------------------------------------------


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


def test_a_restarted_store_is_looked_at_before_anybody_asks(run: Run) -> None:
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


# -- accepted ----------------------------------------------------------------------------------------------------------


def test_what_was_accepted_goes_on(run: Run) -> None:
    """For the one that saw more, one that stood just there, one that came late; and a second loss is noticed."""

    async def scenario(world: World) -> None:
        engine, behind = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        await stepped(engine, session, 2)
        assert await params(behind, session) == [2.0] * 3
        etag = (await behind.stamp(session)).etag
        before = await saved(world, session)
        await stepped(engine, session, 3)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await step(engine, session)
        await accepted(world, session)
        assert (await behind.stamp(session)).etag == etag
        assert (await step(behind, session)).stamp.step == 3
        assert await params(engine, session) == [3.0] * 3
        assert (await step(engine, session)).stamp.step == 4
        assert await params(await world.replica(), session) == [4.0] * 3

        before = await saved(world, session)
        seen = await stepped(engine, session, 2)
        await put_back(world, session, before)
        with pytest.raises(StateLost) as again:
            await params(engine, session)
        assert again.value.acknowledged == seen
        await accepted(world, session)
        for other in (engine, behind):
            assert await params(other, session) == [4.0] * 3

    run(scenario)


def test_an_epoch_that_was_lost_is_not_given_again(run: Run) -> None:
    """The store goes back to before a loss was noticed and accepted: who remembers what came after is not fooled."""

    async def scenario(world: World) -> None:
        engine, other = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        for _ in range(3):
            await put_back(world, session, before)
            with pytest.raises(StateLost):
                await params(engine, session)
            await accepted(world, session)
            await stepped(engine, session, 2)
            assert await params(other, session) == [2.0] * 3
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(other, session)
        assert int((await head_of(world, session))[b"epoch"]) == 3

    run(scenario)


def test_who_stands_at_the_head_learns_of_the_epoch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no reason to read anything anew, and yet must not take the next loss for one that was accepted."""
    monkeypatch.setattr("service.heads.EVERY", 0.1)

    async def scenario(world: World) -> None:
        engine, there = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        assert await params(there, session) == [0.0] * 3
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(engine, session)
        await accepted(world, session)
        before = await saved(world, session)

        async def knows() -> bool:
            return there._live[session].head.epoch == 1

        await until(knows)
        await stepped(there, session, 2)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await step(there, session)

    run(scenario)


class Front:
    """Between a service and the store: passes all on, and once breaks a connection off in place of what matches."""

    def __init__(self, embedded: Embedded) -> None:
        self._back = str(embedded.data / "valkey.sock")
        self._path = str(embedded.data / "front.sock")
        self.url = f"unix://{self._path}"
        self._pumps: set[asyncio.Task[None]] = set()
        self.breaks_off: re.Pattern[bytes] | None = None

    async def __aenter__(self) -> "Front":
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_unix_connection(self._back)
        for pump in (self._pump(reader, back_writer), self._pump(back_reader, writer)):
            self._pumps.add(asyncio.create_task(pump))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while piece := await reader.read(1 << 16):
                if self.breaks_off is not None and self.breaks_off.match(piece):
                    self.breaks_off = None
                    return
                writer.write(piece)
                await writer.drain()


APPENDED = re.compile(rb"\*\d\r\n\$2\r\nOK\r\n")  # the reply of commit.lua


@pytest.mark.parametrize("moves", ["its append", "an append whose reply is lost", "the append of another"])
def test_who_stood_at_the_head_knows_of_the_epoch_when_it_moves_on(run: Run, moves: str) -> None:
    """Before it looks or reads, and the store goes back to before that at once."""

    async def scenario(world: World) -> None:
        async with Front(world.embedded) as front:
            engine, there = await world.replica(), await world.replica(front.url)
            session = await created(engine, **SGD)
            assert await params(there, session) == [0.0] * 3
            before = await saved(world, session)
            await stepped(engine, session, 1)
            await put_back(world, session, before)
            with pytest.raises(StateLost):
                await params(engine, session)
            await accepted(world, session)
            before = await saved(world, session)
            if moves == "the append of another":
                await stepped(await world.replica(), session, 1)
            lost = moves == "an append whose reply is lost"
            front.breaks_off = APPENDED if lost else None
            seen = await stepped(there, session, 1)
            assert front.breaks_off is None
            await put_back(world, session, before)
            with pytest.raises(StateLost) as told:
                await step(there, session)
            assert (told.value.acknowledged, told.value.found.step) == (seen, 0)
            await engine.delete(session, None)

    run(scenario)


def test_what_is_known_of_the_epoch_does_not_sink(run: Run) -> None:
    """The store goes back to before a loss was accepted, to where it is on the line all the same, and forth again."""

    async def scenario(world: World) -> None:
        engine, there = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        assert await params(there, session) == [0.0] * 3
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(engine, session)
        await accepted(world, session)
        after = await saved(world, session)
        assert await params(there, session) == [0.0] * 3
        await put_back(world, session, before)
        assert await params(there, session) == [0.0] * 3
        await stepped(there, session, 2)
        await put_back(world, session, after)
        with pytest.raises(StateLost):
            await step(there, session)

    run(scenario)


def test_a_round_goes_on_when_it_was_accepted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline passes while the session is lost."""
    monkeypatch.setattr(deadlines, "POSTPONED", 0.3)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        aggregation = {"mode": "sync", "workers": 3, "quorum": 1, "timeout": 1.0}
        session = await created(engine, **SGD, aggregation=aggregation)
        await engine.step(session, request(1.0, worker="a"), copied)
        before = await saved(world, session)
        await engine.step(session, request(1.0, worker="b"), copied)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(engine, session)
        await asyncio.sleep(1.5)
        await accepted(world, session)

        async def closed() -> bool:
            return (await engine.stamp(session)).step == 1

        await until(closed)

    run(scenario)


# -- no alarm for nothing ----------------------------------------------------------------------------------------------


def place(known: Head, seq: int, commit: str) -> Known:
    return known.known._replace(seq=seq, commit=commit)


async def is_on_line(store: Store, session: str, known: Known) -> bool:
    tail = await store.tail(session, -2, known)
    assert tail is not None
    return tail.on_line


def test_every_place_that_was_is_on_the_line_and_no_other(run: Run) -> None:
    """Of a session whose log is cut now and then, once by a release that leaves no trail."""

    async def scenario(world: World) -> None:
        store = Store(world.embedded.url)
        await store.open()
        rng = random.Random(7)
        session, commit = await made(store)
        commits, without_trail = [commit], 0
        for cut in range(12):
            items = chain(commits[-1], range(len(commits), len(commits) + rng.randrange(1, 9)))
            assert await store.append(session, commits[-1], items) == "OK"
            commits += [item.commit for item in items]
            head = await store.head(session)
            assert head is not None
            at = rng.randrange(head.base + 1, head.seq + 1)
            gone = [] if cut == 5 else [(commits[seq], 0) for seq in range(head.base + 1, at + 1)]
            without_trail = at if cut == 5 else without_trail
            head.commit = commits[at]
            assert await store.snapshot(session, head, gone, at, f"snap{cut}", pieces(at)) == "OK"
            head = await store.head(session)
            assert head is not None
            for seq, was in enumerate(commits):
                assert await is_on_line(store, session, place(head, seq, was))
                trailed = (cut < 5 and seq > 0) or (cut > 5 and seq > without_trail)
                assert await is_on_line(store, session, place(head, seq, new_commit())) != (trailed or seq >= head.base)
            assert not await is_on_line(store, session, place(head, len(commits), new_commit()))
        await store.close()

    run(scenario)


def test_the_trail_has_its_length_and_goes_with_the_session(run: Run) -> None:
    async def scenario(world: World) -> None:
        store = Store(world.embedded.url)
        await store.open()
        session, commit = await made(store)
        items = chain(commit, range(1, 12_001))
        for start in range(0, len(items), 4000):
            parent = items[start - 1].commit if start else commit
            assert await store.append(session, parent, items[start : start + 4000]) == "OK"
            head = await store.head(session)
            assert head is not None
            gone = [(item.commit, 0) for item in items[start : start + 4000]]
            assert await store.snapshot(session, head, gone, head.seq, f"snap{start}", pieces(start)) == "OK"
        assert await world.raw.llen(key(session, "trail")) == 10_000
        head = await store.head(session)
        assert head is not None
        assert not await is_on_line(store, session, place(head, 2001, new_commit()))
        assert await is_on_line(store, session, place(head, 2001, items[2000].commit))
        assert await is_on_line(store, session, place(head, 2000, new_commit()))  # too long ago to be known
        assert await store.delete(session, head, None) == "OK"
        assert await world.keys(session) == set()
        await store.close()

    run(scenario)


class Racers:
    """Clients of several replicas, who do whatever comes to their minds."""

    def __init__(self, world: World, replicas: list[Engine], sessions: dict[str, int], calls: int) -> None:
        self.world = world
        self.replicas = replicas
        self.sessions = sessions
        self.left = calls  # that are still to be answered
        self.alarms: list[StateLost] = []
        self._rng = random.Random(3)

    async def work(self, number: int) -> None:
        while self.left > 0:
            session, size = self._rng.choice(list(self.sessions.items()))
            try:
                await self._one(self._rng.choice(self.replicas), session, size, f"w{number}")
                self.left -= 1
            except StateLost as alarm:
                self.alarms.append(alarm)
            except (CoreError, ServiceError):
                pass

    async def _one(self, engine: Engine, session: str, size: int, worker: str) -> None:
        what = self._rng.random()
        if what < 0.8:
            await engine.step(session, request(1.0, size, worker=worker, key=f"{self._rng.random()}"), copied)
        elif what < 0.9:
            await engine.params(session, "next")
        elif what < 0.95:
            await engine.session(session)
        else:
            forked, _ = await engine.fork(session)
            await engine.step(str(forked["id"]), request(1.0, size, worker="a"), copied)
            await self._rng.choice(self.replicas).delete(str(forked["id"]), None)

    async def cut(self) -> None:
        while self.left > 0:
            await asyncio.sleep(0.3)
            await self.world.raw.client_kill_filter(_type="normal", skipme=True)


ROUNDS = {"mode": "sync", "workers": 2}


@pytest.mark.parametrize("aggregation", [{}, {"aggregation": ROUNDS}], ids=["steps", "rounds"])
def test_replicas_that_race_are_not_alarmed(
    run: Run, monkeypatch: pytest.MonkeyPatch, aggregation: dict[str, Any]
) -> None:
    """With logs that are cut all the time, sessions that leave memory all the time, all places looked at all the time,
    connections that are cut, sessions that end, forks; large gradients among the small.
    """
    monkeypatch.setattr("service.snapshots.SNAPSHOT_FLOOR", 600)
    monkeypatch.setattr("service.engine.WORTH_A_SNAPSHOT", 2)
    monkeypatch.setattr("service.heads.EVERY", 0.0)
    monkeypatch.setattr("service.heads.REST", 0)
    monkeypatch.setattr("service.heads.LOOK", 0.002)
    monkeypatch.setattr("service.heads.PAUSE", 0.0)
    monkeypatch.setattr("service.commits.THREADED", 2000)  # so that threads replay

    async def scenario(world: World) -> None:
        replicas = [await world.replica(budget=budget) for budget in (SMALL, 300_000, 1 << 30)]
        sessions = {}
        for size in (3, 3, 3, 30_000):
            sessions[await created(replicas[0], params={"w": [0.0] * size}, **aggregation)] = size
        racers = Racers(world, replicas, sessions, 500)
        await asyncio.gather(*[racers.work(i) for i in range(12)], racers.cut())
        assert racers.alarms == []
        for session in sessions:
            assert not await is_marked(world, session)
            told = [(await engine.params(session, "next")).flat.tobytes() for engine in replicas]
            assert told[0] == told[1] == told[2]

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
