"""Clients under which faults are injected: several workers on several sessions, through whatever replicas there are.

Each contribution has a key and is sent until it is acknowledged, as a client should. Beyond that the workers make
trouble of their own: now and then one sends a contribution to two replicas at the same moment, or an old one again.
All answers are kept for the check (chain.py).

Logs are cut by snapshots, as they are in use; so a contribution must be known by its line in the history. It is: by
its worker, and by its `loss`, which is its number.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import httpx
import numpy as np
import orjson
import safetensors.numpy
import xxhash

from core.contributions import Closing, Contribution
from core.state import tensors_of
from service.store import Store
from tests.faults.chain import Entry, Evidence, Faults, Line, Replay, Replayed, Reply, Told, check
from tests.faults.rounds import Serial, gradient, opens
from tests.wire import SAFETENSORS

Urls: TypeAlias = Callable[[], Sequence[str]]

REPLY_SECONDS = 30.0  # without an answer for so long, a request hangs
PATIENCE = 60.0  # seconds in which a contribution is acknowledged, whatever is killed meanwhile
MOST = 9_000  # steps; the history keeps 10,000
AGAIN = (502, 503, 504, 507)
REMEMBERED = 50  # of so many contributions one may be sent again; the service remembers more


class Course(NamedTuple):
    """A kind of session. `rounds`: synchronous, each round of all workers."""

    name: str
    workers: int
    size: int = 17
    held: bool = True
    rounds: bool = False

    @property
    def body(self) -> dict[str, Any]:
        aggregation = {"mode": "sync", "workers": self.workers} if self.rounds else {"mode": "async"}
        return opens(aggregation, held=self.held, size=self.size)


PLAIN = Course("plain", 2)
UPDATES = Course("updates", 1, held=False)
LARGE = Course("large", 1, size=20_000)  # 80 KB: staged, and a snapshot every few steps
ROUNDS = Course("rounds", 3, rounds=True)
COURSES = (PLAIN, UPDATES, LARGE, ROUNDS)


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Of names and bits."""
    made = xxhash.xxh3_64()
    for name in sorted(tensors):
        made.update(name.encode())
        made.update(np.ascontiguousarray(tensors[name]).tobytes())
    return made.hexdigest()


def replaying(course: Course) -> Replay:
    """The core alone, to which the contributions of the lines are given one after the other."""

    def replay(lines: Sequence[Line]) -> Replayed:
        serial, steps, wanted = Serial(course.body).session, [], not course.held
        for line in lines:
            for sent in line.keys:
                worker, number = sent.split(" ")
                contribution = Contribution({"w": gradient(worker, int(number), course.size)}, worker=worker)
                outcome = serial.apply(serial.check(contribution), want_updates=wanted)
            if course.rounds:
                outcome = serial.apply(serial.check(Closing(serial.state.step + 1)), want_updates=wanted)
            given = serial.next_point() if course.held else outcome.updates
            assert given is not None
            steps.append(digest({"w": given}))
        return Replayed(steps, digest(tensors_of(serial.recipe, serial.state)))

    return replay


class Session:
    """A session under load, and what its clients have seen."""

    def __init__(self, course: Course, made: httpx.Response) -> None:
        assert made.status_code == 201, made.text
        self.course, self.id = course, str(made.json()["id"])
        self.origin = _stamp(made)[1]
        self.replies: list[Reply] = []
        self.begun: dict[str, float] = {}
        self.refused: list[str] = []
        self.hangs = 0
        self.told: Told | None = None

    def send(self, client: httpx.Client, url: str, worker: str, number: int, wait: float = 0.0) -> Reply | None:
        """Sends a contribution once. None: it is unknown what became of it, or it was refused."""
        name = f"{worker} {number}"
        headers = SAFETENSORS | {"Accept": SAFETENSORS["Content-Type"], "Idempotency-Key": name}
        if wait:
            headers["Prefer"] = f"wait={wait}"
        body = safetensors.numpy.save({"w": gradient(worker, number, self.course.size)})
        begun = time.monotonic()
        self.begun.setdefault(name, begun)
        parameters = {"worker": worker, "loss": str(number)}
        try:
            answer = client.post(f"{url}/v1/sessions/{self.id}/steps", params=parameters, content=body, headers=headers)
        except httpx.TimeoutException:
            self.hangs += 1
            return None
        except httpx.TransportError:
            return None
        return self._read(name, begun, answer)

    def _read(self, name: str, begun: float, answer: httpx.Response) -> Reply | None:
        if answer.status_code in AGAIN:
            return None
        if answer.status_code not in (200, 202):
            self._refused(name, answer)
            return None
        replayed, pending = "ravine-replayed" in answer.headers, answer.status_code == 202
        whole = answer.content and not pending
        tensors = safetensors.numpy.load(answer.content) if whole else {}
        reply = Reply(
            name,
            begun,
            time.monotonic(),
            *_stamp(answer),
            replayed=replayed,
            pending=pending,
            current=self.course.held or not replayed,
            digest=digest(tensors) if tensors else None,
            own=not self.course.held,
        )
        self.replies.append(reply)
        return reply

    def _refused(self, name: str, answer: httpx.Response) -> None:
        problem = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        if not problem.get("type", "").endswith("/state-lost"):
            self.refused.append(f"{name} was refused: {answer.status_code} {answer.text[:300]}")
        elif self.told is None:
            self.told = Told(_head(problem["acknowledged"]), _head(problem["found"]))

    @property
    def over(self) -> bool:
        """Whether nobody goes on with it: more of the same would show nothing more."""
        return bool(self.told or self.refused or self.hangs)


