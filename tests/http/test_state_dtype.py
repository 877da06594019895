"""Moments kept in bfloat16: half the memory, rounded at random by a seed that is part of the session."""

import json
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from core.optimizers import KINDS
from tests.http import arithmetic
from tests.http.files import described, header_of, metadata_of, step, with_metadata
from tests.http.refusals import pointers, refused, unchanged
from tests.wire import SAFETENSORS, bits, create, params, tensors

COMPACT = {"state_dtype": "bfloat16"}
SIZE = 64
ADAM = {"kind": "adam", "lr": 0.1}


def begun(client: httpx.Client, optimizer: Any = ADAM, **members: Any) -> dict[str, Any]:
    return create(client, **{"optimizer": optimizer, "params": {"w": [0.5] * SIZE}} | COMPACT | members)


def advance(client: httpx.Client, session: str, steps: range, size: int = SIZE) -> bytes:
    """The bits of the parameters behind them."""
    for t in steps:
        g = np.random.default_rng(t).standard_normal(size).astype(np.float32)
        got = tensors(step(client, session, {"w": g}))["w"]
    return bits(got)


def state(client: httpx.Client, session: str) -> bytes:
    reply = client.get(f"/v1/sessions/{session}/state")
    assert reply.status_code == 200, reply.text
    return reply.content


def dtypes(file: bytes) -> dict[str, str]:
    return {name: tensor["dtype"] for name, tensor in header_of(file).items() if name != "__metadata__"}


# -- the seed ----------------------------------------------------------------------------------------------------------


def test_a_seed_is_drawn_and_shown(client: httpx.Client) -> None:
    made = [begun(client) for _ in range(4)]
    seeds = [session["state_seed"] for session in made]
    assert all(type(seed) is int and 0 <= seed < 2**53 for seed in seeds)
    assert len(set(seeds)) == 4
    for session in made:
        assert session["state_dtype"] == "bfloat16"
        assert client.get(f"/v1/sessions/{session['id']}").json() == session


def test_the_seed_that_is_given_decides(client: httpx.Client) -> None:
    made = [begun(client, state_seed=seed) for seed in (7, 7, 8, 0, 2**53 - 1)]
    assert [session["state_seed"] for session in made] == [7, 7, 8, 0, 2**53 - 1]
    ends = [advance(client, session["id"], range(1, 6)) for session in made]
    assert ends[0] == ends[1]
    assert len(set(ends)) == 4


@pytest.mark.parametrize("seed", [-1, 2**53, 1.5, True, "1"])
def test_what_is_no_seed(client: httpx.Client, seed: object) -> None:
    body = {"optimizer": "adam", "shapes": {"w": [2]}, "state_seed": seed} | COMPACT
    assert pointers(refused(client.post("/v1/sessions", json=body), 422, "invalid-request")) == {"/state_seed"}


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_the_state_weighs_half_and_the_method_is_the_same(client: httpx.Client) -> None:
    made = begun(client)
    assert made["state_bytes"] == SIZE * (4 + 2 + 2)
    assert begun(client, dtype="float64")["state_bytes"] == SIZE * (8 + 2 + 2)
    advance(client, made["id"], range(1, 11))
    sent = [np.random.default_rng(t).standard_normal(SIZE).astype(np.float32) for t in range(1, 11)]
    expected = arithmetic.trajectory(arithmetic.adam(0.1), np.full(SIZE, 0.5), sent)[-1]
    off = params(client, made["id"])["w"] - expected
    assert 0.0 < np.abs(off).max() < 0.02  # a rate of 0.1 and ten steps, each within 2^-8


def test_the_slots_of_wrappers_averages_and_transforms_stay_as_they_are(client: httpx.Client) -> None:
    optimizer = {"kind": "lookahead", "base": ADAM}
    more = {"averaging": "ema", "transforms": [{"kind": "ema", "decay": 0.9}]}
    made = begun(client, optimizer, **more)
    advance(client, made["id"], range(1, 4))
    found = dtypes(state(client, made["id"]))
    assert found == {
        "w": "F32", "w:m": "BF16", "w:v": "BF16", "w:lag": "F32", "w:average": "F32", "w:ema.mean": "F32",
        ":ema.rest": "F64",
    }  # fmt: skip
    assert made["state_bytes"] == SIZE * (4 + 2 + 2 + 4 + 4 + 4) + 8


