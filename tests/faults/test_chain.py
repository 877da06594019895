"""The check of all fault tests finds what it is there to find; and under a bounded share of the faults, nothing."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.faults import __main__ as runner
from tests.faults import injections
from tests.faults import load as loads
from tests.faults.chain import Entry, Evidence, Faults, Line, Replayed, Reply, Told, check, outcome
from tests.faults.cutter import CUTS, cutting
from tests.faults.injections import Scenario
from tests.faults.load import PLAIN, Load
from tests.faults.outcome import Outcome
from tests.faults.rounds import until
from tests.running import Server, serving

KINDS = ("lost", "doubled", "broken", "differ", "hangs")


# -- records made by hand ----------------------------------------------------------------------------------------------


def replay(lines: Sequence[Line]) -> Replayed:
    """A state that is nothing but what was applied, in its order."""
    applied, steps = "", []
    for line in lines:
        applied += "+".join(line.keys) + ";"
        steps.append(applied)
    return Replayed(steps, applied)


STATES = replay([Line(t, f"c{t}", (f"w0 {t}",)) for t in range(1, 5)]).steps


def reply(number: int, **changed: object) -> Reply:
    """What is told of the contribution `w0 number`, which is sent at that second and answered half a second later."""
    made = Reply(f"w0 {number}", float(number), number + 0.5, number, f"c{number}", digest=STATES[number - 1])
    return made._replace(**changed)  # type: ignore[arg-type]


def whole(**changed: object) -> Evidence:
    """Four steps of one worker, with nothing wrong; `changed` replaces members of it."""
    numbers = range(1, 5)
    made = Evidence(
        "ses_1",
        origin="c0",
        head="c4",
        rounds=False,
        begun={f"w0 {t}": float(t) for t in numbers},
        replies=[reply(t) for t in numbers],
        lines=[Line(t, f"c{t}", (f"w0 {t}",)) for t in numbers],
        entries=[Entry(f"c{t}", f"c{t - 1}", f"w0 {t}") for t in numbers],
        finals=[STATES[-1], STATES[-1]],
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def with_replies(**changed: dict[str, object]) -> Evidence:
    """`_2={…}` changes what was told of the second contribution."""
    return whole(replies=[reply(t, **changed.get(f"_{t}", {})) for t in range(1, 5)])


def with_more(*replies: Reply) -> Evidence:
    return whole(replies=[*whole().replies, *replies])


def cut(*numbers: int, **changed: object) -> Evidence:
    """The store has the steps `numbers` of the four, as far as they follow on each other, under steps of their own."""
    lines = [Line(step, f"c{t}", (f"w0 {t}",)) for step, t in enumerate(numbers, 1)]
    entries = [Entry(f"c{t}", f"c{before}", f"w0 {t}") for before, t in zip((0, *numbers), numbers, strict=False)]
    head, final = lines[-1].commit, replay(lines).final
    return whole(**({"lines": lines, "entries": entries, "head": head, "finals": [final]} | changed))


def found(evidence: Evidence) -> dict[str, int]:
    faults = check(evidence, replay)
    return {kind: getattr(faults, kind) for kind in KINDS if getattr(faults, kind)}


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found(whole()) == {}


def test_what_nobody_heard_of_may_be_there_or_not() -> None:
    assert found(whole(replies=[reply(t) for t in (1, 3)])) == {}
    assert found(cut(1, 2, 3, replies=[reply(t) for t in (1, 2, 3)])) == {}


def test_a_repeat_that_is_known_is_no_fault() -> None:
    again = reply(2, begun=5.0, ended=5.5, step=4, commit="c4", replayed=True, digest=STATES[3])
    assert found(with_more(again)) == {}


def test_an_entry_that_was_cut_off_the_log_is_no_fault() -> None:
    assert found(whole(entries=whole().entries[2:])) == {}
    assert found(whole(entries=[])) == {}


def test_a_lost_step_at_the_end() -> None:
    assert found(cut(1, 2, 3)) == {"lost": 1, "broken": 1}  # and its commit is on no line


def test_a_lost_step_in_the_middle() -> None:
    """The steps after it have other numbers than their senders were told."""
    assert found(cut(1, 2, 4))["lost"] == 1


def test_what_was_acknowledged_and_forgotten_is_lost() -> None:
    """It came again before anybody missed it, so that it is on the line: its sender heard of two steps."""
    late = reply(2, begun=5.0, ended=5.5)
    assert found(with_more(late)) == {"lost": 1, "broken": 1}


def test_a_contribution_that_waited_in_a_round_and_was_forgotten_is_lost() -> None:
    waits = reply(2, begun=1.6, ended=1.7, step=1, commit="c1", pending=True, digest=None)
    assert found(with_more(waits)) == {"lost": 1}  # then it was new, at step 2
    known = with_replies(_2={"replayed": True})
    assert found(replace(known, replies=[*known.replies, waits])) == {}


def test_a_doubled_step() -> None:
    lines = [Line(1, "c1", ("w0 1",)), Line(2, "c2", ("w0 2",)), Line(3, "cx", ("w0 2",))]
    entries = [Entry("c1", "c0", "w0 1"), Entry("c2", "c1", "w0 2"), Entry("cx", "c2", "w0 2")]
    final = replay(lines).final
    doubled = whole(lines=lines, entries=entries, head="cx", finals=[final], replies=[reply(1), reply(2)])
    assert found(doubled) == {"doubled": 1}


def test_a_key_that_is_twice_in_a_round() -> None:
    """The history has one line for the round, so the log must say it."""
    entries = [Entry("a", "c3", "w0 4"), Entry("b", "a", "w0 4"), Entry("c4", "b", None)]
    assert found(whole(rounds=True, entries=entries)) == {"doubled": 1}


@pytest.mark.parametrize(("counted", "kind"), [(3, "lost"), (5, "doubled")])
def test_contributions_to_rounds_are_as_many_as_the_service_counts(counted: int, kind: str) -> None:
    assert found(whole(rounds=True, counted={"w0": counted})) == {kind: 1}
    assert found(whole(rounds=True, counted={"w0": 4})) == {}


def test_a_chain_that_is_broken() -> None:
    entries = [*whole().entries[:2], Entry("c3", "c1", "w0 3"), Entry("c4", "c3", "w0 4")]
    assert found(whole(entries=entries)) == {"broken": 1}
    assert found(whole(head="cx")) == {"broken": 1}


def test_two_acknowledgements_of_one_step() -> None:
    """As replicas give them that do not see each other: two are told the third step, and one of them is on the line."""
    other = Reply("w1 1", 3.0, 3.5, 3, "cx")
    split = with_more(other)
    lines = [*split.lines[:3], Line(3, "cx", ("w1 1",)), split.lines[3]]
    assert {"lost", "broken"} <= found(replace(split, lines=lines, begun={**split.begun, "w1 1": 3.0})).keys()


def test_a_commit_that_is_on_no_line() -> None:
    assert found(with_replies(_2={"commit": "cx"})) == {"broken": 1}


def test_a_step_that_is_not_the_one_that_was_told() -> None:
    assert found(with_replies(_2={"step": 3, "commit": "c3", "digest": None})) == {"broken": 1}


def test_a_contribution_that_nobody_sent() -> None:
    begun = {key: at for key, at in whole().begun.items() if key != "w0 3"}
    assert found(whole(begun=begun, replies=[reply(t) for t in (1, 2, 4)])) == {"broken": 1}


def test_an_order_against_real_time() -> None:
    """The second was begun when the third had been acknowledged."""
    late = with_replies(_2={"begun": 3.6, "ended": 3.9})
    assert found(replace(late, begun={**late.begun, "w0 2": 3.6})) == {"broken": 2}  # and it was told an older step


def test_a_reader_who_sees_the_past() -> None:
    assert found(with_more(reply(2, begun=6.0, ended=6.5, replayed=True))) == {"broken": 1}
    same_moment = reply(2, begun=2.4, ended=6.5, replayed=True)
    assert found(with_more(same_moment)) == {}


def test_those_of_one_round_are_in_no_order() -> None:
    lines = [Line(1, "c1", ("w0 1", "w1 1"))]
    state = replay(lines).final
    replies = [Reply(key, begun, 9.0, 1, "c1", digest=state) for key, begun in (("w0 1", 1.0), ("w1 1", 8.0))]
    first = Reply("w0 1", 1.0, 2.0, 0, "c0", pending=True)
    known = replies[0]._replace(begun=3.0, replayed=True)
    begun = {"w0 1": 1.0, "w1 1": 8.0}
    one = whole(rounds=True, begun=begun, replies=[first, known, replies[1]], lines=lines, entries=[], finals=[state])
    assert found(one) == {}


def test_a_wrong_bit_in_the_end() -> None:
    assert found(whole(finals=[STATES[-1], STATES[-1] + "x"])) == {"differ": 1}


def test_a_wrong_bit_on_the_way() -> None:
    assert found(with_replies(_2={"digest": STATES[1] + "x"})) == {"differ": 1}


def test_updates_are_those_of_the_step_of_the_key() -> None:
    late = reply(2, begun=5.0, ended=5.5, step=2, replayed=True, current=False, own=True)
    assert found(with_more(late)) == {}
    assert found(with_more(late._replace(digest=STATES[2]))) == {"differ": 1}


def test_somebody_who_got_no_answer() -> None:
    assert found(whole(hangs=2)) == {"hangs": 2}


def test_an_answer_that_no_client_should_get() -> None:
    assert found(whole(refused=["w0 3 was refused: 500"])) == {"broken": 1}


BACK_TO_2 = Told((4, "c4"), (2, "c2"))


def test_a_tail_that_is_lost_and_told_of_is_excused() -> None:
    assert found(cut(1, 2, told=BACK_TO_2, finals=[])) == {}


def test_what_is_told_excuses_nothing_before_it() -> None:
    assert found(cut(1, told=BACK_TO_2, finals=[])).keys() >= {"lost", "broken"}


def test_a_session_that_went_on_after_it_was_told_lost() -> None:
    assert found(cut(1, 2, 4, told=BACK_TO_2, finals=[])).keys() >= {"broken"}


def test_rows_add_up() -> None:
    one = outcome("kill", 3, [Faults(lost=1, broken=2), Faults(differ=4)], hangs=1)
    assert one == Outcome("kill", 3, lost=1, doubled=0, broken=2, differ=4, hangs=1)
    assert runner.added(one, one) == Outcome("kill", 6, 2, 0, 4, 8, 2)


# -- the runner --------------------------------------------------------------------------------------------------------


def run_of(*scenarios: Scenario) -> runner.Run:
    run = runner.Run({str(i): 4 for i in range(len(scenarios))}, seed=1)
    while (name := run.next()) is not None:
        run.bring_about(name, scenarios[int(name)])
    return run


def test_a_run_goes_on_until_every_goal_is_there() -> None:
    run = run_of(lambda _, __: Outcome("a", 1), lambda _, __: Outcome("b", 3))
    assert [row.injected for row in run.rows.values()] == [4, 6]
    assert not runner.faulty(run.rows.values())


def test_what_cannot_be_brought_about_is_left() -> None:
    assert [row.injected for row in run_of(lambda _, __: Outcome("a", 0)).rows.values()] == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_any_fault_fails_the_run(kind: str) -> None:
    made = Outcome("a", 4, **{kind: 1})
    assert runner.faulty(run_of(lambda _, __: made).rows.values())


def test_a_scenario_that_breaks_off_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks_off(_: Path, seed: int) -> Outcome:
        raise AssertionError("the store did not start")

    run = run_of(breaks_off)
    assert runner.faulty(run.rows.values())
    assert "the store did not start" in capsys.readouterr().err


def test_a_control_that_finds_nothing_fails_the_run() -> None:
    assert not runner.found_out(Outcome("control", 1, broken=3, differ=2))
    assert runner.found_out(Outcome("control", 1, lost=1))


def test_the_table_has_a_row_for_each() -> None:
    lines = runner.table([Outcome("kill", 12), Outcome("cut", 3, lost=1)], {"kill": 90.0}).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["kill", "12", "0", "0", "0", "0", "0", "1.5"],
        ["cut", "3", "1", "0", "0", "0", "0", "0.0"],
    ]


def test_every_goal_is_of_a_scenario() -> None:
    assert runner.GOALS.keys() == runner.SCENARIOS.keys()


# -- real servers ------------------------------------------------------------------------------------------------------


def test_the_check_finds_out_a_service_that_does_not_look_at_the_head(tmp_path: Path) -> None:
    """The negative control: two replicas race, and neither looks whether the other has written since."""
    row = injections.blind(tmp_path, seed=1)
    assert row.lost > 0
    assert row.broken > 0
    assert row.lost + row.doubled > 1


def test_a_server_that_does_not_answer_is_a_hang(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is asked and stands still: SIGSTOP, and nobody tells its clients."""
    monkeypatch.setattr(loads, "REPLY_SECONDS", 0.5)
    with serving(data, environment={"RAVINE_JIT": "false"}) as server:
        load = Load(lambda: [server.url], 1, (PLAIN,)).start()
        injections.progress(load, 3)
        with standing_still(server):
            until(lambda: load.over)
            load.stop()
        (faults,) = load.check(server.store_url(), [server.url])
    assert faults.hangs > 0
    assert (faults.lost, faults.doubled, faults.broken, faults.differ) == (0, 0, 0, 0)


