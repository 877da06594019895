"""The real server and its commands as processes of their own; forked (tests/nursery.py), or started as a user would."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.nursery import Child, shared

ROOT = Path(__file__).parent.parent
START_SECONDS = 60


def quiet() -> dict[str, str]:
    """The variables of this process but those of the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAVINE_")}


class Server:
    """`ravine serve` on a free port. `arguments` are added to the command line; `root` has the code.

    It is a fork of what has imported everything. `fresh` makes it `python -m service serve`, started from nothing; and
    so is what has other code, or variables that are not the service's own: they may be read by an import.
    """

    def __init__(
        self,
        data: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        port: int = 0,
        root: Path = ROOT,
        fresh: bool = False,
    ) -> None:
        self.data = data
        self._root = root
        self._arguments = arguments
        self._environment = environment or {}
        self._port = port
        self._fresh = fresh or root != ROOT or not all(name.startswith("RAVINE_") for name in self._environment)
        self.process: subprocess.Popen[str] | Child | None = None
        self.url = ""
        self.log = data.parent / f"{data.name}-{uuid.uuid4().hex[:8]}.log"

    def start(self) -> "Server":
        arguments = ["serve", "--port", str(self._port), "--data", str(self.data), *self._arguments]
        if self._fresh:
            command, environment = [sys.executable, "-m", "service", *arguments], quiet() | self._environment
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    command, cwd=self._root, env=environment, stderr=log, stdout=log, text=True
                )
        else:
            self.log.touch()
            self.process = shared().bear(arguments, self._environment, self.log)
        self.url = self._wait_for_url()
        return self

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        started = self.log.stat().st_size if self.url else 0
        while time.monotonic() < deadline:
            found = re.findall(r"Ravine listens on (https?://\S+)", self.log.read_text()[started:])
            if found:
                return str(found[-1])
            if self.process is None or self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)  # type: ignore[arg-type]

    def kill(self) -> None:
        """As the machine would: no goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restart(self) -> "Server":
        self.log.write_text("")
        return self.start()

    def stop(self, seconds: float = 40) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def valkey_pid(self) -> int:
        """The process id of the embedded store, asked of itself."""
        return int(re.findall(r"process_id:(\d+)", self.valkey("INFO", "server"))[0])

    def valkey(self, *command: str) -> str:
        """One command to the embedded store, spoken by hand."""
        import redis

        with contextlib.closing(redis.Redis.from_url(self.store_url(), decode_responses=True, protocol=2)) as client:
            reply = client.execute_command(*command)
        if isinstance(reply, dict):
            return "\n".join(f"{name}:{value}" for name, value in reply.items())
        return str(reply)

    def store_url(self) -> str:
        from service.embedded import Embedded

        return Embedded(self.data).url


@contextlib.contextmanager
def serving(
    data: Path, *arguments: str, environment: dict[str, str] | None = None, fresh: bool = False
) -> Iterator[Server]:
    """A running server on a store of its own; both are gone afterwards."""
    server = Server(data, *arguments, environment=environment, fresh=fresh).start()
    try:
        yield server
    finally:
        server.stop()


def ravine(*arguments: str | Path, answer: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, forked; `variables` are the service's, such as RAVINE_DATA."""
    with tempfile.TemporaryDirectory() as directory:
        given, said, errors = (Path(directory) / name for name in ("given", "said", "errors"))
        given.write_text(answer)
        child = shared().bear([str(argument) for argument in arguments], variables, said, errors=errors, given=given)
        try:
            code = child.wait(60)
        finally:
            child.kill()
        return subprocess.CompletedProcess(arguments, code, said.read_text(), errors.read_text())


@contextlib.contextmanager
def redis_server(directory: Path, *arguments: str, binary: str | None = None) -> Iterator[str]:
    """A store of the tests' own on a unix socket: Valkey, or redis-server where `binary` says so."""
    directory.mkdir(parents=True, exist_ok=True)
    socket = directory / "s.sock"
    command = [binary or valkey_binary(), "--port", "0", "--unixsocket", str(socket), "--dir", str(directory)]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    try:
        _wait_for(lambda: socket.exists(), process)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait()


def valkey_binary() -> str:
    from service.valkey import find_binary

    return str(find_binary())


def redis_binary() -> str | None:
    return shutil.which("redis-server")


def _wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        if condition():  # type: ignore[operator]
            return
        select.select([], [], [], 0.02)
    raise AssertionError("the store did not start")
