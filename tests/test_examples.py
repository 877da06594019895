"""The examples, run as a newcomer would run them, against computations of the test's own."""

import importlib.util
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest

from tests.running import ROOT, Server

SCRIPT = ROOT / "examples" / "ravine.sh"
needs_shell = pytest.mark.skipif(
    not all(map(shutil.which, ("sh", "curl", "awk"))), reason="sh, curl and awk are not all here"
)

Point = tuple[float, float]
Rule = Callable[[float], float]
"""An optimizer of one number: gradient in, update out; it keeps its own state."""


def sgd() -> Rule:
    return lambda g: -0.06 * g


def momentum() -> Rule:
    v = 0.0

    def update(g: float) -> float:
        nonlocal v
        v = 0.8 * v + g
        return -0.02 * v

    return update


def rmsprop() -> Rule:
    s, rate = 0.0, 0.2

    def update(g: float) -> float:
        nonlocal s, rate
        s = 0.9 * s + 0.1 * g * g
        u = -rate * g / (math.sqrt(s) + 1e-8)
        rate *= 0.97
        return u

    return update


def adam() -> Rule:
    m = v = 0.0
    t = 0

    def update(g: float) -> float:
        nonlocal m, v, t
        t += 1
        m = 0.8 * m + 0.2 * g
        v = 0.99 * v + 0.01 * g * g
        return -0.3 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)

    return update


RULES = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": adam}


def way_down(kind: str) -> list[Point]:
    """The points from (-4, 1.5) to where the gradient of (x² + 30 y²)/2 is shorter than 0.001."""
    along, across = RULES[kind](), RULES[kind]()
    points = [(-4.0, 1.5)]
    while math.hypot(points[-1][0], 30 * points[-1][1]) >= 1e-3:
        x, y = points[-1]
        points.append((x + along(x), y + across(30 * y)))
    return points


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def session_of(output: str) -> str:
    return re.findall(r"session (ses_[a-z0-9]+)", output)[0]


@needs_shell
@pytest.mark.parametrize("kind", RULES)
def test_the_script_walks_to_the_minimum(kind: str, server: Server, client: httpx.Client) -> None:
    expected = way_down(kind)
    done = run(kind, server.url)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *\d", line)]
    shown = sorted({*range(0, len(expected), 10), len(expected) - 1})
    assert [int(row[0]) for row in rows] == shown
    for number, x, y, f in rows:
        there = expected[int(number)]
        assert (float(x), float(y)) == pytest.approx(there, abs=6e-7)  # six decimals are printed
        assert float(f) == pytest.approx((there[0] ** 2 + 30 * there[1] ** 2) / 2, rel=1e-4)
    assert math.hypot(float(rows[-1][1]), 30 * float(rows[-1][2])) < 1e-3
    assert client.get(f"/v1/sessions/{session_of(done.stdout)}").status_code == 404


@needs_shell
def test_the_script_takes_its_session_along_when_it_is_ended(server: Server, client: httpx.Client) -> None:
    with subprocess.Popen(["sh", str(SCRIPT), "sgd", server.url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = f"/v1/sessions/{session_of(process.stdout.readline())}"
        assert client.get(path).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.communicate()  # or it might end for want of a reader, which is another way to go
    assert process.returncode == 128 + signal.SIGTERM
    assert client.get(path).status_code == 404


@needs_shell
def test_the_script_says_that_no_service_is_there() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        done = run("adam", url)
    assert done.returncode == 1
    assert f"no service answers at {url}" in done.stderr
    assert done.stdout == ""


@needs_shell
def test_the_script_shows_what_the_service_refused(server: Server) -> None:
    done = run("adam", f"{server.url}/elsewhere")
    assert done.returncode == 1
    assert "404" in done.stderr
    assert "/problems/not-found" in done.stderr


@needs_shell
def test_the_script_knows_four_optimizers() -> None:
    done = run("gradient_ascent")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    """examples/digits.py, of which only the data set and the pictures need more than NumPy."""
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def test_the_gradient_of_the_digits_model_is_that_of_its_loss(digits: ModuleType, random: np.random.Generator) -> None:
    x, y = random.normal(size=(12, 5)), random.integers(10, size=12)
    params = {"w": random.normal(size=(5, 10)), "b": random.normal(size=10)}
    loss, gradients = digits.gradient(params, x, y)
    assert loss == pytest.approx(digits.cross_entropy(params, x, y), rel=1e-12)
    for name, values in params.items():
        for index in np.ndindex(values.shape):
            sides = []
            for shift in (1e-6, -1e-6):
                moved = {**params, name: values.copy()}
                moved[name][index] += shift
                sides.append(digits.cross_entropy(moved, x, y))
            assert gradients[name][index] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_the_digits_loop_over_http_is_the_loop_without(
    digits: ModuleType, server: Server, client: httpx.Client, random: np.random.Generator
) -> None:
    x, y = random.normal(size=(150, 6)), random.integers(10, size=150)
    data = digits.Digits(x[:130], y[:130], x[130:], y[130:])
    before = client.get("/v1/sessions", params={"limit": 1}).json()["data"]

    walked = digits.train(digits.Ravine(server.url), {"kind": "sgd", "lr": 0.1}, data, epochs=2)

    params = {"w": np.zeros((6, 10)), "b": np.zeros(10)}
    losses = [math.log(10)]
    for batch in digits.batches(130, 2):
        _, gradients = digits.gradient(params, data.train_x[batch], data.train_y[batch])
        params = {name: value - 0.1 * gradients[name] for name, value in params.items()}
        losses.append(digits.cross_entropy(params, data.train_x, data.train_y))
    assert len(losses) == 1 + 2 * 3
    np.testing.assert_allclose(walked.losses, losses, rtol=1e-5)  # the session is in float32
    assert walked.test_accuracy == digits.accuracy(params, data.test_x, data.test_y)
    assert client.get("/v1/sessions", params={"limit": 1}).json()["data"] == before


def test_the_demo_shows_what_the_service_refused(digits: ModuleType, server: Server) -> None:
    ravine = digits.Ravine(server.url)
    with pytest.raises(digits.CallFailed, match=r"422 .*/problems/invalid-request"):
        ravine.call("POST", "/v1/sessions", {"optimizer": "gradient_ascent", "params": {"w": 1}})
    assert ravine.call("GET", "/v1/optimizers")["data"], "and the connection is still good"


def test_the_service_of_the_demo_leaves_nothing_behind(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RAVINE_REDIS_URL", "redis://127.0.0.1:1")  # of another service, and not to be used
    with digits.own_service() as url:
        store = int(next(tmp_path.glob("ravine-demo-*/data/valkey.pid")).read_text())
        os.kill(store, 0)
        assert digits.Ravine(url).call("GET", "/v1/sessions")["data"] == []
    with pytest.raises(ProcessLookupError):
        os.kill(store, 0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(digits.CallFailed):
        digits.Ravine(url).call("GET", "/livez")
