"""How the libraries are run, for the cases in *_cases.py: one problem, and a run of it for each library.

The problem is four tensors and a gradient for each step, which does not depend on the parameters: whatever an
optimizer does with them, it gets the same ones as every other. A run takes the problem in float64 or in float32
(the dtype of its arrays) and gives the parameters after each step.

Import this module before jax or keras: it switches on JAX's float64 and chooses Keras's backend. Keras keeps its
rates in its own floatx, which is set to float64 here, and casts them to the dtype of the variable; it runs on
JAX, where every optimizer is Keras's own formula (on torch some are torch's loops).
"""

import contextlib
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch

jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")

Array: TypeAlias = np.ndarray
Tensors: TypeAlias = dict[str, Array]

SHAPES: dict[str, tuple[int, ...]] = {"w": (8, 6), "b": (6,), "k": (4, 2, 3), "s": ()}
STEPS = 60
KEPT = (1, 2, 10, 60)
SCHEDULE_STEPS = 200


@dataclass(frozen=True)
class Problem:
    """What every case runs on. Tensors are dicts in the order of SHAPES; all of one dtype, the losses of float64."""

    start: Tensors
    gradients: list[Tensors]
    losses: list[float]  # positive, falling on the whole
    diagonals: list[Tensors]  # of a Hessian, some of them negative

    def of(self, dtype: str, tensors: Sequence[str] | None) -> "Problem":
        """The same in another dtype, and of some of the tensors alone."""
        names = [name for name in SHAPES if tensors is None or name in tensors]

        def cast(found: Tensors) -> Tensors:
            return {name: found[name].astype(dtype) for name in names}

        return Problem(cast(self.start), [cast(g) for g in self.gradients], self.losses,
                       [cast(h) for h in self.diagonals])  # fmt: skip


def make_problem() -> Problem:
    """Magnitudes of gradients run from 1e-3 to 10, evenly on a logarithmic scale.

    All numbers are float32's, so that the runs in both dtypes start from the same ones.
    """
    random = np.random.default_rng(20240)

    def numbers(values: Callable[[tuple[int, ...]], Array]) -> Tensors:
        return {name: np.asarray(values(shape), np.float32) for name, shape in SHAPES.items()}

    def gradient(shape: tuple[int, ...]) -> Array:
        return 10.0 ** random.uniform(-3, 1, shape) * random.choice([-1.0, 1.0], shape)

    start = numbers(lambda shape: random.normal(size=shape))
    gradients = [numbers(gradient) for _ in range(STEPS)]
    losses = [float(np.float32(4.0 * 0.95**step * random.uniform(0.8, 1.2))) for step in range(STEPS)]
    diagonals = [numbers(lambda shape: random.normal(1.0, 1.0, shape)) for _ in range(STEPS)]
    return Problem(start, gradients, losses, diagonals)


