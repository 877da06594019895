"""HTTPS by the service itself, and certificates that cannot be used."""

import json
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.certificates import Authority
from tests.running import ROOT, serving
from tests.wire import create

STEP = {"gradients": {"w": [1.0, 2.0]}}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")  # that they are is what is tested
def test_sessions_over_https(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("server")
    with serving(tmp_path / "data", "--tls-cert", str(cert), "--tls-key", str(key)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=server.url, verify=authority.context()) as client:
            session = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [1.0, 2.0]})["id"]
            reply = client.post(f"/v1/sessions/{session}/steps", json=STEP)
            assert reply.json()["params"] == {"w": [0.0, 0.0]}
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{server.url}/livez")
        with pytest.raises(httpx.RemoteProtocolError):  # no answer in plain HTTP, not even a redirect
            httpx.get(f"http{server.url.removeprefix('https')}/livez")
        old = authority.context()
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/livez", verify=old)


# One process for all of them: most of what a start takes is the importing.
SERVE = """
import json, sys
from typer.testing import CliRunner
from service.cli import cli
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, ["serve", "--port", "0", *arguments])
    print(json.dumps([done.exit_code, done.stderr]))
"""


def refusals(*commands: list[str]) -> list[str]:
    """What `ravine serve` says with each of these arguments, when it ends at once, with status 2."""
    command = [sys.executable, "-c", SERVE, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, _ in told] == [2] * len(commands), done.stderr
    return [sentence for _, sentence in told]


def test_what_cannot_be_served_with_is_told_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("server")
    _, other = authority.issue("other")
    locked = authority.locked(key)
    none, empty = tmp_path / "none.pem", tmp_path / "empty.pem"
    empty.write_text("")
    pairs = [(none, key), (cert, none), (cert, other), (cert, locked), (empty, key)]
    half = [["--tls-cert", str(cert)], ["--tls-key", str(key)]]
    told = refusals(*half, *(["--tls-cert", str(one), "--tls-key", str(two)] for one, two in pairs))
    assert all("belong together" in sentence for sentence in told[:2])
    assert all("tls_cert, tls_key: cannot be used" in sentence for sentence in told[2:])
