"""Which of the workers this process is, and where it finds the others."""

import contextlib
import os
from pathlib import Path
from typing import Final, NamedTuple

_LONGEST: Final = 107  # bytes of a unix socket's path (unix(7))


class Berth(NamedTuple):
    """Worker `number` of so many `workers`, which meet in `directory` (0700, of the supervisor's making).

    `alive` is the reading end of a pipe whose other end the supervisor alone holds: it ends when that one does.
    `ready` is the writing end of one on which the supervisor waits for a byte.
    """

    number: int
    workers: int
    directory: Path
    alive: int
    ready: int

    @property
    def others(self) -> list[int]:
        return [number for number in range(self.workers) if number != self.number]

    @property
    def files(self) -> int:
        """How many are open for the way to each of the others, and from each (links.py)."""
        return 5 * (self.workers - 1)

    @property
    def fits(self) -> bool:
        """Whether the sockets can have their names."""
        return len(os.fsencode(self.connections(self.number))) <= _LONGEST

    def connections(self, number: int) -> str:
        """The socket on which worker `number` takes connections over."""
        return str(self.directory / f"{number}.connections")

    def metrics(self, number: int) -> str:
        """The socket on which it tells what it has measured."""
        return str(self.directory / f"{number}.metrics")

    def tell_ready(self) -> None:
        with contextlib.suppress(OSError):  # the supervisor has gone, which is seen elsewhere
            os.write(self.ready, b".")
