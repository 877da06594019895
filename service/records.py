"""The values that lie in the store, and their form: every one is a safetensors file.

An entry of the log is a file of its tensors with the rest as text in `__metadata__`; a large one says in
`payload` how many chunks of its own hold the tensors' file. Nothing read back is trusted: length, checksum and form
are checked, and Corrupt is raised where they do not hold.

What is stored has a format: the head says so in `format`, an entry in `format` of its text, and both are silent where
it is the first. A release that comes to write another one gives the session a new commit with it, so that every service
that has it in memory looks; one that does not know the format refuses the session, whatever it is asked for.
"""

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from core.layout import Array
from service.documents import Stamp, now
from service.errors import Corrupt, Place, StateLost, UnknownFormat
from service.index import DEFAULT_TENANT
from service.link import Argument
from service.wire import safetensors
from service.wire.errors import WireError

FORMAT = "1"
# Before the commit of a head that is lost: no memory stands there.
LOST = "lost:"
INLINE = 64 * 1024
# The store writes one chunk to its log while the next is sent, and finds memory for it where the last one was. 40 MB in
# 40 chunks took three quarters of the time that they took in ten; smaller chunks gained nothing more.
CHUNK = 1024 * 1024
# What names a payload has no tensors, and a key and a worker's name at most: it is no longer than this.
_REFERENCE = 4096

Pieces = Sequence[bytes | memoryview]


@dataclass(slots=True)
class LogItem:
    """An entry to append: its commit, text, tensors, and what it does to head and history."""

    commit: str
    metadata: dict[str, str]
    tensors: Mapping[str, Array]
    head: dict[str, str | int | bytes] = field(default_factory=dict)
    record: bytes | None = None
    round: "Received | None" = None  # of a contribution to an open round: nothing that a client can see changes
    size: int = 0
    staged: "Staged | None" = None
    epoch: int = 0  # the session's, when the batch that ends with this was appended


class Received(NamedTuple):
    """How far a round is: `received` of `needed` contributions."""

    round: int
    received: int
    needed: int


class Staged(NamedTuple):
    """Chunks that lie in the store under temporary names."""

    token: str
    chunks: int
    length: int
    checksum: str


class LogEntry(NamedTuple):
    """An entry as it was read back. `chunks` is how many payload chunks it has, `size` its bytes in all."""

    metadata: dict[str, str]
    tensors: dict[str, Array]
    size: int
    chunks: int


class Known(NamedTuple):
    """Where a service saw a session stand, after entry `seq`; `step` and `mark` are what clients were told."""

    seq: int
    commit: str
    epoch: int
    step: int
    mark: str

    @property
    def text(self) -> str:
        """For `read`: a third of the memory."""
        place = f"{self.seq} {self.commit} {self.epoch} {self.step}"
        return place if self.mark == self.commit else f"{place} {self.mark}"

    @classmethod
    def read(cls, text: str) -> "Known":
        seq, commit, epoch, step, *mark = text.split(" ")
        return cls(int(seq), commit, int(epoch), int(step), mark[0] if mark else commit)


class Lost(NamedTuple):
    """Where a session was known to stand, by a service that then found it elsewhere; `at` is RFC 3339. `text` is what
    the head says of it, `told` the commits at which all services saw it that told of it so far.
    """

    seq: int
    step: int
    mark: str
    at: str
    text: bytes
    told: bytes


@dataclass(slots=True)
class Head:
    """Where a session stands in the store. `mark` is the last commit that changed what a client can see.

    `lost`: the store went back, and nobody has accepted it yet. `epoch` is how often somebody has, `given` at which
    commits services had seen it stand that were given up with it; None: it was accepted without saying so.
    """

    commit: str
    mark: str
    step: int
    seq: int
    base: int
    snap: str
    chunks: int
    length: int
    checksum: str
    document: bytes
    held: bool
    updated_at: str
    skipped: int
    tenant: str = DEFAULT_TENANT
    lost: Lost | None = None
    epoch: int = 0
    given: bytes | None = None

    @property
    def known(self) -> Known:
        return Known(self.seq, self.commit, self.epoch, self.step, self.mark)

    def gave_up(self, known: Known) -> bool:
        """Whether somebody accepted that the session does not stand there any more."""
        if self.epoch <= known.epoch:
            return False
        return self.lost is None if self.given is None else known.commit.encode() in self.given


