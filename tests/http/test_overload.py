"""More than the service takes at once: refused early, with what was let in going on; and memory stays flat."""

import contextlib
import gzip
import json
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.admission import FLOOR
from tests.http.refusals import refused, unchanged
from tests.http.sockets import await_listeners, connected, head_of, reply_on
from tests.running import Server, serving
from tests.wire import create

STEP = json.dumps({"gradients": {"w": [1.0, 2.0]}}).encode()
JSON = {"Content-Type": "application/json"}
PATIENCE = 20.0

CONNECTIONS, REQUESTS, WAITS, BODY, BODIES = 24, 6, 3, 1 << 20, 3 << 20
LARGE = STEP.ljust(BODY)
SETTINGS = {
    "RAVINE_MAX_CONNECTIONS": str(CONNECTIONS),
    "RAVINE_MAX_REQUESTS": str(REQUESTS),
    "RAVINE_MAX_WAITS": str(WAITS),
    "RAVINE_MAX_BODY": str(BODY),
    "RAVINE_MAX_BODIES": str(BODIES),
    "RAVINE_JIT": "false",
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that takes little at once."""
    with serving(tmp_path_factory.mktemp("narrow") / "data", environment=SETTINGS) as server:
        yield server


@pytest.fixture
def client(narrow: Server) -> Iterator[httpx.Client]:
    with narrow.client() as open_client:
        yield open_client


@pytest.fixture
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    return made


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)


def begun(connection: socket.socket, session: str, length: int, sent: bytes) -> None:
    """A step whose body is not whole."""
    lines = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode() + sent)


def answered(reply: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, Any]]:
    status, headers, body = reply
    if status == 503:
        assert headers["content-type"] == "application/problem+json"
        assert int(headers["retry-after"]) >= 1
    return status, json.loads(body)


# -- requests ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def crowd(server: Server, session: str, size: int) -> Iterator[list[socket.socket]]:
    """So many steps are sent, while the store takes none."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(size)]
        server.valkey("CLIENT", "PAUSE", "60000", "WRITE")
        stack.callback(server.valkey, "CLIENT", "UNPAUSE")
        for connection in connections:
            begun(connection, session, len(STEP), STEP)
        yield connections


@contextlib.contextmanager
def full(server: Server, session: str) -> Iterator[list[socket.socket]]:
    """As many requests in flight as there may be, until the store takes writes again."""
    with crowd(server, session, REQUESTS) as connections:
        eventually(lambda: probe(server) == 503)
        yield connections


def probe(server: Server) -> int:
    return httpx.get(f"{server.url}/v1/optimizers/adam").status_code


def test_requests_beyond_the_limit_are_refused_and_the_others_go_on(
    narrow: Server, client: httpx.Client, session: str
) -> None:
    with full(narrow, session) as connections:
        for method, path, body in (
            ("GET", f"/v1/sessions/{session}", None),
            ("GET", f"/v1/sessions/{session}/params", None),
            ("POST", f"/v1/sessions/{session}/steps", STEP),
            ("POST", "/v1/sessions", b'{"optimizer": "sgd", "shapes": {"w": [1]}}'),
            ("DELETE", f"/v1/sessions/{session}", None),
            ("GET", "/nothing", None),
        ):
            reply = client.request(method, path, content=body, headers=JSON)
            assert refused(reply, 503, "overloaded")["resource"] == "requests"
            assert reply.headers["retry-after"] == "1"
        assert client.head(f"/v1/sessions/{session}").status_code == 503
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        narrow.valkey("CLIENT", "UNPAUSE")
        assert [reply_on(connection)[0] for connection in connections] == [200] * REQUESTS
    assert client.get(f"/v1/sessions/{session}").json()["step"] == REQUESTS


def test_what_is_refused_before_it_is_begun_is_told_and_counted_like_any_other(
    narrow: Server, client: httpx.Client, session: str
) -> None:
    """A request that came whole is refused by the protocol."""

    def told() -> tuple[float, float, float]:
        page = client.get("/metrics").text
        patterns = (
            r'^ravine_overloaded_total\{of="requests"\} (\S+)$',
            r'^ravine_http_refused_total\{problem="overloaded"\} (\S+)$',
            r'^ravine_http_requests_total\{method="GET",route="/v1/optimizers/{kind}",status="5xx"\} (\S+)$',
        )
        found = [re.search(pattern, page, re.MULTILINE) for pattern in patterns]
        return tuple(float(each[1]) if each else 0.0 for each in found)  # type: ignore[return-value]

    path = "/v1/optimizers/adam?x=1"
    with full(narrow, session):
        before = told()
        for _ in range(3):
            reply = client.get(path, headers={"X-Request-Id": "mine"})
            assert refused(reply, 503, "overloaded")["instance"] == "/v1/optimizers/adam"
            assert reply.headers["x-request-id"] == "mine"
            assert "date" in reply.headers
        assert [after - earlier for earlier, after in zip(before, told(), strict=True)] == [3, 3, 3]
    eventually(lambda: narrow.log.read_text().count("request_id=mine") == 3)


def test_and_keeps_its_place_among_those_sent_ahead(narrow: Server, session: str) -> None:
    """On one connection, in one piece: one that is refused, one that never is, one that has no body, and the last."""
    lines = ("GET /v1/optimizers/adam", "GET /livez", "HEAD /v1/optimizers/adam", "GET /livez")
    requests = [f"{line} HTTP/1.1\r\nHost: localhost\r\n" for line in lines]
    with full(narrow, session), connected(narrow) as connection:
        connection.sendall(("\r\n".join(requests) + "Connection: close\r\n\r\n").encode())
        said = b""
        while piece := connection.recv(65536):
            said += piece
    assert re.findall(rb"HTTP/1\.1 (\d+) ", said) == [b"503", b"200", b"503", b"200"]
    assert said.count(b'"overloaded"') + said.count(b"/problems/overloaded") == 1


def test_one_that_ends_its_connection_is_told_and_closed(narrow: Server, session: str) -> None:
    with full(narrow, session), connected(narrow) as connection:
        connection.sendall(b"GET /v1/optimizers/adam HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status, headers, _ = reply_on(connection)
        assert (status, headers["connection"]) == (503, "close")
        assert connection.recv(1) == b""


def test_what_cannot_be_read_is_told_so_whether_or_not_there_is_room(narrow: Server, session: str) -> None:
    with full(narrow, session), connected(narrow) as connection:
        head = f"POST /v1/sessions/{session}/steps HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"nonsense\r\n")
        status, headers, _ = reply_on(connection)
        assert (status, headers["connection"]) == (400, "close")


@pytest.mark.parametrize("follows", [b"GET / HTTP/1.1\r\nBad header\r\n\r\n", b"\x01garbage", b"GET / HTTP/1.1\r\nHo"])
def test_nothing_is_said_after_a_refusal_that_ends_the_connection(narrow: Server, session: str, follows: bytes) -> None:
    """The parser keeps a connection of HTTP/1.0 that the server does not, and reads on."""
    with full(narrow, session), connected(narrow) as connection:
        connection.sendall(b"GET /v1/optimizers/adam HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + follows)
        status, headers, _ = reply_on(connection)
        assert (status, headers["connection"]) == (503, "close")
        assert connection.recv(1000) == b""
    assert "Fatal error" not in narrow.log.read_text()


# -- waiting for the loop ----------------------------------------------------------------------------------------------

ALL, CROWD = 80, 100


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service to which any wait is too long, once there were more than ALL."""
    settings = {"RAVINE_LAG_SECONDS": "1e-9", "RAVINE_MAX_REQUESTS": str(ALL), "RAVINE_JIT": "false"}
    with serving(tmp_path_factory.mktemp("impatient") / "data", environment=settings) as server:
        yield server


def refusals(connections: list[socket.socket], least: int) -> list[socket.socket]:
    """Those that are told so, `least` or more, before the store takes writes again."""
    eventually(lambda: len(select.select(connections, [], [], 0)[0]) >= least)
    early = select.select(connections, [], [], 0)[0]
    for connection in early:
        status, document = answered(reply_on(connection))
        assert (status, document["resource"]) == (503, "requests")
    return early


def room(server: Server) -> float:
    found = re.search(r"^ravine_http_requests_limit (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_crowd_that_was_too_large_has_fewer_let_in_while_they_wait_too_long(impatient: Server) -> None:
    """As many as there may be; then, after some were refused, as many as are never too many."""
    with impatient.client() as client:
        session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
        assert {room(impatient) for _ in range(20)} == {ALL}, "whatever the wait: nobody was refused"
        done = 0
        for most in (ALL, FLOOR):
            # By what waits that the limit is for: those who ask how it does are not looked at.
            eventually(lambda most=most: probe(impatient) == 200 and room(impatient) == most)  # type: ignore[misc]
            with crowd(impatient, session, CROWD) as connections:
                early = refusals(connections, CROWD - most)
                impatient.valkey("CLIENT", "UNPAUSE")
                assert {reply_on(connection)[0] for connection in connections if connection not in early} == {200}
            done += CROWD - len(early)
            assert client.get(f"/v1/sessions/{session}").json()["step"] == done == (ALL if most == ALL else ALL + FLOOR)
        assert {probe(impatient) for _ in range(50)} == {200}, "few are never too many"


def test_a_refused_request_leaves_its_connection_usable_where_its_body_is_short(narrow: Server, session: str) -> None:
    with full(narrow, session), connected(narrow) as connection:
        for _ in range(3):
            begun(connection, session, 100_000, b"x" * 50_000)
            assert answered(reply_on(connection))[0] == 503  # before the body is there
            connection.sendall(b"x" * 50_000)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reply_on(connection)[0] == 200


def test_and_is_closed_where_it_is_long(narrow: Server, session: str) -> None:
    with full(narrow, session), connected(narrow) as connection:
        begun(connection, session, 500 << 20, b"x" * 1000)
        status, headers, _ = reply_on(connection)
        assert (status, headers["connection"]) == (503, "close")


def test_who_asks_before_it_sends_is_told(narrow: Server, session: str) -> None:
    with full(narrow, session), connected(narrow) as connection:
        lines = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
        lines += "Expect: 100-continue\r\n\r\n"
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}".encode())
        status, headers, _ = reply_on(connection)
        assert (status, headers["connection"]) == (503, "close")


def test_requests_whose_clients_have_gone_are_no_longer_counted(narrow: Server, session: str) -> None:
    for _ in range(5):
        with full(narrow, session):
            pass  # the connections are closed before anything is answered
        eventually(lambda: probe(narrow) == 200)


def test_bodies_that_do_not_come_take_nobodys_place(narrow: Server, client: httpx.Client, session: str) -> None:
    """Heads alone shut nobody out, and each is a step as before once it is whole."""
    with contextlib.ExitStack() as stack:
        coming = [stack.enter_context(connected(narrow)) for _ in range(2 * REQUESTS)]
        for connection in coming:
            begun(connection, session, len(STEP), b"")
            assert probe(narrow) == 200
        assert client.post(f"/v1/sessions/{session}/steps", content=STEP, headers=JSON).status_code == 200
        for connection in coming:
            connection.sendall(STEP)
            assert reply_on(connection)[0] == 200
    assert client.get(f"/v1/sessions/{session}").json()["step"] == 2 * REQUESTS + 1


def test_those_who_ask_how_it_does_take_nobodys_place(narrow: Server) -> None:
    """However many ask at once."""
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS - 4):
            connection = stack.enter_context(connected(narrow))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        assert [probe(narrow) for _ in range(10)] == [200] * 10


def test_nor_those_who_ask_in_the_same_turn(narrow: Server) -> None:
    """Of the loop, which reads what all have sent before it begins any of it."""
    with contextlib.ExitStack() as stack:
        askers = [stack.enter_context(connected(narrow)) for _ in range(REQUESTS + 1)]
        connection = stack.enter_context(connected(narrow))
        for _ in range(5):
            os.kill(narrow.pid, signal.SIGSTOP)
            try:
                for asker in askers:
                    asker.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                connection.sendall(b"GET /v1/optimizers/adam HTTP/1.1\r\nHost: localhost\r\n\r\n")
            finally:
                os.kill(narrow.pid, signal.SIGCONT)
            assert reply_on(connection)[0] == 200
            assert {reply_on(asker)[0] for asker in askers} == {200}


# -- waits -------------------------------------------------------------------------------------------------------------


def test_those_who_wait_are_counted_apart(narrow: Server, client: httpx.Client, session: str) -> None:
    """As many as may wait do, and shut nobody out; one more is refused, whatever it would wait for."""
    path = f"/v1/sessions/{session}"
    poll = f"GET {path}/params?after=0&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(narrow)) for _ in range(WAITS)]
        for connection in waiting:
            connection.sendall(poll)
        eventually(lambda: refused_to_wait(narrow, session))
        assert refused(client.get(f"{path}/events"), 503, "overloaded")["resource"] == "waits"
        assert refused(client.get(f"{path}/params?after=0&wait=60"), 503, "overloaded")["resource"] == "waits"
        with full(narrow, session):  # all requests that there may be, beside those who wait
            pass
        eventually(lambda: probe(narrow) == 200)
        reply = client.post(f"{path}/steps", content=STEP, headers=JSON)
        assert reply.status_code == 200
        assert [reply_on(connection)[0] for connection in waiting] == [200] * WAITS
        eventually(lambda: not refused_to_wait(narrow, session))


def refused_to_wait(server: Server, session: str) -> bool:
    """Asked of a step that is reached already, or for an instant only."""
    reply = httpx.get(f"{server.url}/v1/sessions/{session}/params?after=1000&wait=0.01")
    return reply.status_code == 503


def test_a_contribution_that_cannot_wait_for_its_round_is_in_it_all_the_same(
    narrow: Server, client: httpx.Client, session: str
) -> None:
    aggregation = {"mode": "sync", "workers": 2}
    shared = create(client, optimizer="sgd", params={"w": [1.0, 2.0]}, aggregation=aggregation)["id"]
    with contextlib.ExitStack() as stack:
        for _ in range(WAITS):
            connection = stack.enter_context(connected(narrow))
            connection.sendall(f"GET /v1/sessions/{session}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert head_of(connection)[0] == 200
        reply = client.post(f"/v1/sessions/{shared}/steps", content=STEP, headers=JSON | {"Prefer": "wait=30"})
        assert (reply.status_code, reply.json()) == (202, {"round": 1, "received": 1, "needed": 2})
        assert client.post(f"/v1/sessions/{shared}/steps", content=STEP, headers=JSON).status_code == 200


def test_those_who_waited_and_went_are_no_longer_counted(narrow: Server, session: str) -> None:
    for resource in ("params?after=0&wait=60", "events") * 3:
        with contextlib.ExitStack() as stack:
            for _ in range(WAITS):
                connection = stack.enter_context(connected(narrow))
                line = f"GET /v1/sessions/{session}/{resource} HTTP/1.1\r\n"
                connection.sendall(f"{line}Host: localhost\r\n\r\n".encode())
            await_listeners(narrow, session, 1)
            eventually(lambda: refused_to_wait(narrow, session))
        eventually(lambda: not refused_to_wait(narrow, session))


# -- bodies ------------------------------------------------------------------------------------------------------------


def filled(stack: contextlib.ExitStack, server: Server, client: httpx.Client, session: str) -> list[socket.socket]:
    """Bodies that lack their last byte, so many that there is no room for one more."""
    held: list[socket.socket] = []
    while not held or posted(client, session, LARGE).status_code == 200:
        assert len(held) < CONNECTIONS, "there is room for ever more"
        held.append(stack.enter_context(connected(server)))
        begun(held[-1], session, len(LARGE), LARGE[:-1])
    return [connection for connection in held if not select.select([connection], [], [], 0)[0]]


def test_bodies_count_as_they_come(narrow: Server, client: httpx.Client, session: str) -> None:
    """What was announced does not count, what came does, until the request is over."""
    with contextlib.ExitStack() as stack:
        announced = stack.enter_context(connected(narrow))
        begun(announced, session, len(LARGE), LARGE[:1000])
        held = filled(stack, narrow, client, session)
        assert held
        with unchanged(client, session):
            assert refused(posted(client, session, LARGE), 503, "overloaded")["resource"] == "bodies"
            reply = posted(client, session, gzip.compress(LARGE), {"Content-Encoding": "gzip"})
            assert refused(reply, 503, "overloaded")["resource"] == "bodies"
        assert posted(client, session, STEP).status_code == 200
        for connection in held:
            connection.sendall(LARGE[-1:])
            assert reply_on(connection)[0] == 200
        announced.sendall(LARGE[1000:])
        assert reply_on(announced)[0] == 200
    for _ in range(5):
        assert posted(client, session, LARGE).status_code == 200
        assert posted(client, session, gzip.compress(LARGE), {"Content-Encoding": "gzip"}).status_code == 200


def posted(client: httpx.Client, session: str, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    return client.post(f"/v1/sessions/{session}/steps", content=body, headers=JSON | (headers or {}))


def test_bodies_that_were_broken_off_are_no_longer_counted(narrow: Server, client: httpx.Client, session: str) -> None:
    for _ in range(6):
        with contextlib.ExitStack() as stack:
            filled(stack, narrow, client, session)
        eventually(lambda: posted(client, session, LARGE).status_code == 200)


# -- connections -------------------------------------------------------------------------------------------------------


def test_connections_beyond_the_limit_are_told_and_closed(narrow: Server) -> None:
    def ask(connection: socket.socket) -> int:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return reply_on(connection)[0]

    with contextlib.ExitStack() as stack:
        held = []
        while len(held) < CONNECTIONS:
            connection = stack.enter_context(connected(narrow))
            if ask(connection) == 200:  # those of earlier tests may not all be gone yet
                held.append(connection)
        for _ in range(3):
            with connected(narrow) as connection:
                status, document = answered(reply_on(connection))
                assert (status, document["resource"]) == (503, "connections")
                assert document["type"] == "/problems/overloaded"
                assert connection.recv(1) == b""
        assert {ask(connection) for connection in held} == {200}
        held[0].close()

        def let_in() -> bool:
            with connected(narrow) as connection:
                return ask(connection) == 200

        eventually(let_in)
