"""`ravine keys`, and where `serve` refuses to start without keys."""

import functools
import json
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from service.access.keys import parsed
from service.acks import Asked
from service.cli import cli
from tests.faults.stores import pair
from tests.http.callers import bearing
from tests.running import Server, redis_binary, redis_server, serving
from tests.running import ravine as command


def ravine(*arguments: str, data: Path | None = None, url: str | None = None) -> subprocess.CompletedProcess[str]:
    """In this process, which saves the start of another."""
    where = ["--redis-url", url] if url else ["--data", str(data)] if data else []
    done = CliRunner().invoke(cli, [*arguments, *where])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def made(*arguments: str, data: Path | None = None, url: str | None = None) -> str:
    """A new key, which is all that stands on the standard output."""
    done = ravine("keys", "create", *arguments, data=data, url=url)
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n")
    assert parsed(text.encode()) is not None, done.stdout
    assert text not in done.stderr
    return text


def listed(**where: object) -> list[dict[str, object]]:
    done = ravine("keys", "list", "--json", **where)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_keys_are_made_listed_and_revoked_while_no_service_runs(data: Path) -> None:
    text = made("--scope", "admin", "--tenant", "acme", "--expires", "30d", "--name", "ci", data=data)
    (shown,) = listed(data=data)
    assert {"tenant": "acme", "scope": "admin", "session": None, "rate": None, "name": "ci"}.items() <= shown.items()
    assert shown["expired"] is False
    assert "digest" not in shown
    told = ravine("keys", "list", data=data).stdout
    assert shown["id"] in told  # type: ignore[operator]
    assert text.rpartition("_")[2] not in told
    assert command("keys", "revoke", str(shown["id"]), "--data", data).returncode == 0
    again = ravine("keys", "revoke", str(shown["id"]), data=data)
    assert (again.returncode, "there is no key" in again.stderr) == (1, True)
    assert listed(data=data) == []
    assert not (data / "valkey.pid").exists(), "no store is left behind"


def test_keys_are_made_and_revoked_while_a_service_runs(data: Path) -> None:
    environment = {"RAVINE_KEYS": "required", "RAVINE_JIT": "false"}
    with serving(data, environment=environment) as server:
        url = f"{server.url}/v1/sessions"
        assert httpx.get(url).status_code == 401
        text = made("--scope", "session", "--rate", "1000/second", data=data)
        session = httpx.post(url, json={"optimizer": "sgd", "params": {"w": [1.0]}}, headers=bearing(text)).json()["id"]
        worker = made("--scope", "worker", "--session", session, data=data)
        assert httpx.get(f"{url}/{session}", headers=bearing(worker)).status_code == 200
        for tenant, other in (("default", f"ses_{'0' * 25}"), ("acme", session)):
            refused = ravine("keys", "create", "--scope", "worker", "--tenant", tenant, "--session", other, data=data)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert "there is no session" in refused.stderr
        assert ravine("keys", "revoke", text, data=data).returncode == 0, "by the whole text, too"
        deadline = time.monotonic() + 20
        while httpx.get(url, headers=bearing(text)).status_code != 401:
            assert time.monotonic() < deadline
        assert httpx.get(f"{url}/{session}", headers=bearing(worker)).status_code == 200


