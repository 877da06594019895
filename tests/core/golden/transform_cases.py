"""What the libraries make of a gradient before, and of the parameters after, an optimizer's step.

A library that has no chain of its own gets its function called where the chain would: torch's clip_grad_norm_
before the step, optax's projections after it. The optimizer is mostly plain gradient descent, so that nothing hides
the transform; its gradients have norms of about 20.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from libraries import Array, Case, Problem, Run, TorchTensors, by_keras, by_optax, by_torch, counted, flat
from optax import projections
from optax.contrib._muon import orthogonalize_via_newton_schulz
from pytorch_optimizer.optimizer.agc import agc
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient

LR = 0.1
SGD: dict[str, Any] = {"kind": "sgd", "lr": LR}
MOMENTUM: dict[str, Any] = {"kind": "momentum", "lr": 0.01}
LINEAR = {"kind": "linear", "init": 0.1, "end": 0.02, "steps": 40}
VECTORS_AND_MATRIX = ("w", "b", "s")

clip_grad_norm, clip_grad_value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_


def torch_sgd(before: Callable[[TorchTensors], object] | None = None, **options: Any) -> Run:
    return by_torch(lambda p: torch.optim.SGD(p, lr=LR, **options), before=before)


def each(change: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor]) -> Callable[[TorchTensors], None]:
    """Changes the gradient of each tensor by itself: change(gradient, parameter)."""

    def before(tensors: TorchTensors) -> None:
        for tensor in tensors:
            assert tensor.grad is not None
            tensor.grad = change(tensor.grad, tensor.detach())

    return before


def centralized(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    centralize_gradient(g)
    return g


def polar(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if g.ndim != 2:
        return g
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    return left @ right


def torch_accumulated(steps: int, make: Callable[[TorchTensors], torch.optim.Optimizer], *, mean: bool) -> Run:
    """As torch's users do it: backward() adds to what is in `grad`, and every so often there is a step."""

    def run(problem: Problem) -> Array:
        tensors = [torch.nn.Parameter(torch.tensor(value)) for value in problem.start.values()]
        optimizer = make(tensors)
        seen = []
        for count, g in enumerate(problem.gradients, 1):
            for tensor, value in zip(tensors, g.values(), strict=True):
                loss = (tensor * torch.tensor(value)).sum()
                (loss / steps if mean else loss).backward()
            if count % steps == 0:
                optimizer.step()
                optimizer.zero_grad()
            seen.append(flat([tensor.detach().numpy() for tensor in tensors]))
        return np.stack(seen)

    return run


def torch_scaled(**options: Any) -> Run:
    """The problem's gradients are taken for those of a scaled loss."""

    def run(problem: Problem) -> Array:
        tensors = [torch.nn.Parameter(torch.tensor(value)) for value in problem.start.values()]
        optimizer = torch.optim.SGD(tensors, lr=LR)
        scaler = torch.amp.GradScaler("cpu", **options)
        scaler.scale(torch.ones(()))  # makes its tensors
        seen = []
        for g in problem.gradients:
            for tensor, value in zip(tensors, g.values(), strict=True):
                tensor.grad = torch.tensor(value)
            scaler.step(optimizer)
            scaler.update()
            seen.append(flat([tensor.detach().numpy() for tensor in tensors]))
        return np.stack(seen)

    return run


def optax_chain(*transformations: Any, jit: bool = False) -> Run:
    return by_optax(optax.chain(*transformations, optax.sgd(LR)), jit=jit)


def optax_accumulated(*, mean: bool) -> Run:
    """Four gradients for each step; without an accumulator_dtype optax would take float32."""
    inner = optax.sgd(0.01, 0.9)
    return by_optax(optax.MultiSteps(inner, 4, use_grad_mean=mean, accumulator_dtype=jnp.float64), jit=True)


def optax_projected(project: Callable[[jax.Array], jax.Array]) -> Run:
    """Gradient descent by optax, and then each tensor projected by itself, in float64 (float32 does not stay it)."""

    nearest = jax.jit(lambda x: project(x.astype(jnp.float64)).astype(x.dtype))

    def run(problem: Problem) -> Array:
        optimizer = optax.sgd(LR)
        params = {name: jnp.asarray(value) for name, value in problem.start.items()}
        state = optimizer.init(params)
        seen = []
        for g in problem.gradients:
            updates, state = optimizer.update({name: jnp.asarray(value) for name, value in g.items()}, state, params)
            moved = optax.apply_updates(params, updates)
            params = {name: nearest(value) for name, value in moved.items()}
            seen.append(flat([params[name] for name in problem.start]))
        return np.stack(seen)

    return run


