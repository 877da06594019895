"""Transforms over HTTP: their order, what they refuse, what they remember, and what they tell the client."""

import math
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.http.files import saved, step
from tests.http.refusals import pointers, refused, unchanged
from tests.wire import SAFETENSORS, create, tensors

Json = dict[str, Any]
ACCUMULATE: Json = {"kind": "accumulate", "steps": 3}


def sgd(client: httpx.Client, *transforms: Any, **members: Any) -> str:
    """Gradient descent with rate 1 from 0: the parameters are minus the sum of what the transforms let through."""
    body = {"optimizer": {"kind": "sgd", "lr": 1.0}, "params": {"w": [0.0, 0.0]}, "dtype": "float64"} | members
    return str(create(client, **body, transforms=list(transforms))["id"])


def taken(client: httpx.Client, session: str, values: Any, **more: Any) -> Json:
    """One step by file, answered in JSON."""
    reply = step(client, session, {"w": np.asarray(values, np.float64)}, {"Accept": "application/json", **more})
    assert reply.status_code == 200, reply.text
    found: Json = reply.json()
    return found


def state(client: httpx.Client, session: str) -> dict[str, np.ndarray]:
    loaded: dict[str, np.ndarray] = safetensors.numpy.load(client.get(f"/v1/sessions/{session}/state").content)
    return loaded


# -- order -----------------------------------------------------------------------------------------------------------


def test_they_act_in_the_order_given(client: httpx.Client) -> None:
    decay, clip = {"kind": "weight_decay", "weight_decay": 0.5}, {"kind": "clip_by_global_norm", "max_norm": 1.0}
    start, g = np.array([4.0, 8.0]), np.array([3.0, 4.0])
    decayed = g + 0.5 * start
    expected = {
        (0, 1): decayed / np.linalg.norm(decayed),
        (1, 0): g / np.linalg.norm(g) + 0.5 * start,
    }
    for order, u in expected.items():
        session = sgd(client, *[(decay, clip)[i] for i in order], params={"w": start.tolist()})
        np.testing.assert_allclose(taken(client, session, g)["params"]["w"], start - u, rtol=1e-14)


def test_they_are_shown_with_their_defaults_and_by_name_alone(client: httpx.Client) -> None:
    session = sgd(client, "zero_nans", {"kind": "ema", "decay": 0.5}, "normalize")
    assert client.get(f"/v1/sessions/{session}").json()["transforms"] == [
        {"kind": "zero_nans"},
        {"kind": "ema", "decay": 0.5, "debias": True},
        {"kind": "normalize", "per": "global", "eps": 0.0},
    ]


def test_metrics_are_those_of_the_gradient_that_was_sent(client: httpx.Client) -> None:
    session = sgd(client, {"kind": "clip_by_global_norm", "max_norm": 1.0})
    reply = taken(client, session, [3.0, 4.0])
    assert reply["metrics"] == {"lr": 1.0, "grad_norm": 5.0}
    np.testing.assert_allclose(reply["params"]["w"], [-0.6, -0.8], rtol=1e-15)


def test_a_projection_holds_after_every_step(client: httpx.Client) -> None:
    session = sgd(client, {"kind": "project", "onto": "l2_ball", "radius": 2.0}, optimizer="adam")
    assert client.patch(f"/v1/sessions/{session}", json={"optimizer": {"lr": 1.0}}).status_code == 200
    for _ in range(4):
        found = np.array(taken(client, session, [-3.0, -4.0])["params"]["w"])
        assert np.linalg.norm(found) <= 2.0 * (1 + 1e-15)
    np.testing.assert_allclose(np.linalg.norm(found), 2.0, rtol=1e-14)


def test_decay_needs_the_parameters_of_a_client_that_holds_them(client: httpx.Client) -> None:
    session = create(
        client,
        optimizer={"kind": "sgd", "lr": 1.0},
        shapes={"w": [2]},
        transforms=[{"kind": "weight_decay", "weight_decay": 0.5}],
    )["id"]
    with unchanged(client, session):
        refused(step(client, session, {"w": np.ones(2)}), 422, "params-required")
    got = tensors(step(client, session, {"w": np.ones(2), "w:params": np.array([4.0, 8.0])}))
    np.testing.assert_array_equal(got["w"], [-3.0, -5.0])


# -- refused ---------------------------------------------------------------------------------------------------------

