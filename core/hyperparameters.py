"""Hyperparameters: fields of frozen dataclasses, with their bounds as annotations.

The fields are the one declaration: validation, JSON Schema and catalogue are read off them. A field of
type float of an `Adjustable` may hold a Schedule; `at(t)` puts its value at step t in its place, so that
whoever does the arithmetic only ever sees numbers.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeAlias

from annotated_types import Ge, Gt, Lt

from core.bounds import check_number, check_reach, numeric_fields
from core.errors import InvalidRecipe
from core.kind import Kind
from core.schedules import Schedule

Rate = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]

# Schedules that remember something: path of the field -> its value now.
Values: TypeAlias = Mapping[str, float]
NOTHING: Values = MappingProxyType({})


@dataclass(frozen=True)
class Adjustable(Kind):
    """Something with hyperparameters, each of which, if a float, may be a schedule.

    A field may also hold another Adjustable (what a wrapper wraps).
    """

    def __post_init__(self) -> None:
        check_bounds(self)
        self.check()

    def check(self) -> None:
        """Raises InvalidRecipe for options that exclude each other."""

    def at(self, t: int, values: Values = NOTHING, path: str = "") -> Self:
        """The same with the schedules' values at step t = 1, 2, … in their places; `values` go before."""
        found: dict[str, Any] = {}
        for name, held in vars(self).items():
            if isinstance(held, Schedule):
                found[name] = values[path + name] if path + name in values else held.at(t)
            elif isinstance(held, Adjustable):
                found[name] = held.at(t, values, f"{path}{name}.")
        if not found:
            return self
        # Not by `replace`: what was checked when the recipe was made must not be refused in the middle of a step.
        resolved = copy(self)
        vars(resolved).update(found)
        return resolved

    def schedules(self, path: str = "") -> Iterator[tuple[str, Schedule]]:
        """Every field that holds a schedule, as (path, schedule); the path of a wrapped one's is `base.lr`."""
        for name, held in vars(self).items():
            if isinstance(held, Schedule):
                yield path + name, held
            elif isinstance(held, Adjustable):
                yield from held.schedules(f"{path}{name}.")


def schedules_of(settings: object) -> dict[str, Schedule]:
    """The fields of a dataclass that hold schedules."""
    return {name: value for name, value in vars(settings).items() if isinstance(value, Schedule)}


def refuse_schedules(settings: object, *names: str) -> None:
    """Raises InvalidRecipe for a schedule in what is used before the first step alone."""
    for name in names:
        if isinstance(vars(settings)[name], Schedule):
            raise InvalidRecipe(f"/{name}", "it is used before the first step alone: no schedule")


def check_bounds(settings: Any) -> None:
    """Raises InvalidRecipe where a number, or what a schedule runs through, is out of its bounds."""
    for name, (base, bounds) in numeric_fields(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, Schedule) and isinstance(settings, Adjustable) and base is float:
            check_reach(_checked_span(name, value), bounds, f"/{name}")
        else:
            check_number(value, bounds, f"/{name}", whole=base is int)


def _checked_span(name: str, schedule: Schedule) -> tuple[float, float]:
    try:
        schedule.check()
    except InvalidRecipe as error:
        raise InvalidRecipe(f"/{name}{error.pointer}", error.reason) from None
    return schedule.span()
