"""A cluster's nodes have a pipeline each, slots that move are followed, and a node that dies takes nobody along."""

import asyncio
import contextlib
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from redis.exceptions import ResponseError

from service.acks import Asked, Barrier
from service.bell import Bell
from service.cluster import ClusterLink
from service.errors import StoreUnavailable, Unconfirmed
from service.store import Store, key
from tests.running import ROOT
from tests.service.nodes import Member, begin_moving, end_moving, eventually, home, members, move, replicates
from tests.service.test_store import entry, made, on, runs, steps_of

NAME = "ravine:tests"
MANY = 90
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
LISTED = "ravine:sessions"


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Member]]:
    """Three nodes that share the slots, with a log each, and a fourth that has none."""
    # Otherwise a node whose last slot goes becomes a replica of the one that got it.
    staying = ("--cluster-allow-replica-migration", "no")
    with members(tmp_path_factory.mktemp("ring"), *DURABLE, *staying, spare=1) as found:
        yield found


def over(
    url: str,
    scenario: Callable[[ClusterLink], Awaitable[Any]],
    *,
    timeout: float = 5.0,
    barrier: Barrier | None = None,
) -> Any:
    async def scene() -> Any:
        link = ClusterLink(url, NAME, timeout, barrier)
        try:
            async with asyncio.timeout(60):
                return await scenario(link)
        finally:
            await link.close()

    return runs(scene())


def keys_of(member: Member, among: list[Member], count: int) -> list[str]:
    """Names, each of a slot of its own, that `member` has."""
    names = (f"ravine:{{{member.port}-{number}}}" for number in range(100_000))
    return [name for name, _ in zip((one for one in names if home(one, among) is member), range(count), strict=False)]


