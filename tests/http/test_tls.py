"""HTTPS by the service itself, and certificates that cannot be used."""

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


def refused(*arguments: str) -> str:
    """What `ravine serve` says when it ends at once, with status 2."""
    command = [sys.executable, "-m", "service", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_cannot_be_served_with_is_told_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("server")
    _, other = authority.issue("other")
    locked = authority.locked(key)
    (tmp_path / "empty.pem").write_text("")
    assert "belong together" in refused("--tls-cert", str(cert))
    assert "belong together" in refused("--tls-key", str(key))
    for bad_cert, bad_key in (
        (tmp_path / "none.pem", key),
        (cert, tmp_path / "none.pem"),
        (cert, other),
        (cert, locked),
        (tmp_path / "empty.pem", key),
    ):
        told = refused("--tls-cert", str(bad_cert), "--tls-key", str(bad_key))
        assert "tls_cert, tls_key: cannot be used" in told
