"""Headers, paths, methods and queries that cannot be: the right problem, and nothing changes."""

import gzip
import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from service.operations import OPERATIONS, PAGES
from tests.http.files import saved
from tests.http.refusals import pointers, refused, unchanged
from tests.http.sockets import connected, exchange, reply_on
from tests.running import Server
from tests.wire import SAFETENSORS, create

STEP = json.dumps({"gradients": {"w": [1.0, 2.0]}}).encode()
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    """At step 1."""
    with server.client() as client:
        made: str = create(client, optimizer="adam", params={"w": [1.0, 2.0]})["id"]
        assert client.post(f"/v1/sessions/{made}/steps", content=STEP, headers=JSON).status_code == 200
    return made


def writes(session: str) -> list[tuple[str, str, bytes]]:
    """Every call that has a body, with a good one."""
    path = f"/v1/sessions/{session}"
    return [
        ("POST", "/v1/sessions", b'{"optimizer": "sgd", "shapes": {"w": [1]}}'),
        ("PATCH", path, b'{"name": "n"}'),
        ("POST", f"{path}/fork", b"{}"),
        ("PUT", f"{path}/params", b'{"params": {"w": [1, 2]}}'),
        ("POST", f"{path}/steps", STEP),
    ]


# -- Content-Type and Content-Encoding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        None, "", "application/x-www-form-urlencoded", "text/plain", "text/csv", "application/xml", "json",
        "application/json; charset=latin-1", "application/problem+json", "multipart/form-data; boundary=x",
        "application/json, application/vnd.safetensors", ";", "application/" + "x" * 5000,
    ],
)  # fmt: skip
def test_other_content_types(client: httpx.Client, session: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    with unchanged(client, session):
        for method, url, body in writes(session):
            reply = client.request(method, url, content=body, headers=headers)
            document = refused(reply, 415, "unsupported-media-type")
            assert "application/json" in document["accepted"]
            assert ("application/vnd.safetensors" in document["accepted"]) == (method in ("PUT", "POST")) or (
                url.endswith("/fork")
            )
            assert reply.headers["accept"] == ", ".join(document["accepted"])


def test_a_file_where_only_json_is_read(client: httpx.Client, session: str) -> None:
    file = saved({"w": np.float32([1, 2])})
    with unchanged(client, session):
        for method, url in (("PATCH", f"/v1/sessions/{session}"), ("POST", f"/v1/sessions/{session}/fork")):
            reply = client.request(method, url, content=file, headers=SAFETENSORS)
            assert refused(reply, 415, "unsupported-media-type")["accepted"] == ["application/json"]


@pytest.mark.parametrize("coding", ["br", "deflate", "compress", "gzip, gzip", "gzip, identity", "utf-8", "x" * 5000])
def test_other_codings(client: httpx.Client, session: str, coding: str) -> None:
    with unchanged(client, session):
        for method, url, body in writes(session):
            reply = client.request(method, url, content=body, headers=JSON | {"Content-Encoding": coding})
            assert set(refused(reply, 415, "unsupported-media-type")["accepted"]) == {"gzip", "zstd", "identity"}
            assert "gzip" in reply.headers["accept-encoding"]


@pytest.mark.parametrize(
    ("coding", "change"),
    [
        ("gzip", lambda body: body),
        ("zstd", lambda body: body),
        ("gzip", lambda body: body[:0]),
        ("zstd", lambda body: body[:0]),
        ("gzip", lambda body: zstandard.compress(body)),
        ("zstd", lambda body: gzip.compress(body)),
        ("gzip", lambda body: gzip.compress(body)[:-3]),
        ("zstd", lambda body: zstandard.compress(body)[:-3]),
        ("gzip", lambda body: gzip.compress(body) + b"more"),
        ("zstd", lambda body: zstandard.compress(body) + b"more"),
        ("gzip", lambda body: gzip.compress(body)[:-8] + bytes(8)),
    ],
)
def test_codings_that_cannot_be_undone(client: httpx.Client, session: str, coding: str, change: Any) -> None:
    with unchanged(client, session):
        for method, url, body in writes(session):
            if url.endswith("/fork") and not change(body):
                continue  # no body at all is fine there
            reply = client.request(method, url, content=change(body), headers=JSON | {"Content-Encoding": coding})
            refused(reply, 400, "malformed-encoding")


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*, text/csv", "json"])
def test_other_accepts(client: httpx.Client, session: str, accept: str) -> None:
    path = f"/v1/sessions/{session}"
    with unchanged(client, session):
        reply = client.post(f"{path}/steps", content=STEP, headers=JSON | {"Accept": accept})
        if accept == "application/json;q=0":
            assert "application/vnd.safetensors" in refused(reply, 406, "not-acceptable")["offered"]
        refused(reply, 406, "not-acceptable")
        refused(client.get(f"{path}/params", headers={"Accept": accept}), 406, "not-acceptable")
        refused(client.get(f"{path}/state", headers={"Accept": accept}), 406, "not-acceptable")


# -- ids and paths -------------------------------------------------------------------------------------------------

IDS = [
    "x", "ses_", "ses_short", "ses_" + "0" * 19, "ses_" + "0" * 26, "ses_" + "0" * 300, "a" * 300, "%00", "%0d%0a",
    "%0D%0ASet-Cookie:%20a=b", "ses_%00" + "0" * 20, "ses_" + "0" * 20 + "%00", "..", "%2e%2e", "....", "*",
    "ses_" + "*" * 20, "ses_" + "0" * 20 + "}", "%7Bx%7D", "SES_" + "0" * 22, "ses_" + "A" * 22, "ses_" + "%C3%A9" * 10,
    "%ff%fe", "%", "%zz", "'", '"', "<script>",
    "ses_" + "0" * 20 + "%0A", "ses_" + "0" * 20 + "%20", "ses_%D9%A3" + "0" * 20,
]  # fmt: skip
RESOURCES = [
    ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/fork"), ("GET", "/history"), ("GET", "/state"),
    ("GET", "/params"), ("PUT", "/params"), ("POST", "/steps"), ("GET", "/events"),
]  # fmt: skip


@pytest.mark.parametrize("id_", IDS, ids=[ascii(id_)[:30] for id_ in IDS])
def test_malformed_ids(server: Server, id_: str) -> None:
    """By hand: client libraries tidy paths up."""
    body = {"POST": STEP, "PUT": b'{"params": {"w": [1]}}', "PATCH": b'{"name": "n"}'}
    with connected(server) as connection:
        for method, resource in RESOURCES:
            content = b"" if resource == "/fork" else body.get(method, b"")
            target = f"/v1/sessions/{id_}{resource}".encode()
            headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}".encode()
            connection.sendall(b"%s %s HTTP/1.1\r\n%s\r\n\r\n%s" % (method.encode(), target, headers, content))
            status, found, reply = reply_on(connection)
            assert status == 404, (method, target, status, reply)
            assert "set-cookie" not in found
            document = json.loads(reply)
            assert document["type"] in ("/problems/session-not-found", "/problems/not-found")
            assert document["instance"].isascii()
            assert document["instance"].isprintable()
            if found.get("connection") == "close":
                break


