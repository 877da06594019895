"""Every call of the service, control plane and data plane alike: what it takes, gives, and can refuse.

This table is the source of the OpenAPI document, of the reference page, and of what Allow says. A test holds it against
the routes.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeAlias

from service import catalogue, examples
from service.access.rights import CALLS, Right
from service.operation import (
    BODY,
    HTTP,
    JSON,
    SESSION,
    STAMPED,
    STORE,
    STORED,
    WRITE,
    Answer,
    Content,
    Operation,
    in_json,
    in_safetensors,
)
from service.step_operations import STEPS

_SESSION: Final = in_json("Session", "a session", examples.session())

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
                    "a step per round of four workers": examples.CREATE_SHARED,
                },
            ),
            in_safetensors("a checkpoint", examples.params_file()),
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
                (in_json("SessionList", "a page", {"data": [examples.session()], "has_more": False}),),
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
            200: Answer(
                "The session.",
                (
                    Content(
                        JSON,
                        "Session",
                        {"a session": examples.session(1), "one with differential privacy": examples.private()},
                    ),
                ),
                STAMPED,
            ),
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
        body=(in_json("SessionPatch", "a lower rate", examples.PATCH),),
        answers={200: Answer("The session.", (in_json("Session", "a session", examples.patched()),), STAMPED)},
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
        problems=(*STORED, "step-conflict"),
    ),
    Operation(
        method="POST",
        path="/v1/sessions/{session}/fork",
        id="forkSession",
        tag="Sessions",
        summary="Make a new session from the state of this one.",
        description="Parameters, moments, step, settings and the open round are the same; the history is not taken "
        "along. The body may be left out.",
        parameters=("Session",),
        body=(in_json("Empty", "nothing to say", {}),),
        body_required=False,
        answers={
            201: Answer(
                "The new session.", (in_json("Session", "a session", examples.forked()),), (*STAMPED, "Location")
            )
        },
        problems=(*BODY, *SESSION, *WRITE),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/history",
        id="getHistory",
        tag="Sessions",
        summary="Read a record per step, oldest first.",
        description="The last 10,000 are kept. `Accept: text/csv` gives a table with a header line. In a session with "
        "differential privacy each record has the `epsilon` spent by then.",
        parameters=("Session", "HistoryAfter", "HistoryLimit"),
        answers={
            200: Answer(
                "The records after step `after`. Link leads to the next ones, if there are more.",
                (
                    in_json("History", "one step", examples.history()),
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
                    in_json("Preview", "three steps", examples.preview()),
                    Content("text/csv", "Text", {"three steps": examples.preview_csv()}),
                ),
                STAMPED,
            )
        },
        problems=(*SESSION, "not-acceptable"),
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
                        "All of them, unless `limit` is less.", (in_json("Catalogue", f"one of the {family}", sample),)
                    )
                },
                **common,  # type: ignore[arg-type]
            )
        )
        answer = Answer("The kind.", (in_json("CatalogueEntry", "one kind", partial(_first, entries)),))
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
        answers={200: Answer("It does.", (in_json("Status", "alive", {"status": "alive"}),))},
        problems=("invalid-request", "internal-error", *HTTP),
    ),
    Operation(
        method="GET",
        path="/readyz",
        id="isReady",
        tag="Operation",
        summary="Whether the store answers.",
        answers={200: Answer("It does.", (in_json("Status", "ready", {"status": "ready"}),))},
        problems=("invalid-request", *STORE),
    ),
    Operation(
        method="GET",
        path="/metrics",
        id="readMetrics",
        tag="Operation",
        summary="Read what is measured, as Prometheus does.",
        description="In OpenMetrics where Accept names `application/openmetrics-text`, else in Prometheus' own text. "
        "Where keys are asked for, it takes one of scope `admin` of the tenant `default`, for it tells of all tenants.",
        answers={
            200: Answer(
                "All metrics of this process.",
                (
                    Content("text/plain", "Text", {"some of them": examples.METRICS}),
                    Content("application/openmetrics-text", "Text", {"some of them": examples.OPENMETRICS}),
                ),
            )
        },
        problems=("invalid-request", "internal-error"),
    ),
)


def _guarded(operation: Operation) -> Operation:
    """With what the gate can refuse before the call is looked at."""
    right = CALLS[operation.path][operation.method]
    if right is Right.OPEN:
        return operation
    forbidden = ("forbidden",) if right > Right.KEY else ()
    store = () if "store-unavailable" in operation.problems else ("store-unavailable",)
    refused = ("unauthenticated", *forbidden, "quota-exceeded", *store)
    return replace(operation, problems=(*operation.problems, *refused))


OPERATIONS: Final = tuple(map(_guarded, (*SESSIONS, *STEPS, *_families(), *SERVICE)))

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
