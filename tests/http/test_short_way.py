"""Small steps go a way of their own through the service: nobody can tell by what they are told.

A `Prefer` with nothing in it that is known changes nothing about a request but that it goes the usual way.
"""

import contextlib
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import numpy as np
import pytest

from service.wire import safetensors
from tests.http.callers import bearing, houses, revoke
from tests.http.sockets import connected, reply_on
from tests.http.test_body_memory import memory
from tests.http.test_metrics import grown, read, value
from tests.running import Server, serving
from tests.wire import create

USUAL = {"Prefer": "nothing-that-is-known"}
SAFETENSORS = "application/vnd.safetensors"
NUMBERS = [0.5, -1.25, 3.0]
FILE = b"".join(safetensors.write({"w": np.array(NUMBERS, np.float32)}))
JSON = json.dumps({"gradients": {"w": NUMBERS}}).encode()
OF_JSON = {"content-type": "application/json"}
OF_FILE = {"content-type": SAFETENSORS}
# What differs between any two replies.
OWN = ("date", "x-request-id")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that nobody else calls, since it is looked at how many requests went which way."""
    with serving(tmp_path_factory.mktemp("ways") / "data") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client


def sent(*members: tuple[str, Any]) -> bytes:
    return json.dumps({"gradients": {"w": NUMBERS}} | dict(members)).encode()


# name -> headers, query, body, and whether the short way is for it: what is wrong is for the usual one to tell.
CASES: dict[str, tuple[dict[str, str], str, bytes, bool]] = {
    "json": (OF_JSON, "", JSON, True),
    "json with its charset": ({"content-type": "application/json; charset=utf-8"}, "", JSON, True),
    "return none": (OF_JSON, "", sent(("return", "none")), True),
    "return updates": (OF_JSON, "", sent(("return", "updates")), True),
    "loss and worker": (OF_JSON, "", sent(("loss", 0.25), ("worker", "a")), True),
    "file": (OF_FILE, "", FILE, True),
    "file with a query": (OF_FILE, "?return=updates&loss=0.5", FILE, True),
    "file for json": (OF_FILE | {"accept": "application/json"}, "", FILE, True),
    "json for a file": (OF_JSON | {"accept": SAFETENSORS}, "", JSON, True),
    "at step 0": (OF_JSON | {"if-match": '"0"'}, "", JSON, True),
    "at a step that was not": (OF_JSON | {"if-match": '"7"'}, "", JSON, True),
    "key": (OF_JSON | {"idempotency-key": "k"}, "", JSON, True),
    "one number too few": (OF_JSON, "", b'{"gradients": {"w": [1, 2]}}', True),
    "another tensor": (OF_JSON, "", b'{"gradients": {"v": [1, 2, 3]}}', True),
    "no finite number": (OF_FILE, "", b"".join(safetensors.write({"w": np.full(3, np.nan)})), True),
    "no json": (OF_JSON, "", b'{"gradients": ', False),
    "no member of a step": (OF_JSON, "", sent(("lr", 0.1)), False),
    "no body": (OF_JSON, "", b"", False),
    "no file": (OF_FILE, "", FILE[:-1], False),
    "no type": ({}, "", JSON, False),
    "another type": ({"content-type": "text/plain"}, "", JSON, False),
    "a type that is not given": (OF_JSON | {"accept": "image/png"}, "", JSON, False),
    "a query that is none": (OF_JSON, "?lr=1", JSON, False),
    "a tag that is none": (OF_JSON | {"if-match": "7"}, "", JSON, False),
    "a key that is none": (OF_JSON | {"idempotency-key": "\u00e4"}, "", JSON, False),
}


def made(client: httpx.Client, size: int = 3) -> str:
    session: str = create(client, optimizer="adam", params={"w": [1.0] * size}, dtype="float32")["id"]
    assert client.get(f"/v1/sessions/{session}/params").status_code == 200  # it is in memory, and known whose it is
    return session


def ways(client: httpx.Client, before: Any, what: str = "step") -> tuple[float, float]:
    name = "ravine_http_ways_total"
    return grown(client, before, name, way=f"short {what}"), grown(client, before, name, way=f"usual {what}")


def asked(
    session: str,
    headers: dict[str, str],
    body: bytes,
    query: str = "",
    version: str = "1.1",
    method: str = "POST",
    resource: str = "steps",
) -> bytes:
    """The bytes of a request: sent at once, so that its body is there with its head."""
    lines = [f"{method} /v1/sessions/{session}/{resource}{query} HTTP/{version}", "host: 127.0.0.1"]
    if method == "POST":
        headers = headers | {"content-length": str(len(body))}
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def told(reply: tuple[int, dict[str, str], bytes], session: str) -> tuple[int, dict[str, str], bytes]:
    status, headers, body = reply
    headers = {name: value for name, value in headers.items() if name not in OWN}
    if "etag" in headers:  # the commit is random
        headers["etag"] = headers["etag"].partition("-")[0]
    return status, headers, re.sub(rb"(\d)-[0-9a-f]{16}", rb"\1", body.replace(session.encode(), b"SESSION"))


@pytest.mark.parametrize("case", CASES)
def test_both_ways_tell_the_same(server: Server, client: httpx.Client, case: str) -> None:
    headers, query, body, short = CASES[case]
    before, replies = read(client), []
    for more in ({}, USUAL):
        session = made(client)
        with connected(server) as connection:
            for _ in range(2):
                connection.sendall(asked(session, headers | more, body, query))
                replies.append(told(reply_on(connection), session))
        replies.append((0, {}, client.get(f"/v1/sessions/{session}/params").content))
    assert replies[:3] == replies[3:]
    assert ways(client, before) == ((2, 2) if short else (0, 4))


# name -> what is asked beside the path, headers, and whether the short way is for it.
PULLS: dict[str, tuple[str, dict[str, str], bool]] = {
    "json": ("", {}, True),
    "json by its name": ("", {"accept": "application/json"}, True),
    "file": ("", {"accept": SAFETENSORS}, True),
    "held already": ("", {"if-none-match": '"1"'}, True),
    "held before": ("", {"if-none-match": '"0"'}, True),
    "final": ("?at=final", {}, False),
    "after": ("?after=0", {}, False),
    "no query": ("?at=now", {}, False),
    "no tag": ("", {"if-none-match": "1"}, False),
    "a type that is not given": ("", {"accept": "image/png"}, False),
}


@pytest.mark.parametrize("size", [3, 30_000])
@pytest.mark.parametrize("case", PULLS)
def test_both_ways_read_the_same(server: Server, client: httpx.Client, case: str, size: int) -> None:
    query, headers, short = PULLS[case]
    session = made(client, size)
    client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [0.5] * size}, "return": "none"})
    before, replies = read(client), []
    for more in ({}, USUAL):
        with connected(server) as connection:
            for _ in range(2):
                connection.sendall(asked(session, headers | more, b"", query, "1.1", "GET", "params"))
                replies.append(told(reply_on(connection), session))
    assert replies[:2] == replies[2:]
    assert ways(client, before, "pull") == ((2, 2) if short else (0, 4))
    if case == "held already":
        assert replies[0][0] == 304


def test_a_session_that_holds_no_parameters_says_so(server: Server, client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", shapes={"w": [1]})["id"]
    step = {"gradients": {"w": [1.0]}}
    assert client.post(f"/v1/sessions/{session}/steps", json=step).status_code == 200
    before, replies = read(client), []
    for more in ({}, USUAL):
        with connected(server) as connection:
            connection.sendall(asked(session, more, b"", "", "1.1", "GET", "params"))
            replies.append(told(reply_on(connection), session))
    assert replies[0] == replies[1]
    assert replies[0][0] == 409
    assert ways(client, before, "pull") == (1, 1)


def test_what_is_read_is_what_another_service_wrote(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    """The short way looks at the store too before it answers."""
    store = {"RAVINE_REDIS_URL": server.store_url()}
    with serving(tmp_path / "other", environment=store) as second, second.client() as other:
        session = made(client)
        url = f"/v1/sessions/{session}"
        for i in range(1, 4):
            assert other.post(f"{url}/steps", content=JSON, headers=OF_JSON).json()["step"] == i
            assert client.get(f"{url}/params").json()["step"] == i
            assert client.get(f"{url}/params").content == other.get(f"{url}/params").content


def test_what_the_reply_has_to_say_is_what_the_arithmetic_gives(client: httpx.Client) -> None:
    """Adam's first step is lr against the sign of each gradient, but for epsilon."""
    session = made(client)
    reply = client.post(f"/v1/sessions/{session}/steps", content=JSON, headers=OF_JSON)
    g = np.array(NUMBERS)
    expected = 1.0 - 0.001 * g / (np.abs(g) + 1e-8)
    np.testing.assert_allclose(reply.json()["params"]["w"], expected, rtol=1e-6)
    assert reply.json()["metrics"]["grad_norm"] == pytest.approx(float(np.sqrt(g @ g)), rel=1e-12)
    assert reply.headers["etag"] == client.get(f"/v1/sessions/{session}").headers["etag"]


