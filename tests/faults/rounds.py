"""Rounds seen from outside: contributions that can be told apart in what comes of them, and a log that is read back.

A gradient here is a multiple of 2**-10 below 4, so float32 sums of a few hundred of them are exact: what a round comes
to does not depend on the order in which it was contributed to, and shows every contribution that is missing or doubled.
"""

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx
import numpy as np
import redis
import safetensors.numpy

from core.contributions import Closing, Contribution
from core.evaluate import Evaluator
from core.session import Session
from service import live as files
from service import schemas
from service.index import DEADLINES
from service.records import LogEntry
from service.store import Store, key
from tests.running import Server
from tests.wire import SAFETENSORS

Array: TypeAlias = np.ndarray
SIZE = 17
OPTIMIZER = {"kind": "adam", "lr": {"kind": "cosine", "init": 0.1, "steps": 500}}
PATIENCE = 20.0  # seconds in which what is to happen has happened, on any machine


def gradient(worker: str, number: int, size: int = SIZE) -> Array:
    """What `worker` sends as its contribution `number`."""
    seed = (*worker.encode(), 256 + number)
    return (np.random.default_rng(seed).integers(-4095, 4096, size) / 1024).astype(np.float32)


def opens(aggregation: Mapping[str, Any], *, held: bool = True, size: int = SIZE) -> dict[str, Any]:
    """The body that makes a session."""
    tensors = {"params": {"w": [1.0] * size}} if held else {"shapes": {"w": [size]}}
    return {"optimizer": OPTIMIZER, "aggregation": dict(aggregation), **tensors}


def contribute(
    client: httpx.Client, session: str, worker: str, number: int, *, wait: float = 0, keyed: bool = True
) -> httpx.Response:
    """Contribution `number` of `worker`, under a key that says so, whatever its outcome. What is given out is JSON."""
    headers = SAFETENSORS | {"Accept": "application/json"}
    if keyed:
        headers["Idempotency-Key"] = f"{worker} {number}"
    if wait:
        headers["Prefer"] = f"wait={wait}"
    body = safetensors.numpy.save({"w": gradient(worker, number)})
    return client.post(f"/v1/sessions/{session}/steps", params={"worker": worker}, content=body, headers=headers)


def history(client: httpx.Client, session: str) -> list[dict[str, Any]]:
    """The steps so far. It is read in the store: it makes no service load the session, or look at its round."""
    found: list[dict[str, Any]] = client.get(f"/v1/sessions/{session}/history", params={"limit": 10_000}).json()["data"]
    return found


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives as soon as it is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come about")


# -- a serial replay ---------------------------------------------------------------------------------------------------


def log_of(url: str, session: str) -> list[LogEntry]:
    """All entries of a session whose log was never cut."""

    async def read() -> list[LogEntry]:
        store = Store(url)
        await store.open()
        try:
            tail = await store.tail(session, -1)
        finally:
            await store.close()
        assert tail is not None
        assert tail.entries is not None
        assert tail.head.base == 0, "the log was cut"
        return tail.entries

    return asyncio.run(read())


def opened_at(entries: Iterable[LogEntry]) -> list[float]:
    """When the first contribution of each round was taken in, in Unix seconds, by the replica that did."""
    found, opens_round = [], True
    for entry in entries:
        if opens_round:
            found.append(float(entry.metadata["at"]))
        opens_round = entry.metadata["kind"] == "close"
    return found


