"""deploy/nginx.conf before two services: each session goes to one of them, and the other takes over when it dies."""

import contextlib
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.crowd import Crowd, rounds, verdict
from tests.faults.nursery import Replica
from tests.faults.stores import VOLATILE, StoreServer, free_port, storing, until
from tests.http.sockets import connected, head_of
from tests.nursery import shared
from tests.running import Server
from tests.wire import create

ROOT = Path(__file__).parent.parent.parent
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx")


class Front(Server):
    """nginx, as far as clients are concerned."""

    def __init__(self, directory: Path, services: list[Server]) -> None:
        super().__init__(directory / "front")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._file = directory / "nginx.conf"
        self._file.write_text(self._configured([service.url.removeprefix("http://") for service in services]))

    def _configured(self, addresses: list[str]) -> str:
        """deploy/nginx.conf, with nothing changed but where things are."""
        text = (ROOT / "deploy" / "nginx.conf").read_text()
        for number, address in enumerate(addresses, 1):
            text, count = re.subn(rf"server 10\.0\.0\.{number}:8000 ", f"server {address} ", text)
            assert count == 1
        text, count = re.subn(r"listen 8080;", f"listen 127.0.0.1:{self.port};", text)
        assert count == 1
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {self._directory / kind};" for kind in kinds)
        text = text.replace("http {", f"http {{ access_log off; {paths}", 1)
        return f"pid {self._directory / 'pid'};\ndaemon off;\nerror_log stderr;\n{text}"

    def start(self) -> "Front":
        assert NGINX is not None
        command = [NGINX, "-p", str(self._directory), "-c", str(self._file)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        until(self._answers, "nginx answers")
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz").status_code == 200
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        return False


class Site:
    """Two services on one store, and nginx before them."""

    def __init__(self, directory: Path, store: StoreServer, stack: contextlib.ExitStack) -> None:
        self.services: list[Replica] = []
        for number in range(2):
            # The address stays when it is started again.
            options = ("--redis-url", store.url, "--port", str(free_port()))
            service = Replica(shared(), directory / f"data-{number}", *options).start()
            stack.callback(service.stop)
            self.services.append(service)
        self.front = Front(directory, [*self.services]).start()
        stack.callback(self.front.stop)

    def hot(self) -> list[float]:
        """How many sessions each service has in memory."""
        found = []
        for service in self.services:
            with service.client() as client:
                text = client.get("/metrics").text
            found.append(float(re.findall(r"^ravine_sessions_hot (\S+)", text, re.MULTILINE)[0]))
        return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    with storing(tmp_path / "store", *VOLATILE) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, store: StoreServer) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        yield Site(tmp_path, store, stack)


def test_each_session_goes_to_one_service(site: Site) -> None:
    with site.front.client() as client:
        sessions = [create(client, optimizer="sgd", params={"w": [0.0]})["id"] for _ in range(20)]
    for t in range(1, 4):  # each time by connections that nobody has used yet
        with site.front.client() as client:
            for session in sessions:
                reply = client.post(f"/v1/sessions/{session}/steps", json={"gradients": {"w": [1]}})
                assert reply.headers["ravine-step"] == str(t)
    hot = site.hot()
    assert sum(hot) == len(sessions)
    assert min(hot) > 0
    with site.front.client() as client:
        assert client.get("/metrics").status_code == 404


def test_what_waits_and_what_streams(site: Site) -> None:
    """An event arrives when it happens, not when a buffer is full; a body may be larger than any buffer."""
    with site.front.client() as client:
        session = create(client, optimizer="sgd", params={"w": [0.0] * 200_000})["id"]
        body = {"gradients": {"w": [1.0] * 200_000}}
        with connected(site.front) as stream:
            stream.sendall(f"GET /v1/sessions/{session}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert head_of(stream)[0] == 200
            assert client.post(f"/v1/sessions/{session}/steps", json=body).status_code == 200
            said = b""
            while b"event: step" not in said:
                piece = stream.recv(65536)
                assert piece, said
                said += piece


def test_a_service_killed_under_load(site: Site, store: StoreServer) -> None:
    draw = random.Random(2)
    crowd = Crowd([site.front], 2, clients=8, sizes=(17, 17, 17, 17, 20_000)).start()
    for i in rounds(crowd, 4, draw):
        site.services[i % 2].kill()
        assert crowd.run_on(5), crowd.hangs  # without it
        crowd.fault()
        site.services[i % 2].restart()
        time.sleep(draw.uniform(0, 3))  # it comes back into the circle after two seconds
    with store.client() as client:
        found = verdict("service killed behind nginx", 4, client, crowd)
    assert not any(found.outcome[2:]), found.notes
