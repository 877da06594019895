"""The faults that are brought about under load, each as a scenario: some sessions, some replicas, some injections, and
the check at the end. Everything random in one is drawn from its seed.

A kill counts when it was a kill: the replica had acknowledged something since it was started, and ended by SIGKILL.
Where it breaks off at a failpoint it does so by itself, in the middle of a request.
"""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import redis

from tests.faults.chain import Faults, outcome
from tests.faults.cutter import CUTS, Cutter, cutting
from tests.faults.load import COURSES, LARGE, PATIENCE, PLAIN, Course, Load
from tests.faults.nursery import Replica
from tests.faults.outcome import Outcome
from tests.faults.stores import StoreServer
from tests.nursery import Nursery, shared
from tests.running import redis_server

Scenario: TypeAlias = Callable[[Path, int], Outcome]

PROGRESS_SECONDS = 30.0  # somebody is answered within this time, or the service hangs
REACHED_SECONDS = 15.0  # a failpoint that was not reached by then is set anew
STOP_SECONDS = 40.0  # SIGTERM: the 30 s of draining, and some
STARTS = 5
SEEN_SECONDS = 1.0  # in which all workers of a session that is stepped find out that the store went back


class Stuck(Exception):
    """Nobody is answered any more."""


# -- what is there to be broken ----------------------------------------------------------------------------------------


class Scene:
    """Replicas, alive: one for each of `links`, which say how it reaches the store; on the embedded one if there are
    none. `url` is how everybody else reaches that store.
    """

    def __init__(self, directory: Path, born: Nursery, links: Sequence[str | None], url: str | None) -> None:
        data = directory / "data"
        self.replicas = [Replica(born, data, *(("--redis-url", link) if link else ())).start() for link in links]
        self.store = url or self.replicas[0].store_url()

    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas]

    def alive(self) -> list[str]:
        """Those that nothing became of are counted elsewhere. Raises Stuck if there is no other."""
        found = [each.url for each in self.replicas if each.process is not None and each.process.poll() is None]
        if not found:
            raise Stuck("no replica lives any more")
        return found

    def close(self) -> int:
        """All at the same time: each takes a moment to see that nobody else needs the store. Says how many did not end
        as they should.
        """
        with ThreadPoolExecutor(len(self.replicas)) as pool:
            return sum(pool.map(_unstoppable, self.replicas))


def _unstoppable(replica: Replica) -> bool:
    try:
        return replica.stop(STOP_SECONDS) != 0
    except subprocess.TimeoutExpired:
        return True


@contextlib.contextmanager
def scene(directory: Path, count: int, url: str | None = None, links: Sequence[str] | None = None) -> Iterator[Scene]:
    made = Scene(directory, shared(), links or [url] * count, url)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def some_scene(directory: Path, seed: int) -> Iterator[Scene]:
    """One, two or four replicas, on the embedded store or on one of their own."""
    count = (2, 4, 1)[seed % 3]
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(redis_server(directory / "store")) if seed % 2 else None
        yield stack.enter_context(scene(directory, count, url))


def answered(load: Load) -> int:
    return sum(load.answered.values())


def progress(load: Load, count: int = 1) -> None:
    """Returns when `count` more contributions are acknowledged. Raises Stuck."""
    wanted, deadline = answered(load) + count, time.monotonic() + PROGRESS_SECONDS
    while answered(load) < wanted:
        if load.over:
            return
        if time.monotonic() > deadline:
            raise Stuck
        time.sleep(0.005)


def finished(name: str, injected: int, load: Load, scene: Scene, hangs: int = 0) -> Outcome:
    """Ends the load, while all replicas live, checks it, and ends them."""
    load.stop()
    found = load.check(scene.store, scene.alive())
    tell(name, found)
    return outcome(name, injected, found, hangs + scene.close())


def tell(name: str, found: Sequence[Faults]) -> None:
    """What does not fit, in words, where pytest or the runner shows it."""
    for faults in found:
        for note in faults.notes:
            print(f"{name}: {note}", flush=True)


# -- the service is killed ---------------------------------------------------------------------------------------------


