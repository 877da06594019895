"""Once an operator accepts a loss all go on from what is left, and who has more to tell tells it."""

import asyncio
import contextlib
import re
import sys

import pytest

from service import deadlines
from service.documents import Stamp
from service.embedded import Embedded
from service.engine import Engine
from service.errors import Place, StateLost
from service.records import Head
from service.store import Store, key
from tests.service.losses import SGD, accepted, head_of, put_back, saved, stepped, until
from tests.service.world import Run, World, copied, created, params, request, step


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of themselves services look soon after their start, which may be anywhere in a scenario."""
    monkeypatch.setattr("service.heads.LOOK", 3600.0)


async def lost(world: World, engine: Engine, session: str, before: dict[bytes, bytes]) -> Place:
    """Loses what came since, and accepts it. Returns what was told."""
    await put_back(world, session, before)
    with pytest.raises(StateLost) as told:
        await params(engine, session)
    await accepted(world, session)
    return told.value.acknowledged


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
        assert await lost(world, engine, session, before) == seen
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
    monkeypatch.setattr("service.heads.LOOK", 0.1)
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


def test_who_saw_more_than_was_accepted_tells_of_it(run: Run) -> None:
    """As where two primaries were stepped on: what one of them lost was accepted, and the other had gone further."""

    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, **SGD)
        before = await saved(world, session)
        await stepped(first, session, 2)
        await stepped(second, session, 3)  # of which the first one knows nothing
        assert (await lost(world, first, session, before)).step == 2
        await stepped(first, session, 1)
        with pytest.raises(StateLost) as more:
            await params(second, session)
        assert more.value.acknowledged.step == 5
        with pytest.raises(StateLost):
            await step(first, session)
        await accepted(world, session)
        assert await params(second, session) == await params(first, session)
        await stepped(second, session, 1)

    run(scenario)


def test_a_larger_loss_before_hides_nothing(run: Run) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, **SGD)
        before = await saved(world, session)
        await stepped(first, session, 20)
        assert (await lost(world, first, session, before)).step == 20
        await stepped(first, session, 1)
        before = await saved(world, session)
        await stepped(first, session, 2)
        seen = await stepped(second, session, 3)
        assert (await lost(world, first, session, before)).step == 3
        await stepped(first, session, 1)
        with pytest.raises(StateLost) as more:
            await params(second, session)
        assert more.value.acknowledged == seen

    run(scenario)


def test_another_branch_is_told_of_however_short(run: Run) -> None:
    """Two primaries went on from step 2, one to 5, one to 8; both are lost, and only the longer one was told."""

    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        session = await created(first, **SGD)
        await stepped(first, session, 2)
        before = await saved(world, session)
        shorter = await stepped(second, session, 3)
        await put_back(world, session, before)
        await stepped(first, session, 6)
        assert (await lost(world, first, session, before)).step == 8
        with pytest.raises(StateLost) as told:
            await params(second, session)
        assert told.value.acknowledged == shorter
        await accepted(world, session)
        assert await params(second, session) == await params(first, session)

    run(scenario)


def test_all_who_told_before_it_was_accepted_go_on(run: Run) -> None:
    """Whoever saw less than another, and told of it in time."""

    async def scenario(world: World) -> None:
        replicas = [await world.replica() for _ in range(3)]
        session = await created(replicas[0], **SGD)
        before = await saved(world, session)
        for replica in replicas:
            await stepped(replica, session, 2)
        await put_back(world, session, before)
        for replica in replicas[::-1]:
            with pytest.raises(StateLost) as told:
                await params(replica, session)
            assert told.value.acknowledged.step == 6
        await accepted(world, session)
        for replica in replicas:
            assert await params(replica, session) == [0.0] * 3

    run(scenario)


ACCEPTED_BEFORE = """
redis.call('HDEL', KEYS[1], 'lost')
redis.call('HSET', KEYS[1], 'commit', (string.gsub(redis.call('HGET', KEYS[1], 'commit'), '^lost:', '')))
return redis.call('HINCRBY', KEYS[1], 'epoch', 1)
"""


@pytest.mark.parametrize("earlier", [False, True], ids=["the first", "after one of this release"])
def test_what_a_release_accepted_that_keeps_no_list_is_accepted(run: Run, *, earlier: bool) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 3)
        if earlier:
            await lost(world, engine, session, before)
            await stepped(engine, session, 2)
            before = await saved(world, session)
            await stepped(engine, session, 2)
        await put_back(world, session, before)
        with pytest.raises(StateLost):
            await params(engine, session)
        await world.raw.eval(ACCEPTED_BEFORE, 1, key(session, "head"))
        assert (await step(engine, session)).stamp.step == (3 if earlier else 1)
        before = await saved(world, session)
        seen = await stepped(engine, session, 1)
        assert await lost(world, engine, session, before) == seen
        await params(engine, session)

    run(scenario)


def test_a_mark_that_is_late_on_its_way_marks_nothing(run: Run) -> None:
    """The head that was accepted has the commit that it was found with; what was lost then is not lost once more."""

    async def scenario(world: World) -> None:
        engine, store = await world.replica(), Store(world.embedded.url)
        await store.open()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        await stepped(engine, session, 3)
        known = (await head(store, session)).known
        await put_back(world, session, before)
        found = await head(store, session)
        with pytest.raises(StateLost):
            await params(engine, session)
        await accepted(world, session)
        assert await store.lose(session, known, found) == "STALE"
        assert (await head(store, session)).lost is None
        await store.close()

    run(scenario)


def test_the_operator_accepts_what_all_had_to_tell(run: Run) -> None:
    """Services tell one after the other of ever more, while the command runs already."""

    async def scenario(world: World) -> None:
        engine, store = await world.replica(), Store(world.embedded.url)
        await store.open()
        session = await created(engine, **SGD)
        before = await saved(world, session)
        known = []
        for _ in range(16):
            await stepped(engine, session, 1)
            known.append((await head(store, session)).known)
        await put_back(world, session, before)
        assert await store.lose(session, known[0], await head(store, session)) == "OK"
        command = ["-m", "service", "sessions", "accept", session, "--yes", "--redis-url", world.embedded.url]
        operator = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
        for seen in known[1:]:  # with pauses that are shorter than the one which the command takes for the end
            await asyncio.sleep(0.25)
            assert await store.lose(session, seen, await head(store, session)) == "OK"
        told, _ = await operator.communicate()
        assert operator.returncode == 0
        assert f"was seen at step 16, ETag {Stamp(16, known[-1].mark).etag}, entry 16.".encode() in told
        given = (await head(store, session)).given or b""
        assert given.decode().split() == [seen.commit for seen in known]
        await store.close()

    run(scenario)


async def head(store: Store, session: str) -> Head:
    found = await store.head(session)
    assert found is not None
    return found


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
