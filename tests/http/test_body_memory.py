"""What bodies that come slowly, or not at all, take of memory: no more than is counted."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.http.sockets import connected
from tests.http.test_overload import begun, posted
from tests.running import Server, serving
from tests.wire import create

# What a connection holds whoever counts its body: one read of uvloop's (256 KiB), and as much as uvicorn lets wait.
HELD = 320 << 10


def memory(pid: int) -> int:
    """Bytes resident now."""
    found = re.search(r"^VmRSS:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Bodies of 32 MiB, 64 MiB at once."""
    settings = {"RAVINE_MAX_BODY": "32MiB", "RAVINE_MAX_BODIES": "64MiB", "RAVINE_JIT": "false"}
    with serving(tmp_path_factory.mktemp("bounded") / "data", environment=settings) as server:
        yield server


@pytest.mark.parametrize(
    ("clients", "sent"),
    [
        (150, 2 << 20),  # 300 MiB came
        (100, 64 << 10),  # a little of each; huge pages for all of them would be 200 MiB
    ],
)
def test_memory_stays_flat_under_many_slow_bodies(bounded: Server, clients: int, sent: int) -> None:
    with bounded.client() as client:
        session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    before = memory(bounded.pid)
    piece = b" " * sent
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(clients):
            connection = stack.enter_context(connected(bounded))
            connections.append(connection)
            with contextlib.suppress(ConnectionError):  # refused meanwhile
                begun(connection, session, 32 << 20, piece)
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b" ")
        assert httpx.get(f"{bounded.url}/livez").status_code == 200
        grown = memory(bounded.pid) - before
    assert grown < (64 << 20) + clients * HELD, f"{grown >> 20} MiB"


def test_memory_that_is_used_again_counts(bounded: Server) -> None:
    """A body that is announced takes no memory before it comes; but in memory of one before it, it has all at once."""
    with bounded.client() as client:
        session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
        before, size, rounds = memory(bounded.pid), 31 << 20, 12
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(connected(bounded)) for _ in range(rounds)]
            for connection in slow:
                posted(client, session, b" " * size)
                begun(connection, session, size, b" " * (700 << 10))
                time.sleep(0.1)
            grown = memory(bounded.pid) - before
    # What is counted, what is there of the others, and a body that was let go a moment ago.
    assert grown < (64 << 20) + rounds * (2 << 20) + (32 << 20), f"{grown >> 20} MiB"
