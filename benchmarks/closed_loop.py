"""Clients in a closed loop, each with one request under way: the rate that O1 takes for what can be carried.

    python -m benchmarks.closed_loop URL CLIENTS SECONDS BODY PATH…

wrk would count refusals among the latencies, and send again at once. A client here does as it is told: after a 503 it
waits for Retry-After, and for a random part of as much again. Ends with one line of figures: of what was accepted,
count and percentiles of the latency in ms; how many were refused, and how long that took; this process's CPU seconds.
"""

import asyncio
import contextlib
import random
import resource
import sys
import time
from typing import cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.open_loop import percentile

LAST_SECONDS = 2.0  # for what is under way at the end


class Client(asyncio.Protocol):
    """One connection. Every reply but 200 and 503 ends the process."""

    def __init__(self, request: bytes, figures: "Figures") -> None:
        self._request, self._figures = request, figures
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are by another name
        # Not all in the same instant.
        asyncio.get_running_loop().call_later(random.random() * 0.2, self._send)

    def _send(self) -> None:
        if self._figures.over or self._transport is None:
            return
        self._sent = time.perf_counter()
        self._figures.under_way += 1
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[: end + 2]).lower()
        length = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
        if len(self._received) < end + 4 + length:
            return
        self._received.clear()
        self._took(int(head[9:12]), time.perf_counter() - self._sent)

    def _took(self, status: int, seconds: float) -> None:
        self._figures.answered()
        if status == 200:
            self._figures.accepted.append(seconds)
            self._send()
        elif status == 503:
            self._figures.refused.append(seconds)
            asyncio.get_running_loop().call_later(1 + random.random(), self._send)
        else:
            self._figures.broken += 1

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        if not self._figures.over:
            self._figures.broken += 1


class Figures:
    def __init__(self) -> None:
        self.over = False
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.broken = self.under_way = 0
        self._none = asyncio.Event()

    def answered(self) -> None:
        self.under_way -= 1
        if self.over and not self.under_way:
            self._none.set()

    async def all_answered(self) -> None:
        if self.under_way:
            await self._none.wait()


async def main(url: str, clients: int, seconds: float, body: str, paths: list[str]) -> None:
    address, figures, loop = urlsplit(url), Figures(), asyncio.get_running_loop()
    content = body.encode()
    lines = f"Host: {address.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    requests = [f"POST {path} HTTP/1.1\r\n{lines}".encode() + content for path in paths]

    def client(number: int) -> Client:
        return Client(requests[number % len(requests)], figures)

    for number in range(clients):
        await loop.create_connection(lambda number=number: client(number), address.hostname, address.port)
    await asyncio.sleep(1)  # until each waits for its reply, or has been refused
    figures.accepted.clear()
    figures.refused.clear()
    started, used = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    figures.over = True
    took, used = time.perf_counter() - started, time.process_time() - used
    print(
        f"figures seconds={took:.6f} accepted={len(figures.accepted)} refused={len(figures.refused)} "
        f"broken={figures.broken} cpu={used:.3f} p50={percentile(figures.accepted, 0.5):.4f} "
        f"p99={percentile(figures.accepted, 0.99):.4f} refusal={percentile(figures.refused, 0.5):.4f}",
        flush=True,
    )
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(figures.all_answered(), LAST_SECONDS)  # and so it is in the store


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:]))
