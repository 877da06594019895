"""A bounded share of what `make fuzz` does to the readers of bytes: damage to what they read, with fixed seeds."""

import random

import pytest

from tests.fuzz import targets
from tests.fuzz.targets import TARGETS, seeds_of

ROUNDS = 1500
INTERESTING = [b"", b"\0", b"\xff", b"{", b"}", b"[", b"]", b'"', b":", b",", b"-", b"e999", b"NaN", b"true", b"1e400"]
INTERESTING += [
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"9007199254740993",
    b'"__metadata__"',
    b'"w":',
    b"null",
    b"\r\n",
]


def damaged(draw: random.Random, seeds: list[bytes]) -> bytes:
    """A seed after one to four accidents."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(data))
        match draw.randrange(6):
            case 0 if data:
                data[at % len(data)] = draw.randrange(256)
            case 1:
                data[at:at] = draw.choice(INTERESTING)
            case 2:
                del data[at : at + draw.randint(1, 16)]
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[at : at + draw.randint(1, 64)]
            case _:
                other = draw.choice(seeds)
                cut = draw.randint(0, len(other))
                data[at:] = other[cut:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_read_or_refused(name: str) -> None:
    draw, seeds = random.Random(f"wire {name}"), seeds_of(name)
    for seed in seeds:
        TARGETS[name](seed)
    for _ in range(ROUNDS):
        data = damaged(draw, seeds)
        try:
            TARGETS[name](data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


# Of the others, refusals are not told apart from what was read.
DEEP = ["step", "step-safetensors", "session", "patch", "checkpoint"]


@pytest.mark.parametrize("name", DEEP)
def test_the_seeds_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the targets would be shown nothing but what is refused at once."""
    monkeypatch.setattr(targets, "REFUSED", ())
    for seed in seeds_of(name):
        TARGETS[name](seed)
