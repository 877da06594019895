"""Methods that say where the next gradient is to be taken, and methods around another method."""

from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from core.optimizers import KINDS
from tests.http.refusals import pointers, refused, unchanged
from tests.wire import SAFETENSORS, create, params

Json = dict[str, Any]
Array = np.ndarray

# The loss ½ (x - c)ᵀ A (x - c) over x = (w, b), which is 0 at c and nowhere else.
CURVATURE = np.array([[3.0, 0.5, 0.0], [0.5, 2.0, -0.4], [0.0, -0.4, 1.0]])
LOWEST = np.array([1.0, -2.0, 0.5])


def loss_at(x: Array) -> tuple[float, Array]:
    away = x - LOWEST
    return float(0.5 * away @ CURVATURE @ away), CURVATURE @ away


def flat(tensors: Any) -> Array:
    return np.append(np.asarray(tensors["w"], np.float64), np.asarray(tensors["b"], np.float64))


def begun(client: httpx.Client, optimizer: Any, **members: Any) -> str:
    held = {"params": {"w": [-1.0, 1.0], "b": 3.0}, "dtype": "float64"} | members
    return str(create(client, optimizer=optimizer, **held)["id"])


def send(client: httpx.Client, session: str, x: Array, **more: Any) -> httpx.Response:
    """The loss and the gradient at x."""
    loss, g = loss_at(x)
    body = {"gradients": {"w": g[:2].tolist(), "b": g[2]}, "loss": loss} | more
    return client.post(f"/v1/sessions/{session}/steps", json=body)


def held(client: httpx.Client, session: str) -> Array:
    """The parameters themselves, wherever the next gradient is to be taken."""
    return flat(safetensors.numpy.load(client.get(f"/v1/sessions/{session}/state").content))


def minimized(client: httpx.Client, session: str, steps: int) -> Array:
    """What `at=final` is after so many gradients, each taken where the service said."""
    for t in range(1, steps + 1):
        reply = send(client, session, flat(params(client, session)))
        assert (reply.status_code, reply.json()["step"]) == (200, t), reply.text
    # The reply to a step has the next point already.
    assert flat(reply.json()["params"]).tolist() == flat(params(client, session)).tolist()
    return flat(params(client, session, "final"))


# -- where the next gradient is to be taken ----------------------------------------------------------------------------

DESCENT: Json = {"kind": "momentum", "lr": 0.1, "momentum": 0.8}
HANDS_OUT: dict[str, tuple[Json, int, float]] = {
    "nesterov": (DESCENT | {"nesterov": "lookahead", "lr_in_velocity": True}, 120, 1e-6),
    "sam": ({"kind": "sam", "base": DESCENT, "rho": 1e-4}, 240, 1e-3),
    "sam around lookahead": ({"kind": "sam", "base": {"kind": "lookahead", "base": DESCENT}, "rho": 1e-4}, 400, 1e-3),
    "lookahead around sam": ({"kind": "lookahead", "base": {"kind": "sam", "base": DESCENT, "rho": 1e-4}}, 400, 1e-3),
    "schedule_free, sgd": ({"kind": "schedule_free", "base": {"kind": "sgd", "lr": 0.5}}, 300, 0.02),
    "schedule_free, adamw": (
        {"kind": "schedule_free", "base": {"kind": "adamw", "lr": 0.3, "weight_decay": 0.0}}, 300, 0.1,
    ),
    "lbfgs": ({"kind": "lbfgs", "line_search": "strong_wolfe"}, 30, 1e-8),
    "bfgs": ({"kind": "bfgs"}, 30, 1e-8),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDS_OUT)
def test_a_client_that_looks_where_it_is_told_finds_the_minimum(client: httpx.Client, name: str) -> None:
    optimizer, steps, close = HANDS_OUT[name]
    session = begun(client, optimizer)
    found = minimized(client, session, steps)
    np.testing.assert_allclose(found, LOWEST, atol=close)


