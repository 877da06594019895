"""Checkpoints, forks and restores: a session that goes on elsewhere, with the same bits."""

import json
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from core.optimizers import KINDS
from core.recipe import describe
from tests.http import contributions
from tests.http.files import metadata_of, saved, step, with_metadata
from tests.http.refusals import refused, standing, unchanged
from tests.wire import SAFETENSORS, bits, create, params, tensors

SHAPES = {"w": (3, 2), "b": (), "row": (1, 4)}


def gradients(t: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Those of step t."""
    return contributions.gradients(SHAPES, t, np.dtype(dtype).name)


def advance(client: httpx.Client, session: str, kind: str, steps: range, dtype: type = np.float32) -> list[bytes]:
    """The bits of each reply."""
    replies = []
    for t in steps:
        sent = gradients(t, dtype)
        more, members = contributions.beside(KINDS[kind]().needs, SHAPES, t, without=["params"])
        got = tensors(contributions.post(client, session, sent | more, members))
        assert set(got) == set(SHAPES)
        replies.append(b"".join(bits(got[name]) for name in SHAPES))
    return replies


def started(client: httpx.Client, kind: str, dtype: type = np.float32, **members: Any) -> str:
    values = {name: array.tolist() for name, array in gradients(99).items()}
    rate: Any = {"kind": "cosine", "init": 0.3, "steps": 10, "floor": 0.01}
    if kind == "rprop":
        rate = 0.3  # where it begins, and no schedule
    optimizer = {"kind": kind} | ({"lr": rate} if "lr" in describe(KINDS[kind]()) else {})
    made = create(client, optimizer=optimizer, params=values, dtype=np.dtype(dtype).name, **members)
    session: str = made["id"]
    return session


def state(client: httpx.Client, session: str) -> bytes:
    reply = client.get(f"/v1/sessions/{session}/state")
    assert reply.status_code == 200, reply.text
    return reply.content


def restored(client: httpx.Client, file: bytes) -> dict[str, Any]:
    reply = client.post("/v1/sessions", content=file, headers=SAFETENSORS)
    assert reply.status_code == 201, reply.text
    made: dict[str, Any] = reply.json()
    assert reply.headers["location"] == f"/v1/sessions/{made['id']}"
    assert reply.headers["etag"].startswith(f'"{made["step"]}-')
    return made


def settings(shown: dict[str, Any]) -> dict[str, Any]:
    """Of a session's object what a copy has in common with it."""
    return {name: value for name, value in shown.items() if name not in ("id", "created_at", "updated_at", "skipped")}


# -- forks and restores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_forks_and_restores_go_on_with_the_same_bits(client: httpx.Client, kind: str, dtype: type) -> None:
    session = started(client, kind, dtype, name="origin", labels={"a": "b"}, groups=[{"match": "b", "lr": 0.5}])
    advance(client, session, kind, range(3), dtype)
    forked = client.post(f"/v1/sessions/{session}/fork")
    assert forked.status_code == 201, forked.text
    assert forked.headers["location"] == f"/v1/sessions/{forked.json()['id']}"
    again = restored(client, state(client, session))
    shown = client.get(f"/v1/sessions/{session}").json()
    ids = [session, forked.json()["id"], again["id"]]
    assert len(set(ids)) == 3
    assert settings(forked.json()) == settings(again) == settings(shown)
    assert state(client, ids[0]) == state(client, ids[1]) == state(client, ids[2])
    on = [advance(client, id_, kind, range(3, 6), dtype) for id_ in ids]
    assert on[0] == on[1] == on[2]
    assert state(client, ids[0]) == state(client, ids[1]) == state(client, ids[2])


def test_a_fork_goes_its_own_way(client: httpx.Client) -> None:
    session = started(client, "adam")
    advance(client, session, "adam", range(2))
    fork = client.post(f"/v1/sessions/{session}/fork", json={}).json()["id"]
    with unchanged(client, session):
        advance(client, fork, "adam", range(5, 8))
        client.patch(f"/v1/sessions/{fork}", json={"name": "other", "optimizer": {"lr": 0.5}})
    with unchanged(client, fork):
        advance(client, session, "adam", range(2, 4))
        assert client.delete(f"/v1/sessions/{session}").status_code == 204
    # What it did before it was one is not in its history, nor are the keys.
    assert [record["step"] for record in standing(client, fork)["history"]["data"]] == [3, 4, 5]


def test_a_fork_remembers_no_keys(client: httpx.Client) -> None:
    session = started(client, "sgd")
    key = {"Idempotency-Key": "once"}
    assert step(client, session, gradients(0), key).headers["ravine-step"] == "1"
    fork = client.post(f"/v1/sessions/{session}/fork").json()["id"]
    reply = step(client, fork, gradients(0), key)
    assert (reply.headers["ravine-step"], "ravine-replayed" in reply.headers) == ("2", False)


def test_a_session_whose_client_holds_the_parameters_is_restored_as_one(client: httpx.Client) -> None:
    session = create(client, optimizer="adam", shapes={"w": [4]})["id"]
    g = {"w": np.float32([1, -2, 3, -4])}
    step(client, session, g)
    file = state(client, session)
    assert set(safetensors.numpy.load(file)) == {"w:m", "w:v"}
    again = restored(client, file)
    assert again["holds_params"] is False
    assert bits(tensors(step(client, session, g))["w"]) == bits(tensors(step(client, again["id"], g))["w"])


@pytest.mark.parametrize("averaging", [{"kind": "ema", "decay": 0.9}, {"kind": "polyak", "start": 2}])
def test_averages_are_restored(client: httpx.Client, averaging: dict[str, Any]) -> None:
    session = started(client, "adam", averaging=averaging)
    advance(client, session, "adam", range(4))
    again = restored(client, state(client, session))["id"]
    for id_ in (session, again):
        advance(client, id_, "adam", range(4, 6))
    for at in ("next", "final"):
        one, other = params(client, session, at), params(client, again, at)
        assert {name: bits(array) for name, array in one.items()} == {
            name: bits(array) for name, array in other.items()
        }


def test_a_session_of_many_tensors_is_forked_and_restored(client: httpx.Client) -> None:
    names = [f"layer.{i}" for i in range(2500)]
    session = create(client, optimizer="adam", params=dict.fromkeys(names, 0.5))["id"]
    sent = {name: np.float32(i) for i, name in enumerate(names)}
    step(client, session, sent)
    fork = client.post(f"/v1/sessions/{session}/fork").json()["id"]
    again = restored(client, state(client, session))["id"]
    replies = [tensors(step(client, id_, sent)) for id_ in (session, fork, again)]
    assert len(replies[0]) == len(names)
    for name in names:
        assert bits(replies[0][name]) == bits(replies[1][name]) == bits(replies[2][name])


# -- the file --------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_a_file_that_the_library_reads(client: httpx.Client, tmp_path: Any) -> None:
    session = started(client, "adam", name="of adam", labels={"team": "vision"})
    advance(client, session, "adam", range(2))
    reply = client.get(f"/v1/sessions/{session}/state")
    assert reply.headers["content-type"] == "application/vnd.safetensors"
    assert reply.headers["content-disposition"] == f'attachment; filename="{session}-2.safetensors"'
    assert reply.headers["etag"] == client.get(f"/v1/sessions/{session}").headers["etag"]
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(reply.content)
    with safetensors.safe_open(file, "numpy") as opened:
        text = opened.metadata()
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    assert set(found) == {f"{name}{slot}" for name in SHAPES for slot in ("", ":m", ":v")}
    assert all(found[f"{name}{slot}"].shape == shape for name, shape in SHAPES.items() for slot in ("", ":m", ":v"))
    assert {array.dtype.name for array in found.values()} == {"float32"}
    held = params(client, session)
    assert all(bits(found[name]) == bits(held[name]) for name in SHAPES)
    sent = [gradients(t) for t in range(2)]
    for name in SHAPES:
        moment = 0.9 * 0.1 * sent[0][name].astype(np.float64) + 0.1 * sent[1][name].astype(np.float64)
        np.testing.assert_allclose(found[f"{name}:m"], moment, rtol=1e-5, atol=1e-7)
    recipe = json.loads(text["recipe"])
    shown = client.get(f"/v1/sessions/{session}").json()
    assert text["step"] == "2"
    assert {name: shown[name] for name in recipe} == recipe
    assert {"optimizer", "shapes", "dtype", "groups", "averaging", "name", "labels", "non_finite"} <= recipe.keys()


def test_slots_are_named_after_their_tensors(client: httpx.Client) -> None:
    for kind, members, slots in [
        ("sgd", {}, {""}),
        ("momentum", {}, {"", ":v"}),
        ("adagrad", {}, {"", ":G"}),
        ("rmsprop", {"centered": True, "momentum": 0.5}, {"", ":s", ":mean", ":v"}),
    ]:
        session = create(client, optimizer={"kind": kind, **members}, params={"w": [1.0]})["id"]
        assert set(safetensors.numpy.load(state(client, session))) == {f"w{slot}" for slot in slots}


def test_a_matrix_is_one_tensor(client: httpx.Client) -> None:
    optimizer = {"kind": "adagrad", "matrix": "full"}
    session = create(client, optimizer=optimizer, params={"w": [1.0, 2.0], "b": 3.0})["id"]
    client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1.0, 2.0], "b": 4.0}})
    found = safetensors.numpy.load(state(client, session))
    assert set(found) == {"w", "b", ":G"}
    np.testing.assert_array_equal(found[":G"], np.outer([1, 2, 4], [1, 2, 4]))


