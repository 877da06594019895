"""The control plane's JSON: what is taken, what is refused and where, and the way there and back."""

from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from annotated_types import Gt, Lt
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from core import averaging, optimizers, schedules, transforms
from core.recipe import Recipe
from service.documents import Document
from service.errors import Fault, InvalidRequest
from service.schemas import NewSession, brief_of, document_of, parse_create, patch, recipe_of
from service.wire.json import dumps, loads
from tests.core.schedule_strategies import closed, plateau
from tests.http.continuation_cases import CASES
from tests.http.continuation_cases import SHAPES as CASE_SHAPES

SHAPES = {"w": [2, 3], "b": [3]}


def refused(call: Any, *arguments: Any) -> dict[str, str]:
    """The faults of a call that must be refused, by pointer."""
    with pytest.raises(InvalidRequest) as caught:
        call(*arguments)
    return {fault.pointer: fault.detail for fault in caught.value.faults}


def created(**members: Any) -> Document:
    return parse_create({"optimizer": "adam", "shapes": SHAPES} | members)[0]


# -- the way there and back --------------------------------------------------------------------------------------------


def numbers(bounds: tuple[Any, ...] = ()) -> st.SearchStrategy[float]:
    open_low = any(isinstance(bound, Gt) for bound in bounds)
    open_high = any(isinstance(bound, Lt) for bound in bounds)
    return st.floats(0, 1, exclude_min=open_low, exclude_max=open_high, width=32).map(abs)  # no -0.0


WRAPPED = ("sgd", "adamw", "momentum")


def field_values(hint: Any, *, schedulable: bool) -> st.SearchStrategy[Any]:
    base, *bounds = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if get_origin(base) in (Union, UnionType):
        return st.one_of([field_values(part, schedulable=schedulable) for part in get_args(base)])
    if get_origin(base) is Literal:
        return st.sampled_from(get_args(base))
    if base is type(None):
        return st.none()
    if base is bool:
        return st.booleans()
    if base is int:
        return st.integers(1, 10**6)
    if base is optimizers.Optimizer:
        return objects({kind: optimizers.KINDS[kind] for kind in WRAPPED}, schedulable=schedulable)
    assert base is float
    plain = numbers(tuple(bounds))
    return plain | schedule_objects() if schedulable else plain


@st.composite
def objects(draw: st.DrawFn, kinds: dict[str, Any], *, schedulable: bool) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(kinds)))
    hints = get_type_hints(kinds[kind], include_extras=True)
    members = {"kind": kind}
    for field in fields(kinds[kind]):
        if field.default is MISSING or draw(st.booleans()):
            members[field.name] = draw(field_values(hints[field.name], schedulable=schedulable))
    return members


def schedule_objects() -> st.SearchStrategy[dict[str, Any]]:
    return closed(numbers()) | plateau(numbers())


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    optimizer = draw(objects(optimizers.KINDS, schedulable=True))
    lr = st.fixed_dictionaries({"match": st.sampled_from(["w", "*", "?.bias"]), "lr": numbers() | schedule_objects()})
    frozen = st.fixed_dictionaries({"match": st.just("b"), "frozen": st.booleans()})
    optional = {
        "dtype": st.sampled_from(["float32", "float64"]),
        "groups": st.lists(lr | frozen, max_size=3),
        "averaging": st.none() | st.sampled_from(sorted(averaging.KINDS)) | objects(averaging.KINDS, schedulable=False),
        "non_finite": st.sampled_from(["reject", "skip"]),
        "name": st.none() | st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=200),
        "labels": st.dictionaries(st.from_regex(r"\A[a-z/~.]{1,63}\Z"), st.from_regex(r"\A[ -~]{0,63}\Z"), max_size=4),
        "aggregation": st.just({"mode": "async"}),
        "transforms": st.lists(objects(transforms.KINDS, schedulable=True), max_size=2),
    }
    rest = draw(st.fixed_dictionaries({}, optional=optional))
    return {"optimizer": optimizer, "shapes": SHAPES} | rest


def possible(body: dict[str, Any]) -> Document:
    """The session of `body`, unless the core refuses it: options can exclude each other, schedules leave the bounds."""
    faults: list[Fault] = []
    try:
        return parse_create(body)[0]
    except InvalidRequest as error:
        faults = error.faults
    unexpected = [fault for fault in faults if not fault.pointer.startswith(("/optimizer", "/groups", "/transforms"))]
    assert unexpected == []
    return reject()