def flat(tensors: Mapping[str, Any] | Sequence[Any]) -> Array:
    """All elements as one vector, in the order given; copied."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return np.concatenate([np.asarray(value).reshape(-1) for value in values])


# The problem -> (steps, n): the parameters after each step, flat, in the dtype of the problem.
Run: TypeAlias = Callable[[Problem], Array]


@dataclass(frozen=True)
class Case:
    """A library's run, and how the same is asked for here.

    `optimizer` and `transforms` are JSON values, as in a request. `tensors` are those of the problem that take part,
    all if None. `at` is what the run gives: the parameters, the point for the next gradient, or the final result.
    With `loss` (`hessian_diagonal`) each step brings the problem's loss (diagonal) along; the run finds both in the
    problem. `tolerance` is wider than the table's where that has a reason, and then `why` is that reason. Keys:
    "float64" and "float32", ours against the library's run in that dtype; "rounding", ours in float32 against the
    library's run in float64, which stands for the truth.
    """

    optimizer: dict[str, Any]
    run: Run
    transforms: list[dict[str, Any]] = field(default_factory=list)
    tensors: Sequence[str] | None = None
    at: Literal["params", "next", "final"] = "params"
    loss: bool = False
    tolerance: dict[str, float] = field(default_factory=dict)
    why: str = ""
    hessian_diagonal: bool = False

    def __post_init__(self) -> None:
        if set(self.tolerance) - {"float64", "float32", "rounding"}:
            raise ValueError(f"tolerance has keys of float64, float32, rounding: {self.tolerance}")
        if self.tolerance and not self.why:
            raise ValueError("a tolerance of its own needs a reason: why=…")


TorchTensors: TypeAlias = list[torch.nn.Parameter]


def by_torch(
    make: Callable[[TorchTensors], torch.optim.Optimizer],
    *,
    before: Callable[[TorchTensors], object] | None = None,
    read: Callable[[Any, TorchTensors], Sequence[torch.Tensor]] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    closure: bool = False,
) -> Run:
    """`make` gives the optimizer of the tensors.

    `before` is called with the tensors before each step, their gradients set (clip_grad_norm_); `read` gives what
    is compared if that is not the tensors (an average in the optimizer's state); `schedule` makes a scheduler of
    the optimizer, which steps after it; with `closure` a step gets a closure that gives the problem's loss.
    """

    def run(problem: Problem) -> Array:
        tensors = [torch.nn.Parameter(torch.tensor(value)) for value in problem.start.values()]
        optimizer = make(tensors)
        scheduler = schedule(optimizer) if schedule else None
        seen = []
        for g, loss in zip(problem.gradients, problem.losses, strict=True):
            for tensor, value in zip(tensors, g.values(), strict=True):
                tensor.grad = torch.tensor(value)
            if before:
                before(tensors)
            if closure:
                optimizer.step(lambda loss=loss: torch.tensor(loss, dtype=torch.float64))
            else:
                optimizer.step()
            if scheduler:
                scheduler.step()
            found = read(optimizer, tensors) if read else tensors
            seen.append(flat([tensor.detach().numpy() for tensor in found]))
        return np.stack(seen)

    def in_dtype(problem: Problem) -> Array:
        # torch keeps some scalars (NAdam's product) in the default dtype, whatever the parameters have.
        with default_dtype(torch.float64 if flat(problem.start).dtype == np.float64 else torch.float32):
            return run(problem)

    return in_dtype


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# The package pytorch_optimizer has torch's interface.
by_pytorch_optimizer = by_torch


def by_schedulefree(make: Callable[[TorchTensors], Any], *, at: Literal["y", "x"] = "y") -> Run:
    """The package schedulefree: y is where the gradient is taken (our `at=next`), x the average (`at=final`)."""

    def started(tensors: TorchTensors) -> Any:
        optimizer = make(tensors)
        optimizer.train()
        return optimizer

    def average(optimizer: Any, tensors: TorchTensors) -> list[torch.Tensor]:
        # Going from y to x and back rounds y: the tensors get their own bits back.
        y = [tensor.detach().clone() for tensor in tensors]
        optimizer.eval()
        x = [tensor.detach().clone() for tensor in tensors]
        optimizer.train()
        with torch.no_grad():
            for tensor, value in zip(tensors, y, strict=True):
                tensor.copy_(value)
        return x

    return by_torch(started, read=average if at == "x" else None)


def by_optax(
    transformation: Any,
    *,
    read: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]] | None = None,
    loss: bool = False,
    jit: bool = False,
) -> Run:
    """`transformation` is optax's; a rate in it that is a schedule goes through `counted`.

    `read` gives what is compared, of the state and the parameters (schedule_free_eval_params); with `loss` the update
    gets the problem's loss as `value`. `jit` is for transformations with branches, which JAX would compile anew
    at each step; the compiler joins multiplications and additions, so that last bits differ.
    """

    def run(problem: Problem) -> Array:
        update = jax.jit(transformation.update) if jit else transformation.update
        params = {name: jnp.asarray(value) for name, value in problem.start.items()}
        state = transformation.init(params)
        seen = []
        for g, value in zip(problem.gradients, problem.losses, strict=True):
            gradients = {name: jnp.asarray(value) for name, value in g.items()}
            beside = {"value": jnp.asarray(value, jnp.float64)} if loss else {}
            updates, state = update(gradients, state, params, **beside)
            params = optax.apply_updates(params, updates)
            found = read(state, params) if read else params
            seen.append(flat([found[name] for name in problem.start]))
        return np.stack(seen)

    return run


def counted(schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An optax schedule in float64: optax counts in int32, of which JAX would make a float32 rate."""
    return lambda count: schedule(count.astype(jnp.float64))


def by_keras(
    make: Callable[[], Any], *, read: Callable[[Any, list[Any]], Sequence[Any]] | None = None, name: str = "{}"
) -> Run:
    """`make` gives a fresh Keras optimizer. `name` makes the variables' names, where Keras goes by them."""

    def run(problem: Problem) -> Array:
        variables = [
            keras.Variable(value, dtype=value.dtype.name, name=name.format(key)) for key, value in problem.start.items()
        ]
        optimizer = make()
        optimizer.build(variables)
        seen = []
        for g in problem.gradients:
            optimizer.apply([jnp.asarray(value) for value in g.values()], variables)
            found = read(optimizer, variables) if read else variables
            seen.append(flat([np.asarray(getattr(value, "value", value)) for value in found]))
        return np.stack(seen)

    return run
