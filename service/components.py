"""The parameters, headers and schemas that the OpenAPI document names; those of models are made from the models."""

from collections.abc import Iterable
from typing import Any, Final

from service import examples
from service.operation import BASE64, SAFETENSORS

STRING: Final = {"type": "string"}
_STEP_NUMBER: Final = {"type": "integer", "minimum": 0}
_WORKER: Final = "^[A-Za-z0-9._-]{1,64}$"


def ref(section: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{section}/{name}"}


def _parameter(where: str, name: str, schema: dict[str, Any], example: Any, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": description,
        "schema": schema,
        "example": example,
    }


_IN_BODY: Final = " For a safetensors body; in JSON it is a member of the body."

PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "Session": _parameter("path", "session", STRING, examples.SESSION_ID, "The id of a session."),
    "Kind": _parameter("path", "kind", STRING, "adam", "The name of a kind."),
    "Limit": _parameter(
        "query", "limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, 20, "At most so many."
    ),
    "CatalogueLimit": _parameter(
        "query", "limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 100}, 100, "At most so many."
    ),
    "AfterKind": _parameter("query", "after", STRING, "adam", "The last kind of the page before."),
    "AfterWorker": _parameter("query", "after", STRING, "worker-3", "The last name of the page before."),
    "AfterSession": _parameter("query", "after", STRING, examples.OTHER_ID, "The last id of the page before."),
    "Label": _parameter("query", "label", STRING, "team:vision", "Only sessions with this label: a key, ':', a value."),
    "PreviewSteps": _parameter(
        "query", "steps", {"type": "integer", "minimum": 1, "maximum": 10000, "default": 1000}, 3, "So many values."
    ),
    "HistoryAfter": _parameter(
        "query", "after", {**_STEP_NUMBER, "default": 0}, 41, "Only the records of steps greater than this."
    ),
    "HistoryLimit": _parameter(
        "query",
        "limit",
        {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 1000},
        1000,
        "At most so many.",
    ),
    "At": _parameter(
        "query", "at", {"enum": ["next", "final"], "default": "next"}, "final", "Which point: see the description."
    ),
    "WaitAfter": _parameter("query", "after", _STEP_NUMBER, 41, "Answer as soon as the step is greater than this."),
    "Wait": _parameter(
        "query",
        "wait",
        {"type": "number", "minimum": 0, "maximum": 60, "default": 0},
        30,
        "Wait at most so many seconds for a step greater than `after`, then answer 304.",
    ),
    "Puller": _parameter(
        "query",
        "worker",
        {"type": "string", "pattern": _WORKER},
        "worker-3",
        "Who pulls them. Where delays are compensated it is remembered; elsewhere it has no effect.",
    ),
    "Return": _parameter(
        "query",
        "return",
        {"enum": ["params", "updates", "none"]},
        "updates",
        "What to answer. Left out: `params` where the server holds them, else `updates`." + _IN_BODY,
    ),
    "Loss": _parameter("query", "loss", {"type": "number"}, 0.693, "The loss at the gradient's point." + _IN_BODY),
    "Partial": _parameter(
        "query",
        "partial",
        {"type": "boolean", "default": False},
        True,
        "Tensors that are left out keep still." + _IN_BODY,
    ),
    "Worker": _parameter(
        "query",
        "worker",
        {"type": "string", "pattern": _WORKER},
        "worker-3",
        "The sender's name." + _IN_BODY,
    ),
    "BaseStep": _parameter(
        "query", "base_step", _STEP_NUMBER, 41, "The step at which the gradient was taken." + _IN_BODY
    ),
    "Weight": _parameter(
        "query",
        "weight",
        {"type": "number", "exclusiveMinimum": 0, "default": 1},
        32,
        "How much the contribution counts." + _IN_BODY,
    ),
    "Payload": _parameter(
        "query",
        "payload",
        {"enum": ["gradients", "deltas", "params"], "default": "gradients"},
        "deltas",
        "What the tensors of a safetensors body are: gradients; the worker's parameters minus those it started from; "
        "or its parameters. In JSON they stand under the member of that name.",
    ),
    "IfMatch": _parameter(
        "header",
        "If-Match",
        STRING,
        examples.STAMP.etag,
        'Do it only if the session stands at this ETag, or at this step: `"1"`.',
    ),
    "IfNoneMatch": _parameter(
        "header", "If-None-Match", STRING, examples.STAMP.etag, "Answer 304 if the session still stands at this ETag."
    ),
    "IdempotencyKey": _parameter(
        "header",
        "Idempotency-Key",
        {"type": "string", "minLength": 1, "maxLength": 255},
        "0b9f8a52-step-1",
        "Apply the step once, however often it is sent. The session remembers the last 4,096 keys.",
    ),
    "Prefer": _parameter(
        "header",
        "Prefer",
        STRING,
        "return=minimal, wait=30",
        "`return=minimal` is `return=none`. `wait=30` waits so many seconds, at most 60, for the round to be closed.",
    ),
    "LastEventId": _parameter("header", "Last-Event-ID", STRING, "41", "Go on after the event with this id."),
}

