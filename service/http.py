"""What both planes need of HTTP: headers understood, waits that end, replies sent. How bodies are read is in bodies.py.

Plain ASGI, made for uvicorn, whose sources say what costs a copy: a reply with a Content-Length goes to the transport
piece by piece, and uvloop writes any contiguous buffer where it lies. So large replies are sent as views of the arrays
they come from, and only small pieces, for which a message costs more than a copy, are joined.

Headers are read strictly: what is malformed is refused, since a precondition or a key that is silently dropped
would apply a step that its sender meant to be guarded. `Prefer` alone is advice (RFC 7240) and never refused.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import parse_qsl

from service import bodies
from service.admission import TICKET, Ticket
from service.bodies import ClientGone as ClientGone
from service.bodies import Headers as Headers
from service.bodies import Message as Message
from service.bodies import Receive as Receive
from service.documents import Precondition
from service.errors import Fault, InvalidRequest, NotAcceptable, Overloaded, UnsupportedMedia
from service.wire.inflate import Body
from service.wire.json import pointer

Scope: TypeAlias = MutableMapping[str, Any]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Piece: TypeAlias = bytes | memoryview
# Given in place of what a client sends: nobody waits for this request any longer, though the client is there.
OVER: Final[Message] = {"type": "ravine.over"}
Format: TypeAlias = Literal["json", "safetensors", "csv"]

# The first is what replies are labelled with.
MEDIA_TYPES: Final[dict[Format, tuple[str, ...]]] = {
    "json": ("application/json",),
    "safetensors": ("application/vnd.safetensors", "application/octet-stream"),
    "csv": ("text/csv",),
}
FORMATS: Final[dict[str, Format]] = {media: name for name, types in MEDIA_TYPES.items() for media in types}

T = TypeVar("T")

SMALL: Final = 64 << 10  # bytes up to which copying is cheaper than another message


class Reply(NamedTuple):
    """An answer; Content-Length is made of `pieces`."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    pieces: Sequence[Piece] = ()


class Request:
    """One call, its headers by lower-case name. Raises InvalidRequest for a header that may stand only once."""

    __slots__ = ("headers", "receive", "scope")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.receive = receive
        self.headers = headers_of(scope)

    @property
    def method(self) -> str:
        method: str = self.scope["method"]
        return method

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def query(self, allowed: Collection[str] = ()) -> dict[str, str]:
        """The query's members. Raises InvalidRequest for one that is not `allowed`, or is there twice."""
        text: bytes = self.scope["query_string"]
        return query(text, allowed) if text else {}

    async def body(self, limit: int) -> Body:
        """The body without its Content-Encoding: at most `limit` bytes. Raises what bodies.read does."""
        return await bodies.read(self.scope, self.headers, self.receive, limit)

    @property
    def ticket(self) -> Ticket | None:
        """What this request was let in with; None where nobody counts."""
        return self.scope.get(TICKET)


# -- waiting ---------------------------------------------------------------------------------------------------