@settings(max_examples=150, deadline=None)
@given(bodies())
def test_what_is_described_reads_back_as_the_same(body: dict[str, Any]) -> None:
    document = possible(body)
    described = document.describe()
    assert loads(dumps(described)) == described
    assert document_of(described) == document
    assert same_text(document_of(loads(dumps(brief_of(document)))), document)
    assert recipe_of(document.recipe.describe()) == document.recipe
    for name, value in body["optimizer"].items():
        if not isinstance(value, dict):
            assert described["optimizer"][name] == value


def same_text(one: Document, other: Document) -> bool:
    """More than that they are equal: 0.0 and -0.0 are."""
    return bool(dumps(one.describe()) == dumps(other.describe())) and one == other


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_without_its_defaults_reads_back_as_the_same(name: str) -> None:
    shapes = {name: list(extents) for name, extents in CASE_SHAPES.items()}
    document = parse_create({"shapes": shapes, "name": "n", "labels": {"a": "b"}, **CASES[name].body})[0]
    assert same_text(document_of(loads(dumps(brief_of(document)))), document)


def negative_zeros() -> list[tuple[str, str]]:
    """Kinds, and what is 0.0 of them if it is left out."""
    every = [(kind, field) for kind, cls in optimizers.KINDS.items() for field in fields(cls)]
    return [(kind, field.name) for kind, field in every if type(field.default) is float and field.default == 0]


@pytest.mark.parametrize(("kind", "name"), negative_zeros())
def test_a_negative_zero_is_stored_as_it_is_computed_with(kind: str, name: str) -> None:
    """It is equal to the default that is left out, and with it a step has other bits: 0 * g or -0 * g."""
    document = created(optimizer={"kind": kind, name: -0.0})
    assert same_text(document_of(loads(dumps(brief_of(document)))), document)


@settings(max_examples=30, deadline=None)
@given(bodies())
def test_an_empty_patch_changes_nothing(body: dict[str, Any]) -> None:
    document = possible(body)
    assert patch({})(document) == document


# Any JSON, with the names of members among the strings so that it gets somewhere.
WORDS = [
    "kind",
    "match",
    "lr",
    "adam",
    "cosine",
    "ema",
    "polyak",
    "frozen",
    "steps",
    "init",
    "mode",
    "<number>",
    "w",
    "",
]
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=10,
)
MEMBERS = sorted(NewSession.model_fields)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(MEMBERS), ANY_JSON, max_size=4), st.booleans())
def test_anything_else_is_refused_and_never_a_bug(members: dict[str, Any], whole: bool) -> None:
    body = members if whole else {"optimizer": "adam", "shapes": SHAPES} | members
    for read in (parse_create, document_of, lambda change: patch(change)(created())):
        try:
            read(body)
        except InvalidRequest as error:
            for fault in error.faults:
                resolvable(fault.pointer, body)


