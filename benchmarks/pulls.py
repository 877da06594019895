"""F1: 100 readers pull the parameters of one step, over and over, with wrk.

Against a file of the same bytes from the same uvicorn: held in memory by a plain ASGI application, and by Starlette's
StaticFiles. The ratio is to the better of the two, and the row's the worse one of the sizes. That the service sends the
very bytes of the file is looked at first; that all replies have their length, after every turn.
"""

import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes
from benchmarks.large_steps import MEDIA, gradient, new_session, safetensors
from benchmarks.measure import Cell, Plan, Result, Row, Sample, Unmeasured, alternate, best, grid, one_by_one, say
from benchmarks.processes import Server, call, child_seconds

READERS = 100
SIZES = {"10 K": 10_000, "1 M": 1_000_000}
WARM_SECONDS = 1
# A reply's head: far less than the parameters, and more than none.
HEAD_BYTES = 1000

SERVICE, MEMORY, FILES = "Ravine", "bytes in memory", "StaticFiles"

ROWS = (
    Row(
        "F1",
        "a step's parameters pulled by 100 readers (wrk), 10 K and 1 M float32, safetensors; the worse of the two",
        "the better of a static file of the same bytes, in memory and by StaticFiles, on the same uvicorn",
        SERVICE,
        MEMORY,
        at_least=0.9,
    ),
)

_SCRIPT = Path(__file__).parent / "wrk_pulls.lua"
_FIGURES = re.compile(
    r"figures requests=(\d+) seconds=(\S+) bytes=(\d+) p50=(\S+) p99=(\S+) refused=(\d+) broken=(\d+)"
)


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Result:
    if shutil.which("wrk") is None:
        raise Unmeasured("wrk is not installed")
    return grid(row, "pulls/s", [_cell(name, plan) for name in SIZES], [])


def _cell(name: str, plan: Plan) -> Cell:
    say(f"  {name}")
    directory = plan.directory / f"F1-{SIZES[name]}"
    (directory / "files").mkdir(parents=True)
    with ExitStack() as stack:
        service = stack.enter_context(processes.service(directory))
        path = f"{new_session(service, SIZES[name])}/params"
        call(service.url, "PUT", path, safetensors(gradient(SIZES[name])), MEDIA)
        content = call(service.url, "GET", path, accept=MEDIA)
        file = directory / "files" / "params"
        file.write_bytes(content)
        readers = [Readers(SERVICE, service, path, content, plan.seconds)]
        for contestant, form in ((MEMORY, "memory"), (FILES, "files")):
            log = directory / f"{form}.log"
            server = stack.enter_context(processes.serving("benchmarks.servers.static", log, form, str(file)))
            readers.append(Readers(contestant, server, f"/{file.name}", content, plan.seconds))
        for each in readers:
            each.warm()
        rounds = alternate(readers, plan.rounds)
    return Cell(name, best(rounds, (MEMORY, FILES)), rounds)


@dataclass
class Readers:
    """A contestant: a server, and the path of what wrk gets from it."""

    name: str
    server: Server
    path: str
    content: bytes
    seconds: int

    def warm(self) -> None:
        if call(self.server.url, "GET", self.path, accept=MEDIA) != self.content:
            raise Unmeasured(f"{self.name} sends something else")
        self._pull(WARM_SECONDS)

    def turn(self) -> Sample:
        before, client_before = self.server.usage(), child_seconds()
        requests, seconds, p50, p99 = self._pull(self.seconds)
        client, busy = child_seconds() - client_before, self.server.usage().server - before.server
        after = self.server.settle()
        spent = {"server": after.server - before.server, "store": after.store - before.store, "wrk": client}
        beside = {f"{who} CPU, µs a pull": 1e6 * cpu / requests for who, cpu in spent.items()}
        beside |= {"server busy, %": 100 * busy / seconds, "wrk busy, %": 100 * client / seconds}
        moved = requests * len(self.content) / seconds
        return Sample(requests / seconds, {"p50 ms": p50, "p99 ms": p99, "GB/s": moved / 1e9} | beside)

    def _pull(self, seconds: int) -> tuple[int, float, float, float]:
        """Requests that were answered, seconds, and the 50th and 99th percentile of the latency in ms."""
        command = ["wrk", "-t1", f"-c{READERS}", f"-d{seconds}s", "--timeout", "30s", "-s", str(_SCRIPT)]
        done = subprocess.run([*command, self.server.url, "--", self.path], capture_output=True, text=True, check=False)
        found = _FIGURES.search(done.stdout)
        if found is None:
            raise Unmeasured(f"wrk failed on {self.name}: {done.stderr[-300:]}")
        requests, received, refused, broken = (int(found[i]) for i in (1, 3, 6, 7))
        if refused or broken or not requests:
            raise Unmeasured(f"{self.name}: of {requests} requests {refused} were refused, {broken} broke off")
        least = requests * len(self.content)
        if not least < received < (requests + READERS) * (len(self.content) + HEAD_BYTES):
            raise Unmeasured(f"{self.name}: {received} bytes came for {requests} requests")
        return requests, float(found[2]), float(found[4]), float(found[5])
