"""Many workers on one session through two replicas: nothing is lost, nothing counts twice, async and in rounds.

Every third contribution is sent twice, to one replica and then to the other, under its key. What the session comes to
must be, bit for bit, what the core makes of the contributions one after the other.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults.rounds import Serial, contribute, history, opens
from tests.running import Server, serving
from tests.wire import bits, create, params

WORKERS, EACH = 40, 5

Told = dict[tuple[str, int], int]


def work(servers: tuple[Server, Server], session: str, index: int) -> Told:
    """All contributions of one worker; the step that each became."""
    told: Told = {}
    worker = f"w{index}"
    with servers[0].client() as first, servers[1].client() as second:
        for number in range(1, EACH + 1):
            here, there = (first, second) if (index + number) % 2 else (second, first)
            reply = contribute(here, session, worker, number, wait=60)
            assert reply.status_code == 200, reply.text
            told[worker, number] = reply.json()["step"]
            if (index + number) % 3 == 0:
                again = contribute(there, session, worker, number)
                assert (again.status_code, again.headers["ravine-replayed"]) == (200, "true"), again.text
                assert again.json()["step"] >= reply.json()["step"]
    return told


def told_by_all(servers: tuple[Server, Server], session: str) -> Told:
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(lambda index: work(servers, session, index), range(WORKERS)))
    return {sent: step for part in parts for sent, step in part.items()}


@pytest.mark.parametrize("aggregation", [{"mode": "async"}, {"mode": "sync", "workers": WORKERS}])
def test_forty_workers_through_two_replicas(data: Path, aggregation: Mapping[str, Any]) -> None:
    body, rounds = opens(aggregation), aggregation["mode"] == "sync"
    with serving(data) as first, serving(data) as second:
        with first.client() as client:
            session = create(client, **body)["id"]
        told = told_by_all((first, second), session)
        with first.client() as one, second.client() as other:
            finals = {bits(params(client, session)["w"]) for client in (one, other)}
            steps = [record["step"] for record in history(other, session)]
            shown = one.get(f"/v1/sessions/{session}/workers", params={"limit": 100}).json()["data"]
    serial = Serial(body)
    if rounds:
        # A reply gives the parameters as they stand, and the next round cannot be over without its worker.
        assert all(step == number for (_, number), step in told.items())
        for number in range(1, EACH + 1):
            expected = serial.round((f"w{index}", number) for index in range(WORKERS))
    else:
        assert sorted(told.values()) == list(range(1, WORKERS * EACH + 1))
        for sent in sorted(told, key=told.__getitem__):
            expected = serial.step(*sent)
    assert finals == {expected}
    assert steps == list(range(1, (EACH if rounds else WORKERS * EACH) + 1))
    assert {worker["worker"]: worker["contributions"] for worker in shown} == {f"w{i}": EACH for i in range(WORKERS)}
