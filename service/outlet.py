"""The way out of a connection: what is written to it, how long that may stand still, and how it ends.

uvicorn writes and closes by a transport. In its place it is given one of these:

- What was written goes out whole, however slowly, as long as it goes on. What counts as going on is that bytes leave
  the machine: beside the buffer of the loop, the kernel's queue is looked at. The kernel tells of room in that one only
  once a third of it is free, which a steady reader at 30 kB/s takes longer for than anybody may stand still.
- Bytes that nobody wants any more are read for LINGER seconds before the connection is closed: closed at once, the
  kernel would answer them with a reset, which makes the client lose the reply that it has not read yet.
- TLS hides all that. uvloop encrypts whatever is written at once, and hands it on to where neither its size nor its
  progress can be seen; and once it is closed, it gives what is left a fixed time, whatever the progress. So here large
  writes go in pieces, one when the one before has left; and a connection is closed when all of it has arrived.
"""

import asyncio
import fcntl
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

from uvicorn.protocols.http.flow_control import FlowControl

from service.admission import Admission

LINGER: Final = 5.0  # seconds
# So many connections that were turned away are closed in that orderly way at a time; the others at once.
LINGERING: Final = 128
LOOKS: Final = 4  # into a buffer that is to drain, in the time in which it may stand still

PIECE: Final = 128 << 10  # bytes that are given to TLS at a time
# Seconds until it is looked whether all has arrived, the first time and then at most.
SOON, LATER = 0.02, 0.5
GOODBYE: Final = 0.5  # seconds for the client to answer that TLS ends


class Connection(Protocol):
    """Whose outlet it is. `flow` is None where nothing is let in."""

    loop: asyncio.AbstractEventLoop
    flow: FlowControl

    @property
    def limited(self) -> Admission: ...

    @property
    def in_a_message(self) -> bool: ...


class Outlet:
    """What both have in common; `counted` is whether the connection was let in."""

    __slots__ = (
        "_connection",
        "_left",
        "_looks",
        "_moved",
        "_over",
        "_timer",
        "_transport",
        "counted",
        "deaf",
        "ending",
        "get_extra_info",
    )

    _lingering: ClassVar[int] = 0

    def __init__(self, connection: Connection, transport: asyncio.Transport, *, counted: bool = True) -> None:
        self._connection = connection
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None  # of an end
        self._looks: asyncio.TimerHandle | None = None  # into the buffer
        self._left = -1
        self._moved = 0.0
        self._over = False
        self.counted = counted
        self.deaf = False  # what comes is thrown away
        self.ending = False
        self.get_extra_info = transport.get_extra_info

    def close(self) -> None:
        """What was written still goes out. What the client still sends is let run out first, but not for ever."""
        if self.ending or not self._connection.in_a_message:
            self.close_now()
        else:
            self.end()

    def end(self) -> None:
        """Nothing more is said, and what comes is thrown away until the client is silent too."""
        self.deaf = True
        if self.ending or self._over or self._transport.is_closing():
            return
        if not self.counted and Outlet._lingering >= LINGERING:
            self._drop()
            return
        self.ending = True
        Outlet._lingering += not self.counted
        self._begin_to_end()
        if self.counted:
            self._connection.flow.resume_reading()

    def close_now(self) -> None:
        """Without waiting for anything that the client may still send."""
        raise NotImplementedError

    def _begin_to_end(self) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        """The end of one that was turned away, where there are too many of them for an orderly one."""
        raise NotImplementedError

    def lost(self) -> None:
        self._over = True
        if self.ending:
            Outlet._lingering -= not self.counted
        for timer in (self._timer, self._looks):
            if timer is not None:
                timer.cancel()

    # Whether it goes on

    def filled(self) -> None:
        """The transport has as much as it takes for now."""
        self.watch()

    def drained(self) -> bool:
        """It takes more again. Returns whether all that was written is on its way."""
        return True

    def watch(self) -> None:
        """There is something to go out; from now on it has to become less."""
        self._left = -1
        if self._looks is None:
            self._moved = self._connection.loop.time()
            self._looks = self._connection.loop.call_later(self._pause, self._look)

    @property
    def _pause(self) -> float:
        return self._connection.limited.limits.stall_seconds / LOOKS

    def _look(self) -> None:
        self._looks = None
        if not self._waits():
            return
        left, now = self._to_go(), self._connection.loop.time()
        if left != self._left:  # nothing is added to a buffer that is full
            self._left, self._moved = left, now
        if now - self._moved >= self._pause * (LOOKS - 1):
            self._connection.limited.cut["stalled reply"] += 1
            self._transport.abort()
            return
        self._looks = self._connection.loop.call_later(self._pause, self._look)

    def _waits(self) -> bool:
        """Whether anybody waits for what was written to go out."""
        raise NotImplementedError

    def _to_go(self) -> int:
        """Bytes that the client's machine has not acknowledged, as far as they can be seen."""
        return self._transport.get_write_buffer_size() + queued(self._transport)


