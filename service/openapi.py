"""The OpenAPI 3.1 document of both planes, made from the table of operations, the models and the table of problems."""

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from pydantic import BaseModel

from service import examples, kinds, schemas
from service.access.rights import CALLS, Right
from service.components import BESIDE, HEADERS, PARAMETERS, REFUSAL_HEADERS, SCHEMAS, STRING, ref
from service.operation import SAFETENSORS, Answer, Content, Operation
from service.operations import OPERATIONS
from service.problem_table import PROBLEMS
from service.problems import MEDIA_TYPE

_DESCRIPTION: Final = f"""\
Ravine keeps the state of optimizers: open a session, post a gradient each step, get parameters or updates back.

Tensors travel as JSON or as safetensors (`{SAFETENSORS}`; `application/octet-stream` is read as that too). Content-Type
says what the request holds, Accept what the reply shall hold. Examples of safetensors bodies are shown in base64.

Bodies may be compressed: `Content-Encoding: gzip` or `zstd`. What is unknown, in body or query, is refused.

Every error is `{MEDIA_TYPE}` (RFC 9457); its `type` is a path that a browser can open. Every reply has an
`X-Request-Id`, which is the request's if it had one. Where there is GET, there is HEAD,
but for the stream of events. Where rates are set, replies have `RateLimit-Policy` and `RateLimit`, too.
"""

# Where no key is asked for, a call without one is as good as one with a key of the scope `admin`.
_KEY: Final = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "rvn_…",
    "description": "A key that the operator made with `ravine keys create`. Scope `admin`: all calls, `/metrics` in "
    "the tenant `default` alone; `session`: all but that; `worker`: contributes to one session and pulls from it. "
    "Sessions of others are not there.",
}


@cache
def openapi(version: str) -> dict[str, Any]:
    """The document as JSON values. It is shared: not to be changed."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    models: list[type[BaseModel]] = [
        schemas.NewSession,
        schemas.SessionPatch,
        schemas.Session,
        schemas.Pending,
        schemas.Worker,
        schemas.Round,
        *kinds.AVERAGINGS.values(),
    ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ravine",
            "version": version,
            "summary": "Optimization as a service.",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}, {}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in OPERATIONS)],
        "paths": paths,
        "components": {
            "schemas": dict(sorted((kinds.components(models) | SCHEMAS).items())),
            "securitySchemes": {"key": _KEY},
            "parameters": PARAMETERS,
            "headers": {
                name: {"description": text, "schema": STRING, "example": example}
                for name, (text, example) in HEADERS.items()
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [ref("parameters", name) for name in operation.parameters],
    }
    if operation.description:
        made["description"] = operation.description
    if operation.body:
        made["requestBody"] = {"required": operation.body_required, "content": _contents(operation.body)}
    if CALLS[operation.path][operation.method] is Right.OPEN:
        made["security"] = []
    answers = {str(status): _answer(answer, makes=status == 201) for status, answer in operation.answers.items()}
    return made | {"responses": answers | _refusals(operation)}


def _contents(contents: Iterable[Content]) -> dict[str, Any]:
    return {
        content.media: {
            "schema": ref("schemas", content.schema),
            "examples": {
                f"example{index}": {"summary": summary, "value": value() if callable(value) else value}
                for index, (summary, value) in enumerate(content.examples.items(), 1)
            },
        }
        for content in contents
    }


def _answer(answer: Answer, *, makes: bool) -> dict[str, Any]:
    """`makes`: its body is a session that was not there before."""
    made: dict[str, Any] = {"description": answer.description}
    if answer.headers:
        made["headers"] = {name: ref("headers", name) for name in answer.headers}
    if answer.contents:
        made["content"] = _contents(answer.contents)
    if makes:
        made["links"] = {
            operation.id: {
                "operationId": operation.id,
                "parameters": {"session": "$response.body#/id"},
                "description": operation.summary,
            }
            for operation in OPERATIONS
            if "Session" in operation.parameters
        }
    return made


def _refusals(operation: Operation) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for slug in dict.fromkeys(operation.problems):
        by_status.setdefault(PROBLEMS[slug].status, []).append(slug)
    made = {}
    for status, slugs in sorted(by_status.items()):
        shown = {
            slug: {"summary": PROBLEMS[slug].title, "value": examples.problem(slug, operation.path)} for slug in slugs
        }
        made[str(status)] = {
            "description": "; ".join(f"`{slug}`: {PROBLEMS[slug].title}" for slug in slugs),
            "content": {MEDIA_TYPE: {"schema": ref("schemas", "Problem"), "examples": shown}},
        }
        headers = [REFUSAL_HEADERS[slug] for slug in slugs if slug in REFUSAL_HEADERS]
        if headers:
            names = [name for header in headers for name in BESIDE.get(header, (header,))]
            made[str(status)]["headers"] = {name: ref("headers", name) for name in names}
    return made
