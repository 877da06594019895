"""What an acknowledgement waits for, against real servers: Valkey, a Redis without WAITAOF, replicas, a cluster.

A replica that is stopped has nothing any more, and a server whose settings are changed under way syncs nothing any
more: in both cases nothing may be acknowledged, whichever way it is asked for, until it is safe.
"""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.cluster import RedisCluster, key_slot
from redis.exceptions import ResponseError

from service.acks import AckImpossible, Asked, Barrier
from service.cluster import ClusterLink
from service.errors import Unconfirmed
from service.ids import new_id
from service.store import Store
from tests.faults.stores import AT_ONCE, DURABLE, VOLATILE, StoreServer, storing, until
from tests.running import redis_binary, valkey_binary
from tests.service.nodes import cluster
from tests.service.test_store import LARGE, chain, entry, made, runs, steps_of

Scenario = Callable[[Store], Awaitable[Any]]
BINARIES = ["valkey", "redis"]
# A stopped replica is given up soon: these are tests.
DISK, REPLICATED = Asked("disk", seconds=0.3), Asked("replicated", seconds=0.3)


def binary(name: str) -> str:
    found = valkey_binary() if name == "valkey" else redis_binary()
    if found is None:
        pytest.skip("there is no redis-server on PATH")
    return found


def on(url: str, asked: Asked, scenario: Scenario) -> Any:
    async def scene() -> Any:
        store = Store(url, asked=asked)
        try:
            await store.open()
            async with asyncio.timeout(30):
                return await scenario(store)
        finally:
            await store.close()

    return runs(scene())


async def nothing(_: Store) -> None:
    pass


# -- what the replies mean ---------------------------------------------------------------------------------------------

SET = [[b"appendonly", b"yes"], [b"appendfsync", b"always"], [b"no-appendfsync-on-rewrite", b"no"]]


@pytest.mark.parametrize(
    ("replies", "sentence"),
    [
        ([[1, 0], *SET], None),
        ([[0, 0], *SET], "the store has not synced its log within 3 s"),
        ([[1, 0], SET[0], [b"appendfsync", b"everysec"], SET[2]], "appendfsync is everysec"),
        ([[1, 0], [b"appendonly", b"no"], *SET[1:]], "appendonly is no"),
        ([[1, 0], *SET[:2], [b"no-appendfsync-on-rewrite", b"yes"]], "no-appendfsync-on-rewrite is yes"),
        ([[1, 0], *SET[:2], []], "no-appendfsync-on-rewrite is unknown"),
        ([[1, 0], SET[0], ResponseError("NOPERM"), SET[2]], "does not tell its appendfsync: NOPERM"),
        ([ResponseError("unknown command"), *SET], "refuses WAITAOF"),
    ],
)
def test_what_the_disk_says(replies: list[Any], sentence: str | None) -> None:
    found = Barrier(Asked("disk"), waitaof=True).missing(replies)
    assert found is None if sentence is None else found is not None and sentence in found


def test_what_a_server_without_waitaof_says() -> None:
    barrier = Barrier(Asked("disk"), waitaof=False)
    assert [command[0] for command in barrier.commands] == ["INFO"] * 2 + ["CONFIG"] * 3
    told = [b"# Server\r\nrun_id:a\r\n", info(1, 0, 0, 88)]
    assert barrier.missing([*told, *SET]) is None
    assert barrier.missing([*told, SET[0], [b"appendfsync", b"everysec"], SET[2]]) is not None
    for number, part in enumerate(["server", "persistence"]):
        replies = [*told[:number], ResponseError("NOPERM"), *told[number + 1 :]]
        assert barrier.missing([*replies, *SET]) == f"the store does not tell its INFO {part}: NOPERM"


def info(enabled: int, running: int, scheduled: int, base: int) -> bytes:
    lines = {
        "aof_enabled": enabled,
        "aof_rewrite_in_progress": running,
        "aof_rewrite_scheduled": scheduled,
        "aof_base_size": base,
    }
    return "".join(["# Persistence\r\n", *(f"{name}:{value}\r\n" for name, value in lines.items())]).encode()


WHOLE, OFF, NEVER = (1, 0, 0, 0), (0, 0, 0, 0), None


