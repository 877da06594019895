"""A parameter server over torch.distributed.rpc, as torch's tutorials have it. P1.

    python -m benchmarks.peers.torch_rpc SIZE WORKERS DIRECTORY [tcp]

TensorPipe carries the tensors beside the call, on one machine through shared memory; with `tcp` as it does between
machines: of its transports and channels only those that are TCP are let in. The server has threads for all
workers; a lock keeps a step and the copy of its parameters together, without which a worker could be sent parameters
in the middle of somebody else's step. Worker and server find each other by a file, so that nothing listens beyond the
loopback.
"""

import os
import sys
import threading
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}

import numpy as np
import torch
from torch.distributed import rpc

from benchmarks.peers.contestant import Crew, serve, work

SERVER = "server"
# TCP by libuv, and the channel that sends tensors over the transport. (The others read each other's memory.)
TCP = {"_transports": ["uv"], "_channels": ["basic"]}


class ParameterServer:
    def __init__(self, size: int) -> None:
        self.params = torch.zeros(size, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.params], fused=True)
        self.lock = threading.Lock()
        self.steps = 0

    def push(self, gradient: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.params.grad = gradient
            self.optimizer.step()
            self.steps += 1
            return self.params.detach().clone()


holder: dict[str, ParameterServer] = {}


def push(gradient: torch.Tensor) -> torch.Tensor:
    """Runs at the server."""
    return holder[SERVER].push(gradient)


def join(name: str, rank: int, world: int, meeting: str, tcp: bool) -> None:
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=max(16, world), init_method=f"file://{meeting}", rpc_timeout=120, **(TCP if tcp else {})
    )
    rpc.init_rpc(name, rank=rank, world_size=world, rpc_backend_options=options)


def worker(orders: Connection, number: int, size: int, world: int, meeting: str, tcp: bool) -> None:
    warnings.simplefilter("ignore")
    join(f"worker{number}", number + 1, world, meeting, tcp)

    def exchange(array: np.ndarray) -> np.ndarray:
        found: np.ndarray = rpc.rpc_sync(SERVER, push, args=(torch.from_numpy(array),)).numpy()
        return found

    work(orders, size, exchange)
    rpc.shutdown()


class TorchRpc:
    def __init__(self, size: int, workers: int, directory: str, tcp: bool) -> None:
        meeting = str(Path(directory) / "meeting")
        holder[SERVER] = self._server = ParameterServer(size)
        self._crew = Crew(worker, workers, size, workers + 1, meeting, tcp)
        join(SERVER, 0, workers + 1, meeting, tcp)
        self._crew.ready()
        self.server = os.getpid()
        self.version = f"torch {torch.__version__}, {'TCP alone' if tcp else 'shared memory'}"
        self.check, self.turn = self._crew.check, self._crew.turn

    def end(self) -> dict[str, int]:
        self._crew.dismiss()
        rpc.shutdown()
        self._crew.join()
        return {"pushed": self._crew.pushed, "steps": self._server.steps}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve(TorchRpc(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["tcp"]))
