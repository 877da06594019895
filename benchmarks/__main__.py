"""`python -m benchmarks [--update] [ROW…]`: runs the rows that are named, or all, and writes what it found."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from benchmarks import (
    core_rows,
    held,
    idle_sessions,
    large_steps,
    latency,
    machine,
    one_session,
    overload,
    pictures,
    pulls,
    push_pull,
    records,
    replicas,
    report,
    session_memory,
    small_steps,
)
from benchmarks.measure import NotRun, Plan, Result
from benchmarks.records import Record

DATA = Path(__file__).parent / "results.json"
RESULTS = Path(__file__).parent / "RESULTS.md"
PICTURES = Path(__file__).parent / "pictures"
GROUPS = (
    core_rows, small_steps, large_steps, push_pull, one_session, pulls, idle_sessions, session_memory, replicas, held,
    overload, latency,
)  # fmt: skip
ROWS = [row for group in GROUPS for row in group.ROWS]
CODES = [row.code for row in ROWS]
LEAST_ROUNDS = 5


def main() -> None:
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it all that was started
    rows = given.rows or CODES
    whole = set(rows) == set(CODES)
    kept = records.load(DATA)
    commit, about = machine.commit(), machine.describe()
    found: dict[str, Record] = {}
    with tempfile.TemporaryDirectory(prefix="ravine-bench-") as directory:
        plan = Plan(given.rounds, given.seconds, Path(directory))
        for result in _results(rows, plan):
            code = result.row.code
            found[code] = records.record(result, about, commit, kept.get(code))
            if whole or (given.update and not isinstance(result, NotRun)):
                write(kept | found)
    print(report.render(found, [row for row in ROWS if row.code in found]))
    if failed := [code for code, each in found.items() if isinstance(each.result, NotRun)]:
        sys.exit(f"not measured: {', '.join(failed)}" + ("; what was there of them stays" if given.update else ""))


def _results(rows: Collection[str], plan: Plan) -> Iterator[Result]:
    for group in GROUPS:
        if any(row.code in rows for row in group.ROWS):
            yield from group.run(rows, plan)


def write(found: Mapping[str, Record]) -> None:
    """results.json, and what is made of it. Rows that there are no more go."""
    kept = {row.code: found[row.code] for row in ROWS if row.code in found}
    records.save(DATA, kept)
    drawn = pictures.write([each.result for each in kept.values()], PICTURES)
    RESULTS.write_text(report.render(kept, ROWS, drawn))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(CODES)}; left out: all, and all is written"
    )
    parser.add_argument(
        "--update", action="store_true", help="put the rows that are named in place of what was measured"
    )
    parser.add_argument(
        "--rounds", type=int, default=LEAST_ROUNDS, help=f"turns of each contestant, at least {LEAST_ROUNDS}"
    )
    parser.add_argument("--seconds", type=int, default=4, help="length of a turn of the server rows")
    given = parser.parse_args()
    if unknown := sorted(set(given.rows) - set(CODES)):
        parser.error(f"there is no row {unknown[0]}; there are {', '.join(CODES)}")
    if given.rounds < LEAST_ROUNDS or given.seconds < 1:
        parser.error(f"at least {LEAST_ROUNDS} rounds, of at least 1 second")
    if sys.platform != "linux":
        parser.error("the benchmarks read /proc and pin processes to cores: they need Linux")
    return given


if __name__ == "__main__":
    main()
