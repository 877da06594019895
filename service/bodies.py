"""Bodies as they come: counted, held to a pace, and in one piece at the end.

A body arrives in pieces of about 64 KiB, so a long one is copied into one buffer as it comes; joining the pieces at the
end would hold it twice. A body that comes in one piece is taken as it is, and costs no timer.

What is announced is not believed before a part of it has come. NumPy asks for huge pages for its large arrays, so that
the first byte written into one takes 2 MiB: a thousand clients that announce a gigabyte and send a byte would take two.
So the buffer is made once `FIRM` bytes are there, and from then on the count goes by huge pages, as the kernel's does.
Memory that was in use before (recycling.py) takes nothing more, whoever is given it: there SMALL bytes are enough. Of
that there is no more than a quarter of what bodies may take.

The pace: a client may stand still for GRACE seconds in all, and what has come by then must have come at SLOWEST
bytes a second. It is looked at as the bytes come, not at the end: a body of a gigabyte that comes at a byte a second is
given up after GRACE seconds, not after five hours.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Final, TypeAlias

from core.layout import Array
from service.admission import ARRIVED, TICKET, Ticket
from service.errors import UnsupportedMedia
from service.intake import INTAKE, Begin, Intake
from service.problems import RequestTimeout
from service.recycling import blocks, fresh
from service.wire.errors import BodyTooLarge
from service.wire.inflate import ENCODINGS, Body, inflate

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Headers: TypeAlias = dict[bytes, bytes]

SMALL: Final = 64 << 10  # bytes up to which a body is not counted, and is inflated without a thread
GRACE: Final = 30.0  # seconds, where no ticket says otherwise
SLOWEST: Final = 64 << 10  # bytes a second
FIRM: Final = 512 << 10
HUGE: Final = 2 << 20
_LOOK: Final = 256 << 10  # bytes after which the deadline is moved, at the latest


class ClientGone(Exception):
    """The client closed the connection: nothing is to be applied for it, and nothing answered."""


async def read(scope: MutableMapping[str, Any], headers: Headers, receive: Receive, limit: int) -> Body:
    """The body without its Content-Encoding: at most `limit` bytes, as sent and as inflated.

    Raises BodyTooLarge, before anything is read where the Content-Length says so; UnsupportedMedia for a coding
    that is not known, also before; MalformedEncoding; RequestTimeout; Overloaded; ClientGone.
    """
    declared = headers.get(b"content-length")
    length = None if declared is None else int(declared)
    if length is not None and length > limit:
        raise BodyTooLarge(limit)
    coding = "identity" if b"content-encoding" not in headers else content_coding(headers[b"content-encoding"])
    arrived = scope.get(ARRIVED)
    message: Message | None = None
    if arrived is not None and arrived():
        message = await receive()
        if coding == "identity" and _is_small(message, limit):
            whole: bytes = message.get("body", b"")
            return whole
    pieces = Pieces(receive, limit, scope.get(TICKET))
    pieces.intake = scope.pop(INTAKE, None)
    body: Body = b""
    if message is not None:
        body = pieces.take(message)
    if pieces.more:
        # Held by nothing but `pieces`, which lets it go once it is copied: it may be a quarter of a megabyte.
        pieces.begun, body, message = bytes(body), b"", None
        if pieces.ticket is not None:
            pieces.ticket.arrive()
        body = await _in_time(pieces, length)
        if pieces.ticket is not None:
            pieces.ticket.arrived()
    return body if coding == "identity" else await _inflated(coding, body, pieces)


def _is_small(message: Message, limit: int) -> bool:
    """Whether it has all of a body that is not counted."""
    if message.get("more_body", False) or message["type"] != "http.request":
        return False
    return len(message.get("body", b"")) < min(SMALL, limit + 1)


class Pieces:
    """What comes of a body. `next` counts it, and moves the deadline of `timeout` on."""

    __slots__ = (
        "_claimed",
        "_due",
        "_look",
        "_receive",
        "begun",
        "grace",
        "intake",
        "limit",
        "more",
        "size",
        "ticket",
        "timeout",
    )

    def __init__(self, receive: Receive, limit: int, ticket: Ticket | None) -> None:
        self._receive = receive
        self._claimed = 0
        self.begun = b""
        self.intake: Begin | None = None
        self.limit = limit
        self.ticket = ticket
        self.grace = GRACE if ticket is None else ticket.stall_seconds
        self._look = min(_LOOK, int(self.grace * SLOWEST / 4) + 1)
        self._due = self._look
        self.timeout: asyncio.Timeout | None = None
        self.size = 0
        self.more = True

    async def next(self) -> bytes:
        return self.take(await self._receive())

    def take(self, message: Message) -> bytes:
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        self.more = message.get("more_body", False)
        self.size += len(piece)
        if self.size > self.limit:
            raise BodyTooLarge(self.limit)
        if self.size > self._claimed and (self.more or self.size >= SMALL):
            self._claim(self.size)
        if self.size >= self._due and self.timeout is not None:
            self._move_on(self.timeout)
        return piece

    def came(self, length: int, size: int) -> int:
        """`size` bytes more of a body of `length`, past the messages: see intake.Came."""
        self.size += size
        if self.size >= self._due and self.timeout is not None:
            self._move_on(self.timeout)
        if length > self.size >= self._claimed:
            self._claim(self.size + 1)
        return min(length, self._claimed) - self.size

    def _claim(self, size: int) -> None:
        """Raises Overloaded."""
        if size > FIRM:
            size = min(-(-size // HUGE) * HUGE, max(self.limit, size))
        if self.ticket is not None:
            self.ticket.claim(size - self._claimed)
        self._claimed = size

    def claim_all(self, length: int) -> bool:
        """Whether there is room for all of a body that is announced, which is counted then."""
        if self.ticket is not None and not self.ticket.claimed(max(0, length - self._claimed)):
            return False
        self._claimed = max(length, self._claimed)
        return True

    def _move_on(self, timeout: asyncio.Timeout) -> None:
        begun = timeout.when()
        if begun is not None and not timeout.expired():
            gained = self.size - self._due + self._look
            timeout.reschedule(begun + gained / SLOWEST)
        self._due = self.size + self._look


async def _in_time(pieces: Pieces, length: int | None) -> Body:
    """The body, of which `pieces.begun` is there. Raises RequestTimeout where it comes too slowly."""
    try:
        async with asyncio.timeout(pieces.grace) as timeout:
            pieces.timeout = timeout
            if not pieces.size:
                pieces.begun = await pieces.next()
                if not pieces.more:
                    return pieces.begun
            return await (_grow(pieces) if length is None else _fill(length, pieces))
    except TimeoutError:
        raise RequestTimeout(f"the body came at less than {SLOWEST} bytes/s") from None


async def _fill(length: int, pieces: Pieces) -> Body:
    """A body whose length is known, in one buffer of that size, which is not cleared before it is overwritten."""
    first: bytes | bytearray = pieces.begun
    pieces.begun = b""
    room = _again(length, pieces)
    if length > FIRM and room is None:
        first = bytearray(first)
        while pieces.more and pieces.size < FIRM and room is None:
            first += await pieces.next()
            room = _again(length, pieces)
    if room is None:
        room = fresh(length)
    view = room.data
    end = len(first)
    view[:end] = first
    del first
    if pieces.more and pieces.intake is not None:
        intake = pieces.intake(view[end:], partial(pieces.came, length))
        if intake is not None:
            await _take_in(pieces, intake)
            end = length
    while pieces.more:
        piece = await pieces.next()
        begin, end = end, end + len(piece)
        view[begin:end] = piece
    blocks.keep(room)
    return view[:end]


async def _take_in(pieces: Pieces, intake: Intake) -> None:
    """The rest of the body, which is read past the messages: what they say is how far it is, and that it goes on."""
    try:
        while pieces.more:
            await pieces.next()
            if intake.fault is not None:
                raise intake.fault
    finally:
        intake.end()


def _again(length: int, pieces: Pieces) -> Array | None:
    """What was in use before takes all of its memory from now on, whatever comes: it is counted now, or not taken."""
    again = blocks.again(length) if pieces.size >= SMALL else None
    return again if again is not None and pieces.claim_all(length) else None


async def _grow(pieces: Pieces) -> bytearray:
    body = bytearray(pieces.begun)
    pieces.begun = b""
    while pieces.more:
        body += await pieces.next()
    return body


# -- codings -----------------------------------------------------------------------------------------------------------


def content_coding(value: bytes) -> str:
    """One of wire.inflate.ENCODINGS. Raises UnsupportedMedia for any other, and for several at once."""
    coding = value.decode("latin-1").strip().lower() or "identity"
    if coding == "x-gzip":  # RFC 9110, 8.4.1.3
        coding = "gzip"
    if coding not in ENCODINGS:
        raise UnsupportedMedia("Content-Encoding", coding, sorted(ENCODINGS))
    return coding


async def _inflated(coding: str, body: Body, pieces: Pieces) -> Body:
    claim = None if pieces.ticket is None else pieces.ticket.claim
    if len(body) < SMALL:
        return inflate(coding, body, pieces.limit, claim)
    return await asyncio.to_thread(inflate, coding, body, pieces.limit, claim)
