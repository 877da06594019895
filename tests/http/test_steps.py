"""Steps: what goes in, what comes out, and that the numbers are those of the papers."""

import gzip
import json
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.http import arithmetic
from tests.http.files import bf16, described, one, record, saved, step
from tests.http.refusals import unchanged
from tests.wire import SAFETENSORS, bits, create, params, tensors

JSON = {"Content-Type": "application/json"}
ST = "application/vnd.safetensors"
RULES: dict[str, tuple[dict[str, Any], arithmetic.Rule]] = {
    "sgd": ({"kind": "sgd", "lr": 0.1}, arithmetic.sgd(0.1)),
    "momentum": ({"kind": "momentum", "lr": 0.1, "momentum": 0.8}, arithmetic.momentum(0.1, 0.8)),
    "adagrad": ({"kind": "adagrad", "lr": 0.1}, arithmetic.adagrad(0.1)),
    "rmsprop": ({"kind": "rmsprop", "lr": 0.1, "alpha": 0.9}, arithmetic.rmsprop(0.1, 0.9)),
    "adam": ({"kind": "adam", "lr": 0.1}, arithmetic.adam(0.1)),
    "adamw": ({"kind": "adamw", "lr": 0.1, "weight_decay": 0.5}, arithmetic.adamw(0.1, 0.5)),
}


def post(client: httpx.Client, session: str, **members: Any) -> httpx.Response:
    return client.post(f"/v1/sessions/{session}/steps", json=members)


def sgd(client: httpx.Client, **members: Any) -> str:
    """A session of gradient descent with rate 1: it is easy to see what was applied."""
    made: str = create(client, **({"optimizer": {"kind": "sgd", "lr": 1.0}, "params": {"w": [0.0, 0.0]}} | members))[
        "id"
    ]
    return made


# -- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 3e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("kind", RULES)
def test_the_numbers_are_those_of_the_paper(
    client: httpx.Client, kind: str, dtype: str, close: float, form: str, held: bool
) -> None:
    optimizer, rule = RULES[kind]
    rng = np.random.default_rng(3)
    start, sent = rng.standard_normal(7), rng.standard_normal((5, 7))
    whole = {"w": start[:6].reshape(2, 3), "b": start[6]}
    where = {"params": {n: v.tolist() for n, v in whole.items()}} if held else {"shapes": {"w": [2, 3], "b": []}}
    session = create(client, optimizer=optimizer, dtype=dtype, **where)["id"]
    point = start.copy()
    for t, expected in enumerate(arithmetic.trajectory(rule, start, sent)):
        g = {"w": sent[t, :6].reshape(2, 3), "b": sent[t, 6]}
        values = {"w": point[:6].reshape(2, 3), "b": point[6]} if kind == "adamw" and not held else {}
        if form == "json":
            shown = {"gradients": {n: v.tolist() for n, v in g.items()}}
            shown |= {"params": {n: v.tolist() for n, v in values.items()}} if values else {}
            body = post(client, session, **shown).json()
            got = body["params" if held else "updates"]
            assert body["step"] == t + 1
            assert body["metrics"]["lr"] == 0.1
            assert body["metrics"]["grad_norm"] == pytest.approx(np.linalg.norm(sent[t]), rel=1e-6)
        else:
            got = tensors(step(client, session, g | {f"{name}:params": value for name, value in values.items()}))
            assert got["w"].dtype == dtype
        flat = np.append(np.asarray(got["w"], np.float64).reshape(-1), np.asarray(got["b"], np.float64))
        point = flat if held else point + flat
        np.testing.assert_allclose(point, expected, rtol=close, atol=close)


def test_a_schedule_gives_the_rate_of_each_step(client: httpx.Client) -> None:
    lr = {"kind": "cosine", "init": 1.0, "steps": 4}
    session = create(client, optimizer={"kind": "sgd", "lr": lr}, params={"w": [0.0]}, dtype="float64")["id"]
    position = 0.0
    for t in range(6):
        rate = 0.5 + 0.5 * np.cos(np.pi * min(t, 4) / 4)
        position -= rate
        body = post(client, session, gradients={"w": [1.0]}).json()
        assert body["metrics"]["lr"] == pytest.approx(rate, abs=1e-15)
        assert body["params"]["w"][0] == pytest.approx(position, abs=1e-14)


