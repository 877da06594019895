"""Tensors that do not fit, are not finite, or are no safetensors: refused by name, and nothing changes."""

import json
from typing import Any

import httpx
import numpy as np
import pytest

from tests.http.files import bf16, described, framed, one, record, saved, step
from tests.http.refusals import refused, unchanged
from tests.running import Server
from tests.wire import SAFETENSORS, create

GOOD = {"w": np.ones((2, 3), np.float32), "b": np.float32(1.0)}


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    """At step 1."""
    with server.client() as client:
        members = {"optimizer": "adam", "params": {"w": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "b": 0.5}}
        made: str = create(client, **members)["id"]
        assert step(client, made, GOOD).status_code == 200
    return made


def post(client: httpx.Client, session: str, content: bytes, **query: str) -> httpx.Response:
    return client.post(f"/v1/sessions/{session}/steps", content=content, headers=SAFETENSORS, params=query)


def put(client: httpx.Client, session: str, content: bytes) -> httpx.Response:
    return client.put(f"/v1/sessions/{session}/params", content=content, headers=SAFETENSORS)


# -- tensors that do not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v", "W", "w ", "", "w:m", ":b", "w/0"])
def test_unknown_tensors(client: httpx.Client, session: str, name: str) -> None:
    shown = {known: array.tolist() for known, array in GOOD.items()}
    with unchanged(client, session):
        for reply in (
            step(client, session, GOOD | {name: np.float32([1])}),
            post(client, session, saved({name: np.float32([1])}), partial="true"),
            client.post(f"/v1/sessions/{session}/steps", json={"gradients": shown | {name: 1}}),
            put(client, session, saved(GOOD | {name: np.float32([1])})),
            client.put(f"/v1/sessions/{session}/params", json={"params": {name: 1}}),
        ):
            assert refused(reply, 422, "unknown-tensor")["tensor"] == name


@pytest.mark.parametrize("name", ["w", "b"])
def test_missing_tensors(client: httpx.Client, session: str, name: str) -> None:
    less = {other: array for other, array in GOOD.items() if other != name}
    shown = {other: array.tolist() for other, array in less.items()}
    with unchanged(client, session):
        for reply in (
            step(client, session, less),
            post(client, session, saved(less), partial="false"),
            client.post(f"/v1/sessions/{session}/steps", json={"gradients": shown}),
            put(client, session, saved(less)),
            client.put(f"/v1/sessions/{session}/params", json={"params": shown}),
        ):
            assert refused(reply, 422, "missing-gradient")["tensor"] == name
        assert refused(step(client, session, {}), 422, "missing-gradient")["tensor"] == "w"


@pytest.mark.parametrize("shape", [(3, 2), (6,), (), (2, 3, 1), (1, 2, 3), (0,), (2, 0), (1,) * 9, (1,) * 33])
def test_other_shapes(client: httpx.Client, session: str, shape: tuple[int, ...]) -> None:
    wrong = np.ones(shape, np.float32)
    file = described(
        {"b": record("F32", []), "w": record("F32", list(shape), 4)}, np.float32(1).tobytes() + wrong.tobytes()
    )
    shown = {"w": wrong.tolist(), "b": 1.0}
    with unchanged(client, session):
        for reply in (
            post(client, session, file),
            client.post(f"/v1/sessions/{session}/steps", json={"gradients": shown}),
            put(client, session, file),
            client.put(f"/v1/sessions/{session}/params", json={"params": shown}),
        ):
            document = refused(reply, 422, "shape-mismatch")
            assert (document["tensor"], document["expected"]) == ("w", [2, 3])
            # In JSON the extents below one of 0 cannot be told.
            received = document["received"]
            assert received == list(shape) or (0 in shape and received == list(shape)[: shape.index(0) + 1])


def test_a_number_where_a_list_belongs_and_the_other_way_round(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": 1, "b": 1}})
        document = refused(reply, 422, "shape-mismatch")
        assert (document["tensor"], document["expected"], document["received"]) == ("w", [2, 3], [])
        reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"b": [1]}, "partial": True})
        document = refused(reply, 422, "shape-mismatch")
        assert (document["tensor"], document["expected"], document["received"]) == ("b", [], [1])


