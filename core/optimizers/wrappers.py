"""Methods around another method: they change where it looks, or where it has come to.

What is wrapped is a field, `base`. A group's hyperparameters are those of what is wrapped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from annotated_types import Ge, Le

from core.errors import InvalidRecipe
from core.hyperparameters import Count, NonNegative
from core.layout import Array
from core.optimizers.adam import AdamW
from core.optimizers.descent import Momentum
from core.optimizers.rule import Family, Optimizer, Own, State
from core.sums import length

ADAMW, MOMENTUM = AdamW(), Momentum()


@dataclass(frozen=True)
class Wrapper(Optimizer):
    """A method around `base`."""

    adds: ClassVar[tuple[str, ...]] = ()  # the slots that are its own
    refuses: ClassVar[Mapping[str, str]] = {}  # kind -> why it cannot be wrapped
    partial: ClassVar[bool] = True  # whether a step may leave tensors out
    holds_back: ClassVar[bool] = False  # whether it may want another gradient before `base` moves
    moves: ClassVar[bool] = False  # whether `after` does anything

    base: Optimizer

    def check(self) -> None:
        if not isinstance(self.base, Optimizer):
            raise InvalidRecipe("/base", "it must be an optimizer")
        wrappers, method = chain(self.base)
        for depth, inner in enumerate([*wrappers, method], 1):
            reason = self.refuses.get(inner.kind)
            if reason is None and inner.hands_out and self.hands_out:
                reason = "both would say where the next gradient is to be taken"
            if reason is not None:
                raise InvalidRecipe("/base" * depth + "/kind", f"{self.kind} cannot wrap {inner.kind}: {reason}")

    @property
    def family(self) -> Family:
        return self.base.family

    def rate(self, t: int) -> float:
        return self.base.rate(t)

    def changed(self, settings: Mapping[str, Any]) -> Self:
        return replace(self, base=self.base.changed(settings))

    @property
    def needs(self) -> frozenset[str]:
        return self.base.needs

    @property
    def slots(self) -> tuple[str, ...]:
        return *self.base.slots, *self.adds

    def own(self) -> dict[str, Own]:
        """What it adds to the state beside its slots; belongs to no tensor."""
        return {}

    def before(self, gradients: Sequence[Array], slots: Sequence[State], own: State) -> bool:
        """Looks at the gradients, flat, of all live tensors; False: `base` is not to move this time."""
        return True

    def after(self, t: int, u: Array, slots: State) -> None:
        """Changes the update of a tensor, or of some rows of it, in place, after `base` made it in its move t."""


@dataclass(frozen=True)
class Lookahead(Wrapper):
    """Slow weights that follow the fast ones: every few steps the fast ones return part of the way.

    `base` is the method that moves the fast weights, which the session's parameters are. After every `sync_period`
    steps of it, slow weights move by `slow_step` of the way to the fast ones, and the fast ones go on from there. The
    slow ones are the result: `at=final`.
    """

    kind: ClassVar[str] = "lookahead"
    formula: ClassVar[str] = (
        r"\theta \leftarrow \theta + u_{\text{base}};\qquad "
        r"\text{every } k \text{ steps: } \phi \leftarrow \phi + \alpha(\theta - \phi),\ \theta \leftarrow \phi"
    )
    source: ClassVar[str] = "Zhang, Lucas, Hinton & Ba 2019, Lookahead Optimizer: k steps forward, 1 step back"
    url: ClassVar[str] = "https://arxiv.org/abs/1907.08610"
    notes: ClassVar[tuple[str, ...]] = (
        "optax.lookahead has no defaults. pytorch_optimizer: sync_period 5.",
        "What is kept is the way from the fast weights back to the slow ones, not a copy of the slow ones: new "
        "parameters put into the session move both.",
    )
    refuses: ClassVar[Mapping[str, str]] = {
        "lookahead": "it is one already",
        "schedule_free": "it keeps two sequences of its own, and only one of them would return",
        "lbfgs": "its curvature comes from the way between two gradients",
        "bfgs": "its curvature comes from the way between two gradients",
        "asgd": "its average follows its own steps, and would miss the way back",
        "dog": "it measures how far it came by its own steps, and would miss the way back",
        "prodigy": "it measures how far it came by its own steps, and would miss the way back",
    }

    adds: ClassVar[tuple[str, ...]] = ("lag",)
    moves: ClassVar[bool] = True

    base: Optimizer = ADAMW
    sync_period: Count = 6
    slow_step: Annotated[float, Ge(0), Le(1)] = 0.5

    @property
    def has_final(self) -> bool:
        return True

    def final(self, t: int, p: Array, state: State) -> Array:
        slow: Array = p + state["lag"]
        return slow

    def after(self, t: int, u: Array, slots: State) -> None:
        lag = slots["lag"]
        lag -= u
        if t % self.sync_period == 0:
            u += (1.0 - self.slow_step) * lag
            lag[...] = 0.0


@dataclass(frozen=True)
class Sam(Wrapper):
    """Sharpness-aware minimization: the gradient that counts is taken where the loss is worst nearby.

    A step takes two gradients. The first, at the parameters, only moves `at=next` by `rho` along itself; the second
    is taken there, and `base` moves the parameters by it. `adaptive` scales the way by the parameters' sizes (ASAM).
    """

    kind: ClassVar[str] = "sam"
    formula: ClassVar[str] = (
        r"e = \rho\,\frac{g(\theta)}{\lVert g(\theta) \rVert},\quad "
        r"\theta \leftarrow \theta + u_{\text{base}}\big(g(\theta + e)\big)"
    )
    source: ClassVar[str] = "Foret, Kleiner, Mobahi & Neyshabur 2020, Sharpness-Aware Minimization"
    url: ClassVar[str] = "https://arxiv.org/abs/2010.01412"
    notes: ClassVar[tuple[str, ...]] = (
        "Every gradient is a step of the session; schedules and bias corrections count the moves of `base`.",
        "optax.contrib.sam: rho is called there by the learning rate of its adversarial optimizer.",
    )
    refuses: ClassVar[Mapping[str, str]] = {
        "sam": "it is one already",
        "lbfgs": "its line search compares losses at the parameters, not beside them",
        "bfgs": "its line search compares losses at the parameters, not beside them",
        "newton": "its Hessian would belong to another point than its gradient",
    }
    partial: ClassVar[bool] = False
    holds_back: ClassVar[bool] = True
    adds: ClassVar[tuple[str, ...]] = ("climb",)

    base: Optimizer = MOMENTUM
    rho: NonNegative = 0.05
    adaptive: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return self.base.needs | {"params"} if self.adaptive else self.base.needs

    @property
    def hands_out(self) -> bool:
        return True

    def own(self) -> dict[str, Own]:
        return {"climbing": Own((), exact=True, most=1.0, whole=True)}

    def before(self, gradients: Sequence[Array], slots: Sequence[State], own: State) -> bool:
        climbing = own["climbing"]
        if climbing:
            for state in slots:
                state["climb"][...] = 0.0
            climbing[...] = 0.0
            return True
        for g, state in zip(gradients, slots, strict=True):
            state["climb"][...] = g if not self.adaptive else g * np.abs(state["p"])
        size = length([state["climb"] for state in slots])
        for state in slots:
            climb = state["climb"]
            if not 0.0 < size < np.inf:
                climb[...] = 0.0
                continue
            # In float64, and not by rho / length, which may be too large for float32.
            np.divide(climb, size, out=climb, dtype=np.float64, casting="same_kind")
            climb *= self.rho * np.abs(state["p"]) if self.adaptive else self.rho
        climbing[...] = 1.0
        return False

    def point(self, t: int, p: Array, state: State) -> Array:
        there: Array = p + state["climb"] if state["climbing"] else p
        return there


def chain(optimizer: Optimizer) -> tuple[list[Wrapper], Optimizer]:
    """The wrappers of a method, outermost first, and what they wrap."""
    wrappers: list[Wrapper] = []
    while isinstance(optimizer, Wrapper):
        wrappers.append(optimizer)
        optimizer = optimizer.base
    return wrappers, optimizer
