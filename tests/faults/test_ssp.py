"""Stale-synchronous parallel: no worker runs more than `bound` clocks ahead of the slowest, through any replica."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.faults.rounds import Serial, contribute, history, opens, until
from tests.http.refusals import refused
from tests.running import Server, serving
from tests.wire import bits, create, params

WAIT = 30.0  # seconds that a worker is ready to wait


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two replicas on one embedded store."""
    data = tmp_path_factory.mktemp("ssp") / "data"
    with serving(data) as first, serving(data) as second:
        yield first, second


@pytest.fixture(scope="module")
def clients(pair: tuple[Server, Server]) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with pair[0].client() as first, pair[1].client() as second:
        yield first, second


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def clocks(client: httpx.Client, session: str) -> dict[str, int]:
    return {w["worker"]: w["clock"] for w in client.get(f"/v1/sessions/{session}/workers").json()["data"]}


def waiting(pool: ThreadPoolExecutor, server: Server, session: str, worker: str, number: int) -> Future[httpx.Response]:
    """A contribution that waits for its turn."""

    def call() -> httpx.Response:
        with server.client() as client:
            return contribute(client, session, worker, number, wait=WAIT)

    return pool.submit(call)


def test_a_worker_that_is_ahead_goes_on_when_the_slowest_has_moved_elsewhere(
    pair: tuple[Server, Server], clients: tuple[httpx.Client, httpx.Client], pool: ThreadPoolExecutor
) -> None:
    first, second = clients
    body = opens({"mode": "ssp", "workers": 2, "bound": 1})
    session = create(first, **body)["id"]
    for number in (1, 2):  # nobody has seen the other one yet: it stands at 0
        assert contribute(first, session, "fast", number).status_code == 200
    reply = contribute(first, session, "fast", 3)
    document = refused(reply, 409, "too-far-ahead")
    assert (document["clock"], document["slowest"], document["bound"]) == (2, 0, 1)
    assert int(reply.headers["retry-after"]) >= 1
    ahead = waiting(pool, pair[0], session, "fast", 3)
    with pytest.raises(TimeoutError):
        ahead.result(timeout=0.7)  # longer than it is between two looks
    assert contribute(second, session, "slow", 1).status_code == 200
    assert (ahead.result().status_code, ahead.result().json()["step"]) == (200, 4)
    refused(contribute(second, session, "fast", 4), 409, "too-far-ahead")
    assert clocks(second, session) == {"fast": 3, "slow": 1}
    serial = Serial(body)
    for worker, number in (("fast", 1), ("fast", 2), ("slow", 1), ("fast", 3)):
        expected = serial.step(worker, number)
    assert bits(params(first, session)["w"]) == expected


def test_what_waited_in_vain_is_told_so_and_changes_nothing(clients: tuple[httpx.Client, httpx.Client]) -> None:
    session = create(clients[0], **opens({"mode": "ssp", "workers": 2, "bound": 0}))["id"]
    assert contribute(clients[0], session, "fast", 1).status_code == 200
    refused(contribute(clients[1], session, "fast", 2, wait=0.3), 409, "too-far-ahead")
    assert clocks(clients[0], session) == {"fast": 1}
    assert len(history(clients[0], session)) == 1


def test_a_dead_worker_holds_nobody_up_for_ever_and_goes_on_where_the_others_are(
    pair: tuple[Server, Server], clients: tuple[httpx.Client, httpx.Client], pool: ThreadPoolExecutor
) -> None:
    first, second = clients
    session = create(first, **opens({"mode": "ssp", "workers": 3, "bound": 1, "worker_timeout": 2.0}))["id"]
    assert contribute(first, session, "dead", 1).status_code == 200  # and the third never comes
    for number in range(1, 7):  # two of them alone, in turn: each waits until nobody else is awaited
        for worker, server in (("a", pair[0]), ("b", pair[1])):
            assert waiting(pool, server, session, worker, number).result().status_code == 200
    shown = {w["worker"]: w for w in first.get(f"/v1/sessions/{session}/workers").json()["data"]}
    assert shown["dead"]["gone"]
    assert {name: worker["contributions"] for name, worker in shown.items()} == {"dead": 1, "a": 6, "b": 6}
    assert abs(shown["a"]["clock"] - shown["b"]["clock"]) <= 2
    back = contribute(second, session, "dead", 2)
    assert (back.status_code, back.json()["step"]) == (200, 14)
    assert clocks(second, session)["dead"] > 2, "it begins where the others are, and holds nobody up"
    for worker in ("a", "b"):
        assert contribute(first, session, worker, 7).status_code == 200


def test_the_bound_is_never_passed(pair: tuple[Server, Server], pool: ThreadPoolExecutor) -> None:
    bound, count = 2, 50
    names = ["w0", "w1", "w2", "w3"]
    body = opens({"mode": "ssp", "workers": len(names), "bound": bound})
    with pair[0].client() as client:
        session = create(client, **body)["id"]
        start = threading.Event()

        def run(index: int) -> dict[int, tuple[str, int]]:
            told = {}
            if index == 0:
                start.wait(WAIT)
            with pair[0].client() as first, pair[1].client() as second:
                for number in range(1, count + 1):
                    to = (first, second)[(index + number) % 2]
                    reply = contribute(to, session, names[index], number, wait=WAIT)
                    assert reply.status_code == 200, reply.text
                    told[reply.json()["step"]] = (names[index], number)
            return told

        running = [pool.submit(run, index) for index in range(4)]
        until(lambda: len(history(client, session)) == 3 * (bound + 1))  # so far they come, and no further, without it
        start.set()
        told = {step: sent for future in running for step, sent in future.result().items()}
        records = history(client, session)
        final = bits(params(client, session)["w"])
    assert sorted(told) == list(range(1, 4 * count + 1))
    assert [record["worker"] for record in records] == [told[step][0] for step in sorted(told)]
    clock: Counter[str] = Counter(dict.fromkeys(names, 0))
    leads = []
    for record in records:
        leads.append(clock[record["worker"]] - min(clock.values()))
        clock[record["worker"]] += 1
    assert max(leads) == bound
    assert clock == dict.fromkeys(names, count)
    serial = Serial(body)
    for step in sorted(told):
        expected = serial.step(*told[step])
    assert final == expected