@pytest.mark.parametrize(
    ("indices", "values", "slug"),
    [
        ([2], [[1, 2, 3]], "rows-mismatch"),
        ([-1], [[1, 2, 3]], "rows-mismatch"),
        ([2**53 - 1], [[1, 2, 3]], "rows-mismatch"),
        ([0, 1], [[1, 2, 3]], "shape-mismatch"),
        ([0], [[1, 2]], "shape-mismatch"),
        ([0], [1, 2, 3], "shape-mismatch"),
        ([0], 1, "shape-mismatch"),
        ([], [[1, 2, 3]], "shape-mismatch"),
    ],
)
def test_rows_that_do_not_fit(client: httpx.Client, session: str, indices: Any, values: Any, slug: str) -> None:
    with unchanged(client, session):
        for name in ("w", "b"):
            sent = {name: {"indices": indices, "values": values}}
            reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": sent, "partial": True})
            assert refused(reply, 422, slug if name == "w" else "rows-mismatch")["tensor"] == name
        file = {"w:indices": np.array(indices, np.int64), "w:values": np.array(values, np.float32)}
        assert refused(post(client, session, saved(file), partial="true"), 422, slug)["tensor"] == "w"


def test_row_numbers_beyond_any_tensor(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        for index in (-(2**63), 2**63 - 1):
            file = saved({"w:indices": np.array([index]), "w:values": np.ones((1, 3)), "b": np.float32(1)})
            assert refused(post(client, session, file), 422, "rows-mismatch")["tensor"] == "w"
        file = saved({"w:indices": np.array([[0]]), "w:values": np.ones((1, 3)), "b": np.float32(1)})
        assert refused(post(client, session, file), 422, "rows-mismatch")["tensor"] == "w"


def test_a_hessian_of_another_shape(client: httpx.Client) -> None:
    session = create(client, optimizer="newton", params={"w": [1.0, 2.0]})["id"]
    with unchanged(client, session):
        for hessian in ([[1.0]], [1.0, 2.0], 1.0, [[1.0] * 3] * 3):
            body = {"gradients": {"w": [1, 2]}, "hessian": hessian}
            document = refused(client.post(f"/v1/sessions/{session}/steps", json=body), 422, "shape-mismatch")
            assert (document["expected"], document["received"]) == ([2, 2], list(np.shape(hessian)))
        file = saved({"w": np.ones(2), ":hessian": np.array([[1.0, np.nan], [0.0, 1.0]])})
        refused(post(client, session, file), 422, "non-finite")


@pytest.mark.parametrize(
    ("values", "slug", "tensor"),
    [
        ({"w": [1.0]}, "missing-gradient", "v"),
        ({"w": [1.0], "v": [1.0, 2.0]}, "shape-mismatch", "v"),
        ({"w": [1.0], "v": [1.0], "u": [1.0]}, "unknown-tensor", "u"),
        ({"w": [1.0], "v": [1e300]}, "non-finite", "v"),
    ],
)
def test_parameters_beside_a_step_that_do_not_fit(
    client: httpx.Client, values: dict[str, Any], slug: str, tensor: str
) -> None:
    session = create(client, optimizer="adamw", shapes={"w": [1], "v": [1]})["id"]
    with unchanged(client, session):
        body = {"gradients": {"w": [1], "v": [1]}, "params": values}
        document = refused(client.post(f"/v1/sessions/{session}/steps", json=body), 422, slug)
        assert document["tensor"] == tensor


# -- tensors that are not finite ---------------------------------------------------------------------------------

NOT_FINITE = {
    "F64 NaN": ("F64", np.array([np.nan], "<f8").tobytes()),
    "F64 infinity": ("F64", np.array([-np.inf], "<f8").tobytes()),
    "F64 beyond float32": ("F64", np.array([1e300], "<f8").tobytes()),
    "F64 just beyond float32": ("F64", np.array([3.4028236e38], "<f8").tobytes()),
    "F32 NaN": ("F32", np.array([np.nan], "<f4").tobytes()),
    "F32 signalling NaN": ("F32", np.array([0x7F800001], "<u4").tobytes()),
    "F32 infinity": ("F32", np.array([np.inf], "<f4").tobytes()),
    "F16 NaN": ("F16", np.array([np.nan], "<f2").tobytes()),
    "F16 infinity": ("F16", np.array([-np.inf], "<f2").tobytes()),
    "BF16 NaN": ("BF16", np.array([0x7FC0], "<u2").tobytes()),
    "BF16 negative NaN": ("BF16", np.array([0xFFC1], "<u2").tobytes()),
    "BF16 infinity": ("BF16", bf16([np.inf])),
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_what_is_not_finite(client: httpx.Client, session: str, what: str) -> None:
    dtype, data = NOT_FINITE[what]
    ones = np.ones(6, np.float32).tobytes()
    header = {"w": record("F32", [2, 3]), "b": record(dtype, [], 24)}
    file = described(header, ones + data)
    rows = {
        "w:values": record(dtype, [1, 1]),
        "w:indices": record("I64", [1], len(data)),
    }
    sparse = create(client, optimizer="adam", params={"w": [[1.0], [2.0]]})["id"]
    with unchanged(client, session), unchanged(client, sparse):
        assert refused(post(client, session, file), 422, "non-finite")["tensor"] == "b"
        assert refused(put(client, session, file), 422, "non-finite")["tensor"] == "b"
        lazily = described(rows, data + np.zeros(1, "<i8").tobytes())
        assert refused(post(client, sparse, lazily), 422, "non-finite")["tensor"] == "w"


def test_numbers_beyond_float32_in_json(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        for value in (1e300, -1e300, 3.5e38):
            body = {"gradients": {"w": [[1, 2, 3], [4, 5, 6]], "b": value}}
            reply = client.post(f"/v1/sessions/{session}/steps", json=body)
            assert refused(reply, 422, "non-finite")["tensor"] == "b"
            reply = client.put(f"/v1/sessions/{session}/params", json={"params": body["gradients"]})
            assert refused(reply, 422, "non-finite")["tensor"] == "b"


def test_rows_whose_sum_is_beyond_float32(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    sent = {"w": {"indices": [0, 0], "values": [3e38, 3e38]}}
    with unchanged(client, session):
        reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": sent})
        assert refused(reply, 422, "non-finite")["tensor"] == "w"


def test_large_numbers_are_fine_in_float64(client: httpx.Client) -> None:
    session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [0.0]}, dtype="float64")["id"]
    reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1e300]}})
    assert (reply.status_code, reply.json()["params"]) == (200, {"w": [-1e300]})


