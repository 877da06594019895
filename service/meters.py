"""What is counted, as plain numbers: the hot path adds to them, and `metrics` reads them when somebody scrapes.

A prometheus_client histogram takes a lock and walks its buckets in Python for each observation, 2 to 3 µs; the series
here take 0.4. A step has three of them. All but compilations are counted on the event loop, so nothing is locked.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Final, NamedTuple

REQUEST_SECONDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
STORE_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
ENTRIES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER: Final = "other"
# By the first digit of a status; 0 is no answer at all, because the client had gone.
STATUSES: Final = ("gone", "1xx", "2xx", "3xx", "4xx", "5xx")
_GONE: Final = 499


class Histogram:
    """`counts[i]` of the values were at most `bounds[i]` and above the one before; the last are above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Route(NamedTuple):
    """A method and a path as the table of operations writes it; `other` for what is in no table."""

    method: str
    path: str


class Answered:
    """The requests of one route, by the class of their status, and how long they took."""

    __slots__ = ("seconds", "statuses")

    def __init__(self) -> None:
        self.statuses = [0] * len(STATUSES)
        self.seconds = Histogram(REQUEST_SECONDS)


class RequestMeters:
    """`routes` are all that are answered, with at most one `{parameter}` each, `problems` all that is told.

    No label ever comes from a client. What has a label is there from the start, as 0: of a series that begins with 1 no
    rate sees the first.
    """

    __slots__ = ("_exact", "_known", "_templates", "answered", "refused")

    def __init__(self, routes: Iterable[Route], problems: Iterable[str]) -> None:
        self.answered: dict[Route, Answered] = {Route(*route): Answered() for route in routes}
        self.refused = dict.fromkeys(problems, 0)
        paths = {route.path for route in self.answered}
        self._exact = {path for path in paths if "{" not in path}
        self._templates = [(*_around(path), path) for path in paths - self._exact]
        # What was met before, by method and path without its parameter: one look-up for most requests.
        self._known: dict[tuple[str, str, str, str], Answered] = {}

    def end(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request that is over; `status` 0: it was never answered."""
        parts = path.split("/", 4)
        # All but the parameter, which stands in fourth place: /v1/sessions/{session}/steps.
        key = (method, parts[1], parts[2], parts[4]) if len(parts) == 5 and parts[3] else None
        found = (self._known.get(key) if key else None) or self._find(method, path, key)
        found.statuses[0 if status == _GONE else status // 100] += 1
        found.seconds.observe(seconds)

    def refuse(self, problem: str) -> None:
        if problem in self.refused:  # none was told to a client that had gone
            self.refused[problem] += 1

    def _find(self, method: str, path: str, key: tuple[str, str, str, str] | None) -> Answered:
        template = self.template(path)
        route = Route(method if method in METHODS else OTHER, template)
        found = self.answered.get(route)
        if found is None:
            found = self.answered[route] = Answered()
        if key and "{" in template and route.method != OTHER:
            self._known[key] = found
        return found

    def template(self, path: str) -> str:
        """How the table of operations writes `path`; `other` for what is not in it."""
        if path in self._exact:
            return path
        for before, after, template in self._templates:
            end = len(path) - len(after)
            found = path.startswith(before) and path.endswith(after)
            if found and len(before) < end and "/" not in path[len(before) : end]:
                return template
        return OTHER


def _around(path: str) -> tuple[str, str]:
    """What stands before the parameter of a template, and behind it."""
    before, _, rest = path.partition("{")
    return before, rest.partition("}")[2]


class StoreMeters:
    """What goes to the store. `calls` are latencies by the kind of a call, which is a script's name or `read`."""

    __slots__ = ("calls", "entries", "failures", "loads", "log_bytes", "snapshot_bytes", "snapshots")

    def __init__(self) -> None:
        self.calls: dict[str, Histogram] = {}
        self.failures: dict[str, int] = {}
        self.entries = Histogram(ENTRIES)  # of each commit; their number is that of the commits
        self.log_bytes = 0
        self.snapshots = 0
        self.snapshot_bytes = 0
        self.loads = 0

    def answered(self, call: str, started: float) -> None:
        """A call that began at `started`, of time.perf_counter, is over; whatever came of it."""
        found = self.calls.get(call)
        if found is None:
            found = self.calls[call] = Histogram(STORE_SECONDS)
            self.failures.setdefault(call, 0)
        found.observe(perf_counter() - started)

    def failed(self, call: str) -> None:
        self.failures[call] = self.failures.get(call, 0) + 1

    def appended(self, sizes: Sequence[int]) -> None:
        """A commit: the bytes of each of its entries."""
        self.entries.observe(len(sizes))
        self.log_bytes += sum(sizes)

    def snapshot(self, size: int) -> None:
        self.snapshots += 1
        self.snapshot_bytes += size


class CompileMeters:
    """Compilations, which are in threads of their own."""

    __slots__ = ("_lock", "begun", "done", "seconds")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begun = self.done = 0
        self.seconds = 0.0

    def begin(self) -> None:
        with self._lock:
            self.begun += 1

    def end(self, seconds: float) -> None:
        with self._lock:
            self.done += 1
            self.seconds += seconds
