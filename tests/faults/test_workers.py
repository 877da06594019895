"""Workers of one service are killed, stopped, and left alone: clients that send again under keys lose nothing."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.crowd import Crowd, rounds, verdict
from tests.faults.nursery import Replica
from tests.faults.stores import VOLATILE, storing, until
from tests.http.sockets import connected, reply_on
from tests.nursery import shared
from tests.running import ROOT, Server, quiet, ravine, serving
from tests.wire import create
from tests.workers import alive, at_homes, by_worker, landing_of, takes, workers_of

WORKERS = 3
ARGUMENTS = ("--workers", str(WORKERS))
STEP = b'{"gradients": {"w": [1]}}'


def head_of_step(session: str) -> bytes:
    lines = (f"POST /v1/sessions/{session}/steps HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {len(STEP)}", "", ""]).encode()


def all_there(server: Server) -> bool:
    return len([pid for pid in workers_of(server.pid) if alive(pid)]) == WORKERS


def killings(directory: Path, seed: int, times: int) -> tuple[object, list[str]]:
    """Under load, one worker after the other."""
    draw = random.Random(seed)
    with storing(directory / "store", *VOLATILE) as store:
        server = Replica(shared(), directory / "data", *ARGUMENTS, "--redis-url", store.url).start()
        try:
            crowd = Crowd([server], seed, clients=8, sizes=(17, 17, 17, 20_000)).start()
            for _ in rounds(crowd, times, draw):
                os.kill(draw.choice(sorted(workers_of(server.pid))), signal.SIGKILL)
            with store.client() as client:
                found = verdict("worker killed", times, client, crowd)
            until(lambda: all_there(server), "every worker is there again")
            assert server.stop() == 0
        finally:
            server.stop()
    return found.outcome, found.notes


def test_workers_killed_under_load(tmp_path: Path) -> None:
    outcome, notes = killings(tmp_path, 1, 8)
    assert not any(outcome[2:]), notes  # type: ignore[index]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_many_workers_killed_under_load(tmp_path: Path, seed: int) -> None:
    outcome, notes = killings(tmp_path, 100 + seed, 40)
    assert not any(outcome[2:]), notes  # type: ignore[index]


def test_the_others_serve_while_a_home_is_away(data: Path) -> None:
    """And once it is back, it gets what is its again."""
    with serving(data, *ARGUMENTS) as server, server.client() as client:
        first, second, _ = at_homes(client, WORKERS, optimizer="sgd", params={"w": [1.0]})
        with connected(server) as connection:

            def take(session: str) -> int:
                connection.sendall(head_of_step(session) + STEP)
                status, headers, body = reply_on(connection)
                assert status == 200, body
                return int(headers["ravine-step"])

            assert take(first) == 1
            victim, path = landing_of(server, 1)
            os.kill(server.pid, signal.SIGSTOP)  # or the home would be back before anybody had missed it
            try:
                os.kill(victim, signal.SIGKILL)
                until(lambda: not takes(path), "it is dead")
                assert [take(second), take(second), take(first)] == [1, 2, 2]
                assert by_worker(client, "ravine_worker_up") == {0: 1, 1: 0, 2: 1}
            finally:
                os.kill(server.pid, signal.SIGCONT)
            until(lambda: takes(path) and all_there(server), "all are there again")
            until(lambda: take(second) and by_worker(client, "ravine_sessions_hot").get(1) == 1, "it is home again")
        assert "number=1" in server.log.read_text()


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_a_home_that_hangs_keeps_nobody_waiting(data: Path, end: signal.Signals) -> None:
    """What was handed over to it is served by the others while it stands still, and nothing is when it dies."""
    with serving(data, *ARGUMENTS) as server, server.client() as client:
        first, second, _ = at_homes(client, WORKERS, optimizer="sgd", params={"w": [1.0]})
        victim, _ = landing_of(server, 1)
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connected(server)) for _ in range(6)]
            for connection in connections:  # to be where the sender lives
                connection.sendall(head_of_step(first) + STEP)
                assert reply_on(connection)[0] == 200
            os.kill(victim, signal.SIGSTOP)
            try:
                for connection in connections:
                    connection.sendall(head_of_step(second) + STEP)
                if end == signal.SIGCONT:
                    steps = [reply_on(connection)[1]["ravine-step"] for connection in connections]
            finally:
                os.kill(victim, end)
            if end == signal.SIGKILL:
                steps = [reply_on(connection)[1]["ravine-step"] for connection in connections]
            assert sorted(steps) == list("123456")
        until(lambda: all_there(server), "all are there")
        with server.client() as again:  # by a connection that the victim cannot have had
            until(lambda: sum(by_worker(again, "ravine_worker_up").values()) == WORKERS, "all answer")
            assert again.get(f"/v1/sessions/{second}/params").headers["ravine-step"] == "6"


def gone(server: Server, workers: set[int], store: int) -> bool:
    return not any(alive(pid) for pid in (server.pid, store, *workers))


def test_told_to_stop_all_drain(data: Path) -> None:
    """What is under way is answered, in each of them; then nothing is left."""
    server = Server(data, *ARGUMENTS).start()
    try:
        with server.client() as client:
            sessions = at_homes(client, WORKERS, optimizer="sgd", params={"w": [1.0]})
        workers, store = workers_of(server.pid), server.valkey_pid()
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        connections = [socket.create_connection(address, 30) for _ in sessions]
        for connection, session in zip(connections, sessions, strict=True):
            connection.sendall(head_of_step(session) + STEP[:5])
        with server.client() as client:
            until(lambda: sum(by_worker(client, "ravine_http_arrivals").values()) == WORKERS, "all have come")
        server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        time.sleep(0.3)
        for connection in connections:
            connection.sendall(STEP[5:])
            assert reply_on(connection)[0] == 200
            assert connection.recv(1) == b""
            connection.close()
        assert server.process.wait(40) == 0  # type: ignore[union-attr]
        assert gone(server, workers, store)
    finally:
        server.stop()
    assert server.log.read_text().count("ravine: stopping") == 1


def test_workers_and_store_end_with_a_killed_supervisor(data: Path) -> None:
    server = Server(data, *ARGUMENTS).start()
    workers, store = workers_of(server.pid), server.valkey_pid()
    directories = set(Path("/proc/net/unix").read_text().split())
    mine = {Path(name).parent for name in directories if name.endswith("/0.metrics")}
    assert len(workers) == WORKERS
    server.kill()
    until(lambda: gone(server, workers, store), "they are gone", 30)
    for directory in mine:  # ours is among them
        if directory.exists():
            assert list(directory.iterdir())  # another's, who is at work
    with serving(data, *ARGUMENTS) as again, again.client() as client:
        assert client.get("/readyz").status_code == 200


def test_a_worker_that_is_told_to_stop_is_started_again(data: Path) -> None:
    with serving(data, *ARGUMENTS) as server:
        with server.client() as client:
            session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
        before = workers_of(server.pid)
        victim = min(before)
        os.kill(victim, signal.SIGTERM)
        until(lambda: not alive(victim) and all_there(server), "another is in its place")
        with server.client() as client:
            assert client.get(f"/v1/sessions/{session}/params").status_code == 200


def test_a_start_that_fails_fails_once(tmp_path: Path) -> None:
    nobody = ravine("serve", *ARGUMENTS, "--host", "0.0.0.0", "--port", "0", "--data", tmp_path / "data")
    assert nobody.returncode == 2
    assert (nobody.stdout + nobody.stderr).count("there is no valid key") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = ravine("serve", *ARGUMENTS, "--port", port, "--data", tmp_path / "other")
    assert refused.returncode == 1
    assert refused.stderr.count(port) == 1
    assert not (tmp_path / "other").exists()


class Prepared(Server):
    """One whose process runs `code` before it is the service: for what only the system does, or after a minute."""

    def __init__(self, data: Path, code: str, *arguments: str) -> None:
        super().__init__(data, *ARGUMENTS, *arguments)
        self._code = f"{code}\nfrom service.cli import main\nmain()"

    def start(self) -> "Prepared":
        command = [sys.executable, "-c", self._code, "serve", "--port", "0", "--data", str(self.data), *self._arguments]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=quiet(), stderr=log, stdout=log, text=True)
        self.url = self._wait_for_url()
        return self


def test_one_that_does_not_stop_is_killed(data: Path) -> None:
    code = """
