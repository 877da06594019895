"""Who is taken in, and what is remembered of whom."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.aggregation import ledger as module
from core.aggregation.aggregation import ASYNC, Aggregation, DelayCompensation
from core.aggregation.ledger import Ledger, Sender, Worker
from core.aggregation.staleness import Inverse
from core.errors import (
    AlreadyContributed,
    BaseStepAhead,
    BaseStepRequired,
    CoreError,
    NotPulled,
    StaleGradient,
    TooFarAhead,
    WorkerRequired,
)

SYNC = Aggregation(mode="sync", workers=4)
TIMED = Aggregation(mode="sync", workers=4, quorum=2, timeout=10.0)
BUFFERED = Aggregation(mode="buffered", size=3)
SSP = Aggregation(mode="ssp", bound=1, worker_timeout=60.0)
FRESH = Aggregation(max_staleness=2)
AGED = Aggregation(staleness=Inverse())
DELAYED = Aggregation(delay_compensation=DelayCompensation())


def took(aggregation: Aggregation, senders: Sequence[Sender], *, step: int = 7) -> Ledger:
    """A ledger that has taken `senders` in, one after another."""
    made = Ledger()
    for sender in senders:
        made.admit(aggregation, step, sender)
        made.record(aggregation, step, sender)
    return made


def sent(names: str, at: float = 100.0) -> list[Sender]:
    """A contribution of each worker named by a letter; '-' is nobody."""
    return [Sender(None if name == "-" else name, at=at) for name in names]


# -- admission -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Aggregation, str, Sender, type[CoreError], dict[str, Any]]] = {
    "ahead": (ASYNC, "", Sender("a", 8), BaseStepAhead, {"step": 7}),
    "ahead of a round": (SYNC, "", Sender(None, 8), BaseStepAhead, {"step": 7}),
    "stale": (FRESH, "", Sender("a", 4), StaleGradient, {"step": 7, "staleness": 3, "limit": 2}),
    "stale in a round": (
        Aggregation(mode="sync", workers=2, max_staleness=0), "", Sender(None, 6), StaleGradient, {"staleness": 1},
    ),
    "no base step": (FRESH, "", Sender("a"), BaseStepRequired, {}),
    "no base step, scaled": (AGED, "", Sender(None), BaseStepRequired, {}),
    "no base step in a buffer": (
        Aggregation(mode="buffered", size=2, staleness=Inverse()), "", Sender("a"), BaseStepRequired, {},
    ),
    "nobody in ssp": (SSP, "", Sender(), WorkerRequired, {}),
    "nobody, compensated": (DELAYED, "", Sender(), WorkerRequired, {}),
    "twice": (SYNC, "ab", Sender("a"), AlreadyContributed, {"round": 8, "worker": "a"}),
    "too far": (SSP, "abaaa", Sender("a", at=100), TooFarAhead, {"clock": 4, "slowest": 2, "bound": 1, "step": 7}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(name: str) -> None:
    aggregation, before, sender, error, members = REFUSED[name]
    book = took(aggregation, sent(before))
    described = json.dumps(book.describe())
    with pytest.raises(error) as refusal:
        book.admit(aggregation, 7, sender)
    assert {member: getattr(refusal.value, member) for member in members} == members
    assert json.dumps(book.describe()) == described


@pytest.mark.parametrize(
    ("aggregation", "before", "sender"),
    [
        (ASYNC, "aaa", Sender("a", 7)),
        (ASYNC, "", Sender(None, 0)),
        (FRESH, "", Sender("a", 5)),
        (SYNC, "ab", Sender("c")),
        (SYNC, "a--", Sender()),  # those without a name may be anybody
        (BUFFERED, "aa", Sender("a")),
        (SSP, "aab", Sender("a", at=100)),
        (SSP, "aaaaaa", Sender("a", at=100)),  # nobody is slower than who is alone
        (DELAYED, "a", Sender("a", 3)),  # nothing was pulled, so nothing is compensated
    ],
)
def test_what_is_taken_in(aggregation: Aggregation, before: str, sender: Sender) -> None:
    took(aggregation, sent(before)).admit(aggregation, 7, sender)


def test_who_contributed_is_free_again_once_the_round_is_closed() -> None:
    book = took(SYNC, sent("ab-"))
    assert (list(book.contributed), book.received, book.opened_at) == (["a", "b"], 3, 100.0)
    book.clear_round()
    assert (book.contributed, book.received, book.opened_at) == ({}, 0, 0.0)
    book.admit(SYNC, 8, Sender("a"))
    assert book.workers["a"].contributions == 1


def test_what_is_remembered_of_a_worker() -> None:
    book = took(ASYNC, [Sender("a", 3, 2.5, 100.0)])
    assert book.workers["a"] == Worker(1, 100.0, 8, 4, 2.5, 1)
    book.record(ASYNC, 8, Sender("a", 8, 1.0, 101.0))
    assert book.workers["a"] == Worker(2, 101.0, 9, 0, 1.0, 2)
    assert book.record(ASYNC, 9, Sender(None, 4)) == 5, "its age"
    assert list(book.workers) == ["a"]


def test_a_copy_is_a_ledger_of_its_own() -> None:
    book = took(SYNC, sent("ab"))
    before = json.dumps(book.describe())
    copy = book.copy()
    copy.record(SYNC, 7, Sender("c", at=101.0))
    copy.record(SYNC, 7, Sender("a", at=101.0))
    assert json.dumps(book.describe()) == before
    assert (copy.received, book.received) == (4, 2)


def test_those_that_were_seen_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    assert list(took(ASYNC, sent("abcad")).workers) == ["c", "a", "d"]
    book = took(DELAYED, sent("abc"))
    book.pull(DELAYED, "d", 7, 101.0)
    assert list(book.workers) == ["b", "c", "d"]


# -- clocks ----------------------------------------------------------------------------------------------------------


def clocks(aggregation: Aggregation, events: Sequence[tuple[str, float]]) -> tuple[dict[str, int], list[int]]:
    """Where each stands after `events` (who, when), and which of these had to wait."""
    book, waited = Ledger(), []
    for index, (name, at) in enumerate(events):
        sender = Sender(name, at=at)
        try:
            book.admit(aggregation, index, sender)
        except TooFarAhead:
            waited.append(index)
        else:
            book.record(aggregation, index, sender)
    return {name: worker.clock for name, worker in sorted(book.workers.items())}, waited


def at(names: str, seconds: float = 0.0) -> list[tuple[str, float]]:
    """All of them `seconds` after the beginning."""
    return [(name, 1000.0 + seconds) for name in names]


EXPECTING = Aggregation(mode="ssp", bound=1, workers=2, worker_timeout=60.0)
CLOCKS: dict[str, tuple[Aggregation, list[tuple[str, float]], dict[str, int], list[int]]] = {
    # Ho et al. 2013: a worker at clock c goes on iff c - min <= bound. b begins where a is, at 1.
    "bound 1": (SSP, at("abaaaab"), {"a": 4, "b": 3}, [5]),
    "bound 0": (Aggregation(mode="ssp", bound=0), at("abaaab"), {"a": 3, "b": 3}, [4]),
    "a newcomer begins at the slowest": (SSP, at("abab") + at("c", 1), {"a": 2, "b": 3, "c": 3}, []),
    "though others are faster": (SSP, at("ab") + at("aaacaa", 1), {"a": 4, "b": 2, "c": 3}, [6, 7]),
    "one that is gone is not waited for": (SSP, at("ab") + at("aaaa", 61), {"a": 5, "b": 2}, []),
    "one that is not gone yet is": (SSP, at("ab") + at("aaaa", 60), {"a": 4, "b": 2}, [5]),
    "who comes back begins at the slowest": (SSP, at("ab") + at("aaabaa", 61), {"a": 6, "b": 5}, []),
    "or where it was, if that is farther": (SSP, at("abb") + at("a", 50) + at("b", 105), {"a": 2, "b": 4}, []),
    "who is expected stands at 0": (EXPECTING, at("aaaa"), {"a": 2}, [2, 3]),
    "and begins there": (EXPECTING, at("aab"), {"a": 2, "b": 1}, []),
    "but not for ever": (EXPECTING, at("aaa") + at("aaa", 61), {"a": 5}, [2]),
    "whoever is more than expected begins at the slowest": (EXPECTING, at("ababc"), {"a": 2, "b": 2, "c": 3}, []),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_clocks(name: str) -> None:
    aggregation, events, expected, waited = CLOCKS[name]
    assert clocks(aggregation, events) == (expected, waited)


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(0, 3))
def test_nobody_is_more_than_the_bound_ahead(order: list[str], bound: int) -> None:
    """Of those who are expected from the beginning."""
    found, _ = clocks(Aggregation(mode="ssp", bound=bound, workers=3), at("".join(order)))
    assert max(found.values(), default=0) - min([found.get(name, 0) for name in "abc"]) <= bound + 1


PULLING = Aggregation(mode="ssp", bound=1, delay_compensation=DelayCompensation())


def test_who_pulls_holds_nobody_up() -> None:
    """A newcomer, and one that was gone, is there once it pulls: where the slowest is, not where it was."""
    book = took(PULLING, sent("ba", 0.0) + sent("aaaa", 61.0))
    for name in "cb":
        book.pull(PULLING, name, 7, 62.0)
    assert [book.workers[name].clock for name in "abc"] == [6, 6, 6]
    book.admit(PULLING, 7, Sender("a", at=62.0))


def test_a_pull_of_who_is_there_moves_no_clock() -> None:
    book = took(PULLING, sent("abb"))
    book.pull(PULLING, "a", 9, 101.0)
    assert book.workers["a"] == Worker(1, 101.0, 8, 0, 1.0, 1, 9)


def test_a_gradient_is_of_what_was_pulled_last() -> None:
    book = Ledger()
    book.pull(DELAYED, "a", 5, 100.0)
    book.admit(DELAYED, 7, Sender("a", 5))
    book.admit(DELAYED, 7, Sender("a"))  # what it does not say is what was pulled
    book.admit(DELAYED, 7, Sender("b", 6))
    with pytest.raises(NotPulled) as refusal:
        book.admit(DELAYED, 7, Sender("a", 6))
    assert refusal.value.step == 5
    book.record(DELAYED, 7, Sender("a", 5, pulls=True))
    book.admit(DELAYED, 8, Sender("a", 8))
    book.record(DELAYED, 8, Sender("a", 8))
    book.admit(DELAYED, 9, Sender("a", 8))  # that reply brought no parameters


# -- the round -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "names", "moment", "closable", "deadline"),
    [
        (TIMED, "", 1e9, False, None),
        (TIMED, "abc", 109.9, False, 110.0),
        (TIMED, "ab", 110.0, True, 110.0),
        (TIMED, "a", 111.0, False, 110.0),
        (TIMED, "abcd", 100.0, True, 110.0),
        (Aggregation(mode="sync", workers=4, timeout=10.0), "a", 110.0, True, 110.0),
        (SYNC, "abc", 1e9, False, None),
        (SYNC, "a--b", 100.0, True, None),
        (BUFFERED, "aa", 1e9, False, None),
        (BUFFERED, "aaa", 100.0, True, None),
        (ASYNC, "abc", 1e9, False, None),
    ],
)
def test_when_a_round_is_over(
    aggregation: Aggregation, names: str, moment: float, closable: bool, deadline: float | None
) -> None:
    book = took(aggregation, sent(names))
    assert (book.closable(aggregation, moment), book.deadline(aggregation)) == (closable, deadline)


def test_the_deadline_is_that_of_the_first() -> None:
    book = took(TIMED, [*sent("a", 100.0), *sent("b", 105.0)])
    assert book.deadline(TIMED) == 110.0


def test_in_a_buffer_a_worker_counts_as_often_as_it_came() -> None:
    book = took(BUFFERED, sent("aa-"))
    assert (book.contributed, book.received) == ({"a": 2}, 3)
    assert Ledger.read(json.loads(json.dumps(book.describe()))) == book


# -- as text ---------------------------------------------------------------------------------------------------------

WORKERS = st.builds(
    Worker,
    st.integers(0, 2**53 - 1), st.floats(0, 2.5e11), st.integers(0, 2**53 - 1), st.integers(0, 2**53 - 1),
    st.floats(0, 1e300), st.integers(0, 2**53 - 1), st.none() | st.integers(0, 2**53 - 1),
)  # fmt: skip
NAMES = st.text("abzAZ09._-", min_size=1, max_size=8)


@given(st.dictionaries(NAMES, WORKERS, max_size=5), st.dictionaries(NAMES, st.integers(1, 3), max_size=5), st.data())
def test_what_was_described_is_read_back(
    workers: dict[str, Worker], contributed: dict[str, int], data: st.DataObject
) -> None:
    received = sum(contributed.values()) + data.draw(st.integers(0, 3))
    opened = data.draw(st.floats(0, 2.5e11)) if received else 0.0
    book = Ledger(workers, contributed, received, opened, data.draw(st.floats(0, 2.5e11)))
    again = Ledger.read(json.loads(json.dumps(book.describe())))
    assert again == book
    assert list(again.workers) == list(book.workers), "the longest unseen first"


def test_an_empty_one_is_nothing() -> None:
    assert Ledger().describe() == {}
    assert Ledger.read({}) == Ledger()


GOOD = [1, 100.0, 1, 0, 1.0, 1, None]


def changed(index: int, value: Any) -> dict[str, Any]:
    return {"workers": {"a": [*GOOD[:index], value, *GOOD[index + 1 :]]}}


MALFORMED: list[Any] = [
    {"workers": []}, {"workers": {"a": []}}, {"workers": {"a": GOOD[:6]}}, {"workers": {"a": [*GOOD, 1]}},
    {"workers": {"a": None}}, {"workers": {"a": "1234567"}}, {"workers": {1: GOOD}},
    *(changed(i, value) for i in (0, 2, 3, 5, 6) for value in (-1, 1.0, "1", True, 2**53, [])),
    *(changed(i, None) for i in range(6)),
    *(changed(1, value) for value in (-1.0, float("nan"), float("inf"), 1e300, 10**400, "0", True)),
    *(changed(4, value) for value in (-1.0, float("nan"), float("inf"), 10**400, "0", True)),
    {"received": -1}, {"received": 1.0}, {"received": True}, {"received": None}, {"contributed": ["a"]},
    {"received": 1, "contributed": ["a", "a"]}, {"received": 1, "contributed": [1]}, {"received": 1, "contributed": 1},
    {"received": 2, "contributed": [["a"]]}, {"received": 1, "contributed": None},
    *({"received": 1, name: value} for name in ("opened_at", "began") for value in ("0", None, -1, float("nan"), 1e99)),
]  # fmt: skip


@pytest.mark.parametrize("described", MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_text_is_refused(described: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        Ledger.read(described)


def test_the_malformed_is_near_what_is_right() -> None:
    """Else each would be refused for another reason than the one that it is there for."""
    read: Callable[[Any], Ledger] = Ledger.read
    assert read({"workers": {"a": GOOD}}).workers["a"] == Worker(*GOOD)
    assert read({"received": 2, "contributed": ["a", "a"], "opened_at": 0, "began": 1}).contributed == {"a": 2}
