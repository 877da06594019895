"""The optimizers, a family per file, simplest first: descent, adaptive, adam, second_order.

`KINDS` maps a kind's name to its class. A new kind is one class in one of these files.
"""

from core.optimizers import adam, adaptive, descent, second_order
from core.optimizers.rule import KINDS, Dense, ElementWise, Optimizer

__all__ = ["KINDS", "Dense", "ElementWise", "Optimizer", "adam", "adaptive", "descent", "second_order"]
