"""What reads bytes of strangers, each as a function of bytes that must end in one of two ways: read, or refused.

Whatever else it raises is a fault; so is reading something else than a second reader does (the standard library's JSON,
gzip and base zlib, the safetensors library), or writing what it read into something that reads otherwise.
"""

import gzip
import io
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import orjson
import safetensors.numpy
import zstandard

from core.errors import CoreError
from core.evaluate import Evaluator
from service import bodies, contributions, examples, http, live, schemas
from service.documents import now
from service.errors import ServiceError
from service.wire import inflate
from service.wire import json as strict
from service.wire import safetensors as wire
from service.wire.errors import WireError

Target = Callable[[bytes], None]
REFUSED = (WireError, ServiceError, CoreError)
LIMIT = 1 << 20


# -- JSON --------------------------------------------------------------------------------------------------------------


class Stricter(ValueError):
    """What the standard library lets through and the service must not."""


def _no_constant(text: str) -> Any:
    raise Stricter(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Stricter("duplicates")
    return dict(pairs)


def json_body(data: bytes) -> None:
    try:
        value = strict.loads(data)
    except WireError:
        return
    again = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    assert _same(value, again), "the standard library reads something else"
    assert _same(strict.loads(strict.dumps(value)), value), "what was read is written otherwise"
    assert _depth(value) <= strict.MAX_NESTING


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float | int):
        return one == other and math.isfinite(one)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _depth(value: Any) -> int:
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(_depth, inner), default=0)


# -- safetensors -------------------------------------------------------------------------------------------------------


def tensors(data: bytes) -> None:
    try:
        read, metadata = wire.read(data, dtypes=wire.STEP_DTYPES)
    except WireError:
        return
    again, text = wire.read(b"".join(wire.write(read, metadata)), dtypes=wire.STEP_DTYPES)
    assert text == metadata
    _compare(read, again)
    if all(array.dtype.kind != "V" and array.dtype.name != "bfloat16" for array in read.values()):
        _compare(read, safetensors.numpy.load(data))


def _compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.shape == other[name].shape
        assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(other[name]).tobytes()


# -- bodies that are inflated ------------------------------------------------------------------------------------------


def gzipped(data: bytes) -> None:
    try:
        found = inflate.inflate("gzip", data, LIMIT)
    except WireError:
        return
    assert len(found) <= LIMIT
    assert bytes(found) == gzip.decompress(data)


def zstandard_(data: bytes) -> None:
    try:
        found = inflate.inflate("zstd", data, LIMIT)
    except WireError:
        return
    assert len(found) <= LIMIT
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
    assert bytes(found) == reader.read()


# -- what a step, a session and a checkpoint are made of ---------------------------------------------------------------


def _refusing(read: Callable[[bytes], Any]) -> Target:
    def target(data: bytes) -> None:
        try:
            read(data)
        except REFUSED as error:
            str(error)  # its sentence is what the client is told

    return target


def _session(data: bytes) -> None:
    document, params = schemas.parse_create(strict.loads(data))
    described = orjson.loads(orjson.dumps(live.describe(document)))
    for name in ("size", "slot_bytes", "round_bytes"):
        del described[name]
    assert schemas.document_of(described).recipe == document.recipe, "what is stored is read as something else"
    assert params is None or params.keys() == document.recipe.layout.slots.keys()


def _patch(data: bytes) -> None:
    document, _ = schemas.parse_create(examples.CREATE)
    schemas.patch(strict.loads(data))(document)


def _checkpoint(data: bytes) -> None:
    read, metadata = wire.read(data)
    live.told(metadata, now(), schemas.document_of).session(read, Evaluator())


def _headers(data: bytes) -> None:
    text = data.decode("latin-1")
    http.prefer(text)
    http.media_type(text)
    for read in (
        http.preconditions,
        lambda value: http.preconditions(value, "If-None-Match"),
        http.body_format,
        lambda value: http.negotiate(value, "json", ("json", "safetensors")),
        http.idempotency_key,
        http.last_event_id,
        lambda value: bodies.content_coding(value.encode("latin-1")),
        lambda value: http.query(value.encode("latin-1"), ("worker", "weight")),
    ):
        try:
            read(text)
        except REFUSED:
            continue


