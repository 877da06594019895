"""What torch, optax, Keras and pytorch_optimizer say of sm3 and adafactor."""

import jax.numpy as jnp
import keras
import optax
import pytorch_optimizer
import torch
from libraries import Case, by_keras, by_optax, by_pytorch_optimizer, by_torch

ADAFACTOR = torch.optim.Adafactor
ADDED = {"kind": "adafactor", "regularize": "add", "eps1": 1e-30}
# optax keeps eps 1e-30 in the squares, and factors whatever axes are the longest.
AS_OPTAX = ADDED | {"relative_step": False, "axes": "longest", "decay_scaling": "none"}
FLOAT32_DECAY = {
    "tolerance": {"float64": 5e-9},
    "why": "optax works out the mean's decay in float32 whatever the dtype",
}
FLOAT32_MEANS = {
    "tolerance": {"float64": 5e-9},
    "why": "Keras's means on JAX are taken in float32 whatever the dtype",
}


def optax_adafactor(lr: float, **options: object) -> optax.GradientTransformation:
    return optax.adafactor(lr, **{"min_dim_size_to_factor": 1, "dtype_momentum": None} | options)


def in_float64(exponent: float, min_dim_size: int, *rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """The parts of optax.adafactor, the mean's decay in float64."""
    scale = optax.scale_by_factored_rms(
        min_dim_size_to_factor=min_dim_size,
        decay_rate=exponent,
        decay_rate_fn=lambda step, exponent: 1.0 - jnp.asarray(step + 1, jnp.float64) ** -exponent,
    )
    return optax.chain(scale, *rest, optax.scale(-1.0))


CASES: dict[str, Case] = {
    "torch-adafactor": Case({"kind": "adafactor"}, by_torch(lambda p: ADAFACTOR(p))),
    "torch-adafactor-decay": Case(
        {"kind": "adafactor", "lr": 0.1, "weight_decay": 0.1, "beta2_decay": -0.5, "d": 1.5, "eps1": 0.01, "eps2": 0.5},
        by_torch(lambda p: ADAFACTOR(p, lr=0.1, weight_decay=0.1, beta2_decay=-0.5, d=1.5, eps=(0.01, 0.5))),
    ),
    "torch-adafactor-relative": Case(
        {"kind": "adafactor", "lr": 1.0},
        by_torch(lambda p: ADAFACTOR(p, lr=1.0)),
    ),
    "optax-adafactor": Case(AS_OPTAX | {"lr": 0.01}, by_optax(optax_adafactor(0.01)), **FLOAT32_DECAY),
    "optax-adafactor-decay": Case(
        AS_OPTAX | {"lr": 0.1, "weight_decay": 0.01, "scale_parameter": False, "beta2_decay": -0.6, "d": 2.0},
        by_optax(in_float64(0.6, 1, optax.clip_by_block_rms(2.0), optax.scale(0.1), optax.add_decayed_weights(0.01))),
    ),
    "optax-adafactor-momentum": Case(
        AS_OPTAX | {"lr": 0.1, "beta1": 0.9, "min_dim_size_to_factor": 3},
        by_optax(
            in_float64(
                0.8,
                3,
                optax.clip_by_block_rms(1.0),
                optax.scale(0.1),
                optax.scale_by_param_block_rms(),
                optax.ema(0.9, debias=False),
            )
        ),
    ),
    "keras-adafactor": Case(ADDED | {"lr": 0.01}, by_keras(lambda: keras.optimizers.Adafactor(0.01)), **FLOAT32_MEANS),
    "keras-adafactor-options": Case(
        ADDED | {"lr": 0.01, "beta2_decay": -0.5, "eps2": 0.1, "d": 1.5},
        by_keras(lambda: keras.optimizers.Adafactor(0.01, beta_2_decay=-0.5, epsilon_2=0.1, clip_threshold=1.5)),
        **FLOAT32_MEANS,
    ),
    "optax-sm3": Case({"kind": "sm3", "lr": 0.1, "eps": 1e-8}, by_optax(optax.sm3(0.1)), tensors=("w", "b", "k")),
    "optax-sm3-mean": Case(
        {"kind": "sm3", "lr": 0.1, "eps": 1e-4, "momentum": 0.5, "beta2": 0.9},
        by_optax(optax.chain(optax.scale_by_sm3(b1=0.5, b2=0.9, eps=1e-4), optax.scale_by_learning_rate(0.1))),
        tensors=("w", "b", "k"),
    ),
    "pytorch_optimizer-sm3": Case(
        {"kind": "sm3", "lr": 0.1, "momentum": 0.0, "eps": 1e-30},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.SM3(p, lr=0.1)),
    ),
    "pytorch_optimizer-sm3-momentum": Case(
        {"kind": "sm3", "lr": 0.1, "momentum": 0.9, "eps": 1e-30},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.SM3(p, lr=0.1, momentum=0.9)),
    ),
}
