"""Trains a classifier of handwritten digits by four optimizers, all of them over HTTP.

The model lives here and the optimizers live in the service: this program computes a gradient in NumPy, posts it,
and goes on with the parameters that come back. Nothing but the standard library speaks to the service, so any
language that has an HTTP client can do the same. Read it in this order: `Ravine` (a call), `session` (an
optimizer's lifetime), `train` (the loop). `pictures.py` draws what came out.

    python examples/digits.py                              starts a service of its own, and stops it again
    python examples/digits.py --url http://127.0.0.1:8000  uses one that runs

The data: 1,797 images of 8 × 8 pixels from the UCI repository (Alpaydin & Kaynak 1998, doi:10.24432/C50P49), as
scikit-learn ships them.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60
STOP_SECONDS = 40
LEAVE = (signal.SIGTERM, signal.SIGHUP)
SEED = 0
BATCH = 64
CLASSES = 10

Tensors = dict[str, np.ndarray]

DIGITS_OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "sgd", "lr": 0.1},
    {"kind": "momentum", "lr": 0.02, "momentum": 0.9},
    {"kind": "rmsprop", "lr": 0.005},
    {"kind": "adam", "lr": 0.01},
]

# f = (x² + 30 y²) / 2. The rates suit a valley that is 30 times as steep across as along.
CURVATURE = np.array([1.0, 30.0])
RAVINE_START = np.array([-4.0, 1.5])
RAVINE_STEPS = 60
RAVINE_OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "sgd", "lr": 0.06},
    {"kind": "momentum", "lr": 0.02, "momentum": 0.8},
    {"kind": "rmsprop", "lr": {"kind": "exponential", "init": 0.2, "rate": 0.97}, "alpha": 0.9},
    {"kind": "adam", "lr": 0.3, "beta1": 0.8, "beta2": 0.99},
]


# --- the service, over HTTP ---------------------------------------------------------------------------------------


class CallFailed(Exception):
    """The service cannot be reached, or it refused; then the message ends with its problem document (RFC 9457)."""


class Ravine:
    """A service by its URL, over one connection that is kept open."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not the URL of a service: {url}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=30)
        self._prefix = parts.path

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The reply's JSON, None where it has no body. Raises CallFailed."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            self._connection.request(method, self._prefix + path, content, headers)
            reply = self._connection.getresponse()
            received = reply.read()
        except BaseException as error:
            self._connection.close()  # a call that was cut short, by Ctrl-C for one, would spoil the next
            if isinstance(error, (OSError, http.client.HTTPException)):
                raise CallFailed(f"{method} {self.url}{path}: {error}") from error
            raise
        if reply.status >= 400:
            raise CallFailed(f"{method} {self.url}{path}: {reply.status} {received.decode(errors='replace')}")
        return json.loads(received) if received else None


@contextlib.contextmanager
def session(ravine: Ravine, optimizer: dict[str, Any], params: Tensors) -> Iterator[str]:
    """The path of a new session that holds `params`. The session is deleted in the end, whatever happens."""
    request = {"name": f"demo, {optimizer['kind']}", "optimizer": optimizer, "params": to_json(params)}
    path = f"/v1/sessions/{ravine.call('POST', '/v1/sessions', request)['id']}"
    try:
        yield path
    finally:
        ravine.call("DELETE", path)


def step(ravine: Ravine, path: str, gradients: Tensors, loss: float) -> Tensors:
    """Posts the gradients and returns the parameters that the optimizer makes of them."""
    return from_json(ravine.call("POST", f"{path}/steps", {"gradients": to_json(gradients), "loss": loss})["params"])


