"""What makes figures into pages and pictures. The figures themselves are nothing to test: `make bench` takes them."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as bench
from benchmarks import flame, flame_picture, pictures, push_pull, records, report, scale, scale_tables
from benchmarks.bars import LEFT, MOST, RIGHT, Bar, Missing, Panel, chart
from benchmarks.core_rows import Case, worst
from benchmarks.measure import Cell, Comparison, Held, Idle, NotRun, Result, Round, Row, Sample, grid
from benchmarks.open_loop import percentile
from benchmarks.records import Record
from benchmarks.scale_small import line

ROWS = {row.code: row for row in bench.ROWS}
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = 'a < b & "c" > d'
IDLE = Idle(100.0, 0.0)
STACKS = """\
_run (service/cli.py);Runner.run (asyncio/runners.py);run_forever (loop.c);uv__read (stream.c);read (libc.so.6) 3
Runner.run (asyncio/runners.py);uv_run (core.c);uv__io_poll (linux.c);epoll_pwait (libc.so.6) 50
run_forever (loop.c);App._answer (service/app.py);of_json (service/contributions.py);tensor (service/wire/json.py) 4
send_reply (service/http.py);RequestResponseCycle.send (uvicorn/protocols/http/x.py);write (libc.so.6) 5
Engine._run (service/engine.py);write (service/entries.py);write (service/wire/safetensors.py);0x7f00 (libc.so.6) 2
Committer._append (service/commits.py);Store.append (service/store.py) 6
Session.check (core/session.py);cast (/opt/app/core/layout.py) 1
Thread._bootstrap (threading.py);Thread.run (threading.py);_worker (concurrent/futures/thread.py);wait (libc.so.6) 40
Thread._bootstrap (threading.py);_worker (concurrent/futures/thread.py);adam (core/optimizers/adam.py) 7
"""


def compared(row: Row, values: tuple[float, ...]) -> Comparison:
    rounds = [
        Round({row.ours: Sample(value, {}), row.theirs: Sample(1.0, {})}, {row.ours: IDLE, row.theirs: IDLE})
        for value in values
    ]
    return Comparison(row, "x", rounds)


def figures(row: Row) -> Held:
    samples = [Sample(1.0, {"p99 ms": 10.0, "p99.9 ms": 100.0, "requests": 7.0})] * 3
    return Held(row, "p50 ms", {"at 50 %": samples, "at 80 %": samples}, [IDLE], [])


def turn(values: dict[str, float]) -> Round:
    return Round({name: Sample(value, {"CPU": value}) for name, value in values.items()}, dict.fromkeys(values, IDLE))


def pushed(name: str, rpc: float, tcp: float) -> Cell:
    rounds = [turn({"Ravine": 2.0, "torch RPC": rpc, "torch RPC over TCP": tcp})] * 3
    apart = {"hivemind": [Sample(0.5, {})]}
    return Cell(name, "torch RPC", rounds, apart, {push_pull.ELSEWHERE: "torch RPC over TCP"})


def record(result: Result, *, commit: str = "abc1234", last: float | None = None, cpu: str = "fast") -> Record:
    return Record(result, f"2026-01-0{len(commit) % 9} 10:00 UTC", commit, {"CPU": cpu}, last)


def page(*results: Result) -> str:
    return report.render({each.row.code: record(each) for each in results}, bench.ROWS)


def test_every_row_is_in_one_picture_unless_it_only_holds() -> None:
    drawn = [code for group in pictures.GROUPS for code in group.codes]
    assert sorted(drawn) == sorted(set(drawn))
    assert set(drawn) <= set(ROWS)
    assert {code for code, row in ROWS.items() if not row.holds} <= set(drawn)


def test_bars_are_well_formed_and_end_where_they_should() -> None:
    panel = Panel(HOSTILE, [Bar(HOSTILE, 1.0, 0.5, 1.5, HOSTILE, met=True), Missing(HOSTILE, HOSTILE)])
    root = ElementTree.fromstring(chart(HOSTILE, [panel]))
    assert root.get("aria-label") == HOSTILE
    assert [text.text for text in root.iter(f"{SVG}text")].count(HOSTILE) == 5
    (bar,) = (rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "met")
    (goal,) = (line for line in root.iter(f"{SVG}line") if line.get("class") == "goal")
    assert LEFT + float(bar.get("width", "0")) == pytest.approx(float(goal.get("x1", "0")), abs=0.2)


@pytest.mark.parametrize(("value", "kind"), [(0.5, "missed"), (100.0, "met")])
def test_a_bar_stays_on_the_page(value: float, kind: str) -> None:
    root = ElementTree.fromstring(chart("x", [Panel("x", [Bar("x", value, value, value, "x", met=kind == "met")])]))
    (bar,) = (rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == kind)
    assert 0 < float(bar.get("width", "0")) <= RIGHT - LEFT
    beyond = [path for path in root.iter(f"{SVG}path") if path.get("class") == kind]
    assert len(beyond) == (value > MOST), "what goes beyond says so"


def test_pictures_say_what_was_met(tmp_path: Path) -> None:
    results: list[Result] = [compared(ROWS["S1"], (0.5, 0.6, 0.7)), compared(ROWS["S2"], (1.0, 2.0, 3.0))]
    results += [NotRun(ROWS["L1"], "no | such thing"), figures(ROWS["LS"])]
    drawn = pictures.write(results, tmp_path / "pictures")
    assert set(drawn) == {"pictures/steps.svg", "pictures/latency.svg"}
    texts = {place: (tmp_path / place).read_text() for place in drawn}
    for text in texts.values():
        ElementTree.fromstring(text)
        assert text.count("http") == 1, "nothing from outside but the name of the format"
    steps = texts["pictures/steps.svg"]
    assert "0.60 (0.50–0.70), ≥ 0.45 met" in steps
    assert "2.00 (1.00–3.00), ≥ 6 missed" in steps
    assert "not run: no | such thing" in steps
    assert texts["pictures/latency.svg"].count('class="plain"') == 6
    made = report.render({each.row.code: record(each) for each in results}, bench.ROWS, drawn)
    assert all(f"]({place})" in made for place in drawn)


def test_a_row_without_a_goal_has_its_figures_alone() -> None:
    made = page(figures(ROWS["LL"]))
    assert "| [figures](#ll) | – | – | – |" in made
    assert "| p99.9 ms | 100 (100–100) | 100 (100–100) |" in made


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [0.001 * n for n in range(1, 1001)]
    assert [round(percentile(values, share)) for share in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1000]
    assert round(percentile(values[:400], 0.999)) == 400, "of a few hundred it is the slowest"


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    forms = [Case("adam", [turn({"Ravine": 2.0, "copy": 4.0})], 28, True)]
    results = [
        compared(ROWS["S1"], (0.5, 0.6, 0.7)), NotRun(ROWS["L1"], HOSTILE), figures(ROWS["LS"]),
        grid(ROWS["P1"], "x", [pushed("a", 1.0, 0.5), pushed("b", 4.0, 8.0)], ["said"]),
        worst(ROWS["C3"], "ms", forms, []),
    ]  # fmt: skip
    kept = {each.row.code: record(each, last=0.25) for each in results}
    records.save(tmp_path / "results.json", kept)
    back = records.load(tmp_path / "results.json")
    assert back == kept
    assert report.render(back, bench.ROWS) == report.render(kept, bench.ROWS)
    assert records.load(tmp_path / "none") == {}


def test_a_row_that_is_measured_anew_replaces_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("DATA", "results.json"), ("RESULTS", "RESULTS.md"), ("PICTURES", "pictures")):
        monkeypatch.setattr(bench, name, tmp_path / place)
    first = {code: record(compared(ROWS[code], (1.0,)), commit="old") for code in ("L1", "S1")}
    bench.write(first)
    again = records.record(compared(ROWS["S1"], (0.5,)), {"CPU": "slow"}, "new1234", first["S1"])
    bench.write(records.load(bench.DATA) | {"S1": again, "gone": again})
    made = bench.RESULTS.read_text()
    assert [line.split(" |")[0] for line in made.splitlines() if line.startswith("| ") and "**" in line] == [
        "| S1", "| L1",
    ]  # fmt: skip
    parts = {part.partition("\n")[0]: part for part in made.split("\n## ")}
    assert "commit new1234." in parts["S1"]
    assert "commit old. Not as above: CPU: fast." in parts["L1"]
    assert "**S1 lost 100 % since it was measured last**, from 1.00 to 0.50." in made
    assert "| S2 | the same |" in made, "what was not measured is there, and says so"
    assert (bench.PICTURES / "steps.svg").exists()


def test_a_missed_goal_leads_to_where_it_is_told_why() -> None:
    texts = report.PROFILES.rpartition("/")[2]
    headings = (flame.DOCS / texts).read_text().splitlines()
    anchors = {line.lstrip("#").strip().lower().replace(" ", "-") for line in headings if line.startswith("##")}
    goals = {code for code, row in ROWS.items() if row.at_most is not None or row.at_least is not None}
    assert set(report.HEADINGS) == goals
    assert set(report.HEADINGS.values()) <= anchors
    made = page(compared(ROWS["S1"], (0.1,)), compared(ROWS["S2"], (10.0,)))
    assert made.count(f"({report.PROFILES}#small-steps)") == 2, "in the table and in its section, of S1 alone"


def test_the_ratio_is_to_what_the_goal_names_and_the_other_stands_beside() -> None:
    made = page(grid(ROWS["P1"], "x", [pushed("a", 1.0, 0.5), pushed("b", 4.0, 8.0)], []))
    assert f"**0.50** (0.50–0.50); 0.25 to {push_pull.ELSEWHERE}" in made
    small, large = push_pull.SIZES[0], push_pull.SIZES[1]
    assert [push_pull.could_be_elsewhere(push_pull.RAY, size) for size in (small, large)] == [True, False]
    assert not push_pull.could_be_elsewhere(push_pull.RPC, small)


def test_the_parts_of_a_flame_graph_add_up() -> None:
    stacks = flame.read(STACKS)
    assert sum(stacks.values()) == 28, "without those that wait"
    assert flame.part_of(("event loop", "cast (core/layout.py)")) == flame.LOOP
    counts = dict.fromkeys(flame.NAMES, 0)
    for calls, count in stacks.items():
        counts[flame.part_of(calls)] += count
    assert counts == {
        "HTTP": 0, "parsing": 4, "checking": 1, "entry": 2, "store": 6, "applying": 7, "reply": 5, "event loop": 3,
    }  # fmt: skip
    shares = flame.shares(stacks)
    assert tuple(shares) == flame.NAMES == tuple(flame_picture.COLOURS) == tuple(flame.MEANINGS)
    assert sum(shares.values()) == pytest.approx(100)


def test_a_flame_graph_is_well_formed_and_names_no_machine() -> None:
    stacks = flame.read(STACKS)
    text = flame_picture.render(HOSTILE, stacks, flame.part_of)
    root = ElementTree.fromstring(text)
    assert "/opt/app" not in text
    assert "0x7f00" not in text
    titles = {title.text for title in root.iter(f"{SVG}title")}
    assert "all: 100.0 %" in titles
    assert "adam (core/optimizers/adam.py): 25.0 %" in titles


def test_every_part_is_of_files_that_there_are() -> None:
    """A module that was renamed would fall to its caller's part, silently."""
    for part in flame.PARTS:
        for frame in part.frames:
            if frame.startswith(("service/", "core/")):
                assert (bench.RESULTS.parent.parent / frame).exists(), frame


