"""Clients that are slow, or silent, or do not read: they are let go, and those beside them notice nothing."""

import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.http.callers import service
from tests.http.files import saved
from tests.http.sockets import connected, exchange, head_of, reply_on
from tests.running import Server
from tests.wire import create

HEAD_SECONDS, STALL_SECONDS = 1.0, 1.5
# What a loaded machine may add to a deadline before a test gives up; nothing passes by its length.
PATIENCE = 20.0

STEP = json.dumps({"gradients": {"w": [1.0, 2.0]}}).encode()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that waits for nobody for long."""
    directory = tmp_path_factory.mktemp("hasty")
    with service(directory, header_seconds=HEAD_SECONDS, stall_seconds=STALL_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def client(hasty: Server) -> Iterator[httpx.Client]:
    with hasty.client() as open_client:
        yield open_client


@pytest.fixture(scope="module")
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    return made


def until_closed(connection: socket.socket, drip: bytes = b"", seconds: float = PATIENCE) -> bytes:
    """What is said before the connection is closed, while `drip` is sent ten times a second."""
    said, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([connection], [], [], 0.1)[0]:
            try:
                piece = connection.recv(65536)
            except ConnectionResetError:
                return said
            if not piece:
                return said
            said += piece
        elif drip:
            try:
                connection.sendall(drip)
            except (BrokenPipeError, ConnectionResetError):
                drip = b""
    raise AssertionError(f"the connection is still open; it said {said!r}")


def reply_exactly(connection: socket.socket) -> tuple[int, bytes]:
    """The status and the body of the next reply, and not a byte of the one behind it."""
    status, headers = head_of(connection)
    body, length = b"", int(headers["content-length"])
    while len(body) < length:
        piece = connection.recv(length - len(body))
        assert piece, "the connection was closed in the middle of a body"
        body += piece
    return status, body


def problem_in(said: bytes) -> tuple[bytes, dict[str, object]]:
    head, _, body = said.partition(b"\r\n\r\n")
    return head, json.loads(body)


# -- heads -------------------------------------------------------------------------------------------------------------


def test_a_silent_connection_is_closed_without_a_word(hasty: Server) -> None:
    with connected(hasty) as connection:
        assert until_closed(connection) == b""


@pytest.mark.parametrize(
    ("begun", "drip"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nA: ", b"a"),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n", b"A: b\r\n"),
        (b"GET /", b"a"),
        (b"G", b""),
    ],
)
def test_a_slow_head_is_told_so_and_cut(hasty: Server, begun: bytes, drip: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(begun)
        head, document = problem_in(until_closed(connection, drip))
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert document["type"] == "/problems/request-timeout"


def test_the_deadline_of_a_second_head_begins_with_its_own_first_byte(hasty: Server) -> None:
    with connected(hasty) as connection:
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert reply_on(connection)[0] == 200
            time.sleep(HEAD_SECONDS * 0.6)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        head, _ = problem_in(until_closed(connection, b"A: b\r\n"))
    assert head.startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_was_used_may_be_silent_for_longer(hasty: Server) -> None:
    """For 75 s; what a head may take does not count."""
    with connected(hasty) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reply_on(connection)[0] == 200
        time.sleep(HEAD_SECONDS * 3)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reply_on(connection)[0] == 200


def test_empty_lines_keep_no_connection_open(hasty: Server) -> None:
    with connected(hasty) as connection:
        assert until_closed(connection, b"\r\n") == b""


def test_a_slow_head_behind_a_request_that_waits_does_not_disturb_it(hasty: Server, session: str) -> None:
    """One long poll, and the beginning of another request after it: the first is answered, then the second is told."""
    seconds = HEAD_SECONDS * 2
    with connected(hasty) as connection:
        path = f"/v1/sessions/{session}/params?after=1000000&wait={seconds}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\nGET /li".encode())
        status, headers = head_of(connection)
        assert status == 304
        assert "connection" not in headers
        head, _ = problem_in(until_closed(connection))
    assert head.startswith(b"HTTP/1.1 408 ")


# -- bodies ------------------------------------------------------------------------------------------------------------

BODIES = {
    "with its length": b"Content-Length: 100000\r\n\r\n",
    "in chunks": b"Transfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("first", [b"", b'{"gradients"'], ids=["no byte", "some bytes"])
@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("path", ["/steps", "/params", ""], ids=["steps", "params", "session"])
def test_a_body_that_stops_is_given_up(
    hasty: Server, client: httpx.Client, session: str, path: str, what: str, first: bytes
) -> None:
    method = {"/steps": "POST", "/params": "PUT", "": "PATCH"}[path]
    before = client.get(f"/v1/sessions/{session}").headers["etag"]
    with connected(hasty) as connection:
        line = f"{method} /v1/sessions/{session}{path} HTTP/1.1\r\nHost: localhost\r\n"
        line += "Content-Type: application/json\r\n"
        chunk = b"%x\r\n%s\r\n" % (len(first), first) if what == "in chunks" and first else first
        connection.sendall(line.encode() + BODIES[what] + chunk)
        head, document = problem_in(until_closed(connection))
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert document["type"] == "/problems/request-timeout"
    assert client.get(f"/v1/sessions/{session}").headers["etag"] == before


def test_a_long_body_has_no_longer_for_its_first_bytes(hasty: Server, session: str) -> None:
    """It was announced to be of 500 MB, which at the slowest pace would be two hours."""
    with connected(hasty) as connection:
        lines = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 500000000\r\n\r\n"
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode())
        head, _ = problem_in(until_closed(connection, b" "))
    assert head.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_steadily_may_take_longer(hasty: Server, session: str) -> None:
    """At twice the slowest pace, for longer than it might have stood still."""
    pieces = int(STALL_SECONDS * 2 / 0.1)
    body = STEP + b" " * (pieces * (128 << 10) // 10)
    size = -(-len(body) // pieces)
    with connected(hasty) as connection:
        lines = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode())
        for start in range(0, len(body), size):
            connection.sendall(body[start : start + size])
            time.sleep(0.1)
        assert reply_on(connection)[0] == 200


def test_who_asks_before_it_sends_is_asked_for_the_body_and_given_up(hasty: Server, session: str) -> None:
    with connected(hasty) as connection:
        lines = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
        lines += "Expect: 100-continue\r\n\r\n"
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode())
        assert head_of(connection)[0] == 100
        head, _ = problem_in(until_closed(connection))
    assert head.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_nobody_wants_does_not_hold_the_connection(hasty: Server) -> None:
    """A short one is read, and the connection goes on; a long one ends it, with the reply read first."""
    with connected(hasty) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert reply_on(connection)[0] == 404
        connection.sendall(b"x" * 1000 + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reply_on(connection)[0] == 200
    with connected(hasty) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\n")
        said = until_closed(connection, b"x" * 1000)
        assert said.startswith(b"HTTP/1.1 404 ")
        assert b"connection: close" in said


# -- replies -----------------------------------------------------------------------------------------------------------

LARGE = 8_000_000  # floats: more than any kernel buffers


@pytest.fixture(scope="module")
def large(client: httpx.Client) -> str:
    """The path of 32 MB."""
    made: str = create(client, optimizer="sgd", shapes={"w": [LARGE]})["id"]
    file = saved({"w": np.zeros(LARGE, np.float32)})
    reply = client.put(
        f"/v1/sessions/{made}/params", content=file, headers={"Content-Type": "application/vnd.safetensors"}
    )
    assert reply.status_code == 200
    return f"/v1/sessions/{made}/params"


def test_a_client_that_does_not_read_is_cut(hasty: Server, large: str) -> None:
    with connected(hasty) as connection:
        lines = "Host: localhost\r\nAccept: application/vnd.safetensors\r\n\r\n"
        connection.sendall(f"GET {large} HTTP/1.1\r\n{lines}".encode())
        status, headers = head_of(connection)
        assert status == 200
        wait_until_dropped(hasty, connection)
        assert left_over(connection) < int(headers["content-length"])


def test_a_client_that_reads_slowly_gets_all_of_it(hasty: Server, large: str) -> None:
    """For longer than it might stand still, a little at a time."""
    with connected(hasty) as connection:
        lines = "Host: localhost\r\nAccept: application/vnd.safetensors\r\n\r\n"
        connection.sendall(f"GET {large} HTTP/1.1\r\n{lines}".encode())
        _, headers = head_of(connection)
        left, slow_until = int(headers["content-length"]), time.monotonic() + STALL_SECONDS * 3
        while left:
            piece = connection.recv(min(left, 1 << 20))
            assert piece, f"closed with {left} bytes to come"
            left -= len(piece)
            if time.monotonic() < slow_until:
                time.sleep(0.2)


def test_a_client_that_sends_much_and_reads_nothing_is_cut(hasty: Server) -> None:
    """Small replies, so many that they fill the buffers."""
    with connected(hasty) as connection:
        assert is_cut(connection, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")


def is_cut(connection: socket.socket, request: bytes) -> bool:
    """Sends `request` over and over, and reads nothing, until that ends with an error."""
    connection.settimeout(0.5)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            connection.sendall(request)
            time.sleep(0.001)
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def left_over(connection: socket.socket) -> int:
    """Bytes that still come before the end, be it a reset."""
    received = 0
    try:
        while piece := connection.recv(1 << 20):
            received += len(piece)
    except ConnectionError:
        pass
    return received


def wait_until_dropped(server: Server, connection: socket.socket) -> None:
    """Until the server holds the connection no more, whatever is in the kernel for it."""
    port = connection.getsockname()[1]
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not held(server, port):
            return
        time.sleep(0.1)
    raise AssertionError("the server still holds the connection")


def held(server: Server, port: int) -> bool:
    """Whether the server's side is established, by the kernel's own table (proc(5))."""
    ours = int(server.url.rpartition(":")[2])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ends = [int(field.rpartition(":")[2], 16) for field in fields[1:3]]
        if ends == [ours, port]:
            return fields[3] == "01"
    return False


# -- requests that are read in one way alone ---------------------------------------------------------------------------

LENGTH = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(STEP)
NEXT = b"GET /problems/overloaded HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\nHost: localhost\n\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost : x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: identity\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\naX\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000001\r\na\r\n0\r\n\r\n",
    ],
    ids=range(20),
)
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(hasty: Server, request_: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(request_ + NEXT)
        head, document = problem_in(until_closed(connection))
    assert head.startswith(b"HTTP/1.1 400 ")
    assert document["type"] == "/problems/malformed-request"


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param((b"5;", b"a" * 65536), id="an extension"),
        pytest.param((b"", b"1;" + b"a" * 1000 + b"\r\nx\r\n"), id="extensions"),
        pytest.param((b"0\r\nA: ", b"a" * 65536), id="a trailer"),
        pytest.param((b"0\r\n", b"A: b\r\n" * 10_000), id="trailers"),
    ],
)
def test_chunks_with_more_around_them_than_in_them_are_refused(
    hasty: Server, session: str, flood: tuple[bytes, bytes]
) -> None:
    lines = "Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(hasty) as connection:
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode() + flood[0])
        for _ in range(1000):
            try:
                connection.sendall(flood[1])
            except ConnectionError:
                break
            if select.select([connection], [], [], 0)[0]:
                break
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")


def test_chunks_of_one_byte_are_fine(hasty: Server, session: str) -> None:
    lines = "Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in STEP.ljust(100_000))
    request = f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode() + chunks + b"0\r\n\r\n"
    assert exchange(hasty, request)[0] == 200


def test_a_trailer_is_no_header(hasty: Server, session: str) -> None:
    lines = "Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b'%x\r\n%s\r\n0\r\nIf-Match: "999"\r\nX-Request-Id: trailer\r\n\r\n' % (len(STEP), STEP)
    status, headers, _ = exchange(hasty, f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode() + body)
    assert status == 200
    assert headers["x-request-id"] != "trailer"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 5_000_000,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 5_000_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 100 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 1_000_000,
    ],
    ids=["a header", "a header without end", "a path", "a path without end", "headers", "headers without end"],
)
def test_a_head_that_is_too_large_is_refused(hasty: Server, head: bytes) -> None:
    with connected(hasty) as connection:
        for start in range(0, len(head), 100_000):
            try:
                connection.sendall(head[start : start + 100_000])
            except ConnectionError:
                break
        said, document = problem_in(until_closed(connection))
    assert said.startswith(b"HTTP/1.1 431 ")
    assert document["type"] == "/problems/head-too-large"


def test_a_head_of_the_largest_size_is_fine(hasty: Server) -> None:
    head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 98 + b"B: " + b"b" * 64_000 + b"\r\n\r\n"
    assert exchange(hasty, head)[0] == 200


# -- what is asked for and not given -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["websocket", "h2c", "TLS/1.0, nonsense"])
def test_a_request_to_upgrade_is_answered_as_if_it_had_not_asked(hasty: Server, session: str, protocol: str) -> None:
    """Its body is a body, and what follows is the next request."""
    upgrade = f"Connection: Upgrade\r\nUpgrade: {protocol}\r\n".encode()
    step = b"POST /v1/sessions/%s/steps HTTP/1.1\r\nHost: localhost\r\n" % session.encode()
    with connected(hasty) as connection:
        step += upgrade + LENGTH + b"\r\n" + STEP
        connection.sendall(step + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + upgrade)
        assert reply_exactly(connection)[0] == 200
        connection.sendall(b"\r\nGET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reply_exactly(connection)[0] == 200
        assert reply_exactly(connection)[0] == 404


@pytest.mark.parametrize("connection_header", [b"", b"Connection: keep-alive\r\n"])
def test_http_1_0_is_answered_and_closed(hasty: Server, connection_header: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n" + connection_header + b"\r\n")
        said = until_closed(connection)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in said


# -- pipelining --------------------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(hasty: Server) -> None:
    paths = [f"/v1/optimizers/{kind}" if kind else "/nothing" for kind in ("adam", "", "sgd")] * 60
    with connected(hasty) as connection:
        connection.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode() for path in paths))
        for path in paths:
            status, body = reply_exactly(connection)
            assert status == (404 if path == "/nothing" else 200)
            assert path.rpartition("/")[2] in body.decode()


def test_what_was_asked_for_before_garbage_is_answered(hasty: Server) -> None:
    with connected(hasty) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3 + b"nonsense\r\n\r\n")
        assert [reply_exactly(connection)[0] for _ in range(4)] == [200, 200, 200, 400]
        assert until_closed(connection) == b""


def test_of_very_many_pipelined_requests_a_part_is_answered_and_then_the_connection_ends(hasty: Server) -> None:
    """Those that were not answered are the client's to send again."""
    with connected(hasty) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000)
        said = until_closed(connection)
    answered = said.count(b"HTTP/1.1 200 OK")
    assert 1 <= answered < 5000
    assert said.count(b"HTTP/1.1 ") == answered


def test_a_client_that_goes_while_requests_are_pipelined_ends_its_event_stream(
    hasty: Server, client: httpx.Client
) -> None:
    made = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    with connected(hasty) as connection:
        path = f"/v1/sessions/{made}/events"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 2)
        assert head_of(connection)[0] == 200
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, and no goodbye
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        client.post(f"/v1/sessions/{made}/steps", content=STEP, headers={"Content-Type": "application/json"})
        if hasty.valkey("PUBSUB", "NUMSUB", f"ravine:{{{made}}}").rstrip("]").endswith(", 0"):
            return
        time.sleep(0.1)
    raise AssertionError("the stream is still open")
