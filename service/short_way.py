"""The short way of a small step: from the parser to the engine and back to the transport, with no task in between.

A step of ten numbers costs as much for what is around it as for itself: a task, two coroutines that pass messages, five
layers that each wait for the next. None of them has anything to wait for where the body came with its head, the session
is in memory, and neither a key nor a quota has to be looked up in the store. Such a step is taken here, by plain calls;
the engine's future is what there is of it meanwhile.

Whatever is not so goes the usual way, through the application, and so does every request that anything is wrong with:
nothing is refused here but what the engine refuses. Both ways read a step by the same functions (`service.asked`), ask
the same gate, count the same, and write the same replies.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from core.errors import CoreError
from service import replies
from service.access.gate import Gate
from service.access.quotas import Quotas
from service.access.rights import path_of
from service.admission import Admission, Ticket
from service.asked import asked, contributed, step_request
from service.bodies import SMALL
from service.engine import Engine
from service.errors import Overloaded, ServiceError
from service.http import SMALL as LARGE
from service.http import Piece, Reply, Request, Scope, send_reply
from service.logs import AccessLog, request_id
from service.meters import RequestMeters
from service.problems import refused_as
from service.wire.errors import WireError

log = structlog.get_logger("ravine")

_SESSIONS: Final = "/v1/sessions/"
_STEPS: Final = "/steps"
# Requests with any of these are read, or answered, in a way of their own.
_OTHERWISE: Final = frozenset((b"content-encoding", b"expect", b"prefer", b"transfer-encoding"))


class Call(NamedTuple):
    """One step on its way."""

    cycle: RequestResponseCycle
    path: str
    id: str
    ticket: Ticket
    started: float


class ShortWay:
    """`limit` is of a body, in bytes; `named` gives a request its id."""

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
        self.counts = {"short": 0, "usual": 0}  # requests to take a step, by the way they went

    def take(self, cycle: RequestResponseCycle) -> bool:
        """Whether the request of `cycle` goes this way; if so it is answered, now or later."""
        taken = self._takes(cycle)
        self.counts["short" if taken else "usual"] += 1
        return taken

    def _takes(self, cycle: RequestResponseCycle) -> bool:
        scope: Scope = cycle.scope  # type: ignore[assignment]
        if cycle.more_body or cycle.disconnected or cycle.flow.write_paused or len(cycle.body) > self._most:
            return False
        headers = dict(scope["headers"])
        session = _session_in(path_of(scope))
        if len(headers) != len(scope["headers"]) or not _OTHERWISE.isdisjoint(headers) or not session:
            return False
        access = self._gate.at_once(scope, headers, session)
        if access is None or self._quotas.counts(access):
            return False
        return self._let_in(cycle, scope, session)

    def _let_in(self, cycle: RequestResponseCycle, scope: Scope, session: str) -> bool:
        started, id_, path = time.perf_counter(), self._named(scope), scope["path"]
        request_id.set(id_)
        try:
            ticket = self._admission.enter(scope)
        except Overloaded as error:
            self._tell(cycle, path, id_, started, replies.refusal(error, path))
            return True
        future = self._begun(cycle, scope, session)
        if future is None:
            return False
        future.add_done_callback(partial(self._answer, Call(cycle, path, id_, ticket, started)))
        return True

    def _begun(self, cycle: RequestResponseCycle, scope: Scope, session: str) -> "asyncio.Future[Any] | None":
        """None for what is to be refused, which is for the usual way to say, or for an engine that has to look."""
        body = bytes(cycle.body)
        try:
            head = asked(Request(scope, cycle.receive))  # type: ignore[arg-type]  # uvicorn's types are narrower
            contribution, members = contributed(head, body)
        except (ServiceError, WireError, CoreError):
            return None
        step = step_request(head, body, contribution, members)
        return self._engine.begin(session, step, replies.STEP_AS[head.answer])

    def _answer(self, call: Call, future: "asyncio.Future[Any]") -> None:
        call.ticket.leave()
        if future.cancelled():
            call.cycle.transport.close()
            return
        error = future.exception()
        if error is None:
            reply: Reply = future.result()
        else:
            if not isinstance(error, CoreError | ServiceError | WireError):
                log.error("unexpected failure", path=call.path, exc_info=error)
            assert isinstance(error, Exception)
            reply = replies.refusal(error, call.path)
        self._tell(call.cycle, call.path, call.id, call.started, reply)

    def _tell(self, cycle: RequestResponseCycle, path: str, id_: str, started: float, reply: Reply) -> None:
        status = 0
        if not cycle.disconnected:
            status = reply.status
            if status >= 400:
                self._requests.refuse(refused_as.get())
            if sum(map(len, reply.pieces)) < LARGE:
                _write(cycle, reply, id_)
            else:
                self._send(cycle, reply, id_)
        seconds = time.perf_counter() - started
        self._requests.end("POST", path, status, seconds)
        self._access.write("POST", path, status, seconds, id_)

    def _send(self, cycle: RequestResponseCycle, reply: Reply, id_: str) -> None:
        """A long reply, which is held back while the client does not read."""
        reply = reply._replace(headers=[*reply.headers, (b"x-request-id", id_.encode())])
        task = asyncio.get_running_loop().create_task(send_reply(cycle.send, reply))  # type: ignore[arg-type]
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


def _session_in(path: str) -> str:
    """The session of a path to its steps; "" for any other."""
    if not (path.startswith(_SESSIONS) and path.endswith(_STEPS)):
        return ""
    session = path[len(_SESSIONS) : -len(_STEPS)]
    return "" if "/" in session else session


def _write(cycle: RequestResponseCycle, reply: Reply, id_: str) -> None:
    """As uvicorn writes it."""
    status, headers, pieces = reply
    lines: list[Piece] = [STATUS_LINE[status]]
    for name, value in (*cycle.default_headers, *headers):
        lines += (name, b": ", value, b"\r\n")
    size = sum(map(len, pieces))
    keep = b"" if cycle.keep_alive else b"connection: close\r\n"
    lines.append(b"content-length: %d\r\nx-request-id: %s\r\n%s\r\n" % (size, id_.encode(), keep))
    lines += pieces
    cycle.response_started = cycle.response_complete = True
    cycle.transport.write(b"".join(lines))
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
