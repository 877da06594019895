"""Who is let in: no key, a wrong one, an expired one, a revoked one, on every call and every other path."""

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.access.rights import Right
from tests.http.callers import ALL, KEYS_ASKED_FOR, Call, Houses, add_key, bearing, houses, revoke, stored
from tests.http.refusals import refused
from tests.http.sockets import await_listeners, connected, head_of, reply_on
from tests.running import Server, serving
from tests.wire import create


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Houses]:
    with houses(tmp_path_factory.mktemp("keys") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def bad(world: Houses) -> dict[str, str | None]:
    """What may be sent in place of a valid key, by what is wrong with it."""
    url = world.server.store_url()
    valid, key = world.keys["admin"]
    revoked, revoked_key = add_key(url, "acme")
    assert httpx.get(f"{world.server.url}/v1/sessions", headers=bearing(revoked)).status_code == 200
    revoke(url, revoked_key)
    expired, _ = add_key(url, "acme", seconds=-1)
    time.sleep(1.1)  # for as long the revoked one may be believed in
    basic = base64.b64encode(f"{key.id}:{valid}".encode()).decode()
    id_, secret = valid.split("_", 2)[1:]
    return {
        "no key": None,
        "empty": "",
        "no text": "Bearer",
        "garbage": "Bearer \xff\x80;drop",
        "not a key": "Bearer letmein",
        "another scheme": f"Basic {basic}",
        "no scheme": valid,
        "wrong secret": f"Bearer rvn_{id_}_{'A' * 43}",
        "secret cut short": f"Bearer {valid[:-1]}",
        "secret and more": f"Bearer {valid}A",
        "two keys in one": f"Bearer {valid}, {valid}",
        "in quotes": f'Bearer "{valid}"',
        "another case": f"Bearer {valid.upper()}",
        "another's id": f"Bearer rvn_{world.keys['session'][1].id}_{secret}",
        "the digest for the secret": f"Bearer rvn_{id_}_{key.digest[:43]}",
        "unknown id": f"Bearer rvn_{'a' * 16}_{secret}",
        "an id that leaves its place": f"Bearer rvn_../{id_}_{secret}",
        "revoked": f"Bearer {revoked}",
        "expired": f"Bearer {expired}",
    }


def headers_of(given: str | None) -> list[tuple[bytes, bytes]]:
    return [] if given is None else [(b"authorization", given.encode("latin-1"))]


def unauthenticated(reply: httpx.Response) -> tuple[str, set[str]]:
    """What a refusal tells, which must be the same for all."""
    assert reply.status_code == 401, reply.text
    assert reply.headers["www-authenticate"] == 'Bearer realm="ravine"'
    if reply.request.method != "HEAD":
        refused(reply, 401, "unauthenticated")
    return reply.text, set(reply.headers)


CLOSED = [call for call in ALL if call.right is not Right.OPEN]
CLOSED_IDS = [f"{call.method} {call.template}" for call in CLOSED]


@pytest.mark.parametrize("call", CLOSED, ids=CLOSED_IDS)
def test_no_call_without_a_valid_key(world: Houses, bad: dict[str, str | None], call: Call) -> None:
    url = world.server.store_url()
    before = stored(url)
    told = []
    with world.server.client() as client:
        for given in bad.values():
            for session in {world.own, world.foreign} if "{session}" in call.template else {""}:
                request = client.build_request(call.method, call.path(session), headers=headers_of(given), json={})
                text, headers = unauthenticated(client.send(request))
                told.append((text.replace(session or "-", "…"), frozenset(headers)))
    assert len(set(told)) == 1
    assert stored(url) == before


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/nothing", "/v1", "/v1/", "/v1/nothing", "/problems/nothing", "/favicon.ico", "/.well-known/x"),
        *(
            "/LIVEZ",
            "/livez/",
            "//livez",
            "/livez%00",
            "/livez%0a",
            "/%2e%2e/livez",
            "/docs/..",
            "/docs/../v1/sessions",
        ),
        *("/docs%2f..%2fv1%2fsessions", "/docs;/v1/sessions", "/v1/sessions%3f", "/V1/sessions", "/v1//sessions"),
        *("/v1/sessions/", "/./v1/sessions", "/v1/sessions%2f", "/v1/sessions/%2e%2e", "/v1/sessions/x/../../livez"),
        *("http://127.0.0.1/v1/sessions", "http://x//livez", "*", "//127.0.0.1/livez", "/v1/sessions#/livez"),
        *("/readyz/../v1/sessions", "/readyz%2f..%2f..%2fv1%2fsessions", "/docs%00", "/livez?access_token=x/docs/"),
    ],
)
def test_no_path_leads_around_the_gate(world: Houses, path: str) -> None:
    """Bytes as they are: a client library would mend most of these."""
    for method in ("GET", "HEAD", "OPTIONS", "POST", "DELETE", "get", "PROPFIND"):
        with connected(world.server) as connection:
            lines = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            connection.sendall(lines.encode())
            status, headers = head_of(connection)
        if path.startswith("/livez?") and method in ("GET", "HEAD"):
            assert status == 422  # it is /livez, with a query that it does not take
        else:
            assert status in (400, 401), (method, path)  # 400: no method that the server reads
        assert not [name for name in headers if name.startswith("ravine-")]


