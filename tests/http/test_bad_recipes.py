"""Sessions that cannot be: every fault with its pointer."""

from typing import Any

import httpx
import pytest

from tests.http.refusals import pointers, refused, unchanged
from tests.running import Server
from tests.wire import create

SGD: dict[str, Any] = {"optimizer": "sgd", "shapes": {"w": [2]}}


def linear(init: float, end: float) -> dict[str, Any]:
    return {"kind": "linear", "init": init, "end": end, "steps": 10}


def in_products(depth: int) -> dict[str, Any]:
    return {"kind": "product", "parts": [in_products(depth - 1)]} if depth else linear(1, 0)


NEW: list[tuple[dict[str, Any], str]] = [
    # members
    ({"optimiser": "sgd"}, "/optimiser"),
    ({"step": 1}, "/step"),
    ({"id": "ses_1"}, "/id"),
    ({"dtype": "float16"}, "/dtype"),
    ({"dtype": None}, "/dtype"),
    ({"non_finite": "ignore"}, "/non_finite"),
    ({"name": 1}, "/name"),
    ({"name": ""}, "/name"),
    ({"name": "a\nb"}, "/name"),
    ({"name": "x" * 201}, "/name"),
    ({"labels": []}, "/labels"),
    ({"labels": {"a": 1}}, "/labels/a"),
    ({"labels": {"a": "x" * 64}}, "/labels/a"),
    ({"labels": {"a:b": "x"}}, "/labels/a:b"),
    ({"labels": {"": "x"}}, "/labels/"),
    ({"labels": {str(i): "x" for i in range(33)}}, "/labels"),
    ({"transforms": [{"kind": "clip"}]}, "/transforms/0"),
    ({"transforms": "clip"}, "/transforms"),
    ({"aggregation": {"mode": "everybody"}}, "/aggregation/mode"),
    ({"aggregation": {"mode": "async", "x": 1}}, "/aggregation/x"),
    ({"groups": {}}, "/groups"),
    ({"groups": [{"match": "w", "lr": 0.1}] * 257}, "/groups"),
    ({"groups": [{"lr": 0.1}]}, "/groups/0/match"),
    ({"groups": [{"match": "", "lr": 0.1}]}, "/groups/0/match"),
    ({"groups": [{"match": "w", "lr": -1}]}, "/groups/0/lr"),
    ({"groups": [{"match": "w", "beta1": 0.5}]}, "/groups/0/beta1"),
    ({"groups": [{"match": "w", "frozen": 1}]}, "/groups/0/frozen"),
    ({"groups": [{"match": "w"}, {"match": "w", "lr": {"kind": "cosine", "init": 1}}]}, "/groups/1/lr/steps"),
    # kinds and hyperparameters
    ({"optimizer": "sdg"}, "/optimizer/kind"),
    ({"optimizer": ""}, "/optimizer/kind"),
    ({"optimizer": None}, "/optimizer"),
    ({"optimizer": 1}, "/optimizer"),
    ({"optimizer": []}, "/optimizer"),
    ({"optimizer": {}}, "/optimizer/kind"),
    ({"optimizer": {"kind": 1}}, "/optimizer/kind"),
    ({"optimizer": {"kind": "sgd", "momentum": 0.9}}, "/optimizer/momentum"),
    ({"optimizer": {"kind": "sgd", "lr": -0.1}}, "/optimizer/lr"),
    ({"optimizer": {"kind": "adam", "beta1": 1}}, "/optimizer/beta1"),
    ({"optimizer": {"kind": "adam", "beta2": 1.5}}, "/optimizer/beta2"),
    ({"optimizer": {"kind": "adam", "eps": -1e-9}}, "/optimizer/eps"),
    ({"optimizer": {"kind": "adam", "eps_inside": 1}}, "/optimizer/eps_inside"),
    ({"optimizer": {"kind": "momentum", "nesterov": 1}}, "/optimizer/nesterov"),
    ({"optimizer": {"kind": "momentum", "nesterov": True, "dampening": 0.5}}, "/optimizer/dampening"),
    ({"optimizer": {"kind": "adamw", "decay_scaling": "step"}}, "/optimizer/decay_scaling"),
    ({"optimizer": {"kind": "newton", "negative_curvature": "damp"}}, "/optimizer/damping"),
    ({"optimizer": "newton", "shapes": {"w": [4097]}}, "/optimizer"),
    # schedules
    ({"optimizer": {"kind": "sgd", "lr": {"kind": "cosin", "init": 1, "steps": 1}}}, "/optimizer/lr/kind"),
    ({"optimizer": {"kind": "sgd", "lr": {"init": 1, "steps": 1}}}, "/optimizer/lr/kind"),
    ({"optimizer": {"kind": "sgd", "lr": {"kind": "cosine", "init": 1, "steps": 0}}}, "/optimizer/lr/steps"),
    ({"optimizer": {"kind": "sgd", "lr": {"kind": "cosine", "init": 1, "steps": 1, "x": 1}}}, "/optimizer/lr/x"),
    ({"optimizer": {"kind": "sgd", "lr": {"kind": "exponential", "init": 1, "rate": 0}}}, "/optimizer/lr/rate"),
    ({"optimizer": {"kind": "sgd", "lr": linear(1, -1)}}, "/optimizer/lr"),
    ({"optimizer": {"kind": "adam", "beta1": linear(0.9, 1.0)}}, "/optimizer/beta1"),
    ({"optimizer": {"kind": "adam", "beta1": {"kind": "exponential", "init": 0.5, "rate": 1.1}}}, "/optimizer/beta1"),
    ({"optimizer": {"kind": "adagrad", "initial_accumulator": linear(0, 1)}}, "/optimizer/initial_accumulator"),
    (
        {"optimizer": {"kind": "sgd", "lr": {"kind": "sequence", "parts": [linear(1, 0)], "boundaries": [5]}}},
        "/optimizer/lr/boundaries",
    ),
    (
        {
            "optimizer": {
                "kind": "sgd",
                "lr": {"kind": "product", "parts": [linear(1, 0), {"kind": "cosine", "init": 1}]},
            }
        },
        "/optimizer/lr/parts/1/steps",
    ),
    ({"optimizer": {"kind": "sgd", "lr": in_products(9)}}, "/optimizer/lr" + "/parts/0" * 8),
    ({"optimizer": {"kind": "sgd", "lr": in_products(25)}}, "/optimizer/lr" + "/parts/0" * 8),
    ({"optimizer": {"kind": "sgd", "lr": {"kind": "product", "parts": [linear(1, 0)] * 65}}}, "/optimizer/lr/parts"),
    (
        {"optimizer": {"kind": "sgd", "lr": {"kind": "product", "parts": [{"kind": "plateau", "init": 1}]}}},
        "/optimizer/lr/parts/0/kind",
    ),
    (
        {"optimizer": {"kind": "sgd", "lr": {"kind": "multi_step", "init": 1, "milestones": [2, 1]}}},
        "/optimizer/lr/milestones",
    ),
    (
        {"optimizer": {"kind": "sgd", "lr": {"kind": "multi_step", "init": 1, "milestones": [1] * 10_001}}},
        "/optimizer/lr/milestones",
    ),
    (
        {"optimizer": {"kind": "sgd", "lr": {"kind": "piecewise_linear", "steps": [0, 1.5], "values": [1, 0]}}},
        "/optimizer/lr/steps/1",
    ),
    (
        {"groups": [{"match": "w", "lr": {"kind": "product", "parts": [{"kind": "constant", "value": "1"}]}}]},
        "/groups/0/lr/parts/0/value",
    ),
    # averaging
    ({"averaging": "mean"}, "/averaging/kind"),
    ({"averaging": {"kind": "ema", "decay": 1}}, "/averaging/decay"),
    ({"averaging": {"kind": "ema", "decay": linear(0, 0.5)}}, "/averaging/decay"),
    ({"averaging": {"kind": "ema", "start": "last"}}, "/averaging/start"),
    ({"averaging": {"kind": "polyak", "start": -1}}, "/averaging/start"),
    # shapes
    ({"shapes": {}}, "/shapes"),
    ({"shapes": []}, "/shapes"),
    ({"shapes": {"w": 2}}, "/shapes/w"),
    ({"shapes": {"w": [-1]}}, "/shapes/w/0"),
    ({"shapes": {"w": [1] * 9}}, "/shapes/w"),
    ({"shapes": {"w": [2**48 + 1]}}, "/shapes/w/0"),
    ({"shapes": {"w": [2**24 + 1, 2**24]}}, "/shapes/w"),
    ({"shapes": {"w": [0, 2**48, 2**48]}}, "/shapes/w"),
    ({"shapes": {"w": [2**32, 2**32]}}, "/shapes/w"),
    ({"shapes": {"w": [2**44]}}, "/shapes"),
    ({"shapes": {"w": [2**47], "v": [2**47], "u": [1]}}, "/shapes"),
    ({"shapes": {f"w{i}": [1] for i in range(10_001)}}, "/shapes"),
    ({"optimizer": "adam", "shapes": {str(i).ljust(255, "x"): [1] for i in range(2000)}}, "/shapes"),
    ({"optimizer": "adam", "shapes": {f"w{i}": [] for i in range(3334)}}, "/shapes"),
    ({"shapes": {"w:m": [1]}}, "/shapes/w:m"),
    ({"shapes": {"": [1]}}, "/shapes/"),
    ({"shapes": {"x" * 256: [1]}}, "/shapes/" + "x" * 256),
    ({"shapes": {"a\tb": [1]}}, "/shapes/a\tb"),
    ({"shapes": {"a/~": [-1]}}, "/shapes/a~1~0/0"),
    ({"shapes": {"__metadata__": [1]}}, "/shapes/__metadata__"),
]


