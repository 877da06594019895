"""Rounds while processes are killed and replicas race: what was acknowledged counts once, and deadlines are kept."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from tests.faults.rounds import (
    PATIENCE,
    Serial,
    Snare,
    check_log,
    contribute,
    history,
    log_of,
    opened_at,
    opens,
    snare,
    until,
)
from tests.http.refusals import refused
from tests.running import Server, redis_server, serving
from tests.wire import bits, create, params

FIVE = {"mode": "sync", "workers": 5}


def workers(count: int) -> list[str]:
    return [f"w{i}" for i in range(count)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two replicas on one embedded store, for tests that kill nobody."""
    data = tmp_path_factory.mktemp("pair") / "data"
    with serving(data) as first, serving(data) as second:
        yield first, second


@pytest.fixture(scope="module")
def clients(pair: tuple[Server, Server]) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with pair[0].client() as first, pair[1].client() as second:
        yield first, second


class Doomed(NamedTuple):
    """Two replicas on one store; the first, which is to be killed, has a snare between itself and the store."""

    first: Server
    second: Server
    trap: Snare
    url: str


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doomed]:
    directory = tmp_path_factory.mktemp("doomed")
    with (
        redis_server(directory / "store") as url,
        snare(url) as trap,
        serving(directory / "a", "--redis-url", trap.url) as first,
        serving(directory / "b", "--redis-url", url) as second,
    ):
        yield Doomed(first, second, trap, url)


@pytest.fixture
def doomed(replicas: Doomed) -> Doomed:
    """Both of them alive."""
    if replicas.first.process is not None and replicas.first.process.poll() is not None:
        replicas.first.restart()
    return replicas


def final(client: httpx.Client, session: str) -> bytes:
    return bits(params(client, session)["w"])


def waits_in_round(reply: httpx.Response, round_: int, received: int, needed: int) -> None:
    assert reply.status_code == 202, reply.text
    assert reply.json() == {"round": round_, "received": received, "needed": needed}


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# -- the service is killed in the middle of a round --------------------------------------------------------------------


def test_a_round_goes_on_after_kills(data: Path, client: httpx.Client) -> None:
    body, names = opens(FIVE), workers(5)
    with serving(data) as killed:
        with killed.client() as alive:
            session = create(alive, **body)["id"]
            for i, worker in enumerate(names):
                assert contribute(alive, session, worker, 1).status_code == (202 if i < 4 else 200)
            waits_in_round(contribute(alive, session, names[0], 2), 2, 1, 5)
        for place in (2, 4):  # what was contributed before the kill, and after it
            killed.kill()
            killed.restart()
            with killed.client() as alive:
                repeat = contribute(alive, session, names[0], 2)
                waits_in_round(repeat, 2, 1, 5)
                assert repeat.headers["ravine-replayed"] == "true"
                refused(contribute(alive, session, names[place - 2], 3), 409, "already-contributed")
                waits_in_round(contribute(alive, session, names[place - 1], 2), 2, place, 5)
                reply = contribute(alive, session, names[place], 2)
        assert reply.status_code == 200, reply.text
        with killed.client() as alive:
            found = final(alive, session)
        check_log(killed.store_url(), session, body, [(worker, t) for t in (1, 2) for worker in names], found)
    whole = create(client, **body)["id"]
    for t in (1, 2):
        for worker in names:
            never = contribute(client, whole, worker, t)
    assert never.json() == reply.json()
    assert final(client, whole) == found


CLOSING, FILLING = b'"kind":"close"', b'"key":"w4 1"'
POINTS = {
    "before the contribution is in the log": (FILLING, False),
    "after it, before the round is closed": (CLOSING, False),
    "after the closing, before the reply": (CLOSING, True),
}


