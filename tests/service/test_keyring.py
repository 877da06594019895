"""Keys in the store, who is believed for how long, and the names under which a service is reached without one."""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import pytest
from redis.exceptions import ResponseError

from service.access import keys
from service.access.gate import Gate
from service.access.hosts import is_allowed, is_loopback, listens_locally, parse_hosts
from service.access.keys import KnownKeys, digest_of, new_key, parsed
from service.access.rights import Access
from service.errors import SessionNotFound, Unauthenticated
from service.http import Receive
from service.store import Store
from tests.service.world import Run, World

# -- in the store ------------------------------------------------------------------------------------------------------


def test_a_key_is_256_bits_that_are_stored_nowhere() -> None:
    made = [new_key("acme", "admin") for _ in range(64)]
    assert len({text for text, _ in made}) == 64
    for text, key in made:
        assert re.fullmatch(r"rvn_[a-z0-9]{16}_[A-Za-z0-9_-]{43}", text)
        id_, secret = parsed(text.encode()) or ("", b"")
        assert (id_, digest_of(secret)) == (key.id, key.digest)
        assert secret.decode() not in repr(key)


@pytest.mark.parametrize(
    "text",
    [
        *("", "rvn_", "rvn__", "rvn_a_b", f"rvn_{'a' * 16}_{'A' * 42}", f"rvn_{'a' * 16}_{'A' * 43}\n"),
        *(f"RVN_{'a' * 16}_{'A' * 43}", f"rvn_{'a' * 11}_{'A' * 43}", f"rvn_{'a' * 33}_{'A' * 43}"),
        *(f"rvn_{'é' * 8}_{'A' * 43}", f"rvn_{'a' * 16}_{'=' * 43}"),
    ],
)
def test_what_is_no_key_is_not_looked_up(text: str) -> None:
    assert parsed(text.encode()) is None


def test_what_was_put_there_comes_back(run: Run) -> None:
    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        _, first = new_key(
            "acme", "worker", session="ses_x", rate="5/second", name="gpu 7: αβ", expires_at=4_000_000_000
        )
        _, second = new_key("default", "admin")
        for key in (first, second):
            await ring.add(key)
        assert await ring.get(first.id) == first
        assert sorted(await ring.all()) == sorted([first, second])
        assert await ring.revoke(first.id)
        assert not await ring.revoke(first.id)
        assert await ring.get(first.id) is None
        assert await ring.all() == [second]

    run(scenario)


async def opened(world: World) -> Store:
    store = Store(world.embedded.url)
    await store.open()
    world._stack.push_async_callback(store.close)
    return store


DAMAGES: list[dict[str, str | bytes | None]] = [
    *({"scope": "root"}, {"expires_at": "soon"}, {"digest": None}, {"tenant": None}, {"rate": "fast"}),
    *({"tenant": b"\xff"}, {"created_at": ""}),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=repr)
def test_a_key_that_cannot_be_read_lets_nobody_in(run: Run, damage: dict[str, str | bytes | None]) -> None:
    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        text, key = new_key("acme", "admin")
        await ring.add(key)
        assert await KnownKeys(ring).caller(text.encode()) is not None
        for field, value in damage.items():
            name = f"ravine:key:{key.id}"
            await (world.raw.hdel(name, field) if value is None else world.raw.hset(name, field, value))
        assert await KnownKeys(ring).caller(text.encode()) is None
        assert await ring.all() == []

    run(scenario)


def test_something_else_in_the_place_of_a_key_lets_nobody_in(run: Run) -> None:
    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        text, key = new_key("acme", "admin")
        await ring.add(key)
        await world.raw.delete(f"ravine:key:{key.id}")
        await world.raw.lpush(f"ravine:key:{key.id}", "digest")
        assert await KnownKeys(ring).caller(text.encode()) is None
        assert await ring.all() == []

    run(scenario)


# -- who is believed ---------------------------------------------------------------------------------------------------


async def questions(world: World) -> int:
    """How often the store was asked for a key."""
    info = await world.raw.info("commandstats")
    return int(info.get("cmdstat_hgetall", {}).get("calls", 0))


