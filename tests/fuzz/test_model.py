"""Sessions driven at random, beside a model that is a dozen lines of arithmetic.

Hypothesis chooses what is done next: sessions are opened, stepped, guarded by If-Match, stepped again under a key
that was used, patched, forked, taken out and put back as checkpoints, deleted, and the service is killed in between.
The model knows what each of them is then to be. Its optimizer is plain gradient descent by powers of two on multiples
of 1/8, so that float32 is exact and a wrong order, a step too many or one too few shows in the numbers.

`FUZZ_EXAMPLES` says how many such stories are told: 15 if left out, `make fuzz` tells as many as there is time for.
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from tests.running import Server, serving
from tests.wire import SAFETENSORS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
EIGHTHS = st.integers(-64, 64).map(lambda number: number / 8)
RATES = st.sampled_from([1.0, 0.5, 0.25])
VECTORS = st.lists(EIGHTHS, min_size=3, max_size=3)


@dataclass
class Expected:
    """What a session is to be."""

    params: list[float]
    lr: float
    step: int = 0
    name: str | None = None
    losses: list[float | None] = field(default_factory=list)
    first: int = 0  # forks and restored sessions begin without a history
    keys: dict[str, tuple[list[float], int]] = field(default_factory=dict)

    def take(self, gradient: list[float], loss: float | None) -> None:
        self.params = [p - self.lr * g for p, g in zip(self.params, gradient, strict=True)]
        self.step += 1
        self.losses.append(loss)

    def branched(self) -> "Expected":
        """A session of its own that begins here."""
        other = copy.deepcopy(self)
        other.losses, other.first, other.keys = [], self.step, {}
        return other


class Sessions(RuleBasedStateMachine):
    """`server` is set by the test that runs it."""

    server: Server
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Expected] = {}
        self.gone: list[str] = []
        self.client = self.server.client()
        self.serial = 0
        self.killed = False

    def teardown(self) -> None:
        for id_ in self.model:
            self.client.delete(f"/v1/sessions/{id_}")
        self.client.close()

    def of(self, id_: str) -> tuple[str, Expected]:
        return f"/v1/sessions/{id_}", self.model[id_]

    # What makes and ends sessions

    @initialize(target=ids, params=VECTORS, lr=RATES)
    def first(self, params: list[float], lr: float) -> str:
        return self.open(params, lr)

    @rule(target=ids, params=VECTORS, lr=RATES)
    def opened(self, params: list[float], lr: float) -> str:
        return self.open(params, lr)

    def open(self, params: list[float], lr: float) -> str:
        body = {"optimizer": {"kind": "sgd", "lr": lr}, "params": {"w": params}}
        reply = self.client.post("/v1/sessions", json=body)
        assert reply.status_code == 201, reply.text
        id_ = str(reply.json()["id"])
        self.model[id_] = Expected([*params], lr)
        return id_

    @rule(target=ids, id_=ids)
    def fork(self, id_: str) -> str:
        path, expected = self.of(id_)
        reply = self.client.post(f"{path}/fork")
        assert reply.status_code == 201
        made = str(reply.json()["id"])
        self.model[made] = expected.branched()
        return made

    @rule(target=ids, id_=ids)
    def restore(self, id_: str) -> str:
        path, expected = self.of(id_)
        checkpoint = self.client.get(f"{path}/state")
        assert checkpoint.status_code == 200
        reply = self.client.post("/v1/sessions", content=checkpoint.content, headers=SAFETENSORS)
        assert reply.status_code == 201
        made = str(reply.json()["id"])
        self.model[made] = expected.branched()
        return made

    @rule(id_=consumes(ids))
    def delete(self, id_: str) -> None:
        path, _ = self.of(id_)
        assert self.client.delete(path).status_code == 204
        del self.model[id_]
        self.gone.append(id_)

    @rule(data=st.data())
    def use_one_that_is_gone(self, data: st.DataObject) -> None:
        if not self.gone:
            return
        path = f"/v1/sessions/{data.draw(st.sampled_from(self.gone))}"
        step = {"gradients": {"w": [1.0, 1.0, 1.0]}}
        for reply in (self.client.get(path), self.client.post(f"{path}/steps", json=step), self.client.delete(path)):
            assert reply.status_code == 404

    # What changes them

    @rule(id_=ids, gradient=VECTORS, loss=st.none() | EIGHTHS, guard=st.sampled_from(["none", "step", "etag"]))
    def step(self, id_: str, gradient: list[float], loss: float | None, guard: str) -> None:
        path, expected = self.of(id_)
        headers = {}
        if guard == "step":
            headers["If-Match"] = f'"{expected.step}"'
        elif guard == "etag":
            headers["If-Match"] = self.client.get(path).headers["etag"]
        body: dict[str, Any] = {"gradients": {"w": gradient}}
        if loss is not None:
            body["loss"] = loss
        reply = self.client.post(f"{path}/steps", json=body, headers=headers)
        expected.take(gradient, loss)
        self.check_step(reply, expected.params, expected.step)

    @rule(id_=ids, gradient=VECTORS)
    def step_with_a_key(self, id_: str, gradient: list[float]) -> None:
        path, expected = self.of(id_)
        self.serial += 1
        key = f"key-{self.serial}"
        reply = self.client.post(f"{path}/steps", json={"gradients": {"w": gradient}}, headers={"Idempotency-Key": key})
        expected.take(gradient, None)
        expected.keys[key] = (gradient, expected.step)
        self.check_step(reply, expected.params, expected.step)

    @rule(id_=ids, data=st.data(), other=st.booleans())
    def use_a_key_again(self, id_: str, data: st.DataObject, other: bool) -> None:
        path, expected = self.of(id_)
        if not expected.keys:
            return
        key = data.draw(st.sampled_from(sorted(expected.keys)))
        gradient, step = expected.keys[key]
        sent = [gradient[0] + 1, *gradient[1:]] if other else gradient
        reply = self.client.post(f"{path}/steps", json={"gradients": {"w": sent}}, headers={"Idempotency-Key": key})
        if other:
            assert (reply.status_code, reply.json()["type"]) == (422, "/problems/key-reused")
        else:
            assert reply.headers["ravine-replayed"] == "true"
            self.check_step(reply, expected.params, step)

    @rule(id_=ids, gradient=VECTORS, off=st.sampled_from([-1, 1, 1000]))
    def step_from_another_state(self, id_: str, gradient: list[float], off: int) -> None:
        path, expected = self.of(id_)
        headers = {"If-Match": f'"{expected.step + off}"'} if expected.step + off >= 0 else {"If-Match": '"x"'}
        reply = self.client.post(f"{path}/steps", json={"gradients": {"w": gradient}}, headers=headers)
        assert (reply.status_code, reply.json()["step"]) == (412, expected.step)

    @rule(id_=ids, bad=st.sampled_from(["shape", "name", "missing", "nan", "member"]))
    def step_that_is_refused(self, id_: str, bad: str) -> None:
        path, _ = self.of(id_)
        bodies: dict[str, bytes] = {
            "shape": b'{"gradients": {"w": [1, 2]}}',
            "name": b'{"gradients": {"w": [1, 2, 3], "v": 1}}',
            "missing": b'{"gradients": {}}',
            "nan": b'{"gradients": {"w": [1, NaN, 3]}}',
            "member": b'{"gradients": {"w": [1, 2, 3]}, "momentum": 1}',
        }
        reply = self.client.post(f"{path}/steps", content=bodies[bad], headers={"Content-Type": "application/json"})
        assert reply.status_code == (400 if bad == "nan" else 422)

    @rule(id_=ids, params=VECTORS)
    def put(self, id_: str, params: list[float]) -> None:
        path, expected = self.of(id_)
        reply = self.client.put(f"{path}/params", json={"params": {"w": params}})
        assert (reply.status_code, reply.json()["step"]) == (200, expected.step)
        expected.params = [*params]

    @rule(id_=ids, lr=RATES, name=st.none() | st.text("abc", min_size=1, max_size=5))
    def patch(self, id_: str, lr: float, name: str | None) -> None:
        path, expected = self.of(id_)
        reply = self.client.patch(path, json={"optimizer": {"lr": lr}, "name": name})
        assert reply.status_code == 200
        expected.lr, expected.name = lr, name

    @precondition(lambda self: not self.killed)
    @rule(now=st.integers(0, 3))
    def kill(self, now: int) -> None:
        """Seldom: it takes as long as a hundred of the others."""
        if now:
            return
        self.killed = True
        self.server.kill()
        self.server.restart()
        self.client.close()
        self.client = self.server.client()

    # What is then to be seen

    def check_step(self, reply: httpx.Response, params: list[float], step: int) -> None:
        assert reply.status_code == 200, reply.text
        assert reply.json()["params"]["w"] == params
        if "ravine-replayed" not in reply.headers:
            assert reply.json()["step"] == step

    @rule(id_=ids)
    def look(self, id_: str) -> None:
        path, expected = self.of(id_)
        session = self.client.get(path).json()
        shown = (session["step"], session["optimizer"]["lr"], session["name"])
        assert shown == (expected.step, expected.lr, expected.name)
        params = self.client.get(f"{path}/params").json()
        assert (params["step"], params["params"]["w"]) == (expected.step, expected.params)
        records = self.client.get(f"{path}/history").json()["data"]
        assert [record["step"] for record in records] == list(range(expected.first + 1, expected.step + 1))
        assert [record["loss"] for record in records] == expected.losses

    @invariant()
    def all_are_listed(self) -> None:
        listed = self.client.get("/v1/sessions", params={"limit": 100}).json()
        assert {session["id"]: session["step"] for session in listed["data"]} == {
            id_: expected.step for id_, expected in self.model.items()
        }


def test_sessions_are_what_the_model_says(tmp_path: Path) -> None:
    with serving(tmp_path / "data", environment={"RAVINE_JIT": "false"}) as server:
        Sessions.server = server
        told = settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            derandomize="FUZZ_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        run(Sessions, settings=told)
