"""Memory of large arrays is used again, never while anybody can see it, and given back when it is not."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from service.recycling import LEAST, Blocks, fresh

MILLION = 1_000_000


def address(array: Any) -> int:
    return int(array.ctypes.data)


def test_what_nobody_sees_any_more_is_used_again() -> None:
    blocks = Blocks(1 << 30)
    first = blocks.empty(MILLION, np.float32)
    where = address(first)
    assert (first.shape, first.dtype, where % 64) == ((MILLION,), np.float32, 0)
    del first
    assert address(blocks.empty(MILLION, np.float32)) == where
    assert address(blocks.empty(4 * MILLION, np.uint8)) == where  # whatever it holds
    assert address(blocks.again(4 * MILLION - 500_000)) == where
    assert blocks.size < 4 * MILLION + 1000


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda array: array,
    "a slice": lambda array: array[10:20],
    "a view in another dtype": lambda array: array.view(np.uint8)[5:],
    "another shape": lambda array: array.reshape(1000, 1000).T,
    "a memoryview": lambda array: array[3:].data,
    "an array over a memoryview": lambda array: np.frombuffer(memoryview(array).cast("B")[8:], np.uint8),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_sees_is_let_alone(holder: str) -> None:
    blocks = Blocks(1 << 30)
    first = blocks.empty(MILLION, np.float32)
    first[:] = 1.0
    where, held = address(first), HOLDERS[holder](first)
    del first
    for _ in range(3):
        blocks.tidy()
        other = blocks.empty(MILLION, np.float32)
        assert address(other) != where
        other[:] = 2.0
    del other
    assert set(bytes(held)) == set(np.float32(1.0).tobytes())
    del held
    both = [blocks.empty(MILLION, np.float32) for _ in range(2)]
    assert where in {address(array) for array in both}


def test_it_is_given_back_when_it_was_not_in_use_for_two_turns() -> None:
    blocks = Blocks(1 << 30)
    kept, gone = blocks.empty(MILLION, np.float32), blocks.empty(2 * MILLION, np.float32)
    both = blocks.size
    del gone
    blocks.tidy()
    assert blocks.size == both
    blocks.tidy()
    assert 4 * MILLION <= blocks.size < both - 8 * MILLION + 1000
    where = address(kept)
    blocks.tidy()
    assert blocks.size >= 4 * MILLION
    assert address(blocks.empty(MILLION, np.float32)) != where


def test_small_arrays_and_much_larger_blocks_are_not_taken() -> None:
    blocks = Blocks(1 << 30)
    blocks.empty(LEAST // 4 - 1, np.float32)
    assert blocks.size == 0
    where = address(blocks.empty(4 * MILLION, np.float32))
    assert blocks.again(4 * MILLION) is None
    assert blocks.again(LEAST - 1) is None
    # What stays for long takes no block that is larger by an eighth; what goes soon does.
    assert address(blocks.empty(MILLION * 7 // 2, np.float32)) != where
    assert address(blocks.again(14 * MILLION)) == where


def test_threads_never_share_one() -> None:
    blocks, wrong = Blocks(1 << 30), []

    def work(mark: int) -> None:
        for _ in range(150):
            array = blocks.empty(300_000, np.float32)
            array[:] = mark
            if not (array == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        blocks.tidy()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_more_is_free_than_may_be_when_more_is_taken() -> None:
    blocks = Blocks(9 * MILLION)
    several = [fresh(4 * MILLION) for _ in range(5)]
    for array in several:
        blocks.keep(array)
        blocks.keep(array)
    held = several[1]
    del several, array
    assert 20 * MILLION < blocks.size < 20 * MILLION + 1000
    new = fresh(4 * MILLION)
    blocks.keep(new)
    assert 4 * MILLION * 4 <= blocks.size < 4 * MILLION * 4 + 1000  # two that are free, one that is not, the new one
    assert not np.shares_memory(held, new)


def test_what_is_not_kept_is_gone() -> None:
    blocks = Blocks(1 << 30)
    fresh(4 * MILLION)
    assert (blocks.size, blocks.again(4 * MILLION)) == (0, None)
    blocks.keep(fresh(LEAST - 1))
    assert blocks.size == 0
