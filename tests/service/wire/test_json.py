"""The fast way through `loads` may never let pass what the exact way refuses; both against a reader of their own."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import orjson
import pytest
from hypothesis import given, settings

import service.wire.json as wire
from service.wire.errors import InvalidValue, MalformedJSON, WireError
from service.wire.json import dumps, loads, plain, pointer, tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# -- a reader that keeps everything, and says all that is wrong ---------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """An object with all of its members, duplicates too."""


def faults(body: bytes) -> set[str]:
    """Every rule that `body` breaks: "malformed", or the pointer of an integer that is too large."""
    found = set()

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            found.add("malformed")
        return value

    def constant(text: str) -> None:
        found.add("malformed")

    try:
        tree = json.loads(
            body.decode(), object_pairs_hook=Pairs, parse_float=number, parse_int=int, parse_constant=constant
        )
    except ValueError:
        return {"malformed"}
    return found | set(faults_in(tree, "", 1))


def faults_in(value: Any, at: str, depth: int) -> Iterator[str]:
    if isinstance(value, list) and depth > 64:
        yield "malformed"
    if isinstance(value, Pairs):
        if len({name for name, _ in value}) < len(value):
            yield "malformed"
        for name, inner in value:
            yield from faults_in(name, "", 0)
            yield from faults_in(inner, pointer(at, name), depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from faults_in(inner, pointer(at, index), depth + 1)
    elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        yield "malformed"
    elif isinstance(value, int) and abs(value) > 2**53 - 1:
        yield at


def check(body: bytes) -> str:
    """Hold `loads`, and its fast way by itself, against `faults`."""
    expected = faults(body)
    try:
        value = loads(body)
    except MalformedJSON:
        assert expected, body
        # Where a document has faults of both kinds, either may be told.
        assert "malformed" in expected, body
        return "malformed"
    except InvalidValue as error:
        at = error.pointer
    else:
        assert not expected, body
        assert value == json.loads(body)
        return "proved" if wire._proved(body, value) else "exact"
    assert at in expected, (body, expected)
    return "invalid"


# -- documents ----------------------------------------------------------------------------------------------------

NUMBERS = (
    "0", "1", "-1", "0.5", "-0.25", "1e-05", "2.5E+3", "0.12345678901234567", "-1234.1234567890123456789", "-0", "-0.0",
    "9007199254740991", "-9007199254740991", "9007199254740992", "-9007199254740992", "9007199254740993", "1e300",
    "9223372036854775808", "18446744073709551616", "-18446744073709551616", "1152921504606846976", "1e16", "1e22",
    "1234567890123456.5", "9007199254740993.0", "123456789012345678e-3", "1e999", "-1e999", "9" * 400, "1e-400",
    "0e1234567890123456789", "1" + "0" * 15, "0." + "0" * 40 + "1",
)  # fmt: skip
STRINGS = (
    '""', '"a"', '"b"', '"\\u0061"', '"a:b"', '"\\u003a"', '"[["', '"}"', '"{]"', '"\\\\"', '"\\""', '"\\"["', '"é"',
    '"\\u005b\\u007B\\u003A"', '"1234567890123456789"', '":1234567890123456789,"', '"\\ud83d\\ude00"', '"\\ud800"',
    '"/~"', '"a\\\\\\"[:"', '"\\n"',
)  # fmt: skip
WORDS = ("true", "false", "null")
BAD = (
    "NaN",
    "Infinity",
    "-Infinity",
    "01",
    "+1",
    ".5",
    "1.",
    "'a'",
    "[1,]",
    '{"a":1,}',
    "",
    "tru",
    '"\x01"',
    "\ufeff1",
)


def lists(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]")


def objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(st.sampled_from(STRINGS), inner).map(": ".join)
    return st.lists(members, max_size=3).map(lambda items: "{" + ", ".join(items) + "}")


def deep(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Put below 58 to 66 levels, of which every other one may be an object."""

    def nest(text: str, levels: int, both: bool) -> str:
        for level in range(levels):
            text = f'{{"a":{text}}}' if both and level % 2 else f"[{text}]"
        return text

    return st.builds(nest, inner, st.integers(58, 66), st.booleans())


leaves = st.sampled_from(NUMBERS) | st.sampled_from(STRINGS) | st.sampled_from(WORDS)
good = st.recursive(
    st.sampled_from(("0.5", "1", '"a"', '"x:y"', "true")),
    lambda inner: lists(inner) | st.dictionaries(st.sampled_from(STRINGS[:2] + STRINGS[4:5]), inner, max_size=3).map(
        lambda members: "{" + ",".join(map(":".join, members.items())) + "}"
    ),
)  # fmt: skip
any_kind = st.recursive(leaves | st.sampled_from(BAD), lambda inner: lists(inner) | objects(inner) | deep(inner))
documents = good | any_kind


