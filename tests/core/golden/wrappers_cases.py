"""What optax and pytorch_optimizer say of the methods around others: lookahead and sam."""

import jax.numpy as jnp
import numpy as np
import optax
import pytorch_optimizer
import torch
from libraries import Array, Case, Problem, Run, by_optax, by_torch, flat

MOMENTUM = {"kind": "momentum", "lr": 0.05, "momentum": 0.9}
ADAM = {"kind": "adam", "lr": 0.01}
FLOAT32_NORM = {"tolerance": {"float64": 5e-9}, "why": "it takes the gradient's norm in float32 whatever the dtype"}


def optax_lookahead(fast: optax.GradientTransformation, sync_period: int, slow_step: float) -> Run:
    """optax keeps both points as the parameters; the fast one is where gradients are taken."""
    transformation = optax.lookahead(fast, sync_period, slow_step)

    def run(problem: Problem) -> Array:
        start = {name: jnp.asarray(value) for name, value in problem.start.items()}
        params, seen = optax.LookaheadParams.init_synced(start), []
        state = transformation.init(params)
        for g in problem.gradients:
            gradients = {name: jnp.asarray(value) for name, value in g.items()}
            updates, state = transformation.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(flat([params.fast[name] for name in problem.start]))
        return np.stack(seen)

    return run


def optax_sam(optimizer: optax.GradientTransformation, rho: float) -> optax.GradientTransformation:
    return optax.contrib.sam(optimizer, optax.chain(optax.contrib.normalize(), optax.sgd(rho)), sync_period=2)


def torch_sam(rho: float, *, adaptive: bool) -> Run:
    """Every odd gradient climbs, every even one is that of the step."""

    def run(problem: Problem) -> Array:
        tensors = [torch.nn.Parameter(torch.tensor(value)) for value in problem.start.values()]
        optimizer = pytorch_optimizer.SAM(
            tensors, torch.optim.SGD, rho=rho, adaptive=adaptive, perturb_eps=0.0, lr=0.05, momentum=0.9
        )
        seen = []
        for count, g in enumerate(problem.gradients, 1):
            for tensor, value in zip(tensors, g.values(), strict=True):
                tensor.grad = torch.tensor(value)
            if count % 2:
                optimizer.first_step()
            else:
                optimizer.second_step()
            seen.append(flat([tensor.detach().numpy() for tensor in tensors]))
        return np.stack(seen)

    return run


CASES = {
    "optax-lookahead": Case(
        {"kind": "lookahead", "base": MOMENTUM},
        optax_lookahead(optax.sgd(0.05, momentum=0.9), 6, 0.5),
    ),
    "optax-lookahead-adam": Case(
        {"kind": "lookahead", "base": ADAM, "sync_period": 5, "slow_step": 0.8},
        optax_lookahead(optax.adam(0.01), 5, 0.8),
    ),
    "pytorch_optimizer-lookahead": Case(
        {"kind": "lookahead", "base": ADAM, "sync_period": 5, "slow_step": 0.8},
        by_torch(lambda p: pytorch_optimizer.Lookahead(torch.optim.Adam(p, lr=0.01), k=5, alpha=0.8)),
    ),
    "optax-sam": Case(
        {"kind": "sam", "base": MOMENTUM, "rho": 0.1},
        by_optax(optax_sam(optax.sgd(0.05, momentum=0.9), 0.1)),
        at="next",
    ),
    "optax-sam-adam": Case(
        {"kind": "sam", "base": ADAM, "rho": 0.5}, by_optax(optax_sam(optax.adam(0.01), 0.5)), at="next"
    ),
    "pytorch_optimizer-sam": Case(
        {"kind": "sam", "base": MOMENTUM, "rho": 0.1}, torch_sam(0.1, adaptive=False), at="next", **FLOAT32_NORM
    ),
    "pytorch_optimizer-sam-adaptive": Case(
        {"kind": "sam", "base": MOMENTUM, "rho": 0.5, "adaptive": True},
        torch_sam(0.5, adaptive=True),
        at="next",
        **FLOAT32_NORM,
    ),
}
