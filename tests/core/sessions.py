"""Sessions to be tested: parameters, gradients for them, and every method in one form at least."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from core.layout import Array, Rows
from core.optimizers import KINDS, Optimizer
from core.optimizers.adam import Adam
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum
from core.optimizers.quasi_newton import Lbfgs
from core.schedules import Linear
from tests.core.build import make

START = {"w": [[1.0, -2.0], [0.5, 4.0], [-0.0, 0.0]], "b": [0.25, -0.5], "s": 3.0}
RANDOM = np.random.default_rng(11)
GRADIENTS = [
    {"w": RANDOM.normal(size=(3, 2)), "b": RANDOM.normal(size=2), "s": np.asarray(RANDOM.normal())} for _ in range(5)
]
# One form of each kind, and those that keep other things than their kind does by default.
RULES: dict[str, Optimizer] = {kind: cls() for kind, cls in KINDS.items()} | {
    "momentum lookahead": Momentum(nesterov="lookahead"),
    "rmsprop with everything": RmsProp(momentum=0.5, centered=True),
    "adagrad full": Adagrad(matrix="full", initial_accumulator=0.1),
    "adam scheduled": Adam(lr=Linear(0.1, 0.01, 3), beta1=Linear(0.5, 0.9, 3)),
    "adam cautious": Adam(cautious=True),
    "lbfgs without a search": Lbfgs(line_search="none"),
}
# Those whose parameters a client may hold.
CLIENTS = [name for name, rule in RULES.items() if not make(rule, START).recipe.held_only]
PARTIAL = [name for name, rule in RULES.items() if not make(rule, START).recipe.whole_only]
# Those that move at every gradient.
PROMPT = [name for name, rule in RULES.items() if not make(rule, START).recipe.sequential or rule.kind == "sophia"]


def whole(**tensors: Any) -> dict[str, Any]:
    """A full gradient, but for `tensors`."""
    return GRADIENTS[0] | tensors


def rows(indices: list[int], values: Any) -> Rows:
    return Rows(np.array(indices, np.int64), np.asarray(values, np.float64))


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(value, np.float64) for name, value in tensors.items()}
