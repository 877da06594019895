"""Nothing is acknowledged that is not safe yet, by whichever service and whichever call it is asked for.

A primary and its replica, which is stopped: whatever was sent then is answered with 503, and the same once more, when
the replica goes on, with the acknowledgement, and has counted once.
"""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from core.evaluate import Evaluator
from service import schemas
from service.acks import Asked
from service.documents import Applied, Pending
from service.embedded import Embedded
from service.engine import Engine
from service.errors import Unconfirmed
from service.store import Store
from tests.faults.stores import DURABLE, StoreServer, storing
from tests.faults.stores import Pair as FailoverPair
from tests.faults.stores import pair as failover_pair
from tests.running import Server, ravine, redis_server, serving
from tests.service.test_acks import calls, replicated, stopped
from tests.service.test_engine import Wire
from tests.service.world import copied, created, params, request, step
from tests.wire import create

REPLICATED, DISK = Asked("replicated", seconds=0.3), Asked("disk", seconds=0.3)
Pair = tuple[StoreServer, StoreServer]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with replicated(tmp_path / "stores", "valkey") as servers:
        yield servers


# -- engines -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def engine_on(url: str, asked: Asked) -> AsyncIterator[Engine]:
    store = Store(url, asked=asked)
    await store.open()
    engine = Engine(store, Evaluator(), schemas.document_of, 1 << 30, 1 << 32)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        await store.close()


def on_two(url: str, scenario: Callable[[Engine, Engine], Awaitable[None]]) -> None:
    """Two services on one store, of which the second one waits for nothing."""

    async def scene() -> None:
        async with asyncio.timeout(30), engine_on(url, REPLICATED) as first, engine_on(url, Asked()) as second:
            await scenario(first, second)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def test_a_repeat_of_what_somebody_else_wrote(pair: Pair) -> None:
    """The key is in memory by catching up, and no word of whether its step is safe."""

    async def scenario(careful: Engine, careless: Engine) -> None:
        session = await created(careful, params={"w": [0.0] * 3})
        await step(careful, session, 1.0)
        with stopped(pair[1]):
            assert (await step(careless, session, 1.0, key="k")).stamp.step == 2
            assert await params(careful, session) == [2.0] * 3  # who only reads does not wait
            for _ in range(2):
                with pytest.raises(Unconfirmed):
                    await step(careful, session, 1.0, key="k")
        repeated = await step(careful, session, 1.0, key="k")
        assert (repeated.stamp.step, repeated.replayed) == (2, True)
        before = calls(pair[0], "wait")
        with stopped(pair[1]):  # and from now on it is known to be safe
            assert (await step(careful, session, 1.0, key="k")).replayed
        assert calls(pair[0], "wait") == before
        assert await params(careful, session) == [2.0] * 3

    on_two(pair[0].url, scenario)


def test_a_round_that_somebody_else_closed(pair: Pair) -> None:
    async def scenario(careful: Engine, careless: Engine) -> None:
        session = await created(careful, params={"w": [0.0] * 3}, aggregation={"mode": "sync", "workers": 2})
        sent = request(1.0, worker="a")
        pending = await careful.step(session, sent, copied)
        assert isinstance(pending, Pending)
        with stopped(pair[1]):
            assert isinstance(await careful.round(session, sent, pending, copied), Pending)
            assert isinstance(await careless.step(session, request(1.0, worker="b"), copied), Applied)
            with pytest.raises(Unconfirmed):
                await careful.round(session, sent, pending, copied)
        closed = await careful.round(session, sent, pending, copied)
        assert isinstance(closed, Applied)
        assert closed.stamp.step == 1

    on_two(pair[0].url, scenario)


def test_a_step_upon_what_is_not_safe_makes_it_safe(pair: Pair) -> None:
    async def scenario(careful: Engine, careless: Engine) -> None:
        session = await created(careful, params={"w": [0.0] * 3})
        with stopped(pair[1]):
            await step(careless, session, 1.0, key="k")
            with pytest.raises(Unconfirmed):
                await step(careful, session, 1.0, key="l")
        assert (await step(careful, session, 1.0, key="l")).stamp.step == 2
        before = calls(pair[0], "wait")
        assert (await step(careful, session, 1.0, key="k")).stamp.step == 2
        assert calls(pair[0], "wait") <= before + 1
        assert await params(careful, session) == [2.0] * 3

    on_two(pair[0].url, scenario)


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with-others"])
@pytest.mark.parametrize("late", [1, 2])
def test_a_commit_that_arrives_late_at_a_disk_that_stopped_to_sync(tmp_path: Path, late: int, others: bool) -> None:
    """That it landed is found out by a look; that it is safe is not."""

    async def scene() -> None:
        async with contextlib.AsyncExitStack() as stack:
            address = stack.enter_context(redis_server(tmp_path / "store", *DURABLE))
            direct = await stack.enter_async_context(engine_on(address, DISK))
            session = await created(direct, params={"w": [0.0] * 3})
            await step(direct, session, 100.0)
            raw: Any = await stack.enter_async_context(contextlib.aclosing(client_of(address)))

            async def meanwhile() -> None:
                if others:
                    await step(direct, session, 10.0)
                await raw.config_set("appendfsync", "everysec")

            wire = Wire(Path(address.removeprefix("unix://")), late, meanwhile)
            url = await stack.enter_async_context(wire.listening(tmp_path / "wire.sock"))
            engine = await stack.enter_async_context(engine_on(url, DISK))
            await engine.session(session)
            with pytest.raises(Unconfirmed):
                await step(engine, session, 1.0, key="k")
            with pytest.raises(Unconfirmed):
                await step(engine, session, 1.0, key="k")
            await raw.config_set("appendfsync", "always")
            repeated = await step(engine, session, 1.0, key="k")
            assert (repeated.stamp.step, repeated.replayed) == (3 if others else 2, True)
            assert await params(direct, session) == [111.0 if others else 101.0] * 3

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 40))