@pytest.mark.parametrize(
    ("before", "now", "safe"),
    [
        *[(NEVER, (1, 1, 0, 0), False), (NEVER, (1, 0, 1, 0), False), (NEVER, (1, 1, 0, 88), True)],
        *[(WHOLE, (1, 1, 0, 0), True), (WHOLE, (1, 0, 1, 0), True), (WHOLE, (1, 1, 0, 88), True)],
        *[(OFF, (1, 1, 0, 0), False), (OFF, (1, 0, 1, 88), False), (OFF, (1, 1, 0, 88), False), (OFF, WHOLE, True)],
    ],
)
def test_which_rewrite_takes_nothing_away(
    before: tuple[int, int, int, int] | None, now: tuple[int, int, int, int], safe: bool
) -> None:
    """By what the server was last seen with, and by nothing that another one was."""
    barrier = Barrier(Asked("disk"), waitaof=False)

    def missing(server: str, told: tuple[int, int, int, int]) -> str | None:
        return barrier.missing([f"run_id:{server}\r\n".encode(), info(*told), *SET])

    missing("b", OFF if before == WHOLE else WHOLE)
    if before is not None:
        missing("a", before)
    assert (missing("a", now) is None) == safe


@pytest.mark.parametrize(("reply", "safe"), [(2, True), (3, True), (1, False), (ResponseError("no"), False)])
def test_what_replicas_say(reply: Any, safe: bool) -> None:
    barrier = Barrier(Asked("replicated", 2), waitaof=True)
    assert barrier.commands == [("WAIT", 2, 3000)]
    assert (barrier.missing([reply]) is None) == safe


# -- what a store cannot give is refused at the start ------------------------------------------------------------------


@pytest.mark.parametrize("name", BINARIES)
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--appendonly", "no"), "appendonly is no"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync is everysec"),
        (("--appendonly", "yes", "--appendfsync", "no"), "appendfsync is no"),
        ((*DURABLE, "--no-appendfsync-on-rewrite", "yes"), "no-appendfsync-on-rewrite is yes"),
    ],
)
def test_a_disk_that_is_not_asked_for_its_sync(
    tmp_path: Path, name: str, options: tuple[str, ...], sentence: str
) -> None:
    with (
        storing(tmp_path, "--save", "", *options, binary=binary(name)) as server,
        pytest.raises(AckImpossible, match=sentence),
    ):
        on(server.url, DISK, nothing)


@pytest.mark.parametrize("name", BINARIES)
def test_fewer_replicas_than_asked_for(tmp_path: Path, name: str) -> None:
    with replicated(tmp_path, name) as (primary, _):
        on(primary.url, REPLICATED, nothing)
        with pytest.raises(AckImpossible, match="1 of 2 replicas have it"):
            on(primary.url, Asked("replicated", 2, 0.3), nothing)


def test_a_user_that_may_not_ask_is_told(tmp_path: Path) -> None:
    with storing(tmp_path, *DURABLE) as server:
        server.call("ACL", "SETUSER", "narrow", "on", ">secret", "~ravine:*", "+@all", "-config")
        url = server.url.replace("redis://", "redis://narrow:secret@")
        with pytest.raises(AckImpossible, match="does not tell its appendonly"):
            on(url, DISK, nothing)


# -- disk --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=BINARIES)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with storing(tmp_path / "store", *DURABLE, binary=binary(request.param)) as server:
        yield server


@pytest.mark.parametrize(
    "change", [("appendfsync", "everysec"), ("appendfsync", "no"), ("appendonly", "no")], ids="-".join
)
def test_nothing_is_acknowledged_by_a_disk_that_stopped_to_sync(disk: StoreServer, change: tuple[str, str]) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        (first, second) = items = chain(commit, [1, 2])
        assert await store.append(session, commit, [first]) == "OK"
        with disk.client() as raw:
            raw.config_set(*change)
            with pytest.raises(Unconfirmed):
                await store.append(session, first.commit, [second])
            with pytest.raises(Unconfirmed):  # it is at the head by now, and no safer
                await store.append(session, first.commit, [second])
            raw.config_set(change[0], "always" if change[0] == "appendfsync" else "yes")
            until(lambda: not raw.info("persistence")["aof_rewrite_in_progress"], "the log is begun anew")
        assert await store.append(session, first.commit, [second]) == "OK"
        assert await steps_of(store, session) == [1, 2]
        assert len(items) == 2

    on(disk.url, DISK, scenario)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("name", BINARIES)
def test_a_log_that_is_only_begun_keeps_nothing_yet(tmp_path: Path, name: str, again: bool) -> None:
    """Until its first rewrite is done a restart has nothing to load, or what was there before the log was off."""

    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        item = entry(commit, 1)
        with server.client() as raw:
            raw.config_set("appendonly", "no")
            with pytest.raises(Unconfirmed, match="appendonly is no"):
                await made(store)
            begin_slowly(raw)
            with pytest.raises(Unconfirmed):
                await store.append(session, commit, [item])
            finish(raw)
        assert await store.append(session, commit, [item]) == "OK"
        server.kill()
        server.start()
        assert await steps_of(store, session) == [1]

    options = DURABLE if again else (*VOLATILE, "--appendfsync", "always")
    with storing(tmp_path, *options, binary=binary(name)) as server:
        if not again:
            with server.client() as raw:
                begin_slowly(raw)
                with pytest.raises(AckImpossible, match=r"only beginning its log|not synced its log"):
                    on(server.url, DISK, nothing)
                finish(raw)
            server.options = DURABLE
        on(server.url, DISK, scenario)


