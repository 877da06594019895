"""A store that lost the log, that is full, that holds what cannot be read, or more lost sessions than are looked at.

Nothing is answered that is not so, and nobody waits for ever because of somebody else's session.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from core.errors import NonFinite
from service import schemas
from service.acks import Asked
from service.documents import Applied, Pending, Precondition
from service.errors import Corrupt, StateLost, StepConflict, StoreFull, StoreUnavailable, Unconfirmed
from service.ids import new_commit
from service.index import DEADLINES
from service.store import Store, key
from tests.faults.stores import storing
from tests.faults.test_acks import REPLICATED, engine_on
from tests.running import ravine
from tests.service.test_acks import replicated
from tests.service.test_lost import SGD, is_marked, put_back, saved, stepped, until
from tests.service.test_store import chain, made, pieces, runs
from tests.service.world import Run, World, copied, created, params, request, step

# Well over what an answer takes; what is never answered fails the test by it.
PATIENCE = 10.0


async def opened(world: World) -> Store:
    store = Store(world.embedded.url)
    await store.open()
    return store


# -- a log that is not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["gone", "begun anew"])
@pytest.mark.parametrize("ask", [step, params], ids=["step", "params"])
def test_a_log_that_was_evicted_is_told_of(run: Run, then: str, ask: Any) -> None:
    """To a service that has the session in memory, and is behind: nothing leads from there to the head."""

    async def scenario(world: World) -> None:
        engine, other = await world.replica(), await world.replica()
        session = await created(engine, **SGD)
        await stepped(engine, session, 2)
        assert await params(other, session) == [2.0] * 3
        await stepped(engine, session, 1)
        await world.raw.delete(key(session, "log"))
        if then == "begun anew":
            await stepped(engine, session, 1)
        for _ in range(2):
            with pytest.raises(Corrupt):
                await asyncio.wait_for(ask(other, session), PATIENCE)

    run(scenario)


# -- a full store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [False, True], ids=["same service", "another"])
def test_who_needs_no_entry_does_not_suffer_from_a_full_store(run: Run, behind: bool) -> None:
    """Repeats and refusals in one batch with what cannot be appended, which is so large that it gets not even there."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        asked = await world.replica() if behind else engine
        session = await created(engine, params={"w": [0.0] * 40_000})
        await params(asked, session)
        first = request(1.0, 40_000, key="k")
        await engine.step(session, first, copied)
        async with world.full():
            outcomes = await asyncio.gather(
                asked.step(session, request(2.0, 40_000), copied),
                asked.step(session, first, copied),
                asked.step(session, request(2.0, 40_000, if_match=Precondition(False, ((7, None),))), copied),
                asked.step(session, request(float("nan"), 40_000), copied),
                asked.step(session, request(3.0, 40_000, key="l"), copied),
                asked.step(session, request(3.0, 40_000, key="l"), copied),
                return_exceptions=True,
            )
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds == [StoreFull, Applied, StepConflict, NonFinite, StoreFull, StoreFull]
        repeated = outcomes[1]
        assert isinstance(repeated, Applied)
        assert (repeated.stamp.step, repeated.replayed) == (1, True)
        assert (await asked.step(session, request(2.0, 40_000), copied)).stamp.step == 2

    run(scenario)