def test_the_page_has_the_markers_that_make_flame_writes_between() -> None:
    text = flame.PAGE.read_text()
    assert text.count(flame.BEGIN) == text.count(flame.END) == 1
    assert text.index(flame.BEGIN) < text.index(flame.END)


def test_a_line_goes_through_points_that_lie_on_one() -> None:
    found = line([1, 10, 100, 10_000], [7 + 3 * x for x in (1, 10, 100, 10_000)])
    assert (found.fixed, found.slope) == (pytest.approx(7), pytest.approx(3))
    assert found.off == pytest.approx(0, abs=1e-9)


def test_no_cost_is_below_zero() -> None:
    found = line([1, 2, 4], [1, 3, 9])  # least squares would begin at -1.2
    assert found.fixed == 0
    assert 1 < found.slope < 9 / 4
    assert found.off == pytest.approx(max(abs(found.slope * x - y) / y for x, y in ((1, 1), (2, 3), (4, 9))))


def test_the_page_has_a_place_for_each_table_of_make_scale() -> None:
    page = scale.PAGE.read_text()
    made = dict.fromkeys(scale_tables.tables({}), "| a | b |")
    written = scale_tables.put(page, made)
    assert written.count("| a | b |") == len(made) == page.count("<!-- scale: ")
    assert scale_tables.put(written, made) == written
    with pytest.raises(ValueError, match="not one place for the table elsewhere"):
        scale_tables.put(page, {"elsewhere": ""})


def test_what_was_not_measured_says_so() -> None:
    made = scale_tables.tables({})
    assert set(made.values()) == {scale_tables.MISSING}
