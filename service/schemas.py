"""The control plane's JSON <-> the core's own objects.

    parse_create    body of POST /v1/sessions        -> Document, params
    patch           body of PATCH /v1/sessions/{id}  -> Document -> Document
    recipe_of       Recipe.describe()                -> Recipe
    document_of     Document.describe()              -> Document

All of them raise InvalidRequest, whose faults point into what was given (RFC 6901). What a hyperparameter may be is
not said here: see kinds.py.

A group's hyperparameters are those of the session's optimizer, all optional, so they are read once its kind is known.
Tensors are left alone by pydantic, which would look at every number by itself; wire.json converts them.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from typing_extensions import TypeAliasType

from core.aggregation.aggregation import Aggregation
from core.errors import InvalidRecipe
from core.layout import MAX_DIMENSIONS, MAX_SIZE, Array, Layout
from core.optimizers import KINDS, Optimizer
from core.optimizers.wrappers import Wrapper
from core.recipe import Group, Recipe, describe
from core.transforms import Transform
from service import privacy
from service.documents import Document
from service.errors import Fault, InvalidRequest
from service.faults import faults_of
from service.kinds import (
    AGGREGATION,
    ANY_OPTIMIZER,
    ANY_TRANSFORM,
    AVERAGINGS,
    Kinds,
    OfModel,
    Strict,
    by_name,
    core_object,
    overrides,
)
from service.wire.errors import InvalidValue
from service.wire.json import MAX_INTEGER, pointer, tensor

MAX_LABELS = 32
MAX_TRANSFORMS = 32
MAX_GROUPS = 256  # each is matched against the name of each tensor, on the event loop

Model = TypeVar("Model", bound=BaseModel)

# -- the members of a session ------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be made of printable characters")
    return text


def _label_key(text: str) -> str:
    if ":" in text:
        raise ValueError("a label's key has no ':', which parts it from the value in ?label=team:vision")
    return text


def _possible(shape: list[int]) -> list[int]:
    if math.prod(extent or 1 for extent in shape) > MAX_SIZE:  # NumPy refuses it even where an extent of 0 empties it
        raise ValueError(f"its extents other than 0 multiply to more than {MAX_SIZE}")
    return shape


Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_printable)]
LabelKey = Annotated[
    str, StringConstraints(min_length=1, max_length=63), AfterValidator(_printable), AfterValidator(_label_key)
]
LabelValue = Annotated[str, StringConstraints(max_length=63), AfterValidator(_printable)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=MAX_LABELS)]
Extent = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Shape = Annotated[list[Extent], Field(max_length=MAX_DIMENSIONS), AfterValidator(_possible)]
Dtype = Literal["float32", "float64"]
StateDtype = Annotated[
    Literal["bfloat16"],
    Field(description="What the moments are kept in, rounded at random; null: in the session's dtype."),
]
Seed = Annotated[int, Field(ge=0, le=MAX_INTEGER, description="Of that rounding; drawn if left out.")]
NonFinitePolicy = Literal["reject", "skip"]
NamedOptimizer = Annotated[Any, ANY_OPTIMIZER]
NamedTransform = Annotated[Any, ANY_TRANSFORM]
Transforms = Annotated[list[NamedTransform], Field(max_length=MAX_TRANSFORMS)]
NamedAggregation = Annotated[Any, OfModel(AGGREGATION)]
NamedAveraging = Annotated[Any, Kinds("Averaging", AVERAGINGS, by_name=True)]
Count = Annotated[int, Field(ge=0)]
Moment = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]


Tensor = TypeAliasType(
    "Tensor",
    Annotated[
        Any,
        WithJsonSchema(
            {
                "type": ["number", "array"],
                "description": "A number, or rectangular nested lists of numbers.",
                "examples": [0.5, [[1.0, 2.0], [3.0, 4.0]]],
            }
        ),
    ],
)


class HyperparameterGroup(Strict):
    """Hyperparameters of their own for the tensors whose name matches a glob; the last group that matches decides.

    Beside `match` and `frozen`, any hyperparameter of the session's optimizer may stand here.
    """

    model_config = ConfigDict(extra="allow")

    match: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    frozen: bool = False


class _Settings(Strict):
    optimizer: NamedOptimizer
    dtype: Dtype = "float32"
    groups: list[HyperparameterGroup] = Field(default=[], max_length=MAX_GROUPS)
    averaging: NamedAveraging | None = None
    non_finite: NonFinitePolicy = "reject"
    transforms: Transforms = Field(default=[])
    state_dtype: StateDtype | None = None
    state_seed: Seed | None = None
    aggregation: NamedAggregation = Field(
        default=AGGREGATION(reduce="mean"), json_schema_extra={"default": {"mode": "async"}}
    )


class NewSession(_Settings):
    """Give exactly one of `params` (the server holds the parameters) and `shapes` (the client does)."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["params"]}, {"required": ["shapes"]}]})

    params: dict[str, Tensor] = Field(default_factory=dict)
    shapes: dict[str, Shape] = Field(default_factory=dict)
    name: Name | None = None
    labels: Labels = Field(default={})


