"""The gate that every request passes before either plane sees it: who calls, what may they do, whose session is it.

    no key, where one is asked for; a wrong one      401, one and the same for all of them
    a path that there is none of                     404
    a method that the path does not take             405
    a session of somebody else, or none at all       404, one and the same
    what the key is not for                          403

The first is told before, the others after the caller's quotas were asked: what is refused counts as well.

Without a valid key nothing more is told than that: not which paths there are, nor which sessions. The store is asked
about a session even where it is known to be somebody else's, so that the time does not tell what the words do not.

Keys are asked for by the setting `keys`. With `auto` they are not where nobody but this machine can ask: the address
that is listened on, the one that the connection came in at, and the name in Host are all this machine's own. The last
keeps out web pages that make a name of theirs resolve to 127.0.0.1, and the public name that a proxy passes on. The
setting `hosts` says which names do without a key instead, `insecure` or not. And whatever the name, a browser that says
that it sends for a page from elsewhere is asked for a key: that page could not read the answer, but change things.

What waits for long is let go within a second or so of its key's end: a body that is still coming is not read on, a long
poll is answered as if its time were over, an event stream ends. So the client asks again, and is then refused.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from typing import Final

import structlog

from service.access.hosts import host_of, is_allowed, is_own
from service.access.keys import BELIEVED, KnownKeys
from service.access.rights import ANYBODY, Access, Right, call_at, granted, path_of
from service.errors import Forbidden, SessionNotFound, StoreFull, StoreUnavailable, Unauthenticated
from service.http import OVER, Message, Receive, Scope, Send
from service.problems import MethodNotAllowed, NotFound

log = structlog.get_logger("ravine.access")

# Whose a session is never changes, so it is remembered: 100 bytes each.
MAX_SESSIONS: Final = 65_536
# Seconds between two looks at the keys of those who wait.
LOOK: Final = 0.5
_MAX_NAMES: Final = 64
_LOOKED_AT: Final = frozenset((b"authorization", b"host", b"origin", b"sec-fetch-site"))

Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeysNeeded(Exception):
    """The service would listen where others reach it, and nobody could come in, or anybody."""


class Gate:
    """`tenant_of` tells whose a session is, and asks the store; `tidy` takes one that is not there out of its tenant's
    list. `local`: nobody but this machine reaches the address that is listened on; `keys` is the setting, `hosts` the
    names in Host that do without a key, `docs` whether the reference is shown without one.
    """

    def __init__(
        self,
        known: KnownKeys,
        tenant_of: Callable[[str], Awaitable[str]],
        tidy: Callable[[str, str], Awaitable[None]],
        *,
        keys: str,
        local: bool,
        insecure: bool = False,
        hosts: Set[str] | None = None,
        docs: bool = True,
    ) -> None:
        self._known = known
        self._tenant_of = tenant_of
        self._tidy = tidy
        self._hosts = hosts
        self._asks = keys == "required" or (keys == "auto" and not local and not insecure)
        self._only_here = keys == "auto" and local and not insecure
        self._docs = docs
        self._tenants: dict[str, str] = {}
        self._names: set[bytes] = set()  # that do without a key, as Host had them
        self._waiting: dict[asyncio.Future[None], str] = {}  # who is to be let go -> the id of their key
        self._watcher: asyncio.Task[None] | None = None

    async def caller(self, scope: Scope) -> Access:
        """Who calls. Raises Unauthenticated, StoreUnavailable."""
        path = path_of(scope)
        methods, _ = call_at(path)
        if methods is not None and methods.get(scope["method"]) is Right.OPEN and (self._docs or path != "/docs"):
            return ANYBODY
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in _LOOKED_AT:
                if name in headers:  # which of them is meant?
                    raise Unauthenticated
                headers[name] = value
        scheme, _, text = headers.get(b"authorization", b"").replace(b"\t", b" ").partition(b" ")
        if scheme.lower() == b"bearer":  # another is of a proxy before the service, where no key is asked for
            access = await self._known.caller(text.strip(b" "))
            if access is None:
                raise Unauthenticated
            return access
        if self._asks or not self._may_be_keyless(scope, headers):
            raise Unauthenticated
        return ANYBODY

    def at_once(self, scope: Scope, headers: Mapping[bytes, bytes], session: str, right: Right) -> Access | None:
        """Who calls, and has this `right` to the session, where nobody need be asked; None: `caller` and `check` say.

        `headers` are all there are, each of them once.
        """
        given = headers.get(b"authorization")
        access: Access | None
        if given is not None:
            scheme, _, text = given.partition(b" ")
            access = self._known.remembered(text) if scheme.lower() == b"bearer" else None
        else:
            access = None if self._asks or not self._may_be_keyless(scope, headers) else ANYBODY
        if access is None or self._tenants.get(session) != access.tenant or granted(access) < right:
            return None
        return access if access.scope != "worker" or access.session == session else None

    async def check(self, access: Access, scope: Scope) -> None:
        """Whether they may. Raises NotFound, MethodNotAllowed, SessionNotFound, Forbidden, StoreUnavailable, and what
        the engine says of a session that it cannot read.
        """
        methods, session = call_at(path_of(scope))
        method: str = scope["method"]
        if methods is None:
            raise NotFound
        right = methods.get(method)
        if right is None:
            raise MethodNotAllowed(method, sorted(methods))
        if session and right > Right.KEY:
            try:
                await self._check(access, session)
            except SessionNotFound:
                # Whoever deletes it once more means what a deletion that was broken off has left; and of a session of
                # somebody else too, so that the time does not tell.
                if method == "DELETE" and right <= granted(access):
                    await self._tidy(session, access.tenant)
                raise
        if right > granted(access):
            raise Forbidden

    # Who calls

    def _may_be_keyless(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        host = headers.get(b"host", b"")
        if self._only_here:
            server = scope.get("server")
            if server is not None and server[1] is not None and not is_own(server[0]):  # no port: a unix socket
                return False
        # No browser speaks HTTP/1.0, in which there need not be a name.
        named = host or scope.get("http_version") != "1.0"
        if named and (self._only_here or self._hosts is not None) and not self._is_known(host):
            return False
        if headers.get(b"sec-fetch-site") == b"cross-site":
            return False
        origin = headers.get(b"origin")
        if origin is None:
            return True
        sender = host_of(origin)
        return sender is not None and (sender == host or self._is_known(sender))

    def _is_known(self, host: bytes) -> bool:
        """Whether this is one of the names that do without a key."""
        if host in self._names:
            return True
        if not is_allowed(host, self._hosts):
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
        if await self._tenant_of(session) != access.tenant:
            raise SessionNotFound(session)
        if len(self._tenants) >= MAX_SESSIONS:
            del self._tenants[next(iter(self._tenants))]
        self._tenants[session] = access.tenant

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
            found = await asyncio.gather(*[self.valid(key, LOOK) for key in keys], return_exceptions=True)
            ended = {key for key, still in zip(keys, found, strict=True) if still is not True}
            for key, still in zip(keys, found, strict=True):
                if isinstance(still, BaseException):  # of this key alone; the others are looked at all the same
                    log.error("a key cannot be looked at: who waits with it is let go", key=key, reason=repr(still))
            for over, key in self._waiting.items():
                if key in ended and not over.done():
                    over.set_result(None)

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)


class _Watch:
    """The two ends of a request with a key."""

    __slots__ = ("_gate", "_key", "_receive", "_send", "_whole", "refused")

    def __init__(self, gate: Gate, key: str, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._key = key
        self._receive = receive
        self._send = send
        self._whole = False  # the body has come
        self.refused = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._wait()
        message = await self._receive()
        self._whole = message["type"] == "http.request" and not message.get("more_body", False)
        if not await self._gate.valid(self._key):
            self.refused = True
            return {"type": "http.disconnect"}
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