def test_the_checkpoint_answers_to_if_none_match(client: httpx.Client) -> None:
    session = started(client, "sgd")
    path = f"/v1/sessions/{session}/state"
    etag = client.get(path).headers["etag"]
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
    advance(client, session, "sgd", range(1))
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 200
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(state(client, session))


# -- files that are no checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(server: Any) -> bytes:
    with server.client() as client:
        session = create(client, optimizer="adam", params={"w": [1.0, 2.0]})["id"]
        step(client, session, {"w": np.float32([1, 1])})
        return state(client, session)


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ({"ravine": None}, "invalid-checkpoint"),
        ({"ravine": "2"}, "invalid-checkpoint"),
        ({"recipe": None}, "invalid-checkpoint"),
        ({"recipe": "{"}, "invalid-checkpoint"),
        ({"recipe": "[]"}, "invalid-checkpoint"),
        ({"recipe": "NaN"}, "invalid-checkpoint"),
        ({"recipe": "[" * 100_000}, "invalid-checkpoint"),
        ({"recipe": "{}"}, "invalid-request"),
        ({"step": None}, "invalid-checkpoint"),
        ({"step": ""}, "invalid-checkpoint"),
        ({"step": "-1"}, "invalid-checkpoint"),
        ({"step": "1.0"}, "invalid-checkpoint"),
        ({"step": "1_0"}, "invalid-checkpoint"),
        ({"step": "٣"}, "invalid-checkpoint"),
        ({"step": str(2**53)}, "invalid-checkpoint"),
        ({"step": str(2**70)}, "invalid-checkpoint"),
        ({"step": "9" * 5000}, "invalid-checkpoint"),
        ({"moves": "2"}, "invalid-checkpoint"),
        ({"moves": "-1"}, "invalid-checkpoint"),
        ({"moves": ""}, "invalid-checkpoint"),
        ({"moves": "x"}, "invalid-checkpoint"),
        ({"moves": "9" * 5000}, "invalid-checkpoint"),
    ],
)
def test_text_that_is_no_checkpoints(
    client: httpx.Client, checkpoint: bytes, text: dict[str, str | None], slug: str
) -> None:
    refused(client.post("/v1/sessions", content=with_metadata(checkpoint, **text), headers=SAFETENSORS), 422, slug)


