"""The process above the workers: binds the port, starts them, starts those again that die, and stops all.

Workers are forked from it, and it has imported everything that they need: a fork is ready in some 60 ms where a start
from nothing takes more than a second, and what was imported is in memory once. So it has neither threads nor an event
loop, and does nothing but wait.

- **The start.** The first worker alone, the others once it serves: what is wrong with the settings or the store is said
  once. One that ends by itself before any has served ends all, with its exit code; that is how `ravine serve` ends
  where there is one process.
- **A death.** It is started again at once, and after a pause that doubles if that was soon after its start. If it does
  not come to serve in ATTEMPTS, and nobody else does, all is given up: whoever started the service has to know.
- **The end.** SIGTERM or SIGINT: all are told, and drain side by side. What is not over STOP_SECONDS after the time
  that requests may take is killed. If the supervisor itself is killed, the workers see a pipe end, and stop as if told;
  the last of them stops the embedded store.
"""

import contextlib
import gc
import os
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from service import logs, serving
from service.settings import Settings
from service.workers.berth import Berth

log = structlog.get_logger("ravine.workers")

STEADY: Final = 5.0  # seconds after which a worker's death is no failure of its start
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
ATTEMPTS: Final = 5  # to start one, in a row, while nobody else serves
STOP_SECONDS: Final = 60.0  # beside RAVINE_DRAIN_SECONDS: the store may have much to save
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def run(settings: Settings) -> int:
    """Serves with `settings.workers` processes until it is told to stop; gives the exit code."""
    try:
        sockets = bound(settings.host, settings.port)
    except OSError as error:
        logs.say(f"ravine: {settings.host}, port {settings.port}: {error}")
        return 1
    directory = Path(tempfile.mkdtemp(prefix="ravine-"))  # 0700
    try:
        if not Berth(settings.workers, settings.workers, directory, -1, -1).fits:
            logs.say(f"ravine: {directory} is too long for a unix socket: let TMPDIR name a shorter directory")
            return 1
        return Supervisor(settings, sockets, directory).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def bound(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`, with one port for all; nobody listens yet. Raises OSError."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            made = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address[0], port, *address[2:]))
            port = port or made.getsockname()[1]
    except OSError:
        for made in sockets:
            made.close()
        raise
    return sockets


class _Child:
    """One place among the workers, and the process that has it, if any."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.ready = False
        self.told = -1  # the end of the pipe on which it says so
        self.began = 0.0
        self.failures = 0  # soon after its start, in a row
        self.attempts = 0  # to start it, since it served
        self.not_before = 0.0
        self.killed = False


class Supervisor:
    """`sockets` are bound, and `directory` is nobody else's."""

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket], directory: Path) -> None:
        self._settings = settings
        self._sockets = list(sockets)
        self._address = sockets[0].getsockname()[:2]
        self._directory = directory
        self._children = [_Child(number) for number in range(settings.workers)]
        self._alive, self._living = os.pipe()  # the second end is never written to
        self._events = selectors.DefaultSelector()
        self._awake, self._wake = socket.socketpair()
        self._served = False  # some worker did
        self._greeted = False
        self._code = 0
        self._stopping = 0.0  # since when
        self._asked = False

    def run(self) -> int:
        """Until all workers are gone."""
        self._listen_to_signals()
        gc.collect()
        gc.freeze()  # or the first collection of each worker would copy all of it
        self._start_due()
        while not self._stopping or any(child.pid for child in self._children):
            for key, _ in self._events.select(self._pause()):
                self._hear(key)
            self._reap()
            if self._asked and not self._stopping:
                logs.say("ravine: stopping; requests under way are answered first")
                self._stop()
            if self._stopping:
                self._kill_late()
            else:
                self._start_due()
        return self._code

    # What comes

    def _listen_to_signals(self) -> None:
        for end in (self._awake, self._wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._events.register(self._awake, selectors.EVENT_READ)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _hear(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            self._awake.recv(4096)
            return
        child: _Child = key.data
        said = os.read(child.told, 1)
        self._forget_pipe(child)
        if said:
            child.ready = self._served = True
            if not self._greeted and all(each.ready for each in self._children):
                self._greeted = True
                serving.greet(self._settings, *self._address)

    def _forget_pipe(self, child: _Child) -> None:
        if child.told >= 0:
            self._events.unregister(child.told)
            os.close(child.told)
            child.told = -1

    def _pause(self) -> float | None:
        """Seconds until there is something to do, if nothing comes; None: never."""
        now = time.monotonic()
        if self._stopping:
            return max(0.05, self._deadline - now)
        waiting = [child.not_before - now for child in self._children if not child.pid and self._may_start(child)]
        return max(0.0, min(waiting)) if waiting else None

    # Starting

    def _may_start(self, child: _Child) -> bool:
        return self._served or child.number == 0

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if self._stopping:  # the one before was one too many
                return
            if not child.pid and child.not_before <= now and self._may_start(child):
                self._start(child)

    def _start(self, child: _Child) -> None:
        child.began = time.monotonic()
        try:
            self._fork(child)
        except OSError as error:  # no memory, or no process more; the others go on
            log.warning("a worker cannot be forked", number=child.number, reason=str(error))
            self._mourn(child, 1)

    def _fork(self, child: _Child) -> None:
        """Raises OSError."""
        told, ready = os.pipe()
        # A signal between the fork and the worker's own handlers would be answered by ours, in both.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                os.close(told)
                self._become(Berth(child.number, len(self._children), self._directory, self._alive, ready))
        except OSError:
            os.close(told)
            raise
        finally:
            os.close(ready)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        child.pid, child.ready, child.told = pid, False, told
        self._events.register(told, selectors.EVENT_READ, child)

    def _become(self, berth: Berth) -> None:
        """In the child: a worker, until it is over."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _leave)
            self._let_go()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            logs.configure(self._settings.log_format, worker=berth.number)
            code = serving.run(self._settings, berth, self._sockets)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            log.exception("a worker failed")  # or nobody would learn why
            raise
        finally:
            with contextlib.suppress(OSError):
                self._directory.rmdir()  # where the supervisor is gone, and this is the last
            # Not through the frames above, which are the supervisor's.
            os._exit(code)

    def _let_go(self) -> None:
        """Of the supervisor's own files."""
        self._events.close()
        self._awake.close()
        self._wake.close()
        os.close(self._living)
        for child in self._children:
            if child.told >= 0:
                os.close(child.told)

    # Ending

    def _reap(self) -> None:
        for child in self._children:
            if not child.pid:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                child.pid = 0
                self._forget_pipe(child)
                self._mourn(child, os.waitstatus_to_exitcode(status))

    def _mourn(self, child: _Child, code: int) -> None:
        """It has ended, with this code; below 0: by that signal."""
        ready, child.ready = child.ready, False
        if self._stopping:
            if ready and code:  # one that was starting says that it could not
                self._code = self._code or 1
            return
        lived = time.monotonic() - child.began
        child.failures = 0 if ready and lived >= STEADY else child.failures + 1
        child.attempts = 0 if ready else child.attempts + 1
        if not self._served and code >= 0:
            self._give_up(code)  # 0: told to stop while it started
            return
        if child.attempts >= ATTEMPTS and not any(other.ready for other in self._children):
            logs.say(f"ravine: worker {child.number} could not be started in {child.attempts} attempts")
            self._give_up(code if code > 0 else 1)
            return
        pause = 0.0 if not child.failures else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (child.failures - 1))
        child.not_before = time.monotonic() + pause
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.warning("a worker ended; it is started again", number=child.number, by=how, seconds=round(pause, 1))

    def _give_up(self, code: int) -> None:
        self._code = code
        self._stop()

    @property
    def _deadline(self) -> float:
        return self._stopping + self._settings.drain_seconds + STOP_SECONDS

    def _stop(self) -> None:
        self._stopping = time.monotonic()
        for each in self._sockets:
            each.close()  # or who comes now would wait for us
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)

    def _kill_late(self) -> None:
        if time.monotonic() < self._deadline:
            return
        for child in self._children:
            if child.pid and not child.killed:
                child.killed = True
                log.error("a worker did not stop in time, and is killed", number=child.number)
                os.kill(child.pid, signal.SIGKILL)
        self._code = self._code or 1


def _leave(*_: object) -> None:
    raise SystemExit(0)
