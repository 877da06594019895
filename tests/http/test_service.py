"""The service itself: its health, catalogue, documents, log, and how it stops."""

import json
import re
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest

from core import optimizers, schedules, transforms
from service.operations import PAGES
from service.problem_table import PROBLEMS
from tests.http.contributions import beside, post
from tests.http.refusals import refused
from tests.http.sockets import await_listeners, connected, head_of, reply_on
from tests.running import Server, serving
from tests.wire import create


class Page(HTMLParser):
    """The addresses that a page names, by the tag that names them, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [(tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


# -- health and catalogue ------------------------------------------------------------------------------------------


def test_health(client: httpx.Client) -> None:
    for path, status in (("/livez", "alive"), ("/readyz", "ready")):
        reply = client.get(path)
        assert (reply.status_code, reply.json()) == (200, {"status": status})
        assert client.head(path).status_code == 200


FAMILIES = {"optimizers": optimizers.KINDS, "schedules": schedules.KINDS, "transforms": transforms.KINDS}


@pytest.mark.parametrize(("family", "kinds"), FAMILIES.items())
def test_the_catalogue(client: httpx.Client, family: str, kinds: dict[str, object]) -> None:
    listing = client.get(f"/v1/{family}").json()
    assert listing["has_more"] is False
    assert {entry["kind"] for entry in listing["data"]} == set(kinds)
    for entry in listing["data"]:
        assert client.get(f"/v1/{family}/{entry['kind']}").json() == entry
        assert entry["formula"]
        assert entry["source"]
        assert entry["url"].startswith("https://")
        assert entry["schema"]["properties"]["kind"]["const"] == entry["kind"]


@pytest.mark.parametrize(("family", "kinds"), FAMILIES.items())
def test_the_catalogue_by_pages(client: httpx.Client, family: str, kinds: dict[str, object]) -> None:
    seen: list[str] = []
    more = True
    while more:
        after = f"&after={seen[-1]}" if seen else ""
        page = client.get(f"/v1/{family}?limit=7{after}").json()
        assert len(page["data"]) == (7 if page["has_more"] else len(kinds) - len(seen))
        seen += [entry["kind"] for entry in page["data"]]
        more = page["has_more"]
    assert seen == list(kinds)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=nobody"])
def test_a_page_of_the_catalogue_that_cannot_be(client: httpx.Client, query: str) -> None:
    refused(client.get(f"/v1/optimizers?{query}"), 422, "invalid-request")


MISSING = {
    "params": "params-required",
    "loss": "loss-required",
    "hessian": "hessian-required",
    "hessian_diagonal": "hessian-required",
}


@pytest.mark.parametrize("kind", sorted(optimizers.KINDS))
def test_the_catalogue_tells_the_bytes_and_needs_of_a_session(client: httpx.Client, kind: str) -> None:
    entry, shapes = client.get(f"/v1/optimizers/{kind}").json(), {"w": [10]}
    for dtype, width in entry["bytes_per_parameter"].items():
        made = create(client, optimizer=kind, shapes=shapes, dtype=dtype)
        if entry["family"] == "elements":
            assert made["state_bytes"] == 10 * width + 8 * len(entry["own"])
    defaults = {name: member.get("default") for name, member in entry["schema"]["properties"].items()}
    assert made["optimizer"] == defaults | {"kind": kind}
    assert made["holds_params"] is False
    for need in entry["needs"]:
        tensors, members = beside(entry["needs"], shapes, 1, without=[need])
        refused(post(client, made["id"], {"w": np.ones(10)} | tensors, members), 422, MISSING[need])
    tensors, members = beside(entry["needs"], shapes, 1)
    reply = post(client, made["id"], {"w": np.ones(10)} | tensors, members)
    if entry["holds_params"]:
        refused(reply, 422, "params-required")
        values = {"params": {"w": [0.5] * 10}}
        assert client.put(f"/v1/sessions/{made['id']}/params", json=values).status_code == 200
        tensors, members = beside(entry["needs"], shapes, 1, without=["params"])
        reply = post(client, made["id"], {"w": np.ones(10)} | tensors, members)
    assert (reply.status_code, reply.headers["ravine-step"]) == (200, "1"), reply.text


def test_the_schemas_of_the_catalogue_are_enough_to_make_a_session(client: httpx.Client) -> None:
    """Every member of a kind may be sent with its default, under its own name."""
    for entry in client.get("/v1/transforms").json()["data"]:
        members = entry["schema"]["properties"]
        given = {name: member["default"] for name, member in members.items() if member.get("default") is not None}
        needed = {
            "max_norm": 1.0,
            "weight_decay": 0.1,
            "l1": 0.1,
            "eta": 0.1,
            "steps": 2,
            "decay": 0.9,
            "onto": "simplex",
        }
        given |= {name: needed[name] for name in entry["schema"]["required"] if name != "kind"}
        if entry["kind"] == "clip":
            given["max_value"] = 1.0
        transform = {"kind": entry["kind"], **given}
        shown = create(client, optimizer="sgd", params={"w": [[1.0]]}, transforms=[transform])["transforms"]
        assert shown == [dict.fromkeys(members) | transform]


# -- problems, document, reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", sorted(PROBLEMS))
def test_every_problem_has_a_page(client: httpx.Client, slug: str) -> None:
    reply = client.get(f"/problems/{slug}")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = Page(reply.text)
    assert PROBLEMS[slug].title in page.text
    assert slug in page.text
    assert "How to mend it" in page.text


def test_the_index_of_problems(client: httpx.Client) -> None:
    page = Page(client.get("/problems").text)
    assert {f"/problems/{slug}" for slug in PROBLEMS} <= {address for _, address in page.addresses}


def test_the_document_has_every_call_that_is_answered(client: httpx.Client) -> None:
    reply = client.get("/openapi.json")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    paths = reply.json()["paths"]
    values = {"session": f"ses_{'0' * 25}", "kind": "none-such"}
    for template, operations in paths.items():
        path = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
        for method in ("GET", "PUT", "POST", "PATCH", "DELETE"):
            answer = client.request(method, path, headers={"Content-Type": "application/json"})
            assert (answer.status_code != 405) == (method.lower() in operations), (method, template)
            assert answer.status_code < 500
            if answer.status_code >= 400:
                assert answer.json()["type"] != "/problems/not-found" or "{kind}" in template
                if answer.status_code != 405:
                    assert str(answer.status_code) in operations[method.lower()]["responses"], (method, template)
    # And the contract's calls are all there.
    one = "/v1/sessions/{session}"
    expected = {
        "/v1/sessions": {"get", "post"},
        one: {"get", "patch", "delete"},
        **{f"{one}/{resource}": {"post"} for resource in ("fork", "steps")},
        **{
            f"{one}/{resource}": {"get"}
            for resource in ("state", "history", "events", "schedule", "workers", "rounds/current")
        },
        f"{one}/params": {"get", "put"},
        **{f"/v1/{family}": {"get"} for family in ("optimizers", "schedules", "transforms", "reducers")},
        "/livez": {"get"},
        "/readyz": {"get"},
    }
    assert expected.items() <= {path: set(operations) - {"head"} for path, operations in paths.items()}.items()


@pytest.mark.parametrize("path", [page for page in PAGES if page != "/openapi.json"])
def test_pages_need_no_network(client: httpx.Client, path: str) -> None:
    reply = client.get(path.format(slug="not-found"))
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = Page(reply.text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for tag, address in page.addresses:
        assert tag == "a"
        assert not re.match(r"(?i)[a-z]+:|//", address), address
        if address.startswith("/"):
            assert client.get(address).status_code == 200, address
    assert "@import" not in reply.text
    assert "url(" not in reply.text
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_reference_shows_every_call(client: httpx.Client) -> None:
    text = Page(client.get("/docs").text).text
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in text


# -- the log -------------------------------------------------------------------------------------------------------


def lines_with(log: Path, text: str, count: int) -> list[str]:
    """The lines of the log with `text`, once there are `count` of them: they are written ten times a second."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = [line for line in log.read_text().splitlines() if text in line]
        if len(lines) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"the log has no {count} lines with {text!r}")


