"""What can go wrong, once: exception -> status, slug, title, and how to mend it (RFC 9457).

`problem_of` makes the reply out of any exception; what it does not know is a bug, which is logged, and of which the
client learns nothing but that it happened. `page_of` and `index` are what a GET on a problem's `type` gives.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final
from urllib.parse import quote

import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from core import errors as core
from service import errors as service
from service.pages import inline, page
from service.problem_table import PROBLEMS
from service.wire import errors as wire
from service.wire.inflate import ENCODINGS
from service.wire.json import dumps

MEDIA_TYPE: Final = "application/problem+json"

log = structlog.get_logger(__name__)

# The last problem that was told of in this task, which is one request's: what is refused is counted by it.
refused_as: ContextVar[str] = ContextVar("refused_as", default="")


class HTTPError(Exception):
    """What is refused without a look at what was sent."""


class NotFound(HTTPError):
    """There is nothing at this path."""


class MethodNotAllowed(HTTPError):
    """`allowed` are the methods that the path takes."""

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        super().__init__(f"{method[:32]} is not a method of this path; it takes {', '.join(allowed)}")
        self.allowed = list(allowed)


class RequestTimeout(HTTPError):
    """The head or the body did not arrive in time."""


class MalformedRequest(HTTPError):
    """What came is not HTTP/1.1, or could be read in two ways."""


class HeadTooLarge(HTTPError):
    """The request line and the headers are too long, or the headers too many."""


SLUGS: Final[dict[type[Exception], str]] = {
    core.InvalidRecipe: "invalid-request",
    core.InvalidState: "invalid-checkpoint",
    core.ParamsRequired: "params-required",
    core.ParamsHeld: "params-held",
    core.ParamsNotHeld: "params-not-held",
    core.HessianRequired: "hessian-required",
    core.LossRequired: "loss-required",
    core.WorkerRequired: "worker-required",
    core.BaseStepRequired: "base-step-required",
    core.BaseStepAhead: "base-step-ahead",
    core.StaleGradient: "stale-gradient",
    core.NotPulled: "not-pulled",
    core.AlreadyContributed: "already-contributed",
    core.TooFarAhead: "too-far-ahead",
    core.NotReducible: "not-reducible",
    core.UnknownTensor: "unknown-tensor",
    core.MissingGradient: "missing-gradient",
    core.NonFinite: "non-finite",
    core.RowsMismatch: "rows-mismatch",
    core.PositionsMismatch: "positions-mismatch",
    core.ShapeMismatch: "shape-mismatch",
    wire.MalformedJSON: "malformed-json",
    wire.InvalidValue: "invalid-request",
    wire.MalformedSafetensors: "malformed-safetensors",
    wire.MalformedEncoding: "malformed-encoding",
    wire.BodyTooLarge: "body-too-large",
    service.InvalidRequest: "invalid-request",
    service.UnsupportedMedia: "unsupported-media-type",
    service.NotAcceptable: "not-acceptable",
    service.Unauthenticated: "unauthenticated",
    service.Forbidden: "forbidden",
    service.SessionNotFound: "session-not-found",
    service.StepConflict: "step-conflict",
    service.StateLost: "state-lost",
    service.UnknownFormat: "unknown-format",
    service.NoRounds: "no-rounds",
    service.KeyReused: "key-reused",
    service.QuotaExceeded: "quota-exceeded",
    service.Overloaded: "overloaded",
    service.StoreUnavailable: "store-unavailable",
    service.StoreFull: "store-full",
    service.Corrupt: "state-corrupt",
    NotFound: "not-found",
    MethodNotAllowed: "method-not-allowed",
    RequestTimeout: "request-timeout",
    MalformedRequest: "malformed-request",
    HeadTooLarge: "head-too-large",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A reply of the media type application/problem+json. `instance` is the path of the request."""

    slug: str
    detail: str
    instance: str
    members: Mapping[str, Any] = field(default_factory=dict)
    more_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return PROBLEMS[self.slug].status

    def body(self) -> dict[str, Any]:
        """The problem as JSON values, RFC 9457's members first."""
        return {
            "type": f"/problems/{self.slug}",
            "title": PROBLEMS[self.slug].title,
            "status": self.status,
            "detail": self.detail,
            "instance": quote(self.instance, safe="/:@!$&'()*+,;=~"),
            **self.members,
        }

    def body_bytes(self) -> bytes:
        return dumps(self.body())

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """All that the reply needs but Content-Length."""
        pairs = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store", **self.more_headers}
        return [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs.items()]

    def response(self) -> Response:
        response = Response(self.body_bytes(), self.status)
        response.raw_headers += self.headers
        return response


def problem_of(error: Exception, instance: str) -> Problem:
    """The problem that a client is told for `error`, which is logged where it is the service's own fault."""
    problem = told(error, instance)
    if problem.status == 500:
        log.error("request failed", problem=problem.slug, path=instance, exc_info=error)
    forget_way(error)
    return problem


def as_sent(
    error: Exception,
    headers: Iterable[tuple[bytes, bytes]] = (),
    path: str = "/",
    *,
    keep: bool = False,
    body: bool = True,
) -> bytes:
    """The whole reply that tells of `error`, and the end of the connection unless it is to be kept."""
    problem = told(error, path)
    document = problem.body_bytes()
    lines = {**dict(headers), **dict(problem.headers), b"content-length": b"%d" % len(document)}
    if not keep:
        lines[b"connection"] = b"close"
    head = b"".join(b"%s: %s\r\n" % line for line in lines.items())
    return STATUS_LINE[problem.status] + head + b"\r\n" + (document if body else b"")


