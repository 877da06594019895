"""Runs torch, optax and scipy, and writes what they say into golden.npz: `make oracles`.

The tests read that file alone, so that they need none of the three. It holds the random problem (initial parameters,
a gradient per step), for each case the parameters after some of the steps in float64 and in float32, values of
schedules and of averages, small dense problems, and `about`: the cases as recipes in our own names, and the
libraries' versions.

Parameters are (8, 6) + (6,), flat; gradients have magnitudes from 1e-3 to 10, evenly on a logarithmic scale.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy
import torch
from torch.optim import lr_scheduler, swa_utils

jax.config.update("jax_enable_x64", True)

HERE = Path(__file__).parent
SHAPES = {"w": (8, 6), "b": (6,)}
SIZE = 54
STEPS = 60
KEPT = (1, 2, 3, 10, 30, 60)
SCHEDULE_STEPS = 50

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def by_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Run:
    def run(start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        tensors = [torch.tensor(start[:48].reshape(8, 6)), torch.tensor(start[48:])]
        optimizer = make(tensors)
        seen = []
        for g in gradients:
            tensors[0].grad, tensors[1].grad = torch.tensor(g[:48].reshape(8, 6)), torch.tensor(g[48:])
            optimizer.step()
            seen.append(np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors]))
        return np.stack(seen)

    return run


def by_optax(transformation: optax.GradientTransformation) -> Run:
    def run(start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        params = jnp.asarray(start)
        state = transformation.init(params)
        seen = []
        for g in gradients:
            updates, state = transformation.update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(np.asarray(params))
        return np.stack(seen)

    return run


LINEAR = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 40}
HALVED = {"kind": "step", "init": 0.1, "steps": 10, "factor": 0.5}


def to_linear(count: jax.Array) -> jax.Array:
    """LINEAR; optax counts in int32, of which JAX would make a float32 rate."""
    return optax.linear_schedule(0.1, 0.01, 40)(count.astype(jnp.float64))


SGD, ADAGRAD, RMSPROP = torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop

# name -> (our recipe, the library's run)
CASES: dict[str, tuple[dict[str, Any], Run]] = {
    "torch-sgd": ({"kind": "sgd", "lr": 0.1}, by_torch(lambda p: SGD(p, lr=0.1))),
    "torch-momentum": (
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9},
        by_torch(lambda p: SGD(p, lr=0.01, momentum=0.9)),
    ),
    "torch-nesterov": (
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9, "nesterov": True},
        by_torch(lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    ),
    "torch-momentum-dampening": (
        {"kind": "momentum", "lr": 0.1, "momentum": 0.9, "dampening": 0.7, "first_step": "gradient"},
        by_torch(lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.7)),
    ),
    "torch-adam": ({"kind": "adam", "lr": 0.01}, by_torch(lambda p: torch.optim.Adam(p, lr=0.01))),
    "torch-adam-betas": (
        {"kind": "adam", "lr": 0.01, "beta1": 0.8, "beta2": 0.99, "eps": 1e-5},
        by_torch(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), eps=1e-5)),
    ),
    "torch-adamw": (
        {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
        by_torch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    ),
    "torch-adagrad": ({"kind": "adagrad", "lr": 0.1}, by_torch(lambda p: ADAGRAD(p, lr=0.1))),
    "torch-adagrad-decay-initial": (
        {"kind": "adagrad", "lr": 0.1, "lr_decay": 0.05, "initial_accumulator": 0.3},
        by_torch(lambda p: ADAGRAD(p, lr=0.1, lr_decay=0.05, initial_accumulator_value=0.3)),
    ),
    "torch-rmsprop": ({"kind": "rmsprop", "lr": 0.01}, by_torch(lambda p: RMSPROP(p, lr=0.01))),
    "torch-rmsprop-centered": (
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "centered": True},
        by_torch(lambda p: RMSPROP(p, lr=0.01, alpha=0.9, centered=True)),
    ),
    "torch-rmsprop-momentum": (
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "momentum": 0.9},
        by_torch(lambda p: RMSPROP(p, lr=0.01, alpha=0.9, momentum=0.9)),
    ),
    "torch-rmsprop-centered-momentum": (
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.95, "momentum": 0.5, "centered": True},
        by_torch(lambda p: RMSPROP(p, lr=0.01, alpha=0.95, momentum=0.5, centered=True)),
    ),
    "optax-sgd": ({"kind": "sgd", "lr": 0.1}, by_optax(optax.sgd(0.1))),
    "optax-momentum": (
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9},
        by_optax(optax.sgd(0.01, momentum=0.9)),
    ),
    "optax-nesterov": (
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9, "nesterov": True},
        by_optax(optax.sgd(0.01, momentum=0.9, nesterov=True)),
    ),
    "optax-momentum-average": (
        {"kind": "momentum", "lr": 0.1, "momentum": 0.9, "dampening": 0.9},
        by_optax(optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))),
    ),
    "optax-momentum-scheduled": (
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9},
        by_optax(optax.sgd(to_linear, momentum=0.9)),
    ),
    "optax-momentum-rate-in-velocity": (
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9, "lr_in_velocity": True},
        by_optax(optax.chain(optax.scale_by_learning_rate(to_linear), optax.trace(0.9))),
    ),
    "optax-adam": ({"kind": "adam", "lr": 0.01}, by_optax(optax.adam(0.01))),
    "optax-adam-eps-inside": (
        {"kind": "adam", "lr": 0.01, "eps": 1e-4, "eps_inside": True},
        by_optax(optax.adam(0.01, eps=0.0, eps_root=1e-4)),
    ),
    "optax-adam-scheduled": ({"kind": "adam", "lr": LINEAR}, by_optax(optax.adam(to_linear))),
    "optax-adamw": (
        {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
        by_optax(optax.adamw(0.01, weight_decay=0.1)),
    ),
    "optax-adagrad": (
        {"kind": "adagrad", "lr": 0.1, "eps": 1e-7, "eps_inside": True, "initial_accumulator": 0.1},
        by_optax(optax.adagrad(0.1)),
    ),
    "optax-rmsprop": (
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "eps_inside": True},
        by_optax(optax.rmsprop(0.01, decay=0.9, eps=1e-8)),
    ),
    "optax-rmsprop-centered-momentum": (
        {
            "kind": "rmsprop", "lr": LINEAR, "alpha": 0.9, "eps": 1e-6, "eps_inside": True,
            "centered": True, "momentum": 0.9, "lr_in_velocity": True,
        },
        by_optax(optax.rmsprop(to_linear, decay=0.9, eps=1e-6, centered=True, momentum=0.9)),
    ),
}  # fmt: skip


def torch_schedule(lr: float, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    optimizer = SGD([torch.zeros(1)], lr=lr)
    schedule = make(optimizer)
    values = []
    for _ in range(SCHEDULE_STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def optax_schedule(schedule: optax.Schedule) -> list[float]:
    return [float(schedule(jnp.asarray(s, jnp.float64))) for s in range(SCHEDULE_STEPS)]


# name -> (our schedule, the library's values at the steps 1, 2, …)
SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "torch-linear": (
        {"kind": "linear", "init": 0.1, "end": 0.02, "steps": 30},
        torch_schedule(0.1, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 30)),
    ),
    "torch-exponential": (
        {"kind": "exponential", "init": 0.1, "rate": 0.93},
        torch_schedule(0.1, lambda o: lr_scheduler.ExponentialLR(o, 0.93)),
    ),
    "torch-step": (HALVED, torch_schedule(0.1, lambda o: lr_scheduler.StepLR(o, 10, 0.5))),
    # Past its end torch's cosine climbs again: up to the end alone.
    "torch-cosine": (
        {"kind": "cosine", "init": 0.1, "steps": 49, "floor": 0.003},
        torch_schedule(0.1, lambda o: lr_scheduler.CosineAnnealingLR(o, 49, 0.003)),
    ),
    "optax-constant": ({"kind": "constant", "value": 0.1}, optax_schedule(optax.constant_schedule(0.1))),
    "optax-linear": (
        {"kind": "linear", "init": 0.1, "end": 0.02, "steps": 30},
        optax_schedule(optax.linear_schedule(0.1, 0.02, 30)),
    ),
    "optax-exponential": (
        {"kind": "exponential", "init": 0.1, "rate": 0.5, "steps": 7},
        optax_schedule(optax.exponential_decay(0.1, 7, 0.5)),
    ),
    "optax-exponential-staircase": (
        {"kind": "exponential", "init": 0.1, "rate": 0.5, "steps": 7, "staircase": True},
        optax_schedule(optax.exponential_decay(0.1, 7, 0.5, staircase=True)),
    ),
    "optax-step": (
        HALVED,
        optax_schedule(optax.piecewise_constant_schedule(0.1, {10: 0.5, 20: 0.5, 30: 0.5, 40: 0.5})),
    ),
    "optax-cosine": (
        {"kind": "cosine", "init": 0.1, "steps": 30, "floor": 0.025, "exponent": 1.5},
        optax_schedule(optax.cosine_decay_schedule(0.1, 30, alpha=0.25, exponent=1.5)),
    ),
}


def torch_average(points: np.ndarray, **how: Any) -> np.ndarray:
    """torch averages from the first value on."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor(points[0]))
    averaged = swa_utils.AveragedModel(model, **how)
    for point in points:
        model.weight.data = torch.tensor(point)
        averaged.update_parameters(model)
    return averaged.module.weight.detach().numpy()