def test_a_round_that_cannot_be_closed_in_a_full_store(run: Run) -> None:
    """Whoever asks is answered; it is closed once there is room."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        aggregation = {"mode": "sync", "workers": 3, "quorum": 1, "timeout": 0.5}
        session = await created(engine, **SGD, aggregation=aggregation)
        await engine.step(session, request(1.0, worker="a", key="a"), copied)
        async with world.full():
            await asyncio.sleep(0.6)
            outcomes = await asyncio.wait_for(
                asyncio.gather(
                    engine.step(session, request(1.0, worker="a", key="a"), copied),
                    engine.step(session, request(1.0, worker="b"), copied),
                    return_exceptions=True,
                ),
                PATIENCE,
            )
            assert isinstance(outcomes[1], StoreFull)

        async def closed() -> bool:
            return (await engine.stamp(session)).step == 1

        await until(closed)

    run(scenario)


def test_what_is_there_is_not_refused_for_want_of_room(tmp_path: Path) -> None:
    """Where an answer is to be vouched for, that takes a write: a store that has no room for it has lost nothing."""

    async def scene() -> None:
        with replicated(tmp_path / "stores", "valkey") as (primary, _):
            async with engine_on(primary.url, REPLICATED) as first, engine_on(primary.url, REPLICATED) as second:
                session = await created(first, **SGD)
                await step(first, session, key="k")
                primary.call("CONFIG", "SET", "maxmemory", "1")
                outcomes = await asyncio.gather(
                    step(second, session, key="k"),
                    step(second, session, if_match=Precondition(False, ((7, None),))),
                    return_exceptions=True,
                )
                assert [type(outcome) for outcome in outcomes] == [Unconfirmed, StepConflict]
                primary.call("CONFIG", "SET", "maxmemory", "0")
                assert (await step(second, session, key="k")).replayed

    runs(asyncio.wait_for(scene(), 30))


def test_confirming_in_a_full_store(tmp_path: Path) -> None:
    async def scene() -> None:
        with storing(tmp_path, "--save", "", "--appendonly", "yes", "--appendfsync", "always") as server:
            store = Store(server.url, asked=Asked("disk", seconds=0.3))
            await store.open()
            session, commit = await made(store)
            server.call("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(Unconfirmed):
                await store.confirm(session, commit)
            server.call("CONFIG", "SET", "maxmemory", "0")
            assert await store.confirm(session, commit) == "OK"
            await store.close()

    runs(asyncio.wait_for(scene(), 30))


# -- sessions that end -------------------------------------------------------------------------------------------------


def test_who_finds_nothing_to_delete_has_deleted_nothing(run: Run) -> None:
    """Both saw the session; a barrier behind what wrote nothing would vouch for nothing."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        outcomes = await asyncio.gather(*[engine.delete(session, None) for _ in range(2)], return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "SessionNotFound"]

    run(scenario)


# -- the trail ---------------------------------------------------------------------------------------------------------


def test_a_long_log_is_cut_in_few_calls(run: Run) -> None:
    """However many entries go: the store does nothing else meanwhile."""

    async def scenario(world: World) -> None:
        store = await opened(world)
        session, commit = await made(store)
        parent, cuts = commit, [100, 25_000]
        for cut, count in enumerate(cuts):
            head = await store.head(session)
            assert head is not None
            items = chain(parent, range(head.seq + 1, head.seq + count + 1))
            for start in range(0, count, 5000):
                batch = items[start : start + 5000]
                assert await store.append(session, parent, batch) == "OK"
                parent = batch[-1].commit
            head = await store.head(session)
            assert head is not None
            await world.raw.config_resetstat()
            gone = [(item.commit, 0) for item in items]
            assert await store.snapshot(session, head, gone, head.seq, f"snap{cut}", pieces(head.seq)) == "OK"
        assert (await world.raw.info("commandstats"))["cmdstat_rpush"]["calls"] <= 20
        kept = [item.commit.encode() for item in items[-10_000:]]
        assert await world.raw.lrange(key(session, "trail"), 0, -1) == kept
        head = await store.head(session)
        assert head is not None
        assert await world.raw.hget(key(session, "head"), "trail") == str(head.seq).encode()
        await store.close()

    run(scenario)


# -- rounds of lost sessions -------------------------------------------------------------------------------------------

ROUND = {"mode": "sync", "workers": 3, "quorum": 1, "timeout": 0.3}


async def due(world: World, session: str) -> float | None:
    found: float | None = await world.raw.zscore(DEADLINES, f"{session} 1")
    return found


