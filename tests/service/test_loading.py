"""Loading large sessions: the same bits, a log that is cut meanwhile, damage in the middle, and what it takes."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from core.compression import Places, Quantized
from core.contributions import Contribution
from core.layout import BF16, Array, Rows
from service import bulk, loading, reading, schemas
from service.bulk import Room
from service.cli import cli
from service.documents import StepRequest
from service.engine import Engine
from service.errors import Corrupt, StoreUnavailable
from service.reading import BULK, Reader
from service.records import LogEntry
from service.store import key
from tests.running import serving
from tests.service.test_memory import memory
from tests.service.world import Run, World, copied
from tests.wire import SAFETENSORS, create, step

# A slot of it is worth a connection of its own, and so is a dense gradient.
ROWS, COLUMNS = 1100, 1000
SHAPES = {"b": [1000], "w": [ROWS, COLUMNS], "s": []}
SIZE = ROWS * COLUMNS + 1001
assert 4 * SIZE > BULK


def normal(seed: int, dtype: Any = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def half(array: Array) -> Array:
    return (array.view(np.uint32) >> np.uint32(16)).astype("<u2").view(BF16)


def forms() -> list[Contribution]:
    """A gradient in every form in which it may be sent."""
    random = np.random.default_rng(9)
    positions = random.choice(ROWS * COLUMNS, 50_000, replace=False)
    rows = np.sort(random.choice(ROWS, 100, replace=False))
    integers = random.integers(-128, 128, (ROWS, COLUMNS)).astype("i1")
    rest = {name: array for name, array in normal(3).items() if name != "w"}
    return [
        Contribution(normal(1)),
        Contribution(rest | {"w": Rows(rows, random.normal(size=(100, COLUMNS)).astype(np.float32))}),
        Contribution(rest | {"w": Places(positions, random.normal(size=50_000).astype(np.float32))}),
        Contribution(rest | {"w": Quantized(integers, 0.01)}),
        Contribution({name: half(array) for name, array in normal(4).items()}),
        Contribution(normal(5, np.float64), loss=0.5),
        Contribution({"b": normal(6)["b"]}, partial=True),
        Contribution(normal(7)),
    ]


def asked(contribution: Contribution, **members: Any) -> StepRequest:
    return StepRequest(contribution, members.pop("returns", "none"), 4 * SIZE, digest="d", **members)


async def opened(engine: Engine, *, held: bool = True, **body: Any) -> str:
    document, _ = schemas.parse_create({"optimizer": {"kind": "adam"}, "shapes": SHAPES, **body})
    return str((await engine.create(document, normal(0) if held else None))[0]["id"])


async def stepped(world: World, seeds: Iterable[int]) -> tuple[Engine, Engine, str]:
    """A session with a large entry for each of `seeds`: the replica that has it, one that has not, and its id."""
    engine, other = await world.replica(), await world.replica()
    session = await opened(engine)
    for seed in seeds:
        await engine.step(session, asked(Contribution(normal(seed))), copied)
    return engine, other, session


async def settled(engine: Engine, session: str) -> None:
    """With a snapshot of where it stands, and an empty log."""
    live = engine._live[session]
    engine._snapshots.begin(live)
    assert live.snapshot is not None
    await live.snapshot


async def picture(engine: Engine, session: str) -> dict[str, bytes]:
    tensors, text, stamp = await engine.checkpoint(session)
    return {name: array.tobytes() for name, array in tensors.items()} | {
        "text": repr((sorted(text.items()), stamp)).encode(),
        "remembered": repr(list(engine._live[session].done.items())).encode(),
        "kept": b"".join(kept.updates.tobytes() for kept in engine._live[session].kept.values()),
    }


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 16 << 20])
@pytest.mark.parametrize("optimizer", [{"kind": "adam"}, {"kind": "adamw", "cautious": True}, {"kind": "adafactor"}])
def test_every_kind_of_entry_is_replayed_to_the_same_bits(
    run: Run, monkeypatch: pytest.MonkeyPatch, ahead: int, optimizer: dict[str, Any]
) -> None:
    """Entries by themselves or as many together as fit; the snapshot in the middle of them, or before them."""
    monkeypatch.setattr(loading, "AHEAD", ahead)

    async def scenario(world: World) -> None:
        engine, other, third = [await world.replica() for _ in range(3)]
        session = await opened(engine, optimizer=optimizer)
        contributions = forms()
        for number, contribution in enumerate(contributions):
            await engine.step(session, asked(contribution, key=f"k{number}"), copied)
        assert engine._live[session].head.base == 0
        assert await picture(other, session) == await picture(engine, session)
        await settled(engine, session)
        await engine.put_params(session, normal(8), None)
        await engine.patch(session, schemas.patch({"optimizer": {"lr": 0.5}}), None)
        for contribution in contributions[:4]:
            await engine.step(session, asked(contribution), copied)
        assert engine._live[session].head.seq - engine._live[session].head.base == 6
        assert await picture(third, session) == await picture(engine, session)
        # And they go on alike, each from what the other appended.
        await third.step(session, asked(contributions[-1]), copied)
        await engine.step(session, asked(contributions[0]), copied)
        assert await picture(third, session) == await picture(engine, session)

    run(scenario)


@pytest.mark.parametrize(
    "body",
    [
        {"held": False},
        {"state_dtype": "bfloat16"},
        {"aggregation": {"mode": "sync", "workers": 2}},
        {"aggregation": {"mode": "sync", "workers": 2, "reduce": {"kind": "median"}}},
    ],
    ids=["held by the client", "bfloat16", "rounds", "kept contributions"],
)
def test_what_else_a_session_remembers_comes_back(run: Run, body: dict[str, Any]) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await opened(engine, **body)
        told = {"returns": "updates"} if "held" in body else {}
        workers = ["a", "b"] if "aggregation" in body else [None]
        for number in range(3):
            for worker in workers[: 1 if number == 2 else 2]:
                contribution = Contribution(normal(number), worker=worker)
                await engine.step(session, asked(contribution, key=f"{number}{worker}", **told), copied)
            if number == 1:
                await settled(engine, session)
        assert engine._live[session].head.base > 0
        other = await world.replica()
        assert await picture(other, session) == await picture(engine, session)

    run(scenario)


def test_entries_without_weight_are_replayed_in_their_order(run: Run) -> None:
    """More of them than are read at once."""

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await opened(engine)
        few = {"w": Places(np.array([3]), np.ones(1, np.float32)), "b": np.ones(1000, np.float32)}
        for number in range(loading.ENTRIES + 10):
            await engine.step(session, asked(Contribution(few, partial=True), key=str(number)), copied)
        assert engine._live[session].head.base == 0
        assert await picture(await world.replica(), session) == await picture(engine, session)

    run(scenario)


# -- cut, damaged, broken off ------------------------------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], Any]) -> list[int]:
    """Whenever entries of a log are about to be read: `happens(how many times before)`. Gives their numbers."""
    sizes: list[int] = []
    reads = Reader.entries

    async def entries(reader: Reader, session: str, elements: Sequence[bytes]) -> list[LogEntry]:
        sizes.append(len(elements))
        await happens(len(sizes) - 1)
        return await reads(reader, session, elements)

    monkeypatch.setattr(Reader, "entries", entries)
    return sizes


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_a_log_that_is_cut_while_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch, cuts: int) -> None:
    """From the second time on it is read as a whole, so that nothing has been replayed for nothing."""
    monkeypatch.setattr(loading, "AHEAD", 1)

    async def scenario(world: World) -> None:
        engine, other, session = await stepped(world, range(4))

        async def cut(reads: int) -> None:
            if reads in (2, 3, 4)[:cuts]:  # the third entry the first time, all of them then
                await settled(engine, session)
                for number in range(2):
                    await engine.step(session, asked(Contribution(normal(number))), copied)

        with monkeypatch.context() as patched:
            sizes = between(patched, cut)
            found = await picture(other, session)
        assert sizes == [1, 1, 1, 2, 2, 2][: 3 + cuts]
        assert found == await picture(engine, session)
        await other.step(session, asked(Contribution(normal(5))), copied)
        assert await picture(other, session) == await picture(engine, session)

    run(scenario)


def test_a_snapshot_that_is_replaced_while_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        engine, other, session = await stepped(world, [1])
        reads, calls = Reader.snapshot, []

        async def snapshot(reader: Reader, id_: str, head: Any) -> Any:
            calls.append(head.snap)
            if len(calls) == 1:
                await settled(engine, session)
            return await reads(reader, id_, head)

        with monkeypatch.context() as patched:
            patched.setattr(Reader, "snapshot", snapshot)
            found = await picture(other, session)
        assert len(calls) == len(set(calls)) == 2
        assert found == await picture(engine, session)

    run(scenario)


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_an_entry_in_the_middle_that_cannot_be_read_leaves_nothing_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(loading, "AHEAD", 1)

    async def scenario(world: World) -> None:
        engine, other, session = await stepped(world, range(4))
        name = key(session, "p", engine._live[session].log[2].commit, 2)
        whole = await world.raw.get(name)
        if harm == "changed":
            await world.raw.setrange(name, 100, b"\x01\x02")
        elif harm == "cut":
            await world.raw.set(name, whole[:-1])
        else:
            await world.raw.delete(name)
        for _ in range(2):
            with pytest.raises(Corrupt):
                await asyncio.wait_for(other.checkpoint(session), 20)
            assert (list(other._live), other._residents.loading, other.hot[1]) == ([], {}, 0)
        await world.raw.set(name, whole)
        assert await picture(other, session) == await picture(engine, session)

    run(scenario)


def test_an_entry_that_does_not_follow_leaves_nothing_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each can be read; what was to be read after it is given up."""
    monkeypatch.setattr(loading, "AHEAD", 1)

    async def scenario(world: World) -> None:
        engine, other, session = await stepped(world, range(4))
        elements = await world.raw.lrange(key(session, "log"), 0, -1)
        await world.raw.lset(key(session, "log"), 1, elements[2])
        with pytest.raises(Corrupt, match="does not follow"):
            await other.checkpoint(session)
        assert list(other._live) == []
        await world.raw.lset(key(session, "log"), 1, elements[1])
        await world.raw.rpop(key(session, "log"))
        with pytest.raises(Corrupt, match="the head is"):
            await other.checkpoint(session)
        await world.raw.rpush(key(session, "log"), elements[3])
        assert await picture(other, session) == await picture(engine, session)

    run(scenario)


