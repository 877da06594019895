"""What a small step costs, and what an idle session takes: the parts of `scale` that move few bytes.

Steps are S1's. The store counts what it read from its connections (`total_reads_processed`): with pipelines as small as
these, once for each. So it is known how many steps shared a turn, and CPU time over clients in parallel becomes what a
turn costs and what a step does:

    CPU of a step = cost of a step + cost of a turn · turns a step

which is a line through one measurement for each number of connections.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from benchmarks import idle_sessions, latency, small_steps
from benchmarks.measure import Unmeasured, say
from benchmarks.processes import call
from benchmarks.sites import SERVICE, Site, Spent, clustered, embedded
from benchmarks.small_steps import SESSIONS, SIZE, Load
from service.workers.routing import home_of

CONNECTIONS = (1, 2, 4, 8, 16, 32)
WORKERS = 2
NODES = (1, 3)
LOGGED_STEPS = 100
REST_SECONDS = 3
TRIES = 5

Figures = dict[str, Any]


class Line(NamedTuple):
    """y = fixed + slope · x; `off` is the largest distance of a point from it, as a share of the point."""

    fixed: float
    slope: float
    off: float


def line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares of the relative distances, so that no large y drowns the small ones; nothing is below zero."""
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    both = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True))
    slope = max(0.0, both / spread) if spread else 0.0
    fixed = y_mean - slope * x_mean
    if fixed < 0:
        square = sum(w * x * x for w, x in zip(weights, xs, strict=True))
        fixed, slope = 0.0, sum(w * x * y for w, x, y in zip(weights, xs, ys, strict=True)) / square
    off = max(abs(fixed + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Line(fixed, slope, off)


@dataclass
class Steps:
    """S1's steps to a site."""

    site: Site
    seconds: int
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        given = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
        url = self.site.server.url
        self.ids = [json.loads(call(url, "POST", "/v1/sessions", given))["id"] for _ in range(SESSIONS)]
        self.send(1, [self.ids], 8)

    def measured(self, groups: Sequence[Sequence[str]], connections: int) -> Figures:
        """Each group of sessions has a client of its own, with so many connections; the figures are of all together."""
        site = self.site
        spent, reads, started = site.quiet(), sum(site.store("stats", "total_reads_processed")), time.perf_counter()
        sent = self.send(self.seconds, groups, connections)
        seconds = time.perf_counter() - started
        turns = sum(site.store("stats", "total_reads_processed")) - reads
        used = site.quiet().since(spent)
        requests = sum(count for count, *_ in sent)
        found = {
            "connections": connections * len(groups),
            "steps/s": sum(count / lasted for count, lasted, *_ in sent),
            "p50 ms": statistics.mean(p50 for *_, p50, _ in sent),
            "p99 ms": max(p99 for *_, p99 in sent),
            "service µs": 1e6 * used.service / requests,
            "store µs": 1e6 * used.store / requests,
            "turns a step": turns / requests,
            "service busy": used.service / seconds,
        }
        say(f"  {found['connections']} connections: " + _told(found))
        return found

    def send(self, seconds: int, groups: Sequence[Sequence[str]], connections: int) -> list[Sequence[float]]:
        """Requests, seconds, p50 and p99 in ms of each group's client."""

        def one(ids: Sequence[str]) -> Sequence[float]:
            paths = [f"/v1/sessions/{id_}/steps" for id_ in ids]
            return Load(SERVICE, self.site.server, paths, seconds).send(seconds, connections)

        with ThreadPoolExecutor(len(groups)) as threads:
            return list(threads.map(one, groups))


def requests(directory: Path, seconds: int) -> Figures:
    """One process: CPU of a step by how many are under way, and the line through it."""
    with embedded(directory) as site:
        steps = Steps(site, seconds)
        points = [steps.measured([steps.ids], connections) for connections in CONNECTIONS]
    turns = [point["turns a step"] for point in points]
    lines = {role: line(turns, [point[f"{role} µs"] for point in points]) for role in Spent._fields}
    return {"points": points} | {
        role: {"a step µs": found.fixed, "a turn µs": found.slope, "off": found.off} for role, found in lines.items()
    }


def workers(directory: Path, seconds: int) -> Figures:
    """Several processes on one port: clients that stay with a session's home, and clients that go round."""
    with embedded(directory, {"RAVINE_WORKERS": str(WORKERS)}) as site:
        steps = Steps(site, seconds)
        homes = [[id_ for id_ in steps.ids if home_of(id_.encode(), WORKERS) == home] for home in range(WORKERS)]
        staying = steps.measured(homes, 32 // WORKERS)
        changing = steps.measured([steps.ids], 32)
        resident = site.resident(SERVICE)
    return {"workers": WORKERS, "staying": staying, "changing": changing, "resident bytes": sum(resident)}


def cluster(directory: Path, seconds: int) -> Figures:
    """The same steps where the store is a cluster: a turn has a pipeline for each node."""
    found: Figures = {}
    for count in NODES:
        with clustered(directory / str(count), count) as site:
            steps = Steps(site, seconds)
            found[str(count)] = steps.measured([steps.ids], 32)
    return found


def sessions(directory: Path, count: int) -> Figures:
    """What an idle session takes in the store and in the service, and an entry of its log."""
    with embedded(directory, {"RAVINE_MAX_SESSIONS": str(2 * count)}) as site:
        (store,) = site.stores
        first = idle_sessions.make(site.server.url, 100)  # what is there once is there now
        call(site.server.url, "POST", f"/v1/sessions/{first[0]}/steps", small_steps.body())
        site.quiet()
        time.sleep(REST_SECONDS)
        used, resident = site.store("memory", "used_memory")[0], sum(site.resident(SERVICE))
        spent = site.spent()
        ids = idle_sessions.make(site.server.url, count)
        made = site.quiet().since(spent)
        time.sleep(REST_SECONDS)
        stored = (site.store("memory", "used_memory")[0] - used) / count
        known = (sum(site.resident(SERVICE)) - resident) / count
        woken = site.spent()
        _wake(site.server.url, ids)
        waking = site.quiet().since(woken)
        time.sleep(REST_SECONDS)
        hot = (sum(site.resident(SERVICE)) - resident) / count
        before = _keys_bytes(store, ids[0])
        for _ in range(LOGGED_STEPS):
            call(site.server.url, "POST", f"/v1/sessions/{ids[0]}/steps", small_steps.body())
        entry = (_keys_bytes(store, ids[0]) - before) / LOGGED_STEPS
    return {
        "count": count,
        "parameters": SIZE,
        "store bytes": stored,
        "known bytes": known,
        "service bytes": hot,
        "entry bytes": entry,
        "making, service µs": 1e6 * made.service / count,
        "making, store µs": 1e6 * made.store / count,
        "loading, service µs": 1e6 * waking.service / count,
        "loading, store µs": 1e6 * waking.store / count,
    }


def delays(directory: Path, seconds: int) -> Figures:
    """What `simulate` is held against: the rate in a closed loop, and the latency of an open one at shares of it."""
    with embedded(directory) as site:
        sending = latency.Small(site.server, seconds)
        carried = max(sending.highest() for _ in range(TRIES))
        say(f"  the highest rate: {carried:,.0f} steps/s")
        found: Figures = {"carried/s": carried, "shares": {}}
        for share in latency.SHARES:
            turns = [sending.send(share * carried) for _ in range(TRIES)]
            found["shares"][str(share)] = {
                "steps/s": statistics.median(beside["sent/s"] for _, beside in turns),
                "p50 ms": statistics.median(middle for middle, _ in turns),
                "p99 ms": statistics.median(beside["p99 ms"] for _, beside in turns),
                "sent late, p99 ms": statistics.median(beside["sent late, p99 ms"] for _, beside in turns),
                "refused %": max(beside["refused, %"] for _, beside in turns),
            }
            say(f"  at {share:g} of it: " + _told(found["shares"][str(share)]))
    return found


def _wake(url: str, ids: Sequence[str]) -> None:
    """A session that is made is in the store alone: it comes into the service's memory when it is asked for."""
    address = urlsplit(url)
    with closing(HTTPConnection(address.hostname or "", address.port, timeout=60)) as connection:
        for id_ in ids:
            connection.request("GET", f"/v1/sessions/{id_}/params")
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise Unmeasured(f"a session was answered {response.status}")


def _keys_bytes(store: Any, session: str) -> int:
    names = store.scan_iter(match=f"ravine:{{{session}}}:*", count=10_000)
    return sum(int(store.memory_usage(name, samples=0) or 0) for name in names)


def _told(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:,.4g}" for name, value in figures.items() if name != "connections")