def test_rounds_of_lost_sessions_are_in_nobodys_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them are due than are looked at at once, for longer than the healthy one is; then one is accepted."""
    monkeypatch.setattr("service.deadlines.MANY", 3)
    monkeypatch.setattr("service.deadlines.POSTPONED", 0.5)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        lost = []
        for _ in range(6):
            lost.append(await created(engine, **SGD, aggregation=ROUND))
            await engine.step(lost[-1], request(1.0, worker="a"), copied)
            before = await saved(world, lost[-1])
            await engine.step(lost[-1], request(1.0, worker="b"), copied)
            await put_back(world, lost[-1], before)
            with pytest.raises(StateLost):
                await params(engine, lost[-1])
        healthy = await created(engine, **SGD, aggregation={**ROUND, "timeout": 3600.0})
        await engine.step(healthy, request(1.0, worker="a"), copied)
        await engine.stop()
        await world.raw.zadd(DEADLINES, {f"{session} 1": 1.0 for session in lost} | {f"{healthy} 1": 2.0})
        other = await world.replica()

        async def seen_to() -> bool:
            at = await due(world, healthy)
            return at is not None and at > time.time() + 1000  # it is not over yet

        await until(seen_to)
        for session in lost:
            assert await due(world, session) is not None

        store = await opened(world)
        head = await store.head(lost[0])
        assert head is not None
        assert await store.accept(lost[0], head) == "OK"
        await store.close()

        async def closed() -> bool:
            return (await other.stamp(lost[0])).step == 1

        await until(closed)

    run(scenario)


def test_a_round_of_another_format_keeps_its_deadline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer release will see to it, however long that takes."""
    monkeypatch.setattr("service.deadlines.AGAIN", 0.05)
    monkeypatch.setattr("service.deadlines.LOST", 0.2)
    monkeypatch.setattr("service.deadlines.POSTPONED", 0.2)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD, aggregation={**ROUND, "timeout": 0.5})
        await engine.step(session, request(1.0, worker="a"), copied)
        await world.raw.hset(key(session, "head"), mapping={"format": "2", "commit": "0123456789abcdef"})
        await asyncio.sleep(2.5)
        assert await due(world, session) is not None
        await world.raw.delete(key(session, "head"))

        async def forgotten() -> bool:
            return await due(world, session) is None

        await until(forgotten)

    run(scenario)


