"""Several service processes on one store."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from core.contributions import Contribution
from core.evaluate import Evaluator
from core.layout import Layout
from core.optimizers.adam import Adam
from core.recipe import Recipe
from core.session import Session
from tests.running import Server, redis_server, serving
from tests.wire import bits, create, params, step

SIZE = 64
CLIENTS, STEPS = 4, 60


def gradient(client: int, i: int) -> np.ndarray:
    return np.random.default_rng((client, i)).standard_normal(SIZE).astype(np.float32)


def test_four_clients_through_two_processes(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path / "store") as url,
        serving(tmp_path / "a", "--redis-url", url) as first,
        serving(tmp_path / "b", "--redis-url", url) as second,
    ):
        with first.client() as client:
            session = create(client, optimizer="adam", params={"w": [0.0] * SIZE})["id"]
        acknowledged: dict[int, tuple[int, int]] = {}
        etags: set[str] = set()
        lock = threading.Lock()

        def run(who: int) -> None:
            for i in range(STEPS):
                server = (first, second)[(who + i) % 2]
                with server.client() as client:
                    reply = step(client, session, {"w": gradient(who, i)})
                assert reply.status_code == 200, reply.text
                with lock:
                    taken = int(reply.headers["ravine-step"])
                    assert taken not in acknowledged, f"step {taken} was acknowledged twice"
                    acknowledged[taken] = (who, i)
                    etags.add(reply.headers["etag"])

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(run, range(CLIENTS)))
        final = [params(client, session)["w"] for client in (first.client(), second.client())]
        with second.client() as client:
            records = client.get(f"/v1/sessions/{session}/history", params={"limit": 1000}).json()["data"]
    total = CLIENTS * STEPS
    assert sorted(acknowledged) == list(range(1, total + 1))
    assert [record["step"] for record in records] == list(range(1, total + 1))
    assert len(etags) == total
    replayed = replay([gradient(*acknowledged[t]) for t in range(1, total + 1)])
    assert bits(final[0]) == bits(final[1]) == bits(replayed)


def replay(gradients: list[np.ndarray]) -> np.ndarray:
    """The same contributions one after the other, in the order that the service gave them."""
    recipe = Recipe(Adam(), Layout({"w": [SIZE]}))
    serial = Session.new(recipe, {"w": np.zeros(SIZE, np.float32)}, Evaluator())
    for g in gradients:
        serial.apply(serial.check(Contribution({"w": g})))
    assert serial.state.params is not None
    return serial.state.params


def test_a_second_process_attaches_to_the_same_embedded_store(data: Path, tmp_path: Path) -> None:
    with serving(data) as first:
        with first.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
        with serving(data) as second:
            assert second.valkey_pid() == first.valkey_pid()
            with second.client() as client:
                reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1.0]}})
                assert reply.json()["step"] == 1
        # The second one has gone; the store stays for the first.
        with first.client() as client:
            assert client.get(f"/v1/sessions/{session}/params").json()["step"] == 1


def read_after_write(first: Server, second: Server, session: str) -> None:
    with first.client() as writer, second.client() as reader:
        for _ in range(30):
            reply = writer.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1.0]}})
            seen = reader.get(f"/v1/sessions/{session}/params")
            assert seen.json()["step"] >= reply.json()["step"]


def test_what_one_process_acknowledged_another_one_sees(data: Path) -> None:
    with serving(data) as first, serving(data) as second:
        with first.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
        read_after_write(first, second, session)


def test_long_polls_wake_through_every_process(data: Path) -> None:
    with serving(data) as first, serving(data) as second:
        with first.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]

        def wait(i: int) -> tuple[int, int]:
            with (first, second)[i % 2].client() as client:
                reply = client.get(f"/v1/sessions/{session}/params", params={"after": 0, "wait": 20})
            return reply.status_code, reply.json()["step"]

        with ThreadPoolExecutor(41) as pool:
            waiting = [pool.submit(wait, i) for i in range(40)]
            time.sleep(0.5)  # most are waiting by now; whoever is not gets the step at once, so the outcome is the same
            with second.client() as client:
                assert client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1.0]}}).status_code == 200
            assert {future.result() for future in waiting} == {(200, 1)}
