"""`python -m benchmarks [ROW…]`: runs the rows that are named, or all of them and writes RESULTS.md."""

import argparse
import signal
import sys
import tempfile
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
    replicas,
    report,
    session_memory,
    small_steps,
)
from benchmarks.measure import Plan, Result, say

RESULTS = Path(__file__).parent / "RESULTS.md"
PICTURES = Path(__file__).parent / "pictures"
GROUPS = (
    core_rows, small_steps, large_steps, push_pull, one_session, pulls, idle_sessions, session_memory, replicas, held,
    overload, latency,
)  # fmt: skip
CODES = [row.code for group in GROUPS for row in group.ROWS]
LEAST_ROUNDS = 5


def main() -> None:
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it all that was started
    rows = given.rows or CODES
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="ravine-bench-") as directory:
        plan = Plan(given.rounds, given.seconds, Path(directory))
        for group in GROUPS:
            if any(row.code in rows for row in group.ROWS):
                results += group.run(rows, plan)
    before = report.earlier(RESULTS.read_text()) if RESULTS.exists() else {}
    whole = set(rows) == set(CODES)
    drawn = pictures.write(results, PICTURES) if whole else {}
    page = report.render(machine.describe(), results, before, drawn)
    print(page)
    if whole:
        RESULTS.write_text(page)
        say("written to benchmarks/RESULTS.md and benchmarks/pictures/")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(CODES)}; left out: all")
    parser.add_argument("--rounds", type=int, default=7, help=f"turns of each contestant, at least {LEAST_ROUNDS}")
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
