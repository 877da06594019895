"""What there is to choose from: every kind with its JSON Schema, formula, needs and slots, read off the core.

Which slots a kind keeps can depend on its options (`centered`, `momentum`, `matrix`). `slots` are those of the
defaults; `slots_at_most` and the like are found by trying the options in all combinations. What depends on a tensor's
shape is told for a matrix of 1024 × 768.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from functools import cache
from inspect import cleandoc
from itertools import chain as joined
from itertools import islice, product
from math import prod
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import numpy as np

from core import optimizers, schedules, transforms
from core.aggregation import reducers, staleness
from core.aggregation.reducers import Reducer
from core.errors import InvalidRecipe
from core.optimizers import ElementWise, Optimizer, TensorWise, Whole
from core.optimizers.rule import Own
from core.optimizers.wrappers import Wrapper, chain
from service.kinds import OPTIMIZERS, REDUCERS, SCHEDULES, STALENESS, TRANSFORMS, json_schema

BYTES: Final = {name: np.dtype(name).itemsize for name in ("float32", "float64")}
MATRIX: Final = (1024, 768)
MOST_FORMS: Final = 4096
ENDLESS: Final = 2**53 - 1  # a bound from there on is one only because numbers end somewhere


@cache
def optimizer_entries() -> tuple[dict[str, Any], ...]:
    return tuple(_optimizer(kind, cls) for kind, cls in optimizers.KINDS.items())


@cache
def schedule_entries() -> tuple[dict[str, Any], ...]:
    return tuple(_entry(kind, cls, json_schema(SCHEDULES[kind])) for kind, cls in schedules.KINDS.items())


@cache
def transform_entries() -> tuple[dict[str, Any], ...]:
    return tuple(_transform(kind, cls) for kind, cls in transforms.KINDS.items())


@cache
def reducer_entries() -> tuple[dict[str, Any], ...]:
    return tuple(_reducer(kind, cls) for kind, cls in reducers.KINDS.items())


@cache
def staleness_entries() -> tuple[dict[str, Any], ...]:
    """Not a family of its own: they stand beside the reducers."""
    return tuple(_entry(kind, cls, json_schema(STALENESS[kind])) for kind, cls in staleness.STALENESS.items())


# What GET /v1/<family> lists.
FAMILIES: Final[dict[str, Callable[[], tuple[dict[str, Any], ...]]]] = {
    "optimizers": optimizer_entries,
    "schedules": schedule_entries,
    "transforms": transform_entries,
    "reducers": reducer_entries,
}


def listing(family: str, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
    """The kinds of a family of `FAMILIES`, in the form of every list; all of them if no `limit` is given.

    Raises LookupError for an `after` that is none of them.
    """
    entries = list(FAMILIES[family]())
    if after is not None:
        kinds = [entry["kind"] for entry in entries]
        if after not in kinds:
            raise LookupError(after)
        entries = entries[kinds.index(after) + 1 :]
    page = entries[:limit]
    return {"data": page, "has_more": len(page) < len(entries)}


def entry_of(family: str, kind: str) -> dict[str, Any]:
    """One kind of a family. Raises LookupError."""
    return {entry["kind"]: entry for entry in FAMILIES[family]()}[kind]


def _entry(kind: str, cls: Any, schema: dict[str, Any]) -> dict[str, Any]:
    text = cleandoc(cls.__doc__ or "")
    return {
        "kind": kind,
        "summary": text.partition("\n")[0],
        "description": text,
        "formula": cls.formula,
        "source": cls.source,
        "url": cls.url,
        "schema": schema,
        "notes": list(cls.notes),
    }


def _optimizer(kind: str, cls: type[Optimizer]) -> dict[str, Any]:
    forms = list(_forms(cls))
    usual = forms[0]
    most = max(forms, key=lambda form: sum(_bytes(form, "float32")))
    state, other = _state(usual)
    method = chain(usual)[1]
    return _entry(kind, cls, json_schema(OPTIMIZERS[kind])) | {
        "family": usual.family,
        "wraps": [other for other in optimizers.KINDS if _can_wrap(cls, other)],
        "needs": sorted(usual.needs),
        "may_need": sorted(set(joined.from_iterable(form.needs for form in forms))),
        "slots": list(state),
        "slots_at_most": list(_state(most)[0]),
        "own": list(other),
        "matrices": [name for name, spec in _own(usual).items() if spec.square],
        "own_at_most": sorted(set(joined.from_iterable(_state(form)[1] for form in forms))),
        "bytes_per_parameter": {dtype: _per_parameter(usual, dtype) for dtype in BYTES},
        "bytes_per_parameter_at_most": {dtype: _per_parameter(most, dtype) for dtype in BYTES},
        "max_parameters": _limit(usual),
        "row_sparse": issubclass(cls, ElementWise) and cls.lazy_rows,
        "bfloat16": isinstance(method, ElementWise) and method.compact and bool(method.slots),
        "hands_out_points": usual.hands_out,
        "holds_params": usual.held_only,
    }


def _transform(kind: str, cls: Any) -> dict[str, Any]:
    made = list(_forms(cls))
    usual = made[0]
    return _entry(kind, cls, json_schema(TRANSFORMS[kind])) | {
        "needs": sorted(usual.needs),
        "may_need": sorted(set(joined.from_iterable(form.needs for form in made))),
        "slots": list(usual.slots),
        "own": list(usual.own()),
        "bytes_per_parameter": {dtype: size * len(usual.slots) for dtype, size in BYTES.items()},
        "row_sparse": usual.keeps_rows,
    }


def _reducer(kind: str, cls: type[Reducer]) -> dict[str, Any]:
    return _entry(kind, cls, json_schema(REDUCERS[kind])) | {
        # Contributions that an open round holds: each the size of a gradient.
        "keeps": "one" if cls.running else "all",
        "least": cls().least,
        "weighted": cls.weighted,
    }


def _limit(form: Optimizer) -> int | None:
    """The greatest number of parameters; where there are matrices over them."""
    method = chain(form)[1]
    return method.limit if isinstance(method, Whole) and method.family == "whole" else None


def _own(form: Optimizer) -> dict[str, Own]:
    """All arrays of another kind than slots, for a matrix."""
    wrappers, method = chain(form)
    found: dict[str, Own] = {}
    for wrapper in wrappers:
        found |= wrapper.own()
    if isinstance(method, TensorWise):
        found |= method.own(MATRIX)
    elif isinstance(method, Whole) and method.family == "whole":
        found |= method.own(_limit(method) or MATRIX[0] * MATRIX[1])
    elif isinstance(method, ElementWise):
        found |= {name: Own((), fill, True) for name, fill in method.scalars.items()}
    return found


def _state(form: Optimizer) -> tuple[list[str], list[str]]:
    """The names of what has an element per parameter, and of what has not."""
    own = _own(form)
    each = [name for name, spec in own.items() if spec.shape == MATRIX and isinstance(chain(form)[1], TensorWise)]
    return [*form.slots, *each], [name for name in own if name not in each]


def _bytes(form: Optimizer, dtype: str) -> tuple[float, float]:
    """Per parameter: of the slots, and of the other arrays, which matter only where they grow with the tensor."""
    size = BYTES[dtype]
    own = [spec for spec in _own(form).values() if not spec.square]
    return float(size * len(form.slots)), sum(prod(s.shape) * (8 if s.exact else size) for s in own) / prod(MATRIX)


def _per_parameter(form: Optimizer, dtype: str) -> float:
    found = round(sum(_bytes(form, dtype)), 2)
    return int(found) if found == int(found) else found


def _can_wrap(cls: type[Optimizer], other: str) -> bool:
    wraps = getattr(cls, "wraps", None)
    if wraps is not None:
        return other in wraps
    if not issubclass(cls, Wrapper):
        return False
    try:
        cls(base=optimizers.KINDS[other]())
    except InvalidRecipe:
        return False
    return True


# What is tried where a kind has no default.
REQUIRED: Final = {
    "max_norm": 1.0,
    "max_value": 1.0,
    "steps": 2,
    "eta": 0.1,
    "decay": 0.9,
    "weight_decay": 0.01,
    "l1": 0.01,
}


def _forms(cls: Any) -> Iterator[Any]:
    """The kind under every combination of its options that it allows, the defaults first."""
    hints = get_type_hints(cls)
    choices = {field.name: _choices(hints[field.name], _usual(field)) for field in fields(cls)}
    for values in islice(product(*choices.values()), MOST_FORMS):
        try:
            yield cls(**dict(zip(choices, values, strict=True)))
        except InvalidRecipe:
            continue


def _usual(field: Field[Any]) -> Any:
    if field.default is not MISSING and field.default is not None:
        return field.default
    return REQUIRED.get(field.name, None if field.default is None else MISSING)


def _choices(hint: Any, default: Any) -> list[Any]:
    """The values of an option that can change which slots there are; a number may do so by being 0 or not."""
    parts = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    found: list[Any] = [] if default is MISSING else [default]
    for part in parts or (hint,):
        if part is bool:
            found += [False, True]
        elif get_origin(part) is Literal:
            found += get_args(part)
        elif part is float and default == 0:
            found.append(0.5)
        elif part is int and default == 1:
            found.append(2)
    return [value for index, value in enumerate(found) if value not in found[:index]]
