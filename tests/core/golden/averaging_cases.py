"""Averages over points, with what torch and optax average parameters with."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.optim import swa_utils


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


# name -> (our averaging, points (steps, n) -> their average (n,))
AVERAGES = {
    "torch-ema": (
        {"kind": "ema", "decay": 0.9, "start": "first"},
        lambda points: torch_average(points, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
    ),
    "torch-swa": ({"kind": "polyak"}, torch_average),
    "optax-ema": (
        {"kind": "ema", "decay": 0.9, "debias": False},
        lambda points: optax_average(points, debias=False),
    ),
    "optax-ema-debiased": ({"kind": "ema", "decay": 0.9}, lambda points: optax_average(points, debias=True)),
}
