"""The least that an ASGI application can do with a body: take it, and send it back.

In the pieces in which it came: with 40 MB that is 1.4 times as fast as joining them first, with 4 MB it makes no
difference. Not before all have come, since the client only begins to read then.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from benchmarks.servers.serving import run

Message = MutableMapping[str, Any]


async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[..., Awaitable[None]]) -> None:
    if scope["type"] != "http":
        return
    pieces = []
    more = True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"text/plain")
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % sum(map(len, pieces)))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces[:-1]:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": pieces[-1]})


if __name__ == "__main__":
    run(app)
