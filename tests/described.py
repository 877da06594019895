"""A reply against the OpenAPI document: status, headers, and the body against its JSON Schema.

The validator knows the keywords that the document uses and fails on any other, so that none is passed over in silence.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import httpx

# Those of which the document says where they are to be expected.
HEADERS = {"etag", "ravine-step", "ravine-replayed", "location", "preference-applied", "retry-after", "link"}
# What says something to a reader alone.
REMARKS = {"title", "description", "default", "examples", "example", "discriminator"}
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "null": lambda value: value is None,
}


class Invalid(AssertionError):
    """Where in the value, and why."""


def check_reply(document: Mapping[str, Any], call: str, reply: httpx.Response) -> None:
    """`call` is a method and a path of the document. Raises AssertionError."""
    method, path = call.split(" ")
    answers = document["paths"][path][method.lower()]["responses"]
    assert str(reply.status_code) in answers, f"{call} is not said to answer {reply.status_code}: {reply.text}"
    answer = answers[str(reply.status_code)]
    told = {name.lower() for name in answer.get("headers", {})}
    assert reply.headers.keys() & HEADERS <= told, f"{call} gives headers that it is not said to give"
    media = reply.headers["content-type"].partition(";")[0]
    content = answer["content"][media]
    validate(reply.json(), content["schema"], document)
    if media == "application/problem+json":
        _check_problem(reply.json(), content["examples"])


def _check_problem(problem: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
    slug = problem["type"].removeprefix("/problems/")
    assert slug in examples, f"{slug} is not one of those that the call is said to refuse"
    assert problem.keys() == examples[slug]["value"].keys()


def validate(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any], at: str = "") -> None:
    """Raises Invalid where `value` is not what `schema`, of JSON Schema 2020-12, says."""
    for keyword, operand in schema.items():
        if keyword in REMARKS or keyword in ("required", "properties", "additionalProperties"):
            continue
        if keyword not in KEYWORDS:
            raise Invalid(f"{at}: nobody knows the keyword {keyword!r}")
        applies = keyword not in TYPE_OF or TYPES[TYPE_OF[keyword]](value)
        if applies and not KEYWORDS[keyword](value, operand, document, at):
            raise Invalid(f"{at or '/'}: {value!r} is not {keyword} {operand!r}")
    if isinstance(value, dict):
        _check_members(value, schema, document, at)


def _check_members(value: dict[str, Any], schema: Mapping[str, Any], document: Mapping[str, Any], at: str) -> None:
    missing = set(schema.get("required", ())) - value.keys()
    if missing:
        raise Invalid(f"{at or '/'}: without {sorted(missing)}")
    named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, member in value.items():
        if name not in named and others is False:
            raise Invalid(f"{at}/{name}: no member of it")
        rest = others if isinstance(others, dict) else {}
        validate(member, named.get(name, rest), document, f"{at}/{name}")


def _fits(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any], at: str) -> bool:
    try:
        validate(value, schema, document, at)
    except Invalid:
        return False
    return True


def _is_of(value: Any, types: str | list[str], *_: Any) -> bool:
    return any(TYPES[name](value) for name in ([types] if isinstance(types, str) else types))


def _follows(value: Any, reference: str, document: Mapping[str, Any], at: str) -> bool:
    found: Any = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    validate(value, found, document, at)
    return True


def _has_items(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any], at: str) -> bool:
    for index, item in enumerate(value):
        validate(item, schema, document, f"{at}/{index}")
    return True


def _is_one_of(value: Any, schemas: list[Any], document: Mapping[str, Any], at: str) -> bool:
    return sum(_fits(value, schema, document, at) for schema in schemas) == 1


def _has_format(value: Any, name: str, *_: Any) -> bool:
    if name == "date-time":
        return datetime.fromisoformat(value).tzinfo is not None
    return name == "uri-reference" and re.fullmatch(r"[!#-;=?-\[\]_a-z~%]*", value) is not None


# The one type of value that a keyword says something about; others say something about any.
TYPE_OF = {
    "items": "array",
    "minItems": "array",
    "maxItems": "array",
    "format": "string",
    "pattern": "string",
    "minLength": "string",
    "maxLength": "string",
    "minimum": "number",
    "exclusiveMinimum": "number",
    "maximum": "number",
    "exclusiveMaximum": "number",
    "maxProperties": "object",
    "propertyNames": "object",
}

KEYWORDS: dict[str, Callable[..., bool]] = {
    "type": _is_of,
    "$ref": _follows,
    "items": _has_items,
    "anyOf": lambda value, schemas, document, at: any(_fits(value, schema, document, at) for schema in schemas),
    "oneOf": _is_one_of,
    "not": lambda value, schema, document, at: not _fits(value, schema, document, at),
    "const": lambda value, only, *_: value == only and type(value) is type(only),
    "enum": lambda value, values, *_: any(value == one and type(value) is type(one) for one in values),
    "format": _has_format,
    "pattern": lambda value, pattern, *_: re.search(pattern, value) is not None,
    "minimum": lambda value, bound, *_: value >= bound,
    "exclusiveMinimum": lambda value, bound, *_: value > bound,
    "maximum": lambda value, bound, *_: value <= bound,
    "exclusiveMaximum": lambda value, bound, *_: value < bound,
    "minLength": lambda value, bound, *_: len(value) >= bound,
    "maxLength": lambda value, bound, *_: len(value) <= bound,
    "minItems": lambda value, bound, *_: len(value) >= bound,
    "maxItems": lambda value, bound, *_: len(value) <= bound,
    "maxProperties": lambda value, bound, *_: len(value) <= bound,
    "propertyNames": lambda value, schema, document, at: all(_fits(name, schema, document, at) for name in value),
}
