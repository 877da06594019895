"""Noise for privacy: only where it hides all that a worker says, and never the same twice."""

from typing import Any

import httpx
import pytest

from tests.http.refusals import pointers, refused, unchanged
from tests.http.test_aggregation import opened, point, send, told
from tests.wire import create

NOISE: dict[str, Any] = {"mode": "sync", "workers": 2, "clip_norm": 1.0, "noise_multiplier": 1.0}
ALONE = NOISE | {"mode": "async"}
del ALONE["workers"]
PLATEAU = {"kind": "plateau", "init": 0.1}
DYNAMIC = {"kind": "unscale", "dynamic": True}

# What looks at a loss, or at a gradient of which no norm was taken: neither is noisy.
UNPROTECTED: dict[str, dict[str, Any]] = {
    "polyak": {"optimizer": "polyak_sgd"},
    "bfgs": {"optimizer": "bfgs"},
    "a method under a wrapper": {"optimizer": {"kind": "lookahead", "base": {"kind": "polyak_sgd"}}},
    "a plateau": {"optimizer": {"kind": "sgd", "lr": PLATEAU}},
    "a plateau of a group": {"optimizer": "sgd", "groups": [{"match": "w", "lr": PLATEAU}]},
    "a plateau of a transform": {
        "optimizer": "sgd",
        "transforms": [{"kind": "clip_by_global_norm", "max_norm": PLATEAU}],
    },
    "zero_nans": {"optimizer": "sgd", "transforms": [{"kind": "zero_nans"}]},
    "dynamic unscale": {"optimizer": "sgd", "transforms": [DYNAMIC]},
    "dynamic unscale behind another": {"optimizer": "sgd", "transforms": [{"kind": "zero_nans"}, DYNAMIC]},
}
CHANGES: dict[str, dict[str, Any]] = {
    "a plateau": {"optimizer": {"lr": PLATEAU}},
    "a plateau of a group": {"groups": [{"match": "w", "lr": PLATEAU}]},
    **{
        name: {"transforms": UNPROTECTED[name]["transforms"]}
        for name in UNPROTECTED
        if "transforms" in UNPROTECTED[name]
    },
}


@pytest.mark.parametrize("aggregation", [NOISE, ALONE], ids=["sync", "async"])
@pytest.mark.parametrize("name", UNPROTECTED)
def test_there_is_no_noise_on_what_is_not_a_clipped_gradient(
    client: httpx.Client, name: str, aggregation: dict[str, Any]
) -> None:
    body = {"params": {"w": [0.0, 0.0]}, "aggregation": aggregation} | UNPROTECTED[name]
    found = refused(client.post("/v1/sessions", json=body), 422, "invalid-request")
    assert pointers(found) == {"/aggregation/noise_multiplier"}
    without = {key: value for key, value in aggregation.items() if key != "noise_multiplier"}
    create(client, **body | {"aggregation": without})


@pytest.mark.parametrize("name", CHANGES)
def test_nor_can_it_come_later(client: httpx.Client, name: str) -> None:
    session = opened(client, NOISE)
    for _ in range(2):
        send(client, session, [3, 4])
    with unchanged(client, session):
        found = refused(client.patch(f"/v1/sessions/{session}", json=CHANGES[name]), 422, "invalid-request")
        assert pointers(found) == {"/aggregation/noise_multiplier"}
    harmless = {"optimizer": {"lr": 0.5}, "transforms": [{"kind": "unscale", "scale": 2.0}]}
    assert client.patch(f"/v1/sessions/{session}", json=harmless).status_code == 200


def settings(shown: dict[str, Any]) -> dict[str, Any]:
    """Of a session's object what a fork has in common with it, but for the seed of its noise."""
    shown = {name: value for name, value in shown.items() if name not in ("id", "created_at", "updated_at")}
    return shown | {"aggregation": {name: value for name, value in shown["aggregation"].items() if name != "seed"}}


@pytest.mark.parametrize("seed", [{}, {"seed": 5}], ids=["drawn", "given"])
@pytest.mark.parametrize("aggregation", [NOISE, ALONE], ids=["sync", "async"])
def test_a_fork_draws_noise_of_its_own(client: httpx.Client, aggregation: dict[str, Any], seed: dict[str, int]) -> None:
    """The difference of two steps with the same noise would be that of the contributions, with none."""
    session = opened(client, aggregation | seed)
    send(client, session, [3, 4])
    origin = client.get(f"/v1/sessions/{session}").json()
    forks = [client.post(f"/v1/sessions/{session}/fork").json() for _ in range(2)]
    forks.append(client.post(f"/v1/sessions/{forks[0]['id']}/fork").json())
    assert len({shown["aggregation"]["seed"] for shown in (origin, *forks)}) == 4
    for fork in forks:
        assert fork == client.get(f"/v1/sessions/{fork['id']}").json()
        assert settings(fork) == settings(origin)
    start = point(client, session)
    assert [point(client, fork["id"]) for fork in forks] == [start] * 3
    points = [told(send(client, id_, [4, 3])) for id_ in (session, *(fork["id"] for fork in forks))]
    assert len({tuple(found) for found in points}) == 4


@pytest.mark.parametrize("aggregation", [{"mode": "async"}, {"mode": "sync", "workers": 2, "clip_norm": 1.0}])
def test_a_fork_without_noise_is_the_same(client: httpx.Client, aggregation: dict[str, Any]) -> None:
    rounded = {"optimizer": "adam", "state_dtype": "bfloat16"}
    session = opened(client, aggregation, **rounded)
    send(client, session, [3, 4])
    origin, fork = client.get(f"/v1/sessions/{session}").json(), client.post(f"/v1/sessions/{session}/fork").json()
    assert "seed" not in fork["aggregation"]
    assert fork == origin | {name: fork[name] for name in ("id", "created_at", "updated_at")}
    assert told(send(client, session, [4, 3])) == told(send(client, fork["id"], [4, 3]))
