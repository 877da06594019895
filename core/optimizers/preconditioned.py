"""A matrix for each axis of a tensor: what AdaGrad's full matrix is, in n² + m² numbers instead of (n · m)².

Statistics and bases are float64 whatever the session's dtype: small eigenvalues are what they are kept for, and those
are the first to drown in rounding. Matrices are decomposed by LAPACK, which wants finite ones; statistics therefore
stop at the end of float64, and what cannot be decomposed all the same leaves the last basis in place.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le

from core.hyperparameters import Count, Decay, NonNegative, Rate
from core.layout import Array
from core.optimizers.rule import Own, State, TensorWise, quotient, shrinkage

END = float(np.finfo(np.float64).max)


class Block(NamedTuple):
    """A part of a tensor: its place, and its number among the parts."""

    number: int
    where: tuple[slice, ...]


@dataclass(frozen=True)
class Shampoo(TensorWise):
    """AdaGrad with a matrix for each axis of a tensor: the gradient is multiplied by their inverse roots.

    Axes longer than `block_size` are cut, and each block of a tensor has matrices of its own; they take about 8
    `block_size` bytes for each parameter of a vector, twice that with an `interval`, and much less for one of a matrix
    with long axes. `interval` is the number of gradients from one computation of the roots to the next. `eps` times
    the identity is in every matrix. `beta2` 1 sums as in the paper, less than 1 takes running means.
    """

    kind: ClassVar[str] = "shampoo"
    formula: ClassVar[str] = (
        r"L \leftarrow L + G G^{\top},\quad R \leftarrow R + G^{\top} G,\quad "
        r"v \leftarrow \mu v + (L + \varepsilon I)^{-1/4}\, G\, (R + \varepsilon I)^{-1/4},\quad "
        r"u = -\eta v - \eta\lambda\theta;\qquad k\ \text{axes: } (\cdot)^{-1/2k}"
    )
    source: ClassVar[str] = "Gupta, Koren & Singer 2018, Shampoo: Preconditioned Stochastic Tensor Optimization"
    url: ClassVar[str] = "https://arxiv.org/abs/1802.09568"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper: momentum 0, no decay, no blocks; those are Distributed Shampoo's (Anil et al. 2020), which has "
        "grafting besides: not here.",
        "pytorch_optimizer's Shampoo: the defaults, eps 1e-6; its momentum averages a gradient with the last step.",
        "A single number is a tensor of one axis.",
    )

    lr: Rate = 1e-1
    momentum: Decay = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    eps: NonNegative = 1e-4
    beta2: Annotated[float, Ge(0), Le(1)] = 1.0
    block_size: Annotated[int, Ge(1), Le(1024)] = 128
    interval: Count = 1
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.weight_decay != 0 else ())

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        momentum = {"v": Own(shape)} if self.momentum != 0 else {}
        shape = shape or (1,)
        blocks = math.prod(-(-extent // self.block_size) for extent in shape)
        sides = [min(extent, self.block_size) for extent in shape]
        found = {f"H{axis}": Own((blocks, side, side), exact=True) for axis, side in enumerate(sides)}
        if self.interval > 1:
            found |= {f"P{axis}": Own((blocks, side, side), exact=True) for axis, side in enumerate(sides)}
            found["count"] = Own((), exact=True, whole=True)
        return found | momentum

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        tensor = g.reshape(g.shape or (1,)).astype(np.float64)
        due = True
        if "count" in state:
            due = float(state["count"]) % self.interval == 0
            state["count"][...] += 1.0
        d = np.zeros_like(tensor)
        for block in blocks_of(tensor.shape, self.block_size):
            d[block.where] = self._preconditioned(tensor[block.where], block.number, state, due=due)
        d = d.reshape(g.shape).astype(g.dtype)
        if "v" in state:
            v = state["v"]
            v[...] = self.momentum * v + d
            d = d + self.momentum * v if self.nesterov else v
        u = -self.lr * d
        if p is not None and self.weight_decay != 0:
            u = u - shrinkage(self) * p
        return np.asarray(u)

    def _preconditioned(self, block: Array, number: int, state: State, *, due: bool) -> Array:
        share = 1.0 if self.beta2 == 1 else 1.0 - self.beta2
        found = block
        for axis, side in enumerate(block.shape):
            kept = state[f"H{axis}"][number, :side, :side]
            kept[...] = limited(self.beta2 * kept + share * gram(block, axis))
            roots = state[f"P{axis}"][number, :side, :side] if "count" in state else np.zeros_like(kept)
            if due:
                fresh = inverse_root(kept, self.eps, 2 * block.ndim)
                roots[...] = roots if fresh is None else fresh
            found = rotated(found, axis, roots)
        return found


def blocks_of(shape: tuple[int, ...], size: int) -> Iterator[Block]:
    """The blocks of a tensor, in order; those at the ends may be smaller."""
    cuts = [[slice(start, min(start + size, extent)) for start in range(0, extent, size)] for extent in shape]
    for number, where in enumerate(itertools.product(*cuts)):
        yield Block(number, where)


@dataclass(frozen=True)
class Soap(TensorWise):
    """Adam in the eigenbasis of Shampoo's matrices, which are running means here.

    A tensor's first gradient only makes its basis, and does not move it. Every `interval` gradients the basis is
    refreshed by one step of power iteration. An axis longer than `max_precond_dim` keeps its own basis, and so does
    a vector unless `precondition_1d`. `normalize` scales each step to a root mean square of 1 before the rate.
    """

    kind: ClassVar[str] = "soap"
    formula: ClassVar[str] = (
        r"L \leftarrow \beta_s L + (1-\beta_s) G G^{\top},\ R \leftarrow \beta_s R + (1-\beta_s) G^{\top} G,\quad "
        r"L = Q_L \Lambda Q_L^{\top},\ R = Q_R \Lambda Q_R^{\top},\quad "
        r"u = -\eta\, Q_L\, \mathrm{adam}(Q_L^{\top} G\, Q_R)\, Q_R^{\top} - \eta\lambda\theta"
    )
    source: ClassVar[str] = "Vyas et al. 2024, SOAP: Improving and Stabilizing Shampoo using Adam"
    url: ClassVar[str] = "https://arxiv.org/abs/2409.11321"
    notes: ClassVar[tuple[str, ...]] = (
        "The authors' code: the defaults, but max_precond_dim 10000; its shampoo_beta is beta2 where it is not given. "
        "Its merging of short axes is not here.",
        "As there, the decay is of the parameters after the step, and epsilon is beside a root of v that is not "
        "corrected.",
        "Where the gradients do not fill an axis yet (fewer columns than rows), the basis of what is left is whatever "
        "LAPACK gives in the authors' code; here it follows from the basis of what is filled.",
    )

    lr: Rate = 3e-3
    beta1: Decay = 0.95
    beta2: Decay = 0.95
    shampoo_beta: Decay = 0.95
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 1e-2
    interval: Count = 10
    max_precond_dim: Annotated[int, Ge(1), Le(4096)] = 4096
    precondition_1d: bool = False
    bias_correction: bool = True
    normalize: bool = False
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.weight_decay != 0 else ())

    def axes(self, shape: tuple[int, ...]) -> list[int]:
        """The axes that get a basis. One number has but one."""
        if len(shape) == 1 and not self.precondition_1d:
            return []
        return [axis for axis, extent in enumerate(shape) if 1 < extent <= self.max_precond_dim]

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        found = {"m": Own(shape), "v": Own(shape), "count": Own((), exact=True, whole=True)}
        for axis in self.axes(shape):
            square = (shape[axis], shape[axis])
            found |= {f"GG{axis}": Own(square, exact=True), f"Q{axis}": Own(square, exact=True)}
        return found

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        count = int(state["count"])
        state["count"][...] += 1.0
        axes = self.axes(g.shape)
        tensor = g.astype(np.float64)
        if count == 0:
            self._gather(tensor, axes, state)
            for axis in axes:
                state[f"Q{axis}"][...] = eigenbasis(state[f"GG{axis}"])
            return np.zeros_like(g)
        u = self._adam(count, tensor, axes, state).astype(g.dtype)
        if p is not None and self.weight_decay != 0:
            u = u - shrinkage(self) * (p + u)
        self._gather(tensor, axes, state)
        if count % self.interval == 0:
            self._refresh(axes, state)
        return np.asarray(u)

    def _adam(self, count: int, g: Array, axes: list[int], state: State) -> Array:
        """The update but for the decay, in float64; `count` is the number of steps, this one included."""
        m, v = state["m"], state["v"]
        m[...] = self.beta1 * m + (1.0 - self.beta1) * g
        v[...] = self.beta2 * v + (1.0 - self.beta2) * np.square(into(g, axes, state))
        d = quotient(into(m.astype(np.float64), axes, state), np.sqrt(v.astype(np.float64)) + self.eps)
        for axis in axes:
            d = rotated(d, axis, state[f"Q{axis}"])
        rate = self.lr
        if self.bias_correction:
            rate *= math.sqrt(1.0 - math.pow(self.beta2, count)) / (1.0 - math.pow(self.beta1, count))
        if self.normalize and d.size:
            squares = np.square(np.ascontiguousarray(d)).reshape(-1)
            rate /= math.sqrt(float(np.add.reduce(squares)) / d.size) + self.eps or 1.0
        return np.asarray(-rate * d)

    def _gather(self, g: Array, axes: list[int], state: State) -> None:
        for axis in axes:
            kept = state[f"GG{axis}"]
            kept[...] = limited(self.shampoo_beta * kept + (1.0 - self.shampoo_beta) * gram(g, axis))

    def _refresh(self, axes: list[int], state: State) -> None:
        v = state["v"]
        for axis in axes:
            basis = state[f"Q{axis}"]
            scaled, _ = scaled_down(state[f"GG{axis}"])
            product = scaled @ basis
            order = np.argsort(-np.add.reduce(basis * product, axis=0), kind="stable")
            fresh = orthonormal(product[:, order])
            if fresh is not None:
                basis[...] = fresh
                v[...] = np.take(v, order, axis)


def into(tensor: Array, axes: list[int], state: State) -> Array:
    """`tensor` in the coordinates of the bases."""
    for axis in axes:
        tensor = rotated(tensor, axis, state[f"Q{axis}"].T)
    return tensor


def rotated(tensor: Array, axis: int, matrix: Array) -> Array:
    """`matrix` times `tensor` along an axis."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


