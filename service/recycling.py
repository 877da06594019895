"""Large arrays in memory that was in use before, so that the kernel need not find and zero fresh pages for each.

A step of 1 M parameters fills two arrays of 4 MB, its body and the new parameters. Where each was mapped anew, page
faults were 31 % of the service's CPU time; glibc's own keeping of freed blocks cost more memory than it saved time
(memory.py). So blocks are kept here, for as long as steps come.

What is handed out is a view of a block. The block is free again when this list alone refers to it: whoever has the
array, a slice or a memoryview of it, or another array over that, refers to the block. Blocks that were free at two
turns of `tidy` in a row are given back to the system.
"""

import asyncio
import sys
import threading
from typing import Any

import numpy as np

from core.layout import Array

# Smaller arrays come out of the C library's heap, where pages stay.
LEAST = 1 << 20
# What is taken for a body, which goes, may be larger than it by a quarter; for parameters, which stay, by less: all of
# a block that was used before is in memory, whatever is asked of it.
OF_BODIES, OF_PARAMETERS = 4, 32
_ALIGNED = 64  # bytes: a cache line, and the widest vector


class Blocks:
    """Safe in threads."""

    def __init__(self, most: int) -> None:
        self.most = most  # bytes that may be free, whenever more are taken
        self._kept: list[Array] = []
        self._free_before: set[int] = set()
        self._lock = threading.Lock()

    def empty(self, size: int, dtype: Any) -> Array:
        """As np.empty: (size,), not cleared; on a cache line of its own if it is large."""
        dtype = np.dtype(dtype)
        wanted = size * dtype.itemsize
        if wanted < LEAST:
            return np.empty(size, dtype)
        found = self.again(wanted, OF_PARAMETERS)
        if found is None:
            found = fresh(wanted)
            self.keep(found)
        return found.view(dtype)

    def again(self, size: int, slack: int = OF_BODIES) -> Array | None:
        """So many bytes that were in use before, and are in memory therefore; None: there are none."""
        if size < LEAST:
            return None
        wanted = size + _ALIGNED
        with self._lock:
            for block in self._kept:
                if wanted <= block.size <= wanted + wanted // slack and sys.getrefcount(block) == _ALONE:
                    return _aligned(block, size)
        return None

    def keep(self, array: Array) -> None:
        """To be used again, what `fresh` or `again` gave.

        Not before a body is whole: one that is given up is to take no memory any more.
        """
        block = array.base
        assert block is not None
        if array.size < LEAST:
            return
        with self._lock:
            self._bound()
            if not any(known is block for known in self._kept):
                self._kept.append(block)

    def _bound(self) -> None:
        """Gives back those that are free beyond `most`: large bodies may come faster than `tidy`."""
        left, kept = self.most, []
        for block in reversed(self._kept):
            free = sys.getrefcount(block) == _ALONE
            left -= block.size * free
            if left >= 0 or not free:
                kept.append(block)
        self._kept = kept[::-1]

    def tidy(self) -> None:
        """Gives back what was free the last time too. To be called every now and then."""
        with self._lock:
            free = {id(block) for block in self._kept if sys.getrefcount(block) == _ALONE}
            self._kept = [block for block in self._kept if id(block) not in free & self._free_before]
            self._free_before = free & {id(block) for block in self._kept}

    async def keep_tidy(self) -> None:
        """For ever: what was not in use for two seconds is given back."""
        while True:
            await asyncio.sleep(1.0)
            self.tidy()

    @property
    def size(self) -> int:
        """Bytes of all blocks, in use or free."""
        return sum(block.size for block in self._kept)


def fresh(size: int) -> Array:
    """So many bytes that take no memory before they are written to."""
    return _aligned(np.empty(size + _ALIGNED, np.uint8), size)


def _aligned(block: Array, size: int) -> Array:
    start = -block.ctypes.data % _ALIGNED
    return block[start : start + size]


def _references() -> int:
    """What getrefcount says in a loop over a list of an object that this list alone refers to."""
    for one in [object()]:
        found = sys.getrefcount(one)
    return found


_ALONE = _references()

# One for the process: bodies come before it is known whose they are.
blocks = Blocks(256 << 20)
