"""Content codings (RFC 9110, 8.4) undone within a limit.

A gzip bomb grows 1028 times, a zstd bomb 32,768 times (four bytes make a block of 128 KiB), so the output is
bounded before it is made, not measured after: zlib is asked for at most `CHUNK` bytes at a time, and zstd,
whose Python binding has no such bound, is fed 256 bytes at a time, which make at most 8 MiB (and cost 35 ms for
10 MB of floats, against 10 for unbounded inflation in one call). The result is a bytearray, which may hold an eighth
more than its length.

A body may hold several gzip members (RFC 1952, 2.2) or zstd frames (RFC 8878, 3), skippable ones too. They
are capped, because each costs a decompressor: a body of empty members would keep a core busy for minutes.
zstd windows over 8 MiB are refused, as RFC 9659 demands for this coding.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import zstandard

from service.wire.errors import BodyTooLarge, MalformedEncoding

if TYPE_CHECKING:
    from collections.abc import Callable

Body = bytes | bytearray | memoryview

ENCODINGS: Final = ("gzip", "zstd", "identity")
CHUNK: Final = 1 << 20
MAX_MEMBERS: Final = 10_000

_GZIP_INPUT: Final = 1 << 16  # zlib copies what it has not consumed on every call
_GZIP_WINDOW: Final = 31  # 15 bits, and a gzip header and trailer instead of zlib's
_ZSTD_INPUT: Final = 1 << 8
_ZSTD_WINDOW: Final = 8 << 20


def inflate(encoding: str, body: Body, limit: int, claim: Callable[[int], None] | None = None) -> Body:
    """Return `body` without its content coding, which is one of `ENCODINGS` in lower case.

    With `identity` this is `body` itself. `claim` is told how much the result grew by, in bytes, before it does, and
    may end it by whatever it raises. Raises BodyTooLarge when the result would have more than `limit`
    bytes, MalformedEncoding when the data is corrupt, cut short or followed by something else, and LookupError
    for any other `encoding`.
    """
    if encoding == "identity":
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body
    if encoding == "gzip":
        return _members(_gzip_member, memoryview(body), _Grown(limit, claim))
    if encoding == "zstd":
        return _members(_zstd_frame, memoryview(body), _Grown(limit, claim))
    raise LookupError(f"no content coding {encoding!r}")


def _members(member: Callable[[memoryview, _Grown], int], body: memoryview, out: _Grown) -> bytearray:
    for _ in range(MAX_MEMBERS):
        body = body[member(body, out) :]
        if not body:
            out.tell()
            return out.body
    raise MalformedEncoding(f"the compressed body has more than {MAX_MEMBERS} members")


class _Grown:
    """The result so far. `claim` is told of every CHUNK, not of each of the many small pieces that zstd gives."""

    __slots__ = ("_claim", "_limit", "_told", "body")

    def __init__(self, limit: int, claim: Callable[[int], None] | None) -> None:
        self._limit = limit
        self._claim = claim
        self._told = 0
        self.body = bytearray()

    def append(self, piece: bytes) -> None:
        size = len(self.body) + len(piece)
        if size > self._limit:
            raise BodyTooLarge(self._limit)
        if size - self._told >= CHUNK:
            self.tell(size)
        self.body += piece

    def tell(self, size: int | None = None) -> None:
        size = len(self.body) if size is None else size
        if self._claim is not None:
            self._claim(size - self._told)
        self._told = size


def _gzip_member(body: memoryview, out: _Grown) -> int:
    """Inflate the member at the start of `body` onto `out`; return its length."""
    inflater = zlib.decompressobj(_GZIP_WINDOW)
    fed = 0
    while not inflater.eof:
        data: bytes | memoryview = inflater.unconsumed_tail
        if not data:
            data = body[fed : fed + _GZIP_INPUT]
            fed += len(data)
        try:
            piece = inflater.decompress(data, CHUNK)
        except zlib.error as error:
            raise MalformedEncoding(f"the gzip data is corrupt: {error}") from error
        # Input may be used up while output still waits inside zlib: only both missing means the end.
        if not piece and not data and not inflater.eof:
            raise MalformedEncoding("the gzip data is cut short")
        out.append(piece)
    return fed - len(inflater.unused_data)


def _zstd_frame(body: memoryview, out: _Grown) -> int:
    """Inflate the frame at the start of `body` onto `out`; return its length."""
    inflater = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    fed = 0
    while not inflater.eof:
        data = body[fed : fed + _ZSTD_INPUT]
        if not data:
            raise MalformedEncoding("the zstd data is cut short")
        fed += len(data)
        try:
            piece = inflater.decompress(data)
        except zstandard.ZstdError as error:
            raise MalformedEncoding(f"the zstd data is corrupt: {error}") from error
        out.append(piece)
    return fed - len(inflater.unused_data)
