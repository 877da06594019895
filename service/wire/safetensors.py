"""safetensors files, read and written without copying tensors.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes, row-major and
little-endian, without a gap (https://huggingface.co/docs/safetensors). The header maps each name to
`{"dtype", "shape", "data_offsets"}`, and `__metadata__` to a map of strings.

`read` accepts what the reference implementation accepts, odd forms included (a tensor's record may be a list,
a dtype a map of one member: what its deserializer happens to take), and the tests hold the two against each
other. It refuses, beyond that:

- duplicate members anywhere in the header (the reference takes the last, others the first);
- headers over `MAX_HEADER` bytes, before they are parsed (the reference spends 12.5 s and 2.4 GB on one of
  64 MB), and more than `MAX_TENSORS` tensors;
- dtypes other than those of `DTYPES` (I8 is read where it is asked for: see `read`);
- shapes that NumPy cannot hold, which are those of over 64 dimensions and of empty tensors whose other
  dimensions multiply beyond the address space.

The arrays are views of the buffer: read-only if it is, alive as long as one of them is. Where the header's
length is no multiple of eight they may be unaligned, which NumPy computes with correctly, if more slowly;
compiled code that needs alignment must look at `flags.aligned`. `write` aligns every tensor to its item size
in a file whose start is aligned to eight bytes.

The header is parsed by orjson. Duplicates, which orjson does not see, show as a surplus of colons in the
text (see `service.wire.json`); then the standard library's parser has the last word.
"""

from __future__ import annotations

import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import numpy as np
import orjson

from core.layout import BF16, Array
from service.wire.errors import MalformedJSON, MalformedSafetensors
from service.wire.json import nesting, unique

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_HEADER: Final = 1 << 20
MAX_TENSORS: Final = 10_000
METADATA: Final = "__metadata__"

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BF16,
    "I64": np.dtype("<i8"),
}
# Of steps, which may be quantized.
STEP_DTYPES: Final[dict[str, np.dtype[Any]]] = DTYPES | {"I8": np.dtype("i1")}

# begin, end, name, dtype, shape: a bare tuple, since there may be 10,000 of them
Placed = tuple[int, int, str, np.dtype[Any], list[int]]

_NAMES: Final = {dtype: name for name, dtype in STEP_DTYPES.items()}
_FIELDS: Final = {"dtype": 0, "shape": 1, "data_offsets": 2}.keys()  # ordered, and comparable as a set
_ADDRESSES: Final = 1 << 64
_NESTING: Final = 127  # the reference's parser counts down from 128


