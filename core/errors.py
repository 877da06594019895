"""What the core refuses, and why.

    CoreError
    ├── InvalidRecipe       a hyperparameter, schedule, group or shape that cannot be (pointer, reason)
    ├── InvalidState        arrays that are not a state of this recipe
    ├── ParamsRequired      the method needs the parameters, and neither the session nor the entry has them
    ├── ParamsHeld          the session has the parameters, and an entry brings others
    ├── ParamsNotHeld       the session's client holds the parameters
    ├── HessianRequired     the method needs the Hessian, or its diagonal
    ├── LossRequired        the method, or a schedule, needs the loss
    └── TensorError         an array that does not fit (tensor)
        ├── UnknownTensor
        ├── MissingGradient
        ├── NonFinite
        ├── RowsMismatch    row-sparse indices that do not fit (reason)
        └── ShapeMismatch   (expected, received)

No status codes here: what a client is told is a matter of the service.
"""

from collections.abc import Sequence


class CoreError(Exception):
    """Anything that the core refuses. Nothing has changed when it is raised."""


class InvalidRecipe(CoreError):
    """`pointer` is an RFC 6901 JSON pointer into the recipe, `reason` a sentence."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(f"{pointer or '/'}: {reason}")
        self.pointer = pointer
        self.reason = reason


class InvalidState(CoreError):
    """Arrays that are not a state of the recipe that came with them."""


class ParamsRequired(CoreError):
    """The optimizer or the averaging works on the parameters, and nobody gave them."""


class ParamsHeld(CoreError):
    """The session holds the parameters, and a contribution brought some of its own."""


class ParamsNotHeld(CoreError):
    """The session holds moments only; its client has the parameters."""


class HessianRequired(CoreError):
    """A second-order method got a step without a Hessian, or without its diagonal where that was due."""


class LossRequired(CoreError):
    """A line search, or a schedule that looks at the loss, got a step without one."""


class TensorError(CoreError):
    """Something is wrong with the tensor named `tensor`."""

    def __init__(self, tensor: str, message: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class UnknownTensor(TensorError):
    def __init__(self, tensor: str, known: Sequence[str]) -> None:
        names = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        super().__init__(tensor, f"the session has no tensor {tensor!r}; it has {names}")


class MissingGradient(TensorError):
    def __init__(self, tensor: str, what: str = "gradient") -> None:
        super().__init__(tensor, f"tensor {tensor!r} has no {what} in this request")


class NonFinite(TensorError):
    def __init__(self, tensor: str, dtype: str) -> None:
        super().__init__(tensor, f"tensor {tensor!r} holds NaN or infinity once cast to {dtype}")


class RowsMismatch(TensorError):
    """Row-sparse `indices` that are not row numbers of the tensor."""


class ShapeMismatch(TensorError):
    def __init__(self, tensor: str, expected: Sequence[int], received: Sequence[int]) -> None:
        super().__init__(tensor, f"tensor {tensor!r} has shape {list(expected)}, but {list(received)} was received")
        self.expected = list(expected)
        self.received = list(received)
