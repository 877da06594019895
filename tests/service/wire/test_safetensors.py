"""Our reader and writer against the safetensors library, whose word is final on what a file is."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from core.layout import BF16
from service.wire.errors import MalformedSafetensors
from service.wire.safetensors import DTYPES, MAX_HEADER, MAX_TENSORS, STEP_DTYPES, nbytes, read, write
from tests.service.wire.headers import Files, Text

if TYPE_CHECKING:
    from pathlib import Path

FILES = 10_000


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + data


def record(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def library(file: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the library reads, as bytes: it cannot turn BF16 into NumPy arrays."""
    try:
        tensors = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in tensors}


def ours(file: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        tensors, _ = read(file)
    except MalformedSafetensors:
        return None
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: (names[a.dtype], list(a.shape), a.tobytes()) for name, a in tensors.items()}


def extra_rows(file: bytes, accepted: dict[str, tuple[str, list[int], bytes]]) -> set[str]:
    """Which of our own grounds for refusal a file that the library accepts falls under."""
    rows = set()
    length = int.from_bytes(file[:8], "little")
    if length > 1 << 20:
        rows.add("header")

    def pairs(members: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in members}) < len(members):
            rows.add("duplicate")
        return dict(members)

    json.loads(file[8 : 8 + length], object_pairs_hook=pairs)
    if len(accepted) > 10_000:
        rows.add("tensors")
    for dtype, shape, _ in accepted.values():
        if dtype not in {"F64", "F32", "F16", "BF16", "I64"}:
            rows.add("dtype")
        elif len(shape) > 64 or math.prod(filter(None, shape)) * DTYPES[dtype].itemsize >= 2**63:
            rows.add("numpy")
    return rows