def test_many_who_come_at_once_ask_once_and_again_after_a_second(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        text, key = new_key("acme", "session", rate="9/second")
        await ring.add(key)
        clock = [100.0]
        monkeypatch.setattr(keys, "monotonic", lambda: clock[0])
        known, before = KnownKeys(ring), await questions(world)
        found = await asyncio.gather(*[known.caller(text.encode()) for _ in range(100)])
        assert {access.key for access in found if access} == {key.id}
        assert (found[0].tenant, found[0].scope, found[0].rate) == ("acme", "session", "9/second")  # type: ignore[union-attr]
        clock[0] += keys.BELIEVED - 0.01
        await known.caller(text.encode())
        assert await questions(world) == before + 1
        await ring.revoke(key.id)
        clock[0] += 0.01
        assert await known.caller(text.encode()) is None
        assert await questions(world) == before + 2

    run(scenario)


def test_whoever_goes_away_does_not_take_the_answer_along(run: Run) -> None:
    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        text, key = new_key("acme", "admin")
        await ring.add(key)
        known = KnownKeys(ring)
        first, second = (asyncio.create_task(known.caller(text.encode())) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        access = await second
        assert access is not None
        assert access.key == key.id

    run(scenario)


def test_what_is_remembered_is_bounded_and_wrong_ids_are_not_in_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_CACHED", 4)

    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        made = [new_key("acme", "admin") for _ in range(9)]
        known = KnownKeys(ring)
        for text, key in made:
            await ring.add(key)
            assert await known.caller(text.encode()) is not None
        assert list(known._seen) == [key.id for _, key in made[-4:]]
        for _ in range(20):
            assert await known.caller(new_key("acme", "admin")[0].encode()) is None
        assert list(known._seen) == [key.id for _, key in made[-4:]]
        assert known._asking == {}

    run(scenario)


def test_an_expired_key_is_nobodys_even_from_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        text, key = new_key("acme", "admin", expires_at=int(time.time()) + 60)
        await ring.add(key)
        known = KnownKeys(ring)
        assert await known.caller(text.encode()) is not None
        monkeypatch.setattr(keys, "time", lambda: time.time() + 60)
        assert await known.caller(text.encode()) is None

    run(scenario)


# -- the gate ----------------------------------------------------------------------------------------------------------


def gate(known: KnownKeys, owners: Mapping[str, str] | None = None) -> Gate:
    async def tenant_of(session: str) -> str:
        return (owners or {})[session]

    async def tidy(session: str, tenant: str) -> None:
        raise AssertionError((session, tenant))

    return Gate(known, tenant_of, tidy, keys="required", local=True)


def test_a_piece_of_a_body_believes_a_key_no_longer_than_anything_else(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was believed for most of a second when the body began is not believed for a second more."""

    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        text, key = new_key("acme", "session")
        await ring.add(key)
        clock = [100.0]
        monkeypatch.setattr(keys, "monotonic", lambda: clock[0])
        known = KnownKeys(ring)
        assert await known.caller(text.encode()) is not None
        await ring.revoke(key.id)
        heard = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def plane(_scope: object, receive: Receive, _send: object) -> None:
            for seconds in (0.99, 0.02):
                clock[0] += seconds
                heard.append((await receive())["type"])

        with pytest.raises(Unauthenticated):
            await gate(known).watched(plane, key.id, {}, receive, receive)  # type: ignore[arg-type]
        assert heard == ["http.request", "http.disconnect"]

    run(scenario)


def test_whose_session_it_is_is_remembered_of_ones_own_alone(run: Run) -> None:
    async def scenario(world: World) -> None:
        opener = gate(KnownKeys((await opened(world)).keyring), {"mine": "acme", "theirs": "globex"})
        access = Access("acme", "session", "k")
        for session in ("mine", "theirs", "theirs"):
            scope = {"path": f"/v1/sessions/{session}", "method": "GET"}
            with contextlib.suppress(SessionNotFound):
                await opener.check(access, scope)
        assert opener._tenants == {"mine": "acme"}

    run(scenario)


def test_a_key_that_cannot_be_looked_at_lets_go_of_its_own_alone(run: Run) -> None:
    class Torn(KnownKeys):
        async def valid(self, id_: str, believed: float = keys.BELIEVED) -> bool:
            if id_ == "torn":
                raise ResponseError("NOPERM")
            return await super().valid(id_, believed)

    async def scenario(world: World) -> None:
        ring = (await opened(world)).keyring
        made = [new_key("acme", "session")[1] for _ in range(2)]
        for key in made:
            await ring.add(key)
        opener = gate(Torn(ring))
        with opener.waiting("torn") as torn, opener.waiting(made[0].id) as kept, opener.waiting(made[1].id) as ended:
            await ring.revoke(made[1].id)
            await asyncio.wait_for(asyncio.gather(torn, ended), 20)
            assert not kept.done()
        await opener.stop()

    run(scenario)


# -- addresses and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "here"),
    [
        *[("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False)],
        *[("::", False), ("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False), ("", False)],
    ],
)
def test_addresses_of_this_machine_alone(address: str, here: bool) -> None:
    assert is_loopback(address) == here
    assert listens_locally(address) == here


def test_names_of_this_machine_alone() -> None:
    assert listens_locally("localhost")
    assert not listens_locally("no-such-host.invalid")


HERE = ["localhost", "LocalHost:80", "localhost.:80", "x.localhost:65535", "127.0.0.1", "127.9.8.7:1", "[::1]:80"]
ELSEWHERE = [
    *("evil.example.com", "10.0.0.1", "127.0.0.1.nip.io", "[::]:80", "localhost.example.com", "evil", "", ":80", "."),
    *("[::1].evil.com", "[::1]evil", "127.0.0.1:99@evil.com", "user@localhost", "localhost:", "localhost:1:2"),
    *("localhost:x", "localhost:123456", "evil\xff", "localhost ", "localhost/", "local host", "127.1", "0", "[::1"),
    *("localhost,evil.com", "notlocalhost", "[fe80::1]", "localhost\n"),
]


@pytest.mark.parametrize("host", HERE)
def test_names_that_only_this_machine_has(host: str) -> None:
    assert is_allowed(host.encode(), None)


@pytest.mark.parametrize("host", ELSEWHERE, ids=repr)
def test_names_that_others_may_have(host: str) -> None:
    assert not is_allowed(host.encode("latin-1"), None)


def test_the_machine_knows_its_own_name() -> None:
    assert is_allowed(socket.gethostname().encode(), None)


def test_names_that_were_said_are_the_only_ones() -> None:
    allowed = parse_hosts("Localhost, [::1],ravine.example.com")
    for host in (b"localhost:8000", b"[::1]", b"RAVINE.example.com:80"):
        assert is_allowed(host, allowed), host
    for host in (b"127.0.0.1", b"x.localhost", b"example.com", b"", b"ravine.example.com.evil.com"):
        assert not is_allowed(host, allowed), host
    for text in ("", "a,,b", "localhost:80", "http://localhost", "a b", "*", "é"):
        with pytest.raises(ValueError, match="without ports"):
            parse_hosts(text)