def test_newton_reaches_the_minimum_of_a_parabola(client: httpx.Client) -> None:
    rng = np.random.default_rng(5)
    root = rng.standard_normal((3, 3))
    hessian, minimum = root @ root.T + np.eye(3), rng.standard_normal(3)
    start = rng.standard_normal(3)
    for form in ("json", "safetensors"):
        at = {"w": start[:2].tolist(), "b": start[2]}
        session = create(client, optimizer="newton", params=at, dtype="float64")["id"]
        g = hessian @ (start - minimum)
        sent = {"w": g[:2], "b": g[2]}
        if form == "json":
            shown = {name: value.tolist() for name, value in sent.items()}
            body = post(client, session, gradients=shown, hessian=hessian.tolist()).json()["params"]
        else:
            body = tensors(step(client, session, sent | {":hessian": hessian}))
        np.testing.assert_allclose([*body["w"], body["b"]], minimum, atol=1e-10)


# -- formats in --------------------------------------------------------------------------------------------------

EXACT = [0.5, -1.25, 3.0, -0.0078125, 0.0, 96.0]  # in every one of the formats


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("F64", np.array(EXACT, "<f8").tobytes()),
        ("F32", np.array(EXACT, "<f4").tobytes()),
        ("F16", np.array(EXACT, "<f2").tobytes()),
        ("BF16", bf16(EXACT)),
    ],
)
def test_gradients_in_every_float_format(client: httpx.Client, name: str, data: bytes, dtype: str) -> None:
    session = sgd(client, params={"w": [[0.0] * 3] * 2}, dtype=dtype)
    file = one("w", name, [2, 3], data)
    reply = client.post(f"/v1/sessions/{session}/steps", content=file, headers=SAFETENSORS)
    got = tensors(reply)["w"]
    assert (got.dtype, got.shape) == (np.dtype(dtype), (2, 3))
    np.testing.assert_array_equal(got.reshape(-1), [-x for x in EXACT])


def test_a_gradient_is_cast_before_it_is_used(client: httpx.Client) -> None:
    third = 1 / 3
    session = sgd(client, params={"w": [0.0]})
    assert tensors(step(client, session, {"w": np.array([third])}))["w"][0] == -np.float32(third)
    assert post(client, session, gradients={"w": [0.0]}).json()["metrics"]["grad_norm"] == 0.0


def test_formats_may_be_mixed_and_unaligned(client: httpx.Client) -> None:
    header = {"a": record("F16", [1]), "b": record("F64", [1], 2), "c": record("BF16", [], 10)}
    data = np.array([1.0], "<f2").tobytes() + np.array([2.0], "<f8").tobytes() + bf16(4.0)
    for padding in range(8):
        session = sgd(client, params={"a": [0.0], "b": [0.0], "c": 0.0})
        file = described(header | {"__metadata__": {"x": "y" * padding}}, data)
        reply = client.post(f"/v1/sessions/{session}/steps", content=file, headers=SAFETENSORS)
        assert {n: float(v.sum()) for n, v in tensors(reply).items()} == {"a": -1.0, "b": -2.0, "c": -4.0}


def test_octet_streams_are_read_as_safetensors(client: httpx.Client) -> None:
    session = sgd(client)
    file = saved({"w": np.float32([1, 2])})
    octets = {"Content-Type": "application/octet-stream"}
    reply = client.post(f"/v1/sessions/{session}/steps", content=file, headers=octets)
    assert reply.headers["content-type"] == ST
    np.testing.assert_array_equal(tensors(reply)["w"], [-1, -2])


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "zstd", "identity", "GZIP"])
@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_compressed_bodies(client: httpx.Client, coding: str, form: str) -> None:
    session = sgd(client, params={"w": [0.0] * 1000})
    g = np.arange(1000, dtype=np.float32)
    body = json.dumps({"gradients": {"w": g.tolist()}}).encode() if form == "json" else saved({"w": g})
    compress = {"zstd": zstandard.compress, "identity": bytes}.get(coding, gzip.compress)
    headers = (JSON if form == "json" else SAFETENSORS) | {"Content-Encoding": coding, "Accept": ST}
    reply = client.post(f"/v1/sessions/{session}/steps", content=compress(body), headers=headers)
    np.testing.assert_array_equal(tensors(reply)["w"], -g)