def to_json(tensors: Tensors) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def from_json(tensors: dict[str, Any]) -> Tensors:
    return {name: np.array(tensor) for name, tensor in tensors.items()}


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 64), standardised, and their labels of shape (n,)."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def read_digits(file: Path | None = None) -> Digits:
    """A fixed fifth of the images is kept for testing; the scale is that of the others.

    They come from scikit-learn, or from the arrays `images` (n, 64) and `labels` (n,) of an .npz.
    """
    if file is None:
        from sklearn.datasets import load_digits  # here, so that all but the data and the pictures needs NumPy alone

        x, y = load_digits(return_X_y=True)
    else:
        with np.load(file) as arrays:
            x, y = arrays["images"].astype(float), arrays["labels"].astype(int)
    order = np.random.default_rng(SEED).permutation(len(y))
    train, test = np.split(order, [len(y) * 4 // 5])
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1.0)  # some pixels at the rim are always white
    return Digits(x[train], y[train], x[test], y[test])


def log_probabilities(params: Tensors, x: np.ndarray) -> np.ndarray:
    scores = x @ params["w"] + params["b"]
    scores -= scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def cross_entropy(params: Tensors, x: np.ndarray, y: np.ndarray) -> float:
    return -float(log_probabilities(params, x)[np.arange(len(y)), y].mean())


def gradient(params: Tensors, x: np.ndarray, y: np.ndarray) -> tuple[float, Tensors]:
    """The mean cross-entropy of a batch, and its gradient: (probability - truth) times the input."""
    logs = log_probabilities(params, x)
    error = (np.exp(logs) - np.eye(CLASSES)[y]) / len(y)
    return -float(logs[np.arange(len(y)), y].mean()), {"w": x.T @ error, "b": error.sum(axis=0)}


def accuracy(params: Tensors, x: np.ndarray, y: np.ndarray) -> float:
    return float((log_probabilities(params, x).argmax(axis=1) == y).mean())


def batches(count: int, epochs: int) -> list[np.ndarray]:
    """Indices of each minibatch: the same ones, in the same order, for every optimizer."""
    random = np.random.default_rng(SEED)
    shuffled = (random.permutation(count) for _ in range(epochs))
    return [order[first : first + BATCH] for order in shuffled for first in range(0, count, BATCH)]


# --- the loops ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What an optimizer came to; `losses` are those of the whole training set, before and after each step."""

    optimizer: dict[str, Any]
    losses: list[float]
    test_accuracy: float


def train(ravine: Ravine, optimizer: dict[str, Any], digits: Digits, epochs: int) -> Run:
    params: Tensors = {"w": np.zeros((digits.train_x.shape[1], CLASSES)), "b": np.zeros(CLASSES)}
    losses = [cross_entropy(params, digits.train_x, digits.train_y)]
    todo = batches(len(digits.train_y), epochs)
    progress = Progress(optimizer["kind"], len(todo))
    with session(ravine, optimizer, params) as path:
        for done, batch in enumerate(todo, start=1):
            loss, gradients = gradient(params, digits.train_x[batch], digits.train_y[batch])
            params = step(ravine, path, gradients, loss)
            losses.append(cross_entropy(params, digits.train_x, digits.train_y))
            progress.show(done, losses[-1])
    return Run(optimizer, losses, accuracy(params, digits.test_x, digits.test_y))


def descend(ravine: Ravine, optimizer: dict[str, Any]) -> np.ndarray:
    """The points that the optimizer walks through on the quadratic, of shape (steps + 1, 2)."""
    params = {"point": RAVINE_START}
    path = [RAVINE_START]
    with session(ravine, optimizer, params) as address:
        for _ in range(RAVINE_STEPS):
            point = params["point"]
            params = step(ravine, address, {"point": CURVATURE * point}, float(CURVATURE @ point**2 / 2))
            path.append(params["point"])
    return np.array(path)


class Progress:
    """A bar on one line of a terminal; elsewhere, in a log for one, a line per quarter of the way."""

    WIDTH = 30
    REDRAW_SECONDS = 0.05

    def __init__(self, label: str, steps: int) -> None:
        self._label = label
        self._steps = steps
        self._terminal = sys.stdout.isatty()
        self._drawn = 0.0

    def show(self, done: int, loss: float) -> None:
        if self._terminal:
            self._draw(done, loss)
        elif done * 4 // self._steps > (done - 1) * 4 // self._steps:
            print(f"{self._label:<9} {done:>4}/{self._steps}  loss {loss:.4f}", flush=True)

    def _draw(self, done: int, loss: float) -> None:
        now = time.monotonic()
        if done < self._steps and now - self._drawn < self.REDRAW_SECONDS:
            return
        self._drawn = now
        bar = ("#" * (done * self.WIDTH // self._steps)).ljust(self.WIDTH, ".")
        end = "\n" if done == self._steps else ""
        print(f"\r{self._label:<9} [{bar}] {done:>4}/{self._steps}  loss {loss:.4f}", end=end, flush=True)


# --- a service of the demo's own ----------------------------------------------------------------------------------


@contextlib.contextmanager
def own_service() -> Iterator[str]:
    """The URL of a service on a free port, with data that are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ravine-demo-") as directory:
        log = Path(directory) / "log"
        command = [sys.executable, "-m", "service", "serve", "--port", "0", "--data", str(Path(directory) / "data")]
        # Settings meant for another service stay away from this one, and Ctrl-C reaches it by `stop` alone.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAVINE_")}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield wait_for_url(process, log)
        finally:
            stop(process)


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Raises RuntimeError, with the end of the log, if the service does not come up."""
    greeting = "Ravine listens on "
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith(greeting) and line.endswith("\n"):
                return line.removeprefix(greeting).split()[0]
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start; its log ends with:\n{log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Lets the service finish and take its store along; a second Ctrl-C must not leave the store behind."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *LEAVE)}
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- the demo -----------------------------------------------------------------------------------------------------


def demo(url: str, epochs: int, output: Path) -> None:
    import pictures  # before the work begins: it fails where matplotlib is missing

    ravine = Ravine(url)
    digits = read_digits()
    print(f"{len(digits.train_y)} digits to train on, {len(digits.test_y)} to test; the optimizers are at {url}\n")
    started = time.monotonic()
    runs = [train(ravine, optimizer, digits, epochs) for optimizer in DIGITS_OPTIMIZERS]
    report(runs, time.monotonic() - started)
    paths = {optimizer["kind"]: descend(ravine, optimizer) for optimizer in RAVINE_OPTIMIZERS}
    output.mkdir(parents=True, exist_ok=True)
    curves = {run.optimizer["kind"]: run.losses for run in runs}
    for picture in (
        pictures.loss_curves(curves, output / "loss-curves.png"),
        pictures.ravine(paths, CURVATURE, output / "ravine.png"),
    ):
        print(f"wrote {picture}")


def report(runs: list[Run], seconds: float) -> None:
    print("\noptimizer   learning rate   training loss   test accuracy")
    for run in runs:
        kind, rate = run.optimizer["kind"], run.optimizer["lr"]
        print(f"{kind:<9}   {rate:>13}   {run.losses[-1]:>13.4f}   {run.test_accuracy:>13.1%}")
    steps = sum(len(run.losses) - 1 for run in runs)
    print(f"\n{steps} steps over HTTP in {seconds:.1f} s, the gradients included\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train digits by four optimizers over HTTP, and draw two pictures.")
    parser.add_argument("--url", help="a service that runs; left out, the demo starts one of its own")
    parser.add_argument("--epochs", type=positive, default=20, help="passes over the training set (default: 20)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="directory of the pictures")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("not positive")
    return number


def leave(number: int, _frame: FrameType | None) -> None:
    """Takes the way out that Ctrl-C takes: through every `finally`."""
    raise SystemExit(128 + number)


def main() -> int:
    asked = arguments()
    for number in LEAVE:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, leave)
    try:
        with contextlib.nullcontext(asked.url) if asked.url else own_service() as url:
            demo(url, asked.epochs, asked.output)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"\ndigits.py: {error}; `make demo` installs what is needed and runs it", file=sys.stderr)
        return 1
    except (CallFailed, OSError, RuntimeError, ValueError) as error:
        print(f"\ndigits.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
