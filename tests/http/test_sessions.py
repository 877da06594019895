"""Sessions made, shown, listed, changed and deleted."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from core.optimizers import KINDS
from core.recipe import describe
from tests.http import arithmetic
from tests.http.files import header_of, saved, step
from tests.http.refusals import refused
from tests.running import Server
from tests.wire import SAFETENSORS, create, params

MEMBERS = {
    "id", "name", "labels", "step", "optimizer", "dtype", "shapes", "size", "state_bytes", "holds_params",
    "transforms", "groups", "averaging", "aggregation", "non_finite", "created_at", "updated_at", "skipped",
    "state_dtype", "state_seed", "round_bytes",
}  # fmt: skip
ASYNC = {"mode": "async", "reduce": {"kind": "mean"}, "worker_timeout": 60.0}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def listed(client: httpx.Client, **query: Any) -> tuple[list[str], bool]:
    reply = client.get("/v1/sessions", params=query)
    assert reply.status_code == 200, reply.text
    assert reply.json().keys() == {"data", "has_more"}
    return [session["id"] for session in reply.json()["data"]], reply.json()["has_more"]


# -- made ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["name", "object"])
def test_every_kind_by_name_and_as_an_object(client: httpx.Client, kind: str, dtype: str, form: str) -> None:
    usual = describe(KINDS[kind]())
    given = {"lr": 0.25} if "lr" in usual else {"base": "sgd"}
    optimizer: Any = kind if form == "name" else {"kind": kind, **given}
    body = {"optimizer": optimizer, "params": {"w": [[1.0, 2.0, 3.0]], "b": 0.5}, "dtype": dtype}
    reply = client.post("/v1/sessions", json=body)
    assert reply.status_code == 201, reply.text
    made = reply.json()
    assert made.keys() == MEMBERS
    assert re.fullmatch("ses_[a-z0-9]{20,}", made["id"])
    assert reply.headers["location"] == f"/v1/sessions/{made['id']}"
    assert re.fullmatch(r'"0-[A-Za-z0-9_-]+"', reply.headers["etag"])
    assert reply.headers["ravine-step"] == "0"
    held = header_of(client.get(f"/v1/sessions/{made['id']}/state").content)
    weight = sum(np.subtract(*tensor["data_offsets"][::-1]) for name, tensor in held.items() if name != "__metadata__")
    assert (made["size"], made["state_bytes"]) == (4, weight)
    assert (made["step"], made["holds_params"], made["skipped"]) == (0, True, 0)
    assert (made["dtype"], made["shapes"]) == (dtype, {"w": [1, 3], "b": []})
    assert (made["state_dtype"], made["state_seed"]) == (None, None)
    shown = {} if form == "name" else {"lr": 0.25} if "lr" in usual else {"base": {"kind": "sgd", "lr": 1e-3}}
    assert made["optimizer"] == usual | shown
    assert TIME.fullmatch(made["created_at"])
    assert TIME.fullmatch(made["updated_at"])
    assert client.get(f"/v1/sessions/{made['id']}").json() == made


def test_what_is_left_out_is_shown_with_its_default(client: httpx.Client) -> None:
    made = create(client, optimizer="adam", shapes={"w": [2, 3]})
    adam = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_inside": False, "bias_correction": True}
    adam |= {"eps_hat": False, "amsgrad": False, "nesterov": False, "cautious": False}
    assert made["optimizer"] == {"kind": "adam"} | adam
    assert (made["name"], made["labels"], made["groups"], made["transforms"]) == (None, {}, [], [])
    assert (made["averaging"], made["aggregation"], made["non_finite"]) == (None, ASYNC, "reject")
    assert (made["dtype"], made["holds_params"], made["size"], made["state_bytes"]) == ("float32", False, 6, 48)


def test_what_is_given_is_shown_as_it_is(client: httpx.Client) -> None:
    body = {
        "optimizer": {
            "kind": "momentum",
            "lr": {"kind": "cosine", "init": 0.1, "steps": 1000, "floor": 0.0, "exponent": 1.0},
            "momentum": {"kind": "linear", "init": 0.5, "end": 0.9, "steps": 500},
            "dampening": 0.0,
            "nesterov": "lookahead",
            "lr_in_velocity": False,
            "first_step": "damped",
        },
        "shapes": {"a/b.weight": [2, 0, 3], "c": []},
        "dtype": "float64",
        "name": "Größe 1",
        "labels": {"team": "vision", "ünïcode": "", "path": "a:b:c"},
        "groups": [{"match": "*.weight", "lr": 0.5}, {"match": "c", "frozen": True}],
        "non_finite": "skip",
        "aggregation": ASYNC,
    }
    made = create(client, **body)
    assert {name: made[name] for name in body} == body | {"groups": made["groups"]}
    assert [group["match"] for group in made["groups"]] == ["*.weight", "c"]
    assert made["groups"][0]["lr"] == 0.5
    assert made["groups"][1]["frozen"] is True


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"kind": "ema", "decay": 0.9}, {"kind": "ema", "decay": 0.9, "debias": True, "start": "zero"}),
        ({"kind": "polyak", "start": 100}, {"kind": "polyak", "start": 100}),
        ("polyak", {"kind": "polyak", "start": 0}),
        (None, None),
    ],
)
def test_averaging(client: httpx.Client, given: object, shown: object) -> None:
    assert create(client, optimizer="sgd", params={"w": [1.0]}, averaging=given)["averaging"] == shown


def test_groups_have_hyperparameters_of_their_own(client: httpx.Client) -> None:
    groups = [{"match": "*.bias", "lr": 0.5}, {"match": "b.*", "lr": 0.25}, {"match": "still", "frozen": True}]
    zeros = {"a.w": [0.0], "a.bias": [0.0], "b.bias": [0.0], "still": [0.0]}
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params=zeros, groups=groups)["id"]
    reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {name: [1.0] for name in zeros}})
    # The last match decides: b.bias is of both groups.
    assert reply.json()["params"] == {"a.w": [-1.0], "a.bias": [-0.5], "b.bias": [-0.25], "still": [0.0]}


def test_two_sessions_never_share_an_id_or_a_commit(client: httpx.Client) -> None:
    replies = [client.post("/v1/sessions", json={"optimizer": "sgd", "shapes": {"w": [1]}}) for _ in range(20)]
    assert len({reply.json()["id"] for reply in replies}) == 20
    assert len({reply.headers["etag"] for reply in replies}) == 20


# -- shown and listed ------------------------------------------------------------------------------------------


def test_a_session_is_shown_until_it_changes(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    path = f"/v1/sessions/{session}"
    first = client.get(path)
    again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    step(client, session, {"w": np.float32([1.0])})
    changed = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.json()["step"], changed.headers["ravine-step"]) == (200, 1, "1")
    assert changed.json()["created_at"] == first.json()["created_at"] < changed.json()["updated_at"]
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", changed.headers["etag"])


def test_lists_are_newest_first_in_pages(client: httpx.Client) -> None:
    made = [create(client, optimizer="sgd", shapes={"w": [1]})["id"] for _ in range(5)][::-1]
    found, more = listed(client, limit=5)
    assert sorted(found) == sorted(made)
    # Those made in one millisecond may stand in any order, but each page goes on where the one before ended.
    assert found == sorted(found, reverse=True)
    pages: list[str] = []
    after: dict[str, str] = {}
    for length in (2, 2, 1):
        page, more = listed(client, limit=length, **after)
        assert len(page) == length
        pages += page
        after = {"after": page[-1]}
    assert pages == found
    assert more == bool(listed(client, limit=1, **after)[0])


def test_twenty_are_listed_where_no_limit_is_given(client: httpx.Client) -> None:
    for _ in range(21):
        create(client, optimizer="sgd", shapes={"w": [1]})
    found, more = listed(client)
    assert (len(found), more) == (20, True)
    assert len(listed(client, limit=100)[0]) > 20


def test_a_label_selects(client: httpx.Client) -> None:
    wanted = [create(client, optimizer="sgd", shapes={"w": [1]}, labels={"pick": "a:b", "n": str(i)}) for i in range(3)]
    create(client, optimizer="sgd", shapes={"w": [1]}, labels={"pick": "a"})
    ids = sorted((session["id"] for session in wanted), reverse=True)
    assert listed(client, label="pick:a:b") == (ids, False)
    assert listed(client, label="pick:a:b", limit=2) == (ids[:2], True)
    assert listed(client, label="pick:a:b", limit=2, after=ids[1]) == (ids[2:], False)
    assert listed(client, label="pick:nobody") == ([], False)
    client.patch(f"/v1/sessions/{ids[0]}", json={"labels": {"pick": "other"}})
    client.delete(f"/v1/sessions/{ids[1]}")
    assert listed(client, label="pick:a:b") == (ids[2:], False)
    assert listed(client, label="pick:other") == (ids[:1], False)


# -- changed ---------------------------------------------------------------------------------------------------


def test_a_patch_changes_what_it_names(client: httpx.Client) -> None:
    made = create(client, optimizer="adam", params={"w": [1.0]}, name="first", labels={"a": "1"})
    path = f"/v1/sessions/{made['id']}"
    reply = client.patch(path, json={"name": "second"})
    assert reply.status_code == 200
    changed = reply.json()
    assert changed | {"updated_at": made["updated_at"]} == made | {"name": "second"}
    assert changed["updated_at"] > made["updated_at"]
    assert reply.headers["etag"].startswith('"0-')
    assert client.patch(path, json={"labels": {"b": "2"}}).json()["labels"] == {"b": "2"}
    cleared = client.patch(path, json={"name": None, "optimizer": {"kind": "adam", "beta1": 0.5}}).json()
    assert cleared["name"] is None
    assert cleared["optimizer"] == made["optimizer"] | {"beta1": 0.5}
    assert cleared["labels"] == {"b": "2"}
    assert client.get(path).json() == cleared


def test_a_patch_is_a_commit_of_its_own(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    path = f"/v1/sessions/{session}"
    before = client.get(path).headers["etag"]
    changed = client.patch(path, json={"name": "n"}, headers={"If-Match": before})
    assert changed.status_code == 200
    assert changed.headers["etag"] != before
    document = refused(client.patch(path, json={"name": "m"}, headers={"If-Match": before}), 412, "step-conflict")
    assert document["step"] == 0
    assert client.get(path).json()["name"] == "n"


def test_the_moments_stay_when_hyperparameters_change(client: httpx.Client) -> None:
    rng = np.random.default_rng(7)
    start, gradients = rng.standard_normal(5), rng.standard_normal((6, 5))
    optimizer = {"kind": "adam", "lr": 0.1}
    session = create(client, optimizer=optimizer, params={"w": start.tolist()}, dtype="float64")["id"]
    slots: dict[str, Any] = {}
    expected = arithmetic.trajectory(arithmetic.adam(0.1), start, gradients[:3], slots)
    later = arithmetic.adam(0.02, beta1=0.5, beta2=0.9, eps=1e-3)
    expected += arithmetic.trajectory(later, expected[-1], gradients[3:], slots, t=3)
    for t, g in enumerate(gradients):
        if t == 3:
            change = {"optimizer": {"lr": 0.02, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3}}
            assert client.patch(f"/v1/sessions/{session}", json=change).status_code == 200
        assert step(client, session, {"w": g}).status_code == 200
        np.testing.assert_allclose(params(client, session)["w"], expected[t], rtol=1e-12)


def test_the_moments_stay_when_groups_change(client: httpx.Client) -> None:
    rule = arithmetic.momentum(0.1, 0.9)
    optimizer = {"kind": "momentum", "lr": 0.1, "momentum": 0.9}
    session = create(client, optimizer=optimizer, params={"w": [0.0], "b": [0.0]}, dtype="float64")["id"]
    slots: dict[str, Any] = {}
    first = arithmetic.trajectory(rule, [0.0], [[1.0], [2.0]], slots)
    for g in (1.0, 2.0):
        step(client, session, {"w": np.array([g]), "b": np.array([g])})
    groups = [{"match": "b", "frozen": True}, {"match": "w", "lr": 0.5}]
    assert client.patch(f"/v1/sessions/{session}", json={"groups": groups}).status_code == 200
    step(client, session, {"w": np.array([3.0]), "b": np.array([3.0])})
    after = params(client, session)
    faster = arithmetic.trajectory(arithmetic.momentum(0.5, 0.9), first[-1], [[3.0]], dict(slots), t=2)
    np.testing.assert_allclose(after["w"], faster[-1], rtol=1e-12)
    np.testing.assert_allclose(after["b"], first[-1], rtol=1e-12)
    # Thawed, b goes on with the velocity that it had.
    assert client.patch(f"/v1/sessions/{session}", json={"groups": []}).status_code == 200
    step(client, session, {"w": np.array([4.0]), "b": np.array([4.0])})
    thawed = arithmetic.trajectory(rule, first[-1], [[4.0]], slots, t=3)
    np.testing.assert_allclose(params(client, session)["b"], thawed[-1], rtol=1e-12)


def test_another_kind_is_refused(client: httpx.Client) -> None:
    session = create(client, optimizer="adam", params={"w": [1.0]})["id"]
    document = refused(client.patch(f"/v1/sessions/{session}", json={"optimizer": "sgd"}), 422, "invalid-request")
    assert document["errors"][0]["pointer"] == "/optimizer/kind"


# -- deleted ---------------------------------------------------------------------------------------------------


def keys_of(server: Server, session: str) -> list[str]:
    """Every key of the store with the session's name, and the indexes that still have it."""
    names = [name for name in server.valkey("KEYS", "*").strip("[]").replace("'", "").split(", ") if name]
    owned = [name for name in names if session in name]
    indexes = ["ravine:sessions", "ravine:label:gone:soon"]
    return owned + [name for name in indexes if server.valkey("ZSCORE", name, session) != "None"]


