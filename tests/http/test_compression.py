"""Contributions in fewer bytes: the same bits as what they stand for, the bytes of the log, and what is refused."""

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import httpx
import numpy as np
import pytest
import redis

from tests.http.files import bf16, described, record, saved
from tests.http.refusals import pointers, refused, standing, unchanged
from tests.running import Server, serving
from tests.wire import SAFETENSORS, create, tensors

Array: TypeAlias = np.ndarray
SHAPE = (3, 4)
START = {"w": np.linspace(-1, 1, 12).reshape(SHAPE).tolist(), "b": [0.5, -0.25]}
B = np.array([0.25, -3.0], np.float32)
DTYPES = ["float32", "float64"]


class Sent(NamedTuple):
    """The parts of the gradient of w, as in a file, and what they stand for in a session of `dtype`."""

    parts: dict[str, Any]
    plain: Callable[[str], dict[str, Array]]


def product(integers: Array, scale: Any, dtype: str) -> Array:
    """One by one, in Python's numbers."""
    flat = [float(scale) * int(integer) for integer in integers.reshape(-1)]
    return np.array(flat, np.float64).astype(dtype).reshape(integers.shape)


def placed(positions: Array, values: Array, dtype: str) -> Array:
    """A dense tensor from places, the sums of those named twice in Python's numbers."""
    flat = [0.0] * 12
    for position, value in zip(positions.tolist(), values.astype(dtype).tolist(), strict=True):
        flat[position] += value
    return np.array(flat).astype(dtype).reshape(SHAPE)


