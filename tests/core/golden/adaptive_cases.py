"""What torch, optax and Keras say of adadelta."""

import keras
import optax
import torch
from libraries import Case, by_keras, by_optax, by_torch, counted

LINEAR = {"kind": "linear", "init": 1.0, "end": 0.1, "steps": 40}
L2 = [{"kind": "weight_decay", "weight_decay": 0.1}]

CASES: dict[str, Case] = {
    "torch-adadelta": Case({"kind": "adadelta"}, by_torch(lambda p: torch.optim.Adadelta(p))),
    "torch-adadelta-l2": Case(
        {"kind": "adadelta", "lr": 0.5, "rho": 0.95, "eps": 1e-4},
        by_torch(lambda p: torch.optim.Adadelta(p, lr=0.5, rho=0.95, eps=1e-4, weight_decay=0.1)),
        transforms=L2,
    ),
    "optax-adadelta": Case({"kind": "adadelta"}, by_optax(optax.adadelta(1.0))),
    "optax-adadelta-scheduled": Case(
        {"kind": "adadelta", "lr": LINEAR, "eps": 1e-4},
        by_optax(optax.adadelta(counted(optax.linear_schedule(1.0, 0.1, 40)), eps=1e-4)),
    ),
    "keras-adadelta": Case(
        {"kind": "adadelta", "rho": 0.95, "eps": 1e-7}, by_keras(lambda: keras.optimizers.Adadelta(1.0))
    ),
}
