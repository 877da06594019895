"""Strict JSON at orjson's speed, and tensors written in it.

orjson alone is too kind for a service that must not guess (RFC 7493): of duplicate members the last one wins,
2^70 becomes a float, and nesting ends at 1,024. The standard library's parser can be taught all three, at a
multiple of the cost. So `loads` parses with orjson and then asks for *proof* that the strict rules hold:

- The text's colons and opening brackets are counted, and so are the members and containers of the parsed
  value, with the colons and brackets inside the strings that the walk came across. A member that was dropped
  as a duplicate, or anything the walk did not reach, leaves the text with more than the value, so equal
  counts prove that all was seen and nothing dropped. The walk stops once all containers are accounted for, so
  it never looks at the numbers in the innermost lists. Only escapes such as `\\u003a` could make a value
  show more than its text; they are looked for.
- The walk goes level by level, and gives up below the 64th.
- An integer over 2^53 - 1 has at least 16 digits in a row that no decimal point precedes.

Where the proof fails, which does not mean that the document is wrong, `_strict` decides: slow and exact, at five
to ten times the cost of orjson (0.2 to 0.7 s for 10 MB, and Python's lock is held), which callers with large
limits should know.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from service.wire.errors import InvalidValue, MalformedJSON, WireError

MAX_NESTING: Final = 64
MAX_DIMENSIONS: Final = 8
MAX_INTEGER: Final = 2**53 - 1

Body = bytes | bytearray | memoryview


def loads(body: Body) -> object:
    """Parse one JSON document.

    Raises MalformedJSON when it is empty, not UTF-8, starts with a byte order mark, is not JSON (so for `NaN`
    and `Infinity`), holds a float over the range of float64, an object with two members of one name, or more
    than `MAX_NESTING` levels; InvalidValue with its pointer for an integer beyond ±`MAX_INTEGER`.
    """
    text = bytes(body) if isinstance(body, memoryview) else body
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if _OVERFLOWING.search(text):  # an integer that overflows a float is JSON, and too large all the same
            _strict(text)
        raise MalformedJSON(f"the body is not valid JSON: {error}") from error
    if not _proved(text, value):
        _strict(text)
    return value


def dumps(document: object) -> bytes:
    """Write JSON; NumPy scalars, and arrays of any shape and layout in native byte order, may stand anywhere.

    Floats come out in the shortest form that reads back to the same value in their own precision, 0.1 for a
    float32 of 0.1; float16 in that of float32. NaN and the infinities come out as null, since JSON has no way to
    write them. Raises TypeError for what has no JSON form.
    """
    return orjson.dumps(document, default=plain, option=orjson.OPT_SERIALIZE_NUMPY)


def plain(array: object) -> np.generic | npt.NDArray[Any]:
    """Return a NumPy array in the form that orjson takes: C-contiguous, native order, a scalar if 0-d."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{type(array).__name__} has no JSON form")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"arrays of {array.dtype} have no JSON form")
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return native if array.ndim else native[0]


def pointer(parent: str, *tokens: str | int) -> str:
    """Return the RFC 6901 pointer of what lies below `parent` under `tokens` (member names, list indices)."""
    return parent + "".join("/" + str(token).replace("~", "~0").replace("/", "~1") for token in tokens)


# -- tensors ---------------------------------------------------------------------------------------------------

