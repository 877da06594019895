"""The gate that every request passes before either plane sees it: who calls, what may they do, whose session is it.

    no key, where one is asked for; a wrong one      401, one and the same for all of them
    a path that there is none of                     404
    a method that the path does not take             405
    a session of somebody else, or none at all       404, one and the same
    what the key is not for                          403

Without a valid key nothing more is told than that: not which paths there are, nor which sessions. The store is asked
about a session even where it is known to be somebody else's, so that the time does not tell what the words do not.

Keys are asked for by the setting `keys`. With `auto` they are not where nobody but this machine can ask: the address
that is listened on, the one that the connection came in at, and the name in Host are all this machine's own. The last
keeps out web pages that make a name of theirs resolve to 127.0.0.1, and the public name that a proxy passes on.

What waits for long is let go within a second or so of its key's end: a body that is still coming is not read on, a long
poll is answered as if its time were over, an event stream ends. So the client asks again, and is then refused.
"""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache
from typing import Final

import structlog

from service.access.keys import BELIEVED, KnownKeys
from service.access.rights import ANYBODY, GRANTED, Access, Right, call_at
from service.errors import Forbidden, SessionNotFound, StoreFull, StoreUnavailable, Unauthenticated
from service.http import OVER, Message, Receive, Scope, Send
from service.problems import MethodNotAllowed, NotFound

log = structlog.get_logger("ravine.access")

# Whose a session is never changes, so it is remembered: 100 bytes each.
MAX_SESSIONS: Final = 65_536
# Seconds between two looks at the keys of those who wait.
LOOK: Final = 0.5
_MAX_NAMES: Final = 64

Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeysNeeded(Exception):
    """The service would listen where others reach it, and nobody could come in, or anybody."""