def test_a_key_of_the_widest_scope_finds_nothing_there_either(world: Houses) -> None:
    for path in ("/v1/sessions/", "/V1/sessions", "//v1/sessions", "/livez/", f"/v1/sessions/{world.own}/", "/nothing"):
        for method in ("GET", "OPTIONS", "POST"):
            with connected(world.server) as connection:
                lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.keys['admin'][0]}\r\n\r\n"
                connection.sendall(lines.encode())
                status, _, body = reply_on(connection)
            assert (status, json.loads(body)["type"]) == (404, "/problems/not-found"), (method, path)


@pytest.mark.parametrize("call", [call for call in ALL if call.right is Right.OPEN], ids=lambda call: call.path())
def test_what_is_open(world: Houses, bad: dict[str, str | None], call: Call) -> None:
    """Whoever looks whether the service lives has no key, or one that has nothing to do with it."""
    with world.server.client() as client:
        for given in bad.values():
            request = client.build_request(call.method, call.path(), headers=headers_of(given))
            assert client.send(request).status_code == 200


def test_two_keys_are_none(world: Houses) -> None:
    admin = f"Bearer {world.keys['admin'][0]}".encode()
    session = f"Bearer {world.keys['session'][0]}".encode()
    with world.server.client() as client:
        for first, second in ((admin, admin), (admin, session), (b"", admin), (admin, b"Basic x")):
            headers = [(b"authorization", first), (b"authorization", second)]
            unauthenticated(client.get("/v1/sessions", headers=headers))


def test_a_key_is_read_from_its_header_alone(world: Houses) -> None:
    text = world.keys["admin"][0]
    with world.server.client() as client:
        for name in ("access_token", "api_key", "key", "authorization"):
            unauthenticated(client.get("/v1/sessions", params={name: text}))
        unauthenticated(client.get("/v1/sessions", headers={"X-Api-Key": text, "Cookie": f"Authorization={text}"}))
        unauthenticated(client.get("/v1/sessions", headers={"Proxy-Authorization": f"Bearer {text}"}))


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {}", "Bearer\t{}", "Bearer \t {}"])
def test_the_scheme_has_no_case(world: Houses, form: str) -> None:
    with world.server.client() as client:
        given = {"Authorization": form.format(world.keys["admin"][0])}
        assert client.get("/v1/sessions", headers=given).status_code == 200


def test_a_method_that_a_path_does_not_take(world: Houses) -> None:
    for scope, client in world.clients.items():
        document = client.request("PUT", f"/v1/sessions/{world.own}")
        refused(document, 405, "method-not-allowed")
        assert document.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, PATCH", scope
        refused(client.request("PROPFIND", f"/v1/sessions/{world.own}"), 405, "method-not-allowed")


# -- when a key ends ---------------------------------------------------------------------------------------------------

SOON = 20  # seconds: on a machine that is busy, and yet far from the minute for which those who wait would wait


def await_refusal(client: httpx.Client) -> None:
    deadline = time.monotonic() + SOON
    while client.get("/v1/sessions").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    unauthenticated(client.get("/v1/sessions"))


def test_a_key_that_is_revoked_is_refused(world: Houses) -> None:
    text, key = add_key(world.server.store_url(), "acme")
    with world.server.client(headers=bearing(text)) as client:
        assert client.get("/v1/sessions").status_code == 200
        revoke(world.server.store_url(), key)
        await_refusal(client)


