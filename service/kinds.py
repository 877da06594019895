"""A pydantic model for every kind of optimizer, schedule and averaging, made from the core's own declarations.

The core declares each hyperparameter once: a dataclass field with its bounds. Validation, JSON Schema and the
core cannot drift apart, because the first two are read off the third. Models are strict (`true` and `"1"` are no
numbers, 1 is one), finite, and refuse unknown members. Where an optimizer has a float, a schedule may stand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    create_model,
)
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypeAliasType

from core import averaging, optimizers, schedules
from service.faults import NUMBER, SCHEDULE


class Strict(BaseModel):
    """No unknown members, no conversions, no NaN, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Kinds:
    """Annotates a field as "an object with a `kind`, one of `models`"; or, `by_name`, the kind's name alone."""

    def __init__(self, name: str, models: Mapping[str, type[BaseModel]], *, by_name: bool) -> None:
        union = reduce(or_, models.values())
        self.union = TypeAliasType(name, Annotated[union, Field(discriminator="kind")])
        self.names = list(models)
        self.by_name = by_name

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler.generate_schema(self.union)
        return core_schema.no_info_before_validator_function(by_name, schema) if self.by_name else schema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        settings = handler(schema)
        return {"anyOf": [{"type": "string", "enum": self.names}, settings]} if self.by_name else settings


def by_name(value: object) -> object:
    """A kind's name alone stands for that kind with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


def _is_union(hint: object) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _hyperparameter(hint: Any) -> Any:
    """The type of an optimizer's field as a client may give it: where a float may stand, so may a schedule."""
    if hint is float or (get_origin(hint) is Annotated and get_args(hint)[0] is float):
        number = Annotated[hint, Tag(NUMBER)]
        schedule = Annotated[Any, Kinds("Schedule", SCHEDULES, by_name=False), Tag(SCHEDULE)]
        return Annotated[reduce(or_, (number, schedule)), Discriminator(_number_or_schedule)]
    return _member(hint, _hyperparameter)


def _plain(hint: Any) -> Any:
    return _member(hint, _plain)


def _member(hint: Any, alternative: Callable[[Any], Any]) -> Any:
    """`bool | Literal["a"]` as one Literal, so that a wrong value is one fault and not one per alternative."""
    if _is_union(hint):
        parts = [part for part in get_args(hint) if part is not type(None)]
        if all(part is bool or get_origin(part) is Literal for part in parts):
            values = [(True, False) if part is bool else get_args(part) for part in parts]
            literal: Any = Literal.__getitem__(tuple(value for group in values for value in group))
            hint = Annotated[literal, BeforeValidator(_no_number)]
        else:
            hint = reduce(or_, map(alternative, parts))
        return hint | None if len(parts) < len(get_args(hint)) else hint
    return hint


def _no_number(value: object) -> object:
    """A Literal only compares, and 1 == True."""
    return value if isinstance(value, bool | str) else ()


def _number_or_schedule(value: object) -> str:
    return SCHEDULE if isinstance(value, Mapping | BaseModel) else NUMBER


def _models(kinds: Mapping[str, type], suffix: str, member: Callable[[Any], Any]) -> dict[str, type[BaseModel]]:
    return {kind: _model(cls, suffix, member) for kind, cls in kinds.items()}


def _model(cls: Any, suffix: str, member: Callable[[Any], Any]) -> type[BaseModel]:
    hints = get_type_hints(cls, include_extras=True)
    members: dict[str, Any] = {"kind": (Literal[cls.kind], ...)}
    for field in fields(cls):
        members[field.name] = (member(hints[field.name]), ... if field.default is MISSING else field.default)
    made: type[BaseModel] = create_model(f"{cls.__name__}{suffix}", __base__=Strict, __doc__=cls.__doc__, **members)
    return made


def _overrides(cls: Any) -> type[BaseModel]:
    """The same members without `kind`, each of which may be left out (and is then not set)."""
    hints = get_type_hints(cls, include_extras=True)
    members: dict[str, Any] = {field.name: (_hyperparameter(hints[field.name]), None) for field in fields(cls)}
    made: type[BaseModel] = create_model(f"{cls.__name__}Overrides", __base__=Strict, **members)
    return made


SCHEDULES = _models(schedules.KINDS, "Schedule", _plain)
OPTIMIZERS = _models(optimizers.KINDS, "Optimizer", _hyperparameter)
AVERAGINGS = _models(averaging.KINDS, "Averaging", _plain)
OVERRIDES = {kind: _overrides(cls) for kind, cls in optimizers.KINDS.items()}

_CLASSES: dict[type[BaseModel], Any] = {
    model: kinds[kind]
    for models, kinds in (
        (SCHEDULES, schedules.KINDS),
        (OPTIMIZERS, optimizers.KINDS),
        (AVERAGINGS, averaging.KINDS),
    )
    for kind, model in models.items()
}


def core_object(value: Any) -> Any:
    """A validated model as the core's object; anything else as it is. Raises InvalidRecipe."""
    cls = _CLASSES.get(type(value))
    if cls is None:
        return value
    return cls(**{field.name: core_object(getattr(value, field.name)) for field in fields(cls)})


class _PlainNames(GenerateJsonSchema):
    """Without a title for each field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the signature is pydantic's
        return False


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what `model` takes, with its parts under `$defs`."""
    return model.model_json_schema(schema_generator=_PlainNames)


def components(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The JSON Schemas of `models` and of all their parts by name, as `#/components/schemas/` of OpenAPI."""
    inputs = [(model, "validation") for model in models]
    _, made = models_json_schema(
        inputs,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
        schema_generator=_PlainNames,
    )
    return dict(made["$defs"])
