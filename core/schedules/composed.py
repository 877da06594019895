"""Schedules made of schedules: one after the other, or multiplied."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar

from annotated_types import Len

from core.errors import InvalidRecipe
from core.schedules.schedule import Schedule, Steps, between, check_ascending

# All of them are looked at in every step, and their own parts too.
MOST_PARTS = 64
DEEPEST = 8

Parts = Annotated[tuple[Schedule, ...], Len(1, MOST_PARTS)]


class Composed(Schedule):
    """What has parts, which are schedules themselves."""

    parts: Parts

    def check(self) -> None:
        self._count(1)

    def _count(self, depth: int) -> int:
        """Checks it and all that is in it; gives the number of schedules there."""
        if depth > DEEPEST:
            raise InvalidRecipe("", f"schedules of schedules nest at most {DEEPEST} deep")
        super().check()
        self.check_own()
        count = 0
        for index, part in enumerate(self.parts):
            try:
                count += part._count(depth + 1) if isinstance(part, Composed) else _leaf(part)
            except InvalidRecipe as error:
                raise InvalidRecipe(f"/parts/{index}{error.pointer}", error.reason) from None
            if count > MOST_PARTS:
                raise InvalidRecipe("/parts", f"there are at most {MOST_PARTS} in all, the parts of parts counted")
        return count + 1

    def check_own(self) -> None:
        """Raises InvalidRecipe for what is wrong beside the parts."""


def _leaf(part: Schedule) -> int:
    if part.width:
        raise InvalidRecipe("/kind", f"{part.kind} remembers its losses, and stands by itself alone")
    part.check()
    return 1


@dataclass(frozen=True)
class Sequence(Composed):
    """One schedule after the other: `boundaries` say after how many steps the next of `parts` begins.

    Each part counts from its own start, and the last one stays. There is one boundary fewer than there are parts.
    """

    kind: ClassVar[str] = "sequence"
    formula: ClassVar[str] = (
        r"x_t = \text{part}_i(t - b_i),\quad b_0 = 0,\quad i = \#\{b \in \text{boundaries}:\ b \le t-1\}"
    )
    source: ClassVar[str] = "optax.join_schedules, torch.optim.lr_scheduler.SequentialLR"
    url: ClassVar[str] = "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.SequentialLR.html"

    parts: Parts
    boundaries: Annotated[tuple[Steps, ...], Len(0, MOST_PARTS - 1)]

    def check_own(self) -> None:
        check_ascending("boundaries", self.boundaries)
        if len(self.boundaries) != len(self.parts) - 1:
            raise InvalidRecipe(
                "/boundaries",
                f"there must be one fewer than parts: {len(self.parts) - 1}, not {len(self.boundaries)}",
            )

    def at(self, t: int) -> float:
        i = bisect_right(self.boundaries, t - 1)
        return self.parts[i].at(t - self.boundaries[i - 1] if i else t)

    def reach(self, count: int) -> tuple[float, float]:
        starts = [0, *[boundary for boundary in self.boundaries if boundary < count]]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
        return _hull([part.reach(steps) for part, steps in zip(self.parts, lengths, strict=False)])

    def span(self) -> tuple[float, float]:
        last = self.parts[-1].span()
        return _hull([self.reach(self.boundaries[-1]), last]) if self.boundaries else last


@dataclass(frozen=True)
class Product(Composed):
    """Schedules multiplied: a warm-up from 0 to 1 times a decay, say. Where one of `parts` is 0, so is the product."""

    kind: ClassVar[str] = "product"
    formula: ClassVar[str] = r"x_t = \prod_i \text{part}_i(t)"
    source: ClassVar[str] = "torch.optim.lr_scheduler.ChainedScheduler"
    url: ClassVar[str] = "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.ChainedScheduler.html"
    notes: ClassVar[tuple[str, ...]] = ("The bounds of a product are those of its parts multiplied.",)

    parts: Parts

    def at(self, t: int) -> float:
        value = 1.0
        for part in self.parts:
            value = _times(value, part.at(t))
        return value

    def reach(self, count: int) -> tuple[float, float]:
        return _interval([part.reach(count) for part in self.parts])

    def span(self) -> tuple[float, float]:
        return _interval([part.span() for part in self.parts])


def _times(a: float, b: float) -> float:
    """a · b, in which 0 times infinity is 0: a factor may have grown, or vanished, beyond the floats."""
    value = a * b
    return 0.0 if math.isnan(value) else value


def _hull(spans: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in spans), max(high for _, high in spans)


def _interval(spans: list[tuple[float, float]]) -> tuple[float, float]:
    found = (1.0, 1.0)
    for span in spans:
        found = between(*[_times(a, b) for a, b in product(found, span)])
    return found
