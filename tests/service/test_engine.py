"""The engine over a real store: order, once-only steps, what outlives a lost reply, and what others see meanwhile."""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import service.store
from core.errors import CoreError, ParamsNotHeld
from core.session import Session
from service import live as files
from service import schemas, tenants
from service.access.usage import Quota, bytes_in
from service.documents import Applied, Precondition, Stamp
from service.engine import Engine
from service.errors import (
    KeyReused,
    QuotaExceeded,
    SessionNotFound,
    StateLost,
    StepConflict,
    StoreFull,
    StoreUnavailable,
)
from tests.service.world import Run, World, created, params, step

SMALL = 50_000  # parameters that are changed in place, and yet too large to go inline
LARGE = 100_000  # parameters whose gradient travels alone


# -- making ------------------------------------------------------------------------------------------------------------


def test_others_are_answered_while_the_arrays_of_a_large_session_are_made(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held up until somebody else was answered."""
    answered, held_up, made = threading.Event(), [False], Session.new

    def held(*arguments: Any) -> Session:
        held_up[0] = True
        assert answered.wait(20), "nobody else is answered meanwhile"
        return made(*arguments)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        monkeypatch.setattr(Session, "new", held)
        creating = asyncio.create_task(created(engine, shapes={"w": [LARGE]}))
        while not held_up[0]:  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.001)
        assert await engine.ready()
        assert not creating.done()
        answered.set()
        await step(engine, await creating, size=LARGE)

    run(scenario)


def test_no_array_is_made_that_the_tenant_may_not_have(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(1, 1 << 20))
        session = await created(engine, params={"w": [0.0] * 3})
        await step(engine, session)
        tensors, text, _ = await engine.checkpoint(session)
        for name in ("new", "__init__"):
            monkeypatch.setattr(Session, name, None)
        monkeypatch.setattr(files.Live, "frozen", None)
        with pytest.raises(QuotaExceeded):
            await created(engine, params={"w": [0.0] * 3})
        with pytest.raises(QuotaExceeded):
            await engine.restore(tensors, text)
        with pytest.raises(QuotaExceeded):
            await engine.fork(session)

    run(scenario)


def test_what_cannot_be_made_takes_no_room(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(2, 1 << 20))
        session = await created(engine, params={"w": [0.0] * 3})
        before = {name: await world.raw.dump(name) for name in ("ravine:usage", "ravine:sessions")}
        tensors, text, _ = await engine.checkpoint(session)
        with pytest.raises(CoreError):
            await engine.restore({"w": tensors["w"][:2]}, text)
        document, params_ = schemas.parse_create({"optimizer": "sgd", "params": {"w": [0.0] * 3}})
        assert params_ is not None
        with pytest.raises(CoreError):
            await engine.create(document, {"w": params_["w"][:2]})
        assert {name: await world.raw.dump(name) for name in before} == before

    run(scenario)


def test_a_fork_is_of_the_document_that_room_was_made_for(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(50))
        session = await created(engine, params={"w": [0.0] * 3})
        grown = schemas.patch({"transforms": [{"kind": "ema", "decay": 0.5}]})
        forking = [asyncio.create_task(engine.fork(session)) for _ in range(20)]
        await engine.patch(session, grown, None)
        made = [(await each)[0] for each in forking]
        found = {each["id"]: await engine._store.head(each["id"]) for each in made}
        counted = await world.raw.hgetall("ravine:usage")
        for id_, head in found.items():
            assert head is not None
            assert int(counted[id_.encode()].split(b" ")[0]) == bytes_in(head)

    run(scenario)


def test_a_session_that_takes_long_to_make_is_listed_all_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "MAKING", 0)

    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(10))
        put = engine._store.create

        async def listed_meanwhile(*arguments: Any) -> None:
            assert (await engine.sessions(10, None, None))[0] == []
            assert not await world.raw.exists("ravine:usage")
            await put(*arguments)

        monkeypatch.setattr(engine._store, "create", listed_meanwhile)
        session = await created(engine, params={"w": [0.0] * 3}, labels={"team": "vision"})
        for label in (None, ("team", "vision")):
            assert [each["id"] for each in (await engine.sessions(10, None, label))[0]] == [session]
        assert await world.raw.hexists("ravine:usage", session)

    run(scenario)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_what_is_refused_takes_nothing_with_it(run: Run) -> None:
    """Parameters of a session that holds none cannot be returned: known before the step, and nobody else's affair."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, shapes={"w": [3]})
        wanted = (None, "params", None, "updates", "params")
        outcomes = await asyncio.gather(
            *[step(engine, session, i, returns=returns) for i, returns in enumerate(wanted)], return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [Applied, ParamsNotHeld, Applied, Applied, ParamsNotHeld]
        assert [outcome.stamp.step for outcome in outcomes if isinstance(outcome, Applied)] == [1, 2, 3]
        assert (await engine.stamp(session)).step == 3

    run(scenario)


def test_preconditions_hold_within_a_batch(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})
        at = [Precondition(any=False, stamps=((number, None),)) for number in (0, 0, 1, 7, 2)]
        outcomes = await asyncio.gather(
            *[step(engine, session, if_match=precondition) for precondition in at], return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [Applied, StepConflict, Applied, StepConflict, Applied]
        assert await params(engine, session) == [3.0] * 3

    run(scenario)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_counts_once_within_a_batch_across_replicas_and_after_a_restart(run: Run) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, params={"w": [0.0] * 3})
        outcomes = await asyncio.gather(
            *[step(engine, session, key="once") for engine in (first, first, second, second)],
        )
        assert [outcome.stamp.step for outcome in outcomes] == [1] * 4
        assert sorted(outcome.replayed for outcome in outcomes) == [False, True, True, True]
        with pytest.raises(KeyReused):
            await step(second, session, 2.0, key="once")
        unchanged = Precondition(any=False, stamps=((0, None),))
        assert (await step(second, session, key="once", if_match=unchanged)).replayed
        for i in range(400):  # the log is cut meanwhile
            await step(second, session, key=f"other {i}", returns="none")
        third = await world.replica()
        assert (await step(third, session, key="once")).replayed
        assert await params(third, session) == [401.0] * 3
        head = await service.store.Store.head(third._store, session)
        assert head is not None
        assert head.base > 0

    run(scenario)


def test_updates_are_kept_for_the_workers_whose_keys_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WINDOW", 20)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, shapes={"w": [3]})
        first = await step(engine, session, 5.0, key="k0", worker="w0")
        again = await step(engine, session, 5.0, key="k0", worker="w0")
        assert again.updates is not None
        assert first.updates is not None
        assert again.updates.tobytes() == first.updates.tobytes()
        for i in range(1, 60):
            await step(engine, session, key=f"k{i}", worker=f"w{i}")
        other = await world.replica()
        assert (await step(other, session, key="k59", worker="w59")).updates is not None
        for replica in (engine, other):
            assert set(replica._live[session].kept) == {f"w{i}" for i in range(40, 60)}

    run(scenario)


# -- replies that are lost ---------------------------------------------------------------------------------------------


class Wire:
    """Between a replica and the store. The first commit is swallowed with its connection, and gets there later."""

    def __init__(self, store: Path, late: int, meanwhile: Callable[[], Awaitable[object]] | None) -> None:
        self._store = store
        self._sha = hashlib.sha1((Path(service.store.__file__).parent / "commit.lua").read_bytes()).hexdigest().encode()
        self._late, self._meanwhile = late, meanwhile
        self._swallowed: bytes | None = None
        self._since = 0

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[str]:
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield f"unix://{path}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, out = await asyncio.open_unix_connection(self._store)
        back = asyncio.create_task(self._copy(upstream, writer))
        try:
            while data := await reader.read(1 << 20):
                if self._sha in data and self._swallowed is None:
                    self._swallowed = data
                    break
                if b"ravine:{" in data:  # and not what a new connection begins with
                    await self._before()
                out.write(data)
        finally:
            back.cancel()
            out.close()
            writer.close()

    async def _before(self) -> None:
        if self._swallowed is None:
            return
        self._since += 1
        if self._since == self._late:
            reader, writer = await asyncio.open_unix_connection(self._store)
            writer.write(self._swallowed)
            assert b"OK" in await reader.read(100)
            writer.close()
            if self._meanwhile is not None:
                await self._meanwhile()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            writer.write(data)


@pytest.mark.parametrize("late", [1, 2, 3])
@pytest.mark.parametrize("others", [False, True])
def test_a_commit_that_arrives_late_counts_once(run: Run, tmp_path: Path, late: int, others: bool) -> None:
    """Its connection breaks, and the store gets it before the `late`-th command that asks what became of it."""

    async def scenario(world: World) -> None:
        direct = await world.replica()
        session = await created(direct, params={"w": [0.0] * 3})
        await step(direct, session, 100.0)  # and the store knows the script

        async def meanwhile() -> Applied:
            return await step(direct, session, 10.0)

        wire = Wire(Path(world.embedded.url.removeprefix("unix://")), late, meanwhile if others else None)
        async with wire.listening(tmp_path / "wire.sock") as url:
            engine = await world.replica(url)
            await engine.session(session)
            applied = await step(engine, session, 1.0)
            assert applied.stamp.step == 2
            assert applied.params is not None
            assert applied.params.tolist() == [101.0] * 3
            expected = [111.0 if others else 101.0] * 3
            assert await params(engine, session) == await params(direct, session) == expected
            await engine.stop()

    run(scenario)


# -- what others still look at -----------------------------------------------------------------------------------------


def test_the_next_step_changes_nothing_that_was_given_out(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * SMALL})
        await step(engine, session, 1.0, size=SMALL, returns="none")
        checkpoint, _, _ = await engine.checkpoint(session)
        snapshot, _ = files.snapshot(engine._live[session], schemas.brief_of, copy=True)
        await step(engine, session, 1.0, size=SMALL, returns="none")
        for array in (checkpoint["w"], snapshot["w"]):
            assert set(array.tolist()) == {1.0}
        point = await engine.params(session, "next")
        await step(engine, session, 1.0, size=SMALL, returns="none")
        assert set(point.flat.tolist()) == {2.0}

    run(scenario)


