"""`ravine serve` as a person meets it: its help, its refusals, and what it does not show."""

import subprocess
import sys

import pytest

from service.app import create_app
from service.settings import Settings
from tests.running import ROOT, ravine

OPTIONS = ("host", "port", "data", "redis-url", "ack", "ack-replicas", "durability", "memory", "log-format")


def test_help_tells_every_option_with_its_default_and_variable() -> None:
    command = [sys.executable, "-m", "service", "serve", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0
    words = " ".join(told.stdout.split())
    for option in OPTIONS:
        assert f"--{option}" in words
        assert f"RAVINE_{option.replace('-', '_').upper()}" in words
    assert "default: 127.0.0.1" in words
    assert "default: everysec" in words


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--port", "99999", "port:"),
        ("--memory", "lots", "a size is a number with an optional unit"),
        ("--durability", "sometimes", "durability:"),
        ("--log-format", "xml", "log_format:"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(option: str, value: str, sentence: str) -> None:
    refused = ravine("serve", option, value)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("url", ["redis://user:hidden@store:6379/2", "redis://store:6379/2?password=hidden"])
def test_a_password_is_not_shown(url: str) -> None:
    settings = Settings(redis_url=url)
    assert create_app(settings).store_place == "redis://store:6379/2"
    assert "hidden" not in repr(settings)


def test_a_port_that_is_taken_is_no_traceback(server: object) -> None:
    port = server.url.rpartition(":")[2]  # type: ignore[attr-defined]
    refused = ravine("serve", "--port", port, "--redis-url", server.store_url())  # type: ignore[attr-defined]
    assert refused.returncode != 0
    assert "address already in use" in refused.stderr
    assert "Traceback" not in refused.stderr
