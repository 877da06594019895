"""A checkpoint in the middle of a round, or between workers: it goes on to the same bits, or is refused."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.aggregation.aggregation import Aggregation, DelayCompensation
from core.aggregation.reducers import KINDS as REDUCERS
from core.aggregation.reducers import Sum
from core.aggregation.staleness import Inverse
from core.contributions import Contribution, Pull
from core.errors import CoreError, InvalidState, RoundOpen
from core.evaluate import Evaluator
from core.layout import Array, Rows
from core.session import Session
from core.state import State, state_of, tensors_of, workers_of
from tests.core.build import assert_same_state, close, make, optimizer_of, picture, step

SHAPES: dict[str, tuple[int, ...]] = {"w": (4, 2), "b": (3,), "s": ()}


@dataclass(frozen=True)
class Case:
    aggregation: Aggregation
    optimizer: str = "adam"
    held: bool = True
    rows: bool = False
    transforms: list[dict[str, Any]] = field(default_factory=list)
    partial: bool = False


ADAPTIVE = DelayCompensation(adaptive=True)
CASES: dict[str, Case] = {
    "mean": Case(Aggregation(mode="sync", workers=5, timeout=10.0)),
    "sum": Case(Aggregation(mode="buffered", size=5, reduce=Sum(), staleness=Inverse())),
    "rows": Case(Aggregation(mode="sync", workers=5), "sparse_adam", rows=True),
    "partial": Case(Aggregation(mode="sync", workers=5), "adamw", held=False, partial=True),
    "nans": Case(Aggregation(mode="sync", workers=5), transforms=[{"kind": "zero_nans"}]),
    "hessian": Case(Aggregation(mode="sync", workers=5), "newton"),
    "diagonal": Case(Aggregation(mode="sync", workers=5), "sophia"),
    "loss": Case(Aggregation(mode="sync", workers=5), "polyak_sgd"),
    "noise": Case(Aggregation(mode="sync", workers=5, clip_norm=1.0, noise_multiplier=0.5, seed=3)),
    **{
        kind: Case(Aggregation(mode="sync", workers=7, reduce=made))
        for kind, made in (
            ("median", REDUCERS["median"]()),
            ("bulyan", REDUCERS["bulyan"](byzantine=1)),
            ("geometric_median", REDUCERS["geometric_median"]()),
        )
    },
    "losses": Case(Aggregation(mode="sync", workers=7, reduce=REDUCERS["median"]()), "polyak_sgd"),
    "delays": Case(Aggregation(delay_compensation=DelayCompensation(), workers=2)),
    "adaptive": Case(Aggregation(mode="ssp", bound=2, delay_compensation=ADAPTIVE)),
    "ssp": Case(Aggregation(mode="ssp", bound=2, workers=4)),
    "plain": Case(Aggregation()),
}


def values(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def opened(case: Case) -> Session:
    return make(
        optimizer_of({"kind": case.optimizer}), values(99), dtype="float32", held=case.held,
        transforms=case.transforms, aggregation=case.aggregation,
    )  # fmt: skip


def needed(session: Session, t: int) -> dict[str, Any]:
    needs = session.recipe.needs
    found: dict[str, Any] = {"loss": 5.0 + t} if "loss" in needs or t % 2 else {}
    if "hessian" in needs:
        found["hessian"] = np.diag(np.arange(1.0, session.layout.size + 1.0) + t)
    if "hessian_diagonal" in needs:
        found["hessian_diagonal"] = {name: np.full(shape, 1.0 + t) for name, shape in SHAPES.items()}
    return found


def contribute(session: Session, case: Case, t: int) -> None:
    """Contribution t, and the closing of the round if it is full then."""
    sent: dict[str, Any] = {name: array.astype(np.float32) for name, array in values(t).items()}
    if case.transforms:
        sent["w"][t % 4, 0] = np.nan
    if case.rows:
        sent["w"] = Rows(np.array([t % 4, 3, t % 4]), sent["w"][:3])
    if case.partial:
        del sent["wbs"[t % 3]]
    worker, aggregation = "abcdefg"[t % 7] if aggregation_counts(case) else "abcd"[t % 4], session.recipe.aggregation
    beside: dict[str, Any] = {"worker": worker, "weight": 1.0 if aggregation.noise_multiplier else 1.0 + t % 3}
    beside |= {"base_step": session.state.step, "at": 1000.0 + t, "partial": case.partial, "pulls": t % 2 == 0}
    if aggregation.delay_compensation is not None:
        del beside["base_step"]
        if t % 3 == 0:
            session.apply(session.check(Pull(worker, 1000.0 + t)))
    if not case.held:
        beside["params"] = {name: values(99)[name] for name in sent}
    beside |= needed(session, t)
    step(session, sent, **beside)
    if session.state.ledger.closable(aggregation, 1000.0 + t):
        close(session)


def aggregation_counts(case: Case) -> bool:
    return case.aggregation.needed > 4


def texts(state: State) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(workers_of(state), allow_nan=False))
    return found


def again(session: Session) -> Session:
    state, recipe = session.state, session.recipe
    tensors = {name: array.copy() for name, array in tensors_of(recipe, state).items()}
    return Session(recipe, state_of(recipe, state.step, tensors, state.moves, texts(state)), Evaluator())


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_to_the_same_bits(name: str) -> None:
    """Whenever the checkpoint is read back, the middle of a round included; a copy goes on likewise."""
    case = CASES[name]
    first = opened(case)
    for t in range(16):
        contribute(first, case, t)
        if t in (0, 2, 8, 12):
            second = again(first)
            third = Session(first.recipe, first.state.copy(), Evaluator())
            assert texts(second.state) == texts(third.state) == texts(first.state)
            for later in range(t + 1, t + 9):
                contribute(second, case, later)
                contribute(third, case, later)
            fourth = again(first)
            for later in range(t + 1, t + 9):
                contribute(fourth, case, later)
            for other in (third, fourth):
                assert picture(other) == picture(second)
                assert texts(other.state) == texts(second.state)
    whole = opened(case)
    for t in range(16):
        contribute(whole, case, t)
    assert_same_state(whole.state, first.state)
    assert picture(whole) == picture(first)


def test_some_of_them_stand_in_a_round() -> None:
    """Else nothing would be shown."""
    kinds = set()
    for case in CASES.values():
        session = opened(case)
        for t in range(3):
            contribute(session, case, t)
        kinds |= {array.rpartition(".")[0] or array for array in session.state.contributed}
        kinds |= {array for array in session.state.contributed if array.startswith(":round.") and "rows" not in array}
    assert kinds >= {":round.total", ":round.hessian", ":round.hessian_diagonal", ":round.params", ":round.0"}
    assert kinds >= {":round.rows", ":delay.backup", ":delay"}


# -- files that lie --------------------------------------------------------------------------------------------------


@dataclass
class File:
    step: int
    tensors: dict[str, Array]
    text: dict[str, Any]


def file_of(case: Case, contributions: int = 3) -> tuple[Session, File]:
    session = opened(case)
    for t in range(contributions):
        contribute(session, case, t)
    tensors = {name: array.copy() for name, array in tensors_of(session.recipe, session.state).items()}
    return session, File(session.state.step, tensors, texts(session.state))


def read(session: Session, file: File) -> State:
    return state_of(session.recipe, file.step, file.tensors, session.state.moves, file.text)


Lie = Callable[[File], Any]
F32 = np.float32


def put(name: str, array: Any) -> Lie:
    return lambda file: file.tensors.update({name: array})


def drop(name: str) -> Lie:
    return lambda file: file.tensors.pop(name)


def say(part: str, **members: Any) -> Lie:
    return lambda file: file.text.setdefault(part, {}).update(members)


def weigh(**weights: Any) -> Lie:
    return lambda file: file.text["round"]["weights"].update(
        {name.replace("_", ":", 1): w for name, w in weights.items()}
    )


def unweigh(name: str) -> Lie:
    return lambda file: file.text["round"]["weights"].pop(name)


def backup_of(file: File) -> str:
    return next(name for name in file.tensors if name.startswith(":delay.backup."))


def rename_backup(name: str) -> Lie:
    return lambda file: file.tensors.update({f":delay.backup.{name}": file.tensors.pop(backup_of(file))})


def name_worker(name: str) -> Lie:
    def lie(file: File) -> None:
        known = file.text["ledger"]["workers"]
        known[name] = known.pop("a")

    return lie


LIES: list[tuple[str, Lie]] = [
    # counts
    ("mean", say("ledger", received=0)),
    ("mean", say("ledger", received=6)),
    ("mean", say("ledger", received=-1)),
    ("mean", say("ledger", received=2)),  # three have names
    ("mean", lambda file: file.text.pop("ledger")),
    ("median", say("ledger", received=4)),
    ("median", drop(":round.1")),
    ("median", put(":round.3", np.zeros(12, F32))),
    ("median", put(":round.01", np.zeros(12, F32))),
    ("median", put(":round.²", np.zeros(12, F32))),
    ("median", put(":round.total", np.zeros(12, F32))),
    ("median", say("round", shares=[1.0, 1.0])),
    ("mean", drop(":round.total")),
    ("mean", put(":round.0", np.zeros(12, F32))),
    ("sum", say("ledger", contributed=["a"] * 4)),
    # where there are none
    ("plain", say("ledger", received=1)),
    ("ssp", put(":round.total", np.zeros(12, F32))),
    ("plain", say("round", loss=1.0)),
    ("plain", say("round", weights={"w": 1.0})),
    ("plain", put(":delay.backup.a", np.zeros(12, F32))),
    ("mean", put(":delay.mean_square", np.zeros(12, F32))),
    # shapes and dtypes
    ("mean", put(":round.total", np.zeros(11, F32))),
    ("mean", put(":round.total", np.zeros((4, 3), F32))),
    ("mean", put(":round.total", np.zeros(12))),
    ("median", put(":round.1", np.zeros(13, F32))),
    ("delays", put(":delay.backup.a", np.zeros(11, F32))),
    ("delays", put(":delay.backup.a", np.zeros(12))),
    ("adaptive", put(":delay.mean_square", np.zeros(1, F32))),
    *(("adaptive", put(":delay.mean_square", np.full(12, value, F32))) for value in (-1.0, np.nan, np.inf)),
    ("hessian", put(":round.hessian", np.zeros((12, 11)))),
    ("hessian", put(":round.hessian", np.zeros((12, 12), F32))),
    ("diagonal", put(":round.hessian_diagonal", np.zeros(11, F32))),
    ("partial", put(":round.params", np.zeros((), F32))),
    # what no step brings, and a step would be made of
    *(
        lie
        for value in (np.nan, np.inf, -np.inf)
        for lie in (
            ("hessian", put(":round.hessian", np.full((12, 12), value))),
            ("diagonal", put(":round.hessian_diagonal", np.full(12, value, F32))),
            ("partial", put(":round.params", np.full(12, value, F32))),
        )
    ),
    # more than there may be, and names that nobody may have
    ("delays", lambda file: file.tensors.update({f":delay.backup.{n}": np.zeros(12, F32) for n in "xyz"})),
    *(("delays", rename_backup(name)) for name in ("", "a b", "a:b", "ä", "a" * 65)),
    *(("mean", name_worker(name)) for name in ("", "a b", "a:b", "ä", "a" * 65)),
    *(("mean", say("ledger", contributed=["a", "b", name])) for name in ("", "a b", "a:b", "ä", "a" * 65)),
    # rows
    *(
        ("rows", put(":round.rows.w", np.array(indices)))
        for indices in ([0, 4], [-1, 0], [1, 1], [2, 1], [[0, 1]], [0.0], [True])
    ),
    ("rows", put(":round.rows.w", np.array([0, 1], np.int32))),
    ("rows", put(":round.rows.s", np.array([], np.int64))),
    ("rows", put(":round.rows.x", np.array([0]))),
    ("rows", say("round", whole=["w"])),
    ("rows", say("round", whole=["x"])),
    ("rows", say("round", whole=[["w"]])),
    ("rows", say("round", whole=1)),
    # names
    *(("mean", put(name, np.zeros(12, F32))) for name in (":round.", ":round.w", ":delay.", ":delay.b", ":x", "w:x")),
    ("mean", weigh(x=1.0)),
    ("mean", weigh(_x=1.0)),
    ("mean", weigh(_hessian_diagonal=1.0)),
    # weights
    *(("mean", weigh(w=weight)) for weight in (0.0, -1.0, float("nan"), float("inf"), 10**400, None, "x", [1.0])),
    *(("median", say("round", shares=[1.0, weight, 1.0])) for weight in (0.0, -1.0, float("nan"), 10**400, None)),
    ("mean", say("round", weights=[])),
    *(("loss", say("round", loss=loss)) for loss in (float("nan"), float("inf"), 10**400, None, "x")),
    *(("losses", say("round", losses=[1.0, loss])) for loss in (float("nan"), float("inf"), 10**400, None, "x", True)),
    ("losses", say("round", losses=[1.0] * 4)),  # of three
    ("loss", say("round", losses=[1.0])),
    ("mean", lambda file: (file.text["round"].update(loss=1.0), unweigh(":loss")(file))),  # of nobody
    # what would be missing in the step
    ("loss", unweigh(":loss")),
    ("hessian", unweigh(":hessian")),
    ("hessian", drop(":round.hessian")),
    ("diagonal", drop(":round.hessian_diagonal")),
    ("diagonal", unweigh(":hessian_diagonal:w")),
    ("partial", drop(":round.params")),
    ("mean", put(":round.total", np.full(12, np.nan, F32))),
    ("nans", put(":round.total", np.full(12, np.inf, F32))),
    ("median", put(":round.1", np.full(12, np.inf, F32))),
    # text
    *(("mean", lambda file, text=text: file.text.update(ledger=text)) for text in ([], None, "x", 1)),  # type: ignore[misc]
    *(("mean", lambda file, text=text: file.text.update(round=text)) for text in ([], None, "x", 1)),  # type: ignore[misc]
    ("mean", say("ledger", opened_at=float("nan"))),
    ("mean", say("ledger", opened_at=1e300)),
    ("mean", say("ledger", workers={"a": [1, 10**400, 1, 1, 1, 1, None]})),
]


@pytest.mark.parametrize("index", range(len(LIES)))
def test_a_file_that_lies_is_refused(index: int) -> None:
    name, lie = LIES[index]
    session, file = file_of(CASES[name])
    read(session, file)
    lie(file)
    with pytest.raises(InvalidState):
        read(session, file)


JUNK = st.sampled_from(
    [None, True, 0, -1, 1, 7, 2**53, 10**400, 0.0, -0.5, 1e308, 1e-320, float("nan"), float("inf"), "", "a", "w", "nan",
     [], [1], ["a", "a"], [[]], {}, {"w": 1.0}, {"a": []}]
)  # fmt: skip
FLAT = [np.full(12, value, F32) for value in (0.0, 1.0, np.nan, 3e38)]
SQUARE = [np.eye(12), np.full((12, 12), np.inf)]
INDICES = [np.array(indices, np.int64) for indices in ([0], [], [3, 2])]
ARRAYS = st.sampled_from([*FLAT, *SQUARE, *INDICES, np.zeros(12), np.zeros(0, F32), np.zeros((), F32)])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def mutate(data: st.DataObject, file: File) -> None:
    if data.draw(st.booleans()):
        names = [*file.tensors, ":round.total", ":round.0", ":round.rows.w", ":round.hessian", ":round.params"]
        name = data.draw(st.sampled_from([*names, ":round.hessian_diagonal", ":delay.backup.a", ":delay.mean_square"]))
        array = data.draw(st.none() | ARRAYS)
        file.tensors.pop(name, None)
        if array is not None:
            file.tensors[name] = array
        return
    *path, last = data.draw(st.sampled_from([place for place in places(file.text) if place] or [("ledger",)]))
    inside: Any = file.text
    for key in path:
        inside = inside[key]
    if data.draw(st.booleans()) and isinstance(inside, dict):
        inside.pop(last, None)
    else:
        inside[last] = copy.deepcopy(data.draw(JUNK))


FILES: Mapping[str, tuple[Session, File]] = {name: file_of(case) for name, case in CASES.items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(FILES)), st.integers(1, 3), st.data())
def test_whatever_stands_in_a_file_it_is_refused_or_goes_on(name: str, changes: int, data: st.DataObject) -> None:
    """What was let through can be shown, written and gone on from: a step cannot fail."""
    session, original = FILES[name]
    file = File(original.step, dict(original.tensors), copy.deepcopy(original.text))
    for _ in range(changes):
        mutate(data, file)
    try:
        state = read(session, file)
    except InvalidState:
        return
    texts(state)
    found = Session(session.recipe, state, Evaluator())
    again(found)
    for t in range(3, 12):
        try:
            contribute(found, CASES[name], t)
        except CoreError:  # a clock that lies keeps a worker waiting
            continue
    aggregation = found.recipe.aggregation
    if aggregation.rounds and state.ledger.received >= aggregation.fewest:
        close(found)
    elif aggregation.rounds:
        with pytest.raises(RoundOpen):
            close(found)


def test_an_entry_that_is_refused_leaves_the_round_as_it_was() -> None:
    session, file = file_of(CASES["mean"])
    before = picture(session), texts(session.state)
    for wrong in ({"w": np.zeros(3)}, {"x": np.zeros(3)}, values(1) | {"b": np.full(3, np.nan)}):
        with pytest.raises(CoreError):
            session.check(Contribution(wrong, worker="g"))
    with pytest.raises(CoreError):
        step(session, values(1), worker="a", at=1003.0)
    assert (picture(session), texts(session.state)) == before
    assert file.text == before[1]
