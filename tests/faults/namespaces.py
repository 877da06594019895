"""Networks and file systems of a test's own, in namespaces without names.

A namespace here belongs to a thread, and to what that thread starts: threads and processes inherit it. It has no name,
so the kernel takes it away, with its interfaces and mounts, when the last process in it has ended, however the test
ended. Linux, as root; `Unpermitted` says what is missing.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_NEWNS, _NEWNET = 0x00020000, 0x40000000  # CLONE_NEWNS, CLONE_NEWNET of sched.h
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_OWN = "/proc/thread-self/ns/net"


class Unpermitted(Exception):
    """What a scenario needs is not there, or not allowed to this user."""


def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives, from a thread of its own."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _system(call: str, *arguments: object) -> None:
    """Raises Unpermitted."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), call)
    except (OSError, AttributeError):
        raise Unpermitted(f"there is no {call} on this system") from None
    if function(*arguments) != 0:
        raise Unpermitted(f"{call}: {os.strerror(ctypes.get_errno())}")


def run(*command: str) -> None:
    """Raises Unpermitted."""
    if shutil.which(command[0]) is None:
        raise Unpermitted(f"there is no {command[0]} here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unpermitted(f"{' '.join(command)}: {done.stderr.strip()}")


class Network:
    """A network with nothing in it but its loopback."""

    def __init__(self) -> None:
        """Raises Unpermitted."""

        def make() -> int:
            _system("unshare", _NEWNET)
            run("ip", "link", "set", "lo", "up")
            return os.open(_OWN, os.O_RDONLY)

        self._file = in_thread(make)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread's sockets, and the processes it starts, are in the network."""
        home = os.open(_OWN, os.O_RDONLY)
        try:
            _system("setns", self._file, _NEWNET)
            try:
                yield
            finally:
                _system("setns", home, _NEWNET)
        finally:
            os.close(home)

    def run(self, *command: str) -> None:
        with self.inside():
            run(*command)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        os.close(self._file)


class Wire:
    """Two networks, `left` at 10.77.0.1 and `right` at 10.77.0.2, and the cable between them."""

    LEFT, RIGHT = "10.77.0.1", "10.77.0.2"

    def __init__(self) -> None:
        """Raises Unpermitted."""
        self.left = Network()
        try:
            self.right = Network()
        except Unpermitted:
            self.left.close()
            raise

    def lay(self) -> None:
        """Raises Unpermitted."""
        peer = ("peer", "name", "cable", "netns", self.right.path)
        self.left.run("ip", "link", "add", "cable", "type", "veth", *peer)
        for network, address in ((self.left, self.LEFT), (self.right, self.RIGHT)):
            network.run("ip", "address", "add", f"{address}/24", "dev", "cable")
            network.run("ip", "link", "set", "cable", "up")

    def unplug(self) -> None:
        """Both ends see that the cable is dead."""
        self.left.run("ip", "link", "set", "cable", "down")

    def plug(self) -> None:
        self.left.run("ip", "link", "set", "cable", "up")

    def swallow(self) -> None:
        """What is sent vanishes, and nobody is told. Raises Unpermitted."""
        self.right.run("iptables", "-A", "INPUT", "-i", "cable", "-j", "DROP")
        self.right.run("iptables", "-A", "OUTPUT", "-o", "cable", "-j", "DROP")

    def deliver(self) -> None:
        self.right.run("iptables", "-F")

    def close(self) -> None:
        self.left.close()
        self.right.close()


@contextlib.contextmanager
def wired(*, swallows: bool = False) -> Iterator[Wire]:
    """`swallows`: it must be able to. Raises Unpermitted."""
    made = Wire()
    try:
        made.lay()
        if swallows:
            made.swallow()
            made.deliver()
        yield made
    finally:
        made.close()


def with_small_disk(directory: Path, size: str, work: Callable[[], T]) -> T:
    """What `work` gives, for which, and for whatever it starts, `directory` is an empty disk of `size` ("8m").

    Raises Unpermitted.
    """

    def mounted() -> T:
        _system("unshare", _NEWNS)
        _system("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        directory.mkdir(parents=True, exist_ok=True)
        options = f"size={size},mode=700".encode()
        _system("mount", b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options)
        return work()

    return in_thread(mounted)