def test_agrees_with_the_library_on_generated_and_mutated_files(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    counts = {"accepted": 0, "refused": 0, "bf16": 0, "metadata": 0, "reordered": 0}
    rows_met: dict[str, int] = {}
    for file in Files(seed=20240607).take(FILES):
        expected = library(file)
        if expected is None:
            assert ours(file) is None, file
            counts["refused"] += 1
            continue
        rows = extra_rows(file, expected)
        if rows:
            assert ours(file) is None, (rows, file)
            for row in rows:
                rows_met[row] = rows_met.get(row, 0) + 1
            continue
        assert ours(file) == expected, file
        path.write_bytes(file)
        with safetensors.safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
        assert read(file)[1] == metadata, file
        counts["accepted"] += 1
        counts["bf16"] += any(dtype == "BF16" for dtype, _, _ in expected.values())
        counts["metadata"] += bool(metadata)
        counts["reordered"] += list(read(file)[0]) != list(expected)
    assert counts["accepted"] > 2000, counts
    assert counts["refused"] > 2000, counts
    assert min(counts.values()) > 200, counts
    assert rows_met.keys() >= {"duplicate", "dtype", "numpy"}, rows_met
    assert min(rows_met.values()) > 50, rows_met


# What serde's deserializer makes of odd headers, each found by trying it on the library.
ODD = {
    "padding": (f' \n\t{{"w":{record()}}}\r\n  ', True),
    "byte order mark": (f'\ufeff{{"w":{record()}}}', False),
    "zero padding": (f'{{"w":{record()}}}\0', False),
    "record as a list": ('{"w":["F32",[1],[0,4]]}', True),
    "record as a longer list": ('{"w":["F32",[1],[0,4],0]}', False),
    "dtype as a map": (f'{{"w":{record(dtype=Text.DTYPE_MAP)}}}', True),
    "dtype as a map of two": (f'{{"w":{record(dtype=Text.DTYPE_MAP_OF_TWO)}}}', False),
    "escaped members": ('{"w":{"d\\u0074ype":"F32","shape":[1],"data_offsets":[0,4]}}', True),
    "escaped metadata": (f'{{"__met\\u0061data__":{{"a":"b"}},"w":{record()}}}', True),
    "null metadata": (f'{{"__metadata__":null,"w":{record()}}}', True),
    "number in metadata": (f'{{"__metadata__":{{"a":1}},"w":{record()}}}', False),
    "null in metadata": (f'{{"__metadata__":{{"a":null}},"w":{record()}}}', False),
    "list as metadata": (f'{{"__metadata__":[],"w":{record()}}}', False),
    "unknown member": (f'{{"w":{record(more=",{}:[1,{{{}:2}}]".format(*Text.NAMES))}}}', True),
    "unknown member that is a huge integer": (f'{{"w":{record(more=f",{Text.NAMES[0]}:{9**99}")}}}', True),
    "unknown member that overflows": (f'{{"w":{record(more=f",{Text.NAMES[0]}:1e999")}}}', False),
    "unknown member with a lone surrogate": ('{"w":' + record(more=',"x":"\\ud800"') + "}", False),
    "unknown member at 127 levels": ('{"w":' + record(more=',"x":' + "[" * 125 + "]" * 125) + "}", True),
    "unknown member at 128 levels": ('{"w":' + record(more=',"x":' + "[" * 126 + "]" * 126) + "}", False),
    "brackets in a string are no levels": ('{"w":' + record(more=',"x":"' + "[" * 200 + '"') + "}", True),
    "float dimension": (f'{{"w":{record(shape="[1.0]")}}}', False),
    "exponent": (f'{{"w":{record(shape="[1e0]")}}}', False),
    "boolean dimension": (f'{{"w":{record(shape="[true]")}}}', False),
    "negative dimension": (f'{{"w":{record(shape="[-1]")}}}', False),
    "negative zero": (f'{{"w":{record()},"z":{record(shape="[-0]", offsets="[4,4]")}}}', False),
    "negative zero as offset": (f'{{"w":{record(offsets="[-0,4]")}}}', False),
    "string dimension": (f'{{"w":{record(shape=Text.STRING_SHAPE)}}}', False),
    "string shape": (f'{{"w":{record(shape=Text.EMPTY_STRING)}}}', False),
    "object shape": (f'{{"w":{record(shape="{}")}}}', False),
    "null shape": (f'{{"w":{record(shape="null")}}}', False),
    "three offsets": (f'{{"w":{record(offsets="[0,4,4]")}}}', False),
    "object offsets": (f'{{"w":{record(offsets=Text.OBJECT_OFFSETS)}}}', False),
    "offsets backwards": (f'{{"w":{record(offsets="[4,0]")}}}', False),
    "scalar": (f'{{"w":{record(shape="[]")}}}', True),
    "empty tensor first": (f'{{"w":{record()},"z":{record(shape="[0]", offsets="[0,0]")}}}', True),
    "empty tensor last": (f'{{"w":{record()},"z":{record(shape="[5,0]", offsets="[4,4]")}}}', True),
    "empty tensor inside": (f'{{"w":{record()},"z":{record(shape="[0]", offsets="[2,2]")}}}', False),
    "product beyond 64 bits, then 0": (
        f'{{"w":{record()},"z":{record(shape="[4294967296,4294967296,0]", offsets="[0,0]")}}}',
        False,
    ),
    "product of 2^64 that wraps to 0": (
        f'{{"w":{record()},"z":{record(shape="[4294967296,4294967296]", offsets="[0,0]")}}}',
        False,
    ),
    "bits beyond 64 bits": (
        f'{{"w":{record()},"z":{record(shape="[576460752303423488]", offsets="[0,0]")}}}',
        False,
    ),
    "dimension beyond 64 bits": (
        f'{{"w":{record()},"z":{record(shape="[0,18446744073709551616]", offsets="[0,0]")}}}',
        False,
    ),
    "record that is null": (f'{{"w":{record()},"z":null}}', False),
    "missing member": ('{"w":{"dtype":"F32","shape":[1]}}', False),
    "lower case dtype": (f'{{"w":{record(dtype=Text.LOWER_CASE)}}}', False),
    "not an object": ("[]", False),
    "empty header": ("", False),
    "bad UTF-8": (b'{"w\xff":' + record().encode() + b"}", False),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_headers_as_the_library_takes_them(case: str) -> None:
    header, accepted = ODD[case]
    file = file_of(header, bytes(4))
    expected = library(file)
    assert (expected is not None) == accepted
    assert ours(file) == expected


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "0 bytes long"),
        (bytes(7), "7 bytes long"),
        (file_of(f'{{"w":{record()}}}')[:20], "only 12 follow"),
        (file_of(f'{{"w":{record()}}}', bytes(3)), "'w' ends at byte 4, but only 3 follow"),
        (file_of(f'{{"w":{record()}}}', bytes(5)), "end at byte 4, but 5 follow"),
        (file_of("{}", bytes(1)), "end at byte 0, but 1 follow"),
        (file_of(f'{{"w":{record(offsets="[4,8]")}}}', bytes(8)), "leaves a hole before it"),
        (
            file_of(f'{{"w":{record()},"v":{record(offsets="[2,6]")}}}', bytes(6)),
            "'v' begins at byte 2 and overlaps what is before it, which ends at byte 4",
        ),
        (file_of(f'{{"w":{record(shape="[3]")}}}', bytes(4)), r"needs 12 bytes, but .* \[0, 4\] are 4 apart"),
    ],
)
def test_faults_of_layout_are_named(file: bytes, said: str) -> None:
    assert library(file) is None
    with pytest.raises(MalformedSafetensors, match=said):
        read(file)


