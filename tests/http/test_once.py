"""Idempotency-Key: a step is applied once, however often it is sent."""

import gzip
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests.http.files import saved, step
from tests.http.refusals import refused, unchanged
from tests.running import Server, serving
from tests.wire import SAFETENSORS, bits, create, params, tensors

WINDOW = 4096
G = {"w": np.float32([1.0, -2.0])}


@pytest.fixture
def held(client: httpx.Client) -> str:
    made: str = create(client, optimizer="adam", params={"w": [0.0, 0.0]})["id"]
    return made


@pytest.fixture
def moments(client: httpx.Client) -> str:
    made: str = create(client, optimizer="adam", shapes={"w": [2]})["id"]
    return made


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def by(client: httpx.Client, session: str, worker: str, key: str, g: dict[str, np.ndarray] = G) -> httpx.Response:
    path = f"/v1/sessions/{session}/steps?worker={worker}"
    return client.post(path, content=saved(g), headers=SAFETENSORS | keyed(key))


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("kind", ["held", "moments"])
def test_a_repeat_gets_the_same_reply(
    client: httpx.Client, request: pytest.FixtureRequest, form: str, kind: str
) -> None:
    session = request.getfixturevalue(kind)
    accept = {"Accept": "application/json" if form == "json" else "application/vnd.safetensors"}
    first = step(client, session, G, keyed("k") | accept)
    with unchanged(client, session):
        again = [step(client, session, G, keyed("k") | accept) for _ in range(3)]
    assert "ravine-replayed" not in first.headers
    for reply in again:
        assert reply.status_code == 200
        assert reply.headers["ravine-replayed"] == "true"
        assert (reply.headers["ravine-step"], reply.headers["etag"]) == ("1", first.headers["etag"])
        assert reply.content == first.content


def test_later_a_repeat_gets_the_current_parameters(client: httpx.Client, held: str) -> None:
    step(client, held, G, keyed("k"))
    step(client, held, G)
    with unchanged(client, held):
        reply = step(client, held, G, keyed("k"))
    assert (reply.headers["ravine-replayed"], reply.headers["ravine-step"]) == ("true", "2")
    assert reply.headers["etag"] == client.get(f"/v1/sessions/{held}").headers["etag"]
    assert bits(tensors(reply)["w"]) == bits(params(client, held)["w"])


def test_a_repeat_that_wants_nothing_back_is_told_its_own_step(client: httpx.Client, held: str) -> None:
    body = {"gradients": {"w": [1, 2]}, "return": "none"}
    path = f"/v1/sessions/{held}/steps"
    first = client.post(path, json=body, headers=keyed("k"))
    step(client, held, G)
    again = client.post(path, json=body, headers=keyed("k"))
    assert (again.content, again.headers["ravine-step"]) == (first.content, "1")


def test_each_workers_last_updates_are_kept(client: httpx.Client, moments: str) -> None:
    firsts = {worker: by(client, moments, worker, f"{worker}-1") for worker in "abc"}
    second = by(client, moments, "a", "a-2")
    with unchanged(client, moments):
        for worker in "bc":
            again = by(client, moments, worker, f"{worker}-1")
            assert again.headers["ravine-replayed"] == "true"
            assert (again.headers["ravine-step"], again.content) == (
                firsts[worker].headers["ravine-step"],
                firsts[worker].content,
            )
        assert by(client, moments, "a", "a-2").content == second.content
        # The one before is not kept, but neither is it applied again.
        old = by(client, moments, "a", "a-1")
    assert (old.status_code, old.headers["ravine-replayed"], old.headers["ravine-step"]) == (200, "true", "1")
    assert tensors(old) == {}


@pytest.mark.parametrize("other", ["body", "query", "format"])
def test_a_key_with_another_body_is_refused(client: httpx.Client, held: str, other: str) -> None:
    path = f"/v1/sessions/{held}/steps"
    client.post(f"{path}?loss=1", content=saved(G), headers=SAFETENSORS | keyed("k"))
    with unchanged(client, held):
        if other == "body":
            body = saved({"w": np.float32([1.0, -2.5])})
            reply = client.post(f"{path}?loss=1", content=body, headers=SAFETENSORS | keyed("k"))
        elif other == "query":
            reply = client.post(f"{path}?loss=2", content=saved(G), headers=SAFETENSORS | keyed("k"))
        else:
            reply = client.post(path, json={"gradients": {"w": [1, -2]}, "loss": 1}, headers=keyed("k"))
        refused(reply, 422, "key-reused")


def test_compression_is_not_part_of_the_body(client: httpx.Client, held: str) -> None:
    path = f"/v1/sessions/{held}/steps"
    plain = client.post(path, content=saved(G), headers=SAFETENSORS | keyed("k"))
    packed = SAFETENSORS | keyed("k") | {"Content-Encoding": "gzip"}
    again = client.post(path, content=gzip.compress(saved(G)), headers=packed)
    assert (again.headers.get("ravine-replayed"), again.content) == ("true", plain.content)


def test_a_repeat_is_known_before_its_precondition_is_looked_at(client: httpx.Client, held: str) -> None:
    guarded = keyed("k") | {"If-Match": '"0"'}
    first = step(client, held, G, guarded)
    again = step(client, held, G, guarded)
    assert (again.headers.get("ravine-replayed"), again.content) == ("true", first.content)
    refused(step(client, held, G, {"If-Match": '"0"'}), 412, "step-conflict")