def mutated(body: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, removed, inserted in edits:
        at %= len(body) + 1
        body = body[:at] + inserted + body[at + removed :]
    return body


EDITS = st.tuples(
    st.integers(0, 400),
    st.integers(0, 2),
    st.sampled_from([b"", b"\xff", b"\\u003a", *(bytes([c]) for c in b'"\\[]{}:,1.-e ')]),
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(documents, st.lists(EDITS, max_size=2))
def test_loads_takes_what_the_exact_reader_takes(text: str, edits: list[tuple[int, int, bytes]]) -> None:
    check(mutated(text.encode("utf-8"), edits))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(documents)
def test_loads_takes_what_the_exact_reader_takes_in_large_bodies(text: str) -> None:
    large = ",".join(["0.12345678901234567"] * 450)
    assert len(large) > wire._SMALL
    check(f'{{"large":[{large}],"b":{text}}}'.encode())
    check(f'[{text}, "{large}"]'.encode())


def test_loads_agrees_on_many_small_mutations_and_all_outcomes_are_met() -> None:
    rng = np.random.default_rng(11)
    bodies = [
        b'{"gradients":{"w":[[0.5,-1],[2e-3,4]],"b":0.25},"loss":0.125,"return":"params","worker":"w1"}',
        b'{"name":"a:b","labels":{"x[0]":"{y}"},"groups":[{"match":"*.bias","lr":0.1},{"match":"c","frozen":true}]}',
        b'{"shapes":{"a":[784,10],"a2":[10],"\\u0062":[1234567890123456]},"at":"1234567890123456789"}',
        b"[" * 60 + b'{"a":[1,[2.5]],"b":9007199254740991}' + b"]" * 60,
        b'{"a":[0.5,{"b":[-90071992547409910]}],"c":[0.90071992547409910,1e20]}',
    ]
    pieces = [b"1234567890123456789", b'"a":', b"[[", b"\\u003a", b"null"]
    pieces += [bytes([c]) for c in b'"\\[]{}:,.-019eE at']
    outcomes: Counter[str] = Counter()
    for _ in range(20_000):
        body = bodies[rng.integers(len(bodies))]
        for _ in range(rng.integers(3)):
            at = int(rng.integers(len(body)))
            body = body[:at] + pieces[rng.integers(len(pieces))] + body[at + int(rng.integers(2)) :]
        outcomes[check(body)] += 1
    assert outcomes.keys() == {"proved", "exact", "malformed", "invalid"}
    assert min(outcomes.values()) > 200, outcomes
    assert outcomes["proved"] > 2000, outcomes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(any_kind, max_size=8).map("".join), st.integers(17, 70))
def test_the_census_by_blocks_counts_what_the_plain_one_counts(text: str, block: int) -> None:
    body = b"[" + text.encode()
    brackets, colons, long_integers = wire._census(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_BLOCK", block)
        by_blocks = wire._census_in_blocks(body)
    assert by_blocks[:2] == (brackets, colons)
    assert by_blocks[2] or not long_integers


@pytest.mark.parametrize("offset", range(40))
def test_a_long_integer_is_found_wherever_a_block_ends(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_BLOCK", 32)
    body = b"[" + b"1," * 32 + b" " * offset + b"9007199254740992,0.5]"
    assert wire._census_in_blocks(body)[2]
    assert not wire._census_in_blocks(body.replace(b"992,", b",99"))[2]
    assert not wire._census_in_blocks(body.replace(b"9007", b"0.9007"))[2]


# -- the rules, one by one ----------------------------------------------------------------------------------------

FILLER = b'"filler":[' + b"0.125," * 3000 + b"1]"


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"[1,]", b'{"a":1,}', b"NaN", b'{"a":NaN}', b"[Infinity]", b"[-Infinity]", b"1 2", b"'a'",
        b"[1e999]", b"[-1e999]", b"[01]", b"[1] //", b'\xef\xbb\xbf{"a":1}', b'{"a":"\xff"}', b'["\xed\xa0\x80"]',
        b'{"a":1,"a":1}', b'{"a":1,"\\u0061":1}', b'[[{"a":{"b":1,"c":2,"b":3}}]]', b'{"":1,"":2}', b'["\\ud800"]',
        b'{"a":1,"a":{"\\u003a\\u003a":2}}', b"[" * 65 + b"]" * 65, b'{"a":' * 65 + b"1" + b"}" * 65, b"[" * 2000,
        b"[" * 100_000 + b"]" * 100_000, b'["\\\\",' + b"[" * 64 + b"]" * 64 + b"]",
        b'["\\"",' + b"[" * 64 + b"]" * 64 + b"]",
        b'["]]]]]]]]",' + b"[" * 64 + b"]" * 64 + b"]",
    ],
)  # fmt: skip
def test_malformed_bodies(body: bytes) -> None:
    for wrapped in (body, bytearray(body), memoryview(body)):
        with pytest.raises(MalformedJSON):
            loads(wrapped)


def test_malformed_large_bodies() -> None:
    assert loads(b"{" + FILLER + b"}") == orjson.loads(b"{" + FILLER + b"}")
    for fault in (b'"filler":1', b'"x":{"y":0,"y":0}', b'"x":' + b"[" * 64 + b"]" * 64, b'"x":NaN'):
        with pytest.raises(MalformedJSON):
            loads(b"{" + FILLER + b"," + fault + b"}")


def test_a_duplicate_is_named() -> None:
    with pytest.raises(MalformedJSON, match="two members named 'lr'"):
        loads(b'{"optimizer":{"kind":"adam","lr":1,"lr":2}}')


def test_sixty_four_levels_are_enough() -> None:
    assert loads(b"[" * 64 + b"]" * 64)
    assert loads(b'{"a":' * 64 + b"1" + b"}" * 64)
    assert loads(b'["' + b"[" * 200 + b'"]') == ["[" * 200]
    assert loads(b"[" + b"[]," * 200 + b"[]]")


@pytest.mark.parametrize(
    ("body", "at"),
    [
        (b"9007199254740992", ""),
        (b"[-9007199254740992]", "/0"),
        (b'{"a":[1,{"b/c~d":[0.5,1152921504606846976]}]}', "/a/1/b~1c~0d/1"),
        (b'{"a":18446744073709551616}', "/a"),
        (b'{"a":-9223372036854775809}', "/a"),
        (b'{"a": 1180591620717411303424, "b": 1180591620717411303424}', "/a"),
        (b'{"":[[' + b"9" * 400 + b"]]}", "//0/0"),
        (b"[" + b"9" * 5000 + b"]", "/0"),
        (b"{" + FILLER + b',"b":[[0.5],[\n9007199254740993]]}', "/b/1/0"),
        (b'{"b":\t100000000000000000000,' + FILLER + b"}", "/b"),
    ],
)
def test_integers_beyond_53_bits(body: bytes, at: str) -> None:
    for wrapped in (body, bytearray(body), memoryview(body)):
        with pytest.raises(InvalidValue, match="beyond") as caught:
            loads(wrapped)
        assert caught.value.pointer == at
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"[9007199254740991, -9007199254740991]", b"[1e300, 1e16, 9007199254740993.0]", b'"9007199254740993"',
        b'{"9007199254740993":[0.9007199254740993]}', b"[1234567890123456]", b"{" + FILLER + b',"b":9007199254740991}',
    ],
)  # fmt: skip
def test_numbers_that_are_fine(body: bytes) -> None:
    assert loads(body) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"gradients":{"w":[[0.12345678901234567,-1],[2e-3,4]],"b":0.25},"loss":0.5,"return":"params"}',
        b'{"params":{"layers[0]/kernel:0":[1,2],"{x}":[3]},"worker":"a:b"}',
        b'{"optimizer":{"kind":"adam"},"groups":[{"match":"*.bias"},{"match":"w"}],"transforms":[]}',
        b'{"optimizer":"a\\"b\\\\","shapes":{"a":[784,10]}}',
        b"{}",
        b"[]",
        b"{" + FILLER + b',"x:y[0]":[[1],[2]]}',
    ],
)
def test_usual_bodies_take_the_fast_way(body: bytes) -> None:
    assert wire._proved(body, loads(body))