def test_a_body_without_its_length(client: httpx.Client) -> None:
    session = sgd(client, params={"w": [0.0] * 50_000})
    file = saved({"w": np.ones(50_000, np.float32)})
    pieces = (file[i : i + 7777] for i in range(0, len(file), 7777))
    reply = client.post(f"/v1/sessions/{session}/steps", content=pieces, headers=SAFETENSORS)
    assert "content-length" not in reply.request.headers
    assert np.all(tensors(reply)["w"] == -1.0)


# -- formats out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "accept", "received"),
    [
        ("json", None, "json"),
        ("safetensors", None, "safetensors"),
        ("json", "*/*", "json"),
        ("safetensors", "*/*", "safetensors"),
        ("json", ST, "safetensors"),
        ("safetensors", "application/json", "json"),
        ("json", "application/octet-stream", "safetensors"),
        ("json", f"application/json;q=0.5, {ST}", "safetensors"),
        ("safetensors", "text/html, application/json;q=0.1", "json"),
    ],
)
def test_the_reply_has_the_format_that_was_asked_for(
    client: httpx.Client, sent: str, accept: str | None, received: str
) -> None:
    session = sgd(client)
    body = b'{"gradients": {"w": [1, 2]}}' if sent == "json" else saved({"w": np.float32([1, 2])})
    headers = (JSON if sent == "json" else SAFETENSORS) | ({} if accept is None else {"Accept": accept})
    asked = client.build_request("POST", f"/v1/sessions/{session}/steps", content=body, headers=headers)
    if accept is None:
        del asked.headers["accept"]
    reply = client.send(asked)
    assert reply.status_code == 200, reply.text
    if received == "json":
        assert reply.headers["content-type"] == "application/json"
        assert reply.json()["params"] == {"w": [-1.0, -2.0]}
    else:
        assert reply.headers["content-type"] == ST
        np.testing.assert_array_equal(tensors(reply)["w"], [-1, -2])


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("returned", ["params", "updates", "none", None])
def test_what_is_returned(client: httpx.Client, held: bool, form: str, returned: str | None) -> None:
    where = {"params": {"w": [4.0, 8.0]}} if held else {"shapes": {"w": [2]}}
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, **where)["id"]
    path = f"/v1/sessions/{session}/steps"
    if form == "json":
        more = {} if returned is None else {"return": returned}
        reply = client.post(path, json={"gradients": {"w": [1.0, 2.0]}} | more)
    else:
        query = {} if returned is None else {"return": returned}
        reply = client.post(path, content=saved({"w": np.float32([1, 2])}), headers=SAFETENSORS, params=query)
    if returned == "params" and not held:
        assert (reply.status_code, reply.json()["type"]) == (409, "/problems/params-not-held")
        return
    assert reply.headers["ravine-step"] == "1"
    assert reply.headers["etag"].startswith('"1-')
    expected = {"params": [3.0, 6.0], "updates": [-1.0, -2.0], "none": None}
    kind = returned or ("params" if held else "updates")
    if form == "json":
        members = {"step", "metrics"} | ({kind} if kind != "none" else set())
        assert reply.json().keys() == members
        assert kind == "none" or reply.json()[kind] == {"w": expected[kind]}
    else:
        got = tensors(reply)
        assert set(got) == (set() if kind == "none" else {"w"})
        assert kind == "none" or got["w"].tolist() == expected[kind]


def test_prefer_minimal_is_none(client: httpx.Client) -> None:
    session = sgd(client)
    minimal = {"Prefer": "return=minimal"}
    reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1, 2]}}, headers=minimal)
    assert reply.json().keys() == {"step", "metrics"}
    assert reply.headers["preference-applied"] == "return=minimal"
    assert tensors(step(client, session, {"w": np.float32([1, 2])}, minimal)) == {}
    body = {"gradients": {"w": [1, 2]}, "return": "params"}  # what the body says goes before what is preferred
    reply = client.post(f"/v1/sessions/{session}/steps", json=body, headers=minimal)
    assert reply.json()["params"] == {"w": [-3.0, -6.0]}
    assert "preference-applied" not in reply.headers


