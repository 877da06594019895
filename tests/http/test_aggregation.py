"""Several workers on one session: what each mode answers, who waits for what, and what is shown meanwhile.

Sessions descend with a rate of 1 from 0, so that the parameters are minus the sum of the gradients of all steps.
"""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpx
import numpy as np
import pytest

from service.data import _wait_preferred
from service.http import prefer
from tests.http.contributions import ACCEPT, post
from tests.http.files import metadata_of
from tests.http.refusals import refused, standing, unchanged
from tests.http.test_events import events
from tests.running import Server
from tests.wire import SAFETENSORS, create, tensors

SYNC: dict[str, Any] = {"mode": "sync", "workers": 2}
JSON = {"Accept": "application/json"}
W = {"params": {"w": [0.0, 0.0]}}


def opened(client: httpx.Client, aggregation: Mapping[str, Any], **members: Any) -> str:
    beside = {} if "shapes" in members else W
    return str(
        create(client, **{"optimizer": {"kind": "sgd", "lr": 1.0}, "aggregation": aggregation, **beside, **members})[
            "id"
        ]
    )


def send(client: httpx.Client, session: str, g: Sequence[float], form: str = "json", **members: Any) -> httpx.Response:
    """A contribution in `form`, the reply in the same unless `headers` say otherwise."""
    headers = (JSON if form == "json" else ACCEPT) | members.pop("headers", {})
    return post(client, session, {"w": np.array(g, np.float64)}, members, form=form, headers=headers)


def told(reply: httpx.Response) -> list[float]:
    """The parameters, or updates, in a reply to a step in either format."""
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"] == "application/json":
        found: list[float] = (reply.json().get("params") or reply.json()["updates"])["w"]
        return found
    return [float(value) for value in tensors(reply)["w"]]


def waits(reply: httpx.Response, round_: int, received: int, needed: int, *, held: bool = True) -> None:
    """202, in JSON whatever was accepted."""
    assert reply.status_code == 202, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"round": round_, "received": received, "needed": needed}
    assert reply.headers["ravine-step"] == str(round_ - 1)
    assert reply.headers["etag"].startswith(f'"{round_ - 1}-')
    path = str(reply.request.url.path).removesuffix("/steps")
    assert reply.headers.get("location") == (f"{path}/params?after={round_ - 1}&wait=30" if held else None)


def point(client: httpx.Client, session: str) -> list[float]:
    found: list[float] = client.get(f"/v1/sessions/{session}/params").json()["params"]["w"]
    return found


def current(client: httpx.Client, session: str) -> dict[str, Any]:
    reply = client.get(f"/v1/sessions/{session}/rounds/current")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def workers(client: httpx.Client, session: str, **query: Any) -> dict[str, Any]:
    reply = client.get(f"/v1/sessions/{session}/workers", params=query)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def moment(text: str) -> float:
    assert text.endswith("Z")
    return datetime.fromisoformat(text).timestamp()


Start = Callable[..., "Future[httpx.Response]"]


@pytest.fixture
def start(server: Server) -> Iterator[Start]:
    """Sends a contribution from a thread and a connection of its own, and returns once it is in the round."""
    with ThreadPoolExecutor(8) as pool, server.client() as other:

        def run(session: str, *arguments: Any, **members: Any) -> "Future[httpx.Response]":
            before = current(other, session)["received"]
            future = pool.submit(send, other, session, *arguments, **members)
            while not future.done() and current(other, session)["received"] == before:
                time.sleep(0.002)
            return future

        yield run


