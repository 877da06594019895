"""What bytes cost: steps of 10 K to 100 M float32, a model in parts, and a large session after a start.

A client sends one prepared safetensors body again and again, by `large_steps.Client`. Memory is that of the processes,
at its peak (`VmHWM`, reset before) and three seconds after the last step.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.large_steps import COMPILE_SECONDS, MEDIA, Client, Request, file_head, gradient, new_session
from benchmarks.measure import Unmeasured, say
from benchmarks.processes import Server, call
from benchmarks.scale_small import Figures, line
from benchmarks.sites import SERVICE, STORE, Site, clustered, embedded, kill

SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
# Adam's state outweighs a gradient three times, so that every third step brings a snapshot: whole cycles of these.
LEAST_STEPS, WARM_STEPS = 9, 3
# What the optimizer is compiled with before anything is measured.
COMPILED = 100_000
PARTS = 8
NODES = 3
REST_SECONDS = 3
ANSWERS = {"params": "", "none": "?return=none"}
# All parts of the largest model stay in memory together.
SETTINGS = {"RAVINE_MEMORY": "8GiB"}


def body(size: int) -> bytes:
    """A gradient of (size,) float32: the same thousand numbers over and over."""
    return file_head(size) + np.resize(gradient(1001).astype("<f4"), size).tobytes()


def opened(server: Server, size: int, content: bytes) -> str:
    path = new_session(server, size)
    call(server.url, "PUT", path + "/params", content, MEDIA)
    return path


def stepped(client: Client) -> None:
    status = client.exchange().status
    if status != 200:
        raise Unmeasured(f"a step was answered {status}")


def steps(directory: Path, seconds: int, largest: int) -> Figures:
    """Time, CPU and bytes of a step by its size, and the line through these."""
    points = []
    for size in (size for size in SIZES if size <= largest):
        place = directory / str(size)
        with embedded(place, SETTINGS) as site:
            points += _of_size(site, size, seconds)
            points[-1]["disk bytes"] = _disk(place)
        shutil.rmtree(place)
    fits = {answer: _fits([point for point in points if point["answer"] == answer]) for answer in ANSWERS}
    return {"points": points, "lines": fits}


def _fits(points: Sequence[Figures]) -> Figures:
    sizes = [point["body bytes"] for point in points]
    found = {}
    for name in ("ms", "service ms", "store ms"):
        fixed, slope, off = line(sizes, [max(point[name], 1e-3) for point in points])
        found[name] = {"fixed ms": fixed, "ms a MB": 1e6 * slope, "off": off}
    return found


def _of_size(site: Site, size: int, seconds: int) -> list[Figures]:
    content = body(size)
    _compile(site)
    empty = [sum(site.resident(role)) for role in (SERVICE, STORE)]
    path = opened(site.server, size, content)
    found = []
    for answer, query in ANSWERS.items():
        with closing(Client(site.server.url, Request(f"{path}/steps{query}", content))) as client:
            for _ in range(WARM_STEPS):
                stepped(client)
            figures = _timed(site, client, seconds)
        time.sleep(REST_SECONDS)
        figures |= {"size": size, "answer": answer, "body bytes": len(content)}
        for role, before in zip((SERVICE, STORE), empty, strict=True):
            figures[f"{role} rest bytes"] = sum(site.resident(role)) - before
            figures[f"{role} peak bytes"] = figures.pop(f"{role} peak") - before
        figures["stored bytes"] = sum(site.store("memory", "used_memory"))
        found.append(figures)
        say(f"  {size:,}, {answer} back: {_told(figures)}")
    document = json.loads(call(site.server.url, "GET", path))
    found[-1]["state bytes"] = found[0]["state bytes"] = document["state_bytes"]
    return found


def _compile(site: Site) -> None:
    """What the compiler takes, which is as much for any session, is there before."""
    content = body(COMPILED)
    path = opened(site.server, COMPILED, content)
    with closing(Client(site.server.url, Request(f"{path}/steps", content))) as client:
        for _ in range(WARM_STEPS):
            stepped(client)
        site.server.wait_for(r"(compiled) ", COMPILE_SECONDS)
        stepped(client)
    call(site.server.url, "DELETE", path)
    site.quiet()
    time.sleep(REST_SECONDS)


def _timed(site: Site, client: Client, seconds: int) -> Figures:
    entry = _entry_bytes(site, client)
    site.forget_peaks()
    spent, came = site.quiet(), _came(site)
    started, count = time.perf_counter(), 0
    while count < LEAST_STEPS or time.perf_counter() - started < seconds:
        stepped(client)
        count += 1
    lasted = time.perf_counter() - started
    used = site.quiet().since(spent)
    return {
        "steps": count,
        "ms": 1e3 * lasted / count,
        "service ms": 1e3 * used.service / count,
        "store ms": 1e3 * used.store / count,
        "to the store, bytes a step": (_came(site) - came) / count,
        "entry bytes": entry,
        f"{SERVICE} peak": sum(site.peak(SERVICE)),
        f"{STORE} peak": sum(site.peak(STORE)),
    }


def _entry_bytes(site: Site, client: Client) -> int:
    """What goes to the store with a step that brings no snapshot: the least of a few."""
    found = []
    for _ in range(WARM_STEPS):
        before = _came(site)
        stepped(client)
        found.append(_came(site) - before)
    return min(found)


def _came(site: Site) -> int:
    return sum(site.store("stats", "total_net_input_bytes"))


def _disk(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def starts(directory: Path, size: int) -> Figures:
    """How long a large session takes to answer after its service, or its store as well, has been started again."""
    content = body(size)
    with embedded(directory, SETTINGS) as site:
        path = opened(site.server, size, content)
        with closing(Client(site.server.url, Request(f"{path}/steps", content))) as client:
            for _ in range(LEAST_STEPS):
                stepped(client)
        state = json.loads(call(site.server.url, "GET", path))["state_bytes"]
        site.quiet()
        stored, disk = site.store("memory", "used_memory")[0], _disk(directory)
    found: Figures = {"size": size, "state bytes": state, "stored bytes": stored, "disk bytes": disk}
    found["stopped in order"] = _answers(directory, path, content)
    found["service killed"] = _answers(directory, path, content, killed=(SERVICE,))
    found["service and store killed"] = _answers(directory, path, content, killed=(SERVICE, STORE))
    return found


def _answers(directory: Path, path: str, content: bytes, killed: Sequence[str] = ()) -> Figures:
    """Seconds from the start of the process. What was `killed` was so right after a step."""
    with ExitStack() as stack:
        if killed:
            site = stack.enter_context(embedded(directory, SETTINGS))
            with closing(Client(site.server.url, Request(f"{path}/steps", content))) as client:
                stepped(client)
            members = site.members()
            kill([member for role in killed for member in members[role]])
        started = time.perf_counter()
        site = stack.enter_context(embedded(directory, SETTINGS))
        listens, spent = time.perf_counter() - started, site.spent()
        call(site.server.url, "GET", path)
        known = time.perf_counter() - started
        with closing(Client(site.server.url, Request(f"{path}/steps?return=none", content))) as client:
            stepped(client)
        took, used, peak = time.perf_counter() - started, site.spent().since(spent), sum(site.peak(SERVICE))
    figures = {"listens s": listens, "document s": known, "step s": took}
    figures |= {"service CPU s": used.service, "store CPU s": used.store, "service peak bytes": peak}
    say(f"  killed: {' and '.join(killed) or 'none'}: {_told(figures)}")
    return figures


def parts(directory: Path, seconds: int, size: int) -> Figures:
    """A model as one session, and as PARTS sessions whose steps are sent together; on one store, and on a cluster."""
    found: Figures = {"size": size, "parts": PARTS}
    made: dict[str, Callable[[Path], contextmanager[Site]]] = {  # type: ignore[type-arg]
        "one store": lambda place: embedded(place, SETTINGS),
        f"{NODES} nodes": lambda place: clustered(place, NODES, SETTINGS),
    }
    for (name, make), count in itertools.product(made.items(), (1, PARTS)):
        place = directory / f"{len(found)}"
        with make(place) as site:
            figures = _in_parts(site, size // count, count, seconds)
        shutil.rmtree(place)
        found[f"{name}, {count}"] = figures
        say(f"  {name}, {count} sessions: {_told(figures)}")
    return found


def _in_parts(site: Site, size: int, count: int, seconds: int) -> Figures:
    content = body(size)
    paths = [opened(site.server, size, content) for _ in range(count)]
    with _clients(site.server, paths, content) as clients, ThreadPoolExecutor(count) as threads:

        def step() -> None:
            list(threads.map(stepped, clients))

        for _ in range(WARM_STEPS):
            step()
        site.forget_peaks()
        spent, started, done = site.quiet(), time.perf_counter(), 0
        while done < LEAST_STEPS or time.perf_counter() - started < seconds:
            step()
            done += 1
        lasted = time.perf_counter() - started
        used = site.quiet().since(spent)
    return {
        "ms": 1e3 * lasted / done,
        "service ms": 1e3 * used.service / done,
        "store ms": 1e3 * used.store / done,
        "service peak bytes": sum(site.peak(SERVICE)),
        "store peak bytes, each": site.peak(STORE),
        "stored bytes, each": site.store("memory", "used_memory"),
    }


@contextmanager
def _clients(server: Server, paths: Sequence[str], content: bytes) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        requests = [Request(f"{path}/steps", content) for path in paths]
        yield [stack.enter_context(closing(Client(server.url, request))) for request in requests]


def _told(figures: Figures) -> str:
    plain = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:,.4g}" for name, value in plain.items())
