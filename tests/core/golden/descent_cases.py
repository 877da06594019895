"""Gradient descent and its velocities."""

import keras
import optax
from libraries import Case, by_keras, by_optax, by_torch, counted
from torch.optim import SGD, lr_scheduler

LINEAR = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 40}
to_linear = counted(optax.linear_schedule(0.1, 0.01, 40))


def keras_linear() -> keras.optimizers.schedules.LearningRateSchedule:
    return keras.optimizers.schedules.PolynomialDecay(0.1, 40, 0.01)


CASES = {
    "torch-sgd": Case({"kind": "sgd", "lr": 0.1}, by_torch(lambda p: SGD(p, lr=0.1))),
    "torch-sgd-scheduled": Case(
        {"kind": "sgd", "lr": LINEAR},
        by_torch(lambda p: SGD(p, lr=0.1), schedule=lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 40)),
    ),
    "torch-momentum": Case(
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9},
        by_torch(lambda p: SGD(p, lr=0.01, momentum=0.9)),
    ),
    "torch-momentum-nesterov": Case(
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9, "nesterov": True},
        by_torch(lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    ),
    "torch-momentum-dampening": Case(
        {"kind": "momentum", "lr": 0.1, "momentum": 0.9, "dampening": 0.7, "first_step": "gradient"},
        by_torch(lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.7)),
    ),
    "torch-momentum-scheduled": Case(
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9},
        by_torch(lambda p: SGD(p, lr=0.1, momentum=0.9), schedule=lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 40)),
    ),
    "optax-sgd": Case({"kind": "sgd", "lr": 0.1}, by_optax(optax.sgd(0.1))),
    "optax-momentum": Case(
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9},
        by_optax(optax.sgd(0.01, momentum=0.9)),
    ),
    "optax-momentum-nesterov": Case(
        {"kind": "momentum", "lr": 0.01, "momentum": 0.9, "nesterov": True},
        by_optax(optax.sgd(0.01, momentum=0.9, nesterov=True)),
    ),
    "optax-momentum-average": Case(
        {"kind": "momentum", "lr": 0.1, "momentum": 0.9, "dampening": 0.9},
        by_optax(optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))),
    ),
    "optax-momentum-scheduled": Case(
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9},
        by_optax(optax.sgd(to_linear, momentum=0.9)),
    ),
    "optax-momentum-rate_in_velocity": Case(
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9, "lr_in_velocity": True},
        by_optax(optax.chain(optax.scale_by_learning_rate(to_linear), optax.trace(0.9))),
    ),
    "keras-sgd": Case({"kind": "sgd", "lr": 0.1}, by_keras(lambda: keras.optimizers.SGD(0.1))),
    "keras-momentum-scheduled": Case(
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9, "lr_in_velocity": True},
        by_keras(lambda: keras.optimizers.SGD(keras_linear(), momentum=0.9)),
    ),
    "keras-momentum-nesterov-scheduled": Case(
        {"kind": "momentum", "lr": LINEAR, "momentum": 0.9, "nesterov": True, "lr_in_velocity": True},
        by_keras(lambda: keras.optimizers.SGD(keras_linear(), momentum=0.9, nesterov=True)),
    ),
}