# -- the modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_async(client: httpx.Client, form: str) -> None:
    session = opened(client, {"mode": "async"})
    for t in range(1, 4):
        reply = send(client, session, [1, 2], form, worker=f"w{t % 2}", base_step=t - 1, weight=5)
        assert told(reply) == [-t, -2 * t]
        assert reply.headers["ravine-step"] == str(t)
    assert [worker["contributions"] for worker in workers(client, session)["data"]] == [1, 2]


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("aggregation", [SYNC, {"mode": "buffered", "size": 2}], ids=["sync", "buffered"])
def test_rounds(client: httpx.Client, form: str, aggregation: Mapping[str, Any]) -> None:
    session = opened(client, aggregation)
    for t in (1, 2, 3):
        waits(send(client, session, [1, 6], form, worker="a", weight=3), t, 1, 2)
        reply = send(client, session, [5, 2], form, worker="b", weight=1)
        assert told(reply) == [-2 * t, -5 * t]
        assert reply.headers["content-type"] == {"json": "application/json"}.get(form, "application/vnd.safetensors")
        assert reply.headers["ravine-step"] == str(t)
        assert reply.headers["etag"] == client.get(f"/v1/sessions/{session}").headers["etag"]
        metrics = reply.json()["metrics"] if form == "json" else metadata_of(reply.content)
        assert float(metrics["grad_norm"]) == pytest.approx(29**0.5, rel=1e-6)
        assert float(metrics["lr"]) == 1.0


@pytest.mark.parametrize("payload", ["gradients", "deltas", "params"])
@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_each_payload_in_a_round(client: httpx.Client, form: str, payload: str) -> None:
    session = opened(client, SYNC, params={"w": [1.0, 1.0]})
    for g in ([1.0, 3.0], [3.0, 5.0]):
        sent = {"gradients": g, "deltas": [-x for x in g], "params": [1 - x for x in g]}[payload]
        if form == "json":
            reply = client.post(f"/v1/sessions/{session}/steps", json={payload: {"w": sent}})
        else:
            reply = send(client, session, sent, form, payload=payload)
    assert told(reply) == [-1.0, -3.0]


def test_a_worker_may_fill_a_buffer_alone(client: httpx.Client) -> None:
    session = opened(client, {"mode": "buffered", "size": 4})
    for received in (1, 2):
        waits(send(client, session, [1, 1], worker="a"), 1, received, 4)
    waits(send(client, session, [1, 1]), 1, 3, 4)
    found = current(client, session)
    assert (found["contributed"], found["anonymous"], found["received"]) == (["a"], 1, 3)
    assert told(send(client, session, [1, 1], worker="a")) == [-1, -1]


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_ssp(client: httpx.Client, form: str) -> None:
    session = opened(client, {"mode": "ssp", "bound": 1, "workers": 2})
    assert told(send(client, session, [1, 0], form, worker="a")) == [-1, 0]
    assert told(send(client, session, [1, 0], form, worker="a")) == [-2, 0]
    with unchanged(client, session):
        problem = refused(send(client, session, [1, 0], form, worker="a"), 409, "too-far-ahead")
    assert (problem["clock"], problem["slowest"], problem["bound"]) == (2, 0, 1)
    assert told(send(client, session, [0, 1], form, worker="b")) == [-2, -1]
    assert told(send(client, session, [1, 0], form, worker="a")) == [-3, -1]
    assert [(worker["worker"], worker["clock"]) for worker in workers(client, session)["data"]] == [("a", 3), ("b", 1)]


def test_who_is_ahead_may_wait_for_its_turn(client: httpx.Client, server: Server) -> None:
    session = opened(client, {"mode": "ssp", "bound": 0, "workers": 2})
    told(send(client, session, [1, 0], worker="a"))
    refused(send(client, session, [1, 0], worker="a", headers={"Prefer": "wait=0.05"}), 409, "too-far-ahead")
    with ThreadPoolExecutor(1) as pool, server.client() as other:
        waiting = pool.submit(send, other, session, [1, 0], worker="a", headers={"Prefer": "wait=30"})
        told(send(client, session, [0, 1], worker="b"))
        assert told(waiting.result()) == [-2, -1]


@pytest.mark.parametrize("quorum", [1, 2])
def test_a_deadline_closes_what_has_its_quorum(client: httpx.Client, quorum: int) -> None:
    session = opened(client, {"mode": "sync", "workers": 3, "quorum": quorum, "timeout": 0.2})
    for worker in "ab"[:quorum]:
        waits(send(client, session, [2, 2], worker=worker), 1, 1 if worker == "a" else 2, 3)
    shown = current(client, session)
    if shown["received"]:  # else it is closed by now
        assert moment(shown["deadline"]) - moment(shown["opened_at"]) == pytest.approx(0.2, abs=1e-5)
    reply = client.get(f"/v1/sessions/{session}/params", params={"after": 0, "wait": 30})
    assert reply.json() == {"step": 1, "params": {"w": [-2.0, -2.0]}}


