"""What a fault scenario reports: the row of one injection in the table that ``python -m tests.faults`` prints.

A scenario injects its fault ``injected`` times under load, reads every acknowledgement its clients got and every
log entry the store kept, and counts what does not fit together. All counts but ``injected`` are zero where the
guarantees hold; the runner adds up rows of the same name.
"""

from typing import NamedTuple


class Outcome(NamedTuple):
    """Counts of one scenario (or of several of the same name added up).

    ``name``      the injection, as the table shows it ("API kill -9", "failover", …).
    ``injected``  how often the fault was really brought about (a kill that came too late is not one).
    ``lost``      acknowledged contributions that the final log does not hold where nothing told the clients so.
    ``doubled``   contributions (by idempotency key) that the log holds more than once.
    ``broken``    breaks of the chain: a commit whose parent is not the one before it, two acknowledgements of one
                  step with different commits, an acknowledgement that is on no line, an order against real time.
    ``differ``    answers and final states that are not, bit for bit, those of a serial replay of the log.
    ``hangs``     requests that got no answer, and servers that did not come back, within their time.
    """

    name: str
    injected: int
    lost: int = 0
    doubled: int = 0
    broken: int = 0
    differ: int = 0
    hangs: int = 0