def test_what_looks_like_an_id_and_is_none(client: httpx.Client) -> None:
    for method, resource in RESOURCES:
        path = f"/v1/sessions/ses_{'0' * 25}{resource}"
        body = {"/steps": STEP, "/params": b'{"params": {"w": [1]}}', "": b'{"name": "n"}'}.get(resource, b"")
        sent = body if method in ("POST", "PUT", "PATCH") else b""
        document = refused(client.request(method, path, content=sent, headers=JSON), 404, "session-not-found")
        assert "ses_0000" in document["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1", "/v1/", "/v2/sessions", "/v1/sessions/", "/v1/sessions//", "/v1/sessions//steps", "/v1/session",
        "/V1/sessions", "//v1/sessions", "/v1/optimizers/", "/v1/reducer/mean",
        "/problems/", "/openapi", "/openapi.json/", "/docs/", "/redoc",
        "/favicon.ico", "/%00", "/%0d%0aX: y", "/..", "/" + "x" * 8000,
        "/v1/sessions/ses_00000000000000000000/steps/", "/v1/sessions/ses_00000000000000000000/steps/1",
        "/v1/sessions/ses_00000000000000000000/steps%00", "/v1/sessions/ses_00000000000000000000/nothing",
    ],
)  # fmt: skip
def test_other_paths(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS", "PROPFIND"):
        document = refused(client.request(method, path), 404, "not-found")
        assert "\n" not in document["instance"]


@pytest.mark.parametrize(
    "path", ["/v1/optimizers/nadamax", "/v1/reducers/%00", "/v1/schedules/x%00", "/problems/none-such", "/problems/%0a"]
)
def test_kinds_and_problems_that_there_are_none_of(client: httpx.Client, path: str) -> None:
    refused(client.get(path), 404, "not-found")
    refused(client.post(path), 405, "method-not-allowed")


def paths(session: str) -> dict[str, str]:
    """Every path of the service by its template."""
    values = {"session": session, "kind": "adam", "slug": "not-found"}
    templates = [*{operation.path for operation in OPERATIONS}, *PAGES]
    return {
        template: re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template).replace(
            "schedules/adam", "schedules/step"
        )
        for template in templates
    }


