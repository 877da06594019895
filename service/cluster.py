"""Commands to a cluster: a link to each of its nodes, so that all that is asked of one in one turn of the event loop
goes out as one pipeline, with one barrier, as it does to a server of its own (link.py).

redis-py keeps the topology (which node has which slot), and pub/sub is its own; the commands are not its business. The
topology is asked for when the first command needs it, and anew, soon, whenever a node does not answer, says that it is
not fit to, or that a slot is elsewhere. Routing goes by the last one that is known meanwhile: a command for a node that
has died fails at once or in time, those for the others go on.

**What is sent twice.** MOVED and ASK say that the command was not executed, and where it belongs: it is sent there, at
most REDIRECTIONS times. ASK is of a slot under way: what has all its keys on one side is answered, of several keys that
lie on both, or are not there at all, the node says TRYAGAIN, and the caller is told that the store is away. Whatever
else went wrong, a command that may have been received is not sent again. What still waits to be sent to a node when
that turns out to be no primary any more goes to the one that is.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import structlog
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.cluster import get_node_name
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisClusterException, RedisError, ResponseError

from service.acks import Barrier
from service.errors import StoreUnavailable
from service.link import PLACE, TIMEOUT, Argument, Request, ServerLink, refused, spawn, told_apart

log = structlog.get_logger("ravine.cluster")

# How often a command is sent elsewhere before it is given up.
REDIRECTIONS = 3
# So many keys are looked at until each node has one of them.
MOST_PLACES = 1024
# Seconds between two questions for the topology: an answer takes some milliseconds to work in.
PAUSE = 0.5
_AWAY = (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError)


class NodeLink(ServerLink):
    """One node of `cluster`, which is told of what it refuses and of when it does not answer."""

    def __init__(self, node: ClusterNode, cluster: "ClusterLink", timeout: float, barrier: Barrier | None) -> None:
        settings = {**node.connection_kwargs, "socket_timeout": None, "retry": Retry(NoBackoff(), 0)}
        super().__init__(partial(node.connection_class, **settings), timeout, barrier)
        self.host: str = node.host
        self.name: str = node.name
        self._cluster = cluster

    def settle(self, request: Request, error: ResponseError) -> None:
        self._cluster.settle(self, request, error)

    def broken_off(self) -> None:
        self._cluster.look_again(self.name)


class ClusterLink:
    """`client` is redis-py's, for pub/sub; `timeout` as of a server of its own, for each node."""

    def __init__(self, url: str, client_name: str, timeout: float = TIMEOUT, barrier: Barrier | None = None) -> None:
        self.client: RedisCluster = RedisCluster.from_url(
            url, protocol=2, client_name=client_name, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._timeout = timeout
        self._barrier = barrier
        self._nodes: dict[str, NodeLink] = {}  # by host:port
        self._tasks: set[asyncio.Task[None]] = set()
        self._early: list[Request] = []  # what waits for the first topology
        self._known = False
        self._wanted = False  # whether the topology is to be asked for
        self._failed: str | None = None  # the node that is asked last
        self._looking: asyncio.Task[None] | None = None
        self._looked = float("-inf")
        self._silent = False  # whether nobody told the topology when it was last asked for
        self._closed = False

    @classmethod
    async def opened(cls, url: str, client_name: str, barrier: Barrier | None = None) -> "ClusterLink":
        """A link that knows the topology. Raises StoreUnavailable."""
        link = cls(url, client_name, barrier=barrier)
        try:
            await link.ready()
        except StoreUnavailable:
            await link.close()
            raise
        return link

    async def ready(self) -> None:
        """Returns once the topology is known. Raises StoreUnavailable."""
        if not self._known:
            self.look_again()
        if not self._known and self._looking is not None:
            await asyncio.wait((self._looking,))
        if not self._known:
            raise StoreUnavailable("the store does not answer: none of its nodes tells the topology")

    # Sending

    def call(self, *command: Argument, alone: bool = False, durable: bool = False) -> "asyncio.Future[Any]":
        """Sends it to the node that has its first key, which it must have."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._route(Request(command, reply, alone=alone, durable=durable))
        return reply

    def _route(self, request: Request) -> None:
        request.asking = False
        key = _key_of(request.command)
        if key is None:
            request.answer(StoreUnavailable("the store does not answer: the node has left the cluster"))
        elif self._known:
            self._link_to(self._owner(key)).send(request)
        elif self._closed:
            request.answer(StoreUnavailable("the store does not answer: the connection is closed"))
        else:
            self._early.append(request)
            self.look_again()

    def _owner(self, key: str) -> ClusterNode:
        owner: ClusterNode = self.client.nodes_manager.slots_cache[key_slot(key.encode())][0]
        return owner

    def _link_to(self, node: ClusterNode) -> NodeLink:
        link = self._nodes.get(node.name)
        if link is None:
            link = self._nodes[node.name] = NodeLink(node, self, self._timeout, self._barrier)
        return link

    def settle(self, link: NodeLink, request: Request, error: ResponseError) -> None:
        """Sends on what `link` says belongs elsewhere; the rest is refused."""
        if isinstance(error, AskError):  # MovedError is one, too
            if request.redirections == REDIRECTIONS:
                request.answer(StoreUnavailable("the slot is being moved to another node"))
                return
            request.redirections += 1
            error.host = error.host or link.host  # a node that does not know its own name leaves it out
            if isinstance(error, MovedError):
                spawn(self._tasks, self._follow(request, error))
            else:
                self._ask(request, error)
            return
        meaning = refused(error)
        if isinstance(meaning, StoreUnavailable):
            self.look_again(link.name)
        request.answer(meaning)

    async def _follow(self, request: Request, moved: MovedError) -> None:
        try:
            # What cannot be learned is met again at the next attempt, of which there are not many.
            with contextlib.suppress(*_AWAY):
                await self.client.nodes_manager.move_slot(moved)
        finally:
            self.look_again()  # others may have moved with it
            self._route(request)

    def _ask(self, request: Request, ask: AskError) -> None:
        """The node may be one that has no slots yet, so that the topology does not have it."""
        link = self._nodes.get(get_node_name(ask.host, ask.port))
        if link is None:
            settings: dict[str, Any] = self.client.get_connection_kwargs()
            link = self._link_to(ClusterNode(ask.host, ask.port, **settings))
        request.asking = True
        link.send(request)

    # The topology

    def look_again(self, failed: str | None = None) -> None:
        """Asks for the topology, soon; `failed` is a node that is better not asked first."""
        self._wanted = not self._closed
        self._failed = failed or self._failed
        if self._wanted and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._look_on)

    def _look_on(self, _: "asyncio.Task[None]") -> None:
        if self._wanted:  # by somebody who came while the answer was on its way
            self.look_again()

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.sleep(self._looked + PAUSE - loop.time())
            self._wanted = False
            failed, self._failed = self._failed, None
            await self._learn(failed)
        finally:
            self._looked = loop.time()
            self._send_early()

    async def _learn(self, failed: str | None) -> None:
        try:
            if self._known:
                await self.client.nodes_manager.initialize(last_failed_node_name=failed)
            else:
                await self.client.initialize()
        except _AWAY as error:
            if not self._silent:
                log.warning("the cluster does not tell its topology", reason=str(error))
            self._silent = True
            # redis-py asks the nodes that it was told of last. All may have other addresses by now: the URL's leads on.
            first = self.client.startup_nodes[0]
            self.client.nodes_manager.startup_nodes.setdefault(first.name, first)
            return
        self._known, self._silent = True, False
        primaries = {node.name for node in self.client.get_primaries()}
        for name in self._nodes.keys() - primaries:
            self._retire(self._nodes.pop(name))

    def _send_early(self) -> None:
        early, self._early = self._early, []
        for request in early:
            if self._known:
                self._route(request)
            else:
                request.answer(StoreUnavailable("the store does not answer: none of its nodes tells the topology"))

    def _retire(self, link: NodeLink) -> None:
        spawn(self._tasks, link.close())
        for request in link.withdraw():
            self._route(request)

    async def dial(self, key: str) -> Connection:
        await self.ready()
        return await self._link_to(self._owner(key)).dialled()

    # All nodes

    async def places(self) -> list[str]:
        await self.ready()
        found: dict[str, str] = {}
        for number in range(MOST_PLACES):
            place = f"{PLACE}:{{{number}}}"
            found.setdefault(self._owner(place).name, place)
        return list(found.values())

    async def servers(self) -> str:
        await self.ready()
        nodes = sorted(self.client.get_primaries(), key=lambda node: node.name)
        asked = [self._ask_each(nodes, "INFO", part) for part in ("server", "replication")]
        replies = await asyncio.gather(*asked[0], *asked[1])
        if any(b"role:slave" in reply for reply in replies):  # to who has no command for it nothing else tells that
            self.look_again()
        told = zip(nodes, replies[: len(nodes)], replies[len(nodes) :], strict=True)
        return " ".join(f"{node.name} {told_apart(parts)}" for node, *parts in told)

    def _ask_each(self, nodes: Iterable[ClusterNode], *command: Argument) -> "list[asyncio.Future[Any]]":
        replies: list[asyncio.Future[Any]] = []
        for node in nodes:
            replies.append(asyncio.get_running_loop().create_future())
            self._link_to(node).send(Request(command, replies[-1], alone=False, durable=False))
        return replies

    async def close(self) -> None:
        self._closed, self._wanted = True, False
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        self._send_early()  # a look that never began has answered nobody
        closed: set[NodeLink] = set()
        while links := set(self._nodes.values()) - closed:  # what was under way may be sent on to a new one
            await asyncio.gather(*[link.close() for link in links])
            closed |= links
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=self._timeout)
        await self.client.aclose()


def _key_of(command: Sequence[Argument]) -> str | None:
    """The first key of a command: of a script it stands behind the script and the number of keys. INFO has none."""
    name = command[0]
    if name == "INFO":
        return None
    key = command[3] if name in ("EVALSHA", "EVAL") else command[1]
    assert isinstance(key, str)
    return key