def gram(tensor: Array, axis: int) -> Array:
    """The products of an axis's slices with one another, (n, n)."""
    extent = tensor.shape[axis]
    rows = np.moveaxis(tensor, axis, 0).reshape(extent, tensor.size // extent)
    return np.asarray(rows @ rows.T)


def limited(matrix: Array) -> Array:
    """`matrix` with the end of float64 in the place of infinity, and 0 where infinities cancelled."""
    return np.nan_to_num(matrix, nan=0.0, posinf=END, neginf=-END)


def scaled_down(matrix: Array) -> tuple[Array, float]:
    """The matrix with elements of at most 2, and the power of 2 that it was divided by, so that nothing is rounded."""
    largest = float(np.abs(matrix).max(initial=0.0))
    scale = math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest > 0 else 1.0
    return matrix / scale, scale


def eigenbasis(matrix: Array) -> Array:
    """Eigenvectors of a symmetric matrix, those of the largest eigenvalues first; the identity if there are none."""
    try:
        values, vectors = np.linalg.eigh(scaled_down(matrix)[0])
    except np.linalg.LinAlgError:
        return np.eye(len(matrix))
    basis = completed(vectors[:, ::-1], above_rounding(values[::-1]))
    return np.eye(len(matrix)) if basis is None else basis


def orthonormal(vectors: Array) -> Array | None:
    """Gram and Schmidt's basis (n, n) of n vectors, which are the columns; None if LAPACK finds none."""
    try:
        basis, triangle = np.linalg.qr(vectors)
    except np.linalg.LinAlgError:
        return None
    independent = above_rounding(np.abs(np.diagonal(triangle)))
    return np.asarray(basis) if independent.all() else completed(vectors, independent)


def above_rounding(values: Array) -> Array:
    """Which are more than what rounding makes of a 0 that comes with the largest of them."""
    return np.asarray(values > 16 * len(values) * np.finfo(np.float64).eps * values.max(initial=0.0))


def completed(vectors: Array, known: Array) -> Array | None:
    """A basis (n, n) from the columns that are `known`, at their places; None if LAPACK finds none.

    What no gradient has reached yet has no eigenvectors but rounding errors', which are any. The other columns are
    therefore those of Householder's reflections of the known ones: they follow from these, whatever their signs.
    """
    basis = np.eye(len(vectors))
    count = int(np.count_nonzero(known))
    try:
        whole = np.linalg.qr(vectors[:, known], mode="complete")[0] if count else basis.copy()
    except np.linalg.LinAlgError:
        return None
    basis[:, known], basis[:, ~known] = whole[:, :count], whole[:, count:]
    return basis


def inverse_root(matrix: Array, eps: float, root: int) -> Array | None:
    """(matrix + eps I)^(-1/root), or None. Directions that no gradient has had get 0, if eps leaves them none."""
    scaled, scale = scaled_down(matrix)
    try:
        values, vectors = np.linalg.eigh(scaled)
    except np.linalg.LinAlgError:
        return None
    values = np.maximum(values, 0.0) * scale
    lifted = values + eps
    # An eigenvalue that is a rounding error must not be divided by the root of one.
    powers = np.power(lifted, -1.0 / root, out=np.zeros_like(lifted), where=above_rounding(lifted))
    return np.asarray((vectors * powers) @ vectors.T)
