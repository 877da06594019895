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
- A request that waits for others (long polls, event streams, `Prefer: wait`) costs nothing meanwhile. It passes from
  the requests to the waits, and stays there to its end: a round may wake thousands at once, and they would otherwise
  shut out the very contributions that the next round waits for.
- Bytes count as they arrive, never as they are declared, and as long as the request holds them; those of an inflated
  body as it grows. A body of less than `bodies.SMALL` bytes that came in one piece is not counted: requests in flight
  bound those.

Plain numbers, changed on the event loop; only bytes are counted by threads too, and under a lock.
"""

import resource
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from service.errors import Overloaded

Resource: TypeAlias = Literal["connections", "requests", "waits", "bodies"]

TICKET: Final = "ravine.ticket"  # where a request's ticket is in its scope
ARRIVED: Final = "ravine.arrived"  # a function there: whether a part of the body is there to be taken

# Where a request is counted.
_UNCOUNTED, _AT_WORK, _ARRIVING, _WAITING = range(4)
# Let through however much there is to do.
ALWAYS: Final = frozenset(("/livez", "/readyz", "/metrics"))
# Open files that are no connections of clients: the store's, the log, libraries, those that are being turned away.
RESERVED_FILES: Final = 256


class Limits(NamedTuple):
    """Counts, and `bodies` in bytes; the rest in seconds.

    A head must be whole within `head_seconds`; a body may stand still for `stall_seconds`, and so may a reply.
    """

    connections: int = 16_384
    requests: int = 1024
    waits: int = 8192
    bodies: int = 4 << 30
    head_seconds: float = 15.0
    stall_seconds: float = 30.0


class Admission:
    """What is under way now, against its limits. `refused` counts by what there was too much of."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 (a tuple)
        self.limits = limits
        self.connections = 0
        self.requests = 0
        self.arrivals = 0
        self.waits = 0
        self.bodies = 0
        self.queued = 0  # requests that were pipelined behind one in flight
        self.refused: dict[Resource, int] = {"connections": 0, "requests": 0, "waits": 0, "bodies": 0}
        self.cut = dict.fromkeys(("malformed", "head", "slow head", "pipelined", "stalled reply"), 0)
        self.counting = threading.Lock()  # of bytes

    def enter(self, scope: MutableMapping[str, Any]) -> "Ticket":
        """A ticket for the request, which is put into its scope. Raises Overloaded."""
        if scope["path"] in ALWAYS:
            ticket = Ticket(self, _UNCOUNTED)
        elif self.requests < self.limits.requests:
            self.requests += 1
            ticket = Ticket(self, _AT_WORK)
        else:
            raise self.overloaded("requests")
        scope[TICKET] = ticket
        return ticket

    def overloaded(self, what: Resource) -> Overloaded:
        """Counts the refusal, and gives what is to be raised."""
        self.refused[what] += 1
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
        admission = self._admission
        self._claims = True  # before it is looked whether it has left, as `leave` does the other way round
        with admission.counting:
            if self._left:  # a thread that inflates goes on when its request is given up; it ends here
                raise Overloaded("bodies")
            if admission.bodies + size > admission.limits.bodies:
                raise admission.overloaded("bodies")
            admission.bodies += size
            self._held += size

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
