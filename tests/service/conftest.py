"""Scenarios over the engine itself, each on a store of its own."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tests.service.world import World


@pytest.fixture
def run(data: Path) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    def run_(scenario: Callable[[World], Awaitable[None]]) -> None:
        async def scene() -> None:
            async with asyncio.timeout(60), World(data) as world:
                await scenario(world)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(scene())

    return run_
