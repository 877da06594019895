"""How often a caller may ask, and how much of it at once: the quotas that are looked at before anything is done.

Rates are counted in the store, for all replicas together, by the sliding window counter of the library `limits`: two
counters for each rate, whatever its size, and one script that looks and counts in one. The share of the window before
is estimated from its end, so within a window at most the limit is let through, and over any other time of its length
about as much. (The moving window is exact, and keeps a time stamp for each request, from each replica's own clock.)

The library would make a client of its own: 100 µs of CPU a command, a pool that fails rather than waits, and a second
reading of the store's address, in which TLS options and clusters' differ. So it is given one that sends by the store's
connections, where commands of one turn of the event loop go out together. Whoever has no rate is asked nothing.

Where the store is full, nothing can be counted, and callers are let through: they must be able to delete sessions.
Requests in flight are counted by each process for itself; those that wait for others do not count while they wait.
"""

import asyncio
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, Final, NamedTuple

import redis
from limits import RateLimitItem
from limits.aio.storage import RedisStorage, Storage
from limits.aio.storage.redis.redispy import RedispyBridge
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from service.access.rates import parse_rate
from service.access.rights import Access, Right, granted, path_of
from service.access.script import Call, Script
from service.admission import TICKET, Ticket
from service.errors import QuotaExceeded, Standing, StoreFull
from service.http import Message, Scope, Send
from service.problems import rate_limits

PREFIX: Final = "ravine:limits"
# Not counted: what anybody may ask for, and what watches the service, which would be blind just when it matters. Nobody
# but the operator has a right to the latter, and the former is asked for as nobody, whoever asks.
UNCOUNTED: Final = frozenset(("/livez", "/readyz", "/metrics", "/docs"))


class _Window(NamedTuple):
    """The two counters of a rate, and the seconds for which each is kept: up to two lengths of the window."""

    before: int
    before_left: float
    here: int
    here_left: float

    def count(self, length: int) -> int:
        return int(self.before * self.before_left / length) + self.here

    def seconds_until_more(self, limit: int, length: int) -> int:
        """Whole seconds, at least one, until there is room for a request, or for more of them."""
        ends = self.here_left - length
        seconds = ends
        if self.count(length) >= limit and self.here < limit:  # as soon as enough of the window before is over
            seconds = self.before_left - length * (limit - self.here) / self.before
        return max(1, ceil(seconds))


class Quotas:
    """Each tenant may ask at `rate`, and have at most `requests` in flight here; None: as much as there is.

    A key may have a rate of its own beside that. `call` sends one command to the store.
    """

    def __init__(self, call: Call, rate: str | None = None, requests: int | None = None) -> None:
        self._rate = None if rate is None else parse_rate(rate)
        self._requests = requests
        self._in_flight: dict[str, int] = {}
        self._storage = _Storage(call)
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    def counts(self, access: Access) -> bool:
        """Whether anything of this caller is counted."""
        return self._rate is not None or access.rate is not None or self._requests is not None

    async def enter(self, access: Access, scope: Scope) -> "Turn | None":
        """None where nothing is counted. Raises QuotaExceeded, StoreUnavailable."""
        if not self.counts(access):
            return None
        if path_of(scope) in UNCOUNTED and granted(access) is Right.OPERATOR:
            return None
        self._begin(access.tenant)
        turn = Turn(lambda: self._end(access.tenant))
        try:
            turn.standings = await self._standings(access)
        except BaseException:
            turn.leave()
            raise
        ticket: Ticket | None = scope.get(TICKET)
        if ticket is not None:
            ticket.then = turn.leave
        return turn

    async def _standings(self, access: Access) -> list[Standing]:
        rates = []
        if access.rate is not None and access.key is not None:  # first: it must not use up what is for all keys
            rates.append(await self._hit("key", access.key, parse_rate(access.rate)))
        if self._rate is not None:
            rates.append(await self._hit("tenant", access.tenant, self._rate))
        return [standing for standing in rates if standing is not None]

    async def _hit(self, whose: str, name: str, rate: RateLimitItem) -> Standing | None:
        """Counts a request, and says what is left; None where the store is full. Raises QuotaExceeded."""
        length = rate.get_expiry()
        look = self._storage.get_sliding_window(rate.key_for(whose, name), length)
        try:
            passed, found = await asyncio.gather(self._limiter.hit(rate, whose, name), look)
        except StoreFull:
            return None
        window = _Window(*found)
        seconds = window.seconds_until_more(rate.amount, length)
        left = max(0, rate.amount - window.count(length)) if passed else 0
        standing = Standing(whose, rate.amount, left, seconds, window=length)
        if not passed:
            raise QuotaExceeded("rate", f"this {whose} may ask {rate.amount} times in {length} s", standing)
        return standing

    def _begin(self, tenant: str) -> None:
        now = self._in_flight.get(tenant, 0)
        if self._requests is not None and now >= self._requests:
            sentence = f"{now} requests of this tenant are under way here, and may be {self._requests} at once"
            standing = Standing("requests", self._requests, 0, 1, unit="concurrent-requests")
            raise QuotaExceeded("requests", sentence, standing)
        self._in_flight[tenant] = now + 1

    def _end(self, tenant: str) -> None:
        left = self._in_flight[tenant] - 1
        if left:
            self._in_flight[tenant] = left
        else:
            del self._in_flight[tenant]


class Turn:
    """A request that was let through, and where its sender stands with each rate. `leave` at its end, or as soon as it
    only waits; more than once does no harm.
    """

    __slots__ = ("_end", "standings")

    def __init__(self, end: Callable[[], None]) -> None:
        self.standings: Sequence[Standing] = ()
        self._end: Callable[[], None] | None = end

    def told(self, send: Send) -> Send:
        """`send`, with where the sender stands in the head of the reply."""
        if not self.standings:
            return send
        fields = [(name.lower().encode(), text.encode()) for name, text in rate_limits(self.standings).items()]

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *fields]
            await send(message)

        return tell

    def leave(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None


class _Client:
    """As much of a client of redis-py as the library's sliding window asks for."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def register_script(self, text: bytes) -> Script:
        return Script(self._call, text)


class _Bridge(RedispyBridge):
    """The library's own, over our client: the scripts and what their replies mean."""

    def __init__(self, call: Call) -> None:
        super().__init__("redis://", redis, PREFIX)
        client: Any = _Client(call)
        self.connection_getter = lambda _readonly: client
        self.register_scripts()


class _Storage(RedisStorage):
    def __init__(self, call: Call) -> None:
        Storage.__init__(self)  # that of RedisStorage would make a client
        self.bridge = _Bridge(call)
