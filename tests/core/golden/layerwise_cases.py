"""What optax, Keras and pytorch_optimizer say of lars, lamb and novograd."""

from functools import partial

import keras
import optax
import pytorch_optimizer
from libraries import Case, by_keras, by_optax, by_pytorch_optimizer

# pytorch_optimizer adapts tensors of two axes or more alone.
MATRICES = ("w", "k")
# Its clamp of the tensors' norm in lamb, which is a constant of the class.
CLAMP = 10.0
OPTAX_LARS = {"kind": "lars", "lr": 0.5, "denominator": "whole"}
PLAIN_LARS = {"kind": "lars", "lr": 0.5, "lr_in_velocity": False}
PLAIN_LAMB = {"kind": "lamb", "lr": 0.01, "eps": 0.0, "bias_correction": False, "max_norm": CLAMP}
# Its corrections of m go to the rate and not to the step whose norm is taken, unless told otherwise.
LAMB = partial(pytorch_optimizer.Lamb, lr=0.01, eps=0.0, adam_debias=True)

CASES: dict[str, Case] = {
    "optax-lars": Case(OPTAX_LARS, by_optax(optax.lars(0.5))),
    "optax-lars-decay-nesterov": Case(
        OPTAX_LARS | {"weight_decay": 0.1, "nesterov": True, "eps": 1e-3, "trust_coefficient": 0.01, "momentum": 0.8},
        by_optax(optax.lars(0.5, weight_decay=0.1, nesterov=True, eps=1e-3, trust_coefficient=0.01, momentum=0.8)),
    ),
    "optax-lars-not-adapted": Case(
        OPTAX_LARS | {"lr": 0.001, "weight_decay": 0.1, "adapt": False},
        by_optax(optax.lars(0.001, weight_decay=0.1, trust_ratio_mask=False)),
    ),
    "pytorch_optimizer-lars": Case(
        PLAIN_LARS,
        by_pytorch_optimizer(lambda p: pytorch_optimizer.LARS(p, lr=0.5)),
        tensors=MATRICES,
    ),
    "pytorch_optimizer-lars-decay": Case(
        PLAIN_LARS | {"weight_decay": 0.1},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.LARS(p, lr=0.5, weight_decay=0.1)),
        tensors=MATRICES,
    ),
    "pytorch_optimizer-lars-vectors": Case(
        PLAIN_LARS | {"lr": 0.001, "adapt": False, "nesterov": True},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.LARS(p, lr=0.001, nesterov=True)),
        tensors=("b", "s"),
    ),
    "optax-lamb": Case({"kind": "lamb", "lr": 0.01, "weight_decay": 0.0}, by_optax(optax.lamb(0.01))),
    "optax-lamb-decay": Case(
        {"kind": "lamb", "lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99},
        by_optax(optax.lamb(0.01, b1=0.8, b2=0.99, weight_decay=0.1)),
    ),
    "optax-lamb-eps-inside": Case(
        {"kind": "lamb", "lr": 0.01, "weight_decay": 0.0, "eps": 1e-4, "eps_inside": True},
        by_optax(optax.lamb(0.01, eps=0.0, eps_root=1e-4)),
    ),
    "keras-lamb": Case(
        {"kind": "lamb", "lr": 0.01, "weight_decay": 0.0, "eps": 1e-7},
        by_keras(lambda: keras.optimizers.Lamb(0.01)),
    ),
    "pytorch_optimizer-lamb": Case(
        PLAIN_LAMB | {"weight_decay": 0.0},
        by_pytorch_optimizer(lambda p: LAMB(p)),
    ),
    "pytorch_optimizer-lamb-decay": Case(
        PLAIN_LAMB | {"weight_decay": 0.1},
        by_pytorch_optimizer(lambda p: LAMB(p, weight_decay=0.1, weight_decouple=False)),
    ),
    "pytorch_optimizer-lamb-not-adapted": Case(
        PLAIN_LAMB | {"weight_decay": 0.1, "adapt": False},
        by_pytorch_optimizer(lambda p: LAMB(p, weight_decay=0.1, weight_decouple=False, adam=True)),
    ),
    "optax-novograd": Case(
        {"kind": "novograd", "lr": 0.01, "beta1": 0.9, "beta2": 0.25, "eps": 1e-6},
        by_optax(optax.novograd(0.01), jit=True),
    ),
    "optax-novograd-decay-eps-inside": Case(
        {
            "kind": "novograd",
            "lr": 0.01,
            "beta1": 0.9,
            "beta2": 0.25,
            "weight_decay": 0.1,
            "eps": 1e-3,
            "eps_inside": True,
        },
        by_optax(optax.novograd(0.01, eps=0.0, eps_root=1e-3, weight_decay=0.1), jit=True),
    ),
    "pytorch_optimizer-novograd": Case(
        {"kind": "novograd", "lr": 0.01},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.NovoGrad(p, lr=0.01)),
    ),
    "pytorch_optimizer-novograd-decay": Case(
        {"kind": "novograd", "lr": 0.01, "weight_decay": 0.1, "grad_averaging": True},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.NovoGrad(p, lr=0.01, weight_decay=0.1, grad_averaging=True)),
    ),
    "pytorch_optimizer-novograd-decoupled": Case(
        {"kind": "novograd", "lr": 0.01, "weight_decay": 0.1, "decoupled": True},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.NovoGrad(p, lr=0.01, weight_decay=0.1, weight_decouple=True)),
    ),
    "pytorch_optimizer-novograd-decoupled-fixed": Case(
        {"kind": "novograd", "lr": 0.01, "weight_decay": 0.001, "decoupled": True, "decay_scaling": "none"},
        by_pytorch_optimizer(
            lambda p: pytorch_optimizer.NovoGrad(p, lr=0.01, weight_decay=0.001, weight_decouple=True, fixed_decay=True)
        ),
    ),
}
