"""Commits are drawn many at a time, for whoever asks: in any thread, and after a fork."""

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from service import ids
from service.ids import new_commit


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads take turns as often as they can, and every other commit is the last one that there is."""
    monkeypatch.setattr(ids, "_AT_ONCE", 2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_threads_draw_commits_together() -> None:
    """As a large session is made in one while others take their steps."""
    count, drawn = 50_000, list[list[str]]()

    def draw() -> None:
        drawn.append([new_commit() for _ in range(count)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(each) for each in drawn] == [count] * 4
    assert len(set().union(*drawn)) == 4 * count
    assert {len(commit) for commit in set().union(*drawn)} == {16}


def test_a_fork_draws_its_own() -> None:
    new_commit()  # so that others are left over
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, "".join(new_commit() for _ in range(255)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    os.waitpid(child, 0)
    theirs = {text[start : start + 16] for start in range(0, len(text), 16)}
    assert len(theirs) == 255
    assert theirs.isdisjoint({new_commit() for _ in range(255)})
