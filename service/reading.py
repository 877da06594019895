"""Values out of the store, as tensors: what is checked before anybody uses them, and where their bytes are put.

The tensors of a large file lie in arrays by what is behind the colon of their names: all that are called `w:m`, `b:m`,
… in one, all without a colon in another. They follow one another in the file, so that these arrays are the slots of a
session, which need not be copied then (`core.state`). Arrays that go soon are taken from `recycling`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from redis.asyncio.connection import Connection

from core.layout import Array
from service.bulk import Refused, Room, receive
from service.errors import Corrupt
from service.link import HEAVY, Argument
from service.records import (
    CutMeanwhile,
    Head,
    Known,
    LogEntry,
    Looked,
    Stored,
    Tail,
    again,
    assemble,
    checked,
    head_of,
    parent_mark,
    parse,
    payload_of,
)
from service.recycling import blocks
from service.wire import safetensors
from service.wire.errors import WireError

# A connection of its own, which a value of so many bytes is worth.
BULK = 4 << 20
# What is read in the usual way is read in so many chunks at once.
TOGETHER = 8

Tensors = tuple[dict[str, Array], dict[str, str]]


class Reader:
    """Sessions as the store has them. `key` names a key, `load(keys, arguments)` is the reply of load.lua."""

    def __init__(self, key: Callable[..., str], load: Callable[..., Awaitable[Any]], values: "Values") -> None:
        self._key = key
        self._load = load
        self._values = values

    async def tail(self, session: str, after: int, known: Known | None) -> Tail | None:
        """As Store.tail."""
        missed = ""
        while True:
            looked = await self.look(session, after, known)
            if looked is None or looked.elements is None:
                return None if looked is None else Tail(looked.head, None, looked.on_line)
            try:
                return Tail(looked.head, await self.entries(session, looked.elements), looked.on_line)
            except CutMeanwhile as missing:
                missed = again(missing, looked.head, missed)

    async def load(self, session: str) -> Stored | None:
        """As Store.load."""
        missed = ""
        while True:
            looked = await self.look(session, -1)
            if looked is None or looked.elements is None:
                return None
            try:
                tensors, metadata = await self.snapshot(session, looked.head)
                entries = await self.entries(session, looked.elements)
            except CutMeanwhile as missing:
                missed = again(missing, looked.head, missed)
            else:
                return Stored(looked.head, metadata, tensors, entries)

    async def look(self, session: str, after: int, known: Known | None = None) -> Looked | None:
        """As `tail`, with nothing read that is not in the log itself.

        What `snapshot` and `entries` then read of it may be gone by then: all is to be looked at anew.
        """
        keys = [self._key(session, part) for part in ("head", "log", "trail")]
        place: list[Argument] = ["", "", ""] if known is None else [known.seq, known.commit, parent_mark(known.commit)]
        reply = await self._load(keys, [after, *place], alone=after >= -1)
        head = head_of(reply[0]) if reply else None
        if head is None:
            return None
        return Looked(head, reply[2] if len(reply) > 2 else None, reply[1] == b"on")

    async def snapshot(self, session: str, head: Head) -> Tensors:
        """The snapshot that `head` names. Raises CutMeanwhile, Corrupt."""
        names = [self._key(session, "s", head.snap, i) for i in range(head.chunks)]
        return await self._values.tensors(names, head.length, head.checksum)

    async def entries(self, session: str, elements: Sequence[bytes]) -> list[LogEntry]:
        """The entries of the log, as they lay there. Raises CutMeanwhile, Corrupt."""
        return [await self._entry(session, element) for element in elements]

    async def _entry(self, session: str, element: bytes) -> LogEntry:
        tensors, metadata = parse(element)
        payload = payload_of(metadata)
        if payload is None:
            return LogEntry(metadata, tensors, len(element), 0)
        count, length, checksum = payload
        names = [self._key(session, "p", metadata["commit"], i) for i in range(count)]
        tensors, _ = await self._values.tensors(names, length, checksum, passing=True)
        return LogEntry(metadata, tensors, len(element) + length, count)


class Values:
    """`get(name)` is the reply to GET, `dial(name)` a connection to where that is; `patiently` does again what failed
    because the store was away.
    """

    def __init__(
        self,
        get: Callable[..., Awaitable[Any]],
        dial: Callable[[str], Awaitable[Connection]],
        patiently: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
    ) -> None:
        self._get = get
        self._dial = dial
        self._patiently = patiently

    async def tensors(self, names: Sequence[str], length: int, checksum: str, *, passing: bool = False) -> Tensors:
        """The file of `length` bytes that lies in the chunks `names`: tensors and text. `passing`: they go soon.

        Raises CutMeanwhile where a chunk is not there, Corrupt, StoreUnavailable.
        """
        if length >= BULK and len(names) > 1:
            first = await self._chunk(names[0], length)
            if len(first) >= 8 and int.from_bytes(first[:8], "little") + 8 <= len(first) <= length:
                return await self._large(names, first, length, checksum, passing=passing)
        replies = await asyncio.gather(*[self._chunk(name, length) for name in names])
        if length < BULK:
            return parse(assemble(replies, length, checksum, names[0]))
        return parse(await asyncio.to_thread(assemble, replies, length, checksum, names[0]))

    async def _chunk(self, name: str, length: int) -> bytes:
        reply: bytes | None = await self._get("GET", name, alone=length > HEAVY)
        if reply is None:
            raise CutMeanwhile(name)
        return reply

    async def _large(self, names: Sequence[str], first: bytes, length: int, checksum: str, *, passing: bool) -> Tensors:
        try:
            form = safetensors.described(first, length, bounded=False, dtypes=safetensors.STEP_DTYPES)
            buffers, tensors = _placed(form, passing=passing)
        except WireError as error:
            raise Corrupt(f"a stored value is not what was put there: {error}") from None
        come = memoryview(first)[form.start :]
        await self._patiently(lambda: self._fill(names[1:], come, buffers, length))
        await asyncio.to_thread(
            checked, [first[: form.start], *[buffer.data for buffer in buffers]], checksum, names[0]
        )
        return tensors, form.metadata

    async def _fill(self, names: Sequence[str], first: memoryview, buffers: Sequence[Array], length: int) -> None:
        """`first`, which has come already, and the chunks `names`."""
        try:
            room = Room(buffers)
            room.write(first)
            await receive(await self._dial(names[0]), names, room)
            full = not room.left
        except Refused:  # another node has it by now, say
            full = False
        if not full:
            room = Room(buffers)
            room.write(first)
            await self._usual(names, length, room)

    async def _usual(self, names: Sequence[str], length: int, room: Room) -> None:
        for start in range(0, len(names), TOGETHER):
            replies = await asyncio.gather(*[self._chunk(name, length) for name in names[start : start + TOGETHER]])
            for reply in replies:
                if len(reply) > room.left:
                    raise Corrupt(f"{names[0]}: the chunks have more than {length} bytes together")
                room.write(reply)
        if room.left:
            raise Corrupt(f"{names[0]}: the chunks have not {length} bytes together")


def _placed(form: safetensors.Form, *, passing: bool) -> tuple[list[Array], dict[str, Array]]:
    """Empty arrays for all bytes behind the header, in their order, and the tensors as views of these."""
    buffers: list[Array] = []
    tensors: dict[str, Array] = {}
    for _, following in groupby(form.tensors, key=_slot):
        run = list(following)
        begin, end = run[0][0], run[-1][1]
        buffers.append(blocks.empty(end - begin, np.uint8) if passing else np.empty(end - begin, np.uint8))
        tensors |= {tensor[2]: safetensors.array_of(tensor, buffers[-1], begin) for tensor in run}
    return buffers, tensors


def _slot(tensor: safetensors.Placed) -> str:
    return tensor[2].partition(":")[2]
