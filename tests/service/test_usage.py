"""What tenants have and how often they ask, counted by every store that is promised to work."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from service import schemas
from service.access.quotas import Quotas
from service.access.rates import parse_rate
from service.access.rights import Access
from service.access.usage import Quota, Usage, bytes_in
from service.documents import Document
from service.engine import Engine
from service.errors import QuotaExceeded, SessionNotFound, StoreFull, StoreUnavailable
from service.ids import new_id
from service.store import Store
from tests.service.test_store import STORES, on
from tests.service.world import Run, World, created, step


@pytest.fixture(scope="module", params=sorted(STORES))
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with STORES[request.param](tmp_path_factory.mktemp(request.param) / "data") as address:
        yield address


async def passed(attempts: list[Awaitable[Any]]) -> int:
    """How many of them were let through; the others are refused by their quota, and by nothing else."""
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    wrong = [each for each in outcomes if isinstance(each, BaseException) and not isinstance(each, QuotaExceeded)]
    assert wrong == []
    return sum(not isinstance(outcome, BaseException) for outcome in outcomes)


def test_no_more_enter_than_may(url: str) -> None:
    tenant = new_id()

    async def scenario(store: Store) -> None:
        usage = Usage(store.link.call, Quota(5, 1000))
        ids = [new_id() for _ in range(20)]
        assert await passed([usage.take(tenant, id_, 100) for id_ in ids]) == 5
        inside = set(ids) - await usage.unsettled(tenant, ids)
        assert len(inside) == 5
        for id_ in ids:  # those that were refused take nothing along
            await usage.leave(tenant, id_)
        assert await usage.unsettled(tenant, ids) == set(ids)
        assert not await store.link.call("EXISTS", f"ravine:tenant:{tenant}:usage")
        assert await passed([usage.take(tenant, id_, 300) for id_ in ids]) == 3
        # The last 100 bytes, exactly; two changes of one session need room for both.
        entered = sorted(set(ids) - await usage.unsettled(tenant, ids))
        await usage.reserve(tenant, entered[0], 300, 0, 60)
        with pytest.raises(QuotaExceeded, match="1000"):
            await usage.reserve(tenant, entered[0], 300, 0, 41)
        await usage.reserve(tenant, entered[0], 300, 0, 40)
        with pytest.raises(QuotaExceeded):
            await usage.reserve(tenant, entered[1], 300, 0, 1)
        await usage.leave(tenant, entered[0])
        assert int(await store.link.call("HGET", f"ravine:tenant:{tenant}:usage", "total")) == 600

    on(url, scenario)


def test_a_rate_is_one_for_all_who_count(url: str) -> None:
    access, scope = Access(new_id(), "admin"), {"path": "/v1/sessions"}

    async def scenario(store: Store) -> None:
        await store.ping()
        replicas = [Quotas(store.link.call, "30/day") for _ in range(2)]
        assert await passed([quotas.enter(access, scope) for quotas in replicas * 25]) == 30
        with pytest.raises(QuotaExceeded) as refusal:
            await replicas[0].enter(access, scope)
        assert refusal.value.standing[:3] == ("tenant", 30, 0)
        assert 0 < refusal.value.standing.seconds <= 86400

    on(url, scenario)


def test_a_window_slides(url: str) -> None:
    """The time is moved by hand: 3500 s before the end of the next window of two hours, 10 requests count as 4.86."""
    access, scope = Access(new_id(), "admin"), {"path": "/v1/sessions"}
    name = f"ravine:limits:{{{parse_rate('10/2 hours').key_for('tenant', access.tenant)}}}"

    async def scenario(store: Store) -> None:
        await store.ping()
        quotas = Quotas(store.link.call, "10/2 hours")

        async def fill(expected: int) -> int:
            """Asks until it is refused; the seconds after which there is room."""
            assert await passed([quotas.enter(access, scope) for _ in range(12)]) == expected
            with pytest.raises(QuotaExceeded) as refusal:
                await quotas.enter(access, scope)
            return refusal.value.standing.seconds

        assert 7100 < await fill(10) <= 7200
        await store.link.call("PEXPIRE", name, 3500 * 1000)
        assert 600 < await fill(10 - 4) <= 620  # as 3 they count from 2880 s before the end on
        await store.link.call("PEXPIRE", f"{name}/-1", 1800 * 1000)
        assert 340 < await fill(10 - 6 - 2) <= 360  # as 1 from 1440 s on
        await store.link.call("PEXPIRE", f"{name}/-1", 1)
        await store.link.call("PEXPIRE", name, (7200 + 3500) * 1000)
        await asyncio.sleep(0.01)
        assert 3400 < await fill(2) <= 3500

    on(url, scenario)


# -- with sessions -----------------------------------------------------------------------------------------------------


def with_mean(*, kept: bool) -> Callable[[Document], Document]:
    """A change of the recipe: the transform `ema` keeps as much as the parameters take."""
    return schemas.patch({"transforms": [{"kind": "ema", "decay": 0.5}] if kept else []})


async def usage_of(world: World) -> tuple[dict[str, int], int]:
    found = {name.decode(): value.decode() for name, value in (await world.raw.hgetall("ravine:usage")).items()}
    total = int(found.pop("total", 0))
    return {name: int(value.split(" ")[0]) for name, value in found.items()}, total


async def until(world: World, expected: tuple[dict[str, int], int]) -> None:
    for _ in range(2000):
        if await usage_of(world) == expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it is {await usage_of(world)}")


async def settled(world: World, engine: Engine) -> None:
    """What is counted is what there is."""
    listed, more = await engine.sessions(100, None, None)
    assert not more
    sizes = {}
    for each in listed:
        head = await engine._store.head(each["id"])
        assert head is not None
        sizes[each["id"]] = bytes_in(head)
    assert await usage_of(world) == (sizes, sum(sizes.values()))


def test_two_replicas_never_pass_the_quota_together(run: Run) -> None:
    most = 40 * 4 * 8
    quota = Quota(12, most)

    async def busy(engine: Engine, ids: list[str], seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            try:
                match chance.choice(("make", "make", "change", "change", "change", "fork", "delete")):
                    case "make":
                        ids.append(await created(engine, shapes={"w": [chance.choice((8, 16, 40))]}))
                    case "fork" if ids:
                        ids.append((await engine.fork(chance.choice(ids)))[0]["id"])
                    case "change" if ids:
                        await engine.patch(chance.choice(ids), with_mean(kept=chance.random() < 0.6), None)
                    case "delete" if ids:
                        await engine.delete(ids.pop(chance.randrange(len(ids))), None)
            except (QuotaExceeded, SessionNotFound) as refusal:
                refused.append(type(refusal))

    refused: list[type[Exception]] = []

    async def scenario(world: World) -> None:
        engines = [await world.replica(quota=quota) for _ in range(2)]
        ids: list[str] = []
        at_work = asyncio.gather(*[busy(engine, ids, seed) for seed, engine in enumerate(engines * 3)])
        while not at_work.done():
            sizes, total = await usage_of(world)
            assert total <= most
            assert len(sizes) <= 12
            heads = [await engines[0]._store.head(id_) for id_ in list(ids)]
            assert len(heads) <= 40
            await asyncio.sleep(0)
        await at_work
        assert QuotaExceeded in refused
        await settled(world, engines[0])

    run(scenario)


@pytest.mark.parametrize("listed", [False, True], ids=["loaded", "listed"])
def test_what_was_broken_off_is_given_back_when_the_session_is_met(run: Run, *, listed: bool) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(10, 1000))
        session = await created(engine, shapes={"w": [8]})
        taken, _ = await usage_of(world)
        # A replica took room for a change, long ago, and ended before it was made; others went on.
        await world.raw.hset("ravine:usage", session, f"{taken[session]} 0 c0ffee:900:1600000000")
        await world.raw.hincrby("ravine:usage", "total", 900)
        with pytest.raises(QuotaExceeded):
            await created(engine, shapes={"w": [80]})
        await step(engine, session, size=8)
        if listed:
            await engine.sessions(1, None, None)
        else:
            await step(await world.replica(quota=Quota(10, 1000)), session, size=8)
        await until(world, (taken, taken[session]))
        await created(engine, shapes={"w": [80]})

    run(scenario)


def test_a_change_to_less_that_was_broken_off_is_counted_when_the_session_is_met(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(10, 1000))
        session = await created(engine, shapes={"w": [8]})
        small, _ = await usage_of(world)
        await engine.patch(session, with_mean(kept=True), None)
        assert await usage_of(world) != (small, small[session])

        async def broken_off(*_: object, **__: object) -> bool:
            raise StoreUnavailable("away")

        with monkeypatch.context() as patched:
            patched.setattr(engine._tenants._usage, "settle", broken_off)
            await engine.patch(session, with_mean(kept=False), None)
        assert await usage_of(world) != (small, small[session])
        await engine.sessions(1, None, None)
        assert await usage_of(world) == (small, small[session])

    run(scenario)


def test_a_session_of_an_older_release_is_counted_when_it_is_loaded(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(1))
        session = await created(engine, shapes={"w": [3]})
        before = await usage_of(world)
        await world.raw.delete("ravine:usage")
        other = await world.replica(quota=Quota(1))
        await step(other, session)
        await until(world, before)
        with pytest.raises(QuotaExceeded):
            await created(other, shapes={"w": [3]})

    run(scenario)


def test_a_session_that_a_full_store_did_not_take_is_not_counted(run: Run) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica(quota=Quota(10))
        session = await created(engine, shapes={"w": [3]})
        before = await usage_of(world)
        async with world.full():
            with pytest.raises(StoreFull):
                await created(engine, shapes={"w": [3]})
        assert await usage_of(world) == before
        assert await world.raw.zrange("ravine:sessions", 0, -1) == [session.encode()]

    run(scenario)