class RecipeDocument(_Settings):
    """What `Recipe.describe` gives."""

    shapes: dict[str, Shape]


class SessionDocument(RecipeDocument):
    """What `Document.describe` gives."""

    name: Name | None
    labels: Labels
    created_at: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")]


class Privacy(Strict):
    """What the noise of a session's steps is worth: (ε, δ)-differential privacy, by Rényi accounting."""

    epsilon: Annotated[float | None, Field(description="Spent so far; null: no finite one is known.")]
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: Count


class Session(SessionDocument):
    """A session: what was asked for, every default filled in, and where it stands."""

    id: Annotated[str, StringConstraints(pattern="^ses_[a-z0-9]{20,}$")]
    step: Annotated[int, Field(ge=0, description="The number of gradients taken so far.")]
    size: Annotated[int, Field(ge=0, description="The number of parameters.")]
    state_bytes: Annotated[int, Field(ge=0, description="Bytes of all slots, and of the parameters if they are held.")]
    round_bytes: Annotated[
        int, Field(ge=0, description="Bytes that an open round, or the workers' backups, may take beside them.")
    ]
    holds_params: Annotated[bool, Field(description="Whether the server holds the parameters.")]
    skipped: Annotated[int, Field(ge=0, description="Gradients that were not finite, and not applied.")]
    updated_at: str
    privacy: Annotated[Privacy | None, Field(description="It is there where steps have noise.")] = None


class Pending(Strict):
    """A contribution that was taken into a round, which is open yet."""

    round: Annotated[int, Field(ge=1, description="The step that the round will give.")]
    received: Annotated[int, Field(ge=1, description="Which contribution of the round it is.")]
    needed: Annotated[int, Field(ge=1, description="How many close the round.")]


class Worker(Strict):
    """A worker that has named itself, by all that it has sent to the session."""

    worker: str
    contributions: Count
    last_seen: Moment
    last_step: Annotated[int, Field(ge=0, description="The step, or round, that its last contribution went into.")]
    staleness: Annotated[int, Field(ge=0, description="How many steps old that was.")]
    weight: Annotated[float, Field(description="How much that counted.")]
    clock: Annotated[int, Field(ge=0, description="By which mode `ssp` compares workers.")]
    gone: Annotated[bool, Field(description="Not heard of for `worker_timeout`: nobody waits for it.")]


class Round(Strict):
    """The open round of a session of the mode `sync` or `buffered`."""

    round: Annotated[int, Field(ge=1, description="The step that it will give.")]
    step: Annotated[int, Field(ge=0, description="Where the session stands.")]
    received: Count
    needed: Annotated[int, Field(ge=1, description="How many contributions close it.")]
    quorum: Annotated[int, Field(ge=1, description="The fewest that may close it, once it is over.")]
    contributed: Annotated[list[str], Field(description="Who has contributed, in this order.")]
    anonymous: Annotated[int, Field(ge=0, description="Contributions that named nobody, or one that is named already.")]
    awaited: Annotated[list[str], Field(description="Workers that are not gone and have not contributed to it.")]
    opened_at: Annotated[Moment | None, Field(description="When its first contribution came; null before.")]
    deadline: Annotated[Moment | None, Field(description="When `quorum` are enough; null: never, or nobody has come.")]


class SessionPatch(Strict):
    """What is given changes, the rest stays, the moments too. `name: null` clears the name; `labels`, `groups` and
    `transforms` replace what was there as a whole. Of `optimizer` only the hyperparameters given change; its kind may
    be left out and cannot change."""

    name: Name | None = None
    labels: Labels = Field(default={})
    optimizer: dict[str, Any] = Field(default={})
    groups: list[HyperparameterGroup] = Field(default=[], max_length=MAX_GROUPS)
    transforms: Transforms = Field(default=[])


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_create(body: object) -> tuple[Document, dict[str, Array] | None]:
    """A new session, and its parameters as float64 arrays where the body brings them. Raises InvalidRequest."""
    given = _object(body)
    faults = []
    if ("params" in given) == ("shapes" in given):
        faults.append(Fault("", "exactly one of `params` and `shapes` is required"))
    parsed = _validated(NewSession, given, faults)
    if "params" not in given:
        return _document(parsed, _recipe(parsed, parsed.shapes)), None
    arrays = _tensors(parsed.params)
    shapes = {name: array.shape for name, array in arrays.items()}
    return _document(parsed, _recipe(parsed, shapes, "params")), arrays