def test_updates_are_what_to_add(client: httpx.Client) -> None:
    rng = np.random.default_rng(9)
    start = rng.standard_normal(100).astype(np.float32)
    session = create(client, optimizer="adam", params={"w": start.tolist()})["id"]
    for _ in range(3):
        file = saved({"w": rng.standard_normal(100).astype(np.float32)})
        reply = client.post(f"/v1/sessions/{session}/steps?return=updates", content=file, headers=SAFETENSORS)
        start = start + tensors(reply)["w"]
        assert bits(start) == bits(params(client, session)["w"])


# -- part of the tensors, and part of a tensor -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_tensors_left_out_keep_still(client: httpx.Client, form: str) -> None:
    optimizer, rule = RULES["momentum"]
    session = create(client, optimizer=optimizer, params={"a": [0.0], "b": [0.0]}, dtype="float64")["id"]
    path = f"/v1/sessions/{session}/steps"
    for names in ("ab", "a", "ab", ""):
        g = {name: [1.0] for name in names}
        if form == "json":
            reply = client.post(path, json={"gradients": g, "partial": True})
        else:
            reply = client.post(f"{path}?partial=true", content=saved(g), headers=SAFETENSORS)
        assert reply.status_code == 200, reply.text
    assert reply.headers["ravine-step"] == "4"
    held = params(client, session)
    np.testing.assert_allclose(held["a"], arithmetic.trajectory(rule, [0.0], [[1.0]] * 3)[-1], rtol=1e-12)
    np.testing.assert_allclose(held["b"], arithmetic.trajectory(rule, [0.0], [[1.0]] * 2)[-1], rtol=1e-12)


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize(
    ("indices", "values"),
    [
        ([1], [[1.0, 2.0]]),
        ([3, 0], [[1.0, 2.0], [4.0, 8.0]]),
        ([2, 0, 2, 2], [[1.0, 2.0], [16.0, 32.0], [4.0, 8.0], [64.0, 128.0]]),
        ([], []),
    ],
)
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "momentum", "adam"])
def test_rows(client: httpx.Client, kind: str, indices: list[int], values: list[list[float]], form: str) -> None:
    """Lazy kinds move the rows named alone; the others see zeros elsewhere. Rows named twice are summed."""
    optimizer, rule = RULES[kind]
    session = create(client, optimizer=optimizer, params={"w": [[1.0, 2.0]] * 4}, dtype="float64")["id"]
    dense = np.random.default_rng(1).standard_normal((4, 2))
    sparse = np.zeros((4, 2))
    for index, value in zip(indices, values, strict=True):
        sparse[index] += value
    assert step(client, session, {"w": dense}).status_code == 200
    shaped = np.array(values, np.float64).reshape(len(indices), 2)
    if form == "json" and indices:
        reply = post(client, session, gradients={"w": {"indices": indices, "values": values}})
    else:
        reply = step(client, session, {"w:indices": np.array(indices, np.int64), "w:values": shaped})
    assert reply.status_code == 200, reply.text
    start = np.array([[1.0, 2.0]] * 4)
    slots: dict[str, Any] = {}
    (after,) = arithmetic.trajectory(rule, start, [dense], slots)
    (expected,) = arithmetic.trajectory(rule, after, [sparse], slots, t=1)
    if kind in ("sgd", "adagrad"):
        still = [row for row in range(4) if row not in indices]
        expected[still] = after[still]
    np.testing.assert_allclose(params(client, session)["w"], expected, rtol=1e-12)


def test_rows_beside_whole_tensors(client: httpx.Client) -> None:
    session = sgd(client, params={"w": [[0.0, 0.0], [0.0, 0.0]], "b": [0.0], "e": [0.0, 0.0, 0.0]})
    sent = {"w": {"indices": [1], "values": [[1, 2]]}, "b": [4], "e": {"indices": [0, 0], "values": [1, 1]}}
    got = post(client, session, gradients=sent).json()["params"]
    assert got == {"w": [[0.0, 0.0], [-1.0, -2.0]], "b": [-4.0], "e": [-2.0, 0.0, 0.0]}


# -- what else a step may bring ------------------------------------------------------------------------------------


