"""Methods whose result is an average of their path."""

from typing import Any

import jax
import keras
import optax
import optax.contrib
import torch
from libraries import Array, Case, Problem, Run, by_keras, by_optax, by_schedulefree, by_torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch.optim import ASGD


def rates_in_float64(run: Run) -> Run:
    """torch's ASGD keeps its rate in torch's default dtype."""

    def wrapped(problem: Problem) -> Array:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return run(problem)
        finally:
            torch.set_default_dtype(default)

    return wrapped


def asgd(*, average: bool = False, **settings: float) -> Run:
    def read(optimizer: Any, tensors: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        return [optimizer.state[tensor]["ax"] for tensor in tensors]

    return rates_in_float64(by_torch(lambda p: ASGD(p, **settings), read=read if average else None))


def evaluated(state: Any, params: dict[str, jax.Array]) -> Any:
    return optax.contrib.schedule_free_eval_params(state, params)


def free(base: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"kind": "schedule_free", "base": base, **settings}


SGD = {"kind": "sgd", "lr": 0.1}
ADAMW = {"kind": "adamw", "lr": 0.01, "weight_decay": 0.0}
# schedulefree's warm-up of 20 steps: a twentieth of the rate in the first, all of it from the twentieth on.
WARM_SGD = {"kind": "sgd", "lr": {"kind": "linear", "init": 0.1 / 20, "end": 0.1, "steps": 19}}
WARM_ADAMW = ADAMW | {"lr": {"kind": "linear", "init": 0.01 / 20, "end": 0.01, "steps": 19}, "weight_decay": 0.1}
FAST = {"lr": 0.1, "lambd": 0.1, "alpha": 0.75, "t0": 10.0}

WHY = "it makes x again of y and z at each step, which rounds; ours is nearer to float64"

CASES = {
    "torch-asgd": Case(
        {"kind": "asgd"},
        asgd(),
        tolerance={"float32": 2e-6},
        why="torch multiplies by 1 - lambd · lr in float32, whose rounding adds up; ours is nearer to float64",
    ),
    "torch-asgd-fast": Case({"kind": "asgd", **FAST}, asgd(**FAST)),
    "torch-asgd-average": Case({"kind": "asgd", **FAST}, asgd(average=True, **FAST), at="final"),
    "schedulefree-schedule_free-sgd": Case(
        free(SGD), by_schedulefree(lambda p: SGDScheduleFree(p, lr=0.1), at="x"), at="final"
    ),
    "schedulefree-schedule_free-sgd-y": Case(
        free(SGD), by_schedulefree(lambda p: SGDScheduleFree(p, lr=0.1)), at="next"
    ),
    "schedulefree-schedule_free-sgd-decay": Case(
        free(WARM_SGD, weight_decay=0.1, r=0.5, beta=0.8),
        by_schedulefree(
            lambda p: SGDScheduleFree(p, lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=20, r=0.5), at="x"
        ),
        at="final",
    ),
    "schedulefree-schedule_free-sgd-decay-y": Case(
        free(WARM_SGD, weight_decay=0.1, r=0.5, beta=0.8),
        by_schedulefree(lambda p: SGDScheduleFree(p, lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=20, r=0.5)),
        at="next",
    ),
    "schedulefree-schedule_free-adamw": Case(
        free(ADAMW), by_schedulefree(lambda p: AdamWScheduleFree(p, lr=0.01), at="x"), at="final"
    ),
    "schedulefree-schedule_free-adamw-y": Case(
        free(ADAMW), by_schedulefree(lambda p: AdamWScheduleFree(p, lr=0.01)), at="next"
    ),
    "schedulefree-schedule_free-adamw-decay": Case(
        free(WARM_ADAMW, weight_lr_power=1.0),
        by_schedulefree(
            lambda p: AdamWScheduleFree(p, lr=0.01, weight_decay=0.1, warmup_steps=20, weight_lr_power=1.0), at="x"
        ),
        at="final",
    ),
    "schedulefree-schedule_free-adamw-decay-y": Case(
        free(WARM_ADAMW, weight_lr_power=1.0),
        by_schedulefree(
            lambda p: AdamWScheduleFree(p, lr=0.01, weight_decay=0.1, warmup_steps=20, weight_lr_power=1.0)
        ),
        at="next",
    ),
    "optax-schedule_free-sgd": Case(
        free(SGD),
        by_optax(optax.contrib.schedule_free_sgd(0.1), read=evaluated),
        at="final",
        tolerance={"float32": 2e-6},
        why=WHY,
    ),
    "optax-schedule_free-sgd-y": Case(
        free(SGD, weight_decay=0.1), by_optax(optax.contrib.schedule_free_sgd(0.1, weight_decay=0.1)), at="next"
    ),
    "optax-schedule_free-adam": Case(
        free(ADAMW | {"beta1": 0.0}, beta=0.8),
        by_optax(optax.contrib.schedule_free(optax.adam(0.01, b1=0.0), learning_rate=0.01, b1=0.8), read=evaluated),
        at="final",
        tolerance={"float32": 2e-6},
        why=WHY,
    ),
    "optax-schedule_free-adamw-y": Case(
        free(ADAMW | {"weight_decay": 0.1}),
        by_optax(optax.contrib.schedule_free_adamw(0.01, weight_decay=0.1)),
        at="next",
    ),
    "keras-schedule_free-adamw": Case(
        free(ADAMW, weight_lr_power=0.0),
        by_keras(lambda: keras.optimizers.ScheduleFreeAdamW(0.01)),
        at="next",
        tolerance={"float32": 2e-6},
        why=WHY,
    ),
    "keras-schedule_free-adamw-warmup": Case(
        free(WARM_ADAMW | {"weight_decay": 0.0}, weight_lr_power=0.0, beta=0.8),
        by_keras(lambda: keras.optimizers.ScheduleFreeAdamW(0.01, beta_1=0.8, warmup_steps=20)),
        at="next",
    ),
}