class PlainOutlet(Outlet):
    """Straight to the transport."""

    __slots__ = ("is_closing", "write")

    def __init__(self, connection: Connection, transport: asyncio.Transport, *, counted: bool = True) -> None:
        super().__init__(connection, transport, counted=counted)
        self.write: Callable[[Any], None] = transport.write
        self.is_closing: Callable[[], bool] = transport.is_closing

    def close_now(self) -> None:
        if self._over:
            return
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self.watch()

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not been given yet."""
        return self._transport.get_write_buffer_size()

    def listen_by(self, protocol: asyncio.BaseProtocol) -> None:
        """What comes from now on is for `protocol`."""
        if not self._over:
            self._transport.set_protocol(protocol)

    def let_go(self) -> None:
        """The connection is another process's now: it goes on, though not here. Nothing may be unsent."""
        self.deaf = True
        self._transport.close()  # of this descriptor alone; the client is told nothing

    def _begin_to_end(self) -> None:
        self._transport.write_eof()
        self._timer = self._connection.loop.call_later(LINGER, self.close_now)

    def _drop(self) -> None:
        self.close_now()

    def _waits(self) -> bool:
        if not self._transport.get_write_buffer_size():
            return False
        flow = self._connection.flow
        return self._transport.is_closing() or flow is None or flow.write_paused


class TlsOutlet(Outlet):
    """By pieces of PIECE bytes, and closed when they have arrived."""

    __slots__ = ("_closing", "_full", "_queue", "_queued")

    def __init__(self, connection: Connection, transport: asyncio.Transport, *, counted: bool = True) -> None:
        super().__init__(connection, transport, counted=counted)
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._full = False
        self._closing = False
        transport.set_write_buffer_limits(high=PIECE)

    def write(self, data: bytes | memoryview) -> None:
        if self._queue or len(data) > PIECE:
            self._queue.append(memoryview(data))
            self._queued += len(data)
            self._feed()
        else:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def _feed(self) -> None:
        while self._queue and not self._full:
            view = self._queue.popleft()
            if len(view) > PIECE:
                self._queue.appendleft(view[PIECE:])
                view = view[:PIECE]
            self._queued -= len(view)
            self._transport.write(view)

    def filled(self) -> None:
        self._full = True
        self.watch()

    def drained(self) -> bool:
        self._full = False
        self._feed()
        return not self._full

    def lost(self) -> None:
        super().lost()
        self._queue.clear()
        self._queued = 0

    def close_now(self) -> None:
        if self._over or self._closing:
            return
        self._closing = self.deaf = True
        self.watch()
        # Not yet: the loop writes at the end of its turn, so that the kernel's queue is still empty.
        self._timer = self._connection.loop.call_later(SOON, self._close_if_sent, SOON, False)

    def _close_if_sent(self, pause: float, empty_before: bool) -> None:
        empty = not self._to_go()
        if empty and empty_before:  # twice, with a turn in between for what only waits to be given to the kernel
            self._transport.close()  # which tells the client, and would wait long for its answer
            self._timer = self._connection.loop.call_later(GOODBYE, self._transport.abort)
            return
        pause = SOON if empty else min(2 * pause, LATER)
        self._timer = self._connection.loop.call_later(pause, self._close_if_sent, pause, empty)

    def _begin_to_end(self) -> None:
        self.close_now()  # TLS cannot say that it has said all and still listen

    def _drop(self) -> None:
        self._transport.abort()

    def _waits(self) -> bool:
        return self._closing or self._full

    def _to_go(self) -> int:
        return self._queued + super()._to_go()


def outlet_of(connection: Connection, transport: asyncio.Transport, *, counted: bool = True) -> PlainOutlet | TlsOutlet:
    """The one that is right for what the transport can do."""
    kind = PlainOutlet if transport.can_write_eof() else TlsOutlet
    return kind(connection, transport, counted=counted)


def queued(transport: asyncio.Transport) -> int:
    """Bytes that the kernel has and the client's has not acknowledged (SIOCOUTQ, tcp(7)); 0 where it does not say."""
    socket = transport.get_extra_info("socket")
    if socket is None:  # under TLS it is lost a turn before anybody is told
        return 0
    try:
        found = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    count: int = struct.unpack("i", found)[0]
    return count
