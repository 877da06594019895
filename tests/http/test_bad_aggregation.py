"""Aggregations that cannot be, and contributions that are not taken in: told what is wrong, and without a trace."""

from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest

from tests.http.contributions import post
from tests.http.files import saved, with_metadata
from tests.http.refusals import pointers, refused, standing
from tests.http.test_aggregation import send
from tests.running import serving
from tests.wire import SAFETENSORS, create

SYNC = {"mode": "sync", "workers": 7}
BUFFERED = {"mode": "buffered", "size": 7}
NOISE = {"clip_norm": 1.0, "noise_multiplier": 1.0}
NAN = 2**53  # what JSON has in the place of numbers that are none: an integer that its readers disagree on


def reduces(kind: str, **members: Any) -> dict[str, Any]:
    return {"reduce": {"kind": kind, **members}}


# what, and where the fault is
BAD: list[tuple[Any, str]] = [
    *((value, "") for value in (None, [], "sync", 1, True)),
    ({"mode": "everybody"}, "/mode"),
    ({"mode": None}, "/mode"),
    ({"mode": 1}, "/mode"),
    ({"mode": "sync", "workers": 2, "x": 1}, "/x"),
    ({"Mode": "sync"}, "/Mode"),
    # what a mode needs, and what is another's
    ({"mode": "sync"}, "/workers"),
    ({"mode": "buffered"}, "/size"),
    ({"mode": "ssp"}, "/bound"),
    ({"workers": 2}, "/workers"),
    *(({"mode": "async", **more}, f"/{next(iter(more))}") for more in ({"timeout": 1}, {"size": 2}, {"bound": 1})),
    *((SYNC | more, f"/{next(iter(more))}") for more in ({"size": 2}, {"bound": 1})),
    *((BUFFERED | more, f"/{next(iter(more))}") for more in ({"workers": 2}, {"timeout": 1}, {"bound": 1})),
    *(({"mode": "ssp", "bound": 1, **more}, f"/{next(iter(more))}") for more in ({"timeout": 1}, {"size": 2})),
    *((({"mode": "async"}, BUFFERED, {"mode": "ssp", "bound": 1})[i] | {"quorum": 1, "timeout": 1}, "/quorum")
      for i in range(3)),
    # quorum
    (SYNC | {"quorum": 8, "timeout": 1}, "/quorum"),
    (SYNC | {"quorum": 2}, "/quorum"),
    (SYNC | {"quorum": 0, "timeout": 1}, "/quorum"),
    # numbers
    *((SYNC | {"workers": value}, "/workers") for value in (0, -1, 4097, 2.0, 1.5, True, "2", [2], NAN)),
    *((BUFFERED | {"size": value}, "/size") for value in (0, 4097, 2.0, True, "2")),
    *(({"mode": "ssp", "bound": value}, "/bound") for value in (-1, 1_000_001, 0.5, True, "1")),
    *((SYNC | {"timeout": value}, "/timeout") for value in (0, -1, 31_536_001, True, "1", NAN)),
    *(({"worker_timeout": value}, "/worker_timeout") for value in (0, -1, None, True, "60")),
    *(({"max_staleness": value}, "/max_staleness") for value in (-1, 1.0, True, "1", NAN)),
    *(({"clip_norm": value}, "/clip_norm") for value in (0, -1, True, "1", NAN)),
    # kinds, by name and as objects
    *(({"reduce": value}, "/reduce/kind") for value in ("average", "", {}, {"kind": 1}, {"kind": "meann"})),
    *(({"reduce": value}, "/reduce") for value in (None, 1, [], True)),
    ({"reduce": {"kind": "mean", "fraction": 0.1}}, "/reduce/fraction"),
    *((SYNC | reduces("trimmed_mean", fraction=value), "/reduce/fraction") for value in (0.5, -0.1, 1, True, "0.1")),
    *((SYNC | reduces("krum", byzantine=value), "/reduce/byzantine") for value in (-1, 1.0, True, "1")),
    (SYNC | reduces("multi_krum", byzantine=1, select=0), "/reduce/select"),
    *(({"staleness": value}, "/staleness/kind") for value in ("old", {"kind": "linear"}, {"a": 1})),
    *(({"staleness": {"kind": "polynomial", "a": value}}, "/staleness/a") for value in (-1, True, "1", None)),
    *(({"staleness": {"kind": "hinge", name: -1}}, f"/staleness/{name}") for name in "ab"),
    ({"staleness": {"kind": "inverse", "a": 1}}, "/staleness/a"),
    # reducers that need more contributions than there may be
    *((SYNC | {"workers": least - 1} | reduces(kind, **members), "/reduce") for kind, members, least in (
        ("krum", {"byzantine": 1}, 5), ("multi_krum", {"byzantine": 2}, 7), ("bulyan", {"byzantine": 1}, 7),
    )),
    (SYNC | {"quorum": 4, "timeout": 1} | reduces("krum", byzantine=1), "/reduce"),
    (SYNC | {"timeout": 1} | reduces("krum", byzantine=1), "/reduce"),
    (BUFFERED | {"size": 4} | reduces("krum", byzantine=1), "/reduce"),
    *((mode | {"reduce": "median"}, "/reduce") for mode in ({"mode": "async"}, {"mode": "ssp", "bound": 1})),
    *((SYNC | {"workers": 1025, "reduce": kind}, "/reduce") for kind in ("median", "krum")),
    # noise
    (SYNC | {"noise_multiplier": 1}, "/noise_multiplier"),
    *((SYNC | NOISE | {"reduce": kind}, "/noise_multiplier") for kind in ("median", "geometric_median", "krum")),
    *((SYNC | NOISE | {"noise_multiplier": value}, "/noise_multiplier") for value in (0, -1, True, "1")),
    *((SYNC | NOISE | {"seed": value}, "/seed") for value in (-1, 1.0, True, "1", NAN)),
    *((SYNC | NOISE | {"delta": value}, "/delta") for value in (0, 1, -1, True, "1", None)),
    *((SYNC | NOISE | {"sampling_rate": value}, "/sampling_rate") for value in (0, 1.1, -1, True, "1", None)),
    *((SYNC | {name: 0.5 if name != "seed" else 5}, f"/{name}") for name in ("seed", "delta", "sampling_rate")),
    # delays
    *((mode | {"delay_compensation": {}}, "/delay_compensation") for mode in (SYNC, BUFFERED)),
    *(({"delay_compensation": value}, "/delay_compensation") for value in (True, 0.04, [], "adaptive")),
    *(({"delay_compensation": {"lambda": value}}, "/delay_compensation/lambda") for value in (-1, True, "1", None)),
    *(({"delay_compensation": {"decay": value}}, "/delay_compensation/decay") for value in (1, -0.1)),
    *(({"delay_compensation": {"adaptive": value}}, "/delay_compensation/adaptive") for value in (1, "true", None)),
    ({"delay_compensation": {"lambda_": 1}}, "/delay_compensation/lambda_"),
    ({"mode": "async"} | NOISE | {"delay_compensation": {"adaptive": True}}, "/delay_compensation/adaptive"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD)))
