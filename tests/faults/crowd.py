"""Clients that step sessions through several services while stores fail and are failed over.

Each client takes one step after the other, each under a key of its own, and sends the same again, to the next service,
until it is acknowledged; every now and then once more although it was. No tensors are asked back of a step, so that
every acknowledgement, that of a repeat too, names the step and the commit of the contribution itself.

`verdict` reads the history out of the store, past all services, and leaves the rest to chain.py. A store that
went back is the one exception: what a scenario knows to be gone (`Window`) may be missing if the session said so
afterwards, 409 `state-lost`. Once the loss is accepted the clients go on, so that one run sees many losses.
"""

import asyncio
import contextlib
import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import httpx
import numpy as np
import orjson
import redis
import safetensors.numpy

from core.contributions import Contribution
from core.evaluate import Evaluator
from core.session import Session
from service import schemas
from service.errors import ServiceError
from service.store import Store, key
from tests.faults.chain import Evidence, Line, Replayed, Reply, check, outcome
from tests.faults.nursery import Replica
from tests.faults.outcome import Outcome
from tests.nursery import Nursery
from tests.running import Server
from tests.wire import SAFETENSORS, tensors

Array: TypeAlias = np.ndarray
SMALL, LARGE = 17, 20_000  # elements: LARGE is staged in chunks, and each of its snapshots too
PATIENCE = 60.0  # seconds after the last fault in which everything must have been acknowledged
PAUSE = 0.03
REPEATED = 8  # one acknowledged contribution in so many is sent once more
ACCEPTED_AFTER = 0.1  # seconds, so that others hear of it too
MARGIN = 0.25  # seconds that replication may have been behind before it was held


def gradient(worker: str, number: int, size: int) -> Array:
    return np.random.default_rng((*worker.encode(), 256 + number)).standard_normal(size).astype(np.float32)


def body_of(size: int) -> dict[str, Any]:
    return {"optimizer": {"kind": "adam", "lr": 0.01}, "params": {"w": [1.0] * size}}


class Told(NamedTuple):
    """What a 409 `state-lost` said, and when."""

    at: float
    acknowledged: dict[str, Any]
    found: dict[str, Any]


class Window(NamedTuple):
    """A store took writes between these moments that are gone by now: of the steps after `step`, and of those workers
    alone whose names begin with `workers`.
    """

    opened: float
    closed: float
    step: int
    workers: str = ""

    def has(self, told: Reply) -> bool:
        when = told.ended >= self.opened - MARGIN and told.begun <= self.closed
        return when and told.step > self.step and told.key.startswith(self.workers)


@dataclass
class Target:
    """A session under load. `origin` is its commit at step 0, `begun` when each key was sent first."""

    id: str
    size: int
    origin: str
    begun: dict[str, float] = field(default_factory=dict)
    acknowledged: list[Reply] = field(default_factory=list)
    lost: list[Told] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    held_back: threading.Event = field(default_factory=threading.Event)  # set while its loss is not accepted

    def excused(self, told: Reply) -> bool:
        """Whether the store is known to have dropped it, and that it has lost something was told afterwards."""
        return any(
            window.has(told) and any(loss.at >= max(window.opened, told.ended) for loss in self.lost)
            for window in self.windows
        )

    def stands(self, store: redis.Redis) -> int:
        """The session's step in the store; 0 if it is not there."""
        return int(store.hget(key(self.id, "head"), "step") or 0)

    def missing(self, store: redis.Redis) -> int:
        """How many acknowledgements tell of a step after the one at which the session stands in the store."""
        step = self.stands(store)
        return sum(told.step > step for told in self.acknowledged)

    def replay(self, lines: Sequence[Line]) -> Replayed:
        """The core alone, given the contributions one after the other."""
        document, held = schemas.parse_create(body_of(self.size))
        serial = Session.new(document.recipe, held, Evaluator())
        for line in lines:
            worker, _, number = line.keys[0].partition(" ")
            contribution = Contribution({"w": gradient(worker, int(number), self.size)}, worker=worker)
            serial.apply(serial.check(contribution))
        assert serial.state.params is not None
        return Replayed((), _digest(serial.state.params.tobytes()))


def _opened(client: httpx.Client, size: int) -> Target:
    reply = client.post("/v1/sessions", json=body_of(size))
    assert reply.status_code == 201, reply.text
    return Target(reply.json()["id"], size, reply.headers["etag"].strip('"').partition("-")[2])