import os
os.environ["RAVINE_DRAIN_SECONDS"] = "1"
from service.workers import supervisor
supervisor.STOP_SECONDS = 1.0"""
    server = Prepared(data, code).start()
    workers, store = workers_of(server.pid), server.valkey_pid()
    victim, _ = landing_of(server, 1)
    try:
        os.kill(victim, signal.SIGSTOP)
        assert server.stop() == 1
        assert not any(alive(pid) for pid in workers)
    finally:
        if alive(victim):
            os.kill(victim, signal.SIGKILL)
        server.stop()
        os.kill(store, signal.SIGKILL)  # as long as one was there, it was in use
    assert server.log.read_text().count("did not stop in time") == 1


def test_a_service_that_cannot_be_started_any_more_ends(data: Path) -> None:
    """Something is wrong since it began, and all of it dies: nobody is left, and whoever watches has to know."""
    wrong = data.parent / "wrong"
    code = f"import os\nos.register_at_fork(after_in_child=lambda: os.path.exists({str(wrong)!r}) and os._exit(3))"
    server = Prepared(data, code).start()
    store = server.valkey_pid()
    try:
        wrong.touch()
        for pid in workers_of(server.pid):
            os.kill(pid, signal.SIGKILL)
        assert server.process.wait(60) == 3  # type: ignore[union-attr]
    finally:
        server.stop()
        os.kill(store, signal.SIGKILL)  # nobody came to it any more, to stop it
    said = server.log.read_text()
    assert said.count("could not be started in 5 attempts") == 1
    assert said.count("a worker ended") >= WORKERS + 4


def test_the_others_go_on_when_no_process_can_be_made(data: Path) -> None:
    code = """