def test_a_key_that_expires_is_refused(world: Houses) -> None:
    text, key = add_key(world.server.store_url(), "acme", seconds=3)
    assert key.expires_at is not None
    with world.server.client(headers=bearing(text)) as client:
        await_refusal(client)
        assert time.time() >= key.expires_at


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_those_who_wait_are_let_go_when_their_key_ends(world: Houses, end: str) -> None:
    """A long poll as if its time were over, a step with its place in the round, a stream with its end."""
    url = world.server.store_url()
    admin = world.clients["admin"]
    made = create(admin, optimizer="sgd", params={"w": [1.0]}, aggregation={"mode": "sync", "workers": 2})["id"]
    text, key = add_key(url, "acme", "worker", session=made, seconds=8 if end == "expired" else None)
    done: dict[str, tuple[int, str]] = {}

    def ask(name: str, send: Callable[[httpx.Client], httpx.Response]) -> threading.Thread:
        def run() -> None:
            with world.server.client(headers=bearing(text)) as client:
                reply = send(client)
                done[name] = (reply.status_code, reply.text)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    path = f"/v1/sessions/{made}"
    wait = {"Prefer": "wait=60"}
    gradient = {"gradients": {"w": [1.0]}, "worker": "a"}
    threads = [
        ask("poll", lambda client: client.get(f"{path}/params", params={"after": 0, "wait": 60})),
        ask("step", lambda client: client.post(f"{path}/steps", json=gradient, headers=wait)),
        ask("events", lambda client: client.get(f"{path}/events")),
    ]
    await_listeners(world.server, made, 1)
    if end == "revoked":
        time.sleep(1)
        assert not done
        revoke(url, key)
    for thread in threads:
        thread.join(SOON)
    assert set(done) == {"poll", "step", "events"}
    assert done["poll"] == (304, "")
    assert done["step"][0] == 202
    assert done["events"][0] == 200
    assert admin.get(f"{path}/rounds/current").json()["received"] == 1, "what it was told of its step is so"


def test_a_body_that_outlasts_its_key_is_not_applied(world: Houses) -> None:
    url = world.server.store_url()
    text, key = add_key(url, "acme")
    path = f"/v1/sessions/{world.sibling}"
    before = world.clients["admin"].get(path).json()
    body = json.dumps({"gradients": {"w": [1.0]}}).encode()
    with connected(world.server) as connection:
        lines = f"POST {path}/steps HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {text}\r\n"
        lines += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(lines.encode() + body[:10])
        time.sleep(0.3)
        revoke(url, key)
        time.sleep(1.5)
        connection.sendall(body[10:])
        status, headers = head_of(connection)
    assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="ravine"')
    assert world.clients["admin"].get(path).json() == before


def test_without_the_store_nobody_new_is_let_in(data: Path) -> None:
    with serving(data, environment=KEYS_ASKED_FOR) as server:
        text, _ = add_key(server.store_url())
        with server.client(headers=bearing(text)) as client:
            assert client.get("/v1/optimizers/sgd").status_code == 200
            store = server.valkey_pid()
            time.sleep(1.1)
            os.kill(store, signal.SIGSTOP)
            try:
                reply = client.get("/v1/optimizers/sgd")
                refused(reply, 503, "store-unavailable")
                assert reply.headers["retry-after"]
                assert client.get("/livez").status_code == 200
                with server.client() as stranger:
                    unauthenticated(stranger.get("/v1/optimizers/sgd"))
            finally:
                os.kill(store, signal.SIGCONT)


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_key_is_in_no_line_of_the_log(data: Path, form: str) -> None:
    with serving(data, environment=KEYS_ASKED_FOR | {"RAVINE_LOG_FORMAT": form}) as server:
        text, key = add_key(server.store_url())
        with server.client(headers=bearing(text)) as client:
            for path in ("/v1/sessions", f"/v1/sessions/{text}", f"/{text}", f"/v1/sessions?key={text}"):
                client.get(path)
            client.get("/v1/sessions", headers={"X-Request-Id": text})
        with server.client() as client:
            client.get(f"/v1/sessions/{text}/params", params={"key": text}, headers={"X-Request-Id": "the-last"})
        deadline = time.monotonic() + 10
        while "the-last" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        log = server.log.read_text()
        assert text.split("_", 2)[2] not in log
        assert f"rvn_{key.id}_" in log, "the id may be told"
        assert text.split("_", 2)[2] not in repr(stored(server.store_url())), "nor in the store"