class Tail(NamedTuple):
    """A head, and the entries after the one asked for; None where the log has been cut since. `on_line`: whether the
    place that was asked about is a part of the session's past, as far back as the store knows it.
    """

    head: Head
    entries: list[LogEntry] | None
    on_line: bool


class Looked(NamedTuple):
    """As Tail, with the elements of the log as they lie there: an entry each, or where the rest of it is."""

    head: Head
    elements: list[bytes] | None
    on_line: bool


class Stored(NamedTuple):
    """All of a session: the snapshot's file and the entries since."""

    head: Head
    metadata: dict[str, str]
    tensors: dict[str, Array]
    entries: list[LogEntry]
    on_line: bool = True


def flatten(fields: Mapping[str, Argument]) -> list[Argument]:
    return [part for pair in fields.items() for part in pair]


def element_of(item: LogItem) -> bytes:
    """The list element of an entry: its file, or a file that says where its payload is."""
    if item.staged is not None:
        reference = {"payload": f"{item.staged.chunks} {item.staged.length} {item.staged.checksum}"}
        return b"".join(safetensors.write({}, item.metadata | reference))
    element = b"".join(safetensors.write(item.tensors, item.metadata))
    item.size = len(element)
    return element


def payload_of(metadata: Mapping[str, str]) -> tuple[int, int, str] | None:
    """Chunks, bytes and checksum of the payload that an element of the log names; None: it has none. Raises Corrupt."""
    text = metadata.get("payload")
    if text is None:
        return None
    try:
        count, length, checksum = text.split(" ")
        return int(count), int(length), checksum
    except ValueError:
        raise Corrupt(f"an entry of the log names the payload {text!r}") from None


def weight_of(element: bytes) -> int:
    """Bytes of the entry that an element of the log is or names. Raises Corrupt."""
    if len(element) > _REFERENCE or b'"payload"' not in element:  # thousands may be looked at
        return len(element)
    payload = payload_of(parse(element)[1])
    return len(element) + (0 if payload is None else payload[1])


def commit_mark(commit: str) -> str:
    """What the element of the entry `commit`, and of no other, has in its text."""
    return orjson.dumps({"commit": commit})[1:-1].decode()


def parent_mark(commit: str) -> str:
    """What the element of the entry that follows `commit`, and of no other, has in its text."""
    return orjson.dumps({"parent": commit})[1:-1].decode()


def lost_text(known: Known, found: Head) -> bytes:
    """What the head of a lost session says: where it was known to stand, and where it was found."""
    stands = {"step": found.step, "commit": found.mark, "seq": found.seq}
    return orjson.dumps({"step": known.step, "commit": known.mark, "seq": known.seq, "at": now(), "found": stands})


def state_lost(session: str, found: Head, known: Known | Lost | None = None) -> StateLost:
    """The refusal of a session that was found at `found`: seen at `known`, else where the head itself says."""
    seen = known or found.lost or found.known
    places = [Place(step, Stamp(step, mark).etag) for step, mark in ((seen.step, seen.mark), (found.step, found.mark))]
    return StateLost(session, *places)


class CutMeanwhile(Exception):
    """Chunks went away between two reads, because somebody put a new snapshot there."""


def again(missing: CutMeanwhile, head: Head, missed: str) -> str:
    """The snapshot that chunks are missing of. Raises Corrupt where they were missing of the same one before."""
    if head.snap == missed:
        raise Corrupt(f"{missing} is not in the store any more")
    return head.snap


def message_of(items: Sequence[LogItem], step: int, last: str) -> str:
    """What those hear who wait for the session."""
    got = items[-1].round
    return f"step {step} {last}" if got is None else f"round {got.round} {got.received} {got.needed}"


