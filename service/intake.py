"""Long bodies, read straight into the array that they become.

By the usual way each byte of a body is copied five times: into the loop's bytes, into the parser's, into those that
wait, out of them, and into its array; and for each piece the reading is stopped and begun again. So once there is an
array for all of a body whose length is known, an `Intake` takes the place of the connection's protocol at the
transport, and the kernel copies into the array. It asks for no byte beyond the body: what follows is the parser's.

The kernel is asked again as long as it fills all that it is given, up to 32 times in one turn of the loop. A client
that is as fast as that has 8 MB read at once, while all others wait. So after MESSAGE bytes it waits a turn itself.

All else stays as it is. Bytes are counted before there is room for them, and their pace is looked at as they come. Who
reads the body still asks for its messages, which are empty now: that the client has gone or its key is not valid any
more is known as ever, at every MESSAGE bytes or SECONDS. A body that is given up leaves the connection to its protocol
in the middle of it, for the orderly end of a connection whose request was answered before it was whole.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from uvicorn.protocols.http.flow_control import FlowControl

from service.errors import Overloaded

INTAKE: Final = "ravine.intake"  # where in a scope a `Begin` is, if the body is long
AT_ONCE: Final = 256 << 10  # bytes that the kernel is asked for
MESSAGE, SECONDS = 1 << 20, 1.0

# Told how many bytes came, says how many may come next, which are counted then. Raises Overloaded.
Came: TypeAlias = Callable[[int], int]


class Connection(Protocol):
    """In whose place an intake is."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def flow(self) -> FlowControl | None:
        """None: the connection is over."""

    def listen_by(self, protocol: asyncio.BaseProtocol | None) -> None:
        """What comes from now on is for `protocol`; None: for its own again."""

    def body_came(self, *, whole: bool) -> None:
        """There is more of the body than who reads it was told of."""

    def connection_lost(self, exc: Exception | None) -> None: ...

    def eof_received(self) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Intake(asyncio.BufferedProtocol):
    """Reads until `room` is full, or it is ended. `fault` is what `came` raised, after which nothing is read."""

    def __init__(self, connection: Connection, room: memoryview, came: Came) -> None:
        """Raises Overloaded."""
        self._connection = connection
        self._came = came
        self._next = came(0)
        self._room = room
        self._told, self._told_at = 0, connection.loop.time()
        self._size = 0
        self._over = False
        self.fault: Overloaded | None = None
        # uvloop hands these to nobody but the protocol that is set.
        self.connection_lost = connection.connection_lost  # type: ignore[method-assign]
        self.eof_received = connection.eof_received  # type: ignore[method-assign]
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]
        connection.listen_by(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._room[self._size : self._size + min(self._next, AT_ONCE)]

    def buffer_updated(self, nbytes: int) -> None:
        if self._over:
            return
        self._size += nbytes
        try:
            self._next = self._came(nbytes)
        except Overloaded as fault:
            self.fault = fault
        if self.fault is not None or self._size == len(self._room):
            self.end()
            self._connection.body_came(whole=self.fault is None)
        elif self._size - self._told >= MESSAGE or self._connection.loop.time() - self._told_at >= SECONDS:
            self._told, self._told_at = self._size, self._connection.loop.time()
            self._connection.body_came(whole=False)
            self._wait_a_turn()

    def _wait_a_turn(self) -> None:
        if self._connection.flow is not None:
            self._connection.flow.pause_reading()
            self._connection.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._connection.flow is not None:
            self._connection.flow.resume_reading()

    def end(self) -> None:
        """The connection listens itself again."""
        if not self._over:
            self._over = True
            self._room = memoryview(b"")
            self._connection.listen_by(None)


# Has the rest of a body, of which all that came was taken, read into the array given. None: it comes the usual way.
# Raises Overloaded.
Begin: TypeAlias = Callable[[memoryview, Came], Intake | None]
