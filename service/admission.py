"""How much is let in at once: connections, requests in flight, requests that wait, bytes of bodies.

Whatever comes beyond is refused at once (503, `overloaded`), for the cheapest way through too much work is not to begin
it: what was let in keeps its latency, and memory stays flat. Four counts, each with its own bound:

- Connections are counted by the protocol, before anything of them is read.
- A request is in flight from its headers on, before a key or a body is looked at. Those that tell how the service
  does are counted, and let through: it is under load that somebody asks.
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
        self.waits = 0
        self.bodies = 0
        self.queued = 0  # requests that were pipelined behind one in flight
        self.refused: dict[Resource, int] = {"connections": 0, "requests": 0, "waits": 0, "bodies": 0}
        self.cut: dict[str, int] = {"malformed": 0, "head": 0, "slow head": 0, "stalled reply": 0}
        self.counting = threading.Lock()  # of bytes

    def enter(self, scope: MutableMapping[str, Any]) -> "Ticket":
        """A ticket for the request, which is put into its scope. Raises Overloaded."""
        if self.requests >= self.limits.requests and scope["path"] not in ALWAYS:
            raise self.overloaded("requests")
        self.requests += 1
        ticket = Ticket(self)
        scope[TICKET] = ticket
        return ticket

    def overloaded(self, what: Resource) -> Overloaded:
        """Counts the refusal, and gives what is to be raised."""
        self.refused[what] += 1
        return Overloaded(what)


class Ticket:
    """One request that was let in: `leave` at its end, whatever became of it."""

    __slots__ = ("_admission", "_held", "_left", "_waits", "then")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._held = 0
        self._waits = False
        self._left = False
        self.then: Callable[[], None] | None = None  # called once it waits

    @property
    def stall_seconds(self) -> float:
        return self._admission.limits.stall_seconds

    def wait(self) -> None:
        """From now on the request counts among those that wait. Raises Overloaded where these are too many."""
        admission = self._admission
        if self._waits:
            return
        if admission.waits >= admission.limits.waits:
            raise admission.overloaded("waits")
        self._waits = True
        admission.waits += 1
        admission.requests -= 1
        if self.then is not None:
            self.then()

    def claim(self, size: int) -> None:
        """`size` bytes more are held for this request. Raises Overloaded. In any thread."""
        admission = self._admission
        with admission.counting:
            # A thread that inflates goes on when its request is given up; it ends here.
            if not self._left and admission.bodies + size <= admission.limits.bodies:
                admission.bodies += size
                self._held += size
                return
        raise admission.overloaded("bodies")

    def release(self) -> None:
        """The body is no longer held, though the request goes on."""
        admission = self._admission
        with admission.counting:
            admission.bodies -= self._held
            self._held = 0

    def leave(self) -> None:
        admission = self._admission
        with admission.counting:
            self._left = True
            admission.bodies -= self._held
        if self._waits:
            admission.waits -= 1
        else:
            admission.requests -= 1


def open_files(wanted: int) -> int:
    """Raises the limit of open files towards `wanted` connections, as far as the hard one lets it.

    Returns for how many connections there will be files: `wanted`, or fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if resource.RLIM_INFINITY in (soft, hard) and soft == resource.RLIM_INFINITY:
        return wanted
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - RESERVED_FILES))
