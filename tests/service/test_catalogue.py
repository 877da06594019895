"""The catalogue says of each kind what its class does."""

from math import prod
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from core import optimizers, schedules, transforms
from core.aggregation import reducers, staleness
from core.errors import InvalidRecipe
from core.layout import Layout
from core.optimizers import Optimizer
from core.recipe import Recipe, describe
from service import catalogue
from service.kinds import ANY_REDUCER, ANY_STALENESS, OPTIMIZERS, REDUCERS, STALENESS, core_object
from service.wire.json import dumps, loads

FAMILIES = {
    "optimizers": optimizers.KINDS,
    "schedules": schedules.KINDS,
    "transforms": transforms.KINDS,
    "reducers": reducers.KINDS,
}
TEXTS = ("summary", "description", "formula", "source", "url")


@pytest.mark.parametrize(("family", "kinds"), FAMILIES.items())
def test_every_kind_is_listed_and_is_plain_json(family: str, kinds: dict[str, Any]) -> None:
    listed = catalogue.listing(family)
    assert [entry["kind"] for entry in listed["data"]] == list(kinds)
    assert listed["has_more"] is False
    assert loads(dumps(listed)) == listed
    for entry in listed["data"]:
        assert all(entry[name] for name in TEXTS)
        assert entry["notes"] == list(kinds[entry["kind"]].notes)
        assert entry["schema"]["properties"]["kind"]["const"] == entry["kind"]
        assert entry["schema"]["additionalProperties"] is False
        assert catalogue.entry_of(family, entry["kind"]) == entry


def recipe_of(optimizer: Optimizer, shape: tuple[int, int], **members: Any) -> Recipe:
    return Recipe(optimizer, Layout({"w": shape}), **members)