def test_the_request_id_stands_in_the_log(server: Server, client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    calls = [
        ("GET", "/livez", 200),
        ("GET", f"/v1/sessions/{session}", 200),
        ("GET", f"/v1/sessions/{session}/params", 200),
        ("POST", f"/v1/sessions/{session}/steps", 415),
        ("GET", "/nothing", 404),
    ]
    for number, (method, path, status) in enumerate(calls):
        given = f"log-{session}-{number}"
        reply = client.request(method, path, headers={"X-Request-Id": given})
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, given)
        (line,) = lines_with(server.log, given, 1)
        assert all(part in line for part in (method, path, str(status)))


def test_paths_cannot_forge_lines_of_the_log(server: Server, client: httpx.Client) -> None:
    mark = "forged-" + str(time.monotonic_ns())
    reply = client.get(f"/v1/sessions/x%0a2026-01-01T00:00:00Z%20GET%20/{mark}%1b[31m")
    assert reply.status_code == 404
    (line,) = lines_with(server.log, mark, 1)
    assert reply.headers["x-request-id"] in line
    assert "\x1b" not in line


def test_the_log_in_json(data: Path) -> None:
    environment = {"RAVINE_JIT": "false", "RAVINE_LOG_FORMAT": "json"}
    with serving(data, environment=environment) as server, server.client() as client:
        client.get("/v1/sessions/x%0ay", headers={"X-Request-Id": "in-json"})
        (line,) = lines_with(server.log, "in-json", 1)
        record = json.loads(line)
    assert (record["method"], record["path"], record["status"]) == ("GET", "/v1/sessions/x\ny", 404)
    assert record["request_id"] == "in-json"