def begin_slowly(raw: redis.Redis) -> None:
    """Turns the log on, and what it begins with takes as long as it would with a large data set."""
    raw.mset({f"{number}": "" for number in range(4000)})
    raw.config_set("rdb-key-save-delay", 5000)
    raw.config_set("appendonly", "yes")
    assert raw.info("persistence")["aof_rewrite_in_progress"]


def finish(raw: redis.Redis) -> None:
    """What was slow is broken off, and done again at once."""
    raw.config_set("rdb-key-save-delay", 0)
    raw.delete(*map(str, range(4000)))
    raw.config_set("appendonly", "no")
    raw.config_set("appendonly", "yes")
    until(lambda: not rewriting(raw), "the log is begun")


def rewriting(raw: redis.Redis) -> bool:
    told = raw.info("persistence")
    return bool(told["aof_rewrite_in_progress"] or told["aof_rewrite_scheduled"])


def test_a_log_that_is_rewritten_beside_a_whole_one_goes_on(disk: StoreServer) -> None:
    """The first rewrite of a log that was begun with the server, and those of a service that comes during another."""

    async def scenario(store: Store) -> None:
        with disk.client() as raw:
            raw.mset({f"{number}": "" for number in range(4000)})
            raw.config_set("rdb-key-save-delay", 5000)
            raw.bgrewriteaof()
            await made(store)
            assert rewriting(raw)
            raw.config_set("appendonly", "no")  # which ends it

    on(disk.url, DISK, scenario)


def test_what_was_acknowledged_is_there_after_a_kill(disk: StoreServer) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store, size=LARGE)
        (small,) = chain(commit, [1])
        assert await store.append(session, commit, [small]) == "OK"
        large = entry(small.commit, 2, LARGE)
        assert await store.append(session, small.commit, [large]) == "OK"
        disk.kill()
        disk.start()
        assert await steps_of(store, session) == [1, 2]

    on(disk.url, DISK, scenario)


# -- replicas ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replicated(directory: Path, name: str) -> Iterator[tuple[StoreServer, StoreServer]]:
    with (
        storing(directory / "primary", *VOLATILE, *AT_ONCE, binary=binary(name)) as primary,
        storing(directory / "replica", *VOLATILE, "--replicaof", "{} {}".format(*primary.address), binary=binary(name))
        as replica,
    ):  # fmt: skip
        with primary.client() as raw:  # it is there once it tells what it has; "up" and "online" come before
            until(lambda: raw.set("there", 1) and raw.wait(1, 100), "the replica follows")
            raw.delete("there")
        yield primary, replica


@pytest.fixture(params=BINARIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[StoreServer, StoreServer]]:
    with replicated(tmp_path, request.param) as servers:
        yield servers


@contextlib.contextmanager
def stopped(server: StoreServer) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


def test_nothing_is_acknowledged_without_the_replica(pair: tuple[StoreServer, StoreServer]) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        item = entry(commit, 1)
        other = Store(pair[0].url, asked=REPLICATED)
        await other.open()
        with stopped(pair[1]):
            with pytest.raises(Unconfirmed):
                await store.append(session, commit, [item])
            # It is at the head now. Valkey counts the writes of a connection alone, and all that the other one's has
            # written is at the replica.
            with pytest.raises(Unconfirmed):
                await other.append(session, commit, [item])
            with pytest.raises(Unconfirmed):
                await other.confirm(session, item.commit)
            with pytest.raises(Unconfirmed):
                await other.confirm(session, None)
            with pytest.raises(Unconfirmed):
                await made(store)
        await other.close()
        assert await store.append(session, commit, [item]) == "OK"
        assert await steps_of(store, session) == [1]

    on(pair[0].url, REPLICATED, scenario)


def test_confirming(pair: tuple[StoreServer, StoreServer]) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        item = entry(commit, 1)
        assert await store.append(session, commit, [item]) == "OK"
        assert await store.confirm(session, item.commit) == "OK"
        assert await store.confirm(session, None) == "OK"
        assert await store.confirm(session, commit) == "STALE"
        assert await store.confirm(new_id(), None) == "GONE"
        assert await store.commit_of(session) == item.commit

    on(pair[0].url, REPLICATED, scenario)