def test_an_aggregation_that_cannot_be(client: httpx.Client, index: int) -> None:
    aggregation, place = BAD[index]
    body = {"optimizer": "sgd", "shapes": {"w": [2]}, "aggregation": aggregation}
    found = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert pointers(found) == {f"/aggregation{place}"}, (aggregation, found["errors"])


@pytest.mark.parametrize(
    "aggregation",
    [
        {}, {"mode": "async"}, SYNC, BUFFERED, {"mode": "ssp", "bound": 0}, {"mode": "ssp", "bound": 1, "workers": 2},
        SYNC | {"timeout": 1}, SYNC | {"quorum": 7, "timeout": 0.5}, SYNC | reduces("bulyan", byzantine=1),
        SYNC | reduces("trimmed_mean", fraction=0.49), {"reduce": "sum"}, {"staleness": "hinge", "max_staleness": 0},
        SYNC | NOISE, {"mode": "async"} | NOISE | {"seed": 5, "delta": 0.1, "sampling_rate": 1},
        {"workers": 3, "delay_compensation": {"lambda": 0, "adaptive": True}}, {"mode": "async", "workers": None},
    ],
)  # fmt: skip
def test_what_is_near_it_can_be(client: httpx.Client, aggregation: dict[str, Any]) -> None:
    """And what is shown of it makes the same session again."""
    shown = create(client, optimizer="sgd", shapes={"w": [2]}, aggregation=aggregation)["aggregation"]
    given = {
        name: value for name, value in aggregation.items() if not isinstance(value, str | dict) and value is not None
    }
    assert given.items() <= shown.items()
    assert create(client, optimizer="sgd", shapes={"w": [2]}, aggregation=shown)["aggregation"] == shown


