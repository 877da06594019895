"""S1 and S2: JSON steps of 10 numbers on 64 sessions over 32 connections, sent by wrk.

All contestants get the same bytes but for the path, on the same two cores as wrk and the store. What is in the
store at the end is held against what was answered: each step that was answered must be there, and beyond them only
those that were under way when wrk hung up.
"""

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes
from benchmarks.measure import Comparison, NotRun, Plan, Result, Row, Sample, Unmeasured, alternate, say
from benchmarks.processes import Server, call, child_seconds

SESSIONS = 64
CONNECTIONS = 32
SIZE = 10
WARM_SECONDS = 1

SERVICE, ECHO, ONE_HOUR = "Ravine", "echo", "one hour"

ROWS = (
    Row(
        "S1",
        "JSON step of 10 numbers, 64 sessions, 32 connections (wrk), in the store before the answer",
        "bare ASGI echo of the same body on the same uvicorn",
        SERVICE,
        ECHO,
        at_least=0.45,
    ),
    Row(
        "S2",
        "the same",
        "what one would write in an hour: FastAPI, pydantic, JSON state in the same store",
        SERVICE,
        ONE_HOUR,
        at_least=6.0,
    ),
)

_SCRIPT = Path(__file__).parent / "wrk_steps.lua"
_FIGURES = re.compile(r"figures requests=(\d+) seconds=(\S+) p50=(\S+) p99=(\S+) refused=(\d+) broken=(\d+)")


def body() -> bytes:
    """A gradient as a client with float32 arrays sends it: every number has the digits of a float64."""
    numbers = [struct.unpack("f", struct.pack("f", ((7919 * i) % 1001 - 500) / 500))[0] for i in range(1, SIZE + 1)]
    return json.dumps({"gradients": {"w": numbers}}).encode()


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    wanted = [row for row in ROWS if row.code in rows]
    for row in wanted:
        say(f"{row.code}: {row.case}, against {row.against}")
    try:
        yield from _compare(wanted, plan)
    except Unmeasured as reason:
        yield from (NotRun(row, str(reason)) for row in wanted)


def _compare(wanted: Sequence[Row], plan: Plan) -> list[Result]:
    if shutil.which("wrk") is None:
        raise Unmeasured("wrk is not installed")
    names = dict.fromkeys(name for row in wanted for name in (row.ours, row.theirs))
    with ExitStack() as stack:
        loads = {name: _MAKERS[name](stack, plan) for name in names}
        for load in loads.values():
            load.send(WARM_SECONDS)
        rounds = alternate(list(loads.values()), plan.rounds)
        remarks = [remark for load in loads.values() if (remark := load.verify())]
    return [Comparison(row, "requests/s", rounds, remarks) for row in wanted]


@dataclass
class Load:
    """wrk's requests to one server, or to the proxy at `url` before it. `count` gives the steps that its sessions stand
    at, in sum; `strict`: none lost.
    """

    name: str
    server: Server
    paths: Sequence[str]
    seconds: int
    count: Callable[[], int] | None = None
    strict: bool = True
    url: str = ""
    answered: int = 0
    under_way: int = 0

    def turn(self) -> Sample:
        before, client_before = self.server.usage(), child_seconds()
        requests, seconds, p50, p99 = self.send(self.seconds)
        busy = (self.server.usage().server - before.server) / seconds
        after, client = self.server.settle(), child_seconds() - client_before
        spent = {"server": after.server - before.server, "store": after.store - before.store, "wrk": client}
        beside = {f"{who} CPU, µs a request": 1e6 * cpu / requests for who, cpu in spent.items()}
        beside |= {"server busy, %": 100 * busy, "wrk busy, %": 100 * client / seconds}
        return Sample(requests / seconds, {"p50 ms": p50, "p99 ms": p99} | beside)

    def send(self, seconds: int, connections: int = CONNECTIONS) -> tuple[int, float, float, float]:
        """Requests that were answered, seconds, and the 50th and 99th percentile of the latency in ms."""
        url = self.url or self.server.url
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(_SCRIPT), url, "--"]
        done = subprocess.run([*command, body().decode(), *self.paths], capture_output=True, text=True, check=False)
        found = _FIGURES.search(done.stdout)
        if found is None:
            raise Unmeasured(f"wrk failed on {self.name}: {done.stderr[-300:]}")
        requests, refused, broken = int(found[1]), int(found[5]), int(found[6])
        if refused or broken or not requests:
            raise Unmeasured(f"{self.name}: of {requests} requests {refused} were refused, {broken} broke off")
        self.answered += requests
        self.under_way += connections
        return requests, float(found[2]), float(found[3]), float(found[4])

    def verify(self) -> str:
        """What became of the steps that were answered. Raises Unmeasured where there are too few, or too many."""
        if self.count is None:
            return ""
        moved, under_way = self.count(), self.under_way
        if moved > self.answered + under_way:
            raise Unmeasured(f"{self.name}: {moved} steps were taken for {self.answered} requests")
        if moved < self.answered and self.strict:
            raise Unmeasured(f"{self.name}: {self.answered} steps were answered, the store has {moved}")
        lost = f"; {self.answered - moved} or more were lost" if moved < self.answered else ""
        return (
            f"{self.name}: {self.answered} steps were answered, the store has {moved} "
            f"(up to {under_way} were under way when wrk hung up){lost}."
        )


def service_load(stack: ExitStack, plan: Plan, settings: Mapping[str, str] | None = None) -> Load:
    """The service, with its sessions."""
    server = stack.enter_context(processes.service(plan.directory, settings))
    given = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
    ids = [json.loads(call(server.url, "POST", "/v1/sessions", given))["id"] for _ in range(SESSIONS)]

    def count() -> int:
        return sum(json.loads(call(server.url, "GET", f"/v1/sessions/{id_}"))["step"] for id_ in ids)

    return Load(SERVICE, server, [f"/v1/sessions/{id_}/steps" for id_ in ids], plan.seconds, count)


def _echo(stack: ExitStack, plan: Plan) -> Load:
    server = stack.enter_context(processes.echo(plan.directory))
    paths = [f"/v1/sessions/ses_{i:020}/steps" for i in range(SESSIONS)]
    if call(server.url, "POST", paths[0], body()) != body():
        raise Unmeasured("the echo is none")
    return Load(ECHO, server, paths, plan.seconds)


def _one_hour(stack: ExitStack, plan: Plan) -> Load:
    server = stack.enter_context(processes.one_hour(plan.directory))
    given = json.dumps({"params": [0.0] * SIZE}).encode()
    ids = [json.loads(call(server.url, "POST", "/sessions", given))["id"] for _ in range(SESSIONS)]

    def count() -> int:
        return sum(json.loads(call(server.url, "GET", f"/sessions/{id_}"))["step"] for id_ in ids)

    return Load(ONE_HOUR, server, [f"/sessions/{id_}/steps" for id_ in ids], plan.seconds, count, strict=False)


_MAKERS = {SERVICE: service_load, ECHO: _echo, ONE_HOUR: _one_hour}
