"""How much is let in at once: connections, requests in flight, requests that wait, bytes of bodies.

Whatever comes beyond is refused at once (503, `overloaded`), for the cheapest way through too much work is not to begin
it: what was let in keeps its latency, and memory stays flat. Counts, each with its own bound:

- Connections are counted by the protocol, before anything of them is read.
- A request is in flight from its headers on, before a key or a body is looked at. Those that tell how the service
  does are let through, and not counted: it is under load that somebody asks.
- While its body does not come, a request is not at work, and takes nobody's place: it passes to the arrivals. There is
  one at most in each connection, and what has come of it counts as bytes, which bounds them. (A bound of their own
  would let whoever sends heads alone shut out all whose bodies come after their heads, as many clients send them.)
  Once the body is there it is in flight again, and refused only where there are twice as many as there may be: what
  took long to send is not thrown away for a moment's rush.
- Once there were too many in flight, how many there may be depends on how long they wait for their turn (`Throttle`).
- A request that waits for others (long polls, event streams, `Prefer: wait`) costs nothing meanwhile. It passes from
  the requests to the waits, and stays there to its end: a round may wake thousands at once, and they would otherwise
  shut out the very contributions that the next round waits for.
- Bytes count as they arrive, never as they are declared, and as long as the request holds them; those of an inflated
  body as it grows. A body of less than `bodies.SMALL` bytes that came in one piece is not counted: requests in flight
  bound those.

Plain numbers, changed on the event loop; only bytes are counted by threads too, and under a lock.
"""

import math
import resource
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from service.errors import Overloaded

Resource: TypeAlias = Literal["connections", "requests", "waits", "bodies"]

TICKET: Final = "ravine.ticket"  # where a request's ticket is in its scope
ARRIVED: Final = "ravine.arrived"  # a function there: whether a part of the body is there to be taken
READY: Final = "ravine.ready"  # a time there, of the loop's clock: when the request was let in, and could be begun

# Where a request is counted.
_UNCOUNTED, _AT_WORK, _ARRIVING, _WAITING = range(4)
# Let through however much there is to do.
ALWAYS: Final = frozenset(("/livez", "/readyz", "/metrics"))
# Open files that are no connections of clients: the store's, the log, libraries, those that are being turned away.
RESERVED_FILES: Final = 256

LAG: Final = 0.005  # seconds, where nothing else was said
# A window lasts as many seconds and turns of the loop, at least. One that is so old says nothing of now.
WINDOW, TURNS, FORGOTTEN = 0.1, 3, 5.0
FLOOR: Final = 64  # requests in flight that are never too many, however slow the machine


class Limits(NamedTuple):
    """Counts, and `bodies` in bytes; the rest in seconds.

    A head must be whole within `head_seconds`; a body may stand still for `stall_seconds`, and so may a reply. Once
    there were more than `requests`, fewer are let in while they wait for the loop for over `lag_seconds`; 0: never.
    """

    connections: int = 16_384
    requests: int = 1024
    waits: int = 8192
    bodies: int = 4 << 30
    head_seconds: float = 15.0
    stall_seconds: float = 30.0
    lag_seconds: float = LAG


