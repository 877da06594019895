"""Several workers on one port: each session is hot in one of them, and a client notices nothing of it."""

import json
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metric_families
from prometheus_client.parser import text_string_to_metric_families

from service.workers.routing import home_of
from tests.certificates import Authority
from tests.http.sockets import connected, head_of, reply_on
from tests.http.test_metrics import DEPLOY, alerts, check, expressions_of_the_dashboard
from tests.running import Server, serving
from tests.wire import create
from tests.workers import at_homes, by_worker

WORKERS = 3
SGD = {"optimizer": {"kind": "sgd", "lr": 1.0}, "params": {"w": [0.0, 0.0]}}
LARGE = 60_000  # elements: half a megabyte of JSON


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"RAVINE_HEADER_SECONDS": "1.5", "RAVINE_JIT": "false"}
    data = tmp_path_factory.mktemp("crew") / "data"
    with serving(data, "--workers", str(WORKERS), environment=settings) as server:
        yield server


@pytest.fixture
def client(crew: Server) -> Iterator[httpx.Client]:
    with crew.client() as open_client:
        yield open_client


@pytest.fixture(scope="module")
def homes(crew: Server) -> list[str]:
    """A session at home in each worker."""
    with crew.client() as client:
        return at_homes(client, WORKERS, **SGD)


def handed_over(client: httpx.Client) -> float:
    return sum(by_worker(client, "ravine_handovers_total", became="given").values())


def call(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body and not any(line.startswith("Transfer-Encoding") for line in headers):
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def stepping(session: str, g: float = -1.0, size: int = 2) -> tuple[str, str, bytes]:
    return "POST", f"/v1/sessions/{session}/steps", json.dumps({"gradients": {"w": [g] * size}}).encode()


def step_of(connection: socket.socket) -> int:
    status, headers, body = reply_on(connection)
    assert status == 200, body
    return int(headers["ravine-step"])


def step_at(connection: socket.socket, session: str) -> int:
    connection.sendall(call(*stepping(session)))
    return step_of(connection)


# -- where sessions are ------------------------------------------------------------------------------------------------


def test_each_session_is_hot_in_its_home_alone(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--workers", str(WORKERS), environment={"RAVINE_JIT": "false"}) as server:
        with server.client() as client:
            sessions = [create(client, **SGD)["id"] for _ in range(24)]

        def step_all(_: int) -> None:
            with server.client() as own:
                for session in sessions:
                    reply = own.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [-1, -2]}})
                    assert reply.status_code == 200, reply.text

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(step_all, range(8)))
        with server.client() as client:
            for session in sessions:
                reply = client.get(f"/v1/sessions/{session}/params").json()
                assert (reply["step"], reply["params"]) == (8, {"w": [8, 16]})
            at_home = Counter(home_of(session.encode(), WORKERS) for session in sessions)
            assert by_worker(client, "ravine_sessions_hot") == {n: at_home[n] for n in range(WORKERS)}
            # Nobody met a step that another process had taken: nothing was read twice.
            assert sum(by_worker(client, "ravine_session_loads_total").values()) == len(sessions)
            assert sum(by_worker(client, "ravine_handovers_total", became="kept").values()) == 0


def test_a_client_that_stays_is_handed_over_once(crew: Server, client: httpx.Client) -> None:
    session = create(client, **SGD)["id"]
    before = handed_over(client)
    with connected(crew) as connection:
        assert [step_at(connection, session) for _ in range(20)] == list(range(1, 21))
    assert handed_over(client) - before <= 1


def test_a_connection_that_alternates(crew: Server, client: httpx.Client) -> None:
    sessions = at_homes(client, WORKERS, **SGD)
    before = handed_over(client)
    with connected(crew) as connection:
        for t in range(1, 31):
            assert [step_at(connection, session) for session in sessions] == [t] * WORKERS
    assert handed_over(client) - before >= 30 * WORKERS - 1  # the first may have come to the right one