@pytest.mark.parametrize(
    ("change", "slug"),
    [
        (lambda recipe: recipe["optimizer"].update(beta1=1.0), "invalid-request"),
        (lambda recipe: recipe["optimizer"].update(kind="nadamax"), "invalid-request"),
        (lambda recipe: recipe["optimizer"].update(extra=1), "invalid-request"),
        (lambda recipe: recipe.update(extra=1), "invalid-request"),
        (lambda recipe: recipe.update(dtype="float64"), "invalid-checkpoint"),
        (lambda recipe: recipe["shapes"].update(w=[3]), "invalid-checkpoint"),
        (lambda recipe: recipe["shapes"].update(v=[3]), "invalid-checkpoint"),
        (lambda recipe: recipe["shapes"].update(v=[2**40]), "invalid-request"),
        (lambda recipe: recipe["shapes"].update(v=[0, 2**48, 2**48]), "invalid-request"),
        (lambda recipe: recipe.update(optimizer={"kind": "sgd"}), "invalid-checkpoint"),
        (lambda recipe: recipe.update(optimizer={"kind": "momentum"}), "invalid-checkpoint"),
    ],
)
def test_a_recipe_that_does_not_fit(client: httpx.Client, checkpoint: bytes, change: Any, slug: str) -> None:
    recipe = json.loads(metadata_of(checkpoint)["recipe"])
    change(recipe)
    file = with_metadata(checkpoint, recipe=json.dumps(recipe))
    refused(client.post("/v1/sessions", content=file, headers=SAFETENSORS), 422, slug)


