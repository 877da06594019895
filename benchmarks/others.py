"""Clients that hold connections and ask for nothing: what the row H1 has beside those that step.

    python -m benchmarks.others URL PATH IDLE SLOW

IDLE connections have asked for something once, and are silent since. Of SLOW connections half send the head of a
request, half the body of one to PATH: a byte each every BYTE_SECONDS. That is more than such clients send who mean to
hold a server up (one in ten seconds or so), and as much as the service lets be: it cuts them all the same.

They come over SPREAD_SECONDS, not all at once, for what is measured is what it costs to hold them; and by then those
that the service cuts, after `header_seconds` and `stall_seconds`, are cut one by one, as they would be in the long run.
A connection that the service closes is made anew at once, so that there are always as many.

The same two cores have to do for this process, so it must take next to nothing of them: no task and no timer for a
connection, one epoll for all, and TURNS turns a second, each for the bytes that are due by then. Its own CPU time is
given with the figures. Says "held" once all are there and the idle ones have their replies, goes on until it is told to
stop (SIGTERM), and says then how many it had, how many it made in all, how many of those are of after it said "held",
and its CPU seconds since.
"""

import contextlib
import errno
import gc
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from typing import Literal
from urllib.parse import urlsplit

BYTE_SECONDS = 1.0
SPREAD_SECONDS = 16.0
TURNS = 50  # a second
_HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
_RESET = struct.pack("ii", 1, 0)

Kind = Literal["idle", "head", "body"]


class Others:
    """All connections. `step` does what is due in one turn; turns follow each other every 1 / TURNS seconds."""

    def __init__(self, url: str, path: str, idle: int, slow: int) -> None:
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 80)
        lines = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        self._first: dict[Kind, bytes] = {
            "idle": b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "head": _HEAD,
            "body": f"POST {path} HTTP/1.1\r\n{lines}".encode(),
        }
        kinds: list[Kind] = ["idle"] * idle + ["head"] * (slow // 2) + ["body"] * (slow - slow // 2)
        random.shuffle(kinds)
        self._to_make = deque(kinds)
        self._a_turn = -(-len(kinds) // int(SPREAD_SECONDS * TURNS))
        self.wanted = len(kinds)
        self._epoll = select.epoll()
        self._sockets: dict[int, tuple[socket.socket, Kind]] = {}
        # Who sends a byte in which turn: each in one of as many turns as there are from one byte to its next.
        self._slots: list[set[int]] = [set() for _ in range(int(BYTE_SECONDS * TURNS))]
        self._slot_of: dict[int, int] = {}
        self._turn = 0
        self._silent: set[int] = set()  # those whose first reply has not come
        self.made = 0

    @property
    def held(self) -> int:
        return len(self._sockets) - len(self._silent)

    def step(self) -> None:
        for _ in range(min(self._a_turn, len(self._to_make))):
            self._make(self._to_make.popleft())
        for number, events in self._epoll.poll(0, 1024):
            self._hear(number, events)
        self._turn = (self._turn + 1) % len(self._slots)
        for number in tuple(self._slots[self._turn]):
            self._send(number, b" " if self._sockets[number][1] == "body" else b"a")

    def _make(self, kind: Kind) -> None:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Closed with a reset: thousands of ports would otherwise be kept for a minute.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        made.setblocking(False)
        found = made.connect_ex(self._address)
        if found not in (0, errno.EINPROGRESS):
            made.close()
            self._to_make.append(kind)
            return
        number = made.fileno()
        self._sockets[number] = (made, kind)
        self._silent.add(number)
        self._epoll.register(number, select.EPOLLIN | select.EPOLLOUT)
        self.made += 1

    def _hear(self, number: int, events: int) -> None:
        kind = self._sockets[number][1]
        if events & select.EPOLLOUT:  # it is connected
            self._epoll.modify(number, select.EPOLLIN)
            if not self._send(number, self._first[kind]):
                return
            if kind != "idle":
                self._silent.discard(number)
                slot = self._slot_of[number] = random.randrange(len(self._slots))
                self._slots[slot].add(number)
        if events & ~select.EPOLLOUT:
            said = b""
            with contextlib.suppress(OSError):
                said = self._sockets[number][0].recv(65536)
            if kind == "idle" and said:
                self._silent.discard(number)
            else:  # closed, or what a slow one is told before it is
                self._over(number)

    def _send(self, number: int, data: bytes) -> bool:
        try:
            self._sockets[number][0].send(data)
        except OSError:
            self._over(number)
            return False
        return True

    def _over(self, number: int) -> None:
        closed, kind = self._sockets.pop(number)
        self._silent.discard(number)
        slot = self._slot_of.pop(number, None)
        if slot is not None:
            self._slots[slot].discard(number)
        closed.close()
        self._to_make.append(kind)


def main(url: str, path: str, idle: int, slow: int) -> None:
    others, stopped = Others(url, path, idle, slow), False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    gc.disable()  # nothing here is in a cycle
    first, cpu, due, there = 0, 0.0, time.monotonic(), False
    while not stopped:
        others.step()
        if not there and others.held == others.wanted:
            there, first, cpu = True, others.made, time.process_time()
            print("held", flush=True)
        due += 1 / TURNS
        time.sleep(max(0.0, due - time.monotonic()))
    print(
        f"figures held={others.held} made={others.made} anew={others.made - first} cpu={time.process_time() - cpu:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
