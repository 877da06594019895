"""When a snapshot is written: by how much the log weighs, and by how long it is."""

from typing import Any

import pytest

from service import snapshots
from service.engine import Engine
from service.errors import StoreFull
from service.records import Head
from service.store import Store
from tests.service.world import Run, World, created, step

LARGE = 50_000  # parameters


@pytest.mark.parametrize(("spare", "steps"), [(1 << 30, 3), (2 * LARGE, 2)])
def test_a_log_weighs_three_times_the_state_or_so_much_more_than_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, spare: int, steps: int
) -> None:
    monkeypatch.setattr(snapshots, "SPARE", spare)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * LARGE})
        bases = []
        for _ in range(4):
            await stepped(engine, session, size=LARGE)
            bases.append(engine._live[session].head.base)
        # What a gradient has beside its numbers is more than the state has: the last of these is one too many.
        assert bases[: steps + 1] == [0] * (steps - 1) + [steps] * 2

    run(scenario)


def test_a_log_of_small_entries_is_cut_as_well(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "ENTRIES", 5)

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})
        for _ in range(11):
            await stepped(engine, session)
        assert engine._live[session].head.base == 10
        assert await world.raw.llen(f"ravine:{{{session}}}:log") == 1

    run(scenario)


def test_one_that_there_is_no_room_for_is_not_tried_again_at_every_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "ENTRIES", 5)
    tried = []

    async def scenario(world: World) -> None:
        engine = await world.replica()
        session = await created(engine, params={"w": [0.0] * 3})

        async def full(_: Store, __: str, old: Head, *___: Any) -> None:
            tried.append(old.step)
            raise StoreFull("no room")

        monkeypatch.setattr(Store, "snapshot", full)
        for _ in range(14):
            await stepped(engine, session)
        assert tried == [5, 10]

    run(scenario)


async def stepped(engine: Engine, session: str, **members: Any) -> None:
    """Once a snapshot that is written beside the step is there, too."""
    await step(engine, session, **members)
    if (snapshot := engine._live[session].snapshot) is not None:
        await snapshot
