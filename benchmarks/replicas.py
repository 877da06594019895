"""R1: small steps through a proxy with two replicas behind it, against the same proxy with one.

nginx takes the replica by a consistent hash of the session's id, so that each session has one that has it in memory.
Either side has a store of its own; the load is S1's. What two replicas are worth is seen where there is a core for each
process. On fewer they take the time from each other, so the CPU time that each process needs is told, and what the
ratio would be if that were all that bounds it: with a core for each, the busiest process is the bound.
"""

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes
from benchmarks.measure import Comparison, Plan, Result, Round, Row, Sample, Unmeasured, alternate, one_by_one
from benchmarks.processes import Child, Server, call, child_seconds
from benchmarks.small_steps import CONNECTIONS, SESSIONS, SIZE, WARM_SECONDS, Load

REPLICAS = 2
START_SECONDS = 10
TWO, ONE = f"{REPLICAS} replicas", "1 replica"
WRK, STORE, PROXY, REPLICA = "wrk", "store", "proxy", "replica"

ROWS = (
    Row(
        "R1",
        f"S1's steps through nginx and {REPLICAS} replicas (consistent hash of the session's id), one store",
        "the same through nginx and 1 replica",
        TWO,
        ONE,
        at_least=1.8,
    ),
)

_CONFIGURATION = """
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    map $uri $session {{
        default $uri;
        ~^/v1/sessions/(?<id>[^/]+) $id;
    }}
    upstream replicas {{
        hash $session consistent;
        {servers}
        keepalive {connections};
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


def run(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    return one_by_one(ROWS, rows, lambda row: _compare(row, plan))


def _compare(row: Row, plan: Plan) -> Comparison:
    for program in ("nginx", "wrk"):
        if shutil.which(program) is None:
            raise Unmeasured(f"{program} is not installed")
    with ExitStack() as stack:
        sides = [_side(stack, plan, name, count) for name, count in ((TWO, REPLICAS), (ONE, 1))]
        for side in sides:
            side.load.send(WARM_SECONDS)
        rounds = alternate(sides, plan.rounds)
        remarks = [side.load.verify() for side in sides]
    cores = os.cpu_count() or 1
    needed = REPLICAS + 3
    remarks.append(
        f"It ran on {cores} cores, which {needed} processes share: {REPLICAS} replicas, the store, nginx and wrk"
        + ("." if cores >= needed else ": the ratio is not what two replicas are worth where there are enough.")
    )
    remarks.append(_reckoned(rounds))
    return Comparison(row, "requests/s", rounds, remarks)


def _reckoned(rounds: Sequence[Round]) -> str:
    """The ratio, were CPU time all that bounds it, and every process had a core."""
    bounds = {}
    for name in (TWO, ONE):
        figures = _spent([turn.samples[name] for turn in rounds])
        busiest = max((who for who in figures if who != WRK), key=lambda who: figures[who])
        bounds[name] = (busiest, figures[busiest])
    ratio = bounds[ONE][1] / bounds[TWO][1] if bounds[TWO][1] else 0.0
    said = ", ".join(f"{name}: the {who} with {cpu:.0f} µs a request" for name, (who, cpu) in bounds.items())
    return (
        f"Reckoned from the CPU time, with a core for each process and a client that keeps up: {ratio:.2f}. The "
        f"busiest process sets the rate ({said}, of all requests)."
    )


def _spent(samples: Sequence[Sample]) -> dict[str, float]:
    """Process -> median µs of CPU a request, of all requests."""
    figures = {name.partition(" CPU")[0] for sample in samples for name in sample.beside if " CPU" in name}
    return {who: statistics.median(sample.beside[_figure(who)] for sample in samples) for who in figures}


def _figure(who: str) -> str:
    return f"{who} CPU, µs a request"


@dataclass
class Side:
    """A contestant: a proxy, its replicas, and the load on it."""

    name: str
    load: Load
    replicas: Sequence[Server]
    proxy: Sequence[Child]

    def turn(self) -> Sample:
        for replica in self.replicas:
            replica.settle()
        before, client = self._usage(), child_seconds()
        requests, seconds, p50, p99 = self.load.send(self.load.seconds)
        client = child_seconds() - client
        for replica in self.replicas:
            replica.settle()
        spent = {who: after - before[who] for who, after in self._usage().items()} | {WRK: client}
        beside = {_figure(who): 1e6 * cpu / requests for who, cpu in spent.items()}
        beside["wrk busy, %"] = 100 * client / seconds
        return Sample(requests / seconds, {"p50 ms": p50, "p99 ms": p99} | beside)

    def _usage(self) -> dict[str, float]:
        used = [replica.usage() for replica in self.replicas]
        named = {f"{REPLICA} {number}": each.server for number, each in enumerate(used, 1)}
        return named | {STORE: sum(each.store for each in used), PROXY: processes.cpu_seconds(self.proxy)}


def _side(stack: ExitStack, plan: Plan, name: str, count: int) -> Side:
    directory = plan.directory / f"R1-{count}"
    directory.mkdir()
    servers = [stack.enter_context(processes.replica(directory, number)) for number in range(count)]
    port, proxy = stack.enter_context(proxied(directory, [server.url for server in servers]))
    url = f"http://127.0.0.1:{port}"
    given = json.dumps({"optimizer": "adam", "params": {"w": [0.0] * SIZE}}).encode()
    ids = [json.loads(call(url, "POST", "/v1/sessions", given))["id"] for _ in range(SESSIONS)]

    def steps() -> int:
        return sum(json.loads(call(url, "GET", f"/v1/sessions/{id_}"))["step"] for id_ in ids)

    paths = [f"/v1/sessions/{id_}/steps" for id_ in ids]
    return Side(name, Load(name, servers[0], paths, plan.seconds, steps, url=url), servers, proxy)


@contextlib.contextmanager
def proxied(directory: Path, urls: Sequence[str]) -> Iterator[tuple[int, list[Child]]]:
    """nginx before these services; the port of it on loopback, and its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    configuration = directory / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(directory=directory, servers=servers, connections=CONNECTIONS, port=port)
    )
    command = ["nginx", "-p", str(directory), "-c", str(configuration), "-e", str(directory / "nginx.log")]
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    try:
        _await(process, port, directory / "nginx.log")
        yield port, processes.family(process.pid)
    finally:
        process.terminate()  # nginx ends its workers
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            processes.end_all(processes.family(process.pid))
            process.wait()


def _await(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    said = log.read_text(errors="replace")[-300:] if log.exists() else ""
    raise Unmeasured(f"nginx did not start: {said}")
