"""Traces, as a collector receives them; and nothing of them where they are off."""

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import ROOT, Server, serving
from tests.wire import create

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra `tracing`")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

STEP = {"gradients": {"w": [1.0, 2.0]}}
STEPS = "POST /v1/sessions/{session}/steps"


class Span:
    """As it came; ids in hexadecimal."""

    def __init__(self, resource: dict[str, Any], span: Any) -> None:
        self.resource = resource
        self.name: str = span.name
        self.trace, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.kind: int = span.kind
        self.status: int = span.status.code
        self.nanoseconds: int = span.end_time_unix_nano - span.start_time_unix_nano
        self.attributes = attributes_of(span.attributes)
        self.links = [link.trace_id.hex() for link in span.links]


def attributes_of(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.paths.add(self.path)
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def take(self, message: Any) -> None:
        for group in message.resource_spans:
            resource = attributes_of(group.resource.attributes)
            self.spans += [Span(resource, span) for scope in group.scope_spans for span in scope.spans]

    def wait_for(self, wanted: Callable[[Span], bool], count: int) -> list[Span]:
        deadline = time.monotonic() + 15
        while True:
            found = [span for span in list(self.spans) if wanted(span)]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{len(found)} of {count} spans: {[s.name for s in self.spans]}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.server.shutdown()


def environment(url: str, **more: str) -> dict[str, str]:
    given = {"RAVINE_TRACING": "true", "RAVINE_JIT": "false", "OTEL_EXPORTER_OTLP_ENDPOINT": url}
    return given | {"OTEL_BSP_SCHEDULE_DELAY": "50"} | more


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("traced") / "data", environment=environment(collector.url)) as running:
        yield running


@pytest.fixture
def caller(traced: Server) -> Iterator[httpx.Client]:
    with traced.client() as open_client:
        yield open_client


def carried(number: int, *, sampled: bool = True) -> tuple[str, dict[str, str]]:
    """The id of a trace, and the header that says that the request belongs to it."""
    trace = f"{0xABC0_0000 + number:032x}"
    return trace, {"traceparent": f"00-{trace}-{number + 1:016x}-0{int(sampled)}"}


def test_a_step_under_the_trace_of_its_sender(collector: Collector, caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    trace, headers = carried(1)
    reply = caller.post(f"/v1/sessions/{session}/steps", json=STEP, headers=headers)
    assert reply.status_code == 200
    spans = {span.name: span for span in collector.wait_for(lambda span: span.trace == trace, 4)}
    assert spans.keys() == {STEPS, "append", "apply", "encode"}
    request = spans[STEPS]
    assert request.parent == headers["traceparent"].split("-")[2]
    assert {spans[name].parent for name in ("append", "apply", "encode")} == {request.id}
    assert all(0 < spans[name].nanoseconds <= request.nanoseconds for name in spans)
    assert request.kind == 2, "a server's"
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/sessions/{session}/steps",
        "url.path": f"/v1/sessions/{session}/steps",
        "http.response.status_code": 200,
        "ravine.request_id": reply.headers["x-request-id"],
    }
    assert spans["append"].attributes == {"ravine.session": session, "ravine.changes": 1}
    assert request.resource["service.name"] == "ravine"
    assert request.resource["service.version"]
    assert collector.paths == {"/v1/traces"}


def test_a_key_in_a_path_is_not_sent_on(collector: Collector, caller: httpx.Client) -> None:
    trace, headers = carried(2)
    assert caller.get("/v1/sessions/rvn_abcdefghijkl_secretsecret/params", headers=headers).status_code == 404
    (span,) = collector.wait_for(lambda span: span.trace == trace, 1)
    assert span.attributes["url.path"] == "/v1/sessions/rvn_abcdefghijkl_…/params"


