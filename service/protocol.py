"""HTTP/1.1 for clients that do not mean well: uvicorn's protocol, with an end to all that it would hold for ever.

uvicorn parses (llhttp) and answers; what is added here are deadlines and bounds, and an orderly end.

- A head must be whole within `head_seconds` of the connection, or of its own first bytes (408; silent connections are
  closed without a word), and within MAX_HEAD bytes and MAX_HEADERS headers (431).
- More connections than there may be are told 503 and closed. Requests that are sent ahead of replies (pipelining) are
  read only as far as a bounded number of them waits, in each connection and in all together.
- What could be read in two ways is refused (400), for a proxy may have read it in the other one: no Host or two,
  codings beside chunked, chunks with more around them than in them. Trailers never pass for headers. (llhttp itself
  refuses two lengths, a length beside Transfer-Encoding, and lines that end otherwise than in CR LF.)

Bodies have their deadlines in bodies.py, since only who reads them knows that they are waited for. How replies go out,
and how connections end, is in outlet.py.

The hot path, a request that arrives whole on a connection that is kept, sets no timer and cancels none. uvicorn sets
one for each reply, for the silence that may follow; here one timer a connection looks, when it fires, how long the
silence is, and sleeps on until that could be too long.

A WebSocket is not offered; a request to upgrade to anything is answered as if it had not asked (RFC 9110, 7.8).
"""

import asyncio
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, ClassVar, Final, TypeAlias, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.admission import ALWAYS, ARRIVED, READY, TICKET, Admission, Ticket
from service.flow import Flow
from service.intake import INTAKE, Came, Intake
from service.outlet import PlainOutlet, TlsOutlet, outlet_of
from service.problems import HeadTooLarge, MalformedRequest, RequestTimeout, as_sent

MAX_HEAD: Final = 64 << 10  # bytes
MAX_HEADERS: Final = 100
# An unwanted body up to so long is read to its end, and the connection kept.
DRAINED: Final = 1 << 20
# What may need no application, and how many turns a body is waited for, which may come in a packet of its own.
SHORT, BODY_TURNS = {"POST": "/steps", "GET": "params"}, 2
# Requests that wait behind one in flight: in a connection, and in all for each that may be in flight.
PIPELINED, PIPELINED_OF_ALL = 256, 16
HEARD_BEHIND: Final = 16  # of them, while the one in flight waits: more are not read
# Bytes around those of a chunk, for each of these; and how many more there may be, trailers included.
OVERHEAD, EXCESS = 16, 64 << 10

BETWEEN, _HEAD, _BODY = range(3)  # where the parser is
_VERSIONS: Final = frozenset(("1.0", "1.1"))
_LOOKED_AT: Final = frozenset((b"host", b"transfer-encoding", b"expect"))

Takes: TypeAlias = Callable[[RequestResponseCycle], bool]