TARGETS: dict[str, Target] = {
    "json": json_body,
    "safetensors": tensors,
    "gzip": gzipped,
    "zstd": zstandard_,
    "step": _refusing(contributions.of_json),
    "step-safetensors": _refusing(lambda data: contributions.of_safetensors(data, {})),
    "session": _refusing(_session),
    "patch": _refusing(_patch),
    "checkpoint": _refusing(_checkpoint),
    "headers": _headers,
}


# -- where it begins ---------------------------------------------------------------------------------------------------


def _json_seeds() -> list[bytes]:
    odd = [b'{"a": [1, -0.0, 1e308, 9007199254740991, true, null, "\\u00e9"]}', b"[" * 64 + b"]" * 64, b'{"a":{"a":1}}']
    return [*odd, orjson.dumps(examples.CREATE), orjson.dumps(examples.CREATE_SHARED)]


def _step_seeds() -> list[bytes]:
    bodies: list[dict[str, Any]] = [
        {"gradients": {"w": [[1.5, -2], [3, 4]], "b": 0.25}, "loss": 1, "return": "none", "partial": True},
        {"gradients": {"w": {"indices": [4, 17], "values": [[1], [2]]}}, "worker": "a", "base_step": 3, "weight": 2},
        {"deltas": {"w": {"positions": [1], "values": [2.0], "scale": 0.5}}},
        {"gradients": {"w": {"values": [1, 2], "scale": 0.5}}, "hessian": [[1, 0], [0, 1]]},
    ]
    return [orjson.dumps(body) for body in bodies]


def _tensor_seeds() -> list[bytes]:
    two = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full((), 0.25)}
    sparse = {"w:indices": np.array([4, 17]), "w:values": np.ones((2, 3), np.float16)}
    quantized = {"w": np.array([-128, 127], np.int8), "w:scale": np.full((), 0.5, np.float32)}
    return [safetensors.numpy.save(each) for each in (two, sparse, quantized, {})] + [
        safetensors.numpy.save(two, {"step": "3", "ravine": "1"})
    ]


def _checkpoint_seeds() -> list[bytes]:
    from core.session import Session

    found = []
    for body in (examples.CREATE, examples.CREATE_SHARED):
        document, params = schemas.parse_create(body)
        text = live.checkpoint(Session.new(document.recipe, params, Evaluator()), document)
        found.append(b"".join(wire.write(*text)))
    return found


def _header_seeds() -> list[bytes]:
    return [
        b'"41-9f3c2a", W/"42", *',
        b"application/vnd.safetensors;q=0.5, application/json; charset=utf-8, */*;q=0",
        b'return=minimal, wait=30; x="a\\"b"',
        b"worker=a&weight=2%20",
        b"gzip",
    ]


def seeds_of(name: str) -> list[bytes]:
    """Inputs that are read, or nearly, for the target of this name: what is made of them goes deeper than noise."""
    plain = orjson.dumps(examples.CREATE)
    return {
        "json": _json_seeds,
        "safetensors": _tensor_seeds,
        "gzip": lambda: [
            gzip.compress(plain),
            gzip.compress(plain) + gzip.compress(b"more"),
            gzip.compress(bytes(9999)),
        ],
        "zstd": lambda: [zstandard.compress(plain), zstandard.compress(bytes(9999)) + zstandard.compress(b"more")],
        "step": _step_seeds,
        "step-safetensors": _tensor_seeds,
        "session": lambda: [plain, orjson.dumps(examples.CREATE_SHARED), orjson.dumps(examples.CREATE_BY_SHAPES)],
        "patch": lambda: [orjson.dumps(examples.PATCH), b'{"name": null, "labels": {"a": "b"}, "groups": []}'],
        "checkpoint": _checkpoint_seeds,
        "headers": _header_seeds,
    }[name]()