def test_other_changes_and_refusals(collector: Collector, caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    for number, (method, path, body, status, inside) in enumerate(
        [
            ("PUT", "/params", {"params": {"w": [3.0, 4.0]}}, 200, {"append", "apply"}),
            ("PATCH", "", {"optimizer": {"lr": 0.5}}, 200, {"append", "apply"}),
            ("POST", "/steps", {"gradients": {"x": 1}}, 422, set[str]()),
            ("GET", "/params", None, 200, set[str]()),
        ],
        start=10,
    ):
        trace, headers = carried(number)
        reply = caller.request(method, f"/v1/sessions/{session}{path}", json=body, headers=headers)
        assert reply.status_code == status
        spans = collector.wait_for(lambda span, trace=trace: span.trace == trace, 1 + len(inside))  # type: ignore[misc]
        names = {span.name for span in spans}
        assert names == inside | {f"{method} /v1/sessions/{{session}}{path}"}
        (request,) = [span for span in spans if span.name.startswith(method)]
        assert (request.attributes["http.response.status_code"], request.status) == (status, 0)


def test_a_batch_is_linked_to_all_whose_changes_it_has(collector: Collector, traced: Server) -> None:
    with traced.client() as client:
        session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
        traces = [carried(100 + number) for number in range(24)]
        with ThreadPoolExecutor(12) as threads:
            path = f"/v1/sessions/{session}/steps"
            sent = [threads.submit(client.post, path, json=STEP, headers=headers) for _, headers in traces]
            assert {each.result().status_code for each in sent} == {200}
    ids = {trace for trace, _ in traces}
    for name in (STEPS, "apply", "encode"):
        found = collector.wait_for(lambda span, name=name: span.name == name and span.trace in ids, 24)  # type: ignore[misc]
        assert sorted(span.trace for span in found) == sorted(ids), name
    appends = [span for span in collector.spans if span.name == "append" and span.trace in ids]
    assert sorted([trace for span in appends for trace in (span.trace, *span.links)]) == sorted(ids)
    assert sum(span.attributes["ravine.changes"] for span in appends) == 24


def test_what_is_not_sampled_is_not_sent(collector: Collector, caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    unsampled, headers = carried(200, sampled=False)
    assert caller.post(f"/v1/sessions/{session}/steps", json=STEP, headers=headers).status_code == 200
    sampled, headers = carried(201)
    assert caller.post(f"/v1/sessions/{session}/steps", json=STEP, headers=headers).status_code == 200
    collector.wait_for(lambda span: span.trace == sampled, 4)
    assert [span.name for span in collector.spans if span.trace == unsampled] == []


@pytest.mark.parametrize("header", ["", "00-xyz-1-01", "x" * 2000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none_begins_a_trace(collector: Collector, caller: httpx.Client, header: str) -> None:
    headers = {"traceparent": header, "X-Request-Id": f"begins-{len(header)}"}
    assert caller.get("/livez", headers=headers).status_code == 200
    wanted = headers["X-Request-Id"]
    (span,) = collector.wait_for(lambda span: span.attributes.get("ravine.request_id") == wanted, 1)
    assert span.parent == ""


def test_the_last_spans_are_sent_at_the_end(tmp_path: Path, collector: Collector) -> None:
    given = environment(collector.url, OTEL_BSP_SCHEDULE_DELAY="600000", OTEL_SERVICE_NAME="a-name-of-its-own")
    with serving(tmp_path / "data", environment=given) as server, server.client() as client:
        trace, headers = carried(300)
        assert client.get("/livez", headers=headers).status_code == 200
        assert [span for span in collector.spans if span.trace == trace] == []
    (span,) = collector.wait_for(lambda span: span.trace == trace, 1)
    assert span.resource["service.name"] == "a-name-of-its-own"


def test_without_a_collector_all_goes_on_and_ends(tmp_path: Path) -> None:
    with serving(tmp_path / "data", environment=environment("http://127.0.0.1:9")) as server:
        with server.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
            for _ in range(5):
                assert client.post(f"/v1/sessions/{session}/steps", json=STEP).status_code == 200
        assert server.stop(20) == 0
        assert "Traceback" not in server.log.read_text()


# -- off, and not there ------------------------------------------------------------------------------------------------


def python(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_off_nothing_of_it_is_imported() -> None:
    """By us: FastAPI and redis-py look at the parts of OpenTelemetry that are not of traces by themselves."""
    done = python(
        "import sys, service.cli\n"
        "from service.app import create_app\n"
        "from service.settings import Settings\n"
        "create_app(Settings())\n"
        "ours = ('opentelemetry.sdk.trace', 'opentelemetry.exporter')\n"
        "print([name for name in sys.modules if name.startswith(ours)])\n"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_on_without_the_packages_is_refused_in_a_sentence(missing: str) -> None:
    done = python(
        f"import os, sys; sys.modules[{missing!r}] = None\n"
        "os.environ['RAVINE_TRACING'] = 'true'\n"
        "sys.argv = ['ravine', 'serve', '--port', '0']\n"
        "from service.cli import main; main()\n"
    )
    assert done.returncode == 2, done.stderr
    assert "tracing: traces need the extra `tracing`: pip install 'ravine[tracing]'" in done.stderr
    assert "Traceback" not in done.stderr
