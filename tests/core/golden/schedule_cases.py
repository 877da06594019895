"""Schedules of torch, optax and Keras: the values at the steps 1, 2, …

torch's schedulers multiply the rate they find, so that their rounding adds up over the steps (and a linear one that
starts at 0 stays there); their own closed forms do not, and are what is taken where there is one (`closed`). Those of
cosine restarts, cycles and the one cycle are closed forms anyway (`chained`). torch's cosine climbs again past its end,
and its one cycle goes on beyond it: these two are as long as the data.

torch's CyclicLR finds its place in a cycle by floats, off by 1e-16 for each cycle gone by, unless the cycle is a power
of two.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import keras
import optax
import torch
from libraries import SCHEDULE_STEPS
from torch.optim import lr_scheduler as lrs

Values = Callable[[], list[float]]
Scheduler = Callable[[torch.optim.Optimizer], Any]

# What the plateaus see: a loss that falls, and stops for longer and longer; and the same upside down.
FALLING = [
    round(2.0 * 0.9 ** (s - s % (1 + s // 12)) + 0.01 * math.sin(7.0 * s) + (0.5 if s % 41 == 40 else 0.0), 6)
    for s in range(SCHEDULE_STEPS)
]
RISING = [3.0 - loss for loss in FALLING]


def _optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)


def chained(make: Scheduler, lr: float = 0.1) -> Values:
    """By stepping the scheduler, as a training loop does."""

    def values() -> list[float]:
        optimizer = _optimizer(lr)
        scheduler, found = make(optimizer), []
        for _ in range(SCHEDULE_STEPS):
            found.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            if len(found) < SCHEDULE_STEPS:
                scheduler.step()
        return found

    return values


def closed(make: Scheduler, lr: float = 0.1) -> Values:
    """By the scheduler's own closed form."""

    def values() -> list[float]:
        scheduler, found = make(_optimizer(lr)), []
        for s in range(SCHEDULE_STEPS):
            scheduler.last_epoch = s
            found.append(float(scheduler._get_closed_form_lr()[0]))
        return found

    return values


def closed_sequence(makes: list[Scheduler], milestones: list[int], lr: float = 0.1) -> Values:
    """What SequentialLR does, by the closed forms of its parts: each counts from its own start."""

    def values() -> list[float]:
        parts = [closed(make, lr)() for make in makes]
        starts = [0, *milestones]
        index = [sum(m <= s for m in milestones) for s in range(SCHEDULE_STEPS)]
        return [parts[i][s - starts[i]] for s, i in enumerate(index)]

    return values


def plateau(losses: list[float], lr: float, **options: Any) -> tuple[list[float], Values]:
    """`losses`, and the rate at each step while ReduceLROnPlateau sees one of them after each step."""

    def values() -> list[float]:
        optimizer = _optimizer(lr)
        scheduler, found = lrs.ReduceLROnPlateau(optimizer, **options), []
        for loss in losses:
            found.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step(loss)
        return found

    return losses, values


def by_optax(schedule: optax.Schedule) -> Values:
    return lambda: [float(schedule(jnp.asarray(s, jnp.float64))) for s in range(SCHEDULE_STEPS)]


def by_keras(schedule: keras.optimizers.schedules.LearningRateSchedule) -> Values:
    return lambda: [float(schedule(s)) for s in range(SCHEDULE_STEPS)]


def linear(init: float, end: float, steps: int) -> dict[str, Any]:
    return {"kind": "linear", "init": init, "end": end, "steps": steps}


def cosine(init: float, steps: int, floor: float = 0.0) -> dict[str, Any]:
    return {"kind": "cosine", "init": init, "steps": steps, "floor": floor}


HALVED = {"kind": "step", "init": 0.1, "steps": 10, "factor": 0.5}
RESTARTS = {"kind": "cosine_restarts", "init": 0.1, "steps": 10}
CYCLE = {"kind": "cyclic", "init": 0.01, "peak": 0.1}
ONE_CYCLE = {"kind": "one_cycle", "peak": 0.1, "steps": SCHEDULE_STEPS}
WARM = linear(0.01, 0.1, 20)

