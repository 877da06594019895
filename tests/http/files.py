"""safetensors files: by the library, and byte by byte, since the library writes neither BF16 nor anything wrong."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import safetensors.numpy

from tests.wire import SAFETENSORS

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A file of `header` as it is and `data`."""
    return len(header).to_bytes(8, "little") + header + data


def record(dtype: str, shape: list[int], begin: int = 0, end: int | None = None) -> dict[str, Any]:
    """A tensor's member of the header; `end` left out is what the shape asks for."""
    size = WIDTHS.get(dtype, 1) * int(np.prod(shape, dtype=object))
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size if end is None else end]}


def described(header: dict[str, Any], data: bytes = b"") -> bytes:
    return framed(json.dumps(header).encode(), data)


def one(name: str, dtype: str, shape: list[int], data: bytes) -> bytes:
    """A file of one tensor."""
    return described({name: record(dtype, shape)}, data)


def bf16(values: Any) -> bytes:
    """Numbers as bfloat16: the upper halves of float32, whose lower ones must be empty."""
    words = np.asarray(values, "<f4").view("<u4")
    assert not (words & 0xFFFF).any(), "no bfloat16"
    return (words >> 16).astype("<u2").tobytes()


def header_of(file: bytes) -> dict[str, Any]:
    length = int.from_bytes(file[:8], "little")
    header: dict[str, Any] = json.loads(file[8 : 8 + length])
    return header


def metadata_of(file: bytes) -> dict[str, str]:
    metadata: dict[str, str] = header_of(file)["__metadata__"]
    return metadata


def with_metadata(file: bytes, **changes: str | None) -> bytes:
    """The same file with other text; None takes a member away."""
    header = header_of(file)
    changed = header["__metadata__"] | changes
    header["__metadata__"] = {name: text for name, text in changed.items() if text is not None}
    return described(header, file[8 + int.from_bytes(file[:8], "little") :])


def saved(tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """By the library, which wants arrays and takes no numbers, and numbers are what 0-d arrays easily become."""
    return safetensors.numpy.save({name: np.array(array, order="C") for name, array in tensors.items()}, metadata)


def step(
    client: httpx.Client, session: str, gradients: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """One step by safetensors, tensors of no dimension included."""
    return client.post(
        f"/v1/sessions/{session}/steps", content=saved(gradients), headers=SAFETENSORS | dict(headers or {})
    )
