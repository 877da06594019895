"""A proxy that breaks connections off: in the middle of what is asked, after it was carried out and before it is
answered, in the middle of the answer; or holds what comes by for a while.

It stands before a service (`http://…`) or a store (`unix://…`, `redis://…`), and lets all through until it is armed.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Final, Literal
from urllib.parse import urlsplit

Cut = Literal["request", "reply", "mid-reply", "late"]
# request: what is asked arrives in part. reply: it arrives, and nothing of the answer comes back. mid-reply: half of
# a piece of it does. late: a piece, either way, comes up to LATE seconds after it could have.
CUTS: Final[tuple[Cut, ...]] = ("request", "reply", "mid-reply", "late")
LATE: Final = 0.5
_PIECE = 1 << 16
_START_SECONDS = 5


class Cutter:
    """Listens on a TCP port of its own at `url`, in a thread of its own."""

    def __init__(self, upstream: str, seed: int) -> None:
        self._upstream = urlsplit(upstream)
        self._draw = random.Random(seed)
        self._armed: Cut | None = None
        self.hit = threading.Event()  # what it was armed for has happened
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        assert listening.wait(_START_SECONDS)
        assert self._server is not None
        scheme = "http" if self._upstream.scheme == "http" else "redis"
        self.url: str = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def arm(self, cut: Cut) -> None:
        """The next piece that comes by the right way has it."""
        self.hit.clear()
        self._armed = cut

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)

    def _run(self, listening: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        listening.set()
        self._loop.run_forever()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        ends = (writer, forth)
        for source, sink, asks in ((reader, forth, True), (back, writer, False)):
            task = self._loop.create_task(self._pump(source, sink, ends, asks=asks))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._upstream.scheme == "unix":
            return await asyncio.open_unix_connection(self._upstream.path)
        return await asyncio.open_connection(self._upstream.hostname, self._upstream.port)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        *,
        asks: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(_PIECE):
                cut = self._take(asks=asks)
                if cut == "late":
                    await asyncio.sleep(self._draw.uniform(0.05, LATE))
                elif cut is not None:
                    sink.write(piece[: self._kept(cut, len(piece))])
                    await sink.drain()
                    break
                sink.write(piece)
                await sink.drain()
        for end in ends:
            _reset(end)

    def _take(self, *, asks: bool) -> Cut | None:
        cut = self._armed
        if cut is None or (cut != "late" and (cut == "request") != asks):
            return None
        self._armed = None
        self.hit.set()
        return cut

    def _kept(self, cut: Cut, size: int) -> int:
        return {"request": self._draw.randrange(size), "reply": 0, "mid-reply": size // 2, "late": size}[cut]


def _reset(end: asyncio.StreamWriter) -> None:
    """What lies in its buffer still goes out; then a reset rather than an end, as of a machine that is gone."""
    sock = end.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()


@contextlib.contextmanager
def cutting(upstream: str, seed: int) -> Iterator[Cutter]:
    made = Cutter(upstream, seed)
    try:
        yield made
    finally:
        made.close()
