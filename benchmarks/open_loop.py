"""Requests sent at a rate, whatever becomes of them: what O1 measures the service with.

    python -m benchmarks.open_loop URL RATE SECONDS BODY PATH…

Clients in a closed loop slow down with the service, so that no number of them is twice its load. Here the moments at
which requests are sent are drawn beforehand (Poisson: RATE a second), and a reply that is late delays nobody. Each
request goes out on a connection that has none under way; MOST connections are held, far more than requests are under
way unless the service falls behind without end. The latency counts from the moment that was drawn, not from when the
request was sent: what comes late because this process was late is not made to look better (both are told). Refused
requests are not sent again: those of a real crowd come later, and are among the others that do.

One epoll and plain sockets: the two cores have to do for this process, too. It ends with one line of figures: of what
was accepted, count and percentiles of the latency in ms; how many were refused, and how long that took; how many got
neither, by what came instead (all connections were taken, or another status); by how much requests were sent late (99th
percentile, ms); this process's CPU seconds; and how many were sent and accepted in all, the first seconds included.
"""

import gc
import math
import random
import resource
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from urllib.parse import urlsplit

MOST = 4_000
WARM_SECONDS = 2.0  # not counted: until the service is as it will be under this load
LAST_SECONDS = 5.0  # for what is under way at the end
# The most that is sent between two looks at what came.
AT_ONCE = 64


class Load:
    """Connections, and what came on them. `run` sends at the moments of `schedule`."""

    def __init__(self, url: str, requests: list[bytes]) -> None:
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 80)
        self._requests = requests
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._sent: dict[int, tuple[float, bool]] = {}  # when it was due, and whether it counts
        self._received: dict[int, bytes] = {}
        self._free: deque[int] = deque()
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.late: list[float] = []
        self.failed: Counter[str] = Counter()
        self.sent = self.stepped = 0  # what does not count among the latencies included

    def connect(self, count: int) -> None:
        for _ in range(count):
            made = socket.create_connection(self._address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setblocking(False)
            number = made.fileno()
            self._sockets[number] = made
            self._free.append(number)
            self._epoll.register(number, select.EPOLLIN)

    def run(self, schedule: list[float], counted_from: float) -> float:
        """Seconds that it took to send all that counts."""
        started, at, began = time.monotonic(), 0, 0.0
        while at < len(schedule):
            now = time.monotonic() - started
            for _ in range(AT_ONCE):
                if at == len(schedule) or schedule[at] > now:
                    break
                counts = schedule[at] >= counted_from
                began = began or (now if counts else 0.0)
                self._send(started + schedule[at], at, counts)
                at += 1
            pause = 0.0 if at == len(schedule) else schedule[at] - (time.monotonic() - started)
            self._hear(max(0.0, pause))
        took, last = time.monotonic() - started - began, time.monotonic() + LAST_SECONDS
        while self._sent and time.monotonic() < last:
            self._hear(0.05)
        self.failed["unanswered"] += sum(counts for _, counts in self._sent.values())
        return took

    def _send(self, due: float, index: int, counts: bool) -> None:
        if not self._free:
            self.failed["no connection"] += counts
            return
        number = self._free.popleft()
        try:
            self._sockets[number].send(self._requests[index % len(self._requests)])
        except OSError as error:
            self.failed[type(error).__name__] += counts
            self._replace(number)
            return
        self._sent[number] = (due, counts)
        self.sent += 1
        if counts:
            self.late.append(time.monotonic() - due)

    def _hear(self, pause: float) -> None:
        for number, _ in self._epoll.poll(pause, 1024):
            try:
                data = self._sockets[number].recv(65536)
            except OSError:
                data = b""
            if data:
                self._take(number, data)
            else:
                self.failed["closed"] += self._sent.get(number, (0.0, False))[1]
                self._replace(number)

    def _take(self, number: int, data: bytes) -> None:
        if number in self._received:
            data = self._received.pop(number) + data
        end = data.find(b"\r\n\r\n")
        begin = data.find(b"content-length: ", 0, end) + 16
        if end < 0 or len(data) < end + 4 + int(data[begin : data.find(b"\r\n", begin)]):
            self._received[number] = data
            return
        due, counts = self._sent.pop(number)
        self._free.append(number)
        status, seconds = data[9:12], time.monotonic() - due
        self.stepped += status == b"200"
        if not counts:
            return
        if status == b"200":
            self.accepted.append(seconds)
        elif status == b"503":
            self.refused.append(seconds)
        else:
            self.failed[status.decode()] += 1

    def _replace(self, number: int) -> None:
        self._sockets.pop(number).close()
        self._sent.pop(number, None)
        self._received.pop(number, None)
        self.connect(1)


def percentile(values: list[float], share: float) -> float:
    """In milliseconds: the least of the values that so large a share is not above (nearest rank)."""
    return 1e3 * sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


def main(url: str, rate: float, seconds: float, body: str, paths: list[str]) -> None:
    content = body.encode()
    lines = f"Host: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    load = Load(url, [f"POST {path} HTTP/1.1\r\n{lines}".encode() + content for path in paths])
    load.connect(MOST)
    time.sleep(0.5)
    schedule, moment = [], 0.0
    while moment < WARM_SECONDS + seconds:
        moment += random.expovariate(rate)
        schedule.append(moment)
    gc.disable()
    used = time.process_time()  # the connections and the schedule have taken some before
    took = load.run(schedule, WARM_SECONDS)
    used = time.process_time() - used
    print(
        f"figures seconds={took:.6f} accepted={len(load.accepted)} refused={len(load.refused)} "
        f"failed={sum(load.failed.values())} p50={percentile(load.accepted, 0.5):.4f} "
        f"p99={percentile(load.accepted, 0.99):.4f} refusal={percentile(load.refused, 0.5):.4f} "
        f"late={percentile(load.late, 0.99):.4f} cpu={used:.3f} sent={load.sent} stepped={load.stepped} "
        f"p999={percentile(load.accepted, 0.999):.4f} {dict(load.failed)}",
        flush=True,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:])
