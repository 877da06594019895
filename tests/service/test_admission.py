"""What is counted, and given back whatever becomes of a request."""

import threading

import pytest

from service.admission import ALWAYS, TICKET, Admission, Limits, open_files
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
