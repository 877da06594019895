"""A session in memory: the core's session, what is remembered of its steps, and both as files.

What the store has is a snapshot and entries; what this module does with them is deterministic, so that every replica
that applies the same entries holds the same bits, the memory of idempotency keys included.
"""

import asyncio
import re
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson

from core.contributions import Closing, Contribution, Entry, NewParams, NewRecipe, Pull, Reduced
from core.errors import CoreError, InvalidState
from core.evaluate import Evaluator
from core.layout import Array
from core.recipe import Recipe
from core.session import Outcome, Session
from core.state import State, state_of, tensors_of, workers_of
from service import tensors as forms
from service.documents import Document, Point, Stamp
from service.errors import Corrupt, Fault, InvalidRequest, Superseded, UnknownFormat
from service.ids import new_commit
from service.records import FORMAT as STORED
from service.records import Head, LogEntry, Pieces
from service.wire import safetensors
from service.wire.json import MAX_INTEGER

FORMAT = "1"
# The kinds of entries that there are in a log.
KINDS = ("step", "close", "pull", "params", "document")
# Work on so many elements, or bytes of a body, is done in a thread; on fewer, the hand-over would cost more than it
# spares. Parameters of so many elements are never changed in place, so that they can be sent without a copy.
THREADED = 65_536
_STEP = re.compile(r"[0-9]{1,16}")
# How many idempotency keys a session remembers.
WINDOW = 4096
# What a session costs beside its arrays, in bytes: objects, names, buffers; measured with 10 parameters.
OVERHEAD = 10 * 1024
KEY_COST = 400
WORKER_COST = 400
# Whose updates are kept of a round: everybody's.
ROUND = ":round"
# How many values of schedules are computed for one request.
MOST_VALUES = 250_000

# From JSON, and to as much of it as the former needs.
DocumentReader = Callable[[Mapping[str, Any]], Document]
DocumentWriter = Callable[[Document], dict[str, Any]]


class Done(NamedTuple):
    """What is remembered of a step that had an Idempotency-Key, or of a contribution to the round `step` that was its
    number `position`; lr and grad_norm are then those of the round, which nobody knew.
    """

    digest: str
    step: int
    commit: str
    worker: str
    lr: float
    grad_norm: float
    position: int = 0


class Closed(NamedTuple):
    """The last round that was closed: what its workers are told of it."""

    step: int
    lr: float
    grad_norm: float


class Kept(NamedTuple):
    """The updates (n,) of a worker's last step with a key, for the case that it asks again."""

    step: int
    updates: Array


class Logged(NamedTuple):
    """An entry of the log that the snapshot does not hold yet."""

    commit: str
    chunks: int
    size: int


