"""Who contributed what and when: what decides whether a contribution is taken in, and when a round is full.

Numbers and names alone, no arrays, so a copy is cheap: whoever plans several contributions at once asks a copy, which
then knows of those before. Times are seconds (Unix) and come with the contributions; nothing here looks at a clock.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from core.aggregation.aggregation import Aggregation
from core.errors import (
    AlreadyContributed,
    BaseStepAhead,
    BaseStepRequired,
    NotPulled,
    StaleGradient,
    TooFarAhead,
    WorkerRequired,
)

# So many workers are remembered; of more, those that were seen last.
REMEMBERED = 4096
# A weight beyond it is none: sums of weights stay finite.
HEAVIEST = 1e300
# The year 9891: dates can be made of it, and of a deadline that is a year later.
LATEST = 2.5e11
MOST = 2**53 - 1  # every JSON reader has it exactly


# What a worker may be called.
LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
LONGEST_NAME = 64


def is_name(name: object) -> bool:
    """Whether a worker may be called so."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and LETTERS.issuperset(name)


class Sender(NamedTuple):
    """What a contribution says of itself. `pulls`: its sender is given the parameters that come of it."""

    worker: str | None = None
    base_step: int | None = None
    weight: float = 1.0
    at: float = 0.0
    pulls: bool = False


class Worker(NamedTuple):
    """`clock` counts its contributions, begun at the slowest one's where it came, or came back, late. `backup` is the
    step of the parameters that it pulled last, where those are kept.
    """

    contributions: int = 0
    last_seen: float = 0.0
    last_step: int = 0
    staleness: int = 0
    weight: float = 0.0
    clock: int = 0
    backup: int | None = None


