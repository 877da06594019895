"""Second moments of a matrix kept as its rows' and columns' alone, which takes n + m numbers instead of n · m."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le

from core.hyperparameters import Count, Decay, NonNegative, Positive, Rate
from core.layout import Array
from core.optimizers.layerwise import length
from core.optimizers.rule import Own, State, TensorWise, quotient, shrinkage

Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Sm3(TensorWise):
    """AdaGrad whose accumulators are one per slice along each axis; a parameter's is the least of those it lies in.

    `beta2` 1 sums the squares as in the paper, less than 1 takes running means of them. `eps` is under the root; with
    0, which is the paper's, a parameter that had no gradient stays. `momentum` is a mean of what is divided already.
    """

    kind: ClassVar[str] = "sm3"
    formula: ClassVar[str] = (
        r"\nu = \min_r \mu_r + g^2,\quad \mu_r \leftarrow \max_{i \in S_r} \nu_i,\quad "
        r"m \leftarrow \beta m + (1-\beta)\frac{g}{\sqrt{\nu + \varepsilon}},\quad u = -\eta\, m"
    )
    source: ClassVar[str] = "Anil, Gupta, Koren & Singer 2019, Memory-Efficient Adaptive Optimization (SM3-II)"
    url: ClassVar[str] = "https://arxiv.org/abs/1901.11150"
    notes: ClassVar[tuple[str, ...]] = (
        "optax: eps 1e-8. pytorch_optimizer: momentum 0, eps 1e-30; with its own beta an accumulator never shrinks.",
    )

    lr: Rate = 1e-1
    momentum: Decay = 0.9
    beta2: Share = 1.0
    eps: NonNegative = 0.0

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        found = {f"mu{axis}": Own((extent,)) for axis, extent in enumerate(shape)} or {"mu0": Own(())}
        return found | ({"m": Own(shape)} if self.momentum != 0 else {})

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        share = 1.0 if self.beta2 == 1 else 1.0 - self.beta2
        axes = range(max(g.ndim, 1))
        least = along(state["mu0"], 0, g.ndim)
        for axis in axes[1:]:
            least = np.minimum(least, along(state[f"mu{axis}"], axis, g.ndim))
        nu = share * (g * g) + (self.beta2 * least if self.beta2 > 0 else 0.0)
        for axis in axes:
            others = tuple(other for other in range(g.ndim) if other != axis)
            state[f"mu{axis}"][...] = np.max(nu, axis=others, initial=0.0) if others else nu
        d = quotient(g, np.sqrt(nu + self.eps))
        if "m" in state:
            m = state["m"]
            m[...] = self.momentum * m + (1.0 - self.momentum) * d
            d = m
        return np.asarray(-self.lr * d)


def along(values: Array, axis: int, dimensions: int) -> Array:
    """One number for each index of an axis, to be broadcast over the others."""
    return values.reshape([values.size if other == axis else 1 for other in range(dimensions)])


@dataclass(frozen=True)
class Adafactor(TensorWise):
    """Adam's second moment as the product of its rows' and its columns' means, with steps relative to the parameters.

    A tensor of two axes or more is factored over its last two, or over its two longest ones with `axes` "longest",
    if both have `min_dim_size_to_factor`. The mean's decay is 1 - t^beta2_decay; the step is cut down where its root
    mean square is above `d`. `relative_step` takes no more than 1/√t as rate; `scale_parameter` multiplies
    it by the tensor's root mean square, of which `eps2` is the least. `eps1` "clamp"s the moment from below (squared),
    or with `regularize` "add" is added to each g²; 0 stands for the machine epsilon of the session's dtype.
    `beta1` not 0 takes a mean of the steps.
    """

    kind: ClassVar[str] = "adafactor"
    formula: ClassVar[str] = (
        r"R \leftarrow \beta_t R + (1-\beta_t)\,\overline{g^2}^{\,\text{row}},\quad "
        r"C \leftarrow \beta_t C + (1-\beta_t)\,\overline{g^2}^{\,\text{col}},\quad "
        r"\hat g = \frac{g}{\sqrt{R\,C\,/\,\bar R}},\quad "
        r"u = -\max(\varepsilon_2, \mathrm{rms}(\theta))\,\min(\eta, t^{-1/2})\,"
        r"\frac{\hat g}{\max(1, \mathrm{rms}(\hat g)/d)} - \eta\lambda\theta"
    )
    source: ClassVar[str] = "Shazeer & Stern 2018, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost"
    url: ClassVar[str] = "https://arxiv.org/abs/1804.04235"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: the defaults. Keras, the paper: regularize 'add', eps1 1e-30.",
        "optax: regularize 'add', eps1 1e-30, relative_step false, axes 'longest', min_dim_size_to_factor 128, "
        "decay_scaling 'none'.",
    )

    lr: Rate = 1e-2
    beta1: Decay = 0.0
    beta2_decay: Annotated[float, Le(0)] = -0.8
    eps1: NonNegative = 0.0
    eps2: NonNegative = 1e-3
    d: Positive = 1.0
    weight_decay: NonNegative = 0.0
    regularize: Literal["clamp", "add"] = "clamp"
    relative_step: bool = True
    scale_parameter: bool = True
    axes: Literal["last", "longest"] = "last"
    min_dim_size_to_factor: Count = 1
    decay_scaling: Literal["lr", "none"] = "lr"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"params"} if self.scale_parameter or self.weight_decay != 0 else ())

    def factors(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The axes of the rows and of the columns; None where the tensor is not factored."""
        if len(shape) < 2:
            return None
        axes = len(shape) - 2, len(shape) - 1
        if self.axes == "longest":
            by_length = sorted(range(len(shape)), key=lambda axis: shape[axis])
            axes = by_length[-2], by_length[-1]
        return axes if min(shape[axes[0]], shape[axes[1]]) >= self.min_dim_size_to_factor else None

    def own(self, shape: tuple[int, ...]) -> dict[str, Own]:
        axes = self.factors(shape)
        momentum = {"m": Own(shape)} if self.beta1 != 0 else {}
        if axes is None:
            return {"v": Own(shape)} | momentum
        return {"row": Own(without(shape, axes[1])), "col": Own(without(shape, axes[0]))} | momentum

    def step(self, t: int, g: Array, p: Array | None, state: State) -> Array:
        if g.size == 0:
            return np.zeros_like(g)
        eps1 = self.eps1 or float(np.finfo(g.dtype).eps)
        # No more than leaves the sums and products of them within float64.
        square = np.minimum(np.square(g.astype(np.float64)), np.finfo(np.float64).max / g.size)
        if self.regularize == "add":
            square = square + eps1
        step = quotient(g, np.sqrt(self._moment(t, square, state, eps1)).astype(g.dtype))
        shrink = max(1.0, root_mean_square(step) / self.d)
        u = (self._rate(t, p) / shrink) * step
        if "m" in state:
            m = state["m"]
            m[...] = self.beta1 * m + (1.0 - self.beta1) * u
            u = m
        u = -u
        if p is not None and self.weight_decay != 0:
            u = u - shrinkage(self) * p
        return np.asarray(u)

    def _moment(self, t: int, square: Array, state: State, eps1: float) -> Array:
        """The mean of the squares, in float64; the state takes in `square`."""
        share, least = math.pow(t, self.beta2_decay), eps1 if self.regularize == "clamp" else 0.0
        axes = self.factors(square.shape)
        if axes is None:
            moment = blend(state["v"], square, share).astype(np.float64)
        else:
            above, beside = axes
            row = blend(state["row"], mean(square, beside), share)
            col = blend(state["col"], mean(square, above), share)
            whole = np.expand_dims(mean(row, above - (beside < above)), above - (beside < above))
            row = quotient(row, np.maximum(whole, least))
            moment = np.expand_dims(row, beside) * np.expand_dims(col, above)
        return np.asarray(np.maximum(moment, least * least))

    def _rate(self, t: int, p: Array | None) -> float:
        rate = min(self.lr, 1.0 / math.sqrt(t)) if self.relative_step else self.lr
        if p is None or not self.scale_parameter:
            return rate
        return max(self.eps2, root_mean_square(p)) * rate


def without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def root_mean_square(tensor: Array) -> float:
    return length(tensor) / math.sqrt(tensor.size)


def mean(values: Array, axis: int) -> Array:
    """In float64, the axis being the innermost one in memory: so NumPy adds in pairs, in an order that is fixed."""
    moved = np.ascontiguousarray(np.moveaxis(values, axis, -1))
    return np.asarray(np.add.reduce(moved, axis=-1) / values.shape[axis])


def blend(state: Array, values: Array, share: float) -> Array:
    """`state` takes in the share of `values`, but stops at the end of its dtype; returned in float64, as stored."""
    end = float(np.finfo(state.dtype).max)
    state[...] = np.minimum((1.0 - share) * state.astype(np.float64) + share * values, end)
    return state.astype(np.float64)
