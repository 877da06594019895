"""SIGTERM to services under load: each drains and ends in order, and its clients go on at another one."""

from pathlib import Path

import pytest

from tests.faults.outages import stops


@pytest.mark.parametrize("count", [2, 4])
def test_told_to_stop_under_load(tmp_path: Path, count: int) -> None:
    found = stops(tmp_path, seed=1, times=2, count=count)
    assert not any(found.outcome[2:]), found.notes
    assert (found.outcome.injected, found.gone) == (2, 0)
