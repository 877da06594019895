"""Stores that take no more, for a while: nothing that was acknowledged is lost, and all goes on with the same keys."""

from pathlib import Path

import pytest

from tests.faults.namespaces import Unpermitted
from tests.faults.outages import full_disk, full_memory


def test_no_memory(tmp_path: Path) -> None:
    found = full_memory(tmp_path, seed=1, times=3)
    assert not any(found.outcome[2:]), found.notes
    assert (found.outcome.injected, found.gone) == (3, 0)


@pytest.mark.parametrize(("durability", "times"), [("everysec", 1), ("always", 1)])
def test_no_disk(tmp_path: Path, durability: str, times: int) -> None:
    try:
        found = full_disk(tmp_path, seed=2, times=times, durability=durability)
    except Unpermitted as missing:
        pytest.skip(str(missing))
    assert not any(found.outcome[2:]), found.notes
    assert (found.outcome.injected, found.gone) == (times, 0)


def test_the_store_dies_while_the_disk_is_full(tmp_path: Path) -> None:
    """What it had acknowledged and could not write is gone, and that is told."""
    try:
        found = full_disk(tmp_path, seed=3, times=2, killed=True)
    except Unpermitted as missing:
        pytest.skip(str(missing))
    assert not any(found.outcome[2:]), found.notes
