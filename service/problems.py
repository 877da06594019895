"""What can go wrong, once: exception -> status, slug, title, and how to mend it (RFC 9457).

`problem_of` makes the reply out of any exception; what it does not know is a bug, which is logged, and of which the
client learns nothing but that it happened. `page_of` and `index` are what a GET on a problem's `type` gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response

from core import errors as core
from service import errors as service
from service.pages import inline, page
from service.wire import errors as wire
from service.wire.inflate import ENCODINGS
from service.wire.json import dumps

MEDIA_TYPE: Final = "application/problem+json"

log = structlog.get_logger(__name__)


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
    """The body did not arrive in time."""


class Entry(NamedTuple):
    """A line of the table. `detail`, where there is one, is told to clients in place of the exception's own words."""

    status: int
    title: str
    happened: str
    mend: str
    detail: str | None = None


PROBLEMS: Final[dict[str, Entry]] = {
    "malformed-json": Entry(
        400,
        "The body is not valid JSON",
        "The body is not JSON as RFC 8259 has it, or is JSON that readers disagree on: NaN or Infinity as a number, "
        "two members of one name in an object, bytes that are not UTF-8, or more than 64 levels of nesting.",
        "Write the body with a JSON library. JSON has no NaN and no infinity; send such tensors as safetensors if the "
        "session skips them, or do not send the step.",
    ),
    "malformed-encoding": Entry(
        400,
        "The compressed body cannot be inflated",
        "Content-Encoding says gzip or zstd, and the body is not that: it is corrupt, cut short, or followed by more.",
        "Send the body compressed as the header says, or leave the header out.",
    ),
    "invalid-request": Entry(
        422,
        "The request holds values that are not allowed",
        "The request was read, but something in it cannot be: an unknown member or kind, a number out of its range, a "
        "string where a number belongs. Nothing was changed.",
        "`errors` lists each fault with a JSON pointer (RFC 6901). A pointer leads into the body; one that begins with "
        "/query/ names a query parameter, one with /headers/ a header.",
    ),
    "invalid-checkpoint": Entry(
        422,
        "The checkpoint does not fit together",
        "The tensors of the file are not a state of the recipe in its metadata: one is missing, unknown, or of another "
        "shape or dtype.",
        "Send the file as GET /v1/sessions/{id}/state gave it, bytes unchanged.",
    ),
    "unknown-tensor": Entry(
        422,
        "The session has no such tensor",
        "A tensor was sent under a name that the session does not have.",
        "`tensor` is the name. `shapes` in the session object lists the tensors there are.",
    ),
    "missing-gradient": Entry(
        422,
        "A tensor is missing",
        "A tensor of the session is not in the request, which must bring all of them.",
        "Send the tensor named in `tensor`, or send `partial: true` if tensors that are left out shall keep still.",
    ),
    "shape-mismatch": Entry(
        422,
        "A tensor has another shape",
        "A tensor was sent whose shape is not that of the session's tensor.",
        "`tensor` names it, `expected` is the shape it must have, `received` the one it had.",
    ),
    "rows-mismatch": Entry(
        422,
        "The row numbers do not fit the tensor",
        "The `indices` of a row-sparse tensor are not row numbers of it.",
        "Send one flat list of integers, each at least 0 and less than the first dimension of the tensor in `tensor`.",
    ),
    "positions-mismatch": Entry(
        422,
        "The positions do not fit the tensor",
        "The `positions` of a tensor that was sent as single elements are not positions in it.",
        "Send one flat list of integers: the places in the flat, row-major tensor, each at least 0 and less than the "
        "number of elements of the tensor in `tensor`.",
    ),
    "non-finite": Entry(
        422,
        "A tensor holds NaN or infinity",
        "After the cast to the session's dtype an element of the tensor is NaN or infinite. A finite number can become "
        "infinite in the cast: float32 ends at 3.4e38. Nothing was changed.",
        'Skip the step, lower the learning rate, or clip the gradient. A session made with `non_finite: "skip"` '
        "counts such steps and goes on.",
    ),
    "malformed-safetensors": Entry(
        422,
        "The body is not a safetensors file that is read here",
        "The file is cut short, its header is over 1 MiB or names a tensor twice, its tensors overlap or leave holes, "
        "or one has a dtype that is not read.",
        "Write the file with a safetensors library, in F64, F32, F16 or BF16 (I64 for row numbers and positions). The "
        "gradients or deltas of a step may be I8 if a scale is beside them, as `w:scale`.",
    ),
    "params-required": Entry(
        422,
        "The step needs the parameters",
        "The optimizer works on the parameters (weight decay, trust ratios, averaging), and the client holds them.",
        "Send them with the step, as `params`; or give them to the session by PUT at step 0.",
    ),
    "params-held": Entry(
        422,
        "The session holds the parameters itself",
        "A step brought `params`, but this session holds its own.",
        "Leave `params` out of the step. PUT /v1/sessions/{id}/params sets them.",
    ),
    "hessian-required": Entry(
        422,
        "The step needs the Hessian",
        "The optimizer is a second-order method, and the step came without `hessian`, or without `hessian_diagonal` "
        "where that was due.",
        "Send the n × n matrix over the flat parameters as `hessian`, in the order of the session's `shapes`; or, for "
        "sophia, an estimate of its diagonal by tensor as `hessian_diagonal`.",
    ),
    "loss-required": Entry(
        422,
        "The step needs the loss",
        "The optimizer (a line search, a step size after Polyak) or a schedule (`plateau`) looks at the loss, and the "
        "step came without it.",
        "Send the loss at the point where the gradient was taken, as `loss`.",
    ),
    "worker-required": Entry(
        422,
        "The contribution does not say who sent it",
        "What becomes of a contribution goes by its worker in this session, as in mode `ssp` and where delays are "
        "compensated, and it names none.",
        "Send `worker`: a name of your own for each sender, the same in all that it sends.",
    ),
    "base-step-required": Entry(
        422,
        "The contribution does not say how old it is",
        "The session looks at the age of contributions (`max_staleness`, `staleness`); this one has no `base_step`.",
        "Send `base_step`: the step of the parameters at which the gradient was taken, `Ravine-Step` where they came.",
    ),
    "not-reducible": Entry(
        422,
        "The session's aggregation has no meaning for it",
        "A reducer that compares contributions needs whole ones; the noise of differential privacy is enough for equal "
        "weights and whole contributions alone; and a worker's parameters are whole tensors.",
        "The detail says which. Send all tensors, and no `weight`; or open a session that aggregates otherwise.",
    ),
    "key-reused": Entry(
        422,
        "The Idempotency-Key was used with another body",
        "A step with this Idempotency-Key was applied before, and its body was another.",
        "Make a new key for each step, and send the same key only with the same bytes.",
    ),
    "unsupported-media-type": Entry(
        415,
        "The body's format is not read here",
        "Content-Type or Content-Encoding names something that this call does not read.",
        "`accepted` lists what is read. curl sends a form unless told otherwise: use --json, or "
        "-H 'Content-Type: application/json'.",
    ),
    "not-acceptable": Entry(
        406,
        "No format that the client accepts",
        "Accept allows nothing that this call can send.",
        "`offered` lists what it can send. Without Accept the reply has the request's format.",
    ),
    "body-too-large": Entry(
        413,
        "The body is too large",
        "The body, as sent or once inflated, is over `limit` bytes.",
        "Send tensors as safetensors, in half precision or row-sparse; or have the operator raise the limit.",
    ),
    "request-timeout": Entry(
        408,
        "The request did not arrive in time",
        "The body came too slowly, or stopped coming.",
        "Send it again.",
        detail="the request did not arrive in time",
    ),
    "session-not-found": Entry(
        404,
        "There is no such session",
        "The id names no session: it was deleted, or never was one.",
        "GET /v1/sessions lists the sessions there are. Ids are `ses_` and at least 20 of a-z and 0-9.",
    ),
    "not-found": Entry(
        404,
        "There is nothing at this path",
        "The path is none of the service's.",
        "GET /docs lists every path.",
        detail="there is nothing at this path",
    ),
    "method-not-allowed": Entry(
        405,
        "The path does not take this method",
        "There is such a path, but not with this method.",
        "The header Allow lists the methods that it takes.",
    ),
    "params-not-held": Entry(
        409,
        "The client holds the parameters of this session",
        "The session was made from `shapes`, so the server keeps the moments only.",
        "Read updates from the replies to steps; or, at step 0, give the parameters to the session by PUT.",
    ),
    "stale-gradient": Entry(
        409,
        "The contribution is too old",
        "It is `staleness` steps old, and the session allows `max_staleness`.",
        "Pull the parameters of `step`, take the gradient there, and send that.",
    ),
    "base-step-ahead": Entry(
        409,
        "The contribution's base step is yet to come",
        "`base_step` is greater than `step`, at which the session stands: it is of another session, or the store lost "
        "steps.",
        "Pull the parameters anew.",
    ),
    "not-pulled": Entry(
        409,
        "The worker pulled other parameters last",
        "A delay is compensated from the parameters that the worker pulled last, which are those of `step`, and its "
        "gradient is of others.",
        "Name the worker when it pulls: GET /v1/sessions/{id}/params?worker=…, or take what its step is answered with.",
    ),
    "already-contributed": Entry(
        409,
        "The worker has contributed to this round",
        "In mode `sync` each `worker` contributes once to a round, and its contribution to `round` is there.",
        "Wait for the round: GET /v1/sessions/{id}/params?after=… Send repeats with the same Idempotency-Key.",
    ),
    "too-far-ahead": Entry(
        409,
        "The worker is too far ahead of the slowest",
        "In mode `ssp` a worker at `clock` waits until the `slowest` is at most `bound` behind.",
        "Send it again later, or with `Prefer: wait=30`, which waits for the turn.",
    ),
    "no-rounds": Entry(
        404,
        "The session has no rounds",
        "In its mode each contribution is a step.",
        "Rounds are what a session of the mode `sync` or `buffered` has.",
    ),
    "step-conflict": Entry(
        412,
        "The session stands at another step",
        "If-Match names a state that is not the current one: somebody else's step was applied. Nothing was changed.",
        "`step` is where the session stands. Get the parameters, take the gradient there, and send it with their ETag.",
    ),
    "store-unavailable": Entry(
        503,
        "The store does not answer",
        "Redis does not answer, so the service cannot tell whether a write took effect.",
        "Send the same again after Retry-After seconds. With an Idempotency-Key or If-Match no step is applied twice.",
        detail="the store does not answer",
    ),
    "store-full": Entry(
        507,
        "The store is full",
        "Redis is at its memory limit and refuses to grow. Nothing was changed.",
        "Delete sessions that are done, or have the operator give the store more memory.",
        detail="the store is full",
    ),
    "state-corrupt": Entry(
        500,
        "The stored state failed its checks",
        "What the store gave back is not what was put there. Nothing is guessed from it.",
        "Restore the session from a checkpoint by POST /v1/sessions, and tell the operator.",
        detail="the stored state of this session failed its checks",
    ),
    "internal-error": Entry(
        500,
        "The service made a mistake",
        "This is a bug. The log has it under the reply's X-Request-Id.",
        "Tell the operator the X-Request-Id. Before you send a step again, GET the session to see where it stands.",
        detail="an unexpected error; the log has it under the X-Request-Id of this reply",
    ),
}

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
    service.SessionNotFound: "session-not-found",
    service.StepConflict: "step-conflict",
    service.NoRounds: "no-rounds",
    service.KeyReused: "key-reused",
    service.StoreUnavailable: "store-unavailable",
    service.StoreFull: "store-full",
    service.Corrupt: "state-corrupt",
    NotFound: "not-found",
    MethodNotAllowed: "method-not-allowed",
    RequestTimeout: "request-timeout",
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
    return problem


def told(error: Exception, instance: str) -> Problem:
    """The same, without a word in the log."""
    slug = _slug(error)
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
        case service.UnsupportedMedia():
            return {"accepted": error.accepted}
        case service.NotAcceptable():
            return {"offered": error.offered}
    return {}


def _headers(error: Exception) -> dict[str, str]:
    match error:
        case service.StoreUnavailable():
            return {"Retry-After": str(error.retry_after)}
        case core.TooFarAhead():
            return {"Retry-After": "1"}
        case service.UnsupportedMedia():
            # RFC 9110, 12.5.3 and 15.5.16: which of the two headers was refused is told by the one in the reply.
            coding = set(error.accepted) <= set(ENCODINGS)
            return {"Accept-Encoding" if coding else "Accept": ", ".join(error.accepted)}
        case MethodNotAllowed():
            return {"Allow": ", ".join(error.allowed)}
    return {}


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