def test_connections_are_counted_where_they_are(crew: Server, client: httpx.Client, homes: list[str]) -> None:
    with connected(crew) as first, connected(crew) as second:
        for session in homes:
            step_at(first, session)
            step_at(second, session)
        there = by_worker(client, "ravine_http_connections")
        assert there[WORKERS - 1] >= 2
        assert sum(there.values()) == 3
    deadline = time.monotonic() + 20
    while sum(by_worker(client, "ravine_http_connections").values()) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- what may be under way ---------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_their_order(crew: Server, client: httpx.Client) -> None:
    sessions = at_homes(client, WORKERS, **SGD)
    with connected(crew) as connection:
        for t in range(1, 6):
            connection.sendall(b"".join(call(*stepping(session)) for session in sessions * 2))
            told = [step_exactly(connection) for _ in range(2 * WORKERS)]
            assert told == [2 * t - 1] * WORKERS + [2 * t] * WORKERS


def step_exactly(connection: socket.socket) -> int:
    """As step_of, without the bytes of the next reply."""
    status, headers = head_of(connection)
    left = int(headers["content-length"])
    while left:
        left -= len(connection.recv(left))
    assert status == 200
    return int(headers["ravine-step"])


@pytest.mark.parametrize("first", [1 << 30, 200, 70_000])
def test_a_large_body_whose_head_leads_elsewhere(crew: Server, client: httpx.Client, first: int) -> None:
    """At once, the head and a little, or more than a buffer: no byte is lost, or comes before another."""
    body = {"optimizer": {"kind": "sgd", "lr": 1.0}, "params": {"w": [0.0] * LARGE}}
    sessions = at_homes(client, WORKERS, **body)
    g = [-float(i) for i in range(LARGE)]
    request = {session: call("POST", stepping(session)[1], json.dumps({"gradients": {"w": g}}).encode(), "Accept: */*")
               for session in sessions}  # fmt: skip
    before = handed_over(client)
    with connected(crew) as connection:
        for session in sessions:
            connection.sendall(request[session][:first])
            if first < len(request[session]):
                time.sleep(0.05)
                connection.sendall(request[session][first:])
            status, _, answer = reply_on(connection)
            assert status == 200, answer
            assert json.loads(answer)["params"]["w"] == [-value for value in g]
    assert handed_over(client) - before >= WORKERS - 1


def test_chunks_after_a_handover(crew: Server, client: httpx.Client) -> None:
    sessions = at_homes(client, WORKERS, **SGD)
    head = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    with connected(crew) as connection:
        for session in sessions:
            method, path, body = stepping(session)
            connection.sendall(call(method, path, b"", *head) + b"%x\r\n%s\r\n" % (10, body[:10]))
            time.sleep(0.02)
            for byte in body[10:]:
                connection.sendall(b"1\r\n%c\r\n" % byte)
            connection.sendall(b"0\r\n\r\n")
            assert step_of(connection) == 1
            assert step_at(connection, session) == 2


def test_a_client_that_waits_for_100_continue(crew: Server, client: httpx.Client) -> None:
    sessions = at_homes(client, WORKERS, **SGD)
    for session in sessions:
        with connected(crew) as connection:
            step_at(connection, sessions[0])
            method, path, body = stepping(session)
            whole = call(method, path, body, "Expect: 100-continue")
            head, _, body = whole.partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            assert head_of(connection)[0] == 100
            connection.sendall(body)
            assert step_of(connection) >= 1


@pytest.mark.parametrize("cut", [3, 20, 30, 45, 60])
def test_a_head_in_two_parts(crew: Server, client: httpx.Client, cut: int) -> None:
    """Where it cannot be told yet whose session it is, it is served where it came."""
    sessions = at_homes(client, WORKERS, **SGD)
    with connected(crew) as connection:
        for session in sessions:
            request = call(*stepping(session))
            connection.sendall(request[:cut])
            time.sleep(0.05)
            connection.sendall(request[cut:])
            assert step_of(connection) == 1
            assert step_at(connection, session) == 2


def test_long_polls_before_and_after_a_handover(crew: Server, client: httpx.Client) -> None:
    sessions = at_homes(client, WORKERS, **SGD)
    with connected(crew) as connection:
        for session in sessions:
            connection.sendall(call("GET", f"/v1/sessions/{session}/params?after=0&wait=20"))
            time.sleep(0.1)  # it waits by now; if not, it is answered all the same
            assert client.post(stepping(session)[1], json={"gradients": {"w": [-1, -1]}}).status_code == 200
            assert step_of(connection) == 1
            assert step_at(connection, session) == 2