@pytest.mark.parametrize("kind", ["newton", "sophia"])
@pytest.mark.parametrize(
    ("members", "place"), [({"reduce": "median"}, "reduce"), (NOISE, "noise_multiplier")], ids=["median", "noise"]
)
def test_nothing_robust_or_private_is_made_of_hessians(
    client: httpx.Client, kind: str, members: dict[str, Any], place: str
) -> None:
    body = {"optimizer": kind, "shapes": {"w": [2]}, "aggregation": SYNC | members}
    found = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert pointers(found) == {f"/aggregation/{place}"}


def test_it_cannot_change(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", shapes={"w": [2]}, aggregation=SYNC)["id"]
    before = client.get(f"/v1/sessions/{session}").json()
    for aggregation in ({"mode": "async"}, SYNC, {}, None):
        reply = client.patch(f"/v1/sessions/{session}", json={"name": "x", "aggregation": aggregation})
        assert pointers(refused(reply, 422, "invalid-request")) == {"/aggregation"}
    assert client.get(f"/v1/sessions/{session}").json() == before


def test_what_it_keeps_counts_as_state(data: Any) -> None:
    """1,000 float32 are 4,000 bytes: the parameters, and what rounds and backups keep of as many."""
    many = {"optimizer": "sgd", "shapes": {"w": [1000]}}
    cases: list[tuple[dict[str, Any], int]] = [
        (SYNC, 2), (SYNC | {"reduce": "median"}, 8), (SYNC | {"reduce": "median", "workers": 10}, 11),
        (BUFFERED | {"reduce": "median"}, 8), ({"delay_compensation": {}, "workers": 9}, 10),
        ({"delay_compensation": {}}, 65), ({"delay_compensation": {"adaptive": True}, "workers": 9}, 11),
    ]  # fmt: skip
    with serving(data, environment={"RAVINE_MAX_STATE": "40000"}) as server, server.client() as client:
        for aggregation, vectors in cases:
            reply = client.post("/v1/sessions", json=many | {"aggregation": aggregation})
            if vectors <= 10:
                assert reply.status_code == 201, reply.text
            else:
                problem = refused(reply, 422, "invalid-request")
                assert pointers(problem) == {"/shapes"}
                assert str(4000 * vectors) in problem["errors"][0]["detail"]


# -- contributions ---------------------------------------------------------------------------------------------------

G = [1.0, 2.0]
THREE = {"mode": "sync", "workers": 3}
FRESH = THREE | {"max_staleness": 0}
DELAYED = {"mode": "async", "delay_compensation": {}}
SSP = {"mode": "ssp", "bound": 0, "workers": 2}
MEDIAN = THREE | {"reduce": "median"}
HELD = {"params": {"w": [0.0, 0.0]}}
AWAY = {"shapes": {"w": [2]}}
TWO = {"params": {"w": [0.0, 0.0], "b": [0.0]}}

# name: the session, what came before, the contribution, its refusal and what that tells
Refusal = tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], int, str, dict[str, Any]]
REFUSALS: dict[str, Refusal] = {
    "stale": (
        FRESH, [{"base_step": 0}] * 3 + [{"base_step": 1}], {"base_step": 0}, 409, "stale-gradient",
        {"step": 1, "staleness": 1, "max_staleness": 0},
    ),
    "stale, alone": (
        {"max_staleness": 1}, [{"base_step": 0}] * 2, {"base_step": 0}, 409, "stale-gradient",
        {"step": 2, "staleness": 2, "max_staleness": 1},
    ),
    "ahead": (THREE, [{}], {"base_step": 1}, 409, "base-step-ahead", {"step": 0}),
    "ahead, alone": ({}, [{}], {"base_step": 2, "worker": "a"}, 409, "base-step-ahead", {"step": 1}),
    "no base step": (FRESH, [{"base_step": 0}], {"worker": "b"}, 422, "base-step-required", {}),
    "no base step, scaled": ({"staleness": "inverse"}, [{"base_step": 0}], {}, 422, "base-step-required", {}),
    "nobody": (SSP, [{"worker": "a"}], {}, 422, "worker-required", {}),
    "nobody, delayed": (DELAYED, [{"worker": "a"}], {}, 422, "worker-required", {}),
    "twice": (THREE, [{"worker": "a"}], {"worker": "a"}, 409, "already-contributed", {"round": 1, "worker": "a"}),
    "too far": (
        SSP, [{"worker": "a"}], {"worker": "a"}, 409, "too-far-ahead", {"clock": 1, "slowest": 0, "bound": 0},
    ),
    "not pulled": (
        DELAYED, [{"worker": "a"}, {"worker": "b"}], {"worker": "a", "base_step": 2}, 409, "not-pulled", {"step": 1},
    ),
    "weighed under noise": (THREE | NOISE, [{}], {"weight": 2}, 422, "not-reducible", {}),
    "partial under noise": (THREE | NOISE, [{}], {"partial": True}, 422, "not-reducible", {}),
    "partial under a median": (MEDIAN, [{}], {"partial": True}, 422, "not-reducible", {}),
}  # fmt: skip


