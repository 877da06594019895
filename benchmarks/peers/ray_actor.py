"""A parameter server as Ray's documentation has it: an actor with the parameters, workers that are actors too. P1.

    python -m benchmarks.peers.ray_actor SIZE WORKERS DIRECTORY

Large arrays go through Ray's object store in shared memory, both ways, and are read where they lie: the actor's Adam
reads the gradient out of the store, the worker gets a view of the parameters. Small ones (up to 100 KB) travel in the
call. The actor is the plain one, which takes one call after the other.
"""

import os
import sys
import time
import warnings

# The first is the only way to a Ray that listens on the loopback alone: it takes this machine for one that can have
# no cluster.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import ray
import torch

from benchmarks.peers.contestant import Counts, checked, gradient, serve, tally, window

STORE_BYTES = 3 << 30


@ray.remote(num_cpus=0)
class ParameterServer:
    def __init__(self, size: int) -> None:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to a gradient
        self.params = torch.zeros(size, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.params], fused=True)
        self.steps = 0

    def push(self, array: np.ndarray) -> np.ndarray:
        self.params.grad = torch.from_numpy(array)
        self.optimizer.step()
        self.steps += 1
        return self.params.detach().numpy()

    def taken(self) -> tuple[int, int]:
        return self.steps, os.getpid()


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, size: int, server: "ray.actor.ActorHandle") -> None:
        self.server = server
        self.gradient = gradient(size)

    def push(self, array: np.ndarray) -> np.ndarray:
        found: np.ndarray = ray.get(self.server.push.remote(array))
        return found

    def check(self) -> np.ndarray:
        return checked(self.gradient, self.push)

    def turn(self, opens: float, closes: float) -> Counts:
        return window(lambda: self.push(self.gradient), opens, closes)


class RayActor:
    def __init__(self, size: int, workers: int, directory: str) -> None:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=directory,
        )
        self._server = ParameterServer.remote(size)
        self._workers = [Worker.remote(size, self._server) for _ in range(workers)]
        self.server = ray.get(self._server.taken.remote())[1]
        ray.get([worker.__ray_ready__.remote() for worker in self._workers])
        self.version = f"ray {ray.__version__}, torch {torch.__version__}"
        self._pushed = 0

    def check(self) -> np.ndarray:
        found: np.ndarray = ray.get(self._workers[0].check.remote())
        self._pushed = ray.get(self._server.taken.remote())[0]
        return found

    def turn(self, workers: int, warm: float, seconds: float) -> dict[str, float]:
        opens = time.monotonic() + warm
        found = ray.get([worker.turn.remote(opens, opens + seconds) for worker in self._workers[:workers]])
        self._pushed += sum(counts.all for counts in found)
        return tally(found, seconds)

    def end(self) -> dict[str, int]:
        steps = ray.get(self._server.taken.remote())[0]
        ray.shutdown()
        return {"pushed": self._pushed, "steps": steps}


if __name__ == "__main__":
    serve(RayActor(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
