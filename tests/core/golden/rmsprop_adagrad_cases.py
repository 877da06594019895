"""AdaGrad and RMSProp, with the epsilon and the rate where each library has them."""

import keras
import optax
from libraries import Case, by_keras, by_optax, by_torch, counted
from torch.optim import Adagrad, RMSprop

LINEAR = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 40}
to_linear = counted(optax.linear_schedule(0.1, 0.01, 40))

# optax and Keras put epsilon under the root, and the rate into the velocity.
INSIDE = {"eps_inside": True, "lr_in_velocity": True}
CENTERED = {"centered": True, "momentum": 0.9}

CASES = {
    "torch-adagrad": Case({"kind": "adagrad", "lr": 0.1}, by_torch(lambda p: Adagrad(p, lr=0.1))),
    "torch-adagrad-decay-initial": Case(
        {"kind": "adagrad", "lr": 0.1, "lr_decay": 0.05, "initial_accumulator": 0.3, "eps": 1e-3},
        by_torch(lambda p: Adagrad(p, lr=0.1, lr_decay=0.05, initial_accumulator_value=0.3, eps=1e-3)),
    ),
    "torch-rmsprop": Case({"kind": "rmsprop", "lr": 0.01}, by_torch(lambda p: RMSprop(p, lr=0.01))),
    "torch-rmsprop-centered": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "centered": True},
        by_torch(lambda p: RMSprop(p, lr=0.01, alpha=0.9, centered=True)),
    ),
    "torch-rmsprop-momentum": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "momentum": 0.9},
        by_torch(lambda p: RMSprop(p, lr=0.01, alpha=0.9, momentum=0.9)),
    ),
    "torch-rmsprop-centered-momentum": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.95, "momentum": 0.5, "centered": True},
        by_torch(lambda p: RMSprop(p, lr=0.01, alpha=0.95, momentum=0.5, centered=True)),
    ),
    "optax-adagrad": Case(
        {"kind": "adagrad", "lr": 0.1, "eps": 1e-7, "eps_inside": True, "initial_accumulator": 0.1},
        by_optax(optax.adagrad(0.1)),
    ),
    "optax-adagrad-no_eps": Case(
        {"kind": "adagrad", "lr": 0.1, "eps": 0.0},
        by_optax(optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0)),
    ),
    "optax-rmsprop": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "eps_inside": True},
        by_optax(optax.rmsprop(0.01, decay=0.9, eps=1e-8)),
    ),
    "optax-rmsprop-eps_outside": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "eps": 1e-3},
        by_optax(optax.rmsprop(0.01, decay=0.9, eps=1e-3, eps_in_sqrt=False)),
    ),
    "optax-rmsprop-momentum": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "momentum": 0.9, **INSIDE},
        by_optax(optax.rmsprop(0.01, decay=0.9, eps=1e-8, momentum=0.9)),
    ),
    "optax-rmsprop-centered-momentum": Case(
        {"kind": "rmsprop", "lr": LINEAR, "alpha": 0.9, "eps": 1e-6, **CENTERED, **INSIDE},
        by_optax(optax.rmsprop(to_linear, decay=0.9, eps=1e-6, centered=True, momentum=0.9)),
    ),
    "keras-adagrad": Case(
        {"kind": "adagrad", "lr": 0.1, "eps": 1e-7, "eps_inside": True, "initial_accumulator": 0.1},
        by_keras(lambda: keras.optimizers.Adagrad(0.1)),
    ),
    "keras-rmsprop": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.9, "eps": 1e-7, "eps_inside": True},
        by_keras(lambda: keras.optimizers.RMSprop(0.01)),
    ),
    "keras-rmsprop-momentum": Case(
        {"kind": "rmsprop", "lr": LINEAR, "alpha": 0.9, "eps": 1e-7, "momentum": 0.9, **INSIDE},
        by_keras(
            lambda: keras.optimizers.RMSprop(keras.optimizers.schedules.PolynomialDecay(0.1, 40, 0.01), momentum=0.9)
        ),
    ),
    "keras-rmsprop-centered-momentum": Case(
        {"kind": "rmsprop", "lr": 0.01, "alpha": 0.95, "eps": 1e-6, **CENTERED, **INSIDE},
        by_keras(lambda: keras.optimizers.RMSprop(0.01, rho=0.95, epsilon=1e-6, centered=True, momentum=0.9)),
    ),
}