def of_rows(project: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda tensor: jax.vmap(project)(tensor) if tensor.ndim > 1 else project(tensor)


def newton_schulz(updates: dict[str, jax.Array], params: Any) -> dict[str, jax.Array]:
    coefficients = jnp.array([3.4445, -4.7750, 2.0315], jnp.float64)
    return {
        name: orthogonalize_via_newton_schulz(g, coefficients, eps=0.0) if g.ndim == 2 else g
        for name, g in updates.items()
    }


def keras_sgd(**options: Any) -> Run:
    return by_keras(lambda: keras.optimizers.SGD(LR, **options))


def case(transform: dict[str, Any], run: Run, **options: Any) -> Case:
    return Case(SGD, run, [transform], **options)


def clipped(kind: str, max_norm: float, **options: Any) -> dict[str, Any]:
    return {"kind": kind, "max_norm": max_norm} | options


CLIPPING = {
    "torch-clip_by_global_norm": case(
        clipped("clip_by_global_norm", 18.0, eps=1e-6), torch_sgd(lambda p: clip_grad_norm(p, 18.0))
    ),
    "optax-clip_by_global_norm": case(
        clipped("clip_by_global_norm", 18.0), optax_chain(optax.clip_by_global_norm(18.0))
    ),
    "keras-clip_by_global_norm": case(clipped("clip_by_global_norm", 18.0), keras_sgd(global_clipnorm=18.0)),
    "torch-clip_by_norm": case(
        clipped("clip_by_norm", 7.0, eps=1e-6), torch_sgd(lambda p: [clip_grad_norm([q], 7.0) for q in p])
    ),
    "keras-clip_by_norm": case(clipped("clip_by_norm", 7.0), keras_sgd(clipnorm=7.0)),
    "torch-clip": case({"kind": "clip", "max_value": 0.5}, torch_sgd(lambda p: clip_grad_value(p, 0.5))),
    "torch-clip-low-high": case(
        {"kind": "clip", "low": -0.25, "high": 2.0}, torch_sgd(each(lambda g, _: g.clamp(-0.25, 2.0)))
    ),
    "torch-clip-high": case({"kind": "clip", "high": 2.0}, torch_sgd(each(lambda g, _: g.clamp(max=2.0)))),
    "optax-clip": case({"kind": "clip", "max_value": 0.5}, optax_chain(optax.clip(0.5))),
    "keras-clip": case({"kind": "clip", "max_value": 0.5}, keras_sgd(clipvalue=0.5)),
    "optax-adaptive_clip": case(
        {"kind": "adaptive_clip", "clipping": 0.5, "units": "last"},
        optax_chain(optax.adaptive_grad_clip(0.5)),
        tensors=VECTORS_AND_MATRIX,
    ),
    "optax-adaptive_clip-three-dimensions": case(
        {"kind": "adaptive_clip", "clipping": 0.5, "units": "last"},
        optax_chain(optax.adaptive_grad_clip(0.5, axis=(0, 1))),
        tensors=("k",),
    ),
    "optax-adaptive_clip-first": case(
        {"kind": "adaptive_clip", "clipping": 0.5, "eps": 1.0},
        optax_chain(optax.adaptive_grad_clip(0.5, eps=1.0, axis=(1, 2))),
        tensors=("k",),
    ),
    "pytorch_optimizer-adaptive_clip": case(
        {"kind": "adaptive_clip"}, torch_sgd(each(lambda g, p: agc(p, g))), tensors=VECTORS_AND_MATRIX
    ),
}

SCALING = {
    "optax-normalize": case({"kind": "normalize", "eps": 1e-6}, optax_chain(optax.normalize_by_update_norm())),
    "torch-normalize-tensor": case(
        {"kind": "normalize", "per": "tensor"}, torch_sgd(each(lambda g, _: g / torch.linalg.vector_norm(g)))
    ),
    "optax-centralize": case({"kind": "centralize"}, optax_chain(optax.centralize())),
    "pytorch_optimizer-centralize": case({"kind": "centralize"}, torch_sgd(each(centralized))),
    "torch-centralize-last": case(
        {"kind": "centralize", "units": "last"},
        torch_sgd(each(lambda g, _: g - g.mean(dim=tuple(range(g.ndim - 1)), keepdim=True) if g.ndim > 1 else g)),
    ),
    "optax-sign": case({"kind": "sign"}, optax_chain(optax.scale_by_sign())),
    "keras-unscale": case({"kind": "unscale", "scale": 8.0}, keras_sgd(loss_scale_factor=8.0)),
    "torch-unscale-dynamic": case(
        {"kind": "unscale", "scale": 2.0, "dynamic": True, "growth_factor": 1.5, "growth_interval": 7},
        torch_scaled(init_scale=2.0, growth_factor=1.5, growth_interval=7),
        tolerance={"float64": 1e-7},
        why="torch multiplies by the reciprocal of the scale in float32; Ravine divides by the scale",
    ),
    "torch-unscale-dynamic-powers": case(
        {"kind": "unscale", "scale": 2.0, "dynamic": True, "growth_interval": 25},
        torch_scaled(init_scale=2.0, growth_interval=25),
    ),
}

PENALTIES = {
    "torch-weight_decay-sgd": case({"kind": "weight_decay", "weight_decay": 0.1}, torch_sgd(weight_decay=0.1)),
    "torch-weight_decay-momentum": Case(
        {"kind": "momentum", "lr": 0.01, "nesterov": True},
        by_torch(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)),
        [{"kind": "weight_decay", "weight_decay": 0.1}],
    ),
    "torch-weight_decay-adam": Case(
        {"kind": "adam", "lr": 0.01},
        by_torch(lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        [{"kind": "weight_decay", "weight_decay": 0.1}],
    ),
    "torch-weight_decay-adagrad": Case(
        {"kind": "adagrad", "lr": 0.1},
        by_torch(lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1)),
        [{"kind": "weight_decay", "weight_decay": 0.1}],
    ),
    "torch-weight_decay-rmsprop": Case(
        {"kind": "rmsprop", "lr": 0.01},
        by_torch(lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1)),
        [{"kind": "weight_decay", "weight_decay": 0.1}],
    ),
    "torch-weight_decay-after-clip": Case(
        SGD,
        torch_sgd(lambda p: clip_grad_norm(p, 5.0), weight_decay=0.1),
        [clipped("clip_by_global_norm", 5.0, eps=1e-6), {"kind": "weight_decay", "weight_decay": 0.1}],
    ),
    "optax-weight_decay-before-clip": Case(
        SGD,
        optax_chain(optax.add_decayed_weights(0.1), optax.clip_by_global_norm(5.0)),
        [{"kind": "weight_decay", "weight_decay": 0.1}, clipped("clip_by_global_norm", 5.0)],
    ),
    "optax-weight_decay-scheduled": case(
        {"kind": "weight_decay", "weight_decay": LINEAR},
        optax_chain(optax.add_decayed_weights(counted(optax.linear_schedule(0.1, 0.02, 40)))),
    ),
    "torch-l1": case({"kind": "l1", "l1": 0.3}, torch_sgd(each(lambda g, p: g + 0.3 * p.sign()))),
}

