"""Commands to Redis or Valkey: everything that is asked for in one turn of the event loop goes out as one
pipeline, over one connection, in one write.

redis-py makes the connections (URL, TLS, authentication, cluster topology); a command through its clients costs
about 100 µs of CPU, through here a tenth of it when many sessions commit at once. A task that waits for a
reply may be cancelled at any time: the reply is read all the same, by the task of the pipeline, so it can
never be taken for the reply to somebody else's command. Nothing is sent twice here.

What is to be acknowledged (`durable`) is followed by a barrier (acks.py) on its own connection, one for all that goes
out together, and its reply is given once the barrier holds. These commands have pipelines of their own, since a barrier
blocks its connection and reads must not wait behind it. With ack=memory there is no barrier, and no difference.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

import hiredis
import structlog
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisClusterException, RedisError, ResponseError

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
# Commands at once in a cluster, each over a connection: redis-py fails at the 101st to one node, rather than wait.
CLUSTER_AT_ONCE = 64
# How often a slot may have moved before a durable command gives up.
REDIRECTIONS = 3
# A key that nobody reads, to try a server with; in a cluster a few of them, of which each server has one.
PLACE, MOST_PLACES = "ravine:tried", 1024
# Seconds without a reply after which the store counts as away. What is heavy may be long on its way.
TIMEOUT, HEAVY_TIMEOUT = 5.0, 20.0
# The share of these after which a reply counts as a sign of life.
FRESH = 0.05
_AWAY = {"LOADING", "BUSY", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOAUTH", "WRONGPASS", "NOREPLICAS"}
_FULL = {"OOM", "MISCONF"}
_SERVER = re.compile(rb"(?:run_id|master_replid):(\w+)")
# Redis before 7 wraps what failed inside a script: "Error running script (call to f_…): @user_script:9: -OOM …".
_CODE = re.compile(r"(?:Error running script .*?: -)?([A-Z]+)\b")

_Batch = list[tuple[Sequence["Argument"], "asyncio.Future[Any]"]]


class Link(Protocol):
    """`call` sends one command. Raises StoreUnavailable (its outcome is then unknown), StoreFull, ResponseError.

    `alone` is for commands whose replies are large: they hold up nobody else. The reply to what is `durable`, which
    must be a write, is given once it is as safe as was asked for. Raises Unconfirmed where it is not.
    """

    def call(self, *command: Argument, alone: bool = False, durable: bool = False) -> "asyncio.Future[Any]": ...

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

    def add(self, command: Sequence[Argument], reply: "asyncio.Future[Any]") -> None:
        self._waiting.append((command, reply))
        if not self._scheduled and self._running < AT_ONCE:
            self._scheduled = True
            reply.get_loop().call_soon(self._flush)

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


class SingleLink:
    """One server. `timeout` is how many seconds a pipeline of small commands waits for each of its replies."""

    def __init__(self, url: str, client_name: str, timeout: float = TIMEOUT, barrier: Barrier | None = None) -> None:
        self._pool = ConnectionPool.from_url(
            url, protocol=2, client_name=client_name, socket_timeout=None, retry=Retry(NoBackoff(), 0)
        )
        self._timeout = timeout
        self._idle: list[Connection] = []
        self._light = Pipelines(partial(self._exchange, seconds=timeout))
        self._durable = Pipelines(partial(self._exchange, seconds=timeout, barrier=barrier))
        self._heavy: deque[tuple[Sequence[Argument], asyncio.Future[Any], Barrier | None]] = deque()
        self._alone = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._barrier = barrier

    def call(self, *command: Argument, alone: bool = False, durable: bool = False) -> "asyncio.Future[Any]":
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        barrier = self._barrier if durable else None
        if alone or _weight(command) > HEAVY:
            self._heavy.append((command, reply, barrier))
            self._start_heavy()
        elif barrier is not None:
            self._durable.add(command, reply)
        else:
            self._light.add(command, reply)
        return reply

    async def places(self) -> list[str]:
        return [PLACE]

    async def servers(self) -> str:
        parts = await asyncio.gather(*[self.call("INFO", part) for part in ("server", "replication")])
        return b" ".join(_SERVER.findall(b"".join(parts))).decode()

    def _start_heavy(self) -> None:
        while self._heavy and self._alone < ALONE_AT_ONCE:
            self._alone += 1
            spawn(self._tasks, self._single(*self._heavy.popleft()))

    async def _single(self, command: Sequence[Argument], reply: "asyncio.Future[Any]", barrier: Barrier | None) -> None:
        try:
            await self._exchange([(command, reply)], max(self._timeout, HEAVY_TIMEOUT), barrier)
        finally:
            self._alone -= 1
            self._start_heavy()

    async def _exchange(self, batch: _Batch, seconds: float, barrier: Barrier | None = None) -> None:
        connection = self._idle.pop() if self._idle else self._connection()
        loop = asyncio.get_running_loop()
        reason = "the connection was broken off"
        commands = [command for command, _ in batch]
        try:
            async with asyncio.timeout(seconds) as patience:
                if barrier is None:
                    await connection.send_packed_command(pack(commands), check_health=False)
                    since = loop.time()
                    for _, reply in batch:
                        await _receive(connection, reply)
                        if loop.time() - since > FRESH * seconds:  # each time would cost as much as the reply
                            since = loop.time()
                            patience.reschedule(since + seconds)
                else:
                    patience.reschedule(loop.time() + seconds + barrier.seconds)
                    for (_, reply), value in zip(batch, await _confirmed(connection, commands, barrier), strict=True):
                        _deliver(reply, value)
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
        tasks = self._tasks | self._light.tasks | self._durable.tasks
        if tasks:
            await asyncio.wait(tasks, timeout=self._timeout)
        for connection in self._idle:
            await connection.disconnect(nowait=True)
        self._idle.clear()


async def _confirmed(connection: Connection, commands: Sequence[Sequence[Argument]], barrier: Barrier) -> list[Any]:
    """The replies to `commands`, exceptions among them, once the barrier behind them holds; Unconfirmed if it does not.

    What was refused is refused either way: it has written nothing.
    """
    await connection.send_packed_command(pack([*commands, *barrier.commands]), check_health=False)
    replies = [await _received(connection) for _ in commands]
    missing = barrier.missing([await _received(connection) for _ in barrier.commands])
    if missing is None:
        return replies
    log.warning("not acknowledged", reason=missing)
    return [reply if isinstance(reply, Exception) else Unconfirmed(missing) for reply in replies]


async def _receive(connection: Connection, reply: "asyncio.Future[Any]") -> None:
    try:
        value = await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        _deliver(reply, error)
    else:
        if not reply.done():
            reply.set_result(value)


async def _received(connection: Connection) -> Any:
    """A reply, or the exception that it is."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