def test_a_store_that_is_killed_while_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told, or served once it is there again; and then all is as it was."""
    monkeypatch.setattr(loading, "AHEAD", 1)

    async def scenario(world: World) -> None:
        engine, other, session = await stepped(world, range(3))
        expected = await picture(engine, session)

        async def kill(reads: int) -> None:
            if reads == 1:
                world.kill_store()

        with monkeypatch.context() as patched:
            between(patched, kill)
            with pytest.raises(StoreUnavailable):
                await other.checkpoint(session)
        assert list(other._live) == []
        await world.embedded.start()
        assert await picture(other, session) == expected

    run(scenario)


def test_a_connection_that_breaks_off_in_the_middle_is_begun_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the same arrays, which the first one does not write to any more."""
    monkeypatch.setattr(bulk, "AHEAD", 1)

    async def scenario(world: World) -> None:
        engine, other, session = await stepped(world, [1])
        expected = await picture(engine, session)
        transports: list[Any] = []
        filled, receive = Room.filled, bulk.receive

        async def noted(connection: Any, *arguments: Any) -> None:
            transports.append(connection._writer.transport)
            await receive(connection, *arguments)

        def broken(room: Room, count: int) -> None:
            filled(room, count)
            if len(transports) in (1, 3) and room.left < 2 * SIZE:  # of the snapshot, then of the entry
                transports[-1].abort()

        with monkeypatch.context() as patched:
            patched.setattr(reading, "receive", noted)
            patched.setattr(Room, "filled", broken)
            assert await picture(other, session) == expected
        assert len(transports) == 4

    run(scenario)


