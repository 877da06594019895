"""Places at which a test breaks the service off: between a step's append and its answer, say.

They exist under RAVINE_FAILPOINTS alone, which is for tests and is told of in the log when the service starts:

    RAVINE_FAILPOINTS="after-append=kill@3 before-reply=sleep:0.2@5"

is SIGKILL to this process the third time that it passes `after-append`, and a pause of 0.2 s the fifth time that it
passes `before-reply`. Without `@` it is each time.
"""

import asyncio
import os
import re
import signal
from typing import Final, NamedTuple

# before-append: the batch is made, nothing of it is in the store. after-staging: the chunks of its large tensors are.
# after-append: it is in the log, and the reply of the store has come. before-reply: applied, and about to be answered.
# blind: not a place. The commit script does not look at the head: what is to be seen when it does not.
POINTS: Final = ("before-append", "after-staging", "after-append", "before-reply", "blind")
_WRITTEN: Final = re.compile(r"([a-z-]+)=(kill|on|sleep:[0-9.]+)(?:@([0-9]+))?")


class Failpoint(NamedTuple):
    """`at`: the passage at which it acts; 0: at each."""

    action: str
    at: int


class Failpoints:
    """`text` as above. Raises ValueError for what it is not."""

    def __init__(self, text: str = "") -> None:
        self._armed: dict[str, Failpoint] = {}
        self._passed: dict[str, int] = {}
        for part in text.split():
            match = _WRITTEN.fullmatch(part)
            if match is None or match[1] not in POINTS:
                raise ValueError(f"{part!r} is no failpoint: one of {', '.join(POINTS)}, then =kill, =on or =sleep:S")
            self._armed[match[1]] = Failpoint(match[2], int(match[3] or 0))

    def armed(self, point: str) -> bool:
        return point in self._armed

    async def reach(self, point: str) -> None:
        """Does what was asked for at `point`; nothing where nothing was."""
        failpoint = self._armed.get(point)
        if failpoint is None:
            return
        passed = self._passed[point] = self._passed.get(point, 0) + 1
        if failpoint.at not in (0, passed):
            return
        if failpoint.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif failpoint.action.startswith("sleep:"):
            await asyncio.sleep(float(failpoint.action[len("sleep:") :]))
