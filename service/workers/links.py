"""Connections that pass from one process to another: SCM_RIGHTS over unix sockets of whole packets (unix(7)).

A packet is a connection's descriptor and the bytes that were read of it. It goes whole or not at all, and nobody waits:
where there is no room for it, or nobody to take it, the sender keeps what it has. What was sent is the kernel's until
it is taken, and a connection in it outlives the sender; if the one that it was sent to dies, it is closed with it.

The taker ends in order: it shuts its sockets for reading, after which nothing more can be sent, and then takes
everything that was sent before. A connection that was handed over is therefore either taken, or still the sender's.
"""

import array
import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Final

# uvloop reads up to 250 KiB at a time; a packet must be smaller than what may be under way in a socket.
LARGEST: Final = 320 << 10
ROOM: Final = 1 << 20  # asked for; the kernel gives what net.core.wmem_max allows
PAUSE: Final = 0.05  # seconds after which one who was away is tried again
BACKLOG: Final = 128
_DESCRIPTOR: Final = array.array("i").itemsize


class Link:
    """The way to one other worker. It need not be there, and is looked for when there is something to send."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._not_before = 0.0

    def send(self, descriptor: int, data: bytes) -> bool:
        """Whether the other one has it. If so, the caller's own descriptor is of no use to it any more."""
        link = self._socket or self._connected()
        if link is None:
            return False
        try:
            socket.send_fds(link, [data], [descriptor])
        except (BlockingIOError, InterruptedError):
            return False  # it has enough to do
        except OSError as error:
            if not isinstance(error, ConnectionError):
                return False  # too long a packet, or too many descriptors under way
            self.close()
            return False
        return True

    def _connected(self) -> socket.socket | None:
        now = time.monotonic()
        if now < self._not_before:
            return None
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            link.setblocking(False)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
            link.connect(self._path)
        except OSError:
            link.close()
            self._not_before = now + PAUSE
            return None
        self._socket = link
        return link

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Landing:
    """Where connections arrive. `take` is called of each: the connection, and what was read of it."""

    def __init__(self, path: str, take: Callable[[socket.socket, bytes], None]) -> None:
        self._path = path
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(LARGEST))
        self._links: set[socket.socket] = set()
        with contextlib.suppress(FileNotFoundError):  # of one that was killed
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(path)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:  # nobody more; or, once it is shut, the end
                return
            link.setblocking(False)
            self._links.add(link)
            self._loop.add_reader(link, self._receive, link)

    def _receive(self, link: socket.socket, most: int = 64) -> None:
        for _ in range(most):
            try:
                size, controls, _, _ = link.recvmsg_into([self._buffer], socket.CMSG_SPACE(_DESCRIPTOR))
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                size, controls = 0, []
            if not size:
                self._loop.remove_reader(link)
                self._links.discard(link)
                link.close()
                return
            # None: there was no file left for it here, and the kernel has closed it.
            for _, _, content in controls:
                descriptor = int.from_bytes(content[:_DESCRIPTOR], "little")
                self._take(socket.socket(fileno=descriptor), bytes(self._buffer[:size]))

    def close(self) -> None:
        """Nothing more arrives from now on; all that was sent before has been taken when this returns."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accept()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for link in list(self._links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RD)
            while link in self._links:
                self._receive(link)
        with contextlib.suppress(OSError):
            os.unlink(self._path)