def optax_average(points: np.ndarray, *, debias: bool) -> np.ndarray:
    transformation = optax.ema(0.9, debias=debias)
    state = transformation.init(jnp.asarray(points[0]))
    value = None
    for point in points:
        value, state = transformation.update(jnp.asarray(point), state)
    return np.asarray(value)


def averages(points: np.ndarray) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """name -> (our averaging, the library's average over all of `points`)"""
    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    return {
        "torch-ema": ({"kind": "ema", "decay": 0.9, "start": "first"}, torch_average(points, multi_avg_fn=ema)),
        "torch-swa": ({"kind": "polyak"}, torch_average(points)),
        "optax-ema": ({"kind": "ema", "decay": 0.9, "debias": False}, optax_average(points, debias=False)),
        "optax-ema-debiased": ({"kind": "ema", "decay": 0.9}, optax_average(points, debias=True)),
    }


def dense(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Eight parameters: AdaGrad's full matrix by scipy's matrix power, Newton's step by its Cholesky solver."""
    gradients = random.normal(size=(12, 8))
    total, params, seen = 0.2 * np.eye(8), np.zeros(8), []
    for g in gradients:
        total = total + np.outer(g, g)
        params = params - 0.1 * np.real(scipy.linalg.fractional_matrix_power(total + 1e-3 * np.eye(8), -0.5)) @ g
        seen.append(params)
    half = random.normal(size=(8, 8))
    hessian = half @ half.T + np.eye(8)
    newton = -scipy.linalg.solve(hessian, gradients[0], assume_a="pos")
    damped = -scipy.linalg.solve(hessian + 0.7 * np.eye(8), gradients[0], assume_a="pos")
    return {
        "dense/gradients": gradients, "dense/adagrad": np.stack(seen), "dense/hessian": hessian,
        "dense/newton": newton, "dense/newton-damped": damped,
    }  # fmt: skip


def main() -> None:
    random = np.random.default_rng(20240)
    start = random.normal(size=SIZE)
    gradients = 10.0 ** random.uniform(-3, 1, (STEPS, SIZE)) * random.choice([-1.0, 1.0], (STEPS, SIZE))
    # Values of float32, so that the runs in both dtypes start from the same numbers.
    start, gradients = start.astype(np.float32), gradients.astype(np.float32)
    arrays = {"start": start, "gradients": gradients, "schedules": np.array([v for _, v in SCHEDULES.values()])}
    rows = [step - 1 for step in KEPT]
    for name, (_, run) in CASES.items():
        for dtype in ("float64", "float32"):
            found = run(start.astype(dtype), gradients.astype(dtype))
            if found.dtype != dtype:
                raise TypeError(f"{name} ran in {found.dtype}, not in {dtype}")
            arrays[f"{name}/{dtype}"] = found[rows]
    averaged = averages(gradients.astype(np.float64))
    arrays |= {f"average/{name}": value for name, (_, value) in averaged.items()} | dense(random)
    about = {
        "versions": {"torch": torch.__version__.split("+")[0], "optax": optax.__version__, "jax": jax.__version__,
                     "scipy": scipy.__version__, "numpy": np.__version__},
        "shapes": SHAPES,
        "kept": KEPT,
        "cases": {name: recipe for name, (recipe, _) in CASES.items()},
        "schedules": {name: schedule for name, (schedule, _) in SCHEDULES.items()},
        "averages": {name: averaging for name, (averaging, _) in averaged.items()},
    }  # fmt: skip
    np.savez_compressed(HERE / "golden.npz", about=np.array(json.dumps(about)), **arrays)


if __name__ == "__main__":
    main()
