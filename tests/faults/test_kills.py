"""Processes killed with -9 at random moments: what was acknowledged is there, once, with the same bits.

A client takes steps one after the other, each under a key of its own, and repeats what it got no answer to. Meanwhile
the service and its store are killed. In the end the session must have taken each step once, every reply must have
been that of a run in which nothing was killed, and so must the parameters be, to the last bit.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.running import Server, serving
from tests.wire import bits, create, params, step, tensors

SIZE = 257
RECIPE = {"optimizer": {"kind": "adam", "lr": {"kind": "cosine", "init": 0.1, "steps": 500}}}


def gradient(t: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(t).standard_normal(SIZE).astype(np.float32)}


class Stepper(threading.Thread):
    """Steps a session until told to stop; keeps the tensors of every reply."""

    def __init__(
        self,
        server: Server,
        session: str,
        pause: float = 0.0,
        gradient: Callable[[int], dict[str, np.ndarray]] = gradient,
        *,
        keep: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.session = session
        self.pause = pause
        self.gradient = gradient
        self.keep = keep
        self.taken = 0
        self.replies: list[bytes] = []
        self.retries = 0
        self.failures: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            reply = self._step(self.taken + 1)
            if reply is not None:
                self.taken += 1
                if self.keep:
                    self.replies.append(bits(tensors(reply)["w"]))
            time.sleep(self.pause)

    def _step(self, t: int) -> httpx.Response | None:
        """Sends the same again until it is answered, as a client should."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with self.server.client() as client:
                    reply = step(client, self.session, self.gradient(t), {"Idempotency-Key": f"step-{t}"})
            except httpx.TransportError:
                self.retries += 1
                time.sleep(0.02)
                continue
            if reply.status_code in (502, 503, 504):
                self.retries += 1
                time.sleep(0.02)
                continue
            if reply.status_code != 200 or int(reply.headers["ravine-step"]) != t:
                self.failures.append(f"step {t}: {reply.status_code} {dict(reply.headers)} {reply.content[:300]!r}")
                self.done.set()
                return None
            return reply
        self.failures.append(f"step {t}: no answer within a minute")
        self.done.set()
        return None


def kill_and_check(data: Path, kills: int, seed: int, reference: Server) -> None:
    """`kills` kills, every other one of the store, at moments drawn from `seed`."""
    draw = random.Random(seed)
    with serving(data) as server:
        with server.client() as client:
            held = create(client, params={"w": [1.0] * SIZE}, **RECIPE)["id"]
            moments = create(client, shapes={"w": [SIZE]}, **RECIPE)["id"]
        steppers = [Stepper(server, held), Stepper(server, moments, pause=0.003)]
        for stepper in steppers:
            stepper.start()
        for i in range(kills):
            time.sleep(draw.uniform(0.05, 0.5))
            if i % 2:
                os.kill(server.valkey_pid(), signal.SIGKILL)
            else:
                server.kill()
                server.restart()
            if any(stepper.failures for stepper in steppers):
                break
        time.sleep(0.5)
        for stepper in steppers:
            stepper.done.set()
            stepper.join()
            assert not stepper.failures, stepper.failures
        with server.client() as client:
            check_history(client, held, len(steppers[0].replies))
            check_history(client, moments, len(steppers[1].replies))
            final = bits(params(client, held)["w"])
    assert sum(stepper.retries for stepper in steppers) > 0, "no kill ever hit a request"
    check_against_a_run_without_kills(reference, steppers, final)


def check_history(client: httpx.Client, session: str, steps: int) -> None:
    """Each step is there once, in order."""
    records = client.get(f"/v1/sessions/{session}/history", params={"limit": 10_000}).json()["data"]
    assert [record["step"] for record in records] == list(range(max(1, steps - 9_999), steps + 1))


def check_against_a_run_without_kills(reference: Server, steppers: list[Stepper], final: bytes) -> None:
    held, moments = steppers
    with reference.client() as client:
        whole = create(client, params={"w": [1.0] * SIZE}, **RECIPE)["id"]
        for t, reply in enumerate(held.replies, 1):
            assert bits(tensors(step(client, whole, gradient(t)))["w"]) == reply, f"step {t} differs"
        assert bits(params(client, whole)["w"]) == final
        whole = create(client, shapes={"w": [SIZE]}, **RECIPE)["id"]
        for t, reply in enumerate(moments.replies, 1):
            assert bits(tensors(step(client, whole, gradient(t)))["w"]) == reply, f"the updates of step {t} differ"


def test_a_dozen_kills(data: Path, server: Server) -> None:
    kill_and_check(data, 12, seed=1, reference=server)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_two_hundred_kills(data: Path, server: Server, seed: int) -> None:
    kill_and_check(data, 20, seed=100 + seed, reference=server)


@pytest.mark.soak
def test_the_store_killed_under_a_heavy_load(data: Path) -> None:
    """Tens of megabytes a second go into the log: none of the acknowledged steps may be missing after a kill."""
    size, draw = 500_000, random.Random(3)
    g = {"w": np.ones(size, np.float32)}
    with serving(data) as server:
        with server.client() as client:
            ids = [create(client, optimizer="sgd", shapes={"w": [size]})["id"] for _ in range(3)]
        steppers = [Stepper(server, id_, gradient=lambda _: g, keep=False) for id_ in ids]
        for stepper in steppers:
            stepper.start()
        for _ in range(20):
            time.sleep(draw.uniform(0.5, 2.5))
            os.kill(server.valkey_pid(), signal.SIGKILL)
        for stepper in steppers:
            stepper.done.set()
            stepper.join()
        assert [stepper.failures for stepper in steppers] == [[], [], []]
        with server.client() as client:
            for stepper in steppers:
                check_history(client, stepper.session, stepper.taken)


@pytest.mark.parametrize("victim", ["service", "store"])
def test_the_next_step_after_a_kill_has_the_same_bits(data: Path, server: Server, victim: str) -> None:
    with serving(data) as killed:
        with killed.client() as client, server.client() as reference:
            session = create(client, params={"w": [1.0] * SIZE}, **RECIPE)["id"]
            whole = create(reference, params={"w": [1.0] * SIZE}, **RECIPE)["id"]
            for t in range(1, 4):
                assert step(client, session, gradient(t)).status_code == 200
                assert step(reference, whole, gradient(t)).status_code == 200
        if victim == "service":
            killed.kill()
            killed.restart()
        else:
            os.kill(killed.valkey_pid(), signal.SIGKILL)
        with killed.client() as client, server.client() as reference:
            after = tensors(step(client, session, gradient(4)))
            never = tensors(step(reference, whole, gradient(4)))
    assert bits(after["w"]) == bits(never["w"])


def test_an_orderly_stop_and_start_keeps_the_session(data: Path, server: Server) -> None:
    with serving(data) as running:
        with running.client() as client:
            session = create(client, params={"w": [1.0, 2.0]}, optimizer="momentum")["id"]
            reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [0.5, 0.25]}})
            assert reply.status_code == 200
        assert running.stop() == 0
        running.restart()
        with running.client() as client:
            again = client.get(f"/v1/sessions/{session}/params")
            assert again.headers["etag"] == reply.headers["etag"]
            assert again.json()["params"] == reply.json()["params"]