def test_tensors_that_do_not_fit(client: httpx.Client, checkpoint: bytes) -> None:
    text, whole = metadata_of(checkpoint), safetensors.numpy.load(checkpoint)
    less = {name: array for name, array in whole.items() if name != "w:v"}
    for damaged in (less, whole | {"w:x": whole["w"]}, whole | {"w": np.float32([1])}, whole | {"w": np.ones(2)}):
        file = saved(damaged, text)
        refused(client.post("/v1/sessions", content=file, headers=SAFETENSORS), 422, "invalid-checkpoint")
    file = saved(whole)
    refused(client.post("/v1/sessions", content=file, headers=SAFETENSORS), 422, "invalid-checkpoint")


# -- parameters set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_parameters_put_at_step_0_are_held_from_then_on(client: httpx.Client, form: str) -> None:
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, shapes={"w": [2], "b": []})["id"]
    path = f"/v1/sessions/{session}"
    refused(client.get(f"{path}/params"), 409, "params-not-held")
    values = {"w": np.float32([1, 2]), "b": np.float32(3)}
    if form == "json":
        reply = client.put(f"{path}/params", json={"params": {name: value.tolist() for name, value in values.items()}})
    else:
        reply = client.put(f"{path}/params", content=saved(values), headers=SAFETENSORS)
    assert (reply.status_code, reply.json()) == (200, {"step": 0})
    shown = client.get(path)
    assert (shown.json()["holds_params"], shown.json()["step"], shown.json()["state_bytes"]) == (True, 0, 12)
    assert shown.headers["etag"] == reply.headers["etag"]
    assert client.get(f"{path}/params").json()["params"] == {"w": [1.0, 2.0], "b": 3.0}
    taken = client.post(f"{path}/steps", json={"gradients": {"w": [1.0, 1.0], "b": 1.0}}).json()
    assert taken["params"] == {"w": [0.0, 1.0], "b": 2.0}


def test_parameters_put_later_leave_moments_and_step(client: httpx.Client) -> None:
    session = started(client, "adam")
    advance(client, session, "adam", range(3))
    before = safetensors.numpy.load(state(client, session))
    other = {name: np.float32(array) for name, array in gradients(50).items()}
    etag = client.get(f"/v1/sessions/{session}").headers["etag"]
    path = f"/v1/sessions/{session}/params"
    reply = client.put(path, content=saved(other), headers=SAFETENSORS | {"If-Match": etag})
    assert (reply.status_code, reply.json()["step"], reply.headers["ravine-step"]) == (200, 3, "3")
    assert reply.headers["etag"].startswith('"3-')
    assert reply.headers["etag"] != etag
    after = safetensors.numpy.load(state(client, session))
    for name, array in after.items():
        assert bits(array) == bits(other[name] if name in other else before[name]), name
    assert len(standing(client, session)["history"]["data"]) == 3


def test_a_client_that_holds_its_parameters_cannot_give_them_later(client: httpx.Client) -> None:
    session = create(client, optimizer="adam", shapes={"w": [1]})["id"]
    step(client, session, {"w": np.float32([1])})
    with unchanged(client, session):
        reply = client.put(f"/v1/sessions/{session}/params", json={"params": {"w": [1.0]}})
        refused(reply, 409, "params-not-held")