class Waits:
    """Work that may take long, each piece of it with an ear on its client's connection.

    The ear is a task of its own, so this is for calls that wait: the others pay for none.
    """

    def __init__(self) -> None:
        self._ears: set[asyncio.Task[Message]] = set()
        self._ended = False

    async def run(self, receive: Receive, work: Coroutine[Any, Any, T], ticket: Ticket | None = None) -> T | None:
        """What `work` gives, or None once `end` was called or the request is OVER. Raises ClientGone; `work` is then
        cancelled. Raises Overloaded where by the `ticket` too many wait already.
        """
        if self._ended:
            work.close()
            return None
        if ticket is not None:
            try:
                ticket.wait()
            except Overloaded:
                work.close()
                raise
        task, ear = asyncio.create_task(work), asyncio.create_task(_hear(receive))
        self._ears.add(ear)
        try:
            await asyncio.wait((task, ear), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if ear.cancelled() or (ear.exception() is None and ear.result() is OVER):
                return None
            raise ClientGone
        finally:
            self._ears.discard(ear)
            ear.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def end(self) -> None:
        """Let everybody who waits go, and nobody wait from now on, so that the server can stop."""
        self._ended = True
        for ear in tuple(self._ears):
            ear.cancel()


async def _hear(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message


# -- headers ---------------------------------------------------------------------------------------------------

# Two of them would leave open which one is meant. Headers that are lists are joined (RFC 9110, 5.3).
_SINGLE: Final = {
    b"content-type": "Content-Type",
    b"idempotency-key": "Idempotency-Key",
    b"last-event-id": "Last-Event-ID",
}


def headers_of(scope: Scope) -> Headers:
    """Headers by lower-case name. Raises InvalidRequest for two of a kind where there may be one."""
    given: list[tuple[bytes, bytes]] = scope["headers"]
    headers = dict(given)
    return headers if len(headers) == len(given) else _joined(given)


def _joined(given: Iterable[tuple[bytes, bytes]]) -> Headers:
    headers: Headers = {}
    for name, value in given:
        if name not in headers:
            headers[name] = value
        elif name in _SINGLE:
            raise _refused(_SINGLE[name], "this header may be sent only once")
        else:
            headers[name] += b", " + value
    return headers


def _refused(header: str, detail: str) -> InvalidRequest:
    return InvalidRequest([Fault("/headers/" + header, detail)])


def _split(value: str, separator: str) -> Iterator[str]:
    """The parts between separators that stand outside of quotes, stripped, the empty ones left out."""
    if '"' in value:
        value = _outside_quotes(value, separator)
        separator = "\0"
    return filter(None, map(str.strip, value.split(separator)))


def _outside_quotes(value: str, separator: str) -> str:
    """`value` with NUL, which no header can hold, for the separators outside of quotes.

    By hand, since a regular expression that looks for closing quotes takes quadratic time where there are none.
    """
    marked, quoted, escaped = [], False, False
    for character in value:
        if not escaped and character == '"':
            quoted = not quoted
        escaped = quoted and character == "\\" and not escaped
        marked.append("\0" if character == separator and not quoted else character)
    return "".join(marked)


_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return _ESCAPED.sub(r"\1", value[1:-1])
    return value


def media_type(value: str) -> tuple[str, dict[str, str]]:
    """`text/csv; charset=UTF-8` -> `("text/csv", {"charset": "UTF-8"})`: names in lower case, values unquoted."""
    if ";" not in value:
        return value.strip().lower(), {}
    media, *rest = [*_split(value, ";")] or [""]
    pairs = (part.partition("=") for part in rest)
    return media.lower(), {name.strip().lower(): _unquoted(text.strip()) for name, _, text in pairs}


def body_format(content_type: str | None, accepted: Sequence[Format] = ("json", "safetensors")) -> Format:
    """The format that a Content-Type names. Raises UnsupportedMedia; JSON is UTF-8 or nothing (RFC 8259)."""
    if content_type == "application/json" and "json" in accepted:
        return "json"
    media, parameters = media_type(content_type or "")
    found = FORMATS.get(media)
    if (
        found is None
        or found not in accepted
        or (found == "json" and parameters.get("charset", "utf-8").lower() != "utf-8")
    ):
        raise UnsupportedMedia("Content-Type", content_type or "", [MEDIA_TYPES[name][0] for name in accepted])
    return found


_QUALITY: Final = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def negotiate(accept: str | None, request_format: Format, offered: Sequence[Format]) -> Format:
    """The format of the reply (RFC 9110, 12.5.1): that of the request, or else the first offered, where it is as good.

    Raises NotAcceptable where `accept` allows none that is offered. A range whose q cannot be read allows nothing.
    """
    usual = request_format if request_format in offered else offered[0]
    if not accept or accept == "*/*":
        return usual
    if FORMATS.get(accept) in offered:  # one type alone, as most clients name it
        return FORMATS[accept]
    ranges: dict[str, float] = {}
    for part in _split(accept, ","):
        media, parameters = media_type(part)
        quality = parameters.get("q", "1")
        if _QUALITY.fullmatch(quality):
            ranges[media] = max(ranges.get(media, 0.0), float(quality))
    best = max((usual, *offered), key=lambda name: _quality(name, ranges))  # the first of equals
    if not _quality(best, ranges):
        raise NotAcceptable(accept, [media for name in offered for media in MEDIA_TYPES[name]])
    return best


def _quality(name: Format, ranges: dict[str, float]) -> float:
    return max(_most_specific(media, ranges) for media in MEDIA_TYPES[name])


def _most_specific(media: str, ranges: dict[str, float]) -> float:
    for candidate in (media, media.partition("/")[0] + "/*", "*/*"):
        if candidate in ranges:
            return ranges[candidate]
    return 0.0


_ENTITY_TAG: Final = re.compile(r'[ \t]*(W/)?"([!#-~\x80-\xff]*)"[ \t]*(?:,|\Z)')
_STAMP: Final = re.compile(r"(0|[1-9][0-9]{0,15})(?:-([A-Za-z0-9_-]+))?")

ConditionalHeader: TypeAlias = Literal["If-Match", "If-None-Match"]


def preconditions(value: str | None, header: ConditionalHeader = "If-Match") -> Precondition | None:
    """`*`, or a list of `"<step>-<commit>"` and `"<step>"` (RFC 9110, 13.1). Raises InvalidRequest.

    Tags that are none of ours are well-formed and match nothing; weak ones match in If-None-Match alone.
    """
    if value is None:
        return None
    if value.strip() == "*":
        return Precondition(any=True)
    stamps: list[tuple[int, str | None]] = []
    position = 0
    while position < len(value):
        tag = _ENTITY_TAG.match(value, position)
        if tag is None:
            break
        position = tag.end()
        stamp = _STAMP.fullmatch(tag[2])
        if stamp is not None and (tag[1] is None or header == "If-None-Match"):
            stamps.append((int(stamp[1]), stamp[2]))
    if position < len(value) or not value:
        raise _refused(header, 'must be "*", or tags in double quotes such as "41-9f3c2a" or "41", with commas between')
    return Precondition(any=False, stamps=tuple(stamps))


def prefer(value: str | None) -> dict[str, str]:
    """The preferences by lower-case name, "" for those without a value; of two the first counts (RFC 7240)."""
    if not value:
        return {}
    preferences: dict[str, str] = {}
    for part in _split(value, ","):
        name, _, text = next(_split(part, ";"), "").partition("=")
        preferences.setdefault(name.strip().lower(), _unquoted(text.strip()))
    return preferences


_KEY: Final = re.compile(r"[ -~]{1,255}")
_STEP: Final = re.compile(r"[0-9]{1,16}")


def idempotency_key(value: str | None) -> str | None:
    """Raises InvalidRequest for what is not 1 to 255 printable ASCII characters."""
    if value is not None and not _KEY.fullmatch(value):
        raise _refused("Idempotency-Key", "must be 1 to 255 printable ASCII characters")
    return value


def last_event_id(value: str | None) -> int | None:
    """The step that the last event seen belonged to. Raises InvalidRequest; an empty one says nothing (HTML, 9.2)."""
    if not value:
        return None
    if not _STEP.fullmatch(value):
        raise _refused("Last-Event-ID", "must be a step: the id of an event of this stream")
    return int(value)


# -- the query -------------------------------------------------------------------------------------------------


def query(text: bytes, allowed: Collection[str] = ()) -> dict[str, str]:
    """The members of a query string, decoded.

    Raises InvalidRequest, with pointers such as `/query/wait`, for names that are not `allowed` or stand twice,
    and for what is no query string in UTF-8.
    """
    try:
        pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError as error:
        raise InvalidRequest([Fault("/query", "must be name=value pairs in UTF-8, percent-encoded")]) from error
    members: dict[str, str] = {}
    faults = []
    for name, value in pairs:
        if name not in allowed:
            known = f"; there are {', '.join(sorted(allowed))}" if allowed else ""
            faults.append(Fault(pointer("/query", name[:64]), f"this call has no query member {name[:64]!r}{known}"))
        elif name in members:
            faults.append(Fault(pointer("/query", name), "this member may be given only once"))
        members[name] = value
    if faults:
        raise InvalidRequest(faults[:64])
    return members


# -- replies ---------------------------------------------------------------------------------------------------


async def send_reply(send: Send, reply: Reply, *, head: bool = False) -> None:
    """Send a reply, large ones without joining their pieces; with `head`, all but the body (RFC 9110, 9.3.2).

    The pieces are C-contiguous bytes that keep still: the transport may write them after this returns.
    """
    status, headers, pieces = reply
    length = sum(map(len, pieces))
    if status not in (204, 304):
        headers = [*headers, (b"content-length", b"%d" % length)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if head or length < SMALL:
        body = b"" if head else pieces[0] if len(pieces) == 1 else b"".join(pieces)
        await send({"type": "http.response.body", "body": body})
        return
    for batch in _batches(pieces):
        await send({"type": "http.response.body", "body": batch, "more_body": True})
    await send({"type": "http.response.body", "body": b""})  # once the others are on their way: until then it is held


def _batches(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours that are small are joined, so that ten thousand small tensors do not cost as many messages."""
    small: list[Piece] = []
    size = 0
    for piece in pieces:
        if size and size + len(piece) > SMALL:
            yield b"".join(small)
            small, size = [], 0
        if len(piece) > SMALL:
            yield piece
        else:
            small.append(piece)
            size += len(piece)
    if size:
        yield b"".join(small)