@pytest.mark.parametrize(("change", "place"), NEW, ids=[f"{i}{place[:30]}" for i, (_, place) in enumerate(NEW)])
def test_a_session_that_cannot_be(client: httpx.Client, change: dict[str, Any], place: str) -> None:
    found = refused(client.post("/v1/sessions", json=SGD | change), 422, "invalid-request")
    assert pointers(found) == {place}


@pytest.mark.parametrize(
    ("params", "place"),
    [
        ({}, "/params"),
        ([], "/params"),
        ({"w": None}, "/params/w"),
        ({"w": "1"}, "/params/w"),
        ({"w": {"indices": [0], "values": [1]}}, "/params/w"),
        ({"w": [[1], [2, 3]]}, "/params/w/1"),
        ({"w": [[[[[[[[[1.0]]]]]]]]]}, "/params/w"),
        ({"w:m": 1}, "/params/w:m"),
        ({"w": 1, "": 1}, "/params/"),
    ],
)
def test_parameters_that_cannot_be(client: httpx.Client, params: Any, place: str) -> None:
    found = refused(client.post("/v1/sessions", json={"optimizer": "sgd", "params": params}), 422, "invalid-request")
    assert pointers(found) == {place}


def test_a_parameter_beyond_the_dtype(client: httpx.Client) -> None:
    body = {"optimizer": "sgd", "params": {"v": [1.0], "w": [1e300]}}
    assert refused(client.post("/v1/sessions", json=body), 422, "non-finite")["tensor"] == "w"
    assert client.post("/v1/sessions", json=body | {"dtype": "float64"}).status_code == 201


