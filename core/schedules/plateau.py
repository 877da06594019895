"""The one schedule with a state: lower where the loss has stopped falling."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from core.layout import Array
from core.schedules.schedule import Schedule, StepsOrNone


@dataclass(frozen=True)
class Plateau(Schedule):
    """Times `factor` when the loss has not improved for more than `patience` steps, but never below `minimum`.

    A loss has improved if it is below the best so far by the share `threshold` of it (`threshold_mode` "rel") or by
    `threshold` itself ("abs"); with `mode` "max" greater is better. For `cooldown` steps after a reduction none is
    counted as bad. A reduction by `eps` or less is left out. Every step must bring a
    loss; it counts where it is one at the parameters, and not where `sam` or a line search only looked.
    """

    kind: ClassVar[str] = "plateau"
    formula: ClassVar[str] = (
        r"x \leftarrow \max(\text{factor}\cdot x, \text{minimum})\quad\text{once more than patience losses in a row"
        r" are not}\ < \text{best}\,(1 - \text{threshold})"
    )
    source: ClassVar[str] = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    url: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.ReduceLROnPlateau.html"
    )
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults; minimum is min_lr. Made for one loss per epoch: where every step has one, patience "
        "counts steps.",
        'With threshold_mode "rel" a negative best is not lowered but raised by the threshold: take "abs" there.',
    )
    width: ClassVar[int] = 4  # the value, the best loss, bad steps in a row, steps of cooldown left

    init: float
    factor: Annotated[float, Ge(0), Lt(1)] = 0.1
    patience: StepsOrNone = 10
    threshold: Annotated[float, Ge(0)] = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    mode: Literal["min", "max"] = "min"
    cooldown: StepsOrNone = 0
    minimum: float = 0.0
    eps: Annotated[float, Ge(0)] = 1e-8

    def at(self, t: int) -> float:  # noqa: ARG002 - what it is while nothing has been observed
        return self.init

    def span(self) -> tuple[float, float]:
        return min(self.init, max(self.minimum, 0.0)), self.init

    def start(self) -> tuple[float, ...]:
        """What it remembers before the first loss."""
        return self.init, math.inf if self.mode == "min" else -math.inf, 0.0, 0.0

    def value(self, memory: Array) -> float:
        """The value now; `memory` is (4,), float64."""
        return float(memory[0])

    def observe(self, memory: Array, loss: float) -> None:
        """Takes the loss of one step into `memory`, in place: it counts from the next step on."""
        value, best, bad, wait = memory.tolist()
        if self._improves(loss, best):
            best, bad = loss, 0.0
        else:
            bad += 1.0
        if wait > 0.0:
            wait, bad = wait - 1.0, 0.0
        if bad > self.patience:
            lower = max(value * self.factor, self.minimum)
            value = lower if value - lower > self.eps else value
            wait, bad = float(self.cooldown), 0.0
        memory[:] = value, best, bad, wait

    def _improves(self, loss: float, best: float) -> bool:
        sign = 1.0 if self.mode == "min" else -1.0
        margin = sign * self.threshold
        bar = best * (1.0 - margin) if self.threshold_mode == "rel" else best - margin
        return sign * loss < sign * bar