class Gate:
    """`tenant_of` tells whose a session is, and asks the store; `local`: nobody but this machine reaches the address
    that is listened on; `keys` is the setting, `docs` whether the reference is shown without a key.
    """

    def __init__(
        self,
        known: KnownKeys,
        tenant_of: Callable[[str], Awaitable[str]],
        *,
        keys: str,
        local: bool,
        insecure: bool = False,
        docs: bool = True,
    ) -> None:
        self._known = known
        self._tenant_of = tenant_of
        self._asks = keys == "required" or (keys == "auto" and not local and not insecure)
        self._only_here = keys == "auto" and local and not insecure
        self._docs = docs
        self._tenants: dict[str, str] = {}
        self._names: set[bytes] = set()  # of this machine, as Host had them
        self._waiting: dict[asyncio.Future[None], str] = {}  # who is to be let go -> the id of their key
        self._watcher: asyncio.Task[None] | None = None

    async def admit(self, scope: Scope) -> Access:
        """Who calls, if they may. Raises Unauthenticated, NotFound, MethodNotAllowed, SessionNotFound, Forbidden,
        StoreUnavailable, and what the engine says of a session that it cannot read.
        """
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root + "/"):
            path = path[len(root) :]
        methods, session = call_at(path)
        right = None if methods is None else methods.get(scope["method"])
        if right is Right.OPEN and (self._docs or path != "/docs"):
            return ANYBODY
        access = await self._caller(scope)
        if methods is None:
            raise NotFound
        if right is None:
            raise MethodNotAllowed(scope["method"], sorted(methods))
        if session and right > Right.KEY:
            await self._check(access, session)
        if right > GRANTED[access.scope]:
            raise Forbidden
        return access

    # Who calls

    async def _caller(self, scope: Scope) -> Access:
        """Raises Unauthenticated, StoreUnavailable."""
        given: bytes | None = None
        host = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                if given is not None:  # which of them is meant?
                    raise Unauthenticated
                given = value
            elif name == b"host":
                host = value
        asked = self._asks or (self._only_here and not self._is_here(scope, host))
        if given is None:
            if asked:
                raise Unauthenticated
            return ANYBODY
        scheme, _, text = given.partition(b" ")
        if scheme.lower() != b"bearer":  # of a proxy before the service, where no key is asked for
            if asked:
                raise Unauthenticated
            return ANYBODY
        access = await self._known.caller(text.strip(b" "))
        if access is None:
            raise Unauthenticated
        return access

    def _is_here(self, scope: Scope, host: bytes) -> bool:
        """Whether the connection came in at an address of this machine alone, and is meant for a name of it."""
        server = scope.get("server")
        if server is not None and server[1] is not None and not _is_own(server[0]):  # no port: a unix socket
            return False
        if host in self._names:
            return True
        if not is_local_name(host.decode("latin-1")):
            return False
        if len(self._names) < _MAX_NAMES and len(host) < 64:
            self._names.add(host)
        return True

    # Whose it is

    async def _check(self, access: Access, session: str) -> None:
        """Raises SessionNotFound: of a session of somebody else nothing is told, not even that there is one."""
        if access.scope == "worker" and session != access.session:
            raise SessionNotFound(session)
        if self._tenants.get(session) == access.tenant:
            return
        tenant = await self._tenant_of(session)
        if len(self._tenants) >= MAX_SESSIONS:
            del self._tenants[next(iter(self._tenants))]
        self._tenants[session] = tenant
        if tenant != access.tenant:
            raise SessionNotFound(session)

    # What takes long

    async def watched(self, plane: Application, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        """`plane`, which is let go once the key of this id is not valid any more. Raises Unauthenticated where that
        came in the middle of the body, of which nothing was applied.
        """
        watch = _Watch(self, key, receive, send)
        await plane(scope, watch.receive, watch.send)
        if watch.refused:
            raise Unauthenticated

    async def valid(self, key: str, believed: float = BELIEVED) -> bool:
        """Whether the key is. True where the store is away: nothing new is told or taken then that it has not seen."""
        try:
            return await self._known.valid(key, believed)
        except (StoreUnavailable, StoreFull):
            return True

    @contextlib.contextmanager
    def waiting(self, key: str) -> Iterator[asyncio.Future[None]]:
        """A future that is done once the key is not valid any more."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[over] = key
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        try:
            yield over
        finally:
            del self._waiting[over]

    async def _watch(self) -> None:
        """As long as anybody waits."""
        while self._waiting:
            await asyncio.sleep(LOOK)
            keys = set(self._waiting.values())
            valid = await asyncio.gather(*[self.valid(key, LOOK) for key in keys])
            ended = {key for key, still in zip(keys, valid, strict=True) if not still}
            for over, key in self._waiting.items():
                if key in ended and not over.done():
                    over.set_result(None)

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)


class _Watch:
    """The two ends of a request with a key."""

    __slots__ = ("_gate", "_key", "_receive", "_send", "_until", "_whole", "refused")

    def __init__(self, gate: Gate, key: str, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._key = key
        self._receive = receive
        self._send = send
        self._until = time.monotonic() + BELIEVED
        self._whole = False  # the body has come
        self.refused = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._wait()
        message = await self._receive()
        self._whole = message["type"] == "http.request" and not message.get("more_body", False)
        if time.monotonic() > self._until:
            if not await self._gate.valid(self._key):
                self.refused = True
                return {"type": "http.disconnect"}
            self._until = time.monotonic() + BELIEVED
        return message

    async def _wait(self) -> Message:
        """The client's going, or the key's end: the body is there, so nothing else can come."""
        heard = asyncio.ensure_future(self._receive())
        try:
            with self._gate.waiting(self._key) as over:
                await asyncio.wait((heard, over), return_when=asyncio.FIRST_COMPLETED)
                return heard.result() if heard.done() else OVER
        finally:
            heard.cancel()

    async def send(self, message: Message) -> None:
        if not self.refused:  # or the plane tells of a client that went away, which it did not
            await self._send(message)


# -- addresses and names -----------------------------------------------------------------------------------------------


def is_loopback(address: str) -> bool:
    """Of an IP address in text."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


# The addresses of this machine that connections come in at are few.
_is_own: Final = lru_cache(64)(is_loopback)


def listens_locally(host: str) -> bool:
    """Whether every address that `host` stands for, as one to listen on, is this machine's own; "" is all of them."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(is_loopback(str(entry[4][0])) for entry in found)


def is_local_name(host: str) -> bool:
    """Whether the value of a Host header names this machine: an address of it, `localhost`, or a name without a dot.

    A web page can make its own name resolve to 127.0.0.1, and that name has a dot in it.
    """
    name = host.strip().lower()
    if name.startswith("["):
        return is_loopback(name[1:].partition("]")[0])
    name = name.partition(":")[0].rstrip(".")
    return "." not in name or name.endswith(".localhost") or is_loopback(name)
