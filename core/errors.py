"""What the core refuses, and why.

    CoreError
    ├── InvalidRecipe       a hyperparameter, schedule, group or shape that cannot be (pointer, reason)
    ├── InvalidState        arrays that are not a state of this recipe
    ├── ParamsRequired      the method needs the parameters, and neither the session nor the entry has them
    ├── ParamsHeld          the session has the parameters, and an entry brings others
    ├── ParamsNotHeld       the session's client holds the parameters
    ├── HessianRequired     the method needs the Hessian, or its diagonal
    ├── LossRequired        the method, or a schedule, needs the loss
    ├── WorkerRequired      the aggregation goes by the worker, and the contribution does not name it
    ├── BaseStepRequired    the aggregation goes by the age of contributions, and this one has no base_step
    ├── BaseStepAhead       base_step is a step that the session has not reached (step)
    ├── StaleGradient       older than the aggregation allows (step, staleness, limit)
    ├── NotPulled           a delay is to be compensated, and the worker pulled other parameters last (step)
    ├── AlreadyContributed  the worker's contribution to this round is there (round, worker)
    ├── TooFarAhead         the worker has to wait for the slowest (clock, slowest, bound, step)
    ├── NotReducible        the aggregation cannot take in a contribution of this form
    ├── RoundOpen           the round cannot be closed: it is not this one, or too few have contributed
    └── TensorError         an array that does not fit (tensor)
        ├── UnknownTensor
        ├── MissingGradient
        ├── NonFinite
        ├── RowsMismatch    row-sparse indices that do not fit (reason)
        ├── PositionsMismatch  positions of single elements that do not fit (reason)
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


class WorkerRequired(CoreError):
    """Who sent a contribution decides what becomes of it, and it does not say."""


class BaseStepRequired(CoreError):
    """The age of a contribution decides what becomes of it, and it does not say."""


class BaseStepAhead(CoreError):
    def __init__(self, base_step: int, step: int) -> None:
        super().__init__(f"base_step {base_step} is yet to come: the session stands at step {step}")
        self.step = step


class StaleGradient(CoreError):
    def __init__(self, step: int, staleness: int, limit: int) -> None:
        super().__init__(
            f"the contribution is {staleness} steps old, and at most {limit} are allowed: pull step {step}"
        )
        self.step = step
        self.staleness = staleness
        self.limit = limit


class NotPulled(CoreError):
    def __init__(self, worker: str, pulled: int, base_step: int) -> None:
        super().__init__(
            f"the parameters that worker {worker!r} pulled last are of step {pulled}, not {base_step}: "
            "it must name itself when it pulls"
        )
        self.step = pulled


class AlreadyContributed(CoreError):
    def __init__(self, round_: int, worker: str) -> None:
        super().__init__(f"worker {worker!r} has contributed to round {round_}: wait for the next one")
        self.round = round_
        self.worker = worker


class TooFarAhead(CoreError):
    def __init__(self, worker: str, clock: int, slowest: int, bound: int, step: int) -> None:
        super().__init__(
            f"worker {worker!r} is at clock {clock}, and the slowest at {slowest}: at most {bound} ahead is allowed"
        )
        self.clock = clock
        self.slowest = slowest
        self.bound = bound
        self.step = step


class NotReducible(CoreError):
    """A form of contribution that the session's reducer, or its noise, has no meaning for."""


class RoundOpen(CoreError):
    """There is nothing to close: the round is another one by now, or waits for contributions."""


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


class PositionsMismatch(TensorError):
    """`positions` at which the tensor has no elements."""


class ShapeMismatch(TensorError):
    def __init__(self, tensor: str, expected: Sequence[int], received: Sequence[int]) -> None:
        super().__init__(tensor, f"tensor {tensor!r} has shape {list(expected)}, but {list(received)} was received")
        self.expected = list(expected)
        self.received = list(received)