class Scene:
    """A session whose first round was about to be full when the first replica was killed: `marker` is what it sent to
    the store then.
    """

    def __init__(self, doomed: Doomed, marker: bytes, *, after: bool = False, forgotten: bool = True) -> None:
        self.url, self.body, self.names = doomed.url, opens(FIVE), workers(5)
        with doomed.first.client() as client:
            self.session = create(client, **self.body)["id"]
            for i, worker in enumerate(self.names[:4], 1):
                waits_in_round(contribute(client, self.session, worker, 1), 1, i, 5)
            doomed.trap.set(doomed.first, self.session, marker, after=after, forgotten=forgotten)
            with pytest.raises(httpx.TransportError):
                contribute(client, self.session, self.names[4], 1)
        assert doomed.trap.sprung.wait(PATIENCE)

    @property
    def expected(self) -> bytes:
        return Serial(self.body).round((worker, 1) for worker in self.names)

    def check(self, client: httpx.Client) -> None:
        found = final(client, self.session)
        check_log(self.url, self.session, self.body, [(worker, 1) for worker in self.names], found)
        assert found == self.expected
        assert [record["step"] for record in history(client, self.session)] == [1]


@pytest.mark.parametrize("point", POINTS)
def test_who_heard_nothing_at_the_end_of_a_round_sends_it_again(doomed: Doomed, point: str) -> None:
    marker, after = POINTS[point]
    scene = Scene(doomed, marker, after=after)
    doomed.first.restart()
    with doomed.first.client() as client:
        reply = contribute(client, scene.session, "w4", 1)
        assert (reply.status_code, reply.json()["step"]) == (200, 1), reply.text
        assert ("ravine-replayed" in reply.headers) == (marker != FILLING)
        for worker in scene.names:
            again = contribute(client, scene.session, worker, 1)
            assert (again.status_code, again.json()) == (200, reply.json())
        scene.check(client)


@pytest.mark.parametrize("who", ["a reader", "a contributor", "the watch over the deadlines"])
def test_a_full_round_that_was_not_closed_is_closed_by(doomed: Doomed, who: str) -> None:
    scene = Scene(doomed, CLOSING, forgotten=who != "the watch over the deadlines")
    with doomed.second.client() as client:
        if who == "a contributor":
            waits_in_round(contribute(client, scene.session, "w0", 2), 2, 1, 5)
            assert final(client, scene.session) == scene.expected
            return
        if who == "a reader":
            assert client.get(f"/v1/sessions/{scene.session}/params").json()["step"] == 1
        else:
            until(lambda: history(client, scene.session))
        scene.check(client)


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_deadlines_are_kept_by_the_replica_that_lives(doomed: Doomed) -> None:
    quorum = {"mode": "sync", "workers": 5, "quorum": 2, "timeout": 1.0}
    body, sent = opens(quorum), [("w0", 1), ("w1", 1)]
    with doomed.first.client() as first, doomed.second.client() as second:
        unknown, known = (create(first, **body)["id"] for _ in range(2))
        # A machine that is very busy may take a second: then it is the contribution that closes the round.
        for session, other in ((unknown, first), (known, second)):
            assert contribute(first, session, "w0", 1).status_code == 202
            assert contribute(other, session, "w1", 1).status_code in (202, 200)
        doomed.first.kill()
        for session in (unknown, known):
            (record,) = until(lambda session=session: history(second, session))
            assert moment(record["time"]) >= opened_at(log_of(doomed.url, session))[0] + 1.0
            found = final(second, session)
            check_log(doomed.url, session, body, sent, found)
            assert found == Serial(body).round(sent)


def test_a_deadline_outlives_an_earlier_one_of_a_contribution_that_never_came(doomed: Doomed) -> None:
    """A replica enters a deadline and then has no time to append its contribution, or somebody else's comes before it:
    once that deadline is over the one that holds must still be known, here and at the other replica.
    """
    body = opens({"mode": "sync", "workers": 5, "quorum": 1, "timeout": 1.0})
    with doomed.first.client() as first, doomed.second.client() as second:
        sessions = [create(second, **body)["id"] for _ in range(2)]
        for client, session in zip((first, second), sessions, strict=True):
            assert contribute(client, session, "w0", 1).status_code == 202
            doomed.trap.enter_deadline(session, 1, time.time() + 0.3)
        time.sleep(0.6)  # what was entered is over
        doomed.first.kill()
        for session in sessions:
            (record,) = until(lambda session=session: history(second, session))
            assert moment(record["time"]) >= opened_at(log_of(doomed.url, session))[0] + 1.0
            assert final(second, session) == Serial(body).round([("w0", 1)])