# -- stopping ------------------------------------------------------------------------------------------------------


class Load(threading.Thread):
    """Steps under keys of their own, one after the other, until the service is gone."""

    def __init__(self, server: Server, session: str) -> None:
        super().__init__(daemon=True)
        self.server, self.session = server, session
        self.acknowledged: list[int] = []
        self.others: list[str] = []

    def run(self) -> None:
        body = {"gradients": {"w": [1.0]}, "return": "none"}
        with self.server.client() as client:
            while True:
                try:
                    reply = client.post(f"/v1/sessions/{self.session}/steps", json=body)
                except httpx.TransportError:
                    return
                if reply.status_code != 200:
                    self.others.append(reply.text)
                    return
                self.acknowledged.append(reply.json()["step"])


@pytest.fixture
def loaded(data: Path) -> Iterator[tuple[Server, str, list[Load]]]:
    with serving(data, environment={"RAVINE_JIT": "false"}) as server:
        with server.client() as client:
            session = create(client, optimizer="sgd", params={"w": [0.0]})["id"]
        threads = [Load(server, session) for _ in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while not all(thread.acknowledged for thread in threads):  # or there is no load yet
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield server, session, threads


def test_stopping_under_load(loaded: tuple[Server, str, list[Load]]) -> None:
    server, session, threads = loaded
    body = b'{"gradients": {"w": [1.0]}, "return": "none"}'
    lines = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    lines += "Expect: 100-continue\r\n"
    waits: list[httpx.Response] = []

    def wait() -> None:
        with server.client() as client:
            waits.append(client.get(f"/v1/sessions/{session}/params", params={"after": 10**9, "wait": 60}))

    waiting = threading.Thread(target=wait)
    waiting.start()
    await_listeners(server, session, 1)
    with connected(server) as under_way, connected(server) as following:
        under_way.sendall(f"POST /v1/sessions/{session}/steps HTTP/1.1\r\n{lines}\r\n".encode())
        assert head_of(under_way)[0] == 100  # so it is under way, its body still to come
        following.sendall(f"GET /v1/sessions/{session}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert head_of(following)[0] == 200
        assert server.process is not None
        server.process.terminate()
        lines_with(server.log, "stopping", 1)
        under_way.sendall(body)
        status, _, reply = reply_on(under_way)
        assert status == 200
        last = json.loads(reply)["step"]
        while following.recv(65536):  # the stream ends
            pass
    assert server.process.wait(20) == 0
    waiting.join(5)
    assert [reply.status_code for reply in waits] == [304]
    for thread in threads:
        thread.join(5)
        assert not thread.others
        assert thread.acknowledged
    acknowledged = sorted([*(step for thread in threads for step in thread.acknowledged), last])
    assert len(set(acknowledged)) == len(acknowledged)
    server.restart()
    with server.client() as client:
        shown = client.get(f"/v1/sessions/{session}").json()
        # Nothing acknowledged is lost; of the steps without an answer each thread may have one.
        assert acknowledged[-1] <= shown["step"] <= len(acknowledged) + len(threads)
        values = client.get(f"/v1/sessions/{session}/params").json()["params"]["w"]
        assert values[0] == pytest.approx(-1e-3 * shown["step"], rel=1e-3)
