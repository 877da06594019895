"""What torch, optax and Keras say of Adam and its nearest: adamw, sparse_adam, adamax, nadam, radam."""

from collections.abc import Callable
from typing import Any

import keras
import optax
import torch
from libraries import Case, by_keras, by_optax, by_torch, counted

LINEAR = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 40}
to_linear = counted(optax.linear_schedule(0.1, 0.01, 40))
L2 = [{"kind": "weight_decay", "weight_decay": 0.1}]

ADAM = {"kind": "adam", "lr": 0.01}
ADAMW = {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1}
ADAMAX = {"kind": "adamax", "lr": 0.01}
NADAM = {"kind": "nadam", "lr": 0.01}
RADAM = {"kind": "radam", "lr": 0.01}
# Keras adds its epsilon before the correction.
KERAS = {"eps_hat": True, "eps": 1e-7}
# From here on torch's momentum is beta1 at every step.
AT_ONCE = {"momentum_decay": 1e4}


class WholeSparseAdam(torch.optim.SparseAdam):
    """torch's takes nothing but sparse gradients: these name every row."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad.to_sparse(1)
        return super().step(closure)


CASES: dict[str, Case] = {
    "torch-adam": Case(ADAM, by_torch(lambda p: torch.optim.Adam(p, lr=0.01))),
    "torch-adam-betas": Case(
        ADAM | {"beta1": 0.8, "beta2": 0.99, "eps": 1e-5},
        by_torch(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), eps=1e-5)),
    ),
    "torch-adam-l2": Case(
        ADAM, by_torch(lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)), transforms=L2
    ),
    "torch-adam-amsgrad": Case(
        ADAM | {"amsgrad": "raw", "beta2": 0.9, "eps": 1e-3},
        by_torch(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.9), eps=1e-3, amsgrad=True)),
    ),
    "optax-adam": Case(ADAM, by_optax(optax.adam(0.01))),
    "optax-adam-eps-inside": Case(
        ADAM | {"eps": 1e-4, "eps_inside": True}, by_optax(optax.adam(0.01, eps=0.0, eps_root=1e-4))
    ),
    "optax-adam-scheduled": Case({"kind": "adam", "lr": LINEAR}, by_optax(optax.adam(to_linear))),
    "optax-adam-nesterov": Case(
        ADAM | {"nesterov": True, "beta1": 0.8}, by_optax(optax.nadam(0.01, b1=0.8))
    ),
    "optax-adam-amsgrad": Case(
        ADAM | {"amsgrad": "corrected", "beta2": 0.9, "eps": 1e-3}, by_optax(optax.amsgrad(0.01, b2=0.9, eps=1e-3))
    ),
    "optax-adam-amsgrad-eps-inside": Case(
        ADAM | {"amsgrad": "corrected", "eps": 1e-4, "eps_inside": True},
        by_optax(optax.amsgrad(0.01, eps=0.0, eps_root=1e-4)),
    ),
    "optax-adam-amsgrad-uncorrected": Case(
        ADAM | {"amsgrad": "raw", "bias_correction": False},
        by_optax(optax.amsgrad(0.01, bias_correction_mu=False, bias_correction_nu=False)),
    ),
    "keras-adam": Case(ADAM | KERAS, by_keras(lambda: keras.optimizers.Adam(0.01))),
    "keras-adam-eps": Case(
        ADAM | {"eps_hat": True, "eps": 0.1}, by_keras(lambda: keras.optimizers.Adam(0.01, epsilon=0.1))
    ),
    "keras-adam-amsgrad": Case(
        ADAM | {"eps_hat": True, "eps": 1e-3, "amsgrad": "raw", "beta2": 0.9},
        by_keras(lambda: keras.optimizers.Adam(0.01, beta_2=0.9, epsilon=1e-3, amsgrad=True)),
    ),
    "torch-adamw": Case(
        ADAMW,
        by_torch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
        tolerance={"float32": 2e-6},
        why="torch multiplies by 1 - lr · weight_decay in float32, whose rounding adds up; ours is nearer to float64",
    ),
    "torch-adamw-amsgrad": Case(
        ADAMW | {"amsgrad": "raw", "beta2": 0.9},
        by_torch(lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.9), weight_decay=0.1, amsgrad=True)),
    ),
    "torch-adamw-none": Case(
        ADAMW | {"weight_decay": 0.0}, by_torch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0))
    ),
    "optax-adamw": Case(ADAMW, by_optax(optax.adamw(0.01, weight_decay=0.1))),
    "optax-adamw-scheduled": Case(ADAMW | {"lr": LINEAR}, by_optax(optax.adamw(to_linear, weight_decay=0.1))),
    "optax-adamw-nesterov": Case(
        ADAMW | {"nesterov": True}, by_optax(optax.nadamw(0.01, weight_decay=0.1))
    ),
    # The decay after the rate: it is not scaled by it.
    "optax-adamw-unscaled": Case(
        ADAMW | {"weight_decay": 0.01, "decay_scaling": "none"},
        by_optax(optax.chain(optax.scale_by_adam(), optax.scale(-0.01), optax.add_decayed_weights(-0.01))),
    ),
    "keras-adamw": Case(ADAMW | KERAS, by_keras(lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1))),
    "torch-sparse_adam": Case(
        {"kind": "sparse_adam", "lr": 0.01, "beta1": 0.8, "eps": 0.1},
        by_torch(lambda p: WholeSparseAdam(p, lr=0.01, betas=(0.8, 0.999), eps=0.1)),
        tensors=("w", "b", "k"),
    ),
    "torch-adamax": Case(ADAMAX, by_torch(lambda p: torch.optim.Adamax(p, lr=0.01))),
    "torch-adamax-l2": Case(
        ADAMAX | {"beta2": 0.9, "eps": 0.1},
        by_torch(lambda p: torch.optim.Adamax(p, lr=0.01, betas=(0.9, 0.9), eps=0.1, weight_decay=0.1)),
        transforms=L2,
    ),
    "optax-adamax": Case(ADAMAX | {"eps": 0.1}, by_optax(optax.adamax(0.01, eps=0.1))),
    "optax-adamax-decay": Case(ADAMAX | {"weight_decay": 0.1}, by_optax(optax.adamaxw(0.01, weight_decay=0.1))),
    "keras-adamax": Case(
        ADAMAX | {"eps": 0.1, "eps_inside": False}, by_keras(lambda: keras.optimizers.Adamax(0.01, epsilon=0.1))
    ),
    "keras-adamax-decay": Case(
        ADAMAX | {"eps": 1e-7, "eps_inside": False, "weight_decay": 0.1},
        by_keras(lambda: keras.optimizers.Adamax(0.01, weight_decay=0.1)),
    ),
    "torch-nadam": Case(NADAM, by_torch(lambda p: torch.optim.NAdam(p, lr=0.01))),
    "torch-nadam-momentum-decay": Case(
        NADAM | {"momentum_decay": 0.3}, by_torch(lambda p: torch.optim.NAdam(p, lr=0.01, momentum_decay=0.3))
    ),
    "torch-nadam-no-momentum-decay": Case(
        NADAM | {"momentum_decay": 0.0}, by_torch(lambda p: torch.optim.NAdam(p, lr=0.01, momentum_decay=0.0))
    ),
    "torch-nadam-l2": Case(
        NADAM, by_torch(lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1)), transforms=L2
    ),
    "torch-nadam-decay": Case(
        NADAM | {"weight_decay": 0.1},
        by_torch(lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    ),
    "optax-nadam": Case(NADAM | AT_ONCE, by_optax(optax.nadam(0.01))),
    "optax-nadam-decay": Case(
        NADAM | AT_ONCE | {"weight_decay": 0.1}, by_optax(optax.nadamw(0.01, weight_decay=0.1))
    ),
    "keras-nadam": Case(
        NADAM | {"momentum_decay": 1.0, "eps": 1e-7}, by_keras(lambda: keras.optimizers.Nadam(0.01))
    ),
    "keras-nadam-decay": Case(
        NADAM | {"momentum_decay": 1.0, "eps": 1e-7, "weight_decay": 0.1},
        by_keras(lambda: keras.optimizers.Nadam(0.01, weight_decay=0.1)),
    ),
    "torch-radam": Case(RADAM | {"eps": 1e-3}, by_torch(lambda p: torch.optim.RAdam(p, lr=0.01, eps=1e-3))),
    "torch-radam-l2": Case(
        RADAM | {"beta2": 0.9},
        by_torch(lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.9, 0.9), weight_decay=0.1)),
        transforms=L2,
    ),
    "torch-radam-decay": Case(
        RADAM | {"weight_decay": 0.1},
        by_torch(lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    ),
    "optax-radam": Case(RADAM | {"eps": 1e-3, "eps_hat": False}, by_optax(optax.radam(0.01, eps=1e-3))),
    "optax-radam-eps-inside": Case(
        RADAM | {"eps": 1e-4, "eps_hat": False, "eps_inside": True, "threshold": 8.0},
        by_optax(optax.radam(0.01, eps=0.0, eps_root=1e-4, threshold=8.0)),
    ),
}  # fmt: skip