def resolvable(pointer: str, body: Any) -> None:
    """A pointer leads to something that is there, or to a member that is missing from an object that is."""
    for index, token in enumerate(
        parts := [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    ):
        if isinstance(body, list):
            body = body[int(token)]
        elif isinstance(body, dict):
            assert token in body or index == len(parts) - 1, pointer
            body = body.get(token)
        else:  # a kind given by its name alone
            assert isinstance(body, str), pointer
            assert token == parts[-1], pointer


# -- creating ----------------------------------------------------------------------------------------------------------


def test_a_name_stands_for_a_kind_with_its_defaults() -> None:
    document = created(optimizer="adam", averaging="polyak")
    assert document.recipe.optimizer == optimizers.adam.Adam()
    assert document.recipe.averaging == averaging.Polyak()


@pytest.mark.parametrize("kind", sorted(optimizers.KINDS))
def test_every_kind_can_be_asked_for_by_name(kind: str) -> None:
    assert created(optimizer=kind).recipe.optimizer.kind == kind


def test_params_come_as_arrays_and_give_the_shapes() -> None:
    document, params = parse_create({"optimizer": "sgd", "params": {"w": [[1, 2], [3, 4]], "s": 0.5, "e": [[], []]}})
    assert params is not None
    assert {name: array.shape for name, array in params.items()} == {"w": (2, 2), "s": (), "e": (2, 0)}
    np.testing.assert_array_equal(params["w"], [[1.0, 2.0], [3.0, 4.0]])
    assert document.recipe.layout.shapes == {"w": [2, 2], "s": [], "e": [2, 0]}


def test_an_integer_is_a_float_where_a_float_belongs() -> None:
    lr = created(optimizer={"kind": "adam", "lr": 1}).recipe.optimizer.lr  # type: ignore[attr-defined]
    assert type(lr) is float


def test_a_schedule_may_stand_for_a_float_alone() -> None:
    cosine = {"kind": "cosine", "init": 0.1, "steps": 10}
    assert created(optimizer={"kind": "adam", "lr": cosine}).recipe.optimizer.at(1).rate(1) == 0.1
    assert "/optimizer/eps_inside" in refused(
        parse_create, {"optimizer": {"kind": "adam", "eps_inside": cosine}, "shapes": SHAPES}
    )


def test_groups_take_the_optimizers_hyperparameters() -> None:
    (group,) = created(
        groups=[{"match": "b", "lr": {"kind": "linear", "init": 1, "end": 0, "steps": 5}, "eps": 1}]
    ).recipe.groups
    assert group.overrides == {"lr": schedules.Linear(1.0, 0.0, 5), "eps": 1.0}
    assert not group.frozen


ADAM = {"kind": "adam"}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"optimizer": "adamm"}, "/optimizer/kind", "the kinds are"),
    ({"optimizer": {"kind": "nope"}}, "/optimizer/kind", "the kinds are"),
    ({"optimizer": {"lr": 0.1}}, "/optimizer/kind", "required"),
    ({"optimizer": 3}, "/optimizer", "an object, not a number"),
    ({"optimizer": None}, "/optimizer", "an object, not null"),
    ({"optimizer": ADAM | {"lr": True}}, "/optimizer/lr", "a number, not a boolean"),
    ({"optimizer": ADAM | {"lr": "1"}}, "/optimizer/lr", "a number, not a string"),
    ({"optimizer": ADAM | {"lr": [1]}}, "/optimizer/lr", "a number, not a list"),
    ({"optimizer": ADAM | {"lr": None}}, "/optimizer/lr", "a number, not null"),
    ({"optimizer": ADAM | {"lr": float("nan")}}, "/optimizer/lr", "finite"),
    ({"optimizer": ADAM | {"lr": float("inf")}}, "/optimizer/lr", "finite"),
    ({"optimizer": ADAM | {"lr": -1}}, "/optimizer/lr", "at least 0"),
    ({"optimizer": ADAM | {"beta1": 1}}, "/optimizer/beta1", "less than 1"),
    ({"optimizer": ADAM | {"eps_inside": 1}}, "/optimizer/eps_inside", "a boolean, not a number"),
    ({"optimizer": ADAM | {"learning_rate": 1}}, "/optimizer/learning_rate", "adam has no member"),
    ({"optimizer": ADAM | {"adam": 1}}, "/optimizer/adam", "adam has no member"),
    ({"optimizer": ADAM | {"a/b~": 1}}, "/optimizer/a~1b~0", "no member"),
    ({"optimizer": ADAM | {"lr": {"kind": "nope"}}}, "/optimizer/lr/kind", "the kinds are"),
    ({"optimizer": ADAM | {"lr": {"init": 1}}}, "/optimizer/lr/kind", "required"),
    ({"optimizer": ADAM | {"lr": {"kind": "cosine", "steps": 2}}}, "/optimizer/lr/init", "required"),
    ({"optimizer": ADAM | {"lr": {"kind": "cosine", "init": 1, "steps": 2.0}}}, "/optimizer/lr/steps", "an integer"),
    ({"optimizer": ADAM | {"lr": {"kind": "cosine", "init": 1, "steps": 0}}}, "/optimizer/lr/steps", "at least 1"),
    (
        {"optimizer": ADAM | {"lr": {"kind": "cosine", "init": 1, "steps": 2, "x": 1}}},
        "/optimizer/lr/x",
        "cosine has no",
    ),
    (
        {"optimizer": ADAM | {"beta1": {"kind": "linear", "init": 0, "end": 1, "steps": 2}}},
        "/optimizer/beta1",
        "it reaches 1",
    ),
    ({"optimizer": {"kind": "momentum", "nesterov": 1}}, "/optimizer/nesterov", "true, false or 'lookahead'"),
    ({"optimizer": {"kind": "momentum", "nesterov": True, "dampening": 0.5}}, "/optimizer/dampening", "dampening 0"),
    ({"optimizer": {"kind": "newton"}, "shapes": {"w": [5000]}}, "/optimizer", "at most 4096"),
    ({"averaging": {"kind": "ema", "decay": 1}}, "/averaging/decay", "less than 1"),
    ({"averaging": "mean"}, "/averaging/kind", "the kinds are"),
    ({"groups": {}}, "/groups", "a list, not an object"),
    ({"groups": [{"lr": 1}]}, "/groups/0/match", "required"),
    ({"groups": [{"match": "w"}, {"match": "w", "lr": -1}]}, "/groups/1/lr", "at least 0"),
    ({"groups": [{"match": "w", "lrr": 1}]}, "/groups/0/lrr", "no member"),
    ({"groups": [{"match": "w", "kind": "sgd"}]}, "/groups/0/kind", "no member"),
    ({"groups": [{"match": "w", "frozen": 1}]}, "/groups/0/frozen", "a boolean"),
    ({"transforms": [{"kind": "clip"}]}, "/transforms/0", "give max_value"),
    ({"aggregation": {"mode": "bulk"}}, "/aggregation/mode", "'async'"),
    ({"aggregation": {"mode": "sync"}}, "/aggregation/workers", "needs it"),
    ({"aggregation": {"mode": "async", "size": 3}}, "/aggregation/size", "has no size"),
    ({"aggregation": {"mode": "async", "quota": 3}}, "/aggregation/quota", "no member"),
    ({"non_finite": "ignore"}, "/non_finite", "'reject' or 'skip'"),
    ({"dtype": "float16"}, "/dtype", "'float32' or 'float64'"),
    ({"name": "a\nb"}, "/name", "printable"),
    ({"name": "a" * 201}, "/name", "at most 200"),
    ({"labels": {"a:b": "c"}}, "/labels/a:b", "':'"),
    ({"labels": {"a": 1}}, "/labels/a", "a string, not a number"),
    ({"labels": {"a": "b" * 64}}, "/labels/a", "at most 63"),
    ({"labels": {f"k{i}": "" for i in range(33)}}, "/labels", "at most 32"),
    ({"colour": "red"}, "/colour", "there are optimizer"),
    ({"shapes": {"w": [2, True]}}, "/shapes/w/1", "an integer, not a boolean"),
    ({"shapes": {"w": ["2"]}}, "/shapes/w/0", "an integer, not a string"),
    ({"shapes": {"w": [2.0]}}, "/shapes/w/0", "an integer"),
    ({"shapes": {"w": [-1]}}, "/shapes/w/0", "at least 0"),
    ({"shapes": {"w": [2**48 + 1]}}, "/shapes/w/0", "at most"),
    ({"shapes": {"w": [1] * 9}}, "/shapes/w", "at most 8"),
    ({"shapes": {"w": [2**32, 2**32]}}, "/shapes/w", "more than"),
    ({"shapes": {"w": [2**40], "b": [2**48]}}, "/shapes", "at most"),
    ({"shapes": {"w:m": [1]}}, "/shapes/w:m", "reserved"),
    ({"shapes": {}}, "/shapes", "at least one tensor"),
    ({"shapes": None}, "/shapes", "an object, not null"),
    ({"params": {"w": 1}}, "", "exactly one"),
]