def _stamp(answer: httpx.Response) -> tuple[int, str]:
    step, _, commit = answer.headers["etag"].strip('"').partition("-")
    return int(step), commit


def _head(found: Mapping[str, Any]) -> tuple[int, str]:
    return int(found["step"]), found["etag"].strip('"').partition("-")[2]


class Worker(threading.Thread):
    """Contributes one thing after the other, up to `last`, which is set while it runs."""

    def __init__(self, load: "Load", session: Session, index: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.load, self.session, self.worker = load, session, f"w{index}"
        self.draw = random.Random(f"{seed} {session.course.name} {index}")
        self.number, self.last = 0, MOST // (1 if session.course.rounds else session.course.workers)
        self.ended = False  # as it should: not by an exception

    def run(self) -> None:
        with httpx.Client(timeout=REPLY_SECONDS, verify=False, trust_env=False) as client:
            while self.number < self.last and not self.session.over:
                self.number += 1
                self._contribute(client)
                if self.number > 1 and self.draw.random() < 0.1:
                    old = self.draw.randint(max(1, self.number - REMEMBERED), self.number)
                    self._send(client, old, 0.0)
                time.sleep(self.draw.uniform(0, 2 * self.load.pause))
        self.ended = True

    def _contribute(self, client: httpx.Client) -> None:
        """The same again until it is acknowledged, and its round is over."""
        deadline = time.monotonic() + PATIENCE
        wait = 2.0 if self.session.course.rounds else 0.0
        if self.draw.random() < 0.1:
            self.load.twice(self.session, self.load.url(self.draw), self.worker, self.number)
        while not self.session.over:
            reply = self._send(client, self.number, wait)
            if reply is not None and not reply.pending:
                return
            if time.monotonic() > deadline:
                self.session.hangs += 1
                return
            time.sleep(0.03)

    def _send(self, client: httpx.Client, number: int, wait: float) -> Reply | None:
        url = self.load.url(self.draw)
        reply = self.session.send(client, url, self.worker, number, wait)
        if reply is not None:
            self.load.answered[url] += 1
        return reply


class Load:
    """Sessions of `courses`, stepped through the addresses that `urls` gives at the moment, from `start` to `stop`.

    `pause` is how many seconds a worker rests between contributions, on average: what the processor has left over is
    for the service that starts again.
    """

    def __init__(self, urls: Urls, seed: int, courses: Sequence[Course] = COURSES, pause: float = 0.02) -> None:
        self.pause = pause
        self.answered: Counter[str] = Counter()  # by address
        self._urls = urls
        self._pool = ThreadPoolExecutor(4)
        self._twins: list[Future[Reply | None]] = []
        self._client = httpx.Client(timeout=REPLY_SECONDS, verify=False, trust_env=False)
        with httpx.Client(timeout=REPLY_SECONDS) as client:
            self.sessions = [
                Session(course, client.post(f"{urls()[0]}/v1/sessions", json=course.body)) for course in courses
            ]
        self._workers = [
            Worker(self, session, index, seed) for session in self.sessions for index in range(session.course.workers)
        ]

    def url(self, draw: random.Random) -> str:
        return draw.choice(self._urls())

    def twice(self, session: Session, url: str, worker: str, number: int) -> None:
        """Sends it in the background."""
        self._twins.append(self._pool.submit(session.send, self._client, url, worker, number))

    def start(self) -> "Load":
        for worker in self._workers:
            worker.start()
        return self

    @property
    def over(self) -> bool:
        """Whether nobody contributes any more."""
        return not any(worker.is_alive() for worker in self._workers)

    def stop(self) -> None:
        """Returns when all that was begun is acknowledged, or counted as hanging."""
        for session in self.sessions:
            crowd = [worker for worker in self._workers if worker.session is session]
            most = max(worker.number for worker in crowd) + 1
            for worker in crowd:  # nobody waits for a round that somebody else will not come to
                worker.last = min(worker.last, most) if session.course.rounds else 0
        for worker in self._workers:
            worker.join(2 * PATIENCE)
            worker.session.hangs += not worker.ended
        self._pool.shutdown()
        for twin in self._twins:
            twin.result()  # or what went wrong in it
        self._client.close()

    def check(self, store: str, urls: Sequence[str]) -> list[Faults]:
        """What does not fit, session by session; `urls` are those of replicas that live, `store` that of the store."""
        return [
            check(evidence, replaying(session.course))
            for session, evidence in zip(self.sessions, gather(self.sessions, store, urls), strict=True)
        ]


# -- what is there in the end ------------------------------------------------------------------------------------------


def gather(sessions: Sequence[Session], store: str, urls: Sequence[str]) -> list[Evidence]:
    """All that the store and the replicas have of the sessions, beside what clients were told."""
    with httpx.Client(timeout=REPLY_SECONDS) as client:
        finals = [_finals(client, session, urls) for session in sessions]
        counted = [_counted(client, session, urls[0]) for session in sessions]
    kept = asyncio.run(_kept(store, [session.id for session in sessions]))
    found = zip(sessions, kept, finals, counted, strict=True)
    return [_evidence(session, *stored, final, counts) for session, stored, final, counts in found]


def _evidence(
    session: Session,
    head: str,
    lines: Sequence[bytes],
    entries: Sequence[Entry],
    finals: Sequence[str],
    counted: Mapping[str, int],
) -> Evidence:
    return Evidence(
        session.id,
        session.origin,
        head,
        session.course.rounds,
        dict(session.begun),
        list(session.replies),
        [_line(orjson.loads(line), session.course) for line in lines],
        entries,
        finals,
        counted,
        told=session.told,
        hangs=session.hangs,
        refused=list(session.refused),
    )


def _line(record: list[Any], course: Course) -> Line:
    step, loss, worker, commit = record[0], record[2], record[5], record[-1]
    keys = tuple(f"w{i} {step}" for i in range(course.workers)) if course.rounds else (f"{worker} {loss:.0f}",)
    return Line(step, commit, keys)


def _finals(client: httpx.Client, session: Session, urls: Sequence[str]) -> list[str]:
    """The digest of the checkpoint of each replica; what cannot be had is a digest of nothing."""
    if session.told is not None:
        return []
    replies = [client.get(f"{url}/v1/sessions/{session.id}/state") for url in urls]
    return [digest(safetensors.numpy.load(reply.content)) if reply.is_success else "none" for reply in replies]


def _counted(client: httpx.Client, session: Session, url: str) -> dict[str, int]:
    """How many contributions the service has of each worker."""
    reply = client.get(f"{url}/v1/sessions/{session.id}/workers")
    return {worker["worker"]: worker["contributions"] for worker in reply.json()["data"]} if reply.is_success else {}


async def _kept(url: str, sessions: Sequence[str]) -> list[tuple[str, list[bytes], list[Entry]]]:
    """Head, lines of the history, and entries since the snapshot."""
    store = Store(url)
    await store.open()
    found = list[tuple[str, list[bytes], list[Entry]]]()
    try:
        for session in sessions:
            tail = await store.tail(session, -1)
            if tail is None or tail.entries is None:
                found.append(("", [], []))
                continue
            texts = [entry.metadata for entry in tail.entries]
            entries = [Entry(text["commit"], text["parent"], text.get("key")) for text in texts]
            lines = await store.history(session, 0, MOST + 1000)
            found.append((tail.head.commit.removeprefix("lost:"), lines, entries))
    finally:
        await store.close()
    return found
