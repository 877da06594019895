"""What a transform is: it changes the gradient on its way to the optimizer, and may remember something.

Transforms run in the order given, over all live tensors of a step at once (a global norm needs them all). One that
answers False holds the step back: the gradient was taken in, and the optimizer does not move this time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.hyperparameters import Adjustable
from core.layout import Array
from core.optimizers.rule import Own

KINDS: dict[str, type["Transform"]] = {}


@dataclass(slots=True)
class Piece:
    """A tensor's gradient on its way. `g` is flat, in the session's dtype, and must not be written to: put a new array.

    Of a row-sparse gradient, `rows` are the row numbers (k,) and g the k rows, flat.
    """

    name: str
    shape: tuple[int, ...]
    g: Array
    rows: Array | None = None
    p: Array | None = None  # the parameters of the whole tensor, flat, where they are known; not to be written to
    slots: dict[str, Array] = field(
        default_factory=dict
    )  # the transform's slots of this tensor, flat, changed in place


@dataclass(frozen=True)
class Transform(Adjustable, registry=KINDS):
    """Gradient to gradient. Its state is slots, with an element per parameter, and own arrays, one for all tensors."""

    @property
    def keeps_rows(self) -> bool:
        """Whether it works on the rows of a row-sparse gradient as they are. Otherwise it is given the whole tensor."""
        return False

    @property
    def partial(self) -> bool:
        """Whether a step may leave tensors out."""
        return True

    @property
    def mends_nan(self) -> bool:
        """Whether it makes something of a gradient that holds NaN, which is then not refused."""
        return False

    @property
    def mends_infinity(self) -> bool:
        """The same of one that holds infinity."""
        return False

    @property
    def holds_back(self) -> bool:
        """Whether it may hold a step back."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """What must be there for a step: "params"."""
        return frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays with one element per parameter, at first 0, in the session's dtype."""
        return ()

    def own(self) -> dict[str, Own]:
        """The other arrays of the state, such as a count: one for all tensors."""
        return {}

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        """Changes the gradients `pieces[i].g` of contribution number t = 1, 2, …; False: the optimizer is not to move.

        `own` and the pieces' slots are changed in place.
        """
        raise NotImplementedError

    def after(self, shape: tuple[int, ...], p: Array) -> Array:
        """What the parameters `p` of a tensor, flat, become after the update; p itself must not be written to."""
        return p

    @property
    def follows(self) -> bool:
        """Whether `after` does anything."""
        return False

    def metrics(self, own: Mapping[str, Array]) -> dict[str, Any]:
        """What a client has to know of the state for its next gradient, such as the loss scale."""
        return {}
