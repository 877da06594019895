"""The examples of many workers, shortened: each worker a process of its own, with a real service between them."""

import importlib
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.running import ROOT, Server

NAMES = ("asynchronous", "byzantine", "client", "digits", "diloco", "federated", "perceptron")


@pytest.fixture(scope="module")
def examples() -> Iterator[SimpleNamespace]:
    """The modules of examples/, found as when one of them is the program: so do the workers find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


@pytest.fixture(scope="module")
def digits(examples: SimpleNamespace) -> Any:
    return examples.digits.read_digits(ROOT / "tests" / "core" / "data" / "digits.npz")


def test_the_gradient_of_the_model_is_that_of_its_loss(examples: SimpleNamespace) -> None:
    random = np.random.default_rng(5)
    x, y = random.normal(size=(9, 64)), random.integers(10, size=9)
    params = {name: value + random.normal(size=value.shape) / 10 for name, value in examples.perceptron.start().items()}
    _, gradients = examples.perceptron.gradient(params, x, y)
    for name, value in params.items():
        for place in random.choice(value.size, 10, replace=False):
            index = np.unravel_index(place, value.shape)
            sides = []
            for shift in (1e-6, -1e-6):
                moved = {**params, name: value.copy()}
                moved[name][index] += shift
                sides.append(examples.perceptron.gradient(moved, x, y)[0])
            assert gradients[name][index] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7), (name, index)


def test_asynchronous_workers_go_on_through_a_crash_and_no_gradient_counts_twice(
    examples: SimpleNamespace, digits: Any, data: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(data, port=port).start()
    try:
        with ThreadPoolExecutor() as pool:
            rule = examples.asynchronous.RULES["sgd"]
            running = pool.submit(examples.asynchronous.run, server.url, digits, rule, (1, 1, 1, 4), 100)
            wait_for_step(server, 60, running)
            server.kill()
            server.restart()
            made = running.result(timeout=120)
        with server.client() as client:
            assert client.get("/v1/sessions").json()["data"] == []
    finally:
        server.stop()
    assert Counter(made.senders) == {"worker-1": 100, "worker-2": 100, "worker-3": 100, "worker-4": 25}
    assert made.curve[-1][0] == 325 * 32, "images"
    assert made.curve[0][1] < 0.3
    assert made.curve[-1][1] > 0.9


def wait_for_step(server: Server, step: int, running: "Future[Any]") -> None:
    deadline = time.monotonic() + 60
    with server.client() as client:
        while not any(session["step"] >= step for session in client.get("/v1/sessions").json()["data"]):
            assert not running.done(), running.result()
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_age_of_a_gradient_is_how_many_others_came_between(examples: SimpleNamespace) -> None:
    assert examples.asynchronous.ages(["a", "b", "b", "c", "a", "b"]) == {"a": [3], "b": [0, 2]}


def test_federated_rounds_go_on_without_killed_clients_and_with_them_again(
    examples: SimpleNamespace, digits: Any, server: Server
) -> None:
    rounds = 6
    shares = examples.federated.shares(digits)
    sizes = {name: len(y) for name, (_, y) in shares.items()}
    assert sum(sizes.values()) == len(digits.train_y)
    assert max(sizes.values()) > 5 * min(sizes.values()), "they are unequal"

    made = examples.federated.run(server.url, digits, examples.federated.RULES["FedAvg"], rounds, timeout=1.5)

    assert made.killed == [(3, "client-1"), (6, "client-2")]
    assert [record["step"] for record in made.history] == list(range(1, rounds + 1))
    workers = {worker["worker"]: worker for worker in made.workers}
    assert {name: worker["weight"] for name, worker in workers.items()} == sizes
    assert workers["client-1"]["last_step"] > 3, "it was started again, and goes on"
    assert workers["client-1"]["contributions"] < rounds
    assert sum(worker["contributions"] for worker in workers.values()) >= examples.federated.QUORUM * rounds
    assert made.curve[-1][0] == rounds
    assert made.curve[0][1] < 0.3
    assert made.curve[-1][1] > 0.85
    assert made.curve[-1][1] > max(examples.federated.alone(digits, rounds).values()), "together they know more"


def test_fedadam_learns_from_the_same_clients(examples: SimpleNamespace, digits: Any, server: Server) -> None:
    made = examples.federated.run(server.url, digits, examples.federated.RULES["FedAdam"], rounds=2)
    assert made.killed == []
    assert len(made.history) == 2
    assert made.curve[-1][1] > 0.7


def test_two_rounds_of_diloco_are_worth_more_than_two_steps(
    examples: SimpleNamespace, digits: Any, server: Server
) -> None:
    apart = examples.diloco.run(server.url, digits, "diloco", 2)
    plain = examples.diloco.run(server.url, digits, "plain", 2)
    assert [apart[-1][0], plain[-1][0]] == [2 * 50 * 4 * 16, 2 * 4 * 16], "images"
    assert apart[-1][1] > 0.85
    assert plain[-1][1] < 0.5


def test_the_inner_adamw_of_diloco_is_that_of_the_service(examples: SimpleNamespace, client: httpx.Client) -> None:
    random = np.random.default_rng(3)
    params = {"w": random.normal(size=(3, 2)), "b": random.normal(size=4)}
    inner = examples.diloco.AdamW(params)
    request = {
        "optimizer": examples.diloco.ADAMW,
        "dtype": "float64",
        "params": {name: value.tolist() for name, value in params.items()},
    }
    path = f"/v1/sessions/{client.post('/v1/sessions', json=request).json()['id']}"
    for _ in range(5):
        gradients = {name: random.normal(size=value.shape) for name, value in params.items()}
        params = inner.step(params, gradients)
        sent = {name: gradient.tolist() for name, gradient in gradients.items()}
        reply = client.post(f"{path}/steps", json={"gradients": sent}).json()
        for name, value in params.items():
            np.testing.assert_allclose(reply["params"][name], value, rtol=1e-12)
    client.delete(path)


def test_garbage_ruins_a_mean_and_no_robust_reducer(examples: SimpleNamespace, digits: Any, server: Server) -> None:
    curves = examples.byzantine.run(server.url, digits, list(examples.byzantine.REDUCERS), rounds=10)
    reached = {name: curve[-1][1] for name, curve in curves.items()}
    assert [curve[-1][0] for curve in curves.values()] == [10] * 4
    assert reached["mean"] < 0.5
    assert reached["Krum"] > 0.85
    assert reached["Multi-Krum"] > 0.9
    assert reached["trimmed mean"] > 0.9


def test_the_client_shows_what_was_refused(examples: SimpleNamespace, server: Server, client: httpx.Client) -> None:
    request = {"optimizer": {"kind": "sgd", "lr": 0.5}, "params": {"w": [1]}}
    path = f"/v1/sessions/{client.post('/v1/sessions', json=request).json()['id']}"
    session = examples.client.Session(examples.client.Ravine(server.url), path, "w1")
    with pytest.raises(examples.client.Refused, match="unknown-tensor") as refused:
        session.contribute("gradients", {"v": np.ones(1)})
    assert refused.value.status == 422
    step, params = session.contribute("gradients", {"w": np.ones(1)}, base_step=0)
    assert step == 1, "and the connection is still good"
    assert params["w"].tolist() == session.pull().params["w"].tolist() == [0.5]
    client.delete(path)


def test_the_client_waits_for_the_slowest_and_says_so_when_it_gives_up(
    examples: SimpleNamespace, server: Server, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lockstep a second contribution in a row is too far ahead."""
    monkeypatch.setattr(examples.client, "WAIT_SECONDS", 0)  # the service refuses at once, so that the client waits
    ssp = {"mode": "ssp", "bound": 0, "workers": 2}
    request = {"optimizer": {"kind": "sgd", "lr": 1}, "aggregation": ssp, "params": {"w": [0]}}
    path = f"/v1/sessions/{client.post('/v1/sessions', json=request).json()['id']}"
    quick = examples.client.Session(examples.client.Ravine(server.url), path, "quick")
    hasty = examples.client.Session(examples.client.Ravine(server.url, patience=0.2), path, "quick")
    slow = examples.client.Session(examples.client.Ravine(server.url), path, "slow")
    sent = {"w": np.array([-1.0])}
    assert quick.contribute("gradients", sent).step == 1
    with pytest.raises(examples.client.Refused, match="too-far-ahead") as refused:
        hasty.contribute("gradients", sent)
    assert refused.value.status == 409
    with ThreadPoolExecutor() as pool:
        second = pool.submit(quick.contribute, "gradients", sent)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        assert slow.contribute("gradients", sent).step == 2
        step, params = second.result(timeout=30)
    assert (step, params["w"].tolist()) == (3, [3.0]), "and it counted once"
    client.delete(path)


