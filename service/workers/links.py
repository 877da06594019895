"""Connections that pass from one process to another: SCM_RIGHTS over unix sockets of whole packets (unix(7)).

A packet is a connection's descriptor and the bytes that were read of it. It goes whole or not at all, and nobody waits:
where there is no room for it, or nobody to take it, the sender keeps what it has. What was sent is the kernel's until
it is taken, and a connection in it outlives the sender.

**What is not taken comes back.** The sender makes the pair of sockets that packets go through, and keeps the end for
reading when it gives it to the taker too. The kernel gives each packet to one of the two. The sender takes back all
that is left when the taker dies or ends (the socket by which it was given the end is closed then), and when nothing at
all was taken in PATIENCE: a process that hangs gets nothing more until it says a word. A connection that was handed
over is therefore either taken, or the sender's again.
"""

import array
import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Final

# uvloop reads up to 250 KiB at a time; a packet must be smaller than what may be under way in a socket.
LARGEST: Final = 320 << 10
ROOM: Final = 1 << 20  # asked for; the kernel gives what net.core.wmem_max allows
PAUSE: Final = 0.05  # seconds after which one who was away is tried again
# Seconds in which nothing is taken by a process that hangs. A large step holds the loop of one that does not for less.
PATIENCE: Final = 1.0
BACKLOG: Final = 128
_DESCRIPTOR: Final = array.array("i").itemsize

Take = Callable[[socket.socket, bytes], None]


class Way:
    """The sockets of a link: `control` to the taker, `out` for packets, and `back`, the end that both read."""

    def __init__(self, path: str) -> None:
        """Raises OSError if nobody is there."""
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.control.setblocking(False)
            self.control.connect(path)
            self.out, self.back = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self.control.close()
            raise
        try:
            for end in (self.out, self.back):
                end.setblocking(False)
            self.out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
            socket.send_fds(self.control, [b"."], [self.back.fileno()])
        except OSError:
            self.close()
            raise

    @property
    def untaken(self) -> int:
        """What is under way, as the kernel counts it (SIOCOUTQ); 0: nothing."""
        left: int = struct.unpack("i", fcntl.ioctl(self.out.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return left

    def close(self) -> None:
        for end in (self.control, self.out, self.back):
            end.close()


class Link:
    """The way to one other worker. It need not be there, and is looked for when there is something to send.

    `take_back` is called of what the other one did not take: the connection, and what was read of it.
    """

    def __init__(self, path: str, take_back: Take) -> None:
        self._path = path
        self._take_back = take_back
        self._way: Way | None = None
        self._not_before = 0.0
        self._hangs = False  # it did, and has not said anything since
        self._closed = False
        self._watch: asyncio.TimerHandle | None = None  # while something may be under way
        self._untaken = 0  # when that was set

    def send(self, descriptor: int, data: bytes) -> bool:
        """Whether it is on its way. If so, the caller's own descriptor is of no use to it any more."""
        way = self._way or self._opened()
        if way is None or self._hangs or len(data) > LARGEST:
            return False
        try:
            socket.send_fds(way.out, [data], [descriptor])
        except OSError:  # it has enough to do, or too many descriptors are under way
            return False
        if self._watch is None:
            self._watch_over(way.untaken)
        return True

    def _opened(self) -> Way | None:
        now = time.monotonic()
        if self._closed or now < self._not_before:
            return None
        try:
            self._way = Way(self._path)
        except OSError:
            self._not_before = now + PAUSE
            return None
        asyncio.get_running_loop().add_reader(self._way.control, self._hear)
        return self._way

    def _hear(self) -> None:
        """It says that it has begun to take; or it has ended."""
        assert self._way is not None
        try:
            said = self._way.control.recv(1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        if said:
            self._hangs = False
        else:
            self._end()

    def _watch_over(self, untaken: int) -> None:
        self._untaken = untaken
        self._watch = asyncio.get_running_loop().call_later(PATIENCE, self._look)

    def _look(self) -> None:
        assert self._way is not None
        self._watch = None
        untaken = self._way.untaken
        if untaken >= self._untaken > 0:
            self._hangs = True
            self._end()
        elif untaken:
            self._watch_over(untaken)

    def _end(self) -> None:
        way, self._way = self._way, None
        if way is None:
            return
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._not_before = time.monotonic() + PAUSE
        asyncio.get_running_loop().remove_reader(way.control)
        buffer = memoryview(bytearray(LARGEST))
        with contextlib.suppress(OSError):  # there is nothing more
            while _taken(way.back, buffer, self._take_back):
                pass
        way.close()

    def close(self) -> None:
        """Nothing more is sent, and what was not taken has come back when this returns."""
        self._closed = True
        self._end()


class Landing:
    """Where connections arrive. `take` is called of each: the connection, and what was read of it."""

    def __init__(self, path: str, take: Take) -> None:
        self._path = path
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(LARGEST))
        self._coming: set[socket.socket] = set()  # who has not said yet where it sends
        self._ways: dict[socket.socket, socket.socket] = {}  # the end to read, and by what it came
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
                control, _ = self._listener.accept()
            except OSError:  # nobody more
                return
            control.setblocking(False)
            self._coming.add(control)
            self._loop.add_reader(control, self._begin, control)

    def _begin(self, control: socket.socket) -> None:
        """The sender gives the end to read, and is told that somebody reads it."""
        try:
            _, descriptors, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            descriptors = []
        self._loop.remove_reader(control)
        self._coming.discard(control)
        if not descriptors:
            control.close()
            return
        with contextlib.suppress(OSError):  # the sender is gone; what it sent is not
            control.send(b".")
        end = socket.socket(fileno=descriptors[0])
        self._ways[end] = control
        self._loop.add_reader(end, self._receive, end)

    def _receive(self, end: socket.socket, most: int = 64) -> None:
        try:
            for _ in range(most):
                if not _taken(end, self._buffer, self._take):
                    break
            else:
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self._leave(end)

    def _leave(self, end: socket.socket) -> None:
        self._loop.remove_reader(end)
        end.close()
        self._ways.pop(end).close()

    def close(self) -> None:
        """Nothing more arrives: what was sent has been taken when this returns, and what comes now goes back."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for control in self._coming:
            self._loop.remove_reader(control)
            control.close()
        self._coming.clear()
        for end in list(self._ways):
            with contextlib.suppress(OSError):
                while _taken(end, self._buffer, self._take):
                    pass
            self._leave(end)


def _taken(end: socket.socket, buffer: memoryview, take: Take) -> bool:
    """Gives the next packet to `take`; False: there will be none. Raises BlockingIOError if there is none yet."""
    flags = socket.MSG_CMSG_CLOEXEC
    size, controls, _, _ = end.recvmsg_into([buffer], socket.CMSG_SPACE(_DESCRIPTOR), flags)
    # None: there was no file left for it here, and the kernel has closed it.
    for _, _, content in controls:
        descriptor = int.from_bytes(content[:_DESCRIPTOR], "little")
        take(socket.socket(fileno=descriptor), bytes(buffer[:size]))
    return bool(size)
