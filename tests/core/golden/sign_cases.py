"""What torch, optax, Keras and pytorch_optimizer say of signsgd, signum, lion and rprop."""

import keras
import optax
import pytorch_optimizer
import torch
from libraries import Case, by_keras, by_optax, by_pytorch_optimizer, by_torch, counted

LINEAR = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 40}
to_linear = counted(optax.linear_schedule(0.1, 0.01, 40))
LION = {"kind": "lion", "lr": 0.01}

CASES: dict[str, Case] = {
    "optax-signsgd": Case({"kind": "signsgd", "lr": 0.01}, by_optax(optax.sign_sgd(0.01))),
    "optax-signsgd-scheduled": Case({"kind": "signsgd", "lr": LINEAR}, by_optax(optax.sign_sgd(to_linear))),
    "pytorch_optimizer-signsgd": Case(
        {"kind": "signsgd", "lr": 0.01},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.SignSGD(p, lr=0.01, momentum=0.0)),
    ),
    "optax-signum": Case({"kind": "signum", "lr": 0.01}, by_optax(optax.signum(0.01))),
    "optax-signum-beta": Case({"kind": "signum", "lr": 0.01, "beta": 0.5}, by_optax(optax.signum(0.01, beta=0.5))),
    "pytorch_optimizer-signum": Case(
        {"kind": "signum", "lr": 0.01},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.SignSGD(p, lr=0.01)),
    ),
    # With decay signum is lion whose two betas are the same.
    "pytorch_optimizer-signum-decay": Case(
        LION | {"beta2": 0.9, "weight_decay": 0.1},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.SignSGD(p, lr=0.01, weight_decay=0.1)),
    ),
    "optax-lion": Case(LION, by_optax(optax.lion(0.01, weight_decay=0.0))),
    "optax-lion-decay": Case(
        LION | {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1},
        by_optax(optax.lion(0.01, b1=0.8, b2=0.95, weight_decay=0.1)),
    ),
    "optax-lion-scheduled": Case(
        {"kind": "lion", "lr": LINEAR, "weight_decay": 0.1}, by_optax(optax.lion(to_linear, weight_decay=0.1))
    ),
    "keras-lion": Case(LION, by_keras(lambda: keras.optimizers.Lion(0.01))),
    "keras-lion-decay": Case(
        LION | {"weight_decay": 0.1}, by_keras(lambda: keras.optimizers.Lion(0.01, weight_decay=0.1))
    ),
    "pytorch_optimizer-lion": Case(LION, by_pytorch_optimizer(lambda p: pytorch_optimizer.Lion(p, lr=0.01))),
    "pytorch_optimizer-lion-decay-fixed": Case(
        LION | {"weight_decay": 0.01, "decay_scaling": "none"},
        by_pytorch_optimizer(lambda p: pytorch_optimizer.Lion(p, lr=0.01, weight_decay=0.01, fixed_decay=True)),
    ),
    "torch-rprop": Case({"kind": "rprop"}, by_torch(lambda p: torch.optim.Rprop(p))),
    "torch-rprop-bounds": Case(
        {"kind": "rprop", "lr": 0.5, "eta_minus": 0.3, "eta_plus": 1.7, "min_step": 0.01, "max_step": 0.1},
        by_torch(lambda p: torch.optim.Rprop(p, lr=0.5, etas=(0.3, 1.7), step_sizes=(0.01, 0.1))),
    ),
}
