"""Idempotency-Key in rounds: a contribution counts once, in one round, however often it is sent."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.http.refusals import refused, unchanged
from tests.running import Server
from tests.wire import create

SYNC = {"mode": "sync", "workers": 3}
SGD = {"kind": "sgd", "lr": 1.0}
# What each worker sends; means of three of them have few digits.
SENT = {"a": [3.0, 30.0], "b": [6.0, 60.0], "c": [9.0, 90.0]}
MEAN = [6.0, 60.0]


@pytest.fixture
def held(client: httpx.Client) -> str:
    made: str = create(client, optimizer=SGD, params={"w": [0.0, 0.0]}, aggregation=SYNC)["id"]
    return made


@pytest.fixture
def moments(client: httpx.Client) -> str:
    made: str = create(client, optimizer=SGD, shapes={"w": [2]}, aggregation=SYNC)["id"]
    return made


def send(
    client: httpx.Client,
    session: str,
    worker: str,
    key: str | None,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> httpx.Response:
    body = {"gradients": {"w": SENT[worker]}, "worker": worker} | members
    keyed = {} if key is None else {"Idempotency-Key": key}
    return client.post(f"/v1/sessions/{session}/steps", json=body, headers=keyed | dict(headers or {}))


def replayed(reply: httpx.Response) -> bool:
    return reply.headers.get("ravine-replayed") == "true"


@pytest.mark.parametrize("kind", ["held", "moments"])
def test_a_repeat_into_an_open_round_is_told_the_same(
    client: httpx.Client, request: pytest.FixtureRequest, kind: str
) -> None:
    session = request.getfixturevalue(kind)
    first = send(client, session, "a", "a1")
    second = send(client, session, "b", "b1")
    assert (first.status_code, second.status_code) == (202, 202)
    assert (replayed(first), replayed(second)) == (False, False)
    with unchanged(client, session):
        for before, worker in ((first, "a"), (second, "b")):
            again = send(client, session, worker, f"{worker}1")
            assert (again.status_code, again.content, replayed(again)) == (202, before.content, True)
            for name in ("etag", "ravine-step", "location"):
                assert again.headers.get(name) == before.headers.get(name)


@pytest.mark.parametrize(("kind", "given"), [("held", "params"), ("moments", "updates")])
def test_a_repeat_after_the_round_gets_its_step(
    client: httpx.Client, request: pytest.FixtureRequest, kind: str, given: str
) -> None:
    session = request.getfixturevalue(kind)
    for worker in "ab":
        assert send(client, session, worker, f"{worker}1").status_code == 202
    last = send(client, session, "c", "c1")
    assert last.status_code == 200
    assert last.json()[given] == {"w": [-value for value in MEAN]}
    with unchanged(client, session):
        for worker in "abc":
            again = send(client, session, worker, f"{worker}1")
            assert (again.status_code, again.content, replayed(again)) == (200, last.content, True)
            assert again.headers["etag"] == last.headers["etag"]
    # The next round is open: what is told of the last one stays.
    assert send(client, session, "a", "a2").json() == {"round": 2, "received": 1, "needed": 3}
    assert send(client, session, "b", "b1").content == last.content


def test_later_a_repeat_gets_the_current_parameters(client: httpx.Client, held: str) -> None:
    for number in (1, 2):
        for worker in "abc":
            last = send(client, held, worker, f"{worker}{number}")
    again = send(client, held, "a", "a1")
    assert (again.status_code, replayed(again), again.headers["ravine-step"]) == (200, True, "2")
    assert again.json()["params"] == last.json()["params"] == {"w": [-2 * value for value in MEAN]}


@pytest.mark.parametrize("mode", [SYNC, {"mode": "buffered", "size": 3}], ids=["sync", "buffered"])
@pytest.mark.parametrize(
    ("tensors", "returns"),
    [("shapes", "updates"), ("shapes", None), ("shapes", "none"), ("params", "updates"), ("params", "none")],
)
def test_later_a_repeat_that_gets_no_parameters_is_told_of_its_own_round(
    client: httpx.Client, mode: dict[str, Any], tensors: str, returns: str | None
) -> None:
    """What that gave is not kept any more, and what a later one gave is not its affair."""
    given = {"shapes": {"w": [2]}} if tensors == "shapes" else {"params": {"w": [0.0, 0.0]}}
    session = create(client, optimizer=SGD, aggregation=mode, **given)["id"]
    wanted = {} if returns is None else {"return": returns}
    for number in (1, 2, 3):
        for worker in "abc":
            last = send(client, session, worker, f"{worker}{number}", **wanted)
        assert last.json()["step"] == number
        for worker in "abc":
            again = send(client, session, worker, f"{worker}{number}", **wanted)
            assert (again.status_code, again.content, replayed(again)) == (200, last.content, True)
    with unchanged(client, session):
        for number in (1, 2):
            again = send(client, session, "a", f"a{number}", **wanted)
            assert (again.status_code, again.headers["ravine-step"], replayed(again)) == (200, str(number), True)
            assert again.json() == {"step": number, "metrics": {"lr": None, "grad_norm": None}}
            assert again.headers["etag"].startswith(f'"{number}-')


def test_a_late_repeat_has_no_etag_that_a_later_state_has(client: httpx.Client, moments: str) -> None:
    """Else a step under If-Match could be applied to a state that its sender has not seen."""
    for number in (1, 2, 3):
        for worker in SENT:
            send(client, moments, worker, f"{worker}{number}")
    late = send(client, moments, "a", "a1")
    assert (late.status_code, late.json()["step"], replayed(late)) == (200, 1, True)
    now = client.get(f"/v1/sessions/{moments}").headers["etag"]
    step, commit = late.headers["etag"].strip('"').split("-")
    assert step == "1"
    assert commit not in now


def test_a_repeat_waits_for_its_round_if_it_wants_to(server: Server, client: httpx.Client, held: str) -> None:
    assert send(client, held, "a", "a1").status_code == 202
    assert send(client, held, "b", "b1").status_code == 202

    def wait(_: int) -> httpx.Response:
        with server.client() as own:
            return send(own, held, "a", "a1", {"Prefer": "wait=30"})

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.map(wait, range(2))
        last = send(client, held, "c", None)
        for reply in waiting:
            assert (reply.status_code, reply.content, replayed(reply)) == (200, last.content, True)
    assert client.get(f"/v1/sessions/{held}").json()["step"] == 1


def test_a_key_with_another_contribution_is_refused(client: httpx.Client, held: str) -> None:
    send(client, held, "a", "k")
    with unchanged(client, held):
        refused(send(client, held, "b", "k"), 422, "key-reused")
        refused(send(client, held, "a", "k", weight=2), 422, "key-reused")
    for worker in "bc":
        send(client, held, worker, None)
    with unchanged(client, held):
        refused(send(client, held, "b", "k"), 422, "key-reused")


def test_a_contribution_that_is_refused_uses_up_no_key(client: httpx.Client, held: str) -> None:
    send(client, held, "a", "a1")
    with unchanged(client, held):
        refused(send(client, held, "a", "a2"), 409, "already-contributed")
        refused(send(client, held, "a", None), 409, "already-contributed")
    for worker in "bc":
        send(client, held, worker, None)
    reply = send(client, held, "a", "a2")
    assert (reply.json(), replayed(reply)) == ({"round": 2, "received": 1, "needed": 3}, False)


def test_a_repeat_is_known_before_its_precondition_is_looked_at(client: httpx.Client, held: str) -> None:
    guarded = {"If-Match": '"0"'}
    # Contributions to an open round leave the session at its step, and its ETag as it is.
    firsts = [send(client, held, worker, f"{worker}1", guarded) for worker in "ab"]
    assert len({reply.headers["etag"] for reply in firsts}) == 1
    last = send(client, held, "c", "c1", guarded)
    assert last.status_code == 200
    again = send(client, held, "a", "a1", guarded)
    assert (again.status_code, again.content, replayed(again)) == (200, last.content, True)
    refused(send(client, held, "a", "a2", guarded), 412, "step-conflict")


def test_many_at_once_are_one_contribution(server: Server, client: httpx.Client, held: str) -> None:
    def run(_: int) -> tuple[int, bytes]:
        with server.client() as own:
            reply = send(own, held, "a", "a1")
            return reply.status_code, reply.content

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(run, range(24)))) == 1
    shown = client.get(f"/v1/sessions/{held}/rounds/current").json()
    assert (shown["received"], shown["contributed"]) == (1, ["a"])


def test_without_names_the_key_alone_tells_contributions_apart(client: httpx.Client) -> None:
    buffered = {"mode": "buffered", "size": 3}
    session = create(client, optimizer=SGD, params={"w": [0.0]}, aggregation=buffered)["id"]

    def post(key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [3.0]}}, headers=headers)

    assert [post("k").json()["received"] for _ in range(3)] == [1, 1, 1]
    assert post(None).json()["received"] == 2
    last = post(None)
    assert (last.status_code, last.json()["params"]) == (200, {"w": [-3.0]})
    again = post("k")
    assert (again.status_code, again.content, replayed(again)) == (200, last.content, True)
    assert client.get(f"/v1/sessions/{session}").json()["step"] == 1
