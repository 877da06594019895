"""Transforms that remember the gradients before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from core.hyperparameters import Count, Decay
from core.layout import Array
from core.optimizers.rule import Own
from core.transforms.transform import Piece, Transform


@dataclass(frozen=True)
class Accumulate(Transform):
    """Takes in `steps` gradients and makes one step of their mean or sum; until then the parameters keep still.

    Each of them must bring all tensors.
    """

    kind: ClassVar[str] = "accumulate"
    formula: ClassVar[str] = r"g \leftarrow \frac{1}{k} \sum_{i=1}^{k} g_i \quad\text{or}\quad \sum_{i=1}^{k} g_i"
    source: ClassVar[str] = "Gradient accumulation; optax.MultiSteps"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/transformations.html#optax.MultiSteps"
    notes: ClassVar[tuple[str, ...]] = (
        "The mean is a running one, m ← m + (g - m) / i, as in optax.MultiSteps, and does not overflow where a sum "
        "would. Keras's gradient_accumulation_steps is the mean too.",
        "torch sums where backward() is called several times before a step.",
        "Transforms before it see each gradient, those after it one in `steps`.",
    )
    partial: ClassVar[bool] = False

    steps: Count
    reduce: Literal["mean", "sum"] = "mean"

    @property
    def holds_back(self) -> bool:
        return self.steps > 1

    @property
    def slots(self) -> tuple[str, ...]:
        return (self.reduce,)

    def own(self) -> dict[str, Own]:
        return {"count": Own((), exact=True, whole=True)}

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        count = own["count"]
        count += 1.0
        for piece in pieces:
            total = piece.slots[self.reduce]
            if self.reduce == "sum":
                total += piece.g
            else:
                total += (piece.g - total) / total.dtype.type(count)
        if count < self.steps:
            return False
        for piece in pieces:
            piece.g = piece.slots[self.reduce].copy()
            piece.slots[self.reduce][...] = 0
        count[...] = 0.0
        return True


@dataclass(frozen=True)
class GradientEma(Transform):
    """An exponentially weighted mean of the gradients takes the place of each.

    It starts from 0; `debias` divides by the weight that the gradients have in it so far, 1 - decay ** t, and each step
    must then bring all tensors. Without it the optimizer sees small gradients at first.
    """

    kind: ClassVar[str] = "ema"
    formula: ClassVar[str] = (
        r"m \leftarrow \beta m + (1-\beta)\, g,\quad g \leftarrow m;\qquad "
        r"\text{debias: } g \leftarrow \frac{m}{1-\beta^{t}}"
    )
    source: ClassVar[str] = "optax.ema; the first moment of Kingma & Ba 2014"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/transformations.html#optax.ema"
    notes: ClassVar[tuple[str, ...]] = (
        "Where the decay is a schedule, the correction is by the product of its values in the place of the power.",
    )

    decay: Decay
    debias: bool = True

    @property
    def partial(self) -> bool:
        return not self.debias

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mean",)

    def own(self) -> dict[str, Own]:
        return {"rest": Own((), 1.0, exact=True, least=0.0, most=1.0)} if self.debias else {}

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        weight = 1.0
        if self.debias:
            own["rest"][...] = own["rest"] * self.decay
            weight = 1.0 - float(own["rest"])
        for piece in pieces:
            mean, number = piece.slots["mean"], piece.g.dtype.type
            mean[...] = number(self.decay) * mean + number(1.0 - self.decay) * piece.g
            piece.g = mean / number(weight)
        return True
