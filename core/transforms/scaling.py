"""What only scales, centres or mends a gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from core.errors import InvalidRecipe
from core.hyperparameters import Count, NonNegative, schedules_of
from core.layout import Array
from core.optimizers.rule import Own
from core.sums import length
from core.transforms.norms import Units, by_unit, divided, from_units, shape_here
from core.transforms.transform import Piece, Transform

FLOAT32 = np.finfo(np.float32)
# A loss scale is a float32: what the client multiplies by is, to the last bit, what is divided by here.
LossScale = Annotated[float, Ge(float(FLOAT32.tiny)), Le(float(FLOAT32.max))]


@dataclass(frozen=True)
class Normalize(Transform):
    """Divides the gradient by its L2 norm: by that of all tensors together, or of each by itself.

    `eps` is added to the norm. A gradient that is 0 stays 0.
    """

    kind: ClassVar[str] = "normalize"
    formula: ClassVar[str] = r"g \leftarrow \frac{g}{\lVert g \rVert + \varepsilon}"
    source: ClassVar[str] = "Hazan, Levy & Shalev-Shwartz 2015, Beyond Convexity (normalized gradient descent)"
    url: ClassVar[str] = "https://arxiv.org/abs/1507.02030"
    notes: ClassVar[tuple[str, ...]] = ("optax.normalize_by_update_norm: eps 1e-6; its scale_factor is the rate here.",)
    keeps_rows: ClassVar[bool] = True

    per: Literal["global", "tensor"] = "global"
    eps: NonNegative = 0.0

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        total = length([piece.g for piece in pieces]) if self.per == "global" else 0.0
        for piece in pieces:
            divisor = (length([piece.g]) if self.per == "tensor" else total) + self.eps
            piece.g = piece.g if divisor == 0 else divided(piece.g, divisor)
        return True


@dataclass(frozen=True)
class Centralize(Transform):
    """Subtracts from the gradient of each unit its mean; vectors and numbers stay as they are.

    `units` says where in a tensor's shape they are: "first" for torch's layout (output, input, …), "last" for the one
    of Keras and JAX (…, input, output).
    """

    kind: ClassVar[str] = "centralize"
    formula: ClassVar[str] = r"g_i \leftarrow g_i - \operatorname{mean}(g_i)\quad\text{for each unit } i"
    source: ClassVar[str] = "Yong et al. 2020, Gradient Centralization"
    url: ClassVar[str] = "https://arxiv.org/abs/2004.01461"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper and its code, for torch: units 'first'. optax.centralize does the same, although its users' layout "
        "is the other one. Keras's example takes units 'last'.",
    )

    units: Units = "first"

    @property
    def keeps_rows(self) -> bool:
        return self.units == "first"

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            if len(piece.shape) > 1 and piece.g.size:
                here = shape_here(piece.shape, piece.rows)
                gradients = by_unit(piece.g, here, self.units).astype(np.float64)
                means = np.add.reduce(gradients, axis=1, keepdims=True) / gradients.shape[1]
                piece.g = from_units(gradients - means, here, self.units).astype(piece.g.dtype)
        return True


@dataclass(frozen=True)
class Sign(Transform):
    """Leaves of each element its sign: -1, 0 or 1."""

    kind: ClassVar[str] = "sign"
    formula: ClassVar[str] = r"g \leftarrow \operatorname{sign}(g)"
    source: ClassVar[str] = "Bernstein et al. 2018, signSGD"
    url: ClassVar[str] = "https://arxiv.org/abs/1802.04434"
    notes: ClassVar[tuple[str, ...]] = ("optax: scale_by_sign.",)
    keeps_rows: ClassVar[bool] = True

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            piece.g = np.sign(piece.g)
        return True


@dataclass(frozen=True)
class ZeroNans(Transform):
    """Puts 0 in the place of each NaN. An infinity stays, and is refused."""

    kind: ClassVar[str] = "zero_nans"
    formula: ClassVar[str] = r"g \leftarrow 0 \text{ where } g \text{ is NaN}"
    source: ClassVar[str] = "optax.zero_nans"
    url: ClassVar[str] = "https://optax.readthedocs.io/en/latest/api/transformations.html#optax.zero_nans"
    notes: ClassVar[tuple[str, ...]] = (
        "optax lets infinities through to its optimizer. torch.nan_to_num replaces them too.",
    )
    keeps_rows: ClassVar[bool] = True
    mends_nan: ClassVar[bool] = True

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        for piece in pieces:
            missing = np.isnan(piece.g)
            if missing.any():
                piece.g = np.where(missing, piece.g.dtype.type(0), piece.g)
        return True


@dataclass(frozen=True)
class Unscale(Transform):
    """Divides the gradient by the factor that the client multiplied its loss by, against underflow in half precision.

    `dynamic`: a gradient that holds NaN or infinity is no error; the step is held back and the scale multiplied by
    `backoff_factor`. After `growth_interval` finite ones in a row it is multiplied by `growth_factor`. The reply to a
    step has the scale for the next one as the metric `loss_scale`; `scale` is then the first.
    """

    kind: ClassVar[str] = "unscale"
    formula: ClassVar[str] = (
        r"g \leftarrow g / s;\qquad \text{dynamic: } s \leftarrow "
        r"\begin{cases} s \cdot \text{backoff} & g \text{ not finite} \\"
        r" s \cdot \text{growth} & \text{after growth\_interval finite ones} \end{cases}"
    )
    source: ClassVar[str] = "Micikevicius et al. 2018, Mixed Precision Training"
    url: ClassVar[str] = "https://arxiv.org/abs/1710.03740"
    notes: ClassVar[tuple[str, ...]] = (
        "torch.amp.GradScaler: dynamic true and the defaults. Keras LossScaleOptimizer: scale 32768.",
        "It belongs before every transform that remembers gradients or clips them.",
        "The scale stays a normal float32. In torch it may shrink to 0, and then no gradient is finite any more.",
    )
    keeps_rows: ClassVar[bool] = True

    scale: LossScale = 65536.0
    dynamic: bool = False
    growth_factor: Annotated[float, Gt(1)] = 2.0
    backoff_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    growth_interval: Count = 2000

    def check(self) -> None:
        if "scale" in schedules_of(self):
            raise InvalidRecipe("/scale", "the client scales its loss by it: no schedule")

    @property
    def mends_nan(self) -> bool:
        return self.dynamic

    @property
    def mends_infinity(self) -> bool:
        return self.dynamic

    @property
    def holds_back(self) -> bool:
        return self.dynamic

    def own(self) -> dict[str, Own]:
        if not self.dynamic:
            return {}
        return {"scale": Own((), float(np.float32(self.scale)), exact=True), "good": Own((), exact=True, whole=True)}

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        if not self.dynamic:
            _divide(pieces, self.scale)
            return True
        scale = float(own["scale"])
        if not all(np.isfinite(piece.g).all() for piece in pieces):
            own["scale"][...] = max(np.float32(scale * self.backoff_factor), FLOAT32.tiny)
            own["good"][...] = 0.0
            return False
        _divide(pieces, scale)
        own["good"][...] = own["good"] + 1.0
        if own["good"] >= self.growth_interval:
            grown = np.float32(scale * self.growth_factor)
            own["scale"][...] = grown if np.isfinite(grown) else scale
            own["good"][...] = 0.0
        return True

    def metrics(self, own: Mapping[str, Array]) -> dict[str, Any]:
        return {"loss_scale": float(own["scale"]) if self.dynamic else self.scale}


def _divide(pieces: Sequence[Piece], scale: float) -> None:
    for piece in pieces:
        piece.g = divided(piece.g, scale)
