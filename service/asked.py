"""A step as it is asked for: what the head of a request says of it, and what its body makes of that."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from xxhash import xxh3_128

from core.contributions import Contribution
from service import contributions
from service.documents import Precondition, StepRequest
from service.http import Format, Request, body_format, idempotency_key, negotiate, preconditions
from service.wire.inflate import Body


class Asked(NamedTuple):
    """What is known before the body: its format, that of the answer, and the members that stand in the query."""

    form: Format
    answer: Format
    members: Mapping[str, Any]
    if_match: Precondition | None
    key: str | None
    query: bytes


def asked(request: Request) -> Asked:
    """Raises UnsupportedMedia, NotAcceptable, InvalidRequest."""
    form = body_format(request.header(b"content-type"))
    answer = negotiate(request.header(b"accept"), form, ("json", "safetensors"))
    given = request.query(contributions.QUERY_MEMBERS if form == "safetensors" else ())
    members = contributions.members_of_query(given)
    key = idempotency_key(request.header(b"idempotency-key"))
    if_match = preconditions(request.header(b"if-match"))
    return Asked(form, answer, members, if_match, key, request.scope["query_string"])


def contributed(head: Asked, body: Body) -> tuple[Contribution, Mapping[str, Any]]:
    """The contribution, and the members beside it. Raises what service.contributions does."""
    if head.form == "json":
        return contributions.of_json(body)
    return contributions.of_safetensors(body, head.members), head.members


def step_request(
    head: Asked, body: Body, contribution: Contribution, members: Mapping[str, Any], *, minimal: bool = False
) -> StepRequest:
    """`minimal`: the answer is to bring no tensors, unless `members` say otherwise."""
    returns = members.get("return")
    if minimal and returns is None:
        returns = "none"
    digest = "" if head.key is None else _digest(head.form, body, head.query)
    return StepRequest(contribution, returns, len(body), head.if_match, head.key, digest)


def _digest(form: Format, body: Body, query: bytes) -> str:
    """What two sendings of one contribution have in common: its inflated body, its format and its query."""
    digest = xxh3_128(body)
    digest.update(b"&".join([form.encode(), *sorted(query.split(b"&"))]))
    return digest.hexdigest()
