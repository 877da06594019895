"""Bounds on the fields of a dataclass, as annotations: Annotated[float, Ge(0), Lt(1)], and Len(1, 64) on a tuple.

What is checked: numbers are finite, an int is one, tuples have a length that is allowed, and so have all their items.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt

from core.errors import InvalidRecipe

Hint = tuple[Any, tuple[Any, ...]]  # the type itself, its bounds


def numeric_fields(cls: Any) -> dict[str, Hint]:
    """Field name -> float or int, and its bounds; the other fields are left out."""
    return {name: (base, bounds) for name, (base, bounds) in _hints(cls).items() if base in (float, int)}


def check_fields(settings: Any) -> None:
    """Raises InvalidRecipe where a number, or a number in a tuple, is out of its bounds, with a pointer to it."""
    cls: Any = type(settings)
    for name, (base, bounds) in _hints(cls).items():
        _check(getattr(settings, name), base, bounds, f"/{name}")


def check_number(value: object, bounds: Sequence[Any], pointer: str, *, whole: bool = False) -> None:
    """Raises InvalidRecipe at `pointer` unless `value` is a finite number (`whole`: an integer) within `bounds`."""
    if not _is_finite_number(value):
        raise InvalidRecipe(pointer, "it must be a finite number")
    if whole and not isinstance(value, int):
        raise InvalidRecipe(pointer, "it must be an integer")
    check_reach((value,), bounds, pointer)  # type: ignore[arg-type]


def check_reach(values: Sequence[float], bounds: Sequence[Any], pointer: str) -> None:
    """Raises InvalidRecipe at `pointer` where one of `values` is out of `bounds`."""
    for bound in bounds:
        for value in values:
            complaint = _violates(value, bound)
            if complaint:
                raise InvalidRecipe(pointer, f"{complaint}, but it reaches {value:g}")


@cache
def _hints(cls: Any) -> dict[str, Hint]:
    found = get_type_hints(cls, include_extras=True)
    return {field.name: _taken_apart(found[field.name]) for field in fields(cls)}


def _taken_apart(hint: Any) -> Hint:
    base, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return base, tuple(bounds)


def _check(value: object, base: Any, bounds: tuple[Any, ...], pointer: str) -> None:
    if base in (float, int):
        check_number(value, bounds, pointer, whole=base is int)
    elif get_origin(base) is tuple:
        _check_tuple(value, base, bounds, pointer)
    elif get_origin(base) in (Union, UnionType):
        others = [part for part in get_args(base) if part is not NoneType]
        if value is not None and len(others) == 1:
            _check(value, *_taken_apart(others[0]), pointer)
    elif isinstance(base, type) and not isinstance(value, base):
        raise InvalidRecipe(pointer, f"it must be of the kind {base.__name__.lower()}")


def _check_tuple(value: object, base: Any, bounds: tuple[Any, ...], pointer: str) -> None:
    if not isinstance(value, tuple):
        raise InvalidRecipe(pointer, "it must be a tuple")
    for complaint in _lengths(len(value), bounds):
        raise InvalidRecipe(pointer, complaint)
    inner, inner_bounds = _taken_apart(get_args(base)[0])
    for index, item in enumerate(value):
        _check(item, inner, inner_bounds, f"{pointer}/{index}")


def _lengths(count: int, bounds: tuple[Any, ...]) -> Iterator[str]:
    for bound in bounds:
        if isinstance(bound, Len) and count < bound.min_length:
            yield f"it must have at least {bound.min_length} items, not {count}"
        elif isinstance(bound, Len) and bound.max_length is not None and count > bound.max_length:
            yield f"it must have at most {bound.max_length} items, not {count}"


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
