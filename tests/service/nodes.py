"""A cluster of the tests' own: nodes that share the slots, spare ones, replicas, slots that move, nodes that die."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from tests.running import valkey_binary

SLOTS = 16384
PATIENCE = 20.0


class Member:
    """A node on a port of its own; it keeps its directory, and who it is, when it dies."""

    def __init__(self, directory: Path, port: int, *options: str) -> None:
        directory.mkdir(parents=True)
        self.port = port
        self.client = redis.Redis(port=port, protocol=2, socket_timeout=10)
        self._directory, self._options = directory, options
        self.process = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--cluster-enabled", "yes", "--save", ""]
        options += ["--dir", ".", "--cluster-node-timeout", "2000", "--repl-diskless-sync-delay", "0", *self._options]
        quiet = subprocess.DEVNULL
        return subprocess.Popen([valkey_binary(), *options], cwd=self._directory, stdout=quiet, stderr=quiet)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def id(self) -> str:
        found: str = self.call("CLUSTER MYID").decode()
        return found

    def call(self, *command: str | int) -> Any:
        return self.client.execute_command(*command)

    def calls(self, command: str) -> int:
        """How often it has executed `command`."""
        return int(self.client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        """After `kill`."""
        self.process = self._started()
        eventually(self.client.ping)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError("it did not come to be")


@contextlib.contextmanager
def members(directory: Path, *options: str, spare: int = 0) -> Iterator[list[Member]]:
    """Three nodes that share the slots, and `spare` ones that have none."""
    ports = free_ports(3 + spare)
    with contextlib.ExitStack() as stack:
        found: list[Member] = []
        for port in ports:
            found.append(Member(directory / str(port), port, *options))
            stack.callback(found[-1].kill)
            stack.callback(found[-1].client.close)
        bounds = (0, 5461, 10923, SLOTS)
        for i, one in enumerate(found):
            eventually(one.client.ping)
            if i < 3:
                one.call("CLUSTER", "ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
            one.call("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        for one in found[1:]:
            one.call("CLUSTER", "MEET", "127.0.0.1", ports[0])
        eventually(lambda: all(settled(one, len(ports)) for one in found))
        yield found


def settled(member: Member, nodes: int) -> bool:
    info = member.call("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[str]:
    """The address of three nodes that share the slots."""
    with members(directory) as found:
        yield found[0].url


def replicates(replica: Member, primary: Member) -> None:
    """Makes a spare node a replica that has all, and that its primary knows of."""
    eventually(lambda: replica.call("CLUSTER", "REPLICATE", primary.id))
    eventually(lambda: replica.client.info("replication").get("master_link_status") == "up")
    eventually(lambda: primary.call("CLUSTER", "REPLICAS", primary.id))


def begin_moving(slot: int, source: Member, target: Member) -> None:
    """The keys of the slot are at `target`; the slot is `source`'s still."""
    target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
    keys = source.call("CLUSTER", "GETKEYSINSLOT", slot, 1000)
    if keys:
        source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)


def end_moving(slot: int, source: Member, target: Member, among: Sequence[Member]) -> None:
    for one in (target, source, *among):
        one.call("CLUSTER", "SETSLOT", slot, "NODE", target.id)
    # Two nodes that take slots over one right after the other may do so in one epoch, and undo each other's.
    eventually(lambda: len({epochs(one) for one in among}) == 1)


def epochs(member: Member) -> frozenset[tuple[str, str]]:
    """The epoch of each node as this one sees it. Raises RedisError where two have the same."""
    found = frozenset((address, told["epoch"]) for address, told in member.call("CLUSTER NODES").items())
    if len({epoch for _, epoch in found}) < len(found):
        raise redis.RedisError("two nodes have one epoch")
    return found


def move(slot: int, source: Member, target: Member, among: Sequence[Member]) -> None:
    begin_moving(slot, source, target)
    end_moving(slot, source, target, among)


def free_ports(count: int) -> list[int]:
    """Ports whose buses, 10,000 above, are free too."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in range(21_000 + time.time_ns() % 20_000, 55_000):
            pair = [stack.enter_context(socket.socket()) for _ in range(2)]
            with contextlib.suppress(OSError):
                for listening, number in zip(pair, (port, port + 10_000), strict=True):
                    listening.bind(("127.0.0.1", number))
                found.append(port)
            if len(found) == count:
                return found
    pytest.skip("there are no free ports for a cluster")


def home(key: str, among: Sequence[Member]) -> Member:
    """Which of the first three has the key, as the slots were shared at first."""
    slot = key_slot(key.encode())
    return among[0] if slot < 5461 else among[1] if slot < 10923 else among[2]