@pytest.mark.parametrize("body", [{"optimizer": "sgd"}, SGD | {"params": {"w": [1.0, 2.0]}}])
def test_exactly_one_of_params_and_shapes(client: httpx.Client, body: dict[str, Any]) -> None:
    found = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert "params" in found["detail"]
    assert "shapes" in found["detail"]


def test_all_faults_are_told_at_once(client: httpx.Client) -> None:
    body = {"optimizer": {"kind": "adam", "beta1": 2}, "shapes": {"w": [-1]}, "dtype": "int", "x": 1, "name": ""}
    found = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert pointers(found) == {"/optimizer/beta1", "/shapes/w/0", "/dtype", "/x", "/name"}


def test_a_thousand_faults_are_not_told(client: httpx.Client) -> None:
    body = SGD | {f"member {i}": 1 for i in range(1000)}
    found = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert 1 <= len(found["errors"]) <= 64


def test_what_is_refused_makes_no_session(client: httpx.Client) -> None:
    newest = client.get("/v1/sessions?limit=1").json()["data"]
    for change, _ in NEW[:10]:
        client.post("/v1/sessions", json=SGD | {"labels": {"never": "made"}} | change)
    assert client.get("/v1/sessions?limit=1").json()["data"] == newest
    assert client.get("/v1/sessions?label=never:made").json()["data"] == []


# -- changes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    with server.client() as client:
        members = {"optimizer": "adam", "params": {"w": [1.0], "b": [2.0]}, "labels": {"a": "b"}}
        made: str = create(client, **members)["id"]
        assert client.post(f"/v1/sessions/{made}/steps", json={"gradients": {"w": [1], "b": [1]}}).status_code == 200
    return made


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"what": 1}, "/what"),
        ({"step": 0}, "/step"),
        ({"shapes": {"w": [2]}}, "/shapes"),
        ({"params": {"w": [2]}}, "/params"),
        ({"dtype": "float64"}, "/dtype"),
        ({"averaging": "ema"}, "/averaging"),
        ({"non_finite": "skip"}, "/non_finite"),
        ({"id": "ses_x"}, "/id"),
        ({"name": ""}, "/name"),
        ({"name": 5}, "/name"),
        ({"labels": {"a:b": "c"}}, "/labels/a:b"),
        ({"labels": None}, "/labels"),
        ({"optimizer": "sgd"}, "/optimizer/kind"),
        ({"optimizer": {"kind": "adamw"}}, "/optimizer/kind"),
        ({"optimizer": {"kind": None}}, "/optimizer/kind"),
        ({"optimizer": {"beta1": 1}}, "/optimizer/beta1"),
        ({"optimizer": {"momentum": 0.9}}, "/optimizer/momentum"),
        ({"optimizer": {"lr": None}}, "/optimizer/lr"),
        ({"optimizer": {"lr": linear(0.1, -0.1)}}, "/optimizer/lr"),
        ({"optimizer": {"lr": {"kind": "step"}}}, "/optimizer/lr/init"),
        ({"optimizer": None}, "/optimizer"),
        ({"groups": [{"match": "w", "momentum": 0.9}]}, "/groups/0/momentum"),
        ({"groups": [{"match": "w", "lr": -1}]}, "/groups/0/lr"),
        ({"groups": [{"match": "w"}] * 257}, "/groups"),
        ({"transforms": [{"kind": "clip"}]}, "/transforms/0"),
    ],
)
def test_a_change_that_cannot_be(client: httpx.Client, session: str, change: dict[str, Any], place: str) -> None:
    with unchanged(client, session):
        found = refused(client.patch(f"/v1/sessions/{session}", json={"name": "new"} | change), 422, "invalid-request")
    assert place in pointers(found)
    assert all(at.startswith(place.rpartition("/")[0]) for at in pointers(found)), found