def test_nothing_of_a_deleted_session_is_left(server: Server, client: httpx.Client) -> None:
    size = 40_000  # large enough to be stored in chunks of their own
    made = create(client, optimizer="adam", shapes={"w": [size]}, labels={"gone": "soon"})
    session = made["id"]
    for _ in range(3):
        reply = step(client, session, {"w": np.ones(size, np.float32)}, {"Idempotency-Key": str(_)})
        assert reply.status_code == 200
    assert any(":p:" in name or ":s:" in name for name in keys_of(server, session))
    reply = client.delete(f"/v1/sessions/{session}")
    assert (reply.status_code, reply.content) == (204, b"")
    assert keys_of(server, session) == []
    path = f"/v1/sessions/{session}"
    gradients = {"gradients": {"w": [1.0]}}
    calls = [
        ("DELETE", path, None),
        ("GET", path, None),
        ("PATCH", path, {"name": "n"}),
        ("POST", f"{path}/fork", None),
        ("GET", f"{path}/history", None),
        ("GET", f"{path}/state", None),
        ("GET", f"{path}/params", None),
        ("PUT", f"{path}/params", {"params": {"w": [1.0]}}),
        ("POST", f"{path}/steps", gradients),
        ("GET", f"{path}/events", None),
    ]
    for method, url, body in calls:
        refused(client.request(method, url, json=body), 404, "session-not-found")
    assert session not in listed(client, limit=100)[0]
    assert keys_of(server, session) == []