def _deliver(reply: "asyncio.Future[Any]", value: Any) -> None:
    if reply.done():  # its caller has gone
        return
    if isinstance(value, Exception):
        reply.set_exception(refused(value) if isinstance(value, ResponseError) else value)
    else:
        reply.set_result(value)


class ClusterLink:
    """A cluster: redis-py routes each command to the node that has its keys."""

    def __init__(self, url: str, timeout: float = HEAVY_TIMEOUT, barrier: Barrier | None = None) -> None:
        # No retries: a command that is sent twice behind our back may land twice, with somebody else's in between.
        self.client: RedisCluster = RedisCluster.from_url(
            url, protocol=2, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._tasks: set[asyncio.Future[Any]] = set()
        self._turns = asyncio.Semaphore(CLUSTER_AT_ONCE)
        self._barrier = barrier

    def call(
        self,
        *command: Argument,
        alone: bool = False,  # noqa: ARG002 - each command has a connection of its own here
        durable: bool = False,
    ) -> "asyncio.Future[Any]":
        task = asyncio.ensure_future(self._call(command, self._barrier if durable else None))
        # Held here, so that a caller that goes away does not cancel the command.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _call(self, command: Sequence[Argument], barrier: Barrier | None) -> Any:
        name, *arguments = command
        try:
            async with self._turns:
                if barrier is None:
                    return await self.client.execute_command(name, *arguments)
                return await self._durable(command, barrier)
        except ResponseError as error:
            raise refused(error) from None
        except (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError) as error:
            raise StoreUnavailable(f"the store does not answer: {error}") from None

    async def _durable(self, command: Sequence[Argument], barrier: Barrier) -> Any:
        """Not by redis-py, which does not say where a command went: the barrier must go over the same connection."""
        for _ in range(REDIRECTIONS):
            await self.client.initialize()
            node = self.client.get_node_from_key(_key_of(command))
            if node is None:
                break
            try:
                return await _confirmed_at(node, command, barrier)
            except MovedError as error:
                await self.client.nodes_manager.move_slot(error)
            except AskError:  # the slot is on its way, and half of its keys are elsewhere
                break
            except ResponseError:
                raise
            except (RedisError, OSError, TimeoutError, RuntimeError):
                self._look_again(command)
                raise
        raise StoreUnavailable("the slot is being moved to another node")

    def _look_again(self, command: Sequence[Argument]) -> None:
        """A node broke off. redis-py asks for the topology anew once a command of its own has met that."""
        task = asyncio.ensure_future(self._call(("EXISTS", _key_of(command)), None))
        self._tasks.add(task)
        task.add_done_callback(self._met)

    def _met(self, task: "asyncio.Future[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def places(self) -> list[str]:
        found: dict[str, str] = {}
        try:
            await self.client.initialize()
            for number in range(MOST_PLACES):
                place = f"{PLACE}:{{{number}}}"
                node = self.client.get_node_from_key(place)
                if node is not None:
                    found.setdefault(node.name, place)
        except (RedisError, RedisClusterException, OSError) as error:
            raise StoreUnavailable(f"the store does not answer: {error}") from None
        return list(found.values())

    async def servers(self) -> str:
        try:
            found = await self.client.execute_command("INFO", "server", target_nodes=RedisCluster.PRIMARIES)
        except (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError) as error:
            raise StoreUnavailable(f"the store does not answer: {error}") from None
        nodes = {"": found} if "run_id" in found else found  # of one alone redis-py gives the answer itself
        return " ".join(sorted(f"{name} {info['run_id']}" for name, info in nodes.items()))

    async def close(self) -> None:
        await self.client.aclose()


async def _confirmed_at(node: ClusterNode, command: Sequence[Argument], barrier: Barrier) -> Any:
    connection = node.acquire_connection()
    whole = False
    try:
        await node.disconnect_if_needed(connection)
        (reply,) = await _confirmed(connection, [command], barrier)
        whole = True
    finally:
        if not whole:  # replies that are still to come must not be taken for somebody else's
            await connection.disconnect(nowait=True)
        node.release(connection)
    if isinstance(reply, Exception):
        raise reply
    return reply


def _key_of(command: Sequence[Argument]) -> str:
    """The first key of a command: of a script it stands behind the script and the number of keys."""
    key = command[3] if command[0] in ("EVAL", "EVALSHA") else command[1]
    assert isinstance(key, str)
    return key


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