class Guarded(HttpToolsProtocol):
    """One connection. `admission` and `takes`, whether a request needs no application, are set by `guarded`."""

    admission: ClassVar[Admission]
    takes: ClassVar[Any]  # of type Takes

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._outlet: PlainOutlet | TlsOutlet | None = None  # None: not let in, or over
        self._at = BETWEEN
        self._hosts = 0
        self._since = 0.0  # the connection, or the silence after the last reply, began
        self._head_since = 0.0  # the head that is not whole yet began; 0.0: there is none
        self._head_size = 0  # of its parts but the first and the last
        self._begun = False  # what came last has the beginning of the message
        self._long = False  # what came was long enough for a head that is too large
        self._watch: asyncio.TimerHandle | None = None
        self._body_size = 0  # of all bodies so far
        self._counted = -1  # as much of them was looked at; -1: the message under way was not yet
        self._excess = self._unwanted = 0
        self._closing_cycle: RequestResponseCycle | None = None  # which keeps the connection once its body is there
        self._fault: Exception | None = None
        self._running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the last that came
        self._reading = False  # what came is being parsed
        self._undecided: Callable[[], None] | None = None  # begins the one that runs, which there is no room for

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        admission = self.admission
        if admission.connections >= admission.limits.connections:
            self._turn_away(transport)
            return
        admission.connections += 1
        super().connection_made(transport)
        self.flow = Flow(transport, self)
        self._outlet = outlet_of(self, transport)
        self.transport = cast("asyncio.Transport", self._outlet)
        self._since = self.loop.time()
        self._watch = self.loop.call_at(self._since + admission.limits.head_seconds, self._look)

    def _turn_away(self, transport: asyncio.Transport) -> None:
        error = self.admission.overloaded("connections")
        self._outlet = outlet_of(self, transport, counted=False)
        self.transport = cast("asyncio.Transport", self._outlet)
        transport.write(as_sent(error))
        self._outlet.end()

    def connection_lost(self, exc: Exception | None) -> None:
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            outlet.lost()
            self.admission.connections -= outlet.counted
        if self._watch is not None:
            self._watch.cancel()
        self.admission.queued -= len(self.pipeline)
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._gone(self._running)
        super().connection_lost(exc)
        self._let_go()

    def _let_go(self) -> None:
        """Of all that has this connection in turn: it is freed now, and leaves nothing to the garbage collector.

        Sixty objects each, in cycles: collecting those of some thousand connections took the loop for 20 to 50 ms, and
        those that had outlived a collection before they were closed were held for hundreds of thousands of others.
        """
        self._running = self._closing_cycle = self._fault = self._undecided = None
        # uvicorn declares them as always there, and asks for none of them once the connection is lost.
        self.cycle = self.flow = self.transport = None  # type: ignore[assignment]

    @staticmethod
    def _gone(cycle: RequestResponseCycle) -> None:
        """As far as the application is concerned, the client has."""
        cycle.disconnected = True
        cycle.message_event.set()

    def shutdown(self) -> None:
        self._closing_cycle = None
        if self._busy:
            super().shutdown()
        elif self._outlet is not None:
            self._outlet.close_now()

    # What comes

    def data_received(self, data: bytes) -> None:
        outlet = self._outlet
        if outlet is None or outlet.deaf:
            return
        if len(data) > MAX_HEAD:
            self._long = True
        size, self._begun, self._reading = len(data), False, True
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._without_upgrade() + data[upgrade.args[0] :]
        except httptools.HttpParserError:
            self._decide()
            if not (outlet.deaf or outlet.is_closing()):
                self._misread(self._fault or MalformedRequest())
            return
        self._decide()
        if self._at != BETWEEN and not (outlet.deaf or outlet.is_closing()):  # after a refusal nothing more is read
            self._go_on(size)

    def _without_upgrade(self) -> bytes:
        """The head that was read last, as if it had not asked for another protocol.

        The parser takes what follows it for that protocol. A body is no less a body for that, and to read it as the
        next request would let anybody who may send bodies send requests past a proxy.
        """
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._parse_anew()
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _parse_anew(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        # After a request to close, this one would take all that comes for what follows the end.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _go_on(self, size: int) -> None:
        """`size` bytes came, and the message is not whole."""
        if self._at == _HEAD:
            if not self._head_since:
                self._head_since = self.loop.time()
                self._look_at(self._head_since + self.admission.limits.head_seconds)
            if not self._begun:  # or the part before it is that of another
                self._head_size += size
            if self._head_size > MAX_HEAD:
                self._misread(HeadTooLarge())
        elif self._counted < 0:
            self._begin_body()
        else:
            self._excess = max(0, self._excess + size - OVERHEAD * (self._body_size - self._counted))
            self._counted = self._body_size
            if self._excess > EXCESS:
                self._misread(MalformedRequest())
            elif self.cycle.response_complete:
                self._unwanted += size
                if self._unwanted > DRAINED:
                    self.transport.close()

    def _begin_body(self) -> None:
        """Until the body is there, a reply would leave it on the connection: better none than a long one.

        A client that waits for 100 and is told something else sends its body, or does not: nobody could tell.
        """
        self._counted, self._excess, self._unwanted = self._body_size, 0, 0
        cycle = self.cycle
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if cycle.keep_alive and (self.expect_100_continue or int(length) > DRAINED):
            cycle.keep_alive = False
            self._closing_cycle = cycle
            if int(length) > DRAINED:
                cycle.scope[INTAKE] = self._take_in  # type: ignore[typeddict-unknown-key]

    def _take_in(self, room: memoryview, came: Came) -> Intake | None:
        outlet, cycle = self._outlet, self._running
        if cycle is None or cycle is not self.cycle or cycle.body or not cycle.more_body:
            return None
        return Intake(self, room, came) if isinstance(outlet, PlainOutlet) and not outlet.deaf else None

    def listen_by(self, protocol: asyncio.BaseProtocol | None) -> None:
        if isinstance(self._outlet, PlainOutlet):
            self._outlet.listen_by(protocol or self)

    def body_came(self, *, whole: bool) -> None:
        """Past the parser, which begins anew with what follows it."""
        if whole:
            self._parse_anew()
            self.on_message_complete()
        self.cycle.message_event.set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._at = _HEAD
        self._begun = True
        self._hosts = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._at != _HEAD:
            return  # a trailer, which must not pass for a header (RFC 9110, 6.5.1)
        headers = self.headers
        if len(headers) >= MAX_HEADERS:
            raise self._refuse(HeadTooLarge())
        name = name.lower()
        if name in _LOOKED_AT:
            self._look_into(name, value)
        headers.append((name, value))

    def _look_into(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            self._hosts += 1
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":  # nothing else is undone here, and some read a list otherwise than others
                raise self._refuse(MalformedRequest())
        elif value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        if version not in _VERSIONS or (self._hosts != 1 and (self._hosts or version != "1.0")):
            raise self._refuse(MalformedRequest())
        if version == "1.0":
            self._hold_to_1_0()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise self._refuse(MalformedRequest())
            return  # it comes again, without
        if self._long or self._head_since:
            self._weigh()
        waiting = len(self.pipeline)
        if waiting and not self._may_wait(waiting):
            raise self._refuse(None)
        super().on_headers_complete()  # raises for a target that is no URL: of a message that has not begun
        self._at = _BODY
        self.admission.queued += len(self.pipeline) - waiting
        self.scope[ARRIVED] = self.cycle.message_event.is_set  # type: ignore[typeddict-unknown-key]

    def _hold_to_1_0(self) -> None:
        """What that version does not know (RFC 9110, 10.1.1; RFC 9112, 6.1)."""
        self.expect_100_continue = False
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            raise self._refuse(MalformedRequest())

    def _weigh(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD:
            raise self._refuse(HeadTooLarge())
        self._long = False
        self._head_size, self._head_since = 0, 0.0

    def listens(self, pipeline: Collection[tuple[RequestResponseCycle, Any]]) -> bool:
        """Whether the request that runs waits for others, and little of those behind it is held."""
        running = self._running
        if running is None or running.response_complete:
            return False
        ticket = cast("Ticket | None", running.scope.get(TICKET))
        if ticket is None or not ticket.waits or len(pipeline) >= HEARD_BEHIND:
            return False
        return len(self.cycle.body) + sum(len(cycle.body) for cycle, _ in pipeline) <= HIGH_WATER_LIMIT

    def _may_wait(self, waiting: int) -> bool:
        admission = self.admission
        return waiting < PIPELINED and admission.queued < PIPELINED_OF_ALL * admission.limits.requests

    def _refuse(self, error: Exception | None) -> Exception:
        """Notes why, and gives what is to be raised through the parser. None: the rest is not read, without a word."""
        self._fault = error or _NotRead()
        return self._fault

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._at == _HEAD:
            return  # which asked to upgrade
        self._at = BETWEEN
        self._counted = -1
        cycle, self._closing_cycle = self._closing_cycle, None
        if cycle is not None and not cycle.response_started:
            cycle.keep_alive = True
        super().on_message_complete()

    def _misread(self, error: Exception) -> None:
        """Nothing more is read. What was asked for before is answered; then `error` is told, and that is the end."""
        assert self._outlet is not None
        self._outlet.deaf = True
        self._fault = error
        if self._at == _BODY and self.cycle.response_complete:
            self._outlet.end()  # it was answered before its body was there
            return
        if self._at == _BODY and self.pipeline:  # the body is that of the last, whose turn has not come
            self.pipeline.popleft()
            self.admission.queued -= 1
        elif self._at == _BODY and self._busy:
            self._break_off(error)
            return
        if not self._busy:
            self._tell(error)

    @property
    def _busy(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _break_off(self, error: Exception) -> None:
        """The request under way will never be whole."""
        assert self._running is not None
        assert self._outlet is not None
        self._gone(self._running)
        if self._running.response_started:
            self._outlet.end()
        else:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        outlet = self._outlet
        if outlet is None:
            return
        reason = next(name for kind, name in _CUT if isinstance(error, kind))
        self.admission.cut[reason] += 1
        if not isinstance(error, _NotRead):
            outlet.write(as_sent(error, self.server_state.default_headers))
        outlet.end()

    @property
    def limited(self) -> Admission:
        return self.admission

    @property
    def in_a_message(self) -> bool:
        return self._at != BETWEEN

    # What goes

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if self._reading and cycle.scope["path"] not in ALWAYS:  # those take no places
            if self.admission.full:
                self._undecided = partial(super()._start_asgi_task, cycle, app)
                return
            cycle.scope[READY] = self.loop.time()  # type: ignore[typeddict-unknown-key]
            self.admission.begun += 1
        if SHORT.get(cycle.scope["method"]) == cycle.scope["path"][-6:]:
            self.loop.call_soon(self._begin, cycle, app, BODY_TURNS)
        else:
            super()._start_asgi_task(cycle, app)

    def _begin(self, cycle: RequestResponseCycle, app: Any, turns: int) -> None:
        if cycle.more_body and turns and not cycle.disconnected:
            scope = cast("dict[str, Any]", cycle.scope)
            scope |= {READY: self.loop.time()} if READY in scope else {}  # turns without its body are no sign of load
            self.loop.call_soon(self._begin, cycle, app, turns - 1)
        elif not self.takes(cycle):
            super()._start_asgi_task(cycle, app)

    def _decide(self) -> None:
        """What came is parsed. A request that there is no room for is refused here and now if it is whole.

        One whose body is to be read, or left, goes its usual way, where it is refused as well; so does that of a client
        that does not read what it is told. To refuse must cost much less than to serve: at twice the load that can be
        carried, it is done as often.
        """
        self._reading = False
        begin, self._undecided = self._undecided, None
        cycle = self._running
        if begin is None or cycle is None:
            return
        if cycle.more_body or self.flow.write_paused:
            begin()
            return
        cycle.response_started = cycle.response_complete = True
        scope, error = cast("dict[str, Any]", cycle.scope), self.admission.overloaded("requests")
        headers = [*self.server_state.default_headers, (b"x-request-id", self.admission.told(scope))]
        reply = as_sent(error, headers, scope["path"], keep=cycle.keep_alive, body=scope["method"] != "HEAD")
        self.transport.write(reply)
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        outlet = self._outlet
        if outlet is None or outlet.ending or outlet.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self.admission.queued -= 1
            self._start_asgi_task(cycle, app)
        elif outlet.deaf:
            self._tell(self._fault or MalformedRequest())
            return
        else:
            self._since = self.loop.time()
            if self._head_since:
                self._look_at(self._head_since + self.admission.limits.head_seconds)
        self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._outlet is not None:
            self._outlet.filled()

    def resume_writing(self) -> None:
        if self._outlet is None or self._outlet.drained():
            super().resume_writing()

    def _look_at(self, moment: float) -> None:
        """At this moment, or before it."""
        if self._watch is not None:
            if self._watch.when() <= moment:
                return
            self._watch.cancel()
        self._watch = self.loop.call_at(moment, self._look)

    def _look(self) -> None:
        self._watch = None
        outlet = self._outlet
        if outlet is None or outlet.ending or outlet.is_closing():
            return
        now = self.loop.time()
        if self._busy:
            self._look_at(now + self.timeout_keep_alive)
        elif (due := self._due()) > now:
            self._look_at(due)
        elif self._head_since:
            self._misread(RequestTimeout())
        else:
            outlet.close()

    def _due(self) -> float:
        """Until when the connection may be as it is, while nothing is asked of it."""
        if self._head_since:
            return self._head_since + self.admission.limits.head_seconds
        return self._since + (self.admission.limits.head_seconds if self.cycle is None else self.timeout_keep_alive)


class _NotRead(Exception):
    """More was sent ahead than is kept; what was not read is for the client to send again (RFC 9112, 9.3.2)."""


_CUT: Final = (
    (RequestTimeout, "slow head"),
    (HeadTooLarge, "head"),
    (_NotRead, "pipelined"),
    (Exception, "malformed"),
)


def guarded(admission: Admission, takes: Takes = lambda _: False) -> type[Guarded]:
    """The protocol for a uvicorn.Config(http=…, ws="none") whose connections `admission` counts.

    `takes` is asked first; the application is called for what it does not take.
    """
    return type("Guarded", (Guarded,), {"admission": admission, "takes": staticmethod(takes)})