# name -> (our schedule, the library's values at the steps 1, 2, …)
SCHEDULES: dict[str, tuple[dict[str, Any], Values]] = {
    "torch-linear": (linear(0.1, 0.02, 30), closed(lambda o: lrs.LinearLR(o, 1.0, 0.2, 30))),
    "torch-polynomial": (
        {"kind": "polynomial", "init": 0.1, "end": 0.0, "steps": 150, "power": 2.5},
        closed(lambda o: lrs.PolynomialLR(o, 150, 2.5)),
    ),
    "torch-exponential": (
        {"kind": "exponential", "init": 0.1, "rate": 0.93}, closed(lambda o: lrs.ExponentialLR(o, 0.93)),
    ),
    "torch-step": (HALVED, closed(lambda o: lrs.StepLR(o, 10, 0.5))),
    "torch-multi-step": (
        {"kind": "multi_step", "init": 0.1, "milestones": [3, 40, 40, 160], "factor": 0.3},
        closed(lambda o: lrs.MultiStepLR(o, [3, 40, 40, 160], 0.3)),
    ),
    "torch-cosine": (
        cosine(0.1, SCHEDULE_STEPS - 1, 0.003), closed(lambda o: lrs.CosineAnnealingLR(o, SCHEDULE_STEPS - 1, 0.003)),
    ),
    "torch-constant-factor": (
        {"kind": "piecewise_constant", "values": [0.025, 0.1], "boundaries": [20]},
        closed(lambda o: lrs.ConstantLR(o, 0.25, 20)),
    ),
    "torch-cosine-restarts": (
        RESTARTS | {"floor": 0.003}, chained(lambda o: lrs.CosineAnnealingWarmRestarts(o, 10, 1, 0.003)),
    ),
    "torch-cosine-restarts-longer": (
        RESTARTS | {"mult": 2}, chained(lambda o: lrs.CosineAnnealingWarmRestarts(o, 10, 2)),
    ),
    "torch-cyclic": (
        CYCLE | {"steps_up": 8}, chained(lambda o: lrs.CyclicLR(o, 0.01, 0.1, 8)),
    ),
    "torch-cyclic-triangular2": (
        CYCLE | {"steps_up": 12, "steps_down": 20, "mode": "triangular2"},
        chained(lambda o: lrs.CyclicLR(o, 0.01, 0.1, 12, 20, "triangular2")),
    ),
    "torch-cyclic-exp-range": (
        CYCLE | {"steps_up": 24, "steps_down": 40, "mode": "exp_range", "gamma": 0.99},
        chained(lambda o: lrs.CyclicLR(o, 0.01, 0.1, 24, 40, "exp_range", 0.99)),
    ),
    "torch-one-cycle": (ONE_CYCLE, chained(lambda o: lrs.OneCycleLR(o, 0.1, SCHEDULE_STEPS))),
    "torch-one-cycle-linear": (
        ONE_CYCLE | {"anneal": "linear", "pct_start": 0.123, "div_factor": 10.0, "final_div_factor": 100.0},
        chained(lambda o: lrs.OneCycleLR(
            o, 0.1, SCHEDULE_STEPS, pct_start=0.123, anneal_strategy="linear", div_factor=10.0,
            final_div_factor=100.0)),
    ),
    "torch-one-cycle-three-phases": (
        ONE_CYCLE | {"three_phase": True, "pct_start": 0.377},
        chained(lambda o: lrs.OneCycleLR(o, 0.1, SCHEDULE_STEPS, pct_start=0.377, three_phase=True)),
    ),
    "torch-sequence": (
        {"kind": "sequence", "boundaries": [20, 70], "parts": [
            WARM, {"kind": "exponential", "init": 0.1, "rate": 0.98},
            {"kind": "multi_step", "init": 0.1, "milestones": [50, 80], "factor": 0.1}]},
        closed_sequence([lambda o: lrs.LinearLR(o, 0.1, 1.0, 20), lambda o: lrs.ExponentialLR(o, 0.98),
                         lambda o: lrs.MultiStepLR(o, [50, 80], 0.1)], [20, 70]),
    ),
    # Two schedulers that round nothing at all, so that SequentialLR's own counting is what is seen.
    "torch-sequence-stepped": (
        {"kind": "sequence", "boundaries": [21, 90], "parts": [
            {"kind": "piecewise_constant", "values": [0.0625, 0.125], "boundaries": [16]},
            {"kind": "step", "init": 0.125, "steps": 10, "factor": 0.5},
            {"kind": "cosine_restarts", "init": 0.125, "steps": 30}]},
        chained(lambda o: lrs.SequentialLR(o, [
            lrs.ConstantLR(o, 0.5, 16), lrs.StepLR(o, 10, 0.5), lrs.CosineAnnealingWarmRestarts(o, 30)],
            [21, 90]), 0.125),
    ),
    "torch-product": (
        {"kind": "product", "parts": [
            {"kind": "piecewise_constant", "values": [0.5, 1], "boundaries": [16]},
            {"kind": "step", "init": 0.125, "steps": 10, "factor": 0.5}]},
        chained(lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 16), lrs.StepLR(o, 10, 0.5)]), 0.125),
    ),
    "optax-constant": ({"kind": "constant", "value": 0.1}, by_optax(optax.constant_schedule(0.1))),
    "optax-linear": (linear(0.1, 0.02, 30), by_optax(optax.linear_schedule(0.1, 0.02, 30))),
    "optax-polynomial": (
        {"kind": "polynomial", "init": 0.1, "end": 0.004, "steps": 120, "power": 0.7},
        by_optax(optax.polynomial_schedule(0.1, 0.004, 0.7, 120)),
    ),
    "optax-exponential": (
        {"kind": "exponential", "init": 0.1, "rate": 0.5, "steps": 7}, by_optax(optax.exponential_decay(0.1, 7, 0.5)),
    ),
    "optax-exponential-staircase": (
        {"kind": "exponential", "init": 0.1, "rate": 0.5, "steps": 7, "staircase": True},
        by_optax(optax.exponential_decay(0.1, 7, 0.5, staircase=True)),
    ),
    "optax-step": (
        {"kind": "multi_step", "init": 0.1, "milestones": [10, 20, 30, 40], "factor": 0.5},
        by_optax(optax.piecewise_constant_schedule(0.1, {10: 0.5, 20: 0.5, 30: 0.5, 40: 0.5})),
    ),
    "optax-piecewise-constant": (
        {"kind": "piecewise_constant", "values": [0.25, 0.125, 0.5, 0.0], "boundaries": [1, 60, 130]},
        by_optax(optax.piecewise_constant_schedule(0.25, {1: 0.5, 60: 4.0, 130: 0.0})),
    ),
    "optax-piecewise-linear": (
        {"kind": "piecewise_linear", "values": [0.25, 0.125, 0.5, 0.0], "steps": [0, 7, 60, 130]},
        by_optax(optax.piecewise_interpolate_schedule("linear", 0.25, {7: 0.5, 60: 4.0, 130: 0.0})),
    ),
    "optax-linear-one-cycle": (
        {"kind": "piecewise_linear", "steps": [0, 45, 127, 150], "values": [0.004, 0.1, 0.004, 0.004 / 1e4]},
        by_optax(optax.linear_onecycle_schedule(150, 0.1)),
    ),
    "optax-cosine-one-cycle": (
        {"kind": "sequence", "boundaries": [45], "parts": [cosine(0.004, 45, 0.1), cosine(0.1, 105, 0.1 / 25 / 1e4)]},
        by_optax(optax.cosine_onecycle_schedule(150, 0.1)),
    ),
    "optax-cosine": (
        cosine(0.1, 30, 0.025) | {"exponent": 1.5}, by_optax(optax.cosine_decay_schedule(0.1, 30, 0.25, 1.5)),
    ),
    "optax-warmup-cosine": (
        {"kind": "warmup_cosine", "init": 0.001, "peak": 0.1, "warmup_steps": 13, "steps": 170, "end": 0.01},
        by_optax(optax.warmup_cosine_decay_schedule(0.001, 0.1, 13, 170, 0.01)),
    ),
    "optax-warmup-cosine-exponent": (
        {"kind": "warmup_cosine", "peak": 0.1, "warmup_steps": 50, "steps": 100, "exponent": 2.0},
        by_optax(optax.warmup_cosine_decay_schedule(0.0, 0.1, 50, 100, exponent=2.0)),
    ),
    "optax-warmup-linear": (
        {"kind": "warmup_linear", "peak": 0.1, "warmup_steps": 13, "steps": 170, "end": 0.001},
        by_optax(optax.join_schedules(
            [optax.linear_schedule(0.0, 0.1, 13), optax.linear_schedule(0.1, 0.001, 157)], [13])),
    ),
    "optax-warmup-stable-decay": (
        {"kind": "warmup_stable_decay", "peak": 0.1, "warmup_steps": 20, "steps": 180, "decay_steps": 60, "end": 0.01,
         "decay": "cosine"},
        by_optax(optax.join_schedules(
            [optax.linear_schedule(0.0, 0.1, 20), optax.cosine_decay_schedule(0.1, 60, 0.1)], [120])),
    ),
    "optax-sequence": (
        {"kind": "sequence", "boundaries": [20, 100], "parts": [
            WARM, {"kind": "exponential", "init": 0.1, "rate": 0.98}, cosine(0.05, 60)]},
        by_optax(optax.join_schedules(
            [optax.linear_schedule(0.01, 0.1, 20), optax.exponential_decay(0.1, 1, 0.98),
             optax.cosine_decay_schedule(0.05, 60)], [20, 100])),
    ),
    "optax-sequence-of-restarts": (
        {"kind": "sequence", "boundaries": [50], "parts": [
            {"kind": "warmup_cosine", "init": 0.01, "peak": 0.1, "warmup_steps": 5, "steps": 50, "end": 0.001},
            {"kind": "warmup_cosine", "init": 0.001, "peak": 0.05, "warmup_steps": 10, "steps": 120}]},
        by_optax(optax.sgdr_schedule([
            {"init_value": 0.01, "peak_value": 0.1, "warmup_steps": 5, "decay_steps": 50, "end_value": 0.001},
            {"init_value": 0.001, "peak_value": 0.05, "warmup_steps": 10, "decay_steps": 120}])),
    ),
    "optax-cosine-restarts": (
        RESTARTS | {"steps": 50},
        by_optax(optax.sgdr_schedule([
            {"init_value": 0.1, "peak_value": 0.1, "warmup_steps": 0, "decay_steps": 50}] * 4)),
    ),
    "optax-cosine-restarts-smaller": (
        RESTARTS | {"mult": 2, "factor": 0.75, "floor": 0.02},
        by_optax(optax.sgdr_schedule([
            {"init_value": 0.1, "peak_value": 0.02 + 0.08 * 0.75**i, "warmup_steps": 0, "decay_steps": 10 * 2**i,
             "end_value": 0.02} for i in range(5)])),
    ),
    "keras-inverse-time": (
        {"kind": "inverse_time", "init": 0.1, "rate": 0.4, "steps": 7},
        by_keras(keras.optimizers.schedules.InverseTimeDecay(0.1, 7, 0.4)),
    ),
    "keras-inverse-time-staircase": (
        {"kind": "inverse_time", "init": 0.1, "rate": 0.4, "steps": 7, "staircase": True},
        by_keras(keras.optimizers.schedules.InverseTimeDecay(0.1, 7, 0.4, staircase=True)),
    ),
}  # fmt: skip