def test_forks_are_of_one_commit(run: Run) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, params={"w": [0.0] * SMALL})
        stepping = [step(first, session, size=SMALL, returns="none") for _ in range(30)]
        forking = [first.fork(session) for _ in range(10)]
        outcomes = await asyncio.gather(*[call for pair in zip(stepping[:10], forking, strict=True) for call in pair])
        await asyncio.gather(*stepping[10:])
        for fork, stamp in (outcome for outcome in outcomes if isinstance(outcome, tuple)):
            assert set(await params(second, fork["id"])) == {float(stamp.step)}

    run(scenario)


# -- the store goes away, fills up, goes back --------------------------------------------------------------------------


def test_waiting_goes_on_while_the_store_is_away(run: Run) -> None:
    """Nobody else listens, so nothing is subscribed to: what looks after subscriptions must not spin."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})
        world.kill_store()
        with pytest.raises(StoreUnavailable):
            await engine.wait(session, 0, 1.0)
        await world.embedded.ensure()
        waiting = asyncio.create_task(engine.wait(session, 0, 30.0))
        await asyncio.sleep(0.1)
        await step(engine, session)
        assert await waiting

    run(scenario)


def test_the_first_step_after_the_store_came_back(run: Run) -> None:
    """Connections that lie idle are dead then, however many there are."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        sessions = [await created(engine, params={"w": [0.0] * LARGE}) for _ in range(100)]
        await asyncio.gather(*[step(engine, session, size=LARGE, key="1") for session in sessions])
        world.kill_store()
        with pytest.raises(StoreUnavailable):
            await step(engine, sessions[0], size=LARGE, key="2")
        await world.embedded.ensure()
        outcomes = await asyncio.gather(*[step(engine, session, size=LARGE, key="2") for session in sessions])
        assert {outcome.stamp.step for outcome in outcomes} == {2}

    run(scenario)