@pytest.mark.parametrize("kind", sorted(optimizers.KINDS))
def test_the_entry_agrees_with_the_optimizer(kind: str) -> None:
    entry, usual = catalogue.entry_of("optimizers", kind), optimizers.KINDS[kind]()
    shape = catalogue.MATRIX if entry["max_parameters"] is None else (64, entry["max_parameters"] // 64)
    recipe = recipe_of(usual, shape)
    own = {name.rpartition(":")[2]: spec for name, spec in recipe.own.items()}
    assert set(entry["slots"]) | set(entry["own"]) == set(recipe.slots) | set(own)
    assert set(entry["slots"]) == {*recipe.slots, *[n for n, spec in own.items() if is_slot(usual, spec, shape)]}
    for dtype in ("float32", "float64"):
        whole = recipe_of(usual, shape, dtype=dtype)
        square = sum(prod(spec.shape) * whole.own_dtype(spec).itemsize for spec in own.values() if spec.square)
        weight = (whole.state_bytes() - square) / prod(shape)
        assert entry["bytes_per_parameter"][dtype] == pytest.approx(weight, abs=0.1)
    assert set(entry["needs"]) == recipe.needs
    assert set(entry["may_need"]) >= recipe.needs
    assert (entry["family"], entry["holds_params"]) == (recipe.method.family, recipe.held_only)
    assert entry["hands_out_points"] == usual.hands_out
    defaults = {name: member.get("default") for name, member in entry["schema"]["properties"].items()}
    assert defaults | {"kind": kind} == describe(usual)
    if entry["max_parameters"] is not None:
        with pytest.raises(InvalidRecipe):
            recipe_of(usual, (64, entry["max_parameters"] // 64 + 1))


def is_slot(usual: Optimizer, spec: Any, shape: tuple[int, int]) -> bool:
    """An array of a tensor's own shape, which has an element for each of its parameters."""
    return usual.family == "tensors" and spec.shape == shape


@pytest.mark.parametrize("kind", sorted(optimizers.KINDS))
def test_what_can_be_wrapped_and_kept_in_bfloat16(kind: str) -> None:
    entry, cls = catalogue.entry_of("optimizers", kind), optimizers.KINDS[kind]
    wrapped = []
    for other, inner in optimizers.KINDS.items():
        try:
            cls(base=inner())  # type: ignore[call-arg]
        except (InvalidRecipe, TypeError):
            continue
        wrapped.append(other)
    assert entry["wraps"] == wrapped
    try:
        recipe_of(cls(), (2, 2), state_dtype="bfloat16", state_seed=1)
    except InvalidRecipe:
        assert not entry["bfloat16"]
    else:
        assert entry["bfloat16"]


@pytest.mark.parametrize("kind", sorted(transforms.KINDS))
def test_the_entry_agrees_with_the_transform(kind: str) -> None:
    entry, cls = catalogue.entry_of("transforms", kind), transforms.KINDS[kind]
    given = {name: value for name, value in catalogue.REQUIRED.items() if name in entry["schema"]["required"]}
    given |= {"onto": "simplex"} if kind == "project" else {"max_value": 1.0} if kind == "clip" else {}
    usual = cls(**given)
    assert (entry["slots"], entry["own"], set(entry["needs"])) == (list(usual.slots), list(usual.own()), usual.needs)
    assert entry["bytes_per_parameter"] == {"float32": 4 * len(usual.slots), "float64": 8 * len(usual.slots)}
    assert entry["row_sparse"] == usual.keeps_rows
    shown = {name: member.get("default") for name, member in entry["schema"]["properties"].items()}
    assert shown | {"kind": kind} | given == describe(usual)


@pytest.mark.parametrize("kind", sorted(reducers.KINDS))
def test_the_entry_agrees_with_the_reducer(kind: str) -> None:
    entry, usual = catalogue.entry_of("reducers", kind), reducers.KINDS[kind]()
    assert entry["keeps"] == ("one" if usual.running else "all")
    assert (entry["least"], entry["weighted"]) == (usual.least, usual.weighted)
    assert_defaults(entry, usual)


def test_staleness_is_told_like_the_rest() -> None:
    entries = catalogue.staleness_entries()
    assert [entry["kind"] for entry in entries] == list(staleness.STALENESS)
    for entry in entries:
        assert all(entry[name] for name in TEXTS)
        assert_defaults(entry, staleness.STALENESS[entry["kind"]]())


def assert_defaults(entry: dict[str, Any], usual: Any) -> None:
    shown = {name: member.get("default") for name, member in entry["schema"]["properties"].items()}
    assert shown | {"kind": usual.kind} == describe(usual)


@pytest.mark.parametrize(("family", "models"), [(reducers.KINDS, REDUCERS), (staleness.STALENESS, STALENESS)])
def test_the_models_make_the_kinds(family: dict[str, Any], models: dict[str, Any]) -> None:
    assert list(models) == list(family)
    for kind, model in models.items():
        assert core_object(model(kind=kind)) == family[kind]()


def test_a_reducer_by_its_name_or_with_options() -> None:
    reducer = TypeAdapter(Annotated[Any, ANY_REDUCER])
    assert core_object(reducer.validate_python("krum")) == reducers.Krum(1)
    multi = reducer.validate_python({"kind": "multi_krum", "byzantine": 2, "select": 3})
    assert core_object(multi) == reducers.MultiKrum(2, 3)
    age = TypeAdapter(Annotated[Any, ANY_STALENESS])
    assert core_object(age.validate_python("inverse")) == staleness.Inverse()
    assert core_object(age.validate_python({"kind": "hinge", "b": 2})) == staleness.Hinge(b=2.0)
    for wrong in (
        "mode",
        {"kind": "krum", "byzantine": -1},
        {"kind": "krum", "f": 1},
        {"kind": "median", "byzantine": 1},
        {"kind": "trimmed_mean", "fraction": 0.5},
        {"kind": "bulyan", "byzantine": True},
    ):
        with pytest.raises(ValidationError):
            reducer.validate_python(wrong)


def test_what_depends_on_options_is_found() -> None:
    rmsprop = catalogue.entry_of("optimizers", "rmsprop")
    assert (rmsprop["slots"], rmsprop["slots_at_most"]) == (["s"], ["s", "mean", "v"])
    assert rmsprop["bytes_per_parameter_at_most"] == {"float32": 12, "float64": 24}
    adagrad = catalogue.entry_of("optimizers", "adagrad")
    assert (adagrad["own"], adagrad["own_at_most"], adagrad["max_parameters"]) == ([], ["G"], None)
    lbfgs = catalogue.entry_of("optimizers", "lbfgs")
    assert (lbfgs["needs"], lbfgs["may_need"]) == ([], ["loss"])
    adam = catalogue.entry_of("optimizers", "adam")
    assert (len(adam["slots"]), adam["bytes_per_parameter_at_most"]) == (2, {"float32": 12, "float64": 24})


def test_what_is_said_of_a_factored_state() -> None:
    """Two vectors for a matrix: next to nothing for each of its elements."""
    adafactor = catalogue.entry_of("optimizers", "adafactor")
    assert (adafactor["slots"], adafactor["own"]) == ([], ["row", "col"])
    assert adafactor["bytes_per_parameter"] == {"float32": 0.01, "float64": 0.02}


def test_the_schema_has_the_bounds_of_the_declaration() -> None:
    adam = catalogue.entry_of("optimizers", "adam")["schema"]
    number, schedule = adam["properties"]["beta1"]["oneOf"]
    assert number == {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    assert schedule == {"$ref": "#/$defs/Schedule"}
    assert set(adam["$defs"]["Schedule"]["discriminator"]["mapping"]) == set(schedules.KINDS)
    assert set(OPTIMIZERS) == set(optimizers.KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_schemas_lead_nowhere_else(family: str) -> None:
    """What a schema refers to is in it, so that it can be used by itself."""
    for entry in catalogue.listing(family)["data"]:
        schema = entry["schema"]
        assert set(references(schema)) <= {f"#/$defs/{name}" for name in schema.get("$defs", {})}


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [ref for inner in value.values() for ref in references(inner)]
    return [ref for inner in value for ref in references(inner)] if isinstance(value, list) else []


def test_an_unknown_kind_is_a_lookup_error() -> None:
    with pytest.raises(LookupError):
        catalogue.entry_of("optimizers", "nope")