def recipe_of(described: Mapping[str, Any]) -> Recipe:
    """The inverse of Recipe.describe(). Raises InvalidRequest."""
    parsed = _validated(RecipeDocument, _object(described))
    return _recipe(parsed, parsed.shapes)


def document_of(described: Mapping[str, Any]) -> Document:
    """The inverse of Document.describe(). Raises InvalidRequest."""
    parsed = _validated(SessionDocument, _object(described))
    return _document(parsed, _recipe(parsed, parsed.shapes), created_at=parsed.created_at)


def brief_of(document: Document) -> dict[str, Any]:
    """As much of Document.describe() as `document_of` needs: without the members that have their defaults."""
    return SessionDocument.model_validate(document.describe()).model_dump(mode="json", exclude_defaults=True)


def patch(body: object) -> Callable[[Document], Document]:
    """The change that a PATCH asks for; it, too, raises InvalidRequest, for what depends on the session's optimizer."""
    given = _object(body)
    fixed = {**NewSession.model_fields, **Session.model_fields}.keys() - SessionPatch.model_fields.keys()
    faults = [Fault(pointer("", name), "this member of a session cannot change") for name in given if name in fixed]
    if isinstance(given.get("optimizer"), str):
        given = {**given, "optimizer": {"kind": given["optimizer"]}}
    parsed = _validated(SessionPatch, {name: value for name, value in given.items() if name not in fixed}, faults)

    def change(document: Document) -> Document:
        return _patched(document, parsed)

    return change


def _patched(document: Document, parsed: SessionPatch) -> Document:
    old, given = document.recipe, parsed.model_fields_set
    faults: list[Fault] = []
    try:
        optimizer = _changed(old.optimizer, parsed.optimizer, "/optimizer", faults)
        groups = _groups(optimizer, parsed.groups, faults) if "groups" in given else old.groups
        _refuse(faults)
        transforms = _transforms(parsed.transforms) if "transforms" in given else old.transforms
        recipe = replace(old, optimizer=optimizer, groups=groups, transforms=transforms)
    except InvalidRecipe as error:
        raise _rooted(error) from None
    document = replace(document, recipe=recipe)
    if "name" in given:
        document = replace(document, name=parsed.name)
    return replace(document, labels=parsed.labels) if "labels" in given else document


def _changed(old: Optimizer, given: Mapping[str, Any], at: str, faults: list[Fault]) -> Optimizer:
    """`old` with the hyperparameters given, and what it wraps with those given for that. Raises InvalidRecipe."""
    rest = dict(given)
    if rest.pop("kind", old.kind) != old.kind:
        faults.append(Fault(at + "/kind", f"the kind of a session's optimizer cannot change: it is {old.kind}"))
    base, wrapped = getattr(old, "base", None), by_name(rest.pop("base", {}))
    changes: dict[str, Any] = {}
    if base is None and "base" in given:
        faults.append(Fault(at + "/base", f"{old.kind} wraps nothing"))
    elif not isinstance(wrapped, Mapping):
        faults.append(Fault(at + "/base", "must be an object"))
    elif base is not None:
        changes["base"] = _changed(base, wrapped, at + "/base", faults)
    for name in sorted(rest.keys() & vars(base).keys() - vars(old).keys()) if base is not None else ():
        faults.append(Fault(f"{at}/{name}", f"this is of what {old.kind} wraps: give it under `base`"))
        del rest[name]
    changes |= _override((old.kind,), rest, at, faults)
    try:
        return replace(old, **changes)
    except InvalidRecipe as error:
        error.pointer = at + error.pointer
        raise


def _object(body: object) -> dict[str, Any]:
    if not isinstance(body, Mapping):
        raise InvalidRequest([Fault("", "the body must be a JSON object")])
    return dict(body)


def _validated(model: type[Model], given: dict[str, Any], faults: Iterable[Fault] = ()) -> Model:
    """`given` as `model`. Raises InvalidRequest with `faults` and all that is found beside them."""
    found = list(faults)
    seen = {fault.pointer for fault in found}
    parsed = None
    try:
        parsed = model.model_validate(given)
    except ValidationError as error:
        found += [fault for fault in faults_of(error, given, model) if fault.pointer not in seen]
    kinds = _adjustable(given.get("optimizer"))
    if kinds and model is not SessionPatch:
        _check_groups(kinds, given.get("groups"), found)
    _refuse(found)
    assert parsed is not None
    return parsed