_NUMBERS: Final = frozenset((float, int))
_KINDS: Final[dict[type, str]] = {
    float: "a number",
    int: "a number",
    bool: "a boolean",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def tensor(value: object, pointer: str, dimensions: int = MAX_DIMENSIONS) -> npt.NDArray[np.float64]:
    """Return a number, or rectangular nested lists of numbers, as a C-contiguous float64 array.

    A number has shape (), `[]` shape (0,), `[[], []]` shape (2, 0). Raises InvalidValue for all else (NumPy would
    take `true`, `"1"` and null for numbers), with the pointer of the first wrong element, `pointer` being that
    of `value` itself; and for more than so many `dimensions`.
    """
    # One list per level, flattened as the levels are entered: all loops over numbers are C's.
    shape: list[int] = []
    row: list[Any] = [value]
    while not (kinds := set(map(type, row))) <= _NUMBERS:
        if kinds != {list}:
            raise _unexpected(row, shape, pointer)
        if len(shape) == dimensions:
            raise InvalidValue(pointer, f"a tensor of more than {dimensions} dimensions")
        lengths = set(map(len, row))
        if len(lengths) > 1:
            raise _ragged(row, shape, pointer)
        shape += lengths
        row = list(chain.from_iterable(row))
    try:
        return np.fromiter(row, np.float64, len(row)).reshape(shape)
    except OverflowError as error:
        raise InvalidValue(pointer, "an integer beyond the range of float64") from error


def _unexpected(row: list[Any], shape: list[int], tensor: str) -> InvalidValue:
    """The first element decides between numbers and lists, unless it is neither."""
    wanted = frozenset((list,)) if type(row[0]) is list else _NUMBERS
    index = next(i for i, element in enumerate(row) if type(element) not in wanted)
    expected = "a list, as before it" if list in wanted else "a number"
    found = _KINDS.get(type(row[index]), type(row[index]).__name__)
    return InvalidValue(_element(index, shape, tensor), f"expected {expected}, found {found}")


def _ragged(row: list[Any], shape: list[int], tensor: str) -> InvalidValue:
    expected = len(row[0])
    index = next(i for i, element in enumerate(row) if len(element) != expected)
    return InvalidValue(
        _element(index, shape, tensor),
        f"a list of {len(row[index])} where those before it have {expected}: tensors are rectangular",
    )


def _element(index: int, shape: list[int], tensor: str) -> str:
    """The pointer of the element at the flat `index` of the levels that `shape` describes."""
    tokens: list[int] = []
    for length in reversed(shape):
        index, token = divmod(index, length)
        tokens.append(token)
    return pointer(tensor, *reversed(tokens))


# -- the proof -------------------------------------------------------------------------------------------------

_SMALL: Final = 8192  # below this, a dozen NumPy calls cost more than bytes methods do
_BLOCK: Final = 1 << 18  # and above, this bounds the memory of the masks; 0.5 ns a byte
_LONG: Final = 16  # digits of MAX_INTEGER

# Digits become 0, and what may stand before a number a comma; strings of digits are let go by.
_CLASSES: Final = bytes(ord("0") if c in b"0123456789" else ord(",") if c in b"[,: \t\n\r-" else c for c in range(256))
_LONG_INTEGER: Final = b"," + b"0" * _LONG


def _proved(text: bytes | bytearray, value: object) -> bool:
    """Whether it is proved that `text`, which orjson read as `value`, keeps the strict rules."""
    if type(value) is not dict and type(value) is not list:
        return False  # no client sends a scalar, and a short text costs `_strict` little
    brackets, colons, long_integers = _census(text) if len(text) < _SMALL else _census_in_blocks(text)
    if long_integers or (b"\\" in text and b"\\u00" in text):
        return False
    level: list[Any] = [value]
    strings: list[str] = []
    for _ in range(MAX_NESTING):
        brackets -= len(level)
        if not brackets and not colons:
            return True  # whatever is in the lists of this level is neither a container nor has members
        below: list[Any] = []
        lists = []
        for container in level:
            if type(container) is dict:
                colons -= len(container)
                _open(container, below, strings)
            else:
                lists.append(container)
        if lists or not below:
            # Names such as "layers[0]" or "kernel:0" are counted before any list of numbers is searched.
            seen = "".join(strings)
            strings.clear()
            colons -= seen.count(":")
            brackets -= seen.count("[") + seen.count("{")
        if not brackets or not level:
            return not brackets and not colons
        below += [inner for each in lists for inner in each if type(inner) is list or type(inner) is dict]
        level = below
    return False


def _open(members: dict[str, Any], containers: list[Any], strings: list[str]) -> None:
    """Add what is in an object to the `containers` of the next level and to the `strings` that were seen."""
    strings += members
    for inner in members.values():
        kind = type(inner)
        if kind is list or kind is dict:
            containers.append(inner)
        elif kind is str:
            strings.append(inner)


def _census(text: bytes | bytearray) -> tuple[int, int, bool]:
    """Count opening brackets and colons; tell whether there may be an integer of `_LONG` digits (if so, true)."""
    return (
        text.count(b"[") + text.count(b"{"),
        text.count(b":"),
        text.translate(_CLASSES).find(_LONG_INTEGER) >= 0,
    )


def _census_in_blocks(text: bytes | bytearray) -> tuple[int, int, bool]:
    """`_census` by NumPy, at a third of the cost where the text is long."""
    characters = np.frombuffer(text, np.uint8)
    brackets = colons = 0
    long_integers = False
    for start in range(0, len(characters), _BLOCK):
        block = characters[start : start + _BLOCK]
        brackets += int(np.count_nonzero((block | 0x20) == ord("{")))  # the bit between [ and {, of no others
        colons += int(np.count_nonzero(block == ord(":")))
        long_integers |= _has_long_integer(characters[max(0, start - 1) : start + _BLOCK + _LONG])
    return brackets, colons, long_integers


def _has_long_integer(block: npt.NDArray[np.uint8]) -> bool:
    """Whether `_LONG` digits in a row follow a character that is neither a digit nor a decimal point."""
    digit = (block - np.uint8(ord("0"))) < 10
    run = digit[1:]
    for width in (1, 2, 4, 8):
        run = run[:-width] & run[width:]
    before = block[: len(run)]
    return bool(np.any(run & ~digit[: len(run)] & (before != ord("."))))


# -- the exact way ---------------------------------------------------------------------------------------------

_LONG_DIGITS: Final = re.compile(rb"\d{%d}" % _LONG)
_OVERFLOWING: Final = re.compile(rb"\d{300}")
_STEPS: Final = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


class _Beyond:
    """Stands for an integer beyond MAX_INTEGER until the tree is whole and its pointer can be told."""

    def __init__(self, digits: str) -> None:
        self.digits = digits if len(digits) <= 40 else f"{digits[:37]}..."


def _strict(text: bytes | bytearray) -> None:
    """Raise what is wrong with `text`, if anything is; it may be text that orjson refused."""
    if nesting(text) > MAX_NESTING:
        raise MalformedJSON(f"the body nests deeper than {MAX_NESTING} levels")
    beyond: list[_Beyond] = []

    def integer(digits: str) -> int | _Beyond:
        if len(digits) <= _LONG + 1 and abs(int(digits)) <= MAX_INTEGER:
            return int(digits)
        beyond.append(_Beyond(digits))
        return beyond[-1]

    parse_int = integer if _LONG_DIGITS.search(text) else None
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_int=parse_int)
    except WireError:
        raise
    except ValueError as error:
        raise MalformedJSON(f"the body is not valid JSON: {error}") from error
    if beyond:
        message = f"the integer {beyond[0].digits} is beyond ±(2^53 - 1), the range that all JSON readers share"
        raise InvalidValue(_find(beyond[0], value, "") or "", message)


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """`object_pairs_hook` of the standard library's parser: raises MalformedJSON for a name used twice."""
    members = dict(pairs)
    if len(members) < len(pairs):
        # What is left of the names once each was taken away once.
        (twice, _), *_ = (Counter(name for name, _ in pairs) - Counter(members.keys())).items()
        raise MalformedJSON(f"an object has two members named {twice[:80]!r}")
    return members


def nesting(text: bytes | bytearray) -> int:
    """The depth of a JSON text. It counts brackets outside of strings, so it needs no recursion."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return 0
    # Without escapes, every other piece between quotes is a string. Pairs of backslashes go first, since one
    # before a quote escapes it only if it is not itself escaped.
    pieces = bytes(text).replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    steps = _STEPS[np.frombuffer(b"".join(pieces[::2]), np.uint8)]
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _find(wanted: _Beyond, value: object, at: str) -> str | None:
    if value is wanted:
        return at
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for token, inner in items:
        if isinstance(inner, (list, dict, _Beyond)):
            found = _find(wanted, inner, pointer(at, token))
            if found is not None:
                return found
    return None
