"""Every call of the service, control plane and data plane alike: what it takes, gives, and can refuse.

This table is the source of the OpenAPI document, of the reference page, and of what Allow says. A test holds it against
the routes. Names of schemas, parameters and headers are those of openapi.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from service import catalogue, examples

JSON: Final = "application/json"
SAFETENSORS: Final = "application/vnd.safetensors"
BASE64: Final = "a safetensors file, shown in base64"


class Content(NamedTuple):
    """A body of one media type; `schema` is the name of one in the document; examples by their summaries.

    An example may be a function that makes it, where that takes a while.
    """

    media: str
    schema: str
    examples: dict[str, Any]


class Answer(NamedTuple):
    description: str
    contents: tuple[Content, ...] = ()
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`problems` are the slugs of all that the call can refuse."""

    method: str
    path: str
    id: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[str, ...] = ()
    body: tuple[Content, ...] = ()
    body_required: bool = True
    answers: dict[int, Answer] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    head: bool = True  # HEAD, where the method is GET


STORE: Final = ("store-unavailable", "internal-error")
SESSION: Final = ("invalid-request", "session-not-found", "state-corrupt", *STORE)
BODY: Final = (
    "unsupported-media-type",
    "malformed-encoding",
    "body-too-large",
    "request-timeout",
    "malformed-json",
    "invalid-request",
)
WRITE: Final = ("store-full",)
TENSORS: Final = ("malformed-safetensors", "unknown-tensor", "missing-gradient", "shape-mismatch", "non-finite")
STAMPED: Final = ("ETag", "Ravine-Step")


def _json(schema: str, summary: str, example: Any) -> Content:
    return Content(JSON, schema, {summary: example})


def _file(summary: str, example: str) -> Content:
    return Content(SAFETENSORS, "Safetensors", {f"{summary}: {BASE64}": example})


_SESSION: Final = _json("Session", "a session", examples.session())

SESSIONS: Final = (
    Operation(
        method="POST",
        path="/v1/sessions",
        id="createSession",
        tag="Sessions",
        summary="Open a session, or restore one from a checkpoint.",
        description="A JSON body describes a new session, which stands at step 0. A safetensors body is a checkpoint: "
        "the file that `GET /v1/sessions/{session}/state` gave. The reply is then a new session that goes on exactly "
        "where that one stood.",
        body=(
            Content(
                JSON,
                "NewSession",
                {
                    "the server holds the parameters": examples.CREATE,
                    "the client holds the parameters": examples.CREATE_BY_SHAPES,
                },
            ),
            _file("a checkpoint", examples.params_file()),
        ),
        answers={201: Answer("The session.", (_SESSION,), (*STAMPED, "Location"))},
        problems=(*BODY, "malformed-safetensors", "invalid-checkpoint", "shape-mismatch", "non-finite", *STORE, *WRITE),
    ),
    Operation(
        method="GET",
        path="/v1/sessions",
        id="listSessions",
        tag="Sessions",
        summary="List sessions, newest first.",
        parameters=("Limit", "AfterSession", "Label"),
        answers={
            200: Answer(
                "A page of the list.",
                (_json("SessionList", "a page", {"data": [examples.session()], "has_more": False}),),
            )
        },
        problems=("invalid-request", "session-not-found", *STORE),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}",
        id="getSession",
        tag="Sessions",
        summary="Read a session.",
        parameters=("Session", "IfNoneMatch"),
        answers={
            200: Answer("The session.", (_json("Session", "a session", examples.session(1)),), STAMPED),
            304: Answer("It still stands at the commit that If-None-Match names.", (), STAMPED),
        },
        problems=SESSION,
    ),
    Operation(
        method="PATCH",
        path="/v1/sessions/{session}",
        id="changeSession",
        tag="Sessions",
        summary="Change a session's name, labels or hyperparameters.",
        description="What is given changes, the rest stays, the moments too. `name: null` clears the name. `labels`, "
        "`groups` and `transforms` replace what was there as a whole. Of `optimizer` only the members given change; "
        "`kind` may be left out and cannot change.",
        parameters=("Session", "IfMatch"),
        body=(_json("SessionPatch", "a lower rate", examples.PATCH),),
        answers={200: Answer("The session.", (_json("Session", "a session", examples.patched()),), STAMPED)},
        problems=(*BODY, *SESSION, "step-conflict", *WRITE),
    ),
    Operation(
        method="DELETE",
        path="/v1/sessions/{session}",
        id="deleteSession",
        tag="Sessions",
        summary="Delete a session and all of its state.",
        parameters=("Session", "IfMatch"),
        answers={204: Answer("It is gone.")},
        problems=(*SESSION, "step-conflict"),
    ),
    Operation(
        method="POST",
        path="/v1/sessions/{session}/fork",
        id="forkSession",
        tag="Sessions",
        summary="Make a new session from the state of this one.",
        description="Parameters, moments, step and settings are the same; the history is not taken along. "
        "The body may be left out.",
        parameters=("Session",),
        body=(_json("Empty", "nothing to say", {}),),
        body_required=False,
        answers={
            201: Answer("The new session.", (_json("Session", "a session", examples.forked()),), (*STAMPED, "Location"))
        },
        problems=(*BODY, *SESSION, *WRITE),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/history",
        id="getHistory",
        tag="Sessions",
        summary="Read a record per step, oldest first.",
        description="The last 10,000 are kept. `Accept: text/csv` gives a table with a header line.",
        parameters=("Session", "HistoryAfter", "HistoryLimit"),
        answers={
            200: Answer(
                "The records after step `after`. Link leads to the next ones, if there are more.",
                (
                    _json("History", "one step", examples.history()),
                    Content("text/csv", "Text", {"one step": examples.history_csv()}),
                ),
                ("Link",),
            )
        },
        problems=(*SESSION, "not-acceptable"),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/schedule",
        id="getSessionSchedule",
        tag="Sessions",
        summary="Read what the hyperparameters will be.",
        description="`values.lr` is the learning rate, groups not regarded; beside it stands every hyperparameter that "
        "has a schedule, under its JSON pointer in the session object. `first` is the number of the update that the "
        "first value is for. What looks at the loss (`plateau`) is shown as it stands. `Accept: text/csv` gives a "
        "table.",
        parameters=("Session", "PreviewSteps"),
        answers={
            200: Answer(
                "The values, one for each of the next updates.",
                (
                    _json("Preview", "three steps", examples.preview()),
                    Content("text/csv", "Text", {"three steps": examples.preview_csv()}),
                ),
                STAMPED,
            )
        },
        problems=(*SESSION, "not-acceptable"),
    ),
)

