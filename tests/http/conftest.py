"""One client for all of these tests: making one costs more than most of them."""

from collections.abc import Iterator

import httpx
import pytest

from tests.running import Server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client