def _adjustable(optimizer: object) -> tuple[str, ...]:
    """The kinds whose hyperparameters a group may set: what the wrappers wrap. Empty if it cannot be told.

    Each is named once and none follows one that has no base, whatever was sent: a model is made for each answer, and
    kept, so there must be few of them.
    """
    kinds: dict[str, None] = {}
    while isinstance(described := by_name(optimizer), Mapping):
        kind = described.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            return ()
        if not issubclass(KINDS[kind], Wrapper):
            kinds[kind] = None
        usual = {field.name: field.default for field in fields(KINDS[kind])}
        if "base" not in usual:
            break
        optimizer = described.get("base", describe(usual["base"]))
    return tuple(kinds)


def _check_groups(kinds: tuple[str, ...], groups: object, faults: list[Fault]) -> None:
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        if isinstance(group, Mapping):
            own = {name: value for name, value in group.items() if name not in HyperparameterGroup.model_fields}
            _override(kinds, own, f"/groups/{index}", faults)


def _override(kinds: tuple[str, ...], given: dict[str, Any], at: str, faults: list[Fault]) -> dict[str, Any]:
    """Hyperparameters of `kinds` as the core has them; what is wrong goes to `faults`."""
    model = overrides(kinds)
    try:
        parsed = model.model_validate(given)
    except ValidationError as error:
        faults += faults_of(error, given, model, at)
        return {}
    return {name: core_object(getattr(parsed, name)) for name in given}


def _groups(optimizer: Optimizer, groups: list[HyperparameterGroup], faults: list[Fault]) -> tuple[Group, ...]:
    kinds = _adjustable(describe(optimizer))
    return tuple(
        Group(group.match, _override(kinds, dict(group.model_extra or {}), f"/groups/{index}", faults), group.frozen)
        for index, group in enumerate(groups)
    )


def _transforms(given: Sequence[Any]) -> tuple[Transform, ...]:
    """Raises InvalidRecipe."""
    return tuple(_at(f"/transforms/{index}", transform) for index, transform in enumerate(given))


def _at(pointer: str, model: Any) -> Any:
    try:
        return core_object(model)
    except InvalidRecipe as error:
        raise InvalidRecipe(pointer + error.pointer, error.reason) from None


def _recipe(parsed: _Settings, shapes: Mapping[str, Any], where: str = "shapes") -> Recipe:
    seed = parsed.state_seed
    if parsed.state_dtype is not None and seed is None:
        seed = secrets.randbelow(MAX_INTEGER)
    if parsed.state_dtype is None and seed is not None:
        raise InvalidRequest([Fault("/state_seed", "it is the seed of the rounding of a `state_dtype`: there is none")])
    try:
        optimizer = _at("/optimizer", parsed.optimizer)
        return Recipe(
            optimizer,
            Layout(shapes),
            parsed.dtype,
            _groups(optimizer, parsed.groups, []),
            _at("/averaging", parsed.averaging),
            parsed.non_finite,
            _transforms(parsed.transforms),
            parsed.state_dtype,
            seed,
            _aggregation(parsed.aggregation),
        )
    except InvalidRecipe as error:
        error.pointer = error.pointer.replace("/shapes", f"/{where}", 1)
        raise _rooted(error) from None


def _aggregation(parsed: Any) -> Aggregation:
    """Raises InvalidRecipe, InvalidRequest."""
    if parsed.noise_multiplier is not None:
        if not privacy.available():
            raise InvalidRequest([Fault("/aggregation/noise_multiplier", "this service has no privacy accounting")])
        if parsed.seed is None:
            parsed = parsed.model_copy(update={"seed": secrets.randbelow(MAX_INTEGER)})
    made: Aggregation = _at("/aggregation", parsed)
    return made


def _document(parsed: "NewSession | SessionDocument", recipe: Recipe, **more: str) -> Document:
    return Document(recipe, parsed.name, parsed.labels, **more)


def _tensors(params: dict[str, Any]) -> dict[str, Array]:
    try:
        return {name: tensor(value, pointer("/params", name)) for name, value in params.items()}
    except InvalidValue as error:
        raise InvalidRequest([Fault(error.pointer, error.message)]) from None


def _rooted(error: InvalidRecipe) -> InvalidRequest:
    return InvalidRequest([Fault(error.pointer, error.reason)])


def _refuse(faults: list[Fault]) -> None:
    if faults:
        raise InvalidRequest(faults)
