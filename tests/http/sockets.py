"""HTTP by hand, for what a client library would refuse to send."""

import contextlib
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.running import Server


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 80)), timeout=20) as connection:
        yield connection


def head_of(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """The status and the headers of a reply, read byte by byte: what follows is left for others."""
    text = b""
    while not text.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        assert piece, f"the connection was closed after {text!r}"
        text += piece
    first, *lines = text.decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines if line)
    return int(first.split(" ")[1]), {name.lower(): value for name, _, value in pairs}


def reply_on(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next reply, whose body has a length or goes on until the connection is closed."""
    status, headers = head_of(connection)
    body = b""
    if status in (204, 304):
        return status, headers, b""
    if "content-length" not in headers:
        while piece := connection.recv(65536):
            body += piece
    while len(body) < int(headers.get("content-length", 0)):
        piece = connection.recv(65536)
        assert piece, "the connection was closed in the middle of a body"
        body += piece
    return status, headers, body


def exchange(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """What the server says to `request`, bytes as they are."""
    with connected(server) as connection:
        connection.sendall(request)
        return reply_on(connection)


def await_listeners(server: Server, session: str, count: int) -> None:
    """Returns once so many processes listen to what happens to the session, which they do while clients wait."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if server.valkey("PUBSUB", "NUMSUB", f"ravine:{{{session}}}").rstrip("]").endswith(f", {count}"):
            return
        time.sleep(0.02)
    raise AssertionError(f"there are not {count} listeners")
