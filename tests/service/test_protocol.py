"""A connection that is over is freed at once, and leaves nothing to the garbage collector, which stops the loop."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from service.admission import READY, Admission
from service.bodies import ClientGone, read
from service.protocol import BODY_TURNS, Guarded, guarded

PATIENCE = 20.0  # seconds
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HEAD + b"Content-Length: 2\r\n\r\nok"
LONG = HEAD + b"Content-Length: %d\r\n\r\n" % (3 << 20)


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def taker(scope: Any, receive: Any, send: Any) -> None:
    try:
        await read(scope, dict(scope["headers"]), receive, 8 << 20)
    except ClientGone:
        return
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (it is uvicorn's sets that change)
            await asyncio.sleep(0.001)


async def left_of(sent: bytes, replies: int, admission: Admission) -> int:
    """How many of three connections are there still, after each has sent that, got its replies and was closed."""
    made: list[weakref.ref[Guarded]] = []
    config = uvicorn.Config(taker, ws="none", lifespan="off", log_config=None)
    config.load()
    state = ServerState()

    def protocol() -> Guarded:
        one = guarded(admission)(config=config, server_state=state, app_state={})
        made.append(weakref.ref(one))
        return one

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    for _ in range(3):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        await writer.drain()
        for _ in range(replies):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        await until(lambda: bool(replies or state.connections))
        writer.close()
        await writer.wait_closed()
        await until(lambda: not state.connections and not state.tasks)
    server.close()
    await asyncio.sleep(0)
    return sum(each() is not None for each in made)


@pytest.mark.parametrize(
    ("sent", "replies"),
    [
        (b"", 0),
        (HEAD, 0),
        (WHOLE, 1),
        (WHOLE * 3, 3),
        (LONG + b" " * (3 << 20) + WHOLE, 2),
        (HEAD + b"Content-Length: 5\r\n\r\nok", 0),
        (LONG + b" " * (2 << 20), 0),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 1),
    ],
    ids=["silent", "head", "whole", "pipelined", "long body", "body", "part of a long body", "malformed"],
)
def test_nothing_of_a_connection_is_left(sent: bytes, replies: int) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(left_of(sent, replies, Admission())) == 0


def test_nor_of_one_that_was_refused() -> None:
    admission = Admission()
    admission.requests = admission.limits.requests
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(left_of(WHOLE, 1, admission)) == 0


async def turns_waited() -> tuple[int, int]:
    """How many turns of the loop a step whose body does not come with its head waited, by its own account; and how many
    there were.
    """
    loop, turns, ready = asyncio.get_running_loop(), list[float](), list[float]()

    def turn() -> None:
        turns.append(loop.time())
        time.sleep(0.002)  # or the clock of two turns would be the same
        if not ready:
            loop.call_soon(turn)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ready.append(scope[READY])
        await taker(scope, receive, send)

    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    config.load()
    server = await loop.create_server(
        lambda: guarded(Admission())(config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    turn()
    before = len(turns)
    writer.write(b"POST /v1/sessions/s/steps HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
    await until(lambda: bool(ready))
    waited = sum(at > ready[0] for at in turns)
    writer.write(b"ok")
    await reader.readuntil(b"ok")
    writer.close()
    server.close()
    return waited, len(turns) - before


def test_turns_without_a_body_are_no_sign_of_load() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        waited, turns = runner.run(turns_waited())
    assert turns > BODY_TURNS
    assert waited <= 2
