"""L1 and L2: one client sends a large gradient as safetensors and gets the parameters back, over and over.

The client does nothing but move bytes: one prepared request on one kept connection, and one buffer that every
reply is received into. Its own CPU time is given beside, so that it can be seen not to be what is measured.
"""

import json
import re
import socket
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from benchmarks import processes
from benchmarks.measure import Comparison, Plan, Result, Row, Sample, Unmeasured, alternate, one_by_one
from benchmarks.processes import Server, call

MEDIA = "application/vnd.safetensors"
COMPILE_SECONDS = 60
WARM_REQUESTS = 5
SERVICE, ECHO = "Ravine", "echo"

ROWS = (
    Row(
        "L1",
        "safetensors step of 1 M float32, parameters back, one client, in the store before the answer",
        "echo of the same bytes",
        SERVICE,
        ECHO,
        at_least=1.0,
    ),
    Row("L2", "the same with 10 M float32", "echo of the same bytes", SERVICE, ECHO, at_least=1.0),
)

_SIZES = {"L1": 1_000_000, "L2": 10_000_000}
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_STEP = re.compile(rb"\r\nravine-step: *(\d+)\r\n", re.IGNORECASE)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Comparison:
    plan = plan._replace(directory=plan.directory / row.code)
    plan.directory.mkdir()
    size = _SIZES[row.code]
    file = safetensors(gradient(size))
    with ExitStack() as stack:
        server = stack.enter_context(processes.service(plan.directory))
        echo = stack.enter_context(processes.echo(plan.directory))
        path = session(server, size)
        request = Request(f"{path}/steps", file)
        ours = Exchange(SERVICE, server, request, plan.seconds)
        theirs = Exchange(ECHO, echo, request, plan.seconds)
        ours.warm()
        server.wait_for(r"(compiled) ", COMPILE_SECONDS)
        rounds = alternate([ours, theirs], plan.rounds)
        remark = _verify(server, path, ours)
    return Comparison(row, "requests/s", rounds, [remark, f"A request has {len(file) / 1e6:.1f} MB each way."])


def safetensors(numbers: "np.ndarray[tuple[int], np.dtype[np.floating]]") -> bytes:
    """A file with one tensor "w" of (size,) float32."""
    return file_head(len(numbers)) + numbers.astype("<f4").tobytes()


def gradient(size: int) -> "np.ndarray[tuple[int], np.dtype[np.floating]]":
    found: np.ndarray[tuple[int], np.dtype[np.floating]] = (np.arange(size) * 7919 % 1001 - 500) / 500
    return found


def file_head(size: int) -> bytes:
    """All of such a file that comes before the numbers."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def session(server: Server, size: int) -> str:
    path = new_session(server, size)
    call(server.url, "PUT", path + "/params", safetensors(gradient(size)), MEDIA)
    return path


def new_session(server: Server, size: int, **members: Any) -> str:
    """The path of a session of Adam with one tensor "w" of (size,) float32, which has no parameters yet."""
    given = json.dumps({"optimizer": "adam", "shapes": {"w": [size]}} | members).encode()
    path: str = "/v1/sessions/" + json.loads(call(server.url, "POST", "/v1/sessions", given))["id"]
    return path


def _verify(server: Server, path: str, exchange: "Exchange") -> str:
    """Raises Unmeasured unless the store has exactly the steps that were answered."""
    moved = json.loads(call(server.url, "GET", path))["step"]
    if not moved == exchange.answered == exchange.last_step:
        raise Unmeasured(
            f"{exchange.answered} steps were answered, the last as step {exchange.last_step}, and the store has {moved}"
        )
    return f"{SERVICE}: {exchange.answered} steps were answered, the store has {moved}."


class Request(NamedTuple):
    path: str
    content: bytes


class Reply(NamedTuple):
    status: int
    step: int | None


class Client:
    """Sends the same request again and again over one connection. Raises Unmeasured where the server hangs up."""

    def __init__(self, url: str, request: Request) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST {request.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: {MEDIA}\r\n"
        self._request = f"{head}Content-Length: {len(request.content)}\r\n\r\n".encode() + request.content
        self._room = bytearray(len(request.content) + (1 << 16))

    def close(self) -> None:
        self._socket.close()

    def exchange(self) -> Reply:
        """One request and its whole reply."""
        try:
            self._socket.sendall(self._request)
        except OSError as error:
            raise Unmeasured(f"the server took no request: {error}") from None
        view, end = memoryview(self._room), 0
        while (split := self._room.find(b"\r\n\r\n", 0, end)) < 0:
            end += self._receive(view[end:])
        head = bytes(view[: split + 2])
        length, step = _LENGTH.search(head), _STEP.search(head)
        if length is None:
            raise Unmeasured("a reply without a length")
        whole = split + 4 + int(length[1])
        if whole > len(view):
            raise Unmeasured("a reply longer than the request")
        while end < whole:
            end += self._receive(view[end:whole])
        return Reply(int(head[9:12]), None if step is None else int(step[1]))

    def _receive(self, room: memoryview) -> int:
        try:
            count = self._socket.recv_into(room)
        except OSError as error:
            raise Unmeasured(f"the server gave no reply: {error}") from None
        if not count:
            raise Unmeasured("the server hung up")
        return count


@dataclass
class Exchange:
    """A contestant: one client, and the server that it talks to.

    Each turn has a connection of its own, since uvicorn closes one that was idle during the other's turn, and begins
    with requests that do not count.
    """

    name: str
    server: Server
    request: Request
    seconds: int
    answered: int = 0
    last_step: int | None = None

    def turn(self) -> Sample:
        with closing(Client(self.server.url, self.request)) as client:
            for _ in range(WARM_REQUESTS):
                self._send(client)
            before, client_before = self.server.usage(), time.thread_time()
            started = time.perf_counter()
            requests = 0
            while (seconds := time.perf_counter() - started) < self.seconds:
                self._send(client)
                requests += 1
            own = time.thread_time() - client_before
        after = self.server.settle()
        spent = {"server": after.server - before.server, "store": after.store - before.store, "client": own}
        beside = {f"{who} CPU, ms a request": 1e3 * cpu / requests for who, cpu in spent.items()}
        beside["client busy, %"] = 100 * own / seconds
        return Sample(requests / seconds, {"ms a request": 1e3 * seconds / requests} | beside)

    def warm(self) -> None:
        with closing(Client(self.server.url, self.request)) as client:
            for _ in range(WARM_REQUESTS):
                self._send(client)

    def _send(self, client: Client) -> None:
        reply = client.exchange()
        if reply.status != 200:
            raise Unmeasured(f"{self.name} answered {reply.status}")
        self.answered += 1
        self.last_step = reply.step
