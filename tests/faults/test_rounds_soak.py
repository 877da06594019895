"""Rounds of six workers through two replicas, while services and store are killed with -9 at random moments.

Each worker sends its contribution to one replica, and again to the other, until it hears of its round; then its next
one. In the end every round must have had each of the six once, with its own bits: the parameters say so, and so does
each reply on the way. What is sent can be told apart (see rounds.py), so one that is lost or doubled shows.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.faults.rounds import Serial, contribute, history, opens
from tests.running import Server, serving
from tests.wire import bits, create, params

NAMES = [f"w{i}" for i in range(6)]


class Contributor(threading.Thread):
    """Contributes to one round after the other, up to `last`, which is set while it runs."""

    def __init__(self, servers: tuple[Server, Server], session: str, index: int) -> None:
        super().__init__(daemon=True)
        self.servers, self.session, self.index, self.name = servers, session, index, NAMES[index]
        self.number, self.last = 0, 1 << 30
        self.told: dict[int, httpx.Response] = {}
        self.retries = 0
        self._clients: dict[str, httpx.Client] = {}
        self.failure: str | None = None

    def run(self) -> None:
        while self.number < self.last and self.failure is None:
            self.number += 1
            self._contribute()
        for client in self._clients.values():
            client.close()

    def _client(self, server: Server) -> httpx.Client:
        """One for each address: a service that is started again has another one."""
        if server.url not in self._clients:
            self._clients[server.url] = server.client()
        return self._clients[server.url]

    def _contribute(self) -> None:
        """The same again until the round is closed, as a worker should."""
        deadline, attempt = time.monotonic() + 120, 0
        while time.monotonic() < deadline:
            attempt += 1
            try:
                client = self._client(self.servers[(self.index + self.number + attempt) % 2])
                reply = contribute(client, self.session, self.name, self.number, wait=2)
            except httpx.TransportError:
                reply = None
            if reply is None or reply.status_code in (502, 503, 504):
                self.retries += 1
                time.sleep(0.02)
            elif reply.status_code == 200:
                self.told[self.number] = reply
                return
            elif reply.status_code != 202 or reply.json()["round"] != self.number:
                self.failure = f"{self.name} in round {self.number}: {reply.status_code} {reply.text[:500]}"
                return
        self.failure = f"{self.name}: round {self.number} is not closed within two minutes"


def kill_and_check(data: Path, aggregation: Mapping[str, Any], kills: int, seed: int, *, held: bool) -> None:
    body, draw = opens(aggregation, held=held), random.Random(seed)
    with serving(data) as first, serving(data) as second:
        servers = (first, second)
        with first.client() as client:
            session = create(client, **body)["id"]
        crowd = [Contributor(servers, session, i) for i in range(len(NAMES))]
        for contributor in crowd:
            contributor.start()
        for i in range(kills):
            time.sleep(draw.uniform(0.05, 0.5))
            if i % 3 == 2:
                os.kill(first.valkey_pid(), signal.SIGKILL)
            else:
                servers[i % 3].kill()
                servers[i % 3].restart()
            if any(contributor.failure for contributor in crowd):
                break
        last = max(contributor.number for contributor in crowd) + 1
        for contributor in crowd:
            contributor.last = last
        for contributor in crowd:
            contributor.join(180)
        assert [contributor.failure for contributor in crowd] == [None] * len(crowd)
        with first.client() as one, second.client() as other:
            assert [record["step"] for record in history(one, session)] == list(range(1, last + 1))
            workers = one.get(f"/v1/sessions/{session}/workers").json()["data"]
            finals = {bits(params(client, session)["w"]) for client in (one, other)} if held else set()
    assert {worker["worker"]: worker["contributions"] for worker in workers} == dict.fromkeys(NAMES, last)
    assert sum(contributor.retries for contributor in crowd) > 0, "no kill ever hit a request"
    check_replies(body, crowd, last, finals)


def check_replies(body: Mapping[str, Any], crowd: list[Contributor], last: int, finals: set[bytes]) -> None:
    """Against the core, given each round's contributions one after the other: whatever was told, and the end."""
    serial, expected = Serial(body), {}
    for number in range(1, last + 1):
        expected[number] = serial.round((name, number) for name in NAMES)
    given = "params" if finals else "updates"
    for contributor in crowd:
        assert list(contributor.told) == list(range(1, last + 1))
        for number, reply in contributor.told.items():
            # The next round cannot have been closed: it was still to be contributed to.
            assert reply.json()["step"] == number
            found = np.array(reply.json()[given]["w"], np.float32).tobytes()
            assert found == expected[number], f"{contributor.name} was told something else of round {number}"
    assert finals in ({expected[last]}, set())


SYNC = {"mode": "sync", "workers": len(NAMES)}


@pytest.mark.soak
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sixty_kills_in_rounds(data: Path, seed: int, held: bool) -> None:
    kill_and_check(data, SYNC, 20, seed=seed, held=held)
