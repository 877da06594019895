"""What befalls the store and the way to it: failovers, full stores, torn logs, partitions; and services told to stop.

Each scenario runs a crowd (crowd.py) on two small services or more, breaks something as often as it is told, mends it,
and goes on once everybody got on; only what had an effect counts as injected. `SCENARIOS` has them under the names of
the table, each a function of an empty directory and a seed.

A store that really went back loses what was acknowledged: that is what the fault is. Then the sessions must say so, and
nothing else may be missing; the loss is accepted, as an operator would, and the crowd goes on from there.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import redis

from service.valkey import LOG_DIRECTORY, try_lock
from tests.faults.crowd import LARGE, SMALL, Crowd, Verdict, accepting, replicas, rounds, verdict, went_back
from tests.faults.namespaces import Unpermitted, with_small_disk
from tests.faults.nursery import Replica
from tests.faults.outcome import Outcome
from tests.faults.partitions import partitions, split_brains
from tests.faults.stores import DURABLE, VOLATILE, Pair, StoreServer, forwarding, pair, storing, until
from tests.nursery import nursery, shared

NOTICED_SECONDS = 20.0
DRAINED_SECONDS = 40.0
# Bytes of a disk that are not taken at one stroke: such a stroke fails, and is undone, if the store was faster.
SPARED = 8 << 20


# -- failovers ---------------------------------------------------------------------------------------------------------


def stale_failovers(directory: Path, seed: int, times: int) -> Verdict:
    """The primary is killed, and a replica takes over that has missed the last steps."""

    def missing_some(crowd: Crowd, stores: Pair, draw: random.Random) -> bool:
        opened = time.monotonic()
        stores.hold()
        crowd.run_on(draw.randrange(3, 20))
        with stores.fail_over().client() as store:
            return went_back(crowd, store, opened) > 0

    return _failovers(directory, seed, times, missing_some, "failover, stale replica")


def replicated_failovers(directory: Path, seed: int, times: int) -> Verdict:
    """The same, and nothing is acknowledged that the replica has not: a replica that hangs first changes nothing."""

    def hanging_at_times(_: Crowd, stores: Pair, draw: random.Random) -> bool:
        if draw.randrange(2):
            stores.hold()
            time.sleep(draw.uniform(0, 0.5))
        stores.fail_over()
        return True

    return _failovers(directory, seed, times, hanging_at_times, "failover, acknowledged by both", "--ack", "replicated")


def _failovers(
    directory: Path,
    seed: int,
    times: int,
    fail_over: Callable[[Crowd, Pair, random.Random], bool],
    name: str,
    *arguments: str,
) -> Verdict:
    """`fail_over` says whether it had the effect that it is to have."""
    draw, injected = random.Random(seed), 0
    with pair(directory / "stores") as stores:
        url = stores.front.url
        with replicas(shared(), directory, draw.choice((2, 4)), "--redis-url", url, *arguments) as servers:
            crowd = Crowd(servers, seed, lossy=True).start()
            with accepting(crowd.targets, url) as operator:
                for _ in rounds(crowd, times, draw):
                    injected += fail_over(crowd, stores, draw)
                    stores.lead()
                    stores.rejoin()
                with stores.primary.client() as store:
                    return operator.judge(verdict(name, injected, store, crowd), times)


# -- full stores -------------------------------------------------------------------------------------------------------


def full_memory(directory: Path, seed: int, times: int) -> Verdict:
    """The store has as much as it may have (`maxmemory`, noeviction), and then more room again."""
    draw, injected = random.Random(seed), 0
    with (
        storing(directory / "store", *VOLATILE) as store,
        replicas(shared(), directory, 2, "--redis-url", store.url) as servers,
    ):
        crowd = Crowd(servers, seed).start()
        for _ in rounds(crowd, times, draw):
            injected += fill(crowd, store, draw)
            store.call("CONFIG", "SET", "maxmemory", 0)
        with store.client() as client:
            return verdict("store full", injected, client, crowd)


def fill(crowd: Crowd, store: StoreServer, draw: random.Random) -> bool:
    """Whether somebody was refused because nothing more went in."""
    room, before = draw.randrange(-50_000, 100_000), crowd.refused
    while crowd.refused < before + 3 and not crowd.complaints:
        store.call("CONFIG", "SET", "maxmemory", store.info("memory")["used_memory"] + room)
        time.sleep(0.1)
        room -= 50_000
    time.sleep(draw.uniform(0, 0.2))
    return crowd.refused > before


def full_disk(directory: Path, seed: int, times: int, durability: str = "everysec", *, killed: bool = False) -> Verdict:
    """The disk of the embedded store is full, and then has room again; `killed`: the store dies meanwhile.

    Raises Unpermitted.
    """
    disk = directory / "data"  # the log of the service itself lies beside it
    return with_small_disk(disk, "256m", lambda: _full_disk(directory, disk, seed, times, durability, killed=killed))


def _full_disk(directory: Path, disk: Path, seed: int, times: int, durability: str, *, killed: bool) -> Verdict:
    draw, injected = random.Random(seed), 0
    name = f"disk full, {durability}" + ", store killed" * killed
    arguments = ("--durability", durability)
    with nursery() as born, replicas(born, directory, 2, *arguments, shared=True) as servers:
        # What fails first for large gradients is a chunk that is staged, and nothing that was acknowledged.
        sizes = (SMALL, SMALL) if killed else (SMALL, LARGE)
        crowd, url = Crowd(servers, seed, lossy=killed, sizes=sizes).start(), servers[0].store_url()
        with (
            accepting(crowd.targets if killed else (), url) as operator,
            redis.Redis.from_url(url, protocol=2) as store,
        ):
            for _ in rounds(crowd, times, draw):
                full = fill_disk(crowd, disk)
                injected += full and (not killed or embedded_dies(crowd, servers) > 0)
                (disk / "ballast").unlink()
            return operator.judge(verdict(name, injected, store, crowd), times)


def fill_disk(crowd: Crowd, disk: Path) -> bool:
    """Whether somebody was not served because nothing more could be written."""
    before, deadline = crowd.unserved, time.monotonic() + NOTICED_SECONDS
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        now = os.statvfs(disk)
        free = now.f_bavail * now.f_frsize
        os.posix_fallocate(ballast.fileno(), 0, max(1, free - SPARED))
        ballast.seek(0, os.SEEK_END)
        while crowd.unserved < before + 3 and not crowd.complaints and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                while ballast.write(bytes(1 << 16)):
                    pass
            time.sleep(0.02)
    return crowd.unserved > before


def embedded_dies(crowd: Crowd, servers: Sequence[Replica], spoil: Callable[[Path], object] | None = None) -> int:
    """SIGKILL to the embedded store, and to its log what `spoil` does; the services live, and start it again.

    Returns how much is missing that was acknowledged. That is seen in a copy: the services may go on at once.
    """
    data = servers[0].data
    copy = data.parent / "copy"
    with halted(servers):
        os.kill(servers[0].valkey_pid(), signal.SIGKILL)
        with (data / "valkey.alive").open() as alive:
            until(lambda: try_lock(alive.fileno()), "the embedded store is gone")
        if spoil is not None:
            spoil(data)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(data / LOG_DIRECTORY, copy / LOG_DIRECTORY)
        with storing(copy, "--save", "", "--appendonly", "yes") as copied, copied.client() as store:
            return went_back(crowd, store, 0.0)


@contextlib.contextmanager
def halted(servers: Sequence[Replica]) -> Iterator[None]:
    for server in servers:
        os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            os.kill(server.pid, signal.SIGCONT)


# -- torn logs ---------------------------------------------------------------------------------------------------------


def torn_logs(directory: Path, seed: int, times: int) -> Verdict:
    """The store dies with its machine: its log ends early, anywhere. The services live, and find it so.

    The first time something that was acknowledged is gone; then that is left to chance.
    """
    draw, injected = random.Random(seed), 0
    with forwarding() as front, storing(directory / "store", *DURABLE) as store:
        front.lead(store.address)
        with replicas(shared(), directory, 2, "--redis-url", front.url) as servers:
            crowd = Crowd(servers, seed, lossy=True).start()
            with accepting(crowd.targets, front.url) as operator:
                for i in rounds(crowd, times, draw):
                    front.lead(None)
                    store.kill()
                    last = max(crowd.targets[0].acknowledged, key=lambda told: told.step)
                    injected += tear(store.directory, draw, "" if i else last.commit)
                    store.start()
                    with store.client() as client:
                        went_back(crowd, client, 0.0)
                    front.lead(store.address)
                with store.client() as client:
                    return operator.judge(verdict("torn log", injected, client, crowd), times)


def torn_embedded_logs(directory: Path, seed: int, times: int) -> Verdict:
    """The same with the embedded store: what lives of the service starts it again on the torn log."""
    draw, injected = random.Random(seed), 0
    with replicas(shared(), directory, 2, shared=True) as servers:
        crowd, url = Crowd(servers, seed, lossy=True).start(), servers[0].store_url()
        with accepting(crowd.targets, url) as operator, redis.Redis.from_url(url, protocol=2) as store:
            for _ in rounds(crowd, times, draw):
                embedded_dies(crowd, servers, partial(tear, draw=draw))
                injected += 1
            return operator.judge(verdict("torn log, embedded", injected, store, crowd), times)


def log_of(data: Path) -> Path:
    """The file that a store in `data` appends to."""
    return max((data / LOG_DIRECTORY).glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))


def tear(data: Path, draw: random.Random, commit: str = "") -> bool:
    """Takes a random number of bytes from the end of the log: mostly few, so that it ends in the middle of a commit.
    So many that `commit` is gone.
    """
    path = log_of(data)
    size = path.stat().st_size
    left = max(0, size - draw.randrange(1, draw.choice((300, 3_000, 300_000))))
    if commit:
        left = min(left, path.read_bytes().index(commit.encode()))  # later it stands there as somebody's parent
    os.truncate(path, left)
    return path.stat().st_size < size


# -- services told to stop ---------------------------------------------------------------------------------------------


def stops(directory: Path, seed: int, times: int, count: int) -> Verdict:
    """SIGTERM to one of `count` services after the other, under load; two of them share the embedded store."""
    draw, hung, broken = random.Random(seed), 0, 0
    with contextlib.ExitStack() as opened:
        arguments: tuple[str, ...] = ()
        if count > 2:
            arguments = ("--redis-url", opened.enter_context(storing(directory / "store", *VOLATILE)).url)
        servers = opened.enter_context(replicas(shared(), directory, count, *arguments, shared=count == 2))
        crowd, stopped = Crowd(servers, seed).start(), 0
        for _ in rounds(crowd, times, draw):
            stopped += 1
            server = draw.choice(servers)
            try:
                broken += server.stop(DRAINED_SECONDS) != 0
            except subprocess.TimeoutExpired:
                hung += 1
            server.restart()
        url = arguments[1] if arguments else servers[0].store_url()
        with redis.Redis.from_url(url, protocol=2) as store:
            found = verdict(f"SIGTERM, {count} services", stopped, store, crowd)
    row = found.outcome
    return found._replace(outcome=row._replace(hangs=row.hangs + hung, broken=row.broken + broken))


# -- the table ---------------------------------------------------------------------------------------------------------


def _row(name: str, scenario: Callable[[Path, int], Verdict]) -> Callable[[Path, int], Outcome]:
    def run(directory: Path, seed: int) -> Outcome:
        try:
            found = scenario(directory, seed)
        except Unpermitted as missing:
            print(f"{name}: left out: {missing}", file=sys.stderr)
            return Outcome(name, 0)
        for note in found.notes:
            print(f"{name}, seed {seed}: {note}", file=sys.stderr)
        return found.outcome._replace(name=name)

    return run


# How often each breaks what it breaks: so that a run of any is some ten seconds.
_SCENARIOS: dict[str, Callable[[Path, int], Verdict]] = {
    "failover, stale replica": partial(stale_failovers, times=5),
    "failover, acknowledged by both": partial(replicated_failovers, times=5),
    "store full": partial(full_memory, times=5),
    "disk full": partial(full_disk, times=5),
    "disk full, fsync always": partial(full_disk, times=3, durability="always"),
    "disk full, store killed": partial(full_disk, times=5, killed=True),
    "torn log": partial(torn_logs, times=5),
    "torn log, embedded": partial(torn_embedded_logs, times=5),
    "partition from the store": partial(partitions, times=3),
    "split brain": partial(split_brains, times=3),
    "split brain, acknowledged by both": partial(split_brains, times=3, replicated=True),
    "SIGTERM, two services": partial(stops, times=10, count=2),
    "SIGTERM, four services": partial(stops, times=10, count=4),
}
SCENARIOS: dict[str, Callable[[Path, int], Outcome]] = {name: _row(name, run) for name, run in _SCENARIOS.items()}