# -- where keys are asked for ------------------------------------------------------------------------------------------


def test_where_no_key_is_asked_for_one_that_is_sent_is_looked_at(server: Server) -> None:
    valid, key = add_key(server.store_url(), "initech", "session")
    with server.client() as client:
        made = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
        unauthenticated(client.get("/v1/sessions", headers=bearing("rvn_nobody")))
        unauthenticated(client.get(f"/v1/sessions/{made}", headers=bearing(f"rvn_{key.id}_{'A' * 43}")))
        refused(client.get(f"/v1/sessions/{made}", headers=bearing(valid)), 404, "session-not-found")
        assert client.get("/v1/sessions", headers=bearing(valid)).json()["data"] == []
        # of a proxy in front: it is no key
        assert client.get(f"/v1/sessions/{made}", headers={"Authorization": "Basic dTpw"}).status_code == 200
        with server.client(headers=bearing(valid)) as other:
            theirs = create(other, optimizer="sgd", params={"w": [1.0]})["id"]
        refused(client.get(f"/v1/sessions/{theirs}"), 404, "session-not-found")
    revoke(server.store_url(), key)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:80", "x.localhost"])
def test_a_name_of_this_machine_needs_no_key(server: Server, host: str) -> None:
    with server.client() as client:
        assert client.get("/v1/sessions", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("rebound.example.com", "192.0.2.7:8000", "127.0.0.1.example.com", "[2001:db8::1]", "evil", ""),
        *("[::1].evil.com", "127.0.0.1:99@evil.com", "user@localhost"),
    ],
)
def test_a_name_that_others_use_needs_a_key(server: Server, host: str) -> None:
    """A web page whose own name leads to 127.0.0.1, or a proxy in front."""
    with server.client() as client:
        unauthenticated(client.get("/v1/sessions", headers={"Host": host}))
        assert client.get("/livez", headers={"Host": host}).status_code == 200
    text, key = add_key(server.store_url())
    with server.client() as client:
        assert client.get("/v1/sessions", headers={"Host": host, **bearing(text)}).status_code == 200
    revoke(server.store_url(), key)


def test_without_a_name_at_all_as_in_http_1_0(server: Server) -> None:
    for version, headers, status in (("1.0", "", 200), ("1.0", "Host:\r\n", 200), ("1.1", "Host:\r\n", 401)):
        with connected(server) as connection:
            connection.sendall(f"GET /v1/sessions HTTP/{version}\r\n{headers}Connection: close\r\n\r\n".encode())
            assert head_of(connection)[0] == status, (version, headers)


FROM_ELSEWHERE = [
    *({"Origin": "https://evil.example.com"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1.example.com"}),
    *({"Origin": "evil"}, {"Origin": ""}, {"Sec-Fetch-Site": "cross-site"}),
    {"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("headers", FROM_ELSEWHERE, ids=repr)
def test_a_page_from_elsewhere_changes_nothing(server: Server, headers: dict[str, str]) -> None:
    """It could not read the answer, there being no CORS, but it could send what needs none."""
    body = json.dumps({"optimizer": "sgd", "params": {"w": [1.0]}})
    before = stored(server.store_url())
    with server.client() as client:
        unauthenticated(client.post("/v1/sessions", content=body, headers=headers))
        assert stored(server.store_url()) == before
        assert client.get("/livez", headers=headers).status_code == 200
    text, key = add_key(server.store_url())
    with server.client(headers=bearing(text)) as client:
        assert client.get("/v1/sessions", headers=headers).status_code == 200
    revoke(server.store_url(), key)


def test_a_page_of_this_machine_needs_no_key(server: Server) -> None:
    with server.client() as client:
        for origin in (server.url, "http://localhost:3000", "https://[::1]"):
            assert client.get("/v1/sessions", headers={"Origin": origin}).status_code == 200
        for site in ("same-origin", "same-site", "none"):
            assert client.get("/v1/sessions", headers={"Sec-Fetch-Site": site}).status_code == 200


def test_the_reference_may_need_a_key_too(data: Path) -> None:
    with serving(data, environment=KEYS_ASKED_FOR | {"RAVINE_DOCS": "false"}) as server:
        text, _ = add_key(server.store_url(), scope="session")
        with server.client() as client:
            unauthenticated(client.get("/docs"))
            assert client.get("/docs", headers=bearing(text)).status_code == 200