def seen(client: httpx.Client, session: str) -> dict[str, Any]:
    """All that can be seen of a session that several work on."""
    found = standing(client, session)
    for resource in ("workers", "rounds/current"):
        reply = client.get(f"/v1/sessions/{session}/{resource}")
        found[resource] = (reply.json(), reply.headers.get("etag"))
    return found


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_contribution_that_is_refused_changes_nothing(client: httpx.Client, name: str, form: str) -> None:
    aggregation, before, contribution, status, slug, members = REFUSALS[name]
    partial = "partial" in contribution
    session = create(client, optimizer="adam", aggregation=aggregation, **(TWO if partial else HELD))["id"]
    for sent in before:
        tensors = {"w": np.array(G)} | ({"b": np.ones(1)} if partial else {})
        assert post(client, session, tensors, sent, form=form).status_code in (200, 202)
    found = seen(client, session)
    reply = send(client, session, G, form, **contribution)
    problem = refused(reply, status, slug)
    assert {member: problem[member] for member in members} == members
    assert ("retry-after" in reply.headers) == (slug == "too-far-ahead")
    if slug == "too-far-ahead":
        assert int(reply.headers["retry-after"]) >= 1
    assert seen(client, session) == found


# what is wrong with the form of a contribution: JSON body and query say the same
FORMS: list[tuple[dict[str, Any], str]] = [
    *(({"weight": value}, "weight") for value in (0, -1, 1.1e12, True, "2")),
    *(({"base_step": value}, "base_step") for value in (-1, 1.5, 2**53, True, "1")),
    *(({"worker": value}, "worker") for value in ("", "a b", "x" * 65, "ä", "a:b", 1, None)),
    ({"workers": "a"}, "workers"),
]


@pytest.fixture(scope="module")
def open_session(client: httpx.Client) -> str:
    made: str = create(client, optimizer="adam", aggregation=THREE, **HELD)["id"]
    assert send(client, made, G, worker="a", weight=1e12, base_step=0).status_code == 202
    return made