@dataclass(slots=True)
class Live:
    """`head` is the commit that memory stands at; it is never ahead of the store."""

    id: str
    session: Session
    document: Document
    head: Head
    done: "OrderedDict[str, Done]" = field(default_factory=OrderedDict)
    kept: dict[str, Kept] = field(default_factory=dict)
    log: list[Logged] = field(default_factory=list)
    log_bytes: int = 0
    unwritten: int = 0  # what they were when a snapshot failed
    unwritten_entries: int = 0  # and how many entries they were
    queue: deque[Any] = field(default_factory=deque)
    taken: list[Any] = field(default_factory=list)  # out of the queue, not answered yet
    runner: "asyncio.Task[None] | None" = None
    snapshot: "asyncio.Task[None] | None" = None
    points: dict[str, Point] = field(default_factory=dict)
    closed: Closed | None = None
    asked: bool = False  # whether a worker of the open round wants the updates, though the parameters are held
    safe: str = ""  # the last commit known to be as safe as was asked for
    weighed: tuple[Any, int] = (None, 0)  # of what `cost` was worked out, and what it was

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.session.state.step, self.head.mark)

    @property
    def quiet(self) -> bool:
        """Whether there are entries that change nothing a client can see."""
        aggregation = self.session.recipe.aggregation
        return aggregation.rounds or aggregation.delay_compensation is not None

    def closable(self, at: float) -> bool:
        """Whether the open round is full, or over with enough contributions, at the time `at`."""
        return self.session.state.ledger.closable(self.session.recipe.aggregation, at)

    def due(self, round_: int, at: float) -> float | None:
        """When `round_` is over, if it is the open one and its time is still to come at the time `at`."""
        deadline = self.session.state.ledger.deadline(self.session.recipe.aggregation)
        if self.session.state.step + 1 != round_ or deadline is None or deadline <= at:
            return None
        return deadline

    @property
    def wants_updates(self) -> bool:
        """Whether the updates of the open round are to be kept."""
        return self.asked or self.session.state.params is None

    @property
    def idle(self) -> bool:
        return not self.queue and self.runner is None and self.snapshot is None

    @property
    def cost(self) -> int:
        """Bytes of memory, estimated; asked after every step, few of which change anything about it."""
        state = self.session.state
        workers = len(state.ledger.workers)
        arrays = self._fixed if not (workers or state.ledger.received) else state.nbytes
        kept = sum([entry.updates.nbytes for entry in self.kept.values()]) if self.kept else 0
        return arrays + kept + KEY_COST * len(self.done) + WORKER_COST * workers + OVERHEAD

    @property
    def _fixed(self) -> int:
        """The bytes of the state, of which nothing but the recipe says, and who holds the parameters, what there is."""
        session = self.session
        of = (session.recipe, session.state.params is None)
        if self.weighed[0] is None or self.weighed[0][0] is not of[0] or self.weighed[0][1] != of[1]:
            self.weighed = of, session.state.nbytes
        return self.weighed[1]

    def rebase(self, snap: str, chunks: int, base: int) -> None:
        """The store has the snapshot `snap` of the state after entry `base`; the log begins behind it."""
        if base < self.head.base:
            return
        self.head.snap, self.head.chunks, self.head.base = snap, chunks, base
        del self.log[: max(len(self.log) - (self.head.seq - base), 0)]
        self.log_bytes = sum(entry.size for entry in self.log)
        self.unwritten = self.unwritten_entries = 0

    def learn(self, epoch: int) -> None:
        """Takes note of what was accepted. What it knows of that does not sink: a store that went back may say less."""
        self.head.epoch = max(self.head.epoch, epoch)

    def advance(self, entry_commit: str, chunks: int, size: int, updated_at: str, *, visible: bool = True) -> None:
        """Memory stands at `entry_commit` now; not `visible`: it changed nothing that a client can see."""
        if visible:
            self.head.mark, self.head.updated_at = entry_commit, updated_at
            self.points.clear()
        self.head.commit, self.head.step = entry_commit, self.session.state.step
        self.head.held = self.session.state.params is not None
        self.head.seq += 1
        self.log.append(Logged(entry_commit, chunks, size))
        self.log_bytes += size

    def remember(self, key: str, done: Done, updates: Array | None) -> None:
        self.done[key] = done
        if updates is not None:
            self.kept[done.worker] = Kept(done.step, updates)
        while len(self.done) > WINDOW:
            _, forgotten = self.done.popitem(last=False)
            kept = self.kept.get(forgotten.worker)
            if kept is not None and kept.step == forgotten.step:  # nobody can ask for them any more
                del self.kept[forgotten.worker]

    def close_round(self, outcome: Outcome, lr: float, grad_norm: float) -> None:
        """What is remembered of the round that became the step of `outcome`."""
        self.closed, self.asked = Closed(outcome.step, lr, grad_norm), False
        self.kept.pop(ROUND, None)
        if outcome.updates is not None:
            self.kept[ROUND] = Kept(outcome.step, outcome.updates)

    def frozen(self) -> Session:
        """The session as it stands now, in arrays that no later step changes."""
        session = self.session
        state = session.state.copy()
        if state.params is not None and session.layout.size < THREADED:
            state.params = state.params.copy()
        return Session(session.recipe, state, session.evaluator)

    def schedules(self) -> Session:
        """As much of the session as its schedules look at, in arrays that no later step changes."""
        session, state = self.session, self.session.state
        own = {name: array.copy() for name, array in state.own.items() if name.startswith(":plateau.")}
        return Session(session.recipe, State(state.step, None, {}, own, state.moves), session.evaluator)

    def point(self, at: str) -> Point:
        """The parameters at this commit. Raises ParamsNotHeld."""
        found = self.points.get(at)
        if found is None:
            flat = self.session.next_point() if at == "next" else self.session.final_point()
            found = self.points[at] = Point(self.stamp, self.session.layout, flat, {})
        return found


