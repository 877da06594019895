"""The parameters: read, waited for, at the next point and at the final one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.http import arithmetic
from tests.http.files import saved, step
from tests.http.refusals import refused
from tests.http.sockets import await_listeners, connected
from tests.running import Server
from tests.wire import SAFETENSORS, create, params, tensors

ST = "application/vnd.safetensors"


@pytest.fixture
def session(client: httpx.Client) -> str:
    made: str = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [[1.0, 2.0]], "b": 3.0})["id"]
    return made


def move(client: httpx.Client, session: str) -> httpx.Response:
    return client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [[1.0, 1.0]], "b": 1.0}})


# -- read ------------------------------------------------------------------------------------------------------


def test_parameters_in_both_formats(client: httpx.Client, session: str) -> None:
    path = f"/v1/sessions/{session}/params"
    reply = client.get(path)
    assert reply.json() == {"step": 0, "params": {"w": [[1.0, 2.0]], "b": 3.0}}
    assert (reply.headers["content-type"], reply.headers["ravine-step"]) == ("application/json", "0")
    assert reply.headers["etag"] == client.get(f"/v1/sessions/{session}").headers["etag"]
    file = client.get(path, headers={"Accept": ST})
    assert (file.headers["content-type"], file.headers["etag"]) == (ST, reply.headers["etag"])
    assert {name: array.tolist() for name, array in tensors(file).items()} == {"w": [[1.0, 2.0]], "b": 3.0}
    assert "accept" in reply.headers["vary"].lower()
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(reply.content)))


def test_a_tag_that_still_holds_is_304(client: httpx.Client, session: str) -> None:
    path = f"/v1/sessions/{session}/params"
    etag = client.get(path).headers["etag"]
    for known in (etag, f"W/{etag}", f'"0-1", {etag}', '"0"', "*"):
        reply = client.get(path, headers={"If-None-Match": known})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag), known
    for other in ('"1"', '"0-1"', '"x"'):
        assert client.get(path, headers={"If-None-Match": other}).status_code == 200, other
    move(client, session)
    reply = client.get(path, headers={"If-None-Match": etag})
    assert (reply.status_code, reply.json()["step"]) == (200, 1)
    etag = reply.headers["etag"]
    client.put(path, json={"params": {"w": [[9.0, 9.0]], "b": 9.0}})
    reply = client.get(path, headers={"If-None-Match": etag})
    assert (reply.status_code, reply.json()["step"], reply.json()["params"]["b"]) == (200, 1, 9.0)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_read_never_sees_half_a_step(server: Server, client: httpx.Client, size: int) -> None:
    """With gradients of one and rate one, all elements are -step at any commit, and all moments are one."""
    optimizer = {"kind": "momentum", "lr": 1.0, "momentum": 0.5, "dampening": 0.5, "first_step": "gradient"}
    session = create(client, optimizer=optimizer, shapes={"w": [size]})["id"]
    path = f"/v1/sessions/{session}"
    client.put(f"{path}/params", content=saved({"w": np.zeros(size, np.float32)}), headers=SAFETENSORS)
    steps, over = 40, threading.Event()
    seen = {"params": 0, "state": 0}

    def read(resource: str) -> None:
        with server.client() as other:
            while not over.is_set():
                reply = other.get(f"{path}/{resource}", headers={"Accept": ST})
                found, at = tensors(reply), int(reply.headers["ravine-step"])
                assert np.all(found["w"] == -at)
                assert "w:v" not in found or np.all(found["w:v"] == min(at, 1))
                seen[resource] += 1

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read, resource) for resource in seen]
        try:
            t = 0
            # On a busy machine readers are slow to begin; one that failed is done.
            while t < steps or not all(seen[r] or f.done() for r, f in zip(seen, reading, strict=True)):
                t += 1
                assert np.all(tensors(step(client, session, {"w": np.ones(size, np.float32)}))["w"] == -t)
        finally:
            over.set()
        for future in reading:
            future.result()


# -- waited for ------------------------------------------------------------------------------------------------


def test_a_step_that_was_taken_is_not_waited_for(client: httpx.Client, session: str) -> None:
    move(client, session)
    path = f"/v1/sessions/{session}/params"
    for query in ({"after": 0}, {"after": 0, "wait": 30}, {"after": 0, "wait": 0}):
        assert client.get(path, params=query).json()["step"] == 1
    reply = client.get(path, params={"after": 1})
    assert (reply.status_code, reply.headers["ravine-step"]) == (304, "1")
    assert client.get(path, params={"after": 1, "wait": "0.05"}).status_code == 304
    assert client.get(path, params={"after": 2**53 - 1, "wait": "0"}).status_code == 304


def test_waiting_ends_with_the_step(server: Server, client: httpx.Client, session: str) -> None:
    def wait(after: int) -> httpx.Response:
        with server.client() as other:
            return other.get(f"/v1/sessions/{session}/params", params={"after": after, "wait": 30})

    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(wait, after) for after in [0] * 8 + [1] * 4]
        time.sleep(0.2)  # whoever does not wait yet gets the step at once: the outcome is the same
        assert move(client, session).status_code == 200
        replies = [future.result() for future in waiting[:8]]
        assert not any(future.done() for future in waiting[8:])
        assert move(client, session).status_code == 200
        replies += [future.result() for future in waiting[8:]]
    assert {reply.status_code for reply in replies} == {200}
    assert all(reply.json()["step"] >= 1 for reply in replies[:8])
    assert all(reply.json()["step"] == 2 for reply in replies[8:])


def test_changes_that_are_no_steps_do_not_end_the_wait(server: Server, client: httpx.Client, session: str) -> None:
    path = f"/v1/sessions/{session}/params"
    with ThreadPoolExecutor(1) as pool, server.client() as other:
        waiting = pool.submit(other.get, path, params={"after": 0, "wait": "0.6"})
        while not waiting.done():
            client.patch(f"/v1/sessions/{session}", json={"name": "n"})
            client.put(path, json={"params": {"w": [[9.0, 9.0]], "b": 9.0}})
        assert waiting.result().status_code == 304


def test_waiting_ends_with_the_session(server: Server, client: httpx.Client, session: str) -> None:
    with ThreadPoolExecutor(1) as pool, server.client() as other:
        waiting = pool.submit(other.get, f"/v1/sessions/{session}/params", params={"after": 0, "wait": 30})
        time.sleep(0.1)  # or it is deleted before: a 404 all the same
        client.delete(f"/v1/sessions/{session}")
        refused(waiting.result(), 404, "session-not-found")


def test_nobody_waits_for_a_client_that_left(server: Server, session: str) -> None:
    with connected(server) as connection:
        path = f"/v1/sessions/{session}/params?after=0&wait=60"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await_listeners(server, session, 1)
    await_listeners(server, session, 0)


# -- the next point and the final one --------------------------------------------------------------------------


def test_the_next_point_of_the_look_ahead_form(client: httpx.Client) -> None:
    lr, mu = 0.1, 0.9
    optimizer = {"kind": "momentum", "lr": lr, "momentum": mu, "nesterov": "lookahead"}
    session = create(client, optimizer=optimizer, params={"w": [1.0, -2.0]}, dtype="float64")["id"]
    p, v = np.array([1.0, -2.0]), np.zeros(2)
    curvature = np.array([3.0, 0.5])
    for _ in range(5):
        ahead = params(client, session)["w"]
        np.testing.assert_allclose(ahead, p - mu * v, rtol=1e-12)
        np.testing.assert_allclose(params(client, session, "final")["w"], p, rtol=1e-12)
        reply = tensors(step(client, session, {"w": curvature * ahead}))
        v = mu * v + lr * curvature * ahead
        p = p - v
        np.testing.assert_allclose(reply["w"], p - mu * v, rtol=1e-12)  # a step hands out the next point, too


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("averaging", "expected"),
    [
        ({"kind": "polyak"}, lambda points: np.mean(points, axis=0)),
        ({"kind": "polyak", "start": 4}, lambda points: np.mean(points[3:], axis=0) if len(points) > 3 else points[-1]),
        ({"kind": "ema", "decay": 0.8}, lambda points: ema(points, 0.8) / (1 - 0.8 ** len(points))),
        ({"kind": "ema", "decay": 0.8, "debias": False}, lambda points: ema(points, 0.8)),
        ({"kind": "ema", "decay": 0.8, "start": "first"}, lambda points: ema(points[1:], 0.8, points[0])),
    ],
)
def test_the_final_point_is_the_average(client: httpx.Client, averaging: Any, expected: Any, dtype: str) -> None:
    members = {"optimizer": {"kind": "adam", "lr": 0.1}, "averaging": averaging, "dtype": dtype}
    session = create(client, params={"w": [1.0, -2.0]}, **members)["id"]
    np.testing.assert_array_equal(params(client, session, "final")["w"], [1.0, -2.0])
    rng = np.random.default_rng(2)
    sent = rng.standard_normal((6, 2))
    points = arithmetic.trajectory(arithmetic.adam(0.1), [1.0, -2.0], sent)
    for t in range(6):
        step(client, session, {"w": sent[t]})
        close = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(params(client, session, "final")["w"], expected(points[: t + 1]), rtol=close)
        np.testing.assert_allclose(params(client, session, "next")["w"], points[t], rtol=close)


def ema(points: Any, decay: float, start: Any = 0.0) -> Any:
    average = np.asarray(start)
    for point in points:
        average = decay * average + (1 - decay) * point
    return average
