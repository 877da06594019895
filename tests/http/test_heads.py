"""Requests one behind the other: what is wrong with one of them is no other's business."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.http.callers import service
from tests.http.sockets import await_listeners, connected, head_of, reply_on
from tests.http.test_slow import HEAD_SECONDS, PATIENCE, problem_in, reply_exactly, until_closed
from tests.running import Server
from tests.wire import create

LIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with service(tmp_path_factory.mktemp("hasty"), header_seconds=HEAD_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def client(hasty: Server) -> Iterator[httpx.Client]:
    with hasty.client() as open_client:
        yield open_client


@pytest.fixture(scope="module")
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    return made


@pytest.mark.parametrize("target", [b"http://x:999999/", b"/\xff"])
def test_a_bad_target_destroys_no_request_before_it(hasty: Server, session: str, target: bytes) -> None:
    poll = f"GET /v1/sessions/{session}/params?after=1000000&wait=0.5 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with connected(hasty) as connection:
        connection.sendall(LIVE + poll + b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
        assert reply_exactly(connection)[0] == 200
        assert head_of(connection)[0] == 304
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")


def test_a_head_behind_a_long_body_is_as_long_as_it_is(hasty: Server, session: str) -> None:
    """All that came together was taken for the head."""
    body = b'{"gradients": {"w": [1.0, 2.0]}}'.ljust(45_000)
    lines = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(hasty) as connection:
        connection.sendall(LIVE)
        assert reply_exactly(connection)[0] == 200
        os.kill(hasty.pid, signal.SIGSTOP)  # so that it reads as much as it can at a time
        try:
            connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode() + body + LIVE[:-4])
        finally:
            os.kill(hasty.pid, signal.SIGCONT)
        assert reply_exactly(connection)[0] == 200
        for more in (b"\r\nA: ", b"a" * 30_000):
            connection.sendall(more)
            time.sleep(0.1)
        connection.sendall(b"\r\n\r\n")
        assert reply_exactly(connection)[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nConnection: close\r\nUpgrade: h2c\r\n\r\n",
        b"GET /livez HTTP/1.0\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_a_request_to_upgrade_and_to_close_is_answered(hasty: Server, head: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(head)
        said = until_closed(connection)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.count(b"HTTP/1.1 ") == 1


def test_what_was_answered_early_is_answered_once(hasty: Server) -> None:
    """The body that nobody wanted goes wrong: there is nobody to tell."""
    with connected(hasty) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED)
        assert reply_exactly(connection)[0] == 404
        connection.sendall(b"nonsense\r\n")
        assert until_closed(connection) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/0.9\r\nHost: localhost\r\n\r\n",
        b"POST /nothing HTTP/1.0\r\nHost: localhost\r\n" + CHUNKED + b"0\r\n\r\n",
    ],
)
def test_versions_that_are_not_spoken_are_refused(hasty: Server, head: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(head)
        said, document = problem_in(until_closed(connection))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert document["type"] == "/problems/malformed-request"


def test_who_speaks_1_0_is_not_asked_for_its_body(hasty: Server, session: str) -> None:
    body = b'{"gradients": {"w": [1.0, 2.0]}}'
    lines = f"Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(hasty) as connection:
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.0\r\nHost: localhost\r\n{lines}".encode())
        time.sleep(0.1)
        connection.sendall(body)
        assert reply_on(connection)[0] == 200


@pytest.mark.parametrize("resource", ["events", "params?after=1000000&wait=60"])
def test_who_goes_is_noticed_though_more_was_asked_for(hasty: Server, client: httpx.Client, resource: str) -> None:
    """By the reading alone: nothing is written meanwhile."""
    made = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    request = f"GET /v1/sessions/{made}/{resource} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with connected(hasty) as connection:
        connection.sendall(request)
        await_listeners(hasty, made, 1)
        for _ in range(3):
            connection.sendall(LIVE)
            time.sleep(0.05)
    await_listeners(hasty, made, 0)


def test_much_that_is_sent_behind_a_request_that_waits_is_not_read(hasty: Server, client: httpx.Client) -> None:
    made = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    with connected(hasty) as connection:
        connection.sendall(f"GET /v1/sessions/{made}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await_listeners(hasty, made, 1)
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000000\r\n\r\n")
        connection.settimeout(1.0)
        deadline, stuck_at = time.monotonic() + PATIENCE, None
        while stuck_at is None:
            assert time.monotonic() < deadline, "all of it is read"
            with contextlib.suppress(TimeoutError):
                connection.sendall(b"x" * 1_000_000)
                continue
            stuck_at = time.monotonic()
