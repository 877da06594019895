"""Checkpoint, restore, fork and replay in the middle of a run go on with the same bits, whatever a session is made of.

Every case is a session on a real server. After five steps, where methods that take several gradients for one move
stand in between, its checkpoint is restored and it is forked. All three take two more steps; then the server is killed
and started again on its store, so that everything is read from snapshots and logs; then they take the last three. What
they hold and what they answered is compared with the core alone, taking the same gradients without a break.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import pytest

from core import averaging, schedules, transforms
from core.contributions import Contribution, NewRecipe
from core.evaluate import Evaluator
from core.layout import BF16, Array, Rows
from core.optimizers import KINDS
from core.recipe import Group
from core.session import Session
from core.state import tensors_of
from tests.core.build import averaging_of, make, optimizer_of, schedule_of
from tests.http.contributions import beside, gradients, post
from tests.http.files import header_of, metadata_of
from tests.running import Server
from tests.wire import SAFETENSORS, create

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 2), "e": (4, 2), "b": (3,), "s": ()}
SPLIT, CHANGE, KILL, END = 5, 6, 7, 10
THREADS = 4
SEED = 12345  # the one of tests.core.build
DTYPES = {"<f4": "F32", "<f8": "F64", BF16.str: "BF16"}


@dataclass(frozen=True)
class Case:
    """`body` is what the session is made of; the rest says what is unusual in the gradients that it gets."""

    body: Mapping[str, Any]
    held: bool = True
    rows: bool = False  # the gradient of e is row-sparse
    partial: Mapping[int, Sequence[str]] = field(default_factory=dict)  # step -> the tensors that it brings
    spoilt: Mapping[int, float] = field(default_factory=dict)  # step -> what stands in the place of a number
    diagonal_every: int = 1
    losses: str = "level"  # or "falling"
    then: Mapping[str, Any] = field(default_factory=dict)  # what a PATCH changes before the step CHANGE

    @property
    def dtype(self) -> str:
        return str(self.body.get("dtype", "float32"))


def case(optimizer: Any, *, more: Mapping[str, Any] | None = None, **members: Any) -> Case:
    return Case({"optimizer": optimizer, **members}, **(more or {}))


# -- the cases -------------------------------------------------------------------------------------------------------

FALLING = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 8}
PLATEAU = {"kind": "plateau", "init": 0.1, "factor": 0.5, "patience": 1}
RATES: dict[str, dict[str, Any]] = {
    "constant": {"value": 0.1},
    "linear": {"init": 0.1, "end": 0.01, "steps": 8},
    "polynomial": {"init": 0.1, "end": 0.01, "steps": 8, "power": 2.0},
    "exponential": {"init": 0.1, "rate": 0.5, "steps": 3, "staircase": True},
    "inverse_time": {"init": 0.1, "rate": 0.5},
    "inverse_sqrt": {"peak": 0.1, "warmup_steps": 4},
    "step": {"init": 0.1, "steps": 3},
    "multi_step": {"init": 0.1, "milestones": [2, 6, 8]},
    "cosine": {"init": 0.1, "steps": 8},
    "piecewise_constant": {"values": [0.1, 0.2, 0.05], "boundaries": [3, 7]},
    "piecewise_linear": {"steps": [0, 4, 8], "values": [0.1, 0.2, 0.05]},
    "cosine_restarts": {"init": 0.1, "steps": 3, "mult": 2},
    "cyclic": {"init": 0.01, "peak": 0.1, "steps_up": 3},
    "one_cycle": {"peak": 0.1, "steps": 9},
    "warmup_cosine": {"peak": 0.1, "warmup_steps": 3, "steps": 9},
    "warmup_linear": {"peak": 0.1, "warmup_steps": 3, "steps": 9},
    "warmup_stable_decay": {"peak": 0.1, "warmup_steps": 2, "steps": 9, "decay_steps": 3},
    "sequence": {"parts": [FALLING, {"kind": "constant", "value": 0.3}], "boundaries": [6]},
    "product": {"parts": [FALLING, {"kind": "linear", "init": 0.0, "end": 1.0, "steps": 4}]},
    "plateau": {"init": 0.1, "factor": 0.5, "patience": 1},
}
ADAM = {"kind": "adam", "lr": 0.1}
MOMENTUM = {"kind": "momentum", "lr": 0.1}
GROUPS = [{"match": "[we]", "lr": 0.05, "beta1": 0.5}, {"match": "b", "frozen": True}]
TRANSFORMS: dict[str, list[dict[str, Any]]] = {
    "clip_by_global_norm": [{"max_norm": 1.0}],
    "clip_by_norm": [{"max_norm": 0.5}],
    "clip": [{"max_value": 0.5}, {"low": -0.1, "high": 1.0}],
    "adaptive_clip": [{"clipping": 0.1}],
    "normalize": [{}, {"per": "tensor", "eps": 1e-3}],
    "centralize": [{}, {"units": "last"}],
    "sign": [{}],
    "zero_nans": [{}],
    "unscale": [{"scale": 4.0}, {"scale": 4.0, "dynamic": True, "growth_interval": 2}],
    "weight_decay": [{"weight_decay": 0.1}],
    "l1": [{"l1": 0.1}],
    "add_noise": [{"eta": 0.1, "seed": 3}],
    "accumulate": [{"steps": 3}, {"steps": 2, "reduce": "sum"}],
    "ema": [{"decay": 0.9}, {"decay": 0.5, "debias": False}],
    "orthogonalize": [{}, {"exact": True}],
    "project": [
        {"onto": "simplex", "over": "rows"}, {"onto": "l1_ball"}, {"onto": "l2_ball", "over": "rows"},
        {"onto": "box", "low": -0.2, "high": 0.2}, {"onto": "non_negative"},
    ],
}  # fmt: skip
SPOILT: dict[str, dict[int, float]] = {"zero_nans": {4: np.nan, 8: np.nan}}


def _kinds() -> Iterator[tuple[str, Case]]:
    for kind in KINDS:
        for dtype in ("float32", "float64"):
            yield f"{kind}-{dtype}", case(kind, dtype=dtype)


def _wrappers() -> Iterator[tuple[str, Case]]:
    bases = [("elements", MOMENTUM), ("tensors", {"kind": "lamb", "lr": 0.1}), ("whole", {"kind": "polyak_sgd"})]
    for family, base in bases:
        yield f"lookahead-{family}", case({"kind": "lookahead", "base": base, "sync_period": 3})
        yield f"sam-{family}", case({"kind": "sam", "base": base})
    yield "sam-adaptive", case({"kind": "sam", "base": ADAM, "adaptive": True}, dtype="float64")
    yield "schedule_free-elements", case({"kind": "schedule_free", "base": {"kind": "sgd", "lr": 0.5}, "r": 1.0})
    inner = {"kind": "sam", "base": ADAM, "rho": 0.1}
    yield "lookahead-sam-adam", case({"kind": "lookahead", "base": inner, "sync_period": 2})
    outer = {"kind": "sam", "base": {"kind": "lookahead", "base": ADAM, "sync_period": 2}}
    yield "sam-lookahead-adam", case(outer, dtype="float64")


def _options() -> Iterator[tuple[str, Case]]:
    made: dict[str, dict[str, Any]] = {
        "amsgrad": {**ADAM, "amsgrad": "corrected"},
        "cautious": {**ADAM, "cautious": True},
        "cautious-decayed": {"kind": "adamw", "lr": 0.1, "weight_decay": 0.1, "cautious": True},
        "centered": {"kind": "rmsprop", "centered": True, "momentum": 0.9},
        "lookahead-form": {**MOMENTUM, "nesterov": "lookahead"},
        "full": {"kind": "adagrad", "lr": 0.1, "matrix": "full"},
        "searching": {"kind": "lbfgs", "line_search": "strong_wolfe", "history": 2},
        "not-searching": {"kind": "lbfgs", "lr": 0.1, "line_search": "none", "history": 3},
        "bfgs": {"kind": "bfgs", "lr": 0.1, "line_search": "none"},
        "soap": {"kind": "soap", "interval": 2},
        "shampoo": {"kind": "shampoo", "interval": 3, "block_size": 2},
    }
    for name, optimizer in made.items():
        yield f"option-{name}", case(optimizer)
    every_third = {"kind": "sophia", "interval": 3, "lr": 0.01}
    yield "option-sophia-interval", case(every_third, more={"diagonal_every": 3})


def _schedules() -> Iterator[tuple[str, Case]]:
    for kind, settings in RATES.items():
        yield f"rate-{kind}", case({"kind": "adam", "lr": {"kind": kind, **settings}})
    for name, value in (("falling", FALLING), ("plateau", PLATEAU)):
        yield f"momentum-{name}", case({**MOMENTUM, "momentum": value})
        yield f"beta1-{name}", case({**ADAM, "beta1": value})
        yield f"decay-{name}", case({"kind": "adamw", "lr": 0.1, "weight_decay": value})
        yield f"group-{name}", case(ADAM, groups=[{"match": "[we]", "lr": value}])
        yield f"transform-{name}", case(ADAM, transforms=[{"kind": "clip_by_global_norm", "max_norm": value}])
        yield f"base-{name}", case({"kind": "lookahead", "base": {**ADAM, "lr": value}, "sync_period": 3})
        yield f"tensors-{name}", case({"kind": "lamb", "lr": value})
        yield f"free-{name}", case({"kind": "schedule_free", "base": {"kind": "adamw", "lr": value}})
    both = {"kind": "plateau", "init": 0.5, "factor": 0.5, "patience": 0}
    yield "two-plateaus", case({**ADAM, "lr": PLATEAU, "beta1": both}, transforms=[{"kind": "accumulate", "steps": 2}])
    yield "plateau-that-does-not-fall", case({**ADAM, "lr": PLATEAU}, more={"losses": "falling"})


def _transforms() -> Iterator[tuple[str, Case]]:
    for kind, forms in TRANSFORMS.items():
        for index, settings in enumerate(forms):
            spoilt = {4: np.inf, 8: np.nan} if settings.get("dynamic") else SPOILT.get(kind, {})
            made = case(ADAM, transforms=[{"kind": kind, **settings}], more={"spoilt": spoilt})
            yield f"transform-{kind}-{index}", made
    several = [
        {"kind": "unscale", "scale": 2.0, "dynamic": True, "growth_interval": 1},
        {"kind": "ema", "decay": 0.5},
        {"kind": "accumulate", "steps": 2},
        {"kind": "ema", "decay": 0.9},
    ]
    yield "transforms", case(ADAM, transforms=several, dtype="float64", more={"spoilt": {4: -np.inf}})
    climbing = {"kind": "sam", "base": MOMENTUM}
    yield "accumulate-sam", case(climbing, transforms=[{"kind": "accumulate", "steps": 2}])


def _settings() -> Iterator[tuple[str, Case]]:
    compact = {"state_dtype": "bfloat16", "state_seed": SEED}
    yield "bfloat16-adam", case(ADAM, **compact)
    yield "bfloat16-float64", case(ADAM, dtype="float64", **compact)
    yield "bfloat16-cautious", case({**ADAM, "cautious": True}, **compact)
    yield "bfloat16-lookahead", case({"kind": "lookahead", "base": MOMENTUM, "sync_period": 3}, **compact)
    yield "bfloat16-rows", case({"kind": "sparse_adam", "lr": 0.1}, **compact, more={"rows": True})
    yield "bfloat16-groups", case(ADAM, groups=GROUPS, **compact)
    averages: dict[str, dict[str, Any]] = {
        "ema": {"kind": "ema", "decay": 0.9},
        "ema-first": {"kind": "ema", "decay": 0.9, "start": "first"},
        "polyak": {"kind": "polyak", "start": 6},
    }
    for name, average in averages.items():
        yield f"averaging-{name}", case(ADAM, averaging=average)
    yield (
        "averaging-accumulate",
        case(ADAM, averaging={"kind": "ema", "decay": 0.9}, transforms=[{"kind": "accumulate", "steps": 3}]),
    )
    yield "groups", case(ADAM, groups=GROUPS)
    yield "groups-scheduled", case(ADAM, groups=[{"match": "w", "lr": FALLING}, {"match": "s", "frozen": True}])
    yield "groups-of-a-whole", case({"kind": "lbfgs", "lr": 0.1}, groups=[{"match": "w", "lr": 0.01}])
    yield "groups-in-a-wrapper", case({"kind": "sam", "base": ADAM}, groups=GROUPS)
    partial = {3: ["w", "s"], 6: ["e"], 9: ["b", "w"]}
    for kind in ("adam", "lamb", "dog", "lookahead", "schedule_free"):
        yield f"partial-{kind}", case(kind, more={"partial": partial})
    yield "partial-ema", case(ADAM, averaging={"kind": "ema", "decay": 0.9}, more={"partial": partial})
    for kind in ("sgd", "adagrad", "sparse_adam", "adam", "lamb"):
        yield f"rows-{kind}", case({"kind": kind, "lr": 0.1}, more={"rows": True})
    clipped = [{"kind": "clip_by_global_norm", "max_norm": 0.5}]
    yield "rows-clipped", case({"kind": "adagrad", "lr": 0.1}, transforms=clipped, more={"rows": True})
    yield "rows-accumulated", case(MOMENTUM, transforms=[{"kind": "accumulate", "steps": 3}], more={"rows": True})


def _changed() -> Iterator[tuple[str, Case]]:
    """What is carried over where a session goes on otherwise, between the checkpoint and the kill."""
    two = {"kind": "accumulate", "steps": 2}
    ema = {"kind": "ema", "decay": 0.9}
    yield (
        "changed-transforms",
        case(
            ADAM,
            transforms=[ema, two],
            more={"then": {"transforms": [{"kind": "sign"}, two | {"steps": 4}, ema | {"decay": 0.5}]}},
        ),
    )
    sums = {"transforms": [two | {"reduce": "sum"}]}
    yield "changed-accumulation", case(ADAM, transforms=[two], more={"then": sums})
    centered = {"optimizer": {"kind": "rmsprop", "centered": True, "momentum": 0.5}}
    yield "changed-slots", case("rmsprop", more={"then": centered})
    yield "changed-compact-slots", case("rmsprop", state_dtype="bfloat16", state_seed=SEED, more={"then": centered})
    later = {"optimizer": {**ADAM, "lr": PLATEAU | {"patience": 3}, "beta1": PLATEAU}}
    yield "changed-plateaus", case({**ADAM, "lr": PLATEAU}, more={"then": later})
    begun = {"optimizer": {**ADAM, "lr": PLATEAU}}
    yield "changed-to-plateau", case(ADAM, more={"then": begun})
    groups = [{"match": "w", "lr": PLATEAU}, {"match": "b", "lr": PLATEAU | {"init": 0.3}}]
    yield "changed-groups", case(ADAM, groups=groups, more={"then": {"groups": groups[1:]}})
    base = {"kind": "sam", "base": {"kind": "lookahead", "base": ADAM, "sync_period": 2}}
    inner = {"optimizer": base | {"rho": 0.5, "base": {**base["base"], "sync_period": 3, "base": {**ADAM, "lr": 0.01}}}}
    yield "changed-base", case(base, more={"then": inner})


def _unheld() -> Iterator[tuple[str, Case]]:
    away = {"held": False}
    for kind in ("adam", "adamw", "lamb", "prodigy", "newton", "lbfgs", "lookahead"):
        yield f"unheld-{kind}", case(kind, more=away)
    yield "unheld-full", case({"kind": "adagrad", "matrix": "full"}, more=away)
    yield (
        "unheld-transforms",
        case(
            ADAM,
            transforms=[{"kind": "weight_decay", "weight_decay": 0.1}, {"kind": "accumulate", "steps": 3}],
            more=away,
        ),
    )
    yield "unheld-project", case(ADAM, transforms=[{"kind": "project", "onto": "l2_ball"}], more=away)
    yield "unheld-plateau", case({**ADAM, "lr": PLATEAU}, more=away)


PARTS = (_kinds, _wrappers, _options, _schedules, _transforms, _settings, _changed, _unheld)
CASES = dict(pair for part in PARTS for pair in part())


# -- what each step brings -------------------------------------------------------------------------------------------


def start() -> dict[str, Array]:
    return {name: 0.5 * array for name, array in gradients(SHAPES, 99, "float64").items()}


def brought(made: Case, needs: frozenset[str], t: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors and members of step t."""
    found = gradients(SHAPES, t, made.dtype)
    if t in made.spoilt:
        found["w"][1, 0] = made.spoilt[t]
    names = made.partial.get(t, list(SHAPES))
    tensors: dict[str, Array] = {name: found[name] for name in names}
    if made.rows:
        rows = np.array([(t * 3) % 4, t % 4, t % 4], np.int64)
        tensors |= {"e:indices": rows, "e:values": found["e"][:3]}
        del tensors["e"]
    late = ["hessian_diagonal"] if (t - 1) % made.diagonal_every else []
    more, members = beside(needs, SHAPES, t, without=late + (["params"] if made.held else []))
    if (members or made.then) and made.losses == "level":
        members = {"loss": 1.0}
    return tensors | more, members | ({"partial": True} if t in made.partial else {})


