"""One contract, held against every store that is promised to work: the embedded Valkey, Redis, and a cluster."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import uvloop
from redis.cluster import RedisCluster

from service.embedded import Embedded
from service.errors import Corrupt, StoreFull, StoreUnavailable
from service.ids import new_commit, new_id
from service.index import DEFAULT_TENANT
from service.reading import BULK
from service.records import CHUNK, LogItem, Staged
from service.store import Store
from service.wire import safetensors
from tests.running import redis_binary, redis_server
from tests.service.nodes import cluster, eventually

Raw = redis.Redis | RedisCluster
Scenario = Callable[[Store], Awaitable[Any]]
LARGE = CHUNK // 4 + 1000  # float32 elements: more than a chunk


# -- the stores --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def embedded(directory: Path) -> Iterator[str]:
    server = Embedded(directory)
    runs(server.start())
    yield server.url
    with redis.Redis.from_url(server.url) as client, contextlib.suppress(redis.ConnectionError):
        client.shutdown(nosave=True)


@contextlib.contextmanager
def redis_itself(directory: Path) -> Iterator[str]:
    binary = redis_binary()
    if binary is None:
        pytest.skip("there is no redis-server on PATH")
    with redis_server(directory, "--save", "", binary=binary) as url:
        yield url


STORES = {"embedded": embedded, "redis": redis_itself, "cluster": cluster}


@pytest.fixture(scope="module", params=STORES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with STORES[request.param](tmp_path_factory.mktemp(request.param) / "data") as address:
        yield address


@pytest.fixture
def raw(url: str) -> Iterator[Raw]:
    """What lies in the store, looked at from beside."""
    kind: Any = RedisCluster if url.startswith("redis://") else redis.Redis
    with contextlib.closing(kind.from_url(url)) as client:
        yield client


def runs(coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def on(url: str, scenario: Scenario) -> Any:
    async def scene() -> Any:
        store = Store(url)
        await store.open()
        try:
            return await scenario(store)
        finally:
            await store.close()

    return runs(scene())


def keys(raw: Raw, session: str) -> set[str]:
    return {name.decode().partition("}:")[2] for name in raw.scan_iter(match=f"ravine:{{{session}}}:*", count=1000)}


# -- sessions ----------------------------------------------------------------------------------------------------------


def pieces(value: float, size: int = 3) -> list[bytes | memoryview]:
    return safetensors.write({"w": np.full(size, value, np.float32)}, {"who": "snapshot"})


async def made(store: Store, value: float = 0.0, size: int = 3) -> tuple[str, str]:
    """A session at step 0, and its commit."""
    session, commit = new_id(), new_commit()
    fields = {"commit": commit, "step": 0, "time": "t0", "document": b"{}", "held": 1}
    await store.create(session, "snap0", pieces(value, size), fields)
    return session, commit


def entry(parent: str, step: int, size: int = 3) -> LogItem:
    commit = new_commit()
    text = {"commit": commit, "parent": parent, "kind": "step"}
    head: dict[str, str | int | bytes] = {"step": step, "time": f"t{step}", "held": 1}
    return LogItem(commit, text, {"w": np.full(size, step, np.float32)}, head, b'[%d,"%s"]' % (step, commit.encode()))


def chain(parent: str, steps: Sequence[int], size: int = 3) -> list[LogItem]:
    items: list[LogItem] = []
    for step in steps:
        items.append(entry(items[-1].commit if items else parent, step, size))
    return items


async def appended(store: Store, session: str, parent: str, steps: Sequence[int], size: int = 3) -> list[LogItem]:
    items = chain(parent, steps, size)
    for item in items:
        assert await store.append(session, item.metadata["parent"], [item]) == "OK"
    return items


async def steps_of(store: Store, session: str) -> list[float]:
    stored = await store.load(session)
    assert stored is not None
    return [float(entry.tensors["w"][0]) for entry in stored.entries]


def test_a_session_is_what_was_created(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store, 1.5)
        stored = await store.load(session)
        assert stored is not None
        assert stored.tensors["w"].tolist() == [1.5] * 3
        assert stored.metadata == {"who": "snapshot"}
        head = stored.head
        assert (head.commit, head.step, head.seq, head.base, head.held) == (commit, 0, 0, 0, True)
        assert (head.document, head.updated_at, head.skipped) == (b"{}", "t0", 0)
        assert await store.commit_of(session) == commit
        assert stored.entries == []

    on(url, scenario)


def test_creating_twice_makes_one(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        fields = {"commit": new_commit(), "step": 9, "time": "t9", "document": b"{}", "held": 1}
        await store.create(session, "snap1", pieces(9), fields)
        assert await store.commit_of(session) == commit

    on(url, scenario)


def test_what_is_not_there(url: str, raw: Raw) -> None:
    async def scenario(store: Store) -> str:
        session = new_id()
        assert await store.load(session) is None
        assert await store.tail(session, 0) is None
        assert await store.head(session) is None
        assert await store.history(session, 0, 10) == []
        assert await store.append(session, new_commit(), [entry(new_commit(), 1)]) == "GONE"
        assert await store.landed(session, new_commit(), new_commit(), 0) == "GONE"
        await store.count_skipped(session)
        return session

    assert keys(raw, on(url, scenario)) == set()


def test_entries_come_back_in_order(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        first = chain(commit, [1, 2])
        assert await store.append(session, commit, first) == "OK"
        second = await appended(store, session, first[-1].commit, [3])
        stored = await store.load(session)
        assert stored is not None
        assert [entry.metadata for entry in stored.entries] == [item.metadata for item in (*first, *second)]
        assert [entry.tensors["w"][0] for entry in stored.entries] == [1, 2, 3]
        assert (stored.head.commit, stored.head.step, stored.head.seq) == (second[-1].commit, 3, 3)
        tail = await store.tail(session, 2)
        assert tail is not None
        assert [entry.metadata for entry in tail.entries or []] == [second[0].metadata]

    on(url, scenario)


def test_the_same_append_twice_lands_once(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        items = chain(commit, [1, 2])
        assert await store.append(session, commit, items) == "OK"
        assert await store.append(session, commit, items) == "OK"
        assert await steps_of(store, session) == [1, 2]

    on(url, scenario)


@pytest.mark.parametrize("size", [3, LARGE])
def test_a_stale_append_leaves_nothing(url: str, raw: Raw, size: int) -> None:
    async def scenario(store: Store) -> str:
        session, commit = await made(store)
        await appended(store, session, commit, [1])
        assert await store.append(session, commit, [entry(commit, 2, size)]) == "STALE"
        assert await steps_of(store, session) == [1]
        return session

    session = on(url, scenario)
    eventually(lambda: keys(raw, session) == {"head", "log", "history", "s:snap0:0"})


def test_large_payloads_lie_in_chunks_that_stay(url: str, raw: Raw) -> None:
    async def scenario(store: Store) -> tuple[str, str]:
        session, commit = await made(store, 2.0, LARGE)
        (item,) = await appended(store, session, commit, [1], LARGE)
        stored = await store.load(session)
        assert stored is not None
        assert stored.tensors["w"].tobytes() == np.full(LARGE, 2.0, np.float32).tobytes()
        assert stored.entries[0].tensors["w"].tobytes() == np.full(LARGE, 1.0, np.float32).tobytes()
        assert item.staged is not None
        assert stored.entries[0].chunks == item.staged.chunks > 1
        return session, item.commit

    session, commit = on(url, scenario)
    found = keys(raw, session)
    assert {f"p:{commit}:0", f"p:{commit}:1", "s:snap0:0", "s:snap0:1"} <= found
    assert not [name for name in found if name.startswith("t:")]
    assert {raw.ttl(f"ravine:{{{session}}}:{name}") for name in found} == {-1}


@pytest.mark.parametrize("chunk", [CHUNK, 4 * CHUNK, 4096, 64 * CHUNK], ids=str)
def test_the_largest_are_received_where_they_belong(url: str, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Tensors by what is behind the colon, each in an array of theirs; in chunks of whatever size, or in one."""
    monkeypatch.setattr("service.records.CHUNK", chunk)
    random = np.random.default_rng(3)
    shapes = {"a": (70, 1000), "b": (5,), "c": (), "d": (2 * LARGE,), "e": (0, 3)}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {f"{name}:m": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {"a:t": np.arange(3.0), "d:q": np.arange(100_000).astype("i1"), ":p": np.arange(100_003.0)}
    text = {"said": "x" * 100_000}  # with which the header alone is more than a small chunk holds

    async def scenario(store: Store) -> None:
        session, commit = new_id(), new_commit()
        fields = {"commit": commit, "step": 0, "time": "t0", "document": b"{}", "held": 1}
        await store.create(session, "snap0", safetensors.write(tensors, text), fields)
        item = replace(entry(commit, 1), tensors=tensors)
        assert await store.append(session, commit, [item]) == "OK"
        stored = await store.load(session)
        assert stored is not None
        assert stored.head.length > BULK
        assert stored.metadata == text
        for found in (stored.tensors, stored.entries[0].tensors):
            assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in found.items()} == {
                name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()
            }
        first = stored.tensors["a"].base
        if chunk in (CHUNK, 4 * CHUNK):
            assert isinstance(first, np.ndarray)
            assert stored.tensors["d"].base is first
            assert stored.tensors["d:m"].base is not first

    on(url, scenario)


