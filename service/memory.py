"""How the process deals with its memory: large arrays, and the garbage collector.

glibc moves blocks that were mapped once into its heap when they come again, and keeps what is freed there: after a few
steps the process held one gradient more for every three than it used. Large arrays are mapped and unmapped instead.
That has a price, the kernel's zeroing of fresh pages, which recycling.py saves where arrays come one after the other.

glibc also gives each thread a heap of its own, and what a thread has freed there no other takes: after some thousand
random calls 6 of 115 MB were free and of no use. So all have one. Steps of 100,000 parameters, four sessions at a time,
took as much of the processor as before (3.0 ms each), and the process 98.6 MB in place of 103.7.
"""

import ctypes
import gc
import sys

THRESHOLD = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def return_large_arrays() -> bool:
    """Whether the C library could be told so; other systems than Linux with glibc have ways of their own."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    told = ((_M_MMAP_THRESHOLD, THRESHOLD), (_M_TRIM_THRESHOLD, THRESHOLD), (_M_ARENA_MAX, 1))
    return all(bool(mallopt(*each)) for each in told)


def collect_less_often() -> None:
    """Leaves out of collections what stands after the start, and makes them rarer.

    Under load they took the loop for up to 50 ms: the 99th percentile of small steps fell to less than half. Cycles are
    rare here; what a request makes is freed by its reference counts, and so is what a connection does.

    What is left for the collector is to go over what there is more of than before, such as sixty objects for a
    connection that is held. That takes about 0.2 µs an object, so how many it goes over at once bounds how long it
    stops the loop: 20,000 in the first generation, three times as many in the second. The third, which is all that was
    not there at the start, comes a thousand times less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 2, 1_000)