# -- heads that cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["epoch", "kind"])
def test_one_that_cannot_be_read_hides_nobody(run: Run, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr("service.heads.EVERY", 0.1)
    monkeypatch.setattr("service.heads.LOOK", 0.05)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        sessions = [await created(engine, **SGD) for _ in range(3)]
        before = [await saved(world, session) for session in sessions]
        for session in sessions:
            await stepped(engine, session, 1)
        if damage == "epoch":
            await world.raw.hset(key(sessions[0], "head"), "epoch", "many")
        else:
            await world.raw.delete(key(sessions[0], "head"))
            await world.raw.set(key(sessions[0], "head"), "no hash")
        with pytest.raises(Corrupt):
            await params(engine, sessions[0])
        await asyncio.sleep(0.3)
        for session, keys in zip(sessions[1:], before[1:], strict=True):
            await put_back(world, session, keys)
            await until(lambda session=session: is_marked(world, session))  # type: ignore[misc]

    run(scenario)


# -- an append that nobody knows the outcome of ------------------------------------------------------------------------


def test_what_the_trail_tells_of_an_append(run: Run) -> None:
    """What is in neither the trail nor the log behind it was never there, as far back as the trail reaches."""

    async def scenario(world: World) -> None:
        store = await opened(world)
        session, commit = await made(store)
        items = chain(commit, range(1, 6))
        assert await store.append(session, commit, items) == "OK"
        await world.raw.delete(key(session, "history"))  # as of contributions to a round, which are not in it
        head = await store.head(session)
        assert head is not None
        head.commit = items[2].commit
        gone = [(item.commit, 0) for item in items[:3]]
        assert await store.snapshot(session, head, gone, 3, "snap1", pieces(3)) == "OK"
        for item in items:
            assert await store.landed(session, commit, item.commit, 0) == "OK"
        assert await store.landed(session, commit, new_commit(), 0) == "STALE"
        await world.raw.ltrim(key(session, "trail"), 1, -1)
        assert await store.landed(session, items[0].commit, new_commit(), 1) == "STALE"
        with pytest.raises(StoreUnavailable):  # it does not reach so far
            await store.landed(session, commit, new_commit(), 0)
        await world.raw.hset(key(session, "head"), "trail", 2)
        with pytest.raises(StoreUnavailable):  # it is an older one
            await store.landed(session, items[0].commit, new_commit(), 1)
        await store.close()

    run(scenario)


# -- marks -------------------------------------------------------------------------------------------------------------


def test_a_mark_that_came_back_is_accepted_once(run: Run) -> None:
    """The store goes back to a loss that was accepted already, and whoever went on from there asks for one more."""

    async def scenario(world: World) -> None:
        engine, store = await world.replica(), await opened(world)
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(engine, session)
        marked = await saved(world, session)
        await accept(store, session)
        await stepped(engine, session, 1)
        await put_back(world, session, marked)
        with pytest.raises(StateLost):
            await params(engine, session)
        await accept(store, session)
        assert await params(engine, session) == [0.0] * 3
        await store.close()

    run(scenario)


async def accept(store: Store, session: str) -> None:
    head = await store.head(session)
    assert head is not None
    assert await store.accept(session, head) == "OK"


def test_what_is_accepted_is_what_was_told(run: Run) -> None:
    """A service that saw more marks it between the question and the answer."""

    async def scenario(world: World) -> None:
        less, more, store = await world.replica(), await world.replica(), await opened(world)
        session = await created(less, **SGD)
        before = await saved(world, session)
        await stepped(less, session, 1)
        await stepped(more, session, 1)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(less, session)
        told = await store.head(session)
        assert told is not None
        with pytest.raises(StateLost):
            await params(more, session)
        assert await store.accept(session, told) == "STALE"
        assert await is_marked(world, session)
        await accept(store, session)
        assert await params(more, session) == [0.0] * 3
        await store.close()

    run(scenario)


# -- what an operator is shown -----------------------------------------------------------------------------------------


def test_lost_sessions_of_all_tenants_are_listed(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        document, arrays = schemas.parse_create({"optimizer": {"kind": "sgd", "lr": 1.0}, **SGD})
        sessions = {}
        for tenant in ("default", "acme", "zoo"):
            made_, _ = await engine.create(document, arrays, tenant)
            session = sessions[tenant] = str(made_["id"])
            before = await saved(world, session)
            await stepped(engine, session, 1)
            await put_back(world, session, before)
            with pytest.raises(StateLost):
                await params(engine, session)
        await created(engine, **SGD)
        await world.raw.hset(key(await created(engine, **SGD), "head"), "format", "2")
        assert await listed(world, "--lost") == list(sessions.values())
        assert await listed(world, "--lost", "--tenant", "acme") == [sessions["acme"]]
        assert len(await listed(world)) == 3

    run(scenario)


async def listed(world: World, *options: str) -> list[str]:
    done = await asyncio.to_thread(ravine, "sessions", "list", "--redis-url", world.embedded.url, *options)
    assert done.returncode == 0
    return [line.split()[0] for line in done.stdout.splitlines()]


# -- what a contribution is told ---------------------------------------------------------------------------------------


def test_a_contribution_has_one_etag(run: Run) -> None:
    """Whether its sender waits for the round or sends it again, when others came after."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD, aggregation={"mode": "sync", "workers": 2})
        sent = request(1.0, worker="a", key="a", returns="none")
        pending = await engine.step(session, sent, copied)
        assert isinstance(pending, Pending)
        for worker in ("b", "a", "b"):
            await engine.step(session, request(1.0, worker=worker), copied)
        waited, repeated = await engine.round(session, sent, pending, copied), await engine.step(session, sent, copied)
        assert isinstance(waited, Applied)
        assert isinstance(repeated, Applied)
        assert waited.stamp == repeated.stamp
        assert waited.stamp.step == 1

    run(scenario)
