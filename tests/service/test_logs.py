"""The log where it cannot be written: its lines are lost, and nothing else."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import httpx
import numpy as np
import pytest
import structlog

from service import logs
from service.valkey import try_lock
from tests.running import START_SECONDS, Server, quiet
from tests.wire import create, step

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")


@pytest.fixture
def full() -> Iterator[TextIO]:
    stream = Path("/dev/full").open("w")  # noqa: SIM115 - closing may fail, as all that flushes it does
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


@pytest.mark.parametrize("form", ["text", "json"])
def test_who_writes_a_line_goes_on(full: TextIO, form: str) -> None:
    logs.configure(form, full)  # type: ignore[arg-type]
    try:
        structlog.get_logger("test").warning("nobody will read this")
        try:
            int("nor this")
        except ValueError:
            structlog.get_logger("test").exception("it broke")
    finally:
        structlog.reset_defaults()


def test_lines_that_cannot_be_written_are_not_kept(full: TextIO) -> None:
    async def scenario() -> None:
        access = logs.AccessLog("text", full)
        for _ in range(3):
            for _ in range(1000):
                access.write("GET", "/livez", 200, 0.001, "id")
            await asyncio.sleep(2 * logs.FLUSH_SECONDS)
            assert access._lines == []

    asyncio.run(scenario())


class Silent(Server):
    """Its standard error is full, so that it cannot say where it listens."""

    def start(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--data", str(self.data)]
        with Path("/dev/full").open("w") as full:
            self.process = subprocess.Popen(command, env=quiet() | self._environment, stderr=full, text=True)
        self.url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        with self.client() as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/livez").status_code == 200:
                        return self
                time.sleep(0.05)
        raise AssertionError("the server did not start")


def test_a_service_goes_on_and_starts_its_store_again(data: Path) -> None:
    server = Silent(data, environment={"RAVINE_JIT": "false"}).start()
    try:
        with server.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
            for number in range(1, 3):
                os.kill(server.valkey_pid(), signal.SIGKILL)
                assert stepped(client, session).headers["ravine-step"] == str(number)
        server.stop()
        with (data / "valkey.alive").open() as alive:
            assert try_lock(alive.fileno())  # it stopped in order, and its store with it
    finally:
        server.stop()


def stepped(client: httpx.Client, session: str) -> httpx.Response:
    deadline = time.monotonic() + 30
    while (reply := step(client, session, {"w": np.ones(1, np.float32)})).status_code != 200:
        assert reply.status_code == 503, reply.text
        assert time.monotonic() < deadline, "the store is not started again"
        time.sleep(0.1)
    return reply
