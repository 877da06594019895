"""What is said of a call of the service: what it takes, what it gives, and what it can refuse.

Names of schemas, parameters and headers are those of openapi.py, slugs of problems those of problems.py.
"""

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

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


# What is refused before it is known what call it is.
HTTP: Final = ("malformed-request", "head-too-large", "overloaded")
STORE: Final = ("store-unavailable", "internal-error", *HTTP)
STORED: Final = ("invalid-request", "session-not-found", "state-corrupt", "unknown-format", *STORE)
SESSION: Final = (*STORED, "state-lost")
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


def in_json(schema: str, summary: str, example: Any) -> Content:
    return Content(JSON, schema, {summary: example})


def in_safetensors(summary: str, example: str) -> Content:
    return Content(SAFETENSORS, "Safetensors", {f"{summary}: {BASE64}": example})
