"""The control plane: sessions without their tensors, the catalogue, and the service's own pages.

FastAPI routes and nothing more. Its reading of bodies is not used, since it takes NaN and duplicate members; its
documentation pages are not, since they load scripts from elsewhere; and its exception handlers are not, since every
error is a problem document here. Endpoints read what they need by service.http, as the data plane does.

A call that only sends JSON does not look at Accept: a client that asks for safetensors in all of its calls means the
tensors.
"""

import asyncio
import csv
import io
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from core.errors import CoreError
from core.layout import Array
from service import catalogue, pages, schemas
from service.access.rights import access_of
from service.documents import Document, Record, Stamp
from service.engine import Engine
from service.errors import Fault, InvalidRequest, ServiceError, StoreUnavailable
from service.http import ClientGone, body_format, negotiate, preconditions
from service.http import Request as Call
from service.metrics import Text
from service.openapi import openapi
from service.operations import methods_of
from service.problem_table import PROBLEMS
from service.problems import HTTPError, MethodNotAllowed, NotFound, index, page_of, problem_of, told
from service.reference import reference
from service.wire.errors import WireError
from service.wire.inflate import Body
from service.wire.json import dumps, loads

PAGE, MAX_PAGE = 20, 100
RECORDS, MAX_RECORDS = 1000, 10_000
CSV: Final = "text/csv; charset=utf-8; header=present"
PREVIEW, MAX_PREVIEW = 1000, 10_000

# Above this a body is parsed in a thread, so that other requests are answered meanwhile.
LARGE: Final = 1 << 18

CLIENT_CLOSED: Final = 499  # never seen by anybody; it tells the access log why there was no reply