import errno, os
fork, made = os.fork, []
def refused():
    made.append(None)
    if 3 < len(made) < 7:
        raise OSError(errno.EAGAIN, "no more")
    return fork()
os.fork = refused"""
    server = Prepared(data, code).start()
    try:
        before = len(os.listdir(f"/proc/{server.pid}/fd"))
        os.kill(min(workers_of(server.pid)), signal.SIGKILL)
        until(lambda: "cannot be forked" in server.log.read_text(), "it is tried")
        with server.client() as client:
            assert client.get("/readyz").status_code == 200
        until(lambda: all_there(server), "all are there again")
        until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) == before, "the pipes are closed")
        assert server.stop() == 0
    finally:
        server.stop()
    assert server.log.read_text().count("cannot be forked") == 3


def test_a_worker_says_what_it_did_not_expect(data: Path) -> None:
    code = """
from service import serving
def run(*_):
    raise RuntimeError("of all things")
serving.run = run"""
    server = Prepared(data, code)
    with pytest.raises(AssertionError, match="of all things"):  # its log
        server.start()
    assert server.process is not None
    assert server.process.wait(20) == 1


def test_a_directory_that_is_too_long_is_named(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    command = [sys.executable, "-m", "service", "serve", *ARGUMENTS, "--port", "0", "--data", str(tmp_path / "data")]
    environment = quiet() | {"TMPDIR": str(long)}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1
    assert f"{long}/ravine-" in said.stderr
    assert "TMPDIR" in said.stderr
    assert list(long.iterdir()) == []
    assert not (tmp_path / "data").exists()


def test_a_number_of_workers_that_cannot_be() -> None:
    assert ravine("serve", "--workers", "0").returncode == 2
