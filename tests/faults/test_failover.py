"""A replica takes over: what it had not received is told of, or was never acknowledged."""

import asyncio
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.crowd import Crowd, GivenUp, accept, false_alarms, replicas, verdict, went_back
from tests.faults.outages import replicated_failovers, stale_failovers
from tests.faults.stores import pair, until
from tests.nursery import shared
from tests.running import Server
from tests.wire import create, step

ONE = {"w": np.ones(2, np.float32)}


def test_to_a_stale_replica(tmp_path: Path) -> None:
    found = stale_failovers(tmp_path, seed=1, times=2)
    assert not any(found.outcome[2:]), found.notes
    assert found.outcome.injected == 2
    assert found.gone > 0


def test_nothing_is_lost_that_was_acknowledged_by_both(tmp_path: Path) -> None:
    found = replicated_failovers(tmp_path, seed=2, times=2)
    assert not any(found.outcome[2:]), found.notes
    assert (found.outcome.injected, found.gone) == (2, 0)


def test_the_check_finds_what_nobody_remembers(tmp_path: Path) -> None:
    """The services die with the primary: then nobody can tell, and the tables would have to say so."""
    draw = random.Random(3)
    with (
        pair(tmp_path / "stores") as stores,
        replicas(shared(), tmp_path, 2, "--redis-url", stores.front.url) as servers,
    ):
        crowd = Crowd(servers, seed=3, lossy=True).start()
        assert crowd.run_on(draw.randrange(5, 30))
        opened = time.monotonic()
        stores.hold()
        assert crowd.run_on(10)
        for server in servers:
            server.kill()
        with stores.fail_over().client() as store:
            assert went_back(crowd, store, opened) > 0
            stores.lead()
            for server in servers:
                server.restart()
            crowd.fault()
            assert crowd.run_on(5)
            crowd.finish()
            found = verdict("nobody remembers", 1, store, crowd)
    assert found.outcome.lost > 0
    assert found.gone == 0


def refused_as_lost(server: Server, session: str) -> bool:
    with server.client() as client:
        reply = step(client, session, ONE)
    if reply.status_code == 200:
        return False
    assert (reply.status_code, reply.json()["type"]) == (409, "/problems/state-lost"), reply.text
    return True


def test_another_service_has_long_gone_on(tmp_path: Path) -> None:
    """Past the step that was lost, from a replica that never knew of it: who knew stops it all the same."""
    with (
        pair(tmp_path / "stores") as stores,
        replicas(shared(), tmp_path, 2, "--redis-url", stores.front.url) as (knows, new),
    ):
        with knows.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
            assert step(client, session, ONE).status_code == 200
            stores.synchronise()
            stores.hold()
            lost = [step(client, session, ONE).headers["etag"] for _ in range(3)]
        knows.process.send_signal(signal.SIGSTOP)
        try:
            stores.fail_over()
            stores.lead()
            with new.client() as client:
                went_on = [int(step(client, session, ONE).headers["ravine-step"]) for _ in range(6)]
            assert went_on == [2, 3, 4, 5, 6, 7]
        finally:
            knows.process.send_signal(signal.SIGCONT)
        until(lambda: refused_as_lost(knows, session), "who knew what was lost says so")
        assert refused_as_lost(new, session)
        with new.client() as client:
            told = client.get(f"/v1/sessions/{session}").json()
            assert told["type"] == "/problems/state-lost"
            assert told["acknowledged"] == {"step": 4, "etag": lost[-1]}
            assert told["found"]["step"] >= 7
            assert client.delete(f"/v1/sessions/{session}").status_code == 204


def test_a_second_loss_soon_after_the_first_was_accepted(tmp_path: Path) -> None:
    """By a service that had seen nothing of what was lost first: it stood where the store was found, and went on."""
    with (
        pair(tmp_path / "stores") as stores,
        replicas(shared(), tmp_path, 2, "--redis-url", stores.front.url) as (knows, other),
        knows.client() as first,
        other.client() as second,
    ):
        session = create(first, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
        assert [step(second, session, ONE).status_code for _ in range(3)] == [200] * 3
        stores.synchronise()
        stores.hold()
        assert [step(first, session, ONE).status_code for _ in range(2)] == [200] * 2
        stores.fail_over()
        stores.lead()
        until(lambda: refused_as_lost(knows, session), "the first loss is told of")
        stores.rejoin()
        assert asyncio.run(accept(stores.front.url, session))
        stores.synchronise()
        stores.hold()
        assert [step(second, session, ONE).headers["ravine-step"] for _ in range(2)] == ["4", "5"]
        stores.fail_over()
        stores.lead()
        until(lambda: second.get("/readyz").status_code == 200, "the store answers")
        assert refused_as_lost(other, session)


def gone(*commits: str) -> GivenUp:
    return GivenUp(frozenset(commits), there=False)


@pytest.mark.parametrize(
    ("told", "false"),
    [
        ([], 0),
        ([gone("a")], 0),
        ([gone("a"), gone("b")], 0),  # of another service, which came late
        ([gone("a"), gone("a", "b"), gone("c")], 0),
        ([gone("a", "b"), gone("b")], 0),  # the second fault, which undid that the first was accepted
        ([gone("a"), gone("b"), gone("b"), gone("a")], 1),
        ([GivenUp(frozenset("a"), there=True)], 1),
    ],
)
def test_what_is_a_false_alarm(told: list[GivenUp], false: int) -> None:
    assert false_alarms(told, faults=2) == false
