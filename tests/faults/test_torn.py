"""Logs that end early: what is left is whole, what was acknowledged and is gone is told of."""

import os
import random
import signal
from pathlib import Path

import numpy as np

from service.valkey import try_lock
from tests.faults.nursery import Replica
from tests.faults.outages import log_of, torn_embedded_logs, torn_logs
from tests.faults.stores import until
from tests.nursery import shared
from tests.wire import bits, create, params, step


def test_under_services_that_live(tmp_path: Path) -> None:
    found = torn_logs(tmp_path, seed=1, times=3)
    assert not any(found.outcome[2:]), found.notes
    assert found.outcome.injected == 3
    assert found.gone > 0


def test_of_the_embedded_store(tmp_path: Path) -> None:
    found = torn_embedded_logs(tmp_path, seed=4, times=2)
    assert not any(found.outcome[2:]), found.notes
    assert found.outcome.injected == 2


def begin_commit(data: Path, draw: random.Random) -> None:
    """Puts the beginning of a commit at the end of the log, as a machine leaves it that lost power meanwhile."""
    path = log_of(data)
    written = path.read_bytes()
    last = written[written.rindex(b"*1\r\n$5\r\nMULTI") :]
    with path.open("ab") as log:
        log.write(last[: draw.randrange(1, len(last))])


def test_within_a_commit_that_nobody_was_told_of(tmp_path: Path) -> None:
    """All else is there, and nothing of that commit: it goes on with the bits of a run in which nothing happened."""
    draw, told = random.Random(5), []
    server = Replica(shared(), tmp_path / "data").start()
    try:
        with server.client() as client:
            body = {"optimizer": "adam", "params": {"w": [1.0] * 64}}
            torn, whole = (create(client, **body)["id"] for _ in range(2))
        for t in range(1, 6):
            g = {"w": np.random.default_rng(t).standard_normal(64).astype(np.float32)}
            with server.client() as client:
                assert step(client, whole, g).status_code == 200
                reply = step(client, torn, g)
                assert (reply.status_code, reply.headers["ravine-step"]) == (200, str(t))
                told.append(reply.headers["etag"])
            pid = server.valkey_pid()
            server.kill()
            os.kill(pid, signal.SIGKILL)
            with (server.data / "valkey.alive").open() as alive:
                until(lambda: try_lock(alive.fileno()), "the store is gone")
            begin_commit(server.data, draw)
            server.restart()
            with server.client() as client:
                assert client.get(f"/v1/sessions/{torn}/params").headers["etag"] == told[-1]
                assert bits(params(client, torn)["w"]) == bits(params(client, whole)["w"])
    finally:
        server.stop()
