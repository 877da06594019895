"""Ravine's side of P1: workers that push gradients as safetensors and get the parameters in the same reply.

    python -m benchmarks.http_workers SIZE WORKERS URL SESSION

Plain sockets, one kept connection a worker. The gradient goes out of the array that it lies in, the parameters are a
view of the buffer that the reply came into, so that a worker costs little of what it shares the machine with.
"""

import json
import socket
import sys
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import numpy as np

from benchmarks.large_steps import MEDIA, file_head
from benchmarks.peers.contestant import Crew, serve, work
from benchmarks.processes import call

# A small request goes out in one piece: two would be two packets, and two wakings of the server.
JOINED_BYTES = 1 << 16
REPLY_HEAD_BYTES = 1 << 16


class Pushing:
    """One worker's connection to one session. Exits where a reply is not the parameters."""

    def __init__(self, url: str, session: str, size: int) -> None:
        self._address = urlsplit(url)
        start = file_head(size)
        length = len(start) + 4 * size
        head = (
            f"POST {session}/steps HTTP/1.1\r\nHost: {self._address.netloc}\r\nContent-Type: {MEDIA}\r\n"
            f"Content-Length: {length}\r\n\r\n"
        )
        self._head = head.encode() + start
        self._size = size
        self._room = bytearray(length + REPLY_HEAD_BYTES)
        self._socket: socket.socket | None = None

    def push(self, gradient: np.ndarray) -> np.ndarray:
        """The parameters after the step, (size,) float32: a view, until the next push."""
        connection = self._socket or self._connect()
        content = memoryview(gradient).cast("B")
        if len(content) <= JOINED_BYTES:
            connection.sendall(self._head + content)
        else:
            connection.sendall(self._head)
            connection.sendall(content)
        end = self._receive(connection)
        return np.frombuffer(self._room, "<f4", self._size, end - 4 * self._size)

    def close(self) -> None:
        """Between turns: the server hangs up on connections that are silent for some seconds."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        self._socket = socket.create_connection((self._address.hostname, self._address.port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _receive(self, connection: socket.socket) -> int:
        """Where the reply ends in the room; the tensor is the last of it."""
        view, end = memoryview(self._room), 0
        while (split := self._room.find(b"\r\n\r\n", 0, end)) < 0:
            end += received(connection, view[end:])
        head = bytes(view[: split + 2]).lower()
        if head[9:12] != b"200":
            sys.exit(f"the service answered {head.decode()} {bytes(view[split:end]).decode(errors='replace')}")
        whole = split + 4 + int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        while end < whole:
            end += received(connection, view[end:whole])
        return whole


def received(connection: socket.socket, room: memoryview) -> int:
    return connection.recv_into(room) or sys.exit("the service hung up")


def worker(orders: Connection, _: int, size: int, url: str, session: str) -> None:
    pushing = Pushing(url, session, size)
    work(orders, size, pushing.push, pushing.close)


class Http:
    server = None

    def __init__(self, size: int, workers: int, url: str, session: str) -> None:
        self._url, self._session = url, session
        self._crew = Crew(worker, workers, size, url, session)
        self._crew.ready()
        self.version = f"numpy {np.__version__}"
        self.check, self.turn = self._crew.check, self._crew.turn

    def end(self) -> dict[str, int]:
        self._crew.dismiss()
        self._crew.join()
        steps = json.loads(call(self._url, "GET", self._session))["step"]
        return {"pushed": self._crew.pushed, "steps": steps}


if __name__ == "__main__":
    serve(Http(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