def test_a_delete_may_be_guarded(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    path = f"/v1/sessions/{session}"
    assert refused(client.delete(path, headers={"If-Match": '"1"'}), 412, "step-conflict")["step"] == 0
    assert client.delete(path, headers={"If-Match": '"0"'}).status_code == 204


@pytest.mark.parametrize("size", [3, 40_000])
def test_a_session_deleted_while_it_is_at_work(server: Server, size: int) -> None:
    """Whatever is under way is done or is a 404, and no key comes back."""
    g = {"w": np.ones(size, np.float32)}
    with server.client() as client:
        session = create(client, optimizer="adam", shapes={"w": [size]})["id"]
        path = f"/v1/sessions/{session}"
        assert client.put(f"{path}/params", content=saved(g), headers=SAFETENSORS).status_code == 200

    at_work = threading.Barrier(7)

    def work(call: int) -> list[int]:
        """The statuses of one call made over and over, until it is a 404."""
        found: list[int] = []
        with server.client() as own:
            while not found or found[-1] != 404:
                if len(found) == 1:
                    at_work.wait(60)
                if call == 0:
                    found.append(step(own, session, g).status_code)
                elif call == 1:
                    found.append(own.put(f"{path}/params", content=saved(g), headers=SAFETENSORS).status_code)
                elif call == 2:
                    found.append(own.patch(path, json={"name": str(len(found))}).status_code)
                else:
                    found.append(own.get(f"{path}/{('params', 'state', 'history')[call - 3]}").status_code)
        return found

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(work, call) for call in range(6)]
        at_work.wait(60)
        time.sleep(0.1)
        with server.client() as client:
            assert client.delete(path).status_code == 204
        statuses = [future.result() for future in running]
    assert {status for found in statuses for status in found[:-1]} == {200}
    # Chunks on their way to a commit that came too late lie under temporary names, which the store lets go by itself.
    kept = [name for name in keys_of(server, session) if int(server.valkey("TTL", name)) < 0]
    assert kept == []