class Quota:
    """So many injections, whoever makes them; twice as many attempts."""

    def __init__(self, count: int) -> None:
        self._left, self._attempts, self.made = count, 2 * count, 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self._left == 0 or self._attempts == 0:
                return False
            self._left -= 1
            self._attempts -= 1
            return True

    def settle(self, *, made: bool) -> None:
        with self._lock:
            self.made += made
            self._left += not made


class Keeper(threading.Thread):
    """Ends one replica over and over and starts it again. `strike` says whether it was what it should be."""

    def __init__(self, replica: Replica, load: Load, quota: Quota, draw: random.Random) -> None:
        super().__init__(daemon=True)
        self.replica, self.load, self.quota, self.draw = replica, load, quota, draw
        self.hangs = 0

    def run(self) -> None:
        try:
            if self.failpoints():
                self.replica.kill()
                self.again(self.failpoints())
            while self.quota.take():
                self.quota.settle(made=self.strike())
                self.again(self.failpoints())
            if self.failpoints():
                self.replica.kill()
                self.again("")
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(f"a replica did not end, or did not come back: {error}", flush=True)
            self.hangs += 1

    def again(self, failpoints: str) -> None:
        self.replica.arm(failpoints)
        self.replica.restart()

    def failpoints(self) -> str:
        """With what it is started for its next strike."""
        return ""

    def strike(self) -> bool:
        raise NotImplementedError

    def wait_for_use(self) -> None:
        """Until the replica has acknowledged something since it was started."""
        before, deadline = self.load.answered[self.replica.url], time.monotonic() + PROGRESS_SECONDS
        while self.load.answered[self.replica.url] == before and not self.load.over:
            if time.monotonic() > deadline:
                self.hangs += 1
                return
            time.sleep(0.005)


class Killer(Keeper):
    """At a random moment."""

    def strike(self) -> bool:
        self.wait_for_use()
        time.sleep(self.draw.uniform(0, 0.1))
        self.replica.kill()
        return not self.load.over


class Supervisor(Killer):
    """A service whose store dies while it starts gives up, and is started again, as by whoever looks after it."""

    def again(self, failpoints: str) -> None:
        for left in reversed(range(STARTS)):
            try:
                return super().again(failpoints)
            except AssertionError:
                if left == 0:
                    raise
        return None


class Stopper(Keeper):
    """By SIGTERM: what is under way is answered, and it ends with 0."""

    def strike(self) -> bool:
        self.wait_for_use()
        time.sleep(self.draw.uniform(0, 0.1))
        if _unstoppable(self.replica):
            self.hangs += 1
            print("a replica that was told to stop did not, or not as it should", flush=True)
        return not self.load.over


class Breaker(Keeper):
    """At `point`, one of the first times that it comes by there."""

    def __init__(self, replica: Replica, load: Load, quota: Quota, draw: random.Random, point: str) -> None:
        super().__init__(replica, load, quota, draw)
        self.point = point

    def again(self, failpoints: str) -> None:
        """A start closes rounds that are over, and may come by the point before it says where it listens."""
        for left in reversed(range(STARTS)):
            try:
                return super().again(failpoints)
            except AssertionError:
                process = self.replica.process
                if left == 0 or not failpoints or process is None or process.poll() != -signal.SIGKILL:
                    raise
                failpoints = self.failpoints() if left > 1 else ""
        return None

    def failpoints(self) -> str:
        most = 2 if self.point == "after-staging" else 8
        return f"{self.point}=kill@{self.draw.randint(1, most)}"

    def strike(self) -> bool:
        assert self.replica.process is not None
        try:
            return self.replica.process.wait(REACHED_SECONDS) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            self.replica.kill()
            return False


def service_ends(
    directory: Path,
    seed: int,
    *,
    name: str,
    keeper: Callable[..., Keeper],
    count: int = 60,
    courses: Sequence[Course] = COURSES,
) -> Outcome:
    """`count` ends of replicas, several at a time."""
    with some_scene(directory, seed) as it:
        load, quota = Load(it.urls, seed, courses).start(), Quota(count)
        keepers = kept(it, load, quota, keeper, seed)
        for each in keepers:
            each.join()
        return finished(name, quota.made, load, it, sum(each.hangs for each in keepers))


