"""What a session is beside its arrays, and the small values that go between the engine and its callers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from core.contributions import Contribution
from core.layout import Array, Layout
from core.recipe import Recipe


def now() -> str:
    """The time as RFC 3339 in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


@dataclass(frozen=True, slots=True)
class Document:
    """What is stored as JSON beside the arrays of a session."""

    recipe: Recipe
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at: str = field(default_factory=now)

    def describe(self) -> dict[str, Any]:
        """As JSON values, every default filled in."""
        return self.recipe.describe() | {
            "name": self.name,
            "labels": dict(self.labels),
            "created_at": self.created_at,
        }


@dataclass(frozen=True, slots=True)
class Stamp:
    """One commit of a session. `commit` is random, so no two histories share one."""

    step: int
    commit: str

    @property
    def etag(self) -> str:
        return f'"{self.step}-{self.commit}"'


@dataclass(frozen=True, slots=True)
class Precondition:
    """A parsed If-Match or If-None-Match: any commit, or one of (step, commit); commit None: any of the step."""

    any: bool
    stamps: tuple[tuple[int, str | None], ...] = ()

    def holds(self, stamp: Stamp) -> bool:
        return self.any or any(step == stamp.step and commit in (None, stamp.commit) for step, commit in self.stamps)


EMPTY = Contribution({})


@dataclass(slots=True)
class StepRequest:
    """A contribution and what its sender asked for beside it. `size` is the bytes of the body."""

    contribution: Contribution
    returns: Literal["params", "updates", "none"] | None
    size: int
    if_match: Precondition | None = None
    key: str | None = None
    digest: str = ""

    def release(self) -> None:
        """Lets the tensors go, once they are in the log and in the session."""
        self.contribution = EMPTY


@dataclass(slots=True)
class Applied:
    """What became of a step; flat arrays (n,) where they were asked for."""

    stamp: Stamp
    layout: Layout
    params: Array | None
    updates: Array | None
    lr: float | None
    grad_norm: float | None
    metrics: Mapping[str, Any] = field(default_factory=dict)  # what the transforms have to say
    replayed: bool = False
    skipped: bool = False
    point: "Point | None" = None  # of which `params` are, where many are told the same


@dataclass(frozen=True, slots=True)
class Pending:
    """A contribution that was taken into a round, which is open yet; as number `received` of `needed`. `over`: the
    round is closed right behind it.
    """

    stamp: Stamp
    round: int
    received: int
    needed: int
    held: bool  # whether there are parameters to wait for
    replayed: bool = False
    over: bool = False
    commit: str = ""  # of the contribution


@dataclass(slots=True)
class Point:
    """The parameters (n,) at one commit; `flat` never changes. `encoded` is shared by all who read them."""

    stamp: Stamp
    layout: Layout
    flat: Array
    encoded: dict[str, Any]


class Record(NamedTuple):
    """A line of a session's history; `time` is RFC 3339."""

    step: int
    time: str
    loss: float | None
    grad_norm: float | None
    lr: float
    worker: str | None
    epsilon: float | None = None  # of the differential privacy so far, where there is any


class Event(NamedTuple):
    """Something that happened to a session; of a contribution to a round also which, and how far it is."""

    kind: Literal["step", "round", "deleted"]
    step: int
    commit: str
    received: "tuple[int, int, int] | None" = None