def test_a_deletion_is_acknowledged_too(pair: tuple[StoreServer, StoreServer]) -> None:
    async def scenario(store: Store) -> None:
        session, _ = await made(store)
        head = await store.head(session)
        assert head is not None
        with stopped(pair[1]), pytest.raises(Unconfirmed):
            await store.delete(session, head, None)
        assert await store.head(session) is None

    on(pair[0].url, REPLICATED, scenario)


def test_reads_and_snapshots_do_not_wait(pair: tuple[StoreServer, StoreServer]) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        item = entry(commit, 1)
        with stopped(pair[1]):
            writing = [asyncio.create_task(store.append(session, commit, [item])) for _ in range(20)]
            while await store.commit_of(session) == commit:
                pass
            head = await store.head(session)
            assert head is not None
            assert await store.snapshot(session, head, [], 1, "snap1", [b"a snapshot"]) == "OK"
            assert not any(task.done() for task in writing)
            outcomes = await asyncio.gather(*writing, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Unconfirmed}

    on(pair[0].url, Asked("replicated", seconds=2.0), scenario)


def calls(server: StoreServer, command: str) -> int:
    return int(server.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def test_one_barrier_for_all_that_goes_out_together(pair: tuple[StoreServer, StoreServer]) -> None:
    async def scenario(store: Store) -> tuple[int, int]:
        sessions = await asyncio.gather(*[made(store) for _ in range(200)])
        before = calls(pair[0], "wait")
        outcomes = await asyncio.gather(*[store.append(name, at, [entry(at, 1)]) for name, at in sessions])
        assert set(outcomes) == {"OK"}
        return before, calls(pair[0], "wait")

    before, after = on(pair[0].url, REPLICATED, scenario)
    assert 1 <= after - before <= 10


def test_memory_waits_for_nothing(pair: tuple[StoreServer, StoreServer]) -> None:
    async def scenario(store: Store) -> None:
        with stopped(pair[1]):
            session, commit = await made(store)
            assert await store.append(session, commit, [entry(commit, 1)]) == "OK"

    before = calls(pair[0], "wait")
    on(pair[0].url, Asked(), scenario)
    assert [calls(pair[0], name) for name in ("wait", "waitaof")] == [before, 0]


# -- a cluster ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three primaries with a log each."""
    with cluster(tmp_path_factory.mktemp("cluster") / "data") as url:
        everywhere(url, "appendonly", "yes")
        everywhere(url, "appendfsync", "always")
        yield url


def everywhere(url: str, name: str, value: str) -> None:
    with contextlib.closing(RedisCluster.from_url(url)) as client:
        client.config_set(name, value, target_nodes=RedisCluster.ALL_NODES)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def careless(url: str, session: str) -> Iterator[None]:
    """The node that has `session` does not sync any more."""
    with contextlib.closing(RedisCluster.from_url(url)) as client:
        node = client.get_node_from_key(f"ravine:{{{session}}}:head")
        client.config_set("appendfsync", "everysec", target_nodes=node)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            client.config_set("appendfsync", "always", target_nodes=node)  # type: ignore[no-untyped-call]


def test_each_node_swears_for_its_own(nodes: str) -> None:
    async def scenario(store: Store) -> str:
        for size in (3, LARGE):
            session, commit = await made(store, size=size)
            item = entry(commit, 1, size)
            with careless(nodes, session), pytest.raises(Unconfirmed):
                await store.append(session, commit, [item])
            assert await store.append(session, commit, [item]) == "OK"
            assert await steps_of(store, session) == [1]
        await store.index.enter("default", session, [])
        return session

    session = on(nodes, DISK, scenario)
    with careless(nodes, session), pytest.raises(AckImpossible, match="appendfsync is everysec"):
        on(nodes, DISK, nothing)


def test_a_slot_that_has_moved_is_followed(nodes: str) -> None:
    async def scenario(store: Store) -> None:
        session, commit = await made(store)
        assert isinstance(store.link, ClusterLink)
        manager = store.link.client.nodes_manager
        slot = key_slot(f"ravine:{{{session}}}:head".encode())
        right = manager.slots_cache[slot]
        wrong = next(nodes for nodes in manager.slots_cache.values() if nodes[0] is not right[0])
        manager.slots_cache[slot] = list(wrong)
        assert await store.append(session, commit, [entry(commit, 1)]) == "OK"
        assert manager.slots_cache[slot][0] is right[0]

    on(nodes, DISK, scenario)


def test_no_replicas_in_the_cluster(nodes: str) -> None:
    with pytest.raises(AckImpossible, match="0 of 1 replicas"):
        on(nodes, REPLICATED, nothing)


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    with storing(tmp_path, *DURABLE) as server:
        on(server.url, DISK, nothing)
        with redis.Redis.from_url(server.url) as raw:
            until(lambda: not raw.keys(), "the key that was tried is gone")