@pytest.mark.parametrize(
    "header",
    [
        f'{{"w":{record()},"w":{record()}}}',
        f'{{"w":{record()},"\\u0077":{record()}}}',
        f'{{"a:b":{record()},"\\u0061\\u003ab":{record()}}}',
        # The colon that the dropped member leaves over is offset by one that the text does not show.
        f'{{"w":{record()},"w":{record()},"__metadata__":{{"\\u003a\\u003A\\u003a\\u003a":"x"}}}}',
        f'{{"__metadata__":{{"a":"b","a":"b"}},"w":{record()}}}',
        f'{{"__metadata__":{{"a":":","a":"b"}},"w":{record()}}}',
        '{"w":' + record(more=',"x":{"y":1,"y":2}') + "}",
        '{"w":' + record(more=',"x":1,"x":2') + "}",
    ],
)
def test_duplicate_members_are_refused_where_the_library_takes_the_last(header: str) -> None:
    file = file_of(header, bytes(4))
    assert library(file) is not None
    with pytest.raises(MalformedSafetensors, match="two members named"):
        read(file)


@pytest.mark.parametrize("dtype", ["I32", "U8", "BOOL", "F8_E4M3", "C64", "U64"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    file = file_of(f'{{"w":{record(dtype=json.dumps(dtype), shape="[0]", offsets="[0,0]")}}}')
    assert library(file) is not None
    with pytest.raises(MalformedSafetensors, match=f"'w' is of dtype '{dtype}'; accepted are F64, F32"):
        read(file)


def test_a_header_of_a_mebibyte_is_read_and_one_byte_more_is_not() -> None:
    header = f'{{"w":{record()}}}'
    assert read(file_of(header.ljust(MAX_HEADER), bytes(4)))[0].keys() == {"w"}
    longer = file_of(header.ljust(MAX_HEADER + 1), bytes(4))
    assert library(longer) is not None
    with pytest.raises(MalformedSafetensors, match="1048577 bytes long; 1048576 are the most"):
        read(longer)


def test_the_header_s_length_is_checked_before_it_is_parsed() -> None:
    with pytest.raises(MalformedSafetensors, match="9223372036854775808 bytes long; 1048576 are the most"):
        read((2**63).to_bytes(8, "little") + b"not JSON")


def test_ten_thousand_tensors_are_read_and_one_more_is_not() -> None:
    empty = record(shape="[0]", offsets="[0,0]")
    members = [f'"{i}":{empty}' for i in range(MAX_TENSORS + 1)]
    assert len(read(file_of("{" + ",".join(members[:-1]) + "}"))[0]) == MAX_TENSORS
    more = file_of("{" + ",".join(members) + "}")
    assert library(more) is not None
    with pytest.raises(MalformedSafetensors, match="10001 tensors; 10000 are the most"):
        read(more)


@pytest.mark.parametrize("shape", [[1] * 65, [0, 2**62], [2**61, 0], [0, 2**64 - 1], [0, 2**64], [0, 10**200]])
def test_shapes_beyond_numpy_are_refused(shape: list[int]) -> None:
    size = 4 * math.prod(shape)
    file = file_of(f'{{"w":{record(shape=json.dumps(shape), offsets=f"[0,{size}]")}}}', bytes(size))
    with pytest.raises(MalformedSafetensors):
        read(file)


def test_an_absurd_shape_is_named() -> None:
    shape = json.dumps([2**63] * 40_000)
    with pytest.raises(MalformedSafetensors, match="beyond any memory"):
        read(file_of(f'{{"w":{record(shape=shape, offsets="[0,0]")}}}'))


def test_names_in_messages_are_cut() -> None:
    with pytest.raises(MalformedSafetensors) as caught:
        read(file_of(f'{{"{"w" * 100_000}":null}}'))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_arrays_are_views_of_the_buffer(wrap: type) -> None:
    file = wrap(b"".join(write({"w": np.arange(6.0).reshape(2, 3)})))
    w = read(file)[0]["w"]
    assert np.shares_memory(w, np.frombuffer(file, np.uint8))
    assert w.flags.writeable == (wrap is bytearray)
    if wrap is bytearray:
        file[-8:] = np.array(7.0).tobytes()
        assert w[1, 2] == 7


def test_unaligned_tensors_are_views_that_hold_the_right_numbers() -> None:
    for padding in range(8):
        data = np.arange(3.0)
        file = file_of(f'{{"w":{record(Text.F64, "[3]", "[0,24]")}}}' + " " * padding, data.tobytes())
        w = read(file)[0]["w"]
        assert np.shares_memory(w, np.frombuffer(file, np.uint8))
        np.testing.assert_array_equal(w + 0, data)


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "bf16": np.array([0x3F80, 0x4000, 0x7FC0], "<u2").view(BF16),
    "half": np.array([[1, 2.5], [np.nan, -np.inf]], np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "i64": np.array([-(2**63), 2**63 - 1, 0]),
    "single": np.array([[[0.1], [-0.0]]], np.float32),
    "double": np.array(math.pi),
    "w:m é \U0001f600 \\ \" \0": np.array([1.0]),
    "": np.zeros((), BF16),
}  # fmt: skip
METADATA = {"step": "3", "a:b": '{"kind": "adam", "é": [1, 2]}', "": "\\u003a"}


def test_what_is_written_is_read_again() -> None:
    tensors, metadata = read(b"".join(write(ARRAYS, METADATA)))
    assert metadata == METADATA
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    file = b"".join(write(ARRAYS, METADATA))
    names = {dtype: name for name, dtype in DTYPES.items()}
    assert library(file) == {n: (names[a.dtype], list(a.shape), a.tobytes()) for n, a in ARRAYS.items()}
    (tmp_path / "file").write_bytes(file)
    with safetensors.safe_open(tmp_path / "file", framework="np") as opened:
        assert opened.metadata() == METADATA
        np.testing.assert_array_equal(opened.get_tensor("half"), ARRAYS["half"])


def test_int8_is_written_and_is_read_where_it_is_asked_for() -> None:
    arrays = {"w": np.array([[-128, 127], [0, -1]], np.int8), "e": np.zeros((0, 3), np.int8), "w:scale": np.array(0.5)}
    file = b"".join(write(arrays))
    assert library(file) == {
        "w": ("I8", [2, 2], b"\x80\x7f\0\xff"),
        "e": ("I8", [0, 3], b""),
        "w:scale": ("F64", [], np.array(0.5).tobytes()),
    }
    for given in (file, safetensors.numpy.save(arrays)):
        with pytest.raises(MalformedSafetensors, match="I8"):
            read(given)
        tensors, _ = read(given, dtypes=STEP_DTYPES)
        assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()} == {
            name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()
        }


def test_what_the_library_writes_is_read() -> None:
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != BF16}
    tensors, metadata = read(safetensors.numpy.save(arrays, METADATA))
    assert metadata == METADATA
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (tensors[name].dtype, tensors[name].tobytes()) == (array.dtype, array.tobytes())