def test_a_deadline_that_passed_while_nobody_was_there_is_kept_at_once(data: Path) -> None:
    body = opens({"mode": "sync", "workers": 5, "quorum": 2, "timeout": 0.6})
    with serving(data) as server:
        with server.client() as client:
            session = create(client, **body)["id"]
            assert contribute(client, session, "w0", 1).status_code == 202
            assert contribute(client, session, "w1", 1).status_code in (202, 200)  # 200 on a very busy machine
        server.kill()
        time.sleep(0.7)
        server.restart()
        with server.client() as client:
            until(lambda: history(client, session))
            assert final(client, session) == Serial(body).round([("w0", 1), ("w1", 1)])


def test_a_quorum_closes_every_round_that_two_of_eight_miss(
    pair: tuple[Server, Server], clients: tuple[httpx.Client, httpx.Client], capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, names = 10, workers(8)
    body = opens({"mode": "sync", "workers": 8, "quorum": 6, "timeout": 0.3})
    session = create(clients[0], **body)["id"]
    serial = Serial(body)
    for t in range(1, rounds + 1):
        there = [names[(t + i) % 8] for i in range(6)]  # others are missing in every round
        for i, worker in enumerate(there):
            reply = contribute(clients[i % 2], session, worker, t)
            # On a very busy machine the last of them may come after the deadline, and close the round.
            assert reply.status_code == 202 or (i == 5 and reply.status_code == 200), reply.text
        reply = clients[1].get(f"/v1/sessions/{session}/params", params={"after": t - 1, "wait": 20})
        assert reply.json()["step"] == t
        expected = serial.round([(worker, t) for worker in there])
        assert final(clients[1], session) == expected
    opened = opened_at(log_of(pair[0].store_url(), session))
    records = history(clients[0], session)
    late = [moment(record["time"]) - at - 0.3 for record, at in zip(records, opened, strict=True)]
    with capsys.disabled():
        print(f"\nrounds of 6 of 8: closed {[round(1e3 * seconds) for seconds in late]} ms after their deadlines")
    assert len(late) == rounds
    assert min(late) > -1e-5  # the history's times have microseconds


def test_fewer_than_the_quorum_keep_a_round_open(clients: tuple[httpx.Client, httpx.Client]) -> None:
    body = opens({"mode": "sync", "workers": 8, "quorum": 3, "timeout": 0.3})
    session = create(clients[0], **body)["id"]
    for i, worker in enumerate(("w0", "w1")):
        waits_in_round(contribute(clients[i], session, worker, 1), 1, i + 1, 8)
    time.sleep(1.0)
    shown = clients[0].get(f"/v1/sessions/{session}/rounds/current").json()
    assert (shown["round"], shown["received"], shown["contributed"]) == (1, 2, ["w0", "w1"])
    assert moment(shown["deadline"]) < time.time()
    assert history(clients[0], session) == []
    reply = contribute(clients[1], session, "w2", 1)
    assert (reply.status_code, reply.json()["step"]) == (200, 1)
    assert final(clients[0], session) == Serial(body).round([("w0", 1), ("w1", 1), ("w2", 1)])


# -- two replicas at the same moment -----------------------------------------------------------------------------------


def at_once(calls: Sequence[Callable[[], httpx.Response]], pool: ThreadPoolExecutor) -> list[httpx.Response]:
    """All of them start together."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], httpx.Response]) -> httpx.Response:
        start.wait()
        return call()

    return list(pool.map(run, calls))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("aggregation", [{"mode": "async"}, {"mode": "sync", "workers": 2}], ids=["async", "sync"])
def test_one_contribution_through_two_replicas_counts_once(
    pair: tuple[Server, Server],
    clients: tuple[httpx.Client, httpx.Client],
    aggregation: dict[str, Any],
    held: bool,
) -> None:
    body = opens(aggregation, held=held)
    session = create(clients[0], **body)["id"]
    per_round = aggregation.get("workers", 1)
    replayed = 0
    with ThreadPoolExecutor(2) as pool:
        for t in range(50):
            round_, place = divmod(t, per_round)
            worker = f"w{place}"

            def send(client: httpx.Client, worker: str = worker, number: int = round_) -> httpx.Response:
                return contribute(client, session, worker, number)

            replies = at_once([lambda: send(clients[0]), lambda: send(clients[1])], pool)
            closes = place == per_round - 1
            assert [reply.status_code for reply in replies] == [200 if closes else 202] * 2, [r.text for r in replies]
            assert replies[0].content == replies[1].content
            assert replies[0].headers["etag"] == replies[1].headers["etag"]
            assert replies[0].headers["ravine-step"] == str(round_ + closes)
            replayed += sum("ravine-replayed" in reply.headers for reply in replies)
    assert replayed == 50
    assert len(history(clients[1], session)) == 50 // per_round
    if held:
        sent = [(f"w{place}", round_) for round_ in range(50 // per_round) for place in range(per_round)]
        check_log(pair[0].store_url(), session, body, sent, final(clients[0], session))


def test_a_second_contribution_through_the_other_replica_is_refused(
    clients: tuple[httpx.Client, httpx.Client],
) -> None:
    session = create(clients[0], **opens({"mode": "sync", "workers": 3}))["id"]
    assert contribute(clients[1], session, "w1", 1).status_code == 202  # so that both have the session in memory
    assert contribute(clients[0], session, "w0", 1).status_code == 202
    document = refused(contribute(clients[1], session, "w0", 2), 409, "already-contributed")
    assert (document["round"], document["worker"]) == (1, "w0")
    assert clients[1].get(f"/v1/sessions/{session}/rounds/current").json()["contributed"] == ["w1", "w0"]


@pytest.mark.parametrize("held", [True, False])
def test_workers_that_wait_at_one_replica_hear_of_a_round_that_the_other_closes(
    pair: tuple[Server, Server], clients: tuple[httpx.Client, httpx.Client], held: bool
) -> None:
    names, body = workers(6), opens({"mode": "sync", "workers": 6}, held=held)
    session = create(clients[0], **body)["id"]

    def wait(i: int) -> httpx.Response:
        with pair[i // 4].client() as client:  # most of them at the first
            return contribute(client, session, names[i], 1, wait=30)

    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(wait, i) for i in range(5)]
        until(lambda: clients[1].get(f"/v1/sessions/{session}/rounds/current").json()["received"] == 5)
        last = contribute(clients[1], session, names[5], 1)
        replies = [future.result() for future in waiting]
    assert last.status_code == 200
    assert set(last.json()) == {"step", "params" if held else "updates", "metrics"}
    assert {(reply.status_code, reply.content, reply.headers["etag"]) for reply in replies} == {
        (200, last.content, last.headers["etag"])
    }


def test_a_repeat_gets_the_updates_of_its_round_after_a_kill(doomed: Doomed) -> None:
    names, body = workers(3), opens({"mode": "sync", "workers": 3}, held=False)
    with doomed.first.client() as first, doomed.second.client() as second:
        session = create(first, **body)["id"]
        for t in (1, 2):
            told = [contribute((first, second)[i % 2], session, worker, t) for i, worker in enumerate(names)]
        assert [reply.status_code for reply in told] == [202, 202, 200]
        assert np.any(told[2].json()["updates"]["w"])
    doomed.first.kill()
    doomed.first.restart()
    with doomed.first.client() as first, doomed.second.client() as second:
        for client in (first, second):
            for worker in names:
                again = contribute(client, session, worker, 2)
                assert (again.status_code, again.headers["ravine-replayed"]) == (200, "true")
                assert (again.content, again.headers["etag"]) == (told[2].content, told[2].headers["etag"])
        # The next round is open, and they are kept all the same.
        assert contribute(first, session, "w0", 3).status_code == 202
        assert contribute(second, session, "w1", 2).content == told[2].content