async def settles(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """What `attempt` gives once the store is not away any more."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await attempt()
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def session_at(store: Store, member: Member, among: list[Member]) -> tuple[str, str]:
    """A session that `member` has, and its commit."""
    while True:
        session, commit = await made(store)
        if home(key(session), among) is member:
            return session, commit


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_one_turn_is_one_pipeline_per_node(ring: list[Member]) -> None:
    """A server counts what it reads: what comes in one write it has with one of them."""
    names = [name for member in ring[:3] for name in keys_of(member, ring, MANY)]

    async def scenario(link: ClusterLink) -> list[tuple[int, int, int]]:
        await asyncio.gather(*[link.call("SET", name, name) for name in names])  # connects
        before = [stats(member) for member in ring[:3]]
        replies = await asyncio.gather(*[link.call("GET", name) for name in names])
        after = [stats(member) for member in ring[:3]]
        assert replies == [name.encode() for name in names]
        return [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]

    # Commands and reads, both with the INFO that asks for them.
    assert over(ring[0].url, scenario) == [(MANY + 1, 2)] * 3


def stats(member: Member) -> tuple[int, int]:
    told = member.client.info("stats")
    return told["total_commands_processed"], told["total_reads_processed"]


def test_many_commands_take_few_connections(ring: list[Member]) -> None:
    async def scenario(link: ClusterLink) -> None:
        names = [name for member in ring[:3] for name in keys_of(member, ring, 5)]
        for _ in range(20):
            await asyncio.gather(*[link.call("APPEND", name, "x") for name in names])
        for member in ring[:3]:
            ours = [one for one in member.client.client_list() if one["name"] == NAME and one["cmd"] == "append"]
            assert len(ours) == 1

    over(ring[0].url, scenario)


def test_what_is_large_travels_alone(ring: list[Member]) -> None:
    async def scenario(link: ClusterLink) -> None:
        (name,) = keys_of(ring[1], ring, 1)
        large = bytes(1_000_000)
        sent = [link.call("SET", name, large), *[link.call("APPEND", f"{name}{i}", "x") for i in range(3)]]
        await asyncio.gather(*sent)
        ours = [one["cmd"] for one in ring[1].client.client_list() if one["name"] == NAME]
        assert sorted(one for one in ours if one in ("set", "append")) == ["append", "set"]
        assert await link.call("GET", name, alone=True) == large

    over(ring[0].url, scenario)


def test_each_node_is_waited_for_once_a_turn(ring: list[Member]) -> None:
    names = [name for member in ring[:3] for name in keys_of(member, ring, MANY)]

    async def scenario(link: ClusterLink) -> None:
        await asyncio.gather(*[link.call("SET", name, name, durable=True) for name in names])

    before = [member.calls("waitaof") for member in ring[:3]]
    over(ring[0].url, scenario, barrier=Barrier(Asked("disk"), waitaof=True))
    assert [member.calls("waitaof") for member in ring[:3]] == [count + 1 for count in before]


def test_who_goes_away_leaves_no_reply_behind(ring: list[Member]) -> None:
    names = [name for member in ring[:3] for name in keys_of(member, ring, MANY)]
    slot = key_slot(names[0].encode())

    async def scenario(link: ClusterLink) -> None:
        await asyncio.gather(*[link.call("SET", name, name) for name in names])
        for turns in range(4):
            calls = [link.call("GET", name) for name in names]
            for _ in range(turns):
                await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            assert await asyncio.gather(*calls[1::2]) == [name.encode() for name in names[1::2]]
            assert await link.call("GET", names[0]) == names[0].encode()
            if turns == 1:  # from here on there is one that is sent on, and that nobody waits for
                move(slot, ring[0], ring[1], ring)

    try:
        over(ring[0].url, scenario)
    finally:
        if ring[1].call("CLUSTER", "COUNTKEYSINSLOT", slot):
            move(slot, ring[1], ring[0], ring)


# -- slots that move ---------------------------------------------------------------------------------------------------


def test_a_slot_that_was_moved_is_followed(ring: list[Member]) -> None:
    async def scenario(store: Store) -> None:
        source, target = ring[0], ring[1]
        session, commit = await session_at(store, source, ring)
        slot = key_slot(key(session).encode())
        items = [entry(commit, 1)]
        for here, there in ((source, target), (target, source)):
            move(slot, here, there, ring)
            seen = [await store.commit_of(session), *[head.commit for head in await store.heads([session])]]  # type: ignore[union-attr]
            assert set(seen) == {commit}
            assert await store.append(session, commit, [items[-1]]) == "OK"
            commit = items[-1].commit
            items.append(entry(commit, len(items) + 1))
        assert await steps_of(store, session) == [1, 2]

    on(ring[0].url, scenario)


def test_what_is_sent_on_while_the_link_is_closed_is_answered_and_leaves_no_connection(ring: list[Member]) -> None:
    (name,) = keys_of(ring[0], ring, 1)
    slot = key_slot(name.encode())

    async def scenario(link: ClusterLink) -> None:
        await link.call("SET", name, 0)
        move(slot, ring[0], ring[2], ring)
        calls = [link.call("INCR", name) for _ in range(5)]
        await link.close()
        assert [call.result() for call in calls] == [1, 2, 3, 4, 5]
        clients = ring[2].client.client_list
        await asyncio.to_thread(eventually, lambda: NAME not in [one["name"] for one in clients()])

    try:
        over(ring[0].url, scenario)
    finally:
        move(slot, ring[2], ring[0], ring)


def test_many_commands_are_sent_on_together(ring: list[Member]) -> None:
    """All of a turn meet the move, on both kinds of pipeline; each is executed once."""
    (name,) = keys_of(ring[0], ring, 1)
    slot = key_slot(name.encode())
    counters = [f"{name}:{number}" for number in range(MANY)]

    async def scenario(link: ClusterLink) -> None:
        await asyncio.gather(*[link.call("SET", counter, 0) for counter in counters])
        move(slot, ring[0], ring[2], ring)
        replies = [link.call("INCR", counter, durable=i % 2 == 0) for i, counter in enumerate(counters)]
        assert await asyncio.gather(*replies) == [1] * MANY
        assert await asyncio.gather(*[link.call("GET", counter) for counter in counters]) == [b"1"] * MANY

    try:
        over(ring[0].url, scenario, barrier=Barrier(Asked("disk"), waitaof=True))
    finally:
        move(slot, ring[2], ring[0], ring)


def test_a_slot_on_its_way_to_a_node_that_is_new(ring: list[Member]) -> None:
    """The topology has no node without slots, so that ASK names one that nobody has heard of."""

    async def scenario(store: Store) -> None:
        session, commit = await session_at(store, ring[0], ring)
        item = entry(commit, 1)
        slot = key_slot(key(session).encode())
        begin_moving(slot, ring[0], ring[3])
        assert await asyncio.gather(*[store.commit_of(session) for _ in range(20)]) == [commit] * 20
        with pytest.raises(StoreUnavailable):  # some of its keys are not there yet, on either side
            await store.append(session, commit, [item])
        assert await store.commit_of(session) == commit
        end_moving(slot, ring[0], ring[3], ring)
        assert await settles(lambda: store.append(session, commit, [item])) == "OK"
        assert await steps_of(store, session) == [1]
        assert ring[3].call("CLUSTER", "COUNTKEYSINSLOT", slot) > 0

        # And the node goes again.
        move(slot, ring[3], ring[0], ring)
        assert await settles(lambda: store.commit_of(session)) == item.commit

    on(ring[1].url, scenario)


def test_all_slots_of_a_node_move_under_load(tmp_path: Path) -> None:
    """At once, as Valkey does it: nobody is refused, and no step is done twice or left out."""
    with members(tmp_path) as nodes:

        async def steps(store: Store, session: str, commit: str, over: asyncio.Event) -> list[int]:
            done = 0
            while not over.is_set():
                item = entry(commit, done + 1)
                assert await store.append(session, commit, [item]) == "OK"
                commit, done = item.commit, done + 1
            return list(range(1, done + 1))

        async def scenario(store: Store) -> None:
            over = asyncio.Event()
            sessions = [await made(store) for _ in range(30)]
            stepping = [asyncio.create_task(steps(store, *session, over)) for session in sessions]
            try:
                whose = ("SLOTSRANGE", 0, 5460, "NODE", nodes[1].id)
                await asyncio.to_thread(nodes[0].call, "CLUSTER", "MIGRATESLOTS", *whose)
                await asyncio.to_thread(eventually, lambda: nodes[0].call("DBSIZE") == 0 or is_replica(nodes[0]))
                await asyncio.sleep(0.2)
            finally:
                over.set()
                done = await asyncio.gather(*stepping)
            assert [await steps_of(store, session) for session, _ in sessions] == done

        with pytest.raises(ResponseError) as refusal:
            nodes[0].call("CLUSTER", "MIGRATESLOTS")
        if "unknown" in str(refusal.value).lower():
            pytest.skip("the store moves slots key by key only")
        on(nodes[1].url, scenario)


def is_replica(member: Member) -> bool:
    role: bytes = member.call("ROLE")[0]
    return role == b"slave"


def test_a_write_that_must_be_safe_goes_where_the_slot_is_going(ring: list[Member]) -> None:
    source = home(LISTED, ring)
    slot = key_slot(LISTED.encode())

    async def scenario(link: ClusterLink) -> None:
        await link.call("ZADD", LISTED, 0, "before", durable=True)
        begin_moving(slot, source, ring[3])
        before = ring[3].calls("waitaof")
        names = [f"under way {number}" for number in range(5)]
        assert await asyncio.gather(*[link.call("ZADD", LISTED, 0, name, durable=True) for name in names]) == [1] * 5
        assert ring[3].calls("waitaof") > before
        end_moving(slot, source, ring[3], ring)
        assert await link.call("ZCARD", LISTED) == 6
        assert await link.call("DEL", LISTED) == 1

    try:
        over(ring[0].url, scenario, barrier=Barrier(Asked("disk"), waitaof=True))
    finally:
        move(slot, ring[3], source, ring)


def test_nodes_that_send_each_other_the_command_are_not_followed_for_ever(ring: list[Member]) -> None:
    """A slot that is on its way to a node which does not expect it: ASK there is MOVED back here."""
    (name,) = keys_of(ring[0], ring, 1)
    slot = key_slot(name.encode())

    async def scenario(link: ClusterLink) -> None:
        await link.call("DEL", name)
        ring[0].call("CLUSTER", "SETSLOT", slot, "MIGRATING", ring[1].id)
        with pytest.raises(StoreUnavailable, match="being moved"):
            await link.call("INCR", name)
        ring[0].call("CLUSTER", "SETSLOT", slot, "STABLE")
        assert await link.call("INCR", name) == 1

    over(ring[0].url, scenario)


# -- nodes that die ----------------------------------------------------------------------------------------------------


def test_what_may_have_been_received_is_not_sent_again(ring: list[Member]) -> None:
    """A node is stopped while commands are on their way, and goes on once they were given up: each is executed once."""
    member = ring[1]
    names = keys_of(member, ring, MANY)
    (elsewhere,) = keys_of(ring[2], ring, 1)

    async def scenario(link: ClusterLink) -> None:
        await asyncio.gather(*[link.call("SET", name, 0) for name in [*names, elsewhere]])
        member.process.send_signal(signal.SIGSTOP)
        try:
            # Soon enough that what would be sent once more is not given up, too.
            asyncio.get_running_loop().call_later(1.6, member.process.send_signal, signal.SIGCONT)
            lost = [link.call("INCR", name) for name in names]
            assert await link.call("INCR", elsewhere) == 1
            outcomes = await asyncio.gather(*lost, return_exceptions=True)
        finally:
            member.process.send_signal(signal.SIGCONT)
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
        for name in names:
            assert await settles(lambda name=name: link.call("GET", name)) == b"1"

    over(ring[0].url, scenario, timeout=1.0)


def test_a_dead_node_takes_nobody_along_and_comes_back(tmp_path: Path) -> None:
    with members(tmp_path, *DURABLE, "--cluster-require-full-coverage", "no") as nodes:

        async def scenario(store: Store) -> None:
            here, there = [await session_at(store, member, nodes) for member in nodes[1:]]
            nodes[1].kill()
            first, second = entry(there[1], 1), entry(here[1], 1)
            with pytest.raises(StoreUnavailable):
                await store.append(here[0], here[1], [second])
            assert await store.append(there[0], there[1], [first]) == "OK"
            eventually(lambda: nodes[0].client.execute_command("CLUSTER INFO")["cluster_slots_fail"] != "0")
            with pytest.raises(StoreUnavailable):
                await store.append(here[0], here[1], [second])
            assert await store.append(there[0], first.commit, [entry(first.commit, 2)]) == "OK"
            nodes[1].start()
            assert await settles(lambda: store.append(here[0], here[1], [second])) == "OK"
            assert await steps_of(store, here[0]) == [1]

        on(nodes[0].url, scenario)


def test_a_cluster_that_is_down_is_the_store_that_is_away(tmp_path: Path) -> None:
    """Without all its slots it serves none, by default."""
    with members(tmp_path) as nodes:

        async def scenario(store: Store) -> None:
            session, commit = await session_at(store, nodes[2], nodes)
            before = await store.link.servers()
            nodes[0].kill()
            with pytest.raises(StoreUnavailable):
                await store.link.servers()
            eventually(lambda: nodes[2].call("CLUSTER INFO")["cluster_state"] == "fail")
            with pytest.raises(StoreUnavailable, match="refuses"):
                await store.append(session, commit, [entry(commit, 1)])
            nodes[0].start()
            item = entry(commit, 1)
            assert await settles(lambda: store.append(session, commit, [item])) == "OK"
            assert await settles(store.link.servers) != before

        on(nodes[1].url, scenario)


def test_replicas_that_take_over_are_found(tmp_path: Path) -> None:
    """First by agreement, the old primary answering MOVED, then because the primary has died."""
    with members(tmp_path, spare=1) as nodes:
        first, second = nodes[0], nodes[3]
        replicates(second, first)

        async def scenario(store: Store) -> None:
            session, commit = await session_at(store, first, nodes)
            servers = await store.link.servers()
            items = [entry(commit, 1)]
            items.append(entry(items[0].commit, 2))
            bell = Bell(store.pubsub_client)
            bell.start()
            try:
                first.call("WAIT", 1, 5000)
                second.call("CLUSTER", "FAILOVER")
                eventually(lambda: is_replica(first) and not is_replica(second))
                assert await settles(lambda: store.append(session, commit, items[:1])) == "OK"
                assert await store.link.servers() != servers
                eventually(lambda: first.client.info("replication").get("master_link_status") == "up")
                second.call("WAIT", 1, 5000)
                second.kill()
                assert await settles(lambda: store.append(session, items[0].commit, items[1:])) == "OK"
                assert await steps_of(store, session) == [1, 2]
                async with bell.listen(key(session)) as heard:
                    third = entry(items[1].commit, 3)
                    assert await store.append(session, items[1].commit, [third]) == "OK"
                    async with asyncio.timeout(10):
                        while third.commit not in await heard.get():
                            pass
            finally:
                await bell.stop()

        on(nodes[1].url, scenario)


def test_a_failover_is_noticed_by_who_asks_for_nothing(tmp_path: Path) -> None:
    """And so is one there and back, after which each node is what it was."""
    with members(tmp_path, spare=1) as nodes:
        first, second = nodes[0], nodes[3]
        replicates(second, first)

        async def scenario(link: ClusterLink) -> None:
            seen = [await link.servers()]
            for old, new in ((first, second), (second, first)):
                eventually(lambda old=old: old.call("WAIT", 1, 100))
                new.call("CLUSTER", "FAILOVER")
                eventually(lambda old=old, new=new: is_replica(old) and not is_replica(new))
                eventually(lambda old=old: old.client.info("replication").get("master_link_status") == "up")
                seen.append(await settles(lambda new=new: which(link, new)))
            assert len(set(seen)) == 3

        over(nodes[1].url, scenario)


async def which(link: ClusterLink, primary: Member) -> str:
    """What tells the servers apart, once `primary` is known to be one."""
    told = await link.servers()
    if f":{primary.port} " not in told:
        raise StoreUnavailable("not yet")
    return told


def test_each_node_waits_for_its_own_replicas(tmp_path: Path) -> None:
    with members(tmp_path, spare=1) as nodes:
        replicates(nodes[3], nodes[1])
        copied, alone = keys_of(nodes[1], nodes, 1)[0], keys_of(nodes[2], nodes, 1)[0]

        async def scenario(link: ClusterLink) -> None:
            outcomes = [link.call("SET", name, 1, durable=True) for name in (copied, alone)]
            assert await outcomes[0] == b"OK"
            with pytest.raises(Unconfirmed, match="0 of 1 replicas"):
                await outcomes[1]
            assert sorted(await link.places()) == sorted(set(await link.places()))
            assert len(await link.places()) == 3

        over(nodes[0].url, scenario, barrier=Barrier(Asked("replicated", seconds=1.0), waitaof=False))


def test_no_cluster_is_the_store_that_is_away(tmp_path: Path) -> None:
    with members(tmp_path) as nodes:
        pass

    async def scenario(link: ClusterLink) -> None:
        for call in [link.call("GET", "a"), link.call("GET", "b")]:
            with pytest.raises(StoreUnavailable):
                await call
        with pytest.raises(StoreUnavailable):
            await link.servers()

    over(nodes[0].url, scenario)


def test_a_cluster_that_comes_back_elsewhere_is_found_by_its_url(tmp_path: Path) -> None:
    """As where a name leads to whichever nodes there are, and each new one has an address of its own."""

    async def moving(before: list[Member], after: list[Member]) -> None:
        where = [before[0]]
        async with await asyncio.start_server(partial(lead, where), "127.0.0.1", 0) as named:
            link = await ClusterLink.opened(f"redis://127.0.0.1:{named.sockets[0].getsockname()[1]}", NAME)
            try:
                names = [name for member in before for name in keys_of(member, before, 1)]
                await asyncio.gather(*[link.call("SET", name, "before") for name in names])
                where[0] = after[0]
                for member in before:
                    member.kill()
                for name in names:
                    assert await settles(lambda name=name: link.call("SET", name, "after")) == b"OK"
                assert sum(member.call("DBSIZE") for member in after) == len(names)
            finally:
                await link.close()

    with members(tmp_path / "before") as before, members(tmp_path / "after") as after:
        runs(moving(before, after))


async def lead(where: list[Member], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    onward = await asyncio.open_connection("127.0.0.1", where[0].port)
    await asyncio.gather(carry(reader, onward[1]), carry(onward[0], writer))


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while read := await reader.read(65_536):
            writer.write(read)
    writer.close()


# -- a cluster that asks who it is -------------------------------------------------------------------------------------


def test_the_documented_rights_are_enough(tmp_path: Path) -> None:
    rules = documented(r"^ACL SETUSER ravine (.*)$").replace(">PASSWORD", ">of-the-tests").split()
    rules += documented(r"In a cluster it needs\n`([^`]*)`").split() + documented(r"`(\+config\|get)`").split()
    with members(tmp_path, *DURABLE) as nodes:
        for node in nodes:
            node.call("ACL", "SETUSER", "ravine", *rules)

        async def scenario() -> None:
            store = Store(nodes[0].url.replace("//", "//ravine:of-the-tests@"), asked=Asked("disk"))
            await store.open()
            try:
                session, commit = await session_at(store, nodes[0], nodes)
                await store.index.enter("default", session, [])
                move(key_slot(key(session).encode()), nodes[0], nodes[1], nodes)
                assert await store.append(session, commit, [entry(commit, 1)]) == "OK"
                assert await store.link.servers()
            finally:
                await store.close()

        runs(scenario())
        assert [line for node in nodes for line in node.client.acl_log()] == []


def documented(pattern: str) -> str:
    found = re.search(pattern, (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]
