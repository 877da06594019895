"""`make flame`: where the service's time goes in small steps (S1) and in large ones (L1).

py-spy looks at the running service some hundred times a second while it has the load of the row, and tells of every
thread that is at work in which calls it is, those of C code included. The same samples make both: a picture of all
calls, and a table of the parts that a step goes through. A sample belongs to the part of the innermost call that
`PARTS` knows; what serves several parts (asyncio, writers of files, NumPy, the kernel) is passed over, so that its time
is its caller's. What nobody has called is the loop's own.

It has to stop the process for each look, some milliseconds: the rate is far below that of S1 and L1, the shares
are those of what is done meanwhile.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks import large_steps, machine, processes, small_steps
from benchmarks.flame_picture import render
from benchmarks.measure import Plan, Unmeasured, say, watch

DOCS = processes.ROOT / "docs"
PAGE = DOCS / "performance.md"
BEGIN, END = "<!-- The tables are written by `make flame`. -->\n", "<!-- End of the tables. -->\n"
RATE = 100
# py-spy needs a moment before its first sample; the load lasts as much longer.
MARGIN_SECONDS = 2

Stacks = Counter[tuple[str, ...]]


class Part(NamedTuple):
    """Of the calls that a file name, or "function (file name)", begins with one of `frames`."""

    name: str
    frames: Sequence[str]


# The first that fits: functions stand before the files that they are in.
PARTS = (
    Part(
        "reply",
        (
            "RequestResponseCycle.send (", "send_reply (", "_values (service/http.py", "service/outlet.py",
            "service/answers.py", "service/replies.py", "service/objects.py",
        ),
    ),
    Part(
        "checking",
        (
            "Committer._check", "Session.check (", "Session.checked", "core/contributions.py", "core/sums.py",
            "core/bounds.py",
        ),
    ),
    Part("parsing", ("service/wire/", "service/contributions.py", "service/tensors.py", "service/documents.py")),
    Part(
        "HTTP",
        (
            "uvicorn/protocols/", "service/app.py", "service/protocol.py", "service/admission.py", "service/bodies.py",
            "service/data.py", "service/http.py", "service/access/", "service/logs.py", "service/meters.py",
            "service/control.py", "service/tracing.py",
        ),
    ),
    Part(
        "store",
        (
            "service/store.py", "service/link.py", "service/cluster.py", "service/index.py", "service/heads.py",
            "service/acks.py", "service/bell.py", "service/valkey.py", "service/embedded.py", "redis/", "hiredis/",
        ),
    ),
    Part("applying", ("Committer._apply", "Committer.compute", "core/", "service/recycling.py")),
    Part(
        "entry",
        (
            "service/changes.py", "service/entries.py", "service/records.py", "service/engine.py", "service/commits.py",
            "service/live.py", "service/snapshots.py", "service/residents.py", "xxhash/",
        ),
    ),
)  # fmt: skip
LOOP = "event loop"
NAMES = ("HTTP", "parsing", "checking", "entry", "store", "applying", "reply", LOOP)
MEANINGS = {
    "HTTP": "requests taken apart, keys and bounds looked at, the body taken in, the log line, the counters",
    "parsing": "bytes to arrays: JSON or safetensors, the members of a step",
    "checking": "shapes, finite numbers, the norm; whether the step may be taken",
    "entry": "the queue of the session, the entry of the log, its checksum",
    "store": "commands to the store packed and sent, its replies read",
    "applying": "the optimizer's arithmetic",
    "reply": "the answer made and sent",
    LOOP: "uvloop itself, and what the kernel does for it: sockets read, large bodies sent on, tasks resumed",
}
# What serves several parts: its time is that of whoever calls it.
_PASSED_OVER = (
    "core/layout.py",
    "write (service/wire/",
    "nbytes (service/wire/",
    "dumps (service/wire/",
    "plain (service/wire/",
)
_PYTHON = re.compile(r"^(?P<function>.+) \((?P<file>[^()]*\.py|<[^<>]*>)\)$")
# A file as it is in everybody's tree: what stands before the package is this machine's.
_PLACE = re.compile(r"^.*/(?:site-packages|python3\.\d+)/|^.*/(?=(?:core|service)/)")
_WAITS, _ASKS_FOR_WORK = "epoll_", "_worker (concurrent/futures/thread.py)"
# The ways to the loop and to a thread's work, which are the same in all stacks.
_LOOP_BEGINS = "Runner.run (asyncio/runners.py)"
_THREAD_BEGINS = ("Thread.", "_worker (", "_WorkItem.run (")
THREAD = "thread"


class Profile(NamedTuple):
    """`shares` of the parts in percent; `idle` is how idle the machine was before, in percent."""

    title: str
    picture: str
    samples: int
    shares: dict[str, float]
    idle: float


def read(raw: str) -> Stacks:
    """py-spy's raw format, a line for each stack: calls from the outermost on, apart by semicolons, and a count.

    What a thread does while it waits is left out. Of C code the innermost call is kept, where it has a name.
    """
    found: Stacks = Counter()
    for line in raw.splitlines():
        text, _, count = line.rpartition(" ")
        if stack := _stack(text.split(";")):
            found[stack] += int(count)
    return found


def _stack(calls: Sequence[str]) -> tuple[str, ...]:
    ours = [(place, _PLACE.sub("", each["file"])) for place, call in enumerate(calls) if (each := _PYTHON.match(call))]
    named = [f"{calls[place].rpartition(' (')[0]} ({file})" for place, file in ours]
    native = [call for call in calls[ours[-1][0] + 1 if ours else 0 :] if not call.startswith("0x")]
    if (native and native[-1].startswith(_WAITS)) or (named and named[-1] == _ASKS_FOR_WORK):
        return ()
    begin = THREAD if any(call.startswith("Thread._bootstrap") for call in named) else LOOP
    if _LOOP_BEGINS in named:
        named = named[named.index(_LOOP_BEGINS) + 1 :]
    named = [call for call in named if not call.startswith(_THREAD_BEGINS)]
    return (begin, *named, *(_without_path(call) for call in native[-1:]))


def _without_path(call: str) -> str:
    """A call of C code, with the name alone of the file that it is in."""
    function, _, file = call.rpartition(" (")
    return f"{function} ({file.rpartition('/')[2]}"


def part_of(calls: Sequence[str]) -> str:
    """The part that a stack belongs to."""
    for call in reversed(calls):
        if _begins(call, _PASSED_OVER):
            continue
        for part in PARTS:
            if _begins(call, part.frames):
                return part.name
    return LOOP


def _begins(call: str, frames: Sequence[str]) -> bool:
    """Whether "function (file)", or its file, begins with one of these."""
    return call.startswith(tuple(frames)) or call.rpartition(" (")[2].startswith(tuple(frames))


def shares(stacks: Stacks) -> dict[str, float]:
    """Percent of all samples, for every part in the order of a step."""
    total = sum(stacks.values())
    found: Counter[str] = Counter()
    for calls, count in stacks.items():
        found[part_of(calls)] += count
    return {name: 100 * found[name] / total if total else 0.0 for name in NAMES}


def record(spy: Path, pid: int, seconds: int, directory: Path, load: Callable[[int], object]) -> Stacks:
    """What the process is at while `load` sends to it for so many seconds. Raises Unmeasured."""
    raw = directory / "stacks.raw"
    command = [str(spy), "record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(RATE)]
    command += ["--format", "raw", "--native", "--nolineno", "--output", str(raw)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        load(seconds + MARGIN_SECONDS)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    if process.returncode or not raw.exists():
        raise Unmeasured(f"py-spy could not look at the service (it may need to be root): {said.strip()[-300:]}")
    return read(raw.read_text())


def small(spy: Path, seconds: int, directory: Path) -> Stacks:
    with ExitStack() as stack:
        load = small_steps.service_load(stack, Plan(1, seconds, directory))
        load.send(small_steps.WARM_SECONDS)
        return record(spy, load.server.pid, seconds, directory, load.send)


def large(spy: Path, seconds: int, directory: Path) -> Stacks:
    size = 1_000_000
    with processes.service(directory) as server:
        request = large_steps.Request(
            f"{large_steps.session(server, size)}/steps", large_steps.safetensors(large_steps.gradient(size))
        )
        exchange = large_steps.Exchange(large_steps.SERVICE, server, request, seconds)
        exchange.warm()
        server.wait_for(r"(compiled) ", large_steps.COMPILE_SECONDS)

        def load(length: int) -> None:
            exchange.seconds = length
            exchange.turn()

        return record(spy, server.pid, seconds, directory, load)


CASES = (
    ("S1: JSON steps of 10 numbers, 64 sessions, 32 connections", "flame-s1.svg", small),
    ("L1: safetensors steps of 1 M float32, parameters back, one client", "flame-l1.svg", large),
)


def table(profiles: Sequence[Profile], about: str) -> str:
    """What stands between the markers of the page."""
    lines = ["| part | " + " | ".join(profile.title.partition(":")[0] for profile in profiles) + " | what it is |"]
    lines.append("|---" * (len(profiles) + 2) + "|")
    for name in NAMES:
        cells = " | ".join(f"{profile.shares[name]:.0f} %" for profile in profiles)
        lines.append(f"| {name} | {cells} | {MEANINGS[name]} |")
    parts = ["\n".join(lines), about]
    for profile in profiles:
        text = f"{profile.title}; {profile.samples:,} samples, idle CPU before {profile.idle:.0f} %"
        parts.append(f"![{text}]({profile.picture})\n\n{text}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.flame", description="Where the service's time goes.")
    parser.add_argument("--spy", type=Path, required=True, help="the program py-spy")
    parser.add_argument("--seconds", type=int, default=20, help="how long each load is watched")
    parser.add_argument("--to", type=Path, default=DOCS, help="where the pictures go; the page only with docs/")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it all that was started
    commit = machine.commit()  # before there is anything new
    profiles = []
    for title, picture, watched in CASES:
        say(title)
        idle = watch().idle
        with tempfile.TemporaryDirectory(prefix="ravine-flame-") as directory:
            try:
                stacks = watched(given.spy, given.seconds, Path(directory))
            except Unmeasured as reason:
                sys.exit(str(reason))
        (given.to / picture).write_text(render(title, stacks, part_of))
        profiles.append(Profile(title, picture, sum(stacks.values()), shares(stacks), idle))
    about, day = machine.describe(), datetime.now(UTC).strftime("%Y-%m-%d")
    text = table(profiles, f"{day}, commit {commit}, {about['CPU']}, Python {about['Python']}.")
    print(text)
    if given.to.resolve() == DOCS.resolve():
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