def read(
    buffer: bytes | bytearray | memoryview, *, bounded: bool = True, dtypes: Mapping[str, np.dtype[Any]] = DTYPES
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors, as views of `buffer` in the order of their offsets, and the metadata (`{}` if none).

    `bounded` false is for files of our own, which may have longer headers and more tensors than are taken from
    others. Tensors of other `dtypes` are refused. Raises MalformedSafetensors.
    """
    start, header = _header(memoryview(buffer), bounded=bounded)
    metadata = _metadata(header.pop(METADATA, None))
    tensors: dict[str, Array] = {}
    for begin, _, name, dtype, shape in _placed(header, len(buffer) - start, bounded, dtypes):
        try:
            tensors[name] = np.ndarray(shape, dtype, buffer, start + begin)
        except ValueError as error:
            _unheld(name, shape, error)
    return tensors, metadata


class Form(NamedTuple):
    """What a file's header says: where the tensors' bytes start, the tensors as (begin, end, name, dtype, shape) in the
    order of their offsets, which count from there, and the metadata.
    """

    start: int
    tensors: list[Placed]
    metadata: dict[str, str]


def described(
    beginning: bytes | memoryview, size: int, *, bounded: bool = True, dtypes: Mapping[str, np.dtype[Any]] = DTYPES
) -> Form:
    """As `read`, of a file of `size` bytes, of which `beginning` has the header at least. Raises MalformedSafetensors,
    but not for what NumPy cannot hold, which `array_of` does.
    """
    start, header = _header(memoryview(beginning), bounded=bounded)
    metadata = _metadata(header.pop(METADATA, None))
    return Form(start, _placed(header, size - start, bounded, dtypes), metadata)


def array_of(tensor: Placed, buffer: Any, at: int) -> Array:
    """A view of `buffer`, which begins at the offset `at`. Raises MalformedSafetensors."""
    begin, _, name, dtype, shape = tensor
    try:
        return np.ndarray(shape, dtype, buffer, begin - at)
    except ValueError as error:
        _unheld(name, shape, error)


def write(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """Return the pieces of a file, in order: the header, then one view per tensor that is not empty.

    Nothing is copied but what is not C-contiguous, so the arrays must keep still until the pieces are sent. Tensors
    are sorted by item size, largest first, otherwise in the order given. Raises TypeError for dtypes that are
    not in `STEP_DTYPES`, ValueError for a tensor named `__metadata__`.
    """
    header: dict[str, object] = {}
    if metadata:
        header[METADATA] = dict(metadata)
    pieces: list[bytes | memoryview] = [b""]
    end = 0
    for name, array in sorted(tensors.items(), key=_by_item_size):
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise TypeError(f"tensor {name!r} is of {array.dtype}; a file holds {', '.join(STEP_DTYPES)}")
        if name == METADATA:
            raise ValueError(f"no tensor can be named {METADATA!r}")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
        if begin < end:
            contiguous = array if array.flags.c_contiguous else np.ascontiguousarray(array)
            pieces.append(contiguous.data.cast("B"))
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    pieces[0] = len(text).to_bytes(8, "little") + text
    return pieces


def nbytes(pieces: Iterable[bytes | memoryview]) -> int:
    """Return the length in bytes of the file that `write` returned as `pieces`."""
    return sum(map(len, pieces))


def _by_item_size(item: tuple[str, Array]) -> int:
    return -item[1].itemsize


# -- the header ------------------------------------------------------------------------------------------------


def _header(view: memoryview, *, bounded: bool) -> tuple[int, dict[str, object]]:
    """Where the tensors' bytes start, and the header's members."""
    if len(view) < 8:
        raise MalformedSafetensors(f"the file is {len(view)} bytes long; its header's length alone takes 8")
    length = int.from_bytes(view[:8], "little")
    if bounded and length > MAX_HEADER:
        raise MalformedSafetensors(f"the header is {length} bytes long; {MAX_HEADER} are the most allowed")
    if length > len(view) - 8:
        raise MalformedSafetensors(f"the header is {length} bytes long, but only {len(view) - 8} follow")
    text = bytes(view[8 : 8 + length])
    try:
        header = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedSafetensors(f"the header is not valid JSON: {error}") from error
    if type(header) is not dict:
        raise MalformedSafetensors("the header is not a JSON object")
    # orjson reads -0 as the integer 0, the reference as a float, which is no dimension.
    if text.count(b":") != _colons(header) or b"-0" in text or b"\\u003" in text:
        header = _exactly(text)
    return 8 + length, header


def _colons(header: dict[str, Any]) -> int:
    """How many colons at least the text has that was read as `header`, if nothing was dropped.

    As many as it has exactly, if all is as usual: members that a tensor's record need not have are left out, so
    that whatever they hold is looked at exactly.
    """
    colons = len(header) + "".join(header).count(":")
    for name, member in header.items():
        if type(member) is not dict:
            continue
        if name == METADATA:
            texts = [text for text in member.values() if type(text) is str]
            colons += len(member) + "".join(member).count(":") + "".join(texts).count(":")
        else:
            colons += min(len(member), len(_FIELDS))
    return colons


def _exactly(text: bytes) -> dict[str, object]:
    if nesting(text) > _NESTING:
        raise MalformedSafetensors(f"the header nests deeper than {_NESTING} levels")
    try:
        header: dict[str, object] = json.loads(text, object_pairs_hook=unique, parse_int=_integer)
    except MalformedJSON as error:
        raise MalformedSafetensors(f"the header is ambiguous: {error}") from error
    return header


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if type(metadata) is not dict or not set(map(type, metadata.values())) <= {str}:
        raise MalformedSafetensors(f"{METADATA} is not a JSON object of strings")
    return metadata


def _placed(
    header: Mapping[str, object], available: int, bounded: bool, dtypes: Mapping[str, np.dtype[Any]]
) -> list[Placed]:
    """The tensors, which fill the `available` bytes without a gap."""
    if bounded and len(header) > MAX_TENSORS:
        raise MalformedSafetensors(f"the file has {len(header)} tensors; {MAX_TENSORS} are the most allowed")
    records = [_record(name, info, dtypes) for name, info in header.items()]
    records.sort(key=_offsets)
    end = 0
    for begin, stop, name, _, _ in records:
        if begin != end:
            kind = "overlaps what is before it" if begin < end else "leaves a hole before it"
            _refuse(name, f"begins at byte {begin} and {kind}, which ends at byte {end}")
        if stop > available:
            _refuse(name, f"ends at byte {stop}, but only {available} follow the header")
        end = stop
    if end != available:
        raise MalformedSafetensors(f"the tensors end at byte {end}, but {available} follow the header")
    return records


# -- a tensor's record -----------------------------------------------------------------------------------------


_offsets: Final = itemgetter(0, 1)


def _record(name: str, info: Any, dtypes: Mapping[str, np.dtype[Any]]) -> Placed:
    """Check one member of the header, as far as it can be checked by itself."""
    if type(info) is list and len(info) == len(_FIELDS):
        info = dict(zip(_FIELDS, info, strict=True))
    if type(info) is not dict or not info.keys() >= _FIELDS:
        _refuse(name, f"is not described by an object with {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(dtype) is dict and list(dtype.values()) == [None]:
        (dtype,) = dtype
    if type(dtype) is not str or dtype not in dtypes:
        _refuse(name, f"is of dtype {_shortened(dtype)}; accepted are {', '.join(dtypes)}")
    if type(offsets) is not list or list(map(type, offsets)) != [int, int]:
        _refuse(name, f"has the data_offsets {_shortened(offsets)}, which are not two offsets")
    begin, end = offsets
    size = _nbytes(name, shape, dtypes[dtype].itemsize)
    if end - begin != size:
        _refuse(name, f"needs {size} bytes, but its data_offsets {offsets} are {end - begin} apart")
    return begin, end, name, dtypes[dtype], shape


def _nbytes(name: str, shape: Any, itemsize: int) -> int:
    """Check the shape and return its size in bytes: in Python's integers, which do not wrap around."""
    if type(shape) is not list:
        _refuse(name, f"has the shape {_shortened(shape)}, which is not a list")
    # The reference computes in 64 bits, and refuses a product that leaves them even if a later dimension is 0.
    size = itemsize
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            _refuse(name, f"has the shape {_shortened(shape)}, which is not a list of sizes")
        size *= dimension
        if size >= _ADDRESSES:
            _refuse(name, f"has the shape {_shortened(shape)}, which is beyond any memory")
    return size


def _unheld(name: str, shape: list[int], error: ValueError) -> NoReturn:
    _refuse(name, f"has the shape {_shortened(shape)}, which NumPy cannot hold: {error}")


def _refuse(name: str, fault: str) -> NoReturn:
    raise MalformedSafetensors(f"tensor {_shortened(name)} {fault}")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