@pytest.mark.parametrize(("members", "place"), FORMS)
def test_members_that_cannot_be(client: httpx.Client, open_session: str, members: dict[str, Any], place: str) -> None:
    before, path = seen(client, open_session), f"/v1/sessions/{open_session}/steps"
    problem = refused(client.post(path, json={"gradients": {"w": G}} | members), 422, "invalid-request")
    assert f"/{place}" in pointers(problem)
    if all(isinstance(value, str | float) or type(value) is int for value in members.values()):
        if members in ({"weight": "2"}, {"base_step": "1"}, {"worker": 1}):
            return  # in a query all is text
        reply = client.post(path, content=saved({"w": np.array(G)}), headers=SAFETENSORS, params=members)
        assert pointers(refused(reply, 422, "invalid-request")) == {f"/query/{place}"}
    assert seen(client, open_session) == before


BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "invalid-request", "/gradients"),
    ({"gradients": {"w": G}, "deltas": {"w": G}}, "invalid-request", "/deltas"),
    ({"deltas": {"w": G}, "payload": "deltas"}, "invalid-request", "/payload"),
    ({"deltas": [1]}, "invalid-request", "/deltas"),
    ({"deltas": {"w": [1, "2"]}}, "invalid-request", "/deltas/w/1"),
    ({"params": {"w": {"indices": [0], "values": [1]}}}, "invalid-request", "/params/w"),
    ({"gradients": {"w": G}, "params": {"w": G}}, "params-held", ""),
    ({"deltas": {"x": G}}, "unknown-tensor", ""),
    ({"deltas": {"w": [1]}}, "shape-mismatch", ""),
    ({"deltas": {"w": [1e39, 0]}}, "non-finite", ""),
    ({"params": {"w": [1e39, 0]}}, "non-finite", ""),
    ({"params": {}}, "missing-gradient", ""),
]


@pytest.mark.parametrize(("body", "slug", "place"), BODIES)
def test_payloads_that_cannot_be(
    client: httpx.Client, open_session: str, body: Mapping[str, Any], slug: str, place: str
) -> None:
    before = seen(client, open_session)
    problem = refused(client.post(f"/v1/sessions/{open_session}/steps", json=body), 422, slug)
    if place:
        assert any(pointer.startswith(place) for pointer in pointers(problem)), problem
    assert seen(client, open_session) == before


@pytest.mark.parametrize("payload", ["gradients", "deltas", "params"])
@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(client: httpx.Client, open_session: str, payload: str, worst: float) -> None:
    before = seen(client, open_session)
    reply = send(client, open_session, [1.0, worst], "safetensors", payload=payload)
    assert refused(reply, 422, "non-finite")["tensor"] == "w"
    assert seen(client, open_session) == before


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("aggregation", [{}, THREE, MEDIAN])
def test_models_for_a_session_that_holds_none(client: httpx.Client, aggregation: dict[str, Any], form: str) -> None:
    session = create(client, optimizer="adam", aggregation=aggregation, **AWAY)["id"]
    before = seen(client, session)
    path = f"/v1/sessions/{session}/steps"
    if form == "json":
        reply = client.post(path, json={"params": {"w": G}})
    else:
        reply = client.post(path, content=saved({"w": np.array(G)}), headers=SAFETENSORS, params={"payload": "params"})
    refused(reply, 409, "params-not-held")
    assert seen(client, session) == before


