"""The command `ravine` in processes that start quickly: forked from one that has imported everything.

A start of the service is more than a second of CPU, nearly all of it imports; a fork of what has imported them is ready
after some 60 ms. Hundreds of servers and commands are started by the tests, and hundreds of kills are another minute's.
What is forked is a process like any other (a pid, descriptors, an event loop of its own) that does what the command
does from `main()` on, and it is killed like any other. What depends on the interpreter's own start, such as variables
that are read while modules are imported, is tested with a process that was started from nothing (tests/running.py).

`python -m tests.nursery` is the parent. It has one thread and no event loop, so that a fork copies nothing that is half
done. It is told on standard input, a JSON object a line, what to fork, and says who was born and who ended.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BORN_SECONDS = 30
_PR_SET_PDEATHSIG = 1


# -- in the tests ------------------------------------------------------------------------------------------------------


class Child:
    """A forked process, with as much of subprocess.Popen's surface as tests/running.py uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, returncode: int) -> None:
        self.returncode = returncode
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("ravine", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended: the number may be somebody else's by then."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The parent process, as its user sees it. Safe to be used by several threads."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAVINE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._asking = threading.Lock()
        self._born: queue.Queue[Child | None] = queue.Queue()
        self._alive: dict[int, Child] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def bear(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        errors: Path | None = None,
        given: Path | None = None,
    ) -> Child:
        """`ravine` with these arguments and these variables added.

        What it says goes to the end of `log`, what it says on standard error to the end of `errors`, if there is one;
        its standard input is what is in `given`.
        """
        asked = {
            "arguments": [*arguments],
            "environment": dict(environment),
            "given": str(given or os.devnull),
            "log": str(log),
            "errors": str(errors or log),
        }
        assert self._process.stdin is not None
        with self._asking:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            child = self._born.get(timeout=BORN_SECONDS)
            if child is None:
                self._born.put(None)  # for whoever asks next
                raise AssertionError("the nursery has ended; what it had to say is on standard error")
            return child

    def close(self) -> None:
        """Ends the parent, which ends all that live yet."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(BORN_SECONDS)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told: dict[str, Any] = json.loads(line)
            if "born" in told:
                child = self._alive[told["born"]] = Child(told["born"])
                self._born.put(child)
            else:
                self._alive.pop(told["ended"]).end(told["returncode"])
        self._born.put(None)


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    try:
        yield made
    finally:
        made.close()


@functools.cache
def shared() -> Nursery:
    """The one of this process, for whoever needs none of their own; it ends with the process."""
    made = Nursery()
    atexit.register(made.close)
    return made


# -- the parent --------------------------------------------------------------------------------------------------------


def _say(**told: int) -> None:
    os.write(1, (json.dumps(told) + "\n").encode())


def _become(asked: Mapping[str, Any]) -> None:
    """In the child: the command line, until it is over."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":  # nobody outlives tests that were themselves killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(asked["given"], os.O_RDONLY), 0)
    for number, name in ((1, asked["log"]), (2, asked["errors"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), number)
    os.environ.update(asked["environment"])
    sys.argv = ["ravine", *asked["arguments"]]
    from service.cli import main

    main()


def _reap(alive: set[int]) -> None:
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        alive.discard(pid)
        _say(ended=pid, returncode=os.waitstatus_to_exitcode(status))


def _asked(pending: bytearray) -> Iterator[dict[str, Any]]:
    """The whole lines of what has come."""
    while (end := pending.find(b"\n")) >= 0:
        line = bytes(pending[:end])
        del pending[: end + 1]
        yield json.loads(line)


def _import_all() -> None:
    """What a server has in the end, those too that are loaded by name at its start."""
    import uvicorn.lifespan.on
    import uvicorn.loops.auto
    import uvicorn.protocols.http.auto  # noqa: F401

    import service.cli  # noqa: F401


def _tend() -> None:
    """Until standard input is closed. In a child it ends by the SystemExit of the command."""
    _import_all()
    gc.freeze()  # or the first collection of each child would copy all of it
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides when it is over
    events = selectors.DefaultSelector()
    events.register(0, selectors.EVENT_READ)
    events.register(awake, selectors.EVENT_READ)
    alive, pending = set[int](), bytearray()
    while True:
        for found, _ in events.select():
            if found.fd != 0:
                awake.recv(4096)
                continue
            piece = os.read(0, 1 << 16)
            if not piece:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                return
            pending += piece
        for asked in _asked(pending):
            pid = os.fork()
            if pid == 0:
                events.close()
                awake.close()
                wake.close()
                _become(asked)
                return
            alive.add(pid)
            _say(born=pid)
        _reap(alive)


if __name__ == "__main__":
    _tend()
