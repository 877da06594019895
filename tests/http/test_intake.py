"""Bodies of more than a megabyte, which are read past the parser: what goes before them, after them, and wrong."""

import json
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from tests.http.callers import service
from tests.http.files import saved
from tests.http.sockets import connected
from tests.http.test_slow import problem_in, reply_exactly, until_closed
from tests.running import Server
from tests.wire import create

STALL_SECONDS = 1.5
JSON = {"Content-Type": "application/json"}
LIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
STEP = json.dumps({"gradients": {"w": [1.0, 2.0]}}).encode()
LONG = STEP + b" " * (5 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Bodies of 6 MiB, two at a time, which may stand still for a moment."""
    limits = {"max_body": "6MiB", "max_bodies": "12MiB"}
    with service(tmp_path_factory.mktemp("intake"), stall_seconds=STALL_SECONDS, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client


@pytest.fixture(scope="module")
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    return made


def head(session: str, length: int, *more: str) -> bytes:
    first = f"POST /v1/sessions/{session}/steps HTTP/1.1"
    lines = [first, "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_every_byte_arrives_in_its_place(client: httpx.Client) -> None:
    values = np.random.default_rng(3).standard_normal(1_300_003).astype(np.float32)
    session = create(client, optimizer="sgd", shapes={"w": [values.size]})["id"]
    sent = {"Content-Type": "application/vnd.safetensors"}
    assert client.put(f"/v1/sessions/{session}/params", content=saved({"w": values}), headers=sent).status_code == 200
    read = client.get(f"/v1/sessions/{session}/params", headers={"Accept": "application/vnd.safetensors"})
    assert read.content.endswith(values.tobytes())


def test_what_follows_a_long_body_is_read_as_the_next_request(server: Server, session: str) -> None:
    request = head(session, len(LONG)) + LONG
    with connected(server) as connection:
        connection.sendall(request + LIVE + request + LIVE)
        assert [reply_exactly(connection)[0] for _ in range(4)] == [200] * 4
        connection.sendall(request)
        assert reply_exactly(connection)[0] == 200


@pytest.mark.parametrize("size", [700 << 10, (1 << 20) + 1, 2 << 20, (2 << 20) + 1, 4 << 20])
def test_bodies_of_all_sizes_end_where_they_end(server: Server, session: str, size: int) -> None:
    body = STEP.ljust(size)
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(head(session, size) + body[:-1])
            time.sleep(0.05)
            connection.sendall(body[-1:] + LIVE)
            assert [reply_exactly(connection)[0] for _ in range(2)] == [200, 200]


def test_a_client_that_means_to_close_is_answered_and_closed(server: Server, session: str) -> None:
    with connected(server) as connection:
        connection.sendall(head(session, len(LONG), "Connection: close") + LONG)
        assert until_closed(connection).startswith(b"HTTP/1.1 200 ")


def test_a_long_body_that_stops_is_given_up(server: Server, client: httpx.Client, session: str) -> None:
    before = client.get(f"/v1/sessions/{session}").headers["etag"]
    with connected(server) as connection:
        connection.sendall(head(session, len(LONG)) + LONG[: 520 << 10])  # which is 8 s at the slowest pace
        said, document = problem_in(until_closed(connection))
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in said
    assert document["type"] == "/problems/request-timeout"
    assert client.get(f"/v1/sessions/{session}").headers["etag"] == before


def test_a_long_body_that_comes_steadily_may_take_longer(server: Server, session: str) -> None:
    with connected(server) as connection:
        connection.sendall(head(session, len(LONG)) + LONG[: 4 << 20])
        rest, pieces = LONG[4 << 20 :], int(STALL_SECONDS * 2 / 0.1)
        size = -(-len(rest) // pieces)
        for start in range(0, len(rest), size):
            connection.sendall(rest[start : start + size])
            time.sleep(0.1)
        assert reply_exactly(connection)[0] == 200


def test_what_there_is_no_room_for_is_refused_in_the_middle(server: Server, session: str) -> None:
    """Of 12 MiB one body has 6, another 4, and the third all that is left."""
    with connected(server) as first, connected(server) as second, connected(server) as third:
        for connection, sent in ((first, len(LONG) - 1), (second, 3 << 20), (third, len(LONG) - 1)):
            connection.sendall(head(session, len(LONG)) + LONG[:sent])
            time.sleep(0.2)
        said, _ = problem_in(until_closed(third))
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in said
        for connection, sent in ((first, len(LONG) - 1), (second, 3 << 20)):
            connection.sendall(LONG[sent:])
            assert reply_exactly(connection)[0] == 200


def test_a_client_that_goes_in_the_middle_leaves_nothing(server: Server, client: httpx.Client, session: str) -> None:
    before = client.get(f"/v1/sessions/{session}").headers["etag"]
    for _ in range(8):  # of which three would fill the room that there is
        with connected(server) as connection:
            connection.sendall(head(session, len(LONG)) + LONG[: 4 << 20])
    headers, deadline = JSON | {"If-Match": before}, time.monotonic() + 20
    while client.post(f"/v1/sessions/{session}/steps", content=LONG, headers=headers).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    after = client.get(f"/v1/sessions/{session}").headers["ravine-step"]
    assert int(after) == int(before.strip('"').partition("-")[0]) + 1