HEADERS: Final[dict[str, tuple[str, Any]]] = {
    "ETag": ('The commit: `"<step>-<commit>"`.', examples.STAMP.etag),
    "Ravine-Step": ("The step of the session.", "1"),
    "Ravine-Replayed": ("`true` if the step was applied before, under the same Idempotency-Key.", "true"),
    "Preference-Applied": ("`return=minimal` if Prefer asked for it.", "return=minimal"),
    "Location": (
        "The path of the new session; of a 202, where to wait for the parameters.",
        f"/v1/sessions/{examples.SESSION_ID}",
    ),
    "Link": ("Where to go on, if there are more.", '</v1/sessions/…/history?after=1000&limit=1000>; rel="next"'),
    "WWW-Authenticate": ("How to send a key.", 'Bearer realm="ravine"'),
    "Retry-After": ("Seconds after which to try again.", "1"),
    "RateLimit-Policy": ("The quota: so many requests in so many seconds.", '"tenant";q=1000;w=60'),
    "RateLimit": ("What is left of it, and after how many seconds there is more.", '"tenant";r=0;t=3'),
    "Accept": ("The media types that are read, or Accept-Encoding with the codings.", "application/json"),
}

# Headers of refusals, by slug.
REFUSAL_HEADERS: Final = {
    "unsupported-media-type": "Accept",
    "too-far-ahead": "Retry-After",
    "overloaded": "Retry-After",
    "store-unavailable": "Retry-After",
    "unauthenticated": "WWW-Authenticate",
    "quota-exceeded": "RateLimit",
}
# And those that come with it.
BESIDE: Final = {"RateLimit": ("Retry-After", "RateLimit-Policy", "RateLimit")}