def test_stopping_while_the_store_is_away(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})
        world.kill_store()
        calls = [asyncio.create_task(step(engine, session)) for _ in range(5)]
        waiting = asyncio.create_task(engine.wait(session, 0, 30.0))
        await asyncio.sleep(0.1)
        waiting.cancel()
        async with asyncio.timeout(20):
            await engine.stop()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
        await world.embedded.ensure()

    run(scenario)


def test_a_full_store_refuses_steps_and_lets_read(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})
        await step(engine, session)
        async with world.full():
            outcomes = await asyncio.gather(
                step(engine, session), params(engine, session), step(engine, session), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [StoreFull, list, StoreFull]
            assert outcomes[1] == [1.0] * 3
        assert (await step(engine, session)).stamp.step == 2

    run(scenario)


def test_a_store_that_went_back_is_noticed_and_not_harmed(run: Run) -> None:
    """As after a failover to a replica that lagged. test_lost.py has the rest."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})
        for _ in range(3):
            await step(engine, session)
        before = {name: await world.raw.dump(name) for name in await world.keys(session)}
        for _ in range(40):
            await step(engine, session)
        for name, value in before.items():
            await world.raw.restore(name, 0, value, replace=True)
        live = engine._live[session]
        engine._snapshots.begin(live)  # as when it leaves memory
        assert live.snapshot is not None
        await live.snapshot
        assert await params(await world.replica(), session) == [3.0] * 3
        with pytest.raises(StateLost) as lost:
            await params(engine, session)
        assert (lost.value.acknowledged.step, lost.value.found.step) == (43, 3)

    run(scenario)


# -- loading, leaving, ending ------------------------------------------------------------------------------------------


def test_a_session_is_loaded_once_even_if_who_asked_first_is_gone(run: Run) -> None:
    async def scenario(world: World) -> None:
        maker, engine = await world.replica(), await world.replica()
        session = await created(maker, params={"w": [0.0] * 3})
        calls = [asyncio.create_task(step(engine, session)) for _ in range(3)]
        await asyncio.sleep(0)
        calls[0].cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, Applied, Applied]
        assert list(engine._live) == [session]
        assert (await step(engine, session)).stamp.step == 3
        assert not engine._residents.loading

    run(scenario)


def test_more_sessions_than_memory(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(budget=60_000)
        sessions = [await created(engine, params={"w": [0.0] * 3}) for _ in range(12)]
        for i in range(40):
            outcomes = await asyncio.gather(*[step(engine, session) for session in sessions])
            assert {outcome.stamp.step for outcome in outcomes} == {i + 1}
        assert len(engine._live) < 8
        assert engine.hot[1] == sum(live.cost for live in engine._live.values())
        assert {tuple(await params(engine, session)) for session in sessions} == {(40.0,) * 3}

    run(scenario)


def test_deleting_amid_steps_leaves_nothing(run: Run) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, params={"w": [0.0] * SMALL}, non_finite="skip")
        calls = [step(first, session, size=SMALL, returns="none") for _ in range(20)]
        calls += [step(first, session, float("nan"), size=SMALL, returns="none") for _ in range(5)]
        under_way = [asyncio.create_task(call) for call in calls]
        await under_way[0]
        await second.delete(session, None)
        outcomes = await asyncio.gather(*under_way, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {Applied, SessionNotFound}
        with pytest.raises(SessionNotFound):
            await first.params(session, "next")
        deadline = time.monotonic() + 10
        while await world.keys(session) and time.monotonic() < deadline:  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.02)
        assert await world.keys(session) == set()

    run(scenario)


def test_two_replicas_and_one_order(run: Run) -> None:
    async def scenario(world: World) -> None:
        engines: Sequence[Engine] = [await world.replica(), await world.replica()]
        session = await created(engines[0], params={"w": [0.0] * SMALL})
        taken: dict[int, Stamp] = {}

        async def worker(engine: Engine) -> None:
            for _ in range(15):
                stamp = (await step(engine, session, size=SMALL, returns="none")).stamp
                assert stamp.step not in taken
                taken[stamp.step] = stamp

        await asyncio.gather(*[worker(engine) for engine in (*engines, *engines)])
        assert sorted(taken) == list(range(1, 61))
        points: list[Mapping[str, Any]] = [(await engine.checkpoint(session))[0] for engine in engines]
        assert set(points[0]["w"].tolist()) == set(points[1]["w"].tolist()) == {60.0}

    run(scenario)
