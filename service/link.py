"""Commands to Redis or Valkey: everything that is asked for in one turn of the event loop goes out as one
pipeline, over one connection, in one write.

redis-py makes the connections (URL, TLS, authentication, cluster topology); a command through its clients costs
about 100 µs of CPU, through here a tenth of it when many sessions commit at once. A task that waits for a
reply may be cancelled at any time: the reply is read all the same, by the task of the pipeline, so it can
never be taken for the reply to somebody else's command. Nothing is sent twice here.
"""

import asyncio
import re
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from service.errors import StoreFull, StoreUnavailable

Argument = bytes | memoryview | str | int

# A command heavier than this travels alone, so that a large gradient does not hold up small steps.
HEAVY = 256 * 1024
# More pipelines at once than this gain nothing: the next one collects what comes meanwhile.
AT_ONCE = 2
# So many travel alone at once, each over a connection of its own: a gradient of 1 GB is 256 chunks.
ALONE_AT_ONCE = 8
# Commands at once in a cluster, each over a connection: redis-py fails at the 101st to one node, rather than wait.
CLUSTER_AT_ONCE = 64
# Seconds without a reply after which the store counts as away. What is heavy may be long on its way.
TIMEOUT, HEAVY_TIMEOUT = 5.0, 20.0
_AWAY = {"LOADING", "BUSY", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOAUTH", "WRONGPASS", "NOREPLICAS"}
_FULL = {"OOM", "MISCONF"}
# Redis before 7 wraps what failed inside a script: "Error running script (call to f_…): @user_script:9: -OOM …".
_CODE = re.compile(r"(?:Error running script .*?: -)?([A-Z]+)\b")

_Batch = list[tuple[Sequence["Argument"], "asyncio.Future[Any]"]]


class Link(Protocol):
    """`call` sends one command. Raises StoreUnavailable (its outcome is then unknown), StoreFull, ResponseError.

    `alone` is for commands whose replies are large: they hold up nobody else.
    """

    def call(self, *command: Argument, alone: bool = False) -> "asyncio.Future[Any]": ...

    async def close(self) -> None: ...


def refused(error: ResponseError) -> Exception:
    """The store's own refusal as what it means to a caller."""
    # redis-py takes the code off the text where it knows it.
    found = _CODE.match(str(error))
    code = error.status_code if error.status_code not in (None, "ERR") else found[1] if found else ""
    text = f"the store refuses: {error}"
    if code in _FULL:
        return StoreFull(text)
    if code in _AWAY:
        return StoreUnavailable(text)
    return error


class SingleLink:
    """One server. `timeout` is how many seconds a pipeline of small commands waits for each of its replies."""

    def __init__(self, url: str, client_name: str, timeout: float = TIMEOUT) -> None:
        self._pool = ConnectionPool.from_url(
            url, protocol=2, client_name=client_name, socket_timeout=None, retry=Retry(NoBackoff(), 0)
        )
        self._timeout = timeout
        self._idle: list[Connection] = []
        self._waiting: _Batch = []
        self._heavy: deque[tuple[Sequence[Argument], asyncio.Future[Any]]] = deque()
        self._running = 0
        self._alone = 0
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()

    def call(self, *command: Argument, alone: bool = False) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        if alone or _weight(command) > HEAVY:
            self._heavy.append((command, reply))
            self._start_heavy()
            return reply
        self._waiting.append((command, reply))
        if not self._scheduled and self._running < AT_ONCE:
            self._scheduled = True
            loop.call_soon(self._flush)
        return reply

    def _flush(self) -> None:
        self._scheduled = False
        if self._waiting:
            batch, self._waiting = self._waiting, []
            self._running += 1
            self._spawn(self._pipeline(batch))

    def _start_heavy(self) -> None:
        while self._heavy and self._alone < ALONE_AT_ONCE:
            self._alone += 1
            self._spawn(self._single(self._heavy.popleft()))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pipeline(self, batch: _Batch) -> None:
        try:
            await self._exchange(batch, self._timeout)
        finally:
            self._running -= 1
            if self._waiting and not self._scheduled:
                self._flush()

    async def _single(self, item: tuple[Sequence[Argument], "asyncio.Future[Any]"]) -> None:
        try:
            await self._exchange([item], max(self._timeout, HEAVY_TIMEOUT))
        finally:
            self._alone -= 1
            self._start_heavy()

    async def _exchange(self, batch: _Batch, seconds: float) -> None:
        connection = self._idle.pop() if self._idle else self._connection()
        loop = asyncio.get_running_loop()
        reason = "the connection was broken off"
        try:
            async with asyncio.timeout(seconds) as patience:
                packed = pack([command for command, _ in batch])
                await connection.send_packed_command(packed, check_health=False)
                for _, reply in batch:
                    await _receive(connection, reply)
                    patience.reschedule(loop.time() + seconds)
        # uvloop raises RuntimeError for a write on a connection that the other side has closed.
        except (RedisError, OSError, TimeoutError, RuntimeError, asyncio.CancelledError) as error:
            reason = str(error) or type(error).__name__
            await self._discard(connection)
        else:
            self._idle.append(connection)
        finally:  # whatever happened: a reply that never comes would leave its caller waiting for ever
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(StoreUnavailable(f"the store does not answer: {reason}"))

    async def _discard(self, broken: Connection) -> None:
        """Lets a connection go, and all that lie idle: they led to the same server, and would fail one by one."""
        idle, self._idle = self._idle, []
        for connection in (broken, *idle):
            await connection.disconnect(nowait=True)

    def _connection(self) -> Connection:
        made: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return made

    async def close(self) -> None:
        """What is under way is waited for: a connection that is in use would stay open, and its caller may be gone."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timeout)
        for connection in self._idle:
            await connection.disconnect(nowait=True)
        self._idle.clear()


async def _receive(connection: Connection, reply: "asyncio.Future[Any]") -> None:
    try:
        value = await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        if not reply.done():
            reply.set_exception(refused(error))
    else:
        if not reply.done():
            reply.set_result(value)


class ClusterLink:
    """A cluster: redis-py routes each command to the node that has its keys."""

    def __init__(self, url: str, timeout: float = HEAVY_TIMEOUT) -> None:
        # No retries: a command that is sent twice behind our back may land twice, with somebody else's in between.
        self.client: RedisCluster = RedisCluster.from_url(
            url, protocol=2, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._tasks: set[asyncio.Future[Any]] = set()
        self._turns = asyncio.Semaphore(CLUSTER_AT_ONCE)

    def call(self, *command: Argument, alone: bool = False) -> "asyncio.Future[Any]":  # noqa: ARG002
        """Each command has a connection of its own here, `alone` or not."""
        task = asyncio.ensure_future(self._call(command))
        # Held here, so that a caller that goes away does not cancel the command.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _call(self, command: Sequence[Argument]) -> Any:
        name, *arguments = command
        try:
            async with self._turns:
                return await self.client.execute_command(name, *arguments)
        except ResponseError as error:
            raise refused(error) from None
        except (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError) as error:
            raise StoreUnavailable(f"the store does not answer: {error}") from None

    async def close(self) -> None:
        await self.client.aclose()


def _weight(command: Sequence[Argument]) -> int:
    return sum(len(part) for part in command if isinstance(part, bytes | memoryview))


def pack(commands: Sequence[Sequence[Argument]]) -> list[bytes]:
    """The commands in the protocol's form, large arguments as they are: they are not copied here."""
    pieces: list[Any] = []  # of bytes and memoryviews; redis-py passes both on as they are
    small: list[bytes] = []
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for part in command:
            if isinstance(part, str):
                part = part.encode()
            elif isinstance(part, int):
                part = b"%d" % part
            small.append(b"$%d\r\n" % len(part))
            if len(part) < 4096:
                small.append(bytes(part))
            else:
                pieces += (b"".join(small), part)
                small.clear()
            small.append(b"\r\n")
    pieces.append(b"".join(small))
    return pieces