def test_written_tensors_are_aligned_and_sorted_by_item_size_stably() -> None:
    for name_length in range(16):
        arrays = {f"{'x' * name_length}{key}": array for key, array in ARRAYS.items()}
        # A buffer that starts aligned, as those of NumPy do.
        file = np.frombuffer(b"".join(write(arrays)), np.uint8).copy()
        tensors, _ = read(file.data)
        assert all(array.flags.aligned for array in tensors.values() if array.dtype != BF16)
        sizes = [array.itemsize for array in tensors.values()]
        assert sizes == sorted(sizes, reverse=True)
    order = [name for name, array in sorted(ARRAYS.items(), key=lambda item: -item[1].itemsize) if array.size]
    assert [name for name, array in read(b"".join(write(ARRAYS)))[0].items() if array.size] == order


def test_pieces_are_the_header_and_views_of_the_arrays() -> None:
    pieces = write(ARRAYS)
    assert len(pieces) == 1 + sum(array.size > 0 for array in ARRAYS.values())
    assert len(pieces[0]) % 8 == 0
    assert nbytes(pieces) == len(b"".join(pieces))
    w = np.zeros(4)
    _, piece = write({"w": w})
    w[0] = 1
    assert bytes(piece) == w.tobytes()


def test_arrays_of_any_layout_are_written_in_row_major_order() -> None:
    a = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"t": a.T, "cut": a[:, ::2, 1:], "back": a[::-1], "wide": np.broadcast_to(a[0], (5, 3, 4))}
    tensors, _ = read(b"".join(write(arrays)))
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_an_empty_file() -> None:
    assert read(b"".join(write({}))) == ({}, {})
    assert library(b"".join(write({}))) == {}


def test_what_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="'w' is of int32; a file holds F64"):
        write({"w": np.zeros(1, np.int32)})
    with pytest.raises(TypeError, match="'w' is of >f8"):
        write({"w": np.zeros(1, ">f8")})
    with pytest.raises(ValueError, match="__metadata__"):
        write({"__metadata__": np.zeros(1)})