def chunks_of(pieces: Pieces) -> Iterable[bytes | memoryview]:
    """The same bytes in pieces of at most CHUNK, small ones joined, large ones as views."""
    small: list[bytes | memoryview] = []
    gathered = 0
    for piece in pieces:
        if gathered + len(piece) <= INLINE:
            small.append(piece)
            gathered += len(piece)
            continue
        if small:
            yield b"".join(small)
        small, gathered = [], 0
        if len(piece) <= INLINE:
            small, gathered = [piece], len(piece)
            continue
        view = memoryview(piece)
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]
    if small:
        yield b"".join(small)


def parse(data: bytes | memoryview) -> tuple[dict[str, Array], dict[str, str]]:
    """Raises Corrupt. A snapshot has several tensors for each of a session's, and thousands of keys in its text."""
    try:
        return safetensors.read(data, bounded=False, dtypes=safetensors.STEP_DTYPES)
    except WireError as error:
        raise Corrupt(f"a stored value is not what was put there: {error}") from None


def head_of(reply: Any) -> Head | None:
    if not reply:
        return None
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    fields = {name.decode(errors="replace"): value for name, value in pairs}
    if fields.get("format", FORMAT.encode()) != FORMAT.encode():
        raise UnknownFormat("the session", fields["format"].decode(errors="replace"), [FORMAT])
    try:
        return Head(
            commit=fields["commit"].decode(),
            mark=fields.get("mark", fields["commit"]).decode().removeprefix(LOST),
            step=int(fields["step"]),
            seq=int(fields["seq"]),
            base=int(fields["base"]),
            snap=fields["snap"].decode(),
            chunks=int(fields["chunks"]),
            length=int(fields["length"]),
            checksum=fields["checksum"].decode(),
            document=fields["document"],
            held=fields["held"] == b"1",
            updated_at=fields["time"].decode(),
            skipped=int(fields["skipped"]),
            tenant=fields.get("tenant", DEFAULT_TENANT.encode()).decode(),
            lost=_lost(fields["lost"], fields.get("told", b"")) if "lost" in fields else None,
            epoch=count_of(fields.get("epoch", b"0")),
            given=fields.get("given") if fields.get("given_epoch") == fields.get("epoch") else None,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"the head of a session is not what was put there: {error}") from None


def count_of(text: bytes) -> int:
    """Raises Corrupt, also for what Python takes for a number and the store's scripts do not."""
    if not text.isdigit():
        raise Corrupt(f"the head of a session is not what was put there: {text[:20]!r} is no number")
    return int(text)


async def readable(reading: Awaitable[Any]) -> Head | UnknownFormat | Corrupt | None:
    """The head that is being read, or why it cannot be."""
    try:
        return head_of(await reading)
    except (UnknownFormat, Corrupt) as fault:
        return fault


def _lost(text: bytes, told: bytes) -> Lost:
    """Raises KeyError, ValueError, TypeError."""
    said = orjson.loads(text)
    seq, step, mark, at = (said[name] for name in ("seq", "step", "commit", "at"))
    if not (type(seq) is type(step) is int and type(mark) is type(at) is str):
        raise ValueError("what it says of what was lost is of other types")
    return Lost(seq, step, mark, at, text, told)


def assemble(replies: Sequence[bytes], length: int, checksum: str, name: str) -> bytes | memoryview:
    """The chunks as one buffer. Raises Corrupt."""
    if sum(map(len, replies)) != length:
        raise Corrupt(f"{name}: the chunks have not {length} bytes together")
    data: bytes | memoryview = replies[0]
    if len(replies) > 1:
        joined = np.empty(length, np.uint8).data
        at = 0
        for reply in replies:
            joined[at : at + len(reply)] = reply
            at += len(reply)
        data = joined
    checked([data], checksum, name)
    return data


def checked(pieces: Iterable[bytes | memoryview], checksum: str, name: str) -> None:
    """Raises Corrupt where the bytes of `pieces`, one after the other, are not those that were put there."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    if digest.hexdigest() != checksum:
        raise Corrupt(f"{name}: the checksum does not agree")
