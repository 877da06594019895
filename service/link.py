"""Commands to Redis or Valkey: everything that is asked for in one turn of the event loop goes out as one
pipeline, over one connection, in one write.

redis-py makes the connections (URL, TLS, authentication); a command through its clients costs about 100 µs of CPU,
through here a tenth of it when many sessions commit at once. A task that waits for a reply may be cancelled at any
time: the reply is read all the same, by the task of the pipeline, so it can never be taken for the reply to somebody
else's command. Nothing is sent twice here. `cluster.py` has one such link to each node of a cluster.

What is to be acknowledged (`durable`) is followed by a barrier (acks.py) on its own connection, one for all that goes
out together, and its reply is given once the barrier holds. These commands have pipelines of their own, since a barrier
blocks its connection and reads must not wait behind it. With ack=memory there is no barrier, and no difference.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import hiredis
import structlog
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from service.acks import Ack, AckImpossible, Barrier
from service.errors import Corrupt, StoreFull, StoreUnavailable, Unconfirmed

log = structlog.get_logger("ravine.link")

Argument = bytes | memoryview | str | int

# A command heavier than this travels alone, so that a large gradient does not hold up small steps.
HEAVY = 256 * 1024
# Arguments from so many bytes on are written from where they lie.
UNCOPIED = 4096
# More pipelines at once than this gain nothing: the next one collects what comes meanwhile.
AT_ONCE = 2
# So many travel alone at once, each over a connection of its own: a gradient of 1 GB is 1024 chunks.
ALONE_AT_ONCE = 8
# A key that nobody reads, to try a server with.
PLACE = "ravine:tried"
# Seconds without a reply after which the store counts as away. What is heavy may be long on its way.
TIMEOUT, HEAVY_TIMEOUT = 5.0, 20.0
# The share of these after which a reply counts as a sign of life.
FRESH = 0.05
_AWAY = {"LOADING", "BUSY", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOAUTH", "WRONGPASS", "NOREPLICAS"}
_FULL = {"OOM", "MISCONF"}
_SERVER = re.compile(rb"(?:run_id|master_replid):(\w+)")
# Redis before 7 wraps what failed inside a script: "Error running script (call to f_…): @user_script:9: -OOM …".
_CODE = re.compile(r"(?:Error running script .*?: -)?([A-Z]+)\b")

# Lets the command that follows it into a slot that is still on its way to this node.
_ASKING: tuple[Argument, ...] = ("ASKING",)


class Request:
    """A command, and the future of its reply. `durable` ones wait for the link's barrier, if it has one.

    `asking` and `redirections` are of a cluster: whether it goes to where its slot is moving to, and how often it was
    sent elsewhere so far.
    """

    __slots__ = ("alone", "asking", "command", "durable", "redirections", "reply")

    def __init__(
        self, command: Sequence[Argument], reply: "asyncio.Future[Any]", *, alone: bool, durable: bool
    ) -> None:
        self.command = command
        self.reply = reply
        self.alone = alone
        self.durable = durable
        self.asking = False
        self.redirections = 0

    def answer(self, value: Any) -> None:
        """Gives the reply, or the exception that it is, to the caller, if that is still there."""
        if self.reply.done():
            return
        if isinstance(value, Exception):
            self.reply.set_exception(refused(value) if isinstance(value, ResponseError) else value)
        else:
            self.reply.set_result(value)


_Batch = list[Request]


class Link(Protocol):
    """`call` sends one command. Raises StoreUnavailable (its outcome is then unknown), StoreFull, ResponseError.

    `alone` is for commands whose replies are large: they hold up nobody else. The reply to what is `durable`, which
    must be a write, is given once it is as safe as was asked for. Raises Unconfirmed where it is not.
    """

    def call(self, *command: Argument, alone: bool = False, durable: bool = False) -> "asyncio.Future[Any]": ...

    async def dial(self, key: str) -> Connection:
        """A connection to where `key` is, for the caller alone, who closes it. Raises StoreUnavailable."""
        ...

    async def places(self) -> list[str]:
        """Names of keys, one on each server that takes writes."""
        ...

    async def servers(self) -> str:
        """What tells these servers from others, and from themselves before they were restarted or failed over."""
        ...

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
    return Corrupt(text) if code == "WRONGTYPE" else error


def spawn(tasks: set[asyncio.Task[None]], coroutine: Coroutine[Any, Any, None]) -> None:
    """A task that `tasks` holds until it is done."""
    task = asyncio.create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


class Pipelines:
    """Collects what is asked for in one turn of the event loop; `exchange` sends it, at most AT_ONCE at a time."""

    def __init__(self, exchange: Callable[[_Batch], Coroutine[Any, Any, None]]) -> None:
        self._exchange = exchange
        self._waiting: _Batch = []
        self._running = 0
        self._scheduled = False
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        if not self._scheduled and self._running < AT_ONCE:
            self._scheduled = True
            request.reply.get_loop().call_soon(self._flush)

    def withdraw(self) -> _Batch:
        """What was not sent yet, and now will not be."""
        batch, self._waiting = self._waiting, []
        return batch

    def _flush(self) -> None:
        self._scheduled = False
        if self._waiting:
            batch, self._waiting = self._waiting, []
            self._running += 1
            spawn(self.tasks, self._send(batch))

    async def _send(self, batch: _Batch) -> None:
        try:
            await self._exchange(batch)
        finally:
            self._running -= 1
            if self._waiting and not self._scheduled:
                self._flush()


async def tried(link: Link, ack: Ack) -> None:
    """Makes sure that every server gives what is to be waited for, by a real write on each.

    Raises AckImpossible where one does not, StoreUnavailable, with the link closed, where that cannot be told.
    """
    try:
        for place in await link.places():
            await link.call("SET", place, "", "EX", 1, durable=True)
    except Unconfirmed as error:
        raise AckImpossible(f"the store cannot give ack={ack}: {error}") from None
    except StoreUnavailable:
        await link.close()
        raise
    except StoreFull:
        pass  # what can still be changed is seen to one by one


class ServerLink:
    """One server, which `connect` makes connections to. `timeout` is how many seconds a pipeline of small commands
    waits for each of its replies.
    """

    def __init__(self, connect: Callable[[], Connection], timeout: float, barrier: Barrier | None) -> None:
        self._connect = connect
        self._timeout = timeout
        self._idle: list[Connection] = []
        self._light = Pipelines(partial(self._exchange, seconds=timeout))
        self._durable = Pipelines(partial(self._exchange, seconds=timeout, barrier=barrier))
        self._heavy: deque[Request] = deque()
        self._alone = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._barrier = barrier
        self._closed = False

    def send(self, request: Request) -> None:
        if request.alone or _weight(request.command) > HEAVY:
            self._heavy.append(request)
            self._start_heavy()
        elif request.durable and self._barrier is not None:
            self._durable.add(request)
        else:
            self._light.add(request)

    def settle(self, request: Request, error: ResponseError) -> None:
        """Sees to what the server refused."""
        request.answer(error)

    def broken_off(self) -> None:
        """Called when the server has not answered. What was under way fails, whatever is done here."""

    def _start_heavy(self) -> None:
        while self._heavy and self._alone < ALONE_AT_ONCE:
            self._alone += 1
            spawn(self._tasks, self._single(self._heavy.popleft()))

    async def _single(self, request: Request) -> None:
        try:
            barrier = self._barrier if request.durable else None
            await self._exchange([request], max(self._timeout, HEAVY_TIMEOUT), barrier)
        finally:
            self._alone -= 1
            self._start_heavy()

    async def _exchange(self, batch: _Batch, seconds: float, barrier: Barrier | None = None) -> None:
        connection = self._idle.pop() if self._idle else self._connect()
        loop = asyncio.get_running_loop()
        reason = "the connection was broken off"
        unanswered = iter(batch)
        try:
            async with asyncio.timeout(seconds) as patience:
                if barrier is None:
                    await connection.send_packed_command(pack(list(_commands(batch))), check_health=False)
                    since = loop.time()
                    for request in batch:
                        await self._receive(connection, request)
                        next(unanswered)
                        if loop.time() - since > FRESH * seconds:  # each time would cost as much as the reply
                            since = loop.time()
                            patience.reschedule(since + seconds)
                else:
                    patience.reschedule(loop.time() + seconds + barrier.seconds)
                    for value in await _confirmed(connection, batch, barrier):
                        self._give(next(unanswered), value)
        # uvloop raises RuntimeError for a write on a connection that the other side has closed.
        except (RedisError, OSError, TimeoutError, RuntimeError, asyncio.CancelledError) as error:
            reason = str(error) or type(error).__name__
            if not isinstance(error, asyncio.CancelledError):
                self.broken_off()
            await self._discard(connection)
        else:
            await self._keep(connection)
        finally:  # whatever happened: a reply that never comes would leave its caller waiting for ever
            for request in unanswered:
                request.answer(StoreUnavailable(f"the store does not answer: {reason}"))

    async def _receive(self, connection: Connection, request: Request) -> None:
        if request.asking:
            await _received(connection)
        try:
            value = await connection.read_response(disable_decoding=True)
        except ResponseError as error:
            self.settle(request, error)
        else:
            if not request.reply.done():
                request.reply.set_result(value)

    def _give(self, request: Request, value: Any) -> None:
        if isinstance(value, ResponseError):
            self.settle(request, value)
        else:
            request.answer(value)

    async def _keep(self, connection: Connection) -> None:
        if self._closed:
            await connection.disconnect(nowait=True)
        else:
            self._idle.append(connection)

    async def _discard(self, broken: Connection) -> None:
        """Lets a connection go, and all that lie idle: they led to the same server, and would fail one by one."""
        idle, self._idle = self._idle, []
        for connection in (broken, *idle):
            await connection.disconnect(nowait=True)

    async def dialled(self) -> Connection:
        """As Link.dial, to this server."""
        connection = self._connect()
        try:
            async with asyncio.timeout(self._timeout):
                await connection.connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            await connection.disconnect(nowait=True)
            self.broken_off()
            raise StoreUnavailable(f"the store does not answer: {error}") from None
        return connection

    def withdraw(self) -> list[Request]:
        """What was not sent yet, and now will not be."""
        heavy, self._heavy = self._heavy, deque()
        return [*self._light.withdraw(), *self._durable.withdraw(), *heavy]

    async def close(self) -> None:
        """What is under way is waited for: a connection that is in use would stay open, and its caller may be gone."""
        self._closed = True
        tasks = self._tasks | self._light.tasks | self._durable.tasks
        if tasks:
            await asyncio.wait(tasks, timeout=self._timeout)
        for connection in self._idle:
            await connection.disconnect(nowait=True)
        self._idle.clear()


class SingleLink(ServerLink):
    """The one server at `url`."""

    def __init__(self, url: str, client_name: str, timeout: float = TIMEOUT, barrier: Barrier | None = None) -> None:
        pool = ConnectionPool.from_url(
            url, protocol=2, client_name=client_name, socket_timeout=None, retry=Retry(NoBackoff(), 0)
        )
        super().__init__(pool.make_connection, timeout, barrier)

    @classmethod
    async def opened(cls, url: str, client_name: str, barrier: Barrier | None = None) -> "SingleLink":
        return cls(url, client_name, barrier=barrier)

    def call(self, *command: Argument, alone: bool = False, durable: bool = False) -> "asyncio.Future[Any]":
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(Request(command, reply, alone=alone, durable=durable))
        return reply

    async def dial(self, key: str) -> Connection:  # noqa: ARG002 - all are here
        return await self.dialled()

    async def places(self) -> list[str]:
        return [PLACE]

    async def servers(self) -> str:
        parts = await asyncio.gather(*[self.call("INFO", part) for part in ("server", "replication")])
        return told_apart(parts)


def told_apart(parts: Sequence[bytes]) -> str:
    """What tells a server from others, of what it said of itself with INFO."""
    return b" ".join(_SERVER.findall(b"".join(parts))).decode()


def _commands(batch: _Batch) -> Iterator[Sequence[Argument]]:
    for request in batch:
        if request.asking:
            yield _ASKING
        yield request.command


async def _confirmed(connection: Connection, batch: _Batch, barrier: Barrier) -> list[Any]:
    """The replies to `batch`, exceptions among them, once the barrier behind them holds; Unconfirmed if it does not.

    What was refused is refused either way: it has written nothing.
    """
    commands = list(_commands(batch))
    await connection.send_packed_command(pack([*commands, *barrier.commands]), check_health=False)
    received = [(command, await _received(connection)) for command in commands]
    replies = [reply for command, reply in received if command is not _ASKING]
    missing = barrier.missing([await _received(connection) for _ in barrier.commands])
    if missing is None:
        return replies
    if not all(isinstance(reply, Exception) for reply in replies):  # after a failover all may belong elsewhere
        log.warning("not acknowledged", reason=missing)
    return [reply if isinstance(reply, Exception) else Unconfirmed(missing) for reply in replies]


async def _received(connection: Connection) -> Any:
    """A reply, or the exception that it is."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


def _weight(command: Sequence[Argument]) -> int:
    return sum([len(part) for part in command if type(part) is bytes or type(part) is memoryview])


def pack(commands: Sequence[Sequence[Argument]]) -> list[bytes]:
    """The commands in the protocol's form, large arguments as they are: they are not copied here."""
    pieces: list[Any] = []  # of bytes and memoryviews; redis-py passes both on as they are
    small: list[bytes] = []
    for command in commands:
        if _weight(command) < UNCOPIED:
            small.append(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]
            continue
        small.append(b"*%d\r\n" % len(command))
        for part in command:
            if isinstance(part, str):
                part = part.encode()
            elif isinstance(part, int):
                part = b"%d" % part
            small.append(b"$%d\r\n" % len(part))
            if len(part) < UNCOPIED:
                small.append(bytes(part))
            else:
                pieces += (b"".join(small), part)
                small.clear()
            small.append(b"\r\n")
    pieces.append(b"".join(small))
    return pieces