@dataclass(slots=True)
class Ledger:
    """`workers` by name, the longest unseen first. `contributed`: how often each is in the open round, in order."""

    workers: dict[str, Worker] = field(default_factory=dict)
    contributed: dict[str, int] = field(default_factory=dict)
    received: int = 0
    opened_at: float = 0.0
    began: float = 0.0  # when the first contribution of all came

    def copy(self) -> "Ledger":
        return replace(self, workers=dict(self.workers), contributed=dict(self.contributed))

    # Taking in

    def admit(self, aggregation: Aggregation, step: int, sender: Sender) -> None:
        """Raises a CoreError where the session, standing at `step`, does not take the contribution in."""
        if sender.base_step is not None and sender.base_step > step:
            raise BaseStepAhead(sender.base_step, step)
        if sender.worker is None and aggregation.names_workers:
            raise WorkerRequired("who sent it decides what becomes of it here: name the `worker`")
        if sender.base_step is None and aggregation.looks_at_age:
            raise BaseStepRequired("its age decides what becomes of it here: send the `base_step` of its parameters")
        age = _age(step, sender)
        if aggregation.max_staleness is not None and age > aggregation.max_staleness:
            raise StaleGradient(step, age, aggregation.max_staleness)
        if sender.worker is None:
            return
        if aggregation.mode == "sync" and sender.worker in self.contributed:
            raise AlreadyContributed(step + 1, sender.worker)
        if aggregation.mode == "ssp":
            self._check_clock(aggregation, step, sender)
        if aggregation.delay_compensation is not None:
            self._check_backup(sender)

    def _check_clock(self, aggregation: Aggregation, step: int, sender: Sender) -> None:
        """A worker at clock c goes on iff c − min clock ≤ bound (Ho et al. 2013)."""
        assert sender.worker is not None
        assert aggregation.bound is not None
        clock = self.clock(aggregation, sender.worker, sender.at)
        slowest = int(min(clock, self.slowest(aggregation, sender.at, sender.worker)))
        if clock - slowest > aggregation.bound:
            raise TooFarAhead(sender.worker, clock, slowest, aggregation.bound, step)

    def _check_backup(self, sender: Sender) -> None:
        """The compensation is for the way from the parameters at which the gradient was taken, and no others."""
        known = self.workers.get(sender.worker or "")
        backup = None if known is None else known.backup
        if sender.base_step is not None and backup is not None and backup != sender.base_step:
            raise NotPulled(sender.worker or "", backup, sender.base_step)

    def record(self, aggregation: Aggregation, step: int, sender: Sender) -> int:
        """Takes an admitted contribution in; gives its age in steps."""
        age = _age(step, sender)
        self.began = self.began or sender.at
        if aggregation.rounds:
            self.opened_at = self.opened_at if self.received else sender.at
            self.received += 1
            if sender.worker is not None:
                self.contributed[sender.worker] = self.contributed.get(sender.worker, 0) + 1
        if sender.worker is not None:
            self._record_worker(aggregation, step, sender, age)
        return age

    def _record_worker(self, aggregation: Aggregation, step: int, sender: Sender, age: int) -> None:
        assert sender.worker is not None
        clock = self.clock(aggregation, sender.worker, sender.at) if aggregation.mode == "ssp" else 0
        known = self.workers.pop(sender.worker, Worker())
        counted = known.contributions + 1
        clock = clock + 1 if aggregation.mode == "ssp" else counted
        backup = known.backup if aggregation.delay_compensation is None or not sender.pulls else step + 1
        self.workers[sender.worker] = Worker(counted, sender.at, step + 1, age, sender.weight, clock, backup)
        self._forget()

    def _forget(self) -> None:
        while len(self.workers) > REMEMBERED:
            del self.workers[next(iter(self.workers))]

    def pull(self, aggregation: Aggregation, worker: str, step: int, at: float) -> None:
        """`worker` was given the parameters of `step`. It is there from then on, and must not hold others up."""
        clock = self.clock(aggregation, worker, at)
        known = self.workers.pop(worker, Worker())
        self.workers[worker] = known._replace(backup=step, last_seen=at, clock=clock)
        self._forget()

    def clear_round(self) -> None:
        self.contributed, self.received, self.opened_at = {}, 0, 0.0

    # Looking

    def gone(self, aggregation: Aggregation, worker: str, at: float) -> bool:
        """Whether nothing was heard of `worker` for so long that nobody waits for it any more."""
        known = self.workers.get(worker)
        return known is None or at - known.last_seen > aggregation.worker_timeout

    def slowest(self, aggregation: Aggregation, at: float, besides: str) -> float:
        """The least clock of the workers that are there, `besides` one of them; infinite if it is alone."""
        others = [name for name in self.workers if name != besides]
        if self._expects(aggregation, at, besides not in self.workers):
            return 0  # somebody who is yet to come stands at the beginning
        there = [self.workers[name].clock for name in others if not self.gone(aggregation, name, at)]
        return min(there, default=float("inf"))

    def _expects(self, aggregation: Aggregation, at: float, more: int) -> bool:
        """Whether somebody is yet to come for the first time, `more` besides those that came."""
        waiting = at - (self.began or at) <= aggregation.worker_timeout
        return waiting and len(self.workers) + more < (aggregation.workers or 0)

    def clock(self, aggregation: Aggregation, worker: str, at: float) -> int:
        """Where `worker` stands; one that was not there begins where the slowest is, and holds nobody up."""
        own = self.workers[worker].clock if worker in self.workers else 0
        if not self.gone(aggregation, worker, at) or (worker not in self.workers and self._expects(aggregation, at, 0)):
            return own
        slowest = self.slowest(aggregation, at, worker)
        return own if slowest == float("inf") else max(own, int(slowest))

    def deadline(self, aggregation: Aggregation) -> float | None:
        """When the open round may be closed by `quorum`; None without one."""
        if not self.received or aggregation.timeout is None:
            return None
        return self.opened_at + aggregation.timeout

    def closable(self, aggregation: Aggregation, at: float) -> bool:
        """Whether the open round is full, or at the time `at` over with enough contributions."""
        if not aggregation.rounds or not self.received:
            return False
        deadline = self.deadline(aggregation)
        over = deadline is not None and at >= deadline and self.received >= aggregation.fewest
        return over or self.received >= aggregation.needed

    # As JSON

    def describe(self) -> dict[str, Any]:
        """As JSON values; empty if nothing was recorded."""
        found: dict[str, Any] = {}
        if self.workers:
            found["workers"] = {name: list(worker) for name, worker in self.workers.items()}
        if self.received:
            names = [name for name, count in self.contributed.items() for _ in range(count)]
            found |= {"contributed": names, "received": self.received, "opened_at": self.opened_at}
        return found | ({"began": self.began} if self.began else {})

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "Ledger":
        """The inverse of `describe`. Raises ValueError, TypeError, KeyError, AttributeError for what is none."""
        workers = {_name(name): _worker(values) for name, values in described.get("workers", {}).items()}
        contributed = Counter(map(_name, described.get("contributed", [])))
        received = _count(described.get("received", 0))
        opened_at, began = (_moment(described.get(name, 0.0)) for name in ("opened_at", "began"))
        if contributed.total() > received:
            raise ValueError("more names than contributions")
        return cls(workers, dict(contributed), received, opened_at, began)


class Ahead(NamedTuple):
    """Where a session will stand: its step, and a ledger that knows of what comes before."""

    step: int
    ledger: Ledger


def _age(step: int, sender: Sender) -> int:
    return 0 if sender.base_step is None else step - sender.base_step


def _worker(values: Any) -> Worker:
    contributions, last_seen, last_step, staleness, weight, clock, backup = values
    counts = [_count(value) for value in (contributions, last_step, staleness, clock)]
    seen, heavy = _moment(last_seen), _number(weight, HEAVIEST)
    return Worker(counts[0], seen, counts[1], counts[2], heavy, counts[3], None if backup is None else _count(backup))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError(f"{value!r} is no count")
    return value


def _moment(value: Any) -> float:
    return _number(value, LATEST)


def _number(value: Any, most: float) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number from 0 to {most:g}")
    return float(value)


def _name(value: Any) -> str:
    if not is_name(value):
        raise ValueError(f"{value!r} is no worker's name")
    return str(value)