def test_an_event_stream_after_a_handover(crew: Server, client: httpx.Client) -> None:
    sessions = at_homes(client, WORKERS, **SGD)
    for session in sessions[1:]:
        with connected(crew) as connection:
            step_at(connection, sessions[0])
            connection.sendall(call("GET", f"/v1/sessions/{session}/events"))
            assert head_of(connection)[0] == 200
            assert client.post(stepping(session)[1], json={"gradients": {"w": [-1, -1]}}).status_code == 200
            said = b""
            while b"event: step" not in said:
                piece = connection.recv(65536)
                assert piece, said
                said += piece


def test_a_head_that_stays_in_pieces_has_its_deadline(crew: Server, homes: list[str]) -> None:
    for session in homes:
        with connected(crew) as connection:
            step_at(connection, homes[0])
            connection.sendall(call(*stepping(session))[:70])  # the path is there, the head is not whole
            assert reply_on(connection)[0] == 408


def test_a_client_that_leaves_at_once_harms_nobody(crew: Server, client: httpx.Client, homes: list[str]) -> None:
    for session in homes * 10:
        with connected(crew) as connection:
            step_at(connection, homes[0])
            connection.sendall(call("GET", f"/v1/sessions/{session}/params"))
    assert client.get(f"/v1/sessions/{homes[1]}/params").status_code == 200


def test_sessions_that_there_are_not(crew: Server, homes: list[str]) -> None:
    with connected(crew) as connection:
        for session in homes:
            connection.sendall(call("GET", f"/v1/sessions/{session[:-1]}/params"))
            assert reply_on(connection)[0] == 404
            step_at(connection, session)


# -- what all say together ---------------------------------------------------------------------------------------------


def test_metrics_of_all(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)  # or Prometheus refuses it
    assert all("worker" in sample.labels for family in families for sample in family.samples)
    assert by_worker(client, "ravine_worker_up") == {0: 1, 1: 1, 2: 1}
    assert set(by_worker(client, "process_resident_memory_bytes")) == {0, 1, 2}
    open_ = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert open_.headers["content-type"].startswith("application/openmetrics-text")
    samples = [sample for family in open_metric_families(open_.text) for sample in family.samples]
    assert {sample.labels["worker"] for sample in samples} == {"0", "1", "2"}


def test_the_dashboard_and_the_alerts_know_of_workers(client: httpx.Client) -> None:
    session = create(client, **SGD)["id"]
    assert client.post(stepping(session)[1], json={"gradients": {"w": [1, 1]}}).status_code == 200
    found = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    named = check([*expressions_of_the_dashboard(), *(rule["expr"] for rule in alerts())], found)
    assert {"ravine_worker_up", "ravine_handovers_total"} <= named
    dashboard = json.loads((DEPLOY / "grafana" / "ravine.json").read_text())
    for target in (target for panel in dashboard["panels"] for target in panel.get("targets", ())):
        together = re.match(r"(sum|max|min|histogram_quantile|avg)\b", target["expr"])
        assert together or "{{worker}}" in target["legendFormat"], "lines of one name"


def test_log_lines_say_whose_they_are(crew: Server, client: httpx.Client, homes: list[str]) -> None:
    for number, session in enumerate(homes):
        client.get(f"/v1/sessions/{session}/params", headers={"X-Request-Id": f"of-{number}"})
    deadline = time.monotonic() + 20
    while not all(f"request_id=of-{number} worker={number}\n" in crew.log.read_text() for number in range(WORKERS)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_https_is_served_where_it_came(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    cert, key = authority.issue("localhost")
    trusting = ssl.create_default_context(cafile=authority.cert)
    arguments = ("--workers", "2", "--tls-cert", str(cert), "--tls-key", str(key))
    with (
        serving(tmp_path / "data", *arguments) as server,
        server.client(verify=trusting) as first,
        server.client(verify=trusting) as second,
    ):
        session = create(first, **SGD)["id"]
        for t in range(1, 9):
            reply = (first, second)[t % 2].post(stepping(session)[1], json={"gradients": {"w": [-1, -1]}})
            assert (reply.status_code, reply.headers["ravine-step"]) == (200, str(t))
        assert set(by_worker(first, "ravine_worker_up").values()) == {1}
