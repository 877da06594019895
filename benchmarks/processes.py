"""Servers as processes of their own: started, waited for, watched, and ended by their own process ids."""

import contextlib
import http.client
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from benchmarks.measure import Unmeasured

ROOT = Path(__file__).parent.parent
START_SECONDS = 60
STOP_SECONDS = 40
SETTLE_SECONDS = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Child(NamedTuple):
    """A process, and when it started: an id alone may belong to somebody else by the time it is used."""

    pid: int
    started: str


class Usage(NamedTuple):
    """CPU seconds since the start: of the server, and of the store that it started, forks included."""

    server: float
    store: float


class Server:
    """`python -m MODULE ARGUMENTS…`, which says on standard error where it listens: "listens on http://…"."""

    def __init__(self, module: str, log: Path, *arguments: str, settings: Mapping[str, str] | None = None) -> None:
        # What somebody set for a service of his own must not change what is measured.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAVINE_")}
        environment |= settings or {}
        self.log = log
        self._module = module
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, stdout=stream, stderr=stream
            )
        self._children: list[Child] = []
        try:
            self.url = self.wait_for(r"listens on (http://\S+)", START_SECONDS)
        except Unmeasured:
            self.stop()
            raise
        self._children = _children(self._process.pid)

    def wait_for(self, pattern: str, seconds: float) -> str:
        """The first group of `pattern` in the log. Raises Unmeasured if it does not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := re.search(pattern, self.log.read_text(errors="replace")):
                return found[1]
            time.sleep(0.02)
        tail = " / ".join(self.log.read_text(errors="replace").splitlines()[-3:])
        raise Unmeasured(f"{self._module} did not say {pattern!r} within {seconds:g} s; its last words: {tail}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def usage(self) -> Usage:
        stores = sum(_cpu_seconds(child.pid) for child in self._children if _alive(child))
        return Usage(_cpu_seconds(self.pid), stores)

    def settle(self) -> Usage:
        """Waits until nothing of this server is at work any more, or `SETTLE_SECONDS` are over; the usage then.

        So what one contestant still has to do behind its answers (a snapshot, the log) does not slow down the next.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        used = self.usage()
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, used = used, self.usage()
            if sum(used) - sum(before) < 0.03:
                break
        return used

    def stop(self) -> None:
        """SIGTERM, and waits; what does not end by itself is killed, the store that it started too."""
        if self._process.poll() is None:
            self._children = self._children or _children(self.pid)
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for child in self._children:
            if _alive(child):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)


@contextlib.contextmanager
def serving(module: str, log: Path, *arguments: str, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    server = Server(module, log, *arguments, settings=settings)
    try:
        yield server
    finally:
        server.stop()


def service(directory: Path, settings: Mapping[str, str] | None = None) -> contextlib.AbstractContextManager[Server]:
    """Ravine as `make serve` starts it, on a store of its own in `directory`: all but `settings` at its default."""
    log = directory / "service.log"
    return serving("service", log, "serve", "--port", "0", "--data", str(directory / "service"), settings=settings)


def replica(directory: Path, number: int) -> contextlib.AbstractContextManager[Server]:
    """One of several services on the one store in `directory`, which the first of them starts."""
    log = directory / f"replica{number}.log"
    return serving("service", log, "serve", "--port", "0", "--data", str(directory / "service"))


def echo(directory: Path) -> contextlib.AbstractContextManager[Server]:
    return serving("benchmarks.servers.echo", directory / "echo.log")


def one_hour(directory: Path) -> contextlib.AbstractContextManager[Server]:
    return serving("benchmarks.servers.one_hour", directory / "one_hour.log", str(directory / "one_hour"))


def child_seconds() -> float:
    """CPU seconds of the children that have ended: wrk's, which are waited for; servers live on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def call(
    url: str,
    method: str,
    path: str,
    body: bytes | None = None,
    media: str = "application/json",
    accept: str | None = None,
) -> bytes:
    """One request that is not measured; the reply's body. Raises Unmeasured for a status of 400 or more."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    with contextlib.closing(connection):
        headers = ({} if body is None else {"Content-Type": media}) | ({} if accept is None else {"Accept": accept})
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
    if response.status >= 400:
        raise Unmeasured(f"{method} {path}: {response.status} {content[:300].decode(errors='replace')}")
    return content


def family(pid: int) -> list[Child]:
    """A process and all that came of it, as they are now."""
    try:
        found = [Child(pid, _stat(pid)[19])]
    except OSError:
        return []
    for member in found:  # which grows meanwhile
        found += _children(member.pid)
    return found


def cpu_seconds(members: Iterable[Child]) -> float:
    """What they have used, as far as they still live."""
    return sum(_cpu_seconds(member.pid) for member in members if _alive(member))


def end_all(members: Iterable[Child]) -> None:
    """Kills those that still live."""
    for member in members:
        if _alive(member):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)


def peak_memory(pid: int) -> int:
    """The most that a process has had in memory so far, in bytes."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def forget_peak(pid: int) -> None:
    """The peak is from now on what it has now (proc(5), clear_refs). Raises Unmeasured where that is not allowed."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError as error:
        raise Unmeasured(f"the peak of a process's memory cannot be reset: {error.strerror}") from None


def resident_memory(pid: int) -> int:
    """What a process has in memory now, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the second, the name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _cpu_seconds(pid: int) -> float:
    """User and system time, that of children that ended included (proc(5), fields 14 to 17)."""
    return sum(map(int, _stat(pid)[11:15])) / _TICKS


def _children(pid: int) -> list[Child]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = _stat(int(path.name))
                if fields[1] == str(pid):
                    found.append(Child(int(path.name), fields[19]))
    return found


def _alive(child: Child) -> bool:
    try:
        return _stat(child.pid)[19] == child.started
    except OSError:
        return False
