"""Checkpoint, restore, fork and replay in the middle of a run go on with the same bits, whatever a session is made of.

Every case is a session on a real server. After five steps, where methods that take several gradients for one move
stand in between, its checkpoint is restored and it is forked. All three take two more steps; then the server is killed
and started again on its store, so that everything is read from snapshots and logs; then they take the last three. What
they hold and what they answered is compared with the core alone, taking the same gradients without a break.
Where workers share a session each of these steps is a contribution, and the breaks are in the middle of rounds.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from core import averaging, schedules, transforms
from core.aggregation import reducers
from core.contributions import Contribution, NewRecipe
from core.evaluate import Evaluator
from core.layout import BF16, Array, Rows
from core.recipe import Group
from core.session import Session
from core.state import tensors_of
from tests.core.build import averaging_of, close, make, optimizer_of, schedule_of
from tests.http.continuation_cases import CASES, CHANGE, END, KILL, RATES, SHAPES, SPLIT, TRANSFORMS, Case
from tests.http.contributions import beside, gradients, post
from tests.http.files import header_of, metadata_of
from tests.running import Server
from tests.wire import SAFETENSORS, create

THREADS = 4
TOGETHER = 32  # cases on one server
DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64", BF16.str: "BF16"}


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
    if "aggregation" in made.body:
        noise = made.aggregation.noise_multiplier is not None
        members |= {
            "worker": f"w{t % 3}" if made.aggregation.needed < 4 else f"w{t}",
            "weight": 1.0 if noise else 1.0 + t % 2,
        }
        # A round of four begins after 4 and after 8, so this is at most two steps old.
        members |= {"base_step": max(0, t // 4 - 2)} if made.aggregation.looks_at_age else {}
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
            form = "json" if t % 2 and t not in made.spoilt else "safetensors"
            reply = post(client, id_, tensors, members, form=form)
            if made.aggregation.rounds and reply.status_code == 202:
                answers.append(reply.json())
                continue
            file = file_of(reply)
            answers.append(pictured(file))
            if id_ == run.ids[0]:
                run.rates.append(metadata_of(file)["lr"])


def begin(client: httpx.Client, run: Run, made: Case, needs: frozenset[str]) -> None:
    values = {"params": {name: array.tolist() for name, array in start().items()}} if made.held else {"shapes": SHAPES}
    run.ids, run.answers = [create(client, **made.body, **values)["id"]], [[]]
    advance(client, run, made, needs, range(1, SPLIT + 1))
    path = f"/v1/sessions/{run.ids[0]}"
    checkpoint = file_of(client.get(f"{path}/state"))
    copies = [client.post("/v1/sessions", content=checkpoint, headers=SAFETENSORS)]
    if made.aggregation.noise_multiplier is None:  # a fork draws noise of its own
        copies.append(client.post(f"{path}/fork"))
    for reply in copies:
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


def asked_for(request: pytest.FixtureRequest) -> list[str]:
    """The cases of the tests that are to run: `-k` chooses some of them."""
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    return [call.params["name"] for call in calls if call is not None]


def side_by_side(cases: Sequence[str], data: Path) -> dict[str, Run]:
    """These cases across one kill of the server. What goes wrong in a case is kept for its test."""
    found = {name: Run() for name in cases}
    needs = {name: session_of(CASES[name]).recipe.needs for name in found}
    server = Server(data).start()

    def everywhere(phase: Any) -> None:
        def work(names: Sequence[str]) -> None:
            with server.client() as client:
                for name in names:
                    try:
                        if found[name].error is None:
                            phase(client, found[name], CASES[name], needs[name])
                    except (AssertionError, httpx.HTTPError) as error:
                        found[name].error = error

        names = list(found)
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


@pytest.fixture(scope="module")
def run_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a case, made with some beside it: not with all, or each process that has one of the tests made all."""
    names = asked_for(request)

    @cache
    def together(index: int) -> dict[str, Run]:
        data = tmp_path_factory.mktemp("continuation") / "data"
        return side_by_side(names[index * TOGETHER : (index + 1) * TOGETHER], data)

    return lambda name: together(names.index(name) // TOGETHER)[name]


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
        aggregation=made.aggregation,
    )


def contribution(made: Case, needs: frozenset[str], t: int) -> Contribution:
    tensors, members = brought(made, needs, t)
    sent: dict[str, Array | Rows] = {name: array for name, array in tensors.items() if ":" not in name}
    if made.rows:
        sent["e"] = Rows(tensors["e:indices"], tensors["e:values"])

    def part(ending: str) -> dict[str, Array] | None:
        named = {name.removesuffix(ending): array for name, array in tensors.items() if name.endswith(ending)}
        return named or None

    pulls = made.aggregation.delay_compensation is not None
    hessian = tensors.get(":hessian")
    return Contribution(sent, part(":params"), hessian, part(":hessian_diagonal"), **members, pulls=pulls)


def named(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: (DTYPES[array.dtype.str], array.shape, array.tobytes()) for name, array in arrays.items()}


def uninterrupted(made: Case) -> tuple[Session, list[dict[str, Any]], list[str]]:
    """The session after the last step, what it would have answered to each, and the rate of each."""
    session, answers, rates = session_of(made), [], []
    for t in range(1, END + 1):
        if made.then and t == CHANGE:
            changed = session_of(replace(made, body={**made.body, **made.then})).recipe
            session.apply(session.check(NewRecipe(changed)))
        rate = repr(session.rate())
        checked = session.check(contribution(made, session.recipe.needs, t))
        updates = session.apply(checked, want_updates=not made.held).updates
        received, needed = session.state.ledger.received, made.aggregation.needed
        if made.aggregation.rounds and received < needed:
            answers.append({"round": session.state.step + 1, "received": received, "needed": needed})
            continue
        if made.aggregation.rounds:
            updates = close(session, want_updates=not made.held).updates
        rates.append(rate)
        answer = session.next_point() if made.held else updates
        assert answer is not None
        answers.append(named(session.layout.views(answer)))
    return session, answers, rates


# -- the same --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_with_the_same_bits(run_of: Callable[[str], Run], name: str) -> None:
    run, made = run_of(name), CASES[name]
    if run.error is not None:
        raise run.error
    session, answers, rates = uninterrupted(made)
    assert run.rates == rates
    for which, got in zip(("it", "its restored checkpoint", "its fork"), run.answers, strict=False):
        for t, (ours, expected) in enumerate(zip(got, answers, strict=True), 1):
            assert ours == expected, f"{which} answered step {t} otherwise"
    expected_state = named(tensors_of(session.recipe, session.state))
    assert all(pictured(file) == expected_state for file in run.files)
    text = [metadata_of(file) for file in run.files]
    workers = [json.loads(found.pop("workers", "{}")) for found in text]
    assert all(found == text[0] for found in text)
    assert all(found.get("round") == workers[0].get("round") for found in workers), "when they came is their own"
    steps = text[0]["step"], text[0].get("moves", text[0]["step"])
    assert steps == (str(session.state.step), str(session.state.moves))
    assert session.state.step == END or made.aggregation.rounds
    if made.held:
        final = named(session.layout.views(session.final_point()))
        assert [pictured(file) for file in run.finals] == [final] * len(run.files)


def test_the_cases_are_all_there_is() -> None:
    assert set(RATES) == set(schedules.KINDS)
    assert set(TRANSFORMS) == set(transforms.KINDS)
    assert {made.aggregation.reduce.kind for made in CASES.values()} == set(reducers.KINDS)
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
