"""M1: 100,000 idle sessions of 10 parameters: what each takes in the store. M1R: what they take in the service.

They are made over HTTP, in as many parts as the run has rounds, on connections in parallel. A session comes into the
memory of the service when it is opened, and leaves it for others when these take more than MEMORY together. So sessions
are opened until the first have left again; from then on memory has to stay where it is, however many more come and go.
What it was while they were made stands beside.
"""

import asyncio
import json
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from urllib.parse import urlsplit

import redis
import uvloop

from benchmarks import processes
from benchmarks.measure import Bound, Comparison, NotRun, Plan, Result, Row, Sample, Unmeasured, alternate, say
from benchmarks.processes import Server, call
from benchmarks.small_steps import SIZE, body
from service.embedded import Embedded

COUNT, CONNECTIONS = 100_000, 32
MEMORY = "32MiB"
# 1.5 KB, where a KB is the smaller of the two things that it is.
MOST_BYTES = 1_500
OPENED, STEPS = 1_000, 100
MOST_PARTS = 20
GIVEN_BACK_SECONDS = 3

STORED, GOAL, MORE, FIRST = "a session", "1.5 KB", "with more that come and go", "with the first that fit"

ROWS = (
    Row(
        "M1",
        f"bytes in the store for each of {COUNT:,} idle sessions of {SIZE} parameters (Adam, made over HTTP)",
        GOAL,
        STORED,
        GOAL,
        at_most=1.0,
    ),
    Row(
        "M1R",
        f"memory of the service, in which {MEMORY} of sessions may stay, while ever more of the {COUNT:,} are opened",
        "its memory when so many had been opened that the first left it",
        MORE,
        FIRST,
        at_most=1.1,
    ),
)

_ID = re.compile(rb'"id":"(ses_[a-z0-9]+)"')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    wanted = [row for row in ROWS if row.code in rows]
    for row in wanted:
        say(f"{row.code}: {row.case}, against {row.against}")
    try:
        found = _measure(plan)
    except Unmeasured as reason:
        yield from (NotRun(row, str(reason)) for row in wanted)
        return
    yield from (result for result in found if result.row in wanted)


