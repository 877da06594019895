"""Sessions in which a step must be applied before the next one can be judged: many at once, sent again, guarded."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.refusals import refused, unchanged
from tests.running import Server, serving
from tests.wire import create

Json = dict[str, Any]
PLATEAU: Json = {"kind": "plateau", "init": 0.5, "factor": 0.5, "patience": 2}
SESSIONS: dict[str, Json] = {
    "accumulate": {"optimizer": "adam", "transforms": [{"kind": "accumulate", "steps": 3}]},
    "sam": {"optimizer": {"kind": "sam", "base": "adam"}},
    "plateau": {"optimizer": {"kind": "adam", "lr": PLATEAU}},
    "unscale": {
        "optimizer": {"kind": "adam", "lr": {"kind": "linear", "init": 0.5, "end": 0.1, "steps": 9}},
        "transforms": [{"kind": "unscale", "scale": 4.0, "dynamic": True, "growth_interval": 3}],
    },
    "lbfgs": {"optimizer": {"kind": "lbfgs", "line_search": "strong_wolfe"}},
    "bfgs": {"optimizer": "bfgs"},
    "sophia": {"optimizer": {"kind": "sophia", "interval": 3}},
}
STEP: Json = {
    "gradients": {"w": [0.5, -1.0, 2.0]}, "hessian_diagonal": {"w": [1.0, 2.0, 3.0]}, "loss": 1.5,
}  # fmt: skip
POSTS = 16


def begun(client: httpx.Client, name: str) -> str:
    return str(create(client, params={"w": [1.0, 2.0, 3.0]}, dtype="float64", **SESSIONS[name])["id"])


def post(client: httpx.Client, session: str, headers: Mapping[str, str] | None = None, **more: Any) -> httpx.Response:
    return client.post(f"/v1/sessions/{session}/steps", json=STEP | more, headers=headers)


def seen(client: httpx.Client, session: str) -> tuple[bytes, list[Json]]:
    """The state, and the history without what differs between two sessions that took the same."""
    records = client.get(f"/v1/sessions/{session}/history").json()["data"]
    shown = [{name: record[name] for name in ("step", "loss", "grad_norm", "lr")} for record in records]
    return client.get(f"/v1/sessions/{session}/state").content, shown


# -- at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SESSIONS)
def test_steps_of_two_clients_at_once_are_taken_one_by_one(server: Server, client: httpx.Client, name: str) -> None:
    session, serial = begun(client, name), begun(client, name)
    with server.client() as first, server.client() as second, ThreadPoolExecutor(POSTS) as pool:
        sent = [pool.submit(post, (first, second)[i % 2], session) for i in range(POSTS)]
        replies = [future.result() for future in sent]
    assert [reply.status_code for reply in replies] == [200] * POSTS
    replies.sort(key=lambda reply: int(reply.json()["step"]))
    assert [reply.json()["step"] for reply in replies] == list(range(1, POSTS + 1))
    assert len({reply.headers["etag"] for reply in replies}) == POSTS
    # All brought the same, so whoever came first: each was answered what it would have been by itself.
    for reply in replies:
        assert post(client, serial).json() == reply.json()
    assert seen(client, session) == seen(client, serial)


@pytest.mark.parametrize("name", ["plateau", "lbfgs"])
def test_those_that_are_refused_hold_up_nobody(server: Server, client: httpx.Client, name: str) -> None:
    session, serial = begun(client, name), begun(client, name)
    bare = {key: value for key, value in STEP.items() if key != "loss"}

    def send(i: int) -> httpx.Response:
        body = bare if i % 2 else STEP
        return client.post(f"/v1/sessions/{session}/steps", json=body)

    with ThreadPoolExecutor(POSTS) as pool:
        replies = list(pool.map(send, range(POSTS)))
    for reply in replies[1::2]:
        refused(reply, 422, "loss-required")
    assert sorted(reply.json()["step"] for reply in replies[::2]) == list(range(1, POSTS // 2 + 1))
    for _ in range(POSTS // 2):
        post(client, serial)
    assert seen(client, session) == seen(client, serial)


def test_changes_between_steps_come_in_their_turn(client: httpx.Client) -> None:
    """A session becomes one of these, and stops being one, while steps wait in its queue."""
    session = str(create(client, optimizer={"kind": "sgd", "lr": 0.5}, params={"w": [0.0] * 3})["id"])
    path = f"/v1/sessions/{session}"

    def send(i: int) -> httpx.Response:
        if i % 4 == 3:
            transforms = [{"kind": "accumulate", "steps": 2}] if i % 8 == 3 else []
            lr = PLATEAU if i % 8 == 3 else 0.5
            return client.patch(path, json={"transforms": transforms, "optimizer": {"lr": lr}})
        return post(client, session)

    with ThreadPoolExecutor(POSTS) as pool:
        replies = list(pool.map(send, range(2 * POSTS)))
    assert {reply.status_code for reply in replies} == {200}
    steps = sorted(reply.json()["step"] for i, reply in enumerate(replies) if i % 4 != 3)
    assert steps == list(range(1, 2 * POSTS - 2 * POSTS // 4 + 1))
    assert client.get(path).json()["step"] == steps[-1]


# -- guarded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SESSIONS)
def test_of_many_that_guard_the_same_step_one_is_taken(client: httpx.Client, name: str) -> None:
    session = begun(client, name)
    for t in range(3):
        etag = client.get(f"/v1/sessions/{session}").headers["etag"]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda tag: post(client, session, {"If-Match": tag}), [etag] * 8))
        assert sorted(reply.status_code for reply in replies) == [200] + [412] * 7
        for reply in replies:
            if reply.status_code == 412:
                assert refused(reply, 412, "step-conflict")["step"] == t + 1
    assert client.get(f"/v1/sessions/{session}").json()["step"] == 3


# -- sent again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SESSIONS)
def test_a_step_that_is_sent_again_is_taken_once(client: httpx.Client, name: str) -> None:
    session, once = begun(client, name), begun(client, name)
    for t in range(1, 6):
        key = {"Idempotency-Key": f"step {t}"}
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda headers: post(client, session, headers), [key] * 4))
        assert sorted("ravine-replayed" in reply.headers for reply in replies) == [False, True, True, True]
        expected = post(client, once)
        for reply in replies:
            assert reply.status_code == 200, reply.text
            assert reply.json() == expected.json()
    assert seen(client, session) == seen(client, once)
    with unchanged(client, session):
        late = post(client, session, {"Idempotency-Key": "step 1"})
        # The metrics of its own step, the parameters of now.
        assert late.headers["ravine-replayed"] == "true"
        assert late.json()["params"] == expected.json()["params"]
        refused(post(client, session, {"Idempotency-Key": "step 1"}, loss=2.0), 422, "key-reused")


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[httpx.Response]]:
    """Of each session the answers to five steps, and to the same ones once the server was killed and started again."""
    data: Path = tmp_path_factory.mktemp("sequential") / "data"
    answers: dict[str, list[httpx.Response]] = {}
    ids: dict[str, str] = {}
    with serving(data) as server:
        for _ in range(2):
            with server.client() as client:
                for name in SESSIONS:
                    ids[name] = ids.get(name) or begun(client, name)
                    sent = [post(client, ids[name], {"Idempotency-Key": str(t)}) for t in range(5)]
                    answers.setdefault(name, []).extend(sent)
            server.kill()
            server.restart()
    return answers


@pytest.mark.parametrize("name", SESSIONS)
def test_a_step_that_is_sent_again_after_a_kill_is_known(across: Mapping[str, list[httpx.Response]], name: str) -> None:
    replies = across[name]
    assert [reply.status_code for reply in replies] == [200] * 10
    before, after = replies[:5], replies[5:]
    for first, again in zip(before, after, strict=True):
        assert "ravine-replayed" not in first.headers
        assert again.headers["ravine-replayed"] == "true"
        for metric in ("lr", "grad_norm"):
            assert again.json()["metrics"][metric] == first.json()["metrics"][metric]
        assert again.json()["params"] == before[-1].json()["params"]
        assert again.headers["etag"] == before[-1].headers["etag"]