STEPS: Final = (
    Operation(
        method="POST",
        path="/v1/sessions/{session}/steps",
        id="takeStep",
        tag="Steps and parameters",
        summary="Send a gradient; get parameters or updates.",
        description="In JSON all members stand in the body. In safetensors the body's tensors are the gradients, and "
        "the other members are query parameters: `w:indices` (I64) and `w:values` make a row-sparse gradient of `w`, "
        "`w:params` is the value of `w` where the client holds it, `:hessian` the Hessian, `w:hessian_diagonal` an "
        "estimate of its diagonal. The reply has the request's format unless Accept names another. With If-Match the "
        "step is applied only at the commit or step it names; with Idempotency-Key it is applied once, however often "
        "it is sent.",
        parameters=(
            "Session",
            "IfMatch",
            "IdempotencyKey",
            "Prefer",
            "Return",
            "Loss",
            "Partial",
            "Worker",
            "BaseStep",
            "Weight",
        ),
        body=(
            Content(JSON, "Step", {"all tensors": examples.STEP, "one row of one tensor": examples.SPARSE_STEP}),
            _file("all tensors", examples.gradients_file()),
        ),
        answers={
            200: Answer(
                "The step was applied, or counted as skipped.",
                (
                    Content(
                        JSON,
                        "StepReply",
                        {
                            "the server holds the parameters": examples.step_params(),
                            "the client holds them: to be added": examples.step_updates(),
                            "return=none": examples.step_nothing(),
                        },
                    ),
                    _file("parameters or updates", examples.params_file()),
                ),
                (*STAMPED, "Ravine-Replayed", "Preference-Applied"),
            )
        },
        problems=(
            *BODY,
            *TENSORS,
            "rows-mismatch",
            "params-required",
            "params-held",
            "params-not-held",
            "hessian-required",
            "loss-required",
            "key-reused",
            "step-conflict",
            "not-acceptable",
            *SESSION,
            *WRITE,
        ),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/params",
        id="getParams",
        tag="Steps and parameters",
        summary="Read the parameters, now or once there are newer ones.",
        description="`at=next` is the point at which the next gradient is to be taken, `at=final` the one to use as "
        "the result. They differ where the method says so: Nesterov's look-ahead form, a line search, schedule-free, "
        "SAM; averaging.",
        parameters=("Session", "At", "WaitAfter", "Wait", "IfNoneMatch"),
        answers={
            200: Answer(
                "The parameters.",
                (
                    _json("Params", "parameters", examples.params()),
                    _file("parameters", examples.params_file()),
                ),
                STAMPED,
            ),
            304: Answer("Nothing newer: If-None-Match holds, or the time to wait is over.", (), STAMPED),
        },
        problems=(*SESSION, "params-not-held", "not-acceptable"),
    ),
    Operation(
        method="PUT",
        path="/v1/sessions/{session}/params",
        id="putParams",
        tag="Steps and parameters",
        summary="Set the parameters, all of them.",
        description="A commit of its own; the step does not move. At step 0 this makes a session that was opened with "
        "`shapes` one that holds its parameters.",
        parameters=("Session", "IfMatch"),
        body=(
            _json("NewParams", "parameters", {"params": examples.CREATE["params"]}),
            _file("parameters", examples.params_file()),
        ),
        answers={200: Answer("They are set.", (_json("StepOnly", "at step 1", {"step": 1}),), STAMPED)},
        problems=(*BODY, *TENSORS, "params-not-held", "step-conflict", *SESSION, *WRITE),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/state",
        id="getState",
        tag="Steps and parameters",
        summary="Download the checkpoint.",
        description="Tensor `w` (if the session holds it), its slots `w:m`, `w:v`, …, and in the metadata the recipe "
        "and the step. `POST /v1/sessions` takes the file back.",
        parameters=("Session", "IfNoneMatch"),
        answers={
            200: Answer("The checkpoint.", (_file("a checkpoint", examples.params_file()),), STAMPED),
            304: Answer("The session still stands at the commit that If-None-Match names.", (), STAMPED),
        },
        problems=(*SESSION, "not-acceptable"),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/events",
        id="followEvents",
        tag="Steps and parameters",
        summary="Follow a session's steps as server-sent events.",
        description="`step` for each step, `deleted` at the end. The id of an event is its step, so a client that "
        "reconnects with Last-Event-ID misses nothing.",
        parameters=("Session", "LastEventId"),
        answers={
            200: Answer(
                "A stream that ends with the session.",
                (Content("text/event-stream", "Text", {"one step": examples.events()}),),
            )
        },
        problems=SESSION,
        head=False,
    ),
)

