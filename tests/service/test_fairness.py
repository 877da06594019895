"""A long body that comes as fast as it can be read leaves the others their turns of the loop."""

import asyncio
import socket
import threading
import time
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from service.admission import Admission
from service.bodies import read
from service.intake import AT_ONCE, INTAKE, MESSAGE, Begin, Came, Intake
from service.protocol import guarded

LENGTH = 16 << 20
REQUEST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % LENGTH


async def bytes_by_turn() -> list[int]:
    turns = [0]
    loop = asyncio.get_running_loop()

    def watched(begin: Begin) -> Begin:
        def begun(room: memoryview, came: Came) -> Intake | None:
            def counted(size: int) -> int:
                if not turns[-1]:
                    loop.call_soon(turns.append, 0)  # once all that is to be read in this turn was
                turns[-1] += size
                time.sleep(0.002)  # in which the client sends more than is read at once
                return came(size)

            return begin(room, counted)

        return begun

    async def taker(scope: Any, receive: Any, send: Any) -> None:
        scope[INTAKE] = watched(scope[INTAKE])
        body = await read(scope, dict(scope["headers"]), receive, LENGTH)
        said = b"%d" % len(body)
        headers = [(b"content-length", b"%d" % len(said))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})

    config = uvicorn.Config(taker, ws="none", lifespan="off", log_config=None)
    config.load()
    protocol = guarded(Admission())
    server = await loop.create_server(
        lambda: protocol(config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
    )
    replies: list[bytes] = []
    client = threading.Thread(target=converse, args=(server.sockets[0].getsockname(), replies), daemon=True)
    client.start()
    await asyncio.to_thread(client.join, 30)
    server.close()
    assert replies
    assert replies[0].endswith(b"\r\n\r\n%d" % LENGTH)
    return turns


def converse(address: tuple[str, int], replies: list[bytes]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(REQUEST + bytes(LENGTH))
        said = b""
        while not said.endswith(b"\r\n\r\n%d" % LENGTH):
            said += connection.recv(65536) or b"closed\r\n\r\n%d" % LENGTH
        replies.append(said)


def test_no_client_has_all_that_it_sends_read_in_one_turn() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        turns = runner.run(bytes_by_turn())
    assert max(turns) < MESSAGE + AT_ONCE
    assert sum(turns) > LENGTH - MESSAGE
