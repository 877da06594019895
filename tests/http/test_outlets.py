"""Replies that are read slowly, or not at all, and connections that end; in the clear and under TLS."""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests.certificates import Authority
from tests.http.files import saved
from tests.http.sockets import connected, head_of, reply_on
from tests.running import Server, serving
from tests.wire import create

HEAD_SECONDS, STALL_SECONDS = 1.0, 1.5
PATIENCE = 20.0
LARGE = 8_000_000  # floats: more than any kernel buffers
CONNECTIONS = 24
SETTINGS = {
    "RAVINE_HEADER_SECONDS": str(HEAD_SECONDS),
    "RAVINE_STALL_SECONDS": str(STALL_SECONDS),
    "RAVINE_MAX_CONNECTIONS": str(CONNECTIONS),
    "RAVINE_JIT": "false",
}
LIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Service(NamedTuple):
    """A server, the path of 32 MB at it, and what its clients trust; None: it speaks in the clear."""

    server: Server
    large: str
    trust: ssl.SSLContext | None

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with connected(self.server) as plain:
            if self.trust is None:
                yield plain
                return
            with self.trust.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                yield secure

    def request(self, *lines: str) -> bytes:
        head = [f"GET {self.large} HTTP/1.1", "Host: localhost", "Accept: application/vnd.safetensors", *lines]
        return ("\r\n".join(head) + "\r\n\r\n").encode()


@contextlib.contextmanager
def service(directory: Path, **settings: str) -> Iterator[Service]:
    """Under TLS; it has a session of 32 MB."""
    authority = Authority(directory / "tls")
    cert, key = authority.issue("server")
    arguments = ("--tls-cert", str(cert), "--tls-key", str(key))
    with serving(directory / "data", *arguments, environment=SETTINGS | settings) as server:
        yield Service(server, large_at(server, authority.context()), authority.context())


def large_at(server: Server, trust: ssl.SSLContext | None) -> str:
    with httpx.Client(base_url=server.url, verify=trust or True, timeout=30) as client:
        made = create(client, optimizer="sgd", shapes={"w": [LARGE]})["id"]
        file = saved({"w": np.zeros(LARGE, np.float32)})
        headers = {"Content-Type": "application/vnd.safetensors"}
        assert client.put(f"/v1/sessions/{made}/params", content=file, headers=headers).status_code == 200
    return f"/v1/sessions/{made}/params"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("plain") / "data", environment=SETTINGS) as server:
        yield Service(server, large_at(server, None), None)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("secure")) as running:
        yield running


@pytest.fixture(params=["plain", "secure"])
def either(request: pytest.FixtureRequest) -> Service:
    found: Service = request.getfixturevalue(request.param)
    return found


def established(server: Server) -> set[int]:
    """The ports of the clients whose connections the server holds, by the kernel's own table (proc(5))."""
    ours, ports = int(urlsplit(server.url).port or 0), set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, other = (int(field.rpartition(":")[2], 16) for field in fields[1:3])
        if local == ours and fields[3] == "01":
            ports.add(other)
    return ports


def wait_until_dropped(server: Server, *connections: socket.socket) -> None:
    ports = {connection.getsockname()[1] for connection in connections}
    deadline = time.monotonic() + PATIENCE
    while ports & established(server):
        assert time.monotonic() < deadline, "the server still holds the connection"
        time.sleep(0.1)


# -- replies -----------------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_cut(either: Service) -> None:
    with either.connected() as connection:
        connection.sendall(either.request())
        assert head_of(connection)[0] == 200
        wait_until_dropped(either.server, connection)


def test_a_client_that_does_not_read_to_the_end_is_cut(either: Service) -> None:
    """Though the connection is about to be closed."""
    with either.connected() as connection:
        connection.sendall(either.request("Connection: close"))
        assert head_of(connection)[0] == 200
        wait_until_dropped(either.server, connection)


@pytest.mark.parametrize("lines", [(), ("Connection: close",)], ids=["kept", "closed"])
def test_a_client_that_reads_slowly_but_steadily_gets_all_of_it(either: Service, lines: tuple[str, ...]) -> None:
    """So slowly that the kernel says nothing of it for longer than anybody may stand still."""
    with either.connected() as connection:
        connection.sendall(either.request(*lines))
        status, headers = head_of(connection)
        assert status == 200
        left, slow_until = int(headers["content-length"]), time.monotonic() + STALL_SECONDS * 4
        while left:
            piece = connection.recv(min(left, 16 << 10 if time.monotonic() < slow_until else 1 << 20))
            assert piece, f"closed with {left} bytes to come"
            left -= len(piece)
            if time.monotonic() < slow_until:
                time.sleep(0.05)
        if lines:
            assert connection.recv(1) == b""
        else:
            connection.sendall(LIVE)
            assert reply_on(connection)[0] == 200


def test_a_reply_that_is_not_read_is_still_in_flight(either: Service) -> None:
    with either.connected() as connection, either.connected() as asking:
        connection.sendall(either.request())
        assert head_of(connection)[0] == 200
        asking.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, _, text = reply_on(asking)
        assert status == 200
        assert b"\nravine_http_requests_in_flight 1.0\n" in text


def test_large_replies_follow_each_other(either: Service) -> None:
    with either.connected() as connection:
        for _ in range(3):
            connection.sendall(either.request() + LIVE)
            status, headers = head_of(connection)
            assert status == 200
            left = int(headers["content-length"])
            while left:
                left -= len(connection.recv(min(left, 1 << 20)))
            assert reply_on(connection)[0] == 200


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_handshake_that_does_not_come_is_not_waited_for(secure: Service) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(secure.server)) for _ in range(8)]
        for connection in connections[4:]:
            connection.sendall(b"\x16\x03\x01")  # and no more of it
        for connection in connections:
            assert connection.recv(1) == b""


def test_those_who_are_turned_away_are_not_held(secure: Service) -> None:
    """However many they are; they do nothing, not even close."""
    with contextlib.ExitStack() as stack:
        held: list[socket.socket] = []
        while len(held) < CONNECTIONS:
            held.append(stack.enter_context(secure.connected()))
            held[-1].sendall(LIVE)
            assert reply_on(held[-1])[0] == 200
        more = [stack.enter_context(secure.connected()) for _ in range(3)]
        wait_until_dropped(secure.server, *more)
        held[0].sendall(LIVE)
        assert reply_on(held[0])[0] == 200


def test_idle_clients_do_not_keep_it_from_stopping(tmp_path: Path) -> None:
    """Over TLS an orderly end takes two; who is idle in a pool does its part when it looks again."""
    with service(tmp_path, RAVINE_DRAIN_SECONDS="60") as running, contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(running.connected())
            connection.sendall(LIVE)
            assert reply_on(connection)[0] == 200
        running.server.stop(PATIENCE)
