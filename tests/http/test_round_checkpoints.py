"""Checkpoints of sessions that several work on, whose arrays and names nobody can have left there: refused."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.http.contributions import post
from tests.http.files import metadata_of, saved, with_metadata
from tests.http.refusals import refused
from tests.wire import SAFETENSORS, create, tensors

SYNC = {"mode": "sync", "workers": 3}
DELAYED: dict[str, Any] = {"mode": "async", "delay_compensation": {}, "workers": 2}
HELD, AWAY = {"params": {"w": [0.5, 0.5]}}, {"shapes": {"w": [2]}}
G = {"w": np.array([1.0, 2.0])}
# Names that no worker can have sent.
NO_NAMES = ("", "a b", "a:b", "ä", "a" * 65, "a\n")

# The array, the session, and what came beside the gradient.
BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    ":round.hessian": ({"optimizer": "newton", **HELD}, {":hessian": np.eye(2)}),
    ":round.hessian_diagonal": ({"optimizer": "sophia", **HELD}, {"w:hessian_diagonal": np.ones(2)}),
    ":round.params": ({"optimizer": "adamw", **AWAY}, {"w:params": np.ones(2)}),
}


def checkpoint(client: httpx.Client, session: str) -> bytes:
    reply = client.get(f"/v1/sessions/{session}/state")
    assert reply.status_code == 200, reply.text
    return reply.content


def restore(client: httpx.Client, file: bytes) -> httpx.Response:
    return client.post("/v1/sessions", content=file, headers=SAFETENSORS)


@pytest.mark.parametrize("name", BESIDE)
def test_what_came_beside_a_gradient_is_finite(client: httpx.Client, name: str) -> None:
    body, more = BESIDE[name]
    session = create(client, aggregation=SYNC, **body)["id"]
    assert post(client, session, G | more, {"worker": "a"}).status_code == 202
    file = checkpoint(client, session)
    assert restore(client, file).status_code == 201
    for worst in (np.nan, np.inf, -np.inf):
        changed = safetensors.numpy.load(file)
        changed[name].flat[-1] = worst
        refused(restore(client, saved(changed, metadata_of(file))), 422, "invalid-checkpoint")


@pytest.fixture(scope="module")
def pulled(client: httpx.Client) -> bytes:
    """The checkpoint of a session with a backup for each of two workers."""
    session = create(client, optimizer="sgd", aggregation=DELAYED, **HELD)["id"]
    for worker in "ab":
        assert client.get(f"/v1/sessions/{session}/params?worker={worker}").status_code == 200
    file = checkpoint(client, session)
    assert restore(client, file).status_code == 201
    return file


@pytest.mark.parametrize("name", ["c", *NO_NAMES])
def test_backups_are_of_workers_and_no_more_than_there_are(client: httpx.Client, pulled: bytes, name: str) -> None:
    arrays = safetensors.numpy.load(pulled)
    if name != "c":
        del arrays[":delay.backup.a"]
    arrays[f":delay.backup.{name}"] = np.zeros(2, np.float32)
    refused(restore(client, saved(arrays, metadata_of(pulled))), 422, "invalid-checkpoint")


def test_where_nobody_said_how_many_there_are(client: httpx.Client, pulled: bytes) -> None:
    recipe = json.loads(metadata_of(pulled)["recipe"])
    del recipe["aggregation"]["workers"]
    backups = {f":delay.backup.w{i}": np.zeros(2, np.float32) for i in range(63)}
    file = saved(safetensors.numpy.load(pulled) | backups, metadata_of(pulled) | {"recipe": json.dumps(recipe)})
    refused(restore(client, file), 422, "invalid-checkpoint")


def renamed(ledger: dict[str, Any], name: str) -> None:
    ledger["workers"][name] = ledger["workers"].pop("a")


def contributed(ledger: dict[str, Any], name: str) -> None:
    ledger["contributed"] = [name]


@pytest.mark.parametrize("lie", [renamed, contributed])
@pytest.mark.parametrize("name", NO_NAMES)
def test_a_ledger_is_of_workers(client: httpx.Client, lie: Callable[[dict[str, Any], str], None], name: str) -> None:
    session = create(client, optimizer="sgd", aggregation=SYNC, **HELD)["id"]
    assert post(client, session, G, {"worker": "a"}).status_code == 202
    file = checkpoint(client, session)
    text = json.loads(metadata_of(file)["workers"])
    lie(text["ledger"], name)
    refused(restore(client, with_metadata(file, workers=json.dumps(text))), 422, "invalid-checkpoint")
    assert restore(client, file).status_code == 201


def test_a_session_that_ran_away_is_read_back(client: httpx.Client) -> None:
    """Its parameters, and so the workers' backups of them, hold infinity: that is where it stands."""
    made = create(client, optimizer={"kind": "sgd", "lr": 1e38}, aggregation=DELAYED, params={"w": [0.0, 0.0]})["id"]
    assert post(client, made, {"w": np.array([1e3, 0.0])}, {"worker": "a", "return": "params"}).status_code == 200
    file = checkpoint(client, made)
    assert np.isinf(safetensors.numpy.load(file)[":delay.backup.a"][0])
    again = restore(client, file)
    assert again.status_code == 201, again.text
    replies = [post(client, session, G, {"worker": "a"}) for session in (made, again.json()["id"])]
    first, second = (tensors(reply)["w"].tobytes() for reply in replies)
    assert first == second