class Client(threading.Thread):
    """One of the crowd: steps `target` through `servers`, from the one at `turn` on."""

    def __init__(self, crowd: "Crowd", target: Target, name: str, turn: int, seed: int) -> None:
        super().__init__(daemon=True, name=name)
        self._crowd, self._target = crowd, target
        self._turns = itertools.count(turn)
        self._draw = random.Random(seed)
        self._clients: dict[str, httpx.Client] = {}
        self.number = 0
        self.refused = 0  # answers that the store is full
        self.retries = 0
        self.failures: list[str] = []
        self.hangs: list[str] = []

    @property
    def _key(self) -> str:
        return f"{self.name} {self.number}"

    def run(self) -> None:
        try:
            with self._crowd.inside():
                while not self._crowd.over.is_set() and not self.failures and not self.hangs:
                    self.number += 1
                    if self._contribute() and self._draw.randrange(REPEATED) == 0:
                        self._contribute()
        finally:
            for client in self._clients.values():
                client.close()

    def _contribute(self) -> bool:
        """The same again until it is acknowledged, as a client should. False: it never was."""
        begun = time.monotonic()
        self._target.begun.setdefault(self._key, begun)
        content = safetensors.numpy.save({"w": gradient(self.name, self.number, self._target.size)})
        while True:
            index = next(self._turns) % len(self._crowd.servers)
            reply = self._send(index, content)
            ended = time.monotonic()
            if self.hangs:
                return False
            if reply is not None and reply.status_code == 200:
                self._keep(reply, begun, ended)
                return True
            if not self._may_retry(reply):
                return False
            if ended > self._crowd.deadline(begun):
                self.hangs.append(f"{self._key}: not acknowledged {PATIENCE} s after the last fault")
                return False
            time.sleep(PAUSE)

    def _keep(self, reply: httpx.Response, begun: float, ended: float) -> None:
        step, _, commit = reply.headers["etag"].strip('"').partition("-")
        replayed = "ravine-replayed" in reply.headers
        told = Reply(self._key, begun, ended, int(step), commit, replayed, current=not replayed)
        self._target.acknowledged.append(told)

    def _send(self, index: int, content: bytes) -> httpx.Response | None:
        server = self._crowd.servers[index]
        url = server.url
        if url not in self._clients:  # a service that is started again has another address
            self._clients[url] = server.client()
        asked = {"worker": self.name, "return": "none"}
        headers = SAFETENSORS | {"Accept": "application/json", "Idempotency-Key": self._key}
        path = f"/v1/sessions/{self._target.id}/steps"
        try:
            return self._clients[url].post(path, params=asked, content=content, headers=headers)
        except httpx.TimeoutException as error:
            self.hangs.append(f"{self._key} through service {index}: {error!r}")
        except httpx.TransportError:
            pass
        return None

    def _may_retry(self, reply: httpx.Response | None) -> bool:
        if reply is None or reply.status_code in (502, 503, 504):
            self.retries += 1
            return True
        if reply.status_code == 507:
            self.refused += 1
            return True
        problem = reply.json() if "problem+json" in reply.headers.get("content-type", "") else {}
        if self._crowd.lossy and problem.get("type", "").endswith("/state-lost"):
            self._target.lost.append(Told(time.monotonic(), problem["acknowledged"], problem["found"]))
            self._target.held_back.set()
            while self._target.held_back.is_set() and not self._crowd.over.is_set():
                time.sleep(PAUSE)
            return True
        self.failures.append(f"{self._key}: {reply.status_code} {reply.text[:500]}")
        return False