def client_of(url: str) -> Any:
    import redis.asyncio

    return redis.asyncio.Redis.from_url(url)


@pytest.mark.parametrize("late", [1, 2, 3])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with-others"])
def test_a_commit_that_arrives_late_at_a_disk_that_syncs(tmp_path: Path, late: int, others: bool) -> None:
    async def scene() -> None:
        async with contextlib.AsyncExitStack() as stack:
            address = stack.enter_context(redis_server(tmp_path / "store", *DURABLE))
            direct = await stack.enter_async_context(engine_on(address, DISK))
            session = await created(direct, params={"w": [0.0] * 3})
            await step(direct, session, 100.0)

            async def meanwhile() -> None:
                await step(direct, session, 10.0)

            wire = Wire(Path(address.removeprefix("unix://")), late, meanwhile if others else None)
            url = await stack.enter_async_context(wire.listening(tmp_path / "wire.sock"))
            engine = await stack.enter_async_context(engine_on(url, DISK))
            await engine.session(session)
            applied = await step(engine, session, 1.0)
            assert applied.stamp.step == 2
            assert await params(engine, session) == [111.0 if others else 101.0] * 3

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 40))


@contextlib.asynccontextmanager
async def failing_over(directory: Path) -> AsyncIterator[tuple[Engine, FailoverPair]]:
    with failover_pair(directory) as servers:
        async with engine_on(servers.front.url, Asked("replicated", seconds=0.3)) as engine:
            yield engine, servers


async def over(engine: Engine, servers: FailoverPair) -> None:
    """The replica takes over with what it has, and is found."""
    servers.fail_over()
    servers.lead()
    async with asyncio.timeout(20):
        while not await engine.ready():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


def test_labels_that_were_acknowledged_are_found_by_after_a_failover(tmp_path: Path) -> None:
    """The replica falls behind between a change and its entries in the lists; then again, when it is sent again."""

    async def scene() -> None:
        async with failing_over(tmp_path) as (engine, servers):
            store = engine._store
            session = await created(engine, params={"w": [0.0] * 3})
            enter, labelled = store.index.enter, schemas.patch({"labels": {"team": "vision"}})

            async def behind(*arguments: Any) -> None:
                servers.hold()
                try:
                    await enter(*arguments)
                finally:
                    servers.replica.signal(signal.SIGCONT)
                    servers.link.release()

            store.index.enter = behind  # type: ignore[method-assign]
            for _ in range(2):
                with pytest.raises(Unconfirmed):
                    await engine.patch(session, labelled, None)
            store.index.enter = enter  # type: ignore[method-assign]
            assert (await engine.patch(session, labelled, None))[0]["labels"] == {"team": "vision"}
            servers.hold()
            await over(engine, servers)
            assert [found["id"] for found in (await engine.sessions(10, None, ("team", "vision")))[0]] == [session]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 40))


def test_a_session_is_not_made_where_its_entry_may_be_lost(tmp_path: Path) -> None:
    """A failover between the two, and the session would be there, and in no list."""

    async def scene() -> None:
        async with failing_over(tmp_path) as (engine, servers):
            store = engine._store
            make = store.create

            async def elsewhere(*arguments: Any) -> None:
                await over(engine, servers)
                servers.rejoin()
                await make(*arguments)

            store.create = elsewhere  # type: ignore[method-assign]
            servers.hold()
            with pytest.raises(Unconfirmed):
                await created(engine, params={"w": [0.0] * 3}, labels={"team": "vision"})
            servers.replica.signal(signal.SIGCONT)
            servers.link.release()
            session = await created(engine, params={"w": [0.0] * 3}, labels={"team": "vision"})
            for label in (None, ("team", "vision")):
                assert session in [found["id"] for found in (await engine.sessions(10, None, label))[0]]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 40))


# -- services ----------------------------------------------------------------------------------------------------------

STEP = {"gradients": {"w": [1.0]}}