def test_other_methods(client: httpx.Client, session: str) -> None:
    taken: dict[str, set[str]] = {template: {"OPTIONS"} for template in paths(session)}
    for operation in OPERATIONS:
        taken[operation.path] |= {operation.method} | (
            {"HEAD"} if operation.method == "GET" and operation.head else set()
        )
    for page in PAGES:
        taken[page] |= {"GET", "HEAD"}
    with unchanged(client, session):
        for template, path in paths(session).items():
            for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"} - taken[template]:
                reply = client.request(method, path)
                if method != "HEAD":
                    refused(reply, 405, "method-not-allowed")
                assert reply.status_code == 405, (method, path)
                assert set(reply.headers["allow"].split(", ")) == taken[template], path
            options = client.options(path)
            assert (options.status_code, set(options.headers["allow"].split(", "))) == (204, taken[template]), path


# -- queries and headers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "values"),
    [
        ("/v1/sessions", "limit", ["0", "101", "-1", "1.0", "", "x", "٣", "1e1", " 1", "9" * 5000]),
        ("/v1/sessions", "label", ["", "team", ":vision"]),
        ("/v1/sessions/{}/history", "limit", ["0", "10001", "-1", "x"]),
        ("/v1/sessions/{}/history", "after", ["-1", "x", "1.5", "", str(2**53), "9" * 5000]),
        ("/v1/sessions/{}/params", "at", ["", "now", "NEXT", "final "]),
        ("/v1/sessions/{}/params", "after", ["-1", "x", "1.5", "", "1e1", "9" * 17]),
        ("/v1/sessions/{}/params", "wait", ["-1", "x", "", "NaN", "Infinity", "1e999", "61", "0x1", "true"]),
    ],
)
def test_members_of_a_query(client: httpx.Client, session: str, path: str, name: str, values: list[str]) -> None:
    for value in values:
        query = {name: value} | ({"after": "0"} if name == "wait" else {})
        found = refused(client.get(path.format(session), params=query), 422, "invalid-request")
        assert pointers(found) == {f"/query/{name}"}, value


def test_waiting_for_nothing_in_particular(client: httpx.Client, session: str) -> None:
    found = refused(client.get(f"/v1/sessions/{session}/params?wait=1"), 422, "invalid-request")
    assert pointers(found) == {"/query/wait"}


@pytest.mark.parametrize("query", ["what=1", "x", "a=%ff", "=1", "return=none", "&&a=b", "%00=1", "a=1&a=1"])
def test_queries_of_calls_that_have_none(client: httpx.Client, session: str, query: str) -> None:
    path = f"/v1/sessions/{session}"
    with unchanged(client, session):
        for method, url, body in writes(session):
            reply = client.request(method, f"{url}?{query}", content=body, headers=JSON)
            assert refused(reply, 422, "invalid-request")["errors"][0]["pointer"].startswith("/query")
        for url in (
            path,
            f"{path}/state",
            f"{path}/events",
            "/livez",
            "/readyz",
            "/v1/optimizers",
            "/v1/optimizers/adam",
        ):
            found = refused(client.get(f"{url}?{query}"), 422, "invalid-request")
            assert found["errors"][0]["pointer"].startswith("/query")
        refused(client.delete(f"{path}?{query}"), 422, "invalid-request")


def test_a_member_of_the_query_twice(client: httpx.Client, session: str) -> None:
    found = refused(client.get(f"/v1/sessions/{session}/params?at=next&at=final"), 422, "invalid-request")
    assert pointers(found) == {"/query/at"}


