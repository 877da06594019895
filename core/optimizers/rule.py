"""What an optimizer is: a frozen dataclass of hyperparameters, named state, and a pure rule.

There are three families, by what a rule must see at once:

    ElementWise   one parameter: sgd, adam, lion. Written as on paper, for one element:
                      u, *slots = update(g, [p,] *slots, *coefficients)
                  `update` uses its arguments alone: no literal numbers, no other functions than NumPy's square root,
                  absolute value, sign, minimum and maximum. A literal would be float64 in the compiled loop and
                  weakly typed in NumPy, and the two would not agree in the last bit; neither would they in a power or
                  a logarithm, nor in the sign of -0.0, and `where` costs the compiled loop its vector code. Options
                  that only move a constant (where epsilon goes, whether the rate is in the velocity) are therefore
                  coefficients that are 0 or 1, which leave the bits as they are. How many coefficients there are must
                  not depend on a number's value, which a schedule may take through 0.
    TensorWise    one tensor in its shape: norms, factors, preconditioners.
    Whole         all live parameters as one vector: curvature, line searches, distances.

The update u is what is added to the parameters. State is named: *slots* have an element per parameter, whatever has
another shape is the method's *own* (a mean per row, a matrix, a counter).

A method that wants its next gradient somewhere else than at the parameters (Nesterov's look-ahead, a line search's
trial point) says where by `point`, and nothing more: `at=next` hands that out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

import numpy as np

from core.evaluate import Formula
from core.hyperparameters import Adjustable
from core.layout import Array

Scalars: TypeAlias = dict[str, float]
State: TypeAlias = Mapping[str, Array]
Family: TypeAlias = Literal["elements", "tensors", "whole"]

KINDS: dict[str, type["Optimizer"]] = {}


class Own(NamedTuple):
    """An array of the state that has not one element per parameter. At first it is filled with `fill`."""

    shape: tuple[int, ...]
    fill: float = 0.0
    exact: bool = False  # float64, whatever the session's dtype
    square: bool = False  # (n, n) over all parameters, at first `fill` times the identity
    # What a checkpoint may bring: a rule divides by these numbers, takes roots of them, counts by them.
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False  # whole numbers from 0 on

    def holds(self, array: Array) -> bool:
        """Whether these are values that the array can have."""
        if self.whole:
            return bool(np.all((array >= 0) & (array <= min(self.most, 2.0**53)) & (array == np.floor(array))))
        if self.least == -math.inf and self.most == math.inf:
            return True
        return bool(np.all((array >= self.least) & (array <= self.most)))


class Beside(NamedTuple):
    """What a Whole step gets beside the gradient."""

    lr: Array  # (n,), or () where all parameters have one rate; float64
    loss: float | None = None
    hessian: Array | None = None  # (n, n), float64


@dataclass(frozen=True)
class Optimizer(Adjustable, registry=KINDS):
    """The common part of every kind; see the module's docstring."""

    @property
    def family(self) -> Family:
        """Which of the three it is; some kinds have a form in more than one."""
        raise NotImplementedError

    def rate(self, t: int) -> float:
        """The learning rate of step t, schedules resolved."""
        return float(vars(self)["lr"])

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """The same with other hyperparameters. Raises InvalidRecipe, and TypeError for one that there is not."""
        return replace(self, **settings)

    @property
    def meaning(self) -> Mapping[str, object]:
        """The options by which the numbers of the state are to be read; a running session cannot change them."""
        return {}

    @property
    def needs(self) -> frozenset[str]:
        """What must be there for a step: "params", "loss", "hessian", "hessian_diagonal"."""
        return frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays with one element per parameter."""
        return ()

    def initial(self, slot: str) -> float:
        """What `slot` is filled with before the first step."""
        return 0.0

    def due(self, t: int) -> bool:
        """Whether step t must bring the diagonal of the Hessian."""
        return False

    @property
    def hands_out(self) -> bool:
        """Whether the next gradient is to be taken somewhere else than at the parameters."""
        return False

    def point(self, t: int, p: Array, state: State) -> Array:
        """Where gradient number t is to be taken; p and the slots in `state` are flat, of the same stretch."""
        return p

    @property
    def held_only(self) -> bool:
        """Whether the session must hold the parameters, since nobody else can know the next point."""
        return self.hands_out

    @property
    def has_final(self) -> bool:
        """Whether the result to use is something else than the parameters."""
        return False

    def final(self, t: int, p: Array, state: State) -> Array:
        """The result after t steps; as `point`."""
        return p


@dataclass(frozen=True)
class ElementWise(Optimizer):
    """A method in which each parameter's update depends on that parameter's own history alone."""

    lazy_rows: ClassVar[bool] = False  # a row-sparse gradient touches its rows alone
    compact: ClassVar[bool] = True  # the slots may be kept in bfloat16: they are means, not positions or counts

    @property
    def family(self) -> Family:
        return "elements"

    counts: ClassVar[tuple[str, ...]] = ()  # those of the scalars that are whole numbers

    @property
    def update(self) -> Formula:
        """(g, [p,] *slots, *coefficients) -> (u, *slots), for one element; p where `needs` has "params"."""
        raise NotImplementedError

    def coefficients(self, t: int) -> tuple[float, ...]:
        """The float64 scalars of step t, computed once a step. Schedules are resolved already."""
        raise NotImplementedError

    @property
    def scalars(self) -> Mapping[str, float]:
        """Numbers from 0 on that a tensor's state has beside its slots (a running product), with their first values."""
        return {}

    def tracked(self, t: int, scalars: Scalars) -> tuple[float, ...]:
        """The coefficients of a method that keeps `scalars`, which it brings from step t - 1 to step t here."""
        return self.coefficients(t)

    @property
    def masked(self) -> bool:
        """Whether the update keeps still where it points along the gradient (the option `cautious`).

        The last coefficient of such a method that needs the parameters is its decoupled decay, which is not masked.
        """
        return False

    def observe(self, t: int, diagonal: Array, state: State) -> None:
        """Takes the diagonal of the Hessian, flat, into the slots; for methods that need it."""