CLIP: Json = {"kind": "clip_by_norm", "max_norm": 1.0}
WRONG: list[tuple[Any, str]] = [
    ([CLIP, "clop"], "/transforms/1/kind"),
    ([CLIP, {}], "/transforms/1/kind"),
    ([CLIP, None], "/transforms/1"),
    ([{"kind": "clip_by_norm"}], "/transforms/0/max_norm"),
    ([CLIP, CLIP | {"norm": 2.0}], "/transforms/1/norm"),
    ([CLIP | {"max_norm": -1.0}], "/transforms/0/max_norm"),
    ([CLIP | {"max_norm": "1"}], "/transforms/0/max_norm"),
    ([CLIP | {"max_norm": {"kind": "linear", "init": 1.0, "end": -1.0, "steps": 3}}], "/transforms/0/max_norm"),
    ([CLIP | {"max_norm": {"kind": "linear", "init": 1.0, "steps": 3}}], "/transforms/0/max_norm/end"),
    ([ACCUMULATE | {"steps": 0}], "/transforms/0/steps"),
    ([ACCUMULATE | {"steps": 1.5}], "/transforms/0/steps"),
    ([ACCUMULATE | {"reduce": "median"}], "/transforms/0/reduce"),
    ([{"kind": "ema", "decay": 1.0}], "/transforms/0/decay"),
    ([{"kind": "unscale", "dynamic": 1}], "/transforms/0/dynamic"),
    ([{"kind": "unscale", "scale": {"kind": "constant", "value": 1.0}}], "/transforms/0/scale"),
    ([{"kind": "unscale", "backoff_factor": 1.0}], "/transforms/0/backoff_factor"),
    ([{"kind": "clip"}], "/transforms/0"),
    ([{"kind": "project", "onto": "moon"}], "/transforms/0/onto"),
    ([{"kind": "project", "onto": "box", "low": 2.0}], "/transforms/0/low"),
    ([{"kind": "add_noise", "eta": 0.1, "seed": -1}], "/transforms/0/seed"),
    (["sign"] * 33, "/transforms"),
    (["normalize", "zero_nans"], "/transforms/1"),
    ({"kind": "sign"}, "/transforms"),
]


@pytest.mark.parametrize(("given", "place"), WRONG, ids=[f"{i}{place}" for i, (_, place) in enumerate(WRONG)])
def test_what_cannot_be(client: httpx.Client, given: Any, place: str) -> None:
    body = {"optimizer": "sgd", "params": {"w": [0.0, 0.0]}, "transforms": given}
    assert pointers(refused(client.post("/v1/sessions", json=body), 422, "invalid-request")) == {place}
    session = sgd(client)
    with unchanged(client, session):
        reply = client.patch(f"/v1/sessions/{session}", json={"transforms": given})
        assert pointers(refused(reply, 422, "invalid-request")) == {place}


@pytest.mark.parametrize("optimizer", ["lbfgs", "bfgs", "schedule_free"])
def test_methods_that_cannot_go_on_from_moved_parameters(client: httpx.Client, optimizer: str) -> None:
    moved = [{"kind": "sign"}, {"kind": "project", "onto": "non_negative"}]
    body = {"optimizer": optimizer, "params": {"w": [0.0, 0.0]}, "transforms": moved}
    document = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert pointers(document) == {"/transforms/1"}
    assert optimizer in document["errors"][0]["detail"]


# -- changed ---------------------------------------------------------------------------------------------------------


def test_what_stays_keeps_what_it_remembers(client: httpx.Client) -> None:
    ema = {"kind": "ema", "decay": 0.5, "debias": False}
    session = sgd(client, {"kind": "clip_by_norm", "max_norm": 100.0}, ema)
    path = f"/v1/sessions/{session}"
    taken(client, session, [2.0, 4.0])
    assert state(client, session)["w:ema.mean"].tolist() == [1.0, 2.0]
    # Another decay, something before it and behind it: the mean is still there.
    changed = [ema | {"decay": 0.75}, {"kind": "accumulate", "steps": 2}, "sign"]
    assert client.patch(path, json={"transforms": changed}).status_code == 200
    found = state(client, session)
    assert found["w:ema.mean"].tolist() == [1.0, 2.0]
    assert found["w:accumulate.mean"].tolist() == [0.0, 0.0]
    taken(client, session, [1.0, -2.0])
    found = state(client, session)
    assert found["w:accumulate.mean"].tolist() == found["w:ema.mean"].tolist() == [1.0, 1.0]
    # What is taken away is gone, and what comes anew begins anew.
    assert client.patch(path, json={"transforms": []}).status_code == 200
    assert set(state(client, session)) == {"w"}
    assert client.patch(path, json={"transforms": [ema]}).status_code == 200
    assert state(client, session)["w:ema.mean"].tolist() == [0.0, 0.0]