# The next point of Nesterov's form is known to whoever has the parameters and the updates.
@pytest.mark.parametrize("name", sorted(HANDS_OUT.keys() - {"nesterov"}))
def test_the_client_must_let_the_session_hold_the_parameters(client: httpx.Client, name: str) -> None:
    session = create(client, optimizer=HANDS_OUT[name][0], shapes={"w": [2], "b": []})["id"]
    with unchanged(client, session):
        document = refused(send(client, session, LOWEST), 422, "params-required")
        assert "at step 0" in document["detail"]
    values = {"params": {"w": [0.0, 0.0], "b": 0.0}}
    assert client.put(f"/v1/sessions/{session}/params", json=values).status_code == 200
    assert send(client, session, np.zeros(3)).status_code == 200


def test_sam_climbs_with_one_gradient_and_steps_with_the_next(client: httpx.Client) -> None:
    optimizer = {"kind": "sam", "base": {"kind": "sgd", "lr": 0.5}, "rho": 0.25}
    session = begun(client, optimizer)
    start = held(client, session)
    x = start
    for move in range(3):
        _, g = loss_at(x)
        first = send(client, session, x).json()
        climbed = x + 0.25 * g / np.linalg.norm(g)
        np.testing.assert_allclose(flat(first["params"]), climbed, rtol=1e-14)
        np.testing.assert_array_equal(held(client, session), x)
        second = send(client, session, climbed).json()
        x = x - 0.5 * loss_at(climbed)[1]
        np.testing.assert_allclose(flat(second["params"]), x, rtol=1e-14)
        assert (first["step"], second["step"]) == (2 * move + 1, 2 * move + 2)
        assert first["metrics"]["lr"] == second["metrics"]["lr"] == 0.5


def test_a_line_search_tries_points_and_keeps_the_parameters(client: httpx.Client) -> None:
    session = begun(client, {"kind": "lbfgs", "line_search": "strong_wolfe"})
    start = held(client, session)
    trial = flat(send(client, session, start).json()["params"])
    assert not np.array_equal(trial, start)
    np.testing.assert_array_equal(held(client, session), start)
    np.testing.assert_array_equal(flat(params(client, session, "final")), start)
    # A trial that is worse than the start is not taken: the next one is nearer.
    worse = client.post(
        f"/v1/sessions/{session}/steps", json={"gradients": {"w": [9.0, -9.0], "b": -9.0}, "loss": 1e6}
    ).json()
    nearer = flat(worse["params"])
    assert 0 < np.linalg.norm(nearer - start) < np.linalg.norm(trial - start)
    np.testing.assert_array_equal(held(client, session), start)


def test_schedule_free_has_two_points(client: httpx.Client) -> None:
    """By hand: y = (1 - beta) z + beta x; z goes by the gradient, x is the mean of the z."""
    session = begun(client, {"kind": "schedule_free", "base": {"kind": "sgd", "lr": 0.25}, "beta": 0.75})
    x = z = held(client, session)
    for t in range(1, 6):
        y = 0.25 * z + 0.75 * x
        np.testing.assert_allclose(flat(params(client, session)), y, rtol=1e-13)
        send(client, session, y)
        z = z - 0.25 * loss_at(y)[1]
        x = x + (z - x) / t
        np.testing.assert_allclose(flat(params(client, session, "final")), x, rtol=1e-13)


def test_new_parameters_move_all_points(client: httpx.Client) -> None:
    session = begun(client, {"kind": "sam", "base": {"kind": "sgd", "lr": 0.5}, "rho": 0.25})
    ahead = flat(send(client, session, held(client, session)).json()["params"]) - held(client, session)
    file = safetensors.numpy.save({"w": np.array([5.0, 6.0]), "b": np.array(7.0)})
    assert client.put(f"/v1/sessions/{session}/params", content=file, headers=SAFETENSORS).status_code == 200
    np.testing.assert_allclose(flat(params(client, session)), np.array([5.0, 6.0, 7.0]) + ahead, rtol=1e-14)


# -- methods around a method -------------------------------------------------------------------------------------------


