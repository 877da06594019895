"""What is counted, and given back whatever becomes of a request."""

import threading
import time

import pytest

from service.admission import (
    ALWAYS,
    FLOOR,
    FORGOTTEN,
    READY,
    TICKET,
    TURNS,
    WINDOW,
    Admission,
    Limits,
    Throttle,
    open_files,
)
from service.errors import Overloaded


def scope(path: str = "/v1/sessions") -> dict[str, object]:
    return {"path": path}


def test_a_request_is_counted_until_it_leaves() -> None:
    admission = Admission(Limits(requests=2))
    tickets = [admission.enter(scope()) for _ in range(2)]
    with pytest.raises(Overloaded) as refusal:
        admission.enter(scope())
    assert refusal.value.resource == "requests"
    assert admission.refused["requests"] == 1
    tickets[0].leave()
    entered = scope()
    assert entered.setdefault(TICKET, admission.enter(entered)) is entered[TICKET]
    assert admission.requests == 2


@pytest.mark.parametrize("path", sorted(ALWAYS))
def test_some_are_let_through_and_not_counted(path: str) -> None:
    admission = Admission(Limits(requests=1))
    tickets = [admission.enter(scope(path)) for _ in range(3)]
    admission.enter(scope())
    assert admission.requests == 1
    for ticket in tickets:
        ticket.wait()
        ticket.arrive()
        ticket.leave()
    assert (admission.requests, admission.waits, admission.arrivals) == (1, 0, 0)


def test_a_body_that_is_waited_for_makes_room_for_a_request() -> None:
    admission = Admission(Limits(requests=1))
    tickets = []
    for _ in range(2):
        tickets.append(admission.enter(scope()))
        tickets[-1].arrive()
    assert (admission.requests, admission.arrivals) == (0, 2)
    third = admission.enter(scope())
    tickets[0].arrived()
    assert (admission.requests, admission.arrivals) == (2, 1), "one more than is let in anew"
    with pytest.raises(Overloaded) as refusal:
        tickets[1].arrived()
    assert refusal.value.resource == "requests"
    for ticket in (*tickets, third):
        ticket.leave()
    assert (admission.requests, admission.arrivals, admission.waits) == (0, 0, 0)


def test_a_wait_makes_room_for_a_request_and_is_counted_once() -> None:
    admission = Admission(Limits(requests=1, waits=1))
    first = admission.enter(scope())
    first.wait()
    first.wait()
    assert (admission.requests, admission.waits) == (0, 1)
    second = admission.enter(scope())
    with pytest.raises(Overloaded) as refusal:
        second.wait()
    assert refusal.value.resource == "waits"
    second.leave()
    first.leave()
    assert (admission.requests, admission.waits) == (0, 0)


def test_bytes_are_given_back() -> None:
    admission = Admission(Limits(bodies=100))
    first, second = admission.enter(scope()), admission.enter(scope())
    first.claim(60)
    second.claim(40)
    with pytest.raises(Overloaded):
        second.claim(1)
    first.release()
    second.claim(60)
    assert admission.bodies == 100
    for ticket in (first, second):
        ticket.leave()
    assert admission.bodies == 0


def test_a_request_that_has_left_claims_nothing() -> None:
    """Its body may still be inflated in a thread."""
    admission = Admission()
    ticket = admission.enter(scope())
    ticket.leave()
    with pytest.raises(Overloaded):
        ticket.claim(1)
    assert admission.bodies == 0


