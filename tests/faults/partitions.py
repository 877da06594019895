"""Networks that fall apart between services and stores, in namespaces of their own.

`partitions` cuts the services off from their store. `split_brains` cuts a primary, with a service and its clients, off
from its replica, with another service and other clients. The replica is made the primary, and there are two for a
while; when the cable is whole again the old one becomes a replica of the new one: what it took meanwhile is gone.
"""

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.crowd import Crowd, Target, Verdict, Window, accepting, replicas, rounds, verdict
from tests.faults.namespaces import Network, Wire, wired
from tests.faults.nursery import Replica
from tests.faults.stores import AT_ONCE, DURABLE, VOLATILE, Forwarder, StoreServer, until
from tests.nursery import Nursery, nursery


def partitions(directory: Path, seed: int, times: int) -> Verdict:
    """The services are cut off from their store: the cable is dead, or swallows what is sent. Raises Unpermitted."""
    draw, injected = random.Random(seed), 0
    with (
        wired(swallows=True) as wire,
        _store(wire.left, directory / "store", wire.LEFT) as store,
        wire.right.inside(),
        nursery() as born,
        replicas(born, directory, 2, "--redis-url", store.url) as servers,
    ):
        crowd = Crowd(servers, seed, inside=wire.right.inside).start()
        for _ in rounds(crowd, times, draw):
            injected += cut_off(crowd, wire, draw)
        with store.client() as client:
            return verdict("partition from the store", injected, client, crowd)


@contextlib.contextmanager
def _store(network: Network, directory: Path, host: str) -> Iterator[StoreServer]:
    with network.inside():
        server = StoreServer(directory, *DURABLE, host=host).start()
    try:
        yield server
    finally:
        server.kill()


def cut_off(crowd: Crowd, wire: Wire, draw: random.Random) -> bool:
    """Whether nothing was acknowledged for a while."""
    cut, mend = draw.choice(((wire.unplug, wire.plug), (wire.swallow, wire.deliver)))
    cut()
    try:
        time.sleep(0.2)  # what was on its way has arrived
        before = crowd.acknowledged
        time.sleep(draw.uniform(0.3, 2))
        return crowd.acknowledged == before
    finally:
        mend()


class Side:
    """One half: a store, a service that goes to whichever is the primary, and the network that both are in."""

    def __init__(self, network: Network, directory: Path, host: str) -> None:
        self.network = network
        self.servers: list[Replica] = []
        with network.inside():
            self.store = StoreServer(directory / f"store-{host}", *VOLATILE, *AT_ONCE, host=host).start()
            self.front = Forwarder(self.store.address)
            self.born = Nursery()
        self._data = directory / f"data-{host}"

    def serve(self, *arguments: str) -> None:
        with self.network.inside():
            server = Replica(self.born, self._data, "--redis-url", self.front.url, *arguments)
            self.servers.append(server.start())

    def follow(self, other: "Side") -> None:
        """Its store becomes a replica of the other's, and has all of it."""
        with self.network.inside():
            self.front.lead(None)
            self.store.call("REPLICAOF", *other.store.address)
            until(lambda: self.store.info("replication")["master_link_status"] == "up", "the replica follows")
            self.front.lead(other.store.address)

    def promote(self, targets: Sequence[Target]) -> dict[str, int]:
        """Its store is a primary from now on, and its service goes there. Returns at which steps that stands."""
        with self.network.inside(), self.store.client() as store:
            self.front.lead(None)
            store.execute_command("REPLICAOF", "NO", "ONE")
            steps = {target.id: target.stands(store) for target in targets}
            self.front.lead(self.store.address)
            return steps

    def close(self) -> None:
        for server in self.servers:
            server.stop()
        self.born.close()
        self.front.close()
        self.store.kill()


def split_brains(directory: Path, seed: int, times: int, *, replicated: bool = False) -> Verdict:
    """Two primaries for a while, each with clients; `replicated`: neither may acknowledge anything then.

    Raises Unpermitted.
    """
    draw, injected = random.Random(seed), 0
    with contextlib.ExitStack() as opened:
        wire = opened.enter_context(wired())
        sides = []
        for network, host in ((wire.left, wire.LEFT), (wire.right, wire.RIGHT)):
            sides.append(Side(network, directory, host))
            opened.callback(sides[-1].close)
        old, new = sides
        new.follow(old)
        for side in sides:
            side.serve(*(("--ack", "replicated") if replicated else ()))
        left = Crowd(old.servers, seed, lossy=True, clients=2, name="left", inside=wire.left.inside)
        right = Crowd(
            new.servers, seed + 1, lossy=True, clients=2, name="right", inside=wire.right.inside, targets=left.targets
        )
        crowds = (left, right)
        opened.enter_context(wire.left.inside())  # whence the operator works
        with accepting(left.targets, old.front.url) as operator:
            for crowd in crowds:
                crowd.start()
            for i in rounds(left, times, draw):
                names = ("left", "right")[i % 2]
                right.fault()
                taken = split(wire, old, new, left.targets, names, draw.uniform(0.3, 1.5), lossy=not replicated)
                injected += replicated or taken > 0
                old, new = new, old
                right.fault()
            right.finish()
        with old.store.client() as store:
            return operator.judge(verdict("split brain", injected, store, *crowds), times)


def split(
    wire: Wire, old: Side, new: Side, targets: Sequence[Target], names: str, seconds: float, *, lossy: bool
) -> int:
    """Returns how much of what the old primary's clients, whose names begin with `names`, were told is gone then.

    `lossy`: they may have been told something.
    """
    wire.unplug()
    cut = time.monotonic()
    steps = new.promote(targets)
    time.sleep(seconds)
    with old.network.inside():
        old.front.lead(None)
    closed = time.monotonic()
    gone = 0
    for target in targets:
        # Just before the cut replication may have been behind, whoever's step it was.
        windows = Window(cut, cut, steps[target.id]), Window(cut, closed, steps[target.id], names)
        gone += sum(windows[1].has(told) for told in target.acknowledged)
        target.windows += windows if lossy else ()
    wire.plug()
    old.follow(new)
    return gone