def test_a_connection_that_is_closed_before_it_is_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what cannot come."""
    monkeypatch.setattr(bulk, "SILENCE", 3600.0)

    async def scenario(world: World) -> None:
        connection = await (await world.replica())._store.link.dial("k")
        connection._writer.transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(0.01)
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(bulk.receive(connection, ["k"], Room([np.empty(1)])), 20)
        assert not connection.is_connected

    run(scenario)


# -- what it takes -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_log_of_three_times_the_state_is_not_in_memory_as_a_whole(data: Path) -> None:
    """The state, an entry that is replayed, the next one, and the parameters that come of it."""
    size = 3_000_000
    gradient = 4 * size
    state = 3 * gradient
    body = safetensors.numpy.save({"w": np.random.default_rng(0).standard_normal(size).astype(np.float32)})
    # NumPy throughout: the compiler's own memory would count otherwise.
    with serving(data, environment={"RAVINE_JIT": "false"}) as server, server.client() as client:
        session = create(client, optimizer="adam", shapes={"w": [size]})["id"]
        path = f"/v1/sessions/{session}"
        assert client.put(f"{path}/params", content=body, headers=SAFETENSORS).status_code == 200
        for _ in range(8 + 7):  # with the eighth the log outweighs the state by enough, and begins anew
            answer = client.post(f"{path}/steps?return=none", content=body, headers=SAFETENSORS)
            assert answer.status_code == 200
        before = client.get(f"{path}/state").content
    with serving(data, environment={"RAVINE_JIT": "false"}) as server, server.client() as client:
        small = create(client, optimizer="adam", params={"w": [1.0]})["id"]
        assert step(client, small, {"w": np.ones(1, np.float32)}).status_code == 200
        found = CliRunner().invoke(cli, ["sessions", "inspect", session, "--json", "--data", str(data)])
        assert len(json.loads(found.stdout)["log"]) == 7
        idle = memory(server.pid, "VmRSS")
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")
        assert client.get(f"{path}/workers").status_code == 200
        peak = (memory(server.pid, "VmHWM") - idle) / state
        assert client.get(f"{path}/state").content == before
    print(f"peak of loading: {peak:.2f} times the state")
    assert peak < 2.4  # 4.3 with the log in memory as well