def forget_way(error: BaseException) -> None:
    """Lets go of the frames that `error` and its contexts came through, once nobody will look at them any more.

    Among them is who waited for a future that holds the error: a circle, and in it the whole body of the request. The
    garbage collector comes seldom (memory.py): 20 refused steps of 8 MB held 160 MB.
    """
    left: BaseException | None = error
    while left is not None and left.__traceback__ is not None:
        left.__traceback__ = None
        left = left.__context__


def told(error: Exception, instance: str) -> Problem:
    """The same, without a word in the log."""
    slug = _slug(error)
    refused_as.set(slug)
    detail = PROBLEMS[slug].detail
    return Problem(slug, str(error) if detail is None else detail, instance, _members(error), _headers(error))


def _slug(error: Exception) -> str:
    if isinstance(error, HTTPException) and error.status_code == 404:  # from the routing
        return "not-found"
    return next((SLUGS[cls] for cls in type(error).__mro__ if cls in SLUGS), "internal-error")


def _members(error: Exception) -> dict[str, Any]:
    match error:
        case service.InvalidRequest():
            return {"errors": [fault._asdict() for fault in error.faults]}
        case core.InvalidRecipe():
            return {"errors": [{"pointer": error.pointer, "detail": error.reason}]}
        case wire.InvalidValue():
            return {"errors": [{"pointer": error.pointer, "detail": error.message}]}
        case core.ShapeMismatch():
            return {"tensor": error.tensor, "expected": error.expected, "received": error.received}
        case core.TensorError():
            return {"tensor": error.tensor}
    return _limits(error)


def _limits(error: Exception) -> dict[str, Any]:
    match error:
        case core.StaleGradient():
            return {"step": error.step, "staleness": error.staleness, "max_staleness": error.limit}
        case core.AlreadyContributed():
            return {"round": error.round, "worker": error.worker}
        case core.TooFarAhead():
            return {"clock": error.clock, "slowest": error.slowest, "bound": error.bound}
        case service.StepConflict() | core.BaseStepAhead() | core.NotPulled():
            return {"step": error.step}
        case wire.BodyTooLarge():
            return {"limit": error.limit}
        case service.Overloaded():
            return {"resource": error.resource}
        case service.QuotaExceeded():
            return {"quota": error.quota, "limit": error.standing.limit}
        case service.UnsupportedMedia():
            return {"accepted": error.accepted}
        case service.NotAcceptable():
            return {"offered": error.offered}
    return _stored(error)


def _stored(error: Exception) -> dict[str, Any]:
    match error:
        case service.StateLost():
            return {"acknowledged": error.acknowledged._asdict(), "found": error.found._asdict()}
        case service.UnknownFormat():
            return {"format": error.format, "supported": error.supported}
    return {}


def _headers(error: Exception) -> dict[str, str]:
    match error:
        case service.Unauthenticated():
            return {"WWW-Authenticate": 'Bearer realm="ravine"'}
        case service.StoreUnavailable() | service.Overloaded():
            return {"Retry-After": str(error.retry_after)}
        case RequestTimeout() | MalformedRequest() | HeadTooLarge():
            return {"Connection": "close"}  # where the next request would begin, nobody knows
        case service.QuotaExceeded():
            return {"Retry-After": str(error.standing.seconds), **rate_limits([error.standing])}
        case core.TooFarAhead():
            return {"Retry-After": "1"}
        case service.UnsupportedMedia():
            # RFC 9110, 12.5.3 and 15.5.16: which of the two headers was refused is told by the one in the reply.
            coding = set(error.accepted) <= set(ENCODINGS)
            return {"Accept-Encoding" if coding else "Accept": ", ".join(error.accepted)}
        case MethodNotAllowed():
            return {"Allow": ", ".join(error.allowed)}
    return {}


def rate_limits(standings: Sequence[service.Standing]) -> dict[str, str]:
    """The fields of draft-ietf-httpapi-ratelimit-headers-10, which are structured ones (RFC 9651)."""
    policies, limits = [], []
    for name, limit, left, seconds, window, unit in standings:
        rate = "" if window is None else f";w={window}"
        policies.append(f'"{name}";q={limit}' + (rate if unit is None else f'{rate};qu="{unit}"'))
        limits.append(f'"{name}";r={left}' + (f";t={seconds}" if rate else ""))
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(limits)}


# -- pages -------------------------------------------------------------------------------------------------------------


def page_of(slug: str) -> str:
    """The HTML page of a problem. Raises LookupError for a slug that there is none of."""
    entry = PROBLEMS[slug]
    return page(
        entry.title,
        f"<p><code>{slug}</code>, status {entry.status}</p>\n"
        f"<h2>What happened</h2>\n<p>{inline(entry.happened)}</p>\n"
        f"<h2>How to mend it</h2>\n<p>{inline(entry.mend)}</p>\n"
        '<p><a href="/problems">All problems</a> · <a href="/docs">Reference</a></p>',
    )


def index() -> str:
    """The HTML page that lists all problems."""
    rows = "\n".join(
        f'<tr><td>{entry.status}</td><td><a href="/problems/{slug}"><code>{slug}</code></a></td>'
        f"<td>{escape(entry.title)}</td></tr>"
        for slug, entry in sorted(PROBLEMS.items(), key=lambda item: (item[1].status, item[0]))
    )
    return page(
        "Problems",
        "<p>Every error is a JSON object of the media type <code>application/problem+json</code> (RFC 9457). "
        "Its <code>type</code> is one of these.</p>\n"
        f"<table>\n<thead><tr><th>Status</th><th>Type</th><th>Title</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        '</table>\n<p><a href="/docs">Reference</a></p>',
    )