def test_what_the_client_pulls_is_what_its_delay_is_counted_from(
    examples: SimpleNamespace, server: Server, client: httpx.Client
) -> None:
    compensated = {"mode": "async", "delay_compensation": {"lambda": 1}}
    request = {"optimizer": {"kind": "sgd", "lr": 1}, "aggregation": compensated, "params": {"w": [0]}}
    path = f"/v1/sessions/{client.post('/v1/sessions', json=request).json()['id']}"
    ravine = examples.client.Ravine(server.url)
    late, other = (examples.client.Session(ravine, path, name) for name in ("late", "other"))
    start = late.pull()
    assert other.contribute("gradients", {"w": np.array([-2.0])}, base_step=0).params["w"].tolist() == [2.0]
    found = late.contribute("gradients", {"w": np.array([1.0])}, base_step=start.step)
    assert found.params["w"].tolist() == [2.0 - (1.0 + 1.0 * (2.0 - 0.0))]
    client.delete(path)


def test_the_client_gives_up_when_its_patience_is_over(examples: SimpleNamespace) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        ravine = examples.client.Ravine(f"http://127.0.0.1:{unheard.getsockname()[1]}", patience=0.2)
        with pytest.raises(examples.client.Unreachable, match="Refused"):
            ravine.call("GET", "/livez")