def int8(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> Array:
    return rng.integers(-128, 128, shape).astype(np.int8)


def quantized(rng: np.random.Generator, scale: Any) -> Sent:
    integers = int8(rng)
    return Sent({"": integers, "scale": scale}, lambda dtype: {"w": product(integers, np.reshape(scale, ()), dtype)})


def top_k(rng: np.random.Generator, width: type[np.floating[Any]]) -> Sent:
    positions = rng.permutation(12)[:5]
    values = rng.standard_normal(5).astype(width)
    return Sent({"positions": positions, "values": values}, lambda dtype: {"w": placed(positions, values, dtype)})


def quantized_top_k(rng: np.random.Generator, scale: Any) -> Sent:
    positions, integers = rng.permutation(12)[:5], int8(rng, (5,))
    return Sent(
        {"positions": positions, "values": integers, "scale": scale},
        lambda dtype: {"w": placed(positions, product(integers, scale, dtype), dtype)},
    )


def places_twice(rng: np.random.Generator) -> Sent:
    """In float32, as dtypes go: 1e8 + 1 - 1e8 is 1 if it is summed in float64."""
    positions, values = np.array([7, 2, 7, 7]), np.array([1e8, rng.standard_normal(), 1.0, -1e8])
    return Sent({"positions": positions, "values": values}, lambda dtype: {"w": placed(positions, values, dtype)})


def quantized_rows(rng: np.random.Generator, scale: Any) -> Sent:
    indices, integers = np.array([2, 0]), int8(rng, (2, 4))
    return Sent(
        {"indices": indices, "values": integers, "scale": scale},
        lambda dtype: {"w:indices": indices, "w:values": product(integers, scale, dtype)},
    )


FORMS: dict[str, Callable[[np.random.Generator], Sent]] = {
    "int8, scale in F32": lambda rng: quantized(rng, np.float32(0.01)),
    "int8, scale in F64": lambda rng: quantized(rng, np.float64(0.01)),
    "int8, scale in a list": lambda rng: quantized(rng, np.array([0.3])),
    "int8, scale of zero": lambda rng: quantized(rng, np.float32(0.0)),
    "top-k in F32": lambda rng: top_k(rng, np.float32),
    "top-k in F64": lambda rng: top_k(rng, np.float64),
    "top-k in F16": lambda rng: top_k(rng, np.float16),
    "top-k in int8": lambda rng: quantized_top_k(rng, np.float64(0.007)),
    "top-k, places twice": places_twice,
    "rows in int8": lambda rng: quantized_rows(rng, np.float32(0.02)),
}


def named(parts: Mapping[str, Any]) -> dict[str, Any]:
    """As in a file."""
    return {f"w:{part}" if part else "w": array for part, array in parts.items()}


def shown(parts: Mapping[str, Any]) -> dict[str, Any]:
    """As in JSON."""
    found = {part or "values": np.asarray(array).tolist() for part, array in parts.items()}
    return found | {"scale": float(np.reshape(parts["scale"], ()))} if "scale" in parts else found


def post(client: httpx.Client, session: str, file: Mapping[str, Any], **query: str) -> httpx.Response:
    return client.post(f"/v1/sessions/{session}/steps", content=saved(file), headers=SAFETENSORS, params=query)


def post_json(client: httpx.Client, session: str, w: Any, **members: Any) -> httpx.Response:
    body = {"gradients": {"w": w, "b": B.tolist()}} | members
    return client.post(f"/v1/sessions/{session}/steps", json=body)


def state(client: httpx.Client, session: str) -> dict[str, bytes]:
    reply = client.get(f"/v1/sessions/{session}/state")
    return {name: array.tobytes() for name, array in tensors(reply).items()}


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_of_what_it_stands_for(client: httpx.Client, form: str, kind: str, dtype: str) -> None:
    optimizer = {"kind": kind, "lr": 0.1}
    plain, filed, told = (create(client, optimizer=optimizer, params=START, dtype=dtype)["id"] for _ in range(3))
    rng = np.random.default_rng(17)
    for _ in range(3):
        sent = FORMS[form](rng)
        norms = [
            json.loads(reply.content)["metrics"]["grad_norm"]
            for reply in (
                client.post(
                    f"/v1/sessions/{plain}/steps",
                    content=saved(sent.plain(dtype) | {"b": B}),
                    headers=SAFETENSORS | {"Accept": "application/json"},
                ),
                client.post(
                    f"/v1/sessions/{filed}/steps",
                    content=saved(named(sent.parts) | {"b": B}),
                    headers=SAFETENSORS | {"Accept": "application/json"},
                ),
                post_json(client, told, shown(sent.parts)),
            )
        ]
        assert norms[0] == norms[1] == norms[2]
        expected = state(client, plain)
        assert state(client, filed) == expected
        assert state(client, told) == expected
    assert client.get(f"/v1/sessions/{told}").json()["step"] == 3


def test_bfloat16_at_places(client: httpx.Client) -> None:
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [0.0] * 4})["id"]
    header = {"w:positions": record("I64", [2]), "w:values": record("BF16", [2], 16)}
    file = described(header, np.array([3, 1], "<i8").tobytes() + bf16([1.5, -2.0]))
    reply = client.post(f"/v1/sessions/{session}/steps", content=file, headers=SAFETENSORS)
    assert tensors(reply)["w"].tolist() == [0.0, 2.0, 0.0, -1.5]


def test_a_number_may_be_quantized(client: httpx.Client) -> None:
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"s": 0.0})["id"]
    path = f"/v1/sessions/{session}/steps"
    for tensor in ({"values": -4, "scale": 0.5}, {"values": [-4], "positions": [0], "scale": 0.5}):
        assert client.post(path, json={"gradients": {"s": tensor}}).status_code == 200
    assert client.get(f"/v1/sessions/{session}/params").json()["params"] == {"s": 4.0}


def test_the_other_rows_keep_still(client: httpx.Client) -> None:
    """Rows of int8 are rows: no dense tensor is made of them."""
    session = create(client, optimizer="sparse_adam", params={"w": [[1.0], [2.0]]})["id"]
    path = f"/v1/sessions/{session}/steps"
    for index in (0, 1, 1):
        body = {"gradients": {"w": {"indices": [index], "values": [[100]], "scale": 0.5}}}
        last = client.get(f"/v1/sessions/{session}/params").json()["params"]["w"]
        w = client.post(path, json=body).json()["params"]["w"]
        assert [w[0] == last[0], w[1] == last[1]] == [index != 0, index != 1]