def test_long_replies_too(server: Server, client: httpx.Client) -> None:
    body = json.dumps({"gradients": {"w": [1] * 15_000}}).encode()
    before, replies = read(client), []
    for more in ({}, USUAL):
        session = made(client, 15_000)
        with connected(server) as connection:
            connection.sendall(asked(session, OF_JSON | more, body))
            replies.append(told(reply_on(connection), session))
    assert len(replies[0][2]) > 64 << 10
    assert replies[0] == replies[1]
    assert ways(client, before) == (1, 1)


def test_a_long_reply_is_at_work_until_it_has_gone(server: Server, client: httpx.Client) -> None:
    """Or many that read nothing would be answered, each with an array of its own, however few may be in flight."""
    session = create(client, optimizer="sgd", params={"w": [1.0], "b": [0.5] * 4_000_000})["id"]
    step = json.dumps({"gradients": {"w": [1.0]}, "partial": True}).encode()
    client.get(f"/v1/sessions/{session}/params", headers={"accept": SAFETENSORS})
    before, at_work = read(client), []
    for more in ({}, USUAL):
        with connected(server) as connection:
            connection.sendall(asked(session, OF_JSON | {"accept": SAFETENSORS} | more, step))
            assert connection.recv(1) == b"H"  # it is on its way, and 16 MB are more than the kernel takes
            at_work.append(value(read(client), "ravine_http_requests_in_flight"))
    assert at_work == [1, 1]
    assert ways(client, before) == (1, 1)
    deadline = time.monotonic() + 20
    while value(read(client), "ravine_http_requests_in_flight"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_body_is_not_held_until_the_next(server: Server, client: httpx.Client) -> None:
    """By a connection that is kept."""
    session, padded, count = made(client), JSON + b" " * 60_000, 600
    before, resident = read(client), memory(server.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(connected(server))
            connection.sendall(asked(session, OF_JSON, padded))
            assert reply_on(connection)[0] == 200
        grown_by = memory(server.pid) - resident
    assert sum(ways(client, before)) == count
    assert grown_by < count * len(padded) // 3, f"{grown_by >> 10} KiB"


def test_what_has_to_be_looked_up_goes_the_usual_way(client: httpx.Client, server: Server) -> None:
    before = read(client)
    assert client.post("/v1/sessions/ses_0123456789012345678901234/steps", json={}).status_code == 404
    session = made(client)
    step = {"gradients": {"w": NUMBERS}}
    url = f"/v1/sessions/{session}/steps"
    for body in (step, {"gradients": {"w": [[1.0] * 20_000]}}):  # the second is too long to be there at once
        client.post(url, content=iter([json.dumps(body).encode()]), headers=OF_JSON)
    assert client.post(f"{url}/", json=step).status_code == 404
    rounds = create(client, optimizer="sgd", params={"w": [0.0]}, aggregation={"mode": "sync", "workers": 2})["id"]
    sent = {"gradients": {"w": [1.0]}, "worker": "a"}
    assert client.post(f"/v1/sessions/{rounds}/steps", json=sent).status_code == 202
    assert ways(client, before) == (0, 4)


def test_a_body_that_comes_after_its_head_is_read(server: Server, client: httpx.Client) -> None:
    session = made(client)
    with connected(server) as connection:
        head = f"POST /v1/sessions/{session}/steps HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(JSON))
        time.sleep(0.05)
        connection.sendall(JSON)
        assert reply_on(connection)[0] == 200


def test_those_that_are_sent_ahead_are_answered_in_their_order(server: Server, client: httpx.Client) -> None:
    session = made(client)
    with connected(server) as connection:
        connection.sendall(asked(session, OF_JSON, JSON) * 20)
        with connection.makefile("rb") as stream:
            steps = [step_in(stream) for _ in range(20)]
    assert steps == list(range(1, 21))


def step_in(stream: BinaryIO) -> int:
    """The step of the next reply, of which no byte more is read: the next one follows."""
    head = b"".join(iter(stream.readline, b"\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    step: int = json.loads(stream.read(int(length[1])))["step"]
    return step


@pytest.mark.parametrize(("more", "version"), [({"connection": "close"}, "1.1"), ({}, "1.0")])
def test_the_connection_ends_where_it_is_to_end(server: Server, client: httpx.Client, more: str, version: str) -> None:
    session = made(client)
    with connected(server) as connection:
        connection.sendall(asked(session, OF_JSON | more, JSON, version=version))
        status, headers, _ = reply_on(connection)
        assert (status, headers["connection"]) == (200, "close")
        assert connection.recv(1) == b""


def test_who_is_gone_is_not_waited_for(server: Server, client: httpx.Client) -> None:
    """The step was asked for, and is taken; the connection is another's by then."""
    session, before = made(client), read(client)
    with connected(server) as connection:
        connection.sendall(asked(session, OF_JSON, JSON))
    deadline = time.monotonic() + 20
    while client.get(f"/v1/sessions/{session}").json()["step"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ways(client, before) == (1, 0)
    assert client.post(f"/v1/sessions/{session}/steps", content=JSON, headers=OF_JSON).json()["step"] == 2


FEW = 6  # requests in flight


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"RAVINE_MAX_REQUESTS": str(FEW), "RAVINE_JIT": "false"}
    with serving(tmp_path_factory.mktemp("narrow") / "data", environment=settings) as running:
        yield running


def left_over(session: str, long: str) -> Iterator[tuple[bytes, bool]]:
    """What clients send before they go, and whether they reset the connection: at each moment of a request, with many
    of them behind each other, with what is no request behind them, and with a long reply that they do not read.
    """
    whole = asked(session, OF_JSON, JSON)
    partial = json.dumps({"gradients": {"w": [1.0]}, "partial": True}).encode()
    pull = asked(long, {"accept": SAFETENSORS}, b"", "", "1.1", "GET", "params")
    sent = [whole[:end] for end in range(1, len(whole), 7)]
    sent += [whole * count for count in (1, 2, 2 * FEW, 100)]
    sent += [whole + b"\0\r\n\r\n", whole * 3 + whole[:-5], whole + asked(session, OF_JSON, b"{") + whole]
    sent += [asked(long, OF_JSON | {"accept": SAFETENSORS}, partial) * count for count in (1, 3)] + [pull, pull * 3]
    return ((each, reset) for each in sent for reset in (False, True))


def test_places_are_given_back_whenever_a_client_goes(narrow: Server) -> None:
    with narrow.client() as client:
        session = made(client)
        long = create(client, optimizer="sgd", params={"w": [1.0], "b": [0.5] * 1_000_000})["id"]
        client.get(f"/v1/sessions/{long}/params", headers={"accept": SAFETENSORS})
        for turn in range(2):
            for sent, reset in left_over(session, long):
                with connected(narrow) as connection:
                    connection.sendall(sent)
                    if turn:
                        time.sleep(0.002)  # so that it is begun
                    if reset:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gauges = {"ravine_http_requests_in_flight": 0, "ravine_http_arrivals": 0, "ravine_http_connections": 1}
        deadline = time.monotonic() + 20
        while {name: value(found := read(client), name) for name in gauges} != gauges:
            assert time.monotonic() < deadline, {name: value(found, name) for name in gauges}
            time.sleep(0.05)
    with contextlib.ExitStack() as stack:  # and what was begun and never entered is not counted for ever either
        connections = [stack.enter_context(connected(narrow)) for _ in range(FEW)]
        for connection in connections:
            connection.sendall(asked(session, OF_JSON, JSON))
        assert [reply_on(connection)[0] for connection in connections] == [200] * FEW


def test_requests_are_counted_and_named(server: Server, client: httpx.Client) -> None:
    session, before = made(client), read(client)
    with connected(server) as connection:
        connection.sendall(asked(session, OF_JSON | {"x-request-id": "mine"}, JSON))
        assert reply_on(connection)[1]["x-request-id"] == "mine"
        connection.sendall(asked(session, OF_JSON | {"if-match": '"0"'}, JSON))
        assert reply_on(connection)[0] == 412
    labels = {"method": "POST", "route": "/v1/sessions/{session}/steps"}
    assert grown(client, before, "ravine_http_requests_total", status="2xx", **labels) == 1
    assert grown(client, before, "ravine_http_requests_total", status="4xx", **labels) == 1
    assert grown(client, before, "ravine_http_request_duration_seconds_count", **labels) == 2
    assert grown(client, before, "ravine_http_refused_total", problem="step-conflict") == 1
    assert ways(client, before) == (2, 0)


def test_keys_are_asked_for_on_it_too(tmp_path: Path) -> None:
    """An administrator, a worker of another session, another tenant; and one that is revoked."""
    with houses(tmp_path / "data") as world:
        own = world.sibling
        for client in world.clients.values():
            client.get(f"/v1/sessions/{own}/params")
        step = json.dumps({"gradients": {"w": [1.0]}}).encode()

        def status(headers: dict[str, str], session: str = own) -> int:
            with connected(world.server) as connection:
                connection.sendall(asked(session, OF_JSON | headers, step))
                return reply_on(connection)[0]

        bearers = {scope: bearing(text) for scope, (text, _) in world.keys.items()}
        assert [status(bearers[scope]) for scope in ("admin", "session", "worker")] == [200, 200, 404]
        assert status({}) == 401
        assert status({"authorization": "Bearer rvn_none"}) == 401
        assert status({"authorization": bearers["admin"]["Authorization"].replace("Bearer", "Basic")}) == 401
        assert status(dict(world.other.headers)) == 404
        revoke(world.server.store_url(), world.keys["session"][1])
        time.sleep(1.1)  # for as long it may be believed in
        assert [status(bearers[scope]) for scope in ("admin", "session")] == [200, 401]


def test_a_line_of_the_log_says_so(server: Server, client: httpx.Client) -> None:
    session = made(client)
    client.post(f"/v1/sessions/{session}/steps", content=JSON, headers=OF_JSON | {"x-request-id": "to-be-found"})
    deadline = time.monotonic() + 20
    while "request_id=to-be-found" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    line = next(line for line in server.log.read_text().splitlines() if "request_id=to-be-found" in line)
    assert f"POST /v1/sessions/{session}/steps 200" in line
