"""How much a contribution counts by its age: τ is the number of steps since the parameters that it was taken at."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from core.bounds import check_fields
from core.kind import Kind

STALENESS: dict[str, type["Staleness"]] = {}

Power = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Staleness(Kind, registry=STALENESS):
    """A factor of the contribution: 1 for one that is up to date, never more, never negative."""

    def __post_init__(self) -> None:
        check_fields(self)

    def factor(self, tau: int) -> float:
        """For τ = 0, 1, 2, …"""
        raise NotImplementedError


@dataclass(frozen=True)
class Inverse(Staleness):
    """In inverse proportion to the age."""

    kind: ClassVar[str] = "inverse"
    formula: ClassVar[str] = r"s(\tau) = \frac{1}{1 + \tau}"
    source: ClassVar[str] = "Zhang et al. 2015, Staleness-aware Async-SGD for Distributed Deep Learning"
    url: ClassVar[str] = "https://arxiv.org/abs/1511.05950"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper divides the rate by τ, and by 1 where τ is 0: so 0 and 1 count alike. This one counts from 1.",
    )

    def factor(self, tau: int) -> float:
        return 1.0 / (1.0 + tau)


@dataclass(frozen=True)
class Polynomial(Staleness):
    """By a power of the age; with a of 0.5 it is FedBuff's."""

    kind: ClassVar[str] = "polynomial"
    formula: ClassVar[str] = r"s(\tau) = (1 + \tau)^{-a}"
    source: ClassVar[str] = (
        "Xie et al. 2019, Asynchronous Federated Optimization (FedAsync); "
        "Nguyen et al. 2021, Federated Learning with Buffered Asynchronous Aggregation (FedBuff, arXiv:2106.06639)"
    )
    url: ClassVar[str] = "https://arxiv.org/abs/1903.03934"
    notes: ClassVar[tuple[str, ...]] = (
        "With a = 0.5 it is 1/√(1 + τ), as FedBuff's paper has it; NVFlare's FedBuff weighs by 1/(1 + √τ).",
        "FedAsync mixes whole models by α · s(τ); here s(τ) is a factor of the gradient.",
    )

    a: Power = 0.5

    def factor(self, tau: int) -> float:
        # Not by `pow`, whose last bit differs between C libraries: the square root is exactly rounded everywhere.
        if self.a == 0.5:
            return 1.0 / math.sqrt(1.0 + tau)
        return float((1.0 + tau) ** -self.a)


@dataclass(frozen=True)
class Hinge(Staleness):
    """All of it up to an age of b, then in inverse proportion to what it is older."""

    kind: ClassVar[str] = "hinge"
    formula: ClassVar[str] = (
        r"s(\tau) = \begin{cases} 1 & \tau \le b \\ \frac{1}{a(\tau - b) + 1} & \text{else} \end{cases}"
    )
    source: ClassVar[str] = "Xie et al. 2019, Asynchronous Federated Optimization (FedAsync)"
    url: ClassVar[str] = "https://arxiv.org/abs/1903.03934"

    a: Power = 10.0
    b: Power = 4.0

    def factor(self, tau: int) -> float:
        return 1.0 if tau <= self.b else 1.0 / (self.a * (tau - self.b) + 1.0)