# -- what is no safetensors file -----------------------------------------------------------------------------------

WHOLE = saved(GOOD)
F32 = {"dtype": "F32", "shape": [1]}
TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
LONG = json.dumps({"w": record("F32", []), "__metadata__": {"x": "y" * (1 << 20)}}).encode()
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": WHOLE[:7],
    "a length alone": WHOLE[:8],
    "cut in the header": WHOLE[:40],
    "cut in the data": WHOLE[:-1],
    "a byte too many": WHOLE + b"\0",
    "a kilobyte too many": WHOLE + b"\0" * 1024,
    "a length beyond the file": (1 << 19).to_bytes(8, "little") + WHOLE[8:],
    "a length of 2^64 - 1": b"\xff" * 8 + WHOLE[8:],
    "a header over 1 MiB": framed(LONG, bytes(4)),
    "a length just over 1 MiB": ((1 << 20) + 1).to_bytes(8, "little") + bytes(1 << 21),
    "JSON": b'{"gradients": {"w": [1]}}',
    "no header": framed(b""),
    "a header that is no JSON": framed(b"{w}"),
    "a header that is a list": framed(b"[]"),
    "a header that is not UTF-8": framed(b'{"\xff":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
    "NaN in the header": framed(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "a deep header": framed(b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a name twice": framed(TWICE, bytes(4)),
    "metadata that is no text": described({"w": record("F32", []), "__metadata__": {"a": 1}}, bytes(4)),
    "over 10,000 tensors": described({f"t{i}": record("U8", [0], 0, 0) | {"dtype": "F32"} for i in range(10_001)}),
    "overlapping": described({"w": record("F32", [2]), "b": record("F32", [1], 4)}, bytes(8)),
    "the same bytes": described({"w": record("F32", [1]), "b": record("F32", [1])}, bytes(4)),
    "a hole": described({"w": record("F32", [1]), "b": record("F32", [1], 8)}, bytes(12)),
    "a hole at the start": described({"w": record("F32", [1], 4)}, bytes(8)),
    "offsets the wrong way round": described({"w": F32 | {"data_offsets": [4, 0]}}, bytes(4)),
    "negative offsets": described({"w": F32 | {"data_offsets": [-4, 0]}}, bytes(4)),
    "huge offsets": described({"w": F32 | {"data_offsets": [2**64 - 4, 2**64]}}, bytes(4)),
    "offsets as text": described({"w": F32 | {"data_offsets": ["0", "4"]}}, bytes(4)),
    "offsets as booleans": described({"w": {"dtype": "F32", "shape": [0], "data_offsets": [False, False]}}),
    "a size that is not the shape's": described({"w": F32 | {"data_offsets": [0, 8]}}, bytes(8)),
    "a shape that wraps around": described({"w": record("F32", [2**32, 2**32], 0, 0)}),
    "an empty shape that wraps around": described({"w": record("F32", [0, 2**62, 2**62], 0, 0)}),
    "a negative shape": described({"w": record("F32", [-1, -1], 0, 4)}, bytes(4)),
    "a fractional shape": described({"w": F32 | {"shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)),
    "no shape": described({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "no dtype": described({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "I32": one("w", "I32", [1], bytes(4)),
    "U8": one("w", "U8", [4], bytes(4)),
    "BOOL": one("w", "BOOL", [1], bytes(1)),
    "F8_E4M3": one("w", "F8_E4M3", [1], bytes(1)),
    "f32": one("w", "f32", [4], bytes(4)),
    "a gradient in I64": one("w", "I64", [1], bytes(8)),
    "a Hessian in I64": one(":hessian", "I64", [1], bytes(8)),
    "parameters in I64": one("w:params", "I64", [1], bytes(8)),
    "rows in I64": described({"w:indices": record("I64", [1]), "w:values": record("I64", [1], 8)}, bytes(16)),
    "row numbers in F32": described({"w:indices": record("F32", [1]), "w:values": record("F32", [1], 4)}, bytes(8)),
    "row numbers without rows": one("w:indices", "I64", [1], bytes(8)),
    "rows without row numbers": one("w:values", "F32", [1], bytes(4)),
    "rows of a tensor that is there": described(
        {"w:indices": record("I64", [1]), "w:values": record("F32", [1], 8), "w": record("F32", [1], 12)}, bytes(16)
    ),
}
# To a PUT these names are those of no tensor; to a restore all are.
OF_STEPS = {name for name in MALFORMED if "row" in name or "Hessian" in name or "parameters" in name}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_safetensors_file(client: httpx.Client, session: str, what: str) -> None:
    file = MALFORMED[what]
    with unchanged(client, session):
        refused(post(client, session, file), 422, "malformed-safetensors")
        refused(post(client, session, file, partial="true"), 422, "malformed-safetensors")
        if what not in OF_STEPS:
            refused(put(client, session, file), 422, "malformed-safetensors")
            if "I64" not in what:
                refused(client.post("/v1/sessions", content=file, headers=SAFETENSORS), 422, "malformed-safetensors")


def test_the_header_may_have_a_mebibyte(client: httpx.Client) -> None:
    session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
    header = {"w": record("F32", [1]), "__metadata__": {"x": ""}}
    header["__metadata__"]["x"] = "y" * ((1 << 20) - len(json.dumps(header)))
    file = described(header, bytes(4))
    assert int.from_bytes(file[:8], "little") == 1 << 20
    assert post(client, session, file).status_code == 200


def test_members_of_a_step_in_the_query(client: httpx.Client, session: str) -> None:
    wrong = [
        ("loss", "NaN"), ("loss", "Infinity"), ("loss", "1e999"), ("loss", ""), ("loss", "0x1"), ("loss", "1_0"),
        ("loss", " 1"), ("loss", "+1"), ("loss", "٣"), ("weight", "0"), ("weight", "-1"), ("weight", "true"),
        ("partial", "1"), ("partial", "True"), ("partial", ""), ("return", "all"), ("return", ""), ("worker", ""),
        ("worker", "a/b"), ("worker", "a" * 65), ("worker", "a\0"), ("base_step", "-1"), ("base_step", "1.0"),
        ("base_step", str(2**53)), ("base_step", str(2**70)), ("base_step", "9" * 5000), ("payload", "weights"),
        ("Loss", "1"), ("payload", ""), ("", "1"),
    ]  # fmt: skip
    with unchanged(client, session):
        for name, text in wrong:
            document = refused(post(client, session, WHOLE, **{name: text}), 422, "invalid-request")
            assert [fault["pointer"] for fault in document["errors"]] == [f"/query/{name}"], (name, text)