class Throttle:
    """How many requests may be in flight: `most`, and fewer once there were more, while they wait long for the loop.

    A crowd that there is room for is let in, however long it waits: a thousand workers that contribute to a round at
    the same time are done in a fifth of a second, and nothing would be won if most were told to come again. But where
    it is too large anyway, those who are let in need not wait behind a thousand others. From then on the number follows
    the wait: down at once to where it would be no more than `lag` seconds, and up by little while it is less (as in
    AIMD), which finds the number that the loop can take; until it is `most` again.

    A wait that passes is no overload (Nichols & Jacobson 2012, doi:10.1145/2209249.2209264: what counts is the queue
    that stands). The requests that are read in one turn of the loop are begun in the next, one after the other: how
    long the last of them waited is how long the turn was, and the shortest of several turns is what stands. A pause of
    the process makes one turn long, not all. (uvloop's clock stands still within a turn, which tells turns apart.)
    """

    def __init__(self, most: int, lag: float) -> None:
        self.limit = most
        self._most = most
        self._least = min(most, FLOOR)
        self._lag = lag
        self._since = -math.inf  # when the window began
        self._turns = 0  # of the window
        self._shortest = math.inf  # of those that are over
        self._turn = -math.inf  # when the requests of the one under way could have been begun
        self._waited = math.inf  # the last of them
        self._refused = False  # somebody was, since the last adjustment

    def refuse(self) -> None:
        """There were as many as there may be."""
        self._refused = True

    def saw(self, ready: float, now: float, in_flight: int) -> None:
        """A request is begun `now` that could have been at the time `ready`, with so many others in flight."""
        if ready != self._turn:
            self._shortest = min(self._shortest, self._waited)
            self._turns += 1
            self._turn = ready
            if now - self._since >= WINDOW and self._turns > TURNS:
                self._adjust(now, in_flight)
        self._waited = now - ready

    def _adjust(self, now: float, in_flight: int) -> None:
        if self.forgets(now):
            pass
        elif self._shortest <= self._lag:
            self.limit = min(self._most, self.limit + self.limit // 16 + 1)
        elif self._refused or self.limit < self._most:
            share = max(0.5, self._lag / self._shortest)
            self.limit = max(self._least, int(share * min(self.limit, in_flight)))
        self._since, self._turns, self._shortest, self._refused = now, 0, math.inf, False

    def forgets(self, now: float) -> bool:
        """Whether nothing was seen for so long that the limit is `most` again."""
        if now - self._since <= FORGOTTEN:
            return False
        self.limit, self._since = self._most, now
        return True


class Admission:
    """What is under way now, against its limits. `refused` counts by what there was too much of."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 (a tuple)
        self.limits = limits
        self.throttle = Throttle(limits.requests, limits.lag_seconds) if limits.lag_seconds else None
        self.connections = 0
        self.requests = 0
        self.arrivals = 0
        self.waits = 0
        self.bodies = 0
        self.begun = 0  # requests that the loop has been given, and has not come to yet
        self.queued = 0  # requests that were pipelined behind one in flight
        self.refused: dict[Resource, int] = {"connections": 0, "requests": 0, "waits": 0, "bodies": 0}
        self.cut = dict.fromkeys(("malformed", "head", "slow head", "pipelined", "stalled reply"), 0)
        self.counting = threading.Lock()  # of bytes
        # Told of each request that is refused before it is begun; gives the id that its reply has.
        self.told: Callable[[MutableMapping[str, Any]], bytes] = lambda _: b"-"

    def enter(self, scope: MutableMapping[str, Any]) -> "Ticket":
        """A ticket for the request, which is put into its scope. Raises Overloaded."""
        ready: float | None = scope.pop(READY, None)
        if ready is not None:
            self.begun -= 1
            if self.throttle is not None:
                self.throttle.saw(ready, time.monotonic(), self.requests + self.begun)
        if scope["path"] in ALWAYS:
            ticket = Ticket(self, _UNCOUNTED)
        elif self.requests < (self.limit if ready is None else self.limits.requests):
            self.requests += 1
            ticket = Ticket(self, _AT_WORK)
        else:
            raise self.overloaded("requests")
        scope[TICKET] = ticket
        return ticket

    @property
    def full(self) -> bool:
        """Whether one request more would be refused, as far as can be said before it is begun."""
        under_way = self.requests + self.begun
        if under_way < self.limit:
            return False
        # Where all that are in flight take long, none is begun, and nothing seen.
        return self.throttle is None or not self.throttle.forgets(time.monotonic()) or under_way >= self.limit

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return self.limits.requests if self.throttle is None else self.throttle.limit

    def overloaded(self, what: Resource) -> Overloaded:
        """Counts the refusal, and gives what is to be raised."""
        self.refused[what] += 1
        if what == "requests" and self.throttle is not None:
            self.throttle.refuse()
        return Overloaded(what)


class Ticket:
    """One request that was let in: `leave` at its end, whatever became of it."""

    __slots__ = ("_admission", "_claims", "_held", "_left", "_place", "then")

    def __init__(self, admission: Admission, place: int) -> None:
        self._admission = admission
        self._claims = False
        self._held = 0
        self._place = place
        self._left = False
        self.then: Callable[[], None] | None = None  # called once it waits

    @property
    def stall_seconds(self) -> float:
        return self._admission.limits.stall_seconds

    @property
    def waits(self) -> bool:
        return self._place == _WAITING

    def arrive(self) -> None:
        """From now on its body is waited for."""
        if self._place == _AT_WORK:
            self._place = _ARRIVING
            self._admission.arrivals += 1
            self._admission.requests -= 1

    def arrived(self) -> None:
        """Its body is there. Raises Overloaded."""
        admission = self._admission
        if self._place != _ARRIVING:
            return
        if admission.requests >= 2 * admission.limits.requests:
            raise admission.overloaded("requests")
        self._place = _AT_WORK
        admission.arrivals -= 1
        admission.requests += 1

    def wait(self) -> None:
        """From now on the request counts among those that wait. Raises Overloaded where these are too many."""
        admission = self._admission
        if self._place != _AT_WORK:
            return
        if admission.waits >= admission.limits.waits:
            raise admission.overloaded("waits")
        self._place = _WAITING
        admission.waits += 1
        admission.requests -= 1
        if self.then is not None:
            self.then()

    def claim(self, size: int) -> None:
        """`size` bytes more are held for this request. Raises Overloaded. In any thread."""
        if self.claimed(size):
            return
        if self._left:  # a thread that inflates goes on when its request is given up; it ends here
            raise Overloaded("bodies")
        raise self._admission.overloaded("bodies")

    def claimed(self, size: int) -> bool:
        """The same, where there is room for them."""
        admission = self._admission
        self._claims = True  # before it is looked whether it has left, as `leave` does the other way round
        with admission.counting:
            if self._left or admission.bodies + size > admission.limits.bodies:
                return False
            admission.bodies += size
            self._held += size
            return True

    def release(self) -> None:
        """The body is no longer held, though the request goes on."""
        admission = self._admission
        with admission.counting:
            admission.bodies -= self._held
            self._held = 0

    def leave(self) -> None:
        admission = self._admission
        self._left = True
        if self._claims:
            with admission.counting:
                admission.bodies -= self._held
        if self._place == _AT_WORK:
            admission.requests -= 1
        elif self._place == _WAITING:
            admission.waits -= 1
        elif self._place == _ARRIVING:
            admission.arrivals -= 1


def open_files(wanted: int) -> int:
    """Raises the limit of open files towards `wanted` connections, as far as the hard one lets it.

    Returns for how many connections there will be files: `wanted`, or fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - RESERVED_FILES))