def test_chunks_that_expired_on_the_way_are_sent_again(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        item = entry(commit, 1, LARGE)
        item.staged = Staged("0123456789abcdef", 2, 4 * LARGE, "-")
        assert await store.append(session, commit, [item]) == "OK"
        assert await steps_of(store, session) == [1]

    on(url, scenario)


def test_thousands_of_entries_at_once(url: str) -> None:
    """Lua's stack takes some 8,000 values."""

    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        items = chain(commit, range(1, 9001))
        assert await store.append(session, commit, items) == "OK"
        assert await steps_of(store, session) == list(range(1, 9001))

    on(url, scenario)


def test_scripts_that_the_store_forgot_are_sent_again(url: str, raw: Raw) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        raw.script_flush()
        await appended(store, session, commit, [1])
        raw.script_flush()
        assert await steps_of(store, session) == [1]

    on(url, scenario)


def test_a_snapshot_cuts_the_log(url: str, raw: Raw) -> None:
    async def scenario(store: Store) -> tuple[str, str]:
        session, commit = await made(store, 0, LARGE)
        first = await appended(store, session, commit, [1], LARGE)
        first += await appended(store, session, first[-1].commit, [2])
        old = await store.head(session)
        assert old is not None
        second = await appended(store, session, first[-1].commit, [3], LARGE)
        gone = [(item.commit, item.staged.chunks if item.staged else 0) for item in first]
        assert await store.snapshot(session, old, gone, 2, "snap1", pieces(2, LARGE)) == "OK"
        stored = await store.load(session)
        assert stored is not None
        assert (stored.head.seq, stored.head.base, stored.head.commit) == (3, 2, second[-1].commit)
        assert stored.tensors["w"][0] == 2
        assert [entry.tensors["w"][0] for entry in stored.entries] == [3]
        cut, rest = await store.tail(session, 1), await store.tail(session, 2)
        assert cut is not None
        assert cut.entries is None
        assert rest is not None
        assert len(rest.entries or []) == 1
        return session, second[-1].commit

    session, last = on(url, scenario)
    chunks = {f"{name}:{i}" for name in ("s:snap1", f"p:{last}") for i in range(3)}
    assert {name for name in keys(raw, session) if name[:2] in ("s:", "p:", "t:")} == chunks


def test_of_two_snapshots_the_first_stays(url: str, raw: Raw) -> None:
    async def scenario(store: Store) -> str:
        session, commit = await made(store)
        await appended(store, session, commit, [1, 2])
        old = await store.head(session)
        assert old is not None
        assert await store.snapshot(session, old, [], 2, "snap1", pieces(2)) == "OK"
        assert await store.snapshot(session, old, [], 2, "snap2", pieces(2, LARGE)) == "STALE"
        await store.ping()  # and so the loop goes on for long enough to send what takes the chunks back
        return session

    session = on(url, scenario)
    eventually(lambda: keys(raw, session) == {"head", "history", "s:snap1:0"})


def test_a_snapshot_must_be_of_what_the_log_leads_to(url: str) -> None:
    """A store that failed over has lost entries which its writer still knows."""

    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        items = await appended(store, session, commit, [1, 2])
        ahead, beside = await store.head(session), await store.head(session)
        assert ahead is not None
        assert beside is not None
        ahead.seq, ahead.commit = 4, new_commit()
        assert await store.snapshot(session, ahead, [], 4, "snap1", pieces(4)) == "STALE"
        beside.commit = new_commit()
        assert await store.snapshot(session, beside, [], 2, "snap1", pieces(2)) == "STALE"
        assert await steps_of(store, session) == [1, 2]
        assert await store.commit_of(session) == items[-1].commit

    on(url, scenario)


def test_deleting_leaves_nothing(url: str, raw: Raw) -> None:
    async def scenario(store: Store) -> str:
        session, commit = await made(store, 0, LARGE)
        items = await appended(store, session, commit, [1, 2], LARGE)
        head = await store.head(session)
        assert head is not None
        assert await store.delete(session, head, commit) == "STALE"
        assert await store.delete(session, head, items[-1].commit) == "OK"
        assert await store.delete(session, head, None) == "GONE"
        return session

    assert keys(raw, on(url, scenario)) == set()


def test_history_in_pages(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        assert await store.append(session, commit, chain(commit, range(1, 31))) == "OK"

        async def page(after: int, limit: int) -> list[int]:
            return [int(line[1 : line.index(b",")]) for line in await store.history(session, after, limit)]

        assert await page(0, 100) == list(range(1, 31))
        assert await page(-1, 3) == [1, 2, 3]
        assert await page(10, 5) == [11, 12, 13, 14, 15]
        assert await page(29, 5) == [30]
        assert await page(30, 5) == []

    on(url, scenario)


def test_history_while_steps_come(url: str) -> None:
    """One line must follow the other however the reads fall between the writes."""

    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        writing = asyncio.create_task(appended(store, session, commit, range(1, 301)))
        seen = 0
        while seen < 300:
            for line in await store.history(session, seen, 7):
                assert int(line[1 : line.index(b",")]) == seen + 1
                seen += 1
        await writing

    on(url, scenario)


def test_the_index_lists_the_newest_first(url: str, raw: Raw) -> None:
    label = ("team", new_id())

    async def scenario(store: Store) -> None:
        ids = sorted(new_id() for _ in range(5))
        for session in ids:
            await store.index.enter(DEFAULT_TENANT, session, [label])
        assert await store.index.ids(DEFAULT_TENANT, label, None, 3) == ids[:1:-1]
        assert await store.index.ids(DEFAULT_TENANT, label, ids[2], 3) == ids[1::-1]
        await store.index.leave(DEFAULT_TENANT, ids[4], [label])
        assert await store.index.ids(DEFAULT_TENANT, label, None, 1) == [ids[3]]
        assert ids[4] not in await store.index.ids(DEFAULT_TENANT, None, None, 100)
        await store.index.leave(DEFAULT_TENANT, ids[3], [label], index=False)
        assert await store.index.ids(DEFAULT_TENANT, label, None, 1) == [ids[2]]
        assert ids[3] in await store.index.ids(DEFAULT_TENANT, None, None, 100)

    on(url, scenario)


def test_many_at_once(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, _ = await made(store)
        heads = await store.heads([session] * 500)
        assert {head.step for head in heads if head is not None} == {0}
        assert len(heads) == 500

    on(url, scenario)


@pytest.mark.parametrize("size", [LARGE, 5 * LARGE])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("part", ["p", "s"])
@pytest.mark.parametrize("harm", ["changed", "cut", "grown", "gone", "of another kind", "header"])
def test_what_is_not_as_it_was_put_is_refused(url: str, raw: Raw, part: str, harm: str, chunk: int, size: int) -> None:
    if harm == "header" and chunk:
        pytest.skip("it is in the first chunk")

    async def scenario(store: Store) -> None:
        session, commit = await made(store, 0, size)
        await appended(store, session, commit, [1], size)
        name = next(name for name in sorted(keys(raw, session)) if name.startswith(part) and name.endswith(f":{chunk}"))
        name = f"ravine:{{{session}}}:{name}"
        whole = raw.get(name)
        if harm == "changed":
            raw.setrange(name, 100, b"\x01")
        elif harm == "header":
            raw.setrange(name, 0, b"\xff" * 5)
        elif harm == "cut":
            raw.set(name, whole[:-1])
        elif harm == "grown":
            raw.set(name, whole + b"\0")
        else:
            raw.delete(name)
            if harm == "of another kind":
                raw.rpush(name, "a list")
        async with asyncio.timeout(20):
            with pytest.raises(Corrupt):
                await store.load(session)

    on(url, scenario)


# -- unknown outcomes --------------------------------------------------------------------------------------------------


def test_what_became_of_an_append(url: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        lost = entry(commit, 1)
        assert await store.landed(session, commit, lost.commit, 0) is None  # it may still come
        assert await store.append(session, commit, [lost]) == "OK"
        assert await store.landed(session, commit, lost.commit, 0) == "OK"
        (other,) = await appended(store, session, lost.commit, [2])
        assert await store.landed(session, commit, lost.commit, 0) == "OK"
        never = entry(lost.commit, 2)
        assert await store.landed(session, lost.commit, never.commit, 1) == "STALE"
        head = await store.head(session)
        assert head is not None
        assert head.commit == other.commit
        assert await store.snapshot(session, head, [], 2, "snap1", pieces(2)) == "OK"
        await appended(store, session, other.commit, [3])
        # The log was cut: the history knows those that landed, and of the others nothing is claimed.
        assert await store.landed(session, commit, lost.commit, 0) == "OK"
        with pytest.raises(StoreUnavailable):
            await store.landed(session, lost.commit, never.commit, 1)

    on(url, scenario)


def test_a_full_store_says_so_and_changes_nothing(url: str, raw: Raw) -> None:
    everywhere: dict[str, Any] = {"target_nodes": RedisCluster.ALL_NODES} if isinstance(raw, RedisCluster) else {}

    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        raw.config_set("maxmemory", "1", **everywhere)
        try:
            for size in (3, LARGE):
                with pytest.raises(StoreFull):
                    await store.append(session, commit, [entry(commit, 1, size)])
            assert await steps_of(store, session) == []
            assert await store.commit_of(session) == commit
        finally:
            raw.config_set("maxmemory", "0", **everywhere)
        await appended(store, session, commit, [1])

    on(url, scenario)
