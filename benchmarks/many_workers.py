"""Many workers on one session, through several replicas, and the check that nothing was lost and nothing doubled.

Each worker is a connection of its own to one of the replicas. It sends one contribution after the other, each
different from all others and under a key of its own, and has the parameters that came of one before it sends the next:
in async mode with the reply, in sync mode by a long poll for the round. Now and then it sends one again, to another
replica, as a client does that has lost a reply.

The replies tell where each contribution stands in the log: by the step that it became, or by its round and how many had
been received then. `verify` holds that against what was sent and against what the session counts for each worker, and
the parameters of every replica, bit for bit, against a serial replay in that order by the core alone.

The row P2 measures it (`one_session`); tests run it with smaller numbers.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from benchmarks.large_steps import MEDIA, file_head
from core.aggregation.aggregation import Aggregation
from core.contributions import Closing, Contribution
from core.evaluate import Evaluator
from core.layout import Layout
from core.optimizers.adam import Adam
from core.recipe import Recipe
from core.session import Session

Mode = Literal["async", "sync"]
JSON = "application/json"
WAIT_SECONDS = 60
LIMIT_SECONDS = 300
LISTED = 100
_SHIFTS = 997


class Broken(Exception):
    """A promise was not kept, or a reply is none that there should be; the sentence says which."""


class Workload(NamedTuple):
    """`size` parameters in one tensor "w"; one in `repeated` contributions is sent twice."""

    mode: Mode
    workers: int = 1_000
    size: int = 10_000
    repeated: int = 20

    @property
    def aggregation(self) -> Aggregation:
        return Aggregation(self.mode, workers=self.workers if self.mode == "sync" else None)

    @property
    def body(self) -> dict[str, Any]:
        """What makes the session; its parameters are then put there, all zeros."""
        return {"optimizer": "adam", "shapes": {"w": [self.size]}, "aggregation": self._described()}

    def _described(self) -> dict[str, Any]:
        return {"mode": "sync", "workers": self.workers} if self.mode == "sync" else {"mode": "async"}

    def name(self, worker: int) -> str:
        return f"w{worker:04}"


class Gradients:
    """(size,) float32 for every worker and number: stretches of one array, with the two written into them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers = np.random.default_rng(7).standard_normal(size + _SHIFTS).astype(np.float32)

    def of(self, worker: int, number: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        start = (worker * 31 + number) % _SHIFTS
        found = self._numbers[start : start + self._size].copy()
        found[:2] = worker + 1, number + 1
        return found


class Taken(NamedTuple):
    """A contribution that was answered: the step that it is in, and its place among the contributions to that step."""

    step: int
    place: int
    worker: int
    number: int


class Answers(NamedTuple):
    """`seconds` are those from a contribution to its answer (in sync mode, to that it was received)."""

    taken: list[Taken]
    seconds: list[float]
    repeats: int


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


class Wire:
    """One kept connection."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, headers: str = "", content: bytes = b"", accept: str = MEDIA) -> Reply:
        if self._streams is None:
            host, port = self._address.hostname, self._address.port
            self._streams = await asyncio.open_connection(host, port, limit=1 << 20)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\n{headers}Accept: {accept}\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:-2])
        found = {name.lower(): value for name, _, value in pairs}
        content = await reader.readexactly(int(found.get("content-length", 0)))
        return Reply(int(lines[0].split(" ")[1]), found, content)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def contribute(workload: Workload, urls: Sequence[str], session: str, numbers: range) -> Answers:
    """All workers send their contributions of these numbers. Raises Broken."""
    answers = Answers([], [], 0)
    gradients = Gradients(workload.size)
    senders = [Sender(workload, urls, session, worker, gradients, answers) for worker in range(workload.workers)]
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            repeats = await asyncio.gather(*[sender.send(numbers) for sender in senders])
    except TimeoutError:
        raise Broken(f"only {len(answers.taken)} contributions were answered in {LIMIT_SECONDS} s") from None
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Broken(f"a connection broke: {error}") from None
    finally:
        for sender in senders:
            sender.close()
    return answers._replace(repeats=sum(repeats))


class Sender:
    """One worker."""

    def __init__(
        self, workload: Workload, urls: Sequence[str], session: str, worker: int, gradients: Gradients, answers: Answers
    ) -> None:
        self._workload, self._session, self._worker = workload, session, worker
        self._gradients, self._answers = gradients, answers
        self._home = Wire(urls[worker % len(urls)])
        self._other = urls[(worker + 1) % len(urls)]
        self._start = file_head(workload.size)

    async def send(self, numbers: Iterable[int]) -> int:
        """How many it sent twice."""
        repeats = 0
        for number in numbers:
            content = self._start + self._gradients.of(self._worker, number).tobytes()
            started = time.perf_counter()
            reply = await self._post(self._home, number, content)
            self._answers.seconds.append(time.perf_counter() - started)
            step = self._note(number, reply)
            if (self._worker + number) % self._workload.repeated == 0:
                await self._repeat(number, content)
                repeats += 1
            if reply.status == 202:
                await self._wait_for(step)
        return repeats

    async def _post(self, wire: Wire, number: int, content: bytes) -> Reply:
        key = f"{self._workload.name(self._worker)}-{number}"
        path = f"{self._session}/steps?worker={self._workload.name(self._worker)}"
        reply = await wire.ask("POST", path, f"Content-Type: {MEDIA}\r\nIdempotency-Key: {key}\r\n", content)
        if reply.status not in (200, 202):
            raise Broken(f"a contribution was answered {reply.status} {reply.content[:300].decode(errors='replace')}")
        return reply

    def _note(self, number: int, reply: Reply) -> int:
        """Where the contribution stands; its step."""
        if reply.headers.get("ravine-replayed"):
            raise Broken(f"contribution {number} of worker {self._worker} was taken for a repeat")
        if reply.status == 202:
            said = json.loads(reply.content)
            step, place = said["round"], said["received"]
        else:
            step = int(reply.headers["ravine-step"])
            place = self._workload.workers if self._workload.mode == "sync" else 1
        self._answers.taken.append(Taken(step, place, self._worker, number))
        return int(step)

    async def _repeat(self, number: int, content: bytes) -> None:
        wire = Wire(self._other)
        with contextlib.closing(wire):
            reply = await self._post(wire, number, content)
        if reply.headers.get("ravine-replayed") != "true":
            raise Broken(f"a repeat of contribution {number} of worker {self._worker} was taken for a new one")

    async def _wait_for(self, step: int) -> None:
        path = f"{self._session}/params?after={step - 1}&wait={WAIT_SECONDS}"
        while (reply := await self._home.ask("GET", path)).status == 304:
            pass
        if reply.status != 200 or int(reply.headers["ravine-step"]) < step:
            raise Broken(f"a long poll for step {step} was answered {reply.status}, {reply.headers}")

    def close(self) -> None:
        self._home.close()


async def verify(workload: Workload, urls: Sequence[str], session: str, taken: Sequence[Taken]) -> str:
    """What held, as a sentence. Raises Broken where something did not."""
    log = sorted(taken)
    _verify_order(workload, log)
    last = log[-1].step
    wires = [Wire(url) for url in urls]
    try:
        await _verify_counts(workload, wires[0], session, log)
        replayed = replay(workload, log).tobytes()
        for wire in wires:
            reply = await wire.ask("GET", f"{session}/params")
            if reply.status != 200 or reply.headers["ravine-step"] != str(last):
                raise Broken(f"a replica stands at step {reply.headers.get('ravine-step')}, not at {last}")
            if reply.content[len(reply.content) - 4 * workload.size :] != replayed:
                raise Broken("the parameters of a replica are not those of a serial replay")
    finally:
        for wire in wires:
            wire.close()
    return (
        f"{workload.mode}: {len(log)} contributions of {workload.workers} workers made {last} steps; none was lost, "
        f"none counted twice, and {len(urls)} replicas have the very bits of a serial replay."
    )


def _verify_order(workload: Workload, log: Sequence[Taken]) -> None:
    """Every place in the log was given to one contribution, and there is no other."""
    if len({(entry.worker, entry.number) for entry in log}) != len(log):
        raise Broken("a contribution was answered twice")
    places = workload.workers if workload.mode == "sync" else 1
    wanted = [(i // places + 1, i % places + 1) for i in range(len(log))]
    if [(entry.step, entry.place) for entry in log] != wanted:
        raise Broken("the places in the log are not each given once, without a gap")


async def _verify_counts(workload: Workload, wire: Wire, session: str, log: Sequence[Taken]) -> None:
    """The session counts for each worker what that worker sent."""
    counted: dict[str, int] = {}
    after = ""
    while True:
        reply = await wire.ask("GET", f"{session}/workers?limit={LISTED}{after}", accept=JSON)
        if reply.status != 200:
            raise Broken(f"the list of workers was answered {reply.status} {reply.content[:300].decode()}")
        page = json.loads(reply.content)
        counted |= {worker["worker"]: worker["contributions"] for worker in page["data"]}
        if not page["has_more"]:
            break
        after = f"&after={page['data'][-1]['worker']}"
    if counted != Counter(workload.name(entry.worker) for entry in log):
        raise Broken(f"the session counts {sum(counted.values())} contributions of {len(counted)} workers")


def replay(workload: Workload, log: Iterable[Taken]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """(size,): the parameters after these contributions, one after the other."""
    recipe = Recipe(Adam(), Layout({"w": [workload.size]}), aggregation=workload.aggregation)
    serial = Session.new(recipe, {"w": np.zeros(workload.size, np.float32)}, Evaluator())
    gradients = Gradients(workload.size)
    for entry in log:
        gradient = gradients.of(entry.worker, entry.number)
        serial.apply(serial.check(Contribution({"w": gradient}, worker=workload.name(entry.worker))), fresh=False)
        if workload.mode == "sync" and entry.place == workload.workers:
            serial.apply(serial.check(Closing(entry.step)), fresh=False)
    params = serial.state.params
    assert params is not None
    return params.astype(np.float32)


async def new_session(workload: Workload, url: str) -> str:
    """The path of a new session, its parameters all zeros."""
    wire = Wire(url)
    with contextlib.closing(wire):
        body = json.dumps(workload.body).encode()
        made = await wire.ask("POST", "/v1/sessions", f"Content-Type: {JSON}\r\n", body, JSON)
        if made.status != 201:
            raise Broken(f"no session was made: {made.status} {made.content[:300].decode(errors='replace')}")
        path = "/v1/sessions/" + json.loads(made.content)["id"]
        zeros = file_head(workload.size) + bytes(4 * workload.size)
        reply = await wire.ask("PUT", f"{path}/params", f"Content-Type: {MEDIA}\r\n", zeros)
        if reply.status >= 300:
            raise Broken(f"the parameters were not taken: {reply.status} {reply.content[:300].decode()}")
    return path