def test_threads_count_together() -> None:
    admission = Admission(Limits(bodies=10**9))
    tickets = [admission.enter(scope()) for _ in range(4)]

    def claim(index: int) -> None:
        for _ in range(20_000):
            tickets[index].claim(1)

    threads = [threading.Thread(target=claim, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admission.bodies == 80_000
    for ticket in tickets:
        ticket.leave()
    assert admission.bodies == 0


def test_files_are_for_as_many_connections_as_the_system_allows() -> None:
    assert open_files(1) == 1
    assert 1 <= open_files(10**9) < 10**9


# -- how many are let in -----------------------------------------------------------------------------------------------

MOST, LAG = 1000, 0.01


class Loop:
    """A loop's turns, on a clock of their own: each begins some requests, the last of which has waited `longest`."""

    def __init__(self, throttle: Throttle) -> None:
        self.throttle = throttle
        self.now = 1000.0

    def turn(self, longest: float, *, requests: int = 5, in_flight: int = 500) -> None:
        ready = self.now
        for number in range(1, requests + 1):
            self.throttle.saw(ready, ready + longest * number / requests, in_flight)
        self.now = ready + max(longest, WINDOW / TURNS)

    def window(self, longest: float, in_flight: int = 500, *, refused: bool = True) -> None:
        if refused:
            self.throttle.refuse()
        for _ in range(TURNS + 1):
            self.turn(longest, in_flight=in_flight)


def test_a_wait_that_stands_brings_the_number_down_and_never_below_the_floor() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    limits = []
    for _ in range(20):
        loop.window(5 * LAG, in_flight=throttle.limit)
        limits.append(throttle.limit)
    assert limits == sorted(limits, reverse=True)
    assert limits[3] < MOST / 4
    assert limits[-1] == FLOOR


def test_a_crowd_that_there_is_room_for_is_let_in_however_long_it_waits() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(20):
        loop.window(100 * LAG, in_flight=MOST - 1, refused=False)
    assert throttle.limit == MOST


def test_once_there_was_none_it_need_not_be_refused_again_to_stay_small() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(2):
        loop.window(5 * LAG)
    for _ in range(20):
        loop.window(5 * LAG, in_flight=throttle.limit - 1, refused=False)
    assert throttle.limit == FLOOR


def test_it_comes_down_from_what_is_in_flight_not_from_what_might_be() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(2):
        loop.window(1.25 * LAG, in_flight=200)
    assert FLOOR < throttle.limit <= 160


def test_short_waits_bring_it_up_again() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(10):
        loop.window(5 * LAG)
    low = throttle.limit
    loop.window(LAG / 2)
    loop.window(LAG / 2)
    assert low < throttle.limit < 2 * low
    for _ in range(100):
        loop.window(LAG / 2)
    assert throttle.limit == MOST


def test_one_long_turn_is_no_queue() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(50):
        throttle.refuse()
        loop.turn(100 * LAG)
        for _ in range(TURNS + 1):
            loop.turn(LAG / 2)
    assert throttle.limit == MOST


def test_how_long_a_turn_was_is_told_by_its_last_request() -> None:
    """The first of each waits for nothing."""
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(10 * TURNS):
        throttle.refuse()
        loop.turn(5 * LAG, requests=1000)
    assert throttle.limit < MOST


def test_what_was_long_ago_is_forgotten() -> None:
    throttle = Throttle(MOST, LAG)
    loop = Loop(throttle)
    for _ in range(10):
        loop.window(5 * LAG)
    assert not throttle.forgets(loop.now)
    assert throttle.limit < MOST
    assert throttle.forgets(loop.now + 2 * FORGOTTEN)
    assert throttle.limit == MOST


def test_a_bound_below_the_floor_stays() -> None:
    throttle = Throttle(6, LAG)
    loop = Loop(throttle)
    for _ in range(10):
        loop.window(5 * LAG)
    assert throttle.limit == 6


def test_what_the_loop_has_not_come_to_counts_as_well() -> None:
    """Or all that are read in one turn would find the same place free."""
    admission = Admission(Limits(requests=2))
    admission.begun += 2
    assert admission.full
    tickets = [admission.enter(scope() | {READY: time.monotonic()}) for _ in range(2)]
    assert admission.begun == 0
    assert admission.full
    tickets[0].leave()
    assert not admission.full


def test_who_was_let_in_is_not_refused_when_the_number_falls_meanwhile() -> None:
    admission = Admission(Limits(requests=MOST, lag_seconds=LAG))
    assert admission.throttle is not None
    ready = time.monotonic()
    admission.begun += 2 * FLOOR
    loop = Loop(admission.throttle)
    for _ in range(20):
        loop.window(5 * LAG)
    assert admission.limit == FLOOR
    tickets = [admission.enter(scope() | {READY: ready}) for _ in range(2 * FLOOR)]
    with pytest.raises(Overloaded):
        admission.enter(scope())
    for ticket in tickets:
        ticket.leave()
    admission.enter(scope())


def test_without_a_longest_wait_as_many_are_let_in_always() -> None:
    admission = Admission(Limits(requests=MOST, lag_seconds=0))
    for _ in range(10 * TURNS):
        admission.begun += 1
        admission.enter(scope() | {READY: time.monotonic() - 60}).leave()
    assert admission.limit == MOST