class Crowd:
    """`clients` threads on sessions of `sizes` elements, through `servers`; `lossy`: state-lost is an answer.

    `inside` is entered by each thread, for services that only some networks reach.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        seed: int,
        *,
        lossy: bool = False,
        targets: Sequence[Target] | None = None,
        sizes: Sequence[int] = (SMALL, LARGE),
        clients: int = 4,
        name: str = "w",
        inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.servers, self.lossy, self.inside = servers, lossy, inside
        self.over = threading.Event()
        self._last_fault = time.monotonic()
        self._stalled: list[str] = []
        self.targets = self._open(sizes) if targets is None else list(targets)
        draw = random.Random(seed)
        self._clients = [
            Client(self, self.targets[i % len(self.targets)], f"{name}{i}", i, draw.randrange(1 << 30))
            for i in range(clients)
        ]

    def _open(self, sizes: Sequence[int]) -> list[Target]:
        with self.inside(), self.servers[0].client() as client:
            return [_opened(client, size) for size in sizes]

    def start(self) -> "Crowd":
        for client in self._clients:
            client.start()
        return self

    def deadline(self, begun: float) -> float:
        """When something first sent at `begun` counts as never answered."""
        return max(begun, self._last_fault) + PATIENCE

    def fault(self) -> None:
        """Something was broken, or mended, just now."""
        self._last_fault = time.monotonic()

    @property
    def acknowledged(self) -> int:
        return sum(len(target.acknowledged) for target in self.targets)

    @property
    def refused(self) -> int:
        return sum(client.refused for client in self._clients)

    @property
    def unserved(self) -> int:
        """How many requests were refused by a full store, or not answered."""
        return sum(client.refused + client.retries for client in self._clients)

    @property
    def complaints(self) -> bool:
        return bool(self.failures or self.hangs)

    def run_on(self, steps: int, seconds: float = PATIENCE) -> bool:
        """Until so many more steps were acknowledged on each session; False: it took too long, or someone gave up."""
        goals = [len(target.acknowledged) + steps for target in self.targets]
        deadline = time.monotonic() + seconds
        while any(len(target.acknowledged) < goal for target, goal in zip(self.targets, goals, strict=True)):
            if time.monotonic() > deadline:
                self._stalled.append(f"no {steps} steps more within {seconds:g} s")
            if self.complaints:
                return False
            time.sleep(0.005)
        return True

    def finish(self) -> None:
        """Each takes the step that it is at, and no further one."""
        self.fault()
        self.over.set()
        for client in self._clients:
            client.join(PATIENCE + 40)
            if client.is_alive():
                client.hangs.append(f"{client.name} {client.number}: no answer")

    @property
    def failures(self) -> list[str]:
        return [text for client in self._clients for text in client.failures]

    @property
    def hangs(self) -> list[str]:
        return [*self._stalled, *(text for client in self._clients for text in client.hangs)]

    def finals(self, target: Target) -> list[str]:
        """The state as each service gives it."""
        with self.inside():
            return [_final(server, target.id) for server in self.servers]


class Verdict(NamedTuple):
    """The row of the table, what is wrong in words, and how many acknowledged steps are gone that may be, and whose
    session said so.
    """

    outcome: Outcome
    notes: list[str]
    gone: int


def verdict(name: str, injected: int, store: redis.Redis, *crowds: Crowd) -> Verdict:
    """What does not fit together of the sessions that `crowds` stepped, and `store` has now. They have finished."""
    targets = crowds[0].targets
    all_ = [_evidence(target, store, crowds) for target in targets]
    found = [check(evidence, target.replay) for evidence, target in zip(all_, targets, strict=True)]
    failures = [text for crowd in crowds for text in crowd.failures]
    hangs = [text for crowd in crowds for text in crowd.hangs]
    row = outcome(name, injected, found, len(hangs))
    notes = [*failures, *hangs, *(note for faults in found for note in faults.notes)]
    gone = sum(len(target.acknowledged) for target in targets) - sum(len(evidence.replies) for evidence in all_)
    return Verdict(row._replace(broken=row.broken + len(failures)), notes, gone)


def _evidence(target: Target, store: redis.Redis, crowds: Sequence[Crowd]) -> Evidence:
    lines = [orjson.loads(line) for line in store.lrange(key(target.id, "history"), 0, -1)]
    there = {line[-1] for line in lines}
    keys = {told.commit: told.key for told in target.acknowledged}
    return Evidence(
        session=target.id,
        origin=target.origin,
        head=(store.hget(key(target.id, "head"), "commit") or b"").decode(),
        rounds=False,
        begun=target.begun,
        replies=[told for told in target.acknowledged if told.commit in there or not target.excused(told)],
        # Everything was acknowledged in the end: a line that nobody was told of is somebody's second one.
        lines=[Line(line[0], line[-1], (keys.get(line[-1], "nobody 0"),)) for line in lines],
        finals=[final for crowd in crowds for final in crowd.finals(target)],
    )


def _final(server: Server, session: str) -> str:
    """The digest of the parameters, or what came in their place."""
    with server.client() as client:
        reply = client.get(f"/v1/sessions/{session}/params", headers={"Accept": SAFETENSORS["Content-Type"]})
    return _digest(tensors(reply)["w"].tobytes()) if reply.status_code == 200 else f"{reply.status_code} {reply.text}"


def _digest(params_: bytes) -> str:
    return hashlib.blake2b(params_, digest_size=16).hexdigest()


# -- what the scenarios share ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replicas(
    born: Nursery, directory: Path, count: int, *arguments: str, shared: bool = False
) -> Iterator[list[Replica]]:
    """`count` services, with a data directory each or a `shared` one."""
    with contextlib.ExitStack() as opened:  # which ends all of them, even if one does not end as it should
        made = []
        for i in range(count):
            server = Replica(born, directory / ("data" if shared else f"data-{i}"), *arguments).start()
            opened.callback(_stop, server)
            made.append(server)
        yield made


def _stop(server: Replica) -> None:
    if server.process is not None and server.process.poll() is None:
        server.stop()


class GivenUp(NamedTuple):
    """What was accepted as lost: the commits at which services had seen the session, and whether the store had one of
    them all the same.
    """

    commits: frozenset[str]
    there: bool


class Acceptor:
    """The operator: accepts what the sessions under load say they have lost. `accepted` is what, of each session."""

    def __init__(self, targets: Sequence[Target], url: str) -> None:
        self._targets, self._url = targets, url
        self._over = threading.Event()
        self.accepted: dict[str, list[GivenUp]] = {target.id: [] for target in targets}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            for target in self._targets:
                if target.held_back.is_set():
                    self._over.wait(ACCEPTED_AFTER)
                    with contextlib.suppress(ServiceError):  # the store is away; it is tried again
                        self.accepted[target.id] += asyncio.run(accept(self._url, target.id))
                        target.held_back.clear()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def judge(self, found: Verdict, faults: int) -> Verdict:
        """False alarms are faults by themselves: `faults` is how often the store can have gone back."""
        false = sum(false_alarms(told, faults) for told in self.accepted.values())
        row = found.outcome._replace(broken=found.outcome.broken + false)
        return found._replace(outcome=row, notes=[*found.notes, *["a false alarm"] * false])


def false_alarms(told: Sequence[GivenUp], faults: int) -> int:
    """How many told of nothing that was lost, or of what was accepted before: each fault but the first may have undone
    an accepting.
    """
    before, again = frozenset[str](), 0
    for given_up in told:
        again += given_up.commits <= before
        before |= given_up.commits
    return sum(given_up.there for given_up in told) + max(0, again - faults + 1)


@contextlib.contextmanager
def accepting(targets: Sequence[Target], url: str) -> Iterator[Acceptor]:
    made = Acceptor(targets, url)
    try:
        yield made
    finally:
        made.close()


async def accept(url: str, session: str) -> list[GivenUp]:
    """As `ravine sessions accept` does, without the second that its start takes, and the one that it waits.

    Returns what was accepted, if anything.
    """
    store = Store(url)
    await store.open()
    try:
        head = await store.head(session)
        if head is None or head.lost is None:
            return []
        lines = [orjson.loads(line) for line in await store.link.call("LRANGE", key(session, "history"), 0, -1)]
        told = frozenset(head.lost.told.decode().split())
        given_up = GivenUp(told, there=not told.isdisjoint(line[-1] for line in lines))
        return [given_up] if await store.accept(session, head) == "OK" else []
    finally:
        await store.close()


def rounds(crowd: Crowd, times: int, draw: random.Random) -> Iterator[int]:
    """Yields `times` times for something to be broken and mended, each after everybody has got on; then all finish."""
    for i in range(times):
        if not crowd.run_on(draw.randrange(5, 30)):
            break
        crowd.fault()
        yield i
        crowd.fault()
    crowd.run_on(5)
    crowd.finish()


def went_back(crowd: Crowd, store: redis.Redis, opened: float, workers: str = "") -> int:
    """Notes for each session what the store has not that was acknowledged since `opened`. Returns how much that is."""
    missing = 0
    for target in crowd.targets:
        missing += target.missing(store)
        target.windows.append(Window(opened, time.monotonic(), target.stands(store), workers))
    return missing
