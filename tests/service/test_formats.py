"""What a newer release wrote is refused in so many words, whatever is asked for, and is left as it was."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import redis
import xxhash

from service.engine import Engine
from service.errors import UnknownFormat
from service.records import element_of
from service.store import Store, key
from service.wire import safetensors
from tests.http.refusals import refused
from tests.running import Server
from tests.service.test_store import entry
from tests.service.world import Run, World, created, params, step
from tests.wire import create

STEP = {"gradients": {"w": [1.0]}}


@pytest.fixture
def raw(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.store_url()) as client:
        yield client


@pytest.fixture
def session(client: httpx.Client, raw: redis.Redis) -> str:
    """One that lives in the service, and was taken on by another release."""
    id_ = str(create(client, optimizer="sgd", params={"w": [1.0]})["id"])
    assert client.post(f"/v1/sessions/{id_}/steps", json=STEP).status_code == 200
    raw.hset(key(id_, "head"), mapping={"format": "2", "commit": "0123456789abcdef"})
    raw.hdel(key(id_, "head"), "snap", "base")
    return id_


CALLS: dict[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "object": lambda client, path: client.get(path),
    "step": lambda client, path: client.post(f"{path}/steps", json=STEP),
    "params": lambda client, path: client.get(f"{path}/params"),
    "long poll": lambda client, path: client.get(f"{path}/params", params={"after": 9, "wait": 5}),
    "put params": lambda client, path: client.put(f"{path}/params", json={"params": {"w": [1.0]}}),
    "state": lambda client, path: client.get(f"{path}/state"),
    "history": lambda client, path: client.get(f"{path}/history"),
    "schedule": lambda client, path: client.get(f"{path}/schedule", params={"steps": 3}),
    "events": lambda client, path: client.get(f"{path}/events"),
    "patch": lambda client, path: client.patch(path, json={"name": "x"}),
    "fork": lambda client, path: client.post(f"{path}/fork"),
    "workers": lambda client, path: client.get(f"{path}/workers"),
    "delete": lambda client, path: client.delete(path),
}


def values(raw: redis.Redis, session: str) -> dict[bytes, bytes]:
    return {name: raw.dump(name) for name in sorted(raw.scan_iter(match=f"*{session}*", count=1000))}  # type: ignore[misc]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_refused_and_changes_nothing(
    client: httpx.Client, raw: redis.Redis, session: str, call: str
) -> None:
    before = values(raw, session)
    document = refused(CALLS[call](client, f"/v1/sessions/{session}"), 501, "unknown-format")
    assert (document["format"], document["supported"]) == ("2", ["1"])
    assert values(raw, session) == before


def test_the_list_goes_on_without_it(client: httpx.Client, raw: redis.Redis, session: str) -> None:
    other = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    listed = [shown["id"] for shown in client.get("/v1/sessions").json()["data"]]
    assert other in listed
    assert session not in listed
    assert raw.zscore("ravine:sessions", session) is not None


def test_a_snapshot_of_another_format(run: Run) -> None:
    async def scenario(world: World) -> None:
        session = await created(await world.replica(), params={"w": [0.0] * 3})
        head = await world.raw.hgetall(key(session, "head"))
        name = key(session, "s", head[b"snap"].decode(), 0)
        tensors, text = safetensors.read(await world.raw.get(name))
        file = b"".join(bytes(piece) for piece in safetensors.write(tensors, text | {"ravine": "9"}))
        await replaced(world, session, name, file)
        engine = await world.replica()
        for call in (params, step):
            with pytest.raises(UnknownFormat) as unknown:
                await call(engine, session)
            assert (unknown.value.format, unknown.value.supported) == ("9", ["1"])
        assert await world.raw.get(name) == file

    run(scenario)


async def replaced(world: World, session: str, name: str, file: bytes) -> None:
    checked: dict[str, Any] = {"length": len(file), "checksum": xxhash.xxh3_64_hexdigest(file)}
    await world.raw.set(name, file)
    await world.raw.hset(key(session, "head"), mapping=checked)


@pytest.mark.parametrize(
    ("text", "format_"), [({"kind": "merge"}, "kind merge"), ({"format": "2"}, "2")], ids=["kind", "format"]
)
def test_an_entry_of_another_format(run: Run, text: dict[str, str], format_: str) -> None:
    """For a service that has the session in memory, and for one that reads it."""

    async def scenario(world: World) -> None:
        hot = await world.replica()
        session = await created(hot, params={"w": [0.0] * 3})
        told = await step(hot, session)
        store = Store(world.embedded.url)
        await store.open()
        item = entry(told.stamp.commit, 2)
        item.metadata |= text
        assert element_of(item)
        assert await store.append(session, told.stamp.commit, [item]) == "OK"
        before = {name: await world.raw.dump(name) for name in await world.keys(session)}
        calls: list[Callable[[Engine, str], Awaitable[object]]] = [params, step, step]
        for engine in (hot, await world.replica()):
            for call in calls:
                with pytest.raises(UnknownFormat) as unknown:
                    await call(engine, session)
                assert unknown.value.format == format_
        await asyncio.sleep(0.1)
        assert {name: await world.raw.dump(name) for name in await world.keys(session)} == before
        await store.close()

    run(scenario)


def test_a_checkpoint_of_another_format(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    tensors, text = safetensors.read(client.get(f"/v1/sessions/{session}/state").content)
    file = b"".join(bytes(piece) for piece in safetensors.write(tensors, text | {"ravine": "2"}))
    headers = {"Content-Type": "application/vnd.safetensors"}
    refused(client.post("/v1/sessions", content=file, headers=headers), 422, "invalid-checkpoint")
