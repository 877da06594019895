"""A file of parameters from the same uvicorn: out of memory by plain ASGI, and by Starlette's StaticFiles. F1.

    python -m benchmarks.servers.static memory|files FILE

`memory` answers every GET with the bytes of the file, which it read once: the least that can be done. `files` serves
the file's directory as one would in an application.
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.staticfiles import StaticFiles

from benchmarks.servers.serving import run

Message = MutableMapping[str, Any]


class Memory:
    def __init__(self, content: bytes) -> None:
        self._content = content
        length = b"%d" % len(content)
        self._headers = [(b"content-type", b"application/vnd.safetensors"), (b"content-length", length)]

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[..., Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._content})


if __name__ == "__main__":
    file = Path(sys.argv[2])
    run(Memory(file.read_bytes()) if sys.argv[1] == "memory" else StaticFiles(directory=file.parent))