def test_what_would_remember_otherwise_begins_anew(client: httpx.Client) -> None:
    """Two gradients of three are gone where a sum takes the place of their mean, and so is the count of them."""
    session = sgd(client, ACCUMULATE)
    for _ in range(2):
        taken(client, session, [6.0, 0.0])
    change = {"transforms": [ACCUMULATE | {"reduce": "sum"}]}
    assert client.patch(f"/v1/sessions/{session}", json=change).status_code == 200
    assert [taken(client, session, [1.0, 0.0])["params"]["w"][0] for _ in range(3)] == [0.0, 0.0, -3.0]


def test_two_of_a_kind_remember_by_themselves(client: httpx.Client) -> None:
    session = sgd(client, *[{"kind": "ema", "decay": decay, "debias": False} for decay in (0.5, 0.75)])
    taken(client, session, [4.0, 8.0])
    found = state(client, session)
    assert (found["w:ema.mean"].tolist(), found["w:ema.2.mean"].tolist()) == ([2.0, 4.0], [0.5, 1.0])


# -- accumulate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_three_gradients_make_one_move(client: httpx.Client, reduce: str) -> None:
    session = sgd(client, ACCUMULATE | {"reduce": reduce})
    path = f"/v1/sessions/{session}"
    sent, etags = [[3.0, 0.0], [6.0, 3.0], [0.0, 9.0]], set()
    expected = np.sum(sent, axis=0) / (3 if reduce == "mean" else 1)
    for t, g in enumerate(sent, 1):
        reply = taken(client, session, g)
        assert reply["step"] == t
        assert reply["metrics"] == {"lr": 1.0, "grad_norm": pytest.approx(np.linalg.norm(g), rel=1e-15)}
        held = client.get(f"{path}/params")
        assert held.json()["params"] == reply["params"]
        etags.add(held.headers["etag"])
        if t < 3:
            assert reply["params"]["w"] == [0.0, 0.0]
    np.testing.assert_allclose(reply["params"]["w"], -expected, rtol=1e-15)
    assert len(etags) == 3
    assert [record["step"] for record in client.get(f"{path}/history").json()["data"]] == [1, 2, 3]


def test_updates_of_a_step_that_is_held_back_change_no_bit(client: httpx.Client) -> None:
    session = create(client, optimizer="adam", shapes={"w": [2]}, transforms=[ACCUMULATE | {"steps": 2}])["id"]
    got = tensors(step(client, session, {"w": np.float32([1, -1])}))["w"]
    start = np.float32([-0.0, 0.0])
    assert (start + got).tobytes() == start.tobytes()
    assert np.all(tensors(step(client, session, {"w": np.float32([1, -1])}))["w"] != 0.0)


def test_every_micro_gradient_brings_all_tensors(client: httpx.Client) -> None:
    session = sgd(client, ACCUMULATE, params={"w": [0.0], "b": [0.0]})
    body = {"gradients": {"w": [1.0]}, "partial": True}
    with unchanged(client, session):
        document = refused(client.post(f"/v1/sessions/{session}/steps", json=body), 422, "missing-gradient")
        assert document["tensor"] == "b"


# -- the loss scale --------------------------------------------------------------------------------------------------


def test_a_dynamic_scale_halves_on_overflow_and_grows(client: httpx.Client) -> None:
    unscale = {"kind": "unscale", "scale": 8.0, "dynamic": True, "growth_interval": 2}
    session = sgd(client, unscale)
    scale, position, scales = 8.0, 0.0, []
    for value in (1.0, math.inf, 1.0, 1.0, 1.0, math.nan, -math.inf, 1.0):
        finite = math.isfinite(value)
        reply = taken(client, session, [scale * value, 0.0])
        position -= value if finite else 0.0
        assert reply["params"]["w"] == [position, 0.0]
        assert (reply["metrics"]["grad_norm"] is None) == (not finite)
        assert "skipped" not in reply
        scale = reply["metrics"]["loss_scale"]
        scales.append(scale)
    assert scales == [8.0, 4.0, 4.0, 8.0, 8.0, 4.0, 2.0, 2.0]
    shown = client.get(f"/v1/sessions/{session}").json()
    assert (shown["step"], shown["skipped"]) == (8, 0)
    norms = [record["grad_norm"] for record in client.get(f"/v1/sessions/{session}/history").json()["data"]]
    assert [norm is None for norm in norms] == [False, True, False, False, False, True, True, False]