def test_lookahead_returns_half_of_the_way(client: httpx.Client) -> None:
    base = {"kind": "sgd", "lr": 1.0}
    session = begun(client, {"kind": "lookahead", "base": base, "sync_period": 3, "slow_step": 0.5})
    start, body = held(client, session), {"gradients": {"w": [1.0, -1.0], "b": 2.0}}
    u, path = -np.array([1.0, -1.0, 2.0]), f"/v1/sessions/{session}/steps"
    places = [flat(client.post(path, json=body).json()["params"]) - start for _ in range(7)]
    shares = [1.0, 2.0, 1.5, 2.5, 3.5, 3.0, 4.0]  # 3 becomes 1.5, and 1.5 + 3 becomes 3
    np.testing.assert_allclose(places, [share * u for share in shares], rtol=1e-13)


def test_what_is_wrapped_may_be_named_alone_and_is_shown_whole(client: httpx.Client) -> None:
    shown = create(client, optimizer={"kind": "lookahead", "base": "momentum"}, shapes={"w": [2]})["optimizer"]
    usual = create(client, optimizer="momentum", shapes={"w": [2]})["optimizer"]
    assert shown == {"kind": "lookahead", "base": usual, "sync_period": 6, "slow_step": 0.5}
    assert create(client, optimizer="sam", shapes={"w": [2]})["optimizer"]["base"] == usual


def test_a_group_sets_the_hyperparameters_of_what_is_wrapped(client: httpx.Client) -> None:
    inner = {"kind": "lookahead", "base": {"kind": "sgd", "lr": 1.0}, "sync_period": 2}
    for optimizer in (inner, {"kind": "sam", "base": inner}, {"kind": "schedule_free", "base": inner["base"]}):
        session = begun(client, optimizer, groups=[{"match": "b", "lr": 0.125}])
        start = held(client, session)
        body = {"gradients": {"w": [1.0, 1.0], "b": 1.0}}
        for _ in range(2 if optimizer["kind"] == "sam" else 1):
            assert client.post(f"/v1/sessions/{session}/steps", json=body).status_code == 200
        np.testing.assert_allclose(held(client, session) - start, [-1.0, -1.0, -0.125], rtol=1e-13)
        reply = client.patch(f"/v1/sessions/{session}", json={"groups": [{"match": "b", "sync_period": 3}]})
        assert pointers(refused(reply, 422, "invalid-request")) == {"/groups/0/sync_period"}


def test_a_change_reaches_what_is_wrapped(client: httpx.Client) -> None:
    base = {"kind": "lookahead", "base": {"kind": "sgd", "lr": 1.0}, "sync_period": 6}
    session = begun(client, {"kind": "sam", "base": base, "rho": 0.5})
    path = f"/v1/sessions/{session}"
    before = client.get(path).json()["optimizer"]
    change = {"rho": 0.25, "base": {"slow_step": 0.75, "base": {"kind": "sgd", "lr": 0.5}}}
    after = client.patch(path, json={"optimizer": change})
    assert after.status_code == 200, after.text
    expected = before | {"rho": 0.25, "base": base | {"slow_step": 0.75, "base": {"kind": "sgd", "lr": 0.5}}}
    assert after.json()["optimizer"] == expected
    body = {"gradients": {"w": [1.0, 1.0], "b": 1.0}}
    start = held(client, session)
    for _ in range(2):
        reply = client.post(f"{path}/steps", json=body)
    assert reply.json()["metrics"]["lr"] == 0.5
    np.testing.assert_allclose(held(client, session) - start, [-0.5] * 3, rtol=1e-13)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"base": "adam"}, "/optimizer/base/kind"),
        ({"base": {"kind": "adam"}}, "/optimizer/base/kind"),
        ({"base": {"beta1": 0.5}}, "/optimizer/base/beta1"),
        ({"base": {"lr": -1.0}}, "/optimizer/base/lr"),
        ({"base": {"base": {"lr": 1.0}}}, "/optimizer/base/base"),
        ({"base": None}, "/optimizer/base"),
        ({"base": 1}, "/optimizer/base"),
        ({"lr": 0.5}, "/optimizer/lr"),
        ({"sync_period": 0}, "/optimizer/sync_period"),
        ({"slow_step": 1.5}, "/optimizer/slow_step"),
    ],
)
def test_a_change_that_cannot_be(client: httpx.Client, change: Json, place: str) -> None:
    session = begun(client, {"kind": "lookahead", "base": "momentum"})
    with unchanged(client, session):
        reply = client.patch(f"/v1/sessions/{session}", json={"optimizer": change})
        assert pointers(refused(reply, 422, "invalid-request")) == {place}


