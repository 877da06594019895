"""`ravine backup` and `ravine restore` against running services; and the commands of docs/operations.md."""

import os
import re
import shutil
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import typer

from service.cli import cli
from service.commands import backup
from service.embedded import Embedded
from tests.running import ROOT, Server, ravine, redis_server, serving
from tests.test_docs import addresses, blocks_of, compare, directory, needs_shell, printed
from tests.wire import create

PAGE = ROOT / "docs" / "operations.md"
STEP = {"gradients": {"w": [1.0, 2.0]}, "return": "none"}
QUICK = {"RAVINE_JIT": "false"}

__all__ = ["directory"]  # a fixture


def succeeded(*arguments: str | Path) -> str:
    done = ravine(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(code: int, *arguments: str | Path, **variables: str) -> str:
    done = ravine(*arguments, **variables)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def standing(client: httpx.Client, session: str) -> tuple[str, bytes]:
    """Where a session stands, and every bit of its state."""
    reply = client.get(f"/v1/sessions/{session}/state")
    assert reply.status_code == 200, reply.text
    return reply.headers["etag"], reply.content


def test_a_backup_of_a_running_service_is_restored_bit_by_bit(tmp_path: Path) -> None:
    file, restored = tmp_path / "all.rdb", tmp_path / "restored"
    with serving(tmp_path / "data", environment=QUICK) as server, server.client() as client:
        small = create(client, optimizer="adam", params={"w": [1.0, 2.0]}, labels={"team": "vision"})["id"]
        large = create(client, optimizer="sgd", shapes={"w": [300_000]})["id"]
        for number in range(5):
            key = {"Idempotency-Key": f"step-{number}"}
            assert client.post(f"/v1/sessions/{small}/steps", json=STEP, headers=key).status_code == 200
        gradient = {"gradients": {"w": np.linspace(-1, 1, 300_000).tolist()}, "return": "none"}
        assert client.post(f"/v1/sessions/{large}/steps", json=gradient).status_code == 200
        before = [standing(client, session) for session in (small, large)]
        told = succeeded("backup", file, "--data", server.data)
        assert f"{file}: {file.stat().st_size} bytes" in told
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert client.post(f"/v1/sessions/{small}/steps", json=STEP).status_code == 200, "it goes on"
        # What the backup took in the data directory is given back, and the service starts from its log as before.
        assert not (server.data / "dump.rdb").exists()
        server.stop()
        server.start()
        with server.client() as again:
            assert again.get(f"/v1/sessions/{small}").json()["step"] == 6
    assert str(restored) in succeeded("restore", file, "--data", restored)
    with serving(restored, environment=QUICK) as server, server.client() as client:
        assert [standing(client, session) for session in (small, large)] == before
        repeat = client.post(f"/v1/sessions/{small}/steps", json=STEP, headers={"Idempotency-Key": "step-4"})
        assert repeat.headers["ravine-replayed"] == "true", "keys are in it"
        (listed,) = client.get("/v1/sessions?label=team:vision").json()["data"]
        assert (listed["id"], listed["step"]) == (small, 5)
        assert client.post(f"/v1/sessions/{small}/steps", json=STEP).headers["ravine-step"] == "6"
        server.kill()
        server.restart()  # from the log that it has begun by then
        with server.client() as again:
            assert again.get(f"/v1/sessions/{small}").json()["step"] == 6


def test_a_backup_under_load_is_one_moment(tmp_path: Path) -> None:
    """Each session in it stands at a step that it had, with the bits of that step."""
    with serving(tmp_path / "data", environment=QUICK) as server, server.client() as client:
        sessions = [create(client, optimizer="sgd", params={"w": [0.0, 0.0]})["id"] for _ in range(4)]
        over = threading.Event()

        def step(session: str) -> None:
            with server.client() as own:
                while not over.is_set():
                    assert own.post(f"/v1/sessions/{session}/steps", json=STEP).status_code == 200

        threads = [threading.Thread(target=step, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        try:
            before = [client.get(f"/v1/sessions/{session}").json()["step"] for session in sessions]
            succeeded("backup", tmp_path / "b.rdb", "--data", server.data)
            after = [client.get(f"/v1/sessions/{session}").json()["step"] for session in sessions]
        finally:
            over.set()
            for thread in threads:
                thread.join()
    succeeded("restore", tmp_path / "b.rdb", "--data", tmp_path / "restored")
    with serving(tmp_path / "restored", environment=QUICK) as server, server.client() as client:
        for session, first, last in zip(sessions, before, after, strict=True):
            reply = client.get(f"/v1/sessions/{session}/params").json()
            assert first <= reply["step"] <= last
            rate = client.get(f"/v1/sessions/{session}").json()["optimizer"]["lr"]
            taken = np.zeros(2, np.float32)
            for _ in range(reply["step"]):
                taken += -np.float32(rate) * np.array([1.0, 2.0], np.float32)
            assert np.float32(reply["params"]["w"]).tolist() == taken.tolist()
        assert all(first < last for first, last in zip(before, after, strict=True)), "there was load"


def test_what_lies_in_the_way_of_a_backup_is_left_alone(tmp_path: Path) -> None:
    """In a directory that others write into: a link, or a file that everybody reads, where it was written before."""
    victim, made = tmp_path / "victim", tmp_path / "b.rdb"
    victim.write_text("precious")
    (tmp_path / "b.rdb.partial").symlink_to(victim)
    open_ = tmp_path / "c.rdb.partial"
    open_.touch()
    open_.chmod(0o666)
    dangling = tmp_path / "d.rdb"
    dangling.symlink_to(tmp_path / "elsewhere")
    with serving(tmp_path / "data", environment=QUICK) as server, server.client() as client:
        create(client, optimizer="sgd", params={"w": [1.0, 2.0]})
        succeeded("backup", made, "--data", server.data)
        succeeded("backup", tmp_path / "c.rdb", "--data", server.data)
        assert "is there already" in failed(2, "backup", dangling, "--data", server.data)
    assert victim.read_text() == "precious"
    assert open_.stat().st_size == 0
    assert not (tmp_path / "elsewhere").exists()
    for file in (made, tmp_path / "c.rdb"):
        assert not file.is_symlink()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial") and path.stat().st_size > 100]


def test_a_name_that_is_taken_meanwhile_is_not_taken_away(tmp_path: Path) -> None:
    partial, file = tmp_path / "partial", tmp_path / "file"
    partial.write_text("a backup")
    file.write_text("another")
    with pytest.raises(backup.BackupFailed, match="is there already"):
        backup._name(partial, file)
    assert file.read_text() == "another"
    file.unlink()
    backup._name(partial, file)
    assert file.read_text() == "a backup"


@pytest.mark.parametrize("durability", ["snapshot", "always"])
def test_it_changes_nothing_of_how_durable_the_store_is(tmp_path: Path, durability: str) -> None:
    with serving(tmp_path / "data", "--durability", durability, environment=QUICK) as server, server.client() as client:
        session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
        before = [server.valkey("CONFIG", "GET", name) for name in ("appendonly", "appendfsync", "save")]
        succeeded("backup", tmp_path / "b.rdb", "--data", server.data)
        assert [server.valkey("CONFIG", "GET", name) for name in ("appendonly", "appendfsync", "save")] == before
        assert (server.data / "dump.rdb").exists() == (durability == "snapshot"), "where there is no log it is the data"
        server.kill()
        server.restart()
        with server.client() as again:
            assert again.get(f"/v1/sessions/{session}").status_code == 200


def test_it_works_without_a_service_and_leaves_none_behind(tmp_path: Path) -> None:
    with serving(tmp_path / "data", environment=QUICK) as server, server.client() as client:
        session = create(client, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    succeeded("backup", tmp_path / "b.rdb", "--data", tmp_path / "data")
    assert not Embedded(tmp_path / "data")._listening()
    succeeded("restore", tmp_path / "b.rdb", "--data", tmp_path / "restored")
    with serving(tmp_path / "restored", environment=QUICK) as server, server.client() as client:
        assert client.get(f"/v1/sessions/{session}").status_code == 200


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of some sessions, beside the data of the service that they are of."""
    place = tmp_path_factory.mktemp("made")
    with serving(place / "data", environment=QUICK) as server, server.client() as client:
        for _ in range(3):
            create(client, optimizer="adam", params={"w": [1.0, 2.0]})
        succeeded("backup", place / "b.rdb", "--data", server.data)
    return place / "b.rdb"


def test_nothing_is_replaced(made: Path, tmp_path: Path) -> None:
    content = made.read_bytes()
    assert "is there already" in failed(2, "backup", made, "--data", made.parent / "data")
    assert made.read_bytes() == content
    held = sorted(path.name for path in (made.parent / "data").rglob("*"))
    assert "is not empty" in failed(1, "restore", made, "--data", made.parent / "data")
    assert sorted(path.name for path in (made.parent / "data").rglob("*")) == held
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").write_text("mine")
    assert "letters.txt" in failed(1, "restore", made, "--data", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letters.txt"]


def test_nothing_is_restored_under_a_running_service(made: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--durability", "snapshot", environment=QUICK) as server:
        assert not (tmp_path / "data" / "dump.rdb").exists(), "nothing there but the server itself"
        assert "a service works on" in failed(1, "restore", made, "--data", server.data)
        assert not (tmp_path / "data" / "dump.rdb").exists()


def test_a_torn_or_changed_file_is_not_restored(made: Path, tmp_path: Path) -> None:
    content = made.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "half": content[:middle],
        "without its last byte": content[:-1],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "no dump": b"PK\x03\x04" + content[4:],
    }
    for name, changed in damaged.items():
        (tmp_path / "damaged.rdb").write_bytes(changed)
        assert "is not a whole dump" in failed(1, "restore", tmp_path / "damaged.rdb", "--data", tmp_path / "new"), name
        assert not (tmp_path / "new").exists(), name
    assert "No such file" in failed(1, "restore", tmp_path / "none.rdb", "--data", tmp_path / "new")


def test_what_cannot_be_backed_up_is_told(made: Path, tmp_path: Path) -> None:
    assert "there is no store in" in failed(1, "backup", tmp_path / "b.rdb", "--data", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    missing = failed(1, "backup", tmp_path / "no" / "such" / "b.rdb", "--data", made.parent / "data")
    assert "No such file or directory" in missing
    with redis_server(tmp_path / "own") as url:
        assert "docs/operations.md" in failed(2, "backup", tmp_path / "b.rdb", RAVINE_REDIS_URL=url)
    assert list(tmp_path.glob("*.rdb*")) == []


def test_a_dump_that_cannot_be_written_leaves_no_file(made: Path, tmp_path: Path) -> None:
    """The server cannot make its temporary file: a directory is in the way, as on a disk that is full."""
    shutil.copytree(made.parent / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.sock"))
    with serving(tmp_path / "data", environment=QUICK) as server:
        (tmp_path / "data" / "dump.rdb").mkdir()
        assert "could not write its dump" in failed(1, "backup", tmp_path / "b.rdb", "--data", server.data)
        (tmp_path / "data" / "dump.rdb").rmdir()
    assert list(tmp_path.glob("b.rdb*")) == []


# -- the page ----------------------------------------------------------------------------------------------------------


@needs_shell
def test_the_commands_of_the_page(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = blocks_of(PAGE.read_text())
    assert len(blocks) >= 5
    with serving(directory / "ravine-data", environment=QUICK) as server:
        with server.client() as client:
            session = create(client, optimizer="adam", params={"w": [1.0, 2.0]})["id"]
            for _ in range(3):
                client.post(f"/v1/sessions/{session}/steps", json=STEP)
        compare(blocks, printed(blocks, "sh", directory, addresses(server)), PAGE)


def test_every_command_of_the_page_is_one() -> None:
    """Those that are shown and not run, too: with its options, as `--help` knows them."""
    shown = set(re.findall(r"\bravine ((?:keys |sessions )?[a-z]+)", PAGE.read_text()))
    assert shown >= {"backup", "restore", "serve", "sessions list", "sessions accept", "keys create", "keys revoke"}
    root = typer.main.get_command(cli)
    for command in sorted(shown):
        found: Any = root
        for name in command.split():
            found = found.commands[name]
        for line in re.findall(rf"\bravine {command}\b([^`\n]*)", PAGE.read_text()):
            options = {option for parameter in found.params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", line)) <= options, (command, line)


OF_WORKERS = {"ravine_handovers_total", "ravine_worker_up"}


def test_every_metric_of_the_page_is_one(server: Server, client: httpx.Client) -> None:
    text = client.get("/metrics").text
    named = set(re.findall(r"`(ravine_[a-z_]+)", PAGE.read_text()))
    exposed = set(re.findall(r"^# TYPE (ravine_[a-z_]+)", text, re.MULTILINE))
    assert named - OF_WORKERS == exposed  # these are of several workers alone: tests/http/test_workers.py