def test_a_slot_that_a_change_brings_is_kept_in_it_too(client: httpx.Client) -> None:
    session = begun(client, "rmsprop")["id"]
    advance(client, session, range(1, 3))
    before = header_of(state(client, session))
    assert client.patch(f"/v1/sessions/{session}", json={"optimizer": {"centered": True}}).status_code == 200
    assert dtypes(state(client, session)) == {"w": "F32", "w:s": "BF16", "w:mean": "BF16"}
    assert before["w:s"]["shape"] == [SIZE]
    advance(client, session, range(3, 5))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_bfloat16_and_is_restored(client: httpx.Client) -> None:
    session = begun(client, state_seed=11)["id"]
    advance(client, session, range(1, 4))
    file = state(client, session)
    assert dtypes(file) == {"w": "F32", "w:m": "BF16", "w:v": "BF16"}
    recipe = json.loads(metadata_of(file)["recipe"])
    assert (recipe["state_dtype"], recipe["state_seed"]) == ("bfloat16", 11)
    again = client.post("/v1/sessions", content=file, headers=SAFETENSORS)
    assert again.status_code == 201, again.text
    assert (again.json()["state_dtype"], again.json()["state_seed"], again.json()["step"]) == ("bfloat16", 11, 3)
    fork = client.post(f"/v1/sessions/{session}/fork").json()
    assert fork["state_seed"] == 11
    ends = {advance(client, id_, range(4, 7)) for id_ in (session, again.json()["id"], fork["id"])}
    assert len(ends) == 1
    assert len({state(client, id_) for id_ in (session, again.json()["id"], fork["id"])}) == 1


def test_a_file_whose_slots_are_of_another_dtype_is_refused(client: httpx.Client) -> None:
    compact, plain = begun(client)["id"], begun(client, state_dtype=None)["id"]
    for session in (compact, plain):
        advance(client, session, range(1, 2))
    files = state(client, compact), state(client, plain)
    for file, other in (files, files[::-1]):
        swapped = with_metadata(file, recipe=metadata_of(other)["recipe"])
        refused(client.post("/v1/sessions", content=swapped, headers=SAFETENSORS), 422, "invalid-checkpoint")


def test_a_file_without_its_seed_gets_one(client: httpx.Client) -> None:
    """Where only the seed is missing one is drawn, as for a new session: the moments are all there."""
    session = begun(client, state_seed=11)["id"]
    advance(client, session, range(1, 3))
    file = state(client, session)
    recipe = json.loads(metadata_of(file)["recipe"])
    del recipe["state_seed"]
    reply = client.post("/v1/sessions", content=with_metadata(file, recipe=json.dumps(recipe)), headers=SAFETENSORS)
    assert reply.status_code == 201, reply.text
    assert reply.json()["state_seed"] not in (None, 11)


def test_gradients_may_be_bfloat16_beside_it(client: httpx.Client) -> None:
    session = begun(client, params={"w": [0.5, 0.5]})["id"]
    file = described({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"\x80\x3f\x80\xbf")  # 1, -1
    got = tensors(client.post(f"/v1/sessions/{session}/steps", content=file, headers=SAFETENSORS))["w"]
    assert got[0] < 0.5 < got[1]


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kinds_that_keep_something_else_than_means(client: httpx.Client, kind: str) -> None:
    entry = client.get(f"/v1/optimizers/{kind}").json()
    reply = client.post("/v1/sessions", json={"optimizer": kind, "shapes": {"w": [2]}} | COMPACT)
    if entry["bfloat16"]:
        assert reply.status_code == 201, reply.text
        return
    assert entry["family"] != "elements" or not entry["slots"] or kind in (
        "adan", "rprop", "asgd", "schedule_free", "ftrl", "fedadagrad", "fedyogi",
    )  # fmt: skip
    document = refused(reply, 422, "invalid-request")
    assert pointers(document) == {"/state_dtype"}
    assert kind in document["errors"][0]["detail"]


@pytest.mark.parametrize("given", ["float16", "float32", "bf16", "", 16, True])
def test_other_dtypes_of_the_state(client: httpx.Client, given: object) -> None:
    body = {"optimizer": "adam", "shapes": {"w": [2]}, "state_dtype": given}
    assert pointers(refused(client.post("/v1/sessions", json=body), 422, "invalid-request")) == {"/state_dtype"}


def test_matrices_are_not_kept_in_it(client: httpx.Client) -> None:
    body = {"optimizer": {"kind": "adagrad", "matrix": "full"}, "shapes": {"w": [2]}} | COMPACT
    assert pointers(refused(client.post("/v1/sessions", json=body), 422, "invalid-request")) == {"/state_dtype"}


@pytest.mark.parametrize("change", [{"state_dtype": None}, {"state_dtype": "bfloat16"}, {"state_seed": 1}])
def test_it_cannot_change_later(client: httpx.Client, change: dict[str, Any]) -> None:
    session = begun(client)["id"]
    with unchanged(client, session):
        document = refused(client.patch(f"/v1/sessions/{session}", json=change), 422, "invalid-request")
        assert pointers(document) == {"/" + next(iter(change))}


def test_without_it_nothing_is_said_of_a_seed(client: httpx.Client) -> None:
    made = create(client, optimizer="adam", shapes={"w": [2]}, state_dtype=None, state_seed=None)
    assert (made["state_dtype"], made["state_seed"]) == (None, None)
    assert safetensors.numpy.load(state(client, made["id"]))["w:m"].dtype == np.float32


def test_a_seed_without_a_state_dtype_is_refused(client: httpx.Client) -> None:
    body = {"optimizer": "adam", "shapes": {"w": [2]}, "state_seed": 7}
    assert pointers(refused(client.post("/v1/sessions", json=body), 422, "invalid-request")) == {"/state_seed"}