@pytest.mark.parametrize(
    ("members", "pointer", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refused_with_a_pointer_and_a_sentence(members: dict[str, Any], pointer: str, words: str) -> None:
    faults = refused(parse_create, {"optimizer": "adam", "shapes": SHAPES} | members)
    assert list(faults) == [pointer]
    assert words in faults[pointer]


@pytest.mark.parametrize("body", [[], "adam", 1, None, True])
def test_a_body_is_an_object(body: object) -> None:
    assert list(refused(parse_create, body)) == [""]
    assert list(refused(patch, body)) == [""]


@pytest.mark.parametrize(
    ("params", "pointer"),
    [
        ({"w": [1, [2]]}, "/params/w/1"),
        ({"w": [[1, 2], [3]]}, "/params/w/1"),
        ({"w": [True]}, "/params/w/0"),
        ({"a/b": "1"}, "/params/a~1b"),
        ({"w:m": [1]}, "/params/w:m"),
        ({}, "/params"),
        ([1], "/params"),
    ],
)
def test_params_are_refused_where_they_are_wrong(params: object, pointer: str) -> None:
    assert list(refused(parse_create, {"optimizer": "adam", "params": params})) == [pointer]


def test_all_faults_are_told_at_once() -> None:
    body = {
        "optimizer": {"kind": "adam", "lr": -1, "x": 1},
        "groups": [{"match": "w", "beta1": 2}],
        "dtype": "int8",
    }
    assert set(refused(parse_create, body)) == {
        "", "/optimizer/lr", "/optimizer/x", "/groups/0/beta1", "/dtype",
    }  # fmt: skip


# -- changing ----------------------------------------------------------------------------------------------------------


def test_a_patch_changes_what_it_names_and_nothing_else() -> None:
    before = created(
        optimizer={"kind": "adam", "lr": 0.1, "beta1": 0.8},
        name="a",
        labels={"x": "1", "y": "2"},
        groups=[{"match": "b", "lr": 0}],
    )
    after = patch({"optimizer": {"lr": {"kind": "constant", "value": 0.2}}, "labels": {"z": "3"}})(before)
    assert after.recipe.optimizer == optimizers.adam.Adam(lr=schedules.Constant(0.2), beta1=0.8)  # type: ignore[arg-type]
    assert (after.labels, after.name, after.recipe.groups) == ({"z": "3"}, "a", before.recipe.groups)
    assert after.created_at == before.created_at


def test_null_clears_the_name_alone() -> None:
    before = created(name="a")
    assert patch({"name": None})(before).name is None
    assert list(refused(patch, {"labels": None})) == ["/labels"]


def test_groups_are_replaced_as_a_whole() -> None:
    before = created(groups=[{"match": "b", "lr": 0}])
    assert patch({"groups": []})(before).recipe.groups == ()
    assert patch({"groups": [{"match": "w", "frozen": True}]})(before).recipe.groups[0].frozen


def test_the_kind_may_be_named_but_not_changed() -> None:
    before = created()
    assert patch({"optimizer": {"kind": "adam", "lr": 0.5}})(before).recipe.optimizer.rate(1) == 0.5
    assert patch({"optimizer": "adam"})(before) == before
    assert list(refused(patch({"optimizer": {"kind": "sgd"}}), before)) == ["/optimizer/kind"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"optimizer": {"lr": -1}}, "/optimizer/lr"),
        ({"optimizer": {"lr": None}}, "/optimizer/lr"),
        ({"optimizer": {"momentum": 0.5}}, "/optimizer/momentum"),
        ({"groups": [{"match": "w", "momentum": 0.5}]}, "/groups/0/momentum"),
        ({"groups": [{"match": "w", "beta1": {"kind": "linear", "init": 0, "end": 1, "steps": 2}}]}, "/groups/0/beta1"),
    ],
)
def test_hyperparameters_are_checked_against_the_sessions_kind(body: dict[str, Any], pointer: str) -> None:
    assert list(refused(patch(body), created())) == [pointer]


@pytest.mark.parametrize(
    "member", ["dtype", "shapes", "params", "averaging", "non_finite", "aggregation", "id", "step", "privacy"]
)
def test_what_cannot_change_is_said_to_be_so(member: str) -> None:
    faults = refused(patch, {member: 1})
    assert faults == {f"/{member}": "this member of a session cannot change"}


def test_a_patch_refuses_unknown_members() -> None:
    assert list(refused(patch, {"colour": 1, "labels": {"a": 1}})) == ["/labels/a", "/colour"]


# -- what the store gives back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [{"optimizer": {"kind": "gone"}}, {"shapes": {}}, {"shapes": None}, {"created_at": "yesterday"}, {"extra": 1}],
)
def test_nonsense_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        document_of(created().describe() | damage)


def test_a_recipe_reads_back_without_its_document() -> None:
    recipe: Recipe = created(groups=[{"match": "w", "frozen": True}]).recipe
    assert recipe_of(recipe.describe()) == recipe