def test_every_call_waits_for_the_replica(pair: Pair, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "a", "--redis-url", pair[0].url, "--ack", "replicated") as first,
        serving(tmp_path / "b", "--redis-url", pair[0].url, "--ack", "replicated", "--ack-replicas", "1") as second,
    ):
        with first.client() as client:
            stepped, put, patched, deleted = (
                create(client, optimizer="sgd", params={"w": [1.0]})["id"] for _ in "1234"
            )
            rounds = create(client, optimizer="sgd", params={"w": [1.0]}, aggregation={"mode": "sync", "workers": 2})
            checkpoint = client.get(f"/v1/sessions/{stepped}/state").content
            file = {"Content-Type": "application/vnd.safetensors"}
        sent: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", f"/v1/sessions/{stepped}/steps", {"json": STEP, "headers": {"Idempotency-Key": "k"}}),
            ("POST", f"/v1/sessions/{rounds['id']}/steps", {"json": {**STEP, "worker": "a"}}),
            ("POST", "/v1/sessions", {"json": {"optimizer": "sgd", "params": {"w": [1.0]}}}),
            ("POST", "/v1/sessions", {"content": checkpoint, "headers": file}),
            ("POST", f"/v1/sessions/{put}/fork", {}),
            ("PUT", f"/v1/sessions/{put}/params", {"json": {"params": {"w": [2.0]}}}),
            ("PATCH", f"/v1/sessions/{patched}", {"json": {"name": "other"}}),
            ("DELETE", f"/v1/sessions/{deleted}", {}),
        ]
        with stopped(pair[1]), ThreadPoolExecutor(len(sent)) as pool:
            replies = list(pool.map(lambda call: ask(first, *call), sent))
            assert {(call[0], call[1]): reply.status_code for call, reply in zip(sent, replies, strict=True)} == {
                (call[0], call[1]): 503 for call in sent
            }
            assert {reply.json()["type"] for reply in replies} == {"/problems/store-unavailable"}
            assert all(reply.headers["retry-after"] for reply in replies)
            # The other one knows the key from the log alone.
            assert ask(second, *sent[0]).status_code == 503
            read = ask(second, "GET", f"/v1/sessions/{stepped}/params", {})
            assert (read.status_code, read.json()["step"]) == (200, 1)
        for server in (second, first):
            again = ask(server, *sent[0])
            assert (again.status_code, again.json()["step"], again.headers["ravine-replayed"]) == (200, 1, "true")
        history = ask(first, "GET", f"/v1/sessions/{stepped}/history", {}).json()["data"]
        assert [record["step"] for record in history] == [1]


def ask(server: Server, method: str, path: str, rest: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        return client.request(method, path, **rest)


def test_the_embedded_store_syncs_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--ack", "disk") as server:
        assert "always" in server.valkey("CONFIG", "GET", "appendfsync")
        with server.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
            path = f"/v1/sessions/{session}/steps"
            assert client.post(path, json=STEP, headers={"Idempotency-Key": "k"}).status_code == 200
            # As a service does that shares the directory and was told of another durability.
            server.valkey("CONFIG", "SET", "appendfsync", "no")
            assert client.post(path, json=STEP, headers={"Idempotency-Key": "l"}).status_code == 503
            server.valkey("CONFIG", "SET", "appendfsync", "always")
            again = client.post(path, json=STEP, headers={"Idempotency-Key": "l"})
            assert (again.status_code, again.json()["step"]) == (200, 2)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--ack", "disk", "--durability", "everysec"], 2, "ack=disk and durability=everysec contradict each other"),
        (["--ack", "replicated"], 2, "needs a Redis of your own"),
        (["--ack", "soon"], 2, "ack:"),
        (["--ack-replicas", "0"], 2, "ack_replicas:"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path: Path, arguments: list[str], status: int, sentence: str) -> None:
    refused = serve(tmp_path, *arguments)
    assert (refused.returncode, "Traceback" in refused.stderr) == (status, False)
    assert sentence in refused.stderr


@pytest.mark.parametrize(
    ("ack", "options", "sentence"),
    [
        ("disk", ("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync is everysec, and must be always"),
        ("disk", (), "appendonly is no, and must be yes"),
        ("replicated", (), "0 of 1 replicas have it"),
    ],
)
def test_a_store_that_cannot_give_it_is_refused(
    tmp_path: Path, ack: str, options: tuple[str, ...], sentence: str
) -> None:
    with storing(tmp_path / "store", "--save", "", *options) as store:
        refused = serve(tmp_path, "--redis-url", store.url, "--ack", ack)
    assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
    assert f"the store cannot give ack={ack}" in refused.stderr
    assert sentence in refused.stderr


def serve(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ravine("serve", "--port", "0", "--data", directory / "data", *arguments)


def test_who_shares_the_directory_decides_with_the_rest(tmp_path: Path) -> None:
    """A service that was told nothing of acknowledgements comes second, and syncs every second from then on."""

    async def scene() -> None:
        first, second = Embedded(tmp_path / "data", "always"), Embedded(tmp_path / "data")
        await first.start()
        try:
            async with engine_on(first.url, DISK) as engine:
                session = await created(engine, params={"w": [0.0] * 3})
                await second.start()
                try:
                    with pytest.raises(Unconfirmed):
                        await step(engine, session)
                finally:
                    await second.stop()
        finally:
            await first.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 40))