# -- the log -------------------------------------------------------------------------------------------------------


def logged(server: Server, session: str) -> int:
    """The bytes of the last entry of a session's log, its payload included."""
    with contextlib.closing(redis.Redis.from_url(server.store_url(), protocol=2)) as store:
        (element,) = store.lrange(f"ravine:{{{session}}}:log", -1, -1)
        length = int.from_bytes(element[:8], "little")
        commit = json.loads(element[8 : 8 + length])["__metadata__"]["commit"]
        chunks = store.keys(f"ravine:{{{session}}}:p:{commit}:*")
        return len(element) + sum(store.strlen(chunk) for chunk in chunks)


def test_the_log_holds_what_came(client: httpx.Client, server: Server) -> None:
    size = 100_000
    rng = np.random.default_rng(3)
    session = create(client, optimizer="sgd", params={"w": [0.0] * size})["id"]
    integers = int8(rng, (size,))
    assert post(client, session, {"w": integers, "w:scale": np.float32(0.01)}).status_code == 200
    assert size < logged(server, session) < 1.1 * size
    quantized_text = {"values": integers.tolist(), "scale": 0.01}
    path = f"/v1/sessions/{session}/steps"
    assert client.post(path, json={"gradients": {"w": quantized_text}, "return": "none"}).status_code == 200
    assert size < logged(server, session) < 1.1 * size
    positions, values = np.sort(rng.permutation(size)[:1000]), rng.standard_normal(1000).astype(np.float16)
    assert post(client, session, {"w:positions": positions, "w:values": values}).status_code == 200
    assert 10_000 < logged(server, session) < 11_000
    text = {"positions": positions.tolist(), "values": values.tolist()}
    assert client.post(path, json={"gradients": {"w": text}, "return": "none"}).status_code == 200
    assert 12_000 < logged(server, session) < 13_000, "values in float32"
    rows = {"indices": positions.tolist(), "values": values.tolist()}
    assert client.post(path, json={"gradients": {"w": rows}, "return": "none"}).status_code == 200
    assert 12_000 < logged(server, session) < 13_000, "and those of rows"


def test_what_was_logged_is_what_was_applied(data: Path) -> None:
    """A service that is killed reads all forms back from the log."""
    rng = np.random.default_rng(23)
    with serving(data) as server:
        with server.client() as client:
            sessions = [
                create(client, optimizer="adam", params=START, dtype=dtype)["id"]
                for dtype in itertools.chain.from_iterable((dtype, dtype) for dtype in DTYPES)
            ]
            for i, session in enumerate(sessions):
                for form in FORMS.values():
                    parts = form(rng).parts
                    if i % 2:
                        assert post_json(client, session, shown(parts)).status_code == 200
                    else:
                        assert post(client, session, named(parts) | {"b": B}).status_code == 200
            before = [standing(client, session) for session in sessions]
        server.kill()
        server.restart()
        with server.client() as client:
            assert [standing(client, session) for session in sessions] == before
            assert before[0]["object"]["step"] == len(FORMS)


