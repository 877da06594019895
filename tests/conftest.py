"""What many tests share: a running service, and a client for it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.running import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One service for all tests that do not break it, started as a user does; each test makes sessions of its own."""
    with serving(tmp_path_factory.mktemp("shared") / "data", fresh=True) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory of the test's own."""
    return tmp_path / "data"