def test_the_scale_stands_in_the_metadata_of_a_file(client: httpx.Client) -> None:
    session = sgd(client, {"kind": "unscale", "scale": 8.0, "dynamic": True})
    reply = step(client, session, {"w": np.array([np.inf, 1.0])})
    assert reply.status_code == 200
    length = int.from_bytes(reply.content[:8], "little")
    assert b'"loss_scale":"4.0"' in reply.content[8 : 8 + length]
    still = sgd(client, {"kind": "unscale", "scale": 16.0})
    assert taken(client, still, [16.0, 32.0])["metrics"]["loss_scale"] == 16.0
    with unchanged(client, still):
        refused(step(client, still, {"w": np.array([np.inf, 1.0])}), 422, "non-finite")


def test_an_overflow_does_not_count_as_a_move(client: httpx.Client) -> None:
    lr = {"kind": "linear", "init": 1.0, "end": 0.0, "steps": 4}
    unscale = {"kind": "unscale", "scale": 1.0, "dynamic": True}
    session = sgd(client, unscale, optimizer={"kind": "sgd", "lr": lr})
    rates = [taken(client, session, [value, 0.0])["metrics"]["lr"] for value in (1.0, math.inf, math.nan, 1.0)]
    assert rates == [1.0, 0.75, 0.75, 0.75]


# -- what is not finite ----------------------------------------------------------------------------------------------


def test_zero_nans_lets_nan_through_and_infinity_not(client: httpx.Client) -> None:
    session = sgd(client, "zero_nans")
    assert taken(client, session, [math.nan, 2.0])["params"]["w"] == [0.0, -2.0]
    with unchanged(client, session):
        document = refused(step(client, session, {"w": np.array([np.nan, np.inf])}), 422, "non-finite")
        assert document["tensor"] == "w"
    reply = client.post(
        f"/v1/sessions/{session}/steps", content=b'{"gradients": {"w": [NaN, 1.0]}}',
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    refused(reply, 400, "malformed-json")


def test_what_is_skipped_is_counted_where_nothing_mends_it(client: httpx.Client) -> None:
    session = sgd(client, "zero_nans", non_finite="skip")
    assert "skipped" not in taken(client, session, [math.nan, 1.0])
    for count in (1, 2):
        reply = taken(client, session, [math.inf, 1.0])
        assert (reply["skipped"], reply["step"], reply["params"]["w"]) == (True, 1, [0.0, -1.0])
        assert client.get(f"/v1/sessions/{session}").json()["skipped"] == count
    assert taken(client, session, [1.0, 1.0])["step"] == 2


def test_the_scale_is_told_with_a_step_that_is_skipped(client: httpx.Client) -> None:
    session = sgd(client, {"kind": "unscale", "scale": 4.0}, non_finite="skip")
    reply = taken(client, session, [math.inf, 1.0])
    assert (reply["skipped"], reply["metrics"]["loss_scale"]) == (True, 4.0)


def test_a_hidden_nan_is_no_way_around_accumulation(client: httpx.Client) -> None:
    """The overflow is held back before the sum sees it, and the sum goes on."""
    scale, seen = 1.0, []
    summed = ACCUMULATE | {"steps": 2, "reduce": "sum"}
    session = sgd(client, {"kind": "unscale", "scale": scale, "dynamic": True}, summed)
    for value in (1.0, math.nan, 2.0, 4.0, math.inf, 8.0):
        reply = taken(client, session, [scale * value, 0.0])
        scale = reply["metrics"]["loss_scale"]
        seen.append(reply["params"]["w"][0])
    assert (scale, seen) == (0.25, [0.0, 0.0, -3.0, -3.0, -3.0, -15.0])


def test_rows_stay_rows_where_the_transforms_leave_them(client: httpx.Client) -> None:
    """Clipping by the norm of the rows that came; adagrad then touches no others."""
    table = {"w": [[1.0, 1.0]] * 3}
    clip = {"kind": "clip_by_global_norm", "max_norm": 1.0}
    session = sgd(client, clip, params=table)
    body = {"gradients": {"w": {"indices": [2, 0], "values": [[3.0, 0.0], [0.0, 4.0]]}}}
    reply = client.post(f"/v1/sessions/{session}/steps", json=body).json()
    np.testing.assert_allclose(reply["params"]["w"], [[1.0, 0.2], [1.0, 1.0], [0.4, 1.0]], rtol=1e-14)
    file = saved({"w:indices": np.array([1]), "w:values": np.array([[np.nan, 1.0]])})
    with unchanged(client, session):
        refused(client.post(f"/v1/sessions/{session}/steps", content=file, headers=SAFETENSORS), 422, "non-finite")