# name -> (our schedule, losses, torch's rates while it sees them)
PLATEAUS: dict[str, tuple[dict[str, Any], list[float], Values]] = {
    "torch-plateau": ({"kind": "plateau", "init": 0.1, "patience": 6}, *plateau(FALLING, 0.1, patience=6)),
    "torch-plateau-absolute": (
        {"kind": "plateau", "init": 0.1, "factor": 0.5, "patience": 3, "threshold": 0.05, "threshold_mode": "abs",
         "cooldown": 4, "minimum": 0.003},
        *plateau(
            FALLING, 0.1, factor=0.5, patience=3, threshold=0.05, threshold_mode="abs", cooldown=4, min_lr=0.003),
    ),
    "torch-plateau-greatest": (
        {"kind": "plateau", "init": 0.1, "factor": 0.7, "patience": 0, "threshold": 0.001, "mode": "max",
         "cooldown": 9},
        *plateau(RISING, 0.1, factor=0.7, patience=0, threshold=0.001, mode="max", cooldown=9),
    ),
    "torch-plateau-greatest-absolute": (
        {"kind": "plateau", "init": 0.1, "factor": 0.9, "patience": 2, "threshold": 0.02, "mode": "max",
         "threshold_mode": "abs", "eps": 0.003},
        *plateau(RISING, 0.1, factor=0.9, patience=2, threshold=0.02, mode="max", threshold_mode="abs", eps=0.003),
    ),
}  # fmt: skip
