"""What there is to choose from: every kind with its JSON Schema, formula, needs and slots, read off the core.

Which slots a kind keeps can depend on its options (`centered`, `momentum`, `matrix`). `slots` are those of the
defaults; `slots_at_most` and the like are found by trying the options in all combinations.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from inspect import cleandoc
from itertools import chain, islice, product
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import numpy as np

from core import optimizers, schedules
from core.errors import InvalidRecipe
from core.optimizers import Dense, ElementWise, Optimizer
from service.kinds import OPTIMIZERS, SCHEDULES, json_schema

BYTES: Final = {name: np.dtype(name).itemsize for name in ("float32", "float64")}
MOST_FORMS: Final = 4096


@cache
def optimizer_entries() -> tuple[dict[str, Any], ...]:
    return tuple(_optimizer(kind, cls) for kind, cls in optimizers.KINDS.items())


@cache
def schedule_entries() -> tuple[dict[str, Any], ...]:
    return tuple(_entry(kind, cls, json_schema(SCHEDULES[kind])) for kind, cls in schedules.KINDS.items())


def _none_yet() -> tuple[dict[str, Any], ...]:
    return ()


# What GET /v1/<family> lists.
FAMILIES: Final[dict[str, Callable[[], tuple[dict[str, Any], ...]]]] = {
    "optimizers": optimizer_entries,
    "schedules": schedule_entries,
    "transforms": _none_yet,
    "reducers": _none_yet,
}


def listing(family: str) -> dict[str, Any]:
    """All kinds of a family of `FAMILIES`, in the form of every list."""
    return {"data": list(FAMILIES[family]()), "has_more": False}


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
    }


def _optimizer(kind: str, cls: type[Optimizer]) -> dict[str, Any]:
    forms = list(_forms(cls))
    usual = forms[0]
    most = max(forms, key=lambda form: len(form.slots))
    return _entry(kind, cls, json_schema(OPTIMIZERS[kind])) | {
        "notes": list(cls.notes),
        "needs": sorted(usual.needs),
        "may_need": sorted(set(chain.from_iterable(form.needs for form in forms))),
        "slots": list(usual.slots),
        "slots_at_most": list(most.slots),
        "matrices": list(usual.matrices),
        "matrices_at_most": list(max(forms, key=lambda form: len(form.matrices)).matrices),
        "bytes_per_parameter": {dtype: size * len(usual.slots) for dtype, size in BYTES.items()},
        "bytes_per_parameter_at_most": {dtype: size * len(most.slots) for dtype, size in BYTES.items()},
        "max_parameters": Dense.LIMIT if usual.dense else None,
        "row_sparse": issubclass(cls, ElementWise) and cls.lazy_rows,
    }


def _forms(cls: Any) -> Iterator[Optimizer]:
    """The optimizer under every combination of its options that it allows, the defaults first."""
    hints = get_type_hints(cls)
    choices = {field.name: _choices(hints[field.name], field.default) for field in fields(cls)}
    for values in islice(product(*choices.values()), MOST_FORMS):
        try:
            yield cls(**dict(zip(choices, values, strict=True)))
        except InvalidRecipe:
            continue


def _choices(hint: Any, default: Any) -> list[Any]:
    """The values of an option that can change which slots there are; a number may do so by being 0 or not."""
    parts = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    found: list[Any] = [default]
    for part in parts or (hint,):
        if part is bool:
            found += [False, True]
        elif get_origin(part) is Literal:
            found += get_args(part)
        elif part is float and default == 0:
            found.append(0.5)
    return [value for index, value in enumerate(found) if value not in found[:index]]
