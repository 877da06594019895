"""One session whose head is damaged: the others are listed all the same, and what is wrong with it is told."""

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli import cli
from service.errors import Corrupt
from service.store import key
from tests.service.losses import SGD
from tests.service.world import Run, World, created

# -> what is put into the head, None: the head is of another kind
DAMAGES: dict[str, dict[str, bytes] | None] = {
    "no number": {"seq": b"x"},
    "a name that is no text": {b"\xff".decode(errors="surrogateescape"): b"", "base": b""},
    "a loss that tells nothing": {"lost": b"[]"},
    "no hash": None,
}


async def harm(world: World, session: str, fields: dict[str, bytes] | None) -> None:
    name = key(session, "head")
    if fields is None:
        await world.raw.delete(name)
        await world.raw.set(name, "no hash")
        return
    for field, value in fields.items():
        await world.raw.hset(name, field.encode(errors="surrogateescape"), value)


async def ravine(world: World, *arguments: str) -> Result:
    command = ["sessions", *arguments, "--redis-url", world.embedded.url]
    return await asyncio.to_thread(CliRunner().invoke, cli, command)


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_head_ends_no_list(run: Run, damage: str) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        first, bad, last = [await created(engine, **SGD, labels={"team": "a"}) for _ in range(3)]
        await harm(world, bad, DAMAGES[damage])
        for label in (None, ("team", "a")):
            listed: list[dict[str, Any]] = []
            more, after = True, None
            while more:
                page, more = await engine.sessions(1, after, label)
                listed += page
                after = page[-1]["id"]
            assert [shown["id"] for shown in listed] == [last, first]

        told = await ravine(world, "list")
        assert (told.exit_code, [line.split()[0] for line in told.stdout.splitlines()]) == (0, [last, bad, first])
        line = told.stdout.splitlines()[1]
        assert line.startswith(f"{bad}  damaged: ")
        why = line.removeprefix(f"{bad}  damaged: ")
        for arguments, count in ((("list", "--json"), 3), (("list", "--json", "--lost"), 1)):
            told = await ravine(world, *arguments)
            shown = [json.loads(line) for line in told.stdout.splitlines()]
            assert (told.exit_code, len(shown)) == (0, count)
            assert {"id": bad, "tenant": "default", "damaged": why} in shown

        looked = await ravine(world, "inspect", bad)
        assert (looked.exit_code, looked.stdout) == (1, "")
        assert looked.stderr == f"ravine: {bad} is damaged: {why}\n"

    run(scenario)


@pytest.mark.parametrize("document", [b"{", b"[]", b"{}"])
def test_a_document_that_cannot_be_read_hides_nobody(run: Run, document: bytes) -> None:
    async def scenario(world: World) -> None:
        engine = await world.replica()
        good, bad = await created(engine, **SGD), await created(engine, **SGD)
        await world.raw.hset(key(bad, "head"), "document", document)
        assert [shown["id"] for shown in (await engine.sessions(10, None, None))[0]] == [good]
        with pytest.raises(Corrupt, match=bad):
            await engine.session(bad)
        looked = await ravine(world, "inspect", bad)
        assert looked.exit_code == 1
        assert looked.stderr.startswith(f"ravine: {bad} is damaged: its document")

    run(scenario)
