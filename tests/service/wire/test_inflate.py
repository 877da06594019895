"""Content codings undone, with the library's own compressors as the source and the limit held in memory."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard

from service.wire.errors import BodyTooLarge, MalformedEncoding
from service.wire.inflate import ENCODINGS, MAX_MEMBERS, inflate

MIB = 1 << 20
NOISE = np.random.default_rng(3).bytes(3 * MIB)
TEXT = b"0.125, " * 400_000
BODIES = {"empty": b"", "byte": b"x", "text": TEXT, "noise": NOISE, "mixed": TEXT + NOISE + TEXT}


def zstd(body: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(body)


def zstd_stream(body: bytes) -> bytes:
    """A frame that does not tell its content's size, as streams have."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(body) + compressor.flush()


COMPRESSORS = {
    "gzip": ("gzip", gzip.compress),
    "zstd": ("zstd", zstd),
    "zstd stream": ("zstd", zstd_stream),
    "zstd with checksum": ("zstd", lambda body: zstd(body, write_checksum=True)),
    "identity": ("identity", lambda body: body),
}


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bodies_come_back(kind: str, name: str, wrap: type) -> None:
    encoding, compress = COMPRESSORS[kind]
    body = BODIES[name]
    compressed = wrap(compress(body))
    assert inflate(encoding, compressed, len(body)) == body
    if body:
        with pytest.raises(BodyTooLarge) as caught:
            inflate(encoding, compressed, len(body) - 1)
        assert caught.value.limit == len(body) - 1


@pytest.mark.parametrize("kind", ["gzip", "zstd", "zstd stream"])
def test_several_members_are_one_body(kind: str) -> None:
    encoding, compress = COMPRESSORS[kind]
    parts = [b"a", b"", TEXT, b"b", NOISE, b""]
    assert inflate(encoding, b"".join(map(compress, parts)), 10 * MIB) == b"".join(parts)


def test_skippable_zstd_frames_are_skipped() -> None:
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    assert inflate("zstd", skippable + zstd(b"a") + skippable + zstd(b"b") + skippable, 10) == b"ab"


@pytest.mark.parametrize("kind", ["gzip", "zstd", "zstd stream", "zstd with checksum"])
def test_what_is_cut_short_anywhere_is_refused(kind: str) -> None:
    encoding, compress = COMPRESSORS[kind]
    compressed = compress(b"a" * 50 + NOISE[:50])
    assert inflate(encoding, compressed, MIB) == b"a" * 50 + NOISE[:50]
    for length in range(len(compressed)):
        with pytest.raises(MalformedEncoding):
            inflate(encoding, compressed[:length], MIB)
    for length in range(1, len(compressed)):
        with pytest.raises(MalformedEncoding):
            inflate(encoding, compressed + compressed[:length], MIB)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "zstd stream"])
@pytest.mark.parametrize("size", [10, 3 * MIB])
@pytest.mark.parametrize("garbage", [b"x", bytes(1), bytes(100), b"\x1f\x8b", b"{}" * 50_000])
def test_what_follows_the_data_is_refused(kind: str, size: int, garbage: bytes) -> None:
    encoding, compress = COMPRESSORS[kind]
    with pytest.raises(MalformedEncoding):
        inflate(encoding, compress(NOISE[:size]) + garbage, 10 * MIB)


@pytest.mark.parametrize("kind", ["gzip", "zstd with checksum"])
def test_a_changed_byte_is_refused_or_changes_nothing(kind: str) -> None:
    encoding, compress = COMPRESSORS[kind]
    body = b"a" * 50 + NOISE[:50]
    compressed = compress(body)
    refused = 0
    for position in range(len(compressed)):
        damaged = bytearray(compressed)
        damaged[position] ^= 0x10
        try:
            assert inflate(encoding, damaged, MIB) == body, position
        except (MalformedEncoding, BodyTooLarge):
            refused += 1
    assert refused > len(compressed) * 0.9


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_one_coding_is_not_taken_for_another(encoding: str) -> None:
    for other in (zlib.compress(b"abc"), b'{"w": 1}', gzip.compress(b"abc"), zstd(b"abc")):
        if other[:1] != {"gzip": b"\x1f", "zstd": b"\x28"}[encoding]:
            with pytest.raises(MalformedEncoding, match=f"the {encoding} data is corrupt"):
                inflate(encoding, other, MIB)


def zstd_bomb(blocks: int) -> bytes:
    """Run-length blocks (RFC 8878, 3.1.1.2): 128 KiB each from four bytes, in a frame with a window of 1 MiB."""
    frame = bytes.fromhex("28b52ffd") + bytes([0b0000_0000, 10 << 3])
    for block in range(blocks):
        frame += ((128 << 10) << 3 | 1 << 1 | (block == blocks - 1)).to_bytes(3, "little") + b"z"
    return frame


BOMBS = {
    "gzip": ("gzip", gzip.compress(bytes(256 * MIB), 1)),
    "gzip, two members": ("gzip", gzip.compress(bytes(3 * MIB)) + gzip.compress(bytes(256 * MIB), 1)),
    "zstd": ("zstd", zstd_bomb(20_000)),
    "zstd, two frames": ("zstd", zstd_bomb(24) + zstd_bomb(20_000)),
}


def test_the_zstd_bomb_is_a_good_frame() -> None:
    assert inflate("zstd", zstd_bomb(8), MIB) == b"z" * MIB


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_no_memory(kind: str) -> None:
    encoding, bomb = BOMBS[kind]
    limit = 4 * MIB
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            inflate(encoding, bomb, limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit + 20 * MIB  # the bombs hold 256 MiB and more


def test_a_window_over_8_mib_is_refused() -> None:
    def frame(window: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(b"abc") + compressor.flush()

    assert inflate("zstd", frame(23), 10) == b"abc"
    with pytest.raises(MalformedEncoding, match="too much memory"):
        inflate("zstd", frame(24), 10)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_the_number_of_members_is_capped(kind: str) -> None:
    encoding, compress = COMPRESSORS[kind]
    empty = compress(b"")
    assert inflate(encoding, empty * MAX_MEMBERS, 0) == b""
    with pytest.raises(MalformedEncoding, match="more than 10000 members"):
        inflate(encoding, empty * (MAX_MEMBERS + 1), 0)


def test_other_codings_are_not_known() -> None:
    assert ENCODINGS == ("gzip", "zstd", "identity")
    with pytest.raises(LookupError, match="'br'"):
        inflate("br", b"", 10)
