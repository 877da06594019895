"""Flower's server with its FedAdam, and clients that are processes of their own, over its gRPC streams. P1.

    python -m benchmarks.peers.flower_fedadam SIZE WORKERS DIRECTORY

Flower deprecates `start_server` and `start_client` in favour of a SuperLink, which keeps messages until clients ask for
them, at intervals; nobody waits for an interval on the streams, so they stand here. A round sends the
parameters to so many clients, each takes its gradient off them and sends the result, and FedAdam makes one step of
the mean of the differences: a round trip of each client. No evaluation, no logging, a thread for each client.

FedAdam as Flower has it: v begins at 0, and round r (from 1) has the rate lr √(1 − β₂^(r+1)) / (1 − β₁^(r+1)): Adam's
correction of bias, one step ahead.
"""

import logging
import os
import socket
import sys
from multiprocessing.connection import Connection

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0"}

import flwr
import numpy as np
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import History, Server, ServerConfig, SimpleClientManager, start_server
from flwr.server.strategy import FedAdam

from benchmarks.peers.contestant import SCALES, Crew, gradient, in_rounds, serve

MESSAGE_BYTES = 1 << 30
ROUNDS = 1_000_000_000


class Client(NumPyClient):  # type: ignore[misc]
    def __init__(self, size: int) -> None:
        self.gradient = gradient(size)

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, float]
    ) -> tuple[list[np.ndarray], int, dict[str, float]]:
        own = np.float32(config["scale"]) * self.gradient if "scale" in config else self.gradient
        return [np.subtract(parameters[0], own, out=parameters[0])], 1, {}


def worker(orders: Connection, _: int, size: int, address: str) -> None:
    quiet()
    orders.send(os.getpid())
    start_client(
        server_address=address,
        client=Client(size).to_client(),
        grpc_max_message_length=MESSAGE_BYTES,
        insecure=True,
    )


class FlowerFedAdam(Server):  # type: ignore[misc]
    """A server whose rounds are those that it is asked for on standard input."""

    def __init__(self, size: int, workers: int, address: str) -> None:
        self.version = f"flwr {flwr.__version__}"
        self.server = os.getpid()
        self._size, self._workers, self._address = size, workers, address
        self._config: dict[str, float] = {}
        self._round = self._trips = self._answered = 0
        strategy = FedAdam(
            fraction_fit=0.0,
            fraction_evaluate=0.0,
            min_fit_clients=1,
            min_evaluate_clients=0,
            min_available_clients=1,
            on_fit_config_fn=lambda _: dict(self._config),
            accept_failures=False,
            initial_parameters=ndarrays_to_parameters([np.zeros(size, np.float32)]),
            eta=1e-3,
            beta_1=0.9,
            beta_2=0.999,
            tau=1e-8,
        )
        super().__init__(client_manager=SimpleClientManager(), strategy=strategy)
        self.set_max_workers(workers)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:  # noqa: ARG002
        """What `start_server` calls once it listens."""
        self.parameters = self._get_initial_parameters(server_round=0, timeout=timeout)
        self._crew = Crew(worker, self._workers, self._size, self._address)
        self._crew.ready()
        if not self.client_manager().wait_for(self._workers, timeout=60):
            sys.exit("the clients did not come")
        serve(self)
        return History(), 0.0

    def check(self) -> np.ndarray:
        for scale in SCALES:
            self._config = {"scale": scale}
            self._one_round(1)
        self._config = {}
        found: np.ndarray = parameters_to_ndarrays(self.parameters)[0]
        return found

    def turn(self, workers: int, warm: float, seconds: float) -> dict[str, float]:
        return in_rounds(lambda: self._one_round(workers), workers, warm, seconds)

    def end(self) -> dict[str, int]:
        return {"pushed": self._trips, "steps": self._answered}

    def _one_round(self, workers: int) -> None:
        self.strategy.min_fit_clients = workers
        self._round += 1
        self._trips += workers
        found = self.fit_round(self._round, None)
        if found is None or found[0] is None:
            sys.exit("a round failed")
        self.parameters = found[0]
        self._answered += len(found[2][0])


def quiet() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)


def main() -> None:
    quiet()
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"127.0.0.1:{found.getsockname()[1]}"
    server = FlowerFedAdam(int(sys.argv[1]), int(sys.argv[2]), address)
    start_server(
        server_address=address,
        server=server,
        config=ServerConfig(num_rounds=ROUNDS),
        grpc_max_message_length=MESSAGE_BYTES,
    )


if __name__ == "__main__":
    main()