# -- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_a_gradient_that_is_not(client: httpx.Client, scale: float) -> None:
    """Where such gradients are skipped or mended, a worker whose gradient overflowed can say so in int8."""
    file = {"w": np.ones(SHAPE, np.int8), "w:scale": np.float32(scale), "b": B}
    strict = create(client, optimizer="adam", params=START)["id"]
    with unchanged(client, strict):
        assert refused(post(client, strict, file), 422, "non-finite")["tensor"] == "w"
        text = json.dumps({"gradients": {"w": {"values": 1, "scale": 7}, "b": [1, 2]}}).replace("7", str(scale))
        headers = {"Content-Type": "application/json"}
        reply = client.post(f"/v1/sessions/{strict}/steps", content=text, headers=headers)
        refused(reply, 400, "malformed-json")
    lenient = create(client, optimizer="adam", params=START, non_finite="skip")["id"]
    before = state(client, lenient)
    assert post(client, lenient, file).headers["ravine-step"] == "0"
    assert state(client, lenient) == before
    assert client.get(f"/v1/sessions/{lenient}").json()["skipped"] == 1
    scaled = {"kind": "unscale", "dynamic": True, "scale": 1024.0}
    session = create(client, optimizer="adam", params=START, transforms=[scaled])["id"]
    reply = client.post(
        f"/v1/sessions/{session}/steps", content=saved(file), headers=SAFETENSORS | {"Accept": "application/json"}
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["metrics"]["loss_scale"] == 512.0


@pytest.mark.parametrize(
    "parts",
    [
        {"": np.full(SHAPE, 127, np.int8), "scale": np.float64(1e37)},
        {"positions": np.array([3]), "values": np.array([1e300])},
        {"positions": np.array([3]), "values": np.array([2], np.int8), "scale": np.float64(3e38)},
        {"positions": np.array([3, 3]), "values": np.array([3e38, 3e38])},
        {"indices": np.array([0]), "values": np.full((1, 4), -128, np.int8), "scale": np.float64(1e37)},
    ],
)
def test_beyond_float32(client: httpx.Client, parts: dict[str, Any]) -> None:
    session = create(client, optimizer="adam", params=START)["id"]
    with unchanged(client, session):
        assert refused(post(client, session, named(parts) | {"b": B}), 422, "non-finite")["tensor"] == "w"
        assert refused(post_json(client, session, shown(parts)), 422, "non-finite")["tensor"] == "w"


# -- what does not fit ---------------------------------------------------------------------------------------------

I64 = np.int64
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a position one too far": ({"positions": np.array([12]), "values": np.ones(1)}, "positions-mismatch"),
    "a negative position": ({"positions": np.array([-1]), "values": np.ones(1)}, "positions-mismatch"),
    "a position far away": ({"positions": np.array([2**53 - 1]), "values": np.ones(1)}, "positions-mismatch"),
    "one position too many": ({"positions": np.array([0, 1]), "values": np.ones(1)}, "shape-mismatch"),
    "one value too many": ({"positions": np.array([0]), "values": np.ones(2)}, "shape-mismatch"),
    "a value for no position": ({"positions": np.array([], I64), "values": np.ones(1)}, "shape-mismatch"),
    "values in two dimensions": ({"positions": np.array([0]), "values": np.ones((1, 1))}, "shape-mismatch"),
    "one integer too many": (
        {"positions": np.array([0]), "values": np.ones(2, np.int8), "scale": np.float32(1)},
        "shape-mismatch",
    ),
    "int8 of another shape": ({"": np.ones((4, 3), np.int8), "scale": np.float32(1)}, "shape-mismatch"),
    "flat int8": ({"": np.ones(12, np.int8), "scale": np.float32(1)}, "shape-mismatch"),
    "rows of another shape": (
        {"indices": np.array([0]), "values": np.ones((1, 3), np.int8), "scale": np.float32(1)},
        "shape-mismatch",
    ),
    "a row out of range": (
        {"indices": np.array([3]), "values": np.ones((1, 4), np.int8), "scale": np.float32(1)},
        "rows-mismatch",
    ),
}


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    with server.client() as client:
        made: str = create(client, optimizer="adam", params=START)["id"]
    return made


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_the_tensor(client: httpx.Client, session: str, what: str) -> None:
    parts, slug = MISFITS[what]
    with unchanged(client, session):
        for reply in (
            post(client, session, named(parts) | {"b": B}),
            post_json(client, session, shown(parts)),
            post(client, session, named(parts), partial="true"),
        ):
            assert refused(reply, 422, slug)["tensor"] == "w"