def create_control(engine: Engine, *, max_body: int, version: str, metrics: Text | None = None) -> FastAPI:
    """The control plane over `engine`, for JSON bodies of at most `max_body` bytes."""
    app = FastAPI(
        title="Ravine",
        version=version,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    known = (CoreError, ServiceError, WireError, HTTPError, HTTPException, RequestValidationError, ClientGone)
    app.exception_handlers.update(dict.fromkeys(known, _refuse))
    app.exception_handlers[Exception] = _bug
    _add_sessions(app, Sessions(engine, max_body))
    _add_catalogue(app)
    _add_pages(app, engine, version)
    _add_metrics(app, metrics)
    return app


def _add_sessions(app: FastAPI, sessions: "Sessions") -> None:
    one = "/v1/sessions/{session}"
    app.add_api_route("/v1/sessions", sessions.create, methods=["POST"])
    app.add_api_route("/v1/sessions", sessions.page, methods=["GET", "HEAD"])
    app.add_api_route(one, sessions.get, methods=["GET", "HEAD"])
    app.add_api_route(one, sessions.patch, methods=["PATCH"])
    app.add_api_route(one, sessions.delete, methods=["DELETE"])
    app.add_api_route(f"{one}/fork", sessions.fork, methods=["POST"])
    app.add_api_route(f"{one}/history", sessions.history, methods=["GET", "HEAD"])
    app.add_api_route(f"{one}/workers", sessions.workers, methods=["GET", "HEAD"])
    app.add_api_route(f"{one}/rounds/current", sessions.open_round, methods=["GET", "HEAD"])
    app.add_api_route(f"{one}/schedule", sessions.schedule, methods=["GET", "HEAD"])


def _add_catalogue(app: FastAPI) -> None:
    for family in catalogue.FAMILIES:
        app.add_api_route(f"/v1/{family}", partial(_family, family), methods=["GET", "HEAD"], name=family)
        app.add_api_route(
            f"/v1/{family}/{{kind}}", partial(_kind, family), methods=["GET", "HEAD"], name=f"{family}-kind"
        )


def _add_pages(app: FastAPI, engine: Engine, version: str) -> None:
    async def ready(request: Request) -> Response:
        _no_query(request)
        if not await engine.ready():
            raise StoreUnavailable("the store does not answer")
        return _json({"status": "ready"}, headers=_FRESH)

    async def document(request: Request) -> Response:
        _no_query(request)
        return _json(openapi(version))

    async def reference_page(request: Request) -> Response:
        _no_query(request)
        return _html(reference(version))

    endpoints: dict[str, Callable[..., Awaitable[Response]]] = {
        "/livez": _live,
        "/readyz": ready,
        "/openapi.json": document,
        "/docs": reference_page,
        "/problems": _problems,
        "/problems/{slug}": _problem,
    }
    for path, endpoint in endpoints.items():
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"])


def _add_metrics(app: FastAPI, metrics: Text | None) -> None:
    async def read(request: Request) -> Response:
        _no_query(request)
        if metrics is None:
            raise NotFound
        text, media = await metrics.text(request.headers.get("accept", ""))
        return Response(text, headers=_FRESH | {"Content-Type": media})

    app.add_api_route("/metrics", read, methods=["GET", "HEAD"])


class Sessions:
    """The endpoints under /v1/sessions. Any error is raised, and told by `_refuse`."""

    def __init__(self, engine: Engine, max_body: int) -> None:
        self._engine = engine
        self._max_body = max_body

    async def create(self, request: Request) -> Response:
        _no_query(request)
        call = _call(request)
        # A body in safetensors is a restore, and the data plane's; here it only counts as something that is read.
        body_format(call.header(b"content-type"), ("json", "safetensors"))
        body = await call.body(self._max_body)
        if len(body) > LARGE:
            document, params = await asyncio.to_thread(_new_session, body)
        else:
            document, params = _new_session(body)
        session, stamp = await self._engine.create(document, params, access_of(request.scope).tenant)
        return _made(request, session, stamp)

    async def page(self, request: Request) -> Response:
        query = _call(request).query(("limit", "after", "label"))
        limit = _integer(query, "limit", PAGE, 1, MAX_PAGE)
        tenant = access_of(request.scope).tenant
        sessions, more = await self._engine.sessions(limit, query.get("after"), _label(query), tenant)
        return _json({"data": sessions, "has_more": more}, headers=_FRESH)

    async def get(self, request: Request, session: str) -> Response:
        _no_query(request)
        known = preconditions(_call(request).header(b"if-none-match"), "If-None-Match")
        found, stamp = await self._engine.session(session)
        if known is not None and known.holds(stamp):
            return Response(status_code=304, headers=_stamped(stamp))
        if access_of(request.scope).scope == "worker":
            found = _for_workers(found)
        return _json(found, headers=_stamped(stamp))

    async def patch(self, request: Request, session: str) -> Response:
        _no_query(request)
        call = _call(request)
        body_format(call.header(b"content-type"), ("json",))
        if_match = preconditions(call.header(b"if-match"))
        change = schemas.patch(loads(await call.body(self._max_body)))
        found, stamp = await self._engine.patch(session, change, if_match)
        return _json(found, headers=_stamped(stamp))

    async def delete(self, request: Request, session: str) -> Response:
        _no_query(request)
        if_match = preconditions(_call(request).header(b"if-match"))
        await self._engine.delete(session, if_match, access_of(request.scope).tenant)
        return Response(status_code=204)

    async def fork(self, request: Request, session: str) -> Response:
        """The body may be left out; there is nothing that it could say yet."""
        _no_query(request)
        call = _call(request)
        body = await call.body(self._max_body)
        if len(body):
            body_format(call.header(b"content-type"), ("json",))
            if loads(body) != {}:
                raise InvalidRequest([Fault("", "a fork takes no members: send {} or no body")])
        made, stamp = await self._engine.fork(session)
        return _made(request, made, stamp)

    async def history(self, request: Request, session: str) -> Response:
        call = _call(request)
        query = call.query(("limit", "after"))
        limit = _integer(query, "limit", RECORDS, 1, MAX_RECORDS)
        after = _integer(query, "after", 0, 0, 2**53 - 1)
        form = negotiate(call.header(b"accept"), "json", ("json", "csv"))
        found = await self._engine.history(session, after, limit + 1)
        records, more = found[:limit], len(found) > limit
        headers = _FRESH | {"Vary": "Accept"}
        if more:
            headers["Link"] = f'<{quote(request.scope["path"])}?after={records[-1].step}&limit={limit}>; rel="next"'
        # What a step costs of privacy is told where there is any; it is the last of the fields.
        width = len(Record._fields) - all(record.epsilon is None for record in records)
        if form == "csv":
            table = _table(Record._fields[:width], [record[:width] for record in records])
            return Response(table, headers=headers, media_type=CSV)
        data = [dict(zip(Record._fields[:width], record, strict=False)) for record in records]
        return _json({"data": data, "has_more": more}, headers=headers)

    async def workers(self, request: Request, session: str) -> Response:
        query = _call(request).query(("limit", "after"))
        limit = _integer(query, "limit", PAGE, 1, MAX_PAGE)
        after = query.get("after", "")
        found = await self._engine.workers(session, after, limit + 1)
        return _json({"data": found[:limit], "has_more": len(found) > limit}, headers=_FRESH)

    async def open_round(self, request: Request, session: str) -> Response:
        _no_query(request)
        found, stamp = await self._engine.open_round(session)
        # Without an ETag: contributions change what is told here, and not the session's.
        return _json(found, headers=_FRESH | {"Ravine-Step": str(stamp.step)})

    async def schedule(self, request: Request, session: str) -> Response:
        call = _call(request)
        steps = _integer(call.query(("steps",)), "steps", PREVIEW, 1, MAX_PREVIEW)
        form = negotiate(call.header(b"accept"), "json", ("json", "csv"))
        found, stamp = await self._engine.schedule(session, steps)
        headers = _stamped(stamp) | {"Vary": "Accept"}
        if form == "csv":
            columns = {"step": range(found["first"], found["first"] + steps), **found["values"]}
            table = _table(columns, zip(*columns.values(), strict=True))
            return Response(table, headers=headers, media_type=CSV)
        return _json({"step": stamp.step, **found}, headers=headers)


# -- the catalogue and the pages ---------------------------------------------------------------------------------------


async def _family(family: str, request: Request) -> Response:
    query = _call(request).query(("limit", "after"))
    limit = _integer(query, "limit", MAX_PAGE, 1, MAX_PAGE)
    try:
        return _json(catalogue.listing(family, limit, query.get("after")))
    except LookupError:
        raise InvalidRequest([Fault("/query/after", f"there is no such kind among the {family}")]) from None


async def _kind(family: str, request: Request, kind: str) -> Response:
    _no_query(request)
    try:
        return _json(catalogue.entry_of(family, kind))
    except LookupError:
        raise NotFound from None


async def _live(request: Request) -> Response:
    _no_query(request)
    return _json({"status": "alive"}, headers=_FRESH)


async def _problems() -> Response:
    return _html(index())


async def _problem(slug: str) -> Response:
    if slug not in PROBLEMS:
        raise NotFound
    return _html(page_of(slug))


# -- errors ------------------------------------------------------------------------------------------------------------


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=CLIENT_CLOSED)
    path = request.scope["path"]
    if isinstance(error, HTTPException) and error.status_code == 405:
        # Starlette knows the methods of the first route alone; the path may have several, and some in the data plane.
        allowed = methods_of(path)
        if allowed and request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": ", ".join(allowed)})
        error = MethodNotAllowed(request.method, allowed) if allowed else NotFound()
    return problem_of(error, path).response()


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette raises the exception again once this was sent, so it is logged further out, by whoever runs the app."""
    return told(error, request.scope["path"]).response()


# -- requests ----------------------------------------------------------------------------------------------------------


def _call(request: Request) -> Call:
    return Call(request.scope, request.receive)


def _no_query(request: Request) -> None:
    _call(request).query()


def _new_session(body: Body) -> tuple[Document, dict[str, Array] | None]:
    return schemas.parse_create(loads(body))


def _for_workers(session: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the noise is drawn from: whoever knows it can subtract the noise."""
    aggregation = {name: value for name, value in session["aggregation"].items() if name != "seed"}
    return {**session, "aggregation": aggregation}


