"""docs/extending.md keeps its word: its code, appended to one file of a copy of the repository, is a whole new kind."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ROOT, Server

PAGE = ROOT / "docs" / "extending.md"
CODE = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the new kind in it."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("benchmarks", "core", "docs", "service", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".venv"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    with (root / "core" / "optimizers" / "descent.py").open("a") as file:
        file.write("\n\n" + CODE)
    return root


@pytest.fixture(scope="module")
def server(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(
        tmp_path_factory.mktemp("extended-data") / "data", root=copy, environment=environment(copy)
    ).start()
    yield running
    running.stop()


def environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy)}


def run(copy: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, env=environment(copy), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_under_thirty_lines() -> None:
    assert ast.parse(CODE)
    assert len([line for line in CODE.splitlines() if line.strip()]) < 30


def test_it_steps_over_http(server: Server) -> None:
    with server.client() as client:
        body = {"optimizer": {"kind": "qhm", "lr": 0.5, "momentum": 0.75, "nu": 0.5}, "params": {"w": [1.0, -2.0]}}
        made = client.post("/v1/sessions", json=body).json()
        path = f"/v1/sessions/{made['id']}"
        velocity, w = [0.0, 0.0], [1.0, -2.0]
        for g in ([4.0, -8.0], [2.0, 2.0]):
            velocity = [0.75 * v + 0.25 * each for v, each in zip(velocity, g, strict=True)]
            w = [p - 0.5 * (0.5 * each + 0.5 * v) for p, each, v in zip(w, g, velocity, strict=True)]
            reply = client.post(f"{path}/steps", json={"gradients": {"w": g}})
            assert reply.json()["params"] == {"w": w}  # in float32 too: all of it is exact in binary
        fork = client.post(f"{path}/fork").json()
        assert client.get(f"/v1/sessions/{fork['id']}/params").json()["params"] == {"w": w}


def test_it_has_validation_schedules_and_a_page(server: Server) -> None:
    with server.client() as client:
        linear = {"kind": "linear", "init": 0.0, "end": 0.7, "steps": 2}
        body = {"optimizer": {"kind": "qhm", "nu": linear}, "shapes": {"w": [2]}}
        made = client.post("/v1/sessions", json=body).json()
        values = client.get(f"/v1/sessions/{made['id']}/schedule?steps=3").json()["values"]
        assert values["/optimizer/nu"] == [0.0, 0.35, 0.7]
        refused = client.post("/v1/sessions", json={"optimizer": {"kind": "qhm", "nu": 1.5}, "shapes": {"w": [2]}})
        assert refused.status_code == 422
        assert [fault["pointer"] for fault in refused.json()["errors"]] == ["/optimizer/nu"]
        entry = client.get("/v1/optimizers/qhm").json()
        assert (entry["slots"], entry["bytes_per_parameter"]["float32"]) == (["v"], 4)
        assert entry["schema"]["properties"]["nu"]["default"] == 0.7
        document = client.get("/openapi.json").json()
        assert "QhmOptimizer" in document["components"]["schemas"]


def test_it_is_listed_in_the_terminal(copy: Path) -> None:
    assert "Quasi-hyperbolic momentum" in run(copy, "service", "optimizers")
    assert "1810.06801" in run(copy, "service", "optimizers", "qhm")


def test_it_is_tested_as_all_kinds_are(copy: Path) -> None:
    """By the page's own command, without what `make test` installs."""
    assert '\n$ make test ARGS="-k qhm"\n' in PAGE.read_text("utf-8")
    told = run(copy, "pytest", "-m", "not soak", "-k", "qhm")
    passed = re.search(r"(\d+) passed", told)
    assert passed is not None
    assert int(passed[1]) > 40
    run(copy, "ruff", "check", "--select", "E,F,N,RUF", "core/optimizers/descent.py")
