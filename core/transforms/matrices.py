"""Gradients of matrices as matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le

from core.hyperparameters import NonNegative
from core.layout import Array
from core.optimizers.muon import NewtonSchulz, orthogonalized
from core.sums import length
from core.transforms.transform import Piece, Transform

# The coefficients of the quintic, chosen by Jordan et al. for a steep slope at 0.
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Orthogonalize(Transform):
    """Brings all singular values of a matrix's gradient near 1; tensors of other than two dimensions stay as they are.

    By `steps` of Newton and Schulz's iteration: five bring those of over a five-hundredth of the norm to between 0.68
    and 1.21. `exact`: to 1, by the singular value decomposition. `eps` is the least norm that is divided by. A gradient
    that is 0 stays 0.
    """

    kind: ClassVar[str] = "orthogonalize"
    formula: ClassVar[str] = (
        r"X \leftarrow G / \lVert G \rVert_F,\quad X \leftarrow a X + b\,(X X^{\top}) X + c\,(X X^{\top})^{2} X;"
        r"\qquad\text{exact: } G = U \Sigma V^{\top} \mapsto U V^{\top}"
    )
    source: ClassVar[str] = "Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks"
    url: ClassVar[str] = "https://kellerjordan.github.io/posts/muon/"
    notes: ClassVar[tuple[str, ...]] = (
        "The iteration runs in float64. Muon's own and torch's run in bfloat16, whose singular values scatter more.",
        "optax adds eps to the norm. `ema` or an optimizer's velocity before it and a rate after it make Muon.",
    )

    steps: Annotated[int, Ge(1), Le(100)] = 5
    eps: NonNegative = 1e-7
    exact: bool = False

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            if len(piece.shape) == 2 and piece.g.size:
                matrix = self._orthogonal(piece.g.astype(np.float64).reshape(piece.shape))
                piece.g = matrix.astype(piece.g.dtype).reshape(-1)
        return True

    def _orthogonal(self, matrix: Array) -> Array:
        divisor = max(length([matrix.reshape(-1)]), self.eps)
        if divisor == 0:
            return matrix
        scaled = matrix / divisor
        return polar(scaled) if self.exact else orthogonalized(scaled, NewtonSchulz(*QUINTIC, self.steps))


def polar(matrix: Array) -> Array:
    """The orthogonal factor of `matrix`: its singular values at 1, and at 0 those that are 0 but for rounding."""
    if not np.isfinite(matrix).all():
        return np.full_like(matrix, np.nan)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > max(matrix.shape) * np.finfo(np.float64).eps * values[0]
    factor: Array = left[:, kept] @ right[kept]
    return factor
