"""What `scale` measures on: a service with its processes told apart, and a cluster of Valkey nodes for it.

A service is a family of processes: the supervisor and its workers, where there are several, and the store that it
started. CPU time and memory are told by role, each role's processes together. What a process has used goes to its
parent when it ends (proc(5)), so that a fork that rewrote the log is counted with the store.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import redis

from benchmarks import processes
from benchmarks.measure import Unmeasured
from benchmarks.processes import Child, Server
from service.embedded import Embedded
from service.valkey import find_binary

SERVICE, STORE = "service", "store"
START_SECONDS = 20.0
QUIET_SECONDS = 15.0
_SLOTS = 16_384
_STORES = (b"valkey", b"redis")
# A bus is this far above its node's port.
_BUS = 10_000


class Spent(NamedTuple):
    """CPU seconds of the service's processes, and of the store's."""

    service: float
    store: float

    def since(self, before: "Spent") -> "Spent":
        return Spent(self.service - before.service, self.store - before.store)


@dataclass
class Site:
    """A service at work. `nodes` are the stores that it did not start itself: those of a cluster."""

    server: Server
    stores: Sequence["redis.Redis"]
    nodes: Sequence[Child] = ()

    def members(self) -> dict[str, list[Child]]:
        """The processes by their roles, as they are now."""
        found: dict[str, list[Child]] = {SERVICE: [], STORE: list(self.nodes)}
        for member in processes.family(self.server.pid):
            found[STORE if _is_store(member.pid) else SERVICE].append(member)
        return found

    def spent(self) -> Spent:
        members = self.members()
        return Spent(processes.cpu_seconds(members[SERVICE]), processes.cpu_seconds(members[STORE]))

    def quiet(self) -> Spent:
        """Waits until nothing is at work any more, or QUIET_SECONDS are over; what was spent by then."""
        deadline, used = time.monotonic() + QUIET_SECONDS, self.spent()
        while time.monotonic() < deadline:
            time.sleep(0.2)
            before, used = used, self.spent()
            if sum(used) - sum(before) < 0.03:
                break
        return used

    def resident(self, role: str) -> list[int]:
        """Bytes in memory now, of each process of the role."""
        return [processes.resident_memory(member.pid) for member in self.members()[role]]

    def peak(self, role: str) -> list[int]:
        return [processes.peak_memory(member.pid) for member in self.members()[role]]

    def forget_peaks(self) -> None:
        for members in self.members().values():
            for member in members:
                processes.forget_peak(member.pid)

    def store(self, section: str, name: str) -> list[int]:
        """A figure of INFO, of each store."""
        return [int(one.info(section)[name]) for one in self.stores]


@contextlib.contextmanager
def embedded(directory: Path, settings: Mapping[str, str] | None = None) -> Iterator[Site]:
    """A service on a store of its own in `directory`, which may be there from before."""
    directory.mkdir(exist_ok=True)
    url = Embedded(directory / "service").url
    with processes.service(directory, settings) as server, _client(url) as store:
        yield Site(server, [store])


@contextlib.contextmanager
def clustered(directory: Path, count: int, settings: Mapping[str, str] | None = None) -> Iterator[Site]:
    """A service on a cluster of `count` nodes with logs of their own, `everysec`."""
    directory.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        ports = _free_ports(count)
        nodes = [stack.enter_context(_node(directory / str(port), port)) for port in ports]
        stores = [stack.enter_context(_client(f"redis://127.0.0.1:{port}")) for port in ports]
        _join(stores, ports)
        given = {"RAVINE_REDIS_URL": f"redis://127.0.0.1:{ports[0]}"} | dict(settings or {})
        server = stack.enter_context(processes.service(directory, given))
        yield Site(server, stores, nodes)


def kill(members: Sequence[Child]) -> None:
    """As the machine would; returns when they are gone."""
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and any(_runs(member) for member in members):
        time.sleep(0.02)


def _runs(member: Child) -> bool:
    """A process that nobody has waited for yet is there, and has no program any more."""
    try:
        Path(f"/proc/{member.pid}/exe").readlink()
    except OSError:
        return False
    return True


def _is_store(pid: int) -> bool:
    try:
        return any(name in Path(f"/proc/{pid}/comm").read_bytes() for name in _STORES)
    except OSError:
        return False


@contextlib.contextmanager
def _client(url: str) -> Iterator["redis.Redis"]:
    with contextlib.closing(redis.Redis.from_url(url, protocol=2)) as client:
        yield client


@contextlib.contextmanager
def _node(directory: Path, port: int) -> Iterator[Child]:
    directory.mkdir(parents=True)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes", "--save", "", "--dir", "."]
    options += ["--appendonly", "yes", "--appendfsync", "everysec", "--cluster-node-timeout", "20000"]
    command = [str(find_binary()), *options]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield processes.family(process.pid)[0]
    finally:
        process.kill()
        process.wait()


def _join(stores: Sequence["redis.Redis"], ports: Sequence[int]) -> None:
    """Nodes that each have an equal part of the slots, and know each other."""
    bounds = [_SLOTS * place // len(stores) for place in range(len(stores) + 1)]
    for place, one in enumerate(stores):
        _eventually(one.ping)
        one.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[place], bounds[place + 1] - 1)
        one.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
    for one in stores[1:]:
        one.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
    _eventually(lambda: all(one.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for one in stores))


def _eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        time.sleep(0.05)
    raise Unmeasured("the nodes of the cluster did not find each other")


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in range(21_000 + time.time_ns() % 20_000, 55_000):
            pair = [stack.enter_context(socket.socket()) for _ in range(2)]
            with contextlib.suppress(OSError):
                for listening, number in zip(pair, (port, port + _BUS), strict=True):
                    listening.bind(("127.0.0.1", number))
                found.append(port)
            if len(found) == count:
                return found
    raise Unmeasured("there are no free ports for a cluster")