# -- with a break ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A case on the server: the sessions that go on, what each answered to steps 1, 2, …, and how they ended."""

    ids: list[str] = field(default_factory=list)
    answers: list[list[dict[str, Any]]] = field(default_factory=list)
    rates: list[str] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    finals: list[bytes] = field(default_factory=list)
    error: BaseException | None = None


def pictured(file: bytes) -> dict[str, Any]:
    """The tensors of a file, bit by bit."""
    header, body = header_of(file), file[8 + int.from_bytes(file[:8], "little") :]
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), body[slice(*tensor["data_offsets"])])
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def file_of(reply: httpx.Response, status: int = 200) -> bytes:
    assert reply.status_code == status, reply.text
    return reply.content


def advance(client: httpx.Client, run: Run, made: Case, needs: frozenset[str], steps: range) -> None:
    """Each session takes the same steps, in JSON and as files by turns."""
    for id_, answers in zip(run.ids, run.answers, strict=True):
        for t in steps:
            if made.then and t == CHANGE:
                file_of(client.patch(f"/v1/sessions/{id_}", json=made.then))
            tensors, members = brought(made, needs, t)
            form = "json" if t % 2 else "safetensors"
            file = file_of(post(client, id_, tensors, members, form=form))
            answers.append(pictured(file))
            if id_ == run.ids[0]:
                run.rates.append(metadata_of(file)["lr"])