@pytest.mark.skipif(redis_binary() is None, reason="needs redis-server")
def test_keys_in_a_redis_of_ones_own(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", binary=redis_binary()) as url:
        text = made("--scope", "admin", url=url)
        (shown,) = listed(url=url)
        assert shown["id"] == text.split("_")[1]


def test_a_key_is_as_safe_as_was_asked_for_when_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the replica hears nothing a key is revoked, and nobody says that it stays so; what is made is not shown."""
    monkeypatch.setenv("RAVINE_ACK", "replicated")
    monkeypatch.setattr("service.commands.opened.Asked", functools.partial(Asked, seconds=0.2))
    with pair(tmp_path) as stores:
        url = stores.front.url
        first, second = (made("--scope", "admin", "--name", name, url=url).split("_")[1] for name in ("a", "b"))
        stores.hold()
        refused = ravine("keys", "create", "--scope", "admin", url=url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "not confirmed: 0 of 1 replicas have it" in refused.stderr
        for _ in range(2):  # nor the second time, when there is nothing left to be revoked
            refused = ravine("keys", "revoke", first, url=url)
            assert refused.returncode == 1
            assert f"key {first} is revoked here, but that is not confirmed: 0 of 1 replicas" in refused.stderr
            assert [key["id"] for key in listed(url=url)] == [second]
        stores.replica.signal(signal.SIGCONT)
        stores.link.release()
        stores.synchronise()
        done = ravine("keys", "revoke", first, url=url)
        assert (done.returncode, done.stderr) == (0, f"ravine: key {first} is revoked\n")
        assert ravine("keys", "revoke", first, url=url).returncode == 1, "there is none any more"
        third = made("--scope", "admin", url=url).split("_")[1]
        stores.hold()
        stores.fail_over()
        stores.lead()
        assert {key["id"] for key in listed(url=url)} == {second, third}


REFUSED = [
    (["--scope", "root"], "admin, session, worker"),
    (["--scope", "worker"], "for one session"),
    (["--scope", "admin", "--session", f"ses_{'0' * 25}"], "for one session"),
    (["--scope", "worker", "--session", "mine"], "there is no session"),
    (["--scope", "admin", "--tenant", "a:b"], "1 to 64"),
    (["--scope", "admin", "--tenant", "{x}"], "1 to 64"),
    (["--scope", "admin", "--tenant", "A"], "1 to 64"),
    (["--scope", "admin", "--expires", "soon"], "30d"),
    (["--scope", "admin", "--expires", "2001-01-01"], "over already"),
    (["--scope", "admin", "--expires", "999999w"], "30d"),
    (["--scope", "admin", "--rate", "fast"], "100/second"),
    (["--scope", "admin", "--name", "a\nb"], "printable"),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"), REFUSED, ids=[" ".join(each).encode("unicode_escape").decode() for each, _ in REFUSED]
)
def test_what_cannot_be_is_refused_before_the_store_is_touched(data: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli, ["keys", "create", *arguments, "--data", str(data)])
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.output.replace("│", " ").split())
    assert not data.exists()


def test_a_store_that_is_not_there_is_not_made_to_be_listed(data: Path) -> None:
    for arguments in (["list"], ["revoke", "a" * 16]):
        done = ravine("keys", *arguments, data=data)
        assert done.returncode == 1
        assert "there is no store" in done.stderr
    assert not data.exists()


# -- where `serve` refuses ---------------------------------------------------------------------------------------------


def test_nobody_is_served_beyond_loopback_without_a_key(data: Path) -> None:
    done = command("serve", "--host", "0.0.0.0", "--port", "0", "--data", data)
    assert done.returncode == 2
    assert "ravine keys create" in done.stderr
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr
    assert "listens on" not in done.stderr


def test_an_expired_key_is_none(data: Path) -> None:
    made("--scope", "admin", "--expires", "1s", data=data)
    time.sleep(1)
    assert command("serve", "--host", "0.0.0.0", "--port", "0", "--data", data).returncode == 2


def test_keys_off_is_not_enough_beyond_loopback(data: Path) -> None:
    done = command("serve", "--host", "0.0.0.0", "--port", "0", "--keys", "off", "--data", data)
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def beyond(data: Path, *arguments: str) -> Server:
    environment = {"RAVINE_HOST": "0.0.0.0", "RAVINE_JIT": "false"}
    return Server(data, *arguments, environment=environment)


def test_with_a_key_it_serves_beyond_loopback_whoever_has_it(data: Path) -> None:
    text = made("--scope", "admin", data=data)
    server = beyond(data).start()
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1") + "/v1/sessions"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers=bearing(text)).status_code == 200
    finally:
        server.stop()


def test_insecure_lets_everybody_in_and_looks_at_keys_all_the_same(data: Path) -> None:
    server = beyond(data, "--insecure").start()
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1") + "/v1/sessions"
        assert httpx.get(url, headers={"Host": "ravine.example.com"}).status_code == 200
        assert httpx.get(url, headers=bearing("rvn_wrong")).status_code == 401
    finally:
        server.stop()


def test_names_that_were_said_bound_what_is_insecure(data: Path) -> None:
    """As docker-compose.yml does: a web page whose own name leads here gets nothing."""
    environment = {"RAVINE_HOST": "0.0.0.0", "RAVINE_JIT": "false", "RAVINE_HOSTS": "localhost,127.0.0.1,[::1],ravine"}
    server = Server(data, "--insecure", environment=environment).start()
    try:
        text = made("--scope", "admin", data=data)
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for host in ("127.0.0.1:8000", "localhost", "[::1]:1", "ravine:8000"):
            assert httpx.get(f"{url}/v1/sessions", headers={"Host": host}).status_code == 200, host
        for host in ("rebound.example.com", "127.0.0.2", "ravine.example.com", ""):
            assert httpx.get(f"{url}/v1/sessions", headers={"Host": host}).status_code == 401, host
            assert httpx.get(f"{url}/livez", headers={"Host": host}).status_code == 200, host
            assert httpx.get(f"{url}/v1/sessions", headers={"Host": host, **bearing(text)}).status_code == 200, host
    finally:
        server.stop()


def test_names_that_cannot_be_end_the_start(data: Path) -> None:
    environment = {"RAVINE_HOSTS": "localhost:8000"}
    with pytest.raises(AssertionError, match="hosts: names are given as in Host, without ports"):
        Server(data, environment=environment).start()


def test_required_on_loopback_starts_without_a_key(data: Path) -> None:
    with serving(data, "--keys", "required", environment={"RAVINE_JIT": "false"}) as server:
        assert httpx.get(f"{server.url}/v1/sessions").status_code == 401
        assert httpx.get(f"{server.url}/readyz").status_code == 200