def entry_of(entry: LogEntry, read_document: DocumentReader) -> tuple[Entry, Document | None]:
    """A log entry as the core takes it, and the new document if it brings one. Raises Corrupt, UnknownFormat."""
    text = entry.metadata
    if text.get("format", STORED) != STORED:
        raise UnknownFormat("an entry of the log", text["format"], [STORED])
    try:
        match text["kind"]:
            case "step":
                return _contribution(entry), None
            case "close":
                return Closing(int(text["round"])), None
            case "pull":
                return Pull(text["worker"], float(text["at"])), None
            case "params":
                return NewParams(entry.tensors), None
            case "document":
                document = read_document(orjson.loads(text["document"]))
                return NewRecipe(document.recipe), document
            case kind:
                raise UnknownFormat("an entry of the log", f"kind {kind}", [f"kind {known}" for known in KINDS])
    except (KeyError, ValueError, CoreError) as error:
        raise Corrupt(f"an entry of the log cannot be read: {error}") from None


def _contribution(entry: LogEntry) -> Contribution:
    text = entry.metadata
    loss = float(text["loss"]) if "loss" in text else None
    read = forms.of_tensors(entry.tensors, loss, "partial" in text)
    payload = text.get("sent", "gradients")
    if payload not in ("gradients", "deltas", "params"):
        raise ValueError(f"there is no payload {payload!r}")
    if "at" not in text:  # who sent it made no difference, or, in logs of older releases, was written and not looked at
        return replace(read, payload=payload)  # type: ignore[arg-type]
    return replace(
        read,
        payload=payload,  # type: ignore[arg-type]  # just compared with all that there are
        worker=text.get("worker"),
        base_step=int(text["base_step"]) if "base_step" in text else None,
        weight=float(text.get("weight", "1")),
        at=float(text["at"]),
        pulls="pulls" in text,
    )


def replay(live: Live, entry: LogEntry, read_document: DocumentReader) -> None:
    """Applies an entry of the log, whoever wrote it. Raises Corrupt, UnknownFormat, with nothing changed."""
    text = entry.metadata
    if text.get("parent") != live.head.commit:
        raise Corrupt(f"entry {text.get('commit')!r} does not follow {live.head.commit!r}")
    parsed, document = entry_of(entry, read_document)
    try:
        checked = live.session.check(parsed)
    except CoreError as error:
        raise Corrupt(f"entry {text['commit']!r} cannot be applied: {error}") from None
    closing, round_step = isinstance(checked, Reduced), live.session.state.step + 1
    contributed = isinstance(parsed, Contribution) and live.session.recipe.aggregation.rounds
    rate = live.session.rate() if closing or ("key" in text and not contributed) else 0.0
    outcome = live.session.apply(checked, want_updates=live.wants_updates if closing else "updates" in text)
    if document is not None:
        live.document = document
    visible = not contributed and not isinstance(checked, Pull)
    live.advance(text["commit"], entry.chunks, entry.size, text["time"], visible=visible)
    if isinstance(checked, Reduced):
        live.close_round(outcome, rate, checked.norm)
    live.asked |= contributed and "updates" in text
    if "key" in text:
        done = Done(
            digest=text["digest"],
            step=round_step if contributed else outcome.step,
            commit=text["commit"],
            worker=text.get("worker", ""),
            lr=rate,
            grad_norm=float(text["norm"]),
            position=live.session.state.ledger.received if contributed else 0,
        )
        live.remember(text["key"], done, None if contributed or "updates" not in text else outcome.updates)


