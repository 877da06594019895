"""Clients that hold connections and ask for nothing: what the rows H1 has beside those that step.

    python -m benchmarks.others URL PATH IDLE SLOW

IDLE connections have asked for something once, and are silent since. Of SLOW connections half send the head of a
request at a byte a second, half the body of one to PATH. A connection that the server closes is made anew, so that
there are always as many. Says "held" when they are there, goes on until it is told to stop (SIGTERM), and says then how
many it had, and how many it made anew.
"""

import asyncio
import contextlib
import random
import resource
import signal
import socket
import struct
import sys
from urllib.parse import urlsplit

import uvloop

BYTE_SECONDS = 1.0
AT_ONCE = 200  # connections that are being made
HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 10_000
_RESET = struct.pack("ii", 1, 0)


class Others:
    def __init__(self, url: str, path: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        lines = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        self._body = f"POST {path} HTTP/1.1\r\n{lines}".encode()
        self._making = asyncio.Semaphore(AT_ONCE)
        self.held = 0
        self.made = 0
        self.there = asyncio.Event()
        self._wanted = 0

    def all(self, idle: int, slow: int) -> "list[asyncio.Task[None]]":
        """Begins with all of them; `there` is set once they are held."""
        kinds = [self.idle] * idle + [self.slow_head] * (slow // 2) + [self.slow_body] * (slow - slow // 2)
        self._wanted = len(kinds)
        return [asyncio.create_task(kind()) for kind in kinds]

    async def idle(self) -> None:
        await self._hold(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", b"")

    async def slow_head(self) -> None:
        await self._hold(HEAD[:20], HEAD[20:])

    async def slow_body(self) -> None:
        await self._hold(self._body, b" " * 10_000)

    async def _hold(self, first: bytes, slowly: bytes) -> None:
        while True:
            with contextlib.suppress(OSError):
                async with self._making:
                    reader, writer = await asyncio.open_connection(self._host, self._port)
                await self._stay(reader, writer, first, slowly)
            await asyncio.sleep(random.random())

    async def _stay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes, slowly: bytes
    ) -> None:
        """Until the server closes the connection."""
        # Closed with a reset: thousands of ports would otherwise be kept for a minute.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.held += 1
        self.made += 1
        if self.held == self._wanted:
            self.there.set()
        dripping = asyncio.create_task(_drip(writer, slowly)) if slowly else None
        try:
            writer.write(first)
            while await reader.read(65536):
                pass
        finally:
            self.held -= 1
            if dripping is not None:
                dripping.cancel()
            writer.transport.abort()


async def _drip(writer: asyncio.StreamWriter, slowly: bytes) -> None:
    await asyncio.sleep(random.random() * BYTE_SECONDS)
    for byte in slowly:
        writer.write(bytes((byte,)))
        await asyncio.sleep(BYTE_SECONDS)


async def main(url: str, path: str, idle: int, slow: int) -> None:
    others, stop = Others(url, path), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    tasks = others.all(idle, slow)
    await others.there.wait()
    print("held", flush=True)
    await stop.wait()
    print(f"figures held={others.held} made={others.made}", flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