# -- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize(
    "prefer_", ["wait=30", 'wait="30"', "WAIT=30", "respond-async, wait=30", "wait=61", "wait=1e9"]
)
def test_a_worker_may_wait_for_its_round(client: httpx.Client, start: Start, form: str, prefer_: str) -> None:
    session = opened(client, SYNC)
    waiting = start(session, [2, 4], form, worker="a", headers={"Prefer": prefer_})
    last = send(client, session, [4, 8], form, worker="b")
    reply = waiting.result()
    assert told(reply) == told(last) == [-3, -6]
    assert reply.content == last.content
    assert (reply.headers["etag"], reply.headers["ravine-step"]) == (last.headers["etag"], "1")


@pytest.mark.parametrize(
    "prefer_", ["wait=0", "wait=-1", "wait", "wait=", "wait=soon", "wait=5s", "wait=NaN", "wait=0.05"]
)
def test_who_does_not_is_told_where_to(client: httpx.Client, prefer_: str) -> None:
    session = opened(client, SYNC)
    waits(send(client, session, [2, 4], headers={"Prefer": prefer_}), 1, 1, 2)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("wait=61", 60), ("wait=60", 60), ("wait=1e9", 60), ("wait=0.5", 0.5), ("wait=-3", 0), ("wait=x", 0), ("", 0),
     ("wait=1, wait=2", 1), ("wait=1e999", 0), ("return=minimal;x, wait=7", 7)],
)  # fmt: skip
def test_a_minute_is_the_most(given: str, seconds: float) -> None:
    """Which no test lives to see over HTTP."""
    assert _wait_preferred(prefer(given)) == seconds


def test_the_location_is_where_the_parameters_will_be(client: httpx.Client, server: Server) -> None:
    session = opened(client, SYNC)
    location = send(client, session, [2, 4]).headers["location"]
    with ThreadPoolExecutor(1) as pool, server.client() as other:
        waiting = pool.submit(other.get, location)
        last = send(client, session, [4, 8])
        reply = waiting.result()
    assert reply.json() == {"step": 1, "params": last.json()["params"]}
    assert reply.headers["etag"] == last.headers["etag"]
    assert client.get(location).json() == reply.json()


def test_those_that_wait_hear_of_the_end(client: httpx.Client, start: Start) -> None:
    session = opened(client, {"mode": "sync", "workers": 3})
    waiting = [start(session, [1, 1], worker=name, headers={"Prefer": "wait=30"}) for name in "ab"]
    assert client.delete(f"/v1/sessions/{session}").status_code == 204
    for reply in waiting:
        refused(reply.result(), 404, "session-not-found")


# -- stamps ----------------------------------------------------------------------------------------------------------


def test_the_stamp_of_a_round_holds_for_all_its_workers(client: httpx.Client) -> None:
    session = opened(client, {"mode": "sync", "workers": 3})
    path, checkpoints = f"/v1/sessions/{session}", [client.get(f"/v1/sessions/{session}/state").headers["etag"]]
    for t in range(2):
        etag = client.get(f"{path}/params").headers["etag"]
        for received in (1, 2):
            reply = send(client, session, [3, 3], headers={"If-Match": etag})
            waits(reply, t + 1, received, 3)
            stamps = [client.get(path + at).headers["etag"] for at in ("", "/params")]
            assert {reply.headers["etag"], *stamps} == {etag}
            assert client.get(f"{path}/params", headers={"If-None-Match": etag}).status_code == 304
            state = client.get(f"{path}/state", headers={"If-None-Match": ", ".join(checkpoints)})
            assert state.status_code == 200, "the checkpoint has the contribution"
            checkpoints.append(state.headers["etag"])
            assert client.get(f"{path}/state", headers={"If-None-Match": checkpoints[-1]}).status_code == 304
        last = send(client, session, [3, 3], headers={"If-Match": etag})
        assert told(last) == [-3 * (t + 1)] * 2
        assert last.headers["etag"] != etag
    with unchanged(client, session):
        problem = refused(send(client, session, [3, 3], headers={"If-Match": etag}), 412, "step-conflict")
    assert problem["step"] == 2