def preview(session: Session, steps: int) -> dict[str, Any]:
    """What the schedules give over the next `steps` moves, and the number of the first one.

    It takes seconds where there are hundreds of schedules made of schedules. Raises InvalidRequest for too many values.
    """
    most = MOST_VALUES // (1 + len(session.recipe.schedules))
    if steps > most:
        raise InvalidRequest([Fault("/query/steps", f"of so many schedules at most {most} steps are shown")])
    return {"first": session.state.moves + 1, "values": session.preview(steps)}


# Files


def with_new_noise(recipe: Recipe) -> Recipe:
    """The recipe of a session that goes its own way: the same noise on two ways could be subtracted."""
    if recipe.aggregation.seed is None:
        return recipe
    return replace(recipe, aggregation=replace(recipe.aggregation, seed=secrets.randbelow(MAX_INTEGER)))


def copied(live: Live, seen: Document, recipe: Recipe) -> Session:
    """A copy, with `recipe`. Raises Superseded where the session's document is not `seen` any more."""
    if live.document is not seen:
        raise Superseded
    session = live.frozen()
    session.recipe = recipe
    return session


def describe(document: Document) -> dict[str, Any]:
    """The document with what a listing needs to know without its arrays."""
    recipe = document.recipe
    sizes = {"size": recipe.layout.size, "slot_bytes": recipe.state_bytes(), "round_bytes": recipe.round_bytes()}
    return document.describe() | sizes


def checkpoint(session: Session, document: Document) -> tuple[dict[str, Array], dict[str, str]]:
    """The file that `GET …/state` gives: named tensors, and recipe and step as text."""
    described = document.describe()
    del described["created_at"]
    text = {"ravine": FORMAT, "step": str(session.state.step), "recipe": orjson.dumps(described).decode()}
    if session.state.moves != session.state.step:
        text["moves"] = str(session.state.moves)
    workers = workers_of(session.state)
    if workers:
        text["workers"] = orjson.dumps(workers).decode()
    return tensors_of(session.recipe, session.state), text


def stored(session: Session, document: Document, brief: DocumentWriter) -> tuple[dict[str, Array], dict[str, str]]:
    """The checkpoint as it is put into the store, where every byte of an idle session counts.

    Most of a small one's would be defaults, which the head names as well. A release that changes one has to change
    FORMAT with it.
    """
    tensors, text = checkpoint(session, document)
    described = brief(document)
    described.pop("created_at", None)
    return tensors, text | {"recipe": orjson.dumps(described).decode()}


def snapshot(live: Live, brief: DocumentWriter, *, copy: bool) -> tuple[dict[str, Array], dict[str, str]]:
    """The checkpoint, and what only the service remembers: from a copy, or views of what the next step changes."""
    tensors, text = stored(live.frozen() if copy else live.session, live.document, brief)
    text |= {"commit": live.head.commit, "mark": live.head.mark, "seq": str(live.head.seq)}
    if live.closed is not None:
        text["closed"] = orjson.dumps([*live.closed]).decode()
    if live.asked:
        text["asked"] = "true"
    if live.done:
        text["keys"] = orjson.dumps([[key, *done] for key, done in live.done.items()]).decode()
    if live.kept:
        text["kept"] = orjson.dumps([[worker, kept.step] for worker, kept in live.kept.items()]).decode()
        tensors |= {f":update:{i}": kept.updates for i, kept in enumerate(live.kept.values())}
    return tensors, text


