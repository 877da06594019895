"""Gradient to gradient, before the optimizer; a family per file.

clipping       norms and values brought down to a bound
scaling        brought to a size: normalize, centralize, sign; loss scaling; NaN to zero
penalties      what pulls towards zero: weight_decay (coupled), l1
noise          add_noise
accumulating   several gradients for one step, or their running mean: accumulate, ema
matrices       orthogonalize
projecting     parameters kept in a set, after the update: project

`KINDS` maps a kind's name to its class.
"""

# The catalogue lists the kinds in the order in which they are imported.
# isort: off
from core.transforms.transform import KINDS, Piece, Transform
from core.transforms import clipping, scaling, penalties, noise, accumulating, matrices, projecting
# isort: on

__all__ = [
    "KINDS",
    "Piece",
    "Transform",
    "accumulating",
    "clipping",
    "matrices",
    "noise",
    "penalties",
    "projecting",
    "scaling",
]