# -- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        0.5, 3, -0.0, [], [1], [1.5, 2], [[]], [[], []], [[[]], [[]]], [[1, 2.5], [3, 4]], [[[[[[[[1.0]]]]]]]],
        np.arange(60.0).reshape(3, 4, 5).tolist(), [2**53 - 1, 1e300],
    ],
)  # fmt: skip
def test_tensors(value: Any) -> None:
    array = tensor(value, "/w")
    expected = np.array(value, np.float64)
    assert array.dtype == np.float64
    assert array.flags.c_contiguous
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("value", "at", "said"),
    [
        (True, "", "expected a number, found a boolean"),
        (None, "", "found null"),
        ("1", "", "found a string"),
        ({}, "", "found an object"),
        ([True, 1.0], "/0", "expected a number, found a boolean"),
        ([1.0, False], "/1", "found a boolean"),
        ([[1, 2], [3, True]], "/1/1", "found a boolean"),
        ([[1, 2], [None, 4]], "/1/0", "found null"),
        ([[1, 2], ["3", 4]], "/1/0", "found a string"),
        ([[[1], [2]], [[3], [{}]]], "/1/1/0", "found an object"),
        ([1, [2]], "/1", "expected a number, found a list"),
        ([[1], 2], "/1", "expected a list, as before it, found a number"),
        ([[1], ""], "/1", "found a string"),
        ([[], {}], "/1", "found an object"),
        ([[1, 2], [3]], "/1", "a list of 1 where those before it have 2"),
        ([[[1], [2]], [[3], [4, 5]]], "/1/1", "a list of 2 where those before it have 1"),
        ([[], [1]], "/1", "a list of 1"),
        ([[[[[[[[[1.0]]]]]]]]], "", "more than 8 dimensions"),
        ([[[[[[[[[]]]]]]]]], "", "more than 8 dimensions"),
        ([1, 10**400], "", "beyond the range"),
    ],
)
def test_what_is_no_tensor(value: Any, at: str, said: str) -> None:
    with pytest.raises(InvalidValue, match=said) as caught:
        tensor(value, "/gradients/w~1x")
    assert caught.value.pointer == "/gradients/w~1x" + at