@contextlib.contextmanager
def standing_still(server: Server) -> Iterator[None]:
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


SHARE: dict[str, Callable[[Path, int], Outcome]] = {
    "kill": partial(injections.kill, count=12),
    "before-append": injections.kill_at("before-append", count=6),
    "after-staging": injections.kill_at("after-staging", count=4),
    "after-append": injections.kill_at("after-append", count=6),
    "before-reply": injections.kill_at("before-reply", count=6),
    "store": partial(injections.kill_store, count=8),
    "store on snapshots": partial(injections.kill_store_on_snapshots, count=1),
    "both": partial(injections.kill_both, count=4),
    "store link": partial(injections.cut_from_store, count=16),
    "client link": partial(injections.cut_from_clients, count=16),
    "sigterm": partial(injections.terminate, count=4),
}


@pytest.mark.parametrize("name", SHARE)
def test_nothing_acknowledged_is_lost_or_doubled(name: str, tmp_path: Path) -> None:
    row = SHARE[name](tmp_path, 4 + list(SHARE).index(name))
    assert row.injected > 0
    assert row == Outcome(row.name, row.injected)


def test_a_connection_that_was_cut_was_cut(server: Server) -> None:
    """Each way: the client hears nothing, or half, and the next one goes through."""
    with cutting(server.url, seed=1) as cutter:
        with httpx.Client(base_url=cutter.url, timeout=10) as client:
            assert client.get("/livez").status_code == 200
        for way in CUTS[:3]:
            cutter.arm(way)
            with httpx.Client(base_url=cutter.url, timeout=10) as client:
                with pytest.raises(httpx.TransportError):
                    client.get("/livez")
                assert cutter.hit.is_set()
                assert client.get("/livez").status_code == 200
