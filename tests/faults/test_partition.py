"""Networks that fall apart: nothing that was acknowledged is lost, unless by a primary that was given up, and told."""

from pathlib import Path

import pytest

from tests.faults.namespaces import Unpermitted
from tests.faults.partitions import partitions, split_brains


def test_services_cut_off_from_their_store(tmp_path: Path) -> None:
    try:
        found = partitions(tmp_path, seed=1, times=2)
    except Unpermitted as missing:
        pytest.skip(str(missing))
    assert not any(found.outcome[2:]), found.notes
    assert (found.outcome.injected, found.gone) == (2, 0)


@pytest.mark.parametrize("replicated", [False, True])
def test_two_primaries(tmp_path: Path, replicated: bool) -> None:
    try:
        found = split_brains(tmp_path, seed=2, times=1, replicated=replicated)
    except Unpermitted as missing:
        pytest.skip(str(missing))
    assert not any(found.outcome[2:]), found.notes
    assert found.outcome.injected == 1
    assert (found.gone > 0) != replicated
