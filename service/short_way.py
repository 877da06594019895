"""The short way of a small step, and of a pull: from the parser to the engine and back, with no task in between.

A step of ten numbers costs as much for what is around it as for itself: a task, two coroutines that pass messages, five
layers that each wait for the next. None of them has anything to wait for where the body came with its head, the session
is in memory, and neither a key nor a quota has to be looked up in the store. Such a step is taken here, by plain calls;
the engine's future is what there is of it meanwhile. So are the parameters read.

Whatever is not so goes the usual way, through the application, and so does every request that anything is wrong with:
nothing is refused here but what the engine refuses. Both ways read a step by the same functions (`service.asked`), ask
the same gate, count the same, and write the same replies.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from core.errors import CoreError
from service import replies
from service.access.gate import Gate
from service.access.quotas import Quotas
from service.access.rights import call_at, path_of
from service.admission import Admission, Ticket
from service.asked import asked, contributed, step_request
from service.bodies import SMALL
from service.engine import Engine
from service.errors import Overloaded, ServiceError
from service.http import SMALL as LARGE
from service.http import Piece, Reply, Request, Scope, negotiate, preconditions, send_reply
from service.logs import AccessLog, request_id
from service.meters import RequestMeters
from service.problems import refused_as
from service.wire.errors import WireError

log = structlog.get_logger("ravine")

COPIED: Final = 4096  # bytes up to which they are joined with the head
# Requests with any of these are read, or answered, in a way of their own.
_OTHERWISE: Final = frozenset((b"content-encoding", b"expect", b"prefer", b"transfer-encoding"))


Encode: TypeAlias = Callable[[Any], Reply]
Begun: TypeAlias = tuple[asyncio.Future[Any], Encode]  # what the engine will give, and how it is told


class Call(NamedTuple):
    """One request on its way."""

    cycle: RequestResponseCycle
    id: str
    started: float


class ShortWay:
    """For POST …/steps and GET …/params, which the protocol tells apart (`protocol.SHORT`).

    `limit` is of a body, in bytes; `named` gives a request its id.
    """

    def __init__(
        self,
        admission: Admission,
        gate: Gate,
        quotas: Quotas,
        engine: Engine,
        requests: RequestMeters,
        access_log: AccessLog,
        *,
        limit: int,
        named: Callable[[Scope], str],
    ) -> None:
        self._admission = admission
        self._gate = gate
        self._quotas = quotas
        self._engine = engine
        self._requests = requests
        self._access = access_log
        self._most = min(limit, SMALL - 1)
        self._named = named
        self._sending: set[asyncio.Task[None]] = set()
        # Requests that might go this way, by the one they went.
        self.counts = dict.fromkeys(("short step", "usual step", "short pull", "usual pull"), 0)

    def take(self, cycle: RequestResponseCycle) -> bool:
        """Whether the request of `cycle` goes this way; if so it is answered, now or later."""
        try:
            taken = self._takes(cycle)
        except Exception:  # a bug, which the usual way meets as well, or which is of this one alone
            log.exception("unexpected failure of the short way", path=cycle.scope["path"])
            taken = False
        if taken:
            cycle.body = bytearray()  # or the connection would hold it until its next request
        way, what = "short" if taken else "usual", "pull" if cycle.scope["method"] == "GET" else "step"
        self.counts[f"{way} {what}"] += 1
        return taken

    def _takes(self, cycle: RequestResponseCycle) -> bool:
        scope: Scope = cycle.scope  # type: ignore[assignment]
        if cycle.more_body or cycle.disconnected or cycle.flow.write_paused or len(cycle.body) > self._most:
            return False
        headers = dict(scope["headers"])
        methods, session = call_at(path_of(scope))
        right = None if methods is None else methods.get(scope["method"])
        if len(headers) != len(scope["headers"]) or not _OTHERWISE.isdisjoint(headers) or not session or right is None:
            return False
        access = self._gate.at_once(scope, headers, session, right)
        if access is None or self._quotas.counts(access):
            return False
        return self._let_in(cycle, scope, session)

    def _let_in(self, cycle: RequestResponseCycle, scope: Scope, session: str) -> bool:
        call = Call(cycle, self._named(scope), time.perf_counter())
        request_id.set(call.id)
        try:
            ticket = self._admission.enter(scope)
        except Overloaded as error:
            self._tell(call, replies.refusal(error, scope["path"]))
            return True
        begun = self._step(cycle, session) if scope["method"] == "POST" else self._pull(cycle, session)
        if begun is None:
            return False
        future, encode = begun
        future.add_done_callback(partial(self._answer, call, ticket, encode))
        return True

    # None for what is to be refused, which is for the usual way to say, or for an engine that has to look

    def _step(self, cycle: RequestResponseCycle, session: str) -> Begun | None:
        body = bytes(cycle.body)
        try:
            head = asked(_request(cycle))
            contribution, members = contributed(head, body)
        except (ServiceError, WireError, CoreError):
            return None
        step = step_request(head, body, contribution, members)
        future = self._engine.begin(session, step, replies.STEP_AS[head.answer])
        return None if future is None else (future, _as_it_is)

    def _pull(self, cycle: RequestResponseCycle, session: str) -> Begun | None:
        request = _request(cycle)
        try:
            request.query()  # none: who waits, or says who it is, is for the usual way
            form = negotiate(request.header(b"accept"), "json", ("json", "safetensors"))
            held = preconditions(request.header(b"if-none-match"), "If-None-Match")
        except ServiceError:
            return None
        future = self._engine.begin_params(session, "next")
        return None if future is None else (future, lambda point: replies.unless(held, point, form))

    def _answer(self, call: Call, ticket: Ticket, encode: Encode, future: "asyncio.Future[Any]") -> None:
        if future.cancelled():
            ticket.leave()
            call.cycle.transport.close()
            return
        path = call.cycle.scope["path"]
        try:
            reply = encode(future.result())
        except (CoreError, ServiceError, WireError) as error:
            reply = replies.refusal(error, path)
        except Exception as error:
            log.exception("unexpected failure", path=path)
            reply = replies.refusal(error, path)
        if sum(map(len, reply.pieces)) < LARGE or call.cycle.disconnected:
            ticket.leave()
            self._tell(call, reply)
        else:
            task = asyncio.get_running_loop().create_task(self._send(call, ticket, reply))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def _tell(self, call: Call, reply: Reply) -> None:
        told = not call.cycle.disconnected
        if told:
            _write(call.cycle, reply, call.id)
        self._end(call, reply.status if told else 0)

    async def _send(self, call: Call, ticket: Ticket, reply: Reply) -> None:
        """A long reply, which is held back while the client does not read, and at work until it has gone."""
        reply = reply._replace(headers=[*reply.headers, (b"x-request-id", call.id.encode())])
        try:
            await send_reply(call.cycle.send, reply)  # type: ignore[arg-type]  # uvicorn's types are narrower
        finally:
            ticket.leave()
            self._end(call, reply.status)

    def _end(self, call: Call, status: int) -> None:
        """`status` is 0 where the client was gone before it could be told."""
        if status >= 400:
            self._requests.refuse(refused_as.get())
        scope, seconds = call.cycle.scope, time.perf_counter() - call.started
        self._requests.end(scope["method"], scope["path"], status, seconds)
        self._access.write(scope["method"], scope["path"], status, seconds, call.id)


def _request(cycle: RequestResponseCycle) -> Request:
    return Request(cycle.scope, cycle.receive)  # type: ignore[arg-type]  # uvicorn's types are narrower


def _as_it_is(reply: Reply) -> Reply:
    return reply


def _write(cycle: RequestResponseCycle, reply: Reply, id_: str) -> None:
    """As uvicorn writes it."""
    status, headers, pieces = reply
    lines: list[Piece] = [STATUS_LINE[status]]
    for name, value in (*cycle.default_headers, *headers):
        lines += (name, b": ", value, b"\r\n")
    size = sum(map(len, pieces))
    keep = b"" if cycle.keep_alive else b"connection: close\r\n"
    length = b"" if status == 304 else b"content-length: %d\r\n" % size
    lines.append(b"%sx-request-id: %s\r\n%s\r\n" % (length, id_.encode(), keep))
    if size < COPIED:
        lines += pieces
    cycle.response_started = cycle.response_complete = True
    cycle.transport.write(b"".join(lines))
    if size >= COPIED:
        for piece in pieces:
            cycle.transport.write(piece)
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
