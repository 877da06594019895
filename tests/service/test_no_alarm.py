"""Nothing but a loss is taken for one: not races, cuts of the log, connections that end, places of long ago."""

import asyncio
import random
from typing import Any

import pytest

from core.errors import CoreError
from service.engine import Engine
from service.errors import ServiceError, StateLost
from service.ids import new_commit
from service.records import Head, Known
from service.store import Store, key
from tests.service.losses import SMALL, is_marked
from tests.service.test_store import chain, made, pieces
from tests.service.world import Run, World, copied, created, request


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