def _object(required: Iterable[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _list_of(item: dict[str, Any]) -> dict[str, Any]:
    return _object(["data", "has_more"], data={"type": "array", "items": item}, has_more={"type": "boolean"})


_TENSORS: Final = {"type": "object", "additionalProperties": ref("schemas", "Tensor")}
_SCALE: Final = {
    "type": "number",
    "description": "If it is there, the values are integers from -128 to 127, to be multiplied by it.",
}
_FORMS: Final = [ref("schemas", name) for name in ("Tensor", "RowSparse", "TopK", "Quantized")]
_CONTRIBUTED: Final = {"type": "object", "additionalProperties": {"anyOf": _FORMS}}
_NULLABLE_NUMBER: Final = {"type": ["number", "null"]}
_NAMES: Final = {"type": "array", "items": STRING}
_BY_DTYPE: Final = {"type": "object", "additionalProperties": {"type": "number"}}

SCHEMAS: Final[dict[str, dict[str, Any]]] = {
    "Safetensors": {"contentMediaType": SAFETENSORS, "description": BASE64[0].upper() + BASE64[1:] + "."},
    "Text": {"type": "string"},
    "Empty": _object([]),
    "Status": _object(["status"], status=STRING),
    "SessionList": _list_of(ref("schemas", "Session")),
    "WorkerList": _list_of(ref("schemas", "Worker")),
    "RowSparse": _object(
        ["indices", "values"],
        indices={"type": "array", "items": _STEP_NUMBER, "description": "Row numbers; rows named twice are summed."},
        values=ref("schemas", "Tensor"),
        scale=_SCALE,
    ),
    "TopK": _object(
        ["positions", "values"],
        positions={
            "type": "array",
            "items": _STEP_NUMBER,
            "description": "Places in the flat, row-major tensor; places named twice are summed, others are zero.",
        },
        values={"type": "array", "items": {"type": "number"}, "description": "As many as there are positions."},
        scale=_SCALE,
    ),
    "Quantized": _object(
        ["values", "scale"],
        values={**ref("schemas", "Tensor"), "description": "Integers from -128 to 127."},
        scale={"type": "number", "description": "A value is scale times its integer."},
    ),
    "Step": _object(
        [],
        gradients={**_CONTRIBUTED, "description": "By tensor."},
        deltas={
            **_CONTRIBUTED,
            "description": "In place of `gradients`: the worker's parameters minus those it started from.",
        },
        loss={
            "type": "number",
            "description": "The loss at the gradient's point; kept in the history. Line searches, polyak_sgd and the "
            "schedule plateau need it.",
        },
        params={
            **_TENSORS,
            "description": "Beside `gradients` or `deltas`: the parameters' values, where the client holds them and "
            "the method asks. Alone, in a session that holds its own: the worker's parameters.",
        },
        hessian={**ref("schemas", "Tensor"), "description": "n × n over the flat parameters, in `shapes`' order."},
        hessian_diagonal={**_TENSORS, "description": "An estimate of the Hessian's diagonal, for sophia."},
        partial={"type": "boolean", "default": False, "description": "Tensors that are left out keep still."},
        worker=PARAMETERS["Worker"]["schema"],
        base_step=_STEP_NUMBER,
        weight=PARAMETERS["Weight"]["schema"],
        **{"return": PARAMETERS["Return"]["schema"]},
    )
    | {
        "anyOf": [{"required": [name]} for name in ("gradients", "deltas", "params")],
        "not": {"required": ["gradients", "deltas"]},
    },
    "StepReply": _object(
        ["step", "metrics"],
        step=_STEP_NUMBER,
        params=_TENSORS,
        updates={**_TENSORS, "description": "To be added to the parameters."},
        metrics=_object(
            ["lr", "grad_norm"],
            lr=_NULLABLE_NUMBER,
            grad_norm=_NULLABLE_NUMBER,
            loss_scale={"type": "number", "description": "By what the next loss is to be multiplied (`unscale`)."},
        ),
        skipped={"const": True, "description": "The gradient was not finite, and the session skips such steps."},
    ),
    "StepOnly": _object(["step"], step=_STEP_NUMBER),
    "NewParams": _object(["params"], params=_TENSORS),
    "Params": _object(["step", "params"], step=_STEP_NUMBER, params=_TENSORS),
    "Record": _object(
        ["step", "time", "loss", "grad_norm", "lr", "worker"],
        step=_STEP_NUMBER,
        time={"type": "string", "format": "date-time"},
        loss=_NULLABLE_NUMBER,
        grad_norm=_NULLABLE_NUMBER,
        lr={"type": "number"},
        worker={"type": ["string", "null"]},
        epsilon={
            **_NULLABLE_NUMBER,
            "description": "Spent by then, where there is differential privacy; null: no finite one is known.",
        },
    ),
    "Preview": _object(
        ["step", "first", "values"],
        step=_STEP_NUMBER,
        first={**_STEP_NUMBER, "description": "The number of the update that the first value is for."},
        values={"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
    ),
    "History": _list_of(ref("schemas", "Record")),
    "CatalogueEntry": _object(
        ["kind", "summary", "description", "formula", "source", "url", "schema"],
        kind=STRING,
        summary=STRING,
        description=STRING,
        formula={"type": "string", "description": "LaTeX."},
        source={"type": "string", "description": "The paper or library that it comes from."},
        url=STRING,
        schema={"type": "object", "description": "JSON Schema of the object with this kind, defaults included."},
        notes=_NAMES,
        needs={
            **_NAMES,
            "description": "Of `params`, `loss`, `hessian`, `hessian_diagonal`: what a step needs, by the defaults.",
        },
        may_need={**_NAMES, "description": "The same, under any options."},
        slots={**_NAMES, "description": "The arrays kept per parameter, by the defaults."},
        slots_at_most=_NAMES,
        own={**_NAMES, "description": "The other arrays kept: of a row, a block, or the whole, by the defaults."},
        matrices={**_NAMES, "description": "Those of them that are n × n over all parameters."},
        own_at_most=_NAMES,
        bytes_per_parameter={
            **_BY_DTYPE,
            "description": "The weight of the state by the session's dtype, for a matrix of 1024 × 768; what is n × n "
            "over all parameters is not in it.",
        },
        bytes_per_parameter_at_most=_BY_DTYPE,
        max_parameters={"type": ["integer", "null"]},
        row_sparse={
            "type": "boolean",
            "description": "Of an optimizer: whether a row-sparse gradient touches its rows alone. Of a transform: "
            "whether such a gradient stays one.",
        },
        family={"enum": ["elements", "tensors", "whole"], "description": "What its rule must see at once."},
        wraps={**_NAMES, "description": "The kinds that can be its `base`."},
        bfloat16={"type": "boolean", "description": "Whether `state_dtype` may be bfloat16."},
        hands_out_points={"type": "boolean", "description": "Whether `at=next` differs, by the defaults."},
        holds_params={"type": "boolean", "description": "Whether the server must hold the parameters."},
        least={"type": "integer", "description": "Of a reducer: the fewest contributions, by the defaults."},
        keeps={"enum": ["one", "all"], "description": "Of a reducer: the arrays that an open round takes."},
        weighted={"type": "boolean", "description": "Of a reducer: whether it looks at `weight`."},
    ),
    "Catalogue": _list_of(ref("schemas", "CatalogueEntry")),
    "Problem": {
        "type": "object",
        "required": ["type", "title", "status", "detail", "instance"],
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": STRING,
            "status": {"type": "integer"},
            "detail": STRING,
            "instance": {"type": "string", "format": "uri-reference"},
            "errors": {
                "type": "array",
                "items": _object(["pointer", "detail"], pointer=STRING, detail=STRING),
                "description": "Each fault with a JSON pointer into the body, or /query/… or /headers/….",
            },
            "tensor": STRING,
            "expected": {"type": "array", "items": _STEP_NUMBER},
            "received": {"type": "array", "items": _STEP_NUMBER},
            "step": _STEP_NUMBER,
            "staleness": _STEP_NUMBER,
            "max_staleness": _STEP_NUMBER,
            "round": _STEP_NUMBER,
            "worker": STRING,
            "clock": _STEP_NUMBER,
            "slowest": _STEP_NUMBER,
            "bound": _STEP_NUMBER,
            "quota": {"enum": ["sessions", "state", "requests", "rate"]},
            "limit": {"type": "integer"},
            "accepted": _NAMES,
            "offered": _NAMES,
            "acknowledged": _object(["step", "etag"], step=_STEP_NUMBER, etag=STRING),
            "found": _object(["step", "etag"], step=_STEP_NUMBER, etag=STRING),
            "format": STRING,
            "supported": _NAMES,
        },
    },
}
