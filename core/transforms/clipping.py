"""Gradients that are too large are made smaller: by their norm, by value, or in proportion to the parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le

from core.errors import InvalidRecipe
from core.hyperparameters import Adjustable, NonNegative
from core.layout import Array
from core.sums import length
from core.transforms.norms import Units, by_unit, from_units, lengths, scaled, shape_here
from core.transforms.transform import Piece, Transform

PASCANU = "Pascanu, Mikolov & Bengio 2013, On the difficulty of training recurrent neural networks"


@dataclass(frozen=True)
class ClipByGlobalNorm(Transform):
    """Scales all gradients of a step together, so that their common L2 norm is at most `max_norm`.

    `eps` is added to the norm before it divides.
    """

    kind: ClassVar[str] = "clip_by_global_norm"
    formula: ClassVar[str] = (
        r"g \leftarrow g\,\min\left(1, \frac{c}{\lVert g \rVert + \varepsilon}\right),\quad "
        r"\lVert g \rVert \text{ over all tensors}"
    )
    source: ClassVar[str] = PASCANU
    url: ClassVar[str] = "https://arxiv.org/abs/1211.5063"
    notes: ClassVar[tuple[str, ...]] = (
        "torch's clip_grad_norm_: eps 1e-6, which leaves a clipped norm a little under max_norm. The paper, optax, "
        "Keras (global_clipnorm): eps 0.",
        "torch clips before its optimizer adds the L2 penalty: clip_by_global_norm first, then weight_decay.",
    )
    keeps_rows: ClassVar[bool] = True

    max_norm: NonNegative
    eps: NonNegative = 0.0

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        total = length([piece.g for piece in pieces])
        for piece in pieces:
            piece.g = _clipped(piece.g, total, self.max_norm, self.eps)
        return True


@dataclass(frozen=True)
class ClipByNorm(Transform):
    """Scales the gradient of each tensor by itself, so that its L2 norm is at most `max_norm`.

    `eps` is added to the norm before it divides.
    """

    kind: ClassVar[str] = "clip_by_norm"
    formula: ClassVar[str] = (
        r"g_i \leftarrow g_i\,\min\left(1, \frac{c}{\lVert g_i \rVert + \varepsilon}\right)"
        r"\quad\text{for each tensor } i"
    )
    source: ClassVar[str] = PASCANU
    url: ClassVar[str] = "https://arxiv.org/abs/1211.5063"
    notes: ClassVar[tuple[str, ...]] = (
        "Keras: clipnorm. torch: clip_grad_norm_ called with one tensor at a time, eps 1e-6.",
    )
    keeps_rows: ClassVar[bool] = True

    max_norm: NonNegative
    eps: NonNegative = 0.0

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            piece.g = _clipped(piece.g, length([piece.g]), self.max_norm, self.eps)
        return True


def _clipped(g: Array, total: float, max_norm: float, eps: float) -> Array:
    return scaled(g, max_norm / (total + eps)) if total + eps > max_norm else g


@dataclass(frozen=True)
class Clip(Transform):
    """Puts each element of the gradient between two values.

    `max_value` is for -max_value to max_value; or give `low`, `high` or both. 0 must lie between them.
    """

    kind: ClassVar[str] = "clip"
    formula: ClassVar[str] = r"g \leftarrow \min(\max(g, \text{low}), \text{high})"
    source: ClassVar[str] = "Mikolov 2012, Statistical Language Models Based on Neural Networks"
    url: ClassVar[str] = "https://www.fit.vut.cz/study/phd-thesis/283/.en"
    notes: ClassVar[tuple[str, ...]] = (
        "max_value is called clip_value in torch, clipvalue in Keras, max_delta in optax.",
    )
    keeps_rows: ClassVar[bool] = True

    max_value: Annotated[float, Ge(0)] | None = None
    low: Annotated[float, Le(0)] | None = None
    high: Annotated[float, Ge(0)] | None = None

    def check(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise InvalidRecipe("", "give max_value, or low, high or both")
        if "max_value" in given and len(given) > 1:
            raise InvalidRecipe("/max_value", "it stands for both low and high: give it alone")
        _Bounds(**given)

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        low = self.low if self.max_value is None else -self.max_value
        high = self.high if self.max_value is None else self.max_value
        for piece in pieces:
            number = piece.g.dtype.type
            piece.g = np.clip(piece.g, None if low is None else number(low), None if high is None else number(high))
        return True


@dataclass(frozen=True)
class _Bounds(Adjustable):
    """What the fields of Clip may be where they are given at all."""

    max_value: Annotated[float, Ge(0)] = 0.0
    low: Annotated[float, Le(0)] = 0.0
    high: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True)
class AdaptiveClip(Transform):
    """Scales the gradient of each unit, so that its norm is at most `clipping` times that of the unit's parameters.

    `units` says where in a tensor's shape they are: "first" for torch's layout (output, input, …), "last" for the one
    of Keras and JAX (…, input, output). A vector or a number is one unit. `eps` is the least norm that the parameters
    are taken to have, so that a unit which begins at zero can move.
    """

    kind: ClassVar[str] = "adaptive_clip"
    formula: ClassVar[str] = (
        r"g_i \leftarrow g_i\,\min\left(1, \frac{c\,\max(\lVert \theta_i \rVert, \varepsilon)}"
        r"{\lVert g_i \rVert}\right)\quad\text{for each unit } i"
    )
    source: ClassVar[str] = "Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization"
    url: ClassVar[str] = "https://arxiv.org/abs/2102.06171"
    notes: ClassVar[tuple[str, ...]] = (
        "optax.adaptive_grad_clip: units 'last', except that it takes the norm over the first axis alone where there "
        "are three, and over all of a (1, n) tensor.",
        "The paper leaves the last layer out: that is not possible here.",
    )
    keeps_rows: ClassVar[bool] = True

    clipping: NonNegative = 0.01
    eps: NonNegative = 1e-3
    units: Units = "first"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"})

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            if piece.p is not None and piece.g.size:
                piece.g = self._clipped(piece, piece.p)
        return True

    def _clipped(self, piece: Piece, p: Array) -> Array:
        here = shape_here(piece.shape, piece.rows)
        parameters = by_unit(p, piece.shape, self.units)
        if piece.rows is not None and len(parameters) > 1 and self.units == "first":
            parameters = parameters[piece.rows]
        gradients = by_unit(piece.g, here, self.units)
        found, allowed = lengths(gradients), self.clipping * np.maximum(lengths(parameters), self.eps)
        if not (found > allowed).any():
            return piece.g
        factors = np.divide(allowed, found, out=np.ones_like(found), where=found > allowed)
        return from_units(scaled(gradients, factors[:, None]), here, self.units)