Entries: TypeAlias = Callable[[], tuple[dict[str, Any], ...]]

_SUMMARIES: Final = {
    "optimizers": "List the optimizers: hyperparameters, formula, needs, slots.",
    "schedules": "List the schedules that a numeric hyperparameter may follow.",
    "transforms": "List the transforms of the gradient.",
    "reducers": "List the ways in which contributions become one gradient.",
}


def _families() -> tuple[Operation, ...]:
    found = []
    for family, entries in catalogue.FAMILIES.items():
        name = family[:-1].capitalize()
        sample = partial(_sample, entries)
        common = {"tag": "Catalogue", "problems": ("invalid-request", "internal-error")}
        found.append(
            Operation(
                method="GET",
                path=f"/v1/{family}",
                id=f"list{name}s",
                summary=_SUMMARIES[family],
                parameters=("CatalogueLimit", "AfterKind"),
                answers={
                    200: Answer(
                        "All of them, unless `limit` is less.", (_json("Catalogue", f"one of the {family}", sample),)
                    )
                },
                **common,  # type: ignore[arg-type]
            )
        )
        if entries is not catalogue.none_yet:
            answer = Answer("The kind.", (_json("CatalogueEntry", "one kind", partial(_first, entries)),))
            common["problems"] = ("not-found", *common["problems"])
            found.append(
                Operation(
                    method="GET",
                    path=f"/v1/{family}/{{kind}}",
                    id=f"get{name}",
                    summary=f"Read one of the {family}.",
                    parameters=("Kind",),
                    answers={200: answer},
                    **common,  # type: ignore[arg-type]
                )
            )
    return tuple(found)


def _sample(entries: Entries) -> dict[str, Any]:
    return {"data": list(entries()[:1]), "has_more": False}


def _first(entries: Entries) -> dict[str, Any]:
    return entries()[0]


SERVICE: Final = (
    Operation(
        method="GET",
        path="/livez",
        id="isAlive",
        tag="Operation",
        summary="Whether the process lives.",
        answers={200: Answer("It does.", (_json("Status", "alive", {"status": "alive"}),))},
        problems=("invalid-request", "internal-error"),
    ),
    Operation(
        method="GET",
        path="/readyz",
        id="isReady",
        tag="Operation",
        summary="Whether the store answers.",
        answers={200: Answer("It does.", (_json("Status", "ready", {"status": "ready"}),))},
        problems=("invalid-request", *STORE),
    ),
)

OPERATIONS: Final = (*SESSIONS, *STEPS, *_families(), *SERVICE)

# Pages for people, and the document itself.
PAGES: Final = ("/openapi.json", "/docs", "/problems", "/problems/{slug}")


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(
        "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w+\})", path))
    )


_PATHS: Final = {path: _pattern(path) for path in [*{operation.path for operation in OPERATIONS}, *PAGES]}


def methods_of(path: str) -> list[str]:
    """The methods that `path` takes in either plane, for Allow; empty if it is none of the service's."""
    found = set()
    if any(_PATHS[page].fullmatch(path) for page in PAGES):
        found |= {"GET", "HEAD", "OPTIONS"}
    for operation in OPERATIONS:
        if _PATHS[operation.path].fullmatch(path):
            found |= {operation.method, "OPTIONS"}
            if operation.method == "GET" and operation.head:
                found.add("HEAD")
    return sorted(found)
