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
# A block is used for no less than four fifths of it.
SLACK = 4
_ALIGNED = 64  # bytes: a cache line, and the widest vector


class Blocks:
    """Safe in threads."""

    def __init__(self) -> None:
        self._kept: list[Array] = []
        self._free_before: set[int] = set()
        self._lock = threading.Lock()

    def empty(self, size: int, dtype: Any) -> Array:
        """As np.empty: (size,), not cleared; on a cache line of its own if it is large."""
        dtype = np.dtype(dtype)
        wanted = size * dtype.itemsize
        if wanted < LEAST:
            return np.empty(size, dtype)
        with self._lock:
            block = self._free_one(wanted + _ALIGNED)
            start = -block.ctypes.data % _ALIGNED
            return block[start : start + wanted].view(dtype)

    def _free_one(self, size: int) -> Array:
        for block in self._kept:
            if size <= block.size <= size + size // SLACK and sys.getrefcount(block) == _ALONE:
                return block
        block = np.empty(size, np.uint8)
        self._kept.append(block)
        return block

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


def _references() -> int:
    """What getrefcount says in a loop over a list of an object that this list alone refers to."""
    for one in [object()]:
        found = sys.getrefcount(one)
    return found


_ALONE = _references()

# One for the process: bodies come before it is known whose they are.
blocks = Blocks()