@dataclass(frozen=True)
class TensorWise(Optimizer):
    """A method that sees one tensor at a time, whole: its norm, its rows and columns."""

    @property
    def family(self) -> Family:
        return "tensors"

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        """The state of a tensor of this shape, all of it: such a method has no slots of the flat kind."""
        return {}

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        """The update, in the shape and dtype of g; `state` are the arrays of `own`, changed in place.

        `p` is there where `needs` has "params". g and p must not be written to.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(Optimizer):
    """A method that sees all live parameters at once."""

    limit: ClassVar[int | None] = None  # of parameters, where there are matrices over them
    partial: ClassVar[bool] = True  # whether a step may leave tensors out

    @property
    def family(self) -> Family:
        return "whole"

    def own(self, n: int) -> dict[str, Own]:
        """What the session's state has beside the slots; n is the number of all parameters."""
        return {}

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array | None:
        """The update of the live parameters (n,); None: not yet, another gradient is wanted first.

        g, p and the slots in `state` are (n,), in the session's dtype; slots and own arrays are changed in place.
        g and p must not be written to.
        """
        raise NotImplementedError


def epsilons(eps: float, inside: bool) -> tuple[float, float]:
    """(under the root, beside the root): one of them is 0, and adding 0 changes no bit."""
    return (eps, 0.0) if inside else (0.0, eps)


def shrinkage(method: Any) -> float:
    """What decoupled decay takes of the parameters at a step: λ, times the rate where `decay_scaling` says so."""
    return float(method.weight_decay * (method.lr if method.decay_scaling == "lr" else 1.0))


def quotient(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is: what no gradient has moved, or one whose square is too small for the dtype, stays."""
    return np.divide(a, b, out=np.zeros(np.shape(a), np.result_type(a, b)), where=b != 0)


__all__ = [
    "KINDS",
    "Beside",
    "ElementWise",
    "Family",
    "Formula",
    "Optimizer",
    "Own",
    "Scalars",
    "State",
    "TensorWise",
    "Whole",
    "epsilons",
    "quotient",
    "shrinkage",
]