@given(
    st.recursive(
        st.sampled_from([0.5, 1, 2.0, True, None, "1", ""]),
        lambda inner: st.lists(inner, max_size=3) | st.lists(inner, min_size=2, max_size=2).map(lambda x: x * 2),
        max_leaves=12,
    )
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_tensors_agree_with_numpy_where_all_are_numbers(value: Any) -> None:
    def only_numbers(value: Any) -> bool:
        return all(map(only_numbers, value)) if isinstance(value, list) else type(value) in (int, float)

    try:
        expected = np.array(value, np.float64) if only_numbers(value) else None
    except ValueError:
        expected = None
    if expected is None or expected.ndim > 8:
        with pytest.raises(InvalidValue):
            tensor(value, "")
    else:
        np.testing.assert_array_equal(tensor(value, ""), expected, strict=True)


# -- writing ------------------------------------------------------------------------------------------------------


def test_floats_are_written_in_the_shortest_form_of_their_own_precision() -> None:
    single, double = np.float32(0.1), np.float64(1) / 3
    document = {
        "row": np.array([0.1, 1e-7], np.float32),
        "scalar": np.array(0.1, np.float32),
        "generic": single,
        "double": np.array([double]),
        "half": np.array([0.5], np.float16),
        "nested": [{"step": np.int64(3)}],
    }
    assert dumps(document) == (
        b'{"row":[0.1,1e-7],"scalar":0.1,"generic":0.1,"double":[0.3333333333333333],"half":[0.5],"nested":[{"step":3}]}'
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_written_floats_read_back_to_the_same_bits(dtype: type) -> None:
    bits = np.random.default_rng(5).integers(0, 2**63, 10_000, np.uint64).view(dtype)
    values = bits[np.isfinite(bits)]
    back = tensor(loads(dumps({"w": values}))["w"], "/w")  # type: ignore[index]
    assert back.astype(dtype).tobytes() == values.tobytes()


def test_numbers_that_json_lacks_are_null() -> None:
    assert dumps([np.array([np.nan, np.inf, 1.0]), -math.inf, np.array(np.nan)]) == b"[[null,null,1.0],null,null]"


def test_arrays_of_any_layout_are_written() -> None:
    a = np.arange(6.0).reshape(2, 3)
    arrays = [a.T, a[:, ::2], a[:0], np.broadcast_to(a[0, 1], (2,))]
    assert dumps(arrays) == dumps([a.T.tolist(), a[:, ::2].tolist(), [], [1.0, 1.0]])
    assert dumps([plain(array) for array in arrays]) == dumps(arrays)
    assert dumps(plain(a.astype(">f4"))) == dumps(a)


@pytest.mark.parametrize("value", [object(), np.array([1j]), np.array(["a"]), np.zeros(1, [("bf16", "<u2")])])
def test_what_has_no_json_form(value: object) -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        plain(value)
    with pytest.raises(TypeError):
        dumps(value)


def test_pointers_escape_as_rfc_6901_says() -> None:
    assert pointer("/a", "b/c", 3, "~1", "") == "/a/b~1c/3/~01/"


def test_all_faults_are_wire_errors() -> None:
    assert issubclass(MalformedJSON, WireError)
    assert issubclass(InvalidValue, WireError)
    assert str(InvalidValue("/a", "too large")) == "/a: too large"
    assert str(InvalidValue("", "too large")) == "too large"
