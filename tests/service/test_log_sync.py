"""How the embedded store's log is brought to the disk: all of it, often where much is written."""

import asyncio
from pathlib import Path

import pytest

from service.embedded import Embedded
from service.valkey import OFTEN, LogSync, pause_after


def test_each_sync_tells_what_came_since_the_last(tmp_path: Path) -> None:
    log, sync = tmp_path / "appendonly.aof.1.incr.aof", LogSync(tmp_path)
    assert sync() == 0
    log.write_bytes(b"x" * 1000)
    (tmp_path / "appendonly.aof.1.base.rdb").write_bytes(b"y" * 10)
    assert sync() == 1000
    with log.open("ab") as file:
        file.write(b"z" * 24)
    assert sync() == 24
    assert sync() == 0


def test_another_log_that_begins_is_synced_and_one_that_ends_is_no_fault(tmp_path: Path) -> None:
    first, second, sync = tmp_path / "a.1.incr.aof", tmp_path / "a.2.incr.aof", LogSync(tmp_path)
    first.write_bytes(b"x" * 10)
    assert sync() == 10
    second.write_bytes(b"x" * 5)
    assert sync() == 5
    first.unlink()
    assert sync() == 0


def test_what_was_let_go_from_memory_is_there_and_goes_on(tmp_path: Path) -> None:
    log, sync = tmp_path / "a.1.incr.aof", LogSync(tmp_path)
    written = bytes(range(251)) * (OFTEN // 251)
    with log.open("ab", buffering=0) as file:
        file.write(written)
        assert sync() == len(written)
        file.write(b"the end")
        assert sync() == 7
    assert log.read_bytes() == written + b"the end"


@pytest.mark.parametrize(
    ("pause", "grown", "then"),
    [(1.0, 0, 1.0), (1.0, OFTEN // 2, 1.0), (1.0, 4 * OFTEN, 0.25), (0.25, OFTEN, 0.25), (0.25, 0, 1.0)],
)
def test_as_often_as_so_much_is_new(pause: float, grown: int, then: float) -> None:
    assert pause_after(pause, grown) == then


def test_no_more_often_than_ten_times_a_second() -> None:
    assert pause_after(0.1, 100 * OFTEN) == 0.1


def test_a_file_that_cannot_be_synced_keeps_no_other_from_it(tmp_path: Path) -> None:
    sync, bad = LogSync(tmp_path), [tmp_path / f"bad.{number}.incr.aof" for number in range(8)]
    for number, path in enumerate(bad):
        path.symlink_to(path)  # to itself: ELOOP
        (tmp_path / f"good.{number}.incr.aof").write_bytes(b"x")
    with pytest.raises(OSError, match="symbolic links"):
        sync()
    for path in bad:
        path.unlink()
    assert sync() == 0


def test_a_disk_that_fails_is_told_of_once_a_second_however_fast_the_log_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    embedded = Embedded(tmp_path, on_progress=told.append)
    log, pauses = tmp_path / "appendonlydir" / "a.1.incr.aof", list[float]()
    log.parent.mkdir()
    with log.open("wb") as file:
        file.truncate(100 * OFTEN)

    async def passed(pause: float) -> None:
        pauses.append(pause)
        if len(pauses) == 2:
            log.unlink()
            log.symlink_to(log)
        if len(pauses) == 3:
            embedded.durability = "always"

    monkeypatch.setattr(asyncio, "sleep", passed)
    asyncio.run(embedded.flush())
    assert pauses == [1.0, 0.1, 1.0]
    assert len(told) == 2