def begin(client: httpx.Client, run: Run, made: Case, needs: frozenset[str]) -> None:
    values = {"params": {name: array.tolist() for name, array in start().items()}} if made.held else {"shapes": SHAPES}
    run.ids, run.answers = [create(client, **made.body, **values)["id"]], [[]]
    advance(client, run, made, needs, range(1, SPLIT + 1))
    path = f"/v1/sessions/{run.ids[0]}"
    checkpoint = file_of(client.get(f"{path}/state"))
    restored = client.post("/v1/sessions", content=checkpoint, headers=SAFETENSORS)
    for reply in (restored, client.post(f"{path}/fork")):
        file_of(reply, 201)
        run.ids.append(reply.json()["id"])
        run.answers.append(list(run.answers[0]))
    advance(client, run, made, needs, range(SPLIT + 1, KILL + 1))


def finish(client: httpx.Client, run: Run, made: Case, needs: frozenset[str]) -> None:
    advance(client, run, made, needs, range(KILL + 1, END + 1))
    for id_ in run.ids:
        run.files.append(file_of(client.get(f"/v1/sessions/{id_}/state")))
        final = client.get(f"/v1/sessions/{id_}/params?at=final", headers={"Accept": "application/vnd.safetensors"})
        run.finals.append(file_of(final, 200 if made.held else 409))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All cases, side by side, across one kill of the server. What goes wrong in a case is kept for its test."""
    found = {name: Run() for name in CASES}
    needs = {name: session_of(made).recipe.needs for name, made in CASES.items()}
    server = Server(tmp_path_factory.mktemp("continuation") / "data").start()

    def everywhere(phase: Any) -> None:
        def work(names: Sequence[str]) -> None:
            with server.client() as client:
                for name in names:
                    try:
                        if found[name].error is None:
                            phase(client, found[name], CASES[name], needs[name])
                    except (AssertionError, httpx.HTTPError) as error:
                        found[name].error = error

        names = list(CASES)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, [names[i::THREADS] for i in range(THREADS)]))

    try:
        everywhere(begin)
        server.kill()
        server.restart()
        everywhere(finish)
    finally:
        server.stop()
    return found


# -- without one -----------------------------------------------------------------------------------------------------


def session_of(made: Case) -> Session:
    body = made.body
    groups = [
        Group(
            group["match"],
            {n: schedule_of(v) if isinstance(v, dict) else v for n, v in group.items() if n not in ("match", "frozen")},
            group.get("frozen", False),
        )
        for group in body.get("groups", [])
    ]
    optimizer = body["optimizer"]
    return make(
        optimizer_of({"kind": optimizer} if isinstance(optimizer, str) else optimizer),
        start(),
        dtype=made.dtype,
        held=made.held,
        evaluator=Evaluator(),
        groups=groups,
        averaging=averaging_of(body["averaging"]) if "averaging" in body else None,
        transforms=body.get("transforms", []),
        state_dtype=body.get("state_dtype"),
    )


def contribution(made: Case, needs: frozenset[str], t: int) -> Contribution:
    tensors, members = brought(made, needs, t)
    sent: dict[str, Array | Rows] = {name: array for name, array in tensors.items() if ":" not in name}
    if made.rows:
        sent["e"] = Rows(tensors["e:indices"], tensors["e:values"])

    def part(ending: str) -> dict[str, Array] | None:
        named = {name.removesuffix(ending): array for name, array in tensors.items() if name.endswith(ending)}
        return named or None

    hessian = tensors.get(":hessian")
    return Contribution(sent, part(":params"), hessian, part(":hessian_diagonal"), **members)


def named(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: (DTYPES[array.dtype.str], array.shape, array.tobytes()) for name, array in arrays.items()}


def uninterrupted(made: Case) -> tuple[Session, list[dict[str, Any]], list[str]]:
    """The session after the last step, what it would have answered to each, and the rate of each."""
    session, answers, rates = session_of(made), [], []
    for t in range(1, END + 1):
        if made.then and t == CHANGE:
            changed = session_of(replace(made, body={**made.body, **made.then})).recipe
            session.apply(session.check(NewRecipe(changed)))
        rates.append(repr(session.rate()))
        checked = session.check(contribution(made, session.recipe.needs, t))
        updates = session.apply(checked, want_updates=not made.held).updates
        answer = session.next_point() if made.held else updates
        assert answer is not None
        answers.append(named(session.layout.views(answer)))
    return session, answers, rates


# -- the same --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_with_the_same_bits(runs: Mapping[str, Run], name: str) -> None:
    run, made = runs[name], CASES[name]
    if run.error is not None:
        raise run.error
    session, answers, rates = uninterrupted(made)
    assert run.rates == rates
    for which, got in zip(("it", "its restored checkpoint", "its fork"), run.answers, strict=True):
        for t, (ours, expected) in enumerate(zip(got, answers, strict=True), 1):
            assert ours == expected, f"{which} answered step {t} otherwise"
    expected_state = named(tensors_of(session.recipe, session.state))
    assert pictured(run.files[0]) == expected_state
    assert run.files[0] == run.files[1] == run.files[2]
    text = metadata_of(run.files[0])
    assert (text["step"], text.get("moves", text["step"])) == (str(END), str(session.state.moves))
    if made.held:
        final = named(session.layout.views(session.final_point()))
        assert [pictured(file) for file in run.finals] == [final] * 3


def test_the_cases_are_all_there_is() -> None:
    assert set(RATES) == set(schedules.KINDS)
    assert set(TRANSFORMS) == set(transforms.KINDS)
    assert {made.body["averaging"]["kind"] for made in CASES.values() if "averaging" in made.body} == set(
        averaging.KINDS
    )


def test_some_stand_in_between_where_the_run_is_broken_off() -> None:
    """Else nothing would be shown of what is remembered there."""
    for name in ("sam-elements", "transform-accumulate-0", "sam-lookahead-adam", "averaging-accumulate"):
        session = session_of(CASES[name])
        for t in range(1, KILL + 1):
            session.apply(session.check(contribution(CASES[name], session.recipe.needs, t)))
            if t in (SPLIT, KILL):
                held_back = [a for n, a in session.state.own.items() if n.endswith(("climbing", "count"))]
                assert any(float(array) > 0 for array in held_back), (name, t)