def first(
    session: Session, document: Document, brief: DocumentWriter, *, new: bool
) -> tuple[dict[str, str | int | bytes], Pieces]:
    """What the store is given of a session that is made: the fields of its head, and its first snapshot.

    `new`: it is at its very start. Raises InvalidRequest where it could not be read back.
    """
    tensors, text = checkpoint(session, document)
    if len(safetensors.write(tensors, text)[0]) > safetensors.MAX_HEADER:
        raise InvalidRequest([Fault("/shapes", "the checkpoint's header would be longer than what is read back")])
    if new:  # what every session starts with need not be stored
        tensors = {name: array for name, array in tensors.items() if ":" not in name}
    text = stored(session, document, brief)[1]
    commit, held = new_commit(), session.state.params is not None
    fields: dict[str, str | int | bytes] = {"commit": commit, "step": session.state.step, "time": document.created_at}
    fields |= {"document": orjson.dumps(describe(document)), "held": int(held)}
    return fields, safetensors.write(tensors, text | {"commit": commit, "seq": "0"})


class Told(NamedTuple):
    """What the text of a checkpoint tells, before any array is made."""

    document: Document
    step: int
    moves: int
    workers: dict[str, Any]

    def session(self, tensors: Mapping[str, Array], evaluator: Evaluator, *, adopt: bool = False) -> Session:
        """`adopt`: it may take the arrays as they are. Raises InvalidState."""
        recipe = self.document.recipe
        state = state_of(recipe, self.step, tensors, self.moves, self.workers, adopt=adopt)
        return Session(recipe, state, evaluator)


def told(text: Mapping[str, str], created_at: str, read_document: DocumentReader) -> Told:
    """Raises InvalidState and what `read_document` raises."""
    if text.get("ravine") != FORMAT:
        raise InvalidState(f"the file is not a checkpoint of format {FORMAT}: `ravine` is {text.get('ravine')!r}")
    try:
        described = orjson.loads(text["recipe"])
        step, moves = (_count(text.get(name, text["step"])) for name in ("step", "moves"))
        workers = orjson.loads(text.get("workers", "{}"))
    except (KeyError, ValueError) as error:
        raise InvalidState(f"the checkpoint's text cannot be read: {error!r}") from None
    if not isinstance(workers, dict):
        raise InvalidState("the checkpoint's `workers` is no object")
    if not isinstance(described, dict) or not 0 <= step <= MAX_INTEGER:
        raise InvalidState("the checkpoint's `recipe` is no object, or its `step` is no step")
    return Told(read_document(described | {"created_at": created_at}), step, moves, workers)


def _count(text: str) -> int:
    return int(text) if _STEP.fullmatch(text) else -1


def revive(
    id_: str,
    head: Head,
    text: Mapping[str, str],
    tensors: dict[str, Array],
    read_document: DocumentReader,
    evaluator: Evaluator,
) -> Live:
    """A session as its snapshot has it, from where its log leads to `head`. Raises Corrupt, UnknownFormat.

    It takes the arrays of `tensors`, and leaves none there: nobody else is to hold what the first step replaces.
    """
    if text.get("ravine", FORMAT) != FORMAT:
        raise UnknownFormat("the snapshot", text["ravine"], [FORMAT])
    named = {name: tensors.pop(name) for name in list(tensors) if not name.startswith(":update:")}
    try:
        known = told(text, orjson.loads(head.document)["created_at"], read_document)
        session = known.session(named, evaluator, adopt=True)
        keys = orjson.loads(text.get("keys", "[]"))
        workers = orjson.loads(text.get("kept", "[]"))
        mark = text.get("mark", text["commit"])
        here = replace(head, commit=text["commit"], mark=mark, seq=int(text["seq"]))
        live = Live(id_, session, known.document, here)
        live.closed = Closed(*orjson.loads(text["closed"])) if "closed" in text else None
        live.asked = "asked" in text
        live.done.update((key, Done(*done)) for key, *done in keys)
        for i, (worker, step) in enumerate(workers):
            live.kept[worker] = Kept(step, tensors.pop(f":update:{i}").copy())
    except (CoreError, KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"the snapshot of {id_} cannot be read: {error}") from None
    return live