ACCUMULATING = {
    "optax-accumulate-mean": Case(MOMENTUM, optax_accumulated(mean=True), [{"kind": "accumulate", "steps": 4}]),
    "optax-accumulate-sum": Case(
        MOMENTUM, optax_accumulated(mean=False), [{"kind": "accumulate", "steps": 4, "reduce": "sum"}]
    ),
    "torch-accumulate-mean": case(
        {"kind": "accumulate", "steps": 3},
        torch_accumulated(3, lambda p: torch.optim.SGD(p, lr=LR), mean=True),
    ),
    "torch-accumulate-sum": case(
        {"kind": "accumulate", "steps": 3, "reduce": "sum"},
        torch_accumulated(3, lambda p: torch.optim.SGD(p, lr=LR), mean=False),
    ),
    "optax-ema": case({"kind": "ema", "decay": 0.9}, optax_chain(optax.ema(0.9))),
    "optax-ema-biased": case({"kind": "ema", "decay": 0.9, "debias": False}, optax_chain(optax.ema(0.9, debias=False))),
}

MATRICES = {
    "optax-orthogonalize": case(
        {"kind": "orthogonalize", "eps": 0.0},
        optax_chain(optax.stateless(newton_schulz), jit=True),
        tensors=("w", "b", "k"),
    ),
    "torch-orthogonalize-exact": case({"kind": "orthogonalize", "exact": True}, torch_sgd(each(polar))),
}

PROJECTING = {
    "optax-project-simplex": case(
        {"kind": "project", "onto": "simplex", "radius": 2.0},
        optax_projected(lambda x: projections.projection_simplex(x, 2.0)),
    ),
    "optax-project-simplex-rows": case(
        {"kind": "project", "onto": "simplex", "over": "rows"},
        optax_projected(of_rows(projections.projection_simplex)),
        tensors=("w", "b", "k"),
    ),
    "optax-project-l1_ball": case(
        {"kind": "project", "onto": "l1_ball", "radius": 3.0},
        optax_projected(lambda x: projections.projection_l1_ball(x, 3.0)),
    ),
    "optax-project-l2_ball": case(
        {"kind": "project", "onto": "l2_ball", "radius": 1.5},
        optax_projected(lambda x: projections.projection_l2_ball(x, 1.5)),
    ),
    "optax-project-l2_ball-rows": case(
        {"kind": "project", "onto": "l2_ball", "over": "rows"},
        optax_projected(of_rows(projections.projection_l2_ball)),
    ),
    "optax-project-box": case(
        {"kind": "project", "onto": "box", "low": -0.5, "high": 0.25},
        optax_projected(lambda x: projections.projection_box(x, -0.5, 0.25)),
    ),
    "optax-project-non_negative": case(
        {"kind": "project", "onto": "non_negative"}, optax_projected(projections.projection_non_negative)
    ),
}

CASES: dict[str, Case] = CLIPPING | SCALING | PENALTIES | ACCUMULATING | MATRICES | PROJECTING
