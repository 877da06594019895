"""Penalties on the parameters, by their gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from core.hyperparameters import NonNegative
from core.layout import Array
from core.transforms.transform import Piece, Transform


@dataclass(frozen=True)
class _Penalty(Transform):
    """Adds to the gradient of each tensor that of a penalty on its parameters."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"})

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            if piece.p is not None:
                piece.g = piece.g + self._gradient(piece.p)
        return True

    def _gradient(self, p: Array) -> Array:
        raise NotImplementedError


@dataclass(frozen=True)
class WeightDecay(_Penalty):
    """Adds the parameters times `weight_decay` to the gradient: the L2 penalty.

    It goes through the optimizer like the rest of the gradient. The decoupled kind, which does not, is an option of the
    optimizers (adamw, lion).
    """

    kind: ClassVar[str] = "weight_decay"
    formula: ClassVar[str] = r"g \leftarrow g + \lambda\,\theta"
    source: ClassVar[str] = "Krogh & Hertz 1991, A Simple Weight Decay Can Improve Generalization"
    url: ClassVar[str] = "https://proceedings.neurips.cc/paper/1991/hash/8eefcfdf5990e441f0fb6f3fad709e21-Abstract.html"
    notes: ClassVar[tuple[str, ...]] = (
        "It is the weight_decay of torch's SGD, Adam, Adagrad, RMSprop and Adadelta, and optax's add_decayed_weights "
        "before the optimizer. Keras's regularizer L2(l) is l θ², whose gradient is 2 l θ: give twice its number.",
    )

    weight_decay: NonNegative

    def _gradient(self, p: Array) -> Array:
        gradient: Array = p * p.dtype.type(self.weight_decay)
        return gradient


@dataclass(frozen=True)
class L1(_Penalty):
    """Adds `l1` to the gradient with the sign of the parameter: the L1 penalty, 0 where the parameter is 0.

    It seldom makes a parameter exactly 0.
    """

    kind: ClassVar[str] = "l1"
    formula: ClassVar[str] = r"g \leftarrow g + \lambda \operatorname{sign}(\theta)"
    source: ClassVar[str] = "Tibshirani 1996, Regression Shrinkage and Selection via the Lasso"
    url: ClassVar[str] = "https://doi.org/10.1111/j.2517-6161.1996.tb02080.x"
    notes: ClassVar[tuple[str, ...]] = ("Keras: the regularizer L1.",)

    l1: NonNegative

    def _gradient(self, p: Array) -> Array:
        gradient: Array = np.sign(p) * p.dtype.type(self.l1)
        return gradient