REFUSED = [
    ("lookahead", "lookahead"), ("lookahead", "schedule_free"), ("lookahead", "lbfgs"), ("lookahead", "bfgs"),
    ("lookahead", "dog"), ("lookahead", "prodigy"), ("lookahead", "asgd"),
    ("sam", "sam"), ("sam", "lbfgs"), ("sam", "bfgs"), ("sam", "newton"), ("sam", "schedule_free"),
    ("schedule_free", "momentum"), ("schedule_free", "lookahead"), ("schedule_free", "schedule_free"),
]  # fmt: skip


@pytest.mark.parametrize(("outer", "inner"), REFUSED)
def test_what_cannot_be_wrapped_is_named(client: httpx.Client, outer: str, inner: str) -> None:
    body = {"optimizer": {"kind": outer, "base": inner}, "shapes": {"w": [2]}}
    document = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert pointers(document) == {"/optimizer/base/kind"}
    (fault,) = document["errors"]
    assert outer in fault["detail"]
    assert inner in fault["detail"]


@pytest.mark.parametrize("outer", ["lookahead", "sam", "schedule_free"])
def test_the_catalogue_knows_what_can_be_wrapped(client: httpx.Client, outer: str) -> None:
    wraps = client.get(f"/v1/optimizers/{outer}").json()["wraps"]
    for inner in KINDS:
        reply = client.post("/v1/sessions", json={"optimizer": {"kind": outer, "base": inner}, "shapes": {"w": [2]}})
        assert (reply.status_code == 201) == (inner in wraps), inner


@pytest.mark.parametrize(
    ("optimizer", "place"),
    [
        ({"kind": "sam", "base": "sdg"}, "/optimizer/base/kind"),
        ({"kind": "sam", "base": {"kind": "sgd", "lr": -1}}, "/optimizer/base/lr"),
        ({"kind": "sam", "base": {"kind": "lookahead", "base": {"kind": "sgd", "x": 1}}}, "/optimizer/base/base/x"),
        ({"kind": "lookahead", "base": {"kind": "sam", "base": "newton"}}, "/optimizer/base/base/kind"),
        (
            {"kind": "sam", "base": {"kind": "momentum", "nesterov": True, "dampening": 0.5}},
            "/optimizer/base/dampening",
        ),
        ({"kind": "sam", "base": {}}, "/optimizer/base/kind"),
        ({"kind": "sam", "base": None}, "/optimizer/base"),
        ({"kind": "adam", "base": "sgd"}, "/optimizer/base"),
        ({"kind": "sam", "base": {"kind": "momentum", "nesterov": "lookahead"}}, "/optimizer/base/kind"),
        ({"kind": "schedule_free", "base": {"kind": "adamw", "amsgrad": "raw"}}, "/optimizer/base/amsgrad"),
        ({"kind": "schedule_free", "base": {"kind": "adamw"}, "weight_decay": 0.1}, "/optimizer/weight_decay"),
    ],
)
def test_faults_below_a_wrapper_have_their_pointers(client: httpx.Client, optimizer: Json, place: str) -> None:
    body = {"optimizer": optimizer, "shapes": {"w": [2]}}
    assert pointers(refused(client.post("/v1/sessions", json=body), 422, "invalid-request")) == {place}


def test_wrappers_nest_no_deeper_than_there_are_kinds_for(client: httpx.Client) -> None:
    optimizer: Any = "sgd"
    for _ in range(40):
        optimizer = {"kind": "lookahead", "base": optimizer}
    reply = client.post("/v1/sessions", json={"optimizer": optimizer, "shapes": {"w": [2]}})
    document = refused(reply, 422, "invalid-request")
    assert all(place.startswith("/optimizer/base") for place in pointers(document))
