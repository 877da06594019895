"""A pydantic model for every kind of optimizer, schedule, reducer and so on, made from the core's own declarations.

The core declares each hyperparameter once: a dataclass field with its bounds. Validation, JSON Schema and the
core cannot drift apart, because the first two are read off the third. Models are strict (`true` and `"1"` are no
numbers, 1 is one), finite, and refuse unknown members. Where an optimizer has a float, a schedule may stand; a
schedule may have schedules as parts. A tuple of the core is a list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, ForwardRef, Literal, Union, get_args, get_origin, get_type_hints

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

from core import averaging, optimizers, schedules, transforms
from core.aggregation import aggregation, reducers, staleness
from core.errors import InvalidRecipe
from core.recipe import describe, member_of
from service.faults import NUMBER, SCHEDULE


class Strict(BaseModel):
    """No unknown members, no conversions, no NaN, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Kinds:
    """Annotates a field as "an object with a `kind`, one of `models`"; or, `by_name`, the kind's name alone."""

    def __init__(self, name: str, models: Mapping[str, type[BaseModel]], *, by_name: bool) -> None:
        union = reduce(or_, models.values())
        self.union = TypeAliasType(name, Annotated[union, Field(discriminator="kind")])
        for model in models.values():  # those that have others of their family as parts
            model.model_rebuild(_types_namespace={name: self.union})
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
        schedule = Annotated[Any, ANY_SCHEDULE, Tag(SCHEDULE)]
        return Annotated[reduce(or_, (number, schedule)), Discriminator(_number_or_schedule)]
    if hint is optimizers.Optimizer:  # what a wrapper wraps
        return Annotated[ForwardRef("Optimizer"), BeforeValidator(by_name)]
    return _member(hint, _hyperparameter)


def _plain(hint: Any) -> Any:
    """The type of any other field, which is no schedule unless it is made of them."""
    return ForwardRef("Schedule") if hint is schedules.Schedule else _member(hint, _plain)


def _member(hint: Any, alternative: Callable[[Any], Any]) -> Any:
    """`bool | Literal["a"]` as one Literal, so that a wrong value is one fault and not one per alternative."""
    base, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(base) is tuple:
        listed: Any = list[_plain(get_args(base)[0])]  # type: ignore[misc]
        return Annotated[listed, *bounds]
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
    members: dict[str, Any] = {"kind": (Literal[cls.kind], ...)} if hasattr(cls, "kind") else {}
    for field in fields(cls):
        members[member_of(field.name)] = (member(hints[field.name]), _default(field.default))
    made: type[BaseModel] = create_model(f"{cls.__name__}{suffix}", __base__=Strict, __doc__=cls.__doc__, **members)
    return made


def _default(value: Any) -> Any:
    if value is MISSING:
        return ...
    if isinstance(value, optimizers.Optimizer | reducers.Reducer):
        return Field(default=value, json_schema_extra={"default": describe(value)})
    return value


@cache
def overrides(kinds: tuple[str, ...]) -> type[BaseModel]:
    """The hyperparameters of all these kinds, each of which may be left out (and is then not set)."""
    members: dict[str, Any] = {}
    for cls in [optimizers.KINDS[kind] for kind in kinds]:
        hints = get_type_hints(cls, include_extras=True)
        named = [field.name for field in fields(cls) if hints[field.name] is not optimizers.Optimizer]
        members |= {name: (_hyperparameter(hints[name]), None) for name in named}
    name = "".join(optimizers.KINDS[kind].__name__ for kind in kinds)
    made: type[BaseModel] = create_model(f"{name}Overrides", __base__=Strict, **members)
    return made


