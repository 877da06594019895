"""Large steps sent at a rate, whatever becomes of them: what LL measures the service with.

    python -m benchmarks.large_open_loop URL RATE SECONDS SIZE CONNECTIONS SESSION…

SIZE float32 as safetensors to one session after another, parameters back. The moments at which they are due are drawn
beforehand (Poisson: RATE a second). CONNECTIONS are as many as can be under way: what is due when all are taken waits
here for one of them, and its latency counts from when it was due all the same. RATE 0 is a closed loop: each connection
sends its next request with the reply to the one before.

Threads with a plain socket each: what they do is wait and move bytes, which needs no interpreter. It ends with one line
of figures: how long it took, how many were answered, percentiles of the latency in ms, by how much requests were sent
late (99th percentile, ms), this process's CPU seconds, and what else was answered, by status.
"""

import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from benchmarks.large_steps import Client, Request, gradient, safetensors
from benchmarks.measure import Unmeasured
from benchmarks.open_loop import percentile

WARM_SECONDS = 1.0  # not counted


class Load:
    """Takes moments off a schedule that all threads share. Without one a request is due as soon as it is sent."""

    def __init__(self, url: str, requests: list[Request], schedule: Iterator[float] | None, seconds: float) -> None:
        self._url, self._requests = url, itertools.cycle(requests)
        self._schedule, self._last = schedule, WARM_SECONDS + seconds
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.latencies: list[float] = []
        self.late: list[float] = []
        self.failed: Counter[str] = Counter()
        self.stepped = 0  # what does not count among the latencies included
        self.ended = 0.0

    def run(self, connections: int) -> None:
        threads = [threading.Thread(target=self._connection) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _next(self) -> float | None:
        """Seconds after the start, or None when it is over."""
        with self._lock:
            now = time.monotonic() - self._started
            due = now if self._schedule is None else next(self._schedule)
        return due if due < self._last else None

    def _connection(self) -> None:
        with self._lock:
            request = next(self._requests)
        try:
            with closing(Client(self._url, request)) as client:
                while (due := self._next()) is not None:
                    self._exchange(client, due)
        except Unmeasured as error:
            self.failed[str(error)] += 1

    def _exchange(self, client: Client, due: float) -> None:
        time.sleep(max(0.0, due - (time.monotonic() - self._started)))
        sent = time.monotonic() - self._started
        status = client.exchange().status
        answered = time.monotonic() - self._started
        with self._lock:
            if status != 200:
                self.failed[str(status)] += 1
                return
            self.stepped += 1
            if due >= WARM_SECONDS:
                self.latencies.append(answered - due)
                self.late.append(sent - due)
                self.ended = max(self.ended, answered)


def poisson(rate: float) -> Iterator[float]:
    """Moments, without end: `rate` a second."""
    moment = 0.0
    while True:
        moment += random.expovariate(rate)
        yield moment


def main(url: str, rate: float, seconds: float, size: int, connections: int, sessions: list[str]) -> None:
    file = safetensors(gradient(size))
    requests = [Request(f"{session}/steps", file) for session in sessions]
    load = Load(url, requests, poisson(rate) if rate else None, seconds)
    used = time.process_time()
    load.run(connections)
    used = time.process_time() - used
    took = max(load.ended - WARM_SECONDS, 1e-9)
    print(
        f"figures seconds={took:.6f} answered={len(load.latencies)} p50={percentile(load.latencies, 0.5):.4f} "
        f"p99={percentile(load.latencies, 0.99):.4f} p999={percentile(load.latencies, 0.999):.4f} "
        f"late={percentile(load.late, 0.99):.4f} cpu={used:.3f} stepped={load.stepped} "
        f"{dict(load.failed)}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])
