"""safetensors files, right and wrong, from a seed: mutations that know the header's structure, and some that do not.

The header is kept as a tree whose objects are lists of (name, value) pairs, so that members can be there twice,
and whose leaves are JSON texts, so that numbers and strings can be written in any way.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Text:
    """JSON texts that f-strings cannot hold in Python 3.11."""

    NAMES = ('"x"', '"y"')
    F64 = '"F64"'
    DTYPE_MAP = '{"F32":null}'
    DTYPE_MAP_OF_TWO = '{"F32":null,"F16":null}'
    STRING_SHAPE = '["1"]'
    EMPTY_STRING = '""'
    OBJECT_OFFSETS = '{"0":0,"4":4}'
    LOWER_CASE = '"f32"'


class Object:
    def __init__(self, *members: tuple[str, Any]) -> None:
        self.members = list(members)


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
OURS = ("F64", "F32", "F16", "BF16", "I64")
NAMES = ("w", "b", "w:m", "", "é", "a\\b", 'a"b', "layer-0.bias", "{x}[0]", "\\u003a", "\0", "__metadata", "😀")
SCALARS = (
    "0", "1", "2", "4", "8", "-0", "-1", "1.0", "0.0", "1e0", "0e5", "1e999", "1e-999", "18446744073709551615",
    "18446744073709551616", "9223372036854775808", "4294967296", "4611686018427387904", "9" * 40, "9" * 400, "01",
    "NaN", "Infinity", "-", "true", "false", "null", '""', '"1"', '"F32"', '"F16"', '"BF16"', '"f32"', '"I32"',
    '"\\u0046\\u0033\\u0032"', '"\\ud800"', '"\\ud83d\\ude00"', '"\t"', "[]", "{}", "[[]]", "[0]", "[0,0]", "[1.0]",
    '{"F32":null}', '{"F32":[]}', '{"a":"b"}', '{"a":1,"a":2}', "[" * 124 + "]" * 124, "[" * 126 + "]" * 126, "",
)  # fmt: skip


def text_of(node: Any, rng: np.random.Generator, spaces: bool) -> str:
    gap = " " * int(rng.integers(3)) if spaces else ""
    if isinstance(node, Object):
        members = (f"{name}{gap}:{gap}{text_of(value, rng, spaces)}" for name, value in node.members)
        return "{" + gap + f",{gap}".join(members) + "}"
    if isinstance(node, list):
        return f"[{gap}" + f"{gap},".join(text_of(value, rng, spaces) for value in node) + "]"
    return str(node)


class Files:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def take(self, count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield self.file()

    def below(self, bound: int) -> int:
        return int(self.rng.integers(bound))

    def one_of(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def file(self) -> bytes:
        header, data = self.valid()
        kind = self.below(10)
        if kind in (0, 1, 2, 3, 4):
            for _ in range(1 + self.below(2)):
                self.mutate(header)
        spaces = self.below(4) == 0
        text = text_of(header, self.rng, spaces)
        if spaces:
            text = self.one_of(("", " ", "\n\t", "\r")) + text + self.one_of(("", " ", "\n\n", "\0", "x", "{}"))
        encoded = text.encode("utf-8", "surrogatepass")
        file = len(encoded).to_bytes(8, "little") + encoded + data
        return self.damaged(file, len(encoded)) if kind in (5, 6) else file

    # -- files that are right

    def valid(self) -> tuple[Object, bytes]:
        names = [str(name) for name in self.rng.permutation(NAMES)[: self.below(6)]]
        members: list[tuple[str, Any]] = []
        end = 0
        for name in names:
            dtype = self.one_of(OURS) if self.below(40) else self.one_of(tuple(SIZES))
            shape = [self.below(4) for _ in range(self.below(4))]
            if self.below(60) == 0:
                shape = self.one_of(([1] * 64, [1] * 65, [0, 2**62], [2**58, 0], [0, 2**64 - 1], [2**40, 2**40, 0]))
            begin, end = end, end + SIZES[dtype] * int(np.prod(np.array(shape, object)))
            record = [
                ('"dtype"', json.dumps(dtype)),
                ('"shape"', [str(size) for size in shape]),
                ('"data_offsets"', [str(begin), str(end)]),
            ]
            members.append((self.quoted(name), Object(*(record[i] for i in self.rng.permutation(3)))))
        members = [members[i] for i in self.rng.permutation(len(members))]
        if self.below(3) == 0:
            metadata = [(self.quoted(n), self.quoted(self.one_of(NAMES))) for n in self.rng.permutation(NAMES)[:3]]
            members.insert(self.below(len(members) + 1), ('"__metadata__"', Object(*metadata[: self.below(4)])))
        return Object(*members), self.rng.bytes(end)

    def quoted(self, text: str) -> str:
        return json.dumps(str(text), ensure_ascii=bool(self.below(2)))

    # -- faults of structure

    def mutate(self, header: Object) -> None:
        objects = [header]
        objects += [value for _, value in header.members if isinstance(value, Object)]
        # The records, rather than the header, most of the time.
        place = objects[0] if self.below(4) == 0 else self.one_of(objects)
        mutations: tuple[Callable[[Object], None], ...] = (
            self.replace_value, self.replace_value, self.change_list, self.change_list, self.change_list, self.repeat,
            self.drop, self.rename, self.add, self.swap, self.as_list, self.wrap,
        )  # fmt: skip
        self.one_of(mutations)(place)

    def member(self, place: Object) -> int:
        return self.below(len(place.members)) if place.members else -1

    def replace_value(self, place: Object) -> None:
        index = self.member(place)
        if index >= 0:
            place.members[index] = (place.members[index][0], self.one_of(SCALARS))

    def change_list(self, place: Object) -> None:
        lists = [value for _, value in place.members if isinstance(value, list)]
        if not lists:
            return
        values = self.one_of(lists)
        index = self.below(len(values) + 1)
        match self.below(5):
            case 0:
                values.insert(index, self.one_of(("0", "1", "1", "2")))
            case 1:
                values.insert(index, self.one_of(SCALARS))
            case 2 if values:
                values[index % len(values)] = self.one_of(SCALARS)
            case 3 if values and str(values[index % len(values)]).isdigit():
                values[index % len(values)] = str(int(values[index % len(values)]) + self.one_of((-8, -4, -1, 1, 4)))
            case _ if values:
                values.pop(index % len(values))

    def repeat(self, place: Object) -> None:
        index = self.member(place)
        if index >= 0:
            name, value = place.members[index]
            place.members.insert(self.below(len(place.members) + 1), (name, value))

    def drop(self, place: Object) -> None:
        if place.members:
            place.members.pop(self.member(place))

    def rename(self, place: Object) -> None:
        index = self.member(place)
        if index >= 0:
            name, value = place.members[index]
            escaped = '"' + "".join(f"\\u{ord(c):04x}" for c in name[1:-1] if ord(c) < 0x10000) + '"'
            renamed = self.one_of(
                (escaped, self.quoted(self.one_of(NAMES)), '"__metadata__"', '"dtype"', "x", '"\\ud800"')
            )
            place.members[index] = (renamed, value)

    def add(self, place: Object) -> None:
        name = self.quoted(self.one_of((*NAMES, "x", "y")))
        place.members.insert(self.below(len(place.members) + 1), (name, self.one_of(SCALARS)))

    def swap(self, place: Object) -> None:
        """Give one member's value to another."""
        if len(place.members) > 1:
            one, other = (int(i) for i in self.rng.permutation(len(place.members))[:2])
            (name, value), (other_name, other_value) = place.members[one], place.members[other]
            place.members[one], place.members[other] = (name, other_value), (other_name, value)

    def as_list(self, place: Object) -> None:
        """Write a member that is an object as the list of its values: the form that serde takes for records."""
        for index, (name, value) in enumerate(place.members):
            if isinstance(value, Object):
                fields = dict(value.members)
                ordered = [fields[f] for f in ('"dtype"', '"shape"', '"data_offsets"') if f in fields]
                place.members[index] = (name, ordered)
                return

    def wrap(self, place: Object) -> None:
        """Write a dtype as a map of one member: the form that serde takes for enumerations."""
        for index, (name, value) in enumerate(place.members):
            if name == '"dtype"':
                place.members[index] = (name, Object((str(value), self.one_of(("null", "null", "[]", "0")))))

    # -- faults of bytes

    def damaged(self, file: bytes, header: int) -> bytes:
        at = self.below(8 + header) if self.below(4) else self.below(len(file) + 1)
        match self.below(6):
            case 0:
                return file[:at]
            case 1:
                return file[:at] + self.rng.bytes(1) + file[at:]
            case 2:
                return file[:at] + file[at + 1 + self.below(3) :]
            case 3:
                return file + self.rng.bytes(1 + self.below(8))
            case 4:
                length = header + self.one_of((-8, -1, 1, 8, 1 << 20, 1 << 40))
                return max(length, 0).to_bytes(8, "little") + file[8:]
            case _:
                changed = bytearray(file)
                likely = self.one_of(b'0123456789-.eE[]{}",:\\ tfn\xff')
                changed[at % len(file)] = self.one_of((likely, self.below(256)))
                return bytes(changed)
