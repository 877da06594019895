"""What an optimizer is: a frozen dataclass of hyperparameters, named slots, and a pure rule.

The fields with their bounds are the one declaration: validation, JSON Schema and catalogue are read off
them. A field of type float may hold a Schedule; `at(t)` puts its value at step t in its place, so
that a rule only ever sees numbers.

An element-wise method (`ElementWise`) is written as on paper, for one element:

    u, *slots = update(g, [p,] *slots, *coefficients)

`update` uses its arguments alone: no literal numbers, no other functions than NumPy's. A literal
would be float64 in the compiled loop and weakly typed in NumPy, and the two would not agree in the last bit.
Options that only move a constant (where epsilon goes, whether the rate is in the velocity) are therefore
coefficients that are 0 or 1, which leave the bits as they are, and not branches.

A method that needs matrices (`Dense`) works in float64 on the whole vector of live parameters.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Self, TypeAlias, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from core.errors import InvalidRecipe
from core.kind import Kind
from core.layout import Array
from core.schedules import Schedule

Rate = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
NonNegative = Annotated[float, Ge(0)]

Formula: TypeAlias = Callable[..., Any]

KINDS: dict[str, type["Optimizer"]] = {}


@dataclass(frozen=True)
class Optimizer(Kind, registry=KINDS):
    """The common part of every kind; see the module's docstring."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self.check()

    def check(self) -> None:
        """Raises InvalidRecipe for options that exclude each other."""

    def at(self, t: int) -> Self:
        """This optimizer with the schedules' values at step t = 1, 2, … in their places."""
        values = {name: schedule.at(t) for name, schedule in schedules_of(self).items()}
        if not values:
            return self
        # Not by `replace`: what was checked when the recipe was made must not be refused in the middle of a step.
        resolved = copy(self)
        vars(resolved).update(values)
        return resolved

    def rate(self, t: int) -> float:
        """The learning rate of step t, schedules resolved."""
        return float(vars(self)["lr"])

    @property
    def needs(self) -> frozenset[str]:
        """What must be there for a step: "params", "hessian", "loss"."""
        return frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays with one element per parameter."""
        return ()

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the n × n arrays over all parameters."""
        return ()

    @property
    def dense(self) -> bool:
        """Whether this form works on matrices over all parameters (see Dense)."""
        return False

    def initial(self, slot: str) -> float:
        """What `slot` is filled with before the first step."""
        return 0.0


@dataclass(frozen=True)
class ElementWise(Optimizer):
    """A method in which each parameter's update depends on that parameter's own history alone."""

    lazy_rows: ClassVar[bool] = False  # a row-sparse gradient touches its rows alone

    @property
    def update(self) -> Formula:
        """(g, [p,] *slots, *coefficients) -> (u, *slots), for one element."""
        raise NotImplementedError

    def coefficients(self, t: int) -> tuple[float, ...]:
        """The float64 scalars of step t, computed once a step. Schedules are resolved already."""
        raise NotImplementedError

    @property
    def ahead(self) -> Formula | None:
        """(p, *slots, *coefficients) -> where the next gradient is to be taken; None: at p."""
        return None


@dataclass(frozen=True)
class Dense(Optimizer):
    """A method that works on matrices over all n parameters; n is at most `LIMIT`."""

    LIMIT: ClassVar[int] = 4096

    @property
    def dense(self) -> bool:
        return True

    def step(self, g: Array, matrices: Mapping[str, Array], hessian: Array | None, lr: Array) -> Array:
        """The update of the live parameters, float64 (n,); `matrices` (n, n) are changed in place."""
        raise NotImplementedError


def schedules_of(settings: object) -> dict[str, Schedule]:
    """The fields of a dataclass that hold schedules."""
    return {name: value for name, value in vars(settings).items() if isinstance(value, Schedule)}


def numeric_fields(cls: type) -> dict[str, tuple[Any, ...]]:
    """Field name -> its bounds, for each field of type float or int."""
    found = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint = hints[field.name]
        base, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if base in (float, int):
            found[field.name] = tuple(bounds)
    return found


def check_bounds(settings: Any) -> None:
    """Raises InvalidRecipe where a number, or what a schedule runs through, is out of its bounds."""
    for name, bounds in numeric_fields(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, Schedule) and isinstance(settings, Optimizer):
            ends = _checked_span(name, value)
        elif not _is_finite_number(value):
            raise InvalidRecipe(f"/{name}", "it must be a finite number")
        else:
            ends = (value, value)
        for bound in bounds:
            for end in ends:
                complaint = _violates(end, bound)
                if complaint:
                    raise InvalidRecipe(f"/{name}", f"{complaint}, but it reaches {end:g}")


def _checked_span(name: str, schedule: Schedule) -> tuple[float, float]:
    try:
        check_bounds(schedule)
    except InvalidRecipe as error:
        raise InvalidRecipe(f"/{name}{error.pointer}", error.reason) from None
    return schedule.span()


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _violates(value: float, bound: object) -> str | None:
    match bound:
        case Ge(ge=low) if not value >= low:  # type: ignore[operator]
            return f"it must be at least {low}"
        case Gt(gt=low) if not value > low:  # type: ignore[operator]
            return f"it must be greater than {low}"
        case Le(le=high) if not value <= high:  # type: ignore[operator]
            return f"it must be at most {high}"
        case Lt(lt=high) if not value < high:  # type: ignore[operator]
            return f"it must be less than {high}"
    return None
