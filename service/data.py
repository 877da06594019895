"""The data plane: the calls that carry tensors, as plain ASGI in front of the control plane's framework.

    POST /v1/sessions/{id}/steps                a gradient in, parameters or updates out
    GET  /v1/sessions/{id}/params               the parameters, now or once there are newer ones
    PUT  /v1/sessions/{id}/params               other parameters
    GET  /v1/sessions/{id}/state                the checkpoint
    POST /v1/sessions                           the checkpoint as a new session, where the body is safetensors
    GET  /v1/sessions/{id}/events               server-sent events

A call goes one way: headers and query first, so that what they rule out costs no body; the body in one buffer;
arrays that are views of it; the engine; a reply whose pieces are views of the result. `service.contributions`
says how a step is written, `service.replies` how results are.

What core, service or wire refuse becomes a problem document here; whatever else is raised is a bug and goes on
to the outermost application.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from time import monotonic
from typing import Final, Literal, TypeAlias, TypeVar, get_args

from core.aggregation.ledger import is_name
from core.errors import CoreError, TooFarAhead
from service import contributions, replies
from service.access.rights import access_of, path_of
from service.asked import asked, contributed, step_request
from service.documents import Event, Pending, StepRequest
from service.engine import Engine
from service.errors import Fault, InvalidRequest, Overloaded, ServiceError, StoreFull, StoreUnavailable
from service.http import (
    FORMATS,
    ClientGone,
    Format,
    Receive,
    Reply,
    Request,
    Scope,
    Send,
    Waits,
    body_format,
    last_event_id,
    media_type,
    negotiate,
    preconditions,
    prefer,
    send_reply,
)
from service.operations import methods_of
from service.problems import MethodNotAllowed, RequestTimeout, forget_way
from service.wire import safetensors
from service.wire.errors import WireError
from service.wire.inflate import Body

PREFIX: Final = "/v1/sessions"
PING: Final = 15.0  # seconds; proxies take a connection for dead after 30 or 60 without a byte
MAX_WAIT: Final = 60.0  # seconds
TRY_AGAIN: Final = 0.5  # seconds
_ADDRESS: Final = "ravine.address"  # where in a scope `matches` leaves what it found
LARGE_JSON: Final = 256 << 10  # bytes from which JSON is parsed in a thread, so that others get their turns meanwhile

T = TypeVar("T")
At: TypeAlias = Literal["next", "final"]
Stream: TypeAlias = Callable[[Receive, Send], Awaitable[None]]
Call: TypeAlias = Callable[[str, Request], Awaitable[Reply | Stream]]


class DataPlane:
    """An ASGI application for what `matches`; bodies have at most `limit` bytes."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._waits = Waits()
        self._calls: Final[Mapping[str, Mapping[str, Call]]] = {
            "": {"POST": self._restore},
            "steps": {"POST": self._step},
            "params": {"GET": self._params, "HEAD": self._params, "PUT": self._put_params},
            "state": {"GET": self._state, "HEAD": self._state},
            "events": {"GET": self._events},
        }

    def matches(self, scope: Scope) -> bool:
        """Whether this call is the data plane's, with whatever method."""
        if scope["type"] != "http":
            return False
        session, resource = scope[_ADDRESS] = _address(scope)
        if session:
            return resource in self._calls and resource != ""
        return session == "" and scope["method"] == "POST" and _is_safetensors(scope)

    def drain(self) -> None:
        """End all event streams and long polls, so that the server can stop."""
        self._waits.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session, resource = scope[_ADDRESS] if _ADDRESS in scope else _address(scope)
        method: str = scope["method"]
        result: Reply | Stream
        try:
            call = self._call(resource, method, scope["path"])
            result = await call(session or "", Request(scope, receive))
        except ClientGone:
            return
        except (CoreError, ServiceError, WireError, MethodNotAllowed, RequestTimeout) as error:
            result = replies.refusal(error, scope["path"])
        if isinstance(result, Reply):
            await send_reply(send, result, head=method == "HEAD")
        else:
            await result(receive, send)

    def _call(self, resource: str, method: str, path: str) -> Call:
        calls = self._calls[resource]
        if method in calls:
            return calls[method]
        allowed = methods_of(path)
        if method != "OPTIONS":
            raise MethodNotAllowed(method, allowed)

        async def options(_session: str, _request: Request) -> Reply:
            return Reply(204, [(b"allow", ", ".join(allowed).encode())])

        return options

    # Steps

    async def _step(self, session: str, request: Request) -> Reply:
        preferred = prefer(request.header(b"prefer"))
        step, answer, minimal = await self._read_step(request, preferred)
        told = await self._contribute(session, request, step, answer, _wait_preferred(preferred))
        reply = replies.pending(told, request.scope["path"]) if isinstance(told, Pending) else told
        return reply._replace(headers=[*reply.headers, replies.MINIMAL]) if minimal else reply

    async def _read_step(self, request: Request, preferred: Mapping[str, str]) -> tuple[StepRequest, Format, bool]:
        """The step, the format of its answer, and whether that is to be minimal because of `Prefer`."""
        head = asked(request)
        body = await request.body(self._limit)
        contribution, members = await _parsed(partial(contributed, head), body, head.form)
        minimal = "return" not in members and preferred.get("return") == "minimal"
        return step_request(head, body, contribution, members, minimal=minimal), head.answer, minimal

    async def _contribute(
        self, session: str, request: Request, step: StepRequest, answer: Format, seconds: float
    ) -> Reply | Pending:
        """Waits at most `seconds` for its turn, where others are too far behind, or for the round to be closed."""
        encode, deadline = replies.STEP_AS[answer], monotonic() + seconds if seconds else 0.0
        while True:
            try:
                told = await self._engine.step(session, step, encode)
                break
            except TooFarAhead as error:
                left = deadline - monotonic()
                # Nobody says when a worker is given up, so it is tried again every now and then.
                turn = self._engine.wait(session, error.step, min(left, TRY_AGAIN))
                if left <= 0 or await self._waits.run(request.receive, turn, request.ticket) is None:
                    turn.close()
                    raise
                forget_way(error)
        if not isinstance(told, Pending) or not seconds:
            return told
        step.release()  # its body may be large, and the wait long
        if request.ticket is not None:
            request.ticket.release()
        try:
            closed = self._engine.wait(session, told.round - 1, deadline - monotonic())
            if await self._waits.run(request.receive, closed, request.ticket):
                return await self._engine.round(session, step, told, encode)
        except (Overloaded, StoreUnavailable, StoreFull):
            pass  # the contribution is in the log, and that is what the client is told
        return told

    # Parameters

    async def _params(self, session: str, request: Request) -> Reply:
        given = request.query(("at", "after", "wait", "worker"))
        at, after, seconds = _point(given)
        form = negotiate(request.header(b"accept"), "json", ("json", "safetensors"))
        if_none_match = preconditions(request.header(b"if-none-match"), "If-None-Match")
        point = await self._engine.params(session, at)
        if after is not None and point.stamp.step <= after:
            if not (seconds and await self._later(request, session, after, seconds)):
                return replies.not_modified(await self._engine.stamp(session))
            point = await self._engine.params(session, at)
        if "worker" in given and request.scope["method"] != "HEAD":
            point = await self._engine.pull(session, given["worker"])
        return replies.unless(if_none_match, point, form)

    async def _later(self, request: Request, session: str, after: int, seconds: float) -> bool | None:
        return await self._waits.run(request.receive, self._engine.wait(session, after, seconds), request.ticket)

    async def _put_params(self, session: str, request: Request) -> Reply:
        form = body_format(request.header(b"content-type"))
        request.query()
        if_match = preconditions(request.header(b"if-match"))
        body = await request.body(self._limit)
        read = contributions.params_of_json if form == "json" else contributions.params_of_safetensors
        params = await _parsed(read, body, form)
        stamp = await self._engine.put_params(session, params, if_match)
        return replies.document(200, {"step": stamp.step}, replies.stamped(stamp))

    # Checkpoints

    async def _state(self, session: str, request: Request) -> Reply:
        request.query()
        negotiate(request.header(b"accept"), "safetensors", ("safetensors",))
        if_none_match = preconditions(request.header(b"if-none-match"), "If-None-Match")
        if if_none_match is not None:
            stamp = await self._engine.stamp(session, last=True)  # contributions to an open round are in the file
            if if_none_match.holds(stamp):
                return replies.not_modified(stamp)
        tensors, metadata, stamp = await self._engine.checkpoint(session)
        return replies.checkpoint(session, tensors, metadata, stamp)

    async def _restore(self, _: str, request: Request) -> Reply:
        request.query()
        tensors, metadata = safetensors.read(await request.body(self._limit))
        session, stamp = await self._engine.restore(tensors, metadata, access_of(request.scope).tenant)
        location = f"{request.scope.get('root_path', '')}{PREFIX}/{session['id']}".encode()
        return replies.document(201, session, [(b"location", location), *replies.stamped(stamp)])

    # Events

    async def _events(self, session: str, request: Request) -> Stream:
        request.query()
        after = last_event_id(request.header(b"last-event-id"))
        # Whatever is wrong is known before the stream has begun, and so is where it begins: whoever has seen its
        # headers misses nothing. A step that is still to come was seen of a state that the store has lost.
        step = (await self._engine.stamp(session)).step
        if request.ticket is not None:
            request.ticket.wait()
        return partial(self._stream, self._engine.events(session, step if after is None else min(after, step)))

    async def _stream(self, events: AsyncIterator[Event], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": replies.EVENT_STREAM})
        try:
            await self._waits.run(receive, _relay(events, send))
        except ClientGone:
            return
        except (CoreError, ServiceError):
            pass  # too late for a status: the client comes back with Last-Event-ID, and is told then
        await send({"type": "http.response.body", "body": b""})


async def _parsed(read: Callable[[Body], T], body: Body, form: Format) -> T:
    return await asyncio.to_thread(read, body) if form == "json" and len(body) >= LARGE_JSON else read(body)


async def _relay(events: AsyncIterator[Event], send: Send) -> None:
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            text = b": ping\n\n"
            if (await asyncio.wait((coming,), timeout=PING))[0]:
                event = coming.result()
                if event is None:
                    return
                text = replies.server_sent(event)
                coming = asyncio.ensure_future(anext(events, None))
            await send({"type": "http.response.body", "body": text, "more_body": True})
    finally:
        coming.cancel()


def _address(scope: Scope) -> tuple[str | None, str]:
    """The session and what of it is meant: ("", "") for all sessions, (None, …) for any other path."""
    path = path_of(scope)
    if path == PREFIX:
        return "", ""
    if not path.startswith(PREFIX + "/"):
        return None, ""
    session, _, resource = path[len(PREFIX) + 1 :].partition("/")
    return session or None, resource


def _is_safetensors(scope: Scope) -> bool:
    content_type = dict(scope["headers"]).get(b"content-type", b"")
    return FORMATS.get(media_type(content_type.decode("latin-1"))[0]) == "safetensors"


def _wait_preferred(preferred: Mapping[str, str]) -> float:
    """Seconds, at most MAX_WAIT; what is no number is ignored, as RFC 7240 has it."""
    if "wait" not in preferred:
        return 0.0
    seconds = contributions.number(preferred["wait"])
    return min(max(seconds or 0.0, 0.0), MAX_WAIT)


def _point(members: Mapping[str, str]) -> tuple[At, int | None, float]:
    """`at`, `after` and `wait` in seconds. Raises InvalidRequest."""
    faults = []
    at = members.get("at", "next")
    if at not in get_args(At):
        faults.append(Fault("/query/at", 'must be "next" or "final"'))
    after = contributions.integer(members["after"]) if "after" in members else None
    if "after" in members and after is None:
        faults.append(Fault("/query/after", "must be a step: an integer of at least 0"))
    seconds = contributions.number(members.get("wait", "0"))
    if seconds is None or not 0 <= seconds <= MAX_WAIT:
        faults.append(Fault("/query/wait", f"must be a number of seconds from 0 to {MAX_WAIT:g}"))
    if "wait" in members and "after" not in members:
        faults.append(Fault("/query/wait", "means something beside `after` alone: the step to be left behind"))
    if "worker" in members and not is_name(members["worker"]):
        faults.append(Fault("/query/worker", contributions.WORKER))
    if "worker" in members and at == "final":
        faults.append(Fault("/query/worker", "pulls the point at which its next gradient is taken: `at` is next"))
    if faults:
        raise InvalidRequest(faults)
    return ("final" if at == "final" else "next"), after, seconds or 0.0