SCHEDULES = _models(schedules.KINDS, "Schedule", _plain)
ANY_SCHEDULE = Kinds("Schedule", SCHEDULES, by_name=False)
OPTIMIZERS = _models(optimizers.KINDS, "Optimizer", _hyperparameter)
AVERAGINGS = _models(averaging.KINDS, "Averaging", _plain)
ANY_OPTIMIZER = Kinds("Optimizer", OPTIMIZERS, by_name=True)
TRANSFORMS = _models(transforms.KINDS, "Transform", _hyperparameter)
ANY_TRANSFORM = Kinds("Transform", TRANSFORMS, by_name=True)
REDUCERS = _models(reducers.KINDS, "Reducer", _plain)
ANY_REDUCER = Kinds("Reducer", REDUCERS, by_name=True)
STALENESS = _models(staleness.STALENESS, "Staleness", _plain)
ANY_STALENESS = Kinds("Staleness", STALENESS, by_name=True)


class OfModel:
    """Annotates a field as an object of `model`, which is made while the program runs, so no type checker knows it."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.model)


def _shared(hint: Any) -> Any:
    """The type of a member of `aggregation`."""
    if hint is reducers.Reducer:
        return Annotated[Any, ANY_REDUCER]
    if hint is staleness.Staleness:
        return Annotated[Any, ANY_STALENESS]
    if hint is aggregation.DelayCompensation:
        return Annotated[Any, OfModel(DELAY_COMPENSATION)]
    return _member(hint, _shared)


DELAY_COMPENSATION = _model(aggregation.DelayCompensation, "", _plain)
AGGREGATION = _model(aggregation.Aggregation, "", _shared)

_CLASSES: dict[type[BaseModel], Any] = {
    DELAY_COMPENSATION: aggregation.DelayCompensation,
    AGGREGATION: aggregation.Aggregation,
} | {
    model: kinds[kind]
    for models, kinds in (
        (SCHEDULES, schedules.KINDS),
        (OPTIMIZERS, optimizers.KINDS),
        (AVERAGINGS, averaging.KINDS),
        (TRANSFORMS, transforms.KINDS),
        (REDUCERS, reducers.KINDS),
        (STALENESS, staleness.STALENESS),
    )
    for kind, model in models.items()
}


def core_object(value: Any) -> Any:
    """A validated model as the core's object, a list as a tuple; anything else as it is. Raises InvalidRecipe.

    But -0.0 as 0.0: they are equal, and so the former would pass for the default that the latter is (`brief_of`).
    """
    if isinstance(value, list):
        return tuple(map(core_object, value))
    if type(value) is float:
        return value + 0.0
    cls = _CLASSES.get(type(value))
    if cls is None:
        return value
    made = {}
    for field in fields(cls):
        try:
            made[field.name] = core_object(getattr(value, member_of(field.name)))
        except InvalidRecipe as error:  # of a method that is wrapped
            error.pointer = f"/{field.name}{error.pointer}"
            raise
    return cls(**made)


class _PlainNames(GenerateJsonSchema):
    """Without a title for each field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the signature is pydantic's
        return False


@cache
def _definitions() -> dict[str, Any]:
    """The JSON Schemas of all kinds and of their parts by name: made at once, having most parts in common."""
    families: list[Mapping[str, type[BaseModel]]] = [OPTIMIZERS, SCHEDULES, AVERAGINGS, TRANSFORMS, REDUCERS, STALENESS]
    return _schemas([model for family in families for model in family.values()], "#/$defs/{model}")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what the `model` of a kind takes, with its parts under `$defs`."""
    definitions = _definitions()
    parts: dict[str, Any] = {}
    ahead = list(_references(definitions[model.__name__]))
    while ahead:
        name = ahead.pop()
        if name not in parts:
            parts[name] = definitions[name]
            ahead += _references(definitions[name])
    own = definitions[model.__name__]
    return {**own, "$defs": dict(sorted(parts.items()))} if parts else dict(own)


def _references(schema: object) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name == "$ref":
                yield value.removeprefix("#/$defs/")
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def components(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The JSON Schemas of `models` and of all their parts by name, as `#/components/schemas/` of OpenAPI."""
    return _schemas(models, "#/components/schemas/{model}")


def _schemas(models: Sequence[type[BaseModel]], reference: str) -> dict[str, Any]:
    inputs = [(model, "validation") for model in models]
    _, made = models_json_schema(inputs, ref_template=reference, schema_generator=_PlainNames)  # type: ignore[arg-type]
    return dict(made["$defs"])
