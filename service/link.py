"""Commands to Redis or Valkey: everything that is asked for in one turn of the event loop goes out as one
pipeline, over one connection, in one write.

redis-py makes the connections (URL, TLS, authentication, cluster topology); a command through its clients costs
about 100 µs of CPU, through here a tenth of it when many sessions commit at once. A task that waits for a
reply may be cancelled at any time: the reply is read all the same, by the task of the pipeline, so it can
never be taken for the reply to somebody else's command. Nothing is sent twice here.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from service.errors import StoreFull, StoreUnavailable

Argument = bytes | memoryview | str | int

# A command heavier than this travels alone, so that a large gradient does not hold up small steps.
HEAVY = 256 * 1024
# More pipelines at once than this gain nothing: the next one collects what comes meanwhile.
AT_ONCE = 2
_AWAY = ("LOADING", "BUSY", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOAUTH", "WRONGPASS", "NOREPLICAS")
_FULL = ("OOM", "MISCONF")


class Link(Protocol):
    """`call` sends one command. Raises StoreUnavailable (its outcome is then unknown), StoreFull, ResponseError."""

    def call(self, *command: Argument) -> "asyncio.Future[Any]": ...

    async def close(self) -> None: ...


def refused(error: ResponseError) -> Exception:
    """The store's own refusal as what it means to a caller."""
    text = str(error)
    if text.startswith(_FULL):
        return StoreFull(text)
    if text.startswith(_AWAY):
        return StoreUnavailable(text)
    return error


class SingleLink:
    """One server. `timeout` is the number of seconds that a pipeline may take."""

    def __init__(self, url: str, client_name: str, timeout: float = 20.0) -> None:
        self._pool = ConnectionPool.from_url(
            url, protocol=2, client_name=client_name, socket_timeout=None, retry=Retry(NoBackoff(), 0)
        )
        self._timeout = timeout
        self._idle: list[Connection] = []
        self._waiting: list[tuple[Sequence[Argument], asyncio.Future[Any]]] = []
        self._running = 0
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()

    def call(self, *command: Argument) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        if _weight(command) > HEAVY:
            self._start([(command, reply)])
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
            self._start(batch, counted=True)

    def _start(self, batch: list[tuple[Sequence[Argument], asyncio.Future[Any]]], *, counted: bool = False) -> None:
        task = asyncio.create_task(self._exchange(batch, counted=counted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _exchange(self, batch: list[tuple[Sequence[Argument], asyncio.Future[Any]]], *, counted: bool) -> None:
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            async with asyncio.timeout(self._timeout):
                packed = pack([command for command, _ in batch])
                await connection.send_packed_command(packed, check_health=False)
                for _, reply in batch:
                    await _receive(connection, reply)
        except (RedisError, OSError, TimeoutError, asyncio.CancelledError) as error:
            await connection.disconnect(nowait=True)
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(StoreUnavailable(f"the store does not answer: {error or type(error).__name__}"))
        else:
            self._idle.append(connection)
        finally:
            if counted:
                self._running -= 1
                if self._waiting and not self._scheduled:
                    self._flush()

    def _connection(self) -> Connection:
        made: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return made

    async def close(self) -> None:
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

    def __init__(self, url: str, timeout: float = 20.0) -> None:
        self.client: RedisCluster = RedisCluster.from_url(
            url, protocol=2, socket_timeout=timeout, retry=Retry(NoBackoff(), 1)
        )
        self._tasks: set[asyncio.Future[Any]] = set()

    def call(self, *command: Argument) -> "asyncio.Future[Any]":
        task = asyncio.ensure_future(self._call(command))
        # Held here, so that a caller that goes away does not cancel the command.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _call(self, command: Sequence[Argument]) -> Any:
        name, *arguments = command
        try:
            return await self.client.execute_command(name, *arguments)
        except ResponseError as error:
            raise refused(error) from None
        except (RedisError, OSError, TimeoutError) as error:
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