def test_what_is_refused_uses_up_no_key(client: httpx.Client, held: str) -> None:
    refused(step(client, held, {"w": np.float32([np.nan, 0])}, keyed("k")), 422, "non-finite")
    refused(step(client, held, G, keyed("k") | {"If-Match": '"7"'}), 412, "step-conflict")
    reply = step(client, held, G, keyed("k"))
    assert (reply.headers["ravine-step"], "ravine-replayed" in reply.headers) == ("1", False)


@pytest.mark.parametrize("key", ["a", "x" * 255, '"quoted \\ text"', "!~", "a, b"])
def test_keys_are_any_printable_text(client: httpx.Client, held: str, key: str) -> None:
    assert "ravine-replayed" not in step(client, held, G, keyed(key)).headers
    assert step(client, held, G, keyed(key)).headers["ravine-replayed"] == "true"


@pytest.mark.parametrize("key", [b"", b"x" * 256, b"a\tb", b"\xe4", "ключ".encode()])
def test_other_keys_are_refused(client: httpx.Client, held: str, key: bytes) -> None:
    with unchanged(client, held):
        headers = [*((n.encode(), v.encode()) for n, v in SAFETENSORS.items()), (b"Idempotency-Key", key)]
        reply = client.post(f"/v1/sessions/{held}/steps", content=saved(G), headers=headers)
        assert refused(reply, 422, "invalid-request")["errors"][0]["pointer"] == "/headers/Idempotency-Key"


def test_many_at_once_are_one_step(server: Server, held: str) -> None:
    def send(_: int) -> tuple[int, str, bytes]:
        with server.client() as client:
            reply = step(client, held, G, keyed("k"))
            return reply.status_code, reply.headers["ravine-step"], reply.content

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(send, range(24)))
    assert len(set(replies)) == 1
    assert replies[0][:2] == (200, "1")


# -- after a restart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_forgets_nothing(data: Path, end: str) -> None:
    with serving(data, environment={"RAVINE_JIT": "false"}) as server:
        with server.client() as client:
            held = create(client, optimizer="adam", params={"w": [0.0, 0.0]})["id"]
            moments = create(client, optimizer="adam", shapes={"w": [2]})["id"]
            first = step(client, held, G, keyed("k"))
            updates = [by(client, moments, worker, "key of " + worker) for worker in ("a", "b")]
        server.kill() if end == "kill" else server.stop()
        server.restart()
        with server.client() as client:
            again = step(client, held, G, keyed("k"))
            assert (again.headers.get("ravine-replayed"), again.content) == ("true", first.content)
            for worker, before in zip(("a", "b"), updates, strict=True):
                reply = by(client, moments, worker, "key of " + worker)
                assert (reply.headers.get("ravine-replayed"), reply.content) == ("true", before.content)
            other = {"w": np.float32([3, 3])}
            refused(step(client, held, other, keyed("k")), 422, "key-reused")
            assert client.get(f"/v1/sessions/{held}").json()["step"] == 1
            assert client.get(f"/v1/sessions/{moments}").json()["step"] == 2


# -- the window ------------------------------------------------------------------------------------------------


def long_key(i: int) -> str:
    """As long as a key may be, with what JSON must escape."""
    return f'{i} "\\'.ljust(255, "~")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A session that took WINDOW + 2 steps, each with a key of its own, on a service that was restarted since."""
    with serving(tmp_path_factory.mktemp("many") / "data", environment={"RAVINE_JIT": "false"}) as server:
        with server.client() as client:
            session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [0.0]})["id"]
        address = urlsplit(server.url)
        connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 80))
        body = json.dumps({"gradients": {"w": [1.0]}, "return": "none"})
        for i in range(WINDOW + 2):
            headers = keyed(long_key(i)) | {"Content-Type": "application/json"}
            connection.request("POST", f"/v1/sessions/{session}/steps", body, headers)
            reply = connection.getresponse()
            reply.read()
            assert reply.status == 200
        connection.close()
        server.kill()
        server.restart()
        yield server, session


def test_the_last_4096_keys_are_known(many: tuple[Server, str]) -> None:
    server, session = many
    body = {"gradients": {"w": [1.0]}, "return": "none"}
    path = f"/v1/sessions/{session}/steps"
    with server.client() as client, unchanged(client, session):
        for i in (2, 3, WINDOW // 2, WINDOW + 1):
            # The bytes must be the same, and json.dumps puts blanks where httpx does not.
            headers = keyed(long_key(i)) | {"Content-Type": "application/json"}
            reply = client.post(path, content=json.dumps(body), headers=headers)
            assert (reply.status_code, reply.headers.get("ravine-replayed")) == (200, "true"), reply.text
        # Those that fell out of the window are refused by If-Match alone.
        for i in (0, 1):
            headers = keyed(long_key(i)) | {"Content-Type": "application/json", "If-Match": f'"{i}"'}
            document = refused(client.post(path, content=json.dumps(body), headers=headers), 412, "step-conflict")
            assert document["step"] == WINDOW + 2