def test_positions_in_two_dimensions(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        reply = post(client, session, {"w:positions": np.zeros((1, 1), I64), "w:values": np.ones((1, 1)), "b": B})
        assert refused(reply, 422, "positions-mismatch")["tensor"] == "w"


def test_compressed_tensors_that_the_session_does_not_have(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        for parts in ({"": np.ones(1, np.int8), "scale": np.ones(1)}, {"positions": np.zeros(1, I64), "values": B[:1]}):
            file = {name.replace("w", "x"): array for name, array in named(parts).items()}
            assert refused(post(client, session, file, partial="true"), 422, "unknown-tensor")["tensor"] == "x"


# -- what is no form -----------------------------------------------------------------------------------------------

ONES = np.ones(SHAPE, np.int8)
ONE = np.ones(1, np.int8)
AT = np.zeros(1, I64)
SCALE = np.float32(1)
MALFORMED: dict[str, dict[str, Any]] = {
    "I8 without a scale": {"w": ONES},
    "I8 without a scale, at places": {"w:positions": AT, "w:values": ONE},
    "I8 without a scale, in rows": {"w:indices": AT, "w:values": np.ones((1, 4), np.int8)},
    "a scale without I8": {"w": ONES.astype(np.float32), "w:scale": SCALE},
    "a scale without I8, at places": {"w:positions": AT, "w:values": B[:1], "w:scale": SCALE},
    "a scale alone": {"w:scale": SCALE},
    "a scale in F16": {"w": ONES, "w:scale": np.float16(1)},
    "a scale in I64": {"w": ONES, "w:scale": np.int64(1)},
    "a scale in I8": {"w": ONES, "w:scale": np.int8(1)},
    "two scales": {"w": ONES, "w:scale": np.ones(2)},
    "no scale in a list": {"w": ONES, "w:scale": np.ones(0)},
    "a scale for each row": {"w": ONES, "w:scale": np.ones((3, 1))},
    "positions alone": {"w:positions": AT},
    "positions and a scale": {"w:positions": AT, "w:scale": SCALE},
    "positions of what is there": {"w": ONES.astype(np.float32), "w:positions": AT},
    "positions and values of what is there": {"w": ONES.astype(np.float32), "w:positions": AT, "w:values": B[:1]},
    "values of what is there": {"w": ONES.astype(np.float32), "w:values": B[:1]},
    "values of what is there in I8": {"w": ONES, "w:values": ONE, "w:scale": SCALE},
    "rows and positions": {"w:indices": AT, "w:positions": AT, "w:values": B[:1]},
    "positions in F64": {"w:positions": np.zeros(1), "w:values": B[:1]},
    "positions in I8": {"w:positions": np.zeros(1, np.int8), "w:values": B[:1]},
    "rows in I8": {"w:indices": np.zeros(1, np.int8), "w:values": np.ones((1, 4))},
    "values in I64": {"w:positions": AT, "w:values": AT},
    "a Hessian in I8": {":hessian": np.ones((14, 14), np.int8), "w": ONES.astype(np.float32)},
    "a diagonal in I8": {"w:hessian_diagonal": ONES, "w": ONES.astype(np.float32)},
    "parameters in I8": {"w:params": ONES, "w": ONES.astype(np.float32)},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_files_that_have_no_meaning(client: httpx.Client, session: str, what: str) -> None:
    with unchanged(client, session):
        for query in ({}, {"payload": "deltas"}, {"partial": "true"}):
            refused(post(client, session, MALFORMED[what] | {"b": B}, **query), 422, "malformed-safetensors")


@pytest.mark.parametrize("what", ["int8, scale in F32", "top-k in F32", "rows in int8"])
def test_parameters_are_not_sent_compressed(client: httpx.Client, session: str, what: str) -> None:
    file = named(FORMS[what](np.random.default_rng(1)).parts) | {"b": B}
    with unchanged(client, session):
        refused(post(client, session, file, payload="params"), 422, "malformed-safetensors")


def test_int8_is_for_steps_alone(client: httpx.Client, session: str) -> None:
    file = saved({"w": ONES, "w:scale": SCALE, "b": B})
    with unchanged(client, session):
        reply = client.put(f"/v1/sessions/{session}/params", content=file, headers=SAFETENSORS)
        assert "I8" in refused(reply, 422, "malformed-safetensors")["detail"]
        reply = client.post("/v1/sessions", content=file, headers=SAFETENSORS)
        assert "I8" in refused(reply, 422, "malformed-safetensors")["detail"]


W8 = ONES.tolist()
NO_FORMS: dict[str, tuple[Any, str]] = {
    "128": ({"values": [[0] * 4, [0, 0, 128, 0], [0] * 4], "scale": 1}, "/values/1/2"),
    "-129": ({"values": [[0] * 4, [0] * 4, [-129, 0, 0, 0]], "scale": 1}, "/values/2/0"),
    "a fraction": ({"values": [[0, 0.5, 0, 0], [0] * 4, [0] * 4], "scale": 1}, "/values/0/1"),
    "128 at a place": ({"positions": [0], "values": [128], "scale": 1}, "/values/0"),
    "128 alone": ({"positions": [0], "values": 128, "scale": 1}, "/values"),
    "128 in a row": ({"indices": [0], "values": [[0, 0, 0, 128]], "scale": 1}, "/values/0/3"),
    "true": ({"values": [[True] * 4] * 3, "scale": 1}, "/values/0/0"),
    "no list of positions": ({"positions": 0, "values": [1]}, "/positions"),
    "positions that are nested": ({"positions": [[0]], "values": [1]}, "/positions/0"),
    "a fractional position": ({"positions": [0, 1.0], "values": [1, 2]}, "/positions/1"),
    "a position as text": ({"positions": ["0"], "values": [1]}, "/positions/0"),
    "a position that is true": ({"positions": [True], "values": [1]}, "/positions/0"),
    "a scale as text": ({"values": W8, "scale": "1"}, "/scale"),
    "a scale that is true": ({"values": W8, "scale": True}, "/scale"),
    "a scale that is null": ({"values": W8, "scale": None}, "/scale"),
    "a scale in a list": ({"values": W8, "scale": [1]}, "/scale"),
    "values alone": ({"values": W8}, ""),
    "a scale alone": ({"scale": 1}, ""),
    "positions alone": ({"positions": [0]}, ""),
    "positions and a scale": ({"positions": [0], "scale": 1}, ""),
    "positions and rows": ({"positions": [0], "indices": [0], "values": [1]}, ""),
    "positions, rows and a scale": ({"positions": [0], "indices": [0], "values": [1], "scale": 1}, ""),
    "an unknown member": ({"positions": [0], "values": [1], "k": 1}, ""),
    "an unknown member beside a scale": ({"values": W8, "scale": 1, "zero_point": 0}, ""),
}


@pytest.mark.parametrize("what", NO_FORMS)
def test_json_that_has_no_meaning(client: httpx.Client, session: str, what: str) -> None:
    tensor, at = NO_FORMS[what]
    with unchanged(client, session):
        for payload in ("gradients", "deltas"):
            body = {payload: {"w": tensor, "b": B.tolist()}}
            reply = client.post(f"/v1/sessions/{session}/steps", json=body)
            assert pointers(refused(reply, 422, "invalid-request")) == {f"/{payload}/w{at}"}


def test_compressed_values_stand_nowhere_else(client: httpx.Client, session: str) -> None:
    tensor = {"values": W8, "scale": 1}
    with unchanged(client, session):
        for member in ("params", "hessian_diagonal"):
            reply = post_json(client, session, W8, **{member: {"w": tensor, "b": [1, 1]}})
            assert pointers(refused(reply, 422, "invalid-request")) == {f"/{member}/w"}
        reply = client.put(f"/v1/sessions/{session}/params", json={"params": {"w": tensor, "b": [1, 1]}})
        assert pointers(refused(reply, 422, "invalid-request")) == {"/params/w"}