def _integer(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and low <= int(text) <= high):
        raise InvalidRequest([Fault(f"/query/{name}", f"must be an integer from {low} to {high}")])
    return int(text)


def _label(query: Mapping[str, str]) -> tuple[str, str] | None:
    if "label" not in query:
        return None
    name, colon, value = query["label"].partition(":")
    if not name or not colon:
        raise InvalidRequest(
            [Fault("/query/label", "must be a key and a value with a ':' between, such as team:vision")]
        )
    return name, value


# -- replies -----------------------------------------------------------------------------------------------------------

_FRESH: Final = {"Cache-Control": "no-store"}


def _stamped(stamp: Stamp) -> dict[str, str]:
    return {"ETag": stamp.etag, "Ravine-Step": str(stamp.step), "Cache-Control": "no-cache"}


def _json(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(document), status, headers, "application/json")


def _html(text: str) -> Response:
    return HTMLResponse(text, headers=pages.HEADERS)


def _made(request: Request, session: Mapping[str, Any], stamp: Stamp) -> Response:
    location = f"{request.scope.get('root_path', '')}/v1/sessions/{session['id']}"
    return _json(session, 201, _stamped(stamp) | {"Location": location})


def _table(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\r\n")  # RFC 4180
    rows.writerow(header)
    rows.writerows(lines)
    return text.getvalue()
