"""What one core, one machine and one cluster carry, from what a request, a byte and a session cost: `make scale`.

    python -m benchmarks.scale                      all parts, some ten minutes; writes scale.json and docs/scaling.md
    python -m benchmarks.scale requests delays      these parts; the others stay as they were in scale.json
    python -m benchmarks.scale --largest 1000000 --to x.json      a try: small sizes, elsewhere, no page

    requests    CPU of a small step in one process, by how many are under way        (scale_small)
    workers     the same in two processes on one port
    cluster     the same on a cluster of one and of three nodes
    delays      latency in an open loop: what the simulation is held against
    sessions    bytes of an idle session, of an entry of its log
    steps       time, CPU, memory and bytes of steps of 10 K to 100 M float32           (scale_large)
    starts      how long a 100 M session takes to answer after a start, and after kill -9
    parts       a 100 M model as one session and as eight, on one store and on three nodes

Each part says in scale.json when, at which commit and on how idle a machine it was taken. From these figures `simulate`
reckons larger systems, and `scale_tables` writes the tables of docs/scaling.md. Needs wrk, 16 GB of memory and 20 GB
of disk in TMPDIR for 100 M, which it gives back.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from redis import RedisError

from benchmarks import machine, scale_large, scale_small, scale_tables
from benchmarks.measure import Unmeasured, say, watch

FILE = Path(__file__).parent / "scale.json"
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"

Part = Callable[[Path, argparse.Namespace], dict[str, Any]]

PARTS: dict[str, Part] = {
    "requests": lambda place, given: scale_small.requests(place, given.seconds),
    "workers": lambda place, given: scale_small.workers(place, given.seconds),
    "cluster": lambda place, given: scale_small.cluster(place, given.seconds),
    "delays": lambda place, given: scale_small.delays(place, given.seconds),
    "sessions": lambda place, given: scale_small.sessions(place, given.sessions),
    "steps": lambda place, given: scale_large.steps(place, given.seconds, given.largest),
    "starts": lambda place, given: scale_large.starts(place, given.largest),
    "parts": lambda place, given: scale_large.parts(place, given.seconds, given.largest),
}


def main() -> None:
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it all that was started
    found: dict[str, Any] = json.loads(given.to.read_text()) if given.to.exists() else {}
    about = machine.describe()
    if not given.tables:
        found["machine"] = {name: about[name] for name in ("CPU", "Memory", "Kernel", "Python", "Packages", "Store")}
    for name in () if given.tables else given.parts or PARTS:
        say(name)
        started, idle = time.perf_counter(), watch(1.0)
        with tempfile.TemporaryDirectory(prefix="ravine-scale-") as directory:
            place = Path(directory) / name
            place.mkdir()
            try:
                figures = PARTS[name](place, given)
            except (Unmeasured, OSError, HTTPException, RedisError) as reason:  # the other parts are worth having
                say(f"  not measured: {type(reason).__name__}: {reason}")
                continue
        taken = {"when": machine.moment(), "commit": machine.commit(), "idle %": idle.idle, "cores": os.cpu_count()}
        found[name] = figures | {"taken": taken | {"seconds": time.perf_counter() - started}}
        given.to.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    tables = scale_tables.tables(found)
    print("\n\n".join(tables.values()))
    if given.to.resolve() == FILE.resolve():
        PAGE.write_text(scale_tables.put(PAGE.read_text(), tables))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description="What a core, a machine, a cluster carry.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, or none; left out: all")
    parser.add_argument("--largest", type=int, default=scale_large.SIZES[-1], help="parameters of the largest session")
    parser.add_argument("--sessions", type=int, default=5_000, help="how many idle ones are made")
    parser.add_argument("--seconds", type=int, default=4, help="how long a case is measured")
    parser.add_argument("--to", type=Path, default=FILE, help="where the figures go; the page only with scale.json")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the tables anew")
    given = parser.parse_args()
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    if sys.platform != "linux":
        parser.error("it reads /proc: it needs Linux")
    return given


if __name__ == "__main__":
    main()
