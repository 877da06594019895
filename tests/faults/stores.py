"""Stores of the tests' own that die, fall behind and are taken over, behind addresses that stay.

`StoreServer` is one Valkey that is killed and started again on its data. `Forwarder` is a TCP address that leads to
whichever server it was last told: what a failover does by a virtual address or a DNS name. It can also be held, so that
what was sent is neither delivered nor refused, and cut. `Pair` is a primary and a replica whose link goes through a
forwarder: SIGSTOP alone would not make the replica stale, since what its kernel had received is read after SIGCONT.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.running import valkey_binary

Address = tuple[str, int]
LOOPBACK = "127.0.0.1"
STORE_SECONDS = 20.0
# As a store should be, and as one that has nothing when it comes back.
DURABLE = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
AT_ONCE = ("--repl-diskless-sync-delay", "0")  # a replica that comes gets all, without a wait for more of them
VOLATILE = ("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction")


def until(condition: Callable[[], Any], what: str, seconds: float = STORE_SECONDS) -> Any:
    """What `condition` gives as soon as it is something. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError(f"within {seconds:g} s it did not come about that {what}")


def free_port(host: str = LOOPBACK) -> int:
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class StoreServer:
    """A Valkey on a TCP port, with `options` of valkey.conf (`"--save", ""`); it keeps its directory when it dies."""

    def __init__(self, directory: Path, *options: str, host: str = LOOPBACK, binary: str | None = None) -> None:
        self.directory, self.options = directory, options
        directory.mkdir(parents=True, exist_ok=True)
        self.address: Address = (host, free_port(host))
        self._binary = binary or valkey_binary()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return "redis://{}:{}".format(*self.address)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *more: str) -> "StoreServer":
        """Returns once it has loaded its data. Raises TimeoutError."""
        host, port = self.address
        base = ("--port", str(port), "--bind", host, "--protected-mode", "no", "--dir", str(self.directory))
        with (self.directory / "log").open("a") as log:
            command = [self._binary, *base, *self.options, *more]
            # The server refuses to start under a locale that is not installed.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "LC_ALL": "C"})
        until(self._loaded, f"the store in {self.directory} answers")
        return self

    def _loaded(self) -> bool:
        try:
            with self.client() as client:
                return not client.info("persistence")["loading"]
        except (redis.RedisError, OSError):
            return False

    def client(self) -> redis.Redis:
        host, port = self.address
        return redis.Redis(host=host, port=port, protocol=2, socket_timeout=10, retry=Retry(NoBackoff(), 0))

    def call(self, *command: str | int) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def info(self, section: str) -> dict[str, Any]:
        with self.client() as client:
            found: dict[str, Any] = client.info(section)
            return found

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As the machine would: no goodbye. One that has ended already is none the worse."""
        if self._process is not None:
            self._process.kill()  # which ends a stopped process too
            self._process.wait()

    def wipe(self) -> None:
        """A machine that comes back has nothing of what it had."""
        for path in sorted(self.directory.rglob("*"), reverse=True):
            if path.name != "log":
                path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def storing(directory: Path, *options: str, binary: str | None = None) -> Iterator[StoreServer]:
    server = StoreServer(directory, *options, binary=binary)
    try:
        yield server.start()
    finally:
        server.kill()


class Forwarder:
    """A TCP address that leads to `target`; None: whoever comes is turned away."""

    def __init__(self, target: Address | None = None) -> None:
        self.target = target
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address: Address = self._listener.getsockname()
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return "redis://{}:{}".format(*self.address)

    def hold(self) -> None:
        """Nothing goes through from now on; nobody is told."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def cut(self) -> int:
        """Breaks all connections off. What was held is gone with them. Returns how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # close alone would not wake a thread that receives
        return len(pairs)

    def lead(self, target: Address | None) -> int:
        """To another server, with no connection left to the one before. Returns how many were cut."""
        self.target = target
        cut = self.cut()
        self.release()
        return cut

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.lead(None)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            target = self.target
            try:
                if target is None:
                    raise ConnectionRefusedError
                server = socket.create_connection(target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (client, server)
            with self._lock:
                self._pairs.append(pair)
            if target != self.target:  # led elsewhere in between, and cut() has not seen this one
                self.cut()
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._pump, args=(source, sink, pair), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                self._open.wait()
                with self._lock:
                    if pair not in self._pairs:  # cut while it was held
                        break
                sink.sendall(piece)
        with self._lock:
            if pair in self._pairs:
                self._pairs.remove(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            if end is source:
                end.close()


@contextlib.contextmanager
def forwarding(target: Address | None = None) -> Iterator[Forwarder]:
    made = Forwarder(target)
    try:
        yield made
    finally:
        made.close()


class Pair:
    """A primary and its replica. `front` is where services find whichever is the primary, `link` carries the log."""

    def __init__(self, directory: Path) -> None:
        options = (*VOLATILE, *AT_ONCE)
        self.primary, self.replica = (StoreServer(directory / name, *options) for name in ("one", "two"))
        self.front, self.link = Forwarder(), Forwarder()

    def start(self) -> "Pair":
        self.primary.start()
        self.front.lead(self.primary.address)
        self._follow()
        return self

    def _follow(self) -> None:
        """Starts the replica from nothing, and waits until it has all."""
        self.link.lead(self.primary.address)
        self.replica.start("--replicaof", *map(str, self.link.address))
        until(lambda: self.replica.info("replication")["master_link_status"] == "up", "the replica follows")
        self.synchronise()

    def synchronise(self) -> None:
        """Returns once the replica has all that the primary had when this was called."""
        offset = self.primary.info("replication")["master_repl_offset"]
        until(lambda: self.replica.info("replication")["slave_repl_offset"] >= offset, "the replica has caught up")

    def hold(self) -> None:
        """From now on the replica hears nothing, and the primary does not know."""
        self.replica.signal(signal.SIGSTOP)
        self.link.hold()

    def fail_over(self) -> StoreServer:
        """The primary dies, and the replica is the primary, with what it has. Nobody is led to it yet."""
        self.front.lead(None)
        self.primary.kill()
        self.link.lead(None)
        self.replica.signal(signal.SIGCONT)
        self.replica.call("REPLICAOF", "NO", "ONE")
        self.primary, self.replica = self.replica, self.primary
        return self.primary

    def lead(self) -> None:
        """Services find the one that took over."""
        self.front.lead(self.primary.address)

    def rejoin(self) -> None:
        """Who was the primary comes back as the replica of the one that took over."""
        self._follow()

    def close(self) -> None:
        for forwarder in (self.front, self.link):
            forwarder.close()
        for server in (self.primary, self.replica):
            server.kill()


@contextlib.contextmanager
def pair(directory: Path) -> Iterator[Pair]:
    made = Pair(directory)
    try:
        yield made.start()
    finally:
        made.close()
