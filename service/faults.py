"""What pydantic found wrong, as faults: a JSON pointer into the document, and a sentence for people.

Pydantic's locations hold more than the way through the document: the alternative of a union that was tried (`cosine`,
`<number>`), `[key]` for a member's name. Walking the document along the location tells which parts are the way.
"""

import re
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from service.errors import Fault
from service.wire.json import pointer

NUMBER, SCHEDULE = "<number>", "<schedule>"  # the alternatives of a hyperparameter

# A client that sends a thousand mistakes is not helped by a thousand sentences.
MAX_FAULTS = 64

_NAMES = {"NoneType": "null", "bool": "a boolean", "int": "a number", "float": "a number", "str": "a string"}


def faults_of(error: ValidationError, document: object, model: type[BaseModel], at: str = "") -> list[Fault]:
    """The faults of `document`, which stands at the pointer `at` of the request and was refused by `model`."""
    details = error.errors(include_url=False, include_context=True)
    return [_fault(detail, document, model, at) for detail in details[:MAX_FAULTS]]


def _fault(detail: ErrorDetails, document: object, model: type[BaseModel], at: str) -> Fault:
    tokens, owner = _way(detail["loc"], document)
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tokens.append("kind")
    if detail["type"] == "extra_forbidden":
        known = "" if owner or len(tokens) > 1 else f"; there are {', '.join(model.model_fields)}"
        return Fault(pointer(at, *tokens), f"{owner or 'this object'} has no member {str(tokens[-1])[:64]!r}{known}")
    return Fault(pointer(at, *tokens), _sentence(detail))


def _way(location: tuple[int | str, ...], document: object) -> tuple[list[int | str], str | None]:
    """The parts of `location` that lead through `document`, and the kind of the object that the last is a member of."""
    tokens: list[int | str] = []
    value, owner = document, None
    tag: str | None = None  # the kind of `value`, once its part of the location has gone by
    for part in location:
        match value:
            case Mapping():
                if part in (NUMBER, SCHEDULE) and part not in value:
                    continue
                if tag is None and part == value.get("kind"):
                    tag = str(part)
                    continue
                value = value.get(part)
            case list() if isinstance(part, int):
                value = value[part] if part < len(value) else None
            case str() if part == value:  # a kind that is given by its name alone
                value, tag = {}, str(part)
                continue
            case _:
                continue
        tokens.append(part)
        owner, tag = tag, None
    return tokens, owner


def _sentence(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    match kind:
        case "missing":
            return "this member is required"
        case "union_tag_invalid":
            return f"there is no kind {context['tag'][:64]!r}; the kinds are {_plain(context['expected_tags'])}"
        case "union_tag_not_found":
            return "this member is required: the name of a kind"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"must be an object, not {_what(detail['input'])}"
        case "float_type" | "int_type" | "int_from_float" | "bool_type" | "string_type" | "list_type":
            return f"{_must(detail['msg'])}, not {_what(detail['input'])}"
        case "value_error":
            return str(context["error"])
    return _must(detail["msg"])


_OURS = (
    (re.compile(r"^(Input|String|List|Dictionary) should "), "must "),
    (re.compile(r"\bvalid (?=(boolean|number|string|list)\b)"), ""),
    (re.compile(r"\ba valid (?=integer\b)"), "an "),
    (re.compile("greater than or equal to"), "at least"),
    (re.compile(r"\bTrue, False\b"), "true, false"),
    (re.compile("less than or equal to"), "at most"),
    (re.compile(" after validation, not .*$"), ""),
)


def _must(message: str) -> str:
    for theirs, ours in _OURS:
        message = theirs.sub(ours, message)
    return message


def _plain(tags: str) -> str:
    return tags.replace("'", "")


def _what(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return _NAMES.get(type(value).__name__, "a list")