def kept(it: Scene, load: Load, quota: Quota, keeper: Callable[..., Keeper], seed: int) -> list[Keeper]:
    """A keeper for each replica, at work."""
    keepers = [keeper(each, load, quota, random.Random(f"{seed} {i}")) for i, each in enumerate(it.replicas)]
    for each in keepers:
        each.start()
    return keepers


KILL = "API kill -9, at random"
AT = "API kill -9, {}"
SIGTERM = "API SIGTERM"
# Large gradients alone are staged; more than one worker of them keeps several replicas busy.
_STAGED = (PLAIN, LARGE._replace(workers=3))

kill = partial(service_ends, name=KILL, keeper=Killer)
terminate = partial(service_ends, name=SIGTERM, keeper=Stopper, count=20)


def kill_at(point: str, count: int = 60) -> Scenario:
    courses = _STAGED if point == "after-staging" else COURSES
    keeper = partial(Breaker, point=point)
    return partial(service_ends, name=AT.format(point.replace("-", " ")), keeper=keeper, count=count, courses=courses)


# -- the store is killed -----------------------------------------------------------------------------------------------


def kill_store(directory: Path, seed: int, *, count: int = 40) -> Outcome:
    """The embedded store with its log: nothing that was acknowledged is lost."""
    draw, made, hangs = random.Random(seed), 0, 0
    with scene(directory, 2) as it:
        load = Load(it.urls, seed).start()
        try:
            for _ in range(count):
                progress(load, draw.randint(1, 10))
                time.sleep(draw.uniform(0, 0.1))
                os.kill(_store_pid(it.replicas[0]), signal.SIGKILL)
                made += 1
            progress(load)
        except Stuck:
            hangs += 1
        return finished(STORE, made, load, it, hangs)


def kill_both(directory: Path, seed: int, *, count: int = 40) -> Outcome:
    """The embedded store and the services on it, at once: whoever comes first starts the store again."""
    draw, stores = random.Random(seed), 0
    with scene(directory, 2 + seed % 3) as it:
        load, quota = Load(it.urls, seed).start(), Quota(count)
        keepers, hangs = kept(it, load, quota, Supervisor, seed), 0
        try:
            while any(each.is_alive() for each in keepers):
                time.sleep(draw.uniform(0, 0.8))
                os.kill(_store_pid(draw.choice(it.replicas)), signal.SIGKILL)
                stores += 1
        except Stuck:
            hangs += 1
        for each in keepers:
            each.join()
        return finished(BOTH, quota.made + stores, load, it, hangs + sum(each.hangs for each in keepers))


def _store_pid(replica: Replica) -> int:
    """Of the embedded store, which may be starting again: who is answered may have been so before it was killed.

    Raises Stuck.
    """
    deadline = time.monotonic() + PROGRESS_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            return replica.valkey_pid()
        time.sleep(0.01)
    raise Stuck


def kill_store_on_snapshots(directory: Path, seed: int, *, count: int = 3) -> Outcome:
    """A store that writes a dump each second and no log: what came after the last dump is gone, and clients are told.

    The sessions are new ones each time: those that went back are at their end.
    """
    draw, found, made = random.Random(seed), list[Faults](), 0
    store = StoreServer(directory / "store", "--save", "1 1", "--appendonly", "no").start()
    try:
        with scene(directory, 2, store.url) as it:
            for turn in range(count):
                load = Load(it.urls, seed + turn, (PLAIN, LARGE), pause=0.005).start()
                _until_dumped(store)
                time.sleep(draw.uniform(0.1, 0.9))
                store.kill()
                store.start()
                time.sleep(SEEN_SECONDS)
                load.stop()
                faults = load.check(it.store, it.urls())
                # A kill right after a dump takes nothing away.
                made += any(session.told for session in load.sessions) or any(each.lost for each in faults)
                found += faults
            tell(STORE_ON_SNAPSHOTS, found)
            return outcome(STORE_ON_SNAPSHOTS, made, found)
    finally:
        store.kill()