@pytest.mark.parametrize("aggregation", [{"mode": "sync", "workers": 3}, {"mode": "buffered", "size": 3}])
def test_a_contribution_to_an_open_round_changes_nothing(client: httpx.Client, aggregation: dict[str, Any]) -> None:
    path = f"/v1/sessions/{opened(client, aggregation)}"
    for step in (1, 2):
        before = client.get(path)
        for received, worker in enumerate("ab", 1):
            waits(send(client, path.rpartition("/")[2], [1, 1], worker=worker), step, received, 3)
            after = client.get(path)
            assert (after.json(), after.headers["etag"]) == (before.json(), before.headers["etag"])
        told(send(client, path.rpartition("/")[2], [1, 1], worker="c"))
        assert client.get(path).json()["updated_at"] > before.json()["updated_at"]


# -- who is there ----------------------------------------------------------------------------------------------------


def test_the_open_round_and_its_workers(client: httpx.Client) -> None:
    session = opened(client, {"mode": "sync", "workers": 3, "quorum": 2, "timeout": 3600})
    path = f"/v1/sessions/{session}"
    empty = {"round": 1, "step": 0, "received": 0, "needed": 3, "quorum": 2, "contributed": [], "anonymous": 0,
             "awaited": [], "opened_at": None, "deadline": None}  # fmt: skip
    assert current(client, session) == empty
    assert workers(client, session) == {"data": [], "has_more": False}
    for worker in "cab":
        send(client, session, [1, 1], worker=worker, base_step=0, weight=2.5)
    send(client, session, [1, 1], worker="b", base_step=0)
    send(client, session, [1, 1])
    found = current(client, session)
    assert (found["round"], found["step"], found["received"]) == (2, 1, 2)
    assert (found["contributed"], found["anonymous"], found["awaited"]) == (["b"], 1, ["a", "c"])
    assert moment(found["deadline"]) - moment(found["opened_at"]) == pytest.approx(3600, abs=1e-5)
    reply = client.get(f"{path}/rounds/current")
    assert (reply.headers["ravine-step"], reply.headers["cache-control"]) == ("1", "no-store")
    shown = workers(client, session)["data"]
    named = ("worker", "contributions", "last_step", "staleness", "weight", "gone")
    assert [tuple(worker[name] for name in named) for worker in shown] == [
        ("a", 1, 1, 0, 2.5, False), ("b", 2, 2, 1, 1.0, False), ("c", 1, 1, 0, 2.5, False)
    ]  # fmt: skip
    assert shown[1]["last_seen"] > shown[0]["last_seen"] > shown[2]["last_seen"]
    for resource in ("rounds/current", "workers"):
        head, got = client.head(f"{path}/{resource}"), client.get(f"{path}/{resource}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
    refused(client.get(f"/v1/sessions/{opened(client, {'mode': 'async'})}/rounds/current"), 404, "no-rounds")


def test_workers_come_in_pages(client: httpx.Client) -> None:
    session = opened(client, {"mode": "sync", "workers": 1})
    names = sorted(f"w{i}" for i in range(23))
    for name in reversed(names):
        send(client, session, [1, 1], worker=name)
    seen: list[str] = []
    for _ in range(5):
        page = workers(client, session, limit=5, **({"after": seen[-1]} if seen else {}))
        seen += [worker["worker"] for worker in page["data"]]
        assert page["has_more"] == (len(seen) < 23)
    assert seen == names
    assert len(workers(client, session)["data"]) == 20
    for limit in ("0", "101", "x"):
        refused(client.get(f"/v1/sessions/{session}/workers?limit={limit}"), 422, "invalid-request")


# -- what is given back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("returns", ["params", "updates", "none", "minimal", None])
def test_each_worker_gets_what_it_asked_for(
    client: httpx.Client, start: Start, returns: str | None, held: bool
) -> None:
    session = opened(client, SYNC, **({"params": {"w": [10.0, 10.0]}} if held else {"shapes": {"w": [2]}}))
    wanted: dict[str, Any] = {"return": returns} if returns not in (None, "minimal") else {}
    header = {"Prefer": "return=minimal, wait=30" if returns == "minimal" else "wait=30"}
    if returns == "params" and not held:
        with unchanged(client, session):
            refused(send(client, session, [2, 4], **wanted), 409, "params-not-held")
        return
    waiting = start(session, [2, 4], worker="a", headers=header, **wanted)
    last = send(client, session, [4, 8], worker="b", headers=header, **wanted)
    given = {"minimal": "none", None: "params" if held else "updates"}.get(returns, returns)
    for reply in (waiting.result(), last):
        assert reply.status_code == 200
        assert set(reply.json()) - {"step", "metrics"} == {given} - {"none"}
        if given == "updates":
            assert told(reply) == [-3, -6]
        if given == "params":
            assert told(reply) == [7, 4]
        assert (reply.headers.get("preference-applied") == "return=minimal") == (returns == "minimal")


def test_workers_of_one_round_may_ask_for_different_things(client: httpx.Client, start: Start) -> None:
    session = opened(client, {"mode": "sync", "workers": 3})
    patience = {"headers": {"Prefer": "wait=30"}}
    waiting = [start(session, [3, 3], worker=r, **patience, **{"return": r}) for r in ("updates", "none")]
    assert told(send(client, session, [3, 3])) == [-3, -3]
    assert told(waiting[0].result()) == [-3, -3]
    assert set(waiting[1].result().json()) == {"step", "metrics"}


def test_a_session_whose_client_holds_the_parameters_has_none_to_wait_for(client: httpx.Client) -> None:
    session = opened(client, SYNC, shapes={"w": [2]})
    waits(send(client, session, [2, 4]), 1, 1, 2, held=False)
    assert told(send(client, session, [4, 8])) == [-3, -6]


# -- what comes in between -------------------------------------------------------------------------------------------


def test_changes_in_mid_round_keep_the_contributions(client: httpx.Client) -> None:
    session = opened(client, {"mode": "sync", "workers": 4})
    path = f"/v1/sessions/{session}"
    etags = [send(client, session, [1, 1], worker="a").headers["etag"]]
    etags.append(client.patch(path, json={"optimizer": {"lr": 0.5}}).headers["etag"])
    waits(send(client, session, [2, 2], worker="b", headers={"If-Match": etags[-1]}), 1, 2, 4)
    etags.append(client.put(f"{path}/params", json={"params": {"w": [100, 200]}}).headers["etag"])
    refused(send(client, session, [2, 2], worker="c", headers={"If-Match": etags[1]}), 412, "step-conflict")
    assert current(client, session)["contributed"] == ["a", "b"]
    assert len(set(etags)) == 3
    others = [client.post(f"{path}/fork").json()["id"]]
    file = client.get(f"{path}/state").content
    others.append(client.post("/v1/sessions", content=file, headers=SAFETENSORS).json()["id"])
    for each in (session, *others):
        assert current(client, each)["contributed"] == ["a", "b"]
        refused(send(client, each, [3, 3], worker="a"), 409, "already-contributed")
        waits(send(client, each, [3, 3], worker="c"), 1, 3, 4)
        assert told(send(client, each, [2, 6], worker="d")) == [99, 198.5]


def test_a_change_that_would_spoil_the_open_round_is_refused(client: httpx.Client) -> None:
    session = opened(client, SYNC, shapes={"w": [2]})
    send(client, session, [1, 1], worker="a")
    with unchanged(client, session):
        decayed = {"transforms": [{"kind": "weight_decay", "weight_decay": 0.1}]}
        problem = refused(client.patch(f"/v1/sessions/{session}", json=decayed), 422, "invalid-request")
        assert [fault["pointer"] for fault in problem["errors"]] == ["/transforms"]
    send(client, session, [1, 1], worker="b")
    assert client.patch(f"/v1/sessions/{session}", json=decayed).status_code == 200


@pytest.mark.parametrize("policy", ["reject", "skip"])
def test_a_gradient_that_is_not_finite_takes_no_place_in_a_round(client: httpx.Client, policy: str) -> None:
    session = opened(client, SYNC, non_finite=policy)
    waits(send(client, session, [2, 2], worker="a"), 1, 1, 2)
    before = current(client, session), workers(client, session)
    bad = send(client, session, [np.nan, 2], "safetensors", worker="b", headers=JSON)
    if policy == "reject":
        refused(bad, 422, "non-finite")
    else:
        assert (bad.status_code, bad.json()["skipped"], bad.json()["step"]) == (200, True, 0)
    assert (current(client, session), workers(client, session)) == before
    assert client.get(f"/v1/sessions/{session}").json()["skipped"] == (policy == "skip")
    assert told(send(client, session, [4, 4], worker="b")) == [-3, -3]


# -- what is told of it ----------------------------------------------------------------------------------------------


def test_events_of_rounds(client: httpx.Client) -> None:
    session = opened(client, {"mode": "sync", "workers": 2})
    with client.stream("GET", f"/v1/sessions/{session}/events") as reply:
        stream = events(reply)
        for t in (1, 2):
            etag = send(client, session, [1, 1]).headers["etag"]
            event = next(stream)
            assert (event.id, event.event) == (str(t - 1), "round")
            assert {"round": t, "received": 1, "needed": 2}.items() <= event.data.items()
            etag = send(client, session, [1, 1]).headers["etag"]
            event = next(stream)
            while event.event == "round":  # the last one may be told of as well, if it is heard of before the step
                assert event.data["received"] == 2
                event = next(stream)
            assert (event.id, event.event, event.data) == (str(t), "step", {"step": t, "etag": etag})


def test_the_history_has_a_line_per_round(client: httpx.Client) -> None:
    session = opened(client, SYNC)
    for loss in (4.0, None):
        for weight in (1, 3):
            members = {} if loss is None else {"loss": loss * weight}
            send(client, session, [3, 4], worker=f"w{weight}", weight=weight, **members)
    path = f"/v1/sessions/{session}/history"
    first, second = client.get(path).json()["data"]
    assert (first["step"], first["loss"], first["grad_norm"], first["worker"]) == (1, (4 + 3 * 12) / 4, 5.0, None)
    assert (second["step"], second["loss"], second["lr"]) == (2, None, 1.0)
    assert "epsilon" not in first
    alone = opened(client, {"mode": "async"})
    send(client, alone, [3, 4], worker="a", loss=2.0)
    assert client.get(f"/v1/sessions/{alone}/history").json()["data"][0]["worker"] == "a"


def test_the_history_of_a_session_with_noise_has_what_it_cost(client: httpx.Client) -> None:
    noise = {"clip_norm": 1.0, "noise_multiplier": 1.5, "seed": 5}
    session = opened(client, SYNC | noise)
    for _ in range(6):
        send(client, session, [3, 4])
    path = f"/v1/sessions/{session}/history"
    spent = [record["epsilon"] for record in client.get(path).json()["data"]]
    assert len(spent) == 3
    assert 0 < spent[0] < spent[1] < spent[2]
    shown = client.get(f"/v1/sessions/{session}").json()
    assert (shown["privacy"]["epsilon"], shown["privacy"]["steps"]) == (spent[-1], 3)
    assert shown["aggregation"]["delta"] == shown["privacy"]["delta"] == 1e-5
    rows = list(csv.DictReader(io.StringIO(client.get(path, headers={"Accept": "text/csv"}).text)))
    assert [float(row["epsilon"]) for row in rows] == spent
    again = opened(client, SYNC | noise)
    for _ in range(6):
        send(client, again, [3, 4])
    assert point(client, again) == point(client, session), "the noise is that of the seed"


def test_a_key_counts_once_in_a_round(client: httpx.Client) -> None:
    session, key = opened(client, SYNC), {"Idempotency-Key": "k"}
    first = send(client, session, [2, 2], worker="a", headers=key)
    before = standing(client, session)
    again = send(client, session, [2, 2], worker="a", headers=key)
    waits(again, 1, 1, 2)
    assert (again.content, again.headers["ravine-replayed"]) == (first.content, "true")
    assert standing(client, session) == before
    assert told(send(client, session, [4, 4], worker="b")) == [-3, -3]
    assert told(send(client, session, [2, 2], worker="a", headers=key)) == [-3, -3]
