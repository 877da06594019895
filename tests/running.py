"""The real server as a process of its own, as a user would start it."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 60


class Server:
    """`python -m service serve` on a free port. `arguments` are added to the command line; `root` has the code."""

    def __init__(
        self,
        data: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        port: int = 0,
        root: Path = ROOT,
    ) -> None:
        self.data = data
        self._root = root
        self._arguments = arguments
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("RAVINE_")}
        self._environment |= environment or {}
        self._port = port
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self.log = data.parent / f"{data.name}-{uuid.uuid4().hex[:8]}.log"

    def start(self) -> "Server":
        command = [sys.executable, "-m", "service", "serve", "--port", str(self._port), "--data", str(self.data)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *self._arguments], cwd=self._root, env=self._environment, stderr=log, stdout=log, text=True
            )
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
def serving(data: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A running server on a store of its own; both are gone afterwards."""
    server = Server(data, *arguments, environment=environment).start()
    try:
        yield server
    finally:
        server.stop()


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
