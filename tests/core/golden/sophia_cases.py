"""Sophia, with a diagonal of the Hessian at every step."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import torch
from libraries import Array, Case, Problem, Run, flat
from pytorch_optimizer import SophiaH

# pytorch_optimizer clips m/h to ±0.5: that is 0.5 times m/(0.5 h), clipped to ±1.
CLIPPED = {"kind": "sophia", "lr": 0.01 * 0.5, "gamma": 0.5, "eps": 1e-12 * 0.5, "weight_decay": 0.0}


def by_given_hessian(**settings: Any) -> Run:
    def run(problem: Problem) -> Array:
        tensors = [torch.nn.Parameter(torch.tensor(value)) for value in problem.start.values()]
        optimizer = SophiaH(tensors, **settings)
        seen = []
        for g, diagonal in zip(problem.gradients, problem.diagonals, strict=True):
            for tensor, value in zip(tensors, g.values(), strict=True):
                tensor.grad = torch.tensor(value)
            optimizer.step(hessian=[torch.tensor(value) for value in diagonal.values()])
            seen.append(flat([tensor.detach().numpy() for tensor in tensors]))
        return np.stack(seen)

    return run


def by_diagonal_ahead(beta2: float, **settings: Any) -> Run:
    """optax takes a diagonal in after the step that it came with, so it is given each a step before ours."""

    def given(updates: Any, state: Any, params: Any = None, *, diagonal: Any, **_: Any) -> Any:
        return diagonal, state

    estimate = optax.GradientTransformationExtraArgs(lambda _: None, given)
    sophia = optax.contrib.sophia(0.01, b2=beta2, update_interval=1, hessian_diagonal_fn=estimate, **settings)

    def run(problem: Problem) -> Array:
        params = {name: jnp.asarray(value) for name, value in problem.start.items()}
        diagonals = [{name: jnp.asarray(value) for name, value in each.items()} for each in problem.diagonals]
        first, *others = sophia.init(params)
        started = {name: (1 - beta2) * value for name, value in diagonals[0].items()}
        state = (first._replace(nu=started), *others)
        seen = []
        for g, diagonal in zip(problem.gradients, [*diagonals[1:], diagonals[0]], strict=True):
            gradients = {name: jnp.asarray(value) for name, value in g.items()}
            updates, state = sophia.update(gradients, state, params, diagonal=diagonal)
            params = optax.apply_updates(params, updates)
            seen.append(flat([params[name] for name in problem.start]))
        return np.stack(seen)

    return run


CASES = {
    "pytorch_optimizer-sophia": Case(CLIPPED, by_given_hessian(lr=0.01, p=0.5), hessian_diagonal=True),
    "pytorch_optimizer-sophia-decay": Case(
        # There the rate that the weights decay by is not multiplied by p.
        CLIPPED | {"weight_decay": 0.1 / 0.5, "beta1": 0.9, "beta2": 0.9},
        by_given_hessian(lr=0.01, p=0.5, betas=(0.9, 0.9), weight_decay=0.1),
        hessian_diagonal=True,
    ),
    "optax-sophia": Case(
        {"kind": "sophia", "lr": 0.01, "beta1": 0.965, "beta2": 0.9, "gamma": 0.5, "eps": 1e-8,
         "weight_decay": 1e-4, "bias_correction": True},
        by_diagonal_ahead(0.9, gamma=0.5),
        hessian_diagonal=True,
    ),
}  # fmt: skip