class Serial:
    """The core alone, to which contributions are given one after the other."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        document, held = schemas.parse_create(body)
        self.session = Session.new(document.recipe, held, Evaluator())

    @property
    def params(self) -> bytes:
        assert self.session.state.params is not None
        return self.session.state.params.tobytes()

    def replay(self, entries: Iterable[LogEntry]) -> bytes:
        """What the log comes to."""
        for entry in entries:
            read, document = files.entry_of(entry, schemas.document_of)
            assert document is None
            self.session.apply(self.session.check(read))
        return self.params

    def round(self, contributions: Iterable[tuple[str, int]]) -> bytes:
        """A whole round of contributions (worker, number): the parameters, or the updates where a client holds them."""
        for worker, number in contributions:
            self.session.apply(self.session.check(Contribution({"w": gradient(worker, number)}, worker=worker)))
        outcome = self.session.apply(self.session.check(Closing(self.session.state.step + 1)), want_updates=True)
        if self.session.state.params is None:
            assert outcome.updates is not None
            return outcome.updates.tobytes()
        return self.params

    def step(self, worker: str, number: int) -> bytes:
        """A contribution that is a step by itself."""
        self.session.apply(self.session.check(Contribution({"w": gradient(worker, number)}, worker=worker)))
        return self.params


def check_log(url: str, session: str, body: Mapping[str, Any], sent: Iterable[tuple[str, int]], final: bytes) -> None:
    """Each contribution of `sent` is in the log once, with its own bits, nothing else is, and it comes to `final`."""
    entries = log_of(url, session)
    found = {entry.metadata["key"]: entry.tensors["w"].tobytes() for entry in entries if "key" in entry.metadata}
    assert found == {f"{worker} {number}": gradient(worker, number).tobytes() for worker, number in sent}
    assert len(found) == sum(entry.metadata["kind"] == "step" for entry in entries)
    assert Serial(body).replay(entries) == final


# -- a service that is killed between itself and its store -------------------------------------------------------------


class Snare:
    """A proxy on a TCP port before a store on a unix socket; it kills a service that sends what was waited for."""

    def __init__(self, store: str) -> None:
        self._path = urlsplit(store).path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._raw = redis.Redis.from_url(store)
        self._marker = b""
        self._spring: Callable[[Callable[[], None]], None] | None = None
        self.sprung = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self._raw.close()

    def commit(self, session: str) -> bytes | None:
        """Where the session stands in the store."""
        found: bytes | None = self._raw.hget(key(session, "head"), "commit")
        return found

    def enter_deadline(self, session: str, round_: int, due: float) -> None:
        """As a replica does before its contribution is in the log."""
        self._raw.zadd(DEADLINES, {f"{session} {round_}": due})

    def set(self, server: Server, session: str, marker: bytes, *, after: bool, forgotten: bool) -> None:
        """Kills `server` when `marker` comes by: before the store has it, or, `after`, once the session has moved.

        `forgotten`: no deadline is known in the store then, so that no other replica acts of its own accord.
        """
        before = self.commit(session)

        def spring(forward: Callable[[], None]) -> None:
            if after:
                forward()
                until(lambda: self.commit(session) != before)
            if forgotten:
                self._raw.delete(DEADLINES)
            server.kill()
            self.sprung.set()

        self.sprung.clear()
        self._marker, self._spring = marker, spring

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            store = socket.socket(socket.AF_UNIX)
            store.connect(self._path)
            caught = threading.Event()
            threading.Thread(target=self._ask, args=(client, store, caught), daemon=True).start()
            threading.Thread(target=self._answer, args=(client, store, caught), daemon=True).start()

    def _ask(self, client: socket.socket, store: socket.socket, caught: threading.Event) -> None:
        last = b""
        with contextlib.suppress(OSError):
            while piece := client.recv(1 << 16):
                marker, spring = self._marker, self._spring
                if spring is not None and marker in last + piece:
                    self._spring = None
                    caught.set()
                    spring(functools.partial(store.sendall, piece))
                    break
                last = (last + piece)[-max(len(marker) - 1, 1) :]
                store.sendall(piece)
        store.close()

    def _answer(self, client: socket.socket, store: socket.socket, caught: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while piece := store.recv(1 << 16):
                if not caught.is_set():  # who was caught hears nothing more
                    client.sendall(piece)
        client.close()


@contextlib.contextmanager
def snare(store: str) -> Iterator[Snare]:
    made = Snare(store)
    try:
        yield made
    finally:
        made.close()
