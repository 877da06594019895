"""hivemind: workers average their gradients among themselves, and each makes the step itself. P1.

    python -m benchmarks.peers.hivemind_averaging SIZE WORKERS DIRECTORY

It has no server. What stands for a push and a pull is a worker's part in a round: its gradient goes into the
average of the group, and after torch's Adam it has the new parameters, as all others have. The averager is
`DecentralizedAverager`, on which `hivemind.Optimizer` is built; the latter looks for progress at intervals.
Uncompressed, in one group of all workers of the turn, on the loopback. One worker has nobody to average with: there is
no such turn.
"""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import hivemind
import numpy as np
import torch
from hivemind.averaging import DecentralizedAverager

from benchmarks.peers.contestant import SCALES, Crew, given, gradient, in_rounds, serve

# How long a peer looks for others, and the limit for each request of it, which has to be the shorter one.
MATCHING_SECONDS, REQUEST_SECONDS, ROUND_SECONDS = 0.5, 0.3, 60
PART_BYTES = 1 << 20


class Peer:
    def __init__(self, size: int, initial: list[str] | None) -> None:
        self.dht = hivemind.DHT(
            initial_peers=initial,
            host_maddrs=["/ip4/127.0.0.1/tcp/0"],
            start=True,
            use_relay=False,
            use_auto_relay=False,
            nat_port_map=False,
            auto_nat=False,
        )
        self.gradient = torch.from_numpy(gradient(size))
        self.params = torch.zeros(size, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.params], fused=True)
        self.averager: DecentralizedAverager | None = None

    def group(self, workers: int) -> None:
        """Averages in groups of so many from now on."""
        self.leave()
        self.averager = DecentralizedAverager(
            [torch.zeros_like(self.gradient)],
            self.dht,
            start=True,
            prefix=f"p1_{workers}",
            target_group_size=workers,
            min_group_size=workers,
            min_matchmaking_time=MATCHING_SECONDS,
            request_timeout=REQUEST_SECONDS,
            part_size_bytes=PART_BYTES,
            allow_state_sharing=False,
        )

    def push(self, scale: float) -> int:
        """One round; how many had part in it."""
        assert self.averager is not None
        with self.averager.get_tensors() as tensors:
            torch.mul(self.gradient, scale, out=tensors[0])
        found = self.averager.step(timeout=ROUND_SECONDS)
        with self.averager.get_tensors() as tensors:
            self.params.grad = tensors[0]
            self.optimizer.step()
        return 0 if found is None else len(found)

    def values(self) -> np.ndarray:
        found: np.ndarray = self.params.detach().numpy()
        return found

    def leave(self) -> None:
        if self.averager is not None:
            self.averager.shutdown()


def worker(orders: Connection, _: int, size: int, initial: list[str] | None) -> None:
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # as hivemind does: its processes share memory by it
    peer = Peer(size, initial)
    orders.send([str(address) for address in peer.dht.get_visible_maddrs()])
    acts: dict[str, Callable[..., Any]] = {"group": peer.group, "push": peer.push, "values": peer.values}
    for word, *arguments in given(orders):
        orders.send(acts[word](*arguments))
    peer.leave()
    peer.dht.shutdown()


class HivemindAveraging:
    def __init__(self, size: int, workers: int) -> None:
        self.version = f"hivemind {hivemind.__version__}, torch {torch.__version__}"
        self.server = None
        first = Crew(worker, 1, size, None)
        self._crews = [first, Crew(worker, workers - 1, size, first.ready()[0])]
        self._crews[1].ready()
        self._group = self._trips = self._shared = 0

    def check(self) -> np.ndarray:
        for scale in SCALES:
            self._round(2, scale)
        found: np.ndarray = self._ask(1, ("values",))[0]
        return found

    def turn(self, workers: int, warm: float, seconds: float) -> dict[str, float]:
        return in_rounds(lambda: self._round(workers, 1.0), workers, warm, seconds)

    def end(self) -> dict[str, int]:
        for crew in self._crews:
            crew.dismiss()
        for crew in self._crews:
            crew.join()
        return {"pushed": self._trips, "steps": self._shared}

    def _round(self, workers: int, scale: float) -> None:
        if workers != self._group:
            self._group = workers
            self._ask(workers, ("group", workers))
        self._trips += workers
        self._shared += sum(found == workers for found in self._ask(workers, ("push", scale)))

    def _ask(self, workers: int, order: tuple[Any, ...]) -> list[Any]:
        first, others = self._crews
        first.send(1, order)
        others.send(workers - 1, order)
        return first.answers(1) + others.answers(workers - 1)


if __name__ == "__main__":
    os.environ["HIVEMIND_LOGLEVEL"] = "ERROR"
    warnings.simplefilter("ignore")
    serve(HivemindAveraging(int(sys.argv[1]), int(sys.argv[2])))
