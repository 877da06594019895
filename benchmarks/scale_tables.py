"""The figures of scale.json as the tables of docs/scaling.md, each between two comments that name it.

What was not measured says so in its place, so that the page can be read before all parts have run. Everything in the
first table is arithmetic over the others, written out in its last column.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import simulate

MISSING = "Not measured yet: `make scale`."
# What "one machine" and "one cluster" are in the first table.
MACHINE = "one machine: 16 cores, 64 GB"
CLUSTER = "one cluster: 4 such store nodes, 32 processes"
MACHINE_WORKERS, CLUSTER_WORKERS, CLUSTER_NODES = 8, 32, 4
STORE_BYTES = 64e9
# A snapshot is written beside the old one and the log, a rewrite of the log copies what changes meanwhile.
FILLED = 0.5
HOT_BYTES = 1e9

Figures = Mapping[str, Any]


def tables(found: Figures) -> dict[str, str]:
    """Name -> table. Names are those of the comments."""
    made: dict[str, str] = {}
    with contextlib.suppress(KeyError):
        found = {**found, "reckoned": simulate.reckoned(found)}
    for name, table in _TABLES.items():
        try:
            made[name] = "\n".join(table(found))
        except KeyError:
            made[name] = MISSING
    return made


def put(page: str, made: Mapping[str, str]) -> str:
    """The page with these tables. Raises ValueError where it has no place for one."""
    for name, table in made.items():
        begin, end = f"<!-- scale: {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page has not one place for the table {name}")
        page = pattern.sub(lambda _, text=f"{begin}\n\n{table}\n\n{end}": text, page)
    return page


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def _number(value: float) -> str:
    """Three digits: more would be noise."""
    if value >= 100:
        digits = len(f"{value:.0f}")
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{_number(value / size)} {unit}"
    return f"{_number(value)} B"


def _carries(found: Figures) -> Iterator[str]:
    busiest, sessions = found["requests"]["points"][-1], found["sessions"]
    reckoned = {(row.workers, row.nodes): row for row in found["reckoned"]}
    machine, cluster = reckoned[MACHINE_WORKERS, 1], reckoned[CLUSTER_WORKERS, CLUSTER_NODES]
    lines = found["steps"]["lines"]["params"]
    service, store = 1e3 / lines["service ms"]["ms a MB"], 1e3 / lines["store ms"]["ms a MB"]
    kept = FILLED * STORE_BYTES / sessions["store bytes"]
    largest = max(found["steps"]["points"], key=lambda point: point["size"])
    once = FILLED * STORE_BYTES / (largest["store peak bytes"] / largest["size"])
    rows = [
        ("small steps/s", _number(1e6 / busiest["service µs"]), _number(machine.top), _number(cluster.top),
         f"10⁶ / {busiest['service µs']:.0f} µs; simulated with {MACHINE_WORKERS} and {CLUSTER_WORKERS} processes"),
        ("what is full then", "the process", machine.bound, cluster.bound, "the busier of the two"),
        ("gradients in MB/s, parameters back", _number(service),
         _number(min(MACHINE_WORKERS * service, store)),
         _number(min(CLUSTER_WORKERS * service, CLUSTER_NODES * store)),
         f"CPU of a MB: service {1e3 / service:.2f} ms, store {1e3 / store:.2f} ms"),
        ("idle sessions of 10 parameters", f"{_number(HOT_BYTES / sessions['service bytes'])} hot a GB", _number(kept),
         _number(CLUSTER_NODES * kept),
         f"{sessions['service bytes']:,.0f} B hot, {sessions['store bytes']:,.0f} B in a store that is half full"),
        ("parameters in one session (Adam)", "–", _number(once), "as one machine: a session has one node",
         f"store at its peak: {largest['store peak bytes'] / largest['size']:.0f} B a parameter; "
         "settings allow 268 M a body, 357 M a session until they are raised"),
        ("parameters in one model, in parts", "–", _number(once), _number(CLUSTER_NODES * once), "times the nodes"),
    ]  # fmt: skip
    yield from _rows(["", "one core", MACHINE, CLUSTER, "arithmetic"], rows)


def _small(found: Figures) -> Iterator[str]:
    rows = [
        (f"{point['connections']}", *(_number(point[name]) for name in _SMALL)) for point in found["requests"]["points"]
    ]
    for name, kind in (("staying", "clients stay with a home"), ("changing", "clients go round")):
        point = found["workers"][name]
        workers = found["workers"]["workers"]
        label = f"{point['connections']}, {workers} workers, {kind}"
        rows.append((label, *(_number(point[figure]) for figure in _SMALL)))
    for nodes, point in found["cluster"].items():
        if nodes.isdigit():
            label = f"{point['connections']}, cluster of {nodes}"
            rows.append((label, *(_number(point[figure]) for figure in _SMALL)))
    head = ["connections", "steps/s", "p50 ms", "service, µs CPU a step", "store, µs CPU a step", "turns a step"]
    yield from _rows(head, rows)
    service, store = found["requests"]["service"], found["requests"]["store"]
    yield ""
    for name, line in (("service", service), ("store", store)):
        yield (
            f"- {name}: {line['a step µs']:.0f} µs a step + {line['a turn µs']:.0f} µs · turns a step "
            f"(no point is further from it than {100 * line['off']:.0f} %)"
        )


_SMALL = ("steps/s", "p50 ms", "service µs", "store µs", "turns a step")


def _steps(found: Figures) -> Iterator[str]:
    head = [
        "float32",
        "back",
        "ms a step",
        "service, ms CPU",
        "store, ms CPU",
        "to the store, a step",
        "of it snapshots",
    ]
    rows = [
        (
            f"{point['size']:,}", point["answer"], _number(point["ms"]), _number(point["service ms"]),
            _number(point["store ms"]), _bytes(point["to the store, bytes a step"]),
            _bytes(max(0.0, point["to the store, bytes a step"] - point["entry bytes"])),
        )
        for point in found["steps"]["points"]
    ]  # fmt: skip
    yield from _rows(head, rows)
    yield ""
    for answer, lines in found["steps"]["lines"].items():
        for name, line in lines.items():
            what = {"ms": "a step takes", "service ms": "the service's CPU", "store ms": "the store's CPU"}[name]
            yield (
                f"- {answer} back, {what}: {line['fixed ms']:.2f} ms + {line['ms a MB']:.2f} ms · MB of gradient "
                f"(within {100 * line['off']:.0f} %)"
            )


def _memory(found: Figures) -> Iterator[str]:
    head = [
        "float32",
        "back",
        "state",
        "service, peak",
        "service, at rest",
        "store, peak",
        "store, at rest",
        "of it data",
    ]
    names = ("service peak bytes", "service rest bytes", "store peak bytes", "store rest bytes", "stored bytes")
    rows = [
        (f"{point['size']:,}", point["answer"], _bytes(point["state bytes"]), *(_bytes(point[name]) for name in names))
        for point in found["steps"]["points"]
    ]
    yield from _rows(head, rows)
    yield ""
    largest = [point for point in found["steps"]["points"] if "disk bytes" in point][-1]
    yield f"Disk after the steps of {largest['size']:,}: {_bytes(largest['disk bytes'])}."


def _sessions(found: Figures) -> Iterator[str]:
    figures = found["sessions"]
    rows = [
        ("idle session, in the store", _bytes(figures["store bytes"]), _bytes(1e6 * figures["store bytes"])),
        ("idle session, hot in the service", _bytes(figures["service bytes"]), _bytes(1e6 * figures["service bytes"])),
        (
            "session that is not hot, in the service",
            _bytes(figures["known bytes"]),
            _bytes(1e6 * figures["known bytes"]),
        ),
        ("entry of the log, its line of history included", _bytes(figures["entry bytes"]), "–"),
    ]
    yield from _rows(["of 10 parameters, Adam", "each", "a million (extrapolated)"], rows)
    yield ""
    yield (
        f"Measured with {figures['count']:,} sessions. To make one costs {_number(figures['making, service µs'])} µs "
        f"of CPU in the service and {_number(figures['making, store µs'])} µs in the store; to load one that is not "
        f"hot, {_number(figures['loading, service µs'])} and {_number(figures['loading, store µs'])} µs."
    )


def _starts(found: Figures) -> Iterator[str]:
    figures = found["starts"]
    size = figures["stored bytes"] / 1e9
    rows = []
    for name in ("stopped in order", "service killed", "service and store killed"):
        point = figures[name]
        since = point["step s"] - point["listens s"]
        cpu = point["service CPU s"] + point["store CPU s"]
        seconds = (point["listens s"], point["step s"], since / size, cpu / size)
        rows.append((name, *(f"{each:.2f}" for each in seconds), _bytes(point["service peak bytes"])))
    head = ["", "listens after, s", "first step answered after, s", "from listening to it, s a GB stored"]
    yield from _rows([*head, "CPU of that, s a GB", "service, peak"], rows)
    yield ""
    yield (
        f"{figures['size']:,} float32, Adam: state {_bytes(figures['state bytes'])}, in the store "
        f"{_bytes(figures['stored bytes'])}, on disk {_bytes(figures['disk bytes'])}."
    )


def _parts(found: Figures) -> Iterator[str]:
    figures = found["parts"]
    rows = []
    for name, point in figures.items():
        if isinstance(point, dict) and "ms" in point:
            place, _, count = name.partition(", ")
            stored = ", ".join(_bytes(each) for each in point["stored bytes, each"])
            peak = ", ".join(_bytes(each) for each in point["store peak bytes, each"])
            cpu = (_number(point["service ms"]), _number(point["store ms"]))
            peaks = (_bytes(point["service peak bytes"]), peak)
            rows.append((place, count, _number(point["ms"]), *cpu, *peaks, stored))
    head = ["store", "sessions", "ms a step of the model", "service, ms CPU", "store, ms CPU", "service, peak"]
    yield from _rows([*head, "each node, peak", "each node, data"], rows)
    yield ""
    yield f"A model of {figures['size']:,} float32, Adam, parameters back; steps of all parts sent at once."


def _compared(found: Figures) -> Iterator[str]:
    rows = [
        (row.what, row.unit, _number(row.measured), _number(row.simulated), f"{row.off:+.0%}")
        for row in simulate.compared(found)
    ]
    yield from _rows(["one process", "", "measured", "simulated", "off by"], rows)


def _reckoned(found: Figures) -> Iterator[str]:
    rows = [
        (
            row.nodes, row.workers, _number(row.top), _number(1e3 * row.p99), row.bound,
            f"{100 * row.process:.0f} %", f"{100 * row.node:.0f} %",
        )
        for row in found["reckoned"]
    ]  # fmt: skip
    head = ["store nodes", "processes", "top rate, steps/s", f"p99 ms at {100 * simulate.PLANNED:.0f} % of it"]
    yield from _rows([*head, "full first", "busiest process", "busiest node"], rows)


def _taken(found: Figures) -> Iterator[str]:
    yield from (f"- {name}: {value}" for name, value in found["machine"].items())
    for name, part in found.items():
        if isinstance(part, dict) and "taken" in part:
            taken = part["taken"]
            yield (
                f"- `{name}`: {taken['when']}, commit {taken['commit']}, {taken['idle %']:.0f} % idle before, "
                f"{taken['seconds']:.0f} s"
            )


_TABLES: dict[str, Callable[[Figures], Iterator[str]]] = {
    "carries": _carries,
    "small": _small,
    "steps": _steps,
    "memory": _memory,
    "sessions": _sessions,
    "starts": _starts,
    "parts": _parts,
    "compared": _compared,
    "reckoned": _reckoned,
    "taken": _taken,
}
