"""How the contributions of several workers become steps: what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from core.aggregation.reducers import Mean, Reducer
from core.aggregation.staleness import Staleness
from core.bounds import check_fields
from core.errors import InvalidRecipe
from core.hyperparameters import Decay, NonNegative, Positive

Mode = Literal["async", "sync", "buffered", "ssp"]
# More names would not fit into the header of a checkpoint.
Workers = Annotated[int, Ge(1), Le(4096)]
Seconds = Annotated[float, Gt(0), Le(31_536_000)]

MEAN = Mean()
# Reducers that compare contributions keep all of them, and the work of some grows with the square of their number.
MOST_COMPARED = 1024
# How many workers have a backup for the delay compensation where nobody says how many workers there are.
BACKUPS = 64
# What belongs to which mode; the rest goes with any.
_OWN: dict[str, tuple[str, ...]] = {
    "async": ("workers",),
    "sync": ("workers", "quorum", "timeout"),
    "buffered": ("size",),
    "ssp": ("workers", "bound"),
}
_REQUIRED = {"sync": "workers", "buffered": "size", "ssp": "bound"}


@dataclass(frozen=True)
class DelayCompensation:
    """DC-ASGD (Zheng et al. 2016, arXiv:1609.08326): g + λ g ⊙ g ⊙ (w − w_bak), w_bak what the worker last pulled.

    `adaptive`: λ / √(MS + 1e-7) in place of λ, MS a running mean of g ⊙ g with `decay`.
    """

    lambda_: NonNegative = 0.04
    adaptive: bool = False
    decay: Decay = 0.95

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Aggregation:
    """How gradients become steps. Times are in seconds.

    async     each contribution is a step
    sync      a step per round: `workers` contributions close it, or `quorum` of them `timeout` after its first
    buffered  a step per `size` contributions, whoever sent them
    ssp       async, but no worker runs more than `bound` clocks ahead of the slowest
    """

    mode: Mode = "async"
    workers: Workers | None = None
    quorum: Workers | None = None
    timeout: Seconds | None = None
    size: Workers | None = None
    bound: Annotated[int, Ge(0), Le(1_000_000)] | None = None
    reduce: Reducer = MEAN
    max_staleness: Annotated[int, Ge(0)] | None = None
    staleness: Staleness | None = None
    clip_norm: Positive | None = None
    noise_multiplier: Positive | None = None
    seed: Annotated[int, Ge(0)] | None = None  # of the noise; there must be one where there is noise
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    sampling_rate: Annotated[float, Gt(0), Le(1)] = 1.0
    delay_compensation: DelayCompensation | None = None
    worker_timeout: Seconds = 60.0

    SEPARATE: ClassVar[tuple[str, ...]] = ("delta", "sampling_rate")  # they mean something beside noise alone

    def __post_init__(self) -> None:
        """Raises InvalidRecipe."""
        check_fields(self)
        self._check_mode()
        self._check_reducer()
        self._check_noise()
        if self.delay_compensation is not None and self.rounds:
            raise InvalidRecipe("/delay_compensation", "it is for contributions that are steps: mode async or ssp")

    def _check_mode(self) -> None:
        for name in ("workers", "quorum", "timeout", "size", "bound"):
            if getattr(self, name) is not None and name not in _OWN[self.mode]:
                raise InvalidRecipe(f"/{name}", f"mode {self.mode} has no {name}")
        required = _REQUIRED.get(self.mode)
        if required is not None and getattr(self, required) is None:
            raise InvalidRecipe(f"/{required}", f"mode {self.mode} needs it")
        if self.mode == "async" and self.workers is not None and self.delay_compensation is None:
            raise InvalidRecipe("/workers", "mode async counts no workers, but for its delay compensation")
        if self.quorum is not None and self.timeout is None:
            raise InvalidRecipe("/quorum", "a quorum closes a round once its `timeout` is over: give one")
        if self.quorum is not None and self.workers is not None and self.quorum > self.workers:
            raise InvalidRecipe("/quorum", f"of {self.workers} workers no {self.quorum} can contribute")

    def _check_reducer(self) -> None:
        if not self.rounds:
            if not self.reduce.running:
                raise InvalidRecipe("/reduce", f"{self.reduce.kind} is for rounds: mode sync or buffered")
        elif self.fewest < self.reduce.least:
            sentence = f"{self.reduce.kind} needs at least {self.reduce.least} contributions"
            raise InvalidRecipe("/reduce", f"{sentence}, and a round may close with {self.fewest}")
        elif not self.reduce.running and self.needed > MOST_COMPARED:
            raise InvalidRecipe("/reduce", f"{self.reduce.kind} compares at most {MOST_COMPARED} contributions")

    def _check_noise(self) -> None:
        if self.noise_multiplier is None:
            if self.seed is not None:
                raise InvalidRecipe("/seed", "it is the seed of the noise: there is none")
            for name in self.SEPARATE:
                if getattr(self, name) != getattr(Aggregation, name):
                    raise InvalidRecipe(f"/{name}", "it says something of the noise, and there is none")
            return
        if self.clip_norm is None:
            raise InvalidRecipe("/noise_multiplier", "the noise is a multiple of `clip_norm`: give one")
        if not self.reduce.running:
            raise InvalidRecipe("/noise_multiplier", "how much noise is enough is known for mean and sum alone")
        if self.delay_compensation is not None and self.delay_compensation.adaptive:
            raise InvalidRecipe("/delay_compensation/adaptive", "it would remember gradients without their noise")

    @cached_property
    def rounds(self) -> bool:
        """Whether several contributions make one step."""
        return self.mode in ("sync", "buffered")

    @cached_property
    def plain(self) -> bool:
        """Whether a contribution is a step as it is, whoever sent it."""
        return self.mode == "async" and not (
            self.clip_norm
            or self.staleness
            or self.noise_multiplier
            or self.delay_compensation
            or self.max_staleness is not None
            or self.reduce.kind != "mean"
        )

    @property
    def needed(self) -> int:
        """How many contributions close a round."""
        return self.workers or 1 if self.mode == "sync" else self.size or 1

    @property
    def fewest(self) -> int:
        """How many may close it once its time is over."""
        return self.needed if self.timeout is None else self.quorum or 1

    @property
    def names_workers(self) -> bool:
        return self.mode == "ssp" or self.delay_compensation is not None

    @property
    def looks_at_age(self) -> bool:
        return self.staleness is not None or self.max_staleness is not None

    @property
    def backups(self) -> int:
        """How many workers have a backup."""
        return 0 if self.delay_compensation is None else self.workers or BACKUPS

    def vectors(self) -> int:
        """How many arrays (n,) it keeps at most."""
        if self.delay_compensation is not None:
            return self.backups + self.delay_compensation.adaptive
        return 0 if not self.rounds else 1 if self.reduce.running else self.needed

    @property
    def kept(self) -> int:
        """How many contributions are kept as they are."""
        return self.needed if self.rounds and not self.reduce.running else 0

    def members(self) -> Mapping[str, Any]:
        """What says something: without what was left out and has no default."""
        without = () if self.noise_multiplier is not None else self.SEPARATE
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in without}
        return {name: value for name, value in named.items() if value is not None}


ASYNC = Aggregation()
