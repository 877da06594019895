"""Large values in the store: in very many chunks, and in chunks of another size than those of today."""

import pytest

from service import records
from service.engine import Engine
from tests.service.world import Run, World, created, params, step

SIZE = 262_144  # parameters: a mebibyte


@pytest.mark.parametrize("chunk", [4 << 20, 256], ids=["as once", "as many as of 4 GiB"])
def test_what_was_written_in_other_chunks_is_read_cut_and_deleted(
    run: Run, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.replica(), await world.replica()
        with monkeypatch.context() as before:
            before.setattr(records, "CHUNK", chunk)
            session = await created(first, params={"w": [0.0] * SIZE})
            for _ in range(2):
                await step(first, session, size=SIZE)
            doomed = await created(first, params={"w": [0.0] * SIZE})
            await step(first, doomed, size=SIZE)
            kept = await world.keys(session)
            assert len(kept) > 3 * 4 * SIZE / chunk
        assert await params(second, session) == [2.0] * SIZE
        await until_cut(second, session)
        assert len(await world.keys(session)) < 16
        assert len(set(await params(await world.replica(), session))) == 1
        await second.delete(doomed, None)
        assert not await world.keys(doomed)

    run(scenario)


async def until_cut(engine: Engine, session: str) -> None:
    """Steps until a snapshot has taken the place of what was there."""
    while not engine._live[session].head.base:
        await step(engine, session, size=SIZE)
        if (snapshot := engine._live[session].snapshot) is not None:
            await snapshot