def _measure(plan: Plan) -> list[Comparison]:
    directory = plan.directory / "M1"
    directory.mkdir()
    with ExitStack() as stack:
        settings = {"RAVINE_MEMORY": MEMORY, "RAVINE_MAX_SESSIONS": str(2 * COUNT)}
        server = stack.enter_context(processes.service(directory, settings))
        store = stack.enter_context(redis.Redis.from_url(Embedded(directory / "service").url, protocol=2))
        call(server.url, "GET", "/v1/sessions")
        time.sleep(GIVEN_BACK_SECONDS)
        empty = processes.resident_memory(server.pid)
        making = Making(STORED, server, store, COUNT // plan.rounds)
        made = alternate([making, Bound(GOAL, MOST_BYTES)], plan.rounds)
        first, last = (made[place].samples[STORED].beside["service, MiB"] for place in (0, -1))
        waking = Waking(MORE, server, making.ids)
        full = waking.fill()
        woken = alternate([waking, Bound(FIRST, full)], plan.rounds)
        used = _one(store, making.ids[0])
        _step(server, making.ids[0])
        stepped = _one(store, making.ids[0])
        _verify(server, store, making.ids)
    stored = [
        f"{len(making.ids):,} sessions were made, and the store lists as many.",
        f"MEMORY USAGE of the keys of one, without its place in the list: {used:,} bytes; after {STEPS} steps, with "
        f"the log and the history of these, {stepped:,}.",
        "The figures of each round are of all sessions made so far: tables grow by doubling.",
    ]
    resident = [
        f"Memory of the service: {empty / 2**20:.0f} MiB before, {first:.0f} MiB after {making.count:,} sessions, "
        f"{last:.0f} MiB after all; {full:.0f} MiB when sessions had to leave it, {waking.last:.0f} MiB at the end."
    ]
    return [Comparison(ROWS[0], "bytes", made, stored), Comparison(ROWS[1], "MiB", woken, resident)]


@dataclass
class Making:
    """A contestant: makes `count` sessions a turn. Its value is bytes in the store for each of those there are."""

    name: str
    server: Server
    store: "redis.Redis"
    count: int
    ids: list[str] = field(default_factory=list)
    used: int = 0

    def __post_init__(self) -> None:
        self.used = _used(self.store)

    def turn(self) -> Sample:
        before, started, own = self.server.usage(), time.perf_counter(), time.process_time()
        self.ids += make(self.server.url, self.count)
        seconds, own = time.perf_counter() - started, time.process_time() - own
        after = self.server.settle()
        time.sleep(GIVEN_BACK_SECONDS)
        beside = {
            "sessions so far": float(len(self.ids)),
            "made a second": self.count / seconds,
            "client busy, %": 100 * own / seconds,
            "server CPU, µs each": 1e6 * (after.server - before.server) / self.count,
            "store CPU, µs each": 1e6 * (after.store - before.store) / self.count,
            "service, MiB": processes.resident_memory(self.server.pid) / 2**20,
            "sessions in the service": _hot(self.server),
        }
        return Sample((_used(self.store) - self.used) / len(self.ids), beside)


@dataclass
class Waking:
    """A contestant: opens sessions that were not open before, one by one. Its value is the service's memory."""

    name: str
    server: Server
    ids: list[str]
    at: int = 0
    last: float = 0.0

    def fill(self) -> float:
        """Opens them until as many leave as come; MiB then."""
        hot = -1.0
        for _ in range(MOST_PARTS):
            memory = self.turn().value
            before, hot = hot, _hot(self.server)
            if hot <= before:
                return memory
        raise Unmeasured(f"after {self.at} sessions were opened, none has left the memory of the service")

    def turn(self) -> Sample:
        address = urlsplit(self.server.url)
        with closing(HTTPConnection(address.hostname or "", address.port, timeout=60)) as connection:
            listed = _timed(lambda: _get(connection, "/v1/sessions?limit=100"))
            middle = sorted(self.ids)[len(self.ids) // 2]
            further = _timed(lambda: _get(connection, f"/v1/sessions?limit=100&after={middle}"))
            ids = self.ids[self.at : self.at + OPENED]
            if len(ids) < OPENED:
                raise Unmeasured(f"there are no more than {len(self.ids)} sessions to open")
            self.at += OPENED
            paths = [f"/v1/sessions/{id_}/params" for id_ in ids]
            opened = [_timed(partial(_get, connection, path)) for path in paths]
        self.server.settle()
        time.sleep(GIVEN_BACK_SECONDS)
        self.last = processes.resident_memory(self.server.pid) / 2**20
        beside = {"list the newest 100, ms": listed, "list 100 from the middle, ms": further}
        beside |= {"open one, p50 ms": statistics.median(opened), "open one, the slowest ms": max(opened)}
        return Sample(self.last, beside | {"opened so far": self.at, "sessions in the service": _hot(self.server)})


def make(url: str, count: int, connections: int = CONNECTIONS) -> list[str]:
    """The ids of `count` new sessions, made on so many connections at once. Raises Unmeasured."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_make(url, count, connections))


async def _make(url: str, count: int, connections: int) -> list[str]:
    address = urlsplit(url)
    content = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
    head = f"POST /v1/sessions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    numbers, ids = iter(range(count)), []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for _ in numbers:
            writer.write(request)
            reply = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(reply)
            reply += await reader.readexactly(int(length[1]) if length else 0)
            found = _ID.search(reply)
            if reply[9:12] != b"201" or found is None:
                raise Unmeasured(f"a session was not made: {reply[:300].decode(errors='replace')}")
            ids.append(found[1].decode())
        writer.close()

    try:
        await asyncio.gather(*(connection() for _ in range(connections)))
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Unmeasured(f"the service hung up while sessions were made: {error}") from None
    return ids


def _get(connection: HTTPConnection, path: str) -> None:
    connection.request("GET", path)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise Unmeasured(f"GET {path}: {response.status} {content[:300].decode(errors='replace')}")


def _timed(work: Callable[[], None]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def _step(server: Server, session: str) -> None:
    for _ in range(STEPS):
        call(server.url, "POST", f"/v1/sessions/{session}/steps", body())


def _verify(server: Server, store: "redis.Redis", ids: list[str]) -> None:
    listed = int(store.zcard("ravine:sessions"))
    if not listed == len(set(ids)) == len(ids):
        raise Unmeasured(f"{len(ids)} sessions were made, the store lists {listed}")
    moved = json.loads(call(server.url, "GET", f"/v1/sessions/{ids[0]}"))["step"]
    if moved != STEPS:
        raise Unmeasured(f"{STEPS} steps were answered, the store has {moved}")


def _one(store: "redis.Redis", session: str) -> int:
    """Bytes of the keys of one session."""
    names = store.scan_iter(match=f"ravine:{{{session}}}:*", count=10_000)
    return sum(int(store.memory_usage(name, samples=0) or 0) for name in names)


def _used(store: "redis.Redis") -> int:
    return int(store.info("memory")["used_memory"])


def _hot(server: Server) -> float:
    found = re.search(rb"^ravine_sessions_hot (\S+)$", call(server.url, "GET", "/metrics"), re.MULTILINE)
    return float(found[1]) if found else 0.0