def _until_dumped(store: StoreServer) -> None:
    """Until a dump was begun and written after this was called, so that it has the sessions."""
    for _ in range(2):
        before = store.call("LASTSAVE")
        deadline = time.monotonic() + PATIENCE
        while store.call("LASTSAVE") == before and time.monotonic() < deadline:
            time.sleep(0.02)


STORE = "Valkey kill -9, log"
BOTH = "API and Valkey kill -9"
STORE_ON_SNAPSHOTS = "Valkey kill -9, snapshots"


# -- connections are cut -----------------------------------------------------------------------------------------------


def _cut(load: Load, cutters: Sequence[Cutter], draw: random.Random, count: int) -> tuple[int, int]:
    """How often a connection was cut or held, and whether somebody hangs."""
    made = 0
    try:
        for i in range(count):
            progress(load)
            time.sleep(draw.uniform(0, 0.05))
            cutter = draw.choice(cutters)
            cutter.arm(CUTS[i % len(CUTS)])
            made += cutter.hit.wait(PROGRESS_SECONDS)
        progress(load)
    except Stuck:
        return made, 1
    return made, 0


def cut_from_store(directory: Path, seed: int, *, count: int = 60) -> Outcome:
    """Between service and store: in the middle of a command, after it and before its reply, in the reply, late."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(redis_server(directory / "store"))
        cutters = [stack.enter_context(cutting(url, seed + i)) for i in range(2)]
        it = stack.enter_context(scene(directory, 2, url, [cutter.url for cutter in cutters]))
        load = Load(it.urls, seed).start()
        made, hangs = _cut(load, cutters, random.Random(seed), count)
        return finished(STORE_LINK, made, load, it, hangs)


def cut_from_clients(directory: Path, seed: int, *, count: int = 60) -> Outcome:
    """Between client and service: in the middle of a body, after the commit and before the reply, in it, late."""
    with some_scene(directory, seed) as it, contextlib.ExitStack() as stack:
        cutters = [stack.enter_context(cutting(url, seed + i)) for i, url in enumerate(it.urls())]
        load = Load(lambda: [cutter.url for cutter in cutters], seed).start()
        made, hangs = _cut(load, cutters, random.Random(seed), count)
        return finished(CLIENT_LINK, made, load, it, hangs)


STORE_LINK = "cut: service and store"
CLIENT_LINK = "cut: client and service"


# -- a service that does not look at the head --------------------------------------------------------------------------


def blind(directory: Path, seed: int) -> Outcome:
    """The negative control: replicas that race without the head check lose and double steps, and the check sees it."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(redis_server(directory / "store"))
        it = stack.enter_context(scene(directory, 2, url))
        for replica in it.replicas:
            replica.kill()
            replica.arm("blind=on")
            replica.restart()
        # A session of which a replica finds out by itself that its log is torn is at its end, so there are several.
        load = Load(it.urls, seed, [PLAIN._replace(workers=3)] * 4, pause=0.002).start()
        progress(load, 200)
        load.stop()
        return outcome(BLIND, 1, load.check(it.store, it.urls()))


BLIND = "control: blind replicas"

POINTS: Final = ("before-append", "after-staging", "after-append", "before-reply")
SCENARIOS: Final[dict[str, Scenario]] = {
    KILL: kill,
    **{AT.format(point.replace("-", " ")): kill_at(point) for point in POINTS},
    STORE: kill_store,
    BOTH: kill_both,
    STORE_ON_SNAPSHOTS: kill_store_on_snapshots,
    STORE_LINK: cut_from_store,
    CLIENT_LINK: cut_from_clients,
    SIGTERM: terminate,
}
# How often each is to be brought about in a whole run.
GOALS: Final[dict[str, int]] = {
    KILL: 400,
    **{AT.format(point.replace("-", " ")): 150 for point in POINTS},
    STORE: 200,
    BOTH: 100,
    STORE_ON_SNAPSHOTS: 20,
    STORE_LINK: 200,
    CLIENT_LINK: 200,
    SIGTERM: 40,
}