def test_a_delay_is_compensated_where_there_are_parameters(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", aggregation=DELAYED, **AWAY)["id"]
    before = seen(client, session)
    refused(send(client, session, G, worker="a"), 422, "params-required")
    refused(client.get(f"/v1/sessions/{session}/params?worker=a"), 409, "params-not-held")
    assert seen(client, session) == before


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_a_model_has_no_delay(client: httpx.Client, form: str) -> None:
    """It is compared with the parameters of now, by which whatever others did meanwhile would be undone."""
    session = create(client, optimizer="sgd", aggregation=DELAYED, **HELD)["id"]
    for worker in "ab":
        assert send(client, session, G, worker=worker).status_code == 200
    before = seen(client, session)
    path = f"/v1/sessions/{session}/steps"
    if form == "json":
        reply = client.post(path, json={"params": {"w": G}, "worker": "a"})
    else:
        reply = send(client, session, G, "safetensors", payload="params", worker="a", headers={"Accept": "*/*"})
    refused(reply, 422, "not-reducible")
    assert seen(client, session) == before


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("kind", ["median", "geometric_median"])
def test_nobody_tells_the_others_where_the_parameters_are(client: httpx.Client, kind: str, form: str) -> None:
    """Parameters that came with a gradient cannot be compared, and one liar's would be everybody's."""
    body = {"optimizer": "adamw", "aggregation": THREE | {"reduce": kind}}
    session, tensors = create(client, **body, **AWAY)["id"], {"w": np.array(G), "w:params": np.ones(2)}
    before = seen(client, session)
    refused(post(client, session, tensors, {"worker": "a"}, form=form), 422, "not-reducible")
    assert seen(client, session) == before
    # Once the session holds them nobody is asked.
    assert client.put(f"/v1/sessions/{session}/params", json=HELD).status_code == 200
    assert send(client, session, G, form, worker="a").status_code == 202


@pytest.mark.parametrize("weight", [1, 1e12])
@pytest.mark.parametrize("worst", [1e300, -1e300])
def test_no_single_loss_moves_a_step_of_a_median(client: httpx.Client, worst: float, weight: float) -> None:
    sent = [([1.0, 1.0], 3.0, 1.0), ([1.0, 2.0], 5.0, 1.0)]
    rounds: list[tuple[Any, Any]] = []
    for loss, weight_ in ((worst, weight), (4.0 + np.sign(worst), 1.0)):
        session = create(client, optimizer="polyak_sgd", aggregation=MEDIAN, **HELD)["id"]
        for gradient, told_, weighs in [*sent, ([2.0, 1.0], loss, weight_)]:
            reply = send(client, session, gradient, loss=told_, weight=weighs)
        (record,) = client.get(f"/v1/sessions/{session}/history").json()["data"]
        rounds.append((record["loss"], reply.json()["params"]))
    assert rounds[0] == rounds[1]
    assert rounds[0][0] == (5.0 if worst > 0 else 3.0)


# -- checkpoints that lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workers",
    [
        None, "", "[]", "1", "{", '{"ledger":[]}', '{"ledger":{"received":4}}', '{"ledger":{"received":1e400}}',
        '{"ledger":{"received":1,"opened_at":1e300},"round":{"weights":{"w":1}}}',
        '{"ledger":{"received":1,"opened_at":"nan"},"round":{"weights":{"w":1}}}',
        '{"ledger":{"received":1},"round":{"weights":{"w":0}}}',
        '{"ledger":{"received":1},"round":{"weights":{"x":1}}}',
        '{"ledger":{"received":1},"round":{"weights":{"w":1},"loss":1}}',
        '{"ledger":{"received":1,"workers":{"a":[1,1e300,1,0,1,1,null]}},"round":{"weights":{"w":1}}}',
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_about_its_round(client: httpx.Client, open_session: str, workers: str | None) -> None:
    path = "/v1/sessions"
    file = client.get(f"{path}/{open_session}/state").content
    good = client.post(path, content=file, headers=SAFETENSORS)
    assert good.status_code == 201, good.text
    shown = client.get(f"{path}/{good.json()['id']}/rounds/current").json()
    assert shown == client.get(f"{path}/{open_session}/rounds/current").json()
    refused(
        client.post(path, content=with_metadata(file, workers=workers), headers=SAFETENSORS), 422, "invalid-checkpoint"
    )


def test_the_round_goes_on_after_all_that(client: httpx.Client, open_session: str) -> None:
    assert send(client, open_session, G, worker="b", weight=1e12).status_code == 202
    reply = send(client, open_session, G, worker="c", weight=1e12)
    assert reply.status_code == 200, reply.text
    assert client.get(f"/v1/sessions/{open_session}/rounds/current").json()["round"] == 2
