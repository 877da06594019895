"""A store that comes back with an older copy of its data: told of, stopped, looked at and accepted by an operator."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.http.refusals import refused
from tests.running import Server, valkey_binary
from tests.running import ravine as command
from tests.wire import create

STEP = {"gradients": {"w": [1.0]}}


class Valkey:
    """A store that keeps a log, and that can be given another one's."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.url = f"unix://{directory}/s.sock"
        self._start()

    def _start(self) -> None:
        socket = self.directory / "s.sock"
        command = [valkey_binary(), "--port", "0", "--unixsocket", str(socket), "--dir", str(self.directory)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            for _ in range(500):
                try:
                    client.ping()
                except (redis.ConnectionError, redis.BusyLoadingError):
                    time.sleep(0.02)
                else:
                    return
        raise AssertionError("the store did not start")

    def copied(self) -> Path:
        copy = self.directory.with_name("copy")
        shutil.copytree(self.directory / "appendonlydir", copy)
        return copy

    def put_back(self, copy: Path) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.directory / "appendonlydir")
        shutil.copytree(copy, self.directory / "appendonlydir")
        self._start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def valkey(directory: Path) -> Iterator[Valkey]:
    store = Valkey(directory)
    try:
        yield store
    finally:
        store.end()


def ravine(store: Valkey, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return command("sessions", *arguments, "--redis-url", store.url, answer=answer)


def inspected(store: Valkey, session: str) -> dict[str, Any]:
    told = ravine(store, "inspect", session, "--json")
    assert told.returncode == 0, told.stderr
    return dict(json.loads(told.stdout))


def test_steps_that_the_store_lost_are_told_of_until_somebody_accepts(tmp_path: Path) -> None:
    with valkey(tmp_path / "valkey") as store:
        first = Server(tmp_path / "first", "--redis-url", store.url).start()
        second = Server(tmp_path / "second", "--redis-url", store.url).start()
        try:
            scenario(store, first, second)
        finally:
            first.stop()
            second.stop()


def scenario(store: Valkey, first: Server, second: Server) -> None:
    with first.client() as client, second.client() as other:
        session = create(client, optimizer="sgd", params={"w": [1.0]})["id"]
        path = f"/v1/sessions/{session}"
        kept = [client.post(f"{path}/steps", json=STEP) for _ in range(2)][-1]
        copy = store.copied()
        lost = [client.post(f"{path}/steps", json=STEP) for _ in range(3)][-1]
        assert (kept.json()["step"], lost.json()["step"]) == (2, 5)
        store.put_back(copy)

        told = refused(client.post(f"{path}/steps", json=STEP), 409, "state-lost")
        assert told["acknowledged"] == {"step": 5, "etag": lost.headers["etag"]}
        assert told["found"] == {"step": 2, "etag": kept.headers["etag"]}
        for asked in (client, other):
            refused(asked.get(path), 409, "state-lost")
            refused(asked.get(f"{path}/params", params={"after": 9, "wait": 5}), 409, "state-lost")
            refused(asked.post(f"{path}/steps", json=STEP), 409, "state-lost")
            refused(asked.get(f"{path}/events"), 409, "state-lost")
            assert session in [shown["id"] for shown in asked.get("/v1/sessions").json()["data"]]

        second.stop()  # and what a service forgets when it stops, the store remembers
        second.restart()
        with second.client() as anew:
            assert refused(anew.get(path), 409, "state-lost")["acknowledged"]["step"] == 5

        found = inspected(store, session)
        assert (found["stands"]["step"], found["lost"]["step"], found["lost"]["etag"]) == (2, 5, lost.headers["etag"])
        assert [entry["step"] for entry in found["log"]] == [1, 2]
        listed = ravine(store, "list", "--lost")
        assert [line.split()[0] for line in listed.stdout.splitlines()] == [session]
        text = ravine(store, "inspect", session).stdout
        assert lost.headers["etag"] in text
        assert f"ravine sessions accept {session}" in text

        assert ravine(store, "accept", session, answer="n\n").returncode == 1
        refused(client.get(path), 409, "state-lost")
        done = ravine(store, "accept", session, "--yes")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{session} goes on from step 2")
        assert client.get(path).headers["etag"] == kept.headers["etag"]
        again = client.post(f"{path}/steps", json=STEP, headers={"If-Match": kept.headers["etag"]})
        assert again.json()["step"] == 3
        assert inspected(store, session)["lost"] is None
        refusal = ravine(store, "accept", session, "--yes")
        assert refusal.returncode == 1
        assert "has lost nothing" in refusal.stderr


def test_the_embedded_store_is_looked_at_with_and_without_a_service(data: Path) -> None:
    server = Server(data).start()
    with server.client() as client:
        session = create(client, optimizer="adam", params={"w": [0.5] * 100_000})["id"]
        body = {"gradients": {"w": [1.0] * 100_000}}
        for _ in range(2):
            assert client.post(f"/v1/sessions/{session}/steps", json=body).status_code == 200
    running = server.valkey_pid()
    shown = []
    for stop in (True, False):
        told = command("sessions", "inspect", session, "--json", "--data", data)
        assert told.returncode == 0, told.stderr
        shown.append(json.loads(told.stdout))
        if stop:
            assert server.valkey_pid() == running
            server.stop()
    assert shown[0] == shown[1]
    assert shown[0]["stands"]["step"] == 2
    assert shown[0]["snapshot"]["ok"]
    assert not (data / "valkey.sock").exists()  # started for the command, and ended with it


def test_what_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    refusal = command("sessions", "list", "--data", tmp_path / "none")
    assert refusal.returncode == 1
    assert "there is no store" in refusal.stderr
    assert not (tmp_path / "none").exists()