@pytest.mark.parametrize("header", ["Content-Type", "Idempotency-Key"])
def test_headers_that_stand_twice(client: httpx.Client, session: str, header: str) -> None:
    with unchanged(client, session):
        value = "application/json" if header == "Content-Type" else "k"
        headers = [("Content-Type", "application/json"), (header, value)]
        headers += [] if header == "Content-Type" else [(header, value)]
        reply = client.post(f"/v1/sessions/{session}/steps", content=STEP, headers=headers)
        found = refused(reply, 422, "invalid-request")
        assert pointers(found) == {f"/headers/{header}"}


@pytest.mark.parametrize("known", ["1", '"1', "'1'", '"1" "2"', ""])
def test_a_malformed_if_none_match(client: httpx.Client, session: str, known: str) -> None:
    for resource in ("", "/params", "/state"):
        reply = client.get(f"/v1/sessions/{session}{resource}", headers={"If-None-Match": known})
        assert pointers(refused(reply, 422, "invalid-request")) == {"/headers/If-None-Match"}


# -- X-Request-Id --------------------------------------------------------------------------------------------------

MADE = re.compile("[0-9a-f]{16}")


def test_a_request_id_is_returned_or_made(client: httpx.Client, session: str) -> None:
    for path in ("/livez", f"/v1/sessions/{session}", f"/v1/sessions/{session}/params", "/nothing"):
        assert client.get(path, headers={"X-Request-Id": "Abc-1_2.3"}).headers["x-request-id"] == "Abc-1_2.3"
        made = [client.get(path).headers["x-request-id"] for _ in range(2)]
        assert all(MADE.fullmatch(id_) for id_ in made)
        assert made[0] != made[1]


@pytest.mark.parametrize(
    "given",
    [b"a b", b"x" * 129, b"a;b", b"\xff\xfe", b"a\tb", b'"', b"<x>", b"%0d%0aSet-Cookie: a=b", b"a\\nb", b"\x1b[31m"],
)
def test_other_request_ids_are_not_returned(server: Server, given: bytes) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: " + given + b"\r\nConnection: close\r\n\r\n"
    status, headers, _ = exchange(server, request)
    if status == 400:  # the server's parser takes no control characters at all
        assert b"\x1b" in given
        return
    assert status == 200
    assert MADE.fullmatch(headers["x-request-id"])
    assert "set-cookie" not in headers


# -- by hand -------------------------------------------------------------------------------------------------------


def head(method: str, path: str, *lines: str) -> bytes:
    text = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines])
    return f"{text}\r\n\r\n".encode("latin-1")


@pytest.mark.parametrize(
    "lines",
    [
        ["Idempotency-Key:    "],
        ["Idempotency-Key:"],
        ["Idempotency-Key: a\tb"],
        ["Idempotency-Key: a\xa0b"],
        ["Idempotency-Key: a", "idempotency-key: a"],
        ["If-Match:"],
        ["If-Match:   "],
        ['If-Match: "1', 'If-Match: 1"'],
    ],
)
def test_headers_that_no_library_sends(server: Server, client: httpx.Client, session: str, lines: list[str]) -> None:
    fixed = ["Content-Type: application/json", f"Content-Length: {len(STEP)}"]
    with unchanged(client, session):
        status, headers, body = exchange(server, head("POST", f"/v1/sessions/{session}/steps", *fixed, *lines) + STEP)
        assert (status, headers["content-type"]) == (422, "application/problem+json"), body
        document = json.loads(body)
        assert document["type"] == "/problems/invalid-request"
        assert document["errors"][0]["pointer"].removeprefix("/headers/") == lines[0].partition(":")[0]


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n\r\nnonsense\r\n\r\n",
        b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX\x01: a\r\n\r\n",
        b"GET /li vez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/sessions/ses_\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_400_and_the_server_goes_on(server: Server, client: httpx.Client, request_: bytes) -> None:
    status, headers, body = exchange(server, request_)
    assert status == 400, (status, headers, body)
    assert client.get("/livez").status_code == 200


def test_a_body_that_ends_too_early_changes_nothing(server: Server, client: httpx.Client, session: str) -> None:
    lines = ["Content-Type: application/json", f"Content-Length: {len(STEP)}"]
    with unchanged(client, session), connected(server) as connection:
        connection.sendall(head("POST", f"/v1/sessions/{session}/steps", *lines) + STEP[:-1])
    with unchanged(client, session), connected(server) as connection:
        chunked = [lines[0], "Transfer-Encoding: chunked"]
        connection.sendall(head("POST", f"/v1/sessions/{session}/steps", *chunked) + b"5\r\n" + STEP[:5] + b"\r\n")
