"""A private Valkey as a child process: the store of a service that was given no URL.

There is one storage path, the real one, so a laptop runs the same server as production, only closer: on a unix
socket in a directory that nobody else can enter, with no TCP port.

**The server outlives the process that started it.** An API process that is killed leaves it running, and the next
one attaches; several may share one directory. Whoever finds no server starts it, and two locks in the directory keep
that safe:

- `valkey.lock` is held while an API process looks and decides. It is never held across loading.
- `valkey.alive` is held by the server itself: it inherits the locked descriptor, and the kernel lets go when the
  server, and the last child it forked to save, is gone. A pid in a file may belong to someone else by now, and means
  nothing in another container; a lock that can be taken proves that nothing writes to these files any more.

**What lies on disk decides how a server is started; what was asked for is applied after it has loaded.** A server
of version 7 or newer started with `appendonly yes` beside nothing but a `dump.rdb` loads *nothing*, and with
`appendonly no` beside a log it ignores the log. So a log on disk is always loaded as a log, a dump as a dump, and the
change of durability is a CONFIG SET on the loaded server. A log that is no longer written is moved away at once, or
it would win over the newer dump at the next start.

Needs valkey-server or redis-server 7 or newer (an older one refuses `appenddirname`, rather than load nothing).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.valkey import (
    DIRECTIVES,
    ENVIRONMENT,
    LOG_DIRECTORY,
    RETIRED_LOG,
    EmbeddedFailed,
    LogSync,
    find_binary,
    make_private,
    move_log_away,
    open_pidfd,
    pause_after,
    socket_path,
    try_lock,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping

Durability = Literal["snapshot", "everysec", "always"]
_Answer = Literal["ready", "loading", "busy", "down"]

# "up to the interval" of docs/guarantees.md is this minute.
_SAVE_POINTS = "60 1"
_MESSAGES_BYTES = 4 << 20
_EXIT_SECONDS = 60.0
# How long a server that is killed while it starts is started again.
_KILLED_SECONDS = 30.0


class Embedded:
    """One private server in the directory `data`, shared by all API processes that name the same directory.

    `durability` is what a crash of the machine may cost: `snapshot` (a dump each minute: up to a minute),
    `everysec` (a log, fsynced each second) or `always` (fsynced before each reply). The last process to start decides.
    `on_progress` is told, one sentence at a time, of loading, switching and restarts. `binary` overrides
    `find_binary()`; `options` are further directives of valkey.conf, used when this process starts the server.

    All methods raise EmbeddedFailed. To be used from one event loop.
    """

    def __init__(
        self,
        data: Path,
        durability: Durability = "everysec",
        *,
        on_progress: Callable[[str], None] | None = None,
        binary: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.data = data.expanduser().resolve()
        self.durability = durability
        self._say = on_progress or (lambda _sentence: None)
        self._binary = binary
        self._options = dict(options or {})
        self._socket = socket_path(self.data)
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._progress = ""
        self._running = False
        self._task: asyncio.Task[None] | None = None
        # Kept open from start to stop: its name in CLIENT LIST tells other processes that we are attached.
        self._presence = self._client(timeout=1.0)

    @property
    def url(self) -> str:
        """`unix://<socket path>`, for `redis.asyncio.from_url`: percent-encoded, as that function decodes it."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def client_name(self) -> str:
        """Name, or prefix before a colon, for every connection of this process: stop() counts all others as users."""
        return f"ravine:{os.getpid()}"

    async def start(self) -> None:
        """Attach to the server in the directory, or start it; return when it has loaded and is as durable as asked."""
        self._running = True
        await self._shared(self._bring_up)

    async def ensure(self) -> None:
        """Return once the server lives and has loaded: after one INFO, without a fork, unless it has died.

        A server that lives but takes over a second to reply is left alone. Concurrent calls share one attempt; several
        processes are kept apart by the lock.
        """
        if not self._running:
            raise EmbeddedFailed(f"The embedded server in {self.data} was stopped, or never started")
        await self._shared(self._revive)

    async def watch(self) -> None:
        """Start the server again whenever it dies, until cancelled. Failures are told and tried again."""
        pause = 0.1
        while self._running:
            try:
                await self._until_death()
                if not self._running:
                    return
                self._say(f"The embedded server in {self.data} ended; starting it again on its data")
                await self.ensure()
                pause = 0.1
            except (EmbeddedFailed, OSError) as failure:  # OSError: no descriptor is left to look with
                self._say(f"{failure}\nTrying again in {pause:.1f} s")
                await asyncio.sleep(pause)
                pause = min(10.0, 2 * pause)

    async def flush(self) -> None:
        """Sync the log to the disk every second or sooner, until cancelled: what durability "everysec" promises."""
        sync, pause = LogSync(self.data / LOG_DIRECTORY), 1.0
        while self.durability == "everysec":
            await asyncio.sleep(pause)
            try:
                pause = pause_after(pause, await asyncio.to_thread(sync))
            except OSError as error:
                pause = 1.0  # however fast the log was: each failure is told
                self._say(f"The log in {self.data} could not be synced to the disk: {error}")

    async def stop(self) -> None:
        """Let go of the server, and shut it down unless other clients are connected to it. Nothing written is lost.

        Raises, and leaves it running, if it could not save. Cancel watch() and close the store's connections first.
        """
        if not self._running:
            return
        self._running = False
        if self._task:
            await asyncio.wait([self._task])
        with self._translated("stop"):
            async with self._locked("valkey.lock"):
                try:
                    await self._shut_down()
                finally:
                    # Still under the lock: the next process to stop must not count us.
                    await self._presence.aclose()

    async def _shared(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Run `work`, or wait for what runs already. Shielded: a caller who gives up leaves no switch half made."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(work())
        await asyncio.shield(self._task)

    async def _revive(self) -> None:
        # A connection outlives its socket's name, which new connections need.
        if not self._listening() or await self._answer() not in ("ready", "busy"):
            await self._bring_up()

    async def _bring_up(self) -> None:
        deadline = time.monotonic() + _KILLED_SECONDS
        with self._translated("start"):
            await asyncio.to_thread(self._prepare)
            while True:
                async with self._locked("valkey.lock"):
                    if not self._listening():
                        await self._spawn()
                    elif self._child_ended():
                        self._child = None  # another process was faster
                try:
                    if await self._loaded():
                        async with self._locked("valkey.lock"):
                            return await self._apply_durability()
                except redis.exceptions.ConnectionError:  # it had loaded, and was killed, or takes no more connections
                    if self._gave_up() or time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(0.05)
                if self._child_ended() and time.monotonic() > deadline:
                    raise self._failure("start before it was killed, again and again")

    def _prepare(self) -> None:
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.data.stat()
        if status.st_uid != os.geteuid():
            raise EmbeddedFailed(f"{self.data} belongs to another user: name a directory inside it")
        if status.st_mode & 0o077:
            # A mistyped /srv must not become a private directory.
            if any(self.data.iterdir()) and not (self.data / "valkey.lock").exists():
                raise EmbeddedFailed(
                    f"{self.data} is open to other users and holds other files: name a new directory, or chmod 700 it"
                )
            self.data.chmod(0o700)
        if self._socket.parent != self.data:
            make_private(self._socket.parent)

    @contextlib.asynccontextmanager
    async def _locked(self, name: str, waiting: Callable[[], None] | None = None) -> AsyncIterator[int]:
        file = os.open(self.data / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not try_lock(file):
                if waiting:
                    waiting()
                await asyncio.sleep(0.01)
            yield file
        finally:
            os.close(file)

    def _ended(self) -> contextlib.AbstractAsyncContextManager[int]:
        """The lock `valkey.alive`: proof that no server, and no forked save of one, works on these files."""
        deadline = time.monotonic() + _EXIT_SECONDS

        def waiting() -> None:
            self._end_orphans()
            if time.monotonic() > deadline:
                raise EmbeddedFailed(
                    f"A server works on {self.data} but does not listen on {self._socket}: end it (valkey.pid says "
                    f"{self._recorded_pid()}) and start again"
                )

        return self._locked("valkey.alive", waiting)

    def _end_orphans(self) -> None:
        """Kill what our killed child had forked to save: it would rename its old dump over a newer one.

        The lock is held, so a process of a server lives; the pidfile says that server was our child. Its session has
        our child's pid as its group, a number the kernel gives to no one while the group has a member.
        """
        if self._child and self._child_ended() and self._child.pid == self._recorded_pid():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def _recorded_pid(self) -> int | None:
        try:
            return int((self.data / "valkey.pid").read_text())
        except (OSError, ValueError):
            return None

    def _child_ended(self) -> bool:
        """Whether our child has ended; reaps it."""
        return self._child is not None and self._child.poll() is not None

    def _gave_up(self) -> bool:
        """Whether our child ended by itself: started again, it would again. One that was killed would not."""
        return self._child is not None and self._child.poll() is not None and self._child.returncode >= 0

    def _listening(self) -> bool:
        """Whether a server holds the socket. It need not reply: a busy server is not a dead one."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self._socket))
            except BlockingIOError:
                return True  # its backlog is full
            except (ConnectionError, FileNotFoundError):
                return False
            return True

    async def _spawn(self) -> None:
        async with self._ended() as alive:
            if self._child:
                await asyncio.to_thread(self._child.wait)
            await asyncio.to_thread(self._clean)
            self._launch(alive)
        while not self._listening() and not self._child_ended():  # noqa: ASYNC110 - the server does not tell
            await asyncio.sleep(0.005)
        if self._gave_up():
            raise self._failure("start")

    def _clean(self) -> None:
        """Remove what killed servers left. Only under the lock `valkey.alive`."""
        for path in (*self.data.glob("temp-*"), *(self.data / LOG_DIRECTORY).glob("temp-*")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.data / RETIRED_LOG, ignore_errors=True)
        messages = self.data / "valkey.log"
        if messages.exists() and messages.stat().st_size > _MESSAGES_BYTES:
            messages.replace(self.data / "valkey.log.1")

    def _launch(self, alive: int) -> None:
        # Not in a thread: it is a vfork of a millisecond, and a cancelled await could lose the child.
        log_on_disk = self._manifest.exists()
        fresh = not log_on_disk and not (self.data / "dump.rdb").exists()
        directives = {
            **DIRECTIVES,
            **self._options,
            "unixsocket": str(self._socket),
            "dir": str(self.data),
            "pidfile": str(self.data / "valkey.pid"),
            **self._persistence(log=log_on_disk or (fresh and self.durability != "snapshot")),
        }
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        with (self.data / "valkey.log").open("ab") as messages:
            self._log_start = messages.tell()
            self._child = subprocess.Popen(
                [str(self._binary or find_binary()), *(part for n, v in directives.items() for part in (f"--{n}", v))],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                # A session of its own: Ctrl-C in the terminal must not end it before the API has drained.
                start_new_session=True,
                pass_fds=(alive,),
                umask=0o077,
                cwd=self.data,
                # The server refuses to start under a locale that is not installed.
                env={**environment, "LC_ALL": "C"},
            )

    @property
    def _manifest(self) -> Path:
        """Exists exactly when the log on disk is complete: the server writes it last."""
        return self.data / LOG_DIRECTORY / "appendonly.aof.manifest"

    def _persistence(self, *, log: bool) -> dict[str, str]:
        return {
            "appendonly": "yes" if log else "no",
            # Its own "everysec" holds writes to the log back for up to 2 s while a sync is under way, and answers
            # meanwhile: killed then, it lost acknowledged steps (1 to 4 a session at 30 MB/s). So it always writes at
            # once, and `flush` syncs.
            "appendfsync": "always" if self.durability == "always" else "no",
            "save": "" if log else _SAVE_POINTS,
        }

    async def _loaded(self) -> bool:
        """Wait until the server has loaded its data; False if it was killed, or died and was not our child."""
        told = time.monotonic()
        while (answer := await self._answer()) != "ready":
            if answer == "down":
                if self._child:
                    await asyncio.to_thread(self._child.wait)
                if self._gave_up():
                    raise self._failure("load its data")
                return False
            if not self._running:
                raise EmbeddedFailed("Stopped while the embedded server was loading")
            if time.monotonic() - told >= 1.0:
                told = time.monotonic()
                self._say(self._progress if answer == "loading" else f"Waiting for the server in {self.data}")
            await asyncio.sleep(0.01)
        return True

    async def _apply_durability(self) -> None:
        async with self._client(timeout=None) as server:
            wanted = self._persistence(log=self.durability != "snapshot")
            now = await server.config_get("appendonly", "appendfsync", "save")
            if now == wanted and self._manifest.exists() == (wanted["appendonly"] == "yes"):
                return
            self._say(f"Switching {self.data} to durability {self.durability}")
            await server.config_set("appendfsync", wanted["appendfsync"])
            if wanted["appendonly"] == "yes":
                await self._begin_log(server, running=now["appendonly"] == "yes")
            elif now["appendonly"] == "yes" or self._manifest.exists():
                await self._retire_log(server)
            # Last: until a new log is complete, the dumps are the only copy on disk.
            await server.config_set("save", wanted["save"])

    async def _begin_log(self, server: Redis, *, running: bool) -> None:
        attempts = int((await server.info("persistence"))["aof_rewrites"])
        if not running:
            if self._manifest.exists():  # of a switch that was cut short, and older than the data
                await self._retire_log(server)
            await server.config_set("appendonly", "yes")
        while not self._manifest.exists():
            info = await server.info("persistence")
            tried = int(info["aof_rewrites"]) > attempts and not info["aof_rewrite_in_progress"]
            if tried and info["aof_last_bgrewrite_status"] != "ok":
                await server.config_set("appendonly", "no")
                raise self._failure("write its log")
            await asyncio.sleep(0.01)

    async def _retire_log(self, server: Redis) -> None:
        """Write a dump of everything, end the log, and move it away, or it would win over newer dumps.

        At whatever point this is cut short, the next start reads either the whole log or, once the log is moved, the
        dump. The server replies to nobody during SAVE, but it does not fork either: it works where memory is short.
        """
        while True:
            try:
                await server.save()
                break
            except redis.exceptions.ResponseError as refusal:
                if "in progress" not in str(refusal):
                    raise
                await asyncio.sleep(0.05)
        await server.config_set("appendonly", "no")
        await asyncio.to_thread(move_log_away, self.data)

    def _client(self, timeout: float | None) -> Redis:
        return Redis(
            unix_socket_path=str(self._socket),
            client_name=self.client_name,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    async def _answer(self) -> _Answer:
        # By INFO, not PING: PING fails while the server loads, and after a dump that failed. A loading server replies
        # once in 1024 commands of its log: with large values, seldom.
        try:
            info = await self._presence.info("persistence")
        except (redis.exceptions.RedisError, OSError):
            return "busy" if self._listening() else "down"
        if not info["loading"]:
            return "ready"
        done, total = float(info["loading_loaded_perc"]), int(info["loading_total_bytes"])
        seconds = info["loading_eta_seconds"]
        self._progress = f"Loading {self.data}: {done:.0f} % of {total / 1e6:,.0f} MB, about {seconds} s to go"
        return "loading"

    async def _until_death(self) -> None:
        pidfd = open_pidfd(self._socket)
        if pidfd is None:
            while self._running and self._listening():  # noqa: ASYNC110 - nothing tells us
                await asyncio.sleep(0.1)
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    async def _shut_down(self) -> None:
        try:
            async with self._client(timeout=5.0) as server:
                if others := await self._other_clients(server):
                    self._say(f"Leaving the server in {self.data} to its other clients: {', '.join(others)}")
                    return
            async with self._client(timeout=None) as server:
                # By what it does, not by what we asked for: another process may have switched it since.
                save = (await server.config_get("appendonly"))["appendonly"] == "no"
                await server.shutdown(save=save, nosave=not save)
        except redis.exceptions.ConnectionError:
            if self._listening():
                raise
        async with self._ended():
            if self._child:
                await asyncio.to_thread(self._child.wait)

    async def _other_clients(self, server: Redis) -> list[str]:
        others, ours = list[str](), self.client_name.split(":")
        # Twice: a connection that was just closed, or has not yet said its name, is no reason to stay.
        for pause in (0.0, 0.1):
            await asyncio.sleep(pause)
            names = [client["name"] for client in await server.client_list(_type="normal")]
            others = [name or "one without a name" for name in names if name.split(":")[:2] != ours]
            if not others:
                break
        return others

    @contextlib.contextmanager
    def _translated(self, task: str) -> Iterator[None]:
        try:
            yield
        except (redis.exceptions.RedisError, OSError) as error:
            raise self._failure(task, error) from error

    def _failure(self, task: str, error: Exception | None = None) -> EmbeddedFailed:
        try:
            with (self.data / "valkey.log").open("rb") as messages:
                messages.seek(self._log_start)
                lines = messages.read()[-8192:].decode(errors="replace").splitlines()[-20:]
        except OSError:
            lines = []
        reason = f": {error}" if error else ""
        return EmbeddedFailed("\n".join([f"The embedded server in {self.data} could not {task}{reason}", *lines]))