def test_gradients_that_are_skipped_are_counted_and_change_nothing(client: httpx.Client) -> None:
    session = create(client, optimizer="adam", params={"w": [1.0, 2.0]}, non_finite="skip")["id"]
    step(client, session, {"w": np.float32([1, 1])})
    before = client.get(f"/v1/sessions/{session}")
    state = client.get(f"/v1/sessions/{session}/state").content
    bad = [np.nan, 1.0], [np.inf, 1.0], [1e300, 1.0]
    for count, values in enumerate(bad, 1):
        reply = step(client, session, {"w": np.array(values)}, {"Accept": "application/json"})
        assert (reply.status_code, reply.json()["skipped"], reply.json()["step"]) == (200, True, 1)
        assert reply.json()["metrics"]["grad_norm"] is None
        assert reply.json()["params"] == client.get(f"/v1/sessions/{session}/params").json()["params"]
        assert reply.headers["etag"] == before.headers["etag"]
        assert client.get(f"/v1/sessions/{session}").json()["skipped"] == count
    assert client.get(f"/v1/sessions/{session}/state").content == state
    assert len(client.get(f"/v1/sessions/{session}/history").json()["data"]) == 1
    good = step(client, session, {"w": np.float32([1, 1])}, {"Accept": "application/json"})
    assert (good.json()["step"], "skipped" in good.json()) == (2, False)


def test_skipped_updates_are_zeros(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", shapes={"w": [2]}, non_finite="skip")["id"]
    got = tensors(step(client, session, {"w": np.float32([np.nan, 1])}))
    np.testing.assert_array_equal(got["w"], [0.0, 0.0])
    start = np.float32([-0.0, 0.0])
    assert bits(start + got["w"]) == bits(start)


def test_parameters_are_taken_from_the_client_where_they_are_needed(client: httpx.Client) -> None:
    session = create(client, optimizer="adamw", shapes={"w": [2]})["id"]
    with unchanged(client, session):
        reply = post(client, session, gradients={"w": [1, 2]})
        assert (reply.status_code, reply.json()["type"]) == (422, "/problems/params-required")
        reply = step(client, session, {"w": np.float32([1, 2])})
        assert (reply.status_code, reply.json()["type"]) == (422, "/problems/params-required")
    held = create(client, optimizer="adamw", params={"w": [1.0, 2.0]})["id"]
    with unchanged(client, held):
        reply = post(client, held, gradients={"w": [1, 2]}, params={"w": [1, 2]})
        assert (reply.status_code, reply.json()["type"]) == (422, "/problems/params-held")


def test_the_hessian_is_missing(client: httpx.Client) -> None:
    session = create(client, optimizer="newton", params={"w": [1.0, 2.0]})["id"]
    with unchanged(client, session):
        reply = post(client, session, gradients={"w": [1, 2]})
        assert (reply.status_code, reply.json()["type"]) == (422, "/problems/hessian-required")


def test_large_tensors_are_stepped_like_small_ones(client: httpx.Client) -> None:
    size = 150_000  # in threads, in chunks, and large enough for a body in many pieces
    rng = np.random.default_rng(11)
    g = rng.standard_normal((3, size)).astype(np.float32)
    session = create(client, optimizer={"kind": "adam", "lr": 0.1}, shapes={"w": [size // 2, 2]})["id"]
    client.put(
        f"/v1/sessions/{session}/params",
        content=saved({"w": np.zeros((size // 2, 2), np.float32)}),
        headers=SAFETENSORS,
    )
    expected = arithmetic.trajectory(arithmetic.adam(0.1), np.zeros(size), g)
    for t in range(3):
        got = tensors(step(client, session, {"w": g[t].reshape(-1, 2)}))["w"]
        np.testing.assert_allclose(got.reshape(-1), expected[t], rtol=3e-5, atol=3e-6)


def test_large_bodies_in_json(client: httpx.Client) -> None:
    size = 40_000  # over 256 KiB of text, which is parsed aside
    values = (np.arange(size) / 8).tolist()
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": values})["id"]
    reply = post(client, session, gradients={"w": values})
    assert (reply.status_code, reply.json()["params"]["w"]) == (200, [0.0] * size)
    assert client.put(f"/v1/sessions/{session}/params", json={"params": {"w": values}}).status_code == 200
    assert client.get(f"/v1/sessions/{session}/params").json()["params"]["w"] == values
