"""Bodies over the limit: refused, with the limit, however they are sent, and as early as can be."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.http.files import saved, step
from tests.http.refusals import refused, unchanged
from tests.http.sockets import connected, exchange, reply_on
from tests.running import Server, serving
from tests.wire import SAFETENSORS, create

LIMIT = 64 << 10
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that takes 64 KiB."""
    limits = {"RAVINE_MAX_BODY": "64KiB", "RAVINE_JIT": "false"}
    with serving(tmp_path_factory.mktemp("small") / "data", environment=limits) as server:
        yield server


@pytest.fixture(scope="module")
def client(small: Server) -> Iterator[httpx.Client]:
    with small.client() as open_client:
        yield open_client


@pytest.fixture(scope="module")
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer="adam", params={"w": [1.0, 2.0]})["id"]
    return made


def writes(session: str) -> list[tuple[str, str, dict[str, str]]]:
    path = f"/v1/sessions/{session}"
    return [
        ("POST", "/v1/sessions", JSON),
        ("POST", "/v1/sessions", SAFETENSORS),
        ("PATCH", path, JSON),
        ("POST", f"{path}/fork", JSON),
        ("PUT", f"{path}/params", JSON),
        ("PUT", f"{path}/params", SAFETENSORS),
        ("POST", f"{path}/steps", JSON),
        ("POST", f"{path}/steps", SAFETENSORS),
    ]


@pytest.mark.parametrize("length", [LIMIT + 1, 2**31, 2**63 - 1])
def test_a_length_over_the_limit_is_refused_before_the_body_is_sent(
    small: Server, client: httpx.Client, session: str, length: int
) -> None:
    with unchanged(client, session):
        for method, url, headers in writes(session):
            lines = f"Host: localhost\r\nContent-Type: {headers['Content-Type']}\r\nContent-Length: {length}\r\n"
            status, found, body = exchange(small, f"{method} {url} HTTP/1.1\r\n{lines}\r\n".encode())
            assert (status, found["content-type"]) == (413, "application/problem+json"), (url, body)
            document = json.loads(body)
            assert (document["type"], document["limit"]) == ("/problems/body-too-large", LIMIT)


def test_a_client_that_asks_before_it_sends_is_told(small: Server, session: str) -> None:
    with connected(small) as connection:
        lines = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {LIMIT + 1}\r\n"
        lines += "Expect: 100-continue\r\n"
        connection.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}\r\n".encode())
        assert reply_on(connection)[0] == 413


def pieces(body: bytes) -> Iterator[bytes]:
    """Sent without a length."""
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


BODIES: dict[str, tuple[Any, dict[str, str]]] = {
    "with its length": (b"x" * (LIMIT + 1), {}),
    "without": (pieces(b"x" * (LIMIT + 1)), {}),
    "gzip": (gzip.compress(bytes(LIMIT + 1)), {"Content-Encoding": "gzip"}),
    "zstd": (zstandard.compress(bytes(LIMIT + 1)), {"Content-Encoding": "zstd"}),
    "gzip bomb": (gzip.compress(bytes(30 << 20)), {"Content-Encoding": "gzip"}),
    "zstd bomb": (zstandard.compress(bytes(200 << 20)), {"Content-Encoding": "zstd"}),
    "many gzip members": (gzip.compress(bytes(1000)) * 100, {"Content-Encoding": "gzip"}),
    "large though compressed": (gzip.compress(bytes(10), 0) + bytes(LIMIT), {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("what", BODIES)
def test_bodies_over_the_limit(client: httpx.Client, session: str, what: str) -> None:
    body, coding = BODIES[what]
    with unchanged(client, session):
        for method, url, headers in writes(session):
            sent = pieces(b"x" * (LIMIT + 1)) if what == "without" else body
            reply = client.request(method, url, content=sent, headers=headers | coding)
            assert refused(reply, 413, "body-too-large")["limit"] == LIMIT


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_the_limit_itself_is_allowed(client: httpx.Client, session: str, coding: str) -> None:
    compress = {"gzip": gzip.compress, "zstd": zstandard.compress, "identity": bytes}[coding]
    body = b'{"gradients": {"w": [1, 2]}}'
    for length, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        headers = JSON | {"Content-Encoding": coding}
        content = compress(body.ljust(length))
        reply = client.post(f"/v1/sessions/{session}/steps", content=content, headers=headers)
        assert reply.status_code == status, reply.text


def test_the_largest_file_that_fits(client: httpx.Client) -> None:
    header = len(saved({"w": np.zeros(0, np.float32)})) + 8  # the shape has five digits more
    size = (LIMIT - header) // 4
    session = create(client, optimizer="sgd", shapes={"w": [size]})["id"]
    assert step(client, session, {"w": np.ones(size, np.float32)}).status_code == 200
    larger = create(client, optimizer="sgd", shapes={"w": [size + 16]})["id"]
    reply = step(client, larger, {"w": np.ones(size + 16, np.float32)})
    assert refused(reply, 413, "body-too-large")["limit"] == LIMIT
