"""What is sent is not kept: neither large bodies that were refused, nor anything that a client may choose, nor a bit of
each request.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.fuzz.memory import rss
from tests.running import Server, serving
from tests.wire import SAFETENSORS, create

MIB = 1024 * 1024
BODY, BODIES = 8 * MIB, 20
CALLS = 800

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("memory") / "data", environment={"RAVINE_JIT": "false"}, fresh=True
    ) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def test_of_a_recipe_that_is_refused_nothing_is_kept(server: Server, client: httpx.Client) -> None:
    """Each names other methods, one in the other, where there is none in another."""
    kinds = [entry["kind"] for entry in client.get("/v1/optimizers").json()["data"]]
    nested = itertools.islice(itertools.permutations(kinds, 3), 0, None, 150)
    before, sent = rss(server.pid), 0
    for outer, middle, inner in nested:
        optimizer = {"kind": outer, "base": {"kind": middle, "base": {"kind": inner}}}
        body = {"optimizer": optimizer, "params": {"w": [1.0]}, "groups": [{"match": "*"}]}
        assert client.post("/v1/sessions", json=body).status_code == 422
        sent += 1
    assert sent > 400
    # A model for each method, and for each of them in one that takes a base, may be kept: some 70 KiB each.
    assert rss(server.pid) - before < 12 * 1024


REFUSED: dict[str, tuple[int, dict[str, str]]] = {
    "of another shape": (422, {}),
    "of another step": (412, {"If-Match": '"7"'}),
    "of another body": (422, {"Idempotency-Key": "k"}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_the_body_of_a_step_that_is_refused_is_let_go(server: Server, client: httpx.Client, why: str) -> None:
    status, headers = REFUSED[why]
    path = f"/v1/sessions/{create(client, optimizer='sgd', params={'w': [1.0]})['id']}/steps"
    small = safetensors.numpy.save({"w": np.ones(1, np.float32)})
    assert client.post(path, content=small, headers=SAFETENSORS | {"Idempotency-Key": "k"}).status_code == 200
    large = safetensors.numpy.save({"w": np.ones(BODY // 4, np.float32)})
    for _ in range(3):
        assert client.post(path, content=large, headers=SAFETENSORS | headers).status_code == status
    before = rss(server.pid)
    for _ in range(BODIES):
        assert client.post(path, content=large, headers=SAFETENSORS | headers).status_code == status
    assert rss(server.pid) - before < 3 * BODY // 1024


def test_the_body_of_a_step_that_waited_in_vain_is_let_go(server: Server, client: httpx.Client) -> None:
    """It is tried twice, and refused each time."""
    aggregation = {"mode": "ssp", "bound": 0, "workers": 2}
    path = f"/v1/sessions/{create(client, optimizer='sgd', shapes={'w': [BODY // 4]}, aggregation=aggregation)['id']}"
    body = safetensors.numpy.save({"w": np.ones(BODY // 4, np.float32)})

    def send() -> int:
        headers = SAFETENSORS | {"Prefer": "wait=0.02, return=minimal"}
        return client.post(f"{path}/steps", params={"worker": "a"}, content=body, headers=headers).status_code

    assert [send() for _ in range(4)] == [200, 409, 409, 409]
    before = rss(server.pid)
    assert [send() for _ in range(BODIES)] == [409] * BODIES
    assert rss(server.pid) - before < 3 * BODY // 1024


def test_threads_have_no_heaps_of_their_own(server: Server, client: httpx.Client) -> None:
    """Or what was freed there would be of no use to others."""
    session = create(client, optimizer="sgd", shapes={"w": [100_000]})["id"]
    body = b'{"gradients": {"w": [%s]}, "return": "none"}' % b",".join([b"0.125"] * 100_000)

    def send(_: int) -> int:  # it is parsed in a thread, and checked and applied in another
        with server.client() as own:
            headers = {"Content-Type": "application/json"}
            return own.post(f"/v1/sessions/{session}/steps", content=body, headers=headers).status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(send, range(12))) == [200] * 12
    heaps = 0
    for line in Path(f"/proc/{server.pid}/maps").read_text().splitlines():
        area, rights, *_, inode = line.split()[:5]
        start, end = (int(address, 16) for address in area.split("-"))
        # glibc reserves 64 MiB at a multiple of that for each, and lets what is not in use be neither read nor written.
        heaps += rights == "---p" and inode == "0" and end % (64 * MIB) == 0 and start % (64 * MIB) != 0
    assert heaps == 0


Call = Callable[[httpx.Client, str, int], httpx.Response]

EACH: dict[str, tuple[int, Call]] = {
    "a step": (200, lambda client, path, _: client.post(f"{path}/steps", json={"gradients": {"w": [0.1]}})),
    "a step of another shape": (422, lambda client, path, _: client.post(f"{path}/steps", json={"gradients": {}})),
    "a step of another state": (
        412,
        lambda client, path, _: client.post(
            f"{path}/steps", json={"gradients": {"w": [0.1]}}, headers={"If-Match": '"x"'}
        ),
    ),
    "a step of no session": (
        404,
        lambda client, _, number: client.post(
            f"/v1/sessions/ses_{number:026d}/steps", json={"gradients": {"w": [0.1]}}
        ),
    ),
    "a step that is no JSON": (
        400,
        lambda client, path, _: client.post(
            f"{path}/steps", content=b'{"gradients": [', headers={"Content-Type": "application/json"}
        ),
    ),
    "other parameters of another shape": (
        422,
        lambda client, path, _: client.put(f"{path}/params", json={"params": {"w": [1, 2]}}),
    ),
    "another kind": (422, lambda client, path, _: client.patch(path, json={"optimizer": {"kind": "lion"}})),
    "another name": (200, lambda client, path, number: client.patch(path, json={"name": f"n{number}"})),
    "a session without": (422, lambda client, _, number: client.post("/v1/sessions", json={f"m{number}": 1})),
    "a broken checkpoint": (
        422,
        lambda client, _, number: client.post("/v1/sessions", content=b"%d" % number, headers=SAFETENSORS),
    ),
    "no round": (404, lambda client, path, _: client.get(f"{path}/rounds/current")),
    "no session": (404, lambda client, _, number: client.get(f"/v1/sessions/ses_{number:026d}/params")),
    "no page": (404, lambda client, _, number: client.get(f"/{number}")),
    "no method": (405, lambda client, path, _: client.put(path)),
    "no parameter": (422, lambda client, path, number: client.get(path, params={f"p{number}": 1})),
    "no format": (406, lambda client, path, number: client.get(f"{path}/params", headers={"Accept": f"a/b{number}"})),
    "a wait": (304, lambda client, path, _: client.get(f"{path}/params", params={"after": 10**9, "wait": 0.001})),
    "no key": (
        401,
        lambda client, _, number: client.get("/v1/sessions", headers={"Authorization": f"Bearer {number}"}),
    ),
    "no host": (401, lambda client, _, number: client.get("/v1/sessions", headers={"Host": f"h{number}.example"})),
}


@pytest.mark.parametrize("call", EACH)
def test_of_a_request_nothing_is_kept(server: Server, client: httpx.Client, call: str) -> None:
    """A kilobyte of each would be twice what is allowed, and a circle is found, too: the collector comes too seldom."""
    status, send = EACH[call]
    path = f"/v1/sessions/{create(client, optimizer='sgd', params={'w': [1.0]})['id']}"
    for number in range(CALLS // 2):
        reply = send(client, path, number)
        assert reply.status_code == status, reply.text
    before = rss(server.pid)
    for number in range(CALLS):
        send(client, path, 1000 + number)
    assert rss(server.pid) - before < CALLS // 2
