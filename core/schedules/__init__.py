"""Hyperparameters as functions of the step, simplest first.

schedule    what one is
decay       one way: linear, exponential, cosine, …
pieces      point by point
cycles      up and down
warmup      up and then down
composed    made of others
plateau     by the loss, the only one with a state
"""

# The catalogue lists the kinds in the order in which they are imported.
# isort: off
from core.schedules.schedule import KINDS, Schedule
from core.schedules.decay import (
    Constant,
    Linear,
    Polynomial,
    Exponential,
    InverseTime,
    InverseSqrt,
    Step,
    MultiStep,
    Cosine,
)
from core.schedules.pieces import PiecewiseConstant, PiecewiseLinear
from core.schedules.cycles import CosineRestarts, Cyclic, OneCycle
from core.schedules.warmup import WarmupCosine, WarmupLinear, WarmupStableDecay
from core.schedules.composed import Product, Sequence
from core.schedules.plateau import Plateau
# isort: on

__all__ = [
    "KINDS",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Exponential",
    "InverseSqrt",
    "InverseTime",
    "Linear",
    "MultiStep",
    "OneCycle",
    "PiecewiseConstant",
    "PiecewiseLinear",
    "Plateau",
    "Polynomial",
    "Product",
    "Schedule",
    "Sequence",
    "Step",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupStableDecay",
]
