"""Large values straight from the socket into the arrays that they are for.

redis-py reads 64 KiB at a time into a buffer, hiredis gathers them in one of its own and makes a bytes object of each
reply, and all that is left of it is one more copy: 360 MB took 0.65 s of the event loop. Here the kernel writes where
the bytes are to stay: 0.13 s. redis-py makes the connection (URL, TLS, authentication), and is done with it then.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio.connection import Connection

from core.layout import Array
from service.errors import StoreUnavailable
from service.records import CutMeanwhile

# So many chunks are on their way at once. What has been asked for lies in the store a second time until it is read.
AHEAD = 8
# What comes between two chunks: the end of one and the length of the next, of up to 99 MB. What is read beyond that is
# the chunk's first bytes, which are copied.
BETWEEN = 14
# Seconds without a byte after which the store counts as away.
SILENCE = 20.0


class Refused(Exception):
    """The store answers with something else than the value: whoever asks in the usual way is told what it is."""


class Room:
    """Buffers that are filled one after the other, `left` bytes yet."""

    def __init__(self, buffers: Sequence[Array]) -> None:
        self._buffers = [buffer.data.cast("B") for buffer in reversed(buffers) if buffer.nbytes]
        self.left = sum(map(len, self._buffers))

    def next(self, most: int) -> memoryview:
        """Where the next bytes belong, at most so many."""
        return self._buffers[-1][:most]

    def filled(self, count: int) -> None:
        self.left -= count
        rest = self._buffers.pop()[count:]
        if len(rest):
            self._buffers.append(rest)

    def write(self, data: bytes | memoryview) -> None:
        """Raises Refused where it is more than there is room for."""
        if len(data) > self.left:
            raise Refused("there is more than was said")
        at = 0
        while at < len(data):
            place = self.next(len(data) - at)
            place[:] = data[at : at + len(place)]
            at += len(place)
            self.filled(len(place))


class _Replies(asyncio.BufferedProtocol):
    """Takes the replies to GET, one for each of `names`."""

    def __init__(self, transport: asyncio.WriteTransport, names: Sequence[str], room: Room) -> None:
        self._transport = transport
        self._names = names
        self._room = room
        self._asked = self._whole = 0
        self._inside = False  # between the length of a value and its end
        self._left = 0  # bytes of the value that are still to come
        self._small = memoryview(bytearray(BETWEEN))
        self._between = b""
        self.heard = True
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask(AHEAD)

    def _ask(self, count: int) -> None:
        names = [name.encode() for name in self._names[self._asked : self._asked + count]]
        self._asked += len(names)
        if names:
            self._transport.write(b"".join([b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names]))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - there is as much room as there is
        return self._room.next(self._left) if self._left else self._small

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        if self.done.done():
            return
        if self._left:
            self._left -= nbytes
            self._room.filled(nbytes)
            return
        self._between += self._small[:nbytes]
        try:
            while not self._left and self._line():
                pass
        except (Refused, CutMeanwhile) as refusal:
            self.done.set_exception(refusal)

    def _line(self) -> bool:
        """Takes a line of what is between the values: of a length, or the empty one that ends a value."""
        line, end, rest = self._between.partition(b"\r\n")
        if not end or self.done.done():
            return False
        self._between = rest
        if self._inside and not line:
            self._inside = False
            self._whole += 1
            self._ask(1)
            if self._whole == len(self._names):
                self.done.set_result(None)
        elif line == b"$-1":
            raise CutMeanwhile(self._names[self._whole])
        elif self._inside or line[:1] != b"$":
            raise Refused(line.decode(errors="replace"))
        else:
            self._inside = True
            self._begin(int(line[1:]))
        return True

    def _begin(self, length: int) -> None:
        """A value, the beginning of which may have come with its length."""
        if length > self._room.left:
            raise Refused("there is more than was said")
        come, self._between = self._between[:length], self._between[length:]
        self._room.write(come)
        self._left = length - len(come)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(str(exc or "the connection was closed")))


async def receive(connection: Connection, names: Sequence[str], room: Room) -> None:
    """The values of `names`, of a connection that is open and was not used yet, into `room`; then it is closed.

    Raises CutMeanwhile for one that is not there, Refused, StoreUnavailable.
    """
    # It is not public, and there is no other way to the socket of a connection.
    writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
    if writer is None:  # a redis-py that keeps it elsewhere
        await connection.disconnect(nowait=True)
        raise Refused("there is no way to the socket")
    transport: Any = writer.transport
    if transport.is_closing():  # nobody would be told of it a second time
        await connection.disconnect(nowait=True)
        raise StoreUnavailable("the store does not answer: the connection was closed")
    streams = transport.get_protocol()
    replies = _Replies(transport, names, room)
    transport.set_protocol(replies)
    try:
        while not replies.done.done():
            replies.heard = False
            await asyncio.wait([replies.done], timeout=SILENCE)
            if not replies.heard and not replies.done.done():
                raise StoreUnavailable(f"the store does not answer: not a byte in {SILENCE:.0f} s")
        replies.done.result()
    except OSError as error:
        raise StoreUnavailable(f"the store does not answer: {error}") from None
    finally:
        replies.done.cancel()
        transport.set_protocol(streams)
        await connection.disconnect(nowait=True)
